"""The report of the benchmark of learning agrees with the files."""

import pathlib

import numpy as np
import pytest

from tests.learning_helpers import evaluation, write_json

pytest.importorskip("tqdm", reason="the benchmark's progress bar is not installed")
pytest.importorskip("rliable", reason="the benchmark's statistics are not installed")
from benchmarks.common.statistics import interval, iqm, quartiles
from benchmarks.learning import __main__ as command_line
from benchmarks.learning import report
from benchmarks.learning.measured import FinishedRuns
from benchmarks.learning.results import to_csv

# The scores are the means of the evaluations after 10,000, 15,000 and 20,000 steps: each the middle one of the three
OURS, SACS = (-100.0, -120.0, -140.0, -240.0), (-95.0, -115.0, -125.0, -300.0)


@pytest.fixture(autouse=True)
def few_repetitions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.common.statistics.REPETITIONS", 300)


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    """Results of Pendulum-v1 with the scores above, one run of which is not finished."""
    lines = []
    for algorithm, scores in (("sac", SACS), ("sacv", OURS)):
        for seed, score in enumerate(scores):
            returns = {step: -1000.0 for step in (2_500, 5_000, 7_500, 12_500)} | {
                10_000: score - 30,
                15_000: score,
                17_500: 999.0,
                20_000: score + 30,
            }
            lines += [evaluation(algorithm, seed, steps, value, steps / 1000) for steps, value in returns.items()]
    lines += [evaluation("sacv", 4, 5_000, -900.0)]
    (tmp_path / "Pendulum-v1.csv").write_text(to_csv(lines, header=True))
    write_json(tmp_path, "Pendulum-v1", 20_000, 2_500)
    return tmp_path


def test_statistics():
    # Of two seeds 0 and 1, the IQM of a resample is 0, 1/2, 1/2 or 1, each as likely
    assert interval(iqm, np.array([0.0, 1.0])) == (0.0, 1.0)
    assert interval(iqm, np.array([5.0, 5.0, 5.0])) == (5.0, 5.0)
    assert interval(lambda a, b: iqm(a) / iqm(b), np.full(3, 3.0), np.full(4, 2.0)) == (1.5, 1.5)
    assert quartiles(np.array([1.0, 2.0, 3.0, 4.0, 9.0])) == (2.0, 3.0, 4.0)


def test_numbers_of_the_report(folder):
    runs = FinishedRuns(folder)
    ours, sac = (runs.scores("Pendulum-v1", algorithm) for algorithm in ("sacv", "sac"))
    np.testing.assert_allclose(ours, OURS)
    np.testing.assert_allclose(sac, SACS)
    # Of four the middle two: (-120 - 140) / 2 and (-115 - 125) / 2
    assert iqm(ours) == pytest.approx(-130) and iqm(sac) == pytest.approx(-120)
    # Seeds 0 to 3 of 5 are finished
    assert runs.missing("Pendulum-v1", "sacv") == 1 == runs.missing("Pendulum-v1", "sac")
    # -100 is over three of SAC's, -120 over two, -140 and -240 over one: 7 of 16 pairs
    probability, (low, high) = report.improvement(runs)["Pendulum-v1"]
    assert probability == pytest.approx(7 / 16) and 0 <= low < 7 / 16 < high <= 1
    # -130 only at the end of seeds 0 (-70), 1 (-90) and 2 (-110), and for seed 0 from its score's first evaluation on
    np.testing.assert_allclose(report.first_reached(runs, "Pendulum-v1", "sacv", -130.0), [10.0, 15.0, 17.5, 17.5])
    assert report.first_reached(runs, "Pendulum-v1", "sacv", 1000.0).tolist() == [np.inf] * 4


def test_summary_of_all_tasks_is_of_finished_ones(tmp_path):
    """One run of a fifth task once left a single run of each in the sum."""
    for task, seeds, steps in (("Pendulum-v1", 5, 20_000), ("InvertedPendulum-v5", 5, 25_000), ("Reacher-v5", 1, 50_000)):
        lines = [
            evaluation(algorithm, seed, step, -float(seed)) | {"task": task}
            for algorithm in ("sacv", "sac")
            for seed in range(seeds)
            for step in range(5_000, steps + 1, 5_000)
        ]
        (tmp_path / f"{task}.csv").write_text(to_csv(lines, header=True))
        write_json(tmp_path, task, steps, 5_000)
    runs = FinishedRuns(tmp_path)
    assert runs.tasks == ["Pendulum-v1", "InvertedPendulum-v5", "Reacher-v5"]
    assert runs.whole_tasks() == ["Pendulum-v1", "InvertedPendulum-v5"]
    *_, (low, high) = report.improvement(runs)["all tasks"]
    assert low < 0.4 and high > 0.6


def test_report_is_repeated_from_the_files(folder, capsys):
    command_line.main(["--results", str(folder), "--report"])
    text = (folder / "report.md").read_text()
    assert text in capsys.readouterr().out
    assert "| −130.0 [−240.0, −100.0] | −120.0 [−300.0, −95.0] | difference −10.00 [" in text
    assert "| **not met** so far, 2 runs missing |" in text
    assert "0: −100.0, 1: −120.0, 2: −140.0, 3: −240.0" in text
    assert sorted(path.stem for path in folder.glob("*.png")) == ["curves-minutes", "curves-steps", "improvement", "profiles"]
    command_line.main(["--results", str(folder), "--report"])
    assert (folder / "report.md").read_text() == text


def test_minutes_of_different_processors_do_not_compare(folder):
    sweeps = [{"processor": "fast"}, {"processor": "slow"}]
    origins = {f"{name} {seed}": [0] for name in ("sac", "sacv") for seed in range(4)} | {"sac 1": [0, 1]}
    write_json(folder, "Pendulum-v1", 20_000, 2_500, sweeps=sweeps, runs=origins)
    runs = FinishedRuns(folder)
    assert list(runs.minutes("Pendulum-v1", "sac").index) == [0, 2, 3]
    assert list(runs.minutes("Pendulum-v1", "sacv").index) == [0, 1, 2, 3] == list(runs.table("Pendulum-v1", "sac").index)
    assert runs.minutes("Pendulum-v1", "sac").loc[2, 10_000] == pytest.approx(10.0)
    assert "| 20.0 (of 3) |" in report.seed_table(runs)


def test_what_a_report_leaves_out_is_printed(folder, capsys):
    """A line that a sweep is just writing, an algorithm without a name, a task without a score."""
    with open(folder / "Pendulum-v1.csv", "a") as file:
        file.write(to_csv([evaluation("own", 0, step, -1.0) for step in range(2_500, 20_001, 2_500)]))
        file.write("small,sac,7,20000,-1")
    write_json(folder, "small", 200, 50)
    table = FinishedRuns(folder).table("Pendulum-v1", "sac")
    assert list(table.index) == [0, 1, 2, 3] and not table.isna().to_numpy().any()
    printed = capsys.readouterr().out
    assert "small has no evaluation at a multiple of 5,000 steps" in printed
    assert "'own', of which Pendulum-v1 has runs" in printed
