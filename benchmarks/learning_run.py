"""One training of learning.py in a process of its own, evaluated as it goes on; what is trained, on what, and with what.

A run is told by one line of JSON and says each evaluation as one line of JSON. A run that is started again says all of its
evaluations from the first: nobody needs to know how far it came before. SACV goes on from its last checkpoint and repeats what
it said until there, SB3's algorithms begin again.
"""

import dataclasses
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

# Episodes of one evaluation, side by side in as many environments
EPISODES = 10
# Evaluations are seeded by the run and their number, far from the seeds of the trainings
EVALUATION_SEEDS = 10_000
# What is said of an evaluation
ROW = ("task", "algorithm", "seed", "timesteps", "mean_reward", "std_reward", "episode_length", "seconds", "cpu_seconds")


class Task(NamedTuple):
    """What is to be learned."""

    env: str
    steps: int
    evaluate_every: int
    seeds: tuple[int, ...]
    """Fixed before anything was run"""
    hyperparameters: dict[str, Any]
    """Beside the algorithms' common defaults: those of RL Zoo's sac.yml, where it has the task"""


SEEDS, TUNING_SEEDS = (0, 1, 2, 3, 4), (10, 11, 12)
MUJOCO = {"learning_starts": 10_000}
TASKS = {
    "Pendulum-v1": Task("Pendulum-v1", 20_000, 1_000, SEEDS, {"learning_rate": 1e-3}),
    "HalfCheetah-v5": Task("HalfCheetah-v5", 100_000, 5_000, SEEDS[:4], MUJOCO),
    "InvertedPendulum-v5": Task("InvertedPendulum-v5", 25_000, 2_500, SEEDS, {}),
    "Reacher-v5": Task("Reacher-v5", 50_000, 2_500, SEEDS, {}),
    "InvertedDoublePendulum-v5": Task("InvertedDoublePendulum-v5", 40_000, 2_500, SEEDS, {}),
    "Hopper-v5": Task("Hopper-v5", 100_000, 5_000, SEEDS[:4], MUJOCO),
    "Walker2d-v5": Task("Walker2d-v5", 100_000, 5_000, SEEDS[:4], MUJOCO),
    # For choosing hyper-parameters: seeds of their own, so that what is chosen is judged on others
    "InvertedDoublePendulum-v5-15k": Task("InvertedDoublePendulum-v5", 15_000, 1_000, TUNING_SEEDS, {}),
    "HalfCheetah-v5-50k": Task("HalfCheetah-v5", 50_000, 5_000, TUNING_SEEDS, MUJOCO),
    "HalfCheetah-v5-1M": Task("HalfCheetah-v5", 1_000_000, 5_000, SEEDS[:4], MUJOCO),
}
# What an algorithm has of its own. "sacv-fixed" is SACV with the temperature of the paper: 1 / reward scale = 0.2
ALGORITHMS: dict[str, dict[str, Any]] = {
    "sacv": {},
    "sacv-fixed": {"ent_coef": 0.2},
    "sac": {},
    "tqc": {},
    # Large products in bfloat16
    "sacv-mixed": {"execution": "mixed"},
    # A target with less lag: V̄ behind V, V behind Q
    "sacv-tau-0.01": {"tau": 0.01},
    "sacv-vf-1e-3": {"vf_learning_rate": 1e-3},
    # Less entropy in the first values, that V need not unlearn it when α falls
    "sacv-alpha-0.1": {"ent_coef": "auto_0.1"},
    "sac-alpha-0.1": {"ent_coef": "auto_0.1"},
    "sacv-alpha-0.01": {"ent_coef": "auto_0.01"},
    # No constant in the bonus, for which see learning_variants.py in SAC's case
    "sacv-normalized": {"action_prior": "normalized_uniform"},
    "sac-normalized": {},
    "sacv-n-steps-3": {"n_steps": 3},
    "sacv-gs-2": {"gradient_steps": 2},
    "sacv-normalized-gs-2": {"action_prior": "normalized_uniform", "gradient_steps": 2},
    "sacv-layer-norm": {"tau": 0.01, "policy": "LayerNormPolicy"},
}


def evaluation_steps(steps: int, evaluate_every: int) -> list[int]:
    """:return: the steps after which a run of so many is evaluated"""
    return list(range(evaluate_every, steps + 1, evaluate_every))


@dataclasses.dataclass(frozen=True)
class Run:
    """One training: all that a process needs to know."""

    task: str
    """The name of its results"""
    env: str
    steps: int
    evaluate_every: int
    algorithm: str
    seed: int
    hyperparameters: dict[str, Any]
    device: str = "cpu"
    threads: int = 1
    checkpoints: str = ""
    """Folder for the checkpoints of runs that are not finished; none without a name"""

    @property
    def key(self) -> tuple[str, str, int]:
        """:return: what tells it from the others"""
        return self.task, self.algorithm, self.seed

    @property
    def evaluations(self) -> list[int]:
        """:return: the steps after which it is evaluated"""
        return evaluation_steps(self.steps, self.evaluate_every)


def make_model(run: Run) -> Any:
    """:return: the untrained model"""
    options = {"policy": "MlpPolicy"} | run.hyperparameters
    if options["policy"] == "LayerNormPolicy":
        from learning_variants import LayerNormPolicy

        options["policy"] = LayerNormPolicy
    if run.algorithm == "sac-normalized":
        from learning_variants import SACNormalizedPrior as algorithm
    elif run.algorithm.split("-")[0] == "sac":
        from stable_baselines3 import SAC as algorithm
    elif run.algorithm == "tqc":
        from sb3_contrib import TQC as algorithm
    else:
        from sb3_softvalue import SACV as algorithm
    return algorithm(env=run.env, seed=run.seed, device=run.device, **options)


def evaluate(model: Any, env: Any, seed: int) -> dict[str, float]:
    """
    Deterministic evaluation, which reads no random state that training reads.

    :param model: to evaluate
    :param env: as many environments as episodes, so that no episode is preferred for being short
    :param seed: of the first environment's episode
    :return: mean and standard deviation of the returns, mean length
    """
    import numpy as np
    from stable_baselines3.common.evaluation import evaluate_policy

    env.seed(seed)
    returns, lengths = evaluate_policy(model, env, n_eval_episodes=env.num_envs, return_episode_rewards=True)
    return {
        "mean_reward": round(float(np.mean(returns)), 6),
        "std_reward": round(float(np.std(returns)), 6),
        "episode_length": float(np.mean(lengths)),
    }


def processor_seconds() -> float:
    """:return: that this process and those it has waited for, such as compilers, have used"""
    return sum(os.times()[:4])


class Said:
    """
    The evaluations of a run, kept beside its checkpoints.

    :param run: what is trained
    :param say: is called with each evaluation
    """

    def __init__(self, run: Run, say: Callable[[dict[str, Any]], None]):
        self.run, self.say = run, say
        self.rows: list[dict[str, Any]] = []
        keeps = run.checkpoints and run.algorithm.startswith("sacv")
        self.folder = pathlib.Path(run.checkpoints, f"{run.task}-{run.algorithm}-{run.seed}") if keeps else None

    def __call__(self, row: dict[str, Any]) -> None:
        """Say an evaluation, and remember it first."""
        self.rows.append(row)
        if self.folder:
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(self.folder / "said.jsonl", "a") as file:
                file.write(json.dumps(row) + "\n")
                file.flush()
                os.fsync(file.fileno())
        self.say(row)

    def go_on(self, model: Any) -> list[float]:
        """
        Load the last checkpoint, if there is one, and say again what was said until there.

        :param model: that was just made
        :return: seconds and processor's seconds that the training took until there. Where a checkpoint lies between two
            evaluations, the time from the first of them is that of the steps before, by their number.
        :raises LookupError: if not all that was said until there is known
        """
        from sb3_softvalue.checkpoint import CheckpointError

        assert self.folder is not None
        try:
            model.load_checkpoint(self.folder)
        except CheckpointError:  # none was written yet
            shutil.rmtree(self.folder, ignore_errors=True)
            return [0.0, 0.0]
        rows = {row["timesteps"]: row for row in read_said(self.folder / "said.jsonl")}
        self.rows = [row for timesteps, row in sorted(rows.items()) if timesteps <= model.num_timesteps]
        if [row["timesteps"] for row in self.rows] != [at for at in self.run.evaluations if at <= model.num_timesteps]:
            raise LookupError
        # Without a line that was not written to its end, behind which the next one would be written
        new = self.folder / "said.new"
        new.write_text("".join(json.dumps(row) + "\n" for row in self.rows))
        os.replace(new, self.folder / "said.jsonl")
        for row in self.rows:
            self.say(row)
        last = self.rows[-1] if self.rows else {"timesteps": 1, "seconds": 0.0, "cpu_seconds": 0.0}
        return [last[clock] * model.num_timesteps / last["timesteps"] for clock in ("seconds", "cpu_seconds")]


def read_said(path: pathlib.Path) -> Iterator[dict[str, Any]]:
    """:return: what was said, as far as it can be read"""
    for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
            if set(ROW) <= set(row):
                yield row
        except (ValueError, TypeError):
            continue


def train(run: Run, say: Callable[[dict[str, Any]], None]) -> Any:
    """
    Do the run in this process.

    :param run: what to train
    :param say: is called with each evaluation; its times count from the beginning of ``learn()``, without the evaluations
    :return: the trained model
    """
    import torch as th
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_vec_env

    th.set_num_threads(run.threads)
    said = Said(run, say)
    model = make_model(run)
    # Making environments draws one number of NumPy's, evaluating none: how often is of no matter to the training
    env = make_vec_env(run.env, n_envs=EPISODES)

    class Evaluations(BaseCallback):
        """Evaluates when it is time, with the clocks stopped."""

        def _on_training_start(self) -> None:
            self.clocks = [before[0] - time.perf_counter(), before[1] - processor_seconds()]

        def _on_step(self) -> bool:
            number, rest = divmod(self.num_timesteps, run.evaluate_every)
            if rest == 0:
                seconds, cpu_seconds = self.clocks[0] + time.perf_counter(), self.clocks[1] + processor_seconds()
                row = {"task": run.task, "algorithm": run.algorithm, "seed": run.seed, "timesteps": self.num_timesteps}
                row |= evaluate(self.model, env, EVALUATION_SEEDS * (1 + run.seed) + EPISODES * number)
                said(row | {"seconds": round(seconds, 2), "cpu_seconds": round(cpu_seconds, 2)})
                self.clocks = [seconds - time.perf_counter(), cpu_seconds - processor_seconds()]
            return True

    callbacks: list[BaseCallback] = [Evaluations()]
    before = [0.0, 0.0]
    if said.folder:
        from sb3_softvalue.checkpoint import ResumableCheckpoint

        try:
            before = said.go_on(model)
        except LookupError:  # a run from its beginning, since its model has been overwritten
            shutil.rmtree(said.folder)
            return train(run, say)
        callbacks.append(ResumableCheckpoint(said.folder, run.evaluate_every, keep=1))
    model.learn(run.steps - model.num_timesteps, callbacks, reset_num_timesteps=model.num_timesteps == 0)
    if said.folder and model.num_timesteps >= run.steps:  # and not stopped by a signal
        shutil.rmtree(said.folder)
    return model


def rows(run: Run) -> Iterator[dict[str, Any]]:
    """
    Do the run in a process of its own, which ends when this one ends.

    :param run: what to train
    :return: each evaluation, as soon as it is done
    :raises RuntimeError: with the last lines of what the process wrote, if it fails
    """
    one = str(run.threads)
    threads = {"OMP_NUM_THREADS": one, "MKL_NUM_THREADS": one, "OPENBLAS_NUM_THREADS": one}
    with tempfile.TemporaryFile("w+") as errors, tempfile.TemporaryDirectory() as cache:
        process = subprocess.Popen(
            [sys.executable, str(pathlib.Path(__file__)), json.dumps(dataclasses.asdict(run))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            # Each run compiles for itself and in its own process, so that its processor time holds all of it
            env=os.environ | threads | {"TORCHINDUCTOR_CACHE_DIR": cache, "TORCHINDUCTOR_COMPILE_THREADS": "1"},
        )
        with process:  # closes its input when the caller has enough, which ends it
            assert process.stdout is not None
            yield from (json.loads(line[1:]) for line in process.stdout if line.startswith("@"))
        if process.returncode:
            errors.seek(0)
            last = errors.read()[-2000:]
            raise RuntimeError(f"{run.task}, {run.algorithm}, seed {run.seed} ended with {process.returncode}:\n{last}")


def end_at_once() -> None:
    """
    End this process at once when it is told to, or when the one that started it is gone, however it went: an interrupted
    training would write a checkpoint in the middle of an episode, from which nothing repeats exactly.
    """

    def end_after(wait: Callable[[], Any]) -> None:
        wait()
        os._exit(1)

    # No handler that the training sets sees it. Ctrl-C is for the sweep, whose end is theirs
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    for wait in (sys.stdin.read, lambda: signal.sigwait({signal.SIGTERM})):
        threading.Thread(target=end_after, args=(wait,), daemon=True).start()


if __name__ == "__main__":
    end_at_once()
    train(Run(**json.loads(sys.argv[1])), lambda row: print("@" + json.dumps(row), flush=True))
