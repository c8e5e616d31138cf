"""Computes the gradients of an update with the chosen backend."""

import random
import threading
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch as th

from sb3_softvalue.execution.captured import CapturedGradients
from sb3_softvalue.execution.choice import check_autocast, choose
from sb3_softvalue.execution.compiled import CompiledGradients
from sb3_softvalue.execution.matmul import PreferOneDNN
from sb3_softvalue.objective import (
    GradientFunction,
    Gradients,
    JointObjective,
    UpdateInputs,
    draws_own_noise,
    eager_gradients,
)


class Executor:
    """
    Chooses how updates run, and runs them. A copy starts without compiled functions.

    :param requested: one of ``EXECUTIONS``
    :param verbose: whether to print what "auto" chooses
    :param resolved: the execution of the model's previous updates; None before the first
    """

    def __init__(self, requested: str, verbose: bool = False, resolved: str | None = None):
        self.requested = requested
        self.verbose = verbose
        self.resolved = resolved
        self._reset()

    def _reset(self) -> None:
        """Start without compiled functions."""
        self._gradients: GradientFunction | None = None
        self._is_final = False
        self._is_observed = False
        self._matmul: tuple[Any, PreferOneDNN] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"requested": self.requested, "verbose": self.verbose, "resolved": self.resolved}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._reset()

    def prepare(self, device: th.device, n_certain: int, n_updates: float) -> None:
        """
        Choose the execution of the next gradient steps.

        :param device: device of the networks
        :param n_certain: see ``choose``
        :param n_updates: see ``choose``
        :raises ValueError: if the execution was requested explicitly and this machine cannot run it
        :raises RuntimeError: inside ``torch.autocast``
        """
        check_autocast(device)
        if self._is_final:
            return
        choice = choose(self.requested, device, n_certain, n_updates, self.resolved)
        if self._gradients is None or choice.execution != self.resolved:
            if self.requested == "auto" and self.verbose:
                print(f"Updates run with execution={choice.execution!r}: {choice.reason}")
            self._use(choice.execution, device)
        self._is_final = choice.is_final

    def _use(self, execution: str, device: th.device) -> None:
        """
        :param execution: one of ``EXECUTIONS`` except "auto"
        :param device: device of the networks
        """
        self.resolved = execution
        self._is_observed = False
        if execution == "eager":
            self._gradients = eager_gradients
        elif device.type == "cuda":
            # Also compiled kernels are captured: launching them from Python takes longer than running them
            self._gradients = CapturedGradients(compiled=execution == "compiled")
        else:
            self._gradients = CompiledGradients(mixed=execution == "mixed")

    def __call__(
        self, objective: JointObjective, params: Sequence[th.Tensor], inputs: UpdateInputs, update_actor: bool = True
    ) -> Gradients:
        """
        See ``objective.eager_gradients``.

        :raises ValueError: if the execution was requested explicitly and the networks cannot be traced
        :raises RuntimeError: if it was requested explicitly and compilation or capture fails
        """
        assert self._gradients is not None, "call prepare() first"
        with self._fast_matmul(objective, len(inputs.batch.rewards)):
            if self.resolved == "eager":
                return eager_gradients(objective, params, inputs, update_actor)
            if not self._is_observed:
                # The first update runs eagerly, to detect side effects that a graph would not repeat
                gradients, problem = _observed_gradients(objective, params, inputs, update_actor)
                self._is_observed = True
                if problem is not None:
                    self._fall_back(problem, ValueError(f"execution={self.requested!r} is not possible: {problem}"))
                return gradients
            if inputs.noise is None:  # the actor's sampling was replaced since the first update
                return eager_gradients(objective, params, inputs, update_actor)
            try:
                return self._gradients(objective, params, inputs, update_actor)
            except Exception as error:
                # Dynamo wraps the errors of a backend
                cause = getattr(error, "inner_exception", error)
                reason = (str(cause).strip() or type(cause).__name__).splitlines()[0]
                self._fall_back(f"{self.resolved!r} failed with {reason}", error)
                return eager_gradients(objective, params, inputs, update_actor)

    def _fall_back(self, reason: str, error: Exception) -> None:
        """
        Fall back to eager if "auto" was requested, else raise.

        :param reason: reason, as the rest of a sentence
        :param error: error that makes it necessary
        :raises ValueError: if another execution was requested explicitly and ``error`` is a ``ValueError``
        :raises RuntimeError: if another execution was requested explicitly, for all other errors
        """
        if self.requested != "auto":
            if isinstance(error, ValueError):
                raise ValueError(f"{error}; use execution='auto' or 'eager'.")
            raise RuntimeError(f"execution={self.requested!r} failed, use execution='auto' or 'eager': {reason}") from error
        self.resolved, self._gradients = "eager", eager_gradients
        warnings.warn(f"SACV falls back to execution='eager': {reason}.", stacklevel=2)

    def _fast_matmul(self, objective: JointObjective, batch_size: int) -> PreferOneDNN:
        """:return: the context of the matrix products, cached for one objective and batch size"""
        key = objective, batch_size
        if self._matmul is None or self._matmul[0] != key:
            self._matmul = key, PreferOneDNN(objective, batch_size)
        return self._matmul[1]


def _observed_gradients(
    objective: JointObjective, params: Sequence[th.Tensor], inputs: UpdateInputs, update_actor: bool
) -> tuple[Gradients, str | None]:
    """
    :return: the gradients, and a side effect of the networks that a graph would not repeat, as the rest of a sentence; None
        if there is none
    """
    if objective.actor.use_sde:
        problem = "gSDE draws its noise inside the network"
    elif draws_own_noise(objective.actor):
        problem = f"{type(objective.actor).__name__} does not use SB3's action_log_prob and action_dist"
    else:
        problem = None
    generators = {"NumPy": _numpy_state, "Python": random.getstate, "PyTorch": _torch_state}
    before = {name: state() for name, state in generators.items()}
    buffers = [buffer.clone() for buffer in objective.buffers()]
    update = objective, params, inputs, update_actor
    gradients = eager_gradients(*update)
    # By the networks, or by another thread: these generators are the whole process's
    drawn = [name for name, state in generators.items() if state() != before[name]]
    is_same = all(map(th.equal, objective.buffers(), buffers))
    if problem is None and drawn and not (is_same and threading.active_count() > 1 and _repeats(gradients, update)):
        problem = f"a network draws random numbers ({', '.join(drawn)})"
    if problem is None and not is_same:
        problem = "a network changes its buffers, as batch normalization does"
    return gradients, problem


def _repeats(first: Gradients, update: tuple[Any, ...]) -> bool:
    """:return: whether an update gives the same again: its networks draw nothing. If they do, the generators are as before."""
    numpy_state, python_state = np.random.get_state(), random.getstate()
    with th.random.fork_rng(range(th.cuda.device_count())):
        second = eager_gradients(*update)
    pairs = zip((*first[0], first[1]), (*second[0], second[1]), strict=True)
    is_same = all(a is b or (a is not None and b is not None and th.allclose(a, b)) for a, b in pairs)
    if not is_same:
        np.random.set_state(numpy_state)
        random.setstate(python_state)
    return is_same


def _numpy_state() -> Any:
    """:return: comparable state of NumPy's global generator"""
    state: Any = np.random.get_state()
    return state[1].tobytes(), state[2]


def _torch_state() -> Any:
    """:return: comparable state of PyTorch's global generators"""
    states = [th.get_rng_state(), *(th.cuda.get_rng_state_all() if th.cuda.is_available() else [])]
    return [state.numpy().tobytes() for state in states]
