"""Grid puzzles: the rules, the prompts and the data of MGSD. Knows the puzzles, nothing of models.

A puzzle is a *state* (plain facts, JSON-serialisable). From it follow the picture the student sees
(`render`), the symbols the teacher reads (`describe`), the shortest plan (`solve`) and the verdict
on any other plan (`check`). The three tasks share one interface, `TASKS`; everything that can be
written once for all of them stands below the classes.

    python gen_data.py                                  # the paper's range -> data/{train,val,test}
    python gen_data.py --preset tiny --overwrite        # what the bundled tiny backbone is trained on
    python gen_data.py --tasks frozenlake:3-5 maze:4 --train 500 --out data/mine
    python gen_data.py --show                           # look: puzzles.png, and the prompts of each task
    python gen_data.py --from_vsp DIR --out data/vsp    # a public benchmark as the split "test", same rows
    python gen_data.py --from_visualplanning FILE --task maze --out data/vp_maze

Rows go to data/<split>/metadata.jsonl beside their PNGs (the "imagefolder" layout of `datasets`):
    {"file_name", "id", "task", "level", "seed", "source", "bucket", "state", "plan"}
`bucket` is the difficulty (easy, medium, hard), by the length of the shortest plan. A row holds facts only. Prompts are functions of a row, so changing one needs no new data.
Coordinates are (row, column), counted from 0 at the top left.
"""
import argparse
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import struct
import subprocess
import sys
import zlib
from collections import Counter, deque
from functools import lru_cache, partial
from itertools import combinations_with_replacement, count as count_up, islice, product
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

MOVES = {"U": (-1, 0), "D": (1, 0), "L": (0, -1), "R": (0, 1)}
ACTIONS = (*MOVES, "PICK", "DROP")
HOLE_PROB = 0.18  # the share of holes in VSP's FrozenLake maps
SPLITS = ("train", "val", "test")
MAX_PIXELS = 4096  # a picture's side; larger ones are refused before they are decoded
DIFFICULTIES = ("easy", "medium", "hard")
PATIENCE = 50_000  # random puzzles without a new one of a wanted difficulty, before a request counts as impossible

# What each preset trains on. `cell_size` 32 makes one cell exactly one image token of the tiny
# backbone (patch 16, merge 2); the big ones get the paper's 256x256 pictures.
PRESETS = {
    "tiny": dict(tasks={"frozenlake": (3, 4), "maze": (3, 4), "minibehaviour": (5,)},
                 cell_size=32, image_size=0, train=2000, val=40, test=100),
    "4b": dict(tasks={"frozenlake": (3, 4, 5, 6, 7, 8), "maze": (3, 4, 5, 6), "minibehaviour": (5, 6)},
               cell_size=64, image_size=256, train=1000, val=40, test=100),
}
PRESETS["8b"] = PRESETS["4b"]


def fail(message):
    """Bad input: one line on stderr, exit code 2."""
    tqdm.write(f"error: {message}", file=sys.stderr)  # on a line of its own, also below a progress bar
    raise SystemExit(2)


# ---------------------------------------------------------------- the three tasks
# sample(rng, level) -> state | start(state) -> pos | step(state, pos, action) -> (pos, fault or None)
# done(state, pos) -> bool | render(state, cell_size) -> Image | describe(state) -> str
# facts(state) -> {question: answer}, for the questions of `questions`

class FrozenLake:
    """Cross the ice from S to G without falling into a hole. state: {"grid": ["SFH", "FFF", "HFG"]}

    The rules are those of gymnasium's FrozenLake-v1 with is_slippery=False, except that leaving the
    board is the fault "edge" (gymnasium stays where it is).
    """
    levels = range(3, 9)
    rules = ("You cross a frozen lake. S is the start, G is the goal, F is frozen ice, H is a hole.\n"
             "U, D, L and R move one cell up, down, left and right. Never enter a hole or leave the map.\n"
             "Reach the goal in as few actions as possible.")
    legend = "S is the elf, G is the present, H is a blue hole, and F is plain ice."
    questions = {"size": "How many rows and columns does the map have?",
                 "player": "Where is the start?",
                 "goal": "Where is the goal?",
                 "holes": "Where are the holes?"}

    @staticmethod
    def sample(rng, level, hole_prob=HOLE_PROB):
        cells = np.where(rng.random(level * level) < hole_prob, "H", "F")
        cells[rng.choice(level * level, 2, replace=False)] = ["S", "G"]
        return {"grid": ["".join(row) for row in cells.reshape(level, level)]}

    @staticmethod
    def start(state):
        return find(state["grid"], "S")[0]

    @staticmethod
    def step(state, pos, action):
        if action not in MOVES:
            return pos, action.lower()
        new = neighbour(pos, action)
        cell = at(state["grid"], new)
        return (pos, "edge") if cell is None else (new, "hole" if cell == "H" else None)

    @staticmethod
    def done(state, pos):
        return at(state["grid"], pos) == "G"

    @staticmethod
    def render(state, cell_size):
        return assemble([[lake_tile(cell, cell_size) for cell in row] for row in state["grid"]])

    @staticmethod
    def describe(state):
        return listing(state["grid"])

    @staticmethod
    def facts(state):
        grid = state["grid"]
        return {"size": f"{len(grid)}x{len(grid)}", "player": places(find(grid, "S")),
                "goal": places(find(grid, "G")), "holes": places(find(grid, "H"))}


class Maze:
    """Walk from the start to the goal of a perfect maze (one path between any two cells).

    state: {"walls": [[bits]], "start": [r, c], "goal": [r, c]}, wall bits N=1 S=2 W=4 E=8.
    """
    levels = range(3, 7)
    bits = {"U": 1, "D": 2, "L": 4, "R": 8}
    rules = ("You walk through a maze. Every cell is written as a mark and the letters of its open sides: "
             "S is the start, G is the goal, . is any other cell.\n"
             "U, D, L and R move one cell up, down, left and right. Never cross a wall or leave the map.\n"
             "Reach the goal in as few actions as possible.")
    legend = ("S is the yellow disc and G is the blue disc. White is floor, black is wall. "
              "A thin grey line between two cells is an open side.")
    questions = {"size": "How many rows and columns does the map have?",
                 "player": "Where is the start?",
                 "goal": "Where is the goal?",
                 "moves": "Which moves are possible from the start?"}

    @staticmethod
    def sample(rng, level):
        walls = [[15] * level for _ in range(level)]
        root, start, goal = (divmod(int(i), level) for i in (rng.integers(level * level), *rng.choice(level * level, 2, replace=False)))
        path, seen = [root], {root}
        for draw in rng.random(level * level - 1):  # a depth-first walk that opens a wall whenever it enters a new cell
            while True:
                r, c = path[-1]
                around = [(a, neighbour((r, c), a)) for a in MOVES]
                if free := [(a, new) for a, new in around if new not in seen and at(walls, new) is not None]:
                    break
                path.pop()
            action, new = free[int(draw * len(free))]
            walls[r][c] -= Maze.bits[action]
            walls[new[0]][new[1]] -= Maze.bits[{"U": "D", "D": "U", "L": "R", "R": "L"}[action]]
            seen.add(new)
            path.append(new)
        return {"walls": walls, "start": list(start), "goal": list(goal)}

    @staticmethod
    def start(state):
        return tuple(state["start"])

    @staticmethod
    def step(state, pos, action):
        if action not in MOVES:
            return pos, action.lower()
        new = neighbour(pos, action)
        if at(state["walls"], new) is None:
            return pos, "edge"
        return (pos, "wall") if state["walls"][pos[0]][pos[1]] & Maze.bits[action] else (new, None)

    @staticmethod
    def done(state, pos):
        return pos == tuple(state["goal"])

    @staticmethod
    def open_sides(bits):
        return "".join(action for action in MOVES if not bits & Maze.bits[action])

    @staticmethod
    def render(state, cell_size):
        return assemble([[maze_tile(Maze.open_sides(bits), Maze.mark(state, (r, c)), cell_size)
                          for c, bits in enumerate(row)] for r, row in enumerate(state["walls"])])

    @staticmethod
    def mark(state, pos):
        return {tuple(state["start"]): "S", tuple(state["goal"]): "G"}.get(pos, ".")

    @staticmethod
    def describe(state):
        return listing([[Maze.mark(state, (r, c)) + Maze.open_sides(bits) for c, bits in enumerate(row)]
                        for r, row in enumerate(state["walls"])])

    @staticmethod
    def facts(state):
        n, (r, c) = len(state["walls"]), state["start"]
        return {"size": f"{n}x{n}", "player": places([(r, c)]), "goal": places([tuple(state["goal"])]),
                "moves": ", ".join(Maze.open_sides(state["walls"][r][c]))}


class MiniBehaviour:
    """Fetch the printer and put it on the table. state: {"grid": ["A...", "..P.", "TTT.", "TTT."]}

    A position is (row, column, phase): phase 0 before PICK, 1 carrying, 2 after DROP. The printer
    blocks its cell until it was picked up and not after.
    """
    levels = range(4, 7)
    rules = ("You are the agent A. Bring the printer P to the table T. A dot is free floor.\n"
             "U, D, L and R move one cell up, down, left and right. Never enter the table or the printer "
             "or leave the map.\n"
             "PICK takes the printer from a neighbouring cell, which is free afterwards. "
             "DROP puts it on the table from a cell beside the table.\n"
             "Finish in as few actions as possible.")
    legend = "A is the red triangle, P is the white printer, T is tan, and free floor is black."
    questions = {"size": "How many rows and columns does the map have?",
                 "agent": "Where is the agent?",
                 "printer": "Where is the printer?",
                 "table": "Which cells are the table?",
                 "near_printer": "Which free cells, the agent's included, are beside the printer?",
                 "near_table": "Which free cells, the agent's included, are beside the table?",
                 "moves": "Which actions are possible at the start?"}

    @staticmethod
    def sample(rng, level):
        grid = np.full((level, level), ".")
        r, c = rng.integers(level - 1), rng.integers(level - 2)
        grid[r:r + 2, c:c + 3] = "T"
        floor = np.argwhere(grid == ".")
        for mark, i in zip("AP", rng.choice(len(floor), 2, replace=False)):
            grid[tuple(floor[i])] = mark
        return {"grid": ["".join(row) for row in grid]}

    @staticmethod
    def start(state):
        return (*find(state["grid"], "A")[0], 0)

    @staticmethod
    def step(state, pos, action):
        r, c, phase = pos
        if action in ("PICK", "DROP"):
            when, thing = (0, "P") if action == "PICK" else (1, "T")
            possible = phase == when and any(at(state["grid"], neighbour(pos, a)) == thing for a in MOVES)
            return ((r, c, phase + 1), None) if possible else (pos, action.lower())
        new = neighbour(pos, action)
        cell = at(state["grid"], new)
        fault = {None: "edge", "T": "table", "P": "printer" if phase == 0 else None}.get(cell)
        return (pos, fault) if fault else ((*new, phase), None)

    @staticmethod
    def done(state, pos):
        return pos[2] == 2

    @staticmethod
    def render(state, cell_size):
        return assemble([[office_tile(cell, cell_size) for cell in row] for row in state["grid"]])

    @staticmethod
    def describe(state):
        return listing(state["grid"])

    @staticmethod
    def facts(state):
        grid = state["grid"]
        start, n = MiniBehaviour.start(state), len(grid)

        def beside(marks):
            return places([(r, c) for r in range(n) for c in range(n) if grid[r][c] in ".A" and
                           any(at(grid, neighbour((r, c), a)) == marks for a in MOVES)])
        legal = [a for a in ACTIONS if MiniBehaviour.step(state, start, a)[1] is None]
        return {"size": f"{n}x{n}", "agent": places([start[:2]]), "printer": places(find(grid, "P")),
                "table": places(find(grid, "T")), "near_printer": beside("P"), "near_table": beside("T"),
                "moves": ", ".join(legal) or "none"}


TASKS = {"frozenlake": FrozenLake, "maze": Maze, "minibehaviour": MiniBehaviour}


# ---------------------------------------------------------------- helpers of the tasks

def neighbour(pos, action):
    """The position one move away; it may be off the board."""
    return pos[0] + MOVES[action][0], pos[1] + MOVES[action][1]


def at(grid, pos):
    """The cell at `pos`, or None off the board."""
    return grid[pos[0]][pos[1]] if 0 <= pos[0] < len(grid) and 0 <= pos[1] < len(grid[0]) else None


def find(grid, mark):
    """All positions of `mark`, row by row."""
    return [(r, c) for r, row in enumerate(grid) for c, cell in enumerate(row) if cell == mark]


def places(cells):
    """[(0, 1), (2, 2)] -> "(0,1), (2,2)"; "none" for no cell."""
    return ", ".join(f"({r},{c})" for r, c in cells) or "none"


def listing(grid):
    """The dense, row-by-row text of a board: what the teacher reads and what a response states first."""
    rows = [f"row {r}: " + " ".join(row) for r, row in enumerate(grid)]
    return "\n".join([f"Map: {len(grid)}x{len(grid[0])}", *rows])


def trace(task, state, plan):
    """The positions a plan visits, the start first; up to its first fault, or the end of the episode."""
    rules = TASKS[task]
    path = [rules.start(state)]
    for action in plan:
        pos, fault = rules.step(state, path[-1], action)
        if fault or rules.done(state, path[-1]):
            break
        path.append(pos)
    return path


# ---------------------------------------------------------------- pictures

def assemble(tiles):
    """A picture from rows of equally large tiles, uint8 [cell, cell, 3] each."""
    return Image.fromarray(np.concatenate([np.concatenate(row, 1) for row in tiles]))


@lru_cache
def lake_tile(cell, size):
    """A cell as VSP draws it, pixel by pixel: gymnasium's art, scaled with nearest-neighbour: ice, then hole, goal or
    stool, a one-pixel outline, then the elf on the start. Blended in pygame's integer arithmetic: so VSP's own pictures come out."""
    import gymnasium
    pixels = np.zeros((size, size, 3), int)
    for name in ("ice", *{"H": ["hole"], "G": ["goal"], "S": ["stool"]}.get(cell, []), "outline", *["elf_down"] * (cell == "S")):
        if name == "outline":
            pixels[[0, -1]] = pixels[:, [0, -1]] = 180, 200, 230
            continue
        art = Image.open(Path(gymnasium.__file__).parent / f"envs/toy_text/img/{name}.png").convert("RGBA")
        art = np.asarray(art.resize((size, size), Image.NEAREST)).astype(int)
        colour, alpha = art[..., :3], art[..., 3:]
        pixels += ((colour - pixels) * alpha + colour) >> 8
    return pixels.astype(np.uint8)


@lru_cache
def maze_tile(open_sides, mark, size):
    """A white corridor on black, a thin grey line where two cells join, the yellow player or the blue goal."""
    image = Image.new("RGB", (size, size))
    draw = ImageDraw.Draw(image)
    half, end = max(2, size // 8) // 2, size - 1  # px: half a wall lies on either side of a border
    for side in ("", *open_sides):  # the cell inside its walls; then on to the border where a side is open
        draw.rectangle([half * (side != "L"), half * (side != "U"), end - half * (side != "R"), end - half * (side != "D")], "white")
    if "L" in open_sides:
        draw.line([0, half, 0, end - half], (200, 200, 200))
    if "U" in open_sides:
        draw.line([half, 0, end - half, 0], (200, 200, 200))
    if mark != ".":
        draw.ellipse([size // 4] * 2 + [end - size // 4] * 2, {"S": (255, 215, 0), "G": (30, 90, 255)}[mark])
    return np.asarray(image)


@lru_cache
def office_tile(cell, size):
    """Black floor with a dark grey grid, the tan table, the red agent, the white printer."""
    image = Image.new("RGB", (size, size), (210, 180, 140) if cell == "T" else "black")
    draw, s = ImageDraw.Draw(image), size
    draw.rectangle([0, 0, s - 1, s - 1], outline=(70, 70, 70))
    if cell == "A":
        draw.polygon([(s * 0.2, s * 0.2), (s * 0.8, s * 0.5), (s * 0.2, s * 0.8)], "red")
    if cell == "P":  # paper above, body below, a slot
        draw.rectangle([s * 0.34, s * 0.2, s * 0.66, s * 0.45], "white")
        draw.rectangle([s * 0.2, s * 0.42, s * 0.8, s * 0.78], "white")
        draw.line([s * 0.3, s * 0.62, s * 0.7, s * 0.62], "black", max(1, s // 16))
    return np.asarray(image)


# ---------------------------------------------------------------- solver, judge, reader: once for all tasks

def solve(task, state):
    """The first shortest plan in the order of ACTIONS (breadth-first over `step`), or None if there is none."""
    rules = TASKS[task]
    actions = ACTIONS if task == "minibehaviour" else tuple(MOVES)
    start = rules.start(state)
    came_from, queue = {start: None}, deque([start])
    while queue:
        pos = queue.popleft()
        if rules.done(state, pos):
            plan = []
            while came_from[pos]:
                pos, action = came_from[pos]
                plan.append(action)
            return plan[::-1]
        for action in actions:
            new, fault = rules.step(state, pos, action)
            if fault is None and new not in came_from:
                came_from[new] = (pos, action)
                queue.append(new)
    return None


def check(task, state, plan):
    """Execute a plan: "success", the name of the first fault, or "unfinished".

    An episode ends when the goal is reached, as in gymnasium; actions after that are not executed.
    `plan` None (no answer could be read) gives "no answer".
    """
    if plan is None:
        return "no answer"
    rules = TASKS[task]
    pos = rules.start(state)
    for action in plan:
        pos, fault = rules.step(state, pos, action)
        if fault:
            return fault
        if rules.done(state, pos):
            return "success"
    return "unfinished"


def parse(text):
    """The actions of the last complete <answer>…</answer>; None if there is none or it holds anything else.

    Actions are separated by commas, blanks or nothing ("UUR"), in either case.
    """
    end = text.rfind("</answer>")
    begin = text.rfind("<answer>", 0, end) if end >= 0 else -1
    if begin < 0:
        return None
    body = re.sub(r"[,\s]+", " ", text[begin + len("<answer>"):end].upper())
    plan = re.findall(r"PICK|DROP|[UDLR]", body)
    return plan if plan and "".join(plan) == body.replace(" ", "") else None


def read_state(task, text):
    """The state that the first map in a text describes (see `listing`), or None if it cannot be read.

    It is read as it stands: a maze whose two sides of a border disagree keeps the disagreement. It has
    exactly one start and one goal (or agent and printer, and a table), else there is no world to plan in.
    """
    head = re.search(r"map\s*:\s*([0-9]{1,2})\s*x\s*([0-9]{1,2})\b", text, re.IGNORECASE)
    if not head or head[1] != head[2]:
        return None
    n = int(head[1])
    rows = re.findall(r"^row ([0-9]{1,2}): ([^\n]{1,200})$", text[head.end():].split("Route")[0], re.IGNORECASE | re.MULTILINE)[:n]
    grid = [cells.upper().split() for _, cells in rows]
    if [int(r) for r, _ in rows] != list(range(n)) or any(len(cells) != n for cells in grid):
        return None
    marks = [cell[0] for cells in grid for cell in cells]
    one, others = {"frozenlake": ("SG", "FH"), "maze": ("SG", "."), "minibehaviour": ("AP", "T.")}[task]
    if any(marks.count(mark) != 1 for mark in one) or not set(marks) <= set(one + others):
        return None
    if task == "maze":
        if not all(set(cell[1:]) <= set(MOVES) for cells in grid for cell in cells):
            return None
        walls = [[15 - sum(Maze.bits[a] for a in set(cell[1:])) for cell in cells] for cells in grid]
        start, goal = (list(divmod(marks.index(mark), n)) for mark in "SG")
        return {"walls": walls, "start": start, "goal": goal}
    if any(len(cell) != 1 for cells in grid for cell in cells) or task == "minibehaviour" and "T" not in marks:
        return None
    return {"grid": ["".join(cells) for cells in grid]}


def read_fact(name, text):
    """What a free-form answer to the question `name` says, in a form that can be compared; None: unreadable.

    size -> (rows, columns); moves -> a set of actions; anything else -> a set of positions. Sets may be
    in any order, everything that is mentioned counts, and only the word none (or no) stands for the empty set.
    """
    if name == "size":
        numbers = re.findall(r"[0-9]{1,4}", text)
        return tuple(map(int, numbers)) if len(numbers) == 2 else None
    if name == "moves":
        found = re.findall(r"\b(PICK|DROP|UP|DOWN|LEFT|RIGHT|[UDLR])\b", text.upper())
        found = {word if word in ACTIONS else word[0] for word in found}
    else:
        pairs = re.findall(r"[(\[] ?([0-9]{1,4}) ?, ?([0-9]{1,4}) ?[)\]]|\brow ([0-9]{1,4}),? (?:and )?col(?:umn)? ([0-9]{1,4})\b", text, re.IGNORECASE)
        found = {(int(a or c), int(b or d)) for a, b, c, d in pairs}
    return found or (set() if re.search(r"\b(none|no)\b", text, re.IGNORECASE) else None)


def score_perception(row, names, text):
    """Read a free-form answer to `perception_prompt(row, names)` back: {question: is it exactly right?}

    Several questions are told apart by their numbers ("1." or "1)" at the beginning of a line; the last
    of equal numbers counts). What cannot be read is wrong; no text raises.
    """
    names = names or questions(row["task"])
    answers = {1: text}
    if len(names) > 1:
        pieces = re.split(r"^[ *]{0,4}([0-9]{1,2})[.):]", text, flags=re.MULTILINE)
        answers = {int(number): piece for number, piece in zip(pieces[1::2], pieces[2::2])}
    right = {}
    for i, name in enumerate(names, 1):
        answer, target = answers.get(i, ""), perception_target(row, (name,))
        read = partial(read_state, row["task"]) if name == "map" else partial(read_fact, name)
        right[name] = read(answer) is not None and read(answer) == read(target)
    return right


# ---------------------------------------------------------------- prompts and targets: functions of a row

ASK_MAP = "Write down only the map: its size, then every row with its cells. The form, shown on another map:\n"
ASK_PLAN = ("Write down the map: its size, then every row with its cells. Then write one sentence that "
            "begins with Route: and names the start and, action by action, the position it leads to, as "
            "(row,column) counted from 0 at the top left. Then write the actions, separated by commas, inside "
            "<answer></answer>. "
            "The form, shown on another map:\n")
ASK_FACTS = ("Answer briefly: a size as 3x3, positions as (row,column) counted from 0 at the top left, "
             "actions by name, or none.")


@lru_cache
def example(task):
    """The row that every prompt of a task shows as its example: of the smallest level, in no split."""
    rng, rows = np.random.default_rng(0), []
    while len(rows) < 50:
        state = TASKS[task].sample(rng, TASKS[task].levels[0])
        if plan := solve(task, state):
            rows.append({"task": task, "state": state, "plan": plan})
    return min(rows, key=lambda row: abs(len(row["plan"]) - 3))


def ask_map(task):
    return ASK_MAP + TASKS[task].describe(example(task)["state"])


def ask_plan(task):
    return ASK_PLAN + response(example(task))


def picture(row):
    """What stands beside the picture: what the things in it are."""
    return f"The picture shows the map. {TASKS[row['task']].legend}"


def symbols(row):
    return f"The map in symbols:\n{TASKS[row['task']].describe(row['state'])}"


def student_prompt(row):
    """What the student reads beside the picture: rules and answer format, no fact of the state."""
    return "\n".join([TASKS[row["task"]].rules, picture(row), ask_plan(row["task"])])


def teacher_prompt(row, context="state+plan"):
    """The same rules and format with the symbols in the picture's place. context: "state+plan" | "state"."""
    hint = f"\nA reference plan: {','.join(row['plan'])}\nDo not mention that a reference plan is given."
    return "\n".join([TASKS[row["task"]].rules, symbols(row) + (hint if context == "state+plan" else ""), ask_plan(row["task"])])


def questions(task):
    """The names of a task's perception questions; "map" asks for the state part of a planning response."""
    return ("map", *TASKS[task].questions)


def perception_prompt(row, names=None, context=None):
    """Ask about the picture (or about `context`): one question plainly, several numbered. Default: all."""
    names = names or questions(row["task"])
    texts = {"map": ask_map(row["task"]), **TASKS[row["task"]].questions}
    lines = [texts[name] for name in names]
    if len(lines) > 1:
        lines = [f"{i}. {line}" for i, line in enumerate(lines, 1)]
    return "\n".join([TASKS[row["task"]].rules, context or picture(row), *([] if names == ("map",) else [ASK_FACTS]), *lines])


def perception_target(row, names=None):
    """The exact answer to `perception_prompt(row, names)`."""
    names = names or questions(row["task"])
    rules = TASKS[row["task"]]
    answers = {"map": rules.describe(row["state"]), **rules.facts(row["state"])}
    lines = [answers[name] for name in names]
    return "\n".join(f"{i}. {line}" for i, line in enumerate(lines, 1)) if len(lines) > 1 else lines[0]


def response(row):
    """The model response of three parts: the state, the route with its positions, the answer."""
    rules, plan = TASKS[row["task"]], row["plan"]
    start, *path = trace(row["task"], row["state"], plan)
    route = f"Route: from ({start[0]},{start[1]})"
    for action, pos in zip(plan, path):
        route += f" {action} {'to' if action in MOVES else 'at'} ({pos[0]},{pos[1]})"
    return f"{rules.describe(row['state'])}\n{route}.\n<answer>{','.join(plan)}</answer>"


PARTS = ("state", "route", "answer")


def part_of(pieces):
    """Which part of a response each token belongs to. pieces: the tokens' texts -> indices into PARTS."""
    parts, text, current = [], "", 0
    for piece in pieces:
        text = text[-8:] + piece
        if "<answer" in text:
            current = 2
        elif "Route" in text:
            current = max(current, 1)
        parts.append(current)
    return parts


# ---------------------------------------------------------------- splits and sampling

def key_of(state):
    """A state as text: the same for the same state."""
    return json.dumps(state, sort_keys=True)


def split_of(task, state):
    """The split a state belongs to: a fixed function of its content, 80% train, 10% val, 10% test.

    So no state is ever in two splits, whatever the seed, the counts or the run. A maze goes by its
    walls alone (there are only 192 layouts of 3x3), so that whole layouts are held out.
    """
    key, shown = (json.dumps(s["walls"] if task == "maze" else s["grid"]).encode() for s in (state, example(task)["state"]))
    if key == shown:
        return "example"
    return {8: "val", 9: "test"}.get(int(hashlib.sha256(key).hexdigest(), 16) % 10, "train")


@lru_cache
def thirds(task, level, hole_prob=HOLE_PROB):
    """(a, b): a plan of up to a actions is easy, of up to b medium, a longer one hard.

    The borders that cut the plans of 1,000 random puzzles into the three most equal parts.
    """
    rng = np.random.default_rng(0)
    extra = {"hole_prob": hole_prob} if task == "frozenlake" else {}
    plans = (solve(task, TASKS[task].sample(rng, level, **extra)) for _ in range(1000))
    lengths = np.array([len(plan) for plan in plans if plan is not None])

    def unevenness(borders):
        return np.var(np.histogram(lengths, (0, borders[0] + 0.5, borders[1] + 0.5, np.inf))[0])
    return min(combinations_with_replacement(sorted(set(lengths.tolist())), 2), key=unevenness)


def bucket(length, borders):
    """The difficulty of a shortest plan of `length` actions between `thirds`' borders."""
    return DIFFICULTIES[int(np.searchsorted(borders, length))]


def sample_rows(task, level, split, count, seed, hole_prob=HOLE_PROB, exclude=()):
    """`count` rows with distinct solvable states of one split, a third of each difficulty.

    exclude: states (as `key_of`) that may not appear. Fails with the number of rows that can be had.
    """
    rng = np.random.default_rng([seed, list(TASKS).index(task), level, SPLITS.index(split)])
    extra = {"hole_prob": hole_prob} if task == "frozenlake" else {}
    borders = thirds(task, level, hole_prob)
    wanted = {name: len(part) for name, part in zip(DIFFICULTIES, np.array_split(np.arange(count), 3))}
    found, latest = dict.fromkeys(wanted, 0), dict.fromkeys(wanted, 0)
    seen = set(exclude)
    for draw in count_up():
        short = [name for name in wanted if found[name] < wanted[name]]
        if not short:
            return
        if draw - min(latest[name] for name in short) > PATIENCE:
            fail(f"{task} level {level}: {count} {split} rows wanted, a third of each difficulty; only "
                 f"{3 * min(found.values())} distinct ones can be had: lower --{split}")
        state = TASKS[task].sample(rng, level, **extra)
        key = key_of(state)
        plan = solve(task, state) if key not in seen and split_of(task, state) == split else None
        name = plan and bucket(len(plan), borders)
        if name not in short:
            continue
        seen.add(key)
        row_id = f"{task}_{level}_{sum(found.values()):05d}"
        found[name], latest[name] = found[name] + 1, draw
        yield {"file_name": f"{row_id}.png", "id": f"{split}_{row_id}", "task": task, "level": level, "seed": seed,
               "source": "gen_data.py", "bucket": name, "state": state, "plan": plan}


def generated_rows(args, split, exclude=()):
    """The rows of one split, task by task and level by level."""
    for task, levels in args.tasks.items():
        for level in levels:
            yield from sample_rows(task, level, split, getattr(args, split), args.seed, args.hole_prob, exclude)


# ---------------------------------------------------------------- the public benchmarks

def examine(where, task, level, state, stated=None):
    """The shortest plan of a benchmark's state, after every check on it. Fails naming the record `where`."""
    if level not in TASKS[task].levels:
        fail(f"{where}: level {level}, wanted {TASKS[task].levels[0]} to {TASKS[task].levels[-1]} for {task}")
    grid = state["walls"] if task == "maze" else state["grid"]
    if len(grid) != level or any(len(row) != level for row in grid):
        fail(f"{where}: the map is not square, or not {level}x{level} as its level says")
    if task != "maze":
        one, others = ("SG", "FH") if task == "frozenlake" else ("AP", "T.")
        for mark, cells in ((mark, find(grid, mark)) for mark in sorted(set("".join(grid)) | set(one))):
            if mark not in one + others:
                fail(f"{where}: unknown symbol {mark!r}")
            if mark in one and len(cells) != 1:
                fail(f"{where}: {len(cells)} cells with {mark}, wanted exactly one")
    plan = solve(task, state)
    if not plan:
        fail(f"{where}: the goal cannot be reached" if plan is None else f"{where}: the start is the goal")
    if stated is not None and len(plan) != stated:
        fail(f"{where}: the record says that the shortest plan has {stated} actions, the rules here say {len(plan)}")
    return plan


def vsp_records(folder):
    """(where, task, level, state, stated length, picture) of VSP's FrozenLake: folder/level*/{table,img}/<i>.{txt,png}."""
    tables = sorted(Path(folder).glob("level*/table/*.txt"), key=lambda path: [int(n) for n in re.findall(r"\d+", str(path))])
    if not tables:
        fail(f"no VSP tables in {folder}: wanted {folder}/level3/table/0.txt and so on")
    for table in tables:
        grid = []
        header, *lines = table.read_text().rstrip().splitlines() or [""]
        for number, line in enumerate(lines, 2):
            cells = [cell.strip() for cell in line.strip().strip("|").split("|")[1:]]
            if unknown := set(cells) - set("@*#_"):
                fail(f"{table}, line {number}: unknown symbol {sorted(unknown)[0]!r}, wanted @ * # or _")
            if len(cells) != header.count("Col") or len(cells) != len(lines):
                fail(f"{table}, line {number}: {len(cells)} cells under {header.count('Col')} columns in {len(lines)} rows: not a square map")
            grid.append("".join({"@": "S", "*": "G", "#": "H", "_": "F"}[cell] for cell in cells))
        picture = table.parents[1] / "img" / f"{table.stem}.png"
        size = open_picture(picture).size
        if size[0] != size[1]:
            fail(f"{picture}: {size[0]}x{size[1]} px, wanted a square")
        level = table.parents[1].name.removeprefix("level")
        yield str(table), "frozenlake", int(level) if level.isdigit() else level, {"grid": grid}, None, picture


def visualplanning_records(file, task):
    """(where, task, level, state, stated length, None) of a VisualPlanning JSONL file of one task."""
    for number, line in enumerate(open(file), 1):
        where = f"{file}, line {number}"
        try:
            record = json.loads(line)
            meta, level = record["meta"], record["meta"]["level"]
            if task == "minibehaviour":
                state = {"grid": office_grid(meta, level)}
            elif task == "frozenlake":
                state = {"grid": ["".join(row) for row in meta["layout"]]}
                if any(len(row) != level for row in state["grid"]):
                    raise ValueError(f"the map is not square, or not {level}x{level} as its level says")
                for mark, pos in (("S", meta["start_pos"]), ("G", meta["target_pos"])):
                    if at(state["grid"], divmod(pos, level)) != mark:
                        raise ValueError(f"no {mark} at its position {pos}")
            else:
                state = maze_state(meta, level)
            lengths = {len(record["input_state"]) - 1} if "input_state" in record else set()
            if "distance_map" in meta:
                lengths.add(int(meta["distance_map"][str(meta["start_pos"])]))
            stated = lengths.pop() if lengths else None
            if lengths:
                raise ValueError("input_state and distance_map state different lengths")
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            fail(f"{where}: not a {task} record of VisualPlanning ({type(error).__name__}: {error})")
        yield where, task, level, state, stated, None


def office_grid(meta, level):
    """MiniBehaviour's grid from VisualPlanning's positions. ValueError if they overlap or the table does not lie."""
    grid = [["."] * level for _ in range(level)]
    table = sorted(map(tuple, meta["table_pos"]))
    if table != [(table[0][0] + r, table[0][1] + c) for r in range(2) for c in range(3)]:
        raise ValueError("the table is not 2 rows of 3 cells")
    for mark, pos in (("A", meta["start_pos"]), ("P", meta["printer_pos"]), *(("T", pos) for pos in table)):
        if at(grid, pos) != ".":
            raise ValueError(f"{mark} at {tuple(pos)} is off the map or on another thing")
        grid[pos[0]][pos[1]] = mark
    return ["".join(row) for row in grid]


def maze_state(meta, level):
    """A maze's state from VisualPlanning's walls. ValueError if its two sides of a border disagree or it is open."""
    sides = {"U": "north", "D": "south", "L": "west", "R": "east"}
    walls = [[sum(Maze.bits[a] for a, side in sides.items() if cell[side]) for cell in row] for row in meta["layout"]]
    for r, c in product(range(level), repeat=2):
        for a, back in zip("UDLR", "DURL"):
            other = at(walls, neighbour((r, c), a))
            if (walls[r][c] & Maze.bits[a] != 0) != (other is None or other & Maze.bits[back] != 0):
                raise ValueError(f"the {sides[a]} side of cell ({r},{c}) is open on one side only")
    start, goal = (list(divmod(meta[key], level)) for key in ("start_pos", "target_pos"))
    if at(walls, start) is None or at(walls, goal) is None:
        raise ValueError("start or target is off the map")
    return {"walls": walls, "start": start, "goal": goal}


def benchmark_rows(records, base):
    """Rows of the split test from benchmark records; a picture that came with one is kept under "picture"."""
    ids = Counter()
    for where, task, level, state, stated, picture in records:
        plan = examine(where, task, level, state, stated)
        name = f"{task}_{level}_{ids[level]:05d}"
        ids[level] += 1
        yield {"file_name": f"{name}.png", "id": f"test_{name}", "task": task, "level": level, "seed": None,
               "source": os.path.relpath(where, Path(base).parent),
               "bucket": bucket(len(plan), thirds(task, level)), "state": state, "plan": plan, "picture": picture}


# ---------------------------------------------------------------- files

@lru_cache(maxsize=512)
def narrow(strip, width, size):
    """The horizontal pass of a Lanczos resize over RGB rows, runs of equal rows done once. bytes -> [rows, size, 3]"""
    rows = np.frombuffer(strip, np.uint8).reshape(-1, width, 3)
    first = np.r_[True, (rows[1:] != rows[:-1]).any((1, 2))]
    few = Image.fromarray(rows[first])
    return np.asarray(few.resize((size, few.height), Image.LANCZOS))[first.cumsum() - 1]


def shrink(image, size, cell_size):
    """image.resize((size, size), Image.LANCZOS), to the bit, faster: rows of cells recur from picture to picture."""
    pixels = np.asarray(image)
    strips = [narrow(pixels[i:i + cell_size].tobytes(), image.width, size) for i in range(0, len(pixels), cell_size)]
    return Image.fromarray(np.concatenate(strips)).resize((size, size), Image.LANCZOS)


def write_png(image, path):
    """An 8-bit RGB PNG without row filters: half the time of Pillow's, whose search for the best filter cannot be switched off."""
    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    rows = np.pad(np.asarray(image).reshape(image.height, -1), ((0, 0), (1, 0)))  # each row begins with its filter: 0, none
    header = struct.pack(">IIBBBBB", image.width, image.height, 8, 2, 0, 0, 0)
    Path(path).write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows, 1)) + chunk(b"IEND", b""))


def draw(row, folder, cell_size, image_size):
    """Write one row's PNG. image_size: px of the square it is resized to (Lanczos), 0 keeps the drawn size."""
    target = Path(folder) / row["file_name"]
    if row.get("picture"):  # a benchmark's own
        if image_size:
            write_png(Image.open(row["picture"]).convert("RGB").resize((image_size, image_size), Image.LANCZOS), target)
        else:
            shutil.copyfile(row["picture"], target)
        return
    image = TASKS[row["task"]].render(row["state"], cell_size)
    write_png(shrink(image, image_size, cell_size) if image_size else image, target)


def load_rows(data, split="*"):
    """Rows of data/<split> (default: of every split), each executed once: a row that is broken stops here, with its line.

    Each gets "path", the file of its picture, which must lie beside the metadata.
    """
    files = sorted(Path(data).glob(f"{split}/metadata.jsonl"))
    if not files:
        fail(f"no {data}/{split}/metadata.jsonl: make the data with `python gen_data.py --out {data}`")
    rows = []
    for file in files:
        for number, line in enumerate(open(file), 1):
            try:
                row = json.loads(line)
                path = file.parent / row["file_name"]
                outcome = check(row["task"], row["state"], row["plan"])
                row["id"], row["level"]
            except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
                fail(f"{file}, line {number}: not a row ({type(error).__name__}: {error}); make the data again")
            if outcome != "success":
                fail(f"{file}, line {number}: the plan of {row['id']} does not solve its puzzle: {outcome}")
            if path.name != row["file_name"] or path.name == ".." or path.is_symlink():
                fail(f"{file}, line {number}: the picture {row['file_name']!r} is not a file in {file.parent}")
            rows.append(row | {"path": str(path)})
    return rows


def open_picture(path):
    """The picture in a file, decoded. Fails if it is broken, or so large that decoding it would fill the memory."""
    try:
        image = Image.open(path)
        if max(image.size) > MAX_PIXELS:
            fail(f"{path}: {image.width}x{image.height} px, wanted at most {MAX_PIXELS} a side")
        return image.convert("RGB")
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        fail(f"{path}: cannot be read as a picture ({error})")


def ensure(data, preset, seed):
    """Make the data of a preset if there is no folder `data`."""
    if not Path(data).exists():
        words = ["--preset", preset, "--seed", str(seed), "--out", str(data)]
        print(f"no {data}: making it with `python gen_data.py {' '.join(words)}`", flush=True)
        if code := subprocess.run([sys.executable, __file__, *words]).returncode:  # its workers need not import torch
            raise SystemExit(code)
    elif (Path(data) / "args.json").is_file():
        made = json.loads((Path(data) / "args.json").read_text())
        words = [f"--{key} {made[key]}" for key in ("from_vsp", "from_visualplanning", "preset", "seed") if made.get(key) is not None]
        print(f"data: {data}, made with {' '.join(words)}")


def parse_tasks(words):
    """["maze", "frozenlake:3-5", "minibehaviour:5"] -> {"maze": (3, 4, 5, 6), ...}"""
    tasks = {}
    for word in words:
        name, _, levels = word.partition(":")
        if name not in TASKS:
            fail(f"unknown task {name!r}, known: {', '.join(TASKS)}")
        allowed = TASKS[name].levels
        try:
            low, _, high = levels.partition("-")
            tasks[name] = tuple(range(int(low), int(high or low) + 1)) if levels else tuple(allowed)
        except ValueError:
            fail(f"cannot read the levels in {word!r}, wanted for example {name}:{allowed[0]}-{allowed[-1]}")
        if not tasks[name] or not set(tasks[name]) <= set(allowed):
            fail(f"{word}: {name} has levels {allowed[0]} to {allowed[-1]}")
    return tasks


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--preset", default="4b", help=f"sets the defaults below: {', '.join(PRESETS)}")
    add("--tasks", nargs="+", help="task, or task:level, or task:low-high (default: the preset's)")
    add("--train", type=int, help="rows per task and level (default: the preset's; so too --val and --test)")
    add("--val", type=int)
    add("--test", type=int)
    add("--cell_size", type=int, help="px a cell is drawn at")
    add("--image_size", type=int, help="px of the square the picture is resized to, 0 keeps it as drawn (VSP's own pictures: 0)")
    add("--hole_prob", type=float, default=HOLE_PROB, help="FrozenLake: share of holes")
    add("--exclude", nargs="+", default=[], metavar="DIR", help="folders made by this script whose states may not appear")
    add("--seed", type=int, default=0, help="same seed, same bytes")
    add("--workers", type=int, default=os.cpu_count(), help="processes that draw; the bytes do not depend on it")
    add("--out", "--data", default="data", help="output folder")
    add("--overwrite", action="store_true", help="replace the output folder")
    add("--from_vsp", metavar="DIR", help="import VSP's FrozenLake maps, pictures included, as the split test")
    add("--from_visualplanning", metavar="FILE", help="import a JSONL file of VisualPlanning as the split test")
    add("--task", help=f"the task of --from_visualplanning: {', '.join(TASKS)}")
    add("--show", nargs="?", const="puzzles.png", metavar="PNG", help="only draw a contact sheet (puzzles.png) and print the prompts")
    args = parser.parse_args(argv)
    if args.preset not in PRESETS:
        fail(f"unknown preset {args.preset!r}, known: {', '.join(PRESETS)}")
    if args.from_vsp and args.image_size is None:
        args.image_size = 0
    for name, value in PRESETS[args.preset].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if not isinstance(args.tasks, dict):
        args.tasks = parse_tasks(args.tasks)
    if not 0 <= args.hole_prob <= 1:
        fail(f"--hole_prob {args.hole_prob} is outside 0..1")
    for name, least in (("train", 0), ("val", 0), ("test", 0), ("seed", 0), ("cell_size", 8), ("image_size", 0), ("workers", 1)):
        if getattr(args, name) < least:
            fail(f"--{name} {getattr(args, name)}: wanted at least {least}")
    if args.from_visualplanning and args.task not in TASKS:
        fail(f"--from_visualplanning needs --task, one of {', '.join(TASKS)}; got {args.task!r}")
    for source in filter(None, (args.from_vsp, args.from_visualplanning)):
        if not Path(source).exists():
            fail(f"{source} does not exist")
    if Path(args.out).exists() and not args.show:
        if not args.overwrite:
            fail(f"{args.out} exists: choose another --out, or --overwrite to replace it")
        if not (Path(args.out) / "args.json").is_file():
            fail(f"{args.out} was not made by gen_data.py (it has no args.json): not replaced, choose another --out")
    return args


def show(args):
    """A contact sheet, one column per level, every puzzle with its shortest path below; then each task's prompts."""
    size, columns = 256, max(len(levels) for levels in args.tasks.values())
    sheet = Image.new("RGB", (columns * (size + 16), len(args.tasks) * 2 * (size + 24)), "white")
    label = ImageDraw.Draw(sheet)
    for i, (task, levels) in enumerate(args.tasks.items()):
        for j, level in enumerate(levels):
            row = max(sample_rows(task, level, "train", 3, args.seed, args.hole_prob), key=lambda row: len(row["plan"]))
            image = TASKS[task].render(row["state"], args.cell_size).resize((size, size), Image.LANCZOS)
            x, y = j * (size + 16) + 8, i * 2 * (size + 24) + 20
            label.text((x, y - 14), f"{task} {level}, {row['bucket']}: {','.join(row['plan'])}"[:48], "black")
            sheet.paste(image, (x, y))
            path = [((c + 0.5) * size / level, (r + 0.5) * size / level) for r, c, *_ in trace(task, row["state"], row["plan"])]
            pen = ImageDraw.Draw(image)
            pen.line(path, (230, 0, 160), 5, joint="curve")
            for (px, py), action in zip(path[1:], row["plan"]):
                if action in ("PICK", "DROP"):
                    pen.ellipse([px - 9, py - 9, px + 9, py + 9], outline=(230, 0, 160), width=4)
            sheet.paste(image, (x, y + size + 4))
        for title, text in (("row", json.dumps(row)), ("student, beside the picture", student_prompt(row)),
                            ("teacher, with the reference plan", teacher_prompt(row)), ("teacher without it", teacher_prompt(row, "state")),
                            ("response", response(row)), ("perception", perception_prompt(row)), ("target", perception_target(row))):
            print(f"--- {task}: {title}\n{text}")
    sheet.save(args.show)
    print(f"--- wrote {args.show}")


def main(args):
    if args.show:
        return show(args)
    if args.from_vsp:
        splits = {"test": iter(list(benchmark_rows(vsp_records(args.from_vsp), args.from_vsp)))}
    elif args.from_visualplanning:
        records = visualplanning_records(args.from_visualplanning, args.task)
        splits = {"test": iter(list(benchmark_rows(records, args.from_visualplanning)))}
    else:
        exclude = {key_of(row["state"]) for folder in args.exclude for row in load_rows(folder)}
        splits = {split: generated_rows(args, split, exclude) for split in SPLITS}
    # Everything is written aside and renamed at the end: the folder is complete or not there.
    aside = Path(f"{args.out}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    total = None if len(splits) == 1 else sum(map(len, args.tasks.values())) * (args.train + args.val + args.test)
    try:
        with multiprocessing.get_context("spawn").Pool(args.workers) as pool, tqdm(total=total, desc="puzzles", unit="row") as bar:
            for split, rows in splits.items():
                (aside / split).mkdir(parents=True)
                job = partial(draw, folder=aside / split, cell_size=args.cell_size, image_size=args.image_size)
                drawing = ()
                with open(aside / split / "metadata.jsonl", "w") as file:
                    while block := list(islice(rows, 256)):  # the next block is found while the last one is being drawn
                        drawn, drawing = drawing, pool.imap_unordered(job, block, chunksize=16)
                        file.writelines(json.dumps({key: row[key] for key in row if key != "picture"}) + "\n" for row in block)
                        bar.update(sum(1 for _ in drawn))
                bar.update(sum(1 for _ in drawing))
            total = bar.n
        (aside / "args.json").write_text(json.dumps(vars(args), indent=1))
        if Path(args.out).exists():
            shutil.rmtree(args.out)
        aside.rename(args.out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    print(f"{total} puzzles in {args.out}")


if __name__ == "__main__":
    main(parse_args())
