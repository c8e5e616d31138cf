"""When and how the target value network moves."""

import numpy as np
import pytest
import torch as th

from tests.helpers import (
    BatchNormDropoutExtractor,
    assert_close,
    assert_same,
    box_env,
    differs,
    filled,
    parameters_of,
    save_and_load,
    train,
)


def test_starts_as_a_copy_with_its_own_extractor():
    for share in (False, True):
        model = filled(
            box_env(),
            policy_kwargs=dict(
                net_arch=[8], features_extractor_class=BatchNormDropoutExtractor, share_features_extractor=share
            ),
        )
        assert_same(parameters_of(model.value_target), parameters_of(model.value))
        own = {id(param) for param in model.value_target.parameters()}
        for network in (model.actor, model.critic, model.value):
            assert own.isdisjoint(id(param) for param in network.parameters())
        shared = model.value.features_extractor is model.actor.features_extractor
        assert shared is share
        assert (model.critic.features_extractor is model.actor.features_extractor) is share


@pytest.mark.parametrize("gradient_steps", [1, 2, 4])
@pytest.mark.parametrize("save_after", [None, 4])
def test_hard_update_every_third_gradient_step(execution, gradient_steps, save_after, tmp_path):
    """V̄ moves after updates 3, 6, 9, ..., counted over all calls of ``train()``, and becomes the V just stepped."""
    model = filled(box_env(), tau=1.0, target_update_interval=3, **execution)
    start = parameters_of(model.value_target)
    # The same model trained one update at a time tells V after each update
    values = {0: start}
    single = filled(box_env(), tau=1.0, target_update_interval=3, **execution)
    # Batches of one update each, the same in both
    model.replay_buffer.__class__ = single.replay_buffer.__class__ = type("OneByOne", (type(model.replay_buffer),), {})
    for trained, calls in ((single, [1] * 12), (model, [gradient_steps] * (12 // gradient_steps))):
        th.manual_seed(3)
        rng = th.get_rng_state()
        for call in calls:
            _seed_numpy(trained._n_updates)
            th.set_rng_state(rng)
            if trained is model and save_after == trained._n_updates:
                trained = save_and_load(trained, tmp_path / "model")
                _seed_numpy(trained._n_updates)
                th.set_rng_state(rng)
            train(trained, call)
            rng = th.get_rng_state()
            if trained is single:
                values[trained._n_updates] = parameters_of(trained.value)
            due = trained._n_updates // 3 * 3
            if trained is single or gradient_steps == 1:
                assert_same(parameters_of(trained.value_target), values[due], f"after update {trained._n_updates}")
            assert differs(parameters_of(trained.value_target), start) is (due > 0)
            # Only when an update is due at the end of this call is V̄ the V just stepped
            is_current = not differs(parameters_of(trained.value), parameters_of(trained.value_target))
            assert is_current is (trained._n_updates % 3 == 0)


def _seed_numpy(seed: int) -> None:
    """The replay buffer draws from numpy's global generator."""
    np.random.seed(seed)


def test_soft_update(execution):
    model = filled(box_env(), tau=0.25, **execution)
    before = parameters_of(model.value_target)
    train(model, 1)
    expected = {name: 0.75 * before[name] + 0.25 * param for name, param in parameters_of(model.value).items()}
    assert_close(parameters_of(model.value_target), expected, rtol=1e-6, atol=1e-7)
    assert differs(parameters_of(model.value_target), before)


def test_tau_zero_never_moves(execution):
    model = filled(box_env(), tau=0.0, **execution)
    before = parameters_of(model.value_target)
    train(model, 3)
    assert_same(parameters_of(model.value_target), before)


def test_batch_norm_statistics_are_copied():
    model = filled(
        box_env(),
        policy_kwargs=dict(net_arch=[8], features_extractor_class=BatchNormDropoutExtractor),
        tau=0.0,
        target_update_interval=2,
    )
    start = model.value_target.features_extractor.batch_norm.running_mean.clone()
    train(model, 1)
    value_norm = model.value.features_extractor.batch_norm
    target_norm = model.value_target.features_extractor.batch_norm
    assert not th.equal(value_norm.running_mean, start)
    assert th.equal(target_norm.running_mean, start)
    train(model, 1)
    # Copied when the target is due, even though tau = 0 moves no weight
    assert th.equal(target_norm.running_mean, value_norm.running_mean)
    assert th.equal(target_norm.running_var, value_norm.running_var)
    assert target_norm.num_batches_tracked == value_norm.num_batches_tracked == 2
    # and never by its own forward passes
    assert not target_norm.training
