"""A training that was stopped and resumed is the one that was never stopped."""

import contextlib
import copy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from sb3_contrib import TQC
from stable_baselines3 import DDPG, SAC, TD3, HerReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.noise import ActionNoise, NormalActionNoise, OrnsteinUhlenbeckActionNoise
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_softvalue import SACV
from sb3_softvalue.checkpoint import CheckpointError, ResumableCheckpoint, has_checkpoint, load_checkpoint, save_checkpoint
from sb3_softvalue.checkpoint.folder import checkpoints
from sb3_softvalue.checkpoint.replay import arrays_of
from tests.helpers import PointGoalEnv, assert_same, rng_state


class Stop(BaseCallback):
    """Ends the training like a kill: nothing more is written."""

    def __init__(self, step: int):
        super().__init__()
        self.step = step

    def _on_step(self) -> bool:
        if self.num_timesteps >= self.step:
            raise KeyboardInterrupt
        return True


def short_pendulum() -> gym.Env:
    """Episodes of 25 steps."""
    return gym.make("Pendulum-v1", max_episode_steps=25)


def reacher() -> gym.Env:
    return gym.make("Reacher-v5", max_episode_steps=25)


ALGORITHMS: list[type[OffPolicyAlgorithm]] = [SACV, SAC]


@contextlib.contextmanager
def claimed_elsewhere(folder: Path) -> Iterator[None]:
    """Another process has claimed the folder."""
    pytest.importorskip("fcntl", reason="this system has no file locks")
    code = (
        f"import fcntl; f = open({str(folder / '.lock')!r}, 'w'); fcntl.flock(f, fcntl.LOCK_EX); print(1, flush=True); input()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=-1, stdout=-1, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None and process.stdout.readline()
        yield


SCENARIOS: dict[str, dict[str, Any]] = {
    "plain": {},
    "mujoco": dict(env=[reacher]),
    "two environments": dict(env=[short_pendulum] * 2),
    "VecNormalize": dict(normalize=True),
    "n-step": dict(n_steps=3),
    "fixed temperature": dict(ent_coef=0.1),
    "schedules": dict(learning_rate=lambda progress: 1e-3 * progress, reward_scale=lambda progress: 1.0 + progress),
    "noise": dict(action_noise=OrnsteinUhlenbeckActionNoise(np.zeros(1), 0.1 * np.ones(1))),
    "noise of two environments": dict(
        env=[short_pendulum] * 2, action_noise=OrnsteinUhlenbeckActionNoise(np.zeros(1), 0.1 * np.ones(1))
    ),
    "gSDE": dict(use_sde=True, sde_sample_freq=4),
    "memory-optimized": dict(optimize_memory_usage=True, replay_buffer_kwargs=dict(handle_timeout_termination=False)),
    "small buffer": dict(buffer_size=60),
    "several updates": dict(train_freq=5, gradient_steps=3),
    "HER": dict(env=[PointGoalEnv], policy="MultiInputPolicy", replay_buffer_class=HerReplayBuffer),
}


def make(name: str = "plain", seed: int = 0, algorithm: Any = SACV, **more: Any) -> Any:
    """The scenario's model, small."""
    options = {**SCENARIOS[name], **more}
    if algorithm is not SACV:
        options.pop("reward_scale", None)
    env: Any = DummyVecEnv(options.pop("env", [short_pendulum]))
    if options.pop("normalize", False):
        env = VecNormalize(env)
    defaults = dict(learning_starts=40, batch_size=16, policy_kwargs=dict(net_arch=[16]), buffer_size=500, seed=seed)
    return algorithm(options.pop("policy", "MlpPolicy"), env, **{**defaults, **options})


def everything(model: OffPolicyAlgorithm) -> dict[str, Any]:
    """Networks, optimizers, temperature and replay buffer."""
    buffer = model.replay_buffer
    rows = len(buffer.dones) if buffer.full else buffer.pos
    arrays = {name: array[:rows].copy() for name, array in arrays_of(buffer).items()}
    return {**copy.deepcopy(model.get_parameters()), "buffer": arrays, "pos": buffer.pos}


def state_of(model: OffPolicyAlgorithm) -> dict[str, Any]:
    """All that a training has come to."""
    env = model.get_vec_normalize_env()
    return {
        **everything(model),
        "rng": rng_state(),
        "counters": [model.num_timesteps, model._n_updates, model._episode_num],
        "last": model._last_obs,
        "statistics": None if env is None else [env.obs_rms.mean, env.obs_rms.var, env.ret_rms.var, env.returns],
        "episodes": [info["r"] for info in model.ep_info_buffer],
    }


def kill(model: OffPolicyAlgorithm, total: int, folder: Path) -> None:
    """Train, with checkpoints, and be gone before the end."""
    with pytest.raises(KeyboardInterrupt):
        model.learn(total, callback=[ResumableCheckpoint(folder, 50), Stop(total - 30)])


@pytest.mark.parametrize("name", SCENARIOS)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_resumed_at_an_episode_boundary_it_is_the_same_training(algorithm, name, tmp_path):
    total = 200 if "two" not in name else 400
    whole = make(name, algorithm=algorithm).learn(total, callback=ResumableCheckpoint(tmp_path / "whole", 50))
    kill(make(name, algorithm=algorithm), total, tmp_path / "killed")
    one = make(name, 99, algorithm)
    assert load_checkpoint(one, tmp_path / "killed")
    one.learn(total - one.num_timesteps, reset_num_timesteps=False)
    assert_same(state_of(one), state_of(whole))
    # In one call, which begins or continues
    other = make(name, 98, algorithm)
    other.learn(total, callback=ResumableCheckpoint(tmp_path / "killed", 50, resume=True))
    assert_same(state_of(other), state_of(whole))


@pytest.mark.parametrize("algorithm", [TD3, DDPG, TQC])
def test_every_off_policy_algorithm(algorithm, tmp_path):
    whole = make(algorithm=algorithm, normalize=True).learn(200, callback=ResumableCheckpoint(tmp_path / "whole", 50))
    kill(make(algorithm=algorithm, normalize=True), 200, tmp_path / "killed")
    model = make("VecNormalize", 99, algorithm).learn(200, callback=ResumableCheckpoint(tmp_path / "killed", resume=True))
    assert_same(state_of(model), state_of(whole))


def test_in_the_middle_of_an_episode_only_the_rest_of_it_is_lost(tmp_path):
    model = make().learn(110)
    model.save_checkpoint(tmp_path)
    before = state_of(model)
    other = make(seed=5)
    assert not other.load_checkpoint(tmp_path)
    after = state_of(other)
    assert_same({k: v for k, v in after.items() if k != "last"}, {k: v for k, v in before.items() if k != "last"})
    other.learn(50, reset_num_timesteps=False)
    assert other.num_timesteps == 160


@pytest.mark.parametrize("name", ["HER", "n-step", "memory-optimized"])
def test_open_episodes_are_cut(name, tmp_path):
    model = make(name).learn(110)
    model.save_checkpoint(tmp_path)
    other = make(name, seed=5)
    assert not other.load_checkpoint(tmp_path)
    buffer = other.replay_buffer
    if name == "HER":
        assert (buffer._current_ep_start == buffer.pos).all()
    assert buffer.dones[109] + buffer.timeouts[109] >= 1.0
    other.learn(20, reset_num_timesteps=False)


def test_a_checkpoint_does_not_change_the_training(tmp_path):
    assert_same(
        state_of(make().learn(150, callback=ResumableCheckpoint(tmp_path, 30))),
        state_of(make().learn(150, callback=ResumableCheckpoint(tmp_path / "rare", 10_000))),
    )
    assert_same(
        make().learn(150).get_parameters(),
        make().learn(150, callback=ResumableCheckpoint(tmp_path / "again", 30)).get_parameters(),
    )


def test_unchanged_blocks_are_not_written_again(tmp_path, monkeypatch):
    monkeypatch.setattr("sb3_softvalue.checkpoint.replay.BLOCK_BYTES", 400)
    model = make().learn(100)
    model.save_checkpoint(tmp_path)
    blocks = {path: path.stat().st_mtime_ns for path in (tmp_path / "replay").iterdir()}
    model.learn(10, reset_num_timesteps=False)
    model.save_checkpoint(tmp_path)
    kept = {path: path.stat().st_mtime_ns for path in blocks if path.exists()}
    assert kept == blocks and len(list((tmp_path / "replay").iterdir())) <= len(blocks) + 12
    for _ in range(3):
        model.learn(30, reset_num_timesteps=False)
        model.save_checkpoint(tmp_path)
    assert len(checkpoints(tmp_path)) == 2
    other = make(seed=3)
    other.load_checkpoint(tmp_path)
    assert_same(everything(other), everything(model))


def test_what_auto_came_to_is_kept(tmp_path):
    model = make().learn(60)
    model._resolved_execution = "compiled"
    model.save_checkpoint(tmp_path)
    other = make()
    other.load_checkpoint(tmp_path)
    other.learn(5, reset_num_timesteps=False)
    assert other._executor.resolved == "compiled"


class TestRefused:
    """One sentence each; the model and older checkpoints stay."""

    def test_nothing_there(self, tmp_path):
        assert not has_checkpoint(tmp_path)
        with pytest.raises(CheckpointError, match="There is no checkpoint in"):
            make().load_checkpoint(tmp_path)

    @pytest.mark.parametrize(
        "options, what",
        [
            (dict(buffer_size=400), "buffer size 500, this one has 400"),
            (dict(policy_kwargs=dict(net_arch=[8])), "networks"),
            (dict(ent_coef=0.2), "temperature"),
            (dict(n_steps=3), "replay buffer 'ReplayBuffer', this one has 'NStepReplayBuffer'"),
            (dict(env=[short_pendulum] * 2), "number of environments 1, this one has 2"),
            (dict(env=[reacher]), "observation space"),
            (dict(normalize=True), r"VecNormalize \[\], this one has \['observations', 'returns'\]"),
            (
                dict(policy_kwargs=dict(net_arch=[16], activation_fn=th.nn.Tanh)),
                "layers: actor.latent_pi.1 'ReLU', this one has 'Tanh'",
            ),
            (
                dict(policy_kwargs=dict(net_arch=[16], optimizer_class=th.optim.SGD)),
                "optimizers: actor.optimizer 'Adam', this one has 'SGD'",
            ),
            (
                dict(policy_kwargs=dict(net_arch=[16], optimizer_kwargs=dict(weight_decay=0.1))),
                "options: actor.optimizer.weight_decay 0, this one has 0.1",
            ),
        ],
    )
    def test_another_model(self, options, what, tmp_path):
        make().learn(50).save_checkpoint(tmp_path)
        other = make(**options)
        before = copy.deepcopy(everything(other))
        with pytest.raises(CheckpointError, match=what):
            other.load_checkpoint(tmp_path)
        assert_same(everything(other), before)

    def test_what_changes_nothing_but_the_speed_may_change(self, tmp_path):
        make().learn(50).save_checkpoint(tmp_path)
        other = make(policy_kwargs=dict(net_arch=[16], optimizer_kwargs=dict(foreach=True)))
        other.load_checkpoint(tmp_path)
        other.learn(50, reset_num_timesteps=False)

    def test_unknown_state(self, tmp_path):
        class Noise(NormalActionNoise):
            pass

        class Other(ActionNoise):
            def __call__(self) -> np.ndarray:
                return np.zeros(1)

        for noise in (Noise(np.zeros(1), np.ones(1)), Other()):
            with pytest.raises(CheckpointError, match=f"class {type(noise).__name__} may have state"):
                make(action_noise=noise).save_checkpoint(tmp_path / "run")
        assert not (tmp_path / "run").exists()
        model = make("HER", replay_buffer_kwargs=dict(copy_info_dict=True))
        with pytest.raises(CheckpointError, match="copy_info_dict"):
            model.save_checkpoint(tmp_path / "run")

    def test_disk_full(self, tmp_path, monkeypatch):
        model = make().learn(60)
        model.save_checkpoint(tmp_path)
        before = checkpoints(tmp_path)
        model.learn(20, reset_num_timesteps=False)

        def full(*args: Any) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("sb3_softvalue.checkpoint.folder.os.fsync", full)
        with pytest.raises(CheckpointError, match=r"could not be written to .* \(No space left on device\): make room"):
            model.save_checkpoint(tmp_path)
        monkeypatch.undo()
        assert checkpoints(tmp_path) == before
        make().load_checkpoint(tmp_path)

    def test_two_processes(self, tmp_path):
        with claimed_elsewhere(tmp_path), pytest.raises(CheckpointError, match="Another process writes checkpoints"):
            make().learn(10).save_checkpoint(tmp_path)
        make().learn(10).save_checkpoint(tmp_path)


def test_before_the_first_step(tmp_path):
    """The seeds of the first episodes are among what is kept."""
    whole = make()
    whole.save_checkpoint(tmp_path)
    whole.learn(60)
    other = make(seed=99)
    assert other.load_checkpoint(tmp_path)
    other.learn(60, reset_num_timesteps=False)
    assert_same(state_of(other), state_of(whole))


@pytest.mark.parametrize("name", ["plain", "two environments", "VecNormalize"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_before_the_first_step_within_learn(algorithm, name, tmp_path):
    """``learn()`` has reset the environments already, and the observation was lost."""
    env: Any = [lambda: Monitor(gym.wrappers.NormalizeReward(short_pendulum()), allow_early_resets=False)]
    env = env * 2 if "two" in name else env
    whole = make(name, algorithm=algorithm, env=env)
    save_checkpoint(whole, tmp_path)
    expected = state_of(whole.learn(60))
    other = make(name, 99, algorithm, env=env).learn(60, callback=ResumableCheckpoint(tmp_path, 100, resume=True))
    assert_same(state_of(other), expected)


def test_weights_only(tmp_path):
    """What is in the files is read by nothing that could run code."""
    make().learn(50).save_checkpoint(tmp_path)
    (path,) = checkpoints(tmp_path)
    assert sorted(file.name for file in path.iterdir()) == ["manifest.json", "state.json", "tensors.pt"]
    th.load(path / "tensors.pt", weights_only=True)
    for block in (tmp_path / "replay").iterdir():
        np.load(block, allow_pickle=False)
