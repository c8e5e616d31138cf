"""Models that move between SB3's SAC and SACV stay what they are."""

import copy
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import PPO, SAC, HerReplayBuffer
from stable_baselines3.common.noise import NormalActionNoise
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_softvalue import SACV, MlpPolicy
from sb3_softvalue.transfer.value_fit import value_targets
from tests.helpers import BatchNormDropoutExtractor, PointGoalEnv, RandomEnv, box_env, dict_space, filled, small

SMALL_CNN = dict(net_arch=[8], features_extractor_kwargs=dict(features_dim=8))
CASES: dict[str, Any] = {
    "default": (box_env, "MlpPolicy", {}),
    "fixed temperature": (box_env, "MlpPolicy", dict(ent_coef=0.2)),
    "gSDE": (box_env, "MlpPolicy", dict(use_sde=True)),
    "n-step": (box_env, "MlpPolicy", dict(n_steps=3)),
    "action noise": (box_env, "MlpPolicy", dict(action_noise=NormalActionNoise(np.zeros(2), 0.1 * np.ones(2)))),
    "three critics": (box_env, "MlpPolicy", dict(policy_kwargs=dict(net_arch=dict(pi=[8], qf=[9]), n_critics=3))),
    "batch norm": (
        box_env,
        "MlpPolicy",
        dict(policy_kwargs=dict(net_arch=[8], features_extractor_class=BatchNormDropoutExtractor)),
    ),
    "shared batch norm": (
        box_env,
        "MlpPolicy",
        dict(
            policy_kwargs=dict(net_arch=[8], features_extractor_class=BatchNormDropoutExtractor, share_features_extractor=True)
        ),
    ),
    "Dict": (lambda: RandomEnv(dict_space()), "MultiInputPolicy", {}),
    "HER": (PointGoalEnv, "MultiInputPolicy", dict(replay_buffer_class=HerReplayBuffer)),
    "image": (
        lambda: RandomEnv(spaces.Box(0, 255, shape=(36, 36, 1), dtype=np.uint8)),
        "CnnPolicy",
        dict(policy_kwargs=SMALL_CNN),
    ),
    "VecNormalize": (lambda: VecNormalize(DummyVecEnv([box_env])), "MlpPolicy", {}),
}


def learned(model: SAC) -> dict[str, Any]:
    """What actor, critics and temperature were learned with."""
    optimizers = dict(actor=model.actor.optimizer, critic=model.critic.optimizer, ent_coef=model.ent_coef_optimizer)
    state: dict[str, Any] = {"actor": model.actor.state_dict(), "critic": model.critic.state_dict()}
    state |= {f"{name}.optimizer": opt.state_dict()["state"] for name, opt in optimizers.items() if opt is not None}
    state["alpha"] = model.ent_coef_tensor if model.log_ent_coef is None else model.log_ent_coef.detach()
    return copy.deepcopy(state)


def assert_equal(actual: Any, expected: Any) -> None:
    """Bit by bit."""
    assert th.utils._pytree.tree_structure(actual) == th.utils._pytree.tree_structure(expected)
    for left, right in zip(th.utils._pytree.tree_leaves(actual), th.utils._pytree.tree_leaves(expected), strict=True):
        assert th.equal(left, right) if isinstance(left, th.Tensor) else left == right


def assert_predicts_as(model: SAC, other: SAC, obs: Any) -> None:
    for deterministic in (True, False):
        actions = []
        for one in (model, other):
            th.manual_seed(3)
            actions.append(one.predict(obs, deterministic=deterministic)[0])
        np.testing.assert_array_equal(*actions)


@pytest.mark.parametrize("make_env, policy, options", CASES.values(), ids=CASES)
def test_round_trip(make_env, policy, options, tmp_path):
    """SAC → SACV → SAC, and on from there: nothing but V is learned on the way."""
    sac = small(SAC, make_env(), policy, **options).learn(30)
    before = learned(sac)
    sacv = SACV.from_sac(sac, fit_value_steps=3, collect_steps=20, execution="eager")
    obs = sac.get_env().reset()
    assert isinstance(sacv, SACV)
    assert_predicts_as(sacv, sac, obs)
    back = sacv.to_sac()
    assert type(back) is SAC
    assert_predicts_as(back, sac, obs)
    for model in (sac, sacv, back):
        assert_equal(learned(model), before)
        assert (model.num_timesteps, model._n_updates, model.gamma) == (30, 20, sac.gamma)
        assert model.replay_buffer is sac.replay_buffer
    assert_equal(back.critic_target.state_dict(), back.critic.state_dict())
    assert_equal(sacv.value_target.state_dict(), sacv.value.state_dict())
    for model in (back, sacv):
        model.learn(12, reset_num_timesteps=False)
        assert model._n_updates == 32
        assert all(th.isfinite(param).all() for param in model.policy.parameters())
    assert_equal(learned(sac), before)  # no tensor is shared


def test_from_files(tmp_path):
    sac = small(SAC, box_env()).learn(30)
    sac.save(tmp_path / "sac")
    sac.save_replay_buffer(tmp_path / "buffer")
    model = SACV.from_sac(
        tmp_path / "sac", box_env(), fit_value_steps=2, collect_steps=0, replay_buffer=tmp_path / "buffer", device="cpu"
    )
    assert_equal(learned(model), learned(sac))
    assert model.replay_buffer.size() == 30 and model.learning_starts == 0 and model.buffer_size == 500


def test_collects_where_there_are_no_transitions(tmp_path):
    sac = small(SAC, box_env()).learn(30)
    sac.save(tmp_path / "sac")
    model = SACV.from_sac(tmp_path / "sac", box_env(), fit_value_steps=2, collect_steps=40, device="cpu")
    assert model.replay_buffer.size() == 40 and model.num_timesteps == 70 and model._n_updates == 20
    assert_equal(learned(model), learned(sac))
    assert model.learn(5)._n_updates == 25, "no second warm-up"


def test_fit_reaches_the_targets(capsys):
    sac = small(SAC, box_env(), learning_rate=3e-3, batch_size=256).learn(60)
    rests = []
    for steps in (0, 500):
        model = SACV.from_sac(sac, fit_value_steps=steps, collect_steps=0, verbose=1)
        obs = model.replay_buffer.sample(60).observations
        targets = th.stack([value_targets(model, obs) for _ in range(256)]).mean(dim=0)
        rests.append(float((model.value(obs) - targets).detach().pow(2).mean()))
    assert rests[1] < 0.03 * rests[0]
    assert "Fitting V: step 500 of 500" in capsys.readouterr().out


@pytest.mark.parametrize("rate", [np.float32(1e-2), lambda progress: 1e-2 * progress])
def test_learning_rate_of_the_fit(rate):
    """A number of NumPy's, as in the constructor, or a schedule at its start."""
    model = SACV.from_sac(small(SAC, box_env()).learn(20), vf_learning_rate=rate, fit_value_steps=1, collect_steps=0)
    assert model.value.optimizer.param_groups[0]["lr"] == pytest.approx(1e-2)


def test_options_in_place_of_the_sacs():
    model = SACV.from_sac(small(SAC, box_env()).learn(20), ent_coef=0.3, vf_learning_rate=1e-2, fit_value_steps=1)
    assert float(model.ent_coef_tensor) == pytest.approx(0.3) and model.vf_learning_rate == 1e-2
    with pytest.raises(ValueError, match="The actor cannot be copied"):
        SACV.from_sac(small(SAC, box_env()), policy_kwargs=dict(net_arch=[9]))


class OwnPolicy(MlpPolicy):
    """Somebody's."""


def test_refusals(tmp_path):
    sacv = small(SACV, box_env())
    with pytest.raises(ValueError, match="already has a value network"):
        SACV.from_sac(sacv)
    with pytest.raises(ValueError, match=r"SB3 has no counterpart of the policy .*OwnPolicy"):
        small(SACV, box_env(), OwnPolicy).to_sac()
    assert isinstance(small(SACV, box_env(), OwnPolicy).to_sac(policy="MlpPolicy"), SAC)
    sac = small(SAC, box_env())
    with pytest.raises(ValueError, match="Observation spaces do not match"):
        SACV.from_sac(sac, box_env(4))
    with pytest.raises(ValueError, match=r"holds observations in Box\(-1.0, 1.0, \(4,\)"):
        SACV.from_sac(sac, replay_buffer=filled(box_env(4)).replay_buffer)
    with pytest.raises(ValueError, match="the model has 2"):
        SACV.from_sac(sac, DummyVecEnv([box_env] * 2), replay_buffer=filled(box_env()).replay_buffer)
    with pytest.raises(ValueError, match="wrapped in it"):
        SACV.from_sac(small(SAC, VecNormalize(DummyVecEnv([box_env]))), box_env())
    with pytest.raises(ValueError, match="fit_value_steps must be a whole number of at least 0, got -1"):
        SACV.from_sac(sac, fit_value_steps=-1)
    PPO("MlpPolicy", box_env()).save(tmp_path / "ppo")
    with pytest.raises(ValueError, match="is no model of SB3's SAC"):
        SACV.from_sac(tmp_path / "ppo")
    sac.save(tmp_path / "sac")
    with pytest.raises(ValueError, match="give from_sac a replay_buffer, or an env"):
        SACV.from_sac(tmp_path / "sac")
    with pytest.raises(ValueError, match=r"SACV\.from_sac"):
        SACV.load(tmp_path / "sac")
    sacv.save(tmp_path / "sacv")
    with pytest.raises(AttributeError, match=r"to_sac\(\)"):
        SAC.load(tmp_path / "sacv")


def test_neither_a_sac_nor_a_file():
    for other in (PPO("MlpPolicy", "Pendulum-v1", device="cpu"), None, 5):
        with pytest.raises(ValueError, match=f"or a file that SAC.save wrote, got {type(other).__name__}"):
            SACV.from_sac(other, "Pendulum-v1")


def test_no_policy_kwargs():
    sac = SAC("MlpPolicy", "Pendulum-v1", policy_kwargs=dict(net_arch=[8]), device="cpu")
    model = SACV.from_sac(sac, fit_value_steps=0, collect_steps=0, policy_kwargs=None)
    assert model.policy.net_arch == [8]


def test_what_sac_does_not_have_is_said():
    with pytest.warns(UserWarning, match=r"has no reward_scale=2.0, action_prior='normal'"):
        small(SACV, box_env(), reward_scale=2.0, action_prior="normal").to_sac()
