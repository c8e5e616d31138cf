"""The networks and the temperature as they were when all of their numbers were finite, to go back to."""

from collections.abc import Callable, Iterable, Sequence

import torch as th

from sb3_softvalue.guard.errors import non_finite_names

# Gradient steps between two copies: looking at every parameter costs about a hundredth of an update
INTERVAL = 100


class Backup:
    """
    A copy of what is learned, renewed every so many gradient steps.

    :param tensors: gives what is learned, parameters and buffers with their names
    """

    def __init__(self, tensors: Callable[[], Iterable[tuple[str, th.Tensor]]]):
        self._named = tensors
        self._copies: list[th.Tensor] = []
        self._n_updates = 0

    def broken(self) -> list[str]:
        """:return: names of the parameters that are not finite"""
        return non_finite_names(list(self._named()))

    @th.no_grad()
    def renew(self, n_updates: int) -> list[str]:
        """
        Copy where the copy is old, and not what is broken.

        :param n_updates: gradient steps made so far
        :return: names of the parameters that are not finite, as far as was looked
        """
        if self._copies and n_updates < self._n_updates + INTERVAL:
            return []
        broken = self.broken()
        if not broken:
            tensors = [tensor for _, tensor in self._named()]
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
        Put the copy back.

        :return: how many gradient steps had been made then; None where there is no copy of these tensors
        """
        tensors = [tensor for _, tensor in self._named()]
        if not self._copies or not _fits(self._copies, tensors):
            return None
        for copy, tensor in zip(self._copies, tensors, strict=True):
            tensor.copy_(copy)
        return self._n_updates


def _fits(copies: Sequence[th.Tensor], tensors: Sequence[th.Tensor]) -> bool:
    """:return: whether the copies are of tensors of the same shapes"""
    return [copy.shape for copy in copies] == [tensor.shape for tensor in tensors]
