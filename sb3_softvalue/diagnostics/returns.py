"""The soft returns collected in an episode, and their regression on V."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from stable_baselines3.common.vec_env import VecNormalize

from sb3_softvalue.diagnostics.observations import Observations, stack
from sb3_softvalue.diagnostics.state_statistics import StateStatistics, reward_scale, temperature
from sb3_softvalue.sacv import SACV


def soft_returns(rewards: np.ndarray, bonuses: np.ndarray, ent_coef: float, gamma: float, final_value: float) -> np.ndarray:
    """
    Soft return from each step of an episode, Σ_k γ^k (r_{t+k} + α·H_{t+k}), k from 0: V is its expectation (Eq. 3 unrolled).
    H is the mean over new actions of the policy, not -log π of the action taken. This has the same expectation with less
    noise, and no bias from actions of an older policy or of the warm-up.

    :param rewards: after ``VecNormalize`` and ``reward_scale``, shape (length,)
    :param bonuses: ``StateStatistics.bonuses`` of the visited states in nats, shape (length,)
    :param ent_coef: α
    :param gamma: discount factor
    :param final_value: value after the last step: V of the last observation if the episode was truncated, 0 if it terminated
    :return: shape (length,)
    """
    returns = np.empty(len(rewards))
    following = final_value
    for step in reversed(range(len(rewards))):
        following = rewards[step] + ent_coef * bonuses[step] + gamma * following
        returns[step] = following
    return returns


def calibration_line(values: np.ndarray, collected: np.ndarray) -> tuple[float, float]:
    """
    Slope of the regression of collected soft returns on V, and bias of V. This slope, unlike that of V on returns, is 1 for a
    perfect V, however noisy the returns are.

    :param values: V(s), shape (n,)
    :param collected: soft returns from the same states, shape (n,)
    :return: slope (1 is calibrated; below 1, V varies too much; NaN if V does not vary), and bias, the mean of V - collected
        in the unit of V (positive: V over-estimates)
    """
    centred = values - values.mean()
    variance = float(np.mean(centred**2))
    slope = float(np.mean(centred * collected)) / variance if variance > 1e-12 else float("nan")
    return slope, float(np.mean(values - collected))


@dataclass
class Episode:
    """An unfinished episode: references to SB3's arrays, without any computation."""

    observations: list[Any] = field(default_factory=list)
    actions: list[np.ndarray] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    """Rewards of the environment, before ``VecNormalize``"""
    final_observation: Any = None
    truncated: bool = False

    def close(self, info: dict[str, Any]) -> None:
        """
        :param info: info dict of the last step
        """
        self.final_observation = info["terminal_observation"]
        self.truncated = bool(info.get("TimeLimit.truncated", False))

    def states(self, vec_normalize: VecNormalize | None = None) -> Observations:
        """
        :param vec_normalize: normalizes the visited observations; the environment has already normalized the final one
        :return: the visited observations and the final one, a batch of length + 1
        """
        visited = self.observations if vec_normalize is None else map(vec_normalize.normalize_obs, self.observations)
        return stack([*visited, self.final_observation])


def collected_returns(
    model: SACV, episode: Episode, readings: StateStatistics, vec_normalize: VecNormalize | None
) -> tuple[np.ndarray, np.ndarray]:
    """
    :param model: model whose α, γ and ``reward_scale`` apply
    :param episode: a finished episode
    :param readings: network outputs at its length + 1 states
    :param vec_normalize: normalizes the rewards; None leaves them as they are
    :return: soft returns, and the weight of the bootstrapped V in each, both of shape (length,)
    """
    rewards = np.array(episode.rewards, dtype=np.float64)
    if vec_normalize is not None:
        rewards = vec_normalize.normalize_reward(rewards).astype(np.float64)
    final_value = readings.values[-1] if episode.truncated else 0.0
    collected = soft_returns(
        rewards * reward_scale(model), readings.bonuses[:-1], temperature(model), model.gamma, final_value
    )
    return collected, episode.truncated * model.gamma ** np.arange(len(rewards), 0, -1)
