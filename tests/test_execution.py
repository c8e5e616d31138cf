"""Every execution of the update against the eager one, and which of them is chosen when."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import HerReplayBuffer
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from torch._dynamo.utils import counters

from sb3_softvalue import SACV
from sb3_softvalue.execution import choice, compiled, cuda_graph, executor, updates_to_come
from sb3_softvalue.update import objective_gradients
from tests.helpers import (
    BatchNormDropoutExtractor,
    ClockEnv,
    DoubleExtractor,
    PointGoalEnv,
    RandomEnv,
    as_double,
    assert_same,
    box_env,
    filled,
    rng_state,
    save_and_load,
    seed_everything,
    small,
    train,
)
from tests.test_reference import assert_equal_models, train_both
from tests.test_save_load import everything

# Each execution is another order of the same sums. In float64 that is all there is. In float32 Adam turns the rounding of
# a gradient near zero into a part of the learning rate (1e-3), over 200 updates; SGD does not.
TOLERANCE = {
    "float64": dict(rtol=1e-9, atol=1e-10),
    "float32 Adam": dict(rtol=2e-3, atol=5e-4),
    "float32 SGD": dict(rtol=1e-4, atol=1e-5),
}
needs_cuda = pytest.mark.skipif(not th.cuda.is_available(), reason="needs a CUDA device")
# Execution, and device where it is not the CPU
FAST = ["compiled", *(pytest.param(how, marks=needs_cuda) for how in ("cuda_graph cuda", "compiled cuda"))]
# Calls of train() that make up 200 updates, with the progress remaining at each
CALLS = ((1, 1.0), (4, 0.9), (1, 0.9), (94, 0.5), (100, 0.1))


def normalized_env() -> VecNormalize:
    return VecNormalize(DummyVecEnv([box_env, box_env]))


def image_env() -> RandomEnv:
    return RandomEnv(spaces.Box(0, 255, shape=(36, 36, 1), dtype="uint8"))


SGD = dict(optimizer_class=th.optim.SGD)
# name: environment, policy, options, row of the tolerance table
SCENARIOS: dict[str, tuple[Any, str, dict[str, Any], str]] = {
    "plain": (box_env, "MlpPolicy", dict(policy_kwargs=dict(net_arch=[16, 16])), "float32 Adam"),
    "float64, schedules, prior, hard target": (
        box_env,
        "MlpPolicy",
        dict(
            policy_kwargs=dict(net_arch=dict(pi=[8, 7], qf=[9], vf=[6, 8]), features_extractor_class=DoubleExtractor),
            learning_rate=lambda progress: 1e-2 * progress,
            vf_learning_rate=5e-3,
            reward_scale=lambda progress: 1.0 + progress,
            action_prior="normal",
            tau=1.0,
            target_update_interval=3,
        ),
        "float64",
    ),
    "float64, fixed temperature, normalized prior, clipped, 3 critics": (
        box_env,
        "MlpPolicy",
        dict(
            policy_kwargs=dict(net_arch=[8], n_critics=3, features_extractor_class=DoubleExtractor),
            ent_coef=0.3,
            action_prior="normalized_uniform",
            max_grad_norm=0.5,
            reward_scale=5.0,
        ),
        "float64",
    ),
    "float64, shared": (
        box_env,
        "MlpPolicy",
        dict(policy_kwargs=dict(net_arch=[8], features_extractor_class=DoubleExtractor, share_features_extractor=True)),
        "float64",
    ),
    "n-step": (lambda: ClockEnv(episode_length=7), "MlpPolicy", dict(n_steps=3, policy_kwargs=SGD), "float32 SGD"),
    "HER": (PointGoalEnv, "MultiInputPolicy", dict(replay_buffer_class=HerReplayBuffer, policy_kwargs=SGD), "float32 SGD"),
    "VecNormalize": (normalized_env, "MlpPolicy", dict(policy_kwargs=SGD), "float32 SGD"),
    "shared image": (
        image_env,
        "CnnPolicy",
        dict(
            policy_kwargs=SGD
            | dict(net_arch=[8], features_extractor_kwargs=dict(features_dim=8), share_features_extractor=True)
        ),
        "float32 SGD",
    ),
}


def prepared(name: str, how: str, device: str = "cpu") -> SACV:
    """The scenario's model with a filled buffer."""
    make_env, policy, options, row = SCENARIOS[name]
    options = dict(options, policy_kwargs=dict(dict(net_arch=[8]) | options["policy_kwargs"]), execution=how)
    model = filled(make_env(), policy, **(dict(learning_rate=1e-3, device=device) | options))
    return as_double(model) if row == "float64" else model


def executed(how: str) -> tuple[str, str]:
    """Execution and device, from one of ``FAST`` or "eager"."""
    execution, _, device = how.partition(" ")
    return execution, device or "cpu"


def run(model: SACV, calls: tuple[tuple[int, float], ...] = CALLS) -> list[dict[str, float]]:
    """Call ``train()`` several times from one state of the random generators; gives what was logged."""
    seed_everything(4)
    logs = []
    for gradient_steps, progress in calls:
        model._current_progress_remaining = progress
        logs.append(train(model, gradient_steps))
    return logs


def assert_agree(model: SACV, expected: SACV, **tolerance: float) -> None:
    """Parameters, target, temperature, states of all optimizers and counters; the random generators too."""

    def compare(actual: Any, expected: Any, name: str) -> None:
        if isinstance(expected, dict):
            assert set(actual) == set(expected), name
            for key in expected:
                compare(actual[key], expected[key], f"{name}.{key}")
        elif isinstance(expected, th.Tensor):
            th.testing.assert_close(actual, expected, msg=lambda text: f"{name}: {text}", check_device=False, **tolerance)

    compare(model.get_parameters(), expected.get_parameters(), "model")
    if expected.log_ent_coef is not None:
        compare(model.log_ent_coef, expected.log_ent_coef, "log_ent_coef")
    assert model._n_updates == expected._n_updates


@pytest.mark.parametrize("how", FAST)
@pytest.mark.parametrize("name", SCENARIOS)
def test_agrees_with_eager(name, how):
    tolerance = TOLERANCE[SCENARIOS[name][-1]]
    execution, device = executed(how)
    expected, model = prepared(name, "eager", device), prepared(name, execution, device)
    assert_same(model.get_parameters(), expected.get_parameters())
    counters.clear()
    expected_logs, expected_rng = run(expected), rng_state()
    logs, rng = run(model), rng_state()
    assert_agree(model, expected, **tolerance)
    assert_same(rng, expected_rng)
    for log, expected_log in zip(logs, expected_logs, strict=True):
        assert set(log) == set(expected_log)
        for key, value in expected_log.items():
            assert log[key] == pytest.approx(value, rel=1e-3, abs=1e-3), key
    if how == "compiled":
        # One graph for all schedules, temperatures and numbers of gradient steps
        assert counters["aot_autograd"]["total"] == 1
    assert model._resolved_execution == execution


@pytest.mark.parametrize("dtype", [th.float64, th.float32])
def test_compiled_agrees_with_reference(dtype):
    extractor = dict(features_extractor_class=DoubleExtractor) if dtype == th.float64 else {}
    policy_kwargs = dict(net_arch=[8], optimizer_class=th.optim.SGD) | extractor
    model = filled(box_env(), policy_kwargs=policy_kwargs, learning_rate=1e-2, execution="compiled")
    reference = train_both(as_double(model) if dtype == th.float64 else model, dtype)
    assert_equal_models(model, reference, **TOLERANCE["float64" if dtype == th.float64 else "float32 SGD"])


@pytest.mark.parametrize("how", FAST)
def test_agrees_after_load_and_set_parameters(how, tmp_path):
    """Compiled and captured functions must not hold on to the parameters that were there before."""
    execution, device = executed(how)
    other, *models = (prepared("plain", each, device) for each in ("eager", "eager", execution))
    run(other, ((7, 1.0),))
    for index, model in enumerate(models):
        run(model, ((5, 1.0),))
        model.set_parameters(other.get_parameters())
        run(model, ((5, 1.0),))
        model.policy.load_from_vector(model.policy.parameters_to_vector() * 0.9)
        run(model, ((5, 1.0),))
        models[index] = save_and_load(model, tmp_path / str(index))
        assert models[index].execution == models[index]._resolved_execution == ("eager" if index == 0 else execution)
        run(models[index], ((5, 1.0), (2, 1.0)))
        # Another batch size is another graph
        train(models[index], 1)
        models[index].train(3, batch_size=16)
    assert_agree(models[1], models[0], **TOLERANCE["float32 Adam"])


def test_two_models_do_not_share_a_graph():
    """Graphs are looked up without guards: those of models alike in shape but not in kind must not be taken for each other."""
    kwargs = [dict(net_arch=[8], activation_fn=fn) for fn in (th.nn.ReLU, th.nn.Tanh)]
    for policy_kwargs in kwargs:
        expected, model = (filled(box_env(), policy_kwargs=policy_kwargs, execution=how) for how in ("eager", "compiled"))
        run(expected, ((5, 1.0),))
        run(model, ((5, 1.0),))
        assert_agree(model, expected, **TOLERANCE["float32 Adam"])


class NormalizingExtractor(FlattenExtractor):
    """
    Subtracts a mean that is not learned; what else it does to it, or to the observations, is for the tests to say.

    :param observation_space: of the environment
    :param habit: "none", "replaces" its mean at each call, or "draws" random numbers
    """

    def __init__(self, observation_space: spaces.Space, habit: str = "none"):
        super().__init__(observation_space)
        self.register_buffer("mean", th.zeros(self.features_dim))
        self.habit = habit

    def forward(self, observations: th.Tensor) -> th.Tensor:
        features = super().forward(observations)
        if self.habit == "replaces":
            self.mean = 0.9 * self.mean + 0.1 * features.detach().mean(dim=0)
        if self.habit == "draws":
            features = features + 0.1 * th.randn_like(features)
        return features - self.mean


def freeze_log_ent_coef(model: SACV) -> None:
    model.log_ent_coef.requires_grad_(False)


def freeze_a_layer(model: SACV) -> None:
    for param in model.critic.qf0[0].parameters():
        param.requires_grad_(False)


def replace_buffers(model: SACV) -> None:
    for network in (model.actor, model.critic, model.value, model.value_target):
        network.features_extractor.mean = th.full((3,), 0.5)


def replace_an_activation(model: SACV) -> None:
    model.actor.latent_pi[1] = th.nn.Tanh()


@pytest.mark.parametrize("how", FAST)
@pytest.mark.parametrize("change", [freeze_log_ent_coef, freeze_a_layer, replace_buffers, replace_an_activation])
def test_a_change_after_the_first_update_is_seen(change, how):
    execution, device = executed(how)
    if device == "cuda" and change is replace_buffers:
        pytest.skip("an extractor with buffers of its own is not captured")
    kwargs = dict(
        net_arch=[8], features_extractor_class=NormalizingExtractor if change is replace_buffers else FlattenExtractor
    )
    models = [filled(box_env(), policy_kwargs=kwargs, execution=each, device=device) for each in ("eager", execution)]
    for model in models:
        run(model, ((5, 1.0),))
        change(model)
        run(model, ((10, 1.0),))
    assert_agree(models[1], models[0], **TOLERANCE["float32 Adam"])


@pytest.mark.parametrize("habit, reason", [("replaces", "mean is replaced inside"), ("draws", "draws random numbers inside")])
def test_a_network_with_habits_is_not_compiled(habit, reason, monkeypatch, capsys):
    kwargs = dict(net_arch=[8], features_extractor_class=NormalizingExtractor, features_extractor_kwargs=dict(habit=habit))
    with pytest.raises(RuntimeError, match=f"execution='compiled' failed.*{reason}"):
        run(filled(box_env(), policy_kwargs=kwargs, execution="compiled"), ((1, 1.0),))
    monkeypatch.setattr(choice, "BREAK_EVEN_UPDATES", 1)
    expected, model = (filled(box_env(), policy_kwargs=kwargs, execution=how, verbose=1) for how in ("eager", "auto"))
    run(expected, ((5, 1.0),))
    run(model, ((5, 1.0),))
    assert reason in capsys.readouterr().out and model._resolved_execution == "eager"
    assert_same(model.get_parameters(), expected.get_parameters())


class TestChoice:
    """What "auto" and explicit requests come to, without compiling anything."""

    @pytest.fixture(autouse=True)
    def compilations(self, monkeypatch) -> list[Any]:
        """Compiled gradients are eager ones that count how often they were made."""
        made: list[Any] = []

        def pretend(objective: Any, mixed: bool) -> Any:
            assert not mixed
            made.append(objective)
            return partial(objective_gradients, objective)

        monkeypatch.setattr(executor, "CompiledGradients", pretend)
        monkeypatch.setattr(choice, "BREAK_EVEN_UPDATES", 50)
        return made

    def test_short_runs_are_eager(self, compilations, capsys):
        model = small(SACV, box_env(), verbose=1)
        model.learn(30)
        assert model._resolved_execution == "eager" and not compilations
        out = capsys.readouterr().out
        assert out.count("Update executed by") == 1
        assert "Update executed by 'eager': 20 updates are too few to repay a compilation (50)" in out

    def test_long_run_compiles_at_once(self, compilations, capsys):
        model = small(SACV, box_env(), verbose=1)
        model.learn(70)
        assert model._resolved_execution == "compiled" and len(compilations) == 1
        assert capsys.readouterr().out.count("Update executed by 'compiled': 60 updates repay the preparation") == 1

    def test_no_end(self, compilations, capsys):
        """Until a callback stops it."""
        model = small(SACV, box_env(), verbose=1)
        model.learn(float("inf"), callback=lambda local, _: local["self"].num_timesteps < 30)
        assert model._resolved_execution == "compiled" and "inf updates repay" in capsys.readouterr().out

    def test_many_short_runs_compile_once(self, compilations):
        model = small(SACV, box_env())
        for _ in range(20):
            model.learn(15, reset_num_timesteps=False)
        assert model._resolved_execution == "compiled" and len(compilations) == 1

    def test_one_long_train_compiles(self, compilations):
        train(filled(box_env()), 60)
        assert len(compilations) == 1

    @pytest.mark.parametrize(
        "options, n_updates",
        [
            (dict(gradient_steps=-1), 60),
            (dict(train_freq=5, gradient_steps=2), 25),
            (dict(gradient_steps=3), 180),
            (dict(train_freq=(1, "episode"), gradient_steps=100), 0),
        ],
    )
    def test_updates_to_come(self, options, n_updates):
        model = small(SACV, box_env(), **options)
        model._setup_learn(60)
        assert updates_to_come(model) == pytest.approx(n_updates, abs=2)

    def test_resolution_is_saved(self, compilations, tmp_path):
        model = small(SACV, box_env())
        model.learn(70)
        loaded = save_and_load(model, tmp_path / "model")
        assert loaded._resolved_execution == "compiled" and len(compilations) == 1
        loaded.learn(5, reset_num_timesteps=False)
        assert loaded._resolved_execution == "compiled" and len(compilations) == 2

    @pytest.mark.parametrize(
        "options, reason",
        [
            (dict(use_sde=True), "gSDE draws its noise inside the network"),
            (dict(policy_kwargs=dict(features_extractor_class=BatchNormDropoutExtractor)), "BatchNorm1d changes state"),
        ],
    )
    def test_impossible(self, options, reason, compilations, tmp_path, capsys):
        model = small(SACV, box_env(), verbose=1, **options)
        model.learn(70)
        assert model._resolved_execution == "eager" and not compilations
        assert f"Update executed by 'eager': {reason}" in capsys.readouterr().out

        explicit = small(SACV, box_env(), execution="compiled", **options)
        explicit.save(tmp_path / "model")
        explicit = SACV.load(tmp_path / "model", env=box_env())
        with pytest.raises(ValueError, match=f"execution='compiled' is not possible: {reason}.*use execution='auto'"):
            explicit.learn(20)
        assert explicit._n_updates == 0
        # It still predicts, and learns when told how
        explicit.predict(np.zeros(3, dtype=np.float32))
        SACV.load(tmp_path / "model", env=box_env(), execution="eager").learn(20)

    @pytest.mark.skipif(th.cuda.is_available(), reason="is about machines without CUDA")
    def test_cuda_graph_without_cuda(self):
        model = small(SACV, box_env(), execution="cuda_graph")
        with pytest.raises(ValueError, match="a CUDA graph needs a CUDA device, and the model is on cpu"):
            model.learn(20)

    def test_unknown(self):
        with pytest.raises(ValueError, match=r"execution must be one of 'auto', .*'cuda_graph', got 'fast'"):
            small(SACV, box_env(), execution="fast")


def test_failing_compiler(monkeypatch, capsys):
    def no_compiler(*args: Any) -> Any:
        raise OSError("no C++ compiler found\nand a long story")

    monkeypatch.setattr(compiled, "_compile", no_compiler)
    monkeypatch.setattr(choice, "BREAK_EVEN_UPDATES", 10)
    expected, model = filled(box_env(), execution="eager"), filled(box_env(), verbose=1)
    run(expected)
    run(model)
    assert_same(everything(model), everything(expected))
    assert "Update executed by 'eager': 'compiled' failed with no C++ compiler found\n" in capsys.readouterr().out
    explicit = filled(box_env(), execution="compiled")
    before = copy.deepcopy(explicit.policy.state_dict())
    with pytest.raises(RuntimeError, match=r"use execution='auto' or 'eager': no C\+\+ compiler found$"):
        run(explicit)
    assert_same(explicit.policy.state_dict(), before)


class TestCudaGraphPlumbing:
    """What surrounds a CUDA graph, with a graph that computes on the CPU what it has captured when it is replayed."""

    @pytest.fixture(autouse=True)
    def captures(self, monkeypatch) -> list[Any]:
        """One entry for each capture."""
        calls: list[Any] = []
        captures: list[Any] = []

        def recorded(*args: Any) -> Any:
            outputs = objective_gradients(*args)
            calls.append((args, outputs))
            return outputs

        class Graph:
            def replay(self) -> None:
                args, (gradients, metrics) = self.captured
                new_gradients, new_metrics = objective_gradients(*args)
                for tensor, new in zip((*gradients, metrics), (*new_gradients, new_metrics), strict=True):
                    tensor.copy_(new)

        @contextmanager
        def capture(graph: Any, stream: Any, capture_error_mode: str) -> Iterator[None]:
            yield
            graph.captured = calls[-1]
            captures.append(graph)

        class Stream:
            def wait_stream(self, stream: Any) -> None:
                pass

            def record_event(self) -> None:
                pass

            def wait_event(self, event: None) -> None:
                pass

        monkeypatch.setattr(cuda_graph, "objective_gradients", recorded)
        monkeypatch.setattr(choice, "unavailable", lambda *args: None)
        monkeypatch.setattr(th.cuda, "CUDAGraph", Graph)
        monkeypatch.setattr(th.cuda, "graph", capture)
        monkeypatch.setattr(th.cuda, "Stream", Stream)
        monkeypatch.setattr(th.cuda, "stream", lambda stream: nullcontext())
        monkeypatch.setattr(th.cuda, "device", lambda device: nullcontext())
        monkeypatch.setattr(th.cuda, "current_stream", Stream)
        return captures

    @pytest.mark.parametrize("name", SCENARIOS)
    def test_agrees_with_eager(self, name, captures):
        expected, model = prepared(name, "eager"), prepared(name, "cuda_graph")
        expected_logs, logs = run(expected), run(model)
        assert_agree(model, expected, rtol=0, atol=0)
        assert logs == expected_logs
        assert len(captures) == 1

    def test_captures_again_when_it_must(self, captures, tmp_path):
        other = prepared("plain", "eager")
        run(other, ((7, 1.0),))
        models = [prepared("plain", "eager"), prepared("plain", "cuda_graph")]
        for model in models:
            run(model, ((5, 1.0),))
            # In place: the addresses stay
            model.set_parameters(other.get_parameters())
            run(model, ((5, 1.0),))
        assert len(captures) == 1
        for model in models:
            # Other storages under the same parameters
            model.policy.load_from_vector(model.policy.parameters_to_vector() * 0.9)
            run(model, ((5, 1.0),))
        assert len(captures) == 2
        for model in models:
            run(model, ((1, 1.0),))
            model.train(3, batch_size=16)
        assert len(captures) == 3
        models = [save_and_load(model, tmp_path / "model") for model in models]
        for model in models:
            run(model, ((5, 1.0),))
        assert len(captures) == 4
        assert_agree(models[1], models[0], rtol=0, atol=0)


def test_modules_with_changing_attributes(monkeypatch):
    """The forward pass of a module that is not a plain layer may depend on its attributes: its graph must not outlive them."""

    class Scaled(FlattenExtractor):
        scale = 1.0

        def forward(self, observations: th.Tensor) -> th.Tensor:
            return self.scale * super().forward(observations)

    models = [
        filled(box_env(), policy_kwargs=dict(net_arch=[8], features_extractor_class=Scaled), execution=how)
        for how in ("eager", "compiled")
    ]
    for scale in (0.5, 2.0):
        for model in models:
            for network in (model.actor, model.critic, model.value, model.value_target):
                network.features_extractor.scale = scale
            run(model, ((5, 1.0),))
        assert_agree(models[1], models[0], **TOLERANCE["float32 Adam"])
    # A new graph for each number is not what one wants forever
    monkeypatch.setattr(compiled, "_MAX_GRAPHS", 2)
    models[1].actor.features_extractor.scale = 3.0
    with pytest.raises(RuntimeError, match="shapes or modules have changed 2 times"):
        run(models[1], ((1, 1.0),))


@pytest.mark.parametrize("how", ["eager", *FAST])
def test_frozen_and_released(how):
    """Parameters that the user freezes stay, and learn again when released; as with SB3, whose optimizers skip them."""
    execution, device = executed(how)
    model = filled(box_env(), execution=execution, ent_coef=0.1, device=device)
    frozen = model.actor.latent_pi
    run(model, ((2, 1.0),))
    for requires_grad in (False, True):
        frozen.requires_grad_(requires_grad)
        before = copy.deepcopy([frozen.state_dict(), model.actor.mu.state_dict()])
        run(model, ((3, 1.0),))
        moved = [
            not th.equal(module.state_dict()[key], old[key])
            for module, old in zip((frozen, model.actor.mu), before, strict=True)
            for key in old
        ]
        assert moved == [requires_grad] * len(before[0]) + [True] * len(before[1])


def test_data_dependent_code_is_not_frozen_into_a_graph():
    class Branching(FlattenExtractor):
        def forward(self, observations: th.Tensor) -> th.Tensor:
            return super().forward(observations) * (2.0 if observations.sum() > 0 else 1.0)

    model = filled(box_env(), policy_kwargs=dict(features_extractor_class=Branching), execution="compiled")
    with pytest.raises(RuntimeError, match="execution='compiled' failed"):
        run(model)
    assert model._n_updates == 0
