"""The study's tables and plots, from the files that its commands left (tools/study.py).

values.json holds what was measured of every run, row by row. A run that it has and whose folders
are not there is taken from it, so that a study may be made in parts, on several machines.
A measure of a run is one value per test row. Means weigh tasks alike, then average over seeds;
intervals (95%, percentile bootstrap) draw seeds and rows again, both at once; a difference to MGSD
is taken row by row and seed by seed. Three seeds say little about the spread over seeds: such an
interval is too narrow rather than too wide.
"""
import json
import os
import re
from collections import Counter
from pathlib import Path

os.environ["MPLBACKEND"] = "Agg"  # no window, whatever a notebook has set

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from evaluate import answer_frame
from gen_data import write_text
from tools.report import markdown

REFERENCE = "mgsd"
# measure: (folder of the evaluation, what was read, column); heads of the table's columns
MEASURES = {
    "success": ("test", "image", "success"), "optimal": ("test", "image", "optimal"),
    "map right": ("test", "image", "map_right"),
    "failed: perception": ("test", "image", "perception"),
    "failed: planning": ("test", "image", "planning"),
    "tokens": ("test", "image", "tokens"), "questions": ("seen", "image", "questions"),
    "mean at T=1": ("sampled", "image", "success"), "pass@8": ("sampled", "image", "solved"),
    "new sizes": ("unseen", "image", "success"), "swapped": ("swapped", "swapped", "success"),
    "symbols": ("test", "text", "success"), "other pictures": ("retention", "", "pictures"),
    "other symbols": ("retention", "", "symbols"),
}
SUMMARY = ("success", "map right", "symbols", "questions", "new sizes", "pass@8", "seconds")
RATE_COLUMNS = ("success", "symbols", "questions", "other pictures")
# A claim: the first (variant, measure) is above the second. Row by row, over the seeds of both.
CLAIMS = (
    ("a", "there is a gap", ("base", "symbols"), ("base", "success")),
    ("b", "the cold start recovers the state", ("coldstart", "map right"), ("base", "map right")),
    ("c", "distillation adds planning", ("mgsd", "success"), ("coldstart", "success")),
    ("d", "its gains come from state recovery", ("mgsd", "map right"), ("coldstart", "map right")),
    ("d", "and from optimal paths", ("mgsd", "optimal"), ("coldstart", "optimal")),
    ("e", "without a cold start it is worse", ("mgsd", "success"), ("no_coldstart", "success")),
    ("f", "inference looks at the picture", ("mgsd", "success"), ("mgsd", "swapped")),
    ("g", "it forgets less than fine-tuning: questions", ("mgsd", "questions"),
     ("sft_response", "questions")),
    ("g", "symbols", ("mgsd", "symbols"), ("sft_response", "symbols")),
    ("g", "other pictures", ("mgsd", "other pictures"), ("sft_response", "other pictures")),
    ("h", "it succeeds more often than fine-tuning on as many rows", ("mgsd", "success"),
     ("sft_response", "success")),
    ("i", "the plan in the teacher's prompt helps", ("mgsd", "success"), ("no_plan", "success")),
    ("j", "it succeeds more often than fine-tuning on foreign references", ("mgsd", "success"),
     ("sft_foreign", "success")),
    ("j", "and forgets less: questions", ("mgsd", "questions"), ("sft_foreign", "questions")),
    ("j", "symbols", ("mgsd", "symbols"), ("sft_foreign", "symbols")),
    ("k", "its own samples are worth it", ("mgsd", "success"), ("off_policy", "success")),
)
TASK_COLUMNS = ("frozenlake", "maze", "minibehaviour")  # success of each, beside the mean
PLAIN = ("tokens", "seconds")                           # not in %
COLOURS = ("#0072b2", "#d55e00", "#cc79a7", "#009e73", "#e69f00", "#56b4e9")


def name_of(variant, rows, seed, lr=None):
    """The folder of a run."""
    if variant == "base":
        return variant
    return f"{variant}-{rows}-{seed}" + (f"-lr{lr:g}" if lr else "")


def read_lines(path):
    return [json.loads(line) for line in open(path, encoding="utf-8")]


def values_of(out, run, measure):
    """A measure of a run -> {task: a number per row, by the rows' ids}; None if not measured."""
    kind, source, column = MEASURES[measure]
    folder = Path(out, "eval", run, kind)
    if kind == "retention":
        file = folder / "retention.json"
        if not file.is_file():
            return None
        return {"all": json.loads(file.read_text(encoding="utf-8"))["model"][column]["right"]}
    folder = folder / f"model-{source}"
    if not (folder / "summary.json").is_file():
        return None
    if column == "questions":
        frame = pd.DataFrame(read_lines(folder / "perception.jsonl"))
        column = "right"
    else:
        lines = read_lines(folder / "predictions.jsonl")
        frame = answer_frame(lines)
        if column in ("perception", "planning"):
            frame[column] = [float(line["failure"] == column) for line in lines]
        elif column == "solved":  # by any of its samples
            frame[column] = frame.groupby("id")["success"].transform("max")
    by_row = frame.groupby(["task", "id"])[column].mean().round(4).astype(object)
    by_row = by_row.where(by_row.notna(), None)
    return {task: rows.to_list() for task, rows in by_row.groupby(level=0)}


def seconds_of(out, run):
    """Seconds of training: the sum over the steps of the run and of the cold start it continues."""
    folder = Path(out, "runs", run)
    init = json.loads((folder / "args.json").read_text("utf-8"))["args"].get("init", "none")
    folders = [folder] if init == "none" else [folder, Path(out, "runs", Path(init).name)]
    return sum(line["step_seconds"] for part in folders
               for line in read_lines(part / "metrics.jsonl"))


def read_values(out, runs):
    """{run: {measure: {task: [numbers]}}} of what was measured; it is kept in values.json.

    runs: [(variant, rows, seed, lr)]. The rows are those of the same test data in every run, in the
    same order.
    """
    file = Path(out, "values.json")
    values = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    for run in (name_of(*run) for run in runs):
        measured = {}
        for measure in MEASURES:
            found = values_of(out, run, measure)
            if found is not None:
                measured[measure] = found
        if measured and Path(out, "runs", run, "metrics.jsonl").is_file():
            measured["seconds"] = {"all": [round(seconds_of(out, run))]}
        if measured:  # what was measured elsewhere stays
            values[run] = values.get(run, {}) | measured
    texts = [f"{json.dumps(run)}: {compact(measured)}" for run, measured in sorted(values.items())]
    write_text(file, "{\n" + ",\n".join(texts) + "\n}\n")
    return values


def compact(values):
    """JSON in one line, 1.0 as 1."""
    return re.sub(r"\.0\b", "", json.dumps(values, separators=(",", ":")))


def series(values):
    """{task: [numbers]} -> a Series by (task, row)."""
    return pd.concat({task: pd.Series(rows, dtype=float) for task, rows in values.items()})


def estimate(values, resamples=2000):
    """(mean, [low, high]) of {seed: Series by (task, row)}: tasks alike, then seeds."""
    frame = pd.DataFrame(values).dropna()                                     # [rows, seeds]
    rng, seeds = np.random.default_rng(0), frame.shape[1]
    drawn_seeds = rng.multinomial(seeds, np.full(seeds, 1 / seeds), resamples) / seeds
    means, samples = [], []
    for _, group in frame.groupby(level=0):
        rows = len(group)
        drawn = rng.multinomial(rows, np.full(rows, 1 / rows), resamples) / rows  # [resamples, R]
        samples.append(((drawn @ group.to_numpy()) * drawn_seeds).sum(1))
        means.append(group.to_numpy().mean())
    ends = np.quantile(np.mean(samples, 0), (.025, .975))
    return float(np.mean(means)), [float(end) for end in ends]


def find_measures(values, runs):
    """{(variant, rows, measure): {seed: Series by (task, row)}}, success of each task too.

    values: of `read_values`; runs: [(variant, rows, seed, lr)], one lr of each. The base answers
    alike for every seed.
    """
    found = {}
    for variant, rows, seed, lr in runs:
        for measure, by_task in values.get(name_of(variant, rows, seed, lr), {}).items():
            parts = {measure: by_task}
            if measure == "success":
                parts |= {task: {task: by_task[task]} for task in TASK_COLUMNS if task in by_task}
            for name, part in parts.items():
                found.setdefault((variant, rows, name), {})[seed] = series(part)
    seeds = sorted({seed for by_seed in found.values() for seed in by_seed})
    for (variant, *_), by_seed in found.items():
        if variant == "base":
            by_seed |= dict.fromkeys(seeds, next(iter(by_seed.values())))
    return found


def subtract(one, other):
    """{seed: values of one minus those of the other, by row}; {} without a seed that both have."""
    seeds = [seed for seed in one if seed in other]
    assert all(one[seed].index.equals(other[seed].index) for seed in seeds), "of other rows"
    return {seed: (one[seed] - other[seed]).dropna() for seed in seeds}


def collect(found):
    """[{variant, rows, measure, n, seeds, mean, ci, difference, difference_ci}] of what is there.

    found: of `find_measures`. The difference is to MGSD's runs of the same data size.
    """
    lines = []
    for (variant, rows, measure), values in found.items():
        mean, ci = estimate(values)
        line = {"variant": variant, "rows": rows, "measure": measure, "seeds": sorted(values),
                "n": len(next(iter(values.values()))), "mean": mean, "ci": ci}
        paired = subtract(values, found.get((REFERENCE, rows, measure), {}))
        if paired and variant != REFERENCE and measure != "seconds":
            line["difference"], line["difference_ci"] = estimate(paired)
        lines.append(line)
    return lines


# ---------------------------------------------------------------- tables and plots

def show(measure, mean, ci):
    """"74 [70, 78]": in %, but for tokens and seconds; one decimal where it would be -0."""
    numbers = [number * (1 if measure in PLAIN else 100) for number in (mean, *ci)]
    texts = [f"{number:.1f}" if -0.5 <= number <= -0.05 else f"{number:.0f}".replace("-0", "0")
             for number in numbers]
    return f"{texts[0]} [{texts[1]}, {texts[2]}]"


def cells_of(lines, key="mean"):
    """{(measure, variant): text}. key: "mean" or "difference"."""
    ci = "ci" if key == "mean" else "difference_ci"
    return {(line["measure"], line["variant"]): show(line["measure"], line[key], line[ci])
            for line in lines if key in line}


def make_table(lines, key="mean"):
    """Measures down, variants across, of lines of one data size. key: "mean" or "difference"."""
    cells = cells_of(lines, key)
    variants = list(dict.fromkeys(variant for _, variant in cells))
    seeds = {line["variant"]: len(line["seeds"]) for line in lines}
    rows = [["seeds", *[seeds[variant] for variant in variants]]]
    for measure in ("success", *TASK_COLUMNS, *list(MEASURES)[1:], "seconds"):
        texts = [cells.get((measure, variant), "") for variant in variants]
        if any(texts):
            rows.append([measure, *texts])
    return markdown({"head": ["", *variants], "lines": rows})


def make_summary(lines, measures=SUMMARY):
    """Variants down, a few measures across, of lines of one data size."""
    cells, seeds = cells_of(lines), {line["variant"]: len(line["seeds"]) for line in lines}
    rows = [[variant, seeds[variant], *[cells.get((measure, variant), "") for measure in measures]]
            for variant in dict.fromkeys(variant for _, variant in cells)]
    return markdown({"head": ["variant", "seeds", *measures], "lines": rows})


def make_claims(found, rows, whole=True):
    """Every claim with its difference, at this data size, and what the interval says of it.

    whole: those too of which nothing was run.
    """
    lines = []
    for letter, words, one, other in CLAIMS:
        paired = subtract(*(found.get((variant, rows, measure), {})
                            for variant, measure in (one, other)))
        if not paired:
            if whole:
                lines.append([letter, words, "", "not run"])
            continue
        mean, (low, high) = estimate(paired)
        result = "holds" if low > 0 else "does not hold here" if high < 0 else "undecided"
        sides = f"{' '.join(one)} over {' '.join(other)}"
        lines.append([letter, words, f"{sides}: {show('', mean, (low, high))}", result])
    return markdown({"head": ["", "claim", "points of percent", "result"], "lines": lines})


def collect_rates(values, runs, rows):
    """{(variant, lr): {measure: (mean, ci, seeds)}} at one data size, over the seeds there are.

    Of the variants that were trained at several rates.
    """
    found = {}
    for variant, size, seed, lr in runs:
        measured = values.get(name_of(variant, size, seed, lr), {})
        if lr and size == rows and measured:
            for measure in RATE_COLUMNS:
                if measure in measured:
                    by_seed = found.setdefault((variant, lr), {}).setdefault(measure, {})
                    by_seed[seed] = series(measured[measure])
    tried, rates = Counter(variant for variant, _ in found), {}
    for (variant, lr), measures in found.items():
        if tried[variant] > 1:
            rates[variant, lr] = {measure: (*estimate(by_seed), len(by_seed))
                                  for measure, by_seed in measures.items()}
    return rates


def make_rate_table(rates):
    """What every learning rate was worth, and what it kept. rates: of `collect_rates`."""
    rows = []
    for (variant, lr), measured in rates.items():
        texts = [show(name, *measured[name][:2]) if name in measured else ""
                 for name in RATE_COLUMNS]
        rows.append([variant, f"{lr:g}", measured["success"][2], *texts])
    return markdown({"head": ["variant", "rate", "seeds", *RATE_COLUMNS], "lines": rows})


def far_below(successes):
    """The variants that never have half of the highest success. successes: [(variant, success)]."""
    best = {}
    for variant, success in successes:
        best[variant] = max(success, best.get(variant, 0))
    return [variant for variant, success in best.items() if success < max(best.values()) / 2]


def name_left_out(figure, variants):
    if variants:
        figure.suptitle(f"not shown, below half of the best: {', '.join(variants)}", fontsize=8)


def plot_sizes(lines, path):
    """Success from pictures against training rows, of the variants with several sizes.

    Those far below are left out, and named.
    """
    figure, axes = plt.subplots(figsize=(6.5, 3.5), layout="constrained")
    points = {}                                              # variant: [(rows, mean, low, high)]
    for line in lines:
        if line["measure"] == "success" and line["variant"] != "base":
            points.setdefault(line["variant"], []).append((line["rows"], line["mean"], *line["ci"]))
    points = {variant: sorted(some) for variant, some in points.items() if len(some) > 1}
    left_out = far_below([(name, point[1]) for name, some in points.items() for point in some])
    shift, ticks = 0.88, {point[0] for some in points.values() for point in some}
    for variant, some in points.items():
        if variant not in left_out:
            rows, mean, low, high = np.array(some).T
            errors = 100 * np.maximum([mean - low, high - mean], 0)
            axes.errorbar(rows * shift, 100 * mean, errors, label=variant, marker="o", capsize=3)
            shift *= 1.06                                   # side by side, not on top of each other
    axes.set(xscale="log", xlabel="training rows per task and board size", ylabel="success, %")
    axes.set_xticks(sorted(ticks), map(str, sorted(ticks)))
    axes.minorticks_off()
    name_left_out(figure, left_out)
    if axes.get_legend_handles_labels()[0]:
        figure.legend(loc="outside right", fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_rates(rates, path, kept=("questions", "symbols")):
    """What is kept against success from pictures: a line a variant, a point a learning rate.

    Variants far below are left out, and named.
    """
    figure, panels = plt.subplots(1, len(kept), figsize=(9.5, 3.8), layout="constrained")
    lines = {}
    for (variant, lr), measured in rates.items():
        lines.setdefault(variant, []).append((lr, measured))
    left_out = far_below([(name, measured["success"][0]) for (name, _), measured in rates.items()])
    for axes, measure in zip(panels, kept, strict=True):
        for k, (variant, points) in enumerate(lines.items()):
            points = [(100 * measured["success"][0], 100 * measured[measure][0], lr)
                      for lr, measured in points if measure in measured]
            if variant in left_out or not points:
                continue
            x, y, _ = zip(*points, strict=True)
            axes.plot(x, y, "o-", color=COLOURS[k], label=variant)
            for x, y, lr in points:
                axes.annotate(f"{lr:g}", (x, y), (5, 4 if k % 2 else -9), fontsize=7,
                              textcoords="offset points", color=COLOURS[k])
        axes.margins(0.2)
        axes.set(xlabel="success from pictures, %", ylabel=f"{measure}, %")
    name_left_out(figure, left_out)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right", fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def write(args, runs):
    """values.json, results.md and two plots in args.out, of what is there."""
    values, smallest = read_values(args.out, runs), args.rows[0]
    found = find_measures(values, [run for run in runs if run[3] in (None, args.lr)])
    lines, rates = collect(found), collect_rates(values, runs, smallest)
    small = [line for line in lines if line["rows"] == smallest]
    parts = [f"# {smallest} rows per task and board size: mean over seeds [95% interval], %",
             make_summary(small), "# Claims", make_claims(found, smallest), "# All measures",
             make_table(small), "# Differences to mgsd, paired", make_table(small, "difference")]
    for rows in args.rows[1:]:
        some = [line for line in lines if line["rows"] == rows]
        if some:
            parts += [f"# {rows} rows", make_summary(some), make_claims(found, rows, whole=False),
                      make_table(some), make_table(some, "difference")]
    parts += ["# Learning rates", make_rate_table(rates)]
    out = Path(args.out)
    plot_sizes(lines, out / "success_by_rows.png")
    plot_rates(rates, out / "rates.png")
    write_text(out / "results.md", "\n\n".join(part.strip() for part in parts) + "\n")
    print(f"{parts[0]}\n\n{parts[1]}more in {out}/results.md")
