"""A model that went to the disk and came back is the model that was saved."""

import json
import zipfile
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from stable_baselines3 import SAC, HerReplayBuffer
from stable_baselines3.common.noise import NormalActionNoise

from sb3_softvalue import SACV
from tests.helpers import (
    MODEL_LIST,
    BatchNormDropoutExtractor,
    PointGoalEnv,
    RandomEnv,
    assert_same,
    box_env,
    dict_space,
    differs,
    everything,
    filled,
    image_env,
    parameters_of,
    rng_state,
    save_and_load,
    set_rng_state,
    small,
    train,
)

CONTINUED: dict[str, Any] = {
    "default": (box_env, "MlpPolicy", {}),
    "fixed temperature": (box_env, "MlpPolicy", dict(ent_coef=0.2)),
    "auto_0.1": (box_env, "MlpPolicy", dict(ent_coef="auto_0.1", target_entropy=-0.3)),
    "SGD": (box_env, "MlpPolicy", dict(policy_kwargs=dict(net_arch=[8], optimizer_class=th.optim.SGD))),
    "gSDE": (box_env, "MlpPolicy", dict(use_sde=True)),
    "n-step": pytest.param(
        *(box_env, "MlpPolicy", dict(n_steps=3)),
        # SB3 warns at each load of an n-step model, whose n steps are set all the same
        marks=pytest.mark.filterwarnings("ignore:`n_steps=3` is ignored:UserWarning"),
    ),
    "action noise": (box_env, "MlpPolicy", dict(action_noise=NormalActionNoise(np.zeros(2), 0.1 * np.ones(2)))),
    "Dict": (lambda: RandomEnv(dict_space()), "MultiInputPolicy", {}),
    "HER": (PointGoalEnv, "MultiInputPolicy", dict(replay_buffer_class=HerReplayBuffer)),
    "image": (
        image_env,
        "CnnPolicy",
        dict(policy_kwargs=dict(net_arch=[8], features_extractor_kwargs=dict(features_dim=8), share_features_extractor=True)),
    ),
    "batch norm": (
        box_env,
        "MlpPolicy",
        dict(policy_kwargs=dict(net_arch=[8], features_extractor_class=BatchNormDropoutExtractor)),
    ),
    "schedule": (box_env, "MlpPolicy", dict(learning_rate=lambda progress: 1e-3 * progress)),
}
CONTINUED_SACV: dict[str, dict[str, Any]] = {
    "hard target": dict(tau=1.0, target_update_interval=3),
    "options": dict(
        reward_scale=lambda progress: 2.0 + progress,
        qf_learning_rate=1e-3,
        vf_learning_rate=lambda progress: 2e-3 * progress,
        ent_coef_learning_rate=1e-4,
        max_grad_norm=0.5,
        action_prior="normal",
    ),
}


def check_continued(model: Any, make_env: Any, path: Any, observation: Any) -> None:
    model.learn(30)
    loaded = save_and_load(model, path, env=make_env())
    assert_same(everything(loaded), everything(model))
    # One as good as new for both: loading makes the environment start anew
    model.set_env(make_env())
    model._last_obs = None
    state = rng_state()
    continued = []
    for trained in (model, loaded):
        set_rng_state(state)
        trained.env.seed(3)
        trained.action_space.seed(3)
        trained.learn(20, reset_num_timesteps=False)
        trained.train(5, trained.batch_size)
        continued.append(
            (everything(trained), trained.predict(observation, deterministic=True)[0], trained.predict(observation)[0])
        )
        assert trained._n_updates == 20 + 20 + 5
    assert_same(continued[1], continued[0])


@pytest.mark.parametrize("model_class", MODEL_LIST)
@pytest.mark.parametrize("make_env, policy, options", CONTINUED.values(), ids=CONTINUED)
def test_continue_as_if_never_saved(model_class, make_env, policy, options, tmp_path, execution):
    options = dict(options) | (execution if model_class is SACV else {})
    model = small(model_class, make_env(), policy, **options)
    observation = make_env().reset(seed=1)[0]
    check_continued(model, make_env, tmp_path / "model", observation)


@pytest.mark.parametrize("options", CONTINUED_SACV.values(), ids=CONTINUED_SACV)
def test_continue_with_own_options(options, tmp_path, execution):
    model = small(SACV, box_env(), **options, **execution)
    check_continued(model, box_env, tmp_path / "model", np.zeros(3, dtype=np.float32))


@pytest.mark.parametrize("model_class", MODEL_LIST)
def test_same_seed_same_weights(model_class, execution):
    options = execution if model_class is SACV else {}
    first, second, other = (small(model_class, box_env(), **options, seed=seed).learn(25) for seed in (1, 1, 2))
    assert_same(everything(first), everything(second))
    assert differs(parameters_of(other.actor), parameters_of(first.actor))


@pytest.mark.parametrize("share_features_extractor", [False, True])
@pytest.mark.parametrize("policy", ["MlpPolicy", "CnnPolicy"])
def test_same_seed_same_start_as_sac(policy, share_features_extractor):
    make_env = box_env if policy == "MlpPolicy" else image_env
    policy_kwargs = dict(net_arch=[8], share_features_extractor=share_features_extractor)
    sac, sacv = (small(model_class, make_env(), policy, policy_kwargs=policy_kwargs) for model_class in MODEL_LIST)
    for name in ("actor", "critic"):
        assert_same(parameters_of(getattr(sacv, name)), parameters_of(getattr(sac, name)), name)
    # The two critics are not copies of each other, and V starts with weights of its own
    assert differs(parameters_of(sacv.critic.qf0), parameters_of(sacv.critic.qf1))
    assert differs(dict(weight=sacv.value.vf[-1].weight), dict(weight=sacv.critic.qf0[-1].weight))


@pytest.mark.parametrize("model_class", MODEL_LIST)
def test_schedules_survive(model_class, tmp_path):
    options: dict[str, Any] = dict(learning_rate=lambda progress: 1e-3 * progress)
    if model_class is SACV:
        options |= dict(
            reward_scale=lambda progress: 3.0 * progress,
            qf_learning_rate=lambda progress: 2e-3 * progress,
            vf_learning_rate=lambda progress: 4e-3 * progress,
            ent_coef_learning_rate=lambda progress: 5e-3 * progress,
        )
    model = small(model_class, box_env(), **options)
    model.save(tmp_path / "model")
    loaded = model_class.load(tmp_path / "model", env=box_env())
    assert loaded.lr_schedule(0.5) == 5e-4
    loaded.learn(40)
    # SB3 sets the remaining progress after the last step but trains after it: 0
    assert loaded.actor.optimizer.param_groups[0]["lr"] == 0.0
    if model_class is SACV:
        loaded._current_progress_remaining = 0.25
        train(loaded, 1)
        rates = [
            optimizer.param_groups[0]["lr"]
            for optimizer in (
                loaded.actor.optimizer,
                loaded.critic.optimizer,
                loaded.value.optimizer,
                loaded.ent_coef_optimizer,
            )
        ]
        assert rates == pytest.approx([2.5e-4, 5e-4, 1e-3, 1.25e-3])
        assert loaded.logger.name_to_value["train/reward_scale"] == pytest.approx(0.75)


@pytest.mark.parametrize("model_class", MODEL_LIST)
def test_load_as_rl_zoo_does(model_class, tmp_path):
    """RL Zoo's enjoy script replaces what may not unpickle under another Python version."""
    options = (
        dict(vf_learning_rate=lambda progress: progress, reward_scale=lambda progress: 2.0) if model_class is SACV else {}
    )
    model = small(model_class, box_env(), learning_rate=lambda progress: 1e-3 * progress, **options)
    model.learn(20)
    model.save(tmp_path / "model")
    custom_objects = {"learning_rate": 0.0, "lr_schedule": lambda _: 0.0, "clip_range": lambda _: 0.0}
    loaded = model_class.load(tmp_path / "model", env=box_env(), custom_objects=custom_objects, device="cpu", buffer_size=1)
    observation = np.zeros(3, dtype=np.float32)
    assert_same(loaded.predict(observation, deterministic=True)[0], model.predict(observation, deterministic=True)[0])
    assert loaded.replay_buffer.buffer_size == 1
    assert loaded.lr_schedule(1.0) == 0.0


def test_load_without_env(tmp_path):
    model = filled(box_env())
    train(model, 3)
    model.save(tmp_path / "model")
    loaded = SACV.load(tmp_path / "model", device="cpu")
    assert_same(everything(loaded), everything(model))
    observations = np.ones((2, 3), dtype=np.float32)
    assert_same(loaded.predict_values(observations), model.predict_values(observations))


@pytest.mark.parametrize("model_class", MODEL_LIST)
def test_saved_parameters(model_class, tmp_path):
    model = small(model_class, box_env())
    state_dicts, variables = model._get_torch_save_params()
    own = ["value.optimizer"] if model_class is SACV else []
    assert sorted(state_dicts) == sorted(["policy", "actor.optimizer", "critic.optimizer", "ent_coef_optimizer", *own])
    assert variables == ["log_ent_coef"]
    assert set(model.get_parameters()) == set(state_dicts)
    # What is rebuilt from the policy is not pickled a second time
    excluded = set(model._excluded_save_params())
    target = {"value", "value_target"} if model_class is SACV else {"critic_target"}
    assert {"actor", "critic", "policy", "replay_buffer", *target} <= excluded


@pytest.mark.parametrize("model_class", MODEL_LIST)
def test_set_parameters(model_class, execution):
    options = execution if model_class is SACV else {}
    source = small(model_class, box_env(), seed=1, **options).learn(20)
    target = small(model_class, box_env(), seed=2, **options)
    assert differs(parameters_of(target.policy), parameters_of(source.policy))
    target.set_parameters(source.get_parameters(), exact_match=True)
    assert_same(target.get_parameters(), source.get_parameters())
    # The networks that train are those that were set
    target.learn(20)
    assert differs(parameters_of(target.policy), parameters_of(source.policy))

    parameters = source.get_parameters()
    del parameters["critic.optimizer"]
    with pytest.raises(ValueError, match=r"critic\.optimizer"):
        target.set_parameters(parameters, exact_match=True)
    target.set_parameters(parameters, exact_match=False)
    assert_same(parameters_of(target.policy), parameters_of(source.policy))
    with pytest.raises(ValueError, match="not_there"):
        target.set_parameters({"not_there": {}}, exact_match=False)


def test_set_parameters_needs_the_value_optimizer():
    model = small(SACV, box_env())
    parameters = model.get_parameters()
    del parameters["value.optimizer"]
    with pytest.raises(ValueError, match=r"value\.optimizer"):
        model.set_parameters(parameters, exact_match=True)


def test_load_of_a_folder(tmp_path):
    with pytest.raises(IsADirectoryError, match=r"is a folder.*load_checkpoint"):
        SACV.load(tmp_path)


@pytest.mark.parametrize("model_class", MODEL_LIST)
@pytest.mark.parametrize("policy", ["MlpPolicy", "CnnPolicy", "MultiInputPolicy"])
def test_policy_save_load(model_class, policy, tmp_path):
    make_env = {"MlpPolicy": box_env, "CnnPolicy": image_env, "MultiInputPolicy": lambda: RandomEnv(dict_space())}[policy]
    model = small(model_class, make_env(), policy, policy_kwargs=dict(net_arch=[8], n_critics=3))
    observation = make_env().reset(seed=1)[0]
    model.policy.save(tmp_path / "policy")
    loaded = type(model.policy).load(tmp_path / "policy", device="cpu")
    assert type(loaded) is type(model.policy)
    assert_same(parameters_of(loaded), parameters_of(model.policy))
    assert_same(loaded.predict(observation, deterministic=True)[0], model.predict(observation, deterministic=True)[0])


@pytest.mark.parametrize("share_features_extractor", [False, True])
def test_policy_save_load_keeps_sharing(share_features_extractor, tmp_path):
    """SB3's SACPolicy forgets it."""
    policy_kwargs = dict(
        net_arch=dict(pi=[4], qf=[5], vf=[6]),
        n_critics=3,
        share_features_extractor=share_features_extractor,
        features_extractor_kwargs=dict(features_dim=8),
        optimizer_class=th.optim.SGD,
        optimizer_kwargs=dict(momentum=0.5),
    )
    policy = small(SACV, image_env(), "CnnPolicy", policy_kwargs=policy_kwargs).policy
    policy.save(tmp_path / "policy")
    loaded = type(policy).load(tmp_path / "policy")
    for network in (loaded.critic, loaded.value):
        assert (network.features_extractor is loaded.actor.features_extractor) is share_features_extractor
    assert loaded.value_target.features_extractor is not loaded.actor.features_extractor
    assert loaded.value.vf[0].out_features == 6 and len(loaded.critic.q_networks) == 3
    assert loaded.value.optimizer.param_groups[0]["momentum"] == 0.5
    assert_same(parameters_of(loaded), parameters_of(policy))


TEMPERATURES = [
    ("auto", 0.2),
    (0.2, "auto"),
    ("auto_0.5", 0.0),
    (0.2, "auto_0.1"),
    (0.2, 0.3),
    ("auto", "auto_0.1"),
]


@pytest.mark.parametrize("saved, given", TEMPERATURES)
@pytest.mark.parametrize("how", ["keyword", "custom_objects"])
def test_temperature_switched_at_load(saved, given, how, tmp_path, execution):
    model = filled(box_env(), ent_coef=saved, **execution)
    train(model, 3)
    model.save(tmp_path / "model")
    keywords: dict[str, Any] = dict(ent_coef=given)
    loaded = SACV.load(
        tmp_path / "model", env=model.get_env(), **(keywords if how == "keyword" else dict(custom_objects=keywords))
    )
    # Everything else as it was saved
    assert_same(parameters_of(loaded.policy), parameters_of(model.policy))
    for name in ("actor", "critic", "value"):
        assert_same(getattr(loaded, name).optimizer.state_dict(), getattr(model, name).optimizer.state_dict(), name)
    assert loaded.ent_coef == given

    start = {"auto": 1.0, "auto_0.1": 0.1}.get(given, given)
    loaded.replay_buffer = model.replay_buffer
    log = train(loaded, 1)
    assert log["train/ent_coef"] == pytest.approx(start)
    learned = isinstance(given, str)
    assert ("train/ent_coef_loss" in log) is learned
    moved = train(loaded, 1)["train/ent_coef"] != log["train/ent_coef"]
    assert moved is learned

    # And saved again, it stays
    again = save_and_load(loaded, tmp_path / "again")
    assert again.ent_coef == given
    assert_same(everything(again), everything(loaded))


def test_same_temperature_given_again_keeps_what_was_learned(tmp_path):
    model = filled(box_env())
    train(model, 5)
    model.save(tmp_path / "model")
    loaded = SACV.load(tmp_path / "model", ent_coef="auto")
    assert_same(everything(loaded), everything(model))
    assert loaded.log_ent_coef.item() != 0.0


def test_options_changed_at_load(tmp_path):
    model = filled(box_env())
    model.save(tmp_path / "model")
    loaded = SACV.load(tmp_path / "model", env=model.get_env(), vf_learning_rate=0.5, action_prior="normal", reward_scale=3.0)
    loaded.replay_buffer = model.replay_buffer
    train(loaded, 1)
    assert loaded.value.optimizer.param_groups[0]["lr"] == 0.5
    assert loaded.action_prior == "normal"
    assert loaded.reward_scale == 3.0


def test_sac_refuses_a_saved_sacv(tmp_path):
    """RL Zoo's ParallelTrainCallback does this: it must never train a plain SAC silently."""
    small(SACV, box_env()).save(tmp_path / "model")
    with pytest.raises(AttributeError, match=r"value_target.*SACV\.load"):
        SAC.load(tmp_path / "model")


def test_sacv_refuses_a_saved_sac(tmp_path):
    small(SAC, box_env()).save(tmp_path / "model")
    with pytest.raises(ValueError, match=r"no value network.*SACV\.from_sac"):
        SACV.load(tmp_path / "model")


def pickled_entries(path: Any) -> set[str]:
    """The attributes in a saved model that are not plain JSON."""
    with zipfile.ZipFile(path) as archive:
        data = json.loads(archive.read("data"))
    return {name for name, value in data.items() if isinstance(value, dict) and ":serialized:" in value}


def test_nothing_pickled_that_sac_does_not_pickle(tmp_path):
    """No schedule, network or compiled function: files stay readable where Python or the package differ."""
    for model_class in MODEL_LIST:
        small(model_class, box_env()).learn(15).save(tmp_path / model_class.__name__)
    assert pickled_entries(tmp_path / "SACV.zip") == pickled_entries(tmp_path / "SAC.zip")


def test_a_model_saved_by_version_0_1_0_still_loads_and_learns():
    """Where modules have moved since, files made before have to keep working; the values were printed by that version."""
    model = SACV.load(Path(__file__).parent / "data" / "sacv-0.1.0.zip", env=gym.make("Pendulum-v1"))
    observations = np.array([[1, 0, 0], [0, 1, 2], [-1, 0, -4]], dtype=np.float32)
    values, (actions, _) = model.predict_values(observations), model.predict(observations, deterministic=True)
    np.testing.assert_allclose(values, [-0.0763801, -0.3236252, 0.0872337], atol=1e-6)
    np.testing.assert_allclose(actions.squeeze(axis=1), [-0.2520926, -0.3400034, -1.1060392], atol=1e-6)
    assert model._n_updates == 250 and model.vf_learning_rate == 1e-3
    with pytest.warns(UserWarning, match="The replay buffer is empty"):
        model.learn(60, reset_num_timesteps=False)
    assert model._n_updates > 250
