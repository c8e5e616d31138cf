"""``model.train`` against the second implementation in ``reference.py``, over many whole updates."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import gymnasium as gym
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import HerReplayBuffer

from sb3_softvalue import SACV
from tests.helpers import (
    ClockEnv,
    DoubleExtractor,
    PointGoalEnv,
    RandomEnv,
    as_double,
    box_env,
    dict_space,
    filled,
    record_samples,
    split_samples,
    train,
)
from tests.reference import ReferenceSAC

# Several sizes of train() calls, so that batches come from the buffer one by one and in chunks
GRADIENT_STEPS = (1, 4, 1, 19, 25)
# Rounding of two orders of summation, over 50 updates. In float32 Adam turns the rounding of a gradient near zero into
# a difference of a part of the learning rate (1e-3), which is why the absolute tolerance is not smaller.
TOLERANCE = {th.float64: dict(rtol=1e-11, atol=1e-11), th.float32: dict(rtol=1e-3, atol=2e-4)}


def make_reference(model: SACV) -> ReferenceSAC:
    return ReferenceSAC(
        model.policy,
        optimizer_class=model.policy.optimizer_class,
        learning_rate=model.learning_rate,
        log_ent_coef=model.log_ent_coef,
        ent_coef=None if model.log_ent_coef is not None else model.ent_coef_tensor.item(),
        target_entropy=model.target_entropy,
        tau=model.tau,
        target_update_interval=model.target_update_interval,
        action_prior=model.action_prior,
        reward_scale=model.reward_scale,
        max_grad_norm=model.max_grad_norm,
    )


@contextmanager
def default_dtype(dtype: th.dtype) -> Iterator[None]:
    """In which the noise is drawn, on both sides."""
    before = th.get_default_dtype()
    th.set_default_dtype(dtype)
    try:
        yield
    finally:
        th.set_default_dtype(before)


def train_both(model: SACV, dtype: th.dtype, gradient_steps: tuple[int, ...] = GRADIENT_STEPS) -> ReferenceSAC:
    """Train the model, then the reference on the same batches and the same noise; compare the losses of each call."""
    reference = make_reference(model)
    recorded = record_samples(model.replay_buffer, dtype)
    with default_dtype(dtype):
        return _train_both(model, reference, recorded, gradient_steps)


def _train_both(model: SACV, reference: ReferenceSAC, recorded: list[Any], gradient_steps: tuple[int, ...]) -> ReferenceSAC:
    th.manual_seed(5)
    logged = [train(model, n) for n in gradient_steps]
    assert model._n_updates == sum(gradient_steps)

    th.manual_seed(5)
    batches = split_samples(recorded, model.batch_size, model.gamma)
    for n, log in zip(gradient_steps, logged, strict=True):
        losses = []
        for _ in range(n):
            noise = th.randn(model.batch_size, *model.action_space.shape)
            losses.append(reference.update(next(batches), noise))
        for name in losses[0]:
            mean = sum(loss[name].item() for loss in losses) / n
            assert log[f"train/{name}_loss"] == pytest.approx(mean, rel=1e-3, abs=1e-5)
    assert next(batches, None) is None
    return reference


def assert_equal_models(model: SACV, reference: ReferenceSAC, **tolerance: float) -> None:
    """Every parameter of every network, the target, α and the optimizers' states."""
    actual: dict[str, list[Any]] = {
        name: [param.detach() for param in getattr(model, name).parameters()]
        for name in ("actor", "critic", "value", "value_target")
    }
    actual["log_ent_coef"] = [] if model.log_ent_coef is None else [model.log_ent_coef.detach()]
    expected = reference.parameters()
    assert set(actual) == set(expected)
    for name in expected:
        assert len(actual[name]) == len(expected[name])
        for number, (param, expected_param) in enumerate(zip(actual[name], expected[name], strict=True)):
            th.testing.assert_close(param, expected_param, msg=lambda m, n=name, i=number: f"{n}[{i}]: {m}", **tolerance)

    states = {
        "actor": model.actor.optimizer,
        "critic": model.critic.optimizer,
        "value": model.value.optimizer,
        "ent_coef": model.ent_coef_optimizer,
    }
    for name, expected_states in reference.optimizer_states().items():
        params = states[name].param_groups[0]["params"]
        assert len(params) == len(expected_states)
        for param, expected_state in zip(params, expected_states, strict=True):
            state = states[name].state[param]
            for key in expected_state:
                if key == "momentum_buffer":
                    # SGD without momentum has none on either side
                    assert state.get(key) is None and expected_state[key] is None
                    continue
                # The fused Adam counts its steps in float32 whatever the parameters are
                th.testing.assert_close(
                    state[key],
                    expected_state[key],
                    msg=lambda m, n=name, k=key: f"{n} {k}: {m}",
                    check_dtype=key != "step",
                    **tolerance,
                )


@pytest.mark.parametrize("optimizer_class", [th.optim.Adam, th.optim.SGD])
@pytest.mark.parametrize("ent_coef", ["auto_0.5", 0.3])
@pytest.mark.parametrize("share_features_extractor", [False, True])
def test_fifty_updates_in_float64(execution, optimizer_class, ent_coef, share_features_extractor):
    model = filled(
        box_env(),
        policy_kwargs=dict(
            net_arch=dict(pi=[8, 7], qf=[9], vf=[6, 8]),
            features_extractor_class=DoubleExtractor,
            optimizer_class=optimizer_class,
            share_features_extractor=share_features_extractor,
        ),
        learning_rate=1e-2,
        ent_coef=ent_coef,
        tau=0.1,
        **execution,
    )
    before = make_reference(as_double(model))
    reference = train_both(model, th.float64)
    assert_equal_models(model, reference, **TOLERANCE[th.float64])
    for name, params in reference.parameters().items():
        for param, old in zip(params, before.parameters()[name], strict=True):
            # Nothing can be equal because nothing was learned
            assert (param - old).abs().max() > 1e-4, name


@pytest.mark.parametrize("optimizer_class", [th.optim.Adam, th.optim.SGD])
@pytest.mark.parametrize("ent_coef", ["auto", 0.3])
def test_fifty_updates_in_float32(execution, optimizer_class, ent_coef):
    model = filled(
        box_env(),
        policy_kwargs=dict(net_arch=[16, 16], optimizer_class=optimizer_class),
        learning_rate=1e-3,
        ent_coef=ent_coef,
        **execution,
    )
    reference = train_both(model, th.float32)
    assert_equal_models(model, reference, **TOLERANCE[th.float32])


def test_two_hundred_updates_in_float64(execution):
    model = filled(
        box_env(),
        policy_kwargs=dict(net_arch=[8], features_extractor_class=DoubleExtractor),
        learning_rate=1e-3,
        **execution,
    )
    reference = train_both(as_double(model), th.float64, gradient_steps=(200,))
    # Four times as many updates for the rounding to grow
    assert_equal_models(model, reference, rtol=1e-10, atol=1e-10)


OPTIONS = {
    "normal prior": dict(action_prior="normal", ent_coef=0.7),
    "normalized uniform prior": dict(action_prior="normalized_uniform"),
    "reward scale": dict(reward_scale=5.0),
    "gradient clipping": dict(max_grad_norm=0.05),
    "soft target every third update": dict(tau=0.3, target_update_interval=3),
    "hard target every seventh update": dict(tau=1.0, target_update_interval=7),
    "one critic": dict(policy_kwargs=dict(net_arch=[8], n_critics=1)),
    "four critics": dict(policy_kwargs=dict(net_arch=[8], n_critics=4)),
    "target entropy": dict(target_entropy=-0.5),
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options_in_float64(execution, options):
    options = dict(options)
    policy_kwargs = dict(net_arch=[8], features_extractor_class=DoubleExtractor) | options.pop("policy_kwargs", {})
    model = filled(box_env(), policy_kwargs=policy_kwargs, learning_rate=1e-2, **options, **execution)
    reference = train_both(as_double(model), th.float64)
    assert_equal_models(model, reference, **TOLERANCE[th.float64])


ENVS = {
    "Dict": (lambda: RandomEnv(dict_space()), "MultiInputPolicy", {}),
    "n-step": (lambda: ClockEnv(episode_length=7), "MlpPolicy", dict(n_steps=3)),
    "time limit": (lambda: gym.wrappers.TimeLimit(ClockEnv(), 5), "MlpPolicy", {}),
    "HER": (PointGoalEnv, "MultiInputPolicy", dict(replay_buffer_class=HerReplayBuffer)),
    "image": (
        lambda: RandomEnv(spaces.Box(0, 255, shape=(36, 36, 1), dtype="uint8")),
        "CnnPolicy",
        dict(policy_kwargs=dict(net_arch=[8], features_extractor_kwargs=dict(features_dim=8))),
    ),
    "shared image": (
        lambda: RandomEnv(spaces.Box(0, 255, shape=(36, 36, 1), dtype="uint8")),
        "CnnPolicy",
        dict(policy_kwargs=dict(net_arch=[8], features_extractor_kwargs=dict(features_dim=8), share_features_extractor=True)),
    ),
}


@pytest.mark.parametrize("make_env, policy, options", ENVS.values(), ids=ENVS)
def test_environments_in_float32(execution, make_env, policy, options):
    # SGD does not blow up rounding, so the tolerance can be tight
    options = dict(options)
    policy_kwargs = dict(net_arch=[8], optimizer_class=th.optim.SGD) | options.pop("policy_kwargs", {})
    model = filled(make_env(), policy, policy_kwargs=policy_kwargs, learning_rate=1e-3, **options, **execution)
    reference = train_both(model, th.float32, gradient_steps=(1, 4, 15))
    assert_equal_models(model, reference, rtol=1e-4, atol=1e-6)


def test_reference_can_differ(execution):
    """The tolerance is not so wide that another discount would pass."""
    model = filled(
        box_env(), policy_kwargs=dict(net_arch=[8], features_extractor_class=DoubleExtractor), gamma=0.99, **execution
    )
    model = as_double(model)
    reference = make_reference(model)
    recorded = record_samples(model.replay_buffer, th.float64)
    with default_dtype(th.float64):
        th.manual_seed(5)
        train(model, 5)
        th.manual_seed(5)
        for batch in split_samples(recorded, model.batch_size, gamma=0.98999):
            reference.update(batch, th.randn(model.batch_size, 2))
    with pytest.raises(AssertionError):
        assert_equal_models(model, reference, **TOLERANCE[th.float64])
