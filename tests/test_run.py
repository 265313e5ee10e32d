"""The committed run belongs to the committed backbone: its answers come again."""
import json
from pathlib import Path

import pytest

import common
import gen_data

RUN = Path(__file__).parents[1] / "docs/run"


@pytest.fixture(scope="module")
def rows():
    """{id: row} of the test split that `python gen_data.py --preset tiny --seed 0` makes."""
    preset, found = gen_data.PRESETS["tiny"], {}
    for task, levels in preset["tasks"].items():
        for level in levels:
            for row in gen_data.sample_rows(task, level, "test", preset["test"], seed=0):
                found[row.id] = row
    return found


def test_its_answers_come_again(rows):
    """The 20 kept answers, from pictures, by the adapter that is there on the backbone in tiny/."""
    kept = [json.loads(line) for line in open(RUN / "eval/predictions_20.jsonl")]
    assert len(kept) == 20 and {line["id"] for line in kept} <= rows.keys()
    chosen = [rows[line["id"]] for line in kept]
    model, processor = common.load(common.TINY, 32)
    model = common.add_lora(model, path=str(RUN / "distill/adapter")).eval()
    pictures = [row.puzzle.render(32) for row in chosen]
    prompt = common.encode(processor, [row.student_prompt() for row in chosen], pictures)
    texts = common.decode(processor, *common.sample(model, processor, prompt, 120)[:2])
    outcomes = [row.judge(text)["outcome"] for row, text in zip(chosen, texts, strict=True)]
    assert outcomes == [line["outcome"] for line in kept]
    assert outcomes.count("success") >= 18


def test_what_its_files_say_agrees(rows):
    """Base, rows and stages are those of one run, and no test row was trained on."""
    for stage in ("coldstart", "distill"):
        config = json.loads((RUN / stage / "adapter/adapter_config.json").read_text())
        args = common.read_run(RUN / stage)["args"]
        assert config["base_model_name_or_path"] == args["model"] == "tiny" and args["seed"] == 0
        trained = set(json.loads((RUN / stage / "trained_rows.json").read_text())["rows"])
        assert len(trained) == 5 * gen_data.PRESETS["tiny"]["train"]
        assert not trained & {row.key() for row in rows.values()}
        steps = [json.loads(line)["step"] for line in open(RUN / stage / "metrics.jsonl")]
        assert steps == list(range(1, args["steps"] + 1))
    table = json.loads((RUN / "eval/results.json").read_text())["conditions"]
    whole = {name: next(line for line in table[name]["table"] if line["task"] == "macro")
             for name in ("base-image", "coldstart-image", "distill-image")}
    rates = [line["success"] for line in whole.values()]
    assert rates == sorted(rates) and all(line["n"] == len(rows) for line in whole.values())


def test_it_is_small():
    assert sum(file.stat().st_size for file in RUN.rglob("*") if file.is_file()) <= 5_000_000
