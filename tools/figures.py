"""The pictures of README and docs, from an evaluation and the log of a distillation.

    python -m tools.figures --eval out/tiny/eval --distill out/tiny/distill --out docs

method.png:   who reads what in a step of distillation. Needs no run.
success.png:  success per task: the stages from pictures, and the base from symbols.
answers.png:  the same held-out puzzles as different models answer them, one row per task: the first
              one of its largest board size, whatever became of it.
training.png: what the rollouts of the distillation were worth, and the KL between student and
              teacher in the three parts of a response.
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
from gen_data import PARTS, Parser, fail, open_picture, run_script
from tools.report import percent, read_lines, walk

GOOD, BAD, INK, SOFT = "#109a55", "#d92c26", "#1c2330", "#5b6575"
COLOURS = ("#0072b2", "#e69f00", "#009e73")
COLUMNS = {"base-image": "base model", "coldstart-image": "after the cold start",
           "distill-image": "after distillation"}
BARS = {"base-image": "#b8c0cc", "coldstart-image": "#7fb2dd", "distill-image": "#0072b2"}
CEILING = "base-text"
WINDOW = 9  # steps over which a curve is smoothed
BOARD = ["SFH", "FFF", "HFG"]  # of the diagram


def parse_args(argv=None):
    parser = Parser(prog="-m tools.figures", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--eval", default="out/tiny/eval", help="folder of an evaluation")
    add("--distill", default="out/tiny/distill", help="folder of a distillation")
    add("--data", default="data/tiny", help="the data that was evaluated")
    add("--conditions", nargs="+", default=list(COLUMNS), help="columns of answers.png")
    add("--rows", nargs="+", metavar="ID", help="puzzles of answers.png (default: see above)")
    add("--out", default="docs", help="output folder")
    return parser.parse_args(argv)


def choose_puzzles(rows, answered, ids=None):
    """The rows with these ids; else of each task's largest board size the first one."""
    by_id = {row.id: row for row in rows if row.id in answered}
    for name in ids or ():
        if name not in by_id:
            fail(f"--rows {name}: not among the rows that all conditions answered")
    if ids:
        return [by_id[name] for name in ids]
    chosen = {}
    for row in by_id.values():
        if row.task not in chosen or row.level > chosen[row.task].level:
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


def draw_method():
    """A step of distillation: two readers, the same tokens, one divergence."""
    puzzle = gen_data.FrozenLake(BOARD)
    plan = gen_data.solve(puzzle)
    figure, axes = plt.subplots(figsize=(10.6, 3.3))
    axes.set(xlim=(0, 106), ylim=(0, 33), aspect="equal")
    axes.axis("off")
    blue, orange = COLOURS[:2]

    def box(x, y, width, height, colour, lines):
        axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0,rounding_size=1",
                                      facecolor="white", edgecolor=colour, linewidth=1.8))
        for i, (text, style) in enumerate(lines):
            height_of_line = y + height / 2 + 1.25 * (len(lines) - 1) - 2.5 * i
            axes.text(x + width / 2, height_of_line, text, ha="center", va="center",
                      **{"fontsize": 9.5, "color": INK, **style})

    def arrow(start, end, colour=SOFT, bend=0.0):
        axes.annotate("", end, start, arrowprops={
            "arrowstyle": "-|>", "color": colour, "linewidth": 1.8, "shrinkA": 0, "shrinkB": 0,
            "connectionstyle": f"arc3,rad={bend}"})

    bold, small = {"weight": "bold"}, {"fontsize": 8.5, "color": SOFT}
    axes.imshow(puzzle.render(64), extent=(1, 13, 19.5, 31.5), zorder=2)
    axes.text(7, 18, "picture", ha="center", va="top", fontsize=9.5, color=INK)
    symbols = "\n".join([gen_data.listing(puzzle.cells()), f"plan: {','.join(plan)}"])
    axes.text(1, 8.6, symbols, va="center", family="monospace", fontsize=8.5, color=INK)
    axes.text(7, 1.8, "symbols + plan", ha="center", va="top", fontsize=9.5, color=INK)
    box(20, 20, 27, 11, blue, [("student", bold), ("network, adapters on", {}),
                               ("samples and scores", small)])
    box(20, 3, 27, 11, orange, [("teacher", bold), ("same network, adapters off", {}),
                                ("scores, no gradient", small)])
    box(55, 11.5, 24, 11, SOFT, [("the student's tokens", bold), ("Map: 3x3 row 0: S F H …", small),
                                 ("Route: … <answer>…", small)])
    box(86, 11.5, 19, 11, COLOURS[2], [("KL per token", bold), ("student ‖ teacher", {}),
                                       ("full vocabulary", small)])
    arrow((13.5, 25.5), (19.7, 25.5))
    arrow((16, 8.5), (19.7, 8.5))
    arrow((47.3, 25.5), (54.7, 20), blue)
    arrow((47.3, 8.5), (54.7, 14), orange)
    arrow((79.3, 17), (85.7, 17))
    arrow((95.5, 22.8), (47.3, 28.5), COLOURS[2], bend=0.2)
    axes.text(72, 32, "gradient: updates the adapters", ha="center", fontsize=9, color=INK)
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
                  color=COLOURS[1], linewidth=1.6,
                  label="base model, from symbols" if k == 0 else None)
    axes.set_xticks(range(len(tasks)), ["mean of the tasks" if task == "macro" else task
                                        for task in tasks])
    axes.set(ylim=(0, 112), yticks=range(0, 101, 25))
    axes.set_title("success from pictures, %", fontsize=11, color=INK, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=SOFT, labelsize=10)
    figure.legend(frameon=False, fontsize=9, loc="outside right center")
    return figure


def smooth(values):
    """The mean of up to WINDOW values around each."""
    half = WINDOW // 2
    windows = [values[max(0, i - half):i + half + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def draw_training(lines):
    """lines: metrics.jsonl of a distillation."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    curves = [(left, "success", "success", COLOURS[0]),
              (left, "optimal", "shortest plan", COLOURS[1])]
    for part, colour in zip(PARTS, COLOURS, strict=True):
        curves.append((right, f"kl_{part}", part, colour))
    for axes, key, label, colour in curves:
        points = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
        if points:
            steps, values = zip(*points, strict=True)
            scale = 100 if axes is left else 1
            values = [scale * value for value in values]
            axes.plot(steps, values, color=colour, alpha=0.25, linewidth=1)
            axes.plot(steps, smooth(values), color=colour, linewidth=2, label=label)
    left.set_title("rollouts of the student, %", fontsize=11, color=INK, loc="left")
    left.set_ylim(0, 100)
    right.set_title("KL(student ‖ teacher), nats per token", fontsize=11, color=INK, loc="left")
    right.set_yscale("log")
    for axes in (left, right):
        axes.set_xlabel("step", color=SOFT)
        axes.grid(color="#e3e7ee", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=SOFT, labelsize=9)
        if axes.lines:
            axes.legend(frameon=False, fontsize=9)
    return figure


def main(args):
    verdicts = {}
    for name in args.conditions:
        file = Path(args.eval, name, "predictions.jsonl")
        lines = read_lines(file)
        if not lines:
            fail(f"no {file}: run python evaluate.py, or choose other --conditions")
        verdicts[name] = {line["id"]: line for line in reversed(lines)}  # of samples the first
    metrics = read_lines(Path(args.distill, "metrics.jsonl"))
    if not metrics:
        fail(f"no {args.distill}/metrics.jsonl: run python distill.py, or choose another --distill")
    answered = set.intersection(*map(set, verdicts.values()))
    rows = choose_puzzles(gen_data.load_rows(args.data, "test"), answered, args.rows)
    if not rows:
        fail(f"{args.data}/test has no row that all of {', '.join(args.conditions)} answered")
    titles = [COLUMNS.get(name, name) for name in args.conditions]
    results = Path(args.eval, "results.json")
    if not results.is_file():
        fail(f"no {results}: run python evaluate.py")
    conditions = json.loads(results.read_text(encoding="utf-8"))["conditions"]
    Path(args.out).mkdir(parents=True, exist_ok=True)
    for name, figure in (("method", draw_method()), ("success", draw_success(conditions)),
                         ("answers", draw_answers(rows, verdicts, titles)),
                         ("training", draw_training(metrics))):
        file = Path(args.out, f"{name}.png")
        drawn = io.BytesIO()
        figure.savefig(drawn, dpi=120, bbox_inches="tight")
        plt.close(figure)
        Image.open(drawn).convert("RGB").quantize(256).save(file, optimize=True)
        print(f"wrote {file}")


if __name__ == "__main__":
    run_script(parse_args, main)
