"""What environments keep from one episode to the next, read and put back where they live, be it in another process.

An environment or wrapper may have ``get_state()``, which returns numbers, strings, arrays, NumPy generators or lists and
dictionaries of them, and ``set_state(state)``, which takes the same: one that keeps nothing but ``np_random`` returns ``{}``.
"""

import functools
import inspect
import operator
from collections.abc import Iterator
from typing import Any

import gymnasium as gym
import numpy as np
from stable_baselines3.common.vec_env import SubprocVecEnv, VecEnv, VecEnvWrapper, VecNormalize

from sb3_softvalue.checkpoint.schema import Check, generator, of_type, optional, pack, packed_like, record, sequence, unpack

# What wrappers of others keep, beside nothing else
_SERVED = {
    "gymnasium.wrappers.stateful_reward.NormalizeReward": (
        "return_rms.mean",
        "return_rms.var",
        "return_rms.count",
        "discounted_reward",
    ),
    "gymnasium.wrappers.stateful_observation.NormalizeObservation": ("obs_rms.mean", "obs_rms.var", "obs_rms.count"),
    "gymnasium.wrappers.common.RecordEpisodeStatistics": ("episode_count",),
    "stable_baselines3.common.monitor.Monitor": ("total_steps",),
}
# Keep nothing from one episode to the next but what is served, and draw from np_random alone
_KNOWN = (
    *(f"gymnasium.envs.{name}." for name in ("classic_control", "box2d", "mujoco", "toy_text")),
    "gymnasium.wrappers.",
    "sb3_contrib.common.wrappers.",
    *_SERVED,
)
# They call a function of the user's
_OPEN = tuple(f"gymnasium.wrappers.transform_{kind.lower()}.Transform{kind}" for kind in ("Action", "Observation", "Reward"))


def _layers(env: gym.Env) -> Iterator[tuple[str, gym.Env]]:
    """:return: the wrappers from the outermost to the environment itself, with the full names of their classes"""
    while True:
        yield f"{type(env).__module__}.{type(env).__qualname__}", env
        if not isinstance(env, gym.Wrapper):
            return
        env = env.env


def _number(value: Any) -> Any:
    """:return: packed, whether it is a number of Python's, of NumPy's or an array without axes"""
    return pack(np.asarray(value))


def _has_protocol(env: gym.Env) -> bool:
    """:return: whether it gives its state; MuJoCo's environments have a ``set_state`` of another kind"""
    methods = [getattr(type(env), name, None) for name in ("get_state", "set_state")]
    return all(map(callable, methods)) and len(inspect.signature(methods[1]).parameters) == 2  # type: ignore[arg-type]


def _read(env: gym.Env) -> dict[str, Any]:
    """:return: what an environment keeps, packed, and what may keep more"""
    kept: dict[str, Any] = {"np_random": None, "layers": [], "unknown": [], "task": None}
    for name, layer in _layers(env):
        try:
            if _has_protocol(layer):
                kept["layers"].append([name, pack(layer.get_state())])  # type: ignore[attr-defined]
            elif name in _SERVED:
                kept["layers"].append([name, {each: _number(operator.attrgetter(each)(layer)) for each in _SERVED[name]}])
            elif name in _OPEN or not name.startswith(_KNOWN):
                kept["unknown"].append(type(layer).__name__)
            if not isinstance(layer, gym.Wrapper):
                kept["np_random"] = pack(layer.np_random)["__generator__"]
                kept["task"] = layer.spec and layer.spec.id
        except Exception as error:  # of code that is not ours, in a process that it would end
            kept["unknown"].append(f"{type(layer).__name__} ({error})")
    return kept


def _restore(env: gym.Env, kept: dict[str, Any]) -> str:
    """:return: why an environment could not be put where it was, if anything failed"""
    try:
        env.unwrapped.np_random = generator("np_random", kept["np_random"])
        names = [name for name, _ in kept["layers"]]
        served = [(name, layer) for name, layer in _layers(env) if name in names]
        for (name, layer), (_, state) in zip(served, kept["layers"], strict=True):
            if _has_protocol(layer):
                layer.set_state(unpack(state))  # type: ignore[attr-defined]
                continue
            for path, value in unpack(state).items():
                owner, _, attribute = path.rpartition(".")
                setattr(operator.attrgetter(owner)(layer) if owner else layer, attribute, value if value.ndim else value.item())
    except Exception as error:
        return f"{type(env.unwrapped).__name__}: {error}"
    return ""


class _Recorder:
    """
    Knows what an environment kept right before its last reset, from which the same episode can be begun again.

    :param env: whose ``reset`` it takes the place of
    """

    def __init__(self, env: Any):
        self._env, self._reset, self._before = env, env.reset, None
        env.reset, env.checkpoint_read = self.reset, self.read
        env.checkpoint_restore = functools.partial(_restore, env)

    def reset(self, **kwargs: Any) -> Any:
        """As the environment's own."""
        # What is seeded begins from somewhere else
        self._before = None if any(value is not None for value in kwargs.values()) else _read(self._env)
        return self._reset(**kwargs)

    def read(self) -> dict[str, Any]:
        """:return: what the environment keeps now and kept then"""
        return {"now": _read(self._env), "before": self._before}


class _Attach(type):
    """Makes of ``env_is_wrapped``, the one call of a VecEnv that hands out an environment in its own process, a visit."""

    def __instancecheck__(cls, env: Any) -> bool:
        if not hasattr(env, "checkpoint_read"):
            _Recorder(env)
        return True


class _Recorded(metaclass=_Attach):
    """Every environment, which has a recorder from then on."""


def attach(venv: VecEnv) -> None:
    """Put a recorder into every environment; one in a process of its own needs a wrapper, as ``gym.make`` gives it."""
    venv.env_is_wrapped(_Recorded)  # type: ignore[arg-type]  # no wrapper, but asked in the same way
    for env in getattr(venv.unwrapped, "envs", ()):
        isinstance(env, _Recorded)


def read(venv: VecEnv) -> list[dict[str, Any]] | None:
    """:return: of each environment what it keeps and kept before its last reset; None where it cannot be reached"""
    if is_lost(venv):
        return None
    try:
        attach(venv)
        return venv.env_method("checkpoint_read") if venv.has_attr("checkpoint_read") else None
    except (AttributeError, NotImplementedError, EOFError, OSError):
        return None


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


def check_state(own: list[dict[str, Any]] | None) -> Check:
    """
    :param own: what the model's environments keep
    :return: a check for what ``read`` gave: what is served by its type and shape, an environment's own by its kind alone
    """

    def layers(name: str, value: Any) -> Any:
        value = sequence(lambda each, pair: [of_type(str)(each, pair[0]), pair[1]])(name, value)
        for index, (layer, state) in enumerate(value):
            unpack(state)
            for known, template in own[0]["now"]["layers"] if own and layer in _SERVED else ():
                if known == layer:
                    packed_like(template)(f"{name}[{index}]", state)
        return value

    def seeded(name: str, value: Any) -> Any:
        generator(name, value)
        return value

    texts = optional(of_type(str))
    kept = record(
        {"np_random": optional(seeded), "layers": layers, "unknown": sequence(of_type(str)), "task": texts},
    )
    return optional(sequence(record({"now": kept, "before": optional(kept)}), len(own) if own else None))


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
        return venv.reset(), ["the environments could not be reached: put them into Monitor"]
    names = [[[name for name, _ in each["now"]["layers"]] for each in states] for states in (saved, own)]
    venv.reset()  # the first reset of a VecEnv seeds its environments
    again = boundary and all(each["before"] and each["before"]["np_random"] for each in saved)
    for index, each in enumerate(saved):
        kept = each["before"] if again else each["now"]
        kept = kept if names[0] == names[1] else {**kept, "layers": []}
        if failed := venv.env_method("checkpoint_restore", kept, indices=[index])[0]:
            raise RuntimeError(f"an environment cannot be put where it was: {failed}")
    if names[0] != names[1]:
        why.append(f"the environments with a state were {names[0][0]} and are {names[1][0]}")
    observations = venv.reset()
    if not again:
        why.append("it was written in the middle of an episode")
    elif [each["now"] for each in read(venv) or ()] != [each["now"] for each in saved]:
        why.append("reset() has left an environment in another state")
    unknown = {name for each in (*saved, *own) for name in each["now"]["unknown"]}
    layer: Any = venv
    while isinstance(layer, VecEnvWrapper):
        unknown |= set() if type(layer).__module__.startswith("stable_baselines3.") else {type(layer).__name__}
        layer = layer.venv
    why += [f"{name} may keep more than get_state() says: give it get_state() and set_state()" for name in sorted(unknown)]
    return observations, why


def moments(env: VecNormalize | None) -> dict[str, Any] | None:
    """:return: the statistics of VecNormalize, packed"""
    if env is None:
        return None
    names = ("mean", "var", "count")
    return {name: {key: _number(getattr(each, key)) for key in names} for name, each in _statistics(env).items()}


def _statistics(env: VecNormalize) -> dict[str, Any]:
    of_obs = env.obs_rms if env.norm_obs else {}
    by_name = of_obs.items() if isinstance(of_obs, dict) else [("", of_obs)]
    return {"returns": env.ret_rms, **{f"observations {key}": each for key, each in by_name}}


def set_moments(env: VecNormalize, saved: dict[str, Any]) -> None:
    """
    :param env: to change; its returns are those of episodes that begin
    :param saved: from ``moments``
    """
    for name, each in _statistics(env).items():
        for key, value in saved[name].items():
            setattr(each, key, unpack(value) if key != "count" else unpack(value).item())
    env.returns = np.zeros(env.num_envs)
