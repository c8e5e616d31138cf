"""
Learn from recorded transitions first, then continue in the environment:

    python examples/offline_to_online.py

A scripted controller that swings the pendulum up fills the replay buffer; your own data set, such as one of Minari, takes
its place. `train()` fits Q, V and the policy to it before the first step of the model, and `learn()` continues from there.
A model that starts without data does the same number of steps beside it.
"""

import argparse
from collections.abc import Sequence

import gymnasium as gym
import numpy as np
import torch as th
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import configure
from stable_baselines3.common.monitor import Monitor

from sb3_softvalue import SACV

TASK = "Pendulum-v1"


def controller(obs: np.ndarray, noise: float) -> np.ndarray:
    """:return: a torque that pumps energy while the pendulum hangs and balances it when it is nearly upright"""
    cos, sin, velocity = obs
    missing_energy = 15.0 * (1.0 - cos) - 0.5 * velocity**2
    torque = -10.0 * sin - 2.0 * velocity if cos > 0.9 else np.sign(velocity) * missing_energy
    return np.clip([torque + noise], -2.0, 2.0).astype(np.float32)


def fill(model: SACV, episodes: int, seed: int) -> float:
    """
    Put recorded transitions into the replay buffer as `learn()` would: actions between -1 and 1, one environment.

    :return: mean return of the recorded episodes
    """
    assert model.replay_buffer is not None
    env, rng, returns = gym.make(TASK), np.random.default_rng(seed), []
    for episode in range(episodes):
        obs, _ = env.reset(seed=seed + episode)
        returns.append(0.0)
        # From an expert to almost random: Q needs to see what bad actions lead to
        spread, truncated = rng.uniform(0.2, 8.0), False
        while not truncated:
            action = controller(obs, rng.normal(0.0, spread))
            next_obs, reward, terminated, truncated, _ = env.step(action)
            scaled, done = model.policy.scale_action(action), np.array([terminated or truncated])
            info = {"TimeLimit.truncated": truncated and not terminated}
            model.replay_buffer.add(obs[None], next_obs[None], scaled[None], np.array([reward]), done, [info])
            returns[-1] += float(reward)
            obs = next_obs
    return float(np.mean(returns))


def evaluate(model: SACV) -> float:
    env = Monitor(gym.make(TASK))
    env.reset(seed=1000)
    return float(np.mean(evaluate_policy(model, env, n_eval_episodes=20)[0]))


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """:return: the mean returns that are printed"""
    parser = argparse.ArgumentParser(description="Learn from recorded transitions first, then in the environment.")
    parser.add_argument("--episodes", type=int, default=25, help="recorded ones, of 200 steps each")
    parser.add_argument("--updates", type=int, default=5_000, help="on the recorded transitions")
    parser.add_argument("--timesteps", type=int, default=2_000, help="in the environment afterwards")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    th.set_num_threads(1)  # networks this small are no faster on several

    model = SACV("MlpPolicy", TASK, learning_rate=1e-3, learning_starts=0, seed=options.seed)
    model.set_logger(configure(None, []))  # `train()` logs its losses; `learn()` makes its own logger
    returns = {"recorded": fill(model, options.episodes, options.seed)}
    print(f"Recorded episodes: mean return {returns['recorded']:.0f}. Now {options.updates} updates on them.")
    model.train(options.updates, batch_size=256)
    returns["offline"] = evaluate(model)
    print(f"After training on the recorded transitions: {returns['offline']:.0f}")
    model.learn(options.timesteps)
    returns["then online"] = evaluate(model)
    print(f"After {options.timesteps} steps in the environment: {returns['then online']:.0f}")

    scratch = SACV("MlpPolicy", TASK, learning_rate=1e-3, seed=options.seed).learn(options.timesteps)
    returns["without data"] = evaluate(scratch)
    print(f"A model without recorded transitions after {options.timesteps} steps: {returns['without data']:.0f}")
    return returns


if __name__ == "__main__":
    main()
