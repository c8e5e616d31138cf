"""What a run recorded: the content of one file."""

import json
import pathlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sb3_softvalue.diagnostics.files import write_arrays

RECORDING_FILE = "diagnostics.npz"


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
        write_arrays(pathlib.Path(path), arrays)

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
