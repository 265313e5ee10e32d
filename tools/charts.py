"""An example of your own task: bar and line charts, their tables as symbols, questions about them.

    python -m tools.charts --out data/charts --train 200 --val 20 --test 50 --seed 0

Each row is a pair (see docs/your_own_task.md): the picture is a chart, the symbols its table as
CSV, the prompt a question that needs reading and comparing. Same seed, same rows and pictures.
"""
import argparse
import tempfile
from pathlib import Path

import numpy as np

from gen_data import SPLITS, fail, may_write, write_dataset

LABELS = {"bar": ("Ada", "Ben", "Cleo", "Dan", "Eve", "Finn"),
          "line": ("2018", "2019", "2020", "2021", "2022", "2023")}
FORM = " Write a short reason, then only the answer inside <answer></answer>."
AS_CSV = "Write the table of this chart as CSV: a line of names, then a line per label."


def ask(labels, values, rng):
    """(group, question, answer) about a table: values [labels, 2], the series A and B."""
    kind = ("largest", "difference", "crossing")[rng.integers(3)]
    if kind == "largest":
        return kind, "Where is A largest?", labels[values[:, 0].argmax()]
    if kind == "difference":
        i, j = sorted(rng.choice(len(labels), 2, replace=False).tolist())
        return (kind, f"How much do the values of A at {labels[i]} and {labels[j]} differ?",
                str(abs(int(values[i, 0]) - int(values[j, 0]))))
    above = [label for label, (a, b) in zip(labels, values, strict=True) if b > a]
    return kind, "What is the first label at which B exceeds A?", above[0] if above else "none"


def draw(form, labels, values, title, file):
    """The chart as a PNG of 384x288 px."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(figsize=(4, 3), dpi=96)
    places = np.arange(len(labels))
    for i, name in enumerate("AB"):
        if form == "bar":
            axes.bar(places + 0.4 * i - 0.2, values[:, i], 0.4, label=name)
        else:
            axes.plot(places, values[:, i], marker="o", label=name)
    axes.set(title=title, xticks=places, xticklabels=labels, ylim=(0, 21), yticks=range(0, 21, 4))
    axes.grid(axis="y", alpha=0.5)
    axes.legend(ncols=2, fontsize=8)
    figure.tight_layout()
    figure.savefig(file, metadata={"Software": None})  # the same bytes from every version
    pyplot.close(figure)


def chart_rows(split, number, seed, folder):
    """`number` rows of a split; their pictures are drawn into `folder`."""
    rng = np.random.default_rng([seed, SPLITS.index(split)])
    for i in range(number):
        form = ("bar", "line")[rng.integers(2)]
        labels = LABELS[form][:rng.integers(3, 7)]
        column = np.arange(1, 21)
        values = np.stack([rng.permutation(column)[:len(labels)] for _ in "AB"], 1)  # [labels, 2]
        group, question, answer = ask(labels, values, rng)
        lines = ["label,A,B"] + [f"{x},{a},{b}" for x, (a, b) in zip(labels, values, strict=True)]
        table, file = "\n".join(lines), Path(folder) / f"{split}_{i:05d}.png"
        draw(form, labels, values, f"{form} chart", file)
        yield {"file_name": f"chart_{i:05d}.png", "id": f"{split}_chart_{i:05d}", "group": group,
               "prompt": question + FORM, "symbols": table, "answer": answer,
               "hint": f"The answer is {answer}. Do not mention that it is given.",
               "questions": [{"question": AS_CSV, "answer": table},
                             {"question": f"Which value has A at {labels[-1]}?",
                              "answer": str(values[-1, 0])}], "picture": str(file)}


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m tools.charts", description=__doc__)
    parser.add_argument("--out", default="data/charts", help="output folder")
    for name, number in (("train", 200), ("val", 20), ("test", 50), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=number)
    parser.add_argument("--overwrite", action="store_true", help="replace the output folder")
    args = parser.parse_args(argv)
    if min(args.train, args.val, args.test, args.seed) < 0:
        fail("--train, --val, --test and --seed: wanted at least 0")
    may_write(args.out, args.overwrite)
    with tempfile.TemporaryDirectory() as folder:
        splits = {split: chart_rows(split, vars(args)[split], args.seed, folder)
                  for split in SPLITS}
        write_dataset(args.out, splits, {**vars(args), "source": "tools/charts.py"}, 0, 0)


if __name__ == "__main__":
    main()
