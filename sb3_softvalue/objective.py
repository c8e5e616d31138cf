"""The joint objective of SAC with a value network, one scalar, and its gradients.

The gradients of J_Q, J_V, J_π and J_α are all taken at the weights before the step, as in the authors' code. With the
paper's stop-gradients, each network receives exactly the gradient of its own loss from the sum of the four. The update
therefore needs one forward and one backward pass. Nothing here depends on replay buffers, optimizers or the backend.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch as th
from stable_baselines3.common.distributions import SquashedDiagGaussianDistribution
from stable_baselines3.common.policies import ContinuousCritic
from stable_baselines3.common.type_aliases import PyTorchObs
from stable_baselines3.sac.policies import Actor
from torch import nn
from torch.func import functional_call

from sb3_softvalue import equations
from sb3_softvalue.policies import ValueNetwork

# SB3's implementation, to detect where a user has replaced it: in a subclass, on the class, or on an actor
_ACTION_LOG_PROB = Actor.action_log_prob


class Batch(NamedTuple):
    """Transitions of one gradient step. All tensors except observations and actions have shape (batch, 1)."""

    observations: PyTorchObs
    """Shape (batch, *obs_shape), or a dict of such"""
    actions: th.Tensor
    """Actions in [-1, 1], shape (batch, action_dim)"""
    next_observations: PyTorchObs
    """Like ``observations``"""
    dones: th.Tensor
    """1 where the episode terminated, 0 where it continued or was truncated"""
    rewards: th.Tensor
    """After ``reward_scale``"""
    discounts: th.Tensor
    """γ, or the replay buffer's discounts of n-step returns"""


class Temperature(NamedTuple):
    """The temperature α of one gradient step."""

    ent_coef: th.Tensor
    """α without gradient, shape () or (1,)"""
    log_ent_coef: th.Tensor | None = None
    """log α, the learned parameter, shape (1,); None if α is fixed"""
    target_entropy: th.Tensor | None = None
    """In nats, shape (); only used if α is learned"""


class UpdateInputs(NamedTuple):
    """Everything that the gradients of an update depend on, except the networks."""

    batch: Batch
    noise: th.Tensor | None
    """Standard normal noise, shape (batch, action_dim); None if the actor draws its own (``draws_own_noise``)"""
    temperature: Temperature


class Metrics(NamedTuple):
    """What one gradient step reports: detached scalars that stay on the device until ``train()`` reads them once."""

    actor_loss: th.Tensor
    """J_π, Eq. 12"""
    critic_loss: th.Tensor
    """J_Q, Eq. 7, summed over critics"""
    value_loss: th.Tensor
    """J_V, Eq. 5"""
    ent_coef: th.Tensor
    """α before the step"""
    ent_coef_loss: th.Tensor
    """J_α of the log temperature; zero if the temperature is fixed"""
    entropy: th.Tensor
    """-mean log π(a|s), nats"""
    value_mean: th.Tensor
    """Mean of V(s), in the unit of the scaled reward"""
    qf_mean: th.Tensor
    """Mean of Q(s, a) at the buffer's actions over critics and batch, in the same unit"""
    found_inf: th.Tensor | float = 0.0
    """1 if a loss or gradient is not finite and the step must be skipped; PyTorch's name for this flag"""


# Gradients (None for parameters that the objective does not depend on), and all metrics in order as one tensor
Gradients = tuple[Sequence[th.Tensor | None], th.Tensor]
GradientFunction = Callable[["JointObjective", Sequence[th.Tensor], UpdateInputs, bool], Gradients]


def draw_noise(actor: Actor, batch_size: int, device: th.device) -> th.Tensor | None:
    """
    Draw the noise of one gradient step: the same numbers that SB3's ``action_log_prob`` would draw from the same seed.

    :param actor: the policy network
    :param batch_size: number of actions
    :param device: device of the network
    :return: shape (batch_size, action_dim), or None if the actor draws its own (``draws_own_noise``)
    """
    if actor.use_sde:
        # log_std may have changed between two gradient steps
        actor.reset_noise()
    if draws_own_noise(actor):
        return None
    return th.randn(batch_size, actor.action_dist.action_dim, device=device)


def draws_own_noise(actor: Actor) -> bool:
    """
    :param actor: the policy network
    :return: whether its own ``action_log_prob`` must be called because it is not SB3's squashed Gaussian: with gSDE, another
        distribution or an overridden method
    """
    is_sb3s = getattr(actor.action_log_prob, "__func__", None) is _ACTION_LOG_PROB
    return actor.use_sde or not is_sb3s or type(actor.action_dist) is not SquashedDiagGaussianDistribution


def sample_actions(actor: Actor, observations: PyTorchObs, noise: th.Tensor | None) -> tuple[th.Tensor, th.Tensor]:
    """
    One reparameterised action per observation, with its log-density.

    :param actor: the policy network
    :param observations: shape (batch, *obs_shape), or a dict of such
    :param noise: standard normal noise, shape (batch, action_dim); None if the actor draws its own (``draws_own_noise``)
    :return: actions in [-1, 1], shape (batch, action_dim), and their log-density in nats, shape (batch, 1)
    """
    if noise is None:
        actions, log_prob = actor.action_log_prob(observations)
        return actions, log_prob.reshape(-1, 1)
    mean, log_std, _ = actor.get_action_dist_params(observations)
    return equations.squashed_gaussian(mean, log_std, noise)


def stopped_critic(critic: ContinuousCritic, observations: PyTorchObs, actions: th.Tensor) -> tuple[th.Tensor, ...]:
    """
    Q-values whose gradient reaches the actions but not the critic's parameters.

    :param critic: the Q-networks
    :param observations: shape (batch, *obs_shape), or a dict of such
    :param actions: in [-1, 1], shape (batch, action_dim)
    :return: one tensor of shape (batch, 1) for each critic
    """
    parameters = {name: param.detach() for name, param in critic.named_parameters()}
    return functional_call(critic, parameters, (observations, actions))


class JointObjective(nn.Module):
    """
    J_Q + J_V + J_π + J_α as one differentiable scalar: the gradient of each parameter is that of its own loss.

    :param actor: the policy network; only J_π trains a shared features extractor, as in SB3
    :param critic: the Q-networks
    :param value: V
    :param value_target: V̄
    :param action_prior: see ``equations.action_log_prior``
    """

    def __init__(
        self,
        actor: Actor,
        critic: ContinuousCritic,
        value: ValueNetwork,
        value_target: ValueNetwork,
        action_prior: str = "uniform",
    ):
        super().__init__()
        self.actor = actor
        self.critic = critic
        self.value = value
        self.value_target = value_target
        self.action_prior = action_prior

    @property
    def key(self) -> tuple[Any, ...]:
        """The networks and the prior that it was created from"""
        return self.actor, self.critic, self.value, self.value_target, self.action_prior

    def forward(self, inputs: UpdateInputs, update_actor: bool = True) -> tuple[th.Tensor, Metrics]:
        """
        :param inputs: transitions, noise and temperature
        :param update_actor: False leaves J_π and J_α out of the sum (``policy_delay``)
        :return: the objective, a scalar, and the metrics
        """
        batch, noise, (ent_coef, log_ent_coef, target_entropy) = inputs
        with th.set_grad_enabled(update_actor and th.is_grad_enabled()):
            actions_pi, log_prob = sample_actions(self.actor, batch.observations, noise)
            log_prior = equations.action_log_prior(self.action_prior, actions_pi)
            min_q_pi = equations.min_over_critics(stopped_critic(self.critic, batch.observations, actions_pi))
            actor_loss = equations.policy_loss(min_q_pi, log_prob, ent_coef, log_prior)

        with th.no_grad():
            next_values = self.value_target(batch.next_observations)
            target_q_values = equations.soft_q_target(batch.rewards, batch.dones, batch.discounts, next_values)
        q_values = self.critic(batch.observations, batch.actions)
        critic_loss = equations.soft_q_loss(q_values, target_q_values)

        values = self.value(batch.observations)
        target_values = equations.soft_value_target(min_q_pi, log_prob, ent_coef, log_prior).detach()
        value_loss = equations.soft_value_loss(values, target_values)

        objective = critic_loss + value_loss
        ent_coef_loss = th.zeros_like(actor_loss)
        if log_ent_coef is not None:
            assert target_entropy is not None
            ent_coef_loss = equations.temperature_loss(log_ent_coef, log_prob.detach(), target_entropy)
        if update_actor:
            objective = objective + actor_loss + ent_coef_loss

        return objective, Metrics(
            actor_loss=actor_loss.detach(),
            critic_loss=critic_loss.detach(),
            value_loss=value_loss.detach(),
            ent_coef=ent_coef.detach().reshape(()),
            ent_coef_loss=ent_coef_loss.detach(),
            entropy=-log_prob.detach().mean(),
            value_mean=values.detach().mean(),
            qf_mean=th.stack([q.detach().mean() for q in q_values]).mean(),
        )


def eager_gradients(
    objective: JointObjective, params: Sequence[th.Tensor], inputs: UpdateInputs, update_actor: bool = True
) -> Gradients:
    """
    Gradients of the joint objective from one backward pass: the reference for all other backends.

    :param objective: the joint objective
    :param params: the parameters of all optimizers
    :param inputs: transitions, noise and temperature
    :param update_actor: see ``JointObjective.forward``
    :return: one gradient per parameter, None where the objective does not depend on it, and the metrics as one tensor
    """
    total, metrics = objective(inputs, update_actor)
    gradients = th.autograd.grad(total, params, allow_unused=True)
    return gradients, pack_metrics(metrics, gradients)


def pack_metrics(metrics: Metrics, gradients: Sequence[th.Tensor | None]) -> th.Tensor:
    """
    :param metrics: metrics of a gradient step; ``found_inf`` is computed here
    :param gradients: all gradients of the step
    :return: the metrics in order, with ``found_inf``, shape (9,)
    """
    losses = th.stack(metrics[:-1])
    # A sum is finite only if all its terms are
    total = th.stack([losses.sum(), *(gradient.sum() for gradient in gradients if gradient is not None)]).sum()
    return th.cat([losses, th.isfinite(total).logical_not().to(losses.dtype).reshape(1)])


def map_tensors(function: Callable[[th.Tensor], Any], value: Any) -> Any:
    """
    :param function: applied to each tensor, in order
    :param value: nested named tuples and dicts of tensors, such as ``UpdateInputs``
    :return: the same structure with the results; everything else is kept
    """
    if isinstance(value, th.Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: map_tensors(function, item) for key, item in value.items()}
    if isinstance(value, tuple):
        return type(value)(*(map_tensors(function, item) for item in value))
    return value
