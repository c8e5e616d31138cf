"""What a compiled or captured graph of networks has fixed beside its inputs."""

from collections.abc import Iterable
from typing import Any

import torch as th
from torch import nn

from sb3_softvalue.policies import is_plain_module, submodules


class ModuleState:
    """
    The submodules of a module and where their tensors are, to be compared before a graph of it is used again.

    :param module: of which the graph is
    """

    def __init__(self, module: nn.Module):
        self._module = module
        self._modules = submodules(module)
        self._tensors = self._find_tensors(self._modules)
        self._others = [child for child in self._modules if not is_plain_module(child)]
        self.is_plain = all(child is module for child in self._others)
        """Whether all that is computed depends on submodules, tensors and inputs alone"""

    @staticmethod
    def _find_tensors(modules: Iterable[nn.Module]) -> list[Any]:
        """:return: identity, place and kind of all parameters and buffers"""
        found: list[Any] = []
        for child in modules:
            for members in (child._parameters, child._buffers):
                if members:
                    found += [(id(t), t.data_ptr(), t.requires_grad) for t in members.values() if t is not None]
        return found

    def is_current(self) -> bool:
        """:return: whether no submodule and no tensor was added, removed, exchanged or frozen"""
        modules = submodules(self._module)
        return modules == self._modules and self._find_tensors(modules) == self._tensors

    def attributes(self) -> tuple[Any, ...]:
        """:return: hashable, equal as long as no plain attribute of a layer that is not a plain one has changed"""
        return tuple(
            (name, value)
            for module in self._others
            for name, value in vars(module).items()
            if isinstance(value, (bool, int, float, str))
        )

    def has_hooks(self) -> bool:
        """:return: whether something of the user's runs in forward or backward pass, which a graph from before would leave
        out"""
        for child in self._modules:
            if child._forward_hooks or child._forward_pre_hooks or child._backward_hooks or child._backward_pre_hooks:
                return True
            if "forward" in vars(child):  # replaced on the object itself
                return True
        return False


def has_hooks(params: Iterable[th.Tensor]) -> bool:
    """:return: whether something of the user's changes the gradient of a parameter"""
    for param in params:
        if param._backward_hooks:
            return True
    return False


def signature(tensors: Iterable[th.Tensor]) -> tuple[Any, ...]:
    """:return: what a graph has fixed about its inputs"""
    return tuple((tensor.shape, tensor.stride(), tensor.dtype) for tensor in tensors)
