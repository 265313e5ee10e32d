"""Who speaks for a response, strict and lenient alike, and the grammar of other models' plans."""
import json
import shlex
import shutil
from pathlib import Path

import pytest
from conftest import stops
from hypothesis import given, settings
from hypothesis import strategies as st

import evaluate
import gen_data
from gen_data import TASKS
from tools import lenient

SENTENCES = Path(__file__).with_name("sentences.txt").read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("body", [
    "R,D,D", "RDD", "r d d", "Right, Down, Down", "RIGHT DOWN DOWN", "right\ndown\ndown", "→↓↓",
    "➡️, ⬇️, ⬇️", "→ ↓×2", "R; D; D.", "R | D | D", "R/D/D", "right / down / down", "R，D，D",
    "Right，Down，Down", "Right || Down || Down", "R-D-D", "R + D + D",
    "R → D → D", "right -> down -> down", "R > D > D", "$R \\rightarrow D \\rightarrow D$",
    "Right, then down, and then down", "right and down and down", "Rightwards, downward, downward",
    "1. Right\n2. Down\n3. Down", "1) R 2) D 3) D", "(1) R (2) D (3) D", "1: R, 2: D, 3: D",
    "Step 1: right\nStep 2: down\nStep 3: down", "- Right\n- Down\n- Down", "* R\n* D\n* D",
    "• Right\n• Down\n• Down", "move right, move down, move down", "Go right, go down, go down!",
    "Move right.\nMove down.\nMove down.", "move to the right, step down, walk down",
    "MOVE_RIGHT, MOVE_DOWN, MOVE_DOWN", "move-right, move-down, move-down",
    "R, D x2", "R, D×2", "R, D*2", "R, D x 2", "R, D2", "R, 2x D", "right, down twice",
    "right once, down two times", "right, down (x2)", "right, 2 steps down",
    "Move one cell right, then move down by 2 cells", "Right 1, Down 1, Down 1.",
    "Right (R), Down (D), Down (D)", "R (right), D (down) x2", "(R, D, D)", "[R][D][D]",
    "['R', 'D', 'D']", '["right", "down", "down"]', "`R`, `D`, `D`", "**R, D, D**",
    '{"actions": ["R", "D", "D"]}', "{'plan': 'right, down, down'}",
    '[{"step": 1, "action": "move right"}, {"step": 2, "action": "down", "count": 2}]',
    "```\nRDD\n```", "\n```python\n['R', 'D', 'D']\n```\n", '```json\n{"answer": "RDD"}\n```',
    "\\boxed{R, D, D}", "\\boxed{\\text{RDD}}", "\\rightarrow \\downarrow \\downarrow"])
def test_a_form_of_a_plan(body):
    """In a tag, in one that stays open, after a label; with a word of prose it is none."""
    plan = ["R", "D", "D"]
    for text in (
            f"<answer>{body}</answer>", f"So:\n<answer>\n{body}\n", f"<ANSWER>{body}</ANSWER>"):
        assert lenient.parse("maze", text) == plan
    if "\n\n" not in body:
        assert lenient.parse("maze", f"It is free.\n**Action plan:**\n{body}\n\nSo it is.") == plan
    for more in (f"{body} around the hole", f"not {body}", f"{body}?", f"{body}, or so"):
        assert lenient.parse("maze", f"<answer>{more}</answer>") is None


@pytest.mark.parametrize("task, body, plan", [
    ("minibehaviour", "move down, pick up the printer, move right, put it on the table",
     "D PICK R DROP"),
    ("minibehaviour", "1. Pick up the printer\n2. Go up\n3. Drop the printer on the table.",
     "PICK U DROP"),
    ("minibehaviour", "down, grab the printer, place the printer on the table", "D PICK DROP"),
    ("minibehaviour", "pick it up -> right x2 -> put it down", "PICK R R DROP"),
    ("minibehaviour", "PICK_UP, R, PUT_DOWN", "PICK R DROP"),
    ("minibehaviour", "pick-up, R, drop it", "PICK R DROP"),
    ("minibehaviour", "take the printer; put the printer down on the table", "PICK DROP"),
    ("minibehaviour", '{"actions": ["PICK", "move right", "DROP"]}', "PICK R DROP"),
    ("minibehaviour", "pick, up", "PICK U"),
    ("frozenlake", "pick up the printer", None), ("maze", "R, put it on the table", None),
    ("minibehaviour", "pick up the table", None), ("minibehaviour", "put it in the lake", None),
])
def test_the_words_of_a_task(task, body, plan):
    assert lenient.parse(task, f"<answer>{body}</answer>") == (plan and plan.split())
    assert lenient.parse(task, f"Final answer: {body}") == (plan and plan.split())


@pytest.mark.parametrize("body", [
    "Right (D), Down (D)", "R 2x D", "1 Right 2 Down", "1 right, 2 down", "Right 1, Down 2",
    "2 R x3", "R (2,1)", "R (1,2), D (2,2)", "R 2. D", "R x0", "2. Right\n3. Down", "1. R\n1. D",
    "→ R", "R →", "R →→ D", "R or D", "R: D", "UUX", "rightdownx", "move, R", "go",
    "R, move", "R (x2", "(0,1)", "0, 1", "{}", "{", "[]", "[[", '{"actions": [1]}', "x2", "2",
    '{"plan": "R", "answer": "D"}', '{"actions": ["R", "around"]}', '{"legal": ["R"]}',
    '[{"direction": "right", "distance": 2}]', '{"action": "R", "count": "many"}',
    "Answer: R", "R<answer>"])
def test_what_holds_anything_else_is_not_read(body):
    for text in (f"<answer>{body}</answer>", f"<answer>{body}", f"Plan: {body}"):
        assert lenient.parse("maze", text) is None


@pytest.mark.parametrize("sentence", SENTENCES)
def test_nothing_is_made_of_prose(sentence):
    """Sentences without a plan, alone or among others, many of them with words for directions."""
    for task in TASKS:
        for before in ("", "I look at the map.\n", "I look at the map.\n\n", "I look. "):
            for after in ("", "\nThat is all.", "\n\nThat is all."):
                text = before + sentence + after
                assert lenient.parse(task, text) is None
                assert gen_data.parse(task, text) is None


def test_there_are_enough_sentences():
    assert len(set(SENTENCES)) == len(SENTENCES) >= 200


@settings(max_examples=300, deadline=None)
@given(picked=st.lists(st.sampled_from(SENTENCES), max_size=6), cut=st.booleans())
def test_nothing_is_made_of_much_prose(picked, cut):
    """Each on a line of its own. Lines that are words only (a list of the moves) are left out."""
    assert lenient.parse("minibehaviour", "\n".join(picked), cut) is None


# ---------------------------------------------------------------- who speaks

EXAMPLE = "Map: 2x2\nrow 0: S F\nrow 1: F G\nRoute: so.\n<answer>R,D</answer>"


@pytest.mark.parametrize("text, cut, strict, loose", [
    # 1. what was cut ends with a closed place, or has no answer
    (EXAMPLE, False, "R D", "R D"), (EXAMPLE + "\n", True, "R D", "R D"),
    (EXAMPLE + "\nMap: 3x3\nrow 0: S", True, None, None), ("<answer>R,D", True, None, None),
    ("<answer>R,D", False, None, "R D"), ("Action plan: R, D", True, None, None),
    ("R, D", True, None, None), ("**R, D**", True, None, None),
    ("$\\boxed{RD}$", True, None, "R D"), ("\\boxed{RD", True, None, None),
    ('```json\n{"plan": ["R"]}\n```', True, None, "R"), ('{"plan": ["R", "D"', True, None, None),
    ("<answer>R</answer> and <answer>", True, None, None),
    # 2. thinking never answers
    ("<think>a draft: <answer>U</answer></think>\n<answer>R</answer>", False, "R", "R"),
    ("a draft: <answer>U</answer>\n</think>\n\n<answer>R</answer>", False, "R", "R"),
    ("a draft: <answer>U</answer>\n</think>\n\nI see no way.", False, None, None),
    ("<think>so <answer>U</answer> but", False, None, None),
    ("<answer>R</answer><think>or <answer>U</answer>", False, None, None),
    # special tokens at the end are no part of it
    ("<answer>R</answer><|im_end|>\n<|endoftext|>", True, "R", "R"),
    ("<answer>R</answer></s>", True, "R", "R"), ("R, D<|im_end|>", False, None, "R D"),
    ("<answer>R<|im_end|></answer>", False, None, None),
    ("<think>a</think><answer>U</answer><think>b</think><answer>R</answer>", False, "R", "R"),
    ("U, U</think>", False, None, None),
    # 3. the last place, also where it takes an earlier one back
    ("<answer>U</answer> No: <answer>R</answer>", False, "R", "R"),
    ("<answer>U</answer> No: <answer>R", False, None, "R"),
    ("<answer>U</answer>\nRevised plan: R, D", False, "U", "R D"),
    ("<answer>U</answer> Wait, that is wrong. Corrected: R", False, "U", "R"),
    ("<answer>U</answer>\nThe corrected plan goes around the hole.", False, "U", "U"),
    ("<answer>U</answer>\nThe corrected plan is to go around.", False, "U", None),
    ("<answer>U</answer>\n**Final answer:** none", False, "U", None),
    ("<answer>U</answer>\nSo the shortest path is R, D.", False, "U", "R D"),
    ("Plan: U\nNo, wait.\nUpdated plan: R", False, None, "R"),
    ("Plan: U\n\\boxed{R}", False, None, "R"), ("\\boxed{U}\nAnswer: R", False, None, "R"),
    ('{"plan": ["U"]}\n<answer>R</answer>', False, "R", "R"),
    ("<answer>R</answer>\nThis plan is right, and the path is the shortest.", False, "R", "R"),
    ("<answer>R</answer>\nPath: (0,0) → (0,1)", False, "R", "R"),
    ("<answer>R</answer>\n\n**Down, down** would be wrong.", False, "R", "R"),
    ("Final answer: <answer>R</answer>", False, "R", "R"),
    ("I write it in <answer> tags.\nAction plan: R", False, None, "R"),
    # 4. all of it
    ("<answer>U</answer> No: <answer>I do not know</answer>", False, None, None),
    ("<answer>```\nRDD\n```\nor so</answer>", False, None, None),
    ("Plan:\n1. Right\n2. Down to the lake\n3. Right", False, None, None),
    ("Plan:\n1. Right\n\n2. Down\n\nSo it is.", False, None, "R D"),
    ("Plan: right\ndown\nThat is short.", False, None, "R D"),
])
def test_who_speaks(text, cut, strict, loose):
    assert gen_data.parse("maze", text, cut) == (strict and strict.split())
    assert lenient.parse("maze", text, cut) == (loose and loose.split())


scraps = st.sampled_from([
    "<answer>", "</answer>", "<think>", "</think>", "R, D", "U", "right", "(R)", " x2", "\n", "1. ",
    "Plan: ", "The plan is ", "Corrected: ", "\\boxed{", "}", '{"plan": ["R"', "]}", "```", "→",
    "- ", "**", "around", "."])


@settings(max_examples=1000, deadline=None)
@given(text=st.lists(scraps, max_size=9).map("".join), task=st.sampled_from(list(TASKS)))
def test_who_speaks_whatever_is_written(text, task):
    """A cut response has the same answer, or none; what was thought does not count."""
    strict, loose = gen_data.parse(task, text), lenient.parse(task, text)
    for parse, plan in ((gen_data.parse, strict), (lenient.parse, loose)):
        assert parse(task, text, cut=True) in (None, plan)
        assert parse(task, f"<answer>U</answer></think>{text.replace('</think>', '')}") \
            == parse(task, text.replace("</think>", ""))
        assert parse(task, text + "<think>") is None


def test_the_filter_reads_lines_by_what_they_mean(toy_data, tmp_path, capsys):
    """A byte order mark, a null, half a surrogate pair, a cut response; it replaces nothing."""
    rows = gen_data.load_rows(toy_data, "test")[:4]
    said = ["<answer>up</answer>", None, "\ud800 <answer>up</answer>", "<answer>up"]
    lines = [{"id": row.id, "response": text, "cut": text == said[3]}
             for row, text in zip(rows, said, strict=True)]
    file, out = tmp_path / "answers.jsonl", tmp_path / "read.jsonl"
    file.write_text("\ufeff" + "".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    words = [str(file), "--data", str(toy_data), "--out", str(out)]
    lenient.main(lenient.parse_args(words))
    assert "a plan was read in 2 of 4 answers" in capsys.readouterr().out
    read = [json.loads(line) for line in open(out)]
    assert [line["plan"] for line in read] == [["U"], None, ["U"], None]
    line = stops(capsys, lambda: lenient.main(lenient.parse_args(words)))
    assert f"{out} exists: choose another --out" in line


def test_the_printed_next_command_is_that_of_the_answers(toy_data, tmp_path, capsys):
    """It is run as printed: another split, blanks in the paths; own rows keep their answers."""
    data = shutil.copytree(toy_data, tmp_path / "my data")
    own = {"file_name": "own.png", "id": "own", "prompt": "?", "symbols": "7", "answer": "7"}
    first = gen_data.load_rows(data, "val")[0]
    shutil.copy(first.path, data / "val/own.png")
    with open(data / "val/metadata.jsonl", "a") as file:
        file.write(json.dumps(own) + "\n")
    rows = gen_data.load_rows(data, "val")
    said = [", ".join(row.plan) if not row.own else "7" for row in rows]
    lines = [{"id": row.id, "response": text} for row, text in zip(rows, said, strict=True)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    lenient.main(lenient.parse_args([str(tmp_path / "a.jsonl"), "--data", str(data), "--split",
                                     "val", "--out", str(tmp_path / "read it.jsonl")]))
    told, _, printed = capsys.readouterr().out.partition("next: python ")
    assert f"in {len(rows) - 1} of {len(rows) - 1} answers" in told
    script, *words = shlex.split(printed)
    args = evaluate.parse_args([*words, "--out", str(tmp_path / "eval")])
    assert script == "evaluate.py" and (args.split, args.data) == ("val", str(data))
    evaluate.main(args)
    macro = json.loads((tmp_path / "eval/results.json").read_text())["conditions"]
    assert [line["table"][-1]["success"] for line in macro.values()] == [1]
