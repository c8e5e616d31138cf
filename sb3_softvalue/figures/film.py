"""A film of the policy with V(s) and the soft return."""

import pathlib
from typing import Any

import numpy as np
from stable_baselines3.common.type_aliases import GymEnv
from stable_baselines3.common.vec_env import unwrap_vec_normalize

from sb3_softvalue.diagnostics.observations import take
from sb3_softvalue.diagnostics.returns import Episode, collected_returns
from sb3_softvalue.diagnostics.state_statistics import read_states
from sb3_softvalue.figures.style import BLUE, VERMILION, new_figure
from sb3_softvalue.sacv import SACV

# Width of a frame and height of the plot beneath the picture, in inches of 100 pixels
_WIDTH, _STRIP = 3.2, 1.2


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
    :raises ImportError: if matplotlib is not installed
    :raises ValueError: if the environment does not render to arrays
    """
    figure, ((screen,), (plot,)) = new_figure("", n_rows=2)
    from matplotlib.animation import FuncAnimation, PillowWriter

    vec_env = model._wrap_env(env, monitor_wrapper=False)
    if vec_env.render_mode != "rgb_array":
        raise ValueError('A film needs rendered frames: create the environment with render_mode="rgb_array".')
    vec_normalize = unwrap_vec_normalize(vec_env)
    vec_env.seed(seed)
    observations: Any = vec_env.reset()
    pictures: list[Any] = []
    episodes = [Episode()]
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
    episodes[-1].final_observation, episodes[-1].truncated = take(observations, 0), True
    parts = []
    for episode in episodes:
        readings = read_states(model, episode.states(), n_samples=16)
        parts.append(np.stack([readings.values[:-1], collected_returns(model, episode, readings, vec_normalize)[0]]))
    curves = np.concatenate(parts, axis=1)[:, :n_steps]

    height = _WIDTH * pictures[0].shape[0] / pictures[0].shape[1] + _STRIP
    strip = _STRIP / height
    figure.set_layout_engine("none")
    figure.set_size_inches(_WIDTH, height)
    screen.set_position((0.0, strip, 1.0, 1.0 - strip))
    screen.set_axis_off()
    image = screen.imshow(pictures[0])
    plot.set_position((0.15, 0.1 * strip, 0.82, 0.7 * strip))
    low = float(curves.min())
    high = max(float(curves.max()), low + 1e-6)
    plot.set(xlim=(0, n_steps), ylim=(low, high), xticks=[], yticks=[low, high], yticklabels=[f"{low:.0f}", f"{high:.0f}"])
    drawn = [
        (plot.plot([], color=BLUE, linewidth=2.5)[0], plot.set_title("", loc="left", color=BLUE, fontsize=9), "V(s) = "),
        (plot.plot([], color=VERMILION)[0], plot.set_title("", loc="right", color=VERMILION, fontsize=9), "then collected: "),
    ]

    def show(index: int) -> None:
        image.set_data(pictures[index])
        step = index * every
        for (line, title, text), curve in zip(drawn, curves, strict=True):
            line.set_data(np.arange(step + 1), curve[: step + 1])
            title.set_text(f"{text}{curve[step]:.0f}")

    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # A GIF shows at most 50 frames per second
    fps = min(50.0, vec_env.get_attr("metadata")[0].get("render_fps", 30) / every)
    FuncAnimation(figure, show, frames=len(pictures)).save(path, PillowWriter(fps=fps), dpi=100)
