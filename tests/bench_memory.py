"""Predicted and measured peak memory of one step of a stage, on the CPU, at Qwen's vocabulary.

    python tests/bench_memory.py                # Markdown; about a minute a line
    python tests/bench_memory.py --cases 0 4    # only these lines

Each line is a fresh process that builds a Qwen3-VL with random weights and takes one step on it
with the stage's main, layers recomputed in the backward pass and keys and values in fixed memory as
on a GPU; then tools/estimate.py is asked about the same step. Random weights hardly ever draw an
EOS: responses have full length, as the estimate assumes. The cold start's validation is left out.
"measured" is the highest resident memory during the step over what the process held before, after
its imports and a step of the bundled backbone (which loads what torch and transformers load late).
Blocks that are freed go back to the system at once (MALLOC_*), in small pages
(THP_MEM_ALLOC_ENABLE); else the peak would be that of the C library's cache. Linux only.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
# rows: the micro-batch; rollout: rows sampled at a time, and those of the step; new: tokens;
# vision: adapters on the vision tower too; tied: one matrix for embeddings and lm_head
FIELDS = ("stage", "bits", "hidden", "layers", "rows", "rollout", "new", "chunk", "vision", "tied")
CASES = [
    ("distill", 32, 128, 4, 8, 8, 128, 128, 0, 1),
    ("distill", 32, 512, 8, 8, 8, 128, 64, 0, 1),
    ("distill", 32, 512, 8, 24, 24, 48, 8, 0, 1),
    ("distill", 32, 512, 8, 24, 24, 48, 8, 1, 0),
    ("distill", 32, 512, 8, 1, 48, 96, 8, 0, 1),
    ("distill", 16, 512, 8, 24, 24, 48, 8, 0, 1),
    ("distill", 16, 512, 8, 1, 48, 96, 8, 0, 1),
    ("distill", 4, 512, 8, 8, 8, 128, 64, 0, 1),
    ("distill", 4, 512, 8, 24, 24, 48, 8, 1, 1),
    ("coldstart", 32, 512, 8, 8, 8, 8, 64, 0, 1),
    ("coldstart", 16, 512, 8, 16, 16, 8, 64, 1, 1),
]


def wide_configuration(hidden, layers, tied=True, vocabulary=151_936):
    """The bundled backbone's, wider and deeper, its MLP three times as wide as it is."""
    from transformers import Qwen3VLConfig
    config = Qwen3VLConfig.from_pretrained(ROOT / "tiny")
    config.text_config.update(dict(
        hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
        num_attention_heads=hidden // 32, num_key_value_heads=hidden // 128, head_dim=64,
        vocab_size=vocabulary))
    config.vision_config.out_hidden_size = hidden
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = bool(tied)
    return config


def build(folder, case):
    """Write a checkpoint of random weights."""
    import torch
    from transformers import AutoProcessor, Qwen3VLForConditionalGeneration
    torch.manual_seed(0)
    model = Qwen3VLForConditionalGeneration(
        wide_configuration(case["hidden"], case["layers"], case["tied"]))
    if case["bits"] < 32:  # as the real ones are: a file in float32 would be mapped beside its copy
        model = model.bfloat16()
    model.save_pretrained(folder)
    AutoProcessor.from_pretrained(ROOT / "tiny").save_pretrained(folder)


def resident(field):
    """VmRSS (now) or VmHWM (at most) of this process, bytes."""
    for line in open("/proc/self/status", encoding="utf-8"):
        if line.startswith(field):
            return int(line.split()[1]) * 1024


def measure(work, case):
    """Take the step, then ask for the estimate -> {what: bytes, and the phase that needs most}."""
    import coldstart
    import common
    import distill
    import gen_data
    from tools import estimate
    stage = {"distill": distill, "coldstart": coldstart}[case["stage"]]

    def load_as_on_a_gpu(*args, load=common.load):
        model, processor = load(*args)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        for weight in model.parameters():
            weight.sum()  # the file is mapped: what no step has touched is not resident yet
        return model, processor

    def words(model, bits, rows, batch, new):
        return [*map(str, (
            "--preset", "tiny", "--model", model, "--bits", bits, "--lora_vision", case["vision"],
            "--micro_batch", rows, "--batch", batch, "--rollout_batch", batch, "--max_new_tokens",
            new))]
    common.load, coldstart.validate = load_as_on_a_gpu, lambda *args: {}
    common.decoder_of = lambda device: (common.GraphDecoder, 8)
    common.captured = lambda work: work  # of a graph only the fixed memory
    chunk = ["--chunk", str(case["chunk"])]
    more = ["--data", f"{work}/data", "--steps", "1"]
    more += ([*chunk, "--init", "none", "--eval_every", "0"] if stage is distill else
             ["--map_share", "1"])
    step = words(f"{work}/model", case["bits"], case["rows"], case["rollout"], case["new"])
    first = words(common.TINY, 32, 2, 2, 2)
    stage.main(stage.parse_args([*first, *more, "--out", f"{work}/first"]))
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # starts VmHWM anew
    stage.main(stage.parse_args([*step, *more, "--out", f"{work}/out"]))
    measured = resident("VmHWM") - before

    rows = gen_data.load_rows(f"{work}/data", "train")
    processor = common.load(common.TINY, 32)[1]
    texts = [row.student_prompt() if stage is distill else row.ask(("map",)) for row in rows]
    pictures = [gen_data.open_picture(row.path) for row in rows]
    prompts = common.encode(processor, texts, pictures)["input_ids"]
    answers, _ = common.encode_responses(processor, [row.answers(("map",)) for row in rows])
    args = estimate.parse_args([
        *step, *chunk, "--prompt_tokens", str(prompts.shape[1]), "--answer_tokens",
        str(answers.shape[1])])
    counts = estimate.count_weights(args)
    _, throughout, phases = estimate.parts(args, counts)
    held = estimate.total(part for part in throughout if "CUDA" not in part[0])
    need = {phase: estimate.total(some) for phase, some in phases.items()
            if phase.startswith("cold start") == (stage is coldstart)}
    worst = max(need, key=need.get)
    return {"at its worst": worst, "throughout": held, "predicted": held + need[worst],
            "measured": measured}


def main(args):
    environment = dict(os.environ, MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TRIM_THRESHOLD_="65536",
                       THP_MEM_ALLOC_ENABLE="0")
    columns = [*FIELDS, "at its worst", "throughout, GB", "predicted", "measured", "ratio"]
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    for number in args.cases:
        case = dict(zip(FIELDS, CASES[number], strict=True))
        with tempfile.TemporaryDirectory() as work:
            subprocess.run(
                [sys.executable, ROOT / "gen_data.py", "--preset", "tiny", "--out", f"{work}/data",
                 "--tasks", "frozenlake:4", "--image_size", "256",
                 "--train", "48", "--val", "2", "--test", "2"],
                check=True, capture_output=True)
            build(f"{work}/model", case)
            run = subprocess.run(
                [sys.executable, __file__, "--measure", work, "--cases", str(number)],
                env=environment, capture_output=True, text=True)
        if run.returncode:
            sys.exit(run.stderr[-3000:])
        found = json.loads(run.stdout.splitlines()[-1])
        gigabytes = [f"{found[name] / 1e9:.2f}" for name in ("throughout", "predicted", "measured")]
        line = [*case.values(), found["at its worst"], *gigabytes,
                f"{found['predicted'] / found['measured']:.2f}"]
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
        chosen = dict(zip(FIELDS, CASES[arguments.cases[0]], strict=True))
        print("\n" + json.dumps(measure(arguments.measure, chosen)))
    else:
        main(arguments)
