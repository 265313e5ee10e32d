"""Public benchmarks as rows of the split test, every record checked by the rules here.

    python -m tools.benchmarks vsp DIR --out data/vsp                      # pictures as they come
    python -m tools.benchmarks vsp DIR --out data/vsp --image_size 256
    python -m tools.benchmarks visualplanning FILE --task minibehaviour --out data/vp

vsp: FrozenLake of VSP, DIR/level3/{table,img}/0.{txt,png} and so on, its own pictures.
visualplanning: a JSONL file of VisualPlanning, one task a file; the pictures are drawn here.
The first record that is broken, or whose stated length is not that of the shortest plan, ends the
import with its file and line; nothing is written then.
"""
import os
import re
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import gen_data
from gen_data import (
    FrozenLake,
    Maze,
    MiniBehaviour,
    Parser,
    at,
    fail,
    in_one_line,
    run_script,
    whole_number,
)

CELLS = {"@": "S", "*": "G", "#": "H", "_": "F"}  # VSP's
SIDES = {"U": "north", "D": "south", "L": "west", "R": "east"}  # VisualPlanning's


# ---------------------------------------------------------------- VSP

def vsp_records(folder):
    """Yields (where, task, level, puzzle or None, stated lengths, picture), level by level."""
    tables = sorted(Path(folder).glob("level*/table/[!.]*.txt"), key=numbers_in)  # none of macOS
    if not tables:
        fail(f"no VSP tables in {folder}: wanted {folder}/level3/table/0.txt and so on")
    for table in tables:
        picture = table.parents[1] / "img" / f"{table.stem}.png"
        gen_data.open_picture(picture)
        with in_one_line(f"{table}: not a table of VSP"):
            level, puzzle = int(table.parts[-3].removeprefix("level")), read_table(table)
        yield table.as_posix(), "frozenlake", level, puzzle, [], picture


def numbers_in(path):
    """What files are sorted by: 2.txt before 10.txt."""
    return [int(number) for number in re.findall(r"\d+", str(path))]


def read_table(file):
    """The lake of a Markdown table, "| Row 1 | @ | _ |" under "| | Col 1 | Col 2 |"; None if none.
    """
    rows = []
    for line in file.read_text(encoding="utf-8").rstrip().splitlines()[1:]:
        cells = line.strip().strip("|").split("|")[1:]
        rows.append([CELLS.get(cell.strip(), "?") for cell in cells])
    return FrozenLake.read(rows)


# ---------------------------------------------------------------- VisualPlanning

def visualplanning_records(file, task):
    """Yields (where, task, level, puzzle or None, stated lengths, None) of each line."""
    for where, record in gen_data.read_jsonl(Path(file).as_posix()):
        with in_one_line(f"{where}: not a {task} record of VisualPlanning"):
            meta = record["meta"]
            puzzle, stated = READERS[task](meta, meta["level"]), stated_lengths(record)
        yield where, task, meta["level"], puzzle, stated, None


def stated_lengths(record):
    """The shortest number of actions as often as the record itself says it."""
    lengths, meta = [], record["meta"]
    if "input_state" in record:
        lengths.append(len(record["input_state"]) - 1)
    if "distance_map" in meta:
        lengths.append(int(meta["distance_map"][str(meta["start_pos"])]))
    return lengths


def read_lake(meta, level):
    return FrozenLake.read(meta["layout"])


def read_maze(meta, level):
    """A maze from the walls of its cells, if the two sides of every border agree."""
    start, goal = (list(divmod(meta[key], level)) for key in ("start_pos", "target_pos"))
    walls = [[sum(Maze.bits[a] for a in SIDES if cell[SIDES[a]]) for cell in row]
             for row in meta["layout"]]
    maze = Maze(walls, start, goal)
    for r in range(level):
        for c in range(level):
            for action in maze.open_sides((r, c)):
                there, violation = maze.step((r, c), action)
                if violation or maze.step(there, Maze.opposite[action])[1]:
                    raise ValueError(f"the {SIDES[action]} side of cell ({r},{c}) is open on one "
                                     "side only")
    return Maze.read(maze.cells())  # None where start and goal are not on the map


def read_office(meta, level):
    """An office from the places of its things, if none overlap."""
    cells = [["."] * level for _ in range(level)]
    things = [("T", pos) for pos in meta["table_pos"]]
    for mark, (r, c) in [*things, ("A", meta["start_pos"]), ("P", meta["printer_pos"])]:
        if at(cells, (r, c)) != ".":
            raise ValueError(f"{mark} at ({r},{c}) is off the map or on another thing")
        cells[r][c] = mark
    return MiniBehaviour.read(cells)


READERS = {"frozenlake": read_lake, "maze": read_maze, "minibehaviour": read_office}


# ---------------------------------------------------------------- rows

def benchmark_rows(records, base):
    """Rows of the split test; a picture that came with a record is its "picture".

    A record whose map is not one of the task, or not solved in as many actions as it says, fails.
    """
    numbers = Counter()
    for where, task, level, puzzle, stated, picture in records:
        if puzzle is None or len(puzzle.cells()) != level:
            fail(f"{where}: not a map of {task}, {level}x{level} as its level says")
        plan = gen_data.solve(puzzle)
        if not plan:
            fail(f"{where}: the goal cannot be reached, or is the start")
        for length in stated:
            if length != len(plan):
                fail(f"{where}: the record says that the shortest plan has {length} actions, the "
                     f"rules here say {len(plan)}")
        name = f"{task}_{level}_{numbers[level]:05d}"
        numbers[level] += 1
        yield {"file_name": f"{name}.png", "id": f"test_{name}", "task": task, "level": level,
               "seed": None, "source": Path(os.path.relpath(where, Path(base).parent)).as_posix(),
               "bucket": gen_data.bucket(len(plan), gen_data.thirds(task, level)),
               "state": asdict(puzzle), "plan": plan,
               "picture": picture and str(picture)}


def parse_args(argv=None):
    parser = Parser(prog="-m tools.benchmarks", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("benchmark", choices=("vsp", "visualplanning"))
    add("source", help="vsp: the folder that holds level3/ and so on; visualplanning: a JSONL file")
    add("--task", choices=READERS, help="of the file of visualplanning")
    add("--out", required=True, help="output folder")
    add("--image_size", type=whole_number(0), help="px of the square a picture is resized to, 0: "
        "as it is (default: 0 of vsp, 256 of visualplanning)")
    add("--cell_size", type=whole_number(8), default=64, help="px a cell is drawn at")
    args = parser.parse_args(argv)
    if (args.benchmark == "visualplanning") != bool(args.task):
        fail("--task: wanted with visualplanning, and only there")
    if args.image_size is None:
        args.image_size = 256 if args.task else 0
    return args


def main(args):
    if args.task:
        records = visualplanning_records(args.source, args.task)
    else:
        records = vsp_records(args.source)
    rows = list(benchmark_rows(records, args.source))  # all are checked before one is written
    gen_data.write_dataset(args.out, {"test": rows}, vars(args), args.cell_size, args.image_size,
                           len(rows))


if __name__ == "__main__":
    run_script(parse_args, main)
