"""The gradients of an update as one graph of forward and backward pass, compiled on a CPU by ``torch.compile``.

PyTorch's private interface in this file: ``torch._dynamo.config.trace_autograd_ops``, which lets PyTorch 2.11 to 2.13 trace
``torch.autograd.grad``; without it nothing can be compiled there and updates run eagerly.
"""

import threading
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch as th

from sb3_softvalue.objective import GradientFunction, Gradients, JointObjective, UpdateInputs, eager_gradients, map_tensors

# Of Inductor; a version of PyTorch that does not know one runs without it
_OPTIONS = {
    # Kernels called from C++: about a hundred calls from Python take as long as two layers of the network
    "cpp_wrapper": True,
    # What calls the kernels needs no optimization, and for two short files PyTorch's headers need no compilation of their own,
    # which takes longer than both
    "cpp_wrapper_build_separate": True,
    "cpp_cache_precompile_headers": False,
    # A compiler that knows C++20, which PyTorch's headers need, knows the processor's vectors too: no need to spend
    # ten seconds on compiling a probe for each kind
    "cpp.vec_isa_ok": True,
}
# The compiler has global state while it traces
_LOCK = threading.Lock()


class CompiledGradients:
    """
    ``objective.eager_gradients``, compiled. Dynamo guards all that the graph has fixed: with another shape, module or
    attribute it compiles another graph.

    :param mixed: whether the products between hidden layers are computed in bfloat16
    """

    def __init__(self, mixed: bool = False):
        self.mixed = mixed
        self._compiled: dict[bool, GradientFunction] = {}

    def __call__(
        self, objective: JointObjective, params: Sequence[th.Tensor], inputs: UpdateInputs, update_actor: bool = True
    ) -> Gradients:
        """See ``objective.eager_gradients``."""
        compiled = self._compiled.get(update_actor)
        if compiled is not None:
            return compiled(objective, params, inputs, update_actor)
        with tracing():
            compiled = compile_gradients(options=_options(inputs, self.mixed))
            gradients = compiled(objective, params, inputs, update_actor)
        self._compiled[update_actor] = compiled
        return gradients


def compile_gradients(**how: Any) -> GradientFunction:
    """
    :param how: keywords of ``torch.compile``
    :return: ``objective.eager_gradients``, to be compiled when it is first called
    """
    reference = eager_gradients
    # Graphs are kept with the code object: one of its own for each model, so that they do not count together nor outlive it
    own = types.FunctionType(reference.__code__.replace(), reference.__globals__, reference.__name__, reference.__defaults__)
    return th.compile(own, fullgraph=True, dynamic=False, **how)


@contextmanager
def tracing() -> Iterator[None]:
    """One at a time, with ``torch.autograd.grad`` inside the graph, and without the compiler's internal warnings."""
    import torch._dynamo

    config: Any = torch._dynamo.config
    traces = config.patch(trace_autograd_ops=True) if hasattr(config, "trace_autograd_ops") else nullcontext()
    with _LOCK, traces, warnings.catch_warnings():
        # They would be errors where warnings are
        warnings.simplefilter("ignore")
        yield


def _options(inputs: UpdateInputs, mixed: bool) -> dict[str, Any]:
    """:return: options of Inductor"""
    import torch._inductor

    from sb3_softvalue.execution.graph_pass import Bf16MatmulPass, MatmulRewritePass

    known = torch._inductor.list_options()
    options: dict[str, Any] = {name: value for name, value in _OPTIONS.items() if name in known}
    options["post_grad_custom_post_pass"] = MatmulRewritePass()
    if mixed:
        shapes: set[tuple[int, ...]] = set()
        map_tensors(lambda tensor: shapes.add(tuple(tensor.shape)), inputs)
        options["post_grad_custom_post_pass"] = Bf16MatmulPass(frozenset(shapes))
    return options
