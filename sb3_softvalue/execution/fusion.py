"""A compiler pass that writes an update's products as a CPU does them fastest."""

from typing import Any

import torch as th
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph, Node
from torch.fx.node import map_arg

aten = th.ops.aten
# Columns of a product that is worth transposing: as wide as that, kernels fill their vectors in either way
FEW = 64


class CheapProducts(CustomGraphPass):
    """
    Rewrites matrix products where another form of the same numbers is faster on a CPU.

    - ``addmm`` first copies the bias over the whole output: as ``mm + bias`` Inductor fuses it into the activation. It does so
      by itself, but only for GPUs (``should_prefer_unfused_addmm``).
    - A product of which one side is a vector is a multiplication, and a sum: fused into the activation as well.
    - Columns of a product that are thrown away, such as the gradients to the observations, are not computed.
    - The gradient of a layer that reads few numbers is computed as its transpose: its long side is the one along which the
      libraries' kernels fill a processor's vectors.
    """

    def __call__(self, graph: Graph) -> None:
        """
        :param graph: forward and backward pass in ATen operators, rewritten in place
        """
        for node in calls(graph, aten.addmm.default):
            if not node.kwargs:
                bias, left, right = arguments(node)
                product = insert(graph, node, aten.mm.default, left, right)
                replace(graph, node, insert(graph, node, aten.add.Tensor, product, bias))
        for node in calls(graph, aten.slice.Tensor):
            self._of_columns(graph, node)
        for node in calls(graph, aten.mm.default):
            self._of_vectors(graph, node)
        for node in calls(graph, aten.mm.default):
            self._of_thin_gradients(graph, node)

    def _of_columns(self, graph: Graph, node: Node) -> None:
        """Where nothing but these columns is used of a product or a sum of products, take them of its right side."""
        whole, dim, *rest = arguments(node)
        if dim != 1 or len(whole.users) > 1 or whole.kwargs:  # such as the factor of a sum
            return
        is_sum = whole.target is aten.add.Tensor and all(isinstance(part, Node) for part in whole.args)
        if is_sum and all(part.meta["val"].shape == whole.meta["val"].shape for part in whole.args):
            parts = [insert(graph, node, aten.slice.Tensor, part, dim, *rest) for part in whole.args]
            replace(graph, node, insert(graph, node, aten.add.Tensor, *parts))
            graph.erase_node(whole)
            for part in parts:
                self._of_columns(graph, part)
        elif whole.target is aten.mm.default:
            left, right = arguments(whole)
            columns = insert(graph, node, aten.slice.Tensor, right, dim, *rest)
            replace(graph, node, insert(graph, node, aten.mm.default, left, columns))
            graph.erase_node(whole)

    def _of_vectors(self, graph: Graph, node: Node) -> None:
        """Rewrite a product of which one side is a vector."""
        left, right = arguments(node)
        (n_rows, n_inner), n_columns = left.meta["val"].shape, right.meta["val"].shape[1]
        if n_inner == 1:
            product = insert(graph, node, aten.mul.Tensor, left, right)
        elif n_rows == 1 or n_columns == 1:
            vector, matrix, dim = (left, right, 0) if n_rows == 1 else (right, left, 1)
            turned = insert(graph, node, aten.permute.default, vector, [1, 0])
            scaled = insert(graph, node, aten.mul.Tensor, matrix, turned)
            product = insert(graph, node, aten.sum.dim_IntList, scaled, [dim], True)
        else:
            return
        product.meta["is_product"] = True
        replace(graph, node, product)

    def _of_thin_gradients(self, graph: Graph, node: Node) -> None:
        """Transpose a product with a transposed left side and few columns."""
        left, right = arguments(node)
        n_rows, n_columns = node.meta["val"].shape
        if not is_turned(left) or n_columns >= FEW or n_rows < FEW:
            return
        lying = insert(graph, node, aten.permute.default, right, [1, 0])
        product = insert(graph, node, aten.mm.default, lying, arguments(left)[0])
        turned = insert(graph, node, aten.permute.default, product, [1, 0])
        # In the memory format of the weights, which the optimizers ask for
        replace(graph, node, insert(graph, node, aten.clone.default, turned, memory_format=th.contiguous_format))

    def uuid(self) -> bytes:
        """:return: identity of this pass in Inductor's cache on disk"""
        return get_hash_for_files((__file__,))


def calls(graph: Graph, target: th._ops.OpOverload) -> list[Node]:
    """:return: all calls of an operator"""
    return [node for node in graph.nodes if node.op == "call_function" and node.target is target]


def arguments(node: Node) -> tuple[Any, ...]:
    """:return: a call's positional arguments"""
    return node.args


def is_turned(node: Node) -> bool:
    """:return: whether this is the transpose of a matrix; the identity is a permutation as well"""
    return node.target is aten.permute.default and [dim % 2 for dim in arguments(node)[1]] == [1, 0]


def insert(graph: Graph, before: Node, target: th._ops.OpOverload, *args: Any, **kwargs: Any) -> Node:
    """
    :return: a call of ``target`` right before a node
    """
    with graph.inserting_before(before):
        node = graph.call_function(target, args, kwargs)
    values, more = map_arg((args, kwargs), lambda argument: argument.meta["val"])
    node.meta["val"] = target(*values, **more)
    return node


def replace(graph: Graph, node: Node, by: Node) -> None:
    """Let all users of ``node`` use ``by`` and remove it."""
    node.replace_all_uses_with(by)
    graph.erase_node(node)
