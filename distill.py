"""Stage 2, on-policy distillation: what the network can do from symbols, it learns from pictures.

    python distill.py                                # continues out/tiny/coldstart
    python distill.py --preset 4b                    # continues out/4b/coldstart
    python distill.py --init none                    # without a cold start
    python distill.py --teacher_reads symbols        # without the plan: the teacher plans by itself
    python distill.py --divergence sampled           # the paper's released loss
    python distill.py --data data/mine --teacher_reads picture --init none    # a cleaner picture

One network is both roles. The student reads the picture, adapters on; the teacher is the same
network with its adapters off and reads the symbols. One update:
    1. the student samples responses from pictures
    2. the teacher scores the same tokens from the symbols, without gradient
    3. the student scores them again, with gradient
    4. the divergence, KL(student || teacher) by default, chunk by chunk, and its gradient
    5. one optimizer step on the adapters
Nothing else is learned from: success and optimality of the rollouts are logged, never rewarded.
Writes out/<preset>/distill/ with adapter/ (the last), adapter-best/ (of the best validation),
metrics.jsonl, rollouts.jsonl and what a resume needs.

Left out on purpose: rewards, a value function, replay.
"""
import math
import shlex
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import common
import gen_data
from gen_data import PARTS, Parser, fail, open_picture, part_of, real_number, whole_number

SHOW_EVERY = 25  # steps between sampled responses on the console and in rollouts.jsonl
HELD_OUT = 96    # rows of the validation, at most
EMA = 0.99       # share of the moving average (--teacher_weights ema) that a step keeps
MAX_GAP = 0.25   # nats of the sampling gap; right: 1e-5 in 32 bits, 0.02 in 16 and 4

# Defaults of the flags. Batches count rows.
QWEN = {
    "steps": 300,  # what others found for steps and rate: docs/differences.md
    "lr": 1e-4,
    "batch": 32,
    "micro_batch": 8,
    "rollout_batch": 32,
    "max_new_tokens": 512,  # the longest reference response, on a maze of size 6, has 333
    "chunk": 64,
}
SETTINGS = {
    "tiny": {
        "steps": 40,
        "lr": 1e-3,  # lower ones, with more steps, plan as well and forget fewer perception answers
        "batch": 64,
        "micro_batch": 32,
        "rollout_batch": 96,
        "max_new_tokens": 120,
        "chunk": 128,
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
    add("--out", help="output folder (default: distill beside --init, else out/<preset>/distill)")
    add("--init", help="run to continue, or none for a fresh adapter (default: "
        "out/<preset>/coldstart)")
    add("--divergence", default="reverse_kl", choices=DIVERGENCES, help="the loss")
    add("--teacher_reads", default="symbols+plan", choices=("symbols+plan", "symbols", "picture"),
        help="texts, with the row's teacher_file_name beside them; picture: no text, but that "
        "picture, or the student's where a row has none")
    add("--teacher_weights", default="base", choices=("base", "live", "ema"),
        help="base: adapters off; live: adapters on; ema: a moving average of the adapters")
    add("--on_policy", type=real_number(0, 1), default=1.0,
        help="share of steps whose responses the student samples, else the teacher")
    add("--tasks", nargs="+", help="train on these only: task, task:size, task:low-high, group")
    add("--chunk", type=whole_number(1), help="response positions whose logits exist at a time")
    add("--eval_every", type=whole_number(0), default=25, help="steps between validations, 0: none")
    args = parser.parse_args(argv)
    args.init = args.init or f"out/{args.preset or 'tiny'}/coldstart"
    common.resolve(args, SETTINGS, None if args.init == "none" else args.init)
    beside = f"out/{args.preset}" if args.init == "none" else Path(args.init).parent
    args.out = args.out or str(Path(beside, "distill"))
    return args


# ---------------------------------------------------------------- divergences
# log_p, log_q [positions, vocabulary]: log-probabilities of student and teacher; token, drawn
# [positions]: the sampled ids, and the log-probability that each was drawn with -> [positions], in
# nats. Autograd differentiates it. A new one is a function here and a line in DIVERGENCES.

def reverse_kl(log_p, log_q, *_):
    """KL(student || teacher): the student drops what the teacher would not say."""
    return torch.linalg.vecdot(log_p.exp(), log_p - log_q)


def forward_kl(log_p, log_q, *_):
    """KL(teacher || student): the student covers everything the teacher would say."""
    return torch.linalg.vecdot(log_q.exp(), log_q - log_p)


def jsd(log_p, log_q, *_, beta=0.5):
    """beta KL(teacher || m) + (1 - beta) KL(student || m), m = beta q + (1 - beta) p, 0 < beta < 1.

    As in GKD (arXiv 2306.13649). No gradient goes through m: it would be that of sum(m), zero.
    """
    log_m = torch.logaddexp(log_q + math.log(beta), log_p + math.log(1 - beta)).detach()
    return beta * reverse_kl(log_q, log_m) + (1 - beta) * reverse_kl(log_p, log_m)


def sampled(log_p, log_q, token, *_):
    """Policy gradient with the advantage log q - log p at the sampled token: the released loss.

    The expected gradient is reverse_kl's; the value only serves to be differentiated.
    """
    log_p, log_q = (x.gather(1, token[:, None])[:, 0] for x in (log_p, log_q))
    return -(log_q - log_p).detach() * log_p


def skew_kl(log_p, log_q, *_, alpha=0.1):
    """KL(student || alpha student + (1 - alpha) teacher): finite where the teacher says never.

    As in DistiLLM (arXiv 2402.03898), its skew reverse KL.
    """
    log_m = torch.logaddexp(log_p + math.log(alpha), log_q + math.log(1 - alpha))
    return reverse_kl(log_p, log_m)


def topk_kl(log_p, log_q, *_, k=100):
    """KL(student || teacher) over the student's k likeliest tokens and one bucket for the rest.

    A divergence, since the buckets of both sum to one, and at most the full KL.
    """
    top = log_p.topk(min(k, log_p.shape[1])).indices
    buckets = []
    for x in (log_p, log_q):
        rest = x.scatter(1, top, -torch.inf).logsumexp(1, keepdim=True).clamp(min=-80)  # k = all
        buckets.append(torch.cat([x.gather(1, top), rest], 1))                         # [N, k + 1]
    return reverse_kl(*buckets)


def clipped(log_p, log_q, *sample, divergence=reverse_kl, nats=2.0):
    """Another divergence whose gradient is shortened where it is above `nats`.

    So that a few tokens, often of style, do not outweigh all others.
    """
    value = divergence(log_p, log_q, *sample)
    return value * nats / value.detach().clamp(min=nats)


DIVERGENCES = {
    "reverse_kl": reverse_kl,
    "forward_kl": forward_kl,
    "jsd": partial(jsd, beta=0.5),
    "sampled": sampled,
    "skew_kl": partial(skew_kl, alpha=0.1),
    "topk_kl": partial(topk_kl, k=100),
    "clipped_kl": partial(clipped, divergence=reverse_kl, nats=2.0),
}


def chunked_divergence(hidden, teacher_hidden, token, drawn, factor, lm_head, teacher_head,
                       divergence, chunk):
    """The loss and its gradient, without ever holding [N, vocabulary].

    hidden, teacher_hidden: [N, hidden size], from `common.response_hidden`, each read by its own
    head; token, drawn, factor: [N]; factor multiplies each position's divergence.
    Returns d sum(factor * divergence) / d hidden [N, hidden size], and [4, N], in nats: the
    summands, and, whatever they are, the reverse KL, the student's entropy, and how far the
    token's log-probability is from what it was drawn with.
    """
    gradients, scores = [], []
    for i in range(0, len(hidden), chunk):
        some = slice(i, i + chunk)
        leaf = hidden[some].detach().requires_grad_()                         # [chunk, hidden size]
        with torch.no_grad():
            log_q = teacher_head(teacher_hidden[some]).float().log_softmax(-1)
        log_p = lm_head(leaf).float().log_softmax(-1)                          # [chunk, vocabulary]
        value = divergence(log_p, log_q, token[some], drawn[some]) * factor[some]          # [chunk]
        with torch.no_grad():
            p = log_p.exp()
            entropy = -torch.linalg.vecdot(p, log_p)
            kl = -torch.linalg.vecdot(p, log_q) - entropy
            gap = (log_p.gather(1, token[some, None])[:, 0] - drawn[some]).abs()
            scores.append(torch.stack([value, kl, entropy, gap]))
        del log_p, log_q, p    # what the gradient needs of them is in the graph, and goes with it:
        value.sum().backward()                                                  # as far as the leaf
        gradients.append(leaf.grad)
    return torch.cat(gradients), torch.cat(scores, 1)


# ---------------------------------------------------------------- rows and rollouts

def draw_rows(rows, count, rng):
    """Rows of one step, none twice where there are enough; those of similar length together."""
    batch = [rows[i] for i in rng.choice(len(rows), count, replace=len(rows) < count)]
    return sorted(batch, key=lambda row: (row.task, row.level))


def check_teacher(rows, teacher_reads):
    """Fails where a row has no symbols and the teacher is to read them."""
    for row in rows:
        if teacher_reads != "picture" and not row.symbols():
            fail(f'{row.where}: no "symbols" for --teacher_reads {teacher_reads}; give '
                 "--teacher_reads picture: the teacher sees its teacher_file_name")


def encode_roles(processor, rows, teacher_reads, device):
    """(what the student reads, what the teacher reads), encoded, of the rows of a step."""
    pictures = [open_picture(row.path) for row in rows]
    student = common.encode(processor, [row.student_prompt() for row in rows], pictures, device)
    paths = [row.teacher_picture(teacher_reads) for row in rows]
    pictures = [path and open_picture(path) for path in paths]
    prompts = [row.teacher_prompt(teacher_reads) for row in rows]
    return student, common.encode(processor, prompts, pictures, device)


def rollout_lines(model, processor, step, rows, ids, mask, scores):
    """A line per row for rollouts.jsonl, those of all processes. Only for the log.

    rows, ids and mask [B, T], and scores [4, mask.sum()], as from `chunked_divergence`, are those
    of this process.
    """
    lengths = mask.sum(1).tolist()
    _, kl, entropy, gap = (score.split(lengths) for score in scores.cpu())
    texts, cut = common.decode(processor, ids, mask), common.was_cut(model, processor, ids, mask)
    lines = []
    for i, row in enumerate(rows):
        verdict = row.judge(texts[i], cut=cut[i])
        tokens = processor.batch_decode(ids[i, :lengths[i], None])  # one text per token
        lines.append({
            "step": step + 1, "id": row.id, "task": row.task, "response": texts[i],
            "outcome": verdict["outcome"], "optimal": verdict["optimal"], "cut": cut[i],
            "tokens": tokens, "part": part_of(tokens), "kl": kl[i].tolist(),
            "entropy": entropy[i].tolist(), "gap": gap[i].tolist()})
    return common.gather_rows(lines)


def rollout_means(lines, on_policy):
    """{name: mean} over the lines of a step. Only for the log.

    sampling_gap: of the worst row, since a fault that begins late is thin in the mean over all.
    """
    kl = np.concatenate([line["kl"] for line in lines])
    part = np.concatenate([line["part"] for line in lines])
    judged = [line for line in lines if line["outcome"] != "not judged"]
    means = {"kl": float(kl.mean())}
    for k, name in enumerate(PARTS):
        means[f"kl_{name}"] = float(kl[part == k].mean()) if k in part else None
    means["entropy"] = float(np.concatenate([line["entropy"] for line in lines]).mean())
    gaps = [float(np.mean(line["gap"])) for line in lines]
    means["sampling_gap"] = max(gaps) if on_policy else None
    means["success"] = common.mean([line["outcome"] == "success" for line in judged])
    means["optimal"] = common.mean([
        line["optimal"] for line in judged if line["optimal"] is not None])
    means["length"] = len(kl) / len(lines)
    means["cut"] = common.mean([line["cut"] for line in lines])
    return means


def check_step(args, step, loss, grad_norm, means, factors, gap_was_right):
    """Ends the run, or warns, where a step shows that something is wrong.

    gap_was_right: was the sampling gap right when it was compared last? None: it never was, since
    the start. Then a wrong one ends the run; later it is one warning, since hours must not hang on
    one odd row. Returns the same of this step.
    """
    gap = means["sampling_gap"]
    gap_is_right = gap_was_right if gap is None else not gap > MAX_GAP  # nan: see `is_finite`
    if gap_is_right is False and gap_was_right is not False:
        text = (f"step {step + 1}: the tokens of a response are {gap:.2g} nats (mean) from the "
                "log-probability they were drawn with: what is sampled is not what is trained")
        if gap_was_right is None:
            fail(text)
        common.warn(text)
    if step == 0 and grad_norm == 0 and factors.any():
        fail("the first gradient is zero: nothing connects the loss to the adapters")
    if step == 0 and means["kl"] > 10:
        common.warn(f"the KL of the first step is {means['kl']:.1f} nats per token: are teacher "
                    "and student aligned?")
    if step == 0 and means["kl"] < 1e-6:
        common.warn("the KL of the first step is 0: teacher and student are the same, there is "
                    "nothing to learn")
    if not math.isfinite(loss) and math.isfinite(means["kl"]):
        common.warn(f"step {step + 1}: the loss is {loss} where the KL is {means['kl']:.3g}: look "
                    f"at the divergence {args.divergence}")
    if means["cut"] == 1:
        common.warn(f"step {step + 1}: every response hit --max_new_tokens {args.max_new_tokens}; "
                    "raise it, or the student never learns to stop")
    return gap_is_right


def show(run, lines):
    """Some responses of a step: eight to rollouts.jsonl, one to the eye."""
    run.append("rollouts.jsonl", lines[::math.ceil(len(lines) / 8)])  # of every task
    line = lines[run.step % len(lines)]
    tqdm.write(f"--- {line['id']}: {line['outcome']}\n{''.join(line['tokens'])}\n---")


def validate(model, processor, rows, args, as_teacher, first):
    """On held-out rows: what greedy responses from pictures are worth, and their KL per token.

    Returns these means and the score by which the best adapter is found: success, or minus the KL
    where no response can be judged. first: and the success of the teacher, from what it reads.
    """
    def judge(i, text, cut):
        return gen_data.measures(rows[i].judge(text, cut=cut))

    pictures, symbols = encode_roles(processor, rows, args.teacher_reads, model.device)
    rollouts, masks, means = common.validate(model, processor, pictures, args, judge)
    success, kl = means["val_success"], 0.0
    for ids, mask, picture, symbol in common.micro_batches(
            args.micro_batch, (rollouts, masks), (pictures, symbols)):
        with torch.no_grad():
            hidden = common.response_hidden(model, picture, ids, mask)
            with as_teacher() as teacher:
                teacher_hidden = common.response_hidden(teacher, symbol, ids, mask)
        ones = hidden.new_ones(len(hidden))  # drawn is not used, factors are all 1
        _, score = chunked_divergence(
            hidden, teacher_hidden, ids[mask.bool()], ones, ones, common.head(model),
            common.head(teacher), reverse_kl, args.chunk)
        kl += float(score[1].sum())
    sums, tokens = zip(*common.gather((kl, int(masks.sum()))), strict=True)
    means["val_kl"] = sum(sums) / sum(tokens)
    if first:
        with as_teacher() as teacher:
            taught = common.validate(teacher, processor, symbols, args, judge)[2]
        means["val_teacher"] = taught["val_success"]
        if success is not None and taught["val_success"] <= success:
            common.warn(f"the teacher succeeds on {taught['val_success']:.0%} of the validation "
                        f"rows, the student on {success:.0%} from pictures: what the teacher "
                        "cannot do cannot be taught")
    return means, -means["val_kl"] if success is None else success


def is_due(step, args):
    """Is there a validation after this step? After the first, the last and every n-th."""
    return args.eval_every and (
        step in (0, args.steps - 1) or (step + 1) % args.eval_every == 0)


def main(args):
    share = common.join_processes(args.batch)  # of the rows of a step: those of this process
    if args.init != "none":
        common.adapter_folder(args.init, "--init")  # what is missing is told before data are made
    if args.tasks and not args.data:
        gen_data.parse_tasks(args.tasks)
    args.data = common.once(gen_data.ensure, args.data, args.preset, args.seed)
    rows = gen_data.choose_rows(gen_data.load_rows(args.data, "train"), args.tasks)
    held_out = []
    if not gen_data.has_split(args.data, "val"):
        common.warn(f"{args.data} has no split val: nothing is validated")
        args.eval_every = 0
    if args.eval_every:
        val = gen_data.choose_rows(gen_data.load_rows(args.data, "val"), args.tasks)
        held_out = draw_rows(val, max(share.step, min(HELD_OUT, len(val))),
                             np.random.default_rng(args.seed))
    check_teacher(rows + held_out, args.teacher_reads)
    gen_data.check_pictures(rows + held_out)
    divergence = DIVERGENCES[args.divergence]

    with common.Run(args, train=rows, val=held_out) as run:
        model, processor = run.load()
        common.check_lengths(model, processor, {
            row.where: row.teacher_prompt("symbols+plan") for row in rows + held_out},
            args.max_new_tokens)
        weights = common.adapter_weights(model)
        optimizer = common.adamw(weights, args.lr)
        ema = [weight.detach().clone() for weight in weights if args.teacher_weights == "ema"]
        best = {"score": -math.inf, "step": 0, "last": None}    # of the validations
        run.restore(model, optimizer=optimizer, ema=ema, best=best)
        as_student = partial(nullcontext, model)
        as_teacher = {  # with as_teacher() as teacher: the network that scores
            "base": partial(common.without_adapters, model),
            "live": as_student,
            "ema": partial(common.exchanged, model, weights, ema),
        }[args.teacher_weights]
        gap_is_right = None  # the sampling gap's, not compared yet

        for step in run.steps():                # saved when it is due, and however the loop ends
            rng = np.random.default_rng([args.seed, step])  # nothing random is ever stored
            batch = draw_rows(rows, args.batch, rng)[share]
            pictures, symbols = encode_roles(processor, batch, args.teacher_reads, model.device)
            run.clock("encode")

            # 1. The student samples responses from pictures, adapters on (off policy: the teacher).
            on_policy = rng.random() < args.on_policy
            prompts, role = (pictures, as_student) if on_policy else (symbols, as_teacher)
            uniforms = rng.random((args.batch, args.max_new_tokens))[share]  # one per token
            model.eval()
            with role() as sampler:
                rollouts, masks, drawn = common.sample(                               # [B, T] each
                    sampler, processor, prompts, args.max_new_tokens, uniforms,
                    rollout_batch=args.rollout_batch)
            factors = masks.float()    # of each token's loss; a fork's masks and advantages go here
            tokens = int(masks.sum())                       # how many count: the loss's denominator
            parts = list(common.micro_batches(
                args.micro_batch, (rollouts, masks, drawn, factors), (pictures, symbols)))
            run.clock("sample")

            # 2. The teacher scores the same tokens from the symbols, adapters off, no gradient.
            model.train()
            taught = []
            with torch.no_grad(), as_teacher() as teacher:
                for ids, mask, _, _, _, symbol in parts:
                    taught.append(common.response_hidden(teacher, symbol, ids, mask))  # [N, hidden]
            run.clock("teacher")

            scores = []
            for part, teacher_hidden in zip(parts, taught, strict=True):
                ids, mask, old, factor, picture, _ = part
                # 3. The student scores them again, with gradient.
                hidden = common.response_hidden(model, picture, ids, mask)             # [N, hidden]
                # 4. The divergence, chunk by chunk; then its gradient once through the network.
                valid = mask.bool()
                gradient, score = chunked_divergence(                         # [N, hidden], [4, N]
                    hidden, teacher_hidden, ids[valid], old[valid], factor[valid],
                    common.head(model), common.head(teacher), divergence, args.chunk)
                hidden.backward(gradient)
                scores.append(score)
            scores = torch.cat(scores, 1)                                # [4, tokens of this step]
            run.clock("student")

            # 5. One optimizer step on the adapters.
            loss, tokens = common.average_gradients(weights, float(scores[0].sum()), tokens)
            grad_norm = float(torch.nn.utils.clip_grad_norm_(weights, args.max_grad_norm))
            lr = common.schedule(optimizer, step, args.steps)
            lines = rollout_lines(model, processor, step, batch, rollouts, masks, scores)
            if run.is_finite(loss, grad_norm, lines) and tokens:      # else the step is left out
                optimizer.step()
            optimizer.zero_grad()
            if ema:
                torch._foreach_lerp_(ema, [weight.detach() for weight in weights], 1 - EMA)
            run.clock("optimizer")

            means = rollout_means(lines, on_policy)
            gap_is_right = check_step(args, step, loss, grad_norm, means, factors, gap_is_right)
            if step % SHOW_EVERY == 0:
                show(run, lines)
            if is_due(step, args):
                found, best["last"] = validate(
                    model, processor, held_out[share], args, as_teacher, step == 0)
                means |= found
                if best["last"] > best["score"]:
                    best.update(score=best["last"], step=step + 1)
                    run.export("adapter-best")
                run.clock("validate")
            run.log(loss=loss, **means, on_policy=on_policy, grad_norm=grad_norm, lr=lr)
    if best["step"]:
        what = "minus KL" if best["score"] < 0 else "success"
        print(f"validation, {what}: {best['last']:.3g} of {args.out}/adapter (step {run.step}), "
              f"{best['score']:.3g} of {args.out}/adapter-best (step {best['step']})")
    print(f"{args.out}/adapter is trained; next: " + shlex.join(
        ["python", "evaluate.py", "--adapter", "base", args.out, "--data", args.data]))


if __name__ == "__main__":
    common.run_script(parse_args, main)
