"""The replay buffer in blocks that are named by their content: a block that has not changed is not written again."""

import hashlib
import io
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from stable_baselines3.common.buffers import DictReplayBuffer, NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer

from sb3_softvalue.checkpoint.folder import BLOCK, BLOCKS, WRITING, is_block, sync_folder, write_file
from sb3_softvalue.checkpoint.schema import CheckpointError

KNOWN = (ReplayBuffer, DictReplayBuffer, NStepReplayBuffer, HerReplayBuffer)
BLOCK_BYTES = 4 * 1024**2
# Files whose content this process has written or checked, as the file system identifies them
_checked: set[tuple[int, ...]] = set()


def arrays_of(buffer: ReplayBuffer) -> dict[str, np.ndarray]:
    """
    :param buffer: one of SB3's
    :return: its arrays by name, the first axis of each the rows of the buffer
    :raises CheckpointError: if it may hold something that cannot be stored without pickle
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


def _slices(buffer: ReplayBuffer, array: np.ndarray, pos: int, full: bool) -> Iterator[np.ndarray]:
    """:return: views of the rows that hold something, the content of one block each"""
    # The memory-optimized buffer writes the next row's observation too
    rows = buffer.buffer_size if full else min(pos + 1, buffer.buffer_size)
    size = max(1, BLOCK_BYTES // max(1, array[:1].nbytes))
    return (array[start : min(start + size, rows)] for start in range(0, rows, size))


def _check(name: str, block: np.ndarray, model: OffPolicyAlgorithm) -> None:
    """:raises ValueError: if a block cannot be learned from; observations may hold whatever the networks accept"""
    # A model that does not check them learns from such numbers, as from any buffer of SB3
    checked = getattr(model, "check_finite", False) and "observations" not in name and block.dtype.kind == "f"
    if checked and not np.isfinite(block).all():
        raise ValueError(f"the {name} in its replay buffer are not all finite")
    # HER's, which are indices
    if block.dtype == np.int64 and name.startswith("ep_") and not ((block >= 0) & (block <= model.buffer_size)).all():
        raise ValueError(f"the {name} in its replay buffer are no rows of it")


def write_blocks(model: OffPolicyAlgorithm, folder: pathlib.Path) -> dict[str, list[str]]:
    """
    Write those blocks that are not there yet, or damaged, to the claimed folder.

    :return: for each array of the replay buffer the names of its blocks
    :raises ValueError: if they could not be learned from
    """
    buffer: Any = model.replay_buffer
    (folder / BLOCKS).mkdir(exist_ok=True)
    names: dict[str, list[str]] = {}
    for name, array in arrays_of(buffer).items():
        names[name] = []
        for block in _slices(buffer, array, buffer.pos, buffer.full):
            _check(name, block, model)
            file = io.BytesIO()
            np.save(file, block, allow_pickle=False)
            path = folder / BLOCKS / f"{hashlib.sha256(file.getbuffer()).hexdigest()}.npy"
            if not _is_complete(path):
                write_file(folder / WRITING / BLOCK, file.getbuffer())
                os.replace(folder / WRITING / BLOCK, path)
                _checked.add(_signature(path))
            names[name].append(path.name)
    sync_folder(folder / BLOCKS)
    return names


def _signature(path: pathlib.Path) -> tuple[int, ...]:
    """:return: numbers that change when somebody else writes to a file"""
    stat = path.stat()
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


def _is_complete(path: pathlib.Path) -> bool:
    """:return: whether a block is there and undamaged; this process reads it once"""
    if not path.is_file():
        return False
    if _signature(path) not in _checked:
        if not is_block(path, path.read_bytes()):
            return False
        _checked.add(_signature(path))
    return True


def read_blocks(
    model: OffPolicyAlgorithm, folder: pathlib.Path, names: dict[str, list[str]], position: dict[str, Any], fill: bool
) -> None:
    """
    Read one block after the other and check it.

    :param names: see ``write_blocks``
    :param position: ``pos`` and ``full`` of the buffer that was saved
    :param fill: whether to copy the blocks into the model's buffer, which is not changed otherwise
    :raises ValueError: if a block is damaged or of another buffer
    """
    buffer: Any = model.replay_buffer
    arrays = arrays_of(buffer)
    if set(arrays) != set(names):
        raise ValueError(f"its replay buffer has {sorted(names)}, the model's has {sorted(arrays)}")
    for name, array in arrays.items():
        slices = list(_slices(buffer, array, position["pos"], position["full"]))
        if len(names[name]) != len(slices):
            raise ValueError(f"it has another number of blocks of {name} than its rows need")
        for file, own in zip(names[name], slices, strict=True):
            path = folder / BLOCKS / file
            # NumPy's header is shorter
            content = path.read_bytes() if path.stat().st_size < own.nbytes + 4096 else b""
            block = np.load(io.BytesIO(content), allow_pickle=False) if is_block(path, content) else None
            if block is None or (block.dtype, block.shape) != (own.dtype, own.shape):
                raise ValueError(f"block {file} is damaged or of another replay buffer")
            _checked.add(_signature(path))
            _check(name, block, model)
            if fill:
                own[...] = block


def at_episode_boundary(buffer: ReplayBuffer) -> bool:
    """:return: whether the last transition of every environment was the last of its episode"""
    if not buffer.pos and not buffer.full:
        return True
    return bool(buffer.dones[(buffer.pos - 1) % buffer.buffer_size].all())
