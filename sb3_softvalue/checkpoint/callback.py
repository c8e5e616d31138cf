"""The callback that writes checkpoints while a training continues."""

import contextlib
import pathlib
from math import inf
from typing import Any

import numpy as np
from stable_baselines3.common.callbacks import BaseCallback, EventCallback
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm

from sb3_softvalue.checkpoint import environments
from sb3_softvalue.checkpoint.folder import claimed, has_checkpoint
from sb3_softvalue.checkpoint.learning import Learning, callbacks_of
from sb3_softvalue.checkpoint.replay import at_episode_boundary
from sb3_softvalue.checkpoint.save_load import KEEP, check_owner, check_storable, load_checkpoint, runs, save_checkpoint
from sb3_softvalue.checkpoint.schema import is_plain, to_builtin
from sb3_softvalue.checks import check_whole_number


class ResumableCheckpoint(BaseCallback):
    """
    Write a checkpoint of the whole training every so many steps, at its end, and when it is interrupted (Ctrl-C, or the
    SIGTERM of a scheduler; a second one interrupts at once). For SACV, and SB3's SAC, TD3, DDPG and TQC.

    ``model.learn(total, callback=ResumableCheckpoint(folder, resume=True))`` begins a training of ``total`` steps or continues
    it. A checkpoint that is written as an episode begins is resumed bit for bit on a CPU; one in the middle of an episode
    begins the next one. That is why it waits for the end of an episode, but not for longer than another ``save_freq``. What
    other callbacks count continues too, such as the best mean reward of ``EvalCallback``.

    :param folder: of the run
    :param save_freq: steps of the model between two checkpoints; as the child of an event it writes at each event instead
    :param keep: number of checkpoints to keep
    :param at_episode_end: whether to wait for the end of an episode, of all environments at once
    :param resume: whether to continue from the newest checkpoint in the folder, if there is one
    :param overwrite: whether to replace the checkpoints of another training in the folder, once the first is written
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
        *,
        resume: bool = False,
        overwrite: bool = False,
    ):
        super().__init__(verbose)
        check_whole_number("save_freq", save_freq, minimum=1)
        check_whole_number("keep", keep, minimum=1)
        if resume and overwrite:
            raise ValueError(
                "resume=True continues the training in the folder and overwrite=True replaces it: give one of them."
            )
        # Of where it was given, whatever an environment changes the working directory to
        self.folder = pathlib.Path(folder).absolute()
        self.save_freq, self.keep, self.at_episode_end = save_freq, keep, at_episode_end
        self.resume, self.overwrite = resume, overwrite
        self._saved_at = 0
        self._claim = contextlib.ExitStack()
        # The step from which on it waits for the end of an episode; infinite until an event asks for a checkpoint
        self._due_at = inf
        # The other callbacks, and their numbers as they were constructed
        self._others: list[tuple[BaseCallback, dict[str, Any]]] = []

    def _init_callback(self) -> None:
        # Errors come before the first step, not at the first checkpoint
        check_storable(self.model)
        if self.resume and has_checkpoint(self.folder):
            resumed = load_checkpoint(self.model, self.folder)
            if self.model._last_obs is None:  # it was saved before its first reset, and learn() has made that here
                environments.begin_at(self.model, self.training_env.reset())
            if self.verbose >= 1:
                print(f"Resuming {self.folder} from {resumed}")
        elif not self.overwrite:
            check_owner(self.model, self.folder)
        Learning.of(self.model).savers.append(self)

    def begin(self, root: BaseCallback) -> None:
        """
        Claim the folder, right before the first step, and let other callbacks resume.

        :param root: of all callbacks of this call of ``learn()``
        """
        self._claim.enter_context(claimed(self.folder))
        environments.read(self.training_env)  # from here on their states before each reset are recorded
        self._wait()
        self._others = [(each, _numbers_of(each)) for each in callbacks_of(root) if not isinstance(each, ResumableCheckpoint)]
        saved = runs[self.model].callbacks if self.model in runs else []
        for (each, own), entry in zip(self._others, saved, strict=False):
            for name, value in entry["values"].items() if entry["class"] == type(each).__name__ else ():
                if name in own and (own[name] is None or isinstance(value, list) == isinstance(own[name], list)):
                    setattr(each, name, float(value) if isinstance(own[name], float) else value)

    def end(self) -> None:
        """Release the folder; what was loaded for other callbacks was for this call of ``learn()``."""
        self._claim.close()
        if self.model in runs:
            runs[self.model].callbacks = []

    def _on_step(self) -> bool:
        if self._due_at == inf:  # called by an event
            self._due_at, Learning.of(self.model).next_at = self.model.num_timesteps, 0
        return True

    # Without what SB3's callbacks do at each step and rollout, which would be most of the cost
    on_step = _on_step

    def update_locals(self, locals_: dict[str, Any]) -> None:
        """Not needed."""

    def on_rollout_start(self) -> None:
        """Not needed."""

    def on_rollout_end(self) -> None:
        """Not needed."""

    def _on_training_end(self) -> None:
        learning = Learning.of(self.model)
        if learning.root is None:  # nothing was left to learn: there was no rollout, and so no beginning
            if self.verbose >= 1:
                print(f"All {self.model.num_timesteps} steps are done")
            learning.end()

    def save_if_due(self, now: bool) -> float:
        """
        Save, where the training is consistent: between ``train()`` and ``collect_rollouts()``.

        :param now: whether to save whatever is new since the last checkpoint
        :return: the step at which the next one is due
        """
        steps = self.model.num_timesteps
        due = steps >= self._due_at
        if due and self.at_episode_end and steps < self._due_at + self.save_freq:
            due = at_episode_boundary(self.model.replay_buffer)  # type: ignore[arg-type]  # checked by check_storable
        if due or (now and steps > self._saved_at):
            others = [
                {"class": type(each).__name__, "values": {n: v for n, v in own.items() if v not in (None, was.get(n, v))}}
                for each, was, own in ((*other, _numbers_of(other[0])) for other in self._others)
            ]
            save_checkpoint(self.model, self.folder, self.keep, overwrite=self.overwrite, callbacks=others)
            self._wait()
            if self.verbose >= 1:
                print(f"Checkpoint at step {steps} in {self.folder}")
        return self._due_at

    def _wait(self) -> None:
        """Everything up to here is saved."""
        self._saved_at = self.model.num_timesteps
        self._due_at = inf if isinstance(self.parent, EventCallback) else self._saved_at + self.save_freq


def _numbers_of(callback: BaseCallback) -> dict[str, Any]:
    """:return: numbers and lists of them that a callback keeps, and what is None, which may become a number"""
    kinds = (bool, int, float, list, np.generic, type(None))
    kept = {name: to_builtin(value) for name, value in vars(callback).items() if isinstance(value, kinds)}
    return {name: value for name, value in kept.items() if value is None or is_plain(value)}
