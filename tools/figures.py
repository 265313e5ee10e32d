"""The pictures of README and docs, from an evaluation and the log of a distillation.

    python -m tools.figures --eval out/tiny/eval --distill out/tiny/distill --out docs

method.png:   who reads what in a step of distillation; needs no run.
success.png:  success per task: the stages from pictures, and the base from symbols.
answers.png:  the same held-out puzzles as different models answer them, one row per task: the first
              one of its largest board size, whatever became of it.
training.png: the curves of the distillation, as the evaluation's page has them.
"""
import io
import json
import os
from itertools import pairwise
from pathlib import Path

os.environ["MPLBACKEND"] = "Agg"  # no window, whatever a notebook has set

import matplotlib.pyplot as plt
from matplotlib.lines import Line2D
from matplotlib.patches import FancyBboxPatch
from matplotlib.patheffects import Normal, Stroke
from PIL import Image

import gen_data
from gen_data import Parser, fail, open_picture, run_script
from tools.report import draw_training, percent, read_lines, walk

GOOD, BAD, INK, SOFT = "#109a55", "#d92c26", "#1c2330", "#5b6575"
COLUMNS = {"base-image": "base model", "coldstart-image": "after the cold start",
           "distill-image": "after distillation"}
BARS = {"base-image": "#b8c0cc", "coldstart-image": "#7fb2dd", "distill-image": "#0072b2"}
CEILING = "base-text"
BOARD = ["SFH", "FFF", "HFG"]  # of method.png
LONGEST = 24                   # characters of a plan or of a response's end, below its picture


def parse_args(argv=None):
    parser = Parser(prog="-m tools.figures", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--eval", default="out/tiny/eval", help="folder of an evaluation")
    add("--distill", default="out/tiny/distill", help="folder of a distillation")
    add("--data", default="data/tiny", help="the data that was evaluated")
    add("--conditions", nargs="+", default=list(COLUMNS), help="columns of answers.png")
    add("--out", default="docs", help="output folder")
    return parser.parse_args(argv)


def choose_puzzles(rows, answered):
    """Of each task's largest board size the first row that all have answered."""
    chosen = {}
    for row in rows:
        if row.id in answered and (
                row.task not in chosen or row.level > chosen[row.task].level):
            chosen[row.task] = row
    return list(chosen.values())


def draw_answer(axes, row, verdict):
    """A puzzle's picture with the plan on it, and below it the outcome and the plan."""
    cells = row.puzzle.cells()
    height, width = len(cells), len(cells[0])
    colour = GOOD if verdict["outcome"] == "success" else BAD
    axes.imshow(open_picture(row.path), extent=(0, width, height, 0), interpolation="lanczos")
    path, violation_at = walk(row, verdict["plan"])
    points = path + ([violation_at] if violation_at else [])
    xs, ys = [c + 0.5 for _, c in points], [r + 0.5 for r, _ in points]
    for line_colour, line_width in (("white", 6), (colour, 3.2)):
        style = {"color": line_colour, "linewidth": line_width, "clip_on": False}
        if verdict["plan"]:
            axes.plot(xs, ys, solid_capstyle="round", solid_joinstyle="round", **style)
        if violation_at:
            axes.plot(xs[-1], ys[-1], marker="x", markersize=11, markeredgewidth=line_width,
                      **style)
    for before, here in pairwise(path):
        if here == before:                                        # an action without a move
            axes.plot(here[1] + 0.5, here[0] + 0.5, "o", markersize=9, markeredgewidth=1.5,
                      color=colour, markeredgecolor="white")
    if verdict["plan"]:
        axes.plot(xs[0], ys[0], "o", markersize=8, markeredgewidth=2, color="white",
                  markeredgecolor=colour)
    word = f"failed: {verdict['outcome']}"
    if verdict["outcome"] == "success":
        word = "success, shortest" if verdict["optimal"] else "success, longer"
    below = ",".join(verdict["plan"] or ())
    if len(below) > LONGEST:
        below = f"{below[:LONGEST]}…"
    if not below:                                                 # how the response ends instead
        below = f"“…{' '.join(verdict['response'].split())[-LONGEST:]}”"
    for text, y, style in ((word, -0.03, {"color": colour, "size": 11, "weight": "bold"}),
                           (below, -0.14, {"color": SOFT, "size": 9})):
        axes.text(0.5, y, text, ha="center", va="top", transform=axes.transAxes, **style)
    axes.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set(color=colour, linewidth=1.5)


def draw_answers(rows, verdicts, titles):
    """rows: the puzzles, one per line; verdicts: {condition: {id: verdict}}, one per column."""
    size, gaps = (2.2 * len(verdicts), 2.65 * len(rows)), {"hspace": 0.31, "wspace": 0.08}
    figure, grid = plt.subplots(len(rows), len(verdicts), squeeze=False, figsize=size,
                                gridspec_kw=gaps)
    for line, row in zip(grid, rows, strict=True):
        for axes, answers in zip(line, verdicts.values(), strict=True):
            draw_answer(axes, row, answers[row.id])
        line[0].set_ylabel(f"{row.task} {row.level}", fontsize=11, color=INK)
    for axes, title in zip(grid[0], titles, strict=True):
        axes.set_title(title, fontsize=12, color=INK, pad=9)
    marks = [("start of the plan", {"marker": "o", "markerfacecolor": "white"}),
             ("PICK or DROP", {"marker": "o"}),
             ("violation", {"marker": "X", "linestyle": "none", "markerfacecolor": BAD,
                            "markeredgecolor": "white"})]
    handles = [Line2D([], [], color=SOFT, markersize=8, label=label, **style)
               for label, style in marks]
    figure.legend(handles=handles, loc="lower center", ncols=3, frameon=False, fontsize=9.5)
    return figure


def draw_method():
    """A step of distillation: two readers, the same tokens, one divergence."""
    puzzle = gen_data.FrozenLake(BOARD)
    figure, axes = plt.subplots(figsize=(7.6, 4.5))
    axes.set(xlim=(0, 70), ylim=(0, 38), aspect="equal")
    axes.axis("off")
    blue, orange, green = "#0072b2", "#e69f00", "#009e73"
    big, small = {"fontsize": 13, "weight": "bold"}, {"fontsize": 11}

    def box(x, y, width, height, colour, lines):
        axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0,rounding_size=1",
                                      facecolor="white", edgecolor=colour, linewidth=2))
        for i, (text, style) in enumerate(lines):
            middle = y + height / 2 + 1.4 * (len(lines) - 1) - 2.8 * i
            axes.text(x + width / 2, middle, text, ha="center", va="center", color=INK, **style)

    def arrow(start, end, colour, bend=0.0):
        axes.annotate("", end, start, arrowprops={
            "arrowstyle": "-|>", "color": colour, "linewidth": 2, "mutation_scale": 15,
            "shrinkA": 0, "shrinkB": 0, "connectionstyle": f"arc3,rad={bend}"})

    axes.imshow(puzzle.render(64), extent=(1.5, 12.5, 25.5, 36.5), zorder=2)
    axes.text(7, 24.8, "picture", ha="center", va="top", color=INK, **small)
    plan = ",".join(gen_data.solve(puzzle))
    axes.text(0, 9.2, f"{gen_data.listing(puzzle.cells())}\nplan: {plan}", va="center", color=INK,
              family="monospace", **small)
    axes.text(7, 1.2, "symbols + plan", ha="center", va="top", color=INK, **small)
    box(20, 25, 23, 12, blue, [("student", big), ("adapters on:", small),
                               ("samples and scores", small)])
    box(20, 3, 23, 12, orange, [("teacher", big), ("the same network,", small),
                                ("adapters off: scores", small)])
    box(50, 14, 20, 12, green, [("KL per token", big), ("student ‖ teacher,", small),
                                ("full vocabulary", small)])
    arrow((13.3, 31), (19.7, 31), SOFT)
    arrow((16.5, 9), (19.7, 9), SOFT)
    arrow((31.5, 24.7), (31.5, 15.3), blue)
    axes.text(32.3, 20, "the tokens", va="center", color=INK, **small)
    arrow((43.3, 28), (49.7, 23), blue)
    arrow((43.3, 9), (49.7, 17), orange)
    arrow((60, 26.3), (43.3, 34.5), green, bend=0.35)
    axes.text(58, 35, "gradient, of the\nadapters only", va="center", color=INK, **small)
    return figure


def draw_success(conditions):
    """conditions: those of results.json. Bars per task with intervals; the ceiling as a line."""
    tables = {}
    for name in (*BARS, CEILING):
        if name in conditions:
            tables[name] = {line["task"]: line for line in conditions[name]["table"]
                            if line["level"] is None and line["bucket"] is None}
    figure, axes = plt.subplots(figsize=(6.4, 3.9), layout="constrained")
    bars = [name for name in tables if name != CEILING]
    tasks, width = list(next(iter(tables.values()))), 0.8 / max(1, len(bars))
    for i, name in enumerate(bars):
        for k, task in enumerate(tasks):
            line, x = tables[name][task], k + (i - (len(bars) - 1) / 2) * width
            low, high = line["success_ci"] or (line["success"], line["success"])
            axes.bar(x, 100 * line["success"], 0.92 * width, color=BARS[name],
                     label=COLUMNS[name] if k == 0 else None)
            axes.plot([x, x], [100 * low, 100 * high], color=INK, linewidth=1)
            axes.text(x, 2, percent(line["success"]), ha="center", fontsize=10, color=INK,
                      path_effects=[Stroke(linewidth=2.5, foreground="white"), Normal()])
    for k, task in enumerate(tasks if CEILING in tables else ()):
        axes.plot([k - 0.42, k + 0.42], [100 * tables[CEILING][task]["success"]] * 2, "--",
                  color="#e69f00", linewidth=1.6,
                  label="base model, from symbols" if k == 0 else None)
    axes.set_xticks(range(len(tasks)), ["mean of the tasks" if task == "macro" else task
                                        for task in tasks])
    axes.set(ylim=(0, 112), yticks=range(0, 101, 25))
    axes.set_title("success from pictures, %", fontsize=12, color=INK, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=SOFT, labelsize=11)
    figure.legend(frameon=False, fontsize=11, ncols=2, loc="outside lower center")
    return figure


def read_file(file, script):
    """The lines of a file that a script makes. Fails without one."""
    lines = read_lines(file)
    if not lines:
        fail(f"no {file}: run python {script}, or choose another folder or other --conditions")
    return lines


def main(args):
    verdicts = {}
    for name in args.conditions:
        lines = read_file(Path(args.eval, name, "predictions.jsonl"), "evaluate.py")
        verdicts[name] = {line["id"]: line for line in reversed(lines)}  # of samples the first
    metrics = read_file(Path(args.distill, "metrics.jsonl"), "distill.py")
    answered = set.intersection(*map(set, verdicts.values()))
    rows = choose_puzzles(gen_data.load_rows(args.data, "test"), answered)
    if not rows:
        fail(f"{args.data}/test has no row that all of {', '.join(args.conditions)} answered")
    titles = [COLUMNS.get(name, name) for name in args.conditions]
    results = json.loads(Path(args.eval, "results.json").read_text(encoding="utf-8"))
    Path(args.out).mkdir(parents=True, exist_ok=True)
    figures = {"method": draw_method(), "success": draw_success(results["conditions"]),
               "answers": draw_answers(rows, verdicts, titles), "training": draw_training(metrics)}
    for name, figure in figures.items():
        drawn, file = io.BytesIO(), Path(args.out, f"{name}.png")
        figure.savefig(drawn, dpi=120, bbox_inches="tight")
        Image.open(drawn).convert("RGB").quantize(256).save(file, optimize=True)
        print(f"wrote {file}")


if __name__ == "__main__":
    run_script(parse_args, main)
