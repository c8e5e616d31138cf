"""Chooses how updates run."""

from typing import NamedTuple

import torch as th
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.type_aliases import TrainFreq, TrainFrequencyUnit

from sb3_softvalue.execution.matmul import multiplies_bfloat16

EXECUTIONS = ("auto", "eager", "compiled", "mixed", "cuda_graph")
# Number of updates from which compilation pays off on a CPU, measured by the speed benchmark: see docs/guide/speed.md
BREAK_EVEN_UPDATES = 5_000
# "auto" compiles only after this many updates, so that a run that stops early does not pay for compilation: the delay costs
# at most a tenth of the compilation time
EAGER_UPDATES = 200


class Choice(NamedTuple):
    """The chosen execution, and the reason."""

    execution: str
    """One of ``EXECUTIONS`` except "auto"."""
    reason: str
    """Rest of a sentence"""
    is_final: bool = True
    """False if more updates may change it"""


def unsupported_reason(execution: str, device: th.device) -> str | None:
    """
    :param execution: "compiled", "mixed" or "cuda_graph"
    :param device: device of the networks
    :return: why this machine cannot run it, as the rest of a sentence; None if it can
    """
    if execution == "cuda_graph" and device.type != "cuda":
        return f"a CUDA graph needs a CUDA device, but the model is on {device.type}"
    if execution == "compiled" and device.type not in ("cpu", "cuda"):
        return f"compilation supports CPU and CUDA, but the model is on {device.type}"
    if execution == "mixed" and device.type != "cpu":
        return f"mixed precision supports CPUs only, but the model is on {device.type}"
    if execution == "mixed" and not multiplies_bfloat16():
        return "this CPU has no bfloat16 instructions (AVX512_BF16 or AMX) and would emulate them"
    return None


def check_autocast(device: th.device) -> None:
    """
    :param device: device of the networks
    :raises RuntimeError: inside ``torch.autocast``, which caches rounded copies of the weights until it exits: every update
        would use the initial weights
    """
    if th.is_autocast_enabled(device.type):
        raise RuntimeError(
            "SACV cannot learn inside torch.autocast, which caches the weights from before the first update: call learn() "
            "outside it, and use execution='mixed' for bfloat16 products on a CPU."
        )


def remaining_updates(model: OffPolicyAlgorithm) -> float:
    """
    :param model: a model inside ``train()``
    :return: gradient steps after this ``train()`` until the end of ``learn()``; 0 if that cannot be known
    """
    timesteps = max(0, model._total_timesteps - model.num_timesteps)
    if model.gradient_steps < 0:
        return timesteps
    if not isinstance(model.train_freq, TrainFreq) or model.train_freq.unit is TrainFrequencyUnit.EPISODE:
        return 0
    return timesteps * model.gradient_steps / (model.train_freq.frequency * model.n_envs)


def choose(requested: str, device: th.device, n_certain: int, n_updates: float, before: str | None) -> Choice:
    """
    :param requested: one of ``EXECUTIONS``
    :param device: device of the networks
    :param n_certain: gradient steps that the model has done and will do in this ``train()``
    :param n_updates: gradient steps that the model has done and will do in this ``learn()``, unless it stops early
    :param before: what "auto" resolved to before; None before the first choice
    :return: the execution and the reason
    :raises ValueError: if it was requested explicitly and this machine cannot run it
    """
    if requested not in EXECUTIONS:
        raise ValueError(f"execution must be one of {', '.join(map(repr, EXECUTIONS))}, got {requested!r}.")
    if requested == "eager":
        return Choice("eager", "it was requested")
    fast = requested
    if requested == "auto":
        fast = "cuda_graph" if device.type == "cuda" else "compiled"
    problem = unsupported_reason(fast, device)
    if requested != "auto":
        if problem is not None:
            raise ValueError(f"execution={requested!r} is not possible: {problem}; use execution='auto' or 'eager'.")
        return Choice(fast, "it was requested")
    if problem is not None:
        return Choice("eager", problem)
    if fast == "compiled" and before != "compiled":
        if n_updates < BREAK_EVEN_UPDATES:
            reason = f"compilation pays off from {BREAK_EVEN_UPDATES} updates, this run has {n_updates:.0f}"
            return Choice("eager", reason, is_final=False)
        if n_certain <= EAGER_UPDATES:
            reason = f"compilation follows after {EAGER_UPDATES} updates, if training has not stopped"
            return Choice("eager", reason, is_final=False)
    return Choice(fast, f"it pays off with {n_updates:.0f} updates")
