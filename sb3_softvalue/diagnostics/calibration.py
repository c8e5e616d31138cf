"""Compares V with the soft returns that a frozen policy collects."""

import pathlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch as th
from stable_baselines3.common.base_class import maybe_make_env
from stable_baselines3.common.type_aliases import GymEnv
from stable_baselines3.common.utils import check_for_correct_spaces
from stable_baselines3.common.vec_env import VecEnv, unwrap_vec_normalize

from sb3_softvalue.diagnostics.observations import take
from sb3_softvalue.diagnostics.recording import write_arrays
from sb3_softvalue.diagnostics.returns import Episode, calibration_line, collected_returns
from sb3_softvalue.diagnostics.state_statistics import check_has_value, read_states
from sb3_softvalue.sacv import SACV

CALIBRATION_FILE = "calibration.npz"


@dataclass(frozen=True)
class Calibration:
    """V and the soft returns that a frozen policy collected, at each visited state."""

    values: np.ndarray
    """V(s), shape (n_states,)"""
    collected: np.ndarray
    """Soft return collected from the same state, shape (n_states,)"""
    tail_weights: np.ndarray
    """Weight of the bootstrapped V in the soft return: γ^(remaining steps) if the episode was truncated, 0 if it terminated,
    shape (n_states,)"""
    episodes: np.ndarray
    """Index of the episode of each state, shape (n_states,)"""
    returns: np.ndarray
    """Undiscounted sum of rewards of each episode in the environment's own unit, shape (n_episodes,)"""

    @property
    def slope(self) -> float:
        """1 is calibrated, see ``calibration_line``"""
        return calibration_line(self.values, self.collected)[0]

    @property
    def bias(self) -> float:
        """Mean of V - collected in the unit of V; positive where V over-estimates"""
        return calibration_line(self.values, self.collected)[1]

    @property
    def bias_error(self) -> float:
        """Standard error of the bias over episodes (states of one episode are not independent); NaN for one episode"""
        n_episodes = len(np.unique(self.episodes))
        if n_episodes < 2:
            return float("nan")
        deviations = np.bincount(self.episodes, weights=self.values - self.collected - self.bias)
        return float(np.sqrt(np.sum(deviations**2) * n_episodes / (n_episodes - 1)) / len(self.values))

    @property
    def bootstrapped(self) -> float:
        """Mean weight of the bootstrapped V: a constant error b of V appears as a bias of b·(1 - bootstrapped)"""
        return float(self.tail_weights.mean())

    def __str__(self) -> str:
        mean, n_episodes = float(self.values.mean()), len(self.returns)
        # Three significant digits of the larger number
        decimals = max(0, 2 - int(np.floor(np.log10(max(abs(mean), abs(self.bias), 1e-6)))))
        error = "" if np.isnan(self.bias_error) else f" ± {self.bias_error:.{decimals}f}"
        return (
            f"V(s) against the soft return collected, {len(self.values)} states of {n_episodes} "
            f"episode{'' if n_episodes == 1 else 's'}: slope {self.slope:.2f} (1 is calibrated), "
            f"bias {self.bias:+.{decimals}f}{error}, mean V {mean:.{decimals}f}; "
            f"the bootstrapped V after time limits has weight {self.bootstrapped:.0%} in the return"
        )

    def save(self, folder: str | pathlib.Path) -> pathlib.Path:
        """
        :param folder: folder of the run
        :return: the file written, which ``numpy.load`` reads without pickle
        """
        path = pathlib.Path(folder) / CALIBRATION_FILE
        write_arrays(path, vars(self))
        return path

    @classmethod
    def pool(cls, parts: Sequence["Calibration"]) -> "Calibration":
        """
        :param parts: calibrations of several seeds, at least one
        :return: the calibration over all their states
        """
        pooled = {name: np.concatenate([getattr(part, name) for part in parts]) for name in vars(parts[0])}
        offsets = np.cumsum([0, *(len(part.returns) for part in parts[:-1])])
        pooled["episodes"] += np.repeat(offsets, [len(part.values) for part in parts])
        return cls(**pooled)

    @classmethod
    def load(cls, folder: str | pathlib.Path) -> "Calibration":
        """
        :param folder: folder of the run
        :return: the saved calibration
        """
        with np.load(pathlib.Path(folder) / CALIBRATION_FILE, allow_pickle=False) as arrays:
            return cls(**{name: arrays[name] for name in arrays.files})


def evaluate_values(model: SACV, env: GymEnv | str, n_episodes: int = 20, seed: int = 0, n_samples: int = 16) -> Calibration:
    """
    Run the frozen policy with sampled actions, and compare V with the soft return collected from every visited state. The
    return of a truncated episode is bootstrapped with V.

    :param model: a trained or loaded model
    :param env: an evaluation environment (if registered in Gym, can be str). If the model was trained with ``VecNormalize``,
        it needs one with the statistics and settings of training (also ``norm_reward``); they are not updated here.
    :param n_episodes: number of complete episodes, divided among the environments
    :param seed: seed of the environments and of the sampled actions; PyTorch's random state is restored afterwards
    :param n_samples: sampled actions per state to estimate the entropy
    :return: the calibration, with slope and bias
    :raises ValueError: if ``n_episodes`` is not positive, the spaces of env are not the model's, or the model was trained
        with ``VecNormalize`` and env has none
    """
    if n_episodes < 1:
        raise ValueError(f"n_episodes must be at least 1, got {n_episodes}.")
    check_has_value(model)
    vec_env = model._wrap_env(maybe_make_env(env, verbose=0), monitor_wrapper=False)
    check_for_correct_spaces(vec_env, model.observation_space, model.action_space)
    vec_normalize = unwrap_vec_normalize(vec_env)
    if vec_normalize is None and model.get_vec_normalize_env() is not None:
        raise ValueError(
            "The model was trained with VecNormalize but env has none, so that observations and rewards have another scale: "
            "wrap env with VecNormalize.load(path, env)."
        )
    was_training = vec_normalize is not None and vec_normalize.training
    if vec_normalize is not None:
        vec_normalize.training = False
    try:
        with th.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
            th.manual_seed(seed)
            episodes = _run_episodes(model, vec_env, n_episodes, seed)
    finally:
        if vec_normalize is not None:
            vec_normalize.training = was_training
    parts = []
    for index, episode in enumerate(episodes):
        readings = read_states(model, episode.states(), n_samples, seed + index)
        collected, tail_weights = collected_returns(model, episode, readings, vec_normalize)
        parts.append((readings.values[:-1], collected, tail_weights, np.full(len(collected), index), [sum(episode.rewards)]))
    return Calibration(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def _run_episodes(model: SACV, env: VecEnv, n_episodes: int, seed: int) -> list[Episode]:
    """
    :return: complete episodes of the stochastic policy, equally many (up to one) from each environment: simply taking the
        first to finish would favour short episodes
    """
    env.seed(seed)
    observations = env.reset()
    vec_normalize = unwrap_vec_normalize(env)
    targets = [(n_episodes + index) // env.num_envs for index in range(env.num_envs)]
    running = [Episode() for _ in targets]
    finished: list[Episode] = []
    while any(targets):
        if model.use_sde:
            # V averages over exploration matrices: resample at each step
            model.policy.reset_noise(env.num_envs)
        actions, _ = model.predict(observations, deterministic=False)  # type: ignore[arg-type]  # VecEnv's type allows tuples
        next_observations, rewards, dones, infos = env.step(actions)
        if vec_normalize is not None:
            rewards = vec_normalize.get_original_reward()
        for index, episode in enumerate(running):
            episode.observations.append(take(observations, index))  # type: ignore[arg-type]  # VecEnv's type allows tuples
            episode.rewards.append(rewards[index])
            if dones[index]:
                episode.close(infos[index])
                if targets[index] > 0:
                    targets[index] -= 1
                    finished.append(episode)
                running[index] = Episode()
        observations = next_observations
    return finished
