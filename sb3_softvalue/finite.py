"""Stops a training at the first number that is not finite, before it is stored or learned from."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
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
        return f"{what} ({state}). {aftermath} What usually helps: {_REMEDIES[quantity]}."


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
        if model._vec_normalize_env is not None:
            self._statistics = [vars(moments).copy() for moments in _moments(model)]

    def check_first_observation(self, model: Model) -> None:
        """
        :param model: after the reset of its environments
        :raises NonFiniteError: if an observation is not finite
        """
        original = model._vec_normalize_env is not None and model._last_original_obs is not None
        self._check_observation(model, model._last_original_obs if original else model._last_obs, "as the episode begins")

    def check_action(self, model: Model, actions: np.ndarray) -> None:
        """
        :param model: whose policy and action noise gave the actions
        :param actions: scaled, one row for each environment
        :raises NonFiniteError: if one is not finite
        """
        for index, value in _not_finite(actions):
            what = f"The action of environment {index} is {value} at step {model.num_timesteps}"
            self._stop_step(model, "action", f"{what}, as the policy and action_noise gave it")

    def check_transition(self, model: Model, new_obs: Any, reward: Any, dones: np.ndarray, infos: Sequence[Any]) -> None:
        """
        :param model: whose replay buffer will store the transition
        :param new_obs: one row for each environment, or a dict of such
        :param reward: one for each environment
        :param dones: of each environment whether its episode has ended
        :param infos: of each environment
        :raises NonFiniteError: if what would be stored is not finite
        """
        env = model._vec_normalize_env
        if env is not None:
            new_obs, reward = env.get_original_obs(), env.get_original_reward()
        for index, value in _not_finite(reward):
            what = f"The reward of environment {index} is {value} at step {model.num_timesteps}"
            self._stop_step(model, "reward", f"{what}, as the environment gave it (float32)")
        self._check_observation(model, new_obs, "as the environment gave it (float32)")
        for index, done in enumerate(dones):
            if not done:
                continue
            last = infos[index].get("terminal_observation")
            if last is not None:
                rows = {key: [row] for key, row in last.items()} if isinstance(last, Mapping) else [last]
                self._check_observation(model, rows, "as the episode ended (float32)", index)

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
            self._stop_update(model, batch, metrics, "The update was not made, the model is as before it.")
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
            self._stop_update(model, batch, report[n_made], aftermath)

    def _stop_update(self, model: Model, batch: Batch, metrics: th.Tensor, aftermath: str) -> NoReturn:
        """:raises NonFiniteError: that names what is not finite"""
        self._stop_for_parameters(model)
        values = Metrics(*metrics.tolist())
        bad = [name for name, value in zip(Metrics._fields, values, strict=True) if not np.isfinite(value)]
        reasons = "; ".join(_bad_entries(batch)) or "the batch itself was finite"
        what = f"{', '.join(bad) if bad else 'A gradient'} of update {model._n_updates + 1} is not finite: {reasons}"
        raise NonFiniteError("loss" if bad else "gradient", what, _describe(model), aftermath)

    @th.no_grad()
    def explain_policy(self, model: Model, error: ValueError) -> None:
        """
        :param model: whose policy could not draw an action
        :param error: what PyTorch's distributions say of a mean or a deviation that is not finite
        :raises NonFiniteError: if that is the reason
        """
        self._stop_for_parameters(model, error)
        if model._last_obs is None:  # the error is from elsewhere
            return
        mean, log_std, _ = model.actor.get_action_dist_params(model.policy.obs_to_tensor(model._last_obs)[0])
        if not bool(th.isfinite(mean).all() & th.isfinite(log_std.exp()).all()):
            largest = max(float(parameter.abs().max()) for parameter in model.actor.parameters())
            what = f"The policy's output is not finite at step {model.num_timesteps}, its parameters reach {largest:.3g}"
            raise NonFiniteError("action", what, _describe(model), "No action was taken.") from error

    def _check_observation(self, model: Model, observation: Any, when: str, env_index: int | None = None) -> None:
        """
        :param observation: one row for each environment, or a dict of such
        :param when: it was seen
        :param env_index: the only row is this environment's
        :raises NonFiniteError: if it is not finite, and nor is what the networks make of it
        """
        parts = observation.items() if isinstance(observation, Mapping) else ((None, observation),)
        for key, part in parts:
            for row, value in _not_finite(part):
                if self._is_handled(model, observation):
                    return
                name = "observation" if key is None else f"observation {key!r}"
                index = row if env_index is None else env_index
                what = f"The {name} of environment {index} is {value} at step {model.num_timesteps}, {when}"
                self._stop_step(model, "observation", what)

    @th.no_grad()
    def _is_handled(self, model: Model, observation: Any) -> bool:
        """:return: whether the networks make something finite of an observation that is not finite"""
        if self._statistics or model._vec_normalize_env is not None:
            return False  # it would stay in the statistics
        rows = (
            {key: np.asarray(part) for key, part in observation.items()} if isinstance(observation, Mapping) else observation
        )
        obs, _ = model.policy.obs_to_tensor(rows if isinstance(rows, dict) else np.asarray(rows))
        model.policy.set_training_mode(False)
        mean, log_std, _ = model.actor.get_action_dist_params(obs)
        outputs = (mean, log_std, model.value(obs), *model.critic(obs, th.tanh(mean)))
        return all(bool(th.isfinite(output).all()) for output in outputs)

    def _stop_step(self, model: Model, quantity: str, what: str) -> NoReturn:
        """Leave nothing of a step that cannot be stored: the next ``learn()`` begins with a new episode."""
        env = model._vec_normalize_env
        if env is not None:
            for moments, before in zip(_moments(model), self._statistics, strict=False):
                vars(moments).update(before)
            # Returns so far, of episodes that will not continue
            env.returns = np.zeros_like(env.returns)
        model._last_obs = None
        if model.replay_buffer is not None:
            truncate_open_episodes(model.replay_buffer)
        raise NonFiniteError(quantity, what, _describe(model), "It was not stored, and the model is as it was before.")

    def _stop_for_parameters(self, model: Model, cause: Exception | None = None) -> None:
        """:raises NonFiniteError: if a parameter is not finite"""
        tensors = dict(model.policy.state_dict())
        if model.log_ent_coef is not None:
            tensors["log_ent_coef"] = model.log_ent_coef
        broken = [name for name, tensor in tensors.items() if not bool(th.isfinite(tensor).all())]
        if broken:
            names = ", ".join(broken[:3]) + (f" and {len(broken) - 3} more" if len(broken) > 3 else "")
            what = f"The parameters {names} are not finite at step {model.num_timesteps}"
            raise NonFiniteError("parameter", what, _describe(model), "Load a saved model or checkpoint.") from cause


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


def _describe(model: Model) -> str:
    """:return: update, temperature and the largest values, as part of a sentence"""
    parts = [f"update {model._n_updates}", f"temperature α {float(model.temperature().ent_coef):.3g}"]
    buffer = model.replay_buffer
    # Nothing can be sampled from the buffer of a model that was just loaded, or HER's without a whole episode
    if buffer is not None and model._n_updates and buffer.size() and getattr(buffer, "ep_length", np.ones(1)).any():
        state = np.random.get_state()
        sample = buffer.sample(256, env=model._vec_normalize_env)
        np.random.set_state(state)
        model.policy.set_training_mode(False)
        with th.no_grad():
            q_values = th.cat(model.critic(sample.observations, sample.actions), dim=1)
            values = model.value(sample.observations)
        for name, tensor in (("Q", q_values), ("V", values)):
            finite = tensor[th.isfinite(tensor)].abs()
            parts.append(f"largest |{name}| {float(finite.max()):.3g}" if len(finite) else f"no {name} finite")
    return ", ".join(parts)
