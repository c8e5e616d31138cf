"""CUDA graphs: what is captured once is replayed by one launch instead of hundreds."""

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

# Calls with observations of the same shapes before their actions get a graph, and graphs that are kept
_CALLS_BEFORE_CAPTURE = 10
_MAX_GRAPHS = 8


def is_capturable(device: th.device) -> bool:
    """:return: whether CUDA graphs can be had there"""
    return device.type == "cuda"


class CapturedGraph:
    """
    A function of tensors, captured as a CUDA graph on inputs of its own.

    :param function: of the tensors; called a few times before the capture. What else it reads stays where it is, and it writes
        nothing that these calls must not write.
    :param inputs: tensors like those of later calls
    """

    def __init__(self, function: Callable[..., Any], inputs: Sequence[th.Tensor]):
        self._inputs = [tensor.clone() for tensor in inputs]
        by_type: dict[th.dtype, list[int]] = {}
        for place, tensor in enumerate(self._inputs):
            by_type.setdefault(tensor.dtype, []).append(place)
        # Those of one type are copied by one launch
        self._places = list(by_type.values())
        with th.cuda.device(self._inputs[0].device):
            # Libraries set themselves up on first use, which a capture does not allow: warm up on another stream first, see
            # https://docs.pytorch.org/docs/stable/notes/cuda.html#whole-network-capture
            stream = th.cuda.Stream()
            stream.wait_stream(th.cuda.current_stream())
            with th.cuda.stream(stream):
                for _ in range(3):
                    function(*self._inputs)
            th.cuda.current_stream().wait_stream(stream)
            self._graph = th.cuda.CUDAGraph()
            # On yet another stream, so that the workspaces of libraries are the graph's own: one that fails would stay there.
            # What other threads do meanwhile is theirs.
            with th.cuda.stream(th.cuda.current_stream()):
                with th.cuda.graph(self._graph, stream=th.cuda.Stream(), capture_error_mode="thread_local"):
                    self.results = function(*self._inputs)

    def __call__(self, inputs: Sequence[th.Tensor]) -> Any:
        """
        :param inputs: of the shapes that were captured
        :return: results of the function, which the next call overwrites
        """
        for places in self._places:
            th._foreach_copy_([self._inputs[place] for place in places], [inputs[place] for place in places])
        self._graph.replay()
        return self.results


class CapturedGradients:
    """
    ``objective.eager_gradients`` as a CUDA graph whose independent parts run side by side.

    What is captured writes nothing but gradients and metrics: warm-up and capture leave parameters, optimizers and random
    generators as they are. Noise is drawn outside. The graph is captured again when shapes, addresses or modules differ.

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
        """See ``objective.eager_gradients``; the gradients are overwritten by the next call."""
        tensors: list[th.Tensor] = []
        log_ent_coef = inputs.temperature.log_ent_coef
        # A parameter, which stays where it is
        map_tensors(tensors.append, inputs._replace(temperature=inputs.temperature._replace(log_ent_coef=None)))
        if objective is not self._objective or not self._state.is_current():
            self._objective, self._state, self._keys = objective, ModuleState(objective), {}
        if self._state.has_hooks() or has_hooks(params):
            return eager_gradients(objective, params, inputs, update_actor)
        learned = params if log_ent_coef is None else (*params, log_ent_coef)
        addresses = [(param.data_ptr(), param.requires_grad) for param in learned]
        key = addresses, signature(tensors)
        if key != self._keys.get(update_actor):
            self._keys.pop(update_actor, None)  # until there is a graph
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
        """:return: the gradients as a graph of ``tensors``, the leaves of ``inputs`` without log α"""
        from sb3_softvalue.execution.partition import PartitionBackend

        # A parameter on which the objective does not depend has no output in the graph
        reference, _ = eager_gradients(objective, params, inputs, update_actor)
        used = [param for param, gradient in zip(params, reference, strict=True) if gradient is not None]
        owners = {id(param): name.partition(".")[0] for name, param in objective.named_parameters()}
        # The temperature's gradient comes out of the actor's
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
    ``SACVPolicy.act`` as CUDA graphs, one for each shape of the observations. The numbers are the same to the bit.

    Where a graph might not compute the same (a layer that is not a plain one, a hook, autograd, autocast), cannot be captured
    or does not pay (rare shapes), the method itself is called. A copy of the policy begins without graphs.

    :param policy: whose actions
    """

    def __init__(self, policy: SACVPolicy):
        self.policy = policy
        self._actor: nn.Module | None = None
        self._state = ModuleState(nn.Module())
        self._calls: Counter[tuple[Any, ...]] = Counter()
        self._graphs: dict[tuple[Any, ...], CapturedGraph] = {}
        self._failed: set[tuple[Any, ...]] = set()
        # All threads that predict share what the graphs read and write
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
                # Something that waits for the device, say
                self._failed.add(key)
                return self.policy.act(observation, deterministic, noise)
        actions, is_nan = self._graphs[key](inputs)
        return actions.clone(), is_nan.clone()

    def _is_possible(self, device: th.device) -> bool:
        """
        :param device: of the observations
        :return: whether a graph computes the same; those of other parameters or layers are forgotten
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
        """:return: whether such observations have come often enough for a graph of their own"""
        self._calls[key] += 1
        return self._calls[key] > _CALLS_BEFORE_CAPTURE and len(self._graphs) < _MAX_GRAPHS and key not in self._failed
