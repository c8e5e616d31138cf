"""Makes the zoo's front-ends work without a display, without ffmpeg, and without `python` on the path."""

import atexit
import importlib
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rl_zoo3.utils import ALGOS

from sb3_softvalue.sacv import SACV
from sb3_softvalue.zoo.registration import extend
from sb3_softvalue.zoo.resume import provide_resume


def prepare(front_end: str) -> None:
    """
    Prepare this process, whose arguments are those of a front-end of the zoo.

    :param front_end: its name
    :raises ValueError: if a requirement is missing and cannot be replaced, such as the display for ``enjoy``
    """
    if front_end == "train":
        provide_resume()
    if front_end in ("enjoy", "record_video", "push_to_hub"):
        ALGOS["sacv"] = InferenceSACV
    # Without a display MuJoCo would abort the process, and other tasks would render invisibly
    if front_end == "enjoy" and not has_display() and not {"--no-render", "-h", "--help"} & set(sys.argv):
        raise ValueError("There is no display: add --no-render, or film the agent with record_video.")
    if front_end in ("record_video", "record_training", "push_to_hub") and not has_display():
        os.environ.setdefault("MUJOCO_GL", "egl")
    if front_end in ("record_training", "benchmark"):
        extend(subprocess, "call", _call_this_launcher)
    if front_end == "record_training":
        _provide_ffmpeg_and_fonts()
    if front_end == "push_to_hub":
        _provide_generate_metadata()
    if front_end in ("plot_train", "all_plots", "plot_from_file"):
        _save_figures_without_display(front_end)


class InferenceSACV(SACV):
    """SACV for prediction: loads with ``buffer_size=1``, which the zoo sets for the algorithms that it knows only."""

    @classmethod
    def load(cls, *args: Any, **kwargs: Any) -> Any:
        return SACV.load(*args, **{"buffer_size": 1, "optimize_memory_usage": False, **kwargs})


# push_to_hub writes the name on the model card
InferenceSACV.__name__ = "SACV"


def has_display() -> bool:
    """:return: whether a window can be opened"""
    return sys.platform != "linux" or any(name in os.environ for name in ("DISPLAY", "WAYLAND_DISPLAY", "SDL_VIDEODRIVER"))


def _call_this_launcher(original: Callable[..., int], command: list[str], *args: Any, **kwargs: Any) -> int:
    """``subprocess.call``: the zoo's ``python -m rl_zoo3.X`` and ``python X.py`` lack sacv, and may run another Python."""
    launcher = [sys.executable, "-m", "sb3_softvalue.zoo"]
    if command[:3] == ["python", "-m", "rl_zoo3.record_video"]:
        command = [*launcher, "record_video", *command[3:]]
    elif command[:2] == ["python", "enjoy.py"]:
        command = [*launcher, "enjoy", *command[2:]]
    return original(command, *args, **kwargs)


def _provide_ffmpeg_and_fonts() -> None:
    """Without an ffmpeg on the path, use moviepy's; without fonts for the text that it writes into films, use Matplotlib's."""
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    if not shutil.which("ffmpeg"):
        try:
            import imageio_ffmpeg

            binary = imageio_ffmpeg.get_ffmpeg_exe()
        except (ImportError, RuntimeError) as error:
            raise ValueError(
                'record_training needs ffmpeg to join its films: pip install imageio-ffmpeg (part of "sb3_softvalue[zoo]"), '
                "or install ffmpeg (Debian: apt-get install ffmpeg)."
            ) from error
        Path(folder, "ffmpeg").symlink_to(binary)
        os.environ["PATH"] = os.pathsep.join([folder, os.environ.get("PATH", "")])
    if "FONTCONFIG_FILE" not in os.environ and not any(Path("/usr/share/fonts").rglob("*.[ot]tf")):
        from matplotlib import get_data_path

        config = Path(folder, "fonts.conf")
        fonts = f"<dir>{get_data_path()}/fonts/ttf</dir><cachedir>{folder}</cachedir>"
        config.write_text(f'<?xml version="1.0"?><fontconfig>{fonts}</fontconfig>')
        os.environ["FONTCONFIG_FILE"] = str(config)


def _provide_generate_metadata() -> None:
    """rl_zoo3 2.9.2 imports a function that sb3-team-hf-integration 3.2 has renamed."""
    # By name, because a function of the same name hides the module
    hub: Any = importlib.import_module("huggingface_sb3.push_to_hub")
    if not hasattr(hub, "generate_metadata"):
        hub.generate_metadata = lambda *args: hub._generate_metadata(*args).to_dict()


def _save_figures_without_display(front_end: str) -> None:
    """Without a display, save figures instead of showing them, in files whose names begin with the front-end's."""
    from matplotlib import pyplot as plt

    if plt.get_backend().lower() != "agg":
        return
    numbers = itertools.count(1)

    def save_instead(original: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        for figure in map(plt.figure, plt.get_fignums()):
            path = f"{front_end}-{next(numbers)}.png"
            figure.savefig(path)
            print(f"No display: figure saved to {path}")
        plt.close("all")

    extend(plt, "show", save_instead)
