"""Each of SACV's own options changes what it says, by number, and nothing else."""

from typing import Any

import numpy as np
import pytest
import torch as th

from sb3_softvalue import SACV
from tests.helpers import (
    assert_close,
    assert_same,
    box_env,
    filled,
    make_constant,
    parameters_of,
    record_samples,
    small,
    train,
)

NETWORKS = ("actor", "critic", "value")


def trained_like(options: dict[str, Any], gradient_steps: int = 1, progress: float = 1.0, **kwargs: Any) -> SACV:
    """From the same seed with the same buffer, whatever the options are."""
    model = filled(box_env(), **(kwargs | options))
    model._current_progress_remaining = progress
    th.manual_seed(4)
    np.random.seed(4)
    train(model, gradient_steps)
    return model


@pytest.mark.parametrize("reward_scale", [5.0, 0.1, lambda progress: 2.0 + 4.0 * progress])
def test_reward_scale(execution, reward_scale):
    model = filled(box_env(), reward_scale=reward_scale, policy_kwargs=dict(net_arch=[8], n_critics=1), **execution)
    # Q = V̄ = 0: the loss of the critic is ½·mean (scale·r)²
    make_constant(model.critic.qf0, 0.0)
    make_constant(model.value_target.vf, 0.0)
    recorded = record_samples(model.replay_buffer)
    model._current_progress_remaining = 0.25
    log = train(model, 1)
    scale = 3.0 if callable(reward_scale) else reward_scale
    rewards = recorded[0].rewards.numpy()
    assert np.abs(rewards).min() > 0.0
    assert log["train/critic_loss"] == pytest.approx(0.5 * np.mean((scale * rewards) ** 2), rel=1e-5)
    # A schedule is shown, a number needs no log
    assert log.get("train/reward_scale") == (3.0 if callable(reward_scale) else None)


@pytest.mark.parametrize("number", [np.float32(2.0), np.int64(2), 2])
def test_numpy_numbers_are_numbers(number):
    assert small(SACV, box_env(), reward_scale=number).reward_scale == 2
    assert small(SACV, box_env(), max_grad_norm=number).max_grad_norm == 2


def test_reward_scale_changes_the_critics_only(execution):
    """In one gradient step; V and the actor feel it through the critics from the second on."""
    plain, scaled = trained_like(execution), trained_like(dict(reward_scale=5.0) | execution)
    for name in ("actor", "value"):
        assert_same(parameters_of(getattr(scaled, name)), parameters_of(getattr(plain, name)))
    assert not th.equal(scaled.critic.qf0[0].weight, plain.critic.qf0[0].weight)


RATES = {"qf_learning_rate": "critic", "vf_learning_rate": "value", "ent_coef_learning_rate": "log_ent_coef"}


@pytest.mark.parametrize("option", RATES)
@pytest.mark.parametrize("kind", ["number", "schedule"])
def test_learning_rate(execution, option, kind):
    """A rate of its own for one network, half as large: with SGD exactly half the step, all else equal bit for bit."""
    # α is learned with Adam, whose first step is the learning rate too
    rate = 0.005 if kind == "number" else lambda progress: 0.02 * progress
    kwargs = dict(learning_rate=0.01, policy_kwargs=dict(net_arch=[8], optimizer_class=th.optim.SGD), tau=0.0)
    start = filled(box_env(), **kwargs)
    plain = trained_like(execution, progress=0.25, **kwargs)
    model = trained_like({option: rate} | execution, progress=0.25, **kwargs)
    for name in (*NETWORKS, "log_ent_coef"):
        if name == "log_ent_coef":
            states = [dict(log_ent_coef=getattr(each, name).detach()) for each in (start, plain, model)]
        else:
            states = [parameters_of(getattr(each, name)) for each in (start, plain, model)]
        if name != RATES[option]:
            assert_same(states[2], states[1], name)
            continue
        half = {key: states[0][key] + 0.5 * (states[1][key] - states[0][key]) for key in states[0]}
        assert_close(states[2], half, rtol=1e-4, atol=1e-8)
        assert not all(th.equal(states[2][key], states[0][key]) for key in states[0])
    assert model.logger.name_to_value[f"train/{option}"] == pytest.approx(0.005)
    assert set(model.logger.name_to_value) - set(plain.logger.name_to_value) == {f"train/{option}"}


def test_learning_rate_schedule_moves_all(execution):
    model = filled(box_env(), learning_rate=lambda progress: 1e-3 * progress, **execution)
    for progress in (1.0, 0.5, 0.25):
        model._current_progress_remaining = progress
        log = train(model, 1)
        assert log["train/learning_rate"] == pytest.approx(1e-3 * progress)
        for optimizer in (model.actor.optimizer, model.critic.optimizer, model.value.optimizer, model.ent_coef_optimizer):
            assert [float(group["lr"]) for group in optimizer.param_groups] == pytest.approx([1e-3 * progress])


def test_max_grad_norm_clips_each_network_by_itself(execution):
    """With SGD the step is the learning rate times the clipped gradient, so its norm shows."""
    kwargs = dict(
        learning_rate=0.01, policy_kwargs=dict(net_arch=[8], optimizer_class=th.optim.SGD), tau=0.0, reward_scale=100.0
    )
    start = filled(box_env(), **kwargs)
    plain = trained_like(execution, **kwargs)

    def step_of(model: SACV, name: str) -> th.Tensor:
        before = th.cat([param.flatten() for param in getattr(start, name).parameters()])
        return (th.cat([param.flatten() for param in getattr(model, name).parameters()]) - before).detach()

    norms = {name: step_of(plain, name).norm().item() / 0.01 for name in NETWORKS}
    # Between the gradient norms: some networks are clipped, others are not
    assert norms["critic"] > 10.0 * max(norms["actor"], norms["value"])
    bound = 2.0 * max(norms["actor"], norms["value"])
    clipped = trained_like(dict(max_grad_norm=bound) | execution, **kwargs)
    for name in ("actor", "value"):
        # Joint clipping would have shrunk these with the critics' large gradient
        th.testing.assert_close(step_of(clipped, name), step_of(plain, name), rtol=1e-4, atol=1e-8)
    factor = bound / norms["critic"]
    th.testing.assert_close(step_of(clipped, "critic"), factor * step_of(plain, "critic"), rtol=1e-3, atol=1e-7)

    # All three by a smaller bound, each to that norm
    all_clipped = trained_like(dict(max_grad_norm=0.5 * min(norms.values())) | execution, **kwargs)
    for name in NETWORKS:
        assert step_of(all_clipped, name).norm().item() == pytest.approx(0.01 * 0.5 * min(norms.values()), rel=1e-3)


def test_max_grad_norm_clips_the_temperature(execution):
    # Adam's first moment after one step is 0.1 times the gradient
    def gradient(model: SACV) -> float:
        return model.ent_coef_optimizer.state[model.log_ent_coef]["exp_avg"].item() / 0.1

    plain = gradient(trained_like(execution))
    assert abs(plain) > 0.2
    clipped = gradient(trained_like(dict(max_grad_norm=0.1) | execution))
    assert clipped == pytest.approx(np.copysign(0.1, plain), rel=1e-4)


def test_action_prior(execution):
    """The prior is in V's loss and in the actor's, by the same number of nats."""
    # SGD, because Adam's first step is the same for any gradient of the same sign
    kwargs = dict(ent_coef=0.5, tau=0.0, policy_kwargs=dict(net_arch=[8], optimizer_class=th.optim.SGD))
    plain = trained_like(execution, **kwargs)
    prior = trained_like(dict(action_prior="normal") | execution, **kwargs)
    assert_same(parameters_of(prior.critic), parameters_of(plain.critic))
    assert not th.equal(prior.value.vf[-1].bias, plain.value.vf[-1].bias)
    assert not th.equal(prior.actor.mu.weight, plain.actor.mu.weight)

    # J_π grows by -α·mean log p(a); the squashed actions are those of the recorded batch and noise
    model = filled(box_env(), action_prior="normal", **(kwargs | execution))
    recorded = record_samples(model.replay_buffer)
    th.manual_seed(4)
    np.random.seed(4)
    state = th.get_rng_state()
    actor = {name: param.clone() for name, param in model.actor.state_dict().items()}
    log = train(model, 1)
    model.actor.load_state_dict(actor)
    th.set_rng_state(state)
    with th.no_grad():
        actions, _ = model.actor.action_log_prob(recorded[0].observations)
    log_prior = th.distributions.Normal(0.0, 1.0).log_prob(actions).sum(dim=1).mean().item()
    difference = log["train/actor_loss"] - plain.logger.name_to_value["train/actor_loss"]
    assert difference == pytest.approx(-0.5 * log_prior, rel=1e-4)


def test_same_noise_as_sb3(execution):
    """The entropy that is logged is that of SB3's own sample from the same seed."""
    model = filled(box_env(), **execution)
    recorded = record_samples(model.replay_buffer)
    th.manual_seed(4)
    with th.no_grad():
        state = th.get_rng_state()
        np.random.seed(4)
        observations = type(model.replay_buffer).sample(model.replay_buffer, model.batch_size).observations
        _, log_prob = model.actor.action_log_prob(observations)
    after = th.get_rng_state()
    th.set_rng_state(state)
    np.random.seed(4)
    log = train(model, 1)
    assert_same(recorded[0].observations, observations)
    assert log["train/entropy"] == pytest.approx(-log_prob.mean().item(), rel=1e-5)
    # and the generator is where SB3's call leaves it
    assert th.equal(th.get_rng_state(), after)


def test_logged_names(execution):
    log = train(filled(box_env(), **execution), 2)
    names = "n_updates ent_coef ent_coef_loss actor_loss critic_loss value_loss entropy value_mean qf_mean learning_rate"
    assert set(log) == {f"train/{name}" for name in names.split()}
    assert log["train/n_updates"] == 2
    fixed = train(filled(box_env(), ent_coef=0.3, **execution), 1)
    assert "train/ent_coef_loss" not in fixed
    assert fixed["train/ent_coef"] == pytest.approx(0.3)


def test_no_gradient_step(execution):
    model = filled(box_env(), **execution)
    before = parameters_of(model.policy)
    assert train(model, 0)["train/n_updates"] == 0
    assert_same(parameters_of(model.policy), before)


def test_schedules_end_at_zero_where_the_last_rollout_goes_beyond_the_total() -> None:
    # 21 of 20 steps: SB3's progress would be -0.05, and the learning rate negative
    seen = []
    options = dict(learning_starts=5, batch_size=4, train_freq=3, policy_kwargs=dict(net_arch=[8]))
    model = SACV(
        "MlpPolicy", "Pendulum-v1", learning_rate=lambda progress: seen.append(progress) or 1e-3 * progress, **options
    )
    model.learn(20)
    assert model.num_timesteps == 21 and min(seen) == 0.0
    assert model.actor.optimizer.param_groups[0]["lr"] == 0.0
