"""One picture, one answer: the tool's is the evaluation's; the README's lines say the same."""
import json
from pathlib import Path

import pytest
from conftest import make_rows, stops
from PIL import Image

import common
import gen_data
from tools import answer

ROOT = Path(__file__).parents[1]
RUN = str(ROOT / "docs/run/distill")


def ask(*words):
    answer.main(answer.parse_args([str(word) for word in words]))


@pytest.fixture
def loaded(tiny, monkeypatch):
    """`common.load` gives the bundled backbone again, and says with what it was called."""
    calls = []

    def load(*words):
        calls.append(words)
        return getattr(tiny[0], "base_model", tiny[0]), tiny[1]
    monkeypatch.setattr(common, "load", load)
    yield calls
    for module in tiny[0].modules():  # what `add_lora` put in
        assert "Peft" not in type(module).__name__
    if hasattr(tiny[0], "peft_config"):
        from peft import PeftModel
        PeftModel(tiny[0], tiny[0].peft_config["default"]).unload()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """(folder with two mazes, their rows)"""
    folder, rows = tmp_path_factory.mktemp("pictures"), []
    for i, row in enumerate(gen_data.sample_rows("maze", 4, "test", 2, seed=0)):
        row.puzzle.render(32).save(folder / f"{i}.png")
        rows.append(row)
    return folder, rows
