"""Evaluation: plans are executed by the rules. Did the modality gap close, and what is left of it?

    python evaluate.py                                # base, out/coldstart, out/distill if there
    python evaluate.py --limit 20                     # a quick look: 20 rows per task and level
    python evaluate.py --perception                   # also every question about every picture
    python evaluate.py --input swapped                # control: the picture of another puzzle
    python evaluate.py --adapter base out/mine --temperature 1 --samples 8
    python evaluate.py --responses answers.jsonl      # {"id", "response"} lines of any model

A condition is a model with what it reads: base-image, distill-text. Every row counts: an answer
that cannot be read is a failure. The gap is success from symbols minus success from pictures.

out/eval/<condition>/{predictions.jsonl, perception.jsonl, summary.json} belong to one condition;
out/eval/{results.md, results.json, report.html} show all those there that answered the same rows.
Answers are written as they come: the same command goes on where it was stopped; answers that were
given under other settings are put aside (*.old).

Left out on purpose: asking a server (tools/ask.py), drawing the page (tools/report.py).
"""
import argparse
import json
import re
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.stats import binomtest, bootstrap
from tqdm import tqdm

import common
import gen_data
from gen_data import fail
from tools import lenient, report, responses, run_files

RUNS = ("out/coldstart", "out/distill")
STAGES = ("base", "coldstart", "distill")
RATES = ("success", "optimal", "parsed", "state_right", "cut")
PLANS = ("shortest", "longer", "failed")
FAILURES = ("perception", "planning", "unclear")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    common.add_flags(parser)
    add = parser.add_argument
    add("--out", default="out/eval", help="output folder")
    add("--split", default="test", choices=("test", "val"), help="rows that are asked about")
    add("--adapter", nargs="+", metavar="RUN", help="runs to evaluate, base for none (default: "
        "base, out/coldstart, out/distill)")
    add("--input", default="both", choices=("both", *responses.INPUTS), help="the picture, the "
        "symbols (without a plan), both, or, as a control, the picture of another puzzle")
    add("--tasks", nargs="+", help="task, or task:level, or task:low-high (default: all)")
    add("--limit", type=int, help="rows per task and level (default: all)")
    add("--rollout_batch", type=int, help="rows answered at a time (default: the preset's)")
    add("--max_new_tokens", type=int, help="length limit of an answer, tokens")
    add("--temperature", type=float, default=0.0, help="0: greedy")
    add("--samples", type=int, default=1, help="answers per row: their mean, and pass@k")
    add("--perception", action="store_true", help="also ask, greedily, every perception question")
    add("--responses", metavar="FILE", help='score {"id", "response"} lines; loads no model')
    add("--allow_missing", action="store_true", help="rows without a response are failures")
    add("--lenient", action="store_true", help="also read plans that are written in other forms")
    add("--tolerance", type=float, default=0.0,
        help="how far an answer of a pair that is a number may be off")
    add("--name", help="name of the condition (default: the run's folder, the file's stem)")
    add("--reference", metavar="CONDITION", help="what differences are taken against (default: "
        "base-image, else the first)")
    args = common.resolve(parser.parse_args(argv))
    for name in ("limit", "samples"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            fail(f"--{name} {getattr(args, name)}: wanted at least 1")
    if not 0 <= args.tolerance < float("inf"):
        fail(f"--tolerance {args.tolerance}: wanted a number from 0 on")
    if args.temperature < 0 or (args.samples > 1 and args.temperature == 0):
        fail(f"--samples {args.samples} --temperature {args.temperature}: several answers need "
             "a --temperature above 0")
    if args.responses and (args.samples > 1 or args.perception):
        fail("--responses scores one plan per row, without --samples or --perception")
    if args.name and not re.fullmatch(r"\w[\w.+-]*", args.name):
        fail(f"--name {args.name!r}: wanted letters, digits and . + - _ (it names a folder)")
    return args


def digest_rows(rows):
    """What two conditions must share to stand in one table: their puzzles, their pairs' answers."""
    return responses.digest([(row["id"], gen_data.key_of(row),
                              row.get("bucket", row.get("answer"))) for row in rows])


def weight_files(folder):
    """Name, size and time of a folder's weights, to notice new ones; [] for a hub name."""
    files = sorted(Path(folder).glob("*.safetensors")) if folder else []
    return [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]


# ---------------------------------------------------------------- answers

class Answerer:
    """The model on this machine: loaded at the first question without an answer."""

    def __init__(self, args):
        self.args, self.model, self.adapter = args, None, None

    def use(self, adapter):
        """Load the model if it is not, and exchange its adapter (None: the base model)."""
        if self.model is None:
            self.model, self.processor = common.load(self.args.model, self.args.bits)
        if adapter != self.adapter:
            self.model = self.model.unload() if self.adapter else self.model
            self.model = common.add_lora(self.model, path=adapter) if adapter else self.model
            self.adapter = adapter
        self.model.eval()

    def answer(self, adapter, condition, temperature, batch):
        """The lines of one batch of (key, prompt, picture or None). temperature 0: greedy."""
        self.use(adapter)
        device, keys = self.model.device, [key for key, _, _ in batch]
        images = [path and gen_data.open_picture(path) for _, _, path in batch]
        uniforms = None
        if temperature:                # they depend on (seed, condition, row, sample, position)
            names = [responses.digest(self.args.seed, condition, key) for key in keys]
            numbers = [np.random.default_rng(int(name, 16)).random(self.args.max_new_tokens)
                       for name in names]
            uniforms = np.stack(numbers)                                           # [B, T]
        try:
            prompt = common.encode(self.processor, [text for _, text, _ in batch], images, device)
            ids, mask = common.sample(                               # [B, T] both
                self.model, self.processor, prompt, self.args.max_new_tokens, uniforms,
                temperature or 1.0)
        except torch.OutOfMemoryError:
            fail(f"the GPU's memory does not suffice for {len(batch)} rows of up to "
                 f"{self.args.max_new_tokens} new tokens: the same command goes on with a lower "
                 f"--rollout_batch (it is {self.args.rollout_batch})")
        texts, lengths = common.decode(self.processor, ids, mask), mask.sum(1).tolist()
        cut = common.was_cut(self.model, self.processor, ids, mask)
        return [{**key, "response": text, "tokens": length, "cut": is_cut}
                for key, text, length, is_cut in zip(keys, texts, lengths, cut, strict=True)]


def find_adapters(args):
    """{name: adapter folder, None for the base model}, of the runs given or found."""
    found = {}
    for run in args.adapter or ["base", *(run for run in RUNS if Path(run, "adapter").is_dir())]:
        path = Path(run, "adapter") if Path(run, "adapter").is_dir() else Path(run)
        folder = path.parent if path.name == "adapter" else path
        name = "base" if run == "base" else args.name or folder.name
        if name in found:
            fail(f"two runs are called {name!r}: evaluate them one at a time with --name")
        found[name] = None if run == "base" else str(path)
    return found


def trained_keys(adapter):
    """The keys of the puzzles an adapter was trained on; None if its run does not say."""
    file = Path(adapter).parent / "trained_rows.json" if adapter else None
    if file and not file.is_file():
        tqdm.write(f"{file} is missing: rows that {adapter} was trained on cannot be counted")
        return None
    return set(json.loads(file.read_text())) if file else set()


def ask_model(args, rows, test):
    """Ask the model for the answers of every condition, and judge them."""
    answerer, adapters = Answerer(args), find_adapters(args)
    trained = {stage: trained_keys(adapter) for stage, adapter in adapters.items()}
    sources = ("image", "text") if args.input == "both" else (args.input,)
    asked = {source: responses.planning_prompts(rows, source, test, args.samples)
             for source in sources}
    looks = responses.perception_prompts(rows)
    settings = {"model": args.model, "weights": weight_files(args.model), "bits": args.bits,
                "max_new_tokens": args.max_new_tokens, "versions": common.versions()}
    conditions = [(stage, source) for stage in adapters for source in sources]
    with_looks = [names for names in conditions if names[1] == "image" and (    # or asked before
        args.perception or Path(args.out, "-".join(names), "perception.jsonl").is_file())]
    print(f"{len(rows)} rows; conditions: {', '.join('-'.join(names) for names in conditions)}")
    total = len(adapters) * sum(map(len, asked.values())) + len(with_looks) * len(looks)
    with tqdm(total=total, desc="answers", unit="row") as bar:

        def answers(folder, name, adapter, questions, temperature):
            fixed = {**settings, "adapter": weight_files(adapter), "temperature": temperature,
                     "seed": args.seed if temperature else None}
            answer = partial(answerer.answer, adapter, folder.name, temperature)
            return responses.collect(folder / name, fixed, questions, args.rollout_batch, answer,
                                     map, bar)

        for stage, source in conditions:
            folder, adapter, seen = Path(args.out, f"{stage}-{source}"), adapters[stage], []
            (folder / "summary.json").unlink(missing_ok=True)  # it may tell of other answers
            lines = answers(folder, "predictions.jsonl", adapter, asked[source], args.temperature)
            if (stage, source) in with_looks:
                seen = answers(folder, "perception.jsonl", adapter, looks, 0)
            conclude(folder, rows, lines, seen, args, trained[stage])


# ---------------------------------------------------------------- verdicts

def judge(row, line, parse=gen_data.parse, trained=None, tolerance=0):
    """An answer with its verdict: gen_data.judge's, who failed, and if the puzzle was trained on.

    A failure is perception's if the plan works in the world that the response describes,
    planning's if it fails there too or there is no plan, unclear if no map could be read. Rows
    that are no puzzles have neither. trained: keys of puzzles, None if they are not known.
    """
    verdict = gen_data.judge(row, line["response"], parse, tolerance)
    if "error" in line and verdict["outcome"] != "not judged":
        verdict["outcome"] = "error"
    failure = None
    if verdict["outcome"] != "success" and verdict["state_right"] is not None:
        failure = "unclear"
        if verdict["state"] is not None:
            described = {**row, "state": verdict["state"]}
            works = gen_data.judge(described, line["response"], parse)["outcome"] == "success"
            failure = "perception" if works else "planning"
    return {**line, "task": row["task"], "level": row["level"], "bucket": row.get("bucket"),
            **verdict, "failure": failure,
            "trained_on": None if trained is None else gen_data.key_of(row) in trained}


def conclude(folder, rows, lines, looks, args, trained=None):
    """Judge a condition's answers: predictions.jsonl, perception.jsonl, summary.json."""
    by_id, seen = {row["id"]: row for row in rows}, []
    parse = lenient.parse if args.lenient else gen_data.parse
    verdicts = [judge(by_id[line["id"]], line, parse, trained, args.tolerance) for line in lines]
    for line in looks:
        row, name = by_id[line["id"]], line["question"]
        right = gen_data.score_perception(row, (name,), line["response"])[name]
        seen.append({**line, "task": row["task"], "level": row["level"], "right": right})
    table = summarise(verdicts)
    whole = next(cell for cell in table if cell["task"] == "macro")
    success = "not judged" if whole["success"] is None else f"{whole['success']:.0%}"
    words = f"{folder.name}: success {success}"
    if whole["trained_on"] is not None:
        words += f"; {whole['trained_on']} of its {whole['n']} rows are puzzles it was trained on"
    tqdm.write(words)
    summary = {"rows": digest_rows(rows), "table": table, "diagnosis": diagnose(verdicts),
               "perception": summarise_perception(seen), "args": vars(args),
               "versions": common.versions()}
    folder.mkdir(parents=True, exist_ok=True)
    for name, things in (("predictions", verdicts), ("perception", seen)):
        if things:
            text = "".join(json.dumps(thing) + "\n" for thing in things)
            run_files.write_aside(folder / f"{name}.jsonl", text)
    run_files.write_aside(folder / "summary.json", json.dumps(summary, indent=1))


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
    """One line per answer: id, task, level, bucket, outcome, tokens, trained_on, and RATES.

    What does not apply to a row is NaN: it counts in no rate.
    """
    frame = pd.DataFrame(verdicts, columns=[
        "id", "task", "level", "bucket", "outcome", "plan", "optimal", "state_right", "cut",
        "tokens", "trained_on"])
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


def cell(answers):
    """The numbers of one line of the table: n, rates with intervals; all tasks weigh the same."""
    rows = by_row(answers)
    numbers = {"n": len(rows)}
    for name in RATES:
        numbers |= rate(name, by_task(rows, name))
    if len(answers) > len(rows):
        numbers |= rate("pass_at_k", by_task(rows, "solved"))
    known = bool(rows["trained_on"].notna().all())
    unseen = rows[rows["trained_on"].eq(False)]
    numbers["trained_on"] = len(rows) - len(unseen) if known else None
    numbers |= rate("success_unseen", by_task(unseen, "success"))
    numbers["tokens"] = None if answers["tokens"].isna().all() else float(answers["tokens"].mean())
    faults = Counter(outcome for outcome in answers["outcome"] if outcome != "success")
    return numbers | {"faults": dict(faults.most_common())}


def summarise(verdicts):
    """The table: a dict per task and level, per task, for all tasks, for all tasks by bucket."""
    answers, table = answer_frame(verdicts), []
    for task, of_task in answers.groupby("task", sort=False):
        for level, of_level in of_task.groupby("level"):  # pairs have none
            table.append({"task": task, "level": int(level), "bucket": None, **cell(of_level)})
        table.append({"task": task, "level": None, "bucket": None, **cell(of_task)})
    table.append({"task": "macro", "level": None, "bucket": None, **cell(answers)})
    for bucket in gen_data.DIFFICULTIES:
        of_bucket = answers[answers["bucket"] == bucket]
        if len(of_bucket):
            table.append({"task": "macro", "level": None, "bucket": bucket, **cell(of_bucket)})
    return table


def summarise_perception(looks):
    """Exact match per question and of all questions about a picture, per task, level and question.

    looks: [{"id", "task", "level", "question", "right"}].
    """
    frame, numbers = pd.DataFrame(looks, columns=["id", "task", "level", "question", "right"]), []
    for task, of_task in frame.groupby("task", sort=False):
        for level in [None, *sorted(map(int, of_task["level"].dropna().unique()))]:
            some = of_task if level is None else of_task[of_task["level"] == level]
            groups = dict(list(some.groupby("question", sort=False)["right"]))
            groups["all"] = some.groupby("id", sort=False)["right"].all()
            for question, right in groups.items():
                numbers.append({"task": task, "level": level, "question": question,
                                "n": len(right), **rate("exact", [right.to_numpy(float)])})
    return numbers


def diagnose(verdicts):
    """Counts: the map described (right, wrong) against the plan (PLANS), and who failed."""
    counts, verdicts = Counter(), [v for v in verdicts if v["state_right"] is not None]
    for v in verdicts:
        plan = "shortest" if v["optimal"] else "longer" if v["outcome"] == "success" else "failed"
        counts["right" if v["state_right"] else "wrong", plan] += 1
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
    groups["macro"] = [values for group in groups.values() for values in group]
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

def finished_conditions(out, rows):
    """{condition: its summary.json} of those in `out` that answered `rows`, stages first."""
    finished = {}
    for path in sorted(Path(out).glob("*/summary.json")):
        summary = json.loads(path.read_text(encoding="utf-8"))
        if summary["rows"] == digest_rows(rows):
            finished[path.parent.name] = summary
        else:
            print(f"{path.parent.name} answered other rows: left out of the tables")
    stages = [f"{stage}-{source}" for stage in STAGES for source in responses.INPUTS]
    order = [name for name in stages if name in finished]
    order += [name for name in finished if name not in order]
    return {name: finished[name] for name in order}


def main(args):
    gen_data.ensure(args.data, args.preset, args.seed)
    test, out = gen_data.load_rows(args.data, args.split), Path(args.out)
    rows = gen_data.choose_rows(test, args.tasks, args.limit)
    if args.responses:
        folder = out / (args.name or Path(args.responses).stem)
        if list(folder.glob("*.settings.json")):
            fail(f"{folder} holds answers that were asked for here: choose another --name")
        lines = responses.read(args.responses, rows, test, args.allow_missing)
        conclude(folder, rows, lines, [], args)
    else:
        ask_model(args, rows, test)

    summaries = finished_conditions(out, rows)
    verdicts = {name: report.read_lines(out / name / "predictions.jsonl") for name in summaries}
    comparison = compare(verdicts, args.reference)
    tables = report.make_tables(summaries, comparison)
    runs = [Path(run) for run in dict.fromkeys((*RUNS, *(args.adapter or ())))]
    page = report.make_page(rows, tables, summaries, verdicts, runs)
    run_files.write_aside(out / "results.md", report.make_text(tables))
    run_files.write_aside(out / "results.json",
                       json.dumps({"conditions": summaries, **comparison}, indent=1))
    run_files.write_aside(out / "report.html", page)
    print(f"\n{report.markdown(tables[0])}\nmore in {out}/results.md and {out}/report.html; every "
          f"answer in {out}/<condition>/predictions.jsonl")


if __name__ == "__main__":
    main(parse_args())
