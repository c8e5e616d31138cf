"""Forward and backward pass of an update, captured once as a CUDA graph and replayed."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch as th

from sb3_softvalue.execution.arguments import Arguments, GradientFunction, Gradients, Scalars, signature
from sb3_softvalue.execution.watched import Watched
from sb3_softvalue.update import Batch, InOrder, JointObjective, Temperature, objective_gradients

Result = TypeVar("Result")


def capture(compute: Callable[[], Result], device: th.device, error_mode: str = "global") -> tuple[Any, Result]:
    """
    Capture what a function launches. It is called a few times before.

    :param compute: reads tensors that stay where they are, and changes nothing
    :param device: of the tensors
    :param error_mode: what may not happen meanwhile, see ``torch.cuda.graph``
    :return: graph, and the result of the function, which each replay overwrites
    """
    with th.cuda.device(device):
        # Libraries set themselves up on first use, which a capture does not allow: warm up on another stream first, see
        # https://docs.pytorch.org/docs/stable/notes/cuda.html#whole-network-capture
        stream = th.cuda.Stream()
        stream.wait_stream(th.cuda.current_stream())
        with th.cuda.stream(stream):
            for _ in range(3):
                compute()
        th.cuda.current_stream().wait_stream(stream)
        graph = th.cuda.CUDAGraph()
        # On yet another stream, so that the workspaces of libraries are the graph's own. One that fails would stay there.
        with th.cuda.stream(th.cuda.current_stream()):
            with th.cuda.graph(graph, stream=th.cuda.Stream(), capture_error_mode=error_mode):
                return graph, compute()


class SideBySide(InOrder):
    """The parts of the objective on streams of their own: a graph of them runs at once what does not depend on each other."""

    def __init__(self) -> None:
        self._streams: list[Any] = []
        self._n_forked = 0

    def begin(self) -> None:
        """Remember where the streams fork."""
        self._n_forked = 0
        self._inputs_are_there = th.cuda.current_stream().record_event()

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Launch on a stream that waits for nothing but the inputs; autograd launches the backward pass there as well."""
        if self._n_forked == len(self._streams):
            self._streams.append(th.cuda.Stream())
        stream = self._streams[self._n_forked]
        self._n_forked += 1
        stream.wait_event(self._inputs_are_there)
        with th.cuda.stream(stream):
            yield

    def join(self) -> None:
        """Let what follows wait for all parts."""
        for stream in self._streams[: self._n_forked]:
            th.cuda.current_stream().wait_stream(stream)


class EagerSideBySide:
    """
    ``update.objective_gradients``, the independent parts of which are launched on streams of their own.

    :param objective: the joint objective
    """

    def __init__(self, objective: JointObjective):
        self.objective = objective
        self._streams = SideBySide()

    def __call__(self, *arguments: Any) -> Gradients:
        """See ``update.objective_gradients``."""
        before, self.objective.order = self.objective.order, self._streams
        try:
            return objective_gradients(self.objective, *arguments)
        finally:
            self.objective.order = before


class CudaGraphGradients:
    """
    Forward and backward pass captured once as a CUDA graph and replayed: one launch instead of hundreds.

    What is captured reads parameters and inputs at fixed addresses and writes nothing but gradients and metrics: warm-up
    and capture leave parameters, optimizers and random generators as they are. Noise is drawn outside. The graph is
    captured again when shapes or addresses differ.

    :param objective: the joint objective, whose modules neither draw random numbers nor change state
    :param compute: what to capture; None captures PyTorch's own kernels
    """

    def __init__(self, objective: JointObjective, compute: GradientFunction | None = None):
        self.objective = objective
        self._compute = EagerSideBySide(objective) if compute is None else compute
        self._scalars = Scalars(next(objective.parameters()).device)
        self._watched = Watched(objective, ())
        self._key: tuple[Any, ...] | None = None
        self._graph: Any = None
        self._inputs: list[th.Tensor] = []
        # Places of the inputs that are copied, those of one type together
        self._copied: list[list[int]] = []
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
            self._key = None  # until there is a graph
            self._capture(arguments)
            self._key = key
        for places in self._copied:
            th._foreach_copy_([self._inputs[place] for place in places], [inputs[place] for place in places])
        self._graph.replay()
        gradients, metrics = self._outputs
        return gradients, metrics.clone()

    def _capture(self, arguments: Arguments) -> None:
        """
        :param arguments: capture the gradients into a new graph, on inputs of its own that look like these
        """
        inputs = arguments.tensors()
        self._inputs = [tensor if self._scalars.holds(tensor) else tensor.clone() for tensor in inputs]
        by_type: dict[th.dtype, list[int]] = {}
        for place, tensor in enumerate(inputs):
            if self._inputs[place] is not tensor:
                by_type.setdefault(tensor.dtype, []).append(place)
        self._copied = list(by_type.values())
        params, batch, temperature, reward_scale, noise = arguments.with_tensors(arguments.params, self._inputs)
        self._graph, self._outputs = capture(
            lambda: self._compute(params, batch, noise, temperature, reward_scale), self._scalars.device
        )
