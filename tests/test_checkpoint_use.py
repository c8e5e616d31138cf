"""Checkpoints as scripts use them: totals, names of folders, interrupts, errors, and what is refused before it costs."""

import contextlib
import errno
import gc
import io
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from stable_baselines3 import PPO
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.noise import NormalActionNoise, OrnsteinUhlenbeckActionNoise
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecNormalize
from stable_baselines3.sac.sac import SAC

from sb3_softvalue import SACV
from sb3_softvalue.checkpoint import CheckpointError, ResumableCheckpoint, has_checkpoint, load_checkpoint, save_checkpoint
from sb3_softvalue.checkpoint.folder import checkpoints
from tests.helpers import assert_same
from tests.test_checkpoint import claimed_elsewhere, everything, make, short_pendulum


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
    assert model.num_timesteps == 100
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
    other = make(train_freq=train_freq)
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

    model, callbacks = make(), [ResumableCheckpoint(tmp_path, 30), At(60, fail)]
    with pytest.raises(RuntimeError, match="of another callback"):
        model.learn(100, callback=callbacks)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert type(model) is SACV and "on_training_end" not in vars(callbacks[0])
    # Two of them share what they do to the model
    model.learn(60, callback=[ResumableCheckpoint(tmp_path / "a", 30), ResumableCheckpoint(tmp_path / "b", 40)])
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler and type(model) is SACV


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
    other = make(env=[short_pendulum] * 2, train_freq=8)
    assert not other.load_checkpoint(tmp_path)
    assert_same(everything(other), everything(model))
    assert other.num_timesteps == 124
    # As a script ends
    model.env.close()
    assert not any(process.is_alive() for process in env.processes)


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_interrupted_in_train_with_the_processes_of_its_environments(tmp_path):
    """It stops before the next rollout, where nothing fails: ``close()`` raised, and Monitor was blamed for the states."""
    env = SubprocVecEnv([lambda: Monitor(short_pendulum())] * 2, start_method="fork")
    model = SACV("MlpPolicy", env, learning_starts=40, batch_size=16, policy_kwargs=dict(net_arch=[16]), buffer_size=500)

    def interrupt_all(*_: Any) -> None:
        hook.remove()
        for process in env.processes:
            process.terminate()
            process.join()
        signal.raise_signal(signal.SIGTERM)

    hook = model.actor.mu.register_forward_hook(lambda *_: interrupt_all() if th.is_grad_enabled() else None)
    model.learn(400, callback=ResumableCheckpoint(tmp_path, 50))
    assert model.num_timesteps < 50
    model.env.close()
    other = make(env=[lambda: Monitor(short_pendulum())] * 2)
    assert "not known: their processes had ended" in str(other.load_checkpoint(tmp_path))


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
    pytest.importorskip("fcntl", reason="this system has no file locks")
    code = f"import fcntl; fcntl.flock(open({str(folder / '.lock')!r}, 'w'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    return subprocess.run([sys.executable, "-c", code], stderr=subprocess.DEVNULL).returncode != 0


def n_open() -> int:
    """Number of open files of this process."""
    gc.collect()
    return len(os.listdir("/dev/fd"))


@pytest.mark.parametrize("algorithm", [SACV, SAC])
def test_the_folder_is_claimed_while_it_trains(algorithm, tmp_path):
    """Not afterwards, however it ended and whatever it has forked, and again if the folder was removed."""
    folder, seen, before = tmp_path / "run", [], n_open()

    def look() -> None:
        seen.append(is_claimed(folder))

    for end in (lambda: None, lambda: 1 // 0):
        model = make(algorithm=algorithm)
        callbacks = [ResumableCheckpoint(folder, 30), At(40, look), At(50, end)]
        with contextlib.suppress(ZeroDivisionError):
            model.learn(60, callback=callbacks)
        assert not is_claimed(folder) and n_open() == before and type(model) is algorithm
        shutil.rmtree(folder)
    # A failing update, of which no callback is told
    model = make(algorithm=algorithm)
    model.policy.actor.mu.register_forward_hook(
        lambda *_: 1 // 0 if model.num_timesteps == 50 and th.is_grad_enabled() else None
    )
    with pytest.raises(ZeroDivisionError):
        model.learn(60, callback=[ResumableCheckpoint(folder, 30), At(40, look)])
    assert not is_claimed(folder) and n_open() == before and type(model) is algorithm
    # That of a loop of one's own for as long as it writes
    save_checkpoint(model, folder)
    assert not is_claimed(folder) and n_open() == before
    assert seen == [True] * 3


def test_a_forked_process_has_claimed_nothing(tmp_path):
    """Nor does it keep the claim when its parent has ended."""
    seen = []

    def fork() -> None:
        read_end, write_end = os.pipe()
        if os.fork() == 0:
            os.close(write_end)
            os.read(read_end, 1)
            os._exit(0)
        seen.extend([read_end, write_end, is_claimed(tmp_path)])

    make().learn(60, callback=[ResumableCheckpoint(tmp_path, 30), At(40, fork)])
    assert seen[2] and not is_claimed(tmp_path)
    os.close(seen[0])
    os.close(seen[1])
    os.wait()


def test_a_copy_of_the_folder_keeps_the_claim(tmp_path):
    """Whoever opened and closed the lock's file released it."""
    seen = []

    def copy() -> None:
        shutil.copytree(tmp_path / "run", tmp_path / "backup")
        seen.append(is_claimed(tmp_path / "run"))

    make().learn(60, callback=[ResumableCheckpoint(tmp_path / "run", 30), At(40, copy)])
    assert seen == [True] and not is_claimed(tmp_path / "run")


def test_many_folders(tmp_path):
    """A file was left open for each of them."""
    model, before = make().learn(5), n_open()
    for index in range(20):
        save_checkpoint(model, tmp_path / str(index))
    assert n_open() == before


def test_without_locks(tmp_path, monkeypatch):
    def none(*args: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", none)
    before = n_open()
    with pytest.warns(UserWarning, match=r"has no locks of files \(No locks available\): make sure that no other"):
        make().learn(60, callback=ResumableCheckpoint(tmp_path, 30))
    assert len(checkpoints(tmp_path)) == 2 and n_open() == before


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
        self.refused(PPO("MlpPolicy", short_pendulum()), folder, "of SB3's off-policy algorithms, got PPO")
        assert not folder.exists()

    def test_what_cannot_be_loaded(self, tmp_path):
        make().save_checkpoint(tmp_path)
        with pytest.raises(CheckpointError, match="of SB3's off-policy algorithms, got PPO"):
            load_checkpoint(PPO("MlpPolicy", short_pendulum()), tmp_path)

    def test_folders(self, tmp_path):
        tmp_path.joinpath("file").touch()
        self.refused(make(), tmp_path / "file", r"could not be written to .*file \(File exists\)")
        with claimed_elsewhere(tmp_path):
            self.refused(make(), tmp_path, "Another process writes checkpoints")
        self.refused(make(), tmp_path / ("n" * 300), r"The folder .*n cannot be read \(File name too long\)")

    def test_a_folder_that_is_read_only(self):
        """Though the lock's file of an earlier run can be written."""
        nobody = 65534
        if not hasattr(os, "seteuid") or os.geteuid() != 0:
            pytest.skip("needs root, to make a folder that another user cannot write to")
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
        with pytest.raises(CheckpointError, match=r"VecNormalize \[('observations', )?'returns'\], this one has"):
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
            (
                dict(net_arch=[8]),
                r"networks: actor.latent_pi.0.bias \['torch.float32', 16\], this one has \['torch.float32', 8\]: construct",
            ),
            (dict(net_arch=[16], n_critics=1), "networks: critic.qf1.0.bias .*, this one has None: construct"),
        ],
    )
    def test_what_differs_in_the_networks(self, kwargs, sentence, tmp_path):
        make().save_checkpoint(tmp_path)
        with pytest.raises(CheckpointError, match=sentence):
            make(policy_kwargs=kwargs).load_checkpoint(tmp_path)
