"""What both stages cost on the card at hand, at the real sizes, with random weights: no download.

    python tests/bench_gpu.py                           # preset 4b in 4 bits; Markdown
    python tests/bench_gpu.py --presets 2b 4b 8b --bits 4 16
    python tests/bench_gpu.py --device cpu --tiny       # the same code on the bundled sizes

This was never run on a GPU: whoever has one is the first. Weights are made on the device matrix by
matrix, in the precisions of common.load, so that 24 GB suffice for 8b in 4 bits. Random weights
hardly ever draw an EOS: rollouts go on to the length that is asked for, which is that of the
longest reference response, and what is scored has the lengths of the reference responses.
Needs requirements-dev.txt (Qwen's tokenizer). trl's Triton kernel is measured where trl is there.
"""
import argparse
import gc
import importlib.util
import io
import re
import sys
import tempfile
import time
from contextlib import nullcontext, redirect_stdout
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import coldstart  # noqa: E402
import common  # noqa: E402
import distill  # noqa: E402
import gen_data  # noqa: E402
from tools import estimate  # noqa: E402

# ---------------------------------------------------------------- random weights

def random_network(config, bits, device):
    """The network of a configuration as `common.load` would return it, with random weights."""
    from accelerate import init_empty_weights
    from transformers import Qwen3VLForConditionalGeneration
    dtype = torch.float32 if bits == 32 else torch.bfloat16
    with init_empty_weights(include_buffers=False):
        model = Qwen3VLForConditionalGeneration(config)
    for name, module in list(model.named_modules()):
        if bits == 4 and re.search(common.LANGUAGE + "$", name):
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, random_nf4(module, device))
            continue
        for key, weight in module.named_parameters(recurse=False):
            value = torch.empty(weight.shape, dtype=dtype, device=device)
            if value.ndim > 1:
                value.normal_(std=0.02)
            else:
                value.fill_(0.0 if key == "bias" else 1.0)
            setattr(module, key, torch.nn.Parameter(value, requires_grad=False))
        for key, buffer in module.named_buffers(recurse=False):
            setattr(module, key, buffer.to(device))
    model.tie_weights()
    model.requires_grad_(False)
    model.is_loaded_in_4bit = bits == 4  # peft chooses its layers by this
    if torch.device(device).type == "cuda":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.eval()


def random_nf4(linear, device):
    """A Linear4bit of the same shape, quantised on the device as `common.load` has it done."""
    from bitsandbytes.nn import Linear4bit, Params4bit
    with torch.device("meta"):
        new = Linear4bit(linear.in_features, linear.out_features, bias=False, quant_type="nf4",
                         compute_dtype=torch.bfloat16, compress_statistics=True)
    weight = torch.empty(linear.weight.shape, dtype=torch.bfloat16, device=device)
    new.weight = Params4bit(weight.normal_(std=0.02), requires_grad=False, quant_type="nf4",
                            compress_statistics=True, module=new).to(device)
    new.support_avx512bf16_for_cpu = False
    return new


# ---------------------------------------------------------------- one step of each stage

class Phases:
    """Seconds and peak bytes by phase: call it with a phase's name when the phase ends.

    The bytes are those of torch's allocator, on CUDA only: without CUDA's own context.
    """

    def __init__(self):
        self.seconds, self.bytes, self.cuda = {}, {}, torch.cuda.is_available()
        self.begin()

    def begin(self):
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        self.last = time.perf_counter()

    def __call__(self, name):
        if self.cuda:
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated()
            self.bytes[name] = max(self.bytes.get(name, 0), peak)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - self.last
        self.begin()


def update(weights, optimizer, tokens):
    common.average_gradients(weights, 0.0, tokens)
    torch.nn.utils.clip_grad_norm_(weights, 1.0)
    optimizer.step()
    optimizer.zero_grad()


def distill_step(model, processor, optimizer, prompts, contexts, ids, mask, args):
    """The five steps of distill.main, with responses that were given -> Phases."""
    net, device = common.network(model), model.device
    weights = common.adapter_weights(model)
    uniforms = np.random.default_rng(0).random(ids.shape)
    phases = Phases()
    model.eval()
    common.sample(model, processor, prompts, ids.shape[1], uniforms,
                  rollout_batch=args.rollout_batch)
    phases("rollout")
    model.train()
    tokens = int(mask.sum())
    for response, keep, prompt, context in common.micro_batches(
            args.micro_batch, (ids.to(device), mask.to(device)), (prompts, contexts)):
        with torch.no_grad(), model.disable_adapter():
            teacher_hidden = common.response_hidden(model, context, response, keep)
        phases("teacher")
        hidden = common.response_hidden(model, prompt, response, keep)
        phases("student")
        gradient, _ = distill.chunked_divergence(
            hidden, teacher_hidden, response[keep.bool()], hidden.new_ones(len(hidden)),
            net.lm_head, distill.reverse_kl, args.chunk)
        phases("loss")
        hidden.backward(gradient)
        phases("backward")
    update(weights, optimizer, tokens)
    phases("optimizer")
    return phases


def coldstart_step(model, optimizer, prompts, ids, mask, args):
    """One step of coldstart.main -> Phases."""
    weights = common.adapter_weights(model)
    phases = Phases()
    model.train()
    for response, keep, prompt in common.micro_batches(args.micro_batch, (ids, mask), (prompts,)):
        coldstart.answer_loss(model, prompt, response, keep).backward()
    phases("cold start")
    update(weights, optimizer, int(mask.sum()))
    phases("optimizer")
    return phases


def full_length(shape, vocabulary):
    """Random responses (ids, mask), all of them as long as the limit."""
    ids = torch.as_tensor(np.random.default_rng(0).integers(0, vocabulary, shape))
    return ids, torch.ones_like(ids)


# ---------------------------------------------------------------- the tables

def head(title, *columns):
    print(f"\n{title}\n\n| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")


def line(*cells):
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def attempt(work):
    """What `work` returns, or None where the card's memory does not suffice."""
    try:
        return work()
    except torch.OutOfMemoryError:
        return None


def measure_model(preset, bits, data, own):
    """All tables of one backbone in one precision."""
    device = own.device
    model_args = ["--preset", preset, "--bits", str(bits), *own.settings]
    args = distill.parse_args([*model_args, "--init", "none"])
    cold = coldstart.parse_args(model_args)
    config = estimate.configuration(args.model)
    with redirect_stdout(io.StringIO()):
        processor = (common.load(common.TINY, 32)[1] if own.tiny else estimate.qwen_processor())
    model = random_network(config, bits, device)
    model = common.add_lora(model, args.lora_rank, args.lora_vision)
    optimizer = common.adamw(common.adapter_weights(model), args.lr)

    rows = gen_data.load_rows(data, "train")
    rows = distill.draw_rows(rows, args.batch, np.random.default_rng(0))
    prompts, contexts = distill.encode_roles(processor, rows, args.teacher_reads, device)
    texts = [row.response() for row in rows]
    references = common.encode_responses(processor, texts, device)
    examples = coldstart.draw_examples(rows, cold.batch, np.random.default_rng(0), cold.map_share)
    answers = coldstart.encode(processor, examples, device)
    vocabulary = min(config.text_config.vocab_size, processor.tokenizer.vocab_size)
    longest = full_length((args.batch, args.max_new_tokens), vocabulary)

    title = f"{preset} in {bits} bits, {torch_device_name(device)}"
    once = attempt(lambda: distill_step(  # what CUDA and the optimizer load or make the first time
        model, processor, optimizer, prompts, contexts, longest[0][:, :4], longest[1][:, :4], args))
    if once is None:
        print(f"\n{title}: out of memory at --rollout_batch {args.rollout_batch} --micro_batch "
              f"{args.micro_batch}")
        return
    full = attempt(lambda: distill_step(
        model, processor, optimizer, prompts, contexts, *longest, args))
    real = attempt(lambda: distill_step(
        model, processor, optimizer, prompts, contexts, *references, args))
    first = attempt(lambda: coldstart_step(model, optimizer, *answers, cold))
    print_memory(title, args, model_args, prompts, contexts, answers, full, first)
    print_seconds(title, args, cold, real, first)
    print_rollouts(title, model, processor, rows, own)
    if importlib.util.find_spec("trl") and torch.device(device).type == "cuda":
        print_losses(title, common.network(model).lm_head, args)


def torch_device_name(device):
    cuda = torch.device(device).type == "cuda"
    return torch.cuda.get_device_name() if cuda else "CPU"


def print_memory(title, args, model_args, prompts, contexts, answers, full, first):
    """Predicted and measured peaks, every response at full length."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    widths = [str(batch["input_ids"].shape[1]) for batch in (prompts, contexts)]
    with redirect_stdout(io.StringIO()):
        about = estimate.parse_args([
            *model_args, "--device", device, "--prompt_tokens", *widths,
            "--answer_tokens", str(answers[1].shape[1])])
        skeleton = estimate.skeleton(about)
        resident = estimate.resident_bytes(skeleton, about)
        phases = estimate.phase_bytes(skeleton, about, estimate.count_any(skeleton, about))
    torchs_own = sum(size for what, size in resident.items() if not what.startswith("CUDA"))
    measured = (full.bytes if full else {}) | (first.bytes if first else {})
    head(f"Memory, {title}: rollout batch {args.rollout_batch}, micro-batch {args.micro_batch}, "
         f"{args.max_new_tokens} new tokens; GB of torch's allocator",
         "phase", "predicted", "measured", "ratio")
    for name in ("rollout", "teacher", "student", "loss", "backward", "cold start"):
        needed = max(sum(rows.values()) for phase, rows in phases.items() if phase.startswith(name))
        predicted, found = torchs_own + needed, measured.get(name)
        line(name, f"{predicted / 1e9:.2f}", f"{found / 1e9:.2f}" if found else "-",
             f"{predicted / found:.2f}" if found else "-")
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        print(f"\nOf the card's {total / 1e9:.1f} GB, {(total - free) / 1e9:.1f} are taken now, "
              f"{torch.cuda.memory_reserved() / 1e9:.1f} of them by torch's allocator.")


def print_seconds(title, args, cold, real, first):
    """Seconds of one step by phase, and the hours of the default run."""
    head(f"Seconds of a step, {title}: {args.batch} rows (cold start: {cold.batch})",
         "phase", "distill", "cold start")
    if not real or not first:
        print("out of memory")
        return
    totals = [sum(phases.seconds.values()) for phases in (real, first)]
    for name in ("rollout", "teacher", "student", "loss", "backward", "cold start", "optimizer"):
        cells = [f"{phases.seconds[name]:.2f}" if name in phases.seconds else ""
                 for phases in (real, first)]
        line(name, *cells)
    line("all", *(f"{total:.2f}" for total in totals))
    hours = [args.steps * totals[0] / 3600, cold.steps * totals[1] / 3600]
    print(f"\nThe default run, {cold.steps} steps of the cold start and {args.steps} of "
          f"distillation: {hours[1]:.1f} + {hours[0]:.1f} = {sum(hours):.1f} hours, validation and "
          "the evaluation not counted.")


def print_rollouts(title, model, processor, rows, own):
    """Tokens a second, the first pass over the prompts included."""
    head(f"Sampling, {title}: {own.new_tokens} new tokens", "rollout batch",
         "tokens/s, adapters on", "tokens/s, adapters off")
    model.eval()
    for batch in own.rollout_batches:
        chosen = [rows[i % len(rows)] for i in range(batch)]
        prompt, _ = distill.encode_roles(processor, chosen, "picture", model.device)
        uniforms, cells = np.random.default_rng(0).random((batch, own.new_tokens)), []
        for adapters in (nullcontext, model.disable_adapter):
            def work(adapters=adapters, prompt=prompt, uniforms=uniforms):
                phases = Phases()
                with adapters():
                    common.sample(model, processor, prompt, own.new_tokens, uniforms)
                phases("rollout")
                return phases.seconds["rollout"]
            seconds = attempt(work)
            cells.append(f"{batch * own.new_tokens / seconds:.0f}" if seconds else "out of memory")
        line(batch, *cells)


def print_losses(title, lm_head, args):
    """Our chunked loss beside TRL's chunked divergence, which on CUDA is a Triton kernel."""
    from trl.trainer.distillation_trainer import _chunked_divergence_loss
    N = args.micro_batch * args.max_new_tokens
    hidden, teacher = (torch.randn(N, lm_head.in_features, dtype=lm_head.weight.dtype,
                                   device=lm_head.weight.device) for _ in range(2))
    token = torch.randint(lm_head.out_features, (N,), device=hidden.device)

    def ours(chunk):
        factor = hidden.new_ones(N)
        distill.chunked_divergence(hidden, teacher, token, factor, lm_head, distill.reverse_kl,
                                   chunk)

    def trl():
        leaf, weight = hidden[None].clone().requires_grad_(), lm_head.weight
        mask = torch.ones(1, N, device=hidden.device)
        _chunked_divergence_loss(leaf, teacher[None], weight, weight, mask, 1.0)[0].backward()
    head(f"The loss and its gradient, {title}: {N} positions", "how", "s", "peak GB over before")
    for name, work in [(f"ours, chunks of {chunk}", lambda chunk=chunk: ours(chunk))
                       for chunk in (32, 64, 128, 512)] + [("TRL's chunked divergence", trl)]:
        def twice(work=work):
            work()  # compiles
            phases, before = Phases(), torch.cuda.memory_allocated()
            work()
            phases("loss")
            return phases.seconds["loss"], (phases.bytes["loss"] - before) / 1e9
        found = attempt(twice)
        line(name, *(f"{x:.3f}" for x in found) if found else ("out of memory", ""))


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--presets", nargs="+", default=["4b"], choices=("2b", "4b", "8b"))
    add("--bits", nargs="+", type=int, default=[4], choices=(4, 16))
    add("--device", default="cuda", choices=("cuda", "cpu"))
    add("--tiny", action="store_true", help="bundled sizes and a short step: does it all run?")
    add("--rollout_batches", nargs="+", type=int, default=[4, 8, 16, 32, 64])
    add("--new_tokens", type=int, default=64, help="of the table of tokens a second")
    args, args.settings = parser.parse_known_args(argv)  # the rest: flags of both stages
    if args.device == "cuda" and not torch.cuda.is_available():
        common.fail("no CUDA device: --device cpu --tiny runs the same code on a small model")
    if args.tiny:
        args.presets, args.rollout_batches, args.new_tokens = ["tiny"], [2, 4], 4
        args.settings = [*args.settings, "--batch", "4", "--micro_batch", "2",
                         "--rollout_batch", "4", "--max_new_tokens", "8"]
    return args


def main(args):
    torch.manual_seed(0)
    versions = ", ".join(f"{name} {value}" for name, value in common.versions().items())
    print(f"{versions}; random weights, pictures of 256x256")
    with tempfile.TemporaryDirectory() as folder:
        data = f"{folder}/data"
        with redirect_stdout(io.StringIO()):
            gen_data.main(gen_data.parse_args([
                "--preset", args.presets[0], "--train", "8", "--val", "1", "--test", "1",
                "--image_size", "256", "--out", data]))
        for preset in args.presets:
            for bits in args.bits:
                measure_model(preset, bits, data, args)
                gc.collect()
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()


if __name__ == "__main__":
    main(parse_args())
