"""When and how the target value network moves."""

from typing import Any

import pytest
import torch as th
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.torch_layers import FlattenExtractor

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


class OneByOneBuffer(ReplayBuffer):
    """Not SB3's own class, so that it is sampled for one gradient step at a time."""


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


def hard_updates(calls: list[int], execution: dict[str, Any], save_after: int | None, path: Any) -> dict[int, tuple[Any, Any]]:
    """V and V̄ after each call of ``train()``, by the number of updates done. The batches do not depend on the calls."""
    model = filled(box_env(), tau=1.0, target_update_interval=3, **execution)
    model.replay_buffer.__class__ = OneByOneBuffer
    networks = {0: (parameters_of(model.value), parameters_of(model.value_target))}
    for gradient_steps in calls:
        if model._n_updates == save_after:
            model = save_and_load(model, path)
        train(model, gradient_steps)
        networks[model._n_updates] = parameters_of(model.value), parameters_of(model.value_target)
    return networks


@pytest.mark.parametrize("gradient_steps", [1, 2, 4])
@pytest.mark.parametrize("save_after", [None, 4])
def test_hard_update_every_third_gradient_step(execution, gradient_steps, save_after, tmp_path):
    """V̄ moves after updates 3, 6, 9, 12, counted over all calls of ``train()``, and becomes the V just stepped."""
    one_by_one = hard_updates([1] * 12, execution, None, tmp_path)
    networks = hard_updates([gradient_steps] * (12 // gradient_steps), execution, save_after, tmp_path / "model")
    assert len(networks) == 1 + 12 // gradient_steps
    for n_updates, (value, value_target) in networks.items():
        assert_same(value, one_by_one[n_updates][0], f"V after {n_updates}")
        assert_same(value_target, one_by_one[n_updates - n_updates % 3][0], f"V̄ after {n_updates}")
        if n_updates > 0:
            assert differs(value, one_by_one[n_updates - 1][0])


def test_soft_update(execution):
    model = filled(box_env(), tau=0.25, **execution)
    before = parameters_of(model.value_target)
    train(model, 1)
    expected = {name: 0.75 * before[name] + 0.25 * param for name, param in parameters_of(model.value).items()}
    assert_close(parameters_of(model.value_target), expected, rtol=1e-6, atol=1e-7)
    assert differs(parameters_of(model.value_target), before)


class TiedExtractor(FlattenExtractor):
    """A layer under two names, and another layer with its weight."""

    def __init__(self, observation_space: Any):
        super().__init__(observation_space)
        self.first = self.again = th.nn.Linear(3, 3)
        self.other = th.nn.Linear(3, 3)
        self.other.weight = self.first.weight

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return self.other(self.again(self.first(super().forward(observations))))


def test_shared_layers_move_once(execution):
    model = filled(box_env(), tau=0.25, policy_kwargs=dict(net_arch=[8], features_extractor_class=TiedExtractor), **execution)
    # Without parameters it needs no twin in the target
    model.value.add_module("unused", th.nn.ReLU())
    before = parameters_of(model.value_target)
    train(model, 1)
    value = parameters_of(model.value)
    expected = {name: 0.75 * param + 0.25 * value[name] for name, param in before.items()}
    assert_close(parameters_of(model.value_target), expected, rtol=1e-6, atol=1e-7)


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
