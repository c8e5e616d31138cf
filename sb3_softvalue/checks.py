"""What SACV refuses before any work starts, each with one sentence that says what to use instead."""

import inspect
import math
import numbers
from collections.abc import Callable
from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.sac.sac import SAC

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
    for name in ("target_update_interval", "batch_size", "buffer_size", "n_steps"):
        check_whole_number(name, option[name], minimum=1)
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


def check_policy(policy: str | type[BasePolicy]) -> None:
    """
    :raises ValueError: if it is a class without value network
    """
    if not isinstance(policy, (str, type)):
        raise ValueError(f"policy must be the name or the class of a policy, got {policy!r}.")
    if isinstance(policy, type) and not issubclass(policy, SACVPolicy):
        raise ValueError(
            f"{policy.__module__}.{policy.__qualname__} has no value network: use MlpPolicy, CnnPolicy or MultiInputPolicy "
            "of sb3_softvalue or a subclass of its SACVPolicy (SACV.from_sac makes a SACV of a model that SB3's SAC saved)."
        )


def check_policy_kwargs(policy_class: type[BasePolicy], policy_kwargs: dict[str, Any]) -> None:
    """
    :raises TypeError: if the policy has no such argument
    """
    parameters = inspect.signature(policy_class).parameters
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    accepted = [name for name in parameters if name not in ("observation_space", "action_space", "lr_schedule")]
    unknown = [name for name in policy_kwargs if name not in accepted]
    if unknown:
        raise TypeError(
            f"{policy_class.__name__} has no argument {', '.join(unknown)}: policy_kwargs may hold {', '.join(accepted)}."
        )


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
    assert np.all(action_space.low < action_space.high), (
        f"SACV scales actions from their bounds but the environment has {action_space}, where a lower bound is not below its "
        "upper one: leave out the dimension that cannot vary."
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
