"""SACV: the original Soft Actor-Critic, with its state-value network, as a Stable-Baselines3 algorithm."""

from typing import Any, ClassVar, NoReturn, TypeVar

import torch as th
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.preprocessing import get_action_dim
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule
from stable_baselines3.common.utils import update_learning_rate
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.sac.sac import SAC

from sb3_softvalue import checks, update
from sb3_softvalue.execution import CapturedActions, Executor, OptimizerStep, check_autocast, sample_batches, updates_to_come
from sb3_softvalue.guard import Guarded
from sb3_softvalue.networks import ValueNetwork
from sb3_softvalue.policies import CnnPolicy, MlpPolicy, MultiInputPolicy, SACVPolicy, no_critic_target
from sb3_softvalue.reading import Readings
from sb3_softvalue.saving import Saving
from sb3_softvalue.schedules import Schedules

SelfSACV = TypeVar("SelfSACV", bound="SACV")


class SACV(Readings, Saving, Guarded):
    """
    Soft Actor-Critic with a state-value network (SAC v1).

    The algorithm of Haarnoja et al. 2018, https://arxiv.org/abs/1801.01290: a stochastic actor, soft Q-functions, a
    separate state-value network V and its Polyak-averaged target V̄ from which the Q-functions bootstrap. SB3's ``SAC``
    has no V and bootstraps from target Q-functions; everything else about it holds here too.

    :param policy: The policy model to use (MlpPolicy, CnnPolicy, MultiInputPolicy, or a subclass of ``SACVPolicy``)
    :param env: The environment to learn from (if registered in Gym, can be str)
    :param learning_rate: of all networks' optimizers, number or function of the current progress remaining (from 1 to 0)
    :param buffer_size: size of the replay buffer
    :param learning_starts: how many steps of the model to collect transitions for before learning starts
    :param batch_size: Minibatch size for each gradient update
    :param tau: the soft update coefficient ("Polyak update", between 0 and 1) of the target value; 1 copies
    :param gamma: the discount factor
    :param train_freq: Update the model every ``train_freq`` steps, or a tuple like ``(5, "step")`` or ``(2, "episode")``
    :param gradient_steps: How many gradient steps to do after each rollout (see ``train_freq``); -1: one for each of its steps
    :param action_noise: for hard exploration, see ``common.noise``; None adds none
    :param replay_buffer_class: Replay buffer class to use (for instance ``HerReplayBuffer``); None selects it from the spaces
    :param replay_buffer_kwargs: Keyword arguments to pass to the replay buffer on creation.
    :param optimize_memory_usage: Enable a memory efficient variant of the replay buffer, see SB3 issue 37
    :param n_steps: When n_step > 1, uses n-step return (with the NStepReplayBuffer) when updating the Q-value network.
    :param ent_coef: Entropy regularization coefficient, the temperature α, inverse of the paper's reward scale. "auto" learns
        it, "auto_0.1" from 0.1 on
    :param target_update_interval: update the target value after every ``target_update_interval`` gradient steps, counted
        over the life of the model (SAC's count starts anew at each call of ``train()``, SB3 issue 2158).
        The paper's hard updates every 1000 environment steps with 4 gradient steps each are
        ``tau=1.0, target_update_interval=4000, gradient_steps=4``.
    :param target_entropy: target entropy when learning ``ent_coef`` (``ent_coef = 'auto'``)
    :param use_sde: Whether to use generalized State Dependent Exploration (gSDE) instead of action noise
    :param sde_sample_freq: Sample a new noise matrix every n steps with gSDE; -1 only at the beginning of the rollout
    :param use_sde_at_warmup: Whether to use gSDE instead of uniform sampling before learning starts
    :param stats_window_size: number of episodes that the logged success rate, episode length and reward are averaged over
    :param tensorboard_log: the log location for tensorboard (if None, no logging)
    :param policy_kwargs: additional arguments to be passed to the policy on creation, see ``SACVPolicy``
    :param verbose: Verbosity level: 0 for no output, 1 for info messages, 2 for debug messages
    :param seed: Seed for the pseudo random generators
    :param device: Device (cpu, cuda, ...) on which the code should be run; "auto" takes the GPU if there is one
    :param _init_setup_model: Whether or not to build the network at the creation of the instance
    :param reward_scale: factor of the rewards in the Q target, a positive number or a function of the current progress
        remaining (paper, section 5.2). It scales V and Q as well, unlike ``ent_coef = 1 / reward_scale``.
    :param qf_learning_rate: learning rate of the critics, number or schedule; None takes ``learning_rate``
    :param vf_learning_rate: learning rate of the value network, number or schedule; None takes ``learning_rate``
    :param ent_coef_learning_rate: learning rate of the temperature, number or schedule; None takes ``learning_rate``
    :param max_grad_norm: the maximum gradient norm of each optimizer (actor, critics, value, temperature) by itself;
        None does not clip
    :param action_prior: p(a) over the squashed action, of which the objective maximises α·(log p(a) - log π(a|s)): "uniform"
        leaves its constant out, which makes the bonus the entropy; "normalized_uniform" has it (d·ln 2 nats a step less, so
        that no bonus is positive: the same optimal policy, but where episodes end early; there it takes away a reward for
        staying alive); "normal" is N(0, I), as in the authors' code
    :param execution: how the update runs: "eager", "compiled", "cuda_graph"; "auto" takes "compiled" or "cuda_graph" where it
        is possible and repays itself; all agree up to rounding. "mixed" is "compiled" with large products in bfloat16.
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
        checks.check_arguments(policy, self.policy_aliases, policy_kwargs, replay_buffer_kwargs, device)
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
            replay_buffer_kwargs=replay_buffer_kwargs and dict(replay_buffer_kwargs),  # which SB3 writes into
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
        checks.check_options(self)
        # Not SAC's: it builds on a twin Q target, which does not exist here
        super(SAC, self)._setup_model()
        self._create_aliases()
        target_entropy = -get_action_dim(self.action_space) if self.target_entropy == "auto" else self.target_entropy
        self.target_entropy = checks.finite_number("target_entropy", target_entropy, "'auto'")
        self._setup_ent_coef()

    def _setup_lr_schedule(self) -> None:
        # Made again from the saved arguments at each load, so that they are never pickled
        names = ("learning_rate", "qf_learning_rate", "vf_learning_rate", "ent_coef_learning_rate", "reward_scale")
        self._schedules = Schedules(**{name: getattr(self, name) for name in names})
        self.lr_schedule = self._schedules["learning_rate"]

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
        self.actor, self.critic = self.policy.actor, self.policy.critic
        self.value, self.value_target = self.policy.value, self.policy.value_target
        # What refers to the networks belongs to the same policy
        self._update_target = update.TargetUpdate(self.value, self.value_target)
        self._optimizer_step: OptimizerStep | None = None
        objective = update.JointObjective(self.policy, self.action_prior)
        announce = print if self.verbose >= 1 else lambda line: None
        self._guard_networks()
        self.policy.captured_actions = CapturedActions(self.policy) if self.device.type == "cuda" else None
        self._executor = Executor(self.execution, objective, self.device, self._resolved_execution, announce)

    @property
    def critic_target(self) -> NoReturn:  # type: ignore[override]  # an attribute in SAC
        """Not there: SAC v1 has ``value_target`` instead."""
        no_critic_target(type(self).__name__)

    @staticmethod
    def _wrap_env(env: GymEnv, verbose: int = 0, monitor_wrapper: bool = True) -> VecEnv:
        # Whatever else it is, SB3 says so
        if hasattr(env, "action_space"):
            checks.check_action_space(env.action_space)
            checks.check_observation_space(env.observation_space)
        return checks.check_wrappers(SAC._wrap_env(env, verbose, monitor_wrapper))

    def train(self, gradient_steps: int, batch_size: int = 64) -> None:
        """
        Sample the replay buffer and do the updates: joint gradient step, then the target value when it is due.

        :param gradient_steps: number of gradient steps
        :param batch_size: transitions of each
        """
        self._executor.prepare(self._n_updates + gradient_steps + updates_to_come(self))
        self.policy.set_training_mode(True)  # for batch norm and dropout
        # The last rollout may go beyond the total, where a schedule that ends at zero would be negative
        self._current_progress_remaining = progress = max(0.0, self._current_progress_remaining)
        step = self._prepare_optimizers(progress)
        reward_scale = self._schedules.at("reward_scale", progress)
        if callable(self.reward_scale):
            self.logger.record("train/reward_scale", reward_scale)
        self._check_parameters()

        metrics, closed = [], None
        assert self.replay_buffer is not None
        sampling = (self.replay_buffer, gradient_steps, batch_size, self.gamma, self.device, self._vec_normalize_env)
        for batch in sample_batches(*sampling):
            if self._n_updates == 0:
                self._check_rewards(batch, reward_scale)
            gradients, step_metrics = self._executor(
                step.params, batch, update.draw_noise(self.actor, batch_size, self.device), self._temperature(), reward_scale
            )
            closed = self._gate(closed, batch, step_metrics)
            step(gradients, self.max_grad_norm, closed)
            metrics.append(step_metrics)
            self._n_updates += 1
            if self._n_updates % self.target_update_interval == 0:
                self._update_target(self.tau)
        self._resolved_execution = self._executor.resolved
        reports = th.stack(metrics).cpu() if metrics else None  # where it waits for the device
        if closed is not None and reports is not None and reports[:, -1].any():
            self._stop_after(batch, reports)
        self._record(reports)

    def _prepare_optimizers(self, progress: float) -> OptimizerStep:
        """
        Set each optimizer's learning rate and log those that are not ``learning_rate``.

        :param progress: the remaining progress, from 1 to 0
        :return: the step of all optimizers
        """
        self._schedules.at("learning_rate", progress)
        self._update_learning_rate(self.actor.optimizer)
        optimizers = {"qf_learning_rate": self.critic.optimizer, "vf_learning_rate": self.value.optimizer}
        if self.ent_coef_optimizer is not None:
            optimizers["ent_coef_learning_rate"] = self.ent_coef_optimizer
        for name, optimizer in optimizers.items():
            learning_rate = self._schedules.at(name, progress)
            update_learning_rate(optimizer, learning_rate)
            if getattr(self, name) is not None:
                self.logger.record(f"train/{name}", learning_rate)
        current = [self.actor.optimizer, *optimizers.values()]
        if self._optimizer_step is None or not self._optimizer_step.is_current(current):
            self._optimizer_step = OptimizerStep(current)
        return self._optimizer_step

    def _temperature(self) -> update.Temperature:
        """:return: the temperature of the next gradient step"""
        if self.log_ent_coef is None:
            return update.Temperature(self.ent_coef_tensor)
        assert isinstance(self.target_entropy, float)
        return update.Temperature(th.exp(self.log_ent_coef.detach()), self.log_ent_coef, self.target_entropy)

    def _record(self, reports: th.Tensor | None) -> None:
        """
        Log the mean over gradient steps.

        :param reports: of each gradient step a row, see ``update.objective_gradients``; None if there was no step
        """
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        if reports is None:
            return
        means = update.mean_metrics(reports)
        if self.ent_coef_optimizer is not None:
            self._check_temperature(means["ent_coef"], means["entropy"])
        for name, mean in means.items():
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
        """Train, see ``BaseAlgorithm.learn``."""
        check_autocast(self.device)
        return super().learn(total_timesteps, callback, log_interval, tb_log_name, reset_num_timesteps, progress_bar)
