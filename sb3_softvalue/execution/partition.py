"""A backend of ``torch.compile`` for GPUs that partitions the update into independent parts, one per stream.

This file uses private interfaces of PyTorch: ``make_fx``, ``split_module`` and ``torch._inductor.compile``. On an H100,
concurrent parts reduce an update from 358 to 206 µs compiled, and from 628 to 391 µs uncompiled.
"""

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch as th
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.passes.split_module import split_module


class PartitionBackend:
    """
    A backend for ``torch.compile``.

    :param owners: for each output of the graph, the network whose gradient it is; None for other outputs
    :param compiled: whether Inductor compiles the parts
    """

    def __init__(self, owners: Sequence[str | None], compiled: bool):
        self.owners = owners
        self.compiled = compiled

    def __call__(self, graph: GraphModule, _: Sequence[th.Tensor]) -> Callable[..., Sequence[Any]]:
        """
        :param graph: forward pass and ``torch.autograd.grad`` as PyTorch functions
        :return: a function of the graph's inputs
        """
        partitioned: list[PartitionedGraph] = []

        def run(*inputs: th.Tensor) -> Sequence[Any]:
            if not partitioned:  # only at the first call, after Dynamo's own tracing

                def with_grad(*tensors: th.Tensor) -> Sequence[Any]:
                    leaves = [t.detach().requires_grad_(i.requires_grad) for t, i in zip(tensors, inputs, strict=True)]
                    with th.enable_grad():
                        return graph(*leaves)

                # With fake tensors, code that depends on a tensor's value fails here instead of freezing that value
                traced = make_fx(with_grad, tracing_mode="fake")(*[tensor.detach() for tensor in inputs])
                partitioned.append(PartitionedGraph(traced, self.owners, self._compile))
            return partitioned[0](*[tensor.detach() for tensor in inputs])

        return run

    def _compile(self, part: GraphModule, inputs: list[th.Tensor]) -> Callable[..., Any]:
        """:return: a function that computes the part"""
        if not self.compiled:
            return part
        import torch._inductor

        return torch._inductor.compile(part, [*inputs])


class PartitionedGraph:
    """
    A function of flat tensors whose independent parts run concurrently on a GPU.

    Nodes that the gradients of the same set of networks need form a part: shared parts, parts of one network, and a part that
    no gradient needs.

    :param graph: forward and backward pass in ATen operators
    :param owners: for each output of the graph, the network whose gradient it is; None for other outputs
    :param compiler: maps a module and its inputs to a function
    """

    def __init__(self, graph: GraphModule, owners: Sequence[str | None], compiler: Callable[..., Any]):
        _make_initial_gradient_constant(graph)
        needed = _needed_by(graph, owners)
        numbers: dict[frozenset[str], int] = {}
        for node in graph.graph.nodes:
            if node.target is operator.getitem:
                needed[node] = needed[node.args[0]]
            numbers.setdefault(needed[node], len(numbers))
        self._graph = split_module(graph, graph, lambda node: numbers[needed[node]])
        self._compiler = compiler
        self._compiled: dict[str, Callable[..., Any]] = {}
        self._streams: dict[str, th.cuda.Stream] = {}

    def __call__(self, *inputs: th.Tensor) -> Sequence[Any]:
        """:return: the outputs of the graph"""
        caller = th.cuda.current_stream()
        start = caller.record_event()
        values: dict[Node, Any] = {}
        done: dict[Node, th.cuda.Event] = {}
        rest = iter(inputs)
        for node in self._graph.graph.nodes:
            if node.op == "placeholder":
                values[node] = next(rest)
            elif node.op == "get_attr":
                values[node] = getattr(self._graph, str(node.target))
            elif node.op == "call_module":
                stream = self._streams.setdefault(node.target, th.cuda.Stream())
                stream.wait_event(start)
                for source in node.all_input_nodes:
                    if source in done:
                        stream.wait_event(done[source])
                with th.cuda.stream(stream):
                    values[node] = self._run(node.target, [values[source] for source in node.args])
                done[node] = stream.record_event()
            elif node.op == "call_function":  # selects one of the outputs of a part
                values[node] = node.target(values[node.args[0]], *node.args[1:])
                if node.args[0] in done:
                    done[node] = done[node.args[0]]
            elif node.op == "output":
                outputs = th.fx.node.map_arg(node.args[0], values.__getitem__)
        for event in done.values():
            caller.wait_event(event)
        return outputs

    def _run(self, name: str, inputs: list[th.Tensor]) -> Any:
        """
        :param name: name of a part
        :param inputs: its inputs
        :return: its outputs
        """
        if name not in self._compiled:
            self._compiled[name] = self._compiler(self._graph.get_submodule(name), inputs)
        return self._compiled[name](*inputs)


def _make_initial_gradient_constant(graph: GraphModule) -> None:
    """Replace the initial gradient ``ones_like(objective)`` by a constant, so that the backward pass does not wait for it."""
    for node in graph.graph.find_nodes(op="call_function", target=th.ops.aten.ones_like.default):
        like = node.meta["val"]
        with graph.graph.inserting_before(node):
            one = graph.graph.call_function(
                th.ops.aten.full.default, (list(like.shape), 1), {"dtype": like.dtype, "device": like.device}
            )
        one.meta = node.meta
        node.replace_all_uses_with(one)
        graph.graph.erase_node(node)


def _needed_by(graph: GraphModule, owners: Sequence[str | None]) -> dict[Node, frozenset[str]]:
    """
    :param owners: see ``PartitionedGraph``
    :return: for each node, the networks whose gradients need it
    """
    sets: dict[Node, set[str]] = {node: set() for node in graph.graph.nodes}
    for node in reversed(graph.graph.nodes):
        if node.op == "output":
            for value, owner in zip(node.args[0], owners, strict=True):
                if isinstance(value, Node) and owner is not None:
                    sets[value].add(owner)
        else:
            for source in node.all_input_nodes:
                sets[source] |= sets[node]
    return {node: frozenset(names) for node, names in sets.items()}
