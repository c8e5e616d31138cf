"""A number that is not finite stops the training at once, by name, before it is stored or learned from."""

import copy
import pickle
import warnings
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from stable_baselines3 import SAC, HerReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.torch_layers import CombinedExtractor, FlattenExtractor
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecNormalize

from sb3_softvalue import SACV
from sb3_softvalue.checks import hint_about_actions
from sb3_softvalue.execution import OptimizerStep, learned_params
from sb3_softvalue.finite import NonFiniteError
from tests.helpers import MODEL_LIST, PointGoalEnv, assert_same, box_env, filled, parameters_of, small, train

LEARNING_STARTS = 20


class Faulty(gym.Wrapper):
    """Pendulum whose observation or reward is what it is told to be at one step, counted from 1."""

    def __init__(self, quantity: str = "", value: float = 0.0, step: int = 0, reset: bool = False):
        super().__init__(gym.make("Pendulum-v1"))
        self.fault = (quantity, value, step)
        self.reset_fault = reset
        self.count = 0

    def reset(self, **kwargs: Any) -> Any:
        observation, info = super().reset(**kwargs)
        if self.reset_fault:
            observation[1] = np.nan
        return observation, info

    def step(self, action: Any) -> Any:
        observation, reward, terminated, truncated, info = super().step(action)
        self.count += 1
        quantity, value, step = self.fault
        if self.count == step and quantity == "reward":
            reward = value
        if self.count == step and quantity == "observation":
            observation = observation.copy()
            observation[self.count % 3] = value
        return observation, reward, terminated, truncated, info


class Breaking(BaseCallback):
    """Writes a value into one of the weights at one step."""

    def __init__(self, value: float, step: int, seed: int):
        super().__init__()
        self.value, self.step, self.rng = value, step, np.random.default_rng(seed)

    def _on_step(self) -> bool:
        if self.num_timesteps == self.step:
            policy: Any = self.model.policy
            weights = [*policy.actor.parameters(), *policy.critic.parameters(), *policy.value.parameters()]
            weight = weights[self.rng.integers(len(weights))]
            with th.no_grad():
                weight.view(-1)[self.rng.integers(weight.numel())] = self.value
        return True


def pendulum(env: Any = None, **kwargs: Any) -> SACV:
    """A small model on Pendulum-v1."""
    options = dict(learning_starts=LEARNING_STARTS, batch_size=16, policy_kwargs=dict(net_arch=[16]), seed=0, buffer_size=500)
    return SACV("MlpPolicy", Faulty() if env is None else env, **{**options, **kwargs})


def assert_usable(model: SACV, path: Any) -> None:
    """The model predicts, has nothing but finite transitions, can be saved, and learns elsewhere."""
    observation = np.array([[1.0, 0.0, 0.5], [0.0, -1.0, 3.0]], dtype=np.float32)
    for deterministic in (True, False):
        assert np.isfinite(model.predict(observation, deterministic=deterministic)[0]).all()
    assert np.isfinite(model.predict_values(observation)).all()
    buffer = model.replay_buffer
    assert all(np.isfinite(array).all() for array in (buffer.observations, buffer.next_observations, buffer.rewards))
    assert np.isfinite(buffer.actions).all()
    model.save(path)
    model.set_env(DummyVecEnv([Faulty]))
    model.learn(LEARNING_STARTS + 5, reset_num_timesteps=False)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("value", [np.nan, np.inf], ids=["nan", "inf"])
@pytest.mark.parametrize("quantity", ["observation", "reward", "action", "parameter"])
def test_injected(quantity, value, seed, tmp_path):
    """40 of 40: each is named at the step at which it appears, or within the train() call after it."""
    step = int(np.random.default_rng([seed, len(quantity)]).integers(LEARNING_STARTS + 10, 120))
    model = pendulum(Faulty(quantity, value, step))
    callback = Breaking(value, step, seed) if quantity == "parameter" else None
    if quantity == "action":
        predict = model.policy.predict

        def faulty(*args: Any, **kwargs: Any) -> Any:
            action, state = predict(*args, **kwargs)
            return (np.full_like(action, value) if model.num_timesteps == step - 1 else action), state

        model.policy.predict = faulty
    with pytest.raises(NonFiniteError) as error:
        model.learn(200, callback=callback)
    assert error.value.quantity == quantity
    text = str(error.value)
    # An action is seen before the step that it would have made
    assert f"at step {step - 1 if quantity == 'action' else step}" in text
    for part in ("temperature α", "largest |Q|", "largest |V|", "What usually helps"):
        assert part in text
    if quantity in ("observation", "reward"):
        assert f"environment 0 is {value}" in text
        assert model.replay_buffer.size() == step - 1
    if quantity == "action":
        del model.policy.predict
    if quantity != "parameter":
        assert_usable(model, tmp_path / "model")


def test_which_environment():
    env = DummyVecEnv([Faulty, lambda: Faulty("reward", np.nan, 7), Faulty])
    with pytest.raises(NonFiniteError, match="The reward of environment 1 is nan at step 21, as returned by the environment"):
        pendulum(env).learn(100)


def test_dict_observation_is_named():
    env = gym.wrappers.TransformObservation(
        Faulty("observation", np.inf, 3),
        lambda observation: {"joints": observation},
        gym.spaces.Dict({"joints": gym.make("Pendulum-v1").observation_space}),
    )
    with pytest.raises(NonFiniteError, match="The observation 'joints' of environment 0 is inf at step 3"):
        SACV("MultiInputPolicy", env, buffer_size=100, policy_kwargs=dict(net_arch=[8])).learn(10)


def test_first_observation():
    with pytest.raises(NonFiniteError, match="The observation of environment 0 is nan at step 0, at the start of the episode"):
        pendulum(Faulty(reset=True)).learn(10)


def test_statistics_of_vec_normalize_stay_good(tmp_path):
    """VecNormalize averages what it sees before anybody else sees it."""
    env = VecNormalize(DummyVecEnv([lambda: Faulty("observation", np.nan, 60)]))
    model = pendulum(env)
    with pytest.raises(NonFiniteError, match="observation"):
        model.learn(100)
    assert np.isfinite(env.obs_rms.mean).all() and np.isfinite(env.obs_rms.var).all() and np.isfinite(env.ret_rms.var)
    assert env.obs_rms.count == pytest.approx(60 + 1e-4)  # the first observation and 59 more


@pytest.mark.parametrize("execution", ["eager", "compiled"])
def test_a_batch_that_is_not_finite(execution):
    """A replay buffer from elsewhere: no step is made, and what was in the batch is said."""
    model = filled(box_env(), execution=execution)
    train(model, 3)
    model.replay_buffer.rewards[:] = np.nan
    before = [tensor.clone() for tensor in model.policy.state_dict().values()]
    message = (
        r"critic_loss.* of update 4 is not finite; largest in the last batch: .* dones 0, rewards nan.*The update was skipped"
    )
    with pytest.raises(NonFiniteError, match=message) as error:
        train(model, 2)
    assert error.value.quantity == "loss"
    assert_same(before, list(model.policy.state_dict().values()))
    assert model._n_updates == 3


def test_huge_observations_are_named():
    """The batch is finite and overflows on its way to the loss: its numbers show why."""
    model = filled(box_env(), execution="eager")
    for observations in (model.replay_buffer.observations, model.replay_buffer.next_observations):
        observations *= 1e30
    message = r"update 1 is not finite; largest in the last batch: observations 9\.\d+e\+29, .* rewards \d\.\d+,"
    with pytest.raises(NonFiniteError, match=message):
        train(model, 1)


def test_a_gradient_that_is_not_finite():
    """The loss is finite and its gradient is not: the square root at zero."""

    model = filled(box_env(), execution="eager")
    model.value.vf[0].register_forward_hook(lambda module, inputs, output: th.sqrt((output * 0.0).abs()))
    before = [tensor.clone() for tensor in model.policy.state_dict().values()]
    with pytest.raises(
        NonFiniteError, match="A gradient of update 1 is not finite; largest in the last batch: observations 0"
    ) as error:
        train(model, 1)
    assert error.value.quantity == "gradient"
    assert_same(before, list(model.policy.state_dict().values()))


def test_one_entry_of_one_gradient(monkeypatch):
    """In a network without biases nothing else shows it."""
    model = filled(box_env(), execution="eager")
    for layer in (*model.value.vf, *model.critic.qf0):
        if isinstance(layer, th.nn.Linear):
            layer.bias = None
    weight = model.value.vf[0].weight
    weight.register_hook(lambda gradient: gradient.index_put((th.tensor([1]), th.tensor([2])), th.tensor(th.nan)))
    before = parameters_of(model.policy)
    with pytest.raises(NonFiniteError, match="A gradient of update 1 is not finite"):
        train(model, 1)
    assert_same(parameters_of(model.policy), before)


def test_skipped_step_changes_nothing():
    """What a GPU does without waiting: the optimizers' kernel is told on the device not to step."""
    model = filled(box_env(), execution="eager")
    train(model, 3)
    optimizers = [model.actor.optimizer, model.critic.optimizer, model.value.optimizer]
    params = [learned_params(optimizer) for optimizer in optimizers]
    before = copy.deepcopy(model.get_parameters())
    gradients = [th.full_like(param, th.nan) for own in params for param in own]
    step = OptimizerStep()
    step(optimizers, params, gradients, None, th.ones(()))
    assert_same(model.get_parameters(), before)
    step(optimizers, params, gradients, None, th.zeros(()))
    assert not th.isfinite(next(model.actor.parameters())).any()


class Given(gym.Env):
    """Gives what it is told to as observation and reward."""

    action_space = gym.spaces.Box(-1, 1, (1,))

    def __init__(self, observation: Any, space: gym.Space, reward: Any = 1.0, last: Any = None, steps: int = 5):
        self.observation_space = space
        self.observation, self.reward = observation, reward
        self.last = observation if last is None else last
        self.steps = steps

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.count = 0
        return self.observation, {}

    def step(self, action: Any) -> Any:
        self.count += 1
        done = self.count >= self.steps
        return (self.last if done else self.observation), self.reward, done, False, {}


PAIR = gym.spaces.Box(-1, 1, (2,))
DOUBLES = gym.spaces.Box(-np.inf, np.inf, (2,), np.float64)


@pytest.mark.parametrize(
    "model_class, vectorized",
    [(SAC, DummyVecEnv), (SACV, DummyVecEnv), (SACV, SubprocVecEnv)],
    ids=["SAC", "SACV", "SACV-SubprocVecEnv"],
)
@pytest.mark.parametrize(
    "observation, space",
    [
        ([0.1, 0.2], PAIR),
        ((0.1, 0.2), PAIR),
        (1, gym.spaces.Discrete(3)),
        ([1, 0], gym.spaces.MultiBinary(2)),
        ({"a": [0.1, 0.2], "b": 2}, gym.spaces.Dict({"a": PAIR, "b": gym.spaces.Discrete(3)})),
    ],
    ids=str,
)
def test_whatever_sb3_stores_is_stored(model_class, observation, space, vectorized):
    """Lists, tuples and numbers as observations, with integers as rewards."""
    env = vectorized([lambda: Given(observation, space, reward=1)])
    policy = "MultiInputPolicy" if isinstance(space, gym.spaces.Dict) else "MlpPolicy"
    model = small(model_class, env, policy).learn(20)
    assert model.replay_buffer.size() == 20
    env.close()


@pytest.mark.parametrize(
    "fault, what",
    [
        (dict(reward=1e39), "The reward of environment 0 is inf at step 1"),
        (dict(reward=None), "The reward of environment 0 is nan at step 1"),
        (dict(last=np.array([0.0, 1e39])), "The observation of environment 0 is inf at step 5, at the end of the episode"),
    ],
    ids=str,
)
@pytest.mark.parametrize("vectorized", [DummyVecEnv, SubprocVecEnv])
def test_what_overflows_in_float32(fault, what, vectorized):
    env = vectorized([lambda: Given(np.zeros(2), DOUBLES, **fault)])
    model = small(SACV, env)
    with pytest.raises(NonFiniteError, match=what), np.errstate(over="ignore"):
        model.learn(20)
    env.close()


@pytest.mark.parametrize("keyed", [False, True])
def test_fault_among_the_environments_that_ended(keyed):
    """The first environment is in its episode and the second ended well: the third is named."""

    def given(steps: int, last: float) -> Given:
        observation, last_observation = np.zeros(2), np.array([0.5, last])
        if not keyed:
            return Given(observation, PAIR, last=last_observation, steps=steps)
        return Given({"a": observation}, gym.spaces.Dict(a=PAIR), last={"a": last_observation}, steps=steps)

    env = DummyVecEnv([lambda: given(50, 0.5), lambda: given(5, 0.5), lambda: given(5, np.nan)])
    model = small(SACV, env, "MultiInputPolicy" if keyed else "MlpPolicy")
    name = "observation 'a'" if keyed else "observation"
    with pytest.raises(NonFiniteError, match=f"The {name} of environment 2 is nan at step 15, at the end of the episode"):
        model.learn(30)


class NanToNum(FlattenExtractor):
    """Makes zeros of what is missing."""

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return th.nan_to_num(super().forward(observations))


@pytest.mark.parametrize("model_class", MODEL_LIST)
def test_nan_that_the_networks_handle_is_no_fault(model_class):
    kwargs = dict(policy_kwargs=dict(net_arch=[8], features_extractor_class=NanToNum))
    model = small(model_class, Given(np.array([np.nan, 0.5]), PAIR), **kwargs).learn(30)
    assert np.isnan(model.replay_buffer.observations[:30, 0, 0]).all()
    assert all(th.isfinite(parameter).all() for parameter in model.policy.parameters())


VECTORIZED: dict[str, Any] = {
    "rewards only": dict(norm_obs=False),
    "frozen": dict(training=False),
    "another key": dict(norm_obs_keys=["b"]),
}


class NanToNumOfDict(CombinedExtractor):
    """Makes zeros of what is missing."""

    def forward(self, observations: dict[str, th.Tensor]) -> th.Tensor:
        return th.nan_to_num(super().forward(observations))


@pytest.mark.parametrize("kwargs", VECTORIZED.values(), ids=VECTORIZED)
@pytest.mark.parametrize("model_class", MODEL_LIST)
def test_nan_that_does_not_reach_the_statistics_is_no_fault(model_class, kwargs):
    observation, space, policy, extractor = np.array([np.nan, 0.5]), PAIR, "MlpPolicy", NanToNum
    if "norm_obs_keys" in kwargs:
        observation, space = dict(a=observation, b=np.ones(2)), gym.spaces.Dict(a=PAIR, b=PAIR)
        policy, extractor = "MultiInputPolicy", NanToNumOfDict
    env = VecNormalize(DummyVecEnv([lambda: Given(observation, space)]), **kwargs)
    model = small(model_class, env, policy, policy_kwargs=dict(net_arch=[8], features_extractor_class=extractor)).learn(30)
    assert model._n_updates == 20
    assert all(th.isfinite(parameter).all() for parameter in model.policy.parameters())


def test_nan_in_the_statistics_of_one_key_is_a_fault():
    given = Given(dict(a=np.array([np.nan, 0.5]), b=np.array([0.5, np.nan])), gym.spaces.Dict(a=PAIR, b=PAIR))
    env = VecNormalize(DummyVecEnv([lambda: given]), norm_obs_keys=["b"])
    kwargs = dict(policy_kwargs=dict(net_arch=[8], features_extractor_class=NanToNumOfDict))
    with pytest.raises(NonFiniteError, match="The observation 'b' of environment 0 is nan"):
        small(SACV, env, "MultiInputPolicy", **kwargs).learn(30)


@pytest.mark.parametrize("model_class", MODEL_LIST)
def test_nan_that_the_networks_handle_in_a_later_environment(model_class):
    """Which is not VecNormalize's, as the first is."""
    kwargs = dict(policy_kwargs=dict(net_arch=[8], features_extractor_class=NanToNum))
    model = small(model_class, VecNormalize(DummyVecEnv([lambda: Given(np.ones(2), PAIR)])), **kwargs).learn(20)
    model.set_env(DummyVecEnv([lambda: Given(np.array([np.nan, 0.5]), PAIR)]))
    assert model.learn(20)._n_updates == 20


class TestWhateverElseFails:
    """The number that is not finite is what is named."""

    def test_no_temperature(self):
        model = small(SACV, nan_at(gym.make("Pendulum-v1"), 5))
        model.target_entropy = None
        with pytest.raises(NonFiniteError, match=r"in float32 \(update 0\)\. It was not stored"):
            model.learn(30)

    def test_state_that_is_no_tensor(self):
        model = filled(box_env())
        model.actor.get_extra_state, model.actor.set_extra_state = lambda: "mine", lambda _: None
        with th.no_grad():
            model.actor.mu.bias[0] = th.nan
        model.learning_starts = 0
        with pytest.raises(NonFiniteError, match=r"The parameters actor\.mu\.bias are not finite"):
            model.learn(30)

    def test_an_error_of_the_environment_stays_itself(self):
        def fails(reward: float) -> float:
            raise ValueError("mine")

        model = small(SACV, gym.wrappers.TransformReward(gym.make("Pendulum-v1"), fails))
        model.actor.get_action_dist_params = None
        with pytest.raises(ValueError, match=r"^mine$"):
            model.learn(30)


def test_state_of_the_training():
    state = r"in float32 \(update 0, temperature α 1, largest \|Q\| {0} and largest \|V\| {0} at the last observation\)\. It"
    with pytest.raises(NonFiniteError, match=state.format(r"[\d.]+")) as error:
        pendulum(Faulty("reward", np.inf, 3)).learn(10)
    copied = pickle.loads(pickle.dumps(error.value))
    assert (str(copied), copied.quantity) == (str(error.value), "reward")
    with pytest.raises(NonFiniteError, match=f"at the start of the episode, {state.format('nan')}"):
        pendulum(Faulty(reset=True)).learn(10)


@pytest.mark.parametrize("model_class", MODEL_LIST)
def test_nan_in_the_last_observation_that_the_networks_handle(model_class):
    """Which VecNormalize does not average."""
    env = VecNormalize(DummyVecEnv([lambda: Given(np.ones(2), PAIR, last=np.array([np.nan, 0.5]))]))
    kwargs = dict(policy_kwargs=dict(net_arch=[8], features_extractor_class=NanToNum))
    assert small(model_class, env, **kwargs).learn(30)._n_updates == 20


def test_switched_off():
    model = pendulum(Faulty("reward", np.nan, 15), check_finite=False).learn(18)
    assert np.isnan(model.replay_buffer.rewards[14, 0])


class TestHints:
    """One warning each, with numbers and what to do."""

    def test_wide_actions(self):
        env = gym.wrappers.RescaleAction(gym.make("Pendulum-v1"), np.float32(-5000.0), np.float32(5000.0))
        with pytest.warns(UserWarning, match="An action ranges from -5000 to 5000.*RescaleAction"):
            pendulum(env)

    @pytest.mark.parametrize("bound, is_wide", [(99.0, False), (100.0, True)])
    def test_isaac_labs_default_bounds_are_wide(self, bound, is_wide):
        hint = hint_about_actions(gym.spaces.Box(-bound, bound, (7,)))
        assert (hint or "").startswith("An action ranges from -100 to 100") == is_wide

    def test_large_rewards(self):
        env = gym.wrappers.TransformReward(gym.make("Pendulum-v1"), lambda reward: 1000.0 * reward)
        model = pendulum(env)
        with pytest.warns(
            UserWarning, match=r"Rewards average .* values reach about .*VecNormalize.*or reward_scale="
        ) as given:
            model.learn(LEARNING_STARTS + 20)
        assert len(given) == 1

    def test_large_rewards_without_a_discount(self):
        """No reward scale helps where the sum of the rewards is not bounded."""
        with pytest.warns(UserWarning, match=r"use VecNormalize \(norm_reward=True\)\."):
            pendulum(gamma=1.0).learn(LEARNING_STARTS + 5)

    def test_temperature(self):
        """The entropy that is asked for is more than the uniform policy has."""
        model = small(SACV, box_env(), target_entropy=50.0, ent_coef="auto_0.01", ent_coef_learning_rate=0.2)
        with pytest.warns(
            UserWarning, match=r"α has grown from 0.01 to .* target_entropy is 50.*Lower target_entropy"
        ) as given:
            model.learn(60)
        assert len(given) == 1

    def test_nothing_about_ordinary_tasks(self):
        with warnings.catch_warnings(record=True) as given:
            warnings.simplefilter("always")
            pendulum().learn(60)
        assert [str(warning.message) for warning in given] == []

    def test_warnings_that_are_errors(self, capsys):
        """What works with SAC works: the hint is printed instead."""
        env = gym.wrappers.RescaleAction(gym.make("Pendulum-v1"), np.float32(-5000.0), np.float32(5000.0))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert pendulum(env).learn(25).num_timesteps == 25
        assert capsys.readouterr().err.count("An action ranges from -5000 to 5000") == 1


def nan_at(env: gym.Env, step: int) -> DummyVecEnv:
    """The environment with one reward that is NaN, at a step counted from 1."""
    count = iter(range(1, 10_000))
    return DummyVecEnv([lambda: gym.wrappers.TransformReward(env, lambda r: np.nan if next(count) == step else r)])


@pytest.mark.parametrize("name", ["n-step", "memory-optimized", "HER"])
def test_what_comes_after_is_another_episode(name):
    """Neither n-step returns nor goals of HER nor next observations reach from the abandoned episode into the next."""
    options: dict[str, Any] = {
        "n-step": dict(n_steps=3),
        "memory-optimized": dict(optimize_memory_usage=True, replay_buffer_kwargs=dict(handle_timeout_termination=False)),
        "HER": dict(replay_buffer_class=HerReplayBuffer),
    }[name]
    goals = name == "HER"
    env = nan_at(PointGoalEnv() if goals else gym.make("Pendulum-v1"), 55)
    if goals:
        kwargs: Any = dict(learning_starts=LEARNING_STARTS, batch_size=16, policy_kwargs=dict(net_arch=[16]), buffer_size=500)
        model = SACV("MultiInputPolicy", env, **kwargs, **options)
    else:
        model = pendulum(env, **options)
    with pytest.raises(NonFiniteError):
        model.learn(100)
    model.learn(20, reset_num_timesteps=False)
    buffer = model.replay_buffer
    if goals:
        # Episodes of ten steps, the sixth of which was given up after four
        assert (buffer.ep_start[50:54] == 50).all() and (buffer.ep_length[50:54] == 4).all()
        assert (buffer.ep_start[54:64] == 54).all() and (buffer.ep_length[54:64] == 10).all()
    else:
        assert np.flatnonzero(buffer.dones + buffer.timeouts).tolist() == [53]


@pytest.mark.parametrize("use_sde", [False, True])
@pytest.mark.parametrize("learning_rate", [1e3, 1e10, 1e30])
def test_a_policy_that_is_not_finite_with_parameters_that_are(learning_rate, use_sde):
    model = pendulum(learning_rate=learning_rate, use_sde=use_sde)
    with pytest.raises(NonFiniteError, match=r"What usually helps: .*lower learning_rate"):
        model.learn(100)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_temperature_that_is_not_finite_is_named(value):
    model = pendulum()
    model.learn(60)
    with th.no_grad():
        model.log_ent_coef.fill_(value)
    with pytest.raises(NonFiniteError, match="The parameters log_ent_coef are not finite"):
        model.learn(200, reset_num_timesteps=False)


@pytest.mark.parametrize("step", [0, 1, 5])
def test_named_in_a_loaded_model_whose_buffer_is_empty(step, tmp_path):
    pendulum().learn(40).save(tmp_path / "model")
    model = SACV.load(tmp_path / "model", env=Faulty(reset=True) if step == 0 else nan_at(gym.make("Pendulum-v1"), step))
    with pytest.raises(NonFiniteError, match=f"at step {step}"):
        model.learn(100)
