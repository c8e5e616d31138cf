"""Predicted actions on a GPU, where a step of the environment waits for a dozen small kernels: by one launch."""

import threading
from collections import Counter
from typing import Any, NamedTuple

import torch as th
from stable_baselines3.common.type_aliases import PyTorchObs
from torch import nn

from sb3_softvalue.execution.arguments import signature
from sb3_softvalue.execution.cuda_graph import capture
from sb3_softvalue.execution.watched import Watched
from sb3_softvalue.networks import is_known_module
from sb3_softvalue.policies import SACVPolicy

# Calls with observations of the same shapes before they get a graph, and graphs that are kept
_CALLS_BEFORE = 10
_MAX_GRAPHS = 8
_DEVICE = "cuda"


class Captured(NamedTuple):
    """A graph of the action function."""

    graph: Any
    inputs: list[th.Tensor]
    """That it reads"""
    results: tuple[th.Tensor, th.Tensor]
    """That it writes"""


class CapturedActions:
    """
    ``SACVPolicy.act`` as CUDA graphs, one for each shape of the observations. The numbers are the same to the bit.

    Where a graph might not be what it computes (a layer that is not a plain one, a hook, autograd, autocast), cannot be had or
    does not pay (rare shapes), the method itself is called. A copy of the policy begins without graphs.

    :param policy: whose actions
    """

    def __init__(self, policy: SACVPolicy):
        self.policy = policy
        self._watched = Watched(nn.ModuleList([]), ())
        self._modules: list[nn.Module] = []
        self._addresses: tuple[int, ...] = ()
        self._calls: Counter[tuple[Any, ...]] = Counter()
        self._graphs: dict[tuple[Any, ...], Captured] = {}
        self._refused: set[tuple[Any, ...]] = set()
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
        inputs = [*observation.values()] if isinstance(observation, dict) else [observation]
        names = tuple(observation) if isinstance(observation, dict) else ()
        key = (deterministic, names, *signature(inputs))
        if not self._is_possible(inputs[0].device) or not (key in self._graphs or self._is_frequent(key)):
            return self.policy.act(observation, deterministic)
        noise = None
        if not deterministic:
            shape = len(inputs[0]), self.policy.actor.action_dist.action_dim
            noise = th.randn(shape, device=inputs[0].device, dtype=self._watched.constants[0].dtype)
            inputs.append(noise)
        if key not in self._graphs:
            try:
                self._graphs[key] = self._capture(observation, deterministic, inputs)
            except RuntimeError:
                # Something that waits for the device, say
                self._refused.add(key)
                return self.policy.act(observation, deterministic, noise)
        captured = self._graphs[key]
        for own, tensor in zip(captured.inputs, inputs, strict=True):
            own.copy_(tensor)
        captured.graph.replay()
        actions, is_nan = captured.results
        return actions.clone(), is_nan.clone()

    def _is_possible(self, device: th.device) -> bool:
        """
        :param device: of the observations
        :return: whether a graph computes the same; those of other parameters or layers are forgotten
        """
        if device.type != _DEVICE or th.is_grad_enabled() or th.is_inference_mode_enabled():
            return False
        if th.is_autocast_enabled(device.type) or th.jit.is_tracing():
            return False
        actor = self.policy.actor
        if not self._modules or self._modules[0] is not actor or not self._watched.are_current(()):
            self._watched = Watched(nn.ModuleList([actor]), ())
            self._modules = list(actor.modules())
            self._addresses = ()
        addresses = tuple(tensor.data_ptr() for tensor in self._watched.constants)
        if addresses != self._addresses:
            self._addresses = addresses
            self._calls.clear()
            self._graphs.clear()
            self._refused.clear()
        return all(
            is_known_module(module) and not (module._buffers or module._forward_hooks or module._forward_pre_hooks)
            for module in self._modules
        )

    def _is_frequent(self, key: tuple[Any, ...]) -> bool:
        """:return: whether such observations have come often enough for a graph of their own"""
        self._calls[key] += 1
        return self._calls[key] > _CALLS_BEFORE and len(self._graphs) < _MAX_GRAPHS and key not in self._refused

    def _capture(self, observation: PyTorchObs, deterministic: bool, inputs: list[th.Tensor]) -> Captured:
        """
        :param inputs: leaves of the observation, and the noise if there is any
        """
        own = [tensor.clone() for tensor in inputs]
        noise = None if deterministic else own[-1]
        own_observation = dict(zip(observation, own, strict=False)) if isinstance(observation, dict) else own[0]
        # What other threads do meanwhile is theirs
        graph, results = capture(
            lambda: self.policy.act(own_observation, deterministic, noise), inputs[0].device, error_mode="thread_local"
        )
        return Captured(graph, own, results)
