"""The soft returns collected in an episode, and the regression of them on V."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sb3_softvalue.diagnostics.observations import Observations, stack
from sb3_softvalue.diagnostics.state_statistics import StateStatistics


def soft_returns(rewards: np.ndarray, bonuses: np.ndarray, ent_coef: float, gamma: float, final_value: float) -> np.ndarray:
    """
    Soft return collected from each step of an episode on, Σ_k γ^k (r_{t+k} + α·H_{t+k}), k from 0, the sum whose
    expectation V is (Eq. 3 unrolled). H is the mean over fresh actions of the policy, not -log π of the action taken: the
    same expectation with less noise, and free of the bias that an action of an older policy or of the warm-up brings.

    :param rewards: as V sees them (after ``VecNormalize`` and ``reward_scale``), shape (length,)
    :param bonuses: ``StateStatistics.bonuses`` of the visited states in nats, shape (length,)
    :param ent_coef: α
    :param gamma: discount factor
    :param final_value: what follows the last step: V of the last observation where the episode was truncated, 0 where it
        terminated
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
    Slope and bias of V against the soft return collected. The slope is that of the collected return on V, because only
    this one is 1 for a perfect V however noisy single returns are.

    :param values: V(s), shape (n,)
    :param collected: soft returns from the same states, shape (n,)
    :return: slope (1 is calibrated; below 1 V is spread too wide; NaN if V does not vary), and bias, the mean of
        V - collected in the unit of V (positive: V over-estimates)
    """
    centred = values - values.mean()
    variance = float(np.mean(centred**2))
    slope = float(np.mean(centred * collected)) / variance if variance > 1e-12 else float("nan")
    return slope, float(np.mean(values - collected))


@dataclass
class Episode:
    """What is remembered of one episode until it ends: references to the arrays that SB3 made, nothing computed."""

    start: int = 0
    """Time step of the model at which it began"""
    observations: list[Any] = field(default_factory=list)
    actions: list[np.ndarray] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    """Of the environment, or in evaluation after ``VecNormalize``"""
    raw_rewards: list[float] = field(default_factory=list)
    """Of the environment, in evaluation only"""
    final_observation: Any = None
    truncated: bool = False

    def close(self, info: dict[str, Any]) -> None:
        """
        :param info: of the last step
        """
        self.final_observation = info["terminal_observation"]
        self.truncated = bool(info.get("TimeLimit.truncated", False))

    def states(self) -> Observations:
        """:return: the visited observations and the one after the last step, batch of length + 1"""
        return stack([*self.observations, self.final_observation])


def collected_returns(
    rewards: np.ndarray, readings: StateStatistics, ent_coef: float, gamma: float, truncated: bool
) -> tuple[np.ndarray, np.ndarray]:
    """
    :param rewards: as V sees them, shape (length,)
    :param readings: of the length + 1 states
    :param ent_coef: α
    :param gamma: discount factor
    :param truncated: whether the episode was cut by a time limit, so that V of its last state follows
    :return: soft returns, and the weight of the bootstrapped tail in each, both of shape (length,)
    """
    final_value = readings.values[-1] if truncated else 0.0
    collected = soft_returns(rewards, readings.bonuses[:-1], ent_coef, gamma, final_value)
    tail_weights = gamma ** np.arange(len(rewards), 0, -1) if truncated else np.zeros(len(rewards))
    return collected, tail_weights
