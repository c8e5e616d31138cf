"""Trainings that differ in all that an execution of the update has to respect, for the comparison with the eager one."""

from typing import Any

import torch as th
from gymnasium import spaces
from stable_baselines3 import HerReplayBuffer
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from torch import nn

from sb3_softvalue import SACV
from tests.helpers import (
    ClockEnv,
    DoubleExtractor,
    PointGoalEnv,
    as_double,
    box_env,
    everything,
    filled,
    image_env,
    seed_everything,
    train,
)

# Each execution is another order of the same sums. In float64 that is all there is. In float32 Adam turns the rounding of
# a gradient near zero into a part of the learning rate (1e-3), over 200 updates; SGD does not.
TOLERANCE = {
    "float64": dict(rtol=1e-9, atol=1e-10),
    "float32 Adam": dict(rtol=2e-3, atol=5e-4),
    "float32 SGD": dict(rtol=1e-4, atol=1e-5),
}
# Calls of train() that make up 200 updates, with the progress remaining at each
CALLS = ((1, 1.0), (4, 0.9), (1, 0.9), (94, 0.5), (100, 0.1))
SGD = dict(optimizer_class=th.optim.SGD)


class OwnExtractor(FlattenExtractor):
    """A learned scale, a mean that is not learned, and a number; not one of the layers that are known."""

    factor = 1.0

    def __init__(self, observation_space: spaces.Space):
        super().__init__(observation_space)
        self.scale = nn.Parameter(th.ones(self.features_dim))
        self.register_buffer("mean", th.full((self.features_dim,), 0.1))

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return self.factor * self.scale * (super().forward(observations) - self.mean)


def normalized_env() -> VecNormalize:
    return VecNormalize(DummyVecEnv([box_env, box_env]))


# name: environment, policy, options, row of the tolerance table
SCENARIOS: dict[str, tuple[Any, str, dict[str, Any], str]] = {
    "plain": (box_env, "MlpPolicy", dict(policy_kwargs=dict(net_arch=[16, 16])), "float32 Adam"),
    "own extractor": (
        box_env,
        "MlpPolicy",
        dict(policy_kwargs=SGD | dict(features_extractor_class=OwnExtractor)),
        "float32 SGD",
    ),
    "float64, delayed policy, shared, own rates, hard target": (
        box_env,
        "MlpPolicy",
        dict(
            policy_kwargs=dict(
                net_arch=dict(pi=[8, 7], qf=[9], vf=[6, 8]),
                features_extractor_class=DoubleExtractor,
                share_features_extractor=True,
            ),
            policy_delay=2,
            learning_rate=lambda progress: 1e-2 * progress,
            qf_learning_rate=2e-2,
            vf_learning_rate=lambda progress: 5e-3 * progress,
            ent_coef_learning_rate=1e-3,
            reward_scale=lambda progress: 1.0 + progress,
            tau=1.0,
            target_update_interval=3,
        ),
        "float64",
    ),
    "float64, fixed temperature, normalized prior, clipped, 3 critics": (
        box_env,
        "MlpPolicy",
        dict(
            policy_kwargs=dict(net_arch=[8], n_critics=3, features_extractor_class=DoubleExtractor),
            ent_coef=0.3,
            action_prior="normalized_uniform",
            max_grad_norm=0.5,
            reward_scale=5.0,
        ),
        "float64",
    ),
    "fixed temperature, normal prior, delayed policy": (
        box_env,
        "MlpPolicy",
        dict(policy_kwargs=SGD, ent_coef=0.3, action_prior="normal", policy_delay=3),
        "float32 SGD",
    ),
    "n-step": (lambda: ClockEnv(episode_length=7), "MlpPolicy", dict(n_steps=3, policy_kwargs=SGD), "float32 SGD"),
    "HER": (PointGoalEnv, "MultiInputPolicy", dict(replay_buffer_class=HerReplayBuffer, policy_kwargs=SGD), "float32 SGD"),
    "HER, the actor sees less": (
        PointGoalEnv,
        "MultiInputPolicy",
        dict(replay_buffer_class=HerReplayBuffer, policy_kwargs=SGD | dict(actor_keys=["observation", "desired_goal"])),
        "float32 SGD",
    ),
    "VecNormalize": (normalized_env, "MlpPolicy", dict(policy_kwargs=SGD), "float32 SGD"),
    "shared image": (
        image_env,
        "CnnPolicy",
        dict(policy_kwargs=SGD | dict(features_extractor_kwargs=dict(features_dim=8), share_features_extractor=True)),
        "float32 SGD",
    ),
}


def prepared(name: str, execution: str, device: str = "cpu") -> SACV:
    """The scenario's model with a filled buffer."""
    make_env, policy, options, row = SCENARIOS[name]
    options = dict(options, policy_kwargs=dict(net_arch=[8]) | options["policy_kwargs"], execution=execution)
    model = filled(make_env(), policy, **(dict(learning_rate=1e-3, device=device) | options))
    return as_double(model) if row == "float64" else model


def run(model: SACV, *calls: tuple[int, float]) -> list[dict[str, float]]:
    """
    Call ``train()`` several times from one state of the random generators.

    :param calls: gradient steps and remaining progress of each
    :return: what was logged
    """
    seed_everything(4)
    logs = []
    for gradient_steps, progress in calls:
        model._current_progress_remaining = progress
        logs.append(train(model, gradient_steps))
    return logs


def assert_agree(model: SACV, expected: SACV, **tolerance: float) -> None:
    """Parameters, target, temperature, states of all optimizers and counters."""

    def compare(actual: Any, expected: Any, name: str) -> None:
        if isinstance(expected, dict):
            assert set(actual) == set(expected), name
            for key in expected:
                compare(actual[key], expected[key], f"{name}.{key}")
        elif isinstance(expected, th.Tensor):
            th.testing.assert_close(actual, expected, msg=lambda text: f"{name}: {text}", check_device=False, **tolerance)
        elif name.endswith("_n_updates"):
            assert actual == expected

    compare(everything(model), everything(expected), "model")
