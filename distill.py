"""Stage 2, on-policy distillation: what the network can do from symbols, it learns to do from the picture.

    python distill.py                                # continues out/coldstart
    python distill.py --init none                    # without a cold start
    python distill.py --teacher_context state        # the teacher plans by itself, no reference plan

One network is both roles. The student reads the picture, adapters on; the teacher is the same network
with its adapters off and reads the symbols. One update:
    1. the student samples responses from pictures
    2. the teacher scores the same tokens from the symbols, without gradient
    3. the student scores them again, with gradient
    4. the divergence KL(student || teacher), slice by slice, and its gradient
    5. one optimizer step on the adapters
Nothing else is learned from: success and optimality of the rollouts are logged, never rewarded.
Writes out/distill/{adapter, args.json, metrics.jsonl, distill.py}.

Left out on purpose: rewards, a value function, replay, several rollouts per prompt.
"""
import argparse

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import common
import gen_data
from gen_data import PARTS, check, parse, part_of, student_prompt, teacher_prompt


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    common.add_flags(parser, "distill")
    add = parser.add_argument
    add("--out", default="out/distill", help="output folder")
    add("--init", default="out/coldstart", help="run to continue, or none for a fresh adapter")
    add("--teacher_context", default="state+plan", choices=("state+plan", "state"), help="what the teacher reads")
    add("--max_new_tokens", type=int, help="length limit of a rollout, tokens")
    add("--slice", type=int, default=128, help="response positions whose logits exist at a time")
    add("--show_every", type=int, default=25, help="steps between sampled responses on the console")
    add("--estimate", nargs="?", const="cuda", choices=("cuda", "cpu"), help="print what a step would hold in memory and stop")
    add("--prompt_tokens", type=int, nargs=2, default=(250, 320), metavar=("STUDENT", "TEACHER"),
        help="for --estimate: prompt lengths (default: the longest of all tasks and levels in Qwen's tokens)")
    return common.resolve(parser.parse_args(argv), "distill")


def reverse_kl(log_p, log_q):
    """KL(student || teacher) per position, nats. log_p, log_q: [positions, vocabulary] -> [positions]"""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def sliced_backward(hidden, teacher_hidden, lm_head, divergence, denominator, width):
    """Backpropagate sum(divergence) / denominator into `hidden`'s graph; returns the divergence [N].

    hidden, teacher_hidden: [N, hidden size]. Logits of only `width` positions exist at a time, in
    float32; their gradient is gathered in a leaf and goes through the network once, at the end.
    """
    leaf = hidden.detach().requires_grad_()
    values = []
    for i in range(0, len(leaf), width):
        log_p = lm_head(leaf[i:i + width]).float().log_softmax(-1)                  # [width, vocabulary]
        with torch.no_grad():
            log_q = lm_head(teacher_hidden[i:i + width]).float().log_softmax(-1)
        value = divergence(log_p, log_q)                                           # [width]
        (value.sum() / denominator).backward()
        values.append(value.detach())
    hidden.backward(leaf.grad)
    return torch.cat(values)


def main(args):
    if args.estimate:
        return common.estimate(args, lambda *states: sliced_backward(*states, reverse_kl, 1, args.slice))
    gen_data.ensure(args.data, args.preset, args.seed)
    rows = gen_data.load_rows(args.data, "train")
    model, processor = common.load(args.model, args.bits)
    torch.manual_seed(args.seed)
    path = None if args.init == "none" else f"{args.init}/adapter"
    model = common.add_lora(model, args.lora_rank, args.lora_vision, path)
    device = model.device
    model.print_trainable_parameters()
    lm_head = common.network(model).lm_head
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = common.adamw(weights, args.lr)
    log = common.Log(args.out, args, __file__)
    micro = range(0, args.batch, args.micro_batch)

    for step in tqdm(range(args.steps), desc="distill", unit="step"):
        clock = common.Clock()
        rng = np.random.default_rng([args.seed, step])  # a step's randomness depends on nothing before it
        torch.manual_seed(int(rng.integers(2**62)))
        batch = [rows[i] for i in rng.choice(len(rows), args.batch, replace=len(rows) < args.batch)]
        batch.sort(key=lambda row: (row["task"], row["level"]))  # rows of one length together: less padding
        parts = [batch[i:i + args.micro_batch] for i in micro]

        # 1. The student samples responses from pictures, adapters on.
        model.eval()
        prompts, rollouts = [], []
        for part in parts:
            pictures = [Image.open(row["path"]) for row in part]
            prompts.append(common.encode(processor, [student_prompt(row) for row in part], pictures, device))
            rollouts.append(common.sample(model, processor, prompts[-1], args.max_new_tokens))   # ids, mask: [B, T]
        tokens = sum(int(mask.sum()) for _, mask in rollouts)  # one denominator for the whole step
        clock("sample")

        model.train()
        kl = []
        for part, prompt, (ids, mask) in zip(parts, prompts, rollouts):
            # 2. The teacher scores the same tokens from the symbols, adapters off, no gradient.
            symbols = common.encode(processor, [teacher_prompt(row, args.teacher_context) for row in part], device=device)
            with torch.no_grad(), model.disable_adapter():
                teacher_hidden = common.response_hidden(model, symbols, ids, mask)  # [N, hidden]
            clock("teacher")

            # 3. The student scores them again, with gradient.
            hidden = common.response_hidden(model, prompt, ids, mask)              # [N, hidden], N = mask.sum()
            clock("student")

            # 4. The divergence and its gradient, slice by slice; then once through the network.
            kl.append(sliced_backward(hidden, teacher_hidden, lm_head, reverse_kl, tokens, args.slice))
            clock("loss")

        # 5. One optimizer step on the adapters.
        lr = common.learning_rate(step, args.steps, args.lr)
        norm = common.optimizer_step(optimizer, weights, lr)
        clock("optimizer")

        # For the log: the text of every rollout and its KL by part, what its plan is worth.
        texts, by_part = [], {name: [] for name in PARTS}
        for (ids, mask), values in zip(rollouts, kl):
            for row_ids, row_mask, row_kl in zip(ids, mask, values.split(mask.sum(1).tolist())):
                pieces = processor.tokenizer.batch_decode(row_ids[row_mask.bool()][:, None])
                texts.append("".join(pieces))
                for part, value in zip(part_of(pieces), row_kl.tolist()):
                    by_part[PARTS[part]].append(value)
        plans = [parse(text) for text in texts]
        wins = [check(row["task"], row["state"], plan) == "success" for row, plan in zip(batch, plans)]
        end = processor.tokenizer.eos_token
        mean_kl = float(torch.cat(kl).mean())
        log(step=step + 1, loss=mean_kl, kl=mean_kl,
            **{f"kl_{name}": float(np.mean(values)) if values else None for name, values in by_part.items()},
            success=float(np.mean(wins)),
            optimal=float(np.mean([win and len(plan) == len(row["plan"]) for win, plan, row in zip(wins, plans, batch)])),
            length=tokens / args.batch, cut=float(np.mean([not text.endswith(end) for text in texts])),
            grad_norm=norm, lr=lr, seconds=clock.seconds, peak_gb=common.peak_gb())
        if step % args.show_every == 0:
            i = rng.integers(args.batch)
            tqdm.write(f"--- {batch[i]['id']}, wanted {','.join(batch[i]['plan'])}\n{texts[i]}\n---")
    common.save_adapter(model, args.out)
    print(f"wrote {args.out}/adapter; next: python evaluate.py")


if __name__ == "__main__":
    main(parse_args())
