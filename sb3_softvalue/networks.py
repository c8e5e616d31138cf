"""The state-value network, and the layers of which one knows what they do."""

import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import BaseModel, ContinuousCritic
from stable_baselines3.common.torch_layers import (
    BaseFeaturesExtractor,
    CombinedExtractor,
    FlattenExtractor,
    NatureCNN,
    create_mlp,
)
from stable_baselines3.common.type_aliases import PyTorchObs
from stable_baselines3.sac.policies import Actor
from torch import nn


class ValueNetwork(BaseModel):
    """
    State-value network V(s) of SAC (Haarnoja et al. 2018, Eq. 3).

    :param observation_space: Observation space
    :param action_space: Action space
    :param net_arch: Network architecture
    :param features_extractor: Network to extract features
        (a CNN when using images, a nn.Flatten() layer otherwise)
    :param features_dim: Number of features
    :param activation_fn: Activation function
    :param normalize_images: Whether to normalize images or not,
         dividing by 255.0 (True by default)
    :param share_features_extractor: Whether the features extractor is shared with the actor, whose loss then trains it
    """

    features_extractor: BaseFeaturesExtractor

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Box,
        net_arch: list[int],
        features_extractor: BaseFeaturesExtractor,
        features_dim: int,
        activation_fn: type[nn.Module] = nn.ReLU,
        normalize_images: bool = True,
        share_features_extractor: bool = False,
    ):
        super().__init__(
            observation_space,
            action_space,
            features_extractor=features_extractor,
            normalize_images=normalize_images,
        )
        self.share_features_extractor = share_features_extractor
        self.vf = nn.Sequential(*create_mlp(features_dim, 1, net_arch, activation_fn))

    def forward(self, obs: PyTorchObs) -> th.Tensor:
        """
        :param obs: observations, shape (batch, *obs_shape), or a dict of such
        :return: V(s), shape (batch, 1)
        """
        # A shared features extractor is learned with the policy loss only, as in SB3's ContinuousCritic
        with th.set_grad_enabled(th.is_grad_enabled() and not self.share_features_extractor):
            features = self.extract_features(obs, self.features_extractor)
        return self.vf(features)


# Modules of which one knows that they compute the same in training and in evaluation mode, hold no state but parameters and
# draw no random numbers. A subclass may do anything and is not among them.
_KNOWN_MODULES: frozenset[type[nn.Module]] = frozenset(
    {
        *(Actor, ContinuousCritic, ValueNetwork, FlattenExtractor, NatureCNN, CombinedExtractor),
        *(nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.LayerNorm, nn.GroupNorm, nn.Embedding),
        *(nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.Flatten, nn.Unflatten, nn.Identity),
        *(nn.ReLU, nn.Tanh, nn.Sigmoid, nn.ELU, nn.GELU, nn.SELU, nn.SiLU, nn.LeakyReLU, nn.Mish, nn.Softplus, nn.Hardtanh),
        *(nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d),
    }
)


def is_known_module(module: nn.Module) -> bool:
    """
    :param module: any module
    :return: whether it is a plain layer or network, which computes the same in training and in evaluation mode
    """
    return type(module) in _KNOWN_MODULES
