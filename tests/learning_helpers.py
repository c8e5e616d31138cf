"""Rows and files of the benchmark of learning."""

import json
import pathlib

ROOT = pathlib.Path(__file__).parents[1]


def evaluation(algorithm: str, seed: int, timesteps: int, mean_reward: float, minutes: float = 1.0) -> dict:
    """:return: a row of a CSV"""
    row = {"task": "small", "algorithm": algorithm, "seed": seed, "timesteps": timesteps, "mean_reward": mean_reward}
    return row | {"std_reward": 0.0, "episode_length": 1.0, "seconds": 60 * minutes, "cpu_seconds": 60 * minutes}


def write_json(folder: pathlib.Path, task: str, steps: int, evaluate_every: int, **more) -> None:
    """The JSON beside a CSV."""
    metadata = {"versions": {}, "algorithms": {}, "sweeps": [], "steps": steps, "evaluate_every": evaluate_every}
    (folder / f"{task}.json").write_text(json.dumps(metadata | more))


def without_times(path: pathlib.Path) -> list[list[str]]:
    """:return: the cells of a CSV that are the same each time"""
    return [line.split(",")[:-2] for line in path.read_text().splitlines()]
