"""A folder of checkpoints, each of which is complete or absent.

A checkpoint is written to ``.writing``, flushed to the disk and renamed, so that a kill at any moment leaves the one before.
Its manifest holds a checksum of every file. The blocks of the replay buffer lie beside the checkpoints, named by their
content, and are shared by all that list them. Deleted are only files of a checkpoint, and blocks that match their name and
that no manifest lists: by the same process or by the next one that claims the folder.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import re
import stat
import tempfile
import warnings
from collections.abc import Iterator
from typing import Any

from sb3_softvalue.checkpoint.schema import CheckpointError, like

try:
    import fcntl
except ImportError:  # Windows: nothing keeps two processes from one folder there
    fcntl = None  # type: ignore[assignment]  # a module elsewhere

# What is written; format 1, of version 0.1.0, is read too
FORMAT, FORMATS = 2, (1, 2)
MANIFEST, BLOCKS, WRITING, BLOCK = "manifest.json", "replay", ".writing", "block.npy"
FILES = ("state.json", "tensors.pt")
# One for each number
_NAME = re.compile(r"checkpoint-(\d{6}|[1-9]\d{6,})")
_BLOCK = re.compile(r"[0-9a-f]{64}\.npy")
# The lock of each folder that this process has claimed, an open file; None without locks
_claimed: dict[str, int | None] = {}


def checkpoints(folder: pathlib.Path) -> list[pathlib.Path]:
    """:return: the checkpoints in the folder, oldest first; other folders with such a name have no manifest"""
    return [path for path in _named(folder).values() if os.path.isfile(path / MANIFEST)]


def _named(folder: pathlib.Path) -> dict[int, pathlib.Path]:
    """:return: everything with the name of a checkpoint, by number in rising order"""
    try:
        names = filter(_NAME.fullmatch, os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise CheckpointError(f"The folder {folder!s:.200} cannot be read ({error.strerror}): choose another.") from error
    return dict(sorted((int(name.partition("-")[2]), folder / name) for name in names))


def find(folder: pathlib.Path) -> list[pathlib.Path]:
    """:return: what can be loaded from a folder, oldest first: itself if it is a checkpoint"""
    return [folder] if os.path.isfile(folder / MANIFEST) else checkpoints(folder)


def has_checkpoint(folder: str | pathlib.Path) -> bool:
    """
    :param folder: of a run
    :return: whether ``load_checkpoint`` finds something there
    """
    return bool(find(pathlib.Path(folder)))


def runs(folder: pathlib.Path) -> dict[pathlib.Path, str]:
    """:return: the training of each checkpoint that is not damaged"""
    found = {}
    for path in checkpoints(folder):
        with contextlib.suppress(OSError, ValueError):
            found[path] = read_manifest(path)["run"]
    return found


@contextlib.contextmanager
def claimed(folder: pathlib.Path) -> Iterator[None]:
    """
    Keep other processes from writing to the folder meanwhile. A forked process has no claim.

    :param folder: of the run, made if it is not there; what dead processes have left in it is removed
    :raises CheckpointError: if another process has claimed it, or the system fails here or within
    """
    key = os.path.realpath(folder)  # also of a loop of links, which resolve() refuses with an error of its own
    with contextlib.ExitStack() as claim:
        try:
            if key not in _claimed:
                folder.mkdir(parents=True, exist_ok=True)
                # Also where the lock's file of an earlier run can be written
                tempfile.TemporaryFile(dir=folder).close()
                _claimed[key] = _lock(folder / ".lock")
                claim.callback(_release, key)
                sweep(folder)
            yield
        except OSError as error:
            is_taken = isinstance(error, (FileExistsError, IsADirectoryError, NotADirectoryError)) and error.filename
            place, advice = (error.filename, "remove it") if is_taken else (folder, "make room")
            raise CheckpointError(
                f"The checkpoint could not be written to {place!s:.200} ({error.strerror or error}): {advice} or choose "
                "another folder; older checkpoints there are complete."
            ) from error


def _lock(path: pathlib.Path) -> int | None:
    """:return: an open file that is locked until it is closed, whoever else opens and closes it; None without locks"""
    if fcntl is None:
        return None
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return descriptor
    except OSError as error:
        os.close(descriptor)
        if isinstance(error, (BlockingIOError, PermissionError)):
            raise CheckpointError(
                f"Another process writes checkpoints to {path.parent}: end it, or give each run a folder of its own."
            ) from error
        reason = f"{path.parent} has no locks of files ({error.strerror})"
        warnings.warn(f"{reason}: make sure that no other process writes there.", stacklevel=2)
        return None


def _release(*keys: str) -> None:
    for key in keys:
        descriptor = _claimed.pop(key, None)  # nothing in a forked process, which has released all
        if descriptor is not None:
            os.close(descriptor)


if hasattr(os, "register_at_fork"):  # or a forked process would keep the lock when this one has ended
    os.register_at_fork(after_in_child=lambda: _release(*_claimed))


def sweep(folder: pathlib.Path) -> None:
    """Remove what was being written, and blocks that no manifest lists, not even one that is damaged."""
    _remove(folder / WRITING, BLOCK, *FILES, MANIFEST)
    listed: set[str] = set()
    for path in _named(folder).values():
        # Any other error ends this: a checkpoint that cannot be read now keeps its blocks
        with contextlib.suppress(FileNotFoundError, NotADirectoryError, IsADirectoryError):
            if stat.S_ISREG((path / MANIFEST).stat().st_mode):  # a pipe would be waited for
                listed.update(_BLOCK.findall((path / MANIFEST).read_text(errors="replace")))
    with contextlib.suppress(FileNotFoundError):
        for name in filter(_BLOCK.fullmatch, set(os.listdir(folder / BLOCKS)) - listed):
            path = folder / BLOCKS / name
            if path.is_file() and is_block(path, path.read_bytes()):
                path.unlink()


def is_block(path: pathlib.Path, content: bytes) -> bool:
    """:return: whether the content is what the name of the block says"""
    return hashlib.sha256(content).hexdigest() == path.stem


def _remove(folder: pathlib.Path, *names: str) -> None:
    """Remove a checkpoint, complete or not, but nothing that somebody else has put there."""
    for name in names:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            (folder / name).unlink()
    with contextlib.suppress(OSError):  # is not there, or holds something of somebody else
        folder.rmdir()


def sync_folder(folder: pathlib.Path) -> None:
    """Make the names in a folder survive a power failure, where the system can do that."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_file(path: pathlib.Path, content: Any) -> None:
    """Write bytes to a file and flush it to the disk."""
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def unfinished(folder: pathlib.Path) -> Iterator[None]:
    """Where a save fails, what it has written to the claimed folder is removed."""
    (folder / WRITING).mkdir(exist_ok=True)
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError, CheckpointError):
            sweep(folder)
        raise


def commit(folder: pathlib.Path, files: dict[str, bytes], manifest: dict[str, Any], keep: int) -> None:
    """
    Write a checkpoint whose blocks are there already, and remove all but the last ``keep`` of this training.

    :param manifest: without its format and checksums
    """
    sums = {}
    for name, content in files.items():
        write_file(folder / WRITING / name, content)
        sums[name] = hashlib.sha256(content).hexdigest()
    text = json.dumps({"format": FORMAT, "files": sums, **manifest}, indent=1).encode()
    # Its own checksum is its last line
    write_file(folder / WRITING / MANIFEST, text + b"\n" + hashlib.sha256(text).hexdigest().encode())
    sync_folder(folder / WRITING)
    os.rename(folder / WRITING, folder / f"checkpoint-{max(_named(folder), default=-1) + 1:06d}")
    # The checkpoint is there: the next one repeats what fails from here
    with contextlib.suppress(OSError, CheckpointError):
        sync_folder(folder)
        found = runs(folder)
        own = [path for path, run in found.items() if run == manifest["run"]]
        for path in found.keys() - own[-keep:]:
            _remove(path, *FILES, MANIFEST)
        sweep(folder)


def read_manifest(path: pathlib.Path) -> dict[str, Any]:
    """:raises ValueError: if the manifest is damaged or of another version; its facts are not checked"""
    text, _, checksum = (path / MANIFEST).read_bytes().rpartition(b"\n")
    if hashlib.sha256(text).hexdigest().encode() != checksum:
        raise ValueError(f"{MANIFEST} is not what was written")
    manifest = like(dict, MANIFEST, json.loads(text))
    found = manifest.get("format")
    if found not in FORMATS:
        raise ValueError(f"its format is {found!r:.40} and this version reads {FORMATS}: load it with the one that wrote it")
    if found == 1:
        manifest["run"] = ""

    def block(name: str, value: Any) -> str:
        if not _BLOCK.fullmatch(like(str, name, value)):
            raise ValueError(f"{name} is {value!r:.80}")
        return value

    own = {"format": int, "run": str, "facts": dict, "files": dict.fromkeys(FILES, str), "blocks": {...: [block, ...]}}
    return like(own, MANIFEST, manifest)


def read_files(path: pathlib.Path, manifest: dict[str, Any]) -> dict[str, bytes]:
    """:raises ValueError: if a file of the checkpoint is damaged"""
    files = {name: (path / name).read_bytes() for name in FILES}
    for name, content in files.items():
        if hashlib.sha256(content).hexdigest() != manifest["files"][name]:
            raise ValueError(f"{name} is not what was written")
    return files
