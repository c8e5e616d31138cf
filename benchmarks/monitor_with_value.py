"""
Does V tell that an actuator wears out, and earlier than the reward does? (It does not: docs/guide/value_uses.md.)

    python benchmarks/monitor_with_value.py                    # HalfCheetah-v5
    python benchmarks/monitor_with_value.py --timesteps 10000 --seeds 0 --episodes 20

The policy plays, and from the middle of the episode on one joint gets less torque than it asks for, or one joint's angle
is measured with an offset. At each step V says what is to come, and the next step shows whether it comes. The monitor watches

    δ_t = r_t − α·log π(a_t|s_t) + γ·V(s_{t+1}) − V(s_t),

V's temporal-difference residual with the entropy bonus of the action that was taken, whose mean is 0 where V is right
and actions are sampled. What the deterministic policy (which plays here) or V's own error adds is a constant to the detector.

The detector is the same for whatever is watched: standard scores by the mean and the standard deviation that healthy
episodes have at that step, summed up while they are too low (Page's one-sided CUSUM, Biometrika 41, 1954),

    S_t = max(0, S_{t−1} − z_t − slack), alarm at S_t > threshold.

The threshold is the one that other healthy episodes cross in at most one of twenty. Watched the same way are the reward,
the episode's return so far, and the residual of min Q, which needs no value network:

    r_t + γ·(min Q(s_{t+1}, a_{t+1}) − α·log π(a_{t+1}|s_{t+1})) − min Q(s_t, a_t)

Writes each episode's alarms, a summary and a picture to runs/monitor_with_value, and keeps the models there.
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

TASK = "HalfCheetah-v5"
N_JOINTS, FIRST_ANGLE = 6, 2  # episode i has joint i % 6; its angle stands in the observation after height and pitch
WORN, OFFSET = "torque lost", "sensor offset (rad)"
FAULTS = [(WORN, size) for size in (0.1, 0.2, 0.35, 0.5)] + [(OFFSET, size) for size in (0.1, 0.3)]
# Fixed before any episode was looked at
SLACK, FALSE_ALARMS = 0.25, 0.05
REWARD, SO_FAR, OF_Q, OF_V = "reward", "return so far", "residual of min Q", "residual of V"
COLORS = {REWARD: GREY, SO_FAR: VERMILION, OF_Q: ORANGE, OF_V: BLUE}


class Faulty(gym.Wrapper):
    """From a given step on, one joint gets less torque than is asked for, or its angle is measured with an offset."""

    def __init__(self, env: gym.Env, fault: str, size: float, joint: int, onset: int) -> None:
        """
        :param env: HalfCheetah-v5
        :param fault: torque or sensor
        :param size: share of the torque that is lost, or offset (rad)
        :param joint: from 0 to 5
        :param onset: number of healthy steps
        """
        super().__init__(env)
        self.fault, self.size, self.joint, self.onset, self.steps = fault, size, joint, onset, 0

    def reset(self, **options: Any) -> tuple[np.ndarray, dict[str, Any]]:
        """:return: the first observation, and what the environment says of it"""
        self.steps = 0
        return self.env.reset(**options)

    def step(self, action: np.ndarray) -> tuple[Any, ...]:
        """:return: as the environment's"""
        self.steps += 1
        if self.steps <= self.onset:
            return self.env.step(action)
        if self.fault == WORN:
            return self.env.step(np.where(np.arange(N_JOINTS) == self.joint, (1.0 - self.size) * action, action))
        observation, *rest = self.env.step(action)
        wrong = observation.copy()
        wrong[FIRST_ANGLE + self.joint] += self.size
        return wrong, *rest


def watch(model: SACV, envs: Sequence[gym.Env], seed: int, steps: int) -> dict[str, np.ndarray]:
    """
    Play the deterministic policy.

    :param model: that plays
    :param envs: an episode of each, which must not end early
    :param seed: of the first start state
    :param steps: of each episode
    :return: what is watched, shape (n_episodes, steps) each
    """
    assert model.log_ent_coef is not None
    alpha = model.log_ent_coef.exp().item()
    observations = np.stack([env.reset(seed=seed + i)[0] for i, env in enumerate(envs)])
    seen: list[tuple[np.ndarray, ...]] = []
    rewards = []
    for _ in range(steps + 1):  # the last one for its values alone
        actions, _ = model.predict(observations, deterministic=True)
        min_q = model.predict_q_values(observations, actions).min(axis=1)
        seen.append((model.predict_values(observations), min_q, -alpha * model.action_log_prob(observations, actions)))
        taken = [env.step(action) for env, action in zip(envs, actions, strict=True)]
        observations = np.stack([step[0] for step in taken])
        rewards.append([float(step[1]) for step in taken])
    values, min_qs, bonus = (np.stack(part, axis=1).astype(np.float64) for part in zip(*seen, strict=True))
    reward = np.stack(rewards, axis=1)[:, :-1]
    of_v = reward + bonus[:, :-1] + model.gamma * values[:, 1:] - values[:, :-1]
    of_q = reward + model.gamma * (min_qs[:, 1:] + bonus[:, 1:]) - min_qs[:, :-1]
    return {REWARD: reward, SO_FAR: reward.cumsum(axis=1), OF_Q: of_q, OF_V: of_v}


class Detector:
    """An alarm for what stays too low: one-sided CUSUM, calibrated on healthy episodes."""

    def __init__(self, reference: np.ndarray, healthy: np.ndarray, rate: float = FALSE_ALARMS, slack: float = SLACK) -> None:
        """
        :param reference: healthy episodes that say what is usual at each step, shape (n, steps)
        :param healthy: others, for the threshold, shape (m, steps)
        :param rate: share of healthy episodes with an alarm that is allowed
        :param slack: standard deviations that a step may be too low by
        :raises ValueError: if ``healthy`` are too few for the rate
        """
        self.mean, self.deviation, self.slack = reference.mean(axis=0), reference.std(axis=0) + 1e-8, slack
        # The next healthy episode is as likely to be the highest as each of these: with the k-th highest of m as threshold
        # it gives an alarm with probability k/(m+1)
        k = int(rate * (len(healthy) + 1) + 1e-9)
        if k < 1:
            raise ValueError(f"A rate of {rate} needs at least {int(np.ceil(1.0 / rate)) - 1} healthy episodes.")
        self.threshold = float(np.sort(self.statistic(healthy).max(axis=1))[-k])

    def statistic(self, watched: np.ndarray) -> np.ndarray:
        """:return: S, shape (n, steps) as what is watched"""
        scores = (watched - self.mean) / self.deviation
        sums = np.zeros_like(scores)
        last = np.zeros(len(scores))
        for t in range(scores.shape[1]):
            last = sums[:, t] = np.maximum(0.0, last - scores[:, t] - self.slack)
        return sums

    def alarms(self, watched: np.ndarray) -> np.ndarray:
        """
        :param watched: shape (n, steps)
        :return: the step of the first alarm, ``steps`` where there is none, shape (n,)
        """
        crossed = self.statistic(watched) > self.threshold
        return np.where(crossed.any(axis=1), crossed.argmax(axis=1), watched.shape[1])


def trained(seed: int, timesteps: int, folder: pathlib.Path) -> SACV:
    """:return: the model, from the folder if it is there"""
    path = folder / f"seed-{seed}-{timesteps}-steps.zip"
    if path.is_file():
        return SACV.load(path, device="cpu")
    options: dict[str, Any] = dict(learning_rate=1e-3, learning_starts=1000, policy_kwargs={"net_arch": [64, 64]})
    model = SACV("MlpPolicy", TASK, **options, seed=seed, device="cpu").learn(timesteps)
    model.save(path)
    return model


def alarms_of(model: SACV, episodes: int, steps: int, faults: Sequence[tuple[str, float]] = FAULTS) -> dict[Any, np.ndarray]:
    """
    :param model: that plays
    :param episodes: of each kind
    :param steps: of each episode
    :param faults: kinds and sizes
    :return: each monitor's first alarms by (fault, size, monitor), those of healthy episodes with the same start states
        under ("none", 0.0, monitor), shape (episodes,) each
    """

    def envs(fault: str, size: float) -> list[gym.Env]:
        onset = steps if fault == "none" else steps // 2
        made = [gym.make(TASK, max_episode_steps=steps + 1, disable_env_checker=True) for _ in range(episodes)]
        return [Faulty(env, fault, size, i % N_JOINTS, onset) for i, env in enumerate(made)]

    healthy = envs("none", 0.0)
    reference, calibration = (watch(model, healthy, seed, steps) for seed in (10_000, 20_000))
    detectors = {monitor: Detector(reference[monitor], calibration[monitor]) for monitor in COLORS}
    alarms = {}
    for fault, size in [("none", 0.0), *faults]:
        watched = watch(model, envs(fault, size), 30_000, steps)
        alarms |= {(fault, size, monitor): detector.alarms(watched[monitor]) for monitor, detector in detectors.items()}
    return alarms


def delays_of(alarms: np.ndarray, steps: int) -> np.ndarray:
    """
    :param alarms: step of the first alarm of each episode, any shape
    :param steps: of each episode, the second half of them faulty
    :return: faulty steps until the alarm. An episode without one, or with a false one before the fault, counts as all of
        the faulty steps and one more.
    """
    onset = steps // 2
    return np.where((alarms >= onset) & (alarms < steps), alarms - onset, steps - onset) + 1


def interval(
    values: np.ndarray, statistic: Callable[..., np.ndarray] = np.mean, n_resamples: int = 1000
) -> tuple[float, float, float]:
    """
    :param values: shape (seeds, episodes)
    :param statistic: mean or median
    :param n_resamples: of the seeds and of the episodes
    :return: the statistic and the ends of its 95 % bootstrap interval
    """
    generator = np.random.default_rng(0)
    n_seeds, episodes = values.shape
    seeds = generator.integers(n_seeds, size=(n_resamples, n_seeds, 1))
    resampled = values[seeds, generator.integers(episodes, size=(n_resamples, n_seeds, episodes))]
    low, high = np.percentile(statistic(resampled, axis=(1, 2)), [2.5, 97.5]).tolist()
    return float(statistic(values)), low, high


def summarise(alarms: dict[Any, np.ndarray], steps: int) -> list[dict[str, Any]]:
    """
    :param alarms: by (fault, size, monitor), shape (seeds, episodes) each
    :param steps: of each episode
    :return: share of false alarms, share detected, median delay, and the mean difference of V's delays from the others'
    """
    rows = []

    def add(fault: str, size: float, monitor: str, quantity: str, values: tuple[float, float, float]) -> None:
        columns = ("fault", "size", "monitor", "quantity", "value", "low", "high")
        rows.append(dict(zip(columns, (fault, size, monitor, quantity, *values), strict=True)))

    for (fault, size, monitor), first in alarms.items():
        if fault == "none":
            add(fault, size, monitor, "false alarms", interval(first < steps))
            continue
        delays = delays_of(first, steps)
        add(fault, size, monitor, "detected", interval(delays <= steps - steps // 2))
        add(fault, size, monitor, "median delay", interval(delays, np.median))
        if monitor != OF_V:
            sooner = delays_of(alarms[fault, size, OF_V], steps) - delays
            add(fault, size, f"{OF_V} minus {monitor}", "mean delay", interval(sooner))
    return rows


def draw(rows: list[dict[str, Any]], title: str, picture: pathlib.Path) -> None:
    """Share detected over the size of each fault, with intervals."""
    figure, grid = new_figure(title, n_columns=2)
    panels = {WORN: ("torque lost at one joint", "{:.0%}"), OFFSET: ("offset of one joint's angle", "{:g} rad")}
    for axes, (fault, (label, size)) in zip(grid[0], panels.items(), strict=True):
        for shift, (monitor, color) in zip((-0.12, -0.04, 0.04, 0.12), COLORS.items(), strict=True):
            wanted = (fault, monitor, "detected")
            shown = [row for row in rows if (row["fault"], row["monitor"], row["quantity"]) == wanted]
            middle, low, high = np.array([[row[key] for key in ("value", "low", "high")] for row in shown]).T
            places, errors = np.arange(len(shown)) + shift, [middle - low, high - middle]
            axes.errorbar(places, middle, errors, color=color, marker="o", markersize=4, capsize=2, label=monitor)
        axes.set_xticks(range(len(shown)), [size.format(row["size"]) for row in shown])
        axes.set(xlabel=label, ylabel="share detected", ylim=(0, 1))
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(picture)


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Train, play, watch, compare and draw."""
    parser = argparse.ArgumentParser(description="Does V's residual tell of a worn actuator, and how early?")
    parser.add_argument("--timesteps", type=int, default=100_000, help="of training (default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the trainings (default: %(default)s)")
    parser.add_argument("--episodes", type=int, default=60, help="of each kind, at least 19 (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=1000, help="of each episode (default: %(default)s)")
    parser.add_argument("--folder", type=pathlib.Path, default=pathlib.Path("runs/monitor_with_value"))
    options = parser.parse_args(argv)

    th.set_num_threads(1)  # networks this small are no faster on several
    options.folder.mkdir(parents=True, exist_ok=True)
    played = []
    for seed in options.seeds:
        played.append(alarms_of(trained(seed, options.timesteps, options.folder), options.episodes, options.steps))
        print(f"seed {seed} played", flush=True)
    with open(options.folder / "monitor.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["seed", "fault", "size", "episode", "joint", *(f"first alarm: {monitor}" for monitor in COLORS)])
        for seed, alarms in zip(options.seeds, played, strict=True):
            for fault, size in [("none", 0.0), *FAULTS]:
                first = np.stack([alarms[fault, size, monitor] for monitor in COLORS], axis=1)
                writer.writerows([seed, fault, size, i, i % N_JOINTS, *row] for i, row in enumerate(first.tolist()))

    rows = summarise({key: np.stack([alarms[key] for alarms in played]) for key in played[0]}, options.steps)
    with open(options.folder / "monitor_summary.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(rows[0])
        for row in rows:
            writer.writerow([f"{value:.3f}" if isinstance(value, float) else value for value in row.values()])
            print("{fault} {size}, {monitor}, {quantity}: {value:.2f} [{low:.2f}, {high:.2f}]".format(**row))
    picture = options.folder / "monitor_with_value.png"
    draw(rows, f"A joint fails: who tells? ({len(played)} seeds, 95 % intervals)", picture)
    print(f"Look at {picture}")
    return rows


if __name__ == "__main__":
    main()
