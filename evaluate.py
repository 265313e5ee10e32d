"""Evaluation: plans are executed by the rules. Did the modality gap close, where, and is what is left perception or planning?

    python evaluate.py                                   # base, out/coldstart, out/distill: whatever is there
    python evaluate.py --limit 20                        # a quick look: 20 rows per task and level
    python evaluate.py --perception                      # also every question about every picture
    python evaluate.py --adapter base out/mine --input image --temperature 1 --samples 8
    python evaluate.py --responses mine.jsonl            # scores {"id", "response"} lines, loads no model
    python evaluate.py --api_base http://localhost:8000/v1 --api_model NAME     # asks a server; its key: $OPENAI_API_KEY
    python evaluate.py --adapter out/distill --merge_to out/merged              # an ordinary checkpoint for other programs

A condition is a model with an input: base-image, distill-text. Every row counts: what cannot be read is a failure.
out/eval/<condition>/ gets predictions.jsonl, perception.jsonl and summary.json; out/eval/ gets results.md, results.json and
report.html with all conditions there that answered the same rows. Answers are written as they come: started again with
the same settings, a run goes on where it stopped; answers given under other settings are put aside (*.old).
The gap is success from symbols minus success from pictures.
"""
import argparse
import base64
import hashlib
import io
import json
import math
import os
import re
from collections import Counter
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch
from scipy.stats import binomtest, bootstrap
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import common
import gen_data
from gen_data import (check, fail, open_picture, parse, perception_prompt, questions, read_state, score_perception, student_prompt,
                      teacher_prompt, trace)

RUNS = ("out/coldstart", "out/distill")
GALLERY = 500  # rows the report shows at most
STAGES = ("base", "coldstart", "distill")
RATES = {"success": lambda v: v["outcome"] == "success", "optimal": lambda v: v["optimal"],
         "parsed": lambda v: v["plan"] is not None, "state": lambda v: v["state_right"], "cut": lambda v: bool(v.get("cut"))}
ANSWER = ("id", "sample", "question", "response", "tokens", "cut", "error")  # what an answer is; the verdict follows from it


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    common.add_flags(parser)
    add = parser.add_argument
    add("--out", default="out/eval", help="output folder")
    add("--adapter", nargs="+", metavar="RUN", help="runs to evaluate, base for none (default: base, out/coldstart, out/distill)")
    add("--input", default="both", choices=("image", "text", "both"), help="the picture, the symbols (no reference plan), or both")
    add("--tasks", nargs="+", help="task, or task:level, or task:low-high (default: all in the data)")
    add("--levels", nargs="+", type=int, help="levels (default: all)")
    add("--limit", type=int, help="rows per task and level (default: all)")
    add("--micro_batch", type=int, default=100, help="rows answered at a time")
    add("--max_new_tokens", type=int, help="length limit of an answer, tokens (default: the preset's; 1024 with --api_base)")
    add("--temperature", type=float, default=0.0, help="0: greedy")
    add("--samples", type=int, default=1, help="answers per row: their mean, and pass@k (wants a temperature)")
    add("--perception", action="store_true", help="also ask every perception question about every picture, greedily")
    add("--force_route", action="store_true", help="where a response ends without an answer, begin its route and let it go on "
        "(condition RUN+route): shows how a student plans that learnt to stop after the map")
    add("--responses", metavar="FILE", help='score the JSONL {"id", "response"} of any other model')
    add("--name", help="name of the condition (default: the run's folder, the file's stem, the served model)")
    add("--allow_missing", action="store_true", help="rows that --responses does not answer are failures, no error")
    add("--api_base", metavar="URL", help="OpenAI-compatible server to ask, e.g. http://localhost:8000/v1")
    add("--api_model", metavar="NAME", help="its name for the model")
    add("--concurrency", type=int, default=8, help="requests at a time")
    add("--merge_to", metavar="DIR", help="no evaluation: merge the one --adapter into 16-bit weights and write a checkpoint")
    args = parser.parse_args(argv)
    if args.api_base:
        args.max_new_tokens = args.max_new_tokens or 1024
    args = common.resolve(args)
    for name in ("limit", "samples", "concurrency", "micro_batch"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            fail(f"--{name} {getattr(args, name)}: wanted at least 1")
    if args.temperature < 0 or (args.samples > 1 and args.temperature == 0):
        fail(f"--samples {args.samples} --temperature {args.temperature}: several answers need a --temperature above 0")
    if args.responses and (args.api_base or args.samples > 1 or args.perception):
        fail("--responses scores one plan per row, without --api_base, --samples or --perception")
    if args.force_route and (args.responses or args.api_base):
        fail("--force_route is for models that run here, without --responses or --api_base")
    if bool(args.api_base) != bool(args.api_model) or not (args.api_base or "http").startswith("http"):
        fail(f"--api_base {args.api_base} --api_model {args.api_model}: wanted both, a URL and a model's name")
    if args.name and not re.fullmatch(r"\w[\w.+-]*", args.name):
        fail(f"--name {args.name!r}: wanted letters, digits and . + - _ (it names a folder)")
    return args


def choose_rows(args):
    """The test rows that --tasks, --levels and --limit leave."""
    tasks, groups = gen_data.parse_tasks(args.tasks or ()), {}
    for row in gen_data.load_rows(args.data, "test"):
        task, level = row["task"], row["level"]
        if (not args.tasks or level in tasks.get(task, ())) and (not args.levels or level in args.levels):
            groups.setdefault((task, level), []).append(row)
    if not groups:
        fail(f"no row left in {args.data}/test: loosen --tasks or --levels")
    return [row for group in groups.values() for row in group[:args.limit]]


def digest(*things):
    """A short name for JSON-serialisable things, the same for the same things."""
    return hashlib.sha256(json.dumps(things).encode()).hexdigest()[:16]


def same(rows):
    """What two conditions must share to stand in one table: their puzzles."""
    return digest([(row["id"], row["state"], row.get("bucket")) for row in rows])


def weights_of(folder):
    """Name, size and time of a folder's weight files, so that new weights are not taken for the old; [] for a hub name."""
    files = sorted(Path(folder).glob("*.safetensors")) if folder else []
    return [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]


# ---------------------------------------------------------------- answers

def label(key):
    """What tells one answer of a condition from another."""
    return key["id"], key.get("sample"), key.get("question")


def collect(file, settings, asked, size, answer, pooled_map, bar, wins=None):
    """Answers to all of `asked`: those already in `file`, the others from `answer`, appended as they come.

    asked: [(key, prompt, picture or None)], key {"id"} and what else tells answers apart. answer((index, batch)) gives the
    lines of one batch of at most `size`; a batch is always the same rows, so a resumed run draws and pads as an unbroken one.
    pooled_map: map, or a pool's imap_unordered. wins(line) -> bool, for the rate that the bar shows.
    """
    pin, lines = file.with_suffix(".settings.json"), {}
    settings = json.loads(json.dumps({**settings, "asked": digest([(key, prompt, picture and hashlib.sha256(
        Path(picture).read_bytes()).hexdigest()) for key, prompt, picture in asked])}))
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.is_file() and (not pin.is_file() or json.loads(pin.read_text()) != settings):
        file.replace(f"{file}.old")
        tqdm.write(f"{file}: answered under other settings, kept as {file.name}.old; starting anew")
    pin.write_text(json.dumps(settings, indent=1))
    if file.is_file():
        whole = file.read_bytes()
        whole = whole[:whole.rfind(b"\n") + 1]  # the last line may be half a line
        file.write_bytes(whole)
        for line in map(json.loads, whole.splitlines()):
            if "error" not in line:             # a request that failed is made again
                lines[label(line)] = {k: line[k] for k in ANSWER if k in line}
    batches = [(i, asked[i:i + size]) for i in range(0, len(asked), size)]
    todo = [(i, batch) for i, batch in batches if not all(label(key) in lines for key, _, _ in batch)]
    won = [wins(line) for line in lines.values()] if wins else []
    bar.update(len(asked) - sum(len(batch) for _, batch in todo))
    if todo:
        (file.parent / "summary.json").unlink(missing_ok=True)  # it would tell of other answers
    with open(file, "a") as out:
        for batch in pooled_map(answer, todo):
            out.writelines(json.dumps(line) + "\n" for line in batch)
            out.flush()
            lines.update({label(line): line for line in batch})
            bar.update(len(batch))
            if wins:
                won += map(wins, batch)
                bar.set_postfix(success=f"{np.mean(won):.0%}")
    return [lines[label(key)] for key, _, _ in asked]


class Local:
    """The model on this machine: loaded at the first question that has no answer yet, one adapter at a time."""

    def __init__(self, args):
        self.args, self.model, self.worn = args, None, None

    def wear(self, adapter):
        if self.model is None:
            self.model, self.processor = common.load(self.args.model, self.args.bits)
        if adapter != self.worn:
            self.model = self.model.unload() if self.worn else self.model
            self.model = common.add_lora(self.model, path=adapter) if adapter else self.model
            self.worn = adapter
        self.model.eval()

    def answer(self, adapter, name, temperature, route, job):
        """The lines of one batch. route: a response without an answer is made to go on with its route."""
        index, batch = job
        self.wear(adapter)
        torch.manual_seed(int(digest(self.args.seed, name, index), 16) % 2**62)  # depends on nothing before this batch
        lines = self.say(batch, [""] * len(batch), temperature)
        stuck = [i for i, line in enumerate(lines) if route and "</answer>" not in line["response"]]
        begun = [lines[i]["response"].split("\nRoute")[0].rstrip() + "\nRoute: from" for i in stuck]
        for i, line in zip(stuck, self.say([batch[i] for i in stuck], begun, temperature) if stuck else []):
            lines[i] = {**line, "tokens": lines[i]["tokens"] + line["tokens"]}
        return lines

    def say(self, batch, begun, temperature):
        """Responses to a batch that begin with the texts `begun`."""
        images = [path and open_picture(path) for _, _, path in batch]
        prompt = common.encode(self.processor, [text for _, text, _ in batch], images, self.model.device)
        if any(begun):
            tokenizer, keep = self.processor.tokenizer, prompt["attention_mask"].bool()
            more = [torch.tensor(ids, device=keep.device) for ids in tokenizer(begun, add_special_tokens=False)["input_ids"]]
            for name, pad, behind in (("input_ids", tokenizer.pad_token_id, more), ("mm_token_type_ids", 0, [0 * ids for ids in more]),
                                      ("attention_mask", 0, [0 * ids + 1 for ids in more])):
                rows = [torch.cat([row[kept], new]) for row, kept, new in zip(prompt[name], keep, behind)]
                prompt[name] = pad_sequence(rows, batch_first=True, padding_value=pad, padding_side="left")        # [B, P]
        ids, mask = common.sample(self.model, self.processor, prompt, self.args.max_new_tokens, temperature)       # [B, T]
        ended = (ids == self.processor.tokenizer.eos_token_id).any(1).tolist()
        texts = [start + text for start, text in zip(begun, common.decode(self.processor, ids, mask))]
        return [{**key, "response": text, "tokens": int(row.sum()), "cut": not end}
                for (key, _, _), text, row, end in zip(batch, texts, mask, ended)]


def server(args, temperature):
    """Asks the OpenAI-compatible server --api_base, one row at a time; its answers have the form of `Local.answer`.

    The client repeats what met 408, 409, 429, 5xx, a time-out or a broken connection, after 0.5, 1, 2, 4, 8 s or as the
    server says. What still fails is a row with an "error"; a server that is not there, a refused key or an unknown model
    stops the run.
    """
    try:
        import openai
    except ImportError:
        fail("--api_base needs the client: pip install openai")
    secret = os.environ.get("OPENAI_API_KEY") or "no key"
    client = openai.OpenAI(base_url=args.api_base, api_key=secret, max_retries=5, timeout=300)

    def answer(job):
        (name, text, picture), = job[1]
        content = [{"type": "text", "text": text}]
        if picture:
            url = f"data:image/png;base64,{base64.b64encode(Path(picture).read_bytes()).decode()}"
            content.insert(0, {"type": "image_url", "image_url": {"url": url}})
        drawn = {"seed": int(digest(args.seed, name), 16) % 2**31} if temperature else {}
        try:
            reply = client.chat.completions.create(model=args.api_model, messages=[{"role": "user", "content": content}],
                                                   max_tokens=args.max_new_tokens, temperature=temperature, **drawn)
            choice, used = reply.choices[0], reply.usage
            return [{**name, "response": choice.message.content or "", "tokens": used and used.completion_tokens,
                     "cut": choice.finish_reason == "length"}]
        except (openai.OpenAIError, TypeError, IndexError, AttributeError, ValueError) as problem:  # or not a chat completion
            error = f"{type(problem).__name__}: {problem} {problem.__cause__ or ''}".replace(secret, "***")[:300].strip()
            fatal = (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError, openai.APIConnectionError)
            if isinstance(problem, fatal) and not isinstance(problem, openai.APITimeoutError):
                raise ConnectionError(error) from None
            return [{**name, "response": "", "error": error}]
    return answer


def read_responses(args, rows):
    """The answers in --responses, one per row."""
    known, lines = {row["id"] for row in gen_data.load_rows(args.data, "test")}, {}
    try:
        text = Path(args.responses).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        fail(f"cannot read --responses {args.responses}: {error}")
    for number, line in enumerate(text.split("\n"), 1):
        where = f"{args.responses}, line {number}"
        try:
            line = json.loads(line) if line.strip() else None
        except ValueError:
            fail(f"{where}: not JSON; wanted one {{\"id\", \"response\"}} per line")
        if line is None:
            continue
        if not isinstance(line, dict) or not isinstance(line.get("id"), str) or not isinstance(line.get("response"), str):
            fail(f"{where}: wanted an object with \"id\" and \"response\", both text; got {str(line)[:60]}")
        if line["id"] not in known or line["id"] in lines:
            fail(f"{where}: id {line['id']!r} is {'doubled' if line['id'] in lines else f'not in {args.data}/test'}")
        lines[line["id"]] = {"id": line["id"], "response": line["response"]}
    missing = [row["id"] for row in rows if row["id"] not in lines]
    if missing and not args.allow_missing:
        fail(f"{args.responses}: no response for {len(missing)} rows, the first {missing[0]!r}; --allow_missing makes them failures")
    return [lines.get(row["id"], {"id": row["id"], "response": ""}) for row in rows]


# ---------------------------------------------------------------- verdicts and numbers

def judge(row, line):
    """An answer with its verdict: the plan, the outcome, optimal or not, the state that it describes and if that is right."""
    plan, state = parse(line["response"]), read_state(row["task"], line["response"])
    outcome = "error" if "error" in line else check(row["task"], row["state"], plan)
    return {**line, "task": row["task"], "level": row["level"], "bucket": row.get("bucket"), "plan": plan, "outcome": outcome,
            "optimal": outcome == "success" and len(plan) == len(row["plan"]), "state": state, "state_right": state == row["state"]}


def interval(*groups):
    """95% bootstrap interval of the mean over groups of their means; None where no value differs from another.

    groups: arrays [rows], a value per row; the rows of each group are drawn again (paired, if the values are differences).
    """
    if all(np.ptp(values) == 0 for values in groups):
        return None
    groups = [np.resize(values, max(2, len(values))) for values in groups]  # scipy wants two values at least
    ends = bootstrap(groups, lambda *x, axis: np.mean([values.mean(axis) for values in x], 0), batch=999, n_resamples=9999,
                     method="percentile", rng=np.random.default_rng(0)).confidence_interval
    return [float(ends.low), float(ends.high)]


def rate(name, *groups):
    """{name: mean over groups of their means, name_ci: its 95% interval}: Wilson's for one group of zeros and ones."""
    if len(groups) == 1 and np.isin(groups[0], (0, 1)).all():
        ci = list(binomtest(int(groups[0].sum()), len(groups[0])).proportion_ci(method="wilson"))
    else:
        ci = interval(*groups)
    return {name: float(np.mean([values.mean() for values in groups])), f"{name}_ci": ci}


def per_row(verdicts, value):
    """One number per row [rows]: the mean over the row's samples."""
    rows = {}
    for verdict in verdicts:
        rows.setdefault(verdict["id"], []).append(value(verdict))
    return np.array([np.mean(values) for values in rows.values()])


def cell(verdicts):
    """The numbers of one line of the table; verdicts: a list per task, the tasks weigh the same."""
    whole = [v for group in verdicts for v in group]
    numbers = {"n": len({v["id"] for v in whole})}
    for name, value in RATES.items():
        numbers |= rate(name, *(per_row(group, value) for group in verdicts))
    if len(whole) > numbers["n"]:
        numbers |= rate("pass_at_k", *(np.ceil(per_row(group, RATES["success"])) for group in verdicts))
    tokens = [v["tokens"] for v in whole if v.get("tokens") is not None]
    return numbers | {"tokens": float(np.mean(tokens)) if tokens else None,
                      "faults": dict(Counter(v["outcome"] for v in whole if v["outcome"] != "success").most_common())}


def grouped(things):
    """{(task, level): [[…]]}: per task and level, per task (level None); "macro", all and by bucket: a list per task."""
    tasks, groups = list(dict.fromkeys(t["task"] for t in things)), {}
    for task in tasks:
        mine = [t for t in things if t["task"] == task]
        for level in sorted({t["level"] for t in mine}):
            groups[task, level] = [[t for t in mine if t["level"] == level]]
        groups[task, None] = [mine]
    groups["macro", None] = [groups[task, None][0] for task in tasks]
    for bucket in ("easy", "medium", "hard"):
        if mine := [some for group in groups["macro", None] if (some := [t for t in group if t.get("bucket") == bucket])]:
            groups["macro", bucket] = mine
    return groups


def summarise(verdicts):
    """The table's numbers, a dict per task and level, per task, and for all tasks."""
    return [{"task": task, "level": level, **cell(group)} for (task, level), group in grouped(verdicts).items()]


def summarise_perception(asked):
    """Exact match per question and of all questions of a picture. asked: [{"id", "task", "level", "question", "right"}]"""
    numbers = []
    for (task, level), (group,) in ((key, group) for key, group in grouped(asked).items() if key[0] != "macro"):
        for question in (*dict.fromkeys(a["question"] for a in group), "all"):
            rows = {}
            for a in group:
                if question in (a["question"], "all"):
                    rows.setdefault(a["id"], []).append(a["right"])
            right = np.array([all(values) for values in rows.values()], float)                     # [rows]
            numbers.append({"task": task, "level": level, "question": question, "n": len(right), **rate("exact", right)})
    return numbers


def diagnose(verdicts):
    """Perception or planning? The state described (right, wrong) against the plan (optimal, valid, failed), and who failed.

    A failure is perception's if its plan works in the world that the response describes, planning's if it fails there
    too (or if there is no plan), and unclear if no state could be read.
    """
    table = Counter((v["state_right"], "optimal" if v["optimal"] else "valid" if v["outcome"] == "success" else "failed")
                    for v in verdicts)
    blame = Counter("unclear" if v["state"] is None else
                    "perception" if check(v["task"], v["state"], v["plan"]) == "success" else "planning"
                    for v in verdicts if v["outcome"] != "success")
    return {**{f"{'right' if right else 'wrong'}_{plan}": table[right, plan] for right in (True, False)
               for plan in ("optimal", "valid", "failed")}, **{name: blame[name] for name in ("perception", "planning", "unclear")}}


def difference(a, b, value=RATES["success"]):
    """Per task and macro: the mean of a - b over the rows both answered, with its paired bootstrap interval."""
    numbers = {}
    for (task, level), groups in grouped(a).items():
        if level is None:
            others = [[v for v in b if v["task"] == group[0]["task"]] for group in groups]
            values = [per_row(mine, value) - per_row(other, value) for mine, other in zip(groups, others)]
            numbers[task] = {"mean": float(np.mean([v.mean() for v in values])), "ci": interval(*values)}
    return numbers


def compare(verdicts):
    """What takes two conditions: the gaps, what each stage closed of the base's, the steps on pictures.

    verdicts: {condition: its predictions}, in the order of the stages.
    """
    pictures = [name for name in verdicts if not name.endswith("-text")]
    pairs = [(name.replace("-image", "-text"), name) for name in pictures if name.endswith("-image")]
    gaps = {name: difference(verdicts[text], verdicts[name]) for text, name in pairs if text in verdicts}
    chain = [name for name in pictures if "+route" not in name]
    steps = {f"{b} minus {a}": difference(verdicts[b], verdicts[a]) for a, b in zip(chain, chain[1:])}
    closed = {}
    if "base-image" in gaps:
        for name in pictures:
            gained = difference(verdicts[name], verdicts["base-image"])
            closed[name] = {task: gained[task]["mean"] / gap["mean"] if gap["mean"] > 0 else None
                            for task, gap in gaps["base-image"].items()}
    return {"gaps": gaps, "closed": closed, "differences": steps}


# ---------------------------------------------------------------- what is read by people

def percent(share):
    """0.925 -> 93: halves go up, as on the page (Python's round would take the even number)."""
    return math.floor(100 * share + 0.5)


def shown(mean, ci, form="{}"):
    """0.5, [0.4, 0.6] -> "50 [40, 60]" """
    mean, *ends = (form.format(percent(x)) for x in (mean, *(ci or ())))
    return f"{mean} [{', '.join(ends)}]" if ends else mean


def markdown(head, lines):
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in (head, ["---"] * len(head), *lines))


def results(summaries, comparison):
    """results.md: the table, the faults, the gaps, perception or planning. summaries: {condition: its summary.json}"""
    cells = {name: {(c["task"], c["level"]): c for c in summary["table"]} for name, summary in summaries.items()}
    first, whole = next(iter(cells.values())), {name: c["macro", None] for name, c in cells.items()}
    columns = {"success": "success", "pass_at_k": "pass@k", "optimal": "shortest"}
    if not any("pass_at_k" in c for c in whole.values()):
        del columns["pass_at_k"]
    text = ["Success in %, in brackets with the shortest plan; every row counts. image: the picture; text: the symbols, without "
            "a reference plan.",
            markdown(["task", "level", "n", *cells], [[task, level or "all", first[task, level]["n"], *(
                f"{percent(c[task, level]['success'])} ({percent(c[task, level]['optimal'])})" for c in cells.values())]
                for task, level in first]),
            "All tasks, in % with 95% intervals. answer: one could be read; map: the one described is right; cut: no end within the "
            "limit.",
            markdown(["condition", *columns.values(), "answer", "map", "cut", "tokens", "faults"], [
                [name, *(shown(c[rate], c[f"{rate}_ci"]) if rate in c else "" for rate in columns),
                 *(percent(c[rate]) for rate in ("parsed", "state", "cut")), "" if c["tokens"] is None else round(c["tokens"]),
                 ", ".join(f"{fault} {n}" for fault, n in c["faults"].items()) or "none"] for name, c in whole.items()]),
            "Perception or planning? Responses by the map they describe and what their plan is worth; failures of perception (the plan "
            "works on the map described), of planning (it fails there too, or there is none), unclear (no map could be read).",
            markdown(["counts", *summaries], [[head, *(" / ".join(str(summary["diagnosis"][name]) for name in names.split())
                                                       for summary in summaries.values())] for head, names in (
                ("map right, plan shortest / longer / failed", "right_optimal right_valid right_failed"),
                ("map wrong, plan shortest / longer / failed", "wrong_optimal wrong_valid wrong_failed"),
                ("failures of perception / planning / unclear", "perception planning unclear"))])]
    lines = [[f"{name.replace('-image', '-text')} minus {name}", *gap.values()] for name, gap in comparison["gaps"].items()]
    lines += [[name, *step.values()] for name, step in comparison["differences"].items()]
    lines = [[head, *(shown(d["mean"], d["ci"], "{:+}") for d in numbers)] for head, *numbers in lines]
    lines += [[f"closed by {name} of the base's gap", *("" if share is None else f"{percent(share)}%" for share in closed.values())]
              for name, closed in comparison["closed"].items() if name != "base-image"]
    if lines:
        text += ["Differences of success in points, with 95% intervals over the same rows.",
                 markdown(["", *(task for task, level in first if level is None)], lines)]
    seen = {name: {(p["task"], p["question"]): p for p in summary["perception"] if p["level"] is None}
            for name, summary in summaries.items() if summary["perception"]}
    if seen:
        text += ["Perception questions answered exactly, in % with 95% intervals; all: every question about a picture.",
                 markdown(["task", "question", "n", *seen], [
                     [*key, number["n"], *(shown(s[key]["exact"], s[key]["exact_ci"]) for s in seen.values())]
                     for key, number in next(iter(seen.values())).items()])]
    return "\n\n".join(text) + "\n"


# ---------------------------------------------------------------- report.html

def read_lines(file):
    """The objects of a JSONL file, [] if there is none. NaN, which JSON has not, becomes None."""
    with open(file if Path(file).is_file() else os.devnull, encoding="utf-8") as lines:
        return [json.loads(line, parse_constant=lambda _: None) for line in lines]


def picture(row):
    """The row's picture as a small data URL, for looking at."""
    image, file = open_picture(row["path"]), io.BytesIO()
    image.thumbnail((256, 256))
    image.quantize(64).save(file, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def report(rows, summaries, verdicts, comparison, runs):
    """The page: report.html with its data. runs: the training runs whose curves it shows.

    The data goes in as JSON without "<", and the page only ever sets text: nothing in a response can run.
    """
    shown = rows[::-(-len(rows) // GALLERY)]

    def told(row, v):
        cells = [pos[:2] for pos in trace(row["task"], row["state"], v["plan"] or [])]
        return {"response": v["response"], "outcome": v["outcome"], "optimal": v["optimal"], "right": v["state_right"],
                "described": v["state"] and gen_data.TASKS[row["task"]].describe(v["state"]), "cells": cells,
                "next": v["plan"][len(cells) - 1] if len(v["plan"] or []) >= len(cells) else None}  # what was not executed
    by_id = {name: {v["id"]: v for v in reversed(answers)} for name, answers in verdicts.items()}  # of several samples the first
    data = {"summaries": summaries, "comparison": comparison, "total": len(rows),
            "curves": {run.name: read_lines(run / "metrics.jsonl") for run in runs}, "parts": gen_data.PARTS,
            "rollouts": {run.name: read_lines(run / "rollouts.jsonl") for run in runs},
            "rows": [{"id": row["id"], "task": row["task"], "level": row["level"], "picture": picture(row), "plan": row["plan"],
                      "size": len(row["state"].get("grid") or row["state"]["walls"]),
                      "true": gen_data.TASKS[row["task"]].describe(row["state"])} for row in shown],
            "answers": {name: [told(row, answers[row["id"]]) for row in shown] for name, answers in by_id.items()}}
    page = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    return page.replace("DATA", json.dumps(data).replace("<", "\\u003c"), 1)


# ---------------------------------------------------------------- main

def conclude(folder, rows, lines, perception, args):
    """Judge a condition's answers: predictions.jsonl, perception.jsonl, summary.json."""
    rows_by_id = {row["id"]: row for row in rows}
    verdicts = [judge(rows_by_id[line["id"]], line) for line in lines]
    seen = []
    for line in perception:
        row = rows_by_id[line["id"]]
        right = "error" not in line and score_perception(row, (line["question"],), line["response"])[line["question"]]
        seen.append({**line, "task": row["task"], "level": row["level"], "right": right})
    summary = {"rows": same(rows), "table": summarise(verdicts),
               "diagnosis": diagnose(verdicts), "perception": summarise_perception(seen), "args": vars(args),
               "versions": common.versions()}
    folder.mkdir(parents=True, exist_ok=True)
    for name, things in (("predictions", verdicts), ("perception", seen)):
        if things:
            common.write_aside(folder / f"{name}.jsonl", "".join(json.dumps(thing) + "\n" for thing in things))
    common.write_aside(folder / "summary.json", json.dumps(summary, indent=1))


def adapters(args):
    """{name: adapter folder, None for the base model}, of the runs given or found."""
    found = {}
    for run in args.adapter or ["base", *(run for run in RUNS if Path(run, "adapter").is_dir())]:
        path = Path(run, "adapter") if Path(run, "adapter").is_dir() else Path(run)
        name = "base" if run == "base" else args.name or (path.parent if path.name == "adapter" else path).name
        if name + "+route" * args.force_route in found:
            fail(f"two runs are called {name!r}: evaluate them one at a time with --name")
        found[name + "+route" * args.force_route] = None if run == "base" else str(path)
    return found


def main(args):
    if args.merge_to:
        adapter, *more = [path for path in adapters(args).values() if path] or [None]
        if more or not adapter:
            fail("--merge_to wants one run with an adapter: --adapter out/distill")
        return common.merge(args.model, adapter, args.merge_to)
    gen_data.ensure(args.data, args.preset, args.seed)
    rows, out = choose_rows(args), Path(args.out)
    if args.responses:
        folder = out / (args.name or Path(args.responses).stem)
        if list(folder.glob("*.settings.json")):
            fail(f"{folder} holds answers that were asked for here: choose another --name")
        conclude(folder, rows, read_responses(args, rows), [], args)
    else:
        ask(args, rows, out)

    finished = {path.parent.name: json.loads(path.read_text()) for path in out.glob("*/summary.json")}
    for name in [name for name, summary in finished.items() if summary["rows"] != same(rows)]:
        print(f"{name} answered other rows: left out of the table")
        del finished[name]
    order = [f"{stage}{route}-{source}" for stage in STAGES for route in ("", "+route") for source in ("image", "text")]
    summaries = {name: finished[name] for name in (*filter(finished.get, order), *sorted(finished.keys() - set(order)))}
    verdicts = {name: read_lines(out / name / "predictions.jsonl") for name in summaries}
    comparison = compare(verdicts)
    text = results(summaries, comparison)
    common.write_aside(out / "results.md", text)
    common.write_aside(out / "results.json", json.dumps({"conditions": summaries, **comparison}, indent=1))
    runs = [run for run in map(Path, dict.fromkeys((*RUNS, *(args.adapter or ())))) if (run / "metrics.jsonl").is_file()]
    common.write_aside(out / "report.html", report(rows, summaries, verdicts, comparison, runs))
    print(f"\n{text}\nwrote {out}/report.html, {out}/results.md, {out}/results.json, {out}/<condition>/")


def ask(args, rows, out):
    """Ask the model here, or a server, for the answers of every condition, and judge them."""
    by_id, local, fixed = {row["id"]: row for row in rows}, Local(args), {"max_new_tokens": args.max_new_tokens}
    if args.api_base:
        stages = {args.name or re.sub(r"[^\w.+-]", "_", args.api_model): None}
        fixed |= {"api_base": args.api_base, "api_model": args.api_model}
    else:
        stages = adapters(args)
        fixed |= {"model": args.model, "weights": weights_of(args.model), "bits": args.bits, "micro_batch": args.micro_batch,
                  "versions": common.versions()}
    inputs = ("image", "text") if args.input == "both" else (args.input,)
    keys = [(row, {"id": row["id"], **({"sample": i} if args.samples > 1 else {})}) for i in range(args.samples) for row in rows]
    looks = [({"id": row["id"], "question": name}, perception_prompt(row, (name,)), row["path"])
             for row in rows for name in questions(row["task"])] if args.perception and "image" in inputs else []
    print(f"{len(rows)} rows; conditions: {', '.join(f'{stage}-{source}' for stage in stages for source in inputs)}")
    with tqdm(total=len(stages) * (len(inputs) * len(keys) + len(looks)), desc="answers", unit="row") as bar, \
            ThreadPool(args.concurrency) as pool:

        def answers(folder, adapter, what, asked, temperature, wins=None):
            route = args.force_route and what == "predictions.jsonl"
            settings = {**fixed, "route": route, "adapter": weights_of(adapter), "temperature": temperature,
                        "seed": args.seed if temperature else None}
            if args.api_base:
                try:
                    return collect(folder / what, settings, asked, 1, server(args, temperature), pool.imap_unordered, bar, wins)
                except ConnectionError as problem:
                    fail(f"{args.api_base} does not answer for {args.api_model}: {problem}")
            return collect(folder / what, settings, asked, args.micro_batch, partial(
                local.answer, adapter, folder.name, temperature, route), map, bar, wins)
        for stage, adapter in stages.items():
            for source in inputs:
                folder = out / f"{stage}-{source}"
                asked = [(key, student_prompt(row), row["path"]) if source == "image" else (key, teacher_prompt(row, "state"), None)
                         for row, key in keys]
                lines = answers(folder, adapter, "predictions.jsonl", asked, args.temperature,
                                lambda line: judge(by_id[line["id"]], line)["outcome"] == "success")
                seen = answers(folder, adapter, "perception.jsonl", looks, 0.0) if looks and source == "image" else []
                conclude(folder, rows, lines, seen, args)


if __name__ == "__main__":
    main(parse_args())
