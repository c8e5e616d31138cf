"""The finished runs of a folder of results, as tables."""

import pathlib
from collections import Counter

import numpy as np
import pandas as pd

from benchmarks.learning.results import COLUMNS, finished_runs, read_metadata, read_rows
from benchmarks.learning.tasks import ALGORITHMS, TASKS, evaluation_steps

# Finer evaluations are for the curves: the window of the score does not become narrower by them
SCORE_EVERY = 5_000
INTEGERS = {"seed": int, "timesteps": int}


def score(last: np.ndarray) -> np.ndarray:
    """:return: the mean over the last evaluations, one for each seed"""
    return last.mean(axis=1)


class FinishedRuns:
    """
    The finished runs of a folder.

    :param folder: of the results
    :raises SystemExit: if there are none
    """

    def __init__(self, folder: pathlib.Path):
        self.frames: dict[tuple[str, str], pd.DataFrame] = {}
        self.metadata = {path.stem: read_metadata(path) for path in sorted(folder.glob("*.json"))}
        order = [*TASKS, *self.metadata]
        for task in sorted(self.metadata, key=order.index):
            steps, every = self.metadata[task]["steps"], self.metadata[task]["evaluate_every"]
            if not any(step % SCORE_EVERY == 0 for step in evaluation_steps(steps, every)):
                print(f"{task} has no evaluation at a multiple of {SCORE_EVERY:,} steps, and no score: it is left out.")
                continue
            rows = read_rows(folder / f"{task}.csv")
            finished = finished_runs(rows, steps, every)
            for algorithm in dict.fromkeys(row["algorithm"] for row in rows):
                runs = [row for row in rows if row["algorithm"] == algorithm and (algorithm, int(row["seed"])) in finished]
                if algorithm not in ALGORITHMS:
                    print(f"{algorithm!r}, of which {task} has runs, is not known: it is left out.")
                elif runs:
                    self.frames[task, algorithm] = pd.DataFrame(runs).astype(dict.fromkeys(COLUMNS[4:], float) | INTEGERS)
        if not self.frames:
            raise SystemExit(f"No run in {folder} is finished: there is nothing to report yet.")
        self.tasks = list(dict.fromkeys(task for task, _ in self.frames))
        self.algorithms = [name for name in ALGORITHMS if any(name == algorithm for _, algorithm in self.frames)]

    def table(self, task: str, algorithm: str, column: str = "mean_reward") -> pd.DataFrame:
        """:return: a column's values, one row for each seed and one column for each time step; empty if nothing was run"""
        if (task, algorithm) not in self.frames:
            return pd.DataFrame()
        return self.frames[task, algorithm].pivot(index="seed", columns="timesteps", values=column)

    def minutes(self, task: str, algorithm: str) -> pd.DataFrame:
        """
        :return: minutes of CPU time until each evaluation, like ``table``. Those of different processors do not compare: only
            runs on the one that most of the task's runs were made on.
        """
        metadata = self.metadata[task]
        origins = {run: metadata["sweeps"][numbers[-1]]["processor"] for run, numbers in metadata.get("runs", {}).items()}
        usual = Counter(origins.values()).most_common(1)[0][0] if origins else None
        table = self.table(task, algorithm, "cpu_seconds") / 60
        return table.loc[[seed for seed in table.index if origins.get(f"{algorithm} {seed}") == usual]]

    def areas(self, task: str, algorithm: str) -> np.ndarray:
        """:return: the mean of all evaluations of each run, shape (seeds,)"""
        return self.table(task, algorithm).to_numpy().mean(axis=1)

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
        :return: the tasks that a summary is about: those with every run of SACV and SAC or, if there is none, with any
        """
        both = [task for task in self.tasks if not (self.table(task, "sacv").empty or self.table(task, "sac").empty)]
        return [task for task in both if not self.missing(task, "sacv") + self.missing(task, "sac")] or both
