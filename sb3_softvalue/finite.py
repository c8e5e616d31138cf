"""Stops a training at the first number that is not finite, before it is stored or learned from."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, NoReturn

import numpy as np
import torch as th
from stable_baselines3.common.buffers import NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer

from sb3_softvalue.objective import Batch, Metrics

# A SACV, which knows this file and not the other way round
Model = Any

_SMALLER = "make rewards smaller (VecNormalize, or reward_scale below 1), lower learning_rate, or set max_grad_norm"
# What usually helps, by the quantity
_REMEDIES = {
    "observation": "look in the environment for a diverged simulation or a division by zero, and end the episode before it",
    "reward": "look in the reward function for a division by zero, the logarithm of zero or an overflow",
    "action": "check action_noise and use_sde, or lower learning_rate",
    "loss": _SMALLER,
    "gradient": _SMALLER,
    "parameter": f"look for code that writes to the networks; else {_SMALLER}",
}


class NonFiniteError(ValueError):
    """
    A quantity of the training is NaN or infinite. A ``ValueError``, as PyTorch's about the parameters of a distribution that
    it comes before, so that what handles that one (RL Zoo prunes the trial) handles this one.

    :param quantity: "observation", "reward", "action", "loss", "gradient" or "parameter"
    :param what: which one, where and what it was, the beginning of a sentence
    :param state: of the training, the part of a sentence in brackets
    :param aftermath: what was done about it, a sentence
    """

    def __init__(self, quantity: str, what: str, state: str = "", aftermath: str = ""):
        super().__init__(quantity, what, state, aftermath)
        self.quantity = quantity

    def __str__(self) -> str:
        quantity, what, state, aftermath = self.args
        return f"{what}{f' ({state})' if state else ''}. {aftermath} What usually helps: {_REMEDIES[quantity]}."


class FiniteCheck:
    """
    Looks at what the environment and the policy give, and at each update. ``SACV(..., check_finite=False)`` does without it.

    What the replay buffer stores is float32: that is what has to be finite. An observation may hold NaN where the networks,
    say a features extractor of the user's, make something finite of it.
    """

    def __init__(self) -> None:
        # Of VecNormalize, before the step that is being made
        self._statistics: list[dict[str, Any]] = []

    def begin_step(self, model: Model) -> None:
        """
        Remember the statistics of VecNormalize, whose arrays are replaced and not changed at each step.

        :param model: before a step of its environments
        """
        self._statistics = [vars(moments).copy() for moments in _moments(model)]

    def check_first_observation(self, model: Model) -> None:
        """
        :param model: after the reset of its environments
        :raises NonFiniteError: if an observation is not finite
        """
        seen = model._last_obs
        has_original = model._vec_normalize_env is not None and model._last_original_obs is not None
        original = model._last_original_obs if has_original else seen
        aftermath = "No episode was begun, and the model is as it was before."
        self._check_observation(model, original, seen, "as the episode begins, in float32", aftermath=aftermath)

    def check_action(self, model: Model, actions: np.ndarray) -> None:
        """
        :param model: whose policy and action noise gave the actions
        :param actions: scaled, one row for each environment
        :raises NonFiniteError: if one is not finite
        """
        for index, value in _not_finite(actions):
            what = f"The action of environment {index} is {value} at step {model.num_timesteps}"
            self._raise_for_step(model, "action", f"{what}, as the policy and action_noise gave it")

    def check_transition(self, model: Model, new_obs: Any, reward: Any, dones: np.ndarray, infos: Sequence[Any]) -> None:
        """
        :param model: whose replay buffer will store the transition
        :param new_obs: one row for each environment, or a dict of such
        :param reward: one for each environment
        :param dones: of each environment whether its episode has ended
        :param infos: of each environment
        :raises NonFiniteError: if what would be stored is not finite
        """
        env, original = model._vec_normalize_env, new_obs
        if env is not None:
            original, reward = env.get_original_obs(), env.get_original_reward()
        for index, value in _not_finite(reward):
            what = f"The reward of environment {index} is {value} at step {model.num_timesteps}"
            self._raise_for_step(model, "reward", f"{what}, as the environment gave it, in float32")
        self._check_observation(model, original, new_obs, "as the environment gave it, in float32")
        # In one piece: of a thousand environments all may end at the same step
        ended = [index for index in np.flatnonzero(dones).tolist() if infos[index].get("terminal_observation") is not None]
        if ended:
            last = [infos[index]["terminal_observation"] for index in ended]
            rows = {key: [one[key] for one in last] for key in last[0]} if isinstance(last[0], Mapping) else last
            self._check_observation(model, rows, rows, "as the episode ended, in float32", ended)

    def check_update(self, model: Model, batch: Batch, metrics: th.Tensor, found_inf: th.Tensor | None) -> th.Tensor | None:
        """
        Decide whether an update may be made. On a CPU that is known at once; elsewhere the optimizers are told on the device,
        and ``check_report`` finds out when the losses are read.

        :param model: before the step
        :param batch: that the update was computed from
        :param metrics: of the update in the order of ``Metrics``
        :param found_inf: what was decided about the update before: once an update is skipped, all later ones are
        :return: None on a CPU, else shape (): 1 where the update must not be made
        :raises NonFiniteError: on a CPU, if it must not be made
        """
        if metrics.device.type != "cpu":
            # The type that the optimizers' kernel takes, whatever the networks' type
            now = metrics[-1].float()
            return now if found_inf is None else th.maximum(found_inf, now)
        if metrics[-1].item():
            self._raise_for_update(model, batch, metrics, "The update was not made, the model is as before it.")
        return None

    def check_report(self, model: Model, batch: Batch, report: th.Tensor) -> None:
        """
        :param model: after the updates of a ``train()``
        :param batch: of the last one
        :param report: a row of metrics for each update, on the CPU
        :raises NonFiniteError: if one of them was skipped
        """
        if report[:, -1].any():
            n_made = int(report[:, -1].nonzero()[0])
            model._n_updates -= len(report) - n_made
            aftermath = "The update was not made; the target value has moved on towards V."
            self._raise_for_update(model, batch, report[n_made], aftermath)

    def _raise_for_update(self, model: Model, batch: Batch, metrics: th.Tensor, aftermath: str) -> NoReturn:
        """:raises NonFiniteError: that names what is not finite"""
        self._raise_for_parameters(model)
        values = Metrics(*metrics.tolist())
        bad = [name for name, value in zip(Metrics._fields, values, strict=True) if not np.isfinite(value)]
        reasons = "; ".join(_bad_entries(batch)) or "the batch itself was finite"
        what = f"{', '.join(bad) if bad else 'A gradient'} of update {model._n_updates + 1} is not finite: {reasons}"
        raise NonFiniteError("loss" if bad else "gradient", what, _training_state(model), aftermath)

    @th.no_grad()
    def raise_for_policy(self, model: Model, error: ValueError) -> None:
        """
        :param model: whose policy could not draw an action
        :param error: what PyTorch's distributions say of a mean or a deviation that is not finite
        :raises NonFiniteError: if that is the reason
        """
        self._raise_for_parameters(model, error)
        is_finite, largest = True, 0.0
        # Where the policy cannot be asked, the error is from elsewhere
        with suppress(Exception):
            mean, log_std, _ = model.actor.get_action_dist_params(model.policy.obs_to_tensor(model._last_obs)[0])
            largest = max(float(parameter.abs().max()) for parameter in model.actor.parameters())
            is_finite = bool(th.isfinite(mean).all() & th.isfinite(log_std.exp()).all())
        if not is_finite:
            what = f"The policy's output is not finite at step {model.num_timesteps}, its parameters reach {largest:.3g}"
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
        :param original: one row for each environment, or a dict of such, as the environment gave it
        :param seen: the same as the networks see it
        :param when: it was seen
        :param env_indices: environment of each row, None for all of them in order
        :param aftermath: what was done about it
        :raises NonFiniteError: if it is not finite, and nor is what the networks make of it
        """
        parts = original.items() if isinstance(original, Mapping) else ((None, original),)
        for key, part in parts:
            for row, value in _not_finite(part):
                # In VecNormalize's statistics it would stay
                if not _is_averaged(model, key) and _is_handled(model, seen):
                    break
                name = "observation" if key is None else f"observation {key!r}"
                index = row if env_indices is None else env_indices[row]
                what = f"The {name} of environment {index} is {value} at step {model.num_timesteps}, {when}"
                self._raise_for_step(model, "observation", what, aftermath)

    def _raise_for_step(self, model: Model, quantity: str, what: str, aftermath: str | None = None) -> NoReturn:
        """Leave nothing of a step that cannot be stored: the next ``learn()`` begins with a new episode."""
        env = model._vec_normalize_env
        if env is not None:
            for moments, before in zip(_moments(model), self._statistics, strict=False):
                vars(moments).update(before)
            # Returns so far, of episodes that will not continue
            env.returns = np.zeros_like(env.returns)
        model._last_obs = None
        if isinstance(model.replay_buffer, ReplayBuffer):
            truncate_open_episodes(model.replay_buffer)
        aftermath = aftermath or "It was not stored, and the model is as it was before."
        raise NonFiniteError(quantity, what, _training_state(model), aftermath)

    def _raise_for_parameters(self, model: Model, cause: Exception | None = None) -> None:
        """:raises NonFiniteError: if a parameter is not finite"""
        tensors = dict(model.policy.state_dict())
        if model.log_ent_coef is not None:
            tensors["log_ent_coef"] = model.log_ent_coef
        # A module may keep more than tensors in its state
        broken = [name for name, t in tensors.items() if isinstance(t, th.Tensor) and not bool(th.isfinite(t).all())]
        if broken:
            names = ", ".join(broken[:3]) + (f" and {len(broken) - 3} more" if len(broken) > 3 else "")
            what = f"The parameters {names} are not finite at step {model.num_timesteps}"
            raise NonFiniteError("parameter", what, _training_state(model), "Load a saved model or checkpoint.") from cause


def truncate_open_episodes(buffer: ReplayBuffer) -> None:
    """
    Let the open episodes end at the last row of the buffer, as by a time limit: what follows is another episode.

    :param buffer: a replay buffer of SB3's, after a stop in the middle of episodes; nothing is done where it is empty
    """
    if not buffer.pos and not buffer.full:
        return
    last = (buffer.pos - 1) % buffer.buffer_size
    if isinstance(buffer, HerReplayBuffer):
        with warnings.catch_warnings():
            # That it truncates is what it is called for
            warnings.simplefilter("ignore")
            buffer.truncate_last_trajectory()
    elif isinstance(buffer, NStepReplayBuffer):
        buffer.timeouts[last] = np.maximum(buffer.timeouts[last], 1.0 - buffer.dones[last])
    elif buffer.optimize_memory_usage:
        # As SB3 does where learn() begins anew (its issue 46): the next row's observation will be of another episode
        buffer.dones[last] = 1.0


def _not_finite(rows: Any) -> Iterator[tuple[int, Any]]:
    """
    :param rows: one for each environment or transition, of any type that SB3 stores
    :return: index of each row that is not finite in float32, and the first such number in it
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
    """:return: for each part of the batch that is not finite how many of its transitions are not"""
    for field, value in zip(Batch._fields, batch, strict=True):
        for key, tensor in value.items() if isinstance(value, dict) else ((None, value),):
            n_bad = sum(1 for _ in _not_finite(tensor.detach().cpu().numpy()))
            if n_bad:
                name = field if key is None else f"{field} {key!r}"
                yield f"{name} of {n_bad} of its {len(tensor)} transitions were not"


def _moments(model: Model) -> Iterator[RunningMeanStd]:
    """:return: the running statistics of VecNormalize"""
    env = model._vec_normalize_env
    if env is not None and env.training:
        if env.norm_obs:
            yield from env.obs_rms.values() if isinstance(env.obs_rms, dict) else (env.obs_rms,)
        yield env.ret_rms


def _is_averaged(model: Model, key: str | None) -> bool:
    """:return: whether VecNormalize has this part of the observations, or the whole, in its running statistics"""
    env = model._vec_normalize_env
    return env is not None and env.training and env.norm_obs and (key is None or key in env.obs_rms)


@th.no_grad()
def _is_handled(model: Model, observation: Any) -> bool:
    """
    :param observation: one row for each environment, or a dict of such, as the networks see it
    :return: whether they make something finite of an observation that is not finite
    """
    is_dict = isinstance(observation, Mapping)
    rows = {key: np.asarray(part) for key, part in observation.items()} if is_dict else np.asarray(observation)
    model.policy.set_training_mode(False)
    try:
        obs, _ = model.policy.obs_to_tensor(rows)
        mean, log_std, _ = model.actor.get_action_dist_params(obs)
        outputs = (mean, log_std, model.value(obs), *model.critic(obs, th.tanh(mean)))
    except Exception:  # the networks' own about the observation
        return False
    return all(bool(th.isfinite(output).all()) for output in outputs)


def _training_state(model: Model) -> str:
    """:return: update, temperature and the largest values, as part of a sentence"""
    parts = [f"update {model._n_updates}"]
    # What cannot be told must not hide the error that it is told about
    with suppress(Exception):
        parts.append(f"temperature α {float(model.temperature().ent_coef):.3g}")
        parts.extend(_largest_values(model))
    return ", ".join(parts)


@th.no_grad()
def _largest_values(model: Model) -> Iterator[str]:
    """:return: what the networks say of transitions from the buffer"""
    buffer = model.replay_buffer
    # Nothing can be sampled from the buffer of a model that was just loaded, or HER's without a whole episode
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
        yield f"largest |{name}| {float(finite.max()):.3g}" if len(finite) else f"no {name} finite"
