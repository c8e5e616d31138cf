"""A folder of checkpoints, each of which is there whole or not at all.

A checkpoint is written to a folder beside its place, flushed to the disk and renamed, so that a kill at any moment leaves the
one before it. Its manifest holds a checksum of every file. The blocks of the replay buffer lie beside the checkpoints, named
by their content, and are shared by all that refer to them.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import re
import shutil
from collections.abc import Iterator
from typing import Any

try:
    import fcntl
except ImportError:  # Windows: nothing keeps two processes from one folder there
    fcntl = None  # type: ignore[assignment]  # a module elsewhere

FORMAT = 1
MANIFEST, BLOCKS = "manifest.json", "replay"
_NAME = re.compile(r"checkpoint-\d{6}")
_BLOCK = re.compile(r"[0-9a-f]{64}\.npy")
# Folders that are claimed, by which process (one that was forked has claimed nothing), and its file
_locks: dict[str, tuple[int, int]] = {}


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read: one sentence that says why, and the model and older checkpoints as before."""


def checkpoints(folder: pathlib.Path) -> list[pathlib.Path]:
    """:return: the whole checkpoints in the folder, oldest first"""
    return sorted(path for path in folder.glob("checkpoint-*") if _NAME.fullmatch(path.name) and path.is_dir())


def has_checkpoint(folder: str | pathlib.Path) -> bool:
    """
    :param folder: of a run
    :return: whether ``load_checkpoint`` finds something there
    """
    folder = pathlib.Path(folder)
    return bool(checkpoints(folder)) or (is_checkpoint(folder) and folder.is_dir())


def is_checkpoint(folder: pathlib.Path) -> bool:
    """:return: whether the folder is one checkpoint and not that of a run, which may have any name"""
    return _NAME.fullmatch(folder.name) is not None and not checkpoints(folder)


@contextlib.contextmanager
def writing(folder: pathlib.Path) -> Iterator[None]:
    """
    Turn what the operating system says into one sentence.

    :param folder: of the run
    """
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"The checkpoint could not be written to {folder} ({error.strerror or error}): make room or choose another "
            "folder; older checkpoints there are whole."
        ) from error


def lock(folder: pathlib.Path) -> bool:
    """
    Claim the folder for this process, until ``unlock`` or its end.

    :param folder: of the run, made if it is not there
    :return: whether it was not claimed already
    :raises CheckpointError: if another process has claimed it
    :raises OSError: if nothing can be written there
    """
    folder.mkdir(parents=True, exist_ok=True)
    path, key = folder / ".lock", str(folder.resolve())
    if fcntl is None or _is_claimed(key, path):
        return False
    # The lock's file may be writable in a folder that is not
    probe = folder / f".probe.{os.getpid()}"
    probe.mkdir(exist_ok=True)
    probe.rmdir()
    file = os.open(path, os.O_CREAT | os.O_RDWR)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(file)
        raise CheckpointError(
            f"Another process writes checkpoints to {folder}, or has done so and still runs: end it, or give each run a "
            "folder of its own."
        ) from error
    unlock(folder)  # what this process claimed at the same place before it was removed
    _locks[key] = os.getpid(), file
    return True


def _is_claimed(key: str, path: pathlib.Path) -> bool:
    """:return: whether this process has claimed the folder, which has not been removed since then"""
    process, file = _locks.get(key, (None, -1))
    return process == os.getpid() and path.exists() and os.path.samestat(os.fstat(file), path.stat())


def unlock(folder: pathlib.Path) -> None:
    """:param folder: that is claimed no longer"""
    process, file = _locks.pop(str(folder.resolve()), (None, -1))
    if process == os.getpid():
        os.close(file)


def sync_folder(folder: pathlib.Path) -> None:
    """Make the names in a folder survive a power failure, where the system can do that."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_file(path: pathlib.Path, content: bytes | memoryview) -> str:
    """
    :param path: of a new file
    :param content: to write, and flush to the disk
    :return: its SHA-256
    """
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return hashlib.sha256(content).hexdigest()


def commit(folder: pathlib.Path, files: dict[str, bytes], blocks: dict[str, Any], facts: dict[str, Any], keep: int) -> None:
    """
    Write a checkpoint whose blocks are there already, and remove what is older than the last ``keep``.

    :param folder: of the run
    :param files: name to content
    :param blocks: for each array of the replay buffer the names of its blocks
    :param facts: what must be the same in the model that loads it
    :param keep: number of checkpoints to keep
    """
    last = checkpoints(folder)[-1:]
    number = int(last[0].name[-6:]) + 1 if last else 0
    temporary = folder / f".{number}.{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        sums = {name: write_file(temporary / name, content) for name, content in files.items()}
        manifest = {"format": FORMAT, "files": sums, "blocks": blocks, "facts": facts}
        text = json.dumps(manifest, indent=1).encode()
        # Its own checksum is its last line
        write_file(temporary / MANIFEST, text + b"\n" + hashlib.sha256(text).hexdigest().encode())
        sync_folder(temporary)
        os.rename(temporary, folder / f"checkpoint-{number:06d}")
        sync_folder(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for path in checkpoints(folder)[:-keep]:
        # Renamed first: half of a checkpoint must never look like one
        os.rename(path, folder / f".old.{path.name}")
    for path in folder.glob(".old.*"):
        shutil.rmtree(path, ignore_errors=True)
    _remove_unused_blocks(folder)


def _remove_unused_blocks(folder: pathlib.Path) -> None:
    """Blocks to which no checkpoint refers; all stay where a manifest cannot be read."""
    used = set()
    for path in checkpoints(folder):
        try:
            used |= {name for names in _read_manifest(path)["blocks"].values() for name in names}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return
    for block in (folder / BLOCKS).glob("*.npy"):
        if block.name not in used:
            block.unlink()


def _read_manifest(path: pathlib.Path) -> dict[str, Any]:
    """:return: the manifest of a checkpoint, checked"""
    text, _, checksum = (path / MANIFEST).read_bytes().rpartition(b"\n")
    if hashlib.sha256(text).hexdigest().encode() != checksum:
        raise ValueError(f"{MANIFEST} is not what was written")
    return json.loads(text)


def read_checkpoint(folder: pathlib.Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    """
    Read the newest checkpoint, or the one that the folder itself is, and check all of its files.

    :param folder: of the run, or of one checkpoint
    :return: its manifest, and its files by name
    :raises CheckpointError: if there is none, or it is damaged
    """
    found = [folder] if is_checkpoint(folder) else checkpoints(folder)
    if not found or not found[-1].is_dir():
        raise CheckpointError(f"There is no checkpoint in {folder}: save one with model.save_checkpoint(folder).")
    path = found[-1]
    other = f"; the one before it is {found[-2]}" if len(found) > 1 else ""
    try:
        manifest = _read_manifest(path)
        if manifest["format"] != FORMAT:
            raise CheckpointError(
                f"The checkpoint {path} has format {manifest['format']!r} and this version of sb3_softvalue reads {FORMAT}: "
                "load it with the version that wrote it."
            )
        files = {}
        for name, checksum in manifest["files"].items():
            if not re.fullmatch(r"[a-z]+\.[a-z]+", name):
                raise ValueError(f"it names a file {name!r}")
            files[name] = (path / name).read_bytes()
            if hashlib.sha256(files[name]).hexdigest() != checksum:
                raise ValueError(f"{name} is not what was written")
        for name in (name for names in manifest["blocks"].values() for name in names):
            if not _BLOCK.fullmatch(name):
                raise ValueError(f"it names a block {name!r}")
        if not isinstance(manifest["facts"], dict):
            raise ValueError("it says nothing about its model")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"The checkpoint {path} is damaged ({error}){other}.") from error
    return manifest, files
