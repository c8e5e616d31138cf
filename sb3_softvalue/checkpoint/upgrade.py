"""Checkpoints of format 1, which version 0.1.0 wrote, as those of format 2."""

from typing import Any

import numpy as np
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm

from sb3_softvalue.checkpoint import state as current
from sb3_softvalue.checkpoint.schema import pack

# Written differently since
_OTHERS = ("layers", "networks", "optimizers", "VecNormalize", "observation space", "action space")


def check_facts(saved: dict[str, Any], model: OffPolicyAlgorithm) -> None:
    """
    :param saved: of the model that was saved
    :param model: that is to continue; what is not compared here is compared by the shapes of the tensors
    :raises CheckpointError: at the first that differs
    """
    own = {name: value for name, value in current.facts(model).items() if name not in _OTHERS and not name.startswith("options")}
    own |= {"observation space": str(model.observation_space), "action space": str(model.action_space)}
    own["VecNormalize"] = model.get_vec_normalize_env() is not None
    current.check_facts(saved, own)


def state(content: dict[str, Any]) -> dict[str, Any]:
    """:return: what state.json holds, in format 2"""
    content = dict(content)
    now, before = content["environments"], content.pop("before episodes")
    states = [
        {"now": _kept(generator), "before": None if start is None else _kept(start)}
        for generator, start in zip(now or (), before or [None] * len(now or ()), strict=True)
    ]
    counters = {name: value for name, value in content["counters"].items() if "total" not in name and "at_start" not in name}
    statistics = content["VecNormalize"] and {
        name: {"mean": pack(np.array(mean)), "var": pack(np.array(var)), "count": pack(np.array(count))}
        for name, (mean, var, count) in content["VecNormalize"]["moments"].items()
    }
    return content | {
        "counters": counters,
        "VecNormalize": statistics,
        "environments": states or None,
        "boundary": bool(states) and all(each["before"] is not None for each in states),
        "callbacks": [],
        "options": {},
        "machine": {},
    }


def _kept(generator: dict[str, Any]) -> dict[str, Any]:
    return {"np_random": generator, "layers": [], "unknown": ["an environment of format 1"], "task": None}


def tensors(content: dict[str, Any]) -> dict[str, Any]:
    """:return: what tensors.pt holds, in format 2"""
    return {"parameters": content["parameters"], "variables": content["variables"], "last": content["last"]["_last_obs"]}
