"""What a training is made of, beside its replay buffer and its environments: read from a model, checked, put into a model."""

import copy
import enum
import functools
import hashlib
import inspect
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.noise import ActionNoise, NormalActionNoise, OrnsteinUhlenbeckActionNoise, VectorizedActionNoise
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.type_aliases import TrainFreq
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer

from sb3_softvalue.checkpoint import environments
from sb3_softvalue.checkpoint.schema import (
    CheckpointError,
    generator,
    number,
    numbers,
    of_type,
    optional,
    packed_like,
    random_state,
    read_random_state,
    record,
    sequence,
    tensor_like,
    to_builtin,
    whole,
)

_COUNTERS = {"num_timesteps": whole(), "_n_updates": whole(), "_episode_num": whole()}
_PROGRESS = {"_current_progress_remaining": number(-1e9, 1.0)}
# An algorithm's own, where it has it
_OPTIONAL = {"_resolved_execution": optional(of_type(str))}
# Of an optimizer, may be others in the model that continues
_FREE_OPTIONS = {"params", "lr", "initial_lr", "fused", "foreach", "capturable"}
# Of the constructor, change nothing that is learned, or are compared elsewhere
_FREE_ARGUMENTS = {"buffer_size", "verbose", "seed", "stats_window_size", "tensorboard_log", "device", "execution"}
_FREE_ARGUMENTS |= {"_init_setup_model", "optimize_memory_usage", "replay_buffer_class", "policy"}


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """:return: those that are numbers, strings, enumerations or None, as JSON has them"""
    named = {key: list(value) if isinstance(value, TrainFreq) else value for key, value in values.items()}
    named = {key: value.value if isinstance(value, enum.Enum) else value for key, value in named.items()}
    named = {key: [v.value if isinstance(v, enum.Enum) else v for v in value] if isinstance(value, (list, tuple)) else value
             for key, value in named.items()}
    named = to_builtin(named)
    simple = (bool, int, float, str, type(None))
    return {
        key: value
        for key, value in named.items()
        if isinstance(value, simple) or (isinstance(value, list) and all(isinstance(each, simple) for each in value))
    }


def _optimizers(model: OffPolicyAlgorithm) -> Iterator[tuple[str, th.optim.Optimizer]]:
    for name in model._get_torch_save_params()[0]:
        optimizer = functools.reduce(getattr, name.split("."), model)
        if isinstance(optimizer, th.optim.Optimizer):
            yield name, optimizer


def _space(space: spaces.Space) -> str:
    """:return: what a space is, with a checksum of bounds that its name may leave out"""
    parts = [space[key] for key in space] if isinstance(space, spaces.Dict) else [space]
    bounds = [getattr(part, name).tobytes() for part in parts if isinstance(part, spaces.Box) for name in ("low", "high")]
    return f"{space} {hashlib.sha256(b''.join(bounds)).hexdigest()[:8]}"


def facts(model: OffPolicyAlgorithm) -> dict[str, Any]:
    """:return: what must be the same in the model that continues, and what it is called in an error"""
    buffer, env = model.replay_buffer, model.get_vec_normalize_env()
    assert buffer is not None
    return {
        "algorithm": type(model).__name__,
        "policy": type(model.policy).__name__,
        "observation space": _space(model.observation_space),
        "action space": _space(model.action_space),
        "number of environments": model.n_envs,
        "replay buffer": type(buffer).__name__,
        "buffer size": buffer.buffer_size,
        "optimize_memory_usage": bool(buffer.optimize_memory_usage),
        # That of each environment, whether or not learn() has made several of it
        "action noise": type(getattr(model.action_noise, "base_noise", model.action_noise)).__name__,
        "VecNormalize": sorted(name.strip() for name in environments.moments(env) or ()),
        "temperature": sorted(model._get_torch_save_params()[1]),
        "networks": {name: [str(each.dtype), *each.shape] for name, each in model.policy.state_dict().items()},
        "layers": {name: type(module).__name__ for name, module in model.policy.named_modules() if name},
        "optimizers": {name: type(optimizer).__name__ for name, optimizer in _optimizers(model)},
        # What only one of the two PyTorchs knows is not compared
        "options of layers": {
            f"{name}.{option}": value
            for name, module in model.policy.named_modules()
            for option, value in _plain(vars(module)).items()
            if isinstance(value, (bool, int, float)) and not option.startswith("_") and option not in ("training", "log_std_init")
        },
        "options of optimizers": {
            f"{name}.{option}": value
            for name, optimizer in _optimizers(model)
            for group in optimizer.param_groups
            for option, value in _plain(group).items()
            if option not in _FREE_OPTIONS
        },
    }


def check_facts(saved: dict[str, Any], own: dict[str, Any]) -> None:
    """
    :param saved: of the model that was saved
    :param own: of the model that is to continue
    :raises CheckpointError: at the first that differs
    """
    for name, value in own.items():
        there, here = saved.get(name), value
        if isinstance(value, dict) and isinstance(there, dict):
            keys = there.keys() & here.keys() if name.startswith("options") else there.keys() | here.keys()
            key = next((key for key in sorted(keys) if there.get(key) != here.get(key)), None)
            if key is None:
                continue
            name, there, here = f"{name}: {key}", there.get(key), here.get(key)
        if there != here:
            raise CheckpointError(
                f"The checkpoint is of a model with {name} {there!r:.300}, this one has {here!r:.300}: construct the model as "
                "the one that was saved."
            )


def options(model: OffPolicyAlgorithm) -> dict[str, Any]:
    """:return: what may be different in the model that continues, which is told: numbers and strings, not functions"""
    noise = getattr(model.action_noise, "base_noise", model.action_noise)
    parts = {"": model, "replay buffer's ": model.replay_buffer, "noise's ": noise, "VecNormalize's ": model.get_vec_normalize_env()}
    found = {
        prefix + name: getattr(part, name, getattr(part, f"_{name}", None))
        for prefix, part in parts.items()
        for name in inspect.signature(type(part).__init__).parameters
        if part is not None and name not in _FREE_ARGUMENTS
    }
    return _plain(found)


def machine(model: OffPolicyAlgorithm) -> dict[str, Any]:
    """:return: what decides how numbers are rounded"""
    threads = {"number of threads": th.get_num_threads()} if model.device.type == "cpu" else {}
    return {"device": model.device.type, "PyTorch": th.__version__.partition("+")[0], "NumPy": np.__version__, **threads}


def read(model: OffPolicyAlgorithm) -> dict[str, Any]:
    """:return: everything that JSON can hold"""
    buffer = model.replay_buffer
    assert buffer is not None and model.env is not None
    seeds = [None if seed is None else int(seed) for seed in model.env.unwrapped._seeds]
    return {
        "counters": {name: int(getattr(model, name)) for name in _COUNTERS}
        | {name: float(getattr(model, name)) for name in _PROGRESS}
        | {name: getattr(model, name) for name in _OPTIONAL if hasattr(model, name)},
        # With what Monitor's info_keywords put there, NumPy's numbers as a rule
        "episodes": [to_builtin(dict(info)) for info in model.ep_info_buffer or ()],
        "successes": [float(success) for success in model.ep_success_buffer or ()],
        "buffer": {
            "pos": buffer.pos,
            "full": bool(buffer.full),
            "episode starts": buffer._current_ep_start.tolist() if isinstance(buffer, HerReplayBuffer) else None,
        },
        "VecNormalize": environments.moments(model.get_vec_normalize_env()),
        "random": random_state(),
        "action space": to_builtin(model.action_space.np_random.bit_generator.state),
        "noise": noise_state(noise_of_each(model)),
        # With which the environments will be reset for the first time; None if they have been
        "seeds": seeds if any(seed is not None for seed in seeds) else None,
        "options": options(model),
        "machine": machine(model),
    }


def tensors(model: OffPolicyAlgorithm) -> dict[str, Any]:
    """:return: parameters, optimizers and observations, of types that ``torch.load(weights_only=True)`` reads"""
    last = model._last_obs
    if isinstance(last, dict):
        last = {key: th.from_numpy(np.ascontiguousarray(array)) for key, array in last.items()}  # type: ignore[assignment]
    elif last is not None:
        last = th.from_numpy(np.ascontiguousarray(last))  # type: ignore[assignment]
    parameters = model.get_parameters()
    for name, _ in _optimizers(model):
        parameters[name] = {"state": parameters[name]["state"]}
    variables = {name: getattr(model, name).detach() for name in model._get_torch_save_params()[1]}
    return {"parameters": parameters, "variables": variables, "last": last}


def check_json(model: OffPolicyAlgorithm, content: Any) -> dict[str, Any]:
    """
    :param model: that is not changed
    :param content: of state.json
    :return: the same, every entry checked
    :raises ValueError: at the first that is not what ``read`` gives
    """
    buffer, own = model.replay_buffer, noise_state(noise_of_each(model))
    assert buffer is not None
    row, any_json = whole(0, buffer.buffer_size - 1), lambda name, value: value
    statistics = environments.moments(model.get_vec_normalize_env())
    extra = {name: check for name, check in _OPTIONAL.items() if hasattr(model, name)}
    starts = sequence(row, model.n_envs) if isinstance(buffer, HerReplayBuffer) else of_type(type(None))
    checked = record(
        {
            "counters": record(_COUNTERS | _PROGRESS | extra),
            "episodes": sequence(record({"r": number(), "l": number(0)}, any_json)),
            "successes": sequence(number()),
            "buffer": record({"pos": row, "full": of_type(bool), "episode starts": starts}),
            "VecNormalize": of_type(type(None)) if statistics is None else packed_like(statistics),
            "random": read_random_state,
            "action space": generator,
            "noise": _noise_like(own),
            "seeds": optional(sequence(optional(whole(0, 2**32 - 1)), model.n_envs)),
            "options": of_type(dict),
            "machine": of_type(dict),
            "environments": environments.check_state(environments.read(model.env)),  # type: ignore[arg-type]  # was checked
            "boundary": of_type(bool),
            "callbacks": sequence(record({"class": of_type(str), "values": record({}, numbers)})),
        }
    )("state", content)
    return checked


def _noise_like(own: Any) -> Callable[[str, Any], Any]:
    """:return: a check for finite numbers of the shape of one's own, or None for a noise without a state"""

    def check(name: str, value: Any) -> Any:
        if own is None or own == [None] * len(own):
            return packed_like(own)(name, value)
        array = np.array(numbers(name, value), dtype=np.float64)
        if array.shape != np.shape(own) or not np.isfinite(array).all():
            raise ValueError(f"{name} is no array of finite numbers of shape {np.shape(own)}")
        return array

    return check


def check_tensors(model: OffPolicyAlgorithm, content: Any) -> dict[str, Any]:
    """
    :param model: that is not changed
    :param content: of tensors.pt
    :return: the same, every tensor checked and copied, with the model's own options for its optimizers
    :raises ValueError: at the first that is not what ``tensors`` gives
    """
    own = model.get_parameters()
    fields = {name: record({key: tensor_like(each) for key, each in own[name].items()}) for name in own if "state" not in own[name]}
    for name, optimizer in _optimizers(model):
        fields[name] = record({"state": _moments(optimizer)}, lambda name, value: None)
    variables = {name: tensor_like(getattr(model, name)) for name in model._get_torch_save_params()[1]}
    checked = record({"parameters": record(fields), "variables": record(variables)}, lambda name, value: value)("tensors", content)
    for name, _ in _optimizers(model):
        checked["parameters"][name] = {**own[name], "state": checked["parameters"][name]["state"]}
    # Beyond it the temperature is infinite
    if "log_ent_coef" in variables and abs(checked["variables"]["log_ent_coef"].item()) > 80:
        raise ValueError("the temperature is out of range")
    return checked


def _moments(optimizer: th.optim.Optimizer) -> Callable[[str, Any], Any]:
    """:return: a check for the state of an optimizer: that which one step makes, or none where there was no step yet"""
    twin = copy.deepcopy(optimizer)
    for parameter in (parameter for group in twin.param_groups for parameter in group["params"]):
        parameter.grad = th.zeros_like(parameter)
    twin.step()
    state = twin.state_dict()["state"]

    def check(name: str, value: Any) -> Any:
        if type(value) is not dict or not value.keys() <= state.keys():
            raise ValueError(f"{name} is of other parameters")
        return {
            index: record({key: _scalar_or(template) for key, template in state[index].items()})(f"{name}[{index}]", saved)
            for index, saved in value.items()
        }

    return check


def _scalar_or(template: Any) -> Callable[[str, Any], Any]:
    return tensor_like(template) if isinstance(template, th.Tensor) else packed_like(template)


def apply(model: OffPolicyAlgorithm, saved: dict[str, Any], saved_tensors: dict[str, Any]) -> None:
    """
    Put a training into a model, all but its environments and its replay buffer's content. Everything was checked.

    :param model: that was constructed as the one that was saved
    :param saved: from ``check_json``
    :param saved_tensors: from ``check_tensors``
    """
    model.set_parameters(saved_tensors["parameters"], exact_match=True, device=model.device)
    for name, value in saved_tensors["variables"].items():
        variable = getattr(model, name)
        if variable.requires_grad:  # what is not learned is the constructor's
            variable.detach().copy_(value)
    for name, value in saved["counters"].items():
        setattr(model, name, value)
    model._num_timesteps_at_start = model.num_timesteps
    # What was made from the parameters is made anew
    model._create_aliases()  # type: ignore[attr-defined]  # every off-policy algorithm has it
    size = model._stats_window_size
    model.ep_info_buffer, model.ep_success_buffer = deque(saved["episodes"], size), deque(saved["successes"], size)
    buffer = model.replay_buffer
    assert buffer is not None
    buffer.pos, buffer.full = saved["buffer"]["pos"], saved["buffer"]["full"]
    if isinstance(buffer, HerReplayBuffer):
        buffer._current_ep_start = np.array(saved["buffer"]["episode starts"], dtype=np.int64)
    model.action_space._np_random = saved["action space"]
    model.action_noise = noise_of_each(model)
    noises = getattr(model.action_noise, "noises", None)
    for noise, value in zip(noises or [model.action_noise], saved["noise"] if noises else [saved["noise"]], strict=True):
        if isinstance(noise, OrnsteinUhlenbeckActionNoise):
            noise.noise_prev = value


def noise_of_each(model: OffPolicyAlgorithm) -> ActionNoise | None:
    """:return: the action noise as ``learn()`` makes it: one for each environment where there are several"""
    noise = model.action_noise
    if noise is None or model.n_envs == 1 or isinstance(noise, VectorizedActionNoise):
        return noise
    return VectorizedActionNoise(noise, model.n_envs)


def noise_state(noise: ActionNoise | None) -> Any:
    """
    :param noise: the model's action noise
    :return: its state
    :raises CheckpointError: if it is of a class whose state is not known
    """
    if noise is None or type(noise) is NormalActionNoise:
        return None
    if type(noise) is OrnsteinUhlenbeckActionNoise:
        return noise.noise_prev.tolist()
    if type(noise) is VectorizedActionNoise:
        states = [noise_state(part) for part in noise.noises]
        return states
    raise CheckpointError(
        f"An action noise of class {type(noise).__name__} may have state that cannot be stored: use one of SB3's."
    )
