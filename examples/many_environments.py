"""
Train on many environments at once: the physics of all pendulums in a few NumPy calls.

    python examples/many_environments.py                                   # 256 pendulums, some seconds
    python examples/many_environments.py --envs 1024 --gradient-steps 32

With n environments each step gives n transitions, and ``gradient_steps`` updates follow it.
"""

import argparse
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecEnv

from sb3_softvalue import SACV

MAX_SPEED, MAX_TORQUE, DT, G = 8.0, 2.0, 0.05, 10.0  # rad/s, N m, s, m/s²; mass and length are 1
EPISODE = 200  # steps
SOLVED = -200.0  # mean return


class Pendulums(VecEnv):
    """
    Gymnasium's Pendulum-v1, many at a time.

    :param num_envs: number of pendulums
    """

    render_mode = None

    def __init__(self, num_envs: int) -> None:
        high = np.array([1.0, 1.0, MAX_SPEED], dtype=np.float32)
        super().__init__(num_envs, spaces.Box(-high, high), spaces.Box(-MAX_TORQUE, MAX_TORQUE, (1,)))
        self.rng = np.random.default_rng()
        self.angle, self.speed = np.zeros(num_envs), np.zeros(num_envs)  # rad, 0 is upright; rad/s
        self.steps = np.zeros(num_envs, dtype=int)

    def reset(self) -> np.ndarray:
        if self._seeds[0] is not None:  # one generator for all pendulums
            self.rng = np.random.default_rng(self._seeds[0])
            self._reset_seeds()
        self._start(np.ones(self.num_envs, dtype=bool))
        return self._observations()

    def step_async(self, actions: np.ndarray) -> None:
        self.torque = np.clip(actions[:, 0], -MAX_TORQUE, MAX_TORQUE)

    def step_wait(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[dict[str, Any]]]:
        from_upright = (self.angle + np.pi) % (2 * np.pi) - np.pi
        costs = from_upright**2 + 0.1 * self.speed**2 + 0.001 * self.torque**2
        speed = self.speed + (3 * G / 2 * np.sin(self.angle) + 3.0 * self.torque) * DT
        self.speed = np.clip(speed, -MAX_SPEED, MAX_SPEED)
        self.angle = self.angle + self.speed * DT
        self.steps += 1

        observations, infos = self._observations(), [{} for _ in range(self.num_envs)]
        ended = self.steps == EPISODE
        if ended.any():
            for index in np.flatnonzero(ended):
                infos[index] = {"TimeLimit.truncated": True, "terminal_observation": observations[index]}
            self._start(ended)
            observations = self._observations()
        return observations, -costs.astype(np.float32), ended, infos

    def _start(self, which: np.ndarray) -> None:
        """Begin an episode where the mask says so."""
        self.angle[which] = self.rng.uniform(-np.pi, np.pi, which.sum())
        self.speed[which] = self.rng.uniform(-1.0, 1.0, which.sum())
        self.steps[which] = 0

    def _observations(self) -> np.ndarray:
        return np.stack([np.cos(self.angle), np.sin(self.angle), self.speed], axis=1).astype(np.float32)

    # Nothing differs between the pendulums but their state
    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        return [getattr(self, attr_name) for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        setattr(self, attr_name, value)

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
        return [getattr(self, method_name)(*args, **kwargs) for _ in self._get_indices(indices)]

    def env_is_wrapped(self, wrapper_class: type[Any], indices: Any = None) -> list[bool]:
        return [False for _ in self._get_indices(indices)]

    def close(self) -> None:
        pass


def evaluate(model: BaseAlgorithm, episodes: int = 100, seed: int = 1000) -> float:
    """Mean return of the deterministic policy over some episodes, all at once."""
    env = Pendulums(episodes)
    env.seed(seed)
    return float(evaluate_policy(model, env, episodes, warn=False)[0])  # warns where there is no Monitor, which is not needed


def main(argv: Sequence[str] | None = None) -> float:
    """Train until the task is solved, evaluate on other episodes."""
    parser = argparse.ArgumentParser(description="Many pendulums learn to swing up.")
    parser.add_argument("--envs", type=int, default=256, help="(default: %(default)s)")
    parser.add_argument("--timesteps", type=int, default=60_000, help="of all together, at most (default: %(default)s)")
    parser.add_argument("--gradient-steps", type=int, default=16, help="for each step of all (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=512, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    options = parser.parse_args(argv)

    th.set_num_threads(1)  # networks this small are no faster on several
    model = SACV(
        "MlpPolicy",
        Pendulums(options.envs),
        learning_rate=2e-3,
        tau=0.02,
        learning_starts=20 * options.envs,
        gradient_steps=options.gradient_steps,
        batch_size=options.batch_size,
        policy_delay=2,
        policy_kwargs={"net_arch": [64, 64]},
        seed=options.seed,
        device="cpu",
    )

    def report(*_: Any) -> bool:
        if model.num_timesteps % (20 * options.envs) or not model._n_updates:
            return True
        mean = evaluate(model)
        print(f"Return {mean:.0f} after {model.num_timesteps:,} transitions and {model._n_updates:,} updates", flush=True)
        return mean < SOLVED

    model.learn(options.timesteps, callback=report, log_interval=10 * options.envs)
    mean = evaluate(model, seed=2000)
    print(f"Mean return of 100 other episodes: {mean:.0f}")
    return mean


if __name__ == "__main__":
    main()
