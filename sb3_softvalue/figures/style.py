"""The style of all figures, and curves over time steps."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from sb3_softvalue.diagnostics import Recording

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe & Ito 2008: distinguishable with the common types of colour blindness
BLUE, ORANGE, GREEN, VERMILION, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#7F7F7F"
_WIDTH, _HEIGHT, _DPI = 8.0, 4.0, 110


def new_figure(title: str, n_rows: int = 1, n_columns: int = 1, height: float = _HEIGHT) -> tuple["Figure", np.ndarray]:
    """
    A figure in this package's style, without pyplot's global state or a display.

    :param title: title of the figure
    :param n_rows: number of rows of axes
    :param n_columns: number of columns of axes
    :param height: height in inches
    :return: the figure and its axes, shape (n_rows, n_columns)
    :raises ImportError: if matplotlib is not installed
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            'Figures need matplotlib: pip install "sb3_softvalue[figures]" (or pip install matplotlib).'
        ) from error
    figure = Figure(figsize=(_WIDTH, height), dpi=_DPI, layout="constrained")
    figure.suptitle(title, fontsize=12, fontweight="bold")
    grid = figure.subplots(n_rows, n_columns, squeeze=False)
    for axes in grid.ravel():
        axes.grid(alpha=0.3, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, grid


def rolling_mean(values: np.ndarray, window: int) -> np.ndarray:
    """
    :param values: shape (n,)
    :param window: number of values per mean, fewer at the start
    :return: trailing mean, shape (n,)
    """
    sums = np.cumsum(values, dtype=np.float64)
    sums[window:] -= sums[:-window]
    return sums / np.minimum(np.arange(1, len(values) + 1), window)


def draw_curves(
    axes: "Axes", curves: Sequence[tuple[np.ndarray, np.ndarray]], color: str, label: str, smooth: bool = True
) -> None:
    """
    Draw one curve as points with their rolling mean, or several (seeds) as their mean with a band from lowest to highest.

    :param axes: axes to draw on
    :param curves: x and y of each curve, x increasing
    :param color: color of all curves
    :param label: label of the line
    :param smooth: False draws the values without points and rolling mean
    """
    curves = [(x[np.isfinite(y)], y[np.isfinite(y)]) for x, y in curves]
    curves = [(x, y) for x, y in curves if len(x)]
    if not curves:
        return
    drawn = [(x, rolling_mean(y, max(5, len(y) // 20)) if smooth else y) for x, y in curves]
    if len(curves) == 1:
        if smooth:
            axes.plot(*curves[0], ".", color=color, alpha=0.5, markersize=5, markeredgewidth=0, label="one episode")
        axes.plot(*drawn[0], color=color, linewidth=2, label=label)
        return
    start, end = max(x[0] for x, _ in drawn), min(x[-1] for x, _ in drawn)
    grid = np.linspace(start, max(start, end), 200)
    lines = np.stack([np.interp(grid, x, y) for x, y in drawn])
    axes.fill_between(grid, lines.min(axis=0), lines.max(axis=0), color=color, alpha=0.2, linewidth=0)
    axes.plot(
        grid, lines.mean(axis=0), color=color, linewidth=2, label=f"{label}, {len(lines)} seeds (band: lowest to highest)"
    )


def over_time(
    axes: "Axes",
    recordings: Sequence[Recording],
    name: str,
    ylabel: str,
    color: str,
    label: str = "rolling mean",
    smooth: bool = True,
) -> None:
    """Draw a quantity of the episodes over the time steps, see ``draw_curves``."""
    from matplotlib.ticker import EngFormatter

    curves = [(recording.episodes["timesteps"], recording.episodes[name]) for recording in recordings]
    draw_curves(axes, curves, color, label, smooth)
    axes.set(xlabel="time steps", ylabel=ylabel)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))  # 20k for 20000
    if axes.lines:  # with random actions alone there is no bias to draw
        axes.legend(frameon=False, fontsize=9)
