"""What cannot work is refused with one sentence before anything is trained."""

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import SAC, HerReplayBuffer
from stable_baselines3.common.buffers import NStepReplayBuffer, RolloutBuffer
from stable_baselines3.common.noise import NormalActionNoise, OrnsteinUhlenbeckActionNoise, VectorizedActionNoise
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack, VecNormalize, VecTransposeImage
from stable_baselines3.sac.policies import SACPolicy

import sb3_softvalue
from sb3_softvalue import SACV
from tests.helpers import RandomEnv, box_env, filled, small, train

OBSERVATIONS = spaces.Box(-1.0, 1.0, shape=(3,), dtype=np.float32)
UNBOUNDED = spaces.Box(-np.inf, np.inf, shape=(2,), dtype=np.float32)
HALF_BOUNDED = spaces.Box(np.array([-1.0, -1.0]), np.array([1.0, np.inf]), dtype=np.float64)


@pytest.mark.parametrize(
    "action_space, match",
    [
        (spaces.Discrete(3), r"continuous actions.*Discrete\(3\).*use DQN or PPO"),
        (spaces.MultiDiscrete([3, 2]), r"continuous actions.*MultiDiscrete.*PPO or A2C"),
        (spaces.MultiBinary(4), r"continuous actions.*MultiBinary.*PPO or A2C"),
        (UNBOUNDED, r"finite action bounds.*finite low and high"),
        (HALF_BOUNDED, r"finite action bounds.*finite low and high"),
        (spaces.Box(0, 10, (2,), dtype=np.int64), r"actions are floats.*truncated to integers.*dtype=np\.float32"),
        (spaces.Box(-3e38, 3e38, (2,), dtype=np.float32), "by high - low, which overflows float32"),
    ],
)
# gymnasium's, for an infinite bound
@pytest.mark.filterwarnings("ignore:.*precision lowered by casting:UserWarning")
def test_action_space(action_space, match):
    with pytest.raises(AssertionError, match=match):
        SACV("MlpPolicy", RandomEnv(OBSERVATIONS, action_space))
    # A later environment too
    with pytest.raises((AssertionError, ValueError), match=f"{match}|Action spaces do not match"):
        small(SACV, box_env()).set_env(RandomEnv(OBSERVATIONS, action_space))


BAD_OPTIONS: list[tuple[dict[str, Any], type[Exception], str]] = [
    (dict(reward_scale=-1.0), ValueError, "reward_scale must be a positive number or a schedule"),
    (dict(reward_scale=0.0), ValueError, "reward_scale must be a positive number"),
    (dict(reward_scale=float("nan")), ValueError, "reward_scale must be a positive number"),
    (dict(reward_scale="5"), ValueError, "reward_scale must be a positive number"),
    (dict(target_update_interval=0), ValueError, "target_update_interval must be a whole number of at least 1, got 0"),
    (dict(target_update_interval=1.5), ValueError, "target_update_interval must be a whole number"),
    (dict(target_update_interval=True), ValueError, "target_update_interval must be a whole number"),
    (dict(tau=1.5), ValueError, "tau must be between 0 and 1, got 1.5"),
    (dict(tau=-0.1), ValueError, "tau must be between 0 and 1"),
    (dict(tau="0.1"), ValueError, "tau must be between 0 and 1, got '0.1'"),
    (dict(gamma=1.01), ValueError, "gamma must be between 0 and 1"),
    (dict(action_prior="gaussian"), ValueError, "action_prior must be one of 'uniform', 'normalized_uniform', 'normal'"),
    (dict(max_grad_norm=0.0), ValueError, "max_grad_norm must be a positive number.*use None for no clipping"),
    (dict(max_grad_norm=-1.0), ValueError, "max_grad_norm must be a positive number"),
    (dict(max_grad_norm="1"), ValueError, "max_grad_norm must be a positive number, got '1'"),
    (dict(learning_rate=-1e-3), ValueError, "learning_rate must be a non-negative number"),
    (dict(qf_learning_rate=-1e-3), ValueError, "qf_learning_rate must be a non-negative number"),
    (dict(vf_learning_rate="fast"), ValueError, "vf_learning_rate must be a non-negative number or a schedule"),
    (dict(ent_coef_learning_rate=float("inf")), ValueError, "ent_coef_learning_rate must be a non-negative number"),
    (dict(ent_coef=-0.1), ValueError, "ent_coef must be finite and not negative.*use 0"),
    (dict(ent_coef=float("nan")), ValueError, "ent_coef must be finite and not negative"),
    (dict(ent_coef="learned"), ValueError, "ent_coef must be a number, 'auto' or 'auto_<initial value>', got 'learned'"),
    (dict(ent_coef="auto_x"), ValueError, "ent_coef must be a number, 'auto' or"),
    (dict(policy_kwargs=dict(net_arc=[8])), TypeError, "unexpected keyword argument 'net_arc'"),
    (dict(policy_kwargs=dict(net_arch=["8"])), ValueError, "net_arch must be a list of layer sizes"),
    (
        dict(policy_kwargs=dict(activation_fn=th.nn.Tanh())),
        ValueError,
        "must be a class such as torch.nn.Tanh, got an instance",
    ),
    (dict(policy_kwargs=dict(optimizer_class="Adam")), ValueError, "must be a class such as torch.optim.Adam, got 'Adam'"),
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
    (
        dict(policy_kwargs=dict(optimizer_class=th.optim.LBFGS)),
        ValueError,
        "optimizer_class must not need a closure, but LBFGS",
    ),
    (dict(replay_buffer_class=RolloutBuffer), ValueError, "must be a subclass of SB3's ReplayBuffer, got .*RolloutBuffer"),
    (dict(replay_buffer_class="HER"), ValueError, "must be a subclass of SB3's ReplayBuffer, got 'HER'"),
    (dict(replay_buffer_class=HerReplayBuffer), ValueError, "HerReplayBuffer needs Dict observations"),
]


@pytest.mark.parametrize("options, error, match", BAD_OPTIONS, ids=[str(options) for options, _, _ in BAD_OPTIONS])
def test_option(options, error, match):
    with pytest.raises(error, match=match):
        small(SACV, box_env(), **options)


def noise_of(size: int) -> NormalActionNoise:
    return NormalActionNoise(np.zeros(size), np.ones(size))


@pytest.mark.parametrize(
    "noise",
    [noise_of(3), OrnsteinUhlenbeckActionNoise(np.zeros(3), np.ones(3)), VectorizedActionNoise(noise_of(3), 1)],
    ids=lambda noise: type(noise).__name__,
)
def test_action_noise(noise):
    with pytest.raises(ValueError, match=r"action_noise must have the shape of an action, \(2,\), got \(3,\)"):
        small(SACV, box_env(), action_noise=noise)
    for size in (1, 2):
        small(SACV, box_env(), action_noise=noise_of(size)).learn(15)


IMAGE = spaces.Box(0, 255, (36, 36, 3), dtype=np.uint8)
SMALL_IMAGE = spaces.Box(0, 255, (8, 8, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    "observation_space, policy, match",
    [
        (spaces.Box(-1.0, 1.0, ()), "MlpPolicy", "Observations must have at least one dimension"),
        (spaces.MultiDiscrete([[2, 3], [4, 2]]), "MlpPolicy", "one-dimensional MultiDiscrete observations only"),
        (SMALL_IMAGE, "CnnPolicy", r"needs images of at least 36 by 36 pixels, got Box\(0, 255, \(3, 8, 8\)"),
        (spaces.Dict(image=SMALL_IMAGE), "MultiInputPolicy", "needs images of at least 36 by 36 pixels"),
        (spaces.Dict(), "MultiInputPolicy", "Observations must have at least one key"),
        (spaces.Dict({"a.b": OBSERVATIONS}), "MultiInputPolicy", "no module with the name 'a.b': rename this key"),
        (spaces.Dict({"keys": OBSERVATIONS}), "MultiInputPolicy", "no module with the name 'keys': rename this key"),
    ],
    ids=str,
)
def test_observation_space(observation_space, policy, match):
    with pytest.raises(ValueError, match=match):
        small(SACV, RandomEnv(observation_space), policy=policy)


def behind(observation_space: spaces.Space) -> DummyVecEnv:
    return DummyVecEnv([lambda: RandomEnv(observation_space)])


@pytest.mark.parametrize(
    "make_env, policy, match",
    [
        (lambda: VecNormalize(behind(IMAGE), norm_obs=False), "CnnPolicy", "make VecNormalize the outermost wrapper"),
        (lambda: VecFrameStack(VecNormalize(behind(OBSERVATIONS)), 2), "MlpPolicy", "make VecNormalize the outermost wrapper"),
        (lambda: VecNormalize(behind(spaces.Discrete(5)), norm_obs=False), "MlpPolicy", r"cannot store Discrete\(5\) with"),
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
    images = VecNormalize(VecTransposeImage(behind(IMAGE)), norm_obs=False)
    small(SACV, images, policy="CnnPolicy", policy_kwargs=policy_kwargs).learn(25)
    small(SACV, VecNormalize(VecFrameStack(behind(OBSERVATIONS), 2))).learn(25)


@pytest.mark.parametrize("model_class", [SAC, SACV])
@pytest.mark.parametrize("options, error", [(dict(ent_coef="auto_0"), AssertionError), (dict(target_entropy="a"), ValueError)])
def test_as_sac(model_class, options, error):
    with pytest.raises(error):
        small(model_class, box_env(), **options)


def test_bad_option_at_load(tmp_path):
    small(SACV, box_env()).save(tmp_path / "model")
    with pytest.raises(ValueError, match="action_prior must be one of"):
        SACV.load(tmp_path / "model", action_prior="gaussian")
    with pytest.raises(ValueError, match="ent_coef must be a number"):
        SACV.load(tmp_path / "model", ent_coef="learned")
    with pytest.raises(ValueError, match="ent_coef must be finite and not negative"):
        SACV.load(tmp_path / "model", custom_objects=dict(ent_coef=-1.0))


SCHEDULES = ("learning_rate", "qf_learning_rate", "vf_learning_rate", "ent_coef_learning_rate", "reward_scale")


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("value", [-1.0, float("inf"), float("nan"), "x"])
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


@pytest.mark.parametrize("name", SCHEDULES[1:])
def test_number_set_later(name):
    model = filled(box_env())
    setattr(model, name, -1.0)
    with pytest.raises(
        ValueError, match=f"^{name} must be a finite non-negative number or a schedule of such numbers, got -1"
    ):
        train(model, 1)
    assert model._n_updates == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "abc", None])
def test_target_entropy(value):
    with pytest.raises(ValueError, match="target_entropy must be a finite number or 'auto', got"):
        small(SACV, box_env(), target_entropy=value)


@pytest.mark.parametrize("name", ["batch_size", "buffer_size", "n_steps"])
@pytest.mark.parametrize("value", [0, -1, 1.5])
def test_sizes(name, value):
    with pytest.raises(ValueError, match=f"{name} must be a whole number of at least 1, got {value}"):
        small(SACV, box_env(), **{name: value})


def test_action_that_cannot_vary():
    flat = spaces.Box(np.array([-1.0, 0.5], dtype=np.float32), np.array([1.0, 0.5], dtype=np.float32))
    with pytest.raises(AssertionError, match="leave out the dimension that cannot vary"):
        small(SACV, RandomEnv(box_env().observation_space, flat))


class OtherNetworks(SACPolicy):
    """A policy for SAC that builds its networks in its own way."""

    def _build(self, lr_schedule: Any) -> None:
        super()._build(lr_schedule)


def test_policy_that_cannot_get_a_value_network():
    with pytest.raises(
        ValueError, match=r"cannot get one, since it overrides _build: derive it from sb3_softvalue\.MlpPolicy"
    ):
        SACV(OtherNetworks, box_env())


def test_unknown_policy_name():
    with pytest.raises(ValueError, match=r"policy must be 'MlpPolicy'.* or the class of a policy, got 'LstmPolicy'"):
        SACV("LstmPolicy", box_env())


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


def test_wrong_action_space_does_not_start_an_episode():
    class Counting(gym.Wrapper):
        resets = 0

        def reset(self, **kwargs: Any) -> Any:
            Counting.resets += 1
            return super().reset(**kwargs)

    with pytest.raises(AssertionError, match="continuous actions"):
        SACV("MlpPolicy", Counting(RandomEnv(OBSERVATIONS, spaces.Discrete(2))))
    assert Counting.resets == 0
