"""Policies of SACV: the actor and critics of SB3's SAC, the state-value network V and its target."""

import copy
import copyreg
from abc import ABCMeta
from collections.abc import Callable, Collection, Iterable
from functools import cache
from itertools import chain
from typing import Any, NoReturn

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.distributions import SquashedDiagGaussianDistribution
from stable_baselines3.common.policies import BaseModel, BasePolicy, ContinuousCritic
from stable_baselines3.common.torch_layers import (
    BaseFeaturesExtractor,
    CombinedExtractor,
    FlattenExtractor,
    NatureCNN,
    create_mlp,
    get_actor_critic_arch,
)
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from stable_baselines3.sac.policies import Actor, SACPolicy
from stable_baselines3.sac.policies import CnnPolicy as SACCnnPolicy
from stable_baselines3.sac.policies import MultiInputPolicy as SACMultiInputPolicy
from torch import nn
from torch.nn.parameter import is_lazy

from sb3_softvalue import equations

# SB3's implementation, to detect where a user has replaced it: in a subclass, on the class, or on an actor
_ACTOR_FORWARD = Actor.forward
# Options that choose an implementation of Adam: if the user sets one, the policy does not set fused=True
_ADAM_IMPLEMENTATIONS = frozenset({"fused", "foreach", "differentiable", "capturable"})


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
    :param share_features_extractor: Whether the features extractor is shared with the actor; only the actor's loss trains it
        then
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
        # Only the policy loss trains a shared features extractor, as in SB3's ContinuousCritic
        with th.set_grad_enabled(th.is_grad_enabled() and not self.share_features_extractor):
            features = self.extract_features(obs, self.features_extractor)
        return self.vf(features)


class PartialActor(Actor):
    """SB3's actor restricted to some keys of a Dict observation: those of its ``observation_space``."""

    observation_space: spaces.Dict

    def extract_features(self, obs: PyTorchObs, features_extractor: BaseFeaturesExtractor) -> th.Tensor:
        """
        :param obs: a dict of tensors of shape (batch, *obs_shape); keys that the actor does not see are ignored
        :param features_extractor: features extractor of the actor's keys
        :return: features, shape (batch, features_dim)
        :raises ValueError: if one of the actor's keys is missing
        """
        assert isinstance(obs, dict)
        missing = [key for key in self.observation_space.spaces if key not in obs]
        if missing:
            raise ValueError(
                f"The actor needs the observations {list(self.observation_space.spaces)}, but {missing} is missing: pass them."
            )
        return super().extract_features({key: obs[key] for key in self.observation_space.spaces}, features_extractor)


# Modules that compute the same in training and evaluation mode, have no state except parameters and constants, and draw no
# random numbers. Subclasses are not included, since they may do anything.
_PLAIN_MODULES: frozenset[type[nn.Module]] = frozenset(
    {
        *(Actor, PartialActor, ContinuousCritic, ValueNetwork, FlattenExtractor, NatureCNN, CombinedExtractor),
        *(nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.LayerNorm, nn.GroupNorm, nn.Embedding),
        *(nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.Flatten, nn.Unflatten, nn.Identity),
        *(nn.ReLU, nn.Tanh, nn.Sigmoid, nn.GELU, nn.SELU, nn.SiLU, nn.Mish),
        *(nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d),
    }
)


def is_plain_module(module: nn.Module) -> bool:
    """
    :param module: any module
    :return: whether it is a known layer or network that computes the same in training and evaluation mode
    """
    return type(module) in _PLAIN_MODULES


def submodules(*modules: nn.Module) -> list[nn.Module]:
    """
    ``module.modules()`` in a tenth of its time: this runs at every step.

    :param modules: any modules
    :return: the modules and all their submodules; a submodule that is used several times appears several times
    """
    found = list(modules)
    for parent in found:
        if parent._modules:
            for child in parent._modules.values():
                if child is not None:
                    found.append(child)  # a comprehension would cost a function call per module
    return found


def _parts(module: nn.Module) -> set[nn.Module | th.Tensor]:
    """:return: the module's submodules, parameters and buffers"""
    return set(chain(module.modules(), module.parameters(), module.buffers()))


def _tensors(modules: Iterable[nn.Module], kind: str) -> list[th.Tensor]:
    """
    :param modules: ``submodules`` of a network
    :param kind: "_parameters" or "_buffers"
    :return: the tensors of this kind, each once, also if several layers share it
    """
    members = [vars(module)[kind] for module in modules]
    return [tensor for tensor in dict.fromkeys(t for own in members for t in own.values()) if tensor is not None]


def move_target(network: nn.Module, target: nn.Module, tau: float) -> None:
    """
    Polyak update of a target network; buffers (batch-norm statistics) are copied, see SB3 issue 996.

    :param network: the network that the target follows
    :param target: its target, of the same architecture
    :param tau: the soft update coefficient; 1 copies
    """
    modules, targets = submodules(network), submodules(target)
    equations.polyak_update(_tensors(modules, "_parameters"), _tensors(targets, "_parameters"), tau)
    for buffer, target_buffer in zip(_tensors(modules, "_buffers"), _tensors(targets, "_buffers"), strict=True):
        target_buffer.copy_(buffer)


def raise_no_critic_target(owner: str) -> NoReturn:
    """
    Tell code written for SB3's SAC that the target network has another name.

    :param owner: name of the class without the attribute
    :raises AttributeError: always
    """
    raise AttributeError(
        f"{owner} has no 'critic_target': SAC with a value network bootstraps from 'value_target' instead "
        "(load a saved SACV model with SACV.load, not SAC.load; model.to_sac() converts it to a SAC)."
    )


class SACVPolicy(SACPolicy):
    """
    Policy class (with actor, critics, value and target value) for SACV.

    :param observation_space: Observation space
    :param action_space: Action space
    :param lr_schedule: Learning rate schedule (could be constant)
    :param net_arch: The specification of the policy and value networks: a list for all of them, or
        ``dict(pi=[...], qf=[...], vf=[...])`` where ``vf`` defaults to ``qf``.
    :param activation_fn: Activation function
    :param use_sde: Whether to use State Dependent Exploration or not
    :param log_std_init: Initial value for the log standard deviation
    :param use_expln: Use ``expln()`` function instead of ``exp()`` when using gSDE to ensure
        a positive standard deviation (cf paper). It allows to keep variance
        above zero and prevent it from growing too fast. In practice, ``exp()`` is usually enough.
    :param clip_mean: Clip the mean output when using gSDE to avoid numerical instability.
    :param features_extractor_class: Features extractor to use.
    :param features_extractor_kwargs: Keyword arguments
        to pass to the features extractor.
    :param normalize_images: Whether to normalize images or not,
         dividing by 255.0 (True by default)
    :param optimizer_class: The optimizer to use,
        ``th.optim.Adam`` by default
    :param optimizer_kwargs: Additional keyword arguments,
        excluding the learning rate, to pass to the optimizer
    :param n_critics: Number of critic networks to create.
    :param share_features_extractor: Whether to share or not the features extractor
        between the actor, the critic and the value (this saves computation time); the target value always has its own
    """

    value: ValueNetwork
    """V(s), shape (batch, 1)"""
    value_target: ValueNetwork
    """V̄(s), shape (batch, 1): a moving average of V that receives no gradient"""
    captured_actions: Callable[[PyTorchObs, bool], tuple[th.Tensor, th.Tensor]] | None = None
    """If set, called instead of ``act``: the same actions, faster"""

    def _build(self, lr_schedule: Schedule) -> None:
        n_critics = self.critic_kwargs["n_critics"]
        if not isinstance(n_critics, (int, np.integer)) or n_critics < 1:
            raise ValueError(f"n_critics must be a whole number of at least 1, got {n_critics!r}.")
        _, critic_arch = get_actor_critic_arch(self.net_arch)
        self.value_kwargs = self.net_args | {
            "net_arch": self.net_arch.get("vf", critic_arch) if isinstance(self.net_arch, dict) else critic_arch,
            "share_features_extractor": self.share_features_extractor,
        }
        # Same order as in SACPolicy: with the same seed, actor and critic start with the weights of SAC's
        self.actor = self.make_actor()
        shared_extractor = self.actor.features_extractor if self.share_features_extractor else None
        self.critic = self.make_critic(shared_extractor)
        self.value = self.make_value(shared_extractor)

        # The target starts as a copy of V, always has its own features extractor and never receives a gradient
        self.value_target = self.make_value(None)
        if any(map(is_lazy, self.parameters())):
            self._initialize_lazy_layers()
        if not _parts(self.value_target).isdisjoint(_parts(self.actor) | _parts(self.critic) | _parts(self.value)):
            # The user's features extractors share a layer, which V̄ would move and freeze
            self.value_target = copy.deepcopy(self.value_target)
        self.value_target.load_state_dict(self.value.state_dict())
        self.value_target.requires_grad_(False)
        self.value_target.set_training_mode(False)

        lr = lr_schedule(1)
        self.actor.optimizer = self._make_optimizer(self.actor, lr)
        self.critic.optimizer = self._make_optimizer(self.critic, lr, exclude_extractor=self.share_features_extractor)
        self.value.optimizer = self._make_optimizer(self.value, lr, exclude_extractor=self.share_features_extractor)

    @th.no_grad()
    def _initialize_lazy_layers(self) -> None:
        """Initialize lazy layers with one forward pass, so that V̄ can start as a copy of V."""
        parts = (
            self.observation_space.spaces if isinstance(self.observation_space, spaces.Dict) else {"": self.observation_space}
        )
        zeros = {key: th.zeros(2, *(part.shape or ()), device=self.device) for key, part in parts.items()}
        observations = zeros if isinstance(self.observation_space, spaces.Dict) else zeros[""]
        # In evaluation mode, since batch norm and dropout must not update statistics or draw random numbers
        actions = self.actor.eval()(observations, deterministic=True)
        self.critic.eval()(observations, actions)
        self.value.eval()(observations)
        self.value_target.eval()(observations)
        self.train()

    def make_value(self, features_extractor: BaseFeaturesExtractor | None = None) -> ValueNetwork:
        """
        :param features_extractor: features extractor to share; None creates a new one
        :return: a newly initialized value network
        """
        value_kwargs = self._update_features_extractor(self.value_kwargs, features_extractor)
        return ValueNetwork(**value_kwargs).to(self.device)

    def _make_optimizer(self, network: BaseModel, lr: float, exclude_extractor: bool = False) -> th.optim.Optimizer:
        """
        :param network: network whose parameters are optimized
        :param lr: initial learning rate
        :param exclude_extractor: leave out the features extractor, which the actor's optimizer already has
        """
        params = [p for name, p in network.named_parameters() if not (exclude_extractor and "features_extractor" in name)]
        kwargs = dict(self.optimizer_kwargs)
        if self.optimizer_class in (th.optim.Adam, th.optim.AdamW) and _ADAM_IMPLEMENTATIONS.isdisjoint(kwargs):
            # The same mathematics in one call instead of a Python loop over the parameters
            kwargs["fused"] = True
        return self.optimizer_class(params, lr=lr, **kwargs)  # type: ignore[call-arg]  # the base class has no lr

    def _get_constructor_parameters(self) -> dict[str, Any]:
        # SACPolicy omits this argument, so that policy.save() loses it
        return super()._get_constructor_parameters() | {"share_features_extractor": self.share_features_extractor}

    def __getattr__(self, name: str) -> Any:
        if name == "critic_target":
            raise_no_critic_target(type(self).__name__)
        return super().__getattr__(name)

    def set_training_mode(self, mode: bool) -> None:
        """
        Put the policy in either training or evaluation mode; the target value stays in evaluation mode.

        This affects certain modules, such as batch normalisation and dropout. ``predict()`` sets evaluation mode at every
        environment step.

        :param mode: if true, set to training mode, else set to evaluation mode
        """
        networks = self.actor, self.critic, self.value
        modules = submodules(*networks)
        if _PLAIN_MODULES.issuperset(map(type, modules)):
            for module in (self, *modules):
                # Faster than nn.Module.__setattr__, which searches the parameters first
                vars(module)["training"] = mode
            return
        for network in networks:
            network.set_training_mode(mode)
        self.training = mode

    def unscale_action(self, scaled_action: np.ndarray) -> np.ndarray:
        """
        Rescale an action from [-1, 1] to the action space, see ``BasePolicy.unscale_action``.

        :param scaled_action: in [-1, 1]
        :return: in the environment's units, clipped, since rounding can move a saturated action just out of the bounds
        """
        assert isinstance(self.action_space, spaces.Box)
        return super().unscale_action(scaled_action).clip(self.action_space.low, self.action_space.high)

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        """
        The same actions, from the same random numbers, as SB3's ``Actor.forward``, but without creating and validating a
        ``Normal`` at each environment step, which takes as long as two layers.

        :param observation: shape (batch, *obs_shape), or a dict of such
        :param deterministic: return the mode instead of a sample
        :return: actions in [-1, 1], shape (batch, action_dim)
        :raises ValueError: from PyTorch's ``Normal``, if the policy's output is NaN
        """
        actor = self.actor
        is_known = getattr(actor.forward, "__func__", None) is _ACTOR_FORWARD
        is_known = is_known and type(actor.action_dist) is SquashedDiagGaussianDistribution
        if is_known and not (actor._forward_hooks or actor._forward_pre_hooks):
            actions, is_nan = (self.captured_actions or self.act)(observation, deterministic)
            if not is_nan:
                return actions
        return super()._predict(observation, deterministic)

    def act(self, observation: PyTorchObs, deterministic: bool, noise: th.Tensor | None = None) -> tuple[th.Tensor, th.Tensor]:
        """
        :param observation: shape (batch, *obs_shape), or a dict of such
        :param deterministic: return the mode instead of a sample
        :param noise: standard normal noise of the sample, shape (batch, action_dim); None draws it
        :return: actions in [-1, 1], shape (batch, action_dim), and whether the policy's output is NaN, shape ()
        """
        mean, log_std, _ = self.actor.get_action_dist_params(observation)
        if not deterministic:
            noise = th.randn_like(mean) if noise is None else noise
            mean = mean + noise * log_std.exp()
        actions = th.tanh(mean)
        return actions, (actions + log_std).isnan().any()

    def predict_values(self, obs: PyTorchObs) -> th.Tensor:
        """
        Soft state values V(s), under the same name as in PPO's policies.

        :param obs: observations, shape (batch, *obs_shape), or a dict of such
        :return: shape (batch, 1), see ``SACV.predict_values`` for the unit
        """
        return self.value(obs)

    def action_distribution(self, obs: PyTorchObs) -> th.distributions.Normal:
        """
        :param obs: observations, shape (batch, *obs_shape), or a dict of such
        :return: the policy's Gaussian before squashing, batch shape (batch, action_dim)
        """
        mean, log_std, kwargs = self.actor.get_action_dist_params(obs)
        distribution = self.actor.action_dist.proba_distribution(mean, log_std, **kwargs)
        return distribution.distribution  # a Normal, also with gSDE

    def log_prob(self, obs: PyTorchObs, actions: th.Tensor) -> th.Tensor:
        """
        Log-density of squashed actions, Eq. 21 of the paper.

        :param obs: observations, shape (batch, *obs_shape), or a dict of such
        :param actions: in [-1, 1], shape (batch, action_dim); ±1 is replaced by the closest number inside
        :return: nats over [-1, 1]^action_dim, shape (batch, 1)
        """
        eps = th.finfo(actions.dtype).eps
        gaussian_actions = th.atanh(actions.clamp(-1.0 + eps, 1.0 - eps))
        log_prob = self.action_distribution(obs).log_prob(gaussian_actions).sum(dim=-1, keepdim=True)
        return log_prob - equations.squash_log_det(actions)

    def entropy(self, obs: PyTorchObs, n_samples: int, generator: th.Generator | None = None) -> th.Tensor:
        """
        Differential entropy of the squashed policy: the Gaussian's entropy in closed form plus the mean log-determinant of
        the squashing over sampled actions.

        :param obs: observations, shape (batch, *obs_shape), or a dict of such
        :param n_samples: number of sampled actions per observation
        :param generator: random generator of the samples; None uses PyTorch's global one
        :return: nats over [-1, 1]^action_dim, shape (batch, 1)
        """
        gaussian = self.action_distribution(obs)
        shape = (n_samples, *gaussian.mean.shape)
        noise = th.randn(shape, generator=generator, device=gaussian.mean.device, dtype=gaussian.mean.dtype)
        log_det = equations.squash_log_det(th.tanh(gaussian.mean + gaussian.stddev * noise)).mean(dim=0)
        return gaussian.entropy().sum(dim=-1, keepdim=True) + log_det


MlpPolicy = SACVPolicy


class CnnPolicy(SACVPolicy, SACCnnPolicy):
    """
    Policy class for SACV on images: ``SACVPolicy`` whose default features extractor is ``NatureCNN``.

    The parameters are those of ``SACVPolicy``; the constructor is that of SB3's ``CnnPolicy`` for SAC.
    """


class MultiInputPolicy(SACVPolicy, SACMultiInputPolicy):
    """
    Policy class for SACV on Dict observations: ``SACVPolicy`` whose default features extractor is ``CombinedExtractor``.

    The parameters are those of ``SACVPolicy`` and one more; the constructor is that of SB3's ``MultiInputPolicy`` for SAC.

    :param actor_keys: keys of the observations that the actor sees, while Q and V see all (asymmetric actor-critic); None
        means all
    """

    actor_keys: list[str] | None = None

    def __init__(self, *args: Any, actor_keys: Collection[str] | None = None, **kwargs: Any):
        self.actor_keys = None if actor_keys is None else list(actor_keys)
        super().__init__(*args, **kwargs)

    def make_actor(self, features_extractor: BaseFeaturesExtractor | None = None) -> Actor:
        """
        :param features_extractor: features extractor of the observations that the actor sees; None creates a new one
        :return: a newly initialized actor
        :raises ValueError: if ``actor_keys`` are no keys of the observations, or Q and V would share the actor's extractor
        """
        if self.actor_keys is None:
            return super().make_actor(features_extractor)
        assert isinstance(self.observation_space, spaces.Dict)
        keys = list(self.observation_space.spaces)
        if not self.actor_keys or not set(self.actor_keys).issubset(keys):
            raise ValueError(f"actor_keys must be a list of some of the observations {keys}, got {self.actor_keys!r}.")
        if self.share_features_extractor:
            raise ValueError(
                "share_features_extractor must be False with actor_keys, since Q and V need the other observations."
            )
        space = spaces.Dict({key: self.observation_space[key] for key in self.actor_keys})
        if features_extractor is None:
            features_extractor = self.features_extractor_class(space, **self.features_extractor_kwargs)
        actor_kwargs = self._update_features_extractor(self.actor_kwargs | {"observation_space": space}, features_extractor)
        return PartialActor(**actor_kwargs).to(self.device)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        own = {} if self.actor_keys is None else {"actor_keys": self.actor_keys}
        return super()._get_constructor_parameters() | own


# Each of SB3's policies for SAC, and its counterpart with a value network
COUNTERPARTS: dict[type[SACPolicy], type[SACVPolicy]] = {
    SACPolicy: SACVPolicy,
    SACCnnPolicy: CnnPolicy,
    SACMultiInputPolicy: MultiInputPolicy,
}


class _WithValue(ABCMeta):
    """Metaclass of the classes that ``with_value_network`` creates. They are in no module, so pickle recreates them."""


def _reduce(policy: type[BasePolicy]) -> Any:
    """:return: how pickle recreates a class of ``with_value_network``; a subclass of one is pickled by name"""
    return (with_value_network, (vars(policy)["sac_policy"],)) if "sac_policy" in vars(policy) else policy.__qualname__


copyreg.pickle(_WithValue, _reduce)  # type: ignore[arg-type]  # a metaclass is a class too


@cache
def with_value_network(policy: type[BasePolicy]) -> type[SACVPolicy]:
    """
    :param policy: policy class for SAC
    :return: the same policy with a state-value network: the counterpart of SB3's class or, for a subclass, a new class that
        inherits from both
    :raises ValueError: if the class is no policy for SAC, or overrides ``_build`` or ``set_training_mode``
    """
    if "sac_policy" in vars(policy):
        # cloudpickle stores such a class by value, and restores it as a different class object
        return with_value_network(vars(policy)["sac_policy"])
    if issubclass(policy, SACVPolicy):
        return policy
    if policy in COUNTERPARTS:
        return COUNTERPARTS[policy]
    own = [base for base in policy.__mro__ if issubclass(base, SACPolicy) and base not in COUNTERPARTS]
    changed = [name for base in own for name in ("_build", "set_training_mode") if name in vars(base)]
    if not own or changed:
        because = f"it overrides {changed[0]}" if changed else "it is no policy for SAC"
        raise ValueError(
            f"{policy.__name__} has no state-value network and cannot get one, since {because}: derive it from "
            "sb3_softvalue.MlpPolicy, CnnPolicy or MultiInputPolicy."
        )
    base = next(ours for sb3s, ours in reversed(COUNTERPARTS.items()) if issubclass(policy, sb3s))
    metaclass: Any = _WithValue if type(policy) is ABCMeta else type(policy)
    own_attributes = {"__module__": policy.__module__, "__doc__": policy.__doc__, "sac_policy": policy}
    return metaclass(policy.__name__, (policy, base), own_attributes)
