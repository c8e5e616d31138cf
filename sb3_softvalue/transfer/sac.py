"""Conversion between SB3's SAC and SACV: actor, critics, temperature, optimizers, options, counters and transitions."""

import copy
import inspect
import io
import pathlib
import warnings
from typing import Any, TypeVar

import numpy as np
import torch as th
from stable_baselines3 import SAC
from stable_baselines3.common.base_class import maybe_make_env
from stable_baselines3.common.buffers import NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.type_aliases import GymEnv
from stable_baselines3.common.utils import check_for_correct_spaces
from stable_baselines3.common.vec_env import unwrap_vec_normalize
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer
from stable_baselines3.sac import policies as sac_policies

from sb3_softvalue import checks, policies
from sb3_softvalue.transfer.value_fit import fit_value

Model = TypeVar("Model", bound=SAC)

# Counters of a run
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
# Entries of an optimizer's parameter groups that choose the implementation
_IMPLEMENTATION = ("fused", "foreach", "capturable", "differentiable")
# Options of SACV that SAC does not have, with the value that corresponds to SAC
_WITHOUT_COUNTERPART = (
    ("reward_scale", 1.0),
    ("action_prior", "uniform"),
    ("target_update_interval", 1),
    ("policy_delay", 1),
    ("max_grad_norm", None),
    ("qf_learning_rate", None),
    ("ent_coef_learning_rate", None),
)


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
    Convert a model of SB3's SAC, see ``SACV.from_sac``.

    :param model_class: ``SACV`` or a subclass
    :param path_or_model: SAC model, or a file that ``SAC.save`` wrote (a pickle: only files that you trust)
    :param env: the environment to continue in; None uses the SAC's
    :param fit_value_steps: number of gradient steps that fit V
    :param collect_steps: minimum number of transitions in the replay buffer before V is fitted
    :param replay_buffer: a replay buffer, or the path of a file that ``save_replay_buffer`` wrote (also a pickle)
    :param policy: the policy class; None uses the counterpart of the SAC's class
    :param device: device of the new model; None uses that of the SAC, or "auto" for a file
    :param kwargs: arguments of ``model_class`` that replace the SAC's
    :return: the new model
    :raises ValueError: if the model is no SAC, its policy has no counterpart, the environment does not fit, a number of steps
        is negative, or V cannot be fitted because there is neither an environment nor a replay buffer
    """
    checks.check_whole_number("fit_value_steps", fit_value_steps, minimum=0)
    checks.check_whole_number("collect_steps", collect_steps, minimum=0)
    policy_kwargs = kwargs.get("policy_kwargs") or {}
    if policy_kwargs.get("actor_keys") is not None:
        raise ValueError(
            "from_sac cannot use actor_keys, since SAC's actor was trained on all observations: train a new SACV."
        )
    env = None if env is None else maybe_make_env(env, verbose=0)
    if not isinstance(path_or_model, (SAC, str, pathlib.Path, io.BufferedIOBase)):
        raise ValueError(
            f"from_sac needs a model of SB3's SAC or a file that SAC.save wrote, got {type(path_or_model).__name__}."
        )
    if isinstance(path_or_model, SAC):
        source, device = path_or_model, device or path_or_model.device
    else:
        device = device or "auto"
        try:
            source = SAC.load(path_or_model, env=env, device=device)
        except (AttributeError, KeyError) as error:  # SB3's errors for other networks
            raise ValueError(f"{path_or_model} is no model of SB3's SAC: give from_sac a file that SAC.save wrote.") from error
        env = None
        source.replay_buffer = None
    if isinstance(source.policy, policies.SACVPolicy):
        raise ValueError(f"{type(source).__name__} already has a value network: from_sac needs a model of SB3's SAC.")
    env = source.get_env() if env is None else env
    normalizes = env is None or unwrap_vec_normalize(env) is not None  # type: ignore[arg-type]  # works for any environment
    if source.get_vec_normalize_env() is not None and not normalizes:
        raise ValueError("The SAC was trained with VecNormalize: give from_sac an env wrapped in it.")
    if replay_buffer is None and source.replay_buffer is not None and source.replay_buffer.size() > 0:
        replay_buffer = source.replay_buffer
    if env is None and replay_buffer is None and fit_value_steps > 0:
        raise ValueError("Fitting V needs states: give from_sac a replay_buffer, or an env to collect them in.")
    if policy is None:
        policy = policies.with_value_network(source.policy_class)
    kwargs["policy_kwargs"] = source.policy_kwargs | policy_kwargs

    model: Any = _rebuild(model_class, policy, env, source, device, kwargs)
    _copy_state(source, model, keep_ent_coef="ent_coef" not in kwargs)
    if not model.policy.share_features_extractor:
        # The critics' features are the best available initialization for V's
        model.value.features_extractor.load_state_dict(model.critic.features_extractor.state_dict())
    if isinstance(replay_buffer, ReplayBuffer):
        _share_replay_buffer(model, replay_buffer)
    elif replay_buffer is not None:
        model.load_replay_buffer(replay_buffer)
    assert model.replay_buffer is not None
    checks.check_buffer_fits(model.replay_buffer, model)
    _collect(model, collect_steps)
    if model.replay_buffer.size() > 0:
        # The warm-up is over: the trained policy explores better than random actions
        model.learning_starts = kwargs.get("learning_starts", 0)
        if fit_value_steps > 0:
            fit_value(model, fit_value_steps)
    _copy_exploration(source, model)
    return model


def to_sac(model: Any, policy: str | type[sac_policies.SACPolicy] | None = None) -> SAC:
    """
    Convert to a model of SB3's SAC that predicts the same and can continue training. Its target critics start as copies of
    the critics.

    The replay buffer and the environment are shared with ``model``, not copied: continue training with only one of the two.

    :param model: a SACV; it is not changed
    :param policy: the policy class of the SAC; None uses SB3's counterpart of the model's class
    :return: the SAC
    :raises ValueError: if ``policy`` is None and the policy class has no counterpart
    """
    policy_kwargs = copy.deepcopy(model.policy_kwargs)
    if policy is None:
        own = model.policy_class
        policy = next((sacs for sacs, ours in policies.COUNTERPARTS.items() if ours is own), None)
        if policy is None:
            raise ValueError(
                f"SB3 has no counterpart of the policy {own.__module__}.{own.__qualname__}: pass a class with the same actor "
                "and critics as policy=."
            )
        if policy_kwargs.pop("actor_keys", None) is not None:
            raise ValueError("SB3's SAC has no actor_keys: use export_onnx for the actor, or pass a policy= with this option.")
    changes = [f"{name}={getattr(model, name)!r}" for name, default in _WITHOUT_COUNTERPART if getattr(model, name) != default]
    if changes:
        warnings.warn(
            f"SB3's SAC has no {', '.join(changes)}: the model predicts the same, but continues training without.",
            stacklevel=3,
        )
    sac = _rebuild(SAC, policy, model.get_env(), model, model.device, {"policy_kwargs": policy_kwargs})
    _copy_state(model, sac)
    _copy_exploration(model, sac)
    sac.critic_target.load_state_dict(sac.critic.state_dict())
    if model.replay_buffer is not None:
        _share_replay_buffer(sac, model.replay_buffer)
    return sac


def _rebuild(
    model_class: type[Model],
    policy: Any,
    env: GymEnv | None,
    source: SAC,
    device: th.device | str,
    changes: dict[str, Any],
) -> Model:
    """
    :param model_class: class of the new model
    :param policy: its policy class
    :param env: its environment; None for a model that can only predict
    :param source: model with the arguments of the constructor
    :param device: device of the new model
    :param changes: arguments that replace those of ``source``
    :return: a new model with newly initialized networks
    :raises ValueError: if the spaces of the environment are not those of ``source``
    """
    special = ("self", "policy", "env", "device", "stats_window_size", "_init_setup_model")
    names = [name for name in inspect.signature(SAC.__init__).parameters if name not in special]
    arguments: dict[str, Any] = {name: getattr(source, name) for name in names}
    arguments |= {name: copy.deepcopy(arguments[name]) for name in ("action_noise", "replay_buffer_kwargs", "policy_kwargs")}
    arguments["stats_window_size"] = source._stats_window_size
    if source.replay_buffer_class is NStepReplayBuffer:
        # SB3 chooses this class itself because of n_steps, and warns if it is passed
        arguments["replay_buffer_class"] = None
    arguments |= {"env": env, "device": device, "_init_setup_model": False, **changes}
    model = model_class(policy, **arguments)
    if model.env is None:
        model.observation_space, model.action_space = source.observation_space, source.action_space
        model.n_envs = source.n_envs
    else:
        check_for_correct_spaces(model.env, source.observation_space, source.action_space)
    model._setup_model()
    return model


def _copy_state(source: SAC, model: SAC, keep_ent_coef: bool = True) -> None:
    """
    Copy actor, critics and α with their optimizers, and the counters.

    :param source: model to copy from
    :param model: model to copy to
    :param keep_ent_coef: False leaves out α
    :raises ValueError: if the networks have other shapes
    """
    for name in ("actor", "critic"):
        network, original = getattr(model, name), getattr(source, name)
        shapes, expected = ({key: tensor.shape for key, tensor in net.state_dict().items()} for net in (network, original))
        if shapes != expected:
            raise ValueError(
                f"The {name} cannot be copied, since the two policies build different networks: pass policy_kwargs (and a "
                "policy) that build the same networks."
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
    """With gSDE, copy the exploration matrices, so that stochastic actions agree until they are resampled."""
    if model.use_sde:
        for name in ("exploration_mat", "exploration_matrices"):
            matrix = getattr(source.actor.action_dist, name).detach()
            setattr(model.actor.action_dist, name, matrix.to(model.device, copy=True))


def _copy_optimizer(source: th.optim.Optimizer, optimizer: th.optim.Optimizer) -> None:
    """Copy state and hyperparameters, but not the implementation; no tensor is shared afterwards."""
    state = copy.deepcopy(source.state_dict())
    for group, own in zip(state["param_groups"], optimizer.param_groups, strict=True):
        group.update({name: own[name] for name in _IMPLEMENTATION if name in own})
    optimizer.load_state_dict(state)


def _share_replay_buffer(model: SAC, replay_buffer: ReplayBuffer) -> None:
    """Share the replay buffer, since a second one may not fit into memory."""
    model.replay_buffer = replay_buffer
    replay_buffer.device = model.device
    if isinstance(replay_buffer, HerReplayBuffer) and replay_buffer.env is None and model.env is not None:
        replay_buffer.set_env(model.env)


def _collect(model: Any, n_transitions: int) -> None:
    """
    Let the policy act until the replay buffer holds enough transitions. The model counts these steps.

    :param model: a SACV
    :param n_transitions: number of transitions afterwards over all environments, limited by the size of the buffer
    """
    buffer = model.replay_buffer
    assert buffer is not None
    missing = min(n_transitions, buffer.buffer_size * buffer.n_envs) - buffer.size() * buffer.n_envs
    if model.env is None or missing <= 0:
        return
    if model.verbose >= 1:
        print(f"Collecting {missing} transitions with SAC's policy")
    # Without training and logs
    quiet: dict[str, Any] = dict(learning_starts=0, gradient_steps=0, tensorboard_log=None, verbose=0)
    saved = {name: getattr(model, name) for name in (*quiet, "_total_timesteps", "_current_progress_remaining")}
    for name, value in quiet.items():
        setattr(model, name, value)
    model.learn(missing, log_interval=np.iinfo(np.int64).max, reset_num_timesteps=False)
    for name, value in saved.items():
        setattr(model, name, value)
