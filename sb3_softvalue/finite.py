"""Stops training at the first NaN or infinite number, before it is stored or learned from."""

import math
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, NoReturn

import numpy as np
import torch as th
from stable_baselines3.common.buffers import NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer

from sb3_softvalue.objective import Batch, Metrics

# A SACV, which imports this file: the class cannot be imported here
Model = Any

_SMALLER = "scale observations and rewards to about 1 (VecNormalize), lower learning_rate, or set max_grad_norm"
# What usually helps, by quantity
_REMEDIES = {
    "observation": "look in the environment for a diverged simulation or a division by zero, and end the episode before it",
    "reward": "look in the reward function for a division by zero, the logarithm of zero or an overflow",
    "action": "check action_noise and use_sde, or lower learning_rate",
    "loss": _SMALLER,
    "gradient": _SMALLER,
    "parameter": f"look for code that writes to the networks; otherwise {_SMALLER}",
}


class NonFiniteError(ValueError):
    """
    A quantity of the training is NaN or infinite.

    A ``ValueError`` like PyTorch's for invalid parameters of a distribution, which would otherwise follow: code that handles
    that error also handles this one (RL Zoo prunes the trial).
    """

    quantity = ""
    """One of "observation", "reward", "action", "loss", "gradient" and "parameter"."""


class FiniteCheck:
    """
    Checks observations, rewards, actions and updates. ``SACV(..., check_finite=False)`` disables it.

    Numbers must be finite in float32, the type of the replay buffer. An observation may contain NaN if the networks handle
    it, for instance in a user's features extractor.
    """

    def __init__(self) -> None:
        # Running statistics of VecNormalize, and what they were before the current step
        self._statistics: list[tuple[RunningMeanStd, dict[str, Any]]] = []

    def remember_statistics(self, model: Model) -> None:
        """
        Remember the statistics of VecNormalize. References are enough, since each step replaces the arrays.

        :param model: model before a step of its environments
        """
        env = model._vec_normalize_env
        statistics = () if env is None else (*_averaged_observations(model).values(), env.ret_rms)
        self._statistics = [(moments, vars(moments).copy()) for moments in statistics]

    def check_first_observation(self, model: Model) -> None:
        """
        :param model: model after the reset of its environments
        :raises NonFiniteError: if an observation is not finite
        """
        self._check_observation(model, model._last_obs, "at the start of the episode")

    def check_action(self, model: Model, actions: np.ndarray) -> None:
        """
        :param model: model whose policy and action noise returned the actions
        :param actions: scaled actions, one row per environment
        :raises NonFiniteError: if an action is not finite
        """
        bad = _first_not_finite(actions)
        if bad is not None:
            what = f"The action for environment {bad[0]} is {bad[1]} at step {model.num_timesteps}"
            self._raise_for_step(model, "action", f"{what}, after adding action_noise")

    def check_transition(self, model: Model, new_obs: Any, reward: Any, dones: np.ndarray, infos: Sequence[Any]) -> None:
        """
        :param model: model whose replay buffer will store the transition
        :param new_obs: next observations, one row per environment, or a dict of such
        :param reward: one reward per environment
        :param dones: whether the episode has ended, per environment
        :param infos: info dict per environment
        :raises NonFiniteError: if a number to be stored is not finite
        """
        env = model._vec_normalize_env
        bad = _first_not_finite(reward if env is None else env.old_reward)
        if bad is not None:
            what = f"The reward of environment {bad[0]} is {bad[1]} at step {model.num_timesteps}"
            self._raise_for_step(model, "reward", f"{what}, as returned by the environment, in float32")
        self._check_observation(model, new_obs, "as returned by the environment")
        # In one piece: of a thousand environments, all may end at the same step
        ended = [i for i in np.asarray(dones).nonzero()[0].tolist() if infos[i].get("terminal_observation") is not None]
        if ended:
            last = [infos[i]["terminal_observation"] for i in ended]
            is_dict = isinstance(last[0], Mapping)
            rows = {key: np.array([one[key] for one in last]) for key in last[0]} if is_dict else np.array(last)
            self._check_observation(model, rows, "at the end of the episode", ended)

    def check_update(self, model: Model, batch: Batch, metrics: th.Tensor, found_inf: th.Tensor | None) -> th.Tensor | None:
        """
        Decide whether an update may be applied. On a CPU this raises immediately. On other devices the optimizers skip the
        step by a flag on the device, and ``check_report`` raises when the losses are read.

        :param model: model before the optimizer step
        :param batch: batch of the update
        :param metrics: metrics of the update, in the order of ``Metrics``
        :param found_inf: flag of the previous update: after one skipped update, all later ones are skipped
        :return: None on a CPU, else shape (): 1 if the update must be skipped
        :raises NonFiniteError: on a CPU, if the update must be skipped
        """
        if metrics.device.type != "cpu":
            # The optimizers' kernel needs float32, whatever the type of the networks
            now = metrics[-1].float()
            return now if found_inf is None else th.maximum(found_inf, now)
        if metrics[-1].item():
            _raise_for_update(model, batch, metrics, "The update was skipped, and the model is unchanged.")
        return None

    def check_report(self, model: Model, batch: Batch, report: th.Tensor) -> None:
        """
        :param model: model after the updates of a ``train()``
        :param batch: batch of the last update
        :param report: one row of metrics per update, on the CPU
        :raises NonFiniteError: if an update was skipped
        """
        if report[:, -1].any():
            n_made = int(report[:, -1].nonzero()[0])
            model._n_updates -= len(report) - n_made
            aftermath = "The update was skipped; only the target value has moved towards V since."
            _raise_for_update(model, batch, report[n_made], aftermath)

    def raise_for_policy(self, model: Model, error: ValueError) -> None:
        """
        :param model: model whose policy could not sample an action
        :param error: the error of PyTorch's distribution about a mean or standard deviation that is not finite
        :raises NonFiniteError: if the policy's parameters or outputs are not finite
        """
        _raise_for_parameters(model, error)
        # Without outputs, the error has another cause
        outputs = _largest_outputs(model, model._last_obs)
        if not math.isfinite(outputs.get("mean", 0.0) + outputs.get("std", 0.0)):
            what = f"The policy's mean is {outputs['mean']:.3g} and its standard deviation {outputs['std']:.3g}"
            raise _error(model, "action", f"{what} at step {model.num_timesteps}", "No action was taken.") from error

    def _check_observation(self, model: Model, seen: Any, when: str, ended: Sequence[int] | None = None) -> None:
        """
        :param seen: observations as the networks see them, one row per environment, or a dict of such
        :param when: when they were returned, for the message
        :param ended: environment of each row, if these are the last observations of episodes; None if each has a row
        :raises NonFiniteError: if an observation is not finite and the networks do not handle that
        """
        env = model._vec_normalize_env
        original = seen if env is None or ended else env.old_obs
        for key, part in original.items() if isinstance(original, Mapping) else ((None, original),):
            bad = _first_not_finite(part)
            # VecNormalize's running statistics would stay NaN, even if the networks handle it
            if bad is not None and ((not ended and key in _averaged_observations(model)) or not _is_handled(model, seen)):
                name = "observation" if key is None else f"observation {key!r}"
                index = ended[bad[0]] if ended else bad[0]
                what = f"The {name} of environment {index} is {bad[1]} at step {model.num_timesteps}"
                self._raise_for_step(model, "observation", f"{what}, {when}, in float32")

    def _raise_for_step(self, model: Model, quantity: str, what: str) -> NoReturn:
        """Undo a step that cannot be stored, and raise; the next ``learn()`` starts with a new episode."""
        for moments, before in self._statistics:
            vars(moments).update(before)
        error = _error(model, quantity, what, "It was not stored, and the model is unchanged.")
        model._last_obs = None
        if isinstance(model.replay_buffer, ReplayBuffer):
            truncate_open_episodes(model.replay_buffer)
        raise error


def truncate_open_episodes(buffer: ReplayBuffer) -> None:
    """
    Truncate unfinished episodes at the last row of the buffer, so that the next transitions belong to new episodes.

    :param buffer: one of SB3's replay buffers, after a stop in the middle of episodes; it may be empty
    """
    if not buffer.pos and not buffer.full:
        return
    last = (buffer.pos - 1) % buffer.buffer_size
    if isinstance(buffer, HerReplayBuffer):
        with warnings.catch_warnings():
            # HerReplayBuffer warns that it truncates, which is intended here
            warnings.simplefilter("ignore")
            buffer.truncate_last_trajectory()
    elif isinstance(buffer, NStepReplayBuffer):
        buffer.timeouts[last] = np.maximum(buffer.timeouts[last], 1.0 - buffer.dones[last])
    elif buffer.optimize_memory_usage:
        # As SB3 does at the start of learn() (issue 46): the next row's observation belongs to another episode
        buffer.dones[last] = 1.0


def _first_not_finite(rows: Any) -> tuple[int, Any] | None:
    """
    :param rows: one row per environment, of any type that SB3 stores
    :return: index of the first row that is not finite in float32, and its first such number; None if all are finite
    """
    array = np.asarray(rows)
    if array.dtype.kind in "biu":
        return None
    if array.dtype != np.float32:
        with np.errstate(over="ignore"):
            array = array.astype(np.float32)
    finite = np.isfinite(array)
    if np.count_nonzero(finite) == finite.size:  # half the time of all()
        return None
    index = np.unravel_index(finite.argmin(), finite.shape)
    return int(index[0]), array[index]


def _averaged_observations(model: Model) -> dict[str | None, RunningMeanStd]:
    """:return: the running statistics of VecNormalize, by key of the observations (None if they are no dict)"""
    env = model._vec_normalize_env
    if env is None or not (env.training and env.norm_obs):
        return {}
    return env.obs_rms if isinstance(env.obs_rms, dict) else {None: env.obs_rms}


@th.no_grad()
def _largest_outputs(model: Model, observation: Any) -> dict[str, float]:
    """
    :param observation: one row per environment, or a dict of such, as the networks see it
    :return: largest absolute output of each network, NaN if one is NaN; empty if a network refuses the observation
    """
    model.policy.set_training_mode(False)
    with suppress(Exception):
        obs, _ = model.policy.obs_to_tensor(observation)
        mean, log_std, _ = model.actor.get_action_dist_params(obs)
        q_values = th.cat(model.critic(obs, th.tanh(mean)), dim=1)
        outputs = {"mean": mean, "std": log_std.exp(), "Q": q_values, "V": model.value(obs)}
        return {name: float(output.abs().max()) for name, output in outputs.items()}
    return {}


def _is_handled(model: Model, observation: Any) -> bool:
    """:return: whether all outputs of the networks are finite although the observation is not"""
    outputs = _largest_outputs(model, observation)
    return bool(outputs) and all(map(math.isfinite, outputs.values()))


def _error(model: Model, quantity: str, what: str, aftermath: str) -> NonFiniteError:
    """
    :param what: which number is not finite, where, and its value; a sentence without the period
    :param aftermath: what was done about it, a sentence
    """
    state = f"update {model._n_updates}"
    # An error here must not hide the one to be reported
    with suppress(Exception):
        state += f", temperature α {float(model.temperature().ent_coef):.3g}"
        outputs = _largest_outputs(model, model._last_obs)
        state += f", largest |Q| {outputs['Q']:.3g} and largest |V| {outputs['V']:.3g} at the last observation"
    error = NonFiniteError(f"{what} ({state}). {aftermath} What usually helps: {_REMEDIES[quantity]}.")
    error.quantity = quantity
    return error


def _raise_for_update(model: Model, batch: Batch, metrics: th.Tensor, aftermath: str) -> NoReturn:
    """:raises NonFiniteError: always, naming what is not finite"""
    _raise_for_parameters(model)
    values = Metrics(*metrics.tolist())
    bad = [name for name, value in zip(Metrics._fields, values, strict=True) if not math.isfinite(value)]
    largest = []
    for field, value in zip(Batch._fields, batch, strict=True):
        for key, tensor in value.items() if isinstance(value, dict) else (("", value),):
            largest.append(f"{field}{key and f' {key!r}'} {float(tensor.float().abs().max()):.3g}")
    what = f"{', '.join(bad) or 'A gradient'} of update {model._n_updates + 1} is not finite"
    what += f"; largest in the last batch: {', '.join(largest)}"
    raise _error(model, "loss" if bad else "gradient", what, aftermath)


def _raise_for_parameters(model: Model, cause: Exception | None = None) -> None:
    """:raises NonFiniteError: if a parameter is not finite"""
    tensors = dict(model.policy.state_dict())
    if model.log_ent_coef is not None:
        tensors["log_ent_coef"] = model.log_ent_coef
    # A module's state may contain more than tensors
    broken = [name for name, t in tensors.items() if isinstance(t, th.Tensor) and not bool(th.isfinite(t).all())]
    if broken:
        what = f"The parameters {', '.join(broken[:3])}{', …' if len(broken) > 3 else ''} are not finite"
        aftermath = "Load a saved model or checkpoint."
        raise _error(model, "parameter", f"{what} at step {model.num_timesteps}", aftermath) from cause
