"""The outputs of all networks of a model for many states."""

from typing import Any, NamedTuple

import numpy as np
import torch as th
from stable_baselines3.common.type_aliases import PyTorchObs

from sb3_softvalue import equations
from sb3_softvalue.diagnostics.observations import Observations, arrays_of, length, take
from sb3_softvalue.sacv import SACV

# Size of the largest batch of observations per forward pass, repeated for each sampled action, in float32
_CHUNK_BYTES = 32 * 1024**2


class StateStatistics(NamedTuple):
    """Outputs of the networks for n states, each of shape (n,), float64."""

    values: np.ndarray
    """V(s)"""
    target_values: np.ndarray
    """V̄(s)"""
    soft_q_values: np.ndarray
    """E_a [min_i Q_i(s, a) - α·(log π(a|s) - log p(a))], the regression target of V (Eq. 6)"""
    entropies: np.ndarray
    """E_a [-log π(a|s)], nats over the squashed action in [-1, 1]"""
    bonuses: np.ndarray
    """E_a [-(log π(a|s) - log p(a))], the factor of α in the objective: the entropy if ``action_prior="uniform"``"""


def temperature(model: SACV) -> float:
    """
    :param model: a SACV
    :return: the current α, learned or fixed
    """
    return float(model.temperature().ent_coef)


def reward_scale(model: SACV) -> float:
    """
    :param model: a SACV
    :return: the current reward scale, a number or from a schedule
    """
    scale = model.reward_scale
    return float(scale(model._current_progress_remaining) if callable(scale) else scale)


def read_states(model: SACV, observations: Observations, n_samples: int = 4, seed: int = 0) -> StateStatistics:
    """
    Evaluate all networks on many states. A separate random generator samples the actions, so that training is not affected.

    :param model: a SACV
    :param observations: batch of n, as for ``predict`` (normalized if the model was trained with ``VecNormalize``)
    :param n_samples: sampled actions per state
    :param seed: seed of the samples
    :return: the outputs for each state
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
    :param n_samples: sampled actions per state
    :param generator: random generator of the samples
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
    :param model: any SB3 model
    :raises TypeError: if it is no SACV
    """
    if not isinstance(model, SACV):
        raise TypeError(f"{type(model).__name__} has no soft value network: train with sb3_softvalue.SACV instead.")
