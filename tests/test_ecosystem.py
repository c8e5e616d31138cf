"""
Projects that train with SB3's SAC: each one's documented script, with SAC and with SACV. `make test-ecosystem` installs them.

For each: both collect the same transitions until learning starts and make as many updates, what learns with SAC learns with
SACV, and the losses are finite.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import SAC, HerReplayBuffer
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_softvalue import SACV
from tests.helpers import RandomEnv

# Only what this package warns of is an error
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default", "error:::sb3_softvalue")]

SMALL: dict[str, Any] = dict(policy_kwargs=dict(net_arch=[64, 64]), seed=0, device="cpu")
LOSSES = ("actor_loss", "critic_loss", "value_loss", "ent_coef_loss")
Script = Callable[[type[SAC]], tuple[SAC, Callable[[], object]]]


def need(module: str, package: str) -> Any:
    return pytest.importorskip(module, reason=f"{package} is not installed: make test-ecosystem", exc_type=ImportError)


def swapped(script: Script, same_steps: int | None = None) -> SACV:
    """
    Run a project's script with SAC, then with SACV, and compare the two.

    :param script: of the class: the model, and what trains it
    :param same_steps: how many of the first steps are the same for a seed; None for all until learning starts
    :return: the model of SACV, trained
    """
    models, learned = [], []
    for algorithm in (SAC, SACV):
        model, train = script(algorithm)
        assert type(model) is algorithm
        before = {name: parameter.clone() for name, parameter in model.policy.named_parameters()}
        train()
        models.append(model)
        learned.append({n: bool((p != before[n]).any()) for n, p in model.policy.named_parameters() if "target" not in n})
    sac, model = models
    assert isinstance(model, SACV) and model._n_updates == sac._n_updates > 0
    # What does not learn with SACV does not learn with SAC either: Q and V always do
    assert {name: value for name, value in learned[1].items() if name in learned[0]} == learned[0]
    assert all(value for name, value in learned[1].items() if name.startswith(("critic", "value")))
    n = model.learning_starts // model.n_envs if same_steps is None else same_steps
    for a, b in zip(stored(sac.replay_buffer, n), stored(model.replay_buffer, n), strict=True):
        np.testing.assert_array_equal(a, b)

    model.train(gradient_steps=1, batch_size=model.batch_size)
    losses = [model.logger.name_to_value[f"train/{name}"] for name in LOSSES]
    assert np.isfinite(losses).all() and all(p.isfinite().all() for p in model.policy.parameters())
    return model


def stored(buffer: ReplayBuffer, n: int) -> Iterator[np.ndarray]:
    """The observations, actions and rewards of the first n steps."""
    for array in (buffer.observations, buffer.actions, buffer.rewards):
        yield from (part[:n] for part in array.values()) if isinstance(array, dict) else (array[:n],)


def hindsight(model: SACV) -> None:
    """Four of five transitions get a goal that was reached later, and the reward that the environment gives for it."""
    buffer = model.replay_buffer
    assert isinstance(buffer, HerReplayBuffer)
    samples = buffer.sample(2_000)
    goal, achieved = (samples.next_observations[key].numpy() for key in ("desired_goal", "achieved_goal"))
    own = {row.tobytes() for row in buffer.next_observations["desired_goal"].reshape(-1, goal.shape[-1]).astype(goal.dtype)}
    relabelled = np.mean([row.tobytes() not in own for row in goal])
    assert relabelled == pytest.approx(0.8, abs=0.04)
    rewards = model.env.env_method("compute_reward", achieved, goal, [{}] * len(goal), indices=[0])[0]
    np.testing.assert_allclose(samples.rewards.numpy()[:, 0], rewards, rtol=1e-5)


def test_highway_parking_with_her() -> None:
    """HighwayEnv's scripts/parking_her.ipynb, smaller; learning starts after the first episode, which is 500 steps long."""
    highway_env = need("highway_env", "highway-env")
    gym.register_envs(highway_env)

    def script(algorithm: type[SAC]) -> tuple[SAC, Callable[[], object]]:
        env = gym.make("parking-v0", config=dict(add_walls=False))
        her_kwargs = dict(n_sampled_goal=4, goal_selection_strategy="future")
        model = algorithm(
            "MultiInputPolicy",
            env,
            replay_buffer_class=HerReplayBuffer,
            replay_buffer_kwargs=her_kwargs,
            buffer_size=int(1e6),
            learning_rate=1e-3,
            learning_starts=600,
            gamma=0.95,
            batch_size=128,
            tau=0.05,
            **SMALL,
        )
        return model, lambda: model.learn(800)

    hindsight(swapped(script))


def test_panda_push_with_her() -> None:
    """panda-gym's examples/train_push.py, with SAC instead of its DDPG."""
    need("panda_gym", "panda-gym")

    def script(algorithm: type[SAC]) -> tuple[SAC, Callable[[], object]]:
        env = gym.make("PandaPush-v3")
        model = algorithm(policy="MultiInputPolicy", env=env, replay_buffer_class=HerReplayBuffer, **SMALL)
        return model, lambda: model.learn(total_timesteps=500)

    hindsight(swapped(script, same_steps=50))  # each reset without a seed draws a new one


@pytest.mark.parametrize("normalized", [False, True])
def test_target_gym_aeroplane(normalized: bool) -> None:
    """TargetGym's README. Its observations reach 9000: unless they are normalized the actor saturates, SAC's as well."""
    target_gym = need("target_gym", "target-gym")

    def script(algorithm: type[SAC]) -> tuple[SAC, Callable[[], object]]:
        env = target_gym.GymnasiumPlane()
        model = algorithm("MlpPolicy", VecNormalize(DummyVecEnv([lambda: env])) if normalized else env, **SMALL)
        return model, lambda: model.learn(total_timesteps=500, log_interval=4)

    model = swapped(script)
    observations = np.asarray(model.replay_buffer.observations[:500, 0])
    if normalized:
        observations = model.get_vec_normalize_env().normalize_obs(observations)
    q = model.predict_q_values(observations, model.predict(observations)[0])
    assert np.isfinite(q).all() and np.isfinite(model.predict_values(observations)).all()


def test_pcgym_stirred_tank() -> None:
    """pc-gym's docs/guides/training.md, with SAC instead of its PPO."""
    pcgym = need("pcgym", "pcgym")
    n_steps = 100
    env_params = {
        "N": n_steps,
        "tsim": 26,
        "SP": {"Ca": [0.85] * (n_steps // 2) + [0.9] * (n_steps // 2)},
        "o_space": {"low": np.array([0.7, 300, 0.8]), "high": np.array([1, 350, 0.9])},
        "a_space": {"low": np.array([295]), "high": np.array([302])},
        "x0": np.array([0.8, 330, 0.8]),
        "model": "cstr",
        "r_scale": {"Ca": 1e3},
        "normalise_a": True,
        "normalise_o": True,
        "noise": True,
        "integration_method": "casadi",
        "noise_percentage": 0.001,
    }

    def script(algorithm: type[SAC]) -> tuple[SAC, Callable[[], object]]:
        model = algorithm("MlpPolicy", pcgym.make_env(env_params), learning_rate=0.001, **SMALL)
        return model, lambda: model.learn(500)

    model = swapped(script)
    _, data = pcgym.make_env(env_params).get_rollouts({"SACV": model}, reps=2)
    assert np.isfinite(data["SACV"]["r"]).all() and data["SACV"]["x"].shape[1:] == (n_steps, 2)


def test_compressed_buffer() -> None:
    """sb3-extra-buffers' examples/example_train_replay.py, with SAC instead of its DQN: compression loses nothing."""
    compressed = need("sb3_extra_buffers.compressed", "sb3-extra-buffers")
    space = spaces.Box(0, 255, (1, 36, 36), np.uint8)
    dtypes = compressed.find_buffer_dtypes(obs_shape=space.shape, elem_dtype=space.dtype, compression_method="rle-jit")
    kwargs = dict(dtypes=dtypes, compression_method="rle-jit")
    options = {**SMALL, "batch_size": 16, "buffer_size": 500}

    def script(algorithm: type[SAC], buffer: Any = compressed.CompressedReplayBuffer) -> tuple[SAC, Callable[[], object]]:
        chosen = {} if buffer is ReplayBuffer else dict(replay_buffer_class=buffer, replay_buffer_kwargs=kwargs)
        model = algorithm("CnnPolicy", RandomEnv(space), **chosen, **options)
        return model, lambda: model.learn(150)

    # Compressed arrays of bytes cannot be compared as they lie
    model = swapped(script, same_steps=0)
    plain, train = script(SACV, ReplayBuffer)
    train()
    plain.train(gradient_steps=1, batch_size=16)
    for name, value in plain.policy.state_dict().items():
        assert th.equal(value, model.policy.state_dict()[name]), name


@pytest.mark.parametrize("execution", ["eager", "compiled"])
def test_imitation_sqil(execution: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """
    imitation's docs/tutorials/8a_train_sqil_sac.ipynb, on Pendulum-v1 with random demonstrations: its own are on a hub.

    With today's SB3 it fails as it is, for SAC too: its buffer joins two samples field by field, and ``discounts`` is None.
    """
    sqil = need("imitation.algorithms.sqil", "imitation")
    from imitation.data import rollout
    from imitation.util.util import make_vec_env

    def script(algorithm: type[SAC]) -> tuple[SAC, Callable[[], object]]:
        venv = make_vec_env("Pendulum-v1", rng=np.random.default_rng(seed=42))
        demonstrations = rollout.generate_transitions(None, venv, n_timesteps=400, rng=np.random.default_rng(0))
        rl_kwargs = SMALL if algorithm is SAC else {**SMALL, "execution": execution}
        trainer = sqil.SQIL(
            venv=venv, demonstrations=demonstrations, policy="MlpPolicy", rl_algo_class=algorithm, rl_kwargs=rl_kwargs
        )
        return trainer.rl_algo, lambda: trainer.train(total_timesteps=400)

    def sample(buffer: Any, batch_size: int, env: Any = None) -> ReplayBufferSamples:
        own = ReplayBuffer.sample(buffer, batch_size // 2, env)
        expert = buffer.expert_buffer.sample(batch_size - batch_size // 2, env)
        return ReplayBufferSamples(*(th.cat(parts) for parts in zip(own, expert, strict=True) if parts[0] is not None))

    for algorithm in (SAC, SACV):
        with pytest.raises(TypeError, match="expected Tensor as element 0 in argument 0, but got NoneType"):
            script(algorithm)[1]()
    monkeypatch.setattr(sqil.SQILReplayBuffer, "sample", sample)
    model = swapped(script)
    rewards = model.replay_buffer.sample(model.batch_size).rewards
    assert rewards.sum() == model.batch_size / 2 and set(rewards.unique().tolist()) == {0.0, 1.0}


def test_finrl_model_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """FinRL's DRLAgent with its own hyperparameters: SACV is "sac" in its table of models. The prices are drawn at random."""
    models = need("finrl.agents.stablebaselines3.models", "FinRL")
    import pandas as pd
    from finrl.meta.env_stock_trading.env_stocktrading import StockTradingEnv

    n_days, stocks = 120, ["AAA", "BBB"]
    prices = 100 * np.exp(np.random.default_rng(0).normal(0, 0.01, (n_days, 2)).cumsum(0))
    days = pd.date_range("2024-01-01", periods=n_days).strftime("%Y-%m-%d")
    rows = [
        dict(day=i, date=days[i], tic=tic, close=prices[i, j], macd=prices[i, j] - 100, turbulence=0.0)
        for i in range(n_days)
        for j, tic in enumerate(stocks)
    ]
    market = dict(
        df=pd.DataFrame(rows).set_index("day"),
        stock_dim=2,
        hmax=100,
        initial_amount=1_000_000,
        num_stock_shares=[0, 0],
        buy_cost_pct=[0.001] * 2,
        sell_cost_pct=[0.001] * 2,
        reward_scaling=1e-4,
        state_space=1 + 2 * 2 + 2,
        action_space=2,
        tech_indicator_list=["macd"],
    )

    def script(algorithm: type[SAC]) -> tuple[SAC, Callable[[], object]]:
        monkeypatch.setitem(models.MODELS, "sac", algorithm)
        env, _ = StockTradingEnv(**market).get_sb_env()
        agent = models.DRLAgent(env=env)
        model = agent.get_model("sac", seed=0, verbose=0, policy_kwargs=SMALL["policy_kwargs"])
        return model, lambda: agent.train_model(model=model, tb_log_name="sac", total_timesteps=400)

    model = swapped(script)
    assert model.ent_coef == "auto_0.1" and model.batch_size == 64
    account, actions = models.DRLAgent.DRL_prediction(model=model, environment=StockTradingEnv(**market))
    assert np.isfinite(account["account_value"]).all() and len(actions) == n_days - 1


@pytest.mark.parametrize("algorithm", [SAC, SACV])
def test_godot_exporter(algorithm: type[SAC], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """
    godot-rl's export_model_as_onnx. As it is, today's PyTorch cannot export either class: the check of the distribution's
    arguments depends on the data. Without that check, both are exported, and act as in PyTorch.
    """
    exporter = need("godot_rl.wrappers.onnx.stable_baselines_export", "godot-rl")
    onnxruntime = need("onnxruntime", "onnxruntime")
    model = algorithm("MlpPolicy", "Pendulum-v1", policy_kwargs=dict(net_arch=[8]))
    path = str(tmp_path / "model.onnx")
    with pytest.raises(Exception, match="Could not guard on data-dependent expression"):
        exporter.export_model_as_onnx(model, path, use_obs_array=True)

    monkeypatch.setattr(th.distributions.Distribution, "_validate_args", False)
    exporter.export_model_as_onnx(model, path, use_obs_array=True)
    observations = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    session = onnxruntime.InferenceSession(path)
    outputs = session.run(None, {"obs": observations, "state_ins": np.zeros(1, np.float32)})
    np.testing.assert_allclose(2 * outputs[0], model.predict(observations, deterministic=True)[0], atol=1e-5)


def test_mlpro_outside_learn() -> None:
    """mlpro-int-sb3's own test of SAC: MLPro calls `_sample_action` and `train()`, and the model has no environment."""
    wrappers = need("mlpro_int_sb3.wrappers", "mlpro-int-sb3")
    from mlpro.bf import Log
    from mlpro.rl import Agent, RLScenario, RLTraining
    from mlpro.rl.pool.envs.robotinhtm import RobotHTM

    def script(algorithm: type[SAC]) -> tuple[SAC, Callable[[], object]]:
        class Scenario(RLScenario):
            C_NAME = "Matrix"

            def _setup(self, p_mode: Any, p_ada: bool, p_visualize: bool, p_logging: Any) -> Any:
                self._env = RobotHTM(
                    p_reset_seed=False, p_seed=2, p_target_mode="fix", p_visualize=False, p_logging=Log.C_LOG_NOTHING
                )
                policy = algorithm(
                    policy="MlpPolicy",
                    env=None,
                    buffer_size=10_000,
                    _init_setup_model=False,
                    policy_kwargs=dict(activation_fn=th.nn.ReLU, net_arch=[10]),
                    gradient_steps=1,
                    train_freq=4,
                    learning_starts=100,
                    seed=2,
                )
                self.wrapped = wrappers.WrPolicySB32MLPro(
                    p_sb3_policy=policy,
                    p_cycle_limit=self._cycle_limit,
                    p_observation_space=self._env.get_state_space(),
                    p_action_space=self._env.get_action_space(),
                    p_ada=p_ada,
                    p_logging=p_logging,
                )
                return Agent(p_policy=self.wrapped, p_envmodel=None, p_name="Smith", p_ada=p_ada, p_logging=p_logging)

        training = RLTraining(
            p_scenario_cls=Scenario, p_cycle_limit=400, p_stagnation_limit=0, p_visualize=False, p_logging=False
        )
        return training.get_scenario().wrapped.sb3, training.run

    model = swapped(script)
    assert model.num_timesteps == 400
