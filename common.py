"""The model's side of MGSD: loading, adapters, encoding, sampling, scoring. Knows no puzzle.

Everything the two stages and the evaluation share stands here once:
    PRESETS              the settings of both stages, per backbone
    load                 a Qwen3-VL in 4, 16 or 32 bits with its processor
    add_lora             a fresh LoRA adapter, or one from disk
    encode               prompts and pictures -> a left-padded batch (the one caller of a template)
    sample               responses, token by token, the end token included
    response_hidden      the hidden states that predict given response tokens
    Run                  a stage's folder: log, checkpoints, the way back after an interruption
"""
import json
import logging
import math
import os
import platform
import re
import shutil
import signal
import sys
import time
import warnings
import zlib
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch on a CPU: fewer, larger memory pages

import psutil
import torch
from filelock import FileLock
from safetensors import SafetensorError
from torch import distributed
from tqdm import tqdm

from gen_data import fail
from tools import run_files

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # reports a missing optional CPU kernel
# The newer name came with transformers 5.23.
warnings.filterwarnings("ignore", message=".*gradient_checkpointing.* is deprecated")

TINY = str(Path(__file__).parent / "tiny")

# Settings per backbone; a flag on the command line wins. Batches count rows (coldstart: questions).
QWEN = {
    "bits": 4,
    "lora_rank": 16,
    "lora_vision": 0,
    "max_new_tokens": 512,  # the longest reference response has about 360, on mazes of level 6
    "rollout_batch": 32,
    "coldstart_steps": 1000,
    "coldstart_lr": 1e-4,
    "coldstart_batch": 64,
    "coldstart_micro_batch": 4,
    "distill_steps": 500,
    "distill_lr": 2e-5,
    "distill_batch": 32,
    "distill_micro_batch": 4,
    "distill_slice": 64,
}
PRESETS = {
    "tiny": {
        "model": TINY,
        "bits": 32,
        "lora_rank": 16,
        "lora_vision": 1,
        "max_new_tokens": 120,
        "rollout_batch": 96,
        "coldstart_steps": 150,
        "coldstart_lr": 2e-3,
        "coldstart_batch": 96,
        "coldstart_micro_batch": 24,
        "distill_steps": 80,
        "distill_lr": 3.5e-4,  # higher rates plan as well and forget more perception answers
        "distill_batch": 96,
        "distill_micro_batch": 24,
        "distill_slice": 128,
    },
    "2b": {**QWEN, "model": "Qwen/Qwen3-VL-2B-Instruct"},  # for cards of 8 GB
    "4b": {**QWEN, "model": "Qwen/Qwen3-VL-4B-Instruct"},
    "8b": {
        **QWEN,
        "model": "Qwen/Qwen3-VL-8B-Instruct",
        "coldstart_micro_batch": 2,
        "distill_micro_batch": 2,
    },
}
# 40 rows a level instead of 2,000 (gen_data.py): where methods differ.
PRESETS["tiny-small"] = {**PRESETS["tiny"], "coldstart_steps": 100, "distill_steps": 60}


def warn(message):
    """One line on stderr, below a progress bar too."""
    if first_process():
        tqdm.write(f"warning: {message}", file=sys.stderr)


# ---------------------------------------------------------------- loading

LANGUAGE = r"language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
VISION = (r"visual\.(blocks\.\d+\.(attn\.(qkv|proj)|mlp\.linear_fc[12])"
          r"|(merger|deepstack_merger_list\.\d+)\.linear_fc[12])")


def load(path, bits):
    """(model, processor) of a Qwen3-VL checkpoint: frozen, in eval mode, on the GPU if there is.

    bits: 4 (NF4, double quantisation; vision tower and lm_head stay in 16 bits), 16 (bfloat16), 32.
    """
    from transformers import AutoProcessor, BitsAndBytesConfig, Qwen3VLForConditionalGeneration
    from transformers.utils.logging import disable_progress_bar
    disable_progress_bar()
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    if Path(path).is_dir() and not (Path(path) / "config.json").is_file():
        fail(f"{path} is no checkpoint folder: it has no config.json")
    dtype = torch.float32 if bits == 32 else torch.bfloat16
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype, llm_int8_skip_modules=["lm_head", "model.visual"])
    try:
        model, found = Qwen3VLForConditionalGeneration.from_pretrained(
            path, dtype=dtype, quantization_config=nf4 if bits == 4 else None,
            device_map={"": device}, use_safetensors=True, output_loading_info=True)
        processor = AutoProcessor.from_pretrained(path)
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        fail(f"cannot load --model {path}: {' '.join(str(error).split())[:300]}")
    missing = sorted(found["missing_keys"])
    foreign = sorted(set(found["unexpected_keys"]) - {"lm_head.weight"})  # it may be tied
    if missing or foreign:
        fail(f"--model {path} is not a whole Qwen3-VL checkpoint: {len(missing)} weights missing "
             f"{missing[:2]}, {len(foreign)} foreign {foreign[:2]}; download it again")
    if not processor.chat_template:
        fail(f"--model {path} has no chat template: wanted chat_template.jinja from the checkpoint "
             "it was made of")
    # The paper's upper limit, 512x512; max_pixels for from_pretrained may be ignored
    # (transformers issue 41955).
    size = processor.image_processor.size
    processor.image_processor.size = {"shortest_edge": size["shortest_edge"],
                                      "longest_edge": min(size["longest_edge"], 262_144)}
    model.requires_grad_(False)
    if cuda:  # takes effect in train mode only
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if bits == 4:
        from bitsandbytes.nn import Linear4bit
        for name, module in model.named_modules():
            if isinstance(module, Linear4bit):
                assert ".language_model." in name, name
                # Else a forward pass in eval mode on the CPU would repack the weights for a kernel
                # that has no backward: later gradients would be wrong.
                module.support_avx512bf16_for_cpu = False
    return model.eval(), processor


def add_lora(model, rank=None, vision=False, path=None):
    """Wrap `model` in a PeftModel with a fresh adapter, or with the one saved in folder `path`.

    The pattern is anchored on the language model's linears; `vision` adds the vision tower's.
    """
    import peft
    from safetensors.torch import load_file
    if not path:
        pattern = rf".*\.({LANGUAGE}|{VISION})" if vision else rf".*\.{LANGUAGE}"
        return peft.get_peft_model(model, peft.LoraConfig(
            r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=pattern))
    weights = Path(path) / "adapter_model.safetensors"
    if not weights.is_file() or not (Path(path) / "adapter_config.json").is_file():
        fail(f"no adapter in {path}: wanted adapter_config.json and adapter_model.safetensors; "
             "python coldstart.py makes one")
    config, saved = peft.LoraConfig.from_pretrained(path), load_file(weights)
    config.inference_mode = False
    try:
        model = peft.get_peft_model(model, config)
        fresh = peft.get_peft_model_state_dict(model)
        own = {name: weight.shape for name, weight in fresh.items()}
    except ValueError:
        own = {}
    if own != {name: weight.shape for name, weight in saved.items()}:
        fail(f"the adapter in {path} does not fit {model.config.name_or_path}: it was trained on "
             f"another backbone ({config.base_model_name_or_path}); choose it with --model")
    peft.set_peft_model_state_dict(model, saved)
    return model


def network(model):
    """The Qwen3VLForConditionalGeneration inside, adapted or not (LoRA lives in its modules)."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


# ---------------------------------------------------------------- text and pictures -> batch

def encode(processor, prompts, images=None, device="cpu"):
    """Prompts, with one PIL image each or none -> a left-padded batch up to where responses begin.

    Returns a dict of tensors: input_ids, attention_mask, mm_token_type_ids [B, P], and with
    pictures pixel_values [patches of all rows, values], image_grid_thw [B, 3].
    """
    chats = []
    for prompt, image in zip(prompts, images or [None] * len(prompts), strict=True):
        content = [{"type": "text", "text": prompt}]
        if image is not None:
            content.insert(0, {"type": "image", "image": image})
        chats.append([{"role": "user", "content": content}])
    batch = processor.apply_chat_template(
        chats, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt",
        processor_kwargs={"padding": True, "padding_side": "left"})
    return {name: tensor.to(device) for name, tensor in batch.items()}


def encode_responses(processor, texts, device="cpu"):
    """Reference responses -> (ids [B, T], mask [B, T]): right-padded, the end token included."""
    tokenizer = processor.tokenizer
    rows = tokenizer(texts, add_special_tokens=False)["input_ids"]
    width = max(map(len, rows)) + 1
    ids = torch.full((len(rows), width), tokenizer.pad_token_id)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, :len(row) + 1] = torch.tensor([*row, tokenizer.eos_token_id])
        mask[i, :len(row) + 1] = 1
    return ids.to(device), mask.to(device)


def check_lengths(model, processor, texts, new_tokens=0, picture=300):
    """Fails if a text of {name: text} leaves no room in the context for the rest.

    picture: tokens of one of 512x512 and of the frame around a chat.
    """
    context = network(model).config.text_config.max_position_embeddings
    room = context - new_tokens - picture
    for name, text in texts.items():
        if len(text.encode()) > room:  # a token has a byte at least: most texts need no counting
            length = len(processor.tokenizer.tokenize(text, verbose=False))
            if length > room:
                fail(f"{name}: what the model reads and writes has {length} tokens of text; with a "
                     f"picture ({picture}) and a response ({new_tokens}) it exceeds the context "
                     f"of {context}")


def take_rows(prompt, rows):
    """Some rows (a slice) of a batch from `encode`, without the padding that only others needed."""
    length = prompt["attention_mask"][rows].sum(1).max()
    taken = {name: prompt[name][rows, -length:]
             for name in ("input_ids", "attention_mask", "mm_token_type_ids")}
    if "pixel_values" in prompt:
        patches = prompt["image_grid_thw"].prod(1).tolist()  # of each row
        taken["pixel_values"] = torch.cat(prompt["pixel_values"].split(patches)[rows])
        taken["image_grid_thw"] = prompt["image_grid_thw"][rows]
    return taken


def micro_batches(size, ids, mask, *prompts):
    """Responses [B, T] and batches from `encode`, `size` rows at a time, needless padding cut."""
    for i in range(0, len(ids), size):
        some = slice(i, i + size)
        length, taken = mask[some].sum(1).max(), [take_rows(prompt, some) for prompt in prompts]
        yield ids[some, :length], mask[some, :length], *taken


def positions(model, batch):
    """M-RoPE positions [3, B, P] and, per row, the position that comes next [B].

    Always computed here and passed on: the model would otherwise remember `rope_deltas` from one
    call to the next (transformers issue 44873).
    """
    ids, deltas = network(model).model.get_rope_index(
        batch["input_ids"], batch["mm_token_type_ids"], batch.get("image_grid_thw"),
        attention_mask=batch["attention_mask"])
    return ids, batch["attention_mask"].sum(1) + deltas[:, 0]


def response_hidden(model, prompt, ids, mask):
    """The hidden states that predict the response tokens. prompt: from `encode`; ids, mask [B, T].

    Returns [N, hidden] with N = mask.sum(), row by row: entry k is the state from which the k-th
    valid response token was (or would be) drawn; `lm_head` turns it into that token's logits.
    """
    types = torch.cat([prompt["mm_token_type_ids"], torch.zeros_like(ids)], 1)
    batch = {**prompt, "mm_token_type_ids": types,                                 # [B, P+T] each
             "input_ids": torch.cat([prompt["input_ids"], ids], 1),
             "attention_mask": torch.cat([prompt["attention_mask"], mask], 1)}
    position_ids, _ = positions(model, batch)                                      # [3, B, P+T]
    out = network(model).model(**batch, position_ids=position_ids, use_cache=False)
    start = prompt["input_ids"].shape[1] - 1  # the last prompt position predicts the first token
    return out.last_hidden_state[:, start:-1][mask.bool()]         # [B, T, hidden] -> [N, hidden]


def draw_token(logits, uniform, temperature=1.0):
    """One token per row of logits [B, vocabulary] and of numbers in [0, 1) [B], float64 -> [B].

    By inverting the cumulative distribution: one random number per row (torch.multinomial draws
    one per word, and spends most of its time on that), and exact: in float64 the rarest of 151,936
    words keeps its share.
    """
    if temperature != 1:  # else a pass over the words too many
        logits = logits / temperature
    cumulative = logits.softmax(-1).cumsum(-1, dtype=torch.float64)
    # right=True: never a word of probability 0. The clamp: still a word where the logits are not
    # finite; such a step is then skipped for its loss.
    token = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True)
    return token[:, 0].clamp_(max=logits.shape[1] - 1)


def end_tokens(model, processor):
    """Every token that ends a response: the tokenizer's, and those of generation_config.

    Qwen3-VL has two, <|im_end|> and <|endoftext|>; the second is its padding too.
    """
    named = network(model).generation_config.eos_token_id
    named = named if isinstance(named, list) else [named]
    ends = {processor.tokenizer.eos_token_id, *named} - {None}
    return torch.tensor(sorted(ends), device=model.device)


def ask_every(device):
    """Tokens between two looks at which rows have ended: on a GPU each look makes Python wait."""
    return 8 if device.type == "cuda" else 1


@torch.no_grad()
def sample(model, processor, prompt, max_new_tokens, uniforms=None, temperature=1.0,
           rollout_batch=None):
    """Draw responses -> (ids [B, T], mask [B, T]).

    uniforms: a number in [0, 1) for every token that may be drawn, float64 [B, max_new_tokens], so
    that a token depends on no other row; None: greedy. rollout_batch: rows at a time, default all.
    A response goes through its first end token inclusive; one without an end token was cut at
    max_new_tokens. The distribution is the model's own softmax, with nothing but the picture
    placeholders removed, whatever generation_config says.
    """
    net, pad, ends = network(model), processor.tokenizer.pad_token_id, end_tokens(model, processor)
    banned = [processor.image_token_id, processor.video_token_id, processor.vision_start_token_id]
    if uniforms is not None:
        uniforms = torch.as_tensor(uniforms, device=model.device)
    count = len(prompt["input_ids"])
    ids = torch.full((count, max_new_tokens), pad, device=model.device)
    for begin in range(0, count, rollout_batch or count):
        rows = torch.arange(count, device=model.device)[begin:begin + (rollout_batch or count)]
        batch = take_rows(prompt, slice(begin, begin + len(rows)))
        position_ids, next_position = positions(model, batch)
        out = net.model(**batch, position_ids=position_ids, use_cache=True)
        attention = batch["attention_mask"]
        going = torch.ones_like(rows, dtype=torch.bool)
        for t in range(max_new_tokens):
            # lm_head, its factors swapped: for the few rows of a rollout twice as fast on a CPU.
            logits = (net.lm_head.weight @ out.last_hidden_state[:, -1].T).T.float().contiguous()
            logits[:, banned] = -torch.inf                                     # [rows, vocabulary]
            token = (logits.argmax(-1) if uniforms is None else
                     draw_token(logits, uniforms[rows, t], temperature))       # [rows]
            ids[rows, t] = token
            going &= ~torch.isin(token, ends)
            # Rows that ended leave the batch; what they drew in the meantime is cut off below.
            if (t + 1) % ask_every(model.device) == 0 and not going.all():
                rows, token, next_position = rows[going], token[going], next_position[going]
                attention = attention[going]
                out.past_key_values.batch_select_indices(going)
                going = going[going]
            if t + 1 == max_new_tokens or len(rows) == 0:
                break
            attention = torch.cat([attention, attention.new_ones(len(rows), 1)], 1)
            out = net.model(
                input_ids=token[:, None], attention_mask=attention,
                past_key_values=out.past_key_values, use_cache=True,
                position_ids=(next_position + t)[None, :, None].expand(3, -1, -1))
    ended = torch.isin(ids, ends).long()
    mask = (ended.cumsum(1) - ended == 0).long()    # by position: padding may be an end token too
    length = mask.sum(1).max()
    return ids.where(mask.bool(), pad)[:, :length], mask[:, :length]


def was_cut(model, processor, ids, mask):
    """Of every response: did it reach the limit without an end token?"""
    last = ids.gather(1, mask.sum(1, keepdim=True) - 1)[:, 0]
    return (~torch.isin(last, end_tokens(model, processor))).tolist()


def decode(processor, ids, mask):
    """Response tokens [B, T] -> texts, without the end token."""
    rows = [row[keep.bool()] for row, keep in zip(ids, mask, strict=True)]
    return processor.batch_decode(rows, skip_special_tokens=True)


# ---------------------------------------------------------------- settings

def add_flags(parser, stage=None):
    """The flags every script shares; with a stage ("coldstart", "distill") its training flags."""
    add = parser.add_argument
    add("--preset", help=f"backbone: {', '.join(PRESETS)} (default: 4b with CUDA, else tiny)")
    add("--model", help="checkpoint folder or hub name")
    add("--bits", type=int, choices=(4, 16, 32), help="frozen weights: NF4, bfloat16, float32")
    add("--data", default="data", help="folder made by gen_data.py; made now if it is not there")
    add("--seed", type=int, default=0, help="draws the data, the rows of a step and the rollouts")
    if not stage:
        return
    add("--steps", type=int, help="optimizer steps")
    add("--lr", type=float, help="peak learning rate (cosine, warm-up over the first tenth)")
    add("--max_grad_norm", type=float, default=1.0, help="a longer gradient is cut to this norm")
    add("--batch", type=int, help="rows per optimizer step")
    add("--micro_batch", type=int, help="rows per forward pass; changes no result")
    add("--rollout_batch", type=int, help="rows sampled at a time; changes no result")
    add("--lora_rank", type=int, help="rank of the adapters; alpha is twice the rank")
    add("--lora_vision", type=int, choices=(0, 1), help="1: adapters on the vision tower too")
    add("--save_every", type=int, default=20, help="steps between checkpoints")
    add("--restart", action="store_true", help="delete what is in --out and begin anew")
    add("--wandb", metavar="PROJECT", help="log to Weights & Biases too (WANDB_MODE=offline works)")


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
    for name in ("steps", "batch", "rollout_batch", "micro_batch", "lora_rank", "max_new_tokens",
                 "save_every"):
        if getattr(args, name, 1) < 1:
            fail(f"--{name} {getattr(args, name)}: wanted at least 1")
    if first_process():
        print(f"preset {args.preset} ({why}; choose with --preset {'|'.join(PRESETS)}): "
              f"{args.model} in {args.bits} bits")
    return args


def learning_rate(step, steps, peak):
    """Linear warm-up over the first tenth of the steps, then a cosine; zero would come after it."""
    warm = max(1, steps // 10)
    progress = max(0, step + 1 - warm) / (steps + 1 - warm)
    return peak * min((step + 1) / warm, 0.5 * (1 + math.cos(math.pi * progress)))


def adamw(weights, lr):
    """bitsandbytes' paged 8-bit AdamW on CUDA, torch's AdamW elsewhere; no decay on adapters."""
    if torch.cuda.is_available():
        import bitsandbytes
        return bitsandbytes.optim.PagedAdamW8bit(weights, lr=lr, weight_decay=0.0)
    return torch.optim.AdamW(weights, lr=lr, weight_decay=0.0)


def mean(values):
    """The mean as a float; None if there is nothing to take it of."""
    return sum(values) / len(values) if values else None


def versions():
    """What a result depends on besides the arguments."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    packages = {name: version(name) for name in ("torch", "transformers", "peft")}
    return {"python": platform.python_version(), **packages, "device": device}


def peak_gb():
    """Peak memory so far in GB: of the CUDA device if there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    status = Path("/proc/self/status")
    if status.exists():  # Linux
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) * 1024 / 1e9
    memory = psutil.Process().memory_info()
    return getattr(memory, "peak_wset", memory.rss) / 1e9  # Windows; macOS: what is held now


class Timer:
    """Seconds by phase: call it with a phase's name when the phase ends."""

    def __init__(self):
        self.last, self.seconds = time.perf_counter(), {}

    def __call__(self, phase):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self.last
        self.last = now


# ---------------------------------------------------------------- several processes

def first_process():
    """Is this the process that writes: the only one, or torchrun's first?"""
    return int(os.environ.get("RANK", 0)) == 0


def join_processes(batch):
    """Meet the processes that torchrun started -> (this one's number, how many); else (0, 1)."""
    rank, count = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if batch % count:
        fail(f"--batch {batch} cannot be shared equally by {count} processes")
    if count > 1:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    if rank > 0:
        sys.stdout = open(os.devnull, "w")
    return rank, count


def together(collective, *arguments):
    """Call something that all processes must call. Fails where one of them is gone."""
    try:
        collective(*arguments)
    except RuntimeError as error:
        fail(f"another process of this run has ended ({str(error).splitlines()[0][:100]}); "
             "the same command goes on from the newest checkpoint")


def gather(thing):
    """[what every process gave], in every process."""
    if not distributed.is_initialized():
        return [thing]
    things = [None] * distributed.get_world_size()
    together(distributed.all_gather_object, things, thing)
    return things


def gather_rows(rows):
    """The rows of all processes in the order of the batch, of which each took every n-th."""
    return [row for share in zip(*gather(rows), strict=True) for row in share]


def sum_gradients(weights, loss):
    """Sum the gradients, in place, and the loss over all processes, in one message -> the loss."""
    if not distributed.is_initialized():
        return loss
    flat = torch.cat([weight.grad.flatten() for weight in weights])
    flat = torch.cat([flat, flat.new_tensor([loss])])
    together(distributed.all_reduce, flat)
    sizes = [weight.numel() for weight in weights]
    for weight, gradient in zip(weights, flat[:-1].split(sizes), strict=True):
        weight.grad.copy_(gradient.view_as(weight))
    return float(flat[-1])


# ---------------------------------------------------------------- the folder of a run

class Run:
    """A stage's run in the folder args.out, and its way back after an interruption.

    step: steps that are done and logged. adapter: where the run goes on from, or None. stopping:
    the signal that asks to stop, or None; all processes see it after the same step. updating: set
    by the loop before it changes the weights; until `log` they are ahead of the log. Nothing random
    is stored: a step draws from (seed, step). Of several processes the first one writes.
    """

    def __init__(self, args, script, inputs=(), trained_rows=()):
        """Refuses a second writer and other arguments than those of the run to go on with.

        inputs: files that the result depends on, such as the rows; their hashes are kept.
        trained_rows: keys of all rows that the adapter was or will be trained on.
        """
        self.args, self.out, self.wandb, self.handlers = args, Path(args.out), None, {}
        self.signal, self.stopping, self.updating = 0, None, False
        self.lock = FileLock(self.out / "lock")  # let go when the process ends, however it ends
        state = None
        if first_process():
            run_files.take_folder(self.out, self.lock, args.restart)
            state = run_files.go_on(self.out, args, inputs, versions())
            run_files.write_aside(self.out / "trained_rows.json", json.dumps(sorted(trained_rows)))
            shutil.copy(script, self.out)
            self.wandb = run_files.start_wandb(args) if args.wandb else None
        self.step, self.skipped, self.checkpoint = gather(state)[0]
        self.adapter = self.checkpoint and str(self.checkpoint / "adapter")

    def steps(self, optimizer):
        """The numbers of the steps to do; a signal now asks to stop, a later one stops at once."""
        if self.checkpoint:
            optimizer.load_state_dict(run_files.load_optimizer(self.checkpoint / "optimizer.pt"))
        for number in (signal.SIGINT, signal.SIGTERM):
            self.handlers[number] = signal.signal(number, self.on_signal)
        return tqdm(range(self.step, self.args.steps), desc=self.out.name, unit="step",
                    initial=self.step, total=self.args.steps, disable=not first_process())

    def on_signal(self, number, frame):
        if self.signal == 0:
            self.signal, self.signal_time = number, time.monotonic()
            tqdm.write("stopping after this step (again: at once, back to the newest checkpoint)")
        elif time.monotonic() - self.signal_time > 2:  # torchrun repeats a Ctrl-C by itself
            raise KeyboardInterrupt

    def skip(self, loss, grad_norm, evidence, patience=5):
        """Record a step that was not finite and its rows; `patience` in a row end the run."""
        step = self.step + 1
        self.skipped.append(step)
        what = {"step": step, "loss": str(loss), "grad_norm": str(grad_norm)}
        self.append("not_finite.jsonl", [{**what, **row} for row in evidence])
        warn(f"step {step} skipped: loss {loss}, gradient norm {grad_norm}; "
             f"its rows are in {self.out}/not_finite.jsonl")
        if self.skipped[-patience:] == list(range(step - patience + 1, step + 1)):
            fail(f"{patience} steps in a row were not finite: try a lower --lr, or --bits 16 or 32 "
                 f"instead of {self.args.bits}")

    def log(self, timer, **values):
        """A step is done: a line to the eye, one to metrics.jsonl, where nan and inf are null."""
        self.step, self.updating = self.step + 1, False
        line = {"step": self.step, **values, "step_seconds": sum(timer.seconds.values()),
                "peak_gb": peak_gb()}
        tqdm.write("  ".join(f"{name} {value:.4g}" if isinstance(value, float) else
                             f"{name} {value}" for name, value in line.items()))
        for name, value in values.items():
            if isinstance(value, float) and not math.isfinite(value):
                line[name] = None
        line["seconds"] = timer.seconds
        self.append("metrics.jsonl", [line])
        if self.wandb:
            self.wandb.log(line, step=self.step)
        self.stopping = max(gather(self.signal)) or None

    def append(self, name, rows):
        """Lines for a .jsonl file beside the log; an interrupted run cuts it back like the log."""
        if first_process():
            try:
                with open(self.out / name, "a") as file:
                    file.writelines(json.dumps(row) + "\n" for row in rows)
            except OSError as error:
                self.end(f"cannot write {self.out / name}: {error.strerror}")

    def should_save(self):
        last = self.step == self.args.steps
        return last or self.step % self.args.save_every == 0 or self.stopping is not None

    def save(self, model, optimizer, alone=False):
        """A checkpoint of the steps so far. alone: the other processes are not asked about it."""
        weights = [weight.detach().flatten() for weight in model.parameters()
                   if weight.requires_grad]
        if not alone and len(set(gather(zlib.crc32(torch.cat(weights).cpu().numpy())))) > 1:
            self.end(f"the processes' adapters differ after step {self.step}")
        if first_process():
            try:
                self.checkpoint = run_files.write_checkpoint(
                    self.out, self.step, self.skipped, model, optimizer)
            except (OSError, RuntimeError, SafetensorError) as error:
                self.end(f"cannot write a checkpoint ({str(error).splitlines()[0]}): free space")

    def end(self, message):
        """Fail, and say where the same command goes on."""
        fail(f"{message}. {self.checkpoint or 'No checkpoint'} is what there is; "
             "run again to go on")

    def stopped(self):
        """Say so -> the exit code."""
        print(f"stopped: {self.step} of {self.args.steps} steps are saved in {self.out}; "
              "the same command goes on")
        return 128 + self.stopping

    def out_of_memory(self, error, model, optimizer):
        """Save, unless the weights are ahead of the log, and end with one line."""
        if not self.updating:
            self.save(model, optimizer, alone=True)
        self.end(f"the GPU's memory does not suffice ({str(error).splitlines()[0]}): lower "
                 "--rollout_batch, --micro_batch or --slice, or --max_new_tokens with --restart")

    def finish(self):
        """The newest checkpoint's adapter becomes adapter/."""
        if first_process():
            run_files.replace_folder(self.out / "adapter", self.checkpoint / "adapter")

    def close(self):
        """Give back the signals and the folder."""
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.lock.release()
        if self.wandb:
            self.wandb.finish()
