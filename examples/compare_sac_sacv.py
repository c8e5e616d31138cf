"""
SB3's SAC and SACV side by side: same task, hyper-parameters, seeds and evaluation episodes.

    python examples/compare_sac_sacv.py --task Pendulum-v1 --seeds 3

Writes the learning curves to runs/compare_sac_sacv and prints the last evaluations. Few seeds tell little: run at least ten
before you conclude that one is better.
"""

import argparse
import pathlib
import time
from collections.abc import Sequence

import numpy as np
from stable_baselines3 import SAC
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.env_util import make_vec_env

from sb3_softvalue import SACV
from sb3_softvalue.figures import BLUE, ORANGE, draw_curves, new_figure


def learn(
    algorithm: type[SAC], task: str, timesteps: int, episodes: int, seed: int, folder: pathlib.Path
) -> tuple[np.ndarray, np.ndarray]:
    """Train one seed; return the time steps of its ten evaluations and the mean return of each."""
    model = algorithm("MlpPolicy", task, learning_rate=1e-3, policy_kwargs={"net_arch": [64, 64]}, seed=seed)
    evaluation = EvalCallback(
        make_vec_env(task, seed=seed + 1000),
        n_eval_episodes=episodes,
        eval_freq=timesteps // 10,
        log_path=str(folder),
        verbose=0,
    )
    model.learn(timesteps, callback=evaluation)
    with np.load(folder / "evaluations.npz") as evaluations:
        return evaluations["timesteps"], evaluations["results"].mean(axis=1)


def main(argv: Sequence[str] | None = None) -> pathlib.Path:
    """Train both on each seed, print and draw."""
    parser = argparse.ArgumentParser(description="Compare SB3's SAC with SACV.")
    parser.add_argument("--task", default="Pendulum-v1", help="(default: %(default)s)")
    parser.add_argument("--timesteps", type=int, default=8000, help="steps of training (default: %(default)s)")
    parser.add_argument("--episodes", type=int, default=10, help="of each evaluation (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds (default: %(default)s)")
    parser.add_argument(
        "--folder", type=pathlib.Path, default=pathlib.Path("runs/compare_sac_sacv"), help="(default: %(default)s)"
    )
    options = parser.parse_args(argv)

    figure, grid = new_figure(f"SAC and SACV on {options.task}")
    axes = grid[0, 0]
    for algorithm, color in ((SAC, ORANGE), (SACV, BLUE)):
        name, start = algorithm.__name__, time.perf_counter()
        curves = [
            learn(algorithm, options.task, options.timesteps, options.episodes, seed, options.folder / f"{name}_{seed}")
            for seed in range(options.seeds)
        ]
        seconds = (time.perf_counter() - start) / options.seeds
        last = ", ".join(f"{returns[-3:].mean():.1f}" for _, returns in curves)
        print(f"{name}: mean return of the last three evaluations, each seed: {last}; {seconds:.0f} s a seed")
        draw_curves(axes, curves, color, name, smooth=False)
    axes.set(xlabel="time steps", ylabel="return of the deterministic policy\n(mean over the episodes of an evaluation)")
    axes.legend(frameon=False)
    picture = options.folder / "learning_curves.png"
    figure.savefig(picture)
    print(f"Look at {picture}")
    return picture


if __name__ == "__main__":
    main()
