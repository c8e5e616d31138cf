"""One call of ``learn()`` that writes checkpoints: how it begins, is interrupted and ends, also by an exception.

SB3 does not tell a nested callback that a rollout begins or the training ends, and no callback of an exception. While
``learn()`` runs, the model is therefore of a subclass that reports both. Its copies and pickles are of the model's own class.
"""

import contextlib
import copyreg
import functools
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.type_aliases import RolloutReturn

from sb3_softvalue.checkpoint import environments

# Seconds after a signal: until then a rollout may end by itself, and then a gradient step; between two alarms
ROLLOUT_ENDS, STEP_ENDS, RETRY, LOST = 2.0, 3.0, 0.01, 1.0
# Seconds within which a signal arrives that the processes of the environments have received already
_SIGNAL_ARRIVES = 0.3
# Windows has no alarm: there the rollout or train() ends by itself
_ALARM = getattr(signal, "SIGALRM", None)


class Stop(BaseException):
    """Ends a rollout or ``train()`` that takes too long after a signal."""


def callbacks_of(root: BaseCallback) -> list[BaseCallback]:
    """:return: a callback and all that it holds in an attribute or a list, each once: any of them it may call"""
    found = [root]
    for callback in found:
        for value in vars(callback).values():
            for child in value if isinstance(value, (list, tuple)) else (value,):
                if isinstance(child, BaseCallback) and child not in found:
                    found.append(child)
    return found


def _stop_sampling(*args: Any, **kwargs: Any) -> Any:
    raise Stop


class Learning:
    """
    What happens around ``learn()``.

    :param model: that learns
    """

    def __init__(self, model: OffPolicyAlgorithm):
        self.model = model
        # Callbacks of type ResumableCheckpoint
        self.savers: list[Any] = []
        # Of all callbacks, while learn() makes rollouts
        self.root: BaseCallback | None = None
        # There is nothing to do before this step
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
        """:return: the model's class, which reports rollouts and updates"""
        learning, base = self, self._class

        class Learner(base):  # type: ignore[valid-type, misc]  # a variable, since the model may be of any class
            _learning_of_checkpoints = learning

            def collect_rollouts(self, env: Any, callback: Any, *args: Any, **kwargs: Any) -> RolloutReturn:
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
                if make is copyreg.__newobj__:  # type: ignore[attr-defined]  # no stub; pickle would insist on this class
                    make = base.__new__
                return make, tuple(base if each is Learner else each for each in args), *rest

        return functools.update_wrapper(Learner, base, updated=())

    def look(self, root: BaseCallback) -> bool:
        """:return: whether the training was interrupted, and everything is saved; otherwise what is due"""
        if root is not self.root:
            self._begin(root)
        now = self._interrupted_at is not None
        if now:
            self._alarm(0.0)
            self._tell()
        due_at = [saver.save_if_due(now) for saver in self.savers]
        # A signal may have come meanwhile
        self.next_at = 0.0 if self._interrupted_at is not None else min(due_at, default=float("inf"))
        if now:
            environments.abandon(self.model.env)
        return now

    def has_stopped(self, error: BaseException) -> bool:
        """:return: whether an interrupt has ended a rollout or ``train()``, and everything is saved; an error otherwise"""
        try:
            if self.root is not None and self._is_interrupt(error):
                self.look(self.root)
                return True
        except BaseException:
            self.end()
            raise
        self.end()
        return False

    def _begin(self, root: BaseCallback) -> None:
        """Begin a new call of ``learn()``."""
        called = [saver for saver in self.savers if saver in callbacks_of(root)]
        self.end()  # of one that SB3 has not reported to have ended
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
        root.on_training_end = functools.partial(self._ended, root.on_training_end)  # type: ignore[method-assign]  # until end()
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
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
        if vars(self.model.replay_buffer).get("sample") is _stop_sampling:
            del vars(self.model.replay_buffer)["sample"]
        self.model.__class__ = self._class

    def _handle(self, number: int, handler: Callable[[int, FrameType | None], None]) -> None:
        """Handle a signal, unless it is ignored, or handled outside Python, which could not be restored."""
        if signal.getsignal(number) not in (None, signal.SIG_IGN):
            self._handlers[number] = signal.signal(number, handler)

    def _restore_handlers(self) -> None:
        self._alarm(0.0)
        while self._handlers:
            signal.signal(*self._handlers.popitem())

    def _alarm(self, seconds: float) -> None:
        """Call ``_stop`` in so many seconds, 0 for never: an alarm also interrupts waiting for an environment."""
        if _ALARM in self._handlers:
            signal.setitimer(signal.ITIMER_REAL, seconds, RETRY)

    def _is_interrupt(self, error: BaseException) -> bool:
        """:return: whether a signal has caused an exception, perhaps by ending the processes of the environments"""
        died = isinstance(error, (EOFError, ConnectionError)) and environments.is_lost(self.model.env)
        if died and self._interrupted_at is None and self._handlers:
            time.sleep(_SIGNAL_ARRIVES)
        return self._interrupted_at is not None and (died or isinstance(error, Stop))

    def _tell(self) -> None:
        """
        Print that it was interrupted, once. Not where the signal came: a ``print()`` within another raises. Nor may a
        closed terminal prevent the checkpoint.
        """
        if not self._told:
            self._told = True
            folders = " and ".join(str(saver.folder) for saver in self.savers)
            with contextlib.suppress(OSError, ValueError):
                print(f"Interrupted: writes a checkpoint to {folders}, then stops. Interrupt again to stop immediately.")

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        """Called on a signal: stop at the next consistent moment, and look after it when that takes too long."""
        if self._interrupted_at is None:
            self._interrupted_at, self.next_at = time.monotonic(), 0.0
            if _ALARM is not None:
                self._handle(_ALARM, self._stop)
                self._alarm(ROLLOUT_ENDS)
        else:
            self._restore_handlers()
            signal.raise_signal(number)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        """
        Called on an alarm, which repeats until it is switched off: end the rollout or ``train()``, but not within a write to
        the replay buffer or the disk or an optimizer's step.
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
            # Once more if that is lost, as an exception in __del__ or in a weak reference's callback is
            self._alarm(LOST)
            raise Stop
        if within == "train":
            # A gradient step begins with its batch: between two of them nothing is half done
            buffer.sample = _stop_sampling
