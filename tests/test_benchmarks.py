"""What the benchmark counts and divides by: a speed is only as right as that."""

import importlib
import pathlib
import sys
from argparse import Namespace

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from torch.utils._python_dispatch import TorchDispatchMode

from sb3_softvalue import SACV
from sb3_softvalue.execution.batches import sample_batches
from sb3_softvalue.update import JointObjective, draw_noise, objective_gradients
from tests.helpers import RandomEnv

pytest.importorskip("tqdm", reason="the benchmark's progress bar is not installed")
sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "benchmarks"))
throughput, throughput_results, machine = (importlib.import_module(n) for n in ("throughput", "throughput_results", "machine"))


def arguments(gradient_steps: int) -> Namespace:
    """Of the command line: small enough for a second."""
    return Namespace(
        env="Pendulum-v1",
        device="cpu",
        threads=1,
        n_envs=1,
        timesteps=0,
        slices=1,
        batch_size=[8],
        width=[8],
        train_freq=1,
        gradient_steps=gradient_steps,
        sbx_python=None,
    )


class Multiplications(TorchDispatchMode):
    """Counts the multiplications of all matrix products, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (th.ops.aten.mm.default, th.ops.aten.addmm.default):
            left, right = args[-2:]
            self.total += left.shape[0] * left.shape[1] * right.shape[1]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("width", [16, 64])
def test_floor_is_the_arithmetic_of_an_update(width):
    obs_dim, action_dim, batch_size = 5, 3, 32
    env = RandomEnv(spaces.Box(-1.0, 1.0, (obs_dim,)), spaces.Box(-1.0, 1.0, (action_dim,)))
    model = SACV("MlpPolicy", env, policy_kwargs=dict(net_arch=[width, width]), learning_starts=40, device="cpu").learn(40)
    (batch,) = sample_batches(model.replay_buffer, 1, batch_size, model.gamma, model.device)
    params = model._prepare_optimizers(1.0).params
    with Multiplications() as counter:
        noise = draw_noise(model.actor, batch_size, model.device)
        objective_gradients(JointObjective(model.policy), params, batch, noise, model._temperature(), 1.0)
    # Eager mode also propagates the policy loss to the observations at which both critics are evaluated, which is avoidable
    avoidable = 2 * obs_dim / width
    products = counter.total / (batch_size * width * width)
    assert products == pytest.approx(throughput.products_per_update(width, obs_dim, action_dim) + avoidable)


@pytest.mark.parametrize("gradient_steps, done", [(1, 4), (3, 3), (8, 8)])
def test_updates_are_counted(gradient_steps, done):
    """A call of train() that does more updates than a turn asks for was once divided by what the turn asks for."""
    worker = throughput.Worker(arguments(gradient_steps), "updates", "sacv-eager")
    try:
        assert worker.answer()["first_call"] > 0
        answer = worker.tell("4")
        assert answer["times"] == done and answer["seconds"] > 0
        assert worker.tell("memory")["peak_mib"] > 10
    finally:
        worker.end()


def test_products_are_counted():
    worker = throughput.Worker(arguments(1), "products")
    try:
        worker.answer()
        assert worker.tell("dimensions") == dict(obs_dim=3, action_dim=1)
        answer = worker.tell("10")
        assert answer["times"] == 10 and np.isfinite(answer["seconds"])
    finally:
        worker.end()


def test_a_worker_that_fails_says_why():
    args = arguments(1)
    args.env = "NoSuchEnvironment-v0"
    worker = throughput.Worker(args, "updates", "sacv-eager")
    with pytest.raises(SystemExit, match="NoSuchEnvironment"):
        worker.answer()
    worker.end()


def test_results_of_several_processors_stand_beside_each_other(tmp_path):
    def row(processor: str, ratio: float) -> dict[str, object]:
        kind = {"measure": "updates/s", "algorithm": "sac", "batch_size": 8, "width": 8, "break-even, updates": None}
        return {"processor": processor, **kind, "ratio to SAC": ratio, "share of GEMM floor": 0.5}

    path = tmp_path / "throughput.csv"
    throughput_results.keep([row("A", 1.0)], path)
    throughput_results.keep([row("B", 2.0)], path)
    rows = throughput_results.keep([row("A", 3.0)], path)
    assert [(row["processor"], row["ratio to SAC"]) for row in rows] == [("B", "2"), ("A", "3")]
    throughput_results.draw(rows, tmp_path / "throughput.png", "title")
    assert (tmp_path / "throughput.png").stat().st_size > 10_000


def test_the_processor_is_named():
    name = machine.processor("cpu")
    assert name.endswith("cores") and len(name) > len("2 cores")
