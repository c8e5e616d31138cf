"""Every example runs, headless, with few steps."""

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
from gymnasium.utils.env_checker import check_env
from stable_baselines3 import SAC

from sb3_softvalue import SACV

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"

pytest.importorskip("matplotlib", reason="matplotlib is not installed")
pytest.importorskip("tqdm", reason="tqdm is not installed")
pytest.importorskip("rich", reason="rich is not installed")
# SB3's progress bar says so at each use
pytestmark = pytest.mark.filterwarnings("ignore:rich is experimental:tqdm.TqdmExperimentalWarning")


@pytest.fixture
def example(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module, found as Python finds it when it is run."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.delitem(sys.modules, request.param, raising=False)
    return importlib.import_module(request.param)


def uses(name: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("example", [name], indirect=True, ids=[name])


def test_every_example_has_a_test() -> None:
    text = pathlib.Path(__file__).read_text(encoding="utf-8")
    assert [path.stem for path in EXAMPLES.glob("*.py") if f'uses("{path.stem}")' not in text] == []


@uses("pendulum")
def test_pendulum(example: ModuleType, tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--timesteps", "220", "--episodes", "2", "--folder", str(tmp_path)]
    assert example.main([*options, "--train"]) is None
    assert example.main([*options, "--test"]) < 0.0
    printed = capsys.readouterr().out
    assert "Return over 2 episodes" in printed and "slope" in printed and "bias" in printed
    written = {path.name for path in tmp_path.iterdir()}
    assert {"model.zip", "diagnostics.npz", "calibration.npz", "trained.gif", "report"} <= written
    assert len(list((tmp_path / "report").glob("*.png"))) == 7


@uses("reacher")
def test_reacher(example: ModuleType, tmp_path: Any) -> None:
    pytest.importorskip("mujoco", reason="mujoco is not installed")
    assert example.main(["--timesteps", "150", "--episodes", "2", "--folder", str(tmp_path)]) < 0.0
    assert len(list((tmp_path / "report").glob("*.png"))) == 6
    assert (tmp_path / "trained.gif").is_file() == example.can_film()


@uses("swap_sac")
@pytest.mark.parametrize("algo", ["sac", "sacv"])
def test_swap_sac(example: ModuleType, algo: str, tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert example.main(["--algo", algo, "--timesteps", "150", "--folder", str(tmp_path)]) < 0.0
    assert capsys.readouterr().out.strip().splitlines()[-1].startswith(algo.upper())


@uses("value_landscape")
def test_value_landscape(example: ModuleType, tmp_path: Any) -> None:
    pictures = example.main(["--timesteps", "630", "--folder", str(tmp_path)])
    assert [path.is_file() for path in pictures] == [True] * 3


@uses("compare_sac_sacv")
def test_compare_sac_sacv(example: ModuleType, tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert example.main(["--timesteps", "120", "--seeds", "2", "--episodes", "1", "--folder", str(tmp_path)]).is_file()
    assert "SAC: mean return" in capsys.readouterr().out


@uses("her_fetch_like")
def test_her_fetch_like(example: ModuleType, tmp_path: Any) -> None:
    check_env(example.make_env().unwrapped, skip_render_check=True)
    assert 0.0 <= example.main(["--timesteps", "260", "--folder", str(tmp_path)]) <= 1.0


@uses("drug_dosing")
# It recommends actions in [-1, 1]; these are in mU/min, and SACV scales them
@pytest.mark.filterwarnings("ignore:.*For Box action spaces, we recommend using a symmetric and normalized space")
def test_drug_dosing(example: ModuleType, tmp_path: Any) -> None:
    check_env(example.Patient(), skip_render_check=True)
    traces = example.main(["--timesteps", "400", "--days", "2", "--folder", str(tmp_path)])
    assert traces["PID"]["glucose"].shape == (2, 288) and np.isfinite(traces["PID"]["glucose"]).all()
    assert (tmp_path / "glucose.png").is_file() and (tmp_path / "report" / "index.html").is_file()


@uses("drug_dosing")
def test_drug_dosing_model(example: ModuleType) -> None:
    # Basal infusion holds basal glucose and insulin; without any insulin the glucose rises for ever
    basal = np.array([example.GB, 0.0, example.IB, 0.0])
    assert example.BASAL == pytest.approx(16.67, abs=0.01)
    np.testing.assert_allclose(example._derivative(basal, example.BASAL), 0.0, atol=1e-12)
    assert example.risk(112.5) == pytest.approx(0.0, abs=0.01)
    assert example.risk(70.0) == pytest.approx(7.7, abs=0.1) and example.risk(180.0) == pytest.approx(7.7, abs=0.1)
    # Plasma insulin alone is linear: after one minute from 15 mU/L without infusion, 15·exp(-n)
    assert example._runge_kutta(basal, 0.0)[2] == pytest.approx(15.0 * np.exp(-example.N), rel=1e-6)


@uses("resume")
def test_resume(example: ModuleType, tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    folder = ["--folder", str(tmp_path)]
    assert example.main([*folder, "--timesteps", "210"]) == 210
    assert example.main([*folder, "--timesteps", "230"]) == 230
    assert "from step 210" in capsys.readouterr().out


@uses("plan_with_value")
def test_plan_with_value(example: ModuleType, tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("mujoco", reason="mujoco is not installed")
    options = ["--timesteps", "110", "120", "--seeds", "2", "--starts", "2", "--steps", "3", "--folder", str(tmp_path)]
    rows = example.main(options)
    # Four returns and three differences at each of two checkpoints of two tasks
    assert len(rows) == 2 * 2 * (4 + 3) and all(row["low"] <= row["mean"] <= row["high"] for row in rows)
    means = {(row["arm"], row["minus"]): row["mean"] for row in rows[:7]}
    gain = means[example.WITH_V, ""] - means[example.ALONE, ""]
    assert means[example.WITH_V, example.ALONE] == pytest.approx(gain)
    assert len((tmp_path / "plan.csv").read_text().splitlines()) == 1 + len(rows)
    assert (tmp_path / "plan_with_value.png").is_file()
    assert "HalfCheetah-v5, 120 steps, planning with V minus policy alone" in capsys.readouterr().out


@uses("plan_with_value")
@pytest.mark.parametrize("name", ["Pendulum-v1", "HalfCheetah-v5", "InvertedDoublePendulum-v5"])
def test_plan_with_value_has_the_tasks_own_dynamics(example: ModuleType, name: str) -> None:
    if name != "Pendulum-v1":
        pytest.importorskip("mujoco", reason="mujoco is not installed")
    task = (example.Pendulum if name == "Pendulum-v1" else example.Mujoco)(name)
    env = gym.make(name).unwrapped
    env.action_space.seed(0)
    env.reset(seed=0)
    task.env.reset(seed=0)
    states = np.stack([task.state()] * 2)
    for step in range(60):
        action = env.action_space.sample()
        observation, reward, terminated, _, _ = env.step(action)
        # The second of the two takes other actions: it must not disturb the first
        other = env.action_space.sample()
        states, observations, rewards, ended = task.step(states, np.stack([action, other]))
        np.testing.assert_allclose(observations[0], observation, rtol=1e-6, atol=1e-6, err_msg=f"step {step}")
        assert rewards[0] == pytest.approx(reward, rel=1e-9) and ended[0] == terminated


@uses("privileged")
def test_privileged(example: ModuleType, tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--timesteps", "240", "--every", "120", "--episodes", "2", "--folder", str(tmp_path)]
    rows = example.main(options)
    assert [(row["arm"], row["timesteps"]) for row in rows] == [(arm, step) for arm in example.ARMS for step in (120, 240)]
    assert (tmp_path / "privileged.png").is_file() and "blind SAC: return" in capsys.readouterr().out
    # The policy runs where there is nothing but a camera
    loaded = SACV.load(tmp_path / "privileged")
    assert loaded.predict(example.make_env("blind").reset(seed=0)[0])[0].shape == (1,)


@uses("privileged")
def test_privileged_camera(example: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its error, the camera sees the tip where the pendulum is; with it, it errs as much as it says."""
    env = example.FilmedPendulum(start=(0.3, 2.0))
    pictures = np.stack([env.reset(seed=seed)[0]["camera"] for seed in range(500)]).reshape(-1, example.PICTURES, 2)
    angles = 0.3 - 2.0 * example.SECONDS * np.array([2, 1, 0])
    seen = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    np.testing.assert_allclose(pictures.std(axis=0), example.ERROR, rtol=0.15)
    np.testing.assert_allclose(pictures.mean(axis=0), seen, atol=5 * example.ERROR / np.sqrt(500))
    monkeypatch.setattr(example, "ERROR", 0.0)
    observation, _ = env.reset(seed=0)
    np.testing.assert_allclose(observation["camera"].reshape(-1, 2), seen, rtol=1e-6)
    np.testing.assert_allclose(observation["state"], [np.cos(0.3), np.sin(0.3), 2.0], rtol=1e-6)
    assert env.observation_space.contains(observation)
    for _ in range(4):
        before, (observation, *_) = observation, env.step(np.ones(1))
        np.testing.assert_array_equal(observation["camera"][-2:], observation["state"][:2])
        np.testing.assert_array_equal(observation["camera"][:-2], before["camera"][2:])


@uses("many_environments")
def test_many_environments(example: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    # Twenty steps of random actions, then twenty with updates
    assert example.main(["--envs", "8", "--timesteps", "320", "--batch-size", "32", "--gradient-steps", "2"]) < 0.0
    printed = capsys.readouterr().out
    assert "after 320 transitions and 38 updates" in printed and "Mean return of 100 other episodes" in printed


@uses("many_environments")
def test_many_environments_are_pendulums(example: ModuleType) -> None:
    """Step by step as Gymnasium's, from the same states; each begins anew after 200 steps."""
    singles, env = [gym.make("Pendulum-v1") for _ in range(3)], example.Pendulums(3)
    assert (env.observation_space, env.action_space) == (singles[0].observation_space, singles[0].action_space)
    env.seed(0)
    observations = env.reset()
    assert observations.dtype == np.float32 and len(np.unique(observations, axis=0)) == 3
    for single, angle, speed in zip(singles, env.angle, env.speed, strict=True):
        single.reset()
        single.unwrapped.state = np.array([angle, speed])
    rng = np.random.default_rng(0)
    for step in range(1, 201):
        # Some of them beyond the bounds, which both clip
        actions = rng.uniform(-2.5, 2.5, (3, 1)).astype(np.float32)
        expected = [single.step(action) for single, action in zip(singles, actions, strict=True)]
        observations, rewards, dones, infos = env.step(actions)
        seen = np.stack([info["terminal_observation"] for info in infos]) if step == 200 else observations
        np.testing.assert_allclose(seen, [one[0] for one in expected], rtol=1e-6, atol=1e-6, err_msg=f"step {step}")
        np.testing.assert_allclose(rewards, [one[1] for one in expected], rtol=1e-6, err_msg=f"step {step}")
        truncated = [one[3] for one in expected]
        assert dones.tolist() == truncated == [step == 200] * 3
        assert [info.get("TimeLimit.truncated", False) for info in infos] == truncated
    # The first observation of the next episode, and the same of the same seed
    np.testing.assert_allclose(observations[:, 2], env.speed, rtol=1e-6)
    assert (np.abs(env.speed) <= 1.0).all() and not env.steps.any()
    env.seed(0)
    first = env.reset()
    env.seed(0)
    np.testing.assert_array_equal(env.reset(), first)
    assert not np.array_equal(env.reset(), first)


@uses("many_environments")
@pytest.mark.parametrize("algorithm", [SAC, SACV])
def test_many_environments_are_learned_from(example: ModuleType, algorithm: type[SAC]) -> None:
    """An episode's end reaches the replay buffer as a time limit, with the last observation and not the next first one."""
    kwargs: dict[str, Any] = dict(learning_starts=1600, gradient_steps=2, batch_size=32, policy_kwargs={"net_arch": [8]})
    env = example.Pendulums(8)
    model = algorithm("MlpPolicy", env, seed=0, device="cpu", **kwargs)
    before = [parameter.clone() for parameter in model.policy.parameters()]
    model.learn(8 * 205)
    assert model._n_updates == 2 * 5
    assert not all(map(th.equal, before, model.policy.parameters()))
    buffer = model.replay_buffer
    assert buffer.timeouts[:205].sum() == buffer.timeouts[199].sum() == 8
    is_followed = (buffer.next_observations[:204] == buffer.observations[1:205]).all(axis=(1, 2))
    assert np.flatnonzero(~is_followed).tolist() == [199]
    # In one step the angle turns by its new speed
    angles = np.arctan2(buffer.observations[199, :, 1], buffer.observations[199, :, 0])
    after = np.arctan2(buffer.next_observations[199, :, 1], buffer.next_observations[199, :, 0])
    turned = buffer.next_observations[199, :, 2] * example.DT
    np.testing.assert_allclose(np.exp(1j * (angles + turned)), np.exp(1j * after), atol=1e-4)


class Line:
    """A point that moves by its action, 0.1 for each step; beyond 1 the episode ends, and a step there would be worth 100."""

    env = SimpleNamespace(reset=lambda seed: (np.array([0.5]), {}))

    def state(self) -> np.ndarray:
        return np.array([0.5])

    def step(self, states: np.ndarray, actions: np.ndarray) -> tuple[np.ndarray, ...]:
        after = states + actions
        return after, after, np.where(states[:, 0] > 1.0, 100.0, 0.1), after[:, 0] > 1.0


class Still:
    """A policy that does nothing."""

    gamma, action_space = 0.5, Box(-1.0, 1.0, (1,))

    def predict(self, observations: np.ndarray, deterministic: bool) -> tuple[np.ndarray, None]:
        return np.zeros((len(observations), 1), dtype=np.float32), None


@uses("plan_with_value")
def test_plan_with_value_chooses_the_best_action(example: ModuleType) -> None:
    states = np.array([[-0.5], [0.5]])

    def choose(values: Any, candidates: int = 500) -> np.ndarray:
        return example.plan(Still(), Line(), states, states, values, np.random.default_rng(0), 3, candidates)[:, 0]

    # V says that the best place is 0.25: go there from both sides
    np.testing.assert_allclose(choose(lambda x: 2.0 - np.abs(x[:, 0] - 0.25)), [0.75, -0.25], atol=0.1)
    # Neither V nor rewards count after the episode's end, else the right end would be best
    assert states[1, 0] + choose(lambda x: x[:, 0] + 0.001)[1] == pytest.approx(1.0, abs=0.1)
    # All are worth the same: the policy's own action, which is also the only one without candidates beside it
    np.testing.assert_array_equal(choose(lambda x: np.zeros(len(x))), [0.0, 0.0])
    np.testing.assert_array_equal(choose(lambda x: x[:, 0], candidates=1), [0.0, 0.0])


@uses("plan_with_value")
def test_plan_with_value_adds_up(example: ModuleType) -> None:
    # From 0.5 by 0.4 at each step: the second ends the episode, what follows does not count
    returns = example.play(Line(), lambda states, obs: np.full_like(states, 0.4), starts=2, steps=5)
    np.testing.assert_allclose(returns, [0.2, 0.2])
    # The two seeds differ by 2, their starts do not: the mean of two drawn seeds is -1, 0 or 1
    assert example.interval(np.array([[-1.0, -1.0], [1.0, 1.0]])) == (0.0, -1.0, 1.0)
    assert example.interval(np.full((3, 4), 2.5)) == (2.5, 2.5, 2.5)


@uses("offline_to_online")
def test_offline_to_online(example: ModuleType) -> None:
    model = SACV("MlpPolicy", "Pendulum-v1", policy_kwargs={"net_arch": [8]})
    recorded = example.fill(model, episodes=2, seed=3)
    assert model.replay_buffer is not None and model.replay_buffer.size() == 400
    # Stored as learn() stores: actions in [-1, 1], an episode that was cut off does not end the return
    stored = model.replay_buffer
    assert stored.rewards[:400].sum() / 2 == pytest.approx(recorded, rel=1e-5)
    assert np.abs(stored.actions[:400]).max() == 1.0
    assert np.flatnonzero(stored.dones[:400]).tolist() == np.flatnonzero(stored.timeouts[:400]).tolist() == [199, 399]
    following = np.abs(stored.observations[1:400] - stored.next_observations[:399]).max(axis=(1, 2))
    assert np.flatnonzero(following).tolist() == [199]
    returns = example.main(["--episodes", "2", "--updates", "3", "--timesteps", "5"])
    assert list(returns) == ["recorded", "offline", "then online", "without data"]
    assert all(-2000.0 < value < 0.0 for value in returns.values())
