"""Every execution of the update against the eager one, and which of them is chosen when."""

import copy
import random
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.torch_layers import FlattenExtractor

from sb3_softvalue import SACV
from sb3_softvalue.execution import choice, executor, remaining_updates
from sb3_softvalue.execution.compiled import DirectCall
from sb3_softvalue.finite import NonFiniteError
from sb3_softvalue.objective import Metrics, eager_gradients, pack_metrics
from tests.helpers import (
    BatchNormDropoutExtractor,
    assert_same,
    box_env,
    differs,
    everything,
    filled,
    rng_state,
    save_and_load,
    small,
    train,
)
from tests.scenarios import CALLS, SCENARIOS, TOLERANCE, OwnExtractor, assert_agree, prepared, run

needs_cuda = pytest.mark.skipif(not th.cuda.is_available(), reason="needs a CUDA device")
# Those that Inductor compiles in each run of the tests: what else it compiles is much the same
COMPILED = ("plain", "float64, delayed policy, shared, own rates, hard target", "shared image")


@pytest.mark.parametrize("name", SCENARIOS)
def test_traced_update_is_the_eager_one(name, compilations):
    """To the bit, by one graph for all learning rates, reward scales and numbers of gradient steps."""
    expected, model = prepared(name, "eager"), prepared(name, "compiled")
    before = everything(model)
    assert_same(before, everything(expected))
    expected_logs, expected_rng = run(expected, *CALLS), rng_state()
    logs, rng = run(model, *CALLS), rng_state()
    assert_same(everything(model), everything(expected))
    assert_same(rng, expected_rng)
    assert logs == expected_logs
    assert model._resolved_execution == "compiled"
    # Another for updates without the actor
    assert len(compilations) == (1 if model.policy_delay == 1 else 2)
    for network in ("actor", "critic", "value"):
        keys = [key for key in before["policy"] if key.startswith(f"{network}.")]
        assert any(not th.equal(before["policy"][key], model.policy.state_dict()[key]) for key in keys), network


@pytest.mark.parametrize(
    "name", [name if name in COMPILED else pytest.param(name, marks=pytest.mark.slow) for name in SCENARIOS]
)
def test_compiled_agrees_with_eager(name):
    agrees(name, "compiled", "cpu")


@needs_cuda
@pytest.mark.parametrize("how", ["cuda_graph", "compiled"])
@pytest.mark.parametrize("name", SCENARIOS)
def test_cuda_agrees_with_eager(name, how):
    agrees(name, how, "cuda")


def agrees(name: str, how: str, device: str) -> None:
    expected, model = prepared(name, "eager", device), prepared(name, how, device)
    expected_logs, expected_rng = run(expected, *CALLS), rng_state()
    logs, rng = run(model, *CALLS), rng_state()
    assert_agree(model, expected, **TOLERANCE[SCENARIOS[name][-1]])
    assert_same(rng, expected_rng)
    for log, expected_log in zip(logs, expected_logs, strict=True):
        assert set(log) == set(expected_log)
        for key, value in expected_log.items():
            assert log[key] == pytest.approx(value, rel=1e-3, abs=1e-3), key
    assert model._resolved_execution == how


@pytest.mark.parametrize("execution", ["eager", "compiled"])
def test_policy_delay(execution, compilations):
    """Actor and temperature move at every second update, all others at each."""
    model = filled(box_env(), execution=execution, policy_delay=2, tau=0.1)
    parts = {name: getattr(model, name).state_dict() for name in ("actor", "critic", "value", "value_target")}
    parts["alpha"] = {"log": model.log_ent_coef}
    for update in range(1, 7):
        before = copy.deepcopy({name: dict(state) for name, state in parts.items()})
        train(model, 1)
        moved = {name for name, state in parts.items() if differs(state, before[name])}
        always = {"critic", "value", "value_target"}
        assert moved == (always if update % 2 else always | {"actor", "alpha"}), update


def test_policy_delay_counts_over_calls_and_saves(execution, tmp_path):
    """As ``target_update_interval`` does: how updates are spread over calls changes nothing."""
    together, apart = (filled(box_env(), policy_delay=3, **execution) for _ in range(2))
    run(together, (8, 1.0))
    run(apart, *[(1, 1.0)] * 4)
    state = rng_state()
    apart = save_and_load(apart, tmp_path / "model")
    assert apart.policy_delay == 3
    np.random.set_state(state[0])
    for _ in range(4):
        train(apart, 1)
    steps = [
        int(optimizer.state_dict()["state"][0]["step"])
        for model in (together, apart)
        for optimizer in (model.actor.optimizer, model.ent_coef_optimizer, model.critic.optimizer, model.value.optimizer)
    ]
    assert steps == [2, 2, 8, 8] * 2


@pytest.mark.parametrize("name, n_direct", [("plain", 8), ("own extractor", 0)])
def test_plain_networks_are_called_without_dynamo(name, n_direct, compilations, monkeypatch):
    """The first update is eager, the second compiles; only what may depend on more than its tensors needs Dynamo's guards."""
    calls: list[Any] = []
    call = DirectCall.__call__
    monkeypatch.setattr(DirectCall, "__call__", lambda self, leaves: (calls.append(self), call(self, leaves))[1])
    run(prepared(name, "compiled"), (10, 1.0))
    assert len(calls) == n_direct


@pytest.mark.parametrize("inductor", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_three_trainings_compile_at_once(inductor, request):
    """In threads: each gets its own graphs, for two batch sizes."""
    if not inductor:
        request.getfixturevalue("compilations")
    policy_kwargs = [
        dict(net_arch=[8]),
        dict(net_arch=[9], activation_fn=th.nn.Tanh),
        dict(net_arch=[10], features_extractor_class=OwnExtractor),
    ]
    models, expected = (
        [filled(box_env(), policy_kwargs=kwargs, execution=how, seed=n) for n, kwargs in enumerate(policy_kwargs)]
        for how in ("compiled", "eager")
    )

    def batches(model: SACV) -> None:
        """Drawn before, and no noise: the global random generators know no threads."""
        generator = np.random.RandomState(3)
        rows = {n: [generator.randint(0, 40, n) for _ in range(4)] for n in (8, 16)}
        buffer = model.replay_buffer
        buffer.sample = lambda size, env=None: buffer._get_samples(rows[size].pop(), env=env)

    errors: list[BaseException] = []
    noise = th.randn(16, 2, generator=th.Generator().manual_seed(0))

    def work(model: SACV) -> None:
        try:
            for batch_size in (8, 16):
                for _ in range(4):
                    model.train(1, batch_size)
        except BaseException as error:
            errors.append(error)

    for model in (*models, *expected):
        batches(model)
        model.set_logger(copy.deepcopy(model.logger))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sb3_softvalue.sacv.draw_noise", lambda actor, batch_size, device: noise[:batch_size])
        threads = [threading.Thread(target=work, args=(model,)) for model in models]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for model in expected:
            work(model)
    assert not errors
    for model, other in zip(models, expected, strict=True):
        assert model._resolved_execution == "compiled"
        assert_agree(model, other, **TOLERANCE["float32 Adam"])


class TestChoice:
    """What "auto" and explicit requests result in, without compiling anything."""

    @pytest.fixture(autouse=True)
    def made(self, monkeypatch) -> list[Any]:
        """One entry for each time that compiled gradients were asked for; they are eager ones."""
        made: list[Any] = []

        def pretend(mixed: bool) -> Any:
            made.append(mixed)
            return eager_gradients

        monkeypatch.setattr(executor, "CompiledGradients", pretend)
        monkeypatch.setattr(choice, "BREAK_EVEN_UPDATES", 50)
        monkeypatch.setattr(choice, "EAGER_UPDATES", 0)
        return made

    def test_short_runs_are_eager(self, made, capsys):
        model = small(SACV, box_env(), verbose=1)
        model.learn(30)
        assert model._resolved_execution == "eager" and not made
        out = capsys.readouterr().out
        assert out.count("Updates run with") == 1
        assert "Updates run with execution='eager': compilation pays off from 50 updates, this run has 20" in out

    def test_long_run_compiles_at_once(self, made, capsys):
        model = small(SACV, box_env(), verbose=1)
        model.learn(70)
        assert model._resolved_execution == "compiled" and made == [False]
        assert capsys.readouterr().out.count("Updates run with execution='compiled': it pays off with 60 updates") == 1

    def test_no_end(self, made, capsys):
        """Until a callback stops it."""
        model = small(SACV, box_env(), verbose=1)
        model.learn(float("inf"), callback=lambda local, _: local["self"].num_timesteps < 30)
        assert model._resolved_execution == "compiled" and "pays off with inf updates" in capsys.readouterr().out

    def test_stopped_early(self, made, monkeypatch):
        """A run that a callback stops early does not pay for compilation; one that continues does."""
        monkeypatch.setattr(choice, "EAGER_UPDATES", 20)
        model = small(SACV, box_env())
        model.learn(10**6, callback=lambda local, _: model._n_updates < 20)
        assert model._resolved_execution == "eager" and not made
        model.learn(10**6, callback=lambda local, _: model._n_updates < 21, reset_num_timesteps=False)
        assert model._resolved_execution == "compiled" and made == [False]

    def test_many_short_runs_compile_once(self, made):
        model = small(SACV, box_env())
        for _ in range(20):
            model.learn(15, reset_num_timesteps=False)
        assert model._resolved_execution == "compiled" and made == [False]

    def test_one_long_train_compiles(self, made):
        train(filled(box_env()), 60)
        assert made == [False]

    @pytest.mark.parametrize(
        "options, n_updates",
        [
            (dict(gradient_steps=-1), 60),
            (dict(train_freq=5, gradient_steps=2), 25),
            (dict(gradient_steps=3), 180),
            (dict(train_freq=(1, "episode"), gradient_steps=100), 0),
        ],
    )
    def test_remaining_updates(self, options, n_updates):
        model = small(SACV, box_env(), **options)
        model._setup_learn(60)
        assert remaining_updates(model) == pytest.approx(n_updates, abs=2)

    def test_resolution_is_saved(self, made, tmp_path):
        model = small(SACV, box_env())
        model.learn(70)
        loaded = save_and_load(model, tmp_path / "model")
        assert loaded._resolved_execution == "compiled" and len(made) == 1
        loaded.learn(5, reset_num_timesteps=False)
        assert loaded._resolved_execution == "compiled" and len(made) == 2

    def test_execution_can_be_set_anew(self, made):
        model = small(SACV, box_env(), execution="eager")
        model.learn(20)
        model.execution = "compiled"
        model.learn(5, reset_num_timesteps=False)
        assert model._resolved_execution == "compiled" and made == [False]

    @pytest.mark.skipif(th.cuda.is_available(), reason="needs a machine without CUDA")
    def test_cuda_graph_without_cuda(self):
        model = small(SACV, box_env(), execution="cuda_graph")
        with pytest.raises(ValueError, match="a CUDA graph needs a CUDA device, but the model is on cpu"):
            model.learn(20)

    def test_unknown_set_later(self):
        model = small(SACV, box_env())
        model.execution = "fast"
        with pytest.raises(ValueError, match=r"execution must be one of 'auto', .*, got 'fast'"):
            model.learn(20)

    def test_unknown(self):
        with pytest.raises(ValueError, match=r"execution must be one of 'auto', .*'cuda_graph', got 'fast'"):
            small(SACV, box_env(), execution="fast")


class Habit(FlattenExtractor):
    """Does at each call what a graph would not repeat. The factor stays near 1."""

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return super().forward(observations) * self.factor()


class NumpyDraws(Habit):
    def factor(self) -> Any:
        return np.random.uniform(0.8, 1.2)


class PythonDraws(Habit):
    def factor(self) -> Any:
        return random.uniform(0.8, 1.2)


class TorchDraws(Habit):
    def factor(self) -> Any:
        return 0.8 + 0.4 * th.rand(3)


class Counts(Habit):
    """Changes a buffer in place."""

    def __init__(self, observation_space: Any):
        super().__init__(observation_space)
        self.register_buffer("count", th.ones(()))

    def factor(self) -> Any:
        self.count.add_(1.0)
        return 1.0 + 1.0 / self.count.detach().clone()


class Replaces(Counts):
    """Another tensor each time; where the extractor is shared it is called several times in one update."""

    def factor(self) -> Any:
        self.count = self.count + 1.0
        return 1.0 + 1.0 / self.count


BUFFERS = "a network changes its buffers, as batch normalization does"
HABITS: dict[str, tuple[dict[str, Any], str]] = {
    "NumPy": (dict(features_extractor_class=NumpyDraws), r"a network draws random numbers \(NumPy\)"),
    "Python": (dict(features_extractor_class=PythonDraws), r"a network draws random numbers \(Python\)"),
    "PyTorch": (dict(features_extractor_class=TorchDraws), r"a network draws random numbers \(PyTorch\)"),
    "counts": (dict(features_extractor_class=Counts), BUFFERS),
    "replaces": (dict(features_extractor_class=Replaces), BUFFERS),
    "shared, replaces": (dict(features_extractor_class=Replaces, share_features_extractor=True), BUFFERS),
    "dropout": (dict(features_extractor_class=BatchNormDropoutExtractor), r"a network draws random numbers \(PyTorch\)"),
    "gSDE": (dict(use_sde=True), "gSDE draws its noise inside the network"),
}


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("kwargs, reason", HABITS.values(), ids=HABITS)
def test_what_a_graph_would_not_repeat_runs_eagerly(kwargs, reason, threads, monkeypatch, compilations):
    monkeypatch.setattr(threading, "active_count", lambda: threads)
    monkeypatch.setattr(choice, "BREAK_EVEN_UPDATES", 1)
    monkeypatch.setattr(choice, "EAGER_UPDATES", 0)
    options: dict[str, Any] = dict(kwargs) if "use_sde" in kwargs else dict(policy_kwargs=dict(net_arch=[8]) | kwargs)
    expected = filled(box_env(), execution="eager", **options)
    model = filled(box_env(), **options)
    random.seed(0)
    run(expected, (5, 1.0), (3, 1.0))
    random.seed(0)
    with pytest.warns(UserWarning, match=f"SACV falls back to execution='eager': {reason}") as told:
        run(model, (5, 1.0), (3, 1.0))
    assert len(told) == 1
    assert model._resolved_execution == "eager" and not compilations
    assert_same(everything(model), everything(expected))


def test_random_numbers_of_other_threads(monkeypatch, compilations):
    """Other trainings draw from the same generators: only a network that draws itself runs eagerly."""
    with ThreadPoolExecutor(1) as others:

        def gradients(*update: Any) -> Any:
            others.submit(lambda: (np.random.rand(), random.random(), th.rand(1))).result()
            return eager_gradients(*update)

        monkeypatch.setattr("sb3_softvalue.execution.executor.eager_gradients", gradients)
        model = filled(box_env(), execution="compiled")
        run(model, (3, 1.0))
        assert model._resolved_execution == "compiled" and len(compilations) == 1
        drawing = filled(box_env(), execution="compiled", policy_kwargs=dict(features_extractor_class=NumpyDraws))
        with pytest.raises(ValueError, match="draws random numbers"):
            run(drawing, (1, 1.0))


@pytest.mark.parametrize("kwargs, reason", HABITS.values(), ids=HABITS)
def test_what_a_graph_would_not_repeat_is_refused_where_one_was_requested(kwargs, reason, tmp_path):
    options: dict[str, Any] = dict(kwargs) if "use_sde" in kwargs else dict(policy_kwargs=dict(net_arch=[8]) | kwargs)
    model = small(SACV, box_env(), execution="compiled", **options)
    model.save(tmp_path / "model")
    loaded = SACV.load(tmp_path / "model", env=box_env())
    for explicit in (model, loaded):
        before = [param.clone() for param in explicit.policy.parameters()]
        with pytest.raises(
            ValueError, match=f"execution='compiled' is not possible: {reason}; use execution='auto' or 'eager'"
        ):
            explicit.learn(20)
        assert explicit._n_updates == 0
        assert_same(list(explicit.policy.parameters()), before)
    # It still predicts, and learns when told how
    loaded.predict(np.zeros(3, dtype=np.float32))
    loaded.execution = "eager"
    loaded.learn(20)
    assert loaded._n_updates > 0


def test_failing_compiler(monkeypatch):
    def no_compiler(*args: Any, **kwargs: Any) -> Any:
        raise OSError("no C++ compiler found\nand a long story")

    monkeypatch.setattr("torch._inductor.compile", no_compiler)
    monkeypatch.setattr(choice, "BREAK_EVEN_UPDATES", 10)
    monkeypatch.setattr(choice, "EAGER_UPDATES", 0)
    expected, model = filled(box_env(), execution="eager"), filled(box_env())
    run(expected, *CALLS)
    match = r"falls back to execution='eager': 'compiled' failed with no C\+\+ compiler found\.$"
    with pytest.warns(UserWarning, match=match) as told:
        run(model, *CALLS)
    assert len(told) == 1
    assert_same(everything(model), everything(expected))
    explicit = filled(box_env(), execution="compiled")
    run(explicit, (1, 1.0))
    before = everything(explicit)
    with pytest.raises(RuntimeError, match=r"use execution='auto' or 'eager': .*no C\+\+ compiler found$"):
        run(explicit, (1, 1.0))
    assert_same(everything(explicit), before)


def test_sampling_that_is_replaced_later_runs_eagerly(compilations):
    model = filled(box_env(), execution="compiled")
    run(model, (3, 1.0))
    assert len(compilations) == 1
    calls = []
    action_log_prob = model.actor.action_log_prob
    model.actor.action_log_prob = lambda observations: calls.append(1) or action_log_prob(observations)
    run(model, (4, 1.0))
    assert len(calls) == 4
    del model.actor.action_log_prob
    run(model, (2, 1.0))
    assert (len(calls), len(compilations)) == (4, 1)


def test_data_dependent_code_is_not_frozen_into_a_graph(compilations):
    class Branching(FlattenExtractor):
        def forward(self, observations: th.Tensor) -> th.Tensor:
            return super().forward(observations) * (2.0 if observations.sum() > 0 else 1.0)

    model = filled(box_env(), policy_kwargs=dict(features_extractor_class=Branching), execution="compiled")
    with pytest.raises(RuntimeError, match="execution='compiled' failed, use execution='auto' or 'eager'"):
        run(model, (2, 1.0))
    assert model._n_updates == 1, "the first is eager"


class RootExtractor(FlattenExtractor):
    """Whose output has no gradient by one entry of its weight where that is zero: 0·∞."""

    def __init__(self, observation_space: Any):
        super().__init__(observation_space)
        self.weight = th.nn.Parameter(th.ones(2, 3))

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return super().forward(observations) + 0.0 * self.weight.sqrt().sum(dim=0)


@pytest.mark.parametrize("network", ["actor", "critic", "value"])
@pytest.mark.parametrize("execution", ["eager", "compiled"])
def test_one_entry_of_one_gradient_is_not_finite(execution, network, compilations):
    """Though every loss is, in a part of the networks that has no bias."""
    model = filled(box_env(), policy_kwargs=dict(net_arch=[8], features_extractor_class=RootExtractor), execution=execution)
    train(model, 3)
    with th.no_grad():
        getattr(model, network).features_extractor.weight[1, 2] = 0.0
    before = everything(model)
    with pytest.raises(NonFiniteError, match="A gradient of update 4 is not finite") as stopped:
        train(model, 1)
    assert stopped.value.quantity == "gradient"
    assert_same(everything(model), before)


def test_found_inf_looks_at_all_gradients():
    metrics = Metrics(*th.zeros(8).unbind())
    shapes = [(4, 3), (4,), (2, 4), (1, 2, 3, 3)]
    assert pack_metrics(metrics, [th.ones(shape) for shape in shapes])[-1] == 0.0
    assert pack_metrics(metrics, [None, th.ones(3)])[-1] == 0.0
    assert pack_metrics(metrics, [None])[-1] == 0.0
    for number in (th.nan, th.inf, -th.inf):
        for index, shape in enumerate(shapes):
            for place in range(th.Size(shape).numel()):
                gradients = [th.ones(shape) for shape in shapes]
                gradients[index].view(-1)[place] = number
                assert pack_metrics(metrics, gradients)[-1] == 1.0, (index, place)
        for index in range(8):
            losses = th.zeros(8)
            losses[index] = number
            assert pack_metrics(Metrics(*losses.unbind()), [th.ones(2)])[-1] == 1.0, index


def test_no_warning_while_compiling(compilations):
    """The compiler's own are not for the user, and what filters were there are there afterwards."""
    model = filled(box_env(), execution="compiled")
    filters = list(warnings.filters)
    run(model, (3, 1.0))
    assert warnings.filters == filters
