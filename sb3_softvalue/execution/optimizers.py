"""Stepping the update's optimizers: fused Adam over all networks in one call where that is what the optimizers do anyway."""

import itertools
from collections.abc import Sequence
from typing import Any

import torch as th
from torch import nn

from sb3_softvalue.execution.arguments import same_objects
from sb3_softvalue.execution.captured_step import CapturedStep

# Hyper-parameters on which groups must agree to be stepped by one call, in the order of th._fused_adam_
_HYPERPARAMETERS = ("lr", "betas", "weight_decay", "eps")
_ADAMS = (th.optim.Adam, th.optim.AdamW)


def optimizer_params(optimizer: th.optim.Optimizer) -> list[th.Tensor]:
    """
    :param optimizer: any optimizer
    :return: its parameters that are learned (not frozen by the user), in order
    """
    return [param for group in optimizer.param_groups for param in group["params"] if param.requires_grad]


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
        self._keys: list[tuple[Any, ...] | None] = []
        self._members: list[list[int]] = []
        self._groups: list[_FusedAdamGroup] = []

    def is_current(self, optimizers: Sequence[th.optim.Optimizer]) -> bool:
        """
        :param optimizers: of the next step
        :return: whether this object still steps them: same optimizers, their state not replaced by a load, no parameter
            frozen or released and no option set since
        """
        return len(optimizers) == len(self.optimizers) and all(
            new is old
            and (not _is_plain_fused_adam(new) if adam is None else _is_plain_fused_adam(new) and adam.is_current())
            and same_objects(optimizer_params(new), params)
            for new, old, adam, params in zip(optimizers, self.optimizers, self._adams, self._params, strict=True)
        )

    def __call__(
        self, gradients: Sequence[th.Tensor | None], max_grad_norm: float | None, closed: th.Tensor | None = None
    ) -> None:
        """
        :param gradients: one for each parameter of all optimizers, in order; None leaves the parameter out, as SB3 does
        :param max_grad_norm: clip the gradient norm of each optimizer by itself; None does not clip
        :param closed: shape (1,), 1 on the device where the step must not be made; None makes it
        """
        complete = self._set_gradients(gradients)
        if max_grad_norm is not None:
            for params in self._params:
                nn.utils.clip_grad_norm_(params, max_grad_norm)
        together = len(complete) == len(self.params)
        for optimizer, adam in zip(self.optimizers, self._adams, strict=True):
            # Its own step knows no such flag, so that the device has to be waited for
            if (adam is None or not together) and (closed is None or not closed.item()):
                optimizer.step()
        if together:
            for group in self._fused_groups():
                group.step(complete, closed)

    def _set_gradients(self, gradients: Sequence[th.Tensor | None]) -> list[th.Tensor]:
        """
        :param gradients: one for each parameter, which becomes its ``grad``
        :return: those that are there, in the memory format of their parameters
        """
        complete: list[th.Tensor] = []
        for param, gradient in zip(self.params, gradients, strict=True):
            if gradient is not None:
                if gradient.stride() != param.stride():
                    # A convolution's may come in another memory format, which the fused kernel would misread
                    gradient = th.empty_like(param).copy_(gradient)
                complete.append(gradient)
            param.grad = gradient
        return complete

    def _fused_groups(self) -> "list[_FusedAdamGroup]":
        """:return: the optimizers that are stepped without their ``step()``, those with equal hyper-parameters together"""
        keys = [None if adam is None else adam.key() for adam in self._adams]
        if keys != self._keys:
            self._keys = keys
            members: dict[tuple[Any, ...], list[int]] = {}
            for index, key in enumerate(keys):
                if key is not None and self._params[index]:
                    members.setdefault(key, []).append(index)
            if list(members.values()) != self._members:
                self._members = list(members.values())
                self._groups = [self._group(indices) for indices in self._members]
            for group, key in zip(self._groups, members, strict=True):
                group.use(key)
        return self._groups

    def _group(self, indices: list[int]) -> "_FusedAdamGroup":
        """
        :param indices: which of the optimizers
        """
        ends = list(itertools.accumulate(len(params) for params in self._params))
        places = [place for index in indices for place in range(ends[index] - len(self._params[index]), ends[index])]
        adams = [adam for index in indices if (adam := self._adams[index]) is not None]
        return _FusedAdamGroup(places, [self.params[place] for place in places], adams)


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
        states = [optimizer.state[param] for param in params]
        self._state, self._all_states, self._states = optimizer.state, list(optimizer.state.values()), states
        self.state_lists = [[state[name] for state in states] for name in ("exp_avg", "exp_avg_sq", "step")]
        self.count_by(th.stack(self.state_lists[2]) if states else th.zeros(0))

    def count_by(self, steps: th.Tensor) -> None:
        """
        :param steps: of each parameter, of which the state's step counters become views
        """
        self.steps = steps
        self.state_lists[2] = list(steps.unbind())
        for state, step in zip(self._states, self.state_lists[2], strict=True):
            state["step"] = step

    def is_current(self) -> bool:
        """:return: whether the optimizer still has this state; ``load_state_dict`` replaces it, ``state.clear()`` drops it"""
        state = self.optimizer.state
        return (
            state is self._state
            and same_objects(list(state.values()), self._all_states)
            and same_objects([entry.get("exp_avg") for entry in self._states], self.state_lists[0])
        )

    def key(self) -> tuple[Any, ...]:
        """:return: what must be equal to share a call of the kernel"""
        group = self.optimizer.param_groups[0]
        decoupled = isinstance(self.optimizer, th.optim.AdamW) or bool(group.get("decoupled_weight_decay"))
        return (decoupled, *(group[name] for name in _HYPERPARAMETERS))


class _FusedAdamGroup:
    """
    Adam optimizers with equal hyper-parameters, stepped by one call of the fused kernel.

    :param places: where their gradients stand among those of all optimizers
    :param params: their parameters
    :param adams: their states
    """

    def __init__(self, places: list[int], params: list[th.Tensor], adams: "list[_FusedAdamState]"):
        self._places = places
        self._params = params
        # One addition counts the steps of all of them
        self._counter = th.cat([adam.steps for adam in adams])
        for adam, steps in zip(adams, self._counter.split([len(adam.steps) for adam in adams]), strict=True):
            adam.count_by(steps)
        lists = zip(*(adam.state_lists for adam in adams), strict=True)
        self._exp_avgs, self._exp_avg_sqs, self._steps = ([tensor for part in parts for tensor in part] for parts in lists)
        self._captured = CapturedStep([*params, *self._exp_avgs, *self._exp_avg_sqs, *self._steps])

    def use(self, key: tuple[Any, ...]) -> None:
        """
        :param key: hyper-parameters of the next steps, see ``_FusedAdamState.key``
        """
        self._settings = key
        decoupled, *hyperparameters = key
        self._kernel = th._fused_adamw_ if decoupled else th._fused_adam_
        self._lr, (self._beta1, self._beta2), self._weight_decay, self._eps = hyperparameters

    def step(self, gradients: list[th.Tensor], closed: th.Tensor | None) -> None:
        """
        :param gradients: of the parameters of all optimizers
        :param closed: see ``OptimizerStep``
        """
        own = [gradients[place] for place in self._places]
        if closed is None:
            self._launch(own, None)
        else:
            self._captured(self._launch, own, closed, self._settings)

    @th.no_grad()
    def _launch(self, gradients: Sequence[th.Tensor], closed: th.Tensor | None) -> None:
        """
        :param gradients: of these parameters
        :param closed: see ``OptimizerStep``
        """
        self._counter.add_(1.0)
        if closed is not None:
            self._counter.sub_(closed)
        self._kernel(
            self._params,
            list(gradients),
            self._exp_avgs,
            self._exp_avg_sqs,
            [],
            self._steps,
            lr=self._lr,
            beta1=self._beta1,
            beta2=self._beta2,
            weight_decay=self._weight_decay,
            eps=self._eps,
            amsgrad=False,
            maximize=False,
            found_inf=closed,
        )


def _is_plain_fused_adam(optimizer: th.optim.Optimizer) -> bool:
    """
    :param optimizer: any optimizer
    :return: whether its ``step()`` does nothing but call the fused Adam kernel
    """
    if type(optimizer) not in _ADAMS or len(optimizer.param_groups) != 1:
        return False
    group = optimizer.param_groups[0]
    variants = ("amsgrad", "maximize", "capturable", "differentiable")
    hooks = (optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks)
    has_tensor = any(isinstance(value, th.Tensor) for value in (group["lr"], *group["betas"]))
    return bool(group.get("fused")) and not any(group.get(name) for name in variants) and not any(hooks) and not has_tensor
