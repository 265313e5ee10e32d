"""Stage 1, cold start: LoRA fine-tuning on perception questions, so that the student sees.

    python coldstart.py                       # the bundled tiny backbone, on any computer
    python coldstart.py --preset 8b --steps 2000 --out out/8b/long
    python coldstart.py --target response --init out/tiny/coldstart --out out/tiny/sft

Each row of a step is a picture with either the "map" question, whose answer is word for word the
map of a planning response, or one to three of the task's other questions. The loss is on the answer
and its EOS only. Fine-tuning to compare distillation with: --target response learns the whole
reference response to the planning prompt, --target answer its <answer> alone. One update:
    1. rows and questions are drawn
    2. the cross-entropy of the answers' tokens, micro-batch by micro-batch, and its gradient
    3. one optimizer step on the adapters
Writes out/<preset>/coldstart/ with adapter/, metrics.jsonl and what a resume needs.

Left out on purpose: packing, several pictures per prompt, early stopping.
"""
import shlex

import numpy as np
import torch
from torch.nn.functional import cross_entropy

import common
import gen_data
from gen_data import Parser, fail, open_picture, real_number, whole_number

TARGETS = ("perception", "response", "answer")

# Defaults of the flags. Batches count rows, each with its questions.
QWEN = {
    "steps": 1000,
    "lr": 1e-4,
    "batch": 64,
    "micro_batch": 8,
    "rollout_batch": 32,
    "max_new_tokens": 512,  # the longest map, of a maze of size 6, has 115
}
SETTINGS = {
    "tiny": {
        "steps": 150,
        "lr": 2e-3,
        "batch": 64,
        "micro_batch": 32,
        "rollout_batch": 96,
        "max_new_tokens": 120,
    },
    "2b": QWEN,
    "4b": QWEN,
    "8b": {**QWEN, "micro_batch": 4},
}


def parse_args(argv=None):
    parser = Parser(description=__doc__.split("\n")[0])
    common.add_flags(parser)
    common.add_training_flags(parser)
    add = parser.add_argument
    add("--out", help="output folder (default: out/<preset>/coldstart)")
    add("--init", default="none", help="run to continue, or none for a fresh adapter")
    add("--target", default="perception", choices=TARGETS, help="what is learned")
    add("--map_share", type=real_number(0, 1), default=0.6,
        help="share of rows that ask for the whole map")
    add("--eval_every", type=whole_number(1), default=50, help="steps between validations")
    args = parser.parse_args(argv)
    common.resolve(args, SETTINGS, None if args.init == "none" else args.init)
    args.out = args.out or f"out/{args.preset}/coldstart"
    return args


def draw_examples(rows, count, rng, map_share, target="perception"):
    """`count` examples (row, question names), those of similar length together: less padding.

    The names are those of perception questions, or ("response",) or ("answer",).
    """
    examples = []
    for i in rng.integers(len(rows), size=count):
        names = list(rows[i].questions())
        others = [name for name in names if name != "map"]
        if target != "perception":
            examples.append((rows[i], (target,)))
        elif "map" in names and (not others or rng.random() < map_share):
            examples.append((rows[i], ("map",)))
        else:
            some = rng.choice(others, rng.integers(1, min(3, len(others)) + 1), replace=False)
            examples.append((rows[i], tuple(some.tolist())))
    return sorted(examples, key=lambda example: (
        example[1] != ("map",), example[0].task, example[0].level))


def prompt_and_target(row, names):
    """The texts of an example: what stands beside the picture, what is learned."""
    if names == ("response",):
        return row.student_prompt(), row.response()
    if names == ("answer",):
        return row.student_prompt(), row.response().splitlines()[-1]
    return row.ask(names), row.answers(names)


def encode(processor, examples, device):
    """Examples -> the prompt batch and the target tokens (ids, mask) [B, T]."""
    texts = [prompt_and_target(row, names) for row, names in examples]
    pictures = [open_picture(row.path) for row, _ in examples]
    prompts = common.encode(processor, [prompt for prompt, _ in texts], pictures, device)
    return prompts, *common.encode_responses(processor, [target for _, target in texts], device)


def answer_loss(model, prompt, ids, mask):
    """Summed cross-entropy of the target tokens, the EOS included, prompt and padding not."""
    hidden = common.response_hidden(model, prompt, ids, mask)                      # [N, hidden]
    logits = common.network(model).lm_head(hidden).float()                         # [N, vocabulary]
    return cross_entropy(logits, ids[mask.bool()], reduction="sum")


@torch.no_grad()
def validate(model, processor, examples, args):
    """On held-out examples: loss per token, shares of right greedy answers, by kind of question."""
    def judge(i, text, cut):
        row, names = examples[i]
        if args.target != "perception":
            return gen_data.measures(row.judge(text, cut=cut))
        kind = "map" if names == ("map",) else "questions"
        return {kind: all(row.score(names, text).values())}

    model.eval()
    prompts, targets, masks = encode(processor, examples, model.device)
    loss = 0.0
    for ids, mask, prompt in common.micro_batches(args.micro_batch, (targets, masks), (prompts,)):
        loss += answer_loss(model, prompt, ids, mask).item()
    losses, tokens = zip(*common.gather((loss, int(masks.sum()))), strict=True)
    means = common.validate(model, processor, prompts, args, judge)[2]
    return {"val_loss": sum(losses) / sum(tokens), **means}


def main(args):
    share = common.join_processes(args.batch)  # of the rows of a step: those of this process
    args.data = common.once(gen_data.ensure, args.data, args.preset, args.seed)
    train, val = gen_data.load_rows(args.data, "train"), []
    if gen_data.has_split(args.data, "val"):
        val = gen_data.load_rows(args.data, "val")
    else:
        common.warn(f"{args.data} has no split val: nothing is validated")
    for row in train + val:
        if args.target == "perception" and not row.questions():
            fail(f'{row.where}: neither "questions" nor "symbols" to ask for; distill.py --init '
                 "none begins without a cold start")
    gen_data.check_pictures(train + val)
    held_out = []
    if val:
        rng = np.random.default_rng(args.seed)
        held_out = draw_examples(val, 96, rng, 0.5, args.target)[share]

    with common.Run(args, train=train, val=val) as run:
        model, processor = run.load()
        common.check_lengths(model, processor, {
            row.where: f"{row.ask()}\n{row.answers()}" for row in train + val})
        weights = common.adapter_weights(model)
        optimizer = common.adamw(weights, args.lr)
        run.restore(model, optimizer=optimizer)

        for step in run.steps():
            # 1. Rows and questions are drawn.
            rng = np.random.default_rng([args.seed, step])  # nothing random is ever stored
            examples = draw_examples(train, args.batch, rng, args.map_share, args.target)[share]
            prompts, targets, masks = encode(processor, examples, model.device)    # [B, P], [B, T]
            run.clock("encode")

            # 2. The cross-entropy of the answers' tokens, and its gradient.
            model.train()
            loss = 0.0
            for ids, mask, prompt in common.micro_batches(
                    args.micro_batch, (targets, masks), (prompts,)):
                micro_loss = answer_loss(model, prompt, ids, mask)
                micro_loss.backward()
                loss += micro_loss.item()
            run.clock("loss")

            # 3. One optimizer step on the adapters.
            loss, _ = common.average_gradients(weights, loss, int(masks.sum()))
            grad_norm = float(torch.nn.utils.clip_grad_norm_(weights, args.max_grad_norm))
            if step == 0 and grad_norm == 0:
                fail("the first gradient is zero: nothing connects the loss to the adapters")
            lr = common.schedule(optimizer, step, args.steps)
            if run.is_finite(loss, grad_norm, [
                    {"id": row.id, "questions": names} for row, names in examples]):
                optimizer.step()
            optimizer.zero_grad()
            run.clock("optimizer")

            metrics = {"loss": loss, "lr": lr, "grad_norm": grad_norm}
            if val and ((step + 1) % args.eval_every == 0 or step + 1 == args.steps):
                metrics |= validate(model, processor, held_out, args)
                run.clock("validate")
            run.log(**metrics)
    print(f"{args.out}/adapter is trained; next: " + shlex.join(
        ["python", "distill.py", "--init", args.out, "--data", args.data]))


if __name__ == "__main__":
    common.run_script(parse_args, main)
