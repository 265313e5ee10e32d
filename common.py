"""The model's side of MGSD: loading, adapters, encoding, sampling, scoring, the log. Knows no puzzle.

Everything the two stages and the evaluation share stands here once:
    PRESETS              the settings of both stages, per backbone
    load                 a Qwen3-VL in 4, 16 or 32 bits with its processor
    add_lora             a fresh LoRA adapter, or one from disk
    encode               prompts and pictures -> a left-padded batch (the only caller of the chat template)
    sample               responses, token by token, the end token included
    response_hidden      the hidden states that predict given response tokens
    Run                  a stage's folder: its log, its checkpoints, its way back after an interruption
"""
import fcntl
import hashlib
import json
import logging
import math
import os
import pickle
import platform
import resource
import shutil
import signal
import sys
import time
import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError
from tqdm import tqdm

from gen_data import fail

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it reports an optional CPU kernel as missing
warnings.filterwarnings("ignore", message=".*gradient_checkpointing.* is deprecated")  # the newer name came with transformers 5.23

TINY = str(Path(__file__).parent / "tiny")

# One column per preset; a flag on the command line wins. Batches count rows (coldstart: questions).
#                                   tiny           4b                             8b
PRESETS = {name: dict(column) for name, column in zip(("tiny", "4b", "8b"), zip(*[
    [(key, value) for value in values] for key, *values in [
        ("model",                   TINY,          "Qwen/Qwen3-VL-4B-Instruct",   "Qwen/Qwen3-VL-8B-Instruct"),
        ("bits",                    32,            4,                             4),
        ("lora_rank",               16,            16,                            16),
        ("lora_vision",             True,          False,                         False),
        ("max_new_tokens",          120,           1024,                          1024),
        ("coldstart_steps",         200,           1000,                          1000),
        ("coldstart_lr",            2e-3,          1e-4,                          1e-4),
        ("coldstart_batch",         96,            64,                            64),
        ("coldstart_micro_batch",   48,            4,                             2),
        ("distill_steps",           100,           500,                           500),
        ("distill_lr",              1.5e-3,        2e-5,                          2e-5),
        ("distill_batch",           96,            32,                            32),
        ("distill_micro_batch",     48,            4,                             2),
    ]]))}


# ---------------------------------------------------------------- loading

LANGUAGE = r"language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
VISION = (r"visual\.(blocks\.\d+\.(attn\.(qkv|proj)|mlp\.linear_fc[12])"
          r"|(merger|deepstack_merger_list\.\d+)\.linear_fc[12])")


def load(path, bits):
    """(model, processor) of a Qwen3-VL checkpoint: frozen, in eval mode, on the GPU if there is one.

    bits: 4 (NF4 with double quantisation; vision tower and lm_head stay in 16 bits), 16 (bfloat16), 32.
    """
    from transformers import AutoProcessor, BitsAndBytesConfig, Qwen3VLForConditionalGeneration, logging
    logging.disable_progress_bar()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if Path(path).is_dir() and not (Path(path) / "config.json").is_file():
        fail(f"{path} is no checkpoint folder: it has no config.json")
    dtype = torch.float32 if bits == 32 else torch.bfloat16
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype, llm_int8_skip_modules=["lm_head", "model.visual"]) if bits == 4 else None
    try:
        model, found = Qwen3VLForConditionalGeneration.from_pretrained(
            path, dtype=dtype, quantization_config=quantization, device_map={"": device}, use_safetensors=True, output_loading_info=True)
        processor = AutoProcessor.from_pretrained(path)
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        fail(f"cannot load --model {path}: {' '.join(str(error).split())[:300]}")
    missing, foreign = sorted(found["missing_keys"]), sorted(set(found["unexpected_keys"]) - {"lm_head.weight"})  # it may be tied
    if missing or foreign:
        fail(f"--model {path} is not a whole Qwen3-VL checkpoint: {len(missing)} weights missing {missing[:2]}, {len(foreign)} foreign "
             f"{foreign[:2]}; download it again")
    if not processor.chat_template:
        fail(f"--model {path} has no chat template: wanted chat_template.jinja from the checkpoint it was made of")
    # The paper's upper limit, 512x512; passing max_pixels to from_pretrained may be ignored (transformers issue 41955).
    size = processor.image_processor.size
    processor.image_processor.size = {"shortest_edge": size["shortest_edge"], "longest_edge": min(size["longest_edge"], 262_144)}
    model.requires_grad_(False)
    if device == "cuda":  # takes effect in train mode only
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if bits == 4:
        from bitsandbytes.nn import Linear4bit
        four = {name: module for name, module in model.named_modules() if isinstance(module, Linear4bit)}
        assert four and all(".language_model." in name for name in four), sorted(four)
        for module in four.values():  # on the CPU a forward pass in eval mode would repack the weights for a
            module.support_avx512bf16_for_cpu = False  # kernel without a backward: later gradients would be wrong
    return model.eval(), processor


def add_lora(model, rank=None, vision=False, path=None):
    """Wrap `model` in a PeftModel with a fresh adapter, or with the one saved in folder `path`.

    The pattern is anchored on the language model's linears; `vision` adds those of the vision tower.
    """
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors.torch import load_file
    if not path:
        pattern = rf".*\.({LANGUAGE}|{VISION})" if vision else rf".*\.{LANGUAGE}"
        return get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=pattern))
    weights = Path(path) / "adapter_model.safetensors"
    if not weights.is_file() or not (Path(path) / "adapter_config.json").is_file():
        fail(f"no adapter in {path}: wanted adapter_config.json and adapter_model.safetensors; "
             "python coldstart.py makes one")
    config, saved = LoraConfig.from_pretrained(path), load_file(weights)
    config.inference_mode = False
    try:
        model = get_peft_model(model, config)
        own = {name: weight.shape for name, weight in get_peft_model_state_dict(model).items()}
    except ValueError:
        own = {}
    if own != {name: weight.shape for name, weight in saved.items()}:
        fail(f"the adapter in {path} does not fit {model.config.name_or_path}: it was trained on another backbone "
             f"({config.base_model_name_or_path}); choose it with --model")
    set_peft_model_state_dict(model, saved)
    return model


def network(model):
    """The Qwen3VLForConditionalGeneration inside, adapted or not (LoRA layers live in its modules)."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


# ---------------------------------------------------------------- text and pictures -> batch

def encode(processor, prompts, images=None, device="cpu"):
    """Prompts (and one picture each, or None) -> a left-padded batch ending in the generation prompt.

    Returns a dict of tensors: input_ids, attention_mask, mm_token_type_ids [B, P], and with pictures
    pixel_values, image_grid_thw. images: a list of PIL images or None, as long as prompts.
    """
    chats = []
    for prompt, image in zip(prompts, images or [None] * len(prompts), strict=True):
        content = [{"type": "image", "image": image}] if image is not None else []
        chats.append([{"role": "user", "content": content + [{"type": "text", "text": prompt}]}])
    batch = processor.apply_chat_template(chats, tokenize=True, add_generation_prompt=True, return_dict=True,
                                          return_tensors="pt", processor_kwargs=dict(padding=True, padding_side="left"))
    return {name: tensor.to(device) for name, tensor in batch.items()}


def encode_responses(processor, texts, device="cpu"):
    """Reference responses -> (ids [B, T], mask [B, T]): right-padded, the end token included."""
    tokenizer = processor.tokenizer
    ids = [row + [tokenizer.eos_token_id] for row in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    width = max(map(len, ids))
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in ids], device=device)
    return torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row in ids], device=device), mask


def positions(model, batch):
    """M-RoPE positions [3, B, P] and, per row, the position that comes next [B].

    Always computed here and passed on: the model would otherwise remember `rope_deltas` from one
    call to the next (transformers issue 44873).
    """
    ids, deltas = network(model).model.get_rope_index(
        batch["input_ids"], batch["mm_token_type_ids"], batch.get("image_grid_thw"), attention_mask=batch["attention_mask"])
    return ids, batch["attention_mask"].sum(1) + deltas[:, 0]


def response_hidden(model, prompt, ids, mask):
    """The hidden states that predict the response tokens. prompt: from `encode`; ids, mask [B, T].

    Returns [N, hidden] with N = mask.sum(), row by row: entry k is the state from which the k-th
    valid response token was (or would be) drawn; `lm_head` turns it into that token's logits.
    """
    batch = {**prompt,
             "input_ids": torch.cat([prompt["input_ids"], ids], 1),                    # [B, P+T]
             "attention_mask": torch.cat([prompt["attention_mask"], mask], 1),
             "mm_token_type_ids": torch.cat([prompt["mm_token_type_ids"], torch.zeros_like(ids)], 1)}
    hidden = network(model).model(**batch, position_ids=positions(model, batch)[0], use_cache=False).last_hidden_state
    start = prompt["input_ids"].shape[1] - 1       # the last prompt position predicts the first response token
    return hidden[:, start:-1][mask.bool()]        # [B, T, hidden] -> [N, hidden]


def draw(logits, temperature):
    """One token per row of logits [B, vocabulary] -> [B]; temperature 0: the likeliest.

    By inverting the cumulative distribution: it takes one random number per row (torch.multinomial draws one per
    word, and spends most of its time on that), and is exact: in float64 the rarest of 151,936 words keeps its share.
    """
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits if temperature == 1 else logits / temperature                      # not one pass over the words too many
    cumulative = logits.softmax(-1).cumsum(-1, dtype=torch.float64)
    level = torch.rand(len(logits), 1, dtype=torch.float64, device=logits.device) * cumulative[:, -1:]
    # Never a word of probability 0; and if the logits are not finite, still a word: the step is then skipped for its loss.
    return torch.searchsorted(cumulative, level, right=True)[:, 0].clamp_(max=logits.shape[1] - 1)


@torch.no_grad()
def sample(model, processor, prompt, max_new_tokens, temperature=1.0):
    """Draw responses (temperature 0: greedy) -> (ids [B, T], mask [B, T]).

    A response goes through its first end token inclusive; one without an end token was cut at
    `max_new_tokens`. The distribution is the model's own softmax, with nothing but the picture
    placeholders removed, whatever generation_config says.
    """
    net, tokenizer = network(model), processor.tokenizer
    banned = [processor.image_token_id, processor.video_token_id, processor.vision_start_token_id]
    position_ids, next_position = positions(model, prompt)
    out, attention = net.model(**prompt, position_ids=position_ids, use_cache=True), prompt["attention_mask"]
    ids = attention.new_full((len(attention), max_new_tokens), tokenizer.pad_token_id)
    mask = torch.zeros_like(ids)
    rows = torch.arange(len(ids), device=ids.device)         # those without an end token yet: only they are computed
    for t in range(max_new_tokens):
        # lm_head with its factors swapped: for the few rows of a rollout twice as fast on a CPU. [rows, vocabulary]
        logits = (net.lm_head.weight @ out.last_hidden_state[:, -1].T).T.float().contiguous()
        logits[:, banned] = -torch.inf
        token = draw(logits, temperature)                                              # [rows]
        ids[rows, t], mask[rows, t] = token, 1
        going = token != tokenizer.eos_token_id
        if t + 1 == max_new_tokens or not going.any():
            break
        if not going.all():
            rows, token, attention, next_position = (x[going] for x in (rows, token, attention, next_position))
            out.past_key_values.batch_select_indices(going)
        attention = torch.cat([attention, attention.new_ones(len(rows), 1)], 1)
        out = net.model(input_ids=token[:, None], attention_mask=attention, past_key_values=out.past_key_values,
                        position_ids=(next_position + t)[None, :, None].expand(3, -1, -1), use_cache=True)
    return ids[:, :t + 1], mask[:, :t + 1]


def decode(processor, ids, mask):
    """Response tokens [B, T] -> texts, without the end token."""
    return processor.batch_decode([row[keep.bool()] for row, keep in zip(ids, mask)], skip_special_tokens=True)


# ---------------------------------------------------------------- settings

def add_flags(parser, stage=None):
    """The flags every script shares; with a stage ("coldstart", "distill") its training flags too."""
    add = parser.add_argument
    add("--preset", help=f"settings for a backbone: {', '.join(PRESETS)} (default: 4b with CUDA, else tiny)")
    add("--model", help="checkpoint folder or hub name")
    add("--bits", type=int, choices=(4, 16, 32), help="precision of the frozen weights: NF4, bfloat16, float32")
    add("--data", default="data", help="folder made by gen_data.py; made now if it is not there")
    add("--seed", type=int, default=0, help="draws the data, the rows of a step and the rollouts")
    if stage:
        add("--steps", type=int, help="optimizer steps")
        add("--lr", type=float, help="peak learning rate (cosine, warm-up over the first tenth)")
        add("--batch", type=int, help="rows per optimizer step")
        add("--micro_batch", type=int, help="rows per forward pass; the gradient is that of the whole batch")
        add("--lora_rank", type=int, help="rank of the adapters; alpha is twice the rank")
        add("--lora_vision", type=int, choices=(0, 1), help="1: adapters on the vision tower's linears too")
        add("--save_every", type=int, default=20, help="steps between checkpoints; run again to continue from the newest")
        add("--restart", action="store_true", help="delete what is in --out and begin anew")


def resolve(args, stage=None):
    """Fill what was not given from the preset, and say which preset it is and why."""
    cuda = torch.cuda.is_available()
    why = "--preset" if args.preset else "CUDA found" if cuda else "no CUDA device"
    args.preset = args.preset or ("4b" if cuda else "tiny")
    if args.preset not in PRESETS:
        fail(f"unknown preset {args.preset!r}, known: {', '.join(PRESETS)}")
    for key, value in PRESETS[args.preset].items():
        name = key.removeprefix(f"{stage}_")
        if hasattr(args, name) and getattr(args, name) is None:
            setattr(args, name, value)
    for name in ("steps", "batch", "micro_batch", "lora_rank", "max_new_tokens", "save_every"):
        if getattr(args, name, 1) < 1:
            fail(f"--{name} {getattr(args, name)}: wanted at least 1")
    print(f"preset {args.preset} ({why}; choose with --preset {'|'.join(PRESETS)}): {args.model} in {args.bits} bits")
    return args


def learning_rate(step, steps, peak):
    """Linear warm-up over the first tenth of the steps, then a cosine down to zero."""
    warm = max(1, steps // 10)
    return peak * min((step + 1) / warm, 0.5 * (1 + math.cos(math.pi * max(0, step + 1 - warm) / max(1, steps - warm))))


def versions():
    """What a result depends on besides the arguments."""
    import peft
    import transformers
    return {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__,
            "peft": peft.__version__, "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"}


def peak_gb():
    """Peak memory so far in GB: of the CUDA device if there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1024 if sys.platform == "linux" else 1) / 1e9


class Run:
    """One stage's run in the folder args.out, and its way back after an interruption.

        run = Run(args, __file__, inputs)      # refuses a second writer and other arguments; knows where to continue
        model = add_lora(..., run.adapter or ...)
        with run:
            for step in run.steps(model, optimizer):
                ...
                norm = run.update(loss, weights, lr, evidence)
                run.log(step=step + 1, ...)

    The folder holds args.json, a copy of the script, metrics.jsonl, the newest checkpoint-<steps done> (adapter,
    optimizer.pt, state.json) and, when all steps are done, adapter/ in PEFT's format. Nothing random is stored: a step
    draws its randomness from (seed, step).
    """
    may_differ = ("steps", "micro_batch", "slice", "save_every", "show_every", "eval_every", "restart")  # when a run goes on

    def __init__(self, args, script, inputs=()):
        """inputs: files that the result depends on, such as the rows; their hashes are kept with the arguments."""
        self.args, self.out, self.optimizer, self.stop = args, Path(args.out), None, None
        self.step, self.skipped, self.skipped_in_a_row, self.adapter, self.checkpoint, self.updated = 0, 0, 0, None, None, False
        self.out.mkdir(parents=True, exist_ok=True)
        self.lock = open(self.out / "lock", "w")  # held as long as this process lives, however it ends
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            fail(f"another run is writing to {self.out}: wait for its end or choose another --out")
        if args.restart:
            for path in self.out.iterdir():
                if path.name in ("adapter", "args.json") or path.name.startswith("checkpoint") or path.suffix == ".jsonl":
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
        arguments = json.loads(json.dumps(vars(args)))
        digests = {str(path): hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in inputs if Path(path).is_file()}
        record, sizes = {"args": arguments, "inputs": digests, "versions": versions()}, {}
        if newest := max(self.out.glob("checkpoint-*"), default=None):
            try:
                old, state = json.loads((self.out / "args.json").read_text()), json.loads((newest / "state.json").read_text())
            except (OSError, ValueError) as error:
                fail(f"cannot go on from {newest}: {error}; begin anew with --restart")
            other = [f"--{key} was {old['args'].get(key)!r} and is {value!r}" for key, value in arguments.items()
                     if key not in self.may_differ and old["args"].get(key) != value]
            other += [f"{path} has changed" for path, digest in digests.items() if old["inputs"].get(path, digest) != digest]
            other += [f"--steps {args.steps}, but {state['step']} are done"] if state["step"] > args.steps else []
            if other:
                fail(f"{self.out} holds a run that cannot go on like this: {'; '.join(other)}. "
                     "Give its arguments again, --restart to begin anew, or another --out")
            self.step, self.skipped, sizes = state["step"], state["skipped"], state["sizes"]
            self.skipped_in_a_row, self.adapter, self.checkpoint = state["skipped_in_a_row"], str(newest / "adapter"), newest
            print(f"{self.out}: {self.step} of {args.steps} steps are done" + (", going on" if self.step < args.steps else
                  "; --steps goes on from here, --restart begins anew"))
        for file in self.out.glob("*.jsonl"):  # lines of steps that will be done again
            os.truncate(file, sizes.get(file.name, 0))
        write_aside(self.out / "args.json", json.dumps(record, indent=1))
        shutil.copy(script, self.out)

    def __enter__(self):
        def stop(number, frame):
            self.stop = number
            signal.signal(number, signal.default_int_handler)  # a second signal stops at once
            tqdm.write("stopping after this step (again: at once, back to the newest checkpoint)")
        self.handlers = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, kind, error, trace):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if isinstance(error, torch.OutOfMemoryError):
            if not self.updated:  # else the weights are a step further than the log
                self.save()
            fail(f"the GPU's memory does not suffice ({str(error).splitlines()[0]}). {self.checkpoint or 'No checkpoint'} is what there is; "
                 "run again with a lower --micro_batch or --slice to go on, or with a lower --max_new_tokens and --restart")

    def steps(self, model, optimizer):
        """The numbers of the steps to do. Saves every `save_every` steps, at the end, and when a signal asks to stop."""
        self.model, self.optimizer = model, optimizer
        if self.adapter:
            optimizer.load_state_dict(load_optimizer(self.checkpoint / "optimizer.pt"))
        for step in tqdm(range(self.step, self.args.steps), desc=self.out.name, unit="step", initial=self.step, total=self.args.steps):
            self.updated = False
            yield step
            self.step = step + 1
            if self.stop or self.step % self.args.save_every == 0 or self.step == self.args.steps:
                self.save()
            if self.stop and self.step < self.args.steps:
                print(f"stopped: {self.step} of {self.args.steps} steps are saved in {self.out}; the same command goes on")
                raise SystemExit(128 + self.stop)
        if self.checkpoint:  # the finished adapter; the old one stays until the new one is whole
            aside, old, final = (self.out / name for name in ("adapter.partial", "adapter.old", "adapter"))
            for folder in (aside, old):
                shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(self.checkpoint / "adapter", aside)
            if final.exists():
                final.rename(old)
            aside.rename(final)
            shutil.rmtree(old, ignore_errors=True)

    def save(self):
        """Write checkpoint-<step> aside, flush it, rename it; only then remove the one before."""
        aside, folder = self.out / "checkpoint.partial", self.out / f"checkpoint-{self.step:07d}"
        shutil.rmtree(aside, ignore_errors=True)
        try:
            self.model.save_pretrained(aside / "adapter")
            torch.save(self.optimizer.state_dict(), aside / "optimizer.pt")
            sizes = {file.name: file.stat().st_size for file in self.out.glob("*.jsonl")}
            (aside / "state.json").write_text(json.dumps({"step": self.step, "skipped": self.skipped,
                                                          "skipped_in_a_row": self.skipped_in_a_row, "sizes": sizes}))
            for path in (*self.out.glob("*.jsonl"), *aside.rglob("*"), aside):
                flush(path)
            shutil.rmtree(folder, ignore_errors=True)
            aside.rename(folder)
            flush(self.out)
        except (OSError, RuntimeError, SafetensorError) as error:
            shutil.rmtree(aside, ignore_errors=True)
            fail(f"cannot write {folder}: {str(error).splitlines()[0]}; {self.checkpoint or 'no checkpoint'} is what there is, free some "
                 "space and run again to go on")
        for other in set(self.out.glob("checkpoint-*")) - {folder}:
            shutil.rmtree(other)
        self.checkpoint = folder

    def append(self, name, rows):
        """Lines for a .jsonl file beside the log; an interrupted run cuts it back like the log."""
        try:
            with open(self.out / name, "a") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
        except OSError as error:
            fail(f"cannot write {self.out / name}: {error.strerror}; {self.checkpoint or 'no checkpoint'} is what there is")

    def log(self, **values):
        """One line per step to the eye, one to metrics.jsonl. Numbers that are not finite are null there."""
        values = {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in values.items()}
        tqdm.write("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items()
                             if v is not None and not isinstance(v, dict)))
        self.append("metrics.jsonl", [values])

    def update(self, loss, weights, lr, evidence, max_norm=1.0, patience=5):
        """One clipped optimizer step at rate `lr`; returns the gradient norm before clipping.

        A loss or norm that is not finite skips the step and writes `evidence` (dicts: rows, responses) to
        not_finite.jsonl; `patience` such steps in a row end the run. A gradient of zero at the first step is an error.
        """
        norm = torch.nn.utils.clip_grad_norm_(weights, max_norm).item()
        if norm == 0 and self.step == 0:
            fail("the gradient of the first step is zero: nothing connects the loss to the adapters")
        if math.isfinite(loss) and math.isfinite(norm):
            self.skipped_in_a_row = 0
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
            self.updated = True
        else:
            self.skipped, self.skipped_in_a_row = self.skipped + 1, self.skipped_in_a_row + 1
            self.append("not_finite.jsonl", [{"step": self.step + 1, "loss": str(loss), "grad_norm": str(norm), **item} for item in evidence])
            warn(f"step {self.step + 1} skipped: loss {loss}, gradient norm {norm}; its rows are in {self.out}/not_finite.jsonl")
            if self.skipped_in_a_row == patience:
                fail(f"{patience} steps in a row were not finite: try a lower --lr, or --bits 16 or 32 instead of {self.args.bits}")
        self.optimizer.zero_grad(set_to_none=True)
        return norm


def warn(message):
    """One line on stderr, below a progress bar too."""
    tqdm.write(f"warning: {message}", file=sys.stderr)


def flush(path):
    """Make sure that a file or folder is on the disk and not only on its way."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def write_aside(path, text):
    """Write a small file so that it is the old or the new one, whatever happens."""
    aside = path.with_suffix(".partial")
    aside.write_text(text)
    flush(aside)
    aside.rename(path)


def load_optimizer(path):
    """An optimizer's state dict; only tensors and plain values are read, no code in it is run."""
    try:
        return torch.load(path, weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        fail(f"cannot read {path}: {str(error).split('. ')[0]}; begin anew with --restart")


def merge(path, adapter, folder):
    """Write the 16-bit weights of backbone `path` with `adapter` merged in, as an ordinary checkpoint with its processor.

    The folder must be new. 16-bit weights are 2 bytes each (4B: 9 GB); without room for them on the GPU, hide it with
    CUDA_VISIBLE_DEVICES= and merge on the CPU.
    """
    if Path(folder).exists():
        fail(f"{folder} exists: --merge_to wants a new folder")
    model, processor = load(path, 16)
    model = add_lora(model, path=adapter).merge_and_unload()
    aside = Path(f"{folder}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    model.save_pretrained(aside)
    processor.save_pretrained(aside)
    aside.rename(folder)
    print(f"wrote {folder}: {path} with {adapter} in 16 bits")


# ---------------------------------------------------------------- training

def adamw(weights, lr):
    """bitsandbytes' paged 8-bit AdamW on CUDA, torch's AdamW elsewhere; no weight decay on adapters."""
    if torch.cuda.is_available():
        import bitsandbytes
        return bitsandbytes.optim.PagedAdamW8bit(weights, lr=lr, weight_decay=0.0)
    return torch.optim.AdamW(weights, lr=lr, weight_decay=0.0)


class Clock:
    """Seconds by phase: call it with a phase's name when the phase ends."""

    def __init__(self):
        self.last, self.seconds = time.perf_counter(), {}

    def __call__(self, phase):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self.last
        self.last = now
