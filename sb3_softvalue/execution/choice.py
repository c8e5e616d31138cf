"""Which execution an update gets, and why: the one place that chooses."""

from typing import NamedTuple

import torch as th
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.type_aliases import TrainFreq, TrainFrequencyUnit
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from sb3_softvalue.execution.products import multiplies_bfloat16
from sb3_softvalue.networks import is_known_module
from sb3_softvalue.update import JointObjective, draws_own_noise

EXECUTIONS = ("auto", "eager", "compiled", "mixed", "cuda_graph")
# Updates after which a compilation has paid for itself on a CPU: measured by benchmarks/throughput.py, see docs/guide/speed.md
BREAK_EVEN_UPDATES = 5_000


class Choice(NamedTuple):
    """What was chosen, and why."""

    execution: str
    """One of eager, compiled, mixed and cuda_graph"""
    reason: str
    """The rest of a sentence"""


def unavailable(execution: str, objective: JointObjective, device: th.device) -> str | None:
    """
    :param execution: "compiled", "mixed" or "cuda_graph"
    :param objective: the joint objective
    :param device: of the networks
    :return: why it cannot be had, as the rest of a sentence; None if it can
    """
    if execution == "cuda_graph" and device.type != "cuda":
        return f"a CUDA graph needs a CUDA device, and the model is on {device.type}"
    if execution == "compiled" and device.type not in ("cpu", "cuda"):
        return f"compilation is for CPU and CUDA, and the model is on {device.type}"
    if execution == "mixed" and device.type != "cpu":
        return f"mixed precision is for processors, and the model is on {device.type}"
    if execution == "mixed" and not multiplies_bfloat16():
        return "this processor has no instruction for products of bfloat16 (AVX512_BF16 or AMX) and would only emulate them"
    if objective.actor.use_sde:
        return "gSDE draws its noise inside the network"
    if draws_own_noise(objective.actor):
        return f"{type(objective.actor).__name__} overrides action_log_prob"
    for module in objective.modules():
        if isinstance(module, (_BatchNorm, _DropoutNd)):
            return f"{type(module).__name__} changes state or draws random numbers inside the network"
        if device.type == "cuda" and not is_known_module(module) and module._buffers:
            return f"{type(module).__name__} has buffers, which capturing a graph may change"
    return None


def check_autocast(device: th.device) -> None:
    """
    :param device: of the networks
    :raises RuntimeError: inside ``torch.autocast``, which keeps rounded copies of the weights until its end: the updates to
        come would be computed from the weights at its beginning
    """
    if th.is_autocast_enabled(device.type):
        raise RuntimeError(
            "SACV cannot learn inside torch.autocast, which would go on computing with copies of the weights from before the "
            "first update: leave it, and use execution='mixed' for products in bfloat16 on a processor."
        )


def updates_to_come(model: OffPolicyAlgorithm) -> float:
    """
    :param model: in a ``train()``
    :return: gradient steps after it until the end of ``learn()``, 0 where one cannot know
    """
    timesteps = max(0, model._total_timesteps - model.num_timesteps)
    if model.gradient_steps < 0:
        return timesteps
    assert isinstance(model.train_freq, TrainFreq)
    if model.train_freq.unit is TrainFrequencyUnit.EPISODE:
        return 0
    return timesteps * model.gradient_steps / (model.train_freq.frequency * model.n_envs)


def repay(n_updates: float) -> bool:
    """
    :param n_updates: gradient steps that a model has done and will do
    :return: whether they repay a compilation
    """
    return n_updates >= BREAK_EVEN_UPDATES


def choose(requested: str, objective: JointObjective, device: th.device, n_updates: float, before: str | None) -> Choice:
    """
    :param requested: one of ``EXECUTIONS``
    :param objective: the joint objective
    :param device: of the networks
    :param n_updates: gradient steps that the model has done and will do in this ``learn()``
    :param before: what "auto" was resolved to so far, None if to nothing yet
    :return: "eager", "compiled", "mixed" or "cuda_graph"
    :raises ValueError: if it was asked for explicitly and cannot be had
    """
    if requested == "eager":
        return Choice("eager", "it was asked for")
    fast = requested
    if requested == "auto":
        fast = "cuda_graph" if device.type == "cuda" else "compiled"
    problem = unavailable(fast, objective, device)
    if requested != "auto":
        if problem is not None:
            raise ValueError(f"execution={requested!r} is not possible: {problem}; use execution='auto' or 'eager'.")
        return Choice(fast, "it was asked for")
    if problem is not None:
        return Choice("eager", problem)
    if fast == "compiled" and before != "compiled" and not repay(n_updates):
        return Choice("eager", f"{n_updates:.0f} updates are too few to repay a compilation ({BREAK_EVEN_UPDATES})")
    return Choice(fast, f"{n_updates:.0f} updates repay the preparation")
