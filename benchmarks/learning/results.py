"""The evaluations of a sweep on disk: a CSV for each task, and beside it a JSON file about how they were made.

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
import shlex
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from filelock import FileLock, Timeout

from benchmarks.common.machine import processor
from benchmarks.learning.run import COLUMNS
from benchmarks.learning.tasks import Run, evaluation_steps

KEY = ("task", "algorithm", "seed", "timesteps")
PACKAGES = ("sb3_softvalue", "stable_baselines3", "sb3_contrib", "torch", "numpy", "gymnasium", "mujoco")


def to_csv(rows: list[dict[str, Any]], header: bool = False) -> str:
    """:return: the rows as CSV"""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def write_atomically(path: pathlib.Path, text: str) -> None:
    """Write a file as a whole or not at all."""
    new = path.with_name(f"{path.name}.new")
    with open(new, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)


@contextmanager
def locked(folder: pathlib.Path) -> Iterator[None]:
    """
    Keep other sweeps out of a folder, whose files would be written from two memories.

    :param folder: of the results
    :raises SystemExit: if there is one
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0):
            yield
    except Timeout as error:
        message = f"Another sweep writes to {folder}: wait for its end, or use another --results folder."
        raise SystemExit(message) from error


def read_rows(path: pathlib.Path) -> list[dict[str, str]]:
    """
    :param path: of a CSV of a sweep
    :return: its rows, without those that were not written to their end, each evaluation once; none if there is no file
    :raises SystemExit: if it is something else
    """
    try:
        text = path.read_text() if path.exists() else ""
    except UnicodeDecodeError:
        text = "?\n"
    reader = csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1]))
    if reader.fieldnames is not None and tuple(reader.fieldnames) != COLUMNS:
        raise SystemExit(f"{path} is not a file of this benchmark: move it away, or use another --results folder.")
    rows: dict[tuple[str, ...], dict[str, str]] = {}
    for row in reader:
        if is_complete(row):
            rows.setdefault(tuple(row[name] for name in KEY), row)
    return list(rows.values())


def is_complete(row: dict[Any, Any]) -> bool:
    """:return: whether each column of a row, and nothing else, holds what it should"""
    try:
        numbers = [float(row[name]) for name in COLUMNS[2:]]
    except (TypeError, ValueError):
        return False
    return len(numbers) + 2 == len(row) and bool(row["task"] and row["algorithm"])


def finished_runs(rows: Sequence[dict[str, str]], steps: int, evaluate_every: int) -> set[tuple[str, int]]:
    """
    :param rows: of one task
    :param steps: of each of its runs
    :param evaluate_every: steps between two evaluations
    :return: algorithm and seed of the runs of which every evaluation is there, and none beyond their end
    """
    found: dict[tuple[str, int], set[int]] = {}
    for row in rows:
        found.setdefault((row["algorithm"], int(row["seed"])), set()).add(int(row["timesteps"]))
    wanted = set(evaluation_steps(steps, evaluate_every))
    return {run for run, timesteps in found.items() if timesteps == wanted}


class TaskResults:
    """
    The CSV of one task, to which only this object writes during a sweep.

    :param folder: of the results
    :param runs: the runs of this task that the sweep consists of
    """

    def __init__(self, folder: pathlib.Path, runs: Sequence[Run]):
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"{runs[0].task}.csv"
        self._lock = threading.Lock()
        found = read_rows(self.path)
        self.finished = finished_runs(found, runs[0].steps, runs[0].evaluate_every)
        self._rows = {self._key(row): row for row in found if (row["algorithm"], int(row["seed"])) in self.finished}
        self.sort()

    @staticmethod
    def _key(row: dict[str, Any]) -> tuple[str, int, int]:
        return row["algorithm"], int(row["seed"]), int(row["timesteps"])

    def append(self, row: dict[str, Any]) -> bool:
        """
        Write one evaluation at once.

        :param row: with ``COLUMNS``
        :return: whether it is new; a run that is retried reports its evaluations again
        """
        with self._lock:
            if self._key(row) in self._rows:
                return False
            self._rows[self._key(row)] = row
            with open(self.path, "a") as file:
                file.write(to_csv([row]))
                file.flush()
                os.fsync(file.fileno())
            return True

    def record_origin(self, run: Run, sweep: int) -> None:
        """
        Write beside the CSV where a finished run comes from.

        :param run: that is finished
        :param sweep: its number, as ``write_metadata`` gave it
        """
        with self._lock:
            path = self.path.with_suffix(".json")
            metadata = read_metadata(path)
            metadata.setdefault("runs", {})[f"{run.algorithm} {run.seed}"] = [sweep]
            write_json(path, metadata)

    def sort(self) -> None:
        """Sort the file by algorithm, seed and time step."""
        with self._lock:
            write_atomically(self.path, to_csv([self._rows[key] for key in sorted(self._rows)], header=True))


def versions() -> dict[str, str]:
    """:return: of Python and of what the results depend on"""
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in PACKAGES}


def commit() -> str:
    """:return: of the repository, with "-dirty" behind it if files were changed; empty outside of one"""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    done = subprocess.run(command, cwd=pathlib.Path(__file__).parent, capture_output=True, text=True)
    return done.stdout.strip()


def read_metadata(path: pathlib.Path) -> dict[str, Any]:
    """
    :param path: of the JSON beside a CSV
    :return: what is in it
    :raises SystemExit: if it cannot be read
    """
    try:
        metadata = json.loads(path.read_text())
        for name in ("steps", "evaluate_every", "versions", "algorithms", "sweeps"):
            metadata[name]
    except (ValueError, TypeError, KeyError) as error:
        message = f"{path} is damaged ({error!r}): restore it, or move it away together with its CSV."
        raise SystemExit(message) from error
    return metadata


def write_metadata(folder: pathlib.Path, runs: Sequence[Run], processes: int, note: str) -> int:
    """
    Write beside a CSV how its numbers are made.

    :param folder: of the results
    :param runs: the runs of one task that the sweep consists of
    :param processes: side by side
    :param note: of the user about this sweep
    :return: the number of this sweep in the file
    :raises SystemExit: if results are there that were made with other versions or settings, before anything is written
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{runs[0].task}.json"
    task = {"env": runs[0].env, "steps": runs[0].steps, "evaluate_every": runs[0].evaluate_every}
    algorithms = {run.algorithm: run.hyperparameters for run in runs}
    if path.exists():
        metadata = read_metadata(path)
    else:
        metadata = {"versions": versions(), "algorithms": {}, "sweeps": [], "runs": {}} | task
    other = [name for name, value in {"versions": versions(), **task}.items() if metadata.get(name) != value]
    other += [name for name, value in algorithms.items() if metadata["algorithms"].get(name, value) != value]
    if other:
        message = f"{path.with_suffix('.csv')} was made with other {', '.join(other)} ({path}): use another --results folder."
        raise SystemExit(message)
    metadata["algorithms"] |= algorithms
    sweep = {
        "command": shlex.join(["python", "-m", "benchmarks.learning", *sys.argv[1:]]),
        "commit": commit(),
        "processor": processor(runs[0].device),
        "processes": processes,
        "threads of each": runs[0].threads,
        "device": runs[0].device,
        "note": note,
    }
    if sweep not in metadata["sweeps"]:
        metadata["sweeps"].append(sweep)
    write_json(path, metadata)
    return int(metadata["sweeps"].index(sweep))


def write_json(path: pathlib.Path, metadata: dict[str, Any]) -> None:
    """Write what stands beside a CSV."""
    write_atomically(path, json.dumps(metadata, indent=1, ensure_ascii=False) + "\n")
