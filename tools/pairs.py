"""Pairs, the rows of a user's own: a picture and what it shows as symbols.

    {"file_name", "id", "prompt", "symbols"} and optionally
    "hint"       what only the teacher may read, with the context "state+plan"
    "answer"     what a response is compared with
    "questions"  [{"question", "answer"}] of the cold start, else it asks for the symbols
    "group"      rows that are counted together
Texts reach the model as they stand. "task" is the group, "level" None. The functions are those of a
puzzle's row in gen_data.py, of the same names: there they are called for pairs.
"""
import json
import re
from decimal import Decimal

from gen_data import TASKS, digest, last_answer, numbered, split_answers

ASK_SYMBOLS = "Write down what the picture shows, in symbols and completely."


def row_fault(row):
    """What is wrong with a row, or None."""
    asked = row.get("questions", [])
    if not isinstance(asked, list) or not all(isinstance(q, dict) for q in asked):
        return '"questions": wanted a list of {"question", "answer"}'
    texts = [(name, row.get(name)) for name in ("id", "prompt", "symbols")]
    texts += [(name, row[name]) for name in ("hint", "answer", "group") if name in row]
    texts += [(f"{name} {i}", q.get(name)) for i, q in enumerate(asked, 1)
              for name in ("question", "answer")]
    for name, text in texts:
        if not isinstance(text, str) or not text.strip():
            return f'"{name}": wanted a text, got {json.dumps(text)[:40]}'
        if special := re.search(r"<\|\w+\|>", text):
            return f'"{name}" holds {special[0]}, which the model would not read as text'
        text.encode()  # half a surrogate pair is no text either: ValueError
    group = row.get("group", "pairs")
    if group in TASKS or group == "macro" or not re.fullmatch(r"\w[\w .+-]{0,40}", group):
        return f'"group": wanted a short name of its own, got {group[:40]!r}'
    mixed = [name for name in ("task", "state", "plan") if name in row]
    return f"half a pair, half a puzzle: symbols and {', '.join(mixed)}" if mixed else None


def student_prompt(row):
    return row["prompt"]


def symbols(row):
    return row["symbols"]


def teacher_prompt(row, context="state+plan"):
    hint = [row["hint"]] if context == "state+plan" and "hint" in row else []
    return "\n\n".join([row["symbols"], *hint, row["prompt"]])


def response(row):
    return f"<answer>{row.get('answer', '')}</answer>"


def answers_of(row):
    """{name: (question, answer)}, the perception questions of a row."""
    pairs = [(q["question"], q["answer"]) for q in row.get("questions", [])]
    return ({f"question {i}": pair for i, pair in enumerate(pairs, 1)}
            or {"map": (ASK_SYMBOLS, row["symbols"])})


def questions(row):
    return tuple(answers_of(row))


def perception_prompt(row, names=None, context=None):
    asked = answers_of(row)
    text = numbered([asked[name][0] for name in names or asked])
    return f"{context}\n{text}" if context else text


def perception_target(row, names=None):
    asked = answers_of(row)
    return numbered([asked[name][1] for name in names or asked])


def score_perception(row, names, text):
    asked = answers_of(row)
    whole = same(text, perception_target(row, names))  # symbols may hold "1." too
    answers = split_answers(names or asked, text)
    return {name: whole or same(said, asked[name][1]) for name, said in answers.items()}


def same(said, wanted, tolerance=0):
    """Equal but for case, blanks and a full stop; numbers: up to the tolerance."""
    number = re.compile(r"[+-]?(([0-9]{1,30}|[0-9]{1,3}(,[0-9]{3}){1,9})(\.[0-9]{1,30})?"
                        r"|\.[0-9]{1,30})")
    said, wanted = (text.strip().rstrip(".").replace("\u2212", "-") for text in (said, wanted))
    if number.fullmatch(wanted):
        if not number.fullmatch(said):
            return False
        a, b = (Decimal(text.replace(",", "")) for text in (said, wanted))
        return abs(a - b) <= Decimal(str(tolerance))
    return "".join(said.casefold().split()) == "".join(wanted.casefold().split())


def judge(row, text, parse=None, tolerance=0):
    """"plan" is the answer given: the last complete <answer>…</answer>, else the last line."""
    said, outcome = last_answer(text), "not judged"
    if said is None:
        said = text.strip().rpartition("\n")[2]
    if "answer" in row:
        right = same(said, row["answer"], tolerance)
        outcome = "success" if right else "wrong" if said.strip() else "no answer"
    return {"plan": said.strip() or None, "outcome": outcome, "optimal": None, "state": None,
            "state_right": None}


def key_of(row):
    return digest(row["symbols"], row["prompt"])
