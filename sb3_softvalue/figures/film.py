"""A film of the policy with V(s) and the soft return."""

import pathlib
from typing import Any

import numpy as np
from stable_baselines3.common.type_aliases import GymEnv
from stable_baselines3.common.vec_env import unwrap_vec_normalize

from sb3_softvalue.diagnostics.observations import take
from sb3_softvalue.diagnostics.returns import Episode, collected_returns
from sb3_softvalue.diagnostics.state_statistics import read_states
from sb3_softvalue.figures.style import BLUE, GREY, VERMILION
from sb3_softvalue.sacv import SACV

# Pixels: width of a frame, height of the plot beneath the picture, left and top margin for labels, other margins
_WIDTH, _STRIP, _LEFT, _TOP, _MARGIN = 320, 120, 48, 24, 10


def save_gif(
    model: SACV,
    env: GymEnv,
    path: str | pathlib.Path,
    n_steps: int = 200,
    seed: int = 0,
    every: int = 2,
    look_ahead: int = 200,
) -> None:
    """
    Film the deterministic policy. A plot beneath the picture shows V(s) and the soft return collected from s.

    :param model: a trained or loaded model
    :param env: environment with ``render_mode="rgb_array"``; with ``VecNormalize`` if the model was trained with it
    :param path: path of the GIF
    :param n_steps: length of the film in environment steps
    :param seed: seed of the environment
    :param every: number of environment steps per frame
    :param look_ahead: number of steps to run after the film, so that the soft returns contain real rewards instead of V
    :raises ImportError: if Pillow is not installed
    :raises ValueError: if the environment does not render to arrays
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError('A GIF needs Pillow: pip install "sb3_softvalue[figures]" (or pip install pillow).') from error
    vec_env = model._wrap_env(env, monitor_wrapper=False)
    if vec_env.render_mode != "rgb_array":
        raise ValueError('A film needs rendered frames: create the environment with render_mode="rgb_array".')
    vec_normalize = unwrap_vec_normalize(vec_env)
    vec_env.seed(seed)
    observations: Any = vec_env.reset()
    pictures, episodes = [], [Episode()]
    for step in range(n_steps + look_ahead):
        if step < n_steps and step % every == 0:
            pictures.append(vec_env.render())
        episode = episodes[-1]
        episode.observations.append(take(observations, 0))
        actions, _ = model.predict(observations, deterministic=True)
        observations, rewards, dones, infos = vec_env.step(actions)
        episode.rewards.append((rewards if vec_normalize is None else vec_normalize.get_original_reward())[0])
        if dones[0]:
            episode.close(infos[0])
            episodes.append(Episode())
    if episodes[-1].rewards:
        episodes[-1].final_observation, episodes[-1].truncated = take(observations, 0), True
    else:
        episodes.pop()
    parts = []
    for episode in episodes:
        readings = read_states(model, episode.states(), n_samples=16)
        parts.append(np.stack([readings.values[:-1], collected_returns(model, episode, readings, vec_normalize)[0]]))
    curves = np.concatenate(parts, axis=1)[:, :n_steps]
    frames = [_frame(picture, curves, index * every) for index, picture in enumerate(pictures)]
    duration = 1000 * every / vec_env.get_attr("metadata")[0].get("render_fps", 30)
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    first, *rest = (Image.fromarray(frame).quantize(128) for frame in frames)
    first.save(path, save_all=True, append_images=rest, duration=max(20, round(duration)), loop=0, optimize=True)


def _frame(picture: Any, curves: np.ndarray, step: int) -> np.ndarray:
    """
    :param picture: rendered picture, shape (height, width, 3)
    :param curves: V and the soft return during the whole film, shape (2, n_steps)
    :param step: step of this picture
    :return: the picture above both curves up to this step, shape (height', width, 3)
    """
    from PIL import Image, ImageDraw, ImageFont

    image = Image.fromarray(np.asarray(picture, dtype=np.uint8))
    image = image.resize((_WIDTH, round(image.height * _WIDTH / image.width)))
    frame = Image.new("RGB", (_WIDTH, image.height + _STRIP), "white")
    frame.paste(image)
    draw, font, small = ImageDraw.Draw(frame), ImageFont.load_default(size=13), ImageFont.load_default(size=11)
    left, right, top, bottom = _LEFT, _WIDTH - _MARGIN, image.height + _TOP, image.height + _STRIP - _MARGIN
    low, high = float(curves.min()), float(curves.max())
    x = np.linspace(left, right, curves.shape[1])[: step + 1]
    y = bottom - (curves[:, : step + 1] - low) / max(high - low, 1e-6) * (bottom - top)
    draw.line([(left, top - 4), (left, bottom + 4), (right, bottom + 4)], fill=GREY, width=1)
    for value, height in ((high, top), (low, bottom)):
        draw.line([(left - 4, height), (left, height)], fill=GREY, width=1)
        draw.text((left - 8, height), f"{value:.0f}", fill="black", font=small, anchor="rm")
    for curve, colour, width in ((y[1], VERMILION, 2), (y[0], BLUE, 3)):
        draw.line(list(zip(x.tolist(), curve.tolist(), strict=True)), fill=colour, width=width)
    draw.ellipse((x[-1] - 3, y[0, -1] - 3, x[-1] + 3, y[0, -1] + 3), fill=BLUE)
    for position, text, colour in (
        (left, f"V(s) = {curves[0, step]:.0f}", BLUE),
        (_WIDTH // 2 + 4, f"then collected: {curves[1, step]:.0f}", VERMILION),
    ):
        draw.text((position, image.height + 3), text, fill=colour, font=font)
    return np.asarray(frame)
