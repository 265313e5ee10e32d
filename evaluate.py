"""Evaluation: greedy plans from pictures and from symbols, executed by the rules.

    python evaluate.py                      # base, out/coldstart, out/distill: whatever is there
    python evaluate.py --limit 20           # a quick look: 20 rows per task and level
    python evaluate.py --perception         # also: is every question about the picture answered exactly?

Every row counts: an answer that cannot be read is a failure. Prints one Markdown table and writes
out/eval/results.json and out/eval/<condition>-<input>.jsonl (every response with its verdict).
The gap is success from symbols minus success from pictures.
"""
import argparse
import json
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

import common
import gen_data
from gen_data import TASKS, check, parse, perception_prompt, perception_target, questions, student_prompt, teacher_prompt

INPUTS = ("image", "text")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    common.add_flags(parser)
    add = parser.add_argument
    add("--out", default="out/eval", help="output folder")
    add("--coldstart", default="out/coldstart", help="the cold-start run")
    add("--distill", default="out/distill", help="the distillation run")
    add("--limit", type=int, help="rows per task and level (default: all)")
    add("--micro_batch", type=int, default=100, help="rows answered at a time")
    add("--max_new_tokens", type=int, help="length limit of an answer, tokens")
    add("--perception", action="store_true", help="also ask every perception question about every picture")
    return common.resolve(parser.parse_args(argv))


def answer(model, processor, prompts, pictures, micro_batch, max_new_tokens, bar):
    """Greedy responses to prompts, each beside its picture (a file, or None for symbols only)."""
    texts = []
    for i in range(0, len(prompts), micro_batch):
        images = [path and Image.open(path) for path in pictures[i:i + micro_batch]]
        prompt = common.encode(processor, prompts[i:i + micro_batch], images, model.device)
        texts += common.decode(processor, *common.sample(model, processor, prompt, max_new_tokens, temperature=0))
        bar.update(len(images))
    return texts


def judge(row, text):
    """Execute one response: the plan, the outcome, whether it is optimal, whether its state part is right."""
    plan = parse(text)
    outcome = check(row["task"], row["state"], plan)
    return {"id": row["id"], "task": row["task"], "level": row["level"], "response": text, "plan": plan,
            "outcome": outcome, "optimal": outcome == "success" and len(plan) == len(row["plan"]),
            "state_right": text.split("\nRoute")[0] == TASKS[row["task"]].describe(row["state"])}


def rates(verdicts):
    """Shares over all `verdicts`, each in 0..1."""
    return {"n": len(verdicts), "success": float(np.mean([v["outcome"] == "success" for v in verdicts])),
            "optimal": float(np.mean([v["optimal"] for v in verdicts])),
            "parsed": float(np.mean([v["plan"] is not None for v in verdicts])),
            "state": float(np.mean([v["state_right"] for v in verdicts]))}


def summarise(condition, source, verdicts):
    """Result rows: per task and level, per task (level None), and the macro average over tasks."""
    rows, key = [], {"condition": condition, "input": source}
    for task in dict.fromkeys(v["task"] for v in verdicts):
        of_task = [v for v in verdicts if v["task"] == task]
        for level in sorted({v["level"] for v in of_task}):
            rows.append({**key, "task": task, "level": level, **rates([v for v in of_task if v["level"] == level])})
        rows.append({**key, "task": task, "level": None, **rates(of_task)})
    whole = [row for row in rows if row["level"] is None]
    mean = {name: float(np.mean([row[name] for row in whole])) for name in ("success", "optimal", "parsed", "state")}
    return rows + [{**key, "task": "macro", "level": None, "n": len(verdicts), **mean}]


def paired_interval(a, b, seed=0):
    """95% bootstrap interval of the mean success difference a - b over the same rows, in points."""
    from scipy.stats import bootstrap
    wins = [np.array([v["outcome"] == "success" for v in x], float) for x in (a, b)]
    if (wins[0] == wins[1]).all():
        return 0.0, 0.0
    interval = bootstrap((wins[0] - wins[1],), np.mean, n_resamples=9999, method="percentile", rng=seed).confidence_interval
    return 100 * interval.low, 100 * interval.high


def table(results):
    """A Markdown table: one line per task and level, success (optimal) per condition and input."""
    columns = list(dict.fromkeys((r["condition"], r["input"]) for r in results))
    cells = {(r["task"], r["level"], r["condition"], r["input"]): r for r in results}
    lines = ["| task | level | n | " + " | ".join(f"{c}, {s}" for c, s in columns) + " |",
             "|---" * (3 + len(columns)) + "|"]
    for task, level in dict.fromkeys((r["task"], r["level"]) for r in results):
        row = [cells[(task, level, *column)] for column in columns]
        shown = [f"{100 * r['success']:.0f} ({100 * r['optimal']:.0f})" for r in row]
        lines.append(f"| {task} | {level or 'all'} | {row[0]['n']} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def main(args):
    gen_data.ensure(args.data, args.preset, args.seed)
    rows = gen_data.load_rows(args.data, "test")
    levels = {}
    for row in rows:
        levels.setdefault((row["task"], row["level"]), []).append(row)
    rows = [row for group in levels.values() for row in group[:args.limit]]
    adapters = {"base": None, "coldstart": args.coldstart, "distill": args.distill}
    adapters = {name: run and f"{run}/adapter" for name, run in adapters.items() if not run or Path(run, "adapter").exists()}
    print(f"{len(rows)} rows; conditions: {', '.join(adapters)}")
    model, processor = common.load(args.model, args.bits)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    results, verdicts, seen = [], {}, {}
    count = len(rows) * len(INPUTS) + args.perception * sum(len(questions(row["task"])) for row in rows)
    with tqdm(total=count * len(adapters), desc="answers", unit="row") as bar:
        for condition, adapter in adapters.items():
            network = common.add_lora(model, path=adapter) if adapter else model
            network.eval()
            for source in INPUTS:
                prompts = [student_prompt(row) if source == "image" else teacher_prompt(row, "state") for row in rows]
                pictures = [row["path"] if source == "image" else None for row in rows]
                texts = answer(network, processor, prompts, pictures, args.micro_batch, args.max_new_tokens, bar)
                verdicts[condition, source] = [judge(row, text) for row, text in zip(rows, texts)]
                results += summarise(condition, source, verdicts[condition, source])
                with open(out / f"{condition}-{source}.jsonl", "w") as file:
                    file.writelines(json.dumps(v) + "\n" for v in verdicts[condition, source])
            if args.perception:
                asked = [(row, (name,)) for row in rows for name in questions(row["task"])]
                texts = answer(network, processor, [perception_prompt(*pair) for pair in asked], [row["path"] for row, _ in asked],
                               args.micro_batch, args.max_new_tokens, bar)
                for (row, (name,)), text in zip(asked, texts):
                    seen.setdefault((condition, row["task"], name), []).append(text == perception_target(row, (name,)))
            if adapter:
                model = network.unload()
    perception = [{"condition": c, "task": task, "question": name, "n": len(right), "exact": float(np.mean(right))}
                  for (c, task, name), right in seen.items()]
    report = {"rows": results, "perception": perception, "args": vars(args), "versions": common.versions()}
    (out / "results.json").write_text(json.dumps(report, indent=1))

    print("\nSuccess in %, in brackets with the shortest plan; greedy answers, every row counts.\n")
    print(table(results) + "\n")
    macro = {(r["condition"], r["input"]): r for r in results if r["task"] == "macro"}
    gap = macro["base", "text"]["success"] - macro["base", "image"]["success"]
    for condition in adapters:
        faults = Counter(v["outcome"] for v in verdicts[condition, "image"] if v["outcome"] != "success")
        print(f"{condition}, pictures: state right {100 * macro[condition, 'image']['state']:.0f}%, "
              f"faults {dict(faults.most_common()) or 'none'}")
    for condition in adapters:
        if condition != "base" and gap > 0:
            gained = macro[condition, "image"]["success"] - macro["base", "image"]["success"]
            print(f"{condition} closes {round(100 * gained / gap)}% of the base model's gap of {100 * gap:.0f} points")
    if {"coldstart", "distill"} <= adapters.keys():
        for task in dict.fromkeys(row["task"] for row in rows):
            a, b = ([v for v in verdicts[c, "image"] if v["task"] == task] for c in ("distill", "coldstart"))
            print("distill minus coldstart, %s, pictures: %+.0f points, 95%% interval %+.1f to %+.1f" % (
                task, 100 * (rates(a)["success"] - rates(b)["success"]), *paired_interval(a, b)))
    if perception:
        print("\nPerception questions answered exactly, in %\n\n| task | question | " + " | ".join(adapters) + " |")
        print("|---" * (2 + len(adapters)) + "|")
        exact = {(p["condition"], p["task"], p["question"]): 100 * p["exact"] for p in perception}
        for task, name in dict.fromkeys((p["task"], p["question"]) for p in perception):
            print(f"| {task} | {name} | " + " | ".join(f"{exact[c, task, name]:.0f}" for c in adapters) + " |")
    print(f"\nwrote {out}/results.json")


if __name__ == "__main__":
    main(parse_args())
