"""The puzzles: rules, plans, prompts, splits and files. Nothing here needs torch."""
import errno
import hashlib
import json
import os
import subprocess
import sys
from dataclasses import asdict
from itertools import combinations
from pathlib import Path

import networkx as nx
import numpy as np
import pytest
from conftest import row_of, stops
from PIL import Image

import gen_data
from gen_data import TASKS, FrozenLake, Maze, MiniBehaviour, check, listing, parse, solve
from tools import lenient

LAKE = FrozenLake(["SFH", "FFF", "HFG"])
# +--+--+--+
# |S  .  . |   one corridor: along row 0, down column 2, back along row 1, down column 0,
# +--+--+  +   along row 2
# | .  .  .|
# +  +--+--+
# | .  . G |
# +--+--+--+
MAZE = Maze([[7, 3, 9], [5, 3, 10], [6, 3, 11]], [0, 0], [2, 2])
OFFICE = MiniBehaviour(["A...", "..P.", "TTT.", "TTT."])
PUZZLES = {"frozenlake": LAKE, "maze": MAZE, "minibehaviour": OFFICE}


def boards(count=40, tasks=TASKS):
    """(task, level, puzzle) of solvable boards of every task and size."""
    rng = np.random.default_rng(0)
    for task in tasks:
        for level in TASKS[task].levels:
            found = 0
            while found < count:
                puzzle = TASKS[task].sample(rng, level)
                if solve(puzzle):
                    found += 1
                    yield task, level, puzzle


def run(*words):
    """The script as a user starts it."""
    words = [sys.executable, gen_data.__file__, *map(str, words)]
    return subprocess.run(words, capture_output=True, text=True)


def make(*words):
    """The script in this process."""
    gen_data.main(gen_data.parse_args([*map(str, words)]))


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
    ("frozenlake", "D U D U", "unfinished", 4, False),       # as long as the shortest plan
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
    puzzle, plan = PUZZLES[task], plan and plan.split()
    assert check(puzzle, plan) == (outcome, executed)
    if outcome != "no such action":  # a response cannot hold one: see test_parse
        answer = f"<answer>{','.join(plan or ())}</answer>"
        text = f"{listing(puzzle.cells())}\nRoute: so.\n{answer}"
        assert row_of(puzzle).judge(text) == {
            "plan": plan, "outcome": outcome, "optimal": optimal,
            "overrun": outcome == "success" and executed < len(plan), "map": asdict(puzzle),
            "map_right": True}


def test_a_plan_ends_at_the_first_violation_or_at_the_goal():
    assert gen_data.execute(LAKE, "R R D".split()) == ([(0, 0), (0, 1)], "hole")
    assert gen_data.execute(LAKE, "R D D R U".split())[0][-1] == (2, 2)
    assert gen_data.execute(OFFICE, ["D", "R", "PICK"])[0] == [
        (0, 0, 0), (1, 0, 0), (1, 1, 0), (1, 1, 1)]


@pytest.mark.parametrize("task", TASKS)
def test_a_puzzle_comes_back_through_json(task):
    """What stands in a row is the whole puzzle, and nothing of its class."""
    for _, _, puzzle in boards(3, [task]):
        state = asdict(puzzle)
        assert TASKS[task](**json.loads(json.dumps(state))) == puzzle
        assert json.loads(json.dumps(state)) == state
        assert TASKS[task].read(puzzle.cells()) == puzzle       # so do its cells
        assert not set(state) & {"levels", "rules", "legend", "actions", "questions"}
        assert set(puzzle.facts()) == set(puzzle.questions)


def test_plans_are_legal_and_no_shorter_one_exists():
    """Against an independent count: sets of positions reachable in exactly k steps."""
    assert [len(solve(puzzle)) for puzzle in (LAKE, MAZE, OFFICE)] == [4, 8, 4]
    for _, _, puzzle in boards(10):
        plan = solve(puzzle)
        assert check(puzzle, plan) == ("success", len(plan))
        reached = {puzzle.start_pos()}
        for _ in plan:
            assert not any(puzzle.done(pos) for pos in reached)
            steps = [puzzle.step(pos, action) for pos in reached for action in puzzle.actions]
            reached = {pos for pos, violation in steps if not violation}
        assert any(puzzle.done(pos) for pos in reached)


def maze_length(maze, level):
    graph = nx.grid_2d_graph(level, level)
    for (r, c), (below, right) in list(graph.edges):
        if maze.walls[r][c] & (2 if below > r else 8):
            graph.remove_edge((r, c), (below, right))
    return nx.shortest_path_length(graph, tuple(maze.start), tuple(maze.goal))


def grid_graph(grid, level, walls):
    """The cells without `walls`; {mark: its position}; {mark: the cells beside it}."""
    cells = {(r, c): mark for r, row in enumerate(grid) for c, mark in enumerate(row)}
    graph, beside = nx.grid_2d_graph(level, level), {}
    for pos, mark in cells.items():
        beside.setdefault(mark, set()).update(graph[pos])
    graph.remove_nodes_from([pos for pos, mark in cells.items() if mark in walls])
    return graph, {mark: pos for pos, mark in cells.items()}, beside


def lake_length(lake, level):
    graph, place, _ = grid_graph(lake.grid, level, "H")
    return nx.shortest_path_length(graph, place["S"], place["G"])


def office_length(office, level):
    """Beside the printer without entering it, from there over any floor to beside the table."""
    graph, place, beside = grid_graph(office.grid, level, "T")
    blocked = nx.restricted_view(graph, [place["P"]], [])
    before = nx.single_source_shortest_path_length(blocked, place["A"])
    lengths = []
    for pick in beside["P"] & before.keys():
        after = nx.single_source_shortest_path_length(graph, pick)
        lengths += [before[pick] + after[drop] + 2 for drop in beside["T"] & after.keys()]
    return min(lengths)


LENGTHS = {"frozenlake": lake_length, "maze": maze_length, "minibehaviour": office_length}


def test_lengths_agree_with_networkx():
    """Shortest paths on graphs built from the facts alone, by another library; no `step` in it."""
    for task, level, puzzle in boards(60, LENGTHS):
        assert len(solve(puzzle)) == LENGTHS[task](puzzle, level)


def test_frozenlake_agrees_with_gymnasium():
    """2,000 boards of every size, a random walk on each; leaving the board aside."""
    from gymnasium.envs.toy_text.frozen_lake import FrozenLakeEnv
    rng, seen = np.random.default_rng(1), set()
    for board in range(2000):
        level = 3 + board % 6
        lake = FrozenLake.sample(rng, level)
        env = FrozenLakeEnv(desc=lake.grid, is_slippery=False)
        env.reset(seed=0)
        pos = lake.start_pos()
        assert env.s == pos[0] * level + pos[1]
        for action in rng.choice(list(gen_data.MOVES), 30):
            new, violation = lake.step(pos, action)
            seen.add(violation)
            if violation == "edge":  # gymnasium stays where it is
                assert new == pos
                continue
            cell, reward, ended, _, _ = env.step("LDRU".index(action))
            assert divmod(int(cell), level) == new
            assert (reward == 1) == lake.done(new)
            assert ended == (violation == "hole" or lake.done(new))
            if ended:
                break
            pos = new
    assert seen == {None, "edge", "hole"}


def test_a_maze_is_walked_as_it_stands():
    """Where two sides of a border disagree, as in a map that was misread, the cell's own counts."""
    maze = Maze.read([["SR", "G"], [".", ".U"]])
    assert check(maze, ["R"]) == ("success", 1) and solve(maze) == ["R"]
    assert maze.step((0, 1), "L") == ((0, 1), "wall")
    assert maze.step((1, 1), "U") == ((0, 1), None) and maze.step((0, 1), "D")[1] == "wall"


def test_mazes_are_perfect():
    for _, level, maze in boards(10, ["maze"]):
        opened = sum(bin(15 - bits).count("1") for row in maze.walls for bits in row)
        assert opened == 2 * (level * level - 1)  # a spanning tree, seen from both sides


def test_every_maze_that_a_depth_first_walk_can_make_is_made():
    """Of the 192 spanning trees of 3x3 those in which no wall parts two branches, from some root.

    The ends are any two cells.
    """
    grid, walkable = nx.grid_2d_graph(3, 3), set()
    for edges in combinations(sorted(map(tuple, map(sorted, grid.edges))), 8):
        tree = nx.Graph(edges)
        if len(tree) == 9 and nx.is_connected(tree):
            closed = [edge for edge in grid.edges if not tree.has_edge(*edge)]
            for root in grid:
                paths = nx.single_source_shortest_path(tree, root)
                if all(a in paths[b] or b in paths[a] for a, b in closed):
                    walkable.add(frozenset(edges))
    rng, found, ends = np.random.default_rng(0), set(), set()
    for _ in range(4000):
        maze = Maze.sample(rng, 3)
        found.add(frozenset(
            (a, b) for a, b in map(sorted, grid.edges)
            if not maze.walls[a[0]][a[1]] & (2 if b[0] > a[0] else 8)))
        ends.add((*maze.start, *maze.goal))
    assert found == walkable and len(ends) == 9 * 8


# ---------------------------------------------------------------- reading responses

@pytest.mark.parametrize("task, text, plan", [
    ("frozenlake", "<answer>U,U,R</answer>", "U U R"),
    ("frozenlake", "<answer>UUR</answer>", "U U R"),
    ("frozenlake", "<answer> u, R\nD </answer>", "U R D"),
    ("frozenlake", "<answer>U</answer> no: <answer>D</answer>", "D"),  # the last complete one
    ("frozenlake", "<answer>U</answer> and <answer>", None),
    ("frozenlake", "<answer>U</answer> and <answer>D", None),  # a later one, and not complete
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
    ("Action plan: L,L\n<answer>no way</answer>", None),
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
    for _, level, puzzle in boards(5):
        row = row_of(puzzle, level=level)
        text = row.response()
        assert row.judge(text) == row.judge(text, lenient.parse) == {
            "plan": row.plan, "outcome": "success", "optimal": True, "overrun": False,
            "map": asdict(puzzle), "map_right": True}
        assert text.startswith(listing(puzzle.cells()) + "\nRoute: from ")
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
    ("frozenlake", "Map: 2x2\nrow 0: S F\nRoute: so.\nrow 1: F G"),  # the map ends at the route
    ("frozenlake", "The map: 2x2\nrow 0: S F\nrow 1: F G"),   # not in the form that is asked for
    ("maze", "Map: 2x2\nrow 0: SX .L\nrow 1: . G"), ("maze", "Map: 2x2\nrow 0: S .\nrow 1: . ."),
    ("minibehaviour", "Map: 2x2\nrow 0: A .\nrow 1: P ."),     # no table
])
def test_maps_that_cannot_be_read(task, text):
    assert gen_data.read_map(task, text) is None


def test_the_first_of_two_maps_is_read():
    text = "Map: 2x2\nrow 0: S F\nrow 1: F G\nNo:\nMap: 2x2\nrow 0: S H\nrow 1: F G"
    assert gen_data.read_map("frozenlake", text) == FrozenLake(["SF", "FG"])


def test_case_and_blanks_of_a_map_do_not_count():
    text = "```\nmap: 2X2 \nRow 0:  s  f\nrow 1: F\tG\n```"
    assert gen_data.read_map("frozenlake", text) == FrozenLake(["SF", "FG"])


def test_parts_begin_with_their_marks_and_not_with_words():
    pieces = ["My answer", ": Map", " ", "Rou", "te: answer", " <", "answer", ">U", " Route"]
    assert gen_data.part_of(pieces) == [0, 0, 0, 0, 1, 1, 2, 2, 2]


def test_a_maze_is_read_as_it_stands():
    """Two sides of the border between (0,0) and (0,1) disagree: only one cell is open to it."""
    maze = gen_data.read_map("maze", "Map: 2x2\nrow 0: SR .D\nrow 1: .R GUL")
    assert maze == Maze([[7, 13], [7, 10]], [0, 0], [1, 1])


@pytest.mark.parametrize("puzzle, name, text, right", [
    (LAKE, "size", "3x3", True),
    (LAKE, "size", "3 holes, 3 goals", False),
    (LAKE, "size", "3", False),
    (LAKE, "size", "3x4", False),
    (LAKE, "size", "The map is 3 X 3.", True),
    (LAKE, "size", "3x3 or 4x4", False),
    (FrozenLake(["SF", "FG"]), "size", "2 holes and 2 goals", False),
    (FrozenLake(["SF", "FG"]), "size", "(2,2)", False),
    (FrozenLake(["SF", "FG"]), "holes", "No idea", False),
    (FrozenLake(["SF", "FG"]), "holes", "The answer is **none**.", True),
    (LAKE, "player", "The start is at (0, 0).", True),
    (LAKE, "player", "(0,0) or (0,1)", False),
    (LAKE, "holes", "(2,0), (0,2)", True),
    (LAKE, "holes", "( 0 , 2 ) and (2,0), that is all", True),
    (LAKE, "holes", "(0,2)", False),
    (LAKE, "holes", "none", False),
    (LAKE, "holes", "", False),
    (FrozenLake(["SF", "FG"]), "holes", "There is no way to know.", False),
    (LAKE, "holes", "(99999,2), (2,0)", False),
    (FrozenLake(["SF", "FG"]), "holes", "None.", True),
    (FrozenLake(["SF", "FG"]), "holes", "", False),
    (FrozenLake(["SF", "FG"]), "holes", "(0,1)", False),
    (MAZE, "moves", "r", True),
    (MAZE, "moves", "R, D", False),
    (OFFICE, "moves", "r and d", True),
    (OFFICE, "moves", "R D PICK", False),
    (OFFICE, "near_printer", "(1,3) (1,1) (0,2)", True),
    (MAZE, "map",  # letters in any order
     "Map: 3x3\nrow 0: SR .RL .DL\nrow 1: .RD .LR .UL\nrow 2: .UR .LR GL", True),
    (MAZE, "map", "Map: 3x3\nrow 0: SR .RL .DL\nrow 1: .RD .LR .UL\nrow 2: .UR .LR G",
     False),
    (MAZE, "map", "Map: 3x3\nrow 0: SR .RL .DL\nrow 1: .RD .LR .UL", False),
    (LAKE, "map", "Map: 3x3\nrow 0: S F H\nrow 1: F F F\nrow 2: H F F", False),
])
def test_one_answer_is_read_back(puzzle, name, text, right):
    assert row_of(puzzle).score((name,), text) == {name: right}


def test_numbered_answers_are_read_back():
    row, names = row_of(LAKE), ("goal", "holes", "size")

    def right(text):
        scores = row.score(names, text)
        return [scores[name] for name in names]
    assert right("1. (2,2)\n2. (0,2),\n(2,0)\n3. 3x3") == [True, True, True]
    assert right("Sure!\n2. (2,0), (0,2)\n1. (2,1)") == [False, True, False]
    assert right("(2,2)") == [False, False, False]
    assert right("**1.** (2,2)\n**2.** (0,2), (2,0)\n3) 3x3") == [True, True, True]
    assert right("1. (0,0)\n2. none\n3. 3x3\n1. (2,2)") == [True, False, True]  # the last


@pytest.mark.parametrize("task", TASKS)
def test_a_map_without_its_line_breaks_is_wrong(task):
    """The answers to a puzzle are read: it does not do that they hold the same letters."""
    for _, _, puzzle in boards(3, [task]):
        row = row_of(puzzle)
        target = row.answers(("map",))
        for text in (target.replace("\n", " "), target.replace(" ", "")):
            assert row.score(("map",), text) == {"map": False}
        head, separator, last = row.answers().partition("\n2. ")
        scores = row.score(None, head.replace("\n", " ") + separator + last)
        assert not scores.pop("map") and all(scores.values())


def test_targets_score_full_marks():
    for _, _, puzzle in boards(5):
        row = row_of(puzzle)
        target = row.answers()
        assert all(row.score(None, target).values())
        for name in tuple(row.questions()):
            target = row.answers((name,))
            assert row.score((name,), target) == {name: True}


# ---------------------------------------------------------------- prompts and pictures

def test_listing_by_hand():
    listings = {task: listing(puzzle.cells()) for task, puzzle in PUZZLES.items()}
    assert listings["frozenlake"] == "Map: 3x3\nrow 0: S F H\nrow 1: F F F\nrow 2: H F G"
    assert listings["maze"] == "Map: 3x3\nrow 0: SR .LR .DL\nrow 1: .DR .LR .UL\nrow 2: .UR .LR GL"
    assert listings["minibehaviour"].splitlines()[2] == "row 1: . . P ."


def test_perception_by_hand():
    assert LAKE.facts() == {
        "size": "3x3", "player": "(0,0)", "goal": "(2,2)", "holes": "(0,2), (2,0)"}
    assert MAZE.facts() == {"size": "3x3", "player": "(0,0)", "goal": "(2,2)", "moves": "R"}
    assert OFFICE.facts() == {
        "size": "4x4", "agent": "(0,0)", "printer": "(1,2)",
        "table": "(2,0), (2,1), (2,2), (3,0), (3,1), (3,2)",
        "near_printer": "(0,2), (1,1), (1,3)", "near_table": "(1,0), (1,1), (2,3), (3,3)",
        "moves": "D, R"}
    lake = FrozenLake(["SHH", "HFF", "HFG"])
    assert lake.facts()["holes"] == "(0,1), (0,2), (1,0), (2,0)"
    office = MiniBehaviour(["...P", "TTTA", "TTT.", "...."]).facts()  # the agent beside both
    assert office["near_printer"] == "(0,2), (1,3)"
    assert office["near_table"] == "(0,0), (0,1), (0,2), (1,3), (2,3), (3,0), (3,1), (3,2)"
    assert office["moves"] == "D, PICK"


def test_several_questions_are_numbered():
    row, names = row_of(LAKE), ("goal", "holes")
    assert row.ask(names).endswith(
        "1. Where is the goal?\n2. Where are the holes?")
    assert row.answers(names) == "1. (2,2)\n2. (0,2), (2,0)"
    assert row.answers(("map",)) == listing(LAKE.cells())


def test_teacher_sees_the_state_and_the_student_does_not():
    for _, level, puzzle in boards(3):
        row = row_of(puzzle, level=level)
        student, teacher = row.student_prompt(), row.teacher_prompt("symbols")
        shown, plan = listing(puzzle.cells()), ",".join(row.plan)
        assert shown in teacher and shown not in student
        assert f"plan: {plan}\n" in row.teacher_prompt("symbols+plan") and "plan" not in teacher
        # Word for word the same rules and form; the student's prompt knows nothing of the state.
        assert teacher.replace(row.symbols(), row.picture_and_legend()) == student
        assert row.teacher_prompt("picture") == student


def test_pictures_show_the_cells():
    lake, cells = np.asarray(LAKE.render(32)), set()
    for r, c in ((0, 0), (0, 1), (0, 2), (2, 2)):  # S, F, H, G
        cells.add(lake[r * 32:r * 32 + 32, c * 32:c * 32 + 32].tobytes())
    assert lake.shape == (96, 96, 3) and len(cells) == 4
    maze = MAZE.render(32)
    assert maze.getpixel((16, 16)) == (255, 215, 0) and maze.getpixel((80, 80)) == (30, 90, 255)
    assert maze.getpixel((16, 32)) == (0, 0, 0) and maze.getpixel((48, 16)) == (255, 255, 255)
    office = OFFICE.render(32)
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
    picture = FrozenLake(VSP[digest].split()).render(64)
    pixels = np.asarray(picture).tobytes()
    assert hashlib.sha256(pixels).hexdigest().startswith(digest)


def test_files_hold_the_picture_resized_by_pillow(tmp_path):
    for _, _, puzzle in boards(2):
        for cell_size, size in ((64, 256), (32, 0), (48, 100)):
            data = {**row_of(puzzle).data, "file_name": "a.png"}
            gen_data.draw(data, tmp_path, cell_size, size)
            picture = puzzle.render(cell_size)
            wanted = picture.resize((size, size), Image.LANCZOS) if size else picture
            read = Image.open(tmp_path / "a.png")
            assert read.mode == "RGB" and np.array_equal(read, wanted)


# ---------------------------------------------------------------- splits and files

def test_keys_tell_puzzles_apart():
    row = row_of(MAZE)
    turned = gen_data.PuzzleRow({**row.data, "id": "x",
                                 "state": dict(reversed(row.data["state"].items()))})
    assert row.key() == turned.key()
    assert len(row.key()) == 16 and int(row.key(), 16)
    lake = row_of(FrozenLake(["A...", "..P.", "TTT.", "TTT."]), ["U"])       # no lake, but a key
    others = [lake, row_of(OFFICE), row_of(Maze(MAZE.walls, [0, 0], [1, 2])), row]
    assert len({other.key() for other in others}) == 4
    assert gen_data.digest({"a": 1, "b": 2}) == gen_data.digest({"b": 2, "a": 1})


def test_a_tenth_each_is_held_out_by_the_layout():
    """A maze's walls count and not its ends; a tenth each are val and test."""
    rng, splits = np.random.default_rng(0), []
    for _ in range(2000):
        maze = Maze.sample(rng, 5)
        splits.append(gen_data.split_of("maze", maze))
        turned = Maze(maze.walls, maze.goal, maze.start)
        assert gen_data.split_of("maze", turned) == splits[-1]
    for name, share in (("train", 0.8), ("val", 0.1), ("test", 0.1)):
        assert abs(splits.count(name) / 2000 - share) < 0.03


def test_tasks_and_sizes_are_read():
    assert gen_data.parse_tasks(["frozenlake:3-5", "maze:4", "minibehaviour"]) == {
        "frozenlake": (3, 4, 5), "maze": (4,), "minibehaviour": tuple(MiniBehaviour.levels)}


def test_difficulties_are_balanced_thirds():
    for task, level in (("frozenlake", 3), ("frozenlake", 8), ("maze", 4), ("minibehaviour", 5)):
        lengths = {name: [] for name in gen_data.DIFFICULTIES}
        for row in gen_data.sample_rows(task, level, "train", 61, seed=5):
            lengths[row.bucket].append(len(row.plan))
        easy, medium, hard = lengths.values()
        assert [len(easy), len(medium), len(hard)] == [21, 20, 20]
        assert max(easy) < min(medium) <= max(medium) < min(hard)
        # Thirds of what random puzzles are, as nearly as whole lengths allow.
        rng, found, borders = np.random.default_rng(9), [], gen_data.thirds(task, level)
        while len(found) < 600:
            plan = solve(TASKS[task].sample(rng, level))
            if plan is not None:
                found.append(gen_data.bucket(len(plan), borders))
        assert all(0.15 < found.count(name) / 600 < 0.55 for name in gen_data.DIFFICULTIES)


def every_small_office():
    """All puzzles of size 4: 6 places for the table, 90 for agent and printer."""
    for r, c in ((r, c) for r in range(3) for c in range(2)):
        grid = np.full((4, 4), ".")
        grid[r:r + 2, c:c + 3] = "T"
        floor = np.argwhere(grid == ".").tolist()
        for agent, printer in ((a, p) for a in floor for p in floor if a != p):
            filled = grid.copy()
            filled[tuple(agent)], filled[tuple(printer)] = "A", "P"
            yield MiniBehaviour(["".join(row) for row in filled])


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
    for office in every_small_office():
        plan = solve(office)
        if plan and gen_data.split_of("minibehaviour", office) == "train":
            counts[gen_data.bucket(len(plan), gen_data.thirds("minibehaviour", 4))] += 1
    assert number == 3 * min(counts.values())


def keys_of(folder, split):
    return {row.key() for row in gen_data.load_rows(folder, split)}


def test_excluded_puzzles_do_not_appear(tmp_path):
    words = ["--tasks", "minibehaviour:4", "--train", 60, "--val", 6, "--test", 0,
             "--cell_size", 8, "--image_size", 0]
    make(*words, "--out", tmp_path / "a")
    other = [*words, "--seed", 1]
    make(*other, "--exclude", tmp_path / "a", "--out", tmp_path / "b")
    make(*other, "--out", tmp_path / "c")
    a, b, c = (keys_of(tmp_path / name, "train") | keys_of(tmp_path / name, "val")
               for name in "abc")
    assert not a & b and a & c and len(b) == 66


def test_a_constant_of_a_task_is_one_place(monkeypatch):
    shares = []
    for share in (0, 0.4):
        monkeypatch.setattr(FrozenLake, "hole_prob", share)
        lakes = [FrozenLake.sample(np.random.default_rng(i), 8) for i in range(9)]
        shares.append("".join("".join(lake.grid) for lake in lakes).count("H") / (9 * 64))
    assert shares[0] == 0 and 0.25 < shares[1] < 0.5


def test_a_task_draws_the_same_whatever_other_tasks_there_are(monkeypatch):
    before = [row.data for row in gen_data.sample_rows("maze", 3, "train", 6, seed=4)]
    monkeypatch.setattr(gen_data, "TASKS", {"maze": Maze, "other": FrozenLake})
    assert [row.data for row in gen_data.sample_rows("maze", 3, "train", 6, seed=4)] == before


def test_every_seed_task_size_and_split_draws_numbers_of_its_own(monkeypatch):
    firsts, real = [], np.random.default_rng
    for task in TASKS:
        gen_data.example(task)                                       # has a fixed seed, once
    monkeypatch.setattr(gen_data, "thirds", lambda *_: (3, 6))       # so have the borders

    def default_rng(seed):
        firsts.append(real(seed).random())
        return real(seed)
    monkeypatch.setattr(np.random, "default_rng", default_rng)
    for seed in (0, 1):
        for task in TASKS:
            for level in TASKS[task].levels:
                for split in gen_data.SPLITS:
                    next(gen_data.sample_rows(task, level, split, 3, seed))
    levels = sum(len(kind.levels) for kind in TASKS.values())
    assert len(set(firsts)) == len(firsts) == 2 * 3 * levels


def test_imagefolder_of_datasets_reads_it(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    from datasets import load_dataset
    make("--tasks", "frozenlake:3", "maze:3", "minibehaviour:5", "--train", 4, "--val", 2,
         "--test", 2, "--out", tmp_path / "data")
    table = load_dataset("imagefolder", data_dir=str(tmp_path / "data"),
                         cache_dir=str(tmp_path / "cache"))
    assert {name: len(split) for name, split in table.items()} == {
        "train": 12, "validation": 6, "test": 6}
    own = {}
    for split in gen_data.SPLITS:
        own |= {row.id: row for row in gen_data.load_rows(tmp_path / "data", split)}
    for split in table.values():
        for row in split:
            wanted = own[row["id"]]
            for key in ("task", "level", "seed", "source", "bucket", "plan"):
                assert row[key] == wanted.data[key]
            state = {key: value for key, value in row["state"].items() if value is not None}
            assert state == wanted.data["state"]
            assert np.array_equal(row["image"], Image.open(wanted.path))


def test_same_seed_same_bytes_and_no_state_in_two_splits(tmp_path):
    size = ["--preset", "tiny", "--train", 30, "--val", 5, "--test", 5]
    files = {}
    for out, *more in (("a",), ("b",), ("c", "--seed", 1)):
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
                cell_size = gen_data.PRESETS["tiny"]["cell_size"]
                assert Image.open(row.path).size == row.puzzle.render(cell_size).size
                assert seen.setdefault(row.key(), split) == split
                layout = json.dumps([row.task, row.puzzle.layout()])  # held out as a whole
                assert seen.setdefault(layout, split) == split


def test_presets_name_what_can_be_made():
    for preset in gen_data.PRESETS.values():
        for task, levels in preset["tasks"].items():
            assert set(levels) <= set(TASKS[task].levels)
        assert gen_data.Path(preset["out"]).parent == gen_data.Path("data")


@pytest.mark.parametrize("words, message", [
    (["--preset", "huge"], "invalid choice: 'huge'"),
    (["--tasks", "chess"], "unknown task 'chess'"),
    (["--tasks", "minibehaviour:2"], "minibehaviour has board sizes 4 to 6"),
    (["--tasks", "maze:x"], "maze:x: maze has board sizes 3 to 6"),
    (["--tasks", "maze:5-3"], "maze:5-3: maze has board sizes 3 to 6"),
    (["--tasks", "minibehaviour:2-5"], "minibehaviour has board sizes 4 to 6"),
    (["--train", "-1"], "--train: got '-1', must be a whole number, at least 0"),
    (["--exclude", "nowhere"], "--exclude nowhere: no data folder"),
    (["--out", "."], "exists"),
])
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, capsys, words, message):
    words = words if "--out" in words else [*words, "--out", tmp_path / "data"]
    assert message in refused(capsys, *words)
    assert not list(tmp_path.iterdir())


TOY = ["--tasks", "frozenlake:3", "--train", 3, "--val", 0, "--test", 0]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(errno.ENOSPC, "full")])
def test_the_folder_is_complete_or_not_there(tmp_path, monkeypatch, error):
    """Stopped in the middle of the pictures and at the last moment."""
    def stop(*words, **options):
        raise error
    for where, name in ((gen_data, "draw"), (Path, "rename")):
        with monkeypatch.context() as patch:
            patch.setattr(where, name, stop)
            with pytest.raises(type(error) if isinstance(error, OSError) else error):
                make(*TOY, "--out", tmp_path / "new")
        assert not list(tmp_path.iterdir())


def test_nothing_is_ever_replaced(tmp_path, capsys, monkeypatch):
    """A folder, a file, a dangling link; what came meanwhile; what a killed run left stays too."""
    (tmp_path / "left").mkdir()
    (tmp_path / "left.partial").mkdir()
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("left", "file", "link"):
        assert f"{name} exists: remove it" in refused(capsys, *TOY, "--out", tmp_path / name)
    draw = gen_data.draw

    def draw_and_come(*words):
        draw(*words)
        (tmp_path / "a").mkdir(exist_ok=True)
        (tmp_path / "a/mine.txt").write_text("mine")
    monkeypatch.setattr(gen_data, "draw", draw_and_come)
    with pytest.raises(OSError):
        make(*TOY, "--out", tmp_path / "a")
    assert sorted(path.name for path in tmp_path.rglob("*")) == [
        "a", "file", "left", "left.partial", "link", "mine.txt"]


def test_data_are_for_everybody_that_may_read_the_folder(tmp_path):
    """mkdtemp's are their maker's alone."""
    make(*TOY, "--out", tmp_path / "a")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "a/train").stat().st_mode


def test_the_number_of_rows_does_not_depend_on_the_progress_bar(tmp_path):
    """It is switched off in notebooks and batch jobs."""
    done = subprocess.run([sys.executable, gen_data.__file__, *map(str, TOY), "--out", "data"],
                          capture_output=True, text=True, cwd=tmp_path,
                          env={**os.environ, "TQDM_DISABLE": "1"})
    assert done.stdout == "3 rows in data\n" and done.returncode == 0


def test_nulls_are_absent_at_every_level(tmp_path):
    """As `datasets` gives rows back: every field that another row has, as null."""
    make("--tasks", "frozenlake:3", "maze:3", "--train", 0, "--val", 0, "--test", 3,
         "--out", tmp_path / "data")
    file = tmp_path / "data/test/metadata.jsonl"
    rows = gen_data.load_rows(tmp_path / "data", "test")
    nulls = {"grid": None, "walls": None, "start": None, "goal": None}
    lines = [{"prompt": None, **row.data, "state": {**nulls, **row.data["state"]}} for row in rows]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    again = gen_data.load_rows(tmp_path / "data", "test")
    assert [row.data for row in again] == [row.data for row in rows]
    assert gen_data.digest_rows(again) == gen_data.digest_rows(rows)


def test_a_validation_split_may_be_called_so_or_be_missing(tmp_path, capsys):
    make(*TOY, "--val", 3, "--out", tmp_path / "a")
    ids = [row.id for row in gen_data.load_rows(tmp_path / "a", "val")]
    (tmp_path / "a/val").rename(tmp_path / "a/validation")
    assert gen_data.has_split(tmp_path / "a", "val")
    assert [row.id for row in gen_data.load_rows(tmp_path / "a", "val")] == ids
    (tmp_path / "a/validation").rename(tmp_path / "a/elsewhere")
    assert not gen_data.has_split(tmp_path / "a", "val")
    assert gen_data.has_split(tmp_path / "a", "train")
    line = stops(capsys, gen_data.load_rows, tmp_path / "a", "val")
    assert f"no {tmp_path}/a/val/metadata.jsonl: " in line
    assert gen_data.choose_rows([], None) == gen_data.choose_rows([], ["maze"]) == []


def test_a_shortest_plan_of_ones_own_is_taken(tmp_path):
    """Another one than the solver's, of the same length; another board than the generated ones."""
    row = {**row_of(FrozenLake(["SFF", "FFF", "FFG"])).data, "plan": list("DDRR"),
           "file_name": "a.png"}
    (tmp_path / "test").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "test/a.png")
    (tmp_path / "test/metadata.jsonl").write_text(json.dumps(row))
    assert gen_data.load_rows(tmp_path, "test")[0].plan == list("DDRR")


def test_data_are_made_only_where_the_preset_has_its_own(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = stops(capsys, gen_data.ensure, "data/typo", "tiny", 0)
    assert "no such folder" in message and not list(tmp_path.iterdir())
    monkeypatch.setitem(gen_data.PRESETS, "4b", {
        **gen_data.QWEN, "tasks": {"maze": (3,)}, "train": 3, "val": 0, "test": 0})
    assert gen_data.ensure(None, "4b", 7) == "data/qwen"
    assert gen_data.load_rows("data/qwen", "train")[0].data["seed"] == 7
    for data in (None, "data/qwen"):                                    # it is not made again
        with monkeypatch.context() as patch:
            patch.setattr(gen_data, "main", None)
            assert gen_data.ensure(data, "4b", 8) == "data/qwen"
    Path("data/qwen").rename("data/tiny")
    line = stops(capsys, gen_data.ensure, None, "tiny", 0)
    assert "data/tiny was not made for --preset tiny" in line and "--data data/tiny" in line
    assert gen_data.ensure("data/tiny", "tiny", 0) == "data/tiny"


def test_help_tells_every_default_and_nothing_internal(capsys):
    parser = gen_data.Parser(prog="x")
    parser.add_argument("--three", default=3, help="a number")
    parser.add_argument("--none", default=gen_data.argparse.SUPPRESS, help="a flag without one")
    with pytest.raises(SystemExit):
        parser.parse_args(["--help"])
    told = capsys.readouterr().out
    assert "a number (default: 3)" in told and "SUPPRESS" not in told


def test_bad_input_of_the_script():
    result = run("--tasks", "chess")
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert result.stderr.startswith("error: unknown task 'chess'") and not result.stdout


def test_a_file_is_the_old_or_the_new_one(tmp_path, monkeypatch):
    gen_data.write_text(tmp_path / "a.txt", "text")

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError):
        gen_data.write_text(tmp_path / "a.txt", "new")
    assert (tmp_path / "a.txt").read_text() == "text"


def test_what_run_script_catches(capsys):
    """A full memory or disk is one line; a fault in the code keeps its traceback."""
    def raising(error):
        def main(_):
            raise error
        return main
    for error in (RuntimeError("CUDA out of memory. Tried"),
                  RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")):
        assert "memory does not suffice" in stops(
            capsys, gen_data.run_script, lambda: None, raising(error))
    assert stops(capsys, gen_data.run_script, lambda: None, raising(
        OSError(errno.ENOSPC, "No space left", "a.png"))).endswith("No space left: 'a.png'")
    for error in (RuntimeError("shapes differ"), ValueError(), OSError(errno.EIO, "x")):
        with pytest.raises(type(error)):
            gen_data.run_script(lambda: None, raising(error))
    with pytest.raises(SystemExit) as stop:
        gen_data.run_script(lambda: None, raising(KeyboardInterrupt()))
    assert stop.value.code == 130


def test_an_answer_in_the_form_that_was_asked_for():
    """Wrong answers may have it; what has it not is counted beside them."""
    row = next(gen_data.sample_rows("frozenlake", 3, "train", 1, seed=0))
    names = list(row.questions())
    assert all(row.in_form(name, row.answers((name,))) for name in names)
    assert row.in_form("holes", "none") and row.in_form("size", "9x9")
    for name in names:
        assert not row.in_form(name, "No idea") and not row.in_form(name, "<think>3x3 (0,0)")
