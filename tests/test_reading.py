"""Reading V(s), Q(s, a), log π(a|s) and the entropy of a model: shapes, units and numbers."""

import math
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces

from sb3_softvalue import SACV
from tests.helpers import (
    BatchNormDropoutExtractor,
    RandomEnv,
    as_double,
    assert_same,
    box_env,
    dict_space,
    filled,
    parameters_of,
    small,
    train,
)

IMAGE = spaces.Box(0, 255, shape=(36, 36, 1), dtype=np.uint8)
FLOAT64 = spaces.Box(-np.inf, np.inf, shape=(3,), dtype=np.float64)
NARROW_CNN = dict(net_arch=[8], features_extractor_kwargs=dict(features_dim=8))
# Observation space, policy and its arguments
OBSERVATIONS: dict[str, tuple[spaces.Space, str, dict[str, Any]]] = {
    "vector": (spaces.Box(-1.0, 1.0, shape=(3,), dtype=np.float32), "MlpPolicy", {}),
    "matrix": (spaces.Box(-1.0, 1.0, shape=(3, 2), dtype=np.float32), "MlpPolicy", {}),
    "float64": (spaces.Box(-1.0, 1.0, shape=(3,), dtype=np.float64), "MlpPolicy", {}),
    "Discrete": (spaces.Discrete(5), "MlpPolicy", {}),
    "image": (IMAGE, "CnnPolicy", dict(policy_kwargs=NARROW_CNN)),
    "Dict": (dict_space(), "MultiInputPolicy", {}),
    "Dict with image": (dict_space(image=True), "MultiInputPolicy", {}),
    "gSDE": (spaces.Box(-1.0, 1.0, shape=(3,), dtype=np.float32), "MlpPolicy", dict(use_sde=True)),
}
ACTION_SPACES = {
    "asymmetric": spaces.Box(np.array([-1.0, 0.0]), np.array([2.0, 0.5]), dtype=np.float64),
    "one": spaces.Box(-2.0, 2.0, shape=(1,), dtype=np.float32),
    "matrix": spaces.Box(-3.0, 1.0, shape=(2, 2), dtype=np.float32),
}


def samples(space: spaces.Space, n: int) -> Any:
    """A batch of observations as an environment with n copies gives them."""
    space.seed(0)
    drawn = [space.sample() for _ in range(n)]
    if isinstance(space, spaces.Dict):
        return {key: np.stack([observation[key] for observation in drawn]) for key in space.spaces}
    return np.stack(drawn)


def row(batch: Any, index: int) -> Any:
    return {key: array[index] for key, array in batch.items()} if isinstance(batch, dict) else batch[index]


@pytest.mark.parametrize("space, policy, options", OBSERVATIONS.values(), ids=OBSERVATIONS)
@pytest.mark.parametrize("action_space", ACTION_SPACES.values(), ids=ACTION_SPACES)
def test_shapes_and_values(space, policy, options, action_space):
    model = filled(RandomEnv(space, action_space), policy, n_collected=15, **options)
    train(model, 3)
    observations = samples(space, 4)
    actions, _ = model.predict(observations)
    before = parameters_of(model.policy)

    assert actions.shape == (4, *action_space.shape)
    values = model.predict_values(observations)
    q_values = model.predict_q_values(observations, actions)
    log_prob = model.action_log_prob(observations, actions)
    entropy = model.entropy(observations)
    assert values.shape == log_prob.shape == entropy.shape == (4,)
    assert q_values.shape == (4, 2)
    for result in (values, q_values, log_prob, entropy):
        assert isinstance(result, np.ndarray) and result.dtype == np.float32 and np.all(np.isfinite(result))

    # One observation is a batch of one without its axis
    for index in range(2):
        observation, action = row(observations, index), actions[index]
        single = model.predict_values(observation)
        assert single.shape == () and single == pytest.approx(values[index], rel=1e-5, abs=1e-6)
        single = model.predict_q_values(observation, action)
        assert single.shape == (2,) and single == pytest.approx(q_values[index], rel=1e-5, abs=1e-6)
        single = model.action_log_prob(observation, action)
        assert single.shape == () and single == pytest.approx(log_prob[index], rel=1e-4, abs=1e-3)
        assert model.entropy(observation).shape == ()

    # The networks' own numbers, from the observations as the buffer would give them
    obs, _ = model.policy.obs_to_tensor(observations)
    low, high = action_space.low, action_space.high
    scaled = th.as_tensor(2.0 * (actions - low) / (high - low) - 1.0, dtype=th.float32).reshape(4, -1)
    with th.no_grad():
        np.testing.assert_allclose(values, model.value(obs).squeeze(1).numpy(), rtol=1e-6)
        assert_same(model.policy.predict_values(obs).numpy(), values.reshape(4, 1))
        for critic in range(2):
            expected = model.critic(obs, scaled)[critic].squeeze(1).numpy()
            np.testing.assert_allclose(q_values[:, critic], expected, rtol=1e-4, atol=1e-5)
    assert_same(parameters_of(model.policy), before)


@pytest.mark.parametrize("low, high", [(-1.0, 1.0), (-2.0, 2.0), (0.0, 10.0), (-0.1, 0.3)])
@pytest.mark.parametrize("use_sde", [False, True])
def test_density_integrates_to_one_over_the_environments_units(low, high, use_sde):
    model = small(
        SACV,
        RandomEnv(spaces.Box(-1.0, 1.0, shape=(3,), dtype=np.float32), spaces.Box(low, high, shape=(1,), dtype=np.float32)),
        use_sde=use_sde,
        policy_kwargs=dict(net_arch=[8], log_std_init=-1.0),
    )
    with th.no_grad():
        if not use_sde:
            model.actor.mu.bias.fill_(0.3)
            model.actor.log_std.bias.fill_(-0.7)
    n = 20_001
    actions = np.linspace(low, high, n, dtype=np.float32).reshape(-1, 1)
    observations = np.full((n, 3), 0.2, dtype=np.float32)
    density = np.exp(model.action_log_prob(observations, actions).astype(np.float64))
    mass = np.trapezoid(density, actions.astype(np.float64).flatten())
    assert mass == pytest.approx(1.0, abs=2e-3)


@pytest.mark.parametrize("use_sde", [False, True])
def test_log_prob_of_the_policys_own_actions(use_sde):
    action_space = ACTION_SPACES["asymmetric"]
    model = small(SACV, RandomEnv(FLOAT64, action_space), use_sde=use_sde)
    observations = samples(spaces.Box(-1.0, 1.0, shape=(3,), dtype=np.float64), 64)
    obs, _ = model.policy.obs_to_tensor(observations)
    with th.no_grad():
        scaled, expected = model.actor.action_log_prob(obs)
    actions = model.policy.unscale_action(scaled.numpy().astype(np.float64))
    # By hand: the density over [-1, 2] × [0, 0.5] is that over [-1, 1]² times (2 / 3)·(2 / 0.5)
    expected = expected.numpy() + math.log(2.0 / 3.0) + math.log(2.0 / 0.5)
    # Near the bounds, atanh in float32 loses digits
    inside = np.abs(scaled.numpy()).max(axis=1) < 0.99
    assert inside.sum() > 16
    np.testing.assert_allclose(model.action_log_prob(observations, actions)[inside], expected[inside], atol=5e-3)


def test_log_prob_at_the_bounds_is_finite():
    model = small(SACV, box_env())
    space = model.action_space
    observations = np.zeros((2, 3), dtype=np.float32)
    assert np.all(np.isfinite(model.action_log_prob(observations, np.stack([space.low, space.high]))))


@pytest.mark.parametrize("use_sde", [False, True])
def test_entropy_is_the_mean_of_minus_log_prob(use_sde):
    model = small(SACV, box_env(), use_sde=use_sde, policy_kwargs=dict(net_arch=[8], log_std_init=-1.0))
    observation = np.full(3, 0.5, dtype=np.float32)
    obs, _ = model.policy.obs_to_tensor(np.repeat(observation[None], 100_000, axis=0))
    th.manual_seed(0)
    with th.no_grad():
        if use_sde:
            # One noise matrix for each action, not one for all
            model.actor.reset_noise(batch_size=100_000)
        _, log_prob = model.actor.action_log_prob(obs)
    expected, error = -log_prob.mean().item(), log_prob.std().item() / math.sqrt(100_000)
    estimate = model.entropy(observation, n_samples=100_000).item()
    # The log-determinant that is left to sample has no larger deviation than log π: five standard errors of both
    assert estimate == pytest.approx(expected, abs=5.0 * math.sqrt(2.0) * error)
    assert error < 0.01


def test_entropy_of_a_narrow_policy_by_hand():
    """Where tanh is nearly linear: ½ log(2πe σ²) in each of two dimensions, μ = 0."""
    model = small(SACV, box_env())
    with th.no_grad():
        for layer, bias in ((model.actor.mu, 0.0), (model.actor.log_std, -5.0)):
            layer.weight.zero_()
            layer.bias.fill_(bias)
    expected = 2.0 * (0.5 * math.log(2.0 * math.pi * math.e) - 5.0)
    assert model.entropy(np.zeros(3, dtype=np.float32)).item() == pytest.approx(expected, abs=1e-3)


def test_entropy_draws_from_its_own_generator():
    model = small(SACV, box_env())
    observations = np.ones((2, 3), dtype=np.float32)
    state, numpy_state = th.get_rng_state(), np.random.get_state()
    first = model.entropy(observations, n_samples=3)
    assert th.equal(th.get_rng_state(), state)
    assert_same(np.random.get_state(), numpy_state)
    assert_same(model.entropy(observations, n_samples=3), first)
    assert not np.array_equal(model.entropy(observations, n_samples=3, seed=1), first)
    assert not np.array_equal(model.entropy(observations, n_samples=4), first)


def test_policy_log_prob_in_float64():
    """Without the rounding of float32: SB3's log-density of the same action to ten digits."""
    model = as_double(small(SACV, box_env()))
    obs = th.linspace(-1.0, 1.0, 30, dtype=th.float64).reshape(10, 3)
    # SB3 casts observations to float32, and the networks here compute in float64
    model.policy.actor.features_extractor.forward = lambda observations: observations.flatten(start_dim=1).double()
    with th.no_grad():
        actions, expected = model.actor.action_log_prob(obs)
        log_prob = model.policy.log_prob(obs, actions)
    assert log_prob.shape == (10, 1)
    th.testing.assert_close(log_prob.squeeze(1), expected, rtol=1e-8, atol=1e-8)


def test_reading_is_in_eval_mode():
    policy_kwargs = dict(net_arch=[8], features_extractor_class=BatchNormDropoutExtractor)
    model = filled(box_env(), policy_kwargs=policy_kwargs)
    train(model, 2)
    observations = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
    actions, _ = model.predict(observations, deterministic=True)
    readers = (
        model.predict_values,
        lambda obs: model.predict_q_values(obs, actions),
        lambda obs: model.action_log_prob(obs, actions),
        model.entropy,
    )
    before = parameters_of(model.policy)
    for read in readers:
        model.policy.set_training_mode(True)
        first = read(observations)
        model.policy.set_training_mode(True)
        # Dropout would make them differ, batch norm would move its statistics
        assert_same(read(observations), first)
    assert_same(parameters_of(model.policy), before)


def test_reading_has_no_gradient_and_does_not_change_training():
    plain, read = (filled(box_env()) for _ in range(2))
    observations = np.ones((2, 3), dtype=np.float32)
    for model in (plain, read):
        th.manual_seed(0)
        np.random.seed(0)
        train(model, 2)
        if model is read:
            model.predict_values(observations)
            model.entropy(observations)
            model.predict_q_values(observations, np.full((2, 2), 0.1, dtype=np.float32))
        train(model, 2)
    assert_same(parameters_of(read.policy), parameters_of(plain.policy))


def test_errors():
    model = small(SACV, box_env())
    observations, actions = np.zeros((2, 3), dtype=np.float32), np.full((2, 2), 0.1, dtype=np.float32)
    for read in (model.predict_q_values, model.action_log_prob):
        with pytest.raises(ValueError, match="Got 2 observations but 1 actions: pass one action per observation"):
            read(observations, actions[:1])
        with pytest.raises(ValueError, match=r"Got actions of shape \(2, 3\)"):
            read(observations, np.zeros((2, 3)))
        # -1 is in [-1, 1] but not in the second action's [0, 0.5]
        with pytest.raises(ValueError, match="in its own units"):
            read(observations, -np.ones((2, 2)))
        with pytest.raises(ValueError, match="in its own units"):
            read(observations, np.full((2, 2), np.nan))
    with pytest.raises(ValueError, match="n_samples must be a whole number of at least 1, got 0"):
        model.entropy(observations, n_samples=0)
    # What env.reset() returns
    with pytest.raises(ValueError, match="pass only obs"):
        model.predict_values((observations, {}))
    with pytest.raises(ValueError, match="Unexpected observation shape"):
        model.predict_values(np.zeros((2, 4), dtype=np.float32))
