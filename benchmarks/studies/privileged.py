"""
What Q and V that see the simulator's state are worth to an actor that does not: examples/privileged.py on several seeds.

    python -m benchmarks.studies.privileged            # trains what is missing, half a minute a run, and draws

Writes benchmarks/results/studies/privileged.csv and privileged_values.csv after each run, and docs/images/privileged.png.
"""

import argparse

import pandas as pd
import torch as th

from benchmarks.common.machine import processor
from benchmarks.common.statistics import curve_interval, interval, iqm
from benchmarks.learning.report import markdown, number
from benchmarks.learning.run import ROOT
from examples import privileged
from sb3_softvalue import SACV

RETURNS, VALUES = (ROOT / "benchmarks" / "results" / "studies" / f"privileged{name}.csv" for name in ("", "_values"))
SEEDS, TIMESTEPS, EVERY, EPISODES = range(5), 10_000, 1_000, 20
# Mean of the last three evaluations, IQM, written before these seeds were run; the error of the camera was chosen on others
PREDICTED = {"all-seeing": -145, "privileged": -165, "blind": -650, "blind SAC": -650}


def run(arm: str, seed: int) -> None:
    """Train one model, and add what it collected and what its V says to the files."""
    model = privileged.make_model(arm, seed)
    returns = privileged.train(model, arm, TIMESTEPS, EVERY, EPISODES)
    values = list(privileged.read_value(model, arm, EPISODES)) if isinstance(model, SACV) else []
    for path, rows in ((VALUES, values), (RETURNS, returns)):
        frame = pd.DataFrame(rows).assign(processor=processor("cpu"))
        frame.to_csv(path, mode="a", header=not path.exists(), index=False, float_format="%.2f")


def table(returns: pd.DataFrame) -> str:
    """:return: the IQM of the last three evaluations of each arm with its interval, and the minutes of a run"""
    lines = []
    for arm, predicted in PREDICTED.items():
        mine = returns[returns["arm"] == arm]
        last = mine[mine["timesteps"] > TIMESTEPS - 3 * EVERY].groupby("seed")["return"].mean()
        low, high = interval(iqm, last.to_numpy())
        lines.append(
            [
                arm,
                str(predicted),
                f"{number(iqm(last.to_numpy()), 0)} [{number(low, 0)}, {number(high, 0)}]",
                ", ".join(number(mean, 0) for mean in last),
                number(mine.groupby("seed")["seconds"].max().median() / 60, 1),
            ]
        )
    return markdown(["arm", "predicted", "last three evaluations, IQM", "each seed", "minutes of CPU time"], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Privileged critics against blind and all-seeing ones.")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--arms", nargs="+", choices=privileged.ARMS, default=list(privileged.ARMS))
    options = parser.parse_args()
    th.set_num_threads(1)
    for seed in options.seeds:
        for arm in options.arms:
            done = pd.read_csv(RETURNS) if RETURNS.exists() else pd.DataFrame({"arm": [], "seed": []})
            if not ((done["arm"] == arm) & (done["seed"] == seed)).any():
                run(arm, seed)
    returns, values = pd.read_csv(RETURNS), pd.read_csv(VALUES)
    print(table(returns))
    picture = ROOT / "docs" / "images" / "privileged.png"
    privileged.draw(returns.to_dict("records"), values.to_dict("records"), picture, curve_interval)


if __name__ == "__main__":
    main()
