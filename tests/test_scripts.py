"""The scripts as a user runs them: processes, toy sizes, and what they say to bad input."""
import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest

import common
import distill

ROOT = Path(__file__).parents[1]


def test_end_to_end(tmp_path):
    """All four scripts in a row, from an empty folder; the files have the promised form."""
    def run(script, *words):
        done = subprocess.run([sys.executable, ROOT / script, *map(str, words)], cwd=tmp_path,
                              capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout
    shared = ["--preset", "tiny", "--seed", 3]
    toy = [*shared, "--steps", 2, "--batch", 4, "--micro_batch", 4, "--max_new_tokens", 30]
    run("gen_data.py", *shared, "--train", 10, "--val", 4, "--test", 4)
    assert "preset tiny (--preset" in run("coldstart.py", *toy)
    run("distill.py", *toy)
    printed = run("evaluate.py", *shared, "--limit", 1, "--perception", "--max_new_tokens", 20)
    trained = []
    for stage, keys in (
            ("coldstart", {"loss", "lr", "grad_norm", "val_loss", "val_map", "val_questions"}),
            ("distill", {"loss", "lr", "grad_norm", "kl", "kl_state", "kl_route", "kl_answer",
                         "entropy", "success", "optimal", "length", "cut", "on_policy"})):
        folder = tmp_path / "out" / stage
        lines = [json.loads(line) for line in open(folder / "metrics.jsonl")]
        assert [line["step"] for line in lines] == [1, 2]
        assert lines[-1].keys() == {*keys, "step", "seconds", "step_seconds", "peak_gb"}
        assert 0.1 < lines[-1]["peak_gb"] < 20
        assert (folder / "adapter/adapter_model.safetensors").is_file()
        assert (folder / f"{stage}.py").read_text() == (ROOT / f"{stage}.py").read_text()
        assert json.loads((folder / "args.json").read_text())["args"]["seed"] == 3
        trained.append(json.loads((folder / "trained_rows.json").read_text()))
    assert trained[0] == trained[1] == sorted(set(trained[0])) and len(trained[0]) == 50
    report = json.loads((tmp_path / "out/eval/results.json").read_text())
    names = [f"{stage}-{source}" for stage in ("base", "coldstart", "distill")
             for source in ("image", "text")]
    assert list(report["conditions"]) == names
    for name in names:
        assert len((tmp_path / "out/eval" / name / "predictions.jsonl").open().readlines()) == 5
    assert "| distill-image | " in printed and (tmp_path / "out/eval/report.html").is_file()
    assert "| macro | all |  | 5 |" in (tmp_path / "out/eval/results.md").read_text()


@pytest.mark.parametrize("script, words, message", [
    ("coldstart", "--preset 9b", "unknown preset '9b', known: tiny, 2b, 4b, 8b"),
    ("coldstart", "--preset tiny --batch 0", "--batch 0: wanted at least 1"),
    ("coldstart", "--preset tiny --data .", "python gen_data.py"),
    ("distill", "--preset tiny --init nowhere", "nowhere"),
    ("distill", "--preset tiny --init unfinished", "no adapter in unfinished/adapter"),
    ("distill", "--preset tiny --init none --wandb mine", "pip install wandb"),
    ("evaluate", "--preset tiny --model here", "here is no checkpoint folder"),
])
def test_bad_input_is_one_line_and_exit_code_2(
        toy_data, tmp_path, monkeypatch, capsys, script, words, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    Path("here").mkdir()
    Path("data").symlink_to(toy_data)
    Path("unfinished").mkdir()
    Path("unfinished/trained_rows.json").write_text("[]")
    module = import_module(script)
    with pytest.raises(SystemExit) as stop:
        module.main(module.parse_args(words.split()))
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2
    [line] = [line for line in lines if "error:" in line]
    assert message in line


def test_a_foreign_adapter_is_refused(tiny, tmp_path, capsys):
    """An adapter of another rank, and one for another kind of network."""
    model = common.add_lora(tiny[0], 4)
    model.save_pretrained(tmp_path / "adapter")
    model.unload()
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    for change in ({"r": 8}, {"target_modules": ["c_attn"]}):
        (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(config | change))
        with pytest.raises(SystemExit) as stop:
            common.add_lora(common.load(common.TINY, 32)[0], path=str(tmp_path / "adapter"))
        assert stop.value.code == 2 and "does not fit" in capsys.readouterr().err


def test_no_script_needs_what_only_unix_has():
    """Every script is imported without fcntl and resource; folders are not flushed on Windows."""
    scripts = [path.stem for path in ROOT.glob("*.py")]
    tools = [f"tools.{path.stem}" for path in (ROOT / "tools").glob("*.py")]
    code = f"""
import sys
import filelock, psutil  # they have a side for every system
sys.modules["fcntl"] = sys.modules["resource"] = None
for name in {sorted(scripts + tools)}:
    __import__(name)
import common
from tools import run_files
assert common.peak_gb() > 0.01
here = common.Path(".")
run_files.os.name, run_files.os.open = "nt", None
run_files.flush(here)"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_weights_and_biases(tmp_path, monkeypatch):
    """The package is imported only where it is asked for; it gets the lines of metrics.jsonl."""
    begun, lines, ended = [], [], []
    fake = SimpleNamespace(
        init=lambda **settings: begun.append(settings) or SimpleNamespace(
            log=lambda line, step: lines.append((step, line)), finish=lambda: ended.append(1)))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for words in ([], ["--wandb", "mine"]):
        args = distill.parse_args(["--preset", "tiny", "--out", str(tmp_path), *words])
        run = common.Run(args, distill.__file__)
        run.log(common.Timer(), loss=float("nan"), lr=0.5)
        run.close()
    assert [settings["project"] for settings in begun] == ["mine"] and ended == [1]
    assert lines[0][0] == 1 and lines[0][1]["lr"] == 0.5 and lines[0][1]["loss"] is None
