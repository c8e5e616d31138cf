"""The benchmark of learning: a sweep that is killed ends as one that was not, and nothing is mixed or lost."""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from argparse import Namespace

import numpy as np
import pytest
from stable_baselines3 import SAC
from stable_baselines3.common.env_util import make_vec_env

from sb3_softvalue import SACV
from tests.learning_helpers import ROOT, evaluation, without_times

pytest.importorskip("tqdm", reason="the benchmark's progress bar is not installed")
pytest.importorskip("rliable", reason="the benchmark's statistics are not installed")
pytest.importorskip("sb3_contrib", reason="TQC, which the benchmark compares with, is not installed")
from benchmarks.learning import __main__ as command_line
from benchmarks.learning.results import TaskResults, locked, to_csv, write_metadata
from benchmarks.learning.run import evaluate, run_in_process, train
from benchmarks.learning.sweep import Sweep
from benchmarks.learning.tasks import ALGORITHMS, TASKS, Run, make_model

SMALL = {"learning_starts": 50, "batch_size": 8, "buffer_size": 1000, "policy_kwargs": {"net_arch": [8]}}
TIMES = ("seconds", "cpu_seconds")
in_proc = pytest.mark.skipif(not pathlib.Path("/proc/self/task").exists(), reason="finds child processes in Linux's /proc")


def small_run(algorithm: str = "sac", seed: int = 0, **changes) -> Run:
    """Of a second."""
    run = Run("small", "Pendulum-v1", 200, 50, algorithm, seed, SMALL | ALGORITHMS[algorithm].hyperparameters)
    return dataclasses.replace(run, **changes)


def start_sweep(runs: list[Run], folder: pathlib.Path) -> subprocess.Popen:
    """A sweep in a process of its own."""
    script = "import json, pathlib, sys; from benchmarks.learning.sweep import Run, Sweep, run_in_process; "
    script += "Sweep([Run(**run) for run in json.loads(sys.argv[1])], pathlib.Path(sys.argv[2])).execute(run_in_process, 1)"
    arguments = [json.dumps([dataclasses.asdict(run) for run in runs]), str(folder)]
    return subprocess.Popen(
        [sys.executable, "-c", script, *arguments], cwd=ROOT, stderr=subprocess.DEVNULL, start_new_session=True
    )


def wait_for(path: pathlib.Path, text: str, process: subprocess.Popen) -> None:
    """Until a file contains a text."""
    while not path.exists() or text not in path.read_text():
        assert process.poll() is None, "the sweep ended before it was killed"
        time.sleep(0.02)


def children(pid: int) -> list[int]:
    """:return: the children of a process"""
    paths = pathlib.Path("/proc", str(pid), "task").glob("*/children")
    return [int(child) for path in paths for child in path.read_text().split()]


def assert_ends(pid: int) -> None:
    deadline = time.monotonic() + 60
    while pathlib.Path("/proc", str(pid)).exists():
        assert time.monotonic() < deadline, f"process {pid} did not end"
        time.sleep(0.02)


@in_proc
def test_killed_and_started_again(tmp_path):
    """In the middle of its second run, within a line: the first run is kept, the second is done again."""
    runs = [small_run("sac", steps=400), small_run("sacv", steps=400)]
    path = tmp_path / "killed" / "small.csv"
    process = start_sweep(runs, path.parent)
    wait_for(path, ",sacv,0,50,", process)
    (worker,) = children(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = path.read_text()
    with open(path, "a") as file:
        file.write("small,sacv,0,10")

    assert TaskResults(path.parent, runs[:1]).finished == {("sac", 0)}
    assert path.read_text() == "".join(line for line in before.splitlines(keepends=True) if ",sacv," not in line)

    assert Sweep(runs, tmp_path / "killed").execute(run_in_process, 2) == []
    assert Sweep(runs, tmp_path / "whole").execute(run_in_process, 2) == []
    assert without_times(path) == without_times(tmp_path / "whole" / "small.csv")
    assert [cells[1:4] for cells in without_times(path)[1:]] == [
        [run.algorithm, "0", str(steps)] for run in runs for steps in run.evaluations
    ]
    # The run of the first sweep has not continued by itself
    assert_ends(worker)
    # A sweep that is done does nothing more
    text = path.read_text()
    assert Sweep(runs, tmp_path / "killed").remaining == []
    assert path.read_text() == text


@in_proc
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_ended_in_the_middle_of_an_episode(how, tmp_path):
    """A run whose sweep was gone once wrote a checkpoint there and ended: what was resumed from it was another run."""
    whole = small_run("sacv", steps=800, evaluate_every=200)
    run = dataclasses.replace(whole, checkpoints=str(tmp_path / "checkpoints"))
    path = tmp_path / "small.csv"
    process = start_sweep([run], tmp_path)
    wait_for(path, ",sacv,0,400,", process)
    (worker,) = children(process.pid)
    time.sleep(0.2)
    if how == signal.SIGKILL:
        process.kill()  # alone: whoever kills the sweep does not know of its processes
    else:
        os.killpg(process.pid, how)  # as a terminal does
    process.wait()
    assert_ends(worker)
    assert start_sweep([run], tmp_path).wait() == 0
    assert Sweep([whole], tmp_path / "whole").execute(run_in_process, 1) == []
    assert without_times(path) == without_times(tmp_path / "whole" / "small.csv")


@pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="this system cannot block signals")
def test_a_training_that_is_terminated_ends_at_once(tmp_path):
    """Its checkpoint in the middle of an episode was one from which nothing repeats exactly, and it counted as finished."""
    run = small_run("sacv", steps=100_000, evaluate_every=200, checkpoints=str(tmp_path))
    command = [sys.executable, "-m", "benchmarks.learning.run", json.dumps(dataclasses.asdict(run))]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline().startswith("@")
        time.sleep(0.1)
        process.terminate()
        assert process.wait(timeout=60) == 1
    names = [path.name for path in (tmp_path / "small-sacv-0").iterdir()]
    # Whole episodes have 200 steps
    assert all(int(name.split("_")[-1]) % 200 == 0 for name in names if name.startswith("step")), names


def test_half_a_file(tmp_path):
    """Whatever was written of a CSV, its finished runs and no other lines are kept."""
    run = small_run()
    lines = [evaluation("sac", seed, steps, -1.0) for seed in (0, 1) for steps in run.evaluations]
    text = to_csv(lines, header=True)
    path = tmp_path / "small.csv"
    first_run = text.index("small,sac,1,")
    for cut in (0, 10, first_run - 1, first_run, first_run + 3, len(text) - 1, len(text)):
        path.write_text(text[:cut])
        finished = TaskResults(tmp_path, [run]).finished
        assert finished == {("sac", seed) for seed, end in ((0, first_run), (1, len(text))) if cut >= end}
        assert path.read_text() == to_csv([row for row in lines if ("sac", row["seed"]) in finished], header=True)


def test_only_whole_runs_of_this_benchmark_are_kept(tmp_path):
    """Every evaluation with every column; once the last one was enough, and a line without numbers."""
    run = small_run()
    whole = [evaluation("sac", 0, steps, -1.0) for steps in run.evaluations]
    path = tmp_path / "small.csv"
    for damaged in (whole[:2] + whole[3:], [*whole[:3], whole[3] | {"mean_reward": ""}], [*whole[:3], whole[3] | {"seed": 1}]):
        path.write_text(to_csv(damaged, header=True))
        assert TaskResults(tmp_path, [run]).finished == set()
    for text in ("hello\n", "task,algorithm\nsmall,sac\n"):
        path.write_text(text)
        with pytest.raises(SystemExit, match=r"small\.csv is not a file of this benchmark"):
            TaskResults(tmp_path, [run])
        assert path.read_text() == text
    for text in ("", "{", "[]", '{"steps": 200}'):
        (tmp_path / "small.json").write_text(text)
        with pytest.raises(SystemExit, match=r"small\.json is damaged"):
            write_metadata(tmp_path, [run], 1, "")


def test_reported_twice(tmp_path):
    """A run that is retried reports its evaluations again: each is kept once, the first time."""
    results = TaskResults(tmp_path, [small_run()])
    assert results.append(evaluation("sac", 0, 100, -2.0)) and results.append(evaluation("sac", 0, 50, -1.0))
    assert not results.append(evaluation("sac", 0, 100, -3.0))
    results.sort()
    assert results.path.read_text() == to_csv([evaluation("sac", 0, 50, -1.0), evaluation("sac", 0, 100, -2.0)], header=True)


def lost_at(timesteps: int):
    """A report that fails at an evaluation."""

    def report(row: dict) -> None:
        if row["timesteps"] == timesteps:
            raise ConnectionError("lost")

    return report


def train_whole(run: Run, report_to: list[dict]) -> list[dict]:
    """:return: what is reported of a run, without the times"""
    train(run, report_to.append)
    return [{key: value for key, value in row.items() if key not in TIMES} for row in report_to]


RESUMED = [("sacv", 100, 0), ("sacv", 700, 600), ("sac", 500, 400), ("tqc", 300, 200)]


@pytest.mark.parametrize("algorithm, lost, begun", RESUMED)
def test_continues_from_its_checkpoint(algorithm, lost, begun, tmp_path, monkeypatch):
    """Lost before the first checkpoint and after it: everything is reported again, and only what was not kept is trained."""
    monkeypatch.setattr("benchmarks.learning.run.EPISODES", 2)
    run = small_run(algorithm, steps=800, evaluate_every=100, checkpoints=str(tmp_path))
    whole = train_whole(dataclasses.replace(run, checkpoints=""), [])
    with pytest.raises(ConnectionError):
        train(run, lost_at(lost))
    evaluated: list[int] = []
    monkeypatch.setattr(
        "benchmarks.learning.run.evaluate", lambda model, *_: evaluated.append(model.num_timesteps) or evaluate(model, *_)
    )
    again: list[dict] = []
    assert train_whole(run, again) == whole
    assert evaluated == list(range(begun + 100, 801, 100))
    assert [row["seconds"] for row in again] == sorted(row["seconds"] for row in again)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", ["half a line", "a line is missing", "not text"])
def test_log_of_evaluations_is_damaged(damage, tmp_path):
    """Half a last line is as if it had not been written; where an evaluation is lost, the run begins again."""
    run = small_run("sacv", steps=800, evaluate_every=200, checkpoints=str(tmp_path))
    whole = train_whole(dataclasses.replace(run, checkpoints=""), [])
    with pytest.raises(ConnectionError):
        train(run, lost_at(600))
    path = tmp_path / "small-sacv-0" / "evaluations.jsonl"
    text = path.read_text()
    damaged = {"half a line": text[:-9], "a line is missing": text[text.index("\n") + 1 :], "not text": "\xff\n"}[damage]
    path.write_bytes(damaged.encode("latin1"))
    with pytest.raises(ConnectionError):
        train(run, lost_at(800))
    assert train_whole(run, []) == whole


@pytest.mark.parametrize("algorithm", [SAC, SACV])
def test_evaluations_do_not_change_the_training(algorithm):
    """The weights are those of learn() without evaluations, and another seed gives others."""

    def weights(model: SAC) -> np.ndarray:
        return np.concatenate([p.detach().numpy().ravel() for p in model.policy.parameters()])

    run = small_run(algorithm.__name__.lower())
    evaluated = weights(train(run, lambda row: None))
    model = algorithm("MlpPolicy", run.env, seed=run.seed, device="cpu", **SMALL)
    make_vec_env(run.env)  # which draws a number, however many evaluations follow
    assert np.array_equal(evaluated, weights(model.learn(run.steps)))
    assert not np.array_equal(evaluated, weights(train(dataclasses.replace(run, seed=1), lambda row: None)))


def test_evaluation_is_one_episode_of_each_seed():
    model = SAC("MlpPolicy", "Pendulum-v1", seed=0, device="cpu", **SMALL)
    env = make_vec_env("Pendulum-v1", n_envs=3)
    found = evaluate(model, env, seed=70)
    returns = []
    for seed in (70, 71, 72):
        episode = make_vec_env("Pendulum-v1").envs[0]
        observation, _ = episode.reset(seed=seed)
        total, done = 0.0, False
        while not done:
            action, _ = model.predict(observation, deterministic=True)
            observation, reward, terminated, truncated, _ = episode.step(action)
            total, done = total + float(reward), terminated or truncated
        returns.append(total)
    assert found["mean_reward"] == pytest.approx(np.mean(returns), rel=1e-4)
    assert found["std_reward"] == pytest.approx(np.std(returns), rel=1e-3)
    assert found["episode_length"] == 200
    assert evaluate(model, env, seed=70) == found != evaluate(model, env, seed=80)


def test_same_setting_for_all_algorithms():
    """Those of one seed stand together and differ in what is the algorithm's own."""
    args = Namespace(seeds=None, device="cpu", threads=1, results=pathlib.Path("runs"))
    runs = command_line.make_runs(TASKS, ["sacv", "sac"], args)
    # What was tuned on one task was tuned with seeds that no comparison uses
    tuning = [run for run in runs if run.task.endswith(("50k", "15k"))]
    assert {run.seed for run in runs if run not in tuning} == {0, 1, 2, 3, 4}
    assert {run.seed for run in tuning} == {10, 11, 12}
    for ours, sac in zip(runs[::2], runs[1::2], strict=True):
        assert (ours.algorithm, sac.algorithm) == ("sacv", "sac")
        assert dataclasses.replace(ours, algorithm="sac") == sac
    args.seeds = [3]
    (fixed,) = command_line.make_runs({"HalfCheetah-v5": TASKS["HalfCheetah-v5"]}, ["sacv-fixed"], args)
    assert fixed.hyperparameters == {"learning_starts": 10_000, "ent_coef": 0.2} and fixed.steps == 100_000
    assert make_model(dataclasses.replace(fixed, env="Pendulum-v1")).ent_coef_tensor.item() == pytest.approx(0.2)


def test_variants():
    """SAC's target is less by γ·α·d·ln 2 and its temperature has the same gradient; layer norm is in Q and V alone."""
    plain, normalized = (make_model(small_run(algorithm)) for algorithm in ("sac", "sac-normalized"))
    obs, _ = plain.policy.obs_to_tensor(plain.env.reset())
    log_probs = []
    for model in (plain, normalized):
        model.set_random_seed(3)
        log_probs.append(model.actor.action_log_prob(obs)[1].item())
    # One action dimension: ln 2
    assert log_probs[1] - log_probs[0] == pytest.approx(0.6931471806, abs=1e-6)
    assert normalized.target_entropy + log_probs[1] == pytest.approx(plain.target_entropy + log_probs[0], abs=1e-6)
    policy = make_model(small_run("sacv-layer-norm")).policy
    count = {
        name: [type(module).__name__ for module in getattr(policy, name).modules()].count("LayerNorm")
        for name in ("actor", "critic", "value", "value_target")
    }
    assert count == {"actor": 0, "critic": 2, "value": 1, "value_target": 1}


def test_failing_run_is_named_and_the_others_continue(tmp_path):
    runs = [small_run(seed=1, env="NoSuchEnvironment-v0"), small_run(steps=50)]
    (failure,) = Sweep(runs, tmp_path).execute(run_in_process, 1)
    assert failure.startswith("small, sac, seed 1 ended with 1") and "NoSuchEnvironment" in failure
    assert TaskResults(tmp_path, runs[1:]).finished == {("sac", 0)}


def test_a_run_that_ends_early_has_failed(tmp_path):
    def runner(run: Run):
        yield evaluation("sac", 0, 50, -1.0)

    assert Sweep([small_run()], tmp_path).execute(runner, 1) == ["small, sac, seed 0 ended after 50 steps"]
    assert TaskResults(tmp_path, [small_run()]).finished == set()


@pytest.mark.parametrize(
    "change, named",
    [
        (dict(steps=400), "steps"),
        (dict(evaluate_every=100), "evaluate_every"),
        (dict(env="MountainCarContinuous-v0"), "env"),
        (dict(hyperparameters=SMALL | {"gamma": 0.5}), "sac"),
        (None, "versions"),
    ],
)
def test_other_settings_are_not_mixed_in(change, named, tmp_path):
    """A longer task once emptied the file of all that was finished, and a shorter one took the longer one's scores."""
    path = tmp_path / "small.json"
    write_metadata(tmp_path, [small_run()], 1, "")
    if change is None:
        metadata = json.loads(path.read_text())
        path.write_text(json.dumps(metadata | {"versions": metadata["versions"] | {"torch": "1.0"}}))
    before = path.read_text()
    with pytest.raises(SystemExit, match=rf"was made with other {named} \(.*use another --results folder"):
        write_metadata(tmp_path, [small_run(**(change or {}))], 1, "")
    assert path.read_text() == before


def test_one_sweep_in_a_folder(tmp_path):
    """Each wrote the file from its own memory, and what another had finished was gone."""
    with locked(tmp_path), pytest.raises(SystemExit, match="Another sweep writes to"):
        command_line.main(["--results", str(tmp_path), "--tasks", "Pendulum-v1"])
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_where_a_run_comes_from(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["", "--note", "beside other work"])
    assert write_metadata(tmp_path, [small_run("sacv")], 2, "first") == 0
    number = write_metadata(tmp_path, [small_run()], 1, "beside other work")
    sweep = Sweep([small_run()], tmp_path, {"small": number})
    assert sweep.execute(lambda run: (evaluation("sac", 0, steps, -1.0) for steps in run.evaluations), 1) == []
    metadata = json.loads((tmp_path / "small.json").read_text())
    assert metadata["runs"] == {"sac 0": [1]} and metadata["algorithms"] == {"sac": SMALL, "sacv": SMALL}
    assert [sweep["note"] for sweep in metadata["sweeps"]] == ["first", "beside other work"]
    assert metadata["sweeps"][1]["command"] == "python -m benchmarks.learning --note 'beside other work'"
