"""The detector of examples/monitor_with_value.py and what it watches, by numbers worked out by hand."""

import importlib
import pathlib
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium.spaces import Box

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"

pytest.importorskip("matplotlib")


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.delitem(sys.modules, "monitor_with_value", raising=False)
    return importlib.import_module("monitor_with_value")


def test_statistic_is_page_s(example: ModuleType) -> None:
    # Mean 0 and standard deviation 1 at each step
    reference = np.array([[-1.0] * 5, [1.0] * 5])
    detector = example.Detector(reference, np.zeros((19, 5)), slack=0.5)
    # Only what is too low by more than the slack adds up, and what is high takes away, down to 0
    sums = detector.statistic(np.array([[-2.0, -1.0, 1.0, 0.0, -0.5], [1.0, 1.0, -1.0, -1.0, -1.0]]))
    np.testing.assert_allclose(sums, [[1.5, 2.0, 0.5, 0.0, 0.0], [0.0, 0.0, 0.5, 1.0, 1.5]], atol=1e-6)


def test_scores_are_those_of_the_step(example: ModuleType) -> None:
    # Usual are 10 ± 2 at the first step and -3 ± 1 at the second
    detector = example.Detector(np.array([[8.0, -4.0], [12.0, -2.0]]), np.full((19, 2), 100.0), slack=0.0)
    np.testing.assert_allclose(detector.statistic(np.array([[4.0, -5.0]])), [[3.0, 5.0]], atol=1e-6)


@pytest.mark.parametrize(("episodes", "k"), [(19, 1), (38, 1), (39, 2), (60, 3), (99, 5)])
def test_threshold_is_the_one_of_one_in_twenty(example: ModuleType, episodes: int, k: int) -> None:
    reference = np.array([[-1.0], [1.0]])
    # Episode i is too low by i: of episodes + 1 in a random order, the last is above the k-th highest with k/(episodes+1)
    healthy = -np.random.default_rng(0).permutation(np.arange(1.0, episodes + 1))[:, None]
    detector = example.Detector(reference, healthy, slack=0.0)
    assert detector.threshold == pytest.approx(episodes + 1 - k)
    assert (detector.alarms(healthy) == 0).sum() == k - 1 and k / (episodes + 1) <= 0.05


def test_too_few_episodes_for_the_rate(example: ModuleType) -> None:
    with pytest.raises(ValueError, match="at least 19 healthy episodes"):
        example.Detector(np.zeros((5, 3)), np.zeros((18, 3)))


def test_shift_is_detected_at_the_step(example: ModuleType) -> None:
    generator = np.random.default_rng(0)
    reference, healthy, held_out = generator.standard_normal((3, 400, 200))
    detector = example.Detector(reference, healthy)
    assert np.mean(detector.alarms(held_out) < 200) == pytest.approx(0.05, abs=0.03)
    # Lower by 20 from step 100 on: the first such step is enough for the alarm. Higher by as much: no alarm at all
    quiet = held_out[detector.alarms(held_out) == 200]
    shift = np.where(np.arange(200) >= 100, 20.0, 0.0)
    assert set(detector.alarms(quiet - shift)) == {100} and set(detector.alarms(quiet + shift)) == {200}
    # By one standard deviation: it takes about threshold/(1 - slack) steps
    delays = detector.alarms(quiet - shift / 20.0) - 100
    assert np.mean(delays) == pytest.approx(detector.threshold / (1.0 - example.SLACK), rel=0.2)


def test_delays_and_intervals(example: ModuleType) -> None:
    # Ten steps, faulty from index 5 on: at once, at the last, never, and a false one before
    np.testing.assert_array_equal(example.delays_of(np.array([5, 9, 10, 4]), 10), [1, 5, 6, 6])
    assert example.interval(np.full((3, 4), 2.5), np.median) == (2.5, 2.5, 2.5)
    # The two seeds differ by 2: the mean of two drawn ones is -1, 0 or 1
    assert example.interval(np.array([[-1.0, -1.0], [1.0, 1.0]])) == (0.0, -1.0, 1.0)


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


def test_what_is_watched(example: ModuleType) -> None:
    # Joint 3 gives 4 of the 21: half of it is lost from the third step on
    envs = [Steps(), example.Faulty(Steps(), example.WORN, 0.5, joint=3, onset=2)]
    watched = example.watch(Known(), envs, seed=0, steps=4)
    np.testing.assert_allclose(watched[example.REWARD], [[21.0, 21.0, 21.0, 21.0], [21.0, 21.0, 19.0, 19.0]])
    np.testing.assert_allclose(watched[example.SO_FAR][1], [21.0, 42.0, 61.0, 80.0])
    step = np.arange(4.0)
    of_v = watched[example.REWARD] + 0.1 * step + 0.5 * 2.0 * (step + 1.0) - 2.0 * step
    of_q = watched[example.REWARD] + 0.5 * (3.0 + 0.1) * (step + 1.0) - 3.0 * step
    np.testing.assert_allclose(watched[example.OF_V], of_v, atol=1e-6)
    np.testing.assert_allclose(watched[example.OF_Q], of_q, atol=1e-6)


def test_sensor_offset(example: ModuleType) -> None:
    env = example.Faulty(Steps(), example.OFFSET, 0.25, joint=1, onset=1)
    for _ in range(2):  # a new episode is healthy again
        env.reset()
        assert set(env.step(np.ones(6))[0]) == {1.0}
        np.testing.assert_array_equal(env.step(np.ones(6))[0], [2.0, 2.0, 2.0, 2.25, 2.0, 2.0, 2.0, 2.0, 2.0])


def test_models_are_kept(example: ModuleType, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(example, "SACV", SimpleNamespace(load=lambda path, device: path.name))
    (tmp_path / "seed-3-50-steps.zip").touch()
    assert example.trained(3, 50, tmp_path) == "seed-3-50-steps.zip"
