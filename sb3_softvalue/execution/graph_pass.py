"""Compiler passes that rewrite the matrix products of an update into the fastest form on a CPU.

This file uses private interfaces of PyTorch: Inductor's ``CustomGraphPass`` and the metadata of its graph. The rewrite speeds
a compiled update up 1.1 times (Intel Xeon, one thread). ``execution="mixed"`` (products in bfloat16) needs it.
"""

from collections.abc import Collection
from typing import Any

import torch as th
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph, Node
from torch.fx.node import map_arg

aten = th.ops.aten
# Smallest dimension along which kernels fill their vectors, and from which rounding to bfloat16 pays off
MIN_WIDE_DIM = 64
# Operators of layers: their outputs are activations, whatever they read
_LAYERS = ("addmm", "mm", "bmm", "baddbmm", "convolution", "embedding", "_embedding_bag")


class MatmulRewritePass(CustomGraphPass):
    """
    Rewrites matrix products into equivalent forms that are faster on a CPU.

    - ``addmm`` first copies the bias over the whole output. As ``mm + bias``, Inductor fuses it into the activation, which it
      does by itself for GPUs only (``should_prefer_unfused_addmm``).
    - A product with a vector becomes an elementwise product and a sum, which Inductor fuses too.
    - Unused columns of a product, such as the gradients of the observations, are not computed.
    - The weight gradient of a layer with few inputs is computed transposed, since kernels fill vectors along the long side.
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
            self._compute_used_columns(graph, node)
        for node in calls(graph, aten.mm.default):
            self._multiply_vectors(graph, node)
        for node in calls(graph, aten.mm.default):
            self._transpose_narrow_gradients(graph, node)

    def _compute_used_columns(self, graph: Graph, node: Node) -> None:
        """If only these columns of a product, or of a sum of products, are used, slice the right factor instead."""
        whole, dim, *rest = arguments(node)
        if dim != 1 or len(whole.users) > 1 or whole.kwargs:  # kwargs: such as alpha of aten.add
            return
        is_sum = whole.target is aten.add.Tensor and all(isinstance(part, Node) for part in whole.args)
        if is_sum and all(part.meta["val"].shape == whole.meta["val"].shape for part in whole.args):
            parts = [insert(graph, node, aten.slice.Tensor, part, dim, *rest) for part in whole.args]
            replace(graph, node, insert(graph, node, aten.add.Tensor, *parts))
            graph.erase_node(whole)
            for part in parts:
                self._compute_used_columns(graph, part)
        elif whole.target is aten.mm.default:
            left, right = arguments(whole)
            columns = insert(graph, node, aten.slice.Tensor, right, dim, *rest)
            replace(graph, node, insert(graph, node, aten.mm.default, left, columns))
            graph.erase_node(whole)

    def _multiply_vectors(self, graph: Graph, node: Node) -> None:
        """Rewrite a product with a vector as an elementwise product and a sum."""
        left, right = arguments(node)
        (n_rows, n_inner), n_columns = left.meta["val"].shape, right.meta["val"].shape[1]
        if n_inner == 1:
            product = insert(graph, node, aten.mul.Tensor, left, right)
        elif n_rows == 1 or n_columns == 1:
            vector, matrix, dim = (left, right, 0) if n_rows == 1 else (right, left, 1)
            transposed = insert(graph, node, aten.permute.default, vector, [1, 0])
            scaled = insert(graph, node, aten.mul.Tensor, matrix, transposed)
            product = insert(graph, node, aten.sum.dim_IntList, scaled, [dim], True)
        else:
            return
        product.meta["is_product"] = True
        replace(graph, node, product)

    def _transpose_narrow_gradients(self, graph: Graph, node: Node) -> None:
        """Transpose a product with a transposed left side and few columns."""
        left, right = arguments(node)
        n_rows, n_columns = node.meta["val"].shape
        if not is_transpose(left) or n_columns >= MIN_WIDE_DIM or n_rows < MIN_WIDE_DIM:
            return
        transposed_right = insert(graph, node, aten.permute.default, right, [1, 0])
        product = insert(graph, node, aten.mm.default, transposed_right, arguments(left)[0])
        transposed = insert(graph, node, aten.permute.default, product, [1, 0])
        # The optimizers need the memory format of the weights
        replace(graph, node, insert(graph, node, aten.clone.default, transposed, memory_format=th.contiguous_format))

    def uuid(self) -> Any:
        """:return: key of this pass in Inductor's disk cache"""
        return get_hash_for_files((__file__,))


class Bf16MatmulPass(MatmulRewritePass):
    """
    ``MatmulRewritePass`` that also computes float32 products between hidden layers in bfloat16.

    :param data_shapes: shapes of the graph's inputs other than weights. Products that read such an input stay in float32,
        since the scale of observations is unknown: bfloat16 would round a position of 100 m to half a metre.
    """

    requirement = (
        f"no product between hidden layers has at least {MIN_WIDE_DIM} units on both sides and a batch of at least "
        f"{MIN_WIDE_DIM}."
    )

    def __init__(self, data_shapes: Collection[tuple[int, ...]] = ()):
        super().__init__()
        self.data_shapes = frozenset(data_shapes)
        self.has_no_effect = False
        """Whether the last graph had no product worth rounding"""

    def __call__(self, graph: Graph) -> None:
        """
        :param graph: forward and backward pass in ATen operators, rewritten in place
        """
        super().__call__(graph)
        products = self._eligible_products(graph)
        self.has_no_effect = not products
        rounded: dict[Node, Node] = {}
        for node in products:
            left, right = (self._to_bf16(graph, side, rounded) for side in arguments(node))
            product = insert(graph, node, aten.mm.default, left, right)
            replace(graph, node, insert(graph, node, th.ops.prims.convert_element_type.default, product, th.float32))

    def _eligible_products(self, graph: Graph) -> list[Node]:
        """:return: float32 products worth rounding, none of which reads an observation"""
        data = {node for node in graph.nodes if node.op == "placeholder" and tuple(node.meta["val"].shape) in self.data_shapes}
        for node in graph.nodes:
            read = data.intersection(node.all_input_nodes)
            name = getattr(node.target, "__name__", "").partition(".")[0]
            # A product of two observations has no weights
            is_layer = (name in _LAYERS and len(read) < len(node.all_input_nodes)) or "is_product" in node.meta
            if read and not is_layer:
                data.add(node)
        products = []
        for node in calls(graph, aten.mm.default):
            values = [side.meta["val"] for side in arguments(node)]
            is_wide = min(min(value.shape) for value in values) >= MIN_WIDE_DIM
            if is_wide and all(value.dtype is th.float32 for value in values) and data.isdisjoint(arguments(node)):
                products.append(node)
        return products

    def _to_bf16(self, graph: Graph, node: Node, rounded: dict[Node, Node]) -> Node:
        """
        :param rounded: matrices converted so far
        :return: the matrix in bfloat16; each matrix is converted once for all products, also transposed ones
        """
        if node in rounded:
            return rounded[node]
        if node.target is aten.permute.default:
            source, dims = arguments(node)
            result = insert(graph, node.next, aten.permute.default, self._to_bf16(graph, source, rounded), dims)
        else:
            # All placeholders must stay at the beginning of the graph
            last = node if node.op != "placeholder" else [other for other in graph.nodes if other.op == "placeholder"][-1]
            result = insert(graph, last.next, th.ops.prims.convert_element_type.default, node, th.bfloat16)
        rounded[node] = result
        return result

    def uuid(self) -> Any:
        """:return: None disables Inductor's disk cache: for a cached graph, ``has_no_effect`` would be unknown"""
        return None


def calls(graph: Graph, target: th._ops.OpOverload) -> list[Node]:
    """:return: all calls of an operator"""
    return [node for node in graph.nodes if node.op == "call_function" and node.target is target]


def arguments(node: Node) -> tuple[Any, ...]:
    """:return: positional arguments of a call"""
    return node.args


def is_transpose(node: Node) -> bool:
    """:return: whether the node transposes a matrix (the identity is a permutation too)"""
    return node.target is aten.permute.default and [dim % 2 for dim in arguments(node)[1]] == [1, 0]


def insert(graph: Graph, before: Node, target: th._ops.OpOverload, *args: Any, **kwargs: Any) -> Node:
    """:return: a new call of ``target``, inserted before the node ``before``"""
    with graph.inserting_before(before):
        node = graph.call_function(target, args, kwargs)
    values, more = map_arg((args, kwargs), lambda argument: argument.meta["val"])
    node.meta["val"] = target(*values, **more)
    return node


def replace(graph: Graph, node: Node, by: Node) -> None:
    """Replace ``node`` by ``by`` everywhere and erase it."""
    node.replace_all_uses_with(by)
    graph.erase_node(node)
