"""
Stepping the update's optimizers: fused Adam over all networks in one call where that is what the optimizers do anyway.

PyTorch's private interface in this file: the kernels ``torch._fused_adam_`` and ``torch._fused_adamw_``, which PyTorch's own
fused optimizers call. Without them every optimizer makes a step of its own, and an update takes 4 % longer. Hooks of
optimizers and parameters are registered by public methods, and found by private attributes.
"""

import operator
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch as th
from torch import nn

from sb3_softvalue.execution.captured import CapturedGraph, is_capturable

# By whether the weight decay is AdamW's
_KERNELS: dict[bool, Any] = {False: getattr(th, "_fused_adam_", None), True: getattr(th, "_fused_adamw_", None)}
# Steps with everything where it was before one is captured: a capture costs as much as some ten steps
_CALLS_BEFORE_CAPTURE = 100


def learned_params(optimizer: th.optim.Optimizer) -> list[th.Tensor]:
    """
    :param optimizer: any optimizer
    :return: its parameters that are learned (not frozen by the user), in order
    """
    return [param for group in optimizer.param_groups for param in group["params"] if param.requires_grad]


class AdamState:
    """
    The state of an Adam optimizer, in the order of its parameters: to look it up for each parameter at each step takes longer
    than to see that nothing is new. The counters of steps become views of one tensor, so that one addition counts for all.

    :param optimizer: after its first step
    :param params: its parameters
    """

    def __init__(self, optimizer: th.optim.Optimizer, params: list[th.Tensor]):
        self.params = params
        self.states = [optimizer.state[param] for param in params]
        self.counter = th.stack([state["step"] for state in self.states])
        self._present = list(optimizer.state.values())
        self._steps = self.counter.unbind()
        for state, step in zip(self.states, self._steps, strict=True):
            state["step"] = step

    def is_current(self, optimizer: th.optim.Optimizer, params: list[th.Tensor]) -> bool:
        """:return: whether this still is the state of these parameters"""
        return (
            _are_same(params, self.params)
            and _are_same(optimizer.state.values(), self._present)
            and _are_same([state["step"] for state in self.states], self._steps)
        )


class OptimizerStep:
    """
    Steps several optimizers from the gradients of their parameters.

    Fused Adam and AdamW, which SACV's networks have by default, share one call of their kernel where they share their options,
    on the optimizers' own state: the same numbers without the overhead of four times ``optimizer.step()``. Every other
    optimizer is stepped by its own ``step()``. On a GPU the call is captured as a CUDA graph once it has repeated on the same
    tensors for a while.
    """

    def __init__(self) -> None:
        # By optimizer
        self._known: dict[int, AdamState] = {}
        # By the optimizers that are stepped together
        self._repeated: dict[tuple[int, ...], RepeatedStep] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy begins without graphs, which cannot be copied
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
        :param optimizers: their parameters do not overlap
        :param params: of each optimizer its ``learned_params``
        :param gradients: one for each of these, in order; None leaves the parameter out, as SB3 does
        :param max_grad_norm: clip the gradient norm of each optimizer by itself; None does not clip
        :param found_inf: shape (), 1 on the device where the step must not be made; None makes it
        """
        together: dict[Any, dict[int, AdamState]] = {}
        remaining = iter(gradients)
        for optimizer, own in zip(optimizers, params, strict=True):
            is_complete = _set_gradients(own, remaining)
            if max_grad_norm is not None:
                nn.utils.clip_grad_norm_(own, max_grad_norm)
            options = fused_adam_options(optimizer) if is_complete else None
            state = None if options is None else self._state(optimizer, own)
            if state is not None:
                together.setdefault((options, own[0].dtype), {})[id(optimizer)] = state
            elif found_inf is None or not found_inf.item():
                # Its own step knows no such flag, so that the device has to be waited for
                _forget_frozen(optimizer)
                optimizer.step()
        for (options, _), members in together.items():
            self._step_together(options, members, found_inf)

    def _state(self, optimizer: th.optim.Optimizer, own: list[th.Tensor]) -> AdamState | None:
        """
        :param optimizer: with the options for one call
        :param own: its parameters
        :return: their state; None before the first step, which makes it, and for numbers of several types
        """
        state = self._known.get(id(optimizer))
        if state is None or not state.is_current(optimizer, own):
            if not own or not all(optimizer.state.get(param) for param in own):
                return None
            state = self._known[id(optimizer)] = AdamState(optimizer, own)
        return state if len({param.dtype for param in own}) == 1 else None

    def _step_together(self, options: tuple[Any, ...], members: dict[int, AdamState], found_inf: th.Tensor | None) -> None:
        """
        :param options: see ``fused_adam_options``
        :param members: by optimizer, of those that share the options
        :param found_inf: see ``__call__``
        """
        params = [param for member in members.values() for param in member.params]
        states = [state for member in members.values() for state in member.states]
        gradients = [param.grad for param in params]
        averages, squares, steps = ([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq", "step"))
        counters = [member.counter for member in members.values()]
        is_decoupled, lr, (beta1, beta2), weight_decay, eps = options

        def step(found_inf: th.Tensor | None) -> None:
            with th.no_grad():
                for counter in counters:
                    counter.add_(1 if found_inf is None else 1 - found_inf)
                _KERNELS[is_decoupled](
                    params,
                    gradients,
                    averages,
                    squares,
                    [],
                    steps,
                    lr=lr,
                    beta1=beta1,
                    beta2=beta2,
                    weight_decay=weight_decay,
                    eps=eps,
                    amsgrad=False,
                    maximize=False,
                    found_inf=found_inf,
                )

        if found_inf is None or not is_capturable(found_inf.device):
            step(found_inf)
            return
        repeated = self._repeated.setdefault(tuple(members), RepeatedStep())
        tensors = (*params, *gradients, *averages, *squares, *steps)
        repeated(step, found_inf, (options, [tensor.data_ptr() for tensor in tensors]))


def _set_gradients(params: list[th.Tensor], gradients: Iterator[th.Tensor | None]) -> bool:
    """
    :param params: get their gradients
    :param gradients: one for each, taken from the iterator
    :return: whether there is one for each
    """
    is_complete = True
    for param in params:
        gradient = next(gradients)
        if gradient is None:
            is_complete = False
        elif not (gradient.is_contiguous() and param.is_contiguous()) and gradient.stride() != param.stride():
            # A convolution's may come in another memory format, which the fused kernel would misread
            gradient = th.empty_like(param).copy_(gradient)
        param.grad = gradient
        if param._post_accumulate_grad_hooks and gradient is not None:
            for hook in param._post_accumulate_grad_hooks.values():
                hook(param)
    return is_complete


def _are_same(some: Collection[Any], others: Collection[Any]) -> bool:
    """:return: whether both hold the same objects"""
    return len(some) == len(others) and all(map(operator.is_, some, others))


def _forget_frozen(optimizer: th.optim.Optimizer) -> None:
    """Remove gradients from before a parameter was frozen, by which the optimizer would step it."""
    for group in optimizer.param_groups:
        for param in group["params"]:
            if not param.requires_grad:
                param.grad = None


class RepeatedStep:
    """
    A step as a CUDA graph once it has read and written the same places by the same numbers for a while, which a learning rate
    that changes at each step never does. The results are the same to the bit.
    """

    def __init__(self) -> None:
        self._key: Any = None
        self._n_equal = 0
        self._graph: CapturedGraph | None = None

    def __call__(self, step: Callable[[th.Tensor], None], found_inf: th.Tensor, key: Any) -> None:
        """
        :param step: makes the step, unless it gets a 1
        :param found_inf: see ``OptimizerStep``
        :param key: all numbers and addresses that the step depends on
        """
        if key != self._key:
            self._key, self._n_equal, self._graph = key, 0, None
        self._n_equal += 1
        if self._n_equal == _CALLS_BEFORE_CAPTURE:
            try:
                # The calls before a capture must change nothing
                self._graph = CapturedGraph(step, [th.ones_like(found_inf)])
            except RuntimeError:  # slower without a graph, and as good
                self._graph = None
        if self._graph is None:
            step(found_inf)
        else:
            self._graph([found_inf])


def fused_adam_options(optimizer: th.optim.Optimizer) -> tuple[Any, ...] | None:
    """
    :param optimizer: any optimizer
    :return: whether its weight decay is AdamW's, learning rate, betas, weight decay and epsilon, on which optimizers must
        agree to be stepped by one call; None where a step of this one may be more than the fused Adam kernel
    """
    if type(optimizer) not in (th.optim.Adam, th.optim.AdamW) or len(optimizer.param_groups) != 1:
        return None
    if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
        return None
    if "step" in vars(optimizer):  # replaced on the object itself, as PyTorch's schedulers of the learning rate do
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
