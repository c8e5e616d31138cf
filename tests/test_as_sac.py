"""Whatever works with SAC works with SACV: what users' scripts do, run with both classes."""

import base64
import copy
import io
import json
import pickle
import zipfile
from typing import Any, ClassVar, NamedTuple

import cloudpickle
import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import SAC, HerReplayBuffer
from stable_baselines3.common.buffers import NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.distributions import SquashedDiagGaussianDistribution
from stable_baselines3.common.noise import NormalActionNoise
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, FlattenExtractor
from stable_baselines3.common.type_aliases import TrainFrequencyUnit
from stable_baselines3.common.vec_env import DummyVecEnv
from stable_baselines3.sac import policies as sac_policies

import sb3_softvalue
from sb3_softvalue import SACV
from sb3_softvalue.execution.compiled import compile_gradients, tracing
from sb3_softvalue.policies import with_value_network
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

    @pytest.mark.parametrize("name", ["critic", "actor"])
    def test_network(self, model_class, name):
        model = small(model_class, box_env()).learn(30)
        network = getattr(model.policy, f"make_{name}")()
        network.optimizer = th.optim.Adam(network.parameters(), lr=1e-3)
        for owner in (model, model.policy):
            setattr(owner, name, network)
        before = parameters_of(network)
        model.learn(10, reset_num_timesteps=False)
        assert differs(parameters_of(network), before)

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

    @pytest.mark.parametrize("value", [-1, np.float32(-1.0), th.tensor(-1.0)], ids=repr)
    def test_target_entropy(self, model_class, value):
        model = small(model_class, box_env()).learn(20)
        model.target_entropy = value
        if model_class is SAC:
            with pytest.raises(AssertionError):  # that it is Python's float
                model.learn(20)
            return
        assert model.temperature().target_entropy.item() == -1.0
        assert model.learn(20)._n_updates == 20

    def test_ent_coef(self, model_class):
        """It is read once, when the model is made."""
        model = small(model_class, box_env()).learn(20)
        model.ent_coef = None
        assert model.learn(20)._n_updates == 20

    def test_forward_of_the_actor(self, model_class):
        model = small(model_class, box_env())
        forward = model.actor.forward
        model.actor.forward = lambda *args, **kwargs: forward(*args, **kwargs) * 0.0 + 0.5
        assert model.predict(np.zeros(3, np.float32))[0] == pytest.approx([1.25, 0.375])

    def test_action_log_prob_of_the_actor(self, model_class):
        model, calls = small(model_class, box_env()), []
        action_log_prob = model.actor.action_log_prob
        model.actor.action_log_prob = lambda obs: calls.append(len(obs)) or action_log_prob(obs)
        model.learn(15)
        # SAC calls it for the next observations as well
        assert calls == [8] * 5 * (1 if model_class is SACV else 2)

    def test_distribution_of_the_actor(self, model_class):
        class Quiet(SquashedDiagGaussianDistribution):
            def log_prob(self, actions: th.Tensor, gaussian_actions: th.Tensor | None = None) -> th.Tensor:
                return super().log_prob(actions, gaussian_actions) * 0.0 - 7.0

        model = small(model_class, box_env(), ent_coef=1.0)
        model.actor.action_dist = Quiet(2)
        observation = th.zeros(4, 3)
        model.learn(11)
        objective = -model.actor.action_log_prob(observation)[1]
        assert objective.tolist() == [7.0] * 4
        if model_class is SACV:
            assert train(model, 1)["train/entropy"] == 7.0

    def test_sb3s_actor(self, model_class, monkeypatch):
        forward, action_log_prob = sac_policies.Actor.forward, sac_policies.Actor.action_log_prob
        calls: list[str] = []
        monkeypatch.setattr(sac_policies.Actor, "forward", lambda *a, **k: calls.append("forward") or forward(*a, **k))
        monkeypatch.setattr(sac_policies.Actor, "action_log_prob", lambda *a: calls.append("log_prob") or action_log_prob(*a))
        small(model_class, box_env()).learn(11)
        assert calls == ["forward", *["log_prob"] * (1 if model_class is SACV else 2)]

    def test_no_replay_buffer(self, model_class):
        model = small(model_class, box_env()).learn(20)
        model.replay_buffer = None
        with pytest.raises((ValueError, AttributeError), match=r"set model\.replay_buffer|object has no attribute 'add'"):
            model.learn(20)

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


class Plain(sac_policies.SACPolicy):
    """Nothing of its own."""


class Derived(with_value_network(Plain)):  # type: ignore[misc]  # the base class is created at run time
    """Of a class that was made."""


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


@pytest.mark.parametrize("model_class", MODEL_LIST)
def test_a_foreign_policy_is_pickled(model_class):
    model = small(model_class, box_env(), Plain, policy_kwargs=dict(net_arch=[8])).learn(15)
    observation = np.full(3, 0.3, np.float32)
    for copied in (pickle.loads(pickle.dumps(model.policy)), copy.deepcopy(model.policy), pickle.loads(pickle.dumps(model))):
        assert (copied.predict(observation, deterministic=True)[0] == model.predict(observation, deterministic=True)[0]).all()
        assert type(getattr(copied, "policy", copied)) is type(model.policy)
    assert pickle.loads(pickle.dumps(model)).learn(15)._n_updates == 5 + 5


def test_one_class_for_a_foreign_policy(tmp_path):
    """Whoever asks, also when a file is read; a class derived from it is itself."""
    made = with_value_network(Plain)
    assert with_value_network(made) is made is with_value_network(Plain) is pickle.loads(pickle.dumps(made))
    small(SACV, box_env(), Plain).save(tmp_path / "model")
    assert type(SACV.load(tmp_path / "model").policy) is made
    assert type(pickle.loads(pickle.dumps(SACV.load(tmp_path / "model"))).policy) is made
    assert pickle.loads(pickle.dumps(Derived)) is Derived is with_value_network(Derived)


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
        with pytest.raises(ValueError, match="loaded without an environment can only predict: load it with env="):
            model.learn(10)
        SACV.load(tmp_path / "model", env=PointGoalEnv()).learn(30)


def test_load_replay_buffer_of_others(tmp_path):
    filled(box_env(4)).save_replay_buffer(tmp_path / "other")
    model = filled(box_env())
    buffer = model.replay_buffer
    with pytest.raises(
        ValueError, match=r"holds observations in Box\(-1.0, 1.0, \(4,\).*the model's are in Box\(-1.0, 1.0, \(3,\)"
    ):
        model.load_replay_buffer(tmp_path / "other")
    filled(DummyVecEnv([box_env] * 2)).save_replay_buffer(tmp_path / "two")
    with pytest.raises(ValueError, match="filled by 2 parallel environments, but the model has 1"):
        model.load_replay_buffer(tmp_path / "two")
    assert model.replay_buffer is buffer
    actions = spaces.Box(np.float32([-1, 0]), np.float32([2, 5]))
    filled(RandomEnv(box_env().observation_space, actions)).save_replay_buffer(tmp_path / "actions")
    with pytest.raises(ValueError, match=r"holds actions in Box\(\[-1.  0.\], \[2. 5.\].*the model's are in"):
        model.load_replay_buffer(tmp_path / "actions")
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


@pytest.mark.parametrize("observation_space", [spaces.Box(-2, 3, (3,)), spaces.Dict(a=spaces.Box(-2, 3, (3,)))], ids=str)
@pytest.mark.parametrize("model_class", MODEL_LIST)
def test_load_replay_buffer_with_other_bounds_of_observations(model_class, observation_space, tmp_path):
    """Which are stored as they are."""
    is_dict = isinstance(observation_space, spaces.Dict)
    own = spaces.Dict(a=box_env().observation_space) if is_dict else box_env().observation_space
    policy = "MultiInputPolicy" if is_dict else "MlpPolicy"
    small(model_class, RandomEnv(observation_space), policy).learn(20).save_replay_buffer(tmp_path / "buffer")
    model = small(model_class, RandomEnv(own), policy)
    model.load_replay_buffer(tmp_path / "buffer")
    assert model.learn(20).replay_buffer.size() == 40


class OneLayer(FlattenExtractor):
    """One layer for all who extract features."""

    layer: th.nn.Module

    def __init__(self, observation_space: spaces.Space):
        super().__init__(observation_space)
        self.shared = OneLayer.layer

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return self.shared(super().forward(observations))


class TestOneLayerForAll:
    """A layer that the user's extractors hold in common is V's target's own: neither moved nor frozen by it."""

    policy_kwargs: ClassVar[dict[str, Any]] = dict(net_arch=[8], features_extractor_class=OneLayer)

    @pytest.mark.parametrize("model_class", MODEL_LIST)
    def test_frozen(self, model_class):
        OneLayer.layer = th.nn.Linear(3, 3).requires_grad_(False)
        before = OneLayer.layer.weight.clone()
        small(model_class, box_env(), policy_kwargs=self.policy_kwargs, tau=0.1).learn(20)
        # SAC's target critic moves it towards itself: by 1 - tau, then tau of the rest is added, at each of ten updates
        factor = 1.0 if model_class is SACV else (1 - 0.1**2) ** 10
        th.testing.assert_close(OneLayer.layer.weight, before * factor, rtol=1e-5 if factor < 1 else 0, atol=0)

    def test_shared_as_sb3_shares(self):
        OneLayer.layer = th.nn.Linear(3, 3)
        model = small(SACV, box_env(), policy_kwargs=self.policy_kwargs | dict(share_features_extractor=True), tau=0.5)
        target = model.value_target.features_extractor.shared
        assert model.actor.features_extractor.shared is OneLayer.layer is not target
        before = parameters_of(OneLayer.layer)
        assert not differs(parameters_of(target), before)
        model.learn(11)
        after = parameters_of(OneLayer.layer)
        assert OneLayer.layer.weight.requires_grad and differs(after, before)
        th.testing.assert_close(target.weight, (before["weight"] + after["weight"]) / 2)

    def test_learned_by_several(self):
        """Refused, when the model is made and when it is learned by several later on."""
        message = "The actor and the critic share a parameter.*freeze it.*or use .*share_features_extractor=True"
        OneLayer.layer = th.nn.Linear(3, 3)
        with pytest.raises(ValueError, match=message):
            small(SACV, box_env(), policy_kwargs=self.policy_kwargs)
        OneLayer.layer.requires_grad_(False)
        model = small(SACV, box_env(), policy_kwargs=self.policy_kwargs).learn(15)
        OneLayer.layer.requires_grad_(True)
        with pytest.raises(ValueError, match=message):
            model.learn(15)


class Lazy(BaseFeaturesExtractor):
    """Finds out for itself how much there is to read."""

    def __init__(self, observation_space: spaces.Space):
        super().__init__(observation_space, 4)
        self.layers = th.nn.Sequential(th.nn.Flatten(), th.nn.LazyLinear(4), th.nn.LazyBatchNorm1d())

    def forward(self, observations: Any) -> th.Tensor:
        return self.layers(observations["a"] if isinstance(observations, dict) else observations)


@pytest.mark.parametrize(
    "space", [spaces.Box(-1, 1, (2, 3)), spaces.Discrete(5), spaces.Dict(a=spaces.Box(-1, 1, (3,)))], ids=str
)
@pytest.mark.parametrize("model_class", MODEL_LIST)
def test_lazy_layers(model_class, space):
    policy = "MultiInputPolicy" if isinstance(space, spaces.Dict) else "MlpPolicy"
    kwargs = dict(policy_kwargs=dict(net_arch=[8], features_extractor_class=Lazy))
    model = small(model_class, RandomEnv(space), policy, **kwargs)
    if model_class is SACV:
        assert not differs(parameters_of(model.value_target), parameters_of(model.value))
        assert all(module.training for module in model.value.modules())
    assert model.learn(20)._n_updates == 10


class ByDepth(sac_policies.SACPolicy):
    """Reads ``net_arch`` in its own way."""

    def __init__(self, *args: Any, net_arch: Any = None, **kwargs: Any):
        super().__init__(*args, net_arch=[net_arch["width"]] * net_arch["depth"], **kwargs)


class OfTinyImages(sac_policies.CnnPolicy):
    """With an extractor of its own."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **(kwargs | dict(features_extractor_class=FlattenExtractor)))


class DuckNoise:
    """Noise that is no ``ActionNoise``."""

    n_resets = 0

    def __call__(self) -> np.ndarray:
        return np.full(2, 5.0, np.float32)

    def reset(self) -> None:
        DuckNoise.n_resets += 1


@pytest.mark.parametrize("model_class", MODEL_LIST)
class TestNoVeto:
    """What only the user knows the meaning of."""

    def test_architecture_of_a_foreign_policy(self, model_class):
        model = small(model_class, box_env(), ByDepth, policy_kwargs=dict(net_arch=dict(width=6, depth=2)))
        assert [layer.out_features for layer in model.critic.qf0 if isinstance(layer, th.nn.Linear)] == [6, 6, 1]
        assert model.learn(15)._n_updates == 5

    def test_more_than_the_known_keys_of_an_architecture(self, model_class):
        kwargs = dict(net_arch=dict(pi=np.array([7]), qf=range(6, 7), depth=2))
        assert small(model_class, box_env(), policy_kwargs=kwargs).actor.mu.in_features == 7

    def test_small_images(self, model_class):
        model = small(model_class, RandomEnv(spaces.Box(0, 255, (8, 8, 3), np.uint8)), OfTinyImages)
        assert model.learn(15)._n_updates == 5

    def test_unit_of_train_freq(self, model_class):
        for unit, n_updates in ((TrainFrequencyUnit.STEP, 5), (TrainFrequencyUnit.EPISODE, 1)):
            model = small(model_class, box_env(), train_freq=(2 if unit is TrainFrequencyUnit.STEP else 1, unit))
            assert model.learn(20)._n_updates == n_updates

    def test_learning_starts_never(self, model_class, tmp_path):
        model = small(model_class, box_env(), learning_starts=float("inf")).learn(20)
        model.save(tmp_path / "model")
        assert model_class.load(tmp_path / "model", env=box_env()).learn(20)._n_updates == 0

    def test_negative_gradient_steps(self, model_class):
        assert small(model_class, box_env(), gradient_steps=-2, train_freq=4).learn(20)._n_updates == 12

    def test_noise_of_any_class(self, model_class):
        DuckNoise.n_resets = 0
        model = small(model_class, box_env(), action_noise=DuckNoise()).learn(20)
        assert (model.replay_buffer.actions[:20] == 1.0).all()
        assert DuckNoise.n_resets == 1 + 2, "before the first episode and after each"

    def test_a_tensor_as_temperature(self, model_class, tmp_path):
        small(model_class, box_env(), ent_coef=th.tensor(0.25)).learn(20).save(tmp_path / "model")
        assert model_class.load(tmp_path / "model", env=box_env()).learn(20).ent_coef_tensor.item() == 0.25

    @pytest.mark.parametrize("shape, n_updates", [((3, 36, 36), 2), ((36, 36, 36), 2), ((36, 36, 3), 0)])
    def test_images_of_floats(self, model_class, shape, n_updates):
        """Channels come first: SB3 transposes images of bytes only."""
        kwargs = dict(policy_kwargs=dict(net_arch=[8], normalize_images=False))
        env = RandomEnv(spaces.Box(0, 1, shape, np.float32))
        if n_updates:
            assert small(model_class, env, "CnnPolicy", **kwargs).learn(12)._n_updates == n_updates
            return
        with pytest.raises(
            (RuntimeError, ValueError), match=r"Kernel size can't be|reads images of floats with channels first"
        ):
            small(model_class, env, "CnnPolicy", **kwargs)


def names_in(path: Any) -> set[str]:
    """Of the classes and functions that unpickling a model's file asks for."""
    data = json.loads(zipfile.ZipFile(path).read("data"))
    names: set[str] = set()

    class Recording(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            names.add(f"{module}.{name}")
            return super().find_class(module, name)

    for item in data.values():
        if isinstance(item, dict) and ":serialized:" in item:
            Recording(io.BytesIO(base64.b64decode(item[":serialized:"]))).load()
    return names


def test_a_file_asks_for_no_class_but_sacs_and_the_policy(tmp_path):
    """SB3 is about to load by a list of names (its pull request 2264), which users extend by what is theirs."""
    for model_class in MODEL_LIST:
        small(model_class, box_env()).learn(15).save(tmp_path / model_class.__name__)
    ours, sacs = (names_in(tmp_path / f"{name}.zip") for name in ("SACV", "SAC"))
    assert ours - sacs == {"sb3_softvalue.policies.SACVPolicy"}
