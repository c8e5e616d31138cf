"""Small environments, extractors and models that the tests share."""

import copy
from collections.abc import Iterator
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3 import SAC
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.preprocessing import get_flattened_obs_dim
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from torch import nn

from sb3_softvalue import SACV
from sb3_softvalue.objective import Batch

# Both where a test can run with either
MODEL_LIST = [SAC, SACV]
# Small enough that hundreds of updates take no time
SMALL: dict[str, Any] = dict(
    learning_starts=10, batch_size=8, buffer_size=500, policy_kwargs=dict(net_arch=[8]), seed=0, device="cpu"
)


class RandomEnv(gym.Env):
    """
    Observations drawn from the observation space whatever one does; the reward is minus the squared action.

    :param observation_space: any space that SB3 knows
    :param action_space: any space; two actions with asymmetric bounds if None
    :param episode_length: the episode is truncated after as many steps
    """

    def __init__(
        self, observation_space: spaces.Space, action_space: spaces.Space | None = None, episode_length: int = 10
    ) -> None:
        self.observation_space = observation_space
        self.action_space = action_space or spaces.Box(
            np.array([-1.0, 0.0], dtype=np.float32), np.array([2.0, 0.5], dtype=np.float32)
        )
        self.episode_length = episode_length

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        self.n_steps = 0
        return self.observation_space.sample(), {}

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.n_steps += 1
        reward = -float(np.square(action).sum())
        return self.observation_space.sample(), reward, False, self.n_steps >= self.episode_length, {}


class ClockEnv(gym.Env):
    """
    Observes the number of steps since the reset; the reward is 1. It never truncates: ``TimeLimit`` does.

    :param episode_length: the episode terminates after as many steps; None never
    """

    def __init__(self, episode_length: int | None = None) -> None:
        self.observation_space = spaces.Box(-100.0, 100.0, shape=(1,), dtype=np.float32)
        self.action_space = spaces.Box(-1.0, 1.0, shape=(1,), dtype=np.float32)
        self.episode_length = episode_length

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.n_steps = 0
        return np.zeros(1, dtype=np.float32), {}

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.n_steps += 1
        return np.full(1, self.n_steps, dtype=np.float32), 1.0, self.n_steps == self.episode_length, False, {}


class PointGoalEnv(gym.Env):
    """Move a point on a line to a goal; observations as HER wants them."""

    def __init__(self) -> None:
        line = spaces.Box(-2.0, 2.0, shape=(1,), dtype=np.float32)
        self.observation_space = spaces.Dict(observation=line, achieved_goal=line, desired_goal=line)
        self.action_space = spaces.Box(-1.0, 1.0, shape=(1,), dtype=np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.n_steps = 0
        self.point = np.zeros(1, dtype=np.float32)
        self.goal = self.np_random.uniform(-1.0, 1.0, size=1).astype(np.float32)
        return self._observation(), {}

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.n_steps += 1
        self.point = np.clip(self.point + 0.3 * action, -2.0, 2.0).astype(np.float32)
        reward = float(self.compute_reward(self.point, self.goal, {}))
        return self._observation(), reward, False, self.n_steps >= 10, {}

    def compute_reward(self, achieved_goal: np.ndarray, desired_goal: np.ndarray, _info: Any) -> np.ndarray:
        return -(np.abs(achieved_goal - desired_goal).sum(axis=-1) > 0.1).astype(np.float32)

    def get_state(self) -> dict[str, Any]:
        """Nothing goes from one episode to the next."""
        return {}

    def set_state(self, state: dict[str, Any]) -> None:
        assert state == {}

    def _observation(self) -> dict[str, np.ndarray]:
        return dict(observation=self.point, achieved_goal=self.point, desired_goal=self.goal)


class ReacherGoalEnv(gym.ObservationWrapper):
    """``Reacher-v5`` with its fingertip as achieved goal and its target as desired goal."""

    def __init__(self, env: gym.Env) -> None:
        super().__init__(env)
        goal = spaces.Box(-np.inf, np.inf, shape=(2,), dtype=np.float64)
        observation = spaces.Box(-np.inf, np.inf, shape=(6,), dtype=np.float64)
        self.observation_space = spaces.Dict(observation=observation, achieved_goal=goal, desired_goal=goal)

    def observation(self, observation: np.ndarray) -> dict[str, np.ndarray]:
        # 0-3 cosines and sines, 4-5 target, 6-7 angular velocities, 8-9 fingertip minus target
        joints = np.concatenate([observation[:4], observation[6:8]])
        target = observation[4:6]
        return dict(observation=joints, achieved_goal=target + observation[8:10], desired_goal=target)

    def compute_reward(self, achieved_goal: np.ndarray, desired_goal: np.ndarray, _info: Any) -> np.ndarray:
        return -np.linalg.norm(achieved_goal - desired_goal, axis=-1)

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        observation, _, terminated, truncated, info = super().step(action)
        reward = float(self.compute_reward(observation["achieved_goal"], observation["desired_goal"], info))
        return observation, reward, terminated, truncated, info


class DoubleExtractor(BaseFeaturesExtractor):
    """A learned layer in float64, so that every network after it computes in float64."""

    def __init__(self, observation_space: spaces.Space) -> None:
        super().__init__(observation_space, features_dim=5)
        self.linear = nn.Linear(get_flattened_obs_dim(observation_space), 5, dtype=th.float64)

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return th.tanh(self.linear(observations.flatten(start_dim=1).double()))


class BatchNormDropoutExtractor(BaseFeaturesExtractor):
    """Batch normalisation and dropout of the flattened observation."""

    def __init__(self, observation_space: spaces.Space) -> None:
        super().__init__(observation_space, get_flattened_obs_dim(observation_space))
        self.batch_norm = nn.BatchNorm1d(self.features_dim)
        self.dropout = nn.Dropout(0.5)

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return self.dropout(self.batch_norm(observations.flatten(start_dim=1)))


def box_env(n_observations: int = 3) -> RandomEnv:
    """An environment of vectors with two actions."""
    return RandomEnv(spaces.Box(-1.0, 1.0, shape=(n_observations,), dtype=np.float32))


def image_env() -> RandomEnv:
    """An environment of small images, channel last."""
    return RandomEnv(spaces.Box(0, 255, shape=(36, 36, 1), dtype=np.uint8))


def dict_space(image: bool = False) -> spaces.Dict:
    """A Dict space, with an image (channel last, as environments give it) if asked for."""
    space = {
        "vector": spaces.Box(-1.0, 1.0, shape=(3,), dtype=np.float32),
        "discrete": spaces.Discrete(4),
    }
    if image:
        space["image"] = spaces.Box(0, 255, shape=(36, 36, 1), dtype=np.uint8)
    return spaces.Dict(space)


def small(model_class: type[SAC], env: Any, policy: Any = "MlpPolicy", **kwargs: Any) -> Any:
    """A model with small networks, without anything done yet."""
    return model_class(policy, env, **(SMALL | kwargs))


def filled(env: Any, policy: Any = "MlpPolicy", n_collected: int = 40, **kwargs: Any) -> SACV:
    """A small SACV whose buffer holds ``n_collected`` random transitions of each environment; it is not trained yet."""
    model = small(SACV, env, policy, **(dict(learning_starts=10**6) | kwargs))
    model.learn(n_collected * model.n_envs)
    assert model._n_updates == 0
    return model


def as_double(model: SACV) -> SACV:
    """Cast every parameter in place; the optimizers keep the same ones."""
    model.policy.double()
    if model.log_ent_coef is not None:
        model.log_ent_coef.data = model.log_ent_coef.data.double()
    else:
        model.ent_coef_tensor = model.ent_coef_tensor.double()
    return model


def record_samples(buffer: ReplayBuffer, dtype: th.dtype = th.float32) -> list[ReplayBufferSamples]:
    """
    Keep each sample of the buffer in the list that is returned. The buffer keeps its class, on which the way of sampling
    depends.

    :param dtype: of the tensors that the buffer gives from now on
    """
    recorded: list[ReplayBufferSamples] = []
    sample = buffer.sample

    def cast(field: Any) -> Any:
        if isinstance(field, dict):
            return {key: cast(tensor) for key, tensor in field.items()}
        return field.to(dtype) if isinstance(field, th.Tensor) and field.dtype == th.float32 else field

    def recording_sample(*args: Any, **kwargs: Any) -> ReplayBufferSamples:
        samples = sample(*args, **kwargs)
        recorded.append(type(samples)(*(cast(field) for field in samples)))
        return recorded[-1]

    buffer.sample = recording_sample
    return recorded


def split_samples(recorded: list[ReplayBufferSamples], batch_size: int, gamma: float) -> Iterator[Batch]:
    """The batches of single gradient steps in samples for one or several: every n-th row of a sample for n steps."""

    def rows(field: Any, index: int, n_steps: int) -> Any:
        if isinstance(field, dict):
            return {key: tensor[index::n_steps] for key, tensor in field.items()}
        return field[index::n_steps]

    for samples in recorded:
        n_steps, rest = divmod(len(samples.rewards), batch_size)
        assert rest == 0
        for index in range(n_steps):
            fields = [rows(field, index, n_steps) for field in samples[:5]]
            yield Batch(*fields, gamma if samples.discounts is None else rows(samples.discounts, index, n_steps))


def train(model: SACV, gradient_steps: int) -> dict[str, float]:
    """``model.train`` with the model's own batch size; gives what it logged."""
    if not hasattr(model, "_logger"):
        model.set_logger(Logger(folder=None, output_formats=[]))
    model.train(gradient_steps, model.batch_size)
    return dict(model.logger.name_to_value)


def everything(model: Any) -> dict[str, Any]:
    """Copies of all that training changes."""
    # State dicts are views of what is trained on
    state = copy.deepcopy(model.get_parameters())
    names = ("num_timesteps", "_n_updates", "_episode_num", "_current_progress_remaining", "target_entropy", "ent_coef")
    state |= {name: getattr(model, name) for name in names}
    state["alpha"] = (model.ent_coef_tensor if model.log_ent_coef is None else model.log_ent_coef).detach().clone()
    return state


def parameters_of(module: nn.Module) -> dict[str, th.Tensor]:
    """Copies of the module's parameters and buffers."""
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def assert_same(actual: Any, expected: Any, name: str = "") -> None:
    """Equal bit for bit, whatever the nesting."""
    if isinstance(expected, dict):
        assert set(actual) == set(expected), name
        for key in expected:
            assert_same(actual[key], expected[key], f"{name}.{key}")
    elif isinstance(expected, (list, tuple)):
        assert len(actual) == len(expected), name
        for index, item in enumerate(expected):
            assert_same(actual[index], item, f"{name}[{index}]")
    elif isinstance(expected, (th.Tensor, np.ndarray)):
        arrays = [np.asarray(item.detach().cpu() if isinstance(item, th.Tensor) else item) for item in (actual, expected)]
        assert np.array_equal(*arrays), name
    else:
        assert actual == expected, name


def assert_close(actual: dict[str, th.Tensor], expected: dict[str, th.Tensor], **tolerance: float) -> None:
    """Equal up to the tolerance (``atol`` and ``rtol``), entry by entry."""
    assert set(actual) == set(expected)
    for name in expected:
        th.testing.assert_close(actual[name], expected[name], msg=lambda text, name=name: f"{name}: {text}", **tolerance)


def differs(actual: dict[str, th.Tensor], before: dict[str, th.Tensor]) -> bool:
    """Whether any entry changed."""
    return any(not th.equal(actual[name], before[name]) for name in before)


def make_constant(network: nn.Sequential, constant: float) -> None:
    """Make the last layer of a network give one number whatever comes in."""
    with th.no_grad():
        network[-1].weight.zero_()
        network[-1].bias.fill_(constant)


def rng_state() -> tuple[Any, th.Tensor, list[th.Tensor]]:
    """The state of the global generators: numpy's (replay buffer) and torch's (actions, noise), that of each GPU too."""
    return np.random.get_state(), th.get_rng_state(), th.cuda.get_rng_state_all() if th.cuda.is_available() else []


def set_rng_state(state: tuple[Any, th.Tensor, list[th.Tensor]]) -> None:
    np.random.set_state(state[0])
    th.set_rng_state(state[1])
    if th.cuda.is_available():
        th.cuda.set_rng_state_all(state[2])


def seed_everything(seed: int) -> None:
    """Set the global generators, wherever they were."""
    np.random.set_state(np.random.RandomState(seed).get_state())
    th.manual_seed(seed)


def save_and_load(model: Any, path: Any, env: Any = None, **kwargs: Any) -> Any:
    """The model and its replay buffer after a trip to the disk. The global generators are where they were before."""
    state = rng_state()
    model.save(path)
    model.save_replay_buffer(f"{path}_buffer")
    loaded = type(model).load(path, env=env or model.get_env(), device=model.device, **kwargs)
    loaded.load_replay_buffer(f"{path}_buffer", truncate_last_traj=False)
    set_rng_state(state)
    return loaded
