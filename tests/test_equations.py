"""Every equation against numbers worked out by hand."""

import math

import numpy as np
import pytest
import torch as th
from hypothesis import given, settings
from hypothesis import strategies as st

from sb3_softvalue import equations

HALF_LOG_2PI = 0.9189385332046727


def column(*numbers: float) -> th.Tensor:
    return th.tensor(numbers, dtype=th.float64).reshape(-1, 1)


def assert_equal(actual: th.Tensor, expected: th.Tensor, atol: float = 1e-12) -> None:
    assert actual.shape == expected.shape
    th.testing.assert_close(actual, expected, rtol=0.0, atol=atol)


def test_squash_log_det():
    actions = th.tensor([[0.0, 0.0], [0.6, 0.0], [0.6, -0.8]], dtype=th.float64)
    # 1 - 0² = 1, 1 - 0.6² = 0.64, 1 - 0.8² = 0.36; log 1 = 0, log 0.64 = -0.446287..., log(0.64·0.36) = -1.467938...
    expected = column(0.0, -0.44628710262841953, -1.4679383572060143)
    # The constant that keeps the logarithm finite changes log x by 1e-6 / x, at most 4.4e-6 here
    assert_equal(equations.squash_log_det(actions), expected, atol=5e-6)
    # With the constant, at the bound: log 1e-6
    assert_equal(equations.squash_log_det(th.ones(1, 1, dtype=th.float64)), column(-13.815510557964274))


def test_squash_log_det_of_samples():
    # Any leading shape: (n_samples, batch, action_dim) -> (n_samples, batch, 1)
    assert equations.squash_log_det(th.zeros(7, 5, 3)).shape == (7, 5, 1)


def test_squashed_gaussian():
    # Row 0: μ = 0, σ = 1, ε = 0: a = 0, log π = -½ log 2π per dimension, two of them.
    # Row 1: μ = (½ log 3, 0), σ = (2, 1), ε = (0, 0): tanh(½ log 3) = (3 - 1)/(3 + 1) = ½, so that
    #        log π = -½ log 2π - log 2 - log(1 - ¼)  -½ log 2π = -1.8378770664 - 0.6931471806 + 0.2876820724
    # Row 2: μ = 0, σ = (½ log 3, 1), ε = (1, -1): a = (½, tanh(-1) = -0.7615941560),
    #        Gaussian: 2·(-½ - ½ log 2π) - log(½ log 3) = -2.8378770664 + 0.5990691727 = -2.2388078937
    #        (½ log 3 = 0.5493061443, its log is -0.5990893665...: see the exact number below)
    log_3_half = 0.5 * math.log(3.0)
    mean = th.tensor([[0.0, 0.0], [log_3_half, 0.0], [0.0, 0.0]], dtype=th.float64)
    log_std = th.tensor([[0.0, 0.0], [math.log(2.0), 0.0], [math.log(log_3_half), 0.0]], dtype=th.float64)
    noise = th.tensor([[0.0, 0.0], [0.0, 0.0], [1.0, -1.0]], dtype=th.float64)

    actions, log_prob = equations.squashed_gaussian(mean, log_std, noise)

    assert_equal(actions, th.tensor([[0.0, 0.0], [0.5, 0.0], [0.5, -0.7615941559557649]], dtype=th.float64))
    row_2 = 2 * (-0.5 - HALF_LOG_2PI) - math.log(log_3_half) - math.log(0.75) - math.log(0.41997434161402614)
    assert_equal(log_prob, column(-1.8378770664093453, -2.2433421745175, row_2), atol=1e-5)


@pytest.mark.parametrize("mean, std", [(0.0, 1.0), (0.5, 0.3), (-1.0, 0.7), (0.2, 2.0)])
def test_density_integrates_to_one(mean, std):
    # u is the action before the squashing; its even spacing resolves the peaks of the density at ±1
    u = th.linspace(-10.0, 10.0, 400_001, dtype=th.float64)
    noise = ((u - mean) / std).reshape(-1, 1)
    actions, log_prob = equations.squashed_gaussian(th.full_like(noise, mean), th.full_like(noise, math.log(std)), noise)
    mass = th.trapezoid(log_prob.exp().squeeze(), actions.squeeze())
    # SB3's 1e-6 inside the logarithm takes a little mass at the bounds: 5e-5 at most
    assert mass.item() == pytest.approx(1.0, abs=1e-3)


@settings(max_examples=50, deadline=None)
@given(mean=st.floats(-1.5, 1.5), log_std=st.floats(-3.0, 0.0), noise=st.floats(-2.0, 2.0))
def test_log_prob_is_that_of_a_transformed_normal(mean, log_std, noise):
    mean, log_std, noise = column(mean), column(log_std), column(noise)
    action, log_prob = equations.squashed_gaussian(mean, log_std, noise)
    transformed = th.distributions.TransformedDistribution(
        th.distributions.Normal(mean, log_std.exp()), [th.distributions.TanhTransform(cache_size=1)]
    )
    # 1e-6 / (1 - tanh²(3.5)) = 2.7e-4 is what SB3's constant may change
    th.testing.assert_close(log_prob, transformed.log_prob(action), rtol=0.0, atol=3e-4)


def test_reparameterised_sample_has_the_gradient_of_its_parameters():
    mean = column(0.3).requires_grad_()
    log_std = column(-0.5).requires_grad_()
    action, _ = equations.squashed_gaussian(mean, log_std, column(2.0))
    action.backward()
    # a = tanh(0.3 + 2·exp(-0.5)): da/dμ = 1 - a², da/dlogσ = (1 - a²)·2·exp(-0.5)
    slope = 1.0 - math.tanh(0.3 + 2.0 * math.exp(-0.5)) ** 2
    assert_equal(mean.grad, column(slope))
    assert_equal(log_std.grad, column(slope * 2.0 * math.exp(-0.5)))


def test_normal_log_prior():
    actions = th.tensor([[0.0, 0.0], [1.0, -1.0], [0.5, 0.0]], dtype=th.float64)
    # -½ Σ a² - 2·½ log 2π: 0, ½ + ½, 1/8
    expected = column(-1.8378770664093453, -2.8378770664093453, -1.9628770664093453)
    assert_equal(equations.normal_log_prior(actions), expected)


def test_action_log_prior():
    actions = th.tensor([[0.0, 0.0], [1.0, -1.0]], dtype=th.float64)
    assert equations.action_log_prior("uniform", actions) == 0.0
    # The density over the square [-1, 1]² is ¼: -log 4 = -1.3862943611
    assert equations.action_log_prior("normalized_uniform", actions) == pytest.approx(-1.3862943611198906, abs=1e-15)
    assert_equal(equations.action_log_prior("normal", actions), column(-1.8378770664093453, -2.8378770664093453))
    with pytest.raises(ValueError, match=r"action_prior must be one of 'uniform', .*, got 'gaussian'"):
        equations.action_log_prior("gaussian", actions)


def test_bonus_of_a_uniform_policy_is_zero_with_the_normalized_uniform_prior():
    # log π = -2·ln 2 over [-1, 1]²: V = 3 - 0.5·(-1.386 + 1.386) = 3, and J_π = -3. With "uniform" V = 3 + 0.5·1.386 = 3.693
    actions, log_prob = th.zeros(1, 2, dtype=th.float64), column(-1.3862943611198906)
    for prior, expected in (("normalized_uniform", 3.0), ("uniform", 3.6931471805599454)):
        terms = column(3.0), log_prob, th.tensor(0.5, dtype=th.float64), equations.action_log_prior(prior, actions)
        assert_equal(equations.soft_value_target(*terms), column(expected))
        assert_equal(equations.policy_loss(*terms), th.tensor(-expected, dtype=th.float64))


@pytest.mark.parametrize(
    "q_values, expected",
    [
        ([column(1.0, -2.0)], column(1.0, -2.0)),
        ([column(1.0, -2.0), column(0.5, 3.0)], column(0.5, -2.0)),
        ([column(1.0, 2.0), column(3.0, 4.0), column(2.0, -1.0)], column(1.0, -1.0)),
    ],
)
def test_min_over_critics(q_values, expected):
    assert_equal(equations.min_over_critics(tuple(q_values)), expected)


def test_min_over_critics_has_the_gradient_of_the_smallest():
    first, second = column(1.0, 5.0).requires_grad_(), column(2.0, 4.0).requires_grad_()
    equations.min_over_critics([first, second]).sum().backward()
    assert_equal(first.grad, column(1.0, 0.0))
    assert_equal(second.grad, column(0.0, 1.0))


def test_soft_q_target():
    # 1 + 0.5·10 = 6; terminated: 2; -1 + 0.5·(-4) = -3
    rewards, dones, values = column(1.0, 2.0, -1.0), column(0.0, 1.0, 0.0), column(10.0, 99.0, -4.0)
    assert_equal(equations.soft_q_target(rewards, dones, 0.5, values), column(6.0, 2.0, -3.0))
    # n-step: each transition has its own discount; 1 + 0.25·10 = 3.5; terminated: 2; -1 + 0.125·(-4) = -1.5
    discounts = column(0.25, 0.5, 0.125)
    assert_equal(equations.soft_q_target(rewards, dones, discounts, values), column(3.5, 2.0, -1.5))


def test_soft_q_loss():
    target = column(0.0, 1.0)
    # ½·mean(1², 2²) = 1.25
    assert_equal(equations.soft_q_loss([column(1.0, 3.0)], target), th.tensor(1.25, dtype=th.float64))
    # and ½·mean(0², 4²) = 4 more
    two = equations.soft_q_loss([column(1.0, 3.0), column(0.0, -3.0)], target)
    assert_equal(two, th.tensor(5.25, dtype=th.float64))


def test_soft_value_target():
    min_q, log_prob = column(1.0, -2.0), column(-3.0, 0.5)
    # 1 + 0.2·3 = 1.6; -2 - 0.2·0.5 = -2.1
    assert_equal(equations.soft_value_target(min_q, log_prob, column(0.2)), column(1.6, -2.1))
    assert_equal(equations.soft_value_target(min_q, log_prob, th.tensor(0.2, dtype=th.float64)), column(1.6, -2.1))
    # With log p(a) = (-1, -2): 1 - 0.2·(-3 + 1) = 1.4; -2 - 0.2·(0.5 + 2) = -2.5
    log_prior = column(-1.0, -2.0)
    assert_equal(equations.soft_value_target(min_q, log_prob, th.tensor(0.2), log_prior), column(1.4, -2.5), atol=1e-7)


def test_soft_value_loss():
    # ½·mean(1², 3²) = 2.5
    assert_equal(equations.soft_value_loss(column(1.0, 0.0), column(0.0, 3.0)), th.tensor(2.5, dtype=th.float64))


def test_policy_loss():
    min_q, log_prob = column(1.0, -2.0), column(-3.0, 0.5)
    ent_coef = th.tensor(0.2, dtype=th.float64)
    # mean(0.2·(-3) - 1, 0.2·0.5 + 2) = mean(-1.6, 2.1) = 0.25
    assert_equal(equations.policy_loss(min_q, log_prob, ent_coef), th.tensor(0.25, dtype=th.float64))
    # with log p(a) = (-1, -2): mean(0.2·(-2) - 1, 0.2·2.5 + 2) = mean(-1.4, 2.5) = 0.55
    with_prior = equations.policy_loss(min_q, log_prob, ent_coef, column(-1.0, -2.0))
    assert_equal(with_prior, th.tensor(0.55, dtype=th.float64))


def test_temperature_loss():
    log_ent_coef = th.tensor([0.5], dtype=th.float64, requires_grad=True)
    loss = equations.temperature_loss(log_ent_coef, column(-3.0, 2.0), -1.0)
    # -0.5·mean(-3 - 1, 2 - 1) = -0.5·(-1.5) = 0.75; the gradient is 1.5: less entropy than wanted lets α grow
    assert_equal(loss.detach(), th.tensor(0.75, dtype=th.float64))
    loss.backward()
    assert_equal(log_ent_coef.grad, th.tensor([1.5], dtype=th.float64))


def test_polyak_update():
    params = [th.tensor([1.0, 2.0]), th.tensor([[4.0]])]
    target = [th.tensor([3.0, 2.0]), th.tensor([[0.0]])]
    before = list(target)
    equations.polyak_update(params, target, tau=0.25)
    # 0.25·1 + 0.75·3 = 2.5; 0.25·2 + 0.75·2 = 2; 0.25·4 = 1
    assert_equal(target[0], th.tensor([2.5, 2.0]))
    assert_equal(target[1], th.tensor([[1.0]]))
    assert_equal(params[0], th.tensor([1.0, 2.0]))
    assert all(tensor is old for tensor, old in zip(target, before, strict=True))


@settings(max_examples=50, deadline=None)
@given(
    numbers=st.lists(st.tuples(st.floats(-1e6, 1e6, width=32), st.floats(-1e6, 1e6, width=32)), min_size=1),
    tau=st.sampled_from([0.0, 0.005, 0.5, 1.0]),
)
def test_polyak_update_interpolates(numbers, tau):
    params = th.tensor([first for first, _ in numbers])
    target = th.tensor([second for _, second in numbers])
    moved = target.clone()
    equations.polyak_update([params], [moved], tau)
    if tau in (0.0, 1.0):
        # Exactly nothing, and exactly a copy
        assert np.array_equal(moved, params if tau == 1.0 else target)
    else:
        assert th.all(moved <= th.maximum(params, target)) and th.all(moved >= th.minimum(params, target))


def test_polyak_update_has_no_gradient():
    params, target = [th.ones(2, requires_grad=True)], [th.zeros(2)]
    equations.polyak_update(params, target, tau=0.5)
    assert not target[0].requires_grad
