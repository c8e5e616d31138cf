"""Checks of arguments that SB3 would notice late or never, before any work starts, and hints about slow failures."""

import math
import numbers
import sys
import warnings
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.preprocessing import get_obs_shape
from stable_baselines3.common.vec_env import VecEnv, unwrap_vec_normalize
from stable_baselines3.sac.sac import SAC

from sb3_softvalue.equations import ACTION_PRIORS
from sb3_softvalue.execution import EXECUTIONS

# Above these, a hint is given. Actions: distance between the bounds in the environment's unit, which Isaac Lab's default of
# ±100 reaches. Values: Q starts at zero and grows with steps of about the learning rate. Temperature: growth over its initial
# value.
_WIDE_ACTION = 200.0
_LARGEST_VALUE = 20_000.0
_LARGEST_GROWTH = 1_000.0


def check_options(model: SAC) -> None:
    """
    :param model: SACV before its networks are built
    :raises ValueError: if an option is invalid
    :raises AssertionError: if the actions cannot be scaled or stored (SB3 raises the same type for other action spaces)
    """
    option = vars(model)
    for name in ("target_update_interval", "policy_delay", "batch_size"):
        check_whole_number(name, option[name], minimum=1)
    # Negative: as many gradient steps as environment steps
    check_whole_number("gradient_steps", model.gradient_steps)
    for name in ("tau", "gamma"):
        if not _is_number(option[name]) or not 0.0 <= option[name] <= 1.0:
            raise ValueError(f"{name} must be between 0 and 1, got {option[name]!r}.")
    norm = option["max_grad_norm"]
    if norm is not None and not (_is_number(norm) and norm > 0.0):
        raise ValueError(f"max_grad_norm must be a positive number, got {norm!r}: use None for no clipping.")
    for name, choices in (("action_prior", ACTION_PRIORS), ("execution", EXECUTIONS)):
        if option[name] not in choices:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {option[name]!r}.")
    assert isinstance(model.action_space, spaces.Box)
    _check_actions(model.action_space)
    space = model.observation_space
    for part in space.spaces.values() if isinstance(space, spaces.Dict) else (space,):
        if np.any(getattr(part, "start", 0)):
            raise ValueError(f"SB3 encodes {part} as if it started at 0: subtract its start from the observations.")


def _check_actions(space: spaces.Box) -> None:
    assert np.issubdtype(space.dtype, np.floating), (
        f"SB3's replay buffer would truncate actions in [-1, 1] to integers in {space}: give the Box dtype=np.float32."
    )
    with np.errstate(over="ignore"):
        width = space.high - space.low
    assert np.all((width > 0.0) & (width < np.inf)), (
        f"Actions are scaled by high - low, which must be positive and finite in {space.dtype}, got {space}: leave out a "
        "dimension that cannot vary, and give the others narrower bounds."
    )


def check_whole_number(name: str, value: Any, minimum: int | None = None) -> None:
    """
    :raises ValueError: if it is not a whole number of at least ``minimum``
    """
    if not isinstance(value, (int, np.integer)) or (minimum is not None and value < minimum):
        at_least = "" if minimum is None else f" of at least {minimum}"
        raise ValueError(f"{name} must be a whole number{at_least}, got {value!r}.")


def _is_number(value: Any) -> bool:
    """:return: whether it is a finite number, Python's or NumPy's"""
    return isinstance(value, numbers.Real) and math.isfinite(value)


def check_buffer_fits(buffer: ReplayBuffer, model: SAC) -> None:
    """
    :param buffer: replay buffer of another model
    :param model: model that will learn from it
    :raises ValueError: if it has other spaces or another number of environments
    """
    # Actions are stored scaled by their bounds, observations unscaled: only the bounds of actions must match
    fits = buffer.obs_shape == get_obs_shape(model.observation_space)
    for what, its, own, is_same in (
        ("observations", buffer.observation_space, model.observation_space, fits),
        ("actions", buffer.action_space, model.action_space, buffer.action_space == model.action_space),
    ):
        if not is_same:
            raise ValueError(
                f"The replay buffer holds {what} in {its}, but the model's are in {own}: use a buffer of the same space."
            )
    if model.env is not None and buffer.n_envs != model.n_envs:
        raise ValueError(
            f"The replay buffer was filled by {buffer.n_envs} parallel environments, but the model has {model.n_envs}: use as "
            "many."
        )


def check_optimizers(model: SAC) -> None:
    """
    :param model: SACV with its networks
    :raises ValueError: if two optimizers share a parameter, whose gradient would mix both networks' losses
    """
    owners: dict[th.Tensor, str] = {}
    for name in ("actor", "critic", "value"):
        for param in (param for group in getattr(model, name).optimizer.param_groups for param in group["params"]):
            owner = owners.setdefault(param, name)
            if owner != name and param.requires_grad:
                raise ValueError(
                    f"The {owner} and the {name} share a parameter, which both optimizers would update: give each network its "
                    "own, freeze it (requires_grad_(False)), or use policy_kwargs=dict(share_features_extractor=True)."
                )


def check_vec_normalize(env: VecEnv) -> VecEnv:
    """
    :param env: the wrapped environment of the model
    :return: the same environment
    :raises ValueError: if the unnormalized observations, which the replay buffer stores, do not fit the model
    """
    vec_normalize = unwrap_vec_normalize(env)
    if vec_normalize is None:
        return env
    space = vec_normalize.observation_space
    if get_obs_shape(space) != get_obs_shape(env.observation_space):
        raise ValueError(
            f"VecNormalize returns {space} but an outer wrapper changes it to {env.observation_space}, and SB3's replay "
            "buffer stores what VecNormalize received: make VecNormalize the outermost wrapper, as in "
            "VecNormalize(VecTransposeImage(env), norm_obs=False)."
        )
    if isinstance(space, spaces.Discrete):
        raise ValueError(
            f"SB3's replay buffer cannot store {space} with VecNormalize: normalize rewards with "
            "gymnasium.wrappers.NormalizeReward instead."
        )
    return env


def advise(hint: str, stacklevel: int) -> None:
    """
    Warn, or print the hint if warnings are errors: a hint never stops a run that works with SAC.

    :param hint: one or two sentences
    :param stacklevel: as for ``warnings.warn``, counted from the caller
    """
    try:
        warnings.warn(hint, UserWarning, stacklevel=stacklevel + 1)
    except UserWarning:
        print(hint, file=sys.stderr)


def hint_about_actions(space: spaces.Box) -> str | None:
    """
    :param space: action space of the environment
    :return: a warning, or None
    """
    widths = np.asarray(space.high, dtype=np.float64) - space.low
    if widths.max() < _WIDE_ACTION:
        return None
    dim = np.unravel_index(widths.argmax(), widths.shape)
    return (
        f"An action ranges from {space.low[dim]:g} to {space.high[dim]:g}, and the policy explores the whole range from its "
        "first step: if the task needs a smaller one, almost all actions will be saturated. Give the Box the bounds that the "
        "task uses, for instance with gymnasium.wrappers.RescaleAction."
    )


def hint_about_rewards(mean_reward: float, gamma: float) -> str | None:
    """
    :param mean_reward: mean absolute scaled reward of the first batch
    :param gamma: discount factor
    :return: a warning, or None
    """
    value = mean_reward / max(1.0 - gamma, 1e-6)
    if not _LARGEST_VALUE < value < math.inf:
        return None
    advice = f" or reward_scale={100.0 * (1.0 - gamma) / mean_reward:.1g}" if gamma < 1.0 else ""
    return (
        f"Rewards average {mean_reward:.3g} (absolute, scaled), so that with gamma {gamma:g} values reach about {value:.3g}, "
        f"which the networks learn only slowly: use VecNormalize (norm_reward=True){advice}."
    )


def hint_about_temperature(ent_coef: float, initial: float, entropy: float, target_entropy: float) -> str | None:
    """
    :param ent_coef: learned temperature α
    :param initial: its initial value
    :param entropy: entropy of the policy in nats
    :param target_entropy: target of the policy's entropy in nats
    :return: a warning, or None
    """
    if not _LARGEST_GROWTH * initial < ent_coef < math.inf:
        return None
    return (
        f"The temperature α has grown from {initial:g} to {ent_coef:.3g}, while the policy's entropy is {entropy:.3g} nats "
        f"and target_entropy is {target_entropy:.3g}: the target may be out of reach. Lower target_entropy, or set ent_coef "
        "to a fixed number."
    )
