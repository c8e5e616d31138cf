"""
What ``SoftValueDiagnostics`` costs: the same run with and without it, in interleaved pairs.

    python benchmarks/diagnostics_cost.py --task HalfCheetah-v5

Prints the ratio of the times that ``learn()`` takes, 1.05 at most. The processor's time is told beside the wall clock's
because other programs on the machine disturb it less (on a GPU only the wall clock counts).
"""

import argparse
import tempfile
import time

import numpy as np
import torch as th

from sb3_softvalue import SACV
from sb3_softvalue.diagnostics import SoftValueDiagnostics


class Timed(SoftValueDiagnostics):
    """Counts the processor's time spent in it."""

    seconds = 0.0

    def _on_step(self) -> bool:
        start = time.process_time()
        proceed = super()._on_step()
        self.seconds += time.process_time() - start
        return proceed

    def _on_training_end(self) -> None:
        start = time.process_time()
        super()._on_training_end()
        self.seconds += time.process_time() - start


def timed_learn(model: SACV, steps: int, callback: SoftValueDiagnostics | None) -> tuple[float, float]:
    """Learn on; return the seconds it took by the wall clock and of the processor."""
    start, cpu_start = time.perf_counter(), time.process_time()
    model.learn(steps, callback=callback, reset_num_timesteps=False)
    if model.device.type == "cuda":
        th.cuda.synchronize()
    return time.perf_counter() - start, time.process_time() - cpu_start


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description="Measure the cost of SoftValueDiagnostics.")
    parser.add_argument("--task", default="HalfCheetah-v5")
    parser.add_argument("--steps", type=int, default=1000, help="of each measurement; whole episodes, so that each ends")
    parser.add_argument("--pairs", type=int, default=6)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    th.set_num_threads(options.threads)

    with tempfile.TemporaryDirectory() as folder:
        models = [SACV("MlpPolicy", options.task, seed=0) for _ in range(2)]
        diagnostics = Timed(folder)
        callbacks = [None, diagnostics]
        seconds = np.zeros((options.pairs, 2, 2))
        for model, callback in zip(models, callbacks, strict=True):
            timed_learn(model, options.steps, callback)  # warm-up
        diagnostics.seconds = 0.0
        for pair in range(options.pairs):
            for index in (0, 1) if pair % 2 == 0 else (1, 0):
                seconds[pair, index] = timed_learn(models[index], options.steps, callbacks[index])
            wall, cpu = seconds[pair, 1] / seconds[pair, 0]
            speed = options.steps / seconds[pair, 0, 0]
            print(f"pair {pair}: wall {wall:.3f}, processor {cpu:.3f} ({speed:.0f} steps/s without)", flush=True)
    wall, cpu = np.median(seconds[:, 1] / seconds[:, 0], axis=0)
    share = diagnostics.seconds / seconds[:, 1, 1].sum()
    print(f"{options.task}, with / without, median of {options.pairs} pairs: wall {wall:.3f}, processor {cpu:.3f}")
    print(f"Share of the processor's time of learn() that is spent in the callback: {share:.2%}")


if __name__ == "__main__":
    main()
