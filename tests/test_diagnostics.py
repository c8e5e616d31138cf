"""Diagnostics: the soft returns collected, V against them, and the file they are kept in."""

import copy
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import SAC, HerReplayBuffer
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import BitFlippingEnv, FakeImageEnv
from stable_baselines3.common.logger import configure
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_softvalue import SACV, diagnostics
from sb3_softvalue.diagnostics import (
    Calibration,
    Recording,
    SoftValueDiagnostics,
    calibration_line,
    evaluate_values,
    landscape,
    read_states,
    soft_returns,
)

SMALL = {"policy_kwargs": {"net_arch": [8]}, "buffer_size": 1000, "device": "cpu"}


class Chain(gym.Env):
    """Walks through ``length`` states whatever one does; reward 1, 2, 3, ...; ends by termination or by time limit."""

    metadata: ClassVar[dict[str, Any]] = {"render_modes": []}

    def __init__(self, length: int = 5, truncate: bool = False):
        self.observation_space = spaces.Box(0.0, 10.0, (2,), np.float32)
        self.action_space = spaces.Box(-2.0, 2.0, (1,), np.float32)
        self.length, self.truncate = length, truncate

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.step_count = 0
        return self.observe(0), {}

    @staticmethod
    def observe(step: int) -> np.ndarray:
        return np.array([step, 1.0], dtype=np.float32)

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.step_count += 1
        done = self.step_count == self.length
        return self.observe(self.step_count), float(self.step_count), done and not self.truncate, done and self.truncate, {}


class DictChain(Chain):
    """The same with a dict of observations."""

    def __init__(self, length: int = 5, truncate: bool = False):
        super().__init__(length, truncate)
        self.observation_space = spaces.Dict(step=spaces.Box(0.0, 10.0, (1,)), one=spaces.Box(0.0, 1.0, (1,)))

    @staticmethod
    def observe(step: int) -> Any:
        return {"step": np.array([step], dtype=np.float32), "one": np.ones(1, dtype=np.float32)}


class Bandit(gym.Env):
    """One step, reward 2x - a² where x is seen and a the action: its optimal soft value is known in closed form."""

    metadata: ClassVar[dict[str, Any]] = {"render_modes": []}

    def __init__(self) -> None:
        self.observation_space = spaces.Box(-1.0, 1.0, (1,), np.float32)
        self.action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.x = self.np_random.uniform(-1.0, 1.0, 1).astype(np.float32)
        return self.x, {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        return self.x, float(2.0 * self.x[0] - action[0] ** 2), True, False, {}


def chain_values(model: SACV, chain: Chain, reward_scale: float = 1.0) -> np.ndarray:
    """Soft value of each state of the chain by brute force, with the entropy from very many samples and 0 at the end."""
    entropies = model.entropy(np.stack([chain.observe(step) for step in range(chain.length)]), n_samples=50_000)
    ent_coef = diagnostics.temperature(model)
    values = [0.0]
    for step in reversed(range(chain.length)):
        values.insert(0, reward_scale * (step + 1) + ent_coef * float(entropies[step]) + model.gamma * values[0])
    return np.array(values)


def set_values(model: SACV, values: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make V(s) of the chain a table."""
    table = th.as_tensor(values, dtype=th.float32)
    monkeypatch.setattr(model.policy.value, "forward", lambda obs: table[obs[:, :1].long()])


def test_soft_returns_by_hand() -> None:
    # From the back: 3 + 2·1 + 0.5·10 = 10, 2 + 0 + 5 = 7, 1 + 2·0.5 + 3.5 = 5.5
    returns = soft_returns(np.array([1.0, 2.0, 3.0]), np.array([0.5, 0.0, 1.0]), ent_coef=2.0, gamma=0.5, final_value=10.0)
    assert returns.tolist() == [5.5, 7.0, 10.0]


def test_calibration_line_by_hand() -> None:
    values = np.array([0.0, 1.0, 2.0])
    assert calibration_line(values, np.array([1.0, 1.5, 2.0])) == pytest.approx((0.5, -0.5))
    slope, bias = calibration_line(np.ones(3), values)
    assert np.isnan(slope) and bias == 0.0


def test_slope_is_one_for_a_perfect_value_and_noisy_returns() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=20_000)
    slope, bias = calibration_line(values, values + 3.0 * rng.normal(size=20_000))
    assert slope == pytest.approx(1.0, abs=0.07) and bias == pytest.approx(0.0, abs=0.07)


def test_bias_error_counts_episodes_not_states() -> None:
    def calibration(n_states: int) -> Calibration:
        errors = np.repeat([1.0, 3.0], n_states)
        zeros = np.zeros(2 * n_states)
        return Calibration(errors, zeros, zeros, np.repeat([0, 1], n_states), np.zeros(2))

    # Two independent numbers 1 and 3: standard deviation √2, standard error 1, however many states repeat them
    assert calibration(1).bias_error == pytest.approx(1.0)
    assert calibration(10).bias_error == pytest.approx(1.0)
    assert calibration(10).bias == pytest.approx(2.0)


@pytest.mark.parametrize("ent_coef", ["auto_0.3", 0.7])
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_evaluate_values_against_brute_force(ent_coef: str | float, scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    chain = Chain(length=6)
    model = SACV("MlpPolicy", chain, ent_coef=ent_coef, gamma=0.9, seed=0, reward_scale=scale, **SMALL)
    values = chain_values(model, chain, scale)
    set_values(model, values, monkeypatch)
    result = evaluate_values(model, chain, n_episodes=3, n_samples=2000)
    np.testing.assert_allclose(result.collected, np.tile(values[:-1], 3), atol=0.05)
    assert result.slope == pytest.approx(1.0, abs=0.01) and result.bias == pytest.approx(0.0, abs=0.03)
    assert result.bootstrapped == 0.0 and result.returns.tolist() == [21.0] * 3

    set_values(model, 2.0 * values + 1.0, monkeypatch)
    result = evaluate_values(model, chain, n_episodes=1, n_samples=2000)
    assert result.slope == pytest.approx(0.5, abs=0.01) and result.bias == pytest.approx(values[:-1].mean() + 1.0, abs=0.05)
    assert f"slope {result.slope:.2f}" in str(result)


def test_truncated_tail_is_bootstrapped_with_v(monkeypatch: pytest.MonkeyPatch) -> None:
    chain = Chain(length=4, truncate=True)
    model = SACV("MlpPolicy", chain, ent_coef=0.0, gamma=0.5, seed=0, **SMALL)
    set_values(model, np.array([0.0, 0.0, 0.0, 0.0, 8.0]), monkeypatch)
    result = evaluate_values(model, chain, n_episodes=1)
    # 4 + 8/2, 3 + 8/2, 2 + 7/2, 1 + 5.5/2
    np.testing.assert_allclose(result.collected, [3.75, 5.5, 7.0, 8.0])
    np.testing.assert_allclose(result.tail_weights, [1 / 16, 1 / 8, 1 / 4, 1 / 2])


def test_a_constant_error_shows_less_the_more_is_bootstrapped(monkeypatch: pytest.MonkeyPatch) -> None:
    chain = Chain(length=4, truncate=True)
    model = SACV("MlpPolicy", chain, ent_coef=0.0, gamma=0.5, seed=0, **SMALL)
    true_values = np.array([3.75, 5.5, 7.0, 8.0, 8.0])
    set_values(model, true_values + 2.0, monkeypatch)
    result = evaluate_values(model, chain, n_episodes=1)
    assert result.bias == pytest.approx(2.0 * (1.0 - result.bootstrapped))


def test_learned_value_against_the_closed_form() -> None:
    ent_coef = 0.5
    model = SACV(
        "MlpPolicy",
        make_vec_env(Bandit, n_envs=8, seed=0),
        learning_rate=5e-3,
        ent_coef=ent_coef,
        train_freq=1,
        gradient_steps=2,
        policy_kwargs={"net_arch": [32]},
        seed=0,
        device="cpu",
    )
    model.learn(2400)
    result = evaluate_values(model, make_vec_env(Bandit, n_envs=4), n_episodes=400, n_samples=64)
    # α·log ∫ exp((2x - a²)/α) da over [-1, 1] (Eq. 3 at the optimum); the integral as a fine sum
    actions = np.linspace(-1.0, 1.0, 10_001)
    constant = ent_coef * np.log(2.0 * np.mean(np.exp(-(actions**2) / ent_coef)))
    x = np.linspace(-0.9, 0.9, 7, dtype=np.float32)[:, None]
    np.testing.assert_allclose(model.predict_values(x), 2.0 * x[:, 0] + constant, atol=0.1)
    assert result.slope == pytest.approx(1.0, abs=0.05) and result.bias == pytest.approx(0.0, abs=0.05)
    assert len(result.returns) == 400


def test_prior_enters_the_bonus_and_the_q_side() -> None:
    obs = np.linspace(-1.0, 1.0, 5, dtype=np.float32)[:, None]
    uniform = SACV("MlpPolicy", Bandit(), ent_coef=0.5, seed=0, **SMALL)
    normal = SACV("MlpPolicy", Bandit(), ent_coef=0.5, seed=0, action_prior="normal", **SMALL)
    plain, prior = (read_states(model, obs, n_samples=500) for model in (uniform, normal))
    np.testing.assert_allclose(plain.entropies, uniform.entropy(obs, n_samples=20_000), atol=0.1)
    np.testing.assert_allclose(plain.bonuses, plain.entropies)
    np.testing.assert_allclose(prior.entropies, plain.entropies)
    # E[log N(a; 0, 1)] lies between its values at |a| = 1 and at 0
    log_prior = prior.bonuses - prior.entropies
    assert np.all(log_prior < -0.5 * np.log(2 * np.pi)) and np.all(log_prior > -0.5 * np.log(2 * np.pi) - 0.5)
    np.testing.assert_allclose(prior.soft_q_values - plain.soft_q_values, 0.5 * log_prior, atol=1e-5)
    # The constant of a uniform density over [-1, 1]: ln 2 = 0.6931471806
    model = SACV("MlpPolicy", Bandit(), ent_coef=0.5, seed=0, action_prior="normalized_uniform", **SMALL)
    normalized = read_states(model, obs, n_samples=500)
    np.testing.assert_allclose(normalized.bonuses - plain.bonuses, -0.6931471806, atol=1e-6)
    np.testing.assert_allclose(normalized.soft_q_values - plain.soft_q_values, -0.3465735903, atol=1e-6)


def test_chunks_change_nothing_but_the_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    obs = np.linspace(-1.0, 1.0, 50, dtype=np.float32)[:, None]
    model = SACV("MlpPolicy", Bandit(), seed=0, **SMALL)
    whole = read_states(model, obs)
    monkeypatch.setattr("sb3_softvalue.diagnostics.state_statistics._CHUNK_BYTES", 7 * 4 * 4)
    parts = read_states(model, obs)
    np.testing.assert_allclose(parts.values, whole.values, rtol=1e-6)
    assert parts.entropies.shape == (50,)


def test_reading_has_its_own_random_numbers() -> None:
    model = SACV("MlpPolicy", Bandit(), seed=0, **SMALL)
    state = th.get_rng_state()
    first = evaluate_values(model, Bandit(), n_episodes=4, seed=3)
    second = evaluate_values(model, Bandit(), n_episodes=4, seed=3)
    assert th.equal(state, th.get_rng_state())
    np.testing.assert_array_equal(first.collected, second.collected)


def test_training_is_the_same_with_diagnostics(tmp_path: Any) -> None:
    def weights(callback: SoftValueDiagnostics | None) -> list[th.Tensor]:
        model = SACV("MlpPolicy", Chain(), learning_starts=10, batch_size=16, seed=1, **SMALL)
        model.learn(60, callback=callback)
        return list(model.policy.state_dict().values())

    for ours, theirs in zip(weights(SoftValueDiagnostics(tmp_path)), weights(None), strict=True):
        assert th.equal(ours, theirs)


def test_recording_of_several_envs(tmp_path: Any) -> None:
    env = DummyVecEnv([lambda length=length: Chain(length, truncate=length == 3) for length in (2, 3, 4)])
    model = SACV("MlpPolicy", env, learning_starts=1000, ent_coef=0.0, gamma=1.0, seed=0, **SMALL)
    callback = SoftValueDiagnostics(tmp_path)
    model.learn(36, callback=callback)
    episodes = Recording.load(tmp_path).episodes
    # 12 steps of each environment: 6 episodes of 2 steps, 4 of 3 steps, 3 of 4 steps
    for index, (length, n_episodes) in enumerate(((2, 6), (3, 4), (4, 3))):
        rows = episodes["env"] == index
        assert rows.sum() == n_episodes
        assert np.all(episodes["length"][rows] == length)
        assert np.all(episodes["return"][rows] == length * (length + 1) / 2)
        assert np.all(episodes["terminated"][rows] == (length != 3))
        assert np.all(episodes["bootstrapped"][rows] == (1.0 if length == 3 else 0.0))
        assert np.all(episodes["action_counts"][rows].sum(axis=2) == length)
    assert np.all(np.diff(episodes["timesteps"]) >= 0) and episodes["timesteps"][-1] == 36
    # The whole run was warm-up: V cannot be compared with returns of random actions
    assert np.all(np.isnan(episodes["value_bias"]))


@pytest.mark.parametrize("truncate", [False, True])
def test_recorded_soft_returns_are_those_of_the_networks(tmp_path: Any, truncate: bool) -> None:
    chain = Chain(length=5, truncate=truncate)
    model = SACV("MlpPolicy", chain, learning_starts=0, gradient_steps=0, ent_coef=0.4, gamma=0.9, seed=0, **SMALL)
    model.learn(10, callback=SoftValueDiagnostics(tmp_path, n_samples=5000))
    recording = Recording.load(tmp_path)
    states = recording.states
    last = float(model.predict_values(chain.observe(5))) if truncate else 0.0
    expected = chain_values(model, chain) + last * 0.9 ** np.arange(5, -1, -1)
    np.testing.assert_allclose(states["soft_return"], np.tile(expected[:-1], 2), atol=0.03)
    values = model.predict_values(states["observation"])
    np.testing.assert_allclose(states["value"], values, rtol=1e-5)
    np.testing.assert_allclose(states["target_value"], values, rtol=1e-5)
    assert states["step"].tolist() == [0, 1, 2, 3, 4] * 2 and states["episode"].tolist() == [0] * 5 + [1] * 5
    row = {name: column[-1] for name, column in recording.episodes.items()}
    assert row["value_bias"] == pytest.approx(float(np.mean(values[:5] - states["soft_return"][:5])), abs=0.03)
    assert row["value_gap"] == pytest.approx(float(np.mean(values[:5] - states["soft_q_value"][:5])), abs=0.03)
    assert row["target_lag"] == 0.0 and row["ent_coef"] == pytest.approx(0.4)
    assert row["entropy"] == pytest.approx(float(model.entropy(states["observation"][:5], 20_000).mean()), abs=0.03)


def test_vec_normalize(tmp_path: Any) -> None:
    env = VecNormalize(DummyVecEnv([lambda: Chain(length=5, truncate=True)]), gamma=0.9)
    model = SACV("MlpPolicy", env, learning_starts=0, gradient_steps=0, ent_coef=0.0, gamma=0.9, seed=0, **SMALL)
    model.learn(40, callback=SoftValueDiagnostics(tmp_path))
    recording = Recording.load(tmp_path)
    assert np.all(recording.episodes["return"] == 15.0)
    # The statistics have not changed since the end of the last episode
    last = recording.states["episode"] == 7
    observations = recording.states["observation"][last]
    np.testing.assert_array_equal(observations[:, 0], np.arange(5))
    values = model.predict_values(env.normalize_obs(observations))
    np.testing.assert_allclose(recording.states["value"][last], values, rtol=1e-4)
    following = float(model.predict_values(env.normalize_obs(Chain.observe(5))))
    for step in reversed(range(5)):
        following = float(env.normalize_reward(np.array(step + 1.0))) + 0.9 * following
        assert recording.states["soft_return"][last][step] == pytest.approx(following, rel=1e-4)

    statistics = copy.deepcopy(env.obs_rms)
    result = evaluate_values(model, env, n_episodes=2)
    np.testing.assert_allclose(result.values, np.tile(values, 2), rtol=1e-4)
    assert result.collected[0] == pytest.approx(following, rel=1e-4)
    assert result.returns.tolist() == [15.0, 15.0]
    assert env.training and np.array_equal(env.obs_rms.mean, statistics.mean)  # left as they were


def test_reward_scale_schedule() -> None:
    model = SACV("MlpPolicy", Chain(), seed=0, reward_scale=lambda progress: 1.0 + progress, **SMALL)
    assert diagnostics.reward_scale(model) == 2.0
    model._current_progress_remaining = 0.5
    assert diagnostics.reward_scale(model) == 1.5


def test_file_round_trip_without_pickle(tmp_path: Any) -> None:
    model = SACV("MlpPolicy", Chain(), learning_starts=5, batch_size=4, seed=0, **SMALL)
    callback = SoftValueDiagnostics(tmp_path)
    model.learn(30, callback=callback)
    written, read = callback.recording(), Recording.load(tmp_path)
    assert read.info == written.info and read.info["action_high"] == [2.0] and read.info["gamma"] == 0.99
    for group in ("episodes", "states", "landscape"):
        ours, theirs = getattr(written, group), getattr(read, group)
        assert ours.keys() == theirs.keys() and ours
        for name, array in ours.items():
            np.testing.assert_array_equal(array, theirs[name])
    with np.load(tmp_path / "diagnostics.npz", allow_pickle=False) as arrays:
        assert all(arrays[name].dtype != object for name in arrays.files)

    calibration = evaluate_values(model, Chain(), n_episodes=2)
    calibration.save(tmp_path)
    assert str(Calibration.load(tmp_path)) == str(calibration)
    pooled = Calibration.pool([calibration, calibration])
    assert pooled.bias == pytest.approx(calibration.bias) and len(np.unique(pooled.episodes)) == 4


def test_a_new_run_does_not_keep_the_calibration_of_an_earlier_one(tmp_path: Any) -> None:
    model = SACV("MlpPolicy", Chain(), learning_starts=1000, **SMALL)
    model.learn(10, callback=SoftValueDiagnostics(tmp_path))
    evaluate_values(model, Chain(), n_episodes=1).save(tmp_path)
    model.learn(10, callback=SoftValueDiagnostics(tmp_path), reset_num_timesteps=False)
    assert (tmp_path / "calibration.npz").is_file()
    model.learn(10, callback=SoftValueDiagnostics(tmp_path))
    assert not (tmp_path / "calibration.npz").exists()


@pytest.mark.parametrize(
    ("mean", "numbers"), [(-13.37, "bias +2.0 ± 1.0, mean V -11.4"), (413.0, "bias +2 ± 1, mean V 415"), (0.0, "mean V 2.00")]
)
def test_numbers_of_a_calibration_have_the_same_decimals(mean: float, numbers: str) -> None:
    collected = mean + np.array([-1.0, 1.0])
    errors, episodes = np.array([1.0, 3.0]), np.array([0, 1])
    calibration = Calibration(collected + errors, collected, np.zeros(2), episodes, np.zeros(2))
    assert numbers in str(calibration) and "2 episodes" in str(calibration)
    one = Calibration(collected + errors, collected, np.zeros(2), np.zeros(2, dtype=int), np.zeros(1))
    assert "1 episode:" in str(one) and "nan" not in str(one)


def test_a_write_that_is_cut_off_leaves_the_old_file(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    recording = Recording(info={"task": "first"})
    recording.save(tmp_path / "diagnostics.npz")

    def fail(file: Any, **arrays: np.ndarray) -> None:
        file.write(b"half of it")
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez_compressed", fail)
    with pytest.raises(OSError, match="disk full"):
        Recording(info={"task": "second"}).save(tmp_path / "diagnostics.npz")
    assert Recording.load(tmp_path).info == {"task": "first"}
    assert [path.name for path in tmp_path.iterdir()] == ["diagnostics.npz"]


def test_it_writes_now_and_then(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sb3_softvalue.diagnostics.callback._SAVE_SECONDS", 0.0)
    monkeypatch.setattr("sb3_softvalue.diagnostics.callback._SAVE_SHARE", float("inf"))
    seen = []

    class Look(SoftValueDiagnostics):
        def _on_step(self) -> bool:
            proceed = super()._on_step()
            seen.append(Recording.load(tmp_path).n_episodes if self.path.is_file() else 0)
            return proceed

    SACV("MlpPolicy", Chain(length=2), seed=0, **SMALL).learn(6, callback=Look(tmp_path))
    assert seen == [0, 1, 1, 2, 2, 3]


def test_learning_on_continues_the_recording(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = SACV("MlpPolicy", Chain(length=4), learning_starts=1000, seed=0, **SMALL)
    callback = SoftValueDiagnostics(tmp_path)
    model.learn(10, callback=callback)
    model.save(tmp_path / "model")
    model.learn(10, callback=callback, reset_num_timesteps=False)
    # The environment was not reset in between: the third episode goes on
    assert Recording.load(tmp_path).episodes["timesteps"].tolist() == [4, 8, 12, 16, 20]

    # A loaded model starts with a new episode at 10 and forgets what was recorded after that
    loaded = SACV.load(tmp_path / "model", env=Chain(length=4), device="cpu")
    loaded.learn(8, callback=SoftValueDiagnostics(tmp_path), reset_num_timesteps=False)
    recording = Recording.load(tmp_path)
    assert recording.episodes["timesteps"].tolist() == [4, 8, 14, 18]
    assert np.unique(recording.states["episode"]).tolist() == [0, 1, 2, 3]

    # Other bins cannot be continued, and a run that starts at zero is a new one
    monkeypatch.setattr("sb3_softvalue.diagnostics.callback._N_BINS", 3)
    model.learn(4, callback=SoftValueDiagnostics(tmp_path), reset_num_timesteps=False)
    assert Recording.load(tmp_path).episodes["timesteps"].tolist() == [24]
    model.learn(4, callback=callback)
    assert Recording.load(tmp_path).episodes["timesteps"].tolist() == [4]


def test_long_runs_keep_states_of_the_last_episodes(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sb3_softvalue.diagnostics.callback._MAX_EPISODES_WITH_STATES", 4)
    model = SACV("MlpPolicy", Chain(length=2), learning_starts=1000, seed=0, **SMALL)
    model.learn(26, callback=SoftValueDiagnostics(tmp_path, n_states=1))
    recording = Recording.load(tmp_path)
    assert recording.n_episodes == 13
    assert recording.states["episode"].tolist() == [9, 10, 11, 12]


def test_logger_gets_the_numbers(tmp_path: Any) -> None:
    model = SACV("MlpPolicy", Chain(), learning_starts=5, batch_size=4, seed=0, **SMALL)
    model.set_logger(configure(str(tmp_path), ["csv"]))
    model.learn(40, callback=SoftValueDiagnostics(), log_interval=2)
    model.logger.close()
    header = (tmp_path / "progress.csv").read_text().splitlines()[0]
    for name in ("entropy", "value", "soft_return", "value_bias", "value_slope", "value_gap", "target_lag"):
        assert f"diagnostics/{name}" in header
    assert "diagnostics/actions" not in header
    assert (tmp_path / "diagnostics.npz").is_file()  # without a folder, the logger's


def test_tensorboard_gets_the_histogram(tmp_path: Any) -> None:
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator",
        reason="TensorBoard is not installed",
    )
    model = SACV("MlpPolicy", Chain(), learning_starts=1000, seed=0, tensorboard_log=str(tmp_path), **SMALL)
    model.learn(20, callback=SoftValueDiagnostics(), log_interval=2)
    model.logger.close()
    events = event_accumulator.EventAccumulator(str(tmp_path / "SACV_1"))
    events.Reload()
    assert events.Tags()["histograms"] == ["diagnostics/actions"]


@pytest.mark.parametrize("kind", ["image", "her", "dict", "sde"])
def test_other_observations_and_policies(kind: str, tmp_path: Any) -> None:
    common = {"learning_starts": 4, "batch_size": 4, "buffer_size": 100, "seed": 0, "device": "cpu"}
    if kind == "image":
        env: Any = FakeImageEnv(screen_height=36, screen_width=36, n_channels=1, discrete=False)
        env = gym.wrappers.TimeLimit(env, 6)
        model = SACV("CnnPolicy", env, policy_kwargs={"features_extractor_kwargs": {"features_dim": 8}}, **common)
    elif kind == "her":
        env = BitFlippingEnv(n_bits=3, continuous=True)
        model = SACV("MultiInputPolicy", env, replay_buffer_class=HerReplayBuffer, **common)
    elif kind == "dict":
        env = VecNormalize(DummyVecEnv([lambda: DictChain(truncate=True)]))
        model = SACV("MultiInputPolicy", env, **common)
    else:
        env = Chain(truncate=True)
        model = SACV("MlpPolicy", env, use_sde=True, **common)
    model.learn(18, callback=SoftValueDiagnostics(tmp_path))
    recording = Recording.load(tmp_path)
    assert recording.n_episodes >= 3 and np.isfinite(recording.episodes["soft_return"]).all()
    assert ("observation" in recording.states) == (kind == "sde")
    assert np.isfinite(evaluate_values(model, env, n_episodes=2).bias)


def test_landscape_of_an_angle() -> None:
    model = SACV("MlpPolicy", "Pendulum-v1", seed=0, **SMALL)
    angles = np.linspace(0.0, 6.0, 20)
    visited = np.stack([np.cos(angles), np.sin(angles), angles], axis=1)
    picture = landscape(model, visited, n_points=5)
    assert picture is not None and bool(picture.is_angle) and picture.fixed.shape == (0,)
    np.testing.assert_allclose(picture.x, [-np.pi, -np.pi / 2, 0.0, np.pi / 2, np.pi])
    np.testing.assert_allclose(picture.y, [-8.0, -4.0, 0.0, 4.0, 8.0])
    obs = np.array([0.0, 1.0, -4.0], dtype=np.float32)  # a quarter turn at -4 rad/s
    assert picture.values[1, 3] == pytest.approx(float(model.predict_values(obs)), rel=1e-4)
    assert picture.actions[1, 3] == pytest.approx(model.predict(obs, deterministic=True)[0], rel=1e-4)


def test_landscape_of_other_spaces() -> None:
    class Unbounded(Chain):
        def __init__(self) -> None:
            super().__init__()
            self.observation_space = spaces.Box(-np.inf, np.inf, (3,), np.float32)

        @staticmethod
        def observe(step: int) -> np.ndarray:
            return np.array([step, 1.0, 2.0 * step], dtype=np.float32)

    model = SACV("MlpPolicy", Unbounded(), seed=0, **SMALL)
    picture = landscape(model, np.array([[0.0, 1.0, 3.0], [4.0, 2.0, 5.0], [8.0, 2.0, 4.0]]), n_points=3)
    assert picture is not None and not bool(picture.is_angle)
    assert picture.x.tolist() == [0.0, 4.0, 8.0] and picture.y.tolist() == [1.0, 1.5, 2.0] and picture.fixed.tolist() == [4.0]
    assert picture.values[1, 1] == pytest.approx(float(model.predict_values(np.array([4.0, 1.5, 4.0], dtype=np.float32))))
    assert landscape(SACV("MlpPolicy", Bandit(), seed=0, **SMALL), np.zeros((2, 1))) is None


def test_errors(tmp_path: Any) -> None:
    sac = SAC("MlpPolicy", Chain(), **SMALL)
    with pytest.raises(TypeError, match="no soft value network: train with"):
        sac.learn(10, callback=SoftValueDiagnostics(tmp_path))
    model = SACV("MlpPolicy", VecNormalize(DummyVecEnv([Chain])), **SMALL)
    with pytest.raises(ValueError, match="n_episodes must be at least 1, got 0"):
        evaluate_values(model, Chain(), n_episodes=0)
    with pytest.raises(ValueError, match="trained with VecNormalize but env has none"):
        evaluate_values(model, Chain(), n_episodes=1)
    with pytest.raises(ValueError, match="Observation spaces do not match"):
        evaluate_values(model, VecNormalize(DummyVecEnv([Bandit])), n_episodes=1)
    with pytest.raises(FileNotFoundError, match="train with the callback SoftValueDiagnostics"):
        Recording.load(tmp_path / "nothing")
