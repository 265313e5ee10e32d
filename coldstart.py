"""Stage 1, cold start: LoRA fine-tuning on perception questions, so that the student sees.

    python coldstart.py                     # tiny backbone on the CPU; with CUDA, Qwen3-VL-4B
    python coldstart.py --preset 8b --steps 2000 --out out/coldstart-8b
    python coldstart.py --target response --init out/coldstart --out out/sft   # SFT, to compare

Each row of a step is a picture with either the "map" question, whose answer is word for word the
state part of a planning response, or one to three of the task's other questions. The loss is on the
answer and its end token only. Fine-tuning to compare distillation with: --target response learns
the whole reference response to the planning prompt, --target answer its <answer> alone. One update:
    1. rows and questions are drawn
    2. the cross-entropy of the answers' tokens, micro-batch by micro-batch, and its gradient
    3. one optimizer step on the adapters
Writes out/coldstart/{adapter, metrics.jsonl, args.json, trained_rows.json, coldstart.py}

Left out on purpose: packing, several pictures per prompt, early stopping.
"""
import argparse
import math

import numpy as np
import torch
from torch.nn.functional import cross_entropy

import common
import gen_data
from gen_data import key_of, open_picture, perception_prompt, perception_target, questions
from tools import run_files

TARGETS = ("perception", "response", "answer")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    common.add_flags(parser, "coldstart")
    add = parser.add_argument
    add("--out", default="out/coldstart", help="output folder")
    add("--init", default="none", help="run to continue, or none for a fresh adapter")
    add("--target", default="perception", choices=TARGETS, help="what is learned")
    add("--max_new_tokens", type=int, help="length limit of answers on held-out pictures, tokens")
    add("--map_share", type=float, default=0.6, help="share of rows that ask for the whole map")
    add("--eval_every", type=int, default=50, help="steps between looks at held-out pictures")
    return common.resolve(parser.parse_args(argv), "coldstart")


def draw_questions(rows, count, rng, map_share, target="perception"):
    """`count` (row, question names) pairs, those of similar length together: less padding.

    The names are those of perception questions, or ("response",) or ("answer",).
    """
    pairs = []
    for i in rng.integers(len(rows), size=count):
        names = questions(rows[i])
        others = [name for name in names if name != "map"]
        if target != "perception":
            pairs.append((rows[i], (target,)))
        elif "map" in names and (not others or rng.random() < map_share):
            pairs.append((rows[i], ("map",)))
        else:
            some = rng.choice(others, rng.integers(1, min(3, len(others)) + 1), replace=False)
            pairs.append((rows[i], tuple(some.tolist())))
    return sorted(pairs, key=lambda pair: (
        pair[1] != ("map",), pair[0]["task"], pair[0]["level"]))


def prompt_and_target(row, names):
    """The texts of a (row, names) pair: what stands beside the picture, what is learned."""
    if names == ("response",):
        return gen_data.student_prompt(row), gen_data.response(row)
    if names == ("answer",):
        return gen_data.student_prompt(row), gen_data.response(row).splitlines()[-1]
    return perception_prompt(row, names), perception_target(row, names)


def encode(processor, pairs, device):
    """(row, names) pairs -> the prompt batch and the target tokens (ids, mask) [B, T]."""
    prompts, targets = zip(*[prompt_and_target(*pair) for pair in pairs], strict=True)
    pictures = [open_picture(row["path"]) for row, _ in pairs]
    prompt = common.encode(processor, prompts, pictures, device)
    return prompt, *common.encode_responses(processor, targets, device)


def answer_loss(model, prompt, ids, mask):
    """Summed cross-entropy of the target tokens, the end token included, prompt and padding not."""
    hidden = common.response_hidden(model, prompt, ids, mask)                      # [N, hidden]
    logits = common.network(model).lm_head(hidden).float()                         # [N, vocabulary]
    return cross_entropy(logits, ids[mask.bool()], reduction="sum")


@torch.no_grad()
def look(model, processor, pairs, args):
    """On held-out pairs: loss per token, shares of right greedy answers: maps, questions, plans."""
    loss, verdicts = 0.0, []
    model.eval()
    prompts, targets, masks = encode(processor, pairs, model.device)
    for ids, mask, prompt in common.micro_batches(args.micro_batch, targets, masks, prompts):
        loss += answer_loss(model, prompt, ids, mask).item()
    answers = common.decode(processor, *common.sample(
        model, processor, prompts, args.max_new_tokens, rollout_batch=args.rollout_batch))
    for (row, names), text in zip(pairs, answers, strict=True):
        if args.target == "perception":
            right = all(gen_data.score_perception(row, names, text).values())
            verdicts.append(("map" if names == ("map",) else "questions", right))
        else:
            verdicts.append(("success", gen_data.judge(row, text)["outcome"] == "success"))
    losses, tokens, shares = zip(*common.gather((loss, int(masks.sum()), verdicts)), strict=True)
    verdicts, metrics = sum(shares, []), {"val_loss": sum(losses) / sum(tokens)}
    for name in sorted(dict(verdicts)):
        metrics[f"val_{name}"] = float(np.mean([right for kind, right in verdicts if kind == name]))
    return metrics


def main(args):
    rank, processes = common.join_processes(args.batch)
    if rank == 0:
        gen_data.ensure(args.data, args.preset, args.seed)
    common.gather(None)  # the others wait for the data
    train, val = gen_data.load_rows(args.data, "train"), gen_data.load_rows(args.data, "val")
    inputs, trained_on = [f"{args.data}/train/metadata.jsonl"], {key_of(row) for row in train}
    init = None if args.init == "none" else f"{args.init}/adapter"
    if init:
        inputs.append(f"{init}/adapter_model.safetensors")
        trained_on |= run_files.read_trained_rows(args.init)
    run = common.Run(args, __file__, inputs, trained_on)
    torch.manual_seed(args.seed)
    model, processor = common.load(args.model, args.bits)
    common.check_lengths(model, processor, {
        row["where"]: f"{perception_prompt(row)}\n{perception_target(row)}" for row in train + val})
    model = common.add_lora(model, args.lora_rank, args.lora_vision, run.adapter or init)
    model.print_trainable_parameters()
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = common.adamw(weights, args.lr)
    share = slice(rank, None, processes)  # of the rows of a step: those of this process
    held_out = draw_questions(val, 96, np.random.default_rng(args.seed), 0.5, args.target)

    try:
        for step in run.steps(optimizer):
            timer = common.Timer()

            # 1. Rows and questions are drawn.
            rng = np.random.default_rng([args.seed, step])  # depends on nothing before this step
            pairs = draw_questions(train, args.batch, rng, args.map_share, args.target)
            prompts, targets, masks = encode(                     # [P], [T] of this process's rows
                processor, pairs[share], model.device)
            tokens = sum(common.gather(int(masks.sum())))  # one denominator for the whole step
            timer("encode")

            # 2. The cross-entropy of the answers' tokens, and its gradient.
            model.train()
            loss = 0.0
            for ids, mask, prompt in common.micro_batches(
                    args.micro_batch, targets, masks, prompts):
                micro_loss = answer_loss(model, prompt, ids, mask) / tokens
                micro_loss.backward()
                loss += micro_loss.item()
            timer("loss")

            # 3. One optimizer step on the adapters.
            loss = common.sum_gradients(weights, loss)
            grad_norm = float(torch.nn.utils.clip_grad_norm_(weights, args.max_grad_norm))
            if step == 0 and grad_norm == 0:
                common.fail("the first gradient is zero: nothing connects the loss to the adapters")
            lr = common.learning_rate(step, args.steps, args.lr)
            if math.isfinite(loss) and math.isfinite(grad_norm):
                run.updating = True
                optimizer.param_groups[0]["lr"] = lr
                optimizer.step()
            else:
                run.skip(loss, grad_norm, [
                    {"id": row["id"], "questions": names} for row, names in pairs])
            optimizer.zero_grad()
            timer("optimizer")

            metrics = {"loss": loss, "lr": lr, "grad_norm": grad_norm}
            if (step + 1) % args.eval_every == 0 or step + 1 == args.steps:
                metrics |= look(model, processor, held_out[share], args)
                timer("look")
            run.log(timer, **metrics)
            if run.should_save():
                run.save(model, optimizer)
            if run.stopping and run.step < args.steps:
                raise SystemExit(run.stopped())
        run.finish()
    except torch.OutOfMemoryError as error:
        run.out_of_memory(error, model, optimizer)
    finally:
        run.close()
    print(f"wrote {args.out}/adapter; next: python distill.py")


if __name__ == "__main__":
    main(parse_args())
