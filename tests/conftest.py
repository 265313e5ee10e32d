"""What several test files share: the bundled backbone, an adapted student, rows, a toy data set."""
import os
from dataclasses import asdict

# Two processes (pytest-xdist), a thread each: more threads than cores would slow each other down.
os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="passive")

import numpy as np
import pytest
import torch

import common
import gen_data
from gen_data import TASKS, PuzzleRow, solve


def row_of(puzzle, plan=None, level=3, **more):
    """A row of this puzzle, of whatever task, with its shortest plan or another one."""
    task = next(name for name, kind in TASKS.items() if type(puzzle) is kind)
    return PuzzleRow({"id": "row", "task": task, "level": level, "state": asdict(puzzle),
                      "plan": plan or solve(puzzle), **more})


def make_rows(count=4, seed=0):
    """Rows of mixed tasks and board sizes, and their pictures."""
    rng, rows = np.random.default_rng(seed), []
    boards = [("frozenlake", 3), ("maze", 4), ("minibehaviour", 5), ("maze", 3), ("frozenlake", 4)]
    while len(rows) < count:
        task, level = boards[len(rows) % len(boards)]
        puzzle = TASKS[task].sample(rng, level)
        if solve(puzzle):
            rows.append(row_of(puzzle, level=level))
    return rows, [row.puzzle.render(32) for row in rows]


def adapted(model, vision=True, std=0.05):
    """A fresh adapter whose B matrices are not zero: it does something, with a large std much."""
    torch.manual_seed(0)
    model = common.add_lora(model, 4, vision=vision)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=std)
    return model


def stops(capsys, function, *words):
    """The one line on stderr with which `function` ends, exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        function(*words)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert stop.value.code == 2 and len(lines) == 1
    return lines[0]


@pytest.fixture(scope="session")
def tiny():
    """(model, processor) of the bundled backbone in 32 bits; a test leaves it as it was."""
    return common.load(common.TINY, 32)


@pytest.fixture
def student(tiny):
    """The bundled backbone, adapted."""
    model = adapted(tiny[0])
    yield model
    model.unload()


@pytest.fixture(scope="session")
def toy_data(tmp_path_factory):
    """A folder with a few rows of every task and board size of the preset tiny."""
    folder = tmp_path_factory.mktemp("toy") / "data"
    words = ["--preset", "tiny", "--train", "12", "--val", "8", "--test", "4"]
    gen_data.main(gen_data.parse_args([*words, "--out", str(folder)]))
    return folder
