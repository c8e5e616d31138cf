"""What a GPU runs at once or by one launch: with stand-ins for streams and graphs on a CPU, and on a GPU if there is one."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch as th
from stable_baselines3 import SAC
from stable_baselines3.common.torch_layers import FlattenExtractor
from torch import nn
from torch.nn.utils import prune

from sb3_softvalue import SACV
from sb3_softvalue.execution import CapturedActions, captured, executor
from sb3_softvalue.execution.captured import CapturedGradients, CapturedGraph
from sb3_softvalue.finite import NonFiniteError
from tests.fake_cuda import FakeCuda, Stream
from tests.helpers import PointGoalEnv, assert_same, box_env, everything, filled, small, train
from tests.scenarios import CALLS, SCENARIOS, OwnExtractor, prepared, run

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not th.cuda.is_available(), reason="needs a CUDA device"))]


@pytest.fixture
def fake(monkeypatch) -> FakeCuda:
    """The CPU is a GPU, and "compiled" captures there, with PyTorch's own kernels."""
    monkeypatch.setattr(executor, "CompiledGradients", lambda mixed: CapturedGradients(compiled=False))
    return FakeCuda(monkeypatch)


def test_captured_graph(fake):
    """Reads its inputs and all else where it is, and overwrites its results."""
    weight = th.tensor([1.0, 2.0])
    graph = CapturedGraph(lambda x, y: (x * weight, {"sum": (y + 1).sum()}), [th.zeros(2), th.zeros(3, dtype=th.int64)])
    for factor in (1.0, 2.0):
        weight.mul_(factor)
        product, more = graph([th.tensor([3.0, 4.0]), th.tensor([1, 2, 3])])
        assert_same([product, more["sum"]], [th.tensor([3.0, 8.0]) * factor, th.tensor(9)])
    assert len(fake.graphs) == 1


def test_a_missing_wait_is_found(fake):
    """The stand-in fails where a stream reads what it has not waited for."""

    def racing(x: th.Tensor, waits: bool) -> th.Tensor:
        other = Stream()
        other.wait_stream(Stream.current)
        with th.cuda.stream(other):
            doubled = 2 * x
        if waits:
            Stream.current.wait_stream(other)
        return doubled + 1

    assert CapturedGraph(lambda x: racing(x, True), [th.ones(2)])([th.ones(2)]).tolist() == [3.0, 3.0]
    with pytest.raises(AssertionError, match="does not wait for it"):
        CapturedGraph(lambda x: racing(x, False), [th.ones(2)])


class TestCapturedGradients:
    """The update as a graph is the eager one."""

    @pytest.mark.parametrize("name", SCENARIOS)
    def test_agrees_with_eager(self, name, fake):
        """Its parts wait for all that they read, and those that need nothing of each other run side by side."""
        expected, model = prepared(name, "eager"), prepared(name, "compiled")
        # As on a GPU, where the optimizers' steps are captured as well
        assert run(model, *CALLS[:-1]) == run(expected, *CALLS[:-1])
        assert_same(everything(model), everything(expected))
        updates = [graph for graph in fake.graphs if len(set(graph.streams.values())) > 1]
        assert len(updates) == (1 if model.policy_delay == 1 else 2)

    def test_networks_run_side_by_side(self, fake):
        """Critics and V do not wait for the policy's backward pass, nor this for theirs."""
        run(prepared("plain", "compiled"), (4, 1.0))
        (graph,) = fake.graphs
        streams = set(graph.streams.values())
        independent = [(a, b) for a in streams for b in streams if not a.before & number_of(graph, b) and a is not b]
        assert len(streams) >= 5 and len(independent) >= 4

    def test_captures_again_when_it_must(self, fake):
        other = prepared("plain", "eager")
        run(other, (7, 1.0))

        def other_extractor(model: SACV) -> None:
            model.actor.features_extractor = FlattenExtractor(model.observation_space)

        changes: list[tuple[Callable[[SACV], Any], int]] = [
            (lambda model: None, 1),
            # In place: the addresses stay
            (lambda model: model.set_parameters(other.get_parameters()), 0),
            # Other storages under the same parameters
            (lambda model: model.policy.load_from_vector(model.policy.parameters_to_vector() * 0.9), 1),
            (lambda model: setattr(model, "batch_size", 16), 1),
            (lambda model: model.critic.qf0[0].requires_grad_(False), 1),
            (other_extractor, 1),
            (lambda model: model.actor.latent_pi.__setitem__(1, nn.Tanh()), 1),
            (lambda model: setattr(model, "action_prior", "normal"), 1),
        ]
        models = prepared("plain", "eager"), prepared("plain", "compiled")
        for change, n_captures in changes:
            before = len(fake.graphs)
            for model in models:
                change(model)
                run(model, (5, 1.0))
            assert_same(everything(models[1]), everything(models[0]))
            assert len(fake.graphs) - before == n_captures

    def test_attributes_of_an_own_module(self, fake):
        kwargs = dict(net_arch=[8], features_extractor_class=OwnExtractor)
        models = [filled(box_env(), policy_kwargs=kwargs, execution=how) for how in ("eager", "compiled")]
        for factor in (1.0, 0.5):
            for model in models:
                for network in (model.actor, model.critic, model.value, model.value_target):
                    network.features_extractor.factor = factor
                    network.features_extractor.mean = th.full((3,), factor)
                run(model, (5, 1.0))
            assert_same(everything(models[1]), everything(models[0]))

    def test_hooks(self, fake):
        model = prepared("plain", "compiled")
        run(model, (4, 1.0))
        before = copy.deepcopy(model.value.state_dict())
        handles = [param.register_hook(lambda gradient: 0 * gradient) for param in model.value.parameters()]
        model.value.optimizer.state.clear()
        run(model, (4, 1.0))
        assert_same(dict(model.value.state_dict()), dict(before))
        for handle in handles:
            handle.remove()
        run(model, (4, 1.0))
        assert not th.equal(model.value.vf[0].weight, before["vf.0.weight"])

    def test_constants(self, fake):
        """Numbers that are no parameters and no buffers."""

        class Shifted(FlattenExtractor):
            def forward(self, observations: th.Tensor) -> th.Tensor:
                return super().forward(observations) + th.tensor([1.0, 2.0, 3.0])

        kwargs = dict(net_arch=[8], features_extractor_class=Shifted)
        models = [filled(box_env(), policy_kwargs=kwargs, execution=how) for how in ("eager", "compiled")]
        for model in models:
            run(model, (6, 1.0))
        assert_same(everything(models[1]), everything(models[0]))

    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
    def test_copies(self, copied, fake, monkeypatch):
        """A graph cannot be copied: a copy captures its own."""
        monkeypatch.setattr("sb3_softvalue.execution.optimizers._STEPS_BEFORE_CAPTURE", 2)
        model = prepared("plain", "compiled")
        run(model, (8, 1.0))
        other = copied(model)
        for each in (model, other):
            run(each, (4, 1.0))
        assert_same(everything(other), everything(model))


def number_of(graph: Any, stream: Stream) -> set[int]:
    """:return: numbers of the operations on a stream"""
    return {number for number, each in graph.streams.items() if each is stream}


class TestCapturedActions:
    """Actions by a graph are those of the policy, whatever happens to it."""

    @pytest.fixture(autouse=True)
    def stand_in(self, monkeypatch, device) -> None:
        self.fake = FakeCuda(monkeypatch) if device == "cpu" else None

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

    @pytest.mark.parametrize("device", ["cpu"])
    def test_a_policy_that_has_moved(self, device, monkeypatch):
        """From a GPU, say: it predicts on a CPU as ever."""
        model = self.model(device)
        monkeypatch.setattr(captured, "is_capturable", lambda device: device.type == "cuda")
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
        self.fake.fails = True
        model = self.model(device)
        self.agrees(model)
        assert not model.policy.captured_actions._graphs and len(model.policy.captured_actions._failed) == 2

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
    model = filled(box_env(), execution=execution, device="cuda")
    train(model, 3)
    model.replay_buffer.rewards[:] = np.nan
    before = [tensor.clone() for tensor in model.policy.actor.state_dict().values()]
    with pytest.raises(NonFiniteError, match=r"critic_loss.* of update 4 is not finite"):
        train(model, 4)
    assert_same(before, list(model.policy.actor.state_dict().values()))
    assert model._n_updates == 3
