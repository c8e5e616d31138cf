"""Forward and backward pass of an update as one graph, traced from the reference and compiled by Inductor."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch as th
from torch.func import functional_call
from torch.fx import GraphModule

from sb3_softvalue.execution.arguments import Arguments, Gradients, Scalars, signature
from sb3_softvalue.execution.watched import Watched
from sb3_softvalue.update import Batch, JointObjective, Temperature, objective_gradients

# A module whose attributes change at every step would be compiled at every step
_MAX_GRAPHS = 8
# Of Inductor; a version of PyTorch that does not know one does without
_CPU_OPTIONS = {
    # Kernels called from C++: about a hundred calls from Python take as long as two layers of the network
    "cpp_wrapper": True,
    # What calls the kernels needs no optimizing, and for two short files PyTorch's headers need no compiling of their own,
    # which takes longer than both
    "cpp_wrapper_build_separate": True,
    "cpp_cache_precompile_headers": False,
    # A compiler that knows C++20, which PyTorch's headers need, knows the processor's vectors too: no need to spend
    # ten seconds on compiling a probe for each kind
    "cpp.vec_isa_ok": True,
}


class CompiledGradients:
    """
    Forward and backward pass as one compiled graph over the policy's own modules.

    :param objective: the joint objective, whose modules neither draw random numbers nor change state
    :param mixed: whether the products between hidden layers are computed in bfloat16
    """

    def __init__(self, objective: JointObjective, mixed: bool = False):
        self.objective = objective
        self.mixed = mixed
        self._scalars = Scalars(next(objective.parameters()).device)
        self._watched = Watched(objective, ())
        self._compiled: dict[tuple[Any, ...], Callable[..., Sequence[Any]]] = {}

    def __call__(
        self,
        params: Sequence[th.Tensor],
        batch: Batch,
        noise: th.Tensor | None,
        temperature: Temperature,
        reward_scale: float,
    ) -> Gradients:
        """See ``update.objective_gradients``."""
        if not self._watched.are_current(params):
            self._watched, self._compiled = Watched(self.objective, params), {}
        arguments = Arguments(params, *self._scalars.of(batch, temperature, reward_scale), noise)
        inputs = arguments.tensors()
        constants = self._watched.constants
        key = (self._watched.state(), *signature((*constants, *inputs)))
        with th.no_grad():
            if key in self._compiled:
                *gradients, metrics = self._compiled[key](*params, *constants, *inputs)
            else:
                if len(self._compiled) == _MAX_GRAPHS:
                    raise RuntimeError(f"shapes or modules have changed {_MAX_GRAPHS} times, each needs a graph of its own")
                compiled = _compile(self.objective, arguments, self._watched, self.mixed)
                with _quiet():
                    *gradients, metrics = compiled(*params, *constants, *inputs)
                self._compiled[key] = compiled
        return gradients, metrics


@contextmanager
def _quiet() -> Iterator[None]:
    """The compiler's own warnings are not the user's business, least of all where warnings are errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _compile(objective: JointObjective, arguments: Arguments, watched: Watched, mixed: bool) -> Callable[..., Sequence[Any]]:
    """
    Trace ``update.objective_gradients`` to one graph of forward and backward pass, and compile it.

    :param objective: the joint objective
    :param arguments: shapes and structure to compile for
    :param watched: the objective's constant tensors
    :param mixed: whether the products between hidden layers are computed in bfloat16
    :return: function of (parameters, constants, ``arguments.tensors()``), all flat, that gives gradients and metrics, flat
    """
    names = [watched.names.get(id(param)) for param in arguments.params]
    inputs: list[th.Tensor] = [*arguments.params, *watched.constants, *arguments.tensors()]
    graph = _trace(objective, arguments, watched.constant_names, names, inputs)
    with _quiet():
        # These import the compiler, which takes a second
        import torch._inductor

        from sb3_softvalue.execution.fusion import CheapProducts
        from sb3_softvalue.execution.mixed import SMALLEST_SIDE, MixedProducts, rounds_anything
        from sb3_softvalue.execution.parts import Parts

    # Not th.compile: its frontend would trace the graph again, and look at every input again at each call
    if arguments.reward_scale.device.type == "cuda":
        # The temperature's gradient comes out of the actor's
        owners = [*("actor" if name is None else name.partition(".")[0] for name in names), None]
        with _quiet():
            return Parts(graph, owners, torch._inductor.compile)
    known = torch._inductor.config.get_config_copy()
    options: dict[str, Any] = {name: value for name, value in _CPU_OPTIONS.items() if name in known}
    options["post_grad_custom_post_pass"] = CheapProducts()
    if mixed:
        observed = set(map(id, arguments.batch.observation_leaves()))
        observations = [index for index, tensor in enumerate(inputs) if id(tensor) in observed]
        if not rounds_anything(graph.graph, observations):
            warnings.warn(
                f"execution='mixed' is the same as 'compiled' here: no product between hidden layers has {SMALLEST_SIDE} or "
                "more units on both of its sides and as many transitions in a batch.",
                stacklevel=2,
            )
        options["post_grad_custom_post_pass"] = MixedProducts(observations)
    with _quiet():
        return torch._inductor.compile(graph, [tensor.detach() for tensor in inputs], options=options)


@_quiet()
def _trace(
    objective: JointObjective,
    arguments: Arguments,
    constant_names: Sequence[str],
    names: Sequence[str | None],
    inputs: Sequence[th.Tensor],
) -> GraphModule:
    """
    :param objective: the joint objective
    :param arguments: shapes and structure to trace
    :param constant_names: of the tensors that the objective reads and does not learn
    :param names: of the parameters inside the objective; None for one that is not in it
    :param inputs: parameters, constants and ``arguments.tensors()``
    :return: forward and backward pass in ATen operators, a function of ``inputs``
    """
    from torch.fx.experimental.proxy_tensor import make_fx

    n_params, n_constants = len(arguments.params), len(constant_names)

    def gradients(*tensors: th.Tensor) -> list[th.Tensor | None]:
        params = [tensor.detach().requires_grad_() for tensor in tensors[:n_params]]
        constants = dict(zip(constant_names, tensors[n_params : n_params + n_constants], strict=True))
        networks = {name: param for name, param in zip(names, params, strict=True) if name is not None}
        inner = arguments.with_tensors(params, tensors[n_params + n_constants :])

        def total(*args: Any) -> Any:
            tensors = networks | constants
            before = dict(tensors)
            # Tied weights: a shared extractor is one module under several names, which functional_call would fail to restore
            result = functional_call(objective, tensors, args, tie_weights=False)
            for name, tensor in tensors.items():  # as the modules have left them
                if tensor is not before[name]:
                    raise RuntimeError(f"{name} is replaced inside the network")
            return result

        result, metrics = objective_gradients(total, params, inner.batch, inner.noise, inner.temperature, inner.reward_scale)
        return [*result, metrics]

    # Traced on fake tensors: code that looks at a tensor's value fails here instead of being fixed to what it saw
    with th.enable_grad():
        graph = make_fx(gradients, tracing_mode="fake")(*[tensor.detach() for tensor in inputs])
    for node in graph.graph.nodes:
        if th.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            raise RuntimeError(f"{node.target} draws random numbers inside the network")
    return graph
