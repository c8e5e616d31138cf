"""``sb3-softvalue train … --resume FOLDER``: start a training with checkpoints, or resume it."""

import argparse
import sys
from collections.abc import Callable
from typing import Any

from rl_zoo3.exp_manager import ExperimentManager
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm

from sb3_softvalue.checkpoint import ResumableCheckpoint
from sb3_softvalue.zoo.registration import extend

# Steps between two checkpoints
SAVE_FREQ = 10_000


def provide_resume() -> None:
    """Take ``--resume FOLDER``, which the zoo does not know, from the process's arguments, and let trainings follow it."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--resume", metavar="FOLDER")
    own, sys.argv[1:] = parser.parse_known_args()

    def learn(original: Callable[..., None], manager: ExperimentManager, model: Any) -> None:
        if not isinstance(model, OffPolicyAlgorithm):
            raise ValueError(f"--resume works with off-policy algorithms only, not with {manager.algo}: leave it out.")
        manager.callbacks.append(ResumableCheckpoint(own.resume, SAVE_FREQ, verbose=manager.verbose, resume=True))
        original(manager, model)

    if own.resume is not None:
        extend(ExperimentManager, "learn", learn)
