"""
One script, either class: what runs with SB3's SAC runs with SACV, and the other way round.

    python examples/swap_sac.py --algo sac
    python examples/swap_sac.py --algo sacv
"""

import argparse
import pathlib
from collections.abc import Sequence

from stable_baselines3 import SAC
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

from sb3_softvalue import SACV


def main(argv: Sequence[str] | None = None) -> float:
    """Train, save, load and test on Pendulum-v1."""
    parser = argparse.ArgumentParser(description="Train and test either SAC or SACV on Pendulum-v1.")
    parser.add_argument("--algo", choices=["sac", "sacv"], default="sacv", help="(default: %(default)s)")
    parser.add_argument("--timesteps", type=int, default=10_000, help="steps of training (default: %(default)s)")
    parser.add_argument(
        "--folder", type=pathlib.Path, default=pathlib.Path("runs/swap_sac"), help="to write to (default: %(default)s)"
    )
    options = parser.parse_args(argv)
    options.folder.mkdir(parents=True, exist_ok=True)

    algorithm = {"sac": SAC, "sacv": SACV}[options.algo]  # the only line that knows which
    model = algorithm("MlpPolicy", "Pendulum-v1", learning_rate=1e-3, policy_kwargs={"net_arch": [64, 64]}, seed=0)
    model.learn(options.timesteps, progress_bar=True)
    model.save(options.folder / options.algo)

    model = algorithm.load(options.folder / options.algo)
    mean, std = evaluate_policy(model, make_vec_env("Pendulum-v1", seed=1000), n_eval_episodes=20)
    print(f"{algorithm.__name__}: return over 20 episodes {mean:.1f} ± {std:.1f}")
    return mean


if __name__ == "__main__":
    main()
