"""A whole training into a folder, and back into a model that was constructed in the same way."""

import io
import json
import pathlib
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm

from sb3_softvalue.checkpoint import random_state, replay, state
from sb3_softvalue.checkpoint.folder import CheckpointError, commit, is_checkpoint, lock, read_checkpoint, writing
from sb3_softvalue.checks import check_whole_number
from sb3_softvalue.finite import truncate_open_episodes

KEEP = 2


def save_checkpoint(
    model: OffPolicyAlgorithm,
    folder: str | pathlib.Path,
    keep: int = KEEP,
    before_episodes: list[dict[str, Any] | None] | None = None,
) -> None:
    """
    Write all that the training needs to go on: networks, optimizers, temperature, replay buffer, statistics of
    ``VecNormalize``, counters, and the states of all random generators. Between two calls of ``train()`` and
    ``collect_rollouts()`` only, as in a callback's ``_on_rollout_start``, or when ``learn()`` has ended.

    :param model: SACV
    :param folder: of the run; the blocks of the replay buffer that are there already are not written again
    :param keep: number of checkpoints to keep
    :param before_episodes: for each environment whose episode has just begun the state of its random generator before its
        reset, so that it can be begun again in the same way; None for the others
    :raises CheckpointError: if something cannot be stored without pickle, before anything is written, or cannot be written
    """
    folder = pathlib.Path(folder)
    check_whole_number("keep", keep, minimum=1)
    check_storable(model)
    assert model.replay_buffer is not None and model.env is not None
    env_states = random_state.env_states(model.env)
    content = state.scalars(model) | {"environments": env_states, "before episodes": before_episodes}
    content["seeds"] = random_state.pending_seeds(model.env)
    try:
        text = json.dumps(content)
    except TypeError as error:
        raise CheckpointError(
            f"The training holds what cannot be stored without pickle ({error}): look at what the environment puts into the "
            "info of an episode (info_keywords of Monitor)."
        ) from error
    tensors = io.BytesIO()
    th.save(state.tensors(model), tensors)
    files = {"state.json": text.encode(), "tensors.pt": tensors.getvalue()}
    with writing(folder):
        lock(folder)
        blocks = replay.write_blocks(model.replay_buffer, folder)
        commit(folder, files, blocks, state.facts(model), keep)


def check_storable(model: OffPolicyAlgorithm) -> None:
    """
    :param model: SACV
    :raises CheckpointError: if it has nothing to go on with, or what cannot be stored without pickle
    """
    if model.replay_buffer is None or model.env is None:
        raise CheckpointError("The model has no replay buffer or no environment: a checkpoint is of a training, use save().")
    replay.arrays_of(model.replay_buffer)
    random_state.noise_state(random_state.noise_of_each(model.action_noise, model.n_envs))


def load_checkpoint(model: OffPolicyAlgorithm, folder: str | pathlib.Path) -> bool:
    """
    Put the newest checkpoint of a folder into a model; ``learn(total - model.num_timesteps, reset_num_timesteps=False)``
    goes on from there. Everything is checked before the model is touched.

    :param model: constructed as the one that was saved, with the same environment
    :param folder: of the run, or one of the checkpoints in it
    :return: whether every environment is where it was, which needs a checkpoint that was written as its episode began and a
        reset that draws from ``np_random`` alone. Else a new episode begins, and only the rest of the old one is lost.
    :raises CheckpointError: if there is none, it is damaged, or it is of another model; the model is as before
    """
    folder = pathlib.Path(folder)
    if model.replay_buffer is None or model.env is None:
        raise CheckpointError("The model has no replay buffer or no environment: construct it with the env to go on with.")
    manifest, files = read_checkpoint(folder)
    state.check_facts(manifest["facts"], state.facts(model))
    run = folder.parent if is_checkpoint(folder) else folder
    try:
        content = json.loads(files["state.json"])
        tensors = th.load(io.BytesIO(files["tensors.pt"]), map_location="cpu", weights_only=True)
        position = content["buffer"]
        rows = (
            model.replay_buffer.buffer_size if position["full"] else min(position["pos"] + 1, model.replay_buffer.buffer_size)
        )
        blocks = replay.read_blocks(model.replay_buffer, run, manifest["blocks"], rows)
        _rehearse(model, content, tensors)
    except CheckpointError:
        raise
    except Exception as error:
        # Whatever a file can be made to say: none of it is to reach the model
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"The checkpoint in {folder} cannot be read ({reason}).") from error
    state.apply(model, content, tensors)
    replay.fill(model.replay_buffer, blocks)
    exactly = _begin_episodes(model, content, state.to_arrays(tensors["last"]["_last_obs"]))
    if exactly:
        model._last_original_obs = state.to_arrays(tensors["last"]["_last_original_obs"])
    else:
        truncate_open_episodes(model.replay_buffer)
    random_state.set_global_states(content["random"])
    # With gSDE a rollout begins with a draw, which this one has made already: the callback puts back what came of it
    vars(model)["_rollout_begun"] = (content["random"], tensors["sde"]) if tensors["sde"] else None
    return exactly


def _rehearse(model: OffPolicyAlgorithm, content: dict[str, Any], tensors: dict[str, Any]) -> None:
    """
    Everything that could fail while the model is changed, tried on copies.

    :param model: that is not changed
    :param content: of state.json
    :param tensors: of tensors.pt
    """
    own = model.get_parameters()
    if set(own) != set(tensors["parameters"]):
        raise ValueError(f"it has parameters of {sorted(tensors['parameters'])}, the model of {sorted(own)}")
    for name, parameters in own.items():
        _same_structure(name, parameters, tensors["parameters"][name])
    _same_structure("variables", state.variables(model), tensors["variables"])
    for name in state.COUNTERS:
        # learn(1e6) is common, and the total that it leaves is no int
        types = (int, float) if name == "_total_timesteps" else int
        if not isinstance(content["counters"][name], types) or not content["counters"][name] >= 0:
            raise ValueError(f"{name} is {content['counters'][name]!r}")
    if set(content["counters"]) != {*state.COUNTERS, *state.OTHERS}:
        raise ValueError("it has other counters")
    before = random_state.global_states()
    try:
        random_state.set_global_states(content["random"])
    finally:
        random_state.set_global_states(before)
    seeds = content["seeds"]
    if seeds is not None and not (len(seeds) == model.n_envs and all(isinstance(seed, (int, type(None))) for seed in seeds)):
        raise ValueError(f"the seeds of its environments are {seeds!r}")
    generators = [content["action space"], *(content["environments"] or ()), *(content["before episodes"] or ())]
    for generator in generators:
        if generator is not None:
            random_state.generator_from(generator)
    env = model.get_vec_normalize_env()
    if env is not None:
        _same_moments(content["VecNormalize"], state.vec_normalize_state(env))
    noises = [content["noise"], random_state.noise_state(random_state.noise_of_each(model.action_noise, model.n_envs))]
    if np.shape(noises[0]) != np.shape(noises[1]):
        raise ValueError("its action noise has a state of another shape")
    if not 0 <= content["buffer"]["pos"] < model.replay_buffer.buffer_size:  # type: ignore[union-attr]  # was checked to be there
        raise ValueError(f"the buffer's position is {content['buffer']['pos']!r}")
    assert isinstance(content["episodes"], list) and isinstance(content["successes"], list)
    observations = state.to_arrays(tensors["last"]["_last_obs"])
    assert observations is None or len(next(iter(observations.values())) if isinstance(observations, dict) else observations)


def _same_moments(saved: dict[str, Any], own: dict[str, Any]) -> None:
    """:raises CheckpointError: if VecNormalize has statistics of other quantities; ValueError if they are of other shapes"""
    shapes = [
        {name: [np.shape(moment) for moment in moments] for name, moments in statistics["moments"].items()}
        for statistics in (saved, own)
    ]
    if list(shapes[0]) != list(shapes[1]):
        of = [", ".join(name.strip() for name in each) for each in shapes]
        raise CheckpointError(
            f"The checkpoint's VecNormalize has statistics of {of[0]}, the model's of {of[1]}: construct the model as the one "
            "that was saved."
        )
    if shapes[0] != shapes[1]:
        raise ValueError("its VecNormalize has statistics of other shapes")


def _same_structure(name: str, own: Any, saved: Any) -> None:
    """:raises ValueError: if a state dict has other entries, or tensors of other shapes"""
    if isinstance(own, dict) and "state" not in own:
        if set(own) != set(saved) and "param_groups" not in own:
            raise ValueError(f"{name} has other entries")
        for key in own:
            _same_structure(f"{name}.{key}", own[key], saved[key])
    elif isinstance(own, th.Tensor):
        if not isinstance(saved, th.Tensor) or saved.shape != own.shape:
            raise ValueError(f"{name} is no tensor of shape {tuple(own.shape)}")
    elif isinstance(own, dict):  # an optimizer's: its state may not have begun yet
        groups = (
            [len(group["params"]) for group in own["param_groups"]],
            [len(group["params"]) for group in saved["param_groups"]],
        )
        if groups[0] != groups[1]:
            raise ValueError(f"{name} has {groups[1]} parameters instead of {groups[0]}")


def _begin_episodes(model: OffPolicyAlgorithm, content: dict[str, Any], last: Any) -> bool:
    """
    Reset the environments, where possible to where they were.

    :param model: whose statistics are restored already, and stay
    :param content: of state.json
    :param last: the observations that were to be acted on
    :return: whether all are where they were
    """
    env, normalize = model.env, model.get_vec_normalize_env()
    assert env is not None
    after, before = content["environments"], content["before episodes"]
    if content["seeds"] is not None:  # nothing has begun yet
        env.unwrapped._seeds = list(content["seeds"])
        model._last_obs = None
        return True
    if after is not None:
        # The first reset of a VecEnv seeds its environments
        env.reset()
        starts = before or [None] * len(after)
        random_state.set_env_states(env, [start or state for start, state in zip(starts, after, strict=True)])
    observations = env.reset()
    model._last_original_obs = None if normalize is None else normalize.get_original_obs()
    if normalize is not None:
        # The reset has been counted before
        state.set_vec_normalize_state(normalize, content["VecNormalize"])
        observations = normalize.normalize_obs(model._last_original_obs)  # type: ignore[arg-type]  # Dict of arrays
    model._last_obs = observations  # type: ignore[assignment]  # Dict of arrays
    model._last_episode_starts = np.ones((env.num_envs,), dtype=bool)
    exactly = (
        after is not None
        and before is not None
        and all(start is not None for start in before)
        and random_state.env_states(env) == after
        and _equal(last, observations)
    )
    if exactly:
        model._last_obs = last
    return exactly


def _equal(first: Any, second: Any) -> bool:
    """:return: whether observations are the same"""
    if isinstance(first, dict):
        return set(first) == set(second) and all(_equal(first[key], second[key]) for key in first)
    return np.array_equal(first, second)
