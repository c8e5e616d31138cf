"""``sb3-softvalue train … --resume FOLDER``: start a training with checkpoints, or resume it."""

from collections.abc import Callable
from typing import Any

from rl_zoo3.exp_manager import ExperimentManager
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm

from sb3_softvalue.checkpoint import ResumableCheckpoint

OPTION = "--resume"
# Steps between two checkpoints
SAVE_FREQ = 10_000


def take_option(argv: list[str]) -> str | None:
    """
    Remove ``--resume FOLDER`` from the arguments, since the zoo does not know it.

    :param argv: arguments of the process, changed in place
    :return: the folder; None without this option
    :raises ValueError: if the folder is missing
    """
    for index, argument in enumerate(argv):
        if argument.startswith(f"{OPTION}="):
            return argv.pop(index).partition("=")[2]
        if argument == OPTION:
            if index + 1 == len(argv) or argv[index + 1].startswith("-"):
                raise ValueError(f"{OPTION} needs the folder of the checkpoints: {OPTION} FOLDER.")
            return [argv.pop(index), argv.pop(index)][1]
    return None


def resumable(folder: str) -> Callable[..., None]:
    """
    :param folder: folder of the checkpoints
    :return: an extension of ``ExperimentManager.learn``
    """

    def learn(original: Callable[..., None], manager: ExperimentManager, model: Any) -> None:
        if not isinstance(model, OffPolicyAlgorithm):
            raise ValueError(f"{OPTION} works with off-policy algorithms only, not with {manager.algo}: leave it out.")
        manager.callbacks.append(ResumableCheckpoint(folder, SAVE_FREQ, verbose=manager.verbose, resume=True))
        original(manager, model)

    return learn
