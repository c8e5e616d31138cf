"""The command sb3-softvalue, with RL Zoo and without."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sb3_softvalue import cli

launcher = pytest.importorskip(
    "sb3_softvalue.zoo.launcher", reason='RL Zoo is not installed: pip install "sb3_softvalue[zoo]"'
)


def without_zoo(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run code in a process where RL Zoo cannot be imported."""
    code = f"import sys; sys.modules['rl_zoo3'] = None; {code}"
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120)


def test_importing_the_package_needs_no_zoo() -> None:
    process = without_zoo("import sb3_softvalue, sb3_softvalue.cli; assert 'optuna' not in sys.modules")
    assert process.returncode == 0, process.stderr


@pytest.mark.parametrize(
    "code", ["from sb3_softvalue.cli import main; main()", "import runpy; runpy._run_module_as_main('sb3_softvalue.zoo')"]
)
def test_without_the_extra_one_sentence_says_what_to_install(code: str) -> None:
    process = without_zoo(code, "train")
    assert process.returncode == 1
    assert 'pip install "sb3_softvalue[zoo]"' in process.stderr
    assert "Traceback" not in process.stderr and process.stderr.count("\n") == 1


@pytest.mark.parametrize("arguments", [[], ["-h"], ["--help"]])
def test_help_without_the_zoo(arguments: list[str]) -> None:
    process = without_zoo("from sb3_softvalue.cli import main; main()", *arguments)
    assert process.returncode == 0, process.stderr
    assert "usage: sb3-softvalue report RUN_DIR" in process.stdout
    assert 'pip install "sb3_softvalue[zoo]"' in process.stdout


def test_a_report_needs_no_zoo(tmp_path: Path) -> None:
    process = without_zoo("from sb3_softvalue.cli import main; main()", "report", str(tmp_path))
    assert process.returncode == 1
    assert "train with the callback SoftValueDiagnostics(folder) first" in process.stderr


def test_help_lists_the_front_ends(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["sb3-softvalue", "--help"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 0
    output = capsys.readouterr().out
    for name, front_end in launcher.FRONT_ENDS.items():
        assert f"sb3-softvalue {name} {front_end.example}" in output


def test_an_unknown_front_end_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["sb3-softvalue", "trian"])
    with pytest.raises(SystemExit):
        cli.main()
    assert "choose from" in capsys.readouterr().err


def front_end() -> None:
    """A front-end that ends as its argument says."""
    assert sys.argv[0] == "sb3-softvalue own"
    if sys.argv[1:] == ["missing"]:
        raise ModuleNotFoundError("No module named 'nowhere'")
    if sys.argv[1:] == ["broken"]:
        raise RuntimeError("broken")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["own"], None, ""),
        (["own", "missing"], SystemExit, "sb3-softvalue own: No module named 'nowhere': install it"),
        (["--traceback", "own", "missing"], ModuleNotFoundError, "No module named"),
        (["own", "broken"], RuntimeError, "broken"),
    ],
)
def test_a_front_end_of_our_own_is_one_line(
    arguments: list[str], error: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(launcher.FRONT_ENDS, "own", launcher.FrontEnd(f"{__name__}:front_end", "an example", ""))
    monkeypatch.setattr(sys, "argv", ["sb3-softvalue", *arguments])
    if error is None:
        cli.main()
    else:
        with pytest.raises(error, match=message):
            cli.main()


def test_a_plot_of_too_few_runs_says_what_it_needs() -> None:
    names: dict[str, Any] = {"__name__": "rl_zoo3.plots.plot_from_file"}
    exec("def plot():\n    return min([])", names)
    with pytest.raises(ValueError) as caught:
        names["plot"]()
    assert "--rliable needs evaluations of several runs" in str(launcher._sentence(caught.value))
