"""Variants of SAC and SACV of the study results/early_lag that neither library has as an option."""

import math
from typing import Any

import torch as th
from stable_baselines3 import SAC
from stable_baselines3.common.policies import ContinuousCritic
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import nn

from sb3_softvalue.policies import SACVPolicy


class SACNormalizedPrior(SAC):
    """SAC with the bonus -α·KL(π || uniform), α·H(π) less the constant α·d·ln 2. J_π and J_α keep their gradients."""

    def _setup_model(self) -> None:
        super()._setup_model()
        constant = math.prod(self.action_space.shape) * math.log(2.0)
        action_log_prob = self.actor.action_log_prob

        def relative_log_prob(obs: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
            actions, log_prob = action_log_prob(obs)
            return actions, log_prob + constant

        self.actor.action_log_prob = relative_log_prob
        self.target_entropy = float(self.target_entropy) - constant


def add_layer_norm(network: nn.Sequential) -> None:
    """
    Insert a layer norm between each hidden layer and its activation.

    :param network: linear layers with activations between them
    """
    for index in reversed(range(len(network) - 1)):
        layer = network[index]
        if isinstance(layer, nn.Linear):
            network.insert(index + 1, nn.LayerNorm(layer.out_features, device=layer.weight.device))


class LayerNormPolicy(SACVPolicy):
    """SACV's policy with layer norm in Q and V, not in the actor."""

    def make_critic(self, features_extractor: BaseFeaturesExtractor | None = None) -> ContinuousCritic:
        critic = super().make_critic(features_extractor)
        for network in critic.q_networks:
            add_layer_norm(network)
        return critic

    def make_value(self, features_extractor: BaseFeaturesExtractor | None = None) -> Any:
        value = super().make_value(features_extractor)
        add_layer_norm(value.vf)
        return value
