"""Stage 1, cold start: LoRA fine-tuning on perception questions, so that the student sees.

    python coldstart.py                     # tiny backbone on the CPU, or Qwen3-VL-4B in 4 bits with CUDA
    python coldstart.py --preset 8b --steps 2000 --out out/coldstart-8b

Each row of a step is a picture with either the "map" question, whose answer is word for word the state
part of a planning response, or one to three of the task's other questions. The loss is on the answer and
its end token only. Writes out/coldstart/{adapter, args.json, metrics.jsonl, coldstart.py}.

Left out on purpose: packing, several pictures per prompt, early stopping.
"""
import argparse
import time

import numpy as np
import torch
from torch.nn.functional import cross_entropy

import common
import gen_data
from gen_data import open_picture, perception_prompt, perception_target, questions, score_perception


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    common.add_flags(parser, "coldstart")
    add = parser.add_argument
    add("--out", default="out/coldstart", help="output folder")
    add("--max_new_tokens", type=int, help="length limit of an answer when looking at held-out pictures, tokens")
    add("--map_share", type=float, default=0.6, help="share of rows that ask for the whole map")
    add("--eval_every", type=int, default=50, help="steps between looks at held-out pictures")
    return common.resolve(parser.parse_args(argv), "coldstart")


def draw_questions(rows, count, rng, map_share):
    """`count` (row, question names) pairs."""
    pairs = []
    for i in rng.integers(len(rows), size=count):
        names = questions(rows[i]["task"])
        if rng.random() < map_share:
            pairs.append((rows[i], names[:1]))
        else:
            pairs.append((rows[i], tuple(rng.choice(names[1:], rng.integers(1, 4), replace=False))))
    return pairs


def encode(processor, pairs, device):
    """(row, names) pairs -> the prompt batch and the target tokens (ids, mask) [B, T]."""
    prompt = common.encode(processor, [perception_prompt(row, names) for row, names in pairs],
                           [open_picture(row["path"]) for row, _ in pairs], device)
    return prompt, *common.encode_responses(processor, [perception_target(row, names) for row, names in pairs], device)


def answer_loss(model, prompt, ids, mask):
    """Summed cross-entropy of the target tokens, the end token included, prompt and padding not."""
    hidden = common.response_hidden(model, prompt, ids, mask)                      # [N, hidden]
    logits = common.network(model).lm_head(hidden).float()                        # [N, vocabulary]
    return cross_entropy(logits, ids[mask.bool()], reduction="sum")


@torch.no_grad()
def look(model, processor, pairs, micro_batch, max_new_tokens, device):
    """Loss per token and exact match of greedy answers on held-out pictures: (loss, match of maps, of the rest)."""
    loss, tokens, right = 0.0, 0, {True: [], False: []}
    model.eval()
    for i in range(0, len(pairs), micro_batch):
        part = pairs[i:i + micro_batch]
        prompt, ids, mask = encode(processor, part, device)
        loss += answer_loss(model, prompt, ids, mask).item()
        tokens += int(mask.sum())
        for (row, names), text in zip(part, common.decode(processor, *common.sample(
                model, processor, prompt, max_new_tokens, temperature=0))):
            right[names == ("map",)].append(all(score_perception(row, names, text).values()))
    return loss / tokens, float(np.mean(right[True])), float(np.mean(right[False]))


def main(args):
    gen_data.ensure(args.data, args.preset, args.seed)
    train, val = gen_data.load_rows(args.data, "train"), gen_data.load_rows(args.data, "val")
    run = common.Run(args, __file__, [f"{args.data}/train/metadata.jsonl"])
    torch.manual_seed(args.seed)
    model, processor = common.load(args.model, args.bits)
    model = common.add_lora(model, args.lora_rank, args.lora_vision, run.adapter)
    device = model.device
    model.print_trainable_parameters()
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = common.adamw(weights, args.lr)
    held_out = draw_questions(val, 96, np.random.default_rng(args.seed), 0.5)

    with run:
        for step in run.steps(model, optimizer):
            begin = time.time()
            lr = common.learning_rate(step, args.steps, args.lr)
            pairs = draw_questions(train, args.batch, np.random.default_rng([args.seed, step]), args.map_share)
            pairs.sort(key=lambda pair: (pair[1] != ("map",), pair[0]["task"], pair[0]["level"]))  # similar lengths: less padding
            batches = [encode(processor, pairs[i:i + args.micro_batch], device) for i in range(0, args.batch, args.micro_batch)]
            tokens = sum(int(mask.sum()) for _, _, mask in batches)  # one denominator, whatever the micro-batches
            model.train()
            loss = 0.0
            for prompt, ids, mask in batches:
                part = answer_loss(model, prompt, ids, mask) / tokens
                part.backward()
                loss += part.item()
            norm = run.update(loss, weights, lr, ({"id": row["id"], "questions": names} for row, names in pairs))
            values = dict(step=step + 1, loss=loss, lr=lr, grad_norm=norm, seconds=time.time() - begin, peak_gb=common.peak_gb())
            if (step + 1) % args.eval_every == 0 or step + 1 == args.steps:
                values |= dict(zip(("val_loss", "val_map", "val_questions"),
                                   look(model, processor, held_out, args.micro_batch, args.max_new_tokens, device)))
            run.log(**values)
    print(f"wrote {args.out}/adapter; next: python distill.py")


if __name__ == "__main__":
    main(parse_args())
