"""docs/quickstart.ipynb, executed on the CPU with fewer rows and steps."""
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_notebook_runs(tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient")  # of requirements-dev.txt
    import nbformat
    monkeypatch.setenv("NOTEBOOK_OUT", str(tmp_path / "out"))
    monkeypatch.setenv("NOTEBOOK_ROWS", "--train 4 --val 2 --test 2")
    monkeypatch.setenv("NOTEBOOK_WORDS", "--steps 1 --batch 2 --micro_batch 2 --max_new_tokens 8")
    notebook = nbformat.read(ROOT / "docs/quickstart.ipynb", 4)
    assert len(notebook.cells) <= 8
    resources = {"metadata": {"path": str(ROOT / "docs")}}
    nbclient.NotebookClient(notebook, timeout=300, resources=resources).execute()
    last = [cell for cell in notebook.cells if cell.cell_type == "code"][-1]
    assert "distill-image" in last.outputs[-1]["data"]["text/markdown"]
    assert (tmp_path / "out/distill/adapter/adapter_model.safetensors").is_file()
