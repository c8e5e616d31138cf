"""A folder of checkpoints, each of which is there whole or not at all.

A checkpoint is written to ``.writing``, flushed to the disk and renamed, so that a kill at any moment leaves the one before
it. Its manifest holds a checksum of every file. The blocks of the replay buffer lie beside the checkpoints, named by their
content, and are shared by all that refer to them. Deleted are only files that are a checkpoint's, and blocks that are what
their name says and stand in no manifest: by the same process or by the next that claims the folder.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import re
import warnings
from collections.abc import Iterator
from typing import Any

from sb3_softvalue.checkpoint.schema import CheckpointError, of_type, record, sequence

try:
    import fcntl
except ImportError:  # Windows: nothing keeps two processes from one folder there
    fcntl = None  # type: ignore[assignment]  # a module elsewhere

# What is written; format 1, of version 0.1.0, is read too
FORMAT, FORMATS = 2, (1, 2)
MANIFEST, BLOCKS, WRITING, BLOCK = "manifest.json", "replay", ".writing", "block.npy"
FILES = ("state.json", "tensors.pt")
_NAME = re.compile(r"checkpoint-\d{6,}")
_BLOCK = re.compile(r"[0-9a-f]{64}\.npy")
# Of each folder that is claimed the process
_claimed: dict[str, int] = {}


def checkpoints(folder: pathlib.Path) -> list[pathlib.Path]:
    """:return: the checkpoints in the folder, oldest first; what else may have such a name has no manifest"""
    return [path for path in _named(folder) if is_checkpoint(path)]


def _named(folder: pathlib.Path) -> list[pathlib.Path]:
    """:return: all that has the name of a checkpoint, whoever has made it, by number"""
    try:
        names = [name for name in os.listdir(folder) if _NAME.fullmatch(name)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise CheckpointError(f"The folder {folder!s:.200} cannot be read ({error.strerror}): choose another.") from error
    return [folder / name for name in sorted(names, key=lambda name: int(name.partition("-")[2]))]


def is_checkpoint(folder: pathlib.Path) -> bool:
    """:return: whether the folder is one checkpoint and not that of a run, which may have any name"""
    return os.path.isfile(folder / MANIFEST)


def has_checkpoint(folder: str | pathlib.Path) -> bool:
    """
    :param folder: of a run
    :return: whether ``load_checkpoint`` finds something there
    """
    return is_checkpoint(pathlib.Path(folder)) or bool(checkpoints(pathlib.Path(folder)))


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
            f"The checkpoint could not be written to {folder!s:.200} ({error.strerror or error}): make room or choose "
            "another folder; older checkpoints there are whole."
        ) from error


@contextlib.contextmanager
def claimed(folder: pathlib.Path) -> Iterator[None]:
    """
    Keep other processes from writing to the folder for so long, or until the end of this process, not of those it forks.

    :param folder: of the run, made if it is not there; what dead processes have left in it is removed
    :raises CheckpointError: if another process has claimed it, or nothing can be written there
    """
    key, lock = str(folder.resolve()), -1
    if _claimed.get(key) == os.getpid():  # around this
        yield
        return
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids):
            raise PermissionError(13, os.strerror(13))
        lock = _lock(folder / ".lock")
    _claimed[key] = process = os.getpid()
    try:
        with writing(folder):
            sweep(folder)
        yield
    finally:
        if process == os.getpid():
            del _claimed[key]
            if lock >= 0:
                os.close(lock)


def _lock(path: pathlib.Path) -> int:
    """:return: an open file that is locked for this process, and not for those that it forks; -1 without locks"""
    if fcntl is None:
        return -1
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o666)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if isinstance(error, (BlockingIOError, PermissionError)):
            raise CheckpointError(
                f"Another process writes checkpoints to {path.parent}: end it, or give each run a folder of its own."
            ) from error
        reason = f"{path.parent} has no locks of files ({error.strerror})"
        warnings.warn(f"{reason}: make sure that no other process writes there.", stacklevel=2)
        return -1
    return descriptor


def sweep(folder: pathlib.Path) -> None:
    """Remove what was being written, and blocks that no checkpoint names, not even one that is damaged."""
    _remove(folder / WRITING, BLOCK, *FILES, MANIFEST)
    named: set[str] = set()
    for path in _named(folder):
        # Any other error ends this: a checkpoint that cannot be read now keeps its blocks
        with contextlib.suppress(FileNotFoundError, NotADirectoryError, IsADirectoryError):
            named.update(_BLOCK.findall((path / MANIFEST).read_text(errors="replace")))
    with contextlib.suppress(FileNotFoundError):
        for name in filter(_BLOCK.fullmatch, set(os.listdir(folder / BLOCKS)) - named):
            path = folder / BLOCKS / name
            if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == path.stem:  # else somebody else's
                path.unlink()


def _remove(folder: pathlib.Path, *names: str) -> None:
    """Remove a checkpoint, or what is written of one, but nothing that somebody else has put there."""
    for name in names:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            (folder / name).unlink()
    with contextlib.suppress(OSError):  # is not there, or is somebody else's, too
        folder.rmdir()


def sync_folder(folder: pathlib.Path) -> None:
    """Make the names in a folder survive a power failure, where the system can do that."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_file(path: pathlib.Path, *parts: Any) -> None:
    """Write bytes to a file and flush it to the disk."""
    with open(path, "wb") as file:
        file.writelines(parts)
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def unfinished(folder: pathlib.Path) -> Iterator[None]:
    """
    A save: what it has written is removed again where it fails.

    :param folder: of the run, claimed
    """
    (folder / WRITING).mkdir(exist_ok=True)
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError, CheckpointError):
            sweep(folder)
        raise


def commit(folder: pathlib.Path, files: dict[str, bytes], manifest: dict[str, Any], keep: int) -> None:
    """
    Write a checkpoint whose blocks are there already, and remove all but the last ``keep`` of this run.

    :param folder: of the run
    :param files: name to content
    :param manifest: beside its format and its files
    :param keep: number of checkpoints to keep
    """
    for name, content in files.items():
        write_file(folder / WRITING / name, content)
    sums = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    text = json.dumps({"format": FORMAT, "files": sums, **manifest}, indent=1).encode()
    # Its own checksum is its last line
    write_file(folder / WRITING / MANIFEST, text + b"\n" + hashlib.sha256(text).hexdigest().encode())
    sync_folder(folder / WRITING)
    taken = [int(path.name.partition("-")[2]) for path in _named(folder)]
    os.rename(folder / WRITING, folder / f"checkpoint-{max(taken, default=-1) + 1:06d}")
    # The checkpoint is there: what fails from here on is made up for by the next one
    with contextlib.suppress(OSError, CheckpointError):
        sync_folder(folder)
        runs = {}
        for path in checkpoints(folder):
            with contextlib.suppress(ValueError):  # damaged
                runs[path] = read_manifest(path)["run"]
        kept = [path for path, run in runs.items() if run == manifest["run"]][-keep:]
        for path in runs.keys() - kept:
            _remove(path, *FILES, MANIFEST)
        sweep(folder)


def read_manifest(path: pathlib.Path) -> dict[str, Any]:
    """
    :param path: of a checkpoint
    :return: its manifest, of which everything but the facts is checked
    :raises ValueError: if it is not what was written
    """
    text, _, checksum = (path / MANIFEST).read_bytes().rpartition(b"\n")
    if hashlib.sha256(text).hexdigest().encode() != checksum:
        raise ValueError(f"{MANIFEST} is not what was written")
    manifest = json.loads(text)
    if type(manifest) is not dict or manifest.get("format") not in FORMATS:
        found = manifest.get("format") if type(manifest) is dict else None
        raise ValueError(f"its format is {found!r:.40} and this version reads {FORMATS}: load it with the one that wrote it")

    def block(name: str, value: Any) -> str:
        if not _BLOCK.fullmatch(of_type(str)(name, value)):
            raise ValueError(f"{name} is {value!r:.80}")
        return value

    manifest = record(
        {"files": record(dict.fromkeys(FILES, of_type(str))), "facts": of_type(dict), "format": of_type(int)}
        | {"blocks": record({}, sequence(block)), **({"run": of_type(str)} if manifest["format"] == FORMAT else {})}
    )("manifest", manifest)
    return {"run": "", **manifest}


def newest(folder: pathlib.Path) -> pathlib.Path:
    """
    :param folder: of the run, or of one checkpoint
    :return: the newest checkpoint, or the one that the folder itself is
    :raises CheckpointError: if there is none
    """
    found = [folder] if is_checkpoint(folder) else checkpoints(folder)
    if not found:
        raise CheckpointError(f"There is no checkpoint in {folder!s:.200}: save one with save_checkpoint.")
    return found[-1]


def read_files(path: pathlib.Path, manifest: dict[str, Any]) -> dict[str, bytes]:
    """
    :param path: of a checkpoint
    :param manifest: its own
    :return: its files by name
    :raises ValueError: if one is not what was written
    """
    files = {name: (path / name).read_bytes() for name in FILES}
    for name, content in files.items():
        if hashlib.sha256(content).hexdigest() != manifest["files"][name]:
            raise ValueError(f"{name} is not what was written")
    return files
