"""A training that is killed twenty times, some of them while it writes, ends as the one that was never killed."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stable_baselines3 import SAC, TD3
from stable_baselines3.common.callbacks import BaseCallback

from sb3_softvalue import SACV
from sb3_softvalue.checkpoint import ResumableCheckpoint, folder, has_checkpoint, load_checkpoint
from tests.test_checkpoint import everything, make

pytestmark = pytest.mark.slow
TOTAL, KILLS, KILLS_WHILE_WRITING = 3_000, 20, 12
ALGORITHMS = {"SACV": SACV, "SAC": SAC, "TD3": TD3}


class Slowly(BaseCallback):
    """Time enough for a kill."""

    def _on_step(self) -> bool:
        time.sleep(0.002)
        return True


def digest(value: Any) -> str:
    """Of all numbers in a nested state."""
    sha = hashlib.sha256()

    def visit(item: Any) -> None:
        if isinstance(item, dict):
            for key in sorted(item, key=str):
                sha.update(str(key).encode())
                visit(item[key])
        elif isinstance(item, (list, tuple)):
            for part in item:
                visit(part)
        else:
            sha.update(np.asarray(item).tobytes() if hasattr(item, "shape") else str(item).encode())

    visit(value)
    return sha.hexdigest()


def child(algorithm: str, run: Path) -> None:
    """Train to the end, from where the folder says; writing takes long and shows itself."""
    fsync = os.fsync

    def slow_fsync(descriptor: int) -> None:
        (run / "writing").touch()
        time.sleep(0.03)
        fsync(descriptor)

    folder.os.fsync = slow_fsync
    model = make(seed=0, algorithm=ALGORITHMS[algorithm])
    if has_checkpoint(run):
        with open(run / "resumed", "a") as file:
            file.write(f"{load_checkpoint(model, run)}\n")
    checkpoint = ResumableCheckpoint(run, 100, resume=True)
    save = checkpoint.save_if_due

    def marked(now: bool) -> float:
        due_at = save(now)
        (run / "writing").unlink(missing_ok=True)
        return due_at

    checkpoint.save_if_due = marked  # type: ignore[method-assign]  # to slow it down
    model.learn(TOTAL, callback=[checkpoint, Slowly()])
    result = {"steps": model.num_timesteps, "stored": model.replay_buffer.size(), "digest": digest(everything(model))}
    (run / "result.json").write_text(json.dumps({**result, "updates": model._n_updates}))


def start(algorithm: str, run: Path) -> subprocess.Popen[bytes]:
    root = str(Path(__file__).parents[1])
    env = os.environ | {"PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, __file__, algorithm, str(run)], env=env, stdout=subprocess.DEVNULL)


def finish(algorithm: str, run: Path) -> None:
    """Let the training end; a minute on an idle core, and none is left behind where it takes too long."""
    process = start(algorithm, run)
    try:
        assert process.wait(timeout=900) == 0
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_killed_twenty_times(algorithm, tmp_path):
    whole, run, rng = tmp_path / "whole", tmp_path / "run", random.Random(0)
    whole.mkdir()
    run.mkdir()
    finish(algorithm, whole)
    kills = while_writing = 0
    while kills < KILLS:
        (run / "writing").unlink(missing_ok=True)
        process = start(algorithm, run)
        while not (run / "writing").exists() and process.poll() is None:
            time.sleep(0.005)
        # Now it writes its first checkpoint: kill it there, or some time later
        time.sleep(rng.uniform(0.0, 0.1) if kills < KILLS_WHILE_WRITING else rng.uniform(0.0, 1.5))
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
        while_writing += (run / "writing").exists()
        if not has_checkpoint(run):
            assert kills <= KILLS_WHILE_WRITING
    assert process.poll() is None or kills == KILLS or (run / "result.json").exists()
    if not (run / "result.json").exists():
        finish(algorithm, run)
    print(f"{kills} kills, {while_writing} of them while writing; resumed:\n{(run / 'resumed').read_text()}")
    assert kills == KILLS and while_writing >= 10
    lines = (run / "resumed").read_text().splitlines()
    assert all(line.endswith("exactly") and "not" not in line for line in lines)
    result = json.loads((run / "result.json").read_text())
    assert result["steps"] == TOTAL
    assert result == json.loads((whole / "result.json").read_text())


if __name__ == "__main__":
    child(sys.argv[1], Path(sys.argv[2]))
