"""Retention: what the bundled backbone could do before training, asked again on held-out things.

    python -m tools.retention --adapter base out/coldstart out/distill --out out/retention

pictures: patterns of tiles and lines of its pretraining, to be described in words. symbols: single
questions about boards that are given in symbols. Both are drawn anew, the same every time; answers
are greedy and must match exactly. Prints a table and writes retention.json into --out.
Another backbone was pretrained on other things: --model must be the bundled one or made alike.
"""
import argparse
import json
import random
from pathlib import Path

from scipy.stats import binomtest
from tqdm import tqdm

import common
import gen_data
from evaluate import RUNS, Answerer, find_adapters
from tiny import build
from tools import run_files


def parse_args(argv=None):
    parser = argparse.ArgumentParser(prog="python -m tools.retention",
                                     description=__doc__.split("\n")[0])
    common.add_flags(parser)
    add = parser.add_argument
    add("--adapter", nargs="+", metavar="RUN", help=f"runs, base for none (default: base "
        f"{' '.join(RUNS)}, where they are)")
    add("--name", help="name of the one run (default: its folder's)")
    add("--count", type=int, default=280, help="pictures, and questions about symbols")
    add("--rollout_batch", type=int, help="rows answered at a time (default: the preset's)")
    add("--max_new_tokens", type=int, help="length limit of an answer, tokens")
    add("--out", default="out/retention", help="output folder")
    args = common.resolve(parser.parse_args(argv))
    if args.count < 1:
        common.fail(f"--count {args.count}: wanted at least 1")
    return args


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
            names = (rng.choice(gen_data.questions(row)),)
            prompt = gen_data.perception_prompt(row, names, gen_data.symbols(row))
            asked.append((prompt, None, gen_data.perception_target(row, names)))
    return asked


def score(answerer, adapter, asked, args):
    """[exact match, 0 or 1] of greedy answers to [(prompt, picture or None, answer)]."""
    answerer.use(adapter)
    right = []
    for i in range(0, len(asked), args.rollout_batch):
        prompts, images, answers = zip(*asked[i:i + args.rollout_batch], strict=True)
        batch = common.encode(answerer.processor, prompts, images, answerer.model.device)
        ids, mask = common.sample(answerer.model, answerer.processor, batch, args.max_new_tokens)
        texts = common.decode(answerer.processor, ids, mask)
        right += [int(text == answer) for text, answer in zip(texts, answers, strict=True)]
    return right


def main(args):
    answerer = Answerer(args)
    adapters = find_adapters(args)
    answerer.use(None)
    if build.ASK_GRID not in answerer.processor.tokenizer.get_vocab():
        common.fail(f"--model {args.model} was not pretrained on tiny/build.py's pictures: wanted "
                    f"the bundled backbone, --model {common.TINY}")
    asked = {"pictures": ask_pictures(args.count), "symbols": ask_symbols(args.count)}
    results, lines = {}, ["| | pictures | symbols |", "|---|---|---|"]
    for name, adapter in tqdm(adapters.items(), desc="retention", unit="run"):
        results[name], texts = {}, [name]
        for kind, questions in asked.items():
            right = score(answerer, adapter, questions, args)
            ci = binomtest(sum(right), len(right)).proportion_ci(method="wilson")
            results[name][kind] = {"exact": sum(right) / len(right), "exact_ci": list(ci),
                                   "n": len(right), "right": right}
            texts.append(f"{100 * sum(right) / len(right):.1f} "
                         f"[{100 * ci.low:.1f}, {100 * ci.high:.1f}]")
        lines.append(f"| {' | '.join(texts)} |")
    Path(args.out).mkdir(parents=True, exist_ok=True)
    run_files.write_aside(Path(args.out, "retention.json"), json.dumps(results))
    print("exact answers, % [95% interval]\n" + "\n".join(lines))


if __name__ == "__main__":
    main(parse_args())
