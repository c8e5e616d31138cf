"""
The pictures of README.md: trains Pendulum-v1 as examples/pendulum.py does, and draws them small into docs/images/.

    python docs/make_images.py
"""

import io
import pathlib
import sys
import tempfile

import gymnasium as gym
import numpy as np
from matplotlib.gridspec import GridSpec
from PIL import Image

from sb3_softvalue import SACV, figures
from sb3_softvalue.diagnostics import Calibration, Recording

HERE = pathlib.Path(__file__).parent
# So that the text can be read in a third of a page
SIZE, DPI = (5.2, 4.0), 100


class Hanging(gym.Wrapper):
    """The pendulum hangs at rest at first, and fills the picture."""

    def reset(self, **kwargs):
        _, info = self.env.reset(**kwargs)
        pendulum = self.unwrapped
        pendulum.state = np.array([np.pi, 0.0])
        return pendulum._get_obs(), info

    def render(self):
        return self.env.render()[100:400, 80:420]


def main(folder: pathlib.Path, timesteps: str = "20000") -> None:
    """
    :param folder: of the run
    :param timesteps: of its training
    """
    sys.path.insert(0, str(HERE.parent / "examples"))
    import pendulum

    pendulum.main(["--folder", str(folder), "--timesteps", timesteps])
    recording, calibration = Recording.load(folder), Calibration.load(folder)
    images = HERE / "images"
    images.mkdir(exist_ok=True)
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
        png = io.BytesIO()
        figure.savefig(png, dpi=DPI)
        Image.open(png).convert("RGB").quantize(128).save(images / f"{name}.png", optimize=True)
    env = gym.make("Pendulum-v1", render_mode="rgb_array")
    figures.save_gif(SACV.load(folder / "model"), env, images / "pendulum.gif", n_steps=140, every=2)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as run:
        main(pathlib.Path(run))
