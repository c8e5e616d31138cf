"""Atomic writing of array files."""

import os
import pathlib

import numpy as np


def write_arrays(path: pathlib.Path, arrays: dict[str, np.ndarray]) -> None:
    """
    Write atomically: a reader sees the old or the new file.

    :param path: path of the file
    :param arrays: arrays to write
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            np.savez_compressed(file, **arrays)  # type: ignore[arg-type]  # mypy matches ** with allow_pickle
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
