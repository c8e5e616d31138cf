"""A point that reaches for a goal, with FetchReach's spaces: HER's entry of sacv.yml without gymnasium-robotics."""

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces


class PointReach(gym.Env):
    """Move a gripper, the first three entries of the observation, to the goal."""

    def __init__(self, render_mode: str | None = None) -> None:
        self.render_mode = render_mode
        self.action_space = spaces.Box(-1.0, 1.0, (4,), np.float32)
        sizes = {"observation": 10, "achieved_goal": 3, "desired_goal": 3}
        self.observation_space = spaces.Dict({key: spaces.Box(-np.inf, np.inf, (n,), np.float64) for key, n in sizes.items()})

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict[str, np.ndarray], dict]:
        super().reset(seed=seed)
        self.state = np.zeros(10)
        self.goal = self.np_random.uniform(-0.15, 0.15, 3)
        return self._observe(), {}

    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], float, bool, bool, dict]:
        self.state[:3] += 0.05 * action[:3]
        info = {"is_success": float(np.linalg.norm(self.state[:3] - self.goal) < 0.05)}
        return self._observe(), float(self.compute_reward(self.state[:3], self.goal, info)), False, False, info

    def compute_reward(self, achieved_goal: np.ndarray, desired_goal: np.ndarray, info: Any) -> np.ndarray:
        return -(np.linalg.norm(achieved_goal - desired_goal, axis=-1) > 0.05).astype(np.float32)

    def _observe(self) -> dict[str, np.ndarray]:
        return {"observation": self.state.copy(), "achieved_goal": self.state[:3].copy(), "desired_goal": self.goal.copy()}


gym.register("FetchReach-v4", PointReach, max_episode_steps=50)
