"""Evaluation: plans are executed by the rules. Did the modality gap close, and what is left of it?

    python evaluate.py                                # base, cold start and distilled, where there
    python evaluate.py --limit 20                     # a quick look: 20 rows per task and size
    python evaluate.py --perception                   # also every question about every picture
    python evaluate.py --input swapped                # control: the picture of another puzzle
    python evaluate.py --adapter base out/mine --temperature 1 --samples 8
    python evaluate.py --responses answers.jsonl      # {"id", "response"} lines of any model

A condition is a model with what it reads: base-image, distill-text. Every row counts: an answer
that cannot be read is a failure. The gap is success from symbols minus success from pictures.

out/<preset>/eval/<condition>/{predictions.jsonl, perception.jsonl, summary.json} belong to one
condition; {results.md, results.json, report.html} show all those there that answered the same rows.
Answers are kept as they come in <condition>/answers/, one file for each way of asking (model,
adapter, prompts, pictures, temperature, ...), so that the same command resumes where it was stopped
and no answer is ever replaced by another model's.

Left out on purpose: asking a server (tools/ask.py), drawing the page (tools/report.py).
"""
import json
import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import binomtest, bootstrap
from tqdm import tqdm

import common
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
    add("--out", help="output folder (default: out/<preset>/eval)")
    add("--split", default="test", choices=("test", "val"), help="rows that are asked about")
    add("--adapter", nargs="+", metavar="RUN", help="runs to evaluate, base for none (default: "
        "base, out/<preset>/coldstart and out/<preset>/distill, where they are)")
    add("--input", default="both", choices=("both", *INPUTS), help="the picture; text: "
        "what the teacher reads without a plan, symbols and a picture of its own; both; or, as a "
        "control, the picture of another puzzle")
    add("--tasks", nargs="+", help="task, task:size, task:low-high or group (default: all)")
    add("--limit", type=whole_number(1), help="rows per task and board size (default: all)")
    add("--rollout_batch", type=whole_number(1), help="rows answered at a time")
    add("--max_new_tokens", type=whole_number(1), help="length limit of an answer, tokens")
    add("--temperature", type=real_number(), default=0.0, help="0: greedy")
    add("--samples", type=whole_number(1), default=1,
        help="answers per row: their mean, and pass@k")
    add("--perception", action="store_true", help="also ask, greedily, every perception question")
    add("--responses", metavar="FILE", help='score {"id", "response"} lines, their "plan" as it is '
        "where they have one (tools/lenient.py); loads no model")
    add("--name", help="of the one condition (default: that of the run's folder, or of the file)")
    add("--reference", metavar="CONDITION", help="what differences are taken against (default: "
        "base-image, else the first)")
    args = parser.parse_args(argv)
    if not args.adapter and not args.responses:
        runs = [f"out/{args.preset or 'tiny'}/{stage}" for stage in STAGES[1:]]
        args.adapter = ["base", *(run for run in runs if Path(run, "adapter").is_dir())]
    runs = [run for run in args.adapter or () if run != "base"]
    common.resolve(args, SETTINGS, runs[0] if runs else None)
    args.out = args.out or f"out/{args.preset}/eval"
    if args.samples > 1 and args.temperature == 0:
        fail(f"--samples {args.samples}: several answers need a --temperature above 0")
    if args.responses and (args.samples > 1 or args.perception):
        fail("--responses scores one plan per row, without --samples or --perception")
    if args.name and not re.fullmatch(r"\w[\w.+-]*", args.name):
        fail(f"--name {args.name!r}: wanted letters, digits and . + - _ (it names a folder)")
    return args


def find_adapters(args):
    """{name: adapter folder, None for the base model} of args.adapter; all must be of one model."""
    found = {}
    for run in args.adapter:
        name, folder = "base", None
        if run != "base":
            folder = place = common.adapter_folder(run, "--adapter").resolve()
            suffix = place.name.removeprefix("adapter")
            if suffix in ("", "-best"):
                place = place.parent.with_name(place.parent.name + suffix)
            name = place.name
            common.check_backbone(folder, args)
            if name == "base" and not args.name:
                fail(f"--adapter {run}: base is the model without adapters: give --name")
        name = args.name or name
        if name in found:
            fail(f"two runs are called {name!r}: evaluate them one at a time with --name")
        found[name] = folder
    return found


# ---------------------------------------------------------------- what is asked
# A question is (key, prompt, picture or None): its key {"id"} with a "sample" or a "question" where
# a row has several. An answer is the key with "response", "tokens", "cut" (no EOS within the
# limit), or with an "error".

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
                asked.append((key, row.teacher_prompt("symbols"), row.teacher_picture("symbols")))
            else:
                asked.append((key, row.student_prompt(), swapped.get(row.id, row.path)))
    return asked


def perception_questions(rows):
    """Every question about every picture, one at a time."""
    asked = []
    for row in rows:
        for name in row.questions():
            asked.append(({"id": row.id, "question": name}, row.ask((name,)), row.path))
    return asked


def with_pictures(lines, questions, pool):
    """Answers with "picture", the name in the data of the picture that was read, or None."""
    names = {None: None}
    for row in pool:
        names |= {row.path: row.data["file_name"],
                  row.teacher_path: row.data.get("teacher_file_name")}
    return [{**line, "picture": names[path]}
            for line, (_, _, path) in zip(lines, questions, strict=True)]


def digest_questions(questions):
    """16 hex digits, the same for the same prompts and bytes of pictures."""
    pictures = {}
    for _, _, path in questions:
        if path and path not in pictures:
            pictures[path] = digest_file(path)
    return digest([(key, prompt, pictures.get(path)) for key, prompt, path in questions])


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


@dataclass
class Job:
    """Questions to one model, and the file of their answers."""
    adapter: Path       # or None for the base model
    folder: Path        # of the condition
    kind: str           # predictions or perception
    questions: list
    settings: dict      # what an answer depends on

    def file(self):
        """Its name follows from the settings: each way of asking has a file of its own.

        Files count and not what their folder is called.
        """
        counts = {name: value for name, value in self.settings.items() if name != "model"}
        return self.folder / "answers" / f"{self.kind}-{digest(counts)}.jsonl"

    def missing(self, size):
        """The batches in which an answer is missing; whole ones, so that a resume changes none."""
        lines, batches = read_answers(self.file()), []
        for i in range(0, len(self.questions), size):
            batch = self.questions[i:i + size]
            if any(label(key) not in lines for key, _, _ in batch):
                batches.append(batch)
        return batches

    def answers(self):
        """The lines of all questions, in their order."""
        lines = read_answers(self.file())
        return [lines[label(key)] for key, _, _ in self.questions]


def plan_jobs(args, rows, pool, adapters):
    """What is to be asked: for every adapter, for every input."""
    sources = ("image", "text") if args.input == "both" else (args.input,)
    asked = {source: planning_questions(rows, source, pool, args.samples) for source in sources}
    about = perception_questions(rows) if args.perception else []
    model, jobs = common.digest_folder(common.fetch(args.model)), []
    for name, adapter in adapters.items():
        for source in sources:
            settings = {
                "model": Path(args.model).name, "files": model, "bits": args.bits,
                "max_pixels": args.max_pixels,
                "adapter": common.digest_folder(adapter), "max_new_tokens": args.max_new_tokens,
                "temperature": args.temperature, "samples": args.samples,
                "seed": args.seed if args.temperature else None,
                "questions": digest_questions(asked[source]), "versions": common.versions()}
            folder = Path(args.out, f"{name}-{source}")
            jobs.append(Job(adapter, folder, "predictions", asked[source], settings))
            if args.perception and source == "image":
                greedy = {"temperature": 0.0, "samples": 1, "seed": None,
                          "questions": digest_questions(about)}
                jobs.append(Job(adapter, folder, "perception", about, settings | greedy))
    return jobs


def answer_batch(model, processor, batch, settings, condition):
    """The answer lines of one batch of questions."""
    keys = [key for key, _, _ in batch]
    images = [path and gen_data.open_picture(path) for _, _, path in batch]
    limit, uniforms = settings["max_new_tokens"], None
    if settings["temperature"]:        # they depend on (seed, condition, row, sample, position)
        numbers = []
        for key in keys:
            seed = int(digest(settings["seed"], condition, key), 16)
            numbers.append(np.random.default_rng(seed).random(limit))
        uniforms = np.stack(numbers)                                               # [B, T]
    prompt = common.encode(processor, [text for _, text, _ in batch], images, model.device)
    ids, mask, _ = common.sample(model, processor, prompt, limit, uniforms,           # [B, T] both
                              settings["temperature"] or 1.0)
    texts, lengths = common.decode(processor, ids, mask), mask.sum(1).tolist()
    cut = common.was_cut(model, processor, ids, mask)
    return [{**key, "response": text, "tokens": length, "cut": is_cut}
            for key, text, length, is_cut in zip(keys, texts, lengths, cut, strict=True)]


def check_jobs(model, processor, jobs, new_tokens):
    """Fails where an adapter does not fit, a text exceeds the context, a picture is unreadable."""
    for adapter in {job.adapter for job in jobs} - {None}:
        common.remove_lora(common.add_lora(model, path=adapter))
    for job in jobs:
        texts = {f"row {' '.join(map(str, key.values()))}": prompt
                 for key, prompt, _ in job.questions}  # a row may have several
        common.check_lengths(model, processor, texts, new_tokens)
    gen_data.decode_all(path for job in jobs for _, _, path in job.questions if path)


def ask_model(args, jobs, model, processor):
    """Ask for the answers that are missing, adapter by adapter."""
    missing = [job.missing(args.rollout_batch) for job in jobs]
    total, using = sum(sum(map(len, batches)) for batches in missing), None
    with tqdm(total=total, desc="answers", unit="row") as bar:
        for job, batches in zip(jobs, missing, strict=True):
            if job.adapter != using:
                model = common.remove_lora(model) if using else model
                model = common.add_lora(model, path=job.adapter) if job.adapter else model
                using = job.adapter
            model.eval()
            file = job.file()
            file.parent.mkdir(parents=True, exist_ok=True)
            write_text(f"{file}.settings.json", json.dumps(job.settings, indent=1) + "\n")
            with append_answers(file) as out:
                for batch in batches:
                    lines = answer_batch(model, processor, batch, job.settings, job.folder.name)
                    out.writelines(json.dumps(line) + "\n" for line in lines)
                    out.flush()
                    bar.update(len(batch))


def read_responses(file, rows, pool):
    """The answers in `file`, one per row; ids that are unknown, duplicate or missing are errors.

    A response that is null is an empty one.
    """
    known, lines = {row.id for row in pool}, {}
    for where, line in gen_data.read_jsonl(file):
        if not isinstance(line, dict) or not isinstance(line.get("response", 0), str | None):
            fail(f'{where}: wanted an object with "id" and "response", both text')
        name = line.get("id")
        if name not in known or name in lines:
            what = "a duplicate" if name in lines else "not among the rows of --data"
            fail(f"{where}: the id {name!r} is {what}")
        lines[name] = line | {"response": line["response"] or ""}
    missing = [row.id for row in rows if row.id not in lines]
    if missing:
        fail(f"{file}: no response for {len(missing)} rows, the first {missing[0]!r}")
    return [lines[row.id] for row in rows]


# ---------------------------------------------------------------- verdicts

def verdict_of(row, line, trained=None):
    """An answer with its verdict: the row's, who failed, and if the puzzle was trained on.

    A line that has a "plan" (a list of actions, or None) was read by somebody else's reader.

    A failure is perception's if the plan works in the world that the response describes,
    planning's if it fails there too or there is no plan, unclear if no map could be read. Rows
    that are no puzzles have neither. trained: keys of rows, None if they are not known.
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
    known = None if trained is None else row.key() in trained
    return {**line, "task": row.task, "level": row.level, "bucket": row.bucket, **verdict,
            "failure": failure, "trained_on": known}


def conclude(folder, rows, lines, seen, settings, args, trained=None):
    """Judge a condition's answers: predictions.jsonl, perception.jsonl, summary.json.

    lines: answers to the planning questions; seen: to the perception questions; settings: how both
    were asked.
    """
    by_id = {row.id: row for row in rows}
    verdicts = [verdict_of(by_id[line["id"]], line, trained) for line in lines]
    perception = []
    for line in seen:
        row, name = by_id[line["id"]], line["question"]
        right = row.score((name,), line["response"])[name]
        perception.append({**line, "task": row.task, "level": row.level, "right": right})
    table = summarise(verdicts)
    whole = next(line for line in table if line["task"] == "macro")
    success = "not judged" if whole["success"] is None else f"{report.percent(whole['success'])}%"
    words = f"{folder.name}: success {success}"
    if whole["trained_on"] is not None:
        words += f"; {whole['trained_on']} of its {whole['n']} rows are puzzles it was trained on"
    tqdm.write(words)
    summary = {"rows": gen_data.digest_rows(rows), "table": table,
               "diagnosis": diagnose(verdicts), "perception": summarise_perception(perception),
               "asked": settings, "args": vars(args), "versions": common.versions()}
    folder.mkdir(parents=True, exist_ok=True)
    for name, things in (("predictions", verdicts), ("perception", perception)):
        if things:
            text = "".join(json.dumps(thing) + "\n" for thing in things)
            write_text(folder / f"{name}.jsonl", text)
        else:  # an earlier one is of other answers; those are still in answers/
            (folder / f"{name}.jsonl").unlink(missing_ok=True)
    write_text(folder / "summary.json", json.dumps(summary, indent=1) + "\n")


# ---------------------------------------------------------------- numbers

def interval(*groups):
    """95% bootstrap interval of the mean over groups of their means; None if no value differs.

    groups: arrays [rows], one value per row; the rows of each group are drawn again.
    """
    if all(np.ptp(values) == 0 for values in groups):
        return None
    groups = [np.resize(values, max(2, len(values))) for values in groups]  # scipy wants two
    ends = bootstrap(groups, lambda *x, axis: np.mean([values.mean(axis) for values in x], 0),
                     batch=999, n_resamples=9999, method="percentile",
                     rng=np.random.default_rng(0)).confidence_interval
    return [float(ends.low), float(ends.high)]


def rate(name, groups):
    """{name: mean over groups of their means, name_ci: its 95% interval}.

    groups: a list of arrays [rows]. Wilson's interval for one group of zeros and ones, else the
    bootstrap's; both None without a group.
    """
    if not groups:
        return {name: None, f"{name}_ci": None}
    if len(groups) == 1 and np.isin(groups[0], (0, 1)).all():
        successes = binomtest(int(groups[0].sum()), len(groups[0]))
        ci = list(successes.proportion_ci(method="wilson"))
    else:
        ci = interval(*groups)
    return {name: float(np.mean([values.mean() for values in groups])), f"{name}_ci": ci}


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
    frame["cut"] = frame["cut"].eq(True)                                 # it may not be said
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
    """The numbers of one line of the table: n, rates with intervals; all tasks weigh the same."""
    rows = by_row(answers)
    numbers = {"bucket": bucket, "n": len(rows)}
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
    failures = Counter(outcome for outcome in answers["outcome"] if outcome != "success")
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
    """Exact match per task and question, and of all questions about a picture.

    answers: [{"id", "task", "question", "right"}].
    """
    frame, numbers = pd.DataFrame(answers, columns=["id", "task", "question", "right"]), []
    for task, some in frame.groupby("task", sort=False):
        groups = dict(list(some.groupby("question", sort=False)["right"]))
        groups["all"] = some.groupby("id", sort=False)["right"].all()
        for question, right in groups.items():
            numbers.append({"task": task, "question": question, "n": len(right),
                            **rate("exact", [right.to_numpy(float)])})
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


def difference(a, b):
    """Success of a minus success of b, per task and macro, with its paired bootstrap interval.

    a, b: answers (`answer_frame`); joined by id, over the rows that both answered.
    """
    rows = by_row(a)
    rows["gain"] = rows["success"] - by_row(b)["success"]
    groups = {task: [group["gain"].to_numpy()] for task, group in
              rows.dropna(subset="gain").groupby("task", sort=False)}
    if not groups:  # nothing was judged
        return {}
    groups["macro"] = sum(groups.values(), [])
    return {task: {"mean": float(np.mean([values.mean() for values in group])),
                   "ci": interval(*group)} for task, group in groups.items()}


def compare(verdicts, reference=None):
    """What takes two conditions: the gaps, all against the reference, what closed of its gap.

    verdicts: {condition: its predictions}; reference: a condition (default: base-image, else the
    first of them).
    """
    frames = {name: answer_frame(lines) for name, lines in verdicts.items()}
    reference = reference or ("base-image" if "base-image" in frames else next(iter(frames)))
    if reference not in frames:
        fail(f"--reference {reference}: no such condition; there are {', '.join(frames)}")
    gaps, closed = {}, {}
    for name in frames:
        text = name.replace("-image", "-text")
        if name.endswith("-image") and text in frames:
            gaps[name] = difference(frames[text], frames[name])
    differences = {name: difference(frame, frames[reference])
                   for name, frame in frames.items() if name != reference}
    gaps, differences = [{name: numbers for name, numbers in found.items() if numbers}
                         for found in (gaps, differences)]
    if reference in gaps:
        for name, gain in differences.items():
            if not name.endswith("-text"):
                closed[name] = {task: gain[task]["mean"] / gap["mean"] if gap["mean"] > 0 else None
                                for task, gap in gaps[reference].items()}
    return {"reference": reference, "gaps": gaps, "differences": differences, "closed": closed}


# ---------------------------------------------------------------- main

def check_folder(out):
    """Fails where `out` holds anything but an evaluation."""
    foreign = gen_data.foreign_name(out, "evaluation")
    if foreign:
        fail(f"{out} holds {foreign} and is not the folder of an evaluation: choose another --out")


def mark_folder(out):
    """Say that `out` is an evaluation: all is checked, now it is written to."""
    write_text(Path(out, "args.json"), json.dumps({"kind": "evaluation"}) + "\n")


def finished_conditions(out, rows):
    """{condition: its summary.json} of those in `out` that answered `rows`, stages first."""
    finished, wanted = {}, gen_data.digest_rows(rows)
    for path in sorted(Path(out).glob("*/summary.json")):
        summary = json.loads(path.read_text(encoding="utf-8"))
        if summary["rows"] == wanted:
            finished[path.parent.name] = summary
        else:
            print(f"{path.parent.name} answered other rows: left out of the tables")
    stages = [f"{stage}-{source}" for stage in STAGES for source in INPUTS]
    order = [name for name in stages if name in finished]
    return {name: finished[name] for name in dict.fromkeys([*order, *finished])}


def main(args):
    adapters, out = {} if args.responses else find_adapters(args), Path(args.out)
    check_folder(out)
    if not args.responses:
        common.fetch(args.model)
    args.data = gen_data.ensure(args.data, args.preset, args.seed)
    pool = gen_data.load_rows(args.data, args.split)
    rows = gen_data.choose_rows(pool, args.tasks, args.limit)
    out.mkdir(parents=True, exist_ok=True)
    lock = lock_folder(out)
    try:
        if args.responses:
            gen_data.check_pictures(rows)  # the page shows them
            score_responses(args, rows, pool)
        else:
            score_model(args, rows, pool, adapters)
        write_tables(args, rows, pool)
    finally:
        lock.release()


def score_responses(args, rows, pool):
    """The condition whose answers are in a file."""
    folder = Path(args.out, args.name or Path(args.responses).name.removesuffix(".jsonl"))
    if (folder / "answers").is_dir():
        fail(f"{folder} holds answers that were asked for here: choose another --name")
    lines = read_responses(args.responses, rows, pool)
    mark_folder(args.out)
    conclude(folder, rows, lines, [], {"responses": Path(args.responses).name}, args)


def score_model(args, rows, pool, adapters):
    """The conditions of every adapter and input. All is checked before the first is written."""
    trained = {adapter: common.read_trained_rows(adapter) if adapter else set()
               for adapter in adapters.values()}
    jobs = plan_jobs(args, rows, pool, adapters)
    if any(job.missing(args.rollout_batch) for job in jobs):
        model, processor = common.load(args.model, args.bits, args.max_pixels)
        check_jobs(model, processor, jobs, args.max_new_tokens)
        mark_folder(args.out)
        ask_model(args, jobs, model, processor)
    perception = {job.folder: job.answers() for job in jobs if job.kind == "perception"}
    for job in jobs:
        if job.kind == "predictions":
            lines = with_pictures(job.answers(), job.questions, pool)
            conclude(job.folder, rows, lines, perception.get(job.folder, []), job.settings,
                     args, trained[job.adapter])


def write_tables(args, rows, pool):
    """results.md, results.json and report.html of all conditions that answered these rows."""
    out = Path(args.out)
    summaries = finished_conditions(out, rows)
    verdicts = {name: report.read_lines(out / name / "predictions.jsonl") for name in summaries}
    comparison = compare(verdicts, args.reference)
    tables = report.make_tables(summaries, comparison)
    runs = [Path(run) for summary in summaries.values()
            for run in summary["args"].get("adapter") or () if run != "base"]
    page = report.make_page(rows, pool, tables, summaries, verdicts, list(dict.fromkeys(runs)))
    write_text(out / "results.md", report.make_text(tables))
    write_text(out / "results.json",
               json.dumps({"conditions": summaries, **comparison}, indent=1) + "\n")
    write_text(out / "report.html", page)
    print(f"\n{report.differing(summaries)}{report.markdown(tables[0])}\nmore in {out}/results.md "
          f"and {out}/report.html; every answer in {out}/<condition>/predictions.jsonl")


if __name__ == "__main__":
    common.run_script(parse_args, main)
