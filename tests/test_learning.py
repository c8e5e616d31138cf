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
from tests.learning_helpers import evaluation

pytest.importorskip("tqdm", reason="the benchmark's progress bar is not installed")
pytest.importorskip("rliable", reason="the benchmark's statistics are not installed")
pytest.importorskip("sb3_contrib", reason="TQC, which the benchmark compares with, is not installed")
BENCHMARKS = pathlib.Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import learning  # noqa: E402  (after its folder is on the path)
from learning_results import TaskResults, in_lines, sole_sweep, write_sidecar  # noqa: E402  (after its folder is on the path)
from learning_run import ALGORITHMS, TASKS, Run, evaluate, make_model, rows, train  # noqa: E402  (after its folder is on the path)

SMALL = {"learning_starts": 50, "batch_size": 8, "buffer_size": 1000, "policy_kwargs": {"net_arch": [8]}}
TIMES = ("seconds", "cpu_seconds")


def small_run(algorithm: str = "sac", seed: int = 0, **changes) -> Run:
    """Of a second."""
    run = Run("small", "Pendulum-v1", 200, 50, algorithm, seed, SMALL | ALGORITHMS[algorithm])
    return dataclasses.replace(run, **changes)


def without_times(path: pathlib.Path) -> list[list[str]]:
    """:return: the cells of a CSV that are the same each time"""
    return [line.split(",")[:-2] for line in path.read_text().splitlines()]


def processes_of(pid: int) -> list[int]:
    """:return: the children of a process"""
    children = pathlib.Path("/proc", str(pid), "task").glob("*/children")
    return [int(child) for path in children for child in path.read_text().split()]


def command_of(pid: int) -> str:
    """:return: of a process, empty if it is gone"""
    path = pathlib.Path("/proc", str(pid), "cmdline")
    return path.read_text() if path.exists() else ""


@pytest.mark.skipif(not pathlib.Path("/proc/self/task").exists(), reason="finds the children of a process in Linux's /proc")
def test_killed_and_started_again(tmp_path):
    """In the middle of its second run, within a line: the first run is kept, the second is done again."""
    runs = [small_run("sac", steps=400), small_run("sacv", steps=400)]
    path = tmp_path / "killed" / "small.csv"
    script = "import json, pathlib, sys; from learning import Run, Sweep, rows; "
    script += "Sweep([Run(**run) for run in json.loads(sys.argv[1])], pathlib.Path(sys.argv[2])).do(rows, 1)"
    arguments = [json.dumps([dataclasses.asdict(run) for run in runs]), str(path.parent)]
    process = subprocess.Popen([sys.executable, "-c", script, *arguments], cwd=BENCHMARKS, stderr=subprocess.DEVNULL)
    while not path.exists() or ",sacv,0,50," not in path.read_text():
        assert process.poll() is None, "the sweep ended before it was killed"
        time.sleep(0.02)
    (worker,) = processes_of(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = path.read_text()
    with open(path, "a") as file:
        file.write("small,sacv,0,10")

    results = TaskResults(path.parent, runs[:1])
    assert results.finished == {("sac", 0)}
    assert path.read_text() == "".join(line for line in before.splitlines(keepends=True) if ",sacv," not in line)

    assert learning.Sweep(runs, tmp_path / "killed").do(rows, 2) == []
    assert learning.Sweep(runs, tmp_path / "whole").do(rows, 2) == []
    assert without_times(path) == without_times(tmp_path / "whole" / "small.csv")
    assert [cells[1:4] for cells in without_times(path)[1:]] == [
        [run.algorithm, "0", str(steps)] for run in runs for steps in run.evaluations
    ]
    # What the first sweep had begun has not gone on by itself
    assert not pathlib.Path("/proc", str(worker)).exists()
    # A sweep that is done does nothing more
    text = path.read_text()
    assert learning.Sweep(runs, tmp_path / "killed").to_do == []
    assert path.read_text() == text


@pytest.mark.skipif(not pathlib.Path("/proc/self/task").exists(), reason="finds the children of a process in Linux's /proc")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_ended_in_the_middle_of_an_episode(how, tmp_path):
    """A run whose sweep was gone once wrote a checkpoint there and ended: what was resumed from it was another run."""
    run = small_run("sacv", steps=800, evaluate_every=200)
    arguments = [
        json.dumps(dataclasses.asdict(dataclasses.replace(run, checkpoints=str(tmp_path / "checkpoints")))),
        str(tmp_path),
    ]
    script = "import json, pathlib, sys; from learning import Run, Sweep, rows; "
    script += "Sweep([Run(**json.loads(sys.argv[1]))], pathlib.Path(sys.argv[2])).do(rows, 1)"
    command = [sys.executable, "-c", script, *arguments]
    path = tmp_path / "small.csv"
    with subprocess.Popen(command, cwd=BENCHMARKS, stderr=subprocess.DEVNULL, start_new_session=True) as process:
        while not path.exists() or ",sacv,0,400," not in path.read_text():
            assert process.poll() is None, "the sweep ended before it was killed"
            time.sleep(0.02)
        (worker,) = processes_of(process.pid)
        time.sleep(0.2)
        if how == signal.SIGKILL:
            process.kill()  # alone: whoever kills the sweep does not know of its processes
        else:
            os.killpg(process.pid, how)  # as a terminal does
    deadline = time.monotonic() + 60
    while pathlib.Path("/proc", str(worker)).exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not pathlib.Path("/proc", str(worker)).exists()
    subprocess.run(command, cwd=BENCHMARKS, stderr=subprocess.DEVNULL, check=True)
    assert learning.Sweep([run], tmp_path / "whole").do(rows, 1) == []
    assert without_times(path) == without_times(tmp_path / "whole" / "small.csv")


def test_half_a_file(tmp_path):
    """Whatever was written of a CSV, its finished runs and no other lines are kept."""
    run = small_run()
    lines = [evaluation("sac", seed, steps, -1.0) for seed in (0, 1) for steps in run.evaluations]
    text = in_lines(lines, header=True)
    path = tmp_path / "small.csv"
    first_run = text.index("small,sac,1,")
    for cut in (0, 10, first_run - 1, first_run, first_run + 3, len(text) - 1, len(text)):
        path.write_text(text[:cut])
        finished = TaskResults(tmp_path, [run]).finished
        assert finished == {("sac", seed) for seed, end in ((0, first_run), (1, len(text))) if cut >= end}
        assert path.read_text() == in_lines([row for row in lines if ("sac", row["seed"]) in finished], header=True)


def test_told_twice(tmp_path):
    """A run that is retried says its evaluations again: each is kept once, the first time."""
    results = TaskResults(tmp_path, [small_run()])
    assert results.append(evaluation("sac", 0, 100, -2.0)) and results.append(evaluation("sac", 0, 50, -1.0))
    assert not results.append(evaluation("sac", 0, 100, -3.0))
    results.tidy()
    rows_kept = [evaluation("sac", 0, 50, -1.0), evaluation("sac", 0, 100, -2.0)]
    assert results.path.read_text() == in_lines(rows_kept, header=True)


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


@pytest.mark.parametrize(
    "algorithm, lost_at, begun", [("sacv", 100, 0), ("sacv", 500, 400), ("sacv", 700, 600), ("sac", 500, 0)]
)
def test_goes_on_from_its_checkpoint(algorithm, lost_at, begun, tmp_path, monkeypatch):
    """Lost before the first checkpoint and after it: everything is said once more, and SACV trains only what was not kept."""
    monkeypatch.setattr("learning_run.EPISODES", 2)
    run = small_run(algorithm, steps=800, evaluate_every=100, checkpoints=str(tmp_path))
    whole: list[dict] = []
    train(dataclasses.replace(run, checkpoints=""), whole.append)

    def say_until_lost(row: dict) -> None:
        if row["timesteps"] == lost_at:
            raise ConnectionError("lost")

    with pytest.raises(ConnectionError):
        train(run, say_until_lost)
    evaluated: list[int] = []
    monkeypatch.setattr(
        "learning_run.evaluate", lambda model, *_: evaluated.append(model.num_timesteps) or evaluate(model, *_)
    )
    again: list[dict] = []
    train(run, again.append)
    assert [{k: v for k, v in row.items() if k not in TIMES} for row in again] == [
        {k: v for k, v in row.items() if k not in TIMES} for row in whole
    ]
    assert evaluated == list(range(begun + 100, 801, 100))
    assert [row["seconds"] for row in again] == sorted(row["seconds"] for row in again)
    assert not list(tmp_path.iterdir())


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
    runs = learning.make_runs(TASKS, ["sacv", "sac"], args)
    # What was tuned on one task was tuned with seeds that no comparison uses
    tuning = [run for run in runs if run.task.endswith(("50k", "15k"))]
    assert {run.seed for run in runs if run not in tuning} == {0, 1, 2, 3, 4}
    assert {run.seed for run in tuning} == {10, 11, 12}
    for ours, sac in zip(runs[::2], runs[1::2], strict=True):
        assert (ours.algorithm, sac.algorithm) == ("sacv", "sac")
        assert dataclasses.replace(ours, algorithm="sac") == sac
    args.seeds = [3]
    (fixed,) = learning.make_runs({"HalfCheetah-v5": TASKS["HalfCheetah-v5"]}, ["sacv-fixed"], args)
    assert fixed.hyperparameters == {"learning_starts": 10_000, "ent_coef": 0.2} and fixed.steps == 100_000
    assert make_model(dataclasses.replace(fixed, env="Pendulum-v1")).ent_coef_tensor.item() == pytest.approx(0.2)


def test_failing_run_is_named_and_the_others_go_on(tmp_path):
    runs = [small_run(seed=1, env="NoSuchEnvironment-v0"), small_run(steps=50)]
    (failure,) = learning.Sweep(runs, tmp_path).do(rows, 1)
    assert failure.startswith("small, sac, seed 1 ended with 1") and "NoSuchEnvironment" in failure
    assert TaskResults(tmp_path, runs[1:]).finished == {("sac", 0)}


def test_other_versions_are_not_mixed_in(tmp_path):
    write_sidecar(tmp_path, [small_run()], 2, "first")
    write_sidecar(tmp_path, [small_run("sacv")], 2, "second")
    path = tmp_path / "small.json"
    about = json.loads(path.read_text())
    assert [sweep["note"] for sweep in about["sweeps"]] == ["first", "second"]
    assert about["algorithms"] == {"sac": SMALL, "sacv": SMALL} and about["steps"] == 200
    path.write_text(json.dumps(about | {"versions": about["versions"] | {"torch": "1.0"}}))
    with pytest.raises(SystemExit, match="other versions"):
        write_sidecar(tmp_path, [small_run()], 2, "third")


@pytest.mark.parametrize(
    "change, named",
    [
        (dict(steps=400), "steps"),
        (dict(evaluate_every=100), "evaluate_every"),
        (dict(env="MountainCarContinuous-v0"), "env"),
        (dict(hyperparameters=SMALL | {"gamma": 0.5}), "sac"),
    ],
)
def test_other_settings_are_not_mixed_in(change, named, tmp_path):
    """A longer task once emptied the file of all that was finished, and a shorter one took the longer one's scores."""
    write_sidecar(tmp_path, [small_run()], 1, "")
    before = (tmp_path / "small.json").read_text()
    with pytest.raises(SystemExit, match=rf"was made with other {named} \(.*take another --results folder"):
        write_sidecar(tmp_path, [small_run(**change)], 1, "")
    assert (tmp_path / "small.json").read_text() == before


def test_one_sweep_in_a_folder(tmp_path):
    """Each wrote the file from its own memory, and what another had finished was gone."""
    with sole_sweep(tmp_path), pytest.raises(SystemExit, match="Another sweep writes to"):
        learning.main(["--results", str(tmp_path), "--tasks", "Pendulum-v1"])
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    with sole_sweep(tmp_path):
        pass


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--processes", "0"], "--processes must be at least 1, got 0"),
        (["--threads", "-1"], "--threads must be at least 1, got -1"),
        (["--seeds", "0", "-1"], "--seeds must not be negative, got -1"),
        (["--quick", "--tasks", "Reacher-v5"], "--quick chooses tasks, algorithms and seeds"),
        (["--results", __file__], "--results must be a folder"),
    ],
)
def test_arguments_that_cannot_work(arguments, sentence, capsys):
    with pytest.raises(SystemExit):
        learning.parse(arguments)
    assert sentence in capsys.readouterr().err


def test_named_twice_is_done_once():
    args = learning.parse(["--tasks", "Pendulum-v1", "Pendulum-v1", "--seeds", "0", "1", "0", "--algorithms", "sac", "sac"])
    assert (args.tasks, args.seeds, args.algorithms) == (["Pendulum-v1"], [0, 1], ["sac"])


def test_a_run_that_ends_early_has_failed(tmp_path):
    def runner(run: Run):
        yield evaluation("sac", 0, 50, -1.0)

    assert learning.Sweep([small_run()], tmp_path).do(runner, 1) == ["small, sac, seed 0 ended after 50 steps"]
    assert TaskResults(tmp_path, [small_run()]).finished == set()


def test_only_whole_runs_of_this_benchmark_are_kept(tmp_path):
    """Every evaluation with every column; once the last one was enough, and a line without numbers."""
    run = small_run()
    whole = [evaluation("sac", 0, steps, -1.0) for steps in run.evaluations]
    path = tmp_path / "small.csv"
    for damaged in (whole[:2] + whole[3:], [*whole[:3], whole[3] | {"mean_reward": ""}], [*whole[:3], whole[3] | {"seed": 1}]):
        path.write_text(in_lines(damaged, header=True))
        assert TaskResults(tmp_path, [run]).finished == set()
    path.write_text(in_lines([*whole, whole[0]], header=True))
    assert TaskResults(tmp_path, [run]).finished == {("sac", 0)}
    for text in ("hello\n", "task,algorithm\nsmall,sac\n"):
        path.write_text(text)
        with pytest.raises(SystemExit, match=r"small\.csv is not a file of this benchmark"):
            TaskResults(tmp_path, [run])
        assert path.read_text() == text
    for text in ("", "{", "[]", '{"steps": 200}'):
        (tmp_path / "small.json").write_text(text)
        with pytest.raises(SystemExit, match=r"small\.json is damaged"):
            write_sidecar(tmp_path, [run], 1, "")


def test_where_a_run_comes_from_and_a_command_that_can_be_pasted(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["benchmarks/learning.py", "--note", "beside other work"])
    number = write_sidecar(tmp_path, [small_run()], 1, "beside other work")
    assert (
        learning.Sweep([small_run()], tmp_path, {"small": number}).do(
            lambda run: (evaluation("sac", 0, steps, -1.0) for steps in run.evaluations), 1
        )
        == []
    )
    about = json.loads((tmp_path / "small.json").read_text())
    assert about["runs"] == {"sac 0": [number]} == {"sac 0": [0]}
    assert about["sweeps"][0]["command"] == "python benchmarks/learning.py --note 'beside other work'"


@pytest.mark.parametrize("damage", ["half a line", "a line is missing", "no file", "not text"])
def test_what_was_said_is_damaged(damage, tmp_path):
    """Half a last line is as if it had not been said; where an evaluation is not known, the run begins again."""
    run = small_run("sacv", steps=800, evaluate_every=200, checkpoints=str(tmp_path))
    whole: list[dict] = []
    train(dataclasses.replace(run, checkpoints=""), whole.append)

    def lost(at: int):
        def say(row: dict) -> None:
            if row["timesteps"] == at:
                raise ConnectionError("lost")

        return say

    with pytest.raises(ConnectionError):
        train(run, lost(600))
    path = tmp_path / "small-sacv-0" / "said.jsonl"
    text = path.read_text()
    first = text.index("\n") + 1
    if damage == "no file":
        path.unlink()
    else:
        path.write_bytes(
            {"half a line": text[:-9], "a line is missing": text[first:], "not text": "\xff\n"}[damage].encode("latin1")
        )
    with pytest.raises(ConnectionError):
        train(run, lost(800))
    again: list[dict] = []
    train(run, again.append)
    assert [{k: v for k, v in row.items() if k not in TIMES} for row in again] == [
        {k: v for k, v in row.items() if k not in TIMES} for row in whole
    ]


@pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="this system cannot block signals")
def test_a_training_that_is_terminated_ends_at_once(tmp_path):
    """Its checkpoint in the middle of an episode was one from which nothing repeats exactly, and it counted as finished."""
    run = small_run("sacv", steps=100_000, evaluate_every=200, checkpoints=str(tmp_path))
    command = [sys.executable, str(BENCHMARKS / "learning_run.py"), json.dumps(dataclasses.asdict(run))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline().startswith("@")
        time.sleep(0.1)
        process.terminate()
        assert process.wait(timeout=60) == 1
    names = [path.name for path in (tmp_path / "small-sacv-0").iterdir()]
    # Whole episodes have 200 steps
    assert all(int(name.split("_")[-1]) % 200 == 0 for name in names if name.startswith("step")), names


@pytest.mark.skipif(not pathlib.Path("/proc/self/task").exists(), reason="finds the children of a process in Linux's /proc")
def test_interrupted_sweep_ends_at_once(tmp_path):
    """It waited for all trainings that were going on, without a word."""
    command = [sys.executable, "learning.py", "--results", str(tmp_path), "--tasks", "HalfCheetah-v5", "--processes", "1"]
    with subprocess.Popen(command, cwd=BENCHMARKS, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        while not (workers := [pid for pid in processes_of(process.pid) if "learning_run" in command_of(pid)]):
            assert process.poll() is None, "the sweep ended before it was interrupted"
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 130 and "Interrupted: the same command goes on." in output
    deadline = time.monotonic() + 60
    while any(pathlib.Path("/proc", str(worker)).exists() for worker in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(pathlib.Path("/proc", str(worker)).exists() for worker in workers)
