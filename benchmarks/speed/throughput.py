"""How fast SACV is against what one would use instead, as ratios of one interleaved run.

    python -m benchmarks.speed.throughput --threads 2

Each contender runs in a process of its own and they take turns in short pieces of work, so that whatever else the machine
does hits all of them. Given are medians over the turns: of the ratio to SB3's SAC in the same turn, and of the share of the
floor, which is the speed that the float32 matrix products of an update have by themselves on the same processor, in the faster
of the two libraries that PyTorch has. The share carries over to other processors, the ratio does not; absolute times belong to
one machine and one hour. Results go to benchmarks/results/speed/ as CSV and PNG, those of several processors side by side.
"""

import argparse
import pathlib
import statistics
import subprocess
import sys
from typing import Any

from tqdm import tqdm

from benchmarks.common.command_line import Help
from benchmarks.common.machine import multiplies_bfloat16, processor
from benchmarks.speed.contender import ROOT, Contender
from benchmarks.speed.results import draw, merge

MIXED = ("sacv-mixed",) if multiplies_bfloat16() else ()
UPDATE_CONTENDERS = {
    "cpu": ("sac", "tqc", "sacv-eager", "sacv-compiled", *MIXED),
    "cuda": ("sac", "tqc", "sacv-eager", "sacv-cuda_graph", "sacv-compiled"),
}
LEARN_CONTENDERS = {"cpu": ("sac", "sacv-eager", "sacv-auto", *MIXED), "cuda": ("sac", "sacv-eager", "sacv-auto")}
# Those of which the first update prepares something
PREPARED = ("sacv-compiled", "sacv-mixed", "sacv-cuda_graph")
# Of SB3's SAC in one turn, the others do as many updates: so long that the first updates of a turn, which find the caches
# full of another process's data, do not count for much
SECONDS_PER_TURN = 0.8


def start(args: argparse.Namespace, work: str, algo: str = "", **settings: Any) -> Contender:
    """
    :param args: of the command line
    :param work: "updates", "learn" or "products"
    :param algo: which contender
    :param settings: instead of those of the command line
    :return: its process
    """
    names = ("env", "device", "threads", "n_envs", "timesteps", "slices", "train_freq", "gradient_steps")
    settings = (
        {name: getattr(args, name) for name in names} | {"batch_size": args.batch_size[0], "width": args.width[0]} | settings
    )
    return Contender(work, algo, settings, args.sbx_python if algo == "sbx" else sys.executable)


def products_per_update(width: int, obs_dim: int, action_dim: int) -> float:
    """
    Arithmetic that one update of SACV with two hidden layers and two critics cannot avoid, in units of one product of
    (batch, width) with (width, width): forward passes of actor, V, V̄ and twice both critics, and backward passes to the
    weights (actor, V, critics) and to the inputs (hidden layers; the actions of the critics in the policy loss).
    """
    forward = (obs_dim + width + 2 * action_dim) + 2 * (obs_dim + width + 1) + 4 * (obs_dim + action_dim + width + 1)
    to_weights = (obs_dim + width + 2 * action_dim) + (obs_dim + width + 1) + 2 * (obs_dim + action_dim + width + 1)
    to_inputs = (width + 2 * action_dim) + (width + 1) + 2 * (width + 1) + 2 * (1 + width + action_dim)
    return (forward + to_weights + to_inputs) / width


def measure_updates(args: argparse.Namespace, batch_size: int, width: int) -> list[dict[str, Any]]:
    """
    Updates per second through ``model.train()``: sampling, learned temperature and logging included.

    :return: one row for each contender
    """
    contenders = UPDATE_CONTENDERS[args.device]
    workers, first_calls = [], []
    for algo in contenders:
        workers.append(start(args, "updates", algo, batch_size=batch_size, width=width))
        first_calls.append(workers[-1].read()["first_call"])  # before the next one starts, which would slow it down
    floor = start(args, "products", batch_size=batch_size, width=width)
    floor.read()
    dims = floor.ask("dimensions")
    n_products = products_per_update(width, dims["obs_dim"], dims["action_dim"])
    for worker in workers:
        worker.seconds_each(4)
    n_updates = max(4, round(SECONDS_PER_TURN / workers[0].seconds_each(4)))
    turns: list[list[float]] = []
    floors: list[float] = []
    for turn in tqdm(range(args.turns + 2), desc=f"updates, batch {batch_size}, width {width}", leave=False):
        seconds = [worker.seconds_each(n_updates) for worker in workers]
        product = floor.seconds_each(round(n_updates * n_products))
        if turn >= 2:  # the first turns warm caches and clocks
            turns.append(seconds)
            floors.append(product)
    memory = [worker.ask("memory")["peak_mib"] for worker in workers]
    for worker in (*workers, floor):
        worker.end()
    rows = []
    eager = statistics.median(seconds[contenders.index("sacv-eager")] for seconds in turns)
    for i, name in enumerate(contenders):
        times = [seconds[i] for seconds in turns]
        preparation = first_calls[i] - args.gradient_steps * statistics.median(times)
        gain = eager - statistics.median(times)
        rows.append(
            {
                "measure": "updates/s",
                "algorithm": name,
                "batch_size": batch_size,
                "width": width,
                "ratio to SAC": statistics.median(seconds[0] / seconds[i] for seconds in turns),
                "share of GEMM floor": statistics.median(
                    n_products * product / seconds[i] for product, seconds in zip(floors, turns, strict=True)
                ),
                "memory to SAC": memory[i] / memory[0],
                "preparation, s": preparation if name in PREPARED else None,
                "break-even, updates": preparation / gain if name in PREPARED else None,
                "per second": 1 / statistics.median(times),
            }
        )
    return rows


def measure_learn(args: argparse.Namespace) -> list[dict[str, Any]]:
    """
    Environment steps per second of a whole ``learn()``, whatever it prepares or compiles included.

    :return: one row for each contender
    """
    contenders = [*LEARN_CONTENDERS[args.device], *(["sbx"] if args.sbx_python else [])]
    workers = [start(args, "learn", algo) for algo in contenders]
    for worker in workers:
        worker.read()
    turns = [
        [worker.ask("go")["seconds"] for worker in workers]
        for _ in tqdm(range(args.slices), desc=f"learn() of {args.timesteps} steps", leave=False)
    ]
    memory = [worker.ask("go")["peak_mib"] for worker in workers]
    for worker in workers:
        worker.end()
    steady = [statistics.median(seconds[i] for seconds in turns) for i in range(len(workers))]
    # All that is prepared is prepared in the first slice; what makes a later one longer is the machine's other work
    preparations = [max(0.0, first - median) for first, median in zip(turns[0], steady, strict=True)]
    totals = [preparation + args.slices * median for preparation, median in zip(preparations, steady, strict=True)]
    rows = []
    for i, name in enumerate(contenders):
        rows.append(
            {
                "measure": f"learn() of {args.timesteps} steps",
                "algorithm": name,
                "batch_size": args.batch_size[0],
                "width": args.width[0],
                "ratio to SAC": totals[0] / totals[i],
                "ratio to SAC without preparation": statistics.median(seconds[0] / seconds[i] for seconds in turns),
                "ratio to SBX": totals[-1] / totals[i] if args.sbx_python else None,
                "memory to SAC": memory[i] / memory[0],
                "preparation, s": preparations[i],
                "per second": args.timesteps / totals[i],
            }
        )
    return rows


def measure_imports(args: argparse.Namespace) -> list[dict[str, Any]]:
    """:return: one row: time to import sb3_softvalue against stable_baselines3"""
    code = "import time; start = time.perf_counter(); import {}; print(time.perf_counter() - start)"

    def seconds(module: str) -> float:
        return float(subprocess.run([sys.executable, "-c", code.format(module)], capture_output=True, check=True).stdout)

    pairs = [
        (seconds("stable_baselines3"), seconds("sb3_softvalue")) for _ in tqdm(range(args.turns), desc="imports", leave=False)
    ]
    ratio = statistics.median(ours / theirs for theirs, ours in pairs)
    return [{"measure": "import time to stable_baselines3's", "algorithm": "sacv", "ratio": ratio}]


def write(rows: list[dict[str, Any]], args: argparse.Namespace) -> None:
    """Write what was measured so far as CSV and PNG into the results folder."""
    stem, title = f"throughput-{args.device}-{args.threads}-threads", f"{args.env}, {args.device}, threads: {args.threads}"
    if args.gradient_steps > 1:
        stem, title = f"{stem}-{args.gradient_steps}-steps", f"{title}, {args.gradient_steps} gradient steps in a row"
    if len({(row["batch_size"], row["width"]) for row in rows if "width" in row}) > 1:
        stem += "-sizes"
    path = pathlib.Path(args.output) / f"{stem}.csv"
    named = [{"processor": processor(args.device), "threads": args.threads, **row} for row in rows]
    draw(merge(named, path), path.with_suffix(".png"), title)
    print(f"Written: {path}, {path.with_suffix('.png')}")


def report(rows: list[dict[str, Any]], args: argparse.Namespace) -> None:
    """Table on the terminal."""
    print(f"{processor(args.device)}, {args.threads} threads")
    for row in rows:
        cells = [f"{name} {value:.3g}" for name, value in row.items() if isinstance(value, float)]
        setting = f"batch {row['batch_size']}, width {row['width']}" if "width" in row else ""
        print(f"{row['measure']:24s} {row['algorithm']:15s} {setting:24s} " + " · ".join(cells))


def parse() -> argparse.Namespace:
    """:return: the command line's arguments"""
    parser = argparse.ArgumentParser("python -m benchmarks.speed.throughput", description=__doc__, formatter_class=Help)
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="of the networks")
    parser.add_argument("--env", default="HalfCheetah-v5", help="Gymnasium task")
    parser.add_argument(
        "--batch-size", type=int, nargs="+", default=[256], help="several to see how cost grows; learn() takes the first"
    )
    parser.add_argument(
        "--width", type=int, nargs="+", default=[256], help="units of both hidden layers, several as for --batch-size"
    )
    parser.add_argument("--n-envs", type=int, default=1, help="number of environments")
    parser.add_argument("--train-freq", type=int, default=1, help="steps between two calls of train()")
    parser.add_argument("--gradient-steps", type=int, default=1, help="updates of each call of train()")
    parser.add_argument("--turns", type=int, default=25, help="interleaved turns of the update measurement")
    parser.add_argument("--timesteps", type=int, default=20_000, help="of learn(); 0 leaves it out")
    parser.add_argument("--slices", type=int, default=20, help="interleaved slices of learn()")
    parser.add_argument("--sbx-python", help="Python of an environment with sbx-rl, to compare learn() with SBX's SAC")
    parser.add_argument("--output", default=str(ROOT / "benchmarks" / "results" / "speed"), help="folder of the results")
    return parser.parse_args()


def main() -> None:
    args = parse()
    settings = [(batch, args.width[0]) for batch in args.batch_size] + [(args.batch_size[0], w) for w in args.width[1:]]
    rows = [row for batch, width in settings for row in measure_updates(args, batch, width)]
    write(rows, args)
    if args.device == "cpu":
        rows += measure_imports(args)
    if args.timesteps:
        rows += measure_learn(args)
    write(rows, args)
    report(rows, args)


if __name__ == "__main__":
    main()
