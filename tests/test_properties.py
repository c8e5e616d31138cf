"""
Any combination of constructor options and spaces either trains or is refused in one sentence, and a script for SAC that is
changed in any way does the same with SACV.
"""

import contextlib
import copy
import inspect
import io
import pathlib
import re
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import cloudpickle
import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stable_baselines3 import SAC
from stable_baselines3.common.buffers import DictReplayBuffer, NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.noise import NormalActionNoise, OrnsteinUhlenbeckActionNoise
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.type_aliases import TrainFreq, TrainFrequencyUnit
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import (
    DummyVecEnv,
    VecCheckNan,
    VecEnv,
    VecFrameStack,
    VecMonitor,
    VecNormalize,
    VecTransposeImage,
)
from stable_baselines3.sac.policies import Actor, SACPolicy

import sb3_softvalue
from sb3_softvalue import SACV

OURS = pathlib.Path(sb3_softvalue.__file__).parent


class AnySpaces(gym.Env):
    """Observations and rewards at random; episodes of seven steps, which end and are cut off in turn."""

    def __init__(self, observation_space: spaces.Space, action_space: spaces.Space):
        self.observation_space, self.action_space = observation_space, action_space
        # Networks for images sample the space itself as they are made
        self.observations = copy.deepcopy(observation_space)
        self.n_episodes = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.observations.seed(seed)
        self.n_steps = 0
        self.n_episodes += 1
        return self.observations.sample(), {}

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert np.all((self.action_space.low <= action) & (action <= self.action_space.high)), action
        self.n_steps += 1
        over = self.n_steps == 7
        terminated = over and self.n_episodes % 2 == 0
        return self.observations.sample(), float(self.np_random.normal()), terminated, over and not terminated, {}


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
    "buffer_size": ([1000, 1, 3, 0, -5, np.int64(50)], [10.5, None]),
    "learning_starts": ([5, 0, 100, -3, 2.5, np.inf], [None]),
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
    "n_steps": ([1, 3, 0, -1, np.int64(2)], [None]),
    "ent_coef": (
        ["auto", "auto_0.1", "automatic", "auto_0.1_", 0.2, 0.0, -0.1, "0.2", True, th.tensor(0.2), np.array(0.2)],
        [th.ones(2), "auto_-1", "auto_", None],
    ),
    "target_update_interval": ([1, 4], [0, 1.5, None]),
    "target_entropy": (["auto", -2.0, 0], ["low", None]),
    "use_sde": ([False, True], []),
    "sde_sample_freq": ([-1, 4], []),
    "use_sde_at_warmup": ([False, True], []),
    "stats_window_size": ([100, 1, 0, None], [-1, 1.5]),
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
    "reward_scale": ([1.0, 5, 0.0, lambda progress: 1.0 + progress], [-1.0, np.inf, "large", None]),
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
    make = lambda: AnySpaces(observation_space, action_space)  # noqa: E731 (used twice below)
    env = make() if n_envs == 1 else DummyVecEnv([make] * n_envs)
    model = None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # SB3's advice about dtypes, image shapes and the like
            model = SACV(env=env, **({"policy_kwargs": {"net_arch": [8]}} | options))
            model.learn(20)
    except Exception as error:
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
    n_steps_of_dict = isinstance(observation_space, spaces.Dict) and options.get("n_steps", 1) != 1
    impossible = bool(n_steps_of_dict) or (
        n_envs > 1 and isinstance(options.get("train_freq"), tuple) and options["train_freq"][0] == 1
    )
    assert outcome(observation_space, action_space, n_envs, options) == OUTCOMES[impossible]


# What a script does between the construction of a model and its first steps, or between two calls of learn()
SET: dict[str, Callable[[Any], Any]] = {
    "gamma": lambda m: setattr(m, "gamma", 0.5),
    "tau": lambda m: setattr(m, "tau", np.float64(1.0)),
    "batch_size": lambda m: setattr(m, "batch_size", np.int64(3)),
    "target_update_interval": lambda m: setattr(m, "target_update_interval", 3),
    "gradient_steps": lambda m: setattr(m, "gradient_steps", 3),
    "all gradient_steps": lambda m: setattr(m, "gradient_steps", -5),
    "no gradient_steps": lambda m: setattr(m, "gradient_steps", 0),
    "train_freq": lambda m: setattr(m, "train_freq", TrainFreq(3, TrainFrequencyUnit.STEP)),
    "learning_starts": lambda m: setattr(m, "learning_starts", 12),
    "learning_starts never": lambda m: setattr(m, "learning_starts", np.inf),
    "ent_coef": lambda m: setattr(m, "ent_coef", 0.3),
    "no ent_coef": lambda m: setattr(m, "ent_coef", None),
    "target_entropy": lambda m: setattr(m, "target_entropy", -3.0),
    "action_noise": lambda m: setattr(m, "action_noise", NormalActionNoise(np.zeros(1), np.ones(1))),
    "no action_noise": lambda m: setattr(m, "action_noise", None),
    "lr_schedule": lambda m: setattr(m, "lr_schedule", lambda progress: 0.0),
    "learning_rate": lambda m: setattr(m, "learning_rate", 0.0),
    "verbose": lambda m: setattr(m, "verbose", 0),
    "seed": lambda m: m.set_random_seed(7),
    "logger": lambda m: m.set_logger(Logger(folder=None, output_formats=[])),
    "no last observation": lambda m: setattr(m, "_last_obs", None),
    "no replay_buffer": lambda m: setattr(m, "replay_buffer", None),
    "empty replay_buffer": lambda m: m.replay_buffer.reset(),
    "replay_buffer": lambda m: setattr(m, "replay_buffer", copy.deepcopy(m.replay_buffer)),
    "log_ent_coef": lambda m: m.log_ent_coef.data.fill_(-2.0),
    "frozen actor": lambda m: m.actor.requires_grad_(False),
    "frozen layer of the critic": lambda m: m.critic.qf0[0].requires_grad_(False),
    "thawed": lambda m: m.policy.requires_grad_(True),
    "another optimizer": lambda m: setattr(m.actor, "optimizer", th.optim.SGD(m.actor.parameters(), 1e-2)),
    "gradient hooks": lambda m: [p.register_hook(th.zeros_like) for p in m.critic.parameters()],
    "forward hook": lambda m: m.actor.register_forward_hook(lambda module, args, actions: actions * 0.0),
    "forward": lambda m: setattr(m.actor, "forward", lambda obs, deterministic=False: Actor.forward(m.actor, obs, True)),
    "predict": lambda m: setattr(m.policy, "predict", partial(type(m.policy).predict, m.policy)),
    "another layer": lambda m: m.actor.latent_pi.append(th.nn.Dropout(0.5)),
    "training mode": lambda m: m.policy.set_training_mode(True),
    "another actor": lambda m: _replace(m, "actor"),
    "another critic": lambda m: _replace(m, "critic"),
    "a copy of the policy": lambda m: (setattr(m, "policy", copy.deepcopy(m.policy)), m._create_aliases()),
    "train()": lambda m: m.learn(6).train(2, 4),
    "train() of NumPy's": lambda m: m.learn(6).train(np.int64(2), np.int64(4)),
    "learn a bit": lambda m: m.learn(9, log_interval=1),
    "learn to be stopped": lambda m: m.learn(30, callback=lambda variables, _: m.num_timesteps % 9 != 8),
    "set_parameters": lambda m: m.set_parameters(m.get_parameters()),
    "evaluate_policy": lambda m: evaluate_policy(m, m.get_env(), n_eval_episodes=1, warn=False),
}


def _replace(model: Any, name: str) -> None:
    """Another network with an optimizer, as a script for SAC would make it."""
    network = getattr(model.policy, f"make_{name}")()
    network.optimizer = th.optim.Adam(network.parameters(), lr=1e-3)
    setattr(model.policy, name, network)
    setattr(model, name, network)


# What a script does with the model then, which gives the one that it continues with
THEN: dict[str, Callable[[Any], Any]] = {
    "nothing": lambda m: m,
    "deepcopy": copy.deepcopy,
    "cloudpickle": lambda m: cloudpickle.loads(cloudpickle.dumps(m)),
    "load": lambda m: _loaded(m),
    "load without environment": lambda m: _loaded(m, env=None),
    "load with options": lambda m: _loaded(m, gamma=0.5, learning_starts=0, batch_size=2),
    "load, custom_objects": lambda m: _loaded(m, custom_objects={"learning_rate": 0.0, "lr_schedule": lambda _: 0.0}),
    "load, its buffer": lambda m: _loaded(m, buffer=True),
    "set_env": lambda m: (m.set_env(m.get_env()), m)[1],
    "policy": lambda m: (_save_policy(m), m)[1],
}


def _loaded(model: Any, buffer: bool = False, **kwargs: Any) -> Any:
    file, buffer_file = io.BytesIO(), io.BytesIO()
    model.save(file)
    model.save_replay_buffer(buffer_file)
    loaded = type(model).load(file, **({"env": model.get_env()} | kwargs))
    if buffer:
        buffer_file.seek(0)
        loaded.load_replay_buffer(buffer_file)
    return loaded


def _save_policy(model: Any) -> None:
    file = io.BytesIO()
    model.policy.save(file)
    file.seek(0)
    type(model.policy).load(file)


class OwnBuffer(ReplayBuffer):
    """A subclass that changes nothing."""


class OwnPolicy(SACPolicy):
    """A subclass that changes nothing."""


# Around the environment, one after the other
GYM_WRAPPERS: dict[str, Callable[[gym.Env], gym.Env]] = {
    "RescaleAction": lambda env: gym.wrappers.RescaleAction(env, np.float32(-0.5), np.float32(0.5)),
    "reward of NumPy's": lambda env: gym.wrappers.TransformReward(env, np.float64),
    "FlattenObservation": gym.wrappers.FlattenObservation,
    "FrameStackObservation": lambda env: gym.wrappers.FrameStackObservation(env, 2),
    "TimeLimit": lambda env: gym.wrappers.TimeLimit(env, 4),
    "TimeAwareObservation": lambda env: gym.wrappers.TimeAwareObservation(gym.wrappers.TimeLimit(env, 50)),
    "NormalizeObservation": gym.wrappers.NormalizeObservation,
    "Monitor": Monitor,
}
VEC_WRAPPERS: dict[str, Callable[[VecEnv], VecEnv]] = {
    "VecNormalize": VecNormalize,
    "VecNormalize of rewards": lambda env: VecNormalize(env, norm_obs=False),
    "VecNormalize that is frozen": lambda env: VecNormalize(env, training=False),
    "VecMonitor": VecMonitor,
    "VecFrameStack": lambda env: VecFrameStack(env, 2),
    "VecCheckNan": lambda env: VecCheckNan(env, raise_exception=True),
    "VecTransposeImage": lambda env: VecTransposeImage(env) if len(env.observation_space.shape or ()) == 3 else env,
}
# What else the constructor may be given, beside OPTIONS
ODD: dict[str, list[Any]] = {
    "policy": [SACPolicy, OwnPolicy],
    "train_freq": [(2, TrainFrequencyUnit.STEP), np.int64(2), [1, "step"]],
    "replay_buffer_class": [ReplayBuffer, OwnBuffer, NStepReplayBuffer, DictReplayBuffer],
    "replay_buffer_kwargs": [{"handle_timeout_termination": False}, {"n_steps": 2}],
    "optimize_memory_usage": [True],
    "action_noise": [OrnsteinUhlenbeckActionNoise(np.zeros(1), np.ones(1))],
    "learning_rate": [LinearSchedule(1e-3, 0.0, 1.0), np.float64(1e-3)],
    "target_entropy": [np.float32(-1), "-1", th.tensor(-1.0)],
    "ent_coef": ["auto_0.5", np.float32(0.1)],
    "policy_kwargs": [
        {"net_arch": [8], "optimizer_class": th.optim.RMSprop, "optimizer_kwargs": {"eps": 1e-5}},
        {"net_arch": [8], "optimizer_kwargs": {"weight_decay": 1e-3}},
        {"net_arch": [8], "features_extractor_class": FlattenExtractor},
        {"net_arch": [8], "activation_fn": lambda: th.nn.LeakyReLU(0.2)},
        {"net_arch": (8,)},
        {"net_arch": [8.0]},
    ],
}
OF_SAC = inspect.signature(SAC).parameters
# Refused though SAC takes it: SB3's buffer would repeat each number that VecNormalize was given to the shape behind a wrapper,
# and cannot store the end of the first episode of discrete observations
SAYS_WHY = r"^VecNormalize returns .* but an outer wrapper changes it|cannot store Discrete\(\d\) with VecNormalize"


def script(
    model_class: type[SAC],
    make_env: Callable[[], Any],
    options: dict[str, Any],
    before: list[str],
    then: str,
    after: list[str],
) -> dict[str, Any]:
    """:return: what came of it, by numbers that do not depend on the algorithm"""
    model = model_class(env=make_env(), **options)
    observation = model.get_env().reset()
    action = model.predict(observation, deterministic=True)[0]
    for name in before:
        SET[name](model)
    model.learn(12)
    model = THEN[then](model)
    for name in after:
        SET[name](model)
    networks = {"actor": model.actor, "critic": model.critic}
    old = {name: copy.deepcopy(network.state_dict()) for name, network in networks.items()}
    if model.get_env() is not None:
        model.learn(8, reset_num_timesteps=False)
    learned = {name for name in old for key, t in networks[name].state_dict().items() if not t.equal(old[name][key])}
    buffer = model.replay_buffer
    later = model.predict(observation)[0]
    assert np.isfinite(later).all()
    return {
        "steps": (model.num_timesteps, model._n_updates, model._episode_num),
        "first action": np.round(action, 5).tolist(),
        "later action": (later.shape, later.dtype),
        "learned": learned,
        "stored": None
        if buffer is None
        else (type(buffer), buffer.pos, buffer.full, buffer.dones.tolist(), buffer.rewards.tolist()),
        "rates": [group["lr"] for network in networks.values() for group in network.optimizer.param_groups],
    }


def run_script(model_class: type[SAC], *args: Any) -> dict[str, Any] | Exception:
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            return script(model_class, *args)
        except Exception as error:
            return error


def check_mutation(data: st.DataObject) -> None:
    """Draw a script, run it with both classes, and compare."""
    observation_space = data.draw(st.sampled_from(READABLE), label="observations")
    action_space = data.draw(st.sampled_from(ACTIONS[:4]), label="actions")
    n_envs = data.draw(st.sampled_from([1, 1, 2]), label="environments")
    wrappers = data.draw(st.lists(st.sampled_from(sorted(GYM_WRAPPERS)), max_size=2), label="wrappers")
    vectorized = data.draw(st.lists(st.sampled_from(sorted(VEC_WRAPPERS)), max_size=2), label="vectorized")
    options: dict[str, Any] = {"policy": policy_for(observation_space), "learning_starts": 5, "batch_size": 4}
    options |= {"policy_kwargs": {"net_arch": [8]}, "seed": 0, "buffer_size": 60, "device": "cpu"}
    names = sorted(({*OPTIONS, *ODD} & set(OF_SAC)) - {"device", "seed", "stats_window_size"})
    for name in data.draw(st.sets(st.sampled_from(names), max_size=3), label="options"):
        options[name] = data.draw(st.sampled_from([*OPTIONS.get(name, ([],))[0], *ODD.get(name, [])]), label=name)
    settings_of = st.lists(st.sampled_from(sorted(SET)), max_size=2)
    before, then = data.draw(settings_of, label="before"), data.draw(st.sampled_from(sorted(THEN)), label="then")
    after = [] if then == "load without environment" else data.draw(settings_of, label="after")

    def make_one() -> gym.Env:
        env: gym.Env = AnySpaces(observation_space, action_space)
        for name in wrappers:
            env = GYM_WRAPPERS[name](env)
        return env

    def make_env() -> Any:
        if n_envs == 1 and not vectorized:
            return make_one()
        env: VecEnv = DummyVecEnv([make_one] * n_envs)
        for name in vectorized:
            env = VEC_WRAPPERS[name](env)
        return env

    sac, sacv = (run_script(cls, make_env, copy.deepcopy(options), before, then, after) for cls in (SAC, SACV))
    if isinstance(sacv, Exception):
        text = str(sacv)
        said = isinstance(sacv, (ValueError, TypeError, AssertionError)) and text.strip() and "\n" not in text.strip()
        if isinstance(sac, Exception):
            assert said or type(sacv) is type(sac), f"{sacv!r}, SAC: {sac!r}"
            return
        assert re.search(SAYS_WHY, text), repr(sacv)
    elif not isinstance(sac, Exception):
        # A saturated policy has no gradient, after these actions and not after those
        if "actor" in sac["learned"] - sacv["learned"]:
            sac["learned"].remove("actor")
        assert sacv == sac


MUTATIONS: dict[str, Any] = dict(deadline=None, database=None, suppress_health_check=list(HealthCheck))


@settings(max_examples=100, derandomize=True, **MUTATIONS)
@given(st.data())
def test_a_script_for_sac(data: st.DataObject) -> None:
    """Whatever SAC does SACV does too, or says in one sentence why not."""
    check_mutation(data)


@pytest.mark.slow
@settings(max_examples=3_000, **MUTATIONS)
@given(st.data())
def test_many_scripts_for_sac(data: st.DataObject) -> None:
    """Others at each run."""
    check_mutation(data)
