"""
What ``ResumableCheckpoint`` costs: the same run with and without it, in interleaved pairs.

    python benchmarks/checkpoint_cost.py --task HalfCheetah-v5
"""

import argparse
import tempfile
import time

import numpy as np
import torch as th

from sb3_softvalue import SACV
from sb3_softvalue.checkpoint import ResumableCheckpoint


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description="Measure the cost of ResumableCheckpoint.")
    parser.add_argument("--task", default="HalfCheetah-v5")
    parser.add_argument("--steps", type=int, default=10_000, help="of each measurement, with one checkpoint at its end")
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    th.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        models = [SACV("MlpPolicy", options.task, seed=0) for _ in range(2)]
        # Saves at the end of learn()
        callbacks = [None, ResumableCheckpoint(folder, 10 * options.steps)]
        seconds = np.zeros((options.pairs + 1, 2))
        for pair in range(options.pairs + 1):
            for index in (0, 1) if pair % 2 == 0 else (1, 0):
                start = time.perf_counter()
                models[index].learn(options.steps, callbacks[index], reset_num_timesteps=False)
                seconds[pair, index] = time.perf_counter() - start
            print(f"pair {pair}: with / without {seconds[pair, 1] / seconds[pair, 0]:.4f}", flush=True)
    # The first pair is the warm-up
    ratio = np.median(seconds[1:, 1] / seconds[1:, 0])
    print(f"{options.task}, a checkpoint every {options.steps} steps, median of {options.pairs} pairs: {ratio:.4f}")


if __name__ == "__main__":
    main()
