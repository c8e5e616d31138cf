"""Files of arrays that are never seen half-written."""

import os
import pathlib

import numpy as np


def write_arrays(path: pathlib.Path, arrays: dict[str, np.ndarray]) -> None:
    """
    :param path: of the file, which is replaced at once and never seen half-written
    :param arrays: to write
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            np.savez_compressed(file, **arrays)  # type: ignore[arg-type]  # numpy takes them for allow_pickle
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
