"""The equations of Soft Actor-Critic with a value network: one function per equation, from tensors to a tensor.

"Eq." numbers refer to Haarnoja et al. 2018, https://arxiv.org/abs/1801.01290 (v2). The learned temperature is from
Haarnoja et al. 2018b, https://arxiv.org/abs/1812.05905. Every per-sample quantity has shape (batch, 1), since a (batch,)
tensor would silently broadcast against it to (batch, batch).

The functions contain no networks and stop no gradients: the caller does (see ``objective.py``).
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import torch as th
from torch.nn import functional as F
from torch.optim.swa_utils import get_ema_multi_avg_fn

# Keeps log(1 - a^2) finite at a = +-1, as in the authors' code and in SB3's SquashedDiagGaussianDistribution
SQUASH_EPSILON = 1e-6
LOG_SQRT_2PI = 0.5 * math.log(2.0 * math.pi)
ACTION_PRIORS = ("uniform", "normalized_uniform", "normal")


def squash_log_det(actions: th.Tensor) -> th.Tensor:
    """
    Log-determinant of the tanh squashing, Σ_d log(1 - a_d²): the correction term of Eq. 21 (appendix C).

    :param actions: squashed actions in [-1, 1], shape (..., action_dim)
    :return: shape (..., 1), in nats
    """
    return th.log(1.0 - actions**2 + SQUASH_EPSILON).sum(dim=-1, keepdim=True)


def squashed_gaussian(mean: th.Tensor, log_std: th.Tensor, noise: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
    """
    Reparameterised sample of the squashed Gaussian policy and its log-density, Eq. 11 and 21:
    a = tanh(μ + σ·ε), log π(a|s) = Σ_d [log N(ε_d; 0, 1) - log σ_d - log(1 - a_d²)].

    :param mean: mean of the Gaussian before squashing, shape (batch, action_dim)
    :param log_std: log of its standard deviation, shape (batch, action_dim)
    :param noise: standard normal noise ε, shape (batch, action_dim)
    :return: actions in [-1, 1], shape (batch, action_dim), and their log-density in nats, shape (batch, 1)
    """
    actions = th.tanh(mean + log_std.exp() * noise)
    gaussian_log_prob = (-0.5 * noise**2 - log_std - LOG_SQRT_2PI).sum(dim=-1, keepdim=True)
    return actions, gaussian_log_prob - squash_log_det(actions)


def normal_log_prior(actions: th.Tensor) -> th.Tensor:
    """
    Log-density of the standard normal action prior, Σ_d log N(a_d; 0, 1), as in the authors' code. With a prior, a
    Kullback-Leibler divergence replaces the entropy in the objective.

    :param actions: squashed actions in [-1, 1], shape (batch, action_dim)
    :return: shape (batch, 1), in nats
    """
    return (-0.5 * actions**2 - LOG_SQRT_2PI).sum(dim=-1, keepdim=True)


def action_log_prior(action_prior: str, actions: th.Tensor) -> th.Tensor | float:
    """
    log p(a) of Eq. 6 and Eq. 12. "uniform" drops the constant: the bonus is the entropy α·H(π). "normalized_uniform" is the
    density 2^-d of the cube [-1, 1]^d: the bonus is -α·KL(π || p), which is zero for a uniform policy.

    :param action_prior: "uniform", "normalized_uniform" or "normal"
    :param actions: squashed actions in [-1, 1], shape (batch, action_dim)
    :return: in nats; a number if it is the same for all actions, else shape (batch, 1)
    """
    if action_prior == "normal":
        return normal_log_prior(actions)
    if action_prior == "normalized_uniform":
        return -actions.shape[-1] * math.log(2.0)
    if action_prior != "uniform":
        raise ValueError(f"action_prior must be one of {', '.join(map(repr, ACTION_PRIORS))}, got {action_prior!r}.")
    return 0.0


def min_over_critics(q_values: Sequence[th.Tensor]) -> th.Tensor:
    """
    Minimum over all critics, min_i Q_i(s, a), used in Eq. 6 and Eq. 13 against over-estimation.

    :param q_values: one tensor of shape (batch, 1) per critic
    :return: shape (batch, 1)
    """
    return th.cat(tuple(q_values), dim=1).min(dim=1, keepdim=True).values


def soft_q_target(rewards: th.Tensor, dones: th.Tensor, discounts: th.Tensor | float, next_values: th.Tensor) -> th.Tensor:
    """
    Target of the Q-functions, Eq. 8: r + (1 - done)·γ·V̄(s'). V̄ already contains the entropy.

    :param rewards: scaled rewards, shape (batch, 1)
    :param dones: 1 where the episode terminated (not where it was truncated), shape (batch, 1)
    :param discounts: γ, or γ^n for n-step returns, shape (batch, 1)
    :param next_values: target values V̄(s'), shape (batch, 1)
    :return: shape (batch, 1)
    """
    return rewards + (1.0 - dones) * discounts * next_values


def soft_q_loss(q_values: Sequence[th.Tensor], target_q_values: th.Tensor) -> th.Tensor:
    """
    Soft Bellman residual of all critics, Eq. 7: J_Q = Σ_i ½ mean (Q_i(s, a) - target)².

    :param q_values: one tensor of shape (batch, 1) per critic, at the buffer's actions
    :param target_q_values: Eq. 8, shape (batch, 1)
    :return: scalar
    """
    losses = [F.mse_loss(q, target_q_values) for q in q_values]
    return 0.5 * th.stack(losses).sum()


def soft_value_target(
    min_q_values: th.Tensor, log_prob: th.Tensor, ent_coef: th.Tensor, log_prior: th.Tensor | float = 0.0
) -> th.Tensor:
    """
    One-sample estimate of the soft state value, Eq. 3 and Eq. 6: min_i Q_i(s, a) - α·(log π(a|s) - log p(a)).

    :param min_q_values: at a new action of the current policy, shape (batch, 1)
    :param log_prob: log π(a|s) of that action, shape (batch, 1)
    :param ent_coef: temperature α (1/reward scale in the paper), scalar or shape (1,)
    :param log_prior: log p(a), a number or of shape (batch, 1), see ``action_log_prior``
    :return: shape (batch, 1)
    """
    return min_q_values - ent_coef * (log_prob - log_prior)


def soft_value_loss(values: th.Tensor, target_values: th.Tensor) -> th.Tensor:
    """
    Squared residual of the value network, Eq. 5: J_V = ½ mean (V(s) - target)².

    :param values: V(s), shape (batch, 1)
    :param target_values: Eq. 6, shape (batch, 1)
    :return: scalar
    """
    return 0.5 * F.mse_loss(values, target_values)


def policy_loss(
    min_q_values: th.Tensor, log_prob: th.Tensor, ent_coef: th.Tensor, log_prior: th.Tensor | float = 0.0
) -> th.Tensor:
    """
    Policy objective, Eq. 12: J_π = mean [α·(log π(a|s) - log p(a)) - min_i Q_i(s, a)], with reparameterised actions a.

    :param min_q_values: shape (batch, 1)
    :param log_prob: log π(a|s), shape (batch, 1)
    :param ent_coef: temperature α, scalar or shape (1,)
    :param log_prior: log p(a), a number or of shape (batch, 1), see ``action_log_prior``
    :return: scalar
    """
    return -soft_value_target(min_q_values, log_prob, ent_coef, log_prior).mean()


def temperature_loss(log_ent_coef: th.Tensor, log_prob: th.Tensor, target_entropy: th.Tensor | float) -> th.Tensor:
    """
    Objective of the learned temperature, Eq. 18 of arXiv 1812.05905 in the form of SB3 and softlearning, linear in
    log α: J_α = -mean log α·(log π(a|s) + target entropy).

    :param log_ent_coef: log α, shape (1,)
    :param log_prob: log π(a|s), shape (batch, 1)
    :param target_entropy: in nats
    :return: scalar
    """
    return -(log_ent_coef * (log_prob + target_entropy)).mean()


# The function for one decay is created once, as this takes as long as the update itself
_moving_average = lru_cache(get_ema_multi_avg_fn)


def polyak_update(params: Sequence[th.Tensor], target_params: Sequence[th.Tensor], tau: float) -> None:
    """
    Moving average of the target network, last line of algorithm 1, in place: ψ̄ ← τ·ψ + (1 - τ)·ψ̄.

    :param params: ψ
    :param target_params: ψ̄, same shapes as ``params``
    :param tau: 1 copies ``params``
    """
    # One call for all parameters
    _moving_average(1.0 - tau)(list(target_params), list(params), None)
