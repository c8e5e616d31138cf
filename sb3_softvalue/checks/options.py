"""Which options SACV refuses, each with one sentence that says what to use instead."""

import inspect
import math
import numbers
from collections.abc import Callable
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import DictReplayBuffer, ReplayBuffer
from stable_baselines3.common.noise import ActionNoise, NormalActionNoise, OrnsteinUhlenbeckActionNoise
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import TrainFreq
from stable_baselines3.sac.sac import SAC

from sb3_softvalue.checks.spaces import check_policy_space
from sb3_softvalue.execution import EXECUTIONS
from sb3_softvalue.policies import SACVPolicy
from sb3_softvalue.update import ACTION_PRIORS


def check_options(model: SAC) -> None:
    """
    :param model: SACV before its networks are built
    :raises ValueError: if an option has a value that cannot work
    :raises TypeError: if ``policy_kwargs`` names an argument that the policy does not have
    """
    option = vars(model)
    initial_ent_coef(model.ent_coef)
    for name in ("target_update_interval", "batch_size", "buffer_size", "n_steps", "stats_window_size"):
        # SB3 keeps the window as a private attribute
        check_whole_number(name, option.get(name, option.get(f"_{name}")), minimum=1)
    # A negative number of gradient steps: as many as steps were taken
    check_whole_number("gradient_steps", model.gradient_steps, minimum=-1)
    if not _is_number(model.learning_starts):
        raise ValueError(f"learning_starts must be a number of steps, got {model.learning_starts!r}.")
    check_train_freq(model.train_freq, model.n_envs)
    check_seed(model.seed)
    check_action_noise(model.action_noise, model.action_space)
    check_fraction("tau", model.tau)
    check_fraction("gamma", model.gamma)
    check_max_grad_norm(option["max_grad_norm"])
    check_one_of("action_prior", option["action_prior"], ACTION_PRIORS)
    check_one_of("execution", option["execution"], EXECUTIONS)
    for name in ("learning_rate", "qf_learning_rate", "vf_learning_rate", "ent_coef_learning_rate"):
        if name == "learning_rate" or option[name] is not None:
            check_number_or_schedule(name, option[name], "not negative", lambda value: value >= 0.0)
    check_number_or_schedule("reward_scale", option["reward_scale"], "positive", lambda value: value > 0.0)
    check_policy_kwargs(model.policy_class, model.policy_kwargs)
    check_policy_space(model.policy_class, model.policy_kwargs, model.observation_space)
    check_replay_buffer(model)


def initial_ent_coef(ent_coef: str | float) -> float:
    """
    :param ent_coef: a number, "auto" or "auto_<initial value>"
    :return: the temperature to start with
    :raises ValueError: if it is none of these
    """
    text = str(ent_coef)
    learned = isinstance(ent_coef, str) and text.startswith("auto")
    try:
        value = 1.0 if text == "auto" else float(text.removeprefix("auto_"))
    except ValueError as error:
        raise ValueError(f"ent_coef must be a number, 'auto' or 'auto_<initial value>', got {ent_coef!r}.") from error
    # AssertionError as in SAC
    assert not learned or value > 0.0, f"The initial value of ent_coef must be greater than 0, got {ent_coef!r}."
    if not 0.0 <= value < math.inf:
        raise ValueError(f"ent_coef must be finite and not negative, got {ent_coef!r}: use 0 for no entropy bonus.")
    return value


def check_number_or_schedule(name: str, value: Any, expected: str, is_valid: Callable[[float], bool]) -> None:
    """
    :raises ValueError: if it is neither a schedule nor a valid number
    """
    if callable(value):
        return
    if not _is_number(value) or not is_valid(value):
        raise ValueError(
            f"{name} must be a number that is {expected}, or a schedule of the remaining progress, got {value!r}."
        )


def finite_number(name: str, value: Any, alternative: str) -> float:
    """
    :return: the value as a Python float
    :raises ValueError: if it is not a finite number
    """
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{name} must be a finite number or {alternative}, got {value!r}.")
    return number


def _is_number(value: Any) -> bool:
    """:return: whether it is a finite number, Python's or NumPy's"""
    return isinstance(value, numbers.Real) and math.isfinite(value)


def check_arguments(
    policy: Any, aliases: dict[str, type[BasePolicy]], policy_kwargs: Any, replay_buffer_kwargs: Any, device: th.device | str
) -> None:
    """
    Look at what SB3's constructors use at once.

    :raises ValueError: if an argument has a value that cannot work
    :raises TypeError: if what holds keywords is no dict
    """
    check_policy(policy, aliases)
    for name, example, kwargs in (
        ("policy_kwargs", "net_arch=[256, 256]", policy_kwargs),
        ("replay_buffer_kwargs", "handle_timeout_termination=False", replay_buffer_kwargs),
    ):
        if kwargs is not None and not isinstance(kwargs, dict):
            raise TypeError(f"{name} must be a dict such as dict({example}), got {kwargs!r}.")
    check_device(device)


def check_policy(policy: str | type[BasePolicy], aliases: dict[str, type[BasePolicy]]) -> None:
    """
    :param aliases: names that may be given instead of a class
    :raises ValueError: if it is an unknown name, or a class without value network
    """
    if isinstance(policy, type) and not issubclass(policy, SACVPolicy):
        raise ValueError(
            f"{policy.__module__}.{policy.__qualname__} has no value network: use MlpPolicy, CnnPolicy or MultiInputPolicy "
            "of sb3_softvalue or a subclass of its SACVPolicy (SACV.from_sac makes a SACV of a model that SB3's SAC saved)."
        )
    if not isinstance(policy, type) and policy not in tuple(aliases):
        raise ValueError(f"policy must be {', '.join(map(repr, aliases))} or the class of a policy, got {policy!r}.")


def check_device(device: th.device | str) -> None:
    """
    :raises ValueError: if PyTorch knows no such device
    """
    try:
        th.device("cpu" if device == "auto" else device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device must be 'auto', 'cpu', 'cuda' or another that PyTorch knows, got {device!r}.") from error


def check_seed(seed: int | None) -> None:
    """
    :raises ValueError: if NumPy takes no such seed
    """
    if seed is not None:
        check_whole_number("seed", seed, minimum=0)
        if seed >= 2**32:
            raise ValueError(f"seed must be less than 2**32, got {seed!r}.")


def check_train_freq(train_freq: Any, n_envs: int) -> None:
    """
    :raises ValueError: if it is neither a number of steps nor a pair of a number and its unit, or counts episodes of several
        environments
    """
    if isinstance(train_freq, TrainFreq):  # of a model that was loaded
        return
    frequency, unit = train_freq if isinstance(train_freq, tuple) and len(train_freq) == 2 else (train_freq, "step")
    is_whole = isinstance(frequency, int) and not isinstance(frequency, bool)
    if not is_whole or frequency < 1 or unit not in ("step", "episode"):
        raise ValueError(
            "train_freq must be a whole number of steps of at least 1, or such a number and its unit as in (1, 'episode') "
            f"or (4, 'step'), got {train_freq!r}."
        )
    if unit == "episode" and n_envs > 1:  # AssertionError as in SB3, which says so when learn() has begun
        raise AssertionError(
            f"train_freq={train_freq!r} counts the episodes of one environment, and there are {n_envs}: use steps, or one "
            "environment."
        )


def check_action_noise(action_noise: Any, action_space: spaces.Space) -> None:
    """
    :raises ValueError: if it is none, or SB3's for other actions
    """
    if action_noise is not None and not isinstance(action_noise, ActionNoise):
        raise ValueError(
            "action_noise must be None or an ActionNoise of stable_baselines3.common.noise such as NormalActionNoise, "
            f"got {action_noise!r}."
        )
    noise = getattr(action_noise, "base_noise", action_noise)
    if isinstance(noise, (NormalActionNoise, OrnsteinUhlenbeckActionNoise)):
        shape = np.shape(noise._mu + noise._sigma)
        if shape not in ((), (1,), action_space.shape):
            raise ValueError(f"action_noise must have the shape of an action, {action_space.shape}, got {shape}.")


def check_replay_buffer(model: SAC) -> None:
    """
    :raises ValueError: if SB3's buffers cannot do what they are asked together
    :raises TypeError: if ``replay_buffer_kwargs`` names an argument that the buffer does not have
    """
    kwargs = model.replay_buffer_kwargs
    is_dict = isinstance(model.observation_space, spaces.Dict)
    buffer_class = model.replay_buffer_class
    if buffer_class is not None and not (isinstance(buffer_class, type) and issubclass(buffer_class, ReplayBuffer)):
        raise ValueError(f"replay_buffer_class must be a subclass of SB3's ReplayBuffer, got {buffer_class!r}.")
    if buffer_class is not None and issubclass(buffer_class, DictReplayBuffer) and not is_dict:
        raise ValueError(f"{buffer_class.__name__} needs Dict observations, got {model.observation_space}.")
    if is_dict and model.n_steps > 1 and model.replay_buffer_class is None:
        raise ValueError("n_steps must be 1 where observations are a Dict: SB3 has no n-step replay buffer for them.")
    if model.replay_buffer_class is None:
        unknown = sorted(set(kwargs) - {"handle_timeout_termination"} - ({"n_steps", "gamma"} if model.n_steps > 1 else set()))
        if unknown:
            raise TypeError(
                f"SB3's ReplayBuffer has no argument {', '.join(unknown)}: replay_buffer_kwargs may hold "
                "handle_timeout_termination, or replay_buffer_class be a class that has it."
            )
    if model.optimize_memory_usage:
        if is_dict or issubclass(model.replay_buffer_class or object, DictReplayBuffer) or model.n_steps > 1:
            raise ValueError(
                "optimize_memory_usage must be False with Dict observations, HER or n_steps over 1: SB3's replay buffers "
                "cannot do both."
            )
        if model.replay_buffer_class is None and kwargs.get("handle_timeout_termination", True):
            raise ValueError(
                "optimize_memory_usage needs replay_buffer_kwargs=dict(handle_timeout_termination=False): SB3's replay buffer "
                "cannot do both."
            )
        if model.buffer_size // model.n_envs < 2:
            raise ValueError(
                f"buffer_size must be at least {2 * model.n_envs}, two transitions of each environment, with "
                f"optimize_memory_usage, got {model.buffer_size!r}: one of them is always half overwritten."
            )


def check_policy_kwargs(policy_class: type[BasePolicy], policy_kwargs: dict[str, Any]) -> None:
    """
    :raises TypeError: if the policy has no such argument
    """
    check_net_arch(policy_kwargs.get("net_arch"))
    check_optimizer_class(policy_kwargs.get("optimizer_class", th.optim.Adam))
    parameters = inspect.signature(policy_class).parameters
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    accepted = [name for name in parameters if name not in ("observation_space", "action_space", "lr_schedule")]
    unknown = [name for name in policy_kwargs if name not in accepted]
    if unknown:
        raise TypeError(
            f"{policy_class.__name__} has no argument {', '.join(unknown)}: policy_kwargs may hold {', '.join(accepted)}."
        )


def check_optimizer_class(optimizer_class: Any) -> None:
    """
    :raises ValueError: if its steps need more than gradients
    """
    step = getattr(optimizer_class, "step", None)
    closure = inspect.signature(step).parameters.get("closure") if callable(step) else None
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ValueError(
            f"optimizer_class must step from gradients alone and {optimizer_class.__name__} needs a closure: use Adam."
        )


def check_net_arch(net_arch: Any) -> None:
    """
    :raises ValueError: if it does not tell the layers of the networks
    """
    if net_arch is None:
        return
    layers = net_arch if isinstance(net_arch, dict) else {"pi": net_arch, "qf": net_arch}
    unknown = sorted(set(layers) - {"pi", "qf", "vf"})
    if unknown:
        raise ValueError(f"net_arch has no network {unknown}: use 'pi', 'qf' and 'vf' (as 'qf' when left out).")
    is_complete = {"pi", "qf"} <= set(layers) and all(isinstance(sizes, (list, tuple)) for sizes in layers.values())
    if not is_complete or not all(isinstance(size, int) and size >= 1 for sizes in layers.values() for size in sizes):
        raise ValueError(
            "net_arch must be a list of layer sizes of at least 1, or such lists for 'pi', 'qf' and, where it differs, 'vf', "
            f"got {net_arch!r}."
        )


def check_whole_number(name: str, value: Any, minimum: int) -> None:
    """
    :raises ValueError: if it is not a whole number of at least ``minimum``
    """
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < minimum:
        raise ValueError(f"{name} must be a whole number of at least {minimum}, got {value!r}.")


def check_fraction(name: str, value: Any) -> None:
    """
    :raises ValueError: if it does not lie between 0 and 1
    """
    if not _is_number(value) or not 0.0 <= value <= 1.0:
        raise ValueError(f"{name} must lie between 0 and 1, got {value!r}.")


def check_max_grad_norm(max_grad_norm: float | None) -> None:
    """
    :raises ValueError: if it is neither None nor positive
    """
    if max_grad_norm is not None and not (_is_number(max_grad_norm) and max_grad_norm > 0.0):
        raise ValueError(f"max_grad_norm must be a positive number, got {max_grad_norm!r}: use None for no clipping.")


def check_one_of(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """
    :raises ValueError: if it is none of the choices
    """
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}.")
