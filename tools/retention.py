"""Retention: what the bundled backbone could do before training, asked again on held-out things.

    python -m tools.retention --adapter base out/tiny/coldstart out/tiny/distill

pictures: patterns of tiles and lines of its pretraining, to be described in words. symbols: single
questions about boards that are given in symbols. Both are drawn anew, the same every time; answers
are greedy and must match exactly. Prints a table and writes retention.json into --out.
Another backbone was pretrained on other things: --model must be the bundled one or made alike.
"""
import json
import random
from pathlib import Path

import numpy as np
from tqdm import tqdm

import common
import evaluate
import gen_data
from gen_data import Parser, fail, whole_number, write_text
from tiny import build


def parse_args(argv=None):
    parser = Parser(prog="-m tools.retention", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--adapter", nargs="+", metavar="RUN", default=["base"], help="runs, base for none")
    add("--name", help="name of the one run (default: its folder's)")
    add("--preset", choices=common.BACKBONES, help="backbone (default: the run's, else tiny)")
    add("--model", help="checkpoint folder (default: the run's, else the bundled one)")
    add("--bits", type=int, choices=(4, 16, 32), help="frozen weights (default: the run's)")
    add("--max_pixels", type=whole_number(1), help="a larger picture is shrunk (default: the "
        "run's)")
    add("--count", type=whole_number(1), default=280, help="pictures, and questions about symbols")
    add("--rollout_batch", type=whole_number(1), help="rows answered at a time")
    add("--max_new_tokens", type=whole_number(1), help="length limit of an answer, tokens")
    add("--out", default="out/tiny/retention", help="output folder")
    args = parser.parse_args(argv)
    runs = [run for run in args.adapter if run != "base"]
    return common.resolve(args, evaluate.SETTINGS, runs[0] if runs else None)


def ask_pictures(count):
    """[(prompt, picture, answer)] of patterns; pretraining drew its own from other seeds."""
    asked = []
    for i in range(count):
        image, prompt, answer = build.generic_picture(random.Random(f"retention:{i}"))
        asked.append((prompt, image, answer))
    return asked


def ask_symbols(count):
    """[(prompt, None, answer)]: a question each about boards of the test split, in symbols."""
    asked, rng = [], random.Random("retention")
    for k, (task, level) in enumerate(build.BOARDS):
        share = len(range(k, count, len(build.BOARDS)))
        for row in gen_data.sample_rows(task, level, "test", share, seed=11):
            names = (rng.choice(tuple(row.questions())),)
            asked.append((row.ask(names, row.symbols()), None, row.answers(names)))
    return asked


def score(model, processor, asked, args):
    """[exact match, 0 or 1] of greedy answers to [(prompt, picture or None, answer)]."""
    right = []
    for i in range(0, len(asked), args.rollout_batch):
        prompts, images, answers = zip(*asked[i:i + args.rollout_batch], strict=True)
        batch = common.encode(processor, prompts, images, model.device)
        ids, mask, _ = common.sample(model, processor, batch, args.max_new_tokens)      # [B, T]
        texts = common.decode(processor, ids, mask)
        right += [int(text == answer) for text, answer in zip(texts, answers, strict=True)]
    return right


def main(args):
    adapters = evaluate.find_adapters(args)
    network, processor = common.load(args.model, args.bits, args.max_pixels)
    if build.ASK_GRID not in processor.tokenizer.get_vocab():
        fail(f"--model {args.model} was not pretrained on tiny/build.py's pictures: wanted the "
             f"bundled backbone, --model {common.TINY}")
    asked = {"pictures": ask_pictures(args.count), "symbols": ask_symbols(args.count)}
    results, lines = {}, ["| | pictures | symbols |", "|---|---|---|"]
    for name, adapter in tqdm(adapters.items(), desc="retention", unit="run"):
        model = common.add_lora(network, path=adapter).eval() if adapter else network
        results[name], texts = {}, [name]
        for kind, questions in asked.items():
            right = score(model, processor, questions, args)
            numbers = evaluate.rate("exact", [np.array(right, float)])
            low, high = numbers["exact_ci"]
            results[name][kind] = {**numbers, "right": right}
            texts.append(f"{100 * numbers['exact']:.1f} [{100 * low:.1f}, {100 * high:.1f}]")
        lines.append(f"| {' | '.join(texts)} |")
        network = common.remove_lora(model) if adapter else model
    Path(args.out).mkdir(parents=True, exist_ok=True)
    write_text(Path(args.out, "retention.json"), json.dumps(results) + "\n")
    print("exact answers, % [95% interval]\n" + "\n".join(lines))


if __name__ == "__main__":
    common.run_script(parse_args, main)
