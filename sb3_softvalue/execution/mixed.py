"""Mixed precision on a CPU: the large products of an update in bfloat16, everything else in float32."""

import torch as th
from torch._inductor.custom_graph_pass import get_hash_for_files
from torch.fx import Graph, Node

from sb3_softvalue.execution import fusion
from sb3_softvalue.execution.fusion import CheapProducts, arguments, aten, calls, insert, replace

# Smaller products, such as the heads of the networks, gain nothing and keep their precision
SMALLEST_SIDE = 64


class MixedProducts(CheapProducts):
    """``CheapProducts`` whose products between hidden layers, of float32 matrices, are computed in bfloat16."""

    def __call__(self, graph: Graph) -> None:
        """
        :param graph: forward and backward pass in ATen operators, rewritten in place
        """
        super().__call__(graph)
        halves: dict[Node, Node] = {}
        for node in calls(graph, aten.mm.default):
            sides = [side.meta["val"] for side in arguments(node)]
            is_large = min(min(side.shape) for side in sides) >= SMALLEST_SIDE
            if is_large and all(side.dtype is th.float32 for side in sides):
                left, right = (self._half(graph, side, halves) for side in arguments(node))
                product = insert(graph, node, aten.mm.default, left, right)
                product.meta["val"] = node.meta["val"].to(th.bfloat16)
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
        half.meta["val"] = node.meta["val"].to(th.bfloat16)
        halves[node] = half
        return half

    def uuid(self) -> bytes:
        """:return: identity of this pass in Inductor's cache on disk"""
        return get_hash_for_files((__file__, fusion.__file__))
