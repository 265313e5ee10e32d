"""Grid puzzles: the rules, the prompts and the data of MGSD. Knows the puzzles, nothing of models.

A puzzle is a *state* (plain facts, JSON-serialisable). From it follow the picture the student sees
(`render`), the symbols the teacher reads (`describe`), the shortest plan (`solve`) and the verdict
on any other plan (`check`). The three tasks share one interface, `TASKS`; everything that can be
written once for all of them stands below the classes.

    python gen_data.py                                  # the paper's range -> data/{train,val,test}
    python gen_data.py --preset tiny --overwrite        # what the bundled tiny backbone is trained on
    python gen_data.py --tasks frozenlake:3-5 maze:4 --train 500 --out data/mine

Rows go to data/<split>/metadata.jsonl beside their PNGs (the "imagefolder" layout of `datasets`):
    {"file_name", "id", "task", "level", "seed", "state", "plan"}
A row holds facts only. Prompts are functions of a row, so changing one needs no new data.
Coordinates are (row, column), counted from 0 at the top left.
"""
import argparse
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
from collections import deque
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

MOVES = {"U": (-1, 0), "D": (1, 0), "L": (0, -1), "R": (0, 1)}
ACTIONS = (*MOVES, "PICK", "DROP")
HOLE_PROB = 0.18  # the share of holes in VSP's FrozenLake maps
SPLITS = ("train", "val", "test")

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
    print(f"error: {message}", file=sys.stderr)
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
        return paste_tiles([[("ice", {"S": "stool", "G": "goal", "H": "hole"}.get(cell), cell == "S" and "elf_down")
                             for cell in row] for row in state["grid"]], cell_size)

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
    questions = {"size": "How many rows and columns does the map have?",
                 "player": "Where is the start?",
                 "goal": "Where is the goal?",
                 "moves": "Which moves are possible from the start?"}

    @staticmethod
    def sample(rng, level):
        walls = np.full((level, level), 15)
        path = [tuple(int(x) for x in rng.integers(level, size=2))]
        seen = set(path)
        while path:  # a depth-first walk that opens a wall whenever it enters a new cell
            r, c = path[-1]
            free = [(a, neighbour((r, c), a)) for a in MOVES]
            free = [(a, new) for a, new in free if at(walls, new) is not None and new not in seen]
            if not free:
                path.pop()
                continue
            action, new = free[rng.integers(len(free))]
            walls[r, c] -= Maze.bits[action]
            walls[new] -= Maze.bits[{"U": "D", "D": "U", "L": "R", "R": "L"}[action]]
            seen.add(new)
            path.append(new)
        start, goal = (divmod(int(i), level) for i in rng.choice(level * level, 2, replace=False))
        return {"walls": walls.tolist(), "start": list(start), "goal": list(goal)}

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
        n, wall = len(state["walls"]), max(2, cell_size // 8)  # px; a wall is half on either side
        image = Image.new("RGB", (n * cell_size, n * cell_size), "black")
        draw = ImageDraw.Draw(image)

        def box(r, c, up, down, left, right):
            """Fill cell (r, c), inset from its four sides by so many px."""
            x, y = c * cell_size, r * cell_size
            return [x + left, y + up, x + cell_size - 1 - right, y + cell_size - 1 - down]

        half = wall // 2
        for r, row in enumerate(state["walls"]):
            for c, bits in enumerate(row):
                inset = [half if bits & Maze.bits[a] else 0 for a in "UDLR"]
                draw.rectangle(box(r, c, *[half] * 4), "white")
                for i, a in enumerate("UDLR"):  # open sides: the corridor runs on to the border
                    if not inset[i]:
                        draw.rectangle(box(r, c, *[0 if j == i else half for j in range(4)]), "white")
        for r, row in enumerate(state["walls"]):
            for c, bits in enumerate(row):  # a thin grey line where two cells join
                x, y = c * cell_size, r * cell_size
                if not bits & Maze.bits["R"]:
                    draw.line([x + cell_size, y + half, x + cell_size, y + cell_size - 1 - half], (200, 200, 200))
                if not bits & Maze.bits["D"]:
                    draw.line([x + half, y + cell_size, x + cell_size - 1 - half, y + cell_size], (200, 200, 200))
        for (r, c), colour in ((state["start"], (255, 215, 0)), (state["goal"], (30, 90, 255))):
            draw.ellipse(box(r, c, *[cell_size // 4] * 4), colour)
        return image

    @staticmethod
    def describe(state):
        mark = {tuple(state["start"]): "S", tuple(state["goal"]): "G"}
        return listing([[mark.get((r, c), ".") + Maze.open_sides(bits) for c, bits in enumerate(row)]
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
        beside = [at(state["grid"], neighbour(pos, a)) for a in MOVES]
        if action == "PICK":
            return ((r, c, 1), None) if phase == 0 and "P" in beside else (pos, "pick")
        if action == "DROP":
            return ((r, c, 2), None) if phase == 1 and "T" in beside else (pos, "drop")
        new = neighbour(pos, action)
        cell = at(state["grid"], new)
        fault = {None: "edge", "T": "table", "P": "printer" if phase == 0 else None}.get(cell)
        return (pos, fault) if fault else ((*new, phase), None)

    @staticmethod
    def done(state, pos):
        return pos[2] == 2

    @staticmethod
    def render(state, cell_size):
        n, s = len(state["grid"]), cell_size
        image = Image.new("RGB", (n * s, n * s), "black")
        draw = ImageDraw.Draw(image)
        for r, row in enumerate(state["grid"]):
            for c, cell in enumerate(row):
                x, y = c * s, r * s
                if cell == "T":
                    draw.rectangle([x, y, x + s - 1, y + s - 1], (210, 180, 140))
                draw.rectangle([x, y, x + s - 1, y + s - 1], outline=(70, 70, 70))
                if cell == "A":
                    draw.polygon([(x + s * 0.2, y + s * 0.2), (x + s * 0.8, y + s * 0.5), (x + s * 0.2, y + s * 0.8)], "red")
                if cell == "P":  # the icon: paper above, body below, a slot
                    draw.rectangle([x + s * 0.34, y + s * 0.2, x + s * 0.66, y + s * 0.45], "white")
                    draw.rectangle([x + s * 0.2, y + s * 0.42, x + s * 0.8, y + s * 0.78], "white")
                    draw.line([x + s * 0.3, y + s * 0.62, x + s * 0.7, y + s * 0.62], "black", max(1, s // 16))
        return image

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


@lru_cache
def tile(name, cell_size):
    """One tile of gymnasium's FrozenLake art, scaled with nearest-neighbour. RGBA."""
    import gymnasium
    path = Path(gymnasium.__file__).parent / "envs/toy_text/img" / f"{name}.png"
    return Image.open(path).convert("RGBA").resize((cell_size, cell_size), Image.NEAREST)


def paste_tiles(layers, cell_size):
    """A picture as VSP draws its maps: ground and object, a one-pixel outline, then the player."""
    image = Image.new("RGB", (len(layers[0]) * cell_size, len(layers) * cell_size))
    draw = ImageDraw.Draw(image)
    for r, row in enumerate(layers):
        for c, (ground, thing, player) in enumerate(row):
            x, y = c * cell_size, r * cell_size
            for name in filter(None, (ground, thing)):
                image.paste(tile(name, cell_size), (x, y), tile(name, cell_size))
            draw.rectangle([x, y, x + cell_size - 1, y + cell_size - 1], outline=(180, 200, 230))
            if player:
                image.paste(tile(player, cell_size), (x, y), tile(player, cell_size))
    return image


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


# ---------------------------------------------------------------- prompts and targets: functions of a row

PICTURE = "The picture shows the map."
ASK_MAP = "Write down the map: its size as in Map: 3x3, then every row with its cells as in row 0: and so on."
ASK_PLAN = (ASK_MAP + "\nThen write one sentence that begins with Route: and names, step by step, the action and the "
            "position it leads to, as (row,column) counted from 0.\nThen write the actions: <answer>U,R</answer>")
ASK_FACTS = "Answer briefly: a size as 3x3, positions as (row,column) counted from 0, actions by name, or none."


def symbols(row):
    return f"The map in symbols:\n{TASKS[row['task']].describe(row['state'])}"


def student_prompt(row):
    """What the student reads beside the picture: rules and answer format, no fact of the state."""
    return "\n".join([TASKS[row["task"]].rules, PICTURE, ASK_PLAN])


def teacher_prompt(row, context="state+plan"):
    """The same rules and format with the symbols in the picture's place. context: "state+plan" | "state"."""
    hint = f"\nA reference plan: {','.join(row['plan'])}\nDo not mention that a reference plan is given."
    return "\n".join([TASKS[row["task"]].rules, symbols(row) + (hint if context == "state+plan" else ""), ASK_PLAN])


def questions(task):
    """The names of a task's perception questions; "map" asks for the state part of a planning response."""
    return ("map", *TASKS[task].questions)


def perception_prompt(row, names=None, context=PICTURE):
    """Ask about the picture (or about `context`): one question plainly, several numbered. Default: all."""
    names = names or questions(row["task"])
    texts = {"map": ASK_MAP, **TASKS[row["task"]].questions}
    lines = [texts[name] for name in names]
    if len(lines) > 1:
        lines = [f"{i}. {line}" for i, line in enumerate(lines, 1)]
    return "\n".join([TASKS[row["task"]].rules, context, *([] if names == ("map",) else [ASK_FACTS]), *lines])


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
    pos = rules.start(row["state"])
    route = f"Route: from ({pos[0]},{pos[1]})"
    for action in plan:
        pos, _ = rules.step(row["state"], pos, action)
        route += f" {action} {'to' if action in MOVES else 'at'} ({pos[0]},{pos[1]})"
    return f"{rules.describe(row['state'])}\n{route}.\n<answer>{','.join(plan)}</answer>"


PARTS = ("state", "route", "answer")


def part_of(pieces):
    """Which part of a response each token belongs to. pieces: the tokens' texts -> indices into PARTS."""
    parts, text, current = [], "", 0
    for piece in pieces:
        text += piece
        if "<answer" in text:
            current = 2
        elif "Route" in text:
            current = max(current, 1)
        parts.append(current)
    return parts


# ---------------------------------------------------------------- splits and files

def split_of(task, state):
    """The split a state belongs to: a fixed function of its content, 80% train, 10% val, 10% test.

    So no state is ever in two splits, whatever the seed, the counts or the run. A maze goes by its
    walls alone (there are only 192 layouts of 3x3), so that whole layouts are held out.
    """
    key = json.dumps(state["walls"] if task == "maze" else state["grid"]).encode()
    return {8: "val", 9: "test"}.get(int(hashlib.sha256(key).hexdigest(), 16) % 10, "train")


def sample_rows(task, level, split, count, seed, hole_prob=HOLE_PROB):
    """`count` rows with distinct solvable states of one split. Fails with the number that can be had."""
    rng = np.random.default_rng([seed, list(TASKS).index(task), level, SPLITS.index(split)])
    extra = {"hole_prob": hole_prob} if task == "frozenlake" else {}
    seen, misses = set(), 0
    while len(seen) < count:
        state = TASKS[task].sample(rng, level, **extra)
        key = json.dumps(state)
        plan = solve(task, state) if key not in seen and split_of(task, state) == split else None
        if plan is None:
            misses += 1
            if misses > 20_000 + 20 * len(seen):
                fail(f"{task} level {level}: {count} {split} rows wanted, only {len(seen)} distinct ones found; "
                     f"lower --{split}")
            continue
        name = f"{task}_{level}_{len(seen):05d}"
        seen.add(key)
        misses = 0
        yield {"file_name": f"{name}.png", "id": f"{split}_{name}", "task": task, "level": level,
               "seed": seed, "state": state, "plan": plan}


def draw(row, folder, cell_size, image_size):
    """Write one row's PNG. image_size: px of the square it is resized to (Lanczos), 0 keeps the drawn size."""
    image = TASKS[row["task"]].render(row["state"], cell_size)
    if image_size:
        image = image.resize((image_size, image_size), Image.LANCZOS)
    image.save(Path(folder) / row["file_name"], compress_level=1)


def load_rows(data, split):
    """Rows of data/<split>; each gets "path", the file of its picture."""
    folder = Path(data) / split
    if not (folder / "metadata.jsonl").is_file():
        fail(f"no {folder}/metadata.jsonl: make the data with `python gen_data.py --out {data}`")
    with open(folder / "metadata.jsonl") as lines:
        return [row | {"path": str(folder / row["file_name"])} for row in map(json.loads, lines)]


def ensure(data, preset, seed):
    """Make the data of a preset if there is no folder `data`."""
    if not Path(data).exists():
        words = ["--preset", preset, "--seed", str(seed), "--out", str(data)]
        print(f"no {data}: making it with `python gen_data.py {' '.join(words)}`", flush=True)
        if code := subprocess.run([sys.executable, __file__, *words]).returncode:  # its workers need not import torch
            raise SystemExit(code)
    elif (Path(data) / "args.json").is_file():
        made = json.loads((Path(data) / "args.json").read_text())
        print(f"data: {data}, made with --preset {made['preset']} --seed {made['seed']}")


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
    add("--image_size", type=int, help="px of the square the picture is resized to, 0 keeps it as drawn")
    add("--hole_prob", type=float, default=HOLE_PROB, help="FrozenLake: share of holes")
    add("--seed", type=int, default=0, help="same seed, same bytes")
    add("--workers", type=int, default=os.cpu_count(), help="processes that draw; the bytes do not depend on it")
    add("--out", "--data", default="data", help="output folder")
    add("--overwrite", action="store_true", help="replace the output folder")
    args = parser.parse_args(argv)
    if args.preset not in PRESETS:
        fail(f"unknown preset {args.preset!r}, known: {', '.join(PRESETS)}")
    for name, value in PRESETS[args.preset].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if not isinstance(args.tasks, dict):
        args.tasks = parse_tasks(args.tasks)
    if not 0 <= args.hole_prob <= 1:
        fail(f"--hole_prob {args.hole_prob} is outside 0..1")
    if Path(args.out).exists() and not args.overwrite:
        fail(f"{args.out} exists: choose another --out, or --overwrite to replace it")
    if Path(args.out).exists() and not (Path(args.out) / "args.json").is_file():
        fail(f"{args.out} was not made by gen_data.py (it has no args.json): not replaced, choose another --out")
    return args


def main(args):
    # Everything is written aside and renamed at the end: the folder is complete or not there.
    partial_dir = Path(f"{args.out}.partial")
    shutil.rmtree(partial_dir, ignore_errors=True)
    total = sum(len(levels) for levels in args.tasks.values()) * (args.train + args.val + args.test)
    try:
        with multiprocessing.get_context("spawn").Pool(args.workers) as pool, \
                tqdm(total=total, desc="puzzles", unit="row") as bar:
            for split in SPLITS:
                folder = partial_dir / split
                folder.mkdir(parents=True)
                with open(folder / "metadata.jsonl", "w") as out:
                    for task, levels in args.tasks.items():
                        for level in levels:
                            rows = list(sample_rows(task, level, split, getattr(args, split), args.seed, args.hole_prob))
                            out.writelines(json.dumps(row) + "\n" for row in rows)
                            job = partial(draw, folder=folder, cell_size=args.cell_size, image_size=args.image_size)
                            for _ in pool.imap(job, rows, chunksize=32):
                                bar.update()
        (partial_dir / "args.json").write_text(json.dumps(vars(args), indent=1))
        if Path(args.out).exists():
            shutil.rmtree(args.out)
        partial_dir.rename(args.out)
    finally:
        shutil.rmtree(partial_dir, ignore_errors=True)
    print(f"{total} puzzles in {args.out}")


if __name__ == "__main__":
    main(parse_args())
