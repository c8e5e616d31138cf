"""The states of all random generators of a training, as what JSON can hold."""

import random
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.noise import ActionNoise, NormalActionNoise, OrnsteinUhlenbeckActionNoise, VectorizedActionNoise
from stable_baselines3.common.vec_env import VecEnv

from sb3_softvalue.checkpoint.folder import CheckpointError

_BIT_GENERATORS = ("PCG64", "PCG64DXSM", "MT19937", "Philox", "SFC64")


def plain(value: Any) -> Any:
    """:return: the value with NumPy's arrays and numbers as lists and Python's"""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value


def generator_state(generator: np.random.Generator) -> dict[str, Any]:
    """:return: the state of one of NumPy's generators"""
    return plain(generator.bit_generator.state)


def generator_from(state: dict[str, Any]) -> np.random.Generator:
    """
    :param state: from ``generator_state``
    :return: a generator that goes on from there
    :raises ValueError: if it is none of NumPy's
    """
    name = state["bit_generator"]
    if name not in _BIT_GENERATORS:
        raise ValueError(f"there is no random generator {name!r}")
    bit_generator = getattr(np.random, name)()
    arrays = {key: np.asarray(item, np.uint64) if isinstance(item, list) else item for key, item in state["state"].items()}
    others = {key: np.asarray(item, np.uint64) if isinstance(item, list) else item for key, item in state.items()}
    bit_generator.state = {**others, "state": arrays}
    return np.random.Generator(bit_generator)


def env_states(env: VecEnv) -> list[dict[str, Any]] | None:
    """:return: state of each environment's own generator; None where they have none that can be reached"""
    if getattr(env.unwrapped, "closed", False):
        return None
    try:
        return [generator_state(generator) for generator in env.get_attr("np_random")]
    except (AttributeError, NotImplementedError):
        return None
    except (EOFError, ConnectionError):  # of processes that are gone, which the next step will say
        return None


def pending_seeds(env: VecEnv) -> list[int | None] | None:
    """:return: with which the environments will be reset for the first time; None if they have been"""
    seeds = [None if seed is None else int(seed) for seed in env.unwrapped._seeds]
    return seeds if any(seed is not None for seed in seeds) else None


def set_env_states(env: VecEnv, states: list[dict[str, Any]]) -> None:
    """
    :param env: to change
    :param states: from ``env_states``
    """
    for index, state in enumerate(states):
        env.set_attr("np_random", generator_from(state), indices=[index])


def global_states() -> dict[str, Any]:
    """:return: states of Python's, NumPy's and PyTorch's global generators"""
    version, internal, gauss = random.getstate()
    numpy_state: Any = np.random.get_state()
    name, keys, *rest = numpy_state
    return {
        "python": [version, list(internal), gauss],
        "numpy": [name, keys.tolist(), *rest],
        "torch": th.get_rng_state().tolist(),
        "cuda": [state.tolist() for state in th.cuda.get_rng_state_all()] if th.cuda.is_available() else [],
    }


def set_global_states(states: dict[str, Any]) -> None:
    """
    :param states: from ``global_states``; those of GPUs only where there are as many
    """
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    th.set_rng_state(th.tensor(states["torch"], dtype=th.uint8))
    if th.cuda.is_available() and len(states["cuda"]) == th.cuda.device_count():
        th.cuda.set_rng_state_all([th.tensor(state, dtype=th.uint8) for state in states["cuda"]])


def noise_of_each(noise: ActionNoise | None, n_envs: int) -> ActionNoise | None:
    """
    :param noise: as it was given to the model, or as ``learn()`` has made it
    :param n_envs: number of environments
    :return: as ``learn()`` makes it: one for each environment where there are several
    """
    if noise is None or n_envs == 1 or isinstance(noise, VectorizedActionNoise):
        return noise
    return VectorizedActionNoise(noise, n_envs)


def noise_state(noise: ActionNoise | None) -> Any:
    """
    :param noise: the model's action noise
    :return: its state
    :raises CheckpointError: if it is of a class whose state is not known
    """
    if noise is None or type(noise) is NormalActionNoise:
        return None
    if type(noise) is OrnsteinUhlenbeckActionNoise:
        return noise.noise_prev.tolist()
    if type(noise) is VectorizedActionNoise:
        return [noise_state(part) for part in noise.noises]
    raise CheckpointError(
        f"An action noise of class {type(noise).__name__} may have state that cannot be stored: use one of SB3's."
    )


def set_noise_state(noise: ActionNoise | None, state: Any) -> None:
    """
    :param noise: the model's action noise
    :param state: from ``noise_state``
    """
    if isinstance(noise, OrnsteinUhlenbeckActionNoise):
        noise.noise_prev = np.array(state)
    if isinstance(noise, VectorizedActionNoise):
        for part, part_state in zip(noise.noises, state, strict=True):
            set_noise_state(part, part_state)
