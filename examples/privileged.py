"""
Learn with what only the simulator knows: a pendulum is filmed by a poor camera, and its policy gets nothing but the pictures.

    python examples/privileged.py                        # all four below, some four minutes
    python examples/privileged.py --arms privileged      # one of them

The observation has two keys. "camera" is where the camera saw the pendulum's tip in its last three pictures, with an error of
5 % of the rod's length: 3 degrees, but 0.7 rad/s in a speed computed from them. "state" is what the simulator knows: the exact
angle and angular velocity. Compared are

    all-seeing   actor, Q and V see both: possible in the simulator only
    privileged   the actor sees "camera", Q and V see both: policy_kwargs=dict(actor_keys=["camera"])
    blind        actor, Q and V see "camera"
    blind SAC    the same with SB3's SAC

The policy of all but the first runs where there is a camera only. Writes the models, the returns, what V says of an upright
pendulum at several speeds, and a picture to runs/privileged.
"""

import argparse
import pathlib
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3 import SAC
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

from sb3_softvalue import SACV
from sb3_softvalue.diagnostics import evaluate_values
from sb3_softvalue.figures import BLUE, GREEN, GREY, VERMILION, new_figure

PICTURES = 3
ERROR = 0.05  # standard deviation of each coordinate, in lengths of the rod
SECONDS = 0.05  # between two pictures, which is a step of Pendulum-v1
SPEEDS = np.arange(0.0, 3.5, 0.5)  # rad/s, at which V is read

ARMS: dict[str, tuple[type[SAC], list[str], dict[str, Any]]] = {
    "all-seeing": (SACV, ["camera", "state"], {}),
    "privileged": (SACV, ["camera", "state"], {"actor_keys": ["camera"]}),
    "blind": (SACV, ["camera"], {}),
    "blind SAC": (SAC, ["camera"], {}),
}
COLORS = dict(zip(ARMS, (GREEN, BLUE, VERMILION, GREY), strict=True))


class FilmedPendulum(gym.Wrapper):
    """
    Pendulum-v1 with a camera.

    :param start: angle (rad, 0 is upright) and angular velocity (rad/s) of each episode; None draws them as Pendulum-v1 does
    """

    def __init__(self, start: tuple[float, float] | None = None) -> None:
        super().__init__(gym.make("Pendulum-v1"))
        self.start = start
        camera = spaces.Box(-np.inf, np.inf, (2 * PICTURES,), np.float32)
        self.observation_space = spaces.Dict(camera=camera, state=self.env.observation_space)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        state, info = self.env.reset(seed=seed, options=options)
        if self.start is not None:
            angle, speed = self.start
            self.unwrapped.state = np.array(self.start)
            state = np.array([np.cos(angle), np.sin(angle), speed], dtype=np.float32)
        angle, speed = self.unwrapped.state
        before = [angle - speed * SECONDS * k for k in reversed(range(PICTURES))]
        self.pictures = deque([self._picture(one) for one in before], maxlen=PICTURES)
        return self._observation(state), info

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        state, *rest = self.env.step(action)
        self.pictures.append(self._picture(self.unwrapped.state[0]))
        return self._observation(state), *rest

    def _picture(self, angle: float) -> np.ndarray:
        return np.array([np.cos(angle), np.sin(angle)]) + ERROR * self.unwrapped.np_random.standard_normal(2)

    def _observation(self, state: np.ndarray) -> dict[str, np.ndarray]:
        return {"camera": np.concatenate(self.pictures).astype(np.float32), "state": state}


def make_env(arm: str, start: tuple[float, float] | None = None) -> gym.Env:
    """The pendulum with the keys that any network of the arm sees."""
    return gym.wrappers.FilterObservation(FilmedPendulum(start), ARMS[arm][1])


def make_model(arm: str, seed: int) -> SAC:
    """The model of an arm."""
    algorithm, _, policy_kwargs = ARMS[arm]
    return algorithm(
        "MultiInputPolicy",
        make_env(arm),
        learning_rate=1e-3,
        policy_kwargs={"net_arch": [64, 64]} | policy_kwargs,
        seed=seed,
        device="cpu",
    )


def train(model: SAC, arm: str, timesteps: int, every: int, episodes: int) -> list[dict[str, Any]]:
    """Train; give the mean return of some episodes, the same for all, at each evaluation."""
    test_env = make_vec_env(lambda: make_env(arm), episodes)
    rows: list[dict[str, Any]] = []
    start = time.process_time()

    def evaluate(*_: Any) -> bool:
        if model.num_timesteps % every == 0:
            test_env.seed(1000)
            mean, _std = evaluate_policy(model, test_env, episodes)
            seconds = time.process_time() - start
            step = model.num_timesteps
            rows.append({"arm": arm, "seed": model.seed, "timesteps": step, "return": mean, "seconds": seconds})
            print(f"{arm}: return {mean:.0f} after {step:,} steps")
        return True

    model.learn(timesteps, callback=evaluate)
    return rows


def read_value(model: SACV, arm: str, episodes: int) -> Iterator[dict[str, Any]]:
    """What V says of an upright pendulum that moves, and the soft return that the policy collects from there."""
    for speed in SPEEDS:
        env = make_vec_env(lambda speed=speed: make_env(arm, (0.0, speed)), episodes)
        calibration = evaluate_values(model, env, episodes)
        _, first = np.unique(calibration.episodes, return_index=True)
        values, collected = calibration.values[first].mean(), calibration.collected[first].mean()
        yield {"arm": arm, "seed": model.seed, "speed": speed, "value": values, "collected": collected}


Interval = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


def lowest_to_highest(runs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean of several seeds, shape (seeds, n), and the range between the lowest and the highest, shape (2, n)."""
    return runs.mean(axis=0), np.stack([runs.min(axis=0), runs.max(axis=0)])


def table(rows: list[dict[str, Any]], arm: str, x: str, y: str) -> tuple[list[Any], np.ndarray]:
    """The places x of an arm, and its numbers y there, shape (seeds, places)."""
    mine = [row for row in rows if row["arm"] == arm]
    places, seeds = (sorted({row[key] for row in mine}) for key in (x, "seed"))
    numbers = {(row["seed"], row[x]): row[y] for row in mine}
    return places, np.array([[numbers[seed, place] for place in places] for seed in seeds])


def draw(
    returns: list[dict[str, Any]], values: list[dict[str, Any]], picture: pathlib.Path, interval: Interval = lowest_to_highest
) -> None:
    """Returns over the steps of training, and V over the speed of the upright pendulum."""
    figure, (axes, *_) = new_figure("A pendulum and a poor camera", n_columns=2, height=4.5)
    for panel, rows, x, y in ((axes[0], returns, "timesteps", "return"), (axes[1], values, "speed", "value")):
        for arm, color in COLORS.items():
            if any(row["arm"] == arm for row in rows):
                places, runs = table(rows, arm, x, y)
                middle, (low, high) = interval(runs)
                panel.fill_between(places, low, high, color=color, alpha=0.2, linewidth=0)
                panel.plot(places, middle, color=color, linewidth=2, label=arm)
    if any(row["arm"] == "privileged" for row in values):
        places, runs = table(values, "privileged", "speed", "collected")
        axes[1].plot(places, interval(runs)[0], "o", color=BLUE, label="soft return of the privileged policy")
    axes[0].set(xlabel="time steps", ylabel="return, mean of 20 episodes")
    axes[1].set(xlabel="speed of the upright pendulum (rad/s)", ylabel="V")
    entries = {label: handle for panel in axes for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)}
    figure.legend(entries.values(), entries, loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    figure.savefig(picture)


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Train, read V, draw."""
    parser = argparse.ArgumentParser(description="A policy from poor pictures, with and without the simulator's help.")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--timesteps", type=int, default=10_000, help="of each run (default: %(default)s)")
    parser.add_argument("--every", type=int, default=1_000, help="steps between evaluations (default: %(default)s)")
    parser.add_argument("--episodes", type=int, default=20, help="of each evaluation (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--folder", type=pathlib.Path, default=pathlib.Path("runs/privileged"))
    options = parser.parse_args(argv)

    options.folder.mkdir(parents=True, exist_ok=True)
    th.set_num_threads(1)  # networks this small are no faster on several
    returns: list[dict[str, Any]] = []
    values: list[dict[str, Any]] = []
    for arm in options.arms:
        model = make_model(arm, options.seed)
        returns += train(model, arm, options.timesteps, options.every, options.episodes)
        model.save(options.folder / arm)
        if isinstance(model, SACV):
            values += list(read_value(model, arm, options.episodes))
    draw(returns, values, options.folder / "privileged.png")
    print(f"Look at {options.folder}")
    return returns


if __name__ == "__main__":
    main()
