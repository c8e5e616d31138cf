"""The recording of a run, stored in one file of arrays."""

import json
import os
import pathlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np

RECORDING_FILE = "diagnostics.npz"


@dataclass
class Recording:
    """
    The data that ``SoftValueDiagnostics`` records.

    The unit of values and soft returns is that of the reward after ``VecNormalize`` and ``reward_scale``. Entropies are in
    nats over the squashed action in [-1, 1].
    """

    info: dict[str, Any] = field(default_factory=dict)
    """``task``, ``algorithm``, ``seed``, ``gamma``, ``action_prior``, ``n_envs``, ``action_low`` and ``action_high``"""
    episodes: dict[str, np.ndarray] = field(default_factory=dict)
    """
    One row per episode: ``timesteps`` (of the model at its end), ``seconds`` (of training), ``env``, ``return`` (sum of the
    environment's own rewards), ``length``, ``terminated``, ``ent_coef``, ``entropy``, ``value``, ``soft_q_value``,
    ``value_gap`` (mean of V - soft Q-value), ``target_lag`` (mean of abs(V - V̄)), ``soft_return``, ``value_bias``,
    ``value_slope`` (both NaN for episodes of the random warm-up), ``bootstrapped``, and ``action_counts``, shape
    (n_episodes, action_dim, n_bins), over equal bins from the lowest to the highest action
    """
    states: dict[str, np.ndarray] = field(default_factory=dict)
    """
    One row per kept state of the last 1,000 episodes: ``episode``, ``step``, ``value``, ``target_value``, ``soft_q_value``,
    ``soft_return``, and ``observation`` if it has two or three numbers
    """
    landscape: dict[str, np.ndarray] = field(default_factory=dict)
    """The fields of ``Landscape``; empty for tasks with larger observations"""

    @property
    def n_episodes(self) -> int:
        """Number of recorded episodes"""
        return len(self.episodes.get("timesteps", ()))

    def save(self, path: str | pathlib.Path) -> None:
        """
        Write the file atomically: a reader sees the old or the new file, also after a crash.

        :param path: path of the file
        """
        arrays = {"info": np.array(json.dumps(self.info))}
        for group in ("episodes", "states", "landscape"):
            arrays |= {f"{group}.{name}": array for name, array in getattr(self, group).items()}
        write_arrays(pathlib.Path(path), arrays)

    @classmethod
    def load(cls, path: str | pathlib.Path) -> "Recording":
        """
        :param path: path of the file, or of its folder
        :return: the recording
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


def write_arrays(path: pathlib.Path, arrays: dict[str, np.ndarray]) -> None:
    """
    Write atomically: a reader sees the old or the new file.

    :param path: path of the file
    :param arrays: arrays to write
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            np.savez_compressed(file, **arrays)  # type: ignore[arg-type]  # mypy matches ** with allow_pickle
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
