"""The puzzles: rules, plans, prompts, splits and files. Nothing here needs torch."""
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import gen_data
from gen_data import TASKS, check, parse, solve

LAKE = {"grid": ["SFH", "FFF", "HFG"]}
# +--+--+--+
# |S  .  . |   one corridor: along row 0, down column 2, back along row 1, down column 0, along row 2
# +--+--+  +
# | .  .  .|
# +  +--+--+
# | .  . G |
# +--+--+--+
MAZE = {"walls": [[7, 3, 9], [5, 3, 10], [6, 3, 11]], "start": [0, 0], "goal": [2, 2]}
OFFICE = {"grid": ["A...", "..P.", "TTT.", "TTT."]}


def boards(count=40):
    """(task, level, state) of solvable boards of every task and level."""
    rng = np.random.default_rng(0)
    for task, rules in TASKS.items():
        for level in rules.levels:
            found = 0
            while found < count:
                state = rules.sample(rng, level)
                if solve(task, state) is not None:
                    found += 1
                    yield task, level, state


def test_importing_gen_data_does_not_import_torch():
    code = "import sys, gen_data; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(gen_data.__file__).parent).returncode == 0


@pytest.mark.parametrize("task, state, plan, outcome", [
    ("frozenlake", LAKE, "D R R D", "success"),
    ("frozenlake", LAKE, "R D D R", "success"),
    ("frozenlake", LAKE, "R D D R U U U U", "success"),       # the episode ended at the goal
    ("frozenlake", LAKE, "R R", "hole"),
    ("frozenlake", LAKE, "U", "edge"),
    ("frozenlake", LAKE, "D R", "unfinished"),
    ("frozenlake", LAKE, "PICK", "pick"),
    ("frozenlake", LAKE, None, "no answer"),
    ("maze", MAZE, "R R D L L D R R", "success"),
    ("maze", MAZE, "D", "wall"),
    ("maze", MAZE, "L", "edge"),
    ("maze", MAZE, "DROP", "drop"),
    ("maze", MAZE, "R R D", "unfinished"),
    ("minibehaviour", OFFICE, "D R PICK D", "table"),
    ("minibehaviour", OFFICE, "D R PICK DROP", "success"),
    ("minibehaviour", OFFICE, "R R D", "printer"),
    ("minibehaviour", OFFICE, "R R PICK D DROP", "success"),  # the printer's cell is free once it was picked up
    ("minibehaviour", OFFICE, "PICK", "pick"),                # not beside the printer
    ("minibehaviour", OFFICE, "D R PICK PICK", "pick"),       # already carrying
    ("minibehaviour", OFFICE, "D DROP", "drop"),              # nothing to put down
    ("minibehaviour", OFFICE, "R R PICK DROP", "drop"),       # not beside the table
    ("minibehaviour", OFFICE, "L", "edge"),
    ("minibehaviour", OFFICE, "D R PICK", "unfinished"),
])
def test_verdicts(task, state, plan, outcome):
    assert check(task, state, plan and plan.split()) == outcome


@pytest.mark.parametrize("task, state, length", [("frozenlake", LAKE, 4), ("maze", MAZE, 8), ("minibehaviour", OFFICE, 4)])
def test_shortest_plans_by_hand(task, state, length):
    assert len(solve(task, state)) == length and check(task, state, solve(task, state)) == "success"


def test_plans_are_legal_and_no_shorter_one_exists():
    """Against an independent count: sets of positions reachable in exactly k steps."""
    for task, level, state in boards(10):
        rules, plan = TASKS[task], solve(task, state)
        assert check(task, state, plan) == "success"
        reached = {rules.start(state)}
        for _ in range(len(plan)):
            assert not any(rules.done(state, pos) for pos in reached)
            reached = {new for pos in reached for action in gen_data.ACTIONS
                       for new, fault in [rules.step(state, pos, action)] if not fault}
        assert any(rules.done(state, pos) for pos in reached)


def test_lengths_agree_with_networkx():
    """Shortest paths on graphs built from the facts alone, by another library; off the `step` function entirely."""
    for task, level, state in boards(60):
        if task == "maze":
            graph = nx.Graph(((r, c), (r + dr, c + dc)) for r, row in enumerate(state["walls"]) for c, bits in enumerate(row)
                             for bit, dr, dc in ((2, 1, 0), (8, 0, 1)) if not bits & bit)
            length = nx.shortest_path_length(graph, tuple(state["start"]), tuple(state["goal"]))
        else:
            cells = {(r, c): cell for r, row in enumerate(state["grid"]) for c, cell in enumerate(row)}
            place = {mark: pos for pos, mark in cells.items()}
            graph = nx.grid_2d_graph(level, level)
            beside = {mark: {n for pos, m in cells.items() if m == mark for n in graph[pos]} for mark in "PT"}
            graph.remove_nodes_from([pos for pos, mark in cells.items() if mark in "HT"])
            if task == "frozenlake":
                length = nx.shortest_path_length(graph, place["S"], place["G"])
            else:  # to a cell beside the printer without entering it, from there over any floor to one beside the table
                before = nx.single_source_shortest_path_length(nx.restricted_view(graph, [place["P"]], []), place["A"])
                length = min(before[pick] + 1 + nx.shortest_path_length(graph, pick, drop) + 1
                             for pick in beside["P"] & before.keys() for drop in beside["T"] & set(nx.node_connected_component(graph, pick)))
        assert len(solve(task, state)) == length


def test_frozenlake_agrees_with_gymnasium():
    """2,000 boards of every level, a random walk on each; off-board moves aside (gymnasium stays, here it is a fault)."""
    from gymnasium.envs.toy_text.frozen_lake import FrozenLakeEnv
    rng, rules, seen = np.random.default_rng(1), TASKS["frozenlake"], set()
    for board in range(2000):
        level = 3 + board % 6
        state = rules.sample(rng, level)
        env = FrozenLakeEnv(desc=state["grid"], is_slippery=False)
        env.reset(seed=0)
        pos = rules.start(state)
        assert env.s == pos[0] * level + pos[1]
        for action in rng.choice(list(gen_data.MOVES), 30):
            new, fault = rules.step(state, pos, action)
            seen.add(fault)
            if fault == "edge":
                continue
            cell, reward, ended, _, _ = env.step("LDRU".index(action))
            assert divmod(int(cell), level) == new
            assert (reward == 1) == rules.done(state, new)
            assert ended == (fault == "hole" or rules.done(state, new))
            if ended:
                break
            pos = new
    assert seen == {None, "edge", "hole"}


def test_mazes_are_perfect():
    for task, level, state in boards(10):
        if task == "maze":
            opened = sum(bin(15 - bits).count("1") for row in state["walls"] for bits in row)
            assert opened == 2 * (level * level - 1)  # a spanning tree, every opening seen from both sides


@pytest.mark.parametrize("text, plan", [
    ("<answer>U,U,R</answer>", "U U R"),
    ("<answer>UUR</answer>", "U U R"),
    ("<answer> u, R </answer>", "U R"),
    ("<answer>U,PICK,R,DROP</answer>", "U PICK R DROP"),
    ("<answer>U</answer> or <answer>D</answer>", "D"),
    ("<answer>U</answer> and <answer>D", "U"),
    ("U,U,R", None), ("", None), ("<answer></answer>", None), ("</answer><answer>", None),
    ("<answer>up</answer>", None), ("<answer>U then R</answer>", None),
])
def test_parse(text, plan):
    assert parse(text) == (plan and plan.split())


def test_reference_responses_are_read_back():
    for task, level, state in boards(5):
        row = dict(task=task, level=level, state=state, plan=solve(task, state))
        text = gen_data.response(row)
        assert parse(text) == row["plan"]
        assert text.startswith(TASKS[task].describe(state) + "\nRoute: from ")
        pieces = list(text)
        parts = [gen_data.PARTS[i] for i in gen_data.part_of(pieces)]
        assert parts == sorted(parts, key=gen_data.PARTS.index) and set(parts) == set(gen_data.PARTS)


def test_listing_by_hand():
    assert TASKS["frozenlake"].describe(LAKE) == "Map: 3x3\nrow 0: S F H\nrow 1: F F F\nrow 2: H F G"
    assert TASKS["maze"].describe(MAZE) == "Map: 3x3\nrow 0: SR .LR .DL\nrow 1: .DR .LR .UL\nrow 2: .UR .LR GL"
    assert TASKS["minibehaviour"].describe(OFFICE).splitlines()[2] == "row 1: . . P ."


def test_perception_by_hand():
    def answers(task, state):
        row = {"task": task, "state": state}
        return {name: gen_data.perception_target(row, (name,)) for name in gen_data.questions(task)[1:]}
    assert answers("frozenlake", LAKE) == {"size": "3x3", "player": "(0,0)", "goal": "(2,2)", "holes": "(0,2), (2,0)"}
    assert answers("maze", MAZE) == {"size": "3x3", "player": "(0,0)", "goal": "(2,2)", "moves": "R"}
    assert answers("minibehaviour", OFFICE) == {
        "size": "4x4", "agent": "(0,0)", "printer": "(1,2)", "table": "(2,0), (2,1), (2,2), (3,0), (3,1), (3,2)",
        "near_printer": "(0,2), (1,1), (1,3)", "near_table": "(1,0), (1,1), (2,3), (3,3)", "moves": "D, R"}


def test_several_questions_are_numbered():
    row = {"task": "frozenlake", "state": LAKE}
    assert gen_data.perception_prompt(row, ("goal", "holes")).endswith("1. Where is the goal?\n2. Where are the holes?")
    assert gen_data.perception_target(row, ("goal", "holes")) == "1. (2,2)\n2. (0,2), (2,0)"
    assert gen_data.perception_target(row, ("map",)) == TASKS["frozenlake"].describe(LAKE)


def test_teacher_sees_the_state_and_the_student_does_not():
    for task, level, state in boards(3):
        row = dict(task=task, level=level, state=state, plan=solve(task, state))
        listing, plan = TASKS[task].describe(state), ",".join(row["plan"])
        assert listing in gen_data.teacher_prompt(row, "state") and listing not in gen_data.student_prompt(row)
        assert f"plan: {plan}\n" in gen_data.teacher_prompt(row) and "plan" not in gen_data.teacher_prompt(row, "state")
        # Word for word the same rules and format; the student's prompt does not depend on the state at all.
        assert gen_data.teacher_prompt(row, "state").replace(gen_data.symbols(row), gen_data.PICTURE) == gen_data.student_prompt(row)
        assert gen_data.student_prompt(row) == gen_data.student_prompt({"task": task})


def test_pictures_show_the_cells():
    lake = TASKS["frozenlake"].render(LAKE, 32)
    cells = {cell: np.asarray(lake)[r * 32:r * 32 + 32, c * 32:c * 32 + 32] for cell, r, c in
             (("S", 0, 0), ("F", 0, 1), ("H", 0, 2), ("G", 2, 2))}
    assert lake.size == (96, 96) and len({cell.tobytes() for cell in cells.values()}) == 4
    maze = TASKS["maze"].render(MAZE, 32)
    assert maze.getpixel((16, 16)) == (255, 215, 0) and maze.getpixel((80, 80)) == (30, 90, 255)
    assert maze.getpixel((16, 32)) == (0, 0, 0) and maze.getpixel((48, 16)) == (255, 255, 255)  # wall, corridor
    office = TASKS["minibehaviour"].render(OFFICE, 32)
    assert office.getpixel((16, 16)) == (255, 0, 0) and office.getpixel((16, 80)) == (210, 180, 140)
    assert office.getpixel((80, 48)) == (255, 255, 255) and office.getpixel((112, 16)) == (0, 0, 0)


# The first 16 hex digits of the sha256 of the RGB bytes of one picture of each level of VSP's FrozenLake.
VSP = {"8872391eba6e5194": "FHF HFG FSF",
       "c2e32d15262bfe61": "FFFF FSFH FGHF HFFH",
       "ec37498085a6936d": "FFFFF FHFFF FFFFH FFSFF GFFFF",
       "5f8c114086a41fd1": "FHFFFF FHHFFF FFFFFF FFGHFH FFFHFS FFFHFF",
       "4a747241ac1c9c08": "FFGSHFH FHFFFFF FFFFHFF FFFFHFF FFFFFFF HFFFFHF FHFFFFF",
       "724fd2618c49a072": "FHFFFFFH FFFHHFFF FFFFFFFF FFFSGFFF FHHHFFFF FFFHFFFF FFHFHHFH FFFFFFHF"}


@pytest.mark.parametrize("digest", VSP)
def test_frozenlake_pictures_are_those_of_vsp_to_the_pixel(digest):
    picture = TASKS["frozenlake"].render({"grid": VSP[digest].split()}, 64)
    assert hashlib.sha256(np.asarray(picture).tobytes()).hexdigest().startswith(digest)


def test_files_hold_the_picture_resized_by_pillow(tmp_path):
    for task, level, state in boards(2):
        for cell_size, size in ((64, 256), (32, 0), (48, 100)):
            gen_data.draw({"task": task, "state": state, "file_name": "a.png"}, tmp_path, cell_size, size)
            picture = TASKS[task].render(state, cell_size)
            assert picture.size == (cell_size * level,) * 2
            wanted = picture.resize((size, size), Image.LANCZOS) if size else picture
            read = Image.open(tmp_path / "a.png")
            assert read.mode == "RGB" and np.array_equal(read, wanted)


# ---------------------------------------------------------------- free-form answers read back

@pytest.mark.parametrize("task, state, name, text, right", [
    ("frozenlake", LAKE, "size", "3x3", True),
    ("frozenlake", LAKE, "size", "The map has 3 rows and 3 columns.", True),
    ("frozenlake", LAKE, "size", "3", False),
    ("frozenlake", LAKE, "size", "3x4", False),
    ("frozenlake", LAKE, "player", "The start is at [0, 0].", True),
    ("frozenlake", LAKE, "player", "row 0, column 0", True),
    ("frozenlake", LAKE, "player", "(0,0) or (0,1)", False),
    ("frozenlake", LAKE, "holes", "(2,0), (0,2)", True),
    ("frozenlake", LAKE, "holes", "( 0 , 2 ) and (2,0), that is all", True),
    ("frozenlake", LAKE, "holes", "(0,2)", False),
    ("frozenlake", LAKE, "holes", "none", False),
    ("frozenlake", LAKE, "holes", "", False),
    ("frozenlake", LAKE, "holes", "(99999,2), (2,0)", False),
    ("frozenlake", {"grid": ["SF", "FG"]}, "holes", "None.", True),
    ("frozenlake", {"grid": ["SF", "FG"]}, "holes", "There are no holes.", True),
    ("frozenlake", {"grid": ["SF", "FG"]}, "holes", "", False),
    ("frozenlake", {"grid": ["SF", "FG"]}, "holes", "(0,1)", False),
    ("maze", MAZE, "moves", "Right", True),
    ("maze", MAZE, "moves", "r", True),
    ("maze", MAZE, "moves", "R, D", False),
    ("minibehaviour", OFFICE, "moves", "right and down", True),
    ("minibehaviour", OFFICE, "moves", "R D PICK", False),
    ("minibehaviour", OFFICE, "near_printer", "(1,3) (1,1) (0,2)", True),
    ("maze", MAZE, "map", "Map: 3x3\nrow 0: SR .RL .DL\nrow 1: .RD .LR .UL\nrow 2: .UR .LR GL", True),  # letters in any order
    ("maze", MAZE, "map", "Map: 3x3\nrow 0: SR .RL .DL\nrow 1: .RD .LR .UL\nrow 2: .UR .LR G", False),
    ("maze", MAZE, "map", "Map: 3x3\nrow 0: SR .RL .DL\nrow 1: .RD .LR .UL", False),
    ("frozenlake", LAKE, "map", "map: 3 x 3\nRow 0: s f h\nrow 1: F F F\nrow 2: H F G", True),
    ("frozenlake", LAKE, "map", "Map: 3x3\nrow 0: S F H\nrow 1: F F F\nrow 2: H F F", False),
])
def test_one_answer_is_read_back(task, state, name, text, right):
    assert gen_data.score_perception({"task": task, "state": state}, (name,), text) == {name: right}


def test_numbered_answers_are_read_back():
    row, names = {"task": "frozenlake", "state": LAKE}, ("goal", "holes", "size")
    assert gen_data.score_perception(row, names, "1) (2,2)\n2) (0,2),\n(2,0)\n3) 3x3") == {"goal": True, "holes": True, "size": True}
    assert gen_data.score_perception(row, names, "Sure!\n**2.** (2,0), (0,2)\n1. (2,1)") == {"goal": False, "holes": True, "size": False}
    assert gen_data.score_perception(row, names, "(2,2)") == {"goal": False, "holes": False, "size": False}


def test_targets_score_full_marks_and_states_are_read_back():
    for task, level, state in boards(5):
        row = dict(task=task, state=state, plan=solve(task, state))
        assert gen_data.read_state(task, gen_data.response(row)) == state
        assert all(gen_data.score_perception(row, None, gen_data.perception_target(row)).values())
        for name in gen_data.questions(task):
            assert gen_data.score_perception(row, (name,), gen_data.perception_target(row, (name,))) == {name: True}


@pytest.mark.parametrize("task, text", [
    ("frozenlake", "no map"), ("frozenlake", "Map: 3x3"), ("frozenlake", "Map: 2x3\nrow 0: S F G\nrow 1: F F F"),
    ("frozenlake", "Map: 2x2\nrow 0: S F\nrow 1: F F"),        # no goal
    ("frozenlake", "Map: 2x2\nrow 0: S S\nrow 1: F G"),        # two starts
    ("frozenlake", "Map: 2x2\nrow 0: S F\nrow 1: X G"),        # an unknown cell
    ("frozenlake", "Map: 2x2\nrow 0: S F\nrow 1: FF G"),       # a cell of two letters
    ("frozenlake", "Map: 2x2\nrow 1: F G\nrow 0: S F"),        # rows out of order
    ("maze", "Map: 2x2\nrow 0: SX .L\nrow 1: . G"), ("minibehaviour", "Map: 2x2\nrow 0: A .\nrow 1: P ."),
])
def test_maps_that_cannot_be_read(task, text):
    assert gen_data.read_state(task, text) is None


scraps = st.lists(st.sampled_from(["<answer>", "</answer>", "U", "PICK", ",", "\n", "1.", "2)", "Map: 3x3", "row 0: ", "S F H", "SR .LR", "(0,1)", "((", "[9", "none",
                                   "row 1 col 2", "Route", "9" * 50, "\u0663", "\x00", "x"]) | st.text(max_size=8), max_size=40).map("".join)


@settings(max_examples=500, deadline=None)
@given(text=st.text() | scraps, task=st.sampled_from(list(TASKS)))
def test_no_text_breaks_a_reader(text, task):
    state = {"frozenlake": LAKE, "maze": MAZE, "minibehaviour": OFFICE}[task]
    row = {"task": task, "state": state}
    plan = parse(text)
    assert plan is None or plan and set(plan) <= set(gen_data.ACTIONS)
    assert check(task, state, plan) in {"success", "unfinished", "no answer", "hole", "wall", "edge", "table", "printer", "pick", "drop"}
    assert set(gen_data.score_perception(row, None, text)) == set(gen_data.questions(task))
    described = gen_data.read_state(task, text)
    if described:  # a world that can be planned in
        check(task, described, plan)
        solve(task, described)
    assert len(gen_data.part_of(list(text))) == len(text)


# ---------------------------------------------------------------- the public benchmarks

def vsp_folder(folder, changes=None):
    """A miniature of VSP with two maps; `changes`: {file: new text, or None to remove it}."""
    for level, grid in ((3, "FFS HFF GFF"), (4, "SFFF FHHF FFFF FFHG")):
        rows = grid.split()
        lines = ["| | " + " | ".join(f"Col {i + 1}" for i in range(level)) + " |"]
        lines += [f"| Row {i + 1} | " + " | ".join({"S": "@", "G": "*", "H": "#", "F": "_"}[c] for c in row) + " |" for i, row in enumerate(rows)]
        for part in ("table", "img"):
            (folder / f"level{level}" / part).mkdir(parents=True)
        (folder / f"level{level}/table/0.txt").write_text("\n".join(lines) + "\n")
        TASKS["frozenlake"].render({"grid": rows}, 64).save(folder / f"level{level}/img/0.png")
    for name, text in (changes or {}).items():
        (folder / name).unlink() if text is None else (folder / name).write_text(text)
    return folder


def test_import_of_vsp(tmp_path):
    source = vsp_folder(tmp_path / "vsp")
    assert run("--from_vsp", source, "--out", tmp_path / "kept").returncode == 0
    rows = gen_data.load_rows(tmp_path / "kept", "test")
    assert [row["state"]["grid"] for row in rows] == [["FFS", "HFF", "GFF"], ["SFFF", "FHHF", "FFFF", "FFHG"]]
    assert [len(row["plan"]) for row in rows] == [4, 6] and rows[1]["source"] == "vsp/level4/table/0.txt"
    assert list(rows[0]) == ["file_name", "id", "task", "level", "seed", "source", "bucket", "state", "plan", "path"]
    for level, row in zip((3, 4), rows):  # the benchmark's own bytes
        assert Path(row["path"]).read_bytes() == (source / f"level{level}/img/0.png").read_bytes()
    assert run("--from_vsp", source, "--out", tmp_path / "small", "--image_size", 256).returncode == 0
    for row in gen_data.load_rows(tmp_path / "small", "test"):
        wanted = Image.open(source / f"level{row['level']}/img/0.png").resize((256, 256), Image.LANCZOS)
        assert np.array_equal(Image.open(row["path"]), wanted)


HEAD = "| | Col 1 | Col 2 | Col 3 |\n"


@pytest.mark.parametrize("name, text, message", [
    ("level3/table/0.txt", HEAD + "| Row 1 | @ | _ | _ |\n| Row 2 | _ | _ |\n| Row 3 | _ | _ | * |", "level3/table/0.txt, line 3: 2 cells"),
    ("level3/table/0.txt", HEAD + "| Row 1 | @ | _ | _ |\n| Row 2 | _ | _ | * |", "line 2: 3 cells under 3 columns in 2 rows"),
    ("level3/table/0.txt", HEAD + "| Row 1 | @ | _ | _ |\n| Row 2 | _ | x | _ |\n| Row 3 | _ | _ | * |", "line 3: unknown symbol 'x'"),
    ("level3/table/0.txt", HEAD + "| Row 1 | _ | _ | _ |\n| Row 2 | _ | _ | _ |\n| Row 3 | _ | _ | * |", "0 cells with S, wanted exactly one"),
    ("level3/table/0.txt", HEAD + "| Row 1 | @ | _ | * |\n| Row 2 | _ | _ | _ |\n| Row 3 | _ | _ | * |", "2 cells with G, wanted exactly one"),
    ("level3/table/0.txt", HEAD + "| Row 1 | @ | # | _ |\n| Row 2 | # | # | _ |\n| Row 3 | _ | _ | * |", "0.txt: the goal cannot be reached"),
    ("level4/table/0.txt", HEAD + "| Row 1 | @ | _ | _ |\n| Row 2 | _ | _ | _ |\n| Row 3 | _ | _ | * |", "not 4x4 as its level says"),
    ("level3/table/0.txt", "", "0.txt: the map is not square"),
    ("level4/img/0.png", "no picture", "level4/img/0.png: cannot be read as a picture"),
    ("level4/img/0.png", None, "level4/img/0.png: cannot be read as a picture"),
])
def test_a_broken_vsp_record_stops_the_import(tmp_path, name, text, message):
    refused(tmp_path, message, "--from_vsp", vsp_folder(tmp_path / "vsp", {name: text}))


LAYOUT = [["S", "F", "H"], ["F", "F", "F"], ["H", "F", "G"]]
FROZENLAKE = {"input_state": [0, 3, 4, 5, 8], "meta": {"level": 3, "layout": LAYOUT, "start_pos": 0, "target_pos": 8, "distance_map": {"0": 4}}}
WALLS = [[{name: bool(bits & bit) for bit, name in ((1, "north"), (2, "south"), (4, "west"), (8, "east"))} for bits in row] for row in MAZE["walls"]]
MAZES = {"meta": {"level": 3, "layout": WALLS, "start_pos": 0, "target_pos": 8, "distance_map": {"0": 8, "1": 7}}}
TABLE = [[3, 1], [4, 1], [3, 2], [4, 2], [3, 3], [4, 3]]
OFFICES = {"input_state": [0] * 6, "meta": {"level": 5, "start_pos": [2, 4], "printer_pos": [1, 1], "table_pos": TABLE}}


def changed(record, **meta):
    return {**record, "meta": {**record["meta"], **meta}}


def records(folder, *lines):
    folder.mkdir(exist_ok=True)
    (folder / "file.jsonl").write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return folder / "file.jsonl"


@pytest.mark.parametrize("task, record, state, plan", [
    ("frozenlake", FROZENLAKE, LAKE, 4), ("maze", MAZES, MAZE, 8),
    ("minibehaviour", OFFICES, {"grid": [".....", ".P...", "....A", ".TTT.", ".TTT."]}, 5)])
def test_import_of_visualplanning(tmp_path, task, record, state, plan):
    file = records(tmp_path / "in", record, changed(record))
    assert run("--from_visualplanning", file, "--task", task, "--out", tmp_path / "out").returncode == 0
    rows = gen_data.load_rows(tmp_path / "out", "test")
    assert [row["state"] for row in rows] == [state, state] and {len(row["plan"]) for row in rows} == {plan}
    assert rows[1]["source"] == "file.jsonl, line 2" and rows[1]["bucket"] in gen_data.DIFFICULTIES
    assert np.array_equal(Image.open(rows[0]["path"]), TASKS[task].render(state, 64).resize((256, 256), Image.LANCZOS))


@pytest.mark.parametrize("task, record, message", [
    ("frozenlake", "{", "line 2: not a frozenlake record of VisualPlanning (JSONDecodeError"),
    ("frozenlake", {}, "(KeyError: 'meta')"),
    ("frozenlake", {**FROZENLAKE, "input_state": [0, 3, 8]}, "different lengths"),
    ("frozenlake", {**changed(FROZENLAKE, distance_map={"0": 2}), "input_state": [0, 3, 8]}, "the shortest plan has 2 actions, the rules here say 4"),
    ("frozenlake", changed(FROZENLAKE, start_pos=1), "no S at its position 1"),
    ("frozenlake", changed(FROZENLAKE, layout=[["S", "F", "S"], ["F", "F", "F"], ["H", "F", "G"]]), "2 cells with S"),
    ("frozenlake", changed(FROZENLAKE, layout=[["S", "F", "?"], ["F", "F", "F"], ["H", "F", "G"]]), "unknown symbol '?'"),
    ("frozenlake", changed(FROZENLAKE, layout=[["S", "F"], ["F", "F", "F"], ["H", "F", "G"]]), "not square"),
    ("frozenlake", changed(FROZENLAKE, level=9), "line 2"),
    ("maze", changed(MAZES, target_pos=9), "off the map"),
    ("maze", changed(MAZES, target_pos=0, distance_map={}), "line 2"),
    ("maze", changed(MAZES, layout=[[{**WALLS[0][0], "south": False}, *WALLS[0][1:]], *WALLS[1:]]), "south side of cell (0,0) is open on one side only"),
    ("maze", changed(MAZES, layout=[[{**WALLS[0][0], "north": False}, *WALLS[0][1:]], *WALLS[1:]]), "north side of cell (0,0)"),
    ("maze", changed(MAZES, layout=[row[:2] for row in WALLS]), "line 2"),
    ("minibehaviour", changed(OFFICES, printer_pos=[2, 4]), "on another thing"),
    ("minibehaviour", changed(OFFICES, printer_pos=[1, 5]), "off the map"),
    ("minibehaviour", changed(OFFICES, table_pos=TABLE[:4]), "not 2 rows of 3 cells"),
    ("minibehaviour", {**OFFICES, "input_state": [0] * 5}, "the shortest plan has 4 actions, the rules here say 5"),
])
def test_a_broken_visualplanning_record_stops_the_import(tmp_path, task, record, message):
    good = {"frozenlake": FROZENLAKE, "maze": MAZES, "minibehaviour": OFFICES}[task]
    stderr = refused(tmp_path, message, "--from_visualplanning", records(tmp_path / "in", good, record), "--task", task)
    assert "file.jsonl, line 2" in stderr


def refused(folder, message, *words):
    """The script stops with one line and exit code 2, and leaves nothing behind."""
    before = sorted(folder.iterdir())
    result = run(*words, "--out", folder / "out")
    assert result.returncode == 2 and message in result.stderr and "Traceback" not in result.stderr, result.stderr
    assert len([line for line in result.stderr.splitlines() if line.startswith("error:")]) == 1 and sorted(folder.iterdir()) == before
    return result.stderr


# ---------------------------------------------------------------- splits and files

def test_difficulties_are_balanced_thirds():
    for task, level in (("frozenlake", 3), ("frozenlake", 8), ("maze", 4), ("minibehaviour", 5)):
        rows = list(gen_data.sample_rows(task, level, "train", 61, seed=5))
        lengths = {name: [len(row["plan"]) for row in rows if row["bucket"] == name] for name in gen_data.DIFFICULTIES}
        assert [len(part) for part in lengths.values()] == [21, 20, 20]
        assert max(lengths["easy"]) < min(lengths["medium"]) <= max(lengths["medium"]) < min(lengths["hard"])
        rng, found = np.random.default_rng(9), []  # thirds of what random puzzles are, as nearly as whole lengths allow
        while len(found) < 600:
            plan = solve(task, TASKS[task].sample(rng, level))
            found += [] if plan is None else [gen_data.bucket(len(plan), gen_data.thirds(task, level))]
        assert all(0.15 < found.count(name) / 600 < 0.55 for name in gen_data.DIFFICULTIES)


def test_the_number_that_can_be_had_can_be_had(tmp_path):
    """Of 3x3 mazes: as many as exist in the split, and the named number is really there."""
    words = ["--tasks", "minibehaviour:4", "--val", 0, "--test", 0, "--cell_size", 8, "--image_size", 0]
    result = run(*words, "--train", 3000, "--out", tmp_path / "a")
    assert result.returncode == 2
    number = int(result.stderr.split("only ")[1].split()[0])
    assert run(*words, "--train", number, "--out", tmp_path / "a").returncode == 0
    assert run(*words, "--train", number + 3, "--out", tmp_path / "b").returncode == 2
    # Independently: every state of level 4 (6 places for the table, 90 for agent and printer), split and sorted by difficulty.
    counts = dict.fromkeys(gen_data.DIFFICULTIES, 0)
    for r, c in ((r, c) for r in range(3) for c in range(2)):
        floor = [(i, j) for i in range(4) for j in range(4) if not (r <= i < r + 2 and c <= j < c + 3)]
        for agent, printer in ((a, p) for a in floor for p in floor if a != p):
            state = {"grid": ["".join("A" if (i, j) == agent else "P" if (i, j) == printer else "." if (i, j) in floor else "T"
                                      for j in range(4)) for i in range(4)]}
            plan = solve("minibehaviour", state)
            if plan and gen_data.split_of("minibehaviour", state) == "train":
                counts[gen_data.bucket(len(plan), gen_data.thirds("minibehaviour", 4))] += 1
    assert number == 3 * min(counts.values())


def test_excluded_states_do_not_appear(tmp_path):
    words = ["--tasks", "minibehaviour:4", "--test", 0, "--cell_size", 8, "--image_size", 0]
    assert run(*words, "--train", 60, "--val", 6, "--out", tmp_path / "a").returncode == 0
    assert run(*words, "--train", 60, "--val", 6, "--seed", 1, "--exclude", tmp_path / "a", "--out", tmp_path / "b").returncode == 0
    assert run(*words, "--train", 60, "--val", 6, "--seed", 1, "--out", tmp_path / "c").returncode == 0
    a, b, c = ({gen_data.key_of(row["state"]) for row in gen_data.load_rows(tmp_path / name)} for name in "abc")
    assert not a & b and a & c and len(b) == 66


def test_imagefolder_of_datasets_reads_it(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    from datasets import load_dataset
    size = ["--train", 4, "--val", 2, "--test", 2]
    assert run("--tasks", "frozenlake:3", "maze:3", "minibehaviour:5", *size, "--out", tmp_path / "data").returncode == 0
    table = load_dataset("imagefolder", data_dir=str(tmp_path / "data"), cache_dir=str(tmp_path / "cache"))
    assert {name: len(split) for name, split in table.items()} == {"train": 12, "validation": 6, "test": 6}
    own = {row["id"]: row for split in gen_data.SPLITS for row in gen_data.load_rows(tmp_path / "data", split)}
    for split in table.values():
        for row in split:
            wanted = own[row["id"]]
            assert {key: row[key] for key in ("task", "level", "seed", "source", "bucket", "plan")} == {
                key: wanted[key] for key in ("task", "level", "seed", "source", "bucket", "plan")}
            assert {key: value for key, value in row["state"].items() if value is not None} == wanted["state"]
            assert np.array_equal(row["image"], Image.open(wanted["path"]))


def test_show(tmp_path):
    result = subprocess.run([sys.executable, gen_data.__file__, "--show"], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0 and [path.name for path in tmp_path.iterdir()] == ["puzzles.png"]
    assert Image.open(tmp_path / "puzzles.png").size == (6 * 272, 6 * 280)
    for task in TASKS:
        for title in ("row", "student", "teacher, with", "teacher without", "response", "perception", "target"):
            assert f"--- {task}: {title}" in result.stdout


def run(*words):
    return subprocess.run([sys.executable, gen_data.__file__, *map(str, words)], capture_output=True, text=True)


def test_same_seed_same_bytes_and_no_state_in_two_splits(tmp_path):
    size = ["--preset", "tiny", "--train", 30, "--val", 5, "--test", 5]
    for out, extra in (("a", ["--workers", 1]), ("b", ["--workers", 2]), ("c", ["--seed", 1])):
        assert run(*size, "--out", tmp_path / out, *extra).returncode == 0
    files = {out: {p.relative_to(tmp_path / out): p.read_bytes() for p in (tmp_path / out).rglob("*.*") if p.name != "args.json"}
             for out in "abc"}
    assert files["a"] == files["b"] and files["a"] != files["c"]
    seen = {}
    for out in "ac":  # across seeds too
        for split in gen_data.SPLITS:
            for row in gen_data.load_rows(tmp_path / out, split):
                assert check(row["task"], row["state"], row["plan"]) == "success"
                assert Image.open(row["path"]).size == (32 * row["level"],) * 2
                assert seen.setdefault(json.dumps([row["task"], row["state"]]), split) == split
                walls = json.dumps(row["state"].get("walls"))  # a maze's layout is held out, not only its ends
                assert walls == "null" or seen.setdefault(walls, split) == split


@pytest.mark.parametrize("words, message", [
    (["--preset", "huge"], "unknown preset 'huge'"),
    (["--tasks", "chess"], "unknown task 'chess'"),
    (["--tasks", "minibehaviour:2"], "minibehaviour has levels 4 to 6"),
    (["--tasks", "maze:x"], "cannot read the levels"),
    (["--hole_prob", "1.5"], "outside 0..1"),
    (["--tasks", "minibehaviour:2-5"], "minibehaviour has levels 4 to 6"),
    (["--train", "-1"], "--train -1: wanted at least 0"),
    (["--from_vsp", "nowhere"], "nowhere does not exist"),
    (["--from_vsp", "."], "no VSP tables in ."),
    (["--from_visualplanning", "nowhere", "--task", "maze"], "nowhere does not exist"),
    (["--from_visualplanning", "."], "needs --task"),
    (["--exclude", "nowhere"], "no nowhere/*/metadata.jsonl"),
    (["--tasks", "minibehaviour:4", "--train", "5000"], "distinct ones can be had"),
    (["--out", "."], "exists"),
    (["--out", ".", "--overwrite"], "not made by gen_data.py"),
])
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, words, message):
    words = words if "--out" in words else [*words, "--out", tmp_path / "data"]
    result = run(*words)
    assert result.returncode == 2 and message in result.stderr
    assert "Traceback" not in result.stderr and not list(tmp_path.iterdir())
