"""What a training is made of, beside its replay buffer and its environments: read from a model, checked, put into a model."""

import copy
import enum
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

from sb3_softvalue.checkpoint import environments
from sb3_softvalue.checkpoint.schema import (
    Check,
    CheckpointError,
    generator,
    number,
    numbers,
    of_type,
    optional,
    pack,
    packed_like,
    random_state,
    record,
    sequence,
    set_random_state,
    tensor_like,
    to_builtin,
    whole,
)

_COUNTERS = {
    "num_timesteps": whole(),
    "_n_updates": whole(),
    "_episode_num": whole(),
    "_current_progress_remaining": number(-1e9, 1.0),
}
# An algorithm's own, where it has it
_OPTIONAL = {"_resolved_execution": optional(of_type(str))}
# Of an optimizer, and of constructors: change nothing that is learned, or are compared elsewhere
_FREE_OPTIONS = {"params", "lr", "initial_lr", "fused", "foreach", "capturable"}
_FREE_ARGUMENTS = {"policy", "buffer_size", "optimize_memory_usage", "replay_buffer_class", "n_envs", "_init_setup_model"}
_FREE_ARGUMENTS |= {"verbose", "seed", "stats_window_size", "tensorboard_log", "device", "execution"}


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """:return: those that are numbers, strings, enumerations, None or lists of them, as JSON has them"""

    def plain(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [plain(item) for item in value]
        return value.value if isinstance(value, enum.Enum) else to_builtin(value)

    def is_plain(value: Any) -> bool:
        return all(map(is_plain, value)) if isinstance(value, list) else isinstance(value, (bool, int, float, str, type(None)))

    return {name: plain(value) for name, value in values.items() if is_plain(plain(value))}


def _optimizers(model: OffPolicyAlgorithm) -> Iterator[tuple[str, th.optim.Optimizer]]:
    for name in model._get_torch_save_params()[0]:
        optimizer = functools.reduce(getattr, name.split("."), model)
        if isinstance(optimizer, th.optim.Optimizer):
            yield name, optimizer


def _variables(model: OffPolicyAlgorithm) -> dict[str, th.Tensor]:
    """:return: what is learned or fixed beside the networks, the temperature"""
    return {name: getattr(model, name).detach() for name in model._get_torch_save_params()[1]}


def _space(space: spaces.Space) -> str:
    """:return: what a space is, with a checksum of the bounds that its name leaves out"""
    parts = list(space.values()) if isinstance(space, spaces.Dict) else [space]
    bounds = [getattr(part, name).tobytes() for part in parts if isinstance(part, spaces.Box) for name in ("low", "high")]
    return f"{space} {hashlib.sha256(b''.join(bounds)).hexdigest()[:8]}"


def _base_noise(model: OffPolicyAlgorithm) -> Any:
    """:return: that of each environment, whether or not ``learn()`` has made several of it"""
    return getattr(model.action_noise, "base_noise", model.action_noise)


def facts(model: OffPolicyAlgorithm) -> dict[str, Any]:
    """:return: what must be the same in the model that continues, and what it is called in an error"""
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
        "action noise": type(_base_noise(model)).__name__,
        "VecNormalize": sorted(name.strip() for name in environments.moments(model.get_vec_normalize_env()) or ()),
        "temperature": sorted(_variables(model)),
        "networks": {name: [str(each.dtype), *each.shape] for name, each in model.policy.state_dict().items()},
        "layers": {name: type(module).__name__ for name, module in layers.items()},
        "optimizers": {name: type(optimizer).__name__ for name, optimizer in _optimizers(model)},
        # What only one of two PyTorchs knows is not compared
        "options": {name: value for name, value in options.items() if not name.endswith((".training", ".log_std_init"))},
    }


def check_facts(saved: dict[str, Any], own: dict[str, Any]) -> None:
    """
    :param saved: of the model that was saved
    :param own: of the model that is to continue
    :raises CheckpointError: at the first that differs
    """
    for name, here in own.items():
        there = saved.get(name)
        if isinstance(here, dict) and isinstance(there, dict):
            keys = there.keys() & here.keys() if name == "options" else there.keys() | here.keys()
            key = next((key for key in sorted(keys) if there.get(key) != here.get(key)), None)
            name, there, here = f"{name}: {key}", there.get(key), here.get(key)
        if there != here:
            raise CheckpointError(
                f"The checkpoint is of a model with {name} {there!r:.300}, this one has {here!r:.300}: construct the model as "
                "the one that was saved."
            )


def options(model: OffPolicyAlgorithm) -> dict[str, Any]:
    """:return: what may be different in the model that continues, which is told: numbers and strings, not functions"""
    parts = {"": model, "replay buffer's ": model.replay_buffer, "noise's ": _base_noise(model)}
    parts["VecNormalize's "] = model.get_vec_normalize_env()
    arguments = {
        prefix + name: getattr(part, name, getattr(part, f"_{name}", None))
        for prefix, part in parts.items()
        for name in (inspect.signature(type(part)).parameters if part is not None else ())
        if name not in _FREE_ARGUMENTS
    }
    task = environments.task(model.env)  # type: ignore[arg-type]  # is there
    return _plain(arguments | ({"task": task} if task else {}))


def machine(model: OffPolicyAlgorithm) -> dict[str, Any]:
    """:return: what decides how numbers are rounded"""
    threads = {"number of threads": th.get_num_threads()} if model.device.type == "cpu" else {}
    return {"device": model.device.type, "PyTorch": th.__version__.partition("+")[0], "NumPy": np.__version__, **threads}


def digest(observations: Any) -> str:
    """:return: a checksum of observations"""
    arrays = observations.values() if isinstance(observations, dict) else [observations]
    return hashlib.sha256(b"".join(np.ascontiguousarray(array).tobytes() for array in arrays)).hexdigest()


def read(model: OffPolicyAlgorithm) -> dict[str, Any]:
    """:return: everything that JSON can hold"""
    buffer: Any = model.replay_buffer
    seeds = [None if seed is None else int(seed) for seed in model.env.unwrapped._seeds]  # type: ignore[union-attr]  # is there
    counters = {name: getattr(model, name) for name in (*_COUNTERS, *_OPTIONAL) if hasattr(model, name)}
    starts = buffer._current_ep_start.tolist() if isinstance(buffer, HerReplayBuffer) else None
    return {
        "counters": to_builtin(counters),
        # With what Monitor's info_keywords put there, NumPy's numbers as a rule
        "episodes": [to_builtin(dict(info)) for info in model.ep_info_buffer or ()],
        "successes": [float(success) for success in model.ep_success_buffer or ()],
        "buffer": {"pos": buffer.pos, "full": bool(buffer.full), "episode starts": starts},
        "VecNormalize": environments.moments(model.get_vec_normalize_env()),
        "random": random_state(),
        "action space": to_builtin(model.action_space.np_random.bit_generator.state),
        "noise": noise_state(model),
        # With which the environments will be reset for the first time; None if they have been
        "seeds": seeds if any(seed is not None for seed in seeds) else None,
        "observations": digest(model._last_obs),
        "options": options(model),
        "machine": machine(model),
    }


def tensors(model: OffPolicyAlgorithm) -> dict[str, Any]:
    """:return: parameters and optimizers, of types that ``torch.load(weights_only=True)`` reads"""
    parameters = model.get_parameters()
    for name, _ in _optimizers(model):
        parameters[name] = {"state": parameters[name]["state"]}
    return {"parameters": parameters, "variables": _variables(model)}


def json_schema(model: OffPolicyAlgorithm) -> Check:
    """:return: a check for what ``read`` gives, and what is added to it; the model is not changed"""
    buffer: Any = model.replay_buffer
    row, anything, no = whole(0, buffer.buffer_size - 1), lambda name, value: value, of_type(type(None))
    statistics, noise = environments.moments(model.get_vec_normalize_env()), noise_state(model)
    starts = sequence(row, model.n_envs) if isinstance(buffer, HerReplayBuffer) else no
    return record(
        {
            "counters": record(_COUNTERS | {name: check for name, check in _OPTIONAL.items() if hasattr(model, name)}),
            "episodes": sequence(record({"r": numbers, "l": numbers}, anything)),
            "successes": sequence(numbers),
            "buffer": record({"pos": row, "full": of_type(bool), "episode starts": starts}),
            "VecNormalize": packed_like(statistics) if statistics else no,
            "random": set_random_state,
            "action space": generator,
            "noise": packed_like(noise) if noise else no,
            "seeds": optional(sequence(optional(whole(0, 2**32 - 1)), model.n_envs)),
            "observations": of_type(str),
            "options": of_type(dict),
            "machine": of_type(dict),
            "environments": environments.schema(model.env),  # type: ignore[arg-type]  # is there
            "boundary": of_type(bool),
            "callbacks": sequence(record({"class": of_type(str), "values": record({}, numbers)})),
        }
    )


def tensors_schema(model: OffPolicyAlgorithm) -> Check:
    """:return: a check for what ``tensors`` gives; the model is not changed"""
    fields: dict[str, Check] = {name: record({"state": _moments(optimizer)}) for name, optimizer in _optimizers(model)}
    for name, own in model.get_parameters().items():
        if name not in fields:
            fields[name] = record({key: tensor_like(each) for key, each in own.items()})
    variables = {name: tensor_like(own) for name, own in _variables(model).items()}
    if "log_ent_coef" in variables:  # beyond it the temperature is infinite
        log = variables["log_ent_coef"]
        variables["log_ent_coef"] = lambda name, value: (number(-80, 80)(name, log(name, value).item()), value)[1]
    return record({"parameters": record(fields), "variables": record(variables)})


def _moments(optimizer: th.optim.Optimizer) -> Check:
    """:return: a check for the state of an optimizer: that which one step makes, or none where there was no step yet"""
    twin = copy.deepcopy(optimizer)
    for parameter in (parameter for group in twin.param_groups for parameter in group["params"]):
        parameter.grad = th.zeros_like(parameter)
    twin.step()
    own = {
        index: record({key: tensor_like(each) if isinstance(each, th.Tensor) else number() for key, each in state.items()})
        for index, state in twin.state_dict()["state"].items()
    }
    return lambda name, value: record({key: own[key] for key in own if key in value})(name, value)


def apply(model: OffPolicyAlgorithm, saved: dict[str, Any], saved_tensors: dict[str, Any]) -> None:
    """
    Put a training into a model, all but its environments and its replay buffer's content. Everything was checked.

    :param model: that was constructed as the one that was saved
    :param saved: that was checked by ``json_schema``
    :param saved_tensors: that was checked by ``tensors_schema``
    """
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
    # What was made from the parameters is made anew
    model._create_aliases()  # type: ignore[attr-defined]  # every off-policy algorithm has it
    size = model._stats_window_size
    model.ep_info_buffer, model.ep_success_buffer = deque(saved["episodes"], size), deque(saved["successes"], size)
    buffer: Any = model.replay_buffer
    buffer.pos, buffer.full = saved["buffer"]["pos"], saved["buffer"]["full"]
    if isinstance(buffer, HerReplayBuffer):
        buffer._current_ep_start[:] = saved["buffer"]["episode starts"]
    model.action_space._np_random = saved["action space"]
    model.action_noise = _noise_of_each(model)
    for index, noise in enumerate(_noises(model)):
        if saved["noise"]:
            noise.noise_prev = saved["noise"][str(index)]


def _noise_of_each(model: OffPolicyAlgorithm) -> ActionNoise | None:
    """:return: the action noise as ``learn()`` makes it: one for each environment where there are several"""
    noise = model.action_noise
    if noise is None or model.n_envs == 1 or isinstance(noise, VectorizedActionNoise):
        return noise
    return VectorizedActionNoise(noise, model.n_envs)


def _noises(model: OffPolicyAlgorithm) -> list[Any]:
    noise = _noise_of_each(model)
    return noise.noises if isinstance(noise, VectorizedActionNoise) else [noise]


def noise_state(model: OffPolicyAlgorithm) -> dict[str, Any] | None:
    """
    :param model: with an action noise or without
    :return: the noise's state, packed, if it has one
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
    return {str(index): pack(np.asarray(each.noise_prev, np.float64)) for index, each in enumerate(noises)}
