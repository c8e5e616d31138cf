"""What a trained model says of states and actions, in one call each: NumPy in, NumPy out."""

from collections.abc import Callable

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.preprocessing import get_action_dim
from stable_baselines3.common.type_aliases import PyTorchObs
from stable_baselines3.sac.sac import SAC

from sb3_softvalue import checks
from sb3_softvalue.policies import SACVPolicy


class Readings(SAC):
    """SAC with a value network whose V(s), Q(s, a), log π(a|s) and entropy can be read. Reading changes nothing."""

    policy: SACVPolicy

    def predict_values(self, observation: np.ndarray | dict[str, np.ndarray]) -> np.ndarray:
        """
        Soft state values V(s): what the policy is expected to collect from s on, Σ_k γ^k (r_{t+k} + α·H(π(·|s_{t+k}))),
        k from 0 (Eq. 3 of the paper). Discounted by ``gamma``, entropy included (where ``action_prior`` is
        not "uniform", minus the divergence from the prior instead), in the reward's scale after ``reward_scale`` and after
        ``VecNormalize``.

        :param observation: as ``predict`` takes it, one observation or a batch of n, normalized if the model was trained
            with ``VecNormalize``
        :return: shape (n,), or () for one observation
        """
        return self._read(observation, lambda obs: self.policy.predict_values(obs).squeeze(dim=1))

    def predict_q_values(self, observation: np.ndarray | dict[str, np.ndarray], actions: np.ndarray) -> np.ndarray:
        """
        Soft action values Q_i(s, a) of every critic, in the unit of ``predict_values``; they exclude the entropy at s itself.

        :param observation: as ``predict`` takes it, one observation or a batch of n
        :param actions: in the environment's own units, one for each observation, shape (n, *action_shape), or
            action_shape for one observation
        :return: shape (n, n_critics), or (n_critics,) for one observation
        :raises ValueError: if the actions are out of the action space or not one for each observation
        """
        return self._read(
            observation, lambda obs, scaled: th.cat(self.critic(obs, scaled), dim=1), self._scale_actions(actions)
        )

    def action_log_prob(self, observation: np.ndarray | dict[str, np.ndarray], actions: np.ndarray) -> np.ndarray:
        """
        Log-density of actions under the policy, Eq. 21 of the paper with the Jacobian of the scaling to the
        environment's units included: exp of it integrates to 1 over the action space, up to the 1e-6 inside the logarithm of
        the squashing, which is felt where the policy is saturated (|a| > 0.999). At the very bounds, where the density of a
        squashed Gaussian is a limit, the closest action inside counts.

        :param observation: as ``predict`` takes it, one observation or a batch of n
        :param actions: in the environment's own units, one for each observation, shape (n, *action_shape), or
            action_shape for one observation
        :return: nats, shape (n,), or () for one observation
        :raises ValueError: if the actions are out of the action space or not one for each observation
        """
        assert isinstance(self.action_space, spaces.Box)
        log_scale = float(np.log((self.action_space.high - self.action_space.low).astype(np.float64) / 2.0).sum())
        return self._read(
            observation,
            lambda obs, scaled: self.policy.log_prob(obs, scaled).squeeze(dim=1) - log_scale,
            self._scale_actions(actions),
        )

    def entropy(self, observation: np.ndarray | dict[str, np.ndarray], n_samples: int = 128, seed: int = 0) -> np.ndarray:
        """
        Differential entropy of the policy over the squashed action in [-1, 1], a Monte Carlo estimate. It has its own
        random generator, so that reading does not change the training that goes on.

        :param observation: as ``predict`` takes it, one observation or a batch of n
        :param n_samples: sampled actions for each observation
        :param seed: of the samples
        :return: nats, shape (n,), or () for one observation
        :raises ValueError: if ``n_samples`` is not a positive whole number
        """
        checks.check_whole_number("n_samples", n_samples, minimum=1)
        generator = th.Generator(device=self.device).manual_seed(seed)
        return self._read(observation, lambda obs: self.policy.entropy(obs, n_samples, generator).squeeze(dim=1))

    def _read(
        self,
        observation: np.ndarray | dict[str, np.ndarray],
        function: Callable[..., th.Tensor],
        scaled_actions: np.ndarray | None = None,
    ) -> np.ndarray:
        """
        Evaluate a function of the networks on numpy observations, as ``predict`` does.

        :param observation: one observation or a batch of n
        :param function: of the observations and, where given, of the actions as tensors; returns shape (n, ...)
        :param scaled_actions: actions in [-1, 1], shape (n, action_dim)
        :return: shape (n, ...), without the first axis for one observation
        """
        if isinstance(observation, tuple):
            raise ValueError(
                "A tuple was given as observation: with the Gymnasium API use `obs, info = env.reset()` and pass only obs."
            )
        # Switch to eval mode (this affects batch norm / dropout)
        self.policy.set_training_mode(False)
        obs, vectorized = self.policy.obs_to_tensor(observation)
        arguments: list[PyTorchObs] = [obs]
        if scaled_actions is not None:
            n_observations = len(next(iter(obs.values())) if isinstance(obs, dict) else obs)
            if len(scaled_actions) != n_observations:
                raise ValueError(
                    f"Got {n_observations} observations but {len(scaled_actions)} actions: pass one action for each."
                )
            arguments.append(th.as_tensor(scaled_actions, device=self.device))
        with th.no_grad():
            result = function(*arguments).cpu().numpy()
        return result if vectorized else result.squeeze(axis=0)

    def _scale_actions(self, actions: np.ndarray) -> np.ndarray:
        """
        :param actions: in the environment's units, shape (n, *action_shape) or action_shape
        :return: in [-1, 1], shape (n, action_dim), float32
        :raises ValueError: if the shape is wrong or an action is out of the action space
        """
        space = self.action_space
        assert isinstance(space, spaces.Box)
        actions = np.asarray(actions, dtype=np.float32)
        if actions.shape != space.shape and actions.shape[1:] != space.shape:
            raise ValueError(f"Got actions of shape {actions.shape}, expected {space.shape} or a batch of such.")
        scaled = self.policy.scale_action(actions.reshape(-1, *space.shape)).reshape(-1, get_action_dim(space))
        # Rounding may carry an action that lies on a bound just over it
        if not np.all(np.abs(scaled) <= 1.0 + 1e-5):
            raise ValueError(f"Actions must be numbers of the environment's action space {space}, in its own units.")
        return np.clip(scaled, -1.0, 1.0).astype(np.float32)
