"""The scripts as a user runs them: processes, toy sizes, and what they say to bad input."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(script, *words, cwd):
    return subprocess.run(
        [sys.executable, str(ROOT / script), *map(str, words)],
        cwd=cwd,
        capture_output=True,
        text=True,
    )


def test_end_to_end(tmp_path):
    """All four scripts in a row, from an empty folder; the results file has the promised form."""
    shared = ["--preset", "tiny", "--seed", 3]
    made = run("gen_data.py", *shared, "--train", 10, "--val", 4, "--test", 4, cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    toy = ["--steps", 2, "--batch", 8, "--micro_batch", 4]
    for script, extra in (
        ("coldstart.py", toy),
        ("distill.py", [*toy, "--max_new_tokens", 60]),
        ("evaluate.py", ["--limit", 2, "--perception"]),
    ):
        result = run(script, *shared, *extra, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        assert "preset tiny (--preset" in result.stdout
    for stage, keys in (
        ("coldstart", {"step", "loss", "grad_norm", "val_loss", "val_map", "val_questions"}),
        (
            "distill",
            {
                "step",
                "kl",
                "kl_state",
                "kl_route",
                "kl_answer",
                "success",
                "optimal",
                "length",
                "cut",
                "grad_norm",
                "seconds",
                "peak_gb",
            },
        ),
    ):
        folder = tmp_path / "out" / stage
        lines = [json.loads(line) for line in open(folder / "metrics.jsonl")]
        assert [line["step"] for line in lines] == [1, 2] and keys <= lines[-1].keys()
        assert (folder / "adapter/adapter_model.safetensors").is_file() and (
            folder / f"{stage}.py"
        ).is_file()
        assert json.loads((folder / "args.json").read_text())["args"]["seed"] == 3
    report = json.loads((tmp_path / "out/eval/results.json").read_text())
    names = [
        f"{stage}-{source}"
        for stage in ("base", "coldstart", "distill")
        for source in ("image", "text")
    ]
    assert (
        list(report["conditions"]) == names and {"gaps", "closed", "differences"} <= report.keys()
    )
    for name in names:
        summary = json.loads((tmp_path / "out/eval" / name / "summary.json").read_text())
        assert summary == report["conditions"][name] and summary["args"]["seed"] == 3
        assert (
            len([c for c in summary["table"] if c["task"] != "macro"]) == 5 + 3
            and summary["table"][8]["n"] == 10
        )
        for c in summary["table"]:
            assert 0 <= c["optimal"] <= c["success"] <= c["parsed"] <= 1
        kinds = [
            f"{side}_{plan}"
            for side in ("right", "wrong")
            for plan in ("shortest", "longer", "failed")
        ]
        assert sum(summary["diagnosis"][kind] for kind in kinds) == 10
        questions = (
            2 * (5 + 1) + 2 * (5 + 1) + 8 + 1 + 6 + 6 + 9
        )  # (questions + all) per level, and per task
        assert len(summary["perception"]) == (questions if name.endswith("image") else 0)
        assert len(open(tmp_path / "out/eval" / name / "predictions.jsonl").readlines()) == 10
    assert "| distill-image | " in result.stdout and (tmp_path / "out/eval/report.html").is_file()
    assert "| macro | all |  | 10 |" in (tmp_path / "out/eval/results.md").read_text()


@pytest.mark.parametrize(
    "script, words, message",
    [
        ("coldstart.py", ["--preset", "9b"], "unknown preset '9b', known: tiny, 2b, 4b, 8b"),
        ("coldstart.py", ["--preset", "tiny", "--data", "."], "python gen_data.py"),
        ("distill.py", ["--preset", "tiny", "--init", "nowhere"], "nowhere"),
        ("evaluate.py", ["--preset", "tiny", "--model", "here"], "here is no checkpoint folder"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, script, words, message):
    (tmp_path / "here").mkdir()
    if "--data" not in words:
        (tmp_path / "data/train").mkdir(parents=True)
        row = {
            "file_name": "a.png",
            "id": "a",
            "task": "frozenlake",
            "level": 3,
            "state": {"grid": ["SG", "FF"]},
            "plan": ["R"],
        }
        for split in ("train", "val", "test"):
            (tmp_path / "data" / split).mkdir(exist_ok=True)
            (tmp_path / "data" / split / "a.png").touch()
            (tmp_path / "data" / split / "metadata.jsonl").write_text(json.dumps(row))
    result = run(script, *words, cwd=tmp_path)
    assert result.returncode == 2, result.stderr
    assert message in result.stderr and "Traceback" not in result.stderr
    assert len([line for line in result.stderr.splitlines() if line.startswith("error:")]) == 1


def test_a_foreign_adapter_is_refused(tmp_path):
    """An adapter of another rank, and one for another kind of network."""
    sys.path.insert(0, str(ROOT))
    import common

    model = common.add_lora(common.load(common.TINY, 32)[0], 4)
    model.save_pretrained(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    for change in ({"r": 8}, {"target_modules": ["c_attn"]}):
        (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(config | change))
        with pytest.raises(SystemExit) as stop:
            common.add_lora(common.load(common.TINY, 32)[0], path=str(tmp_path / "adapter"))
        assert stop.value.code == 2
