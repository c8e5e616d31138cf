"""
Forge every leaf of a checkpoint, with right checksums, and see what becomes of it:

    python -m tests.checkpoint_fuzz [cases of each scenario]

Each case runs in a process of its own: the model refuses it and is bit for bit as before, or loads it and trains.
"""

import collections
import copy
import hashlib
import io
import json
import os
import random
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch as th
from stable_baselines3 import SAC

from sb3_softvalue.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from sb3_softvalue.checkpoint.folder import checkpoints
from tests.helpers import assert_same
from tests.test_checkpoint import make, state_of

SCENARIOS: dict[str, dict[str, Any]] = {
    "plain": {},
    "normalized": dict(name="noise of two environments", normalize=True),
    "gSDE": dict(name="gSDE"),
    "HER": dict(name="HER"),
    "SAC": dict(algorithm=SAC),
}
OUTCOMES = ("refused, unchanged", "loaded, trained", "loaded, failed later", "refused, changed", "raw exception")
VALUES = (None, "x", "", -1, 0, 1, 3, 10**30, -(10**30), 1e30, -0.5, float("nan"), float("inf"), True, [], [1], {}, {"a": 1})
Path_ = tuple[Any, ...]


def scenario(name: str, seed: int = 0) -> Any:
    """A model of the fuzz."""
    options = dict(SCENARIOS[name])
    return make(options.pop("name", "plain"), seed=seed, **options)


def leaves(value: Any, path: Path_ = ()) -> Iterator[Path_]:
    """Paths to all leaves, and to what holds them; of long lists some, since they are all alike."""
    yield path
    if isinstance(value, dict):
        for key in value:
            yield from leaves(value[key], (*path, key))
    elif isinstance(value, (list, tuple)):
        for index in range(len(value)) if len(value) < 12 else (0, 1, len(value) // 2, len(value) - 1):
            yield from leaves(value[index], (*path, index))


def forged_tensors(tensor: th.Tensor) -> Iterator[Any]:
    """What may stand instead of a tensor."""
    yield from (None, "x", 1, th.zeros(1), th.zeros(0), th.zeros(10**6), tensor.to(th.int32), tensor.double(), tensor.half())
    yield from (tensor.unsqueeze(0), tensor.flatten()[0].expand(tensor.shape))
    if tensor.is_floating_point():
        yield from (tensor * 0 + number for number in (float("nan"), float("inf"), -1.0, 0.0))
        yield tensor.to_sparse() if tensor.dim() else tensor.reshape(1)


def parts_of(folder: Path) -> dict[str, Any]:
    """The three files of the only checkpoint, parsed."""
    path = checkpoints(folder)[-1]
    return {
        "manifest": json.loads((path / "manifest.json").read_bytes().rpartition(b"\n")[0]),
        "state": json.loads((path / "state.json").read_bytes()),
        "tensors": th.load(path / "tensors.pt", weights_only=True),
    }


def write_parts(folder: Path, parts: dict[str, Any]) -> None:
    """Write them back, with right checksums."""
    path, manifest = checkpoints(folder)[-1], parts["manifest"]
    (path / "state.json").write_text(json.dumps(parts["state"]))
    tensors = io.BytesIO()
    th.save(parts["tensors"], tensors)
    (path / "tensors.pt").write_bytes(tensors.getvalue())
    if isinstance(manifest, dict) and isinstance(manifest.get("files"), dict):
        for name in ("state.json", "tensors.pt"):
            if isinstance(manifest["files"].get(name), str) and len(manifest["files"][name]) == 64:
                manifest["files"][name] = hashlib.sha256((path / name).read_bytes()).hexdigest()
    text = json.dumps(manifest).encode()
    (path / "manifest.json").write_bytes(text + b"\n" + hashlib.sha256(text).hexdigest().encode())


def cases(folder: Path) -> list[tuple[Path_, Any]]:
    """Every leaf with everything that may stand there instead; ``KeyError`` for nothing."""
    found: list[tuple[Path_, Any]] = []
    for path in leaves(parts := parts_of(folder)):
        if len(path) < 2:
            continue
        value: Any = parts
        for key in path:
            value = value[key]
        others = (
            list(forged_tensors(value)) if isinstance(value, th.Tensor) else [each for each in VALUES if each is not value]
        )
        found += [(path, other) for other in (*others, KeyError)]
    return found


def forge(folder: Path, path: Path_, value: Any) -> None:
    """Put a value where a leaf was."""
    parts = parts_of(folder)
    place: Any = parts
    for key in path[:-1]:
        place = place[key]
    if isinstance(place, tuple):
        return
    if value is KeyError:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    write_parts(folder, parts)


def whole_state(model: Any) -> dict[str, Any]:
    """All that a refused checkpoint must leave as it was, but for the episode that was under way."""
    noise = getattr(model.action_noise, "noises", [model.action_noise])
    more = {"noise": [copy.deepcopy(getattr(each, "noise_prev", None)) for each in noise]}
    return {**{key: value for key, value in copy.deepcopy(state_of(model)).items() if key != "last"}, **more}


def outcome(model: Any, folder: Path) -> tuple[int, str]:
    """What becomes of a checkpoint: an index of OUTCOMES, and the error."""
    before = whole_state(model)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of other options
            load_checkpoint(model, folder)
    except CheckpointError as error:
        try:
            assert_same(whole_state(model), before)
        except AssertionError as difference:
            return 3, f"{error} / {difference}"
        return 0, str(error)
    except BaseException as error:
        return 4, repr(error)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.learn(60, reset_num_timesteps=False)
    except BaseException as error:
        return 2, repr(error)
    return 1, ""


def run(name: str, limit: int | None = None, seed: int = 0, report: Any = None) -> collections.Counter[str]:
    """
    Forge a scenario's checkpoint.

    :param name: of the scenario
    :param limit: so many cases, at random; None for all
    :param report: is called with each case that is neither refused nor trained
    :return: how many cases had each outcome
    """
    counts: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory() as root:
        original, forged = Path(root, "original"), Path(root, "forged")
        save_checkpoint(scenario(name).learn(110), original)
        model = scenario(name, seed=7)
        model.learn(50)
        everything = cases(original)
        chosen = everything if limit is None else random.Random(seed).sample(everything, min(limit, len(everything)))
        for path, value in chosen:
            shutil.rmtree(forged, ignore_errors=True)
            shutil.copytree(original, forged)
            try:
                forge(forged, path, value)
            except (TypeError, ValueError, AttributeError, RuntimeError, OverflowError):
                continue  # nothing that JSON or torch.save would write
            read_end, write_end = os.pipe()
            child = os.fork()
            if child == 0:
                index, error = outcome(model, forged)
                os.write(write_end, error.encode()[:4000])
                os._exit(index)
            os.close(write_end)
            with os.fdopen(read_end, "rb") as pipe:
                error = pipe.read().decode()
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            result = OUTCOMES[status] if 0 <= status < len(OUTCOMES) else f"dead ({status})"
            counts[result] += 1
            if report and result not in OUTCOMES[:2]:
                report(f"{result}: {'.'.join(map(str, path))} = {value!r:.60}: {error:.200}")
    return counts


if __name__ == "__main__":
    th.set_num_threads(1)
    total: collections.Counter[str] = collections.Counter()
    for each in SCENARIOS:
        counts = run(each, int(sys.argv[1]) if len(sys.argv) > 1 else None, report=lambda line: print(line, flush=True))
        print(each, dict(counts), flush=True)
        total += counts
    print("all", dict(total), sum(total.values()))
