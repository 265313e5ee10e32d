"""docs/quickstart.ipynb on the CPU: its cells with fewer steps, and what is pasted as it is."""
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import coldstart
import common
import distill
import evaluate
import gen_data

ROOT = Path(__file__).parents[1]
SCRIPTS = {"gen_data.py": gen_data, "coldstart.py": coldstart, "distill.py": distill,
           "evaluate.py": evaluate}


def pasted():
    """The commands for a terminal, which stand in the last cell."""
    cells = json.loads((ROOT / "docs/quickstart.ipynb").read_text(encoding="utf-8"))["cells"]
    return re.search(r"```\n(.*?)```", "".join(cells[-1]["source"]), re.DOTALL)[1]


def shell(commands, **environment):
    return subprocess.run(["bash", "-ec", commands], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, **environment})


def test_the_shell_reads_what_is_pasted_as_whole_commands(tmp_path, monkeypatch):
    """Each with flags that its script knows; the runs that they name are there."""
    monkeypatch.chdir(tmp_path)
    for stage in ("coldstart", "distill"):
        run = tmp_path / "out/hour" / stage
        (run / "adapter").mkdir(parents=True)
        (run / "adapter/adapter_model.safetensors").touch()
        record = {"kind": "run", "args": {"preset": "2b", **common.BACKBONES["2b"]}}
        (run / "args.json").write_text(json.dumps(record))
    done = shell("python() { printf '%s ' \"$@\"; echo; }\n" + pasted())
    commands = [line.split() for line in done.stdout.splitlines()]
    assert done.returncode == 0 and len(commands) == 5, done.stderr
    for script, *words in commands:
        assert SCRIPTS[script].parse_args(words).preset == "2b"


@pytest.mark.slow
def test_what_is_pasted_runs(tmp_path):
    """With the bundled backbone, fewer rows and steps."""
    commands = pasted().replace("--preset 2b", "--preset tiny")
    commands = re.sub(r"\b(data|out)/hour", rf"{tmp_path}/\1", commands)
    commands = re.sub(r"--(train|val|test|steps|batch|max_new_tokens) \d+", r"--\1 4", commands)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = shell(commands, PATH=path)
    assert done.returncode == 0, done.stderr
    assert "distill-image" in (tmp_path / "out/eval/results.md").read_text()


@pytest.mark.slow
def test_the_notebook_runs(tmp_path, monkeypatch):
    """Twice: what is done is not done again."""
    nbclient = pytest.importorskip("nbclient")  # of requirements-dev.txt
    import nbformat
    monkeypatch.setenv("NOTEBOOK_OUT", str(tmp_path / "out"))
    monkeypatch.setenv("NOTEBOOK_ROWS", "--train 4 --val 2 --test 2")
    monkeypatch.setenv("NOTEBOOK_WORDS", "--steps 1 --batch 2 --micro_batch 2 --max_new_tokens 8")
    notebook = nbformat.read(ROOT / "docs/quickstart.ipynb", 4)
    resources = {"metadata": {"path": str(ROOT / "docs")}}
    for _ in range(2):
        nbclient.NotebookClient(notebook, timeout=300, resources=resources).execute()
    last = [cell for cell in notebook.cells if cell.cell_type == "code"][-1]
    assert "distill-image" in last.outputs[-1]["data"]["text/markdown"]
    assert (tmp_path / "out/distill/adapter/adapter_model.safetensors").is_file()
