"""Stepping the update's optimizers: fused Adam over all networks in one call where that is what the optimizers do anyway."""

from collections.abc import Callable, Sequence
from typing import Any

import torch as th
from torch import nn
from torch.optim.adam import adam

from sb3_softvalue.execution.captured import CapturedGraph, is_capturable

_ADAMS = (th.optim.Adam, th.optim.AdamW)
# Options of a parameter group with which fused Adam is not all that a step does
_VARIANTS = ("amsgrad", "maximize", "capturable", "differentiable")
# Steps with everything where it was before one is captured: a capture costs as much as some ten steps
_CALLS_BEFORE_CAPTURE = 100
# An optimizer, its parameters and their states
Member = tuple[th.optim.Optimizer, list[th.Tensor], list[Any]]


def learned_params(optimizer: th.optim.Optimizer) -> list[th.Tensor]:
    """
    :param optimizer: any optimizer
    :return: its parameters that are learned (not frozen by the user), in order
    """
    return [param for group in optimizer.param_groups for param in group["params"] if param.requires_grad]


class OptimizerStep:
    """
    Steps several optimizers from the gradients of their parameters.

    Fused Adam and AdamW, which SACV's networks have by default, share one call of PyTorch's functional ``adam`` where they
    share their options, on the optimizers' own state: the same kernel on the same numbers, without four times the overhead of
    ``optimizer.step()`` (3 % of a compiled update). Every other optimizer is stepped by its own ``step()``. On a GPU the call
    is captured as a CUDA graph once it has repeated on the same tensors for a while.
    """

    def __init__(self) -> None:
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
        together: dict[Any, list[Member]] = {}
        left = iter(gradients)
        for optimizer, own in zip(optimizers, params, strict=True):
            is_complete = True
            for param in own:
                gradient = next(left)
                if gradient is None:
                    is_complete = False
                elif gradient.stride() != param.stride():
                    # A convolution's may come in another memory format, which the fused kernel would misread
                    gradient = th.empty_like(param).copy_(gradient)
                param.grad = gradient
            if max_grad_norm is not None:
                nn.utils.clip_grad_norm_(own, max_grad_norm)
            states = [optimizer.state.get(param) for param in own]
            # The first step makes the state
            key = fused_adam_key(optimizer) if is_complete and all(states) else None
            if key is not None:
                together.setdefault(key, []).append((optimizer, own, states))
            elif found_inf is None or not found_inf.item():
                # Its own step knows no such flag, so that the device has to be waited for
                _forget_frozen(optimizer)
                optimizer.step()
        for (decoupled, *settings), members in together.items():
            self._step_together(decoupled, settings, members, found_inf)

    def _step_together(
        self,
        decoupled: bool,
        settings: list[Any],
        members: list[Member],
        found_inf: th.Tensor | None,
    ) -> None:
        """
        :param decoupled: whether the weight decay is AdamW's
        :param settings: learning rate, betas, weight decay and epsilon
        :param members: optimizers that share these, with their parameters and states
        :param found_inf: see ``__call__``
        """
        params = [param for _, own, _ in members for param in own]
        states = [state for _, _, own in members for state in own]
        gradients = [param.grad for param in params if param.grad is not None]
        averages, squares, steps = ([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq", "step"))
        lr, (beta1, beta2), weight_decay, eps = settings

        def step(found_inf: th.Tensor | None) -> None:
            with th.no_grad():
                adam(
                    params,
                    gradients,
                    averages,
                    squares,
                    [],
                    steps,
                    fused=True,
                    # It is subtracted from the steps, which have no dimensions
                    found_inf=None if found_inf is None else found_inf.squeeze(),
                    decoupled_weight_decay=decoupled,
                    amsgrad=False,
                    beta1=beta1,
                    beta2=beta2,
                    lr=lr,
                    weight_decay=weight_decay,
                    eps=eps,
                    maximize=False,
                )

        if found_inf is None or not is_capturable(found_inf.device):
            step(found_inf)
            return
        repeated = self._repeated.setdefault(tuple(id(optimizer) for optimizer, _, _ in members), RepeatedStep())
        tensors = (*params, *gradients, *averages, *squares, *steps)
        repeated(step, found_inf, (decoupled, settings, [tensor.data_ptr() for tensor in tensors]))


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


def fused_adam_key(optimizer: th.optim.Optimizer) -> Any:
    """
    :param optimizer: any optimizer
    :return: the options on which optimizers must agree to be stepped by one call; None where a step of this one may be more
        than the fused Adam kernel
    """
    if type(optimizer) not in _ADAMS or len(optimizer.param_groups) != 1:
        return None
    group = optimizer.param_groups[0]
    if not group.get("fused") or any(group.get(name) for name in _VARIANTS):
        return None
    # Registered by public methods, to be asked for only here
    if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
        return None
    if any(isinstance(value, th.Tensor) for value in (group["lr"], *group["betas"])):
        return None
    decoupled = isinstance(optimizer, th.optim.AdamW) or bool(group.get("decoupled_weight_decay"))
    return decoupled, group["lr"], tuple(group["betas"]), group["weight_decay"], group["eps"]
