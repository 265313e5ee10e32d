"""A checkpoint is looked at before its weights are read: each fault is one line that names it."""
import json
import os
import shutil
from pathlib import Path

import pytest
from conftest import stops

import common


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A copy of the bundled backbone; reading its weights is an error."""
    import transformers
    monkeypatch.setattr(transformers.Qwen3VLForConditionalGeneration, "from_pretrained",
                        classmethod(guarded(transformers.Qwen3VLForConditionalGeneration)))
    return Path(shutil.copytree(common.TINY, tmp_path / "model",
                                ignore=shutil.ignore_patterns("*.py", "__pycache__")))


def guarded(network):
    whole = network.from_pretrained.__func__

    def from_pretrained(kind, path, **options):
        assert path is None, "the weights are read"
        return whole(kind, path, **options)
    return from_pretrained


def edit(file, **changes):
    """Change entries of a JSON file; None takes one out."""
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({name: value for name, value in content.items()
                                if value is not None}))


def test_a_whole_checkpoint_is_read(folder):
    common.check_checkpoint(str(folder), 32)
    with pytest.raises(AssertionError, match="weights are read"):
        common.load(str(folder), 32)


@pytest.mark.parametrize("file, changes, message", [
    ("config.json", {"model_type": "llava"}, "is a llava: wanted qwen3_vl"),
    ("config.json", {"model_type": None}, "is a None: wanted qwen3_vl"),
    ("config.json", {"quantization_config": {"quant_method": "fp8"}}, "stored in fp8"),
    ("config.json", {"attn_implementation": "flash_attention_2"}, "FlashAttention2"),
    ("config.json", {"attn_implementation": "unheard_of"}, '"unheard_of"` is not supported'),
    ("config.json", {"text_config": {"model_type": "qwen3_vl_text", "num_hidden_layers": 2}},
     "first of 33 model.language_model.layers.2.input_layernorm.weight"),
    ("tokenizer_config.json", {"pad_token": None}, 'wanted "pad_token" in tokenizer_config.json'),
    ("tokenizer_config.json", {"eos_token": None}, 'wanted "eos_token" in tokenizer_config.json'),
    ("tokenizer.json", {"model": None}, "its tokenizer or processor cannot be loaded"),
    ("processor_config.json", {"image_processor": None}, "preprocessor_config.json"),
])
def test_a_file_that_says_something_else(folder, capsys, file, changes, message):
    edit(folder / file, **changes)
    line = stops(capsys, common.load, str(folder), 32)
    assert message in line and str(folder) in line


# As a text model has it: a list of texts and pictures is printed as Python has it.
TEXT_ONLY = """{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
AS_JSON = TEXT_ONLY.replace("message.content", "message.content | tojson")


@pytest.mark.parametrize("template, message", [
    (None, "it has no chat template"),
    (TEXT_ONLY, "renders no list of texts and pictures"),
    (AS_JSON, "renders no list of texts and pictures"),
    ("{% for part in messages[0].content %}{{ part.text }}{% endfor %}",
     "renders no picture (<|image_pad|> is missing)"),
    ("{% if %}", "cannot be rendered"),
    ("{{ raise_exception('content must be a string') }}", "content must be a string"),
])
def test_a_template_that_does_not_render_a_picture(folder, capsys, template, message):
    (folder / "chat_template.jinja").unlink()
    if template:
        (folder / "chat_template.jinja").write_text(template)
    assert message in stops(capsys, common.load, str(folder), 32)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_pointer_of_git_lfs(folder, capsys, name):
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\n"
                               "oid sha256:0123\nsize 5505664\n")
    assert f"{name} is only a pointer of Git LFS" in stops(capsys, common.load, str(folder), 32)


def test_a_part_that_is_missing_is_named(folder, capsys):
    """Of weights in several files, by their index."""
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model-00002-of-00002.safetensors is missing" in stops(
        capsys, common.load, str(folder), 32)


def test_an_adapter_is_no_model(folder, capsys):
    (folder / "adapter_config.json").write_text("{}")
    assert "holds an adapter" in stops(capsys, common.load, str(folder), 32)


@pytest.mark.parametrize("name", [
    "/no/such/model", "./model", "../model", "~/model", "out/model", "models/here/mine", "tinny",
    "models\\mine", "a b/c"])
def test_what_looks_like_a_path_is_not_asked_for_at_the_hub(
        tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(common, "download", None)                          # it would be called
    assert f"--model {name}: no such folder" in stops(capsys, common.load, name, 32)


def test_a_name_that_the_hub_cannot_give_is_one_line(tmp_path, monkeypatch, capsys):
    """Without asking again and again: one request, which finds nobody."""
    import huggingface_hub
    monkeypatch.chdir(tmp_path)
    asked = []

    def nobody(*words, **options):
        asked.append(words)
        raise ConnectionError("nobody there\nat all")
    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", nobody)
    line = stops(capsys, common.load, "owner/name", 32)
    assert "--model owner/name is no folder here, and cannot be had" in line
    assert "nobody there" in line and len(asked) == 1


def test_a_model_that_is_in_the_cache_is_taken_without_a_question(folder, monkeypatch):
    """The folder of a hub's model is the cache's; what is missing there is fetched."""
    asked = []
    monkeypatch.setattr(common, "checkpoint_folder", lambda model: folder)
    monkeypatch.setattr(common, "download", lambda *words: asked.append(words) or folder)
    monkeypatch.chdir(folder.parent)
    assert common.check_checkpoint("owner/name", 32)[0] == folder and not asked
    os.rename(folder / "model.safetensors", folder.parent / "aside")

    def fetch(model, patterns):
        asked.append(patterns)
        if "*.safetensors" in patterns:
            os.rename(folder.parent / "aside", folder / "model.safetensors")
        return folder
    monkeypatch.setattr(common, "download", fetch)
    assert common.check_checkpoint("owner/name", 32)[0] == folder
    assert ["*.safetensors" in patterns for patterns in asked] == [False, True]
