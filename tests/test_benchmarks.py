"""Public benchmarks as rows: what they hold arrives unchanged, and what is broken stops them."""
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_gen_data import LAKE, MAZE

import gen_data
from gen_data import FrozenLake, MiniBehaviour
from tools import benchmarks

ROOT = Path(__file__).parents[1]


def make(*words):
    benchmarks.main(benchmarks.parse_args([*map(str, words)]))


def refused(capsys, folder, message, *words):
    """The import stops with one line and exit code 2, and leaves nothing behind."""
    before = sorted(folder.iterdir())
    with pytest.raises(SystemExit) as stop:
        make(*words, "--out", folder / "out")
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert stop.value.code == 2 and len(lines) == 1 and message in lines[0], lines
    assert sorted(folder.iterdir()) == before
    return lines[0]


# ---------------------------------------------------------------- VSP

def table(rows):
    """VSP's text of a map."""
    marks = {"S": "@", "G": "*", "H": "#", "F": "_"}
    lines = ["| | " + " | ".join(f"Col {i + 1}" for i in range(len(rows))) + " |"]
    for i, row in enumerate(rows, 1):
        lines.append(f"| Row {i} | " + " | ".join(marks[cell] for cell in row) + " |")
    return "\n".join(lines) + "\n"


def vsp_folder(folder, changes=None):
    """A miniature of VSP with two maps; `changes`: {file: new text, or None to remove it}."""
    for level, rows in ((3, ["FFS", "HFF", "GFF"]), (4, ["SFFF", "FHHF", "FFFF", "FFHG"])):
        for kind in ("table", "img"):
            (folder / f"level{level}" / kind).mkdir(parents=True)
        (folder / f"level{level}/table/0.txt").write_text(table(rows))
        picture = FrozenLake(rows).render(64)
        picture.save(folder / f"level{level}/img/0.png")
    for name, text in (changes or {}).items():
        (folder / name).unlink()
        if text is not None:
            (folder / name).write_text(text)
    return folder


def test_import_of_vsp(tmp_path):
    source = vsp_folder(tmp_path / "vsp")
    words = ["vsp", source, "--out", tmp_path / "kept"]
    command = [sys.executable, "-m", "tools.benchmarks", *map(str, words)]  # as a user starts it
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0 and "2 rows" in result.stdout, result.stderr
    rows = gen_data.load_rows(tmp_path / "kept", "test")
    assert [row.puzzle.grid for row in rows] == [
        ["FFS", "HFF", "GFF"], ["SFFF", "FHHF", "FFFF", "FFHG"]]
    assert [len(row.plan) for row in rows] == [4, 6]
    assert [row.data["source"] for row in rows] == [
        "vsp/level3/table/0.txt", "vsp/level4/table/0.txt"]
    line = (tmp_path / "kept/test/metadata.jsonl").read_text().splitlines()[0]
    assert list(json.loads(line)) == ["file_name", "id", "task", "level", "seed", "source",
                                      "bucket", "state", "plan"]
    for level, row in zip((3, 4), rows, strict=True):  # the benchmark's own bytes
        own = source / f"level{level}/img/0.png"
        assert Path(row.path).read_bytes() == own.read_bytes()
    make("vsp", source, "--out", tmp_path / "small", "--image_size", 256)
    for row in gen_data.load_rows(tmp_path / "small", "test"):
        own = Image.open(source / f"level{row.level}/img/0.png")
        assert np.array_equal(Image.open(row.path), own.resize((256, 256), Image.LANCZOS))


def test_maps_are_taken_in_the_order_of_their_numbers(tmp_path):
    source = vsp_folder(tmp_path / "vsp")
    for number in (10, 2):
        for kind, end in (("table", "txt"), ("img", "png")):
            folder = source / f"level3/{kind}"
            (folder / f"{number}.{end}").write_bytes((folder / f"0.{end}").read_bytes())
            (folder / f"._{number}.{end}").write_bytes(b"\0\5\x16\7 of macOS")
    files = [Path(where).name for where, *_ in benchmarks.vsp_records(source)]
    assert files == ["0.txt", "2.txt", "10.txt", "0.txt"]


HEAD = "| | Col 1 | Col 2 | Col 3 |\n"


@pytest.mark.parametrize("name, text, message", [
    ("level3/table/0.txt", HEAD + "| Row 1 | @ | _ | _ |\n| Row 2 | _ | _ |\n| Row 3 | _ | _ | * |",
     "not a map of frozenlake, 3x3"),
    ("level3/table/0.txt", HEAD + "| Row 1 | @ | _ | _ |\n| Row 2 | _ | _ | * |",
     "not a map of frozenlake, 3x3"),
    ("level3/table/0.txt", table(["SFF", "FFF", "FFG"]).replace("Row 2 | _", "Row 2 | x"),
     "not a map of frozenlake, 3x3"),
    ("level3/table/0.txt", table(["FFF", "FFF", "FFG"]), "not a map of frozenlake, 3x3"),
    ("level3/table/0.txt", table(["SFG", "FFF", "FFG"]), "not a map of frozenlake, 3x3"),
    ("level3/table/0.txt", table(["SHF", "HHF", "FFG"]), "0.txt: the goal cannot be reached"),
    ("level4/table/0.txt", table(["SFF", "FFF", "FFG"]),
     "not a map of frozenlake, 4x4 as its level says"),
    ("level3/table/0.txt", "", "not a map of frozenlake, 3x3"),
    ("level4/img/0.png", "no picture", "level4/img/0.png: cannot be read as a picture"),
    ("level4/img/0.png", None, "level4/img/0.png: cannot be read as a picture"),
])
def test_a_broken_vsp_record_stops_the_import(tmp_path, capsys, name, text, message):
    refused(capsys, tmp_path, message, "vsp", vsp_folder(tmp_path / "vsp", {name: text}))


# ---------------------------------------------------------------- VisualPlanning

LAYOUT = [["S", "F", "H"], ["F", "F", "F"], ["H", "F", "G"]]
BITS = {"north": 1, "south": 2, "west": 4, "east": 8}
WALLS = []
for bits_of_row in MAZE.walls:
    WALLS.append([])
    for bits in bits_of_row:
        WALLS[-1].append({side: bool(bits & BITS[side]) for side in BITS})
TABLE = [[3, 1], [4, 1], [3, 2], [4, 2], [3, 3], [4, 3]]
RECORDS = {
    "frozenlake": {"input_state": [0, 3, 4, 5, 8], "meta": {
        "level": 3, "layout": LAYOUT, "start_pos": 0, "target_pos": 8, "distance_map": {"0": 4}}},
    "maze": {"meta": {"level": 3, "layout": WALLS, "start_pos": 0, "target_pos": 8,
                      "distance_map": {"0": 8, "1": 7}}},
    "minibehaviour": {"input_state": [0] * 6, "meta": {
        "level": 5, "start_pos": [2, 4], "printer_pos": [1, 1], "table_pos": TABLE}},
}


def changed(task, input_state=None, **meta):
    """The record of a task with other facts."""
    record = {**RECORDS[task], "meta": {**RECORDS[task]["meta"], **meta}}
    return record if input_state is None else {**record, "input_state": input_state}


def records(folder, *lines):
    folder.mkdir(exist_ok=True)
    lines = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (folder / "file.jsonl").write_text("\n".join(lines))
    return folder / "file.jsonl"


@pytest.mark.parametrize("task, puzzle, length", [
    ("frozenlake", LAKE, 4), ("maze", MAZE, 8),
    ("minibehaviour", MiniBehaviour([".....", ".P...", "....A", ".TTT.", ".TTT."]), 5)])
def test_import_of_visualplanning(tmp_path, task, puzzle, length):
    file = records(tmp_path / "in", RECORDS[task], RECORDS[task])
    make("visualplanning", file, "--task", task, "--out", tmp_path / "out")
    rows = gen_data.load_rows(tmp_path / "out", "test")
    assert [row.puzzle for row in rows] == [puzzle, puzzle]
    assert [len(row.plan) for row in rows] == [length, length]
    level = RECORDS[task]["meta"]["level"]
    assert [row.id for row in rows] == [f"test_{task}_{level}_0000{i}" for i in range(2)]
    assert rows[1].data["source"] == "file.jsonl, line 2"
    assert rows[1].bucket in gen_data.DIFFICULTIES
    wanted = puzzle.render(64).resize((256, 256), Image.LANCZOS)
    assert np.array_equal(Image.open(rows[0].path), wanted)


def row_with(row, column, **sides):
    """A copy of WALLS with other sides of one cell."""
    walls = [list(cells) for cells in WALLS]
    walls[row][column] = {**walls[row][column], **sides}
    return walls


@pytest.mark.parametrize("task, record, message", [
    ("frozenlake", "{", "not JSON"),
    ("frozenlake", {}, "KeyError: 'meta'"),
    ("frozenlake", changed("frozenlake", input_state=[0, 3, 8]),
     "has 2 actions, the rules here say 4"),
    ("frozenlake", changed("frozenlake", input_state=[0, 3, 8], distance_map={"0": 2}),
     "the shortest plan has 2 actions, the rules here say 4"),
    ("frozenlake", changed("frozenlake", start_pos=1), "KeyError: '1'"),
    ("frozenlake", changed("frozenlake", layout=["SFS", "FFF", "HFG"]),
     "not a map of frozenlake, 3x3"),
    ("frozenlake", changed("frozenlake", layout=["SF?", "FFF", "HFG"]),
     "not a map of frozenlake, 3x3"),
    ("frozenlake", changed("frozenlake", layout=["SF", "FFF", "HFG"]),
     "not a map of frozenlake, 3x3"),
    ("frozenlake", changed("frozenlake", level=9), "not a map of frozenlake, 9x9"),
    ("maze", changed("maze", target_pos=9), "not a map of maze, 3x3"),
    ("maze", changed("maze", target_pos=0, distance_map={}), "KeyError: '0'"),
    ("maze", changed("maze", target_pos=0, distance_map={"0": 0}), "not a map of maze, 3x3"),
    ("maze", changed("maze", layout=row_with(0, 0, south=False)),
     "south side of cell (0,0) is open on one side only"),
    ("maze", changed("maze", layout=row_with(0, 0, north=False)), "north side of cell (0,0)"),
    ("maze", changed("maze", layout=[row[:2] for row in WALLS]), "east side of cell (0,1)"),
    ("minibehaviour", changed("minibehaviour", printer_pos=[2, 4]), "on another thing"),
    ("minibehaviour", changed("minibehaviour", printer_pos=[1, 5]), "off the map"),
    ("minibehaviour", changed("minibehaviour", input_state=[0] * 5),
     "the shortest plan has 4 actions, the rules here say 5"),
])
def test_a_broken_visualplanning_record_stops_the_import(tmp_path, capsys, task, record, message):
    file = records(tmp_path / "in", RECORDS[task], record)
    line = refused(capsys, tmp_path, message, "visualplanning", file, "--task", task)
    assert "file.jsonl, line 2" in line


@pytest.mark.parametrize("words, message", [
    (["vsp", "nowhere"], "no VSP tables in nowhere"),
    (["vsp", "."], "no VSP tables in ."),
    (["visualplanning", "nowhere", "--task", "maze"], "nowhere: no such file"),
    (["visualplanning", ".", "--task", "maze"], ".: no such file"),
    (["visualplanning", ".", "--task", "chess"], "--task: invalid choice: 'chess'"),
    (["vsp", ".", "--image_size", "-1"], "--image_size: got '-1', must be a whole number"),
])
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, capsys, words, message):
    refused(capsys, tmp_path, message, *words)


def test_a_folder_that_is_there_is_not_replaced(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        make("vsp", vsp_folder(tmp_path / "vsp"), "--out", tmp_path)
    assert stop.value.code == 2 and "exists: remove it" in capsys.readouterr().err
