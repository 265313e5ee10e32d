"""The scripts as a user runs them: processes, toy sizes, and what they say to bad input."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import gen_data

ROOT = Path(__file__).parents[1]


def test_end_to_end(tmp_path):
    """All four scripts in a row, from an empty folder; the files have the promised form."""
    def run(script, *words):
        done = subprocess.run([sys.executable, ROOT / script, *map(str, words)], cwd=tmp_path,
                              capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout
    seed = ["--seed", 3]
    toy = [*seed, "--steps", 2, "--batch", 4, "--micro_batch", 4, "--max_new_tokens", 30]
    run("gen_data.py", *seed, "--train", 10, "--val", 4, "--test", 4)
    assert "next: python distill.py" in run("coldstart.py", *toy)
    assert "next: python evaluate.py" in run("distill.py", *toy)
    printed = run("evaluate.py", *seed, "--limit", 1, "--perception", "--max_new_tokens", 20)
    trained, out = [], tmp_path / "out/tiny"
    for stage, keys in (
            ("coldstart", {"loss", "lr", "grad_norm", "val_loss", "val_map", "val_questions",
                           "val_length"}),
            ("distill", {"loss", "lr", "grad_norm", "kl", "kl_map", "kl_route", "kl_answer",
                         "entropy", "sampling_gap", "success", "optimal", "length", "cut",
                         "on_policy", "val_success", "val_optimal", "val_length", "val_kl"})):
        folder = out / stage
        lines = [json.loads(line) for line in open(folder / "metrics.jsonl")]
        assert [line["step"] for line in lines] == [1, 2]
        assert lines[-1].keys() >= {*keys, "step", "seconds", "step_seconds", "peak_gb"}
        assert 0.1 < lines[-1]["peak_gb"] < 20
        assert (folder / "adapter/adapter_model.safetensors").is_file()
        for script in (stage, "common", "gen_data"):
            assert (folder / f"code/{script}.py").read_text() == (ROOT / f"{script}.py").read_text()
        record = json.loads((folder / "args.json").read_text())
        assert record["kind"] == "run" and record["args"]["seed"] == 3
        trained.append(json.loads((folder / "trained_rows.json").read_text())["rows"])
    assert trained[0] == trained[1] == sorted(set(trained[0])) and len(trained[0]) == 50
    report = json.loads((out / "eval/results.json").read_text())
    names = [f"{stage}-{source}" for stage in ("base", "coldstart", "distill")
             for source in ("image", "text")]
    assert list(report["conditions"]) == names
    for name in names:
        assert len((out / "eval" / name / "predictions.jsonl").open().readlines()) == 5
    assert "| distill-image | " in printed and (out / "eval/report.html").is_file()
    assert "| macro | 5 |" in (out / "eval/results.md").read_text()


def test_no_script_needs_what_only_unix_has():
    """Every script is imported without fcntl and resource."""
    scripts = [path.stem for path in ROOT.glob("*.py")]
    tools = [f"tools.{path.stem}" for path in (ROOT / "tools").glob("*.py")]
    code = f"""
import sys
import filelock, psutil  # they have a side for every system
sys.modules["fcntl"] = sys.modules["resource"] = None
for name in {sorted(scripts + tools)}:
    __import__(name)
import common
assert common.peak_gb() > 0.01"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize("locale", ["C", "POSIX"])
def test_the_systems_encoding_does_not_matter(toy_data, tmp_path, locale):
    """A page, tables and prompts that are not ASCII, under a locale that is."""
    rows = gen_data.load_rows(toy_data, "test")
    answers = tmp_path / "answers.jsonl"
    answers.write_text("".join(json.dumps({"id": row.id, "response": "→ \u4f60"}) + "\n"
                               for row in rows))
    environment = {**os.environ, "PYTHONUTF8": "0", "LC_ALL": locale, "PYTHONCOERCECLOCALE": "0",
                   "PYTHONIOENCODING": "ascii:replace"}
    done = subprocess.run(
        [sys.executable, ROOT / "evaluate.py", "--data", toy_data, "--responses", answers, "--out",
         tmp_path / "eval"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "\u4f60" in (tmp_path / "eval/report.html").read_text(encoding="utf-8") or \
        "\\u4f60" in (tmp_path / "eval/report.html").read_text(encoding="utf-8")
