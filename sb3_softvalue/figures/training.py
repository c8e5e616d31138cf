"""Figures of training: return, entropy, temperature and actions."""

from typing import TYPE_CHECKING

import numpy as np

from sb3_softvalue.diagnostics import Recording
from sb3_softvalue.figures.runs import Recordings, action_labels, as_list, tenth, titled
from sb3_softvalue.figures.style import BLUE, GREEN, GREY, ORANGE, VERMILION, new_figure, over_time

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Maximum number of rows in the action figure
_MAX_ACTION_DIMS = 4


def learning_curve(recordings: Recordings) -> "Figure":
    """
    :param recordings: recordings of one run or of several seeds
    :return: the return of each episode over the time steps
    """
    recordings = as_list(recordings)
    figure, grid = new_figure(titled(recordings, "Learning curve"))
    over_time(grid[0, 0], recordings, "return", "return of an episode\n(sum of the task's rewards)", BLUE)
    return figure


def entropy(recordings: Recordings) -> "Figure":
    """
    :param recordings: recordings of one run or of several seeds
    :return: the policy's entropy over the time steps, with that of the uniform policy as a reference
    """
    recordings = as_list(recordings)
    figure, grid = new_figure(titled(recordings, "Entropy of the policy"))
    axes = grid[0, 0]
    over_time(axes, recordings, "entropy", "entropy, squashed action in [−1, 1]\n(nats, mean over an episode)", GREEN)
    uniform = len(recordings[0].info["action_low"]) * np.log(2.0)
    axes.axhline(uniform, color=GREY, linestyle="--", linewidth=1.2, label=f"uniform policy, {uniform:.2f} nats")
    axes.legend(frameon=False, fontsize=9)
    return figure


def temperature(recordings: Recordings) -> "Figure":
    """
    :param recordings: recordings of one run or of several seeds
    :return: α over the time steps, on a logarithmic scale
    """
    recordings = as_list(recordings)
    figure, grid = new_figure(titled(recordings, "Temperature α"))
    axes = grid[0, 0]
    over_time(axes, recordings, "ent_coef", "α (reward per nat)", VERMILION, "α at the end of each episode", smooth=False)
    if all(np.all(recording.episodes["ent_coef"] > 0.0) for recording in recordings):
        from matplotlib.ticker import LogLocator

        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
    return figure


def action_usage(recordings: Recordings) -> "Figure":
    """
    For each action dimension: a histogram of its values at the start and at the end, and its change during training.

    :param recordings: recordings of one run, or of several seeds, which are pooled
    :return: a figure with two columns, and a row for each of the first four dimensions
    """
    recordings = as_list(recordings)
    info = recordings[0].info
    labels = action_labels(info)
    n_rows = min(len(labels), _MAX_ACTION_DIMS)
    figure, grid = new_figure(titled(recordings, "Actions used"), n_rows, 2, height=4.0 if n_rows == 1 else 2.6 * n_rows)
    usage = np.stack([_usage(recordings, part) for part in range(10)])
    for dim, (usage_axes, drift_axes) in enumerate(grid):
        low, high = info["action_low"][dim], info["action_high"][dim]
        edges = np.linspace(low, high, usage.shape[2] + 1)
        usage_axes.stairs(usage[0, dim], edges, color=ORANGE, linewidth=2, label="first tenth of the episodes")
        usage_axes.stairs(usage[9, dim], edges, color=BLUE, fill=True, alpha=0.45, label="last tenth of the episodes")
        usage_axes.set(xlabel=labels[dim], ylabel="share of the steps", xlim=(low, high))
        image = drift_axes.pcolormesh(np.linspace(0, 100, 11), edges, usage[:, dim].T, cmap="viridis")
        drift_axes.set(xlabel="training (% of the episodes)", ylabel=labels[dim])
        drift_axes.grid(False)
        figure.colorbar(image, ax=drift_axes, label="share of the steps")
    top = grid[0, 0]
    top.set_ylim(top=1.35 * usage[[0, 9], 0].max())
    top.legend(frameon=False, fontsize=9, loc="upper center")
    return figure


def _usage(recordings: list[Recording], part: int) -> np.ndarray:
    """:return: share of the steps in each bin during one tenth of the episodes, shape (action_dim, n_bins)"""
    counts = sum(
        recording.episodes["action_counts"][tenth(recording.n_episodes, part)].sum(axis=0) for recording in recordings
    )
    return counts / np.maximum(1, np.sum(counts, axis=1, keepdims=True))
