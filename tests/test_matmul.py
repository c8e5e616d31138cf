"""How an update's matrices are multiplied: by which library, in which form, and in mixed precision."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch as th
from torch.fx.experimental.proxy_tensor import make_fx

from sb3_softvalue.execution import choice, matmul
from sb3_softvalue.execution.graph_pass import Bf16MatmulPass, MatmulRewritePass
from tests.helpers import assert_same, box_env, filled, parameters_of, save_and_load, train

native = pytest.mark.skipif(not matmul.multiplies_bfloat16(), reason="this processor has no instruction for bfloat16")
NOTHING_TO_ROUND = (
    "execution='mixed' has no effect here and equals 'compiled': no product between hidden layers has at least 64"
)


def test_products_are_rewritten():
    """The compiler pass on a graph: the same numbers; no bias copied, no product with a vector, no unused column."""

    def function(bias: th.Tensor, left: th.Tensor, right: th.Tensor, column: th.Tensor) -> tuple[th.Tensor, ...]:
        some = th.addmm(th.mm(left, right.flip(0)), left, right)[:, 1:3]  # as the gradients of two critics to the actions
        return (
            th.addmm(bias, left, right).relu() + th.mm(column, right[:1]) + th.mm(left, right[:, :1]) + th.mm(left[:1], right),
            some,
            th.mm(left, right)[1:],
        )

    tensors = (th.randn(5), th.randn(4, 3), th.randn(3, 5), th.randn(4, 1))
    module = make_fx(function, tracing_mode="fake")(*tensors)
    assert {"addmm", "mm"} <= {str(node.target).split(".")[1] for node in module.graph.nodes if node.op == "call_function"}
    MatmulRewritePass()(module.graph)
    module.graph.lint()
    module.recompile()
    products = [node for node in module.graph.nodes if "mm" in str(node.target)]
    assert sorted(node.args[1].meta["val"].shape[1] for node in products) == [2, 2, 5, 5]
    assert [str(node.target) for node in products] == ["aten.mm.default"] * 4
    for ours, expected in zip(module(*tensors), function(*tensors), strict=True):
        th.testing.assert_close(ours, expected)


def test_gradients_of_layers_with_few_inputs_are_computed_as_their_transpose():
    """As long as their long side is long; the numbers and the memory format are those of the weights' gradients."""

    def function(upstream: th.Tensor, inputs: th.Tensor) -> tuple[th.Tensor, ...]:
        turned = upstream.permute(1, 0)  # as Inductor writes it
        return turned @ inputs, turned @ upstream, upstream[:, :5].permute(1, 0) @ inputs

    tensors = (th.randn(80, 70), th.randn(80, 3))
    module = make_fx(function, tracing_mode="fake")(*tensors)
    MatmulRewritePass()(module.graph)
    module.graph.lint()
    module.recompile()
    shapes = [tuple(node.meta["val"].shape) for node in module.graph.nodes if node.target is th.ops.aten.mm.default]
    assert shapes == [(3, 70), (70, 70), (5, 3)]
    for ours, expected in zip(module(*tensors), function(*tensors), strict=True):
        th.testing.assert_close(ours, expected)
        assert ours.is_contiguous()


def test_what_only_looks_like_a_form_that_is_rewritten():
    """A permutation that changes nothing, a sum with a factor and one with a number, of which columns are taken."""

    def function(square: th.Tensor, thin: th.Tensor) -> tuple[th.Tensor, ...]:
        weighted = th.add(th.mm(square, square), th.mm(square, square.flip(0)), alpha=-3.0)[:, :4]
        return square.permute(0, 1) @ thin, square.permute(0, -1) @ thin, weighted, (th.mm(square, square) + 1.0)[:, :4]

    tensors = (th.randn(70, 70), th.randn(70, 3))
    module = make_fx(function, tracing_mode="fake")(*tensors)
    MatmulRewritePass()(module.graph)
    module.graph.lint()
    module.recompile()
    for ours, expected in zip(module(*tensors), function(*tensors), strict=True):
        th.testing.assert_close(ours, expected)


@pytest.mark.skipif(not hasattr(th.backends.mkldnn, "matmul"), reason="PyTorch before 2.9 has no such setting")
@pytest.mark.parametrize("faster", [True, False])
def test_products_stay_float32(faster, monkeypatch):
    """Whichever library multiplies, the numbers are those of float32, and PyTorch's setting is as before afterwards."""
    monkeypatch.setattr(matmul, "is_candidate", lambda: faster)
    monkeypatch.setattr(matmul, "_is_exact", lambda *shape: True)
    fast, setting = matmul.PreferOneDNN(th.nn.Linear(3, 4), 5), th.backends.mkldnn.matmul
    with fast:
        assert setting.fp32_precision == ("bf16" if faster else "none")
    assert setting.fp32_precision == "none"
    with pytest.raises(ZeroDivisionError), fast:
        _ = 1 / 0
    assert setting.fp32_precision == "none"
    setting.fp32_precision = "tf32"
    try:
        with fast:
            assert setting.fp32_precision == "tf32", "a precision that the user has set stays"
    finally:
        setting.fp32_precision = "none"


def test_products_of_this_machine_are_float32():
    left, right = th.randn(2, 256, 256, generator=th.Generator().manual_seed(0))
    with matmul.PreferOneDNN(th.nn.Linear(256, 256), 256):
        error = ((left @ right).double() - left.double() @ right.double()).abs().max()
    assert error < 1e-4, "bfloat16 would be off by 0.1"


def test_large_products_are_rounded():
    """The compiler pass on a graph: large products in bfloat16, each matrix converted once, small ones and sums in float32."""

    def function(left: th.Tensor, right: th.Tensor, head: th.Tensor) -> tuple[th.Tensor, ...]:
        hidden = th.mm(left, right.permute(1, 0)).relu()  # as Inductor writes it
        return th.mm(hidden, head), th.mm(hidden.permute(1, 0), left), th.mm(hidden, right)

    tensors = tuple(th.randn(shape, generator=th.Generator().manual_seed(0)) for shape in ((96, 64), (80, 64), (80, 6)))
    module = make_fx(function, tracing_mode="fake")(*tensors)
    Bf16MatmulPass()(module.graph)
    module.graph.lint()
    module.recompile()
    nodes = [node for node in module.graph.nodes if node.op == "call_function"]
    assert [node.meta["val"].dtype for node in nodes if "mm" in str(node.target)].count(th.bfloat16) == 3
    to_bfloat16 = [node for node in nodes if "convert" in str(node.target) and node.args[1] is th.bfloat16]
    assert len(to_bfloat16) == 3, "left, right and hidden"
    left, right, head = (tensor.double() for tensor in tensors)
    hidden = (left @ right.t()).relu()
    for ours, exact in zip(module(*tensors), (hidden @ head, hidden.t() @ left, hidden @ right), strict=True):
        assert ours.dtype == th.float32
        assert 1e-4 < (ours - exact).norm() / exact.norm() < 1e-2, "as near as bfloat16 with its 8 bits"


def test_products_that_read_observations_keep_their_precision():
    """Also through what is done to the observations before; once a layer has read them, numbers are the network's own."""

    def function(weights: th.Tensor, observations: th.Tensor) -> tuple[th.Tensor, ...]:
        scaled = th.cat((observations / 100.0, observations), dim=1)[:, :70]
        hidden = (scaled @ weights).relu()
        return scaled.permute(1, 0) @ hidden, hidden @ weights

    tensors = (th.randn(70, 70), th.randn(80, 40))
    exact = function(*tensors)
    for data_shapes, n_rounded in (([], 3), ([(80, 40)], 1)):
        module = make_fx(function, tracing_mode="fake")(*tensors)
        Bf16MatmulPass(data_shapes)(module.graph)
        module.graph.lint()
        module.recompile()
        results = [node.meta["val"].dtype for node in module.graph.nodes if node.target is th.ops.aten.mm.default]
        assert results.count(th.bfloat16) == n_rounded
        assert th.equal(module(*tensors)[0], exact[0]) == bool(data_shapes)


@native
def test_observations_are_not_rounded():
    """With one hidden layer there is nothing else to round, as it says: the update is the compiled one's to the bit."""
    options = dict(batch_size=64, policy_kwargs=dict(net_arch=[64]), seed=0)
    models = [filled(box_env(70), execution=how, **options) for how in ("compiled", "mixed")]
    for model, told in zip(models, (nullcontext(), pytest.warns(UserWarning, match=NOTHING_TO_ROUND)), strict=True):
        th.manual_seed(0)
        np.random.seed(0)
        with told:
            train(model, 2)
    assert_same(parameters_of(models[1].policy), parameters_of(models[0].policy))


@native
@pytest.mark.usefixtures("compilations")
def test_observations_of_another_batch_size_are_not_rounded(monkeypatch):
    """The pass is asked for each batch size which inputs are data."""
    shapes = []
    init = Bf16MatmulPass.__init__
    monkeypatch.setattr(Bf16MatmulPass, "__init__", lambda self, data: (shapes.append(set(data)), init(self, data))[1])
    model = filled(box_env(70), execution="mixed", policy_kwargs=dict(net_arch=[8]))
    train(model, 2)
    model.train(1, batch_size=64)
    assert len(shapes) == 2 and (8, 70) in shapes[0] and (64, 70) in shapes[1]


@native
@pytest.mark.parametrize("n_observations, batch_size, net_arch", [(3, 63, [64, 64]), (3, 64, [64, 63]), (70, 64, [64])])
def test_nothing_to_round_is_told(n_observations, batch_size, net_arch):
    model = filled(box_env(n_observations), execution="mixed", batch_size=batch_size, policy_kwargs=dict(net_arch=net_arch))
    train(model, 1)  # eager
    with pytest.warns(UserWarning, match=NOTHING_TO_ROUND):
        train(model, 1)
    train(model, 1)  # and not told again


def test_what_a_layer_gives_is_no_observation():
    """Also where its product was written as something else, or where it is an embedding; but not a product of observations."""

    def function(*tensors: th.Tensor) -> tuple[th.Tensor, ...]:
        table, weights, one, rows, *more = tensors
        thin = th.addmm(more[0], one, weights[:1])
        column = rows @ weights[:, :1]
        embedded = th.nn.functional.embedding(more[1], table)
        products = [part @ weights for part in (thin, (rows @ weights).relu() * column, embedded, (rows @ rows.t())[:, :70])]
        # No layer of any network here, but of an extractor perhaps
        return (*products, one @ weights[:1], th.addmm(more[0], weights, weights, beta=0.5))

    tensors = (th.randn(5, 70), th.randn(70, 70), th.randn(72, 1), th.randn(72, 70), th.randn(70), th.randint(5, (72,)))
    graph = make_fx(function, tracing_mode="fake")(*tensors).graph
    Bf16MatmulPass([(72, 1), (72, 70), (72,)])(graph)
    graph.lint()
    results = [node.meta["val"].dtype for node in graph.nodes if node.target is th.ops.aten.mm.default]
    # All but rows @ weights, rows @ rowsᵀ and what reads that
    assert results.count(th.bfloat16) == 3


@native
@pytest.mark.parametrize("net_arch", [[64, 80], dict(pi=[64], qf=[96, 64], vf=[80, 64])], ids=str)
def test_mixed_update_is_near_the_float32_one(net_arch, tmp_path):
    """One step of gradient descent from the same weights, batch and noise; the file keeps the choice."""
    options = dict(net_arch=net_arch, optimizer_class=th.optim.SGD)
    models = [filled(box_env(), execution=how, batch_size=64, policy_kwargs=options, seed=0) for how in ("eager", "mixed")]
    for model in models:
        th.manual_seed(1)
        np.random.seed(1)
        train(model, 1)  # the first is eager
    assert_same(parameters_of(models[1].policy), parameters_of(models[0].policy))
    before = [parameter.clone() for parameter in models[0].policy.parameters()]
    for model in models:
        th.manual_seed(0)
        np.random.seed(0)
        train(model, 1)
        assert model._executor.resolved == model.execution
    steps = [[p - old for p, old in zip(m.policy.parameters(), before, strict=True)] for m in models]
    exact, mixed = (th.cat([step.flatten() for step in model_steps]).double() for model_steps in steps)
    assert 1e-5 < (exact - mixed).norm() / exact.norm() < 2e-2
    assert save_and_load(models[1], tmp_path / "model").execution == "mixed"


@pytest.mark.parametrize(
    "instruction, options, reason",
    [
        (False, {}, "this CPU has no bfloat16 instructions"),
        (True, dict(use_sde=True), "gSDE draws its noise inside the network"),
    ],
)
def test_mixed_precision_is_refused(instruction, options, reason, monkeypatch):
    monkeypatch.setattr(choice, "multiplies_bfloat16", lambda: instruction)
    model = filled(box_env(), execution="mixed", **options)
    with pytest.raises(ValueError, match=f"execution='mixed' is not possible: {reason}.*use execution='auto' or 'eager'"):
        train(model, 1)
    assert model._n_updates == 0


def test_autocast_is_refused():
    """It keeps rounded copies of the weights until its end: an update within it would not be seen by the next."""
    layer, row = th.nn.Linear(1, 1, bias=False), th.ones(1, 1)
    with th.autocast("cpu", th.bfloat16):
        before = layer(row).item()
        layer.weight.data.add_(1.0)
        assert layer(row).item() == before, "the reason is gone: PyTorch takes the weights as they are"
    model = filled(box_env(), execution="eager")
    state = parameters_of(model.policy)
    n_transitions = model.replay_buffer.size()
    with th.autocast("cpu", th.bfloat16):
        for work in (lambda: model.learn(1), lambda: train(model, 1)):
            with pytest.raises(RuntimeError, match=r"cannot learn inside torch.autocast.*use execution='mixed'"):
                work()
    assert_same(parameters_of(model.policy), state)
    assert model.replay_buffer.size() == n_transitions
