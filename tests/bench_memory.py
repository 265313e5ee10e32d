"""Predicted and measured peak memory of one step of a stage, on the CPU, with 151,936 words.

    python tests/bench_memory.py                # Markdown; minutes a line on a busy machine
    python tests/bench_memory.py --cases 0 4    # only these lines

Each line is a fresh process that builds a Qwen3-VL with random weights, takes one step on it with
the stage's main, and then asks tools/estimate.py about the same step. Random weights hardly ever
draw an EOS, so rollouts have full length, as the estimate assumes; the cold start's
validation is left out. "measured" is the highest resident memory during the step over what
the process held before, after its imports and a step of the bundled backbone (which loads what
torch and transformers load late). glibc is told to give freed blocks back at once
(MALLOC_MMAP_THRESHOLD_), or the high-water mark would be that of its cache, and torch to take small
pages (THP_MEM_ALLOC_ENABLE), or every block would be rounded up to 2 MB. Linux only.
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
FIELDS = "stage bits hidden layers rows rollout new chunk vision tied".split()
CASES = [
    ("distill", 32, 128, 4, 8, 8, 128, 128, 0, 1),
    ("distill", 32, 256, 6, 8, 8, 128, 128, 0, 1),
    ("distill", 32, 512, 8, 8, 8, 128, 64, 0, 1),
    ("distill", 32, 512, 8, 8, 8, 128, 32, 0, 0),
    ("distill", 32, 512, 8, 24, 24, 48, 16, 0, 1),
    ("distill", 32, 256, 6, 16, 16, 64, 16, 1, 1),
    ("distill", 32, 512, 8, 2, 32, 64, 16, 0, 1),
    ("distill", 16, 512, 8, 8, 8, 128, 64, 0, 1),
    ("distill", 16, 512, 8, 24, 24, 48, 16, 0, 1),
    ("distill", 4, 512, 8, 8, 8, 128, 64, 0, 1),
    ("distill", 4, 512, 8, 24, 24, 48, 16, 0, 1),
    ("coldstart", 32, 512, 8, 8, 8, 128, 64, 0, 1),
    ("coldstart", 16, 512, 8, 16, 16, 48, 64, 1, 1),
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
    import coldstart
    import common
    import distill
    from tools import estimate
    case = dict(zip(FIELDS, case, strict=True))
    stage = {"distill": distill, "coldstart": coldstart}[case["stage"]]
    widths = {"encode": [], "encode_responses": []}

    def noting_width(name, real):
        def encode(*args):
            batch = real(*args)
            widths[name].append((batch["input_ids"] if name == "encode" else batch[0]).shape[1])
            return batch
        return encode

    def load_all(*args, load=common.load):
        model, processor = load(*args)
        for weight in model.parameters():
            weight.sum()  # the file is mapped: what no step has touched is not resident yet
        return model, processor
    common.load = load_all
    for name in widths:
        setattr(common, name, noting_width(name, getattr(common, name)))
    coldstart.validate = lambda *args: {}
    files = ["--data", f"{work}/data", "--out", f"{work}/out", "--restart", "--steps", "1"]
    files += ["--init", "none"] if stage is distill else ["--map_share", "1"]
    same = ["--preset", "tiny", "--lora_vision", str(case["vision"])]

    def step(model, rows, batch, new, *more):
        return [*same, "--model", model, "--micro_batch", str(rows), "--batch", str(batch),
                "--rollout_batch", str(min(batch, case["rollout"])), "--max_new_tokens", str(new),
                *more]
    words = step(folder, case["rows"], max(case["rows"], case["rollout"]), case["new"],
                 "--bits", str(case["bits"]))
    cut = ["--chunk", str(case["chunk"])]
    stage.main(stage.parse_args([*step(common.TINY, 2, 2, 2), *files]))
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # starts VmHWM anew
    stage.main(stage.parse_args([*words, *files, *(cut if stage is distill else [])]))
    measured = resident("VmHWM") - before
    prompts = widths["encode"][-2:] if stage is distill else widths["encode"][-1:] * 2
    answer = widths["encode_responses"][-1:] or [1]
    args = estimate.parse_args([
        *words, *cut, "--device", "cpu", "--prompt_tokens", *map(str, prompts),
        "--answer_tokens", str(answer[0])])
    resident_rows, phases, _ = estimate.main(args)
    need = {name: sum(rows.values()) for name, rows in phases.items()
            if (name == "cold start") == (stage is coldstart)}
    worst = max(need, key=need.get)
    return dict(measured=measured, predicted=sum(resident_rows.values()) + need[worst], worst=worst,
                prompts=", ".join(map(str, prompts)))


def main(args):
    environment = dict(os.environ, MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TRIM_THRESHOLD_="65536",
                       THP_MEM_ALLOC_ENABLE="0")
    columns = [*FIELDS, "prompts", "at its worst", "predicted GB", "measured GB", "ratio"]
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    with tempfile.TemporaryDirectory() as work:
        subprocess.run(
            [sys.executable, ROOT / "gen_data.py", "--preset", "tiny", "--out", f"{work}/data",
             "--tasks", "frozenlake:4", "--image_size", "256",
             "--train", "48", "--val", "2", "--test", "2"],
            check=True, capture_output=True)
        for number in args.cases:
            case = CASES[number]
            build(f"{work}/model", case[2], case[3], case[-1])
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
