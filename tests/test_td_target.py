"""The Q-functions' target at terminal, truncated and n-step transitions, from real environments through real buffers."""

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

from sb3_softvalue import SACV
from tests.helpers import ClockEnv, filled, make_constant, record_samples, train

GAMMA, NEXT_VALUE = 0.5, 10.0


def squared_targets(model: SACV) -> tuple[float, np.ndarray]:
    """
    Half the mean squared target of one gradient step, as ``train/critic_loss`` shows it when the one critic is zero,
    and the observations of its batch.
    """
    make_constant(model.critic.qf0, 0.0)
    make_constant(model.value_target.vf, NEXT_VALUE)
    recorded = record_samples(model.replay_buffer)
    loss = train(model, 1)["train/critic_loss"]
    return loss, recorded[0].observations.numpy().flatten()


def model_on(env: Any, execution: dict[str, Any], **kwargs: Any) -> SACV:
    policy_kwargs = dict(net_arch=[8], n_critics=1)
    return filled(env, gamma=GAMMA, policy_kwargs=policy_kwargs, batch_size=64, **(kwargs | execution))


# By hand, with reward 1, γ = ½ and V̄ = 10 everywhere: the target of each step of the episode
CASES = {
    # Terminated after 3 steps: 1 + ½·10, and the reward alone at the end
    "terminated": (lambda: ClockEnv(3), 1, {0: 6.0, 1: 6.0, 2: 1.0}),
    # Truncated after 3 steps: the last step bootstraps as well
    "truncated": (lambda: gym.wrappers.TimeLimit(ClockEnv(), 3), 1, {0: 6.0, 1: 6.0, 2: 6.0}),
    # Terminated in the very step of the time limit: terminal
    "both": (lambda: gym.wrappers.TimeLimit(ClockEnv(3), 3), 1, {0: 6.0, 1: 6.0, 2: 1.0}),
    # 3 steps: 1 + ½ + ¼ + ⅛·10; then two steps and one step before the end of the episode
    "3-step, terminated": (lambda: ClockEnv(4), 3, {0: 3.0, 1: 1.75, 2: 1.5, 3: 1.0}),
    # Truncated: the shorter returns bootstrap with ½² and ½: 1 + ½ + ¼·10 = 4 and 1 + ½·10 = 6
    "3-step, truncated": (lambda: gym.wrappers.TimeLimit(ClockEnv(), 4), 3, {0: 3.0, 1: 3.0, 2: 4.0, 3: 6.0}),
}


@pytest.mark.parametrize("make_env, n_steps, targets", CASES.values(), ids=CASES)
def test_target(execution, make_env, n_steps, targets):
    # Whole episodes, so that no transition is cut by the end of the collection
    model = model_on(make_env(), execution, n_steps=n_steps, n_collected=36)
    loss, observations = squared_targets(model)
    assert set(observations) == set(targets)
    expected = np.array([targets[int(observation)] for observation in observations])
    assert loss == pytest.approx(0.5 * np.mean(expected**2), rel=1e-6)


def test_several_envs(execution):
    env = make_vec_env(lambda: ClockEnv(3), n_envs=2)
    model = model_on(env, execution)
    loss, observations = squared_targets(model)
    expected = np.array([{0: 6.0, 1: 6.0, 2: 1.0}[int(observation)] for observation in observations])
    assert loss == pytest.approx(0.5 * np.mean(expected**2), rel=1e-6)


def test_vec_normalize(execution):
    """The buffer keeps raw rewards and normalizes them with today's statistics as it is sampled."""
    env = VecNormalize(make_vec_env(lambda: ClockEnv(3), n_envs=1), norm_obs=False, gamma=GAMMA)
    model = model_on(env, execution)
    env.training = False
    env.ret_rms.var = np.array(4.0)
    loss, observations = squared_targets(model)
    # The reward is 1 / sqrt(4 + 1e-8)
    expected = np.array([{0: 5.5, 1: 5.5, 2: 0.5}[int(observation)] for observation in observations])
    assert loss == pytest.approx(0.5 * np.mean(expected**2), rel=1e-6)


def test_vec_normalize_observations(execution):
    env = VecNormalize(make_vec_env(lambda: ClockEnv(3), n_envs=1), norm_reward=False)
    model = model_on(env, execution)
    env.obs_rms.mean, env.obs_rms.var = np.array([1.0]), np.array([4.0])
    _, observations = squared_targets(model)
    # (0, 1, 2) less 1, over 2
    np.testing.assert_allclose(np.unique(observations), [-0.5, 0.0, 0.5], atol=1e-6)
