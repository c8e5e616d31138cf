"""How many updates several trainings do side by side, each in a process of its own with one thread, against one alone.

python -m benchmarks.speed.many_seeds
python -m benchmarks.speed.many_seeds --device cuda --processes 2 4 8 14
"""

import argparse
import time
from collections.abc import Sequence
from typing import Any

import torch as th
import torch.multiprocessing as mp

from benchmarks.common.command_line import Help
from sb3_softvalue import SACV

# Of one measurement
SECONDS = 4.0
# Random transitions in the buffer of a process, and updates before it is measured: what is captured, is captured then
TRANSITIONS, WARM_UP = 2_000, 300


def update(index: int, options: argparse.Namespace, counts: Sequence[int], barrier: Any, results: Any) -> None:
    """
    Be one of the processes: update whenever at least as many are measured.

    :param index: of this process
    :param options: of the command line
    :param counts: how many processes update at the same time, one measurement after the other
    :param barrier: where all of them wait for the next measurement
    :param results: takes updates per second
    """
    th.set_num_threads(1)
    execution = "cuda_graph" if options.device == "cuda" else "compiled"
    model = SACV(
        "MlpPolicy", options.task, seed=index, device=options.device, execution=execution, learning_starts=TRANSITIONS
    )
    model.learn(TRANSITIONS)
    for _ in range(WARM_UP):
        model.train(1, options.batch_size)
    for count in counts:
        barrier.wait()
        if index < count:
            start, n_updates = time.perf_counter(), 0
            while (seconds := time.perf_counter() - start) < SECONDS:
                model.train(1, options.batch_size)
                n_updates += 1
            results.put(n_updates / seconds)
        barrier.wait()


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.speed.many_seeds", description=__doc__, formatter_class=Help)
    parser.add_argument("--task", default="HalfCheetah-v5", help="Gymnasium task")
    parser.add_argument("--batch-size", type=int, default=256, help="of an update")
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4, 8], help="processes that share the device")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="of the networks")
    options = parser.parse_args()

    counts = [1, *options.processes]
    context = mp.get_context("spawn")
    barrier, results = context.Barrier(max(counts) + 1), context.Queue()
    arguments = (options, counts, barrier, results)
    processes = [context.Process(target=update, args=(index, *arguments), daemon=True) for index in range(max(counts))]
    for process in processes:
        process.start()
    speeds = []
    for count in counts:
        barrier.wait()
        barrier.wait()
        speeds.append(sum(results.get() for _ in range(count)))
        print(f"{count} processes: {speeds[-1] / speeds[0]:.2f} × the updates of one", flush=True)
    print(f"{1000 / speeds[0]:.3f} ms for an update of one process")


if __name__ == "__main__":
    main()
