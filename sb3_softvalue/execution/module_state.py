"""What a compiled or captured graph of networks has fixed beside its inputs."""

import operator
from collections.abc import Iterable
from typing import Any

import torch as th
from stable_baselines3.common.torch_layers import FlattenExtractor
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from sb3_softvalue.policies import is_plain_module, submodules

# Layers without options: nothing but their parameters decides what they compute
_WITHOUT_OPTIONS = {
    *(nn.Sequential, nn.Linear, nn.ReLU, nn.Tanh, nn.Sigmoid, nn.SiLU, nn.Mish, nn.Identity),
    # It has, but other dimensions would fit nothing
    *(nn.Flatten, FlattenExtractor),
}

# The forward methods of modules' classes, as they were when a graph was first made
_FORWARDS: dict[Any, Any] = {}


class ModuleState:
    """
    The submodules of a module with their tensors, options and methods, to be compared before a graph of it is used again.

    :param module: of which the graph is
    """

    def __init__(self, module: nn.Module):
        self._module = module
        self._modules = submodules(module)
        self._tensors = _tensors(self._modules)
        self._places = self._find_places()
        self._with_options = [child for child in self._modules if type(child) not in _WITHOUT_OPTIONS]
        self._attributes = [_attributes(child) for child in self._with_options]
        self._types = list(map(type, self._modules))
        self._kinds: set[Any] = set(self._types)
        for kind in self._kinds:
            _FORWARDS.setdefault(kind, kind.forward)
        self.is_plain = all(child is module or is_plain_module(child) for child in self._modules) and not any(
            callable(getattr(type(child), name, None)) for child in self._modules for name in vars(child)
        )
        """Whether all that is computed depends on what is compared here and on inputs alone"""

    def _find_places(self) -> list[Any]:
        """:return: where the tensors are, and which of them are learned"""
        functions = (th.Tensor.data_ptr, th.Tensor.stride, operator.attrgetter("requires_grad"))
        return [list(map(function, self._tensors)) for function in functions]

    def is_current(self) -> bool:
        """:return: whether no submodule, tensor, option or method was added, removed or exchanged, and none was frozen"""
        modules = submodules(self._module)
        if modules != self._modules or list(map(type, modules)) != self._types:
            return False
        tensors = _tensors(modules)
        if len(tensors) != len(self._tensors) or not all(map(operator.is_, tensors, self._tensors)):
            return False
        try:
            is_same = [vars(child) for child in self._with_options] == self._attributes
        except (RuntimeError, ValueError):  # of an array or a tensor that was exchanged, whose comparison gives an array
            return False
        return is_same and self._find_places() == self._places

    def has_hooks(self) -> bool:
        """:return: whether something of the user's runs in forward or backward pass, which a graph from before would leave
        out"""
        if _has_any_global_hook() or any(kind.forward is not _FORWARDS[kind] for kind in self._kinds):
            return True
        for child in self._modules:
            if child._forward_hooks or child._forward_pre_hooks or child._backward_hooks or child._backward_pre_hooks:
                return True
            if "forward" in vars(child):  # replaced on the object itself, as above on its class
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


def _attributes(module: nn.Module) -> dict[str, Any]:
    """:return: a copy of all attributes, of lists too, such as a critic's ``q_networks``"""
    return {name: value.copy() if isinstance(value, list) else value for name, value in vars(module).items()}


def _tensors(modules: Iterable[nn.Module]) -> list[th.Tensor]:
    """:return: all parameters and buffers"""
    found: list[th.Tensor | None] = []
    for module in modules:
        for members in (module._parameters, module._buffers):
            if members:
                found += members.values()
    return [tensor for tensor in found if tensor is not None]
