"""Figures and tables of a folder of results, from its CSV files alone: the same files give the same report.

The score of a run is the mean of the last three of its evaluations at multiples of 5,000 steps. Given are interquartile means
over seeds with 95 % intervals from the stratified bootstrap (rliable, Agarwal et al. 2021), and every seed.
"""

import pathlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from rliable.metrics import probability_of_improvement

from benchmarks.common.statistics import interval, iqm
from benchmarks.learning.figures import draw_all
from benchmarks.learning.measured import FinishedRuns, score
from benchmarks.learning.tasks import ALGORITHMS


class Bar(NamedTuple):
    """What counts as learning well on a task."""

    task: str
    algorithm: str
    text: str
    met: Callable[[np.ndarray, np.ndarray], bool]
    """Of the last three evaluations, shape (seeds, 3), of the algorithm and of SAC"""
    relation: str = "ratio"
    """How it is compared with SAC: "ratio" or "difference" """


BARS = (
    Bar(
        "Pendulum-v1",
        "sacv",
        "IQM ≥ −165, no seed under −200, at most 20 below SAC",
        lambda ours, sac: iqm(score(ours)) >= max(-165, iqm(score(sac)) - 20) and score(ours).min() >= -200,
        "difference",
    ),
    Bar(
        "InvertedPendulum-v5",
        "sacv",
        "best of the last 3 evaluations ≥ 950, every seed",
        lambda ours, sac: ours.max(axis=1).min() >= 950,
    ),
    Bar(
        "InvertedDoublePendulum-v5",
        "sacv",
        "≥ 9100, 4 of 5 seeds",
        lambda ours, sac: np.sum(score(ours) >= 9100) >= 0.8 * len(ours),
    ),
    Bar(
        "Reacher-v5",
        "sacv",
        "IQM ≥ −6.5, within 1.0 of SAC",
        lambda ours, sac: iqm(score(ours)) >= max(-6.5, iqm(score(sac)) - 1.0),
        "difference",
    ),
    Bar(
        "HalfCheetah-v5",
        "sacv",
        "IQM ≥ 4900, ratio to SAC ≥ 0.85",
        lambda ours, sac: iqm(score(ours)) >= max(4900, 0.85 * iqm(score(sac))),
    ),
    Bar("HalfCheetah-v5", "sacv-fixed", "IQM ≥ 4300", lambda ours, sac: iqm(score(ours)) >= 4300),
    Bar("HalfCheetah-v5-1M", "sacv", "IQM ≥ 10400", lambda ours, sac: iqm(score(ours)) >= 10_400),
    Bar("Hopper-v5", "sacv", "ratio to SAC ≥ 0.9", lambda ours, sac: iqm(score(ours)) >= 0.9 * iqm(score(sac))),
    Bar("Walker2d-v5", "sacv", "ratio to SAC ≥ 0.9", lambda ours, sac: iqm(score(ours)) >= 0.9 * iqm(score(sac))),
)
# Minutes until the first evaluation that reaches these returns
THRESHOLDS = {"HalfCheetah-v5": (4000.0, 4500.0)}


def number(value: float, digits: int | None = None) -> str:
    """:return: with a true minus sign, and so many digits as a return of this size needs"""
    if digits is None:
        digits = 2 if abs(value) < 20 else 1 if abs(value) < 1000 else 0
    return f"{value:.{digits}f}".replace("-", "−")


def with_interval(value: float, bounds: tuple[float, float], digits: int | None = None) -> str:
    """:return: a value and its interval"""
    return f"{number(value, digits)} [{number(bounds[0], digits)}, {number(bounds[1], digits)}]"


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """:return: a table"""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *lines)) + "\n"


def bar_table(runs: FinishedRuns) -> str:
    """:return: each row of the bar with our number, SAC's number, how they compare, and whether it is met"""
    lines = []
    for bar in BARS:
        ours, sac = runs.table(bar.task, bar.algorithm), runs.table(bar.task, "sac")
        cells = [bar.task, ALGORITHMS[bar.algorithm].title, bar.text]
        if ours.empty or sac.empty:
            lines.append([*cells, "–", "–", "–", "not run"])
            continue
        x, y = runs.scores(bar.task, bar.algorithm), runs.scores(bar.task, "sac")
        compare = (lambda a, b: iqm(a) / iqm(b)) if bar.relation == "ratio" else (lambda a, b: iqm(a) - iqm(b))
        missing = runs.missing(bar.task, bar.algorithm) + runs.missing(bar.task, "sac")
        verdict = "met" if bar.met(runs.last(bar.task, bar.algorithm), runs.last(bar.task, "sac")) else "**not met**"
        lines.append(
            [
                *cells,
                with_interval(iqm(x), interval(iqm, x)),
                with_interval(iqm(y), interval(iqm, y)),
                f"{bar.relation} {with_interval(compare(x, y), interval(compare, x, y), 2)}",
                f"{verdict} so far, {missing} runs missing" if missing else verdict,
            ]
        )
    return markdown(["task", "algorithm", "target", "IQM of the scores", "SB3's SAC", "against SAC", "met"], lines)


def seed_table(runs: FinishedRuns) -> str:
    """:return: every run's score, and for each algorithm and task the area under the curve and the time"""
    lines = []
    for task in runs.tasks:
        for algorithm in runs.algorithms:
            table = runs.table(task, algorithm)
            if table.empty:
                continue
            area = runs.areas(task, algorithm)
            minutes = runs.minutes(task, algorithm).iloc[:, -1]
            scores = [f"{number(s)}" for s in runs.scores(task, algorithm)]
            lines.append(
                [
                    task,
                    ALGORITHMS[algorithm].title,
                    ", ".join(f"{seed}: {s}" for seed, s in zip(table.index, scores, strict=True)),
                    with_interval(iqm(area), interval(iqm, area)),
                    f"{minutes.median():.1f}" + (f" (of {len(minutes)})" if 0 < len(minutes) < len(table) else "")
                    if len(minutes)
                    else "–",
                ]
            )
    header = ["task", "algorithm", "score of each seed", "area under the curve, IQM", "minutes of CPU time, median"]
    return markdown(header, lines)


def improvement(
    runs: FinishedRuns, values: Callable[[FinishedRuns, str, str], np.ndarray] = FinishedRuns.scores
) -> dict[str, tuple[float, tuple[float, float]]]:
    """
    :param runs: the finished runs
    :param values: what is compared, of a task and an algorithm
    :return: for each task, and for all together, the probability that the value of a run of SACV is higher than one of SAC's
    """
    result = {}
    pairs = {
        task: (values(runs, task, "sacv"), values(runs, task, "sac"))
        for task in runs.tasks
        if not runs.table(task, "sacv").empty and not runs.table(task, "sac").empty
    }
    for task, (ours, sac) in pairs.items():
        probability = probability_of_improvement(ours[:, None], sac[:, None])
        result[task] = probability, interval(probability_of_improvement, ours, sac)
    if len(pairs) > 1:
        whole = [pairs[task] for task in runs.whole_tasks()]
        # rliable takes the same number of runs for each task: the first ones, those that all have
        n_runs = min(len(scores) for pair in whole for scores in pair)
        ours, sac = (np.stack([pair[i][:n_runs] for pair in whole], axis=1) for i in (0, 1))
        probability = probability_of_improvement(ours, sac)
        result["all tasks"] = probability, interval(probability_of_improvement, ours, sac)
    return result


def first_reached(runs: FinishedRuns, task: str, algorithm: str, threshold: float) -> np.ndarray:
    """:return: minutes of CPU time until each seed's first evaluation at or over the threshold, infinite if there is none"""
    minutes = runs.minutes(task, algorithm)
    returns = runs.table(task, algorithm).loc[minutes.index].to_numpy()
    return np.where(returns >= threshold, minutes.to_numpy(), np.inf).min(axis=1)


def threshold_table(runs: FinishedRuns) -> str:
    """:return: minutes until a return was reached, every seed"""
    lines = []
    for task, threshold in ((task, threshold) for task, thresholds in THRESHOLDS.items() for threshold in thresholds):
        for algorithm in runs.algorithms:
            if runs.table(task, algorithm).empty or runs.minutes(task, algorithm).empty:
                continue
            reached = first_reached(runs, task, algorithm, threshold)
            each = ", ".join(f"{minutes:.1f}" if np.isfinite(minutes) else "never" for minutes in reached)
            median = f"{np.median(reached):.1f}" if np.isfinite(np.median(reached)) else "–"
            lines.append(
                [
                    task,
                    number(threshold, 0),
                    ALGORITHMS[algorithm].title,
                    each,
                    median,
                    against_sac(runs, task, algorithm, threshold),
                ]
            )
    header = ["task", "return", "algorithm", "minutes of CPU time, each seed", "median", "over SAC's median"]
    return markdown(header, lines)


def against_sac(runs: FinishedRuns, task: str, algorithm: str, threshold: float) -> str:
    """:return: the ratio of the medians of the minutes, where all runs have reached the return"""
    if algorithm == "sac":
        return "1"
    if runs.table(task, "sac").empty or runs.minutes(task, "sac").empty:
        return "–"
    reached, sac = (first_reached(runs, task, name, threshold) for name in (algorithm, "sac"))
    if not (np.isfinite(reached).all() and np.isfinite(sac).all()):
        return "–"

    def ratio(ours: np.ndarray, theirs: np.ndarray) -> float:
        return float(np.median(ours) / np.median(theirs))

    return with_interval(ratio(reached, sac), interval(ratio, reached, sac), 2)


def write_report(folder: pathlib.Path) -> None:
    """
    Write ``report.md`` and the figures beside the CSV files.

    :param folder: of the results
    """
    runs = FinishedRuns(folder)
    probabilities = improvement(runs)
    of_areas = improvement(runs, FinishedRuns.areas)
    improvements = [
        [task, *(with_interval(value, bounds, 2) for value, bounds in (probabilities[task], of_areas[task]))]
        for task in probabilities
    ]
    parts = {
        # A folder of other tasks, as those for tuning, has no bar
        **({"Targets": bar_table(runs)} if any(bar.task in runs.tasks for bar in BARS) else {}),
        "Every seed": seed_table(runs),
        "Probability that a run of SACV scores higher than one of SAC": markdown(
            ["task", "by the score", "by the area under the curve"], improvements
        ),
        "Time to a return": threshold_table(runs),
    }
    text = "\n".join(f"## {title}\n\n{table}" for title, table in parts.items())
    (folder / "report.md").write_text(text)
    print(text)
    for path in draw_all(runs, probabilities, folder):
        print(f"Look at {path}")
