"""Figures of V: against collected returns, along an episode, over the state space."""

from typing import TYPE_CHECKING

import numpy as np

from sb3_softvalue.diagnostics import Calibration, Recording, calibration_line
from sb3_softvalue.figures.runs import Recordings, action_labels, as_list, state_labels, tenth, titled
from sb3_softvalue.figures.style import BLUE, GREEN, ORANGE, VERMILION, new_figure, over_time

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def calibration(recordings: Recordings, frozen: Calibration | None = None) -> "Figure":
    """
    V against the soft return collected, and the bias of V over the training.

    :param recordings: recordings of one run, or of several seeds, whose states are pooled
    :param frozen: calibration from ``evaluate_values``; None shows states of the last tenth of training, where the policy
        still changed
    :return: scatter plot on the left, bias over time on the right
    """
    recordings = as_list(recordings)
    figure, grid = new_figure(titled(recordings, "V(s) against the soft return collected"), 1, 2, height=4.3)
    scatter, bias = grid[0]
    values, collected = _late_states(recordings) if frozen is None else (frozen.values, frozen.collected)
    slope, mean_bias = calibration_line(values, collected)
    chosen = np.linspace(0, len(values) - 1, min(len(values), 2000)).astype(int)
    scatter.scatter(values[chosen], collected[chosen], s=8, color=BLUE, alpha=0.3, linewidths=0, rasterized=True)
    ends = np.array([min(values.min(), collected.min()), max(values.max(), collected.max())])
    scatter.plot(ends, ends, color="black", linestyle="--", linewidth=1.2, label="calibrated")
    if np.isfinite(slope):
        ends = np.array([values.min(), values.max()])
        line = collected.mean() + slope * (ends - values.mean())
        scatter.plot(ends, line, color=VERMILION, linewidth=2, label=f"slope {slope:.2f}, bias {mean_bias:+.2g}")
    scatter.set(xlabel="V(s) (soft value, scaled reward)", ylabel="soft return collected (scaled reward)")
    scatter.set_box_aspect(1)
    scatter.set_title("policy frozen" if frozen is not None else "last tenth of the training", fontsize=10)
    scatter.legend(frameon=False, fontsize=9)

    over_time(bias, recordings, "value_bias", "V(s) − soft return collected\n(above 0: over-estimation)", VERMILION)
    bias.axhline(0.0, color="black", linestyle="--", linewidth=1.2)
    bias.set_title("during training", fontsize=10)
    return figure


def value_along_episode(recordings: Recordings) -> "Figure":
    """
    V, V̄ and the critics along an episode, with the soft return collected.

    :param recordings: recordings of one run; of several, the first is shown
    :return: a figure of the last episode whose states were kept
    """
    recording = as_list(recordings)[0]
    states, episode = recording.states, recording.states["episode"].max()
    last = states["episode"] == episode
    figure, grid = new_figure(titled([recording], f"V(s) along episode {episode + 1}"))
    axes = grid[0, 0]
    steps = states["step"][last]
    # After a time limit, V of the last state is part of the soft return
    label = "soft return collected from s"
    if not recording.episodes["terminated"][episode]:
        label += ",\nplus V after the time limit (equal at the end)"
    axes.plot(steps, states["soft_return"][last], color="black", linestyle="--", label=label)
    axes.plot(steps, states["value"][last], color=BLUE, linewidth=2, label="V(s)")
    axes.plot(steps, states["target_value"][last], color=ORANGE, linewidth=1.5, label="target V̄(s)")
    axes.plot(steps, states["soft_q_value"][last], color=GREEN, linestyle=":", linewidth=2, label="min Q − α·log π")
    axes.set(xlabel="step of the episode", ylabel="soft value\n(discounted, scaled reward)")
    axes.legend(frameon=False, fontsize=9)
    return figure


def value_landscape(recordings: Recordings) -> "Figure":
    """
    V over a two- or three-dimensional state space. Arrows are the policy's actions: along y for one action dimension (as a
    torque changes a velocity), else the first two dimensions. Dots are the states visited last.

    :param recordings: recordings of one run on such a task; of several, the first is shown
    :return: the figure
    :raises ValueError: if the observations are no vectors of two or three numbers
    """
    recording = as_list(recordings)[0]
    if not recording.landscape:
        raise ValueError("value_landscape needs observations of two or three numbers: use a task such as Pendulum-v1.")
    x, y, values, actions = (recording.landscape[name] for name in ("x", "y", "values", "actions"))
    figure, grid = new_figure(titled([recording], "V(s) over the state space"), height=4.8)
    axes = grid[0, 0]
    axes.grid(False)
    image = axes.pcolormesh(x, y, values, cmap="viridis", shading="gouraud")
    figure.colorbar(image, ax=axes, label="V(s) (soft value, scaled reward)")

    visited = recording.states["observation"][-400:]
    if bool(recording.landscape["is_angle"]):
        visited = np.stack([np.arctan2(visited[:, 1], visited[:, 0]), visited[:, 2]], axis=1)
    dots = dict(color="white", markersize=3, markeredgecolor="black", markeredgewidth=0.4, alpha=0.7)
    axes.plot(visited[:, 0], visited[:, 1], "o", **dots)
    half_range = (np.array(recording.info["action_high"]) - np.array(recording.info["action_low"])) / 2.0
    every = slice(3, None, 6)
    arrows = (actions / half_range)[every, every]
    vertical = arrows[..., 0] if arrows.shape[-1] == 1 else arrows[..., 1]
    horizontal = np.zeros_like(vertical) if arrows.shape[-1] == 1 else arrows[..., 0]
    heads = dict(scale=16, width=0.003, headwidth=4, headlength=5, pivot="mid")
    axes.quiver(x[every], y[every], horizontal, vertical, color="black", **heads)
    x_label, y_label = state_labels(recording)
    axes.set(xlabel=x_label, ylabel=y_label, xlim=(x[0], x[-1]), ylim=(y[0], y[-1]))
    action = action_labels(recording.info)[0] if arrows.shape[-1] == 1 else "the first two actions"
    axes.set_title(f"arrows: {action} of the policy; dots: states visited last", fontsize=10)
    return figure


def _late_states(recordings: list[Recording]) -> tuple[np.ndarray, np.ndarray]:
    """:return: V and collected soft return of the kept states in the last tenth of the episodes"""
    values, collected = [], []
    for recording in recordings:
        states = recording.states
        late = states["episode"] >= min(tenth(recording.n_episodes, 9).start, states["episode"].max())
        values.append(states["value"][late])
        collected.append(states["soft_return"][late])
    return np.concatenate(values).astype(np.float64), np.concatenate(collected).astype(np.float64)
