"""A checkpoint that cannot be used ends in one line that names it; what is whole is taken."""
import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
from conftest import stops

import common


@pytest.fixture
def folder(tmp_path):
    """A copy of the bundled backbone."""
    return Path(shutil.copytree(common.TINY, tmp_path / "model",
                                ignore=shutil.ignore_patterns("*.py", "__pycache__")))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty cache of the hub, where nobody answers -> [names that were asked for]."""
    asked = []

    def nobody(model, **options):
        asked.append(model)
        raise ConnectionError("nobody there\nat all")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", nobody)
    common.fetch.cache_clear()
    yield asked
    common.fetch.cache_clear()


def edit(file, **changes):
    """Change entries of a JSON file; None takes one out."""
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({name: value for name, value in content.items()
                                if value is not None}))


@pytest.mark.parametrize("file, changes", [
    ("config.json", {"model_type": "llava"}),
    ("config.json", {"model_type": None}),
    ("config.json", {"text_config": {"model_type": "qwen3_vl_text", "num_hidden_layers": 2}}),
    ("tokenizer_config.json", {"pad_token": None}),
    ("tokenizer.json", {"model": None}),
    ("processor_config.json", {"image_processor": None}),
])
def test_a_file_that_says_something_else(folder, capsys, file, changes):
    edit(folder / file, **changes)
    assert str(folder) in stops(capsys, common.load, str(folder), 32)


# As a text model has it: a list of texts and pictures is printed as Python has it.
TEXT_ONLY = """{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


@pytest.mark.parametrize("template", [
    None, TEXT_ONLY, TEXT_ONLY.replace("message.content", "message.content | tojson"),
    "{% for part in messages[0].content %}{{ part.text }}{% endfor %}", "{% if %}",
    "{{ raise_exception('content must be a string') }}",
], ids=["none", "text", "text as JSON", "no picture", "no template", "refuses"])
def test_a_template_that_does_not_render_a_picture(folder, capsys, template):
    (folder / "chat_template.jinja").unlink()
    if template:
        (folder / "chat_template.jinja").write_text(template)
    assert str(folder) in stops(capsys, common.load, str(folder), 32)


def test_a_template_that_only_the_tokenizer_has(folder, tiny):
    """As some fine-tuning tools save it."""
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    edit(folder / "tokenizer_config.json", chat_template=template)
    processor = common.load_processor(str(folder))
    wanted = tiny[0].fixed_batch["input_ids"]
    assert common.fixed_batch(processor)["input_ids"].tolist() == wanted.tolist()


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_pointer_of_git_lfs(folder, capsys, name):
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\n"
                               "oid sha256:0123\nsize 5505664\n")
    assert str(folder) in stops(capsys, common.load, str(folder), 32)


def test_a_part_that_is_missing(folder, capsys):
    """Of weights in several files."""
    index = {"metadata": {}, "weight_map": {"a": "model-00001-of-00002.safetensors",
                                            "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    assert str(folder) in stops(capsys, common.load, str(folder), 32)


def test_an_adapter_is_no_model(folder, capsys):
    (folder / "adapter_config.json").write_text("{}")
    assert str(folder) in stops(capsys, common.load, str(folder), 32)


# ---------------------------------------------------------------- the hub

@pytest.mark.parametrize("name", ["/no/such/model", "./model", "out/model", "tinny", "a b/c"])
def test_what_neither_a_folder_nor_the_hub_has(hub, capsys, name):
    assert f"--model {name} " in stops(capsys, common.load, name, 32)


@pytest.mark.parametrize("missing", [None, "model.safetensors", "config.json",
                                     "tokenizer_config.json"])
def test_what_is_whole_in_the_cache_is_taken_without_a_question(
        folder, hub, tmp_path, capsys, missing):
    """And is downloaded where an earlier download was interrupted."""
    cache = tmp_path / "hub/models--owner--name"
    snapshot = cache / "snapshots/0123"
    snapshot.parent.mkdir(parents=True)
    folder.rename(snapshot)
    (cache / "refs").mkdir()
    (cache / "refs/main").write_text("0123")
    if missing:
        (snapshot / missing).unlink()
        stops(capsys, common.fetch, "owner/name")
        assert hub == ["owner/name"]
    else:
        assert common.fetch("owner/name") == snapshot and not hub


def test_a_download_is_interrupted_if_a_part_is_missing(folder):
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model-1.safetensors").write_bytes(b"")
    assert not common.is_whole(folder)
    (folder / "model-2.safetensors").write_bytes(b"")
    assert common.is_whole(folder)
