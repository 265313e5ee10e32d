"""Evaluation: plans are executed by the rules. Did the modality gap close, and what is left of it?

    python evaluate.py                                # base, cold start and distilled, where there
    python evaluate.py --adapter base --limit 5       # before any training: is there a gap?
    python evaluate.py --perception                   # also every question about every picture
    python evaluate.py --input swapped                # control: the picture of another puzzle
    python evaluate.py --adapter base out/mine --temperature 1 --samples 8
    python evaluate.py --responses answers.jsonl      # {"id", "response"} lines of any model

A condition is a model with what it reads: base-image, distill-text. Every row counts: an answer
that cannot be read is a failure. The gap is success from symbols minus success from pictures.

Answers are kept as they come in <condition>/answers/, one file for each way of asking (model,
adapter, prompts, pictures, temperature, ...), so that the same command resumes where it was stopped
and no answer is ever replaced by another model's. Everything else is made anew of them, for all
conditions of the folder that answered the same rows, by one judge:
<condition>/{predictions.jsonl, perception.jsonl, summary.json}, {results.md, results.json,
report.html}.

Left out on purpose: asking a server (tools/ask.py), drawing the page (tools/report.py).
"""
import json
import math
import os
import re
import time
from collections import Counter
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

import coldstart
import common
import distill
import gen_data
from gen_data import (
    Parser,
    digest,
    digest_file,
    fail,
    lock_folder,
    real_number,
    whole_number,
    write_text,
)
from tools import report

STAGES = ("base", "coldstart", "distill")
INPUTS = ("image", "text", "swapped")
RATES = ("success", "optimal", "parsed", "map_right", "cut")
PLANS = ("shortest", "longer", "failed")
FAILURES = ("perception", "planning", "unclear")
SMALL_GAP = 0.1  # a smaller one is none, where it is decided whether a training is worth while
# Time of a row in a stage's step over that of sampling one response: 0.80 and 1.96 on the card of
# docs/gpu.md, 0.87 and 2.3 on the CPU of docs/speed.md.
ROW_COST = {"cold start": (coldstart, 0.8), "distillation": (distill, 2.2)}

# Defaults of the flags.
QWEN = {
    "rollout_batch": 32,
    "max_new_tokens": 512,
}
SETTINGS = {
    "tiny": {
        "rollout_batch": 96,
        "max_new_tokens": 120,
    },
    "2b": QWEN,
    "4b": QWEN,
    "8b": QWEN,
}


def parse_args(argv=None):
    parser = Parser(description=__doc__.split("\n")[0])
    common.add_flags(parser)
    add = parser.add_argument
    add("--out", help="output folder (default: eval beside the last run of --adapter, where "
        "nothing else is there, else out/<preset>/eval)")
    add("--split", default="test", choices=("test", "val"), help="rows that are asked about")
    add("--adapter", nargs="+", metavar="RUN", help="runs to evaluate, base for none (default: "
        "base, out/<preset>/coldstart and out/<preset>/distill, where they are)")
    add("--input", choices=("both", *INPUTS), help="the picture; text: what the teacher reads "
        "without a plan, symbols and a picture of its own; both; or, as a control, the picture of "
        "another puzzle (default: both; of --responses: not said)")
    add("--tasks", nargs="+", help="task, task:size, task:low-high or group (default: all)")
    add("--limit", type=whole_number(1), help="rows per task and board size (default: all)")
    add("--rollout_batch", type=whole_number(1), help="rows answered at a time")
    add("--max_new_tokens", type=whole_number(1), help="length limit of an answer, tokens")
    add("--temperature", type=real_number(), default=0.0, help="0: greedy")
    add("--samples", type=whole_number(1), default=1,
        help="answers per row: their mean, and pass@k")
    add("--perception", action="store_true", help="also ask, greedily, every perception question")
    add("--responses", metavar="FILE", help='score {"id", "response"} lines, with a "sample" where '
        'a row has several, their "plan" as it is where they have one (tools/lenient.py); loads no '
        "model")
    add("--name", help="of the one run (default: that of its folder, or of the file)")
    add("--reference", metavar="CONDITION", help="what differences are taken against (default: "
        "base-image, else the first)")
    args = parser.parse_args(argv)
    if args.samples > 1 and args.temperature == 0:
        fail(f"--samples {args.samples}: several answers need a --temperature above 0")
    if args.responses and (args.samples > 1 or args.perception or args.input == "both"):
        fail('--responses scores plans as they are, without --samples (lines of a row differ by '
             '"sample"), --perception or --input both')
    if args.name and not re.fullmatch(r"\w[\w.+-]*", args.name):
        fail(f"--name {args.name!r}: wanted letters, digits and . + - _ (it names a folder)")
    runs = [run for run in args.adapter or () if run != "base"]
    args.out = args.out or (find_place(runs[-1]) if runs else None)
    if not args.adapter and not args.responses:
        runs = [f"out/{args.preset or 'tiny'}/{stage}" for stage in STAGES[1:]]
        runs = [run for run in runs if Path(run, "adapter").is_dir()]
        args.adapter = ["base", *runs]
    common.resolve(args, SETTINGS, runs[0] if runs else None)
    args.out = args.out or f"out/{args.preset}/eval"
    return args


def run_folder(run):
    """The folder of a run, which may be given as its adapter/ or adapter-best/."""
    folder = Path(run).resolve()
    return folder.parent if folder.name in ("adapter", "adapter-best") else folder


def find_place(run):
    """The folder eval beside a run; None where it holds other things, as docs/run/eval does."""
    folder = run_folder(run).with_name("eval")
    if gen_data.foreign_name(folder, "evaluation"):
        return None
    inside = folder.is_relative_to(Path.cwd())
    return str(folder.relative_to(Path.cwd()) if inside else folder)  # the shorter one


def find_adapters(args):
    """{run: adapter folder, None for the base model} of args.adapter; all must be of one model."""
    found = {}
    for run in args.adapter:
        name, folder = "base", None
        if run != "base":
            folder = common.adapter_folder(run, "--adapter").resolve()
            name = run_folder(folder).name
            if folder.name == "adapter-best":
                name += "-best"
            common.check_backbone(folder, args)
            if name == "base" and not args.name:
                fail(f"--adapter {run}: base is the model without adapters: give --name")
        name = args.name or name
        if name in found:
            fail(f"two runs are called {name!r}: evaluate them one at a time with --name")
        found[name] = folder
    return found


# ---------------------------------------------------------------- what is asked

@dataclass
class Question:
    """What a model is asked: a prompt beside a picture's file, or without one (None).

    key: {"id"}, with a "sample" or a "question" where a row has several. An answer is a line: the
    key with "response", "tokens", "cut" (no EOS within the limit), or with an "error".
    """
    key: dict
    prompt: str
    picture: str


def other_pictures(rows, pool):
    """{id: picture of the next puzzle in `pool` of the same task and size}, never a row's own."""
    groups, pictures = {}, {}                                # (task, level): {symbols: picture}
    for row in pool:
        group = groups.setdefault((row.task, row.level), {})
        group[row.symbols() or row.teacher_path] = row.path
    for row in rows:
        group = groups[row.task, row.level]
        keys, paths = list(group), list(group.values())
        if len(keys) == 1:
            fail(f"--input swapped: {row.task}, board size {row.level}, has a single puzzle; "
                 "choose other --tasks or make more rows")
        number = keys.index(row.symbols() or row.teacher_path)
        pictures[row.id] = paths[(number + 1) % len(paths)]
    return pictures


def planning_questions(rows, source, pool, samples=1):
    """What is asked about rows. source: one of INPUTS; pool: rows to swap pictures with."""
    swapped, asked = other_pictures(rows, pool) if source == "swapped" else {}, []
    for sample in range(samples):
        for row in rows:
            key = {"id": row.id, "sample": sample} if samples > 1 else {"id": row.id}
            if source == "text":
                prompt, picture = row.teacher_prompt("symbols"), row.teacher_picture("symbols")
            else:
                prompt, picture = row.student_prompt(), swapped.get(row.id, row.path)
            asked.append(Question(key, prompt, picture))
    return asked


def perception_questions(rows):
    """Every question about every picture, one at a time."""
    return [Question({"id": row.id, "question": name}, row.ask((name,)), row.path)
            for row in rows for name in row.questions()]


def digest_questions(questions):
    """16 hex digits, the same for the same prompts and bytes of pictures."""
    pictures = {None: None}
    for question in questions:
        if question.picture not in pictures:
            pictures[question.picture] = digest_file(question.picture)
    return digest([(q.key, q.prompt, pictures[q.picture]) for q in questions])


@dataclass
class Condition:
    """A model with what it reads, and how it was asked: what stands in its summary.json."""
    run: str            # base, coldstart, ...; of answers from elsewhere their name
    input: str          # one of INPUTS; None: not said, of answers from elsewhere
    rows: str           # gen_data.digest_rows
    asked: dict         # what an answer depends on, or {"responses": file}
    trained_on: list    # ids of the rows that its run was trained on; None: not known
    args: dict
    answers: dict       # {"predictions": file in answers/, "perception": another, if asked}

    @property
    def name(self):
        """Of its folder, and in the tables."""
        return f"{self.run}-{self.input}" if self.input else self.run


@dataclass
class Job:
    """Questions to one model, and the file of their answers."""
    adapter: Path       # or None for the base model
    condition: str      # its name
    questions: list
    settings: dict      # what an answer depends on
    file: Path

    def missing(self, size):
        """The batches in which an answer is missing; whole ones, so that a resume changes none."""
        lines, batches = read_answers(self.file), []
        for i in range(0, len(self.questions), size):
            batch = self.questions[i:i + size]
            if any(label(question.key) not in lines for question in batch):
                batches.append(batch)
        return batches


def answer_file(kind, settings):
    """The name of a file of answers: each way of asking has its own.

    Files count and not what their folder is called.
    """
    counts = {name: value for name, value in settings.items() if name != "model"}
    return f"{kind}-{digest(counts)}.jsonl"


def plan_jobs(args, rows, pool, adapters):
    """The conditions and jobs of every adapter and every input."""
    sources = ("image", "text") if args.input in (None, "both") else (args.input,)
    shared = {
        "model": Path(args.model).name, "files": common.digest_folder(common.fetch(args.model)),
        "bits": args.bits, "max_pixels": args.max_pixels, "max_new_tokens": args.max_new_tokens,
        "temperature": args.temperature, "samples": args.samples,
        "seed": args.seed if args.temperature else None, "versions": common.versions()}
    asked = {}                                     # (kind, input): (questions, settings)
    for source in sources:
        questions = planning_questions(rows, source, pool, args.samples)
        how = {"questions": digest_questions(questions)}
        asked["predictions", source] = questions, shared | how
        if args.perception and source == "image":
            questions = perception_questions(rows)
            how = {"temperature": 0.0, "samples": 1, "seed": None,
                   "questions": digest_questions(questions)}
            asked["perception", source] = questions, shared | how

    conditions, jobs, row_digest = {}, [], gen_data.digest_rows(rows)
    for run, adapter in adapters.items():
        known = common.read_trained_rows(adapter) if adapter else set()
        trained = None if known is None else [row.id for row in rows if row.key() in known]
        of_adapter = {"adapter": common.digest_folder(adapter)}
        for (kind, source), (questions, settings) in asked.items():
            settings = settings | of_adapter
            condition = conditions.setdefault((run, source), Condition(
                run, source, row_digest, settings, trained, vars(args), {}))
            condition.answers[kind] = answer_file(kind, settings)
            file = Path(args.out, condition.name, "answers", condition.answers[kind])
            jobs.append(Job(adapter, condition.name, questions, settings, file))
    return list(conditions.values()), jobs


# ---------------------------------------------------------------- answers

def label(line):
    """What tells one answer of a condition from another."""
    return line["id"], line.get("sample"), line.get("question")


def read_answers(file):
    """{label: line} of the answers in a file, without half a line that a kill left at its end."""
    content = file.read_bytes() if file.is_file() else b""
    lines = map(json.loads, content[:content.rfind(b"\n") + 1].splitlines())
    return {label(line): line for line in lines if not line.get("error")}  # that is asked again


def append_answers(file):
    """The file, open for more lines; half a line at its end is cut off, the others stay."""
    if file.is_file():
        os.truncate(file, file.read_bytes().rfind(b"\n") + 1)
    return open(file, "a", encoding="utf-8", newline="\n")


def answer_batch(model, processor, batch, settings, condition):
    """The answer lines of one batch of questions."""
    images = [q.picture and gen_data.open_picture(q.picture) for q in batch]
    limit, uniforms = settings["max_new_tokens"], None
    if settings["temperature"]:        # they depend on (seed, condition, row, sample, position)
        numbers = []
        for question in batch:
            seed = int(digest(settings["seed"], condition, question.key), 16)
            numbers.append(np.random.default_rng(seed).random(limit))
        uniforms = np.stack(numbers)                                               # [B, T]
    prompt = common.encode(processor, [q.prompt for q in batch], images, model.device)
    ids, mask, _ = common.sample(model, processor, prompt, limit, uniforms,        # [B, T] both
                                 settings["temperature"] or 1.0)
    texts, lengths = common.decode(processor, ids, mask), mask.sum(1).tolist()
    cut = common.was_cut(model, processor, ids, mask)
    return [{**question.key, "response": text, "tokens": length, "cut": is_cut}
            for question, text, length, is_cut in zip(batch, texts, lengths, cut, strict=True)]


def check_jobs(model, processor, jobs, new_tokens):
    """Fails where an adapter does not fit, a text exceeds the context, a picture is unreadable."""
    for adapter in {job.adapter for job in jobs} - {None}:
        common.remove_lora(common.add_lora(model, path=adapter))
    for job in jobs:
        texts = {f"row {' '.join(map(str, question.key.values()))}": question.prompt
                 for question in job.questions}  # a row may have several
        common.check_lengths(model, processor, texts, new_tokens)
    gen_data.decode_all(question.picture for job in jobs for question in job.questions
                        if question.picture)


def ask(args, jobs):
    """Ask for the answers that are missing, adapter by adapter; all is checked before.

    Returns the seconds that an answer took, None if none was missing.
    """
    missing = [job.missing(args.rollout_batch) for job in jobs]
    total, using = sum(len(batch) for batches in missing for batch in batches), None
    if not total:
        return None
    model, processor = common.load(args.model, args.bits, args.max_pixels)
    check_jobs(model, processor, jobs, args.max_new_tokens)
    mark_folder(args.out)
    start = time.perf_counter()
    with tqdm(total=total, desc="answers", unit="row") as bar:
        for job, batches in zip(jobs, missing, strict=True):
            if job.adapter != using:
                model = common.remove_lora(model) if using else model
                model = common.add_lora(model, path=job.adapter) if job.adapter else model
                using = job.adapter
            model.eval()
            job.file.parent.mkdir(parents=True, exist_ok=True)
            write_text(f"{job.file}.settings.json", json.dumps(job.settings, indent=1) + "\n")
            with append_answers(job.file) as out:
                for batch in batches:
                    lines = answer_batch(model, processor, batch, job.settings, job.condition)
                    out.writelines(json.dumps(line) + "\n" for line in lines)
                    out.flush()
                    bar.update(len(batch))
    return (time.perf_counter() - start) / total


def read_responses(file, rows, pool):
    """The answers in `file`, sample by sample; ids that are unknown, duplicate or missing are
    errors. A response that is null is an empty one.
    """
    wanted = {"id": str, "sample": int | None, "response": str | None, "plan": list | None,
              "picture": str | None}
    known, lines = {row.id for row in pool}, {}
    for where, line in gen_data.read_jsonl(file):
        if not isinstance(line, dict) or "response" not in line:
            fail(f'{where}: wanted an object with "id" and "response"')
        for name, kind in wanted.items():
            if not isinstance(line.get(name), kind):
                fail(f'{where}: "{name}" is {str(line.get(name))[:60]!r}')
        if line["id"] not in known:
            fail(f"{where}: the id {line['id']!r} is not among the rows of --data")
        key = line["id"], line.get("sample")
        if key in lines:
            fail(f'{where}: the id {line["id"]!r} is a duplicate (several answers of a row are '
                 'told apart by "sample": 0, 1, ...)')
        lines[key] = line | {"response": line["response"] or ""}
    ids = {row.id for row in rows}
    samples = dict.fromkeys(sample for name, sample in lines if name in ids) or {None: None}
    missing = [(row.id, sample) for sample in samples for row in rows
               if (row.id, sample) not in lines]
    if missing:
        name, sample = missing[0]
        empty = {"id": name, "response": ""} | ({} if sample is None else {"sample": sample})
        fail(f"{file}: {len(missing)} of {len(rows) * len(samples)} responses are missing; a line "
             f"such as {json.dumps(empty)} makes one a failure")
    return [lines[row.id, sample] for sample in samples for row in rows]


def store_responses(args, rows, pool):
    """The condition whose answers are in a file; they are stored as a model's are."""
    lines, settings = read_responses(args.responses, rows, pool), {
        "responses": Path(args.responses).name}
    run = args.name or Path(args.responses).name.removesuffix(".jsonl")
    file = answer_file("predictions", {"lines": lines})
    condition = Condition(run, args.input, gen_data.digest_rows(rows), settings, None, vars(args),
                          {"predictions": file})
    check_names(args.out, [condition])
    mark_folder(args.out)
    folder = Path(args.out, condition.name, "answers")
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / file, "".join(json.dumps(line) + "\n" for line in lines))
    return condition


# ---------------------------------------------------------------- conditions in the folder

def check_folder(out):
    """Fails where `out` holds anything but an evaluation."""
    foreign = gen_data.foreign_name(out, "evaluation")
    if foreign:
        fail(f"{out} holds {foreign} and is not the folder of an evaluation: choose another --out")


def mark_folder(out):
    """Say that `out` is an evaluation: all is checked, now it is written to."""
    write_text(Path(out, "args.json"), json.dumps({"kind": "evaluation"}) + "\n")


def read_summary(file):
    """A summary.json; {} without one, or where it is of an earlier form."""
    summary = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return summary if summary.keys() >= {field.name for field in fields(Condition)} else {}


def check_names(out, conditions):
    """Fails where answers of a model here and those from elsewhere would share a name."""
    for condition in conditions:
        old = read_summary(Path(out, condition.name, "summary.json")).get("asked", condition.asked)
        if ("responses" in old) != ("responses" in condition.asked):
            fail(f"{out}/{condition.name} holds answers "
                 + (f"of the file {old['responses']}" if "responses" in old else "asked for here")
                 + ": choose another --name")


def find_conditions(out, asked):
    """{name: condition} of those asked now and those in `out` that answered the same rows.

    Stages first, the picture before the symbols.
    """
    found = {condition.name: condition for condition in asked}
    for file in sorted(Path(out).glob("*/summary.json")):
        summary, name = read_summary(file), file.parent.name
        if name in found:
            continue
        if summary.get("rows") == asked[0].rows:
            found[name] = Condition(**{field.name: summary[field.name]
                                       for field in fields(Condition)})
        else:
            print(f"{name} {'answered other rows' if summary else 'is of an earlier form'}: left "
                  "out of the tables")

    def place(name):
        condition = found[name]
        stage = STAGES.index(condition.run) if condition.run in STAGES else len(STAGES)
        return stage, condition.run, INPUTS.index(condition.input or "image")
    return {name: found[name] for name in sorted(found, key=place)}


def stored_answers(out, condition, kind, rows):
    """The stored lines of a condition, sample by sample in the order of the rows; [] if not asked.
    """
    if kind not in condition.answers:
        return []
    file = Path(out, condition.name, "answers", condition.answers[kind])
    lines = {label(line): line for _, line in gen_data.read_jsonl(file)}
    order = {row.id: i for i, row in enumerate(rows)}
    return sorted(lines.values(), key=lambda line: (line.get("sample") or 0, order[line["id"]]))


# ---------------------------------------------------------------- verdicts

def verdict_of(row, line, trained=None):
    """An answer with its verdict: the row's, who failed, and if the row was trained on.

    A line that has a "plan" (a list of actions, or None) was read by somebody else's reader.

    A failure is perception's if the plan works in the world that the response describes,
    planning's if it fails there too or there is no plan, unclear if no map could be read. Rows
    that are no puzzles have neither. trained: ids of rows, None if they are not known.
    """
    parse = (lambda *_: line["plan"]) if "plan" in line else gen_data.parse
    verdict = row.judge(line["response"], parse, line.get("cut") is True)
    if line.get("error") and verdict["outcome"] != "not judged":
        verdict |= {"outcome": "error", "overrun": False}
    failure = None
    if verdict["outcome"] != "success" and verdict["map_right"] is not None:
        failure = "unclear"
        if verdict["map"] is not None:
            described = gen_data.TASKS[row.task](**verdict["map"])
            works = gen_data.check(described, verdict["plan"])[0] == "success"
            failure = "perception" if works else "planning"
    known = None if trained is None else row.id in trained
    return {**line, "task": row.task, "level": row.level, "bucket": row.bucket, **verdict,
            "failure": failure, "trained_on": known}


def judge(out, condition, rows, pool):
    """The verdicts on a condition's stored answers: (on its plans, on its perception answers).

    "picture" of a verdict: the name in the data of the one that was read, or None.
    """
    by_id, names = {row.id: row for row in rows}, {None: None}
    for row in pool:
        names[row.path] = row.data["file_name"]
        names[row.teacher_path] = row.data.get("teacher_file_name")
    read = {question.key["id"]: names[question.picture]
            for question in planning_questions(rows, condition.input, pool)}
    trained = condition.trained_on and set(condition.trained_on)
    verdicts, perception = [], []
    for line in stored_answers(out, condition, "predictions", rows):
        line = {"picture": read[line["id"]], **line}
        verdicts.append(verdict_of(by_id[line["id"]], line, trained))
    for line in stored_answers(out, condition, "perception", rows):
        row, name = by_id[line["id"]], line["question"]
        right = row.score((name,), line["response"])[name]
        in_form = row.in_form(name, line["response"])
        perception.append({**line, "task": row.task, "level": row.level, "right": right,
                           "in_form": in_form})
    return verdicts, perception


# ---------------------------------------------------------------- numbers

def interval(groups, low=0.0, high=1.0, share=2.0):
    """95% interval of the mean over groups of their means, all values between `low` and `high`.

    groups: arrays [rows], one value per row. Each group gets share / (number of groups) imagined
    rows at either end, then mean and variance as usual: never empty, and near the ends not too
    narrow. For one group of zeros and ones it is Agresti and Coull's, for several Price and
    Bonett's (2004); of paired differences, from -1 to 1 with share 1, Bonett and Price's (2012).
    """
    imagined, means, variances = share / len(groups), [], []
    for values in groups:
        n = len(values) + 2 * imagined
        mean = (values.sum() + imagined * (low + high)) / n
        square = ((values**2).sum() + imagined * (low**2 + high**2)) / n
        means.append(mean)
        variances.append((square - mean**2) / n)
    middle, half = np.mean(means), 1.96 * math.sqrt(sum(variances)) / len(groups)
    return [max(low, float(middle - half)), min(high, float(middle + half))]


def mean_of(groups):
    """The mean over groups of their means: all weigh the same."""
    return float(np.mean([values.mean() for values in groups]))


def rate(name, groups):
    """{name: mean over groups, name_ci: its 95% interval, name_n: rows it is over}.

    groups: a list of arrays [rows] of values from 0 to 1; without one, mean and interval are None.
    """
    if not groups:
        return {name: None, f"{name}_ci": None, f"{name}_n": 0}
    return {name: mean_of(groups), f"{name}_ci": interval(groups),
            f"{name}_n": sum(map(len, groups))}


def answer_frame(verdicts):
    """One line per answer: id, task, level, bucket, outcome, overrun, tokens, trained_on, RATES.

    What does not apply to a row is NaN: it counts in no rate.
    """
    frame = pd.DataFrame(verdicts, columns=[
        "id", "task", "level", "bucket", "outcome", "plan", "optimal", "map_right", "cut",
        "tokens", "trained_on", "overrun"])
    frame["success"] = frame["outcome"].eq("success").astype(float)
    frame["parsed"] = frame["plan"].notna().astype(float)
    frame.loc[frame["outcome"] == "not judged", ["success", "parsed"]] = None
    frame["cut"] = frame["cut"].map({True: 1.0, False: 0.0})             # else it is not said
    frame["tokens"] = pd.to_numeric(frame["tokens"], errors="coerce")
    return frame.astype({name: float for name in RATES})


def by_row(answers):
    """Answers -> one line per row, by id: task, trained_on, the means of RATES, solved at all."""
    rows = answers.groupby("id", sort=False)
    return rows[list(RATES)].mean().join(rows[["task", "trained_on"]].first()).assign(
        solved=rows["success"].max())


def by_task(rows, column):
    """A column as a list of arrays, one per task that has it."""
    known = rows.dropna(subset=column)
    return [group[column].to_numpy() for _, group in known.groupby("task", sort=False)]


def table_line(answers, bucket=None):
    """The numbers of one line of the table; all tasks weigh the same.

    rows: how many; n: those of them that are judged, which success is over; not_judged: the others.
    """
    rows = by_row(answers)
    n = int(rows["success"].notna().sum())
    numbers = {"bucket": bucket, "rows": len(rows), "n": n, "not_judged": len(rows) - n}
    for name in RATES:
        numbers |= rate(name, by_task(rows, name))
    if len(answers) > len(rows):
        numbers |= rate("pass_at_k", by_task(rows, "solved"))
    known = bool(rows["trained_on"].notna().all())
    unseen = rows[rows["trained_on"].eq(False)]
    numbers["trained_on"] = len(rows) - len(unseen) if known else None
    numbers |= rate("success_unseen", by_task(unseen, "success"))
    numbers["tokens"] = None if answers["tokens"].isna().all() else float(answers["tokens"].mean())
    numbers["overrun"] = int(answers["overrun"].eq(True).sum())
    failures = Counter(outcome for outcome in answers["outcome"]
                       if outcome not in ("success", "not judged"))
    return numbers | {"failures": dict(failures.most_common())}


def summarise(verdicts):
    """The table: a dict per task and level, per task, for all tasks, for all tasks by bucket."""
    answers, table = answer_frame(verdicts), []
    for task, of_task in answers.groupby("task", sort=False):
        for level, of_level in of_task.groupby("level"):  # own rows have none
            table.append({"task": task, "level": int(level), **table_line(of_level)})
        table.append({"task": task, "level": None, **table_line(of_task)})
    table.append({"task": "macro", "level": None, **table_line(answers)})
    for bucket in gen_data.DIFFICULTIES:
        of_bucket = answers[answers["bucket"] == bucket]
        if len(of_bucket):
            table.append({"task": "macro", "level": None, **table_line(of_bucket, bucket)})
    return table


def summarise_perception(answers):
    """Exact match per task, level and question, and of all questions about a picture.

    answers: [{"id", "task", "level", "question", "right", "in_form"}]. level None: all sizes.
    """
    columns = ["id", "task", "level", "question", "right", "in_form"]
    frame, numbers = pd.DataFrame(answers, columns=columns), []
    for task, of_task in frame.groupby("task", sort=False):
        sizes = [(int(level), some) for level, some in of_task.groupby("level")]
        for level, some in [(None, of_task), *sizes]:
            groups = dict(list(some.groupby("question", sort=False)[["right", "in_form"]]))
            groups["all"] = some.groupby("id", sort=False)[["right", "in_form"]].all()
            for question, group in groups.items():
                numbers.append({"task": task, "level": level, "question": question,
                                "n": len(group), "not_in_form": int((~group["in_form"]).sum()),
                                **rate("exact", [group["right"].to_numpy(float)])})
    return numbers


def diagnose(verdicts):
    """Counts: the map described (right, wrong) against the plan (PLANS), and who failed."""
    counts, verdicts = Counter(), [v for v in verdicts if v["map_right"] is not None]
    for v in verdicts:
        plan = "shortest" if v["optimal"] else "longer" if v["outcome"] == "success" else "failed"
        counts["right" if v["map_right"] else "wrong", plan] += 1
    failed = Counter(v["failure"] for v in verdicts)
    table = {f"{side}_{plan}": counts[side, plan] for side in ("right", "wrong") for plan in PLANS}
    return table | {name: failed[name] for name in FAILURES}


# ---------------------------------------------------------------- compare

def difference(a, b):
    """Success of a minus success of b, per task and macro, with its paired 95% interval.

    a, b: answers (`answer_frame`); joined by id, over the rows that both answered.
    """
    rows = by_row(a)
    rows["gain"] = rows["success"] - by_row(b)["success"]
    groups = {task: [group["gain"].to_numpy()] for task, group in
              rows.dropna(subset="gain").groupby("task", sort=False)}
    if not groups:  # nothing was judged
        return {}
    groups["macro"] = sum(groups.values(), [])
    return {task: {"mean": mean_of(group), "ci": interval(group, -1.0, share=1.0),
                   "n": sum(map(len, group))} for task, group in groups.items()}


def compare(conditions, verdicts, reference=None):
    """What takes two conditions: the gaps, all against the reference, what closed of its gap.

    conditions: {name: Condition}; verdicts: {name: on its plans}; reference: a name (default:
    base-image, else the first). A gap stands under the name of the condition that read pictures.
    """
    frames = {name: answer_frame(lines) for name, lines in verdicts.items()}
    reference = reference or ("base-image" if "base-image" in frames else next(iter(frames)))
    if reference not in frames:
        fail(f"--reference {reference}: no such condition; there are {', '.join(frames)}")
    from_text = {c.run: name for name, c in conditions.items() if c.input == "text"}
    gaps, differences, closed = {}, {}, {}
    for name, condition in conditions.items():
        if condition.input == "image" and condition.run in from_text:
            gaps[name] = difference(frames[from_text[condition.run]], frames[name])
        if name != reference:
            differences[name] = difference(frames[name], frames[reference])
    gaps = {name: numbers for name, numbers in gaps.items() if numbers}
    differences = {name: numbers for name, numbers in differences.items() if numbers}
    for name, gain in differences.items():
        if reference in gaps and conditions[name].input != "text":
            closed[name] = {task: gain[task]["mean"] / gap["mean"] if gap["mean"] > 0 else None
                            for task, gap in gaps[reference].items()}
    return {"reference": reference, "gaps": gaps, "differences": differences, "closed": closed}


# ---------------------------------------------------------------- is it worth while?

def decide(gap, rows):
    """The sentence on the base's gap: go, no gap, or how many rows would tell."""
    low, high = gap["ci"]
    shown = (f"base, symbols minus pictures: {report.with_interval(gap['mean'], gap['ci'], '{:+}')}"
             f" points over {gap['n']} rows")
    if low > 0:
        return f"{shown}: go, there is a gap to close"
    if high < SMALL_GAP:
        return (f"{shown}: no gap of {report.percent(SMALL_GAP)} points, and what the base cannot "
                "do from symbols cannot be taught")
    # So many that the interval leaves out 0 or SMALL_GAP, if the mean stays.
    distance = max(gap["mean"], SMALL_GAP - gap["mean"])
    wanted = max(gap["n"] + 1, math.ceil(gap["n"] * ((high - low) / 2 / distance)**2))
    boards = len({(row.task, row.level) for row in rows})
    return (f"{shown}: cannot be told with {gap['n']} rows; about {wanted} would do (--limit "
            f"{math.ceil(wanted / boards)})")


def outlook(seconds, rows, pool, args):
    """The sentence on the hours to come, by the seconds of an answer. Rough: rows cost alike."""
    times = {}
    for stage, (script, cost) in ROW_COST.items():
        numbers = script.SETTINGS[args.preset]
        times[stage] = seconds * cost * numbers["steps"] * numbers["batch"]
    answers = 2 * len(STAGES) * len(pool)  # from pictures and from symbols
    times[f"evaluation of {answers} answers"] = seconds * answers
    hours = ", ".join(f"{name} {time / 3600:.1f} h" for name, time in times.items())
    return (f"{seconds:.2g} s an answer, {min(len(rows), args.rollout_batch)} at a time; at that "
            f"pace, within a factor of three, with the preset's numbers: {hours}")


def last_words(args, rows, pool, gaps, seconds):
    """What to do next: of the base alone always, else where its gap is in doubt; or nothing."""
    gap, alone = gaps.get("base-image", {}).get("macro"), args.adapter == ["base"]
    if args.responses or not (gap or alone):
        return ""
    own = any(row.own for row in rows)
    if own and args.model == common.BACKBONES["tiny"]["model"]:
        return ("the bundled backbone knows only its own words: with prompts of your own it shows "
                "that everything runs, and no number here means more")
    sentences = []
    if gap and (alone or gap["ci"][0] <= 0):
        sentences.append(decide(gap, rows))
    if alone and seconds:
        sentences.append(outlook(seconds, rows, pool, args))
    return ". ".join(sentences)


# ---------------------------------------------------------------- main

def main(args):
    out = Path(args.out)
    adapters = {} if args.responses else find_adapters(args)
    check_folder(out)
    if not args.responses:
        common.fetch(args.model)  # refused before data are made
    args.data = gen_data.ensure(args.data, args.preset, args.seed)
    pool = gen_data.load_rows(args.data, args.split)
    rows = gen_data.choose_rows(pool, args.tasks, args.limit)
    out.mkdir(parents=True, exist_ok=True)
    lock, seconds = lock_folder(out), None
    try:
        # 1. Answers: what is not there yet is asked.
        if args.responses:
            gen_data.check_pictures(rows)  # the page shows them
            asked = [store_responses(args, rows, pool)]
        else:
            asked, jobs = plan_jobs(args, rows, pool, adapters)
            check_names(out, asked)
            seconds = ask(args, jobs)

        # 2. Verdicts: anew, on the stored answers of every condition that answered these rows.
        conditions, verdicts, perception = find_conditions(out, asked), {}, {}
        for name, condition in conditions.items():
            verdicts[name], perception[name] = judge(out, condition, rows, pool)

        # 3. Numbers: of each condition, and what takes two.
        summaries = {}
        for name, condition in conditions.items():
            summaries[name] = {**asdict(condition), "table": summarise(verdicts[name]),
                               "diagnosis": diagnose(verdicts[name]),
                               "perception": summarise_perception(perception[name])}
        comparison = compare(conditions, verdicts, args.reference)

        # 4. Files.
        for name, summary in summaries.items():
            for kind, lines in (("predictions", verdicts[name]), ("perception", perception[name])):
                text = "".join(json.dumps(line) + "\n" for line in lines)
                write_text(out / name / f"{kind}.jsonl", text)
            write_text(out / name / "summary.json", json.dumps(summary, indent=1) + "\n")
        tables = report.make_tables(summaries, comparison)
        write_text(out / "results.md", report.make_text(tables, summaries))
        write_text(out / "results.json",
                   json.dumps({"conditions": summaries, **comparison}, indent=1) + "\n")
        write_text(out / "report.html",
                   report.make_page(rows, pool, tables, summaries, verdicts))
    finally:
        lock.release()
    seen = {condition.run: condition.trained_on for condition in asked}
    for run, ids in seen.items():
        if run != "base" and ids is not None:
            print(f"{run}: {len(ids)} of {len(rows)} rows were seen in training")
    print(f"\n{report.differing(summaries)}{report.markdown(tables[0])}\nmore in {out}/results.md "
          f"and {out}/report.html; every answer in {out}/<condition>/predictions.jsonl")
    if words := last_words(args, rows, pool, comparison["gaps"], seconds):
        print(f"\n{words}")


if __name__ == "__main__":
    common.run_script(parse_args, main)
