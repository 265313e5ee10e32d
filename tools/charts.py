"""An example of your own task: bar and line charts, their tables as symbols, questions about them.

    python -m tools.charts --out data/charts --train 200 --val 20 --test 50 --seed 0

Rows as in docs/your_own_task.md: the picture is a chart, the symbols its table as CSV, the prompt a
question that needs reading and comparing. Same seed, same rows and pictures.
"""
import tempfile

import numpy as np
from matplotlib.figure import Figure

from gen_data import SPLITS, Parser, run_script, whole_number, write_dataset

LABELS = {"bar": "Ada Ben Cleo Dan Eve Finn".split(), "line": "Mon Tue Wed Thu Fri Sat".split()}
AS_CSV = "Write the table of this chart as CSV: a line of names, then a line per label."


def ask(labels, values, rng):
    """(group, question, answer) about a table: values [labels, 2], the series A and B."""
    kind, a = ("largest", "difference", "crossing")[rng.integers(3)], values[:, 0]
    if kind == "largest":
        return kind, "Where is A largest?", labels[a.argmax()]
    if kind == "difference":
        i, j = sorted(rng.choice(len(labels), 2, replace=False))
        return kind, f"How much do A at {labels[i]} and {labels[j]} differ?", int(abs(a[i] - a[j]))
    first = np.append(values[:, 1] > a, True).argmax()
    return kind, "At which label is B first above A, or none?", [*labels, "none"][first]


def draw(form, labels, values, file):
    """The chart as a PNG of 384x288 px."""
    figure = Figure(figsize=(4, 3), dpi=96, layout="tight")
    axes, places = figure.subplots(), np.arange(len(labels))
    for name, column, shift in zip("AB", values.T, (-0.2, 0.2), strict=True):
        if form == "bar":
            axes.bar(places + shift, column, 0.4, label=name)
        else:
            axes.plot(places, column, marker="o", label=name)
    axes.set(xticks=places, xticklabels=labels, ylim=(0, 25), yticks=range(0, 25, 4))
    axes.grid(axis="y", alpha=0.5)
    axes.legend(ncols=2)
    figure.savefig(file)


def chart_rows(split, number, seed, folder):
    """`number` rows of a split; their pictures are drawn into `folder`."""
    rng = np.random.default_rng([seed, SPLITS.index(split)])
    for i in range(number):
        form = ("bar", "line")[rng.integers(2)]
        labels = LABELS[form][:rng.integers(3, 7)]
        values = np.stack([rng.permutation(20)[:len(labels)] + 1 for _ in "AB"], 1)  # [labels, 2]
        group, question, answer = ask(labels, values, rng)
        lines = ["label,A,B"] + [f"{x},{a},{b}" for x, (a, b) in zip(labels, values, strict=True)]
        last = {"question": f"Which value has A at {labels[-1]}?", "answer": str(values[-1, 0])}
        table, file = "\n".join(lines), f"{folder}/{split}_{i:05d}.png"
        draw(form, labels, values, file)
        yield {"file_name": f"chart_{i:05d}.png", "id": f"{split}_chart_{i:05d}", "group": group,
               "prompt": f"{question} Write a short reason, then <answer>the answer</answer>.",
               "symbols": table, "answer": answer, "hint": f"It is {answer}; do not mention this.",
               "questions": [{"question": AS_CSV, "answer": table}, last], "picture": file}


def parse_args(argv=None):
    parser = Parser(prog="-m tools.charts", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--out", default="data/charts", help="output folder")
    for split, number in zip(SPLITS, (200, 20, 50), strict=True):
        add(f"--{split}", type=whole_number(0), default=number, help="rows")
    add("--seed", type=whole_number(0), default=0)
    return parser.parse_args(argv)


def main(args):
    with tempfile.TemporaryDirectory() as folder:
        splits = {name: chart_rows(name, vars(args)[name], args.seed, folder) for name in SPLITS}
        write_dataset(args.out, splits, {**vars(args), "source": "tools/charts.py"}, 0, 0)


if __name__ == "__main__":
    run_script(parse_args, main)
