"""Predicted and measured peak memory of one distillation step, on the CPU, with Qwen's 151,936 words.

    python tests/bench_memory.py                # a table on stdout; minutes a line on a busy machine

Each line is a fresh process that builds a Qwen3-VL with random weights, takes one step on it with distill.main
(sampling, teacher, student, loss, optimizer), and then asks `--estimate cpu` about the same step. Random weights
hardly ever draw the end token, so the responses have full length, as the estimate assumes.
"measured" is the highest resident memory during the step over what the process held before, after its imports and
a step of the bundled backbone (which loads what torch and transformers load late). glibc is told to give freed
blocks back at once (MALLOC_MMAP_THRESHOLD_), or the high-water mark would be that of its cache.
"""
import argparse
import io
import json
import os
import subprocess
import sys
import tempfile
from contextlib import redirect_stdout
from pathlib import Path

ROOT = Path(__file__).parents[1]
FIELDS = "bits hidden layers rows new slice vision tied".split()
CASES = [  # vision: adapters on the vision tower too; tied: one matrix for embeddings and lm_head
    (32, 128, 4, 8, 128, 128, 0, 1),
    (32, 256, 6, 8, 128, 128, 0, 1),
    (32, 512, 8, 8, 128, 128, 0, 1),
    (32, 512, 8, 8, 128, 32, 0, 0),
    (32, 512, 8, 24, 48, 16, 0, 1),
    (32, 256, 6, 16, 64, 16, 1, 1),
    (16, 512, 8, 8, 128, 128, 0, 1),
    (16, 512, 8, 24, 48, 16, 0, 1),
    (4, 512, 8, 8, 128, 128, 0, 1),
    (4, 512, 8, 24, 48, 16, 0, 1),
]


def build(folder, hidden, layers, tied):
    """A checkpoint of the bundled backbone's kind, wider and deeper, with Qwen's vocabulary and random weights."""
    import torch
    from transformers import AutoProcessor, Qwen3VLConfig, Qwen3VLForConditionalGeneration
    config = Qwen3VLConfig.from_pretrained(ROOT / "tiny")
    config.text_config.update(dict(
        hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers, num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 128, head_dim=64, vocab_size=151_936))
    config.vision_config.out_hidden_size = hidden
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = bool(tied)
    torch.manual_seed(0)
    Qwen3VLForConditionalGeneration(config).save_pretrained(folder)
    AutoProcessor.from_pretrained(ROOT / "tiny").save_pretrained(folder)


def resident(field):
    """VmRSS (now) or VmHWM (at most) of this process, bytes."""
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(field))


def child(folder, work, case):
    """Take the step, then ask for the estimate; one JSON line on stdout."""
    sys.path.insert(0, str(ROOT))
    import common
    import distill
    case, widths, encode = dict(zip(FIELDS, case)), [], common.encode
    common.encode = lambda *a, **k: widths.append((batch := encode(*a, **k))["input_ids"].shape[1]) or batch

    def words(model, batch, *more):
        return [*map(str, ["--preset", "tiny", "--model", model, "--init", "none", "--data", f"{work}/data", "--steps", 1,
                           "--out", f"{work}/out", "--restart", "--batch", batch, "--micro_batch", batch,
                           "--lora_vision", case["vision"], *more])]
    same = words(folder, case["rows"], "--bits", case["bits"], "--max_new_tokens", case["new"], "--slice", case["slice"])
    with redirect_stdout(io.StringIO()):
        distill.main(distill.parse_args(words(common.TINY, 2, "--max_new_tokens", 2)))
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # starts VmHWM anew
        distill.main(distill.parse_args(same))
        measured = resident("VmHWM") - before
        student, teacher = widths[-2:]
        held, moments, predicted = distill.main(distill.parse_args(
            [*same, "--estimate", "cpu", "--prompt_tokens", str(student), str(teacher)]))
    print(json.dumps(dict(measured=measured, predicted=predicted, prompts=(student, teacher),
                          worst=max(moments, key=lambda name: sum(moments[name].values())))))


def main(args):
    environment = dict(os.environ, MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TRIM_THRESHOLD_="65536", OMP_NUM_THREADS="2")
    columns = [*FIELDS, "prompts", "at its worst", "predicted GB", "measured GB", "predicted / measured"]
    print("| " + " | ".join(columns) + " |")
    print("|" + "---|" * len(columns))
    with tempfile.TemporaryDirectory() as work:
        subprocess.run([sys.executable, ROOT / "gen_data.py", "--preset", "tiny", "--out", f"{work}/data", "--image_size", "256",
                        "--train", "16", "--val", "2", "--test", "2"], check=True, capture_output=True)
        for case in [CASES[i] for i in args.cases]:
            folder = f"{work}/model"
            build(folder, case[1], case[2], case[7])
            run = subprocess.run([sys.executable, __file__, "--child", folder, work, *map(str, case)], env=environment,
                                 capture_output=True, text=True)
            if run.returncode:
                sys.exit(run.stderr[-3000:])
            out = json.loads(run.stdout.splitlines()[-1])
            print("| " + " | ".join(map(str, [
                *case, "{}, {}".format(*out["prompts"]), out["worst"], f"{out['predicted'] / 1e9:.2f}",
                f"{out['measured'] / 1e9:.2f}", f"{out['predicted'] / out['measured']:.2f}"])) + " |", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], sys.argv[3], [*map(int, sys.argv[4:])])
    else:
        parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
        parser.add_argument("--cases", type=int, nargs="+", default=range(len(CASES)), help="only these lines, from 0")
        main(parser.parse_args())
