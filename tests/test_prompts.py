"""The pin of every prompt: docs/prompts.md, to read, and its hash.

    python tests/test_prompts.py > docs/prompts.md      # after a change of wording that is meant
"""
import hashlib
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import gen_data  # noqa: E402

PIN = "0247922a745d5c85"
STATES = {
    "frozenlake": {"grid": ["SFH", "FFF", "HFG"]},
    "maze": {"walls": [[7, 3, 9], [5, 3, 10], [6, 3, 11]], "start": [0, 0], "goal": [2, 2]},
    "minibehaviour": {"grid": ["A...", "..P.", "TTT.", "TTT."]}}


def every_text(row):
    """{title: text} of all that a model reads or shall write about a row."""
    texts = {"The student, beside the picture": gen_data.student_prompt(row),
             "The teacher, with the reference plan": gen_data.teacher_prompt(row),
             "The teacher without it, and the evaluation from symbols":
                 gen_data.teacher_prompt(row, "state"),
             "The reference response": gen_data.response(row)}
    for name in gen_data.questions(row):
        texts[f"Perception: {name}"] = gen_data.perception_prompt(row, (name,))
        texts[f"Perception: {name}, the answer"] = gen_data.perception_target(row, (name,))
    names = gen_data.questions(row)[1:4]
    texts["Perception: several questions"] = gen_data.perception_prompt(row, names)
    texts["Perception: several questions, the answer"] = gen_data.perception_target(row, names)
    return texts


def page():
    lines = ["# Every prompt, word for word", "",
             "For one small board of each task. `python tests/test_prompts.py` prints this page, a "
             "test pins it;", "`python gen_data.py --show` prints the prompts of other boards.", ""]
    for task, state in STATES.items():
        row = {"task": task, "state": state, "plan": gen_data.solve(task, state)}
        lines += [f"## {task}", ""]
        for title, text in every_text(row).items():
            lines += [f"**{title}**", "", "```", text, "```", ""]
    return "\n".join(lines)


def test_every_prompt_is_pinned():
    assert (ROOT / "docs/prompts.md").read_text(encoding="utf-8") == page() + "\n"
    assert hashlib.sha256(page().encode()).hexdigest()[:16] == PIN


def test_the_worked_example_is_in_no_split():
    for task, rules in gen_data.TASKS.items():
        row = gen_data.example(task)
        assert gen_data.split_of(task, row["state"]) == "example"
        assert gen_data.check(task, row["state"], row["plan"])[0] == "success"
        shown = gen_data.describe(task, row["state"])
        level = rules.levels[0]
        for split in gen_data.SPLITS:
            for made in gen_data.sample_rows(task, level, split, 6, seed=1):
                assert rules.layout(made["state"]) != rules.layout(row["state"])
                assert shown in gen_data.student_prompt(made)


def test_the_student_reads_no_fact_of_its_state():
    """The same prompt for every board of a task, but the teacher's differs with the board."""
    for task, rules in gen_data.TASKS.items():
        rows = [*gen_data.sample_rows(task, rules.levels[-1], "test", 9, seed=2)]
        for function in (gen_data.student_prompt, gen_data.perception_prompt):
            assert len({function(row) for row in rows}) == 1
        assert len({gen_data.teacher_prompt(row, "state") for row in rows}) == len(rows)


if __name__ == "__main__":
    print(page())
