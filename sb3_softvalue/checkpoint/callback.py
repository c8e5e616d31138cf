"""The callback that writes checkpoints while a training goes on."""

import contextlib
import pathlib
import signal
import threading
from types import TracebackType
from typing import Any

import numpy as np
from stable_baselines3.common.callbacks import BaseCallback, EventCallback
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.vec_env import SubprocVecEnv

from sb3_softvalue.checkpoint import random_state, state
from sb3_softvalue.checkpoint.folder import CheckpointError, lock, unlock, writing
from sb3_softvalue.checkpoint.save_load import KEEP, check_storable, save_checkpoint
from sb3_softvalue.checks import check_whole_number


class ResumableCheckpoint(BaseCallback):
    """
    Write a checkpoint of the whole training every so many steps, at its end, and when it is interrupted (Ctrl-C, or the
    SIGTERM of a scheduler; a second one interrupts at once). ``model.load_checkpoint(folder)`` goes on from the newest.

    A checkpoint that is written as an episode begins is resumed bit for bit on a CPU; one in the middle of an episode begins
    the next one. That is why it waits for the end of an episode, but not for longer than another ``save_freq``.

    :param folder: of the run
    :param save_freq: steps of the model between two checkpoints
    :param keep: number of checkpoints to keep
    :param at_episode_end: whether to wait for the end of an episode, of all environments at once
    :param verbose: Verbosity level: 0 for no output, 1 for one line for each checkpoint
    """

    model: OffPolicyAlgorithm

    def __init__(
        self,
        folder: str | pathlib.Path,
        save_freq: int = 10_000,
        keep: int = KEEP,
        at_episode_end: bool = True,
        verbose: int = 0,
    ):
        super().__init__(verbose)
        check_whole_number("save_freq", save_freq, minimum=1)
        check_whole_number("keep", keep, minimum=1)
        # Of where it was given, whatever an environment changes the working directory to
        self.folder = pathlib.Path(folder).absolute()
        self.save_freq, self.keep, self.at_episode_end = save_freq, keep, at_episode_end
        # A signal came; the training was stopped because of it
        self._interrupted = self._told = self._stopped = False
        self._handlers: dict[int, Any] = {}
        self._saved_at = 0
        self._done = np.zeros(0, dtype=bool)
        # Of the environments, after the last step and before it
        self._states: Any = None
        self._states_before: Any = None

    def _init_callback(self) -> None:
        if isinstance(self.parent, EventCallback):
            # It would be told of its steps alone and never write anything
            raise ValueError(
                f"ResumableCheckpoint cannot be called by {type(self.parent).__name__}: give learn() a list of both."
            )

    def _on_training_start(self) -> None:
        # What would end the training at its first checkpoint ends it before its first step
        if not hasattr(self.model, "save_checkpoint"):
            raise CheckpointError(
                f"ResumableCheckpoint is for SACV, got {type(self.model).__name__}: train a SACV, or make one of a SAC with "
                "SACV.from_sac."
            )
        check_storable(self.model)
        with writing(self.folder):
            claimed = lock(self.folder)
        # SB3 says nothing to its callbacks when an exception ends the training
        ends: contextlib.ExitStack = vars(self.model)["_when_learn_ends"]
        if claimed:
            ends.callback(unlock, self.folder)
        ends.push(self._when_learn_ends)
        self._saved_at = self.num_timesteps
        self._interrupted = self._told = self._stopped = False
        self._done = np.zeros(self.training_env.num_envs, dtype=bool)
        self._states = random_state.env_states(self.training_env)
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._handlers[number] = signal.signal(number, self._interrupt)

    def _interrupt(self, number: int, frame: Any) -> None:
        """Called by the system: stop at the next consistent moment."""
        self._restore_handlers()
        self._interrupted = True

    def _tell(self) -> None:
        """
        Say that it was interrupted. Not where the signal came: that may have been within another ``print()``, which would
        raise. Nor may a terminal that is gone keep the checkpoint from being written.
        """
        if self._interrupted and not self._told:
            self._told = True
            with contextlib.suppress(OSError, ValueError):
                then = "and the training stops. Once more interrupts at once."
                print(f"Interrupted: a checkpoint is written to {self.folder} {then}")

    def _when_learn_ends(self, kind: Any, error: BaseException | None, traceback: TracebackType | None) -> bool:
        """
        Clean up. A terminal, and many a scheduler, sends its signal to the environments' processes too: what is lost then is
        the step that they did not answer.

        :param error: that ended the training, or None
        :return: whether that was the interrupt itself, so that there is no error
        """
        self._restore_handlers()
        env = self.training_env.unwrapped
        if not (self._interrupted and isinstance(error, (EOFError, ConnectionError)) and isinstance(env, SubprocVecEnv)):
            return False
        self._tell()
        for process in env.processes:
            process.terminate()
            process.join()
        # There is nobody left to whom close() could say anything
        env.waiting, env.closed = False, True
        if self.num_timesteps > self._saved_at:
            self._save()
        return True

    def _restore_handlers(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def _on_rollout_start(self) -> None:
        self._tell()
        begun = vars(self.model).pop("_rollout_begun", None)
        if begun is not None:
            random_state.set_global_states(begun[0])
            state.set_exploration(self.model, begun[1])
        overdue = self.num_timesteps - self._saved_at - self.save_freq
        if self._interrupted or (overdue >= 0 and (self._done.all() or not self.at_episode_end or overdue >= self.save_freq)):
            self._save()

    def _on_step(self) -> bool:
        self._tell()
        self._done = np.array(self.locals["dones"], dtype=bool)
        self._states_before, self._states = self._states, random_state.env_states(self.training_env)
        # The checkpoint is there: the step that was made since is not in it
        self._stopped = self._interrupted and self._saved_at + self.training_env.num_envs >= self.num_timesteps
        return not self._stopped

    def _on_training_end(self) -> None:
        # Also where the interrupt came in the last rollout
        if not self._stopped and self.num_timesteps > self._saved_at:
            self._save()

    def _save(self) -> None:
        before = None
        if self._states_before is not None:
            pairs = zip(self._states_before, self._done, strict=True)
            before = [state if done else None for state, done in pairs]
        save_checkpoint(self.model, self.folder, self.keep, before)
        self._saved_at = self.num_timesteps
        if self.verbose >= 1:
            print(f"Checkpoint at step {self.num_timesteps} in {self.folder}")
