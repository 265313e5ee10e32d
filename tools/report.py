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


def make_text(tables):
    """results.md."""
    return "\n".join(f"## {t['title']}\n\n{t['about']}\n\n{markdown(t)}" for t in tables)


def differing(summaries):
    """A line for every setting in which the conditions were not asked alike, else nothing.

    Prompts and pictures are compared among the conditions of one input.
    """
    values = {}                                     # setting: {value: conditions}
    for name, summary in summaries.items():
        asked = summary["asked"]
        for key, value in asked.items():
            if key == "questions":
                key = f"prompts or pictures ({name.rpartition('-')[2]})"
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
# Each is {"title", "about", "head": [text], "lines": [[text or number]]}.
# summaries: {condition: its summary.json}; comparison: from evaluate.compare.

def make_tables(summaries, comparison):
    """All tables that there is something to say in, the shortest summary first."""
    tables = [macro_table(summaries), level_table(summaries), trained_table(summaries),
              diagnosis_table(summaries), difference_table(comparison), perception_table(summaries)]
    return [table for table in tables if table["lines"]]


def macro_table(summaries):
    """All tasks, a line per condition."""
    whole = {name: next(cell for cell in summary["table"] if cell["task"] == "macro")
             for name, summary in summaries.items()}
    rates = {"success": "success"}
    if any("pass_at_k" in cell for cell in whole.values()):
        rates["pass_at_k"] = "pass@k"
    rates["optimal"] = "shortest plan"
    if any(cell["trained_on"] for cell in whole.values()):
        rates["success_unseen"] = "success, rows not trained on"
    lines = []
    for name, cell in whole.items():
        line = [name, *(with_interval(cell.get(key), cell.get(f"{key}_ci")) for key in rates)]
        line += [percent(cell[key]) for key in ("parsed", "map_right", "cut")]
        line.append(cell.get("overrun", ""))
        line.append("" if cell["tokens"] is None else round(cell["tokens"]))
        failures = [f"{outcome} {count}" for outcome, count in cell["failures"].items()]
        lines.append([*line, ", ".join(failures) or "none"])
    near = [f"{name} {summary['args']['tolerance']:g}" for name, summary in summaries.items()
            if summary["args"].get("tolerance")]
    return {
        "title": "All tasks",
        "about": "In % with 95% intervals; the tasks weigh the same and every row counts. image: "
                 "the picture; text: the symbols, without a reference plan; swapped: the picture "
                 "of another puzzle. answer: one could be read; map: the one described is "
                 "right; cut: no EOS within the limit. overrun: how many plans reach the "
                 "goal and go on, which is not executed and does not count."
                 + (f" Numbers could be off (--tolerance): {', '.join(near)}." if near else "")
                 + (f" {differing(summaries)}".rstrip().replace("\n", ". ")),
        "head": ["condition", *rates.values(), "answer", "map", "cut", "overrun", "tokens",
                 "failures"],
        "lines": lines}


def table_rows(summaries):
    """(task, level, difficulty, n) and the cells of all conditions, for every line of the table."""
    for cells in zip(*(summary["table"] for summary in summaries.values()), strict=True):
        first = cells[0]
        level = first["level"] or ("" if first["bucket"] else "all")
        yield [first["task"], level, first["bucket"] or "", first["n"]], cells


def level_table(summaries):
    """Success by task, board size and difficulty."""
    lines = []
    for line, cells in table_rows(summaries):
        for cell in cells:
            optimal = "" if cell["optimal"] is None else f" ({percent(cell['optimal'])})"
            line.append(f"{percent(cell['success'])}{optimal}")
        lines.append(line)
    return {
        "title": "By task and board size",
        "about": "Success in %, in brackets with the shortest plan.",
        "head": ["task", "size", "difficulty", "n", *summaries], "lines": lines}


def trained_table(summaries):
    """Where a run was trained on some of the rows: how many, and its success without them."""
    lines = []
    for line, cells in table_rows(summaries):
        if any(cell["trained_on"] for cell in cells):
            lines.append([*line, *(
                "not known" if cell["trained_on"] is None else
                f"{cell['trained_on']}: {percent(cell['success_unseen'])}" for cell in cells)])
    return {
        "title": "Rows that were trained on",
        "about": "How many of the rows are puzzles that a condition's run was trained on: its "
                 "success in % without them.",
        "head": ["task", "size", "difficulty", "n", *summaries], "lines": lines}


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


def difference_table(comparison):
    """Gaps, differences to the reference, shares of the reference's gap that are closed."""
    reference, pairs, tasks, lines = comparison["reference"], {}, [], []
    for name, gap in comparison["gaps"].items():
        pairs[f"{name.replace('-image', '-text')} minus {name}"] = gap
    for name, gain in comparison["differences"].items():
        pairs.setdefault(f"{name} minus {reference}", gain)
    for title, numbers in pairs.items():
        tasks = list(numbers)
        lines.append([title, *(with_interval(numbers[task]["mean"], numbers[task]["ci"], "{:+}")
                               for task in tasks)])
    for name, shares in comparison["closed"].items():
        cells = ["" if shares[task] is None else f"{percent(shares[task])}%" for task in tasks]
        lines.append([f"of the gap of {reference}, closed by {name}", *cells])
    return {
        "title": "Differences of success",
        "about": "In points, with 95% intervals over the same rows.",
        "head": ["difference", *tasks], "lines": lines}


def perception_table(summaries):
    """Perception questions, a line per task and question."""
    asked = {name: [cell for cell in summary["perception"] if cell["level"] is None]
             for name, summary in summaries.items() if summary["perception"]}
    lines = []
    for cells in zip(*asked.values(), strict=True):
        exact = [with_interval(cell["exact"], cell["exact_ci"]) for cell in cells]
        lines.append([cells[0]["task"], cells[0]["question"], cells[0]["n"], *exact])
    return {
        "title": "Perception questions",
        "about": "Answered exactly, in % with 95% intervals; all: every question about a picture.",
        "head": ["task", "question", "n", *asked], "lines": lines}


# ---------------------------------------------------------------- the page

def read_lines(file):
    """The objects of a JSONL file, [] if there is none. NaN, which JSON has not, becomes None."""
    if not Path(file).is_file():
        return []
    with open(file, encoding="utf-8") as lines:
        return [json.loads(line, parse_constant=lambda _: None) for line in lines]


def small_picture(path):
    """A picture as a small data URL, for looking at."""
    image, file = gen_data.open_picture(path), io.BytesIO()
    image.thumbnail((PICTURE, PICTURE))
    image.quantize(64).save(file, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def walk(row, plan):
    """A plan as it is drawn: ([(row, column)] from the start, the point of its violation or None).

    The point is the cell that should not have been entered, or half a step towards it.
    """
    puzzle, plan = row.puzzle, plan or []
    path, _ = gen_data.execute(puzzle, plan)
    here, executed, violation_at = path[-1], len(path) - 1, None
    if executed < len(plan) and not puzzle.done(here):
        action = plan[executed]
        down, right = gen_data.MOVES.get(action, (0, 0))
        violation_at = (here[0] + down / 2, here[1] + right / 2)
        there = puzzle.step(here, action)[0] if action in puzzle.actions else here
        if there[:2] != here[:2]:
            violation_at = there[:2]
    return [tuple(pos[:2]) for pos in path], violation_at


def on_the_page(row, verdict):
    """What the gallery shows of one answer."""
    shown = {name: verdict[name] for name in ("response", "outcome", "optimal", "map_right")}
    if row.level is not None:
        described = verdict["map"]
        shown["described"] = described and gen_data.TASKS[row.task](**described).cells()
        shown["path"], shown["violation_at"] = walk(row, verdict["plan"])
    return shown


def row_on_the_page(row):
    """What the gallery shows of a row: its picture and its cells, or an own row's texts."""
    shown = {name: row.data.get(name) for name in ("prompt", "symbols", "answer")}
    shown |= {"id": row.id, "task": row.task, "level": row.level}
    if shown["answer"] is not None:
        shown["answer"] = " or ".join(row.answer_texts())
    if row.level is not None:
        shown["cells"] = row.puzzle.cells()
    return shown | {"picture": small_picture(row.path)}


def level_points(summaries):
    """{task: {condition: [[level, success, low, high]]}}"""
    points = {}
    for name, summary in summaries.items():
        for cell in summary["table"]:
            if cell["level"] is not None:
                series = points.setdefault(cell["task"], {}).setdefault(name, [])
                series.append([cell["level"], cell["success"], *(cell["success_ci"] or ())])
    return points


def make_page(rows, tables, summaries, verdicts, runs):
    """The HTML of report.html. verdicts: {condition: its predictions}; runs: folders of runs.

    At most GALLERY rows are shown, evenly chosen; of several samples the first.
    """
    shown, runs = rows[::-(-len(rows) // GALLERY)], [run for run in runs if run.is_dir()]
    answers = {}
    for name, lines in verdicts.items():
        first = {line["id"]: line for line in reversed(lines)}
        answers[name] = [on_the_page(row, first[row.id]) for row in shown]
    curves = {run.name: read_lines(run / "metrics.jsonl") for run in runs}
    data = {"tables": tables, "levels": level_points(summaries), "total": len(rows),
            "conditions": list(summaries), "answers": answers,
            "rows": [row_on_the_page(row) for row in shown],
            "curves": {name: lines for name, lines in curves.items() if lines},
            "rollouts": {run.name: read_lines(run / "rollouts.jsonl") for run in runs},
            "parts": gen_data.PARTS}
    page = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    return page.replace("DATA", json.dumps(data).replace("<", "\\u003c"), 1)
