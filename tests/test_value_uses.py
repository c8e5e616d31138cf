"""What was measured of V's uses: detector, what it watches and picked start states, by numbers worked out by hand."""

import importlib
import pathlib
import sys
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium.spaces import Box

from sb3_softvalue import SACV

pytest.importorskip("matplotlib", reason="the programs' pictures are drawn with matplotlib, which is not installed")
pytest.importorskip("scipy", reason="the programs' intervals are SciPy's, which is not installed")
sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "benchmarks"))
pytest.importorskip("pandas", reason="one program's table is one of pandas, which is not installed")
names = ("monitor_with_value", "start_states", "value_lag")
monitor, start_states, value_lag = (importlib.import_module(name) for name in names)


def test_statistic_is_page_s() -> None:
    # Mean 0 and standard deviation 1 at each step
    reference = np.array([[-1.0] * 5, [1.0] * 5])
    detector = monitor.Detector(reference, np.zeros((19, 5)), slack=0.5)
    # Only what is too low by more than the slack adds up, and what is high takes away, down to 0
    sums = detector.statistic(np.array([[-2.0, -1.0, 1.0, 0.0, -0.5], [1.0, 1.0, -1.0, -1.0, -1.0]]))
    np.testing.assert_allclose(sums, [[1.5, 2.0, 0.5, 0.0, 0.0], [0.0, 0.0, 0.5, 1.0, 1.5]], atol=1e-6)


def test_scores_are_those_of_the_step() -> None:
    # Usual are 10 ± 2 at the first step and -3 ± 1 at the second
    detector = monitor.Detector(np.array([[8.0, -4.0], [12.0, -2.0]]), np.full((19, 2), 100.0), slack=0.0)
    np.testing.assert_allclose(detector.statistic(np.array([[4.0, -5.0]])), [[3.0, 5.0]], atol=1e-6)


@pytest.mark.parametrize(("episodes", "k"), [(19, 1), (38, 1), (39, 2), (60, 3), (99, 5)])
def test_threshold_is_the_one_of_one_in_twenty(episodes: int, k: int) -> None:
    reference = np.array([[-1.0], [1.0]])
    # Episode i is too low by i: of episodes + 1 in a random order, the last is above the k-th highest with k/(episodes+1)
    healthy = -np.random.default_rng(0).permutation(np.arange(1.0, episodes + 1))[:, None]
    detector = monitor.Detector(reference, healthy, slack=0.0)
    assert detector.threshold == pytest.approx(episodes + 1 - k)
    assert (detector.alarms(healthy) == 0).sum() == k - 1 and k / (episodes + 1) <= 0.05


def test_too_few_episodes_for_the_rate() -> None:
    with pytest.raises(ValueError, match="at least 19 healthy episodes"):
        monitor.Detector(np.zeros((5, 3)), np.zeros((18, 3)))


def test_shift_is_detected_at_the_step() -> None:
    generator = np.random.default_rng(0)
    reference, healthy, held_out = generator.standard_normal((3, 400, 200))
    detector = monitor.Detector(reference, healthy)
    assert np.mean(detector.alarms(held_out) < 200) == pytest.approx(0.05, abs=0.03)
    # Lower by 20 from step 100 on: the first such step is enough for the alarm. Higher by as much: no alarm at all
    quiet = held_out[detector.alarms(held_out) == 200]
    shift = np.where(np.arange(200) >= 100, 20.0, 0.0)
    assert set(detector.alarms(quiet - shift)) == {100} and set(detector.alarms(quiet + shift)) == {200}
    # By one standard deviation: it takes about threshold/(1 - slack) steps
    delays = detector.alarms(quiet - shift / 20.0) - 100
    assert np.mean(delays) == pytest.approx(detector.threshold / (1.0 - monitor.SLACK), rel=0.2)


def test_delays_and_intervals() -> None:
    # Ten steps, faulty from index 5 on: at once, at the last, never, and a false one before
    np.testing.assert_array_equal(monitor.delays_of(np.array([5, 9, 10, 4]), 10), [1, 5, 6, 6])
    assert monitor.interval(np.full((3, 4), 2.5), np.median) == (2.5, 2.5, 2.5)
    # The two seeds differ by 2: the mean of two drawn ones is -1, 0 or 1
    assert monitor.interval(np.array([[-1.0, -1.0], [1.0, 1.0]])) == (0.0, -1.0, 1.0)


class Steps(gym.Env):
    """The observation is the number of steps, the reward what the six joints got in sum."""

    observation_space, action_space = Box(-np.inf, np.inf, (9,)), Box(-1.0, 1.0, (6,))

    def reset(self, **options: Any) -> tuple[np.ndarray, dict[str, Any]]:
        self.count = 0
        return np.zeros(9), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.count += 1
        return np.full(9, float(self.count)), float(action @ np.arange(1.0, 7.0)), False, False, {}


class Known:
    """V(s) = 2·s, Q(s, a) = 3·s and 4·s, log-density -s: at step s."""

    gamma, log_ent_coef = 0.5, th.log(th.tensor(0.1))

    def predict(self, observations: np.ndarray, deterministic: bool) -> tuple[np.ndarray, None]:
        return np.ones((len(observations), 6)), None

    def predict_values(self, observations: np.ndarray) -> np.ndarray:
        return 2.0 * observations[:, 0]

    def predict_q_values(self, observations: np.ndarray, actions: np.ndarray) -> np.ndarray:
        return np.stack([4.0 * observations[:, 0], 3.0 * observations[:, 0]], axis=1)

    def action_log_prob(self, observations: np.ndarray, actions: np.ndarray) -> np.ndarray:
        return -observations[:, 0]


def test_what_is_watched() -> None:
    # Joint 3 gives 4 of the 21: half of it is lost from the third step on
    envs = [Steps(), monitor.Faulty(Steps(), monitor.WORN, 0.5, joint=3, onset=2)]
    watched = monitor.watch(Known(), envs, seed=0, steps=4)
    np.testing.assert_allclose(watched[monitor.REWARD], [[21.0, 21.0, 21.0, 21.0], [21.0, 21.0, 19.0, 19.0]])
    np.testing.assert_allclose(watched[monitor.SO_FAR][1], [21.0, 42.0, 61.0, 80.0])
    step = np.arange(4.0)
    of_v = watched[monitor.REWARD] + 0.1 * step + 0.5 * 2.0 * (step + 1.0) - 2.0 * step
    of_q = watched[monitor.REWARD] + 0.5 * (3.0 + 0.1) * (step + 1.0) - 3.0 * step
    np.testing.assert_allclose(watched[monitor.OF_V], of_v, atol=1e-6)
    np.testing.assert_allclose(watched[monitor.OF_Q], of_q, atol=1e-6)


def test_sensor_offset() -> None:
    env = monitor.Faulty(Steps(), monitor.OFFSET, 0.25, joint=1, onset=1)
    for _ in range(2):  # a new episode is healthy again
        env.reset()
        assert set(env.step(np.ones(6))[0]) == {1.0}
        np.testing.assert_array_equal(env.step(np.ones(6))[0], [2.0, 2.0, 2.0, 2.25, 2.0, 2.0, 2.0, 2.0, 2.0])


def test_models_are_kept(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitor, "SACV", SimpleNamespace(load=lambda path, device: path.name))
    (tmp_path / "seed-3-50-steps.zip").touch()
    assert monitor.trained(3, 50, tmp_path) == "seed-3-50-steps.zip"


def test_monitor_with_value(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("mujoco", reason="mujoco is not installed")
    options = ["--timesteps", "110", "--seeds", "0", "1", "--episodes", "20", "--steps", "6", "--folder", str(tmp_path)]
    rows = monitor.main(options)
    # Four monitors: false alarms, then two quantities and three differences for each fault
    assert len(rows) == 4 + len(monitor.FAULTS) * (4 * 2 + 3)
    assert all(row["low"] <= row["value"] <= row["high"] for row in rows if row["quantity"] != "median delay")
    assert len((tmp_path / "monitor_summary.csv").read_text().splitlines()) == 1 + len(rows)
    lines = [line.split(",") for line in (tmp_path / "monitor.csv").read_text().splitlines()[1:]]
    assert len(lines) == 2 * (1 + len(monitor.FAULTS)) * 20
    assert (tmp_path / "monitor_with_value.png").is_file() and (tmp_path / "seed-1-110-steps.zip").is_file()
    assert "torque lost 0.5, residual of V minus reward, mean delay" in capsys.readouterr().out


def test_low_values_are_drawn_likelier() -> None:
    env = start_states.StartStates(gym.make("Pendulum-v1"), start_states.BY_V, seed=0)
    env.model = Known()
    # V = 2·s: of four states the lowest is four times as likely as the highest
    observations = np.array([[3.0], [1.0], [4.0], [2.0]]) * np.ones(3)
    np.testing.assert_allclose(env.weights(observations), np.array([2.0, 4.0, 1.0, 3.0]) / 10.0)
    env.arm = start_states.RANDOM
    np.testing.assert_allclose(env.weights(observations), np.full(4, 0.25))


@pytest.mark.parametrize("arm", [start_states.OWN, start_states.RANDOM, start_states.BY_V])
def test_episodes_start_where_the_arm_says(arm: str) -> None:
    env = start_states.StartStates(gym.make("Pendulum-v1"), arm, seed=0, share=1.0)
    env.model = Known()
    env.reset(seed=0)
    visited = [env.step(np.array([2.0]))[0].tolist() for _ in range(50)]
    observation, _ = env.reset()
    assert (observation.tolist() in visited) == (arm != start_states.OWN)
    # The environment is where its observation says
    angle, speed = env.unwrapped.state
    np.testing.assert_allclose(observation, [np.cos(angle), np.sin(angle), speed], atol=1e-6)


def test_start_states(tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "folder" / "start_states.csv"
    options = ["--seeds", "2", "--checkpoints", "105", "210", "--episodes", "2", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["start_states.py", *options])
    start_states.main()
    lines = [line.split(",") for line in out.read_text().splitlines()[1:]]
    assert len(lines) == 2 * 3 * 2 and all(-2000.0 < float(line[3]) < 0.0 for line in lines)
    assert "visited states by V minus own starts" in capsys.readouterr().out


def test_soft_returns() -> None:
    rewards, bonus = np.array([[1.0], [2.0], [4.0]]), np.array([[10.0], [20.0], [30.0]])
    of_q, of_v = value_lag.soft_returns(rewards, bonus, gamma=0.5)
    # From the end: 4; 2 + (4 + 30)/2 = 19; 1 + (19 + 20)/2 = 20.5, and each with its own bonus
    np.testing.assert_allclose(of_q, [[20.5], [19.0], [4.0]])
    np.testing.assert_allclose(of_v, [[30.5], [39.0], [34.0]])


def test_looking_changes_no_training_and_sees_the_networks() -> None:
    def train(every: int) -> tuple[SACV, Any]:
        model = SACV("MlpPolicy", "HalfCheetah-v5", seed=0, device="cpu", learning_starts=50, policy_kwargs={"net_arch": [8]})
        watching = value_lag.Look(seed=0, every=every, episodes=3, steps=2)
        return model.learn(120, callback=watching), watching

    (model, watching), (alone, _) = train(40), train(1000)
    for ours, theirs in zip(model.policy.parameters(), alone.policy.parameters(), strict=True):
        assert th.equal(ours, theirs)
    assert [row["timesteps"] for row in watching.rows] == [80, 120]
    seen = value_lag.look(model, watching.env, seed=7, steps=2)
    watching.env.seed(7)
    observations = watching.env.reset()
    assert seen["V"] == pytest.approx(float(model.predict_values(observations).mean()), rel=1e-5)
    assert seen["alpha"] == pytest.approx(model.log_ent_coef.exp().item())


def test_value_lag(tmp_path: Any) -> None:
    options = ["--timesteps", "120", "--every", "40", "--episodes", "2", "--steps", "60", "--learning-starts", "50"]
    rows = value_lag.main([*options, "--algorithms", "sac", "sacv", "--seeds", "0", "1", "--out", str(tmp_path / "lag.csv")])
    assert len(rows) == 2 * 2 * 2 == len((tmp_path / "lag.csv").read_text().splitlines()) - 1
    assert np.isfinite(rows[rows["algorithm"] == "sacv"].drop(columns="algorithm")).all(axis=None)
    assert rows[rows["algorithm"] == "sac"]["V"].isna().all() and (tmp_path / "lag.png").is_file()
