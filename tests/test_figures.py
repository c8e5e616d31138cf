"""Figures: what they say, and that a report is whole."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from sb3_softvalue import SACV, figures
from sb3_softvalue.diagnostics import Calibration, Recording
from sb3_softvalue.figures import film, page

pytest.importorskip("matplotlib", reason="matplotlib is not installed")
Image = pytest.importorskip("PIL.Image")  # comes with matplotlib


def make_recording(seed: int = 0, n_episodes: int = 40, landscape: bool = True) -> Recording:
    """A made-up run of 40 episodes whose V over-estimates by exactly 3 and whose policy moves to the upper bound."""
    rng = np.random.default_rng(seed)
    progress = np.linspace(0.0, 1.0, n_episodes)
    counts = np.zeros((n_episodes, 2, 10), dtype=np.int64)
    counts[np.arange(n_episodes), :, (progress * 9).astype(int)] = 50
    recording = Recording(
        info={"task": "", "algorithm": "SACV", "gamma": 0.99, "action_low": [-2.0, -1.0], "action_high": [2.0, 1.0]},
        episodes={
            "timesteps": np.arange(1, n_episodes + 1) * 50,
            "seconds": progress * 100.0,
            "return": -100.0 * (1.0 - progress) + rng.normal(size=n_episodes),
            "entropy": 1.0 - progress,
            "ent_coef": np.exp(-progress),
            "value_bias": np.where(progress < 0.1, np.nan, 3.0),
            "value_slope": np.ones(n_episodes),
            "value_gap": np.zeros(n_episodes),
            "target_lag": np.full(n_episodes, 0.5),
            "bootstrapped": np.zeros(n_episodes),
            "terminated": np.ones(n_episodes, dtype=bool),
            "action_counts": counts,
        },
    )
    collected = rng.normal(size=n_episodes * 8) * 20.0
    recording.states = {
        "episode": np.repeat(np.arange(n_episodes), 8),
        "step": np.tile(np.arange(8) * 7, n_episodes),
        "value": collected + 3.0,
        "target_value": collected + 2.0,
        "soft_q_value": collected + 3.0,
        "soft_return": collected,
        "observation": rng.uniform(-1.0, 1.0, (n_episodes * 8, 2)),
    }
    if landscape:
        x, y = np.linspace(-1.0, 1.0, 21), np.linspace(-2.0, 2.0, 21)
        recording.landscape = {
            "x": x,
            "y": y,
            "values": x[None] * y[:, None],
            "actions": np.stack([np.tile(x, (21, 1))] * 2, axis=-1),
            "is_angle": np.array(False),
            "fixed": np.empty(0),
        }
    return recording


FIGURES: list[Callable[[Any], Any]] = [
    figures.learning_curve,
    figures.entropy,
    figures.temperature,
    figures.action_usage,
    figures.calibration,
    figures.value_along_episode,
]


@pytest.mark.parametrize("draw", [*FIGURES, figures.value_landscape])
def test_every_figure_has_a_title_and_labelled_axes(draw: Callable[[Any], Any], tmp_path: Any) -> None:
    figure = draw(make_recording())
    assert "SACV on a custom task" in figure.get_suptitle()
    for axes in figure.axes:
        if axes.get_label() != "<colorbar>":
            assert axes.get_xlabel() and axes.get_ylabel()
        else:
            assert axes.get_ylabel()
    figure.savefig(tmp_path / "figure.png")
    assert figure.get_size_inches()[0] * figure.dpi == pytest.approx(880)


@pytest.mark.parametrize("draw", FIGURES)
def test_several_seeds(draw: Callable[[Any], Any], tmp_path: Any) -> None:
    draw([make_recording(seed) for seed in range(3)]).savefig(tmp_path / "figure.png")


def test_seeds_are_a_band_from_the_lowest_to_the_highest() -> None:
    _figure, grid = figures.new_figure("test")
    x = np.array([0.0, 1.0, 2.0])
    figures.draw_curves(grid[0, 0], [(x, x), (x, x + 2.0)], figures.BLUE, "two", smooth=False)
    (line,) = grid[0, 0].lines
    np.testing.assert_allclose(line.get_ydata(), line.get_xdata() + 1.0)
    band = grid[0, 0].collections[0].get_paths()[0].vertices
    assert band[:, 1].min() == 0.0 and band[:, 1].max() == 4.0


def test_rolling_mean_by_hand() -> None:
    assert figures.rolling_mean(np.array([1.0, 3.0, 5.0, 9.0]), window=2).tolist() == [1.0, 2.0, 4.0, 7.0]


def test_calibration_says_slope_and_bias() -> None:
    scatter, bias = figures.calibration(make_recording()).axes
    assert [text.get_text() for text in scatter.get_legend().get_texts()] == ["calibrated", "slope 1.00, bias +3"]
    np.testing.assert_allclose(bias.lines[1].get_ydata(), 3.0)
    frozen = Calibration(np.arange(4.0), 2.0 * np.arange(4.0), np.zeros(4), np.zeros(4, dtype=int), np.zeros(1))
    scatter, _ = figures.calibration(make_recording(), frozen).axes
    assert scatter.get_title() == "policy frozen"
    assert scatter.get_legend().get_texts()[1].get_text() == "slope 2.00, bias -1.5"


def test_action_usage_shows_the_drift() -> None:
    recording = make_recording()
    axes = figures.action_usage(recording).axes
    first, last = (axes[0].patches[index].get_data().values for index in (0, 1))
    assert first[0] == 1.0 and last[9] > 0.2 and last[:8].sum() == 0.0
    assert axes[0].get_xlim() == (-2.0, 2.0) and axes[0].get_xlabel() == "action 0 (task's unit)"


def test_entropy_shows_the_uniform_policy() -> None:
    (axes,) = figures.entropy(make_recording()).axes
    assert axes.lines[-1].get_ydata()[0] == pytest.approx(2.0 * np.log(2.0))


def test_landscape_needs_few_dimensions() -> None:
    with pytest.raises(ValueError, match="needs observations of two or three numbers"):
        figures.value_landscape(make_recording(landscape=False))


def test_numbers_by_hand() -> None:
    rows = figures.numbers(make_recording())
    assert rows["episodes"] == "40" and rows["time steps"] == "2000"
    assert rows["entropy (nats), first → last tenth"] == "0.96 → 0.04"
    assert rows["V's bias while training, last tenth (scaled reward)"] == "3"
    rows = figures.numbers([make_recording(n_episodes=40), make_recording(n_episodes=20)])
    assert rows["episodes"] == "30 (20 to 40)"


@pytest.mark.parametrize("landscape", [True, False])
def test_report_writes_every_figure_and_one_page(landscape: bool, tmp_path: Any) -> None:
    make_recording(landscape=landscape).save(tmp_path / "run" / "diagnostics.npz")
    written = figures.report(tmp_path / "run")
    names = {path.name for path in written.parent.iterdir()}
    expected = {"learning_curve", "entropy", "action_usage", "temperature", "calibration", "value_along_episode"}
    expected |= {"value_landscape"} if landscape else set()
    assert names == {"index.html"} | {f"{name}.png" for name in expected}
    text = written.read_text(encoding="utf-8")
    assert text.count("data:image/png;base64,") == len(expected)
    assert 'src="http' not in text and "policy frozen" not in text


def test_report_of_several_runs_through_the_command(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    for seed, folder in enumerate(folders):
        make_recording(seed).save(folder / "diagnostics.npz")
        Calibration(np.arange(4.0), np.arange(4.0), np.zeros(4), np.zeros(4, dtype=int), np.zeros(1)).save(folder)
    assert figures.main([*map(str, folders), "--output", str(tmp_path / "out")]) == 0
    assert f"Wrote {tmp_path / 'out' / 'index.html'}" in capsys.readouterr().out
    text = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    assert "2 runs" in text and "policy frozen" in text


def test_errors_of_the_command(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        figures.main([str(tmp_path)])
    assert "train with the callback SoftValueDiagnostics" in capsys.readouterr().err
    Recording(info={}).save(tmp_path / "diagnostics.npz")
    with pytest.raises(SystemExit):
        figures.main([str(tmp_path)])
    assert "contains no finished episode: train longer" in capsys.readouterr().err
    with pytest.raises(ValueError, match="no finished episode to draw"):
        figures.learning_curve([])


def test_matplotlib_is_not_imported_until_a_figure_is_drawn() -> None:
    code = (
        "import sys, sb3_softvalue, sb3_softvalue.diagnostics, sb3_softvalue.figures\n"
        "assert not any(name.partition('.')[0] in ('matplotlib', 'PIL') for name in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    message = r'Figures need matplotlib: pip install "sb3_softvalue\[figures\]"'
    with pytest.raises(ImportError, match=message):
        figures.learning_curve(make_recording())
    with pytest.raises(ImportError, match=message):
        figures.save_gif(SACV("MlpPolicy", "Pendulum-v1", buffer_size=1), gym.make("Pendulum-v1"), "film.gif")


def test_film(tmp_path: Any) -> None:
    model = SACV("MlpPolicy", "Pendulum-v1", seed=0, buffer_size=1)
    with pytest.raises(ValueError, match='render_mode="rgb_array"'):
        figures.save_gif(model, gym.make("Pendulum-v1"), tmp_path / "film.gif")
    figures.save_gif(model, gym.make("Pendulum-v1", render_mode="rgb_array"), tmp_path / "film.gif", n_steps=10)
    with Image.open(tmp_path / "film.gif") as opened:
        assert opened.n_frames == 5 and opened.size == (320, 440)
        assert opened.info["duration"] == pytest.approx(67, abs=10)  # in steps of 10 ms


def test_film_shows_v_and_what_is_collected(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    figure, grid = figures.new_figure("", n_rows=2)
    monkeypatch.setattr(film, "new_figure", lambda title, n_rows: (figure, grid))
    # So small a temperature that the soft return is the return
    model = SACV("MlpPolicy", "Pendulum-v1", ent_coef=1e-12, reward_scale=0.5, gamma=0.9, seed=0, buffer_size=1)
    env = gym.make("Pendulum-v1", render_mode="rgb_array")
    figures.save_gif(model, env, tmp_path / "film.gif", n_steps=3, every=1, look_ahead=2, seed=5)
    values, collected = (line.get_ydata() for line in grid[1, 0].lines)
    assert grid[1, 0].get_title("left") == f"V(s) = {values[2]:.0f}"
    vec_env = model._wrap_env(gym.make("Pendulum-v1"), monitor_wrapper=False)
    vec_env.seed(5)
    observation, seen, rewards = vec_env.reset(), [], []
    for _ in range(5):
        seen.append(model.predict_values(observation)[0])
        observation, reward, _, _ = vec_env.step(model.predict(observation, deterministic=True)[0])
        rewards.append(0.5 * reward[0])
    total = sum(0.9**k * reward for k, reward in enumerate(rewards)) + 0.9**5 * model.predict_values(observation)[0]
    np.testing.assert_allclose(values, seen[:3], rtol=1e-5)
    assert len(collected) == 3
    assert collected[0] == pytest.approx(total, rel=1e-5)
    make_recording().save(tmp_path / "diagnostics.npz")
    text = figures.report(tmp_path, film=tmp_path / "film.gif").read_text(encoding="utf-8")
    assert text.count("data:image/gif;base64,") == 1


@pytest.mark.parametrize(("slope", "shift", "word"), [(1.0, 0.5, "well"), (1.3, 0.5, "not well"), (1.0, 5.0, "not well")])
def test_report_says_whether_v_is_calibrated(slope: float, shift: float, word: str) -> None:
    values = np.linspace(-10.0, 10.0, 100)
    said = page.verdict(Calibration(values + shift, slope * values, np.zeros(100), np.zeros(100, dtype=int), np.zeros(1)))
    assert said.startswith(f"This V is {word} calibrated: slope {slope:.2f}") and f"bias {shift:+.3g}" in said
