"""What people read of an evaluation: its tables, and the page with curves, rollouts and a gallery.

evaluate.py calls make_tables, make_text and make_page; nothing is counted or judged here. The page,
tools/report.html, gets everything as JSON without "<" and only ever sets text: nothing in a
response can run, and nothing is loaded from a network.
"""
import base64
import io
import json
import math
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

import gen_data

GALLERY = 500  # rows the page shows at most
PICTURE = 256  # px, the longer side of a picture on the page


def percent(share):
    """0.925 -> 93, halves up; "" for None."""
    return "" if share is None else math.floor(100 * share + 0.5)


def with_interval(mean, ci, form="{}"):
    """0.5, [0.4, 0.6] -> "50 [40, 60]"; "" for None."""
    if mean is None:
        return ""
    text = form.format(percent(mean))
    return f"{text} [{form.format(percent(ci[0]))}, {form.format(percent(ci[1]))}]" if ci else text


def markdown(table):
    """The lines of a table as Markdown."""
    lines = [table["head"], ["---"] * len(table["head"]), *table["lines"]]
    return "".join("| " + " | ".join(map(str, line)) + " |\n" for line in lines)


def make_text(tables, summaries):
    """results.md."""
    parts = [f"## {t['title']}\n\n{t['about']}\n\n{markdown(t)}" for t in tables]
    return "\n".join([f"{explained(summaries)}\n", *parts])


def differing(summaries):
    """A line for every setting in which the conditions were not asked alike, else nothing.

    Prompts and pictures are compared among the conditions of one input.
    """
    values = {}                                     # setting: {value: conditions}
    for name, summary in summaries.items():
        asked = summary["asked"]
        for key, value in asked.items():
            if key == "questions":
                key = f"prompts or pictures ({summary['input']})"
            if key == "model":  # two may have one name
                value = f"{value}, files {gen_data.digest(asked['files'])[:6]}"
            if key not in ("adapter", "files", "responses") and (key, value) != ("seed", None):
                value = json.dumps(value, sort_keys=True)
                values.setdefault(key, {}).setdefault(value, []).append(name)
    lines = []
    for key, found in values.items():
        if len(found) > 1:
            parts = [", ".join(names) + ("" if "prompts" in key else f": {value}")
                     for value, names in found.items()]
            lines.append(f"The conditions differ in {key}: {'; '.join(parts)}\n")
    return "".join(lines)


# ---------------------------------------------------------------- tables
# Each is {"title", "about", "head": [text], "lines": [[text or number]]}; the first column names
# the line. summaries: {condition: its summary.json}; comparison: from evaluate.compare.

def make_tables(summaries, comparison):
    """All tables that there is something to say in, the shortest summary first."""
    tables = [macro_table(summaries), level_table(summaries), trained_table(summaries),
              diagnosis_table(summaries), difference_table(summaries, comparison),
              perception_table(summaries)]
    return [table for table in tables if table["lines"]]


def explained(summaries):
    """What the conditions are."""
    own = not has_puzzles(summaries)
    runs = {"base": "the model without adapters", "coldstart": "after the cold start",
            "distill": "after the distillation"}
    inputs = {
        "image": "the picture",
        "text": "what the teacher reads, without the hint" if own
                else "the symbols, without a reference plan",
        "swapped": f"the picture of another {'row' if own else 'puzzle'}"}
    parts = []
    for key, texts in (("run", runs), ("input", inputs)):
        used = {summary[key] for summary in summaries.values()}
        parts += [f"{name}: {text}" for name, text in texts.items() if name in used]
    text = f"Conditions, a model with what it read: {', '.join(summaries)}."
    return f"{text} {'; '.join(parts)}." if parts else text


def has_puzzles(summaries):
    """Is any of the rows a puzzle? Only those have a size."""
    return any(cell["level"] for summary in summaries.values() for cell in summary["table"])


def filled(head, lines, keep=1):
    """A table without the columns that are empty in every line; the first `keep` always stay."""
    columns = [i for i in range(len(head))
               if i < keep or any(line[i] not in ("", None) for line in lines)]
    return {"head": [head[i] for i in columns],
            "lines": [[line[i] for i in columns] for line in lines]}


def share_of(cell, name, ci=None):
    """A rate in % as it stands in a line; over how many rows where these are not the line's n."""
    if cell[name] is None:
        return ""
    n = cell[f"{name}_n"]
    text = with_interval(cell[name], ci)
    return text if n == cell["n"] else f"{text} of {n}"


def macro_table(summaries):
    """All tasks, a line per condition."""
    puzzles, lines = has_puzzles(summaries), []
    whole = {name: next(cell for cell in summary["table"] if cell["task"] == "macro")
             for name, summary in summaries.items()}
    rates = {"success": "success", "pass_at_k": "pass@k", "optimal": "shortest plan"}
    if any(cell["trained_on"] for cell in whole.values()):
        rates["success_unseen"] = "success, rows not seen in training"
    for name, cell in whole.items():
        line = [name, cell["n"] or "", cell["not_judged"] or ""]
        line += [share_of(cell, key, cell[f"{key}_ci"]) if key in cell else "" for key in rates]
        line += [share_of(cell, key) for key in ("parsed", "map_right", "cut")]
        line.append(cell["overrun"] if puzzles else "")
        line.append("" if cell["tokens"] is None else round(cell["tokens"]))
        failures = ", ".join(f"{outcome} {count}" for outcome, count in cell["failures"].items())
        lines.append([*line, failures or ("none" if cell["n"] else "")])
    table = filled(["condition", "n", "not judged", *rates.values(), "answer", "map", "cut",
                    "overrun", "tokens", "failures"], lines)
    words = {"n": "rows that success is over", "not judged": "rows without an answer to compare "
             "with", "answer": "one could be read where it was asked for (else: no answer)",
             "map": "the one described is right", "cut": "no EOS within the limit",
             "overrun": "how many plans reach the goal and go on, which is not executed and does "
             "not count"}
    about = [f"{word}: {text}" for word, text in words.items() if word in table["head"]]
    return {
        "title": "All tasks" if puzzles else "All rows",
        "about": f"In % with 95% intervals; {'tasks' if puzzles else 'groups'} weigh the same and "
                 f"every row counts. {'; '.join(about)}."
                 + (f" {differing(summaries)}".rstrip().replace("\n", ". ")),
        **table}


def table_rows(summaries):
    """The name of every line of the table, with the cells of all conditions."""
    for cells in zip(*(summary["table"] for summary in summaries.values()), strict=True):
        first = cells[0]
        words = [first["task"], first["level"], first["bucket"]]
        yield " ".join(str(word) for word in words if word), cells


MACRO = "macro: the mean over the tasks, which weigh the same"


def rows_column(summaries):
    """The head of the column that names the rows of a line, and what stands about its lines."""
    if has_puzzles(summaries):
        return "task, size", f" {MACRO}; easy, medium, hard: by the length of the shortest plan."
    return "group", f" {MACRO.replace('tasks', 'groups')}."


def level_table(summaries):
    """Success by task, board size and difficulty; by group where there are no puzzles."""
    puzzles, lines = has_puzzles(summaries), []
    for name, cells in table_rows(summaries):
        line = [name, cells[0]["n"]]
        for cell in cells:
            optimal = "" if cell["optimal"] is None else f" ({share_of(cell, 'optimal')})"
            line.append(f"{percent(cell['success'])}{optimal}")
        lines.append(line)
    judged = any(any(line[2:]) for line in lines)
    if not judged or not puzzles and len(lines) == 2:  # one group: the table above says it
        lines = []
    head, about = rows_column(summaries)
    return {"title": "By task and board size" if puzzles else "By group",
            "about": ("Success in %, in brackets with the shortest plan; n: rows that success is "
                      "over." if puzzles else "Success in %; n: rows that it is over.") + about,
            **filled([head, "n", *summaries], lines)}


def trained_table(summaries):
    """Where a run was trained on some of the rows: how many, and its success without them."""
    lines = []
    for name, cells in table_rows(summaries):
        if not any(cell["trained_on"] for cell in cells):
            continue
        line = [name]
        for cell in cells:
            text = "not known"
            if cell["trained_on"] is not None:
                text = f"{cell['trained_on']} of {cell['rows']}"
            if cell["trained_on"] and cell["success_unseen"] is not None:
                text += f"; {percent(cell['success_unseen'])}% without"
            line.append(text)
        lines.append(line)
    return {
        "title": "Rows seen in training",
        "about": "How many of the rows a condition's run was trained on, and its success on the "
                 "others.",
        **filled([rows_column(summaries)[0], *summaries], lines)}


def diagnosis_table(summaries):
    """Perception or planning, a line per kind of response."""
    kinds = [(f"{side}_{plan}", f"map {side}, plan {plan}") for side in ("right", "wrong")
             for plan in ("shortest", "longer", "failed")]
    kinds += [("perception", "failures of perception"), ("planning", "failures of planning"),
              ("unclear", "failures, unclear")]
    lines = []
    for key, text in kinds:
        lines.append([text, *(summary["diagnosis"][key] for summary in summaries.values())])
    if not any(any(summary["diagnosis"].values()) for summary in summaries.values()):
        lines = []  # no puzzles
    return {
        "title": "Perception or planning?",
        "about": "Counts of responses, by the map they describe and what their plan is worth. A "
                 "failure is perception's if the plan works on the map described, planning's if "
                 "it fails there too or there is none, unclear if no map could be read.",
        "head": ["responses", *summaries], "lines": lines}


def difference_table(summaries, comparison):
    """Gaps, differences to the reference, shares of the reference's gap that are closed."""
    reference, pairs, tasks, lines = comparison["reference"], {}, [], []
    for name, gap in comparison["gaps"].items():
        pairs[f"{summaries[name]['run']}-text minus {name}"] = gap
    for name, gain in comparison["differences"].items():
        pairs.setdefault(f"{name} minus {reference}", gain)
    for title, numbers in pairs.items():
        tasks = list(numbers)
        lines.append([title, *(with_interval(numbers[task]["mean"], numbers[task]["ci"], "{:+}")
                               for task in tasks)])
    for name, shares in comparison["closed"].items():
        cells = ["" if shares[task] is None else f"{percent(shares[task])}%" for task in tasks]
        lines.append([f"share of the gap closed by {name}", *cells])
    return {
        "title": "Differences of success",
        "about": "In points, with 95% intervals over the same rows. The gap is that of "
                 f"{reference} to the same model with symbols." if comparison["closed"] else
                 "In points, with 95% intervals over the same rows.",
        "head": ["difference", *tasks], "lines": lines}


def perception_table(summaries):
    """Perception questions, a line per task and question, and per board size for all of them."""
    asked = {name: summary["perception"] for name, summary in summaries.items()
             if summary["perception"]}
    lines = []
    for cells in zip(*asked.values(), strict=True):
        exact = []
        for cell in cells:
            unread = f", {cell['not_in_form']} not in form" if cell["not_in_form"] else ""
            exact.append(with_interval(cell["exact"], cell["exact_ci"]) + unread)
        task, level, question = cells[0]["task"], cells[0]["level"], cells[0]["question"]
        if task not in gen_data.TASKS and question == "map":  # of own rows: their symbols
            question = "symbols"
        if level is None:
            lines.append([f"{task}: {question}", cells[0]["n"], *exact])
        elif question == "all":
            lines.append([f"{task} {level}: all", cells[0]["n"], *exact])
    return {
        "title": "Perception questions",
        "about": "Answered exactly, in % with 95% intervals; n: answers, or pictures for all: "
                 "every question about a picture; not in form: answers that have not the form that "
                 "was asked for, which are wrong.",
        "head": ["question", "n", *asked], "lines": lines}


# ---------------------------------------------------------------- the page

def read_lines(file):
    """The objects of a JSONL file, [] if there is none. NaN, which JSON has not, becomes None."""
    if not Path(file).is_file():
        return []
    with open(file, encoding="utf-8") as lines:
        return [json.loads(line, parse_constant=lambda _: None) for line in lines]


def as_url(save):
    """A data URL of the PNG that save(file, format="png") writes."""
    file = io.BytesIO()
    save(file, format="png")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def small_picture(path):
    """A picture as a small data URL, for looking at."""
    image = gen_data.open_picture(path)
    image.thumbnail((PICTURE, PICTURE))
    return as_url(image.quantize(64).save)


def walk(row, plan):
    """A plan as it is drawn: ([(row, column)] from the start, the point of its violation or None).

    The point is half a step towards what must not be entered.
    """
    path, violation = gen_data.execute(row.puzzle, plan or [])
    here, violation_at = path[-1], None
    if violation:
        down, right = gen_data.MOVES.get(plan[len(path) - 1], (0, 0))
        violation_at = (here[0] + down / 2, here[1] + right / 2)
    return [tuple(pos[:2]) for pos in path], violation_at


def on_the_page(row, verdict):
    """What the gallery shows of one answer. picture: the one that was read, by name, or None."""
    shown = {name: verdict[name] for name in ("response", "outcome", "optimal", "map_right")}
    shown["picture"] = verdict.get("picture", row.data["file_name"])
    if row.level is None:
        shown["read"] = verdict["plan"]
    else:
        described = verdict["map"]
        shown["described"] = described and gen_data.TASKS[row.task](**described).cells()
        shown["path"], shown["violation_at"] = walk(row, verdict["plan"])
    return shown


def row_on_the_page(row):
    """What the page shows of a row beside its picture: its cells, or an own row's texts."""
    shown = {"id": row.id, "task": row.task, "level": row.level}
    if row.level is not None:
        return shown | {"cells": row.puzzle.cells()}
    answers = " or ".join(row.answer_texts()) if "answer" in row.data else None
    return shown | {"prompt": row.student_prompt(), "symbols": row.data.get("symbols"),
                    "answer": answers}


def rollouts_on_the_page(run):
    """The rollouts of a run; with prompt and picture where its rows are still in its data.

    Rows of the same ids that it was not trained on are not shown: the data are others by now.
    """
    lines, known = read_lines(run / "rollouts.jsonl"), run / "trained_rows.json"
    if not lines or not known.is_file():
        return lines
    known = set(json.loads(known.read_text(encoding="utf-8")))
    data = json.loads((run / "args.json").read_text(encoding="utf-8"))["args"]["data"]
    if not Path(data, "train/metadata.jsonl").is_file():
        return lines
    rows = {row.id: row for row in gen_data.load_rows(data, "train") if row.key() in known}
    for line in lines:
        if line["id"] in rows:
            row = rows[line["id"]]
            line |= {"prompt": row.student_prompt(),
                     "pictures": [small_picture(path) for path in row.pictures()]}
    return lines


CURVES = {
    "KL, nats per token": ("kl", "kl_map", "kl_route", "kl_answer", "val_kl"),
    "rollouts": ("success", "optimal"), "length of a rollout, tokens": ("length",),
    "loss": ("loss", "val_loss"),
    "held-out answers right": ("val_map", "val_questions", "val_success", "val_teacher")}


def draw_training(lines, titles=tuple(CURVES)):
    """The curves of a metrics.jsonl, side by side, those of `titles` that there are, or None."""
    log, shown = pd.DataFrame(lines).set_index("step").dropna(axis=1, how="all"), {}
    for title in titles:
        known = [key for key in CURVES[title] if key in log]
        if known:
            shown[title] = known
    if not shown:
        return None
    figure = Figure(figsize=(3.4 * len(shown), 2.8), layout="constrained")
    plots = figure.subplots(1, len(shown), squeeze=False)[0]
    for axes, (title, keys) in zip(plots, shown.items(), strict=True):
        for key in keys:  # a validation has a value now and then
            curve = log[key].dropna()
            axes.plot(curve.index, curve, "." if len(curve) == 1 else "-", label=key)
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_xlabel("step", fontsize=9)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=8)
    return figure


def plots_of(run):
    """{title: a plot as a data URL} of the curves in the log of a run."""
    lines, plots = read_lines(run / "metrics.jsonl"), {}
    for title in CURVES if lines else ():
        figure = draw_training(lines, [title])
        if figure:
            plots[title] = as_url(figure.savefig)
    return plots


def make_page(rows, pool, tables, summaries, verdicts):
    """The HTML of report.html. verdicts: {condition: its predictions}.

    At most GALLERY rows are shown, evenly chosen; of several samples the first. pool: all rows of
    the split, whose pictures a control may have read.
    """
    runs = dict.fromkeys(Path(run) for summary in summaries.values()
                         for run in summary["args"]["adapter"] or () if run != "base")
    runs = [run for run in runs if run.is_dir()]
    shown, answers, paths = rows[::-(-len(rows) // GALLERY)], {}, {}
    for row in pool:
        paths |= {row.data["file_name"]: row.path, row.data.get("teacher_file_name"):
                  row.teacher_path}
    for name, lines in verdicts.items():
        first = {line["id"]: line for line in reversed(lines)}
        answers[name] = [on_the_page(row, first[row.id]) for row in shown]
    used = {answer["picture"] for some in answers.values() for answer in some} - {None}
    curves = {run.name: plots_of(run) for run in runs}
    data = {"tables": tables, "total": len(rows), "names": explained(summaries),
            "conditions": list(summaries), "answers": answers,
            "rows": [row_on_the_page(row) for row in shown],
            "pictures": {name: small_picture(paths[name]) for name in paths if name in used},
            "curves": {name: plots for name, plots in curves.items() if plots},
            "rollouts": {run.name: rollouts_on_the_page(run) for run in runs},
            "parts": gen_data.PARTS, "puzzles": list(gen_data.TASKS)}
    page = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    return page.replace("DATA", json.dumps(data).replace("<", "\\u003c"), 1)
