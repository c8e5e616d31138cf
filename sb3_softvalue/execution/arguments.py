"""What the gradients of an update depend on, as flat lists of tensors for those executions that fix their inputs."""

import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch as th

from sb3_softvalue.update import Batch, Temperature

Gradients = tuple[Sequence[th.Tensor | None], th.Tensor]
GradientFunction = Callable[[Sequence[th.Tensor], Batch, th.Tensor | None, Temperature, Any], Gradients]


class Scalars:
    """
    Numbers as tensors that keep their place in memory, so that a schedule neither recompiles nor recaptures anything.

    :param device: of the tensors
    """

    def __init__(self, device: th.device):
        self.device = device
        self._tensors: dict[str, th.Tensor] = {}
        self._values: dict[str, float] = {}

    def of(self, batch: Batch, temperature: Temperature, reward_scale: float) -> tuple[Batch, Temperature, th.Tensor]:
        """
        :return: the same, every number of them a tensor
        """
        batch = batch._replace(discounts=self._tensor("discounts", batch.discounts))
        temperature = temperature._replace(target_entropy=self._tensor("target_entropy", temperature.target_entropy))
        return batch, temperature, self._tensor("reward_scale", reward_scale)

    def holds(self, tensor: th.Tensor | None) -> bool:
        """:return: whether this is one of these tensors, which needs no copying to where it is"""
        return any(tensor is own for own in self._tensors.values())

    def _tensor(self, name: str, value: th.Tensor | float) -> th.Tensor:
        """
        :param name: which number
        :param value: its value now; a tensor is passed through
        :return: shape () for a number
        """
        if isinstance(value, th.Tensor):
            return value
        if name not in self._tensors:
            # As exact as Python's number; without dimensions it does not promote what it is combined with
            self._tensors[name] = th.tensor(value, dtype=th.float64, device=self.device)
        elif self._values[name] != value:
            self._tensors[name].fill_(value)
        self._values[name] = value
        return self._tensors[name]


class Arguments(NamedTuple):
    """What the gradients depend on, every number of it a tensor."""

    params: Sequence[th.Tensor]
    """Of all optimizers, in order"""
    batch: Batch
    temperature: Temperature
    reward_scale: th.Tensor
    """Shape ()"""
    noise: th.Tensor | None
    """Shape (batch, action_dim)"""

    def tensors(self) -> list[th.Tensor]:
        """:return: all but the parameters in a fixed order, dict observations opened"""
        others = [self.temperature.ent_coef, self.temperature.target_entropy, self.reward_scale, self.noise]
        if self.temperature.log_ent_coef is not None and not self._learns_log_ent_coef():
            others.append(self.temperature.log_ent_coef)
        return [*self.batch.leaves(), *others]

    def _learns_log_ent_coef(self) -> bool:
        """:return: whether log α is the last of the parameters; frozen, it is none of them"""
        return any(param is self.temperature.log_ent_coef for param in self.params[-1:])

    def with_tensors(self, params: Sequence[th.Tensor], tensors: Sequence[th.Tensor]) -> "Arguments":
        """
        :param params: in place of these
        :param tensors: in place of ``tensors()``, in the same order
        :return: the same structure around other tensors
        """
        log_ent_coef = self.temperature.log_ent_coef
        if log_ent_coef is not None:
            if self._learns_log_ent_coef():
                log_ent_coef = params[-1]
            else:
                *tensors, log_ent_coef = tensors
        *leaves, ent_coef, target_entropy, reward_scale, noise = tensors
        temperature = Temperature(ent_coef, log_ent_coef, target_entropy)
        return Arguments(params, self.batch.with_leaves(leaves), temperature, reward_scale, noise)


def signature(tensors: Sequence[th.Tensor]) -> tuple[Any, ...]:
    """:return: what a compiled or captured function has fixed about its inputs"""
    return tuple((tensor.shape, tensor.stride(), tensor.dtype) for tensor in tensors)


def same_objects(first: Sequence[Any], second: Sequence[Any]) -> bool:
    """
    :return: whether both hold the same objects in the same order
    """
    return len(first) == len(second) and all(map(operator.is_, first, second))
