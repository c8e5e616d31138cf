"""Where learning.py keeps its evaluations: a CSV for each task, and beside it what they were made with as JSON.

Only finished runs are kept over a restart, so that a sweep that was killed at any moment, also within a line, ends with the
file of one that was not. Trainings on one thread repeat exactly; only the times differ.
"""

import csv
import importlib.metadata
import io
import json
import os
import pathlib
import platform
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import Any

from learning_run import Run
from machine import processor

KEY = ("task", "algorithm", "seed", "timesteps")
COLUMNS = (*KEY, "mean_reward", "std_reward", "episode_length", "seconds", "cpu_seconds")
PACKAGES = ("sb3_softvalue", "stable_baselines3", "sb3_contrib", "torch", "numpy", "gymnasium", "mujoco")


def in_lines(rows: list[dict[str, Any]], header: bool = False) -> str:
    """:return: the rows as CSV"""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def replace(path: pathlib.Path, text: str) -> None:
    """Write a file as a whole or not at all."""
    new = path.with_name(f"{path.name}.new")
    with open(new, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)


def read_whole_lines(path: pathlib.Path) -> list[dict[str, str]]:
    """:return: the rows of a CSV of ours, without a last line that was not written to its end; none if there is no file"""
    text = path.read_text() if path.exists() else ""
    return list(csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1])))


class TaskResults:
    """
    The CSV of one task, of which only this object writes while a sweep goes on.

    :param folder: of the results
    :param runs: the runs of this task that the sweep consists of
    """

    def __init__(self, folder: pathlib.Path, runs: Sequence[Run]):
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"{runs[0].task}.csv"
        self._lock = threading.Lock()
        steps = runs[0].steps
        found = read_whole_lines(self.path)
        finished = {(row["algorithm"], int(row["seed"])) for row in found if int(row["timesteps"]) == steps}
        self._rows = {self._key(row): row for row in found if (row["algorithm"], int(row["seed"])) in finished}
        self.finished = finished
        self.tidy()

    @staticmethod
    def _key(row: dict[str, Any]) -> tuple[str, int, int]:
        return row["algorithm"], int(row["seed"]), int(row["timesteps"])

    def append(self, row: dict[str, Any]) -> bool:
        """
        Write one evaluation at once.

        :param row: with ``COLUMNS``
        :return: whether it is new; a run that is retried says its evaluations again
        """
        with self._lock:
            if self._key(row) in self._rows:
                return False
            self._rows[self._key(row)] = row
            with open(self.path, "a") as file:
                file.write(in_lines([row]))
                file.flush()
                os.fsync(file.fileno())
            return True

    def tidy(self) -> None:
        """Sort the file by algorithm, seed and time step."""
        with self._lock:
            replace(self.path, in_lines([self._rows[key] for key in sorted(self._rows)], header=True))


def versions() -> dict[str, str]:
    """:return: of Python and of what the results depend on"""
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in PACKAGES}


def commit() -> str:
    """:return: of the repository, with "-dirty" behind it if files were changed; empty outside of one"""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    done = subprocess.run(command, cwd=pathlib.Path(__file__).parent, capture_output=True, text=True)
    return done.stdout.strip()


def write_sidecar(folder: pathlib.Path, runs: Sequence[Run], processes: int, note: str) -> None:
    """
    Say beside a CSV what its numbers are made with.

    :param folder: of the results
    :param runs: the runs of one task that the sweep consists of
    :param processes: side by side
    :param note: of the user about this sweep
    :raises SystemExit: if results are there that were made with other versions
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{runs[0].task}.json"
    about = json.loads(path.read_text()) if path.exists() else {"versions": versions(), "algorithms": {}, "sweeps": []}
    if about["versions"] != versions():
        raise SystemExit(f"{path.with_suffix('.csv')} was made with other versions ({path}): take another --results folder.")
    about |= {"env": runs[0].env, "steps": runs[0].steps, "evaluate_every": runs[0].evaluate_every}
    about["algorithms"] |= {run.algorithm: run.hyperparameters for run in runs}
    sweep = {
        "command": " ".join(["python", *sys.argv]),
        "commit": commit(),
        "processor": processor(runs[0].device),
        "processes": processes,
        "threads of each": runs[0].threads,
        "device": runs[0].device,
        "note": note,
    }
    if sweep not in about["sweeps"]:
        about["sweeps"].append(sweep)
    replace(path, json.dumps(about, indent=1, ensure_ascii=False) + "\n")
