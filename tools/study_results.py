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
from pathlib import Path

os.environ["MPLBACKEND"] = "Agg"  # no window, whatever a notebook has set

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from evaluate import answer_frame
from gen_data import TASKS, fail, write_text
from tools.report import markdown, read_lines

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
PLAIN = ("tokens", "seconds")                           # not in %
UNPLOTTED = ("base", "sft_foreign")                     # so far below that the others lie on a line


def name_of(variant, rows, seed, lr=None):
    """The folder of a run."""
    if variant == "base":
        return variant
    return f"{variant}-{rows}-{seed}" + (f"-lr{lr:g}" if lr else "")


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
    return sum(line.get("step_seconds", 0) for part in folders  # a fork may leave a step out
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
    found, seeds = {}, sorted({run[2] for run in runs})
    for variant, rows, seed, lr in runs:
        measured = values.get(name_of(variant, rows, seed, lr), {})
        tasks = {task: {task: some} for task, some in measured.get("success", {}).items()}
        for measure, by_task in {**measured, **tasks}.items():
            by_seed = found.setdefault((variant, rows, measure), {})
            by_seed |= dict.fromkeys(seeds if variant == "base" else [seed], series(by_task))
    return found


def subtract(one, other):
    """{seed: values of one minus those of the other, by row}; {} without a seed that both have."""
    seeds = [seed for seed in one if seed in other]
    assert all(one[seed].index.equals(other[seed].index) for seed in seeds), "of other rows"
    return {seed: (one[seed] - other[seed]).dropna() for seed in seeds}


def frame_of(found, reference=None):
    """A line per variant, data size and measure: the mean, its interval, and both as a text.

    found: of `find_measures`. reference: a variant; then of the differences to it, by row and seed.
    """
    lines = []
    for (variant, rows, measure), values in found.items():
        if reference:
            if variant == reference or measure == "seconds":
                continue
            values = subtract(values, found.get((reference, rows, measure), {}))
        if values:
            mean, (low, high) = estimate(values)
            lines.append([variant, rows, measure, len(values), mean, low, high,
                          show(measure, mean, (low, high))])
    return pd.DataFrame(lines, columns=["variant", "rows", "measure", "seeds", "mean", "low",
                                        "high", "text"])


def frame_of_rates(values, runs):
    """`frame_of` every learning rate, of the variants that were trained at several."""
    frames = []
    for rate in sorted({lr or 0 for *_, lr in runs}):
        found = find_measures(values, [run for run in runs if (run[3] or 0) == rate])
        frames.append(frame_of(found).assign(rate=rate))
    frame = pd.concat(frames)
    return frame[frame.groupby("variant")["rate"].transform("nunique") > 1]


# ---------------------------------------------------------------- tables and plots

def show(measure, mean, ci):
    """"74 [70, 78]": in %, but for tokens and seconds; one decimal where it would be -0."""
    numbers = [number * (1 if measure in PLAIN else 100) for number in (mean, *ci)]
    texts = [f"{number:.1f}" if -0.5 <= number <= -0.05 else f"{number:.0f}".replace("-0", "0")
             for number in numbers]
    return f"{texts[0]} [{texts[1]}, {texts[2]}]"


def spread(frame, index, value="text"):
    """Variants (and rates) down, in the study's order; measures across."""
    table = frame.pivot(index=index, columns="measure", values=value)
    table.insert(0, "seeds", frame.groupby(index)["seeds"].max())
    return table.reindex(frame["variant"].unique(), level=0 if len(index) > 1 else None)


def as_markdown(table, *corner):
    """A frame with its index, whose columns are called `corner`."""
    return markdown({"head": [*corner, *table.columns],
                     "lines": table.fillna("").reset_index().to_numpy().tolist()})


def make_summary(frame):
    """Variants down, a few measures across, of one data size."""
    return as_markdown(spread(frame, ["variant"]).reindex(columns=["seeds", *SUMMARY]), "variant")


def make_table(frame):
    """All measures down, variants across, of one data size."""
    names = ["seeds", "success", *TASKS, *list(MEASURES)[1:], "seconds"]
    table = spread(frame, ["variant"]).reindex(columns=names).dropna(axis=1, how="all")
    return as_markdown(table.T, "")


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


def make_rate_table(frame):
    """What every learning rate was worth, and what it kept. frame: of `frame_of_rates`."""
    table = spread(frame, ["variant", "rate"]).reindex(columns=["seeds", *RATE_COLUMNS])
    return as_markdown(table.rename("{:g}".format, level="rate"), "variant", "rate")


def plot_sizes(frame, path):
    """Success from pictures against training rows, of the variants with several sizes."""
    figure, axes = plt.subplots(figsize=(6.5, 3.5), layout="constrained")
    frame, shift = frame[(frame["measure"] == "success") & ~frame["variant"].isin(UNPLOTTED)], 0.88
    for variant, some in frame.groupby("variant", sort=False):
        if len(some) > 1:
            ends = np.maximum([some["mean"] - some["low"], some["high"] - some["mean"]], 0)
            axes.errorbar(some["rows"] * shift, 100 * some["mean"], 100 * ends, label=variant,
                          marker="o", capsize=3)
            shift *= 1.06                                   # side by side, not on top of each other
    ticks = sorted(frame["rows"].unique())
    axes.set(xscale="log", xlabel="training rows per task and board size", ylabel="success, %")
    axes.set_xticks(ticks, map(str, ticks))
    axes.minorticks_off()
    figure.legend(loc="outside right", fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_rates(frame, path, kept=("questions", "symbols")):
    """What is kept against success from pictures: a line a variant, a point a learning rate."""
    figure, panels = plt.subplots(1, len(kept), figsize=(9.5, 3.8), layout="constrained")
    frame = frame[~frame["variant"].isin(UNPLOTTED)]
    means = 100 * spread(frame, ["variant", "rate"], "mean")
    for axes, measure in zip(panels, kept, strict=True):
        for variant, some in means.reindex(columns=["success", measure]).groupby(level=0):
            line, = axes.plot(some["success"], some[measure], "o-", label=variant)
            for (_, lr), point in some.iterrows():
                axes.annotate(f"{lr:g}", point, (5, 4), textcoords="offset points", fontsize=7,
                              color=line.get_color())
        axes.margins(0.2)
        axes.set(xlabel="success from pictures, %", ylabel=f"{measure}, %")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right", fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def write(args, runs):
    """values.json and results.md in args.out, of what is there; and what can be plotted."""
    values, smallest, out = read_values(args.out, runs), args.rows[0], Path(args.out)
    found = find_measures(values, [run for run in runs if run[3] in (None, args.lr)])
    rates = frame_of_rates(values, [run for run in runs if run[1] == smallest])
    whole, differences = frame_of(found), frame_of(found, REFERENCE)
    if whole.empty:
        fail(f"nothing was measured in {out}: run the lines of `python -m tools.study variants`")
    parts = []
    for rows in args.rows:
        frame = whole[whole["rows"] == rows]
        summary, claims = make_summary(frame), make_claims(found, rows, rows == smallest)
        table, paired = make_table(frame), make_table(differences[differences["rows"] == rows])
        if rows == smallest:
            parts += [f"# {rows} rows per task and board size: mean over seeds [95% interval], %",
                      summary, "# Claims", claims, "# All measures", table,
                      "# Differences to mgsd, paired", paired]
        elif len(frame):
            parts += [f"# {rows} rows", summary, claims, table, paired]
    if len(rates):
        parts += ["# Learning rates", make_rate_table(rates)]
        plot_rates(rates, out / "rates.png")
    if whole["rows"].nunique() > 1:
        plot_sizes(whole, out / "success_by_rows.png")
    write_text(out / "results.md", "\n\n".join(part.strip() for part in parts) + "\n")
    print(f"{parts[0]}\n\n{parts[1]}more in {out}/results.md")
