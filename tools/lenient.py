"""Plans as other models write them: words, arrows, bold letters, labelled lines.

    python -m tools.lenient answers.jsonl --data data/tiny --out read.jsonl
    python evaluate.py --responses read.jsonl

A filter: each line of answers gets a "plan", a list of actions or null, which evaluate.py takes in
place of its own reading (`gen_data.parse`, which reads the one form that is asked for).
"""
import json
import re
from pathlib import Path

import gen_data
from gen_data import TASKS, WORDS, Parser, fail, names_of, read_actions, run_script, write_text

TAG = re.compile("<answer>((?:(?!<answer>).)*?)</answer>", re.IGNORECASE | re.DOTALL)
ARROWS = {"↑": "U", "↓": "D", "←": "L", "→": "R", "⬆": "U", "⬇": "D", "⬅": "L", "➡": "R"}
BOXED = re.compile(r"\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}")
# A line that begins with "Action plan: ", "**Final answer:** ", "So the shortest path is ", ...
LABELLED = re.compile(
    r"^[ \t>#*-]{0,9}(?:(?:so|thus|therefore|hence|the|my|final|optimal|shortest|action)[ ,]{1,2})"
    r"{0,5}(?:answer|plan|actions|sequence|solution|path)[ *]{0,4}(?:[:=]|\bis\b:?|\n)\s{0,9}"
    r"([^\n]+)", re.IGNORECASE | re.MULTILINE)
BOLD_LINE = re.compile(r"^[ \t>#-]{0,9}\*\*([^*\n]+)\*\*[ \t.]{0,9}$", re.MULTILINE)
BOLD_RUN = re.compile(r"\*\*([A-Z]+)\*\*")


def parse(task, text):
    """The actions that a text answers with, or None.

    What the last <answer>…</answer> holds; without a tag a \\boxed{}, a line that begins with
    "Action plan:" or the like, a bold line, a bold run of capitals, or a last line of nothing else.
    Each in letters, words or arrows. Nothing is made of coordinates or of prose.
    """
    actions = TASKS[task].actions
    answers = TAG.findall(text)
    if answers:
        return read_loosely(answers[-1], actions)
    boxed, labelled, bold_lines, bold_runs = (
        form.findall(text)[:-11:-1]  # the last ten, the latest first
        for form in (BOXED, LABELLED, BOLD_LINE, BOLD_RUN))
    last_line = text.rstrip().rpartition("\n")[2]
    named, bare = [*boxed, *labelled, text], [*bold_lines, *bold_runs, last_line]
    for least, bodies in ((1, named), (2, bare)):  # one bold word may be emphasis
        for body in bodies:
            plan = read_loosely(body, actions)
            if plan and len(plan) >= least:
                return plan
    return None


def read_loosely(text, actions):
    """read_actions that takes words or arrows too and sets markup aside.

    Beside letters an arrow is no action: in "U → R" it only separates.
    """
    text = re.sub(r"\\(?:text|math)[a-z]{0,6}|[*_`'\"$\[\](){}\ufe0f]", " ", text)
    text = text.strip().rstrip(".;!").replace(";", ",")
    pieces, names = [text], names_of(actions, ARROWS)
    if re.search("[A-Za-z]", text):
        pieces, names = re.split("->|=>|→", text), names_of(actions, WORDS)
    plan = []
    for piece in pieces:
        found = read_actions(piece, names_of(actions)) or read_actions(piece, names)
        if found is None:
            return None
        plan += found
    return plan


def parse_args(argv=None):
    parser = Parser(prog="-m tools.lenient", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("answers", metavar="FILE", help='{"id", "response"} lines')
    add("--data", default=gen_data.PRESETS["tiny"]["out"], help="data folder")
    add("--split", default="test", choices=gen_data.SPLITS)
    add("--out", required=True, metavar="FILE", help="the same lines, with a plan each")
    return parser.parse_args(argv)


def main(args):
    tasks = {row.id: row.task for row in gen_data.load_rows(args.data, args.split)}
    lines, read = [], 0
    if not Path(args.answers).is_file():
        fail(f"{args.answers}: no such file")
    if Path(args.out).exists():
        fail(f"{args.out} exists: choose another --out")
    for where, line in gen_data.read_metadata(Path(args.answers)):
        if not isinstance(line, dict) or not isinstance(line.get("response"), str):
            fail(f'{where}: wanted an object with "id" and "response"')
        if line.get("id") not in tasks:
            fail(f"{where}: id {line.get('id')!r} is not in {args.data}/{args.split}")
        if tasks[line["id"]] in TASKS:  # an own row's answer is no plan
            line["plan"] = parse(tasks[line["id"]], line["response"])
            read += line["plan"] is not None
        lines.append(json.dumps(line) + "\n")
    write_text(args.out, "".join(lines))
    print(f"{args.out}: a plan was read in {read} of {len(lines)} answers; next: python "
          f"evaluate.py --responses {args.out} --data {args.data}")


if __name__ == "__main__":
    run_script(parse_args, main)
