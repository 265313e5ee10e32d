"""Fine-tuning on references in another wording and order than the backbone's own.

    python -m tools.foreign --init out/tiny/coldstart --out out/tiny/foreign

`coldstart.py --target response` with the same maps, routes and plans as somebody else might write
them: the map by columns, the positions before the moves, the moves in words. The answer keeps the
form that the prompt asks for, so that it is judged alike. Takes coldstart.py's flags.
"""
import sys

import coldstart
import common
import gen_data

WORDS = {"U": "up", "D": "down", "L": "left", "R": "right", "PICK": "pick", "DROP": "drop"}


def foreign_response(row):
    """The reference of a puzzle's row in other words."""
    cells = row.puzzle.cells()
    path, _ = gen_data.execute(row.puzzle, row.plan)
    lines = ["By columns:"]
    for number, column in enumerate(zip(*cells, strict=True)):
        lines.append(f"{number}: {' '.join(column)}")
    places = "".join(f" ({pos[0]},{pos[1]})" for pos in path)
    lines.append(f"Along{places} by {' '.join(WORDS[action] for action in row.plan)}.")
    return "\n".join([*lines, f"<answer>{','.join(row.plan)}</answer>"])


def parse_args(argv=None):
    args = sys.argv[1:] if argv is None else argv
    return coldstart.parse_args(["--target", "response", *args])


def main(args):
    gen_data.PuzzleRow.response = foreign_response
    coldstart.main(args)


if __name__ == "__main__":
    common.run_script(parse_args, main)
