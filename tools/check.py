"""Check a data folder before hours of training, and look at it.

    python -m tools.check data/mine --preset 4b
    python -m tools.check data/mine --preset 4b --html mine.html

Every row is read and every picture opened as the stages do it, and every text is counted in the
backbone's tokens, for which its tokenizer is loaded and no weights. What a stage would refuse is an
error, and the exit code is 2; what only deserves a look is a warning. The page shows, of every task
or group, rows with their picture, prompt, what the teacher reads, and answer; of a puzzle the
shortest plan too.
"""
import contextlib
import hashlib
import html
import io
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from PIL import ExifTags, Image
from tqdm import tqdm

import common
import distill
import gen_data
from gen_data import SPLITS, OwnRow, Parser, fail, whole_number, write_text
from tools import report

EXAMPLES = 5  # places that a warning names
STRETCHED = 1.25  # how far a picture's sides may change their ratio
# What looks like LaTeX, code or SMILES, where a letter's case, a blank or a bracket has a meaning.
LATEX = re.compile(r"\\[A-Za-z]+|[_^]\{|^\$.+\$$")
CODE = re.compile(r";\s*$|\{\s*$|^\s*\}|\w\(.*\)\s*[:;]?\s*$|[=!<>]=|\bSELECT\b.*\bFROM\b",
                  re.MULTILINE)
SMILES = re.compile(r"(?=.*([=#\[\]@]|[bcnops][0-9]|[A-Z]\(|[A-Z][0-9].*[A-Z][0-9]))"
                    r"(Cl|Br|[BCNOPSFIHbcnops]|\[[^\]\s]+\]|[-=#$:/\\.()%@+]|[0-9]){5,}")


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
    backbone = common.BACKBONES[args.preset]
    args.model = args.model or backbone["model"]
    args.max_pixels = args.max_pixels or backbone["max_pixels"]
    limit = distill.SETTINGS[args.preset]["max_new_tokens"]
    args.max_new_tokens = args.max_new_tokens or limit
    return args


class Findings:
    """What was found: errors in the stages' own words, warnings by kind with their places."""

    def __init__(self):
        self.errors, self.warnings, self.of_row = [], {}, {}

    def refused(self, function, *words, where=None):
        """Call what the stages call. Returns (its value, was it refused?)."""
        said = io.StringIO()
        try:
            with contextlib.redirect_stderr(said):
                return function(*words), False
        except SystemExit:
            text = said.getvalue().strip().removeprefix("error: ")
        if text not in self.errors:
            self.errors.append(text)
        self.of_row.setdefault(where, []).append(text)
        return None, True

    def warn(self, kind, place, rows=()):
        """place: the `where` of a row, or what names several `rows`, or no row."""
        self.warnings.setdefault(kind, []).append(place)
        for where in rows or [place]:
            self.of_row.setdefault(where, []).append(kind)

    def lines(self, every):
        """Yields ("error" or "warning", text)."""
        for text in self.errors:
            yield "error", text
        for kind, places in self.warnings.items():
            shown = places if every else places[:EXAMPLES]
            more = f" and {len(places) - len(shown)} more" if len(shown) < len(places) else ""
            yield "warning", f"{kind}: {'; '.join(shown)}{more}"


# ---------------------------------------------------------------- pictures

def traits(path):
    """What a file has that other programs may show otherwise (see gen_data.open_picture)."""
    with Image.open(path) as image:
        if image.getbands()[-1] in "Aa" or "transparency" in image.info:
            yield "transparent picture, seen on white"
        if image.mode in ("I", "F") or image.mode.startswith("I;16"):
            yield "picture of more than 8 bits, scaled to 8"
        if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
            yield "picture seen turned, as its EXIF says"
        if getattr(image, "n_frames", 1) > 1:
            yield "picture of several frames, of which the first is seen"


def seen_size(processor, size, cache):
    """((width, height) in px, tokens) of what the network sees of a picture of this size."""
    if size not in cache:
        images = processor.image_processor
        grid = images([Image.new("RGB", size)], return_tensors="pt")["image_grid_thw"][0].tolist()
        cache[size] = ((grid[2] * images.patch_size, grid[1] * images.patch_size),
                       grid[1] * grid[2] // images.merge_size ** 2)
    return cache[size]


def check_picture(row, processor, limit, found, cache):
    """Opens the pictures of a row. Returns facts about the student's, {} if one cannot be read."""
    for path in reversed(row.pictures()):                               # the student's is the last
        image, refused = found.refused(gen_data.open_picture, path, where=row.where)
        if refused:
            return {}
        for trait in traits(path):
            found.warn(trait, row.where)
        if all(low == high for low, high in image.getextrema()):
            found.warn("picture of one colour", row.where)
    (width, height), tokens = seen_size(processor, image.size, cache)
    pixels, ratio = image.width * image.height, image.width / image.height
    name = f"{image.width}x{image.height} px is seen as {width}x{height}"
    if pixels > limit:
        found.warn(f"picture of {name}: {100 * width * height / pixels:.0f}% of its pixels remain "
                   f"under --max_pixels {limit}", row.where)
    elif max(ratio * height / width, width / height / ratio) > STRETCHED:
        found.warn(f"picture of {name}: stretched", row.where)
    return {"size": image.size, "ratio": max(ratio, 1 / ratio), "image tokens": tokens,
            "pixels": hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()}


# ---------------------------------------------------------------- texts and answers

def check_texts(rows, model, processor, limit, found):
    """Texts that leave no room in the context are errors, as in the stages."""
    for row in rows:
        for text, new_tokens in ((f"{row.ask()}\n{row.answers()}", 0),      # cold start
                                 (row.teacher_prompt("symbols+plan"), limit)):  # distillation
            refused = found.refused(common.check_lengths, model, processor, {row.where: text},
                                    new_tokens, where=row.where)[1]
            if refused:
                break


def check_answers(row, tokens, limit, found):
    """Is what the row calls right accepted by the row's own scorer? tokens: of its response."""
    responses = [row.response()]
    if isinstance(row, OwnRow):
        responses = [f"<answer>{text}</answer>" for text in row.answer_texts()]
    for text in responses:
        if row.judge(text)["outcome"] != "success":
            found.warn(f"the answer is never right, as {getattr(row, 'compare', 'plans')} are "
                       "compared", row.where)
    wrong = [name for name, right in row.score(None, row.answers()).items() if not right]
    if wrong:
        found.warn(f"the answer to {wrong[0]} is never right", row.where)
    if responses and tokens > limit:
        found.warn(f"the right response has more tokens than --max_new_tokens {limit}: it is "
                   "always cut", row.where)


def check_own(row, found):
    """What only deserves a look in a row of one's own."""
    texts, prompt = row.answer_texts(), row.student_prompt()
    if not row.symbols():
        found.warn("no symbols: distill.py --teacher_reads picture is needed"
                   + ("" if row.questions() else ", and there is no cold start"), row.where)
    if row.symbols() and row.symbols() in prompt:
        found.warn("the prompt holds the symbols: the student reads what the teacher reads",
                   row.where)
    if not texts:
        found.warn("no answer: the evaluation judges nothing", row.where)
    elif "<answer>" not in prompt:
        found.warn("the prompt does not ask for <answer></answer>: the last line counts",
                   row.where)
    if row.compare != "words":
        return
    for kind, looks in (("LaTeX", LATEX.search), ("SMILES", SMILES.fullmatch),
                        ("code", CODE.search)):
        if any(looks(text[:500]) for text in texts):
            found.warn(f'the answer looks like {kind}, compared by words, without case: "compare": '
                       '"exact" compares letters', row.where)
            return
    if any(gen_data.read_number(text) is not None for text in texts):
        found.warn('the answer is a number, compared by words, so that 4.0 is not 4: a JSON number '
                   'or "compare": "number" compares values', row.where)


# ---------------------------------------------------------------- duplicates, groups

def split_name(row):
    return Path(row.where.partition(", line ")[0]).parent.name


def check_duplicates(rows, facts, found):
    """The same row, or picture, or symbols, within a split and in several."""
    names, ids = ("symbols and prompt", "state"), Counter(row.id for row in rows)
    for row in rows:
        if ids[row.id] > 1:
            found.warn(f"{ids[row.id]} rows have the id {row.id}", row.where)
    alike = {}                                       # (what, value): rows
    for row in rows:
        what = names[0] if isinstance(row, OwnRow) else names[1]
        alike.setdefault((what, row.key()), []).append(row)
        if pixels := facts[row.where].get("pixels"):
            alike.setdefault(("picture", pixels), []).append(row)
            alike.setdefault(("picture and prompt", pixels, row.student_prompt()), []).append(row)
        if isinstance(row, OwnRow) and row.symbols():
            alike.setdefault(("symbols", row.symbols()), []).append(row)
    told = set()                                     # rows that a stronger likeness was told of
    for (what, *_), some in alike.items():
        places, splits = [row.where for row in some], sorted({split_name(row) for row in some})
        kind = None
        if len(some) == 1 or tuple(places) in told:
            continue
        if len(splits) > 1 and what != "picture and prompt":
            kind = f"the same {what} in {' and '.join(splits)}"
        elif what in names:
            answers = {str(row.data.get("answer")) for row in some}
            kind = f"the same {what} more than once"
            kind += ", with other answers" if len(answers) > 1 else ""
        elif what == "picture and prompt":
            kind = "the same picture and prompt more than once, with other symbols"
        if kind:
            more = f" = {len(some) - EXAMPLES} more" if len(some) > EXAMPLES else ""
            found.warn(kind, " = ".join(places[:EXAMPLES]) + more, places)
            told.add(tuple(places))


def check_groups(splits, found):
    """Groups and sizes of the test that no stage trains on, or too few rows for the control."""
    kinds = {name: Counter(label(row) for row in rows) for name, rows in splits.items()}
    for name, number in kinds.get("test", {}).items():
        if "train" in kinds and name not in kinds["train"]:
            found.warn("in test and not in train", name)
        if number == 1:
            found.warn("a single row in test, so that evaluate.py --input swapped is refused", name)


def label(row):
    return row.task if row.level is None else f"{row.task} {row.level}"


# ---------------------------------------------------------------- the table

def span(values, form="{:.0f}"):
    """[3, 5] -> "3 to 5"; "" for none."""
    low, high = (form.format(value) for value in (min(values), max(values))) if values else ("", "")
    return low if low == high else f"{low} to {high}"


def make_table(splits, facts):
    """A line per split and task, group or board size; the last four columns are in tokens."""
    lines = []
    for split, rows in splits.items():
        for name in dict.fromkeys(map(label, rows)):
            some = [row for row in rows if label(row) == name]
            known = [facts[row.where] for row in some if "size" in facts[row.where]]
            sizes = sorted({fact["size"] for fact in known}, key=np.prod)
            size = " to ".join(f"{w}x{h}" for w, h in dict.fromkeys(sizes[:1] + sizes[-1:]))
            judged = sum(not isinstance(row, OwnRow) or "answer" in row.data for row in some)
            lines.append([
                split, name, len(some), judged, size, span([f["ratio"] for f in known], "{:.1f}"),
                span([fact["image tokens"] for fact in known]),
                *(span([facts[row.where][text] for row in some])
                  for text in ("student", "teacher", "response"))])
    return {"lines": lines,
            "head": ["split", "task or group", "rows", "with answer", "picture, px", "sides, 1:",
                     "image", "prompt", "teacher's", "response"]}


def lengths(args, model):
    """What stands above the table."""
    context = model.config.text_config.max_position_embeddings
    return (f"Pictures as they are; then the tokens of {args.model}: of the picture, the student's "
            "prompt, the teacher's with the hint or plan, and the right response. The context has "
            f"{context}.")


def count_tokens(rows, processor, facts):
    """Adds the lengths of a row's texts to its facts."""
    for name, texts in (("student", [row.student_prompt() for row in rows]),
                        ("teacher", [row.teacher_prompt("symbols+plan") for row in rows]),
                        ("response", [row.response() for row in rows])):
        tokens = processor.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        for row, ids in zip(rows, tokens, strict=True):
            facts[row.where][name] = len(ids)


# ---------------------------------------------------------------- the page

def drawn_plan(row):
    """SVG of the shortest plan over the picture, in units of cells; rings where it does not move"""
    cells = row.puzzle.cells()
    height, width = len(cells), len(cells[0])
    dots = [(c + 0.5, r + 0.5) for r, c in report.walk(row, row.plan)[0]]
    unit, line = max(height, width) / 100, " ".join(f"{x:g},{y:g}" for x, y in dots)
    shapes = ""
    for stroke, thick, radius in (("#fff", 5, 5), ("#d6009a", 2.6, 3.8)):
        shapes += (f'<polyline points="{line}" fill="none" stroke="{stroke}" '
                   f'stroke-width="{thick * unit:g}" stroke-linejoin="round"/>')
        for before, (x, y) in zip(dots, dots[1:], strict=False):
            if before == (x, y):
                shapes += f'<circle cx="{x:g}" cy="{y:g}" r="{radius * unit:g}" fill="{stroke}"/>'
    return f'<svg viewBox="0 0 {width} {height}" preserveAspectRatio="none">{shapes}</svg>'


def text_box(title, text, closed=False):
    title, text = html.escape(title), f"<pre>{html.escape(text)}</pre>"
    if closed:
        return f"<details><summary>{title}</summary>{text}</details>"
    return f"<div><h4>{title}</h4>{text}</div>"


def card(row, split, found, readable):
    """A row: picture, prompt, what the teacher reads, answer; the longer texts open at a click."""
    own, picture = isinstance(row, OwnRow), "<p>cannot be read</p>"
    if readable:
        source = report.small_picture(row.path)
        picture = f'<img class="picture" src="{source}" alt="{html.escape(label(row))}">'
        if row.teacher_path:
            source = report.small_picture(row.teacher_path)
            picture += f'<img class="picture" src="{source}" alt="the picture of the teacher">'
        if not own:
            cells = row.puzzle.cells()
            picture = (f'<div class="board" style="aspect-ratio: {len(cells[0])} / {len(cells)}">'
                       f'<img src="{source}" alt="{label(row)}">{drawn_plan(row)}</div>')
    teacher = row.teacher_prompt("symbols+plan")
    if own:
        answer = " or ".join(row.answer_texts()) or "none: not judged"
        texts = [text_box("prompt", row.student_prompt()),
                 text_box("what the teacher reads", teacher),
                 text_box(f"answer, by {row.compare}", answer)]
    else:
        texts = [text_box("symbols", row.symbols()),
                 text_box("shortest plan, drawn", ",".join(row.plan)),
                 text_box("prompt", row.student_prompt(), True),
                 text_box("what the teacher reads, with the plan", teacher, True),
                 text_box("response", row.response(), True)]
    asked = [f"{row.ask((name,))}\n→ {row.answers((name,))}" for name in row.questions()]
    texts.append(text_box("questions of the cold start", "\n\n".join(asked), True))
    notes = "".join(f'<span class="badge">{html.escape(note)}</span>'
                    for note in found.of_row.get(row.where, ()))
    about = " ".join(filter(None, (split, label(row), row.bucket)))
    return (f'<article class="card"><header><b>{html.escape(row.id)}</b>'
            f"<span>{html.escape(about)}</span>{notes}</header>"
            f'<div class="body">{picture}<div class="texts">{"".join(texts)}</div></div></article>')


def make_page(args, splits, facts, about, table, found):
    """One file without scripts, in the style of the evaluation's page. Rows with findings first."""
    template = Path(report.__file__).with_name("report.html").read_text(encoding="utf-8")
    style = re.search(r"<style>(.*?)</style>", template, re.DOTALL)[1]
    cells = "".join(f"<tr>{''.join(f'<{tag}>{html.escape(str(cell))}</{tag}>' for cell in line)}"
                    "</tr>" for tag, lines in (("th", [table["head"]]), ("td", table["lines"]))
                    for line in lines)
    notes = "".join(f"<p><b>{kind}</b> {html.escape(text)}</p>"
                    for kind, text in found.lines(args.all)) or "<p>Nothing to remark.</p>"
    body = ""
    for split, rows in splits.items():
        ordered = sorted(rows, key=lambda row: row.where not in found.of_row)
        shown = gen_data.choose_rows(ordered, None, args.limit)
        cards = "".join(card(row, split, found, "size" in facts[row.where])
                        for row in tqdm(shown, desc=f"page, {split}", unit="row", leave=False))
        body += (f"<h2>{split}</h2><p>{len(shown)} of {len(rows)} rows, those with findings first."
                 f'</p><div class="cards">{cards}</div>')
    name = html.escape(str(args.data))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:;
      style-src 'unsafe-inline'">
<title>{name}</title>
<style>{style}
  p {{ overflow-wrap: anywhere; }}
  .badge {{ border-radius: .4rem; overflow-wrap: anywhere; }}
  .picture {{ max-height: 20rem; object-fit: contain; }}
  .texts {{ flex: 1 1 12rem; min-width: 0; display: grid; gap: .5rem; align-content: start; }}
  .texts h4, summary {{ margin: 0; font-size: .75rem; color: var(--soft); font-weight: 600; }}
  .texts pre {{ max-height: 14rem; overflow: auto; }}
</style>
</head>
<body>
<h1>{name}</h1>
<p>{html.escape(about)}</p>
<div class="wide"><table>{cells}</table></div>
<h2>Findings</h2>
{notes}
{body}
</body>
</html>
"""


# ---------------------------------------------------------------- main

def load_tokens(args):
    """(what `common.check_lengths` reads of a model, the processor), without the weights."""
    from transformers import AutoConfig
    processor = common.load_processor(args.model, args.max_pixels)
    folder = common.checkpoint_folder(args.model)
    try:
        config = AutoConfig.from_pretrained(folder or args.model)
    except (OSError, ValueError) as error:
        fail(f"cannot load --model {args.model}: {' '.join(str(error).split())[:300]}")
    return SimpleNamespace(config=config), processor


def main(args):
    found, splits, facts, sizes = Findings(), {}, {}, {}
    if not Path(args.data).is_dir():
        fail(f"{args.data}: no such folder")
    model, processor = load_tokens(args)
    for split in args.splits:
        rows, refused = found.refused(gen_data.load_rows, args.data, split)
        if not refused:
            splits[split] = rows
    rows = [row for some in splits.values() for row in some]
    for row in tqdm(rows, desc="pictures", unit="picture", leave=False):
        facts[row.where] = check_picture(row, processor, args.max_pixels, found, sizes)
    for some in splits.values():
        count_tokens(some, processor, facts)
    check_texts(tqdm(rows, desc="texts", unit="row", leave=False), model, processor,
                args.max_new_tokens, found)
    for row in tqdm(rows, desc="answers", unit="row", leave=False):
        check_answers(row, facts[row.where]["response"], args.max_new_tokens, found)
        if isinstance(row, OwnRow):
            check_own(row, found)
    check_duplicates(rows, facts, found)
    check_groups(splits, found)
    table, about = make_table(splits, facts), lengths(args, model)
    print(f"{about}\n\n{report.markdown(table)}")
    for kind, text in found.lines(args.all):
        print(f"{kind}: {text}")
    if args.html:
        Path(args.html).parent.mkdir(parents=True, exist_ok=True)
        write_text(args.html, make_page(args, splits, facts, about, table, found))
        print(f"the page is {args.html}")
    if found.errors:
        fail(f"{args.data}: a stage would refuse it; errors above: {len(found.errors)}")
    print(f"{args.data}: {len(rows)} rows that the stages take; warnings: {len(found.warnings)}")


if __name__ == "__main__":
    common.run_script(parse_args, main)
