"""The step in NF4 on a CUDA device: `python -m pytest -m gpu`.

Without CUDA these are skipped and say so; that bench_gpu.py runs, and builds the network that
common.load would load, is tested everywhere.
"""
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from bench_distill import qwen_checkpoint
from bench_gpu import random_network

import coldstart
import common
import distill
import gen_data
from tools import estimate

ROOT = Path(__file__).parents[1]
CUDA = torch.cuda.is_available()
needs_cuda = pytest.mark.skipif(not CUDA, reason="no CUDA device")


# ---------------------------------------------------------------- everywhere

@pytest.mark.parametrize("bits", [4, 16])
def test_random_weights_are_put_where_load_puts_them(bits):
    """The same modules, names, shapes, precisions and kinds of adapters as a loaded checkpoint."""
    loaded = common.load(common.TINY, bits)[0]
    made = random_network(estimate.configuration(common.TINY), bits, loaded.device)
    facts = []
    for model in (loaded, made):
        weights = {name: (tuple(weight.shape), weight.dtype, type(weight).__name__)
                   for name, weight in model.state_dict().items() if "quant_state" not in name}
        buffers = {name: buffer for name, buffer in model.named_buffers()}
        model = common.add_lora(model, 4)
        kinds = {name: type(module).__name__ for name, module in model.named_modules()}
        facts.append((weights, kinds, sorted(buffers)))
        for name, buffer in buffers.items():
            assert torch.equal(buffer, dict(loaded.named_buffers())[name]), name
    assert facts[0] == facts[1]
    assert bits != 4 or "Linear4bit" in " ".join(facts[0][1].values())


def test_the_bench_runs_on_the_cpu():
    done = subprocess.run(
        [sys.executable, ROOT / "tests/bench_gpu.py", "--device", "cpu", "--tiny", "--quick",
         "--bits", "4"],
        capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for title in ("Memory, tiny in 4 bits", "Seconds of a step", "Sampling",
                  "Sampling and scoring", "Decoding", "16-bit weights held", "Patch embedding",
                  "An NF4 linear", "At these sizes"):
        assert title in done.stdout
    for phase in ("| distill | sample |", "| coldstart | loss |"):
        line = next(line for line in done.stdout.splitlines() if line.startswith(phase))
        assert float(line.split("|")[3]) > 0


# ---------------------------------------------------------------- on CUDA

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small checkpoint with the real vocabulary, and rows."""
    folder = tmp_path_factory.mktemp("gpu")
    qwen_checkpoint(folder / "qwen", layers=3)
    gen_data.main(gen_data.parse_args([
        "--preset", "tiny", "--train", "8", "--val", "2", "--test", "1", "--image_size", "256",
        "--out", str(folder / "data")]))
    return folder


def words(folder, stage, out, *more):
    flags = {"coldstart": ["--eval_every", 100],
             "distill": ["--init", "none", "--eval_every", 0]}[stage]
    return [*map(str, [
        "--preset", "tiny", "--model", folder / "qwen", "--bits", 4, "--data", folder / "data",
        "--out", folder / out, "--batch", 8, "--micro_batch", 4, "--max_new_tokens", 24,
        *flags, *more])]


def log_of(folder, out):
    return [json.loads(line) for line in (folder / out / "metrics.jsonl").read_text().splitlines()]


def trained_batch(folder, model, processor):
    """What both stages read of some rows: (pictures, symbols, reference responses' ids, mask)."""
    rows = gen_data.load_rows(folder / "data", "train")
    rows = distill.draw_rows(rows, 4, np.random.default_rng(0))
    roles = distill.encode_roles(processor, rows, "symbols+plan", model.device)
    texts = [row.response() for row in rows]
    return *roles, *common.encode_responses(processor, texts, model.device)


def both_losses(model, prompt, symbols, ids, mask):
    """({stage: loss}, {stage: adapters' gradient as one vector}), means over the tokens."""
    losses, gradients = {}, {}
    weights, net, tokens = common.adapter_weights(model), common.network(model), int(mask.sum())
    model.train()
    for stage in ("coldstart", "distill"):
        model.zero_grad()
        if stage == "coldstart":
            loss = coldstart.answer_loss(model, prompt, ids, mask) / tokens
            loss.backward()
            losses[stage] = loss.item()
        else:
            with torch.no_grad(), model.disable_adapter():
                teacher = common.response_hidden(model, symbols, ids, mask)
            hidden = common.response_hidden(model, prompt, ids, mask)
            ones = hidden.new_ones(tokens)
            gradient, scores = distill.chunked_divergence(
                hidden, teacher, ids[mask.bool()], ones, ones, net.lm_head, net.lm_head,
                distill.reverse_kl, 64)
            hidden.backward(gradient / tokens)
            losses[stage] = scores[0].mean().item()
        gradients[stage] = torch.cat([w.grad.flatten().float().cpu() for w in weights])
    return losses, gradients


def in_32_bits(model, path):
    """The checkpoint on the CPU in float32, its weights those that the 4-bit `model` stands for."""
    from bitsandbytes.functional import dequantize_4bit
    from transformers import Qwen3VLForConditionalGeneration
    exact = Qwen3VLForConditionalGeneration.from_pretrained(path, dtype=torch.float32)
    values = {}
    for name, weight in model.named_parameters():
        value = weight.data
        if hasattr(weight, "quant_state"):
            value = dequantize_4bit(value, weight.quant_state)
        values[name] = value.float().cpu()
    exact.load_state_dict(values, strict=False)
    exact.tie_weights()
    return exact.requires_grad_(False).eval()


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("stage", ["coldstart", "distill"])
def test_a_step_in_nf4(folder, stage):
    module = {"coldstart": coldstart, "distill": distill}[stage]
    module.main(module.parse_args(words(folder, stage, f"step-{stage}", "--steps", 1)))
    line, = log_of(folder, f"step-{stage}")
    assert np.isfinite(line["loss"]) and line["grad_norm"] > 0
    assert (folder / f"step-{stage}/adapter/adapter_model.safetensors").is_file()


@pytest.mark.gpu
@needs_cuda
def test_losses_and_gradients_are_those_of_32_bits(folder, tmp_path):
    model, processor = common.load(str(folder / "qwen"), 4)
    exact = in_32_bits(model, folder / "qwen")
    torch.manual_seed(0)
    model = common.add_lora(model, 8, True)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)
    model.save_pretrained(tmp_path)
    exact = common.add_lora(exact, path=tmp_path)
    found = both_losses(model, *trained_batch(folder, model, processor))
    wanted = both_losses(exact, *trained_batch(folder, exact, processor))
    for stage in wanted[0]:
        assert found[0][stage] == pytest.approx(wanted[0][stage], rel=0.03)
        ours, theirs = found[1][stage], wanted[1][stage]
        assert torch.cosine_similarity(ours, theirs, dim=0) > 0.98
        assert float(ours.norm()) == pytest.approx(float(theirs.norm()), rel=0.05)


@pytest.mark.gpu
@needs_cuda
def test_without_adapters_training_has_changed_nothing(folder):
    """And with them it has. Bit for bit: the quantised weights are untouched."""
    model, processor = common.load(str(folder / "qwen"), 4)
    model = common.add_lora(model, 8, True)
    weights = common.adapter_weights(model)
    batch, optimizer = trained_batch(folder, model, processor), common.adamw(weights, 1e-2)

    def states():
        model.eval()
        prompt, _, ids, mask = batch
        with torch.no_grad():
            adapted = common.response_hidden(model, prompt, ids, mask)
            with model.disable_adapter():
                return adapted, common.response_hidden(model, prompt, ids, mask)
    before = states()
    for _ in range(2):
        both_losses(model, *batch)
        optimizer.step()
    after = states()
    assert torch.equal(before[1], after[1]) and not torch.equal(before[0], after[0])


@pytest.mark.gpu
@needs_cuda
def test_sampled_tokens_are_scored_as_they_were_sampled(folder):
    """The probability that a token was drawn with is the one that it is scored with."""
    model, processor = common.load(str(folder / "qwen"), 4)
    model = common.add_lora(model, 8, True)
    prompt, *_ = trained_batch(folder, model, processor)
    uniforms = np.random.default_rng(0).random((4, 24))
    ids, mask, drawn = common.sample(model, processor, prompt, 24, uniforms)
    with torch.no_grad():
        hidden = common.response_hidden(model, prompt, ids, mask)
        log_p = common.network(model).lm_head(hidden).float().log_softmax(-1)
    scored = log_p.gather(1, ids[mask.bool()][:, None])[:, 0]
    assert (scored - drawn[mask.bool()]).abs().mean() < 0.05           # rounding in bf16
    assert log_p.isfinite().all()


@pytest.mark.gpu
@needs_cuda
def test_out_of_memory_is_survived(folder, capsys):
    """A chunk of all positions does not fit; the same command with a small one resumes."""
    _, total = torch.cuda.mem_get_info()
    torch.cuda.empty_cache()
    flags = ["--steps", 2, "--save_every", 1, "--batch", 16, "--micro_batch", 16,
             "--max_new_tokens", 96]
    torch.cuda.set_per_process_memory_fraction(1.5e9 / total)
    try:
        with pytest.raises(SystemExit) as stop:
            arguments = words(folder, "distill", "oom", *flags, "--chunk", 100_000)
            common.run_script(lambda: distill.parse_args(arguments), distill.main)
        assert stop.value.code == 2 and "memory does not suffice" in capsys.readouterr().err
        distill.main(distill.parse_args(words(folder, "distill", "oom", *flags, "--chunk", 16)))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert [line["step"] for line in log_of(folder, "oom")] == [1, 2]


@pytest.mark.gpu
@needs_cuda
def test_kill_and_resume(folder):
    command = [sys.executable, ROOT / "distill.py",
               *words(folder, "distill", "killed", "--steps", 40, "--save_every", 2)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (folder / "killed/checkpoint.pt").is_file():
        assert process.poll() is None, "it ended before the first checkpoint"
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = torch.load(folder / "killed/checkpoint.pt", weights_only=True)["step"]
    command[command.index("40")] = str(kept + 2)
    subprocess.run(command, check=True, capture_output=True)
    steps = [line["step"] for line in log_of(folder, "killed")]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) == int(command[-3])
    assert (folder / "killed/adapter").is_dir()
