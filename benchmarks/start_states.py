"""
Does it help to start training episodes where V is low? V picks start states on Pendulum-v1.

    python benchmarks/start_states.py

Three trainings with the same seed: every episode from the environment's own starts, or half of the episodes from states that
were visited before, drawn at random or by V (the lower its rank, the likelier). All are evaluated alike, the deterministic
policy from the environment's own starts. The arm at random says what is due to V and what to other starts alone.
Prints the paired differences and writes all returns to benchmarks/results/value_uses/start_states.csv.
"""

import argparse
import csv
import pathlib
from collections import deque
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th

from sb3_softvalue import SACV

TASK = "Pendulum-v1"
RESULTS = pathlib.Path(__file__).parent / "results" / "value_uses" / "start_states.csv"
OWN, RANDOM, BY_V = "own starts", "visited states at random", "visited states by V"


class StartStates(gym.Wrapper):
    """Half of the episodes start from a state that was visited before."""

    def __init__(self, env: gym.Env, arm: str, seed: int, share: float = 0.5, candidates: int = 1000) -> None:
        """
        :param env: Pendulum-v1
        :param arm: where the other episodes start
        :param seed: of the draws
        :param share: of the episodes that start from a visited state
        :param candidates: number of the last visited states to draw from
        """
        super().__init__(env)
        self.arm, self.share = arm, share
        self.generator = np.random.default_rng(seed)
        self.visited: deque[tuple[np.ndarray, np.ndarray]] = deque(maxlen=candidates)
        self.model: SACV | None = None

    def reset(self, **options: Any) -> tuple[np.ndarray, dict[str, Any]]:
        """:return: the first observation, and what the environment says of it"""
        observation, info = self.env.reset(**options)
        if self.arm == OWN or self.model is None or not self.visited or self.generator.random() >= self.share:
            return observation, info
        states, observations = (np.stack(part) for part in zip(*self.visited, strict=True))
        chosen = int(self.generator.choice(len(states), p=self.weights(observations)))
        self.unwrapped.state = states[chosen].copy()  # type: ignore[attr-defined]  # of this task's own environment
        return observations[chosen].copy(), info

    def weights(self, observations: np.ndarray) -> np.ndarray:
        """
        :param observations: of the visited states, shape (n, 3)
        :return: how likely each is drawn: falls linearly with V's rank from the lowest V to 0 beyond the highest, shape (n,)
        """
        n = len(observations)
        if self.arm == RANDOM:
            return np.full(n, 1.0 / n)
        assert self.model is not None
        ranks = self.model.predict_values(observations).argsort().argsort()
        return (n - ranks) / (n * (n + 1) / 2)

    def step(self, action: Any) -> tuple[Any, ...]:
        """:return: as the environment's"""
        result = self.env.step(action)
        self.visited.append((self.unwrapped.state.copy(), result[0]))  # type: ignore[attr-defined]  # of this task's own environment
        return result


def evaluate(model: SACV, episodes: int) -> float:
    """:return: mean return from the environment's own starts, the same at each call"""
    envs = [gym.make(TASK) for _ in range(episodes)]
    observations = np.stack([env.reset(seed=1000 + i)[0] for i, env in enumerate(envs)])
    returns = 0.0
    for _ in range(200):
        actions, _ = model.predict(observations, deterministic=True)
        steps = [env.step(action) for env, action in zip(envs, actions, strict=True)]
        observations = np.stack([step[0] for step in steps])
        returns += float(np.mean([step[1] for step in steps]))
    return returns


def train(arm: str, seed: int, checkpoints: list[int], episodes: int) -> list[float]:
    """:return: mean return at each checkpoint"""
    env = StartStates(gym.make(TASK), arm, seed)
    model = SACV("MlpPolicy", env, learning_rate=1e-3, policy_kwargs={"net_arch": [64, 64]}, seed=seed, device="cpu")
    env.model = model
    returns = []
    for checkpoint in checkpoints:
        model.learn(checkpoint - model.num_timesteps, reset_num_timesteps=False)
        returns.append(evaluate(model, episodes))
    return returns


def interval(values: np.ndarray) -> tuple[float, float, float]:
    """
    :param values: of each seed, shape (n,)
    :return: mean and the ends of the 95 % interval of Student's t
    """
    from scipy import stats

    half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return float(values.mean()), float(values.mean() - half), float(values.mean() + half)


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description="Train from start states picked by V, and from the environment's own.")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--checkpoints", type=int, nargs="+", default=[2000, 3000, 4000, 6000, 8000])
    parser.add_argument("--episodes", type=int, default=50, help="of each evaluation")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    options = parser.parse_args()
    th.set_num_threads(1)  # networks this small are no faster on several

    options.out.parent.mkdir(parents=True, exist_ok=True)
    returns: dict[str, list[list[float]]] = {arm: [] for arm in (OWN, RANDOM, BY_V)}
    with open(options.out, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("seed", "arm", "timesteps", "return"))
        for seed in range(options.seeds):
            for arm, seeds in returns.items():
                seeds.append(train(arm, seed, options.checkpoints, options.episodes))
                rows = zip(options.checkpoints, seeds[-1], strict=True)
                writer.writerows((seed, arm, steps, f"{value:.1f}") for steps, value in rows)
                file.flush()
                print(f"seed {seed}, {arm}: {' '.join(f'{value:.0f}' for value in seeds[-1])}", flush=True)
    for arm, minus in ((OWN, None), (RANDOM, None), (BY_V, None), (BY_V, OWN), (BY_V, RANDOM), (RANDOM, OWN)):
        values = np.array(returns[arm]) - (np.array(returns[minus]) if minus else 0.0)
        cells = ["{:.0f} [{:.0f}, {:.0f}]".format(*interval(column)) for column in values.T]
        print(f"{arm}{f' minus {minus}' if minus else ''}: {', '.join(cells)}")


if __name__ == "__main__":
    main()
