"""Several workers on one study, one of them killed: each trial run once, none lost."""

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("rl_zoo3", reason='RL Zoo is not installed: pip install "sb3_softvalue[zoo]"')
optuna = pytest.importorskip("optuna", reason="optuna is not installed")

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("postgresql.sh")
TRIALS = 6
# The launcher with a quick heartbeat, so that the test need not wait minutes for a worker to be given up
WORKER = """
import sb3_softvalue.zoo.shared_study as study
from sb3_softvalue.cli import main
study.HEARTBEAT_SECONDS, study.GRACE_SECONDS = 1, 8
main()
"""


@pytest.fixture
def journal(tmp_path: Path) -> str:
    return str(tmp_path / "study.log")


@pytest.fixture
def postgresql() -> Iterator[str]:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as parent:
        os.chmod(parent, 0o755)
        folder = str(Path(parent, "server"))
        start = subprocess.run([SCRIPT, "start", folder], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if start.returncode == 77:
            pytest.skip(start.stdout.strip().split("\n")[-1])
        assert start.returncode == 0, start.stdout
        try:
            yield f"postgresql+psycopg://zoo@/optuna?host={folder}"
        finally:
            subprocess.run([SCRIPT, "stop", folder], check=True)


def trials(storage: str) -> list["optuna.trial.FrozenTrial"]:
    """What the study holds now."""
    if storage.endswith(".log"):
        journal = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(storage))
        return optuna.load_study(study_name="test", storage=journal).trials
    database = optuna.storages.RDBStorage(storage)
    try:
        return optuna.load_study(study_name="test", storage=database).trials
    finally:
        database.remove_session()
        database.engine.dispose()


def start_worker(storage: str, log: Path) -> "subprocess.Popen[bytes]":
    arguments = "train --algo sacv --env Pendulum-v1 -optimize -n 400 --eval-episodes 1 --study-name test -f".split()
    arguments += [str(log.parent / "logs"), "--storage", storage, "--max-total-trials", str(TRIALS), "--pruner", "none"]
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    with log.open("wb") as file:
        return subprocess.Popen([sys.executable, "-c", WORKER, *arguments], stdout=file, stderr=file, env=environ)


def wait_for_two_running(storage: str, workers: list["subprocess.Popen[bytes]"]) -> None:
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and all(worker.poll() is None for worker in workers):
        try:
            if Counter(trial.state.name for trial in trials(storage))["RUNNING"] == 2:
                return
        except (KeyError, FileNotFoundError):
            # No study yet
            pass
        time.sleep(0.2)
    raise AssertionError("The workers never ran two trials at once.")


@pytest.mark.parametrize("kind", ["journal", "postgresql"])
def test_no_trial_is_lost_when_a_worker_is_killed(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    storage = request.getfixturevalue(kind)
    logs = [tmp_path / "first.txt", tmp_path / "second.txt"]
    workers = []
    try:
        for log in logs:
            workers.append(start_worker(storage, log))
            # Optuna sets up a new database without a lock: the first worker has to be through
            while log == logs[0] and "A new study created" not in log.read_text():
                assert workers[0].poll() is None, log.read_text()
                time.sleep(0.2)
        wait_for_two_running(storage, workers)
        workers[0].send_signal(signal.SIGKILL)
        assert workers[1].wait(timeout=600) == 0, logs[1].read_text()
    finally:
        for worker in workers:
            worker.kill()

    states = Counter(trial.state.name for trial in trials(storage))
    assert states == {"COMPLETE": TRIALS, "FAIL": 1}
    [lost] = [trial for trial in trials(storage) if trial.state.name == "FAIL"]
    [again] = [trial for trial in trials(storage) if trial.system_attrs.get("failed_trial") == lost.number and trial != lost]
    assert again.params.items() >= lost.params.items() and again.value is not None
    finished = Counter(number for log in logs for number in re.findall(r"Trial (\d+) finished", log.read_text()))
    assert set(finished.values()) == {1} and len(finished) == TRIALS
