"""The step of all optimizers at once against each optimizer's own ``step()``, bit for bit."""

import copy
import gc
import weakref
from typing import Any

import pytest
import torch as th

from sb3_softvalue.execution import captured_step
from sb3_softvalue.execution.optimizers import OptimizerStep
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


def make(kinds: Any, device: str = "cpu") -> list[th.optim.Optimizer]:
    """Optimizers of some random parameters each, the same at every call."""
    generator = th.Generator().manual_seed(1)
    optimizers = []
    for number, (optimizer_class, kwargs) in enumerate(kinds):
        shapes = [(4, 3), (4,), (1,)][: number + 1]
        params = [th.randn(shape, generator=generator).to(device).requires_grad_() for shape in shapes]
        optimizers.append(optimizer_class(params, **kwargs))
    return optimizers


def gradients_of(optimizers: list[th.optim.Optimizer], generator: th.Generator) -> list[th.Tensor]:
    return [th.randn(param.shape, generator=generator) for opt in optimizers for param in opt.param_groups[0]["params"]]


def plain_step(optimizers: list[th.optim.Optimizer], gradients: list[Any], max_grad_norm: float | None) -> None:
    remaining = iter(gradients)
    for optimizer in optimizers:
        params = optimizer.param_groups[0]["params"]
        for param in params:
            param.grad = next(remaining)
        if max_grad_norm is not None:
            th.nn.utils.clip_grad_norm_(params, max_grad_norm)
        optimizer.step()


def state_of(optimizers: list[th.optim.Optimizer]) -> list[Any]:
    params = [[param.detach() for param in optimizer.param_groups[0]["params"]] for optimizer in optimizers]
    return [params, [optimizer.state_dict()["state"] for optimizer in optimizers]]


@pytest.mark.parametrize("max_grad_norm", [None, 0.5])
@pytest.mark.parametrize("kinds", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_equals_the_optimizers_own_steps(kinds, max_grad_norm):
    expected, optimizers = make(kinds), make(kinds)
    generator = th.Generator().manual_seed(2)
    step = OptimizerStep(optimizers)
    for count in range(6):
        for optimizer in (expected[0], optimizers[0]):
            optimizer.param_groups[0]["lr"] = 1e-2 / (1 + count)  # a schedule
        gradients = gradients_of(optimizers, generator)
        if count == 3:
            gradients[0] = None  # a parameter on which nothing depends: SB3 leaves it as it is
        plain_step(expected, [None if g is None else g.clone() for g in gradients], max_grad_norm)
        step(gradients, max_grad_norm)
        assert_same(state_of(optimizers), state_of(expected))


def test_own_step_can_take_over():
    expected, optimizers = make([ADAM, ADAM]), make([ADAM, ADAM])
    generator = th.Generator().manual_seed(2)
    step = OptimizerStep(optimizers)
    for count in range(6):
        gradients = gradients_of(optimizers, generator)
        plain_step(expected, [gradient.clone() for gradient in gradients], None)
        if count % 2:
            plain_step(optimizers, gradients, None)
        else:
            step(gradients, None)
    assert_same(state_of(optimizers), state_of(expected))


def test_is_not_current_after_a_load():
    optimizers = make([ADAM, ADAM])
    step = OptimizerStep(optimizers)
    assert step.is_current(optimizers)
    optimizers[1].load_state_dict(copy.deepcopy(optimizers[1].state_dict()))
    assert not step.is_current(optimizers)
    assert not OptimizerStep(optimizers).is_current([optimizers[0]])
    assert not OptimizerStep(optimizers).is_current(optimizers[::-1])


def test_is_not_current_after_an_option_is_set():
    for change in (
        lambda optimizer: optimizer.register_step_post_hook(lambda *args: None),
        lambda optimizer: optimizer.param_groups[0].update(maximize=True),
        lambda optimizer: optimizer.param_groups[0].update(fused=False),
        lambda optimizer: optimizer.state.clear(),
        lambda optimizer: optimizer.state[optimizer.param_groups[0]["params"][0]].update(exp_avg=th.ones(4, 3)),
    ):
        optimizers = make([ADAM, ADAM])
        step = OptimizerStep(optimizers)
        step(gradients_of(optimizers, th.Generator().manual_seed(2)), None)
        assert step.is_current(optimizers)
        change(optimizers[1])
        assert not step.is_current(optimizers)
        # The next one takes the optimizers as they are now
        assert OptimizerStep(optimizers).is_current(optimizers)


def test_hooks_are_called():
    optimizers = make([ADAM])
    calls = []
    optimizers[0].register_step_post_hook(lambda *args: calls.append(1))
    OptimizerStep(optimizers)([th.ones(4, 3)], None)
    assert calls == [1]


def test_frozen_parameters_are_left_out():
    optimizers = make([ADAM, ADAM])
    frozen = optimizers[1].param_groups[0]["params"][0]
    frozen.requires_grad_(False)
    before = frozen.clone()
    step = OptimizerStep(optimizers)
    assert len(step.params) == 2
    step([th.ones(4, 3), th.ones(4)], None)
    assert th.equal(frozen, before) and not optimizers[1].state[frozen]


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not th.cuda.is_available(), reason="needs a CUDA device"))]


class TestCaptured:
    """The step as a graph; on a CPU the graph is a stand-in that steps when it is replayed."""

    @pytest.fixture
    def captures(self, request, monkeypatch) -> list[Any]:
        """One entry for each capture."""
        captures: list[Any] = []
        capture = captured_step.capture

        class Graph:
            def __init__(self, compute: Any):
                self.replay = compute

        def stand_in(compute: Any, device: th.device, error_mode: str) -> tuple[Any, None]:
            for _ in range(3):
                compute()
            return Graph(compute), None

        def recorded(compute: Any, device: th.device, error_mode: str) -> tuple[Any, Any]:
            captures.append(device)
            return (stand_in if device.type == "cpu" else capture)(compute, device, error_mode=error_mode)

        monkeypatch.setattr(captured_step, "capture", recorded)
        monkeypatch.setattr(captured_step, "_DEVICE", request.getfixturevalue("device"))
        monkeypatch.setattr(captured_step, "_CALLS_BEFORE", 4)
        return captures

    @pytest.fixture
    def pair(self, device) -> Any:
        """Steps optimizers captured and others by themselves, from gradients that stay where they are."""
        kinds = [ADAM, (th.optim.AdamW, dict(lr=3e-3, fused=True)), ADAM]
        expected, optimizers = make(kinds, device), make(kinds, device)
        generator = th.Generator().manual_seed(2)
        places = [th.empty_like(param) for optimizer in optimizers for param in optimizer.param_groups[0]["params"]]

        def step(by: OptimizerStep, times: int, closed: float = 0.0) -> None:
            for _ in range(times):
                for place, gradient in zip(places, gradients_of(optimizers, generator), strict=True):
                    place.copy_(gradient)
                if not closed:
                    plain_step(expected, [place.clone() for place in places], None)
                by(places, None, th.full((1,), closed, device=device))
                assert_same(state_of(optimizers), state_of(expected))

        return expected, optimizers, step

    @pytest.mark.parametrize("device", DEVICES)
    def test_steps_are_the_same(self, device, captures, pair):
        expected, optimizers, step = pair
        together = OptimizerStep(optimizers)
        step(together, 3)
        assert not captures
        step(together, 5)
        assert len(captures) == 2  # Adam's and AdamW's
        step(together, 2, closed=1.0)
        step(together, 2)
        for optimizer in (expected[1], optimizers[1]):
            optimizer.param_groups[0]["lr"] = 1e-4
        step(together, 3)
        assert len(captures) == 2
        step(together, 2)
        assert len(captures) == 3
        # Other storages under the same parameters
        for optimizer in (expected[0], optimizers[0]):
            for param in optimizer.param_groups[0]["params"]:
                param.data = param.data * 0.5
        step(together, 6)
        assert len(captures) == 4
        state = copy.deepcopy(expected[2].state_dict())
        for optimizer in (expected[2], optimizers[2]):
            optimizer.load_state_dict(copy.deepcopy(state))
        assert not together.is_current(optimizers)
        step(OptimizerStep(optimizers), 6)

    @pytest.mark.parametrize("device", DEVICES)
    def test_a_schedule_never_captures(self, device, captures, pair):
        expected, optimizers, step = pair
        together = OptimizerStep(optimizers)
        for number in range(10):
            for optimizer in (*expected, *optimizers):
                optimizer.param_groups[0]["lr"] = 1e-2 / (number + 1)
            step(together, 1)
        assert not captures

    @pytest.mark.parametrize("device", ["cpu"])
    def test_what_cannot_be_captured(self, device, captures, pair, monkeypatch):
        """Is stepped without a graph, and tried once."""

        def fails(compute: Any, device: th.device, error_mode: str) -> None:
            compute()
            captures.append(device)
            raise RuntimeError("not here")

        monkeypatch.setattr(captured_step, "capture", fails)
        _, optimizers, step = pair
        step(OptimizerStep(optimizers), 12)
        assert len(captures) == 2

    @pytest.mark.parametrize("device", DEVICES)
    def test_ends_with_its_step(self, device, captures, pair):
        """Without waiting for the garbage collector: a graph holds memory of the device. The stand-in holds the step."""
        _, optimizers, step = pair
        together = OptimizerStep(optimizers)
        step(together, 6 if device == "cuda" else 3)
        groups = [weakref.ref(group) for group in together._groups]
        gc.disable()
        try:
            del together
            assert len(groups) == 2 and not any(group() for group in groups)
        finally:
            gc.enable()
