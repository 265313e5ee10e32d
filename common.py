"""The model's side of MGSD: loading, adapters, encoding, sampling, scoring, the log. Knows no puzzle.

Everything the two stages and the evaluation share stands here once:
    PRESETS              the settings of both stages, per backbone
    load                 a Qwen3-VL in 4, 16 or 32 bits with its processor
    add_lora             a fresh LoRA adapter, or one from disk
    encode               prompts and pictures -> a left-padded batch (the only caller of the chat template)
    sample               responses, token by token, the end token included
    response_hidden      the hidden states that predict given response tokens
    Log                  one human line and one JSON line per step
    estimate             what a distillation step would hold in memory, without weights and without a GPU
"""
import json
import logging
import platform
import re
import resource
import shutil
import sys
import time
import warnings
import weakref
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
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
        model = Qwen3VLForConditionalGeneration.from_pretrained(
            path, dtype=dtype, quantization_config=quantization, device_map={"": device})
        processor = AutoProcessor.from_pretrained(path)
    except OSError as error:
        fail(f"cannot load --model {path}: {str(error).splitlines()[0]}")
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


@torch.no_grad()
def sample(model, processor, prompt, max_new_tokens, temperature=1.0):
    """Draw responses (temperature 0: greedy) -> (ids [B, T], mask [B, T]).

    A response goes through its first end token inclusive; one without an end token was cut at
    `max_new_tokens`. The distribution is the model's own softmax, with nothing but the picture
    placeholders removed, whatever generation_config says.
    """
    net, tokenizer = network(model), processor.tokenizer
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    banned = [processor.image_token_id, processor.video_token_id, processor.vision_start_token_id]
    position_ids, next_position = positions(model, prompt)
    out = net.model(**prompt, position_ids=position_ids, use_cache=True)
    attention, ids = prompt["attention_mask"], []
    alive = torch.ones(len(attention), dtype=torch.bool, device=attention.device)
    for t in range(max_new_tokens):
        logits = net.lm_head(out.last_hidden_state[:, -1]).float()                     # [B, vocabulary]
        logits[:, banned] = -torch.inf
        token = logits.argmax(-1) if temperature == 0 else torch.multinomial((logits / temperature).softmax(-1), 1)[:, 0]
        ids.append(torch.where(alive, token, pad))
        alive = alive & (token != end)
        if not alive.any() or t + 1 == max_new_tokens:
            break
        attention = torch.cat([attention, attention.new_ones(len(attention), 1)], 1)
        out = net.model(input_ids=ids[-1][:, None], attention_mask=attention, past_key_values=out.past_key_values,
                        position_ids=(next_position + t)[None, :, None].expand(3, -1, -1), use_cache=True)
    ids = torch.stack(ids, 1)                                                          # [B, T]
    ended_before = ((ids == end).cumsum(1) - (ids == end).long()) > 0
    return ids, (~ended_before).long()


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
        add("--micro_batch", type=int, help="rows per forward pass; does not change the result")
        add("--lora_rank", type=int, help="rank of the adapters; alpha is twice the rank")
        add("--lora_vision", type=int, choices=(0, 1), help="1: adapters on the vision tower's linears too")


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
    for name in ("steps", "batch", "micro_batch", "lora_rank", "max_new_tokens"):
        if getattr(args, name, 1) < 1:
            fail(f"--{name} {getattr(args, name)}: wanted at least 1")
    print(f"preset {args.preset} ({why}; choose with --preset {'|'.join(PRESETS)}): {args.model} in {args.bits} bits")
    return args


def learning_rate(step, steps, peak):
    """Linear warm-up over the first tenth of the steps, then a cosine down to zero."""
    warm = max(1, steps // 10)
    return peak * min((step + 1) / warm, 0.5 * (1 + np.cos(np.pi * max(0, step + 1 - warm) / max(1, steps - warm))))


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


class Log:
    """A run's folder: args.json, a copy of the script, metrics.jsonl. One line per step to both eyes and file."""

    def __init__(self, out, args, script):
        self.out = Path(out)
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / "args.json").write_text(json.dumps({"args": vars(args), "versions": versions()}, indent=1))
        shutil.copy(script, self.out)
        self.file = open(self.out / "metrics.jsonl", "w")

    def __call__(self, **values):
        tqdm.write("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items()
                             if v is not None and not isinstance(v, dict)))
        self.file.write(json.dumps(values) + "\n")
        self.file.flush()


def save_adapter(model, out):
    """Write out/adapter in PEFT's format: aside, then renamed, so that it is complete or not there."""
    folder, aside = Path(out) / "adapter", Path(out) / "adapter.partial"
    shutil.rmtree(aside, ignore_errors=True)
    model.save_pretrained(aside)
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)


# ---------------------------------------------------------------- training

def adamw(weights, lr):
    """bitsandbytes' paged 8-bit AdamW on CUDA, torch's AdamW elsewhere; no weight decay on adapters."""
    if torch.cuda.is_available():
        import bitsandbytes
        return bitsandbytes.optim.PagedAdamW8bit(weights, lr=lr, weight_decay=0.0)
    return torch.optim.AdamW(weights, lr=lr, weight_decay=0.0)


def optimizer_step(optimizer, weights, lr, max_norm=1.0):
    """One clipped step at rate `lr`; returns the gradient norm before clipping."""
    norm = torch.nn.utils.clip_grad_norm_(weights, max_norm).item()
    if norm == 0:
        fail("the gradient is zero: nothing connects the loss to the adapters")
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


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


# ---------------------------------------------------------------- will it fit?

# The step is run on torch's meta device, where tensors have shapes and no contents, and the bytes alive are counted:
# what autograd keeps, what checkpointing recomputes and what the loss makes are read off the code that does them.

# What config.json of the two checkpoints says (huggingface.co/Qwen/Qwen3-VL-{4B,8B}-Instruct), for when it is not at hand.
# Check: the networks built from these numbers have 4,437,815,808 and 8,767,123,696 parameters, the hub's own counts.
TEXT = dict(num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8, head_dim=128, vocab_size=151_936)
TOWER = dict(num_heads=16, patch_size=16, temporal_patch_size=2, spatial_merge_size=2, num_position_embeddings=2304)
CONFIGS = {
    "Qwen/Qwen3-VL-4B-Instruct": dict(
        tie_word_embeddings=True, text_config=dict(TEXT, hidden_size=2560, intermediate_size=9728),
        vision_config=dict(TOWER, depth=24, hidden_size=1024, intermediate_size=4096, out_hidden_size=2560,
                           deepstack_visual_indexes=[5, 11, 17])),
    "Qwen/Qwen3-VL-8B-Instruct": dict(
        tie_word_embeddings=False, text_config=dict(TEXT, hidden_size=4096, intermediate_size=12288),
        vision_config=dict(TOWER, depth=27, hidden_size=1152, intermediate_size=4304, out_hidden_size=4096,
                           deepstack_visual_indexes=[8, 16, 24])),
}
CUDA_BYTES = 1e9    # assumed, not measured: CUDA's context, kernels and workspaces, and what the allocator wastes
IMAGE_TOKENS = 64   # a 256x256 picture: patches of 16x16 pixels, merged 2x2


class Live(TorchDispatchMode):
    """Counts the bytes of the tensors made inside this context: alive (`now`), and at most (`peak`)."""

    def __init__(self):
        super().__init__()
        self.known, self.now, self.peak = set(), 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.known.update(t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor))
        out = function(*args, **(kwargs or {}))
        for storage in [t.untyped_storage() for t in tree_leaves(out) if isinstance(t, torch.Tensor)]:
            if storage._cdata not in self.known:  # else a view, or made outside
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.free, storage._cdata, storage.nbytes())
        return out

    def free(self, key, size):
        self.known.discard(key)
        self.now -= size


def fused_attention(module, query, key, value, attention_mask=None, scaling=None, **_):
    """Keeps query, key, value, output and row sums, as the fused kernels of the CPU and of CUDA do under a padding mask
    (on the meta device torch itself would take the form that keeps [S, S]). query: [B, heads, S, head_dim]"""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    out, _ = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, scale=scaling, attn_mask=None if attention_mask is None else attention_mask.to(query.dtype))
    return out.transpose(1, 2).contiguous(), None


def skeleton(args):
    """The adapted network on the meta device: every shape and precision, no weights."""
    from huggingface_hub import try_to_load_from_cache
    from transformers import AttentionInterface, Qwen3VLConfig, Qwen3VLForConditionalGeneration
    file = (str(Path(args.model) / "config.json") if Path(args.model).is_dir()
            else try_to_load_from_cache(args.model, "config.json"))
    if isinstance(file, str) and Path(file).is_file():
        config = Qwen3VLConfig.from_pretrained(Path(file).parent)
    elif args.model in CONFIGS:
        config = Qwen3VLConfig(**CONFIGS[args.model])
    else:
        fail(f"no config.json for --model {args.model}: wanted a folder that has one, or {' or '.join(CONFIGS)}")
    if args.prompt_tokens[0] <= IMAGE_TOKENS:
        fail(f"--prompt_tokens {args.prompt_tokens[0]}: wanted more than the {IMAGE_TOKENS} of the picture in it")
    AttentionInterface.register("fused", fused_attention)
    config._attn_implementation = "fused"
    with torch.device("meta"):
        model = Qwen3VLForConditionalGeneration(config).to(torch.float32 if args.bits == 32 else torch.bfloat16)
        model.tie_weights()
        model.requires_grad_(False)
        if args.estimate == "cuda":  # as in `load`
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return add_lora(model, args.lora_rank, args.lora_vision)


def held(model, args):
    """{what: bytes} that stays from the first step to the last."""
    frozen, paged = "float32" if args.bits == 32 else "bfloat16", args.estimate == "cuda"
    linears = f"language model's linears, {'NF4' if args.bits == 4 else frozen}"
    vision, tied = f"vision tower, {frozen}", network(model).config.tie_word_embeddings
    other = f"embeddings and lm_head ({'one matrix' if tied else 'two matrices'}), norms, {frozen}"
    adapters, gradients, adam = "adapters, float32", "their gradients", f"AdamW, {'8 bits, paged' if paged else 'float32'}"
    rows = dict.fromkeys([linears, vision, other, adapters, gradients, adam], 0)
    tower = network(model).config.vision_config  # a patch is float32, [channels, frames, height, width]
    patch = 4 * tower.in_channels * tower.temporal_patch_size * tower.patch_size**2
    rows["pictures of the step, float32"] = args.batch * IMAGE_TOKENS * tower.spatial_merge_size**2 * patch
    for name, weight in model.named_parameters():
        n = weight.numel()
        if weight.requires_grad:
            rows[adapters] += 4 * n
            rows[gradients] += 4 * n
            # two moments; in 8 bits with a float32 scale per 256, but not below 4,096 elements
            rows[adam] += 2 * n + 8 * -(-n // 256) if paged and n >= 4096 else 8 * n
        elif args.bits == 4 and re.search(LANGUAGE, name):
            # a scale of 8 bits per 64, for those a float32 per 256, an offset, and the code books of both levels
            rows[linears] += n // 2 + -(-n // 64) + 4 * -(-n // (64 * 256)) + 4 * (1 + 16 + 256)
        else:
            row = linears if re.search(LANGUAGE, name) else vision if ".visual." in name else other
            rows[row] += n * weight.element_size()
    return rows


def moments(model, args, slice_loss, B):
    """{moment: {what: bytes}} that a micro-batch of B rows needs on top of `held`, all responses at full length.

    slice_loss(hidden, teacher_hidden, lm_head): the step's own loss and its gradient for hidden [N, hidden size].
    """
    net, config = network(model), network(model).config
    text, tower, size = config.text_config, config.vision_config, net.lm_head.weight.element_size()
    T, (P, teacher_P) = args.max_new_tokens, args.prompt_tokens
    N, merge = B * T, tower.spatial_merge_size**2
    kv_cache = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * B * (P + T) * size
    # NF4 linears are dequantised one at a time, in the forward and in the backward pass
    matrix = {"a dequantised matrix": text.hidden_size * text.intermediate_size * size} if args.bits == 4 else {}
    empty = partial(torch.empty, device="meta", dtype=net.lm_head.weight.dtype)

    def language(embeddings):
        S = embeddings.shape[1]
        return net.model.language_model(
            inputs_embeds=embeddings, attention_mask=torch.empty(B, 1, S, S, dtype=torch.bool, device="meta"),
            position_ids=torch.empty(3, B, S, dtype=torch.long, device="meta"), use_cache=False).last_hidden_state

    def vision():
        x, ends = empty(B * IMAGE_TOKENS * merge, tower.hidden_size), torch.arange(B + 1) * IMAGE_TOKENS * merge
        angles, features = empty(len(x), tower.hidden_size // tower.num_heads), []
        for i, block in enumerate(net.model.visual.blocks):
            x = block(x, cu_seqlens=ends, position_embeddings=(angles, angles))
            if i in tower.deepstack_visual_indexes:
                features.append(net.model.visual.deepstack_merger_list[len(features)](x))
        return net.model.visual.merger(x).view(B, IMAGE_TOKENS, -1), features

    model.train()
    for weight in model.parameters():
        if weight.requires_grad:
            weight.grad = torch.empty_like(weight)  # counted in `held`
    with Live() as live, torch.no_grad(), model.disable_adapter():
        language(empty(B, teacher_P + T, text.hidden_size))
    teacher = live.peak
    with Live() as live:
        pictures, features = vision()
        hidden = language(torch.cat([pictures, empty(B, P + T - IMAGE_TOKENS, text.hidden_size)], 1))
        forward, saved = live.peak, live.now
        live.peak = 0
        hidden.backward(torch.empty_like(hidden))
        backward = live.peak
    few, state = min(N, 2 * args.slice), 4 * text.hidden_size * size  # a third slice finds the room of the first
    with Live() as live:
        slice_loss(empty(few, text.hidden_size).requires_grad_(), empty(few, text.hidden_size), net.lm_head)
    states, logits = N * state, live.peak - few * state  # student, teacher, gradient, its copy as it enters the network
    keep = {f"kept for the backward pass{', layer inputs' if args.estimate == 'cuda' else ''}": saved}
    back = "one layer, recomputed, and its gradients" if args.estimate == "cuda" else "gradients on their way"
    return {
        "rollout": {"KV cache": kv_cache, "logits of one token": 4 * 4 * B * text.vocab_size, **matrix},
        "teacher": {"one layer at a time": teacher, **matrix},
        "student": {**keep, "one layer at a time": forward - saved, **matrix},
        "loss": {**keep, "hidden states and gradient": states, "one slice of logits": logits},
        "backward": {**keep, "hidden states and gradient": states, back: backward - saved, **matrix}}


def estimate(args, slice_loss):
    """Print what one distillation step would hold and the largest micro-batches; returns (held, moments, total) in bytes."""
    model, B = skeleton(args), args.micro_batch
    resident = held(model, args)
    if args.estimate == "cuda":
        resident["CUDA itself (assumed, not measured)"] = CUDA_BYTES
    # From B rows to 2B everything grows in proportion, so two counts give the largest micro-batch.
    now, twice = moments(model, args, slice_loss, B), moments(model, args, slice_loss, 2 * B)
    base, need = sum(resident.values()), {name: sum(rows.values()) for name, rows in now.items()}
    grow = {name: (sum(rows.values()) - need[name]) / B for name, rows in twice.items()}  # bytes per row
    worst = max(need, key=need.get)
    student, teacher = args.prompt_tokens
    print(f"\nOne distillation step on {args.estimate}: micro-batch {B}, LoRA rank {args.lora_rank}, slices of {args.slice},\n"
          f"prompts of {student} (student, {IMAGE_TOKENS} of them the picture) and {teacher} tokens (teacher), "
          f"every response {args.max_new_tokens} tokens long.\nGB = 10^9 bytes.\n")
    for title, rows in [("held throughout", resident), *((f"at its worst: {name}" if name == worst else name, rows)
                                                         for name, rows in now.items())]:
        print(f"{sum(rows.values()) / 1e9:8.3f}  {title}")
        for row, size in rows.items():
            print(f"{size / 1e9:16.3f}  {row}")
    print(f"{(base + need[worst]) / 1e9:8.3f}  peak = held throughout + {worst}\n")
    for card in (8, 12, 16, 24) if args.estimate == "cuda" else ():
        most = min(B + (card * 2**30 - base - need[name]) // grow[name] for name in need)
        verdict = f"micro-batch up to {most:.0f}" if most > 0 else "does not fit"
        print(f"{card:3d} GB card ({card * 2**30 / 1e9:.1f} GB): {verdict}")
    if args.estimate == "cuda":
        print("\nNo GPU was measured. On the CPU the same count is within 15% of the measured peak\n"
              "(python tests/bench_memory.py); what CUDA itself takes is a guess, and a desktop on the same card comes on top.")
    return resident, now, base + need[worst]
