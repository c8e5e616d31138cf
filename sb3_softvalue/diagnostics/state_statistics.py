"""The outputs of all networks of a model for many states."""

from typing import Any, NamedTuple

import numpy as np
import torch as th
from gymnasium import spaces

from sb3_softvalue import equations
from sb3_softvalue.diagnostics.observations import Observations, take
from sb3_softvalue.sacv import SACV

# Size of the largest batch of observations per forward pass, in float32
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


@th.no_grad()
def read_states(model: SACV, observations: Observations, n_samples: int = 4, seed: int = 0) -> StateStatistics:
    """
    Evaluate all networks on many states. A separate random generator samples the actions, so that training is not affected.

    :param model: a SACV
    :param observations: batch of n, as for ``predict`` (normalized if the model was trained with ``VecNormalize``)
    :param n_samples: sampled actions per state
    :param seed: seed of the samples
    :return: the outputs for each state
    """
    policy = model.policy
    policy.set_training_mode(False)
    generator = th.Generator(device=model.device).manual_seed(seed)
    ent_coef = th.tensor(temperature(model))
    n_states = len(next(iter(observations.values())) if isinstance(observations, dict) else observations)
    n_rows = max(1, _CHUNK_BYTES // (4 * spaces.flatdim(model.observation_space)))
    chunks = []
    for start in range(0, n_states, n_rows):
        obs, _ = policy.obs_to_tensor(take(observations, slice(start, start + n_rows)))
        gaussian = policy.action_distribution(obs)
        mean, log_std = gaussian.mean, gaussian.stddev.log()
        noises = th.randn(len(mean), n_samples, mean.shape[1], generator=generator, device=mean.device, dtype=mean.dtype)
        samples = []
        for noise in noises.unbind(dim=1):
            actions, log_prob = equations.squashed_gaussian(mean, log_std, noise)
            log_prior = equations.action_log_prior(model.action_prior, actions)
            min_q_values = equations.min_over_critics(policy.critic(obs, actions))
            soft_q_values = equations.soft_value_target(min_q_values, log_prob, ent_coef, log_prior)
            samples.append(th.cat([soft_q_values, -log_prob, log_prior - log_prob], dim=1))
        means = th.stack(samples).mean(dim=0)
        chunks.append(th.cat([policy.value(obs), policy.value_target(obs), means], dim=1))
    return StateStatistics(*th.cat(chunks).T.double().cpu().numpy())


def check_has_value(model: Any) -> None:
    """
    :param model: any SB3 model
    :raises TypeError: if it is no SACV
    """
    if not isinstance(model, SACV):
        raise TypeError(f"{type(model).__name__} has no soft value network: train with sb3_softvalue.SACV instead.")
