"""The model's side of MGSD and the run of a stage. Knows no puzzle.

What the two stages and the evaluation share, in this order:
    BACKBONES            model, bits and adapter of each preset
    load, add_lora       a network in 4, 16 or 32 bits; a fresh LoRA adapter, or one from disk
    encode, take_rows    prompts and pictures -> a left-padded batch (`encode` is the one caller of
                         the chat template)
    response_hidden      the hidden states that predict given response tokens
    light_adapters, Decoder, GraphDecoder            how the network reads one token more
    sample, decode       responses, token by token, the EOS included
    validate             greedy responses to held-out prompts, and what they are worth
    add_flags, resolve   flags, and where their values come from
    learning_rate, adamw, average_gradients          what an optimizer step is made of
    join_processes, gather                           several processes
    Run                  a stage's folder: log, checkpoint, resuming
"""
import ast
import contextlib
import difflib
import errno
import io
import json
import logging
import math
import os
import pickle
import platform
import re
import shutil
import signal
import sys
import time
import warnings
import zlib
from functools import partial
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch on a CPU: fewer, larger memory pages

import psutil
import torch
from safetensors import SafetensorError
from torch import distributed
from torch.nn.functional import linear
from tqdm import tqdm

# What needs no torch stands in gen_data.py, which must not load it: messages, flags and files.
from gen_data import (
    digest,
    digest_file,
    fail,
    flush,
    foreign_name,
    kind_of,
    lock_folder,
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
BACKBONES = {
    "tiny": {
        "model": "tiny",  # the folder beside this file
        "bits": 32,
        "lora_rank": 16,
        "lora_vision": 1,
        "max_pixels": MAX_PIXELS,
    },
    "2b": {
        "model": "Qwen/Qwen3-VL-2B-Instruct",
        "bits": 4,
        "lora_rank": 16,
        "lora_vision": 0,
        "max_pixels": MAX_PIXELS,
    },
    "4b": {
        "model": "Qwen/Qwen3-VL-4B-Instruct",
        "bits": 4,
        "lora_rank": 16,
        "lora_vision": 0,
        "max_pixels": MAX_PIXELS,
    },
    "8b": {
        "model": "Qwen/Qwen3-VL-8B-Instruct",
        "bits": 4,
        "lora_rank": 16,
        "lora_vision": 0,
        "max_pixels": MAX_PIXELS,
    },
}
DOWNLOADS = {"2b": 4.3, "4b": 8.9, "8b": 17.5}  # GB, of the presets' own models


def warn(message):
    """One line on stderr, below a progress bar too."""
    if process_rank()[0] == 0:
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
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
SMALL_FILES = ("*.json", "*.jinja", "*.txt", "*.model")  # of a checkpoint: all but its weights


def checkpoint_folder(model):
    """Where the files of --model lie: a folder, or the hub's cache (None if it is not there)."""
    if model == BACKBONES["tiny"]["model"]:
        return Path(TINY)
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import try_to_load_from_cache
    try:
        file = try_to_load_from_cache(model, "config.json")
    except ValueError:  # not the form of a hub name
        return None
    return Path(file).parent if isinstance(file, str) else None


def digest_folder(model):
    """{file: digest} of a checkpoint (a folder or hub name) or an adapter; {} without one.

    Small files by their contents; of weights the size and the first and last MiB, which tell them
    apart without reading gigabytes. In the hub's cache the folder's name is the commit.
    """
    folder, digests = model and checkpoint_folder(str(model)), {}
    for file in sorted(folder.iterdir()) if folder else ():
        if file.suffix in (".json", ".jinja", ".txt", ".model"):
            digests[file.name] = digest_file(file)
        elif file.suffix == ".safetensors":
            size = file.stat().st_size
            with open(file, "rb") as content:
                first = content.read(2**20)
                content.seek(max(0, size - 2**20))
                digests[file.name] = digest(size, first.hex(), content.read().hex())
    if folder and folder.parent.name == "snapshots":
        digests["commit"] = folder.name
    return digests


def quantised_bits(model):
    """4 if the checkpoint is stored in bitsandbytes' 4 bits, None if it is not quantised.

    Fails where it is quantised in another way. Reads config.json alone.
    """
    folder = checkpoint_folder(model)
    if not folder or not (folder / "config.json").is_file():
        return None
    try:
        stored = json.loads((folder / "config.json").read_text(encoding="utf-8")).get(
            "quantization_config")
    except (ValueError, AttributeError) as error:
        fail(f"--model {model}: config.json cannot be read ({error}): download it again")
    if stored and not (stored.get("quant_method") == "bitsandbytes" and stored.get("load_in_4bit")):
        fail(f"--model {model}: its weights are stored in {stored.get('quant_method')}, which "
             "cannot be trained here: wanted plain weights, or bitsandbytes' 4 bits")
    return 4 if stored else None


def weight_files(folder):
    """Names of a checkpoint's safetensors files: those that its index lists, or the one."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return ["model.safetensors"]
    try:
        return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        fail(f"{index} cannot be read ({type(error).__name__}: {error}): download it again")


def download(model, patterns):
    """The folder in the hub's cache with these files of `model`."""
    from huggingface_hub import snapshot_download
    try:
        return Path(snapshot_download(model, allow_patterns=patterns, ignore_patterns="*/*"))
    except Exception as error:  # of the network, of the hub, of the disk
        fail(f"--model {model} is no folder here, and cannot be had from the hub: "
             f"{' '.join(str(error).split())}")


def check_model(model):
    """Fails where --model is neither a checkpoint folder nor of the form of a hub's name."""
    folder = checkpoint_folder(model)
    if folder and (folder / "adapter_config.json").is_file():
        fail(f"--model {model} holds an adapter: wanted the checkpoint that it was trained on")
    if folder and not (folder / "config.json").is_file():
        fail(f"--model {model} is no checkpoint folder: it has no config.json")
    if not folder and (not re.fullmatch(r"\w[\w.-]*/[\w.-]+", model)
                       or Path(model).parent.exists()):
        fail(f"--model {model}: no such folder (a name on the hub is owner/name, where no folder "
             "`owner` is here)")


def find_checkpoint(model):
    """The folder of --model with its small files: on the disk, in the hub's cache, or fetched."""
    check_model(model)
    folder = checkpoint_folder(model)
    if model == BACKBONES["tiny"]["model"] or Path(model).is_dir():
        return folder
    # What is here whole is taken as it is, without a question to the hub.
    if folder and all((folder / name).is_file() for name in weight_files(folder)):
        return folder
    return download(model, SMALL_FILES)


def check_template(processor):
    """What is wrong with the chats that a processor renders; None if nothing is."""
    from jinja2 import TemplateError
    if not processor.chat_template:
        return "it has no chat template: wanted chat_template.jinja from the checkpoint it was " \
               "made of"
    text, picture = "two\nlines", {"type": "image"}  # a printed list would have \\n
    try:
        for pictures in ([], [picture]):
            chat = [{"role": "user", "content": [*pictures, {"type": "text", "text": text}]}]
            rendered = processor.apply_chat_template(chat, add_generation_prompt=True)
            if text not in rendered:
                return "its chat template renders no list of texts and pictures (the model would " \
                       "read it as code): wanted that of a vision-language model"
            if rendered.count(processor.image_token) != len(pictures):
                return f"its chat template renders no picture ({processor.image_token} is missing)"
    except (TemplateError, TypeError, ValueError) as error:
        return f"its chat template cannot be rendered ({error})"


def weight_shapes(file):
    """{name: shape} of a safetensors file, from its header. Fails where the file is not whole."""
    size = file.stat().st_size
    with open(file, "rb") as content:
        length = int.from_bytes(content.read(8), "little")
        header = content.read(length) if 8 + length <= size else b""
    try:
        entries = json.loads(header)
        entries.pop("__metadata__", None)
        whole = 8 + length + max(entry["data_offsets"][1] for entry in entries.values())
        shapes = {name: tuple(entry["shape"]) for name, entry in entries.items()}
    except (ValueError, LookupError, TypeError, AttributeError):
        fail(f"{file} is cut or broken: its {size:,} bytes hold no whole header; download it again")
    if size != whole:
        fail(f"{file} is cut: it has {size:,} bytes, wanted {whole:,}; download it again")
    return shapes


def check_keys(model, found):
    """Fails where a checkpoint's weights are not the network's. found: the loading info."""
    missing = sorted(found["missing_keys"])
    foreign = sorted(set(found["unexpected_keys"]) - {"lm_head.weight"})  # it may be tied
    for names, what in ((missing, "missing"), (foreign, "more than its config.json asks for")):
        if names:
            fail(f"--model {model} is not a whole checkpoint: weights are {what}, first of "
                 f"{len(names)} {names[0]}; download it again")
    for name, there, wanted in sorted(found["mismatched_keys"]):
        fail(f"--model {model}: {name} is {tuple(there)} there, and {tuple(wanted)} by its "
             "config.json; download it again")


def load_processor(model, max_pixels=MAX_PIXELS, folder=None):
    """Tokenizer and image processor of --model. max_pixels: a larger picture is shrunk."""
    from transformers import AutoProcessor
    folder = folder or find_checkpoint(model)
    try:
        processor = AutoProcessor.from_pretrained(folder)
    except Exception as error:  # tokenizers raises nothing more special
        fail(f"--model {model}: its tokenizer or processor cannot be loaded: "
             f"{' '.join(str(error).split())}")
    if not hasattr(processor, "image_processor"):
        fail(f"--model {model} has no image processor: wanted preprocessor_config.json or "
             "processor_config.json from the checkpoint it was made of")
    for name in ("pad", "eos"):
        if getattr(processor.tokenizer, f"{name}_token_id") is None:
            fail(f"--model {model}: its tokenizer has no {name} token: wanted \"{name}_token\" in "
                 "tokenizer_config.json")
    wrong = check_template(processor)
    if wrong:
        fail(f"--model {model}: {wrong}")
    # max_pixels for from_pretrained may be ignored (transformers issue 41955).
    size = processor.image_processor.size
    most = min(size["longest_edge"], max_pixels)
    processor.image_processor.size = {"shortest_edge": min(size["shortest_edge"], most),
                                      "longest_edge": most}
    return processor


def check_checkpoint(model, bits, max_pixels=MAX_PIXELS):
    """(folder, processor) of --model. Fails, before weights are read, where it cannot be served."""
    from transformers import AutoConfig, AutoModelForImageTextToText
    from transformers.utils.logging import disable_progress_bar
    folder = find_checkpoint(model)
    for file in folder.iterdir():
        if file.is_file():
            with open(file, "rb") as content:
                if content.read(40).startswith(b"version https://git-lfs"):
                    fail(f"--model {model}: {file.name} is only a pointer of Git LFS: `git lfs "
                         "pull` in its folder fetches the file")
    stored = quantised_bits(model)
    if stored and stored != bits:
        fail(f"--model {model} is stored in {stored} bits: --bits {bits} cannot be had from it")
    kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    if kind not in SERVED:
        fail(f"--model {model} is a {kind}: wanted {' or '.join(SERVED)}")

    processor = load_processor(model, max_pixels, folder)
    try:
        config = AutoConfig.from_pretrained(folder)
        with torch.device("meta"):  # a network without memory
            net = AutoModelForImageTextToText.from_config(config)
    except ImportError as error:
        fail(f"--model {model}: its config.json asks for an attention that is not installed: take "
             f"attn_implementation out of it ({' '.join(str(error).split())})")
    except (ValueError, TypeError, RuntimeError, AttributeError, LookupError) as error:
        fail(f"--model {model}: no network can be made of its config.json: "
             f"{' '.join(str(error).split())}")
    if not Path(model).is_dir() and model != BACKBONES["tiny"]["model"] and not all(
            (folder / name).is_file() for name in weight_files(folder)):
        folder = download(model, (*SMALL_FILES, "*.safetensors"))
    disable_progress_bar()  # not before: a download takes long
    shapes = {}
    for name in weight_files(folder):
        if not (folder / name).is_file():
            fail(f"--model {model}: {name} is missing in {folder}: wanted weights in safetensors")
        shapes |= weight_shapes(folder / name)
    if not stored:  # in 4 bits the names are others, and `load` compares them
        state = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
        logging.disable(logging.WARNING)  # a table of all differences
        _, found = type(net).from_pretrained(
            None, config=config, state_dict=state, device_map={"": "meta"},
            output_loading_info=True, ignore_mismatched_sizes=True)
        logging.disable(logging.NOTSET)
        check_keys(model, found)
    return folder, processor


def probe(model):
    """Logits [1, 8, vocabulary] of a fixed text: to tell if it is still the same network."""
    net = network(model)
    ids = torch.arange(10, 18, device=net.device)[None]
    with torch.no_grad():
        hidden = net.model(input_ids=ids, use_cache=False).last_hidden_state
        net.model.rope_deltas = None
        return net.lm_head(hidden).float()


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


def load(path, bits, max_pixels=MAX_PIXELS):
    """(model, processor) of a checkpoint in SERVED: frozen, in eval mode, on the GPU if there is.

    bits: 4 (NF4, double quantisation; vision tower and lm_head stay in 16 bits), 16, 32. A
    checkpoint that is stored in 4 bits is taken as it is. max_pixels: a larger picture is shrunk.
    """
    from transformers import AutoModelForImageTextToText, BitsAndBytesConfig
    folder, processor = check_checkpoint(path, bits, max_pixels)
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    stored = quantised_bits(path)
    dtype = compute_dtype(bits)
    quantisation = {}  # that of a checkpoint which is stored so; None would be taken for another
    if bits == 4 and not stored:
        quantisation["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype, llm_int8_skip_modules=["lm_head", "model.visual"])
    try:
        model, found = AutoModelForImageTextToText.from_pretrained(
            folder, dtype=dtype, device_map={"": device}, use_safetensors=True,
            output_loading_info=True, **quantisation)
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        fail(f"cannot load --model {path}: {' '.join(str(error).split())}")
    check_keys(path, found)
    conv = model.model.visual.patch_embed.proj
    conv.forward = partial(embed_patches, conv)
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
                    fail(f"--model {path}: {name} is stored in 4 bits; wanted the vision tower and "
                         "lm_head in 16")
                # Else a forward pass in eval mode on the CPU would repack the weights for a kernel
                # that has no backward: later gradients would be wrong.
                module.support_avx512bf16_for_cpu = False
                module.compute_dtype = dtype  # a stored checkpoint may name another one
    model.eval()
    model.base_probe = probe(model)
    return model, processor


def linears(net, vision=False):
    """Names of the linears that a fresh adapter sits on: the language model's, and `vision`'s."""
    towers = ("model.language_model.", "model.visual.")[:2 if vision else 1]
    return [name for name, module in net.named_modules()
            if isinstance(module, torch.nn.Linear) and name.startswith(towers)]


def add_lora(model, rank=None, vision=False, path=None):
    """Wrap `model` in a PeftModel with a fresh adapter, or with the one saved in folder `path`.

    A fresh one sits on all of the language model's linears; `vision` adds the vision tower's. A
    saved one keeps its own configuration; it may be of another tool.
    """
    import peft
    from peft.tuners.lora import LoraLayer
    if path:
        model = add_saved_lora(model, path)
    else:
        model = peft.get_peft_model(model, peft.LoraConfig(
            r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=linears(model, vision)))
    with model.disable_adapter():
        check_base(model)
    # Servers refuse a pattern, and PEFT shortens names to endings, which elsewhere fit more than is
    # meant. A set has another order in every process.
    config = model.peft_config["default"]
    if path is None or isinstance(config.target_modules, str):
        config.target_modules = [name for name, module in network(model).named_modules()
                                 if isinstance(module, LoraLayer)]
    config.target_modules = sorted(config.target_modules)
    return model


def remove_lora(model):
    """The network without its adapter. Fails where that is not what was loaded."""
    model = model.unload()
    check_base(model)
    return model


def check_base(model):
    """Fails where the network, its adapters off, is not the one that `load` gave any more."""
    base = getattr(network(model), "base_probe", None)  # of `load`, in eval mode
    if base is None or network(model).training:
        return
    change = (probe(model) - base).abs().max()
    if not change <= 0.001 * base.abs().max():
        fail(f"without adapters the network is not the base any more: its logits differ by "
             f"{change:.2g}; teacher and base would be another network")


def add_saved_lora(model, path):
    """The adapter in a folder. Refuses by name what would change the base or the sampling."""
    import peft
    from peft.tuners.lora import LoraLayer
    from safetensors.torch import load_file
    for name in ADAPTER_FILES:
        if not (Path(path) / name).is_file():
            fail(f"no adapter in {path}: {name} is missing; `python coldstart.py` makes one")
    try:
        config = peft.PeftConfig.from_pretrained(path)
        saved = load_file(Path(path) / "adapter_model.safetensors")
    except (SafetensorError, ValueError, TypeError, KeyError) as error:
        fail(f"cannot read the adapter in {path} ({' '.join(str(error).split())[:200]}): train it "
             "again, or choose another")
    if config.peft_type != "LORA":
        fail(f"the adapter in {path} is {config.peft_type.value}: wanted LoRA")
    for name, allowed in (("bias", ("none",)), ("modules_to_save", (None, [])),
                          ("init_lora_weights", (True, False, "gaussian", "orthogonal"))):
        value = getattr(config, name)
        if value not in allowed:
            fail(f"the adapter in {path} has {name} {value!r}: off, the network would not be "
                 f"the base; wanted {allowed[0]!r}")
    if config.lora_dropout:
        warn(f"the adapter in {path} has lora_dropout {config.lora_dropout}: set to 0, since what "
             "is sampled must be what is scored")
        config.lora_dropout = 0.0
    config.inference_mode, config.init_lora_weights = False, True
    backbone = model.config.name_or_path
    try:
        model = peft.get_peft_model(model, config)
    except ValueError as error:
        fail(f"the adapter in {path} does not fit {backbone}: "
             f"{' '.join(str(error).split())[:200]}")
    if isinstance(network(model).lm_head, LoraLayer):
        fail(f"the adapter in {path} adapts lm_head, which teacher and student share: wanted "
             "adapters on the layers alone")
    own = {name: tuple(weight.shape)
           for name, weight in peft.get_peft_model_state_dict(model).items()}
    found = {}
    for name, weight in saved.items():  # a text-only class has no `language_model` in its names
        inner = name.replace("base_model.model.model.", "base_model.model.model.language_model.", 1)
        found[inner if name not in own and inner in own else name] = weight
    shapes = {name: tuple(weight.shape) for name, weight in found.items()}
    if own != shapes:
        name = min(name for name in own | shapes if own.get(name) != shapes.get(name))
        fail(f"the adapter in {path} does not fit {backbone}: {name} is "
             f"{shapes.get(name, 'missing')}, wanted {own.get(name, 'no such weight')} (it was "
             f"trained on {config.base_model_name_or_path})")
    peft.set_peft_model_state_dict(model, found)
    return model


def print_adapters(model):
    """Two lines: how many parameters are trained, and which linears are left without an adapter."""
    from peft.tuners.lora import LoraLayer
    model.print_trainable_parameters()
    left, inside = set(), None
    for name, module in network(model).named_modules():
        if isinstance(module, LoraLayer):
            inside = name + "."                              # its own linears follow it
        elif isinstance(module, torch.nn.Linear) and not (inside and name.startswith(inside)):
            left.add(re.sub(r"\.\d+\.", ".*.", name.removeprefix("model.")))
    print(f"no adapter on {', '.join(sorted(left))}")


def network(model):
    """The transformers model inside, adapted or not (LoRA lives in its modules)."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


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
    tokenizer = processor.tokenizer
    rows = tokenizer(texts, add_special_tokens=False)["input_ids"]
    width = max(map(len, rows)) + 1
    ids = torch.full((len(rows), width), tokenizer.pad_token_id)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, :len(row) + 1] = torch.tensor([*row, tokenizer.eos_token_id])
        mask[i, :len(row) + 1] = 1
    return ids.to(device), mask.to(device)


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
    """One token per row of logits [B, vocabulary] and of numbers in [0, 1) [B], float64 -> [B].

    By inverting the cumulative distribution: one random number per row (torch.multinomial draws
    one per token of the vocabulary, and spends most of its time on that), and exact: in float64 the
    rarest of 151,936 tokens keeps its share.
    """
    if temperature != 1:  # else a pass over the vocabulary too many
        logits = logits / temperature
    cumulative = logits.softmax(-1).cumsum(-1, dtype=torch.float64)
    # right=True: never a token of probability 0. The clamp: still a token where the logits are not
    # finite; such a step is then skipped for its loss.
    token = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True)
    return token[:, 0].clamp_(max=logits.shape[1] - 1)


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
           rollout_batch=None, drawn=None):
    """Draw responses -> (ids [B, T], mask [B, T]).

    uniforms: a number in [0, 1) for every token that may be drawn, float64 [B, max_new_tokens], so
    that a token depends on no other row; None: greedy. rollout_batch: rows at a time, default all.
    drawn: [B, some], filled with the log-probabilities that the first tokens were drawn with.
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
    make_decoder, interval = decoder_of(network(model))
    with light_adapters(model):
        for begin in range(0, count, rollout_batch or count):
            rows = torch.arange(count, device=model.device)[begin:begin + (rollout_batch or count)]
            batch = take_rows(prompt, slice(begin, begin + len(rows)))
            going = torch.ones_like(rows, dtype=torch.bool)
            decoder = make_decoder(network(model), batch, max_new_tokens)
            for t in range(max_new_tokens):
                logits = decoder.logits.index_fill_(1, banned, -torch.inf)     # [rows, vocabulary]
                token = (logits.argmax(-1) if uniforms is None else
                         draw_token(logits, uniforms[rows, t], temperature))   # [rows]
                ids[rows, t] = token
                if drawn is not None and t < drawn.shape[1]:  # for `check_sampling`
                    log_p = (logits / temperature).log_softmax(-1)
                    drawn[rows, t] = log_p.gather(1, token[:, None])[:, 0]
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
    return ids.where(mask.bool(), pad)[:, :length], mask[:, :length]


@torch.no_grad()
def check_sampling(model, prompt, ids, mask, drawn):
    """Fails where tokens were drawn from another policy than the one that is scored.

    prompt, ids and mask [B, T]: what was sampled; drawn [B, some]: see `sample`. Compares the first
    tokens of a few rows, as the model is scored in training, with its adapters.
    """
    rows, width = slice(0, 4), min(drawn.shape[1], ids.shape[1])
    ids, mask = ids[rows, :width], mask[rows, :width]
    logits = network(model).lm_head(response_hidden(model, take_rows(prompt, rows), ids, mask))
    scored = logits.float().log_softmax(-1).gather(1, ids[mask.bool()][:, None])[:, 0]       # [N]
    gaps = (drawn[rows, :width][mask.bool()] - scored).abs().tolist()
    text = (f"the log-probabilities of sampled tokens differ from their scores by {mean(gaps):.2g} "
            f"nats (mean), {max(gaps):.2g} (most)")
    if not mean(gaps) <= 0.25:  # bf16 on a GPU: 0.02, at most 0.09
        fail(f"{text}: what is sampled is not what is trained")
    print(f"{text}, over the first {len(gaps)}")


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
    ids, mask = sample(model, processor, prompts, args.max_new_tokens,
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
    add("--save_every", type=whole_number(1), default=20, help="steps between checkpoints")
    add("--restart", action="store_true", help="delete the run in --out and begin anew")
    add("--accept_changes", action="store_true",
        help="resume although arguments, data or code have changed; changes.jsonl says which")


def read_run(folder):
    """args.json of the run in `folder` (or of the run whose adapter/ it is); None without one."""
    for file in (Path(folder, "args.json"), Path(folder).parent / "args.json"):
        if file.is_file():
            try:
                record = json.loads(file.read_text(encoding="utf-8"))
            except ValueError as error:
                fail(f"cannot read {file}: {error}")
            if record.get("kind") == "run":
                return record
    return None


def resolve(args, settings, run=None):
    """Fill what was not given: from the run that is continued (its backbone), else the preset.

    settings: {preset: {flag: value}} of the script. run: the folder of that run, or None. A flag
    that contradicts the run is refused.
    """
    record = read_run(run) if run else None
    old = record["args"] if record else {}
    args.preset = args.preset or old.get("preset", "tiny")
    if args.preset not in BACKBONES:
        fail(f"{run} was trained with --preset {args.preset}, which common.py does not know: give "
             f"one of {', '.join(BACKBONES)}")
    if old and old["preset"] != args.preset:
        fail(f"--preset {args.preset}: the run in {run} has --preset {old['preset']}")
    values = {**BACKBONES[args.preset], **settings[args.preset]}
    for name in BACKBONES[args.preset]:
        given, values[name] = getattr(args, name, None), old.get(name, values[name])
        same = given in (None, values[name])
        if name == "model" and record and not same:  # it may lie somewhere else by now
            same = digest(digest_folder(given)) == record["inputs"]["model"]
        if old and not same:
            fail(f"--{name} {given}: the run in {run} has --{name} {values[name]}")
    if args.model and args.bits is None and not old:  # a checkpoint may be stored in 4 bits
        values["bits"] = quantised_bits(args.model) or values["bits"]
    for name, value in values.items():
        if hasattr(args, name) and getattr(args, name) is None:
            setattr(args, name, value)
    return args


def announce(args):
    """The first lines of a run: what it trains, on which device, and what that takes."""
    cuda = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if cuda else "the CPU"
    print(f"preset {args.preset} on {device}: {args.model} in {args.bits} bits")
    if compute_dtype(args.bits) is torch.float16:
        print("This card has no bfloat16: the network computes in float16, which may overflow "
              "(such steps are skipped, and said)")
    if args.model == BACKBONES[args.preset]["model"] and args.preset in DOWNLOADS:
        if checkpoint_folder(args.model) is None:
            print(f"It is downloaded first: {DOWNLOADS[args.preset]} GB")
        print(f"Memory: `python -m tools.estimate --preset {args.preset}`; hours: docs/gpu.md")
    if cuda and args.preset == "tiny":
        print(f"For Qwen3-VL-4B: the same commands with --preset 4b (a download of "
              f"{DOWNLOADS['4b']} GB; memory by `python -m tools.estimate --preset 4b`; hours: "
              "docs/gpu.md)")


def command(script, **flags):
    """A command with the flags it needs, {name: (value, default)}: "python distill.py --seed 1"."""
    words = [f"--{name} {value}" for name, (value, default) in flags.items() if value != default]
    return " ".join(["python", script, *words])


# ---------------------------------------------------------------- an optimizer step

def learning_rate(step, steps, peak):
    """Linear warm-up over the first tenth of the steps, then a cosine; zero would come after it."""
    warm = max(1, steps // 10)
    progress = max(0, step + 1 - warm) / (steps + 1 - warm)
    return peak * min((step + 1) / warm, 0.5 * (1 + math.cos(math.pi * progress)))


def adapter_weights(model):
    """The tensors that are trained, in the network's order."""
    return [weight for weight in model.parameters() if weight.requires_grad]


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
        together(distributed.all_reduce, flat)
    tokens = int(flat[-1])
    flat /= max(1, tokens)
    sizes = [weight.numel() for weight in weights]
    for weight, gradient in zip(weights, flat[:-2].split(sizes), strict=True):
        weight.grad.copy_(gradient.view_as(weight))
    return float(flat[-2]), tokens


def check_first_step(step, grad_norm):
    """Fails where nothing connects the loss to the adapters."""
    if step == 0 and grad_norm < 1e-5:  # autograd leaves rounding where all is equal
        fail("the first gradient is zero: nothing connects the loss to the adapters")


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


# ---------------------------------------------------------------- several processes

def process_rank():
    """(the number of this process, how many there are), as torchrun sets them; else (0, 1)."""
    rank, count = os.environ.get("RANK") or "0", os.environ.get("WORLD_SIZE") or "1"
    if not (rank.isdigit() and count.isdigit() and int(rank) < int(count)):
        fail(f"RANK={rank} WORLD_SIZE={count} in the environment: unset both, or use torchrun")
    return int(rank), int(count)


def join_processes(batch):
    """Meet the processes that torchrun started -> (the number of this one, how many)."""
    rank, count = process_rank()
    if batch % count:
        fail(f"--batch {batch} cannot be shared equally by {count} processes")
    if count > 1:
        missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
                   if not os.environ.get(name)]
        if missing:
            fail(f"WORLD_SIZE={count} in the environment, but no {missing[0]}: unset it, or use "
                 "torchrun")
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    if rank > 0:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
    return rank, count


def together(collective, *arguments):
    """Call something that all processes must call. Fails where one of them is gone."""
    try:
        collective(*arguments)
    except RuntimeError as error:
        fail(f"another process of this run has ended ({str(error).splitlines()[0][:100]}); "
             "run the same command to resume")


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


# ---------------------------------------------------------------- the run of a stage

# Arguments that change no step that is done, or whose contents are compared (see `inputs`).
FREE = {"preset", "model", "data", "init", "out", "steps", "micro_batch", "rollout_batch", "chunk",
        "save_every", "eval_every", "restart", "accept_changes"}


@contextlib.contextmanager
def exchanged(weights, others):
    """While it lasts, `weights` (adapters) hold the values of `others`."""
    own = [weight.data for weight in weights]
    for weight, other in zip(weights, others, strict=True):
        weight.data = other
    try:
        yield
    finally:
        for weight, data in zip(weights, own, strict=True):
            weight.data = data


class Best:
    """The adapter with the highest score of a validation, the first of equals; for `Run.restore`.

    step: that of the best, 0 before the first validation; last: the latest score.
    """

    def __init__(self, weights):
        self.weights, self.score, self.step, self.last = weights, -math.inf, 0, None
        self.copies = []

    def update(self, score, step):
        self.last = score
        if score > self.score:
            self.score, self.step = score, step
            self.copies = [weight.detach().cpu().clone() for weight in self.weights]

    def state_dict(self):
        return {"score": self.score, "step": self.step, "last": self.last, "copies": self.copies}

    def load_state_dict(self, state):
        self.score, self.step, self.last = state["score"], state["step"], state["last"]
        self.copies = state["copies"]


def meaning(code):
    """A script's syntax tree without comments and docstrings, as text."""
    tree = ast.parse(code)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            if ast.get_docstring(node) is not None:
                node.body.pop(0)
    return ast.dump(tree)


class Run:
    """A stage's run in the folder args.out: one writer, and the same command resumes it.

        with Run(args, parse_args, scripts, inputs, trained_on) as run:  # refuses what differs
            ...                                                          # load the model
            run.restore(model, optimizer=optimizer)                      # from the checkpoint
            for step in run.steps():
                ...
                run.log(loss=loss)
                run.save_if_due()

    Nothing in the folder is changed before `restore`. Nothing random is stored: a step draws from
    (seed, step). Of several processes the first one writes. step: steps done and logged.
    """
    LOGS = ("metrics.jsonl", "rollouts.jsonl", "not_finite.jsonl")
    FILES = ("args.json", "trained_rows.json", "changes.jsonl", "checkpoint.pt", *LOGS)
    FOLDERS = ("adapter", "adapter-best", "code")
    # That is everything a run writes; partial files are named after these.

    def __init__(self, args, parse_args, scripts, inputs, trained_on=()):
        """scripts: the files that the stage runs; they are kept, and compared at the next start.

        parse_args: gives a flag that is new in `args` the value it would have had before.
        inputs: {name: digest} of the files that the result depends on. trained_on: keys of all
        rows that the adapter was or will be trained on, None if they are not known.
        """
        self.args, self.out = args, Path(args.out)
        self.inputs = {**inputs, "model": digest(digest_folder(args.model))}
        self.defaults = vars(parse_args(["--preset", args.preset, "--init", "none"]))
        self.scripts, self.trained_on = [Path(script) for script in scripts], trained_on
        self.step, self.skipped, self.state, self.changed = 0, [], None, {}
        self.lock, self.handlers, self.asked = None, {}, 0

    # ---- the folder

    def __enter__(self):
        if process_rank()[0] == 0:
            self.out.mkdir(parents=True, exist_ok=True)
            kind, foreign = kind_of(self.out), foreign_name(self.out, "run")
            if foreign:
                what = f"a folder of kind {kind}" if kind else f"{foreign} and no run"
                fail(f"{self.out} holds {what}: choose another --out")
            self.lock = lock_folder(self.out)
            if kind == "run" and not self.args.restart:
                self.read_checkpoint()
            if self.state:  # without a checkpoint there are no steps that could differ
                self.compare()
        self.state = gather(self.state)[0]
        if self.state:
            self.step, self.skipped = self.state["step"], list(self.state["skipped"])
        return self

    def __exit__(self, *error):
        """Give back the signals and the folder."""
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if self.lock:
            self.lock.release()

    def read_checkpoint(self):
        file = self.out / "checkpoint.pt"
        if not file.is_file():
            if (self.out / "adapter").exists():
                fail(f"{self.out} holds a trained adapter without its checkpoint.pt, and cannot be "
                     "resumed: --restart begins anew and deletes it; or choose another --out")
            return
        try:
            self.state = torch.load(file, map_location="cpu", weights_only=True)
            step, things = self.state["step"], self.state["things"]
            assert isinstance(step, int) and "adapter" in things and "skipped" in self.state
        except (OSError, RuntimeError, EOFError, ValueError, LookupError, TypeError, AssertionError,
                pickle.UnpicklingError) as error:
            reason = " ".join(str(error).split()).partition(". ")[0][:200]
            fail(f"cannot resume from {file} ({type(error).__name__}: {reason}): --restart begins "
                 "anew")

    def compare(self):
        """Refuse what would make the steps to come another run's than those that are done."""
        record = json.loads((self.out / "args.json").read_text(encoding="utf-8"))
        before, done = {**self.defaults, **record["args"]}, self.state["step"]
        if done > self.args.steps:
            fail(f"{self.out}: {done} steps are done, more than --steps {self.args.steps}")
        for name, value in json.loads(json.dumps(vars(self.args))).items():
            if name not in FREE and before.get(name) != value:
                self.changed[f"--{name}"] = f"was {before.get(name)!r} and is {value!r}"
        for name, value in self.inputs.items():
            if value != record["inputs"].get(name):
                self.changed[name] = "other contents than before"
        for script in self.scripts:
            kept = self.out / "code" / script.name
            was = kept.read_text(encoding="utf-8") if kept.is_file() else ""
            now = script.read_text(encoding="utf-8")
            if meaning(was) != meaning(now):
                lines = difflib.unified_diff(was.splitlines(), now.splitlines(), n=0, lineterm="")
                self.changed[script.name] = "has changed:\n" + "\n".join(list(lines)[2:])
        if self.changed and not self.args.accept_changes:
            text = "".join(f"\n{name} {how}" for name, how in self.changed.items())
            tqdm.write(f"What differs from the run in {self.out}:{text}", file=sys.stderr)
            fail(f"{self.out} holds {done} steps of a run that differs in "
                 f"{', '.join(self.changed)}: --restart begins anew, --out chooses another folder, "
                 "--accept_changes resumes all the same")

    def restore(self, model, **things):
        """Bring the adapter of `model` and `things` to where the checkpoint left them.

        things: by name, what a resume needs besides the adapter: objects with state_dict() and
        load_state_dict(), or lists of tensors. All of it is in every checkpoint from here on;
        `best`, a Best, becomes adapter-best/ beside adapter/. Now that the run is agreed to, its
        folder is brought to the same step.
        """
        self.model, self.things = model, {"adapter": adapter_weights(model), **things}
        if self.state:
            self.load_things()
        if process_rank()[0] > 0:
            return
        if self.args.restart:
            self.delete()
        self.inputs["model"] = digest(digest_folder(self.args.model))  # a hub's is there by now
        record = {"kind": "run", "script": self.scripts[0].name, "args": vars(self.args),
                  "inputs": self.inputs, "versions": versions()}
        write_text(self.out / "args.json", json.dumps(record, indent=1) + "\n")
        (self.out / "code").mkdir(exist_ok=True)
        for script in self.scripts:
            write_bytes(self.out / "code" / script.name, script.read_bytes())
        if self.trained_on is not None:
            write_text(self.out / "trained_rows.json", json.dumps(sorted(self.trained_on)))
        for name in self.LOGS:  # lines of steps that will be done again
            file, size = self.out / name, self.state["sizes"].get(name, 0) if self.state else 0
            if file.is_file() and file.stat().st_size > size:
                os.truncate(file, size)
        if self.changed:
            self.append("changes.jsonl", [{"step": self.step, "changed": self.changed}])
            warn(f"resuming with changes in {', '.join(self.changed)}: {self.out}/changes.jsonl")
        if self.state and not self.adapter_is_current():  # killed between the two
            self.export_adapters()

    def load_things(self):
        saved, file = self.state["things"], self.out / "checkpoint.pt"
        for name, thing in self.things.items():
            if name not in saved:
                fail(f"{file} has no {name!r}: it was made without; --restart begins anew")
            try:
                if hasattr(thing, "load_state_dict"):
                    thing.load_state_dict(saved[name])
                else:
                    for tensor, value in zip(thing, saved[name], strict=True):
                        tensor.data.copy_(value)
            except (ValueError, RuntimeError, LookupError, TypeError, AttributeError) as error:
                fail(f"the {name!r} in {file} does not fit ({' '.join(str(error).split())[:200]}): "
                     "--restart begins anew")
        device = self.model.device.type
        if self.state["device"] != device:
            warn(f"the steps in {self.out} were made on {self.state['device']}; resuming on "
                 f"{device} gives other rounding")

    def delete(self):
        """Remove what a run leaves, and nothing else."""
        for name in self.FILES:
            (self.out / name).unlink(missing_ok=True)
        for name in self.FOLDERS:
            shutil.rmtree(self.out / name, ignore_errors=True)

    # ---- the steps

    def steps(self):
        """The numbers of the steps to do; a signal now asks to stop after the current one."""
        if self.step == self.args.steps:
            print(f"{self.out}: all {self.step} steps were done before; nothing is trained")
        elif self.step:
            print(f"{self.out}: resuming after step {self.step} of {self.args.steps}")
        for number in (signal.SIGINT, signal.SIGTERM):
            self.handlers[number] = signal.signal(number, self.on_signal)
        self.seconds, self.last = {}, time.perf_counter()
        return tqdm(range(self.step, self.args.steps), desc=self.out.name, unit="step",
                    initial=self.step, total=self.args.steps, disable=process_rank()[0] > 0)

    def on_signal(self, number, frame):
        if not self.asked:
            self.asked, self.asked_at = number, time.monotonic()
            tqdm.write("stopping after this step (again: at once, back to the latest checkpoint)")
        elif time.monotonic() - self.asked_at > 2:  # torchrun repeats a Ctrl-C by itself
            raise KeyboardInterrupt

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
            return True
        step = self.step + 1
        self.skipped.append(step)
        what = {"step": step, "loss": str(loss), "grad_norm": str(grad_norm)}
        self.append("not_finite.jsonl", [{**what, **row} for row in evidence])
        warn(f"step {step} skipped: loss {loss}, gradient norm {grad_norm}; "
             f"its rows are in {self.out}/not_finite.jsonl")
        if self.skipped[-patience:] == list(range(step - patience + 1, step + 1)):
            fail(f"{patience} steps in a row were not finite: try a lower --lr, or --bits 16 or 32 "
                 f"instead of {self.args.bits}")
        return False

    def log(self, **values):
        """A step is done: a line to the eye, one to metrics.jsonl, where nan and inf are null."""
        self.clock("rest")
        self.step += 1
        line = {"step": self.step, **values, "step_seconds": sum(self.seconds.values()),
                "peak_gb": peak_gb()}
        texts = [f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
                 for name, value in line.items()]
        tqdm.write("  ".join(texts))
        for name, value in values.items():
            if isinstance(value, float) and not math.isfinite(value):
                line[name] = None
        line["seconds"], self.seconds = self.seconds, {}
        self.append("metrics.jsonl", [line])

    def append(self, name, rows):
        """Lines for a .jsonl file beside the log (one of LOGS is cut back at a resume)."""
        if process_rank()[0] == 0:
            with open(self.out / name, "a", encoding="utf-8", newline="\n") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)

    def save_if_due(self):
        """Every --save_every steps, at the end, and when a signal asked to stop: then it stops."""
        stop = max(gather(self.asked))
        if stop or self.step == self.args.steps or self.step % self.args.save_every == 0:
            self.save()
        if stop and self.step < self.args.steps:
            print(f"Stopped after step {self.step} of {self.args.steps}. Latest checkpoint: "
                  f"{self.out}/checkpoint.pt; run the same command to resume.")
            raise SystemExit(128 + stop)
        self.last = time.perf_counter()

    def save(self):
        """Replace checkpoint.pt, then the adapters; a kill leaves the old or the new of each."""
        weights = torch.cat([tensor.detach().flatten() for tensor in self.things["adapter"]])
        if len(set(gather(zlib.crc32(weights.cpu().numpy())))) > 1:
            fail(f"the processes' adapters differ after step {self.step}; run the same command to "
                 "resume from the latest checkpoint")
        if process_rank()[0] > 0:
            return
        things, sizes = {}, {}
        for name, thing in self.things.items():
            things[name] = (thing.state_dict() if hasattr(thing, "state_dict") else
                            [tensor.detach() for tensor in thing])
        for name in self.LOGS:
            if (self.out / name).is_file():
                flush(self.out / name)
                sizes[name] = (self.out / name).stat().st_size
        content = io.BytesIO()
        torch.save({"step": self.step, "skipped": self.skipped, "sizes": sizes,
                    "device": self.model.device.type, "things": things}, content)
        write_bytes(self.out / "checkpoint.pt", content.getvalue())
        self.export_adapters()

    def export_adapters(self):
        """adapter-best/, where there is one, then adapter/, whose date stands for both."""
        best = self.things.get("best")
        if best and best.step:
            device = best.weights[0].device
            with exchanged(best.weights, [copy.to(device) for copy in best.copies]):
                self.export_adapter("adapter-best")
        self.export_adapter("adapter")

    def export_adapter(self, name):
        """The adapter in PEFT's format, for evaluation and serving."""
        folder, aside = self.out / name, self.out / f"{name}.partial"
        shutil.rmtree(aside, ignore_errors=True)
        try:
            self.model.save_pretrained(aside)
        except SafetensorError as error:
            full = "os error 28" in str(error)
            raise OSError(errno.ENOSPC if full else errno.EIO, str(error), str(aside)) from error
        for path in (*aside.iterdir(), aside):
            flush(path)
        shutil.rmtree(folder, ignore_errors=True)
        aside.rename(folder)
        flush(self.out)

    def adapter_is_current(self):
        """Was adapter/ written after checkpoint.pt?"""
        file = self.out / "adapter" / "adapter_model.safetensors"
        return (file.is_file()
                and file.stat().st_mtime_ns >= (self.out / "checkpoint.pt").stat().st_mtime_ns)


def adapter_folder(run, flag, remedy=""):
    """Where the adapter of a run lies, or any LoRA adapter in PEFT's format. Fails without one.

    flag: the one that named the run; remedy: what the message says at its end.
    """
    folder = Path(run, "adapter") if Path(run, "adapter").is_dir() else Path(run)
    for name in ADAPTER_FILES:
        if not (folder / name).is_file():
            fail(f"{flag} {run}: no adapter there ({folder / name} is missing){remedy}")
    return folder


def read_trained_rows(adapter):
    """Keys of the rows that an adapter was trained on; None where its run does not say."""
    file = adapter.resolve().parent / "trained_rows.json"
    if not file.is_file():
        warn(f"{adapter}: which rows it was trained on is not known ({file.name} is missing), so "
             "that an evaluation cannot count them apart")
        return None
    try:
        return set(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        fail(f"cannot read {file} ({error}): take it away, and such rows are not counted apart")


def read_init(init):
    """(adapter folder, keys of the rows it was trained on) of --init; (None, no keys) of "none".

    init: a run, or any folder with a LoRA adapter in PEFT's format. The keys are None where nothing
    says them.
    """
    if init == "none":
        return None, set()
    adapter = adapter_folder(
        init, "--init", "; `python coldstart.py` makes one, --init none begins without")
    return adapter, read_trained_rows(adapter)
