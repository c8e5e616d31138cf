"""Batches of observations: arrays or dicts of arrays."""

from collections.abc import Sequence
from typing import Any

import numpy as np

Observations = np.ndarray | dict[str, np.ndarray]


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
