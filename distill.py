"""Stage 2, on-policy distillation: what the network can do from symbols, it learns to do from the picture.

    python distill.py                                # continues out/coldstart
    python distill.py --init none                    # without a cold start
    python distill.py --teacher_context state        # the teacher plans by itself, no reference plan
    python distill.py --divergence sampled           # the paper's released loss

One network is both roles. The student reads the picture, adapters on; the teacher is the same network
with its adapters off and reads the symbols. One update:
    1. the student samples responses from pictures
    2. the teacher scores the same tokens from the symbols, without gradient
    3. the student scores them again, with gradient
    4. the divergence, KL(student || teacher) by default, slice by slice, and its gradient
    5. one optimizer step on the adapters
Nothing else is learned from: success and optimality of the rollouts are logged, never rewarded.
Writes out/distill/{adapter, args.json, metrics.jsonl, rollouts.jsonl, distill.py}.

Left out on purpose: rewards, a value function, replay, several rollouts per prompt.
"""
import argparse
import math
from contextlib import nullcontext
from functools import partial

import numpy as np
import torch
from tqdm import tqdm

import common

import gen_data
from gen_data import PARTS, check, open_picture, parse, part_of, student_prompt, teacher_prompt


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    common.add_flags(parser, "distill")
    add = parser.add_argument
    add("--out", default="out/distill", help="output folder")
    add("--init", default="out/coldstart", help="run to continue, or none for a fresh adapter")
    add("--divergence", default="reverse_kl", choices=DIVERGENCES, help="the loss; the reverse KL is always logged")
    add("--beta", type=float, default=0.5, help="jsd: the teacher's share of the mixture, 0 (forward KL) to 1 (reverse KL)")
    add("--teacher_context", default="state+plan", choices=("state+plan", "state", "none"),
        help="what the teacher reads; none: the student's prompt and picture")
    add("--teacher_weights", default="base", choices=("base", "live"), help="live: the teacher has the adapters on too")
    add("--on_policy", type=float, default=1.0, help="share of steps whose responses the student samples, else the teacher")
    add("--tasks", nargs="+", help="train on these only: task, task:level or task:low-high (default: all rows)")
    add("--max_new_tokens", type=int, help="length limit of a rollout, tokens"); add("--rollout_batch", type=int, default=32)
    add("--slice", type=int, default=128, help="response positions whose logits exist at a time")
    add("--show_every", type=int, default=25, help="steps between sampled responses on the console and in rollouts.jsonl")
    args = parser.parse_args(argv)
    for name in ("beta", "on_policy"):
        if not 0 <= getattr(args, name) <= 1:
            gen_data.fail(f"--{name} {getattr(args, name)}: wanted 0 to 1")
    for name in ("slice", "show_every"):
        if getattr(args, name) < 1:
            gen_data.fail(f"--{name} {getattr(args, name)}: wanted at least 1")
    return common.resolve(args, "distill")


# ---------------------------------------------------------------- divergences
# log_p, log_q: [positions, vocabulary], log-probabilities of student and teacher; token: [positions], the sampled ids.
# Each returns its value in nats [positions] and its gradient with respect to the student's logits, in closed form
# [positions, vocabulary]. In-place operations touch only tensors that the same expression made.

def kl(log_a, log_b):
    """KL(a || b) per position. Without sum(b) - sum(a), zero but for rounding, it could fall below 0 by some 1e-6."""
    a = log_a.exp()
    return torch.linalg.vecdot(a, log_a - log_b) + (log_b.exp().sum(-1) - a.sum(-1))


def reverse_kl(log_p, log_q, token=None):
    """KL(student || teacher): the student drops what the teacher would not say."""
    p, ratio = log_p.exp(), log_p - log_q
    value = torch.linalg.vecdot(p, ratio) + (log_q.exp().sum(-1) - p.sum(-1))      # as in `kl`, its passes shared
    return value, ratio.sub_(value[:, None]).mul_(p)                               # p (log p - log q - KL)


def forward_kl(log_p, log_q, token=None):
    """KL(teacher || student): the student covers everything the teacher would say."""
    return kl(log_q, log_p), log_p.exp().sub_(log_q.exp())                        # p - q


def jsd(log_p, log_q, token=None, beta=0.5):
    """beta KL(teacher || m) + (1 - beta) KL(student || m), with the mixture m = beta q + (1 - beta) p.

    As in GKD (arXiv 2306.13649). jsd / beta becomes the forward KL for beta -> 0 and jsd / (1 - beta) the reverse KL
    for beta -> 1; at 0 and 1 themselves, where jsd would vanish, these two stand in for it.
    """
    if beta in (0, 1):
        return (reverse_kl if beta else forward_kl)(log_p, log_q)
    log_m = torch.logaddexp(log_q + math.log(beta), log_p + math.log(1 - beta))   # finite where p and q underflow
    value, gradient = reverse_kl(log_p, log_m)             # of m's own dependence on p nothing is left in the gradient
    return beta * kl(log_q, log_m) + (1 - beta) * value, gradient.mul_(1 - beta)


def sampled(log_p, log_q, token):
    """Policy gradient with the advantage log q - log p at the sampled token, no gradient through it: the released form.

    The value is the one-sample estimate of the reverse KL, -advantage. The expected gradient is that of reverse_kl.
    """
    value = (log_p - log_q).gather(1, token[:, None])                          # [positions, 1]
    gradient = log_p.exp().mul_(-value)                                        # -advantage * d log p(token) / d logits
    return value[:, 0], gradient.scatter_add_(1, token[:, None], value)


DIVERGENCES = {f.__name__: f for f in (reverse_kl, forward_kl, jsd, sampled)}


@torch.no_grad()
def sliced_divergence(hidden, teacher_hidden, token, lm_head, divergence, width):
    """(d sum(divergence) / d hidden [N, hidden size], divergence [N], reverse KL [N]), the last two in nats.

    hidden, teacher_hidden: [N, hidden size], from `common.response_hidden`; token: [N]. [N, vocabulary] never exists:
    the logits of `width` positions at a time, in float32, and what they leave is their gradient at the hidden states.
    """
    gradient, values, kls = torch.empty_like(hidden), [], []
    for i in range(0, len(hidden), width):
        log_q = lm_head(teacher_hidden[i:i + width]).float().log_softmax(-1)       # [width, vocabulary]
        log_p = lm_head(hidden[i:i + width]).float().log_softmax(-1)
        value, at_logits = divergence(log_p, log_q, token[i:i + width])            # [width], [width, vocabulary]
        values.append(value)
        kls.append(value if divergence is reverse_kl else kl(log_p, log_q))        # always logged: so that runs compare
        gradient[i:i + width] = at_logits.to(hidden.dtype) @ lm_head.weight        # [width, hidden size]
        del log_q, log_p, at_logits                                                # before the next slice makes its own
    return gradient, torch.cat(values), torch.cat(kls)


def main(args):
    divergence = partial(jsd, beta=args.beta) if args.divergence == "jsd" else DIVERGENCES[args.divergence]
    if 0:
        return estimate.estimate(args, lambda hidden, teacher_hidden, token, lm_head: sliced_divergence(
            hidden, teacher_hidden, token, lm_head, divergence, args.slice))
    gen_data.ensure(args.data, args.preset, args.seed)
    rows = gen_data.load_rows(args.data, "train")
    if args.tasks:
        levels = gen_data.parse_tasks(args.tasks)
        rows = [row for row in rows if row["level"] in levels.get(row["task"], ())]
        if not rows:
            gen_data.fail(f"--tasks {' '.join(args.tasks)}: {args.data}/train has no such row; choose others or make them: "
                          f"python gen_data.py --tasks {' '.join(args.tasks)} --out data/mine")
    init = None if args.init == "none" else f"{args.init}/adapter"
    run = common.Run(args, __file__, [f"{args.data}/train/metadata.jsonl", *([f"{init}/adapter_model.safetensors"] if init else [])])
    model, processor = common.load(args.model, args.bits)
    torch.manual_seed(args.seed)
    model = common.add_lora(model, args.lora_rank, args.lora_vision, run.adapter or init)
    device = model.device
    model.print_trainable_parameters()
    lm_head = common.network(model).lm_head
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = common.adamw(weights, args.lr)
    teacher_weights = nullcontext if args.teacher_weights == "live" else model.disable_adapter

    with run:
        for step in run.steps(model, optimizer):
            clock = common.Clock()
            rng = np.random.default_rng([args.seed, step])  # a step's randomness depends on nothing before it
            torch.manual_seed(int(rng.integers(2**62)))
            batch = [rows[i] for i in rng.choice(len(rows), args.batch, replace=len(rows) < args.batch)]
            batch.sort(key=lambda row: (row["task"], row["level"]))  # rows of one length together: less padding
            parts = [batch[i:i + args.micro_batch] for i in range(0, args.batch, args.micro_batch)]
            sampler = "student" if rng.random() < args.on_policy else "teacher"

            prompts, contexts, rollouts = [], [], []  # what the student reads, what the teacher reads, what was sampled
            for part in parts:
                pictures = [open_picture(row["path"]) for row in part]
                prompts.append(common.encode(processor, [student_prompt(row) for row in part], pictures, device))
                contexts.append(prompts[-1] if args.teacher_context == "none" else common.encode(
                    processor, [teacher_prompt(row, args.teacher_context) for row in part], device=device))
            clock("encode")

            # 1. The student samples responses from pictures, adapters on (a share 1 - on_policy of the steps: the teacher).
            model.eval()
            for prompt, context in zip(prompts, contexts):
                with nullcontext() if sampler == "student" else teacher_weights():
                    rollouts.append(common.sample(                                     # ids, mask: [B, T]
                        model, processor, prompt if sampler == "student" else context, args.max_new_tokens))
            tokens = sum(int(mask.sum()) for _, mask in rollouts)  # one denominator for the whole step
            clock("sample")
            pieces = [processor.tokenizer.batch_decode(row_ids[row_mask.bool()][:, None])     # one text per token
                      for ids, mask in rollouts for row_ids, row_mask in zip(ids, mask)]
            clock("rest")

            model.train()
            losses, kls = [], []
            for prompt, context, (ids, mask) in zip(prompts, contexts, rollouts):
                # 2. The teacher scores the same tokens from the symbols, adapters off, no gradient.
                with torch.no_grad(), teacher_weights():
                    teacher_hidden = common.response_hidden(model, context, ids, mask)  # [N, hidden], N = mask.sum()
                clock("teacher")

                # 3. The student scores them again, with gradient.
                hidden = common.response_hidden(model, prompt, ids, mask)              # [N, hidden]
                clock("student")

                # 4. The divergence, slice by slice, and its gradient, which then goes through the network once.
                gradient, loss, kl_values = sliced_divergence(                         # [N, hidden], [N], [N]
                    hidden.detach(), teacher_hidden, ids[mask.bool()], lm_head, divergence, args.slice)
                losses.append(loss)
                kls.append(kl_values)
                clock("loss")
                hidden.backward(gradient / tokens)
                clock("backward")

            # 5. One optimizer step on the adapters.
            lr = common.learning_rate(step, args.steps, args.lr)
            mean_loss = float(torch.cat(losses).mean())
            norm = run.update(mean_loss, weights, lr, ({"id": row["id"], "response": "".join(texts)} for row, texts in zip(batch, pieces)))
            clock("optimizer")

            # For the log: every rollout's KL by part, what its plan is worth.
            per_row = torch.cat(kls).cpu().split([len(row) for row in pieces])                # reverse KL of each token
            part_ids = [part_of(row) for row in pieces]
            flat_kl, flat_part = torch.cat(per_row).numpy(), np.concatenate(part_ids)
            plans = [parse("".join(row)) for row in pieces]
            outcomes = [check(row["task"], row["state"], plan) for row, plan in zip(batch, plans)]
            wins = [outcome == "success" for outcome in outcomes]
            end = processor.tokenizer.eos_token
            if step % args.show_every == 0:
                some = range(0, args.batch, math.ceil(args.batch / 8))  # of every task: the batch is sorted
                run.append("rollouts.jsonl", [{
                    "step": step + 1, "id": batch[i]["id"], "task": batch[i]["task"], "tokens": pieces[i],
                    "kl": [round(value, 5) for value in per_row[i].tolist()], "part": part_ids[i],
                    "outcome": outcomes[i]} for i in some])
                i = rng.integers(args.batch)
                tqdm.write(f"--- {batch[i]['id']}, wanted {','.join(batch[i]['plan'])}\n{''.join(pieces[i])}\n---")
            clock("rest")
            cut = float(np.mean([row[-1] != end for row in pieces]))
            if cut == 1:
                common.warn(f"step {step + 1}: every response hit the limit of {args.max_new_tokens} tokens; raise --max_new_tokens, "
                            "or the student never learns to stop")
            if step == 0 and flat_kl.mean() > 10:
                common.warn(f"the KL of the first step is {flat_kl.mean():.1f} nats per token: teacher and student are probably not aligned")
            run.log(step=step + 1, loss=mean_loss, kl=float(flat_kl.mean()),
                **{f"kl_{name}": float(flat_kl[flat_part == k].mean()) if (flat_part == k).any() else None
                   for k, name in enumerate(PARTS)},
                success=float(np.mean(wins)),
                optimal=float(np.mean([win and len(plan) == len(row["plan"]) for win, plan, row in zip(wins, plans, batch)])),
                length=tokens / args.batch, cut=cut,
                sampler=sampler, grad_norm=norm, lr=lr, seconds=clock.seconds, step_seconds=sum(clock.seconds.values()),
                peak_gb=common.peak_gb())
    print(f"wrote {args.out}/adapter; next: python evaluate.py")


if __name__ == "__main__":
    main(parse_args())
