"""`gen_data.py --show`: puzzles as they are drawn, and every text that belongs to them."""
import json

from PIL import Image, ImageDraw

import gen_data


def show(args):
    """A contact sheet, one column per level, each puzzle above its shortest path; the prompts."""
    size, columns = 256, max(len(levels) for levels in args.tasks.values())
    sheet = Image.new("RGB", (columns * (size + 16), len(args.tasks) * 2 * (size + 24)), "white")
    label = ImageDraw.Draw(sheet)
    args.train = 3
    candidates = list(gen_data.generated_rows(args, "train"))
    for i, (task, levels) in enumerate(args.tasks.items()):
        for j, level in enumerate(levels):
            rows = [row for row in candidates if (row["task"], row["level"]) == (task, level)]
            row = max(rows, key=lambda row: len(row["plan"]))
            image = gen_data.TASKS[task].render(row["state"], args.cell_size)
            image = image.resize((size, size), Image.LANCZOS)
            x, y = j * (size + 16) + 8, i * 2 * (size + 24) + 20
            title = f"{task} {level}, {row['bucket']}: {','.join(row['plan'])}"
            label.text((x, y - 14), title[:48], "black")
            sheet.paste(image, (x, y))
            draw_path(image, row)
            sheet.paste(image, (x, y + size + 4))
        for title, text in (("row", json.dumps(row)),
                            ("student, beside the picture", gen_data.student_prompt(row)),
                            ("teacher, with the reference plan", gen_data.teacher_prompt(row)),
                            ("teacher without it", gen_data.teacher_prompt(row, "state")),
                            ("response", gen_data.response(row)),
                            ("perception", gen_data.perception_prompt(row)),
                            ("target", gen_data.perception_target(row))):
            print(f"--- {task}: {title}\n{text}")
    sheet.save(args.show)
    print(f"--- wrote {args.show}")


def draw_path(image, row):
    """The row's plan drawn into its picture; a ring where an action stays in its cell."""
    cells = gen_data.TASKS[row["task"]].cells(row["state"])
    scale = image.width / len(cells[0]), image.height / len(cells)
    points = []
    for pos in gen_data.trace(row["task"], row["state"], row["plan"]):
        points.append(((pos[1] + 0.5) * scale[0], (pos[0] + 0.5) * scale[1]))
    pen = ImageDraw.Draw(image)
    pen.line(points, (230, 0, 160), 5, joint="curve")
    for before, (x, y) in zip(points, points[1:], strict=False):
        if (x, y) == before:
            pen.ellipse([x - 9, y - 9, x + 9, y + 9], outline=(230, 0, 160), width=4)
