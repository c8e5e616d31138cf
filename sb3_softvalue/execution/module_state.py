"""What a compiled or captured graph assumes about its modules."""

import operator
from collections.abc import Iterable
from typing import Any

import torch as th
from stable_baselines3.common.torch_layers import FlattenExtractor
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from sb3_softvalue.policies import is_plain_module, submodules

# Layers whose output depends on nothing but their input and parameters
_WITHOUT_OPTIONS = {
    *(nn.Sequential, nn.Linear, nn.ReLU, nn.Tanh, nn.Sigmoid, nn.SiLU, nn.Mish, nn.Identity),
    # Has options, but other values would not fit the next layer
    *(nn.Flatten, FlattenExtractor),
}

# Forward methods of the modules' classes when the first graph was created
_FORWARDS: dict[Any, Any] = {}


class ModuleState:
    """
    A snapshot of a module's submodules with their tensors, options and methods, compared before a graph is reused.

    :param module: module of the graph
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
        # A callable attribute may replace a method of the class
        self.is_plain = all(child is module or is_plain_module(child) for child in self._modules) and not any(
            callable(getattr(type(child), name, None)) for child in self._modules for name in vars(child)
        )
        """Whether the result depends only on the inputs and on what is compared here"""

    def _find_places(self) -> list[Any]:
        """:return: addresses and strides of the tensors, and which of them are learned"""
        functions = (th.Tensor.data_ptr, th.Tensor.stride, operator.attrgetter("requires_grad"))
        return [list(map(function, self._tensors)) for function in functions]

    def is_current(self) -> bool:
        """:return: whether no submodule, tensor, option or method was added, removed, replaced or frozen"""
        modules = submodules(self._module)
        if modules != self._modules or list(map(type, modules)) != self._types:
            return False
        tensors = _tensors(modules)
        if len(tensors) != len(self._tensors) or not all(map(operator.is_, tensors, self._tensors)):
            return False
        try:
            is_same = [vars(child) for child in self._with_options] == self._attributes
        except (RuntimeError, ValueError):  # an array or tensor attribute was replaced: comparing it gives no bool
            return False
        return is_same and self._find_places() == self._places

    def has_hooks(self) -> bool:
        """:return: whether the user has added a hook or replaced a forward method, which a graph would skip"""
        if _has_any_global_hook() or any(kind.forward is not _FORWARDS[kind] for kind in self._kinds):
            return True
        for child in self._modules:
            if child._forward_hooks or child._forward_pre_hooks or child._backward_hooks or child._backward_pre_hooks:
                return True
            if "forward" in vars(child):  # replaced on the instance
                return True
        return False


def has_hooks(params: Iterable[th.Tensor]) -> bool:
    """:return: whether a parameter has a hook that may change its gradient"""
    return any(param._backward_hooks for param in params)


def signature(tensors: Iterable[th.Tensor]) -> tuple[Any, ...]:
    """:return: what a graph assumes about its inputs"""
    return tuple((tensor.shape, tensor.stride(), tensor.dtype) for tensor in tensors)


def _attributes(module: nn.Module) -> dict[str, Any]:
    """:return: a copy of all attributes; lists, such as a critic's ``q_networks``, are copied too"""
    return {name: value.copy() if isinstance(value, list) else value for name, value in vars(module).items()}


def _tensors(modules: Iterable[nn.Module]) -> list[th.Tensor]:
    """:return: all parameters and buffers"""
    found: list[th.Tensor | None] = []
    for module in modules:
        for members in (module._parameters, module._buffers):
            if members:
                found += members.values()
    return [tensor for tensor in found if tensor is not None]
