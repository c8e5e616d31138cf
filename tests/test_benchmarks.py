"""What the benchmarks of speed count and divide by, and what the studies compare: by numbers worked out by hand."""

import pathlib
import re
import subprocess
import sys
from argparse import Namespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch as th
from gymnasium import spaces
from torch.utils._python_dispatch import TorchDispatchMode

from sb3_softvalue import SACV
from tests.helpers import RandomEnv
from tests.learning_helpers import ROOT

pytest.importorskip("tqdm", reason="the benchmark's progress bar is not installed")
pytest.importorskip("rliable", reason="the benchmark's statistics are not installed")
from benchmarks.speed import results, throughput
from benchmarks.studies import many_envs, value_lag


def arguments(gradient_steps: int, env: str = "Pendulum-v1") -> Namespace:
    """Of the command line: small enough for a second."""
    small = dict(env=env, device="cpu", threads=1, n_envs=1, timesteps=0, slices=1, batch_size=[8], width=[8])
    return Namespace(**small, train_freq=1, gradient_steps=gradient_steps, sbx_python=None)


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
    kwargs: dict[str, Any] = dict(policy_kwargs=dict(net_arch=[width, width]), learning_starts=40, device="cpu")
    model = SACV("MlpPolicy", env, execution="eager", **kwargs).learn(40)
    model.train(1, batch_size)  # which also looks at how the processor multiplies
    with Multiplications() as counter:
        model.train(1, batch_size)
    # Eager mode also propagates the policy loss to the observations at which both critics are evaluated, which is avoidable
    avoidable = 2 * obs_dim / width
    products = counter.total / (batch_size * width * width)
    assert products == pytest.approx(throughput.products_per_update(width, obs_dim, action_dim) + avoidable)


@pytest.mark.parametrize("gradient_steps, done", [(1, 4), (8, 8)])
def test_updates_are_counted(gradient_steps, done):
    """A call of train() that does more updates than a turn asks for was once divided by what the turn asks for."""
    contender = throughput.start(arguments(gradient_steps), "updates", "sacv-eager")
    try:
        assert contender.read()["first_call"] > 0
        answer = contender.ask("4")
        assert answer["times"] == done and answer["seconds"] > 0
        assert contender.ask("memory")["peak_mib"] > 10
    finally:
        contender.end()


def test_products_are_counted():
    contender = throughput.start(arguments(1), "products")
    try:
        contender.read()
        assert contender.ask("dimensions") == dict(obs_dim=3, action_dim=1)
        answer = contender.ask("10")
        assert answer["times"] == 10 and np.isfinite(answer["seconds"])
    finally:
        contender.end()


def test_contender_that_fails():
    contender = throughput.start(arguments(1, env="NoSuchEnvironment-v0"), "updates", "sacv-eager")
    with pytest.raises(SystemExit, match="NoSuchEnvironment"):
        contender.read()
    contender.end()


def test_costs_are_measured_in_turns():
    """Each addition runs, and the two additions to one contender are compared with the same one."""
    command = [sys.executable, "-m", "benchmarks.speed.costs", "--env", "Pendulum-v1", "--execution", "eager"]
    command += ["--timesteps", "240", "--slices", "3", "--save-freq", "100"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()[1:]
    assert [line.partition(":")[0] for line in printed] == [
        f"{name}, {clock}" for name in ("checkpoints", "diagnostics", "finite check") for clock in ("wall clock", "processor")
    ]


def test_results_of_several_processors_stand_beside_each_other(tmp_path):
    def row(processor: str, ratio: float) -> dict[str, object]:
        kind = {"measure": "updates/s", "algorithm": "sac", "batch_size": 8, "width": 8, "break-even, updates": None}
        return {"processor": processor, **kind, "ratio to SAC": ratio, "share of GEMM floor": 0.5}

    path = tmp_path / "throughput.csv"
    results.merge([row("A", 1.0)], path)
    results.merge([row("B", 2.0)], path)
    rows = results.merge([row("A", 3.0)], path)
    assert [(row["processor"], row["ratio to SAC"]) for row in rows] == [("B", "2"), ("A", "3")]
    results.draw(rows, tmp_path / "throughput.png", "title")
    assert (tmp_path / "throughput.png").stat().st_size > 10_000


def test_soft_returns():
    rewards, bonus = np.array([[1.0], [2.0], [4.0]]), np.array([[10.0], [20.0], [30.0]])
    of_q, of_v = value_lag.soft_returns(rewards, bonus, gamma=0.5)
    # From the end: 4; 2 + (4 + 30)/2 = 19; 1 + (19 + 20)/2 = 20.5, and each with its own bonus
    np.testing.assert_allclose(of_q, [[20.5], [19.0], [4.0]])
    np.testing.assert_allclose(of_v, [[30.5], [39.0], [34.0]])


def test_looking_changes_no_training_and_sees_the_networks():
    def train(every: int, **options: Any) -> tuple[SACV, Any]:
        small: dict[str, Any] = dict(seed=0, device="cpu", learning_starts=50, policy_kwargs={"net_arch": [8]})
        model = SACV("MlpPolicy", "HalfCheetah-v5", **small, **options)
        watching = value_lag.Look(seed=0, every=every, episodes=3, steps=2)
        return model.learn(120, callback=watching), watching

    (model, watching), (alone, _) = train(40), train(1000)
    for ours, theirs in zip(model.policy.parameters(), alone.policy.parameters(), strict=True):
        assert th.equal(ours, theirs)
    assert [row["timesteps"] for row in watching.rows] == [80, 120]
    seen = value_lag.look(model, watching.env, seed=7, steps=2)
    watching.env.seed(7)
    observations = watching.env.reset()
    assert seen["V"] == pytest.approx(float(model.predict_values(observations).mean()), rel=1e-5)
    assert seen["alpha"] == pytest.approx(model.log_ent_coef.exp().item())
    # The constant of the prior is in what V is compared with: α·6·ln 2 in each of two steps
    model.action_prior = "normalized_uniform"
    normalized = value_lag.look(model, watching.env, seed=7, steps=2)
    constant = seen["alpha"] * 6 * 0.6931471806 * (1 + model.gamma)
    assert seen["collected from V"] - normalized["collected from V"] == pytest.approx(constant, rel=1e-5)


def test_value_lag(tmp_path: pathlib.Path):
    options = ["--timesteps", "120", "--every", "40", "--episodes", "2", "--steps", "60", "--learning-starts", "50"]
    rows = value_lag.main([*options, "--algorithms", "sac", "sacv", "--seeds", "0", "1", "--out", str(tmp_path / "lag.csv")])
    assert len(rows) == 2 * 2 * 2 == len((tmp_path / "lag.csv").read_text().splitlines()) - 1
    assert np.isfinite(rows[rows["algorithm"] == "sacv"].drop(columns="algorithm")).all(axis=None)
    assert rows[rows["algorithm"] == "sac"]["V"].isna().all() and (tmp_path / "lag.png").is_file()


def test_time_of_parts_without_the_parts_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    model = SACV("MlpPolicy", "Pendulum-v1", device="cpu", policy_kwargs={"net_arch": [8]})
    clock = many_envs.Clock(model)
    outer = Namespace(step=lambda: model.replay_buffer.size(), twice=lambda: (outer.step(), outer.step()))
    clock.watch(outer, "step", "inside")
    clock.watch(outer, "twice", "around")
    ticks = iter(range(100))
    monkeypatch.setattr(many_envs.time, "process_time", lambda: next(ticks))
    outer.twice()
    # The clock is read at 0, 1, 2, 3, 4 and 5
    assert clock.seconds == {"inside": 2, "around": 3}


def test_many_environments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    changes = {"learning_starts": 160, "gradient_steps": 2, "batch_size": 16}
    monkeypatch.setattr(many_envs, "VARIATIONS", ((16, "eager", changes),))
    row = many_envs.run(many_envs.Case(16, "eager", changes, seed=0), largest=2)
    assert (row["transitions"], row["updates"]) == (320, 20) and -2000.0 < row["return"] < many_envs.SOLVED
    # From the fourth step with updates on: from 224 transitions and 6 updates to the end
    assert row["transitions/s"] / row["updates/s"] == pytest.approx(96 / 14)
    shares = {key: value for key, value in row.items() if key.startswith("share, ")}
    assert sum(shares.values()) == pytest.approx(1.0) and min(shares.values()) > 0.0
    case = many_envs.Case(16, "sac", {}, seed=0)
    rows = [
        row | many_envs.Case(16, "eager", changes, seed=0).key(),
        *({**row, **case.key(), "return": -150.0, "seconds": s} for s in (90.0, 120.0)),
    ]
    text = many_envs.markdown(pd.DataFrame(rows).assign(processor="P"))
    assert "| **1.75** | 1.50 to 2.00 |" in text and "1 of 1 not solved" in text and "not run" in text


# From the ground up: each knows only what stands before it
MODULES = (
    *("common.command_line", "common.machine", "common.statistics"),
    *("learning.variants", "learning.tasks", "learning.run", "learning.results", "learning.sweep"),
    *("learning.measured", "learning.figures", "learning.report", "learning.__main__"),
    *("speed.worker", "speed.contender", "speed.results"),
    *("speed.throughput", "speed.costs", "speed.many_seeds"),
    *("studies.value_lag", "studies.from_sac", "studies.early_lag", "studies.tuned", "studies.privileged"),
    "studies.many_envs",
)


def test_structure_of_the_benchmarks():
    """Imports go down, and between folders only to common/, or from studies/ to learning/."""
    files = {path.relative_to(ROOT / "benchmarks") for path in (ROOT / "benchmarks").rglob("*.py")}
    assert {".".join(path.with_suffix("").parts) for path in files if path.name != "__init__.py"} == set(MODULES)
    for number, module in enumerate(MODULES):
        source = ROOT.joinpath("benchmarks", *module.split(".")).with_suffix(".py").read_text(encoding="utf-8")
        for folder, name in re.findall(r"^ *from benchmarks\.(\w+)\.(\w+) import", source, flags=re.MULTILINE):
            assert f"{folder}.{name}" in MODULES[:number], f"{module} knows {folder}.{name}"
            own = module.partition(".")[0]
            assert folder in (own, "common") or (own, folder) == ("studies", "learning"), f"{own} knows {folder}"
