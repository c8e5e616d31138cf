"""Checkpoints of format 1, which version 0.1.0 wrote, as those of format 2."""

from typing import Any

import numpy as np
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm

from sb3_softvalue.checkpoint import environments, state
from sb3_softvalue.checkpoint.schema import pack

# Written differently since: the shapes of the tensors and the statistics are compared instead
_OTHERS = {"VecNormalize", "layers", "networks", "optimizers", "options"}


def facts(model: OffPolicyAlgorithm) -> dict[str, Any]:
    """:return: what must be the same in the model that continues, as far as format 1 says it"""
    own = {name: fact for name, fact in state.facts(model).items() if name not in _OTHERS}
    return own | {"observation space": str(model.observation_space), "action space": str(model.action_space)}


def upgrade(content: dict[str, Any], tensors: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """:return: what state.json and tensors.pt hold, in format 2"""
    counters, noise, statistics = dict(content["counters"]), content["noise"], content["VecNormalize"]
    for name in ("_total_timesteps", "_num_timesteps_at_start"):
        del counters[name]
    noises = noise if isinstance(noise, list) and not isinstance(noise[0], float) else [noise]
    content = {name: content[name] for name in content if name != "before episodes"} | {
        "counters": counters,
        "VecNormalize": statistics
        and {
            name: {key: pack(np.array(each)) for key, each in zip(("mean", "var", "count"), values, strict=True)}
            for name, values in statistics["moments"].items()
        },
        "noise": {str(i): pack(np.array(each)) for i, each in enumerate(noises)} if noises[0] is not None else None,
        "observations": environments.digest(tensors["last"]["_last_obs"]),
        **{"environments": None, "boundary": False, "callbacks": [], "options": {}, "machine": {}},
    }
    parameters = tensors["parameters"].items()
    parameters = {name: {"state": each["state"]} if "param_groups" in each else each for name, each in parameters}
    return content, {"variables": tensors["variables"], "parameters": parameters}
