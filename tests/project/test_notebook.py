"""examples/first_run.ipynb runs from the first cell to the last, and shows what its text says."""

import re
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "examples" / "first_run.ipynb"
SECONDS = 1200  # about 60 on one quiet core


@pytest.mark.slow
def test_notebook_runs(tmp_path, monkeypatch):
    nbformat = pytest.importorskip("nbformat", reason="a part of the dev extra")
    nbclient = pytest.importorskip("nbclient", reason="a part of the dev extra")
    monkeypatch.delenv("MPLBACKEND", raising=False)  # the kernel shows pictures where nothing else is set
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = nbclient.NotebookClient(notebook, timeout=SECONDS, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    printed = "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")
    rows = dict(
        re.findall(r"^(plain|plain, twice the epochs|penalised) +best .* last epoch +([\d.]+)%", printed, re.M)
    )
    assert len(rows) == 3
    # One seed showed 26 points, and 1,197 test images have a standard error below 1.5.
    assert float(rows["penalised"]) > float(rows["plain, twice the epochs"]) + 5
    assert (tmp_path / "outputs" / "first_run" / "surface.png").stat().st_size > 10_000
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 3


def test_notebook_has_results():
    """A reader on the web sees the pictures, so the file is saved after a run."""
    nbformat = pytest.importorskip("nbformat", reason="a part of the dev extra")
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    counts = [cell.execution_count for cell in cells if cell.cell_type == "code"]
    assert counts == list(range(1, 1 + len(counts)))
