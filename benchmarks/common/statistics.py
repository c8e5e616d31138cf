"""Statistics of all benchmarks: interquartile means over seeds with bootstrap intervals (rliable), quartiles over turns."""

from collections.abc import Callable

import numpy as np
from rliable import library
from rliable.metrics import aggregate_iqm
from scipy.stats import trim_mean

# Resamples of a bootstrap
REPETITIONS = 2_000


def iqm(scores: np.ndarray) -> float:
    """:return: interquartile mean over all seeds (and tasks)"""
    return float(aggregate_iqm(scores))


def interval(function: Callable[..., float], *scores: np.ndarray) -> tuple[float, float]:
    """
    :param function: of the scores
    :param scores: shape (seeds,) or (seeds, tasks) each, resampled independently of each other
    :return: the bounds of the 95 % interval
    """
    np.random.seed(0)  # what rliable draws from
    matrices = [array.reshape(len(array), -1) for array in scores]
    _, bounds = library.get_interval_estimates({"": matrices}, lambda *args: np.array([function(*args)]), reps=REPETITIONS)
    low, high = bounds[""][:, 0]
    return float(low), float(high)


def curve_interval(returns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """
    :param returns: shape (seeds, evaluations)
    :return: the IQM over seeds at each evaluation, and its 95 % interval of shape (2, evaluations)
    """
    np.random.seed(0)  # what rliable draws from
    curves = {"": returns[:, None, :]}
    middle, bounds = library.get_interval_estimates(curves, lambda x: trim_mean(x[:, 0], 0.25, axis=0), reps=REPETITIONS)
    return middle[""], bounds[""]


def performance_profile(scores: np.ndarray, thresholds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """
    :param scores: normalised, shape (runs, tasks)
    :param thresholds: of the scores
    :return: the share of runs above each threshold, and its 95 % interval of shape (2, thresholds)
    """
    np.random.seed(0)  # what rliable draws from
    shares, bounds = library.create_performance_profile({"": scores}, thresholds, reps=REPETITIONS)
    return shares[""], bounds[""]


def quartiles(values: np.ndarray) -> tuple[float, float, float]:
    """:return: lower quartile, median and upper quartile"""
    low, median, high = np.quantile(values, [0.25, 0.5, 0.75])
    return float(low), float(median), float(high)
