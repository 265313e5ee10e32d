"""The example without symbols: bad pictures of boards, the clean ones for the teacher."""
import itertools
import json

import numpy as np
from PIL import Image

import gen_data
from tools import degraded


def make(tmp_path, out):
    degraded.main(degraded.parse_args(
        ["--data", str(tmp_path / "puzzles"), "--out", str(tmp_path / out)]))
    return tmp_path / out


def test_rows_pictures_and_answers(tmp_path):
    """The teacher's picture is the board's own, the student's another; every row is a valid one."""
    gen_data.main(gen_data.parse_args([
        *"--preset tiny --tasks frozenlake:3 maze:3 minibehaviour:5".split(), "--train", "2",
        "--val", "1", "--test", "2", "--out", str(tmp_path / "puzzles")]))
    folder = make(tmp_path, "one")
    for file in make(tmp_path, "two").rglob("*.png"):
        assert file.read_bytes() == (folder / file.relative_to(tmp_path / "two")).read_bytes()
    for split in gen_data.SPLITS:
        puzzles = gen_data.load_rows(tmp_path / "puzzles", split)
        rows = gen_data.load_rows(folder, split)
        for row, puzzle in zip(rows, puzzles, strict=True):
            clean, bad = (np.asarray(Image.open(path)) for path in (row.teacher_path, row.path))
            assert (clean == np.asarray(Image.open(puzzle.path))).all()
            assert clean.shape == bad.shape and (clean != bad).mean() > 0.5
            assert row.symbols() is None and row.student_prompt() == puzzle.student_prompt()
            assert row.judge(puzzle.response())["outcome"] == "success"
            assert row.judge("<answer>U,U,U,U,U,U,U,U,U</answer>")["outcome"] == "wrong"
    assert json.loads((folder / "args.json").read_text())["kind"] == "data"


def test_all_shortest_plans():
    """Against every sequence of that many actions, executed."""
    for task, level in (("frozenlake", 3), ("maze", 3)):
        for seed in range(5):
            puzzle = gen_data.TASKS[task].sample(np.random.default_rng(seed), level)
            shortest = gen_data.solve(puzzle)
            if not shortest:
                continue
            right = {",".join(plan) for plan in
                     itertools.product(puzzle.actions, repeat=len(shortest))
                     if gen_data.check(puzzle, plan) == ("success", len(shortest))}
            found = degraded.shortest_plans(puzzle)
            assert set(found) == right and len(found) == len(right)
