"""The command line: RL Zoo's front-ends with SACV, ``report``, and errors in one sentence."""

import argparse
import importlib
import runpy
import sys
import traceback
from typing import NamedTuple

from sb3_softvalue.zoo.environment import prepare


class FrontEnd(NamedTuple):
    """
    A front-end: what ``sb3-softvalue <name>`` runs.

    :param target: "module:function" for a function that reads ``sys.argv``, or "module" to run as a script
    :param summary: one line for --help
    :param example: example arguments for --help
    """

    target: str
    summary: str
    example: str


_PENDULUM = "--algo sacv --env Pendulum-v1 -f logs"
_PLOTS = "rl_zoo3.plots"

FRONT_ENDS = {
    "train": FrontEnd("rl_zoo3.train:train", "train, continue or tune", f"{_PENDULUM} --resume runs/pendulum"),
    "enjoy": FrontEnd("rl_zoo3.enjoy:enjoy", "run a trained agent", f"{_PENDULUM} --no-render"),
    "record_video": FrontEnd("rl_zoo3.record_video", "film a trained agent", f"{_PENDULUM} -n 200"),
    "record_training": FrontEnd("rl_zoo3.record_training", "one film of all checkpoints", f"{_PENDULUM} -n 200 --gif"),
    "benchmark": FrontEnd("rl_zoo3.benchmark", "table of all trained agents", "--log-dir logs --no-hub -n 2000"),
    "plot_train": FrontEnd(f"{_PLOTS}:plot_train", "episode returns while training", "-a sacv -e Pendulum-v1 -f logs -w 10"),
    "all_plots": FrontEnd(f"{_PLOTS}:all_plots", "evaluations of all runs", "-a sacv sac -e Pendulum-v1 -f logs -o results"),
    "plot_from_file": FrontEnd(f"{_PLOTS}:plot_from_file", "figures with intervals", "-i results.pkl --rliable -o scores.svg"),
    "report": FrontEnd("sb3_softvalue.figures:main", "all figures of a run recorded by SoftValueDiagnostics", "runs/pendulum"),
    "push_to_hub": FrontEnd("rl_zoo3.push_to_hub", "upload to the Hugging Face hub", f"{_PENDULUM} -orga YOUR_NAME"),
    "load_from_hub": FrontEnd("rl_zoo3.load_from_hub", "download from the hub", f"{_PENDULUM} -orga NAME"),
}

# Packages whose errors are shown as one sentence; {} is the first line of the error message. These packages check the user's
# input or report missing requirements. All other errors keep their traceback.
_SENTENCES = {
    **dict.fromkeys(
        ("sb3_softvalue", "rl_zoo3", "stable_baselines3", "sb3_contrib", "gymnasium", "optuna", "huggingface_sb3"), "{}"
    ),
    "yaml": "the hyperparameter file is not valid YAML ({}).",
    "sqlalchemy": "the study's storage cannot be used ({}): check the address in --storage and that its server is running.",
    "huggingface_hub": "the Hugging Face hub refused the request ({}): check the name, or log in with `hf auth login`.",
    "httpx": "the Hugging Face hub cannot be reached ({}): check the network.",
    "requests": "the Hugging Face hub cannot be reached ({}): check the network.",
    "pygame": 'the environment cannot render ({}): use --no-render, or pip install "gymnasium[classic-control]".',
    "moviepy": 'the video cannot be written ({}): pip install "sb3_softvalue[zoo]", or set FFMPEG_BINARY.',
    **dict.fromkeys(
        ("mujoco", "OpenGL", "glfw"),
        "MuJoCo cannot render ({}): install EGL (Debian: apt-get install libegl1), or set MUJOCO_GL to egl, osmesa or glfw.",
    ),
}


def main() -> None:
    """Run the front-end named on the command line."""
    args = _parser().parse_args()
    front_end = FRONT_ENDS[args.front_end]
    sys.argv = [f"sb3-softvalue {args.front_end}", *args.arguments]
    try:
        if front_end.target.startswith("rl_zoo3"):
            prepare(args.front_end)
        module, _, function = front_end.target.partition(":")
        if not function:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        elif code := getattr(importlib.import_module(module), function)():
            sys.exit(code)
    except Exception as error:
        sentence = None if args.traceback else _sentence(error)
        if sentence is None:
            raise
        sys.exit(f"sb3-softvalue {args.front_end}: {sentence}")


def _parser() -> argparse.ArgumentParser:
    examples = [
        f"  {front_end.summary}:\n    sb3-softvalue {name} {front_end.example}" for name, front_end in FRONT_ENDS.items()
    ]
    parser = argparse.ArgumentParser(
        prog="sb3-softvalue",
        description="RL Zoo's front-ends with the algorithm sacv.",
        epilog="front-ends, each with an example (`sb3-softvalue <front-end> --help` lists its options):\n"
        + "\n".join(examples),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--traceback", action="store_true", help="show the traceback of an error (default: one sentence)")
    parser.add_argument("front_end", choices=FRONT_ENDS, metavar="front-end", help=", ".join(FRONT_ENDS))
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="arguments of the front-end")
    return parser


def _sentence(error: Exception) -> str | None:
    """
    :param error: error of a front-end
    :return: what is wrong and what to do; None if only a traceback helps
    """
    message = str(error).strip().split("\n")[0]
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    if isinstance(error, ModuleNotFoundError):
        return f'{message}: install it (pip install "sb3_softvalue[zoo]", or ".[zoo]" in a clone, installs what RL Zoo needs).'
    if isinstance(error, (NameError, SyntaxError)) and any(frame.f_globals.get("StoreDict") for frame in frames[-2:]):
        return f"{message}: values are Python expressions, quote a string twice as in -params learning_rate:\"'lin_3e-4'\"."
    if isinstance(error, (IndexError, ValueError)) and any(
        frame.f_globals.get("__name__") == "rl_zoo3.plots.plot_from_file" for frame in frames
    ):
        return (
            f"{message}: --rliable needs evaluations of several runs, and --versus of two algorithms (all_plots -a sac sacv)."
        )
    # A module that runs as a script is named __main__; its spec has the real name
    raised_in = frames[-1].f_globals
    spec = raised_in.get("__spec__")
    names = (spec.name if spec else raised_in.get("__name__", ""), type(error).__module__)
    template = next((_SENTENCES[root] for name in names if (root := name.split(".")[0]) in _SENTENCES), None)
    return template.format(message) if template and message else None
