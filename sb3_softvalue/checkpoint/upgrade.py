"""Checkpoints of format 1, which version 0.1.0 wrote, as those of format 2."""

from typing import Any

import numpy as np
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm

from sb3_softvalue.checkpoint import environments, state
from sb3_softvalue.checkpoint.schema import pack

# Format 1 wrote them differently: instead, the shapes of the tensors and the statistics are compared
_OTHERS = {"VecNormalize", "layers", "networks", "optimizers", "options"}


def facts(model: OffPolicyAlgorithm) -> dict[str, Any]:
    """:return: what must be the same in the model that continues, as far as format 1 has it"""
    own = {name: fact for name, fact in state.facts(model).items() if name not in _OTHERS}
    return own | {"observation space": str(model.observation_space), "action space": str(model.action_space)}


def upgrade(content: dict[str, Any], tensors: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """:return: the content of state.json and tensors.pt in format 2"""
    noise, statistics = content["noise"], content["VecNormalize"]
    noises = noise if isinstance(noise, list) and not isinstance(noise[0], float) else [noise]
    dropped = {"before episodes", "_total_timesteps", "_num_timesteps_at_start"}
    content = {name: value for name, value in content.items() if name not in dropped} | {
        "counters": {name: value for name, value in content["counters"].items() if name not in dropped},
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
