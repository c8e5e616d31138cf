"""Values, densities and entropies that a model predicts, from NumPy to NumPy. Nothing here affects training."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.preprocessing import get_action_dim
from stable_baselines3.common.type_aliases import PyTorchObs

# A SACV, which imports this file: the class cannot be imported here
Model = Any

Observation = np.ndarray | dict[str, np.ndarray]


def values(model: Model, observation: Observation) -> np.ndarray:
    """See ``SACV.predict_values``."""
    _check_complete(model, observation)
    return _evaluate(model, observation, lambda obs: model.value(obs).squeeze(dim=1))


def q_values(model: Model, observation: Observation, actions: np.ndarray) -> np.ndarray:
    """See ``SACV.predict_q_values``."""
    _check_complete(model, observation)
    return _evaluate(model, observation, lambda obs, scaled: th.cat(model.critic(obs, scaled), dim=1), actions)


def log_prob(model: Model, observation: Observation, actions: np.ndarray) -> np.ndarray:
    """See ``SACV.action_log_prob``."""
    space = model.action_space
    assert isinstance(space, spaces.Box)
    # Log of the Jacobian of the scaling to the environment's units
    log_scale = float(np.log((space.high - space.low).astype(np.float64) / 2.0).sum())
    return _evaluate(
        model, observation, lambda obs, scaled: model.policy.log_prob(obs, scaled).squeeze(dim=1) - log_scale, actions
    )


def entropy(model: Model, observation: Observation, n_samples: int, seed: int) -> np.ndarray:
    """See ``SACV.entropy``."""
    # A separate generator keeps the random numbers of training unchanged
    generator = th.Generator(device=model.device).manual_seed(seed)
    return _evaluate(model, observation, lambda obs: model.policy.entropy(obs, n_samples, generator).squeeze(dim=1))


def _evaluate(
    model: Model, observation: Observation, function: Callable[..., th.Tensor], actions: np.ndarray | None = None
) -> np.ndarray:
    """
    Evaluate the networks on NumPy observations, as ``predict`` does.

    :param observation: one observation or a batch of n
    :param function: maps tensors of observations and, if given, scaled actions to shape (n, ...)
    :param actions: in the environment's units
    :return: shape (n, ...), or (...) for one observation
    """
    if isinstance(observation, tuple):
        raise ValueError(
            "The observation is a tuple: with the Gymnasium API, call `obs, info = env.reset()` and pass only obs."
        )
    # Switch to eval mode (this affects batch norm / dropout)
    model.policy.set_training_mode(False)
    obs, vectorized = model.policy.obs_to_tensor(observation)
    arguments: list[PyTorchObs] = [obs]
    if actions is not None:
        scaled_actions = _scale_actions(model, actions)
        n_observations = len(next(iter(obs.values())) if isinstance(obs, dict) else obs)
        if len(scaled_actions) != n_observations:
            raise ValueError(
                f"Got {n_observations} observations but {len(scaled_actions)} actions: pass one action per observation."
            )
        arguments.append(th.as_tensor(scaled_actions, device=model.device))
    with th.no_grad():
        result = function(*arguments).cpu().numpy()
    return result if vectorized else result.squeeze(axis=0)


def _check_complete(model: Model, observation: Observation) -> None:
    """:raises ValueError: if a key of a Dict observation is missing"""
    if isinstance(observation, dict):
        missing = [key for key in model.observation_space.spaces if key not in observation]
        if missing:
            raise ValueError(f"Q and V need all observations, but {missing} is missing: pass them.")


def _scale_actions(model: Model, actions: np.ndarray) -> np.ndarray:
    """
    :param actions: in the environment's units, shape (n, *action_shape) or action_shape
    :return: in [-1, 1], shape (n, action_dim), float32
    :raises ValueError: if the shape is wrong or an action is outside the action space
    """
    space = model.action_space
    assert isinstance(space, spaces.Box)
    actions = np.asarray(actions, dtype=np.float32)
    if actions.shape != space.shape and actions.shape[1:] != space.shape:
        raise ValueError(f"Got actions of shape {actions.shape}, expected {space.shape} or a batch of that shape.")
    scaled = model.policy.scale_action(actions.reshape(-1, *space.shape)).reshape(-1, get_action_dim(space))
    # Rounding may move an action at a bound just over it
    if not np.all(np.abs(scaled) <= 1.0 + 1e-5):
        raise ValueError(f"Actions must be inside the action space {space}, in its own units.")
    return np.clip(scaled, -1.0, 1.0).astype(np.float32)
