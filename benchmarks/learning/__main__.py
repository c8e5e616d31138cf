"""How well SACV learns against SB3's SAC: same tasks, versions, hyper-parameters, warm-up, seeds and evaluation episodes.

    python -m benchmarks.learning --quick                # Pendulum-v1, two seeds of SACV and SAC
    python -m benchmarks.learning                        # everything, side by side on all cores; hours
    python -m benchmarks.learning --results FOLDER --report   # figures and tables of what is there
    python -m benchmarks.learning --results SHARED --ray ADDRESS   # on the nodes of a Ray cluster

Each run is a process of its own with one thread. Every evaluation is in the CSV of its task as soon as it is done; the same
command continues a sweep that was killed. Tasks, algorithms and seeds are in tasks.py.
"""

import argparse
import importlib.util
import os
import pathlib
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import NoReturn

from benchmarks.learning.results import locked, write_metadata
from benchmarks.learning.run import run_in_process
from benchmarks.learning.sweep import Sweep, on_ray
from benchmarks.learning.tasks import ALGORITHMS, TASKS, Run, Task


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
            task.hyperparameters | ALGORITHMS[algorithm].hyperparameters,
            args.device,
            args.threads,
            str(args.results.absolute() / "checkpoints"),
        )
        for name, task in tasks.items()
        for seed in (task.seeds if args.seeds is None else args.seeds)
        for algorithm in algorithms
    ]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """:return: the command line's arguments"""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.learning", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", nargs="+", choices=TASKS, help="default: all but those for tuning and that of 1M steps")
    parser.add_argument("--algorithms", nargs="+", choices=ALGORITHMS, help="default: sacv sac")
    parser.add_argument("--seeds", type=int, nargs="+", help="default: the task's own")
    parser.add_argument("--quick", action="store_true", help="Pendulum-v1 with seeds 0 and 1 of SACV and SAC")
    parser.add_argument("--processes", type=int, help="runs at the same time, default: one for each core")
    parser.add_argument("--threads", type=int, default=1, help="of each run; with more, runs do not repeat exactly")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--results", type=pathlib.Path, help="folder, default: runs/learning or runs/learning-quick")
    parser.add_argument("--note", default="", help="stored with the results, such as other load on the machine")
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
        from benchmarks.learning.report import write_report

        return write_report(args.results)
    runs = make_runs({name: TASKS[name] for name in args.tasks}, args.algorithms, args)
    with locked(args.results):
        numbers = {
            task: write_metadata(args.results, [run for run in runs if run.task == task], args.processes, args.note)
            for task in args.tasks
        }
        sweep = Sweep(runs, args.results, numbers)
        if args.ray:  # which has as many at the same time as there is room for
            failures = sweep.execute(on_ray(args.ray, args.threads, float(args.device == "cuda")), len(runs))
        else:
            failures = sweep.execute(run_in_process, args.processes)
    print(f"Written: {', '.join(str(results.path) for results in sweep.results.values())}")
    if args.quick and not failures:
        from benchmarks.learning.measured import FinishedRuns
        from benchmarks.learning.report import seed_table

        print(seed_table(FinishedRuns(args.results)))
    if failures:
        raise SystemExit(f"{len(failures)} of the runs failed; run the same command again to retry them.")


def exit_at_once(number: int, frame: FrameType | None) -> NoReturn:
    """Called for Ctrl-C. An ordinary exit would wait for the trainings, which end when this process is gone."""
    os.write(sys.stdout.fileno(), b"\nInterrupted: the same command continues.\n")
    os._exit(128 + number)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, exit_at_once)
    main()
