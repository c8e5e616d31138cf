"""
The two-joint arm of Reacher-v5 (MuJoCo), trained on four times the episodes that pendulum.py takes, by the same program:

    python examples/reacher.py --train
    python examples/reacher.py --test

An episode has 50 steps here, a quarter of the pendulum's: four times the episodes are the same number of steps, and each is
used for four gradient steps instead of one. Everything is written to runs/reacher.
"""

import ctypes.util
import os
import sys
from collections.abc import Sequence

# Without a display MuJoCo renders off-screen through EGL. It reads this variable when it is imported.
if sys.platform.startswith("linux") and not os.environ.get("DISPLAY"):
    os.environ.setdefault("MUJOCO_GL", "egl" if ctypes.util.find_library("EGL") else "disabled")

import pendulum

# Look straight down at the arm, from 0.8 m
CAMERA = {"default_camera_config": {"distance": 0.8, "elevation": -75.0, "azimuth": 90.0}}


def can_film() -> bool:
    """Whether MuJoCo can render here; say what is missing if not."""
    possible = os.environ.get("MUJOCO_GL") != "disabled"
    if not possible:
        print("There will be no film: MuJoCo needs a display or the EGL library (on Debian and Ubuntu the package libegl1).")
    return possible


def main(argv: Sequence[str] | None = None) -> float | None:
    """Read the options, train and test."""
    return pendulum.main(
        argv, task="Reacher-v5", timesteps=10_000, gradient_steps=4, film=pendulum.FILM | CAMERA if can_film() else {}
    )


if __name__ == "__main__":
    main()
