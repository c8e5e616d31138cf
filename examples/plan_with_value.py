"""
What V is good for in planning: look a few steps ahead in the task's own dynamics, and let V say what follows after them.

    python examples/plan_with_value.py                         # Pendulum-v1 and HalfCheetah-v5, seven minutes
    python examples/plan_with_value.py --timesteps 2500 --seeds 2

At each step the planner tries the policy's action and the same with noise, follows the policy from there on, and takes
the best first action (random shooting around the policy). An action counts as much as its rollout of H steps:

    Σ_k γ^k·r_k, k from 0 to H-1, plus γ^H·V(s_H), unless the episode ended before s_H

V is the soft value, what is collected from s_H on with the entropy bonus. The planned steps count without a bonus: the
planner does not sample, and the return that is reported has no bonus either.

Compared at the same checkpoints, from the same start states and with the same noise: the policy alone, planning with V,
planning with nothing after the horizon, and planning with min Q(s, π(s)) instead of V, which needs no value network.
Writes the returns, their paired differences and a picture to runs/plan_with_value.
"""

import argparse
import csv
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th

from sb3_softvalue import SACV
from sb3_softvalue.figures import BLUE, GREY, ORANGE, VERMILION, new_figure

# Steps of training at which the task is played, and from how many start states
TASKS = {"Pendulum-v1": ((1500, 2500, 4000, 8000), 20), "HalfCheetah-v5": ((5000, 10_000, 20_000), 4)}
# Horizon and noise were chosen on training seeds 100 to 102, which are not among those that are shown
HORIZON, CANDIDATES, NOISE = 8, 16, 1.0
ALONE, WITH_V, WITHOUT, WITH_Q = "policy alone", "planning with V", "planning without a value", "planning with min Q"
COLORS = {ALONE: GREY, WITHOUT: VERMILION, WITH_Q: ORANGE, WITH_V: BLUE}

Values = Callable[[np.ndarray], np.ndarray]
Act = Callable[[np.ndarray, np.ndarray], np.ndarray]


class Pendulum:
    """Pendulum-v1 for many states at once."""

    def __init__(self, name: str) -> None:
        self.env: Any = gym.make(name).unwrapped

    def state(self) -> np.ndarray:
        """:return: angle (rad) and velocity (rad/s) of the environment"""
        return self.env.state

    def step(self, states: np.ndarray, actions: np.ndarray) -> tuple[np.ndarray, ...]:
        """
        :param states: shape (n, 2)
        :param actions: torque (N·m), shape (n, 1)
        :return: next states and observations, rewards and whether the episode ended, shape (n, ...) each
        """
        (angle, velocity), torque = states.T, actions[:, 0]
        cost = ((angle + np.pi) % (2 * np.pi) - np.pi) ** 2 + 0.1 * velocity**2 + 0.001 * torque**2
        velocity = np.clip(velocity + (15.0 * np.sin(angle) + 3.0 * torque) * 0.05, -8.0, 8.0)
        angle = angle + velocity * 0.05
        observations = np.stack([np.cos(angle), np.sin(angle), velocity], axis=1).astype(np.float32)
        return np.stack([angle, velocity], axis=1), observations, -cost, np.zeros(len(states), dtype=bool)


class Mujoco:
    """A MuJoCo task: the environment itself, set to one state after the other."""

    def __init__(self, name: str) -> None:
        import mujoco

        self.env: Any = gym.make(name).unwrapped
        self.mujoco = mujoco
        # Everything that the next step depends on, the solver's warm start included: steps repeat bit for bit
        self.kind = mujoco.mjtState.mjSTATE_INTEGRATION

    def state(self) -> np.ndarray:
        """:return: of the environment"""
        state = np.empty(self.mujoco.mj_stateSize(self.env.model, self.kind))
        self.mujoco.mj_getState(self.env.model, self.env.data, state, self.kind)
        return state

    def step(self, states: np.ndarray, actions: np.ndarray) -> tuple[np.ndarray, ...]:
        """As that of the pendulum."""
        steps = []
        for state, action in zip(states, actions, strict=True):
            self.mujoco.mj_setState(self.env.model, self.env.data, state, self.kind)
            observation, reward, terminated, _, _ = self.env.step(action)
            steps.append((self.state(), observation, reward, terminated))
        return tuple(np.stack(part) for part in zip(*steps, strict=True))


def plan(
    model: SACV,
    task: Pendulum | Mujoco,
    states: np.ndarray,
    observations: np.ndarray,
    values: Values,
    generator: np.random.Generator,
    horizon: int = HORIZON,
    candidates: int = CANDIDATES,
) -> np.ndarray:
    """
    :param model: whose policy is followed
    :param task: the dynamics
    :param states: of the dynamics, shape (n, ...)
    :param observations: of these states, shape (n, ...)
    :param values: of observations: what follows after the horizon
    :param generator: of the noise
    :param horizon: steps to look ahead
    :param candidates: actions that are tried in each state, the policy's own among them
    :return: the best of them, shape (n, *action_shape)
    """
    space, n = model.action_space, len(states)
    states, observations = np.repeat(states, candidates, axis=0), np.repeat(observations, candidates, axis=0)
    first, _ = model.predict(observations, deterministic=True)
    noise = NOISE * (space.high - space.low) / 2 * generator.standard_normal(first.shape)
    noise[::candidates] = 0.0
    first = actions = np.clip(first + noise, space.low, space.high).astype(np.float32)
    scores, running = np.zeros(len(states)), np.ones(len(states), dtype=bool)
    for k in range(horizon):
        # What is simulated after a terminal state does not count
        states, observations, rewards, terminated = task.step(states, actions)
        scores += model.gamma**k * running * rewards
        running &= ~terminated
        actions, _ = model.predict(observations, deterministic=True)
    scores += model.gamma**horizon * running * values(observations)
    best = scores.reshape(n, candidates).argmax(axis=1)
    return first.reshape(n, candidates, *space.shape)[np.arange(n), best]


def play(task: Pendulum | Mujoco, act: Act, starts: int, steps: int) -> np.ndarray:
    """
    :param task: the dynamics
    :param act: of states and observations, returns the actions
    :param starts: number of start states
    :param steps: of each episode
    :return: return from each start state, shape (starts,)
    """
    reset = [(task.env.reset(seed=1000 + start)[0], task.state()) for start in range(starts)]
    observations, states = (np.stack(part) for part in zip(*reset, strict=True))
    returns, running = np.zeros(starts), np.ones(starts, dtype=bool)
    for _ in range(steps):
        states, observations, rewards, terminated = task.step(states, act(states, observations))
        returns += running * rewards
        running &= ~terminated
    return returns


def compare(model: SACV, task: Pendulum | Mujoco, starts: int, steps: int) -> dict[str, np.ndarray]:
    """:return: the returns of the policy and of the planners, from the same start states, shape (starts,) each"""

    def min_q(observations: np.ndarray) -> np.ndarray:
        return model.predict_q_values(observations, model.predict(observations, deterministic=True)[0]).min(axis=1)

    def nothing(observations: np.ndarray) -> np.ndarray:
        return np.zeros(len(observations))

    returns = {ALONE: play(task, lambda _, obs: model.predict(obs, deterministic=True)[0], starts, steps)}
    for name, values in {WITHOUT: nothing, WITH_Q: min_q, WITH_V: model.predict_values}.items():
        generator = np.random.default_rng(0)
        returns[name] = play(
            task, lambda states, obs, f=values, g=generator: plan(model, task, states, obs, f, g), starts, steps
        )
    return returns


def interval(returns: np.ndarray, n_resamples: int = 2000) -> tuple[float, float, float]:
    """
    :param returns: shape (seeds, starts)
    :param n_resamples: of the seeds and of the start states, which are the same for all seeds
    :return: mean and the 95 % bootstrap interval's ends
    """
    generator = np.random.default_rng(0)
    n_seeds, starts = returns.shape
    seeds = generator.integers(n_seeds, size=(n_resamples, n_seeds, 1))
    means = returns[seeds, generator.integers(starts, size=(n_resamples, 1, starts))].mean(axis=(1, 2))
    return float(returns.mean()), *np.percentile(means, [2.5, 97.5]).tolist()


def draw(rows: list[dict[str, Any]], title: str, label: str, picture: pathlib.Path) -> None:
    """Return over the steps of training, with intervals, a panel for each task."""
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    figure, grid = new_figure(title, n_columns=len(tasks))
    for axes, task in zip(grid[0], tasks, strict=True):
        for shift, (arm, color) in zip((-0.09, -0.03, 0.03, 0.09), COLORS.items(), strict=True):
            shown = [row for row in rows if (row["task"], row["arm"], row["minus"]) == (task, arm, "")]
            mean, low, high = np.array([[row[key] for key in ("mean", "low", "high")] for row in shown]).T
            places = np.arange(len(shown))
            axes.errorbar(
                places + shift, mean, [mean - low, high - mean], color=color, marker="o", markersize=4, capsize=2, label=arm
            )
        axes.set_xticks(places, [f"{row['timesteps']:,}" for row in shown])
        axes.set(title=task, xlabel="steps of training")
    grid[0, 0].set_ylabel(label)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(picture)


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Train, play, compare and draw."""
    parser = argparse.ArgumentParser(description="How much return does planning with V add to the policy?")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="(default: %(default)s)")
    parser.add_argument("--timesteps", type=int, nargs="+", help="of training at each checkpoint (default: the task's)")
    parser.add_argument("--seeds", type=int, default=5, help="number of runs (default: %(default)s)")
    parser.add_argument("--starts", type=int, help="number of start states (default: the task's)")
    # Pendulum's whole episode; HalfCheetah's 1000 steps would take half an hour
    parser.add_argument("--steps", type=int, default=200, help="of each episode (default: %(default)s)")
    parser.add_argument(
        "--folder", type=pathlib.Path, default=pathlib.Path("runs/plan_with_value"), help="(default: %(default)s)"
    )
    options = parser.parse_args(argv)

    th.set_num_threads(1)  # networks this small are no faster on several
    rows = []
    for name in options.tasks:
        task = (Pendulum if name == "Pendulum-v1" else Mujoco)(name)
        checkpoints, starts = TASKS[name]
        checkpoints, starts = options.timesteps or checkpoints, options.starts or starts
        played: dict[int, list[dict[str, np.ndarray]]] = {checkpoint: [] for checkpoint in checkpoints}
        for seed in range(options.seeds):
            model = SACV("MlpPolicy", name, learning_rate=1e-3, policy_kwargs={"net_arch": [64, 64]}, seed=seed)
            for checkpoint in checkpoints:
                model.learn(checkpoint - model.num_timesteps, reset_num_timesteps=False)
                played[checkpoint].append(compare(model, task, starts, options.steps))
        for checkpoint, seeds in played.items():
            returns = {arm: np.stack([seed[arm] for seed in seeds]) for arm in COLORS}
            shown = {(arm, ""): values for arm, values in returns.items()}
            shown |= {(WITH_V, arm): returns[WITH_V] - returns[arm] for arm in (ALONE, WITHOUT, WITH_Q)}
            for (arm, minus), values in shown.items():
                mean, low, high = interval(values)
                rows.append(dict(task=name, timesteps=checkpoint, arm=arm, minus=minus, mean=mean, low=low, high=high))
                print(f"{name}, {checkpoint} steps, {arm}{minus and ' minus ' + minus}: {mean:.1f} [{low:.1f}, {high:.1f}]")

    options.folder.mkdir(parents=True, exist_ok=True)
    with open(options.folder / "plan.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(rows[0])
        writer.writerows([f"{value:.2f}" if isinstance(value, float) else value for value in row.values()] for row in rows)
    picture = options.folder / "plan_with_value.png"
    title = f"The same policies with and without planning (seeds: {options.seeds}, 95 % intervals)"
    draw(rows, title, f"return over {options.steps} steps", picture)
    print(f"Look at {picture}")
    return rows


if __name__ == "__main__":
    main()
