"""Figures and tables of what learning.py has measured, from its CSV files alone: the same files give the same report.

The score of a run is the mean of the last three of its evaluations at multiples of 5,000 steps. Given are interquartile means
over seeds with 95 % intervals from the stratified bootstrap (rliable, Agarwal et al. 2021), and every seed.
"""

import json
import pathlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from learning_run import TASKS
from rliable import library
from rliable.metrics import aggregate_iqm, probability_of_improvement

# Finer evaluations are for the curves: the window of the score does not become narrower by them
SCORE_EVERY = 5_000
REPETITIONS = 2_000
NAMES = {
    "sacv": "SACV",
    "sac": "SAC",
    "sacv-fixed": "SACV, α = 0.2",
    "tqc": "TQC",
    "sacv-mixed": "SACV, bfloat16 products",
    "sacv-tau-0.01": "SACV, τ = 0.01",
    "sacv-vf-1e-3": "SACV, V's learning rate 1e-3",
    "sacv-alpha-0.1": "SACV, α begins at 0.1",
    "sac-alpha-0.1": "SAC, α begins at 0.1",
}
# Mean return of 100 episodes of uniformly random actions, the 0 of normalised scores; 1 is the IQM of SAC's scores
RANDOM = {
    "Pendulum-v1": -1208.0,
    "HalfCheetah-v5": -282.0,
    "InvertedPendulum-v5": 5.2,
    "Reacher-v5": -43.3,
    "InvertedDoublePendulum-v5": 49.1,
    "Hopper-v5": 16.7,
    "Walker2d-v5": 1.8,
}


class Bar(NamedTuple):
    """What counts as learning well on a task, laid down before anything was run."""

    task: str
    algorithm: str
    text: str
    met: Callable[[np.ndarray, np.ndarray], bool]
    """Of the last three evaluations, shape (seeds, 3), of the algorithm and of SAC"""
    relation: str = "ratio"
    """How it is compared with SAC: "ratio" or "difference" """


def score(last: np.ndarray) -> np.ndarray:
    """:return: the mean over the last evaluations, one for each seed"""
    return last.mean(axis=1)


def iqm(scores: np.ndarray) -> float:
    """:return: interquartile mean over all seeds (and tasks)"""
    return float(aggregate_iqm(scores))


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
# Minutes until the first evaluation that reaches this return
THRESHOLDS = {"HalfCheetah-v5": 4000.0}


class Measured:
    """
    The finished runs of a folder.

    :param folder: of the results
    :raises SystemExit: if there are none
    """

    def __init__(self, folder: pathlib.Path):
        self.frames: dict[tuple[str, str], pd.DataFrame] = {}
        self.about = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
        order = [*TASKS, *self.about]
        for task in sorted(self.about, key=order.index):
            frame = pd.read_csv(folder / f"{task}.csv")
            for algorithm, runs in frame.groupby("algorithm"):
                seeds = runs.loc[runs["timesteps"] == self.about[task]["steps"], "seed"]
                finished = runs[runs["seed"].isin(seeds)]
                if len(finished):
                    self.frames[task, algorithm] = finished
        if not self.frames:
            raise SystemExit(f"No run in {folder} is finished: there is nothing to report yet.")
        self.tasks = list(dict.fromkeys(task for task, _ in self.frames))
        self.algorithms = [name for name in NAMES if any(name == algorithm for _, algorithm in self.frames)]

    def table(self, task: str, algorithm: str, column: str = "mean_reward") -> pd.DataFrame:
        """:return: a column's values, one row for each seed and one column for each time step; empty if nothing was run"""
        if (task, algorithm) not in self.frames:
            return pd.DataFrame()
        return self.frames[task, algorithm].pivot(index="seed", columns="timesteps", values=column)

    def last(self, task: str, algorithm: str) -> np.ndarray:
        """:return: the evaluations that the score is the mean of, shape (seeds, 3)"""
        table = self.table(task, algorithm)
        return table[[step for step in table.columns if step % SCORE_EVERY == 0][-3:]].to_numpy()

    def scores(self, task: str, algorithm: str) -> np.ndarray:
        """:return: shape (seeds,)"""
        return score(self.last(task, algorithm))

    def missing(self, task: str, algorithm: str) -> int:
        """:return: how many of the task's seeds are not finished"""
        planned = set(TASKS[task].seeds) if task in TASKS else set()
        return len(planned - set(self.table(task, algorithm).index))

    def whole_tasks(self) -> list[str]:
        """
        :return: what is said of all tasks is said of these: with every run of SACV and SAC, where there are none with any
        """
        both = [task for task in self.tasks if not (self.table(task, "sacv").empty or self.table(task, "sac").empty)]
        return [task for task in both if not self.missing(task, "sacv") + self.missing(task, "sac")] or both


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


def bar_table(measured: Measured) -> str:
    """:return: each row of the bar with our number, SAC's number, how they compare, and whether it is met"""
    lines = []
    for bar in BARS:
        ours, sac = measured.table(bar.task, bar.algorithm), measured.table(bar.task, "sac")
        cells = [bar.task, NAMES[bar.algorithm], bar.text]
        if ours.empty or sac.empty:
            lines.append([*cells, "–", "–", "–", "not run"])
            continue
        x, y = measured.scores(bar.task, bar.algorithm), measured.scores(bar.task, "sac")
        compare = (lambda a, b: iqm(a) / iqm(b)) if bar.relation == "ratio" else (lambda a, b: iqm(a) - iqm(b))
        missing = measured.missing(bar.task, bar.algorithm) + measured.missing(bar.task, "sac")
        verdict = "met" if bar.met(measured.last(bar.task, bar.algorithm), measured.last(bar.task, "sac")) else "**not met**"
        lines.append(
            [
                *cells,
                with_interval(iqm(x), interval(iqm, x)),
                with_interval(iqm(y), interval(iqm, y)),
                f"{bar.relation} {with_interval(compare(x, y), interval(compare, x, y), 2)}",
                f"{verdict} so far, {missing} runs to come" if missing else verdict,
            ]
        )
    return markdown(["task", "algorithm", "bar", "IQM of the scores", "SB3's SAC", "against SAC", "bar met"], lines)


def seed_table(measured: Measured) -> str:
    """:return: every run's score, and for each algorithm and task the area under the curve and the time"""
    lines = []
    for task in measured.tasks:
        for algorithm in measured.algorithms:
            table = measured.table(task, algorithm)
            if table.empty:
                continue
            area = table.to_numpy().mean(axis=1)
            minutes = measured.table(task, algorithm, "cpu_seconds").iloc[:, -1].to_numpy() / 60
            scores = [f"{number(s)}" for s in measured.scores(task, algorithm)]
            lines.append(
                [
                    task,
                    NAMES[algorithm],
                    ", ".join(f"{seed}: {s}" for seed, s in zip(table.index, scores, strict=True)),
                    with_interval(iqm(area), interval(iqm, area)),
                    f"{np.median(minutes):.1f}",
                ]
            )
    header = ["task", "algorithm", "score of each seed", "area under the curve, IQM", "minutes of processor, median"]
    return markdown(header, lines)


def improvement(measured: Measured) -> dict[str, tuple[float, tuple[float, float]]]:
    """:return: for each task, and for all together, the probability that a run of SACV scores higher than one of SAC"""
    result = {}
    pairs = {
        task: (measured.scores(task, "sacv"), measured.scores(task, "sac"))
        for task in measured.tasks
        if not measured.table(task, "sacv").empty and not measured.table(task, "sac").empty
    }
    for task, (ours, sac) in pairs.items():
        probability = probability_of_improvement(ours[:, None], sac[:, None])
        result[task] = probability, interval(probability_of_improvement, ours, sac)
    if len(pairs) > 1:
        whole = [pairs[task] for task in measured.whole_tasks()]
        # rliable takes the same number of runs for each task: the first ones, those that all have
        n_runs = min(len(scores) for pair in whole for scores in pair)
        ours, sac = (np.stack([pair[i][:n_runs] for pair in whole], axis=1) for i in (0, 1))
        probability = probability_of_improvement(ours, sac)
        result["all tasks whose runs are all there"] = probability, interval(probability_of_improvement, ours, sac)
    return result


def first_reached(measured: Measured, task: str, algorithm: str, threshold: float) -> np.ndarray:
    """:return: minutes of processor until each seed's first evaluation at or over the threshold, infinite if there is none"""
    returns = measured.table(task, algorithm).to_numpy()
    minutes = measured.table(task, algorithm, "cpu_seconds").to_numpy() / 60
    return np.where(returns >= threshold, minutes, np.inf).min(axis=1)


def threshold_table(measured: Measured) -> str:
    """:return: minutes until a return was reached, every seed"""
    lines = []
    for task, threshold in THRESHOLDS.items():
        for algorithm in measured.algorithms:
            if measured.table(task, algorithm).empty:
                continue
            reached = first_reached(measured, task, algorithm, threshold)
            each = ", ".join(f"{minutes:.1f}" if np.isfinite(minutes) else "never" for minutes in reached)
            lines.append([task, number(threshold, 0), NAMES[algorithm], each, f"{np.median(reached):.1f}"])
    return markdown(["task", "return", "algorithm", "minutes of processor, each seed", "median"], lines)


def report(folder: pathlib.Path) -> None:
    """
    Write ``report.md`` and the figures beside the CSV files.

    :param folder: of the results
    """
    from learning_figures import draw_all

    measured = Measured(folder)
    probabilities = improvement(measured)
    improvements = [[task, with_interval(value, bounds, 2)] for task, (value, bounds) in probabilities.items()]
    parts = {
        # A folder of other tasks, as those for tuning, has no bar
        **({"The bar": bar_table(measured)} if any(bar.task in measured.tasks for bar in BARS) else {}),
        "Every seed": seed_table(measured),
        "Probability that a run of SACV scores higher than one of SAC": markdown(["task", "probability"], improvements),
        "Time to a return": threshold_table(measured),
    }
    text = "\n".join(f"## {title}\n\n{table}" for title, table in parts.items())
    (folder / "report.md").write_text(text)
    print(text)
    for path in draw_all(measured, probabilities, folder):
        print(f"Look at {path}")
