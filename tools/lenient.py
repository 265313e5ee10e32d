"""Plans as other models write them: words, arrows, bold letters, labelled lines.

`gen_data.parse` reads the one form that is asked for; `evaluate.py --lenient` reads with this.
"""
import re

from gen_data import TASKS, WORDS, names_of, read_actions

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
