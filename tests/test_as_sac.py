"""Whatever works with SAC works with SACV: what users' scripts do, run with both classes."""

import copy
import pickle
from typing import Any, NamedTuple

import cloudpickle
import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import HerReplayBuffer
from stable_baselines3.common.buffers import NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.noise import NormalActionNoise
from stable_baselines3.common.vec_env import DummyVecEnv
from stable_baselines3.sac import policies as sac_policies

import sb3_softvalue
from sb3_softvalue import SACV
from sb3_softvalue.execution.compiled import compile_gradients, tracing
from tests.helpers import MODEL_LIST, ClockEnv, PointGoalEnv, RandomEnv, box_env, differs, filled, parameters_of, small, train


def optimizers(model: Any) -> list[th.optim.Optimizer]:
    return [model.actor.optimizer, model.critic.optimizer, model.ent_coef_optimizer] + (
        [model.value.optimizer] if isinstance(model, SACV) else []
    )


@pytest.mark.parametrize("model_class", MODEL_LIST)
class TestSetAfterConstruction:
    """Public attributes that a callback or a script sets are followed."""

    def test_lr_schedule(self, model_class):
        model = small(model_class, box_env(), learning_rate=1e-3).learn(30)
        model.lr_schedule = lambda _: 0.0
        before = parameters_of(model.policy.actor)
        train(model, 5)
        assert [optimizer.param_groups[0]["lr"] for optimizer in optimizers(model)] == [0.0] * len(optimizers(model))
        assert not differs(parameters_of(model.policy.actor), before)

    def test_critic(self, model_class):
        model = small(model_class, box_env()).learn(30)
        critic = model.policy.make_critic()
        critic.optimizer = th.optim.Adam(critic.parameters(), lr=1e-3)
        model.critic = model.policy.critic = critic
        before = parameters_of(critic)
        model.learn(10, reset_num_timesteps=False)
        assert differs(parameters_of(critic), before)

    def test_actor(self, model_class):
        model = small(model_class, box_env()).learn(30)
        actor = model.policy.make_actor()
        actor.optimizer = th.optim.Adam(actor.parameters(), lr=1e-3)
        model.actor = model.policy.actor = actor
        before = parameters_of(actor)
        model.learn(10, reset_num_timesteps=False)
        assert differs(parameters_of(actor), before)

    def test_a_layer_that_depends_on_the_mode(self, model_class):
        model = small(model_class, box_env()).learn(20)
        observation = np.zeros(3, np.float32)
        model.predict(observation)
        model.actor.latent_pi.append(th.nn.Dropout(0.5))
        for _ in range(2):
            actions = [model.predict(observation, deterministic=True)[0] for _ in range(5)]
            assert all((action == actions[0]).all() for action in actions)
            model.learn(5, reset_num_timesteps=False)
            assert not model.actor.latent_pi[-1].training or model.policy.training

    def test_discount(self, model_class):
        """Episodes of one reward of 1 at each step, without an end: V and Q tend to 1 / (1 - gamma)."""
        model = small(model_class, ClockEnv(), gamma=0.99, learning_rate=1e-2, ent_coef=0.0, tau=0.5).learn(60)
        model.gamma = 0.0
        train(model, 600)
        observations = th.full((4, 1), 20.0)
        q_values = model.critic(observations, th.zeros(4, 1))[0]
        assert q_values.mean().item() == pytest.approx(1.0, abs=0.2)

    def test_replay_buffer(self, model_class):
        model = small(model_class, box_env()).learn(20)
        other = filled(box_env(), n_collected=30).replay_buffer
        other.rewards[:] = 1e3
        model.replay_buffer = other
        assert train(model, 1)["train/critic_loss"] > 1e4


class ScrambledSamples(NamedTuple):
    """The fields of a sample in another order, without SB3's discounts."""

    rewards: Any
    next_observations: Any
    observations: Any
    dones: Any
    actions: Any


class ScrambledBuffer(ReplayBuffer):
    """As buffers with priorities have it, whose samples carry more and in another order."""

    def sample(self, batch_size: int, env: Any = None) -> Any:
        s = super().sample(batch_size, env)
        return ScrambledSamples(s.rewards, s.next_observations, s.observations, s.dones, s.actions)


def test_samples_are_read_by_name():
    models = [filled(box_env(1), replay_buffer_class=cls, execution="eager") for cls in (ReplayBuffer, ScrambledBuffer)]
    for model in models:
        model.set_random_seed(3)
        for _ in range(3):
            train(model, 1)
    first, second = (parameters_of(model.policy) for model in models)
    assert not differs(first, second)


def test_a_patch_of_the_buffers_class_is_used(monkeypatch):
    calls = []
    original = ReplayBuffer._get_samples

    def patched(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(ReplayBuffer, "_get_samples", patched)
    train(filled(box_env()), 1)
    assert calls == [1]


@pytest.mark.parametrize("seed", range(40))
def test_saturated_actions_stay_in_the_box(seed):
    rng = np.random.default_rng(seed)
    low = rng.uniform(-3, 0, 4).astype(np.float32)
    space = spaces.Box(low, low + rng.uniform(0.1, 5, 4).astype(np.float32))
    model = small(SACV, RandomEnv(spaces.Box(-1, 1, (3,)), space))
    for sign in (-20.0, 20.0):
        with th.no_grad():
            model.actor.mu.bias.fill_(sign)
        assert space.contains(model.predict(np.zeros(3, np.float32), deterministic=True)[0])


class TestNStep:
    """One discount and one number of steps, wherever they were given."""

    def test_explicit_buffer(self):
        kwargs: dict[str, Any] = dict(replay_buffer_class=NStepReplayBuffer, replay_buffer_kwargs=dict(n_steps=3))
        model = small(SACV, box_env(), gamma=0.5, **kwargs)
        assert (model.gamma, model.replay_buffer.gamma) == (0.5, 0.5)
        assert (model.n_steps, model.replay_buffer.n_steps) == (3, 3)

    def test_load_with_others(self, tmp_path, recwarn):
        small(SACV, box_env(), n_steps=3).save(tmp_path / "model")
        model = SACV.load(tmp_path / "model", env=box_env(), gamma=0.9, n_steps=5)
        assert (model.replay_buffer.gamma, model.replay_buffer.n_steps) == (0.9, 5)
        assert [str(warning.message) for warning in recwarn if "ignored" in str(warning.message)] == []


class Wider(sac_policies.SACPolicy):
    """As ``imitation`` has one: another architecture and nothing else."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **(kwargs | dict(net_arch=[12, 12])))


@pytest.mark.parametrize(
    "policy, expected",
    [
        (sac_policies.MlpPolicy, sb3_softvalue.MlpPolicy),
        (sac_policies.CnnPolicy, sb3_softvalue.CnnPolicy),
        (sac_policies.MultiInputPolicy, sb3_softvalue.MultiInputPolicy),
        (Wider, Wider),
    ],
)
@pytest.mark.parametrize("model_class", MODEL_LIST)
def test_policies_by_class(model_class, policy, expected, tmp_path):
    spaces_of = {
        sac_policies.CnnPolicy: spaces.Box(0, 255, (36, 36, 1), np.uint8),
        sac_policies.MultiInputPolicy: spaces.Dict(a=spaces.Box(-1, 1, (2,))),
    }
    env = RandomEnv(spaces_of.get(policy, spaces.Box(-1, 1, (3,))))
    kwargs = {} if policy is Wider else dict(policy_kwargs=dict(net_arch=[8]))
    model = model_class(policy, env, learning_starts=5, buffer_size=50, device="cpu", batch_size=4, **kwargs).learn(10)
    if model_class is SACV:
        assert issubclass(model.policy_class, expected)
        assert policy is not Wider or model.value.vf[0].out_features == 12
    model.save(tmp_path / "model")
    loaded = model_class.load(tmp_path / "model", env=env, device="cpu").learn(10)
    assert not differs(parameters_of(model_class.load(tmp_path / "model").policy), parameters_of(model.policy))
    assert type(loaded.policy).__name__ == model.policy_class.__name__


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("model_class", MODEL_LIST)
def test_copies_train(model_class, copied):
    model = small(model_class, box_env()).learn(20)
    copy_of_it = copied(model)
    assert not differs(parameters_of(copy_of_it.policy), parameters_of(model.policy))
    for each in (model, copy_of_it):
        each.set_random_seed(1)
        train(each, 3)
    assert not differs(parameters_of(copy_of_it.policy), parameters_of(model.policy))


@pytest.mark.parametrize("model_class", MODEL_LIST)
def test_a_function_that_holds_a_model_is_pickled(model_class):
    """As SubprocVecEnv does with functions for self-play."""
    model = small(model_class, box_env()).learn(20)
    function = cloudpickle.loads(cloudpickle.dumps(lambda obs: model.predict(obs, deterministic=True)[0]))
    observation = np.full(3, 0.3, np.float32)
    assert (function(observation) == model.predict(observation, deterministic=True)[0]).all()


class TestPlaying:
    """A model that only predicts needs neither environment nor buffer."""

    def test_memory_optimized(self, tmp_path):
        memory = dict(optimize_memory_usage=True, replay_buffer_kwargs=dict(handle_timeout_termination=False))
        small(SACV, box_env(), **memory).save(tmp_path / "model")
        assert SACV.load(tmp_path / "model", buffer_size=1).predict(np.zeros(3, np.float32))[0].shape == (2,)

    def test_her(self, tmp_path):
        small(SACV, PointGoalEnv(), "MultiInputPolicy", replay_buffer_class=HerReplayBuffer).save(tmp_path / "model")
        model = SACV.load(tmp_path / "model")
        observation, _ = PointGoalEnv().reset(seed=0)
        assert model.predict(observation)[0].shape == (1,)
        model.set_env(PointGoalEnv())
        with pytest.raises(ValueError, match="loaded without an environment only predicts: load it with env="):
            model.learn(10)
        SACV.load(tmp_path / "model", env=PointGoalEnv()).learn(30)


def test_load_replay_buffer_of_others(tmp_path):
    filled(box_env(4)).save_replay_buffer(tmp_path / "other")
    model = filled(box_env())
    buffer = model.replay_buffer
    with pytest.raises(ValueError, match="other observation or action spaces than the model"):
        model.load_replay_buffer(tmp_path / "other")
    filled(DummyVecEnv([box_env] * 2)).save_replay_buffer(tmp_path / "two")
    with pytest.raises(ValueError, match="filled by 2 environments in parallel, the model has 1"):
        model.load_replay_buffer(tmp_path / "two")
    assert model.replay_buffer is buffer
    # As scripts do to free the memory first
    model.save_replay_buffer(tmp_path / "own")
    del model.replay_buffer
    model.load_replay_buffer(tmp_path / "own")
    assert model.replay_buffer.size() == buffer.size()


def test_continued_without_a_buffer(tmp_path):
    small(SACV, box_env()).learn(20).save(tmp_path / "model")
    model = SACV.load(tmp_path / "model", env=box_env())
    with pytest.warns(UserWarning, match="replay buffer is empty and learning_starts has passed"):
        model.learn(5, reset_num_timesteps=False)


@pytest.mark.parametrize("n_envs", [1, 3])
def test_action_noise_in_another_number_of_environments(n_envs):
    model = small(SACV, DummyVecEnv([box_env] * 2), action_noise=NormalActionNoise(np.zeros(2), np.ones(2))).learn(20)
    model.env = None
    model.n_envs = n_envs
    model.set_env(DummyVecEnv([box_env] * n_envs))
    model.replay_buffer = small(SACV, DummyVecEnv([box_env] * n_envs)).replay_buffer
    model.learn(12)


def test_compiling_leaves_the_checks_of_distributions_on():
    """Dynamo switches them off for the whole process, and a policy that is not a number would act."""
    model = filled(box_env(), execution="eager")
    with tracing():
        compile_gradients(lambda graph, _: graph)
    with th.no_grad():
        model.actor.mu.bias[0] = th.nan
    with pytest.raises(ValueError, match="found invalid values"):
        model.predict(np.zeros(3, np.float32))


@pytest.mark.parametrize("model_class", MODEL_LIST)
def test_vmap_over_the_policy(model_class):
    model = small(model_class, box_env())
    batch = th.rand(5, 3)
    actions = th.func.vmap(lambda obs: model.actor.mu(model.actor.latent_pi(obs)))(batch)
    assert actions.shape == (5, 2)


@pytest.mark.parametrize("model_class", MODEL_LIST)
def test_gym_ids_and_wrappers(model_class):
    env = gym.wrappers.RescaleAction(gym.make("Pendulum-v1"), np.float32(-0.5), np.float32(0.5))
    assert small(model_class, env).learn(30).num_timesteps == 30
