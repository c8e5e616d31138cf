"""The gradients of an update as one graph of forward and backward pass, compiled on a CPU by ``torch.compile``.

This file uses private interfaces of PyTorch. ``torch._inductor.compile`` allows the direct calls below.
``torch._dynamo.config.trace_autograd_ops`` lets PyTorch 2.11 to 2.13 trace ``torch.autograd.grad``; without it, updates run
eagerly there. ``Distribution._validate_args`` is read in order to restore it.
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

# Options of Inductor; those that a version of PyTorch does not have are left out
_OPTIONS = {
    # Call the kernels from C++: about a hundred calls from Python take as long as two layers of the network
    "cpp_wrapper": True,
    # Save compilation time: the wrapper needs no optimization, and precompiling PyTorch's headers takes longer than the two
    # short files that would use them
    "cpp_wrapper_build_separate": True,
    "cpp_cache_precompile_headers": False,
    # Skip ten seconds of test compilations: a compiler with C++20, which PyTorch's headers need, supports the vector
    # instructions too
    "cpp.vec_isa_ok": True,
}
# Dynamo has global state while it traces
_LOCK = threading.Lock()


class CompiledGradients:
    """
    ``objective.eager_gradients``, compiled. Dynamo guards everything that the graph assumes, and recompiles when a shape,
    module or attribute changes.

    Its guards and frames take 5 % of an update. With known layers only, just a change of layers, tensors or shapes can
    invalidate a graph: while these stay the same, the compiled function is called directly.

    :param mixed: whether products between hidden layers are computed in bfloat16
    """

    def __init__(self, mixed: bool = False):
        self.mixed = mixed
        self._by_dynamo: dict[bool, GradientFunction] = {}
        self._state = ModuleState(nn.Module())
        self._objective: JointObjective | None = None
        self._direct: dict[Any, DirectCall] = {}
        # Keys that Dynamo was called with since the networks last changed
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
            self._by_dynamo = {}  # graphs of the previous networks are not needed any more
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
        :param key: ``update_actor`` and the signature of the inputs
        :return: see ``objective.eager_gradients``
        """
        update_actor, _ = key
        if key in self._called:
            # This fails if Dynamo has to recompile, for instance because an attribute of a module changed: it can only do so
            # inside tracing()
            with suppress(Exception):
                return self._by_dynamo[update_actor](objective, params, inputs, update_actor)
        self._pass = self._graph_pass(inputs)
        with tracing():
            by_dynamo = self._by_dynamo.get(update_actor) or compile_gradients(self._backend())
            gradients = by_dynamo(objective, params, inputs, update_actor)
        self._by_dynamo[update_actor] = by_dynamo
        self._called.add(key)
        if getattr(self._pass, "has_no_effect", False):
            warnings.warn(
                f"execution='mixed' has no effect here and equals 'compiled': {self._pass.requirement}", stacklevel=2
            )
        return gradients

    def _graph_pass(self, inputs: UpdateInputs) -> Any:
        """:return: the pass that rewrites the matrix products of the graph"""
        from sb3_softvalue.execution.graph_pass import Bf16MatmulPass, MatmulRewritePass

        if not self.mixed:
            return MatmulRewritePass()
        shapes: set[tuple[int, ...]] = set()
        map_tensors(lambda tensor: shapes.add(tuple(tensor.shape)), inputs)
        return Bf16MatmulPass(shapes)

    def _backend(self) -> Callable[..., Any]:
        """:return: Inductor with our options; it remembers the arguments of its last call"""
        import torch._inductor

        # A weak reference, since Dynamo keeps a backend forever
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
    A compiled function, called without Dynamo.

    :param compiled: function of flat tensors
    :param tensors: arguments of Dynamo's last call
    :param leaves: those among them that change with each call
    :param params: the parameters of the gradients
    :param gradients: result of Dynamo's last call
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
        """:return: whether the compiled gradients are those of these parameters"""
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
    :param backend: backend of ``torch.compile``
    :return: ``objective.eager_gradients``, compiled at its first call
    """
    reference = eager_gradients
    # Dynamo stores graphs with the code object: a copy per model keeps recompile limits and lifetimes separate
    own = types.FunctionType(reference.__code__.replace(), reference.__globals__, reference.__name__, reference.__defaults__)
    return th.compile(own, fullgraph=True, dynamic=False, backend=backend)


@contextmanager
def tracing() -> Iterator[None]:
    """Trace in one thread at a time, with ``torch.autograd.grad`` in the graph and without the compiler's warnings."""
    import torch._dynamo

    # It reads the bounds of a space with NumPy, which Dynamo would trace into the graph
    th.compiler.assume_constant_result(preprocessing.is_image_space)
    config: Any = torch._dynamo.config
    traces = config.patch(trace_autograd_ops=True) if hasattr(config, "trace_autograd_ops") else nullcontext()
    with _LOCK, traces, warnings.catch_warnings():
        # Otherwise they would fail the compilation where warnings are errors
        warnings.simplefilter("ignore")
        validates = th.distributions.Distribution._validate_args
        try:
            yield
        finally:
            # Dynamo disables validation permanently, and SB3's policies would no longer refuse NaN
            th.distributions.Distribution.set_default_validate_args(validates)
