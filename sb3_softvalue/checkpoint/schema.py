"""What a checkpoint may say: validators of JSON and of tensors, which return the value or raise ValueError with its name."""

import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch as th

Check = Callable[[str, Any], Any]
# Second moments, variances and counts
_NOT_NEGATIVE = ("exp_avg_sq", "square_avg", "sum", "step", "running_var", "num_batches_tracked", "var", "count")
# The largest position in the buffer of each bit generator: NumPy does not check what it is given
_POSITIONS = {"PCG64": 0, "PCG64DXSM": 0, "MT19937": 624, "Philox": 4, "SFC64": 0}


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read: one sentence that says why; the model and older checkpoints are as before."""


def whole(low: int = 0, high: int = 2**63 - 1) -> Check:
    """:return: a check for integers in a range, its bounds included"""

    def check(name: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise ValueError(f"{name} is {value!r:.40} instead of an integer from {low} to {high}")
        return value

    return check


def number(low: float = -math.inf, high: float = math.inf) -> Check:
    """:return: a check for finite numbers in a range"""

    def check(name: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high or abs(value) == math.inf:
            raise ValueError(f"{name} is {value!r:.40} instead of a finite number from {low} to {high}")
        return float(value)

    return check


def of_type(*types: type) -> Check:
    """:return: a check for the type itself"""

    def check(name: str, value: Any) -> Any:
        if type(value) not in types:
            raise ValueError(f"{name} is {value!r:.40} instead of {' or '.join(each.__name__ for each in types)}")
        return value

    return check


def optional(inner: Check) -> Check:
    """:return: a check that lets None pass"""
    return lambda name, value: None if value is None else inner(name, value)


def sequence(inner: Check, length: int | None = None) -> Check:
    """:return: a check for lists, of one length if given"""

    def check(name: str, value: Any) -> list[Any]:
        if type(value) is not list or length not in (None, len(value)):
            raise ValueError(f"{name} is no list{'' if length is None else f' of {length}'}")
        return [inner(f"{name}[{index}]", item) for index, item in enumerate(value)]

    return check


def record(fields: dict[str, Check], more: Check | None = None) -> Check:
    """:return: a check for dictionaries with these fields, and others only if there is a check for them"""

    def check(name: str, value: Any) -> dict[str, Any]:
        if not isinstance(value, dict) or not fields.keys() <= value.keys() or (more is None and len(value) > len(fields)):
            raise ValueError(f"{name} does not have the entries {sorted(fields)}")
        return {key: fields.get(key, more)(f"{name}.{key}", item) for key, item in value.items()}  # type: ignore[misc]

    return check


def numbers(name: str, value: Any) -> Any:
    """Check for a number, infinity included, or lists of them."""
    if type(value) is list:
        return [numbers(name, item) for item in value]
    if not isinstance(value, (bool, int, float)) or (isinstance(value, int) and abs(value) >= 2**63):
        raise ValueError(f"{name} is {value!r:.40} instead of a number or a list of them")
    return value


def tensor_like(own: th.Tensor) -> Check:
    """:return: a check for finite tensors of the type and shape of one; what comes out shares no memory with what came in"""

    def check(name: str, value: Any) -> th.Tensor:
        if not isinstance(value, th.Tensor) or value.layout != th.strided or (value.shape, value.dtype) != (own.shape, own.dtype):
            raise ValueError(f"{name} is no tensor of {own.dtype} and shape {list(own.shape)}")
        copy = th.empty(own.shape, dtype=own.dtype).copy_(value.detach())
        if not th.isfinite(copy).all():
            raise ValueError(f"{name} holds numbers that are not finite")
        if name.endswith(_NOT_NEGATIVE) and (copy < 0).any():
            raise ValueError(f"{name} holds negative numbers")
        return copy

    return check


def to_builtin(value: Any) -> Any:
    """:return: the value with NumPy's arrays and numbers as lists and Python's"""
    if isinstance(value, dict):
        return {key: to_builtin(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_builtin(item) for item in value]
    return value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value


def pack(value: Any) -> Any:
    """
    :param value: what an environment gives as its state: numbers, strings, arrays, NumPy's generators, lists and dictionaries
    :return: what JSON can hold of it
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
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, np.generic) and value.dtype.kind in "biuf":
        return value.item()
    raise TypeError(f"its state holds a {type(value).__name__}")


def unpack(value: Any) -> Any:
    """:return: what ``pack`` was given; ValueError if it was given something else"""
    if isinstance(value, list):
        return [unpack(item) for item in value]
    if isinstance(value, dict) and "__generator__" in value:
        return generator("generator", value["__generator__"])
    if isinstance(value, dict) and "__array__" in value:
        array = np.array(numbers("array", value["__array__"]), dtype=np.dtype(of_type(str)("dtype", value["dtype"])))
        if array.dtype.kind not in "biuf":
            raise ValueError(f"an array has the type {array.dtype}")
        return array.reshape(sequence(whole())("shape", value["shape"]))
    return {key: unpack(item) for key, item in value.items()} if isinstance(value, dict) else value


def packed_like(own: Any) -> Check:
    """:return: a check for what has the structure, the types and shapes of something packed, and finite numbers"""

    def check(name: str, value: Any) -> Any:
        if isinstance(own, dict):
            fields = {key: packed_like(item) for key, item in own.items()}
            if "__array__" in own:
                fields = {"dtype": packed_like(own["dtype"]), "shape": packed_like(own["shape"]), "__array__": numbers}
                if not np.isfinite(array := unpack(value)).all() or (name.endswith(_NOT_NEGATIVE) and (array < 0).any()):
                    raise ValueError(f"{name} holds numbers that are negative or not finite")
            return record(fields)(name, value)
        if isinstance(own, list):
            return [packed_like(item)(name, each) for item, each in zip(own, sequence(optional(of_type(float, int)))(name, value), strict=True)]
        if isinstance(own, (int, float)) and not isinstance(own, bool):
            low = 0 if name.endswith(_NOT_NEGATIVE) else -math.inf
            return whole(-(2**63))(name, value) if isinstance(own, int) else number(low)(name, value)
        if value != own or type(value) is not type(own):
            raise ValueError(f"{name} is {value!r:.40} instead of {own!r:.40}")
        return value

    return check


def generator(name: str, state: Any) -> np.random.Generator:
    """Check for the state of one of NumPy's generators; gives a generator that continues from there."""
    kind = state["bit_generator"]
    if kind not in _POSITIONS:
        raise ValueError(f"{name} is of no known kind")
    bit_generator = getattr(np.random, kind)()
    as_arrays = {key: np.asarray(item, np.uint64) if isinstance(item, list) else item for key, item in state.items()}
    inner = {key: np.asarray(item, np.uint64) if isinstance(item, list) else item for key, item in state["state"].items()}
    for position in (inner.get("pos", 0), state.get("buffer_pos", 0)):
        whole(0, _POSITIONS[kind])(f"{name}'s position", position)
    bit_generator.state = {**as_arrays, "state": inner}
    if to_builtin(bit_generator.state) != state:
        raise ValueError(f"{name} has no state of {kind}")
    return np.random.Generator(bit_generator)


def random_state() -> dict[str, Any]:
    """:return: states of Python's, NumPy's and PyTorch's global generators"""
    version, internal, gauss = random.getstate()
    numpy_state: Any = np.random.get_state()
    cuda = th.cuda.get_rng_state_all() if th.cuda.is_available() else []
    return {
        "python": [version, list(internal), gauss],
        "numpy": to_builtin(numpy_state),
        "torch": th.get_rng_state().tolist(),
        "cuda": [state.tolist() for state in cuda],
    }


def read_random_state(name: str, state: Any) -> Callable[[], None]:
    """Check for what ``random_state`` gave, tried on generators of its own; gives a function that sets the global ones."""
    state = record({"python": of_type(list), "numpy": of_type(list), "torch": of_type(list), "cuda": of_type(list)})(name, state)
    version, internal, gauss = state["python"]
    python = (version, tuple(internal), optional(number())(name, gauss))
    random.Random().setstate(python)
    kind, keys, position, has_gauss, cached = state["numpy"]
    legacy = (kind, np.array(keys, np.uint32), whole(0, 624)(name, position), whole(0, 1)(name, has_gauss), number()(name, cached))
    np.random.RandomState().set_state(legacy)
    tensors = [th.tensor(sequence(whole(0, 255))(name, each), dtype=th.uint8) for each in (state["torch"], *state["cuda"])]
    th.Generator().set_state(tensors[0])

    def apply() -> None:
        random.setstate(python)
        np.random.set_state(legacy)
        th.set_rng_state(tensors[0])
        if th.cuda.is_available() and len(tensors) - 1 == th.cuda.device_count():
            th.cuda.set_rng_state_all(tensors[1:])

    return apply
