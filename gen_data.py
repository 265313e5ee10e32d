"""Grid puzzles: the rules, the prompts and the data of MGSD. Knows the puzzles, nothing of models.

A puzzle is an object whose fields are the facts of its state. From it follow the picture the
student sees (`render`), the symbols the teacher reads (`listing`), the shortest plan (`solve`) and
the verdict on any other plan (`check`). A task is its class, in `TASKS`; what can be written once
for all of them stands below the classes.

    python gen_data.py                                # what the bundled tiny backbone learns from
    python gen_data.py --preset 4b                    # the paper's range -> data/qwen
    python gen_data.py --tasks frozenlake:3-5 maze:4 --train 500 --out data/mine
    python -m tools.check data/mine --html mine.html  # look: pictures, plans and every prompt
    python -m tools.benchmarks --help                 # public benchmarks as rows of the split test

In this file, in this order:
    FrozenLake, Maze, MiniBehaviour                   the tasks, each beside its picture
    solve, execute, check                             solver and judge share `step`
    read_answer, read_map, read_facts                 what a response says
    COMPARE                                           when an answer of one's own rows is right
    PuzzleRow, OwnRow                                 rows: prompts, reference answers, verdicts
    split_of, sample_rows                             which puzzle is in which split
    load_rows, write_dataset, ensure                  the data folder
    PRESETS, main                                     the command above
    fail, Parser, write_text, ...                     what all scripts share and needs no torch
Rows go to data/<name>/<split>/metadata.jsonl beside their PNGs (the "imagefolder" layout of
`datasets`):
    {"file_name", "id", "task", "level", "seed", "source", "bucket", "state", "plan"}
`level` is the board's size, `bucket` the difficulty (easy, medium, hard) by the length of the
shortest plan. A row holds facts only. Prompts are functions of a row, so changing one needs no new
data. Coordinates are (row, column), counted from 0 at the top left. Rows of a user's own have a
"prompt" in place of task, state and plan: see `OwnRow`.
"""
import argparse
import contextlib
import difflib
import errno
import hashlib
import json
import math
import os
import re
import shutil
import sys
import tempfile
import unicodedata
import zlib
from collections import Counter, deque
from dataclasses import asdict, dataclass
from decimal import Decimal
from functools import lru_cache
from itertools import combinations_with_replacement
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout
from PIL import Image, ImageDraw, ImageOps
from tqdm import tqdm

# ---------------------------------------------------------------- the tasks
# A task is a dataclass with the names below, in TASKS; no other line knows it. Its fields are the
# state as it stands in a row, so they hold what JSON can; what is no field has no annotation.
#
#   levels: range                   board sizes it can make
#   rules, legend: text             what both roles read; what the things in the picture look like
#   actions: tuple                  in the solver's order; upper case, without blanks
#   questions: {name: text}         about the picture; the question "map" is common to all
#   sample(rng, level) -> puzzle
#   read(cells) -> puzzle           the way back from `cells`; None if there is no world to plan in
#   start_pos() -> pos              a tuple; it begins with the row and the column
#   step(pos, action) -> (pos, violation or None);  done(pos) -> bool
#   render(cell_size) -> PIL.Image
#   cells() -> [[text]]             the board as the symbols say it: upper case, without blanks
#   facts() -> {name: answer}       to `questions`; see read_facts for how answers are compared
#   layout()                        what a split goes by

MOVES = {"U": (-1, 0), "D": (1, 0), "L": (0, -1), "R": (0, 1)}
ASK_SIZE = "How many rows and columns does the map have?"


@dataclass
class FrozenLake:
    """Cross the ice from S to G without falling into a hole.

    The rules are those of gymnasium's FrozenLake-v1 with is_slippery=False, except that leaving the
    board is the violation "edge" (gymnasium stays where it is).
    """
    grid: list  # ["SFH", "FFF", "HFG"]
    levels = range(3, 9)
    hole_prob = 0.18  # share of holes, as in VSP's maps
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

    @classmethod
    def sample(cls, rng, level):
        cells = np.where(rng.random(level * level) < cls.hole_prob, "H", "F")
        cells[rng.choice(level * level, 2, replace=False)] = ["S", "G"]
        return cls(["".join(row) for row in cells.reshape(level, level)])

    @classmethod
    def read(cls, cells):
        return cls(["".join(row) for row in cells]) if is_board(cells, "SG", "FH") else None

    def start_pos(self):
        return find(self.grid, "S")[0]

    def step(self, pos, action):
        new = neighbour(pos, action)
        cell = at(self.grid, new)
        if cell is None:
            return pos, "edge"
        return new, "hole" if cell == "H" else None

    def done(self, pos):
        return at(self.grid, pos) == "G"

    def render(self, cell_size):
        return assemble(self.grid, lake_tile, cell_size)

    def cells(self):
        return [list(row) for row in self.grid]

    def facts(self):
        grid = self.grid
        return {"size": f"{len(grid)}x{len(grid)}", "player": places(find(grid, "S")),
                "goal": places(find(grid, "G")), "holes": places(find(grid, "H"))}

    def layout(self):
        return self.grid


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


@dataclass
class Maze:
    """Walk from the start to the goal of a perfect maze (one path between any two cells)."""
    walls: list  # [[bits]], of a cell's walls: N=1 S=2 W=4 E=8
    start: list  # [row, column]
    goal: list
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

    @classmethod
    def sample(cls, rng, level):
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
            walls[r][c] -= cls.bits[action]
            walls[new[0]][new[1]] -= cls.bits[cls.opposite[action]]
            seen.add(new)
            path.append(new)
        return cls(walls, list(start), list(goal))

    @classmethod
    def read(cls, cells):
        """It is read as it stands: two sides of a border that disagree go on disagreeing."""
        marks, walls = [], []
        for row in cells:
            if not set("".join(cell[1:] for cell in row)) <= set(MOVES):
                return None
            marks.append([cell[0] for cell in row])
            walls.append([15 - sum(cls.bits[side] for side in set(cell[1:])) for cell in row])
        if not is_board(marks, "SG", "."):
            return None
        return cls(walls, list(find(marks, "S")[0]), list(find(marks, "G")[0]))

    def start_pos(self):
        return tuple(self.start)

    def step(self, pos, action):
        new = neighbour(pos, action)
        if at(self.walls, new) is None:
            return pos, "edge"
        if at(self.walls, pos) & self.bits[action]:
            return pos, "wall"
        return new, None

    def done(self, pos):
        return pos == tuple(self.goal)

    def render(self, cell_size):
        return assemble(self.cells(), maze_tile, cell_size)

    def cells(self):
        marks, cells = {tuple(self.start): "S", tuple(self.goal): "G"}, []
        for r, row in enumerate(self.walls):
            row_of_cells = [(r, c) for c in range(len(row))]
            cells.append([marks.get(pos, ".") + self.open_sides(pos) for pos in row_of_cells])
        return cells

    def facts(self):
        n = len(self.walls)
        return {"size": f"{n}x{n}", "player": places([self.start]), "goal": places([self.goal]),
                "moves": ", ".join(self.open_sides(self.start))}

    def layout(self):
        return self.walls  # not the ends: whole layouts are held out (there are 192 of 3x3)

    def open_sides(self, pos):
        return "".join(side for side in MOVES if not at(self.walls, pos) & self.bits[side])


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


@dataclass
class MiniBehaviour:
    """Fetch the printer and put it on the table.

    A position is (row, column, phase): phase 0 before PICK, 1 carrying, 2 after DROP. The printer
    blocks its cell until it was picked up and not after.
    """
    grid: list  # ["A...", "..P.", "TTT.", "TTT."]
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

    @classmethod
    def sample(cls, rng, level):
        grid = np.full((level, level), ".")
        r, c = rng.integers(level - 1), rng.integers(level - 2)
        grid[r:r + 2, c:c + 3] = "T"
        floor = np.argwhere(grid == ".")
        for mark, i in zip("AP", rng.choice(len(floor), 2, replace=False), strict=True):
            grid[tuple(floor[i])] = mark
        return cls(["".join(row) for row in grid])

    @classmethod
    def read(cls, cells):
        if not is_board(cells, "AP", "T.") or not find(cells, "T"):
            return None
        return cls(["".join(row) for row in cells])

    def start_pos(self):
        return (*find(self.grid, "A")[0], 0)

    def step(self, pos, action):
        r, c, phase = pos
        if action in ("PICK", "DROP"):
            when, thing = (0, "P") if action == "PICK" else (1, "T")
            possible = phase == when and touches(self.grid, (r, c), thing)
            return ((r, c, phase + 1), None) if possible else (pos, action.lower())
        new = neighbour(pos, action)
        cell = at(self.grid, new)
        if cell == "P" and phase > 0:
            cell = "."
        violation = {None: "edge", "T": "table", "P": "printer"}.get(cell)
        return (pos, violation) if violation else ((*new, phase), None)

    def done(self, pos):
        return pos[2] == 2

    def render(self, cell_size):
        return assemble(self.grid, office_tile, cell_size)

    def cells(self):
        return [list(row) for row in self.grid]

    def facts(self):
        grid, start = self.grid, self.start_pos()
        free = sorted(find(grid, ".") + find(grid, "A"))
        legal = [action for action in self.actions if self.step(start, action)[1] is None]
        return {"size": f"{len(grid)}x{len(grid)}", "agent": places([start]),
                "printer": places(find(grid, "P")), "table": places(find(grid, "T")),
                "near_printer": places([pos for pos in free if touches(grid, pos, "P")]),
                "near_table": places([pos for pos in free if touches(grid, pos, "T")]),
                "moves": ", ".join(legal) or "none"}

    def layout(self):
        return self.grid


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


def assemble(cells, tile, cell_size):
    """The picture of a board. tile(cell, cell_size) -> Image [cell_size, cell_size]"""
    picture = Image.new("RGB", (len(cells[0]) * cell_size, len(cells) * cell_size))
    for r, row in enumerate(cells):
        for c, cell in enumerate(row):
            picture.paste(tile(cell, cell_size), (c * cell_size, r * cell_size))
    return picture


# ---------------------------------------------------------------- solver and judge, for all tasks

def solve(puzzle):
    """The first shortest plan in the order of the task's actions (breadth-first), None if none."""
    start = puzzle.start_pos()
    came_from, queue = {start: None}, deque([start])
    while queue:
        pos = queue.popleft()
        if puzzle.done(pos):
            plan = []
            while came_from[pos]:
                pos, action = came_from[pos]
                plan.append(action)
            return plan[::-1]
        for action in puzzle.actions:
            new, violation = puzzle.step(pos, action)
            if violation is None and new not in came_from:
                came_from[new] = (pos, action)
                queue.append(new)
    return None


def execute(puzzle, plan):
    """(the positions a plan visits, the start first; the violation that ended it, or None).

    An episode ends when the goal is reached, as in gymnasium: actions after that are not executed.
    """
    path = [puzzle.start_pos()]
    for action in plan:
        if puzzle.done(path[-1]):
            break
        if action not in puzzle.actions:
            return path, "no such action"
        pos, violation = puzzle.step(path[-1], action)
        if violation:
            return path, violation
        path.append(pos)
    return path, None


def check(puzzle, plan):
    """(outcome, executed steps) of a plan; the step that is a violation is not counted.

    outcome: "success", the name of the violation, "unfinished", or for plan None "no answer".
    """
    if plan is None:
        return "no answer", 0
    path, violation = execute(puzzle, plan)
    outcome = violation or ("success" if puzzle.done(path[-1]) else "unfinished")
    return outcome, len(path) - 1


# ---------------------------------------------------------------- reading responses

# What servers and saved files leave at the end of a response: <|im_end|>, </s>, ...
SPECIAL_TOKEN = re.compile(r"(<[|｜][^<>|｜\s]+[|｜]>|</s>|<eos>|<end_of_turn>)")


def after_thinking(text):
    """The reply in a response: what follows the last </think>; "" where a <think> stays open.

    The opening mark need not be there: templates of thinking models write it into the prompt.
    Special tokens at the end are no part of the reply.
    """
    reply = text.rpartition("</think>")[2]
    if "<think>" in reply:
        return ""
    pieces = SPECIAL_TOKEN.split(reply)  # text, token, text, ..., token, text
    while len(pieces) > 1 and not pieces[-1].strip():
        del pieces[-2:]
    return "".join(pieces)


def read_answer(text, cut=False):
    """What a response answers: what its last <answer> holds up to </answer>; None without one.

    Thinking never answers. A response that was cut (no EOS within the limit) answers only if it
    ends with the tag: what it repeats of its prompt, or drafts, is no answer.
    """
    _, opening, rest = after_thinking(text).rpartition("<answer>")
    body, closing, rest = rest.rpartition("</answer>")
    if not opening or not closing or (cut and rest.strip()):
        return None
    return body


def any_of(names):
    """An expression for any of the names, the longest first."""
    return "|".join(map(re.escape, sorted(names, key=len, reverse=True)))


def read_actions(text, actions):
    """The actions of a text of their names, commas and blanks and nothing else; else None."""
    text = text.upper().replace(",", " ")
    found = re.findall(any_of(actions), text)
    return found if found and "".join(found) == "".join(text.split()) else None


def parse(task, text, cut=False):
    """The actions that a response answers with, None if there are none or its answer holds more.

    They are separated by commas, blanks or nothing ("UUR"), in either case. What other models write
    is read by `tools.lenient.parse`. cut: see `read_answer`.
    """
    return read_actions(read_answer(text, cut) or "", TASKS[task].actions)


def read_map(task, text):
    """The puzzle of the first map in a text, where its lines are those of `listing`; else None.

    Case and the number of blanks do not count.
    """
    text = "\n".join(" ".join(line.upper().split()) for line in text.splitlines())
    head = re.search(r"^MAP: ([0-9]{1,2})X", text, re.MULTILINE)
    if not head:
        return None
    lines = text[head.start():].splitlines()[:int(head[1]) + 1]
    cells = [line.partition(": ")[2].split() for line in lines[1:]]
    if not cells or listing(cells).upper() != "\n".join(lines):
        return None
    return TASKS[task].read(cells)


def read_facts(name, text, actions):
    """{"(0,1)", "(2,2)"}, {"3x3"} or, of the question "moves", {"U", "L"}: what an answer mentions.

    It is read in the form that `ASK_FACTS` asks for, in any order; all that is mentioned counts.
    Empty where the answer is in words, such as none.
    """
    if name == "moves":
        return set(re.findall(rf"\b(?:{any_of(actions)})\b", text.upper()))
    found = re.findall(r"\( ?[0-9]+ ?, ?[0-9]+ ?\)", text)
    found = found or re.findall(r"\b[0-9]+ ?x ?[0-9]+\b", text.lower())
    return {fact.replace(" ", "") for fact in found}


def split_answers(names, text):
    """{name: its answer, "" without one} in an answer to these questions.

    Several are told apart by their numbers ("1. " at the beginning of a line).
    """
    if len(names) == 1:
        return {names[0]: text}
    pieces = re.split(r"^[*_ ]{0,3}([0-9]{1,2})[.)][*_]{0,3} ", text, flags=re.MULTILINE)
    answers = dict(zip(pieces[1::2], pieces[2::2], strict=True))
    return {name: answers.get(str(i), "") for i, name in enumerate(names, 1)}


# ---------------------------------------------------------------- answers in words and numbers
# One rule for whatever a row of one's own is compared by. A base that was never trained writes
# "The answer is **B**." where a trained student writes <answer>B</answer>: both have to count.

PLACE = re.compile(  # where an answer begins; of \boxed{\text{B}} all of it
    r"\\boxed\{(?:\\(?:text|math)\w*\{)?(?P<boxed>(?:[^{}]|\{[^{}]*\})*)\}"
    r"|\banswer(?: is\b|[\"'*_ ]*:)[*_:\s]*", re.IGNORECASE)
NUMBER = (r"[-–−+]?(?=\.?[0-9])(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)?(?:\.[0-9]+)?"
          r"(?:[eE][-+]?[0-9]{1,3})?")
FULL_WIDTH = {0x3000: " "} | {code: chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)}


def final_answer(text):
    """What follows the last "answer is" or "answer:", or is boxed, in a text; else all of it.

    Full-width forms are made plain and accents composed, nothing else: 5² stays what it is.
    """
    text = unicodedata.normalize("NFC", text.translate(FULL_WIDTH)).strip()
    found = list(PLACE.finditer(text))
    if not found:
        return text
    said = found[-1]["boxed"] or text[found[-1].end():].partition("\n")[0]
    return said.strip() or text


def is_around(mark):
    """May this character stand around an answer? Blanks, punctuation of any script, `B`, $B$.

    Not what Unicode counts as punctuation though it has a meaning: 5%, C#.
    """
    if mark in "#%&@/":
        return False
    return mark.isspace() or mark in "`$" or unicodedata.category(mark).startswith("P")


def alone(form, text):
    """The first match of an expression, if a text has nothing but punctuation around it; or None.

    A sign or a point right before it belongs to it: -3 and .3 are not 3.
    """
    found = re.search(form, text)
    if not found:
        return None
    before, after = text[:found.start()], text[found.end():]
    attached = re.split(r"\s", before)[-1]
    if set("-–.") & set(attached) or not all(map(is_around, before + after)):
        return None
    return found[0]


def plain(text):
    """A text without case, its blanks in one form, without a final full stop if there is more."""
    text = " ".join(text.casefold().split())
    return text.removesuffix(".") or text


def read_number(text):
    """The number that a text is ("-3", "1,200.5", "2e-3", "**4**."), or None."""
    number = alone(NUMBER, text)
    return number and Decimal(re.sub("[–−]", "-", number.replace(",", "")))


def same_words(said, wanted, tolerance):
    return alone(re.escape(plain(wanted)), plain(said)) is not None


def same_number(said, wanted, tolerance):
    number = read_number(said)
    return number is not None and abs(number - read_number(wanted)) <= Decimal(str(tolerance))


def same_letters(said, wanted, tolerance):
    return alone(re.escape(wanted), said) is not None


# What a row's "compare" may be: {name: function(said, wanted, tolerance) -> is it right?} of two
# texts as `final_answer` returns them. A scorer of one's own is a function and a line here.
COMPARE = {"words": same_words, "number": same_number, "exact": same_letters}


def same_answer(said, wanted, compare="words", tolerance=0):
    """Is an answer right? Both are texts; compare: a name in COMPARE; an empty answer never is."""
    said = final_answer(said)
    return bool(said) and COMPARE[compare](said, final_answer(wanted), tolerance)


# ---------------------------------------------------------------- parts of a response

PARTS = ("map", "route", "answer")


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


# ---------------------------------------------------------------- rows
# All the words that a model reads are here and in the tasks' rules, legend and questions.

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
ASK_SYMBOLS = "Write down what the picture shows, in symbols and completely."


def listing(cells):
    """The row-by-row text of a board: what the teacher reads and what a response states first."""
    lines = [f"Map: {len(cells)}x{len(cells[0])}"]
    for r, row in enumerate(cells):
        lines.append(f"row {r}: " + " ".join(row))
    return "\n".join(lines)


def reference_response(puzzle, plan):
    """The model response of three parts: the map, the route with its positions, the answer."""
    path, _ = execute(puzzle, plan)
    route = f"Route: from {places(path[:1])}"
    for action, before, pos in zip(plan, path, path[1:], strict=False):
        route += f" {action} {'at' if pos[:2] == before[:2] else 'to'} {places([pos])}"
    return f"{listing(puzzle.cells())}\n{route}.\n<answer>{','.join(plan)}</answer>"


@lru_cache
def example(task):
    """(puzzle, plan): the worked example in every prompt of a task.

    A board of the smallest size with a short plan; `split_of` keeps it out of every split.
    """
    rng, found = np.random.default_rng(0), []
    while len(found) < 50:
        puzzle = TASKS[task].sample(rng, TASKS[task].levels[0])
        plan = solve(puzzle)
        if plan:
            found.append((puzzle, plan))
    return min(found, key=lambda pair: abs(len(pair[1]) - 3))


def numbered(lines):
    """One line as it is, several with their numbers."""
    if len(lines) == 1:
        return lines[0]
    return "\n".join(f"{i}. {line}" for i, line in enumerate(lines, 1))


class Row:
    """A row of the data: a picture, what it shows in symbols, questions about it, an answer.

    id, task, level (board size) and bucket (difficulty) tell rows apart; path is the file of the
    picture, teacher_path that of the teacher's own or None, where the place of the row's line, data
    the line itself. own: is it a user's, which has no board size and no plan? A kind of row has its
    own student_prompt, teacher_prompt, symbols, response, questions, is_right, in_form, judge,
    key and fault.
    """
    own, level, bucket, teacher_path = False, None, None, None

    def __init__(self, data, path=None, where=None):
        """LookupError, TypeError, ValueError: the line does not hold what a row needs."""
        self.data, self.path, self.where = without_nulls(data), path, where
        self.id = self.data["id"]

    def pictures(self):
        """The files of the row."""
        return [self.path, self.teacher_path] if self.teacher_path else [self.path]

    def teacher_picture(self, reads):
        """The file of the picture beside `teacher_prompt(reads)`, or None.

        The teacher's own wherever the row has one; else "picture" is the student's.
        """
        return self.teacher_path or (self.path if reads == "picture" else None)

    def introduction(self, names, symbols):
        """The lines above questions. symbols: a text in the picture's place, or None."""
        return [symbols] if symbols else []

    def ask(self, names=None, symbols=None):
        """Ask perception questions: one plainly, several numbered. names: default all.

        symbols: a text in the picture's place; default the picture.
        """
        questions = self.questions()
        names = names or tuple(questions)
        texts = [questions[name][0] for name in names]
        return "\n".join([*self.introduction(names, symbols), numbered(texts)])

    def answers(self, names=None):
        """The exact answer to `ask(names)`."""
        questions = self.questions()
        return numbered([questions[name][1] for name in names or questions])

    def score(self, names, text):
        """Read an answer to `ask(names)`: {question: is it exactly right?}; no text raises."""
        names = names or tuple(self.questions())
        said = split_answers(names, after_thinking(text))
        wanted = split_answers(names, self.answers(names))  # an answer may have numbered lines too
        return {name: self.is_right(name, said[name], wanted[name]) for name in names}


def without_nulls(value):
    """A JSON value without the fields that are null, at every level: they are absent."""
    if isinstance(value, dict):
        return {name: without_nulls(item) for name, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value


class PuzzleRow(Row):
    """A puzzle with its shortest plan."""

    def __init__(self, data, path=None, where=None):
        super().__init__(data, path, where)
        self.task, self.level = self.data["task"], self.data["level"]
        self.bucket, self.plan = self.data.get("bucket"), self.data["plan"]
        self.puzzle = TASKS[self.task](**self.data["state"])

    def fault(self):
        """What is wrong with the row, or None. What it states is checked by the solver."""
        cells = self.puzzle.cells()
        if TASKS[self.task].read(cells) != self.puzzle:
            return f"its state is no board of {self.task}"
        if self.level not in (len(cells), len(cells[0])):
            return f'"level" is {self.level!r}, the board is {len(cells)}x{len(cells[0])}'
        if not isinstance(self.plan, list):
            return f'"plan": wanted a list of actions, got {self.plan!r:.60}'
        outcome = check(self.puzzle, self.plan)[0]
        if outcome != "success":
            return f"the plan of {self.id} does not solve its puzzle: {outcome}"
        shortest = solve(self.puzzle)
        if len(self.plan) > len(shortest):
            return (f"the plan of {self.id} has {len(self.plan)} actions, the shortest has "
                    f"{len(shortest)}: {','.join(shortest)}")

    def key(self):
        """16 hex digits, the same for the same task and state."""
        return digest(self.task, asdict(self.puzzle))

    def picture_and_legend(self):
        """What the student reads beside the picture, where the teacher has the symbols."""
        return f"{PICTURE} {self.puzzle.legend}"

    def symbols(self):
        """What the teacher reads in the picture's place."""
        return f"{SYMBOLS}\n{listing(self.puzzle.cells())}"

    def ask_plan(self):
        return ASK_PLAN + reference_response(*example(self.task))

    def student_prompt(self):
        """What the student reads beside the picture: rules and form, no fact of the state."""
        return "\n".join([self.puzzle.rules, self.picture_and_legend(), self.ask_plan()])

    def teacher_prompt(self, reads):
        """The student's prompt with symbols in the picture's place.

        reads: "symbols+plan", "symbols", or "picture": as the student's.
        """
        if reads == "picture":
            return self.student_prompt()
        lines = [self.puzzle.rules, self.symbols()]
        if reads == "symbols+plan":
            lines.append(HINT.format(plan=",".join(self.plan)))
        return "\n".join([*lines, self.ask_plan()])

    def response(self):
        """The reference response."""
        return reference_response(self.puzzle, self.plan)

    def questions(self):
        """{name: (question, answer)}; "map" asks for the map of a response."""
        shown = listing(example(self.task)[0].cells())
        questions = {"map": (ASK_MAP + shown, listing(self.puzzle.cells()))}
        facts = self.puzzle.facts()
        for name, text in self.puzzle.questions.items():
            questions[name] = (text, facts[name])
        return questions

    def introduction(self, names, symbols):
        lines = [self.puzzle.rules, symbols or self.picture_and_legend()]
        return lines if tuple(names) == ("map",) else [*lines, ASK_FACTS]

    def is_right(self, name, said, wanted):
        """Does an answer to the question `name` say the same as the right one?"""
        if name == "map":
            return read_map(self.task, said) == self.puzzle
        facts = read_facts(name, wanted, self.puzzle.actions)
        if facts:
            return read_facts(name, said, self.puzzle.actions) == facts
        return same_answer(said, wanted)

    def in_form(self, name, text):
        """Has an answer to the question `name` the form that was asked for?"""
        said = after_thinking(text)
        if name == "map":
            return read_map(self.task, said) is not None
        return bool(read_facts(name, said, self.puzzle.actions)) or same_answer(said, "none")

    def judge(self, text, parse=parse, cut=False):
        """What a response is worth: its plan, how it ends, the map it describes and if it is right.

        optimal: it succeeds, and as many steps were executed as the shortest plan has. What is
        written after the goal was reached is not executed and does not count; overrun: there is
        such. parse(task, text, cut): the reader. cut: was the response?
        """
        plan, read = parse(self.task, text, cut), read_map(self.task, after_thinking(text))
        outcome, executed = check(self.puzzle, plan)
        return {"plan": plan, "outcome": outcome,
                "optimal": outcome == "success" and executed == len(self.plan),
                "overrun": outcome == "success" and executed < len(plan),
                "map": read and asdict(read), "map_right": read == self.puzzle}


OWN_FIELDS = ("file_name", "id", "prompt", "symbols", "teacher_file_name", "hint", "answer",
              "compare", "tolerance", "questions", "group")


class OwnRow(Row):
    """A row of a user's own: a picture, and what it shows as symbols or as a better picture.

        {"file_name", "id", "prompt"} with "symbols" or "teacher_file_name" (or both), optionally
        "hint"       what only the teacher may read, with "symbols+plan"
        "answer"     what a response is compared with: a text, a list of texts, a number
        "compare"    how, a name in COMPARE: "words", or "number" where the answer is one
        "tolerance"  how far a number may be off
        "questions"  [{"question", "answer"}] of the cold start, else it asks for the symbols
        "group"      rows that are counted together
    Texts reach the model as they stand. task is the group.
    """
    own = True

    def __init__(self, data, path=None, where=None):
        super().__init__(data, path, where)
        self.task = self.data.get("group", "own")
        number = isinstance(self.data.get("answer"), (int, float))
        self.compare = self.data.get("compare", "number" if number else "words")
        self.seen = None  # its key, once it was asked for

    def answer_texts(self):
        """The answers that are right, as texts; none if the row has no answer."""
        answers = self.data.get("answer", [])
        answers = answers if isinstance(answers, list) else [answers]
        return [str(text) if isinstance(text, (int, float)) else text for text in answers]

    def fault(self):
        """What is wrong with the row, or None."""
        for name in self.data:
            meant = difflib.get_close_matches(name, OWN_FIELDS, 1, 0.82)
            if meant and name not in OWN_FIELDS:  # fields of quite other names are the user's own
                return f'"{name}": is "{meant[0]}" meant? Else give it another name'
        if "symbols" not in self.data and "teacher_file_name" not in self.data:
            return ('neither "symbols" nor "teacher_file_name" (a cleaner picture for the teacher, '
                    "with --teacher_reads picture)")
        asked = self.data.get("questions", [])
        if not isinstance(asked, list) or not all(isinstance(pair, dict) for pair in asked):
            return '"questions": wanted a list of {"question", "answer"}'
        if self.task in (*TASKS, "macro"):
            return f'"group": {self.task} is the name of a task: choose another'
        return self.fault_of_texts() or self.fault_of_answer()

    def fault_of_texts(self):
        """What is wrong with what models read, or None."""
        texts = [("id", self.id), ("prompt", self.data.get("prompt")), ("group", self.task)]
        texts += [(name, self.data[name]) for name in ("symbols", "hint") if name in self.data]
        texts += [("answer", text) for text in self.answer_texts()]
        for pair in self.data.get("questions", []):
            texts += [("question", pair.get("question")), ("answer", pair.get("answer"))]
        for name, text in texts:
            if not isinstance(text, str) or not text.strip():
                return f'"{name}": wanted a text, got {text!r:.60}'
            if special := re.search(r"<\|\w+\|>", text):
                return f'"{name}" holds {special[0]}, which the model would not read as text'
            if name in ("prompt", "question") and (tag := re.search("<(image|video)>", text)):
                return f'"{name}" holds {tag[0]}: leave it out, the picture comes before the text'
            text.encode()  # half a surrogate pair is no text either: ValueError

    def fault_of_answer(self):
        """What is wrong with what responses are compared with, or None."""
        answers, tolerance = self.answer_texts(), self.data.get("tolerance", 0)
        if self.compare not in COMPARE:
            return f'"compare": wanted one of {", ".join(COMPARE)}, got {self.compare!r:.60}'
        if "answer" in self.data and not answers:
            return '"answer": wanted at least one'
        if any(re.search("</?answer>", text) for text in answers):
            return '"answer" holds the tag <answer>: write only what stands inside it'
        if self.compare == "number" and None in map(read_number, answers):
            return f'"answer": wanted a number, as "compare" says, got {self.data["answer"]!r:.60}'
        if isinstance(tolerance, bool) or not isinstance(tolerance, (int, float)) \
                or not 0 <= tolerance < math.inf:
            return f'"tolerance": wanted a number, at least 0, got {tolerance!r:.60}'

    def key(self):
        """The same for rows in which the student sees and reads the same, pixel by pixel."""
        if self.seen is None:
            image = open_picture(self.path)
            pixels = hashlib.sha256(image.tobytes()).hexdigest()
            self.seen = f"picture {digest(image.size, pixels, self.data['prompt'])}"
        return self.seen

    def symbols(self):
        """None where the teacher has a picture alone."""
        return self.data.get("symbols")

    def student_prompt(self):
        return self.data["prompt"]

    def teacher_prompt(self, reads):
        """reads: as a puzzle's; the hint stands in the plan's place."""
        if reads == "picture":
            return self.student_prompt()
        hint = self.data.get("hint") if reads == "symbols+plan" else None
        return "\n\n".join(filter(None, [self.symbols(), hint, self.data["prompt"]]))

    def response(self):
        return f"<answer>{(self.answer_texts() or [''])[0]}</answer>"

    def questions(self):
        """{name: (question, answer)}; "map" asks for the symbols; {} without these too."""
        asked = self.data.get("questions", [])
        if not asked and self.symbols():
            return {"map": (ASK_SYMBOLS, self.symbols())}
        return {f"question {i}": (q["question"], q["answer"]) for i, q in enumerate(asked, 1)}

    def is_right(self, name, said, wanted):
        """By words; letter for letter where the row's answer is compared so."""
        return same_answer(said, wanted, "exact" if self.compare == "exact" else "words")

    def in_form(self, name, text):
        """Whatever is said; no form is asked for."""
        return bool(after_thinking(text).strip())

    def judge(self, text, parse=None, cut=False):
        """What a response is worth. "plan" is the answer given.

        It is read where `final_answer` says: in the last <answer>, else, if the response is not
        cut, in all of it; there the last line counts if nothing says "answer is" or the like.
        """
        said = read_answer(text, cut)
        if said is not None:
            said = final_answer(said)
        elif not cut:
            said = final_answer(after_thinking(text)).rpartition("\n")[2]
        outcome = "not judged"
        if "answer" in self.data:
            tolerance = self.data.get("tolerance", 0)
            right = said and any(same_answer(said, wanted, self.compare, tolerance)
                                 for wanted in self.answer_texts())
            outcome = "success" if right else "wrong" if said else "no answer"
        return {"plan": said or None, "outcome": outcome, "optimal": None,
                "overrun": False, "map": None, "map_right": None}


def measures(verdict):
    """{name: value} of a verdict for a mean over rows; None: it does not apply to the row."""
    judged = verdict["outcome"] != "not judged"
    return {"success": verdict["outcome"] == "success" if judged else None,
            "optimal": verdict["optimal"]}


# ---------------------------------------------------------------- splits and sampling

SPLITS = ("train", "val", "test")
DIFFICULTIES = ("easy", "medium", "hard")
PATIENCE = 50_000  # random puzzles without a new one of a wanted difficulty, then fewer exist


def split_of(task, puzzle):
    """The split a puzzle belongs to: a fixed function of its layout, 80% train, 10% val, 10% test.

    So no state is ever in two splits, whatever the seed, the counts or the run.
    """
    layout = puzzle.layout()
    if layout == example(task)[0].layout():
        return "example"
    number = int(hashlib.sha256(json.dumps(layout).encode()).hexdigest(), 16) % 10
    return {8: "val", 9: "test"}.get(number, "train")


@lru_cache
def thirds(task, level):
    """(a, b): a plan of up to a actions is easy, of up to b medium, a longer one hard.

    The borders that cut the plans of 1,000 random puzzles into the three most equal parts.
    """
    rng = np.random.default_rng(0)
    plans = [solve(TASKS[task].sample(rng, level)) for _ in range(1000)]
    lengths = np.array([len(plan) for plan in plans if plan is not None])

    def unevenness(borders):
        edges = (0, borders[0] + 0.5, borders[1] + 0.5, math.inf)
        return np.var(np.histogram(lengths, edges)[0])
    return min(combinations_with_replacement(np.unique(lengths).tolist(), 2), key=unevenness)


def bucket(length, borders):
    """The difficulty of a shortest plan of `length` actions between `thirds`' borders."""
    return DIFFICULTIES[int(np.searchsorted(borders, length))]


def sample_rows(task, level, split, number, seed, exclude=()):
    """`number` rows with distinct solvable puzzles of one split, a third of each difficulty.

    exclude: puzzles (as `key`) that may not appear. Fails with the number of rows to be had.
    """
    name = zlib.crc32(task.encode())  # a task draws the same whatever other tasks there are
    rng = np.random.default_rng([seed, name, level, SPLITS.index(split)])
    borders, seen, misses = thirds(task, level), set(exclude), 0
    found, wanted = Counter(), {}
    for difficulty, part in zip(DIFFICULTIES, np.array_split(range(number), 3), strict=True):
        wanted[difficulty] = len(part)
    while found.total() < number:
        misses += 1
        if misses > PATIENCE:
            had = 3 * min(found[name] for name in DIFFICULTIES)
            fail(f"{task}, board size {level}: {number} {split} rows wanted, a third of each "
                 f"difficulty; only {had} distinct ones can be had: lower --{split}")
        puzzle = TASKS[task].sample(rng, level)
        state = asdict(puzzle)
        key = digest(task, state)
        if split_of(task, puzzle) != split or key in seen:
            continue
        plan = solve(puzzle)
        if not plan:
            continue
        difficulty = bucket(len(plan), borders)
        if found[difficulty] == wanted[difficulty]:
            continue
        row_id = f"{task}_{level}_{found.total():05d}"
        seen.add(key)
        found[difficulty] += 1
        misses = 0
        yield PuzzleRow({
            "file_name": f"{row_id}.png", "id": f"{split}_{row_id}", "task": task, "level": level,
            "seed": seed, "source": "gen_data.py", "bucket": difficulty, "state": state,
            "plan": plan})


# ---------------------------------------------------------------- the data folder

def open_picture(path):
    """The picture in a file as everything here sees it: upright, on white, RGB with 8 bits.

    Of several frames the first. Fails, naming the file, if it cannot be seen so.
    """
    with in_one_line(f"{path}: cannot be read as a picture"), Image.open(path) as image:
        if max(image.size) > 200 * min(image.size):  # the image processors refuse it later
            raise ValueError(f"{image.size} px, wanted at most 1:200")
        if image.mode[0] in "IF":  # 16 bits, fractions: Pillow would clip them to white
            raise ValueError(f"of mode {image.mode}, wanted 8 bits")
        ImageOps.exif_transpose(image, in_place=True)
        if image.has_transparency_data:
            clear = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", clear.size, "white"), clear)
        return image.convert("RGB")


def decode_all(paths):
    """Decode pictures once: a broken one is told before anything is done with the others."""
    for path in tqdm(sorted(set(paths)), desc="pictures", unit="picture", leave=False):
        open_picture(path)


def check_pictures(rows):
    """Decode the pictures of a user's own rows; what was generated here is only hashed."""
    own = [row for row in rows if row.own]
    for row in tqdm(own, desc="pictures", unit="row", leave=False, disable=not own):
        row.key()  # which opens the student's, once for all
        if row.teacher_path:
            open_picture(row.teacher_path)


def read_jsonl(file):
    """Yields ("file, line n", the line's object) of a JSONL file. Fails at a broken line."""
    if not Path(file).is_file():
        fail(f"{file}: no such file")
    for number, line in enumerate(Path(file).read_bytes().splitlines(), 1):
        where = f"{file}, line {number}"
        with in_one_line(f"{where}: not JSON"):
            read = json.loads(line) if line.strip() else None
        if line.strip():
            yield where, read


def picture_of(line, field, folder, where):
    """The file that a field of a line names: in the folder or below it; links are followed."""
    name = line.get(field)
    if not isinstance(name, str) or "://" in name or name.startswith("data:"):
        fail(f'{where}: "{field}": wanted one file\'s name, got {name!r:.60} '
             f'(the row has {", ".join(line):.200})')
    if Path(name).is_absolute() or ".." in Path(name).parts:
        fail(f'{where}: "{field}": {name!r:.200} does not stay in {folder}')
    path = str(folder / name)
    if not os.path.isfile(path):
        fail(f"{where}: there is no picture {path:.300}")
    return path


def load_row(line, folder, where):
    """The row of a line, its pictures in `folder`, checked. Fails with what is wrong with it."""
    with in_one_line(f"{where}: not a row"):
        task = line.get("task")
        path = picture_of(line, "file_name", folder, where)
        if task is not None and task not in TASKS:
            fail(f'{where}: "task" {task!r:.60} is none of {", ".join(TASKS)}; own rows have none '
                 '(but a "group")')
        kind = OwnRow if task is None else PuzzleRow
        row = kind(line, path, where)
        if "teacher_file_name" in row.data:
            row.teacher_path = picture_of(row.data, "teacher_file_name", folder, where)
        if not isinstance(row.id, str):
            fail(f'{where}: "id": wanted a text, got {row.id!r:.60}')
        fault = row.fault()
    if fault:
        fail(f"{where}: {fault}")
    return row


def split_file(data, split):
    """data/<split>/metadata.jsonl; for val also that of data/validation, as `datasets` says."""
    if split == "val" and Path(data, "validation").is_dir() and not Path(data, split).exists():
        split = "validation"
    return Path(data, split, "metadata.jsonl")


def has_split(data, split):
    """Does the data folder have this split? One may train without val."""
    return split_file(data, split).is_file()


def load_rows(data, split):
    """The rows of data/<split>, each checked: a puzzle is solved and its plan executed.

    A row that is broken stops here, with its line. Its pictures lie beside the metadata.
    """
    file, rows = split_file(data, split), {}
    if not file.is_file():
        fail(f"no {file}: `python gen_data.py` makes puzzles, docs/your_own_task.md has the form "
             "of your own rows (a line of JSON per picture)")
    for where, line in read_jsonl(file):
        row = load_row(line, file.parent, where)
        if row.id in rows:
            fail(f"{where}: the id {row.id!r} is that of {rows[row.id].where} too")
        rows[row.id] = row
    if not rows:
        fail(f"{file} is empty: wanted at least one row")
    return list(rows.values())


def digest_rows(rows):
    """16 hex digits, the same for the same lines and the same bytes of their pictures."""
    return digest([(row.data, *map(digest_file, row.pictures())) for row in rows])


def draw(data, folder, cell_size, image_size):
    """Write the PNG of a row's line. image_size: px of the square it is resized to, 0: as it is.

    A line's own "picture", a file, is taken before one that is drawn (at `cell_size` px a cell);
    its "teacher_picture" as it is.
    """
    target = Path(folder) / data["file_name"]
    if data.get("teacher_picture"):
        shutil.copyfile(data["teacher_picture"], Path(folder) / data["teacher_file_name"])
    if data.get("picture") and not image_size:
        shutil.copyfile(data["picture"], target)
        return
    if data.get("picture"):
        image = open_picture(data["picture"])
    else:
        image = TASKS[data["task"]](**data["state"]).render(cell_size)
    if image_size:
        image = image.resize((image_size, image_size), Image.LANCZOS)
    image.save(target, compress_level=1)


def write_dataset(out, splits, settings, cell_size, image_size, total=None):
    """Write a data folder: pictures and metadata.jsonl per split, `settings` as args.json.

    splits: {split: lines, as `Row.data`, and with pictures as for `draw`}. total: the number of
    rows, for the progress bar. Everything is written aside and renamed at the end: the folder is
    complete or not there. What is there already is never replaced.
    """
    out, written = Path(out), 0
    if os.path.lexists(out):
        fail(f"{out} exists: remove it, or choose another --out")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{out.name}.", dir=out.parent) as folder, \
            tqdm(total=total, desc="rows", unit="row") as bar:
        aside = Path(folder, "data")
        for split, lines in splits.items():
            (aside / split).mkdir(parents=True)
            with open(aside / split / "metadata.jsonl", "w", newline="\n") as file:
                for line in lines:
                    draw(line, aside / split, cell_size, image_size)
                    facts = {name: value for name, value in line.items()
                             if name not in ("picture", "teacher_picture")}
                    file.write(json.dumps(facts) + "\n")
                    written += 1
                    bar.update()
        record = {"kind": "data", **settings}
        write_text(aside / "args.json", json.dumps(record, indent=1) + "\n")
        aside.rename(out)  # raises where something came there meanwhile
    print(f"{written} rows in {out}")


def ensure(data, preset, seed):
    """The folder of the data: `data`, or for None the preset's own, which is made if need be."""
    own = PRESETS[preset]["out"]
    if data is not None and not Path(data).is_dir():
        fail(f"--data {data}: no such folder; `python gen_data.py --preset {preset} --out {data}` "
             "makes puzzles there (your own pictures: docs/your_own_task.md)")
    if data is None and not Path(own).exists():
        words = ["--preset", preset, "--seed", str(seed)]
        print(f"no {own}: making it with `python gen_data.py {' '.join(words)}`", flush=True)
        main(parse_args(words))
    elif data is None:
        made = read_record(own)
        if made and PRESETS.get(str(made.get("preset")), {}).get("out") != own:
            fail(f"{own} was not made for --preset {preset} (its args.json has the settings): give "
                 f"--data {own} to use it all the same, or move it")
    return data or own


def parse_tasks(words, groups=()):
    """["maze", "frozenlake:3-5", "minibehaviour:5"] -> {"maze": (3, 4, 5, 6), ...}

    groups: names of own rows, which have no size: {"mine": (None,)}, as their `level`.
    """
    tasks = {}
    for word in words:
        name, _, levels = word.partition(":")
        if word in groups:
            tasks[word] = (None,)
            continue
        if name not in TASKS:
            fail(f"unknown task {name!r}, known: {', '.join([*TASKS, *groups])}")
        allowed = TASKS[name].levels
        low, _, high = (levels or f"{allowed[0]}-{allowed[-1]}").partition("-")
        high = high or low
        if not {low, high} <= set(map(str, allowed)) or int(low) > int(high):
            fail(f"{word}: {name} has board sizes {allowed[0]} to {allowed[-1]}")
        tasks[name] = tuple(range(int(low), int(high) + 1))
    return tasks


def choose_rows(rows, tasks, limit=None):
    """The rows of these tasks and groups ("maze", "maze:3-4", "mine"), at most `limit` of a size.

    tasks: default all.
    """
    groups = dict.fromkeys(row.task for row in rows if row.own)
    wanted, chosen = parse_tasks(tasks, groups) if tasks else None, {}
    for row in rows:
        if wanted is None or row.level in wanted.get(row.task, ()):
            chosen.setdefault((row.task, row.level), []).append(row)
    if rows and not chosen:
        fail(f"--tasks {' '.join(tasks)}: the data has no such row: choose or make others")
    return [row for some in chosen.values() for row in some[:limit]]


# ---------------------------------------------------------------- main

# What each preset trains on; the three real backbones share it.
QWEN = {
    "out": "data/qwen",
    "tasks": {"frozenlake": (3, 4, 5, 6, 7, 8), "maze": (3, 4, 5, 6), "minibehaviour": (5, 6)},
    "train": 1000,  # rows per task and board size
    "val": 40,
    "test": 100,
    "cell_size": 64,  # px a cell is drawn at
    "image_size": 256,  # px of the square it is resized to: the paper's; 0: as drawn
}
PRESETS = {
    "tiny": {
        "out": "data/tiny",
        "tasks": {"frozenlake": (3, 4), "maze": (3, 4), "minibehaviour": (5,)},
        "train": 2000,
        "val": 40,
        "test": 100,
        "cell_size": 32,  # one cell is exactly one image token of the tiny backbone
        "image_size": 0,
    },
    "2b": QWEN,
    "4b": QWEN,
    "8b": QWEN,
}


def parse_args(argv=None):
    parser = Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--preset", default="tiny", choices=PRESETS, help="sets the defaults below")
    add("--tasks", nargs="+", help="task, task:size or task:low-high")
    add("--train", type=whole_number(0), help="rows per task and board size; so too below")
    add("--val", type=whole_number(0), help="rows of the validation split")
    add("--test", type=whole_number(0), help="rows of the test split")
    add("--cell_size", type=whole_number(8), help="px a cell is drawn at")
    add("--image_size", type=whole_number(0),
        help="px of the square the picture is resized to, 0: as drawn")
    add("--exclude", nargs="+", default=[], metavar="DIR",
        help="data folders whose puzzles may not appear")
    add("--seed", type=whole_number(0), default=0, help="same seed, same bytes")
    add("--out", help="output folder")
    args = parser.parse_args(argv)
    args.tasks = parse_tasks(args.tasks) if args.tasks else None
    for name, value in PRESETS[args.preset].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def generated_lines(args, split, exclude):
    """The lines of one split, task by task and size by size."""
    for task, levels in args.tasks.items():
        for level in levels:
            number = getattr(args, split)
            for row in sample_rows(task, level, split, number, args.seed, exclude):
                yield row.data


def main(args):
    exclude = set()
    for folder in args.exclude:
        files = sorted(Path(folder).glob("*/metadata.jsonl"))
        if not files:
            fail(f"--exclude {folder}: no data folder")
        for file in files:
            if file.stat().st_size:
                exclude |= {row.key() for row in load_rows(folder, file.parent.name)}
    splits = {split: generated_lines(args, split, exclude) for split in SPLITS}
    total = sum(map(len, args.tasks.values())) * (args.train + args.val + args.test)
    write_dataset(args.out, splits, vars(args), args.cell_size, args.image_size, total)


# ---------------------------------------------------------------- messages, flags and files
# What all scripts share stands here, since this one does not load torch.

def fail(message):
    """Bad input: one line on stderr, exit code 2."""
    tqdm.write(f"error: {message}", file=sys.stderr)  # on a line of its own, below a progress bar
    raise SystemExit(2)


@contextlib.contextmanager
def in_one_line(what):
    """While it lasts, what a library raises of a user's file ends the script with one line."""
    try:
        yield
    except Exception as error:  # libraries raise whatever there is
        fail(f"{what}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")


class Parser(argparse.ArgumentParser):
    """An ArgumentParser with errors of one line, without shortened flags, which tells defaults."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, **options)

    def add_argument(self, *names, **options):
        text = options.get("help", "")
        if options.get("default") not in (None, [], argparse.SUPPRESS) and "default" not in text:
            options["help"] = f"{text} (default: %(default)s)"
        return super().add_argument(*names, **options)

    def error(self, message):
        fail(f"{message} (python {self.prog} --help lists the flags)")


def whole_number(low):
    """The `type=` of a flag: a whole number of at least `low`."""
    def whole(text):
        if not text.isdecimal() or int(text) < low:
            raise argparse.ArgumentTypeError(
                f"got {text!r}, must be a whole number, at least {low}")
        return int(text)
    return whole


def real_number(low=0.0, high=math.inf, above=False):
    """The `type=` of a flag: a finite number from `low` (above: not `low` itself) to `high`."""
    def number(text):
        value = float(text)
        if not (math.isfinite(value) and low <= value <= high) or (above and value == low):
            wanted = f"above {low:g}" if above else f"at least {low:g}"
            wanted += f", at most {high:g}" if high < math.inf else ""
            raise argparse.ArgumentTypeError(f"got {text!r}, must be a number, {wanted}")
        return value
    return number


def digest(*things):
    """16 hex digits, the same for the same JSON-serialisable things."""
    text = json.dumps(things, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def digest_file(path):
    """16 hex digits, the same for the same bytes."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


def write_bytes(path, content):
    """Write a file so that it is the old or the new one, whatever happens."""
    aside = Path(f"{path}.partial")
    with open(aside, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())  # else a power cut may leave the name without the content
    aside.replace(path)


def write_text(path, text):
    """`write_bytes` of a text: UTF-8 with \\n on every system."""
    write_bytes(path, text.encode())


def read_record(folder):
    """The args.json of a folder, a dict; an empty one where there is none that can be read."""
    try:
        record = json.loads(Path(folder, "args.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def kind_of(folder):
    """What the args.json of a folder says it is: "data", "run", "evaluation"; None without one."""
    return read_record(folder).get("kind")


def foreign_name(folder, kind):
    """The first thing in a folder of another kind; None in one of this kind or an empty one."""
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    found = [name for name in names if name not in (".lock", "args.json.partial")]
    return found[0] if found and kind_of(folder) != kind else None


def lock_file(path, what):
    """A lock, held until `.release()` or the end of the process. what: the thing written to."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        fail(f"another process is writing to {what}: wait for its end or choose another --out")
    return lock


def lock_folder(folder):
    """The lock of a folder that is there."""
    return lock_file(Path(folder) / ".lock", folder)


def run_script(parse_args, main):
    """Run a script: what its machine lacks is one line, a fault in the code is a traceback."""
    try:
        main(parse_args())
    except KeyboardInterrupt:
        tqdm.write("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except OSError as error:  # a full disk, no permission: in the system's words
        if error.errno not in (errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EPERM):
            raise
        fail(error)
    except RuntimeError as error:  # torch's, of a card; of a CPU "can't allocate memory"
        if not re.search("out of memory|can't allocate memory", str(error)):
            raise
        fail(f"memory does not suffice ({str(error)[:200]}): lower --micro_batch, --rollout_batch "
             "or --chunk; the same command goes on from the latest checkpoint")


if __name__ == "__main__":
    run_script(parse_args, main)
