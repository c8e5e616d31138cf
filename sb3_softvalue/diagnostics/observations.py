"""Batches of observations: arrays or dicts of arrays."""

from collections.abc import Sequence
from typing import Any

import numpy as np

Observations = np.ndarray | dict[str, np.ndarray]


def arrays_of(observations: Observations) -> list[np.ndarray]:
    """:return: the array, or the array of each key"""
    return list(observations.values()) if isinstance(observations, dict) else [observations]


def length(observations: Observations) -> int:
    """:return: number of observations in the batch"""
    return len(arrays_of(observations)[0])


def take(observations: Observations, index: int | slice) -> Observations:
    """:return: one observation, or a slice of the batch"""
    if isinstance(observations, dict):
        return {key: array[index] for key, array in observations.items()}
    return observations[index]


def stack(observations: Sequence[Any]) -> Observations:
    """:return: a batch of single observations"""
    if isinstance(observations[0], dict):
        return {key: np.stack([obs[key] for obs in observations]) for key in observations[0]}
    return np.stack(observations)


def append(observations: Observations, last: Any) -> Observations:
    """:return: the batch with one more observation"""
    if isinstance(observations, dict):
        return {key: np.concatenate([array, last[key][None]]) for key, array in observations.items()}
    return np.concatenate([observations, last[None]])
