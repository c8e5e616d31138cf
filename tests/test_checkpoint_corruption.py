"""Damaged and forged checkpoints: one clear error each, the model unchanged, nothing from the files is run."""

import hashlib
import json
import math
import os
import pickle
import shutil
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from stable_baselines3 import SAC

from sb3_softvalue import SACV
from sb3_softvalue.checkpoint import CheckpointError, has_checkpoint, load_checkpoint, save_checkpoint
from sb3_softvalue.checkpoint.schema import unpack
from tests import checkpoint_fuzz
from tests.helpers import assert_same
from tests.test_checkpoint import everything, make

N_DAMAGED = 480


class Bomb:
    """Makes a file where it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one checkpoint."""
    folder = tmp_path_factory.mktemp("run")
    make().learn(60).save_checkpoint(folder)
    return folder


@pytest.fixture(scope="module")
def model() -> SACV:
    return make(seed=7)


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")


def damage(folder: Path, rng: np.random.Generator) -> str:
    """Do one thing to one file, or to two."""
    path, other = (files_of(folder)[index] for index in rng.choice(len(files_of(folder)), 2, replace=False))
    kind = rng.choice(["truncate", "flip", "delete", "swap", "append", "empty"])
    content = bytearray(path.read_bytes())
    if kind == "truncate":
        path.write_bytes(content[: rng.integers(len(content))])
    elif kind == "flip":
        content[rng.integers(len(content))] ^= int(rng.integers(1, 256))
        path.write_bytes(content)
    elif kind == "delete":
        path.unlink()
    elif kind == "swap":
        path.write_bytes(other.read_bytes())
        other.write_bytes(content)
    elif kind == "append":
        path.write_bytes(content + b"x")
    else:
        path.write_bytes(b"")
    return f"{kind} {path.name}"


def test_damaged(written, model, tmp_path):
    """480 of 480; the remaining twenty of five hundred are the forged ones below."""
    before, rng = everything(model), np.random.default_rng(0)
    for index in range(N_DAMAGED):
        folder = tmp_path / str(index)
        shutil.copytree(written, folder)
        what = damage(folder, rng)
        with pytest.raises(CheckpointError) as error:
            model.load_checkpoint(folder)
        assert "\n" not in str(error.value) and len(str(error.value)) < 600, what
        assert_same(everything(model), before, what)
        shutil.rmtree(folder)


def forge(folder: Path, change: Callable[[Path, dict[str, Any]], None]) -> None:
    """Change a checkpoint and make all of its checksums right again."""
    (path,) = folder.glob("checkpoint-*")
    manifest = json.loads((path / "manifest.json").read_bytes().rpartition(b"\n")[0])
    change(path, manifest)
    for name in manifest["files"]:
        if (path / name).is_file():
            manifest["files"][name] = hashlib.sha256((path / name).read_bytes()).hexdigest()
    text = json.dumps(manifest).encode()
    (path / "manifest.json").write_bytes(text + b"\n" + hashlib.sha256(text).hexdigest().encode())


def rewrite_state(change: Callable[[dict[str, Any]], None]) -> Callable[[Path, dict[str, Any]], None]:
    """A change of state.json."""

    def apply(path: Path, manifest: dict[str, Any]) -> None:
        state = json.loads((path / "state.json").read_bytes())
        change(state)
        (path / "state.json").write_text(json.dumps(state))

    return apply


def drop_parameter(path: Path, manifest: dict[str, Any]) -> None:
    tensors = th.load(path / "tensors.pt", weights_only=True)
    tensors["parameters"]["policy"].popitem()
    th.save(tensors, path / "tensors.pt")


def change_moments(value: Any) -> Callable[[Path, dict[str, Any]], None]:
    """Another first moment of the actor's first weights: one of another shape went to the fused kernel, and the heap."""

    def apply(path: Path, manifest: dict[str, Any]) -> None:
        tensors = th.load(path / "tensors.pt", weights_only=True)
        moments = tensors["parameters"]["actor.optimizer"]["state"][0]
        moments["exp_avg"] = value(moments["exp_avg"])
        th.save(tensors, path / "tensors.pt")

    return apply


def drop_moments(path: Path, manifest: dict[str, Any]) -> None:
    tensors = th.load(path / "tensors.pt", weights_only=True)
    del tensors["parameters"]["actor.optimizer"]["state"][0]
    th.save(tensors, path / "tensors.pt")


def reshape_parameter(path: Path, manifest: dict[str, Any]) -> None:
    tensors = th.load(path / "tensors.pt", weights_only=True)
    name = next(iter(tensors["parameters"]["policy"]))
    tensors["parameters"]["policy"][name] = th.zeros(1)
    th.save(tensors, path / "tensors.pt")


FORGED: dict[str, Callable[[Path, dict[str, Any]], None]] = {
    "version": lambda path, manifest: manifest.update(format=3),
    "no version": lambda path, manifest: manifest.pop("format"),
    "a name that climbs": lambda path, manifest: manifest["files"].update({"../../secret.txt": "0"}),
    "an absolute name": lambda path, manifest: manifest["files"].update({"/etc/passwd": "0"}),
    "a block that climbs": lambda path, manifest: manifest["blocks"]["rewards"].__setitem__(0, "../x.npy"),
    "no blocks": lambda path, manifest: manifest.update(blocks={}),
    "too few blocks": lambda path, manifest: manifest["blocks"]["rewards"].clear(),
    "blocks of another array": lambda path, manifest: manifest["blocks"].update(rewards=manifest["blocks"]["observations"]),
    "facts": lambda path, manifest: manifest.update(facts=[]),
    "no state": lambda path, manifest: manifest["files"].pop("state.json"),
    "no tensors": lambda path, manifest: manifest["files"].pop("tensors.pt"),
    "counter": rewrite_state(lambda state: state["counters"].update(num_timesteps="many")),
    "another attribute": rewrite_state(lambda state: state["counters"].update(policy=1)),
    "position": rewrite_state(lambda state: state["buffer"].update(pos=10**9)),
    "generator": rewrite_state(lambda state: state["action space"].update(bit_generator="__class__")),
    "random": rewrite_state(lambda state: state["random"].update(torch=[1])),
    "rewards of episodes": rewrite_state(lambda state: state.update(episodes=[{"r": [1.0, [2.0]], "l": 5, "t": 0.1}])),
    "successes": rewrite_state(lambda state: state.update(successes=[[1.0, [2.0]]])),
    "missing moments": drop_moments,
    "moments of another shape": change_moments(lambda moment: th.zeros(1)),
    "moments of another type": change_moments(lambda moment: moment.double()),
    "moments in one place": change_moments(lambda moment: (moment[:1, :1] * math.inf).expand(moment.shape)),
    "parameter": drop_parameter,
    "shape": reshape_parameter,
}


@pytest.mark.parametrize("name", FORGED)
def test_forged(name, written, model, tmp_path):
    before, random = everything(model), th.get_rng_state()
    shutil.copytree(written, tmp_path / "run")
    forge(tmp_path / "run", FORGED[name])
    with pytest.raises(CheckpointError):
        model.load_checkpoint(tmp_path / "run")
    assert_same(everything(model), before)
    assert th.equal(th.get_rng_state(), random)


def test_text_of_any_length_is_not_made():
    """It took the memory before its type was refused."""
    tracemalloc.start()
    with pytest.raises(ValueError, match="an array has the type"):
        unpack({"__array__": [1.0] * 4, "dtype": "S10000000", "shape": [4]})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10**6


def test_a_parameter_that_no_step_has_changed(tmp_path):
    """It has no moments, and is not taken for one whose moments are missing."""
    model = make()
    model.actor.log_std.bias.requires_grad_(False)
    model.learn(60).save_checkpoint(tmp_path)
    other = make(seed=3)
    other.load_checkpoint(tmp_path)
    assert_same(everything(other), everything(model))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["rewards", "actions", "dones", "timeouts", "observations"])
def test_numbers_in_the_buffer_that_are_not_finite(name, value, tmp_path):
    """Refused by name where the model would stop at them, loaded as SB3 would where it would not."""
    for algorithm, off in ((SACV, dict(check_finite=False)), (SAC, {})):
        folder = tmp_path / algorithm.__name__
        model = make(algorithm=algorithm, **off).learn(60)
        getattr(model.replay_buffer, name)[5] = value
        save_checkpoint(model, folder)
        other = make(seed=3, algorithm=algorithm, **off)
        load_checkpoint(other, folder)
        np.testing.assert_array_equal(getattr(other.replay_buffer, name), getattr(model.replay_buffer, name))
        assert not np.isfinite(getattr(other.replay_buffer, name)[5]).any()
    checked = make(seed=3).learn(50)
    before = everything(checked)
    if name == "observations":  # the networks may make something finite of them
        with pytest.warns(UserWarning, match="check_finite is True, was False"):
            load_checkpoint(checked, tmp_path / "SACV")
        return
    with pytest.raises(CheckpointError, match=f"is damaged .the {name} in its replay buffer are not all finite"):
        load_checkpoint(checked, tmp_path / "SACV")
    assert_same(everything(checked), before)
    getattr(checked.replay_buffer, name)[5] = value
    with pytest.raises(
        CheckpointError, match=f"could not be continued from here .the {name} in its replay buffer are not all"
    ):
        save_checkpoint(checked, tmp_path / "new")
    assert not has_checkpoint(tmp_path / "new") and not list((tmp_path / "new" / "replay").iterdir())


@pytest.mark.parametrize("place", ["manifest.json", "state.json", "tensors.pt", "tensors in a zip", "block"])
def test_a_pickle_is_not_run(place, written, model, tmp_path):
    shutil.copytree(written, tmp_path / "run")
    bomb = pickle.dumps(Bomb(tmp_path / "exploded"))

    def plant(path: Path, manifest: dict[str, Any]) -> None:
        if place == "block":
            block = tmp_path / "run" / "replay" / manifest["blocks"]["rewards"][0]
            np.save(block, np.array([Bomb(tmp_path / "exploded")], dtype=object), allow_pickle=True)
        elif place == "tensors in a zip":
            with zipfile.ZipFile(path / "tensors.pt", "w") as archive:
                archive.writestr("archive/data.pkl", bomb)
                archive.writestr("archive/version", "3\n")
        else:
            (path / place).write_bytes(bomb)

    forge(tmp_path / "run", plant)
    if place == "manifest.json":
        (next((tmp_path / "run").glob("checkpoint-*")) / place).write_bytes(bomb)
    with pytest.raises(CheckpointError):
        model.load_checkpoint(tmp_path / "run")
    assert not (tmp_path / "exploded").exists()
    pickle.loads(bomb)  # it would have been seen
    assert (tmp_path / "exploded").exists()


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.parametrize("name", checkpoint_fuzz.SCENARIOS)
@pytest.mark.parametrize("n_cases", [30, pytest.param(500, marks=pytest.mark.slow)])
def test_every_forged_leaf(n_cases, name):
    """Refused with the model bit for bit as it was, or loaded and trained; never a raw exception or a dead process."""
    problems: list[str] = []
    counts = checkpoint_fuzz.run(name, n_cases, report=problems.append)
    assert not problems and set(counts) <= set(checkpoint_fuzz.OUTCOMES[:2]) and sum(counts.values()) > 0.9 * n_cases
