"""Which observations and actions SACV refuses, each with one sentence that says what to do."""

from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.preprocessing import is_image_space

from sb3_softvalue.policies import CnnPolicy, MultiInputPolicy


def check_policy_space(policy_class: type[BasePolicy], policy_kwargs: dict[str, Any], observation_space: spaces.Space) -> None:
    """
    :raises ValueError: if the policy's own features extractor is not made for these observations
    """
    if "features_extractor_class" in policy_kwargs:
        return
    if issubclass(policy_class, MultiInputPolicy) and not isinstance(observation_space, spaces.Dict):
        raise ValueError(f"MultiInputPolicy needs Dict observations, got {observation_space}: use MlpPolicy or CnnPolicy.")
    as_images = {"check_channels": False, "normalized_image": not policy_kwargs.get("normalize_images", True)}
    if issubclass(policy_class, CnnPolicy) and not is_image_space(observation_space, **as_images):
        raise ValueError(
            f"CnnPolicy needs images (uint8 from 0 to 255, or normalize_images=False), got {observation_space}: use MlpPolicy."
        )


def check_observation_space(space: spaces.Space) -> None:
    """
    :raises ValueError: if no network can read it
    """
    if isinstance(space, spaces.Dict):
        for name, part in space.spaces.items():
            if isinstance(part, spaces.Dict):
                raise ValueError(
                    f"Observations must not be nested but {name!r} is {part}: use gymnasium.wrappers.FlattenObservation."
                )
            check_observation_space(part)
    elif not isinstance(space, (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)):
        raise ValueError(
            f"SACV reads Box, Discrete, MultiDiscrete and MultiBinary observations and a Dict of these, got {space}: "
            "change them with a gymnasium.ObservationWrapper."
        )
    elif 0 in (space.shape or ()):
        raise ValueError(f"Observations must have at least one number, got {space}.")
    elif np.any(getattr(space, "start", 0)):
        raise ValueError(f"{space} must begin at 0, which is how SB3 encodes it: subtract its start from the observations.")


def check_action_space(action_space: spaces.Space) -> None:
    """
    :raises AssertionError: as SB3's, if the space is not a bounded Box
    """
    assert isinstance(action_space, spaces.Box), (
        f"SACV needs continuous actions (a Box action space) but the environment has {action_space}: "
        "use DQN or PPO for Discrete, PPO or A2C for MultiDiscrete and MultiBinary actions."
    )
    assert np.all(np.isfinite(action_space.low)) and np.all(np.isfinite(action_space.high)), (
        f"SACV squashes actions into finite bounds but the environment has {action_space}: give its Box finite low and high, "
        "for instance with gymnasium.wrappers.TransformAction."
    )
    assert 0 not in action_space.shape, f"SACV needs at least one action but the environment has {action_space}."
    assert np.all(action_space.low < action_space.high), (
        f"SACV scales actions from their bounds but the environment has {action_space}, where a lower bound is not below its "
        "upper one: leave out the dimension that cannot vary."
    )
