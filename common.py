"""The model's side of MGSD and the run of a stage. Knows no puzzle.

What the two stages and the evaluation share, in this order:
    BACKBONES            model, bits and adapter of each preset
    fetch, load          a checkpoint's folder; a frozen network in 4, 16 or 32 bits
    add_lora             a fresh LoRA adapter, or one from disk; without it the network is the base
    encode, take_rows    prompts and pictures -> a left-padded batch (`encode` is the one caller of
                         the chat template)
    response_hidden      the hidden states that predict given response tokens
    light_adapters, Decoder, GraphDecoder            how the network reads one token more
    sample, decode       responses, token by token, the EOS included
    validate             greedy responses to held-out prompts, and what they are worth
    add_flags, resolve   flags, and where their values come from
    read_run, check_backbone                         the run that is continued
    schedule, adamw, average_gradients               what an optimizer step is made of
    join_processes, once, gather                     several processes
    Run                  a stage's folder: log, checkpoint, resuming
"""
import ast
import contextlib
import json
import logging
import math
import os
import platform
import shlex
import sys
import time
import warnings
import zlib
from datetime import timedelta
from functools import cache, partial
from importlib.metadata import version
from io import BytesIO
from pathlib import Path

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch on a CPU: fewer, larger memory pages

import numpy as np
import psutil
import torch
from PIL import Image
from torch import distributed
from torch.nn.functional import linear, rms_norm
from tqdm import tqdm

# What needs no torch stands in gen_data.py, which must not load it: messages, flags and files.
from gen_data import (
    digest,
    digest_file,
    digest_rows,
    fail,
    foreign_name,
    in_one_line,
    lock_folder,
    read_record,
    real_number,
    whole_number,
    write_bytes,
    write_text,
)
from gen_data import run_script as run_script  # common.run_script, as the scripts call it

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # reports a missing optional CPU kernel
# The newer name came with transformers 5.23.
warnings.filterwarnings("ignore", message=".*gradient_checkpointing.* is deprecated")

TINY = str(Path(__file__).parent / "tiny")
MAX_PIXELS = 512 * 512  # the paper's upper limit of a picture

# A preset's backbone. Its steps, rates and batches stand in the stage that uses them.
QWEN = {
    "bits": 4,
    "lora_rank": 16,
    "lora_vision": 0,
    "max_pixels": MAX_PIXELS,
}
BACKBONES = {
    "tiny": {**QWEN, "model": "tiny", "bits": 32, "lora_vision": 1},  # the folder beside this file
    "2b": {**QWEN, "model": "Qwen/Qwen3-VL-2B-Instruct"},
    "4b": {**QWEN, "model": "Qwen/Qwen3-VL-4B-Instruct"},
    "8b": {**QWEN, "model": "Qwen/Qwen3-VL-8B-Instruct"},
}


def warn(message):
    """One line on stderr, below a progress bar too."""
    if process_rank() == 0:
        tqdm.write(f"warning: {message}", file=sys.stderr)


# ---------------------------------------------------------------- loading

# The classes that are served, by `model_type` of config.json. graph: is a decoding step captured as
# a CUDA graph? Qwen3-VL's was, on a card; Qwen2.5-VL's language model does the same operations.
# Qwen3.5's linear attention is that of whatever package is installed, so it is not.
SERVED = {
    "qwen3_vl": {"graph": True},
    "qwen2_5_vl": {"graph": True},
    "qwen3_5": {"graph": False},
}
SMALL_FILES = (".json", ".jinja", ".txt", ".model")  # of a checkpoint: all but its weights


@cache
def fetch(model):
    """The folder of --model: the bundled one, one of yours, or the hub's.

    What is in the hub's cache whole is taken as it is, without a question; else it is downloaded.
    """
    if model == BACKBONES["tiny"]["model"]:
        return Path(TINY)
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download, try_to_load_from_cache
    patterns = [f"*{suffix}" for suffix in (*SMALL_FILES, ".safetensors")]
    with in_one_line(f"--model {model} is no folder here, nor can the hub give it"):
        config = try_to_load_from_cache(model, "config.json")
        if isinstance(config, str) and is_whole(Path(config).parent):
            return Path(config).parent
        return Path(snapshot_download(model, allow_patterns=patterns, ignore_patterns="*/*"))


def is_whole(folder):
    """Are all files of a checkpoint there? A download that was interrupted leaves some."""
    index = folder / "model.safetensors.index.json"
    names = {"model.safetensors"}
    if index.is_file():
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    names.add("tokenizer_config.json")
    return (all((folder / name).is_file() for name in names)
            and any(folder.glob("*processor_config.json")))


def digest_folder(folder):
    """{file: digest} of a checkpoint or an adapter; {} without one.

    Small files by their contents; of weights the size and 4 KiB at each of 256 even offsets, which
    tell two trainings apart without reading gigabytes.
    """
    digests = {}
    for file in sorted(Path(folder).iterdir()) if folder else ():
        if file.suffix in SMALL_FILES:
            digests[file.name] = digest_file(file)
        elif file.suffix == ".safetensors":
            size, parts = file.stat().st_size, []
            with open(file, "rb") as content:
                for offset in np.linspace(0, max(0, size - 4096), 256).astype(int):
                    content.seek(offset)
                    parts.append(zlib.crc32(content.read(4096)))
            digests[file.name] = digest(size, parts)
    return digests


def load_processor(model, max_pixels=MAX_PIXELS):
    """Tokenizer and image processor of --model. max_pixels: a larger picture is shrunk.

    Fails where they cannot encode a picture and a text.
    """
    from transformers import AutoProcessor
    with in_one_line(f"--model {model}: its processor cannot be used"):
        processor = AutoProcessor.from_pretrained(fetch(model))
        processor.chat_template = processor.chat_template or processor.tokenizer.chat_template
        # max_pixels for from_pretrained may be ignored (transformers issue 41955).
        size = processor.image_processor.size
        most = min(size["longest_edge"], max_pixels)
        processor.image_processor.size = {"shortest_edge": min(size["shortest_edge"], most),
                                          "longest_edge": most}
        batch = fixed_batch(processor)
        # A text model's template prints the list as Python has it: it would be read as code.
        if "two\nlines" not in processor.decode(batch["input_ids"][0]) \
                or not batch["mm_token_type_ids"].any():
            raise ValueError("its chat template does not render a picture and a text")
    return processor


def fixed_batch(processor, device="cpu"):
    """A fixed text with a fixed picture, encoded: what a network is known by."""
    picture = Image.linear_gradient("L").resize((64, 64)).convert("RGB")
    return encode(processor, ["two\nlines"], [picture], device)


@torch.no_grad()
def fixed_logits(model):
    """Logits [8, vocabulary] of the end of the fixed text below the fixed picture.

    The picture counts: an adapter may change the vision tower alone.
    """
    net = network(model)
    position_ids, _ = positions(net, net.fixed_batch)
    hidden = net.model(**net.fixed_batch, position_ids=position_ids, use_cache=False)
    return net.lm_head(hidden.last_hidden_state[0, -8:]).float()


def compute_dtype(bits):
    """What the network computes in. Cards without bfloat16 (T4, RTX 20xx) only emulate it, slowly.

    Adapters are float32 all the same, and so are logits and losses.
    """
    if bits == 32:
        return torch.float32
    if torch.cuda.is_available() and not torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.float16
    return torch.bfloat16


def embed_patches(conv, patches):
    """The convolution `conv` of patches as large as its kernel [N, ...] -> [N, outputs, 1, 1, 1].

    Each is one product: the same numbers as a linear's, without the Conv3d in bf16 that is slow
    since torch 2.9 (pytorch issue 166643, transformers issue 45750).
    """
    out = linear(patches.flatten(1), conv.weight.flatten(1), conv.bias)
    return out[..., None, None, None]


NORMS = ("Qwen3VLTextRMSNorm", "Qwen2_5_VLRMSNorm")  # Qwen3.5's has another formula


def normalise(norm, x):
    """What such a module writes out in eight operations, as torch's: one kernel on CUDA."""
    return rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)


def load(path, bits, max_pixels=MAX_PIXELS):
    """(model, processor) of a checkpoint in SERVED: frozen, in eval mode, on the GPU if there is.

    bits: 4 (NF4, double quantisation; vision tower and lm_head stay in 16 bits), 16, 32. A
    checkpoint that is stored in 4 bits is taken as it is. max_pixels: a larger picture is shrunk.
    """
    from transformers import AutoModelForImageTextToText, BitsAndBytesConfig
    processor = load_processor(path, max_pixels)
    if (fetch(path) / "adapter_config.json").exists():  # transformers would load its base, adapted
        fail(f"--model {path} holds an adapter: wanted the checkpoint that it was trained on")
    cuda, dtype, options = torch.cuda.is_available(), compute_dtype(bits), {}
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    if bits == 4:  # None would be taken for a form of quantisation
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype, llm_int8_skip_modules=["lm_head", "model.visual"])
    with in_one_line(f"--model {path} cannot be loaded"):
        model, found = AutoModelForImageTextToText.from_pretrained(
            fetch(path), dtype=dtype, device_map={"": device}, use_safetensors=True,
            output_loading_info=True, **options)
    if model.config.model_type not in SERVED:
        fail(f"--model {path} is a {model.config.model_type}: wanted {' or '.join(SERVED)}")
    wrong = {*found["missing_keys"], *found["unexpected_keys"] - {"lm_head.weight"}}  # may be tied
    if wrong:
        fail(f"--model {path}: {len(wrong)} weights are missing, or more than its config.json asks "
             f"for, such as {min(wrong)}")
    four = getattr(model, "is_loaded_in_4bit", False)
    if four != (bits == 4) or four != getattr(model, "is_quantized", False):
        fail(f"--model {path}: its weights are stored in a form that is not --bits {bits}")
    conv = model.model.visual.patch_embed.proj
    conv.forward = partial(embed_patches, conv)
    for module in model.modules():
        if type(module).__name__ in NORMS:
            module.forward = partial(normalise, module)
    # As it was given, into adapters' files, but for where it lies on this machine's disk.
    name = Path(path).name if Path(path).is_absolute() else path
    model.name_or_path = model.config.name_or_path = name
    model.requires_grad_(False)
    if cuda:
        # With an explicit mask, cuDNN's attention gives NaN gradients at some lengths (pytorch
        # issue 196678, trl issue 7181).
        torch.backends.cuda.enable_cudnn_sdp(False)
        # Takes effect in train mode only.
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if bits == 4:
        from bitsandbytes.nn import Linear4bit
        for name, module in model.named_modules():
            if isinstance(module, Linear4bit):
                if ".language_model." not in name:
                    fail(f"--model {path}: {name} is stored in 4 bits: wanted the vision tower and "
                         "lm_head in 16")
                # Else a forward pass in eval mode on the CPU would repack the weights for a kernel
                # that has no backward: later gradients would be wrong.
                module.support_avx512bf16_for_cpu = False
                module.compute_dtype = dtype  # a stored checkpoint may name another one
    model.eval()
    model.fixed_batch = fixed_batch(processor, device)
    model.base_logits = fixed_logits(model)
    return model, processor


def linears(net, vision=False):
    """Names of the linears that a fresh adapter sits on: the language model's, and `vision`'s."""
    towers = ("model.language_model.", "model.visual.")[:2 if vision else 1]
    return [name for name, module in net.named_modules()
            if isinstance(module, torch.nn.Linear) and name.startswith(towers)]


def add_lora(model, rank=None, vision=False, path=None):
    """Wrap `model` in a PeftModel with a fresh adapter, or with the one saved in folder `path`.

    A fresh one sits on all of the language model's linears; `vision` adds the vision tower's. A
    saved one keeps its own configuration; it may be of another tool. Fails where it does not fit,
    where a trained weight is no LoRA of a layer (it would change the teacher too, or the head that
    both share), and where the network with its adapter off is not the base.
    """
    import peft
    from peft.tuners.lora import LoraLayer
    missing = []
    if path:
        with in_one_line(f"the adapter in {path} does not fit {model.config.name_or_path}"):
            model, missing = add_saved_lora(model, path)
    remove_dropout(model)
    if path:
        model.peft_config["default"].lora_dropout = 0.0
    else:
        model = peft.get_peft_model(model, peft.LoraConfig(
            r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=linears(model, vision)))
    wrong = missing + [name for name, weight in model.named_parameters()
                       if weight.requires_grad and ("lora_" not in name or "lm_head" in name)]
    if wrong:
        fail(f"the adapter of {path or 'a fresh start'} does not fit {model.config.name_or_path}: "
             f"{len(wrong)} weights are missing, unknown or no LoRA of a layer, first {wrong[0]}")
    with model.disable_adapter():
        check_base(model)
    # PEFT shortens names to endings, which elsewhere fit more than is meant, and servers refuse a
    # pattern. A set has another order in every process.
    model.peft_config["default"].target_modules = sorted(
        name for name, module in network(model).named_modules() if isinstance(module, LoraLayer))
    return model


def add_saved_lora(model, path):
    """(the model with the adapter in folder `path`, names of weights that it lacks or that do not
    belong); PEFT raises what else is wrong.
    """
    import peft
    from safetensors.torch import load_file
    config = peft.PeftConfig.from_pretrained(path)
    if config.peft_type != "LORA":
        raise ValueError(f"it is {config.peft_type.value}, wanted LORA")
    config.inference_mode = False
    model = peft.get_peft_model(model, config)
    own, saved = peft.get_peft_model_state_dict(model), {}
    for name, weight in load_file(Path(path) / "adapter_model.safetensors").items():
        # A text-only class has no `language_model` in its names.
        inner = name.replace("base_model.model.model.", "base_model.model.model.language_model.", 1)
        saved[inner if name not in own and inner in own else name] = weight
    peft.set_peft_model_state_dict(model, saved)
    return model, sorted(own.keys() ^ saved.keys())


def remove_dropout(model):
    """Set what a checkpoint or a saved adapter brings of dropout to 0, and say so in one line.

    What is sampled, in eval mode, must be what is scored, in train mode.
    """
    found = set()
    for module in model.modules():
        name = "p" if isinstance(module, torch.nn.Dropout) else "attention_dropout"
        if getattr(module, name, 0):
            found.add(getattr(module, name))
            setattr(module, name, 0.0)
    if found:
        warn(f"a dropout of {', '.join(map(str, sorted(found)))} is set to 0: what is sampled must "
             "be what is scored")


def remove_lora(model):
    """The network without its adapter. Fails where that is not what was loaded."""
    model = model.unload()
    check_base(model)
    return model


def check_base(model):
    """Fails where the network, its adapters off, is not the one that `load` gave any more."""
    net = network(model)
    if net.training:  # with checkpointing and dropout it computes otherwise
        return
    change = (fixed_logits(model) - net.base_logits).abs().max()
    if not change <= 0.001 * net.base_logits.abs().max():
        fail(f"without adapters the network is not the base any more: its logits differ by "
             f"{change:.2g}; teacher and base would be another network")


def network(model):
    """The transformers model inside, adapted or not (LoRA lives in its modules)."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def head(model):
    """What turns a network's hidden states into logits."""
    return network(model).lm_head


# ---------------------------------------------------------------- text and pictures -> batch

def encode(processor, prompts, images=None, device="cpu"):
    """Prompts, with one PIL image each or none -> a left-padded batch up to where responses begin.

    Returns a dict of tensors: input_ids, attention_mask, mm_token_type_ids [B, P], and with
    pictures pixel_values [patches of all rows, values], image_grid_thw [pictures, 3].
    """
    # A template that can think is asked not to; others warn of what they do not know.
    options = {"enable_thinking": False} if "enable_thinking" in processor.chat_template else {}
    chats = []
    for prompt, image in zip(prompts, images or [None] * len(prompts), strict=True):
        content = [{"type": "text", "text": prompt}]
        if image is not None:
            content.insert(0, {"type": "image", "image": image})
        chats.append([{"role": "user", "content": content}])
    batch = processor.apply_chat_template(
        chats, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt",
        processor_kwargs={"padding": True, "padding_side": "left"}, **options)
    return {name: tensor.to(device) for name, tensor in batch.items()}


def encode_responses(processor, texts, device="cpu"):
    """Reference responses -> (ids [B, T], mask [B, T]): right-padded, the EOS included."""
    end = processor.tokenizer.eos_token
    batch = processor.tokenizer([text + end for text in texts], add_special_tokens=False,
                                padding=True, padding_side="right", return_tensors="pt")
    return batch["input_ids"].to(device), batch["attention_mask"].to(device)


def check_lengths(model, processor, texts, new_tokens=0):
    """Fails if a text of {name: text} leaves no room in the context for picture and response."""
    context = network(model).config.text_config.max_position_embeddings
    images = processor.image_processor
    picture = images.size["longest_edge"] // (images.patch_size * images.merge_size) ** 2
    picture += 44  # the frame around a chat
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
        shown = (prompt["mm_token_type_ids"] == 1).any(1).tolist()  # a teacher's may have none
        rows = slice(sum(shown[:rows.start or 0]), sum(shown[:rows.stop]))
        patches = prompt["image_grid_thw"].prod(1).tolist()  # of each picture
        if rows.start < rows.stop:
            taken["pixel_values"] = torch.cat(prompt["pixel_values"].split(patches)[rows])
            taken["image_grid_thw"] = prompt["image_grid_thw"][rows]
    return taken


def micro_batches(size, tensors, prompts):
    """`size` rows at a time, needless padding cut -> parts of the tensors, then of the prompts.

    tensors: [B, T] each, the second one the mask of the response tokens; prompts: from `encode`.
    """
    mask = tensors[1]
    for i in range(0, len(mask), size):
        some = slice(i, i + size)
        length = mask[some].sum(1).max()
        yield (*[tensor[some, :length] for tensor in tensors],
               *[take_rows(prompt, some) for prompt in prompts])


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
    """One token per row of logits [B, vocabulary] and of numbers in [0, 1), float64 [B].

    Returns the tokens and their log-probabilities, [B] each.

    By inverting the cumulative distribution: one random number per row (torch.multinomial draws
    one per token of the vocabulary, and spends most of its time on that), and exact: in float64 the
    rarest of 151,936 tokens keeps its share.
    """
    if temperature != 1:  # else a pass over the vocabulary too many
        logits = logits / temperature
    p = logits.softmax(-1)
    cumulative = p.cumsum(-1, dtype=torch.float64)
    # right=True: never a token of probability 0. The clamp: still a token where the logits are not
    # finite; such a step is then skipped for its loss.
    token = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True)
    token = token.clamp_(max=logits.shape[1] - 1)
    return token[:, 0], p.gather(1, token)[:, 0].log()


def eos_tokens(model, processor):
    """Every token that ends a response: the tokenizer's, and those of generation_config.

    Qwen3-VL has two, <|im_end|> and <|endoftext|>; the second is its padding too.
    """
    named = network(model).generation_config.eos_token_id
    named = named if isinstance(named, list) else [named]
    ends = {processor.tokenizer.eos_token_id, *named} - {None}
    return torch.tensor(sorted(ends), device=model.device)


@contextlib.contextmanager
def light_adapters(model):
    """While it lasts, plain LoRA is two products in the base's precision, in place of PEFT's six.

    Without gradients, for sampling: one token at a time is bound by the number of kernels. Adapters
    that are off, several at once, and other kinds (DoRA, with a bias) keep PEFT's forward.
    """
    from peft.tuners.lora import LoraLayer
    light, dtype = [], network(model).dtype
    for module in network(model).modules():
        if isinstance(module, LoraLayer) and is_plain(module):
            name, = module.active_adapters
            down = module.lora_A[name].weight                                  # [rank, inputs]
            up = module.lora_B[name].weight * module.scaling[name]             # [outputs, rank]
            module.forward = partial(
                light_forward, module.get_base_layer(), down.to(dtype), up.to(dtype).T)
            light.append(module)
    try:
        yield
    finally:
        for module in light:
            del module.forward  # the class's own again


def is_plain(module):
    """Is this LoraLayer base(x) + scaling * B(A(x)), with one adapter, and on?"""
    if module.disable_adapters or module.merged or module.lora_variant:
        return False
    names = module.active_adapters
    return (isinstance(module.get_base_layer(), torch.nn.Linear) and len(names) == 1
            and names[0] in module.lora_A and module.lora_B[names[0]].bias is None)


def light_forward(base, down, up, x):
    """base(x) [..., outputs], and what an adapter adds to it. x: [..., inputs]."""
    out = base(x)
    out.view(-1, out.shape[-1]).addmm_(linear(x.reshape(-1, x.shape[-1]), down), up)
    return out


class Decoder:
    """A network and the keys and values of what it has read: tokens in, the next logits out.

    logits: [rows, vocabulary], float32, first those of the token after the prompts.
    """

    def __init__(self, net, batch, new_tokens):
        self.net, self.attention, self.cache = net, batch["attention_mask"], None
        position_ids, self.position = positions(net, batch)
        self.read(**batch, position_ids=position_ids)

    def read(self, **inputs):
        out = self.net.model(**inputs, past_key_values=self.cache, use_cache=True)
        self.cache = out.past_key_values
        self.logits = self.net.lm_head(out.last_hidden_state[:, -1]).float()

    def step(self, token):
        """Read one token of each row [rows]."""
        self.attention = torch.cat([self.attention, torch.ones_like(token)[:, None]], 1)
        self.read(input_ids=token[:, None], attention_mask=self.attention,
                  position_ids=self.position[None, :, None].expand(3, -1, -1))
        self.position = self.position + 1

    def wants_to_drop(self, going):
        """Is it time to take rows that have ended out of the batch? going: bool [rows]."""
        return not going.all()

    def keep(self, going):
        self.attention, self.position = self.attention[going], self.position[going]
        self.cache.reorder_cache(going.nonzero()[:, 0])  # states of linear attention too


class GraphDecoder(Decoder):
    """The same on CUDA, where a step is thousands of kernels, longer to launch than to run.

    Keys and values lie in fixed memory, so that a step is captured once as a CUDA graph and then
    replayed by one launch: 19 ms in place of 148 (4b in 4 bits, 32 rows, an H100; docs/gpu.md).
    """

    def __init__(self, net, batch, new_tokens):
        from transformers import StaticCache
        self.net, (count, length) = net, batch["input_ids"].shape
        self.cache = StaticCache(net.config.text_config, max_cache_len=length + new_tokens)
        position_ids, position = positions(net, batch)
        self.read(**batch, position_ids=position_ids)
        # What a step reads, in place: the token, its position, which keys it sees.
        self.token = position.new_zeros(count, 1)
        self.position = position[None, :, None].repeat(3, 1, 1)                       # [3, rows, 1]
        self.column = torch.tensor([length], device=net.device)
        self.attention = torch.nn.functional.pad(                          # [rows, 1, 1, all keys]
            batch["attention_mask"].bool(), (0, new_tokens))[:, None, None]
        self.warm, self.replay = False, None

    def read_token(self):
        self.attention.index_fill_(3, self.column, True)
        self.read(input_ids=self.token, attention_mask=self.attention, position_ids=self.position)
        self.column.add_(1)
        self.position.add_(1)

    def step(self, token):
        self.token.copy_(token[:, None])
        if not self.warm:  # the first one loads what is loaded late, which a capture may not
            self.warm = True
            self.read_token()
            return
        if self.replay is None:
            self.replay = captured(self.read_token)
        self.replay()

    def wants_to_drop(self, going):
        return going.sum() <= len(going) // 2  # not for a few: a new graph costs many tokens

    def keep(self, going):
        self.token, self.attention = self.token[going], self.attention[going]
        self.position = self.position[:, going]
        self.cache.reorder_cache(going.nonzero()[:, 0])
        self.warm, self.replay = False, None


def captured(work):
    """A function that does again on the device what `work` does there, by one launch."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()  # is recorded, not done
    return graph.replay


def decoder_of(net):
    """(class, tokens between two looks at who has ended: on a GPU each look makes Python wait)."""
    if net.device.type != "cuda":
        return Decoder, 1
    return (GraphDecoder if SERVED[net.config.model_type]["graph"] else Decoder), 8


@torch.no_grad()
def sample(model, processor, prompt, max_new_tokens, uniforms=None, temperature=1.0,
           rollout_batch=None):
    """Draw responses -> (ids, mask, drawn: the log-probability of each token), all [B, T].

    uniforms: a number in [0, 1) for every token that may be drawn, float64 [B, max_new_tokens], so
    that a token depends on no other row; None: greedy. rollout_batch: rows at a time, default all.
    A response goes through its first EOS inclusive; one without an EOS was cut at
    max_new_tokens. The distribution is the model's own softmax, with nothing but the picture
    placeholders removed, whatever generation_config says.
    """
    pad, ends = processor.tokenizer.pad_token_id, eos_tokens(model, processor)
    config = network(model).config
    banned = torch.tensor([config.image_token_id, config.video_token_id,
                           config.vision_start_token_id], device=model.device)
    if uniforms is not None:
        uniforms = torch.as_tensor(uniforms, device=model.device)
    count = len(prompt["input_ids"])
    ids = torch.full((count, max_new_tokens), pad, device=model.device)
    drawn = torch.zeros(count, max_new_tokens, device=model.device)        # 0 where greedy
    make_decoder, interval = decoder_of(network(model))
    with light_adapters(model):
        for begin in range(0, count, rollout_batch or count):
            rows = torch.arange(count, device=model.device)[begin:begin + (rollout_batch or count)]
            batch = take_rows(prompt, slice(begin, begin + len(rows)))
            going = torch.ones_like(rows, dtype=torch.bool)
            decoder = make_decoder(network(model), batch, max_new_tokens)
            for t in range(max_new_tokens):
                logits = decoder.logits.index_fill_(1, banned, -torch.inf)     # [rows, vocabulary]
                if uniforms is None:
                    token = logits.argmax(-1)                                        # [rows]
                else:
                    token, drawn[rows, t] = draw_token(logits, uniforms[rows, t], temperature)
                ids[rows, t] = token
                going &= ~torch.isin(token, ends)
                if t + 1 == max_new_tokens:
                    break
                # What rows that ended draw until they leave the batch is cut off below.
                if (t + 1) % interval == 0 and decoder.wants_to_drop(going):
                    rows, token = rows[going], token[going]
                    if len(rows) == 0:
                        break
                    decoder.keep(going)
                    going = going[going]
                decoder.step(token)
            del decoder, logits  # its keys and values, before there are those of the next rows
    ended = torch.isin(ids, ends).long()
    mask = (ended.cumsum(1) - ended == 0).long()    # by position: padding may be an EOS too
    length = mask.sum(1).max()
    ids, drawn = ids.where(mask.bool(), pad), drawn.where(mask.bool(), 0.0)
    return ids[:, :length], mask[:, :length], drawn[:, :length]


def was_cut(model, processor, ids, mask):
    """Of every response: did it reach the limit without an EOS?"""
    last = ids.gather(1, mask.sum(1, keepdim=True) - 1)[:, 0]
    return (~torch.isin(last, eos_tokens(model, processor))).tolist()


def decode(processor, ids, mask):
    """Response tokens [B, T] -> texts, without the EOS."""
    rows = [row[keep.bool()] for row, keep in zip(ids, mask, strict=True)]
    return processor.batch_decode(rows, skip_special_tokens=True)


def validate(model, processor, prompts, args, judge):
    """Greedy responses to held-out prompts -> (ids, mask [B, T], {"val_...": mean}).

    judge(i, text, cut) -> {name: value} of the i-th response, None where it counts in no mean. The
    means are over all processes.
    """
    model.eval()
    ids, mask, _ = sample(model, processor, prompts, args.max_new_tokens,
                          rollout_batch=args.rollout_batch)
    texts, cut = decode(processor, ids, mask), was_cut(model, processor, ids, mask)
    lines = []
    for i, length in enumerate(mask.sum(1).tolist()):
        lines.append({**judge(i, texts[i], cut[i]), "length": length})
    lines, means = sum(gather(lines), []), {}
    for name in sorted({name for line in lines for name in line}):
        values = [line[name] for line in lines if line.get(name) is not None]
        means[f"val_{name}"] = mean(values)
    return ids, mask, means


# ---------------------------------------------------------------- flags

def add_flags(parser):
    """The flags that all scripts share."""
    parser.epilog = ("Flags without a default here have the preset's: SETTINGS in this file, "
                     "BACKBONES in common.py. A run that is continued keeps its backbone.")
    add = parser.add_argument
    add("--preset", choices=BACKBONES, help="backbone and settings (default: those of the run that "
        "is continued, else tiny)")
    add("--model", help="checkpoint folder or hub name (default: the preset's)")
    add("--bits", type=int, choices=(4, 16, 32), help="frozen weights: NF4, bfloat16, float32")
    add("--max_pixels", type=whole_number(1024), help="a larger picture is shrunk to so many "
        f"(default: {MAX_PIXELS}, as 512x512; never above the checkpoint's own limit)")
    add("--data", help="data folder (default: the preset's, made now if it is not there)")
    add("--seed", type=whole_number(0), default=0, help="draws data, rows of a step, responses")


def add_training_flags(parser):
    """The flags that both stages share."""
    add = parser.add_argument
    add("--steps", type=whole_number(1), help="optimizer steps")
    add("--lr", type=real_number(above=True),
        help="peak learning rate (cosine, warm-up over the first tenth)")
    add("--max_grad_norm", type=real_number(above=True), default=1.0,
        help="a longer gradient is cut to this norm")
    add("--batch", type=whole_number(1), help="rows per optimizer step")
    add("--micro_batch", type=whole_number(1), help="rows per forward pass; changes no result")
    add("--rollout_batch", type=whole_number(1), help="rows sampled at a time; changes no result")
    add("--max_new_tokens", type=whole_number(1), help="length limit of a response, tokens")
    add("--lora_rank", type=whole_number(1), help="rank of the adapters; alpha is twice the rank")
    add("--lora_vision", type=int, choices=(0, 1), help="1: adapters on the vision tower too")
    add("--save_every", type=whole_number(1), default=10, help="steps between checkpoints")


def resolve(args, settings, run=None):
    """Fill what was not given: from the run that is continued (its backbone), else the preset.

    settings: {preset: {flag: value}} of the script. run: the folder of that run, or None.
    """
    old = backbone_of(run) if run else {}
    args.preset = args.preset or old.get("preset", "tiny")
    if args.preset != old.get("preset", args.preset) or args.preset not in BACKBONES:
        fail(f"--preset {args.preset}: the run in {run} has --preset {old['preset']}")
    values = {**BACKBONES[args.preset], **settings[args.preset]}
    for name, value in values.items():
        if hasattr(args, name) and getattr(args, name) is None:
            setattr(args, name, old.get(name, value) if name in BACKBONES[args.preset] else value)
    return args


# ---------------------------------------------------------------- the run that is continued

def read_run(folder):
    """args.json of the run in `folder` (or of the run whose adapter/ it is); {} without one."""
    for place in (Path(folder), Path(folder).parent):
        record = read_record(place)
        if record.get("kind") == "run":
            return record
    return {}


def adapter_place(run):
    """Where the adapter of a run lies: in its adapter/, else in the folder itself."""
    inside = Path(run, "adapter")
    return inside if inside.is_dir() else Path(run)


def backbone_of(run):
    """{flag: value} of the preset and the backbone that an adapter was trained with, as far as it
    says: another tool's only has its rank.
    """
    record, file = read_run(run), adapter_place(run) / "adapter_config.json"
    if record:
        return {name: record["args"][name] for name in ("preset", *BACKBONES["tiny"])
                if name in record["args"]}
    if not file.is_file():  # no adapter there, as `adapter_folder` will say
        return {}
    with in_one_line(f"cannot read {file}"):
        rank = json.loads(file.read_text(encoding="utf-8"))["r"]
    return {"lora_rank": rank, "lora_vision": None}


def check_backbone(run, args):
    """Fails where the adapter of `run` was trained on another backbone than `args` ask for.

    The model's files are compared, not what their folder is called.
    """
    record, before = read_run(run), backbone_of(run)
    now = {name: getattr(args, name) for name in before if hasattr(args, name)}
    if record:
        before["model"] = record["inputs"]["model"]
        now["model"] = digest(digest_folder(fetch(args.model)))
    for name, value in now.items():
        if before[name] is not None and value != before[name]:  # None: it does not say
            was = "other files" if name == "model" else before[name]
            fail(f"--{name} {getattr(args, name)}: {run} was trained with {was}")


def adapter_folder(run, flag):
    """Where the adapter of a run lies, or any LoRA adapter in PEFT's format. Fails without one.

    flag: the one that named the run.
    """
    folder = adapter_place(run)
    if not (folder / "adapter_model.safetensors").is_file():
        fail(f"{flag} {run}: no adapter there ({folder}/adapter_model.safetensors is missing); "
             "`python coldstart.py` makes one")
    return folder


def read_trained_rows(adapter):
    """Keys of the rows that an adapter was trained on; None where its run does not say."""
    file = adapter.resolve().parent / "trained_rows.json"
    with in_one_line(f"cannot read {file}"):
        record = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    if not isinstance(record, dict):  # a list: of an older form, whose keys were others
        warn(f"{adapter}: which rows it was trained on is not known ({file.name} is missing or of "
             "an older form), so that an evaluation cannot count them apart")
        return None
    return set(record["rows"])


# ---------------------------------------------------------------- an optimizer step

def schedule(optimizer, step, steps):
    """Set every group's rate: warm-up over a tenth of the steps, then a cosine, of its own peak.

    A peak is the group's rate when `Run.restore` saw it first. Returns the first group's rate.
    """
    warm = max(1, steps // 10)
    progress = max(0, step + 1 - warm) / (steps + 1 - warm)
    share = min((step + 1) / warm, 0.5 * (1 + math.cos(math.pi * progress)))
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * share
    return optimizer.param_groups[0]["lr"]


def adapter_weights(model):
    """The tensors that are trained, in the network's order."""
    return [weight for weight in model.parameters() if weight.requires_grad]


# Roles: `with role() as net:` gives the network that samples or scores.

@contextlib.contextmanager
def without_adapters(model):
    """The network with its adapters off."""
    with model.disable_adapter():
        yield model


@contextlib.contextmanager
def exchanged(model, weights, others):
    """The network whose `weights` (adapters) hold the values of `others`, while it lasts."""
    own = [weight.data for weight in weights]
    for weight, other in zip(weights, others, strict=True):
        weight.data = other
    try:
        yield model
    finally:
        for weight, data in zip(weights, own, strict=True):
            weight.data = data


def adamw(weights, lr):
    """torch's AdamW, without decay: adapters begin at zero and are small."""
    return torch.optim.AdamW(weights, lr=lr, weight_decay=0.0, fused=weights[0].is_cuda)


def average_gradients(weights, loss, tokens):
    """Sum gradients, loss and tokens over all processes; divide once -> (loss, tokens of all).

    weights: their .grad holds the gradient of this process's summed loss, and afterwards that of
    the mean over all tokens. loss, tokens: this process's sums. One message, in float32: a gradient
    that is divided before the backward pass loses most of its entries in float16.
    """
    flat = [weight.grad.float().flatten() for weight in weights]
    flat = torch.cat([*flat, flat[0].new_tensor([loss, tokens])])
    if distributed.is_initialized():
        distributed.all_reduce(flat)
    tokens = int(flat[-1])
    flat /= max(1, tokens)
    sizes = [weight.numel() for weight in weights]
    for weight, gradient in zip(weights, flat[:-2].split(sizes), strict=True):
        weight.grad.copy_(gradient.view_as(weight))
    return float(flat[-2]), tokens


def mean(values):
    """The mean as a float; None if there is nothing to take it of."""
    return sum(values) / len(values) if values else None


def versions():
    """What a result depends on besides the arguments."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    packages = {name: version(name) for name in ("torch", "transformers", "peft")}
    return {"python": platform.python_version(), **packages, "device": device}


def peak_gb():
    """Memory in GB: the peak so far of a CUDA device, else what this process holds now."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return psutil.Process().memory_info().rss / 1e9


# ---------------------------------------------------------------- several processes

def process_rank():
    """The number of this process among those that torchrun started; 0 of one alone."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def join_processes(batch):
    """Meet the processes that torchrun started -> the share of a step's rows of this one, a slice.

    The first process may take an hour (it makes data, downloads) while the others wait: a lost
    process is noticed as late.
    """
    with in_one_line("WORLD_SIZE in the environment: unset it, or use torchrun"):
        count = int(os.environ.get("WORLD_SIZE") or 1)
        if count > 1:
            if torch.cuda.is_available():
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            distributed.init_process_group(backend, timeout=timedelta(hours=1))
    if batch % count:
        fail(f"--batch {batch} cannot be shared equally by {count} processes")
    if process_rank() > 0:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
    return slice(process_rank(), None, count)


def once(work, *arguments):
    """What `work(*arguments)` gives, done by the first process while the others wait."""
    given = [work(*arguments) if process_rank() == 0 else None]
    if distributed.is_initialized():
        distributed.broadcast_object_list(given, src=0)
    return given[0]


def gather(thing):
    """[what every process gave], in every process."""
    if not distributed.is_initialized():
        return [thing]
    things = [None] * distributed.get_world_size()
    distributed.all_gather_object(things, thing)
    return things


def gather_rows(rows):
    """The rows of all processes in the order of the batch, of which each took every n-th."""
    return [row for share in zip(*gather(rows), strict=True) for row in share]


# ---------------------------------------------------------------- the run of a stage

# Arguments that change no step that is done, or whose contents are compared (`Run.inputs`).
FREE = {"preset", "model", "data", "init", "out", "steps", "micro_batch", "rollout_batch", "chunk",
        "save_every", "eval_every"}


def flush(path):
    """Make sure that a file is on the disk."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def modules_beside():
    """The files of the modules that run and lie beside this file: the scripts, and a fork's own."""
    here, files = Path(__file__).resolve().parent, set()
    for module in list(sys.modules.values()):
        file = Path(getattr(module, "__file__", None) or "").resolve()
        if file.parent == here and file.is_file():
            files.add(file)
    return sorted(files)


def code_of(file):
    """A script without its comments and spacing, as text; "" without one."""
    return ast.dump(ast.parse(file.read_text(encoding="utf-8"))) if file.is_file() else ""


class Run:
    """A stage's run in the folder args.out: one writer, and the same command resumes it.

        with Run(args, train=rows, val=held_out) as run:     # refuses what differs
            model, processor = run.load()                    # with the adapter of --init
            ...
            run.restore(model, optimizer=optimizer)          # from the checkpoint
            for step in run.steps():                         # saves after a step where it is due
                ...
                run.log(loss=loss)

    Nothing in the folder is changed before `restore`, and nothing is ever deleted: another run
    needs another folder. Nothing random is stored: a step draws from (seed, step). Of several
    processes the first one writes. step: steps done and logged.
    """
    LOGS = ("metrics.jsonl", "rollouts.jsonl", "not_finite.jsonl")

    def __init__(self, args, train, val):
        """train, val: rows, compared by their contents; those of train count as trained on."""
        self.args, self.out = args, Path(args.out)
        if args.model == BACKBONES["tiny"]["model"] and train[0].own:
            warn("the bundled backbone knows only its own prompts and boards: with others it tests "
                 "the plumbing and no more; --preset 4b is a real one")
        self.init, self.trained_on = None, set()
        once(fetch, args.model)
        if args.init != "none":
            check_backbone(args.init, args)
            self.init = adapter_folder(args.init, "--init")
            self.trained_on = read_trained_rows(self.init)  # None: not known
        if self.trained_on is not None:
            self.trained_on |= {row.key() for row in train}
        self.inputs = {"model": digest(digest_folder(fetch(args.model))),
                       "init": digest(digest_folder(self.init)), "train": digest_rows(train)}
        if val:
            self.inputs["val"] = digest_rows(val)
        self.step = self.saved = self.not_finite = 0
        self.state, self.lock, self.handed_out, self.read_back = None, None, False, False
        self.versions = versions()

    # ---- the folder

    def __enter__(self):
        if process_rank() == 0:
            self.out.mkdir(parents=True, exist_ok=True)
            foreign = foreign_name(self.out, "run")
            if foreign:
                fail(f"{self.out} holds {foreign} and no run: choose another --out")
            self.lock = lock_folder(self.out)
        self.state = once(self.read_checkpoint)
        if self.state:
            self.step = self.saved = self.state["step"]
            self.not_finite = self.state["not_finite"]
        return self

    def __exit__(self, *error):
        """Also after a `break`: what was done is saved, unless by an error."""
        if error[0] is None:
            self.close_step()
            if self.saved < self.step:
                self.save()
            if self.step < self.args.steps:
                print(f"{self.out}: stopped after step {self.step} of {self.args.steps}")
        if self.lock:
            self.lock.release()

    def read_checkpoint(self):
        """The latest state, None without one. Refuses what would make it another run's."""
        file = self.out / "checkpoint.pt"
        if not file.is_file():
            if (self.out / "adapter").exists():
                fail(f"{self.out} holds a trained adapter without its checkpoint.pt, and cannot be "
                     "resumed: choose another --out")
            return None
        with in_one_line(f"cannot resume from {file}"):
            state = torch.load(file, map_location="cpu", weights_only=True)
            done, _ = state["step"], state["things"]["adapter"]
        if done > self.args.steps:
            fail(f"{self.out}: {done} steps are done, more than --steps {self.args.steps}")
        record = read_record(self.out)
        changed = self.differences(record)
        if changed:
            fail(f"{self.out} holds {done} steps of another run, which differs in "
                 f"{'; '.join(changed)}. Choose another --out")
        others = [f"{name} {was} (now {self.versions[name]})"
                  for name, was in record["versions"].items() if was != self.versions[name]]
        if others:  # bit for bit is not promised then
            warn(f"the first steps in {self.out} were made with {', '.join(others)}")
        self.versions = record["versions"]
        return state

    def differences(self, record):
        """What differs from the run that wrote `record`, each with what shows it."""
        changed, now = [], json.loads(json.dumps(vars(self.args)))
        for name in now:
            if name not in FREE and now[name] != record["args"].get(name):
                changed.append(f"--{name} ({record['args'].get(name)} in {self.out}/args.json)")
        for name in self.inputs:
            if self.inputs[name] != record["inputs"].get(name, self.inputs[name]):
                changed.append(f"the contents of {name}")
        for script in modules_beside():
            kept = self.out / "code" / script.name
            if code_of(script) != code_of(kept):
                pair = shlex.join([str(kept), os.path.relpath(script)])
                back = shlex.join([os.path.relpath(script), str(kept)])
                changed.append(f"{script.name} (`diff {pair}` shows it; `cp {back}` and the same "
                               "command go on all the same)")
        return changed

    def load(self):
        """(model with the adapter of --init or a fresh one, processor)."""
        args = self.args
        model, processor = load(args.model, args.bits, args.max_pixels)
        torch.manual_seed(args.seed)
        model = add_lora(model, args.lora_rank, args.lora_vision, self.init)
        model.print_trainable_parameters()
        return model, processor

    def restore(self, model, **things):
        """Bring the adapter of `model` and `things` to where the checkpoint left them.

        things: by name, what a resume needs besides the adapter: objects with state_dict() and
        load_state_dict(), lists of tensors, or dicts. All of it is in every checkpoint from here
        on. Now that the run is agreed to, its folder is brought to the same step.
        """
        self.model = model
        self.things = {"adapter": [weight.data for weight in adapter_weights(model)], **things}
        self.settings = {}  # of optimizers' groups, as the code of today gives them
        for name, thing in self.things.items():
            for group in getattr(thing, "param_groups", ()):
                group["initial_lr"] = group["lr"]  # its peak, for `schedule`
                settings = {key: value for key, value in group.items() if key != "params"}
                self.settings.setdefault(name, []).append(settings)
        for name, thing in self.things.items() if self.state else ():
            with in_one_line(f"the {name!r} in {self.out}/checkpoint.pt does not fit"):
                self.restore_thing(name, thing)
        if process_rank() > 0:
            return
        record = {"kind": "run", "args": vars(self.args), "inputs": self.inputs,
                  "versions": self.versions}
        write_text(self.out / "args.json", json.dumps(record, indent=1) + "\n")
        (self.out / "code").mkdir(exist_ok=True)
        for script in modules_beside():
            write_bytes(self.out / "code" / script.name, script.read_bytes())
        if self.trained_on is not None:
            rows = {"rows": sorted(self.trained_on)}
            write_text(self.out / "trained_rows.json", json.dumps(rows) + "\n")
        for name in self.LOGS:  # lines of steps that will be done again
            file, size = self.out / name, self.state["sizes"].get(name, 0) if self.state else 0
            if file.is_file() and file.stat().st_size > size:
                os.truncate(file, size)
        if self.state:  # it may have been killed between checkpoint.pt and adapter/
            self.export("adapter")

    def restore_thing(self, name, thing):
        saved = self.state["things"][name]
        if isinstance(thing, dict):
            thing.update(saved)
        elif isinstance(thing, list):
            for tensor, value in zip(thing, saved, strict=True):
                tensor.copy_(value)
        else:
            thing.load_state_dict(saved)
        # Settings that the code has changed since count; moments are the checkpoint's.
        before = self.state["settings"].get(name, [])
        for group, was, now in zip(getattr(thing, "param_groups", ()), before,
                                   self.settings.get(name, []), strict=True):
            group.update({key: now[key] for key in now if now[key] != was.get(key)})

    # ---- the steps

    def steps(self):
        """The numbers of the steps to do; after each it is saved, if --save_every says so."""
        args, net = self.args, network(self.model)
        print(f"{args.model} in {args.bits} bits, computing in {net.dtype}, on {net.device}")
        if self.step == args.steps:
            print(f"{self.out}: all {self.step} steps were done before; nothing is trained")
        elif self.step:
            print(f"{self.out}: resuming after step {self.step} of {args.steps}")
        for step in tqdm(range(self.step, args.steps), desc=self.out.name, unit="step",
                         initial=self.step, total=args.steps, disable=process_rank() > 0):
            number = int(np.random.default_rng([args.seed, step]).integers(2**32))
            np.random.seed(number)  # for what a fork draws, such as dropout
            torch.manual_seed(number)
            self.seconds, self.last, self.handed_out = {}, time.perf_counter(), True
            yield step
            self.close_step()
            if self.step == args.steps or self.step % args.save_every == 0:
                self.save()

    def close_step(self):
        """A step that was handed out and not logged (`continue`, `break`) was left out."""
        if self.handed_out:
            self.handed_out = False
            self.step += 1
            self.append("metrics.jsonl", [{"step": self.step, "left_out": True}])

    def clock(self, phase):
        """The seconds since the last call, or since the step began, are this phase's."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self.last
        self.last = now

    def is_finite(self, loss, grad_norm, evidence, patience=5):
        """Can the step be taken? Else its rows are kept; `patience` such steps in a row fail."""
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self.not_finite = 0
            return True
        self.not_finite += 1
        what = {"step": self.step + 1, "loss": str(loss), "grad_norm": str(grad_norm)}
        self.append("not_finite.jsonl", [{**what, **row} for row in evidence])
        warn(f"step {self.step + 1} skipped: loss {loss}, gradient norm {grad_norm}; "
             f"its rows are in {self.out}/not_finite.jsonl")
        if self.not_finite == patience:
            more = f", or more than --bits {self.args.bits}" if self.args.bits < 32 else ""
            fail(f"{patience} steps in a row were not finite: try a lower --lr{more}")
        return False

    def log(self, **values):
        """A step is done: a line to the eye, one to metrics.jsonl, where nan and inf are null."""
        self.clock("rest")
        self.step, self.handed_out = self.step + 1, False
        values = {"step": self.step, **values, "step_seconds": sum(self.seconds.values()),
                  "peak_gb": peak_gb()}
        texts, line = [], {}
        for name, value in values.items():
            texts.append(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}")
            infinite = isinstance(value, float) and not math.isfinite(value)
            line[name] = None if infinite else value
        tqdm.write("  ".join(texts))
        self.append("metrics.jsonl", [{**line, "seconds": self.seconds}])

    def append(self, name, rows):
        """Lines for a .jsonl file beside the log (one of LOGS is cut back at a resume)."""
        if process_rank() == 0:
            with open(self.out / name, "a", encoding="utf-8", newline="\n") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)

    def save(self):
        """Replace checkpoint.pt, then adapter/; a kill leaves the old or the new of each."""
        self.saved = self.step
        weights = torch.cat([tensor.flatten() for tensor in self.things["adapter"]])
        if len(set(gather(zlib.crc32(weights.cpu().numpy())))) > 1:
            fail(f"the processes' adapters differ after step {self.step}; run the same command to "
                 "resume from the latest checkpoint")
        if process_rank() > 0:
            return
        things = {name: thing.state_dict() if hasattr(thing, "state_dict") else thing
                  for name, thing in self.things.items()}
        sizes = {name: (self.out / name).stat().st_size
                 for name in self.LOGS if (self.out / name).is_file()}
        if not self.read_back:  # once: what could not be resumed from fails now, by its name
            for name, thing in things.items():
                with in_one_line(f"the {name!r} given to restore() cannot be in a checkpoint"):
                    torch.load(BytesIO(saved_bytes(thing)), weights_only=True)
            self.read_back = True
        write_bytes(self.out / "checkpoint.pt", saved_bytes({
            "step": self.step, "not_finite": self.not_finite, "sizes": sizes, "things": things,
            "settings": self.settings}))
        self.export("adapter")

    def export(self, name):
        """The adapter as it is now, in PEFT's format, in the folder `name` of the run.

        File by file: a reader, or a kill, finds the old or the new, and what a user has put there
        stays.
        """
        if process_rank() > 0:
            return
        folder, aside = self.out / name, self.out / f"{name}.partial"
        with in_one_line(f"{folder} cannot be written"):
            self.model.save_pretrained(aside, save_embedding_layers=False)  # else asks the hub
        folder.mkdir(exist_ok=True)
        for file in aside.iterdir():
            flush(file)
            file.replace(folder / file.name)
        aside.rmdir()


def saved_bytes(thing):
    """A thing as `torch.save` writes it."""
    content = BytesIO()
    torch.save(thing, content)
    return content.getvalue()
