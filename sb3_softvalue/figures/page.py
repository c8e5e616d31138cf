"""All figures of a run as files, and one page with them and the numbers."""

import argparse
import base64
import html
import io
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from sb3_softvalue.diagnostics import CALIBRATION_FILE, Calibration, Recording
from sb3_softvalue.figures.runs import Recordings, as_list, tenth_mean, titled
from sb3_softvalue.figures.training import action_usage, entropy, learning_curve, temperature
from sb3_softvalue.figures.values import calibration, value_along_episode, value_landscape

# What the page says about each figure; the function's name is that of the file
_FIGURES: dict[Callable[..., Any], str] = {
    learning_curve: "Return of each training episode, with sampled actions; the deterministic policy usually does better. "
    "Dots are episodes, the line is their rolling mean.",
    entropy: "How random the policy is, in nats (natural units of information). It falls as the policy becomes more "
    "deterministic; a learned α keeps it near the target entropy.",
    action_usage: "How often each action is used, and how that changes during training. Mass at both bounds means bang-bang "
    "control: full force in one direction or the other.",
    temperature: "The temperature α: the reward that one nat of entropy is worth. A learned α rises while the entropy is "
    "below its target and falls while it is above.",
    calibration: "The soft return is the discounted sum of rewards and entropy bonuses from a state. A perfect V has its "
    "points around the dashed line. Slope below 1: V varies too much. Bias above 0: V over-estimates.",
    value_along_episode: "V and its regression target min Q − α·log π should agree; the target network V̄ follows V with a "
    "small lag.",
    value_landscape: "V over the state space: high values are bright, arrows are the policy's actions.",
}


def report(
    run_dirs: str | pathlib.Path | Sequence[str | pathlib.Path],
    output: str | pathlib.Path | None = None,
    film: str | pathlib.Path | None = None,
) -> pathlib.Path:
    """
    Write all figures of a run as PNG files, and one HTML page with the figures and a table.

    :param run_dirs: folder of a run; several folders are seeds of one experiment, shown as a band
    :param output: folder to write to; None uses ``report`` in the (first) run's folder
    :param film: GIF to show at the top of the page, for instance from ``save_gif``
    :return: the HTML file
    :raises FileNotFoundError: if a folder contains no recording
    :raises ValueError: if a recording contains no finished episode
    """
    folders = [pathlib.Path(run_dir) for run_dir in ([run_dirs] if isinstance(run_dirs, str | pathlib.Path) else run_dirs)]
    recordings = [Recording.load(folder) for folder in folders]
    for folder, recording in zip(folders, recordings, strict=True):
        if recording.n_episodes == 0:
            raise ValueError(f"The recording in {folder} contains no finished episode: train longer.")
    frozen = [Calibration.load(folder) for folder in folders if (folder / CALIBRATION_FILE).is_file()]
    output = folders[0] / "report" if output is None else pathlib.Path(output)
    output.mkdir(parents=True, exist_ok=True)
    pooled = Calibration.pool(frozen) if frozen else None
    sections = []
    for draw, explanation in _FIGURES.items():
        if draw is value_landscape and not recordings[0].landscape:
            continue
        figure = draw(recordings, pooled) if draw is calibration else draw(recordings)
        figure.savefig(output / f"{draw.__name__}.png")
        if draw is calibration and pooled is not None:
            explanation += " " + verdict(pooled)
        # The page shows the title as a heading
        title = figure.get_suptitle().partition(":")[0]
        figure.suptitle("")
        png = io.BytesIO()
        figure.savefig(png, format="png")
        sections.append((title, explanation, "png", png.getvalue()))
    if film is not None:
        explanation = "The deterministic policy. Beneath: V(s) at each step, and the soft return collected from there."
        sections.insert(0, ("The trained policy", explanation, "gif", pathlib.Path(film).read_bytes()))
    page = output / "index.html"
    page.write_text(html_page(recordings, frozen, sections), encoding="utf-8")
    return page


def verdict(calibration: Calibration) -> str:
    """:return: one sentence on whether V is well calibrated"""
    spread = float(calibration.collected.std())
    good = 0.9 <= calibration.slope <= 1.1 and abs(calibration.bias) <= 0.1 * spread
    return (
        f"This V is {'well' if good else 'not well'} calibrated: slope {calibration.slope:.2f} (0.9 to 1.1 is good), bias "
        f"{calibration.bias:+.3g} (up to {0.1 * spread:.2g}, a tenth of the spread of the returns, is good)."
    )


def numbers(recordings: Recordings, frozen: Sequence[Calibration] = ()) -> dict[str, str]:
    """
    :param recordings: recordings of one run or of several seeds
    :param frozen: calibration of each, from ``evaluate_values``
    :return: rows of the report's table, name to value
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
        first, last = (
            over_runs([tenth_mean(recording.episodes[name], part) for recording in recordings], style) for part in (0, 9)
        )
        rows[label] = f"{first} → {last}"
    for name, label in (
        ("value_slope", "V's slope while training, last tenth"),
        ("value_bias", "V's bias while training, last tenth (scaled reward)"),
        ("value_gap", "V − (min Q − α·log π), last tenth (scaled reward)"),
        ("target_lag", "lag |V − V̄|, last tenth (scaled reward)"),
        ("bootstrapped", "weight of the bootstrapped V in the soft return (time limits)"),
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

    :param argv: arguments; None uses those of the process
    :return: exit status
    """
    parser = argparse.ArgumentParser(
        prog="sb3-softvalue report",
        description="Draw all figures of a run that SoftValueDiagnostics(RUN_DIR) recorded, on one HTML page.",
    )
    parser.add_argument("run_dirs", nargs="+", metavar="RUN_DIR", help="folder of a run; several are seeds, shown as a band")
    parser.add_argument("--output", help="folder to write to (default: report/ in the first run's folder)")
    parser.add_argument("--film", help="GIF to show at the top of the page (default: none)")
    arguments = parser.parse_args(argv)
    try:
        page = report(arguments.run_dirs, arguments.output, arguments.film)
    except (ImportError, FileNotFoundError, ValueError) as error:
        parser.exit(1, f"{error}\n")
    print(f"Wrote {page}")
    return 0


def over_runs(values: Sequence[float], style: str) -> str:
    """:return: the value of one run, or mean and range over several"""
    mean, low, high = (format(float(value), style) for value in (np.mean(values), min(values), max(values)))
    return mean if len(values) == 1 else f"{mean} ({low} to {high})"


def html_page(recordings: list[Recording], frozen: list[Calibration], sections: list[tuple[str, str, str, bytes]]) -> str:
    """
    :param recordings: recordings of one run or of several seeds
    :param frozen: calibration of each, from ``evaluate_values``
    :param sections: title, explanation, format ("png" or "gif") and content of each picture
    :return: a self-contained HTML page
    """
    table = "\n".join(
        f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>"
        for name, value in numbers(recordings, frozen).items()
    )
    figures = "\n".join(
        f"<h2>{html.escape(title)}</h2><p>{html.escape(explanation)}</p>"
        f'<img class="{kind}" src="data:image/{kind};base64,{base64.b64encode(content).decode()}" alt="{html.escape(title)}">'
        for title, explanation, kind, content in sections
    )
    title = html.escape(titled(recordings, "Report"))
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 56rem; margin: 2rem auto; padding: 0 1rem; color: #222; }}
h2 {{ font-size: 1.1rem; margin-top: 2.5rem; }}
img.png {{ width: 100%; height: auto; }}
img.gif {{ max-width: 100%; }}
table {{ border-collapse: collapse; }}
th, td {{ text-align: left; font-weight: normal; padding: .2rem 1.5rem .2rem 0; border-bottom: 1px solid #ddd; }}
td {{ font-variant-numeric: tabular-nums; }}
</style></head><body>
<h1>{title}</h1>
<p>{len(recordings)} run{"s" if len(recordings) > 1 else ""}. V, V̄, Q and soft returns are discounted and include
the entropy bonus. Their unit is <em>scaled reward</em>: the reward after <code>reward_scale</code> and
<code>VecNormalize</code>.</p>
<table>
{table}
</table>
{figures}
</body></html>
"""
