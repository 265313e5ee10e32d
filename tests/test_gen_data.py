"""The puzzles: rules, plans, prompts, splits and files. Nothing here needs torch."""
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import networkx as nx
import numpy as np
import pytest
from conftest import stops
from PIL import Image

import gen_data
from gen_data import TASKS, check, judge, parse, solve
from tools import data_folder, lenient

LAKE = {"grid": ["SFH", "FFF", "HFG"]}
# +--+--+--+
# |S  .  . |   one corridor: along row 0, down column 2, back along row 1, down column 0,
# +--+--+  +   along row 2
# | .  .  .|
# +  +--+--+
# | .  . G |
# +--+--+--+
MAZE = {"walls": [[7, 3, 9], [5, 3, 10], [6, 3, 11]], "start": [0, 0], "goal": [2, 2]}
OFFICE = {"grid": ["A...", "..P.", "TTT.", "TTT."]}
STATES = {"frozenlake": LAKE, "maze": MAZE, "minibehaviour": OFFICE}


def row_of(task, state, level=3):
    return {"task": task, "level": level, "state": state, "plan": solve(task, state)}


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


def run(*words):
    """The script as a user starts it."""
    words = [sys.executable, gen_data.__file__, *map(str, words)]
    return subprocess.run(words, capture_output=True, text=True)


def make(*words):
    """The script in this process."""
    gen_data.main(gen_data.parse_args(["--workers", "1", *map(str, words)]))


def refused(capsys, *words):
    """The one line on stderr with which `make` ends, exit code 2."""
    return stops(capsys, make, *words)


def test_importing_gen_data_does_not_import_torch_or_common():
    code = "import sys, gen_data; sys.exit(bool({'torch', 'common'} & set(sys.modules)))"
    folder = Path(gen_data.__file__).parent
    assert subprocess.run([sys.executable, "-c", code], cwd=folder).returncode == 0


# ---------------------------------------------------------------- verdicts

@pytest.mark.parametrize("task, plan, outcome, executed, optimal", [
    ("frozenlake", "D R R D", "success", 4, True),
    ("frozenlake", "R D D R", "success", 4, True),
    ("frozenlake", "D U D R R D", "success", 6, False),
    ("frozenlake", "R D D R U U U U", "success", 4, True),   # what follows the goal is not executed
    ("frozenlake", "D U D R R D U U", "success", 6, False),
    ("frozenlake", "R R", "hole", 1, False),
    ("frozenlake", "D U U", "edge", 2, False),
    ("frozenlake", "D R", "unfinished", 2, False),
    ("frozenlake", "D PICK", "no such action", 1, False),
    ("frozenlake", None, "no answer", 0, False),
    ("maze", "R R D L L D R R", "success", 8, True),
    ("maze", "R R D L L D R R L", "success", 8, True),
    ("maze", "R L R R D L L D R R", "success", 10, False),
    ("maze", "D", "wall", 0, False),
    ("maze", "L", "edge", 0, False),
    ("maze", "DROP", "no such action", 0, False),
    ("maze", "R R D", "unfinished", 3, False),
    ("minibehaviour", "D R PICK DROP", "success", 4, True),
    ("minibehaviour", "D R PICK DROP PICK", "success", 4, True),
    ("minibehaviour", "R R PICK D DROP", "success", 5, False),  # free once it was picked up
    ("minibehaviour", "D R PICK D", "table", 3, False),
    ("minibehaviour", "R R D", "printer", 2, False),
    ("minibehaviour", "PICK", "pick", 0, False),                # not beside the printer
    ("minibehaviour", "D R PICK PICK", "pick", 3, False),       # already carrying
    ("minibehaviour", "D DROP", "drop", 1, False),              # nothing to put down
    ("minibehaviour", "R R PICK DROP", "drop", 3, False),       # not beside the table
    ("minibehaviour", "L", "edge", 0, False),
    ("minibehaviour", "D R PICK", "unfinished", 3, False),
])
def test_verdicts(task, plan, outcome, executed, optimal):
    row, plan = row_of(task, STATES[task]), plan and plan.split()
    assert check(task, row["state"], plan) == (outcome, executed)
    if outcome != "no such action":  # a response cannot hold one: see test_parse
        answer = f"<answer>{','.join(plan or ())}</answer>"
        assert judge(row, f"{gen_data.describe(task, row['state'])}\nRoute: so.\n{answer}") == {
            "plan": plan, "outcome": outcome, "optimal": optimal, "state": row["state"],
            "state_right": True}


def test_a_trace_ends_at_the_first_fault_or_at_the_goal():
    assert gen_data.trace("frozenlake", LAKE, "R R D".split()) == [(0, 0), (0, 1)]
    assert gen_data.trace("frozenlake", LAKE, "R D D R U".split())[-1] == (2, 2)
    assert gen_data.trace("minibehaviour", OFFICE, ["D", "R", "PICK"]) == [
        (0, 0, 0), (1, 0, 0), (1, 1, 0), (1, 1, 1)]


def test_plans_are_legal_and_no_shorter_one_exists():
    """Against an independent count: sets of positions reachable in exactly k steps."""
    assert {task: len(solve(task, state)) for task, state in STATES.items()} == {
        "frozenlake": 4, "maze": 8, "minibehaviour": 4}
    for task, _, state in boards(10):
        rules, plan = TASKS[task], solve(task, state)
        assert check(task, state, plan) == ("success", len(plan))
        reached = {rules.start(state)}
        for _ in plan:
            assert not any(rules.done(state, pos) for pos in reached)
            steps = [rules.step(state, pos, a) for pos in reached for a in rules.actions]
            reached = {pos for pos, fault in steps if not fault}
        assert any(rules.done(state, pos) for pos in reached)


def maze_length(state, level):
    graph = nx.grid_2d_graph(level, level)
    for (r, c), (below, right) in list(graph.edges):
        if state["walls"][r][c] & (2 if below > r else 8):
            graph.remove_edge((r, c), (below, right))
    return nx.shortest_path_length(graph, tuple(state["start"]), tuple(state["goal"]))


def grid_graph(state, level, walls):
    """The cells without `walls`; {mark: its position}; {mark: the cells beside it}."""
    cells = {(r, c): mark for r, row in enumerate(state["grid"]) for c, mark in enumerate(row)}
    graph, beside = nx.grid_2d_graph(level, level), {}
    for pos, mark in cells.items():
        beside.setdefault(mark, set()).update(graph[pos])
    graph.remove_nodes_from([pos for pos, mark in cells.items() if mark in walls])
    return graph, {mark: pos for pos, mark in cells.items()}, beside


def lake_length(state, level):
    graph, place, _ = grid_graph(state, level, "H")
    return nx.shortest_path_length(graph, place["S"], place["G"])


def office_length(state, level):
    """Beside the printer without entering it, from there over any floor to beside the table."""
    graph, place, beside = grid_graph(state, level, "T")
    blocked = nx.restricted_view(graph, [place["P"]], [])
    before = nx.single_source_shortest_path_length(blocked, place["A"])
    lengths = []
    for pick in beside["P"] & before.keys():
        after = nx.single_source_shortest_path_length(graph, pick)
        lengths += [before[pick] + after[drop] + 2 for drop in beside["T"] & after.keys()]
    return min(lengths)


def test_lengths_agree_with_networkx():
    """Shortest paths on graphs built from the facts alone, by another library; no `step` in it."""
    lengths = {"frozenlake": lake_length, "maze": maze_length, "minibehaviour": office_length}
    for task, level, state in boards(60):
        assert len(solve(task, state)) == lengths[task](state, level)


def test_frozenlake_agrees_with_gymnasium():
    """2,000 boards of every level, a random walk on each; leaving the board aside."""
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
            if fault == "edge":  # gymnasium stays where it is
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
            assert opened == 2 * (level * level - 1)  # a spanning tree, seen from both sides


# ---------------------------------------------------------------- reading responses

@pytest.mark.parametrize("task, text, plan", [
    ("frozenlake", "<answer>U,U,R</answer>", "U U R"),
    ("frozenlake", "<answer>UUR</answer>", "U U R"),
    ("frozenlake", "<answer> u, R\nD </answer>", "U R D"),
    ("frozenlake", "<answer>U</answer> no: <answer>D</answer>", "D"),  # the last complete one
    ("frozenlake", "<answer>U</answer> and <answer>D", "U"),
    ("frozenlake", "<answer>" + "D,U," * 25_000 + "D</answer>", "D U " * 25_000 + "D"),
    ("frozenlake", "<answer>U</answer>" + "x" * 100_000, "U"),
    ("frozenlake", "<answer>" * 12_500, None),
    ("frozenlake", "<answer>U</answer></answer>", None),
    ("frozenlake", "U,U,R", None), ("frozenlake", "", None), ("frozenlake", "<answer>U", None),
    ("frozenlake", "<answer></answer>", None), ("frozenlake", "</answer><answer>", None),
    ("frozenlake", "<ANSWER>U</ANSWER>", None), ("frozenlake", "<answer>up</answer>", None),
    ("frozenlake", "<answer>↓,→</answer>", None), ("frozenlake", "<answer>go U</answer>", None),
    ("frozenlake", "<answer>U then R</answer>", None), ("frozenlake", "U</answer>", None),
    ("frozenlake", "<answer>U,PICK</answer>", None),  # the task's own actions
    ("maze", "<answer>DROP</answer>", None),
    ("minibehaviour", "<answer>U,PICK,R,DROP</answer>", "U PICK R DROP"),
    ("minibehaviour", "<answer>upickrdrop</answer>", "U PICK R DROP"),
    ("minibehaviour", "<answer>PICK UP</answer>", None),
])
def test_parse(task, text, plan):
    assert parse(task, text) == (plan and plan.split())
    if plan:  # lenient takes all that strict takes
        assert lenient.parse(task, text) == plan.split()


@pytest.mark.parametrize("text, plan", [
    ("<answer>up, left</answer>", "U L"),
    ("<ANSWER>Up Left</ANSWER>", "U L"),
    ("<answer>↑, ↑ ←</answer>", "U U L"),
    ("<answer>↑↑←</answer>", "U U L"),
    ("<answer>➡️⬇️</answer>", "R D"),
    ("<answer>['U', 'R']</answer>", "U R"),
    ("<answer>right → down → R</answer>", "R D R"),   # between words an arrow separates
    ("<answer>R -> D</answer>", "R D"),
    ("up, left", "U L"), ("up\nleft\nleft\n", "U L L"), ("LLRU", "L L R U"), ("Up.", "U"),
    ("Two cells that way.\n\nleft, left", "L L"),
    ("**LLRU**", "L L R U"),
    ("**LLRU**\n\nThis avoids every hole.", "L L R U"),
    ("The best way is clearly **LLRU** here.", "L L R U"),
    ("**left, left**\nIt is short.", "L L"),
    ("Action plan: L,L", "L L"), ("**Action plan:** L, L\n\nBoth are ice.", "L L"),
    ("## Action plan\nL, L", "L L"), ("So, the final answer is: `L,L`.", "L L"),
    ("The shortest path is **L, L, R**.", "L L R"), ("Plan: U,U\nNo, wait.\nPlan: L", "L"),
    ("Answer: L", "L"),
    ("It is \\boxed{U, R}", "U R"), ("$\\boxed{\\text{UUR}}$", "U U R"),
    ("\\boxed{2} steps.\nAction plan: L,L", "L L"),
    ("**RR** or <answer>up</answer>", "U"),           # a tag counts before all others
    # no plan
    ("<answer>no way</answer>\nAction plan: L,L", None),
    ("(0,1) -> (0,2)", None), ("<answer>(0,1) -> (0,2)</answer>", None), ("0,1,2", None),
    ("Action plan: (0,1) -> (0,2)", None), ("\\boxed{(0,1)}", None), ("Path: 0 → 1 → 2", None),
    ("go up to the lake", None), ("Action plan: go up to the lake", None),
    ("Go up, then left, left.", None), ("The goal is up and to the left.", None),
    ("I go **right** and then **down**", None), ("Which way?\nRight.", None),
    ("Possible moves: U, D", None), ("The possible actions: U, D", None),
    ("A reference plan: U,D\nI cannot see it.", None),
    ("<answer>↑ (up), → (right)</answer>", None), ("<answer>U → </answer>", None),
    ("Route: from (0,0) D to (1,0).", None), ("Map: 2x2\nrow 0: SR .DL\nrow 1: . GU", None),
    ("<answer>PICK</answer>", None), ("", None), ("**", None), ("\\boxed{", None),
])
def test_lenient_parse(text, plan):
    assert lenient.parse("frozenlake", text) == (plan and plan.split())


def test_lenient_parse_knows_words_of_the_task():
    def plan(text):
        return lenient.parse("minibehaviour", f"<answer>{text}</answer>")
    assert plan("pick up, right, put down") == plan("PICK_UP, R, DROP") == ["PICK", "R", "DROP"]
    assert plan("pick, up") == ["PICK", "U"]


def test_reference_responses_are_read_back():
    for task, level, state in boards(5):
        row = row_of(task, state, level)
        text = gen_data.response(row)
        assert judge(row, text) == judge(row, text, lenient.parse) == {
            "plan": row["plan"], "outcome": "success", "optimal": True, "state": state,
            "state_right": True}
        assert text.startswith(gen_data.describe(task, state) + "\nRoute: from ")
        names = [gen_data.PARTS[i] for i in gen_data.part_of(list(text))]
        assert names == sorted(names, key=gen_data.PARTS.index)
        assert set(names) == set(gen_data.PARTS)


@pytest.mark.parametrize("task, text", [
    ("frozenlake", "no map"), ("frozenlake", "Map: 3x3"), ("frozenlake", "Map: 0x0"),
    ("frozenlake", "Map: 3x3\nrow 0: S F G\nrow 1: F F F"),    # a row short
    ("frozenlake", "Map: 2x3\nrow 0: S F G\nrow 1: F F F"),    # no square
    ("frozenlake", "Map: 2x2\nrow 0: S F\nrow 1: F F"),        # no goal
    ("frozenlake", "Map: 2x2\nrow 0: S S\nrow 1: F G"),        # two starts
    ("frozenlake", "Map: 2x2\nrow 0: S F\nrow 1: X G"),        # an unknown cell
    ("frozenlake", "Map: 2x2\nrow 0: S F\nrow 1: FF G"),       # a cell of two letters
    ("frozenlake", "Map: 2x2\nrow 1: F G\nrow 0: S F"),        # rows out of order
    ("maze", "Map: 2x2\nrow 0: SX .L\nrow 1: . G"), ("maze", "Map: 2x2\nrow 0: S .\nrow 1: . ."),
    ("minibehaviour", "Map: 2x2\nrow 0: A .\nrow 1: P ."),     # no table
])
def test_maps_that_cannot_be_read(task, text):
    assert gen_data.read_state(task, text) is None


def test_a_maze_is_read_as_it_stands():
    """Two sides of the border between (0,0) and (0,1) disagree: only one cell is open to it."""
    state = gen_data.read_state("maze", "Map: 2x2\nrow 0: SR .D\nrow 1: .R GUL")
    assert state == {"walls": [[7, 13], [7, 10]], "start": [0, 0], "goal": [1, 1]}


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
    ("maze", MAZE, "map",  # letters in any order
     "Map: 3x3\nrow 0: SR .RL .DL\nrow 1: .RD .LR .UL\nrow 2: .UR .LR GL", True),
    ("maze", MAZE, "map", "Map: 3x3\nrow 0: SR .RL .DL\nrow 1: .RD .LR .UL\nrow 2: .UR .LR G",
     False),
    ("maze", MAZE, "map", "Map: 3x3\nrow 0: SR .RL .DL\nrow 1: .RD .LR .UL", False),
    ("frozenlake", LAKE, "map", "map: 3 x 3\nRow 0: s f h\nrow 1: F F F\nrow 2: H F G", True),
    ("frozenlake", LAKE, "map", "Map: 3x3\nrow 0: S F H\nrow 1: F F F\nrow 2: H F F", False),
])
def test_one_answer_is_read_back(task, state, name, text, right):
    row = {"task": task, "state": state}
    assert gen_data.score_perception(row, (name,), text) == {name: right}


def test_numbered_answers_are_read_back():
    row, names = {"task": "frozenlake", "state": LAKE}, ("goal", "holes", "size")

    def right(text):
        scores = gen_data.score_perception(row, names, text)
        return [scores[name] for name in names]
    assert right("1) (2,2)\n2) (0,2),\n(2,0)\n3) 3x3") == [True, True, True]
    assert right("Sure!\n**2.** (2,0), (0,2)\n1. (2,1)") == [False, True, False]
    assert right("(2,2)") == [False, False, False]


def test_targets_score_full_marks():
    for task, level, state in boards(5):
        row = row_of(task, state, level)
        target = gen_data.perception_target(row)
        assert all(gen_data.score_perception(row, None, target).values())
        for name in gen_data.questions(row):
            target = gen_data.perception_target(row, (name,))
            assert gen_data.score_perception(row, (name,), target) == {name: True}


# ---------------------------------------------------------------- prompts and pictures

def test_listing_by_hand():
    listings = {task: gen_data.describe(task, state) for task, state in STATES.items()}
    assert listings["frozenlake"] == "Map: 3x3\nrow 0: S F H\nrow 1: F F F\nrow 2: H F G"
    assert listings["maze"] == "Map: 3x3\nrow 0: SR .LR .DL\nrow 1: .DR .LR .UL\nrow 2: .UR .LR GL"
    assert listings["minibehaviour"].splitlines()[2] == "row 1: . . P ."


def test_perception_by_hand():
    def answers(task):
        row = {"task": task, "state": STATES[task]}
        names = gen_data.questions(row)[1:]
        return {name: gen_data.perception_target(row, (name,)) for name in names}
    assert answers("frozenlake") == {
        "size": "3x3", "player": "(0,0)", "goal": "(2,2)", "holes": "(0,2), (2,0)"}
    assert answers("maze") == {"size": "3x3", "player": "(0,0)", "goal": "(2,2)", "moves": "R"}
    assert answers("minibehaviour") == {
        "size": "4x4", "agent": "(0,0)", "printer": "(1,2)",
        "table": "(2,0), (2,1), (2,2), (3,0), (3,1), (3,2)",
        "near_printer": "(0,2), (1,1), (1,3)", "near_table": "(1,0), (1,1), (2,3), (3,3)",
        "moves": "D, R"}


def test_several_questions_are_numbered():
    row, names = {"task": "frozenlake", "state": LAKE}, ("goal", "holes")
    assert gen_data.perception_prompt(row, names).endswith(
        "1. Where is the goal?\n2. Where are the holes?")
    assert gen_data.perception_target(row, names) == "1. (2,2)\n2. (0,2), (2,0)"
    assert gen_data.perception_target(row, ("map",)) == gen_data.describe("frozenlake", LAKE)


def test_teacher_sees_the_state_and_the_student_does_not():
    for task, level, state in boards(3):
        row = row_of(task, state, level)
        student, teacher = gen_data.student_prompt(row), gen_data.teacher_prompt(row, "state")
        listing, plan = gen_data.describe(task, state), ",".join(row["plan"])
        assert listing in teacher and listing not in student
        assert f"plan: {plan}\n" in gen_data.teacher_prompt(row) and "plan" not in teacher
        # Word for word the same rules and format; the student's prompt knows nothing of the state.
        assert teacher.replace(gen_data.symbols(row), gen_data.legend(row)) == student
        assert student == gen_data.student_prompt({"task": task})


def test_pictures_show_the_cells():
    lake, cells = np.asarray(TASKS["frozenlake"].render(LAKE, 32)), set()
    for r, c in ((0, 0), (0, 1), (0, 2), (2, 2)):  # S, F, H, G
        cells.add(lake[r * 32:r * 32 + 32, c * 32:c * 32 + 32].tobytes())
    assert lake.shape == (96, 96, 3) and len(cells) == 4
    maze = TASKS["maze"].render(MAZE, 32)
    assert maze.getpixel((16, 16)) == (255, 215, 0) and maze.getpixel((80, 80)) == (30, 90, 255)
    assert maze.getpixel((16, 32)) == (0, 0, 0) and maze.getpixel((48, 16)) == (255, 255, 255)
    office = TASKS["minibehaviour"].render(OFFICE, 32)
    assert office.getpixel((16, 16)) == (255, 0, 0)
    assert office.getpixel((16, 80)) == (210, 180, 140)
    assert office.getpixel((80, 48)) == (255, 255, 255)
    assert office.getpixel((112, 16)) == (0, 0, 0)


# The first 16 hex digits of the sha256 of the RGB bytes: a picture of each level of VSP.
VSP = {"8872391eba6e5194": "FHF HFG FSF",
       "c2e32d15262bfe61": "FFFF FSFH FGHF HFFH",
       "ec37498085a6936d": "FFFFF FHFFF FFFFH FFSFF GFFFF",
       "5f8c114086a41fd1": "FHFFFF FHHFFF FFFFFF FFGHFH FFFHFS FFFHFF",
       "4a747241ac1c9c08": "FFGSHFH FHFFFFF FFFFHFF FFFFHFF FFFFFFF HFFFFHF FHFFFFF",
       "724fd2618c49a072": "FHFFFFFH FFFHHFFF FFFFFFFF FFFSGFFF FHHHFFFF FFFHFFFF FFHFHHFH "
                           "FFFFFFHF"}


@pytest.mark.parametrize("digest", VSP)
def test_frozenlake_pictures_are_those_of_vsp_to_the_pixel(digest):
    picture = TASKS["frozenlake"].render({"grid": VSP[digest].split()}, 64)
    pixels = np.asarray(picture).tobytes()
    assert hashlib.sha256(pixels).hexdigest().startswith(digest)


def test_files_hold_the_picture_resized_by_pillow(tmp_path):
    for task, level, state in boards(2):
        for cell_size, size in ((64, 256), (32, 0), (48, 100)):
            row = {"task": task, "state": state, "file_name": "a.png"}
            data_folder.draw(row, tmp_path, cell_size, size)
            picture = TASKS[task].render(state, cell_size)
            assert picture.size == (cell_size * level,) * 2
            wanted = picture.resize((size, size), Image.LANCZOS) if size else picture
            read = Image.open(tmp_path / "a.png")
            assert read.mode == "RGB" and np.array_equal(read, wanted)


# ---------------------------------------------------------------- splits and files

def test_keys_tell_states_apart():
    row = {"task": "maze", "state": MAZE, "plan": ["R"]}
    turned = {"task": "maze", "state": dict(reversed(MAZE.items())), "id": "x"}
    assert gen_data.key_of(row) == gen_data.key_of(turned)
    assert len(gen_data.key_of(row)) == 16 and int(gen_data.key_of(row), 16)
    others = [{"task": "frozenlake", "state": OFFICE}, {"task": "minibehaviour", "state": OFFICE},
              {"task": "maze", "state": {**MAZE, "goal": [1, 2]}}, row]
    assert len({gen_data.key_of(other) for other in others}) == 4


def test_difficulties_are_balanced_thirds():
    for task, level in (("frozenlake", 3), ("frozenlake", 8), ("maze", 4), ("minibehaviour", 5)):
        lengths = {name: [] for name in gen_data.DIFFICULTIES}
        for row in gen_data.sample_rows(task, level, "train", 61, seed=5):
            lengths[row["bucket"]].append(len(row["plan"]))
        easy, medium, hard = lengths.values()
        assert [len(easy), len(medium), len(hard)] == [21, 20, 20]
        assert max(easy) < min(medium) <= max(medium) < min(hard)
        # Thirds of what random puzzles are, as nearly as whole lengths allow.
        rng, found, borders = np.random.default_rng(9), [], gen_data.thirds(task, level)
        while len(found) < 600:
            plan = solve(task, TASKS[task].sample(rng, level))
            if plan is not None:
                found.append(gen_data.bucket(len(plan), borders))
        assert all(0.15 < found.count(name) / 600 < 0.55 for name in gen_data.DIFFICULTIES)


def every_small_office():
    """All states of level 4: 6 places for the table, 90 for agent and printer."""
    for r, c in ((r, c) for r in range(3) for c in range(2)):
        grid = np.full((4, 4), ".")
        grid[r:r + 2, c:c + 3] = "T"
        floor = np.argwhere(grid == ".").tolist()
        for agent, printer in ((a, p) for a in floor for p in floor if a != p):
            filled = grid.copy()
            filled[tuple(agent)], filled[tuple(printer)] = "A", "P"
            yield {"grid": ["".join(row) for row in filled]}


def test_the_number_that_can_be_had_can_be_had(tmp_path, capsys, monkeypatch):
    """As many as exist in the split, counted independently; the named number is really there."""
    monkeypatch.setattr(gen_data, "PATIENCE", 10_000)
    words = ["--tasks", "minibehaviour:4", "--val", 0, "--test", 0, "--cell_size", 8,
             "--image_size", 0, "--out", tmp_path / "a"]
    message = refused(capsys, *words, "--train", 3000)
    assert "distinct ones can be had: lower --train" in message and not list(tmp_path.iterdir())
    number = int(message.split("only ")[1].split()[0])
    refused(capsys, *words, "--train", number + 3)
    make(*words, "--train", number)
    assert len(gen_data.load_rows(tmp_path / "a", "train")) == number
    counts = dict.fromkeys(gen_data.DIFFICULTIES, 0)
    for state in every_small_office():
        plan = solve("minibehaviour", state)
        if plan and gen_data.split_of("minibehaviour", state) == "train":
            counts[gen_data.bucket(len(plan), gen_data.thirds("minibehaviour", 4))] += 1
    assert number == 3 * min(counts.values())


def test_excluded_states_do_not_appear(tmp_path):
    words = ["--tasks", "minibehaviour:4", "--train", 60, "--val", 6, "--test", 0,
             "--cell_size", 8, "--image_size", 0]
    make(*words, "--out", tmp_path / "a")
    other = [*words, "--seed", 1]
    make(*other, "--exclude", tmp_path / "a", "--out", tmp_path / "b")
    make(*other, "--out", tmp_path / "c")
    a, b, c = ({gen_data.key_of(row) for row in gen_data.load_rows(tmp_path / name)}
               for name in "abc")
    assert not a & b and a & c and len(b) == 66


def test_the_share_of_holes_is_a_flag(tmp_path):
    words = ["--tasks", "frozenlake:8", "--train", 9, "--val", 0, "--test", 0, "--cell_size", 8,
             "--image_size", 0]
    shares = []
    for share in (0, 0.4):
        out = tmp_path / str(share)
        make(*words, "--hole_prob", share, "--out", out)
        assert json.loads((out / "args.json").read_text())["hole_prob"] == share
        text = "".join("".join(row["state"]["grid"]) for row in gen_data.load_rows(out, "train"))
        shares.append(text.count("H") / len(text))
    assert shares[0] == 0 and 0.25 < shares[1] < 0.5


def test_imagefolder_of_datasets_reads_it(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    from datasets import load_dataset
    make("--tasks", "frozenlake:3", "maze:3", "minibehaviour:5", "--train", 4, "--val", 2,
         "--test", 2, "--out", tmp_path / "data")
    table = load_dataset("imagefolder", data_dir=str(tmp_path / "data"),
                         cache_dir=str(tmp_path / "cache"))
    assert {name: len(split) for name, split in table.items()} == {
        "train": 12, "validation": 6, "test": 6}
    own = {row["id"]: row for row in gen_data.load_rows(tmp_path / "data")}
    for split in table.values():
        for row in split:
            wanted = own[row["id"]]
            for key in ("task", "level", "seed", "source", "bucket", "plan"):
                assert row[key] == wanted[key]
            state = {key: value for key, value in row["state"].items() if value is not None}
            assert state == wanted["state"]
            assert np.array_equal(row["image"], Image.open(wanted["path"]))


def test_show(tmp_path):
    words = [sys.executable, gen_data.__file__, "--show"]
    result = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0
    assert [path.name for path in tmp_path.iterdir()] == ["puzzles.png"]
    assert Image.open(tmp_path / "puzzles.png").size == (6 * 272, 6 * 280)
    for task in TASKS:
        for title in ("row", "student", "teacher, with", "teacher without", "response",
                      "perception", "target"):
            assert f"--- {task}: {title}" in result.stdout


def test_same_seed_same_bytes_and_no_state_in_two_splits(tmp_path):
    size = ["--preset", "tiny", "--train", 30, "--val", 5, "--test", 5]
    files = {}
    for out, *more in (("a", "--workers", 1), ("b", "--workers", 2), ("c", "--seed", 1)):
        folder = tmp_path / out
        assert run(*size, "--out", folder, *more).returncode == 0
        found = [path for path in folder.rglob("*.*") if path.name != "args.json"]
        files[out] = {path.relative_to(folder): path.read_bytes() for path in found}
    assert files["a"] == files["b"] and files["a"] != files["c"]
    assert not any(b"\r" in files["a"][path] for path in files["a"] if path.suffix == ".jsonl")
    seen = {}
    for out in "ac":  # across seeds too
        for split in gen_data.SPLITS:
            for row in gen_data.load_rows(tmp_path / out, split):
                assert Image.open(row["path"]).size == (32 * row["level"],) * 2
                assert seen.setdefault(gen_data.key_of(row), split) == split
                walls = json.dumps(row["state"].get("walls"))  # a layout is held out as a whole
                assert walls == "null" or seen.setdefault(walls, split) == split


def test_presets_name_what_can_be_made():
    assert list(gen_data.PRESETS) == ["tiny", "2b", "4b", "8b", "tiny-small"]
    for preset in gen_data.PRESETS.values():
        for task, levels in preset["tasks"].items():
            assert set(levels) <= set(TASKS[task].levels)


@pytest.mark.parametrize("words, message", [
    (["--preset", "huge"], "unknown preset 'huge'"),
    (["--tasks", "chess"], "unknown task 'chess'"),
    (["--tasks", "minibehaviour:2"], "minibehaviour has levels 4 to 6"),
    (["--tasks", "maze:x"], "cannot read the levels"),
    (["--hole_prob", "1.5"], "outside 0..1"),
    (["--tasks", "minibehaviour:2-5"], "minibehaviour has levels 4 to 6"),
    (["--train", "-1"], "--train -1: wanted at least 0"),
    (["--exclude", "nowhere"], "no nowhere/*/metadata.jsonl"),
    (["--out", "."], "exists"),
    (["--out", ".", "--overwrite"], "not made by gen_data.py"),
])
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, capsys, words, message):
    words = words if "--out" in words else [*words, "--out", tmp_path / "data"]
    assert message in refused(capsys, *words)
    assert not list(tmp_path.iterdir())


def test_bad_input_of_the_script():
    result = run("--tasks", "chess")
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert result.stderr.startswith("error: unknown task 'chess'") and not result.stdout
