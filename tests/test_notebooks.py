"""The notebooks run, with few steps, and are committed with the outputs of a whole run."""

import pathlib
import shutil

import pytest

nbformat = pytest.importorskip("nbformat", reason="nbformat, which reads notebooks, is not installed")
nbclient = pytest.importorskip("nbclient", reason="nbclient, which runs notebooks, is not installed")
pytest.importorskip("ipykernel", reason="ipykernel, which runs the notebooks, is not installed")
pytest.importorskip("matplotlib", reason="matplotlib, which the notebooks need, is not installed")

NOTEBOOKS = sorted((pathlib.Path(__file__).parent.parent / "examples" / "notebooks").glob("*.ipynb"))
MAX_BYTES = 300_000


def test_there_are_notebooks() -> None:
    assert [path.stem for path in NOTEBOOKS] == ["01_train_and_read_v", "02_from_sac_to_sacv"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs(path: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTEBOOK_STEPS", "300")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    copied = pathlib.Path(shutil.copy(path, tmp_path))
    notebook = nbformat.read(copied, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_outputs(path: pathlib.Path) -> None:
    assert path.stat().st_size < MAX_BYTES
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))  # top to bottom, once
    outputs = [output for cell in cells for output in cell.outputs]
    assert [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"] == []
    assert any("image/png" in output.get("data", {}) for output in outputs)
