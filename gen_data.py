"""Grid puzzles: the rules, the prompts and the data of MGSD. Knows the puzzles, nothing of models.

A puzzle is a *state* (plain facts, JSON-serialisable). From it follow the picture the student sees
(`render`), the symbols the teacher reads (`describe`), the shortest plan (`solve`) and the verdict
on any other plan (`check`). A task is one class in `TASKS`; everything that can be written once
for all of them stands below the classes.

    python gen_data.py                                # the paper's range -> data/{train,val,test}
    python gen_data.py --preset tiny --overwrite      # what the bundled tiny backbone is trained on
    python gen_data.py --tasks frozenlake:3-5 maze:4 --train 500 --out data/mine
    python gen_data.py --show                         # look: puzzles.png, and each task's prompts
    python -m tools.benchmarks --help                 # public benchmarks as rows of the split test

Rows go to data/<split>/metadata.jsonl beside their PNGs (the "imagefolder" layout of `datasets`):
    {"file_name", "id", "task", "level", "seed", "source", "bucket", "state", "plan"}
`bucket` is the difficulty (easy, medium, hard), by the length of the shortest plan. A row holds
facts only. Prompts are functions of a row, so changing one needs no new data.
Coordinates are (row, column), counted from 0 at the top left.
A row of a user's own is a pair (tools/pairs.py): "prompt" and "symbols" in place of task, state,
plan.
"""
import argparse
import errno
import hashlib
import json
import math
import os
import re
import subprocess
import sys
from collections import deque
from contextlib import suppress
from functools import lru_cache, partial, wraps
from itertools import combinations_with_replacement, count
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout
from PIL import Image, ImageDraw
from tqdm import tqdm

MOVES = {"U": (-1, 0), "D": (1, 0), "L": (0, -1), "R": (0, 1)}
SPLITS = ("train", "val", "test")
DIFFICULTIES = ("easy", "medium", "hard")
PARTS = ("state", "route", "answer")  # of a response
MAX_PIXELS = 4096  # a picture's side; larger ones are refused before they are decoded
PATIENCE = 50_000  # random puzzles without a new one of a wanted difficulty, then fewer exist

# What each preset trains on. `cell_size` 32 makes one cell exactly one image token of the tiny
# backbone (patch 16, merge 2); the big ones get the paper's 256x256 pictures.
PAPER = {
    "tasks": {"frozenlake": (3, 4, 5, 6, 7, 8), "maze": (3, 4, 5, 6), "minibehaviour": (5, 6)},
    "cell_size": 64, "image_size": 256, "train": 1000, "val": 40, "test": 100}
PRESETS = {
    "tiny": {"tasks": {"frozenlake": (3, 4), "maze": (3, 4), "minibehaviour": (5,)},
             "cell_size": 32, "image_size": 0, "train": 2000, "val": 40, "test": 100},
    "2b": PAPER, "4b": PAPER, "8b": PAPER}
PRESETS["tiny-small"] = {**PRESETS["tiny"], "train": 40}


# ---------------------------------------------------------------- messages, flags and files
# For all five scripts: this one must not load torch, and the others build on it.

def fail(message):
    """Bad input: one line on stderr, exit code 2."""
    tqdm.write(f"error: {message}", file=sys.stderr)  # on a line of its own, below a progress bar
    raise SystemExit(2)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, and which takes no shortened flags."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, **options)

    def error(self, message):
        fail(f"{message} (python {self.prog} --help lists the flags)")


def whole_number(low):
    """The `type=` of a flag: a whole number of at least `low`."""
    def read(text):
        if not re.fullmatch(r"[+-]?[0-9]{1,18}", text.strip()) or int(text) < low:
            raise argparse.ArgumentTypeError(
                f"got {text!r}, must be a whole number, at least {low}")
        return int(text)
    return read


def real_number(low=0.0, high=math.inf, above=False):
    """The `type=` of a flag: a finite number from `low` (above: not `low` itself) to `high`."""
    def read(text):
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and low <= value <= high) or (above and value == low):
            wanted = f"above {low:g}" if above else f"at least {low:g}"
            wanted += f", at most {high:g}" if high < math.inf else ""
            raise argparse.ArgumentTypeError(f"got {text!r}, must be a number, {wanted}")
        return value
    return read


def digest(*things):
    """16 hex digits, the same for the same JSON-serialisable things."""
    text = json.dumps(things, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def digest_file(path):
    """16 hex digits, the same for the same bytes."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


def flush(path):
    """Make sure that a file or folder is on the disk; some systems cannot flush a folder."""
    if path.is_dir() and os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    except OSError as error:  # network file systems: EINVAL for a folder
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def write_bytes(path, content):
    """Write a file so that it is the old or the new one, whatever happens."""
    path = Path(path)
    aside = path.with_name(path.name + ".partial")
    aside.write_bytes(content)
    flush(aside)
    aside.replace(path)


def write_text(path, text):
    """`write_bytes` of a text: UTF-8 with \\n on every system."""
    write_bytes(path, text.encode())


def kind_of(folder):
    """What the args.json of a folder says it is: "data", "run", "evaluation"; None without one."""
    try:
        return json.loads(Path(folder, "args.json").read_text(encoding="utf-8")).get("kind")
    except (OSError, ValueError, AttributeError):
        return None


def lock_folder(folder):
    """The lock of an existing folder, held until `.release()` or the end of the process."""
    lock = FileLock(Path(folder) / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        fail(f"another process is writing to {folder}: wait for its end or choose another --out")
    except NotImplementedError:
        fail(f"the file system of {folder} has no locks: choose an --out on another one")
    return lock


# errno: what is wrong with the machine, not with the code
CAUSES = {errno.ENOSPC: "the disk is full",
          errno.EROFS: "the file system is read-only", errno.EACCES: "no permission",
          errno.EPERM: "no permission", errno.ENOTDIR: "a part of the path is a file",
          errno.EISDIR: "it is a folder", errno.EEXIST: "it is a file",
          errno.ENAMETOOLONG: "the name is too long"}


def run_script(parse_args, main):
    """Run a script: what its user's machine lacks is one line, a fault in the code a traceback."""
    try:
        main(parse_args())
    except KeyboardInterrupt:
        tqdm.write("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except OSError as error:
        if error.errno not in CAUSES:
            raise
        fail(f"{error.filename or 'writing'}: {CAUSES[error.errno]}")
    except (MemoryError, RuntimeError) as error:
        text = " ".join(str(error).split())
        if "out of memory" not in text and "can't allocate memory" not in text \
                and not isinstance(error, MemoryError):
            raise
        fail(f"memory does not suffice ({text[:200]}): lower --micro_batch, --rollout_batch or "
             "--chunk; the same command goes on from the latest checkpoint")


# ---------------------------------------------------------------- the tasks
# A task is one class with the names below, in TASKS; no other line knows it.
#
#   levels: range                   sizes it can make
#   options: {flag: (default, help)}    may be missing: flags for `sample`; a float is a share
#   rules, legend: text             what both roles read; what the things in the picture look like
#   actions: tuple                  in the solver's order; upper case, without blanks
#   questions: {name: text}         about the picture; the question "map" is common to all
#   sample(rng, level, **options) -> state
#   start(state) -> pos             a tuple; it begins with the row and the column
#   step(state, pos, action) -> (pos, fault or None);  done(state, pos) -> bool
#   render(state, cell_size) -> PIL.Image
#   cells(state) -> [[text]]        the board as the symbols say it: upper case, without blanks
#   read(cells) -> state            the way back; None if there is no world to plan in
#   facts(state) -> {name: answer}  to `questions`; see read_fact for how answers are compared
#   layout(state)                   what a split goes by

ASK_SIZE = "How many rows and columns does the map have?"


class FrozenLake:
    """Cross the ice from S to G without falling into a hole. state: {"grid": ["SFH", "FFF", "HFG"]}

    The rules are those of gymnasium's FrozenLake-v1 with is_slippery=False, except that leaving the
    board is the fault "edge" (gymnasium stays where it is).
    """
    levels = range(3, 9)
    options = {"hole_prob": (0.18, "share of holes; VSP's maps have 0.18")}
    rules = (
        "You cross a frozen lake. S is the start, G is the goal, F is frozen ice, H is a hole.\n"
        "U, D, L and R move one cell up, down, left and right. Never enter a hole or leave the "
        "map.\n"
        "Reach the goal in as few actions as possible.")
    legend = "S is the elf, G is the present, H is a blue hole, and F is plain ice."
    actions = tuple(MOVES)
    questions = {"size": ASK_SIZE,
                 "player": "Where is the start?",
                 "goal": "Where is the goal?",
                 "holes": "Where are the holes?"}

    def sample(rng, level, hole_prob=options["hole_prob"][0]):
        cells = np.where(rng.random(level * level) < hole_prob, "H", "F")
        cells[rng.choice(level * level, 2, replace=False)] = ["S", "G"]
        return {"grid": ["".join(row) for row in cells.reshape(level, level)]}

    def start(state):
        return find(state["grid"], "S")[0]

    def step(state, pos, action):
        new = neighbour(pos, action)
        cell = at(state["grid"], new)
        if cell is None:
            return pos, "edge"
        return new, "hole" if cell == "H" else None

    def done(state, pos):
        return at(state["grid"], pos) == "G"

    def render(state, cell_size):
        return assemble(state["grid"], lake_tile, cell_size)

    def cells(state):
        return list(map(list, state["grid"]))

    def read(cells):
        return {"grid": list(map("".join, cells))} if is_board(cells, "SG", "FH") else None

    def facts(state):
        grid = state["grid"]
        return {"size": f"{len(grid)}x{len(grid)}", "player": places(find(grid, "S")),
                "goal": places(find(grid, "G")), "holes": places(find(grid, "H"))}

    def layout(state):
        return state["grid"]


class Maze:
    """Walk from the start to the goal of a perfect maze (one path between any two cells).

    state: {"walls": [[bits]], "start": [r, c], "goal": [r, c]}, wall bits N=1 S=2 W=4 E=8.
    """
    levels = range(3, 7)
    bits = {"U": 1, "D": 2, "L": 4, "R": 8}
    opposite = {"U": "D", "D": "U", "L": "R", "R": "L"}
    rules = (
        "You walk through a maze. Every cell is written as a mark and the letters of its open "
        "sides: S is the start, G is the goal, . is any other cell.\n"
        "U, D, L and R move one cell up, down, left and right. Never cross a wall or leave the "
        "map.\n"
        "Reach the goal in as few actions as possible.")
    legend = (
        "S is the yellow disc and G is the blue disc. White is floor, black is wall. "
        "A thin grey line between two cells is an open side.")
    actions = tuple(MOVES)
    questions = {"size": ASK_SIZE,
                 "player": "Where is the start?",
                 "goal": "Where is the goal?",
                 "moves": "Which moves are possible from the start?"}

    def sample(rng, level):
        walls = [[15] * level for _ in range(level)]
        root = divmod(int(rng.integers(level * level)), level)
        start, goal = (divmod(int(i), level) for i in rng.choice(level * level, 2, replace=False))
        path, seen = [root], {root}
        # A depth-first walk that opens a wall whenever it enters a new cell.
        for random in rng.random(level * level - 1):
            free = []
            while not free:
                r, c = path[-1]
                for action in MOVES:
                    new = neighbour((r, c), action)
                    if new not in seen and at(walls, new) is not None:
                        free.append((action, new))
                if not free:
                    path.pop()
            action, new = free[int(random * len(free))]
            walls[r][c] -= Maze.bits[action]
            walls[new[0]][new[1]] -= Maze.bits[Maze.opposite[action]]
            seen.add(new)
            path.append(new)
        return {"walls": walls, "start": list(start), "goal": list(goal)}

    def start(state):
        return tuple(state["start"])

    def step(state, pos, action):
        new = neighbour(pos, action)
        if at(state["walls"], new) is None:
            return pos, "edge"
        if at(state["walls"], pos) & Maze.bits[action]:
            return pos, "wall"
        return new, None

    def done(state, pos):
        return pos == tuple(state["goal"])

    def render(state, cell_size):
        return assemble(Maze.cells(state), maze_tile, cell_size)

    def cells(state):
        marks = {tuple(state["start"]): "S", tuple(state["goal"]): "G"}
        cells = []
        for r, row in enumerate(state["walls"]):
            cells.append([marks.get((r, c), ".") + Maze.open_sides(b) for c, b in enumerate(row)])
        return cells

    def read(cells):
        """It is read as it stands: two sides of a border that disagree go on disagreeing."""
        marks, walls = [], []
        for row in cells:
            if not set("".join(cell[1:] for cell in row)) <= set(MOVES):
                return None
            marks.append([cell[0] for cell in row])
            walls.append([15 - sum(map(Maze.bits.get, set(cell[1:]))) for cell in row])
        if not is_board(marks, "SG", "."):
            return None
        start, goal = (list(find(marks, mark)[0]) for mark in "SG")
        return {"walls": walls, "start": start, "goal": goal}

    def facts(state):
        n = len(state["walls"])
        return {"size": f"{n}x{n}", "player": places([state["start"]]),
                "goal": places([state["goal"]]),
                "moves": ", ".join(Maze.open_sides(at(state["walls"], state["start"])))}

    def layout(state):
        return state["walls"]  # not the ends: whole layouts are held out (there are 192 of 3x3)

    def open_sides(bits):
        return "".join(action for action in MOVES if not bits & Maze.bits[action])


class MiniBehaviour:
    """Fetch the printer and put it on the table. state: {"grid": ["A...", "..P.", "TTT.", "TTT."]}

    A position is (row, column, phase): phase 0 before PICK, 1 carrying, 2 after DROP. The printer
    blocks its cell until it was picked up and not after.
    """
    levels = range(4, 7)
    rules = (
        "You are the agent A. Bring the printer P to the table T. A dot is free floor.\n"
        "U, D, L and R move one cell up, down, left and right. Never enter the table or the "
        "printer or leave the map.\n"
        "PICK takes the printer from a neighbouring cell, which is free afterwards. "
        "DROP puts it on the table from a cell beside the table.\n"
        "Finish in as few actions as possible.")
    legend = "A is the red triangle, P is the white printer, T is tan, and free floor is black."
    actions = (*MOVES, "PICK", "DROP")
    questions = {"size": ASK_SIZE,
                 "agent": "Where is the agent?",
                 "printer": "Where is the printer?",
                 "table": "Which cells are the table?",
                 "near_printer": "Which free cells, the agent's included, are beside the printer?",
                 "near_table": "Which free cells, the agent's included, are beside the table?",
                 "moves": "Which actions are possible at the start?"}

    def sample(rng, level):
        grid = np.full((level, level), ".")
        r, c = rng.integers(level - 1), rng.integers(level - 2)
        grid[r:r + 2, c:c + 3] = "T"
        floor = np.argwhere(grid == ".")
        for mark, i in zip("AP", rng.choice(len(floor), 2, replace=False), strict=True):
            grid[tuple(floor[i])] = mark
        return {"grid": ["".join(row) for row in grid]}

    def start(state):
        return (*find(state["grid"], "A")[0], 0)

    def step(state, pos, action):
        r, c, phase = pos
        if action in ("PICK", "DROP"):
            when, thing = (0, "P") if action == "PICK" else (1, "T")
            possible = phase == when and touches(state["grid"], (r, c), thing)
            return ((r, c, phase + 1), None) if possible else (pos, action.lower())
        new = neighbour(pos, action)
        cell = at(state["grid"], new)
        if cell == "P" and phase > 0:
            cell = "."
        fault = {None: "edge", "T": "table", "P": "printer"}.get(cell)
        return (pos, fault) if fault else ((*new, phase), None)

    def done(state, pos):
        return pos[2] == 2

    def render(state, cell_size):
        return assemble(state["grid"], office_tile, cell_size)

    def cells(state):
        return list(map(list, state["grid"]))

    def read(cells):
        if not is_board(cells, "AP", "T.") or not find(cells, "T"):
            return None
        return {"grid": list(map("".join, cells))}

    def facts(state):
        grid, start = state["grid"], MiniBehaviour.start(state)
        free = sorted(find(grid, ".") + find(grid, "A"))
        legal = [a for a in MiniBehaviour.actions if not MiniBehaviour.step(state, start, a)[1]]
        return {"size": f"{len(grid)}x{len(grid)}", "agent": places([start]),
                "printer": places(find(grid, "P")), "table": places(find(grid, "T")),
                "near_printer": places([pos for pos in free if touches(grid, pos, "P")]),
                "near_table": places([pos for pos in free if touches(grid, pos, "T")]),
                "moves": ", ".join(legal) or "none"}

    def layout(state):
        return state["grid"]


TASKS = {"frozenlake": FrozenLake, "maze": Maze, "minibehaviour": MiniBehaviour}


# ---------------------------------------------------------------- helpers of the tasks

def neighbour(pos, action):
    """The cell one move away; it may be off the board."""
    return pos[0] + MOVES[action][0], pos[1] + MOVES[action][1]


def at(grid, pos):
    """The cell at `pos`, or None off the board."""
    r, c = pos[:2]
    return grid[r][c] if 0 <= r < len(grid) and 0 <= c < len(grid[0]) else None


def find(grid, mark):
    """All positions of `mark`, row by row."""
    return [(r, c) for r, row in enumerate(grid) for c, cell in enumerate(row) if cell == mark]


def touches(grid, pos, mark):
    """Is a cell with `mark` beside `pos`?"""
    return any(at(grid, neighbour(pos, action)) == mark for action in MOVES)


def places(positions):
    """[(0, 1), (2, 2)] -> "(0,1), (2,2)"; "none" for no position."""
    return ", ".join(f"({pos[0]},{pos[1]})" for pos in positions) or "none"


def is_board(cells, once, others):
    """Is this a square of the marks `once`, each there exactly once, and `others`?"""
    marks = [mark for row in cells for mark in row]
    return (all(len(row) == len(cells) for row in cells) and set(marks) <= set(once + others)
            and all(marks.count(mark) == 1 for mark in once))


# ---------------------------------------------------------------- pictures

def assemble(cells, tile, cell_size):
    """The picture of a board. tile(cell, cell_size) -> Image [cell_size, cell_size]"""
    picture = Image.new("RGB", (len(cells[0]) * cell_size, len(cells) * cell_size))
    for r, row in enumerate(cells):
        for c, cell in enumerate(row):
            picture.paste(tile(cell, cell_size), (c * cell_size, r * cell_size))
    return picture


@lru_cache
def lake_tile(cell, size):
    """A cell as VSP draws it, pixel by pixel: gymnasium's art, scaled with nearest-neighbour.

    Ice, then hole, goal or stool, a one-pixel outline, then the elf on the start; blended in
    pygame's integer arithmetic, so that VSP's own pictures come out.
    """
    import gymnasium
    art = Path(gymnasium.__file__).parent / "envs/toy_text/img"
    pixels = np.zeros((size, size, 3), int)
    layers = {"F": ["ice", "outline"], "H": ["ice", "hole", "outline"],
              "G": ["ice", "goal", "outline"], "S": ["ice", "stool", "outline", "elf_down"]}
    for name in layers[cell]:
        if name == "outline":
            pixels[[0, -1]] = pixels[:, [0, -1]] = 180, 200, 230
            continue
        layer = Image.open(art / f"{name}.png").convert("RGBA").resize((size, size), Image.NEAREST)
        layer = np.asarray(layer).astype(int)
        colour, alpha = layer[..., :3], layer[..., 3:]
        pixels += ((colour - pixels) * alpha + colour) >> 8
    return Image.fromarray(pixels.astype(np.uint8))


@lru_cache
def maze_tile(cell, size):
    """A white corridor on black, a thin grey line where two cells join, a yellow or blue dot."""
    mark, open_sides = cell[0], cell[1:]
    image = Image.new("RGB", (size, size))
    draw = ImageDraw.Draw(image)
    half, end = max(2, size // 8) // 2, size - 1  # px: half a wall lies on either side of a border
    inner = [half, half, end - half, end - half]
    draw.rectangle(inner, "white")
    for side, edge, border in (("U", 1, 0), ("D", 3, end), ("L", 0, 0), ("R", 2, end)):
        if side in open_sides:  # on to the border
            draw.rectangle([*inner[:edge], border, *inner[edge + 1:]], "white")
    if "L" in open_sides:
        draw.line([0, half, 0, end - half], (200, 200, 200))
    if "U" in open_sides:
        draw.line([half, 0, end - half, 0], (200, 200, 200))
    if mark != ".":
        quarter = size // 4
        colour = (255, 215, 0) if mark == "S" else (30, 90, 255)
        draw.ellipse([quarter, quarter, end - quarter, end - quarter], colour)
    return image


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
    return image


# ---------------------------------------------------------------- solver and judge, for all tasks

def solve(task, state):
    """The first shortest plan in the order of the task's actions (breadth-first), None if none."""
    rules = TASKS[task]
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
        for action in rules.actions:
            new, fault = rules.step(state, pos, action)
            if fault is None and new not in came_from:
                came_from[new] = (pos, action)
                queue.append(new)
    return None


def execute(task, state, plan):
    """(the positions a plan visits, the start first; the fault that ended it, or None).

    An episode ends when the goal is reached, as in gymnasium: actions after that are not executed.
    """
    rules = TASKS[task]
    path = [rules.start(state)]
    for action in plan:
        if rules.done(state, path[-1]):
            break
        if action not in rules.actions:
            return path, "no such action"
        pos, fault = rules.step(state, path[-1], action)
        if fault:
            return path, fault
        path.append(pos)
    return path, None


def trace(task, state, plan):
    """The positions a plan visits, the start first; up to its first fault or the goal."""
    return execute(task, state, plan)[0]


def check(task, state, plan):
    """(outcome, executed steps) of a plan; the step that is a fault is not counted.

    outcome: "success", the name of the first fault, "unfinished", or for plan None "no answer".
    """
    if plan is None:
        return "no answer", 0
    path, fault = execute(task, state, plan)
    outcome = fault or ("success" if TASKS[task].done(state, path[-1]) else "unfinished")
    return outcome, len(path) - 1


# ---------------------------------------------------------------- rows

def is_pair(row):
    """Is it a row of a user's own?"""
    return "symbols" in row or "prompt" in row


def row_function(function):
    """What a function of a row does for puzzles; tools/pairs.py has its namesake for pairs."""
    @wraps(function)
    def answer(row, *arguments, **options):
        if not is_pair(row):
            return function(row, *arguments, **options)
        from tools import pairs  # here, for it imports this file
        return getattr(pairs, function.__name__)(row, *arguments, **options)
    return answer


# ---------------------------------------------------------------- reading responses

WORDS = {"UP": "U", "DOWN": "D", "LEFT": "L", "RIGHT": "R",
         "PICK UP": "PICK", "PICKUP": "PICK", "PUT DOWN": "DROP"}


def parse(task, text):
    """The actions of the last complete <answer>…</answer>; None if there is none or it holds more.

    Actions are separated by commas, blanks or nothing ("UUR"), in either case. What other models
    write is read by `tools.lenient.parse`.
    """
    answer = last_answer(text)
    return None if answer is None else read_actions(answer, names_of(TASKS[task].actions))


def last_answer(text):
    """What the last complete <answer>…</answer> holds, or None."""
    begin, answer = None, None
    for tag in re.finditer("<(/?)answer>", text):
        if not tag[1]:
            begin = tag.end()
        elif begin is not None:
            answer = text[begin:tag.start()]
    return answer


def names_of(actions, others=()):
    """{name: action}: the actions' own names, and those of the dict `others` that mean one."""
    names = {name: others[name] for name in others if others[name] in actions}
    return names | {action: action for action in actions}


def any_of(names):
    """An expression for any of the names, the longest first."""
    return "|".join(map(re.escape, sorted(names, key=len, reverse=True)))


def read_actions(text, names):
    """The actions of a text of their names, commas and blanks and nothing else; else None."""
    text = re.sub(r"\s+", " ", text.upper())
    found = re.findall(any_of(names), text)
    if not found or re.sub("[ ,]", "", "".join(found)) != re.sub("[ ,]", "", text):
        return None
    return [names[name] for name in found]


def read_state(task, text):
    """The state that the first map in a text describes (see `listing`), or None."""
    head = re.search(r"map\s*:\s*([0-9]{1,2})\s*x\s*([0-9]{1,2})\b", text, re.IGNORECASE)
    if not head:
        return None
    height, width = int(head[1]), int(head[2])
    listed = text[head.end():].split("Route")[0]
    rows = re.findall(r"^row ([0-9]{1,2}): ([^\n]{1,200})$", listed, re.IGNORECASE | re.MULTILINE)
    rows = rows[:height]
    cells = [row.upper().split() for _, row in rows]
    numbers = [int(number) for number, _ in rows]
    if not cells or numbers != list(range(height)) or any(len(row) != width for row in cells):
        return None
    return TASKS[task].read(cells)


@row_function
def judge(row, text, parse=parse, tolerance=0):
    """What a response is worth: its plan, how it ends, the state it describes and if that is right.

    optimal: it succeeds, and as many steps were executed as the shortest plan has. What is written
    after the goal was reached is not executed and does not count. parse(task, text): the reader.
    tolerance: for answers of pairs that are numbers.
    """
    plan, state = parse(row["task"], text), read_state(row["task"], text)
    outcome, executed = check(row["task"], row["state"], plan)
    return {"plan": plan, "outcome": outcome,
            "optimal": outcome == "success" and executed == len(row["plan"]),
            "state": state, "state_right": state == row["state"]}


def read_fact(name, text, actions):
    """What a free-form answer to the question `name` says, in a form that can be compared, or None.

    size -> (rows, columns); moves -> a set of actions; else a set of positions if there are any.
    Sets may be in any order, everything that is mentioned counts, and only the word none (or no)
    stands for the empty set. Any other answer is compared by its words, without case.
    """
    if name == "size":
        numbers = re.findall(r"[0-9]{1,4}", text)
        return tuple(map(int, numbers)) if len(numbers) == 2 else None
    if name == "moves":
        names = names_of(actions, WORDS)
        found = {names[word] for word in re.findall(rf"\b(?:{any_of(names)})\b", text.upper())}
    else:
        pairs = re.findall(r"[(\[] ?([0-9]{1,4}) ?, ?([0-9]{1,4}) ?[)\]]"
                           r"|\brow ([0-9]{1,4}),? (?:and )?col(?:umn)? ([0-9]{1,4})\b",
                           text, re.IGNORECASE)
        found = {(int(a or c), int(b or d)) for a, b, c, d in pairs}
    if not found and not re.search(r"\b(none|no)\b", text, re.IGNORECASE):
        return " ".join(text.casefold().split()).rstrip(".") or None
    return found


def split_answers(names, text):
    """{name: its answer, "" without one} in a free-form answer to these questions.

    Several questions are told apart by their numbers ("1." or "1)" at the beginning of a line; the
    last of equal numbers counts).
    """
    answers = {1: text}
    if len(names) > 1:
        pieces = re.split(r"^[ *]{0,4}([0-9]{1,2})[.):]", text, flags=re.MULTILINE)
        answers = {int(n): piece for n, piece in zip(pieces[1::2], pieces[2::2], strict=True)}
    return {name: answers.get(i, "") for i, name in enumerate(names, 1)}


@row_function
def score_perception(row, names, text):
    """Read a free-form answer to `perception_prompt(row, names)`: {question: is it exactly right?}

    What cannot be read is wrong; no text raises.
    """
    task, right = row["task"], {}
    for name, answer in split_answers(names or questions(row), text).items():
        read = partial(read_fact, name, actions=TASKS[task].actions)
        if name == "map":
            read = partial(read_state, task)
        said = read(text=answer)
        right[name] = said is not None and said == read(text=perception_target(row, (name,)))
    return right


# ---------------------------------------------------------------- prompts and targets
# All the words that a model reads are here and in the classes' rules, legend and questions. Each
# text is a function of a row.

PICTURE = "The picture shows the map."
SYMBOLS = "The map in symbols:"
ASK_MAP = (
    "Write down only the map: its size, then every row with its cells. The form, shown on another "
    "map:\n")
ASK_PLAN = (
    "Write down the map: its size, then every row with its cells. Then write one sentence that "
    "begins with Route: and names the start and, action by action, the position it leads to, as "
    "(row,column) counted from 0 at the top left. Then write the actions, separated by commas, "
    "inside <answer></answer>. The form, shown on another map:\n")
ASK_FACTS = (
    "Answer briefly: a size as 3x3, positions as (row,column) counted from 0 at the top left, "
    "actions by name, or none.")
HINT = "A reference plan: {plan}\nDo not mention that a reference plan is given."


def listing(cells):
    """The row-by-row text of a board: what the teacher reads and what a response states first."""
    lines = [f"Map: {len(cells)}x{len(cells[0])}"]
    for r, row in enumerate(cells):
        lines.append(f"row {r}: " + " ".join(row))
    return "\n".join(lines)


def describe(task, state):
    """A state as the symbols say it."""
    return listing(TASKS[task].cells(state))


@lru_cache
def example(task):
    """The row that stands as the worked example in every prompt of a task.

    A board of the smallest level with a short plan; `split_of` keeps it out of every split.
    """
    rng, rows = np.random.default_rng(0), []
    while len(rows) < 50:
        state = TASKS[task].sample(rng, TASKS[task].levels[0])
        plan = solve(task, state)
        if plan:
            rows.append({"task": task, "state": state, "plan": plan})
    return min(rows, key=lambda row: abs(len(row["plan"]) - 3))


def ask_map(row):
    return ASK_MAP + describe(row["task"], example(row["task"])["state"])


def ask_plan(row):
    return ASK_PLAN + response(example(row["task"]))


def legend(row):
    """What the student reads beside the picture, where the teacher has the symbols."""
    return f"{PICTURE} {TASKS[row['task']].legend}"


@row_function
def symbols(row):
    """What the teacher reads in the picture's place."""
    return f"{SYMBOLS}\n{describe(row['task'], row['state'])}"


@row_function
def student_prompt(row):
    """What the student reads beside the picture: rules and answer format, no fact of the state."""
    return "\n".join([TASKS[row["task"]].rules, legend(row), ask_plan(row)])


@row_function
def teacher_prompt(row, context="state+plan"):
    """The student's prompt with symbols in the picture's place. context: "state+plan" | "state"."""
    lines = [TASKS[row["task"]].rules, symbols(row)]
    if context == "state+plan":
        lines.append(HINT.format(plan=",".join(row["plan"])))
    return "\n".join([*lines, ask_plan(row)])


@row_function
def response(row):
    """The model response of three parts: the state, the route with its positions, the answer."""
    plan, path = row["plan"], trace(row["task"], row["state"], row["plan"])
    route = f"Route: from {places(path[:1])}"
    for action, before, pos in zip(plan, path, path[1:], strict=False):
        route += f" {action} {'at' if pos[:2] == before[:2] else 'to'} {places([pos])}"
    answer = f"<answer>{','.join(plan)}</answer>"
    return f"{describe(row['task'], row['state'])}\n{route}.\n{answer}"


@row_function
def questions(row):
    """The names of a row's perception questions; "map" asks for the state part of a response."""
    return ("map", *TASKS[row["task"]].questions)


@row_function
def perception_prompt(row, names=None, context=None):
    """Ask about the picture (or about the text `context`): one question plainly, several numbered.

    names: a tuple of `questions(row)`, default all.
    """
    names = names or questions(row)
    texts = {"map": ask_map(row), **TASKS[row["task"]].questions}
    lines = [TASKS[row["task"]].rules, context or legend(row)]
    if tuple(names) != ("map",):
        lines.append(ASK_FACTS)
    return "\n".join([*lines, numbered([texts[name] for name in names])])


@row_function
def perception_target(row, names=None):
    """The exact answer to `perception_prompt(row, names)`."""
    answers = {"map": describe(row["task"], row["state"]),
               **TASKS[row["task"]].facts(row["state"])}
    return numbered([answers[name] for name in names or questions(row)])


def numbered(lines):
    """One line as it is, several with their numbers."""
    if len(lines) == 1:
        return lines[0]
    return "\n".join(f"{i}. {line}" for i, line in enumerate(lines, 1))


def part_of(pieces):
    """Which part of a response each token belongs to. pieces: its tokens' texts -> into PARTS."""
    indices, text, current = [], "", 0
    for piece in pieces:
        text = text[-8:] + piece
        if "<answer" in text:
            current = 2
        elif "Route" in text:
            current = max(current, 1)
        indices.append(current)
    return indices


# ---------------------------------------------------------------- splits and sampling

@row_function
def key_of(row):
    """16 hex digits, the same for the same task and state."""
    return digest(row["task"], row["state"])


def split_of(task, state):
    """The split a state belongs to: a fixed function of its layout, 80% train, 10% val, 10% test.

    So no state is ever in two splits, whatever the seed, the counts or the run.
    """
    layout = TASKS[task].layout(state)
    if layout == TASKS[task].layout(example(task)["state"]):
        return "example"
    digest = hashlib.sha256(json.dumps(layout).encode()).hexdigest()
    return {8: "val", 9: "test"}.get(int(digest, 16) % 10, "train")


@lru_cache
def thirds(task, level, **options):
    """(a, b): a plan of up to a actions is easy, of up to b medium, a longer one hard.

    The borders that cut the plans of 1,000 random puzzles into the three most equal parts.
    """
    rng = np.random.default_rng(0)
    plans = [solve(task, TASKS[task].sample(rng, level, **options)) for _ in range(1000)]
    lengths = np.array([len(plan) for plan in plans if plan is not None])

    def unevenness(borders):
        edges = (0, borders[0] + 0.5, borders[1] + 0.5, np.inf)
        return np.var(np.histogram(lengths, edges)[0])
    return min(combinations_with_replacement(sorted(set(lengths.tolist())), 2), key=unevenness)


def bucket(length, borders):
    """The difficulty of a shortest plan of `length` actions between `thirds`' borders."""
    return DIFFICULTIES[int(np.searchsorted(borders, length))]


def sample_rows(task, level, split, number, seed, exclude=(), **options):
    """`number` rows with distinct solvable states of one split, a third of each difficulty.

    exclude: states (as `key_of`) that may not appear. Fails with the number of rows to be had.
    """
    rng = np.random.default_rng([seed, list(TASKS).index(task), level, SPLITS.index(split)])
    borders = thirds(task, level, **options)
    shares = np.array_split(np.arange(number), 3)
    wanted = {name: len(share) for name, share in zip(DIFFICULTIES, shares, strict=True)}
    found, latest = dict.fromkeys(wanted, 0), dict.fromkeys(wanted, 0)
    seen = set(exclude)
    for attempt in count():
        short = [name for name in wanted if found[name] < wanted[name]]
        if not short:
            return
        if attempt - min(latest[name] for name in short) > PATIENCE:
            fail(f"{task} level {level}: {number} {split} rows wanted, a third of each difficulty; "
                 f"only {3 * min(found.values())} distinct ones can be had: lower --{split}")
        state = TASKS[task].sample(rng, level, **options)
        if split_of(task, state) != split:
            continue
        key = key_of({"task": task, "state": state})
        plan = None if key in seen else solve(task, state)
        name = plan and bucket(len(plan), borders)
        if name not in short:
            continue
        seen.add(key)
        row_id = f"{task}_{level}_{sum(found.values()):05d}"
        found[name] += 1
        latest[name] = attempt
        yield {"file_name": f"{row_id}.png", "id": f"{split}_{row_id}", "task": task,
               "level": level, "seed": seed, "source": "gen_data.py", "bucket": name,
               "state": state, "plan": plan}


# ---------------------------------------------------------------- files

def may_write(out, overwrite):
    """Fails if there is a folder `out` that may not be replaced."""
    if Path(out).exists():
        if not overwrite:
            fail(f"{out} exists: choose another --out, or --overwrite to replace it")
        if not (Path(out) / "args.json").is_file():
            fail(f"{out} was not made by gen_data.py (it has no args.json): not replaced, choose "
                 "another --out")


@row_function
def row_fault(row):
    """What is wrong with a row, or None: its plan is executed. LookupError: it is not whole."""
    row["id"], row["level"]
    outcome = check(row["task"], row["state"], row["plan"])[0]
    if outcome != "success":
        return f"the plan of {row['id']} does not solve its puzzle: {outcome}"


def load_rows(data, split="*"):
    """Rows of data/<split> (default: of every split), each checked: a puzzle's plan is executed.

    A row that is broken stops here, with its line. Each gets "path", the file of its picture,
    which must lie beside the metadata, and "where" its line is; a pair gets "task" and "level" too.
    """
    files = sorted(Path(data).glob(f"{split}/metadata.jsonl"))
    if not files:
        fail(f"no {data}/{split}/metadata.jsonl: make the data with "
             f"`python gen_data.py --out {data}`")
    rows = []
    for file in files:
        for number, line in enumerate(file.read_bytes().splitlines(), 1):
            where = f"{file}, line {number}"
            try:
                row = json.loads(line)
                path = file.parent / row["file_name"]
                wrong = row_fault(row)
            except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
                fail(f"{where}: not a row ({type(error).__name__}: {error}); make the data again")
            if wrong:
                fail(f"{where}: {wrong}")
            if path.name != row["file_name"] or path.name == ".." or path.is_symlink():
                fail(f"{where}: the picture {row['file_name']!r} is not a file in {file.parent}")
            if is_pair(row):
                row |= {"task": row.get("group", "pairs"), "level": None}
                if not path.is_file():
                    fail(f"{where}: there is no picture {path}")
            rows.append(row | {"path": str(path), "where": where})
    if any(map(is_pair, rows)):  # gen_data.py's own ids are distinct
        check_ids(data)
    return rows


def check_ids(data):
    """Fails where two rows of a folder, whatever their splits, have the same id."""
    places = {}
    for file in sorted(Path(data).glob("*/metadata.jsonl")):
        for number, line in enumerate(file.read_bytes().splitlines(), 1):
            with suppress(ValueError, LookupError, TypeError, RecursionError):  # load_rows tells
                row_id, where = json.loads(line)["id"], f"{file}, line {number}"
                first = places.setdefault(row_id, where)
                if first != where:
                    fail(f"{where}: the id {row_id!r} is that of {first} too")


def open_picture(path):
    """The picture in a file, decoded. Fails if it is broken or too large to be decoded safely."""
    try:
        image = Image.open(path)
        if max(image.size) > MAX_PIXELS:
            fail(f"{path}: {image.width}x{image.height} px, wanted at most {MAX_PIXELS} a side")
        return image.convert("RGB")
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        fail(f"{path}: cannot be read as a picture ({error})")


def ensure(data, preset, seed):
    """Make the data of a preset if there is no folder `data`; else say how it was made."""
    settings = Path(data) / "args.json"
    if not Path(data).exists():
        words = ["--preset", preset, "--seed", str(seed), "--out", str(data)]
        print(f"no {data}: making it with `python gen_data.py {' '.join(words)}`", flush=True)
        code = subprocess.run([sys.executable, __file__, *words]).returncode  # without torch
        if code:
            raise SystemExit(code)
    elif settings.is_file():
        made = json.loads(settings.read_text(encoding="utf-8"))
        known = [key for key in ("benchmark", "source", "preset", "seed") if key in made]
        print(f"data: {data}, made with " + ", ".join(f"{key} {made[key]}" for key in known))


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
            tasks[name] = tuple(range(int(low), int(high or low) + 1) if levels else allowed)
        except ValueError:
            fail(f"cannot read the levels in {word!r}, wanted for example "
                 f"{name}:{allowed[0]}-{allowed[-1]}")
        if not tasks[name] or not set(tasks[name]) <= set(allowed):
            fail(f"{word}: {name} has levels {allowed[0]} to {allowed[-1]}")
    return tasks


def choose_rows(rows, tasks, limit=None):
    """The rows of these tasks ("maze", "maze:3-4"; default all), at most `limit` of a level."""
    levels, groups = tasks and parse_tasks(tasks), {}
    for row in rows:
        if not tasks or row["level"] in levels.get(row["task"], ()):
            groups.setdefault((row["task"], row["level"]), []).append(row)
    if not groups:
        words = f"--tasks {' '.join(tasks or TASKS)}"
        fail(f"{words}: the data has no such row; choose others or make them: "
             f"python gen_data.py {words} --out data/mine")
    return [row for group in groups.values() for row in group[:limit]]


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--preset", default="4b", help=f"sets the defaults below: {', '.join(PRESETS)}")
    add("--tasks", nargs="+", help="task, task:level or task:low-high (default: the preset's)")
    add("--train", type=int, help="rows per task and level; so too --val and --test")
    add("--val", type=int)
    add("--test", type=int)
    add("--cell_size", type=int, help="px a cell is drawn at")
    add("--image_size", type=int, help="px of the square the picture is resized to, 0: as drawn")
    for name, rules in TASKS.items():
        for flag, (default, text) in getattr(rules, "options", {}).items():
            add(f"--{flag}", type=type(default), default=default, help=f"{name}: {text}")
    add("--exclude", nargs="+", default=[], metavar="DIR",
        help="folders made by this script whose states may not appear")
    add("--seed", type=int, default=0, help="same seed, same bytes")
    add("--workers", type=int, default=os.cpu_count(),
        help="processes that draw; the bytes do not depend on it")
    add("--out", "--data", default="data", help="output folder")
    add("--overwrite", action="store_true", help="replace the output folder")
    add("--show", nargs="?", const="puzzles.png", metavar="PNG",
        help="only draw a contact sheet (puzzles.png) and print the prompts")
    args = parser.parse_args(argv)
    if args.preset not in PRESETS:
        fail(f"unknown preset {args.preset!r}, known: {', '.join(PRESETS)}")
    for name, value in PRESETS[args.preset].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if not isinstance(args.tasks, dict):
        args.tasks = parse_tasks(args.tasks)
    for name, value in vars(args).items():
        if isinstance(value, float) and not 0 <= value <= 1:
            fail(f"--{name} {value} is outside 0..1")
    least = {"cell_size": 8, "workers": 1}
    for name in ("train", "val", "test", "seed", "cell_size", "image_size", "workers"):
        if getattr(args, name) < least.get(name, 0):
            fail(f"--{name} {getattr(args, name)}: wanted at least {least.get(name, 0)}")
    if not args.show:
        may_write(args.out, args.overwrite)
    return args


def generated_rows(args, split, exclude=()):
    """The rows of one split, task by task and level by level."""
    for task, levels in args.tasks.items():
        options = {flag: getattr(args, flag) for flag in getattr(TASKS[task], "options", {})}
        for level in levels:
            yield from sample_rows(task, level, split, getattr(args, split), args.seed, exclude,
                                   **options)


def main(args):
    from tools import data_folder, show  # here, for they import this file
    if args.show:
        return show.show(args)
    exclude = {key_of(row) for folder in args.exclude for row in load_rows(folder)}
    splits = {split: generated_rows(args, split, exclude) for split in SPLITS}
    total = sum(map(len, args.tasks.values())) * (args.train + args.val + args.test)
    data_folder.write_dataset(args.out, splits, vars(args), args.cell_size, args.image_size,
                              args.workers, total)


if __name__ == "__main__":
    main(parse_args())
