"""Adapters and checkpoints of other tools: taken as they are, or refused by what is wrong."""
import copy
import json
import shutil

import peft
import pytest
import torch
from conftest import stops
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig

import common
import distill
import evaluate

TARGETS = ["q_proj", "v_proj"]


def foreign_adapter(tiny, folder, **options):
    """An adapter of another tool: a list of targets, its own options, B matrices not zero."""
    torch.manual_seed(0)
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": TARGETS, **options})
    model = peft.get_peft_model(copy.deepcopy(tiny[0]), config)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
    model.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize("options", [
    {}, {"use_dora": True}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 8}},
    {"lora_dropout": 0.1}, {"target_modules": r".*language_model.*\.o_proj"}],
    ids=lambda options: " ".join(options) or "list")
def test_a_lora_of_another_tool_is_taken(tiny, tmp_path, capsys, options):
    """It says what it said there, and off it is the base; dropout is set to 0 with a line.

    So it is where tokens are sampled, merged too.
    """
    theirs = foreign_adapter(tiny, tmp_path, **options)
    wanted = common.fixed_logits(theirs)
    ours = common.add_lora(copy.deepcopy(tiny[0]), path=str(tmp_path))
    torch.testing.assert_close(common.fixed_logits(ours), wanted)
    assert (wanted - tiny[0].base_logits).abs().max() > 0.01
    with ours.disable_adapter():
        assert torch.equal(common.fixed_logits(ours), tiny[0].base_logits)
    with common.light_adapters(ours):
        torch.testing.assert_close(common.fixed_logits(ours), wanted, atol=1e-3, rtol=1e-4)
    with ours.disable_adapter(), common.light_adapters(ours):
        assert torch.equal(common.fixed_logits(ours), tiny[0].base_logits)
    ours.merge_adapter()
    with common.light_adapters(ours):
        torch.testing.assert_close(common.fixed_logits(ours), wanted, atol=1e-3, rtol=1e-4)
    assert ("dropout of 0.1 is set to 0" in capsys.readouterr().err) == ("lora_dropout" in options)
    assert not any(module.p for module in ours.modules() if isinstance(module, torch.nn.Dropout))


def test_several_adapters_or_one_with_a_bias_are_sampled_as_they_are(tiny, tmp_path):
    """What is no plain LoRA keeps its own forward: two at once, B with a bias."""
    ours = foreign_adapter(tiny, tmp_path, lora_bias=True)
    wanted = common.fixed_logits(ours)
    with common.light_adapters(ours):
        assert torch.equal(common.fixed_logits(ours), wanted)
    ours = foreign_adapter(tiny, tmp_path)
    ours.add_adapter("other", copy.deepcopy(ours.peft_config["default"]))
    for name, weight in ours.named_parameters():
        if "lora_B.other" in name:
            torch.nn.init.normal_(weight, std=0.3)
    ours.base_model.set_adapter(["default", "other"])
    both = common.fixed_logits(ours)
    one = common.fixed_logits(foreign_adapter(tiny, tmp_path))
    assert (both - one).abs().max() > 0.01
    with common.light_adapters(ours):
        assert torch.equal(common.fixed_logits(ours), both)


def test_names_of_the_text_only_class_are_mapped(tiny, tmp_path):
    wanted = common.fixed_logits(foreign_adapter(tiny, tmp_path))
    file = tmp_path / "adapter_model.safetensors"
    weights = {name.replace("model.language_model.", "model."): weight
               for name, weight in load_file(file).items()}
    save_file(weights, file)
    ours = common.add_lora(copy.deepcopy(tiny[0]), path=str(tmp_path))
    torch.testing.assert_close(common.fixed_logits(ours), wanted)


@pytest.mark.parametrize("options", [
    {"bias": "all"}, {"modules_to_save": ["lm_head"]}, {"target_modules": [*TARGETS, "lm_head"]},
    {"init_lora_weights": "pissa"},
    {"init_lora_weights": "pissa", "target_modules": r"model\.visual.*\.linear_fc1"}],
    ids=["bias", "modules_to_save", "lm_head", "pissa", "pissa on the vision tower"])
def test_what_changes_the_base_or_the_head_is_refused(tiny, tmp_path, capsys, options):
    """Whatever it is called: a trained weight that is no LoRA, or a base that is another one."""
    foreign_adapter(tiny, tmp_path, **options)
    stops(capsys, common.add_lora, copy.deepcopy(tiny[0]), None, False, str(tmp_path))


def test_another_kind_of_adapter_is_refused(tiny, tmp_path, capsys):
    """AdaLoRA has LoRA's layers and trains a third matrix of each."""
    config = peft.AdaLoraConfig(target_modules=TARGETS, init_r=4, target_r=2, total_step=10)
    peft.get_peft_model(copy.deepcopy(tiny[0]), config).save_pretrained(tmp_path)
    line = stops(capsys, common.add_lora, copy.deepcopy(tiny[0]), None, False, str(tmp_path))
    assert str(tmp_path) in line


def test_weights_that_do_not_fit_are_refused(tiny, tmp_path, capsys):
    """Another rank, a target less, a layer that is not there, a weight that nothing needs."""
    foreign_adapter(tiny, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    for change in ({"r": 8}, {"target_modules": ["q_proj"]}, {"target_modules": ["c_attn"]}):
        (tmp_path / "adapter_config.json").write_text(json.dumps(config | change))
        line = stops(capsys, common.add_lora, copy.deepcopy(tiny[0]), None, False, str(tmp_path))
        assert str(tmp_path) in line


def test_a_base_that_is_no_longer_the_base_is_noticed(tiny, capsys):
    """Whatever changed it: the guard compares logits and knows no names."""
    model = copy.deepcopy(tiny[0])
    model.model.language_model.layers[2].mlp.up_proj.weight.data.mul_(1.5)
    stops(capsys, common.add_lora, model, 4)


def test_a_base_that_an_adapter_leaves_changed_is_noticed(tiny, tmp_path, capsys):
    """Merged, as an evaluation must not leave it to the next condition."""
    foreign_adapter(tiny, tmp_path)
    model = common.add_lora(copy.deepcopy(tiny[0]), path=str(tmp_path))
    model = common.remove_lora(model)
    assert torch.equal(common.fixed_logits(model), tiny[0].base_logits)
    model = common.add_lora(model, path=str(tmp_path))
    model.merge_adapter()
    stops(capsys, common.remove_lora, model)


def test_an_evaluation_does_not_ask_a_changed_base(tiny, toy_data, tmp_path, monkeypatch, capsys):
    foreign_adapter(tiny, tmp_path / "theirs")
    answer = evaluate.answer_batch

    def answer_batch(model, *words):
        if hasattr(model, "merge_adapter"):
            model.merge_adapter()
        return answer(model, *words)
    monkeypatch.setattr(evaluate, "answer_batch", answer_batch)
    words = ["--adapter", tmp_path / "theirs", "base", "--data", toy_data, "--out",
             tmp_path / "eval", "--input", "text", "--limit", 1, "--max_new_tokens", 2]
    args = evaluate.parse_args(list(map(str, words)))
    stops(capsys, evaluate.main, args)
    assert not list(tmp_path.glob("eval/base*/answers"))


# ---------------------------------------------------------------- what is saved

@pytest.mark.parametrize("vision", [False, True])
def test_what_is_saved_serves_elsewhere(tiny, toy_data, tmp_path, vision):
    """Names in place of a pattern, the same for PEFT alone and for us, and no place on the disk."""
    model, folder = shutil.copytree(common.TINY, tmp_path / "mine/model"), tmp_path / "out/adapter"
    words = ["--model", model, "--init", "none", "--data", toy_data, "--out", tmp_path / "out",
             "--steps", 1, "--batch", 2, "--max_new_tokens", 4, "--lora_vision", int(vision)]
    distill.main(distill.parse_args(list(map(str, words))))
    config = json.loads((folder / "adapter_config.json").read_text())
    names = config["target_modules"]
    linears = [name for name, module in tiny[0].named_modules() if name != "lm_head"
               and isinstance(module, torch.nn.Linear) and (vision or ".visual." not in name)]
    assert names == sorted(linears) and config["base_model_name_or_path"] == "model"
    for file in folder.iterdir():
        assert str(tmp_path).encode() not in file.read_bytes()
    weights = load_file(folder / "adapter_model.safetensors")
    weights = {name: torch.randn_like(weight) / 10 for name, weight in weights.items()}
    save_file(weights, folder / "adapter_model.safetensors")

    base = AutoModelForImageTextToText.from_pretrained(common.TINY, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, folder).eval()
    base.fixed_batch = tiny[0].fixed_batch
    ours = common.add_lora(copy.deepcopy(tiny[0]), path=str(folder))
    for loaded in (theirs, ours):
        adapted = {name.partition("base_model.model.")[2].partition(".lora_")[0]
                   for name, _ in loaded.named_parameters() if ".lora_" in name}
        assert adapted == set(names)
    torch.testing.assert_close(common.fixed_logits(theirs), common.fixed_logits(ours))
    assert (common.fixed_logits(ours) - tiny[0].base_logits).abs().max() > 0.01


def test_an_adapter_with_a_pattern_is_loaded_and_saved_with_names(tiny, tmp_path):
    """As runs of earlier versions have it."""
    theirs = foreign_adapter(tiny, tmp_path / "old", target_modules=r".*language_model.*\.o_proj")
    ours = common.add_lora(copy.deepcopy(tiny[0]), path=str(tmp_path / "old"))
    ours.save_pretrained(tmp_path / "new")
    config = json.loads((tmp_path / "new/adapter_config.json").read_text())
    assert config["target_modules"] == [
        f"model.language_model.layers.{layer}.self_attn.o_proj" for layer in range(5)]
    again = common.add_lora(copy.deepcopy(tiny[0]), path=str(tmp_path / "new"))
    torch.testing.assert_close(common.fixed_logits(again), common.fixed_logits(theirs))


# ---------------------------------------------------------------- the run it comes from

def test_trained_rows_that_cannot_be_read(tmp_path, capsys):
    """What is no JSON ends the run; of another form they are not known."""
    (tmp_path / "adapter").mkdir()
    (tmp_path / "trained_rows.json").write_text("[")
    line = stops(capsys, common.read_trained_rows, tmp_path / "adapter")
    assert str(tmp_path / "trained_rows.json") in line
    (tmp_path / "trained_rows.json").write_text("5")
    assert common.read_trained_rows(tmp_path / "adapter") is None
    assert "warning: " in capsys.readouterr().err


def test_distillation_continues_any_cold_start(tiny, toy_data, tmp_path, capsys):
    """A bare PEFT folder, of which nothing says what it was trained on; its rank is recorded."""
    foreign_adapter(tiny, tmp_path / "theirs")
    words = ["--init", tmp_path / "theirs", "--data", toy_data, "--out", tmp_path / "out",
             "--steps", 1, "--batch", 2, "--micro_batch", 2, "--max_new_tokens", 4,
             "--eval_every", 0]
    distill.main(distill.parse_args(list(map(str, words))))
    assert "warning: " in capsys.readouterr().err
    assert not (tmp_path / "out/trained_rows.json").exists()
    before, after = (load_file(folder / "adapter_model.safetensors")
                     for folder in (tmp_path / "theirs", tmp_path / "out/adapter"))
    assert before.keys() == after.keys()
    config = json.loads((tmp_path / "out/adapter/adapter_config.json").read_text())
    names = [f"model.language_model.layers.{layer}.self_attn.{target}" for layer in range(5)
             for target in TARGETS]
    assert config["target_modules"] == names and config["r"] == 4
    assert common.read_run(tmp_path / "out")["args"]["lora_rank"] == 4
    assert config["base_model_name_or_path"] == "tiny"


# ---------------------------------------------------------------- checkpoints

def stored(folder, **options):
    """The bundled backbone, saved in another form."""
    model = AutoModelForImageTextToText.from_pretrained(
        common.TINY, dtype=torch.bfloat16, **options)
    model.save_pretrained(folder)
    AutoProcessor.from_pretrained(common.TINY).save_pretrained(folder)
    return str(folder)


def nf4(*skipped):
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4",
                              bnb_4bit_compute_dtype=torch.bfloat16,
                              llm_int8_skip_modules=list(skipped))


def test_weights_are_told_apart_wherever_they_differ(tmp_path):
    """At their ends, in a part of the middle, by their size; without reading gigabytes."""
    found = set()
    for size, changed in ((3 << 20, range(0)), (3 << 20, range(5)), (4 << 20, range(5)),
                          (3 << 20, range((3 << 20) - 5, 3 << 20)),
                          (3 << 20, range(5 << 18, 6 << 18))):
        content = bytearray(size)
        for place in changed:
            content[place] = 1
        (tmp_path / "model.safetensors").write_bytes(content)
        found.add(common.digest_folder(tmp_path)["model.safetensors"])
    assert len(found) == 5


def test_another_commit_of_the_hub_with_the_same_files_is_the_same_model(tmp_path):
    found = []
    for commit in ("0123", "4567"):
        folder = tmp_path / "snapshots" / commit
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(b"weights")
        found.append(common.digest_folder(folder))
    assert found[0] == found[1]


def test_a_checkpoint_that_is_stored_in_4_bits(tmp_path, capsys):
    folder = stored(tmp_path, quantization_config=nf4("lm_head", "model.visual"))
    model, _ = common.load(folder, 4)
    kinds = {type(module).__name__ for name, module in model.named_modules()
             if name.endswith("up_proj")}
    assert kinds == {"Linear4bit"}
    for bits in (16, 32):
        assert folder in stops(capsys, common.load, folder, bits)


def test_a_vision_tower_in_4_bits_is_refused(tmp_path, capsys):
    folder = stored(tmp_path, quantization_config=nf4("lm_head"))
    assert folder in stops(capsys, common.load, folder, 4)


@pytest.mark.parametrize("method", ["fp8", "gptq", "awq"])
def test_another_quantisation_is_refused(tmp_path, capsys, method):
    folder = shutil.copytree(common.TINY, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method}
    (folder / "config.json").write_text(json.dumps(config))
    assert str(folder) in stops(capsys, common.load, str(folder), 4)
