"""
What checkpoints cost: their share of ``learn()``, and seconds and bytes beside SB3's files, at several sizes of the buffer.

    python benchmarks/checkpoint_cost.py --task HalfCheetah-v5

For each size the buffer is filled with random transitions; written is a first checkpoint, then in turns some steps of
``learn()`` and a checkpoint of what came since. The share is that of one checkpoint every 10,000 steps.
"""

import argparse
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable

import numpy as np
import torch as th

from sb3_softvalue import SACV

EVERY = 10_000


def fill(model: SACV, size: int) -> None:
    """Random transitions in the buffer's first rows."""
    rng = np.random.default_rng(0)
    buffer = model.replay_buffer
    assert buffer is not None
    for array in (buffer.observations, buffer.next_observations, buffer.rewards):
        array[:size] = rng.normal(size=(size, *array.shape[1:]))
    buffer.actions[:size] = rng.uniform(-1, 1, size=(size, *buffer.actions.shape[1:]))
    buffer.pos, buffer.full = size % buffer.buffer_size, size == buffer.buffer_size


def seconds(call: Callable[[], object]) -> float:
    """:return: that a call takes"""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def inodes(folder: pathlib.Path) -> dict[int, int]:
    """:return: size of each file, those that two checkpoints share once"""
    return {path.stat().st_ino: path.stat().st_size for path in folder.rglob("*") if path.is_file()}


def measure(options: argparse.Namespace, size: int, folder: pathlib.Path) -> None:
    """
    Print one line for a size of the buffer.

    :param options: of the command line
    :param size: transitions in the buffer
    :param folder: to write to
    """
    model = SACV("MlpPolicy", options.task, seed=0, execution="compiled", learning_starts=10)
    # Compiles, and makes the optimizers' state
    model.learn(50)
    fill(model, size)
    run = folder / "run"
    first = seconds(lambda: model.save_checkpoint(run))
    before = inodes(run)
    first_bytes = sum(before.values())
    learns, saves, added = [], [], []
    for _ in range(options.turns):
        learns.append(seconds(lambda: model.learn(options.steps, reset_num_timesteps=False)))
        saves.append(seconds(lambda: model.save_checkpoint(run)))
        after = inodes(run)
        added.append(sum(bytes_ for inode, bytes_ in after.items() if inode not in before))
        before = after
    theirs = seconds(lambda: (model.save(folder / "model"), model.save_replay_buffer(folder / "buffer")))
    their_bytes = sum((folder / name).stat().st_size for name in ("model.zip", "buffer.pkl"))
    share = statistics.median(save / (save + learn * EVERY / options.steps) for save, learn in zip(saves, learns, strict=True))
    print(
        f"{size:,} transitions: first {first:.2f} s, {first_bytes / 1e6:.0f} MB; later {statistics.median(saves):.2f} s, "
        f"{statistics.median(added) / 1e6:.0f} MB; SB3's files {theirs:.2f} s, {their_bytes / 1e6:.0f} MB; "
        f"one every {EVERY:,} steps is {100 * share:.2f} % of learn()",
        flush=True,
    )


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description="Measure the cost of checkpoints.")
    parser.add_argument("--task", default="HalfCheetah-v5")
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000, 1_000_000], help="transitions")
    parser.add_argument("--steps", type=int, default=500, help="of learn() between two checkpoints")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    th.set_num_threads(options.threads)
    for size in options.sizes:
        with tempfile.TemporaryDirectory() as folder:
            measure(options, size, pathlib.Path(folder))


if __name__ == "__main__":
    main()
