"""One call of ``learn()`` that writes checkpoints: how it begins, is interrupted and ends, also by an exception.

SB3 tells a nested callback neither of the beginning of a rollout nor of the end of the training, and none of an exception.
For as long as ``learn()`` runs, the model is of a subclass whose ``collect_rollouts`` and ``train`` tell of both, and whose
copies and pickles are of the model's own class.
"""

import contextlib
import copyreg
import functools
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import torch as th
from stable_baselines3.common.callbacks import BaseCallback, CallbackList
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.type_aliases import RolloutReturn

from sb3_softvalue.checkpoint import environments

# Seconds after a signal: until then a rollout may end by itself, and then a gradient step; between two looks
ROLLOUT_ENDS, STEP_ENDS, RETRY = 2.0, 3.0, 0.01
# Seconds in which a signal comes that the processes of the environments have had already
_SIGNAL_COMES = 0.3


class Stop(BaseException):
    """Ends a rollout or ``train()`` that takes too long after a signal."""


def callbacks_of(root: Any) -> Iterator[Any]:
    """:return: a callback and all that it calls"""
    yield root
    children = list(root.callbacks) if isinstance(root, CallbackList) else []
    for child in (*children, getattr(root, "callback", None), getattr(root, "callback_on_new_best", None)):
        if isinstance(child, BaseCallback):
            yield from callbacks_of(child)


class Learning:
    """
    What happens around ``learn()``.

    :param model: that learns
    """

    def __init__(self, model: OffPolicyAlgorithm):
        self.model = model
        # Callbacks of type ResumableCheckpoint
        self.savers: list[Any] = []
        self.root: BaseCallback | None = None
        # The step before which there is nothing to be done
        self.next_at = 0.0
        self._class: Any = type(model)
        self._handlers: dict[int, Any] = {}
        self._interrupted_at: float | None = None
        self._told = False
        model.__class__ = self._subclass()

    @staticmethod
    def of(model: OffPolicyAlgorithm) -> "Learning":
        """:return: that of a model whose ``learn()`` runs"""
        return getattr(type(model), "_learning_of_checkpoints", None) or Learning(model)

    def _subclass(self) -> Any:
        """:return: the model's class, which tells of rollouts and updates"""
        learning, base = self, self._class

        class Learner(base):  # type: ignore[valid-type, misc]  # whatever the model is
            _learning_of_checkpoints = learning

            def collect_rollouts(self, env: Any, callback: BaseCallback, *args: Any, **kwargs: Any) -> RolloutReturn:
                try:
                    # Between two checkpoints this comparison is all that a rollout costs
                    if (self.num_timesteps < learning.next_at and callback is learning.root) or not learning.look(callback):
                        return base.collect_rollouts(self, env, callback, *args, **kwargs)
                except BaseException as error:
                    if not learning.has_stopped(error):
                        raise
                return RolloutReturn(0, 0, continue_training=False)

            def train(self, *args: Any, **kwargs: Any) -> None:
                try:
                    base.train(self, *args, **kwargs)
                except BaseException as error:
                    if not learning.has_stopped(error):
                        raise

            def __reduce_ex__(self, protocol: Any) -> Any:
                make, args, *rest = super().__reduce_ex__(protocol)
                if make is copyreg.__newobj__:  # type: ignore[attr-defined]  # pickle would insist on this class
                    make = base.__new__
                return make, tuple(base if each is Learner else each for each in args), *rest

        for name in ("__name__", "__qualname__", "__module__", "__doc__"):
            setattr(Learner, name, getattr(base, name))
        return Learner

    def look(self, root: BaseCallback) -> bool:
        """
        Save what is due, between ``train()`` and ``collect_rollouts()``, where the training is consistent.

        :param root: of all callbacks
        :return: whether the training was interrupted, and everything is saved
        """
        if root is not self.root:
            self._begin(root)
        now = self._interrupted_at is not None
        if now:
            self._alarm(0.0)
            self._tell()
        due_at = [saver.save_if_due(now) for saver in self.savers]
        self.next_at = min(due_at, default=math.inf)
        if self._interrupted_at is not None:  # perhaps meanwhile
            self.next_at = 0.0
        return now

    def has_stopped(self, error: BaseException) -> bool:
        """
        :param error: that has ended a rollout or ``train()``
        :return: whether that was the interrupt, and everything is saved; the training is over otherwise
        """
        try:
            if self._is_interrupt(error) and self.root is not None:
                self.look(self.root)
                environments.abandon(self.model.env)  # type: ignore[arg-type]  # is there
                return True
        except BaseException:
            self.end()
            raise
        self.end()
        return False

    def _begin(self, root: BaseCallback) -> None:
        """:param root: of the callbacks of a new call of ``learn()``"""
        called = [saver for saver in self.savers if saver in list(callbacks_of(root))]
        self.end()  # one that has ended without a word
        if not called:
            return
        self.model.__class__ = self._subclass()
        self.root, self._interrupted_at, self._told = root, None, False
        try:
            for saver in called:
                saver.begin(root)
                self.savers.append(saver)
        except BaseException:
            self.end()
            raise
        root.on_training_end = functools.partial(self._ended, root.on_training_end)  # type: ignore[method-assign]  # until then
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                # One that is ignored stays so
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._handle(number, self._interrupt)

    def _ended(self, on_training_end: Callable[[], None]) -> None:
        try:
            on_training_end()
            for saver in self.savers:
                saver.save_if_due(now=True)
        finally:
            self.end()

    def end(self) -> None:
        """The training is over, however it ended."""
        savers, self.savers = self.savers, []
        if self.root is not None:
            for saver in savers:
                saver.end()
            vars(self.root).pop("on_training_end", None)
            self.root = None
        self._restore_handlers()
        if vars(self.model.replay_buffer).get("sample") is Learning._stop_sampling:
            del vars(self.model.replay_buffer)["sample"]
        self.model.__class__ = self._class

    @staticmethod
    def _stop_sampling(*args: Any, **kwargs: Any) -> Any:
        raise Stop

    def _handle(self, number: int, handler: Callable[[int, FrameType | None], None]) -> None:
        if signal.getsignal(number) is not None:  # one that was set outside of Python could not be set again
            self._handlers[number] = signal.signal(number, handler)

    def _restore_handlers(self) -> None:
        self._alarm(0.0)
        while self._handlers:
            signal.signal(*self._handlers.popitem())

    def _alarm(self, seconds: float) -> None:
        """Look after the training in so many seconds, 0 for never: an alarm interrupts waiting for an environment, too."""
        if any(number not in (signal.SIGINT, signal.SIGTERM) for number in self._handlers):
            signal.setitimer(signal.ITIMER_REAL, seconds, RETRY)

    def _is_interrupt(self, error: BaseException) -> bool:
        """:return: whether an exception is what a signal has made of the training, to its environments' processes perhaps"""
        died = isinstance(error, (EOFError, ConnectionError)) and environments.is_lost(self.model.env)  # type: ignore[arg-type]
        if died and self._interrupted_at is None and self._handlers:
            time.sleep(_SIGNAL_COMES)
        return self._interrupted_at is not None and (died or isinstance(error, Stop))

    def _tell(self) -> None:
        """
        Say that it was interrupted. Not where the signal came: that may have been within another ``print()``, which would
        raise. Nor may a terminal that is gone keep the checkpoint from being written.
        """
        if not self._told:
            self._told = True
            folders = " and ".join(str(saver.folder) for saver in self.savers)
            with contextlib.suppress(OSError, ValueError):
                print(
                    f"Interrupted: a checkpoint is written to {folders} and the training stops. Once more interrupts at once."
                )

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        """Called by the system: stop at the next consistent moment, and look after it when that takes too long."""
        if self._interrupted_at is None:
            self._interrupted_at, self.next_at = time.monotonic(), 0.0
            if hasattr(signal, "SIGALRM"):  # elsewhere (Windows) the rollout ends by itself
                self._handle(signal.SIGALRM, self._stop)
                self._alarm(ROLLOUT_ENDS)
        else:
            self._restore_handlers()
            signal.raise_signal(number)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        """
        End the rollout or ``train()``, but not within a write to the replay buffer or the disk or an optimizer's step.

        :param number: of the alarm, which comes again until it is switched off
        :param frame: where it came
        """
        buffer: Any = self.model.replay_buffer
        within, waited = "", time.monotonic() - (self._interrupted_at or 0.0)
        while frame is not None and not within:
            owner, name = frame.f_locals.get("self"), frame.f_code.co_name
            if (owner is buffer and name == "add") or isinstance(owner, th.optim.Optimizer) or owner is self:
                within = "writing"
            elif owner is self.model and name in ("train", "collect_rollouts"):
                within = name
            frame = frame.f_back
        if within == "collect_rollouts" or (within == "train" and waited > STEP_ENDS):
            self._alarm(0.0)
            raise Stop
        if within == "train":
            # A gradient step begins with its batch: between two of them nothing is half done
            buffer.sample = self._stop_sampling
