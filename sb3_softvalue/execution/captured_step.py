"""The step of fused Adam on a GPU by one launch, where its launches from Python would take longer than it does."""

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch as th

from sb3_softvalue.execution.cuda_graph import capture

# Steps with everything where it was before one is captured: a capture costs as much as some ten steps
_CALLS_BEFORE = 100
_DEVICE = "cuda"
# Of gradients and the flag that closes it: where that is 1, nothing changes
Step = Callable[[Sequence[th.Tensor], th.Tensor], None]


class CapturedStep:
    """
    A step as a CUDA graph once it has read and written the same places by the same numbers for a while, which a learning rate
    that changes at each step never does. The results are the same to the bit.

    :param tensors: all that the step reads or writes beside gradients and flag
    """

    def __init__(self, tensors: Sequence[th.Tensor]):
        self._tensors = tensors
        self._key: Hashable = None
        self._n_calls = 0
        self._graph: Any = None
        self._closed = th.empty(0)

    def __call__(self, step: Step, gradients: Sequence[th.Tensor], closed: th.Tensor, settings: Hashable) -> None:
        """
        :param step: the same at each call; not kept, since it keeps its owner
        :param gradients: to step by
        :param closed: shape (1,), 1 where the step must not be made
        :param settings: all numbers that the step depends on
        """
        key = settings, *[tensor.data_ptr() for tensor in (*gradients, *self._tensors)]
        if key != self._key:
            self._key, self._n_calls, self._graph = key, 0, None
        self._n_calls += 1
        if self._n_calls == _CALLS_BEFORE and closed.device.type == _DEVICE:
            self._capture(step, gradients, closed)
        if self._graph is None:
            step(gradients, closed)
        else:
            self._closed.copy_(closed)
            self._graph.replay()

    def _capture(self, step: Step, gradients: Sequence[th.Tensor], closed: th.Tensor) -> None:
        """Capture the step, which is closed meanwhile, so that the calls before a capture change nothing."""
        self._closed = th.ones_like(closed)
        try:
            self._graph, _ = capture(lambda: step(gradients, self._closed), closed.device, error_mode="thread_local")
        except RuntimeError:
            # Without a graph it is slower and as good
            self._graph = None
