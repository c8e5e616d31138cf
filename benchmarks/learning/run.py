"""One training in a process of its own, evaluated on the way.

The process gets its run as one line of JSON and reports each evaluation as another. A run that is started again reports
all of its evaluations from the first one: nobody needs to know how far it was. It continues from its last checkpoint and
repeats what it reported until there.
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
from typing import Any

from benchmarks.learning.tasks import Run, make_model

ROOT = pathlib.Path(__file__).parents[2]
# Episodes of one evaluation, side by side in as many environments
EPISODES = 10
# Evaluations are seeded by the run and their number, far from the seeds of the trainings
EVALUATION_SEEDS = 10_000
# Of an evaluation
COLUMNS = ("task", "algorithm", "seed", "timesteps", "mean_reward", "std_reward", "episode_length", "seconds", "cpu_seconds")

Report = Callable[[dict[str, Any]], None]


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


class EvaluationLog:
    """
    The evaluations of a run, stored next to its checkpoints.

    :param run: what is trained
    :param report: is called with each evaluation
    """

    def __init__(self, run: Run, report: Report):
        self.run, self.report = run, report
        self.folder = pathlib.Path(run.checkpoints, f"{run.task}-{run.algorithm}-{run.seed}") if run.can_resume else None

    def append(self, row: dict[str, Any]) -> None:
        """Keep an evaluation, then report it."""
        if self.folder:
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(self.folder / "evaluations.jsonl", "a") as file:
                file.write(json.dumps(row) + "\n")
                file.flush()
                os.fsync(file.fileno())
        self.report(row)

    def resume(self, model: Any) -> list[float]:
        """
        Load the last checkpoint, if there is one, and report again what was reported until there.

        :param model: that was just made
        :return: seconds and processor's seconds that the training took until there. Where a checkpoint lies between two
            evaluations, the time from the first of them is that of the steps before, by their number.
        :raises LookupError: if an evaluation until there is lost
        """
        from sb3_softvalue.checkpoint import CheckpointError, load_checkpoint

        assert self.folder is not None
        try:
            load_checkpoint(model, self.folder)
        except CheckpointError:  # none was written yet
            shutil.rmtree(self.folder, ignore_errors=True)
            return [0.0, 0.0]
        by_step = {row["timesteps"]: row for row in read_evaluations(self.folder / "evaluations.jsonl")}
        rows = [row for timesteps, row in sorted(by_step.items()) if timesteps <= model.num_timesteps]
        if [row["timesteps"] for row in rows] != [at for at in self.run.evaluations if at <= model.num_timesteps]:
            raise LookupError
        # Without a line that was not written to its end, behind which the next one would be written
        new = self.folder / "evaluations.new"
        new.write_text("".join(json.dumps(row) + "\n" for row in rows))
        os.replace(new, self.folder / "evaluations.jsonl")
        for row in rows:
            self.report(row)
        last = rows[-1] if rows else {"timesteps": 1, "seconds": 0.0, "cpu_seconds": 0.0}
        return [last[clock] * model.num_timesteps / last["timesteps"] for clock in ("seconds", "cpu_seconds")]


def read_evaluations(path: pathlib.Path) -> Iterator[dict[str, Any]]:
    """:return: the evaluations of a log, as far as they can be read"""
    for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
            if set(COLUMNS) <= set(row):
                yield row
        except (ValueError, TypeError):
            continue


def train(run: Run, report: Report) -> Any:
    """
    Do the run in this process.

    :param run: what to train
    :param report: is called with each evaluation; its times count from the beginning of ``learn()``, without the evaluations
    :return: the trained model
    """
    import torch as th
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_vec_env

    th.set_num_threads(run.threads)
    log = EvaluationLog(run, report)
    model = make_model(run)
    # Making environments draws one number of NumPy's, evaluating none: the number of evaluations does not change the training
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
                log.append(row | {"seconds": round(seconds, 2), "cpu_seconds": round(cpu_seconds, 2)})
                self.clocks = [seconds - time.perf_counter(), cpu_seconds - processor_seconds()]
            return True

    callbacks: list[BaseCallback] = [Evaluations()]
    before = [0.0, 0.0]
    if log.folder:
        from sb3_softvalue.checkpoint import ResumableCheckpoint

        try:
            before = log.resume(model)
        except LookupError:  # a run from its beginning, since its model has been overwritten
            shutil.rmtree(log.folder)
            return train(run, report)
        callbacks.append(ResumableCheckpoint(log.folder, run.evaluate_every, keep=1))
    model.learn(run.steps - model.num_timesteps, callbacks, reset_num_timesteps=model.num_timesteps == 0)
    if log.folder and model.num_timesteps >= run.steps:  # and not stopped by a signal
        shutil.rmtree(log.folder)
    return model


def run_in_process(run: Run) -> Iterator[dict[str, Any]]:
    """
    Do the run in a process of its own, which ends when this one ends.

    :param run: what to train
    :return: each evaluation, as soon as it is done
    :raises RuntimeError: with the last lines of what the process wrote, if it fails
    """
    one = str(run.threads)
    environment = os.environ | {"OMP_NUM_THREADS": one, "MKL_NUM_THREADS": one, "OPENBLAS_NUM_THREADS": one}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    with tempfile.TemporaryFile("w+") as errors, tempfile.TemporaryDirectory() as cache:
        # Each run compiles for itself and in its own process, so that its processor time holds all of it
        environment |= {"TORCHINDUCTOR_CACHE_DIR": cache, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.learning.run", json.dumps(dataclasses.asdict(run))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=environment,
        )
        with process:  # closes its input when the caller has enough, which ends it
            assert process.stdout is not None
            yield from (json.loads(line[1:]) for line in process.stdout if line.startswith("@"))
        if process.returncode:
            errors.seek(0)
            last = errors.read()[-2000:]
            raise RuntimeError(f"{run.task}, {run.algorithm}, seed {run.seed} ended with {process.returncode}:\n{last}")


def exit_with_parent() -> None:
    """
    End this process at once on SIGTERM, or when the process that started it is gone, for whatever reason: an interrupted
    training would write a checkpoint in the middle of an episode, from which nothing repeats exactly.
    """

    def exit_after(wait: Callable[[], Any]) -> None:
        wait()
        os._exit(1)

    # No handler that the training sets sees them. Ctrl-C is for the sweep, whose end is this process's end
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    for wait in (sys.stdin.read, lambda: signal.sigwait({signal.SIGTERM})):
        threading.Thread(target=exit_after, args=(wait,), daemon=True).start()


if __name__ == "__main__":
    exit_with_parent()
    train(Run(**json.loads(sys.argv[1])), lambda row: print("@" + json.dumps(row), flush=True))
