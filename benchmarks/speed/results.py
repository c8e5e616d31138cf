"""Results of throughput.py: rows of every processor beside each other in one CSV, and a picture of them."""

import csv
import pathlib
from typing import Any

# The same colour in every picture, and the order of the bars
COLOURS = {
    "sac": "#7f7f7f",
    "tqc": "#cc79a7",
    "sbx": "#009e73",
    "sacv-eager": "#e69f00",
    "sacv-auto": "#0072b2",
    "sacv-cuda_graph": "#0072b2",
    "sacv-compiled": "#d55e00",
    "sacv-mixed": "#56b4e9",
}


def merge(rows: list[dict[str, Any]], path: pathlib.Path) -> list[dict[str, Any]]:
    """
    Write the rows beside those of other processors, instead of earlier ones of the same.

    :param rows: of one run, each with its ``processor``
    :param path: of the CSV
    :return: all rows of the file, as they were written
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    others = []
    if path.is_file():
        with open(path, newline="") as file:
            others = [row for row in csv.DictReader(file) if row["processor"] != rows[0]["processor"]]
    written = [{name: f"{v:.4g}" if isinstance(v, float) else v for name, v in row.items() if v is not None} for row in rows]
    rows = [{name: v for name, v in row.items() if v != ""} for row in (*others, *written)]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return rows


def draw(rows: list[dict[str, Any]], path: pathlib.Path, title: str) -> None:
    """
    For each processor a row of two pictures: the fraction of matmul peak, which is much the same on every processor, and the
    speed-up over SB3's SAC, which is not.

    :param rows: of all measurements
    :param path: of the picture
    :param title: of the picture
    """
    from matplotlib.figure import Figure

    known = {row["algorithm"] for row in rows if "ratio to SAC" in row}
    colours = {name: colour for name, colour in COLOURS.items() if name in known}
    processors = list(dict.fromkeys(row["processor"] for row in rows))
    groups = len({label(row) for row in rows if "ratio to SAC" in row})
    figure = Figure(figsize=(max(8.0, 2.4 * groups), 3.2 * len(processors) + 0.6), layout="constrained")
    for axes_row, name in zip(figure.subplots(len(processors), 2, squeeze=False), processors, strict=True):
        own = [row for row in rows if row["processor"] == name]
        draw_bars(axes_row[0], own, "share of GEMM floor", colours)
        axes_row[0].set_ylabel("fraction of matmul peak")
        axes_row[0].set_title(name, fontsize=9, loc="left")
        axes_row[0].axhline(1.0, color="black", linewidth=0.8)
        draw_bars(axes_row[1], own, "ratio to SAC", colours)
        axes_row[1].axhline(1.0, color="black", linewidth=0.8)
        axes_row[1].set_ylabel("speed-up over SB3's SAC")
    handles = [figure.axes[0].bar(0, 0, color=colour, label=name) for name, colour in colours.items()]
    figure.suptitle(title, fontsize=12, fontweight="bold")
    figure.legend(handles=handles, loc="outside lower center", ncols=len(colours), fontsize=8, frameon=False)
    figure.savefig(path, dpi=110)


def label(row: dict[str, Any]) -> str:
    """:return: what was measured, on three lines"""
    return f"{row['measure']}\nbatch {row['batch_size']}\nwidth {row['width']}"


def draw_bars(axes: Any, rows: list[dict[str, Any]], quantity: str, colours: dict[str, str]) -> None:
    """
    :param axes: to draw on
    :param rows: of one processor
    :param quantity: column to draw, where a row has it
    :param colours: by algorithm
    """
    groups: dict[str, dict[str, float]] = {}
    for row in rows:
        if quantity in row:
            groups.setdefault(label(row), {})[row["algorithm"]] = float(row[quantity])
    for x, group in enumerate(groups.values()):
        width = 0.8 / len(group)
        for i, (name, value) in enumerate(group.items()):
            bar = axes.bar(x - 0.4 + (i + 0.5) * width, value, 0.95 * width, color=colours[name])
            axes.bar_label(bar, fmt="%.2f", fontsize=7)
    axes.set_xticks(range(len(groups)), list(groups), fontsize=7)
    axes.grid(axis="y", alpha=0.3, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
