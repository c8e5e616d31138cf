"""Checkpoints of format 1, which version 0.1.0 wrote, as those of format 2."""

from typing import Any

import numpy as np
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm

from sb3_softvalue.checkpoint import state
from sb3_softvalue.checkpoint.schema import pack

# Written differently since: the shapes of the tensors are compared instead
_OTHERS = ("layers", "networks", "optimizers", "options")


def check_facts(saved: dict[str, Any], model: OffPolicyAlgorithm) -> None:
    """
    :param saved: of the model that was saved
    :param model: that is to continue
    :raises CheckpointError: at the first that differs
    """
    own = {name: value for name, value in state.facts(model).items() if name not in _OTHERS}
    own |= {"observation space": str(model.observation_space), "action space": str(model.action_space)}
    own["VecNormalize"] = model.get_vec_normalize_env() is not None
    state.check_facts(saved, own)


def upgrade(content: dict[str, Any], tensors: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """:return: what state.json and tensors.pt hold, in format 2"""
    content, tensors = dict(content), dict(tensors)
    before = content.pop("before episodes") or [None] * len(content["environments"] or ())
    content["environments"] = [
        {
            key: each and {"np_random": each, "layers": [], "unknown": ["an environment of format 1"], "task": None}
            for key, each in {"now": now, "before": then}.items()
        }
        for now, then in zip(content["environments"] or (), before, strict=True)
    ] or None
    for name in ("_total_timesteps", "_num_timesteps_at_start"):
        del content["counters"][name]
    if content["VecNormalize"]:
        moments = content["VecNormalize"]["moments"].items()
        names = ("mean", "var", "count")
        content["VecNormalize"] = {
            name: {key: pack(np.array(each)) for key, each in zip(names, values, strict=True)} for name, values in moments
        }
    noise, last = content["noise"], tensors.pop("last")["_last_obs"]
    noises = noise if isinstance(noise, list) and not isinstance(noise[0], float) else [noise]
    content["noise"] = {str(i): pack(np.array(each)) for i, each in enumerate(noises)} if noises[0] is not None else None
    content |= {"boundary": None not in before, "callbacks": [], "options": {}, "machine": {}}
    content["observations"] = state.digest(last)
    parameters = {
        key: {"state": each["state"]} if "param_groups" in each else each for key, each in tensors["parameters"].items()
    }
    del tensors["sde"]
    return content, tensors | {"parameters": parameters}
