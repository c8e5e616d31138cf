"""Every example runs, headless, with few steps."""

import importlib
import pathlib
import sys
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")
pytest.importorskip("rich")
# SB3's progress bar says so at each use
pytestmark = pytest.mark.filterwarnings("ignore:rich is experimental:tqdm.TqdmExperimentalWarning")


@pytest.fixture
def example(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module, found as Python finds it when it is run."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.delitem(sys.modules, request.param, raising=False)
    return importlib.import_module(request.param)


def uses(name: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("example", [name], indirect=True, ids=[name])


def test_every_example_has_a_test() -> None:
    text = pathlib.Path(__file__).read_text(encoding="utf-8")
    assert [path.stem for path in EXAMPLES.glob("*.py") if f'uses("{path.stem}")' not in text] == []


@uses("pendulum")
def test_pendulum(example: ModuleType, tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--timesteps", "220", "--episodes", "2", "--folder", str(tmp_path)]
    assert example.main([*options, "--train"]) is None
    assert example.main([*options, "--test"]) < 0.0
    printed = capsys.readouterr().out
    assert "Return over 2 episodes" in printed and "slope" in printed and "bias" in printed
    written = {path.name for path in tmp_path.iterdir()}
    assert {"model.zip", "diagnostics.npz", "calibration.npz", "trained.gif", "report"} <= written
    assert len(list((tmp_path / "report").glob("*.png"))) == 7


@uses("reacher")
def test_reacher(example: ModuleType, tmp_path: Any) -> None:
    pytest.importorskip("mujoco")
    assert example.main(["--timesteps", "150", "--episodes", "2", "--folder", str(tmp_path)]) < 0.0
    assert len(list((tmp_path / "report").glob("*.png"))) == 6
    assert (tmp_path / "trained.gif").is_file() == example.can_film()


@uses("swap_sac")
@pytest.mark.parametrize("algo", ["sac", "sacv"])
def test_swap_sac(example: ModuleType, algo: str, tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert example.main(["--algo", algo, "--timesteps", "150", "--folder", str(tmp_path)]) < 0.0
    assert capsys.readouterr().out.strip().splitlines()[-1].startswith(algo.upper())


@uses("value_landscape")
def test_value_landscape(example: ModuleType, tmp_path: Any) -> None:
    pictures = example.main(["--timesteps", "630", "--folder", str(tmp_path)])
    assert [path.is_file() for path in pictures] == [True] * 3


@uses("compare_sac_sacv")
def test_compare_sac_sacv(example: ModuleType, tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert example.main(["--timesteps", "120", "--seeds", "2", "--episodes", "1", "--folder", str(tmp_path)]).is_file()
    assert "SAC: mean return" in capsys.readouterr().out


@uses("her_fetch_like")
def test_her_fetch_like(example: ModuleType, tmp_path: Any) -> None:
    check_env(example.make_env().unwrapped, skip_render_check=True)
    assert 0.0 <= example.main(["--timesteps", "260", "--folder", str(tmp_path)]) <= 1.0


@uses("drug_dosing")
# It recommends actions in [-1, 1]; these are in mU/min, and SACV scales them
@pytest.mark.filterwarnings("ignore:.*For Box action spaces, we recommend using a symmetric and normalized space")
def test_drug_dosing(example: ModuleType, tmp_path: Any) -> None:
    check_env(example.Patient(), skip_render_check=True)
    traces = example.main(["--timesteps", "400", "--days", "2", "--folder", str(tmp_path)])
    assert traces["PID"]["glucose"].shape == (2, 288) and np.isfinite(traces["PID"]["glucose"]).all()
    assert (tmp_path / "glucose.png").is_file() and (tmp_path / "report" / "index.html").is_file()


@uses("drug_dosing")
def test_drug_dosing_model(example: ModuleType) -> None:
    # Basal infusion holds basal glucose and insulin; without any insulin the glucose rises for ever
    basal = np.array([example.GB, 0.0, example.IB, 0.0])
    assert example.BASAL == pytest.approx(16.67, abs=0.01)
    np.testing.assert_allclose(example._derivative(basal, example.BASAL), 0.0, atol=1e-12)
    assert example.risk(112.5) == pytest.approx(0.0, abs=0.01)
    assert example.risk(70.0) == pytest.approx(7.7, abs=0.1) and example.risk(180.0) == pytest.approx(7.7, abs=0.1)
    # Plasma insulin alone is linear: after one minute from 15 mU/L without infusion, 15·exp(-n)
    assert example._runge_kutta(basal, 0.0)[2] == pytest.approx(15.0 * np.exp(-example.N), rel=1e-6)


@uses("resume")
def test_resume(example: ModuleType, tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    folder = ["--folder", str(tmp_path)]
    assert example.main([*folder, "--timesteps", "210"]) == 210
    assert example.main([*folder, "--timesteps", "230"]) == 230
    assert "Going on from step 210" in capsys.readouterr().out
