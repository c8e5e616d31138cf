"""A compiler pass that lets Inductor fuse what it leaves apart on a CPU: biases and products with one column."""

import torch as th
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph, Node

aten = th.ops.aten


class FuseProductEpilogues(CustomGraphPass):
    """
    On a CPU ``addmm`` first copies the bias over the whole output, and the product of a column with a row is a full matrix
    product. Written as ``mm + bias`` and as a plain multiplication, Inductor fuses both into the neighbouring activation.
    It rewrites so by itself, but only for GPUs (``should_prefer_unfused_addmm``).
    """

    def __call__(self, graph: Graph) -> None:
        """
        :param graph: forward and backward pass in ATen operators, rewritten in place
        """
        for node in list(graph.nodes):
            if node.op == "call_function" and node.target is aten.addmm.default and not node.kwargs:
                bias, left, right = node.args
                product = _insert(graph, node, aten.mm.default, left, right)
                _replace(graph, node, _insert(graph, node, aten.add.Tensor, product, bias))
        for node in list(graph.nodes):
            if node.op == "call_function" and node.target is aten.mm.default and node.args[0].meta["val"].shape[1] == 1:
                _replace(graph, node, _insert(graph, node, aten.mul.Tensor, *node.args))

    def uuid(self) -> bytes:
        """:return: identity of this pass in Inductor's cache on disk"""
        return get_hash_for_files((__file__,))


def _insert(graph: Graph, before: Node, target: th._ops.OpOverload, *args: Node) -> Node:
    """
    :return: a call of ``target`` right before the node whose shape and type it has
    """
    with graph.inserting_before(before):
        node = graph.call_function(target, args)
    node.meta["val"] = before.meta["val"]
    return node


def _replace(graph: Graph, node: Node, by: Node) -> None:
    """Let all users of ``node`` use ``by`` and remove it."""
    node.replace_all_uses_with(by)
    graph.erase_node(node)
