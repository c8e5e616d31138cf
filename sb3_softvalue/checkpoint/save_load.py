"""A whole training into a folder, and back into a model that was constructed in the same way."""

import copy
import dataclasses
import io
import json
import pathlib
import uuid
import warnings
import weakref
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm

from sb3_softvalue.checkpoint import environments, replay, state, upgrade
from sb3_softvalue.checkpoint.folder import (
    FORMAT,
    checkpoints,
    claimed,
    commit,
    newest,
    read_files,
    read_manifest,
    unfinished,
    writing,
)
from sb3_softvalue.checkpoint.schema import CheckpointError
from sb3_softvalue.checks import check_whole_number
from sb3_softvalue.finite import truncate_open_episodes

KEEP = 2
# How often a checkpoint is sought anew where another process has removed the one that was being read
_ATTEMPTS = 5


@dataclasses.dataclass
class _Run:
    """The training that a model belongs to, and what other callbacks have to continue with."""

    name: str
    callbacks: list[dict[str, Any]]


runs: "weakref.WeakKeyDictionary[OffPolicyAlgorithm, _Run]" = weakref.WeakKeyDictionary()


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
        return f"step {self.num_timesteps}, " + (f"not exactly: {'; '.join(self.why)}" if self.why else "exactly")


def check_storable(model: OffPolicyAlgorithm) -> None:
    """
    :param model: an off-policy algorithm of SB3
    :raises CheckpointError: if it has nothing to continue with, or what cannot be stored without pickle
    """
    if not isinstance(model, OffPolicyAlgorithm):
        raise CheckpointError(f"Checkpoints are of SB3's off-policy algorithms, got {type(model).__name__}: use save().")
    if model.replay_buffer is None or model.env is None:
        raise CheckpointError("The model has no replay buffer or no environment: a checkpoint is of a training, use save().")
    replay.arrays_of(model.replay_buffer)
    state.noise_state(model)


def check_owner(model: OffPolicyAlgorithm, folder: pathlib.Path) -> None:
    """
    :param model: that is to write to the folder
    :param folder: of the run
    :raises CheckpointError: if another training has written there
    """
    for path in checkpoints(folder):
        try:
            name = read_manifest(path)["run"]
        except (OSError, ValueError):
            continue
        if model not in runs or name != runs[model].name:
            raise CheckpointError(
                f"{folder} holds the checkpoints of another training: continue it with load_checkpoint or "
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
    ``VecNormalize``, counters, and the states of environments and random generators. Between two calls of ``train()`` and
    ``collect_rollouts()`` only, as when ``learn()`` has ended.

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
    assert model.replay_buffer is not None and model.env is not None
    content = state.read(model) | {"environments": environments.read(model.env), "callbacks": callbacks or []}
    content["boundary"] = replay.at_episode_boundary(model.replay_buffer)
    try:
        text = json.dumps(content)
    except TypeError as error:
        raise CheckpointError(
            f"The training holds what cannot be stored without pickle ({error}): look at what the environment puts into the "
            "info of an episode (info_keywords of Monitor)."
        ) from error
    tensors = state.tensors(model)
    try:  # what would not be loaded is not written, so that the one before stays
        state.json_schema(model)("state", json.loads(text))
        state.tensors_schema(model)("tensors", tensors)
    except ValueError as error:
        raise _no_continuing(error) from error
    file = io.BytesIO()
    th.save(tensors, file)
    files = {"state.json": text.encode(), "tensors.pt": file.getvalue()}
    with claimed(folder):
        if not overwrite:
            check_owner(model, folder)
        run = runs.setdefault(model, _Run(uuid.uuid4().hex, []))
        with writing(folder), unfinished(folder):
            try:
                blocks = replay.write_blocks(model.replay_buffer, folder, _is_finite(model))
            except ValueError as error:
                raise _no_continuing(error) from error
            commit(folder, files, {"run": run.name, "blocks": blocks, "facts": state.facts(model)}, keep)


def _is_finite(model: OffPolicyAlgorithm) -> bool:
    """:return: whether it would stop at a number that is not finite; others learn from it, as from any buffer of SB3"""
    return bool(getattr(model, "check_finite", False))


def _no_continuing(error: Exception) -> CheckpointError:
    """:return: one sentence"""
    return CheckpointError(f"The training could not be continued from here ({error}): older checkpoints stay.")


def load_checkpoint(model: OffPolicyAlgorithm, folder: str | pathlib.Path) -> Resumed:
    """
    Put the newest checkpoint of a folder into a model; ``learn(total - model.num_timesteps, reset_num_timesteps=False)``
    continues from there. Everything is checked before the model is touched.

    :param model: constructed as the one that was saved, with the same environment
    :param folder: of the run, or one of the checkpoints in it
    :return: true if the training is the one that was never stopped, which needs a checkpoint that was written as its episodes
        began and environments whose state is known; else it says why not
    :raises CheckpointError: if there is none, it is damaged, or it is of another model; the model is as before
    """
    folder = pathlib.Path(folder)
    if model.replay_buffer is None or model.env is None:
        raise CheckpointError("The model has no replay buffer or no environment: construct it with the env to continue with.")
    for attempt in range(_ATTEMPTS):
        path = newest(folder)
        try:
            return _load(model, path)
        except CheckpointError:
            # Another process may have written the next one and removed this one
            if attempt == _ATTEMPTS - 1 or newest(folder) == path:
                raise
    raise AssertionError


def _load(model: OffPolicyAlgorithm, path: pathlib.Path) -> Resumed:
    """:return: see ``load_checkpoint``"""
    buffer: Any = model.replay_buffer
    try:
        manifest = read_manifest(path)
        is_old = manifest["format"] != FORMAT
        state.check_facts(manifest["facts"], upgrade.facts(model) if is_old else state.facts(model))
        files = read_files(path, manifest)
        content = json.loads(files["state.json"])
        tensors = th.load(io.BytesIO(files["tensors.pt"]), map_location="cpu", weights_only=True)
        if is_old:
            content, tensors = upgrade.upgrade(content, tensors)
        content, tensors = state.json_schema(model)("state", content), state.tensors_schema(model)("tensors", tensors)
        rows = replay.n_rows(buffer, content["buffer"]["pos"], content["buffer"]["full"])
        replay.read_blocks(buffer, path.parent, manifest["blocks"], rows, _is_finite(model), fill=False)
    except CheckpointError:
        raise
    except Exception as error:  # whatever a file can be made to say: none of it has reached the model
        raise _damaged(path, error) from error
    why = _begin_episodes(model, content)
    try:
        replay.read_blocks(buffer, path.parent, manifest["blocks"], rows, _is_finite(model), fill=True)
    except (ValueError, OSError) as error:  # removed since it was checked: the next checkpoint is there
        raise _damaged(path, error) from error
    state.apply(model, content, tensors)
    if why and content["seeds"] is None:
        truncate_open_episodes(buffer)
    content["random"]()
    runs[model] = _Run(manifest["run"], content["callbacks"])
    changed = _differences(content["options"], state.options(model))
    if changed:
        warnings.warn(f"The training continues with other options than before: {'; '.join(changed)}.", stacklevel=4)
    return Resumed(model.num_timesteps, (*why, *changed, *_differences(content["machine"], state.machine(model))))


def _damaged(path: pathlib.Path, error: Exception) -> CheckpointError:
    """:return: one sentence"""
    reason = (str(error) or type(error).__name__).splitlines()[0]
    before = [each for each in checkpoints(path.parent) if each != path]
    other = f"; the one before it is {before[-1]}" if before else ""
    return CheckpointError(f"The checkpoint {path} is damaged ({reason:.200}){other}.")


def _differences(saved: dict[str, Any], own: dict[str, Any]) -> list[str]:
    """:return: what is in both and differs"""
    return [f"{name} is {own[name]}, was {saved[name]}" for name in own if saved.get(name, own[name]) != own[name]]


def _begin_episodes(model: OffPolicyAlgorithm, content: dict[str, Any]) -> list[str]:
    """
    Reset the environments, where possible to where they were. Beside the system nothing else can fail once a checkpoint has
    been checked, and nothing of the model has been changed if this does.

    :param model: whose statistics of observations are restored here
    :param content: of state.json
    :return: why the environments are not where they were
    :raises CheckpointError: if an environment cannot be reset
    """
    env, normalize = model.env, model.get_vec_normalize_env()
    assert env is not None
    old = normalize and (copy.deepcopy((normalize.obs_rms, normalize.ret_rms)), normalize.training)
    model._last_obs = None  # of an episode that ends here
    try:
        if normalize is not None:
            # What is observed at the reset has been counted before
            environments.set_moments(normalize, content["VecNormalize"])
            normalize.training = False
        if content["seeds"] is not None:  # nothing has begun yet
            env.unwrapped._seeds = list(content["seeds"])
            return environments.unknown(env, content["environments"])
        observations, why = environments.begin_episodes(env, content["environments"], content["boundary"])
    except Exception as error:
        if normalize is not None:
            normalize.obs_rms, normalize.ret_rms = old[0]  # type: ignore[index]  # was stored
        raise CheckpointError(f"The environments could not be reset ({error}): the model is as before.") from error
    finally:
        if normalize is not None:
            normalize.training = old[1]  # type: ignore[index]  # was stored
    model._last_obs = observations
    model._last_original_obs = None if normalize is None else normalize.get_original_obs()
    model._last_episode_starts = np.ones((env.num_envs,), dtype=bool)
    why += environments.unknown(env, content["environments"])
    if not why and content["observations"] != state.digest(observations):
        why.append("reset() has given other observations")
    return why
