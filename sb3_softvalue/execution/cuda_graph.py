"""Forward and backward pass of an update, captured once as a CUDA graph and replayed."""

from collections.abc import Sequence
from typing import Any

import torch as th

from sb3_softvalue.execution.arguments import Arguments, Gradients, Scalars, signature
from sb3_softvalue.execution.watched import Watched
from sb3_softvalue.update import Batch, JointObjective, Temperature, objective_gradients


class CudaGraphGradients:
    """
    Forward and backward pass captured once as a CUDA graph and replayed: one launch instead of hundreds.

    What is captured reads parameters and inputs at fixed addresses and writes nothing but gradients and metrics: warm-up
    and capture leave parameters, optimizers and random generators as they are. Noise is drawn outside. The graph is
    captured again when shapes or addresses differ.

    :param objective: the joint objective, whose modules neither draw random numbers nor change state
    """

    def __init__(self, objective: JointObjective):
        self.objective = objective
        self._scalars = Scalars(next(objective.parameters()).device)
        self._watched = Watched(objective, ())
        self._key: tuple[Any, ...] | None = None
        self._graph: Any = None
        self._inputs: list[th.Tensor] = []
        self._outputs: Gradients = ((), th.empty(0))

    def __call__(
        self,
        params: Sequence[th.Tensor],
        batch: Batch,
        noise: th.Tensor | None,
        temperature: Temperature,
        reward_scale: float,
    ) -> Gradients:
        """See ``update.objective_gradients``; the gradients are overwritten by the next call."""
        if not self._watched.are_current(params):
            self._watched, self._key = Watched(self.objective, params), None
        arguments = Arguments(params, *self._scalars.of(batch, temperature, reward_scale), noise)
        inputs = arguments.tensors()
        addresses = tuple(tensor.data_ptr() for tensor in (*params, *self._watched.constants))
        key = (self._watched.state(), addresses, *signature(inputs))
        if key != self._key:
            self._capture(arguments)
            self._key = key
        th._foreach_copy_(self._inputs, inputs)
        self._graph.replay()
        gradients, metrics = self._outputs
        return gradients, metrics.clone()

    def _capture(self, arguments: Arguments) -> None:
        """
        :param arguments: capture the gradients into a new graph, on inputs of its own that look like these
        """
        self._inputs = [tensor.clone() for tensor in arguments.tensors()]
        params, batch, temperature, reward_scale, noise = arguments.with_tensors(arguments.params, self._inputs)
        # Libraries set themselves up on first use, which a capture does not allow: warm up on another stream first, see
        # https://docs.pytorch.org/docs/stable/notes/cuda.html#whole-network-capture
        stream = th.cuda.Stream()
        stream.wait_stream(th.cuda.current_stream())
        with th.cuda.stream(stream):
            for _ in range(3):
                objective_gradients(self.objective, params, batch, noise, temperature, reward_scale)
        th.cuda.current_stream().wait_stream(stream)
        self._graph = th.cuda.CUDAGraph()
        with th.cuda.graph(self._graph):
            self._outputs = objective_gradients(self.objective, params, batch, noise, temperature, reward_scale)
