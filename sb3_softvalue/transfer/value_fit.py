"""Fits V to an actor and critics that were trained without it."""

from typing import Any

import torch as th
from stable_baselines3.common.utils import update_learning_rate

from sb3_softvalue import equations
from sb3_softvalue.objective import sample_actions

# Number of progress lines per fit
_REPORTS = 10


def fit_value(model: Any, n_steps: int) -> None:
    """
    Regress V on min_i Q_i(s, a) - α·log π(a|s) with new actions (Eq. 5 and 6 of the paper) at states of the replay buffer,
    then copy V to V̄. Only V is learned, with its own optimizer and initial learning rate. ``verbose=1`` prints the progress.

    :param model: a SACV whose replay buffer is not empty
    :param n_steps: number of gradient steps, each with ``model.batch_size`` states
    """
    value, optimizer = model.value, model.value.optimizer
    model.policy.set_training_mode(False)
    # A shared features extractor belongs to the actor: its batch-norm statistics must not change
    value.set_training_mode(not value.share_features_extractor)
    rate = model.learning_rate if model.vf_learning_rate is None else model.vf_learning_rate
    update_learning_rate(optimizer, float(rate(1.0) if callable(rate) else rate))
    for step in range(1, n_steps + 1):
        observations = model.replay_buffer.sample(model.batch_size, env=model.get_vec_normalize_env()).observations
        targets = value_targets(model, observations)
        values = value(observations)
        loss = equations.soft_value_loss(values, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if model.verbose >= 1 and step % max(1, n_steps // _REPORTS) == 0:
            rest = float((values.detach() - targets).var() / targets.var())
            print(f"Fitting V: step {step} of {n_steps}, explained variance {1.0 - rest:.1%}")
    optimizer.zero_grad()
    value.set_training_mode(False)
    model.value_target.load_state_dict(value.state_dict())


@th.no_grad()
def value_targets(model: Any, observations: th.Tensor | dict[str, th.Tensor]) -> th.Tensor:
    """
    :param model: a SACV
    :param observations: shape (batch, *obs_shape), or a dict of such
    :return: one-sample estimates of the soft state values, Eq. 6, shape (batch, 1)
    """
    if model.use_sde:
        model.actor.reset_noise()
    actions, log_prob = sample_actions(model.actor, observations, None)
    log_prior = equations.action_log_prior(model.action_prior, actions)
    min_q_values = equations.min_over_critics(model.critic(observations, actions))
    return equations.soft_value_target(min_q_values, log_prob, model.temperature().ent_coef, log_prior)
