"""What a training is made of, beside its replay buffer, and how it is put into a model."""

import functools
import itertools
from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import VecNormalize
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer

from sb3_softvalue.checkpoint import random_state
from sb3_softvalue.checkpoint.folder import CheckpointError

COUNTERS = ("num_timesteps", "_n_updates", "_episode_num", "_total_timesteps", "_num_timesteps_at_start")
OTHERS = ("_current_progress_remaining", "_resolved_execution")
# Of an optimizer, may be others in the model that goes on
_FREE_OPTIONS = frozenset({"params", "lr", "initial_lr", "fused", "foreach", "capturable"})
# gSDE's exploration matrices, drawn and used until the next draw
SDE = ("exploration_mat", "exploration_matrices")


def facts(model: OffPolicyAlgorithm) -> dict[str, Any]:
    """:return: what must be the same in the model that goes on, and what it is called in an error"""
    buffer, env = model.replay_buffer, model.get_vec_normalize_env()
    assert buffer is not None
    return {
        "algorithm": type(model).__name__,
        "policy": type(model.policy).__name__,
        "observation space": str(model.observation_space),
        "action space": str(model.action_space),
        "number of environments": model.n_envs,
        "replay buffer": type(buffer).__name__,
        "buffer size": buffer.buffer_size,
        "optimize_memory_usage": bool(buffer.optimize_memory_usage),
        # That of each environment, whether or not learn() has made several of it
        "action noise": type(getattr(model.action_noise, "base_noise", model.action_noise)).__name__,
        "VecNormalize": env is not None,
        "temperature": sorted(variables(model)),
        "networks": {
            name: [list(tensor.shape) for tensor in parameters.values()]
            for name, parameters in model.get_parameters().items()
            if "optimizer" not in name and not isinstance(parameters, th.Tensor)
        },
        "layers": [
            f"{name} {type(module).__name__ if any(True for _ in module.children()) else module}"
            for name, module in model.policy.named_modules()
            if name
        ],
        "optimizers": list(_optimizers(model)),
    }


def _optimizers(model: OffPolicyAlgorithm) -> Iterator[str]:
    """:return: what each optimizer is and is told, but for the learning rate and what decides about its speed alone"""
    for name in model._get_torch_save_params()[0]:
        optimizer = functools.reduce(getattr, name.split("."), model)
        if isinstance(optimizer, th.optim.Optimizer):
            yield f"{name} {type(optimizer).__name__}"
            for group in optimizer.param_groups:
                for option in sorted(set(group) - _FREE_OPTIONS):
                    yield f"{name} {option}={group[option]!r}"


def variables(model: OffPolicyAlgorithm) -> dict[str, th.Tensor]:
    """:return: what is learned or fixed beside the networks, the temperature"""
    return {name: getattr(model, name).detach() for name in model._get_torch_save_params()[1]}


def check_facts(saved: dict[str, Any], own: dict[str, Any]) -> None:
    """
    :param saved: of the model that was saved
    :param own: of the model that is to go on
    :raises CheckpointError: at the first that differs
    """
    for name, value in own.items():
        if saved.get(name) != value:
            there, here = _difference(saved.get(name), value)
            raise CheckpointError(
                f"The checkpoint is of a model with {name} {there}, this one has {here}: construct the model as the one that "
                "was saved."
            )


def _difference(saved: Any, own: Any) -> tuple[str, str]:
    """:return: of shapes, layers or options the first that differ, or how many there are; else both values"""
    if isinstance(saved, dict) and isinstance(own, dict) and list(saved) == list(own):
        return _difference(*next((saved[key], own[key]) for key in own if saved[key] != own[key]))
    if not (isinstance(saved, list) and isinstance(own, list)):
        return repr(saved), repr(own)
    if own and isinstance(own[0], list):
        if len(saved) != len(own):
            return f"of {len(saved)} tensors", f"{len(own)} tensors"
        return next((f"of shape {there}", repr(here)) for there, here in zip(saved, own, strict=True) if there != here)
    pairs = itertools.zip_longest(saved, own, fillvalue="none")
    return next((repr(there), repr(here)) for there, here in pairs if there != here)


def vec_normalize_state(env: VecNormalize) -> dict[str, Any]:
    """:return: statistics of VecNormalize"""
    return {"moments": {name: _moments(m) for name, m in _all_moments(env).items()}, "returns": env.returns.tolist()}


def _all_moments(env: VecNormalize) -> dict[str, RunningMeanStd]:
    moments = {"returns": env.ret_rms}
    if env.norm_obs:
        of_obs = env.obs_rms if isinstance(env.obs_rms, dict) else {"": env.obs_rms}
        moments |= {f"observations {key}": value for key, value in of_obs.items()}
    return moments


def _moments(moments: RunningMeanStd) -> list[Any]:
    return [np.asarray(moments.mean).tolist(), np.asarray(moments.var).tolist(), float(moments.count)]


def set_vec_normalize_state(env: VecNormalize, state: dict[str, Any]) -> None:
    """
    :param env: to change
    :param state: from ``vec_normalize_state``
    """
    for name, moments in _all_moments(env).items():
        mean, var, moments.count = state["moments"][name]
        moments.mean, moments.var = np.array(mean, dtype=np.float64), np.array(var, dtype=np.float64)
    env.returns = np.array(state["returns"])


def scalars(model: OffPolicyAlgorithm) -> dict[str, Any]:
    """:return: everything that JSON can hold"""
    buffer, env = model.replay_buffer, model.get_vec_normalize_env()
    assert buffer is not None
    return {
        "counters": {name: random_state.plain(getattr(model, name)) for name in (*COUNTERS, *OTHERS)},
        # With what Monitor's info_keywords put there, NumPy's numbers as a rule
        "episodes": [random_state.plain(dict(info)) for info in model.ep_info_buffer or ()],
        "successes": [float(success) for success in model.ep_success_buffer or ()],
        "buffer": {
            "pos": buffer.pos,
            "full": bool(buffer.full),
            "episode starts": buffer._current_ep_start.tolist() if isinstance(buffer, HerReplayBuffer) else None,
        },
        "VecNormalize": None if env is None else vec_normalize_state(env),
        "random": random_state.global_states(),
        "action space": random_state.generator_state(model.action_space.np_random),
        "noise": random_state.noise_state(random_state.noise_of_each(model.action_noise, model.n_envs)),
    }


def tensors(model: OffPolicyAlgorithm) -> dict[str, Any]:
    """:return: parameters, optimizers and observations, of types that ``torch.load(weights_only=True)`` reads"""
    actor: Any = model.policy.get_submodule("actor")
    return {
        "parameters": model.get_parameters(),
        "variables": variables(model),
        "last": {name: _to_tensors(getattr(model, name)) for name in ("_last_obs", "_last_original_obs")},
        "sde": {name: getattr(actor.action_dist, name).detach() for name in SDE} if actor.use_sde else {},
    }


def _to_tensors(observations: Any) -> Any:
    if isinstance(observations, dict):
        return {key: th.from_numpy(np.ascontiguousarray(array)) for key, array in observations.items()}
    return None if observations is None else th.from_numpy(np.ascontiguousarray(observations))


def to_arrays(observations: Any) -> Any:
    """:return: what ``tensors`` holds of observations, as SB3 keeps it"""
    if isinstance(observations, dict):
        return {key: tensor.numpy() for key, tensor in observations.items()}
    return None if observations is None else observations.numpy()


def apply(model: OffPolicyAlgorithm, saved: dict[str, Any], saved_tensors: dict[str, Any]) -> None:
    """
    Put a training into a model, all but its environments and its replay buffer's content.

    :param model: that was constructed as the one that was saved
    :param saved: from ``scalars``
    :param saved_tensors: from ``tensors``
    """
    model.set_parameters(saved_tensors["parameters"], exact_match=True, device=model.device)
    for name, variable in variables(model).items():
        variable.copy_(saved_tensors["variables"][name])
    for name, value in saved["counters"].items():
        setattr(model, name, value)
    # The executor begins with what was resolved
    model._create_aliases()  # type: ignore[attr-defined]  # SACV's
    size = model._stats_window_size
    model.ep_info_buffer, model.ep_success_buffer = deque(saved["episodes"], size), deque(saved["successes"], size)
    buffer = model.replay_buffer
    assert buffer is not None
    buffer.pos, buffer.full = saved["buffer"]["pos"], saved["buffer"]["full"]
    if isinstance(buffer, HerReplayBuffer):
        buffer._current_ep_start = np.array(saved["buffer"]["episode starts"], dtype=np.int64)
    env = model.get_vec_normalize_env()
    if env is not None:
        set_vec_normalize_state(env, saved["VecNormalize"])
    model.action_space._np_random = random_state.generator_from(saved["action space"])
    model.action_noise = random_state.noise_of_each(model.action_noise, model.n_envs)
    random_state.set_noise_state(model.action_noise, saved["noise"])


def set_exploration(model: OffPolicyAlgorithm, matrices: dict[str, th.Tensor]) -> None:
    """
    :param model: with gSDE, or without any matrices
    :param matrices: from ``tensors``
    """
    actor: Any = model.policy.get_submodule("actor")
    for name, matrix in matrices.items():
        setattr(actor.action_dist, name, matrix.to(model.device))
