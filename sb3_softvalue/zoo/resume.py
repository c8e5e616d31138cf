"""``sb3-softvalue train … --resume FOLDER``: begin a training that is never lost, or go on with it."""

from collections.abc import Callable
from typing import Any

from rl_zoo3.exp_manager import ExperimentManager

from sb3_softvalue.checkpoint import ResumableCheckpoint, has_checkpoint
from sb3_softvalue.sacv import SACV

OPTION = "--resume"
# Steps between two checkpoints
SAVE_FREQ = 10_000


def take_option(argv: list[str]) -> str | None:
    """
    Remove ``--resume FOLDER``, which the zoo does not know, from the arguments.

    :param argv: of the process, changed in place
    :return: the folder
    :raises ValueError: if none is given
    """
    for index, argument in enumerate(argv):
        if argument.startswith(f"{OPTION}="):
            return argv.pop(index).partition("=")[2]
        if argument == OPTION:
            if index + 1 == len(argv) or argv[index + 1].startswith("-"):
                raise ValueError(f"{OPTION} needs the folder of the checkpoints: {OPTION} FOLDER.")
            return [argv.pop(index), argv.pop(index)][1]
    return None


class GoesOn:
    """
    What the zoo trains: the model, whose ``learn()`` goes on instead of beginning anew.

    :param model: that may have come from a checkpoint
    """

    def __init__(self, model: SACV):
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def learn(self, total_timesteps: int, **kwargs: Any) -> None:
        """As the model's, for the steps that remain."""
        self._model.learn(total_timesteps - self._model.num_timesteps, reset_num_timesteps=False, **kwargs)


def resumable(folder: str) -> Callable[..., None]:
    """
    :param folder: of the checkpoints
    :return: an extension of ``ExperimentManager.learn``
    """

    def learn(original: Callable[..., None], manager: ExperimentManager, model: Any) -> None:
        if not isinstance(model, SACV):
            raise ValueError(f"{OPTION} goes on with models of sacv, not of {manager.algo}: leave it out.")
        if has_checkpoint(folder):
            model.load_checkpoint(folder)
            instead = f", not from {manager.trained_agent}" if manager.continue_training else ""
            print(f"Going on from step {model.num_timesteps} in {folder}{instead}")
        if model.num_timesteps >= manager.n_timesteps:
            print(f"All {manager.n_timesteps:.0f} steps are done")
            return
        manager.callbacks.append(ResumableCheckpoint(folder, SAVE_FREQ, verbose=manager.verbose))
        original(manager, GoesOn(model))

    return learn
