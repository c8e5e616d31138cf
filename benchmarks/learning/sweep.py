"""Many runs side by side, on this machine or on the nodes of a Ray cluster."""

import pathlib
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from types import MappingProxyType
from typing import Any

from tqdm import tqdm

from benchmarks.learning.results import TaskResults
from benchmarks.learning.run import ROOT, run_in_process
from benchmarks.learning.tasks import Run

Runner = Callable[[Run], Iterator[dict[str, Any]]]
# How often Ray begins a run again whose node was lost
RETRIES = 10


class Sweep:
    """
    Does runs side by side and keeps their evaluations.

    :param runs: in the order in which they are begun
    :param folder: of the results
    :param numbers: for each task the number of this sweep, as ``write_metadata`` gave it
    """

    def __init__(self, runs: Sequence[Run], folder: pathlib.Path, numbers: Mapping[str, int] = MappingProxyType({})):
        self.numbers = numbers
        by_task: dict[str, list[Run]] = {}
        for run in runs:
            by_task.setdefault(run.task, []).append(run)
        self.results = {task: TaskResults(folder, task_runs) for task, task_runs in by_task.items()}
        self.remaining = [run for run in runs if (run.algorithm, run.seed) not in self.results[run.task].finished]
        self.n_done = len(runs) - len(self.remaining)
        self.n_runs = len(runs)

    def execute(self, runner: Runner, processes: int) -> list[str]:
        """
        :param runner: does a run and gives its evaluations
        :param processes: runs at the same time
        :return: what went wrong, one text for each run that failed
        """
        failures = []
        steps = sum(run.steps for run in self.remaining)
        with tqdm(total=steps, unit=" steps", unit_scale=True, mininterval=1.0, smoothing=0.05) as bar:
            pool = ThreadPoolExecutor(processes)
            futures = [pool.submit(self._execute_one, run, runner, bar) for run in self.remaining]
            try:
                for future in as_completed(futures):
                    if error := future.exception():
                        failures.append(str(error))
                        tqdm.write(str(error))
            finally:
                pool.shutdown(cancel_futures=True)
        return failures

    def _execute_one(self, run: Run, runner: Runner, bar: tqdm) -> None:
        results = self.results[run.task]
        returns: list[float] = []
        row: dict[str, Any] = {}
        for row in runner(run):
            if results.append(row):
                returns.append(row["mean_reward"])
                bar.update(run.evaluate_every)
                bar.set_description(f"{run.task} {run.algorithm} seed {run.seed}: {returns[-1]:.0f}", refresh=False)
        if row.get("timesteps") != run.steps:
            raise RuntimeError(f"{run.task}, {run.algorithm}, seed {run.seed} ended after {row.get('timesteps', 0)} steps")
        results.sort()
        if run.task in self.numbers:
            results.record_origin(run, self.numbers[run.task])
        self.n_done += 1
        tqdm.write(
            f"{run.task} {run.algorithm} seed {run.seed}: {statistics.mean(returns[-3:]):.1f} in the last evaluations, "
            f"{row['cpu_seconds'] / 60:.1f} minutes of CPU time, run {self.n_done} of {self.n_runs}"
        )
        sys.stdout.flush()


def on_ray(address: str, threads: int, n_gpus: float = 0.0) -> Runner:
    """
    Hand runs to a Ray cluster, whose nodes have the same packages installed. Ray decides what runs where and when, and begins
    a run again whose node was lost.

    :param address: of the cluster, as ``ray.init`` takes it
    :param threads: of each run
    :param n_gpus: share of a GPU for each run
    :return: does a run there
    """
    import ray

    if not ray.is_initialized():
        code = {"py_modules": [str(ROOT / "benchmarks")], "excludes": ["results"]}
        ray.init(address, runtime_env=code, log_to_driver=False)
    remote = ray.remote(run_in_process).options(num_cpus=threads, num_gpus=n_gpus, max_retries=RETRIES)

    def runner(run: Run) -> Iterator[dict[str, Any]]:
        for evaluation in remote.remote(run):
            yield ray.get(evaluation)

    return runner
