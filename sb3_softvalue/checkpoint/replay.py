"""The replay buffer in blocks that are named by their content: what has not changed is not written again."""

import hashlib
import io
import os
import pathlib
from typing import Any

import numpy as np
from stable_baselines3.common.buffers import DictReplayBuffer, NStepReplayBuffer, ReplayBuffer
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer

from sb3_softvalue.checkpoint.folder import BLOCKS, CheckpointError, sync_folder

KNOWN = (ReplayBuffer, DictReplayBuffer, NStepReplayBuffer, HerReplayBuffer)
BLOCK_BYTES = 4 * 1024**2


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


def n_rows(buffer: ReplayBuffer) -> int:
    """:return: number of rows that hold something; the memory-optimized buffer writes the next one's observation too"""
    return buffer.buffer_size if buffer.full else min(buffer.pos + 1, buffer.buffer_size)


def block_rows(array: np.ndarray) -> int:
    """:return: rows of a block"""
    return max(1, BLOCK_BYTES // max(1, array[:1].nbytes))


def write_blocks(buffer: ReplayBuffer, folder: pathlib.Path) -> dict[str, list[str]]:
    """
    Write those blocks that are not there yet, straight from the buffer's arrays.

    :param buffer: one of SB3's
    :param folder: of the run
    :return: for each array the names of its blocks
    """
    (folder / BLOCKS).mkdir(exist_ok=True)
    rows = n_rows(buffer)
    names: dict[str, list[str]] = {}
    for name, array in arrays_of(buffer).items():
        names[name] = []
        for start in range(0, rows, block_rows(array)):
            block = array[start : min(start + block_rows(array), rows)]
            path = folder / BLOCKS / f"{_content(block)}.npy"
            if not path.is_file():
                temporary = path.with_suffix(f".{os.getpid()}")
                _save(block, temporary)
                os.replace(temporary, path)
            names[name].append(path.name)
    sync_folder(folder / BLOCKS)
    return names


def _header(block: np.ndarray) -> bytes:
    """:return: what stands before the numbers in a file of NumPy's format"""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(block))
    return header.getvalue()


def _numbers(block: np.ndarray) -> Any:
    """:return: the block's memory, not a copy"""
    return np.ascontiguousarray(block).reshape(-1).view(np.uint8)


def _content(block: np.ndarray) -> str:
    """:return: SHA-256 of the file that a block becomes"""
    digest = hashlib.sha256(_header(block))
    digest.update(_numbers(block))
    return digest.hexdigest()


def _save(block: np.ndarray, path: pathlib.Path) -> None:
    """Write a block as .npy and flush it to the disk."""
    with open(path, "wb") as file:
        file.write(_header(block))
        file.write(_numbers(block))
        file.flush()
        os.fsync(file.fileno())


def read_blocks(buffer: ReplayBuffer, folder: pathlib.Path, names: dict[str, list[str]], rows: int) -> dict[str, list[Any]]:
    """
    Check all blocks against the buffer that they are for; nothing is copied yet.

    :param buffer: that they will be copied into
    :param folder: of the run
    :param names: see ``write_blocks``
    :param rows: that they hold
    :return: for each array its blocks, mapped from the files
    :raises CheckpointError: if one is missing, damaged or of another buffer
    """
    arrays, blocks = arrays_of(buffer), {}
    if set(arrays) != set(names):
        raise CheckpointError(f"The checkpoint's replay buffer has {sorted(names)}, the model's has {sorted(arrays)}.")
    for name, array in arrays.items():
        size = block_rows(array)
        if len(names[name]) != -(-rows // size):
            raise CheckpointError(f"The checkpoint has another number of blocks of {name} than its {rows} rows need.")
        blocks[name] = [
            _read(folder / BLOCKS / file, array, min(size, rows - start))
            for file, start in zip(names[name], range(0, rows, size), strict=True)
        ]
    return blocks


def _read(path: pathlib.Path, array: np.ndarray, rows: int) -> np.ndarray:
    """:return: one block, mapped from its file and checked"""
    try:
        block = np.load(path, mmap_mode="r", allow_pickle=False)
        header = _header(block)
        with open(path, "rb") as file:
            as_written = file.read(len(header)) == header and path.stat().st_size == len(header) + block.nbytes
        fits = block.shape == (rows, *array.shape[1:]) and block.dtype == array.dtype
        whole = as_written and fits and _content(block) == path.stem
    except (OSError, ValueError, EOFError, TypeError, AttributeError, OverflowError) as error:
        raise CheckpointError(f"The checkpoint's block {path.name} is missing or damaged ({error}).") from error
    if not whole:
        raise CheckpointError(f"The checkpoint's block {path.name} is damaged or of another replay buffer.")
    return block


def fill(buffer: ReplayBuffer, blocks: dict[str, list[Any]]) -> None:
    """
    :param buffer: to copy into
    :param blocks: from ``read_blocks``
    """
    for name, array in arrays_of(buffer).items():
        start = 0
        for block in blocks[name]:
            array[start : start + len(block)] = block
            start += len(block)
