"""
The optimizer step: one call of the fused Adam kernel for all networks, if their optimizers are fused Adam or AdamW.

This file uses private interfaces of PyTorch: the kernels ``torch._fused_adam_`` and ``torch._fused_adamw_``, which PyTorch's
fused optimizers call. Without them each optimizer steps separately, and an update takes 4 % longer. Private attributes show
whether optimizers and parameters have hooks.
"""

import operator
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from functools import partial
from itertools import chain
from typing import Any
from weakref import WeakKeyDictionary

import torch as th
from torch import nn
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from sb3_softvalue.execution.captured import CapturedGraph, is_capturable

# Adam's state of a parameter: averages of the gradient and of its square, and the number of steps
_STATE = ("exp_avg", "exp_avg_sq", "step")
# True for decoupled weight decay (AdamW)
_KERNELS: dict[bool, Any] = {False: getattr(th, "_fused_adam_", None), True: getattr(th, "_fused_adamw_", None)}
# Identical steps before one is captured: a capture costs as much as about ten steps
_STEPS_BEFORE_CAPTURE = 100


def learned_params(optimizer: th.optim.Optimizer) -> list[th.Tensor]:
    """
    :param optimizer: any optimizer
    :return: its parameters in order, without those that the user has frozen
    """
    return [param for group in optimizer.param_groups for param in group["params"] if param.requires_grad]


class AdamState:
    """
    The state of an Adam optimizer in the order of its parameters, cached because looking it up at each step is slower than
    comparing. The step counters become views of one tensor, so that one addition increments them all.

    :param optimizer: optimizer after its first step
    :param params: its parameters
    """

    def __init__(self, optimizer: th.optim.Optimizer, params: list[th.Tensor]):
        states = [optimizer.state[param] for param in params]
        self.counter = th.stack([state["step"] for state in states])
        for state, step in zip(states, self.counter.unbind(), strict=True):
            state["step"] = step
        self.params = params
        self.averages, self.squares, self.steps = ([state[name] for state in states] for name in _STATE)
        self._states = states
        self._present = list(optimizer.state.values())
        self._tensors = self._find_tensors()

    def is_current(self, optimizer: th.optim.Optimizer, params: list[th.Tensor]) -> bool:
        """:return: whether this is still the state of these parameters"""
        return (
            _are_identical(params, self.params)
            and _are_identical(optimizer.state.values(), self._present)
            and _are_identical(self._find_tensors(), self._tensors)
        )

    def _find_tensors(self) -> list[Any]:
        """:return: everything in the state"""
        return list(chain.from_iterable(map(dict.values, self._states)))


class OptimizerStep:
    """
    Steps several optimizers with given gradients.

    Fused Adam (SACV's default) and AdamW with the same options share one kernel call on the optimizers' own state: the same
    numbers without the overhead of four ``optimizer.step()``. Any other optimizer uses its own ``step()``. On a GPU the call
    is captured as a CUDA graph after many identical calls.
    """

    def __init__(self) -> None:
        self._known: WeakKeyDictionary[th.optim.Optimizer, AdamState] = WeakKeyDictionary()
        # By the states that share a call
        self._joint: dict[tuple[AdamState, ...], JointStep] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        # Graphs cannot be copied: a copy starts without
        return type(self), ()

    def __call__(
        self,
        optimizers: Sequence[th.optim.Optimizer],
        params: Sequence[list[th.Tensor]],
        gradients: Sequence[th.Tensor | None],
        max_grad_norm: float | None = None,
        found_inf: th.Tensor | None = None,
    ) -> None:
        """
        :param optimizers: optimizers without common parameters
        :param params: ``learned_params`` of each optimizer
        :param gradients: one gradient per parameter, in order; None skips the parameter
        :param max_grad_norm: maximum gradient norm of each optimizer; None does not clip
        :param found_inf: flag on the device, shape (): 1 skips the step; None always steps
        """
        together: dict[Any, list[AdamState]] = {}
        remaining = iter(gradients)
        for optimizer, own in zip(optimizers, params, strict=True):
            is_complete = _set_gradients(own, remaining)
            if max_grad_norm is not None:
                nn.utils.clip_grad_norm_(own, max_grad_norm)
            options = fused_adam_options(optimizer) if is_complete else None
            state = None if options is None else self._state(optimizer, own)
            if state is not None:
                together.setdefault((options, own[0].dtype), []).append(state)
            elif found_inf is None or not found_inf.item():
                # step() has no such flag: reading it synchronizes with the device
                _clear_frozen(optimizer)
                optimizer.step()
        for (options, _), states in together.items():
            key = tuple(states)
            if key not in self._joint:
                self._joint[key] = JointStep(states)
            self._joint[key](options, found_inf)

    def _state(self, optimizer: th.optim.Optimizer, own: list[th.Tensor]) -> AdamState | None:
        """
        :param optimizer: optimizer that ``fused_adam_options`` accepts
        :param own: its parameters
        :return: their state; None before the first step, which creates it, and for mixed dtypes
        """
        state = self._known.get(optimizer)
        if state is None or not state.is_current(optimizer, own):
            if not own or not all(optimizer.state.get(param) for param in own) or len({param.dtype for param in own}) > 1:
                return None
            self._known.pop(optimizer, None)
            known = set(self._known.values())
            self._joint = {states: step for states, step in self._joint.items() if known.issuperset(states)}
            state = self._known[optimizer] = AdamState(optimizer, own)
        return state


class JointStep:
    """
    One call of the fused kernel for several optimizers. On a GPU it becomes a CUDA graph after many calls with the same
    addresses and options; with a learning rate that changes at each step it never does. The results are bitwise identical.

    :param states: states of optimizers with the same options
    """

    def __init__(self, states: Sequence[AdamState]):
        self.params, self.averages, self.squares, self.steps = (
            [tensor for state in states for tensor in getattr(state, name)]
            for name in ("params", "averages", "squares", "steps")
        )
        self.counters = [state.counter for state in states]
        self._key: Any = None
        self._n_equal = 0
        self._graph: CapturedGraph | None = None

    def __call__(self, options: tuple[Any, ...], found_inf: th.Tensor | None) -> None:
        """
        :param options: see ``fused_adam_options``
        :param found_inf: see ``OptimizerStep``
        """
        gradients = [param.grad for param in self.params]
        if found_inf is None or not is_capturable(found_inf.device):
            self._step(options, gradients, found_inf)
            return
        tensors = (*self.params, *gradients, *self.averages, *self.squares, *self.steps)
        key = options, [tensor.data_ptr() for tensor in tensors]
        if key != self._key:
            self._key, self._n_equal, self._graph = key, 0, None
        self._n_equal += 1
        if self._n_equal == _STEPS_BEFORE_CAPTURE:
            # 1: the warm-up calls of a capture must not step. If it fails, steps continue without a graph.
            with suppress(RuntimeError):
                self._graph = CapturedGraph(partial(self._step, options, gradients), [th.ones_like(found_inf)])
        if self._graph is None:
            self._step(options, gradients, found_inf)
        else:
            self._graph([found_inf])

    @th.no_grad()
    def _step(self, options: tuple[Any, ...], gradients: list[th.Tensor | None], found_inf: th.Tensor | None) -> None:
        """
        :param options: see ``fused_adam_options``
        :param gradients: of all parameters
        :param found_inf: see ``OptimizerStep``
        """
        is_decoupled, lr, (beta1, beta2), weight_decay, eps = options
        for counter in self.counters:
            counter.add_(1 if found_inf is None else 1 - found_inf)
        _KERNELS[is_decoupled](
            self.params,
            gradients,
            self.averages,
            self.squares,
            [],
            self.steps,
            lr=lr,
            beta1=beta1,
            beta2=beta2,
            weight_decay=weight_decay,
            eps=eps,
            amsgrad=False,
            maximize=False,
            found_inf=found_inf,
        )


def _set_gradients(params: list[th.Tensor], gradients: Iterator[th.Tensor | None]) -> bool:
    """
    Set ``grad`` of each parameter, and call its hooks.

    :param params: parameters of an optimizer
    :param gradients: iterator that yields their gradients next
    :return: whether no gradient is None
    """
    is_complete = True
    for param in params:
        gradient = next(gradients)
        if gradient is None:
            is_complete = False
        elif not (gradient.is_contiguous() and param.is_contiguous()) and gradient.stride() != param.stride():
            # The gradient of a convolution may have another memory format, which the fused kernel would misread
            gradient = th.empty_like(param).copy_(gradient)
        param.grad = gradient
        if param._post_accumulate_grad_hooks and gradient is not None:
            for hook in param._post_accumulate_grad_hooks.values():
                hook(param)
            is_complete = is_complete and param.grad is not None
    return is_complete


def _are_identical(some: Collection[Any], others: Collection[Any]) -> bool:
    """:return: whether both contain the same objects in the same order"""
    return len(some) == len(others) and all(map(operator.is_, some, others))


def _clear_frozen(optimizer: th.optim.Optimizer) -> None:
    """Clear old gradients of frozen parameters, which the optimizer would still apply."""
    for group in optimizer.param_groups:
        for param in group["params"]:
            if not param.requires_grad:
                param.grad = None


def _own_step(kind: Any) -> Any:
    """:return: ``step`` of an optimizer's class; PyTorch wraps it once, when the first optimizer of the class is created"""
    return kind.step.__wrapped__ if getattr(kind.step, "hooked", False) else kind.step


# Those of PyTorch, to detect where a user has replaced one
_STEPS: dict[Any, Any] = {kind: _own_step(kind) for kind in (th.optim.Adam, th.optim.AdamW)}


def fused_adam_options(optimizer: th.optim.Optimizer) -> tuple[Any, ...] | None:
    """
    :param optimizer: any optimizer
    :return: the options that optimizers must share for one call: whether weight decay is decoupled (AdamW), learning rate,
        betas, weight decay and epsilon; None if ``step()`` may do more than call the fused kernel
    """
    if type(optimizer) not in _STEPS or len(optimizer.param_groups) != 1:
        return None
    if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
        return None
    if _global_optimizer_pre_hooks or _global_optimizer_post_hooks:
        return None
    # Replaced on the instance, as PyTorch's learning rate schedulers do, or on the class
    if "step" in vars(optimizer) or _own_step(type(optimizer)) is not _STEPS[type(optimizer)]:
        return None
    group = optimizer.param_groups[0]
    variants = group.get("amsgrad"), group.get("maximize"), group.get("capturable"), group.get("differentiable")
    if not group.get("fused") or any(variants):
        return None
    is_decoupled = type(optimizer) is th.optim.AdamW or bool(group.get("decoupled_weight_decay"))
    lr, (beta1, beta2) = group["lr"], group["betas"]
    if _KERNELS[is_decoupled] is None or any(isinstance(value, th.Tensor) for value in (lr, beta1, beta2)):
        return None
    return is_decoupled, lr, (beta1, beta2), group["weight_decay"], group["eps"]
