"""What the additions to SACV cost in ``learn()``: checkpoints, diagnostics, and the check that all numbers are finite.

    python -m benchmarks.speed.costs
    python -m benchmarks.speed.costs --n-envs 2 --vec-env subproc
    python -m benchmarks.speed.costs --only checkpoints --learning-starts 1000000 --save-freq 1000000

The last one measures the steps of the environment alone, between two checkpoints.
Each contender does one ``learn()`` in a process of its own, with the callback or without the check. They take turns in slices,
so that whatever else the machine does hits all of them. The first slice, which compiles, is left out. Printed is the ratio of
the times of one slice, with and without, as median and quartiles over all slices, and the ratio for all slices together, which
includes those in which something was written.
"""

import argparse

import numpy as np
from tqdm import tqdm

from benchmarks.common.command_line import Help
from benchmarks.common.machine import processor
from benchmarks.common.statistics import quartiles
from benchmarks.speed.contender import Contender

# Name: with it, without it
COSTS = {
    "checkpoints": ("checkpoints", "none"),
    "diagnostics": ("diagnostics", "none"),
    "finite check": ("none", "unchecked"),
}


def parse() -> argparse.Namespace:
    """:return: the command line's arguments"""
    parser = argparse.ArgumentParser("python -m benchmarks.speed.costs", description=__doc__, formatter_class=Help)
    parser.add_argument("--only", nargs="+", choices=COSTS, default=list(COSTS), help="additions to measure")
    parser.add_argument("--env", default="HalfCheetah-v5", help="Gymnasium task")
    parser.add_argument("--n-envs", type=int, default=1, help="number of environments")
    parser.add_argument("--vec-env", choices=["dummy", "subproc"], default="dummy", help="kind of vectorized environment")
    parser.add_argument("--execution", default="compiled", help="backend of SACV")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="of the networks")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch")
    parser.add_argument("--timesteps", type=int, default=20_000, help="of learn()")
    parser.add_argument("--slices", type=int, default=40, help="of learn(), in turns")
    parser.add_argument("--buffer-size", type=int, default=100_000, help="transitions, which the buffer holds from the start")
    parser.add_argument("--save-freq", type=int, default=10_000, help="steps between two checkpoints")
    parser.add_argument("--learning-starts", type=int, default=100, help="beyond --timesteps: no updates")
    args = parser.parse_args()
    if args.slices < 2:
        parser.error(f"--slices must be at least 2, since the first one is left out, got {args.slices}.")
    return args


def measure(args: argparse.Namespace) -> dict[str, np.ndarray]:
    """:return: seconds of each slice but the first, wall clock and processor, by addition, shape (slices - 1, 2)"""
    names = dict.fromkeys(name for cost in args.only for name in COSTS[cost])
    same = {name: value for name, value in vars(args).items() if name not in ("only", "execution")}
    same |= {"fill": 1, "batch_size": 256, "width": 256, "train_freq": 1, "gradient_steps": args.n_envs}
    contenders = {name: Contender("learn", f"sacv-{args.execution}", same | {"addition": name}) for name in names}
    try:
        for contender in contenders.values():
            contender.read()
        turns: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
        for turn in tqdm(range(args.slices), desc=f"learn() of {args.timesteps} steps", leave=False):
            # Each goes first as often as last
            for name in (list(names), list(names)[::-1])[turn % 2]:
                answer = contenders[name].ask("go")
                turns[name].append((answer["seconds"], answer["cpu_seconds"]))
    finally:
        for contender in contenders.values():
            contender.end()
    return {name: np.array(seconds)[1:] for name, seconds in turns.items()}


def main() -> None:
    args = parse()
    seconds = measure(args)
    envs = f"{args.n_envs} {args.vec_env} environments" if args.n_envs > 1 else "1 environment"
    print(f"{args.env}, {envs}, {processor(args.device)}, {args.threads} threads")
    for cost in args.only:
        having, without = (seconds[name] for name in COSTS[cost])
        for column, clock in enumerate(("wall clock", "processor")):
            low, median, high = quartiles(having[:, column] / without[:, column])
            whole = having[:, column].sum() / without[:, column].sum()
            print(f"{cost}, {clock}: {median:.3f} [{low:.3f}, {high:.3f}] of a slice, {whole:.3f} of all")


if __name__ == "__main__":
    main()
