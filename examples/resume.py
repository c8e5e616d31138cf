"""
Interrupt a run and continue it: run this, press Ctrl-C, run it again.

    python examples/resume.py
"""

import argparse
from collections.abc import Sequence

from sb3_softvalue import SACV
from sb3_softvalue.checkpoint import ResumableCheckpoint


def main(argv: Sequence[str] | None = None) -> int:
    """:return: the steps that are done"""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--timesteps", type=int, default=20_000, help="of the whole run (default: %(default)s)")
    parser.add_argument("--folder", default="runs/resume", help="of the checkpoints (default: %(default)s)")
    args = parser.parse_args(argv)

    model = SACV("MlpPolicy", "Pendulum-v1", learning_rate=1e-3, seed=0)
    model.learn(args.timesteps, callback=ResumableCheckpoint(args.folder, save_freq=1_000, verbose=1, resume=True))
    if model.num_timesteps < args.timesteps:
        print("Interrupted: run the same command again to continue")
    else:
        print(f"Training finished after {model.num_timesteps} steps")
    return model.num_timesteps


if __name__ == "__main__":
    main()
