"""
What delays learning on HalfCheetah-v5: the arms of the study beside each other, and beside what was predicted.

    python -m benchmarks.studies.early_lag

Reads the finished runs of benchmarks/results/early_lag and of 0.2.0 in it, which a later version made. Arms and seeds in
neither are those of ../tuning, made with the same settings on another processor: their minutes are left out. Writes table.md
and curves.png beside them.
"""

import numpy as np
import pandas as pd

from benchmarks.common.statistics import iqm
from benchmarks.learning.measured import FinishedRuns
from benchmarks.learning.report import markdown, number
from benchmarks.learning.run import ROOT
from benchmarks.learning.tasks import ALGORITHMS
from sb3_softvalue.figures import new_figure

TASK = "HalfCheetah-v5-50k"
RESULTS = ROOT / "benchmarks" / "results"
# Mean of all evaluations, written before the runs (early_lag/README.md)
PREDICTED = {
    "sacv": 750,
    "sac": 1150,
    "sacv-normalized": 1350,
    "sac-normalized": 1500,
    "sacv-normalized-gs-2": 2000,
    "sac-normalized-gs-2": 2100,
    "sacv-normalized-gs-2-delay-2": 1900,
    "sacv-gs-2": 1400,
    "sacv-n-steps-3": 1300,
    "sacv-alpha-0.01": 1250,
    "sacv-alpha-0.1": 1300,
    "sac-alpha-0.1": 1200,
    "sacv-layer-norm": 900,
    "sacv-tau-0.01": 850,
}


def read() -> pd.DataFrame:
    """:return: a row for each evaluation; ``minutes`` of processor is missing for runs of ../tuning"""
    frames = []
    for folder in ("early_lag", "early_lag/0.2.0", "tuning"):
        for (task, algorithm), frame in FinishedRuns(RESULTS / folder).frames.items():
            if task == TASK and algorithm in PREDICTED:
                minutes = frame["cpu_seconds"] / 60 if folder != "tuning" else np.nan
                frames.append(frame.assign(minutes=minutes)[["algorithm", "seed", "timesteps", "mean_reward", "minutes"]])
    return pd.concat(frames).drop_duplicates(["algorithm", "seed", "timesteps"])


def table(rows: pd.DataFrame) -> str:
    """:return: for each arm what was predicted, the means of all and of the last three evaluations, and the minutes"""
    lines = []
    for algorithm, predicted in PREDICTED.items():
        mine = rows[rows["algorithm"] == algorithm]
        means = mine.groupby("seed")["mean_reward"].mean()
        last = mine[mine["timesteps"] > mine["timesteps"].max() - 15_000].groupby("seed")["mean_reward"].mean()
        minutes = mine.groupby("seed")["minutes"].max().dropna()
        lines.append(
            [
                ALGORITHMS[algorithm].title,
                str(predicted),
                number(iqm(means.to_numpy()), 0) if len(means) else "–",
                ", ".join(f"{seed}: {number(mean, 0)}" for seed, mean in means.items()) or "–",
                number(iqm(last.to_numpy()), 0) if len(last) else "–",
                number(minutes.median(), 1) if len(minutes) else "–",
            ]
        )
    header = ["arm", "predicted", "mean of all evaluations, IQM", "each seed", "last three, IQM", "minutes of CPU time"]
    return markdown(header, lines)


def main() -> None:
    rows = read()
    folder = RESULTS / "early_lag"
    text = table(rows)
    (folder / "table.md").write_text(text)
    print(text)
    figure, (axes, *_) = new_figure("HalfCheetah-v5: median over seeds 10 to 13", n_columns=2, height=4.5)
    # SACV's arms in matplotlib's ten colours, SAC's dashed
    for index, algorithm in enumerate(sorted(PREDICTED, key=lambda name: ALGORITHMS[name].model != "sacv")):
        is_sacv, mine = ALGORITHMS[algorithm].model == "sacv", rows[rows["algorithm"] == algorithm]
        style = {"color": f"C{index % 9}", "linestyle": "solid" if is_sacv else "dashed"}
        middle = mine.groupby("timesteps")[["mean_reward", "minutes"]].median()
        axes[0].plot(middle.index / 1000, middle["mean_reward"], label=ALGORITHMS[algorithm].title, **style)
        axes[1].plot(middle["minutes"], middle["mean_reward"], **style)
    axes[0].set(xlabel="thousand time steps", ylabel="return, mean of 10 episodes")
    axes[1].set(xlabel="minutes of CPU time")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    figure.savefig(folder / "curves.png")


if __name__ == "__main__":
    main()
