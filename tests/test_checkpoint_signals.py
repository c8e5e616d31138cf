"""SIGTERM, whatever the training does, and callbacks within and beside the one that writes checkpoints."""

import copy
import os
import pickle
import signal
import threading
import time
from pathlib import Path
from typing import Any

import cloudpickle
import gymnasium as gym
import numpy as np
import pytest
import torch as th
from stable_baselines3 import SAC, TD3
from stable_baselines3.common.callbacks import (
    BaseCallback,
    CallbackList,
    EvalCallback,
    EveryNTimesteps,
    StopTrainingOnMaxEpisodes,
    StopTrainingOnNoModelImprovement,
)
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import SubprocVecEnv

from sb3_softvalue import SACV
from sb3_softvalue.checkpoint import ResumableCheckpoint, load_checkpoint
from sb3_softvalue.checkpoint.folder import checkpoints
from tests.helpers import assert_same
from tests.test_checkpoint import Stop, everything, make, short_pendulum
from tests.test_checkpoint_use import At, is_claimed


def terminate_after(seconds: float) -> None:
    """As a scheduler does."""
    timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGTERM))
    timer.daemon = True
    timer.start()


class Slow(gym.Wrapper):
    """Waits in each step, or for ever in one."""

    def __init__(self, env: gym.Env, seconds: float = 0.0, hangs_at: int = 0):
        super().__init__(env)
        self.seconds, self.hangs_at, self.steps = seconds, hangs_at, 0

    def step(self, action: Any) -> Any:
        self.steps += 1
        time.sleep(600 if self.steps == self.hangs_at else self.seconds)
        return super().step(action)


def terminated(model: Any, folder: Path, at: int = 60, total: int = 10**6) -> float:
    """Seconds from the signal to the end of ``learn()``."""
    times = []

    def terminate() -> None:
        times.append(time.monotonic())
        terminate_after(0.1)

    before = signal.getsignal(signal.SIGTERM)
    model.learn(total, callback=[ResumableCheckpoint(folder, 10**6), At(at, terminate)])
    assert signal.getsignal(signal.SIGTERM) is before and type(model).__name__ in ("SACV", "SAC", "TD3")
    assert not is_claimed(folder)
    return time.monotonic() - times[0]


@pytest.mark.parametrize("algorithm", [SACV, SAC, TD3])
def test_within_a_long_train(algorithm, tmp_path):
    """It ends between two gradient steps; those that were still to come are lost."""
    model = make(algorithm=algorithm, gradient_steps=10**6, train_freq=50)
    assert terminated(model, tmp_path, at=50) < 5
    other = make(algorithm=algorithm, gradient_steps=10**6, train_freq=50)
    assert load_checkpoint(other, tmp_path)
    assert other.num_timesteps == 50 and other._n_updates == model._n_updates
    assert_same(everything(other), everything(model))


def test_within_a_long_gradient_step(tmp_path):
    model = make(algorithm=SAC)
    model.actor.mu.register_forward_hook(lambda *_: time.sleep(600) if model.num_timesteps == 60 else None)
    assert terminated(model, tmp_path) < 5
    other = make(algorithm=SAC)
    load_checkpoint(other, tmp_path)
    assert other.num_timesteps == 60


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # the one that is lost
def test_an_interrupt_that_is_lost_is_repeated(tmp_path):
    """Python drops an exception that a signal raises in ``__del__``, or in a weak reference's callback."""

    class Dropped:
        def __del__(self) -> None:
            time.sleep(600)

    model = make(algorithm=SAC)
    slow = [lambda: time.sleep(600), Dropped]
    model.actor.mu.register_forward_hook(lambda *_: slow.pop()() and None if model.num_timesteps == 60 else None)
    assert terminated(model, tmp_path) < 10 and not slow


@pytest.mark.parametrize("algorithm", [SACV, SAC])
def test_within_a_long_episode(algorithm, tmp_path):
    env: Any = [lambda: Slow(gym.make("Pendulum-v1", max_episode_steps=10**6), 0.02)]
    model = make(algorithm=algorithm, train_freq=(1, "episode"), env=env)
    assert terminated(model, tmp_path) < 5
    other = make(algorithm=algorithm, train_freq=(1, "episode"), env=env)
    assert not load_checkpoint(other, tmp_path)
    assert other.num_timesteps - 1 <= other.replay_buffer.pos <= other.num_timesteps
    assert_same(everything(other)["buffer"]["rewards"], everything(model)["buffer"]["rewards"])


def test_with_a_worker_that_hangs(tmp_path):
    """And neither does close() wait for it."""
    model = make(env=[short_pendulum] * 2)
    model.set_env(SubprocVecEnv([short_pendulum, lambda: Slow(short_pendulum(), hangs_at=40)]))
    assert terminated(model, tmp_path, at=76) < 5
    model.env.close()
    assert not any(process.is_alive() for process in model.env.processes)
    other = make(env=[short_pendulum] * 2)
    assert "are not known" in str(load_checkpoint(other, tmp_path))
    other.learn(30, reset_num_timesteps=False)


def test_a_native_handler_is_left_alone(tmp_path, monkeypatch):
    """Python does not know it and could not put it back."""
    getsignal, set_ = signal.getsignal, signal.signal
    seen = []
    monkeypatch.setattr(signal, "getsignal", lambda number: None if number == signal.SIGTERM else getsignal(number))
    monkeypatch.setattr(signal, "signal", lambda number, handler: (seen.append(number), set_(number, handler))[1])
    make().learn(60, callback=ResumableCheckpoint(tmp_path, 30))
    assert signal.SIGTERM not in seen and signal.SIGINT in seen


def test_a_second_one_interrupts_at_once(tmp_path):
    def both() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    model = make()
    with pytest.raises(KeyboardInterrupt):
        model.learn(100, callback=[ResumableCheckpoint(tmp_path, 30), At(64, both)])
    signal.signal(signal.SIGINT, before)
    assert not is_claimed(tmp_path) and type(model) is SACV


class Own(BaseCallback):
    """Passes everything to another callback, which it keeps where it likes."""

    def __init__(self, inner: BaseCallback):
        super().__init__()
        self.mine = (inner,)

    def _init_callback(self) -> None:
        self.mine[0].parent = self
        self.mine[0].init_callback(self.model)

    def _on_training_start(self) -> None:
        self.mine[0].on_training_start(self.locals, self.globals)

    def _on_step(self) -> bool:
        return self.mine[0].on_step()


def nest(kind: str, inner: ResumableCheckpoint) -> BaseCallback:
    """The callback within another."""
    env = Monitor(short_pendulum())
    return {
        "event": lambda: EveryNTimesteps(50, inner),
        "list in event": lambda: EveryNTimesteps(50, CallbackList([inner])),
        "after each evaluation": lambda: EvalCallback(env, callback_after_eval=inner, eval_freq=50, verbose=0),
        "on a new best": lambda: EvalCallback(env, callback_on_new_best=inner, eval_freq=50, n_eval_episodes=1, verbose=0),
        "list": lambda: CallbackList([CallbackList([inner])]),
        "one's own": lambda: Own(inner),
    }[kind]()


@pytest.mark.parametrize("kind", ["event", "list in event", "after each evaluation", "on a new best", "list", "one's own"])
@pytest.mark.parametrize("as_list", [False, True])
@pytest.mark.parametrize("algorithm", [SACV, SAC])
@pytest.mark.filterwarnings("ignore:Training and eval env are not of the same type")
def test_nested(algorithm, as_list, kind, tmp_path):
    """EveryNTimesteps told it of its steps alone, and it wrote nothing."""
    callback = nest(kind, ResumableCheckpoint(tmp_path, 50))
    handler = signal.getsignal(signal.SIGTERM)
    model = make(algorithm=algorithm).learn(210, callback=[callback] if as_list else callback)
    assert len(checkpoints(tmp_path)) == 2
    assert type(model) is algorithm and not is_claimed(tmp_path) and signal.getsignal(signal.SIGTERM) is handler
    assert not {"on_training_end"} & set(vars(callback))
    other = make(algorithm=algorithm)
    load_checkpoint(other, tmp_path)
    assert other.num_timesteps == 210
    # What it did to the model is undone where it is not among the callbacks any more
    model.learn(30, reset_num_timesteps=False)
    load_checkpoint(other, tmp_path)
    assert other.num_timesteps == 210


def test_where_nothing_is_left_to_learn(tmp_path):
    """``learn()`` makes no rollout, and tells nested callbacks of nothing."""
    model = make().learn(60, callback=ResumableCheckpoint(tmp_path, 30))
    other = make(seed=3)
    other.learn(60, callback=EveryNTimesteps(30, ResumableCheckpoint(tmp_path, resume=True)))
    assert other.num_timesteps == 60 and not is_claimed(tmp_path)
    other.learn(0, reset_num_timesteps=False, callback=ResumableCheckpoint(tmp_path, resume=True))
    assert type(other) is SACV
    assert_same(everything(other), everything(model))
    other.learn(30, reset_num_timesteps=False)
    load_checkpoint(model, tmp_path)
    assert type(other) is SACV and model.num_timesteps == 60


@pytest.mark.filterwarnings("ignore:Training and eval env are not of the same type")
@pytest.mark.parametrize("algorithm", [SACV, SAC])
def test_other_callbacks_resume(algorithm, tmp_path):
    """The best mean reward and the evaluations, and what stops a training after so many episodes."""

    def callbacks(folder: Path, resume: bool) -> list[BaseCallback]:
        patience = StopTrainingOnNoModelImprovement(1000, min_evals=2)
        options: dict[str, Any] = dict(eval_freq=25, n_eval_episodes=1, verbose=0, log_path=str(folder / "evaluations"))
        evaluation = EvalCallback(Monitor(short_pendulum()), callback_after_eval=patience, **options)
        evaluation.eval_env.seed(0)
        return [ResumableCheckpoint(folder / "run", 50, resume=resume), evaluation, StopTrainingOnMaxEpisodes(9)]

    whole = callbacks(tmp_path / "whole", False)
    model = make(algorithm=algorithm).learn(1000, callback=whole)
    assert model.num_timesteps == 225
    with pytest.raises(KeyboardInterrupt):
        make(algorithm=algorithm).learn(1000, callback=[*callbacks(tmp_path / "run", False), Stop(170)])
    again = callbacks(tmp_path / "run", True)
    other = make(algorithm=algorithm, seed=9).learn(1000, callback=again)
    assert other.num_timesteps == 225
    assert_same(everything(other), everything(model))
    times = [each[1].evaluations_timesteps for each in (whole, again)]
    assert times[0] == times[1] and times[0][0] == 25 and [each[1].n_calls for each in (whole, again)] == [225, 225]
    assert len(again[1].evaluations_results) == len(times[1]) and again[2].n_episodes == 9
    # The evaluation environment is not of the training, so that its rewards are others after the kill
    assert again[1].evaluations_results[:6] == whole[1].evaluations_results[:6]
    assert again[1].best_mean_reward >= max(map(np.mean, again[1].evaluations_results[:6]))
    assert np.load(tmp_path / "run" / "evaluations" / "evaluations.npz")["timesteps"].tolist() == times[0]


class Counts(BaseCallback):
    """Keeps numbers of several types, and one that is None until its first step."""

    def __init__(self) -> None:
        super().__init__()
        self.count, self.mean, self.is_late, self.best = np.int64(0), np.float32(0), np.bool_(False), None
        self.first: list[Any] = []

    def _on_rollout_start(self) -> None:
        self.first = self.first or [self.count, self.mean, self.is_late, self.best]

    def _on_step(self) -> bool:
        self.count, self.mean, self.is_late = self.count + 1, self.mean + np.float32(0.5), np.bool_(True)
        self.best = float(self.count)
        return True


def test_numbers_of_numpy_and_none_resume(tmp_path):
    """They were lost without a word."""
    make().learn(50, callback=[ResumableCheckpoint(tmp_path, 50), Counts()])
    make().learn(75, callback=[ResumableCheckpoint(tmp_path, 50, resume=True), counts := Counts()])
    assert counts.first == [50, 25.0, True, 50.0] and counts.best == 75.0


@pytest.mark.parametrize("algorithm", [SACV, SAC])
@pytest.mark.parametrize("kind", ["pickle", "cloudpickle", "deepcopy", "copy", "save"])
def test_copies_of_the_model_while_it_learns(kind, algorithm, tmp_path):
    """The model is of a subclass meanwhile, its environments have a recorder: copies are as those of a plain model."""
    make_copy = {
        "pickle": lambda model: pickle.loads(pickle.dumps(model)),
        "cloudpickle": lambda model: pickle.loads(cloudpickle.dumps(model)),
        "deepcopy": copy.deepcopy,
        "copy": copy.copy,
        "save": lambda model: (model.save(tmp_path / "model"), algorithm.load(tmp_path / "model", env=model.env))[1],
    }[kind]

    def copied(*callbacks: BaseCallback) -> Any:
        copies: list[Any] = []
        model = make(algorithm=algorithm)
        model.learn(100, callback=[*callbacks, At(60, lambda: copies.append(make_copy(model)))])
        if kind in ("copy", "save"):  # they share the environment
            return copies[0]
        th.manual_seed(0)
        return copies[0].learn(60, reset_num_timesteps=False)

    with_it, without = copied(ResumableCheckpoint(tmp_path / "run", 30)), copied()
    assert type(with_it) is algorithm and with_it.num_timesteps == without.num_timesteps
    assert_same(with_it.get_parameters(), without.get_parameters())
    # And it can be checkpointed itself
    if kind not in ("copy", "save"):
        with_it.learn(60, reset_num_timesteps=False, callback=ResumableCheckpoint(tmp_path / "copy", 30))
        load_checkpoint(make(algorithm=algorithm), tmp_path / "copy")
        assert type(with_it) is algorithm
