"""The report of the benchmark of learning says what the files say."""

import pathlib
import sys

import numpy as np
import pytest

from tests.learning_helpers import evaluation, write_about

pytest.importorskip("tqdm", reason="the benchmark's progress bar is not installed")
pytest.importorskip("rliable", reason="the benchmark's statistics are not installed")
sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "benchmarks"))
import learning
import learning_report
from learning_results import in_lines

# The scores are the means of the evaluations after 10,000, 15,000 and 20,000 steps: each the middle one of the three
OURS, SACS = (-100.0, -120.0, -140.0, -240.0), (-95.0, -115.0, -125.0, -300.0)


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
    (tmp_path / "Pendulum-v1.csv").write_text(in_lines(lines, header=True))
    write_about(tmp_path, "Pendulum-v1", 20_000, 2_500)
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
            for step in range(5_000, steps + 1, 5_000)
        ]
        (tmp_path / f"{task}.csv").write_text(in_lines(lines, header=True))
        write_about(tmp_path, task, steps, 5_000)
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
        for steps in range(5_000, 50_001, 5_000)
    ]
    (tmp_path / "HalfCheetah-v5-50k.csv").write_text(in_lines(lines, header=True))
    write_about(tmp_path, "HalfCheetah-v5-50k", 50_000, 5_000)
    learning.main(["--results", str(tmp_path), "--report"])
    text = (tmp_path / "report.md").read_text()
    assert "The bar" not in text and "Every seed" in text
    assert all(f"| {name} |" in text for name in learning_report.NAMES.values())


def test_minutes_of_different_processors_do_not_compare(folder):
    sweeps = [{"processor": "fast"}, {"processor": "slow"}]
    runs = {f"{name} {seed}": [0] for name in ("sac", "sacv") for seed in range(4)} | {"sac 1": [0, 1]}
    write_about(folder, "Pendulum-v1", 20_000, 2_500, sweeps=sweeps, runs=runs)
    measured = learning_report.Measured(folder)
    assert list(measured.minutes("Pendulum-v1", "sac").index) == [0, 2, 3]
    assert (
        list(measured.minutes("Pendulum-v1", "sacv").index) == [0, 1, 2, 3] == list(measured.table("Pendulum-v1", "sac").index)
    )
    assert measured.minutes("Pendulum-v1", "sac").loc[2, 10_000] == pytest.approx(10.0)
    assert "| 20.0 (of 3) |" in learning_report.seed_table(measured)


def test_what_a_report_leaves_out_is_told(folder, capsys):
    """A line that a sweep is just writing, an algorithm without a name, a task without a score."""
    with open(folder / "Pendulum-v1.csv", "a") as file:
        file.write(in_lines([evaluation("own", 0, step, -1.0) for step in range(2_500, 20_001, 2_500)]))
        file.write("small,sac,7,20000,-1")
    write_about(folder, "small", 200, 50)
    measured = learning_report.Measured(folder)
    table = measured.table("Pendulum-v1", "sac")
    assert list(table.index) == [0, 1, 2, 3] and not table.isna().to_numpy().any()
    said = capsys.readouterr().out
    assert "small has no evaluation at a multiple of 5,000 steps" in said and "'own', of which Pendulum-v1 has runs" in said


def test_nothing_to_report_yet(tmp_path):
    with pytest.raises(SystemExit, match="is finished: there is nothing to report yet"):
        learning.main(["--results", str(tmp_path), "--report"])
