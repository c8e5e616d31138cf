"""
A goal task with sparse reward, solved with hindsight experience replay: a gripper that must reach a point, as in
FetchReach (Plappert et al. 2018, https://arxiv.org/abs/1802.09464), but as 30 lines that need no physics engine.

    python examples/her_fetch_like.py
"""

import argparse
import pathlib
from collections.abc import Sequence
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from stable_baselines3 import HerReplayBuffer
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

from sb3_softvalue import SACV


class Reach(gym.Env):
    """
    Bring a gripper within 5 cm of a goal. Positions in m, one step is 40 ms; the reward is 0 at the goal and -1 elsewhere.

    The action is the commanded velocity, of which 1 stands for 1 m/s; the gripper follows it with a lag.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": []}
    step_time, lag, distance_threshold, reach = 0.04, 0.5, 0.05, 0.3

    def __init__(self) -> None:
        point = spaces.Box(-self.reach, self.reach, (3,), np.float32)
        self.observation_space = spaces.Dict(
            observation=spaces.Box(-1.0, 1.0, (6,), np.float32), achieved_goal=point, desired_goal=point
        )
        self.action_space = spaces.Box(-1.0, 1.0, (3,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict[str, np.ndarray], dict]:
        super().reset(seed=seed)
        self.position = np.zeros(3, np.float32)
        self.velocity = np.zeros(3, np.float32)
        self.goal = self.np_random.uniform(-self.reach, self.reach, 3).astype(np.float32)
        return self._observation(), {}

    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        self.velocity += self.lag * (np.clip(action, -1.0, 1.0) - self.velocity)
        self.position = np.clip(self.position + self.step_time * self.velocity, -self.reach, self.reach)
        reward = float(self.compute_reward(self.position, self.goal, {}))
        return self._observation(), reward, False, False, {"is_success": reward == 0.0}

    def compute_reward(self, achieved_goal: np.ndarray, desired_goal: np.ndarray, info: Any) -> np.ndarray:
        """Reward of one or of many positions, for goals that HER puts in afterwards; shape (..., 3) to (...)."""
        distance = np.linalg.norm(achieved_goal - desired_goal, axis=-1)
        return -(distance > self.distance_threshold).astype(np.float32)

    def _observation(self) -> dict[str, np.ndarray]:
        return {
            "observation": np.concatenate([self.position, self.velocity]),
            "achieved_goal": self.position.copy(),
            "desired_goal": self.goal.copy(),
        }


def make_env() -> gym.Env:
    """The task with its time limit of 50 steps, 2 s."""
    return gym.wrappers.TimeLimit(Reach(), max_episode_steps=50)


def main(argv: Sequence[str] | None = None) -> float:
    """Train, save and test; return the share of the last steps at the goal."""
    parser = argparse.ArgumentParser(description="Train SACV with HER on a reaching task.")
    parser.add_argument("--timesteps", type=int, default=5000, help="steps of training (default: %(default)s)")
    parser.add_argument(
        "--folder", type=pathlib.Path, default=pathlib.Path("runs/her_fetch_like"), help="(default: %(default)s)"
    )
    options = parser.parse_args(argv)
    options.folder.mkdir(parents=True, exist_ok=True)

    model = SACV(
        "MultiInputPolicy",
        make_vec_env(make_env, seed=0),
        learning_rate=1e-3,
        gamma=0.95,
        learning_starts=200,
        policy_kwargs={"net_arch": [64, 64]},
        replay_buffer_class=HerReplayBuffer,
        replay_buffer_kwargs={"n_sampled_goal": 4, "goal_selection_strategy": "future"},
        seed=0,
    )
    model.learn(options.timesteps, progress_bar=True)
    model.save(options.folder / "model")

    successes: list[bool] = []
    evaluate_policy(
        model,
        make_vec_env(make_env, seed=1000),
        n_eval_episodes=20,
        callback=lambda local, _: successes.append(local["info"]["is_success"]) if local["done"] else None,
    )
    print(f"At the goal when the time is up: {np.mean(successes):.0%} of 20 episodes")
    return float(np.mean(successes))


if __name__ == "__main__":
    main()
