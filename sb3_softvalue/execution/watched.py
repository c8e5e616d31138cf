"""What a compiled or captured graph has fixed beside its inputs."""

from collections.abc import Sequence
from typing import Any

import torch as th
from torch import nn

from sb3_softvalue.execution.arguments import same_objects
from sb3_softvalue.networks import is_known_module


class Watched:
    """
    What a graph of the objective has fixed beside its inputs, to be compared before the graph is used again.

    :param objective: the joint objective, or another module around networks
    :param learned: the parameters to differentiate by; all others are constants
    """

    def __init__(self, objective: nn.Module, learned: Sequence[th.Tensor]):
        self.learned = learned
        self.names: dict[int, str] = {}
        ids = set(map(id, learned))
        # By place, since a buffer may be replaced instead of changed
        self._places: dict[str, tuple[dict[str, Any], str]] = {}
        for prefix, module in objective.named_modules():
            for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is None or id(tensor) in self.names:
                    continue
                full_name = self.names[id(tensor)] = f"{prefix}.{name}" if prefix else name
                if id(tensor) not in ids:
                    members = module._parameters if name in module._parameters else module._buffers
                    self._places[full_name] = members, name
        self.constant_names = list(self._places)
        modules = [module for network in objective.children() for module in network.modules()]
        self._children = [(module._modules, list(module._modules.values())) for module in modules if module._modules]
        # Plain layers compute from their parameters alone; about others only their plain attributes can be watched
        self._others = [module for module in modules if not is_known_module(module)]

    def are_current(self, params: Sequence[th.Tensor]) -> bool:
        """
        :param params: of the next step
        :return: whether these are the parameters that are learned, and no module has been exchanged or computes its weights
        """
        if params is not self.learned and same_objects(params, self.learned):
            self.learned = params
        return (
            params is self.learned
            and all(list(now.values()) == then for now, then in self._children)
            and all(name in members for members, name in self._places.values())
        )

    @property
    def constants(self) -> list[th.Tensor]:
        """What is read and not learned, in the order of ``constant_names``"""
        return [members[name] for members, name in self._places.values()]

    def state(self) -> tuple[Any, ...]:
        """:return: hashable, equal as long as no attribute of a module that is not a plain layer has changed"""
        return tuple(
            (name, value)
            for module in self._others
            for name, value in vars(module).items()
            if isinstance(value, (bool, int, float, str))
        )
