"""How well SACV learns against SB3's SAC: same tasks, versions, hyper-parameters, warm-up, seeds and evaluation episodes.

    python benchmarks/learning.py --quick                # Pendulum-v1, two seeds of SACV and SAC
    python benchmarks/learning.py                        # everything, side by side on all cores; hours
    python benchmarks/learning.py --results FOLDER --report   # figures and tables of what is there
    python benchmarks/learning.py --results SHARED --ray ADDRESS   # on the nodes of a Ray cluster

Each run is a process of its own with one thread. Every evaluation is in the CSV of its task as soon as it is done; the same
command goes on with a sweep that was killed. The seeds are fixed in learning_run.py.
"""

import argparse
import importlib.util
import os
import pathlib
import signal
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from types import FrameType, MappingProxyType
from typing import Any, NoReturn

from learning_results import TaskResults, sole_sweep, write_sidecar
from learning_run import ALGORITHMS, TASKS, Run, Task, rows
from tqdm import tqdm

Runner = Callable[[Run], Iterator[dict[str, Any]]]
HERE = pathlib.Path(__file__).parent
# How often Ray begins a run again whose node was lost
RETRIES = 10


def make_runs(tasks: dict[str, Task], algorithms: Sequence[str], args: argparse.Namespace) -> list[Run]:
    """
    :param tasks: by the names of their results
    :param algorithms: names from ``ALGORITHMS``
    :param args: of the command line
    :return: all runs; those of one seed stand together, so that pairs finish together
    """
    return [
        Run(
            name,
            task.env,
            task.steps,
            task.evaluate_every,
            algorithm,
            seed,
            task.hyperparameters | ALGORITHMS[algorithm],
            args.device,
            args.threads,
            str(args.results.absolute() / "checkpoints"),
        )
        for name, task in tasks.items()
        for seed in (task.seeds if args.seeds is None else args.seeds)
        for algorithm in algorithms
    ]


class Sweep:
    """
    Does runs side by side and keeps what they say.

    :param runs: in the order in which they are begun
    :param folder: of the results
    :param numbers: for each task the number of this sweep, as ``write_sidecar`` gave it
    """

    def __init__(self, runs: Sequence[Run], folder: pathlib.Path, numbers: Mapping[str, int] = MappingProxyType({})):
        self.numbers = numbers
        by_task: dict[str, list[Run]] = {}
        for run in runs:
            by_task.setdefault(run.task, []).append(run)
        self.results = {task: TaskResults(folder, task_runs) for task, task_runs in by_task.items()}
        self.to_do = [run for run in runs if run.key[1:] not in self.results[run.task].finished]
        self.n_done = len(runs) - len(self.to_do)
        self.n_runs = len(runs)

    def do(self, runner: Runner, processes: int) -> list[str]:
        """
        :param runner: does a run and says its evaluations
        :param processes: runs at the same time
        :return: what went wrong, one text for each run that failed
        """
        failures = []
        steps = sum(run.steps for run in self.to_do)
        with tqdm(total=steps, unit=" steps", unit_scale=True, mininterval=1.0, smoothing=0.05) as bar:
            pool = ThreadPoolExecutor(processes)
            futures = [pool.submit(self._one, run, runner, bar) for run in self.to_do]
            try:
                for future in as_completed(futures):
                    if error := future.exception():
                        failures.append(str(error))
                        tqdm.write(str(error))
            finally:
                pool.shutdown(cancel_futures=True)
        return failures

    def _one(self, run: Run, runner: Runner, bar: tqdm) -> None:
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
        results.tidy()
        if run.task in self.numbers:
            results.note_origin(run, self.numbers[run.task])
        self.n_done += 1
        tqdm.write(
            f"{run.task} {run.algorithm} seed {run.seed}: {statistics.mean(returns[-3:]):.1f} in the last evaluations, "
            f"{row['cpu_seconds'] / 60:.1f} minutes of processor, run {self.n_done} of {self.n_runs}"
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
        ray.init(address, runtime_env={"working_dir": str(HERE), "excludes": ["results"]}, log_to_driver=False)
    remote = ray.remote(rows).options(num_cpus=threads, num_gpus=n_gpus, max_retries=RETRIES)

    def runner(run: Run) -> Iterator[dict[str, Any]]:
        for evaluation in remote.remote(run):
            yield ray.get(evaluation)

    return runner


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """:return: the command line's arguments"""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, help="default: all but those for tuning and that of 1M steps")
    parser.add_argument("--algorithms", nargs="+", choices=ALGORITHMS, help="default: sacv sac")
    parser.add_argument("--seeds", type=int, nargs="+", help="default: the task's own")
    parser.add_argument("--quick", action="store_true", help="Pendulum-v1 with seeds 0 and 1 of SACV and SAC")
    parser.add_argument("--processes", type=int, help="runs at the same time, default: one for each core")
    parser.add_argument("--threads", type=int, default=1, help="of each run; with more, runs do not repeat exactly")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--results", type=pathlib.Path, help="folder, default: runs/learning or runs/learning-quick")
    parser.add_argument("--note", default="", help="kept beside the results, such as what else the machine did")
    parser.add_argument("--ray", metavar="ADDRESS", help="of a Ray cluster that does the runs; --results on shared storage")
    parser.add_argument("--report", action="store_true", help="train nothing; figures and tables of the finished runs")
    args = parser.parse_args(argv)
    if args.quick:
        if args.tasks or args.algorithms or args.seeds:
            parser.error("--quick chooses tasks, algorithms and seeds: leave them out, or leave it out.")
        # The longer runs first, so that two cores are done together
        args.tasks, args.algorithms, args.seeds = ["Pendulum-v1"], ["sac", "sacv"], [0, 1]
    args.tasks = args.tasks or [name for name in TASKS if not name.endswith(("1M", "50k", "15k"))]
    args.algorithms = args.algorithms or ["sacv", "sac"]
    for name in ("tasks", "algorithms", "seeds"):  # named twice, a run would be done twice, side by side
        setattr(args, name, getattr(args, name) and list(dict.fromkeys(getattr(args, name))))
    args.results = args.results or pathlib.Path("runs", "learning-quick" if args.quick else "learning")
    args.processes = len(os.sched_getaffinity(0)) if args.processes is None else args.processes
    check(args, parser)
    return args


def check(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Refuse what cannot work, in one sentence and before any work starts."""
    for name, minimum in (("processes", 1), ("threads", 1)):
        if getattr(args, name) < minimum:
            parser.error(f"--{name} must be at least {minimum}, got {getattr(args, name)}.")
    if args.seeds and min(args.seeds) < 0:
        parser.error(f"--seeds must not be negative, got {min(args.seeds)}.")
    if args.results.exists() and not args.results.is_dir():
        parser.error(f"--results must be a folder, and {args.results} is a file.")
    if args.ray and importlib.util.find_spec("ray") is None:
        parser.error("--ray needs Ray: pip install -e '.[ray]'.")
    if args.device == "cuda" and not args.ray:
        import torch as th

        if not th.cuda.is_available():
            parser.error("--device cuda needs a GPU, and PyTorch finds none.")


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    if args.report:
        from learning_report import report

        return report(args.results)
    runs = make_runs({name: TASKS[name] for name in args.tasks}, args.algorithms, args)
    with sole_sweep(args.results):
        numbers = {
            task: write_sidecar(args.results, [run for run in runs if run.task == task], args.processes, args.note)
            for task in args.tasks
        }
        sweep = Sweep(runs, args.results, numbers)
        if args.ray:  # which has as many at the same time as there is room for
            failures = sweep.do(on_ray(args.ray, args.threads, float(args.device == "cuda")), len(runs))
        else:
            failures = sweep.do(rows, args.processes)
    print(f"Written: {', '.join(str(results.path) for results in sweep.results.values())}")
    if args.quick and not failures:
        from learning_measured import Measured
        from learning_report import seed_table

        print(seed_table(Measured(args.results)))
    if failures:
        raise SystemExit(f"{len(failures)} runs failed; the same command tries them again.")


def end_at_once(number: int, frame: FrameType | None) -> NoReturn:
    """Called for Ctrl-C. An ordinary exit would wait for the trainings, which end when this process is gone."""
    os.write(sys.stdout.fileno(), b"\nInterrupted: the same command goes on.\n")
    os._exit(128 + number)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, end_at_once)
    main()
