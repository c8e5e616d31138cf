"""The one place that chooses how the gradients of an update are computed: eagerly, compiled, or as a CUDA graph.

All of them evaluate ``update.JointObjective``; none of them changes any state, so that a failing compiler or a warm-up
leaves the model as it was.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch as th
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from sb3_softvalue.optimizers import same_tensors
from sb3_softvalue.policies import is_known_module
from sb3_softvalue.update import Batch, JointObjective, Temperature, draws_own_noise, objective_gradients

EXECUTIONS = ("auto", "eager", "compiled", "cuda_graph")
# Updates after which a compilation has paid for itself on a CPU: measured by benchmarks/throughput.py, see docs/guide/speed.md
BREAK_EVEN_UPDATES = 5_000

Gradients = tuple[Sequence[th.Tensor | None], th.Tensor]
GradientFunction = Callable[[Sequence[th.Tensor], Batch, th.Tensor | None, Temperature, Any], Gradients]


class Choice(NamedTuple):
    """What was chosen, and why."""

    execution: str
    """One of eager, compiled and cuda_graph"""
    reason: str
    """The rest of a sentence"""


def unavailable(execution: str, objective: JointObjective, device: th.device) -> str | None:
    """
    :param execution: "compiled" or "cuda_graph"
    :param objective: the joint objective
    :param device: of the networks
    :return: why it cannot be had, as the rest of a sentence; None if it can
    """
    if execution == "cuda_graph" and device.type != "cuda":
        return f"a CUDA graph needs a CUDA device, and the model is on {device.type}"
    if execution == "compiled" and device.type not in ("cpu", "cuda"):
        return f"compilation is for CPU and CUDA, and the model is on {device.type}"
    if objective.actor.use_sde:
        return "gSDE draws its noise inside the network"
    if draws_own_noise(objective.actor):
        return f"{type(objective.actor).__name__} overrides action_log_prob"
    for module in objective.modules():
        if isinstance(module, (_BatchNorm, _DropoutNd)):
            return f"{type(module).__name__} changes state or draws random numbers inside the network"
        if execution == "cuda_graph" and not is_known_module(module) and module._buffers:
            return f"{type(module).__name__} has buffers, which capturing a graph may change"
    return None


def choose(requested: str, objective: JointObjective, device: th.device, n_updates: float, before: str | None) -> Choice:
    """
    :param requested: one of ``EXECUTIONS``
    :param objective: the joint objective
    :param device: of the networks
    :param n_updates: gradient steps that the model has done and will do in this ``learn()``
    :param before: what "auto" was resolved to so far, None if to nothing yet
    :return: "eager", "compiled" or "cuda_graph"
    :raises ValueError: if it was asked for explicitly and cannot be had
    """
    if requested == "eager":
        return Choice("eager", "it was asked for")
    fast = requested
    if requested == "auto":
        fast = "cuda_graph" if device.type == "cuda" else "compiled"
    problem = unavailable(fast, objective, device)
    if requested != "auto":
        if problem is not None:
            raise ValueError(f"execution={requested!r} is not possible: {problem}; use execution='auto' or 'eager'.")
        return Choice(fast, "it was asked for")
    if problem is not None:
        return Choice("eager", problem)
    if fast == "compiled" and before != "compiled" and n_updates < BREAK_EVEN_UPDATES:
        return Choice("eager", f"{int(n_updates)} updates are too few to repay a compilation ({BREAK_EVEN_UPDATES})")
    return Choice(fast, f"{int(n_updates)} updates repay the preparation")


class Executor:
    """
    Computes gradients in the way that was chosen, and keeps to it.

    :param requested: one of ``EXECUTIONS``
    :param objective: the joint objective
    :param device: of the networks
    :param resolved: what an earlier run of the same model was executed by, None if nothing was run
    :param announce: called with one line when "auto" has chosen
    """

    def __init__(
        self,
        requested: str,
        objective: JointObjective,
        device: th.device,
        resolved: str | None = None,
        announce: Callable[[str], None] = print,
    ):
        self.requested = requested
        self.objective = objective
        self.device = device
        self.resolved = resolved
        self._announce = announce
        self._gradients: GradientFunction | None = None
        self._settled = False

    def prepare(self, n_updates: float) -> None:
        """
        Choose the execution of the coming gradient steps.

        :param n_updates: gradient steps that the model has done and will do in this ``learn()``
        :raises ValueError: if the execution was asked for explicitly and cannot be had
        """
        if self._settled or (self._gradients is not None and n_updates < BREAK_EVEN_UPDATES):
            return
        choice = choose(self.requested, self.objective, self.device, n_updates, self.resolved)
        if self._gradients is None or choice.execution != self.resolved:
            if self.requested == "auto":
                self._announce(f"Update executed by {choice.execution!r}: {choice.reason}")
            self._use(choice.execution)
        # Only "auto" on its eager way may still change its mind
        self._settled = choice.execution != "eager" or self.requested == "eager" or n_updates >= BREAK_EVEN_UPDATES

    def _use(self, execution: str) -> None:
        """
        :param execution: "eager", "compiled" or "cuda_graph"
        """
        self.resolved = execution
        if execution == "compiled":
            self._gradients = CompiledGradients(self.objective)
        elif execution == "cuda_graph":
            self._gradients = CudaGraphGradients(self.objective)
        else:
            self._gradients = EagerGradients(self.objective)

    def __call__(
        self,
        params: Sequence[th.Tensor],
        batch: Batch,
        noise: th.Tensor | None,
        temperature: Temperature,
        reward_scale: float,
    ) -> Gradients:
        """
        See ``update.objective_gradients``.

        :raises RuntimeError: if the execution was asked for explicitly and its preparation fails
        """
        assert self._gradients is not None, "prepare() comes first"
        try:
            return self._gradients(params, batch, noise, temperature, reward_scale)
        except Exception as error:
            if self.resolved == "eager":
                raise
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            if self.requested != "auto":
                message = f"execution={self.requested!r} failed, use execution='auto' or 'eager': {reason}"
                raise RuntimeError(message) from error
            self._announce(f"Update executed by 'eager': {self.resolved!r} failed with {reason}")
            self._use("eager")
            return self(params, batch, noise, temperature, reward_scale)


class EagerGradients:
    """
    The readable reference: one forward and one backward pass of PyTorch's autograd.

    :param objective: the joint objective
    """

    def __init__(self, objective: JointObjective):
        self.objective = objective

    def __call__(
        self,
        params: Sequence[th.Tensor],
        batch: Batch,
        noise: th.Tensor | None,
        temperature: Temperature,
        reward_scale: float,
    ) -> Gradients:
        """See ``update.objective_gradients``."""
        return objective_gradients(self.objective, params, batch, noise, temperature, reward_scale)


class Scalars:
    """
    Numbers as tensors that keep their place in memory, so that a schedule neither recompiles nor recaptures anything.

    :param device: of the tensors
    """

    def __init__(self, device: th.device):
        self.device = device
        self._tensors: dict[str, th.Tensor] = {}
        self._values: dict[str, float] = {}

    def of(self, batch: Batch, temperature: Temperature, reward_scale: float) -> tuple[Batch, Temperature, th.Tensor]:
        """
        :return: the same, every number of them a tensor
        """
        batch = batch._replace(discounts=self._tensor("discounts", batch.discounts))
        temperature = temperature._replace(target_entropy=self._tensor("target_entropy", temperature.target_entropy))
        return batch, temperature, self._tensor("reward_scale", reward_scale)

    def _tensor(self, name: str, value: th.Tensor | float) -> th.Tensor:
        """
        :param name: which number
        :param value: its value now; a tensor is passed through
        :return: shape () for a number
        """
        if isinstance(value, th.Tensor):
            return value
        if name not in self._tensors:
            # As exact as Python's number; without dimensions it does not promote what it is combined with
            self._tensors[name] = th.tensor(value, dtype=th.float64, device=self.device)
        elif self._values[name] != value:
            self._tensors[name].fill_(value)
        self._values[name] = value
        return self._tensors[name]


class CompiledGradients:
    """
    Forward and backward pass as one compiled graph over the policy's own modules.

    :param objective: the joint objective, whose modules neither draw random numbers nor change state
    """

    def __init__(self, objective: JointObjective):
        self.objective = objective
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
        key = (self._watched.state(), *_signature((*constants, *inputs)))
        with th.no_grad():
            if key in self._compiled:
                *gradients, metrics = self._compiled[key](*params, *constants, *inputs)
            else:
                if len(self._compiled) == _MAX_GRAPHS:
                    raise RuntimeError(f"shapes or modules have changed {_MAX_GRAPHS} times, each needs a graph of its own")
                with warnings.catch_warnings():
                    # The compiler's own warnings are not the user's business, least of all where warnings are errors
                    warnings.simplefilter("ignore")
                    compiled = _compile(self.objective, arguments, self._watched)
                    *gradients, metrics = compiled(*params, *constants, *inputs)
                self._compiled[key] = compiled
        return gradients, metrics


class Arguments(NamedTuple):
    """What the gradients depend on, every number of it a tensor."""

    params: Sequence[th.Tensor]
    """Of all optimizers, in order"""
    batch: Batch
    temperature: Temperature
    reward_scale: th.Tensor
    """Shape ()"""
    noise: th.Tensor | None
    """Shape (batch, action_dim)"""

    def tensors(self) -> list[th.Tensor]:
        """:return: all but the parameters in a fixed order, dict observations opened"""
        others = [self.temperature.ent_coef, self.temperature.target_entropy, self.reward_scale, self.noise]
        if self.temperature.log_ent_coef is not None and not self._learns_log_ent_coef():
            others.append(self.temperature.log_ent_coef)
        return [*self.batch.leaves(), *others]

    def _learns_log_ent_coef(self) -> bool:
        """:return: whether log α is the last of the parameters; frozen, it is none of them"""
        return any(param is self.temperature.log_ent_coef for param in self.params[-1:])

    def with_tensors(self, params: Sequence[th.Tensor], tensors: Sequence[th.Tensor]) -> "Arguments":
        """
        :param params: in place of these
        :param tensors: in place of ``tensors()``, in the same order
        :return: the same structure around other tensors
        """
        log_ent_coef = self.temperature.log_ent_coef
        if log_ent_coef is not None:
            if self._learns_log_ent_coef():
                log_ent_coef = params[-1]
            else:
                *tensors, log_ent_coef = tensors
        *leaves, ent_coef, target_entropy, reward_scale, noise = tensors
        temperature = Temperature(ent_coef, log_ent_coef, target_entropy)
        return Arguments(params, self.batch.with_leaves(leaves), temperature, reward_scale, noise)


class Watched:
    """
    What a graph of the objective has fixed beside its inputs, to be compared before the graph is used again.

    :param objective: the joint objective
    :param learned: the parameters to differentiate by; all others are constants
    """

    def __init__(self, objective: JointObjective, learned: Sequence[th.Tensor]):
        self.learned = learned
        self.names: dict[int, str] = {}
        ids = set(map(id, learned))
        # By place, since a buffer may be replaced instead of changed
        self._places: dict[str, tuple[dict[str, Any], str]] = {}
        for prefix, module in objective.named_modules():
            for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is None or id(tensor) in self.names:
                    continue
                full_name = self.names[id(tensor)] = f"{prefix}.{name}" if prefix else name
                if id(tensor) not in ids:
                    members = module._parameters if name in module._parameters else module._buffers
                    self._places[full_name] = members, name
        self.constant_names = list(self._places)
        modules = [module for network in objective.children() for module in network.modules()]
        self._children = [(module._modules, list(module._modules.values())) for module in modules if module._modules]
        # Plain layers compute from their parameters alone; about others only their plain attributes can be watched
        self._others = [module for module in modules if not is_known_module(module)]

    def are_current(self, params: Sequence[th.Tensor]) -> bool:
        """
        :param params: of the next step
        :return: whether these are the parameters that are learned, and no module has been exchanged
        """
        if params is not self.learned and same_tensors(params, self.learned):
            self.learned = params
        return params is self.learned and all(list(now.values()) == then for now, then in self._children)

    @property
    def constants(self) -> list[th.Tensor]:
        """What is read and not learned, in the order of ``constant_names``"""
        return [members[name] for members, name in self._places.values()]

    def state(self) -> tuple[Any, ...]:
        """:return: hashable, equal as long as no attribute of a module that is not a plain layer has changed"""
        return tuple(
            (name, value)
            for module in self._others
            for name, value in vars(module).items()
            if isinstance(value, (bool, int, float, str))
        )


# A module whose attributes change at every step would be compiled at every step
_MAX_GRAPHS = 8


def _compile(objective: JointObjective, arguments: Arguments, watched: Watched) -> Callable[..., Sequence[Any]]:
    """
    Trace ``update.objective_gradients`` to one graph of forward and backward pass, and compile it.

    :param objective: the joint objective
    :param arguments: shapes and structure to compile for
    :param watched: the objective's constant tensors
    :return: function of (parameters, constants, ``arguments.tensors()``), all flat, that gives gradients and metrics, flat
    """
    import torch._inductor
    from torch.fx.experimental.proxy_tensor import make_fx

    from sb3_softvalue.fusion import FuseProductEpilogues  # imports the compiler, which takes a second

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

    inputs: list[Any] = [tensor.detach() for tensor in (*arguments.params, *watched.constants, *arguments.tensors())]
    # Traced on fake tensors: code that looks at a tensor's value fails here instead of being fixed to what it saw
    with th.enable_grad():
        graph = make_fx(gradients, tracing_mode="fake")(*inputs)
    for node in graph.graph.nodes:
        if th.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            raise RuntimeError(f"{node.target} draws random numbers inside the network")
    options: dict[str, Any] = {}
    if arguments.reward_scale.device.type == "cpu":
        options = {
            "post_grad_custom_post_pass": FuseProductEpilogues(),
            # Kernels called from C++: about a hundred calls from Python take as long as two layers of the network
            "cpp_wrapper": True,
            # A compiler that knows C++20, which PyTorch's headers need, knows the processor's vectors too: no need to spend
            # ten seconds on compiling a probe for each kind
            "cpp.vec_isa_ok": True,
        }
    # Not th.compile: its frontend would trace the graph again, and look at every input again at each call
    return torch._inductor.compile(graph, inputs, options=options)


def _signature(tensors: Sequence[th.Tensor]) -> tuple[Any, ...]:
    """:return: what a compiled or captured function has fixed about its inputs"""
    return tuple((tensor.shape, tensor.stride(), tensor.dtype) for tensor in tensors)


class CudaGraphGradients:
    """
    Forward and backward pass captured once as a CUDA graph and replayed: one launch instead of hundreds.

    What is captured reads parameters and inputs at fixed addresses and writes nothing but gradients and metrics: warm-up
    and capture leave parameters, optimizers and random generators as they are. Noise is drawn outside. The graph is
    captured again when shapes or addresses differ.

    :param objective: the joint objective, whose modules neither draw random numbers nor change state
    """

    def __init__(self, objective: JointObjective):
        self.objective = objective
        self._scalars = Scalars(next(objective.parameters()).device)
        self._watched = Watched(objective, ())
        self._key: tuple[Any, ...] | None = None
        self._graph: Any = None
        self._inputs: list[th.Tensor] = []
        self._outputs: Gradients = ((), th.empty(0))

    def __call__(
        self,
        params: Sequence[th.Tensor],
        batch: Batch,
        noise: th.Tensor | None,
        temperature: Temperature,
        reward_scale: float,
    ) -> Gradients:
        """See ``update.objective_gradients``; the gradients are overwritten by the next call."""
        if not self._watched.are_current(params):
            self._watched, self._key = Watched(self.objective, params), None
        arguments = Arguments(params, *self._scalars.of(batch, temperature, reward_scale), noise)
        inputs = arguments.tensors()
        addresses = tuple(tensor.data_ptr() for tensor in (*params, *self._watched.constants))
        key = (self._watched.state(), addresses, *_signature(inputs))
        if key != self._key:
            self._capture(arguments)
            self._key = key
        th._foreach_copy_(self._inputs, inputs)
        self._graph.replay()
        gradients, metrics = self._outputs
        return gradients, metrics.clone()

    def _capture(self, arguments: Arguments) -> None:
        """
        :param arguments: capture the gradients into a new graph, on inputs of its own that look like these
        """
        self._inputs = [tensor.clone() for tensor in arguments.tensors()]
        params, batch, temperature, reward_scale, noise = arguments.with_tensors(arguments.params, self._inputs)
        # Libraries set themselves up on first use, which a capture does not allow: warm up on another stream first, see
        # https://docs.pytorch.org/docs/stable/notes/cuda.html#whole-network-capture
        stream = th.cuda.Stream()
        stream.wait_stream(th.cuda.current_stream())
        with th.cuda.stream(stream):
            for _ in range(3):
                objective_gradients(self.objective, params, batch, noise, temperature, reward_scale)
        th.cuda.current_stream().wait_stream(stream)
        self._graph = th.cuda.CUDAGraph()
        with th.cuda.graph(self._graph):
            self._outputs = objective_gradients(self.objective, params, batch, noise, temperature, reward_scale)
