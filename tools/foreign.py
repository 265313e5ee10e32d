"""Fine-tuning on references in another order than the backbone's own.

    python -m tools.foreign --init out/tiny/coldstart --out out/tiny/foreign

`coldstart.py --target response` with the same maps, routes and plans as somebody else might write
them, in words that the backbone knows: the rows of the map from the last to the first, and all
positions of the route before its actions. The answer keeps the form that the prompt asks for, so
that it is judged alike. Takes coldstart.py's flags.
"""
import sys

import coldstart
import common
import gen_data


def foreign_response(row):
    """The reference of a puzzle's row in another order."""
    head, *lines = gen_data.listing(row.puzzle.cells()).splitlines()
    path, _ = gen_data.execute(row.puzzle, row.plan)
    places = " to ".join(f"({pos[0]},{pos[1]})" for pos in path)
    return "\n".join([head, *reversed(lines), f"Route: from {places} {' '.join(row.plan)}.",
                      f"<answer>{','.join(row.plan)}</answer>"])


def parse_args(argv=None):
    args = sys.argv[1:] if argv is None else argv
    return coldstart.parse_args(["--target", "response", *args])


def main(args):
    gen_data.PuzzleRow.response = foreign_response
    coldstart.main(args)


if __name__ == "__main__":
    common.run_script(parse_args, main)
