"""Save a whole training to a folder, and load it into a model that was constructed in the same way."""

import dataclasses
import io
import json
import pathlib
import uuid
import warnings
import weakref
from typing import Any

import torch as th
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm

from sb3_softvalue.checkpoint import environments, replay, state, upgrade
from sb3_softvalue.checkpoint import folder as folders
from sb3_softvalue.checkpoint.schema import CheckpointError
from sb3_softvalue.checks import check_whole_number
from sb3_softvalue.finite import truncate_open_episodes

KEEP = 2


@dataclasses.dataclass
class Run:
    """The training that a model belongs to, and the state of other callbacks, to be resumed."""

    name: str
    callbacks: list[dict[str, Any]]


runs: "weakref.WeakKeyDictionary[OffPolicyAlgorithm, Run]" = weakref.WeakKeyDictionary()


@dataclasses.dataclass(frozen=True)
class Resumed:
    """What ``load_checkpoint`` returns: true if the training continues exactly as if it had never stopped."""

    num_timesteps: int
    """Steps that are done"""
    why: tuple[str, ...]
    """What keeps it from being exact, none if it is"""

    def __bool__(self) -> bool:
        return not self.why

    def __str__(self) -> str:
        return f"step {self.num_timesteps}, " + (f"but not exactly: {'; '.join(self.why)}" if self.why else "exactly")


def check_storable(model: OffPolicyAlgorithm) -> None:
    """:raises CheckpointError: if a model is in no training, or has something that cannot be stored without pickle"""
    if not isinstance(model, OffPolicyAlgorithm):
        raise CheckpointError(f"Checkpoints are of SB3's off-policy algorithms, got {type(model).__name__}: use save().")
    if model.replay_buffer is None or model.env is None:
        raise CheckpointError("The model has no replay buffer or no environment: construct it with the env to train in.")
    replay.arrays_of(model.replay_buffer)
    state.noise_state(model)


def check_owner(model: OffPolicyAlgorithm, folder: pathlib.Path) -> None:
    """:raises CheckpointError: if another training has written to the folder of the run"""
    own = runs[model].name if model in runs else None
    if any(name != own for name in folders.runs(folder).values()):
        raise CheckpointError(
            f"{folder} holds the checkpoints of another run: continue it with load_checkpoint or "
            "ResumableCheckpoint(folder, resume=True), replace it with overwrite=True, or choose another folder."
        )


def save_checkpoint(
    model: OffPolicyAlgorithm,
    folder: str | pathlib.Path,
    keep: int = KEEP,
    *,
    overwrite: bool = False,
    callbacks: list[dict[str, Any]] | None = None,
) -> None:
    """
    Write all that the training needs to continue: networks, optimizers, temperature, replay buffer, statistics of
    ``VecNormalize``, counters, and the states of environments and random generators. Only between two calls of ``train()`` and
    ``collect_rollouts()``, for example when ``learn()`` has ended.

    :param model: SACV, or SAC, TD3, DDPG or TQC
    :param folder: of the run; the blocks of the replay buffer that are there already are not written again
    :param keep: number of checkpoints to keep
    :param overwrite: whether to replace the checkpoints of another training
    :param callbacks: states of other callbacks, see ``ResumableCheckpoint``
    :raises CheckpointError: if something cannot be stored without pickle or is another training's, before anything is
        written, or cannot be written
    """
    folder = pathlib.Path(folder)
    check_whole_number("keep", keep, minimum=1)
    check_storable(model)
    assert model.replay_buffer is not None
    content = {**state.read(model), "boundary": replay.at_episode_boundary(model.replay_buffer), "callbacks": callbacks or []}
    tensors, file = state.tensors(model), io.BytesIO()
    th.save(tensors, file)
    try:
        text = json.dumps(content)
    except TypeError as error:
        raise CheckpointError(
            f"The training holds what cannot be stored without pickle ({error}): look at what the environment puts into the "
            "info of an episode (info_keywords of Monitor)."
        ) from error
    try:  # what would not be loaded is not written, so that the one before stays
        state.check(model, json.loads(text), tensors)
        with folders.claimed(folder):
            if not overwrite:
                check_owner(model, folder)
            run = runs.setdefault(model, Run(uuid.uuid4().hex, []))
            with folders.unfinished(folder):
                blocks = replay.write_blocks(model, folder)
                manifest = {"run": run.name, "blocks": blocks, "facts": state.facts(model)}
                folders.commit(folder, {"state.json": text.encode(), "tensors.pt": file.getvalue()}, manifest, keep)
    except ValueError as error:
        raise CheckpointError(f"The training could not be continued from here ({error}): older checkpoints stay.") from error


def load_checkpoint(model: OffPolicyAlgorithm, folder: str | pathlib.Path) -> Resumed:
    """
    Put the newest checkpoint of a folder into a model; ``learn(total - model.num_timesteps, reset_num_timesteps=False)``
    continues from there. Everything is checked before the model is changed.

    :param model: constructed as the one that was saved, with the same environment
    :param folder: of the run, or one of the checkpoints in it
    :return: true if the training continues exactly, which needs a checkpoint that was written as its episodes began and
        environments whose state is known; else it says why not
    :raises CheckpointError: if there is none, it is damaged, or it is of another model; the model is as before
    """
    check_storable(model)
    folder = pathlib.Path(folder)
    while True:
        found = folders.find(folder)
        if not found:
            raise CheckpointError(f"There is no checkpoint in {folder!s:.200}: save one with save_checkpoint.")
        try:
            return _load(model, found[-1])
        except CheckpointError:
            # Another process may have written the next one and removed this one
            if folders.find(folder)[-1:] == found[-1:]:
                raise


def _load(model: OffPolicyAlgorithm, path: pathlib.Path) -> Resumed:
    try:
        manifest = folders.read_manifest(path)
        is_old = manifest["format"] != folders.FORMAT
        state.check_facts(manifest["facts"], upgrade.facts(model) if is_old else state.facts(model))
        files = folders.read_files(path, manifest)
        content = json.loads(files["state.json"])
        tensors = th.load(io.BytesIO(files["tensors.pt"]), map_location="cpu", weights_only=True)
        if is_old:
            content, tensors = upgrade.upgrade(content, tensors)
        content, tensors = state.check(model, content, tensors)
        blocks = path.parent, manifest["blocks"], content["buffer"]
        replay.read_blocks(model, *blocks, fill=False)
    except CheckpointError:
        raise
    except Exception as error:  # whatever a file can cause: none of it has reached the model
        raise _damaged(path, error) from error
    model._last_obs = None  # of an episode that ends here
    try:
        model._last_obs, why = environments.begin_episodes(model, content)
    except Exception as error:
        raise CheckpointError(f"The environments could not be reset ({error}): the model is as before.") from error
    if model._last_obs is not None:
        environments.begin_at(model, model._last_obs)
    try:
        replay.read_blocks(model, *blocks, fill=True)
    except (ValueError, OSError) as error:  # removed since it was checked: the next checkpoint is there
        raise _damaged(path, error) from error
    state.apply(model, content, tensors)
    if why and content["seeds"] is None:
        truncate_open_episodes(model.replay_buffer)  # type: ignore[arg-type]  # checked by load_checkpoint
    runs[model] = Run(manifest["run"], content["callbacks"])
    changed = _differences(content["options"], state.options(model))
    if changed:
        warnings.warn(f"The training continues with other options than before: {'; '.join(changed)}.", stacklevel=4)
    return Resumed(model.num_timesteps, (*why, *changed, *_differences(content["machine"], state.machine(model))))


def _damaged(path: pathlib.Path, error: Exception) -> CheckpointError:
    reason = (str(error) or type(error).__name__).splitlines()[0]
    before = [each for each in folders.checkpoints(path.parent) if each != path]
    other = f"; the one before it is {before[-1]}" if before else ""
    return CheckpointError(f"The checkpoint {path} is damaged ({reason:.200}){other}.")


def _differences(saved: dict[str, Any], own: dict[str, Any]) -> list[str]:
    """:return: what is in both and differs"""
    return [f"{name} is {own[name]}, was {saved[name]}" for name in own if saved.get(name, own[name]) != own[name]]
