"""SACV: the original Soft Actor-Critic, with its state-value network, as a Stable-Baselines3 algorithm."""

import copy
import io
import math
import pathlib
from collections.abc import Iterator
from functools import lru_cache
from itertools import chain
from typing import Any, ClassVar, NoReturn, TypeVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import DictReplayBuffer, NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.noise import ActionNoise, VectorizedActionNoise
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, RolloutReturn, Schedule, TensorDict
from stable_baselines3.common.utils import FloatSchedule, update_learning_rate
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer
from stable_baselines3.sac.policies import SACPolicy
from stable_baselines3.sac.sac import SAC

from sb3_softvalue import checkpoint, checks, predictions, transfer
from sb3_softvalue.execution import (
    CapturedActions,
    Executor,
    OptimizerStep,
    check_autocast,
    learned_params,
    remaining_updates,
    sample_batches,
)
from sb3_softvalue.finite import FiniteCheck, NonFiniteError
from sb3_softvalue.objective import Batch, JointObjective, Metrics, Temperature, UpdateInputs, draw_noise
from sb3_softvalue.policies import (
    CnnPolicy,
    MlpPolicy,
    MultiInputPolicy,
    SACVPolicy,
    ValueNetwork,
    move_target,
    raise_no_critic_target,
    with_value_network,
)

SelfSACV = TypeVar("SelfSACV", bound="SACV")


class SACV(SAC):
    """
    Soft Actor-Critic with a state-value network (SAC v1).

    The algorithm of Haarnoja et al. 2018, https://arxiv.org/abs/1801.01290: a stochastic actor, soft Q-functions, a
    separate state-value network V, and its Polyak-averaged target V̄, from which the Q-functions bootstrap. SB3's ``SAC``
    has no V and bootstraps from target Q-functions. Everything else works as in ``SAC``.

    :param policy: The policy model to use: "MlpPolicy", "CnnPolicy", "MultiInputPolicy" or a policy class (one of SB3's for
        SAC, ``SACVPolicy``, or a subclass)
    :param env: The environment to learn from (if registered in Gym, can be str)
    :param learning_rate: learning rate of all optimizers, a number or a function of the current progress remaining (from 1
        to 0)
    :param buffer_size: size of the replay buffer
    :param learning_starts: how many steps of the model to collect transitions for before learning starts
    :param batch_size: Minibatch size for each gradient update
    :param tau: the soft update coefficient ("Polyak update", between 0 and 1) of the target value; 1 is a hard update
    :param gamma: the discount factor
    :param train_freq: Update the model every ``train_freq`` steps, or a tuple like ``(5, "step")`` or ``(2, "episode")``
    :param gradient_steps: How many gradient steps to do after each rollout (see ``train_freq``); -1 means as many as the
        rollout has steps
    :param action_noise: the action noise type (None by default), this can help for hard exploration problems
    :param replay_buffer_class: Replay buffer class to use (for instance ``HerReplayBuffer``); None selects it automatically
    :param replay_buffer_kwargs: Keyword arguments to pass to the replay buffer on creation.
    :param optimize_memory_usage: Enable a memory efficient variant of the replay buffer, see SB3 issue 37
    :param n_steps: When n_step > 1, uses n-step return (with the NStepReplayBuffer) when updating the Q-value network.
    :param ent_coef: Entropy regularization coefficient: the temperature α, the inverse of the paper's reward scale. "auto"
        learns it, "auto_0.1" learns it with the initial value 0.1
    :param target_update_interval: update the target value every ``target_update_interval`` gradient steps, counted over the
        life of the model (SAC restarts the count at each call of ``train()``, SB3 issue 2158). The paper's hard updates are
        ``tau=1.0, target_update_interval=4000, gradient_steps=4``.
    :param target_entropy: target entropy when learning ``ent_coef`` (``ent_coef = 'auto'``)
    :param use_sde: Whether to use generalized State Dependent Exploration (gSDE) instead of action noise
    :param sde_sample_freq: Sample a new noise matrix every n steps with gSDE; -1 only at the beginning of the rollout
    :param use_sde_at_warmup: Whether to use gSDE instead of uniform sampling before learning starts
    :param stats_window_size: Window size for the rollout logging, in episodes: the reported success rate, mean episode
        length and mean reward are averages over it
    :param tensorboard_log: the log location for tensorboard (if None, no logging)
    :param policy_kwargs: additional arguments to be passed to the policy on creation, see ``SACVPolicy``
    :param verbose: Verbosity level: 0 for no output, 1 for info messages, 2 for debug messages
    :param seed: Seed for the pseudo random generators
    :param device: Device (cpu, cuda, ...) on which the code should be run; "auto" uses the GPU if possible
    :param _init_setup_model: Whether or not to build the network at the creation of the instance
    :param reward_scale: factor of the rewards in the Q target, a non-negative number or a function of the current progress
        remaining (paper, section 5.2). It scales V and Q as well, unlike ``ent_coef = 1 / reward_scale``.
    :param qf_learning_rate: learning rate of the critics, a number or a schedule; None uses ``learning_rate``
    :param vf_learning_rate: learning rate of the value network, a number or a schedule; None uses ``learning_rate``
    :param ent_coef_learning_rate: learning rate of the temperature, a number or a schedule; None uses ``learning_rate``
    :param max_grad_norm: clip the gradient norm of each optimizer (actor, critics, value, temperature) separately to this
        maximum; None does not clip
    :param action_prior: density p(a) over the squashed action; the objective contains the bonus α·(log p(a) - log π(a|s)).
        "uniform" leaves out the constant log p(a): the bonus is the entropy. "normalized_uniform" keeps it: the bonus is
        d·ln 2 nats per step smaller and its mean is never positive. The optimal policy is the same unless episodes can end
        early, where a positive bonus rewards staying alive. "normal" is N(0, I), as in the authors' code.
    :param policy_delay: update the actor and the temperature only every ``policy_delay`` gradient steps; the critics and V
        are updated at each one, and V's target always samples the current policy
    :param check_finite: stop with a ``NonFiniteError`` at the first observation, reward, action, loss or gradient that is not
        finite, before it is stored or learned from; False disables the check
    :param execution: how updates run: "eager", "compiled", "cuda_graph", or "auto", which chooses one of them by device and
        number of updates. All agree up to rounding. "mixed" is "compiled" with large matrix products in bfloat16; "auto"
        never chooses it.
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
        policy: str | type[SACPolicy],
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
        policy_delay: int = 1,
        check_finite: bool = True,
        execution: str = "auto",
    ):
        if isinstance(policy, type) and issubclass(policy, BasePolicy):
            policy = with_value_network(policy)
        if env is None and _init_setup_model:
            raise ValueError("env must be an environment or its name, got None.")
        replay_buffer_kwargs = dict(replay_buffer_kwargs or {})  # SB3 writes into it
        n_steps = _consistent_n_steps(replay_buffer_class, replay_buffer_kwargs, gamma, n_steps)
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
        self.policy_delay = policy_delay
        self.check_finite = check_finite
        self.execution = execution
        # What "auto" resolved to: saved, so that a resumed run uses the same backend
        self._resolved_execution: str | None = None
        self._objective: JointObjective | None = None
        self._hints_given: set[str] = set()

        if _init_setup_model:
            self._setup_model()

    def _setup_model(self) -> None:
        checks.check_options(self)
        assert isinstance(self.action_space, spaces.Box)
        if not issubclass(self.policy_class, SACVPolicy):
            raise ValueError(
                f"{self.policy_class.__name__} has no value network: convert a model of SB3's SAC with SACV.from_sac."
            )
        self.policy_class = with_value_network(self.policy_class)
        if self.replay_buffer_class is not None and issubclass(self.replay_buffer_class, NStepReplayBuffer):
            self.replay_buffer_kwargs |= {"n_steps": self.n_steps, "gamma": self.gamma}
            if self.replay_buffer_class is NStepReplayBuffer and self.n_steps > 1:
                # SB3 chooses this class itself, and warns if it is passed
                self.replay_buffer_class = None
        self._warn_once("actions", checks.hint_about_actions(self.action_space))
        predicts_only = self.env is None and issubclass(self.replay_buffer_class or object, HerReplayBuffer)
        if predicts_only:
            # HerReplayBuffer needs an environment: a placeholder stops SB3 from creating one
            assert isinstance(self.observation_space, spaces.Dict)
            self.replay_buffer = DictReplayBuffer(1, self.observation_space, self.action_space)
        # Skip SAC's own _setup_model, which reads critic_target
        super(SAC, self)._setup_model()
        if predicts_only:
            self.replay_buffer = None
        self._create_aliases()
        checks.check_optimizers(self)
        is_auto = self.target_entropy == "auto"
        self.target_entropy = -float(np.prod(self.action_space.shape)) if is_auto else float(self.target_entropy)
        self._setup_ent_coef()
        self._finite_check = FiniteCheck()
        self._optimizer_step = OptimizerStep()
        self._executor = Executor(self.execution, self.verbose >= 1, self._resolved_execution)

    def _setup_lr_schedule(self) -> None:
        learning_rate: Any = self.learning_rate
        # FloatSchedule refuses NumPy's float32
        self.lr_schedule = FloatSchedule(float(learning_rate) if isinstance(learning_rate, np.number) else learning_rate)
        for name in ("learning_rate", "qf_learning_rate", "vf_learning_rate", "ent_coef_learning_rate", "reward_scale"):
            value = getattr(self, name)
            if value is not None or name == "reward_scale":
                _number_at(1.0, name, value)

    def _create_aliases(self) -> None:
        self.actor, self.critic = self.policy.actor, self.policy.critic
        self.value, self.value_target = self.policy.value, self.policy.value_target
        self.policy.captured_actions = CapturedActions(self.policy) if self.device.type == "cuda" else None

    def _setup_ent_coef(self) -> None:
        """Initialize the temperature from ``self.ent_coef``: learned ("auto", "auto_<initial value>") or fixed (a number)."""
        if isinstance(self.ent_coef, str) and self.ent_coef.startswith("auto"):
            self._initial_ent_coef = float(self.ent_coef.split("_")[1]) if "_" in self.ent_coef else 1.0
            assert self._initial_ent_coef > 0.0, "The initial value of ent_coef must be greater than 0"
            # The log is optimized, see https://github.com/rail-berkeley/softlearning/issues/37
            self.log_ent_coef = th.log(th.ones(1, device=self.device) * self._initial_ent_coef).requires_grad_(True)
            self.ent_coef_optimizer = th.optim.Adam([self.log_ent_coef], lr=self.lr_schedule(1), fused=True)
        else:
            self.log_ent_coef = None
            self.ent_coef_optimizer = None
            self.ent_coef_tensor = th.tensor(float(self.ent_coef), device=self.device)

    @property
    def critic_target(self) -> NoReturn:  # type: ignore[override]  # an attribute in SAC
        """Does not exist: SAC v1 has ``value_target`` instead."""
        raise_no_critic_target(type(self).__name__)

    @staticmethod
    def _wrap_env(env: GymEnv, verbose: int = 0, monitor_wrapper: bool = True) -> VecEnv:
        return checks.check_vec_normalize(SAC._wrap_env(env, verbose, monitor_wrapper))

    def train(self, gradient_steps: int, batch_size: int = 64) -> None:
        """
        Sample the replay buffer and do the updates: a joint gradient step, then the target update when it is due.

        :param gradient_steps: number of gradient steps
        :param batch_size: transitions per gradient step
        """
        self._choose_execution(gradient_steps)
        # Switch to train mode (this affects batch norm / dropout)
        self.policy.set_training_mode(True)
        optimizers, reward_scale = self._update_rates()
        objective, check = self._joint_objective(), self._finite_check if self.check_finite else None
        report, found_inf = [], None

        for batch in self._batches(gradient_steps, batch_size, reward_scale):
            update_actor = (self._n_updates + 1) % self.policy_delay == 0
            stepped = optimizers if update_actor else [self.critic.optimizer, self.value.optimizer]
            params = [learned_params(optimizer) for optimizer in stepped]
            inputs = UpdateInputs(batch, draw_noise(self.actor, len(batch.rewards), self.device), self.temperature())
            gradients, metrics = self._executor(objective, list(chain(*params)), inputs, update_actor)
            if check is not None:
                found_inf = check.check_update(self, batch, metrics, found_inf)
            self._optimizer_step(stepped, params, gradients, self.max_grad_norm, found_inf)
            report.append(metrics)
            self._n_updates += 1
            if self._n_updates % self.target_update_interval == 0:
                move_target(self.value, self.value_target, self.tau)

        self._resolved_execution = self._executor.resolved  # it may have fallen back to eager
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        if report:
            rows = th.stack(report).cpu()  # the only synchronization with a GPU
            if found_inf is not None and check is not None:
                check.check_report(self, batch, rows)
            self._log(rows)

    def _choose_execution(self, gradient_steps: int) -> None:
        """
        Choose how the updates of this ``train()`` run.

        :param gradient_steps: number of updates
        """
        if (self._executor.requested, self._executor.resolved) != (self.execution, self._resolved_execution):
            # Changed by the user or by load_checkpoint
            self._executor = Executor(self.execution, self.verbose >= 1, self._resolved_execution)
        n_certain = self._n_updates + gradient_steps
        self._executor.prepare(self.device, n_certain, n_certain + remaining_updates(self))
        self._resolved_execution = self._executor.resolved

    def _update_rates(self) -> tuple[list[th.optim.Optimizer], float]:
        """
        Set and log each optimizer's learning rate at the current progress.

        :return: the optimizers (critics, value, actor, temperature) and the reward scale
        """
        # The last rollout may overshoot total_timesteps, where a schedule that ends at zero would be negative
        self._current_progress_remaining = progress = max(0.0, self._current_progress_remaining)
        learning_rate = _number_at(progress, "learning_rate", self.lr_schedule)
        optimizers: dict[str, th.optim.Optimizer] = {
            "qf_learning_rate": self.critic.optimizer,
            "vf_learning_rate": self.value.optimizer,
            "learning_rate": self.actor.optimizer,
        }
        if self.ent_coef_optimizer is not None:
            optimizers["ent_coef_learning_rate"] = self.ent_coef_optimizer
        self.logger.record("train/learning_rate", learning_rate)
        for name, optimizer in optimizers.items():
            own = None if name == "learning_rate" else getattr(self, name)
            rate = learning_rate if own is None else _number_at(progress, name, own)
            update_learning_rate(optimizer, rate)
            if own is not None:
                self.logger.record(f"train/{name}", rate)
        reward_scale = _number_at(progress, "reward_scale", self.reward_scale)
        if callable(self.reward_scale):
            self.logger.record("train/reward_scale", reward_scale)
        return list(optimizers.values()), reward_scale

    def _joint_objective(self) -> JointObjective:
        """:return: the objective of the current networks, which the user may have replaced"""
        networks = self.actor, self.critic, self.value, self.value_target
        if self._objective is None or self._objective.key != (*networks, self.action_prior):
            self._objective = JointObjective(*networks, self.action_prior)
        return self._objective

    def _batches(self, gradient_steps: int, batch_size: int, reward_scale: float) -> Iterator[Batch]:
        """:return: a batch for each gradient step; warns about the first of all if its rewards are very large"""
        assert self.replay_buffer is not None
        sampling = self.gamma, reward_scale, self.device, self._vec_normalize_env
        for batch in sample_batches(self.replay_buffer, gradient_steps, batch_size, *sampling):
            if self._n_updates == 0:
                self._warn_once("rewards", checks.hint_about_rewards(float(batch.rewards.abs().mean()), self.gamma))
            yield batch

    def temperature(self) -> Temperature:
        """:return: the current temperature α; if it is learned, with log α and the target entropy"""
        if self.log_ent_coef is None:
            return Temperature(self.ent_coef_tensor)
        ent_coef = th.exp(self.log_ent_coef.detach())
        return Temperature(ent_coef, self.log_ent_coef, _scalar(float(self.target_entropy), self.device))

    def _log(self, rows: th.Tensor) -> None:
        """
        Log the mean over gradient steps.

        :param rows: the metrics of each gradient step, on the CPU
        """
        # With the usual single row, mean() would take a third of the logging time
        mean = rows[0] if len(rows) == 1 else rows.mean(dim=0)
        means = Metrics(*mean.tolist())._asdict()
        del means["found_inf"]
        if self.ent_coef_optimizer is None:
            del means["ent_coef_loss"]
        else:
            self._warn_once(
                "temperature",
                checks.hint_about_temperature(
                    means["ent_coef"], self._initial_ent_coef, means["entropy"], float(self.target_entropy)
                ),
            )
        for name, value in means.items():
            self.logger.record(f"train/{name}", value)

    def _warn_once(self, about: str, hint: str | None) -> None:
        """
        :param about: subject of the warning, of which each is given once
        :param hint: the warning; None does nothing
        """
        if hint is not None and about not in self._hints_given:
            self._hints_given.add(about)
            checks.advise(hint, stacklevel=3)

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

        :raises RuntimeError: inside ``torch.autocast``
        """
        check_autocast(self.device)
        return super().learn(total_timesteps, callback, log_interval, tb_log_name, reset_num_timesteps, progress_bar)

    def _setup_learn(self, *args: Any, **kwargs: Any) -> Any:
        buffer = getattr(self, "replay_buffer", None)
        if buffer is None:
            if issubclass(self.replay_buffer_class or object, HerReplayBuffer):
                raise ValueError("A HER model loaded without an environment can only predict: load it with env=.")
            raise ValueError(
                "The model has no replay buffer to learn from: set model.replay_buffer or call load_replay_buffer."
            )
        checks.check_optimizers(self)
        # SB3 wraps the noise again for the environments of this call
        if isinstance(self.action_noise, VectorizedActionNoise) and self.action_noise.n_envs != self.n_envs:
            self.action_noise = self.action_noise.base_noise
        if self.check_finite:
            self._finite_check.remember_statistics(self)
        result = super()._setup_learn(*args, **kwargs)
        if buffer.size() == 0 and self.num_timesteps > self.learning_starts and self.gradient_steps != 0:
            checks.advise(
                "The replay buffer is empty and learning_starts has passed: the first updates learn from few transitions. "
                "Call load_replay_buffer, or increase learning_starts, for instance to model.num_timesteps + 1000.",
                stacklevel=3,
            )
        if self.check_finite:
            self._finite_check.check_first_observation(self)
        return result

    def collect_rollouts(self, *args: Any, **kwargs: Any) -> RolloutReturn:
        """
        See ``OffPolicyAlgorithm.collect_rollouts``.

        :raises NonFiniteError: if the policy's output is not finite, so that no action can be sampled
        """
        try:
            return super().collect_rollouts(*args, **kwargs)
        except NonFiniteError:
            raise
        except ValueError as error:
            if self.check_finite:
                self._finite_check.raise_for_policy(self, error)
            raise

    def _sample_action(
        self, learning_starts: int, action_noise: ActionNoise | None = None, n_envs: int = 1
    ) -> tuple[np.ndarray, np.ndarray]:
        if not self.check_finite:
            return super()._sample_action(learning_starts, action_noise, n_envs)
        self._finite_check.remember_statistics(self)
        actions, buffer_actions = super()._sample_action(learning_starts, action_noise, n_envs)
        self._finite_check.check_action(self, buffer_actions)
        return actions, buffer_actions

    def _store_transition(
        self,
        replay_buffer: ReplayBuffer,
        buffer_action: np.ndarray,
        new_obs: np.ndarray | dict[str, np.ndarray],
        reward: np.ndarray,
        dones: np.ndarray,
        infos: list[dict[str, Any]],
    ) -> None:
        if self.check_finite:
            self._finite_check.check_transition(self, new_obs, reward, dones, infos)
        super()._store_transition(replay_buffer, buffer_action, new_obs, reward, dones, infos)

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
        Load the model from a zip-file, see ``BaseAlgorithm.load`` for the arguments. Passing ``ent_coef`` replaces the saved
        temperature, also a learned one ("auto") by a fixed one (a number) and vice versa. V was learned with the old
        temperature and needs some updates to adapt.

        The file contains pickled objects, and loading it runs their code: load only files that you trust.

        :return: new model instance with loaded parameters
        """
        if isinstance(path, str | pathlib.Path) and pathlib.Path(path).is_dir():
            raise IsADirectoryError(
                f"{path} is a folder: to continue from checkpoints, construct the model and load_checkpoint."
            )
        custom_objects = dict(custom_objects or {})
        # Changed after loading: SB3 cannot load a learned temperature into a model with a fixed one, or vice versa
        ent_coef = kwargs.pop("ent_coef", custom_objects.pop("ent_coef", None))
        model: Any = super().load(path, env, device, custom_objects, print_system_info, force_reset, **kwargs)
        if ent_coef is not None and ent_coef != model.ent_coef:
            model.ent_coef = ent_coef
            model._setup_ent_coef()
        return model

    def load_replay_buffer(self, path: str | pathlib.Path | io.BufferedIOBase, truncate_last_traj: bool = True) -> None:
        """
        Load a replay buffer from a pickle file, see ``OffPolicyAlgorithm.load_replay_buffer``.

        :param path: Path to the pickled replay buffer (unpickling runs code: load only files that you trust).
        :param truncate_last_traj: With ``HerReplayBuffer``, whether to end the last trajectory
        :raises ValueError: if the buffer has other spaces or another number of environments than the model
        """
        before = getattr(self, "replay_buffer", None)  # absent if a script has deleted it to free memory
        super().load_replay_buffer(path, truncate_last_traj)
        try:
            assert self.replay_buffer is not None
            checks.check_buffer_fits(self.replay_buffer, self)
        except ValueError:
            self.replay_buffer = before
            raise

    def set_parameters(
        self, load_path_or_dict: str | TensorDict, exact_match: bool = True, device: th.device | str = "auto"
    ) -> None:
        """
        Load parameters from a given zip-file or a nested dictionary, see ``BaseAlgorithm.set_parameters``.
        """
        if isinstance(load_path_or_dict, dict):
            # PyTorch's optimizers keep the tensors they load: two models would share one state
            load_path_or_dict = copy.deepcopy(load_path_or_dict)
        super().set_parameters(load_path_or_dict, exact_match, device)

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
        Convert a model of SB3's ``SAC``: its actor, critics and temperature with their optimizers, its options, counters and
        transitions. SAC has no V: it is fitted here, to the fixed actor and critics. V̄ replaces SAC's target critics.

        The replay buffer is shared with the SAC, not copied. If it holds fewer than ``collect_steps`` transitions, the policy
        collects the rest in ``env``; these steps are counted. ``learning_starts`` is 0 afterwards, as the warm-up is over.

        :param path_or_model: SAC model, or a file that ``SAC.save`` wrote (as with ``SAC.load``: only files that you trust)
        :param env: the environment to continue in, wrapped in ``VecNormalize`` if the SAC was trained with it; None uses the
            SAC's environment
        :param fit_value_steps: number of gradient steps that fit V
        :param replay_buffer: a replay buffer, or the path of a file that ``save_replay_buffer`` wrote (a pickle: only files
            that you trust); None uses the SAC's
        :param kwargs: ``collect_steps`` (5,000), ``policy`` for a SAC with a custom policy class, ``device``, and arguments
            of this class that replace the SAC's
        :return: the new model
        :raises ValueError: if the model is no SAC, its policy has no counterpart, the environment does not fit, or V cannot
            be fitted because there is neither an environment nor a replay buffer
        """
        fit: dict[str, Any] = dict(fit_value_steps=fit_value_steps, replay_buffer=replay_buffer)
        return transfer.from_sac(cls, path_or_model, env, **fit, **kwargs)

    def to_sac(self, policy: str | type[SACPolicy] | None = None) -> SAC:
        """
        Convert to a model of SB3's ``SAC`` that predicts the same and can continue training, see ``transfer.to_sac``. The
        replay buffer and the environment are shared, not copied: continue training with only one of the two models.

        :param policy: the policy class of the SAC; None uses SB3's counterpart of this model's class
        :return: the SAC; its target critics are copies of the critics
        :raises ValueError: if ``policy`` is None and the policy class has no counterpart in SB3
        """
        return transfer.to_sac(self, policy)

    def predict_values(self, observation: np.ndarray | dict[str, np.ndarray]) -> np.ndarray:
        """
        Soft state values V(s): the expected soft return of the policy from s, Σ_k γ^k (r_{t+k} + α·H(π(·|s_{t+k}))), k from 0
        (Eq. 3 of the paper). With another ``action_prior`` than "uniform", minus the divergence from the prior replaces the
        entropy H. The unit is that of the reward after ``VecNormalize`` and ``reward_scale``.

        :param observation: one observation or a batch of n, as for ``predict`` (normalized if the model was trained with
            ``VecNormalize``)
        :return: shape (n,), or () for one observation
        """
        return predictions.values(self, observation)

    def predict_q_values(self, observation: np.ndarray | dict[str, np.ndarray], actions: np.ndarray) -> np.ndarray:
        """
        Soft action values Q_i(s, a) of every critic, in the unit of ``predict_values``. They exclude the entropy at s itself.

        :param observation: one observation or a batch of n, as for ``predict``
        :param actions: one per observation in the environment's own units, shape (n, *action_shape), or action_shape for one
            observation
        :return: shape (n, n_critics), or (n_critics,) for one observation
        :raises ValueError: if an action is outside the action space, or the number of actions is wrong
        """
        return predictions.q_values(self, observation, actions)

    def action_log_prob(self, observation: np.ndarray | dict[str, np.ndarray], actions: np.ndarray) -> np.ndarray:
        """
        Log-density of actions under the policy in the environment's units, Eq. 21 of the paper. It includes the Jacobian of
        the action scaling, so that the density integrates to 1 over the action space. The 1e-6 inside the logarithm of the
        squashing only matters where the policy is saturated (|a| > 0.999). An action at a bound is evaluated at the closest
        number inside.

        :param observation: one observation or a batch of n, as for ``predict``
        :param actions: one per observation in the environment's own units, shape (n, *action_shape), or action_shape for one
            observation
        :return: nats, shape (n,), or () for one observation
        :raises ValueError: if an action is outside the action space, or the number of actions is wrong
        """
        return predictions.log_prob(self, observation, actions)

    def entropy(self, observation: np.ndarray | dict[str, np.ndarray], n_samples: int = 128, seed: int = 0) -> np.ndarray:
        """
        Monte Carlo estimate of the policy's differential entropy over the squashed action in [-1, 1]. It uses its own random
        generator and does not affect the random numbers of training.

        :param observation: one observation or a batch of n, as for ``predict``
        :param n_samples: sampled actions per observation
        :param seed: seed of the samples
        :return: nats, shape (n,), or () for one observation
        :raises ValueError: if ``n_samples`` is not a positive whole number
        """
        checks.check_whole_number("n_samples", n_samples, minimum=1)
        return predictions.entropy(self, observation, n_samples, seed)

    def save_checkpoint(self, folder: str | pathlib.Path) -> None:
        """
        Write the complete training state to a folder, for ``load_checkpoint``. See ``checkpoint.save_checkpoint``, and
        ``checkpoint.ResumableCheckpoint`` to do this during ``learn()``.

        :param folder: folder of the run
        :raises CheckpointError: if the state cannot be stored or written
        """
        checkpoint.save_checkpoint(self, folder)

    def load_checkpoint(self, folder: str | pathlib.Path) -> checkpoint.Resumed:
        """
        Continue from the newest checkpoint in a folder, see ``checkpoint.load_checkpoint``.

        :param folder: folder of the run
        :return: true if training continues exactly as if it had never stopped; otherwise it says why not
        :raises CheckpointError: if there is no checkpoint, it is damaged, or it belongs to another model
        """
        return checkpoint.load_checkpoint(self, folder)

    def _excluded_save_params(self) -> list[str]:
        own = ["_objective", "_finite_check", "_optimizer_step", "_executor", "_hints_given"]
        return [*super()._excluded_save_params(), "value", "value_target", *own]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        state_dicts, variables = super()._get_torch_save_params()
        return [*state_dicts, "value.optimizer"], variables


def _number_at(progress: float, name: str, value: float | Schedule) -> float:
    """
    :param progress: the remaining progress, from 1 to 0
    :param name: name of the learning rate or reward scale
    :param value: a number or a function of the remaining progress
    :return: the number at that progress
    :raises ValueError: if it is not a finite, non-negative number
    """
    result: Any = value(progress) if callable(value) else value
    try:
        number = float(result)
    except (TypeError, ValueError):
        number = math.nan
    if not 0.0 <= number < math.inf:
        if not callable(value):
            raise ValueError(f"{name} must be a finite non-negative number or a schedule of such numbers, got {value!r}.")
        raise ValueError(
            f"The {name} schedule returned {result!r} at progress remaining {progress:.3f}: make it return finite "
            "non-negative numbers."
        )
    return number


@lru_cache(maxsize=16)
def _scalar(value: float, device: th.device) -> th.Tensor:
    """:return: the number as a cached tensor of shape (), an input of the graph like any other"""
    # float64 is as exact as a Python float; a tensor without dimensions does not promote float32
    return th.tensor(value, dtype=th.float64, device=device)


def _consistent_n_steps(
    replay_buffer_class: type[ReplayBuffer] | None, replay_buffer_kwargs: dict[str, Any], gamma: float, n_steps: int
) -> int:
    """
    :return: number of steps of the n-step returns, given to the model or to an n-step buffer
    :raises ValueError: if model and n-step buffer were given different numbers, since SB3 would use both
    """
    if not (isinstance(replay_buffer_class, type) and issubclass(replay_buffer_class, NStepReplayBuffer)):
        return n_steps
    own_steps = replay_buffer_kwargs.get("n_steps", n_steps if n_steps > 1 else 3)  # 3 is the buffer's default
    for name, value, own in (
        ("gamma", gamma, replay_buffer_kwargs.get("gamma", gamma)),
        ("n_steps", n_steps, own_steps if n_steps > 1 else n_steps),
    ):
        if value != own:
            raise ValueError(f"{name} is {value} for the model but {own} in replay_buffer_kwargs: pass it once, to the model.")
    return own_steps
