"""CUDA graphs of the gradients and of the actions: one launch replays hundreds of captured kernels."""

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch as th
from stable_baselines3.common.type_aliases import PyTorchObs
from torch import nn

from sb3_softvalue.execution.compiled import compile_gradients, tracing
from sb3_softvalue.execution.module_state import ModuleState, has_hooks, signature
from sb3_softvalue.objective import Gradients, JointObjective, UpdateInputs, eager_gradients, map_tensors
from sb3_softvalue.policies import SACVPolicy

# Calls with the same observation shapes before their actions are captured, and maximum number of graphs
_CALLS_BEFORE_CAPTURE = 10
_MAX_GRAPHS = 8


def is_capturable(device: th.device) -> bool:
    """:return: whether the device supports CUDA graphs"""
    return device.type == "cuda"


class CapturedGraph:
    """
    A function of tensors, captured as a CUDA graph with its own input tensors.

    :param function: function to capture, called several times before the capture. Other tensors that it reads must keep their
        addresses, and the extra calls must have no side effects.
    :param inputs: example inputs, with the shapes and dtypes of all later calls
    """

    def __init__(self, function: Callable[..., Any], inputs: Sequence[th.Tensor]):
        self._inputs = [tensor.clone() for tensor in inputs]
        by_type: dict[th.dtype, list[int]] = {}
        for place, tensor in enumerate(self._inputs):
            by_type.setdefault(tensor.dtype, []).append(place)
        # One launch copies all inputs of one dtype
        self._places = list(by_type.values())
        with th.cuda.device(self._inputs[0].device):
            # Warm up on another stream, since libraries initialize on first use, which is not allowed during capture:
            # https://docs.pytorch.org/docs/stable/notes/cuda.html#whole-network-capture
            stream = th.cuda.Stream()
            stream.wait_stream(th.cuda.current_stream())
            with th.cuda.stream(stream):
                for _ in range(3):
                    function(*self._inputs)
            th.cuda.current_stream().wait_stream(stream)
            self._graph = th.cuda.CUDAGraph()
            # On a new stream, so that a failed capture leaves no library workspaces on a stream in use. "thread_local": other
            # threads may use CUDA meanwhile.
            with th.cuda.stream(th.cuda.current_stream()):
                with th.cuda.graph(self._graph, stream=th.cuda.Stream(), capture_error_mode="thread_local"):
                    self.results = function(*self._inputs)

    def __call__(self, inputs: Sequence[th.Tensor]) -> Any:
        """
        :param inputs: tensors with the captured shapes and dtypes
        :return: results of the function; the next call overwrites them
        """
        for places in self._places:
            th._foreach_copy_([self._inputs[place] for place in places], [inputs[place] for place in places])
        self._graph.replay()
        return self.results


class CapturedGradients:
    """
    ``objective.eager_gradients`` as a CUDA graph whose independent parts run concurrently.

    The graph writes only gradients and metrics, and the noise is drawn outside: warm-up and capture change no parameter,
    optimizer or random generator. The graph is captured again when shapes, addresses or modules change.

    :param compiled: whether Inductor compiles the parts; False captures PyTorch's own kernels
    """

    def __init__(self, compiled: bool = False):
        self.compiled = compiled
        self._state = ModuleState(nn.Module())
        self._objective: JointObjective | None = None
        self._keys: dict[bool, Any] = {}
        self._graphs: dict[bool, CapturedGraph] = {}

    def __call__(
        self, objective: JointObjective, params: Sequence[th.Tensor], inputs: UpdateInputs, update_actor: bool = True
    ) -> Gradients:
        """See ``objective.eager_gradients``; the next call overwrites the gradients."""
        tensors: list[th.Tensor] = []
        log_ent_coef = inputs.temperature.log_ent_coef
        # Not copied into the graph's inputs: a parameter keeps its address
        map_tensors(tensors.append, inputs._replace(temperature=inputs.temperature._replace(log_ent_coef=None)))
        if objective is not self._objective or not self._state.is_current():
            self._objective, self._state, self._keys = objective, ModuleState(objective), {}
        if self._state.has_hooks() or has_hooks(params):
            return eager_gradients(objective, params, inputs, update_actor)
        learned = params if log_ent_coef is None else (*params, log_ent_coef)
        addresses = [(param.data_ptr(), param.requires_grad) for param in learned]
        key = addresses, signature(tensors)
        if key != self._keys.get(update_actor):
            self._keys.pop(update_actor, None)  # in case the capture fails
            self._graphs[update_actor] = self._capture(objective, params, inputs, tensors, update_actor)
            self._keys[update_actor] = key
        gradients, metrics = self._graphs[update_actor](tensors)
        return gradients, metrics.clone()

    def _capture(
        self,
        objective: JointObjective,
        params: Sequence[th.Tensor],
        inputs: UpdateInputs,
        tensors: Sequence[th.Tensor],
        update_actor: bool,
    ) -> CapturedGraph:
        """:return: a graph of the gradients, whose inputs are ``tensors``: those in ``inputs`` except log α"""
        from sb3_softvalue.execution.partition import PartitionBackend

        # The graph has no output for a parameter that the objective does not depend on
        reference, _ = eager_gradients(objective, params, inputs, update_actor)
        used = [param for param, gradient in zip(params, reference, strict=True) if gradient is not None]
        owners = {id(param): name.partition(".")[0] for name, param in objective.named_parameters()}
        # log α belongs to no network; its gradient is computed with the actor's
        backend = PartitionBackend([*(owners.get(id(param), "actor") for param in used), None], self.compiled)
        log_ent_coef = inputs.temperature.log_ent_coef

        def compute(*own: th.Tensor) -> Gradients:
            left = iter(own)
            placed = map_tensors(lambda tensor: tensor if tensor is log_ent_coef else next(left), inputs)
            gradients, metrics = gradients_of(objective, used, placed, update_actor)
            found = iter(gradients)
            return [None if gradient is None else next(found) for gradient in reference], metrics

        with tracing():
            gradients_of = compile_gradients(backend)
            return CapturedGraph(compute, tensors)


class CapturedActions:
    """
    ``SACVPolicy.act`` as CUDA graphs, one per observation shape. The results are bitwise identical.

    It falls back to the method itself if a graph might compute something else (an unknown layer, a hook, autograd, autocast),
    cannot be captured, or does not pay off (rare shapes). A copy of the policy starts without graphs.

    :param policy: policy that acts
    """

    def __init__(self, policy: SACVPolicy):
        self.policy = policy
        self._actor: nn.Module | None = None
        self._state = ModuleState(nn.Module())
        self._calls: Counter[tuple[Any, ...]] = Counter()
        self._graphs: dict[tuple[Any, ...], CapturedGraph] = {}
        self._failed: set[tuple[Any, ...]] = set()
        # All predicting threads share the inputs and outputs of the graphs
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.policy,)

    def __call__(self, observation: PyTorchObs, deterministic: bool) -> tuple[th.Tensor, th.Tensor]:
        """See ``SACVPolicy.act``."""
        with self._lock:
            return self._act(observation, deterministic)

    def _act(self, observation: PyTorchObs, deterministic: bool) -> tuple[th.Tensor, th.Tensor]:
        """See ``SACVPolicy.act``."""
        inputs: list[th.Tensor] = []
        map_tensors(inputs.append, observation)
        names = tuple(observation) if isinstance(observation, dict) else ()
        key = (deterministic, names, *signature(inputs))
        if not self._is_possible(inputs[0].device) or not (key in self._graphs or self._is_frequent(key)):
            return self.policy.act(observation, deterministic)
        noise = None
        if not deterministic:
            shape = len(inputs[0]), self.policy.actor.action_dist.action_dim
            dtype = next(self.policy.actor.parameters()).dtype
            noise = th.randn(shape, device=inputs[0].device, dtype=dtype)
            inputs.append(noise)
        if key not in self._graphs:

            def compute(*own: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
                left = iter(own)
                return self.policy.act(map_tensors(lambda _: next(left), observation), deterministic, next(left, None))

            try:
                self._graphs[key] = CapturedGraph(compute, inputs)
            except RuntimeError:
                # For instance, a layer synchronizes with the device
                self._failed.add(key)
                return self.policy.act(observation, deterministic, noise)
        actions, is_nan = self._graphs[key](inputs)
        return actions.clone(), is_nan.clone()

    def _is_possible(self, device: th.device) -> bool:
        """
        Drop all graphs if the actor's parameters or layers have changed.

        :param device: device of the observations
        :return: whether a graph would compute the same as the method
        """
        if not is_capturable(device) or th.is_grad_enabled() or th.is_inference_mode_enabled():
            return False
        if th.is_autocast_enabled(device.type) or th.jit.is_tracing():
            return False
        actor = self.policy.actor
        if actor is not self._actor or not self._state.is_current():
            self._actor, self._state = actor, ModuleState(actor)
            self._calls.clear()
            self._graphs.clear()
            self._failed.clear()
        return self._state.is_plain and not self._state.has_hooks()

    def _is_frequent(self, key: tuple[Any, ...]) -> bool:
        """:return: whether these shapes were seen often enough to capture a graph"""
        self._calls[key] += 1
        return self._calls[key] > _CALLS_BEFORE_CAPTURE and len(self._graphs) < _MAX_GRAPHS and key not in self._failed
