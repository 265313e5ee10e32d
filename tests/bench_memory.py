"""Predicted and measured peak memory of one distillation step, on the CPU, with 151,936 words.

    python tests/bench_memory.py                # Markdown; minutes a line on a busy machine
    python tests/bench_memory.py --cases 0 4    # only these lines

Each line is a fresh process that builds a Qwen3-VL with random weights, takes one step on it with
distill.main (sampling, teacher, student, loss, optimizer), and then asks tools/estimate.py about
the same step. Random weights hardly ever draw the end token, so the responses have full length, as
the estimate assumes. "measured" is the highest resident memory during the step over what the
process held before, after its imports and a step of the bundled backbone (which loads what torch
and transformers load late). glibc is told to give freed blocks back at once
(MALLOC_MMAP_THRESHOLD_), or the high-water mark would be that of its cache. Linux only.
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
sys.path.insert(0, str(ROOT))
# vision: adapters on the vision tower too; tied: one matrix for embeddings and lm_head
FIELDS = "bits hidden layers rows rollout new slice vision tied".split()
CASES = [
    (32, 128, 4, 8, 8, 128, 128, 0, 1),
    (32, 256, 6, 8, 8, 128, 128, 0, 1),
    (32, 512, 8, 8, 8, 128, 64, 0, 1),
    (32, 512, 8, 8, 8, 128, 32, 0, 0),
    (32, 512, 8, 24, 24, 48, 16, 0, 1),
    (32, 256, 6, 16, 16, 64, 16, 1, 1),
    (32, 512, 8, 4, 48, 48, 16, 0, 1),
    (16, 512, 8, 8, 8, 128, 64, 0, 1),
    (16, 512, 8, 24, 24, 48, 16, 0, 1),
    (4, 512, 8, 8, 8, 128, 64, 0, 1),
    (4, 512, 8, 24, 24, 48, 16, 0, 1),
]


def build(folder, hidden, layers, tied):
    """A checkpoint of the bundled backbone's kind, wider and deeper, with Qwen's vocabulary."""
    import torch
    from transformers import AutoProcessor, Qwen3VLConfig, Qwen3VLForConditionalGeneration
    config = Qwen3VLConfig.from_pretrained(ROOT / "tiny")
    config.text_config.update(dict(
        hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
        num_attention_heads=hidden // 32, num_key_value_heads=hidden // 128, head_dim=64,
        vocab_size=151_936))
    config.vision_config.out_hidden_size = hidden
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = bool(tied)
    torch.manual_seed(0)
    Qwen3VLForConditionalGeneration(config).save_pretrained(folder)
    AutoProcessor.from_pretrained(ROOT / "tiny").save_pretrained(folder)


def resident(field):
    """VmRSS (now) or VmHWM (at most) of this process, bytes."""
    for line in open("/proc/self/status"):
        if line.startswith(field):
            return int(line.split()[1]) * 1024


def measure(folder, work, case):
    """Take the step, then ask for the estimate -> what was measured and predicted, in bytes."""
    import common
    import distill
    from tools import estimate
    case, widths, encode = dict(zip(FIELDS, case, strict=True)), [], common.encode

    def noting_width(*args, **settings):
        batch = encode(*args, **settings)
        widths.append(batch["input_ids"].shape[1])
        return batch

    def step(model, rows, *more):
        return [*map(str, [
            "--preset", "tiny", "--model", model, "--lora_vision", case["vision"],
            "--micro_batch", rows, *more])]
    files = ["--init", "none", "--data", f"{work}/data", "--out", f"{work}/out", "--restart",
             "--steps", "1"]
    warm_up = step(common.TINY, 2, "--batch", 2, "--max_new_tokens", 2)
    words = step(folder, case["rows"], "--batch", max(case["rows"], case["rollout"]),
                 "--rollout_batch", case["rollout"], "--bits", case["bits"],
                 "--max_new_tokens", case["new"], "--slice", case["slice"])
    common.encode = noting_width
    distill.main(distill.parse_args([*warm_up, *files]))
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # starts VmHWM anew
    distill.main(distill.parse_args([*words, *files]))
    measured = resident("VmHWM") - before
    student, teacher = widths[-2:]
    args = estimate.parse_args([*words, "--device", "cpu",
                                "--prompt_tokens", str(student), str(teacher)])
    _, phases, predicted = estimate.main(args)
    worst = max(phases, key=lambda name: sum(phases[name].values()))
    return dict(measured=measured, predicted=predicted, prompts=f"{student}, {teacher}",
                worst=worst)


def main(args):
    environment = dict(os.environ, MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TRIM_THRESHOLD_="65536")
    columns = [*FIELDS, "prompts", "at its worst", "predicted GB", "measured GB", "ratio"]
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    with tempfile.TemporaryDirectory() as work:
        subprocess.run(
            [sys.executable, ROOT / "gen_data.py", "--preset", "tiny", "--out", f"{work}/data",
             "--image_size", "256", "--train", "16", "--val", "2", "--test", "2"],
            check=True, capture_output=True)
        for number in args.cases:
            case = CASES[number]
            build(f"{work}/model", case[1], case[2], case[-1])
            run = subprocess.run(
                [sys.executable, __file__, "--measure", work, "--cases", str(number)],
                env=environment, capture_output=True, text=True)
            if run.returncode:
                sys.exit(run.stderr[-3000:])
            out = json.loads(run.stdout)
            line = [*case, out["prompts"], out["worst"], f"{out['predicted'] / 1e9:.2f}",
                    f"{out['measured'] / 1e9:.2f}", f"{out['predicted'] / out['measured']:.2f}"]
            print("| " + " | ".join(map(str, line)) + " |", flush=True)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--cases", type=int, nargs="+", default=range(len(CASES)), help="these lines, from 0")
    add("--measure", help=argparse.SUPPRESS)  # the fresh process, in this folder
    return parser.parse_args(argv)


if __name__ == "__main__":
    arguments = parse_args()
    if arguments.measure:
        with redirect_stdout(io.StringIO()):
            found = measure(f"{arguments.measure}/model", arguments.measure,
                            CASES[arguments.cases[0]])
        print(json.dumps(found))
    else:
        main(arguments)
