"""
What the guard costs: gradient steps and steps of ``learn()`` with it and without it, in interleaved pairs.

    python benchmarks/guard_cost.py --task HalfCheetah-v5

The ratio of the times is 1.01 at most. Without the guard nothing looks at observations, rewards, actions, losses, gradients
and parameters, on the way that ``execution="compiled"`` takes.
"""

import argparse
import time
from unittest import mock

import numpy as np
import torch as th

from sb3_softvalue import SACV, update


class Unguarded(SACV):
    """SACV in which nothing is looked at."""

    def _remember_statistics(self) -> None:
        pass

    def _check_step(self, *args: object, **kwargs: object) -> None:
        pass

    def _check_parameters(self) -> None:
        pass

    def _gate(self, *args: object) -> None:
        pass


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description="Measure the cost of the guard.")
    parser.add_argument("--task", default="HalfCheetah-v5")
    parser.add_argument("--steps", type=int, default=50, help="of each measurement")
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    th.set_num_threads(options.threads)
    models = [
        algorithm("MlpPolicy", options.task, seed=0, learning_starts=1000, execution="compiled")
        for algorithm in (Unguarded, SACV)
    ]
    # The compiled update is the same code in both, but for the flag: traced at the first update
    with mock.patch.object(update, "not_finite", lambda metrics, gradients, params: th.zeros(())):
        models[0].learn(1010)
    models[1].learn(1010)
    measurements = {
        "updates": lambda model: model.train(options.steps, batch_size=model.batch_size),
        "learn()": lambda model: model.learn(options.steps, reset_num_timesteps=False),
    }
    for name, measure in measurements.items():
        seconds = np.zeros((options.pairs + 1, 2))
        for pair in range(options.pairs + 1):
            for index in (0, 1) if pair % 2 == 0 else (1, 0):
                start = time.perf_counter()
                measure(models[index])
                seconds[pair, index] = time.perf_counter() - start
        # The first pair is the warm-up
        ratios = seconds[1:, 1] / seconds[1:, 0]
        low, median, high = np.quantile(ratios, [0.25, 0.5, 0.75])
        print(f"{options.task}, {name}: with / without {median:.4f} (quartiles {low:.4f} to {high:.4f}), {len(ratios)} pairs")


if __name__ == "__main__":
    main()
