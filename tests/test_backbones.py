"""The classes that are served, each with random weights: Qwen3-VL, Qwen2.5-VL, Qwen3.5."""
import copy
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import adapted, make_rows, stops
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForImageTextToText

import coldstart
import common
import distill

aten = torch.ops.aten
LAYERS = 4
TEXT = dict(num_hidden_layers=LAYERS, hidden_size=64, intermediate_size=96, num_attention_heads=4,
            num_key_value_heads=2, head_dim=16, max_position_embeddings=4096)
ROPE = dict(rope_type="default", rope_theta=10_000.0)
VISION = dict(depth=2, hidden_size=32, intermediate_size=48, num_heads=2, out_hidden_size=64,
              num_position_embeddings=64)
CONFIGS = {
    "qwen3_vl": dict(
        text_config=dict(TEXT, rope_parameters=dict(
            ROPE, mrope_section=[4, 2, 2], mrope_interleaved=True)),
        vision_config=dict(VISION, deepstack_visual_indexes=[0, 1])),
    "qwen2_5_vl": dict(
        text_config=dict(TEXT, rope_parameters=dict(ROPE, mrope_section=[4, 2, 2])),
        vision_config=dict(VISION, patch_size=14, window_size=56, fullatt_block_indexes=[1])),
    "qwen3_5": dict(
        text_config=dict(TEXT, full_attention_interval=2, linear_num_key_heads=2,
                         linear_num_value_heads=4, linear_key_head_dim=16,
                         linear_value_head_dim=16, rope_parameters=dict(
                             ROPE, mrope_section=[2, 1, 1], mrope_interleaved=True,
                             partial_rotary_factor=0.5)),
        vision_config=VISION),
}
LINEARS = {  # of all layers of the language model; of the vision tower
    "qwen3_vl": (7 * LAYERS, 4 * 2 + 2 * 3),
    "qwen2_5_vl": (7 * LAYERS, 5 * 2 + 2),
    "qwen3_5": ((4 + 3) * LAYERS // 2 + (5 + 3) * LAYERS // 2, 4 * 2 + 2),
}


def random_checkpoint(folder, kind):
    """A folder as the hub has it: a network of this class, tiny/'s tokenizer and template."""
    shutil.copytree(common.TINY, folder, ignore=shutil.ignore_patterns("*.py", "*.safetensors",
                                                                       "__pycache__"))
    tiny = json.loads((folder / "config.json").read_text())
    ids = {name: value for name, value in tiny.items() if name.endswith("_token_id")}
    config = AutoConfig.for_model(kind, tie_word_embeddings=False, **ids, **CONFIGS[kind])
    config.text_config.vocab_size = tiny["text_config"]["vocab_size"]
    torch.manual_seed(0)
    net = AutoModelForImageTextToText.from_config(config)
    with torch.no_grad():
        for weight in net.parameters():       # far from uniform, so that every mistake shows
            weight.mul_(4 if weight.ndim == 2 else 1)
    net.generation_config = type(net.generation_config).from_pretrained(folder)
    net.save_pretrained(folder)
    if kind == "qwen3_5":                         # the hub's have weights for drafting, unused here
        weights = load_file(folder / "model.safetensors")
        save_file(weights | {"mtp.fc.weight": torch.zeros(2, 2)}, folder / "model.safetensors",
                  metadata={"format": "pt"})
    file = folder / "processor_config.json"
    settings = json.loads(file.read_text())
    if kind == "qwen2_5_vl":
        settings["processor_class"] = "Qwen2_5_VLProcessor"
        settings["video_processor"]["video_processor_type"] = "Qwen2VLVideoProcessor"
        for part in ("image_processor", "video_processor"):
            settings[part]["patch_size"] = 14
        settings["image_processor"] |= {"min_pixels": 3136, "max_pixels": 12_845_056}
        del settings["image_processor"]["size"]
    file.write_text(json.dumps(settings))
    return str(folder)


@pytest.fixture(scope="module", params=CONFIGS)
def checkpoint(request, tmp_path_factory):
    return random_checkpoint(tmp_path_factory.mktemp("backbone") / request.param, request.param)


@pytest.fixture(scope="module")
def loaded(checkpoint):
    """(model, processor) in float64, with many EOS: random weights draw one now and then."""
    model, processor = common.load(checkpoint, 32)
    model.generation_config.eos_token_id = list(range(100, 220))
    return model.double(), processor


def in_precision(model, dtype, attention="sdpa"):
    """A copy, as if loaded so."""
    model = copy.deepcopy(model).to(dtype)
    model.set_attn_implementation(attention)
    model.base_logits = common.fixed_logits(model)
    return model


def prompts(processor, count=5):
    rows, images = make_rows(count)
    return [row.student_prompt() for row in rows], images


def next_logits(model, processor, text, image, ids):
    """Of one row, without padding, cache or positions of ours: transformers' own forward pass."""
    one = common.encode(processor, [text], [image] if image else None)
    one["input_ids"] = torch.cat([one["input_ids"], ids[None]], 1)
    one["attention_mask"] = torch.ones_like(one["input_ids"])
    one["mm_token_type_ids"] = torch.cat([one["mm_token_type_ids"], ids[None] * 0], 1)
    net = common.network(model)
    net.model.rope_deltas = None
    with torch.no_grad():
        return net(**one, use_cache=False).logits[0, -len(ids) - 1:]


def draw_plainly(model, processor, text, image, limit, uniforms):
    """The tokens of one row, everything read anew for each."""
    net, ids = common.network(model), torch.zeros(0, dtype=torch.long)
    banned = [net.config.image_token_id, net.config.video_token_id,
              net.config.vision_start_token_id]
    ends = common.eos_tokens(model, processor).tolist()
    while len(ids) < limit and not (len(ids) and int(ids[-1]) in ends):
        logits = next_logits(model, processor, text, image, ids)[-1].float()
        logits[banned] = -torch.inf
        token = int(logits.argmax()) if uniforms is None else int(
            np.searchsorted(logits.double().softmax(-1).cumsum(-1).numpy(), uniforms[len(ids)],
                            side="right"))
        ids = torch.cat([ids, torch.tensor([token])])
    return ids.tolist()


@pytest.mark.parametrize("greedy, with_pictures", [(True, True), (False, True), (False, False)])
def test_sampling_is_plain_sampling(loaded, monkeypatch, greedy, with_pictures):
    """Row by row, without padding or cache; and rows end early, one after the other."""
    model, processor = loaded
    texts, images = prompts(processor)
    images = images if with_pictures else None
    uniforms = None if greedy else np.random.default_rng(1).random((5, 12))
    prompt = common.encode(processor, texts, images)
    wanted = [draw_plainly(model, processor, texts[i], images and images[i], 12,
                           None if greedy else uniforms[i]) for i in range(5)]
    assert greedy or len({len(ids) for ids in wanted}) > 2
    monkeypatch.setattr(common, "captured", lambda work: work)
    for way in ((common.Decoder, 1), (common.GraphDecoder, 2)):   # the second as on CUDA
        monkeypatch.setattr(common, "decoder_of", lambda net, way=way: way)
        ids, mask, _ = common.sample(model, processor, prompt, 12, uniforms, rollout_batch=4)
        assert [row[keep.bool()].tolist() for row, keep in zip(ids, mask, strict=True)] == wanted


def test_scoring_is_the_plain_model(loaded):
    model, processor = loaded
    texts, images = prompts(processor, 3)
    ids, mask = common.encode_responses(processor, [text[:60 * i + 20] for i, text in
                                                    enumerate(texts)])
    for pictures in (images, None):
        prompt = common.encode(processor, texts, pictures)
        found = common.network(model).lm_head(common.response_hidden(model, prompt, ids, mask))
        wanted = [next_logits(model, processor, texts[i], pictures and pictures[i],
                              ids[i][mask[i].bool()])[:-1] for i in range(3)]
        torch.testing.assert_close(found, torch.cat(wanted), atol=1e-4, rtol=1e-4)


def test_adapters_sit_on_every_linear(loaded, checkpoint):
    """Off, the network is the base."""
    language, tower = LINEARS[Path(checkpoint).name]
    net, processor = copy.deepcopy(loaded[0]).float(), loaded[1]
    texts, images = prompts(processor, 2)
    prompt = common.encode(processor, texts, images)
    ids, mask = common.encode_responses(processor, texts)
    with torch.no_grad():
        base = common.response_hidden(net, prompt, ids, mask)
        for vision in (False, True):
            model = adapted(net, vision)
            targets = model.peft_config["default"].target_modules
            assert targets == sorted(targets)
            names = [name for name, _ in model.named_parameters() if "lora_A" in name]
            assert sum(".language_model." in name for name in names) == language
            assert sum(".visual." in name for name in names) == (tower if vision else 0)
            assert not torch.equal(common.response_hidden(model, prompt, ids, mask), base)
            with model.disable_adapter():
                assert torch.equal(common.response_hidden(model, prompt, ids, mask), base)
            net = model.unload()


def test_gradient_checkpointing_changes_no_gradient(loaded):
    processor, gradients = loaded[1], []
    texts, images = prompts(processor, 2)
    prompt = common.encode(processor, texts, images)
    ids, mask = common.encode_responses(processor, texts)
    for checkpointing in (False, True):
        model = adapted(copy.deepcopy(loaded[0]))
        if checkpointing:
            common.network(model).gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False})
        coldstart.answer_loss(model.train(), prompt, ids, mask).backward()
        gradients.append([weight.grad for weight in common.adapter_weights(model)])
        assert all(gradient.abs().max() > 0 for gradient in gradients[-1])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_four_bits(checkpoint):
    """The language model's linears and nothing else; gradients are the same after sampling."""
    from bitsandbytes.nn import Linear4bit
    model, processor = common.load(checkpoint, 4)
    four = [name for name, module in model.named_modules() if isinstance(module, Linear4bit)]
    assert four == common.linears(model) and len(four) == LINEARS[Path(checkpoint).name][0]
    model, gradients = adapted(model, vision=False), []
    texts, images = prompts(processor, 2)
    prompt = common.encode(processor, texts, images)
    ids, mask = common.encode_responses(processor, texts)
    for _ in range(2):
        model.zero_grad()
        loss = coldstart.answer_loss(model.train(), prompt, ids, mask)
        loss.backward()
        gradients.append(torch.cat([w.grad.flatten() for w in common.adapter_weights(model)]))
        common.sample(model.eval(), processor, prompt, 3)
    assert loss.isfinite() and gradients[0].abs().max() > 0 and torch.equal(*gradients)


def test_a_class_that_is_not_served(tmp_path, capsys):
    folder = shutil.copytree(common.TINY, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "llava"}))
    assert str(folder) in stops(capsys, common.load, str(folder), 32)


def test_a_thinking_template_is_asked_not_to_think(tiny):
    """As Qwen3.5's does: an empty thought stands before the response."""
    processor = copy.deepcopy(tiny[1])
    plain = common.encode(processor, ["What?"])["input_ids"]
    processor.chat_template += (
        "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n"
        "{% else %}<think>\n{% endif %}")
    text = processor.tokenizer.decode(common.encode(processor, ["What?"])["input_ids"][0])
    assert text == processor.tokenizer.decode(plain[0]) + "<think>\n\n</think>\n\n"


# ---------------------------------------------------------------- what goes wrong on some cards

@pytest.mark.parametrize("bits", [32, 16])
def test_patches_are_embedded_as_by_the_class(checkpoint, bits):
    """The linear form gives the convolution's numbers; the weight keeps name and shape."""
    model, processor = common.load(checkpoint, bits)
    assert processor.image_processor.size["longest_edge"] == common.MAX_PIXELS
    patches = common.encode(processor, *prompts(processor, 2))["pixel_values"]
    embed = model.model.visual.patch_embed
    found = embed(patches)
    del embed.proj.forward                      # the class's own again
    torch.testing.assert_close(found, embed(patches))
    assert found.abs().max() > 0 and embed.state_dict()["proj.weight"].ndim == 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_padding_makes_nothing_that_is_read_nan(loaded, monkeypatch, attention, dtype):
    """Rows of very different lengths: the queries of left padding see no key at all.

    Their attention may be NaN (transformers issue 47651); nothing of it may reach the others.
    """
    model, processor = in_precision(loaded[0], dtype, attention), loaded[1]
    assert model.model.language_model.config._attn_implementation == attention
    texts = ["Go.", "What? " * 40]
    prompt = common.encode(processor, texts, prompts(processor, 2)[1])
    ids, mask = common.encode_responses(processor, texts[::-1])
    assert prompt["attention_mask"][0].sum() < 0.2 * prompt["attention_mask"].shape[1]
    model = adapted(model)
    coldstart.answer_loss(model, prompt, ids, mask).backward()
    assert all(weight.grad.isfinite().all() for weight in common.adapter_weights(model))
    read = []

    def draw(logits, *words):
        read.append(logits)
        return logits.argmax(-1), 0.0
    monkeypatch.setattr(common, "draw_token", draw)
    common.sample(model, processor, prompt, 3, np.zeros((2, 3)))
    assert len(read) >= 2 and not torch.cat(read).isnan().any()


def test_cards_without_bfloat16(monkeypatch):
    """They compute in float16, in 4 bits too; one function decides."""
    for has_cuda, has_bfloat16, wanted in (
            (False, False, torch.bfloat16), (True, True, torch.bfloat16),
            (True, False, torch.float16)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda value=has_cuda: value)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported",
                            lambda including_emulation, value=has_bfloat16: value)
        assert common.compute_dtype(16) == common.compute_dtype(4) == wanted
        assert common.compute_dtype(32) == torch.float32


@pytest.mark.parametrize("bits", [16, 4])
def test_both_stages_in_float16(toy_data, tmp_path, monkeypatch, bits):
    """As on a card without bfloat16: losses and gradients are finite, adapters float32."""
    monkeypatch.setattr(common, "compute_dtype", lambda bits: torch.float16)
    adapters, add_lora = [], common.add_lora

    def add(*words):
        model = add_lora(*words)
        assert common.network(model).lm_head.weight.dtype == torch.float16
        adapters.extend(common.adapter_weights(model))
        return model
    monkeypatch.setattr(common, "add_lora", add)
    monkeypatch.setattr(coldstart, "validate", lambda *words: {})
    flags = ["--preset", "tiny", "--bits", str(bits), "--data", str(toy_data), "--steps", "2",
             "--batch", "2", "--micro_batch", "2", "--max_new_tokens", "8"]
    out = [str(tmp_path / stage) for stage in ("coldstart", "distill")]
    coldstart.main(coldstart.parse_args([*flags, "--out", out[0]]))
    distill.main(distill.parse_args([*flags, "--out", out[1], "--init", out[0]]))
    assert adapters and {weight.dtype for weight in adapters} == {torch.float32}
    for folder in out:
        lines = [json.loads(line) for line in Path(folder, "metrics.jsonl").open()]
        assert len(lines) == 2 and all(line["loss"] and line["grad_norm"] for line in lines)
        assert not Path(folder, "not_finite.jsonl").exists()


def test_gradients_in_float16(tiny):
    """The loss is summed, not averaged, before the backward pass: float16 keeps its direction."""
    texts, images = prompts(tiny[1], 4)
    prompt = common.encode(tiny[1], texts, images)
    ids, mask = common.encode_responses(tiny[1], [row.response() for row in make_rows(4)[0]])
    found = []
    for dtype in (torch.float32, torch.float16):
        model = adapted(in_precision(tiny[0], dtype))
        coldstart.answer_loss(model, prompt, ids, mask).backward()
        found.append(torch.cat([w.grad.flatten() for w in common.adapter_weights(model)]))
    assert found[1].dtype == torch.float32
    assert torch.cosine_similarity(*found, dim=0) > 0.999
    assert (found[1] == 0).float().mean() < 0.001 + (found[0] == 0).float().mean()


class Waits(TorchDispatchMode):
    """Notes the operations for which Python would wait on a GPU: a CUDA graph takes none."""
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation.overloadpacket in (aten._local_scalar_dense, aten.nonzero, aten.masked_select,
                                        aten.is_nonzero, aten.equal):
            self.names.append(str(operation))
        return operation(*args, **(kwargs or {}))


def test_a_step_that_is_captured_waits_for_nothing(loaded):
    model, processor = loaded
    cuda = SimpleNamespace(config=model.config, device=torch.device("cuda"))
    graph = common.SERVED[model.config.model_type]["graph"]
    assert common.decoder_of(cuda) == (common.GraphDecoder if graph else common.Decoder, 8)
    decoder = common.GraphDecoder(model, common.encode(processor, *prompts(processor, 2)), 4)
    with torch.no_grad(), Waits() as waits:
        decoder.step(torch.tensor([7, 7]))
    assert not graph or not waits.names
    with Waits() as waits:
        torch.tensor([1.0]).item()
    assert waits.names
