"""The gradient of the joint objective, in float64, against each loss differentiated by itself."""

from typing import Any

import pytest
import torch as th
from torch import nn

from sb3_softvalue import SACV, equations
from sb3_softvalue.objective import Batch, JointObjective, Metrics, UpdateInputs
from tests.helpers import DoubleExtractor, as_double, assert_same, box_env, small
from tests.reference import make_reference

BATCH_SIZE = 16
OWNERS = {"soft_q_loss": "critic", "soft_value_loss": "value", "policy_loss": "actor", "temperature_loss": "ent_coef"}


def double_model(ent_coef: str | float = "auto_0.3", action_prior: str = "uniform", **policy_kwargs: Any) -> SACV:
    """A model in float64 whose features extractors have parameters, and whose target differs from V."""
    # tanh, because a dead ReLU would hide what flows through it
    policy_kwargs = dict(features_extractor_class=DoubleExtractor, net_arch=[7, 6], activation_fn=nn.Tanh) | policy_kwargs
    model = as_double(small(SACV, box_env(), ent_coef=ent_coef, action_prior=action_prior, policy_kwargs=policy_kwargs))
    th.manual_seed(1)
    with th.no_grad():
        for param in model.value_target.parameters():
            param.add_(0.1 * th.randn_like(param))
    return model


def random_batch(n_steps: bool = False) -> tuple[Batch, th.Tensor]:
    """A batch with some terminal transitions, and the noise of its gradient step."""
    generator = th.Generator().manual_seed(2)

    def randn(*shape: int) -> th.Tensor:
        return th.randn(*shape, generator=generator, dtype=th.float64)

    # float32 as from a buffer: SB3 casts observations to it
    observations, next_observations = randn(2, BATCH_SIZE, 3).float()
    dones = (randn(BATCH_SIZE, 1) > 0.5).double()
    discounts = (
        0.9 ** (1 + th.arange(BATCH_SIZE).double().reshape(-1, 1) % 3) if n_steps else th.full((BATCH_SIZE, 1), 0.9).double()
    )
    actions = th.tanh(randn(BATCH_SIZE, 2))
    batch = Batch(observations, actions, next_observations, dones, 3 * randn(BATCH_SIZE, 1), discounts)
    return batch, randn(BATCH_SIZE, 2)


def owned_params(model: SACV) -> dict[str, dict[str, th.Tensor]]:
    """The parameters of each loss. A shared features extractor belongs to the actor."""
    shared = model.policy.share_features_extractor
    params = {
        name: {
            key: param
            for key, param in getattr(model, name).named_parameters()
            if not (shared and name != "actor" and "features_extractor" in key)
        }
        for name in ("actor", "critic", "value")
    }
    if model.log_ent_coef is not None:
        params["ent_coef"] = {"log_ent_coef": model.log_ent_coef}
    return params


def evaluate(model: SACV, batch: Batch, noise: th.Tensor) -> tuple[th.Tensor, Metrics]:
    model.policy.set_training_mode(True)
    objective = JointObjective(model.actor, model.critic, model.value, model.value_target, model.action_prior)
    return objective(UpdateInputs(batch, noise, model.temperature()))


def gradients(model: SACV, objective: th.Tensor) -> dict[str, dict[str, th.Tensor | None]]:
    """The gradient of every parameter, None where the objective does not depend on it."""
    params = owned_params(model)
    flat = [param for group in params.values() for param in group.values()]
    grads = iter(th.autograd.grad(objective, flat, allow_unused=True, retain_graph=True))
    return {name: {key: next(grads) for key in group} for name, group in params.items()}


@pytest.mark.parametrize("share_features_extractor", [False, True])
@pytest.mark.parametrize("n_critics", [1, 2, 3])
@pytest.mark.parametrize("action_prior", ["uniform", "normalized_uniform", "normal"])
@pytest.mark.parametrize("ent_coef", ["auto_0.3", 0.3])
@pytest.mark.parametrize("n_steps", [False, True])
def test_joint_gradient(share_features_extractor, n_critics, action_prior, ent_coef, n_steps):
    model = double_model(ent_coef, action_prior, n_critics=n_critics, share_features_extractor=share_features_extractor)
    batch, noise = random_batch(n_steps)
    objective, metrics = evaluate(model, batch._replace(rewards=2.5 * batch.rewards), noise)
    model.reward_scale = 2.5
    expected = make_reference(model).gradients(batch, noise)

    actual = gradients(model, objective)
    assert set(actual) == set(expected)
    for name, (loss, expected_grads) in expected.items():
        assert objective.dtype == th.float64
        th.testing.assert_close(getattr(metrics, f"{name}_loss"), loss, rtol=1e-12, atol=1e-12, check_dtype=False)
        assert len(actual[name]) == len(expected_grads) > 0
        for (key, grad), expected_grad in zip(actual[name].items(), expected_grads, strict=True):
            assert expected_grad.abs().max() > 0, f"{name}.{key} is not tested"
            th.testing.assert_close(grad, expected_grad, rtol=1e-12, atol=1e-12, msg=f"{name}.{key}")
    total = sum(loss for loss, _ in expected.values())
    th.testing.assert_close(objective.detach(), total.reshape(()), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("share_features_extractor", [False, True])
@pytest.mark.parametrize("action_prior", ["uniform", "normal"])
@pytest.mark.parametrize("equation", OWNERS)
def test_each_loss_reaches_its_own_network_only(monkeypatch, equation, action_prior, share_features_extractor):
    model = double_model(action_prior=action_prior, share_features_extractor=share_features_extractor)
    # Leave one loss of the four
    for other in set(OWNERS) - {equation}:
        monkeypatch.setattr(equations, other, lambda *_: th.zeros((), dtype=th.float64))
    objective, _ = evaluate(model, *random_batch())

    for name, grads in gradients(model, objective).items():
        for key, grad in grads.items():
            if name == OWNERS[equation]:
                assert grad is not None and grad.abs().max() > 0, f"{equation} does not train {name}.{key}"
            else:
                assert grad is None or not grad.any(), f"{equation} trains {name}.{key}"


def test_nothing_reaches_the_target():
    model = double_model()
    assert not any(param.requires_grad for param in model.value_target.parameters())
    # Not even when somebody lets it ask for a gradient
    model.value_target.requires_grad_(True)
    objective, _ = evaluate(model, *random_batch())
    grads = th.autograd.grad(objective, list(model.value_target.parameters()), allow_unused=True)
    assert all(grad is None for grad in grads)
    optimizers = (model.actor.optimizer, model.critic.optimizer, model.value.optimizer)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    optimized = {id(param) for group in groups for param in group["params"]}
    assert optimized.isdisjoint(id(param) for param in model.value_target.parameters())


@pytest.mark.parametrize(
    "changed, affected",
    [
        ("value", {"value"}),
        ("value_target", {"critic"}),
        ("rewards", {"critic"}),
        ("dones", {"critic"}),
        ("next_observations", {"critic"}),
        ("actions", {"critic"}),
        ("noise", {"actor", "value", "ent_coef"}),
        ("ent_coef", {"actor", "value"}),
        ("actor", {"actor", "value", "ent_coef"}),
        ("critic", {"actor", "critic", "value"}),
    ],
)
def test_which_gradient_depends_on_what(changed, affected):
    """Bit for bit the same gradient where the mathematics has no dependence: V learns nothing from the buffer's action."""
    model = double_model()
    batch, noise = random_batch()
    before = gradients(model, evaluate(model, batch, noise)[0])

    with th.no_grad():
        if changed in Batch._fields:
            field = getattr(batch, changed)
            batch = batch._replace(**{changed: 1.0 - field if changed == "dones" else 0.5 * field})
        elif changed == "noise":
            noise = 0.5 * noise
        elif changed == "ent_coef":
            model.log_ent_coef.add_(1.0)
        else:
            for param in getattr(model, changed).parameters():
                param.mul_(0.5)
    after = gradients(model, evaluate(model, batch, noise)[0])

    for name in before:
        if name in affected:
            assert any(not th.equal(after[name][key], before[name][key]) for key in before[name]), name
        else:
            assert_same(after[name], before[name], name)


def test_metrics():
    model = double_model()
    batch, noise = random_batch()
    _, metrics = evaluate(model, batch, noise)
    reference = make_reference(model)
    _, log_prob = reference.sample(batch.observations, noise)
    q_values = th.cat(model.critic(batch.observations, batch.actions), dim=1)
    expected = dict(
        ent_coef=0.3,
        entropy=-log_prob.mean().item(),
        value_mean=reference.state_value(batch.observations).mean().item(),
        qf_mean=q_values.mean().item(),
    )
    for name, number in expected.items():
        # α is 0.3 up to the float32 in which its logarithm starts
        assert getattr(metrics, name).item() == pytest.approx(number, rel=1e-7 if name == "ent_coef" else 1e-12), name
    assert all(metric.shape == () and not metric.requires_grad for metric in metrics[:-1])


def test_fixed_temperature_has_no_loss():
    model = double_model(ent_coef=0.3)
    _, metrics = evaluate(model, *random_batch())
    assert metrics.ent_coef_loss.item() == 0.0
