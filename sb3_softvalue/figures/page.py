"""All figures of a run as files, and one page that holds them and the numbers."""

import argparse
import base64
import html
import io
import pathlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from sb3_softvalue.diagnostics import Calibration, Recording
from sb3_softvalue.figures.runs import Recordings, as_list, tenth_mean, titled
from sb3_softvalue.figures.training import action_usage, entropy, learning_curve, temperature
from sb3_softvalue.figures.values import calibration, value_along_episode, value_landscape

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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
    page.write_text(html_page(recordings, frozen, sections), encoding="utf-8")
    return page


def numbers(recordings: Recordings, frozen: Sequence[Calibration] = ()) -> dict[str, str]:
    """
    :param recordings: of one run, or of several seeds
    :param frozen: calibration of each, from ``evaluate_values``
    :return: what the report's table says, name to value
    """
    recordings = as_list(recordings)
    rows = {
        "episodes": over_runs([recording.n_episodes for recording in recordings], ".0f"),
        "time steps": over_runs([recording.episodes["timesteps"][-1] for recording in recordings], ".0f"),
        "training time (s)": over_runs([recording.episodes["seconds"][-1] for recording in recordings], ".0f"),
    }
    for name, label, style in (
        ("return", "return, first → last tenth of the episodes", ".1f"),
        ("entropy", "entropy (nats), first → last tenth", ".2f"),
        ("ent_coef", "α (reward per nat), first → last tenth", ".3g"),
    ):
        tenths = [
            (tenth_mean(recording.episodes[name], 0), tenth_mean(recording.episodes[name], 9)) for recording in recordings
        ]
        first, last = zip(*tenths, strict=True)
        rows[label] = f"{over_runs(first, style)} → {over_runs(last, style)}"
    for name, label in (
        ("value_slope", "V's slope while training, last tenth"),
        ("value_bias", "V's bias while training, last tenth (scaled reward)"),
        ("value_gap", "V − (min Q − α·log π), last tenth (scaled reward)"),
        ("target_lag", "lag |V − V̄|, last tenth (scaled reward)"),
        ("bootstrapped", "share of V's own tail in the return collected"),
    ):
        rows[label] = over_runs([tenth_mean(recording.episodes[name], 9) for recording in recordings], ".3g")
    if frozen:
        rows["V's slope, policy frozen"] = over_runs([result.slope for result in frozen], ".3f")
        rows["V's bias, policy frozen (scaled reward)"] = over_runs([result.bias for result in frozen], "+.3g")
        rows["return, policy frozen, sampled actions"] = over_runs([result.returns.mean() for result in frozen], ".1f")
    return rows


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


def over_runs(values: Sequence[float], style: str) -> str:
    """:return: the value of one run, or mean and range of several"""
    if len(values) == 1:
        return format(float(values[0]), style)
    return (
        f"{format(float(np.mean(values)), style)} ({format(float(min(values)), style)} to {format(float(max(values)), style)})"
    )


def html_page(recordings: list[Recording], frozen: list[Calibration], sections: list[tuple[str, str, str]]) -> str:
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
    title = html.escape(titled(recordings, "Report"))
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
