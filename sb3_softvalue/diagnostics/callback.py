"""The callback that records training."""

import pathlib
import time
from collections import deque
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback

from sb3_softvalue.diagnostics.calibration import CALIBRATION_FILE
from sb3_softvalue.diagnostics.observations import take
from sb3_softvalue.diagnostics.recording import RECORDING_FILE, Recording
from sb3_softvalue.diagnostics.returns import Episode, calibration_line, collected_returns
from sb3_softvalue.diagnostics.state_space import landscape
from sb3_softvalue.diagnostics.state_statistics import StateStatistics, check_has_value, read_states, temperature
from sb3_softvalue.sacv import SACV

# Number of last episodes whose states are kept
_MAX_EPISODES_WITH_STATES = 1000
# Number of bins of the action histograms
_N_BINS = 20
# Minimum time between two writes of the file, and maximum share of the time spent writing
_SAVE_SECONDS = 10.0
_SAVE_SHARE = 0.005


class SoftValueDiagnostics(BaseCallback):
    """
    Record for each episode its return, the policy's entropy, α, the actions, and V(s) with the soft return collected. The
    policy changes during an episode; ``evaluate_values`` measures a frozen policy.

    Training is bitwise identical with and without this callback. It evaluates the networks once per episode and stores only
    references at each step. SB3's logger gets the numbers under ``diagnostics/`` (means over the episodes since the last
    dump). The file ``diagnostics.npz`` is read by ``Recording.load`` and the figures.

    :param folder: folder of the run, created if missing; None uses that of SB3's logger. A new run replaces the file of an
        earlier one and removes its ``calibration.npz``. A run that continues (``reset_num_timesteps=False``, a loaded model)
        appends to the file.
    :param n_samples: sampled actions per state
    :param n_states: number of visited states to keep per episode
    :param verbose: Verbosity level: 0 for no output, 1 for info messages, 2 for debug messages
    """

    model: SACV

    def __init__(
        self,
        folder: str | pathlib.Path | None = None,
        n_samples: int = 4,
        n_states: int = 32,
        verbose: int = 0,
    ):
        super().__init__(verbose)
        self.folder = folder
        self.n_samples = n_samples
        self.n_states = n_states
        self._rows: list[dict[str, Any]] = []
        self._states: deque[dict[str, np.ndarray]] = deque(maxlen=_MAX_EPISODES_WITH_STATES)
        self._running: list[Episode] = []
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
        if self.num_timesteps == 0:
            # A report would show the calibration of an earlier run in this folder as this one's
            (self.path.parent / CALIBRATION_FILE).unlink(missing_ok=True)
        if self.num_timesteps > 0 and not self._rows and self.path.is_file():
            earlier = Recording.load(self.path)
            if earlier.n_episodes > 0:
                self._restore(earlier)
        self._rows = [row for row in self._rows if row["timesteps"] <= self.num_timesteps]
        while self._states and self._states[-1]["episode"][0] >= len(self._rows):
            self._states.pop()
        # Episodes that an earlier learn() left unfinished continue only if the environment was not reset
        if self.model._last_obs is not self._seen_obs or self.num_timesteps == 0:
            self._running = [Episode() for _ in range(self.training_env.num_envs)]
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
            episode.observations.append(take(observations, index))
            episode.actions.append(actions[index])
            episode.rewards.append(rewards[index])
            if dones[index]:
                episode.close(self.locals["infos"][index])
                self._record(episode, index)
                self._running[index] = Episode()
        return True

    def _on_training_end(self) -> None:
        # Compared by identity at the next start, to detect a reset of the environment
        self._seen_obs = self.model._last_obs
        self._save()

    def _record(self, episode: Episode, env_index: int) -> None:
        """Evaluate an episode that has just ended, and log and keep the results."""
        vec_normalize = self.model.get_vec_normalize_env()
        readings = read_states(self.model, episode.states(vec_normalize), self.n_samples, seed=len(self._rows))
        collected, tail_weights = collected_returns(self.model, episode, readings, vec_normalize)
        visited = StateStatistics(*(reading[:-1] for reading in readings))
        slope, bias = calibration_line(visited.values, collected)
        if self.num_timesteps - len(collected) * self.model.n_envs < self.model.learning_starts:
            # It began in the random warm-up
            slope = bias = float("nan")
        actions = np.stack(episode.actions).reshape(len(collected), -1)
        row = {
            "timesteps": self.num_timesteps,
            "seconds": time.monotonic() - self._start_time,
            "env": env_index,
            "return": float(np.sum(episode.rewards)),
            "length": len(collected),
            "terminated": not episode.truncated,
            "ent_coef": temperature(self.model),
            "entropy": visited.entropies.mean(),
            "value": visited.values.mean(),
            "soft_q_value": visited.soft_q_values.mean(),
            "value_gap": (visited.values - visited.soft_q_values).mean(),
            "target_lag": np.abs(visited.values - visited.target_values).mean(),
            "soft_return": collected.mean(),
            "value_bias": bias,
            "value_slope": slope,
            "bootstrapped": tail_weights.mean(),
            "action_counts": np.stack([np.histogram(column, _N_BINS, (-1.0, 1.0))[0] for column in actions.T]),
        }
        self._keep_states(episode, visited, collected)
        self._rows.append(row)
        for name in ("entropy", "value", "soft_return", "value_bias", "value_slope", "value_gap", "target_lag"):
            if not np.isnan(row[name]):
                self.logger.record_mean(f"diagnostics/{name}", float(row[name]))
        # Only TensorBoard can show histograms
        self.logger.record("diagnostics/actions", th.as_tensor(actions), exclude=("stdout", "log", "json", "csv"))
        if time.monotonic() >= self._next_save:
            self._save()

    def _keep_states(self, episode: Episode, readings: StateStatistics, collected: np.ndarray) -> None:
        """
        Keep evenly spaced states of an episode.

        :param episode: episode that has just ended
        :param readings: network outputs at its visited states
        :param collected: soft returns from these states
        """
        steps = np.unique(np.linspace(0, len(collected) - 1, self.n_states).round().astype(int))
        kept = {
            "episode": np.full(len(steps), len(self._rows)),
            "step": steps,
            "value": readings.values[steps],
            "target_value": readings.target_values[steps],
            "soft_q_value": readings.soft_q_values[steps],
            "soft_return": collected[steps],
        }
        if np.shape(episode.observations[0]) in ((2,), (3,)):
            kept["observation"] = np.stack([episode.observations[step] for step in steps])
        self._states.append(kept)

    def recording(self) -> Recording:
        """:return: everything recorded so far"""
        recording = Recording(info=self._info)
        if self._rows:
            recording.episodes = {name: np.array([row[name] for row in self._rows]) for name in self._rows[0]}
        if self._states:
            names = self._states[0]
            recording.states = {name: np.concatenate([states[name] for states in self._states]) for name in names}
        if "observation" in recording.states:
            picture = landscape(self.model, recording.states["observation"])
            recording.landscape = {} if picture is None else picture._asdict()
        return recording

    def _restore(self, recording: Recording) -> None:
        """
        :param recording: earlier recording of this run; ignored if it has another task or other bins
        """
        episodes, states = recording.episodes, recording.states
        bins = (len(self._info["action_low"]), _N_BINS)
        if recording.info["task"] != self._info["task"] or episodes["action_counts"].shape[1:] != bins:
            return
        self._rows = [{name: array[index] for name, array in episodes.items()} for index in range(recording.n_episodes)]
        for index in np.unique(states["episode"]):
            chosen = states["episode"] == index
            self._states.append({name: array[chosen] for name, array in states.items()})

    def _save(self) -> None:
        start = time.monotonic()
        self.recording().save(self.path)
        now = time.monotonic()
        self._next_save = now + max(_SAVE_SECONDS, (now - start) / _SAVE_SHARE)
        if self.verbose >= 2:
            print(f"Wrote {len(self._rows)} episodes to {self.path}")


def _run_info(model: SACV) -> dict[str, Any]:
    """:return: description of the run for titles and axis labels"""
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
