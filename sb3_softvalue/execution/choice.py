"""Which execution an update gets, and why: the one place that chooses."""

from typing import NamedTuple

import torch as th
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.type_aliases import TrainFreq, TrainFrequencyUnit

from sb3_softvalue.execution.matmul import multiplies_bfloat16

EXECUTIONS = ("auto", "eager", "compiled", "mixed", "cuda_graph")
# Updates after which a compilation has paid for itself on a CPU: measured by the speed benchmark, see docs/guide/speed.md
BREAK_EVEN_UPDATES = 5_000


class Choice(NamedTuple):
    """What was chosen, and why."""

    execution: str
    """One of eager, compiled, mixed and cuda_graph"""
    reason: str
    """The rest of a sentence"""


def unsupported_reason(execution: str, device: th.device) -> str | None:
    """
    :param execution: "compiled", "mixed" or "cuda_graph"
    :param device: of the networks
    :return: why this machine cannot run it, as the rest of a sentence; None if it can
    """
    if execution == "cuda_graph" and device.type != "cuda":
        return f"a CUDA graph needs a CUDA device, and the model is on {device.type}"
    if execution == "compiled" and device.type not in ("cpu", "cuda"):
        return f"compilation supports CPU and CUDA, and the model is on {device.type}"
    if execution == "mixed" and device.type != "cpu":
        return f"mixed precision is for CPUs, and the model is on {device.type}"
    if execution == "mixed" and not multiplies_bfloat16():
        return "this CPU has no instruction for bfloat16 products (AVX512_BF16 or AMX) and would only emulate them"
    return None


def check_autocast(device: th.device) -> None:
    """
    :param device: of the networks
    :raises RuntimeError: inside ``torch.autocast``, which keeps rounded copies of the weights until its end: all updates
        would be computed from the weights at its beginning
    """
    if th.is_autocast_enabled(device.type):
        raise RuntimeError(
            "SACV cannot learn inside torch.autocast, which keeps computing with copies of the weights from before the first "
            "update: leave it, and use execution='mixed' for bfloat16 products on a CPU."
        )


def remaining_updates(model: OffPolicyAlgorithm) -> float:
    """
    :param model: in a ``train()``
    :return: gradient steps after it until the end of ``learn()``, 0 where one cannot know
    """
    timesteps = max(0, model._total_timesteps - model.num_timesteps)
    if model.gradient_steps < 0:
        return timesteps
    if not isinstance(model.train_freq, TrainFreq) or model.train_freq.unit is TrainFrequencyUnit.EPISODE:
        return 0
    return timesteps * model.gradient_steps / (model.train_freq.frequency * model.n_envs)


def amortizes(n_updates: float) -> bool:
    """
    :param n_updates: gradient steps that a model has done and will do
    :return: whether they pay for a compilation
    """
    return n_updates >= BREAK_EVEN_UPDATES


def choose(requested: str, device: th.device, n_updates: float, before: str | None) -> Choice:
    """
    :param requested: one of ``EXECUTIONS``
    :param device: of the networks
    :param n_updates: gradient steps that the model has done and will do in this ``learn()``
    :param before: what "auto" was resolved to so far, None if to nothing yet
    :return: "eager", "compiled", "mixed" or "cuda_graph"
    :raises ValueError: if it was requested explicitly and this machine cannot run it
    """
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
    if fast == "compiled" and before != "compiled" and not amortizes(n_updates):
        return Choice("eager", f"{n_updates:.0f} updates are too few to pay for a compilation ({BREAK_EVEN_UPDATES})")
    return Choice(fast, f"{n_updates:.0f} updates pay for the preparation")
