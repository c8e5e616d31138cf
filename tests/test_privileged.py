"""Asymmetric actor-critic: the actor sees some keys of a Dict observation, Q and V see all."""

import copy
import io
import pickle
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import SAC, HerReplayBuffer
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_softvalue import SACV, MultiInputPolicy
from sb3_softvalue.checkpoint import CheckpointError
from sb3_softvalue.diagnostics import SoftValueDiagnostics, evaluate_values
from sb3_softvalue.objective import UpdateInputs, draw_noise, eager_gradients
from sb3_softvalue.policies import ValueNetwork
from sb3_softvalue.transfer import export_onnx
from tests.helpers import (
    PointGoalEnv,
    RandomEnv,
    assert_same,
    dict_space,
    everything,
    filled,
    save_and_load,
    small,
    train,
)

SEEN, HIDDEN = "vector", "discrete"


def env(image: bool = False) -> RandomEnv:
    return RandomEnv(dict_space(image))


def privileged(make_env: Any = env, keys: Any = (SEEN,), **kwargs: Any) -> SACV:
    """A model with some updates whose actor sees the keys."""
    policy_kwargs = dict(net_arch=[8], actor_keys=list(keys)) | kwargs.pop("policy_kwargs", {})
    model = filled(make_env(), "MultiInputPolicy", policy_kwargs=policy_kwargs, **kwargs)
    train(model, 3)
    return model


def samples(space: spaces.Dict, n: int) -> dict[str, np.ndarray]:
    space.seed(3)
    drawn = [space.sample() for _ in range(n)]
    return {key: np.stack([one[key] for one in drawn]) for key in space.spaces}


def others(batch: dict[str, np.ndarray], key: str) -> dict[str, np.ndarray]:
    """The same observations with another value of one key in each."""
    changed = (batch[key] + 1) % 4 if key == HIDDEN else batch[key] + 0.5
    return batch | {key: changed.astype(batch[key].dtype)}


@pytest.mark.parametrize("use_sde", [False, True])
@pytest.mark.parametrize("deterministic", [True, False])
def test_actor_sees_its_keys_only(deterministic, use_sde):
    model = privileged(use_sde=use_sde)
    batch = samples(model.observation_space, 50)

    def read(observations: Any) -> tuple[np.ndarray, np.ndarray]:
        th.manual_seed(0)
        actions = model.predict(observations, deterministic=deterministic)[0]
        return actions, model.action_log_prob(observations, batch_actions), model.entropy(observations)

    batch_actions = model.predict(batch)[0]
    expected = read(batch)
    assert_same(read(others(batch, HIDDEN)), expected)
    assert_same(read({SEEN: batch[SEEN]}), expected)
    assert all(np.abs(a - b).min() > 0.0 for a, b in zip(read(others(batch, SEEN)), expected, strict=True))


def test_q_and_v_see_all():
    model = privileged()
    batch = samples(model.observation_space, 50)
    actions = model.predict(batch)[0]
    for key in (SEEN, HIDDEN):
        changed = others(batch, key)
        assert np.abs(model.predict_values(changed) - model.predict_values(batch)).min() > 0.0
        assert np.abs(model.predict_q_values(changed, actions) - model.predict_q_values(batch, actions)).min() > 0.0
        obs, other = (model.policy.obs_to_tensor(observations)[0] for observations in (batch, changed))
        assert (model.value_target(obs) - model.value_target(other)).abs().min() > 0.0


def test_predict_takes_one_or_many():
    model = privileged()
    one = model.observation_space.sample()
    batch = model.get_env().reset()
    own = {SEEN: one[SEEN]}
    assert model.predict(own)[0].shape == (2,) and model.predict_values(one).shape == ()
    assert_same(model.predict(own, deterministic=True)[0], model.predict(one, deterministic=True)[0])
    assert model.predict({SEEN: batch[SEEN]})[0].shape == (1, 2)
    assert_same(model.predict({SEEN: np.stack([one[SEEN]] * 3)}, deterministic=True)[0].shape, (3, 2))


def test_plays_where_nothing_else_is_observed():
    """A robot has no simulator."""
    model = privileged()
    robot = RandomEnv(spaces.Dict({SEEN: model.observation_space[SEEN]}))
    returns, lengths = evaluate_policy(model, DummyVecEnv([lambda: robot]), 2, return_episode_rewards=True, warn=False)
    assert lengths == [10, 10] and max(returns) < 0.0


class Names(BaseFeaturesExtractor):
    """Reads whatever it is given, as a features extractor of the user's may."""

    def __init__(self, observation_space: spaces.Dict):
        super().__init__(observation_space, features_dim=len(observation_space.spaces))
        self.names: set[str] = set()

    def forward(self, observations: dict[str, th.Tensor]) -> th.Tensor:
        self.names.update(observations)
        return th.stack([part.flatten(start_dim=1).sum(dim=1) for part in observations.values()], dim=1)


def test_users_features_extractor_gets_nothing_else():
    model = privileged(policy_kwargs=dict(features_extractor_class=Names))
    assert model.actor.features_extractor.names == {SEEN}
    assert model.critic.features_extractor.names == model.value.features_extractor.names == {SEEN, HIDDEN}


def test_images_hidden_from_the_actor():
    cnn = dict(features_extractor_kwargs=dict(cnn_output_dim=8))
    model = privileged(lambda: env(image=True), ["discrete", "vector"], policy_kwargs=cnn)
    assert set(model.actor.features_extractor.extractors) == {"discrete", "vector"}
    assert "image" in model.critic.features_extractor.extractors
    # Through the wrapper that transposes images
    assert model.predict(model.get_env().reset())[0].shape == (1, 2)


class Linears(BaseFeaturesExtractor):
    """A learned layer for each key."""

    def __init__(self, observation_space: spaces.Dict):
        super().__init__(observation_space, features_dim=3 * len(observation_space.spaces))
        self.layers = th.nn.ModuleDict(
            {key: th.nn.Linear(spaces.flatdim(space), 3) for key, space in observation_space.spaces.items()}
        )

    def forward(self, observations: dict[str, th.Tensor]) -> th.Tensor:
        return th.cat([layer(observations[key].flatten(start_dim=1)) for key, layer in self.layers.items()], dim=1)


def test_gradients():
    """Every layer of every features extractor learns, and the actor has layers for its own keys alone."""
    model = privileged(policy_kwargs=dict(features_extractor_class=Linears))
    batch = next(model._batches(1, 8, 1.0))
    inputs = UpdateInputs(batch, draw_noise(model.actor, 8, model.device), model.temperature())
    named = dict(model._joint_objective().named_parameters())
    params = {name: param for name, param in named.items() if param.requires_grad}
    gradients, _ = eager_gradients(model._joint_objective(), list(params.values()), inputs)
    found = {name: float(gradient.abs().max()) for name, gradient in zip(params, gradients, strict=True)}
    layers = {name.rpartition(".")[0] for name in found if "features_extractor" in name}
    owners = {f"{network}.features_extractor.layers.{key}" for network in ("critic", "value") for key in (SEEN, HIDDEN)}
    assert layers == owners | {f"actor.features_extractor.layers.{SEEN}"}
    assert min(found[f"{layer}.weight"] for layer in layers) > 0.0

    # What is hidden from the actor guides its learning all the same: through Q
    def actor_gradient(observations: Any) -> th.Tensor:
        changed = inputs._replace(batch=batch._replace(observations=observations))
        return eager_gradients(model._joint_objective(), [model.actor.mu.weight], changed)[0][0]

    observations = dict(batch.observations)
    expected = actor_gradient(observations)
    changed = actor_gradient(observations | {HIDDEN: (observations[HIDDEN] + 1) % 4})
    assert (changed - expected).abs().max() > 0.0


def test_all_keys_are_none():
    """Naming all of the keys is the same as naming none, to the bit."""
    models = [privileged(keys=(HIDDEN, SEEN)), filled(env(), "MultiInputPolicy")]
    train(models[1], 3)
    assert_same(everything(models[0]), everything(models[1]))


def test_default_is_sacs_policy():
    model = small(SACV, env(), "MultiInputPolicy")
    expected = small(SAC, env(), "MultiInputPolicy")
    assert type(model.actor) is type(expected.actor)
    assert_same(model.actor.state_dict(), expected.actor.state_dict())
    assert "actor_keys" not in model.policy._get_constructor_parameters()
    assert model.policy.actor_keys is None


def test_her(tmp_path):
    keys = ["observation", "desired_goal"]
    model = privileged(PointGoalEnv, keys, replay_buffer_class=HerReplayBuffer)
    hidden = samples(model.observation_space, 20)
    own = {key: hidden[key] for key in keys}
    changed = hidden | {"achieved_goal": hidden["achieved_goal"] + 1.0}
    expected = model.predict(hidden, deterministic=True)[0]
    assert_same(model.predict(own, deterministic=True)[0], expected)
    assert_same(model.predict(changed, deterministic=True)[0], expected)
    assert np.abs(model.predict_values(changed) - model.predict_values(hidden)).min() > 0.0
    loaded = save_and_load(model, tmp_path / "model")
    for one in (model, loaded):
        th.manual_seed(0)
        np.random.seed(0)
        train(one, 5)
    assert_same(everything(loaded), everything(model))
    alone = SACV.load(tmp_path / "model")
    assert alone.predict(own)[0].shape == (20, 1)


def test_saved_loaded_copied(tmp_path):
    model = privileged()
    batch = samples(model.observation_space, 20)
    own = {SEEN: batch[SEEN]}
    model.policy.save(tmp_path / "policy")
    buffer = io.BytesIO()
    model.save(buffer)
    buffer.seek(0)
    loaded = SACV.load(buffer)
    for policy in (
        loaded.policy,
        MultiInputPolicy.load(tmp_path / "policy"),
        copy.deepcopy(model).policy,
        pickle.loads(pickle.dumps(model.policy)),
    ):
        assert policy.actor_keys == [SEEN]
        assert_same(policy.predict(own, deterministic=True)[0], model.predict(batch, deterministic=True)[0])
    assert_same(loaded.predict_values(batch), model.predict_values(batch))


def test_checkpoint_resumes(tmp_path):
    model = privileged()
    model.save_checkpoint(tmp_path)
    resumed = privileged(seed=7)
    resumed.load_checkpoint(tmp_path)
    assert_same(everything(resumed), everything(model))
    whole = filled(env(), "MultiInputPolicy")
    with pytest.raises(CheckpointError, match=r"networks: actor\.latent_pi.* 8, 3\], this one has .* 8, 7\]"):
        whole.load_checkpoint(tmp_path)


def test_vec_normalize():
    """Only the keys that are asked for; the actor's statistics are those that all see."""
    vec_env = VecNormalize(DummyVecEnv([env, env]), norm_obs_keys=[SEEN])
    model = privileged(lambda: vec_env)
    observation = vec_env.reset()
    assert_same(model.predict({SEEN: observation[SEEN]}, deterministic=True), model.predict(observation, deterministic=True))
    raw = samples(vec_env.observation_space, 20)
    normal = vec_env.normalize_obs(raw)
    assert_same(normal[HIDDEN], raw[HIDDEN])
    assert np.abs(normal[SEEN] - raw[SEEN]).max() > 0.01
    model.learn(20)


def test_diagnostics(tmp_path):
    model = privileged()
    model.learn(40, callback=SoftValueDiagnostics(tmp_path))
    calibration = evaluate_values(model, env(), n_episodes=2)
    assert len(calibration.values) == 20 and np.isfinite(calibration.values).all()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("norm_obs_keys", [None, [SEEN], [HIDDEN]], ids=str)
def test_onnx(norm_obs_keys, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")

    def vectors() -> RandomEnv:
        box = spaces.Box(-5.0, 5.0, (3,), np.float32)
        return RandomEnv(spaces.Dict({SEEN: box, HIDDEN: box}))

    def session(**kwargs: Any) -> Any:
        export_onnx(model, tmp_path / "model.onnx", **kwargs)
        return onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])

    vec_env = VecNormalize(DummyVecEnv([vectors]), norm_obs_keys=norm_obs_keys)
    model = privileged(lambda: vec_env)
    raw = samples(vec_env.observation_space, 100)
    seen = vec_env.normalize_obs(raw)
    actor, both = session(), session(include_value=True)
    assert [one.name for one in actor.get_inputs()] == [SEEN] and [one.name for one in actor.get_outputs()] == ["action"]
    assert {one.name for one in both.get_inputs()} == {SEEN, HIDDEN}
    expected = model.predict(seen, deterministic=True)[0]
    np.testing.assert_allclose(actor.run(None, {SEEN: raw[SEEN]})[0], expected, atol=1e-5)
    actions, values = both.run(["action", "value"], raw)
    np.testing.assert_allclose(actions, expected, atol=1e-5)
    np.testing.assert_allclose(values[:, 0], model.predict_values(seen), atol=1e-5)
    assert [one.name for one in session(include_value=False).get_inputs()] == [SEEN]


BAD_KEYS: dict[str, tuple[Any, Any, str]] = {
    "unknown": (
        env,
        dict(actor_keys=["vector", "speed"]),
        r"some of the observations \['discrete', 'vector'\], got \['vector'",
    ),
    "empty": (env, dict(actor_keys=[]), r"actor_keys must be a list of some .*, got \[\]"),
    "not a list": (env, dict(actor_keys="vector"), r"actor_keys must be a list .*, got \['v', 'e', "),
    "shared": (env, dict(actor_keys=["vector"], share_features_extractor=True), "share_features_extractor must be False with"),
}


@pytest.mark.parametrize("make_env, policy_kwargs, message", BAD_KEYS.values(), ids=BAD_KEYS)
def test_refused(make_env, policy_kwargs, message):
    with pytest.raises(ValueError, match=message):
        small(SACV, make_env(), "MultiInputPolicy", policy_kwargs=policy_kwargs)


def test_missing_observations_are_named():
    model = privileged()
    one = model.observation_space.sample()
    own, action = {SEEN: one[SEEN]}, model.action_space.sample()
    for read in (lambda: model.predict_values(own), lambda: model.predict_q_values(own, action)):
        with pytest.raises(ValueError, match=r"Q and V need all observations, but \['discrete'\] is missing"):
            read()
    with pytest.raises(ValueError, match=r"The actor needs the observations \['vector'\], but \['vector'\] is missing"):
        model.predict({HIDDEN: one[HIDDEN]})


def test_moves_to_and_from_sac():
    sac = small(SAC, env(), "MultiInputPolicy").learn(20)
    with pytest.raises(ValueError, match="from_sac cannot use actor_keys, since SAC's actor was trained on all"):
        SACV.from_sac(sac, fit_value_steps=0, policy_kwargs=dict(actor_keys=[SEEN]))
    with pytest.raises(ValueError, match="SB3's SAC has no actor_keys: use export_onnx"):
        privileged().to_sac()
    # Where nothing is hidden, nothing is lost
    model = filled(env(), "MultiInputPolicy", policy_kwargs=dict(net_arch=[8], actor_keys=None))
    batch = samples(model.observation_space, 20)
    assert_same(model.to_sac().predict(batch, deterministic=True), model.predict(batch, deterministic=True))


def test_shares_no_parameter():
    model = privileged()
    assert isinstance(model.value, ValueNetwork)
    places = [param.data_ptr() for param in model.policy.parameters()]
    assert len(places) == len(set(places))
    # One input for each number that is seen; one-hot discrete observations have four
    assert model.actor.latent_pi[0].in_features == 3
    assert model.value.vf[0].in_features == 3 + 4 and model.critic.qf0[0].in_features == 3 + 4 + 2
