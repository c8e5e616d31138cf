"""What environments keep from one episode to the next, read and restored where they live, also in other processes.

An environment or wrapper may have ``get_state()``, which returns numbers, strings, arrays, NumPy generators or lists and
dictionaries of them, and ``set_state(state)``, which takes the same. One that keeps nothing but ``np_random`` returns ``{}``.
"""

import functools
import hashlib
import inspect
from collections.abc import Iterator
from operator import attrgetter
from typing import Any

import gymnasium as gym
import numpy as np
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.vec_env import SubprocVecEnv, VecEnv, VecEnvWrapper, VecNormalize

from sb3_softvalue.checkpoint.schema import generator, like, optional, pack, unpack

_MOMENTS = ("mean", "var", "count")
# All that these wrappers keep
_SERVED = {
    "gymnasium.wrappers.stateful_reward.NormalizeReward": ("discounted_reward", *(f"return_rms.{each}" for each in _MOMENTS)),
    "gymnasium.wrappers.stateful_observation.NormalizeObservation": tuple(f"obs_rms.{each}" for each in _MOMENTS),
    "gymnasium.wrappers.common.RecordEpisodeStatistics": ("episode_count",),
    "stable_baselines3.common.monitor.Monitor": ("total_steps",),
}
# They keep nothing else, and draw from np_random only
_KNOWN = (
    *(f"gymnasium.envs.{name}." for name in ("classic_control", "box2d", "mujoco", "toy_text")),
    # RL Zoo replaces gymnasium's TimeLimit in every process that imports it
    *("gymnasium.wrappers.", "sb3_contrib.common.wrappers.", "rl_zoo3.gym_patches.", *_SERVED),
)
# They call a function of the user's
_OPEN = ("TransformAction", "TransformObservation", "TransformReward")


def _layers(env: gym.Env) -> Iterator[tuple[str, Any]]:
    """:return: the wrappers from the outermost to the environment itself, with the full names of their classes"""
    while True:
        yield f"{type(env).__module__}.{type(env).__qualname__}", env
        if not isinstance(env, gym.Wrapper):
            return
        env = env.env


def _has_protocol(env: gym.Env) -> bool:
    """:return: whether it gives its state; MuJoCo's environments have a ``set_state`` of another kind"""
    get_state, set_state = (getattr(type(env), name, None) for name in ("get_state", "set_state"))
    return callable(get_state) and callable(set_state) and len(inspect.signature(set_state).parameters) == 2


def _packed(owner: Any, paths: tuple[str, ...]) -> dict[str, Any]:
    """:return: numbers and arrays of an object, packed; numbers as arrays without axes"""
    return {path: pack(np.asarray(attrgetter(path)(owner))) for path in paths}


def _read(env: gym.Env) -> dict[str, Any]:
    """:return: what an environment keeps, packed, and the names of layers that may keep more"""
    kept: dict[str, Any] = {"np_random": None, "layers": [], "unknown": [], "task": None}
    for name, layer in _layers(env):
        try:
            if _has_protocol(layer):
                kept["layers"].append([name, pack(layer.get_state())])
            elif name in _SERVED:
                kept["layers"].append([name, _packed(layer, _SERVED[name])])
            elif name.endswith(_OPEN) or not name.startswith(_KNOWN):
                kept["unknown"].append(type(layer).__name__)
            if not isinstance(layer, gym.Wrapper):
                kept["np_random"], kept["task"] = pack(layer.np_random)["__generator__"], layer.spec and layer.spec.id
        except Exception as error:  # of the user's code, in a process that it would end
            kept["unknown"].append(f"{type(layer).__name__} ({error})")
    return kept


def _restore(env: gym.Env, kept: dict[str, Any]) -> str:
    """:return: why an environment could not be restored, or nothing: an exception would end its process"""
    try:
        env.unwrapped.np_random = generator("np_random", kept["np_random"])
        for _, layer in _layers(env):
            if isinstance(layer, Monitor):  # also one with allow_early_resets=False: its episode ends here
                layer.needs_reset = True
        states = [unpack(state) for _, state in kept["layers"]]
        stateful = [layer for name, layer in _layers(env) if states and (_has_protocol(layer) or name in _SERVED)]
        for layer, state in zip(stateful, states, strict=True):
            if _has_protocol(layer):
                layer.set_state(state)
                continue
            for path, value in state.items():
                owner, _, attribute = path.rpartition(".")
                setattr(attrgetter(owner)(layer) if owner else layer, attribute, value if value.ndim else value.item())
    except Exception as error:
        return f"an environment could not be put where it was: {type(env.unwrapped).__name__}: {error}"
    return ""


class _Recorder:
    """
    Replaces the ``reset`` of an environment to record its state right before, from which the same episode can begin again.
    A class, so that a copy of the environment has a recorder of its own.
    """

    def __init__(self, env: Any):
        self._env, self._reset = env, env.reset
        self._before: dict[str, Any] | None = None
        env.reset, env.checkpoint_read, env.checkpoint_restore = self.reset, self.read, functools.partial(_restore, env)

    def reset(self, **kwargs: Any) -> Any:
        """A reset with a seed begins from another state than the recorded one."""
        self._before = _read(self._env) if all(value is None for value in kwargs.values()) else None
        return self._reset(**kwargs)

    def read(self) -> dict[str, Any]:
        """:return: what the environment keeps now and kept before its last reset"""
        return {"now": _read(self._env), "before": self._before}


class _Visit(type):
    """``env_is_wrapped`` is the only call of a VecEnv that passes an environment to code of ours in its own process."""

    def __instancecheck__(cls, env: Any) -> bool:
        if not hasattr(env, "checkpoint_read"):
            _Recorder(env)
        return True


class _Recorded(metaclass=_Visit):
    """Every environment, which has a recorder from then on."""


def read(venv: VecEnv) -> list[dict[str, Any]] | None:
    """
    :param venv: whose environments have a recorder from then on; one in another process needs a wrapper, as from ``gym.make``
    :return: what each environment keeps and kept before its last reset; none where their processes have ended or do not
        answer; None where it cannot be reached
    """
    try:
        if is_lost(venv):
            return []
        venv.env_is_wrapped(_Recorded)  # type: ignore[arg-type]  # it is no wrapper
        for env in getattr(venv.unwrapped, "envs", ()):
            isinstance(env, _Recorded)
        return venv.env_method("checkpoint_read") if venv.has_attr("checkpoint_read") else None
    except (AttributeError, NotImplementedError, EOFError, OSError):
        return [] if is_lost(venv) else None


def is_lost(venv: VecEnv | None) -> bool:
    """:return: whether processes of the environments have ended or have not answered"""
    env = venv and venv.unwrapped
    return isinstance(env, SubprocVecEnv) and (env.closed or env.waiting or not all(p.is_alive() for p in env.processes))


def abandon(venv: VecEnv | None) -> None:
    """End the processes of environments that are lost, so that ``close()`` does not wait for them."""
    env = venv and venv.unwrapped
    if isinstance(env, SubprocVecEnv) and not env.closed and is_lost(env):
        for process in env.processes:
            process.kill()
            process.join(1.0)
        env.waiting, env.closed = False, True


def schema(venv: VecEnv) -> Any:
    """:return: what is like that which ``read`` returns: served states by type and shape, an environment's own by its kind"""
    own = read(venv)
    served = {name: unpack(state) for name, state in (own[0]["now"]["layers"] if own else ()) if name in _SERVED}

    def layer(name: str, pair: Any) -> Any:
        kind, state = like([str, Any], name, pair)
        like(served.get(kind, Any), name, unpack(state))
        return pair

    def seeded(name: str, state: Any) -> Any:
        generator(name, state)
        return state

    kept = {"np_random": optional(seeded), "layers": [layer, ...], "task": optional(str), "unknown": [str, ...]}
    states = optional([{"now": kept, "before": optional(kept)}] * venv.num_envs)
    return lambda name, value: value if value == [] else states(name, value)


def begin_episodes(model: OffPolicyAlgorithm, content: dict[str, Any]) -> tuple[Any, list[str]]:
    """
    Reset the environments, where possible so that the same episodes begin.

    :param content: of state.json, checked
    :return: the observations, None if no episode had begun, and why the training does not continue exactly
    :raises Exception: if an environment cannot be reset; the statistics of ``VecNormalize`` are as before
    """
    env, normalize = model.env, model.get_vec_normalize_env()
    assert env is not None
    if normalize is None:
        return _begin(env, content)
    before, training = moments(normalize), normalize.training
    try:
        set_moments(normalize, content["VecNormalize"])
        normalize.training = False  # the first observations are counted already
        return _begin(env, content)
    except Exception:
        set_moments(normalize, unpack(before))
        raise
    finally:
        normalize.training = training


def _begin(venv: VecEnv, content: dict[str, Any]) -> tuple[Any, list[str]]:
    saved, own, why, observations = content["environments"], read(venv) or [], [], None
    is_known = saved and own and all(each["now"]["np_random"] is not None for each in (*saved, *own))
    if content["seeds"] is not None:
        # No episode had begun: the next reset begins the first one, whether or not there was one here
        if is_known:
            why = _put_back(venv, saved, own, "now")
        venv.unwrapped._seeds = list(content["seeds"])
    elif not is_known:
        ended = "their processes had ended or did not answer when it was saved"
        reason = ended if saved == [] else "put them into Monitor"
        observations, why = venv.reset(), [f"the environments' states are not known: {reason}"]
    else:
        observations, why = _begin_again(venv, saved, own, content["boundary"])
    # Which environments and wrappers may keep something that is not stored
    names = {name for each in (*(saved or ()), *(read(venv) or ())) for name in each["now"]["unknown"]}
    while isinstance(venv, VecEnvWrapper):
        names |= set() if type(venv).__module__.startswith("stable_baselines3.") else {type(venv).__name__}
        venv = venv.venv
    why += [f"{name} may keep more than get_state() says: give it get_state() and set_state()" for name in sorted(names)]
    if not why and observations is not None and content["observations"] != digest(observations):
        why.append("reset() has given other observations")
    return observations, why


def _put_back(venv: VecEnv, saved: list[Any], own: list[Any], when: str) -> list[str]:
    """:return: why the environments are not where they were "now", when they were saved, or "before" their last reset"""
    names = [[[name for name, _ in each["now"]["layers"]] for each in states] for states in (saved, own)]
    for index, each in enumerate(saved):
        kept = each[when] | ({} if names[0] == names[1] else {"layers": []})
        if failed := venv.env_method("checkpoint_restore", kept, indices=[index])[0]:
            raise RuntimeError(failed)
    return [] if names[0] == names[1] else [f"the environments with a state were {names[0][0]} and are {names[1][0]}"]


def _begin_again(venv: VecEnv, saved: list[Any], own: list[Any], boundary: bool) -> tuple[Any, list[str]]:
    """Restore the environments to where they were before their last reset if all of them had just begun, or else to now."""
    # Seeds and options are for the first reset, which was another one
    venv.unwrapped._reset_seeds()
    venv.unwrapped._reset_options()
    again = boundary and all(each["before"] and each["before"]["np_random"] for each in saved)
    why = _put_back(venv, saved, own, "before" if again else "now")
    observations = venv.reset()
    if not boundary:
        why.append("it was written in the middle of an episode")
    elif not again:
        why.append("the environments' states before their last reset are not known: train with ResumableCheckpoint")
    elif [each["now"] for each in read(venv) or ()] != [each["now"] for each in saved]:
        why.append("reset() has left an environment in another state")
    return observations, why


def begin_at(model: OffPolicyAlgorithm, observations: Any) -> None:
    """Tell the model what the environments' reset has returned, as ``learn()`` does."""
    normalize = model.get_vec_normalize_env()
    model._last_obs = observations
    model._last_original_obs = None if normalize is None else normalize.get_original_obs()
    model._last_episode_starts = np.ones((model.n_envs,), dtype=bool)


def digest(observations: Any) -> str:
    """:return: a checksum of observations"""
    arrays = observations.values() if isinstance(observations, dict) else [observations]
    return hashlib.sha256(b"".join(np.ascontiguousarray(array).tobytes() for array in arrays)).hexdigest()


def _statistics(env: VecNormalize) -> dict[str, Any]:
    by_name = env.obs_rms if env.norm_obs else {}
    by_name = by_name if isinstance(by_name, dict) else {"": by_name}
    return {"returns": env.ret_rms, **{f"observations {key}": each for key, each in by_name.items()}}


def moments(env: VecNormalize | None) -> dict[str, Any] | None:
    """:return: the statistics of VecNormalize, packed"""
    return None if env is None else {name: _packed(each, _MOMENTS) for name, each in _statistics(env).items()}


def set_moments(env: VecNormalize, saved: dict[str, Any]) -> None:
    """Set the statistics from arrays; the returns are those of episodes that begin."""
    for name, each in _statistics(env).items():
        each.mean, each.var, each.count = saved[name]["mean"], saved[name]["var"], saved[name]["count"].item()
    env.returns = np.zeros(env.num_envs)
