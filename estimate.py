"""Will it fit? What one step of `distill.py` holds in memory, without weights and without a GPU.

    python distill.py --preset 8b --estimate            # on a CUDA card, and the largest micro-batch for 8 to 24 GB
    python distill.py --preset tiny --estimate cpu

The step is run on torch's meta device, where tensors have shapes and no contents, and the bytes alive are counted:
what autograd keeps, what checkpointing recomputes and what the loss makes are read off the code that does them.
No GPU was measured; tests/bench_memory.py compares the same count with the measured peak on the CPU.
"""
import re
import weakref
from functools import partial
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from common import LANGUAGE, add_lora, network
from gen_data import fail

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

    slice_loss(hidden, teacher_hidden, token, lm_head): the step's own loss and its gradient for hidden [N, hidden size].
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
        slice_loss(empty(few, text.hidden_size), empty(few, text.hidden_size), torch.empty(few, dtype=torch.long, device="meta"), net.lm_head)
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
