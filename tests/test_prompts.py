"""The pin of every prompt: docs/prompts.md, to read, and its hash.

    python tests/test_prompts.py > docs/prompts.md      # after a change of wording that is meant
"""
import hashlib
import json
import sys
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import pytest  # noqa: E402
from conftest import row_of  # noqa: E402

import gen_data  # noqa: E402
from gen_data import FrozenLake, Maze, MiniBehaviour, PuzzleRow, solve  # noqa: E402

PIN = "3b8f49fba1077f5b"
PUZZLES = {
    "frozenlake": FrozenLake(["SFH", "FFF", "HFG"]),
    "maze": Maze([[7, 3, 9], [5, 3, 10], [6, 3, 11]], [0, 0], [2, 2]),
    "minibehaviour": MiniBehaviour(["A...", "..P.", "TTT.", "TTT."])}


def every_text(row):
    """{title: text} of all that a model reads or shall write about a row."""
    texts = {"The student, beside the picture": row.student_prompt(),
             "The teacher, with the plan": row.teacher_prompt("symbols+plan"),
             "The teacher without it, and the evaluation from symbols":
                 row.teacher_prompt("symbols"),
             "The reference response": row.response()}
    names = tuple(row.questions())
    for name in names:
        texts[f"Perception question: {name}"] = row.ask((name,))
        texts[f"Perception question: {name}, the answer"] = row.answers((name,))
    texts["Several perception questions"] = row.ask(names[1:4])
    texts["Several perception questions, the answer"] = row.answers(names[1:4])
    return texts


def page():
    lines = ["# Every prompt, word for word", "",
             "For one small board of each task. `python tests/test_prompts.py` prints this page, a "
             "test pins it;", "`python -m tools.check data/tiny --html data.html` shows the "
             "prompts of other boards.", ""]
    for task, puzzle in PUZZLES.items():
        row = PuzzleRow({"id": task, "task": task, "level": 3, "state": asdict(puzzle),
                         "plan": solve(puzzle)})
        lines += [f"## {task}", ""]
        for title, text in every_text(row).items():
            lines += [f"**{title}**", "", "```", text, "```", ""]
    return "\n".join(lines)


def test_every_prompt_is_pinned():
    assert (ROOT / "docs/prompts.md").read_text(encoding="utf-8") == page() + "\n"
    assert hashlib.sha256(page().encode()).hexdigest()[:16] == PIN


@pytest.mark.parametrize("task", gen_data.TASKS)
def test_the_worked_example_is_in_no_split(task):
    """Nor is any other board of its layout; every prompt shows it."""
    puzzle, plan = gen_data.example(task)
    assert gen_data.check(puzzle, plan)[0] == "success"
    shown, rng = gen_data.listing(puzzle.cells()), np.random.default_rng(1)
    smallest = gen_data.TASKS[task].levels[0]
    for other in [puzzle, *(gen_data.TASKS[task].sample(rng, smallest) for _ in range(300))]:
        inside = gen_data.split_of(task, other) in gen_data.SPLITS
        assert inside == (other.layout() != puzzle.layout())
    row = row_of(puzzle)
    for text in (row.student_prompt(), row.teacher_prompt("symbols"), row.ask(("map",))):
        assert shown in text


@pytest.mark.parametrize("task", gen_data.TASKS)
def test_the_student_reads_no_fact_of_its_state(task):
    """The same prompt for every board of a task, but the teacher's differs with the board."""
    rng, rows = np.random.default_rng(2), {}
    while len(rows) < 9:
        puzzle = gen_data.TASKS[task].sample(rng, gen_data.TASKS[task].levels[-1])
        if solve(puzzle):
            rows[json.dumps(asdict(puzzle))] = row_of(puzzle)
    rows = rows.values()
    assert len({row.student_prompt() for row in rows}) == 1
    assert len({row.ask() for row in rows}) == 1
    assert len({row.teacher_prompt("symbols") for row in rows}) == len(rows)


if __name__ == "__main__":
    print(page())
