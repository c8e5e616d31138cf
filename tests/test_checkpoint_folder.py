"""What lies in a folder of checkpoints: other programs' files, other trainings, leftovers, damage, small limits."""

import errno
import hashlib
import os
import resource
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest

from sb3_softvalue.checkpoint import CheckpointError, ResumableCheckpoint, has_checkpoint, load_checkpoint, save_checkpoint
from sb3_softvalue.checkpoint import folder as folder_module
from sb3_softvalue.checkpoint.folder import checkpoints
from tests.helpers import assert_same
from tests.test_checkpoint import everything, make


def tree(folder: Path) -> dict[str, int]:
    """All files, with their sizes."""
    return {str(path.relative_to(folder)): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()}


def grow(model: Any, folder: Path, times: int) -> None:
    """Train and save."""
    for _ in range(times):
        model.learn(30, reset_num_timesteps=False)
        save_checkpoint(model, folder)


class TestForeignFiles:
    def test_they_stay(self, tmp_path):
        foreign = [
            "replay/demonstrations.npy",
            f"replay/{'a' * 64}.npy",
            "checkpoint-100000/model.zip",
            "checkpoint-000000/notes.txt",
            ".old.checkpoint-000001/x",
            ".0.123/x",
            ".writing/mine",
            "best_model.zip",
        ]
        for name in foreign:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text("of somebody else")
        assert not has_checkpoint(tmp_path)
        with pytest.raises(CheckpointError, match="There is no checkpoint"):
            load_checkpoint(make(), tmp_path)
        (tmp_path / ".writing/mine").unlink()  # a checkpoint becomes of this folder
        model = make()
        grow(model, tmp_path, 4)
        assert len(checkpoints(tmp_path)) == 2
        # Something that was put into a checkpoint itself stays, too
        (checkpoints(tmp_path)[0] / "notes.txt").write_text("of somebody else")
        old = checkpoints(tmp_path)[0]
        grow(model, tmp_path, 2)
        for name in (*foreign[:6], foreign[7]):
            assert (tmp_path / name).read_text() == "of somebody else"
        assert [path.name for path in old.iterdir()] == ["notes.txt"] and old not in checkpoints(tmp_path)
        other = make(seed=3)
        load_checkpoint(other, tmp_path)
        assert_same(everything(other), everything(model))

    def test_what_is_in_the_way_is_named(self, tmp_path):
        model = make()
        for name, make_it in ((".writing", Path.touch), (".lock", Path.mkdir)):
            (folder := tmp_path / name[1:]).mkdir()
            make_it(folder / name)
            with pytest.raises(CheckpointError, match=rf"written to .*/\{name} \(.*\): remove it or choose another"):
                save_checkpoint(model, folder)
        (loop := tmp_path / "loop").symlink_to(loop)
        with pytest.raises(CheckpointError, match=r"could not be written to .*loop"):
            model.learn(10, callback=ResumableCheckpoint(loop, overwrite=True))

    def test_a_pipe_is_not_waited_for(self, tmp_path):
        (tmp_path / "checkpoint-000009").mkdir()
        os.mkfifo(tmp_path / "checkpoint-000009" / "manifest.json")
        save_checkpoint(make(), tmp_path)
        load_checkpoint(make(), tmp_path)

    def test_another_training_is_not_pruned(self, tmp_path):
        first = make()
        grow(first, tmp_path, 3)
        before = tree(tmp_path)
        for learn in (
            lambda: make().learn(60, callback=ResumableCheckpoint(tmp_path, 30)),
            lambda: save_checkpoint(make(), tmp_path),
        ):
            with pytest.raises(CheckpointError, match=r"holds the checkpoints of another run: continue it .*resume=True"):
                learn()
            assert tree(tmp_path) == before
        # The training itself may continue, and one that was loaded
        grow(first, tmp_path, 1)
        other = make(seed=2)
        load_checkpoint(other, tmp_path)
        grow(other, tmp_path, 1)
        new = make(seed=4)
        new.learn(60, callback=ResumableCheckpoint(tmp_path, 30, overwrite=True, keep=1))
        assert len(checkpoints(tmp_path)) == 1
        again = make(seed=5)
        load_checkpoint(again, tmp_path)
        assert_same(everything(again), everything(new))

    def test_resume_or_overwrite(self, tmp_path):
        with pytest.raises(ValueError, match="give one of them"):
            ResumableCheckpoint(tmp_path, resume=True, overwrite=True)

    def test_numbers_over_999999(self, tmp_path):
        model = make().learn(10)
        save_checkpoint(model, tmp_path)
        checkpoints(tmp_path)[0].rename(tmp_path / "checkpoint-999999")
        for _ in range(3):
            save_checkpoint(model, tmp_path)
        assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-1000001", "checkpoint-1000002"]
        load_checkpoint(make(), tmp_path)


class TestLeftovers:
    """Of saves that failed or were killed."""

    def calls(self, folder: Path, model: Any, monkeypatch: pytest.MonkeyPatch) -> int:
        """How often a save calls the operating system."""
        count, _ = self.fail_at(10**9, folder, model, monkeypatch)
        return count

    def fail_at(self, at: int, folder: Path, model: Any, monkeypatch: pytest.MonkeyPatch, exit_: bool = False) -> Any:
        """Save with an error, or the end of the process, at one call."""
        count, error = 0, None

        def counted(original: Any) -> Any:
            def call(*args: Any, **kwargs: Any) -> Any:
                nonlocal count
                count += 1
                if count == at and exit_:
                    os._exit(9)
                if count == at:
                    raise OSError(errno.ENOSPC, "No space left on device")
                return original(*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            for name in ("fsync", "replace", "rename", "mkdir", "unlink", "rmdir", "open", "listdir", "stat"):
                patch.setattr(os, name, counted(getattr(os, name)))
            patch.setattr("builtins.open", counted(open))
            try:
                save_checkpoint(model, folder)
            except CheckpointError as caught:
                error = caught
        return count, error

    @pytest.mark.parametrize("killed", [False, True], ids=["errors", "kills"])
    def test_at_every_call_of_the_system(self, killed, tmp_path, monkeypatch):
        """The checkpoint before is whole, and the next save leaves nothing of the failed one."""
        monkeypatch.setattr("sb3_softvalue.checkpoint.replay.BLOCK_BYTES", 800)
        model = make().learn(60)
        save_checkpoint(model, tmp_path / "whole")
        model.learn(30, reset_num_timesteps=False)
        shutil.copytree(tmp_path / "whole", tmp_path / "count")
        total = self.calls(tmp_path / "count", model, monkeypatch)
        clean = set(tree(tmp_path / "count"))
        assert total > 30
        for at in range(1, total + 1):
            folder = tmp_path / "run"
            shutil.copytree(tmp_path / "whole", folder)
            if killed:
                if (child := os.fork()) == 0:
                    self.fail_at(at, folder, model, monkeypatch, exit_=True)
                    os._exit(0)
                os.waitpid(child, 0)
                error = None
            else:
                _, error = self.fail_at(at, folder, model, monkeypatch)
            n = len(checkpoints(folder))
            assert n in (1, 2) and (error is None or n == 1), at
            if error:
                # Its space is given back, so that others can write
                assert "No space left on device" in str(error) and set(tree(folder)) - {".lock"} <= set(
                    tree(tmp_path / "whole")
                ), at
            load_checkpoint(make(seed=3), folder)
            save_checkpoint(model, folder, keep=1)
            left = {name for name in tree(folder) if not name.startswith("checkpoint-")}
            assert left <= {name for name in clean if not name.startswith("checkpoint-")} | {".lock"}, at
            other = make(seed=4)
            load_checkpoint(other, folder)
            assert_same(everything(other), everything(model))
            shutil.rmtree(folder)
        print(f"{total} calls")


class TestDamage:
    @pytest.mark.parametrize("kind", ["flipped", "truncated", "empty"])
    def test_a_damaged_block_is_written_again(self, kind, tmp_path):
        """It was reused unchecked, so that no later checkpoint could be loaded."""
        model = make().learn(60)
        save_checkpoint(model, tmp_path)
        block = next((tmp_path / "replay").glob("*.npy"))
        content = bytearray(block.read_bytes())
        if kind == "flipped":
            content[-1] ^= 1
        block.write_bytes({"flipped": content, "truncated": content[:-3], "empty": b""}[kind])
        with pytest.raises(CheckpointError, match=f"block {block.name} is damaged"):
            load_checkpoint(make(), tmp_path)
        save_checkpoint(model, tmp_path)
        other = make(seed=3)
        load_checkpoint(other, tmp_path)
        assert_same(everything(other), everything(model))

    def test_the_one_before_is_named(self, tmp_path):
        model = make()
        grow(model, tmp_path, 2)
        (checkpoints(tmp_path)[1] / "state.json").write_text("{}")
        with pytest.raises(CheckpointError, match=r"is damaged .*; the one before it is .*checkpoint-000000"):
            load_checkpoint(make(), tmp_path)


def test_few_open_files(tmp_path, monkeypatch):
    """One file at a time, however large the buffer: every block was mapped at once."""
    monkeypatch.setattr("sb3_softvalue.checkpoint.replay.BLOCK_BYTES", 8)
    model = make().learn(200)
    save_checkpoint(model, tmp_path)
    assert len(list((tmp_path / "replay").iterdir())) > 300
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    n_open = len(os.listdir("/dev/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (n_open + 12, hard))
    try:
        other = make(seed=3)
        load_checkpoint(other, tmp_path)
        save_checkpoint(other, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert_same(everything(other), everything(model))


def test_a_reader_beside_the_writer(tmp_path):
    """With keep=1 the checkpoint that is being read is removed, and the next one is there."""
    model, other = make().learn(60), make(seed=3)
    save_checkpoint(model, tmp_path, keep=1)
    end = threading.Event()
    errors: list[BaseException] = []

    def write() -> None:
        try:
            while not end.is_set():
                model.replay_buffer.rewards[0] += 1
                save_checkpoint(model, tmp_path, keep=1)
                end.wait(0.05)
        except BaseException as error:
            errors.append(error)

    writer = threading.Thread(target=write)
    writer.start()
    for _ in range(60):
        load_checkpoint(other, tmp_path)
    end.set()
    writer.join()
    assert not errors


def test_blocks_that_no_checkpoint_names(tmp_path):
    """What a kill between a block and the commit leaves is what its name says; what is not is of somebody else."""
    model = make().learn(60)
    save_checkpoint(model, tmp_path)
    left = tmp_path / "replay" / f"{hashlib.sha256(b'left').hexdigest()}.npy"
    left.write_bytes(b"left")
    (tmp_path / "replay" / f"{'b' * 64}.npy").write_bytes(b"of somebody else")
    # A checkpoint of a later version, or a damaged one, keeps its blocks
    later = tmp_path / "replay" / f"{hashlib.sha256(b'later').hexdigest()}.npy"
    later.write_bytes(b"later")
    (tmp_path / "checkpoint-000009").mkdir()
    (tmp_path / "checkpoint-000009" / "manifest.json").write_text(f'{{"format": 3, "blocks": ["{later.name}"]}}')
    (tmp_path / ".writing").mkdir()
    for name in ("block.npy", "state.json", "mine"):
        (tmp_path / ".writing" / name).touch()
    with folder_module.claimed(tmp_path):
        assert not left.exists() and later.exists() and (tmp_path / "replay" / f"{'b' * 64}.npy").exists()
        assert [path.name for path in (tmp_path / ".writing").iterdir()] == ["mine"]
    load_checkpoint(make(), tmp_path / "checkpoint-000000")
