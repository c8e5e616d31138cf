"""Checkpoints as scripts use them: totals, names of folders, interrupts, errors, and what is refused before it costs."""

import io
import os
import pathlib
import shutil
import signal
import tempfile
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback, EveryNTimesteps
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.noise import NormalActionNoise, OrnsteinUhlenbeckActionNoise
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecNormalize
from stable_baselines3.sac.sac import SAC

from sb3_softvalue import SACV
from sb3_softvalue.checkpoint import CheckpointError, ResumableCheckpoint, has_checkpoint, save_checkpoint
from sb3_softvalue.checkpoint.folder import checkpoints
from tests.helpers import assert_same
from tests.test_checkpoint import everything, make, short_pendulum


class At(BaseCallback):
    """Does something at one step."""

    def __init__(self, step: int, what: Any):
        super().__init__()
        self.step, self.what = step, what

    def _on_step(self) -> bool:
        if self.num_timesteps == self.step:
            self.what()
        return True


@pytest.fixture(autouse=True)
def interrupts() -> Any:
    """Ctrl-C as Python handles it, before and after."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupt() -> None:
    """As Ctrl-C does."""
    signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("total", [1e2, np.int64(100), np.float32(100)], ids=["float", "int64", "float32"])
def test_totals_that_are_no_int(total, tmp_path):
    make().learn(total, callback=ResumableCheckpoint(tmp_path, 50))
    model = make()
    assert model.load_checkpoint(tmp_path)
    assert model.num_timesteps == model._total_timesteps == 100
    model.learn(total, reset_num_timesteps=False).save_checkpoint(tmp_path)
    other = make()
    other.load_checkpoint(tmp_path)
    assert other.num_timesteps == 200


class Informative(gym.Wrapper):
    """Says more about each episode, in NumPy's types."""

    def step(self, action: Any) -> Any:
        observation, reward, terminated, truncated, info = super().step(action)
        more = dict(distance=np.float32(1.5), is_success=np.bool_(True), position=np.zeros(2), parts=(np.int64(3), "a"))
        return observation, reward, terminated, truncated, {**info, **more, "other": object()}


def test_infos_of_episodes(tmp_path):
    def env(*more: str) -> Any:
        keywords = ("distance", "is_success", "position", "parts", *more)
        return [lambda: Monitor(Informative(short_pendulum()), info_keywords=keywords)]

    make(env=env()).learn(60, callback=ResumableCheckpoint(tmp_path, 30))
    model = make(env=env())
    model.load_checkpoint(tmp_path)
    last = model.ep_info_buffer[-1]
    assert last["distance"] == 1.5 and last["is_success"] is True and last["position"] == [0.0, 0.0]
    with pytest.raises(CheckpointError, match=r"object is not JSON serializable.*info_keywords"):
        make(env=env("other")).learn(60).save_checkpoint(tmp_path / "other")


@pytest.mark.parametrize("name", ["checkpoint-pendulum", "checkpoint-000001", "a [b]*"])
def test_names_of_the_folder(name, tmp_path):
    folder = tmp_path / name
    model = make().learn(50)
    model.save_checkpoint(folder)
    (path,) = checkpoints(folder)
    for place in (folder, str(folder), path):
        assert has_checkpoint(place)
        other = make()
        other.load_checkpoint(place)
        assert_same(everything(other), everything(model))


def test_the_working_directory_may_change(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tmp_path.joinpath("elsewhere").mkdir()
    callbacks = [ResumableCheckpoint("kept", 30), At(40, lambda: os.chdir(tmp_path / "elsewhere"))]
    make().learn(60, callback=callbacks)
    assert len(checkpoints(tmp_path / "kept")) == 2 and not any((tmp_path / "elsewhere").iterdir())


def test_interrupt_in_the_last_rollout(tmp_path):
    callbacks = [ResumableCheckpoint(tmp_path, 30), At(90, interrupt)]
    model = make(train_freq=(1, "episode")).learn(100, callback=callbacks)
    other = make(train_freq=(1, "episode"))
    assert other.load_checkpoint(tmp_path) and other.num_timesteps == model.num_timesteps == 100


class Terminal(io.StringIO):
    """One that is gone, or one whose ``write()`` is not finished when the signal comes."""

    error: Exception | None = BrokenPipeError()
    said = 0

    def write(self, text: str) -> int:
        self.said += "Interrupted" in text
        if self.error:
            raise self.error
        return len(text)


@pytest.mark.parametrize("train_freq", [1, (1, "episode")], ids=str)
def test_interrupted_without_a_terminal(train_freq, tmp_path, monkeypatch):
    """The message went to a closed pipe where the signal came: its exception ended the training before the checkpoint."""
    monkeypatch.setattr("sys.stdout", terminal := Terminal())
    make(train_freq=train_freq).learn(100, callback=[ResumableCheckpoint(tmp_path, 30), At(64, interrupt)])
    other = make()
    other.load_checkpoint(tmp_path)
    assert other.num_timesteps >= 64 and terminal.said == 1


def test_interrupted_while_something_is_printed(tmp_path, monkeypatch):
    """A ``print()`` within another raises, if that is where the signal came."""
    monkeypatch.setattr("sys.stdout", terminal := Terminal())

    def printing() -> None:
        terminal.error = RuntimeError("reentrant call")
        interrupt()
        terminal.error = None

    make().learn(100, callback=[ResumableCheckpoint(tmp_path, 30), At(64, printing)])
    assert terminal.said == 1


def test_after_an_error_ctrl_c_interrupts_again(tmp_path):
    def fail() -> None:
        raise RuntimeError("of another callback")

    model = make()
    with pytest.raises(RuntimeError, match="of another callback"):
        model.learn(100, callback=[ResumableCheckpoint(tmp_path, 30), At(60, fail)])
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert "_when_learn_ends" not in vars(model)
    # Two of them undo what they did in the opposite order
    model.learn(60, callback=[ResumableCheckpoint(tmp_path / "a", 30), ResumableCheckpoint(tmp_path / "b", 40)])
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("start_method", ["fork", "forkserver"])
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_interrupted_with_the_processes_of_its_environments(start_method, number, tmp_path):
    """A terminal sends Ctrl-C to all of them, and many a scheduler its SIGTERM."""
    env = SubprocVecEnv([short_pendulum] * 2, start_method=start_method)

    def interrupt_all() -> None:
        for process in env.processes:
            os.kill(process.pid, number)
            process.join()
        signal.raise_signal(number)

    options = dict(learning_starts=40, batch_size=16, policy_kwargs=dict(net_arch=[16]), buffer_size=500, seed=0)
    model = SACV("MlpPolicy", env, train_freq=8, **options)
    model.learn(400, callback=[ResumableCheckpoint(tmp_path, 50), At(124, interrupt_all)])
    # The step that was answered is in it, with its transitions
    assert model.num_timesteps == 124 and model.replay_buffer.pos == 62
    other = make(env=[short_pendulum] * 2)
    assert not other.load_checkpoint(tmp_path)
    assert_same(everything(other), everything(model))
    assert other.num_timesteps == 124
    # As a script ends
    model.env.close()
    assert not any(process.is_alive() for process in env.processes)


def test_an_environment_that_dies_is_an_error(tmp_path):
    """No interrupt has come."""
    env = SubprocVecEnv([short_pendulum] * 2)
    model = SACV("MlpPolicy", env, learning_starts=1_000, buffer_size=500)
    with pytest.raises((EOFError, ConnectionError)):
        model.learn(400, callback=[ResumableCheckpoint(tmp_path, 50), At(120, env.processes[0].kill)])
    for process in env.processes:
        process.kill()


def is_claimed(folder: Any) -> bool:
    """Whether another process would be refused."""
    fcntl = pytest.importorskip("fcntl", reason="locks of files are not to be had on this system")
    with open(folder / ".lock", "wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def test_the_folder_is_claimed_while_it_trains(tmp_path):
    """Not afterwards, when the process may stay open, and again if the folder was removed."""
    folder, seen = tmp_path / "run", []
    callbacks = [ResumableCheckpoint(folder, 30), At(40, lambda: seen.append(is_claimed(folder)))]
    for _ in range(2):
        model = make().learn(60, callback=callbacks)
        assert not is_claimed(folder)
        shutil.rmtree(folder)
    with pytest.raises(ZeroDivisionError):
        make().learn(60, callback=[*callbacks, At(50, lambda: 1 // 0)])
    assert not is_claimed(folder)
    assert seen == [True] * 3
    # That of a loop of one's own until the process ends
    model.save_checkpoint(folder)
    assert is_claimed(folder)
    n_open = len(os.listdir("/dev/fd"))
    shutil.rmtree(folder)
    model.save_checkpoint(folder)
    assert is_claimed(folder) and len(os.listdir("/dev/fd")) == n_open


def test_a_forked_process_has_claimed_nothing(tmp_path, monkeypatch):
    pytest.importorskip("fcntl", reason="locks of files are not to be had on this system")
    model = make().learn(20)
    model.save_checkpoint(tmp_path)
    model.save_checkpoint(tmp_path)
    monkeypatch.setattr("sb3_softvalue.checkpoint.folder.os.getpid", lambda: 1)
    with pytest.raises(CheckpointError, match="or has done so and still runs: end it"):
        model.save_checkpoint(tmp_path)


class TestRefusedAtOnce:
    """Not after the first 10,000 steps, which would be lost."""

    def refused(self, model: Any, folder: Any, match: str) -> None:
        with pytest.raises(CheckpointError, match=match):
            model.learn(100, callback=ResumableCheckpoint(folder, 50))
        assert model.num_timesteps == 0

    def test_what_cannot_be_stored(self, tmp_path):
        class Buffer(ReplayBuffer):
            pass

        class Noise(NormalActionNoise):
            pass

        folder = tmp_path / "run"
        self.refused(make(replay_buffer_class=Buffer), folder, "replay buffer of class Buffer")
        self.refused(make(action_noise=Noise(np.zeros(1), np.ones(1))), folder, "action noise of class Noise")
        self.refused(make("HER", replay_buffer_kwargs=dict(copy_info_dict=True)), folder, "copy_info_dict")
        self.refused(SAC("MlpPolicy", short_pendulum()), folder, "ResumableCheckpoint is for SACV, got SAC")
        assert not folder.exists()

    def test_folders(self, tmp_path):
        tmp_path.joinpath("file").touch()
        self.refused(make(), tmp_path / "file", r"could not be written to .*file \(File exists\)")
        fcntl = pytest.importorskip("fcntl", reason="locks of files are not to be had on this system")
        with open(tmp_path / ".lock", "wb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            self.refused(make(), tmp_path, "Another process writes checkpoints")

    def test_a_folder_that_is_read_only(self):
        """Though the lock's file of an earlier run can be written."""
        nobody = 65534
        if not hasattr(os, "seteuid") or os.geteuid() != 0:
            pytest.skip("only root can make a folder that somebody else cannot write to")
        with tempfile.TemporaryDirectory() as name:
            folder = pathlib.Path(name)
            folder.joinpath(".lock").touch()
            folder.joinpath(".lock").chmod(0o666)
            folder.chmod(0o555)
            model = make()
            os.seteuid(nobody)
            try:
                self.refused(model, folder, "could not be written to .* \\(Permission denied\\)")
            finally:
                os.seteuid(0)

    def test_callbacks_that_tell_it_of_steps_only(self, tmp_path):
        env = DummyVecEnv([short_pendulum])
        evaluations = EvalCallback(env, callback_on_new_best=ResumableCheckpoint(tmp_path, 50))
        for callback in (EveryNTimesteps(50, ResumableCheckpoint(tmp_path, 50)), evaluations):
            with pytest.raises(ValueError, match=f"cannot be called by {type(callback).__name__}"):
                make().learn(100, callback=callback)

    @pytest.mark.parametrize("keep", [0, -1, 1.5, None])
    def test_keep(self, keep, tmp_path):
        with pytest.raises(ValueError, match="keep must be a whole number of at least 1"):
            save_checkpoint(make(), tmp_path, keep=keep)


class TestOtherModels:
    """Named before anything of the model is changed."""

    @pytest.mark.parametrize("before, after", [(False, True), (True, False)])
    def test_other_statistics(self, before, after, tmp_path):
        def model(norm_obs: bool) -> Any:
            model = make()
            model.set_env(VecNormalize(DummyVecEnv([short_pendulum]), norm_obs=norm_obs))
            return model

        model(before).learn(60).save_checkpoint(tmp_path)
        other = model(after)
        state = everything(other)
        with pytest.raises(CheckpointError, match=r"VecNormalize has statistics of returns(, observations)?, the model's of"):
            other.load_checkpoint(tmp_path)
        assert_same(everything(other), state)

    def test_other_noise_of_several_environments(self, tmp_path):
        noises = [kind(np.zeros(1), np.ones(1)) for kind in (NormalActionNoise, OrnsteinUhlenbeckActionNoise)]
        make("two environments", action_noise=noises[0]).learn(20).save_checkpoint(tmp_path)
        with pytest.raises(CheckpointError, match="action noise 'NormalActionNoise', this one has 'OrnsteinUhlenbeckActionN"):
            make("two environments", action_noise=noises[1], seed=3).load_checkpoint(tmp_path)

    @pytest.mark.parametrize(
        "kwargs, sentence",
        [
            (dict(net_arch=[8]), r"networks of shape \[16, 3\], this one has \[8, 3\]: construct"),
            (dict(net_arch=[16], n_critics=1), "networks of 22 tensors, this one has 18 tensors: construct"),
        ],
    )
    def test_what_differs_in_the_networks(self, kwargs, sentence, tmp_path):
        make().save_checkpoint(tmp_path)
        with pytest.raises(CheckpointError, match=sentence):
            make(policy_kwargs=kwargs).load_checkpoint(tmp_path)
