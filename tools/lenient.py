"""Plans as other models write them: words, arrows, lists, JSON, labelled lines.

    python -m tools.lenient answers.jsonl --data data/tiny --out read.jsonl
    python evaluate.py --responses read.jsonl

A filter: each line of answers gets a "plan", a list of actions or null, which evaluate.py takes in
place of its own reading (`gen_data.parse`, which reads the one form that is asked for). Here any
place of a response may speak (`last_place`), and what it holds is read by a grammar (the tables
below):

    plan    = [number] phrase, separated by commas, slashes, dashes, bars, line ends, "then", ...
    phrase  = [verb] [count] action [count] ["(" the same action ")"]
    action  = its name, a word of SPELLINGS, or an arrow where there are no letters

What holds anything else is no plan: nothing is made of coordinates or of prose.
"""
import json
import re
import shlex
from collections import deque
from functools import lru_cache
from pathlib import Path

import gen_data
from gen_data import (
    TASKS,
    Parser,
    after_thinking,
    any_of,
    fail,
    read_actions,
    run_script,
    write_text,
)

WORDS = {"UP": "U", "DOWN": "D", "LEFT": "L", "RIGHT": "R",
         "PICK UP": "PICK", "PICKUP": "PICK", "PUT DOWN": "DROP"}
# Keys of a JSON object whose value is an answer; words of a label such as "Action plan:".
KEYS = ("answer", "final_answer", "plan", "action_plan", "final_plan", "actions", "action_sequence",
        "sequence", "moves", "path", "solution", "steps", "directions")
LEADS = "so|thus|therefore|hence|the|my|here is|here's|final|optimal|shortest|action|solution"
AGAIN = "revised|corrected|updated|new|improved|better|fixed"  # it takes an earlier plan back
NOUNS = r"(?:answer|plan|actions|sequence|solution|path)(?: of (?:actions|moves|steps))?"
ITEM = r"(?:[-*•][ \t]|\(?[0-9]{1,3}[.):](?![0-9])|step [0-9]{1,3}\b)"  # of a list
ARROWS = {"↑": "U", "↓": "D", "←": "L", "→": "R", "⬆": "U", "⬇": "D", "⬅": "L", "➡": "R"}
OBJECT = r"(?: (?:THE )?PRINTER| IT)"
SPELLINGS = {  # of an action, beside its name and WORDS
    "U": "UPWARDS?", "D": "DOWNWARDS?", "L": "LEFTWARDS?", "R": "RIGHTWARDS?",
    "PICK": rf"(?:PICK|TAKE|GRAB|LIFT|COLLECT)(?:[ -]?UP)?{OBJECT}(?: UP)?|PICK[ -]UP",
    "DROP": (rf"(?:DROP|PUT|PLACE|SET|LAY)(?:[ -]?DOWN)?{OBJECT}(?: DOWN)?(?: ON(?:TO| TO)? "
             r"(?:THE )?TABLE)?|DROP ON(?:TO)? (?:THE )?TABLE|(?:PUT|SET)[ -]DOWN"),
}
VERBS = "MOVE|GO|STEP|WALK|HEAD|TRAVEL|PROCEED|SLIDE"
NUMBERS = ("ONE", "TWO", "THREE", "FOUR", "FIVE", "SIX", "SEVEN", "EIGHT", "NINE", "TEN")
TIMES = {"ONCE": 1, "TWICE": 2, "THRICE": 3, **{word: i for i, word in enumerate(NUMBERS, 1)}}
NUMBER = rf"(?:[0-9]{{1,2}}|{'|'.join(NUMBERS)})\b"
UNIT = "(?:TIMES?|CELLS?|STEPS?|SQUARES?|SPACES?|TILES?|BLOCKS?|UNITS?)"
BEFORE = rf"[0-9]{{1,2}} ?[X×]|{NUMBER} {UNIT}|[0-9]{{1,2}}"  # 2x right, two steps right
AFTER = rf"(?:[X×] ?[0-9]{{1,2}}|(?:BY |FOR )?{NUMBER} {UNIT}|ONCE|TWICE|THRICE)\b"  # right x2
BARE_AFTER = (  # R2; right 2,
    r"(?<=[A-Z])[0-9]{1,2}(?![0-9.):])|(?<=[A-Z] )[0-9]{1,2}(?= ?(?:[,;|\n]|\.?$))")
TOKENS = {  # of a plan, the first that fits; {name}: the actions' spellings
    "phrase": (rf"(?:(?:{VERBS})[ -])?(?:(?P<before>{BEFORE}) ?)?(?:TO THE )?"
               r"(?P<name>{name})(?!(?!X[0-9])[A-Z])(?: ?\( ?(?P<same>{name}) ?\))?"
               rf"(?: ?\( ?(?P<inside>{AFTER}) ?\)| ?(?P<after>{AFTER}|{BARE_AFTER}))?"),
    "arrow": "->|=>|→|➡|⇒|>",
    "number": r"\(?(?:(?:STEP|ACTION|MOVE) )?[0-9]{1,3}[.):]|STEP [0-9]{1,3}\b",
    "separator": r"AND THEN\b|AND\b|THEN\b|[ \n,，;|/+&.!•–—-]",
}
PLAIN = {  # of one in no explicit place
    "phrase": r"(?P<name>{name})(?![A-Z])", "arrow": TOKENS["arrow"], "number": TOKENS["number"],
    "separator": r"[ \n,，;|.!-]",
}
LATEX = {r"\\UPARROW": "↑", r"\\DOWNARROW": "↓", r"\\LEFTARROW": "←",
         r"\\(?:RIGHTARROW|TO)\b": "→"}
MARKUP = re.compile(r"```(?:[A-Z+#]*\n)?|\\(?:TEXT|MATH)[A-Z]{0,6}|\\BOXED|[*_`'\"$\[\]{}\ufe0f\\]")
# Fenced block, bold line, bold run of capitals: places where there is no explicit one.
BARE = re.compile(r"^```[a-z+#]*\n((?:(?!```).)*)```|^[ \t>#-]{0,9}\*\*([^*\n]+)\*\*[ \t.]{0,9}$"
                  r"|\*\*([A-Z]+)\*\*", re.MULTILINE | re.DOTALL)


def names_of(actions, others=()):
    """{name: action}: the actions' own names, and those of the dict `others` that mean one."""
    names = {name: others[name] for name in others if others[name] in actions}
    return names | {action: action for action in actions}


def last_place(text, actions, cut=False):
    """Who speaks for a response: (opening, body, closing) of a place, or None.

    1. A response that was cut (no EOS within the limit) answers only if it ends with a closed
       place: what it repeats of its prompt, or drafts, is no answer.
    2. Thinking never answers (`after_thinking`).
    3. The last explicit place speaks, also where it only takes an earlier plan back: a tag (one
       without its closing at the end too), a \\boxed{}, a JSON object with a key of KEYS, a line
       that begins with "Action plan:" or the like, "Corrected plan: " anywhere.
    4. All of its body counts and nothing else: a reader takes it whole or not at all.
    """
    reply, (forms, label_body) = after_thinking(text), place_forms(actions)
    last = deque(forms.finditer(reply), maxlen=1)
    if not last:
        return None
    found = last[0]
    form, said, rest = found.lastgroup, found[0], reply[found.end():]
    closed = {"tag": (8, 9), "box": (7, 1), "json": (0, 0)}  # how long its opening and closing are
    if form not in closed:
        body = {"open": rest, "withdrawn": ""}.get(form, label_body.match(rest)[1])
        return None if cut else (said, body, "")
    if cut and rest.strip(" \n\t`$*."):
        return None
    head, tail = closed[form]
    end = len(said) - tail
    return said[:head], said[head:end], said[end:]


@lru_cache
def place_forms(actions):
    """Two expressions for `last_place`: of any place of an answer, and of the body of a label.

    A label with a colon is a place whatever follows. With "is" or a line's end, and where it calls
    the answer a path, a list of the actions must follow: "The plan is right" is prose, and "The
    corrected plan is right" only takes back what stands before.
    """
    forms = {"tag": "<answer>(?:(?!<answer>).)*</answer>", "open": r"<answer>(?=\s*\S)"}
    names = any_of(names_of(actions, WORDS))
    own = any_of(actions)
    marked = r"[\s*_`'\"\[($]{0,9}(?:[0-9]{1,2}[.)] ?)?"
    capitals = rf"(?-i:(?:{own})(?=[^A-Za-z\n]*(?:$|(?:{own}))))"
    words = (rf"(?:go |move )?(?:{names})\b[^A-Za-z\n]{{0,9}}(?:[,，;|>→+-]|\bthen\b|\band\b)"
             rf"[^A-Za-z\n]{{0,9}}(?:(?:then|and|go|move) ){{0,3}}(?:{names})\b")
    listed = rf"(?={marked}(?:{capitals}|{words}|[↑↓←→⬆⬇⬅➡]))"
    colon = r"(?: is)?[ *_]{0,4}(?:\([^()\n]{1,30}\)[ *_]{0,4})?[:=]"
    verb = r"[ *_]{0,4}(?:[:=]|\bis\b:?|\n)"
    line = rf"^[ \t>#*-]{{0,9}}(?:(?:{LEADS}|{AGAIN})[ ,]{{1,2}}){{0,5}}"
    again = rf"\b(?:{AGAIN}) (?:(?:{LEADS}) ){{0,3}}{NOUNS}"
    forms["box"] = r"\\boxed\{(?:[^{}]|\{[^{}]*\})*\}"
    keys = "|".join(KEYS).replace("_", "[ _-]")
    forms["json"] = (rf"\{{(?=[^{{}}]*[\"'](?:{keys})[\"']\s*:)"
                     r"(?:[^{}]|\{[^{}]*\})*\}")
    forms["label"] = (rf"{line}(?:{NOUNS}(?<!path){colon}|{NOUNS}{verb}{listed})"
                      rf"|{again}(?:{colon}|{verb}{listed})"
                      rf"|\b(?:revised|correct(?:ed|ion)){colon}")
    forms["withdrawn"] = rf"{again}[ *_]{{0,4}}(?:\bis\b|\n)"  # and nothing in its place
    begins = rf"(?:{ITEM}|[↑↓←→⬆⬇⬅➡]|(?:go |move )?(?:{names})\b)"
    body = (r"[*_]{0,3}\s{0,9}(?:```[a-z]*\n)?(\[[^\[\]]*\](?=[ `*.]*$)"
            rf"|{ITEM}[^\n]*(?:\n\s{{0,9}}{ITEM}[^\n]*)*"
            rf"|[^\n]*(?:\n[ \t]*{begins}[^\n]*)*)")
    joined = "|".join(f"(?P<{name}>{form})" for name, form in forms.items())
    flags = re.IGNORECASE | re.MULTILINE
    return re.compile(joined, flags | re.DOTALL), re.compile(body, flags)


def parse(task, text, cut=False):
    """The actions that a response answers with, or None: all of its place, see `last_place`.

    Where there is no explicit place, the whole reply, or the last of: a fenced block, a bold line,
    a bold run of capitals, the lines at its end. Those hold names only, and at least two.
    """
    actions = TASKS[task].actions
    place = last_place(text, actions, cut)
    if place:
        return read_plan(place[1], actions)
    reply = "" if cut else after_thinking(text)
    plan = read_plan(reply, actions, PLAIN)
    if plan:
        return plan
    bodies = ["".join(filter(None, groups)) for groups in BARE.findall(reply)[:-11:-1]]
    for body in [*bodies, last_lines(reply, actions)]:
        plan = read_plan(body, actions, PLAIN)
        if plan and len(plan) >= 2:  # one bold word may be emphasis
            return plan
    return None


def last_lines(text, actions):
    """The lines of actions that a text ends with; "" for a list, or if something introduces it.

    What "Possible moves:" introduces, or a list of options, is no plan.
    """
    lines, found = [line for line in text.splitlines() if line.strip()], []
    while lines and read_plan(lines[-1], actions, PLAIN):
        found.append(lines.pop())
    introduced = lines and lines[-1].rstrip(" *_").endswith(":")
    listed = any(re.match(rf"\s*{ITEM}", line, re.IGNORECASE) for line in found)
    return "" if introduced or listed else "\n".join(found[::-1])


def read_plan(text, actions, tokens=TOKENS):
    """All of a text by the grammar: its actions, or None."""
    strict = read_actions(text, actions)
    if tokens is PLAIN:  # "Dull." is a word
        words = {*" ".join(names_of(actions, WORDS)).split()}
        for word in set(re.findall("[A-Za-z]+", text)):
            if not word.isupper() and (len(word) == 1 or word.upper() not in words):
                return None
    if strict:
        return strict
    text = plain_text(unpack_json(text) if tokens is TOKENS else text)
    grammar = compile_tokens(actions, tokens is PLAIN, False)
    if not re.search(rf"(?<![A-Z]){spellings(actions)}(?![A-Z])", text):
        grammar = compile_tokens(actions, tokens is PLAIN, True)
    plan, numbers, bare, at, previous, since_arrow = [], [], [], 0, None, 0
    while at < len(text):
        found = grammar.match(text, at)
        if not found or not found[0]:
            return None
        kind, word = found.lastgroup, found[0]
        if kind == "phrase":
            said = found.groupdict()
            before, same = said.get("before"), said.get("same")
            after = said.get("after") or said.get("inside")
            some, times = actions_of(said["name"], actions), count_of(before or after)
            bare += [times] if (before or after or "").isdigit() else []
            doubtful = before and (after or previous == "phrase")  # of two actions, whose is it?
            if doubtful or not times or (before or after or same) and len(some) > 1 \
                    or same and actions_of(same, actions) != some:
                return None
            plan += some * times
        elif kind == "number":
            numbers.append(int(re.search("[0-9]+", word)[0]))
        elif kind == "arrow":  # it separates two actions
            if len(plan) == since_arrow:
                return None
            since_arrow = len(plan)
        if word != " ":
            previous = kind
        at = found.end()
    counted = len(bare) > 1 and bare == list(range(1, len(bare) + 1))  # 1 right, 2 down: a list
    if counted or previous == "arrow" or numbers != list(range(1, len(numbers) + 1)):
        return None
    return plan or None


def plain_text(text):
    """A text in capitals, without markup, without brackets around all of it."""
    text = re.sub(r"(?<=[A-Z])\*(?= ?[0-9])|(?<=[A-Z] )\*(?=[0-9])", " X", text.upper())  # R*2
    for form, arrow in LATEX.items():
        text = re.sub(form, arrow, text)
    text = re.sub(r"[^\S\n]+", " ", MARKUP.sub(" ", text)).strip()
    inner = re.fullmatch(r"\(([^()]*)\)[.;]?", text)
    return inner[1] if inner else text


def unpack_json(text):
    """What a text in JSON says, as phrases; "?" where it says more. Any other text as it is."""
    inside = re.sub(r"```(?:[a-z]*\n)?", "", text).strip()
    if inside[:1] not in ("{", "["):
        return text
    for attempt in (inside, inside.replace("'", '"')):
        try:
            return phrases_of(json.loads(attempt))
        except (ValueError, RecursionError):
            pass
    return text


def phrases_of(value):
    """["R", "D"], {"actions": ...} or [{"action": "right", "count": 2}, ...] -> "right x2, ..."."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return ", ".join(map(phrases_of, value))
    if not isinstance(value, dict):
        return "?"
    value = {re.sub("[ -]", "_", key.lower()): item for key, item in value.items()}
    answers = [key for key in value if key in KEYS]
    if len(answers) == 1:
        return phrases_of(value[answers[0]])
    item = [value.pop(key) for key in ("action", "move", "direction") if key in value]
    count = [value.pop(key) for key in ("count", "times", "repeat") if key in value] or [1]
    if len(item) > 1 or not item or set(value) - {"step", "index"} or len(count) > 1:
        return "?"
    return f"{phrases_of(item[0])} x{count[0]}"


def spellings(actions):
    """An expression for one action in letters, or for a run of names such as UUR."""
    others = [SPELLINGS[action] for action in actions if action in SPELLINGS]
    return f"(?:{'|'.join([*others, any_of(names_of(actions, WORDS))])}|(?:{any_of(actions)})+)"


@lru_cache
def compile_tokens(actions, plain, arrows):
    """The expression of TOKENS or PLAIN for a task; arrows: they are the actions' names."""
    name = f"[{''.join(ARROWS)}]" if arrows else spellings(actions)
    table = PLAIN if plain else TOKENS
    forms = [f"(?P<{kind}>{form.replace('{name}', name)})" for kind, form in table.items()]
    return re.compile("|".join(forms))


def actions_of(name, actions):
    """The actions that a match of `spellings`, or an arrow, stands for."""
    names = names_of(actions, WORDS | ARROWS)
    if name in names:
        return [names[name]]
    for action in actions:
        if re.fullmatch(SPELLINGS.get(action, "(?!)"), name):
            return [action]
    return [names[part] for part in re.findall(any_of(actions), name)]


def count_of(text):
    """2 of "x2", "2 times", "twice"; 1 of nothing."""
    word = re.search(rf"[0-9]+|{'|'.join(TIMES)}", text or "ONCE")[0]
    return int(word) if word.isdigit() else TIMES[word]


def parse_args(argv=None):
    parser = Parser(prog="-m tools.lenient", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("answers", metavar="FILE", help='{"id", "response"} lines')
    add("--data", default=gen_data.PRESETS["tiny"]["out"], help="data folder")
    add("--split", default="test", choices=gen_data.SPLITS)
    add("--out", required=True, metavar="FILE", help="the same lines, with a plan each")
    return parser.parse_args(argv)


def main(args):
    if Path(args.out).exists():
        fail(f"{args.out} exists: choose another --out")
    rows = {row.id: row for row in gen_data.load_rows(args.data, args.split)}
    lines, asked, read = [], 0, 0
    for where, line in gen_data.read_jsonl(args.answers):
        if not isinstance(line, dict) or not isinstance(line.get("id"), str) \
                or not isinstance(line.get("response", 0), str | None):
            fail(f'{where}: wanted an object with "id" and "response"')
        if line["id"] not in rows:
            fail(f"{where}: id {line['id']!r} is not in {args.data}/{args.split}")
        row = rows[line["id"]]
        if not row.own:  # an own row's answer is no plan
            line["plan"] = parse(row.task, line["response"] or "", line.get("cut") is True)
            asked += 1
            read += line["plan"] is not None
        lines.append(json.dumps(line) + "\n")
    write_text(args.out, "".join(lines))
    words = ["evaluate.py", "--responses", args.out, "--data", args.data, "--split", args.split]
    print(f"{args.out}: a plan was read in {read} of {asked} answers to puzzles; next: "
          f"python {shlex.join(words)}")


if __name__ == "__main__":
    run_script(parse_args, main)
