"""What a training consists of, except its replay buffer and its environments: read, checked, and put into a model."""

import copy
import functools
import hashlib
import inspect
from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.noise import ActionNoise, NormalActionNoise, OrnsteinUhlenbeckActionNoise, VectorizedActionNoise
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer

from sb3_softvalue.checkpoint import environments, schema
from sb3_softvalue.checkpoint.schema import Check, CheckpointError, like, optional, whole

_COUNTERS = {
    "num_timesteps": whole(),
    "_n_updates": whole(),
    "_episode_num": whole(),
    "_current_progress_remaining": schema.number(-1e9, 1.0),
}
# An algorithm's own, where it has it
_OPTIONAL = {"_resolved_execution": optional(str)}
# Options that change nothing that is learned, or are compared elsewhere: of optimizers, and of constructors
_FREE_OPTIONS = {"params", "lr", "initial_lr", "fused", "foreach", "capturable"}
_FREE_ARGUMENTS = {"policy", "buffer_size", "optimize_memory_usage", "replay_buffer_class", "n_envs", "_init_setup_model"}
_FREE_ARGUMENTS |= {"verbose", "seed", "stats_window_size", "tensorboard_log", "device", "execution"}


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """:return: the entries that are numbers, strings, enumerations, None or lists of them, as JSON has them"""
    builtin = {name: schema.to_builtin(value) for name, value in values.items() if not isinstance(value, dict)}
    return {n: value for n, value in builtin.items() if schema.is_plain(value, (bool, int, float, str, type(None)))}


def _optimizers(model: OffPolicyAlgorithm) -> Iterator[tuple[str, th.optim.Optimizer]]:
    for name in model._get_torch_save_params()[0]:
        optimizer = functools.reduce(getattr, name.split("."), model)
        if isinstance(optimizer, th.optim.Optimizer):
            yield name, optimizer


def _variables(model: OffPolicyAlgorithm) -> dict[str, th.Tensor]:
    """:return: tensors outside the policy: the temperature, learned or fixed"""
    return {name: getattr(model, name).detach() for name in model._get_torch_save_params()[1]}


def _space(space: spaces.Space) -> str:
    """:return: a space as text, with a checksum of its bounds, which the text abbreviates"""
    parts = list(space.values()) if isinstance(space, spaces.Dict) else [space]
    bounds = [getattr(part, name).tobytes() for part in parts if isinstance(part, spaces.Box) for name in ("low", "high")]
    return f"{space} {hashlib.sha256(b''.join(bounds)).hexdigest()[:8]}"


def facts(model: OffPolicyAlgorithm) -> dict[str, Any]:
    """:return: what must be the same in the model that continues, by its name in an error"""
    buffer: Any = model.replay_buffer
    layers = {name: module for name, module in model.policy.named_modules() if name}
    options: dict[str, Any] = {}
    for name, module in layers.items():
        options |= {f"{name}.{option}": value for option, value in _plain(vars(module)).items() if option[0] != "_"}
    for name, optimizer in _optimizers(model):
        for group in optimizer.param_groups:
            options |= {f"{name}.{option}": value for option, value in _plain(group).items() if option not in _FREE_OPTIONS}
    return {
        "algorithm": type(model).__name__,
        "policy": type(model.policy).__name__,
        "observation space": _space(model.observation_space),
        "action space": _space(model.action_space),
        "number of environments": model.n_envs,
        "replay buffer": type(buffer).__name__,
        "buffer size": buffer.buffer_size,
        "optimize_memory_usage": bool(buffer.optimize_memory_usage),
        "action noise": type(_noises(model)[0]).__name__,
        "VecNormalize": sorted(name.strip() for name in environments.moments(model.get_vec_normalize_env()) or ()),
        "temperature": sorted(_variables(model)),
        "networks": {name: [str(each.dtype), *each.shape] for name, each in model.policy.state_dict().items()},
        "layers": {name: type(module).__name__ for name, module in layers.items()},
        "optimizers": {name: type(optimizer).__name__ for name, optimizer in _optimizers(model)},
        "options": {name: value for name, value in options.items() if not name.endswith((".training", ".log_std_init"))},
    }


def check_facts(saved: dict[str, Any], own: dict[str, Any]) -> None:
    """:raises CheckpointError: at the first fact of the model that was saved that differs from the model's own"""
    for name, here in own.items():
        there = saved.get(name)
        if isinstance(here, dict) and isinstance(there, dict):
            # An option that only one of two PyTorchs knows is not compared
            keys = there.keys() & here.keys() if name == "options" else there.keys() | here.keys()
            key = next((key for key in sorted(keys) if there.get(key) != here.get(key)), None)
            name, there, here = f"{name}: {key}", there.get(key), here.get(key)
        if there != here:
            raise CheckpointError(
                f"The checkpoint is of a model with {name} {there!r:.300}, this one has {here!r:.300}: construct the model as "
                "the one that was saved."
            )


def options(model: OffPolicyAlgorithm) -> dict[str, Any]:
    """:return: what may differ in the model that continues, with a warning: numbers and strings, not functions"""
    assert model.env is not None
    parts = {"": model, "replay buffer's ": model.replay_buffer, "noise's ": _noises(model)[0]}
    parts["VecNormalize's "] = model.get_vec_normalize_env()
    arguments = {
        prefix + name: getattr(part, name, getattr(part, f"_{name}", None))
        for prefix, part in parts.items()
        for name in (inspect.signature(type(part)).parameters if part is not None else ())
        if name not in _FREE_ARGUMENTS
    }
    states = environments.read(model.env)
    task = {"task": states[0]["now"]["task"]} if states and states[0]["now"]["task"] else {}
    return _plain(arguments | task)


def machine(model: OffPolicyAlgorithm) -> dict[str, Any]:
    """:return: what determines how numbers are rounded"""
    threads = {"number of threads": th.get_num_threads()} if model.device.type == "cpu" else {}
    return {"device": model.device.type, "PyTorch": th.__version__.partition("+")[0], "NumPy": np.__version__, **threads}


def read(model: OffPolicyAlgorithm) -> dict[str, Any]:
    """:return: everything that JSON can hold"""
    assert model.env is not None
    buffer: Any = model.replay_buffer
    seeds = [None if seed is None else int(seed) for seed in model.env.unwrapped._seeds]
    counters = {name: getattr(model, name) for name in (*_COUNTERS, *_OPTIONAL) if hasattr(model, name)}
    starts = buffer._current_ep_start.tolist() if isinstance(buffer, HerReplayBuffer) else None
    return {
        "counters": schema.to_builtin(counters),
        # With what Monitor's info_keywords add, usually NumPy's numbers
        "episodes": [schema.to_builtin(dict(info)) for info in model.ep_info_buffer or ()],
        "successes": [float(success) for success in model.ep_success_buffer or ()],
        "buffer": {"pos": buffer.pos, "full": bool(buffer.full), "episode starts": starts},
        "VecNormalize": environments.moments(model.get_vec_normalize_env()),
        "random": schema.random_state(),
        "action space": schema.to_builtin(model.action_space.np_random.bit_generator.state),
        "noise": noise_state(model),
        # For the first reset of the environments; None after it
        "seeds": seeds if any(seed is not None for seed in seeds) else None,
        "observations": environments.digest(model._last_obs),
        "options": options(model),
        "machine": machine(model),
        "environments": environments.read(model.env),
    }


def tensors(model: OffPolicyAlgorithm) -> dict[str, Any]:
    """:return: parameters and optimizers, of types that ``torch.load(weights_only=True)`` reads"""
    parameters = model.get_parameters()
    for name, _ in _optimizers(model):
        moments, groups = parameters[name]["state"], parameters[name]["param_groups"]
        # None for a parameter that no step has changed, as an unused one, so that none can be missing
        parameters[name] = {"state": {index: moments.get(index) for group in groups for index in group["params"] if moments}}
    return {"parameters": parameters, "variables": _variables(model)}


def check(model: OffPolicyAlgorithm, content: Any, saved: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """
    :param content: of state.json: what ``read`` returns, and "boundary" and "callbacks"
    :param saved: of tensors.pt: what ``tensors`` returns
    :return: both, unpacked
    :raises Exception: where one of them does not suit the model, which is not changed
    """
    assert model.env is not None
    buffer: Any = model.replay_buffer
    row = whole(0, buffer.buffer_size - 1)
    starts = [row] * model.n_envs if isinstance(buffer, HerReplayBuffer) else None
    own = {
        "counters": _COUNTERS | {name: each for name, each in _OPTIONAL.items() if hasattr(model, name)},
        "episodes": [{"r": schema.scalar, "l": schema.scalar, ...: Any}, ...],
        "successes": [schema.scalar, ...],
        "buffer": {"pos": row, "full": bool, "episode starts": starts},
        "VecNormalize": environments.moments(model.get_vec_normalize_env()),
        "random": schema.checked_random_state,
        "action space": schema.generator,
        "noise": noise_state(model),
        "seeds": optional([optional(whole(0, 2**32 - 1))] * model.n_envs),
        "observations": str,
        "options": dict,
        "machine": dict,
        "environments": environments.schema(model.env),
        "boundary": bool,
        "callbacks": [{"class": str, "values": {...: schema.numbers}}, ...],
    }
    unpacked = {name: schema.unpack(own[name]) for name in ("VecNormalize", "noise")}
    content = like(own | unpacked, "state", content | {name: schema.unpack(content[name]) for name in unpacked})
    moments = {name: {"state": _moments(optimizer)} for name, optimizer in _optimizers(model)}
    saved = like({"parameters": model.get_parameters() | moments, "variables": _variables(model)}, "tensors", saved)
    if "log_ent_coef" in saved["variables"]:  # beyond it the temperature is infinite
        schema.number(-80, 80)("log_ent_coef", saved["variables"]["log_ent_coef"].item())
    return content, saved


def _moments(optimizer: th.optim.Optimizer) -> Check:
    """
    :return: a check for the state of an optimizer: like that after one step, or None for a parameter that no step has changed;
        empty where there was no step yet
    """
    twin = copy.deepcopy(optimizer)
    for parameter in (parameter for group in twin.param_groups for parameter in group["params"]):
        parameter.grad = th.zeros_like(parameter)
    twin.step()
    own = twin.state_dict()["state"]

    def check(name: str, value: Any) -> dict[Any, Any]:
        checked = like({key: optional(each) for key, each in own.items()} if value else {}, name, value)
        return {key: each for key, each in checked.items() if each is not None}

    return check


def apply(model: OffPolicyAlgorithm, saved: dict[str, Any], saved_tensors: dict[str, Any]) -> None:
    """Put what ``check`` has returned into the model: all but its environments and its replay buffer's content."""
    parameters, own = saved_tensors["parameters"], model.get_parameters()
    for name, _ in _optimizers(model):  # whose options are the constructor's
        parameters[name] = {**own[name], "state": parameters[name]["state"]}
    model.set_parameters(parameters, exact_match=True, device=model.device)
    for name, value in saved_tensors["variables"].items():
        if getattr(model, name).requires_grad:  # what is not learned is the constructor's
            getattr(model, name).detach().copy_(value)
    for name, value in saved["counters"].items():
        setattr(model, name, value)
    model._num_timesteps_at_start = model.num_timesteps
    # References to parts of the networks
    model._create_aliases()  # type: ignore[attr-defined]  # every off-policy algorithm has it
    size = model._stats_window_size
    model.ep_info_buffer, model.ep_success_buffer = deque(saved["episodes"], size), deque(saved["successes"], size)
    buffer: Any = model.replay_buffer
    buffer.pos, buffer.full = saved["buffer"]["pos"], saved["buffer"]["full"]
    if isinstance(buffer, HerReplayBuffer):
        buffer._current_ep_start[:] = saved["buffer"]["episode starts"]
    model.action_space._np_random = saved["action space"]
    model.action_noise = _noise(model)
    for index, noise in enumerate(_noises(model)):
        if saved["noise"]:
            noise.noise_prev = saved["noise"][str(index)]
    schema.set_random_state(saved["random"])


def _noise(model: OffPolicyAlgorithm) -> ActionNoise | None:
    """:return: the action noise as ``learn()`` makes it: one for each environment where there are several"""
    noise = model.action_noise
    if noise is None or model.n_envs == 1 or isinstance(noise, VectorizedActionNoise):
        return noise
    return VectorizedActionNoise(noise, model.n_envs)


def _noises(model: OffPolicyAlgorithm) -> list[Any]:
    noise = _noise(model)
    return noise.noises if isinstance(noise, VectorizedActionNoise) else [noise]


def noise_state(model: OffPolicyAlgorithm) -> dict[str, Any] | None:
    """
    :return: the state of the action noise, packed, if it has one
    :raises CheckpointError: if it is of a class whose state is not known
    """
    noises = _noises(model)
    kind = type(noises[0])
    if kind not in (type(None), NormalActionNoise, OrnsteinUhlenbeckActionNoise):
        raise CheckpointError(
            f"An action noise of class {kind.__name__} may have state that cannot be stored: use one of SB3's."
        )
    if kind is not OrnsteinUhlenbeckActionNoise:
        return None
    return {str(index): schema.pack(np.asarray(each.noise_prev, np.float64)) for index, each in enumerate(noises)}
