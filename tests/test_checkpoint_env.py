"""Where ``load_checkpoint`` says that a training continues exactly it does, and where it cannot know it says so."""

import zipfile
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium.wrappers import NormalizeObservation, NormalizeReward, RecordEpisodeStatistics, StickyAction, TransformReward
from stable_baselines3 import SAC
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnvWrapper, VecNormalize

from sb3_softvalue import SACV
from sb3_softvalue.checkpoint import CheckpointError, ResumableCheckpoint, Resumed, load_checkpoint, save_checkpoint
from tests.helpers import PointGoalEnv, assert_same
from tests.test_checkpoint import everything, kill, make, short_pendulum, state_of


class Curriculum(gym.Wrapper):
    """Rewards shrink from episode to episode."""

    def __init__(self, env: gym.Env):
        super().__init__(env)
        self.episodes = 0

    def reset(self, **kwargs: Any) -> Any:
        self.episodes += 1
        return super().reset(**kwargs)

    def step(self, action: Any) -> Any:
        observation, reward, *rest = super().step(action)
        return observation, float(reward) / self.episodes, *rest


class KnownCurriculum(Curriculum):
    """It says what it keeps."""

    broken = ""

    def reset(self, **kwargs: Any) -> Any:
        if self.broken == "reset":
            raise RuntimeError("broken")
        return super().reset(**kwargs)

    def get_state(self) -> dict[str, Any]:
        return {"episodes": self.episodes}

    def set_state(self, state: dict[str, Any]) -> None:
        if self.broken == "set_state":
            raise RuntimeError("broken")
        self.episodes = state["episodes"]


class OwnGenerator(gym.Wrapper):
    """Draws from a generator that ``reset(seed)`` knows nothing of, and keeps an array."""

    def __init__(self, env: gym.Env):
        super().__init__(env)
        self.rng, self.drift = np.random.default_rng(5), np.zeros(3)

    def step(self, action: Any) -> Any:
        self.drift += self.rng.normal(size=3) / 100
        observation, *rest = super().step(action)
        return (observation + self.drift).astype(np.float32), *rest

    def get_state(self) -> dict[str, Any]:
        return {"rng": self.rng, "drift": self.drift.copy()}

    def set_state(self, state: dict[str, Any]) -> None:
        self.rng, self.drift = state["rng"], state["drift"]


WRAPPERS: dict[str, Any] = {
    "NormalizeReward": lambda: Monitor(NormalizeReward(short_pendulum())),
    "NormalizeObservation": lambda: NormalizeObservation(RecordEpisodeStatistics(short_pendulum())),
    "draws in step": lambda: StickyAction(short_pendulum(), 0.3),
    "curriculum": lambda: KnownCurriculum(Monitor(short_pendulum())),
    "own generator": lambda: Monitor(OwnGenerator(short_pendulum())),
    "three": lambda: NormalizeReward(KnownCurriculum(OwnGenerator(short_pendulum()))),
}


def resumed(folder: Path, env: list[Any], total: int, **options: Any) -> tuple[Any, Resumed]:
    """Trained with a kill."""
    kill(make(env=env, **options), total, folder)
    model = make(env=env, seed=99, **options)
    result = load_checkpoint(model, folder)
    model.learn(total - model.num_timesteps, reset_num_timesteps=False)
    return model, result


@pytest.mark.parametrize("name", WRAPPERS)
@pytest.mark.parametrize("algorithm", [SACV, SAC])
def test_wrappers_with_a_state(algorithm, name, tmp_path):
    env = [WRAPPERS[name]] * 2
    whole = make(env=env, algorithm=algorithm).learn(400, callback=ResumableCheckpoint(tmp_path / "whole", 50))
    model, result = resumed(tmp_path / "run", env, 400, algorithm=algorithm)
    assert result and str(result).endswith("exactly")
    assert_same(state_of(model), state_of(whole))


def test_an_environment_without_early_resets_resumes(tmp_path):
    """``learn()`` has reset it already, and its Monitor refuses another reset."""
    env: Any = [lambda: Monitor(short_pendulum(), allow_early_resets=False)]
    make(env=env).learn(60, callback=ResumableCheckpoint(tmp_path, 25))
    model = make(env=env, seed=3).learn(80, callback=ResumableCheckpoint(tmp_path, 25, resume=True))
    assert model.num_timesteps == 80


def test_in_processes_of_their_own(tmp_path):
    env: Any = [WRAPPERS["three"]] * 2

    def subprocesses(seed: int) -> Any:
        model = make(env=env, seed=seed)
        model.set_env(SubprocVecEnv(env))
        model.set_random_seed(seed)
        return model

    whole = subprocesses(0).learn(400, callback=ResumableCheckpoint(tmp_path / "whole", 50))
    killed = subprocesses(0)
    kill(killed, 400, tmp_path / "run")
    model = subprocesses(99)
    assert load_checkpoint(model, tmp_path / "run")
    model.learn(400 - model.num_timesteps, reset_num_timesteps=False)
    assert_same(state_of(model), state_of(whole))
    for each in (whole, killed, model):
        each.env.close()


class PlainGoalEnv(PointGoalEnv):
    """Of which nothing is known."""

    get_state = None  # type: ignore[assignment]  # taken away


class OwnVecWrapper(VecEnvWrapper):
    """One of somebody's own."""

    def reset(self) -> Any:
        return self.venv.reset()

    def step_wait(self) -> Any:
        return self.venv.step_wait()


@pytest.mark.parametrize(
    "env, name",
    [
        (lambda: Curriculum(short_pendulum()), "Curriculum"),
        (lambda: TransformReward(short_pendulum(), lambda reward: reward), "TransformReward"),
    ],
)
def test_what_is_not_known_is_named(env, name, tmp_path):
    _, result = resumed(tmp_path, [env], 200)
    assert not result and f"{name} may keep more than get_state() says" in str(result)


def test_what_is_not_known_of_environments_is_named(tmp_path):
    _, result = resumed(tmp_path / "goal", [PlainGoalEnv], 200, name="HER")
    assert not result and "PlainGoalEnv may keep more" in str(result)
    models = []
    for seed in range(2):
        models.append(make(seed=seed))
        models[-1].set_env(OwnVecWrapper(DummyVecEnv([short_pendulum])))
    kill(models[0], 200, tmp_path / "vec")
    assert "OwnVecWrapper may keep more" in str(load_checkpoint(models[1], tmp_path / "vec"))


def test_a_reset_that_was_not_recorded_is_named(tmp_path):
    """The middle of an episode was named, where one had just begun."""
    save_checkpoint(make().learn(100), tmp_path)
    result = load_checkpoint(make(), tmp_path)
    assert result.why == ("the environments' states before their last reset are not known: train with ResumableCheckpoint",)


def test_a_state_that_cannot_be_stored_is_named(tmp_path):
    class Odd(KnownCurriculum):
        def get_state(self) -> dict[str, Any]:
            return {"what": object()}

    kill(make(env=[lambda: Odd(short_pendulum())]), 200, tmp_path)
    result = load_checkpoint(make(env=[lambda: KnownCurriculum(short_pendulum())]), tmp_path)
    assert not result and "its state holds a object" in str(result)


@pytest.mark.parametrize("method", ["reset", "set_state"])
def test_an_environment_that_raises_leaves_the_model_as_it_was(method, tmp_path):
    """A reset that raised left the model half changed."""
    env: Any = [lambda: KnownCurriculum(short_pendulum())]
    kill(make(env=env, normalize=True), 200, tmp_path)
    model = make(env=env, normalize=True, seed=3).learn(50)
    before = {key: value for key, value in state_of(model).items() if key != "last"}
    before = {**before, "parameters": everything(model)}

    layer = model.env.envs[0]
    layer.broken = method
    with pytest.raises(CheckpointError, match=r"The environments could not be reset \(.*broken\): the model is as before"):
        load_checkpoint(model, tmp_path)
    after = {key: value for key, value in state_of(model).items() if key != "last"}
    assert_same({**after, "parameters": everything(model)}, before)
    layer.broken = ""
    model.learn(30, reset_num_timesteps=False)


@pytest.mark.parametrize("returns", [np.nan, 5.0])
def test_returns_of_vec_normalize_begin_anew(returns, tmp_path):
    """They were those of the old episode, or NaN for ever after a reward that was."""
    model = make("VecNormalize").learn(110)
    model.env.returns[:] = returns
    save_checkpoint(model, tmp_path)
    other = make("VecNormalize", seed=3)
    assert not load_checkpoint(other, tmp_path)
    assert other.env.returns == 0.0
    other.learn(30, reset_num_timesteps=False)
    assert np.isfinite(other.env.ret_rms.var)


@pytest.mark.parametrize("algorithm", [SACV, SAC])
def test_what_could_not_be_loaded_is_not_written(algorithm, tmp_path):
    """After a NaN the last good checkpoint stays."""
    model = make("VecNormalize", algorithm=algorithm).learn(110)
    save_checkpoint(model, tmp_path)
    model.env.ret_rms.var = np.float64(np.nan)
    with pytest.raises(
        CheckpointError, match=r"could not be continued from here \(state.VecNormalize.returns.var holds numbers"
    ):
        save_checkpoint(model, tmp_path)
    model.env.ret_rms.var = np.float64(1.0)
    with th.no_grad():
        next(model.policy.actor.parameters()).fill_(np.nan)
    with pytest.raises(CheckpointError, match=r"could not be continued from here \(tensors.parameters.policy.actor"):
        save_checkpoint(model, tmp_path)
    load_checkpoint(make("VecNormalize", algorithm=algorithm), tmp_path)


def test_another_number_of_threads_is_told(tmp_path):
    kill(make(), 200, tmp_path)
    th.set_num_threads(2)
    try:
        result = load_checkpoint(make(), tmp_path)
    finally:
        th.set_num_threads(1)
    assert not result and result.why == ("number of threads is 2, was 1",)


@pytest.mark.parametrize(
    "before, after, what",
    [
        ({}, dict(gamma=0.9), "gamma is 0.9, was 0.99"),
        ({}, dict(reward_scale=2.0), "reward_scale is 2.0, was 1.0"),
        ({}, dict(action_prior="normal"), "action_prior is normal, was uniform"),
        ({}, dict(learning_rate=1e-4), "learning_rate is 0.0001, was 0.0003"),
        ({}, dict(train_freq=(1, "episode")), r"train_freq is \[1, 'episode'\], was \[1, 'step'\]"),
        (dict(name="HER"), dict(replay_buffer_kwargs=dict(n_sampled_goal=2)), "replay buffer's n_sampled_goal is 2, was 4"),
        ({}, dict(env=[lambda: gym.make("Pendulum-v1", max_episode_steps=25, g=9.0)]), None),
    ],
)
def test_other_options_are_told(before, after, what, tmp_path):
    """They take effect, and the training is another."""
    kill(make(**before), 200, tmp_path)
    model = make(**before, **after)
    if what is None:  # what an environment is told is not to be seen from outside
        load_checkpoint(model, tmp_path)
        return
    with pytest.warns(UserWarning, match=f"continues with other options than before: {what}"):
        result = load_checkpoint(model, tmp_path)
    assert not result
    model.learn(30, reset_num_timesteps=False)


def test_another_task_is_told(tmp_path):
    gym.register("OtherPendulum-v0", "gymnasium.envs.classic_control.pendulum:PendulumEnv", max_episode_steps=25)
    kill(make(), 200, tmp_path)
    with pytest.warns(UserWarning, match="task is OtherPendulum-v0, was Pendulum-v1"):
        assert not load_checkpoint(make(env=[lambda: gym.make("OtherPendulum-v0")]), tmp_path)


@pytest.mark.parametrize("algorithm", [SACV, SAC])
def test_a_fixed_temperature_is_the_constructors(algorithm, tmp_path):
    """It was shown, and that of the checkpoint was used."""
    kill(make("fixed temperature", algorithm=algorithm), 200, tmp_path)
    model = make(ent_coef=0.5, algorithm=algorithm)
    with pytest.warns(UserWarning, match="ent_coef is 0.5, was 0.1"):
        load_checkpoint(model, tmp_path)
    assert model.ent_coef_tensor == 0.5
    model.learn(30, reset_num_timesteps=False)
    assert model.ent_coef_tensor == 0.5


def test_gsde_generators_are_not_rewound(tmp_path):
    """The callback put them back a second time, at the first rollout."""
    kill(make("gSDE"), 200, tmp_path)
    parameters = []
    for seed in (1, 2):
        model = make("gSDE")
        load_checkpoint(model, tmp_path)
        th.manual_seed(seed)
        callback = ResumableCheckpoint(tmp_path / str(seed), 1_000)
        model.learn(20, reset_num_timesteps=False, callback=callback)
        parameters.append(model.policy.state_dict()["actor.mu.0.weight"].clone())
    assert not th.equal(*parameters)


OLD = Path(__file__).parent / "data" / "checkpoints-0.1.0.zip"


@pytest.mark.parametrize("name, steps", [("plain", 100), ("normalized", 200), ("gSDE", 100), ("HER", 105)])
def test_checkpoints_of_version_0_1_0(name, steps, tmp_path):
    """They are read, and the next ones beside them are of the present format."""
    zipfile.ZipFile(OLD).extractall(tmp_path)
    options: dict[str, Any] = {
        "plain": {},
        "normalized": dict(name="noise of two environments", normalize=True),
        "gSDE": dict(name="gSDE"),
        "HER": dict(name="HER"),
    }[name]
    model = make(buffer_size=300, seed=3, **options)
    result = load_checkpoint(model, tmp_path / name)
    assert model.num_timesteps == steps and model._n_updates > 0
    assert not result and "the environments' states are not known" in str(result)
    assert np.any(model.replay_buffer.rewards[: steps // model.n_envs])
    model.learn(60, reset_num_timesteps=False, callback=ResumableCheckpoint(tmp_path / name, 30))
    other = make(buffer_size=300, seed=4, **options)
    load_checkpoint(other, tmp_path / name)
    assert_same(everything(other), everything(model))


def test_only_the_model_is_written_to(tmp_path):
    """A model that was loaded shares no memory with another that was loaded from the same file."""
    kill(make(), 200, tmp_path)
    models: list[OffPolicyAlgorithm] = [make(seed=seed) for seed in (1, 2)]
    for model in models:
        load_checkpoint(model, tmp_path)
    models[0].learn(30, reset_num_timesteps=False)
    again = make(seed=3)
    load_checkpoint(again, tmp_path)
    assert_same(everything(models[1]), everything(again))


def test_a_vec_normalize_inside(tmp_path):
    """Whatever is wrapped around it."""

    def model(seed: int) -> Any:
        model = make(seed=seed)
        model.set_env(OwnVecWrapper(VecNormalize(DummyVecEnv([short_pendulum]))))
        return model

    first = model(0).learn(110)
    save_checkpoint(first, tmp_path)
    other = model(3)
    load_checkpoint(other, tmp_path)
    for name in ("mean", "var", "count"):
        assert np.array_equal(getattr(other.env.venv.obs_rms, name), getattr(first.env.venv.obs_rms, name))
