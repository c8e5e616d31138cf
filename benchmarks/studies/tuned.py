"""
SACV with RL Zoo's settings against SB3's SAC on HalfCheetah-v5, at equal steps.

    python -m benchmarks.studies.tuned

Reads the finished runs of benchmarks/results: learning and mixed (SAC and SACV with SB3's defaults, the same seeds on two
processors, whose rounding differs) and tuned. Writes table.md and curves.png to benchmarks/results/tuned.
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


def draw(folders: dict[str, FinishedRuns]) -> None:
    """Curves over steps."""
    figure, grid = new_figure("HalfCheetah-v5: IQM over runs, band: 95 % interval", height=4.0)
    axes = grid[0, 0]
    for name, title in TITLES.items():
        table, colour = returns(folders, name), ALGORITHMS[name].colour
        middle, band = curve_interval(table.to_numpy())
        axes.plot(table.columns / 1000, middle, color=colour, label=f"{title}, {len(table)} runs")
        axes.fill_between(table.columns / 1000, *band, color=colour, alpha=0.2, linewidth=0)
    axes.set(xlabel="thousand time steps", ylabel="return, mean of 10 episodes")
    axes.legend(frameon=False)
    figure.savefig(RESULTS / "tuned" / "curves.png")


def main() -> None:
    folders = {name: FinishedRuns(RESULTS / name) for name in ("learning", "mixed", "tuned")}
    text = by_steps(folders)
    (RESULTS / "tuned" / "table.md").write_text(text)
    print(text)
    draw(folders)


if __name__ == "__main__":
    main()
