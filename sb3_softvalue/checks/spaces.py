"""Which observations and actions SACV refuses, each with one sentence that says what to do."""

from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.vec_env import VecEnv, VecNormalize
from stable_baselines3.common.vec_env.base_vec_env import VecEnvWrapper
from torch import nn

from sb3_softvalue.policies import CnnPolicy, MultiInputPolicy

# Pixels that the three convolutions of SB3's NatureCNN need
_SMALLEST_IMAGE = 36


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
    images = [observation_space] if issubclass(policy_class, CnnPolicy) else []
    if isinstance(observation_space, spaces.Dict):
        images = [part for part in observation_space.spaces.values() if is_image_space(part, **as_images)]
        for key in observation_space.spaces:
            if "." in key or not key or hasattr(nn.ModuleDict, key):
                raise ValueError(f"An observation cannot be called {key!r}, which no PyTorch module can be: rename the key.")
    for image in images:
        if min((image.shape or (0,))[1:], default=0) < _SMALLEST_IMAGE:
            raise ValueError(
                f"SB3's network for images needs {_SMALLEST_IMAGE} by {_SMALLEST_IMAGE} pixels or more, got {image}: make "
                "them larger, flatten them, or give a features_extractor_class."
            )


def check_observation_space(space: spaces.Space) -> None:
    """
    :raises ValueError: if no network can read it
    """
    if isinstance(space, spaces.Dict):
        if not space.spaces:
            raise ValueError(f"Observations must have at least one key, got {space}.")
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
    elif isinstance(space, spaces.Box) and not space.shape:
        raise ValueError(f"Observations must have an axis, got {space}: use gymnasium.wrappers.ReshapeObservation.")
    elif isinstance(space, spaces.MultiDiscrete) and space.nvec.ndim > 1:
        raise ValueError(f"SB3 encodes MultiDiscrete observations of one axis, got {space}: flatten them.")
    elif 0 in (space.shape or ()):
        raise ValueError(f"Observations must have at least one number, got {space}.")
    elif np.any(getattr(space, "start", 0)):
        raise ValueError(f"{space} must begin at 0, which is how SB3 encodes it: subtract its start from the observations.")


def check_wrappers(env: VecEnv) -> VecEnv:
    """
    :param env: as the model has it
    :return: the same
    :raises ValueError: if the observations before normalising, which the replay buffer holds, are none that the model reads
    """
    wrapper = env
    while isinstance(wrapper, VecEnvWrapper):
        if isinstance(wrapper, VecNormalize):
            if wrapper.observation_space != env.observation_space:
                raise ValueError(
                    f"VecNormalize gives {wrapper.observation_space} and the model reads {env.observation_space}, but SB3's "
                    "replay buffer holds what VecNormalize was given: put it around the wrappers that change observations, as "
                    "in VecNormalize(VecTransposeImage(env), norm_obs=False)."
                )
            if isinstance(wrapper.observation_space, spaces.Discrete):
                raise ValueError(
                    f"SB3's replay buffer cannot store {wrapper.observation_space} behind VecNormalize: normalise rewards "
                    "with gymnasium.wrappers.NormalizeReward."
                )
        wrapper = wrapper.venv
    return env


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
    with np.errstate(over="ignore"):
        width = action_space.high - action_space.low
    assert np.all(np.isfinite(width)), (
        f"SACV scales actions by the width of their bounds, which is too large for {action_space.dtype} in {action_space}: "
        "give its Box bounds that the environment needs."
    )
    assert 0 not in action_space.shape, f"SACV needs at least one action but the environment has {action_space}."
    assert np.all(action_space.low < action_space.high), (
        f"SACV scales actions from their bounds but the environment has {action_space}, where a lower bound is not below its "
        "upper one: leave out the dimension that cannot vary."
    )
