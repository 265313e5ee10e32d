"""`distill.py --estimate`: its counts against real modules, real autograd, bitsandbytes and the hub's own numbers."""
import re

import numpy as np
import pytest
import torch

import common
import distill
import estimate
import gen_data

HUB = {"4b": 4_437_815_808, "8b": 8_767_123_696}  # "safetensors parameters" on the pages of the two checkpoints


def parse(*words):
    return distill.parse_args([*map(str, words), "--estimate", "cpu"] if "--estimate" not in words else [*map(str, words)])


def sliced(args):
    return lambda *states: distill.sliced_divergence(*states, distill.reverse_kl, args.slice)


@pytest.mark.parametrize("bits", [16, 32])
def test_the_skeleton_is_the_network(bits):
    args = parse("--preset", "tiny", "--bits", bits, "--lora_rank", 8)
    skeleton = estimate.skeleton(args)
    real = common.add_lora(common.load(common.TINY, bits)[0], 8, True)
    facts = [{name: (weight.shape, weight.dtype, weight.requires_grad) for name, weight in model.named_parameters()}
             for model in (skeleton, real)]
    assert facts[0] == facts[1]
    rows = estimate.held(skeleton, args)
    frozen = sum(p.numel() * p.element_size() for p in real.parameters() if not p.requires_grad)
    trained = sum(p.numel() for p in real.parameters() if p.requires_grad)
    assert sum(list(rows.values())[:3]) == frozen
    assert rows["adapters, float32"] == rows["their gradients"] == 4 * trained and rows["AdamW, float32"] == 8 * trained


def test_nf4_with_both_levels_of_scales():
    """Against every tensor that bitsandbytes keeps for a quantised matrix."""
    args = parse("--preset", "tiny", "--bits", 4)
    real = common.load(common.TINY, 4)[0]
    size = sum(t.numel() * t.element_size() for name, t in real.state_dict().items()
               if re.search(common.LANGUAGE, name) and "quant_state" not in name)
    offsets = sum(4 for name in real.state_dict() if "quant_state" in name)  # saved inside a JSON tensor
    assert estimate.held(estimate.skeleton(args), args)["language model's linears, NF4"] == size + offsets
    assert offsets


@pytest.mark.parametrize("preset", HUB)
def test_the_table_of_configurations(preset):
    args = parse("--preset", preset, "--bits", 16, "--estimate")
    rows = estimate.held(estimate.skeleton(args), args)
    assert sum(list(rows.values())[:3]) == 2 * HUB[preset]
    layers, hidden, inter, kv = 36, *((2560, 9728, 1024) if preset == "4b" else (4096, 12288, 1024))
    ends = layers * (2 * (hidden + 4096) + 2 * (hidden + kv) + 3 * (hidden + inter))  # ins and outs of the seven linears
    assert rows["adapters, float32"] == 4 * 16 * ends
    assert rows["AdamW, 8 bits, paged"] == pytest.approx(2 * 16 * ends, rel=0.02)


@pytest.mark.parametrize("vision", [0, 1])
def test_what_is_kept_is_what_autograd_saves(vision):
    """The real forward pass of the student, every tensor that autograd saves counted by its storage."""
    model, processor = common.load(common.TINY, 32)
    model = common.add_lora(model, 4, bool(vision))
    rows = [dict(task="frozenlake", level=4, state={"grid": ["SFFF", "FHFF", "FFFF", "FFFG"]}),
            dict(task="maze", level=3, state=gen_data.TASKS["maze"].sample(np.random.default_rng(0), 3))]
    pictures = [gen_data.TASKS[row["task"]].render(row["state"], 64).resize((256, 256)) for row in rows]
    prompt = common.encode(processor, [gen_data.student_prompt(row) for row in rows], pictures)
    assert prompt["image_grid_thw"].tolist() == [[1, 16, 16]] * 2 and estimate.IMAGE_TOKENS == 64
    ids, mask = torch.randint(5, 200, (2, 100)), torch.ones(2, 100, dtype=torch.long)
    mask[1, 60:] = 0  # rows of different lengths: attention gets a padding mask, as it does in a real step
    frozen, saved = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor
    model.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = common.response_hidden(model, prompt, ids, mask)
    real = sum(size for key, size in saved.items() if key not in frozen)
    args = parse("--preset", "tiny", "--lora_rank", 4, "--lora_vision", vision, "--max_new_tokens", 100,
                 "--prompt_tokens", prompt["input_ids"].shape[1], 100)
    kept = estimate.moments(estimate.skeleton(args), args, sliced(args), 2)["backward"]["kept for the backward pass"]
    assert hidden.shape == (160, 128) and kept == pytest.approx(real, rel=0.05)


def test_how_it_grows():
    """The loss's slice does not grow with the responses, the rest is linear in the rows, checkpointing keeps less."""
    args = parse("--preset", "tiny", "--slice", 32)
    model = estimate.skeleton(args)
    one, two, four = (estimate.moments(model, args, sliced(args), B) for B in (1, 2, 4))
    assert four["loss"]["one slice of logits"] == pytest.approx(one["loss"]["one slice of logits"], rel=0.05)
    for name in one:
        a, b, c = (sum(m[name].values()) for m in (one, two, four))
        assert c - b == pytest.approx(2 * (b - a), rel=0.03)
    args = parse("--preset", "tiny", "--estimate", "--slice", 32)
    checkpointed = estimate.moments(estimate.skeleton(args), args, sliced(args), 4)["backward"]
    assert checkpointed["kept for the backward pass, layer inputs"] < four["backward"]["kept for the backward pass"] / 4


def test_the_page_adds_up(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, _, total = distill.main(parse("--preset", "tiny", "--bits", 4, "--estimate", "--prompt_tokens", 100, 120))
    page = capsys.readouterr().out
    assert "No GPU was measured" in page and not list(tmp_path.iterdir())
    lines = [(len(line) - len(line.lstrip()), float(line.split()[0]), " ".join(line.split()[1:]))
             for line in page.splitlines() if re.match(r" +\d+\.\d{3}  ", line)]
    heads = {}
    for indent, size, name in lines:
        if indent < 8:
            heads[name], current, left = size, name, size
        else:
            left -= size
            assert left > -0.003, current
    worst = next(name for name in heads if name.startswith("at its worst: "))
    peak = next(size for name, size in heads.items() if name.startswith("peak"))
    assert peak == pytest.approx(heads["held throughout"] + heads[worst], abs=0.002) == pytest.approx(total / 1e9, abs=0.002)
    assert heads[worst] == max(size for name, size in heads.items() if name not in ("held throughout",) and "peak" not in name)
    assert [int(n) for n in re.findall(r"^ *(\d+) GB card", page, re.M)] == [8, 12, 16, 24]


def test_the_largest_micro_batch_is_the_largest(capsys):
    words = ["--preset", "tiny", "--estimate", "--prompt_tokens", 1000, 1000, "--max_new_tokens", 7000, "--micro_batch", 1]
    distill.main(parse(*words))
    most = int(re.search(r"^ *8 GB card.* up to (\d+)", capsys.readouterr().out, re.M).group(1))
    assert most > 2
    fits, too_much = (distill.main(parse(*words[:-1], rows))[2] for rows in (most, most + 1))
    assert fits <= 8 * 2**30 < too_much


@pytest.mark.parametrize("words, message", [
    (["--model", "someone/else"], "no config.json for --model someone/else"),
    (["--model", "."], "no config.json for --model ."),
    (["--prompt_tokens", 60, 100], "--prompt_tokens 60"),
])
def test_bad_input(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        distill.main(parse("--preset", "tiny", *words))
    assert stop.value.code == 2 and message in capsys.readouterr().err
