"""What cannot work is refused with one sentence before anything is trained."""

import copy
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import SAC, HerReplayBuffer
from stable_baselines3.common.buffers import NStepReplayBuffer, RolloutBuffer
from stable_baselines3.common.noise import NormalActionNoise
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack, VecNormalize, VecTransposeImage
from stable_baselines3.sac.policies import SACPolicy

import sb3_softvalue
from sb3_softvalue import SACV
from tests.helpers import RandomEnv, box_env, filled, small, train

OBSERVATIONS = spaces.Box(-1.0, 1.0, shape=(3,), dtype=np.float32)
IMAGE = spaces.Box(0, 255, (36, 36, 3), dtype=np.uint8)
SMALL_IMAGE = spaces.Box(0, 255, (8, 8, 3), dtype=np.uint8)


def env_of(observation_space: spaces.Space = OBSERVATIONS, action_space: spaces.Space | None = None) -> DummyVecEnv:
    return DummyVecEnv([lambda: RandomEnv(observation_space, action_space)])


def noise_of(size: int) -> NormalActionNoise:
    return NormalActionNoise(np.zeros(size), np.ones(size))


# Left to SB3, PyTorch and Gymnasium: environment, policy, options
AS_SAC: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    **{
        f"actions {space}": (lambda space=space: env_of(action_space=space), "MlpPolicy", {})
        for space in (
            spaces.Discrete(3),
            spaces.MultiBinary(4),
            spaces.Dict(a=OBSERVATIONS),
            spaces.Box(-np.inf, np.inf, (2,)),
            spaces.Box(np.float32([-1, -1]), np.float32([1, np.inf])),
        )
    },
    **{
        f"observations {space}": (
            lambda space=space: env_of(space),
            "MultiInputPolicy" if isinstance(space, spaces.Dict) else "MlpPolicy",
            {},
        )
        for space in (
            spaces.MultiDiscrete([[2, 3], [4, 2]]),
            spaces.Dict({"a.b": OBSERVATIONS}),
            spaces.Dict({"keys": OBSERVATIONS}),
            spaces.Dict(a=spaces.Dict(b=OBSERVATIONS)),
            spaces.Dict(image=SMALL_IMAGE),
        )
    },
    "small images": (lambda: env_of(SMALL_IMAGE), "CnnPolicy", {}),
    "vectors as images": (env_of, "CnnPolicy", {}),
    "vectors as Dict": (env_of, "MultiInputPolicy", {}),
    "unknown policy": (env_of, "LstmPolicy", {}),
    "unknown environment": (lambda: "X-v0", "MlpPolicy", {}),
    "episodes of two": (lambda: DummyVecEnv([box_env] * 2), "MlpPolicy", dict(train_freq=(1, "episode"))),
    "n steps of Dict": (lambda: env_of(spaces.Dict(a=OBSERVATIONS)), "MultiInputPolicy", dict(n_steps=3)),
    **{
        str(options): (env_of, "MlpPolicy", options)
        for options in (
            *(dict(train_freq=value) for value in (0, -1, 1.5, "often", (1, "epoch"), (0, "step"), None)),
            *(dict(learning_rate=value) for value in (-1e-3, np.nan, "fast", None)),
            *(dict(ent_coef=value) for value in ("learned", "auto_x", "auto_", "auto_0", "auto_-1", None, th.ones(2))),
            *(dict(target_entropy=value) for value in ("low", None)),
            *(dict(seed=value) for value in (-1, 2.5, "zero", 2**32)),
            *(dict(stats_window_size=value) for value in (-1, 1.5)),
            *(dict(buffer_size=value) for value in (10.5, None)),
            *(dict(replay_buffer_class=value) for value in (RolloutBuffer, HerReplayBuffer, "HER")),
            dict(device="abacus"),
            dict(learning_starts=None),
            dict(optimize_memory_usage=True),
            dict(optimize_memory_usage=True, n_steps=3, replay_buffer_kwargs=dict(handle_timeout_termination=False)),
            dict(replay_buffer_kwargs=dict(unknown=1)),
            dict(action_noise=0.1),
            dict(action_noise=noise_of(3)),
            dict(policy_kwargs="large"),
            dict(policy_kwargs=dict(net_arc=[8])),
            *(dict(policy_kwargs=dict(net_arch=value)) for value in (["8"], [-1], 8, dict(pi=[8]))),
            dict(policy_kwargs=dict(activation_fn=th.nn.Tanh())),
            dict(policy_kwargs=dict(optimizer_class="Adam")),
        )
    },
}


@pytest.mark.parametrize("make_env, policy, options", AS_SAC.values(), ids=AS_SAC)
# Gymnasium's and SB3's advice
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_refused_as_by_sac(make_env, policy, options):
    """With the same type of error, before the first step."""
    errors = []
    for model_class in (SAC, SACV):
        model = None
        with pytest.raises(Exception) as error:
            model = small(model_class, make_env(), policy, **copy.deepcopy(options))
            model.learn(30)
        assert str(error.value) and (model is None or model.num_timesteps == 0)
        errors.append(error.type)
    assert errors[0] is errors[1]


@pytest.mark.parametrize(
    "action_space, match",
    [
        (spaces.Box(0, 10, (2,), dtype=np.int64), r"truncate actions in \[-1, 1\] to integers.*dtype=np\.float32"),
        (spaces.Box(-3e38, 3e38, (2,), dtype=np.float32), "high - low, which must be positive and finite in float32"),
        (spaces.Box(np.float32([-1.0, 0.5]), np.float32([1.0, 0.5])), "leave out a dimension that cannot vary"),
    ],
    ids=str,
)
def test_action_space(action_space, match):
    with pytest.raises(AssertionError, match=match):
        small(SACV, env_of(action_space=action_space))
    # A later environment too
    with pytest.raises(ValueError, match="Action spaces do not match"):
        small(SACV, box_env()).set_env(env_of(action_space=action_space))


BAD_OPTIONS: list[tuple[dict[str, Any], type[Exception], str]] = [
    (dict(reward_scale=-1.0), ValueError, "reward_scale must be a finite non-negative number or a schedule"),
    (dict(reward_scale=float("nan")), ValueError, "reward_scale must be a finite non-negative number"),
    (dict(target_update_interval=0), ValueError, "target_update_interval must be a whole number of at least 1, got 0"),
    (dict(target_update_interval=1.5), ValueError, "target_update_interval must be a whole number"),
    (dict(tau=1.5), ValueError, "tau must be between 0 and 1, got 1.5"),
    (dict(tau=-0.1), ValueError, "tau must be between 0 and 1"),
    (dict(tau="0.1"), ValueError, "tau must be between 0 and 1, got '0.1'"),
    (dict(gamma=1.01), ValueError, "gamma must be between 0 and 1"),
    (dict(action_prior="gaussian"), ValueError, "action_prior must be one of 'uniform', 'normalized_uniform', 'normal'"),
    (dict(max_grad_norm=0.0), ValueError, "max_grad_norm must be a positive number.*use None for no clipping"),
    (dict(max_grad_norm=-1.0), ValueError, "max_grad_norm must be a positive number"),
    (dict(max_grad_norm="1"), ValueError, "max_grad_norm must be a positive number, got '1'"),
    (dict(qf_learning_rate=-1e-3), ValueError, "qf_learning_rate must be a finite non-negative number"),
    (dict(vf_learning_rate="fast"), ValueError, "vf_learning_rate must be a finite non-negative number or a schedule"),
    (dict(ent_coef_learning_rate=float("inf")), ValueError, "ent_coef_learning_rate must be a finite non-negative number"),
    (dict(policy_delay=0), ValueError, "policy_delay must be a whole number of at least 1, got 0"),
    (
        dict(replay_buffer_class=NStepReplayBuffer, replay_buffer_kwargs=dict(gamma=0.5)),
        ValueError,
        "gamma is 0.99 for the model but 0.5 in replay_buffer_kwargs: pass it once",
    ),
    (
        dict(n_steps=2, replay_buffer_class=NStepReplayBuffer, replay_buffer_kwargs=dict(n_steps=4)),
        ValueError,
        "n_steps is 2 for the model but 4 in replay_buffer_kwargs: pass it once",
    ),
    (dict(policy_kwargs=dict(n_critics=0)), ValueError, "n_critics must be a whole number of at least 1, got 0"),
]


@pytest.mark.parametrize("options, error, match", BAD_OPTIONS, ids=[str(options) for options, _, _ in BAD_OPTIONS])
def test_option(options, error, match):
    with pytest.raises(error, match=match):
        small(SACV, box_env(), **options)


@pytest.mark.parametrize("space", [spaces.Discrete(3, start=1), spaces.MultiDiscrete([2, 3], start=[0, 1])], ids=str)
@pytest.mark.parametrize("is_dict", [False, True])
def test_observations_that_do_not_start_at_zero(space, is_dict):
    policy = "MultiInputPolicy" if is_dict else "MlpPolicy"
    with pytest.raises(ValueError, match="as if it started at 0: subtract its start"):
        small(SACV, env_of(spaces.Dict(a=space) if is_dict else space), policy)


@pytest.mark.parametrize(
    "make_env, policy, match",
    [
        (lambda: VecNormalize(env_of(IMAGE), norm_obs=False), "CnnPolicy", "make VecNormalize the outermost wrapper"),
        (lambda: VecFrameStack(VecNormalize(env_of(OBSERVATIONS)), 2), "MlpPolicy", "make VecNormalize the outermost wrapper"),
        (lambda: VecNormalize(env_of(spaces.Discrete(5)), norm_obs=False), "MlpPolicy", r"cannot store Discrete\(5\) with"),
    ],
    ids=["image", "VecFrameStack", "Discrete"],
)
def test_vec_normalize_inside(make_env, policy, match):
    """SB3's replay buffer stores what VecNormalize received; SAC fails too, during training."""
    with pytest.raises(ValueError, match=match):
        small(SACV, make_env(), policy=policy)
    with pytest.raises(ValueError, match=f"{match}|spaces do not match"):
        small(SACV, box_env()).set_env(make_env())


def test_vec_normalize_outside():
    """As the errors say."""
    policy_kwargs = dict(net_arch=[8], features_extractor_kwargs=dict(features_dim=8))
    images = VecNormalize(VecTransposeImage(env_of(IMAGE)), norm_obs=False)
    small(SACV, images, policy="CnnPolicy", policy_kwargs=policy_kwargs).learn(25)
    small(SACV, VecNormalize(VecFrameStack(env_of(OBSERVATIONS), 2))).learn(25)
    # Only the outermost one gives what is stored
    small(SACV, VecNormalize(VecFrameStack(VecNormalize(env_of(OBSERVATIONS)), 2))).learn(25)


def test_bad_option_at_load(tmp_path):
    small(SACV, box_env()).save(tmp_path / "model")
    with pytest.raises(ValueError, match="action_prior must be one of"):
        SACV.load(tmp_path / "model", action_prior="gaussian")
    with pytest.raises(ValueError, match="could not convert string to float: 'learned'"):
        SACV.load(tmp_path / "model", ent_coef="learned")


SCHEDULES = ("learning_rate", "qf_learning_rate", "vf_learning_rate", "ent_coef_learning_rate", "reward_scale")


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("value", [-1.0, float("inf"), float("nan")])
def test_schedule(name, value):
    """Refused at once where it starts badly, and at the gradient step where it becomes so."""
    with pytest.raises(ValueError, match=f"The {name} schedule returned .* at progress remaining 1.000"):
        small(SACV, box_env(), **{name: lambda _: value})
    model = filled(box_env(), **{name: lambda progress: 1e-3 if progress == 1.0 else value})
    model._current_progress_remaining = 0.5
    before = {name: param.clone() for name, param in model.policy.state_dict().items()}
    with pytest.raises(ValueError, match=f"The {name} schedule returned .* at progress remaining 0.500"):
        train(model, 1)
    assert all(th.equal(param, before[name]) for name, param in model.policy.state_dict().items())


@pytest.mark.parametrize("model_class", [SAC, SACV])
def test_error_inside_a_schedule(model_class):
    """It is the user's own, and passes as it is."""
    with pytest.raises(TypeError, match="unsupported operand"):
        small(model_class, box_env(), learning_rate=lambda progress: progress + None)


@pytest.mark.parametrize("name", SCHEDULES[1:])
def test_number_set_later(name):
    model = filled(box_env())
    setattr(model, name, -1.0)
    with pytest.raises(
        ValueError, match=f"^{name} must be a finite non-negative number or a schedule of such numbers, got -1"
    ):
        train(model, 1)
    assert model._n_updates == 0


@pytest.mark.parametrize("value", [0, -1, 1.5, None])
def test_batch_size(value):
    with pytest.raises(ValueError, match=f"batch_size must be a whole number of at least 1, got {value}"):
        small(SACV, box_env(), batch_size=value)


class OtherNetworks(SACPolicy):
    """A policy for SAC that builds its networks in its own way."""

    def _build(self, lr_schedule: Any) -> None:
        super()._build(lr_schedule)


def test_policy_that_cannot_get_a_value_network():
    with pytest.raises(
        ValueError, match=r"cannot get one, since it overrides _build: derive it from sb3_softvalue\.MlpPolicy"
    ):
        SACV(OtherNetworks, box_env())


class OwnPolicy(sb3_softvalue.MlpPolicy):
    """A subclass that takes what it likes."""

    def __init__(self, *args: Any, own_argument: int = 0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.own_argument = own_argument


def test_policy_classes_that_work():
    model = small(SACV, box_env(), OwnPolicy, policy_kwargs=dict(net_arch=[8], own_argument=3)).learn(15)
    assert model.policy.own_argument == 3
    for policy in (sb3_softvalue.MlpPolicy, sb3_softvalue.CnnPolicy, sb3_softvalue.MultiInputPolicy):
        assert policy in SACV.policy_aliases.values()
    assert small(SACV, box_env(), sb3_softvalue.MlpPolicy).learn(15)._n_updates == 5


def test_critic_target():
    model = small(SACV, box_env())
    for owner, name in ((model, "SACV"), (model.policy, "SACVPolicy")):
        with pytest.raises(AttributeError, match=f"{name} has no 'critic_target'.*'value_target' instead"):
            _ = owner.critic_target
        assert not hasattr(owner, "critic_target")
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = model.policy.no_such_thing


def test_mismatched_environment_at_load(tmp_path):
    small(SACV, box_env()).save(tmp_path / "model")
    with pytest.raises(ValueError, match="Observation spaces do not match"):
        SACV.load(tmp_path / "model", env=box_env(n_observations=4))
