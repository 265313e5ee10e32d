"""Stage 2, on-policy distillation: what the network can do from symbols, it learns from pictures.

    python distill.py                                # continues out/coldstart
    python distill.py --init none                    # without a cold start
    python distill.py --teacher_context state        # the teacher plans by itself
    python distill.py --divergence sampled           # the paper's released loss

One network is both roles. The student reads the picture, adapters on; the teacher is the same
network with its adapters off and reads the symbols. One update:
    1. the student samples responses from pictures
    2. the teacher scores the same tokens from the symbols, without gradient
    3. the student scores them again, with gradient
    4. the divergence, KL(student || teacher) by default, slice by slice, and its gradient
    5. one optimizer step on the adapters
Nothing else is learned from: success and optimality of the rollouts are logged, never rewarded.
Writes out/distill/{adapter, metrics.jsonl, rollouts.jsonl, trained_rows.json,
args.json, distill.py}

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
from gen_data import PARTS, key_of, open_picture, part_of, student_prompt, teacher_prompt
from tools import run_files


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    common.add_flags(parser, "distill")
    add = parser.add_argument
    add("--out", default="out/distill", help="output folder")
    add("--init", default="out/coldstart", help="run to continue, or none for a fresh adapter")
    add("--divergence", default="reverse_kl", choices=DIVERGENCES, help="the loss")
    add("--beta", type=float, default=0.5, help="jsd: 0 (forward KL) to 1 (reverse KL)")
    add("--teacher_context", default="state+plan", choices=("state+plan", "state", "none"),
        help="what the teacher reads; none: the student's prompt and picture")
    add("--teacher_weights", default="base", choices=("base", "live"),
        help="live: the teacher has the adapters on too")
    add("--on_policy", type=float, default=1.0,
        help="share of steps whose responses the student samples, else the teacher")
    add("--tasks", nargs="+", help="train on these only: task, task:level or task:low-high")
    add("--max_new_tokens", type=int, help="length limit of a rollout, tokens")
    add("--slice", type=int, help="response positions whose logits exist at a time")
    add("--show_every", type=int, default=25,
        help="steps between sampled responses on the console and in rollouts.jsonl")
    args = common.resolve(parser.parse_args(argv), "distill")
    for name in ("beta", "on_policy"):
        if not 0 <= getattr(args, name) <= 1:
            common.fail(f"--{name} {getattr(args, name)}: wanted 0 to 1")
    for name in ("slice", "show_every"):
        if getattr(args, name) < 1:
            common.fail(f"--{name} {getattr(args, name)}: wanted at least 1")
    return args


# ---------------------------------------------------------------- divergences
# log_p, log_q [positions, vocabulary]: log-probabilities of student and teacher; token [positions]:
# the sampled ids -> [positions], in nats. Autograd differentiates it. A new one is a function here
# with its name in DIVERGENCES.

def reverse_kl(log_p, log_q, token=None):
    """KL(student || teacher): the student drops what the teacher would not say."""
    return torch.linalg.vecdot(log_p.exp(), log_p - log_q)


def forward_kl(log_p, log_q, token=None):
    """KL(teacher || student): the student covers everything the teacher would say."""
    return torch.linalg.vecdot(log_q.exp(), log_q - log_p)


def jsd(log_p, log_q, token=None, beta=0.5):
    """beta KL(teacher || m) + (1 - beta) KL(student || m), m = beta q + (1 - beta) p, 0 < beta < 1.

    As in GKD (arXiv 2306.13649). No gradient goes through m: it would be that of sum(m), zero.
    """
    log_m = torch.logaddexp(log_q + math.log(beta), log_p + math.log(1 - beta)).detach()
    return beta * reverse_kl(log_q, log_m) + (1 - beta) * reverse_kl(log_p, log_m)


def sampled(log_p, log_q, token):
    """Policy gradient with the advantage log q - log p at the sampled token: the released loss.

    The expected gradient is reverse_kl's; the value only serves to be differentiated.
    """
    log_p, log_q = (x.gather(1, token[:, None])[:, 0] for x in (log_p, log_q))
    return -(log_q - log_p).detach() * log_p


DIVERGENCES = {f.__name__: f for f in (reverse_kl, forward_kl, jsd, sampled)}


def choose_divergence(name, beta):
    """The function. At beta 0 and 1, where jsd vanishes, the KL that it tends to when scaled."""
    if name != "jsd":
        return DIVERGENCES[name]
    return {0: forward_kl, 1: reverse_kl}.get(beta) or partial(jsd, beta=beta)


def sliced_divergence(hidden, teacher_hidden, token, lm_head, divergence, width):
    """The loss and its gradient, without ever holding [N, vocabulary].

    hidden, teacher_hidden: [N, hidden size], from `common.response_hidden`; token: [N].
    Returns d sum(divergence) / d hidden [N, hidden size], and [3, N], in nats: the divergence, and
    whatever it is, so that runs compare, the reverse KL and the student's entropy.
    """
    gradients, scores = [], []
    for i in range(0, len(hidden), width):
        leaf = hidden[i:i + width].detach().requires_grad_()                  # [width, hidden size]
        with torch.no_grad():
            log_q = lm_head(teacher_hidden[i:i + width]).float().log_softmax(-1)
        log_p = lm_head(leaf).float().log_softmax(-1)                          # [width, vocabulary]
        value = divergence(log_p, log_q, token[i:i + width])                   # [width]
        with torch.no_grad():
            p = log_p.exp()
            entropy = -torch.linalg.vecdot(p, log_p)
            kl = value if divergence is reverse_kl else -torch.linalg.vecdot(p, log_q) - entropy
            scores.append(torch.stack([value, kl, entropy]))
        del log_p, log_q, p    # what the gradient needs of them is in the graph, and goes with it:
        value.sum().backward()                                                  # as far as the leaf
        gradients.append(leaf.grad)
    return torch.cat(gradients), torch.cat(scores, 1)


def draw_rows(rows, count, rng):
    """Rows of one step, none twice where there are enough; those of similar length together."""
    batch = [rows[i] for i in rng.choice(len(rows), count, replace=len(rows) < count)]
    return sorted(batch, key=lambda row: (row["task"], row["level"]))


def encode_roles(processor, rows, teacher_context, device):
    """(what the student reads, what the teacher reads), encoded, of the rows of a step."""
    pictures = [open_picture(row["path"]) for row in rows]
    student = common.encode(processor, [student_prompt(row) for row in rows], pictures, device)
    if teacher_context == "none":
        return student, student
    symbols = [teacher_prompt(row, teacher_context) for row in rows]
    return student, common.encode(processor, symbols, None, device)


def log_rollouts(run, model, processor, step, rows, ids, mask, scores):
    """({name: mean} for metrics.jsonl, one line per row for rollouts.jsonl). Only for the log.

    rows, ids and mask [rows, T] and scores [3, mask.sum()], as from `sliced_divergence`, are those
    of this process; what is returned is that of all of them.
    """
    lengths = mask.sum(1).tolist()
    _, kl, entropy = (score.split(lengths) for score in scores.cpu())
    texts, cut = common.decode(processor, ids, mask), common.was_cut(model, processor, ids, mask)
    lines = []
    for i, row in enumerate(rows):
        verdict = gen_data.judge(row, texts[i])
        tokens = processor.batch_decode(ids[i, :lengths[i], None])  # one text per token
        lines.append({
            "step": step + 1, "id": row["id"], "task": row["task"], "response": texts[i],
            "outcome": verdict["outcome"], "optimal": verdict["optimal"], "cut": cut[i],
            "tokens": tokens, "part": part_of(tokens), "kl": kl[i].tolist(),
            "entropy": entropy[i].tolist()})
    lines = common.gather_rows(lines)
    all_kl = np.concatenate([line["kl"] for line in lines])
    part = np.concatenate([line["part"] for line in lines])
    metrics = {"kl": float(all_kl.mean())}
    for k, name in enumerate(PARTS):
        metrics[f"kl_{name}"] = float(all_kl[part == k].mean()) if k in part else None
    metrics["entropy"] = float(np.concatenate([line["entropy"] for line in lines]).mean())
    metrics["success"] = common.mean([
        line["outcome"] == "success" for line in lines if line["outcome"] != "not judged"])
    metrics["optimal"] = common.mean([
        line["optimal"] for line in lines if line["optimal"] is not None])
    metrics["length"] = len(all_kl) / len(lines)
    metrics["cut"] = float(np.mean([line["cut"] for line in lines]))
    if metrics["cut"] == 1:
        common.warn(f"step {step + 1}: every response hit the limit of {run.args.max_new_tokens} "
                    "tokens; raise --max_new_tokens, or the student never learns to stop")
    if step == 0 and metrics["kl"] > 10:
        common.warn(f"the KL of the first step is {metrics['kl']:.1f} nats per token: teacher and "
                    "student are probably not aligned")
    if step % run.args.show_every == 0:
        run.append("rollouts.jsonl", lines[::math.ceil(len(lines) / 8)])  # of every task: sorted
        line = lines[step % len(lines)]
        tqdm.write(f"--- {line['id']}: {line['outcome']}\n{''.join(line['tokens'])}\n---")
    return metrics, lines


def main(args):
    rank, processes = common.join_processes(args.batch)
    if rank == 0:
        gen_data.ensure(args.data, args.preset, args.seed)
    common.gather(None)  # the others wait for the data
    rows = gen_data.choose_rows(gen_data.load_rows(args.data, "train"), args.tasks)
    inputs, trained_on = [f"{args.data}/train/metadata.jsonl"], {key_of(row) for row in rows}
    init = None if args.init == "none" else f"{args.init}/adapter"
    if init:
        inputs.append(f"{init}/adapter_model.safetensors")
        trained_on |= run_files.read_trained_rows(args.init)
    run = common.Run(args, __file__, inputs, trained_on)
    model, processor = common.load(args.model, args.bits)
    common.check_lengths(model, processor, {
        row["where"]: teacher_prompt(row) for row in rows}, args.max_new_tokens)
    torch.manual_seed(args.seed)
    model = common.add_lora(model, args.lora_rank, args.lora_vision, run.adapter or init)
    model.print_trainable_parameters()
    lm_head = common.network(model).lm_head
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = common.adamw(weights, args.lr)
    share = slice(rank, None, processes)  # of the rows of a step: those of this process
    divergence = choose_divergence(args.divergence, args.beta)
    as_student = nullcontext
    as_teacher = nullcontext if args.teacher_weights == "live" else model.disable_adapter

    try:
        for step in run.steps(optimizer):
            timer = common.Timer()
            rng = np.random.default_rng([args.seed, step])  # depends on nothing before this step
            batch = draw_rows(rows, args.batch, rng)[share]
            prompts, contexts = encode_roles(processor, batch, args.teacher_context, model.device)
            timer("encode")

            # 1. The student samples responses from pictures, adapters on (off policy: the teacher).
            on_policy = rng.random() < args.on_policy
            uniforms = rng.random((args.batch, args.max_new_tokens))[share]  # one per token
            model.eval()
            with as_student() if on_policy else as_teacher():
                rollouts, masks = common.sample(                                      # [batch, T]
                    model, processor, prompts if on_policy else contexts, args.max_new_tokens,
                    uniforms, rollout_batch=args.rollout_batch)
            tokens = sum(common.gather(int(masks.sum())))  # one denominator for the whole step
            timer("sample")

            model.train()
            scores = []
            for ids, mask, prompt, context in common.micro_batches(
                    args.micro_batch, rollouts, masks, prompts, contexts):
                # 2. The teacher scores the same tokens from the symbols, adapters off, no gradient.
                with torch.no_grad(), as_teacher():
                    teacher_hidden = common.response_hidden(model, context, ids, mask)
                timer("teacher")
                # 3. The student scores them again, with gradient.
                hidden = common.response_hidden(model, prompt, ids, mask)             # [N, hidden]
                timer("student")
                # 4. The divergence, slice by slice; then its gradient once through the network.
                gradient, score = sliced_divergence(                          # [N, hidden], [3, N]
                    hidden, teacher_hidden, ids[mask.bool()], lm_head, divergence, args.slice)
                scores.append(score)
                timer("loss")
                hidden.backward(gradient / tokens)
                timer("backward")
            scores = torch.cat(scores, 1)                                    # [3, tokens of masks]
            means, lines = log_rollouts(run, model, processor, step, batch, rollouts, masks, scores)
            timer("rest")

            # 5. One optimizer step on the adapters.
            loss = common.sum_gradients(weights, float(scores[0].sum()) / tokens)
            grad_norm = float(torch.nn.utils.clip_grad_norm_(weights, args.max_grad_norm))
            if step == 0 and grad_norm < 1e-5:  # autograd leaves rounding where all is equal
                common.fail("the first gradient is zero: nothing connects the loss to the adapters")
            lr = common.learning_rate(step, args.steps, args.lr)
            if math.isfinite(loss) and math.isfinite(grad_norm):
                run.updating = True
                optimizer.param_groups[0]["lr"] = lr
                optimizer.step()
            else:
                run.skip(loss, grad_norm, lines)
            optimizer.zero_grad()
            timer("optimizer")

            run.log(timer, loss=loss, **means, on_policy=on_policy, grad_norm=grad_norm, lr=lr)
            if run.should_save():
                run.save(model, optimizer)
            if run.stopping and run.step < args.steps:
                raise SystemExit(run.stopped())
        run.finish()
    except torch.OutOfMemoryError as error:
        run.out_of_memory(error, model, optimizer)
    finally:
        run.close()
    print(f"wrote {args.out}/adapter; next: python evaluate.py")


if __name__ == "__main__":
    main(parse_args())
