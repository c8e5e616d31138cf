"""Mixed precision on a CPU: the large products of an update in bfloat16, everything else in float32."""

from collections.abc import Collection

import torch as th
from torch._inductor.custom_graph_pass import get_hash_for_files
from torch.fx import Graph, Node

from sb3_softvalue.execution import fusion
from sb3_softvalue.execution.fusion import CheapProducts, arguments, aten, calls, insert, replace

# Smaller products, such as the heads of the networks, gain nothing and keep their precision
SMALLEST_SIDE = 64
# What they give is a network's own, whatever they read
_LAYERS = ("addmm", "mm", "bmm", "baddbmm", "convolution", "embedding", "_embedding_bag")


def rounds_anything(graph: Graph, observations: Collection[int]) -> bool:
    """
    :param graph: as it was traced; it is left as it is
    :param observations: which of its inputs are observations
    :return: whether ``MixedProducts`` will find a product. Asked beforehand, since a graph from the cache meets no pass.
    """
    rewritten = Graph()
    rewritten.output(rewritten.graph_copy(graph, {}))
    # Nobody reads the gradients to the observations
    rewritten.eliminate_dead_code()
    CheapProducts()(rewritten)
    return bool(large_products(rewritten, observations))


class MixedProducts(CheapProducts):
    """
    ``CheapProducts`` whose products between hidden layers, of float32 matrices, are computed in bfloat16.

    :param observations: which of the graph's inputs are observations. Nobody knows their scale, and a position of 100 m would
        be rounded to half a metre, so that the products that read them stay in float32.
    """

    def __init__(self, observations: Collection[int] = ()):
        super().__init__()
        self.observations = tuple(observations)

    def __call__(self, graph: Graph) -> None:
        """
        :param graph: forward and backward pass in ATen operators, rewritten in place
        """
        super().__call__(graph)
        halves: dict[Node, Node] = {}
        for node in large_products(graph, self.observations):
            left, right = (self._half(graph, side, halves) for side in arguments(node))
            product = insert(graph, node, aten.mm.default, left, right)
            replace(graph, node, insert(graph, node, th.ops.prims.convert_element_type.default, product, th.float32))

    def _half(self, graph: Graph, node: Node, halves: dict[Node, Node]) -> Node:
        """
        :param halves: what was converted before
        :return: the matrix in bfloat16, converted once for all products that it is in, also transposed
        """
        if node in halves:
            return halves[node]
        if node.target is aten.permute.default:
            source, dims = arguments(node)
            half = insert(graph, node.next, aten.permute.default, self._half(graph, source, halves), dims)
        else:
            # Inputs of the graph stay together at its beginning
            last = node if node.op != "placeholder" else [other for other in graph.nodes if other.op == "placeholder"][-1]
            half = insert(graph, last.next, th.ops.prims.convert_element_type.default, node, th.bfloat16)
        halves[node] = half
        return half

    def uuid(self) -> bytes:
        """:return: identity of this pass in Inductor's cache on disk"""
        return get_hash_for_files((__file__, fusion.__file__), repr(self.observations))


def large_products(graph: Graph, observations: Collection[int]) -> list[Node]:
    """
    :param graph: in ATen operators, as ``CheapProducts`` has left it
    :param observations: which of the graph's inputs are observations
    :return: products of float32 matrices that are worth rounding for, none of which reads an observation
    """
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    observed = {inputs[index] for index in observations}
    for node in graph.nodes:
        read = observed.intersection(node.all_input_nodes)
        name = getattr(node.target, "__name__", "").partition(".")[0]
        # A product of observations with each other is none
        is_layer = (name in _LAYERS and len(read) < len(node.all_input_nodes)) or "is_product" in node.meta
        if read and not is_layer:
            observed.add(node)
    products = []
    for node in calls(graph, aten.mm.default):
        values = [side.meta["val"] for side in arguments(node)]
        is_large = min(min(value.shape) for value in values) >= SMALLEST_SIDE
        if is_large and all(value.dtype is th.float32 for value in values) and observed.isdisjoint(arguments(node)):
            products.append(node)
    return products
