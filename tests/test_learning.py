"""The benchmark of learning: a sweep that is killed ends as one that was not, and its report says what the files say."""

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

pytest.importorskip("tqdm", reason="the benchmark's progress bar is not installed")
pytest.importorskip("rliable", reason="the benchmark's statistics are not installed")
pytest.importorskip("sb3_contrib", reason="TQC, which the benchmark compares with, is not installed")
BENCHMARKS = pathlib.Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import learning  # noqa: E402  (after its folder is on the path)
import learning_report  # noqa: E402  (after its folder is on the path)
from learning_results import TaskResults, in_lines, write_sidecar  # noqa: E402  (after its folder is on the path)
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


def evaluation(algorithm: str, seed: int, timesteps: int, mean_reward: float, minutes: float = 1.0) -> dict:
    """:return: a row of a CSV"""
    row = {"task": "small", "algorithm": algorithm, "seed": seed, "timesteps": timesteps, "mean_reward": mean_reward}
    return row | {"std_reward": 0.0, "episode_length": 1.0, "seconds": 60 * minutes, "cpu_seconds": 60 * minutes}


def processes_of(pid: int) -> list[int]:
    """:return: the children of a process"""
    children = pathlib.Path("/proc", str(pid), "task").glob("*/children")
    return [int(child) for path in children for child in path.read_text().split()]


@pytest.mark.skipif(not pathlib.Path("/proc/self/task").exists(), reason="finds the children of a process in Linux's /proc")
def test_killed_and_started_again(tmp_path):
    """In the middle of its second run, within a line: the first run is kept, the second is done again."""
    runs = [small_run("sac"), small_run("sacv", steps=400)]
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


# The scores are the means of the evaluations after 10,000, 15,000 and 20,000 steps: each the middle one of the three
OURS, SACS = (-100.0, -120.0, -140.0, -240.0), (-95.0, -115.0, -125.0, -300.0)


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    """Results of Pendulum-v1 with the scores above, one run of which is not finished."""
    lines = []
    for algorithm, scores in (("sac", SACS), ("sacv", OURS)):
        for seed, score in enumerate(scores):
            returns = {5_000: -1000.0, 10_000: score - 30, 15_000: score, 17_500: 999.0, 20_000: score + 30}
            lines += [evaluation(algorithm, seed, steps, value, steps / 1000) for steps, value in returns.items()]
    lines += [evaluation("sacv", 4, 5_000, -900.0)]
    (tmp_path / "Pendulum-v1.csv").write_text(in_lines(lines, header=True))
    (tmp_path / "Pendulum-v1.json").write_text(json.dumps({"steps": 20_000}))
    return tmp_path


def test_numbers_of_the_report(folder):
    measured = learning_report.Measured(folder)
    ours, sac = (measured.scores("Pendulum-v1", algorithm) for algorithm in ("sacv", "sac"))
    np.testing.assert_allclose(ours, OURS)
    np.testing.assert_allclose(sac, SACS)
    # Of four the middle two: (-120 - 140) / 2 and (-115 - 125) / 2
    assert learning_report.iqm(ours) == pytest.approx(-130) and learning_report.iqm(sac) == pytest.approx(-120)
    # Seeds 0 to 3 of 5 are finished
    assert measured.missing("Pendulum-v1", "sacv") == 1 == measured.missing("Pendulum-v1", "sac")
    # -100 is over three of SAC's, -120 over two, -140 and -240 over one: 7 of 16 pairs
    probability, (low, high) = learning_report.improvement(measured)["Pendulum-v1"]
    assert probability == pytest.approx(7 / 16) and 0 <= low < 7 / 16 < high <= 1
    # -130 only at the end of seeds 0 (-70), 1 (-90) and 2 (-110), and for seed 0 from its score's first evaluation on
    reached = learning_report.first_reached(measured, "Pendulum-v1", "sacv", -130.0)
    np.testing.assert_allclose(reached, [10.0, 15.0, 17.5, 17.5])
    assert learning_report.first_reached(measured, "Pendulum-v1", "sacv", 1000.0).tolist() == [np.inf] * 4


def test_what_is_said_of_all_tasks_is_of_finished_ones(tmp_path):
    """One run of a fifth task once left a single run of each in the sum."""
    for task, seeds, steps in (("Pendulum-v1", 5, 20_000), ("InvertedPendulum-v5", 5, 25_000), ("Reacher-v5", 1, 50_000)):
        lines = [
            evaluation(algorithm, seed, step, -float(seed)) | {"task": task}
            for algorithm in ("sacv", "sac")
            for seed in range(seeds)
            for step in (steps - 10_000, steps - 5_000, steps)
        ]
        (tmp_path / f"{task}.csv").write_text(in_lines(lines, header=True))
        (tmp_path / f"{task}.json").write_text(json.dumps({"steps": steps}))
    measured = learning_report.Measured(tmp_path)
    assert measured.tasks == ["Pendulum-v1", "InvertedPendulum-v5", "Reacher-v5"]
    assert measured.whole_tasks() == ["Pendulum-v1", "InvertedPendulum-v5"]
    *_, (low, high) = learning_report.improvement(measured)["all tasks whose runs are all there"]
    assert low < 0.4 and high > 0.6


def test_bar_of_pendulum():
    met = learning_report.BARS[0].met

    def last(scores) -> np.ndarray:
        return np.repeat(np.array(scores)[:, None], 3, axis=1)

    assert not met(last(OURS), last(SACS))  # a seed under -200
    ours = [*OURS[:3], -200.0]
    assert met(last(ours), last(SACS))  # -130 against -120
    assert not met(last(ours), last([-95.0, -108.0, -108.0, -300.0]))  # 22 below SAC
    assert not met(last([-166.0] * 4), last([-166.0] * 4))


def test_intervals():
    """Of two seeds 0 and 1, the IQM of a resample is 0, 1/2, 1/2 or 1, each as likely."""
    assert learning_report.interval(learning_report.iqm, np.array([0.0, 1.0])) == (0.0, 1.0)
    assert learning_report.interval(learning_report.iqm, np.array([5.0, 5.0, 5.0])) == (5.0, 5.0)
    ratio = learning_report.interval(
        lambda a, b: learning_report.iqm(a) / learning_report.iqm(b), np.full(3, 3.0), np.full(4, 2.0)
    )
    assert ratio == (1.5, 1.5)


def test_report_is_repeated_from_the_files(folder, capsys, monkeypatch):
    monkeypatch.setattr(learning_report, "REPETITIONS", 500)
    learning.main(["--results", str(folder), "--report"])
    text = (folder / "report.md").read_text()
    assert text in capsys.readouterr().out
    assert "| −130.0 [−240.0, −100.0] | −120.0 [−300.0, −95.0] | difference −10.00 [" in text
    assert "| **not met** so far, 2 runs to come |" in text
    assert "0: −100.0, 1: −120.0, 2: −140.0, 3: −240.0" in text
    assert sorted(path.name for path in folder.glob("*.png")) == [
        "curves-minutes.png",
        "curves-steps.png",
        "improvement.png",
        "profiles.png",
    ]
    learning.main(["--results", str(folder), "--report"])
    assert (folder / "report.md").read_text() == text


def test_report_of_tuning_has_no_bar_and_every_algorithm_has_a_name(tmp_path, monkeypatch):
    monkeypatch.setattr(learning_report, "REPETITIONS", 100)
    lines = [
        evaluation(algorithm, seed, steps, 100.0 * seed + steps / 100)
        for algorithm in learning.ALGORITHMS
        for seed in (10, 11, 12)
        for steps in (40_000, 45_000, 50_000)
    ]
    (tmp_path / "HalfCheetah-v5-50k.csv").write_text(in_lines(lines, header=True))
    (tmp_path / "HalfCheetah-v5-50k.json").write_text(json.dumps({"steps": 50_000}))
    learning.main(["--results", str(tmp_path), "--report"])
    text = (tmp_path / "report.md").read_text()
    assert "The bar" not in text and "Every seed" in text
    assert all(f"| {name} |" in text for name in learning_report.NAMES.values())


def test_nothing_to_report_yet(tmp_path):
    with pytest.raises(SystemExit, match="is finished: there is nothing to report yet"):
        learning.main(["--results", str(tmp_path), "--report"])
