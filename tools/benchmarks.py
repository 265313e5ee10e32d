"""Public benchmarks as rows of the split test, every record checked by the rules here.

    python -m tools.benchmarks vsp DIR --out data/vsp                      # pictures as they come
    python -m tools.benchmarks vsp DIR --out data/vsp --image_size 256
    python -m tools.benchmarks visualplanning FILE --task minibehaviour --out data/vp

vsp: FrozenLake of VSP, DIR/level3/{table,img}/0.{txt,png} and so on, its own pictures.
visualplanning: a JSONL file of VisualPlanning, one task a file; the pictures are drawn here.
The first record that is broken, or whose stated length is not that of the shortest plan, ends the
import with its file and line; nothing is written then.
"""
import json
import os
import re
from collections import Counter
from dataclasses import asdict
from itertools import product
from pathlib import Path

import gen_data
from gen_data import (
    FrozenLake,
    Maze,
    MiniBehaviour,
    Parser,
    at,
    fail,
    find,
    neighbour,
    run_script,
    whole_number,
)

CELLS = {"@": "S", "*": "G", "#": "H", "_": "F"}  # VSP's
SIDES = {"U": "north", "D": "south", "L": "west", "R": "east"}  # VisualPlanning's
MARKS = {"frozenlake": ("SG", "FH"), "minibehaviour": ("AP", "T.")}  # once each; any number


# ---------------------------------------------------------------- VSP

def vsp_records(folder):
    """Yields (where, task, level, puzzle, stated length, picture) of each map, level by level."""
    tables = sorted(Path(folder).glob("level*/table/*.txt"), key=numbers_in)
    if not tables:
        fail(f"no VSP tables in {folder}: wanted {folder}/level3/table/0.txt and so on")
    for table in tables:
        grid = vsp_grid(table)
        picture = table.parents[1] / "img" / f"{table.stem}.png"
        width, height = gen_data.open_picture(picture).size
        if width != height:
            fail(f"{picture}: {width}x{height} px, wanted a square")
        level = table.parents[1].name.removeprefix("level")
        level = int(level) if level.isdigit() else level
        yield table.as_posix(), "frozenlake", level, FrozenLake(grid), None, picture


def numbers_in(path):
    """What files are sorted by: 2.txt before 10.txt."""
    return [int(number) for number in re.findall(r"\d+", str(path))]


def vsp_grid(table):
    """The rows of a Markdown table, "| Row 1 | @ | _ |" under "| | Col 1 | Col 2 |"."""
    header, *lines = table.read_text(encoding="utf-8").rstrip().splitlines() or [""]
    width, grid = header.count("Col"), []
    for number, line in enumerate(lines, 2):
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")[1:]]
        unknown = sorted(set(cells) - set(CELLS))
        if unknown:
            fail(f"{table}, line {number}: unknown symbol {unknown[0]!r}, wanted @ * # or _")
        if len(cells) != width or len(cells) != len(lines):
            fail(f"{table}, line {number}: {len(cells)} cells under {width} columns in "
                 f"{len(lines)} rows: not a square map")
        grid.append("".join(CELLS[cell] for cell in cells))
    return grid


# ---------------------------------------------------------------- VisualPlanning

def visualplanning_records(file, task):
    """Yields (where, task, level, puzzle, stated length, None) of each line."""
    for number, line in enumerate(Path(file).read_bytes().splitlines(), 1):
        where = f"{Path(file).as_posix()}, line {number}"
        try:
            record = json.loads(line)
            meta, level = record["meta"], record["meta"]["level"]
            puzzle, stated = READERS[task](meta, level), stated_length(record)
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            fail(f"{where}: not a {task} record of VisualPlanning "
                 f"({type(error).__name__}: {error})")
        yield where, task, level, puzzle, stated, None


def stated_length(record):
    """The shortest number of actions by a record itself, None if it says none."""
    lengths, meta = set(), record["meta"]
    if "input_state" in record:
        lengths.add(len(record["input_state"]) - 1)
    if "distance_map" in meta:
        lengths.add(int(meta["distance_map"][str(meta["start_pos"])]))
    if len(lengths) > 1:
        raise ValueError("input_state and distance_map state different lengths")
    return lengths.pop() if lengths else None


def read_lake(meta, level):
    """A lake from its layout, if start and target are where it says."""
    grid = ["".join(row) for row in meta["layout"]]
    if any(len(row) != level for row in grid):
        raise ValueError(f"the map is not square, or not {level}x{level} as its level says")
    for mark, pos in (("S", meta["start_pos"]), ("G", meta["target_pos"])):
        if at(grid, divmod(pos, level)) != mark:
            raise ValueError(f"no {mark} at its position {pos}")
    return FrozenLake(grid)


def read_maze(meta, level):
    """A maze from the walls of its cells, if the two sides of every border agree and it is shut."""
    walls = []
    for row in meta["layout"]:
        walls.append([sum(Maze.bits[a] for a in SIDES if cell[SIDES[a]]) for cell in row])
    for r, c in product(range(level), repeat=2):
        for action, side in SIDES.items():
            beyond = at(walls, neighbour((r, c), action))
            shut = bool(walls[r][c] & Maze.bits[action])
            if shut != (beyond is None or bool(beyond & Maze.bits[Maze.opposite[action]])):
                raise ValueError(f"the {side} side of cell ({r},{c}) is open on one side only")
    start, goal = (list(divmod(meta[key], level)) for key in ("start_pos", "target_pos"))
    if at(walls, start) is None or at(walls, goal) is None:
        raise ValueError("start or target is off the map")
    return Maze(walls, start, goal)


def read_office(meta, level):
    """An office from the places of its things, if none overlap and the table lies down."""
    grid = [["."] * level for _ in range(level)]
    table = sorted(map(tuple, meta["table_pos"]))
    if table != [(table[0][0] + r, table[0][1] + c) for r in range(2) for c in range(3)]:
        raise ValueError("the table is not 2 rows of 3 cells")
    things = [("A", meta["start_pos"]), ("P", meta["printer_pos"])] + [("T", pos) for pos in table]
    for mark, pos in things:
        if at(grid, pos) != ".":
            raise ValueError(f"{mark} at {tuple(pos)} is off the map or on another thing")
        grid[pos[0]][pos[1]] = mark
    return MiniBehaviour(["".join(row) for row in grid])


READERS = {"frozenlake": read_lake, "maze": read_maze, "minibehaviour": read_office}


# ---------------------------------------------------------------- rows

def examine(where, task, level, puzzle, stated=None):
    """The shortest plan of a record's puzzle, after every check. Fails naming the record."""
    levels, board = puzzle.levels, puzzle.layout()
    if level not in levels:
        fail(f"{where}: level {level}, wanted {levels[0]} to {levels[-1]} for {task}")
    if len(board) != level or any(len(row) != level for row in board):
        fail(f"{where}: the map is not square, or not {level}x{level} as its level says")
    if task in MARKS:
        once, others = MARKS[task]
        for mark in sorted(set("".join(board)) | set(once)):
            if mark not in once + others:
                fail(f"{where}: unknown symbol {mark!r}")
            number = len(find(board, mark))
            if mark in once and number != 1:
                fail(f"{where}: {number} cells with {mark}, wanted exactly one")
    plan = gen_data.solve(puzzle)
    if plan is None:
        fail(f"{where}: the goal cannot be reached")
    if not plan:
        fail(f"{where}: the start is the goal")
    if stated is not None and len(plan) != stated:
        fail(f"{where}: the record says that the shortest plan has {stated} actions, the rules "
             f"here say {len(plan)}")
    return plan


def benchmark_rows(records, base):
    """Rows of the split test; a picture that came with a record is its "picture"."""
    numbers = Counter()
    for where, task, level, puzzle, stated, picture in records:
        plan = examine(where, task, level, puzzle, stated)
        name = f"{task}_{level}_{numbers[level]:05d}"
        numbers[level] += 1
        yield {"file_name": f"{name}.png", "id": f"test_{name}", "task": task, "level": level,
               "seed": None, "source": Path(os.path.relpath(where, Path(base).parent)).as_posix(),
               "bucket": gen_data.bucket(len(plan), gen_data.thirds(task, level)),
               "state": asdict(puzzle), "plan": plan,
               "picture": picture and str(picture)}


def parse_args(argv=None):
    parser = Parser(prog="-m tools.benchmarks", description=__doc__.split("\n")[0])
    kinds = parser.add_subparsers(dest="benchmark", required=True)
    vsp = kinds.add_parser("vsp", help="VSP's FrozenLake maps with their pictures")
    vsp.add_argument("source", metavar="DIR", help="the folder that holds level3/ and so on")
    planning = kinds.add_parser("visualplanning", help="a JSONL file of VisualPlanning")
    planning.add_argument("source", metavar="FILE", help="the file")
    planning.add_argument("--task", required=True, choices=READERS)
    for kind, image_size in ((vsp, 0), (planning, 256)):
        add = kind.add_argument
        add("--out", required=True, help="output folder")
        add("--overwrite", action="store_true", help="replace the output folder")
        add("--image_size", type=whole_number(0), default=image_size,
            help="px of the square a picture is resized to, 0: as it is (default: %(default)s)")
        add("--cell_size", type=whole_number(8), default=64,
            help="px a cell is drawn at (where it is drawn)")
        add("--workers", type=whole_number(1), default=os.cpu_count(), help="processes that draw")
    args = parser.parse_args(argv)
    if not Path(args.source).exists():
        fail(f"{args.source} does not exist")
    if args.benchmark == "visualplanning" and not Path(args.source).is_file():
        fail(f"{args.source}: wanted a JSONL file, this is a folder")
    return args


def main(args):
    gen_data.check_out(args.out, args.overwrite)
    if args.benchmark == "vsp":
        records = vsp_records(args.source)
    else:
        records = visualplanning_records(args.source, args.task)
    rows = list(benchmark_rows(records, args.source))  # all are checked before one is written
    gen_data.write_dataset(args.out, {"test": iter(rows)}, vars(args), args.cell_size,
                           args.image_size, args.workers, len(rows), args.overwrite)


if __name__ == "__main__":
    run_script(parse_args, main)
