"""
What happens to a policy when a SAC continues as a SACV: its return at the conversion and over the steps after it.

    python -m benchmarks.studies.from_sac --fit 0 1000 5000

Trains SB3's SAC on Pendulum-v1, converts it and learns on, evaluating the deterministic policy on the same initial states
each time. Prints a table and writes it into benchmarks/results/studies/. ``--models`` keeps the SACs between runs.
"""

import argparse
import csv
import itertools
import pathlib
import tempfile
import time
import warnings
from typing import Any

import numpy as np
import torch as th
from stable_baselines3 import SAC
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

from sb3_softvalue import SACV

TASK = "Pendulum-v1"
RESULTS = pathlib.Path(__file__).parents[1] / "results" / "studies" / "from_sac.csv"
COLUMNS = ("buffer", "collect_steps", "fit_value_steps", "seed", "fit_seconds", "before", "at_once", "worst", "last")


def trained_sac(folder: pathlib.Path, seed: int, steps: int) -> None:
    """Train a SAC, unless the folder has it."""
    if not (folder / f"sac-{seed}.zip").is_file():
        model = SAC("MlpPolicy", TASK, learning_rate=1e-3, seed=seed, device="cpu", buffer_size=steps + 3_000).learn(steps)
        model.save(folder / f"sac-{seed}")
        model.save_replay_buffer(folder / f"sac-{seed}-replay")


def mean_return(model: SAC, episodes: int) -> float:
    """Of the deterministic policy, from the same initial states at each call."""
    env = make_vec_env(TASK, n_envs=episodes, seed=1_000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        returns, _ = evaluate_policy(model, env, n_eval_episodes=episodes, deterministic=True, return_episode_rewards=True)
    env.close()
    return float(np.mean(returns))


def converted(
    options: argparse.Namespace, folder: pathlib.Path, seed: int, buffer: str, collect: int, fit: int
) -> dict[str, Any]:
    """One conversion and what follows; a fit of -1 means that SAC itself learns on."""
    zip_path, replay = folder / f"sac-{seed}", folder / f"sac-{seed}-replay"
    sac = SAC.load(zip_path, env=make_vec_env(TASK, seed=seed), device="cpu")
    before = mean_return(sac, options.episodes)
    start = time.perf_counter()
    model: SAC
    if fit < 0:
        model = sac
        if buffer == "kept":
            model.load_replay_buffer(replay)
    else:
        given: dict[str, Any] = {"replay_buffer": replay} if buffer == "kept" else {"collect_steps": collect}
        model = SACV.from_sac(zip_path, make_vec_env(TASK, seed=seed), fit_value_steps=fit, device="cpu", **given)
    seconds = time.perf_counter() - start
    returns = [mean_return(model, options.episodes)]
    for _ in range(options.steps // options.every):
        model.learn(options.every, reset_num_timesteps=False)
        returns.append(mean_return(model, options.episodes))
    values = (buffer, collect, fit, seed, seconds, before, returns[0], min(returns[1:]), returns[-1])
    return dict(zip(COLUMNS, values, strict=True))


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.studies.from_sac", description="Measure how a SAC continues as a SACV."
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(5)))
    parser.add_argument("--fit", type=int, nargs="+", default=[-1, 0, 1_000, 5_000], help="-1: SB3's SAC learns on itself")
    parser.add_argument("--buffers", nargs="+", choices=("kept", "none"), default=["kept", "none"])
    parser.add_argument("--collect", type=int, nargs="+", default=[1_000, 5_000], help="transitions, without a buffer")
    parser.add_argument("--trained", type=int, default=10_000, help="steps of the SAC")
    parser.add_argument("--steps", type=int, default=3_000, help="after the conversion")
    parser.add_argument("--every", type=int, default=250, help="steps between evaluations")
    parser.add_argument("--episodes", type=int, default=20, help="of each evaluation")
    parser.add_argument("--models", type=pathlib.Path, help="folder that keeps the SACs")
    parser.add_argument("--output", type=pathlib.Path, default=RESULTS)
    options = parser.parse_args()
    th.set_num_threads(1)

    with tempfile.TemporaryDirectory() as temporary:
        folder = options.models or pathlib.Path(temporary)
        rows = []
        print("".join(f"{name:>16}" for name in COLUMNS))
        for seed, buffer, fit, collect in itertools.product(options.seeds, options.buffers, options.fit, options.collect):
            if buffer == "kept" or fit < 0:  # nothing is collected
                if collect != options.collect[0]:
                    continue
                collect = 0
            trained_sac(folder, seed, options.trained)
            row = converted(options, folder, seed, buffer, collect, fit)
            rows.append(row)
            print(
                "".join(f"{value:16.1f}" if isinstance(value, float) else f"{value:>16}" for value in row.values()), flush=True
            )
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with open(options.output, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({name: round(value, 1) if isinstance(value, float) else value for name, value in row.items()})


if __name__ == "__main__":
    main()
