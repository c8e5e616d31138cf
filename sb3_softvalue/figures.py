"""The pictures of a run, drawn from what ``SoftValueDiagnostics`` recorded. Only this module needs matplotlib."""

import argparse
import base64
import html
import io
import pathlib
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from stable_baselines3.common.type_aliases import GymEnv

from sb3_softvalue.diagnostics import Calibration, Recording, calibration_line
from sb3_softvalue.sacv import SACV

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe & Ito 2008, distinguishable under the common colour blindnesses
BLUE, ORANGE, GREEN, VERMILION, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#7F7F7F"
_WIDTH, _HEIGHT, _DPI = 8.0, 4.0, 110
# Rows of the action figure
_MAX_ACTION_DIMS = 4

# Names and units of the coordinates and of the actions of well-known tasks
_STATE_LABELS = {
    "Pendulum-v1": ("angle from upright (rad)", "angular velocity (rad/s)"),
    "MountainCarContinuous-v0": ("position (track units)", "velocity (track units per step)"),
}
_ACTION_LABELS = {
    "Pendulum-v1": ["torque (N·m)"],
    "MountainCarContinuous-v0": ["force (share of the motor's)"],
    "Reacher-v5": ["shoulder torque (N·m)", "elbow torque (N·m)"],
}

Recordings = Recording | Sequence[Recording]


def new_figure(title: str, n_rows: int = 1, n_columns: int = 1, height: float = _HEIGHT) -> tuple["Figure", np.ndarray]:
    """
    A figure in this package's look, without pyplot's global state and without a display.

    :param title: of the whole
    :param n_rows: of axes
    :param n_columns: of axes
    :param height: inches
    :return: the figure and its axes, shape (n_rows, n_columns)
    :raises ImportError: if matplotlib is not installed
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            'Figures need matplotlib: pip install "sb3_softvalue[figures]" (or pip install matplotlib).'
        ) from error
    figure = Figure(figsize=(_WIDTH, height), dpi=_DPI, layout="constrained")
    figure.suptitle(title, fontsize=12, fontweight="bold")
    grid = figure.subplots(n_rows, n_columns, squeeze=False)
    for axes in grid.ravel():
        axes.grid(alpha=0.3, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, grid


def rolling_mean(values: np.ndarray, window: int) -> np.ndarray:
    """
    :param values: shape (n,)
    :param window: number of values up to each one, fewer at the start
    :return: trailing mean, shape (n,)
    """
    sums = np.cumsum(np.concatenate([[0.0], values]))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - window)
    return (sums[ends] - sums[starts]) / (ends - starts)


def draw_curves(
    axes: "Axes", curves: Sequence[tuple[np.ndarray, np.ndarray]], color: str, label: str, smooth: bool = True
) -> None:
    """
    One curve as points and their rolling mean; several (seeds) as their mean in a band from the lowest to the highest.

    :param axes: to draw on
    :param curves: x and y of each, x increasing
    :param color: of all
    :param label: of the line
    :param smooth: False leaves out the rolling mean
    """
    curves = [(x[np.isfinite(y)], y[np.isfinite(y)]) for x, y in curves]
    curves = [(x, y) for x, y in curves if len(x)]
    if not curves:
        return
    drawn = [(x, rolling_mean(y, max(5, len(y) // 20)) if smooth else y) for x, y in curves]
    if len(curves) == 1:
        if smooth:
            axes.plot(*curves[0], ".", color=color, alpha=0.5, markersize=5, markeredgewidth=0, label="one episode")
        axes.plot(*drawn[0], color=color, linewidth=2, label=label)
        return
    start, end = max(x[0] for x, _ in drawn), min(x[-1] for x, _ in drawn)
    grid = np.linspace(start, max(start, end), 200)
    lines = np.stack([np.interp(grid, x, y) for x, y in drawn])
    axes.fill_between(grid, lines.min(axis=0), lines.max(axis=0), color=color, alpha=0.2, linewidth=0)
    axes.plot(
        grid, lines.mean(axis=0), color=color, linewidth=2, label=f"{label}, {len(lines)} seeds (band: lowest to highest)"
    )


def learning_curve(recordings: Recordings) -> "Figure":
    """
    :param recordings: of one run, or of several seeds
    :return: the return of each episode over the time steps
    """
    recordings = _as_list(recordings)
    figure, axes = _over_time(recordings, "Learning curve", "return", BLUE, "rolling mean")
    axes.set_ylabel("return of an episode\n(sum of the task's rewards)")
    return figure


def entropy(recordings: Recordings) -> "Figure":
    """
    :param recordings: of one run, or of several seeds
    :return: the policy's entropy over the time steps, beside that of the uniform policy
    """
    recordings = _as_list(recordings)
    figure, axes = _over_time(recordings, "Entropy of the policy", "entropy", GREEN, "rolling mean")
    n_actions = len(recordings[0].info["action_low"])
    uniform = n_actions * np.log(2.0)
    axes.axhline(uniform, color=GREY, linestyle="--", linewidth=1.2, label=f"uniform policy, {uniform:.2f} nats")
    axes.legend(frameon=False, fontsize=9)
    axes.set_ylabel("entropy, squashed action in [−1, 1]\n(nats, mean over an episode)")
    return figure


def temperature(recordings: Recordings) -> "Figure":
    """
    :param recordings: of one run, or of several seeds
    :return: α over the time steps, on a logarithmic scale
    """
    recordings = _as_list(recordings)
    figure, axes = _over_time(recordings, "Temperature α", "ent_coef", VERMILION, "α at the end of each episode", smooth=False)
    if all(np.all(recording.episodes["ent_coef"] > 0.0) for recording in recordings):
        from matplotlib.ticker import LogLocator

        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
    axes.set_ylabel("α (reward per nat)")
    return figure


def action_usage(recordings: Recordings) -> "Figure":
    """
    For each dimension of the action: how often each value was used at the start and at the end, and how that drifted.

    :param recordings: of one run, or of several seeds, which are pooled
    :return: two columns, one row for each of the first four dimensions
    """
    recordings = _as_list(recordings)
    info = recordings[0].info
    labels = _action_labels(info)
    n_rows = min(len(labels), _MAX_ACTION_DIMS)
    figure, grid = new_figure(_title(recordings, "Actions used"), n_rows, 2, height=_HEIGHT if n_rows == 1 else 2.6 * n_rows)
    early, late = (_pooled_usage(recordings, part) for part in (slice(0, 1), slice(9, 10)))
    drift = _pooled_usage(recordings, slice(0, 10))
    for dim, (usage_axes, drift_axes) in enumerate(grid[:n_rows]):
        low, high = info["action_low"][dim], info["action_high"][dim]
        edges = np.linspace(low, high, early.shape[2] + 1)
        usage_axes.stairs(early[0, dim], edges, color=ORANGE, linewidth=2, label="first tenth of the episodes")
        usage_axes.stairs(late[0, dim], edges, color=BLUE, fill=True, alpha=0.45, label="last tenth of the episodes")
        usage_axes.set(xlabel=labels[dim], ylabel="share of the steps", xlim=(low, high))
        image = drift_axes.pcolormesh(np.linspace(0, 100, 11), edges, drift[:, dim].T, cmap="viridis")
        drift_axes.set(xlabel="training (% of the episodes)", ylabel=labels[dim])
        drift_axes.grid(False)
        figure.colorbar(image, ax=drift_axes, label="share of the steps")
    top = grid[0, 0]
    top.set_ylim(top=1.35 * max(early[0, 0].max(), late[0, 0].max()))
    top.legend(frameon=False, fontsize=9, loc="upper center")
    return figure


def calibration(recordings: Recordings, frozen: Calibration | None = None) -> "Figure":
    """
    V against the soft return collected, and the bias of V over the training.

    :param recordings: of one run, or of several seeds, whose states are pooled
    :param frozen: from ``evaluate_values``; without it the states of the last tenth of the episodes are shown, during which
        the policy still changed
    :return: scatter on the left, bias over time on the right
    """
    recordings = _as_list(recordings)
    figure, grid = new_figure(_title(recordings, "V(s) against the soft return collected"), 1, 2, height=4.3)
    scatter, bias = grid[0]
    values, collected = _late_states(recordings) if frozen is None else (frozen.values, frozen.collected)
    slope, mean_bias = calibration_line(values, collected)
    chosen = np.linspace(0, len(values) - 1, min(len(values), 2000)).astype(int)
    scatter.scatter(values[chosen], collected[chosen], s=8, color=BLUE, alpha=0.3, linewidths=0, rasterized=True)
    ends = np.array([min(values.min(), collected.min()), max(values.max(), collected.max())])
    scatter.plot(ends, ends, color="black", linestyle="--", linewidth=1.2, label="calibrated")
    if np.isfinite(slope):
        ends = np.array([values.min(), values.max()])
        line = collected.mean() + slope * (ends - values.mean())
        scatter.plot(ends, line, color=VERMILION, linewidth=2, label=f"slope {slope:.2f}, bias {mean_bias:+.2g}")
    scatter.set(xlabel="V(s) (soft value, scaled reward)", ylabel="soft return collected (scaled reward)")
    scatter.set_title("policy frozen" if frozen is not None else "last tenth of the training", fontsize=10)
    scatter.legend(frameon=False, fontsize=9)

    draw_curves(bias, _curves(recordings, "value_bias"), VERMILION, "rolling mean")
    bias.axhline(0.0, color="black", linestyle="--", linewidth=1.2)
    bias.set_title("during training", fontsize=10)
    if len(bias.lines) > 1:  # not when all was warm-up
        bias.legend(frameon=False, fontsize=9)
    bias.set(xlabel="time steps", ylabel="V(s) − soft return collected\n(above 0: over-estimation)")
    _shorten_ticks(bias)
    return figure


def value_along_episode(recordings: Recordings) -> "Figure":
    """
    What V, V̄ and the critics said along an episode, beside the soft return that then came.

    :param recordings: of one run; of several the first is shown
    :return: the last episode of which states were kept
    """
    recordings = _as_list(recordings)
    states = recordings[0].states
    last = states["episode"] == states["episode"].max()
    figure, grid = new_figure(_title(recordings[:1], f"V(s) along episode {states['episode'].max() + 1}"))
    axes = grid[0, 0]
    steps = states["step"][last]
    axes.plot(steps, states["soft_return"][last], color="black", linestyle="--", label="soft return collected from s on")
    axes.plot(steps, states["value"][last], color=BLUE, linewidth=2, label="V(s)")
    axes.plot(steps, states["target_value"][last], color=ORANGE, linewidth=1.5, label="target V̄(s)")
    axes.plot(steps, states["soft_q_value"][last], color=GREEN, linestyle=":", linewidth=2, label="min Q − α·log π")
    axes.set(xlabel="step of the episode", ylabel="soft value\n(discounted, scaled reward)")
    axes.legend(frameon=False, fontsize=9)
    return figure


def value_landscape(recording: Recording) -> "Figure":
    """
    V over the state space of a task with two or three dimensions, with the policy's action as arrows: along y for one
    dimension (as a torque changes a velocity), else the first two dimensions. Dots are the states visited last.

    :param recording: of a run on such a task
    :return: the map
    :raises ValueError: if the task has more dimensions
    """
    if not recording.landscape:
        raise ValueError("A landscape needs a task whose observations are two or three numbers, such as Pendulum-v1.")
    x, y, values, actions = (recording.landscape[name] for name in ("x", "y", "values", "actions"))
    figure, grid = new_figure(_title([recording], "V(s) over the state space"), height=4.8)
    axes = grid[0, 0]
    axes.grid(False)
    image = axes.pcolormesh(x, y, values, cmap="viridis", shading="gouraud")
    figure.colorbar(image, ax=axes, label="V(s) (soft value, scaled reward)")

    coordinates = _coordinates(recording)
    axes.plot(*coordinates[-400:].T, ".", color="white", markersize=3, alpha=0.5)
    every = (slice(2, None, 4), slice(2, None, 4))
    half_range = (np.array(recording.info["action_high"]) - np.array(recording.info["action_low"])) / 2.0
    arrows = (actions / half_range)[every]
    vertical = arrows[..., 0] if arrows.shape[-1] == 1 else arrows[..., 1]
    horizontal = np.zeros_like(vertical) if arrows.shape[-1] == 1 else arrows[..., 0]
    axes.quiver(
        x[every[1]],
        y[every[0]],
        horizontal,
        vertical,
        color="black",
        scale=24,
        width=0.003,
        headwidth=4,
        headlength=5,
        pivot="mid",
    )
    x_label, y_label = _state_labels(recording)
    axes.set(xlabel=x_label, ylabel=y_label, xlim=(x[0], x[-1]), ylim=(y[0], y[-1]))
    action = _action_labels(recording.info)[0] if arrows.shape[-1] == 1 else "the first two actions"
    axes.set_title(f"arrows: {action} of the policy; dots: states visited last", fontsize=10)
    return figure


# Name of the file, what to read in it, and how it is drawn
_FIGURES: dict[str, tuple[str, Callable[[list[Recording], Calibration | None], "Figure"]]] = {
    "learning_curve": (
        "Return of each episode while training, with sampled actions. Rising and then flat: learned.",
        lambda recordings, _: learning_curve(recordings),
    ),
    "entropy": (
        "How random the policy is. It falls as the policy commits itself; a learned α steers it to the target entropy.",
        lambda recordings, _: entropy(recordings),
    ),
    "action_usage": (
        "Which actions are used, and how that drifts. Mass at the bounds means bang-bang control.",
        lambda recordings, _: action_usage(recordings),
    ),
    "temperature": (
        "What one nat of entropy is worth in reward. A learned α rises while the policy is less random than the target.",
        lambda recordings, _: temperature(recordings),
    ),
    "calibration": (
        "Points on the dashed line: V says what is then collected. Slope below 1: V is spread too wide. Bias above 0: V "
        "over-estimates.",
        lambda recordings, frozen: calibration(recordings, frozen),
    ),
    "value_along_episode": (
        "V and min Q − α·log π should lie on each other; the target V̄ lags a little behind V.",
        lambda recordings, _: value_along_episode(recordings),
    ),
    "value_landscape": (
        "Where the policy expects to do well (bright), and what it does there (arrows).",
        lambda recordings, _: value_landscape(recordings[0]),
    ),
}


def report(
    run_dirs: str | pathlib.Path | Sequence[str | pathlib.Path], output: str | pathlib.Path | None = None
) -> pathlib.Path:
    """
    Write all figures of a run as PNG, and one page of HTML that holds them and the numbers.

    :param run_dirs: folder of a run; several are seeds of one experiment and shown as a band
    :param output: folder to write to; None takes ``report`` in the (first) run's folder
    :return: the HTML file
    :raises FileNotFoundError: if a folder holds no recording
    :raises ValueError: if a recording holds no finished episode
    """
    folders = [pathlib.Path(run_dir) for run_dir in ([run_dirs] if isinstance(run_dirs, str | pathlib.Path) else run_dirs)]
    recordings = [Recording.load(folder) for folder in folders]
    for folder, recording in zip(folders, recordings, strict=True):
        if recording.n_episodes == 0:
            raise ValueError(f"The recording in {folder} holds no finished episode: train for longer.")
    frozen = [Calibration.load(folder) for folder in folders if Calibration.exists(folder)]
    output = folders[0] / "report" if output is None else pathlib.Path(output)
    output.mkdir(parents=True, exist_ok=True)
    sections = []
    for name, (explanation, draw) in _FIGURES.items():
        if name == "value_landscape" and not recordings[0].landscape:
            continue
        figure = draw(recordings, Calibration.pool(frozen) if frozen else None)
        png = io.BytesIO()
        figure.savefig(png, format="png")
        (output / f"{name}.png").write_bytes(png.getvalue())
        sections.append((figure.get_suptitle(), explanation, base64.b64encode(png.getvalue()).decode()))
    page = output / "index.html"
    page.write_text(_page(recordings, frozen, sections), encoding="utf-8")
    return page


def numbers(recordings: Recordings, frozen: Sequence[Calibration] = ()) -> dict[str, str]:
    """
    :param recordings: of one run, or of several seeds
    :param frozen: calibration of each, from ``evaluate_values``
    :return: what the report's table says, name to value
    """
    recordings = _as_list(recordings)
    rows = {
        "episodes": _over_runs([recording.n_episodes for recording in recordings], ".0f"),
        "time steps": _over_runs([recording.episodes["timesteps"][-1] for recording in recordings], ".0f"),
        "training time (s)": _over_runs([recording.episodes["seconds"][-1] for recording in recordings], ".0f"),
    }
    for name, label, style in (
        ("return", "return, first → last tenth of the episodes", ".1f"),
        ("entropy", "entropy (nats), first → last tenth", ".2f"),
        ("ent_coef", "α (reward per nat), first → last tenth", ".3g"),
    ):
        tenths = [(_tenth(recording.episodes[name], 0), _tenth(recording.episodes[name], 9)) for recording in recordings]
        first, last = zip(*tenths, strict=True)
        rows[label] = f"{_over_runs(first, style)} → {_over_runs(last, style)}"
    for name, label in (
        ("value_slope", "V's slope while training, last tenth"),
        ("value_bias", "V's bias while training, last tenth (scaled reward)"),
        ("value_gap", "V − (min Q − α·log π), last tenth (scaled reward)"),
        ("target_lag", "lag |V − V̄|, last tenth (scaled reward)"),
        ("bootstrapped", "share of V's own tail in the return collected"),
    ):
        rows[label] = _over_runs([_tenth(recording.episodes[name], 9) for recording in recordings], ".3g")
    if frozen:
        rows["V's slope, policy frozen"] = _over_runs([result.slope for result in frozen], ".3f")
        rows["V's bias, policy frozen (scaled reward)"] = _over_runs([result.bias for result in frozen], "+.3g")
        rows["return, policy frozen, sampled actions"] = _over_runs([result.returns.mean() for result in frozen], ".1f")
    return rows


def save_gif(model: SACV, env: GymEnv, path: str | pathlib.Path, n_steps: int = 200, seed: int = 0, every: int = 2) -> None:
    """
    Film the deterministic policy, with V(s) along the way beneath the picture.

    :param model: trained or loaded
    :param env: with ``render_mode="rgb_array"``; with ``VecNormalize`` if the model was trained with it
    :param path: of the GIF
    :param n_steps: of the environment
    :param seed: of the environment
    :param every: show every so-many-th step
    :raises ImportError: if Pillow is not installed
    :raises ValueError: if the environment does not render to arrays
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError('A GIF needs Pillow: pip install "sb3_softvalue[figures]" (or pip install pillow).') from error
    vec_env = model._wrap_env(env, monitor_wrapper=False)
    if vec_env.render_mode != "rgb_array":
        raise ValueError('Filming needs an environment made with render_mode="rgb_array".')
    vec_env.seed(seed)
    observations: Any = vec_env.reset()
    pictures, values = {}, []
    for step in range(n_steps):
        if step % every == 0:
            pictures[step] = vec_env.render()
        values.append(float(model.predict_values(observations)[0]))
        actions, _ = model.predict(observations, deterministic=True)
        observations, _, _, _ = vec_env.step(actions)
    frames = [_frame(picture, values, step) for step, picture in pictures.items()]
    duration = 1000 * every / vec_env.get_attr("metadata")[0].get("render_fps", 30)
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    first, *rest = (Image.fromarray(frame).quantize(128) for frame in frames)
    first.save(path, save_all=True, append_images=rest, duration=max(20, round(duration)), loop=0, optimize=True)


def main(argv: Sequence[str] | None = None) -> int:
    """
    ``sb3-softvalue report RUN_DIR``.

    :param argv: arguments; None takes those of the process
    :return: exit status
    """
    parser = argparse.ArgumentParser(
        prog="sb3-softvalue report", description="Write all figures of a run and one page of HTML with its numbers."
    )
    parser.add_argument("run_dirs", nargs="+", metavar="RUN_DIR", help="folder of a run; several are seeds, drawn as a band")
    parser.add_argument("--output", help="folder to write to (default: report/ in the first run's folder)")
    arguments = parser.parse_args(argv)
    try:
        page = report(arguments.run_dirs, arguments.output)
    except (ImportError, FileNotFoundError, ValueError) as error:
        parser.exit(1, f"{error}\n")
    print(f"Wrote {page}")
    return 0


def _as_list(recordings: Recordings) -> list[Recording]:
    """:return: the recordings, at least one"""
    recordings = [recordings] if isinstance(recordings, Recording) else list(recordings)
    if not recordings or any(recording.n_episodes == 0 for recording in recordings):
        raise ValueError("There is no finished episode to draw: train for longer.")
    return recordings


def _title(recordings: list[Recording], text: str) -> str:
    """:return: what is shown, of which algorithm and task"""
    info = recordings[0].info
    return f"{text}: {info['algorithm']} on {info['task'] or 'a custom task'}"


def _curves(recordings: list[Recording], name: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """:return: time steps and a quantity of the episodes, for each recording"""
    return [(recording.episodes["timesteps"], recording.episodes[name]) for recording in recordings]


def _over_time(
    recordings: list[Recording], title: str, name: str, color: str, label: str, smooth: bool = True
) -> tuple["Figure", "Axes"]:
    """:return: a figure of one quantity of the episodes over the time steps, and its axes"""
    figure, grid = new_figure(_title(recordings, title))
    axes = grid[0, 0]
    draw_curves(axes, _curves(recordings, name), color, label, smooth)
    axes.set_xlabel("time steps")
    _shorten_ticks(axes)
    axes.legend(frameon=False, fontsize=9)
    return figure, axes


def _shorten_ticks(axes: "Axes") -> None:
    """Write 20k for 20000 on the time axis, from 0 on."""
    from matplotlib.ticker import EngFormatter

    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))


def _tenths(n_episodes: int) -> list[slice]:
    """:return: ten parts of the episodes, in order; of fewer than ten some are repeated"""
    edges = np.linspace(0, n_episodes, 11)
    return [slice(int(start), max(int(start) + 1, int(end))) for start, end in pairwise(edges)]


def _tenth(values: np.ndarray, index: int) -> float:
    """:return: mean over one tenth of the episodes; NaN where it holds none but NaN"""
    part = values[_tenths(len(values))[index]]
    part = part[np.isfinite(part)]
    return float(part.mean()) if len(part) else float("nan")


def _pooled_usage(recordings: list[Recording], tenths: slice) -> np.ndarray:
    """:return: share of the steps in each bin, shape (n_tenths, action_dim, n_bins)"""
    usage = []
    for part in range(10)[tenths]:
        counts = sum(
            recording.episodes["action_counts"][_tenths(recording.n_episodes)[part]].sum(axis=0) for recording in recordings
        )
        usage.append(counts / np.maximum(1, np.sum(counts, axis=1, keepdims=True)))
    return np.stack(usage)


def _late_states(recordings: list[Recording]) -> tuple[np.ndarray, np.ndarray]:
    """:return: V and soft return collected of the kept states in the last tenth of the episodes"""
    chosen = []
    for recording in recordings:
        start = min(_tenths(recording.n_episodes)[9].start, int(recording.states["episode"].max()))
        chosen.append((recording.states, recording.states["episode"] >= start))
    values, collected = ([states[name][late] for states, late in chosen] for name in ("value", "soft_return"))
    return np.concatenate(values).astype(np.float64), np.concatenate(collected).astype(np.float64)


def _coordinates(recording: Recording) -> np.ndarray:
    """:return: the two coordinates of the landscape for the kept states, shape (n, 2)"""
    observations = recording.states["observation"]
    if bool(recording.landscape["is_angle"]):
        return np.stack([np.arctan2(observations[:, 1], observations[:, 0]), observations[:, 2]], axis=1)
    return observations[:, :2]


def _state_labels(recording: Recording) -> tuple[str, str]:
    """:return: labels of the landscape's axes"""
    task, fixed = recording.info["task"], recording.landscape["fixed"]
    if task in _STATE_LABELS:
        return _STATE_LABELS[task]
    if bool(recording.landscape["is_angle"]):
        return "angle of observations 0 and 1 (rad)", "observation 2 (task's unit)"
    held = f", observation 2 held at {fixed[0]:.3g}" if len(fixed) else ""
    return f"observation 0 (task's unit){held}", "observation 1 (task's unit)"


def _action_labels(info: dict[str, Any]) -> list[str]:
    """:return: label of each dimension of the action"""
    return _ACTION_LABELS.get(info["task"], [f"action {dim} (task's unit)" for dim in range(len(info["action_low"]))])


def _over_runs(values: Sequence[float], style: str) -> str:
    """:return: the value of one run, or mean and range of several"""
    if len(values) == 1:
        return format(float(values[0]), style)
    return (
        f"{format(float(np.mean(values)), style)} ({format(float(min(values)), style)} to {format(float(max(values)), style)})"
    )


def _page(recordings: list[Recording], frozen: list[Calibration], sections: list[tuple[str, str, str]]) -> str:
    """
    :param sections: title, explanation and PNG in base 64 of each figure
    :return: one page of HTML that needs no other file
    """
    table = "\n".join(
        f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>"
        for name, value in numbers(recordings, frozen).items()
    )
    figures = "\n".join(
        f"<h2>{html.escape(title)}</h2><p>{html.escape(explanation)}</p>"
        f'<img src="data:image/png;base64,{png}" alt="{html.escape(title)}">'
        for title, explanation, png in sections
    )
    title = html.escape(_title(recordings, "Report"))
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 56rem; margin: 2rem auto; padding: 0 1rem; color: #222; }}
h2 {{ font-size: 1.1rem; margin-top: 2.5rem; }}
img {{ width: 100%; height: auto; }}
table {{ border-collapse: collapse; }}
th, td {{ text-align: left; font-weight: normal; padding: .2rem 1.5rem .2rem 0; border-bottom: 1px solid #ddd; }}
td {{ font-variant-numeric: tabular-nums; }}
</style></head><body>
<h1>{title}</h1>
<p>{len(recordings)} run{"s" if len(recordings) > 1 else ""}. Soft values are discounted, include the entropy, and are in the
reward's scale after <code>reward_scale</code> and <code>VecNormalize</code>.</p>
<table>
{table}
</table>
{figures}
</body></html>
"""


def _frame(picture: Any, values: list[float], step: int, width: int = 320) -> np.ndarray:
    """
    :param picture: of the environment, shape (height, width, 3)
    :param values: V along the whole film
    :param step: of this picture
    :param width: of the frame in pixels
    :return: the picture with V up to here beneath, shape (height', width, 3)
    """
    from PIL import Image, ImageDraw, ImageFont

    image = Image.fromarray(np.asarray(picture, dtype=np.uint8))
    image = image.resize((width, round(image.height * width / image.width)))
    strip, margin = 64, 8
    frame = Image.new("RGB", (width, image.height + strip), "white")
    frame.paste(image)
    draw = ImageDraw.Draw(frame)
    low, high = min(values), max(values)
    x = np.linspace(margin, width - margin, len(values))[: step + 1]
    y = image.height + strip - margin - (np.array(values[: step + 1]) - low) / max(high - low, 1e-6) * (strip - 3 * margin - 6)
    points = list(zip(x.tolist(), y.tolist(), strict=True))
    draw.line(points, fill=BLUE, width=2)
    draw.ellipse((points[-1][0] - 3, points[-1][1] - 3, points[-1][0] + 3, points[-1][1] + 3), fill=VERMILION)
    draw.text((margin, image.height + 3), f"V(s) = {values[step]:.1f}", fill="black", font=ImageFont.load_default(size=13))
    return np.asarray(frame)
