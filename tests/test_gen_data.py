"""The puzzles: rules, plans, prompts, splits and files. Nothing here needs torch."""
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
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


def test_frozenlake_agrees_with_gymnasium():
    import gymnasium
    rng = np.random.default_rng(1)
    for _ in range(30):
        state = TASKS["frozenlake"].sample(rng, 4)
        env = gymnasium.make("FrozenLake-v1", desc=state["grid"], is_slippery=False)
        env.reset(seed=0)
        pos, ended = TASKS["frozenlake"].start(state), False
        env.unwrapped.s = pos[0] * 4 + pos[1]
        for action in rng.choice(list(gen_data.MOVES), 30):
            new, fault = TASKS["frozenlake"].step(state, pos, action)
            if fault == "edge":
                continue  # gymnasium stays where it is; here it is a fault
            cell, reward, ended, _, _ = env.step("LDRU".index(action))
            assert divmod(int(cell), 4) == new
            assert (reward == 1) == TASKS["frozenlake"].done(state, new)
            assert ended == (fault == "hole" or TASKS["frozenlake"].done(state, new))
            if ended:
                break
            pos = new


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
    (["--tasks", "minibehaviour:4", "--train", "5000"], "distinct ones can be had"),
    (["--out", "."], "exists"),
    (["--out", ".", "--overwrite"], "not made by gen_data.py"),
])
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, words, message):
    words = words if "--out" in words else [*words, "--out", tmp_path / "data"]
    result = run(*words)
    assert result.returncode == 2 and message in result.stderr
    assert "Traceback" not in result.stderr and not list(tmp_path.iterdir())
