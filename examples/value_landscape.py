"""
Watch V(s) grow over the state space of Pendulum-v1, angle × velocity, with the policy's torque as arrows.

    python examples/value_landscape.py

Trains in three parts and writes one picture after each to runs/value_landscape.
"""

import argparse
import pathlib
from collections.abc import Sequence

import numpy as np

from sb3_softvalue import SACV
from sb3_softvalue.diagnostics import SoftValueDiagnostics
from sb3_softvalue.figures import value_landscape

UPRIGHT, HANGING = np.array([[1.0, 0.0, 0.0], [-1.0, 0.0, 0.0]], dtype=np.float32)  # cos, sin, angular velocity (rad/s)


def main(argv: Sequence[str] | None = None) -> list[pathlib.Path]:
    """Train and draw."""
    parser = argparse.ArgumentParser(description="Draw V(s) over the states of Pendulum-v1 as it is learned.")
    parser.add_argument("--timesteps", type=int, default=9000, help="steps of training (default: %(default)s)")
    parser.add_argument(
        "--folder", type=pathlib.Path, default=pathlib.Path("runs/value_landscape"), help="(default: %(default)s)"
    )
    options = parser.parse_args(argv)

    model = SACV("MlpPolicy", "Pendulum-v1", learning_rate=1e-3, policy_kwargs={"net_arch": [64, 64]}, seed=0)
    diagnostics = SoftValueDiagnostics(options.folder)
    pictures = []
    for _ in range(3):
        model.learn(options.timesteps // 3, callback=diagnostics, reset_num_timesteps=False, progress_bar=True)
        pictures.append(options.folder / f"after_{model.num_timesteps}_steps.png")
        value_landscape(diagnostics.recording()).savefig(pictures[-1])
        upright, hanging = model.predict_values(np.stack([UPRIGHT, HANGING]))
        print(f"After {model.num_timesteps} steps V is {upright:.1f} upright and {hanging:.1f} hanging: {pictures[-1]}")
    return pictures


if __name__ == "__main__":
    main()
