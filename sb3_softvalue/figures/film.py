"""A film of the policy, with V(s) along the way."""

import pathlib
from typing import Any

import numpy as np
from stable_baselines3.common.type_aliases import GymEnv

from sb3_softvalue.figures.style import BLUE, VERMILION
from sb3_softvalue.sacv import SACV


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
