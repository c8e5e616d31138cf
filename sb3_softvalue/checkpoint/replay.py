"""The replay buffer in blocks that are named by their content: what has not changed is not written again."""

import hashlib
import io
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from stable_baselines3.common.buffers import DictReplayBuffer, NStepReplayBuffer, ReplayBuffer
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer

from sb3_softvalue.checkpoint.folder import BLOCK, BLOCKS, WRITING, sync_folder, write_file
from sb3_softvalue.checkpoint.schema import CheckpointError

KNOWN = (ReplayBuffer, DictReplayBuffer, NStepReplayBuffer, HerReplayBuffer)
BLOCK_BYTES = 4 * 1024**2
# Files whose content this process has written or checked, as the file system tells them apart
_checked: set[tuple[int, ...]] = set()


def arrays_of(buffer: ReplayBuffer) -> dict[str, np.ndarray]:
    """
    :param buffer: one of SB3's
    :return: its arrays by name, the first axis of each the rows of the buffer
    :raises CheckpointError: if it holds what cannot be stored without pickle
    """
    if type(buffer) not in KNOWN:
        raise CheckpointError(
            f"A replay buffer of class {type(buffer).__name__} may have state of its own that cannot be stored: use one of "
            "SB3's, or save it with model.save_replay_buffer."
        )
    if getattr(buffer, "copy_info_dict", False):
        raise CheckpointError("HerReplayBuffer(copy_info_dict=True) keeps dictionaries that cannot be stored without pickle.")
    arrays = {}
    for name, value in vars(buffer).items():
        for key, array in value.items() if isinstance(value, dict) else ((None, value),):
            if isinstance(array, np.ndarray) and array.shape[:1] == (buffer.buffer_size,) and array.dtype != object:
                arrays[name if key is None else f"{name}/{key}"] = array
    return arrays


def n_rows(buffer: ReplayBuffer, pos: int, full: bool) -> int:
    """:return: number of rows that hold something; the memory-optimized buffer writes the next one's observation too"""
    return buffer.buffer_size if full else min(pos + 1, buffer.buffer_size)


def _slices(array: np.ndarray, rows: int) -> Iterator[np.ndarray]:
    """:return: views of the array, the content of one block each"""
    size = max(1, BLOCK_BYTES // max(1, array[:1].nbytes))
    return (array[start : min(start + size, rows)] for start in range(0, rows, size))


def _check(name: str, block: np.ndarray, buffer: ReplayBuffer, finite: bool) -> None:
    """
    :param finite: whether rewards, actions and ends of episodes have to be; observations may hold what the networks can use
    :raises ValueError: if a block cannot be learned from
    """
    if finite and block.dtype.kind == "f" and "observations" not in name and not np.isfinite(block).all():
        raise ValueError(f"the {name} in its replay buffer are not all finite")
    # HER's, which are indices
    if block.dtype == np.int64 and name.startswith("ep_") and not ((block >= 0) & (block <= buffer.buffer_size)).all():
        raise ValueError(f"the {name} in its replay buffer are no rows of it")


def write_blocks(buffer: ReplayBuffer, folder: pathlib.Path, finite: bool) -> dict[str, list[str]]:
    """
    Write those blocks that are not there yet or damaged, straight from the buffer's arrays.

    :param buffer: one of SB3's
    :param folder: of the run, claimed
    :param finite: see ``_check``
    :return: for each array the names of its blocks
    :raises ValueError: if they could not be learned from
    """
    (folder / BLOCKS).mkdir(exist_ok=True)
    names: dict[str, list[str]] = {}
    for name, array in arrays_of(buffer).items():
        names[name] = []
        for block in _slices(array, n_rows(buffer, buffer.pos, buffer.full)):
            _check(name, block, buffer, finite)
            header, content = _header(block), np.ascontiguousarray(block).reshape(-1).view(np.uint8)
            digest = hashlib.sha256(header)
            digest.update(content.data)
            path = folder / BLOCKS / f"{digest.hexdigest()}.npy"
            if not _is_whole(path):
                write_file(folder / WRITING / BLOCK, header, content.data)
                os.replace(folder / WRITING / BLOCK, path)
                _checked.add(_signature(path))
            names[name].append(path.name)
    sync_folder(folder / BLOCKS)
    return names


def _header(block: np.ndarray) -> bytes:
    """:return: what stands before the numbers in a file of NumPy's format"""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(block))
    return header.getvalue()


def _signature(path: pathlib.Path) -> tuple[int, ...]:
    """:return: what changes when somebody else writes to a file"""
    stat = path.stat()
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


def _is_whole(path: pathlib.Path) -> bool:
    """:return: whether a block is there and is what its name says, which is looked at once in the life of this process"""
    if not path.is_file():
        return False
    if _signature(path) not in _checked:
        if hashlib.sha256(path.read_bytes()).hexdigest() != path.stem:
            return False
        _checked.add(_signature(path))
    return True


def read_blocks(
    buffer: ReplayBuffer, folder: pathlib.Path, names: dict[str, list[str]], rows: int, finite: bool, fill: bool
) -> None:
    """
    Read all blocks one after the other, and check them against the buffer that they are for.

    :param buffer: that they are for
    :param folder: of the run
    :param names: see ``write_blocks``
    :param rows: that they hold
    :param finite: see ``_check``
    :param fill: whether to copy them into the buffer; it is not touched otherwise
    :raises ValueError: if one is missing, damaged or of another buffer
    """
    arrays = arrays_of(buffer)
    if set(arrays) != set(names):
        raise ValueError(f"its replay buffer has {sorted(names)}, the model's has {sorted(arrays)}")
    for name, array in arrays.items():
        slices = list(_slices(array, rows))
        if len(names[name]) != len(slices):
            raise ValueError(f"it has another number of blocks of {name} than its {rows} rows need")
        for file, own in zip(names[name], slices, strict=True):
            path, header = folder / BLOCKS / file, _header(own)
            if not path.is_file():
                raise ValueError(f"block {file} is missing")
            if path.stat().st_size != len(header) + own.nbytes:
                raise ValueError(f"block {file} is damaged or of another replay buffer")
            content = path.read_bytes()
            if not content.startswith(header) or hashlib.sha256(content).hexdigest() != path.stem:
                raise ValueError(f"block {file} is damaged or of another replay buffer")
            _checked.add(_signature(path))
            block = np.frombuffer(content, own.dtype, offset=len(header)).reshape(own.shape)
            _check(name, block, buffer, finite)
            if fill:
                own[...] = block


def at_episode_boundary(buffer: ReplayBuffer) -> Any:
    """:return: whether the last transition of every environment was the last of its episode"""
    if not buffer.pos and not buffer.full:
        return True
    return bool(buffer.dones[(buffer.pos - 1) % buffer.buffer_size].all())
