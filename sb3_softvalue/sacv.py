"""SACV: the original Soft Actor-Critic, with its state-value network, as a Stable-Baselines3 algorithm."""

import copy
import io
import math
import pathlib
from collections.abc import Callable
from typing import Any, ClassVar, NoReturn, TypeVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.preprocessing import get_action_dim
from stable_baselines3.common.type_aliases import (
    GymEnv,
    MaybeCallback,
    PyTorchObs,
    Schedule,
    TensorDict,
    TrainFreq,
    TrainFrequencyUnit,
)
from stable_baselines3.common.utils import FloatSchedule, update_learning_rate
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.sac.policies import SACPolicy
from stable_baselines3.sac.sac import SAC

from sb3_softvalue import checks, transfer, update
from sb3_softvalue.batches import sample_batches
from sb3_softvalue.execution import EXECUTIONS, Executor
from sb3_softvalue.optimizers import OptimizerStep
from sb3_softvalue.policies import CnnPolicy, MlpPolicy, MultiInputPolicy, SACVPolicy, ValueNetwork, no_critic_target

SelfSACV = TypeVar("SelfSACV", bound="SACV")


class SACV(SAC):
    """
    Soft Actor-Critic with a state-value network (SAC v1).

    The algorithm of Haarnoja et al. 2018, https://arxiv.org/abs/1801.01290: a stochastic actor, soft Q-functions, a
    separate state-value network V and its Polyak-averaged target V̄ from which the Q-functions bootstrap. SB3's ``SAC``
    has no V and bootstraps from target Q-functions; everything else about it holds here too.

    :param policy: The policy model to use (MlpPolicy, CnnPolicy, MultiInputPolicy, or a subclass of ``SACVPolicy``)
    :param env: The environment to learn from (if registered in Gym, can be str)
    :param learning_rate: learning rate for the optimizers of all networks,
        it can be a function of the current progress remaining (from 1 to 0)
    :param buffer_size: size of the replay buffer
    :param learning_starts: how many steps of the model to collect transitions for before learning starts
    :param batch_size: Minibatch size for each gradient update
    :param tau: the soft update coefficient ("Polyak update", between 0 and 1) of the target value; 1 copies
    :param gamma: the discount factor
    :param train_freq: Update the model every ``train_freq`` steps. Alternatively pass a tuple of frequency and unit
        like ``(5, "step")`` or ``(2, "episode")``.
    :param gradient_steps: How many gradient steps to do after each rollout (see ``train_freq``)
        Set to ``-1`` means to do as many gradient steps as steps done in the environment
        during the rollout.
    :param action_noise: the action noise type (None by default), this can help
        for hard exploration problem. Cf common.noise for the different action noise type.
    :param replay_buffer_class: Replay buffer class to use (for instance ``HerReplayBuffer``).
        If ``None``, it will be automatically selected.
    :param replay_buffer_kwargs: Keyword arguments to pass to the replay buffer on creation.
    :param optimize_memory_usage: Enable a memory efficient variant of the replay buffer
        at a cost of more complexity.
        See https://github.com/DLR-RM/stable-baselines3/issues/37#issuecomment-637501195
    :param n_steps: When n_step > 1, uses n-step return (with the NStepReplayBuffer) when updating the Q-value network.
    :param ent_coef: Entropy regularization coefficient, the temperature α. (Equivalent to
        inverse of reward scale in the original SAC paper.)  Controlling exploration/exploitation trade-off.
        Set it to 'auto' to learn it automatically (and 'auto_0.1' for using 0.1 as initial value)
    :param target_update_interval: update the target value after every ``target_update_interval`` gradient steps, counted
        over the life of the model (SAC's count starts anew at each call of ``train()``, SB3 issue 2158).
        The paper's hard updates every 1000 environment steps with 4 gradient steps each are
        ``tau=1.0, target_update_interval=4000, gradient_steps=4``.
    :param target_entropy: target entropy when learning ``ent_coef`` (``ent_coef = 'auto'``)
    :param use_sde: Whether to use generalized State Dependent Exploration (gSDE)
        instead of action noise exploration (default: False)
    :param sde_sample_freq: Sample a new noise matrix every n steps when using gSDE
        Default: -1 (only sample at the beginning of the rollout)
    :param use_sde_at_warmup: Whether to use gSDE instead of uniform sampling
        during the warm up phase (before learning starts)
    :param stats_window_size: Window size for the rollout logging, specifying the number of episodes to average
        the reported success rate, mean episode length, and mean reward over
    :param tensorboard_log: the log location for tensorboard (if None, no logging)
    :param policy_kwargs: additional arguments to be passed to the policy on creation, see ``SACVPolicy``
    :param verbose: Verbosity level: 0 for no output, 1 for info messages (such as device or wrappers used), 2 for
        debug messages
    :param seed: Seed for the pseudo random generators
    :param device: Device (cpu, cuda, ...) on which the code should be run.
        Setting it to auto, the code will be run on the GPU if possible.
    :param _init_setup_model: Whether or not to build the network at the creation of the instance
    :param reward_scale: factor of the rewards in the Q target, a positive number or a function of the current progress
        remaining (paper, section 5.2). It scales V and Q as well, unlike ``ent_coef = 1 / reward_scale``.
    :param qf_learning_rate: learning rate of the critics, number or schedule; None takes ``learning_rate``
    :param vf_learning_rate: learning rate of the value network, number or schedule; None takes ``learning_rate``
    :param ent_coef_learning_rate: learning rate of the temperature, number or schedule; None takes ``learning_rate``
    :param max_grad_norm: the maximum gradient norm of each optimizer (actor, critics, value, temperature) by itself;
        None does not clip
    :param action_prior: "uniform", or "normal" to maximise the negative divergence from N(0, I) over the squashed action
        instead of the entropy, as the authors' code can
    :param execution: how the update runs: "eager", "compiled", "cuda_graph", or "auto", which takes the fastest that is
        possible and pays for itself in the updates to come. The results agree up to rounding.
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": MlpPolicy,
        "CnnPolicy": CnnPolicy,
        "MultiInputPolicy": MultiInputPolicy,
    }
    policy: SACVPolicy
    value: ValueNetwork
    """V(s), ``policy.value``"""
    value_target: ValueNetwork
    """V̄(s), ``policy.value_target``"""

    def __init__(
        self,
        policy: str | type[SACVPolicy],
        env: GymEnv | str,
        learning_rate: float | Schedule = 3e-4,
        buffer_size: int = 1_000_000,  # 1e6
        learning_starts: int = 100,
        batch_size: int = 256,
        tau: float = 0.005,
        gamma: float = 0.99,
        train_freq: int | tuple[int, str] = 1,
        gradient_steps: int = 1,
        action_noise: ActionNoise | None = None,
        replay_buffer_class: type[ReplayBuffer] | None = None,
        replay_buffer_kwargs: dict[str, Any] | None = None,
        optimize_memory_usage: bool = False,
        n_steps: int = 1,
        ent_coef: str | float = "auto",
        target_update_interval: int = 1,
        target_entropy: str | float = "auto",
        use_sde: bool = False,
        sde_sample_freq: int = -1,
        use_sde_at_warmup: bool = False,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        _init_setup_model: bool = True,
        *,
        reward_scale: float | Schedule = 1.0,
        qf_learning_rate: float | Schedule | None = None,
        vf_learning_rate: float | Schedule | None = None,
        ent_coef_learning_rate: float | Schedule | None = None,
        max_grad_norm: float | None = None,
        action_prior: str = "uniform",
        execution: str = "auto",
    ):
        checks.check_policy(policy)
        super().__init__(
            policy,
            env,
            learning_rate,
            buffer_size,
            learning_starts,
            batch_size,
            tau,
            gamma,
            train_freq,
            gradient_steps,
            action_noise,
            replay_buffer_class=replay_buffer_class,
            replay_buffer_kwargs=replay_buffer_kwargs,
            optimize_memory_usage=optimize_memory_usage,
            n_steps=n_steps,
            ent_coef=ent_coef,
            target_update_interval=target_update_interval,
            target_entropy=target_entropy,
            use_sde=use_sde,
            sde_sample_freq=sde_sample_freq,
            use_sde_at_warmup=use_sde_at_warmup,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            policy_kwargs=policy_kwargs,
            verbose=verbose,
            seed=seed,
            device=device,
            _init_setup_model=False,
        )
        self.reward_scale = reward_scale
        self.qf_learning_rate = qf_learning_rate
        self.vf_learning_rate = vf_learning_rate
        self.ent_coef_learning_rate = ent_coef_learning_rate
        self.max_grad_norm = max_grad_norm
        self.action_prior = action_prior
        self.execution = execution
        # What "auto" came to: saved, so that a continued run is executed by the same code
        self._resolved_execution: str | None = None

        if _init_setup_model:
            self._setup_model()

    def _setup_model(self) -> None:
        self._check_options()
        # Not SAC's: it builds on a twin Q target, which does not exist here
        super(SAC, self)._setup_model()
        self._create_aliases()
        if self.target_entropy == "auto":
            self.target_entropy = -float(get_action_dim(self.action_space))
        self.target_entropy = checks.finite_number("target_entropy", self.target_entropy, "'auto'")
        self._setup_ent_coef()

    def _setup_lr_schedule(self) -> None:
        self.lr_schedule = _schedule(self.learning_rate)
        # Made again from the saved arguments at each load, so that they are never pickled
        self._schedules = {
            name: self.lr_schedule if value is None else _schedule(value)
            for name, value in (
                ("learning_rate", None),
                ("qf_learning_rate", self.qf_learning_rate),
                ("vf_learning_rate", self.vf_learning_rate),
                ("ent_coef_learning_rate", self.ent_coef_learning_rate),
                ("reward_scale", self.reward_scale),
            )
        }
        for name in self._schedules:
            self._scheduled(name)

    def _scheduled(self, name: str) -> float:
        """
        :param name: "reward_scale" or one of the learning rates
        :return: its value at the current progress
        :raises ValueError: if the schedule gives no number, a negative or an infinite one
        """
        progress = self._current_progress_remaining
        try:
            value = self._schedules[name](progress)
        except (TypeError, ValueError):
            value = math.nan
        if not 0.0 <= value < math.inf:
            raise ValueError(
                f"The {name} schedule gave {value} at progress remaining {progress:.3f}: make it return finite numbers that "
                "are not negative."
            )
        return value

    def _setup_ent_coef(self) -> None:
        """(Re)start the temperature from ``self.ent_coef``: learned ("auto", "auto_<initial value>") or fixed (a number)."""
        initial_value = checks.initial_ent_coef(self.ent_coef)
        if isinstance(self.ent_coef, str) and self.ent_coef.startswith("auto"):
            # The log is optimized, see https://github.com/rail-berkeley/softlearning/issues/37
            self.log_ent_coef = th.log(th.ones(1, device=self.device) * initial_value).requires_grad_(True)
            self.ent_coef_optimizer = th.optim.Adam([self.log_ent_coef], lr=self.lr_schedule(1), fused=True)
        else:
            self.log_ent_coef = None
            self.ent_coef_optimizer = None
            self.ent_coef_tensor = th.tensor(initial_value, device=self.device)

    def _create_aliases(self) -> None:
        self.actor = self.policy.actor
        self.critic = self.policy.critic
        self.value = self.policy.value
        self.value_target = self.policy.value_target
        # What refers to the networks belongs to the same policy
        self._update_target = update.TargetUpdate(self.value, self.value_target)
        self._optimizer_step: OptimizerStep | None = None
        objective = update.JointObjective(self.policy, self.action_prior)
        self._executor = Executor(self.execution, objective, self.device, self._resolved_execution, self._announce)

    @property
    def critic_target(self) -> NoReturn:  # type: ignore[override]
        """Not there: SAC v1 has ``value_target`` instead."""
        no_critic_target(type(self).__name__)

    @staticmethod
    def _wrap_env(env: GymEnv, verbose: int = 0, monitor_wrapper: bool = True) -> VecEnv:
        # Whatever else it is, SB3 says so
        if hasattr(env, "action_space"):
            checks.check_action_space(env.action_space)
        return SAC._wrap_env(env, verbose, monitor_wrapper)

    def train(self, gradient_steps: int, batch_size: int = 64) -> None:
        """
        Sample the replay buffer and do the updates: joint gradient step, then the target value when it is due.

        :param gradient_steps: number of gradient steps
        :param batch_size: transitions of each
        """
        # Switch to train mode (this affects batch norm / dropout)
        self.policy.set_training_mode(True)
        step = self._prepare_optimizers()
        reward_scale = self._scheduled("reward_scale")
        if callable(self.reward_scale):
            self.logger.record("train/reward_scale", reward_scale)
        self._executor.prepare(self._n_updates + gradient_steps + self._updates_to_come())

        metrics = []
        assert self.replay_buffer is not None
        sampling = (self.replay_buffer, gradient_steps, batch_size, self.gamma, self.device, self._vec_normalize_env)
        for batch in sample_batches(*sampling):
            gradients, step_metrics = self._executor(
                step.params, batch, self._draw_noise(batch_size), self._temperature(), reward_scale
            )
            step(gradients, self.max_grad_norm)
            metrics.append(step_metrics)
            self._n_updates += 1
            if self._n_updates % self.target_update_interval == 0:
                self._update_target(self.tau)
        self._resolved_execution = self._executor.resolved
        self._record(metrics)

    def _announce(self, line: str) -> None:
        """
        :param line: for the user who asked for info messages
        """
        if self.verbose >= 1:
            print(line)

    def _updates_to_come(self) -> float:
        """:return: gradient steps after this ``train()`` until the end of ``learn()``, 0 where one cannot know"""
        timesteps = max(0, self._total_timesteps - self.num_timesteps)
        if self.gradient_steps < 0:
            return timesteps
        assert isinstance(self.train_freq, TrainFreq)
        if self.train_freq.unit is TrainFrequencyUnit.EPISODE:
            return 0
        return timesteps * self.gradient_steps / (self.train_freq.frequency * self.n_envs)

    def _prepare_optimizers(self) -> OptimizerStep:
        """
        Set each optimizer's learning rate for the current progress and log those that are not ``learning_rate``.

        :return: the step of all optimizers
        """
        self._scheduled("learning_rate")
        self._update_learning_rate(self.actor.optimizer)
        optimizers = {"qf_learning_rate": self.critic.optimizer, "vf_learning_rate": self.value.optimizer}
        if self.ent_coef_optimizer is not None:
            optimizers["ent_coef_learning_rate"] = self.ent_coef_optimizer
        for name, optimizer in optimizers.items():
            learning_rate = self._scheduled(name)
            update_learning_rate(optimizer, learning_rate)
            if getattr(self, name) is not None:
                self.logger.record(f"train/{name}", learning_rate)
        current = [self.actor.optimizer, *optimizers.values()]
        if self._optimizer_step is None or not self._optimizer_step.is_current(current):
            self._optimizer_step = OptimizerStep(current)
        return self._optimizer_step

    def _draw_noise(self, batch_size: int) -> th.Tensor | None:
        """
        The noise of one gradient step, the same numbers that SB3's ``action_log_prob`` would draw from the same seed.

        :param batch_size: number of actions
        :return: shape (batch_size, action_dim), or None where the actor draws its own
        """
        if self.use_sde:
            # We need to sample because `log_std` may have changed between two gradient steps
            self.actor.reset_noise()
        if update.draws_own_noise(self.actor):
            return None
        return th.randn(batch_size, get_action_dim(self.action_space), device=self.device)

    def _temperature(self) -> update.Temperature:
        """:return: the temperature of the next gradient step"""
        if self.log_ent_coef is None:
            return update.Temperature(self.ent_coef_tensor)
        assert isinstance(self.target_entropy, float)
        return update.Temperature(th.exp(self.log_ent_coef.detach()), self.log_ent_coef, self.target_entropy)

    def _record(self, metrics: list[th.Tensor]) -> None:
        """
        Log the mean over gradient steps; the only place where ``train()`` waits for the device.

        :param metrics: for each gradient step one tensor in the order of ``update.Metrics``
        """
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        if not metrics:
            return
        means = th.stack(metrics).mean(dim=0).tolist()
        for name, mean in zip(update.Metrics._fields, means, strict=True):
            if name != "ent_coef_loss" or self.ent_coef_optimizer is not None:
                self.logger.record(f"train/{name}", mean)

    def learn(
        self: SelfSACV,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 4,
        tb_log_name: str = "SACV",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfSACV:
        """
        Train, see ``BaseAlgorithm.learn``.

        :param total_timesteps: steps of the environment, all environments together
        :param callback: called at every step
        :param log_interval: log every so many episodes
        :param tb_log_name: name of the run for TensorBoard
        :param reset_num_timesteps: whether to count (and log) from zero
        :param progress_bar: show one, with tqdm and rich
        :return: the model
        """
        return super().learn(
            total_timesteps=total_timesteps,
            callback=callback,
            log_interval=log_interval,
            tb_log_name=tb_log_name,
            reset_num_timesteps=reset_num_timesteps,
            progress_bar=progress_bar,
        )

    def predict_values(self, observation: np.ndarray | dict[str, np.ndarray]) -> np.ndarray:
        """
        Soft state values V(s): what the policy is expected to collect from s on, Σ_k γ^k (r_{t+k} + α·H(π(·|s_{t+k}))),
        k from 0 (Eq. 3 of the paper). Discounted by ``gamma``, entropy included (with ``action_prior="normal"``, minus
        the divergence from the prior instead), in the reward's scale after ``reward_scale`` and after ``VecNormalize``.

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

    @classmethod
    def load(
        cls: type[SelfSACV],
        path: str | pathlib.Path | io.BufferedIOBase,
        env: GymEnv | None = None,
        device: th.device | str = "auto",
        custom_objects: dict[str, Any] | None = None,
        print_system_info: bool = False,
        force_reset: bool = True,
        **kwargs: Any,
    ) -> SelfSACV:
        """
        Load the model from a zip-file, see ``BaseAlgorithm.load``. ``ent_coef`` may be given anew: a value other than the
        saved one takes effect, also from learned ("auto") to fixed (a number) and back. V was learned with the old
        temperature and needs some updates to follow.

        :param path: path to the file (or a file-like) where to load the agent from
        :param env: the new environment to run the loaded model on
            (can be None if you only need prediction from a trained model) has priority over any saved environment
        :param device: Device on which the code should run.
        :param custom_objects: Dictionary of objects to replace upon loading.
        :param print_system_info: Whether to print system info from the saved model and the current system info
        :param force_reset: Force call to ``reset()`` before training to avoid unexpected behavior.
        :param kwargs: extra arguments to change the model when loading
        :return: new model instance with loaded parameters
        """
        custom_objects = dict(custom_objects or {})
        # The saved temperature is loaded as it was saved, then changed: SB3 fails on a temperature of the other kind
        ent_coef = kwargs.pop("ent_coef", custom_objects.pop("ent_coef", None))
        model = super().load(path, env, device, custom_objects, print_system_info, force_reset, **kwargs)
        if ent_coef is not None and ent_coef != model.ent_coef:
            model.ent_coef = ent_coef
            model._setup_ent_coef()
        return model

    @classmethod
    def from_sac(
        cls: type[SelfSACV],
        path_or_model: str | pathlib.Path | io.BufferedIOBase | SAC,
        env: GymEnv | str | None = None,
        *,
        fit_value_steps: int = 5_000,
        replay_buffer: ReplayBuffer | str | pathlib.Path | None = None,
        **kwargs: Any,
    ) -> SelfSACV:
        """
        Make a SACV of a model that SB3's ``SAC`` trained: its actor, critics and temperature with their optimizers, its
        options, counters and transitions. V, which SAC does not have, is fitted to them before training goes on; nothing else
        is learned here. V̄ takes the place of SAC's target critics.

        A replay buffer is shared with the SAC, not copied. Where it holds fewer than ``collect_steps`` transitions, the policy
        acts in ``env`` until it does, and these steps are counted. ``learning_starts`` is 0 afterwards: the warm-up is over.

        :param path_or_model: SAC model, or what ``SAC.save`` wrote (as with ``SAC.load``: open only files that you trust)
        :param env: to go on in, wrapped in ``VecNormalize`` if the SAC was trained so; None takes the model's own
        :param fit_value_steps: gradient steps that fit V
        :param replay_buffer: transitions, or the path of what ``save_replay_buffer`` wrote (a pickle: only files that you
            trust); None takes those that the model holds
        :param kwargs: ``collect_steps`` (1,000), ``policy`` for a SAC with a policy class of its own, ``device``, and
            arguments of this class in place of the SAC's
        :return: the new model
        :raises ValueError: if the model is no SAC, its policy has no counterpart, the environment does not fit, or there is
            neither an environment nor a replay buffer to fit V on
        """
        fit: dict[str, Any] = dict(fit_value_steps=fit_value_steps, replay_buffer=replay_buffer)
        return transfer.from_sac(cls, path_or_model, env, **fit, **kwargs)

    def to_sac(self, policy: str | type[SACPolicy] | None = None) -> SAC:
        """
        Make a model of SB3's ``SAC`` that predicts the same and can train on, see ``transfer.to_sac``. The replay buffer and
        the environment are shared, not copied: only one of the two models should train on.

        :param policy: the policy class; None takes SB3's own that stands for this model's
        :return: the SAC, whose target critics are copies of the critics
        :raises ValueError: if the policy has no counterpart in SB3 and none is given
        """
        return transfer.to_sac(self, policy)

    def set_parameters(
        self, load_path_or_dict: str | TensorDict, exact_match: bool = True, device: th.device | str = "auto"
    ) -> None:
        """
        Load parameters from a given zip-file or a nested dictionary, see ``BaseAlgorithm.set_parameters``.

        :param load_path_or_dict: path or file-like (see ``save``), or a copy of what ``get_parameters`` returned
        :param exact_match: If True, the given parameters should include parameters for each module and each of their
            parameters, otherwise raises an Exception.
        :param device: Device on which the code should run.
        """
        if isinstance(load_path_or_dict, dict):
            # PyTorch's optimizers keep the tensors they load, so that two models would go on with one state between them
            load_path_or_dict = copy.deepcopy(load_path_or_dict)
        super().set_parameters(load_path_or_dict, exact_match, device)

    def _excluded_save_params(self) -> list[str]:
        return [
            *super()._excluded_save_params(),
            "value",
            "value_target",
            "_schedules",
            "_optimizer_step",
            "_update_target",
            "_executor",
        ]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        state_dicts, variables = super()._get_torch_save_params()
        return [*state_dicts, "value.optimizer"], variables

    def _check_options(self) -> None:
        """
        :raises ValueError: if an option has a value that cannot work
        :raises TypeError: if ``policy_kwargs`` names an argument that the policy does not have
        """
        checks.initial_ent_coef(self.ent_coef)
        checks.check_whole_number("target_update_interval", self.target_update_interval, minimum=1)
        for name in ("batch_size", "buffer_size", "n_steps"):
            checks.check_whole_number(name, getattr(self, name), minimum=1)
        checks.check_fraction("tau", self.tau)
        checks.check_fraction("gamma", self.gamma)
        checks.check_max_grad_norm(self.max_grad_norm)
        checks.check_one_of("action_prior", self.action_prior, update.ACTION_PRIORS)
        checks.check_one_of("execution", self.execution, EXECUTIONS)
        for name in ("learning_rate", "qf_learning_rate", "vf_learning_rate", "ent_coef_learning_rate"):
            if name == "learning_rate" or getattr(self, name) is not None:
                checks.check_number_or_schedule(name, getattr(self, name), "not negative", lambda value: value >= 0.0)
        checks.check_number_or_schedule("reward_scale", self.reward_scale, "positive", lambda value: value > 0.0)
        checks.check_policy_kwargs(self.policy_class, self.policy_kwargs)


def _schedule(value: float | Schedule) -> FloatSchedule:
    """
    :param value: number, also NumPy's, or function of the remaining progress
    :return: function of the remaining progress that returns a Python float
    """
    return FloatSchedule(value if callable(value) else float(value))
