"""The gradients of an update as one graph of forward and backward pass, compiled on a CPU by ``torch.compile``.

PyTorch's private interface in this file: ``torch._inductor.compile``, which the direct calls below need, and
``torch._dynamo.config.trace_autograd_ops``, which lets PyTorch 2.11 to 2.13 trace ``torch.autograd.grad``; without it nothing
can be compiled there and updates run eagerly. ``Distribution._validate_args`` is read to be set again.
"""

import operator
import threading
import types
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import torch as th
from stable_baselines3.common import preprocessing
from torch import nn
from torch.fx import GraphModule

from sb3_softvalue.execution.module_state import ModuleState, has_hooks, signature
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

    Its guards and frames take 5 % of an update. Where the networks consist of plain layers, only other layers, tensors or
    shapes can make a graph invalid: as long as these are the same, the compiled function is called directly.

    :param mixed: whether the products between hidden layers are computed in bfloat16
    """

    def __init__(self, mixed: bool = False):
        self.mixed = mixed
        self._by_dynamo: dict[bool, GradientFunction] = {}
        self._state = ModuleState(nn.Module())
        self._objective: JointObjective | None = None
        self._direct: dict[Any, DirectCall] = {}
        # What Dynamo has been called with since the networks last changed
        self._called: set[Any] = set()
        self._pass: Any = None
        self._last_call: tuple[Callable[..., Any], Sequence[th.Tensor]] | None = None

    def __call__(
        self, objective: JointObjective, params: Sequence[th.Tensor], inputs: UpdateInputs, update_actor: bool = True
    ) -> Gradients:
        """See ``objective.eager_gradients``."""
        leaves: list[th.Tensor] = []
        map_tensors(leaves.append, inputs)
        if objective is not self._objective:
            self._by_dynamo = {}  # no graph of the networks before will be used again
        if objective is not self._objective or not self._state.is_current():
            self._objective, self._state, self._direct, self._called = objective, ModuleState(objective), {}, set()
        if self._state.has_hooks() or has_hooks(params):
            return eager_gradients(objective, params, inputs, update_actor)
        key = update_actor, signature(leaves)
        direct = self._direct.get(key)
        if direct is not None and direct.has_params(params):
            return direct(leaves)
        gradients = self._call_by_dynamo(key, objective, params, inputs)
        if self._state.is_plain and self._last_call is not None:
            self._direct[key] = DirectCall(*self._last_call, leaves, params, gradients[0])
            self._last_call = None
        return gradients

    def _call_by_dynamo(
        self, key: tuple[bool, Any], objective: JointObjective, params: Sequence[th.Tensor], inputs: UpdateInputs
    ) -> Gradients:
        """
        :param key: ``update_actor``, and what it may have to compile for
        :return: see ``objective.eager_gradients``
        """
        update_actor, _ = key
        if key in self._called:
            # An attribute of a module may have changed: only Dynamo knows, and cannot compile outside of tracing()
            with suppress(Exception):
                return self._by_dynamo[update_actor](objective, params, inputs, update_actor)
        self._pass = self._graph_pass(inputs)
        with tracing():
            by_dynamo = self._by_dynamo.get(update_actor) or compile_gradients(self._backend())
            gradients = by_dynamo(objective, params, inputs, update_actor)
        self._by_dynamo[update_actor] = by_dynamo
        self._called.add(key)
        if getattr(self._pass, "has_no_effect", False):
            warnings.warn("execution='mixed' is the same as 'compiled' here: " + self._pass.requirement, stacklevel=2)
        return gradients

    def _graph_pass(self, inputs: UpdateInputs) -> Any:
        """:return: how the products of a graph of such inputs are written"""
        from sb3_softvalue.execution.graph_pass import Bf16MatmulPass, MatmulRewritePass

        if not self.mixed:
            return MatmulRewritePass()
        shapes: set[tuple[int, ...]] = set()
        map_tensors(lambda tensor: shapes.add(tuple(tensor.shape)), inputs)
        return Bf16MatmulPass(shapes)

    def _backend(self) -> Callable[..., Any]:
        """:return: Inductor with our options, that remembers how it was called"""
        import torch._inductor

        # Dynamo keeps a backend for ever
        owner = weakref.ref(self)

        def backend(graph: GraphModule, examples: Sequence[th.Tensor]) -> Callable[..., Any]:
            caller: Any = owner()
            known = torch._inductor.list_options()
            options: dict[str, Any] = {name: value for name, value in _OPTIONS.items() if name in known}
            options["post_grad_custom_post_pass"] = caller._pass
            compiled = torch._inductor.compile(graph, list(examples), options=options)

            def run(*tensors: th.Tensor) -> Any:
                if (gradients := owner()) is not None:
                    gradients._last_call = compiled, tensors
                return compiled(*tensors)

            return run

        return backend


class DirectCall:
    """
    A compiled function without Dynamo around it.

    :param compiled: function of flat tensors
    :param tensors: with which Dynamo has called it
    :param leaves: those among them that are others at each call
    :param params: what was differentiated by
    :param gradients: that Dynamo's call has returned
    """

    def __init__(
        self,
        compiled: Callable[..., Any],
        tensors: Sequence[th.Tensor],
        leaves: Sequence[th.Tensor],
        params: Sequence[th.Tensor],
        gradients: Sequence[th.Tensor | None],
    ):
        self._compiled, self._tensors, self._params = compiled, list(tensors), list(params)
        places = {id(tensor): place for place, tensor in enumerate(leaves)}
        self._sources = [(at, places[id(tensor)]) for at, tensor in enumerate(tensors) if id(tensor) in places]
        self._has_gradient = [gradient is not None for gradient in gradients]
        self._is_complete = all(self._has_gradient)

    def has_params(self, params: Sequence[th.Tensor]) -> bool:
        """:return: whether these are the parameters to differentiate by"""
        return len(params) == len(self._params) and all(map(operator.is_, params, self._params))

    def __call__(self, leaves: Sequence[th.Tensor]) -> Gradients:
        """
        :param leaves: the inputs of this update
        :return: see ``objective.eager_gradients``
        """
        for at, place in self._sources:
            self._tensors[at] = leaves[place]
        *gradients, metrics = self._compiled(*self._tensors)
        if self._is_complete:
            return gradients, metrics
        found = iter(gradients)
        return [next(found) if has_gradient else None for has_gradient in self._has_gradient], metrics


def compile_gradients(backend: Callable[..., Any]) -> GradientFunction:
    """
    :param backend: of ``torch.compile``
    :return: ``objective.eager_gradients``, to be compiled when it is first called
    """
    reference = eager_gradients
    # Graphs are kept with the code object: one of its own for each model, so that they do not count together nor outlive it
    own = types.FunctionType(reference.__code__.replace(), reference.__globals__, reference.__name__, reference.__defaults__)
    return th.compile(own, fullgraph=True, dynamic=False, backend=backend)


@contextmanager
def tracing() -> Iterator[None]:
    """One at a time, with ``torch.autograd.grad`` inside the graph, and without the compiler's internal warnings."""
    import torch._dynamo

    # It looks at the bounds of a space by NumPy, which would become a computation of the graph
    th.compiler.assume_constant_result(preprocessing.is_image_space)
    config: Any = torch._dynamo.config
    traces = config.patch(trace_autograd_ops=True) if hasattr(config, "trace_autograd_ops") else nullcontext()
    with _LOCK, traces, warnings.catch_warnings():
        # They would be errors where warnings are
        warnings.simplefilter("ignore")
        validates = th.distributions.Distribution._validate_args
        try:
            yield
        finally:
            # Dynamo switches it off for good, and SB3's policies would no longer refuse NaN
            th.distributions.Distribution.set_default_validate_args(validates)
