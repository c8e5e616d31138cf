"""Batch norm and dropout: which network is in which mode when."""

import numpy as np
import pytest
import torch as th

from sb3_softvalue import SACV
from tests.helpers import MODEL_LIST, BatchNormDropoutExtractor, assert_same, box_env, parameters_of, small, train

POLICY_KWARGS = dict(net_arch=[8], features_extractor_class=BatchNormDropoutExtractor)


def target_of(model):
    return model.value_target if isinstance(model, SACV) else model.critic_target


@pytest.mark.parametrize("model_class", MODEL_LIST)
@pytest.mark.parametrize("share_features_extractor", [False, True])
def test_training(model_class, share_features_extractor):
    policy_kwargs = POLICY_KWARGS | dict(share_features_extractor=share_features_extractor)
    model = small(model_class, box_env(), policy_kwargs=policy_kwargs, tau=0.5)
    start = model.actor.features_extractor.batch_norm.running_mean.clone()
    model.learn(20)
    assert not th.equal(model.actor.features_extractor.batch_norm.running_mean, start)
    critic_or_value = model.value if model_class is SACV else model.critic
    norm, target_norm = critic_or_value.features_extractor.batch_norm, target_of(model).features_extractor.batch_norm
    assert not th.equal(norm.running_mean, start)
    if model_class is SACV:
        # SAC under sharing leaves the order of its copies to the names
        assert th.equal(target_norm.running_mean, norm.running_mean)


@pytest.mark.parametrize("model_class", MODEL_LIST)
def test_modes(model_class):
    model = small(model_class, box_env(), policy_kwargs=POLICY_KWARGS)
    networks = [model.actor, model.critic] + ([model.value] if model_class is SACV else [])
    for mode in (True, False, True):
        model.policy.set_training_mode(mode)
        assert model.policy.training is mode
        assert [network.training for network in networks] == [mode] * len(networks)
        assert [network.features_extractor.dropout.training for network in networks] == [mode] * len(networks)
        assert not any(module.training for module in target_of(model).modules())
    model.predict(np.zeros(3, dtype=np.float32))
    assert not any(network.training for network in networks)
    model.learn(11)
    # The last thing was an update
    assert all(network.training for network in networks)
    assert not any(module.training for module in target_of(model).modules())


@pytest.mark.parametrize("model_class", MODEL_LIST)
def test_mode_of_every_layer(model_class):
    """Also of layers that compute the same in both: a user's hook may ask for it."""
    model = small(model_class, box_env())
    for mode in (True, False, True):
        model.policy.set_training_mode(mode)
        for network in (model.actor, model.critic):
            assert all(module.training is mode for module in network.modules())


@pytest.mark.parametrize("model_class", MODEL_LIST)
def test_predict_is_in_eval_mode(model_class):
    model = small(model_class, box_env(), policy_kwargs=POLICY_KWARGS).learn(15)
    observations = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
    before = parameters_of(model.policy)
    first, _ = model.predict(observations, deterministic=True)
    model.policy.set_training_mode(True)
    second, _ = model.predict(observations, deterministic=True)
    assert_same(second, first)
    assert_same(parameters_of(model.policy), before)


def test_statistics_move_at_each_gradient_step():
    model = small(SACV, box_env(), policy_kwargs=POLICY_KWARGS)
    model.learn(10)
    train(model, 3)
    counts = [
        int(network.features_extractor.batch_norm.num_batches_tracked)
        for network in (model.actor, model.critic, model.value, model.value_target)
    ]
    # The critics see the batch twice, with the buffer's actions and the policy's
    assert counts == [3, 6, 3, 3]
