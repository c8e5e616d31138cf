"""What is said when a number is not finite."""

from collections.abc import Iterable

import numpy as np
import torch as th

_LARGE = "make rewards smaller (VecNormalize, or reward_scale below 1), lower learning_rate, or set max_grad_norm"
# What usually helps, by the quantity
_REMEDIES = {
    "observation": "look in the environment for a diverged simulation or a division by zero, and end the episode before it",
    "reward": "look in the reward function for a division by zero, the logarithm of zero or an overflow",
    "action": "check action_noise and use_sde, or lower learning_rate",
    "loss": _LARGE,
    "gradient": _LARGE,
    "parameter": f"look for code that writes to the networks; else {_LARGE}",
}


class NonFiniteError(ValueError):
    """
    A quantity of the training is NaN or infinite. A ``ValueError``, as PyTorch's about the parameters of a distribution that
    it comes before, so that what handles that one (RL Zoo prunes the trial) handles this one.

    :param quantity: "observation", "reward", "action", "loss", "gradient" or "parameter"
    :param what: which one, where and what it was, the beginning of a sentence
    :param state: of the training, the part of a sentence in brackets
    :param aftermath: what was done about it, a sentence
    """

    def __init__(self, quantity: str, what: str, state: str, aftermath: str):
        self.quantity = quantity
        super().__init__(f"{what} ({state}). {aftermath} What usually helps: {_REMEDIES[quantity]}.")


def not_finite(array: np.ndarray) -> np.ndarray:
    """
    :param array: one row for each environment or transition, of any type
    :return: indices of the rows that hold a number which is not finite
    """
    if array.dtype.kind != "f" or np.isfinite(array).all():
        return np.empty(0, dtype=int)
    return np.flatnonzero(~np.isfinite(array).reshape(len(array), -1).all(axis=1))


def example(array: np.ndarray) -> str:
    """
    :param array: that holds a number which is not finite
    :return: that number
    """
    return str(array[~np.isfinite(array)][0])


def non_finite_names(tensors: Iterable[tuple[str, th.Tensor]]) -> list[str]:
    """
    :param tensors: with their names
    :return: names of those that hold a number which is not finite
    """
    floats = [(name, tensor) for name, tensor in tensors if tensor.is_floating_point()]
    # A sum is finite only if all of it is: nothing has to be written, and the device is waited for once
    if not floats or bool(th.isfinite(th.stack([tensor.sum() for _, tensor in floats])).all()):
        return []
    return [name for name, tensor in floats if not bool(th.isfinite(tensor).all())]
