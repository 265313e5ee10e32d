"""Check a data folder before hours of training, and look at it.

    python -m tools.check data/mine --preset 4b
    python -m tools.check data/mine --preset 4b --html out/mine.html

Every row is read and every picture opened as the stages do it, and every text is counted in the
backbone's tokens, for which its tokenizer is loaded and no weights. What a stage would refuse is an
error, and the exit code is 2; what only deserves a look is a warning. The page shows, of every task
or group, rows with their pictures (the shortest plan drawn on a puzzle's), prompt, what the teacher
reads, answer and questions; those with findings first.
"""
import contextlib
import hashlib
import html
import io
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
from tqdm import tqdm
from transformers import AutoConfig
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

import common
import distill
import gen_data
from gen_data import SPLITS, OwnRow, Parser, fail, whole_number, write_text
from tools import report

EXAMPLES = 5  # places that a warning names
STRETCHED = 1.25  # how far a picture's sides may change their ratio
# What looks like LaTeX, code or SMILES, where a letter's case, a blank or a bracket has a meaning.
LETTERS = re.compile(r"[\\^;#]|\$.*\$|==|\w\(|\[\w|[a-z]\d[a-z]")
COUNTS = ["rows", "with answer"]  # columns of the table: sums, and what has a largest value
LARGEST = ["width, px", "height, px", "picture, tokens", "prompt, tokens", "teacher's, tokens",
           "response, tokens"]
ALIKE = ["picture and prompt", "symbols and prompt", "picture", "symbols"]  # the strongest first
STYLE = """
body { margin: 1.5rem; font: 16px/1.5 system-ui, sans-serif; color: #1c2330; }
p, article { overflow-wrap: anywhere; }
article { border-top: 1px solid #dde2ea; padding: .5rem 0 1rem; }
article div { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 18rem), 1fr)); }
table { display: block; overflow-x: auto; }
th, td { padding: .1rem .7rem; text-align: left; }
img { max-width: 100%; max-height: 20rem; vertical-align: bottom; }
.board { position: relative; display: inline-block; }
.board svg { position: absolute; inset: 0; width: 100%; height: 100%; stroke: #d6009a;
  stroke-width: .06; fill: none; }
h4 { margin: 0; color: #5b6575; }
pre { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; max-height: 20rem;
  overflow: auto; }
"""


def parse_args(argv=None):
    parser = Parser(prog="-m tools.check", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("data", metavar="DATA", help="data folder")
    add("--preset", default="tiny", choices=common.BACKBONES, help="backbone and its limits")
    add("--model", help="checkpoint folder or hub name (default: the preset's)")
    add("--max_pixels", type=whole_number(1), help="a larger picture is shrunk (default: the "
        "preset's)")
    add("--max_new_tokens", type=whole_number(1), help="length limit of a response, tokens "
        "(default: the preset's in distill.py)")
    add("--splits", nargs="+", default=SPLITS, choices=SPLITS, help="what is wanted (default: all)")
    add("--all", action="store_true", help=f"a warning names all of its rows, not {EXAMPLES}")
    add("--html", metavar="FILE", help="writes the page")
    add("--limit", type=whole_number(1), default=8,
        help="rows on the page per split, task and board size")
    args = parser.parse_args(argv)
    defaults = {**common.BACKBONES[args.preset], **distill.SETTINGS[args.preset]}
    for name in ("model", "max_pixels", "max_new_tokens"):
        setattr(args, name, getattr(args, name) or defaults[name])
    return args


class Findings:
    """What was found: errors in the stages' own words, warnings by kind with their places."""

    def __init__(self):
        self.errors, self.warnings, self.of_row = [], {}, {}

    def refused(self, where, function, *words):
        """Call what the stages call: its value, None where it refuses."""
        said = io.StringIO()
        try:
            with contextlib.redirect_stderr(said):
                return function(*words)
        except SystemExit:
            text = said.getvalue().strip().removeprefix("error: ")
        if text not in self.errors:
            self.errors.append(text)
        self.of_row.setdefault(where, []).append(text)

    def warn(self, kind, *places):
        """places: the `where` of a row, of several that are alike, or the name of a group."""
        more = [f"{len(places) - EXAMPLES} more"] if len(places) > EXAMPLES else []
        self.warnings.setdefault(kind, []).append(" = ".join([*places[:EXAMPLES], *more]))
        for where in places:
            self.of_row.setdefault(where, []).append(kind)

    def lines(self, every):
        """The lines that tell it; every: all places of a warning."""
        lines = [f"error: {text}" for text in self.errors]
        for kind, places in self.warnings.items():
            shown = places if every else places[:EXAMPLES]
            more = f" and {len(places) - len(shown)} more" if len(shown) < len(places) else ""
            lines.append(f"warning: {kind}: {'; '.join(shown)}{more}")
        return lines


def label(row):
    return row.task if isinstance(row, OwnRow) else f"{row.task} {row.level}"


# ---------------------------------------------------------------- one row
# Each yields what deserves a look.

def check_picture(image, processor, limit):
    if all(low == high for low, high in image.getextrema()):
        yield "picture of one colour"
    width, height = seen_size(image, processor)
    ratio = image.width / image.height
    name = f"{image.width}x{image.height} px is seen as {width}x{height}"
    if image.width * image.height > limit:
        share = width * height / (image.width * image.height)
        yield f"picture of {name}: {share:.0%} of its pixels remain under --max_pixels {limit}"
    elif max(ratio * height / width, width / height / ratio) > STRETCHED:
        yield f"picture of {name}: stretched"


def seen_size(image, processor):
    """(width, height) in px of what the network sees of a picture."""
    images = processor.image_processor
    return smart_resize(image.height, image.width, images.patch_size * images.merge_size,
                        images.size["shortest_edge"], images.size["longest_edge"])[::-1]


def facts_of_picture(image, processor):
    """Its size, its tokens, and a text that is the same for the same pixels."""
    width, height = seen_size(image, processor)
    images = processor.image_processor
    tokens = width * height // (images.patch_size * images.merge_size) ** 2
    pixels = hashlib.sha256(image.tobytes()).hexdigest()
    return {"width, px": image.width, "height, px": image.height, "picture, tokens": tokens,
            "picture": f"{image.size} {pixels}"}


def check_answers(row, tokens, limit):
    """Is what the row calls right accepted by the row's own scorer? tokens: of its response."""
    responses = [row.response()]
    if isinstance(row, OwnRow):
        responses = [f"<answer>{text}</answer>" for text in row.answer_texts()]
    if any(row.judge(text)["outcome"] != "success" for text in responses):
        yield f"the answer is never right, as {getattr(row, 'compare', 'plans')} are compared"
    for name, right in row.score(None, row.answers()).items():
        if not right:
            yield f"the answer to {name} is never right"
    if responses and tokens > limit:
        yield f"the right response has more tokens than --max_new_tokens {limit}: always cut"


def check_own(row):
    """For rows of one's own."""
    texts, prompt, symbols = row.answer_texts(), row.student_prompt(), row.symbols()
    if not symbols:
        yield ("no symbols: distill.py --teacher_reads picture is needed"
               + ("" if row.questions() else ", and there is no cold start"))
    elif symbols in prompt:
        yield "the prompt holds the symbols: the student reads what the teacher reads"
    if not texts:
        yield "no answer: the evaluation judges nothing"
    elif "<answer>" not in prompt:
        yield ("the prompt does not ask for <answer></answer>: what is answered has to be found in "
               "the response")
    if row.compare == "words" and any(map(LETTERS.search, texts)):
        yield ('the answer looks like LaTeX, SMILES or code, compared by words, without case: '
               '"compare": "exact" compares letters')
    if row.compare == "words" and any(gen_data.read_number(text) is not None for text in texts):
        yield ('the answer is a number, compared by words, so that 4.0 is not 4: a JSON number or '
               '"compare": "number" compares values')


def check_row(row, split, model, processor, args, found):
    """All of one row. Returns its facts: numbers of the table, and what it may share with others"""
    own, prompt, symbols = isinstance(row, OwnRow), row.student_prompt(), row.symbols()
    teacher, response = row.teacher_prompt("symbols+plan"), row.response()
    facts = {"where": row.where, "split": split, "task or group": label(row), "rows": 1,
             "with answer": int(not own or "answer" in row.data), "symbols": symbols,
             "symbols and prompt": symbols and symbols + prompt,
             "said of it": str([symbols, row.data.get("answer")])}
    for name, text in (("prompt", prompt), ("teacher's", teacher), ("response", response)):
        facts[f"{name}, tokens"] = len(processor.tokenizer.tokenize(text, verbose=False))
    for text, new_tokens in ((f"{row.ask()}\n{row.answers()}", 0), (teacher, args.max_new_tokens)):
        if row.where not in found.of_row:
            found.refused(row.where, common.check_lengths, model, processor, {row.where: text},
                          new_tokens)
    kinds = list(check_answers(row, facts["response, tokens"], args.max_new_tokens))
    if own:
        kinds += check_own(row)
    for path in row.pictures():
        image = found.refused(row.where, gen_data.open_picture, path)
        if image:
            kinds += check_picture(image, processor, args.max_pixels)
        if image and path == row.path:              # the teacher's may be the same in many rows
            facts |= facts_of_picture(image, processor)
            facts["picture and prompt"] = facts["picture"] + prompt
    for kind in kinds:
        found.warn(kind, row.where)
    return facts


# ---------------------------------------------------------------- rows beside each other

def check_duplicates(facts, found):
    """What several splits hold, and examples that one split holds twice."""
    told = set()                                     # rows that a stronger likeness was told of
    for what in ALIKE:
        for _, some in facts.groupby(what, sort=False):
            places, splits = tuple(some["where"]), sorted(some["split"].unique())
            if len(some) == 1 or places in told:
                continue
            kind, contradict = f"the same {what}", some["said of it"].nunique() > 1
            if len(splits) > 1:
                kind += f" in {' and '.join(splits)}"
            elif what == "picture and prompt" or (what == "symbols and prompt" and contradict):
                kind += " more than once"
                kind += ", with other answers or symbols" if contradict else ""
            else:
                continue                             # several questions about one thing are fine
            found.warn(kind, *places)
            told.add(places)


def check_groups(splits, found):
    """Groups and sizes of the test that no stage trains on, or too few rows for the control."""
    kinds = {name: Counter(map(label, rows)) for name, rows in splits.items()}
    for name, number in kinds.get("test", {}).items():
        if "train" in kinds and name not in kinds["train"]:
            found.warn("in test and not in train", name)
        if number == 1:
            found.warn("a single row in test, so that evaluate.py --input swapped is refused", name)


def make_table(facts):
    """A line per split and task, group or board size: numbers of rows, the largest of all else."""
    how = dict.fromkeys(COUNTS, "sum") | dict.fromkeys(LARGEST, "max")
    table = facts.groupby(["split", "task or group"], sort=False).agg(how)
    # Whole numbers, which a column with a gap would turn into fractions; "" for a gap.
    return table.reset_index().convert_dtypes().astype(object).fillna("")


# ---------------------------------------------------------------- the page

def drawn_plan(row):
    """SVG of the shortest plan over a puzzle's picture, in cells; a ring where it does not move."""
    path, _ = gen_data.execute(row.puzzle, row.plan)
    dots = [(pos[1] + 0.5, pos[0] + 0.5) for pos in path]                            # (x, y)
    line, size = " ".join(f"{x},{y}" for x, y in dots), len(row.puzzle.cells())
    shapes = f'<polyline points="{line}"/>'
    for (x, y), after in zip(dots, dots[1:], strict=False):
        if (x, y) == after:
            shapes += f'<circle cx="{x}" cy="{y}" r=".2"/>'
    return f'<svg viewBox="0 0 {size} {size}">{shapes}</svg>'


def card(row, split, found):
    """A row: its pictures, and every text that a model reads or writes."""
    notes, pictures = found.of_row.get(row.where, []), ""
    plan = "" if isinstance(row, OwnRow) else drawn_plan(row)
    for path in row.pictures():
        source = found.refused(None, report.small_picture, path)
        image = f'<img alt="" src="{source}">{plan}' if source else "cannot be read"
        pictures += f'<div class="board">{image}</div> '
    answer = " or ".join(row.answer_texts()) if isinstance(row, OwnRow) else row.response()
    asked = [f"{row.ask((name,))}\n→ {row.answers((name,))}" for name in row.questions()]
    texts = {"prompt": row.student_prompt(),
             "what the teacher reads": row.teacher_prompt("symbols+plan"),
             "answer": answer or "none: not judged",
             "questions of the cold start": "\n\n".join(asked)}
    boxes = "".join(f"<section><h4>{name}</h4><pre>{html.escape(text)}</pre></section>"
                    for name, text in texts.items())
    about = html.escape(" ".join(filter(None, (split, label(row), row.bucket, row.id))))
    return (f"<article><p><b>{about}</b> {html.escape('; '.join(notes))}</p>"
            f"<div><section>{pictures}</section>{boxes}</div></article>")


def make_page(args, splits, about, table, found):
    """One file without scripts. Rows with findings first."""
    notes = "".join(f"<p>{html.escape(line)}</p>" for line in found.lines(args.all))
    body = ""
    for split, rows in splits.items():
        ordered = sorted(rows, key=lambda row: row.where not in found.of_row)
        shown = gen_data.choose_rows(ordered, None, args.limit)
        body += f"<h2>{split}: {len(shown)} of {len(rows)} rows</h2>" + "".join(
            card(row, split, found)
            for row in tqdm(shown, desc=f"page, {split}", unit="row", leave=False))
    name = html.escape(str(args.data))
    return (f'<!doctype html><meta charset="utf-8"><meta name="viewport" '
            f'content="width=device-width"><title>{name}</title><style>{STYLE}</style>'
            f"<h1>{name}</h1><p>{html.escape(about)}</p>{table.to_html(index=False, border=0)}"
            f"<h2>Findings</h2>{notes or '<p>Nothing to remark.</p>'}{body}\n")


# ---------------------------------------------------------------- main

def load_tokens(args):
    """(what `common.check_lengths` reads of a model, the processor), without the weights."""
    processor = common.load_processor(args.model, args.max_pixels)
    with common.in_one_line(f"--model {args.model} cannot be loaded"):
        config = AutoConfig.from_pretrained(common.fetch(args.model))
    return SimpleNamespace(config=config), processor


def load_splits(args, found):
    """{split: its rows} of what can be loaded. A run trains without a validation split."""
    splits = {}
    for split in args.splits:
        if split == "val" and not gen_data.has_split(args.data, split):
            found.warn("no validation split: the stages train without one", f"{args.data}/{split}")
            continue
        rows = found.refused(None, gen_data.load_rows, args.data, split)
        if rows:
            splits[split] = rows
    return splits


def main(args):
    found, facts = Findings(), []
    if not Path(args.data).is_dir():
        fail(f"{args.data}: no such folder")
    model, processor = load_tokens(args)
    splits = load_splits(args, found)
    own = any(row.own for rows in splits.values() for row in rows)
    if own and args.model == common.BACKBONES["tiny"]["model"]:
        common.warn("the bundled backbone knows only the words of its puzzles: with rows of your "
                    "own it tests the plumbing and no more, and tokens are counted by its own "
                    "tokenizer; take --preset 2b, 4b or 8b")
    for split, rows in splits.items():
        for row in tqdm(rows, desc=split, unit="row", leave=False):
            facts.append(check_row(row, split, model, processor, args, found))
    columns = ["where", "split", "task or group", "said of it", *ALIKE, *COUNTS, *LARGEST]
    facts = pd.DataFrame(facts, columns=columns)
    check_duplicates(facts, found)
    check_groups(splits, found)
    table, context = make_table(facts), model.config.text_config.max_position_embeddings
    about = ("The largest width and height of a picture; then the most tokens of a picture, the "
             "student's prompt, the teacher's with the hint or plan, and the right response. The "
             f"context of --model {args.model} has {context}.")
    if len(table):
        lines = {"head": table.columns, "lines": table.to_numpy()}
        print(f"{about}\n\n{report.markdown(lines)}")
    for line in found.lines(args.all):
        print(line)
    if args.html:
        Path(args.html).parent.mkdir(parents=True, exist_ok=True)
        write_text(args.html, make_page(args, splits, about, table, found))
        print(f"the page is {args.html}")
    if found.errors:
        fail(f"{args.data}: a stage would refuse it; errors above: {len(found.errors)}")
    print(f"{args.data}: {len(facts)} rows that the stages take; warnings: {len(found.warnings)}")


if __name__ == "__main__":
    common.run_script(parse_args, main)
