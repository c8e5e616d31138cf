"""SB3's SAC to SACV and back: the same actor, critics, temperature, optimizers, options, counters and transitions."""

import copy
import inspect
import io
import pathlib
import warnings
from typing import Any, TypeVar

import gymnasium as gym
import numpy as np
import torch as th
from stable_baselines3 import SAC
from stable_baselines3.common.buffers import NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.noise import VectorizedActionNoise
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv
from stable_baselines3.common.utils import check_for_correct_spaces
from stable_baselines3.common.vec_env import unwrap_vec_normalize
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer
from stable_baselines3.sac import policies as sac_policies

from sb3_softvalue import checks, policies
from sb3_softvalue.transfer.value_fit import fit_value

Model = TypeVar("Model", bound=SAC)

# What a run has counted so far
_COUNTERS = (
    "num_timesteps",
    "ep_info_buffer",
    "ep_success_buffer",
    "_n_updates",
    "_episode_num",
    "_total_timesteps",
    "_num_timesteps_at_start",
    "_current_progress_remaining",
)
# Entries of an optimizer's groups that say how it computes, not what
_IMPLEMENTATION = ("fused", "foreach", "capturable", "differentiable")


def from_sac(
    model_class: type[Model],
    path_or_model: str | pathlib.Path | io.BufferedIOBase | SAC,
    env: GymEnv | str | None = None,
    *,
    fit_value_steps: int = 5_000,
    collect_steps: int = 5_000,
    replay_buffer: ReplayBuffer | str | pathlib.Path | None = None,
    policy: str | type[policies.SACVPolicy] | None = None,
    device: th.device | str | None = None,
    **kwargs: Any,
) -> Model:
    """
    Make a SACV of a model that SB3's SAC trained, see ``SACV.from_sac``.

    :param model_class: ``SACV`` or a subclass
    :param path_or_model: SAC model, or what ``SAC.save`` wrote (a pickle: open only files that you trust)
    :param env: to continue in; None takes the model's own
    :param fit_value_steps: gradient steps that fit V before training continues
    :param collect_steps: transitions that the replay buffer holds at least before V is fitted
    :param replay_buffer: transitions, or the path of what ``save_replay_buffer`` wrote (a pickle as well)
    :param policy: the policy class; None takes what stands for SB3's own
    :param device: of the new model; None takes that of the model, "auto" for a file
    :param kwargs: arguments of ``model_class`` instead of the model's
    :return: the new model
    :raises ValueError: if the model is no SAC, its policy has no counterpart, the environment does not fit, a number of steps
        is negative, or there is neither an environment nor a replay buffer to fit V on
    """
    checks.check_whole_number("fit_value_steps", fit_value_steps, minimum=0)
    checks.check_whole_number("collect_steps", collect_steps, minimum=0)
    _check_actor_sees_all(**(kwargs.get("policy_kwargs") or {}))
    if isinstance(env, str):
        env = gym.make(env)
    if not isinstance(path_or_model, (SAC, str, pathlib.Path, io.BufferedIOBase)):
        raise ValueError(
            f"from_sac takes a model of SB3's SAC or the file that SAC.save wrote, got {type(path_or_model).__name__}."
        )
    if isinstance(path_or_model, SAC):
        source, device = path_or_model, device or path_or_model.device
    else:
        device = device or "auto"
        try:
            source = SAC.load(path_or_model, env=env, device=device)
        except (AttributeError, KeyError) as error:  # how SB3 says that the networks are others
            raise ValueError(f"{path_or_model} holds no model of SB3's SAC: give from_sac what SAC.save wrote.") from error
        env = None
        source.replay_buffer = None
    if isinstance(source.policy, policies.SACVPolicy):
        raise ValueError(f"{type(source).__name__} has a value network already: from_sac takes a model of SB3's SAC.")
    env = source.get_env() if env is None else env
    if source.get_vec_normalize_env() is not None and not _normalizes(env):
        raise ValueError("The SAC was trained with VecNormalize: give from_sac its environment wrapped in it.")
    if replay_buffer is None and source.replay_buffer is not None and source.replay_buffer.size() > 0:
        replay_buffer = source.replay_buffer
    if env is None and replay_buffer is None and fit_value_steps > 0:
        raise ValueError("Fitting V needs states: give from_sac an env to collect them in, or a replay_buffer.")
    if policy is None:
        policy = policies.with_value_network(source.policy_class)
    kwargs["policy_kwargs"] = source.policy_kwargs | (kwargs.get("policy_kwargs") or {})

    model: Any = _rebuild(model_class, policy, env, source, device, kwargs)
    _copy_state(source, model, keep_ent_coef="ent_coef" not in kwargs)
    if not model.policy.share_features_extractor:
        # What the critics see in an observation is the best guess of what V needs to see
        model.value.features_extractor.load_state_dict(model.critic.features_extractor.state_dict())
    if isinstance(replay_buffer, ReplayBuffer):
        _share_replay_buffer(model, replay_buffer)
    elif replay_buffer is not None:
        model.load_replay_buffer(replay_buffer)
    assert model.replay_buffer is not None
    checks.check_buffer_fits(model.replay_buffer, model)
    _collect(model, collect_steps)
    if model.replay_buffer is not None and model.replay_buffer.size() > 0:
        # The warm-up is over: random actions would only replace better ones
        model.learning_starts = kwargs.get("learning_starts", 0)
        if fit_value_steps > 0:
            fit_value(model, fit_value_steps)
    _copy_exploration(source, model)
    return model


def to_sac(model: Any, policy: str | type[sac_policies.SACPolicy] | None = None) -> SAC:
    """
    Make a model of SB3's SAC that predicts the same and can train on. Its target critics start as copies of the critics.

    The replay buffer and the environment are shared with ``model``, not copied: only one of the two models should train on.

    :param model: a SACV; it stays as it is
    :param policy: the policy class; None takes SB3's own that stands for the model's
    :return: the SAC
    :raises ValueError: if the policy has no counterpart and none is given
    """
    policy_kwargs = copy.deepcopy(model.policy_kwargs)
    if policy is None:
        policy = _sac_policy(model.policy_class)
        if policy_kwargs.pop("actor_keys", None) is not None:
            raise ValueError("SB3's SAC has no actor_keys: use export_onnx for the actor, or pass a policy= that has them.")
    changes = [f"{name}={getattr(model, name)!r}" for name, default in _WITHOUT_COUNTERPART if getattr(model, name) != default]
    if changes:
        warnings.warn(
            f"SB3's SAC has no {', '.join(changes)}: the model predicts the same, but it trains on without.",
            stacklevel=3,
        )
    sac = _rebuild(SAC, policy, model.get_env(), model, model.device, {"policy_kwargs": policy_kwargs})
    _copy_state(model, sac)
    _copy_exploration(model, sac)
    sac.critic_target.load_state_dict(sac.critic.state_dict())
    if model.replay_buffer is not None:
        _share_replay_buffer(sac, model.replay_buffer)
    return sac


# Options of SACV that change how it trains, each with the value at which SAC does the same
_WITHOUT_COUNTERPART = (
    ("reward_scale", 1.0),
    ("action_prior", "uniform"),
    ("target_update_interval", 1),
    ("policy_delay", 1),
    ("max_grad_norm", None),
    ("qf_learning_rate", None),
    ("ent_coef_learning_rate", None),
)


def _check_actor_sees_all(actor_keys: Any = None, **_others: Any) -> None:
    """
    :raises ValueError: if a SAC's actor, which has learned from all observations, is to see some of them only
    """
    if actor_keys is not None:
        raise ValueError("from_sac cannot take actor_keys, since SAC's actor has learned from all observations: use SACV().")


def _sac_policy(policy_class: type[BasePolicy]) -> type[sac_policies.SACPolicy]:
    """
    :return: SB3's class of the same policy
    :raises ValueError: if there is none
    """
    for sacs, ours in policies.COUNTERPARTS.items():
        if policy_class is ours:
            return sacs
    raise ValueError(
        f"to_sac knows no counterpart of the policy {policy_class.__module__}.{policy_class.__qualname__}: pass one with the "
        "same actor and critics as policy=."
    )


def _normalizes(env: GymEnv | None) -> bool:
    """:return: whether a ``VecNormalize`` is among the environment's wrappers"""
    return env is None or unwrap_vec_normalize(env) is not None  # type: ignore[arg-type]  # any environment may be given


def _rebuild(
    model_class: type[Model],
    policy: Any,
    env: GymEnv | None,
    source: SAC,
    device: th.device | str,
    changes: dict[str, Any],
) -> Model:
    """
    :param model_class: of the new model
    :param policy: its policy class
    :param env: its environment, None for a model that can only predict
    :param source: gives the arguments of the constructor
    :param changes: arguments instead of these
    :return: a new model with fresh networks
    :raises ValueError: if the environment has other spaces than the source
    """
    special = ("self", "policy", "env", "device", "stats_window_size", "_init_setup_model")
    arguments = {name: getattr(source, name) for name in inspect.signature(SAC.__init__).parameters if name not in special}
    arguments |= {name: copy.deepcopy(arguments[name]) for name in ("action_noise", "replay_buffer_kwargs", "policy_kwargs")}
    arguments["stats_window_size"] = source._stats_window_size
    if source.replay_buffer_class is NStepReplayBuffer:
        # What SB3 chose because of n_steps, and would warn about if it were given
        arguments["replay_buffer_class"] = None
    if isinstance(arguments["action_noise"], VectorizedActionNoise):
        arguments["action_noise"] = arguments["action_noise"].base_noise
    # By name, which a checker of types cannot follow
    model = model_class(policy, env, device=device, _init_setup_model=False, **(arguments | changes))  # type: ignore[arg-type]
    if model.env is None:
        model.observation_space, model.action_space = source.observation_space, source.action_space
        model.n_envs = source.n_envs
    else:
        check_for_correct_spaces(model.env, source.observation_space, source.action_space)
    model._setup_model()
    return model


def _copy_state(source: SAC, model: SAC, keep_ent_coef: bool = True) -> None:
    """
    Actor, critics and α with their optimizers, and the counters.

    :raises ValueError: if the networks are not of the same shapes
    """
    for name in ("actor", "critic"):
        network, original = getattr(model, name), getattr(source, name)
        shapes, expected = ({key: tensor.shape for key, tensor in net.state_dict().items()} for net in (network, original))
        if shapes != expected:
            raise ValueError(
                f"The {name} cannot be taken over: the two policies build different networks. Give policy_kwargs (and a "
                "policy) that build the same."
            )
        network.load_state_dict(original.state_dict())
        _copy_optimizer(original.optimizer, network.optimizer)
    if keep_ent_coef and source.log_ent_coef is not None:
        assert model.log_ent_coef is not None and model.ent_coef_optimizer is not None
        assert source.ent_coef_optimizer is not None
        model.log_ent_coef.data.copy_(source.log_ent_coef.data)
        _copy_optimizer(source.ent_coef_optimizer, model.ent_coef_optimizer)
    elif keep_ent_coef:
        model.ent_coef_tensor.copy_(source.ent_coef_tensor)
    for name in _COUNTERS:
        setattr(model, name, copy.deepcopy(getattr(source, name)))


def _copy_exploration(source: SAC, model: SAC) -> None:
    """With gSDE, what a stochastic action is until the noise is drawn anew."""
    if model.use_sde:
        for name in ("exploration_mat", "exploration_matrices"):
            matrix = getattr(source.actor.action_dist, name).detach()
            setattr(model.actor.action_dist, name, matrix.to(model.device, copy=True))


def _copy_optimizer(source: th.optim.Optimizer, optimizer: th.optim.Optimizer) -> None:
    """State and hyper-parameters, not the implementation; no tensor is shared afterwards."""
    state = copy.deepcopy(source.state_dict())
    for group, own in zip(state["param_groups"], optimizer.param_groups, strict=True):
        group.update({name: own[name] for name in _IMPLEMENTATION if name in own})
    optimizer.load_state_dict(state)


def _share_replay_buffer(model: SAC, replay_buffer: ReplayBuffer) -> None:
    """Use the buffer itself: a second copy of a million transitions may not fit into the memory."""
    model.replay_buffer = replay_buffer
    replay_buffer.device = model.device
    if isinstance(replay_buffer, HerReplayBuffer) and replay_buffer.env is None and model.env is not None:
        replay_buffer.set_env(model.env)


def _collect(model: Any, n_transitions: int) -> None:
    """
    Let the policy act until the replay buffer holds enough transitions. The steps count as the model's.

    :param n_transitions: in the buffer afterwards, all environments together, at most what it can hold
    """
    buffer = model.replay_buffer
    assert buffer is not None
    missing = min(n_transitions, buffer.buffer_size * buffer.n_envs) - buffer.size() * buffer.n_envs
    if model.env is None or missing <= 0:
        return
    if model.verbose >= 1:
        print(f"Collecting {missing} transitions with the policy of the SAC")
    # Steps without training and without logs
    quiet: dict[str, Any] = dict(learning_starts=0, gradient_steps=0, tensorboard_log=None, verbose=0)
    saved = {name: getattr(model, name) for name in (*quiet, "_total_timesteps", "_current_progress_remaining")}
    for name, value in quiet.items():
        setattr(model, name, value)
    model.learn(missing, log_interval=np.iinfo(np.int64).max, reset_num_timesteps=False)
    for name, value in saved.items():
        setattr(model, name, value)
