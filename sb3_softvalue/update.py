"""The whole update of SAC with a value network as one scalar, and one gradient step on it.

The gradients of J_Q, J_V, J_π and J_α are all taken at the weights before the step, as in the authors' code. With the
stop-gradients of the paper each network receives exactly its own loss's gradient from the sum of the four, so that one
forward and one backward pass make the update. Nothing here knows replay buffers or how the step is executed.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch as th
from stable_baselines3.common.policies import ContinuousCritic
from stable_baselines3.common.type_aliases import PyTorchObs
from stable_baselines3.sac.policies import Actor
from torch import nn
from torch.func import functional_call

from sb3_softvalue import equations
from sb3_softvalue.policies import SACVPolicy

ACTION_PRIORS = ("uniform", "normalized_uniform", "normal")


class Batch(NamedTuple):
    """Transitions of one gradient step; every tensor but the observations and actions has shape (batch, 1)."""

    observations: PyTorchObs
    """Shape (batch, *obs_shape), or a dict of such"""
    actions: th.Tensor
    """Actions in [-1, 1], shape (batch, action_dim)"""
    next_observations: PyTorchObs
    """Like ``observations``"""
    dones: th.Tensor
    """1 where the episode terminated, 0 where it went on or was truncated"""
    rewards: th.Tensor
    """Rewards as the buffer gives them, before ``reward_scale``"""
    discounts: th.Tensor | float
    """γ, or the buffer's own discounts for n-step returns"""

    def leaves(self) -> list[Any]:
        """:return: the fields in order, dict observations opened"""
        return _opened(self)

    def observation_leaves(self) -> list[th.Tensor]:
        """:return: those of ``leaves()`` that are observations"""
        return _opened((self.observations, self.next_observations))

    def with_leaves(self, leaves: Iterable[Any]) -> "Batch":
        """
        :param leaves: in place of ``leaves()``, in the same order
        :return: a batch of the same structure
        """
        new = iter(leaves)
        fields: list[Any] = [{key: next(new) for key in f} if isinstance(f, dict) else next(new) for f in self]
        return Batch(*fields)


def _opened(fields: Iterable[Any]) -> list[Any]:
    """:return: the same, values in place of a dict"""
    return [leaf for field in fields for leaf in (field.values() if isinstance(field, dict) else [field])]


class Temperature(NamedTuple):
    """The temperature α of one gradient step."""

    ent_coef: th.Tensor
    """α, held constant; scalar or shape (1,)"""
    log_ent_coef: th.Tensor | None = None
    """log α as the learned parameter, shape (1,); None when α is fixed"""
    target_entropy: th.Tensor | float = 0.0
    """In nats, of use only when α is learned"""


class Metrics(NamedTuple):
    """What one gradient step reports: detached scalars, left on the device until ``train()`` reads them once."""

    actor_loss: th.Tensor
    """J_π, Eq. 12"""
    critic_loss: th.Tensor
    """J_Q, Eq. 7, sum over critics"""
    value_loss: th.Tensor
    """J_V, Eq. 5"""
    ent_coef: th.Tensor
    """α before the step"""
    ent_coef_loss: th.Tensor
    """J_α of the log temperature; zero when the temperature is fixed"""
    entropy: th.Tensor
    """-mean log π(a|s), nats"""
    value_mean: th.Tensor
    """Mean of V(s), in the unit of the scaled reward"""
    qf_mean: th.Tensor
    """Mean of Q(s, a), in the same unit, over critics and batch at the buffer's actions"""


def mean_metrics(reports: th.Tensor) -> dict[str, float]:
    """
    :param reports: of each gradient step a row, see ``objective_gradients``, on the CPU
    :return: the mean of each metric over the gradient steps
    """
    # There mostly is one, whose mean would take a third of the time of all logging
    mean = reports[0] if len(reports) == 1 else reports.mean(dim=0)
    return dict(zip(Metrics._fields, mean.tolist(), strict=False))


def draw_noise(actor: Actor, batch_size: int, device: th.device) -> th.Tensor | None:
    """
    The noise of one gradient step, the same numbers that SB3's ``action_log_prob`` would draw from the same seed.

    :param actor: the policy network
    :param batch_size: number of actions
    :param device: of the network
    :return: shape (batch_size, action_dim), or None where the actor draws its own (``draws_own_noise``)
    """
    if actor.use_sde:
        # We need to sample because `log_std` may have changed between two gradient steps
        actor.reset_noise()
    if draws_own_noise(actor):
        return None
    return th.randn(batch_size, actor.action_dist.action_dim, device=device)


def sample_actions(actor: Actor, observations: PyTorchObs, noise: th.Tensor | None) -> tuple[th.Tensor, th.Tensor]:
    """
    One reparameterised action for each observation, with its log-density.

    :param actor: the policy network
    :param observations: shape (batch, *obs_shape), or a dict of such
    :param noise: standard normal draw, shape (batch, action_dim); None where the actor draws for itself (``draws_own_noise``)
    :return: actions in [-1, 1], shape (batch, action_dim), and their log-density in nats, shape (batch, 1)
    """
    if noise is None:
        actions, log_prob = actor.action_log_prob(observations)
        return actions, log_prob.reshape(-1, 1)
    mean, log_std, _ = actor.get_action_dist_params(observations)
    return equations.squashed_gaussian(mean, log_std, noise)


def draws_own_noise(actor: Actor) -> bool:
    """
    Whether the actor's distribution is not the plain squashed Gaussian (gSDE, or a subclass with its own sampling), so that
    its ``action_log_prob`` must be called instead of ours.

    :param actor: the policy network
    :return: True if so
    """
    return actor.use_sde or type(actor).action_log_prob is not Actor.action_log_prob


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


class InOrder:
    """The parts of the objective that do not depend on each other, one after the other."""

    def begin(self) -> None:
        """Called where the inputs of all parts are there."""

    def aside(self) -> AbstractContextManager[Any]:
        """:return: context for a part that needs nothing that was computed since ``begin``"""
        return nullcontext()

    def join(self) -> None:
        """Called before the results of the parts are used."""


class JointObjective(nn.Module):
    """
    J_Q + J_V + J_π + J_α as one differentiable scalar: the gradient of each parameter is that of its own loss.

    A module, so that ``torch.func.functional_call`` can evaluate it at other parameters.

    :param policy: gives actor, critic, value and value_target; a shared features extractor is trained by J_π only (SB3's rule)
    :param action_prior: one of ``ACTION_PRIORS``
    """

    def __init__(self, policy: SACVPolicy, action_prior: str = "uniform"):
        super().__init__()
        self.actor = policy.actor
        self.critic = policy.critic
        self.value = policy.value
        self.value_target = policy.value_target
        self.action_prior = action_prior
        self.order = InOrder()

    def forward(
        self, batch: Batch, noise: th.Tensor | None, temperature: Temperature, reward_scale: th.Tensor | float
    ) -> tuple[th.Tensor, Metrics]:
        """
        :param batch: transitions
        :param noise: standard normal draw, shape (batch, action_dim), or None (see ``sample_actions``)
        :param temperature: α
        :param reward_scale: factor of the rewards
        :return: the objective, a scalar, and what to report
        """
        ent_coef = temperature.ent_coef
        self.order.begin()
        actions_pi, log_prob = sample_actions(self.actor, batch.observations, noise)
        log_prior = equations.action_log_prior(self.action_prior, actions_pi)

        with self.order.aside():
            with th.no_grad():
                next_values = self.value_target(batch.next_observations)
                rewards = batch.rewards * reward_scale
                target_q_values = equations.soft_q_target(rewards, batch.dones, batch.discounts, next_values)
            q_values = self.critic(batch.observations, batch.actions)
            critic_loss = equations.soft_q_loss(q_values, target_q_values)

        min_q_pi = equations.min_over_critics(stopped_critic(self.critic, batch.observations, actions_pi))
        actor_loss = equations.policy_loss(min_q_pi, log_prob, ent_coef, log_prior)

        with self.order.aside():
            values = self.value(batch.observations)
        self.order.join()
        target_values = equations.soft_value_target(min_q_pi, log_prob, ent_coef, log_prior).detach()
        value_loss = equations.soft_value_loss(values, target_values)

        objective = critic_loss + value_loss + actor_loss
        ent_coef_loss = th.zeros_like(actor_loss)
        if temperature.log_ent_coef is not None:
            ent_coef_loss = equations.temperature_loss(temperature.log_ent_coef, log_prob.detach(), temperature.target_entropy)
            objective = objective + ent_coef_loss

        metrics = Metrics(
            actor_loss=actor_loss.detach(),
            critic_loss=critic_loss.detach(),
            value_loss=value_loss.detach(),
            ent_coef=ent_coef.detach().reshape(()),
            ent_coef_loss=ent_coef_loss.detach(),
            entropy=-log_prob.detach().mean(),
            value_mean=values.detach().mean(),
            qf_mean=th.stack([q.detach().mean() for q in q_values]).mean(),
        )
        return objective, metrics


def objective_gradients(
    objective: Callable[..., tuple[th.Tensor, Metrics]],
    params: Sequence[th.Tensor],
    batch: Batch,
    noise: th.Tensor | None,
    temperature: Temperature,
    reward_scale: th.Tensor | float,
) -> tuple[Sequence[th.Tensor | None], th.Tensor]:
    """
    Gradients of the joint objective by one backward pass: the reference that every other execution has to agree with.

    :param objective: the joint objective, or a function that evaluates it at other parameters
    :param params: what to differentiate by: the parameters of all optimizers
    :param batch: transitions
    :param noise: see ``JointObjective.forward``
    :param temperature: α
    :param reward_scale: factor of the rewards
    :return: one gradient for each parameter, None where the objective does not depend on it, and as one tensor the metrics
        in the order of ``Metrics`` and after them 0 if all is finite, else 1 (``not_finite``)
    """
    total, metrics = objective(batch, noise, temperature, reward_scale)
    gradients = th.autograd.grad(total, list(params), allow_unused=True)
    return gradients, th.stack([*metrics, not_finite(metrics, gradients, params)])


def not_finite(metrics: Metrics, gradients: Sequence[th.Tensor | None], params: Sequence[th.Tensor]) -> th.Tensor:
    """
    Whether an update must not be made. A number in a backward pass that is not finite reaches the gradient of a bias: it is
    enough to look at the vectors among the tensors.

    :param metrics: of the update
    :param gradients: of the parameters, None where there is none
    :param params: the parameters
    :return: shape (), 1 or 0 in the type of the metrics
    """
    vectors = [tensor.detach() for tensor in (*gradients, *params) if tensor is not None and tensor.dim() == 1]
    total = th.stack(metrics).sum()
    return th.isfinite(total + th.cat(vectors).sum() if vectors else total).logical_not().to(total.dtype)


class TargetUpdate:
    """
    Polyak step of the target value network; buffers (batch-norm statistics) are copied, see SB3 issue 996.

    :param value: V
    :param value_target: V̄, same architecture
    """

    def __init__(self, value: nn.Module, value_target: nn.Module):
        self._params = list(value.parameters()), list(value_target.parameters())
        self._buffers = list(zip(value.buffers(), value_target.buffers(), strict=True))

    def __call__(self, tau: float) -> None:
        """
        :param tau: 1 copies V
        """
        equations.polyak_update(*self._params, tau)
        for buffer, target_buffer in self._buffers:
            target_buffer.copy_(buffer)
