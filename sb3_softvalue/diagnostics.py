"""What a run learned: its entropy, actions and V(s), and V(s) against the soft returns that were really collected."""

import json
import os
import pathlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.base_class import maybe_make_env
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.type_aliases import GymEnv, PyTorchObs
from stable_baselines3.common.utils import check_for_correct_spaces
from stable_baselines3.common.vec_env import VecEnv, unwrap_vec_normalize

from sb3_softvalue import equations
from sb3_softvalue.sacv import SACV

Observations = np.ndarray | dict[str, np.ndarray]

RECORDING_FILE = "diagnostics.npz"
CALIBRATION_FILE = "calibration.npz"

# Largest batch of observations, repeated for each sampled action and in float32, that one forward pass takes
_CHUNK_BYTES = 32 * 1024**2
# Episodes of which single states are kept; of longer runs every second, fourth, ... episode
_MAX_EPISODES_WITH_STATES = 1000
# The file is written at most so often, and writing takes at most this share of the time
_SAVE_SECONDS = 10.0
_SAVE_SHARE = 0.005


class StateReadings(NamedTuple):
    """What the networks say of n states, each of shape (n,), float64."""

    values: np.ndarray
    """V(s)"""
    target_values: np.ndarray
    """V̄(s)"""
    soft_q_values: np.ndarray
    """E_a [min_i Q_i(s, a) - α·(log π(a|s) - log p(a))], what V is trained on (Eq. 6)"""
    entropies: np.ndarray
    """E_a [-log π(a|s)], nats over the squashed action in [-1, 1]"""
    bonuses: np.ndarray
    """E_a [-(log π(a|s) - log p(a))], what α multiplies in the objective: the entropy, but for ``action_prior="normal"``"""


def temperature(model: SACV) -> float:
    """
    :param model: with a learned or a fixed temperature
    :return: the present α
    """
    ent_coef = model.ent_coef_tensor if model.log_ent_coef is None else model.log_ent_coef.exp()
    return float(ent_coef.item())


def reward_scale(model: SACV) -> float:
    """
    :param model: with a number or a schedule as ``reward_scale``
    :return: the present factor of the rewards
    """
    scale = model.reward_scale
    return float(scale(model._current_progress_remaining) if callable(scale) else scale)


def read_states(model: SACV, observations: Observations, n_samples: int = 4, seed: int = 0) -> StateReadings:
    """
    Evaluate all networks on many states. The sampled actions come from a random generator of their own, so that reading
    does not change the training that goes on.

    :param model: the model to read
    :param observations: batch of n, as ``predict`` takes them (normalized if the model was trained with ``VecNormalize``)
    :param n_samples: sampled actions for each state
    :param seed: of the samples
    :return: one number of each kind for each state
    """
    model.policy.set_training_mode(False)
    generator = th.Generator(device=model.device).manual_seed(seed)
    n_states = _length(observations)
    n_floats = sum(array.size for array in _arrays(observations)) // n_states
    n_rows = max(1, _CHUNK_BYTES // (4 * n_floats * n_samples))
    chunks = []
    for start in range(0, n_states, n_rows):
        obs, _ = model.policy.obs_to_tensor(_take(observations, slice(start, start + n_rows)))
        chunks.append(_read_chunk(model, obs, n_samples, generator))
    return StateReadings(*th.cat(chunks, dim=1).double().cpu().numpy())


@th.no_grad()
def _read_chunk(model: SACV, obs: PyTorchObs, n_samples: int, generator: th.Generator) -> th.Tensor:
    """
    :param obs: batch of n on the model's device
    :return: the fields of ``StateReadings``, shape (5, n)
    """
    policy = model.policy
    gaussian = policy._gaussian(obs)
    mean = gaussian.mean.repeat_interleave(n_samples, dim=0)
    log_std = gaussian.stddev.log().repeat_interleave(n_samples, dim=0)
    noise = th.randn(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
    actions, log_prob = equations.squashed_gaussian(mean, log_std, noise)
    log_prior = equations.normal_log_prior(actions) if model.action_prior == "normal" else th.zeros_like(log_prob)

    if isinstance(obs, dict):
        repeated: PyTorchObs = {key: tensor.repeat_interleave(n_samples, dim=0) for key, tensor in obs.items()}
    else:
        repeated = obs.repeat_interleave(n_samples, dim=0)
    min_q_values = equations.min_over_critics(policy.critic(repeated, actions))
    soft_q_values = equations.soft_value_target(min_q_values, log_prob, th.tensor(temperature(model)), log_prior)

    def mean_over_samples(samples: th.Tensor) -> th.Tensor:
        return samples.reshape(-1, n_samples).mean(dim=1)

    return th.stack(
        [
            policy.value(obs).squeeze(dim=1),
            policy.value_target(obs).squeeze(dim=1),
            mean_over_samples(soft_q_values),
            mean_over_samples(-log_prob),
            mean_over_samples(log_prior - log_prob),
        ]
    )


def soft_returns(rewards: np.ndarray, bonuses: np.ndarray, ent_coef: float, gamma: float, final_value: float) -> np.ndarray:
    """
    Soft return collected from each step of an episode on, Σ_k γ^k (r_{t+k} + α·H_{t+k}), k from 0, the sum whose
    expectation V is (Eq. 3 unrolled). H is the mean over fresh actions of the policy, not -log π of the action taken: the
    same expectation with less noise, and free of the bias that an action of an older policy or of the warm-up brings.

    :param rewards: as V sees them (after ``VecNormalize`` and ``reward_scale``), shape (length,)
    :param bonuses: ``StateReadings.bonuses`` of the visited states in nats, shape (length,)
    :param ent_coef: α
    :param gamma: discount factor
    :param final_value: what follows the last step: V of the last observation where the episode was truncated, 0 where it
        terminated
    :return: shape (length,)
    """
    returns = np.empty(len(rewards))
    following = final_value
    for step in reversed(range(len(rewards))):
        following = rewards[step] + ent_coef * bonuses[step] + gamma * following
        returns[step] = following
    return returns


def calibration_line(values: np.ndarray, collected: np.ndarray) -> tuple[float, float]:
    """
    Slope and bias of V against the soft return collected. The slope is that of the collected return on V, because only
    this one is 1 for a perfect V however noisy single returns are.

    :param values: V(s), shape (n,)
    :param collected: soft returns from the same states, shape (n,)
    :return: slope (1 is calibrated; below 1 V is spread too wide; NaN if V does not vary), and bias, the mean of
        V - collected in the unit of V (positive: V over-estimates)
    """
    centred = values - values.mean()
    variance = float(np.mean(centred**2))
    slope = float(np.mean(centred * collected)) / variance if variance > 1e-12 else float("nan")
    return slope, float(np.mean(values - collected))


@dataclass(frozen=True)
class Calibration:
    """V against the soft returns that a frozen policy collected; one entry of each array for each visited state."""

    values: np.ndarray
    """V(s), shape (n_states,)"""
    collected: np.ndarray
    """Soft return from the same state on, shape (n_states,)"""
    tail_weights: np.ndarray
    """γ^steps left where the episode was truncated, 0 where it terminated: the share of V's own tail, shape (n_states,)"""
    episodes: np.ndarray
    """Number of the episode that the state belongs to, shape (n_states,)"""
    returns: np.ndarray
    """Undiscounted sum of the rewards in the environment's own unit, shape (n_episodes,)"""

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
        """Standard error of the bias over episodes (the states of one episode are not independent); NaN for one episode"""
        counts = np.bincount(self.episodes)
        sums = np.bincount(self.episodes, weights=self.values - self.collected)
        deviations = sums[counts > 0] - self.bias * counts[counts > 0]
        n_episodes = len(deviations)
        if n_episodes < 2:
            return float("nan")
        return float(np.sqrt(np.sum(deviations**2) * n_episodes / (n_episodes - 1)) / len(self.values))

    @property
    def bootstrapped(self) -> float:
        """Mean share of V's own tail: a constant error b of V shows as a bias of b·(1 - bootstrapped)"""
        return float(self.tail_weights.mean())

    def __str__(self) -> str:
        return (
            f"V against the soft return collected, {len(self.values)} states of {len(self.returns)} episodes: "
            f"slope {self.slope:.3f}, bias {self.bias:+.3g} ± {self.bias_error:.2g} (V {self.values.mean():.4g} on average, "
            f"{self.bootstrapped:.0%} of the collected return is V's own tail)"
        )

    def save(self, folder: str | pathlib.Path) -> pathlib.Path:
        """
        :param folder: of the run
        :return: the file written, one that ``numpy.load`` reads without pickle
        """
        path = pathlib.Path(folder) / CALIBRATION_FILE
        _write_arrays(path, vars(self))
        return path

    @staticmethod
    def exists(folder: str | pathlib.Path) -> bool:
        """
        :param folder: of the run
        :return: whether ``save`` wrote there
        """
        return (pathlib.Path(folder) / CALIBRATION_FILE).is_file()

    @classmethod
    def pool(cls, parts: Sequence["Calibration"]) -> "Calibration":
        """
        :param parts: of several seeds, at least one
        :return: all their states together
        """
        values, collected, tail_weights, returns = (
            np.concatenate([getattr(part, name) for part in parts])
            for name in ("values", "collected", "tail_weights", "returns")
        )
        offsets = np.cumsum([0, *(len(part.returns) for part in parts)])
        episodes = np.concatenate([part.episodes + offset for part, offset in zip(parts, offsets[:-1], strict=True)])
        return cls(values, collected, tail_weights, episodes, returns)

    @classmethod
    def load(cls, folder: str | pathlib.Path) -> "Calibration":
        """
        :param folder: of the run
        :return: what ``save`` wrote there
        """
        with np.load(pathlib.Path(folder) / CALIBRATION_FILE, allow_pickle=False) as arrays:
            return cls(**{name: arrays[name] for name in arrays.files})


def evaluate_values(model: SACV, env: GymEnv | str, n_episodes: int = 20, seed: int = 0, n_samples: int = 16) -> Calibration:
    """
    Run the frozen policy with sampled actions and compare V with the soft return collected from every visited state, the
    tail bootstrapped with V where an episode was truncated.

    :param model: trained or loaded
    :param env: not the one being trained on (if registered in Gym, can be str); with ``VecNormalize`` if the model was
        trained with it, with the statistics and settings of the training (also ``norm_reward``), not updated here
    :param n_episodes: complete episodes to run, divided among the environments
    :param seed: of the environments and of the sampled actions; the random state of the caller is left as it was
    :param n_samples: sampled actions for each entropy
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
            "The model was trained with VecNormalize but env has none, so that V would see other observations and rewards: "
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
    ent_coef, scale = temperature(model), reward_scale(model)
    parts = []
    for index, episode in enumerate(episodes):
        readings = read_states(model, episode.states(), n_samples, seed + index)
        rewards = np.array(episode.rewards, dtype=np.float64) * scale
        collected, tail_weights = _collected(rewards, readings, ent_coef, model.gamma, episode.truncated)
        parts.append((readings.values[:-1], collected, tail_weights, np.full(len(rewards), index)))
    returns = np.array([sum(episode.raw_rewards) for episode in episodes])
    values, collected, tail_weights, indices = (np.concatenate(column) for column in zip(*parts, strict=True))
    return Calibration(values, collected, tail_weights, indices, returns)


def check_has_value(model: Any) -> None:
    """
    :param model: any model of SB3
    :raises TypeError: if it has no value network
    """
    if not isinstance(model, SACV):
        raise TypeError(f"{type(model).__name__} has no soft value network to read: train with sb3_softvalue.SACV instead.")


@dataclass
class _Episode:
    """What is remembered of one episode while it goes on: references to the arrays that SB3 made, nothing computed."""

    start: int = 0
    """Time step of the model at which it began"""
    observations: list[Any] = field(default_factory=list)
    actions: list[np.ndarray] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    """Of the environment, or in evaluation after ``VecNormalize``"""
    raw_rewards: list[float] = field(default_factory=list)
    """Of the environment, in evaluation only"""
    final_observation: Any = None
    truncated: bool = False

    def close(self, info: dict[str, Any]) -> None:
        """
        :param info: of the last step
        """
        self.final_observation = info["terminal_observation"]
        self.truncated = bool(info.get("TimeLimit.truncated", False))

    def states(self) -> Observations:
        """:return: the visited observations and the one after the last step, batch of length + 1"""
        return _stack([*self.observations, self.final_observation])


def _collected(
    rewards: np.ndarray, readings: StateReadings, ent_coef: float, gamma: float, truncated: bool
) -> tuple[np.ndarray, np.ndarray]:
    """
    :param rewards: as V sees them, shape (length,)
    :param readings: of the length + 1 states
    :param ent_coef: α
    :param gamma: discount factor
    :param truncated: whether the episode was cut by a time limit, so that V of its last state follows
    :return: soft returns, and the weight of the bootstrapped tail in each, both of shape (length,)
    """
    final_value = readings.values[-1] if truncated else 0.0
    collected = soft_returns(rewards, readings.bonuses[:-1], ent_coef, gamma, final_value)
    tail_weights = gamma ** np.arange(len(rewards), 0, -1) if truncated else np.zeros(len(rewards))
    return collected, tail_weights


def _run_episodes(model: SACV, env: VecEnv, n_episodes: int, seed: int) -> list[_Episode]:
    """
    :return: complete episodes of the stochastic policy, the same number (or one less) from each environment, because the
        first ones to end would be the short ones
    """
    env.seed(seed)
    observations = env.reset()
    vec_normalize = unwrap_vec_normalize(env)
    targets = [(n_episodes + index) // env.num_envs for index in range(env.num_envs)]
    running = [_Episode() for _ in targets]
    finished: list[_Episode] = []
    while any(targets):
        if model.use_sde:
            # V knows the policy's marginal over the exploration matrix: draw it anew at each step
            model.policy.reset_noise(env.num_envs)
        actions, _ = model.predict(observations, deterministic=False)  # type: ignore[arg-type]
        next_observations, rewards, dones, infos = env.step(actions)
        raw_rewards = rewards if vec_normalize is None else vec_normalize.get_original_reward()
        for index, episode in enumerate(running):
            episode.observations.append(_take(observations, index))  # type: ignore[arg-type]
            episode.rewards.append(rewards[index])
            episode.raw_rewards.append(raw_rewards[index])
            if dones[index]:
                episode.close(infos[index])
                if targets[index] > 0:
                    targets[index] -= 1
                    finished.append(episode)
                running[index] = _Episode()
        observations = next_observations
    return finished


@dataclass
class Recording:
    """
    What ``SoftValueDiagnostics`` wrote: the content of one file.

    Values and soft returns are in the reward's scale after ``reward_scale`` and ``VecNormalize``, entropies in nats over the
    squashed action in [-1, 1].
    """

    info: dict[str, Any] = field(default_factory=dict)
    """``task``, ``algorithm``, ``seed``, ``gamma``, ``action_prior``, ``n_envs``, ``action_low`` and ``action_high``"""
    episodes: dict[str, np.ndarray] = field(default_factory=dict)
    """
    One row for each episode: ``timesteps`` (of the model when it ended), ``seconds`` (of training), ``env``, ``return`` (the
    environment's own rewards), ``length``, ``terminated``, ``ent_coef``, ``entropy``, ``value``, ``soft_q_value``,
    ``value_gap`` (mean of V - soft Q-value), ``target_lag`` (mean of abs(V - V̄)), ``soft_return``, ``value_bias``,
    ``value_slope`` (both NaN for episodes of the random warm-up), ``bootstrapped``, and ``action_counts``, shape
    (n_episodes, action_dim, n_bins), over equal bins from the lowest to the highest action
    """
    states: dict[str, np.ndarray] = field(default_factory=dict)
    """
    One row for each of some visited states: ``episode``, ``step``, ``value``, ``target_value``, ``soft_q_value``,
    ``soft_return``, and ``observation`` where it has at most three dimensions
    """
    landscape: dict[str, np.ndarray] = field(default_factory=dict)
    """The fields of ``Landscape``, or nothing"""

    @property
    def n_episodes(self) -> int:
        """Number of recorded episodes"""
        return len(self.episodes.get("timesteps", ()))

    def save(self, path: str | pathlib.Path) -> None:
        """
        Write the file at once: a reader, or one who comes after a crash, finds the old or the new one.

        :param path: of the file
        """
        arrays = {"info": np.array(json.dumps(self.info))}
        for group in ("episodes", "states", "landscape"):
            arrays |= {f"{group}.{name}": array for name, array in getattr(self, group).items()}
        _write_arrays(pathlib.Path(path), arrays)

    @classmethod
    def load(cls, path: str | pathlib.Path) -> "Recording":
        """
        :param path: of the file, or of the folder it lies in
        :return: its content
        :raises FileNotFoundError: if there is none
        """
        path = pathlib.Path(path)
        path = path / RECORDING_FILE if path.is_dir() else path
        if not path.is_file():
            raise FileNotFoundError(f"There is no {path}: train with the callback SoftValueDiagnostics(folder) first.")
        recording = cls()
        with np.load(path, allow_pickle=False) as arrays:
            recording.info = json.loads(str(arrays["info"]))
            for key in arrays.files:
                group, _, name = key.partition(".")
                if name:
                    getattr(recording, group)[name] = arrays[key]
        return recording


class SoftValueDiagnostics(BaseCallback):
    """
    Record for each episode its return, the policy's entropy, α, the actions used and what V said, beside the soft return
    that was really collected. The policy changes while an episode is collected; ``evaluate_values`` has it frozen.

    At each step it only remembers references; the networks are evaluated once at the end of an episode. Training is the
    same, bit for bit, as without it. The numbers go to SB3's logger under ``diagnostics/`` (means over the episodes since
    the last dump) and to one file, ``diagnostics.npz``, which ``Recording.load`` and the figures read.

    :param folder: of the run, made if it is not there; None takes that of SB3's logger. A new run replaces the file of an
        earlier one; one that goes on (``reset_num_timesteps=False``, a loaded model) continues it.
    :param n_samples: sampled actions for each state
    :param n_states: visited states to keep of each episode
    :param n_bins: of the action histograms
    :param verbose: Verbosity level: 0 for no output, 1 for info messages, 2 for debug messages
    """

    model: SACV

    def __init__(
        self,
        folder: str | pathlib.Path | None = None,
        n_samples: int = 4,
        n_states: int = 32,
        n_bins: int = 20,
        verbose: int = 0,
    ):
        super().__init__(verbose)
        self.folder = folder
        self.n_samples = n_samples
        self.n_states = n_states
        self.n_bins = n_bins
        self._rows: list[dict[str, Any]] = []
        self._states: dict[int, dict[str, np.ndarray]] = {}
        self._stride = 1
        self._running: list[_Episode] = []
        self._seen_obs: Any = None
        self._next_save = 0.0

    @property
    def path(self) -> pathlib.Path:
        """The file that is written"""
        folder = self.logger.get_dir() if self.folder is None else self.folder
        assert folder is not None
        return pathlib.Path(folder) / RECORDING_FILE

    def _init_callback(self) -> None:
        check_has_value(self.model)

    def _on_training_start(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._info = _run_info(self.model)
        if self.num_timesteps > 0 and not self._rows and self.path.is_file():
            self._restore(Recording.load(self.path))
        self._rows = [row for row in self._rows if row["timesteps"] <= self.num_timesteps]
        self._states = {index: states for index, states in self._states.items() if index < len(self._rows)}
        # Episodes that were going on when an earlier learn() ended go on only if the environment was not reset since
        if self.model._last_obs is not self._seen_obs or self.num_timesteps == 0:
            self._running = [_Episode(start=self.num_timesteps) for _ in range(self.training_env.num_envs)]
        now = time.monotonic()
        self._start_time = now - (self._rows[-1]["seconds"] if self._rows else 0.0)
        self._next_save = now + _SAVE_SECONDS

    def _on_step(self) -> bool:
        vec_normalize = self.model.get_vec_normalize_env()
        if vec_normalize is None:
            observations, rewards = self.model._last_obs, self.locals["rewards"]
        else:
            observations, rewards = self.model._last_original_obs, vec_normalize.get_original_reward()
        assert observations is not None
        actions, dones = self.locals["buffer_actions"], self.locals["dones"]
        for index, episode in enumerate(self._running):
            episode.observations.append(_take(observations, index))
            episode.actions.append(actions[index])
            episode.rewards.append(rewards[index])
            if dones[index]:
                episode.close(self.locals["infos"][index])
                self._record(episode, index)
                self._running[index] = _Episode(start=self.num_timesteps)
        return True

    def _on_training_end(self) -> None:
        # The last step's observation is stored after the callback: the identity tells whether the environment was reset
        self._seen_obs = self.model._last_obs
        self._save()

    def _record(self, episode: _Episode, env_index: int) -> None:
        """
        :param episode: that just ended
        :param env_index: where
        """
        states, rewards = self._as_v_sees(episode)
        readings = read_states(self.model, states, self.n_samples, seed=len(self._rows))
        ent_coef = temperature(self.model)
        collected, tail_weights = _collected(rewards, readings, ent_coef, self.model.gamma, episode.truncated)
        visited = StateReadings(*(reading[:-1] for reading in readings))
        slope, bias = calibration_line(visited.values, collected)
        if episode.start < self.model.learning_starts:
            slope = bias = float("nan")
        row = {
            "timesteps": self.num_timesteps,
            "seconds": time.monotonic() - self._start_time,
            "env": env_index,
            "return": float(np.sum(episode.rewards)),
            "length": len(rewards),
            "terminated": not episode.truncated,
            "ent_coef": ent_coef,
            "entropy": visited.entropies.mean(),
            "value": visited.values.mean(),
            "soft_q_value": visited.soft_q_values.mean(),
            "value_gap": (visited.values - visited.soft_q_values).mean(),
            "target_lag": np.abs(visited.values - visited.target_values).mean(),
            "soft_return": collected.mean(),
            "value_bias": bias,
            "value_slope": slope,
            "bootstrapped": tail_weights.mean(),
            "action_counts": _action_counts(episode.actions, self.n_bins),
        }
        self._keep_states(episode, visited, collected)
        self._rows.append(row)
        self._log(row, episode)
        if time.monotonic() >= self._next_save:
            self._save()

    def _as_v_sees(self, episode: _Episode) -> tuple[Observations, np.ndarray]:
        """
        :param episode: that just ended
        :return: its length + 1 observations and its rewards, shape (length,), with the normalization and the scale of now
        """
        vec_normalize, scale = self.model.get_vec_normalize_env(), reward_scale(self.model)
        rewards = np.array(episode.rewards, dtype=np.float64)
        if vec_normalize is None:
            return episode.states(), rewards * scale
        # The last observation was normalized by the environment, just now
        states = _append(vec_normalize.normalize_obs(_stack(episode.observations)), episode.final_observation)
        return states, vec_normalize.normalize_reward(rewards).astype(np.float64) * scale

    def _keep_states(self, episode: _Episode, readings: StateReadings, collected: np.ndarray) -> None:
        """
        Keep some evenly spaced states of the episode, but of long runs not of every episode.

        :param episode: that just ended
        :param readings: of its visited states
        :param collected: soft returns from them
        """
        index = len(self._rows)
        if index % self._stride:
            return
        steps = np.unique(np.linspace(0, len(collected) - 1, self.n_states).round().astype(int))
        kept = {
            "episode": np.full(len(steps), index),
            "step": steps,
            "value": readings.values[steps],
            "target_value": readings.target_values[steps],
            "soft_q_value": readings.soft_q_values[steps],
            "soft_return": collected[steps],
        }
        if _is_small_box(self.model.observation_space):
            kept["observation"] = np.stack([episode.observations[step] for step in steps])
        self._states[index] = kept
        if len(self._states) > _MAX_EPISODES_WITH_STATES:
            self._stride *= 2
            self._states = {index: states for index, states in self._states.items() if index % self._stride == 0}

    def _log(self, row: dict[str, Any], episode: _Episode) -> None:
        """
        :param row: of the episode
        :param episode: that just ended
        """
        for name in ("entropy", "value", "soft_return", "value_bias", "value_slope", "value_gap", "target_lag"):
            if not np.isnan(row[name]):
                self.logger.record_mean(f"diagnostics/{name}", float(row[name]))
        # A histogram, which only TensorBoard can show
        self.logger.record(
            "diagnostics/actions", th.as_tensor(np.stack(episode.actions)), exclude=("stdout", "log", "json", "csv")
        )

    def recording(self) -> Recording:
        """:return: all that was recorded so far"""
        recording = Recording(info=self._info)
        if self._rows:
            recording.episodes = {name: _compact([row[name] for row in self._rows]) for name in self._rows[0]}
        kept = list(self._states.values())
        if kept:
            recording.states = {name: _compact(np.concatenate([states[name] for states in kept])) for name in kept[0]}
        if "observation" in recording.states:
            picture = landscape(self.model, recording.states["observation"])
            recording.landscape = {} if picture is None else picture._asdict()
        return recording

    def _restore(self, recording: Recording) -> None:
        """
        :param recording: of the run that goes on; one of another task, or with other bins, is not continued but replaced
        """
        episodes, states = recording.episodes, recording.states
        bins = (len(self._info["action_low"]), self.n_bins)
        if recording.info["task"] != self._info["task"] or episodes.get("action_counts", np.empty(0)).shape[1:] != bins:
            return
        self._rows = [{name: array[index] for name, array in episodes.items()} for index in range(recording.n_episodes)]
        for index in np.unique(states["episode"]) if states else ():
            chosen = states["episode"] == index
            self._states[int(index)] = {name: array[chosen] for name, array in states.items()}

    def _save(self) -> None:
        start = time.monotonic()
        self.recording().save(self.path)
        now = time.monotonic()
        self._next_save = now + max(_SAVE_SECONDS, (now - start) / _SAVE_SHARE)
        if self.verbose >= 2:
            print(f"Wrote {len(self._rows)} episodes to {self.path}")


class Landscape(NamedTuple):
    """V and the policy's mean action over two coordinates of the state space."""

    x: np.ndarray
    """First coordinate, shape (n_x,)"""
    y: np.ndarray
    """Second coordinate, shape (n_y,)"""
    values: np.ndarray
    """V, shape (n_y, n_x)"""
    actions: np.ndarray
    """Deterministic actions in the environment's units, shape (n_y, n_x, action_dim)"""
    is_angle: np.ndarray
    """Whether the first coordinate is the angle, in rad, of which the first two observations are cosine and sine"""
    fixed: np.ndarray
    """Value at which a third coordinate is held, shape (1,), or (0,)"""


def landscape(model: SACV, observations: np.ndarray, n_points: int = 61) -> Landscape | None:
    """
    V over the state space of a task with two or three dimensions. Three dimensions of which the first two are cosine and
    sine of an angle (Pendulum) are angle and rest; else the third is held at the median of those visited.

    :param model: trained or loaded
    :param observations: visited ones, not normalized, shape (n, 2) or (n, 3); they give the range where the space has no
        bounds
    :param n_points: along each coordinate
    :return: None if the observations are not a vector of two or three numbers
    """
    space = model.observation_space
    if not _is_small_box(space):
        return None
    assert isinstance(space, spaces.Box)
    observations = np.asarray(observations, dtype=np.float64)
    low = np.where(np.isfinite(space.low), space.low, observations.min(axis=0))
    high = np.where(np.isfinite(space.high), space.high, observations.max(axis=0))
    is_angle = len(low) == 3 and bool(np.allclose(np.sum(observations[:, :2] ** 2, axis=1), 1.0, atol=1e-3))
    last = 2 if is_angle else 1
    x = np.linspace(-np.pi, np.pi, n_points) if is_angle else np.linspace(low[0], high[0], n_points)
    y = np.linspace(low[last], high[last], n_points)
    grid_x, grid_y = (grid.ravel() for grid in np.meshgrid(x, y))
    fixed = np.median(observations[:, 2:], axis=0) if not is_angle else np.empty(0)
    columns = (
        [np.cos(grid_x), np.sin(grid_x), grid_y] if is_angle else [grid_x, grid_y, *(np.full(len(grid_x), v) for v in fixed)]
    )
    grid: Any = np.stack(columns, axis=1).astype(space.dtype)
    vec_normalize = model.get_vec_normalize_env()
    if vec_normalize is not None:
        grid = vec_normalize.normalize_obs(grid)
    actions, _ = model.predict(grid, deterministic=True)
    shape = (n_points, n_points)
    values = model.predict_values(grid).reshape(shape)
    return Landscape(x, y, values, actions.reshape(*shape, -1), np.array(is_angle), fixed)


def _run_info(model: SACV) -> dict[str, Any]:
    """
    :return: what names the run and gives its figures their units
    """
    env, space = model.get_env(), model.action_space
    assert env is not None and isinstance(space, spaces.Box)
    try:
        spec = env.get_attr("spec")[0]
    except (AttributeError, NotImplementedError):
        spec = None
    return {
        "task": "" if spec is None else spec.id,
        "algorithm": type(model).__name__,
        "seed": model.seed,
        "gamma": model.gamma,
        "action_prior": model.action_prior,
        "n_envs": model.n_envs,
        "action_low": space.low.ravel().tolist(),
        "action_high": space.high.ravel().tolist(),
    }


def _is_small_box(space: spaces.Space) -> bool:
    """
    :return: whether the observations are vectors of two or three numbers
    """
    return isinstance(space, spaces.Box) and space.shape in ((2,), (3,))


def _action_counts(actions: Sequence[np.ndarray], n_bins: int) -> np.ndarray:
    """
    :param actions: in [-1, 1], each of shape (action_dim,)
    :param n_bins: over [-1, 1]
    :return: shape (action_dim, n_bins)
    """
    flat = np.stack(actions).reshape(len(actions), -1)
    return np.stack([np.histogram(column, bins=n_bins, range=(-1.0, 1.0))[0] for column in flat.T])


def _compact(values: Any) -> np.ndarray:
    """
    :return: the same numbers, in half the bytes where that loses nothing of use
    """
    array = np.asarray(values)
    if array.dtype == np.float64:
        return array.astype(np.float32)
    return array.astype(np.int32) if array.ndim == 3 else array


def _write_arrays(path: pathlib.Path, arrays: dict[str, np.ndarray]) -> None:
    """
    :param path: of the file, which is replaced at once and never seen half-written
    :param arrays: to write
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _arrays(observations: Observations) -> list[np.ndarray]:
    """:return: the arrays of the observations, one or those of each key"""
    return list(observations.values()) if isinstance(observations, dict) else [observations]


def _length(observations: Observations) -> int:
    """:return: number of observations in the batch"""
    return len(_arrays(observations)[0])


def _take(observations: Observations, index: int | slice) -> Observations:
    """:return: one observation, or a part of the batch"""
    if isinstance(observations, dict):
        return {key: array[index] for key, array in observations.items()}
    return observations[index]


def _stack(observations: Sequence[Any]) -> Observations:
    """:return: a batch of single observations"""
    if isinstance(observations[0], dict):
        return {key: np.stack([obs[key] for obs in observations]) for key in observations[0]}
    return np.stack(observations)


def _append(observations: Observations, last: Any) -> Observations:
    """:return: the batch with one observation more"""
    if isinstance(observations, dict):
        return {key: np.concatenate([array, last[key][None]]) for key, array in observations.items()}
    return np.concatenate([observations, last[None]])
