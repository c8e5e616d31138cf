"""The pictures of a report."""

import pathlib
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter

from benchmarks.common.statistics import curve_interval, iqm, performance_profile
from benchmarks.learning.measured import FinishedRuns
from benchmarks.learning.tasks import ALGORITHMS, BLUE, RANDOM_RETURNS
from sb3_softvalue.figures import new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PROFILE = np.linspace(0.0, 1.5, 76)


def draw_task(axes: "Axes", runs: FinishedRuns, task: str, over_minutes: bool) -> None:
    """
    :param axes: to draw on
    :param runs: the finished runs
    :param task: whose curves
    :param over_minutes: of the processor; else over time steps
    """
    for algorithm in runs.algorithms:
        table = runs.table(task, algorithm)
        if table.empty:
            continue
        if over_minutes:
            minutes = runs.minutes(task, algorithm)
            if minutes.empty:
                continue
            table, x = table.loc[minutes.index], minutes.to_numpy()
        else:
            x = np.tile(table.columns.to_numpy(), (len(table), 1))
        colour, returns = ALGORITHMS[algorithm].colour, table.to_numpy()
        axes.plot(x.T, returns.T, color=colour, linewidth=0.6, alpha=0.4)
        middle, band = curve_interval(returns)
        axes.plot(np.median(x, axis=0), middle, color=colour, linewidth=2)
        if not over_minutes:
            axes.fill_between(x[0], band[0], band[1], color=colour, alpha=0.2, linewidth=0)
    counts = {len(runs.table(task, name)) for name in runs.algorithms} - {0}
    axes.set_title(f"{task}, {' or '.join(map(str, sorted(counts)))} seed{'' if counts == {1} else 's'}", fontsize=10)
    if not over_minutes:
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))


def curves(runs: FinishedRuns, over_minutes: bool) -> "Figure":
    """
    :param runs: the finished runs
    :param over_minutes: of the processor; else over time steps
    :return: a panel for each task
    """
    n_tasks = len(runs.tasks)
    n_columns = next(n for n in (4, 3, 2, 1) if n <= n_tasks)
    n_rows = -(-n_tasks // n_columns)
    title = "Return of the deterministic policy: interquartile mean (IQM) over seeds"
    title += ", thin lines are seeds" if over_minutes else ", band: 95 % interval, thin lines are seeds"
    figure, grid = new_figure(title, n_rows, n_columns, height=2.8 * n_rows + 0.8)
    figure.set_size_inches(max(8.0, 3.2 * n_columns), 2.8 * n_rows + 0.8)
    panels = grid.ravel()
    for axes, task in zip(panels, runs.tasks, strict=False):
        draw_task(axes, runs, task, over_minutes)
    handles = [
        Line2D([], [], color=ALGORITHMS[name].colour, linewidth=2, label=legend(runs, name)) for name in runs.algorithms
    ]
    for axes in panels[n_tasks:]:
        axes.set_axis_off()
    if n_tasks < len(panels):
        panels[n_tasks].legend(handles=handles, frameon=False, fontsize=11, loc="center")
    else:
        figure.legend(handles=handles, frameon=False, fontsize=9, loc="outside lower center", ncols=3)
    figure.supxlabel("minutes of CPU time, without evaluations" if over_minutes else "time steps", fontsize=10)
    figure.supylabel("return, mean of 10 episodes", fontsize=10)
    return figure


def legend(runs: FinishedRuns, algorithm: str) -> str:
    """:return: the algorithm's title, with the tasks it was run on if those are not all"""
    tasks = [task for task in runs.tasks if not runs.table(task, algorithm).empty]
    return ALGORITHMS[algorithm].title + ("" if len(tasks) == len(runs.tasks) else f"\n({', '.join(tasks)} only)")


def profiles(runs: FinishedRuns) -> "Figure":
    """
    :param runs: the finished runs
    :return: for each algorithm that has run on all tasks that SAC has, the share of runs over a normalised score
    """
    tasks = [task for task in runs.whole_tasks() if task in RANDOM_RETURNS]
    figure, grid = new_figure("Performance profiles: 0 is the random policy, 1 the IQM of SAC's scores")
    axes = grid[0, 0]
    for algorithm in runs.algorithms:
        if any(runs.table(task, algorithm).empty for task in tasks):
            continue
        scores = [
            (runs.scores(task, algorithm) - RANDOM_RETURNS[task]) / (iqm(runs.scores(task, "sac")) - RANDOM_RETURNS[task])
            for task in tasks
        ]
        n_runs = min(len(task_scores) for task_scores in scores)
        matrix = np.stack([task_scores[:n_runs] for task_scores in scores], axis=1)
        shares, band = performance_profile(matrix, PROFILE)
        colour = ALGORITHMS[algorithm].colour
        axes.plot(
            PROFILE, shares, color=colour, label=f"{ALGORITHMS[algorithm].title}, {n_runs} runs on each of {len(tasks)} tasks"
        )
        axes.fill_between(PROFILE, band[0], band[1], color=colour, alpha=0.2, linewidth=0)
    axes.set(xlabel="normalised score", ylabel="share of runs with a higher score")
    axes.legend(frameon=False, fontsize=9)
    return figure


def improvements(probabilities: dict[str, tuple[float, tuple[float, float]]]) -> "Figure":
    """
    :param probabilities: with their intervals, by task
    :return: a bar for each
    """
    figure, grid = new_figure(
        "Probability that a run of SACV scores higher than one of SAC", height=0.45 * len(probabilities) + 1.4
    )
    axes = grid[0, 0]
    for y, (value, (low, high)) in enumerate(probabilities.values()):
        axes.plot([low, high], [y, y], color=BLUE, linewidth=8, alpha=0.3, solid_capstyle="butt")
        axes.plot(value, y, "|", color=BLUE, markersize=16, markeredgewidth=2.5)
    axes.axvline(0.5, color="black", linewidth=0.8)
    axes.set_yticks(range(len(probabilities)), list(probabilities))
    axes.set_ylim(len(probabilities) - 0.5, -0.5)
    axes.set(xlim=(0.0, 1.0), xlabel="P(SACV > SAC), with its 95 % interval")
    return figure


def draw_all(
    runs: FinishedRuns, probabilities: dict[str, tuple[float, tuple[float, float]]], folder: pathlib.Path
) -> list[pathlib.Path]:
    """
    :param runs: the finished runs
    :param probabilities: what ``report.improvement`` gave
    :param folder: to write to
    :return: the files written
    """
    figures = {"curves-steps": curves(runs, False), "curves-minutes": curves(runs, True)}
    if any(task in RANDOM_RETURNS for task in runs.whole_tasks()):
        figures["profiles"] = profiles(runs)
    if probabilities:
        figures["improvement"] = improvements(probabilities)
    paths = [folder / f"{name}.png" for name in figures]
    for path, figure in zip(paths, figures.values(), strict=True):
        figure.savefig(path)
    return paths
