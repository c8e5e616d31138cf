"""What environments keep from one episode to the next, read and put back where they live, be it in another process.

An environment or wrapper may have ``get_state()``, which returns numbers, strings, arrays, NumPy generators or lists and
dictionaries of them, and ``set_state(state)``, which takes the same: one that keeps nothing but ``np_random`` returns ``{}``.
"""

import functools
import inspect
from collections.abc import Iterator
from operator import attrgetter
from typing import Any

import gymnasium as gym
import numpy as np
from stable_baselines3.common.vec_env import SubprocVecEnv, VecEnv, VecEnvWrapper, VecNormalize

from sb3_softvalue.checkpoint.schema import Check, generator, of_type, optional, pack, packed_like, record, sequence, unpack

_MOMENTS = ("mean", "var", "count")
# What wrappers of others keep, beside nothing else
_SERVED = {
    "gymnasium.wrappers.stateful_reward.NormalizeReward": ("discounted_reward", *(f"return_rms.{each}" for each in _MOMENTS)),
    "gymnasium.wrappers.stateful_observation.NormalizeObservation": tuple(f"obs_rms.{each}" for each in _MOMENTS),
    "gymnasium.wrappers.common.RecordEpisodeStatistics": ("episode_count",),
    "stable_baselines3.common.monitor.Monitor": ("total_steps",),
}
# They keep nothing but what is served, and draw from np_random alone
_KNOWN = (
    *(f"gymnasium.envs.{name}." for name in ("classic_control", "box2d", "mujoco", "toy_text")),
    # RL Zoo replaces gymnasium's TimeLimit in every process that imports it
    *("gymnasium.wrappers.", "sb3_contrib.common.wrappers.", "rl_zoo3.gym_patches.", *_SERVED),
)
# They call a function of the user's
_OPEN = ("TransformAction", "TransformObservation", "TransformReward")


def _layers(env: gym.Env) -> Iterator[tuple[str, gym.Env]]:
    """:return: the wrappers from the outermost to the environment itself, with the full names of their classes"""
    while True:
        yield f"{type(env).__module__}.{type(env).__qualname__}", env
        if not isinstance(env, gym.Wrapper):
            return
        env = env.env


def _has_protocol(env: gym.Env) -> bool:
    """:return: whether it gives its state; MuJoCo's environments have a ``set_state`` of another kind"""
    methods = [getattr(type(env), name, None) for name in ("get_state", "set_state")]
    return all(map(callable, methods)) and len(inspect.signature(methods[1]).parameters) == 2  # type: ignore[arg-type]


def _number(value: Any) -> Any:
    """:return: packed, whether it is a number of Python's, of NumPy's or an array without axes"""
    return pack(np.asarray(value))


def _read(env: gym.Env) -> dict[str, Any]:
    """:return: what an environment keeps, packed, and what may keep more"""
    kept: dict[str, Any] = {"np_random": None, "layers": [], "unknown": [], "task": None}
    for name, layer in _layers(env):
        try:
            if _has_protocol(layer):
                kept["layers"].append([name, pack(layer.get_state())])  # type: ignore[attr-defined]
            elif name in _SERVED:
                kept["layers"].append([name, {path: _number(attrgetter(path)(layer)) for path in _SERVED[name]}])
            elif name.endswith(_OPEN) or not name.startswith(_KNOWN):
                kept["unknown"].append(type(layer).__name__)
            if not isinstance(layer, gym.Wrapper):
                kept["np_random"], kept["task"] = pack(layer.np_random)["__generator__"], layer.spec and layer.spec.id
        except Exception as error:  # of code that is not ours, in a process that it would end
            kept["unknown"].append(f"{type(layer).__name__} ({error})")
    return kept


def _restore(env: gym.Env, kept: dict[str, Any]) -> str:
    """:return: why an environment could not be put where it was, if anything failed"""
    try:
        env.unwrapped.np_random = generator("np_random", kept["np_random"])
        states = [unpack(state) for _, state in kept["layers"]]
        stateful = [layer for name, layer in _layers(env) if states and (_has_protocol(layer) or name in _SERVED)]
        for layer, state in zip(stateful, states, strict=True):
            if _has_protocol(layer):
                layer.set_state(state)  # type: ignore[attr-defined]
                continue
            for path, value in state.items():
                owner, _, attribute = path.rpartition(".")
                setattr(attrgetter(owner)(layer) if owner else layer, attribute, value if value.ndim else value.item())
    except Exception as error:
        return f"an environment could not be put where it was: {type(env.unwrapped).__name__}: {error}"
    return ""


class _Recorder:
    """
    Knows what an environment kept right before its last reset, from which the same episode can be begun again.

    :param env: whose ``reset`` it replaces
    """

    def __init__(self, env: Any):
        self._env, self._reset = env, env.reset
        self._before: dict[str, Any] | None = None
        env.reset, env.checkpoint_read, env.checkpoint_restore = self.reset, self.read, functools.partial(_restore, env)

    def reset(self, **kwargs: Any) -> Any:
        """As the environment's own. One that is given a seed begins from somewhere else."""
        self._before = _read(self._env) if all(value is None for value in kwargs.values()) else None
        return self._reset(**kwargs)

    def read(self) -> dict[str, Any]:
        """:return: what the environment keeps now and kept then"""
        return {"now": _read(self._env), "before": self._before}


class _Visit(type):
    """Makes of ``env_is_wrapped``, the one call of a VecEnv that hands out an environment in its own process, a visit."""

    def __instancecheck__(cls, env: Any) -> bool:
        if not hasattr(env, "checkpoint_read"):
            _Recorder(env)
        return True


class _Recorded(metaclass=_Visit):
    """Every environment, which has a recorder from then on."""


def read(venv: VecEnv) -> list[dict[str, Any]] | None:
    """
    :param venv: whose environments have a recorder from then on; one in another process needs a wrapper, as ``gym.make`` gives
    :return: of each environment what it keeps and kept before its last reset; None where it cannot be reached
    """
    try:
        if is_lost(venv):
            return None
        venv.env_is_wrapped(_Recorded)  # type: ignore[arg-type]  # no wrapper, but asked in the same way
        for env in getattr(venv.unwrapped, "envs", ()):
            isinstance(env, _Recorded)
        return venv.env_method("checkpoint_read") if venv.has_attr("checkpoint_read") else None
    except (AttributeError, NotImplementedError, EOFError, OSError):
        return None


def task(venv: VecEnv) -> str | None:
    """:return: the name of the first environment, if it has one"""
    states = read(venv)
    return states[0]["now"]["task"] if states else None


def is_lost(venv: VecEnv) -> bool:
    """:return: whether processes of the environments have ended, or have not answered"""
    env = venv.unwrapped
    return isinstance(env, SubprocVecEnv) and (env.closed or env.waiting or not all(p.is_alive() for p in env.processes))


def abandon(venv: VecEnv) -> None:
    """End the processes of environments that are lost, so that ``close()`` does not wait for them."""
    env = venv.unwrapped
    if isinstance(env, SubprocVecEnv) and not env.closed and is_lost(env):
        for process in env.processes:
            process.kill()
            process.join(1.0)
        env.waiting, env.closed = False, True


def schema(venv: VecEnv) -> Check:
    """:return: a check for what ``read`` gives: what is served by types and shapes, an environment's own by its kind"""
    own = read(venv)
    served = {name: packed_like(state) for name, state in (own[0]["now"]["layers"] if own else ()) if name in _SERVED}

    def layer(name: str, pair: Any) -> Any:
        unpack(pair[1])
        return [of_type(str)(name, pair[0]), served.get(pair[0], lambda name, state: state)(name, pair[1]) and pair[1]]

    def seeded(name: str, value: Any) -> Any:
        return generator(name, value) and value

    fields = {"np_random": optional(seeded), "layers": sequence(layer), "task": optional(of_type(str))}
    kept = record(fields | {"unknown": sequence(of_type(str))})
    return optional(sequence(record({"now": kept, "before": optional(kept)}), venv.num_envs))


def begin_episodes(venv: VecEnv, saved: list[dict[str, Any]] | None, boundary: bool) -> tuple[Any, list[str]]:
    """
    Reset the environments, where possible so that the episodes begin that had begun.

    :param venv: of the model
    :param saved: from ``read``, checked
    :param boundary: whether all episodes had just begun
    :return: the observations, and why the environments are not where they were
    :raises RuntimeError: if one of them cannot be put there
    """
    own, why = read(venv), []
    if not saved or not own or any(each["now"]["np_random"] is None for each in (*saved, *own)):
        return venv.reset(), ["the environments' states are not known: put them into Monitor"]
    names = [[[name for name, _ in each["now"]["layers"]] for each in states] for states in (saved, own)]
    if names[0] != names[1]:
        why.append(f"the environments with a state were {names[0][0]} and are {names[1][0]}")
    venv.reset()  # the first reset of a VecEnv seeds its environments
    again = boundary and all(each["before"] and each["before"]["np_random"] for each in saved)
    for index, each in enumerate(saved):
        kept = (each["before"] if again else each["now"]) | ({} if names[0] == names[1] else {"layers": []})
        if failed := venv.env_method("checkpoint_restore", kept, indices=[index])[0]:
            raise RuntimeError(failed)
    observations = venv.reset()
    if not again:
        why.append("it was written in the middle of an episode")
    elif [each["now"] for each in read(venv) or ()] != [each["now"] for each in saved]:
        why.append("reset() has left an environment in another state")
    return observations, why


def unknown(venv: VecEnv, saved: list[dict[str, Any]] | None) -> list[str]:
    """:return: which environments and wrappers may keep what is not stored"""
    names = {name for each in (*(saved or ()), *(read(venv) or ())) for name in each["now"]["unknown"]}
    while isinstance(venv, VecEnvWrapper):
        names |= set() if type(venv).__module__.startswith("stable_baselines3.") else {type(venv).__name__}
        venv = venv.venv
    return [f"{name} may keep more than get_state() says: give it get_state() and set_state()" for name in sorted(names)]


def _statistics(env: VecNormalize) -> dict[str, Any]:
    by_name = env.obs_rms if env.norm_obs else {}
    by_name = by_name if isinstance(by_name, dict) else {"": by_name}
    return {"returns": env.ret_rms, **{f"observations {key}": each for key, each in by_name.items()}}


def moments(env: VecNormalize | None) -> dict[str, Any] | None:
    """:return: the statistics of VecNormalize, packed"""
    if env is None:
        return None
    return {name: {key: _number(getattr(each, key)) for key in _MOMENTS} for name, each in _statistics(env).items()}


def set_moments(env: VecNormalize, saved: dict[str, Any]) -> None:
    """
    :param env: to change; its returns are those of episodes that begin
    :param saved: from ``moments``, checked
    """
    for name, each in _statistics(env).items():
        each.mean, each.var, each.count = saved[name]["mean"], saved[name]["var"], saved[name]["count"].item()
    env.returns = np.zeros(env.num_envs)
