"""
SACV with RL Zoo's settings against SB3's SAC: at equal steps, and at equal minutes.

    python -m benchmarks.studies.tuned

Reads the finished runs of benchmarks/results: learning and mixed (SAC and SACV with SB3's defaults, the same seeds on two
processors, whose rounding differs) and tuned. The minutes of a task are those of one folder, whose runs are of one processor.
Writes steps.md, minutes.md and curves.png to benchmarks/results/tuned.
"""

import numpy as np
import pandas as pd
from rliable.metrics import probability_of_improvement

from benchmarks.common.statistics import curve_interval, interval, iqm
from benchmarks.learning.measured import FinishedRuns, score
from benchmarks.learning.report import markdown, number, with_interval
from benchmarks.learning.run import ROOT
from benchmarks.learning.tasks import ALGORITHMS
from sb3_softvalue.figures import new_figure

RESULTS = ROOT / "benchmarks" / "results"
SB3S = {"sac": "SAC", "sacv": "SACV, SB3's defaults"}
NORMALIZED = {"sacv-normalized": "SACV, normalized prior", "sacv-normalized-gs-2": "SACV, normalized prior, gradient_steps=2"}
TWO_STEPS = {"sacv-gs-2": "SACV, gradient_steps=2"}
TUNED = {"HalfCheetah-v5": NORMALIZED, "Hopper-v5": TWO_STEPS, "Walker2d-v5": TWO_STEPS}
MINUTES = {"HalfCheetah-v5": "tuned", "Hopper-v5": "learning", "Walker2d-v5": "learning"}
RETURN = {"HalfCheetah-v5": 4000.0}


def returns(folders: dict[str, FinishedRuns], task: str, algorithm: str) -> pd.DataFrame:
    """:return: of every run in any folder, one row each and one column for each evaluation"""
    tables = [runs.table(task, algorithm) for runs in folders.values()]
    return pd.concat([table for table in tables if not table.empty], ignore_index=True)


def compare(ours: np.ndarray, sac: np.ndarray) -> list[str]:
    """:return: the ratio of the IQMs and the probability that a run scores higher than one of SAC, with intervals"""

    def ratio(a: np.ndarray, b: np.ndarray) -> float:
        return iqm(a) / iqm(b)

    probability = probability_of_improvement(ours[:, None], sac[:, None])
    return [
        with_interval(ratio(ours, sac), interval(ratio, ours, sac), 2),
        with_interval(probability, interval(probability_of_improvement, ours, sac), 2),
    ]


def middle_score(scores: np.ndarray) -> str:
    """:return: the IQM with its interval"""
    return with_interval(iqm(scores), interval(iqm, scores), 0)


def finished(runs: FinishedRuns, task: str, titles: dict[str, str]) -> dict[str, str]:
    """:return: the titles of the algorithms that have runs"""
    return {name: title for name, title in titles.items() if not runs.table(task, name).empty}


def by_steps(folders: dict[str, FinishedRuns], tasks: list[str]) -> str:
    """:return: the table at equal steps"""
    lines = []
    for task in tasks:
        titles = SB3S | finished(folders["tuned"], task, TUNED[task])
        scores = {name: score(returns(folders, task, name).to_numpy()[:, -3:]) for name in titles}
        for name, title in titles.items():
            against = ["1", "–"] if name == "sac" else compare(scores[name], scores["sac"])
            lines.append([task, title, str(len(scores[name])), middle_score(scores[name]), *against])
    return markdown(["after 100,000 steps", "algorithm", "runs", "score, IQM", "ratio to SAC", "P(higher than SAC)"], lines)


def first_minute(runs: FinishedRuns, task: str, algorithm: str) -> str:
    """:return: median CPU minutes until the first evaluation that reaches the task's return"""
    if task not in RETURN:
        return "–"
    reached = np.where(runs.table(task, algorithm) >= RETURN[task], runs.minutes(task, algorithm), np.inf).min(axis=1)
    return number(float(np.median(reached)), 1)


def by_minutes(folders: dict[str, FinishedRuns], tasks: list[str]) -> str:
    """:return: the table at equal minutes: SAC's score is that of the steps it has done when SACV has done all of its own"""
    lines = []
    for task in tasks:
        runs = folders[MINUTES[task]]
        titles = finished(runs, task, SB3S | TUNED[task])
        sac_minutes, sac_returns = runs.minutes(task, "sac").median(), returns(folders, task, "sac")
        for name, title in titles.items():
            minutes = float(runs.minutes(task, name).iloc[:, -1].median())
            steps = sac_minutes.index[sac_minutes <= minutes]
            ours, sac = score(returns(folders, task, name).to_numpy()[:, -3:]), score(sac_returns[steps[-3:]].to_numpy())
            against = ["–", "1", "–"] if name == "sac" else [f"{middle_score(sac)} ({steps[-1]:,})", *compare(ours, sac)]
            until = first_minute(runs, task, name)
            lines.append([task, title, number(minutes, 1), middle_score(ours), *against, until])
    heads = ["score, IQM", "SAC's score in these minutes (steps)", "ratio", "P(higher than SAC)", "minutes to 4000"]
    return markdown(["", "algorithm", "CPU minutes of 100,000 steps", *heads], lines)


def draw(folders: dict[str, FinishedRuns], tasks: list[str]) -> None:
    """Curves over steps, and over the median minutes at each of these steps."""
    title = "IQM of the return over runs, band: 95 % interval"
    figure, (over_steps, over_minutes) = new_figure(title, n_rows=2, n_columns=len(tasks), height=6.5)
    legend = {}
    for column, task in enumerate(tasks):
        for name, label in (SB3S | finished(folders["tuned"], task, TUNED[task])).items():
            table = returns(folders, task, name)
            middle, band = curve_interval(table.to_numpy())
            xs = {over_steps[column]: table.columns / 1000}
            timed = folders[MINUTES[task]]
            if finished(timed, task, {name: label}):
                xs[over_minutes[column]] = timed.minutes(task, name).median()
            for axes, x in xs.items():
                [legend[label]] = axes.plot(x, middle, color=ALGORITHMS[name].colour)
                axes.fill_between(x, *band, color=ALGORITHMS[name].colour, alpha=0.2, linewidth=0)
        over_steps[column].set(xlabel="thousand time steps", title=task)
        over_minutes[column].set(xlabel="minutes of CPU time")
    for axes in (over_steps[0], over_minutes[0]):
        axes.set_ylabel("return, mean of 10 episodes")
    figure.legend(legend.values(), legend, loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(RESULTS / "tuned" / "curves.png")


def main() -> None:
    folders = {name: FinishedRuns(RESULTS / name) for name in ("learning", "mixed", "tuned")}
    tasks = list(TUNED)
    for name, text in (("steps", by_steps(folders, tasks)), ("minutes", by_minutes(folders, tasks))):
        (RESULTS / "tuned" / f"{name}.md").write_text(text)
        print(text)
    draw(folders, tasks)


if __name__ == "__main__":
    main()
