"""Both algorithms solve SB3's identity task in 400 steps."""

import pytest
from stable_baselines3.common.envs import IdentityEnvBox
from stable_baselines3.common.evaluation import evaluate_policy

from sb3_softvalue import SACV
from tests.helpers import MODEL_LIST


@pytest.mark.parametrize("model_class", MODEL_LIST)
def test_identity(model_class, execution):
    env = IdentityEnvBox(eps=0.5)
    options = execution if model_class is SACV else {}
    policy_kwargs = dict(net_arch=[64, 64])
    model = model_class("MlpPolicy", env, gamma=0.95, learning_rate=1e-3, seed=0, policy_kwargs=policy_kwargs, **options)
    model.learn(400)
    # The best possible return is 100: one for each step
    mean_return, _ = evaluate_policy(model, env, n_eval_episodes=20, warn=False)
    assert mean_return >= 90
