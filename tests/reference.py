"""SAC with a value network written a second time, as plainly as possible, from the paper's equations.

It shares no code with the package but reads its options:
SB3's own actor and critic, ``th.distributions``, one loss after the other with its own
backward pass, plain optimizers. All gradients are taken at the weights before the step, as in the authors' code.
"""

import copy
from typing import Any

import torch as th
from stable_baselines3.common.preprocessing import preprocess_obs
from stable_baselines3.sac.policies import SACPolicy
from torch import nn
from torch.distributions import Normal, Uniform

from sb3_softvalue import SACV


class ReferenceSAC:
    """
    :param policy: the networks to copy; has ``actor``, ``critic``, ``value`` and ``value_target``
    :param optimizer_class: for each network
    :param learning_rate: of all
    :param log_ent_coef: log α to learn; None keeps α at ``ent_coef``
    :param ent_coef: α where it is fixed
    :param target_entropy: in nats
    :param tau: of the target's moving average
    :param target_update_interval: in updates
    :param action_prior: "uniform", "normalized_uniform" (density 2^-d) or "normal" (N(0, I))
    :param reward_scale: factor of the rewards
    :param max_grad_norm: of each network by itself
    :param policy_delay: the actor and α are stepped at every so many updates only
    """

    def __init__(
        self,
        policy: SACPolicy,
        optimizer_class: type[th.optim.Optimizer] = th.optim.Adam,
        learning_rate: float = 3e-4,
        log_ent_coef: th.Tensor | None = None,
        ent_coef: float = 1.0,
        target_entropy: float = 0.0,
        tau: float = 0.005,
        target_update_interval: int = 1,
        action_prior: str = "uniform",
        reward_scale: float = 1.0,
        max_grad_norm: float | None = None,
        policy_delay: int = 1,
    ) -> None:
        self.observation_space = policy.observation_space
        self.actor = copy.deepcopy(policy.actor)
        self.critic = copy.deepcopy(policy.critic)
        self.value_extractor = copy.deepcopy(policy.value.features_extractor)
        self.value = copy.deepcopy(policy.value.vf)
        self.target_extractor = copy.deepcopy(policy.value_target.features_extractor)
        self.value_target = copy.deepcopy(policy.value_target.vf)
        self.shared = policy.share_features_extractor
        if self.shared:
            self.critic.features_extractor = self.actor.features_extractor
            self.value_extractor = self.actor.features_extractor

        self.log_ent_coef = None if log_ent_coef is None else log_ent_coef.detach().clone().requires_grad_()
        self.ent_coef = ent_coef
        self.target_entropy = target_entropy
        self.tau = tau
        self.target_update_interval = target_update_interval
        self.action_prior = action_prior
        self.reward_scale = reward_scale
        self.max_grad_norm = max_grad_norm
        self.policy_delay = policy_delay
        self.n_updates = 0

        # One parameter at a time: no fused or batched kernels
        groups = {"actor": self.actor_params(), "critic": self.critic_params(), "value": self.value_params()}
        plain = dict(lr=learning_rate, foreach=False, fused=False)
        self.optimizers = {name: optimizer_class(params, **plain) for name, params in groups.items()}
        if self.log_ent_coef is not None:
            # SB3 always learns it with Adam
            self.optimizers["ent_coef"] = th.optim.Adam([self.log_ent_coef], **plain)

    def actor_params(self) -> list[nn.Parameter]:
        return list(self.actor.parameters())

    def critic_params(self) -> list[nn.Parameter]:
        own = [] if self.shared else list(self.critic.features_extractor.parameters())
        return own + [param for q_net in self.critic.q_networks for param in q_net.parameters()]

    def value_params(self) -> list[nn.Parameter]:
        own = [] if self.shared else list(self.value_extractor.parameters())
        return own + list(self.value.parameters())

    def state_value(self, observations: Any, target: bool = False) -> th.Tensor:
        """V(s) or V̄(s)."""
        observations = preprocess_obs(observations, self.observation_space)
        if target:
            return self.value_target(self.target_extractor(observations))
        features = self.value_extractor(observations)
        return self.value(features.detach() if self.shared else features)

    def min_q_value(self, observations: Any, actions: th.Tensor) -> th.Tensor:
        """The smallest of the critics' values."""
        smallest = None
        for q_value in self.critic(observations, actions):
            smallest = q_value if smallest is None else th.minimum(smallest, q_value)
        return smallest

    def sample(self, observations: Any, noise: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """A fresh action and log π(a|s) of it, less the log-density of the prior."""
        mean, log_std, _ = self.actor.get_action_dist_params(observations)
        gaussian = Normal(mean, log_std.exp())
        before_squashing = gaussian.loc + gaussian.scale * noise
        action = before_squashing.tanh()
        log_prob = gaussian.log_prob(before_squashing).sum(1) - (1 - action.pow(2) + 1e-6).log().sum(1)
        return action, log_prob.unsqueeze(1)

    def relative_log_prob(self, actions: th.Tensor, log_prob: th.Tensor) -> th.Tensor:
        if self.action_prior == "uniform":
            return log_prob
        if self.action_prior == "normalized_uniform":
            return log_prob - Uniform(-th.ones_like(actions), th.ones_like(actions)).log_prob(actions).sum(1, keepdim=True)
        return log_prob - Normal(0.0, 1.0).log_prob(actions).sum(1, keepdim=True)

    def gradients(self, batch: Any, noise: th.Tensor) -> dict[str, tuple[th.Tensor, list[th.Tensor]]]:
        """
        Each loss with the gradient of its own parameters, everything else held constant.

        :param batch: with the fields of the replay buffer's samples; ``discounts`` is a number or shaped (batch, 1)
        :param noise: standard normal, shape (batch, action_dim)
        """
        ent_coef = self.ent_coef if self.log_ent_coef is None else self.log_ent_coef.detach().exp()
        result = {}

        # Equations 7 to 9
        with th.no_grad():
            next_values = self.state_value(batch.next_observations, target=True)
            bootstrap = batch.discounts * next_values
            target = self.reward_scale * batch.rewards + (1 - batch.dones) * bootstrap
        loss = sum(0.5 * (q - target).pow(2).mean() for q in self.critic(batch.observations, batch.actions))
        result["critic"] = loss.detach(), list(th.autograd.grad(loss, self.critic_params()))

        # Equations 5 and 6, at an action of the current policy
        with th.no_grad():
            actions, log_prob = self.sample(batch.observations, noise)
            cost = ent_coef * self.relative_log_prob(actions, log_prob)
            target = self.min_q_value(batch.observations, actions) - cost
        loss = 0.5 * (self.state_value(batch.observations) - target).pow(2).mean()
        result["value"] = loss.detach(), list(th.autograd.grad(loss, self.value_params()))

        # Equations 12 and 13
        actions, log_prob = self.sample(batch.observations, noise)
        cost = ent_coef * self.relative_log_prob(actions, log_prob)
        if self.shared:
            # The critics' features are constants for every loss; only the actor's own path trains the extractor
            features = self.actor.extract_features(batch.observations, self.actor.features_extractor).detach()
            q_values = [q_net(th.cat([features, actions], dim=1)) for q_net in self.critic.q_networks]
            min_q_value = th.cat(q_values, dim=1).amin(dim=1, keepdim=True)
        else:
            min_q_value = self.min_q_value(batch.observations, actions)
        loss = (cost - min_q_value).mean()
        result["actor"] = loss.detach(), list(th.autograd.grad(loss, self.actor_params()))

        # The temperature of arXiv 1812.05905
        if self.log_ent_coef is not None:
            loss = -(self.log_ent_coef * (log_prob.detach() + self.target_entropy)).mean()
            result["ent_coef"] = loss.detach(), list(th.autograd.grad(loss, [self.log_ent_coef]))
        return result

    def update(self, batch: Any, noise: th.Tensor) -> dict[str, th.Tensor]:
        """One whole update; gives the losses before it."""
        gradients = self.gradients(batch, noise)
        for name, optimizer in self.optimizers.items():
            if name in ("actor", "ent_coef") and (self.n_updates + 1) % self.policy_delay:
                continue
            params = optimizer.param_groups[0]["params"]
            for param, gradient in zip(params, gradients[name][1], strict=True):
                param.grad = gradient
            if self.max_grad_norm is not None:
                nn.utils.clip_grad_norm_(params, self.max_grad_norm)
            optimizer.step()

        self.n_updates += 1
        if self.n_updates % self.target_update_interval == 0:
            online = [*self.value_extractor.parameters(), *self.value.parameters()]
            target = [*self.target_extractor.parameters(), *self.value_target.parameters()]
            for param, target_param in zip(online, target, strict=True):
                target_param.data = (1 - self.tau) * target_param.data + self.tau * param.data
        return {name: loss for name, (loss, _) in gradients.items()}

    def parameters(self) -> dict[str, list[th.Tensor]]:
        """All learned tensors and the target's, in the order of the policy's networks."""
        return {
            "actor": [param.detach() for param in self.actor.parameters()],
            "critic": [param.detach() for param in self.critic.parameters()],
            "value": [param.detach() for param in [*self.value_extractor.parameters(), *self.value.parameters()]],
            "value_target": [p.detach() for p in [*self.target_extractor.parameters(), *self.value_target.parameters()]],
            "log_ent_coef": [] if self.log_ent_coef is None else [self.log_ent_coef.detach()],
        }

    def optimizer_states(self) -> dict[str, list[dict[str, th.Tensor]]]:
        """The optimizers' own tensors for each parameter."""
        return {
            name: [optimizer.state[param] for param in optimizer.param_groups[0]["params"]]
            for name, optimizer in self.optimizers.items()
        }


def make_reference(model: SACV) -> ReferenceSAC:
    """From the model's present networks, with its options."""
    return ReferenceSAC(
        model.policy,
        optimizer_class=model.policy.optimizer_class,
        learning_rate=model.learning_rate,
        log_ent_coef=model.log_ent_coef,
        ent_coef=None if model.log_ent_coef is not None else model.ent_coef_tensor.item(),
        target_entropy=model.target_entropy,
        tau=model.tau,
        target_update_interval=model.target_update_interval,
        action_prior=model.action_prior,
        reward_scale=model.reward_scale,
        max_grad_norm=model.max_grad_norm,
        policy_delay=model.policy_delay,
    )
