"""Rows and files of the benchmark of learning."""

import json
import pathlib


def evaluation(algorithm: str, seed: int, timesteps: int, mean_reward: float, minutes: float = 1.0) -> dict:
    """:return: a row of a CSV"""
    row = {"task": "small", "algorithm": algorithm, "seed": seed, "timesteps": timesteps, "mean_reward": mean_reward}
    return row | {"std_reward": 0.0, "episode_length": 1.0, "seconds": 60 * minutes, "cpu_seconds": 60 * minutes}


def write_about(folder: pathlib.Path, task: str, steps: int, evaluate_every: int, **more) -> None:
    """The JSON beside a CSV."""
    about = {"versions": {}, "algorithms": {}, "sweeps": [], "steps": steps, "evaluate_every": evaluate_every}
    (folder / f"{task}.json").write_text(json.dumps(about | more))
