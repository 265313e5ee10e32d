"""What a model is asked about the rows, and the file of its answers: for evaluate.py and ask.py.

A question is (key, prompt, picture or None), its key {"id"} with a "sample" or a "question" where a
row has several. An answer is the key with "response", "tokens", "cut" (no end within the limit), or
with an "error". Answers are appended to their file as they come.
"""
import hashlib
import json
from pathlib import Path

from tqdm import tqdm

import gen_data
from gen_data import fail
from tools import run_files

INPUTS = ("image", "text", "swapped")
RESPONSE = ("id", "response", "tokens", "cut", "error")  # of a line; the verdict follows from it
KEYS = (*RESPONSE, "sample", "question")


def other_pictures(rows, pool):
    """{id: picture of the next puzzle in `pool` of the same task and level}, never a row's own."""
    groups, pictures = {}, {}                                # (task, level): {symbols: picture}
    for row in pool:
        group = groups.setdefault((row["task"], row["level"]), {})
        group[gen_data.symbols(row)] = row["path"]
    for row in rows:
        group = groups[row["task"], row["level"]]
        keys, paths = list(group), list(group.values())
        if len(keys) == 1:
            fail(f"--input swapped: {row['task']}, level {row['level']}, has a single puzzle; "
                 "choose other --tasks or make more rows")
        pictures[row["id"]] = paths[(keys.index(gen_data.symbols(row)) + 1) % len(paths)]
    return pictures


def planning_prompts(rows, source, pool, samples=1):
    """[(key, prompt, picture or None)]. source: one of INPUTS; pool: rows to swap pictures with."""
    swapped, asked = other_pictures(rows, pool) if source == "swapped" else {}, []
    for sample in range(samples):
        for row in rows:
            key = {"id": row["id"], "sample": sample} if samples > 1 else {"id": row["id"]}
            if source == "text":
                asked.append((key, gen_data.teacher_prompt(row, "state"), None))
            else:
                picture = swapped.get(row["id"], row["path"])
                asked.append((key, gen_data.student_prompt(row), picture))
    return asked


def perception_prompts(rows):
    """[(key, prompt, picture)], every question about every picture, one at a time."""
    return [({"id": row["id"], "question": name}, gen_data.perception_prompt(row, (name,)),
             row["path"]) for row in rows for name in gen_data.questions(row)]


# ---------------------------------------------------------------- answers

def digest(*things):
    """A short name for JSON-serialisable things, the same for the same things."""
    return hashlib.sha256(json.dumps(things).encode()).hexdigest()[:16]


def label(line):
    """What tells one answer of a condition from another."""
    return line["id"], line.get("sample"), line.get("question")


def collect(file, settings, asked, size, answer, pooled_map, bar):
    """The answers to all of `asked`, those in `file` and new ones, which are appended as they come.

    asked: [(key, prompt, picture or None)]; answer(batch) gives the lines of at most `size` of
    them. settings: what an answer depends on, kept beside the file. pooled_map: map, or a pool's
    imap_unordered.
    """
    pictures = {path: hashlib.sha256(Path(path).read_bytes()).hexdigest()
                for _, _, path in asked if path}
    contents = [(key, prompt, pictures.get(path)) for key, prompt, path in asked]
    settings = json.loads(json.dumps({**settings, "asked": digest(contents)}))
    record, lines = file.with_suffix(".settings.json"), {}
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.is_file() and (not record.is_file() or json.loads(record.read_text()) != settings):
        file.replace(f"{file}.old")
        tqdm.write(f"{file}: answered under other settings, kept as {file.name}.old; starting anew")
    run_files.write_aside(record, json.dumps(settings, indent=1))
    if file.is_file():
        whole = file.read_bytes()
        whole = whole[:whole.rfind(b"\n") + 1]        # a killed run leaves half a line
        file.write_bytes(whole)
        for line in map(json.loads, whole.splitlines()):
            if "error" not in line:                   # what failed is asked again
                lines[label(line)] = {key: line[key] for key in line if key in KEYS}
    batches = [asked[i:i + size] for i in range(0, len(asked), size)]
    todo = [batch for batch in batches if any(label(key) not in lines for key, _, _ in batch)]
    bar.update(len(asked) - sum(map(len, todo)))
    with open(file, "a", encoding="utf-8") as out:
        for batch in pooled_map(answer, todo):
            out.writelines(json.dumps(line) + "\n" for line in batch)
            out.flush()
            lines |= {label(line): line for line in batch}
            bar.update(len(batch))
    return [lines[label(key)] for key, _, _ in asked]


def read(file, rows, test, allow_missing):
    """The answers in `file`, one per row; ids that are unknown, doubled or missing are errors."""
    known, lines = {row["id"] for row in test}, {}
    try:
        texts = Path(file).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        fail(f"cannot read --responses {file}: {error}")
    for number, text in enumerate(texts, 1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
        except ValueError:
            fail(f'{file}, line {number}: not JSON; wanted one {{"id", "response"}} per line')
        if not isinstance(line, dict) or not all(isinstance(line.get(name), str)
                                                 for name in ("id", "response")):
            fail(f'{file}, line {number}: wanted an object with "id" and "response", both text; '
                 f"got {str(line)[:60]}")
        if line["id"] in lines:
            fail(f"{file}, line {number}: id {line['id']!r} is doubled")
        if line["id"] not in known:
            fail(f"{file}, line {number}: id {line['id']!r} is not among the rows of --data")
        lines[line["id"]] = {key: line[key] for key in RESPONSE if key in line}
    missing = [row["id"] for row in rows if row["id"] not in lines]
    if missing and not allow_missing:
        fail(f"{file}: no response for {len(missing)} rows, the first {missing[0]!r}; "
             "--allow_missing makes them failures")
    return [lines.get(row["id"], {"id": row["id"], "response": ""}) for row in rows]
