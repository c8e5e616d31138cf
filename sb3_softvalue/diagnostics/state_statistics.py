"""The outputs of all networks of a model for many states at once."""

from typing import Any, NamedTuple

import numpy as np
import torch as th
from stable_baselines3.common.type_aliases import PyTorchObs

from sb3_softvalue import equations
from sb3_softvalue.diagnostics.observations import Observations, arrays_of, length, take
from sb3_softvalue.sacv import SACV

# Largest batch of observations, repeated for each sampled action and in float32, that one forward pass takes
_CHUNK_BYTES = 32 * 1024**2


class StateStatistics(NamedTuple):
    """Outputs of the networks for n states, each of shape (n,), float64."""

    values: np.ndarray
    """V(s)"""
    target_values: np.ndarray
    """V̄(s)"""
    soft_q_values: np.ndarray
    """E_a [min_i Q_i(s, a) - α·(log π(a|s) - log p(a))], what V is trained on (Eq. 6)"""
    entropies: np.ndarray
    """E_a [-log π(a|s)], nats over the squashed action in [-1, 1]"""
    bonuses: np.ndarray
    """E_a [-(log π(a|s) - log p(a))], what α multiplies in the objective: the entropy where ``action_prior="uniform"``"""


def temperature(model: SACV) -> float:
    """
    :param model: with a learned or a fixed temperature
    :return: the present α
    """
    return float(model.temperature().ent_coef)


def reward_scale(model: SACV) -> float:
    """
    :param model: with a number or a schedule as ``reward_scale``
    :return: the present factor of the rewards
    """
    scale = model.reward_scale
    return float(scale(model._current_progress_remaining) if callable(scale) else scale)


def read_states(model: SACV, observations: Observations, n_samples: int = 4, seed: int = 0) -> StateStatistics:
    """
    Evaluate all networks on many states. The sampled actions come from a random generator of their own, so that reading
    does not change a training.

    :param model: the model to read
    :param observations: batch of n, as ``predict`` takes them (normalized if the model was trained with ``VecNormalize``)
    :param n_samples: sampled actions for each state
    :param seed: of the samples
    :return: one number of each kind for each state
    """
    model.policy.set_training_mode(False)
    generator = th.Generator(device=model.device).manual_seed(seed)
    n_states = length(observations)
    n_floats = sum(array.size for array in arrays_of(observations)) // n_states
    n_rows = max(1, _CHUNK_BYTES // (4 * n_floats * n_samples))
    chunks = []
    for start in range(0, n_states, n_rows):
        obs, _ = model.policy.obs_to_tensor(take(observations, slice(start, start + n_rows)))
        chunks.append(_read_chunk(model, obs, n_samples, generator))
    return StateStatistics(*th.cat(chunks, dim=1).double().cpu().numpy())


@th.no_grad()
def _read_chunk(model: SACV, obs: PyTorchObs, n_samples: int, generator: th.Generator) -> th.Tensor:
    """
    :param obs: batch of n on the model's device
    :return: the fields of ``StateStatistics``, shape (5, n)
    """
    policy = model.policy
    gaussian = policy.action_distribution(obs)
    mean = gaussian.mean.repeat_interleave(n_samples, dim=0)
    log_std = gaussian.stddev.log().repeat_interleave(n_samples, dim=0)
    noise = th.randn(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
    actions, log_prob = equations.squashed_gaussian(mean, log_std, noise)
    log_prior = equations.action_log_prior(model.action_prior, actions)

    if isinstance(obs, dict):
        repeated: PyTorchObs = {key: tensor.repeat_interleave(n_samples, dim=0) for key, tensor in obs.items()}
    else:
        repeated = obs.repeat_interleave(n_samples, dim=0)
    min_q_values = equations.min_over_critics(policy.critic(repeated, actions))
    soft_q_values = equations.soft_value_target(min_q_values, log_prob, th.tensor(temperature(model)), log_prior)

    def mean_over_samples(samples: th.Tensor) -> th.Tensor:
        return samples.reshape(-1, n_samples).mean(dim=1)

    return th.stack(
        [
            policy.value(obs).squeeze(dim=1),
            policy.value_target(obs).squeeze(dim=1),
            mean_over_samples(soft_q_values),
            mean_over_samples(-log_prob),
            mean_over_samples(log_prior - log_prob),
        ]
    )


def check_has_value(model: Any) -> None:
    """
    :param model: any model of SB3
    :raises TypeError: if it has no value network
    """
    if not isinstance(model, SACV):
        raise TypeError(f"{type(model).__name__} has no soft value network to read: train with sb3_softvalue.SACV instead.")
