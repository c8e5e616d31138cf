"""Computes the gradients of an update in the way that was chosen.

All executions evaluate ``update.JointObjective``; none of them changes any state, so that a failing compiler or a warm-up
leaves the model as it was.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch as th

from sb3_softvalue.execution.arguments import GradientFunction, Gradients
from sb3_softvalue.execution.choice import check_autocast, choose, repay
from sb3_softvalue.execution.compiled import CompiledGradients
from sb3_softvalue.execution.cuda_graph import CudaGraphGradients
from sb3_softvalue.execution.products import FastProducts
from sb3_softvalue.update import Batch, JointObjective, Temperature, objective_gradients


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
        self._products = FastProducts()

    def prepare(self, n_updates: float) -> None:
        """
        Choose the execution of the coming gradient steps.

        :param n_updates: gradient steps that the model has done and will do in this ``learn()``
        :raises ValueError: if the execution was asked for explicitly and cannot be had
        :raises RuntimeError: inside ``torch.autocast``
        """
        check_autocast(self.device)
        if self._settled or (self._gradients is not None and not repay(n_updates)):
            return
        choice = choose(self.requested, self.objective, self.device, n_updates, self.resolved)
        if self._gradients is None or choice.execution != self.resolved:
            if self.requested == "auto":
                self._announce(f"Update executed by {choice.execution!r}: {choice.reason}")
            self._use(choice.execution)
        # Only "auto" on its eager way may still change its mind
        self._settled = choice.execution != "eager" or self.requested == "eager" or repay(n_updates)

    def _use(self, execution: str) -> None:
        """
        :param execution: one of ``EXECUTIONS`` but "auto"
        """
        self.resolved = execution
        if execution in ("compiled", "mixed"):
            self._gradients = CompiledGradients(self.objective, execution == "mixed")
            if self.device.type == "cuda":
                # Launched from Python one by one, its kernels would take longer to launch than to run
                self._gradients = CudaGraphGradients(self.objective, self._gradients)
        elif execution == "cuda_graph":
            self._gradients = CudaGraphGradients(self.objective)
        else:
            self._gradients = partial(objective_gradients, self.objective)

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
            with self._products:
                return self._gradients(params, batch, noise, temperature, reward_scale)
        except Warning:  # where the user has made errors of them
            raise
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
