"""RL Zoo's front-ends with SACV among the algorithms, ``report``, and errors in one sentence."""

import argparse
import importlib
import runpy
import sys
import traceback
from typing import NamedTuple

from sb3_softvalue.zoo.environment import prepare


class FrontEnd(NamedTuple):
    """
    What ``sb3-softvalue <name>`` runs.

    :param target: "module:function", a function that reads ``sys.argv``, or "module", which is run as a script
    :param summary: one line for --help
    :param example: arguments to copy
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
    "report": FrontEnd("sb3_softvalue.figures:main", "all figures of a recorded run", "logs/sacv/Pendulum-v1_1"),
    "push_to_hub": FrontEnd("rl_zoo3.push_to_hub", "upload to the Hugging Face hub", f"{_PENDULUM} -orga YOUR_NAME"),
    "load_from_hub": FrontEnd("rl_zoo3.load_from_hub", "download from there", f"{_PENDULUM} -orga NAME"),
}

# Packages whose errors end in one sentence; {} is the first line of the error's own message. They either check what the user
# gave or report what the machine lacks. An error of any other code keeps its traceback.
_SENTENCES = {
    **dict.fromkeys(
        ("sb3_softvalue", "rl_zoo3", "stable_baselines3", "sb3_contrib", "gymnasium", "optuna", "huggingface_sb3"), "{}"
    ),
    "yaml": "the hyperparameter file is not valid YAML ({}).",
    "sqlalchemy": "the study's storage cannot be used ({}): check the address in --storage and that its server runs.",
    "huggingface_hub": "the Hugging Face hub refused ({}): check the name, or log in with `hf auth login`.",
    "httpx": "the Hugging Face hub cannot be reached ({}): check the network.",
    "requests": "the Hugging Face hub cannot be reached ({}): check the network.",
    "pygame": 'the environment cannot draw ({}): use --no-render, or pip install "gymnasium[classic-control]".',
    "moviepy": 'the video cannot be written ({}): pip install "sb3_softvalue[zoo]", or set FFMPEG_BINARY.',
    **dict.fromkeys(
        ("mujoco", "OpenGL", "glfw"),
        "MuJoCo cannot draw ({}): install EGL (Debian: apt-get install libegl1), or set MUJOCO_GL to egl, osmesa or glfw.",
    ),
}


def main() -> None:
    """Run the front-end that the command line names."""
    args = _parser().parse_args()
    front_end = FRONT_ENDS[args.front_end]
    sys.argv = [f"sb3-softvalue {args.front_end}", *args.arguments]
    try:
        if front_end.target.startswith("rl_zoo3"):
            prepare(args.front_end, args.arguments)
        _run(front_end.target)
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
        description="RL Zoo's front-ends, with sacv among the algorithms.",
        epilog="front-ends, each with an example (`sb3-softvalue <front-end> --help` lists its options):\n"
        + "\n".join(examples),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--traceback", action="store_true", help="show where an error comes from")
    parser.add_argument("front_end", choices=FRONT_ENDS, metavar="front-end", help=", ".join(FRONT_ENDS))
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="arguments of the front-end")
    return parser


def _run(target: str) -> None:
    """
    :param target: as for ``FrontEnd``
    """
    module, _, function = target.partition(":")
    if function:
        code = getattr(importlib.import_module(module), function)()
        if code:
            sys.exit(code)
    else:
        runpy.run_module(module, run_name="__main__", alter_sys=True)


def _sentence(error: Exception) -> str | None:
    """
    :param error: what a front-end raised
    :return: what is wrong and what to do, or None where only a traceback helps
    """
    message = str(error).strip().split("\n")[0]
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    if isinstance(error, ModuleNotFoundError):
        return f'{message}: install it (pip install "sb3_softvalue[zoo]" brings what RL Zoo needs).'
    if isinstance(error, (NameError, SyntaxError)) and any(frame.f_globals.get("StoreDict") for frame in frames[-2:]):
        return f"{message}: values are Python expressions, quote a string twice as in -params learning_rate:\"'lin_3e-4'\"."
    if isinstance(error, (IndexError, ValueError)) and any(
        frame.f_globals.get("__name__") == "rl_zoo3.plots.plot_from_file" for frame in frames
    ):
        return (
            f"{message}: --rliable needs evaluations of several runs, --versus also of two algorithms (all_plots -a sac sacv)."
        )
    # A module that runs as a script is called __main__, its spec has the real name
    raised_in = frames[-1].f_globals
    spec = raised_in.get("__spec__")
    names = (spec.name if spec else raised_in.get("__name__", ""), type(error).__module__)
    template = next((_SENTENCES[root] for name in names if (root := name.split(".")[0]) in _SENTENCES), None)
    return template.format(message) if template and message else None
