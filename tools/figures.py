"""The pictures of README and docs, from an evaluation and the log of a distillation.

    python -m tools.figures --eval out/tiny/eval --distill out/tiny/distill --out docs

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
        word = "success, shortest plan" if verdict["optimal"] else "success, longer plan"
    below = ",".join(verdict["plan"] or ())
    if not below:                                                 # how the response ends instead
        below = f"“… {' '.join(verdict['response'].split())[-32:]}”"
    for text, y, style in ((word, -0.03, {"color": colour, "size": 9, "weight": "bold"}),
                           (below, -0.12, {"color": SOFT, "size": 7})):
        axes.text(0.5, y, text, ha="center", va="top", transform=axes.transAxes, **style)
    axes.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set(color=colour, linewidth=1.5)


def draw_answers(rows, verdicts, titles):
    """rows: the puzzles, one per line; verdicts: {condition: {id: verdict}}, one per column."""
    size, gaps = (2.2 * len(verdicts), 2.55 * len(rows)), {"hspace": 0.26, "wspace": 0.08}
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


def draw_success(conditions):
    """conditions: those of results.json. Bars per task with intervals; the ceiling as a line."""
    tables = {}
    for name in (*BARS, CEILING):
        if name in conditions:
            tables[name] = {line["task"]: line for line in conditions[name]["table"]
                            if line["level"] is None and line["bucket"] is None}
    figure, axes = plt.subplots(figsize=(8.3, 2.9), layout="constrained")
    bars = [name for name in tables if name != CEILING]
    tasks, width = list(next(iter(tables.values()))), 0.8 / max(1, len(bars))
    for i, name in enumerate(bars):
        for k, task in enumerate(tasks):
            line, x = tables[name][task], k + (i - (len(bars) - 1) / 2) * width
            low, high = line["success_ci"] or (line["success"], line["success"])
            axes.bar(x, 100 * line["success"], 0.92 * width, color=BARS[name],
                     label=COLUMNS[name] if k == 0 else None)
            axes.plot([x, x], [100 * low, 100 * high], color=INK, linewidth=1)
            axes.text(x, 2, percent(line["success"]), ha="center", fontsize=9, color=INK,
                      path_effects=[Stroke(linewidth=2.5, foreground="white"), Normal()])
    for k, task in enumerate(tasks if CEILING in tables else ()):
        axes.plot([k - 0.42, k + 0.42], [100 * tables[CEILING][task]["success"]] * 2, "--",
                  color="#e69f00", linewidth=1.6,
                  label="base model, from symbols" if k == 0 else None)
    axes.set_xticks(range(len(tasks)), ["mean of the tasks" if task == "macro" else task
                                        for task in tasks])
    axes.set(ylim=(0, 112), yticks=range(0, 101, 25))
    axes.set_title("success from pictures, %", fontsize=11, color=INK, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=SOFT, labelsize=10)
    figure.legend(frameon=False, fontsize=9, loc="outside right center")
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
    for name, figure in (("success", draw_success(results["conditions"])),
                         ("answers", draw_answers(rows, verdicts, titles)),
                         ("training", draw_training(metrics))):
        drawn, file = io.BytesIO(), Path(args.out, f"{name}.png")
        figure.savefig(drawn, dpi=120, bbox_inches="tight")
        Image.open(drawn).convert("RGB").quantize(256).save(file, optimize=True)
        print(f"wrote {file}")


if __name__ == "__main__":
    run_script(parse_args, main)
