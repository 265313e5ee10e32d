"""A task is one class: a fourth one, unlike the three, goes through everything that is there."""
import json
import re
from dataclasses import asdict, dataclass

import numpy as np
import pytest
from conftest import row_of
from PIL import Image, ImageDraw

import gen_data
from gen_data import check, listing, parse, solve
from tools import check as check_tool
from tools import lenient


@dataclass
class Lamps:
    """A robot in a corridor of lamps. PRESS switches the lamp beside it and the two next to that.

    All lamps shall burn. A position is (0, column, lamps).
    """
    lamps: str  # "01101"
    robot: int
    levels = range(5, 8)
    lit = 0.6  # share of lamps that burn at the start
    rules = ("A robot * walks along a row of lamps; 1 is a lamp that burns, 0 one that does not.\n"
             "PREV and NEXT move it one lamp back and on, PRESS switches its lamp and the lamps "
             "next to that.\nMake all lamps burn.")
    legend = "In the picture a lamp that burns is yellow; the robot is the red bar under a lamp."
    actions = ("PREV", "NEXT", "PRESS")
    questions = {"lit": "Which lamps burn?",
                 "count": "Is the number of burning lamps even or odd?",
                 "moves": "Which actions are possible at the start?"}

    @classmethod
    def sample(cls, rng, level):
        lamps = np.where(rng.random(level) < cls.lit, "1", "0")
        return cls("".join(lamps), int(rng.integers(level)))

    @classmethod
    def read(cls, cells):
        row = " ".join(cells[0])
        if len(cells) != 1 or not re.fullmatch(r"(?:[01]\*? ?)+", row) or row.count("*") != 1:
            return None
        return cls("".join(cell[0] for cell in cells[0]),
                   [cell[1:] for cell in cells[0]].index("*"))

    def start_pos(self):
        return 0, self.robot, self.lamps

    def step(self, pos, action):
        _, column, lamps = pos
        if action == "PRESS":
            near = range(column - 1, column + 2)
            lamps = [str(1 - int(lamp)) if i in near else lamp for i, lamp in enumerate(lamps)]
            return (0, column, "".join(lamps)), None
        column += 1 if action == "NEXT" else -1
        return ((0, column, lamps), None) if 0 <= column < len(lamps) else (pos, "end")

    def done(self, pos):
        return "0" not in pos[2]

    def render(self, cell_size):
        picture = Image.new("RGB", (cell_size * len(self.lamps), cell_size))
        draw, s = ImageDraw.Draw(picture), cell_size
        for i, lamp in enumerate(self.lamps):
            draw.ellipse([i * s + s // 4, s // 4, i * s + 3 * s // 4, 3 * s // 4],
                         "yellow" if lamp == "1" else "grey")
        draw.rectangle([self.robot * s, s - 3, self.robot * s + s - 1, s - 1], "red")
        return picture

    def cells(self):
        return [[lamp + "*" * (i == self.robot) for i, lamp in enumerate(self.lamps)]]

    def facts(self):
        lit = [(0, i) for i, lamp in enumerate(self.lamps) if lamp == "1"]
        legal = [action for action in self.actions
                 if self.step(self.start_pos(), action)[1] is None]
        return {"lit": gen_data.places(lit), "count": "odd" if len(lit) % 2 else "even",
                "moves": ", ".join(legal)}

    def layout(self):
        return self.lamps


PUZZLE = Lamps("100011", 0)


@pytest.fixture(autouse=True)
def four_tasks(monkeypatch):
    monkeypatch.setitem(gen_data.TASKS, "lamps", Lamps)


@pytest.fixture
def data(tmp_path):
    gen_data.main(gen_data.parse_args([
        "--preset", "tiny", "--tasks", "lamps:6-7", "--train", "12", "--val", "3", "--test", "6",
        "--cell_size", "32", "--image_size", "0",
        "--out", str(tmp_path / "data")]))
    return tmp_path / "data"


def test_plans_verdicts_and_answers():
    row = row_of(PUZZLE)
    assert row.plan == ["NEXT", "NEXT", "PRESS"]
    assert check(PUZZLE, row.plan) == ("success", 3)
    assert solve(Lamps("10000", 0)) is None
    assert check(PUZZLE, ["NEXT", "PREV", "PREV"]) == ("end", 2)
    assert check(PUZZLE, ["U"]) == ("no such action", 0)
    assert check(PUZZLE, ["PRESS", "NEXT"]) == ("unfinished", 2)
    assert parse("lamps", "<answer>prev,NEXT PRESS</answer>") == ["PREV", "NEXT", "PRESS"]
    assert parse("lamps", "<answer>U</answer>") is None
    for text in ("**PREV, PRESS**", "Action plan: prev, press", "<answer>[PREV -> PRESS]</answer>"):
        assert parse("lamps", text) is None
        assert lenient.parse("lamps", text) == ["PREV", "PRESS"]
    assert lenient.parse("lamps", "Action plan: up, left") is None
    text = row.response()
    assert row.judge(text) == {"plan": row.plan, "outcome": "success", "optimal": True,
                               "overrun": False, "map": asdict(PUZZLE), "map_right": True}
    longer = row.judge(text.replace("</answer>", ",PREV,NEXT</answer>"))
    assert longer["optimal"] and longer["overrun"]
    assert not row.judge(text.replace("<answer>", "<answer>NEXT,PREV,"))["optimal"]


def test_maps_are_read_back():
    assert listing(PUZZLE.cells()) == "Map: 1x6\nrow 0: 1* 0 0 0 1 1"
    assert gen_data.read_map("lamps", "So.\nMap: 1x3\nrow 0: 0 1* 1\nRoute") == Lamps("011", 1)
    for text in ("Map: 1x3\nrow 0: 0 1 1", "Map: 1x3\nrow 0: 0* 1* 1", "Map: 1x3\nrow 0: 0* 1",
                 "Map: 2x2\nrow 0: 0* 1\nrow 1: 0 1", "Map: 1x2\nrow 0: X* 1"):
        assert gen_data.read_map("lamps", text) is None


def test_perception_questions():
    row = row_of(PUZZLE)
    assert tuple(row.questions()) == ("map", "lit", "count", "moves")
    assert row.answers() == (
        "1. Map: 1x6\nrow 0: 1* 0 0 0 1 1\n2. (0,0), (0,4), (0,5)\n3. odd\n4. NEXT, PRESS")
    assert row.ask().endswith("4. Which actions are possible at the start?")
    assert all(row.score(None, row.answers()).values())
    for name, text, right in (
            ("count", "Odd.", True), ("count", "even", False), ("count", "", False),
            ("moves", "press and next", True), ("moves", "NEXT", False),
            ("lit", "(0,4), (0,5), (0,0)", True), ("lit", "none", False)):
        assert row.score((name,), text) == {name: right}


def test_rows_pictures_splits_and_prompts(data):
    settings, layouts = json.loads((data / "args.json").read_text()), {}
    assert settings["tasks"] == {"lamps": [6, 7]}
    for split, number in (("train", 12), ("val", 3), ("test", 6)):
        rows = gen_data.load_rows(data, split)
        assert [row.level for row in rows] == [6] * number + [7] * number
        for row in rows:
            assert layouts.setdefault(row.puzzle.lamps, split) == split
            assert gen_data.split_of("lamps", row.puzzle) == split
            assert Image.open(row.path).size == (32 * row.level, 32)
            assert Lamps.rules in row.student_prompt()
            assert listing(row.puzzle.cells()) in row.teacher_prompt("symbols")
            assert ",".join(row.plan) in row.teacher_prompt("symbols+plan")
            assert row.judge(row.response())["optimal"]
            borders = gen_data.thirds("lamps", row.level)
            assert row.bucket == gen_data.bucket(len(row.plan), borders)
        for level in (6, 7):
            found = [row.bucket for row in rows if row.level == level]
            assert [found.count(name) for name in gen_data.DIFFICULTIES] == [number // 3] * 3


def test_route_of_a_response():
    row = row_of(Lamps("11000", 2), ["NEXT", "PRESS"])
    assert row.response().split("\n")[2:] == [
        "Route: from (0,2) NEXT to (0,3) PRESS at (0,3).", "<answer>NEXT,PRESS</answer>"]


def test_it_is_checked_and_looked_at(data, tmp_path, capsys):
    check_tool.main(check_tool.parse_args([str(data), "--html", str(tmp_path / "page.html")]))
    assert "| test | lamps 6 |" in capsys.readouterr().out
    page = (tmp_path / "page.html").read_text()
    assert "PRESS" in page


def test_an_evaluation_and_its_report(data, tmp_path, monkeypatch, capsys):
    """Answers from a file: three right and one longer, one empty, one of a wrong map, and so on."""
    import evaluate
    monkeypatch.chdir(tmp_path)
    rows = gen_data.load_rows(data, "test")
    texts = [row.response() for row in rows]
    texts[1] = texts[1].replace("<answer>", "<answer>PRESS,PRESS,")
    texts[2] = ""
    texts[3] = "Map: 1x6\nrow 0: 0* 0 0 0 0 0\n<answer>" + "PREV," * 9 + "PREV</answer>"
    with open("answers.jsonl", "w") as file:
        for row, text in zip(rows, texts, strict=True):
            file.write(json.dumps({"id": row.id, "response": text}) + "\n")
    evaluate.main(evaluate.parse_args(["--preset", "tiny", "--data", str(data), "--tasks", "lamps",
                                       "--responses", "answers.jsonl", "--out", "eval"]))
    with open("eval/answers/predictions.jsonl") as file:
        found = [json.loads(line) for line in file]
    outcomes = ["success", "success", "no answer", "end"] + ["success"] * 8
    assert [verdict["outcome"] for verdict in found] == outcomes
    assert [verdict["optimal"] for verdict in found] == [True] + [False] * 3 + [True] * 8
    assert [verdict["map_right"] for verdict in found] == [True] * 2 + [False] * 2 + [True] * 8
    results = (tmp_path / "eval/results.md").read_text(encoding="utf-8")
    assert "| lamps 6 |" in results and "| lamps 7 |" in results
    page = (tmp_path / "eval/report.html").read_text(encoding="utf-8")
    assert rows[0].id in page and "lamps" in page
