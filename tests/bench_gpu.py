"""What both stages cost on the card at hand, at the real sizes, with random weights: no download.

    python tests/bench_gpu.py                           # preset 4b in 4 bits; Markdown
    python tests/bench_gpu.py --quick                   # steps of 8 rows, fewer tokens
    python tests/bench_gpu.py --presets 2b 4b 8b --bits 4 16 --max_new_tokens 340
    python tests/bench_gpu.py --device cpu --tiny       # the same code on the bundled sizes
    python tests/bench_gpu.py --row out/hour            # a run as a line of docs/gpu.md's table

docs/gpu.md has what one card gave. Each stage's own main takes two steps, of which the second is
timed. Weights are made on the device matrix by matrix, in the precisions of common.load, so that
24 GB suffice for 8b in 4 bits. Random weights hardly ever draw an EOS: every response has
--max_new_tokens, so a step costs more than one of a trained model.
Needs requirements-dev.txt (Qwen's tokenizer). trl's Triton kernel is measured where trl is there.
"""
import argparse
import gc
import importlib.util
import io
import json
import os
import sys
import tempfile
import time
from contextlib import contextmanager, nullcontext, redirect_stdout
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import coldstart  # noqa: E402
import common  # noqa: E402
import distill  # noqa: E402
import evaluate  # noqa: E402
import gen_data  # noqa: E402
from tools import estimate  # noqa: E402
from tools.report import percent, read_lines  # noqa: E402

# ---------------------------------------------------------------- random weights

def random_network(config, bits, device, processor=None, load=common.load):
    """What `common.load` makes of a network of this configuration with random weights.

    processor: that of the network (default: the bundled one).
    """
    from transformers import AutoModelForImageTextToText
    processor = processor or common.load_processor(common.TINY)
    model = random_weights(config, bits, device)
    found = model, {"missing_keys": set(), "unexpected_keys": set()}
    with (mock.patch.object(AutoModelForImageTextToText, "from_pretrained", return_value=found),
          mock.patch.object(common, "load_processor", return_value=processor)):
        return load(common.TINY, bits)[0]


def random_weights(config, bits, device):
    """The network of a configuration on the device, with random weights in load's precisions."""
    from accelerate import init_empty_weights
    from transformers import Qwen3VLForConditionalGeneration
    dtype = common.compute_dtype(bits)
    with init_empty_weights(include_buffers=False):
        model = Qwen3VLForConditionalGeneration(config)
    quantised = common.linears(model) if bits == 4 else []
    for name, module in list(model.named_modules()):
        if name in quantised:
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
    model.is_loaded_in_4bit = model.is_quantized = bits == 4  # peft chooses its layers by this
    return model


def random_nf4(linear, device):
    """A Linear4bit of the same shape, quantised on the device as `common.load` has it done."""
    from bitsandbytes.nn import Linear4bit, Params4bit
    dtype = common.compute_dtype(4)
    with torch.device("meta"):
        new = Linear4bit(linear.in_features, linear.out_features, bias=False, quant_type="nf4",
                         compute_dtype=dtype, compress_statistics=True)
    weight = torch.empty(linear.weight.shape, dtype=dtype, device=device)
    new.weight = Params4bit(weight.normal_(std=0.02), requires_grad=False, quant_type="nf4",
                            compress_statistics=True, module=new).to(device)
    return new


# ---------------------------------------------------------------- measuring

def attempt(work, *words):
    """What `work` returns, or None where the card's memory does not suffice."""
    try:
        return work(*words)
    except torch.OutOfMemoryError:
        return None
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def measured(work):
    """(seconds, peak bytes of torch's allocator over what is held now, on CUDA) of the second call:
    the first one compiles, and loads what is loaded late."""
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    begin = time.perf_counter()
    work()
    if not torch.cuda.is_available():
        return time.perf_counter() - begin, 0
    torch.cuda.synchronize()
    return time.perf_counter() - begin, torch.cuda.max_memory_allocated() - before


def two_steps(stage, words, network, processor):
    """Two steps of a stage's main -> ({phase: seconds} of the second, {phase: peak bytes}).

    network: a function that makes it. Bytes: of torch's allocator, without CUDA's own; CUDA only.
    """
    peaks, clock = {}, common.Run.clock
    words = [*words, "--steps", "2", "--init", "none"]
    words += ["--eval_every", "0"] if stage is distill else []

    def noting_peaks(run, phase):
        clock(run, phase)
        if torch.cuda.is_available():
            peaks[phase] = max(peaks.get(phase, 0), torch.cuda.max_memory_allocated())
            torch.cuda.reset_peak_memory_stats()
    with (tempfile.TemporaryDirectory() as out, redirect_stdout(io.StringIO()),
          mock.patch.object(common.Run, "clock", noting_peaks),
          mock.patch.object(common, "load", lambda *args: (network(), processor)),
          mock.patch.object(coldstart, "validate", lambda *args: {})):
        stage.main(stage.parse_args([*words, "--out", out]))
        log = Path(out, "metrics.jsonl").read_text(encoding="utf-8")
    return json.loads(log.splitlines()[-1])["seconds"], peaks


# ---------------------------------------------------------------- the tables

def head(title, *columns):
    print(f"\n{title}\n\n| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")


def line(*cells):
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def measure_model(preset, bits, data, own):
    """All tables of one backbone in one precision."""
    words = ["--preset", preset, "--bits", str(bits), *own.settings]
    args, cold = distill.parse_args([*words, "--init", "none"]), coldstart.parse_args(words)
    config = estimate.configuration(args.model)
    with redirect_stdout(io.StringIO()):
        processor = common.load(common.TINY, 32)[1] if own.tiny else estimate.qwen_processor()

    def network():
        return random_network(config, bits, own.device, processor)
    card = torch.cuda.get_device_name() if own.device == "cuda" else "CPU"
    title = f"{preset} in {bits} bits, {card}"
    found = {stage: attempt(two_steps, stage, [*words, "--data", data], network, processor)
             for stage in (distill, coldstart)}
    rows = gen_data.load_rows(data, "train")
    print_memory(title, args, cold, words, rows, processor, found)
    print_seconds(title, args, cold, found)
    model = common.add_lora(network(), args.lora_rank, args.lora_vision).eval()
    print_sampling(title, model, processor, rows, own)
    print_policy(title, model, processor, rows, own, args)
    print_decoding(title, model, processor, rows, own)
    print_leaving(title, model, processor, rows, own)
    print_adapters_in_training(title, model, processor, rows, own, args)
    print_patches(title, common.network(model).model.visual.patch_embed.proj)
    if importlib.util.find_spec("trl") and own.device == "cuda":
        print_losses(title, common.network(model).lm_head, args)


def print_memory(title, args, cold, words, rows, processor, found):
    """Predicted and measured peaks by phase."""
    pictures = [gen_data.open_picture(row.path) for row in rows]
    prompts = common.encode(processor, [row.student_prompt() for row in rows], pictures)
    answers, _ = common.encode_responses(processor, [row.answers(("map",)) for row in rows])
    head(f"Memory, {title}: rollout batch {args.rollout_batch}, micro-batch {args.micro_batch}, "
         f"{args.max_new_tokens} new tokens; GB of torch's allocator",
         "stage", "phase", "predicted", "measured", "ratio")
    compared = [(distill, "sample", ("sampling",)), (distill, "student", ("loss", "backward")),
                (coldstart, "loss", ("cold start",))]
    for stage, phase, parts in compared:
        batch = args.batch if stage is distill else cold.batch
        about = estimate.parse_args([
            *words, "--batch", str(batch), "--prompt_tokens", str(prompts["input_ids"].shape[1]),
            "--answer_tokens", str(answers.shape[1])])
        _, throughout, phases = estimate.parts(about, estimate.count_weights(about))
        needed = max(estimate.total(some) for name, some in phases.items()
                     if name.startswith(parts))
        predicted = estimate.total(throughout) - estimate.CUDA_BYTES + needed
        peak = found[stage][1].get(phase) if found[stage] else None
        line(stage.__name__, phase, f"{predicted / 1e9:.2f}", f"{peak / 1e9:.2f}" if peak else "-",
             f"{predicted / peak:.2f}" if peak else "-")
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        print(f"\nOf the card's {total / 1e9:.1f} GB, {(total - free) / 1e9:.1f} are taken when no "
              "tensor is there: CUDA's own, and whatever else runs on it.")


def print_seconds(title, args, cold, found):
    """Seconds of one step by phase, and the hours of the default run at that pace."""
    head(f"Seconds of a step, {title}: {args.batch} rows (cold start: {cold.batch})",
         "stage", "phase", "s")
    hours = []
    for stage, own in ((coldstart, cold), (distill, args)):
        seconds = found[stage][0] if found[stage] else {"out of memory": float("nan")}
        for phase, value in [*seconds.items(), ("all", sum(seconds.values()))]:
            line(stage.__name__, phase, f"{value:.2f}")
        hours.append(own.steps * sum(seconds.values()) / 3600)
    print(f"\nAt these sizes {cold.steps} steps of the cold start and {args.steps} of "
          f"distillation take at most {hours[0]:.1f} + {hours[1]:.1f} hours, validation and the "
          f"evaluation not counted: at most, for every response here has {args.max_new_tokens} "
          "tokens.")


def print_sampling(title, model, processor, rows, own):
    """Tokens a second, the first pass over the prompts included."""
    head(f"Sampling, {title}: {own.new_tokens} new tokens", "rollout batch",
         "tokens/s, adapters on", "tokens/s, adapters off")
    for batch in own.rollout_batches:
        chosen = [rows[i % len(rows)] for i in range(batch)]
        prompt, _ = distill.encode_roles(processor, chosen, "picture", model.device)
        uniforms, cells = np.random.default_rng(0).random((batch, own.new_tokens)), []

        def sample(prompt=prompt, uniforms=uniforms):
            common.sample(model, processor, prompt, own.new_tokens, uniforms)
        for adapters in (nullcontext, model.disable_adapter):
            with adapters():
                got = attempt(measured, sample)
            cells.append(f"{batch * own.new_tokens / got[0]:.0f}" if got else "out of memory")
        line(batch, *cells)


def print_policy(title, model, processor, rows, own, args):
    """How far tokens' scores are from the log-probabilities that they were drawn with."""
    batch = own.rollout_batches[-1]
    chosen = [rows[i % len(rows)] for i in range(batch)]
    prompt, _ = distill.encode_roles(processor, chosen, "picture", model.device)
    uniforms = np.random.default_rng(0).random((batch, own.new_tokens))
    weights = common.adapter_weights(model)
    ups = [weight for weight in weights if not weight.any()]  # lora_B of a fresh adapter
    for weight in ups:
        weight.data.normal_(std=0.01)
    sampled = common.sample(model.eval(), processor, prompt, own.new_tokens, uniforms)
    lm_head, gaps = common.head(model), []
    for ids, mask, drawn, part in common.micro_batches(args.micro_batch, sampled, (prompt,)):
        with torch.no_grad():
            hidden = common.response_hidden(model.train(), part, ids, mask)
        valid, ones = mask.bool(), hidden.new_ones(len(hidden))
        _, scores = distill.chunked_divergence(hidden, hidden, ids[valid], drawn[valid], ones,
                                               lm_head, lm_head, distill.reverse_kl, args.chunk)
        gaps += [gap.mean().item() for gap in scores[3].split(mask.sum(1).tolist())]
    print(f"\nSampling and scoring, {title}, adapters far from zero: a token's log-probability "
          f"differs by {np.mean(gaps):.2g} nats, in the worst row by {max(gaps):.2g} (the log's "
          "sampling_gap).")
    model.eval()
    for weight in ups:
        weight.data.zero_()


def print_leaving(title, model, processor, rows, own):
    """When do rows that ended leave the batch? Each time costs an eager step and a new capture.

    Random weights hardly ever end, so one token in so many of the vocabulary is taken for an EOS
    that rows last about half of the tokens on average.
    """
    batch, tokens = own.rollout_batches[-1], 4 * own.new_tokens
    chosen = [rows[i % len(rows)] for i in range(batch)]
    prompt, _ = distill.encode_roles(processor, chosen, "picture", model.device)
    uniforms = np.random.default_rng(0).random((batch, tokens))
    vocabulary = common.network(model).config.text_config.vocab_size
    ends = torch.arange(0, vocabulary, max(1, tokens // 2), device=model.device)
    head(f"Rows leave the batch, {title}: {batch} rows, at most {tokens} tokens", "when", "s")
    makers, interval = common.decoder_of(common.network(model))
    for share in (1 / 2, 3 / 4):
        class Leaving(makers):
            def wants_to_drop(self, going, share=share):
                return going.sum() <= share * len(going)
        with (mock.patch.object(common, "eos_tokens", lambda *words: ends),
              mock.patch.object(common, "decoder_of", lambda net, own=Leaving: (own, interval))):
            got = attempt(measured, partial(
                common.sample, model, processor, prompt, tokens, uniforms))
        line(f"{1 - share:.0%} have ended", f"{got[0]:.2f}" if got else "out of memory")


def print_adapters_in_training(title, model, processor, rows, own, args):
    """A micro-batch forward and backward: PEFT's forward, and two products as in sampling."""
    chosen = [rows[i % len(rows)] for i in range(args.micro_batch)]
    prompt, _ = distill.encode_roles(processor, chosen, "picture", model.device)
    ids = torch.zeros(len(chosen), own.new_tokens, dtype=torch.long, device=model.device)
    mask = torch.ones_like(ids)

    def both_ways(adapters):
        model.train()
        with adapters():  # around both passes, since the casts are part of the graph
            common.response_hidden(model, prompt, ids, mask).sum().backward()
        model.zero_grad()

    def two_products(base, down, up, x):  # not in place: there is a gradient
        return base(x) + torch.nn.functional.linear(x, down) @ up
    head(f"Adapters in training, {title}: {len(chosen)} rows of {own.new_tokens} tokens",
         "adapters", "s")
    for name, adapters in (("PEFT's forward", nullcontext),
                           ("two products", partial(common.light_adapters, model))):
        with mock.patch.object(common, "light_forward", two_products):
            got = attempt(measured, partial(both_ways, adapters))
        line(name, f"{got[0]:.3f}" if got else "out of memory")
    model.eval()


def print_patches(title, conv, patches=8192):
    """The vision tower's patch embedding, as the convolution that it is and as a product."""
    x = torch.randn(patches, *conv.weight.shape[1:], dtype=conv.weight.dtype,
                    device=conv.weight.device)
    head(f"Patch embedding, {title}: {patches} patches", "as", "ms")
    for name, work in (("Conv3d", partial(type(conv).forward, conv)),
                       ("a product (common.embed_patches)", partial(common.embed_patches, conv))):
        with torch.no_grad():
            work(x)
            begin = synchronised()
            for _ in range(10):
                work(x)
        line(name, f"{100 * (synchronised() - begin):.2f}")


@contextmanager
def dequantised(model):
    """While it lasts, light adapters on 16-bit copies of the 4-bit weights."""
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit
    held = [module for module in model.modules() if isinstance(module, Linear4bit)]
    for module in held:
        weight = dequantize_4bit(module.weight.data, module.weight.quant_state)
        module.forward = partial(torch.nn.functional.linear, weight=weight)
    try:
        with common.light_adapters(model):
            yield
    finally:
        for module in held:
            del module.forward


def print_facts(own):
    """An NF4 linear on this device against the same weights in float64."""
    from bitsandbytes.functional import dequantize_4bit
    layer = random_nf4(torch.nn.Linear(512, 256, device="meta"), own.device)
    x = torch.randn(7, 512, device=own.device, dtype=common.compute_dtype(4), requires_grad=True)
    y = layer(x)
    y.float().square().sum().backward()
    weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state).double().cpu()
    exact = x.detach().double().cpu().requires_grad_()
    z = exact @ weight.T                                                       # [7, 256]
    z.square().sum().backward()
    head("An NF4 linear against float64 (bf16 has 1e-3 to 1e-2)", "of", "relative error")
    for name, ours, theirs in (("output", y, z), ("gradient", x.grad, exact.grad)):
        error = (ours.detach().double().cpu() - theirs.detach()).norm() / theirs.detach().norm()
        line(name, f"{error.item():.1e}")


def print_decoding(title, model, processor, rows, own):
    """One token more, by each way of decoding: time, and what Python launches for it."""
    batch = own.rollout_batches[-1]
    chosen = [rows[i % len(rows)] for i in range(batch)]
    prompt, _ = distill.encode_roles(processor, chosen, "picture", model.device)
    head(f"Decoding, {title}: {batch} rows, the network alone", "how", "adapters", "ms a token",
         "tokens/s", "launches (CPU: operators) a token", "waits a token")
    graph = [common.GraphDecoder] if own.device == "cuda" else []
    for decoder in (common.Decoder, *graph):
        for adapters, context in (("PEFT's forward", nullcontext),
                                  ("light", partial(common.light_adapters, model)),
                                  ("off", model.disable_adapter),
                                  ("light, 16-bit weights held", partial(dequantised, model))):
            if adapters.endswith("held") and not model.base_model.model.is_loaded_in_4bit:
                continue
            with torch.no_grad(), context():
                got = attempt(decoding, decoder, model, prompt, own.new_tokens)
            cells = ("out of memory", "-", "-", "-")
            if got:
                cells = f"{1000 * got[0]:.1f}", f"{batch / got[0]:.0f}", *got[1:]
            line(decoder.__name__, adapters, *cells)


def decoding(make_decoder, model, prompt, tokens):
    """(seconds a token, launches of one, waits of the host for one) after a few to warm up."""
    decoder = make_decoder(common.network(model), prompt, tokens + 6)
    token, counts = decoder.logits.argmax(-1), []
    for _ in range(3):  # the third one replays a graph
        decoder.step(token)
    kinds, launched = [torch.profiler.ProfilerActivity.CPU], ("aten::",)
    if torch.cuda.is_available():
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
        launched = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch")
    for steps in (1, 2):  # the difference is one step: the profiler waits too
        with torch.profiler.profile(activities=kinds) as profile:
            for _ in range(steps):
                decoder.step(token)
        names = [event.name for event in profile.events()]
        counts.append((sum(name.startswith(launched) for name in names),
                       sum("ynchronize" in name for name in names)))
    begin = synchronised()
    for _ in range(tokens):
        decoder.step(token)
    seconds = (synchronised() - begin) / tokens
    return seconds, counts[1][0] - counts[0][0], counts[1][1] - counts[0][1]


def synchronised():
    """The time, when the device has done all its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def print_losses(title, lm_head, args):
    """Our chunked loss beside TRL's chunked divergence, which on CUDA is a Triton kernel."""
    from trl.trainer.distillation_trainer import _chunked_divergence_loss
    N, weight = args.micro_batch * args.max_new_tokens, lm_head.weight
    hidden, teacher = (torch.randn(N, lm_head.in_features, dtype=weight.dtype, device=weight.device)
                       for _ in range(2))
    token = torch.randint(lm_head.out_features, (N,), device=weight.device)
    ones = hidden.new_ones(N)

    def ours(chunk):
        distill.chunked_divergence(hidden, teacher, token, ones, ones, lm_head, lm_head,
                                   distill.reverse_kl, chunk)

    def trl():
        leaf, mask = hidden[None].clone().requires_grad_(), torch.ones(1, N, device=weight.device)
        _chunked_divergence_loss(leaf, teacher[None], weight, weight, mask, 1.0)[0].backward()
    works = {f"ours, chunks of {chunk}": partial(ours, chunk) for chunk in (32, 64, 128, 512)}
    head(f"The loss and its gradient, {title}: {N} positions", "how", "s", "peak GB over before")
    for name, work in {**works, "TRL's chunked divergence": trl}.items():
        got = attempt(measured, work)
        line(name, *((f"{got[0]:.3f}", f"{got[1] / 1e9:.3f}") if got else ("out of memory", "-")))


def print_row(run):
    """Card, hours of both trainings and success from pictures, as a line of docs/gpu.md's table.

    run: a folder with coldstart/, distill/ and eval/.
    """
    hours, rates = 0.0, []
    with gen_data.in_one_line(f"--row {run}"):
        for stage in evaluate.STAGES[1:]:
            record = json.loads(Path(run, stage, "args.json").read_text(encoding="utf-8"))
            log = read_lines(Path(run, stage, "metrics.jsonl"))
            hours += sum(line.get("step_seconds", 0) for line in log) / 3600
        results = json.loads(Path(run, "eval/results.json").read_text(encoding="utf-8"))
        for stage in evaluate.STAGES:
            table = results["conditions"][f"{stage}-image"]["table"]
            whole = next(row for row in table if row["task"] == "macro" and not row["bucket"])
            rates.append(f"{percent(whole['success'])}%")
        line(record["versions"]["device"], f"{hours:.2f}", " -> ".join(rates))


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--presets", nargs="+", default=["4b"], choices=("2b", "4b", "8b"))
    add("--bits", nargs="+", type=int, default=[4], choices=(4, 16))
    add("--device", default="cuda", choices=("cuda", "cpu"))
    add("--tiny", action="store_true", help="bundled sizes and a short step: does it all run?")
    add("--quick", action="store_true", help="steps of 8 rows, 32 rows of 32 tokens sampled: by "
        "its launches about 3 minutes on an RTX 4090, 5 to 6 where the CPU is slow")
    add("--rollout_batches", nargs="+", type=int, help="of the table of tokens a second (default: "
        "4 8 16 32 64, with --quick 32)")
    add("--new_tokens", type=int, default=64, help="of the table of tokens a second")
    add("--row", metavar="RUN", help="print the line of a run, with an evaluation in RUN/eval, for "
        "docs/gpu.md's table, and stop")
    args, args.settings = parser.parse_known_args(argv)  # the rest: flags of both stages
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the scripts take a card where there is one
    elif not args.row and not torch.cuda.is_available():
        gen_data.fail("no CUDA device: --device cpu --tiny runs the same code on a small model")
    args.rollout_batches = args.rollout_batches or ([32] if args.quick else [4, 8, 16, 32, 64])
    if args.quick:
        args.new_tokens = 32
        args.settings += ["--batch", "8", "--max_new_tokens", "128"]
    if args.tiny:
        args.presets, args.rollout_batches, args.new_tokens = ["tiny"], [2, 4], 4
        args.settings += ["--batch", "4", "--micro_batch", "2", "--rollout_batch", "4",
                          "--max_new_tokens", "8"]
    return args


def main(args):
    if args.row:
        return print_row(args.row)
    torch.manual_seed(0)
    versions = ", ".join(f"{name} {value}" for name, value in common.versions().items())
    print(f"{versions}; random weights, pictures of 256x256")
    if 4 in args.bits:
        print_facts(args)
    with tempfile.TemporaryDirectory() as folder:
        data = f"{folder}/data"
        with redirect_stdout(io.StringIO()):
            gen_data.main(gen_data.parse_args([
                "--preset", args.presets[0], "--train", "8", "--val", "1", "--test", "1",
                "--image_size", "256", "--out", data]))
        for preset in args.presets:
            for bits in args.bits:
                measure_model(preset, bits, data, args)


if __name__ == "__main__":
    main(parse_args())
