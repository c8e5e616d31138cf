"""
Train SACV on a task, test it, and look at what it learned:

    python examples/pendulum.py            # train, then test
    python examples/pendulum.py --test     # test the model that was trained before

Everything is written to runs/pendulum: the model, the recording, a film of the trained pendulum with V(s) beneath it,
and report/index.html with the film, the learning curve and all other figures.
"""

import argparse
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import torch as th
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

from sb3_softvalue import SACV
from sb3_softvalue.diagnostics import Recording, SoftValueDiagnostics, evaluate_values
from sb3_softvalue.figures import numbers, report, save_gif

# Without a display, pygame draws into memory and need not look for one
if sys.platform.startswith("linux") and not os.environ.get("DISPLAY"):
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
# How the task is made for filming; empty for no film
FILM = {"render_mode": "rgb_array"}


def train(task: str, folder: pathlib.Path, timesteps: int, seed: int, gradient_steps: int) -> None:
    """Train on the task and save the model."""
    print(f"Training SACV on {task} for {timesteps} steps; everything goes to {folder}")
    th.set_num_threads(1)  # networks this small are no faster on several
    model = SACV(
        "MlpPolicy",
        task,
        learning_rate=1e-3,
        gradient_steps=gradient_steps,
        policy_kwargs={"net_arch": [64, 64]},
        seed=seed,
    )
    # One line for all the figures: it records the episodes, their entropy, their actions and V(s)
    model.learn(timesteps, callback=SoftValueDiagnostics(folder), progress_bar=True)
    model.save(folder / "model")


def test(task: str, folder: pathlib.Path, episodes: int, seed: int, film: dict[str, Any]) -> float:
    """Test the saved model, compare V(s) with the returns collected, film and draw."""
    model = SACV.load(folder / "model")
    mean, std = evaluate_policy(model, make_vec_env(task, seed=seed + 1000), n_eval_episodes=episodes)
    print(f"Return over {episodes} episodes: {mean:.1f} ± {std:.1f}")

    calibration = evaluate_values(model, gym.make(task), n_episodes=episodes, seed=seed + 2000)
    calibration.save(folder)
    print(calibration)

    if film:
        save_gif(model, gym.make(task, **film), folder / "trained.gif", seed=seed)
    page = report(folder, film=folder / "trained.gif" if film else None)
    recording = Recording.load(folder)
    for name, value in numbers(recording, [calibration]).items():
        print(f"{name}: {value}")
    print(f"Model, recording{', film' if film else ''} and figures are in {folder}. Open the report in a browser:")
    print(f"  python -m webbrowser -t {page.resolve().as_uri()}")
    return mean


def main(
    argv: Sequence[str] | None = None,
    task: str = "Pendulum-v1",
    timesteps: int = 10_000,
    gradient_steps: int = 1,
    film: dict[str, Any] = FILM,
) -> float | None:
    """Read the options, train and test."""
    name = task.split("-")[0].lower()
    parser = argparse.ArgumentParser(description=f"Train and test SACV on {task}.")
    parser.add_argument("--train", action="store_true", help="only train")
    parser.add_argument("--test", action="store_true", help="only test the model trained before")
    parser.add_argument("--timesteps", type=int, default=timesteps, help="steps of training (default: %(default)s)")
    parser.add_argument("--episodes", type=int, default=20, help="episodes of testing (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of training and tests (default: %(default)s)")
    parser.add_argument(
        "--folder", type=pathlib.Path, default=pathlib.Path("runs") / name, help="to write to (default: %(default)s)"
    )
    options = parser.parse_args(argv)
    if options.train or not options.test:
        train(task, options.folder, options.timesteps, options.seed, gradient_steps)
    if options.test or not options.train:
        return test(task, options.folder, options.episodes, options.seed, film)
    return None


if __name__ == "__main__":
    main()
