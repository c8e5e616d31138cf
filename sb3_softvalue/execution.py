"""The one place that chooses how the gradients of an update are computed: eagerly, compiled, or as a CUDA graph.

All of them evaluate ``update.JointObjective``; none of them changes any state, so that a failing compiler or a warm-up
leaves the model as it was.
"""

import types
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch as th
from torch.func import functional_call, grad
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from sb3_softvalue.policies import has_only_known_modules
from sb3_softvalue.update import Batch, JointObjective, Temperature, draws_own_noise, objective_gradients

EXECUTIONS = ("auto", "eager", "compiled", "cuda_graph")
# Updates after which a compilation has paid for itself on a CPU: measured by benchmarks/throughput.py, see docs/speed.md
BREAK_EVEN_UPDATES = 5_000

Gradients = tuple[Sequence[th.Tensor | None], th.Tensor]
GradientFunction = Callable[[Sequence[th.Tensor], Batch, th.Tensor | None, Temperature, Any], Gradients]


class Choice(NamedTuple):
    """What was chosen, and why."""

    execution: str
    reason: str


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

    def __call__(self, name: str, value: th.Tensor | float) -> th.Tensor:
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
        self._params: Sequence[th.Tensor] = ()
        self._learned: dict[str, th.Tensor] = {}
        self._constants: dict[str, th.Tensor] = {}
        self._compiled: dict[tuple[Any, ...], Callable[..., tuple[dict[str, th.Tensor], th.Tensor]]] = {}

    def __call__(
        self,
        params: Sequence[th.Tensor],
        batch: Batch,
        noise: th.Tensor | None,
        temperature: Temperature,
        reward_scale: float,
    ) -> Gradients:
        """See ``update.objective_gradients``."""
        if params is not self._params:
            self._name(params)
        batch = batch._replace(discounts=self._scalars("discounts", batch.discounts))
        target_entropy = self._scalars("target_entropy", temperature.target_entropy)
        scale = self._scalars("reward_scale", reward_scale)
        # The graph is compiled without guards where the modules are known, hence our own key
        key = (*self._learned, *_signature((*batch, noise, temperature.ent_coef)))
        arguments = (self._learned, self._constants, batch, noise, temperature.ent_coef, target_entropy, scale)
        with th.no_grad():
            if key in self._compiled:
                gradients, metrics = self._compiled[key](*arguments)
            else:
                self._compiled[key] = _compile(self.objective)
                with warnings.catch_warnings():
                    # The compiler's own warnings are not the user's business, least of all where warnings are errors
                    warnings.simplefilter("ignore")
                    gradients, metrics = self._compiled[key](*arguments)
        return list(gradients.values()), metrics

    def _name(self, params: Sequence[th.Tensor]) -> None:
        """
        :param params: to differentiate by: parameters of the objective, and the log temperature if it is learned
        """
        names = {id(param): name for name, param in self.objective.named_parameters()}
        self._params = params
        self._learned = {names.get(id(param), _LOG_ENT_COEF): param for param in params}
        self._constants = {name: p for name, p in self.objective.named_parameters() if name not in self._learned}


_LOG_ENT_COEF = "log_ent_coef"


def _compile(objective: JointObjective) -> Callable[..., tuple[dict[str, th.Tensor], th.Tensor]]:
    """
    :param objective: the joint objective
    :return: function of (learned parameters, constant parameters, batch, noise, α, target entropy, reward scale) that gives
        the gradients under the names of the learned parameters, and the metrics
    """
    from sb3_softvalue.fusion import FuseProductEpilogues  # imports the compiler, which takes a second

    def gradients(
        learned: dict[str, th.Tensor],
        constants: dict[str, th.Tensor],
        batch: Batch,
        noise: th.Tensor,
        ent_coef: th.Tensor,
        target_entropy: th.Tensor,
        reward_scale: th.Tensor,
    ) -> tuple[dict[str, th.Tensor], th.Tensor]:
        def total_of(learned: dict[str, th.Tensor]) -> tuple[th.Tensor, th.Tensor]:
            networks = {name: param for name, param in learned.items() if name != _LOG_ENT_COEF}
            temperature = Temperature(ent_coef, learned.get(_LOG_ENT_COEF), target_entropy)
            total, metrics = functional_call(objective, networks | constants, (batch, noise, temperature, reward_scale))
            return total, th.stack(metrics)

        return grad(total_of, has_aux=True)(learned)

    options: dict[str, Any] = {}
    if next(objective.parameters()).device.type == "cpu":
        options["post_grad_custom_post_pass"] = FuseProductEpilogues()
    if all(has_only_known_modules(network) for network in objective.children()):
        # Walking the modules to check that nothing about them changed takes longer than a layer of the network. Dynamo
        # keeps compiled graphs by code object, so that without guards each needs a code object of its own.
        options["guard_filter_fn"] = _no_guards
        gradients = types.FunctionType(gradients.__code__.replace(), globals(), closure=gradients.__closure__)
    return th.compile(gradients, fullgraph=True, dynamic=False, options=options)


def _no_guards(guards: Sequence[Any]) -> list[bool]:
    """:return: False for each guard"""
    return [False] * len(guards)


def _leaves(values: Any) -> list[th.Tensor]:
    """:return: the tensors of a batch and the like, in order; dict observations are opened"""
    leaves: list[th.Tensor] = []
    for value in values:
        leaves.extend(value.values() if isinstance(value, dict) else [value])
    return leaves


def _signature(values: Any) -> tuple[Any, ...]:
    """:return: what a compiled or captured function has fixed about its arguments"""
    return tuple((tensor.shape, tensor.stride(), tensor.dtype) for tensor in _leaves(values))


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
        self._inner: GradientFunction = EagerGradients(objective)
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
        batch = batch._replace(discounts=self._scalars("discounts", batch.discounts))
        temperature = temperature._replace(target_entropy=self._scalars("target_entropy", temperature.target_entropy))
        scale = self._scalars("reward_scale", reward_scale)
        inputs = _leaves((*batch, noise, temperature.ent_coef))
        addresses = tuple(param.data_ptr() for param in (*params, *self.objective.parameters()))
        key = (_signature(inputs), addresses)
        if key != self._key:
            self._capture(params, batch, noise, temperature, scale)
            self._key = key
        th._foreach_copy_(self._inputs, inputs)
        self._graph.replay()
        gradients, metrics = self._outputs
        return gradients, metrics.clone()

    def _capture(
        self,
        params: Sequence[th.Tensor],
        batch: Batch,
        noise: th.Tensor | None,
        temperature: Temperature,
        reward_scale: th.Tensor,
    ) -> None:
        """Capture the gradients of this batch into a new graph, on inputs of its own."""
        static_batch = Batch(*(_clone(field) for field in batch))
        static_noise = _clone(noise)
        static_temperature = temperature._replace(ent_coef=temperature.ent_coef.clone())
        self._inputs = _leaves((*static_batch, static_noise, static_temperature.ent_coef))
        arguments = (params, static_batch, static_noise, static_temperature, reward_scale)
        # Libraries set themselves up on first use, which a capture does not allow: warm up on another stream first, see
        # https://docs.pytorch.org/docs/stable/notes/cuda.html#whole-network-capture
        stream = th.cuda.Stream()
        stream.wait_stream(th.cuda.current_stream())
        with th.cuda.stream(stream):
            for _ in range(3):
                self._inner(*arguments)
        th.cuda.current_stream().wait_stream(stream)
        self._graph = th.cuda.CUDAGraph()
        with th.cuda.graph(self._graph):
            self._outputs = self._inner(*arguments)


def _clone(field: Any) -> Any:
    """:return: a copy of a tensor or of a dict of tensors"""
    return {key: tensor.clone() for key, tensor in field.items()} if isinstance(field, dict) else field.clone()
