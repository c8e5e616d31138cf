"""Any combination of constructor options and spaces: either it trains, or it is refused in one sentence."""

import contextlib
import pathlib
import re
import warnings
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stable_baselines3.common.noise import NormalActionNoise
from stable_baselines3.common.type_aliases import TrainFrequencyUnit
from stable_baselines3.common.vec_env import DummyVecEnv

import sb3_softvalue
from sb3_softvalue import SACV

OURS = pathlib.Path(sb3_softvalue.__file__).parent


class AnySpaces(gym.Env):
    """Observations and rewards at random; episodes of seven steps, which end and are cut off in turn."""

    def __init__(self, observation_space: spaces.Space, action_space: spaces.Space):
        self.observation_space, self.action_space = observation_space, action_space
        self.n_episodes = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.observation_space.seed(seed)
        self.n_steps = 0
        self.n_episodes += 1
        return self.observation_space.sample(), {}

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert np.all((self.action_space.low <= action) & (action <= self.action_space.high)), action
        self.n_steps += 1
        over = self.n_steps == 7
        terminated = over and self.n_episodes % 2 == 0
        return self.observation_space.sample(), float(self.np_random.normal()), terminated, over and not terminated, {}


def box(low: float, high: float, *shape: int, dtype: type = np.float32) -> spaces.Box:
    return spaces.Box(low, high, shape, dtype)


SIMPLE = [
    box(-1, 1, 3),
    box(-np.inf, np.inf, 1, dtype=np.float64),
    box(-2, 5, 2, 3),
    box(0, 255, 4, dtype=np.uint8),
    box(-5, 5, 2, dtype=np.int64),
    spaces.Discrete(4),
    spaces.Discrete(3, start=-1),
    spaces.MultiDiscrete([2, 3]),
    spaces.MultiBinary(3),
]
IMAGES = [box(0, 255, 36, 36, 3, dtype=np.uint8), box(0, 255, 1, 36, 40, dtype=np.uint8)]
OBSERVATIONS = [
    *SIMPLE,
    *IMAGES,
    spaces.Dict({"a": box(-1, 1, 2), "b": spaces.Discrete(3)}),
    spaces.Dict({"image": IMAGES[0], "vector": box(-1, 1, 2, 2)}),
    spaces.Dict({"nested": spaces.Dict({"a": box(-1, 1, 2)})}),
    spaces.Tuple((box(-1, 1, 2), spaces.Discrete(2))),
    box(-1, 1, 0),
    spaces.Text(3),
]
# Those that can be read
READABLE = [space for space in OBSERVATIONS[:13] if space != spaces.Discrete(3, start=-1)]
ACTIONS = [
    box(-1, 1, 1),
    spaces.Box(np.float32([-3, 0.5]), np.float32([-1, 100])),
    box(-2, 2, 2, 2),
    box(-1, 1, 2, dtype=np.float64),
    box(-1, np.inf, 2),
    box(1, 1, 2),
    box(-1, 1, 0),
    box(0, 255, 2, dtype=np.uint8),
    spaces.Discrete(3),
    spaces.MultiBinary(2),
    spaces.Dict({"a": box(-1, 1, 1)}),
]
OUTCOMES = ("trained", "refused")
# Of each option: values that work, and values that are refused
OPTIONS: dict[str, tuple[list[Any], list[Any]]] = {
    "learning_rate": ([1e-3, 0.0, lambda progress: 1e-3 * progress, np.float32(1e-3)], [-1.0, np.nan, "fast", None]),
    "buffer_size": ([1000, 1, 3, np.int64(50)], [0, -5, 10.5, None]),
    "learning_starts": ([5, 0, 100, -3, 2.5, np.inf], [np.nan, None]),
    "batch_size": ([4, 1, 64, np.int64(4)], [0, -1, 2.5, None]),
    "tau": ([0.005, 0.0, 1.0, np.float32(0.1)], [-0.1, 1.1, np.nan, "soft", None]),
    "gamma": ([0.99, 0.0, 1.0], [1.5, -1.0, np.inf, None]),
    "train_freq": (
        [1, 3, (2, "step"), (1, "episode"), (1, TrainFrequencyUnit.EPISODE)],
        [(1, "epoch"), 0, -1, "often", (0, "step"), None],
    ),
    "gradient_steps": ([1, 2, -1, 0, -2], [1.5, None]),
    "action_noise": ([None, NormalActionNoise(np.zeros(1), 0.1 * np.ones(1))], [0.1]),
    "replay_buffer_kwargs": ([None, {"handle_timeout_termination": False}], [{"unknown": 1}, "large"]),
    "optimize_memory_usage": ([False], [True]),
    "n_steps": ([1, 3, np.int64(2)], [0, -1, 1.5, None]),
    "ent_coef": (
        ["auto", "auto_0.1", 0.2, 0.0, "0.2", th.tensor(0.2), np.array(0.2)],
        [th.ones(2), -0.1, np.nan, "auto_-1", "automatic", None],
    ),
    "target_update_interval": ([1, 4], [0, 1.5, None]),
    "target_entropy": (["auto", -2.0, 0], [np.nan, "low", None]),
    "use_sde": ([False, True], []),
    "sde_sample_freq": ([-1, 4], []),
    "use_sde_at_warmup": ([False, True], []),
    "stats_window_size": ([100, 1], [0, -1, 1.5]),
    "policy_kwargs": (
        [
            None,
            {"net_arch": [8]},
            {"net_arch": [np.int64(8)], "n_critics": np.int64(2)},
            {"net_arch": []},
            {"net_arch": {"pi": [8], "qf": [4], "vf": [6]}},
            {"net_arch": {"pi": [8], "qf": [4], "depth": 2}},
            {"net_arch": {"pi": np.array([8]), "qf": range(4, 5)}},
            {"net_arch": [8], "n_critics": 1},
            {"n_critics": 3, "share_features_extractor": True},
            {"net_arch": [8], "activation_fn": th.nn.Tanh, "normalize_images": False},
            {"net_arch": [8], "optimizer_class": th.optim.SGD},
            {"use_expln": True, "clip_mean": 1.0, "log_std_init": -1.0},
        ],
        [{"net_arch": {"pi": [8]}}, {"net_arch": [-1]}, {"net_arch": 8}, {"n_critics": 0}, {"hidden": 8}, "large"],
    ),
    "verbose": ([0], []),
    "seed": ([0, None], [-1, 2.5, "zero"]),
    "device": (["cpu", "auto"], ["abacus"]),
    "reward_scale": ([1.0, 5, lambda progress: 1.0 + progress], [0.0, -1.0, np.inf, "large", None]),
    "qf_learning_rate": ([None, 1e-3, lambda progress: 1e-3], [-1.0, "fast"]),
    "vf_learning_rate": ([None, 1e-3], [np.nan]),
    "ent_coef_learning_rate": ([None, 1e-3], [-1e-9]),
    "max_grad_norm": ([None, 1.0], [0.0, -1.0, np.inf, "small"]),
    "action_prior": (["uniform", "normal", "normalized_uniform"], ["beta", None]),
    "policy_delay": ([1, 3], [0, 1.5]),
    "check_finite": ([True, False], []),
    "execution": (["eager", "auto"], ["fast", None]),
    "policy": (["MlpPolicy"], ["CnnPolicy", "MultiInputPolicy", "Policy", None, th.nn.Linear]),
}


def outcome(observation_space: spaces.Space, action_space: spaces.Space, n_envs: int, options: dict[str, Any]) -> str:
    """
    :return: "trained", or "refused" where nothing has begun
    :raises AssertionError: if it broke otherwise than by a refusal that explains itself
    """
    # SB3's vectorised environments know fewer spaces, and refuse the others before a model sees them
    make = lambda: AnySpaces(observation_space, action_space)  # noqa: E731 (a name for the call below)
    env = make() if n_envs == 1 else DummyVecEnv([make] * n_envs)
    model = None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # SB3's advice about dtypes, image shapes and the like
            model = SACV(env=env, **({"policy_kwargs": {"net_arch": [8]}} | options))
            model.learn(20)
    except (ValueError, TypeError, AssertionError, NotImplementedError) as error:
        assert model is None or model.num_timesteps == 0, f"after {model.num_timesteps} steps: {error!r}"
        assert str(error).strip(), repr(error)
        return "refused"
    assert model.num_timesteps >= 20
    for name, parameter in model.policy.state_dict().items():
        assert th.isfinite(parameter).all(), name
    with contextlib.closing(model.get_env()) as env:
        observations = env.reset()
        actions, _ = model.predict(observations)
        assert actions.shape == (n_envs, *action_space.shape)
        assert np.all((action_space.low <= actions) & (actions <= action_space.high))
        assert model.policy.value(model.policy.obs_to_tensor(observations)[0]).shape == (n_envs, 1)
    return "trained"


def policy_for(observation_space: spaces.Space) -> str:
    return "MultiInputPolicy" if isinstance(observation_space, spaces.Dict) else "MlpPolicy"


def shown(value: Any) -> str:
    """:return: the same in every process: no address"""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


VALUES = [(name, value, OUTCOMES[index]) for name, two in OPTIONS.items() for index in (0, 1) for value in two[index]]


@pytest.mark.parametrize("name, value, expected", VALUES, ids=shown)
def test_each_value_of_each_option(name: str, value: Any, expected: str) -> None:
    options = {"policy": "MlpPolicy", "learning_starts": 5, "batch_size": 4, "execution": "eager", name: value}
    assert outcome(SIMPLE[0], ACTIONS[0], 1, options) == expected


@pytest.mark.parametrize("observation_space", OBSERVATIONS, ids=str)
@pytest.mark.parametrize("action_space", ACTIONS, ids=str)
def test_each_pair_of_spaces(observation_space: spaces.Space, action_space: spaces.Space) -> None:
    options = {"policy": policy_for(observation_space), "learning_starts": 5, "batch_size": 4, "execution": "eager"}
    works = observation_space in READABLE and action_space in ACTIONS[:4]
    assert outcome(observation_space, action_space, 1, options) == OUTCOMES[not works]


# The same examples on every run
@settings(max_examples=150, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_any_combination(data: st.DataObject) -> None:
    """Options that work by themselves work together, but for the pairs that SB3's buffers and loops cannot do."""
    observation_space = data.draw(st.sampled_from(READABLE))
    options: dict[str, Any] = {"policy": policy_for(observation_space), "learning_starts": 5, "execution": "eager"}
    for name in data.draw(st.sets(st.sampled_from(sorted(set(OPTIONS) - {"policy", "execution", "device"})), max_size=8)):
        options[name] = data.draw(st.sampled_from(OPTIONS[name][0]), label=name)
    n_envs = data.draw(st.sampled_from([1, 2]))
    action_space = data.draw(st.sampled_from(ACTIONS[:4]))
    n_steps_of_dict = isinstance(observation_space, spaces.Dict) and options.get("n_steps", 1) > 1
    impossible = bool(n_steps_of_dict) or (
        n_envs > 1 and isinstance(options.get("train_freq"), tuple) and options["train_freq"][0] == 1
    )
    assert outcome(observation_space, action_space, n_envs, options) == OUTCOMES[impossible]


@pytest.mark.parametrize("buffer_size", [1, 2, 3, 4])
@pytest.mark.parametrize("n_envs", [1, 2])
def test_small_memory_optimized_buffers(buffer_size: int, n_envs: int) -> None:
    memory = {"optimize_memory_usage": True, "replay_buffer_kwargs": {"handle_timeout_termination": False}}
    options = {"policy": "MlpPolicy", "learning_starts": 5, "batch_size": 4, "execution": "eager", "buffer_size": buffer_size}
    works = buffer_size >= 2 * n_envs
    assert outcome(SIMPLE[0], ACTIONS[0], n_envs, options | memory) == OUTCOMES[not works]
