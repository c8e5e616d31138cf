"""Warnings, once and early, about settings with which a training goes wrong slowly."""

import warnings

import numpy as np
from gymnasium import spaces

# Beyond these a warning is given. Actions: width of a bound in the environment's unit. Rewards: what Q has to reach, from
# zero, in steps of the size of a learning rate. Temperature: growth from its initial value.
WIDEST_ACTION = 2_000.0
LARGEST_VALUE = 20_000.0
LARGEST_GROWTH = 1_000.0


class Hints:
    """Each of the warnings, at most once."""

    def __init__(self) -> None:
        self._given: set[str] = set()

    def _give(self, name: str, text: str) -> None:
        if name not in self._given:
            self._given.add(name)
            warnings.warn(text, UserWarning, stacklevel=3)

    def about_actions(self, space: spaces.Box) -> None:
        """
        :param space: of the environment's actions
        """
        widths = np.asarray(space.high, dtype=np.float64) - space.low
        if widths.max() > WIDEST_ACTION:
            dim = np.unravel_index(widths.argmax(), widths.shape)
            self._give(
                "actions",
                f"An action reaches from {space.low[dim]:g} to {space.high[dim]:g}, and the policy explores all of that from "
                "its first step on: if the task needs a smaller range, nearly all of its actions are saturated. Give the Box "
                "the bounds that the task uses, for instance with gymnasium.wrappers.RescaleAction.",
            )

    def about_rewards(self, mean_reward: float, gamma: float) -> None:
        """
        :param mean_reward: mean of the absolute scaled rewards in the first batch
        :param gamma: discount factor
        """
        value = mean_reward / max(1.0 - gamma, 1e-6)
        if value > LARGEST_VALUE:
            self._give(
                "rewards",
                f"Rewards of {mean_reward:.3g} on average (absolute, scaled) with gamma {gamma:g} mean values near {value:.3g}"
                ", which the networks approach only slowly: use VecNormalize (norm_reward=True) or reward_scale="
                f"{100.0 * (1.0 - gamma) / mean_reward:.1g}.",
            )

    def about_temperature(self, ent_coef: float, initial: float, entropy: float, target_entropy: float) -> None:
        """
        :param ent_coef: learned temperature α
        :param initial: what it began with
        :param entropy: of the policy, nats
        :param target_entropy: that α is to reach
        """
        # Infinite, it ends the training: that is not for a warning to say
        if LARGEST_GROWTH * initial < ent_coef < np.inf:
            self._give(
                "temperature",
                f"The temperature α has grown from {initial:g} to {ent_coef:.3g} while the policy's entropy is {entropy:.3g} "
                f"nats and target_entropy {target_entropy:.3g}: the target may be out of reach, lower target_entropy or "
                "give ent_coef a fixed number.",
            )
