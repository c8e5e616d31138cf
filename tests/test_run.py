"""Every kind of environment, buffer and exploration that SAC runs with."""

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import HerReplayBuffer
from stable_baselines3.common.callbacks import CallbackList, CheckpointCallback, EvalCallback
from stable_baselines3.common.env_checker import check_env
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import BitFlippingEnv, FakeImageEnv
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.noise import NormalActionNoise, OrnsteinUhlenbeckActionNoise, VectorizedActionNoise
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack, VecNormalize

from tests.helpers import MODEL_LIST, PointGoalEnv, RandomEnv, ReacherGoalEnv, box_env, dict_space, save_and_load, small

TWO = np.zeros(2)
IMAGE_KWARGS = dict(net_arch=[8], features_extractor_kwargs=dict(features_dim=8))


def check_run(model_class: Any, env: Any, policy: str, path: Any, n_steps: int = 30, **options: Any) -> Any:
    """Learn, with finite losses; predict, save, load, predict the same."""
    model = small(model_class, env, policy, **options)
    model.learn(n_steps)
    assert model._n_updates > 0
    losses = {name: value for name, value in model.logger.name_to_value.items() if name.startswith("train/")}
    assert {"train/actor_loss", "train/critic_loss"} <= set(losses)
    assert all(np.isfinite(value) for value in losses.values())
    assert all(th.isfinite(param).all() for param in model.policy.parameters())

    vec_env = model.get_env()
    observation = vec_env.reset()
    action, _ = model.predict(observation, deterministic=True)
    assert action.shape == (vec_env.num_envs, *vec_env.action_space.shape)
    assert np.all(action >= vec_env.action_space.low - 1e-6) and np.all(action <= vec_env.action_space.high + 1e-6)
    loaded = save_and_load(model, path)
    np.testing.assert_array_equal(loaded.predict(observation, deterministic=True)[0], action)
    loaded.learn(5, reset_num_timesteps=False)
    return model


EXPLORATION: dict[str, dict[str, Any]] = {
    "default": {},
    "normal noise": dict(action_noise=NormalActionNoise(TWO, 0.1 * np.ones(2))),
    "correlated noise": dict(action_noise=OrnsteinUhlenbeckActionNoise(TWO, 0.1 * np.ones(2))),
    "gSDE": dict(use_sde=True),
    "gSDE, often": dict(use_sde=True, sde_sample_freq=4, use_sde_at_warmup=True),
    "memory": dict(optimize_memory_usage=True, replay_buffer_kwargs=dict(handle_timeout_termination=False), buffer_size=25),
    "small buffer": dict(buffer_size=20),
    "episodes": dict(train_freq=(1, "episode"), gradient_steps=-1),
    "fixed temperature": dict(ent_coef=0.1),
}


@pytest.mark.parametrize("model_class", MODEL_LIST)
@pytest.mark.parametrize("options", EXPLORATION.values(), ids=EXPLORATION)
def test_box(model_class, options, tmp_path):
    check_run(model_class, box_env(), "MlpPolicy", tmp_path / "model", **options)


@pytest.mark.parametrize("model_class", MODEL_LIST)
# SB3 warns at each load of an n-step model, whose n steps are set all the same
@pytest.mark.filterwarnings("ignore:`n_steps=3` is ignored:UserWarning")
def test_n_step(model_class, tmp_path):
    model = small(model_class, make_vec_env(box_env, n_envs=2), n_steps=3).learn(40)
    assert model.replay_buffer.n_steps == 3 and model.replay_buffer.gamma == model.gamma
    assert save_and_load(model, tmp_path / "model").replay_buffer.n_steps == 3


SPACES: dict[str, tuple[spaces.Space, str]] = {
    "matrix": (spaces.Box(-1.0, 1.0, shape=(3, 2), dtype=np.float32), "MlpPolicy"),
    "float64": (spaces.Box(-1.0, 1.0, shape=(3,), dtype=np.float64), "MlpPolicy"),
    "int": (spaces.Box(0, 9, shape=(3,), dtype=np.int64), "MlpPolicy"),
    "Discrete": (spaces.Discrete(5), "MlpPolicy"),
    "MultiDiscrete": (spaces.MultiDiscrete([3, 4]), "MlpPolicy"),
    "MultiBinary": (spaces.MultiBinary(4), "MlpPolicy"),
    "Dict": (dict_space(), "MultiInputPolicy"),
    "Dict with image": (dict_space(image=True), "MultiInputPolicy"),
}


@pytest.mark.parametrize("model_class", MODEL_LIST)
@pytest.mark.parametrize("space, policy", SPACES.values(), ids=SPACES)
def test_observation_space(model_class, space, policy, tmp_path):
    check_run(model_class, RandomEnv(space), policy, tmp_path / "model")


ACTION_SPACES = {
    "matrix": spaces.Box(-1.0, 3.0, shape=(2, 2), dtype=np.float32),
    "float64": spaces.Box(-1.0, 3.0, shape=(2,), dtype=np.float64),
    "wide": spaces.Box(-100.0, 100.0, shape=(1,), dtype=np.float32),
}


# Of actions up to 100 its reward takes the square
@pytest.mark.filterwarnings("ignore:Rewards average .* values reach about:UserWarning")
@pytest.mark.parametrize("model_class", MODEL_LIST)
@pytest.mark.parametrize("space", ACTION_SPACES.values(), ids=ACTION_SPACES)
def test_action_space(model_class, space, tmp_path):
    check_run(model_class, RandomEnv(box_env().observation_space, space), "MlpPolicy", tmp_path / "model")


@pytest.mark.parametrize("model_class", MODEL_LIST)
@pytest.mark.parametrize("share_features_extractor", [False, True])
@pytest.mark.parametrize("channel_first", [False, True])
def test_cnn(model_class, share_features_extractor, channel_first, tmp_path):
    env = FakeImageEnv(screen_height=40, screen_width=40, n_channels=1, discrete=False, channel_first=channel_first)
    policy_kwargs = IMAGE_KWARGS | dict(share_features_extractor=share_features_extractor)
    model = check_run(
        model_class, env, "CnnPolicy", tmp_path / "model", n_steps=14, policy_kwargs=policy_kwargs, gradient_steps=2
    )
    shared = model.critic.features_extractor is model.actor.features_extractor
    assert shared is share_features_extractor


@pytest.mark.parametrize("model_class", MODEL_LIST)
def test_frame_stack(model_class):
    env = make_vec_env(lambda: FakeImageEnv(screen_height=40, screen_width=40, discrete=False), n_envs=1)
    small(model_class, VecFrameStack(env, 2), "CnnPolicy", policy_kwargs=IMAGE_KWARGS, buffer_size=50).learn(14)


@pytest.mark.parametrize("model_class", MODEL_LIST)
def test_several_envs(model_class, tmp_path):
    noise = VectorizedActionNoise(NormalActionNoise(TWO, 0.1 * np.ones(2)), 3)
    env = make_vec_env(box_env, n_envs=3)
    model = check_run(model_class, env, "MlpPolicy", tmp_path / "model", action_noise=noise, gradient_steps=-1)
    # 3 updates after each of the vectorized steps that end at transitions 12, 15, ..., 30
    assert model._n_updates == 21


@pytest.mark.parametrize("model_class", MODEL_LIST)
@pytest.mark.parametrize("make_env, policy", [(box_env, "MlpPolicy"), (lambda: RandomEnv(dict_space()), "MultiInputPolicy")])
def test_vec_normalize(model_class, make_env, policy, tmp_path):
    keys = ["vector"] if policy == "MultiInputPolicy" else None
    env = VecNormalize(make_vec_env(make_env, n_envs=2), norm_obs_keys=keys)
    model = check_run(model_class, env, policy, tmp_path / "model")
    assert model._vec_normalize_env is env
    # Kept as the environment gave them, minus the squared action
    assert model.replay_buffer.rewards[: model.replay_buffer.pos].min() < -0.1


@pytest.mark.parametrize("model_class", MODEL_LIST)
@pytest.mark.parametrize("strategy", ["future", "final", "episode"])
@pytest.mark.parametrize("n_envs", [1, 2])
def test_her(model_class, strategy, n_envs, tmp_path):
    check_run(
        model_class,
        make_vec_env(PointGoalEnv, n_envs=n_envs),
        "MultiInputPolicy",
        tmp_path / "model",
        n_steps=60,
        learning_starts=30,
        gradient_steps=2,
        replay_buffer_class=HerReplayBuffer,
        replay_buffer_kwargs=dict(n_sampled_goal=2, goal_selection_strategy=strategy),
    )


@pytest.mark.parametrize("model_class", MODEL_LIST)
@pytest.mark.parametrize("image_obs_space", [False, True])
def test_her_bit_flipping(model_class, image_obs_space, tmp_path):
    check_run(
        model_class,
        BitFlippingEnv(n_bits=4, continuous=True, image_obs_space=image_obs_space),
        "MultiInputPolicy",
        tmp_path / "model",
        replay_buffer_class=HerReplayBuffer,
    )


@pytest.mark.parametrize("model_class", MODEL_LIST)
@pytest.mark.parametrize("env_id", ["HalfCheetah-v5", "Hopper-v5", "Reacher-v5"])
def test_mujoco(model_class, env_id, tmp_path):
    model = check_run(model_class, gym.make(env_id), "MlpPolicy", tmp_path / "model", n_steps=200, learning_starts=100)
    assert model._n_updates == 100
    assert model.observation_space.dtype == np.float64


def test_reacher_goal_env():
    env = ReacherGoalEnv(gym.make("Reacher-v5"))
    check_env(env, warn=False)
    observation, _ = env.reset(seed=0)
    # The fingertip of an arm that is nearly stretched along x: 0.1 + 0.11
    np.testing.assert_allclose(observation["achieved_goal"], [0.21, 0.0], atol=0.05)


@pytest.mark.parametrize("model_class", MODEL_LIST)
def test_her_on_reacher(model_class, tmp_path):
    model = check_run(
        model_class,
        ReacherGoalEnv(gym.make("Reacher-v5")),
        "MultiInputPolicy",
        tmp_path / "model",
        n_steps=200,
        learning_starts=100,
        replay_buffer_class=HerReplayBuffer,
    )
    assert model._n_updates == 100


@pytest.mark.parametrize("model_class", MODEL_LIST)
def test_callbacks(model_class, tmp_path):
    evaluation = EvalCallback(
        DummyVecEnv([box_env]), eval_freq=20, n_eval_episodes=2, best_model_save_path=str(tmp_path), verbose=0, warn=False
    )
    checkpoint = CheckpointCallback(20, str(tmp_path), save_replay_buffer=True)
    small(model_class, box_env()).learn(40, callback=CallbackList([evaluation, checkpoint]))
    best = model_class.load(tmp_path / "best_model", env=box_env())
    mean_return, _ = evaluate_policy(best, best.get_env(), n_eval_episodes=2, warn=False)
    assert np.isfinite(mean_return)
    resumed = model_class.load(tmp_path / "rl_model_40_steps", env=box_env())
    resumed.load_replay_buffer(tmp_path / "rl_model_replay_buffer_40_steps")
    # The checkpoint is written before the 40th transition is stored and learned from
    assert resumed.num_timesteps == 40 and resumed._n_updates == 29 and resumed.replay_buffer.size() == 39
    resumed.learn(10, reset_num_timesteps=False)
    assert resumed._n_updates == 39
