"""Where SB3's loop is watched: every observation, reward and action before it is stored, every gradient before it is used."""

from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.sac.sac import SAC
from torch import nn

from sb3_softvalue.checks import initial_ent_coef
from sb3_softvalue.guard.backup import Backup
from sb3_softvalue.guard.episodes import cut_open_episodes
from sb3_softvalue.guard.errors import NonFiniteError, example, not_finite
from sb3_softvalue.guard.hints import Hints
from sb3_softvalue.update import Batch, Metrics

Observations = np.ndarray | dict[str, np.ndarray]

# The networks that SAC does not have
_OURS = ("value", "value_target")


class Guarded(SAC):
    """SAC with a value network that stops at the first number which is not finite."""

    _backup: Backup
    _hints: Hints | None = None
    # Statistics of VecNormalize before the step that is being made
    _statistics: Sequence[dict[str, Any]] = ()

    def _setup_learn(self, *args: Any, **kwargs: Any) -> Any:
        self._remember_statistics()
        result = super()._setup_learn(*args, **kwargs)
        original = self._vec_normalize_env is not None and self._last_original_obs is not None
        observation = self._last_original_obs if original else self._last_obs
        self._check_step({"observation": observation}, "as the episode begins")
        return result

    def collect_rollouts(self, *args: Any, **kwargs: Any) -> Any:
        """Collect, see ``OffPolicyAlgorithm.collect_rollouts``, and say why no action could be drawn."""
        try:
            return super().collect_rollouts(*args, **kwargs)
        except NonFiniteError:
            raise
        except ValueError as error:
            # What PyTorch's distributions say of a mean or a deviation that is not finite
            broken = self._backup.broken()
            if broken:
                self._stop_for_parameters(broken, error)
            self._check_policy(error)
            raise

    def _sample_action(
        self, learning_starts: int, action_noise: ActionNoise | None = None, n_envs: int = 1
    ) -> tuple[np.ndarray, np.ndarray]:
        self._remember_statistics()
        actions, buffer_actions = super()._sample_action(learning_starts, action_noise, n_envs)
        self._check_step({"action": buffer_actions}, "as the policy and action_noise gave it")
        return actions, buffer_actions

    def _store_transition(
        self,
        replay_buffer: ReplayBuffer,
        buffer_action: np.ndarray,
        new_obs: Observations,
        reward: np.ndarray,
        dones: np.ndarray,
        infos: list[dict[str, Any]],
    ) -> None:
        env = self._vec_normalize_env
        observation: Any = new_obs if env is None else env.get_original_obs()
        rewards = reward if env is None else env.get_original_reward()
        self._check_step({"reward": rewards, "observation": observation}, "as the environment gave it (float32)")
        for index in np.flatnonzero(dones):
            last = infos[index].get("terminal_observation")
            if last is not None:
                self._check_step({"observation": last}, "as the episode ended", env_index=int(index))
        super()._store_transition(replay_buffer, buffer_action, new_obs, reward, dones, infos)

    @th.no_grad()
    def _check_policy(self, cause: Exception) -> None:
        """
        :param cause: that no action could be drawn
        :raises NonFiniteError: if the policy's distribution is not finite though all of its parameters are
        """
        assert self._last_obs is not None
        observations, _ = self.policy.obs_to_tensor(self._last_obs)
        mean, log_std, _ = self.actor.get_action_dist_params(observations)
        if not bool(th.isfinite(mean).all() & th.isfinite(log_std.exp()).all()):
            largest = max(float(parameter.abs().max()) for parameter in self.actor.parameters())
            what = (
                f"The policy's output is not finite at step {self.num_timesteps}, its parameters are as large as {largest:.3g}"
            )
            state, update = self._state_of_training(), self._put_back()
            aftermath = "" if update is None else f"The networks and α were put back to those after update {update}."
            raise NonFiniteError("action", what, state, aftermath) from cause

    def _check_step(self, arrays: dict[str, Any], when: str, env_index: int | None = None) -> None:
        """
        :param arrays: by quantity, one row for each environment, or a dict of such
        :param when: it was seen
        :param env_index: the arrays are of this environment alone
        :raises NonFiniteError: if one of them is not finite
        """
        for quantity, value in arrays.items():
            for key, array in value.items() if isinstance(value, dict) else ((None, value),):
                array = np.asarray(array if env_index is None else array[None])
                rows = not_finite(array)
                if len(rows):
                    name = quantity if key is None else f"{quantity} {key!r}"
                    index = int(rows[0]) if env_index is None else env_index
                    what = f"The {name} of environment {index} is {example(array[rows])} at step {self.num_timesteps}, {when}"
                    self._abandon_step()
                    state = self._state_of_training()
                    raise NonFiniteError(quantity, what, state, "It was not stored, and the model is as it was before.")

    def _remember_statistics(self) -> None:
        """Keep the statistics of VecNormalize, whose arrays are replaced and not changed at each step."""
        self._statistics = [vars(moments).copy() for moments in self._moments()]

    def _abandon_step(self) -> None:
        """Leave nothing of a step that cannot be stored: the next ``learn()`` begins with a new episode."""
        for moments, before in zip(self._moments(), self._statistics, strict=False):
            vars(moments).update(before)
        self._last_obs = None
        if self.replay_buffer is not None:
            # The rest of these episodes will not come, and what comes is not to be taken for it
            cut_open_episodes(self.replay_buffer)

    def _moments(self) -> Iterator[RunningMeanStd]:
        """:return: the running statistics of VecNormalize"""
        env = self._vec_normalize_env
        if env is not None and env.training:
            if env.norm_obs:
                yield from env.obs_rms.values() if isinstance(env.obs_rms, dict) else (env.obs_rms,)
            yield env.ret_rms

    def _guard_networks(self) -> None:
        """Watch over the networks that the policy has now."""
        self._backup = Backup(self._learned)
        if self._hints is None:
            self._hints = Hints()
            assert isinstance(self.action_space, spaces.Box)
            self._hints.about_actions(self.action_space)

    def _learned(self) -> Iterator[tuple[str, th.Tensor]]:
        """:return: parameters and buffers with their names, and the temperature where it is learned"""
        for name in ("actor", "critic", *_OURS):
            network: nn.Module = getattr(self, name)
            yield from ((f"{name}.{part}", tensor) for part, tensor in network.state_dict().items())
        if self.log_ent_coef is not None:
            yield "log_ent_coef", self.log_ent_coef

    def _put_back(self) -> int | None:
        """
        Go back to what was good, and forget what the optimizers remember of the gradients since then.

        :return: how many gradient steps had been made then; None where there is nothing to go back to
        """
        update = self._backup.restore()
        if update is not None:
            networks: list[Any] = [self.actor, self.critic, self.policy.get_submodule("value")]
            for optimizer in [*(network.optimizer for network in networks), self.ent_coef_optimizer]:
                if optimizer is not None:
                    optimizer.state.clear()
        return update

    def _check_parameters(self) -> None:
        """
        Look at every parameter from time to time, and keep a copy of those that are good.

        :raises NonFiniteError: if one of them is not finite
        """
        broken = self._backup.renew(self._n_updates)
        if broken:
            self._stop_for_parameters(broken)

    def _check_rewards(self, batch: Batch, reward_scale: float) -> None:
        """
        :param batch: the first one
        :param reward_scale: factor of its rewards
        """
        assert self._hints is not None
        self._hints.about_rewards(float(batch.rewards.abs().mean()) * reward_scale, self.gamma)

    def _check_temperature(self, ent_coef: float, entropy: float) -> None:
        """
        :param ent_coef: learned temperature α
        :param entropy: of the policy, nats
        """
        assert self._hints is not None and isinstance(self.target_entropy, float)
        self._hints.about_temperature(ent_coef, initial_ent_coef(self.ent_coef), entropy, self.target_entropy)

    def _gate(self, closed: th.Tensor | None, batch: Batch, metrics: th.Tensor) -> th.Tensor | None:
        """
        Decide whether an update may be made. On a CPU that is known at once; elsewhere it is told to the optimizers on the
        device, and found out when the losses are read.

        :param closed: what was decided about the update before; after one that was not made, none is
        :param batch: of the update
        :param metrics: of the update, as ``update.objective_gradients`` gives them
        :return: None on a CPU, else shape (1,): 1 where the update must not be made
        :raises NonFiniteError: on a CPU, if it must not be made
        """
        if metrics.device.type != "cpu":
            now = metrics[-1:].float()  # what the optimizers' kernel takes, whatever the networks' type
            return now if closed is None else th.maximum(closed, now)
        if metrics[-1].item() != 0.0:
            self._stop_update(batch, metrics)
        return None

    def _stop_after(self, batch: Batch, reports: th.Tensor) -> NoReturn:
        """
        Say which of several updates, that a device was told of without waiting for it, was not made; none after it was.

        :param batch: of the last one
        :param reports: of each a row, see ``update.objective_gradients``
        :raises NonFiniteError: always
        """
        n_made = int(reports[:, -1].nonzero()[0])
        self._n_updates -= len(reports) - n_made
        self._stop_update(batch, reports[n_made], "The update was not made; the target value has gone on towards V.")

    def _stop_update(
        self,
        batch: Batch,
        metrics: th.Tensor,
        aftermath: str = "The update was not made, the model is as before it.",
    ) -> NoReturn:
        """
        Say why an update was not made.

        :param batch: that it was computed from, or the last one before it was noticed
        :param metrics: of the update, as ``update.objective_gradients`` gives them
        :param aftermath: what was done with the model
        :raises NonFiniteError: always
        """
        broken = self._backup.broken()
        if broken:
            self._stop_for_parameters(broken)
        bad = [name for name, value in zip(Metrics._fields, metrics.tolist(), strict=False) if not np.isfinite(value)]
        what = f"{', '.join(bad) if bad else 'A gradient'} of update {self._n_updates + 1} is not finite: " + (
            "; ".join(_bad_entries(batch)) or "all of its batch was"
        )
        state = self._state_of_training()
        raise NonFiniteError("loss" if bad else "gradient", what, state, aftermath)

    def _stop_for_parameters(self, broken: Sequence[str], cause: Exception | None = None) -> NoReturn:
        """
        Put the networks back and say so.

        :param broken: names of the parameters
        :param cause: by which it was noticed
        :raises NonFiniteError: always
        """
        names = ", ".join(broken[:3]) + (f" and {len(broken) - 3} more" if len(broken) > 3 else "")
        what = f"The parameters {names} are not finite at step {self.num_timesteps}"
        update = self._put_back()
        if update is None:
            aftermath = "There is no earlier state of these networks to go back to: load a saved model."
        else:
            aftermath = f"The networks and α were put back to those after update {update}, {self._n_updates - update} before."
        raise NonFiniteError("parameter", what, self._state_of_training(), aftermath) from cause

    def _state_of_training(self) -> str:
        """:return: update, temperature and the largest values, as part of a sentence"""
        parts = [f"update {self._n_updates}"]
        alpha = self.ent_coef_tensor if self.log_ent_coef is None else self.log_ent_coef.detach().exp()
        parts.append(f"temperature α {float(alpha):.3g}")
        sample = self._some_transitions() if self._n_updates > 0 else None
        if sample is not None:
            self.policy.set_training_mode(False)
            with th.no_grad():
                q_values = th.cat(self.critic(sample.observations, sample.actions), dim=1)
                values = self.policy.get_submodule("value")(sample.observations)
            for name, tensor in (("Q", q_values), ("V", values)):
                finite = tensor[th.isfinite(tensor)].abs()
                parts.append(f"largest |{name}| {float(finite.max()):.3g}" if len(finite) else f"no {name} finite")
        return ", ".join(parts)

    def _some_transitions(self) -> Any:
        """:return: from the replay buffer; None where it has none to give, as that of a model that was just loaded"""
        buffer = self.replay_buffer
        if buffer is None or buffer.size() == 0 or not getattr(buffer, "ep_length", np.ones(1)).any():
            return None
        state = np.random.get_state()
        try:
            return buffer.sample(256, env=self._vec_normalize_env)
        finally:
            np.random.set_state(state)


def _bad_entries(batch: Batch) -> Iterator[str]:
    """:return: for each part of the batch that is not finite how many of its transitions are not"""
    for field, value in zip(Batch._fields, batch, strict=True):
        for key, leaf in value.items() if isinstance(value, dict) else ((None, value),):
            if isinstance(leaf, th.Tensor):
                rows = not_finite(leaf.detach().cpu().numpy())
                if len(rows):
                    name = field if key is None else f"{field} {key!r}"
                    yield f"{name} of {len(rows)} of its {len(leaf)} transitions were not"
