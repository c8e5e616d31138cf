"""A number that is not finite stops the training at once, by name, with the last good state still in the model."""

import copy
import warnings
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from stable_baselines3 import HerReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_softvalue import SACV
from sb3_softvalue.execution.optimizers import OptimizerStep
from sb3_softvalue.guard import NonFiniteError
from sb3_softvalue.guard.errors import non_finite_names
from tests.helpers import PointGoalEnv, assert_same, box_env, filled, small, train

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
    """The model predicts, has nothing but finite transitions, can be saved, and goes on learning elsewhere."""
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
    assert_usable(model, tmp_path / "model")


def test_names_of_what_is_not_finite():
    """Found by sums first, which overflow for numbers that are finite, and in which two infinities could hide each other."""
    huge, number = th.full((8,), 3e38), th.ones(8)
    nan, both = th.tensor([1.0, th.nan]), th.tensor([th.inf, -th.inf, 1.0])
    assert non_finite_names([("a", huge), ("b", number), ("c", th.arange(3))]) == []
    assert non_finite_names([("a", huge), ("b", nan), ("c", both), ("d", th.tensor([th.inf]))]) == ["b", "c", "d"]
    assert non_finite_names([("a", th.tensor([th.inf])), ("b", th.tensor([-th.inf]))]) == ["a", "b"]
    assert non_finite_names([("a", th.ones(2, dtype=th.float64)), ("b", nan.half())]) == ["b"]
    assert non_finite_names([]) == []


def test_which_environment():
    env = DummyVecEnv([Faulty, lambda: Faulty("reward", np.nan, 7), Faulty])
    with pytest.raises(NonFiniteError, match="The reward of environment 1 is nan at step 21, as the environment gave it"):
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
    with pytest.raises(NonFiniteError, match="The observation of environment 0 is nan at step 0, as the episode begins"):
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
    message = r"critic_loss.* of update 4 is not finite: rewards of 8 of its 8 transitions were not .*The update was not made"
    with pytest.raises(NonFiniteError, match=message) as error:
        train(model, 2)
    assert error.value.quantity == "loss"
    assert_same(before, list(model.policy.state_dict().values()))
    assert model._n_updates == 3


def test_a_gradient_that_is_not_finite():
    """The loss is finite and its gradient is not: the square root at zero."""

    model = filled(box_env(), execution="eager")
    model.value.vf[0].register_forward_hook(lambda module, inputs, output: th.sqrt((output * 0.0).abs()))
    before = [tensor.clone() for tensor in model.policy.state_dict().values()]
    with pytest.raises(NonFiniteError, match="A gradient of update 1 is not finite: all of its batch was") as error:
        train(model, 1)
    assert error.value.quantity == "gradient"
    assert_same(before, list(model.policy.state_dict().values()))


def test_closed_step_changes_nothing():
    """What a GPU does without waiting: the optimizers' kernel is told on the device not to step."""
    model = filled(box_env(), execution="eager")
    train(model, 3)
    step = OptimizerStep([model.actor.optimizer, model.critic.optimizer, model.value.optimizer])
    before = copy.deepcopy(model.get_parameters())
    gradients = [th.full_like(param, th.nan) for param in step.params]
    step(gradients, None, th.ones(1))
    assert_same(model.get_parameters(), before)
    step(gradients, None, th.zeros(1))
    assert not th.isfinite(next(model.actor.parameters())).any()


class TestHints:
    """One warning each, with numbers and what to do."""

    def test_wide_actions(self):
        env = gym.wrappers.RescaleAction(gym.make("Pendulum-v1"), np.float32(-5000.0), np.float32(5000.0))
        with pytest.warns(UserWarning, match="An action reaches from -5000 to 5000.*RescaleAction"):
            pendulum(env)

    def test_large_rewards(self):
        env = gym.wrappers.TransformReward(gym.make("Pendulum-v1"), lambda reward: 1000.0 * reward)
        model = pendulum(env)
        with pytest.warns(UserWarning, match=r"Rewards of .* mean values near .*VecNormalize.*or reward_scale=") as given:
            model.learn(LEARNING_STARTS + 20)
        assert len(given) == 1

    def test_temperature(self):
        """The entropy that is asked for is more than the uniform policy has."""
        model = small(SACV, box_env(), target_entropy=50.0, ent_coef="auto_0.01", ent_coef_learning_rate=0.2)
        with pytest.warns(UserWarning, match=r"α has grown from 0.01 to .* target_entropy 50.*lower target_entropy") as given:
            model.learn(60)
        assert len(given) == 1

    def test_nothing_about_ordinary_tasks(self):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            pendulum().learn(60)


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
    assert np.isfinite(model.predict(np.zeros((2, 3), dtype=np.float32))[0]).all()


def test_put_back_with_the_temperature_and_without_moments():
    """What an explosion left can be trained on with a smaller learning rate."""
    model = pendulum(learning_rate=1e-3)
    model.learn(60)
    alpha = model.log_ent_coef.item()
    model._check_parameters()
    with th.no_grad():
        model.log_ent_coef.fill_(float("inf"))
        model.critic.optimizer.state[next(model.critic.parameters())]["exp_avg_sq"].fill_(float("inf"))
        next(model.actor.parameters()).fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="networks and α were put back"):
        model.learn(200, reset_num_timesteps=False)
    assert model.log_ent_coef.item() == pytest.approx(alpha, abs=0.1)
    model.learn(50, reset_num_timesteps=False)
    moments = [state["exp_avg_sq"] for state in model.critic.optimizer.state.values()]
    assert moments and all(th.isfinite(moment).all() for moment in moments)
    assert all(th.isfinite(parameter).all() for parameter in model.policy.parameters())


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_temperature_that_is_not_finite_is_named(value):
    model = pendulum()
    model.learn(60)
    with th.no_grad():
        model.log_ent_coef.fill_(value)
    with pytest.raises(NonFiniteError):
        model.learn(200, reset_num_timesteps=False)
    assert th.isfinite(model.log_ent_coef).all()


@pytest.mark.parametrize("step", [0, 1, 5])
def test_named_in_a_loaded_model_whose_buffer_is_empty(step, tmp_path):
    pendulum().learn(40).save(tmp_path / "model")
    model = SACV.load(tmp_path / "model", env=Faulty(reset=True) if step == 0 else nan_at(gym.make("Pendulum-v1"), step))
    with pytest.raises(NonFiniteError, match=f"at step {step}"):
        model.learn(100)
