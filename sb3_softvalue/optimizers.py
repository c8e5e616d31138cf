"""Stepping the update's optimizers: fused Adam over all networks in one call where that is what the optimizers do anyway."""

import operator
from collections.abc import Sequence
from typing import Any

import torch as th
from torch import nn

# Hyper-parameters on which groups must agree to be stepped by one call, in the order of th._fused_adam_
_HYPERPARAMETERS = ("lr", "betas", "weight_decay", "eps")
_FUSED_STEPS = {th.optim.Adam: th._fused_adam_, th.optim.AdamW: th._fused_adamw_}


def optimizer_params(optimizer: th.optim.Optimizer) -> list[th.Tensor]:
    """
    :param optimizer: any optimizer
    :return: its parameters that are learned (not frozen by the user), in order
    """
    return [param for group in optimizer.param_groups for param in group["params"] if param.requires_grad]


def same_tensors(first: Sequence[th.Tensor], second: Sequence[th.Tensor]) -> bool:
    """
    :return: whether both hold the same objects in the same order
    """
    return len(first) == len(second) and all(map(operator.is_, first, second))


class OptimizerStep:
    """
    Step several optimizers at once from the gradients of their parameters.

    Adam and AdamW with the fused implementation are stepped without the Python loops of ``optimizer.step()``, together
    where they share learning rate and the like. It is the same kernel on the same numbers in the optimizer's own
    state, so nothing but the time changes and ``optimizer.step()`` can take over at any moment. Every other optimizer is
    stepped by its own ``step()``.

    :param optimizers: their parameters do not overlap
    """

    def __init__(self, optimizers: Sequence[th.optim.Optimizer]):
        self.optimizers = list(optimizers)
        self._params = [optimizer_params(optimizer) for optimizer in self.optimizers]
        for optimizer in self.optimizers:
            for param in (param for group in optimizer.param_groups for param in group["params"]):
                # The gradient from before it was frozen would move it still
                param.grad = param.grad if param.requires_grad else None
        self.params = [param for params in self._params for param in params]
        self._adams = [
            _FusedAdamState(optimizer) if _is_plain_fused_adam(optimizer) else None for optimizer in self.optimizers
        ]

    def is_current(self, optimizers: Sequence[th.optim.Optimizer]) -> bool:
        """
        :param optimizers: of the next step
        :return: whether this object still steps them: same optimizers, their state not replaced by a load, no parameter
            frozen or released since
        """
        return len(optimizers) == len(self.optimizers) and all(
            new is old and (adam is None or adam.is_current()) and same_tensors(optimizer_params(new), params)
            for new, old, adam, params in zip(optimizers, self.optimizers, self._adams, self._params, strict=True)
        )

    def __call__(self, gradients: Sequence[th.Tensor | None], max_grad_norm: float | None) -> None:
        """
        :param gradients: one for each parameter of all optimizers, in order; None leaves the parameter out, as SB3 does
        :param max_grad_norm: clip the gradient norm of each optimizer by itself; None does not clip
        """
        remaining = iter(gradients)
        fused: dict[tuple[Any, ...], list[list[th.Tensor]]] = {}
        for optimizer, params, adam in zip(self.optimizers, self._params, self._adams, strict=True):
            complete = True
            for param in params:
                param.grad = _in_layout_of(param, next(remaining))
                complete = complete and param.grad is not None
            if max_grad_norm is not None:
                nn.utils.clip_grad_norm_(params, max_grad_norm)
            if adam is None or not complete or not params:
                optimizer.step()
                continue
            adam.steps.add_(1.0)
            lists = fused.setdefault(adam.key(), [[], [], [], [], []])
            for tensors, more in zip(lists, (params, [p.grad for p in params], *adam.state_lists), strict=True):
                tensors.extend(more)  # type: ignore[arg-type]  # complete: no gradient is None
        for (optimizer_class, *hyperparameters), lists in fused.items():
            _fused_step(optimizer_class, hyperparameters, lists)


class _FusedAdamState:
    """
    Adam's own state as the lists that the fused kernel takes.

    :param optimizer: fused Adam or AdamW with one parameter group; its state is created where it has none yet
    """

    def __init__(self, optimizer: th.optim.Optimizer):
        self.optimizer = optimizer
        params = optimizer_params(optimizer)
        for param in params:
            state = optimizer.state[param]
            if not state:
                state["step"] = th.zeros((), dtype=th.float32, device=param.device)
                state["exp_avg"] = th.zeros_like(param, memory_format=th.preserve_format)
                state["exp_avg_sq"] = th.zeros_like(param, memory_format=th.preserve_format)
        self._state = optimizer.state
        states = [optimizer.state[param] for param in params]
        # The step counters become views of one tensor, so that one addition counts them all
        self.steps = th.stack([state["step"] for state in states]) if states else th.zeros(0)
        for state, step in zip(states, self.steps.unbind(), strict=True):
            state["step"] = step
        self.state_lists = [[state[name] for state in states] for name in ("exp_avg", "exp_avg_sq", "step")]

    def is_current(self) -> bool:
        """:return: whether the optimizer still has this state; ``load_state_dict`` replaces it"""
        return self.optimizer.state is self._state

    def key(self) -> tuple[Any, ...]:
        """:return: what must be equal to share a call of the kernel"""
        group = self.optimizer.param_groups[0]
        return (type(self.optimizer), *(group[name] for name in _HYPERPARAMETERS))


def _in_layout_of(param: th.Tensor, gradient: th.Tensor | None) -> th.Tensor | None:
    """
    :param param: a parameter
    :param gradient: its gradient; a convolution's may come in another memory format, which the fused kernel would misread
    :return: the gradient in the parameter's own memory format, as ``backward()`` would have left it
    """
    if gradient is None or gradient.stride() == param.stride():
        return gradient
    return th.empty_like(param).copy_(gradient)


def _is_plain_fused_adam(optimizer: th.optim.Optimizer) -> bool:
    """
    :param optimizer: any optimizer
    :return: whether its ``step()`` does nothing but call the fused Adam kernel
    """
    if type(optimizer) not in _FUSED_STEPS or len(optimizer.param_groups) != 1:
        return False
    group = optimizer.param_groups[0]
    variants = ("amsgrad", "maximize", "capturable", "differentiable")
    hooks = (optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks)
    has_tensor = any(isinstance(value, th.Tensor) for value in (group["lr"], *group["betas"]))
    return bool(group.get("fused")) and not any(group.get(name) for name in variants) and not any(hooks) and not has_tensor


def _fused_step(optimizer_class: type[th.optim.Optimizer], hyperparameters: list[Any], lists: list[list[th.Tensor]]) -> None:
    """
    :param optimizer_class: Adam or AdamW
    :param hyperparameters: values of ``_HYPERPARAMETERS``
    :param lists: parameters, gradients, first moments, second moments, step counters
    """
    params, gradients, exp_avgs, exp_avg_sqs, steps = lists
    lr, (beta1, beta2), weight_decay, eps = hyperparameters
    with th.no_grad():
        _FUSED_STEPS[optimizer_class](
            params,
            gradients,
            exp_avgs,
            exp_avg_sqs,
            [],
            steps,
            lr=lr,
            beta1=beta1,
            beta2=beta2,
            weight_decay=weight_decay,
            eps=eps,
            amsgrad=False,
            maximize=False,
        )
