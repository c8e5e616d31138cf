"""Checks that refuse invalid arguments in one sentence before any work starts, and hints about slow failures."""

import inspect
import math
import numbers
import sys
import warnings
from collections.abc import Callable, Collection
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import DictReplayBuffer, NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.noise import NormalActionNoise, OrnsteinUhlenbeckActionNoise
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.type_aliases import TrainFreq
from stable_baselines3.common.vec_env import VecEnv, VecNormalize
from stable_baselines3.common.vec_env.base_vec_env import VecEnvWrapper
from stable_baselines3.sac.sac import SAC
from torch import nn

from sb3_softvalue.equations import ACTION_PRIORS
from sb3_softvalue.execution import EXECUTIONS
from sb3_softvalue.policies import COUNTERPARTS, CnnPolicy, MultiInputPolicy

# Pixels per side that the three convolutions of SB3's NatureCNN need
_SMALLEST_IMAGE = 36
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
    """
    option = vars(model)
    initial_ent_coef(model.ent_coef)
    for name in ("target_update_interval", "policy_delay", "batch_size", "buffer_size", "n_steps", "_stats_window_size"):
        check_whole_number(name.removeprefix("_"), option[name], minimum=1)
    # Negative: as many gradient steps as environment steps
    check_whole_number("gradient_steps", model.gradient_steps)
    # Infinity is allowed: never learn
    if not isinstance(model.learning_starts, numbers.Real) or math.isnan(model.learning_starts):
        raise ValueError(f"learning_starts must be a number of steps, got {model.learning_starts!r}.")
    if model.seed is not None:
        check_whole_number("seed", model.seed, minimum=0)
        if model.seed >= 2**32:
            raise ValueError(f"seed must be less than 2**32, got {model.seed!r}.")
    for name in ("tau", "gamma"):
        if not _is_number(option[name]) or not 0.0 <= option[name] <= 1.0:
            raise ValueError(f"{name} must be between 0 and 1, got {option[name]!r}.")
    norm = option["max_grad_norm"]
    if norm is not None and not (_is_number(norm) and norm > 0.0):
        raise ValueError(f"max_grad_norm must be a positive number, got {norm!r}: use None for no clipping.")
    for name, choices in (("action_prior", ACTION_PRIORS), ("execution", EXECUTIONS)):
        if option[name] not in choices:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {option[name]!r}.")
    for name in ("learning_rate", "qf_learning_rate", "vf_learning_rate", "ent_coef_learning_rate"):
        if name == "learning_rate" or option[name] is not None:
            _check_number_or_schedule(name, option[name], "non-negative", lambda value: value >= 0.0)
    _check_number_or_schedule("reward_scale", option["reward_scale"], "positive", lambda value: value > 0.0)
    _check_train_freq(model.train_freq, model.n_envs)
    _check_action_noise(model.action_noise, model.action_space)
    _check_policy_kwargs(model)
    _check_replay_buffer(model)


def check_arguments(device: th.device | str, **dicts: Any) -> None:
    """
    Check the arguments that SB3's constructor uses immediately.

    :param device: as for ``SACV``
    :param dicts: arguments that must be dicts of keyword arguments or None
    :raises ValueError: if PyTorch has no such device
    :raises TypeError: if one of ``dicts`` is no dict
    """
    for name, value in dicts.items():
        if value is not None and not isinstance(value, dict):
            raise TypeError(f"{name} must be a dict of keyword arguments, got {value!r}.")
    try:
        th.device("cpu" if device == "auto" else device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device must be 'auto', 'cpu', 'cuda' or another PyTorch device, got {device!r}.") from error


def initial_ent_coef(ent_coef: Any) -> float:
    """
    :param ent_coef: a number of any kind, "auto" or "auto_<initial value>"; SAC takes whatever begins with "auto" as learned
    :return: the initial temperature
    :raises ValueError: if it is none of these, negative or infinite
    :raises AssertionError: if the initial value of a learned temperature is not positive, as in SAC
    """
    learned = isinstance(ent_coef, str) and ent_coef.startswith("auto")
    try:
        value = 1.0 if learned and "_" not in ent_coef else float(ent_coef.split("_")[1] if learned else ent_coef)
    except (TypeError, ValueError, RuntimeError) as error:  # RuntimeError: a tensor of several numbers
        raise ValueError(f"ent_coef must be a number, 'auto' or 'auto_<initial value>', got {ent_coef!r}.") from error
    assert not learned or value > 0.0, f"The initial value of ent_coef must be greater than 0, got {ent_coef!r}."
    if not 0.0 <= value < math.inf:
        raise ValueError(f"ent_coef must be finite and not negative, got {ent_coef!r}: use 0 for no entropy bonus.")
    return value


def target_entropy(value: Any, action_space: spaces.Space) -> float:
    """
    :param value: "auto" or a number
    :param action_space: action space of the environment
    :return: the target entropy in nats
    :raises ValueError: if it is not a finite number
    """
    if value == "auto":
        return -float(np.prod(action_space.shape or ()))
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"target_entropy must be a finite number or 'auto', got {value!r}.")
    return number


def check_whole_number(name: str, value: Any, minimum: int | None = None) -> None:
    """
    :raises ValueError: if it is not a whole number of at least ``minimum``
    """
    is_whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not is_whole or (minimum is not None and value < minimum):
        at_least = "" if minimum is None else f" of at least {minimum}"
        raise ValueError(f"{name} must be a whole number{at_least}, got {value!r}.")


def _is_number(value: Any) -> bool:
    """:return: whether it is a finite number, Python's or NumPy's"""
    return isinstance(value, numbers.Real) and math.isfinite(value)


def _check_number_or_schedule(name: str, value: Any, expected: str, is_valid: Callable[[float], bool]) -> None:
    """
    :raises ValueError: if it is neither a schedule nor a valid number
    """
    if not callable(value) and not (_is_number(value) and is_valid(value)):
        raise ValueError(f"{name} must be a {expected} number or a schedule of the remaining progress, got {value!r}.")


def _check_train_freq(train_freq: Any, n_envs: int) -> None:
    """
    :raises ValueError: if it is neither a number of steps nor a pair of a number and its unit
    :raises AssertionError: if it counts episodes of several environments, which SB3 refuses only inside ``learn()``
    """
    if isinstance(train_freq, TrainFreq):  # a loaded model
        return
    frequency, unit = train_freq if isinstance(train_freq, tuple) and len(train_freq) == 2 else (train_freq, "step")
    unit = getattr(unit, "value", unit)  # SB3's TrainFrequencyUnit
    is_whole = isinstance(frequency, int) and not isinstance(frequency, bool)
    if not is_whole or frequency < 1 or unit not in ("step", "episode"):
        raise ValueError(
            "train_freq must be a whole number of steps of at least 1, or a tuple of a number and its unit such as "
            f"(1, 'episode') or (4, 'step'), got {train_freq!r}."
        )
    assert unit == "step" or n_envs == 1, (
        f"train_freq={train_freq!r} counts episodes, but SB3 does that for one environment only, not {n_envs}: count steps."
    )


def _check_action_noise(action_noise: Any, action_space: spaces.Space) -> None:
    """
    :raises ValueError: if it is not callable, or is SB3's noise for actions of another shape
    """
    if action_noise is not None and not callable(action_noise):
        raise ValueError(
            "action_noise must be None or an ActionNoise of stable_baselines3.common.noise such as NormalActionNoise, "
            f"got {action_noise!r}."
        )
    noise = getattr(action_noise, "base_noise", action_noise)
    if isinstance(noise, (NormalActionNoise, OrnsteinUhlenbeckActionNoise)):
        shape = np.shape(noise._mu + noise._sigma)
        if shape not in ((), (1,), action_space.shape):
            raise ValueError(f"action_noise must have the shape of an action, {action_space.shape}, got {shape}.")


def _check_policy_kwargs(model: SAC) -> None:
    """
    Only for this package's policies: a user's class may give its arguments another meaning.

    :raises ValueError: if an argument is invalid, or the default features extractor cannot read the observations
    """
    if model.policy_class not in COUNTERPARTS.values():
        return
    kwargs, space = model.policy_kwargs, model.observation_space
    optimizer_class, activation_fn = kwargs.get("optimizer_class", th.optim.Adam), kwargs.get("activation_fn", nn.ReLU)
    if isinstance(optimizer_class, str):
        raise ValueError(f"optimizer_class must be a class such as torch.optim.Adam, got {optimizer_class!r}.")
    if isinstance(activation_fn, nn.Module):
        raise ValueError(f"activation_fn must be a class such as torch.nn.Tanh, got an instance, {activation_fn!r}.")
    closure = inspect.signature(getattr(optimizer_class, "step", len)).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ValueError(
            f"optimizer_class must not need a closure, but {optimizer_class.__name__}.step() does: use an optimizer such as "
            "torch.optim.Adam."
        )
    net_arch = kwargs.get("net_arch")
    for sizes in [net_arch.get(key, ()) for key in ("pi", "qf", "vf")] if isinstance(net_arch, dict) else [net_arch or ()]:
        if not np.iterable(sizes) or not all(_is_number(size) and size >= 1 for size in sizes):
            raise ValueError(
                f"net_arch must be a list of layer sizes or a dict of such lists (keys 'pi', 'qf' and 'vf'), got {net_arch!r}."
            )
    if kwargs.get("actor_keys") is not None:
        _check_actor_keys(kwargs["actor_keys"], space, kwargs.get("share_features_extractor", False))
    if "features_extractor_class" in kwargs:
        return
    if model.policy_class is MultiInputPolicy and not isinstance(space, spaces.Dict):
        raise ValueError(f"MultiInputPolicy needs Dict observations, got {space}: use MlpPolicy or CnnPolicy.")
    parts = dict(space.spaces) if isinstance(space, spaces.Dict) else {}
    for key in parts:
        if "." in key or not key or hasattr(nn.ModuleDict, key):
            raise ValueError(f"PyTorch allows no module with the name {key!r}: rename this key of the Dict observation.")
    if model.policy_class is CnnPolicy:
        parts = {"": space}
    for part in parts.values():
        is_image = is_image_space(part, check_channels=False, normalized_image=not kwargs.get("normalize_images", True))
        if is_image and min((part.shape or (0,))[1:], default=0) < _SMALLEST_IMAGE:
            order = "" if part.dtype == np.uint8 else " (SB3 reads images of floats with channels first)"
            raise ValueError(
                f"SB3's NatureCNN needs images of at least {_SMALLEST_IMAGE} by {_SMALLEST_IMAGE} pixels, got {part}{order}: "
                "enlarge or flatten them, or pass a features_extractor_class."
            )


def _check_actor_keys(keys: Any, space: spaces.Space, share_features_extractor: bool) -> None:
    """
    :raises ValueError: if they are no keys of the observations, or Q and V would share the actor's features extractor
    """
    if not isinstance(space, spaces.Dict):
        raise ValueError(f"actor_keys needs Dict observations, got {space}: give the actor's observations their own key.")
    is_list = isinstance(keys, Collection) and not isinstance(keys, str) and len(keys) > 0
    if not is_list or not all(key in list(space.spaces) for key in keys):
        raise ValueError(f"actor_keys must be a list of some of the observations {list(space.spaces)}, got {keys!r}.")
    if share_features_extractor:
        raise ValueError("share_features_extractor must be False with actor_keys, since Q and V need the other observations.")


def _check_replay_buffer(model: SAC) -> None:
    """
    :raises ValueError: if SB3 has no replay buffer for this combination of options
    """
    kwargs, buffer_class = model.replay_buffer_kwargs, model.replay_buffer_class
    is_dict = isinstance(model.observation_space, spaces.Dict)
    if buffer_class is not None and not (isinstance(buffer_class, type) and issubclass(buffer_class, ReplayBuffer)):
        raise ValueError(f"replay_buffer_class must be a subclass of SB3's ReplayBuffer, got {buffer_class!r}.")
    if buffer_class is not None and issubclass(buffer_class, DictReplayBuffer) and not is_dict:
        raise ValueError(f"{buffer_class.__name__} needs Dict observations, got {model.observation_space}.")
    if is_dict and model.n_steps > 1 and buffer_class is None:
        raise ValueError("n_steps must be 1 with Dict observations: SB3 has no n-step replay buffer for them.")
    if model.optimize_memory_usage:
        if is_dict or issubclass(buffer_class or object, (DictReplayBuffer, NStepReplayBuffer)) or model.n_steps > 1:
            raise ValueError(
                "optimize_memory_usage must be False with Dict observations, HER or n_steps over 1: SB3's replay buffers do "
                "not support both."
            )
        if buffer_class is None and kwargs.get("handle_timeout_termination", True):
            raise ValueError(
                "optimize_memory_usage needs replay_buffer_kwargs=dict(handle_timeout_termination=False): SB3's replay buffer "
                "does not support both."
            )
        # A model without an environment only predicts and needs no buffer
        if model.env is not None and model.buffer_size // model.n_envs < 2:
            raise ValueError(
                f"buffer_size must be at least {2 * model.n_envs}, two transitions per environment, with "
                f"optimize_memory_usage, got {model.buffer_size!r}: the newest observation overwrites one transition."
            )


def check_buffer_fits(buffer: ReplayBuffer, model: SAC) -> None:
    """
    :param buffer: replay buffer of another model
    :param model: model that will learn from it
    :raises ValueError: if it has other spaces or another number of environments
    """
    # Actions are stored scaled by their bounds, observations unscaled: only the bounds of actions must match
    fits = _holds_same_observations(buffer.observation_space, model.observation_space)
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


def _holds_same_observations(space: spaces.Space, other: spaces.Space) -> bool:
    """:return: whether the spaces are equal except for their bounds"""
    if isinstance(space, spaces.Dict) and isinstance(other, spaces.Dict):
        return set(space) == set(other) and all(_holds_same_observations(space[key], other[key]) for key in space)
    if isinstance(space, spaces.Box) and isinstance(other, spaces.Box):
        return (space.shape, space.dtype) == (other.shape, other.dtype)
    return space == other


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


def check_spaces(env: Any) -> None:
    """
    :param env: an environment, before SB3 wraps it
    :raises AssertionError: if its action space is no bounded Box of floats (SB3 raises the same type for Discrete actions)
    :raises ValueError: if no network can read its observations
    """
    _check_action_space(env.action_space)
    space = env.observation_space
    if isinstance(space, spaces.Dict) and not space.spaces:
        raise ValueError(f"Observations must have at least one key, got {space}.")
    for part in space.spaces.values() if isinstance(space, spaces.Dict) else (space,):
        _check_observation_space(part)


def _check_observation_space(space: spaces.Space) -> None:
    if not isinstance(space, (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)):
        raise ValueError(
            f"SACV supports Box, Discrete, MultiDiscrete and MultiBinary observations and a flat Dict of these, got {space}: "
            "convert them with a gymnasium.ObservationWrapper such as FlattenObservation."
        )
    if isinstance(space, spaces.Box) and not space.shape:
        raise ValueError(
            f"Observations must have at least one dimension, got {space}: use gymnasium.wrappers.ReshapeObservation."
        )
    if isinstance(space, spaces.MultiDiscrete) and space.nvec.ndim > 1:
        raise ValueError(f"SB3 supports one-dimensional MultiDiscrete observations only, got {space}: flatten them.")
    if 0 in (space.shape or ()):
        raise ValueError(f"Observations must not be empty, got {space}: give the space at least one entry.")
    if np.any(getattr(space, "start", 0)):
        raise ValueError(f"SB3 encodes {space} as if it started at 0: subtract its start from the observations.")


def _check_action_space(space: spaces.Space) -> None:
    assert isinstance(space, spaces.Box), (
        f"SACV needs continuous actions (a Box action space) but the environment has {space}: "
        "use DQN or PPO for Discrete, PPO or A2C for MultiDiscrete and MultiBinary actions."
    )
    assert np.issubdtype(space.dtype, np.floating), (
        f"SACV's actions are floats and would be truncated to integers in {space}: give the Box dtype=np.float32."
    )
    assert np.all(np.isfinite(space.low)) and np.all(np.isfinite(space.high)), (
        f"SACV needs finite action bounds but the environment has {space}: give the Box finite low and high, for instance "
        "with gymnasium.wrappers.TransformAction."
    )
    with np.errstate(over="ignore"):
        width = space.high - space.low
    assert np.all(np.isfinite(width)), (
        f"SACV scales actions by high - low, which overflows {space.dtype} in {space}: give the Box narrower bounds."
    )
    assert 0 not in space.shape, f"SACV needs at least one action dimension but the environment has {space}: add one."
    assert np.all(space.low < space.high), (
        f"SACV needs low < high for every action dimension but the environment has {space}: leave out the dimension that "
        "cannot vary."
    )


def check_wrappers(env: VecEnv) -> VecEnv:
    """
    :param env: the wrapped environment of the model
    :return: the same environment
    :raises ValueError: if the unnormalized observations, which the replay buffer stores, do not fit the model
    """
    wrapper = env
    while isinstance(wrapper, VecEnvWrapper):
        if isinstance(wrapper, VecNormalize):
            if wrapper.observation_space != env.observation_space:
                raise ValueError(
                    f"VecNormalize returns {wrapper.observation_space} but an outer wrapper changes it to "
                    f"{env.observation_space}, and SB3's replay buffer stores what VecNormalize received: make VecNormalize "
                    "the outermost wrapper, as in VecNormalize(VecTransposeImage(env), norm_obs=False)."
                )
            if isinstance(wrapper.observation_space, spaces.Discrete):
                raise ValueError(
                    f"SB3's replay buffer cannot store {wrapper.observation_space} with VecNormalize: normalize rewards with "
                    "gymnasium.wrappers.NormalizeReward instead."
                )
        wrapper = wrapper.venv
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
