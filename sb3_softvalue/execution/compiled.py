"""Forward and backward pass of an update as one graph, traced from the reference and compiled by Inductor."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch as th
from torch.func import functional_call

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
                with warnings.catch_warnings():
                    # The compiler's own warnings are not the user's business, least of all where warnings are errors
                    warnings.simplefilter("ignore")
                    compiled = _compile(self.objective, arguments, self._watched, self.mixed)
                    *gradients, metrics = compiled(*params, *constants, *inputs)
                self._compiled[key] = compiled
        return gradients, metrics


def _compile(objective: JointObjective, arguments: Arguments, watched: Watched, mixed: bool) -> Callable[..., Sequence[Any]]:
    """
    Trace ``update.objective_gradients`` to one graph of forward and backward pass, and compile it.

    :param objective: the joint objective
    :param arguments: shapes and structure to compile for
    :param watched: the objective's constant tensors
    :param mixed: whether the products between hidden layers are computed in bfloat16
    :return: function of (parameters, constants, ``arguments.tensors()``), all flat, that gives gradients and metrics, flat
    """
    import torch._inductor
    from torch.fx.experimental.proxy_tensor import make_fx

    # Both import the compiler, which takes a second
    from sb3_softvalue.execution.fusion import CheapProducts
    from sb3_softvalue.execution.mixed import MixedProducts
    from sb3_softvalue.execution.parts import Parts

    n_params, n_constants = len(arguments.params), len(watched.constants)
    names = [watched.names.get(id(param)) for param in arguments.params]

    def gradients(*tensors: th.Tensor) -> list[th.Tensor | None]:
        params = [tensor.detach().requires_grad_() for tensor in tensors[:n_params]]
        constants = dict(zip(watched.constant_names, tensors[n_params : n_params + n_constants], strict=True))
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

    # The temperature's gradient comes out of the actor's
    owners = [*("actor" if name is None else name.partition(".")[0] for name in names), None]
    inputs: list[Any] = [tensor.detach() for tensor in (*arguments.params, *watched.constants, *arguments.tensors())]
    # Traced on fake tensors: code that looks at a tensor's value fails here instead of being fixed to what it saw
    with th.enable_grad():
        graph = make_fx(gradients, tracing_mode="fake")(*inputs)
    for node in graph.graph.nodes:
        if th.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            raise RuntimeError(f"{node.target} draws random numbers inside the network")
    # Not th.compile: its frontend would trace the graph again, and look at every input again at each call
    if arguments.reward_scale.device.type == "cuda":
        return Parts(graph, owners, torch._inductor.compile)
    known = torch._inductor.config.get_config_copy()
    options: dict[str, Any] = {name: value for name, value in _CPU_OPTIONS.items() if name in known}
    options["post_grad_custom_post_pass"] = MixedProducts() if mixed else CheapProducts()
    return torch._inductor.compile(graph, inputs, options=options)
