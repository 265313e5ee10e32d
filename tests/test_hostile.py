"""Broken and hostile files: each ends with one line, exit code 2; nothing in them is executed."""
import io
import json
import shutil
import struct
import zlib

import pytest
import torch
from conftest import row_of, stops
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_gen_data import LAKE, PUZZLES

import common
import gen_data
from tools import lenient

ROW = {"file_name": "a.png", "id": "test_a", "task": "frozenlake", "level": 3,
       "state": {"grid": LAKE.grid}, "plan": ["D", "R", "R", "D"]}


def folder_with(tmp_path, *lines):
    """A data folder whose test split has these lines."""
    (tmp_path / "data/test").mkdir(parents=True)
    lines = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (tmp_path / "data/test/metadata.jsonl").write_text("\n".join(lines))
    (tmp_path / "data/test/a.png").write_bytes(b"opened later")
    return tmp_path / "data"


@pytest.mark.parametrize("line, message", [
    (json.dumps(ROW)[:-9], "line 2: not JSON"),
    ({key: ROW[key] for key in ROW if key != "plan"}, "line 2: not a row: KeyError: 'plan'"),
    ({**ROW, "task": "chess"}, "line 2: \"task\" 'chess' is none of frozenlake, maze"),
    ({**ROW, "task": ["maze"]}, "line 2: not a row: TypeError"),
    ({**ROW, "state": {"grid": ["FF", "FF"]}}, "line 2: its state is no board of frozenlake"),
    ({**ROW, "state": {"grid": ["SFF", "FFG"]}}, "line 2: its state is no board"),
    ({**ROW, "state": {"grid": ["SFG", "FFF", "FFG"]}}, "line 2: its state is no board"),
    ({**ROW, "level": 4}, 'line 2: "level" is 4, the board is 3x3'),
    ({**ROW, "level": "3"}, "line 2: \"level\" is '3', the board is 3x3"),
    ({**ROW, "state": {"grid": 5}}, "line 2: not a row: TypeError"),
    ({**ROW, "state": None}, "line 2: not a row: KeyError: 'state'"),
    ({**ROW, "plan": 4}, 'line 2: "plan": wanted a list of actions, got 4'),
    ({**ROW, "plan": "DRRD"}, "wanted a list of actions, got 'DRRD'"),
    ({**ROW, "file_name": 4}, 'line 2: "file_name": wanted one file\'s name, got 4'),
    ({key: ROW[key] for key in ROW if key != "id"}, "line 2: not a row: KeyError: 'id'"),
    ({**ROW, "id": ["x"]}, 'line 2: "id": wanted a text'),
    ({**ROW, "id": "first"}, "line 2: the id 'first' is that of"),
    ([1, 2], "line 2: not a row: AttributeError"),
    ("[" * 100_000, "line 2: not JSON"), ("9" * 5000, "line 2: not JSON"),
    ({**ROW, "plan": ["R", "R"]}, "line 2: the plan of test_a does not solve its puzzle: hole"),
    ({**ROW, "plan": ["D"]}, "line 2: the plan of test_a does not solve its puzzle: unfinished"),
    ({**ROW, "plan": None}, "line 2: not a row: KeyError: 'plan'"),
    ({**ROW, "plan": list("DRLRRD")}, "has 6 actions, the shortest has 4: "),
    ({**ROW, "plan": list("DRRDUU")}, "has 6 actions, the shortest has 4: "),
    ({**ROW, "plan": ["D", "PICK"]}, "does not solve its puzzle: no such action"),
    ({**ROW, "plan": [["D"]]}, "does not solve its puzzle: no such action"),
    ({**ROW, "file_name": "../test/a.png"}, "'../test/a.png' does not stay in"),
    ({**ROW, "file_name": "/etc/a.png"}, "'/etc/a.png' does not stay in"),
    ({**ROW, "file_name": "loop.png"}, "line 2: there is no picture"),
])
def test_a_broken_row(tmp_path, capsys, line, message):
    data = folder_with(tmp_path, {**ROW, "id": "first"}, line, {**ROW, "id": "last"})
    (data / "test/loop.png").symlink_to("loop.png")
    assert message in stops(capsys, gen_data.load_rows, data, "test")


def png(width, height):
    """A valid PNG of one colour, far smaller than its pixels."""
    def chunk(name, body):
        checksum = struct.pack(">I", zlib.crc32(name + body))
        return struct.pack(">I", len(body)) + name + body + checksum
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    rows = zlib.compress(bytes((width + 1) * min(height, 1000)), 9)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows)
            + chunk(b"IEND", b""))


def test_broken_pictures(tmp_path, capsys):
    whole = io.BytesIO()
    LAKE.render(64).save(whole, "PNG")
    (tmp_path / "whole.png").write_bytes(whole.getvalue())
    assert gen_data.open_picture(tmp_path / "whole.png").size == (192, 192)
    for name, content in (("cut.png", whole.getvalue()[:-2000]), ("text.png", b"no picture"),
                          ("empty.png", b"")):
        (tmp_path / name).write_bytes(content)
        message = stops(capsys, gen_data.open_picture, tmp_path / name)
        assert f"{name}: cannot be read as a picture" in message
    for width, height in ((40_000, 40_000), (4097, 20)):
        (tmp_path / "bomb.png").write_bytes(png(width, height))
        assert "bomb.png:" in stops(capsys, gen_data.open_picture, tmp_path / "bomb.png")
    message = stops(capsys, gen_data.open_picture, tmp_path / "missing.png")
    assert "missing.png: cannot be read" in message


def checkpoint(tmp_path, change):
    """A copy of the bundled backbone with its weights changed."""
    folder = shutil.copytree(common.TINY, tmp_path / "model",
                             ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def lose(weights):
    del weights["model.language_model.layers.1.mlp.up_proj.weight"]


def gain(weights):
    weights["model.language_model.layers.1.mlp.side_proj.weight"] = torch.zeros(2, 2)


def shrink(weights):
    weights["model.language_model.layers.1.mlp.up_proj.weight"] = torch.zeros(2, 2)


@pytest.mark.parametrize("change, message", [
    (lose, "such as model.language_model.layers.1.mlp.up_proj.weight"),
    (gain, "such as model.language_model.layers.1.mlp.side_proj.weight"),
    (shrink, "cannot be loaded")])
def test_a_checkpoint_with_wrong_weights(tmp_path, capsys, change, message):
    folder = checkpoint(tmp_path, change)
    line = stops(capsys, common.load, str(folder), 32)
    assert f"--model {folder}" in line and message in line


def test_a_checkpoint_with_broken_files(tmp_path, capsys):
    folder = checkpoint(tmp_path, lambda weights: None)
    common.load(str(folder), 32)
    whole = (folder / "model.safetensors").read_bytes()
    for size in (1000, 5, 100_000):
        (folder / "model.safetensors").write_bytes(whole[:size])
        line = stops(capsys, common.load, str(folder), 32)
        assert f"--model {folder} cannot be loaded" in line
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")  # a pickle is not even opened
    assert "no file named model.safetensors" in stops(capsys, common.load, str(folder), 32)
    (folder / "model.safetensors").write_bytes(whole)
    (folder / "chat_template.jinja").unlink()
    assert "its processor cannot be used" in stops(capsys, common.load, str(folder), 32)


def test_no_code_from_a_checkpoint_is_run(tmp_path):
    """A checkpoint that brings its own classes is loaded without them."""
    folder = checkpoint(tmp_path, lambda weights: None)
    evil = f"open({str(tmp_path / 'executed')!r}, 'w')"
    for name in ("config.json", "processor_config.json"):
        config = json.loads((folder / name).read_text())
        config["auto_map"] = {"AutoConfig": "evil.Config", "AutoProcessor": "evil.Processor",
                              "AutoModel": "evil.Model"}
        (folder / name).write_text(json.dumps(config))
    (folder / "evil.py").write_text(evil)
    common.load(str(folder), 32)
    assert not (tmp_path / "executed").exists()


# Responses: anything, and scraps of what a response is made of, some of them very long.
scraps = st.sampled_from([
    "<answer>", "</answer>", "U,U", "PICK", "DROP", ",", "\n", "1. ", "2)", "Map: 3x3\n",
    "row 0: S F H\n", "row 1: F F F\n", "row 2: H F G\n", "row 0: SR .LR", "Map:", "(0,1)", "[",
    "((", "none", "row 1 col 2", "Route: from", "**LLRU**", "**", "\\boxed{", "}", "→", "->", "up",
    "Action plan: ", "</script><script>alert(1)</script>", "<!--", "\x00\x1b[2J", "\ud800",
    "\u202e", "9" * 5000, " " * 5000, "\n" * 2000, "<answer>" * 500, "map " * 500, "(" * 500,
    "row 1" * 500, "1." * 500, "\u0663"])
responses = st.lists(scraps | st.text(max_size=20), max_size=12).map("".join) | st.text()
OUTCOMES = {"success", "unfinished", "no answer", "hole", "wall", "edge", "table", "printer",
            "pick", "drop"}


def read_everywhere(task, text):
    """Every reader of model output; returns the verdict."""
    row = row_of(PUZZLES[task])
    for parse in (gen_data.parse, lenient.parse):
        verdict = row.judge(text, parse)
        plan, state = verdict["plan"], verdict["map"]
        assert plan is None or plan and set(plan) <= set(row.puzzle.actions)
        assert verdict["outcome"] in OUTCOMES
        gen_data.execute(row.puzzle, plan or [])
        json.dumps(verdict)
    if state:  # a world that can be planned in
        described = gen_data.TASKS[task](**state)
        gen_data.check(described, plan)
        gen_data.solve(described)
        assert gen_data.read_map(task, gen_data.listing(described.cells())) == described
    assert set(row.score(None, text)) == set(row.questions())
    for name in row.questions():
        row.score((name,), text)
    assert len(gen_data.part_of(list(text[:1000]))) == len(text[:1000])
    return verdict


@settings(max_examples=300, deadline=None)
@given(text=responses, task=st.sampled_from(list(PUZZLES)))
def test_any_response_is_read(text, task):
    read_everywhere(task, text)


@pytest.mark.slow
def test_a_hundred_thousand_responses_are_read():
    count = []

    @settings(max_examples=100_000, deadline=None, database=None)
    @given(text=responses, task=st.sampled_from(list(PUZZLES)))
    def each(text, task):
        read_everywhere(task, text)
        count.append(len(text))
    each()
    print(f"\n{len(count)} responses read, {sum(count):,} characters, the longest {max(count):,}")
    assert len(count) >= 90_000


@pytest.mark.parametrize("unit", [
    "9", " ", "\n", "*", "**a", "**A", "<answer>", "<answer>U</answer>", "</answer>", "map: ",
    "Map: 3x3\nrow 0: ", "(9", "1.\n", "U,", "up ", "→", "->", "\\boxed{", "\\boxed{{",
    "the answer ", "so the\n", "plan:\n", "plan: U\n", ">>#", "**U,U**\n"])
def test_a_megabyte_of_one_thing(unit):
    """An expression that backtracks would take a million times a million steps: without end."""
    read_everywhere("maze", unit * (1_000_000 // len(unit)))
