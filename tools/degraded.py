"""An example of your own task without symbols: degraded pictures, clean ones for the teacher.

    python -m tools.degraded --data data/tiny --out data/degraded --limit 500

Rows as in docs/your_own_task.md, made from a folder of puzzles: the picture is blurred, darkened,
tinted and noisy, teacher_file_name the one it was made from, the prompt the puzzle's own. The
answers, for the evaluation only, are all shortest plans. Same seed, same rows and pictures.
"""
import tempfile

import numpy as np
from PIL import Image, ImageFilter

from gen_data import (
    SPLITS,
    Parser,
    PuzzleRow,
    choose_rows,
    fail,
    load_rows,
    open_picture,
    run_script,
    whole_number,
    write_dataset,
)


def degrade(image, rng):
    """The picture as a bad photograph of it; between hardly and badly, each fault by itself."""
    image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0, 4)))
    pixels = np.asarray(image, float) * rng.uniform(0.3, 1) + rng.uniform(0, 60)   # low contrast
    pixels = pixels * rng.uniform(0.8, 1.2, 3)                                     # a tint
    pixels += rng.normal(0, rng.uniform(0, 60), pixels.shape)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def shortest_plans(puzzle):
    """All shortest plans, as texts; breadth-first, with every way to a position."""
    seen, ways = set(), {puzzle.start_pos(): [()]}
    while not any(map(puzzle.done, ways)):
        seen |= set(ways)
        longer = {}
        for pos, plans in ways.items():
            for action in puzzle.actions:
                there, violation = puzzle.step(pos, action)
                if violation is None and there not in seen:
                    longer.setdefault(there, []).extend((*plan, action) for plan in plans)
        ways = longer
    return [",".join(plan) for pos, plans in ways.items() if puzzle.done(pos) for plan in plans]


def degraded_rows(rows, split, seed, folder):
    """A row for every puzzle of a split; their pictures are drawn into `folder`."""
    rng = np.random.default_rng([seed, SPLITS.index(split)])
    for row in rows:
        if not isinstance(row, PuzzleRow):
            fail(f"{row.where}: wanted a puzzle, which its pictures are degraded of")
        file = f"{folder}/{split}_{row.id}.png"
        degrade(open_picture(row.path), rng).save(file)
        yield {"file_name": f"{row.id}.png", "teacher_file_name": f"clean_{row.id}.png",
               "id": row.id, "group": f"degraded {row.task}",
               "prompt": row.student_prompt(), "answer": shortest_plans(row.puzzle),
               "picture": file, "teacher_picture": row.path}


def parse_args(argv=None):
    parser = Parser(prog="-m tools.degraded", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--data", default="data/tiny", help="folder of puzzles")
    add("--out", default="data/degraded", help="output folder")
    add("--limit", type=whole_number(1), help="rows per task and board size (default: all)")
    add("--seed", type=whole_number(0), default=0)
    return parser.parse_args(argv)


def main(args):
    rows = {split: choose_rows(load_rows(args.data, split), None, args.limit) for split in SPLITS}
    with tempfile.TemporaryDirectory() as folder:
        splits = {split: degraded_rows(some, split, args.seed, folder)
                  for split, some in rows.items()}
        write_dataset(args.out, splits, {**vars(args), "source": "tools/degraded.py"}, 0, 0,
                      total=sum(map(len, rows.values())))


if __name__ == "__main__":
    run_script(parse_args, main)
