"""The study's tables and plots, from the files that its commands left (tools/study.py).

A measure of a run is one value per test row. Means weigh tasks alike, then average over seeds;
intervals (95%, percentile bootstrap) draw seeds and rows again, both at once; a difference to MGSD
is taken row by row and seed by seed. Three seeds say little about the spread over seeds: such an
interval is too narrow rather than too wide.
"""
import json
import os
from pathlib import Path

os.environ["MPLBACKEND"] = "Agg"  # no window, whatever a notebook has set

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from evaluate import answer_frame
from gen_data import PARTS, write_text
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
RATE_COLUMNS = ("success", "symbols", "questions")      # on test, for every learning rate
TASK_COLUMNS = ("frozenlake", "maze", "minibehaviour")  # success of each, beside the mean
PLAIN = ("tokens", "seconds")                           # not in %


def name_of(variant, rows, seed, lr=None):
    """The folder of a run."""
    if variant == "base":
        return variant
    return f"{variant}-{rows}-{seed}" + (f"-lr{lr:g}" if lr else "")


def read_lines(path):
    return [json.loads(line) for line in open(path, encoding="utf-8")]


def values_of(out, run, measure):
    """A measure of a run -> a Series of numbers by (task, row); None if it was not measured."""
    kind, source, column = MEASURES[measure]
    folder = Path(out, "eval", run, kind)
    if kind == "retention":
        file = folder / "retention.json"
        if not file.is_file():
            return None
        right = json.loads(file.read_text(encoding="utf-8"))["model"][column]["right"]
        return pd.Series(right, pd.MultiIndex.from_product([["all"], range(len(right))]), float)
    folder = folder / f"model-{source}"
    if not (folder / "summary.json").is_file():
        return None
    if column == "questions":
        frame = pd.DataFrame(read_lines(folder / "perception.jsonl"))
        return frame.groupby(["task", "id"])["right"].mean().astype(float)
    lines = read_lines(folder / "predictions.jsonl")
    frame = answer_frame(lines)
    if column in ("perception", "planning"):
        frame[column] = [float(line["failure"] == column) for line in lines]
    by_row = frame.groupby(["task", "id"])["success" if column == "solved" else column]
    return (by_row.max() if column == "solved" else by_row.mean()).astype(float)


def seconds_of(out, run, rows, seed):
    """Seconds of training: the sum over the steps of the run and of the cold start it continues."""
    folder = Path(out, "runs", run)
    if not (folder / "metrics.jsonl").is_file():
        return None
    init = json.loads((folder / "args.json").read_text("utf-8"))["args"].get("init", "none")
    folders = [folder] if init == "none" else [folder, Path(init)]
    return sum(line["step_seconds"] for part in folders
               for line in read_lines(part / "metrics.jsonl"))


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


def collect(out, runs):
    """[{variant, rows, measure, n, seeds, mean, ci, difference, difference_ci}] of what is there.

    runs: [(variant, rows, seed, lr)]. The difference is to MGSD's runs of the same data size.
    """
    found, lines = {}, []
    for variant, rows, seed, lr in runs:
        run = name_of(variant, rows, seed, lr)
        for measure in MEASURES:
            values = values_of(out, run, measure)
            if values is None:
                continue
            found.setdefault((variant, rows, measure), {})[seed] = values
            if measure == "success":
                for task in TASK_COLUMNS:
                    if task in values.index.get_level_values(0):
                        found.setdefault((variant, rows, task), {})[seed] = values.loc[[task]]
        seconds = seconds_of(out, run, rows, seed)
        if seconds is not None:
            found.setdefault((variant, rows, "seconds"), {})[seed] = pd.Series(
                [seconds], pd.MultiIndex.from_tuples([("all", 0)]))
    for (variant, rows, measure), values in found.items():
        mean, ci = estimate(values)
        line = {"variant": variant, "rows": rows, "measure": measure, "seeds": sorted(values),
                "n": len(next(iter(values.values()))), "mean": mean, "ci": ci}
        reference = found.get((REFERENCE, rows, measure), {})
        if variant == "base":                                 # the same answers for every seed
            values = dict.fromkeys(reference, next(iter(values.values())))
        paired = {seed: values[seed] - reference[seed] for seed in values if seed in reference}
        if paired and variant != REFERENCE and measure != "seconds":
            line["difference"], line["difference_ci"] = estimate(paired)
        lines.append(line)
    return lines


# ---------------------------------------------------------------- tables and plots

def show(measure, mean, ci):
    """"74 [70, 78]": in %, but for tokens and seconds."""
    scale = 1 if measure in PLAIN else 100
    return f"{scale * mean:.0f} [{scale * ci[0]:.0f}, {scale * ci[1]:.0f}]"


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
    """Arms down, a few measures across, of lines of one data size."""
    cells = cells_of(lines)
    rows = [[variant, *[cells.get((measure, variant), "") for measure in measures]]
            for variant in dict.fromkeys(variant for _, variant in cells)]
    return markdown({"head": ["variant", *measures], "lines": rows})


def make_rate_table(args, runs):
    """What every learning rate was worth, and what it kept, on the first seed and fewest rows."""
    rows = []
    for variant, size, seed, lr in runs:
        run = name_of(variant, size, seed, lr)
        if lr and (size, seed) == (args.rows[0], args.seeds[0]):
            texts = []
            for measure in RATE_COLUMNS:
                values = values_of(args.out, run, measure)
                texts.append("" if values is None else show(measure, *estimate({0: values})))
            if any(texts):
                rows.append([variant, f"{lr:g}", *texts])
    return markdown({"head": ["variant", "rate", *RATE_COLUMNS], "lines": rows})


def plot_sizes(lines, path):
    """Success from pictures against training rows, of the variants with several sizes."""
    figure, axes = plt.subplots(figsize=(5, 3.5), layout="constrained")
    some = [line for line in lines if line["measure"] == "success" and line["variant"] != "base"]
    for variant in dict.fromkeys(line["variant"] for line in some):
        points = sorted((line["rows"], line["mean"], *line["ci"]) for line in some
                        if line["variant"] == variant)
        rows, mean, low, high = 100 * np.array(points).T
        if len(points) > 1:
            errors = [mean - low, high - mean]
            axes.errorbar(rows / 100, mean, np.maximum(errors, 0), label=variant, marker="o",
                          capsize=3)
    axes.set(xscale="log", xlabel="training rows per task and level", ylabel="success, %")
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_retention(lines, path, kept=("symbols", "questions")):
    """What is kept against success from pictures, one point a variant: planning, perception."""
    figure, panels = plt.subplots(1, len(kept), figsize=(9, 3.5), layout="constrained")
    means = {(line["variant"], line["measure"]): 100 * line["mean"] for line in lines}
    variants = dict.fromkeys(line["variant"] for line in lines)
    for axes, measure in zip(panels, kept, strict=True):
        for variant, colour in zip(variants, plt.get_cmap("tab20").colors, strict=False):
            if (variant, "success") in means and (variant, measure) in means:
                axes.plot(means[variant, "success"], means[variant, measure], "o", color=colour,
                          label=variant)
        axes.set(xlabel="success from pictures, %", ylabel=f"{measure}, %")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right", fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_kl(out, runs, path, window=9):
    """KL of the parts of a response over MGSD's training, mean over seeds, smoothed."""
    figure, axes = plt.subplots(figsize=(5, 3.5), layout="constrained")
    logs = [pd.DataFrame(read_lines(Path(out, "runs", name_of(*run), "metrics.jsonl")))
            for run in runs if Path(out, "runs", name_of(*run), "metrics.jsonl").is_file()]
    for part in PARTS if logs else ():
        column = pd.DataFrame([log[f"kl_{part}"].astype(float) for log in logs]).mean()
        axes.plot(column.rolling(window, 1, center=True).mean(), label=part)
    axes.set(xlabel="step", ylabel="KL, nats per token", yscale="log")
    if logs:
        axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def write(args, runs):
    """results.md, results.json and three plots in args.out, of the runs that are there."""
    chosen = [run for run in runs if run[3] in (None, args.lr)]
    lines, smallest = collect(args.out, chosen), args.rows[0]
    small = [line for line in lines if line["rows"] == smallest]
    parts = [f"# {smallest} rows per task and board size: mean over seeds [95% interval], %",
             make_summary(small), make_table(small), "# Differences to mgsd, paired",
             make_table(small, "difference")]
    for rows in args.rows[1:]:
        some = [line for line in lines if line["rows"] == rows]
        parts += [f"# {rows} rows", make_table(some), make_table(some, "difference")]
    parts += [f"# Learning rates (seed {args.seeds[0]})", make_rate_table(args, runs)]
    out = Path(args.out)
    write_text(out / "results.json", json.dumps({"lines": lines}, indent=1) + "\n")
    plot_sizes(lines, out / "success_by_rows.png")
    plot_retention(small, out / "retention.png")
    plot_kl(out, [run for run in chosen if run[:2] == (REFERENCE, smallest)], out / "kl.png")
    write_text(out / "results.md", "\n\n".join(part.strip() for part in parts) + "\n")
    print(f"{parts[0]}\n\n{parts[1]}more in {out}/results.md")
