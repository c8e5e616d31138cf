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
from stable_baselines3.common.callbacks import BaseCallback

from sb3_softvalue.checkpoint import ResumableCheckpoint, folder, has_checkpoint
from tests.test_checkpoint import everything, make

pytestmark = pytest.mark.slow
TOTAL, KILLS, KILLS_WHILE_WRITING = 3_000, 20, 8


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


def child(run: Path) -> None:
    """Train to the end, from where the folder says; writing takes long and shows itself."""
    fsync = os.fsync

    def slow_fsync(descriptor: int) -> None:
        (run / "writing").touch()
        time.sleep(0.03)
        fsync(descriptor)

    folder.os.fsync = slow_fsync
    model = make(seed=0)
    if has_checkpoint(run):
        with open(run / "resumed", "a") as file:
            file.write(f"{model.load_checkpoint(run)} {model.num_timesteps}\n")
    checkpoint = ResumableCheckpoint(run, 100)
    save = checkpoint._save

    def marked() -> None:
        save()
        (run / "writing").unlink(missing_ok=True)

    checkpoint._save = marked  # type: ignore[method-assign]  # to slow it down
    model.learn(TOTAL - model.num_timesteps, reset_num_timesteps=False, callback=[checkpoint, Slowly()])
    result = {"steps": model.num_timesteps, "stored": model.replay_buffer.size(), "digest": digest(everything(model))}
    (run / "result.json").write_text(json.dumps({**result, "updates": model._n_updates}))


def start(run: Path) -> subprocess.Popen[bytes]:
    root = str(Path(__file__).parents[1])
    env = os.environ | {"PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, __file__, str(run)], env=env, stdout=subprocess.DEVNULL)


def finish(run: Path) -> None:
    """Let the training end; a minute on an idle core, and none is left behind where it takes too long."""
    process = start(run)
    try:
        assert process.wait(timeout=900) == 0
    finally:
        process.kill()
        process.wait()


def test_killed_twenty_times(tmp_path):
    whole, run, rng = tmp_path / "whole", tmp_path / "run", random.Random(0)
    whole.mkdir()
    run.mkdir()
    finish(whole)
    kills = while_writing = 0
    while kills < KILLS:
        (run / "writing").unlink(missing_ok=True)
        process = start(run)
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
        finish(run)
    print(f"{kills} kills, {while_writing} of them while writing; resumed:\n{(run / 'resumed').read_text()}")
    assert kills == KILLS and while_writing >= 5
    lines = (run / "resumed").read_text().splitlines()
    assert all(line.startswith("True") for line in lines)
    result = json.loads((run / "result.json").read_text())
    assert result["steps"] == TOTAL
    assert result == json.loads((whole / "result.json").read_text())


if __name__ == "__main__":
    child(Path(sys.argv[1]))
