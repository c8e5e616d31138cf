"""What a GPU runs at once or by one launch: with stand-ins for streams and graphs on a CPU, and on a GPU if there is one."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch as th
import torch._inductor
from stable_baselines3 import SAC
from stable_baselines3.common.torch_layers import FlattenExtractor
from torch import nn
from torch.nn.utils import prune

from sb3_softvalue import SACV
from sb3_softvalue.execution import CapturedActions, captured_actions, sample_batches
from sb3_softvalue.execution.arguments import Arguments, Scalars
from sb3_softvalue.execution.compiled import _compile
from sb3_softvalue.execution.cuda_graph import SideBySide
from sb3_softvalue.execution.parts import Parts
from sb3_softvalue.execution.watched import Watched
from sb3_softvalue.update import JointObjective, draw_noise, objective_gradients
from tests.helpers import PointGoalEnv, assert_same, box_env, filled, small, train

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not th.cuda.is_available(), reason="needs a CUDA device"))]


class FakeStream:
    """A stream that remembers what happened on all of them."""

    current: "FakeStream"
    made: int
    log: list[Any]

    def __init__(self) -> None:
        FakeStream.made += 1
        self.name = FakeStream.made

    def record_event(self) -> str:
        return f"{self.name}.{sum(entry[0] == 'record' and entry[1] == self.name for entry in self.log) + self.note('record')}"

    def note(self, what: str, *others: Any) -> int:
        FakeStream.log.append((what, self.name, *others))
        return 0

    def wait_event(self, event: str) -> None:
        self.note("waits for", event)

    def wait_stream(self, stream: "FakeStream") -> None:
        self.note("waits for stream", stream.name)


@contextmanager
def on(stream: FakeStream) -> Iterator[None]:
    before, FakeStream.current = FakeStream.current, stream
    yield
    FakeStream.current = before


@pytest.fixture
def streams(monkeypatch) -> list[Any]:
    """What happens on the streams, of which the caller's is number 1."""
    FakeStream.made, FakeStream.log = 0, []
    FakeStream.current = FakeStream()
    monkeypatch.setattr(th.cuda, "Stream", FakeStream)
    monkeypatch.setattr(th.cuda, "stream", on)
    monkeypatch.setattr(th.cuda, "current_stream", lambda: FakeStream.current)
    return FakeStream.log


def test_the_objective_forks_and_joins(streams):
    """Critics and V wait for the inputs and not for the actor; what uses them waits for both, at every update anew."""
    model = filled(box_env(), execution="eager")
    objective = JointObjective(model.policy)
    objective.order = SideBySide()
    (batch,) = sample_batches(model.replay_buffer, 1, 8, 0.9, model.device)
    for _ in range(2):
        streams.clear()
        objective(batch, th.randn(8, 2), model._temperature(), 1.0)
        assert streams == [
            ("record", 1),
            ("waits for", 2, "1.0"),
            ("waits for", 3, "1.0"),
            ("waits for stream", 1, 2),
            ("waits for stream", 1, 3),
        ]


def traced(model: SACV, monkeypatch: Any) -> tuple[th.fx.GraphModule, list[Any], list[th.Tensor], Any]:
    """The graph of an update, the networks that own its outputs, its inputs, and what it must give."""
    train(model, 1)
    params = model._optimizer_step.params
    (batch,) = sample_batches(model.replay_buffer, 1, 8, 0.9, model.device)
    noise = draw_noise(model.actor, 8, model.device)
    objective = JointObjective(model.policy)
    expected = objective_gradients(objective, params, batch, noise, model._temperature(), 1.0)
    arguments = Arguments(params, *Scalars(model.device).of(batch, model._temperature(), 1.0), noise)
    watched = Watched(objective, params)
    monkeypatch.setattr(torch._inductor, "compile", lambda graph, inputs, options: graph)
    graph = _compile(objective, arguments, watched, mixed=False)
    names = [watched.names.get(id(param)) for param in params]
    owners = [*("actor" if name is None else name.partition(".")[0] for name in names), None]
    inputs = [tensor.detach() for tensor in (*params, *watched.constants, *arguments.tensors())]
    return graph, owners, inputs, expected


def n_products(graph: th.fx.GraphModule) -> int:
    return sum(node.target in (th.ops.aten.mm.default, th.ops.aten.addmm.default) for node in graph.graph.nodes)


def test_parts_are_the_update(streams, monkeypatch):
    """The same numbers, by parts of which those that need nothing of each other wait for nothing of each other."""
    model = filled(box_env(), execution="eager", policy_kwargs=dict(net_arch=[8, 8]))
    graph, owners, inputs, (gradients, metrics) = traced(model, monkeypatch)
    parts = Parts(graph, owners, lambda part, inputs: part)
    for _ in range(2):
        *results, report = parts(*inputs)
        for result, gradient in zip(results, gradients, strict=True):
            th.testing.assert_close(result, gradient)
        th.testing.assert_close(report, metrics)
    sizes = sorted(n_products(part) for part in parts._graph.children())
    # Losses and what they have in common, V, actor with critics forward, actor backward, critics and V̄
    assert sizes == [0, 0, 8, 10, 13, 19] and sum(sizes) == n_products(graph)
    # Nothing but what several need stands before the others: no chain is longer than two parts with products and the losses
    waits = {entry[1]: [] for entry in streams}
    for what, stream, *event in streams:
        if what == "waits for":
            waits[stream].append(int(event[0].partition(".")[0]))

    def depth(stream: int) -> int:
        return 0 if stream == 1 else 1 + max(map(depth, waits[stream]), default=0)

    assert max(depth(stream) for stream in waits if stream != 1) == 4


class Shifted(FlattenExtractor):
    """Adds numbers that are no parameters and no buffers."""

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return super().forward(observations) + th.tensor([1.0, 2.0, 3.0])


def test_parts_hold_constants(streams, monkeypatch):
    model = filled(box_env(), execution="eager", policy_kwargs=dict(net_arch=[8], features_extractor_class=Shifted))
    graph, owners, inputs, (gradients, metrics) = traced(model, monkeypatch)
    *results, report = Parts(graph, owners, lambda part, inputs: part)(*inputs)
    th.testing.assert_close(report, metrics)
    for result, gradient in zip(results, gradients, strict=True):
        th.testing.assert_close(result, gradient)


class Replayed:
    """A CUDA graph that computes on the CPU what it has captured."""

    captured = 0

    def __init__(self, compute: Any):
        Replayed.captured += 1
        self.compute, self.results = compute, compute()

    def replay(self) -> None:
        for result, new in zip(self.results, self.compute(), strict=True):
            result.copy_(new)


class TestCapturedActions:
    """Actions by a graph are those of the policy, whatever happens to it."""

    fails = False

    @pytest.fixture(autouse=True)
    def stand_in(self, monkeypatch, request) -> None:
        def capture(compute: Any, device: th.device, error_mode: str) -> Any:
            if self.fails:
                raise RuntimeError("operation not permitted when stream is capturing")
            graph = Replayed(compute)
            return graph, graph.results

        Replayed.captured = 0
        if getattr(request.node, "callspec", None) is None or request.node.callspec.params["device"] == "cpu":
            monkeypatch.setattr(captured_actions, "capture", capture)
            monkeypatch.setattr(captured_actions, "_DEVICE", "cpu")

    @staticmethod
    def model(device: str, env: Any = None, policy: str = "MlpPolicy", **kwargs: Any) -> SACV:
        model = small(SACV, env or box_env(), policy, device=device, **kwargs)
        model.policy.captured_actions = CapturedActions(model.policy)
        return model

    @staticmethod
    def agrees(model: SACV, n_calls: int = 25) -> None:
        """As many predictions as make graphs, sampled and deterministic, with and without them."""
        generator = np.random.default_rng(0)
        for deterministic in (True, False):
            for _ in range(n_calls):
                space = model.observation_space
                space.seed(int(generator.integers(1000)))
                observation = space.sample()
                actions, policy = [], model.policy
                captured = policy.captured_actions
                for policy.captured_actions in (captured, None):
                    th.manual_seed(3)
                    actions.append(policy.predict(observation, deterministic=deterministic)[0])
                policy.captured_actions = captured
                assert_same(*actions)

    @pytest.mark.parametrize("device", DEVICES)
    def test_same_numbers(self, device):
        model = self.model(device)
        self.agrees(model)
        assert len(model.policy.captured_actions._graphs) == 2
        # Weights that change in place need no other graph
        with th.no_grad():
            for param in model.actor.parameters():
                param.mul_(0.5)
        self.agrees(model)
        assert len(model.policy.captured_actions._graphs) == 2
        # Other storages and other layers do
        model.policy.load_from_vector(model.policy.parameters_to_vector() * 0.9)
        self.agrees(model, 5)
        assert not model.policy.captured_actions._graphs
        self.agrees(model)
        model.actor.mu = nn.Linear(8, 2, device=device)
        self.agrees(model)
        model.actor.latent_pi[1] = nn.Tanh()
        self.agrees(model)
        # Layers that compute their weights, and another actor
        prune.l1_unstructured(model.actor.mu, "weight", 0.3)
        self.agrees(model)
        assert not model.policy.captured_actions._graphs
        prune.remove(model.actor.mu, "weight")
        self.agrees(model)
        assert model.policy.captured_actions._graphs
        model.policy.actor = copy.deepcopy(model.policy.actor)
        self.agrees(model, 5)
        assert not model.policy.captured_actions._graphs
        self.agrees(model)
        # A copy has none of these graphs
        assert not copy.deepcopy(model.policy).captured_actions._graphs

    @pytest.mark.parametrize("device", DEVICES)
    def test_dict_observations(self, device):
        model = self.model(device, PointGoalEnv(), "MultiInputPolicy")
        self.agrees(model)
        assert len(model.policy.captured_actions._graphs) == 2
        # Goals are told apart by name, whatever their order
        observation = model.observation_space.sample()
        actions = [
            model.predict(dict(items), deterministic=True)[0]
            for items in (list(observation.items()), list(observation.items())[::-1])
            for _ in range(15)
        ]
        assert_same(actions, actions[:1] * 30)

    @pytest.mark.parametrize("device", DEVICES)
    def test_inference_mode(self, device):
        """Its tensors may not be written to elsewhere."""
        model = self.model(device)
        with th.inference_mode():
            self.agrees(model)
        self.agrees(model)
        with th.inference_mode():
            self.agrees(model)

    def test_a_policy_that_has_moved(self, monkeypatch):
        """From a GPU, say: it predicts on a CPU as ever."""
        model = self.model("cpu")
        monkeypatch.setattr(captured_actions, "_DEVICE", "cuda")
        self.agrees(model)
        assert not model.policy.captured_actions._graphs

    @pytest.mark.parametrize("device", DEVICES)
    def test_what_is_not_captured(self, device):
        """A hook is called each time, a layer of one's own may do anything, and rare shapes are not worth it."""
        model = self.model(device)
        calls: list[int] = []
        handle = model.actor.latent_pi[0].register_forward_hook(lambda *args: calls.append(1))
        for _ in range(20):
            model.predict(model.observation_space.sample())
        assert len(calls) == 20 and not model.policy.captured_actions._graphs
        handle.remove()
        for n in range(1, 20):
            model.predict(np.zeros((n, 3), dtype=np.float32))
        assert not model.policy.captured_actions._graphs
        model.actor.latent_pi[1] = type("OwnLayer", (nn.ReLU,), {})()
        self.agrees(model)
        assert not model.policy.captured_actions._graphs

    @pytest.mark.parametrize("device", ["cpu"])
    def test_what_cannot_be_captured(self, device):
        """Tried once for each shape, and predicted without: the numbers and the random generator as ever."""
        self.fails = True
        model = self.model(device)
        self.agrees(model)
        assert not model.policy.captured_actions._graphs and len(model.policy.captured_actions._refused) == 2

    @pytest.mark.parametrize("device", DEVICES)
    def test_not_a_number(self, device):
        model = self.model(device)
        self.agrees(model)
        for policy in (model.policy, small(SAC, box_env(), device=device).policy):
            with th.no_grad():
                policy.actor.mu.bias.fill_(th.nan)
            with pytest.raises(ValueError, match="Expected parameter loc"):
                policy.predict(np.zeros(3, dtype=np.float32))


@pytest.mark.skipif(not th.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("execution", ["eager", "cuda_graph"])
def test_a_step_that_a_gpu_did_not_make_is_not_counted(execution):
    """The device is told of four updates at once, of which the first is not finite."""
    from sb3_softvalue.guard import NonFiniteError

    model = filled(box_env(), execution=execution, device="cuda")
    train(model, 3)
    model.replay_buffer.rewards[:] = np.nan
    before = [tensor.clone() for tensor in model.policy.actor.state_dict().values()]
    with pytest.raises(NonFiniteError, match=r"critic_loss.* of update 4 is not finite"):
        train(model, 4)
    assert_same(before, list(model.policy.actor.state_dict().values()))
    assert model._n_updates == 3
