"""Stops training at the first NaN or infinite number, before it is stored or learned from."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, NoReturn

import numpy as np
import torch as th
from stable_baselines3.common.buffers import NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.type_aliases import PyTorchObs
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer

from sb3_softvalue.objective import Batch, Metrics

# A SACV, which imports this file: the class cannot be imported here
Model = Any

_SMALLER = "scale rewards down (VecNormalize, or reward_scale below 1), lower learning_rate, or set max_grad_norm"
# What usually helps, by quantity
_REMEDIES = {
    "observation": "look in the environment for a diverged simulation or a division by zero, and end the episode before it",
    "reward": "look in the reward function for a division by zero, the logarithm of zero or an overflow",
    "action": "check action_noise and use_sde, or lower learning_rate",
    "loss": _SMALLER,
    "gradient": _SMALLER,
    "parameter": f"look for code that writes to the networks; otherwise {_SMALLER}",
}
# Larger absolute observations are named as the cause of an overflow: the networks square them on the way to the loss
_LARGE_OBSERVATION = 1e6


class NonFiniteError(ValueError):
    """
    A quantity of the training is NaN or infinite.

    A ``ValueError`` like PyTorch's for invalid parameters of a distribution, which would otherwise follow: code that handles
    that error also handles this one (RL Zoo prunes the trial).

    :param quantity: "observation", "reward", "action", "loss", "gradient" or "parameter"
    :param what: which number is not finite, where, and its value; a sentence without the period
    :param state: state of the training, shown in parentheses
    :param aftermath: what was done about it, a sentence
    :param remedy: what usually helps; empty for the remedy of the quantity
    """

    def __init__(self, quantity: str, what: str, state: str = "", aftermath: str = "", remedy: str = ""):
        super().__init__(quantity, what, state, aftermath, remedy)
        self.quantity = quantity

    def __str__(self) -> str:
        quantity, what, state, aftermath, remedy = self.args
        return f"{what}{f' ({state})' if state else ''}. {aftermath} What usually helps: {remedy or _REMEDIES[quantity]}."


class FiniteCheck:
    """
    Checks observations, rewards, actions and updates. ``SACV(..., check_finite=False)`` disables it.

    Numbers must be finite in float32, the type of the replay buffer. An observation may contain NaN if the networks handle
    it, for instance in a user's features extractor.
    """

    def __init__(self) -> None:
        # Statistics of VecNormalize before the current step
        self._statistics: list[dict[str, Any]] = []

    def begin_step(self, model: Model) -> None:
        """
        Remember the statistics of VecNormalize. References are enough, since each step replaces the arrays.

        :param model: model before a step of its environments
        """
        self._statistics = [vars(moments).copy() for moments in _running_statistics(model)]

    def check_first_observation(self, model: Model) -> None:
        """
        :param model: model after the reset of its environments
        :raises NonFiniteError: if an observation is not finite
        """
        seen = model._last_obs
        has_original = model._vec_normalize_env is not None and model._last_original_obs is not None
        original = model._last_original_obs if has_original else seen
        aftermath = "No episode was started, and the model is unchanged."
        self._check_observation(model, original, seen, "at the start of the episode, in float32", aftermath=aftermath)

    def check_action(self, model: Model, actions: np.ndarray) -> None:
        """
        :param model: model whose policy and action noise returned the actions
        :param actions: scaled actions, one row per environment
        :raises NonFiniteError: if an action is not finite
        """
        for index, value in _not_finite(actions):
            what = f"The action for environment {index} is {value} at step {model.num_timesteps}"
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
        env, original = model._vec_normalize_env, new_obs
        if env is not None:
            original, reward = env.get_original_obs(), env.get_original_reward()
        for index, value in _not_finite(reward):
            what = f"The reward of environment {index} is {value} at step {model.num_timesteps}"
            self._raise_for_step(model, "reward", f"{what}, as returned by the environment, in float32")
        self._check_observation(model, original, new_obs, "as returned by the environment, in float32")
        # In one piece: of a thousand environments, all may end at the same step
        ended = [index for index in np.flatnonzero(dones).tolist() if infos[index].get("terminal_observation") is not None]
        if ended:
            last = [infos[index]["terminal_observation"] for index in ended]
            rows = {key: [one[key] for one in last] for key in last[0]} if isinstance(last[0], Mapping) else last
            self._check_observation(model, rows, rows, "at the end of the episode, in float32", ended)

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
            self._raise_for_update(model, batch, metrics, "The update was skipped, and the model is unchanged.")
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
            self._raise_for_update(model, batch, report[n_made], aftermath)

    def _raise_for_update(self, model: Model, batch: Batch, metrics: th.Tensor, aftermath: str) -> NoReturn:
        """:raises NonFiniteError: always, naming what is not finite"""
        self._raise_for_parameters(model)
        values = Metrics(*metrics.tolist())
        bad = [name for name, value in zip(Metrics._fields, values, strict=True) if not np.isfinite(value)]
        reasons, remedy = "; ".join(_bad_entries(batch)), ""
        if not reasons:
            reasons = "the batch itself was finite"
            largest = max(_largest(batch.observations), _largest(batch.next_observations))
            if largest > max(_LARGE_OBSERVATION, float(batch.rewards.abs().max())):
                reasons += f", but its observations reach {largest:.3g}"
                remedy = "scale the observations to about 1 (VecNormalize)"
        what = f"{', '.join(bad) if bad else 'A gradient'} of update {model._n_updates + 1} is not finite: {reasons}"
        raise NonFiniteError("loss" if bad else "gradient", what, _training_state(model), aftermath, remedy)

    @th.no_grad()
    def raise_for_policy(self, model: Model, error: ValueError) -> None:
        """
        :param model: model whose policy could not sample an action
        :param error: the error of PyTorch's distribution about a mean or standard deviation that is not finite
        :raises NonFiniteError: if the policy's parameters or outputs are not finite
        """
        self._raise_for_parameters(model, error)
        is_finite, largest = True, 0.0
        # If the policy cannot be evaluated, the error has another cause
        with suppress(Exception):
            mean, log_std, _ = model.actor.get_action_dist_params(model.policy.obs_to_tensor(model._last_obs)[0])
            largest = max(float(parameter.abs().max()) for parameter in model.actor.parameters())
            is_finite = bool(th.isfinite(mean).all() & th.isfinite(log_std.exp()).all())
        if not is_finite:
            what = f"The policy's output is not finite at step {model.num_timesteps}; its parameters reach {largest:.3g}"
            raise NonFiniteError("action", what, _training_state(model), "No action was taken.") from error

    def _check_observation(
        self,
        model: Model,
        original: Any,
        seen: Any,
        when: str,
        env_indices: Sequence[int] | None = None,
        aftermath: str | None = None,
    ) -> None:
        """
        :param original: observations as returned by the environment, one row per environment, or a dict of such
        :param seen: the same observations as the networks see them
        :param when: when the observation was returned, for the message
        :param env_indices: environment of each row; None if there is one row per environment
        :param aftermath: what was done about it
        :raises NonFiniteError: if an observation is not finite and the networks do not handle that
        """
        parts = original.items() if isinstance(original, Mapping) else ((None, original),)
        for key, part in parts:
            for row, value in _not_finite(part):
                # VecNormalize's running statistics would stay NaN, even if the networks handle it
                if not _is_averaged(model, key) and _is_handled(model, seen):
                    break
                name = "observation" if key is None else f"observation {key!r}"
                index = row if env_indices is None else env_indices[row]
                what = f"The {name} of environment {index} is {value} at step {model.num_timesteps}, {when}"
                self._raise_for_step(model, "observation", what, aftermath)

    def _raise_for_step(self, model: Model, quantity: str, what: str, aftermath: str | None = None) -> NoReturn:
        """Undo a step that cannot be stored, and raise; the next ``learn()`` starts with a new episode."""
        env = model._vec_normalize_env
        if env is not None:
            for moments, before in zip(_running_statistics(model), self._statistics, strict=False):
                vars(moments).update(before)
            # Running returns of episodes that will not continue
            env.returns = np.zeros_like(env.returns)
        model._last_obs = None
        if isinstance(model.replay_buffer, ReplayBuffer):
            truncate_open_episodes(model.replay_buffer)
        aftermath = aftermath or "It was not stored, and the model is unchanged."
        raise NonFiniteError(quantity, what, _training_state(model), aftermath)

    def _raise_for_parameters(self, model: Model, cause: Exception | None = None) -> None:
        """:raises NonFiniteError: if a parameter is not finite"""
        tensors = dict(model.policy.state_dict())
        if model.log_ent_coef is not None:
            tensors["log_ent_coef"] = model.log_ent_coef
        # A module's state may contain more than tensors
        broken = [name for name, t in tensors.items() if isinstance(t, th.Tensor) and not bool(th.isfinite(t).all())]
        if broken:
            names = ", ".join(broken[:3]) + (f" and {len(broken) - 3} more" if len(broken) > 3 else "")
            what = f"The parameters {names} are not finite at step {model.num_timesteps}"
            raise NonFiniteError("parameter", what, _training_state(model), "Load a saved model or checkpoint.") from cause


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


def _not_finite(rows: Any) -> Iterator[tuple[int, Any]]:
    """
    :param rows: one row per environment or transition, of any type that SB3 stores
    :return: index of each row that is not finite in float32, with its first such number
    """
    array = np.asarray(rows)
    if array.dtype.kind in "biu":
        return
    with np.errstate(over="ignore"):
        array = array.astype(np.float32, copy=False)
    if not np.isfinite(array).all():
        for index, row in enumerate(array):
            if not np.isfinite(row).all():
                yield index, np.asarray(row)[~np.isfinite(row)].flat[0]


def _bad_entries(batch: Batch) -> Iterator[str]:
    """:return: for each field of the batch that is not finite, the number of affected transitions in words"""
    for field, value in zip(Batch._fields, batch, strict=True):
        for key, tensor in value.items() if isinstance(value, dict) else ((None, value),):
            n_bad = sum(1 for _ in _not_finite(tensor.detach().cpu().numpy()))
            if n_bad:
                name = field if key is None else f"{field} {key!r}"
                yield f"{name} of {n_bad} of {len(tensor)} transitions were not finite"


def _largest(observations: PyTorchObs) -> float:
    """:return: the largest absolute value in the observations"""
    tensors = observations.values() if isinstance(observations, dict) else (observations,)
    return max(float(tensor.abs().max()) for tensor in tensors)


def _running_statistics(model: Model) -> Iterator[RunningMeanStd]:
    """:return: the running statistics of VecNormalize"""
    env = model._vec_normalize_env
    if env is not None and env.training:
        if env.norm_obs:
            yield from env.obs_rms.values() if isinstance(env.obs_rms, dict) else (env.obs_rms,)
        yield env.ret_rms


def _is_averaged(model: Model, key: str | None) -> bool:
    """:return: whether VecNormalize's running statistics include this part of the observations"""
    env = model._vec_normalize_env
    return env is not None and env.training and env.norm_obs and (key is None or key in env.obs_rms)


@th.no_grad()
def _is_handled(model: Model, observation: Any) -> bool:
    """
    :param observation: one row per environment, or a dict of such, as the networks see it
    :return: whether all network outputs are finite although the observation is not
    """
    is_dict = isinstance(observation, Mapping)
    rows = {key: np.asarray(part) for key, part in observation.items()} if is_dict else np.asarray(observation)
    model.policy.set_training_mode(False)
    try:
        obs, _ = model.policy.obs_to_tensor(rows)
        mean, log_std, _ = model.actor.get_action_dist_params(obs)
        outputs = (mean, log_std, model.value(obs), *model.critic(obs, th.tanh(mean)))
    except Exception:  # a network refuses the observation
        return False
    return all(bool(th.isfinite(output).all()) for output in outputs)


def _training_state(model: Model) -> str:
    """:return: update, temperature and largest values, for a message"""
    parts = [f"update {model._n_updates}"]
    # An error here must not hide the one to be reported
    with suppress(Exception):
        parts.append(f"temperature α {float(model.temperature().ent_coef):.3g}")
        parts.extend(_largest_values(model))
    return ", ".join(parts)


@th.no_grad()
def _largest_values(model: Model) -> Iterator[str]:
    """:return: the largest |Q| and |V| over transitions from the buffer, for a message"""
    buffer = model.replay_buffer
    # A just loaded model has an empty buffer, and HER cannot sample without a complete episode
    if buffer is None or not (model._n_updates and buffer.size() and getattr(buffer, "ep_length", np.ones(1)).any()):
        return
    state = np.random.get_state()
    try:
        sample = buffer.sample(256, env=model._vec_normalize_env)
    finally:
        np.random.set_state(state)
    model.policy.set_training_mode(False)
    q_values, values = th.cat(model.critic(sample.observations, sample.actions), dim=1), model.value(sample.observations)
    for name, tensor in (("Q", q_values), ("V", values)):
        finite = tensor[th.isfinite(tensor)].abs()
        yield f"largest |{name}| {float(finite.max()):.3g}" if len(finite) else f"no finite {name}"
