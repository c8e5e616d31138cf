"""Checks of what a checkpoint holds. Each returns the value or raises an error with its name, before a model is changed."""

import enum
import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch as th

Check = Callable[[str, Any], Any]
# Second moments, variances, counts
_NOT_NEGATIVE = ("exp_avg_sq", "square_avg", "sum", "step", "running_var", "num_batches_tracked", "var", "count")
# The last position in the buffer of each bit generator: NumPy does not check it
_POSITIONS = {"PCG64": 0, "PCG64DXSM": 0, "MT19937": 624, "Philox": 4, "SFC64": 0}


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read: one sentence says why. The model and older checkpoints are unchanged."""


def number(low: float = -math.inf, high: float = math.inf, kind: Any = float) -> Check:
    """:return: a check for finite numbers in a range"""

    def check(name: str, value: Any) -> Any:
        if type(value) not in (int, kind) or not low <= value <= high or abs(value) == math.inf:
            raise ValueError(f"{name} is {value!r:.40} instead of a number from {low} to {high}")
        return kind(value)

    return check


def whole(low: int = 0, high: int = 2**63 - 1) -> Check:
    """:return: a check for integers in a range"""
    return number(low, high, int)


def optional(own: Any) -> Check:
    """:return: a check that also accepts None"""
    return lambda name, value: None if value is None else like(own, name, value)


def scalar(name: str, value: Any) -> Any:
    """Check for a number, infinity included."""
    return value if isinstance(value, (bool, float)) else whole(-(2**63))(name, value)


def numbers(name: str, value: Any) -> Any:
    """Check for a number, infinity included, or lists of them."""
    return [numbers(name, item) for item in value] if type(value) is list else scalar(name, value)


def like(own: Any, name: str, value: Any) -> Any:
    """
    Check a value.

    :param own: what it has to be like: a type; an array, a tensor or a number; a dictionary with the same keys, where ``...``
        stands for any other; a list of the same length, or ``[each, ...]`` for any length; a check; or ``Any``
    :param name: of the value, in an error
    :param value: to check
    :return: the value; arrays and tensors share no memory with it
    :raises ValueError: if it is anything else
    """
    if own is Any:
        return value
    if isinstance(own, dict):
        keys = own.keys() - {...}
        if not isinstance(value, dict) or not keys <= value.keys() or (value.keys() != keys and ... not in own):
            raise ValueError(f"{name} does not have the entries {sorted(keys)}")
        return {key: like(own[key if key in own else ...], f"{name}.{key}", item) for key, item in value.items()}
    if isinstance(own, list):
        items = like(list, name, value)
        kinds = own[:1] * len(items) if own[1:] == [...] else own
        if len(items) != len(kinds):
            raise ValueError(f"{name} has {len(items)} entries instead of {len(kinds)}")
        return [like(kind, f"{name}[{index}]", item) for index, (kind, item) in enumerate(zip(kinds, items, strict=True))]
    if isinstance(own, np.ndarray):
        return _tensor_like(th.from_numpy(own), name, th.from_numpy(value)).numpy()
    if isinstance(own, th.Tensor):
        return _tensor_like(own, name, value)
    if isinstance(own, (int, float)):
        return number()(name, value)
    if own is None or isinstance(own, type):
        if type(value) is not (own or type(None)):
            raise ValueError(f"{name} is {value!r:.40} instead of {own and own.__name__}")
        return value
    return own(name, value)


def _tensor_like(own: th.Tensor, name: str, value: Any) -> th.Tensor:
    is_dense = isinstance(value, th.Tensor) and value.layout == th.strided
    if not is_dense or (value.shape, value.dtype) != (own.shape, own.dtype):
        raise ValueError(f"{name} is no tensor of {own.dtype} and shape {list(own.shape)}")
    copy = th.empty(own.shape, dtype=own.dtype).copy_(value.detach())
    if not th.isfinite(copy).all() or (name.endswith(_NOT_NEGATIVE) and (copy < 0).any()):
        raise ValueError(f"{name} holds numbers that are not finite or negative")
    return copy


def to_builtin(value: Any) -> Any:
    """:return: the value with NumPy's arrays and numbers, tuples and enumerations as JSON has them"""
    if isinstance(value, dict):
        return {key: to_builtin(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_builtin(item) for item in value]
    if isinstance(value, enum.Enum):
        return value.value
    return value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value


def is_plain(value: Any, kinds: tuple[type, ...] = (bool, int, float)) -> bool:
    """:return: whether a value, as ``to_builtin`` gives it, consists of these types or lists of them"""
    return all(is_plain(each, kinds) for each in value) if isinstance(value, list) else isinstance(value, kinds)


def pack(value: Any) -> Any:
    """
    :param value: numbers, strings, arrays, NumPy's generators, or lists and dictionaries of them
    :return: the same for JSON
    :raises TypeError: if it is anything else
    """
    if isinstance(value, np.random.Generator):
        return {"__generator__": to_builtin(value.bit_generator.state)}
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        return {"__array__": value.tolist(), "dtype": value.dtype.str, "shape": list(value.shape)}
    if isinstance(value, dict) and all(type(key) is str for key in value):
        return {key: pack(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [pack(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if value is not None and not isinstance(value, (bool, int, float, str)):
        raise TypeError(f"its state holds a {type(value).__name__}")
    return value


def unpack(value: Any) -> Any:
    """:return: what ``pack`` was given; an error if it was not from ``pack``"""
    if isinstance(value, list):
        return [unpack(item) for item in value]
    if isinstance(value, dict) and "__generator__" in value:
        return generator("generator", value["__generator__"])
    if isinstance(value, dict) and "__array__" in value:
        dtype = np.dtype(like(str, "dtype", value["dtype"]))
        if dtype.kind not in "biuf":  # text could be of any length
            raise ValueError(f"an array has the type {dtype}")
        array = np.array(numbers("array", value["__array__"]), dtype)
        return array.reshape(like([whole(), ...], "shape", value["shape"]))
    return {key: unpack(item) for key, item in value.items()} if isinstance(value, dict) else value


def generator(name: str, state: Any) -> np.random.Generator:
    """Check for the state of one of NumPy's generators; returns a generator in that state."""
    kind = state["bit_generator"]
    if kind not in _POSITIONS:
        raise ValueError(f"{name} is of no known kind")
    bit_generator = getattr(np.random, kind)()
    outer, inner = (
        {key: np.asarray(item, np.uint64) if isinstance(item, list) else item for key, item in each.items()}
        for each in (state, state["state"])
    )
    for position in (inner.get("pos", 0), outer.get("buffer_pos", 0)):
        whole(0, _POSITIONS[kind])(f"{name}'s position", position)
    bit_generator.state = {**outer, "state": inner}
    if to_builtin(bit_generator.state) != state:
        raise ValueError(f"{name} has no state of {kind}")
    return np.random.Generator(bit_generator)


def random_state() -> dict[str, Any]:
    """:return: states of Python's, NumPy's and PyTorch's global generators"""
    cuda = th.cuda.get_rng_state_all() if th.cuda.is_available() else []
    states = {"python": random.getstate(), "numpy": np.random.get_state(), "torch": th.get_rng_state().numpy()}
    return to_builtin({**states, "cuda": [each.numpy() for each in cuda]})


def checked_random_state(name: str, state: Any) -> dict[str, Any]:
    """Check for what ``random_state`` returns: sets generators of its own."""
    python = [int, [whole(), ...], optional(number())]
    legacy = [str, [whole(), ...], whole(0, 624), whole(0, 1), number()]
    tensor = [whole(0, 255), ...]
    state = like({"python": python, "numpy": legacy, "torch": tensor, "cuda": [tensor, ...]}, name, state)
    set_random_state(state, random.Random(), np.random.RandomState(), th.Generator())
    return state


def set_random_state(state: Any, python: Any = random, legacy: Any = np.random, torch: Any = th.default_generator) -> None:
    """Put a checked state into these generators: by default the global ones, and those of the GPUs."""
    version, internal, gauss = state["python"]
    python.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = state["numpy"]
    legacy.set_state((kind, np.array(keys, np.uint32), *rest))
    torch.set_state(th.tensor(state["torch"], dtype=th.uint8))
    if torch is th.default_generator and th.cuda.is_available() and len(state["cuda"]) == th.cuda.device_count():
        th.cuda.set_rng_state_all([th.tensor(each, dtype=th.uint8) for each in state["cuda"]])
