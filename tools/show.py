"""Look at the puzzles: how they are drawn, and every text that belongs to them.

    python -m tools.show --preset 4b --out puzzles.png

Draws a contact sheet, one column per board size, each puzzle above its shortest path; prints the
prompts and reference answers of one row per task.
"""
import json

from PIL import Image, ImageDraw

import gen_data
from gen_data import Parser, run_script


def parse_args(argv=None):
    parser = Parser(prog="-m tools.show", description=__doc__.split("\n")[0])
    parser.add_argument("--preset", default="tiny", choices=gen_data.PRESETS)
    parser.add_argument("--tasks", nargs="+", help="task, task:size or task:low-high")
    parser.add_argument("--out", default="puzzles.png", help="the picture")
    args = parser.parse_args(argv)
    preset = gen_data.PRESETS[args.preset]
    args.tasks = gen_data.parse_tasks(args.tasks) if args.tasks else preset["tasks"]
    args.cell_size = preset["cell_size"]
    return args


def main(args):
    size, columns = 256, max(len(levels) for levels in args.tasks.values())
    sheet = Image.new("RGB", (columns * (size + 16), len(args.tasks) * 2 * (size + 24)), "white")
    label = ImageDraw.Draw(sheet)
    for i, (task, levels) in enumerate(args.tasks.items()):
        for j, level in enumerate(levels):
            rows = gen_data.sample_rows(task, level, "train", 3, seed=0)
            row = max(rows, key=lambda row: len(row.plan))
            image = row.puzzle.render(args.cell_size).resize((size, size), Image.LANCZOS)
            x, y = j * (size + 16) + 8, i * 2 * (size + 24) + 20
            title = f"{task} {level}, {row.bucket}: {','.join(row.plan)}"
            label.text((x, y - 14), title[:48], "black")
            sheet.paste(image, (x, y))
            draw_path(image, row)
            sheet.paste(image, (x, y + size + 4))
        for title, text in (("row", json.dumps(row.data)),
                            ("student, beside the picture", row.student_prompt()),
                            ("teacher, with the plan", row.teacher_prompt("symbols+plan")),
                            ("teacher without it", row.teacher_prompt("symbols")),
                            ("response", row.response()),
                            ("perception questions", row.ask()), ("answers", row.answers())):
            print(f"--- {task}: {title}\n{text}")
    sheet.save(args.out)
    print(f"--- wrote {args.out}")


def draw_path(image, row):
    """The row's plan drawn into its picture; a ring where an action stays in its cell."""
    cells = row.puzzle.cells()
    scale = image.width / len(cells[0]), image.height / len(cells)
    points = []
    for pos in gen_data.execute(row.puzzle, row.plan)[0]:
        points.append(((pos[1] + 0.5) * scale[0], (pos[0] + 0.5) * scale[1]))
    pen = ImageDraw.Draw(image)
    pen.line(points, (230, 0, 160), 5, joint="curve")
    for before, (x, y) in zip(points, points[1:], strict=False):
        if (x, y) == before:
            pen.ellipse([x - 9, y - 9, x + 9, y + 9], outline=(230, 0, 160), width=4)


if __name__ == "__main__":
    run_script(parse_args, main)
