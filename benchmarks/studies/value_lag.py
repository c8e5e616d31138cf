"""
What the values expect beside what is collected, early in training: does V follow Q, and α, more slowly than SAC's Q does?

    python -m benchmarks.studies.value_lag                             # HalfCheetah-v5, an hour on one core

Trains as benchmarks.learning does, and looks at each run every few thousand steps. The stochastic policy plays some episodes.
At every 50th step of their first half, the soft return collected from there on (rewards discounted, plus the bonus of all
later actions) stands beside min Q(s, a), and with the bonus of the action itself beside V(s) and V̄(s). Writes
benchmarks/results/studies/value_lag.csv and a picture beside it.
"""

import argparse
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env

from benchmarks.learning.run import ROOT
from benchmarks.learning.tasks import ALGORITHMS, TASKS, TUNING_SEEDS, Run, make_model
from sb3_softvalue.figures import new_figure

TASK = "HalfCheetah-v5"
RESULTS = ROOT / "benchmarks" / "results" / "studies" / "value_lag.csv"
EVERY_STEP = 50


def soft_returns(rewards: np.ndarray, bonus: np.ndarray, gamma: float) -> tuple[np.ndarray, np.ndarray]:
    """
    :param rewards: of episodes that were cut off and did not end, shape (steps, episodes)
    :param bonus: α·(log p − log π) of each action, same shape
    :param gamma: discount
    :return: what was collected from each step on, to compare with Q (without the first action's bonus) and V (with it)
    """
    of_q, of_v = np.zeros_like(rewards), np.zeros_like(rewards)
    later = np.zeros(rewards.shape[1])
    for t in range(len(rewards) - 1, -1, -1):
        of_q[t] = rewards[t] + gamma * later
        later = of_v[t] = of_q[t] + bonus[t]
    return of_q, of_v


@th.no_grad()
def look(model: Any, env: Any, seed: int, steps: int) -> dict[str, float]:
    """
    Play the stochastic policy, and leave all random states that training reads as they were.

    :param model: SAC or SACV
    :param env: several environments of the task
    :param seed: of the episodes and the actions
    :param steps: of each episode, in whose second half the discount ends what is not seen any more
    :return: means over the states looked at
    """
    # Of the uniform prior, which "uniform" leaves out of the objective; SACNormalizedPrior has it in its log-density
    is_normalized = getattr(model, "action_prior", "uniform") == "normalized_uniform"
    log_prior = -math.prod(model.action_space.shape) * math.log(2.0) if is_normalized else 0.0
    alpha = float(model.ent_coef_tensor) if model.ent_coef_optimizer is None else float(model.log_ent_coef.exp())
    policy, kept = model.policy, th.get_rng_state()
    th.manual_seed(seed)
    env.seed(seed)
    observations, rewards, bonus = env.reset(), [], []
    expected: dict[str, list[np.ndarray]] = {"min Q": [], "V": [], "target of V": []}
    for t in range(steps):
        obs = policy.obs_to_tensor(observations)[0]
        actions, log_prob = policy.actor.action_log_prob(obs)
        if t < steps // 2 and t % EVERY_STEP == 0:
            expected["min Q"].append(th.cat(policy.critic(obs, actions), dim=1).amin(dim=1).numpy())
            if hasattr(policy, "value"):
                expected["V"].append(policy.value(obs).squeeze(1).numpy())
                expected["target of V"].append(policy.value_target(obs).squeeze(1).numpy())
        bonus.append(alpha * (log_prior - log_prob.numpy().astype(np.float64)))
        observations, reward, _, _ = env.step(policy.unscale_action(actions.numpy()))
        rewards.append(reward.astype(np.float64))
    th.set_rng_state(kept)
    of_q, of_v = soft_returns(np.stack(rewards), np.stack(bonus), model.gamma)
    looked_at = slice(0, steps // 2, EVERY_STEP)
    means = {name: float(np.mean(values)) if values else float("nan") for name, values in expected.items()}
    return {"alpha": alpha, "collected from Q": of_q[looked_at].mean(), "collected from V": of_v[looked_at].mean()} | means


class Look(BaseCallback):
    """Looks at the model every few steps."""

    def __init__(self, seed: int, every: int, episodes: int, steps: int):
        super().__init__()
        self.every, self.steps, self.base = every, steps, 100_000 * (seed + 1)
        self.env = make_vec_env(TASK, n_envs=episodes)
        self.rows: list[dict[str, float]] = []

    def _on_step(self) -> bool:
        if self.num_timesteps % self.every == 0 and self.num_timesteps > self.model.learning_starts:
            seen = look(self.model, self.env, self.base + self.num_timesteps, self.steps)
            self.rows.append({"timesteps": self.num_timesteps} | seen)
        return True


def draw(rows: pd.DataFrame, picture: pathlib.Path) -> None:
    """What the next targets are made of (V, or SAC's min Q), what is collected instead, and α: means over the runs."""
    figure, (axes, *_) = new_figure("HalfCheetah-v5: what is expected and what is collected", n_columns=2)
    for algorithm, mine in rows.groupby("algorithm", sort=False):
        name = "V" if ALGORITHMS[algorithm].model == "sacv" else "Q"
        means = mine.drop(columns="algorithm").groupby("timesteps").mean()
        thousands, color = means.index / 1000, ALGORITHMS[algorithm].colour
        expected = "min Q" if name == "Q" else name
        axes[0].plot(thousands, means[expected], color=color, label=f"{ALGORITHMS[algorithm].title}: {expected}")
        axes[0].plot(thousands, means[f"collected from {name}"], color=color, linestyle="dashed", label="collected")
        axes[1].plot(thousands, means["alpha"], color=color)
    axes[0].set(xlabel="thousand time steps", title="soft return from the states visited")
    axes[1].set(xlabel="thousand time steps", title="temperature α", yscale="log")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(picture)


def main(argv: Sequence[str] | None = None) -> pd.DataFrame:
    """Train, look, write and draw."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.studies.value_lag", description="What the values expect beside what is collected."
    )
    parser.add_argument("--algorithms", nargs="+", choices=ALGORITHMS, default=["sac", "sacv", "sacv-alpha-0.1"])
    parser.add_argument("--seeds", type=int, nargs="+", default=TUNING_SEEDS[:2])
    parser.add_argument("--timesteps", type=int, default=40_000)
    parser.add_argument("--every", type=int, default=2_500)
    parser.add_argument("--episodes", type=int, default=10)
    parser.add_argument("--steps", type=int, default=1000, help="of each episode")
    parser.add_argument("--learning-starts", type=int, default=TASKS[TASK].hyperparameters["learning_starts"])
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    options = parser.parse_args(argv)

    th.set_num_threads(1)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    rows = pd.DataFrame()
    for seed in options.seeds:
        for algorithm in options.algorithms:
            hyperparameters = ALGORITHMS[algorithm].hyperparameters | {"learning_starts": options.learning_starts}
            model = make_model(Run(TASK, TASK, options.timesteps, options.every, algorithm, seed, hyperparameters))
            watching = Look(seed, options.every, options.episodes, options.steps)
            model.learn(options.timesteps, callback=watching)
            seen = pd.DataFrame(watching.rows).round(4)
            seen.insert(0, "algorithm", algorithm)
            seen.insert(1, "seed", seed)
            print(seen.to_string(index=False), flush=True)
            rows = pd.concat([rows, seen], ignore_index=True)
            rows.to_csv(options.out, index=False, lineterminator="\n")
    draw(rows, picture := options.out.with_suffix(".png"))
    print(f"Look at {picture}")
    return rows


if __name__ == "__main__":
    main()
