"""
The pictures of README.md and of the documentation, into docs/images/: trains Pendulum-v1 as examples/pendulum.py does and
draws it small, and draws the networks and losses of SACV and a summary of benchmarks/results/speed.

    python docs/make_images.py                   # all, about ten minutes
    python docs/make_images.py --folder runs/pendulum   # the run that is there, without training
    python docs/make_images.py --drawings        # only what needs no run
"""

import argparse
import csv
import io
import pathlib
import sys
import tempfile

import gymnasium as gym
import numpy as np
from matplotlib.gridspec import GridSpec
from matplotlib.patches import FancyBboxPatch
from PIL import Image

from sb3_softvalue import SACV, figures
from sb3_softvalue.diagnostics import Calibration, Recording

HERE = pathlib.Path(__file__).parent
IMAGES = HERE / "images"
SPEED = HERE.parent / "benchmarks" / "results" / "speed"
# So that the text can be read in a third of a page
SIZE, DPI = (5.2, 4.0), 100
TIMESTEPS = 80_000


class Hanging(gym.Wrapper):
    """The pendulum hangs at rest at first, and fills the picture."""

    def reset(self, **kwargs):
        _, info = self.env.reset(**kwargs)
        pendulum = self.unwrapped
        pendulum.state = np.array([np.pi, 0.0])
        return pendulum._get_obs(), info

    def render(self):
        return self.env.render()[110:390, 80:420]


def save(figure, name: str) -> None:
    """Write a figure as a small PNG."""
    png = io.BytesIO()
    figure.savefig(png, dpi=DPI)
    Image.open(png).convert("RGB").quantize(128).save(IMAGES / f"{name}.png", optimize=True)


def draw_run(folder: pathlib.Path) -> None:
    """The pictures and the film of a run of examples/pendulum.py."""
    recording, calibration = Recording.load(folder), Calibration.load(folder)
    print(calibration)
    for name, figure in (
        ("value_landscape", figures.value_landscape(recording)),
        ("calibration", figures.calibration(recording, calibration)),
        ("learning_curve", figures.learning_curve(recording)),
    ):
        if name == "calibration":  # the scatter alone
            figure.axes[1].remove()
            figure.axes[0].set_subplotspec(GridSpec(1, 1, figure=figure)[0])
        figure.suptitle(figure.get_suptitle().partition(":")[0], fontweight="bold")
        figure.set_size_inches(SIZE)
        save(figure, name)
    # Long enough for the return collected after the film to be complete
    env = Hanging(gym.make("Pendulum-v1", render_mode="rgb_array", max_episode_steps=1000))
    figures.save_gif(SACV.load(folder / "model"), env, IMAGES / "pendulum.gif", n_steps=100, every=2, look_ahead=500)


def how_it_works() -> None:
    """Networks, losses, and what each reads."""
    figure, grid = figures.new_figure("The networks of SACV and their losses", height=5.2)
    axes = grid[0, 0]
    axes.set(xlim=(0, 16), ylim=(-0.3, 9.2))
    axes.set_axis_off()
    boxes = {
        "buffer": (1.7, 4.6, "replay buffer\n$s, a, r, s', d$", figures.GREY),
        "actor": (6.2, 8.0, "actor  $\\pi(a\\,|\\,s)$", figures.BLUE),
        "critics": (6.2, 5.4, "critics  $Q_1, Q_2$", figures.BLUE),
        "value": (6.2, 2.8, "value  $V(s)$", figures.BLUE),
        "target": (6.2, 0.6, "target value  $\\bar{V}(s')$", figures.GREEN),
        "actor loss": (13.0, 8.0, "$J_\\pi = \\alpha \\log \\pi(a_\\pi|s) - \\min_i Q_i(s, a_\\pi)$", figures.ORANGE),
        "critic loss": (
            13.0,
            5.4,
            "$J_Q = \\frac{1}{2}(Q_i(s, a) - [\\,r + (1 - d)\\,\\gamma \\bar{V}(s')\\,])^2$",
            figures.ORANGE,
        ),
        "value loss": (
            13.0,
            2.8,
            "$J_V = \\frac{1}{2}(V(s) - [\\min_i Q_i(s, a_\\pi) - \\alpha \\log \\pi\\,])^2$",
            figures.ORANGE,
        ),
    }
    half = {name: 2.85 if "loss" in name else 1.9 if name != "buffer" else 1.5 for name in boxes}
    for name, (x, y, text, colour) in boxes.items():
        patch = FancyBboxPatch(
            (x - half[name], y - 0.62), 2 * half[name], 1.24, boxstyle="round,pad=0.05", facecolor="white", edgecolor=colour
        )
        patch.set_linewidth(2)
        axes.add_patch(patch)
        axes.text(x, y, text, ha="center", va="center", fontsize=9.5)

    def arrow(start, end, colour, label="", style="-", at=(0.0, 0.0), curve=0.0):
        axes.annotate(
            "",
            end,
            start,
            arrowprops=dict(
                arrowstyle="-|>", color=colour, linestyle=style, linewidth=1.6, connectionstyle=f"arc3,rad={curve}", shrinkB=0
            ),
        )
        if label:
            axes.text(*at, label, color=colour, fontsize=9, ha="center", va="center")

    def side(name, direction, dy=0.0):
        x, y, *_ = boxes[name]
        return x + direction * (half[name] + 0.08), y + dy

    for name, label, at in (
        ("actor", "$s$", (3.5, 6.7)),
        ("critics", "$s, a$", (3.98, 5.65)),
        ("value", "$s$", (4.0, 3.85)),
        ("target", "$s'$", (3.5, 2.2)),
    ):
        arrow(side("buffer", 1), side(name, -1), figures.GREY, label, at=at)
    for name, loss in (("actor", "actor loss"), ("critics", "critic loss"), ("value", "value loss")):
        arrow(side(name, 1), side(loss, -1), figures.BLUE)
    arrow(side("critics", 1, 0.3), side("actor loss", -1, -0.4), figures.GREY, style="--")
    arrow(side("critics", 1, -0.3), side("value loss", -1, 0.2), figures.GREY, style="--")
    arrow(side("actor", 1, -0.4), side("value loss", -1, 0.5), figures.GREY, style="--")
    arrow(side("target", 1), side("critic loss", -1, -0.4), figures.GREY, style="--")
    arrow((7.2, 2.1), (7.2, 1.3), figures.GREEN, "$\\bar{V} \\leftarrow \\tau V + (1 - \\tau)\\bar{V}$", at=(5.6, 1.72))
    legend = (
        ("trained by this loss", figures.BLUE, "-"),
        ("read, not trained", figures.GREY, "--"),
        ("copied slowly", figures.GREEN, "-"),
    )
    for index, (text, colour, style) in enumerate(legend):
        y = 1.2 - 0.6 * index
        axes.plot([11.6, 12.6], [y, y], color=colour, linestyle=style, linewidth=1.6)
        axes.text(12.8, y, text, fontsize=9, va="center")
    save(figure, "how_it_works")


def speed_summary() -> None:
    """``learn()`` against SB3's SAC and the fraction of matmul peak, on one CPU and one GPU."""
    panels = (
        ("throughput-cpu-2-threads.csv", "Intel(R) Xeon(R)", "2 CPU cores (Intel Xeon, AMX)"),
        ("throughput-cuda-1-threads.csv", "NVIDIA H100", "NVIDIA H100"),
    )
    contenders = {
        "SB3 SAC": (figures.GREY, "sac", ("sac",)),
        "SBX SAC (JAX)": (figures.GREEN, "sbx", ()),
        "SACV": (figures.BLUE, "sacv-auto", ("sacv-cuda_graph", "sacv-compiled")),
        "SACV, bfloat16": ("#56B4E9", "sacv-mixed", ("sacv-mixed",)),
    }
    figure, grid = figures.new_figure("HalfCheetah-v5, batch 256, two layers of 256 units", 1, 2, height=3.4)
    learning, peak = grid[0]
    for x, (file, processor, _) in enumerate(panels):
        with open(SPEED / file, newline="") as opened:
            rows = [row for row in csv.DictReader(opened) if row["processor"].startswith(processor)]
        updates = {row["algorithm"]: row for row in rows if row["measure"] == "updates/s"}
        learns = {row["algorithm"]: row for row in rows if row["measure"].startswith("learn()")}
        for i, (colour, learn, update) in enumerate(contenders.values()):
            bar = {"width": 0.19, "color": colour}
            if learn in learns:
                value = float(learns[learn]["ratio to SAC"])
                axes_bar = learning.bar(x + 0.2 * (i - 1.5), value, **bar)
                learning.bar_label(axes_bar, fmt="%.3g ×" if value >= 1.005 else "1 ×", fontsize=9)
            name = next((name for name in update if name in updates), None)
            if name:
                axes_bar = peak.bar(x + 0.2 * (i - 1.5), 100 * float(updates[name]["share of GEMM floor"]), **bar)
                peak.bar_label(axes_bar, fmt="%.0f %%", fontsize=9)
    learning.set_title("speed-up of learn(), compilation included", fontsize=10)
    peak.set_title("one update: % of matmul peak", fontsize=10)
    for axes in (learning, peak):
        axes.set_xticks(range(len(panels)), [label for *_, label in panels], fontsize=9)
        axes.grid(axis="x", visible=False)
        axes.margins(y=0.12)
    handles = [learning.bar(0, 0, color=colour, label=name) for name, (colour, *_) in contenders.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    save(figure, "speed")


def main() -> None:
    """Train, unless there is a run, and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=pathlib.Path, help="of a run of examples/pendulum.py (default: trains one)")
    parser.add_argument("--drawings", action="store_true", help="only what needs no run")
    options = parser.parse_args()
    IMAGES.mkdir(exist_ok=True)
    how_it_works()
    speed_summary()
    if options.drawings:
        return
    if options.folder:
        draw_run(options.folder)
        return
    sys.path.insert(0, str(HERE.parent / "examples"))
    import pendulum

    with tempfile.TemporaryDirectory() as folder:
        pendulum.main(["--folder", folder, "--timesteps", str(TIMESTEPS)])
        draw_run(pathlib.Path(folder))


if __name__ == "__main__":
    main()
