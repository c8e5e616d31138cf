"""
SACV with RL Zoo's settings against SB3's SAC on HalfCheetah-v5, at equal steps and at equal CPU time.

    python -m benchmarks.studies.tuned

Reads the finished runs of benchmarks/results: learning and mixed (SAC and SACV with SB3's defaults, two processors) and tuned
(RL Zoo's settings, and SAC on the same processor). All runs count over steps; CPU time is compared within tuned alone. Writes
table.md and curves.png to benchmarks/results/tuned.
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

TASK, RETURN = "HalfCheetah-v5", 4000.0
RESULTS = ROOT / "benchmarks" / "results"
TUNED = "sacv-normalized-gs-2"
TITLES = {"sac": "SAC", "sacv": "SACV, SB3's defaults", TUNED: "SACV, RL Zoo's settings"}


def returns(folders: dict[str, FinishedRuns], algorithm: str) -> pd.DataFrame:
    """:return: of every run in any folder, one row each and one column for each evaluation"""
    return pd.concat([runs.table(TASK, algorithm) for runs in folders.values()], ignore_index=True)


def first_at(table: np.ndarray, x: np.ndarray) -> np.ndarray:
    """:return: ``x`` at each run's first evaluation that reaches the return, infinite if there is none"""
    return np.where(table >= RETURN, x, np.inf).min(axis=1)


def score_by(runs: FinishedRuns, algorithm: str, minutes: float) -> np.ndarray:
    """:return: the mean of each run's last three evaluations within so many minutes of CPU time"""
    table, used = runs.table(TASK, algorithm).to_numpy(), runs.minutes(TASK, algorithm).to_numpy()
    last = [row[spent <= minutes][-3:] for row, spent in zip(table, used, strict=True)]
    return score(np.stack(last))


def compare(ours: np.ndarray, sac: np.ndarray) -> list[str]:
    """:return: the IQM, its ratio to SAC's and the probability that a run scores higher than one of SAC, with intervals"""

    def ratio(a: np.ndarray, b: np.ndarray) -> float:
        return iqm(a) / iqm(b)

    probability = probability_of_improvement(ours[:, None], sac[:, None])
    return [
        with_interval(iqm(ours), interval(iqm, ours)),
        with_interval(ratio(ours, sac), interval(ratio, ours, sac), 2),
        with_interval(probability, interval(probability_of_improvement, ours, sac), 2),
    ]


def by_steps(folders: dict[str, FinishedRuns]) -> str:
    """:return: the table over steps"""
    lines, scores = [], {name: score(returns(folders, name).to_numpy()[:, -3:]) for name in TITLES}
    for name, title in TITLES.items():
        table = returns(folders, name)
        steps = first_at(table.to_numpy(), table.columns.to_numpy())
        middle = number(float(np.median(steps)), 0) if np.isfinite(np.median(steps)) else "never"
        against = compare(scores[name], scores["sac"])
        lines.append([title, str(len(table)), against[0], *(against[1:] if name != "sac" else ["1", "–"]), middle])
    return markdown(
        ["after 100,000 steps", "runs", "score, IQM", "ratio to SAC", "P(higher than SAC)", "steps to 4000"], lines
    )


def by_minutes(runs: FinishedRuns) -> str:
    """:return: the table over CPU time, of runs on one processor"""
    budget = float(runs.minutes(TASK, TUNED).iloc[:, -1].median())
    sac = score_by(runs, "sac", budget)
    lines = []
    for name in ("sac", TUNED):
        table, minutes = runs.table(TASK, name), runs.minutes(TASK, name)
        reached = first_at(table.to_numpy(), minutes.to_numpy())
        against = compare(score_by(runs, name, budget), sac)
        lines.append(
            [
                TITLES[name],
                str(len(table)),
                against[0],
                *(against[1:] if name != "sac" else ["1", "–"]),
                number(float(np.median(reached)), 1),
                number(float(minutes.iloc[:, -1].median()), 1),
            ]
        )
    header = [f"after {budget:.1f} minutes of CPU time", "runs", "score, IQM", "ratio to SAC", "P(higher than SAC)"]
    return markdown([*header, "minutes to 4000", "minutes for 100,000 steps"], lines)


def draw(folders: dict[str, FinishedRuns]) -> None:
    """Curves over steps, all runs, and over minutes, one processor."""
    figure, (axes, *_) = new_figure("HalfCheetah-v5: IQM over runs, band: 95 % interval", n_columns=2, height=4.0)
    for name, title in TITLES.items():
        table, colour = returns(folders, name), ALGORITHMS[name].colour
        middle, band = curve_interval(table.to_numpy())
        axes[0].plot(table.columns / 1000, middle, color=colour, label=f"{title}, {len(table)} runs")
        axes[0].fill_between(table.columns / 1000, *band, color=colour, alpha=0.2, linewidth=0)
        mine = folders["tuned"].table(TASK, name)
        if len(mine):
            minutes = folders["tuned"].minutes(TASK, name).to_numpy()
            axes[1].plot(minutes.T, mine.to_numpy().T, color=colour, linewidth=0.6, alpha=0.4)
            axes[1].plot(np.median(minutes, axis=0), curve_interval(mine.to_numpy())[0], color=colour)
    axes[0].set(xlabel="thousand time steps", ylabel="return, mean of 10 episodes")
    axes[1].set(xlabel="minutes of CPU time, without evaluations, one processor")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(RESULTS / "tuned" / "curves.png")


def main() -> None:
    folders = {name: FinishedRuns(RESULTS / name) for name in ("learning", "mixed", "tuned")}
    text = by_steps(folders) + "\n" + by_minutes(folders["tuned"])
    (RESULTS / "tuned" / "table.md").write_text(text)
    print(text)
    draw(folders)


if __name__ == "__main__":
    main()
