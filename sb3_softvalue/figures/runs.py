"""Quantities, tenths and labels of one run or of several seeds."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from sb3_softvalue.diagnostics import Recording

# Names and units of coordinates and actions of well-known tasks
_STATE_LABELS = {
    "Pendulum-v1": ("angle from upright (rad)", "angular velocity (rad/s)"),
    "MountainCarContinuous-v0": ("position (track units)", "velocity (track units per step)"),
}
_ACTION_LABELS = {
    "Pendulum-v1": ["torque (N·m)"],
    "MountainCarContinuous-v0": ["force (share of the motor's)"],
    "Reacher-v5": ["shoulder torque (N·m)", "elbow torque (N·m)"],
}

Recordings = Recording | Sequence[Recording]


def as_list(recordings: Recordings) -> list[Recording]:
    """
    :return: the recordings, at least one
    :raises ValueError: if there is none, or one has no finished episode
    """
    recordings = [recordings] if isinstance(recordings, Recording) else list(recordings)
    if not recordings or any(recording.n_episodes == 0 for recording in recordings):
        raise ValueError("There is no finished episode to draw: train longer.")
    return recordings


def titled(recordings: list[Recording], text: str) -> str:
    """:return: a title with the algorithm and the task"""
    info = recordings[0].info
    return f"{text}: {info['algorithm']} on {info['task'] or 'a custom task'}"


def tenth(n_episodes: int, index: int) -> slice:
    """:return: one of ten consecutive parts of the episodes; with fewer than ten episodes, some are repeated"""
    start, end = n_episodes * index // 10, n_episodes * (index + 1) // 10
    return slice(start, max(start + 1, end))


def tenth_mean(values: np.ndarray, index: int) -> float:
    """:return: mean over one tenth of the episodes, ignoring NaN; NaN if all values are NaN"""
    part = values[tenth(len(values), index)]
    part = part[np.isfinite(part)]
    return float(part.mean()) if len(part) else float("nan")


def state_labels(recording: Recording) -> tuple[str, str]:
    """:return: labels of the landscape's axes"""
    task, fixed = recording.info["task"], recording.landscape["fixed"]
    if task in _STATE_LABELS:
        return _STATE_LABELS[task]
    if bool(recording.landscape["is_angle"]):
        return "angle of observations 0 and 1 (rad)", "observation 2 (task's unit)"
    held = f", observation 2 held at {fixed[0]:.3g}" if len(fixed) else ""
    return f"observation 0 (task's unit){held}", "observation 1 (task's unit)"


def action_labels(info: dict[str, Any]) -> list[str]:
    """:return: label of each dimension of the action"""
    return _ACTION_LABELS.get(info["task"], [f"action {dim} (task's unit)" for dim in range(len(info["action_low"]))])
