"""The networks as they were when all of their parameters were finite, to go back to."""

from collections.abc import Sequence

import torch as th
from torch import nn

from sb3_softvalue.guard.errors import non_finite_names

# Gradient steps between two copies: looking at every parameter costs about a hundredth of an update
INTERVAL = 100


class Backup:
    """
    A copy of the networks, renewed every so many gradient steps.

    :param networks: with their names
    """

    def __init__(self, **networks: nn.Module):
        self._networks = networks
        self._copies: list[th.Tensor] = []
        self._n_updates = 0

    def tensors(self) -> list[tuple[str, th.Tensor]]:
        """:return: parameters and buffers with their names"""
        return [
            (f"{prefix}.{name}", tensor) for prefix, net in self._networks.items() for name, tensor in net.state_dict().items()
        ]

    def broken(self) -> list[str]:
        """:return: names of the parameters that are not finite"""
        return non_finite_names(self.tensors())

    @th.no_grad()
    def renew(self, n_updates: int) -> list[str]:
        """
        Copy the networks where the copy is old, and not if they are broken.

        :param n_updates: gradient steps made so far
        :return: names of the parameters that are not finite, as far as was looked
        """
        if self._copies and n_updates < self._n_updates + INTERVAL:
            return []
        broken = self.broken()
        if not broken:
            tensors = [tensor for _, tensor in self.tensors()]
            if _fits(self._copies, tensors):
                for copy, tensor in zip(self._copies, tensors, strict=True):
                    copy.copy_(tensor)
            else:
                self._copies = [tensor.clone() for tensor in tensors]
            self._n_updates = n_updates
        return broken

    @th.no_grad()
    def restore(self) -> int | None:
        """
        Put the networks back.

        :return: how many gradient steps had been made then; None where there is no copy of these networks
        """
        tensors = [tensor for _, tensor in self.tensors()]
        if not self._copies or not _fits(self._copies, tensors):
            return None
        for copy, tensor in zip(self._copies, tensors, strict=True):
            tensor.copy_(copy)
        return self._n_updates


def _fits(copies: Sequence[th.Tensor], tensors: Sequence[th.Tensor]) -> bool:
    """:return: whether the copies are of tensors of the same shapes"""
    return [copy.shape for copy in copies] == [tensor.shape for tensor in tensors]
