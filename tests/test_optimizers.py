"""The step of all optimizers at once against each optimizer's own ``step()``, bit for bit."""

import copy
import gc
import pickle
import weakref
from typing import Any

import pytest
import torch as th
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from sb3_softvalue.execution import optimizers as module
from sb3_softvalue.execution.optimizers import OptimizerStep, learned_params
from tests.fake_cuda import FakeCuda
from tests.helpers import assert_same

ADAM = (th.optim.Adam, dict(lr=1e-2, fused=True))
OPTIMIZERS: dict[str, list[tuple[type[th.optim.Optimizer], dict[str, Any]]]] = {
    "alike": [ADAM, ADAM, ADAM],
    "own learning rates": [ADAM, (th.optim.Adam, dict(lr=3e-3, fused=True)), ADAM],
    "AdamW": [(th.optim.AdamW, dict(lr=1e-2, weight_decay=0.1, betas=(0.8, 0.9), fused=True)), ADAM],
    "decoupled weight decay": [
        (th.optim.Adam, dict(lr=1e-2, weight_decay=0.5, decoupled_weight_decay=True, fused=True)),
        (th.optim.Adam, dict(lr=1e-2, weight_decay=0.5, fused=True)),
    ],
    "weight decay, amsgrad": [
        (th.optim.Adam, dict(lr=1e-2, weight_decay=0.1, eps=1e-4, fused=True)),
        (th.optim.Adam, dict(lr=1e-2, amsgrad=True, fused=True)),
    ],
    "not fused": [(th.optim.Adam, dict(lr=1e-2)), (th.optim.SGD, dict(lr=0.1, momentum=0.9)), ADAM],
}


class Trained:
    """
    Optimizers of some random parameters each, the same at every call.

    :param kinds: class and keywords of each
    :param device: of the parameters
    """

    def __init__(self, kinds: Any, device: str = "cpu"):
        generator = th.Generator().manual_seed(1)
        self.optimizers: list[th.optim.Optimizer] = []
        for number, (optimizer_class, kwargs) in enumerate(kinds):
            shapes = [(4, 3), (4,), (1,)][: number + 1]
            params = [th.randn(shape, generator=generator).to(device).requires_grad_() for shape in shapes]
            self.optimizers.append(optimizer_class(params, **kwargs))

    @property
    def params(self) -> list[list[th.Tensor]]:
        return [learned_params(optimizer) for optimizer in self.optimizers]

    def gradients(self, generator: th.Generator) -> list[Any]:
        return [th.randn(param.shape, generator=generator).to(param.device) for own in self.params for param in own]

    def step_by_step(self, gradients: list[Any], max_grad_norm: float | None = None) -> None:
        """As SB3 does it."""
        remaining = iter(gradients)
        for optimizer, own in zip(self.optimizers, self.params, strict=True):
            optimizer.zero_grad()
            for param in own:
                gradient = next(remaining)
                param.grad = None if gradient is None else gradient.clone()
            if max_grad_norm is not None:
                th.nn.utils.clip_grad_norm_(own, max_grad_norm)
            optimizer.step()

    def state(self) -> list[Any]:
        params = [[param.detach().clone() for param in own] for own in self.params]
        return [params, copy.deepcopy([optimizer.state_dict()["state"] for optimizer in self.optimizers])]


@pytest.mark.parametrize("max_grad_norm", [None, 0.5])
@pytest.mark.parametrize("kinds", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_equals_the_optimizers_own_steps(kinds, max_grad_norm):
    expected, trained, step = Trained(kinds), Trained(kinds), OptimizerStep()
    generator = th.Generator().manual_seed(2)
    for count in range(6):
        for optimizer in (expected.optimizers[0], trained.optimizers[0]):
            optimizer.param_groups[0]["lr"] = 1e-2 / (1 + count)  # a schedule
        gradients = trained.gradients(generator)
        if count == 3:
            gradients[0] = None  # a parameter on which nothing depends: SB3 leaves it as it is
        expected.step_by_step(gradients, max_grad_norm)
        step(trained.optimizers, trained.params, gradients, max_grad_norm)
        assert_same(trained.state(), expected.state())


def reload(optimizer: th.optim.Optimizer) -> None:
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def twice(optimizer: th.optim.Optimizer) -> None:
    """Replaced on the object, as PyTorch's schedulers do it too."""
    own = optimizer.step

    def step() -> None:
        own()
        own()

    optimizer.step = step  # type: ignore[method-assign]  # a replaced method is what is tested


CHANGES: dict[str, Any] = {
    "load": reload,
    "own step": twice,
    "other counter": lambda optimizer: optimizer.state[optimizer.param_groups[0]["params"][1]].update(step=th.tensor(7.0)),
    "other state": lambda optimizer: optimizer.state.update(
        {key: copy.deepcopy(value) for key, value in optimizer.state.items()}
    ),
    "maximize": lambda optimizer: optimizer.param_groups[0].update(maximize=True),
    "not fused": lambda optimizer: optimizer.param_groups[0].update(fused=False, foreach=False),
    "betas": lambda optimizer: optimizer.param_groups[0].update(betas=(0.5, 0.6)),
    "no state": lambda optimizer: optimizer.state.clear(),
    "other average": lambda optimizer: optimizer.state[optimizer.param_groups[0]["params"][0]].update(exp_avg=th.ones(4, 3)),
    "other group": lambda optimizer: optimizer.add_param_group(dict(params=[th.ones(2, requires_grad=True)], lr=0.5)),
    "frozen": lambda optimizer: optimizer.param_groups[0]["params"][0].requires_grad_(False),
    "other storage": lambda optimizer: setattr(optimizer.param_groups[0]["params"][0], "data", th.ones(4, 3)),
}


@pytest.mark.parametrize("kinds", ["alike", "not fused"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_between_two_steps_is_seen(change, kinds):
    expected, trained, step = Trained(OPTIMIZERS[kinds]), Trained(OPTIMIZERS[kinds]), OptimizerStep()
    generator = th.Generator().manual_seed(2)
    for count in range(6):
        if count == 3:
            for optimizers in (expected.optimizers, trained.optimizers):
                change(optimizers[2])
        gradients = trained.gradients(generator)
        expected.step_by_step(gradients)
        step(trained.optimizers, trained.params, gradients)
        assert_same(trained.state(), expected.state())


def test_own_step_can_take_over():
    kinds = OPTIMIZERS["alike"]
    expected, trained, step = Trained(kinds), Trained(kinds), OptimizerStep()
    generator = th.Generator().manual_seed(2)
    for count in range(6):
        gradients = trained.gradients(generator)
        expected.step_by_step(gradients)
        if count % 2:
            trained.step_by_step(gradients)
        else:
            step(trained.optimizers, trained.params, gradients)
    assert_same(trained.state(), expected.state())


def test_some_of_the_optimizers():
    """As at an update without the actor."""
    kinds = OPTIMIZERS["alike"]
    expected, trained, step = Trained(kinds), Trained(kinds), OptimizerStep()
    generator = th.Generator().manual_seed(2)
    for count in range(6):
        gradients = trained.gradients(generator)
        n_stepped, n_params = (3, 6) if count % 2 else (2, 3)
        whole = expected.optimizers
        expected.optimizers = whole[:n_stepped]
        expected.step_by_step(gradients[:n_params])
        expected.optimizers = whole
        step(trained.optimizers[:n_stepped], trained.params[:n_stepped], gradients[:n_params])
        assert_same(trained.state(), expected.state())


def test_hooks_are_called():
    trained, step = Trained([ADAM]), OptimizerStep()
    calls: list[str] = []
    for _ in range(2):
        step(trained.optimizers, trained.params, [th.ones(4, 3)])
    trained.optimizers[0].register_step_pre_hook(lambda *args: calls.append("before"))
    trained.optimizers[0].register_step_post_hook(lambda *args: calls.append("after"))
    for _ in range(2):
        step(trained.optimizers, trained.params, [th.ones(4, 3)])
    assert calls == ["before", "after"] * 2


def test_hooks_after_a_gradient_are_called():
    """As ``backward()`` calls them: before the step, with the gradient in its place."""
    trained, step = Trained([ADAM]), OptimizerStep()
    (param,) = trained.params[0]
    seen: list[float] = []
    param.register_post_accumulate_grad_hook(lambda param: seen.append(float(param.grad.sum())))
    for number in (1.0, 2.0):
        step(trained.optimizers, trained.params, [th.full((4, 3), number)])
    assert seen == [12.0, 24.0]


def test_hooks_of_all_optimizers_are_called():
    trained, step = Trained([ADAM, ADAM]), OptimizerStep()
    gradients = trained.gradients(th.Generator().manual_seed(2))
    step(trained.optimizers, trained.params, gradients)
    calls: list[Any] = []
    hooks = [
        register_optimizer_step_pre_hook(lambda *args: calls.append("before")),
        register_optimizer_step_post_hook(lambda *args: calls.append("after")),
    ]
    try:
        step(trained.optimizers, trained.params, gradients)
    finally:
        for hook in hooks:
            hook.remove()
    assert calls == ["before", "after"] * 2


@pytest.mark.parametrize("is_new", [True, False])
def test_step_replaced_on_the_class_is_called(is_new, monkeypatch):
    calls: list[Any] = []
    trained, step = Trained([ADAM]), OptimizerStep()
    gradients = [th.ones(4, 3)]
    for _ in range(0 if is_new else 2):
        step(trained.optimizers, trained.params, gradients)
    monkeypatch.setattr(th.optim.Adam, "step", lambda *args: calls.append(args))
    if is_new:
        trained = Trained([ADAM])
    for _ in range(3):
        step(trained.optimizers, trained.params, gradients)
    assert len(calls) == 3


def test_hook_that_drops_a_gradient():
    """The optimizer leaves that parameter as it is, and steps the others."""
    trained, step = Trained([ADAM, ADAM]), OptimizerStep()
    gradients = trained.gradients(th.Generator().manual_seed(2))
    step(trained.optimizers, trained.params, gradients)
    dropped, kept = trained.params[1]
    dropped.register_post_accumulate_grad_hook(lambda param: setattr(param, "grad", None))
    before = dropped.detach().clone(), kept.detach().clone()
    step(trained.optimizers, trained.params, gradients)
    assert th.equal(dropped, before[0]) and not th.equal(kept, before[1])


def test_states_of_replaced_optimizers_are_dropped():
    step, kept = OptimizerStep(), []
    for _ in range(4):
        trained = Trained([ADAM, ADAM])
        for _ in range(3):
            step(trained.optimizers, trained.params, trained.gradients(th.Generator().manual_seed(2)))
        kept.append(weakref.ref(trained.params[0][0]))
        del trained
    gc.collect()
    assert [ref() is not None for ref in kept][:3] == [False] * 3


@pytest.mark.parametrize("kind", [ADAM, (th.optim.SGD, dict(lr=0.1)), (th.optim.Adam, dict(lr=0.1))])
def test_frozen_parameters_stay(kind):
    """Also where they have a gradient from before."""
    trained, step = Trained([ADAM, kind]), OptimizerStep()
    frozen = trained.optimizers[1].param_groups[0]["params"][0]
    for _ in range(2):
        step(trained.optimizers, trained.params, [th.ones(4, 3), th.ones(4, 3), th.ones(4)])
    frozen.requires_grad_(False)
    before = frozen.clone()
    for _ in range(2):
        step(trained.optimizers, trained.params, [th.ones(4, 3), th.ones(4)])
    assert th.equal(frozen, before)
    frozen.requires_grad_(True)
    step(trained.optimizers, trained.params, [th.ones(4, 3), th.ones(4, 3), th.ones(4)])
    assert not th.equal(frozen, before)


@pytest.mark.parametrize("kind", [ADAM, (th.optim.SGD, dict(lr=0.1))])
def test_gradient_in_another_memory_format(kind):
    """As a convolution's may come."""
    results = []
    for memory_format in (th.contiguous_format, th.channels_last):
        weight = th.ones(2, 3, 4, 4).requires_grad_()
        optimizer, step = kind[0]([weight], **kind[1]), OptimizerStep()
        gradient = th.randn(2, 3, 4, 4, generator=th.Generator().manual_seed(1))
        for _ in range(3):
            step([optimizer], [[weight]], [gradient.clone(memory_format=memory_format)])
        results.append(weight.detach())
    assert_same(results[1], results[0])


@pytest.mark.parametrize("kinds", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_no_step_where_something_is_not_finite(kinds):
    expected, trained, step = Trained(kinds), Trained(kinds), OptimizerStep()
    generator = th.Generator().manual_seed(2)
    for found in (0.0, 0.0, 1.0, 0.0):
        gradients = trained.gradients(generator)
        if not found:
            expected.step_by_step(gradients)
        step(trained.optimizers, trained.params, gradients, None, th.full((1,), found))
        assert_same(trained.state(), expected.state())


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not th.cuda.is_available(), reason="needs a CUDA device"))]


class TestRepeated:
    """The step as a graph; on a CPU by a stand-in for CUDA."""

    @pytest.fixture
    def graphs(self, request, monkeypatch) -> list[Any]:
        """One entry for each graph that was tried."""
        monkeypatch.setattr(module, "_STEPS_BEFORE_CAPTURE", 4)
        self.fake = FakeCuda(monkeypatch) if request.getfixturevalue("device") == "cpu" else None
        tried: list[Any] = []
        captured_graph = module.CapturedGraph
        monkeypatch.setattr(module, "CapturedGraph", lambda *args: (tried.append(args), captured_graph(*args))[1])
        return tried

    @pytest.fixture
    def pair(self, device) -> Any:
        """Steps optimizers captured and others by themselves, from gradients that stay where they are."""
        kinds = [ADAM, (th.optim.AdamW, dict(lr=3e-3, fused=True)), ADAM]
        expected, trained = Trained(kinds, device), Trained(kinds, device)
        generator = th.Generator().manual_seed(2)
        places = [th.empty_like(param) for own in trained.params for param in own]

        def step(by: OptimizerStep, times: int, found: float = 0.0) -> None:
            for _ in range(times):
                for place, gradient in zip(places, trained.gradients(generator), strict=True):
                    place.copy_(gradient)
                if not found:
                    expected.step_by_step(places)
                by(trained.optimizers, trained.params, places, None, th.full((1,), found, device=device))
                assert_same(trained.state(), expected.state())

        return expected, trained, step

    @pytest.mark.parametrize("device", DEVICES)
    def test_steps_are_the_same(self, device, graphs, pair):
        expected, trained, step = pair
        together = OptimizerStep()
        step(together, 12)
        assert len(graphs) == 2  # Adam's and AdamW's
        step(together, 2, found=1.0)
        step(together, 2)
        for optimizer in (expected.optimizers[1], trained.optimizers[1]):
            optimizer.param_groups[0]["lr"] = 1e-4
        step(together, 6)
        assert len(graphs) == 3
        # Other storages under the same parameters
        for optimizer in (expected.optimizers[0], trained.optimizers[0]):
            for param in optimizer.param_groups[0]["params"]:
                param.data = param.data * 0.5
        step(together, 6)
        assert len(graphs) == 4
        for optimizer in (expected.optimizers[2], trained.optimizers[2]):
            reload(optimizer)
        step(together, 6)
        assert len(graphs) == 5
        # A copy begins without graphs, which cannot be copied
        for copied in (copy.deepcopy(together), pickle.loads(pickle.dumps(together))):
            step(copied, 2)
        assert len(graphs) == 5

    @pytest.mark.parametrize("device", DEVICES)
    def test_a_schedule_never_captures(self, device, graphs, pair):
        expected, trained, step = pair
        together = OptimizerStep()
        for number in range(10):
            for optimizer in (*expected.optimizers, *trained.optimizers):
                optimizer.param_groups[0]["lr"] = 1e-2 / (number + 1)
            step(together, 1)
        assert not graphs

    @pytest.mark.parametrize("device", ["cpu"])
    def test_what_cannot_be_captured(self, device, graphs, pair):
        """Is stepped without a graph, and tried once."""
        self.fake.fails = True
        step = pair[2]
        step(OptimizerStep(), 15)
        assert len(graphs) == 2
