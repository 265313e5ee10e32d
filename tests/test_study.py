"""The study: what each --target learns, the numbers of its tables, and a run that is killed."""
import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import make_rows
from test_backbones import random_checkpoint

import coldstart
import common
import distill
import evaluate
import gen_data
from tools import foreign, retention, study, study_results

ROOT = Path(__file__).parents[1]
SCRIPTS = {"gen_data.py": gen_data, "coldstart.py": coldstart, "distill.py": distill,
           "evaluate.py": evaluate}


@pytest.mark.parametrize("target", coldstart.TARGETS)
def test_supervised_tokens_of_a_target(tiny, tmp_path, target):
    """They are those of the reference text and one EOS, after the prompt that is asked."""
    model, processor = tiny
    rows, pictures = make_rows(3)
    for row, picture in zip(rows, pictures, strict=True):
        row.path = str(tmp_path / f"{row.key()}.png")
        picture.save(row.path)
    examples = coldstart.draw_examples(rows, 6, np.random.default_rng(0), 1.0, target)
    prompt, ids, mask = coldstart.encode(processor, examples, "cpu")
    for i, (row, names) in enumerate(examples):
        whole = row.response()
        wanted = {"perception": whole[:whole.index("\nRoute")], "response": whole,
                  "answer": f"<answer>{','.join(row.plan)}</answer>"}[target]
        learned = ids[i][mask[i].bool()].tolist()
        assert processor.tokenizer.decode(learned[:-1]) == wanted
        assert learned[-1] == processor.tokenizer.eos_token_id
        shown = processor.tokenizer.decode(prompt["input_ids"][i])
        question = row.ask(names) if target == "perception" else row.student_prompt()
        assert question in shown and names == (("map",) if target == "perception" else (target,))


def test_a_run_is_continued(toy_data, tmp_path):
    """--init: the adapter it begins with, and both runs' rows are remembered."""
    shared = ["--preset", "tiny", "--data", str(toy_data), "--steps", "1", "--batch", "4",
              "--max_new_tokens", "2"]
    coldstart.main(coldstart.parse_args([*shared, "--out", str(tmp_path / "a")]))
    keys = json.loads((tmp_path / "a/trained_rows.json").read_text())["rows"]
    (tmp_path / "a/trained_rows.json").write_text(json.dumps({"rows": [*keys, "f" * 16]}))
    more = ["--init", str(tmp_path / "a"), "--target", "answer", "--out", str(tmp_path / "b")]
    coldstart.main(coldstart.parse_args([*shared, *more, "--lr", "1e-12"]))
    trained = json.loads((tmp_path / "b/trained_rows.json").read_text())["rows"]
    assert set(trained) == {*keys, "f" * 16}
    from safetensors.torch import load_file
    a, b = (load_file(tmp_path / run / "adapter/adapter_model.safetensors") for run in "ab")
    assert max(float((a[name] - b[name]).abs().max()) for name in a) < 1e-9
    line = json.loads((tmp_path / "b/metrics.jsonl").read_text())
    assert {"val_loss", "val_success"} <= line.keys() and "val_map" not in line


def test_retention_is_held_out_and_deterministic():
    asked = retention.ask_symbols(14)
    assert asked == retention.ask_symbols(14) and len(asked) == 14
    assert all(picture is None and "The map in symbols" in prompt for prompt, picture, _ in asked)
    assert [a[2] for a in retention.ask_pictures(3)] == [a[2] for a in retention.ask_pictures(3)]


def test_retention_refuses_another_backbone(tiny, tmp_path, capsys):
    """Here: one whose tokenizer does not know the pictures' prompt."""
    model, processor = tiny
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    file = tmp_path / "tokenizer.json"
    file.write_text(file.read_text().replace("The picture shows a pattern", "A picture has"))
    with pytest.raises(SystemExit) as stop:
        retention.main(retention.parse_args(["--preset", "tiny", "--model", str(tmp_path),
                                             "--adapter", "base", "--count", "2"]))
    assert stop.value.code == 2 and "was not pretrained on" in capsys.readouterr().err


# ---------------------------------------------------------------- numbers

def write_answers(out, run, outcomes):
    """An evaluation from pictures, by hand. outcomes: {(task, id): (outcome, map right)}."""
    folder = out / "eval" / run / "test" / "model-image"
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text("{}")
    lines = []
    for (task, row), (outcome, right) in outcomes.items():
        lines.append({"id": row, "task": task, "level": 3, "bucket": "easy", "outcome": outcome,
                      "plan": ["U"], "optimal": outcome == "success", "map_right": right,
                      "cut": False, "tokens": 10, "trained_on": False,
                      "failure": None if outcome == "success" else
                      "planning" if right else "perception"})
    (folder / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_numbers_of_the_tables(tmp_path, monkeypatch):
    """Tasks weigh alike, then seeds; differences are paired by row and seed; the base has none."""
    ok, hole = ("success", True), ("hole", False)
    rows = [("maze", "m0"), ("maze", "m1"), ("maze", "m2"), ("maze", "m3"), ("frozenlake", "f0")]
    write_answers(tmp_path, "base", dict.fromkeys(rows, hole))
    for seed, results in enumerate(([ok, ok, ok, hole, ok], [ok, hole, hole, hole, ok])):
        write_answers(tmp_path, f"mgsd-40-{seed}-lr0.001",
                      dict(zip(rows, results, strict=True)))
    for seed, results in enumerate(([ok, ok, hole, hole, ok], [ok, hole, hole, hole, hole])):
        write_answers(tmp_path, f"sft_response-40-{seed}-lr0.001",
                      dict(zip(rows, results, strict=True)))
    runs = [("base", 40, 0, None)]
    runs += [(name, 40, seed, 1e-3) for name in ("mgsd", "sft_response") for seed in (0, 1)]
    values = study_results.read_values(tmp_path, runs)
    measures = study_results.find_measures(values, runs)
    lines = study_results.frame_of(measures)
    found = lines.set_index(["variant", "measure"]).T
    paired = study_results.frame_of(measures, "mgsd").set_index(["variant", "measure"]).T
    assert found["mgsd", "success"]["mean"] == pytest.approx((7 / 8 + 5 / 8) / 2)
    assert found["mgsd", "maze"]["mean"] == pytest.approx(1 / 2)
    assert found["mgsd", "failed: perception"]["mean"] == pytest.approx(1 / 4)
    sft = paired["sft_response", "success"]
    assert sft["mean"] == pytest.approx(-((1 / 4 + 0) / 2 + (0 + 1) / 2) / 2)
    assert sft["low"] <= sft["mean"] <= sft["high"] and sft["seeds"] == 2
    assert paired["base", "success"]["mean"] == pytest.approx(-0.75)
    assert ("mgsd", "success") not in paired
    assert "| success | 0 [0, 0] | 75" in study_results.make_table(lines)
    claims = study_results.make_claims(measures, 40)
    assert "| c | distillation adds planning |  | not run |" in claims
    low, high = (round(100 * end) for end in (-sft["high"], -sft["low"]))
    assert f"mgsd success over sft_response success: 31 [{low}, {high}] | " in claims
    assert study_results.make_claims(measures, 200).count("not run") == len(study_results.CLAIMS)
    other = {0: study_results.series({"maze": [1], "frozenlake": [1]})}
    with pytest.raises(AssertionError):  # row by row, so not with a measure of fewer rows
        study_results.subtract(measures["mgsd", 40, "success"], other)
    study.main(study.parse_args(["tables", "--out", str(tmp_path), "--lr", "0.001", "--seeds", "0",
                                 "1", "--rows", "40", "--variants", "base", "mgsd",
                                 "sft_response"]))
    for ends, word in (((1, 2), "holds"), ((-2, -1), "does not hold here"), ((-1, 1), "undecided")):
        monkeypatch.setattr(study_results, "estimate", lambda values, ends=ends: (0.0, ends))
        assert f"| {word} |" in study_results.make_claims(measures, 40)
    tables = (tmp_path / "results.md").read_text()
    assert "| seeds | 2 | 2 | 2 |\n| success | 0 [0, 0] | 75" in tables
    shutil.rmtree(tmp_path / "eval")  # what was measured elsewhere, or earlier, is in values.json
    assert study_results.read_values(tmp_path, runs) == values
    write_answers(tmp_path, "mgsd-40-0-lr0.001", {("maze", "m0"): hole})  # a part, measured anew
    file = tmp_path / "values.json"
    kept = json.loads(file.read_text())
    kept["mgsd-40-0-lr0.001"]["symbols"] = {"maze": [1]}
    file.write_text(json.dumps(kept))
    again = study_results.read_values(tmp_path, runs)["mgsd-40-0-lr0.001"]
    assert again["symbols"] == {"maze": [1]} and again["success"] == {"maze": [0]}


def test_rates_are_of_variants_with_several():
    runs = [("mgsd", 40, seed, lr) for seed in (0, 1) for lr in (1e-3, 2e-3)]
    runs += [("jsd", 40, 0, 1e-3), ("mgsd", 200, 0, 1e-3)]
    values = {study_results.name_of(*run): {"success": {"maze": [1, run[2]]}} for run in runs}
    rates = study_results.frame_of_rates(values, [run for run in runs if run[1] == 40])
    success = rates[rates["measure"] == "success"]
    assert success[["variant", "rate", "mean", "seeds"]].to_numpy().tolist() == [
        ["mgsd", 1e-3, 0.75, 2], ["mgsd", 2e-3, 0.75, 2]]
    assert study_results.make_rate_table(rates).count("| mgsd |") == 2


def test_retention_is_read_back(tmp_path):
    """One value a question, so that an interval has rows to draw from."""
    folder = tmp_path / "eval/mgsd-40-0-lr0.001/retention"
    folder.mkdir(parents=True)
    right = [True, False, False, True, True]
    (folder / "retention.json").write_text(json.dumps({"model": {"symbols": {"right": right}}}))
    values = study_results.series(
        study_results.values_of(tmp_path, "mgsd-40-0-lr0.001", "other symbols"))
    mean, (low, high) = study_results.estimate({0: values})
    assert mean == pytest.approx(0.6) and low < 0.5 and high > 0.7


def test_intervals():
    """No spread, no interval; with one seed about the normal interval of the mean."""
    same = pd.Series(1.0, pd.MultiIndex.from_product([["maze"], range(20)]))
    assert np.hstack(study_results.estimate({0: same, 1: same})) == pytest.approx([1, 1, 1])
    coins = pd.Series(np.arange(400) % 2.0, pd.MultiIndex.from_product([["maze"], range(400)]))
    mean, (low, high) = study_results.estimate({0: coins})
    assert mean == 0.5 and high - low == pytest.approx(2 * 1.96 * 0.5 / 20, rel=0.1)
    _, (low, high) = study_results.estimate({0: 0 * coins, 1: 0 * coins + 1})  # all between seeds
    assert (low, high) == pytest.approx((0, 1))


# ---------------------------------------------------------------- commands

def printed(capsys, what, *words):
    capsys.readouterr()
    study.main(study.parse_args([what, *words]))
    return capsys.readouterr().out.splitlines()


def test_the_commands(tmp_path, monkeypatch, capsys):
    """Equal steps and rows for every variant; each run once; nothing is written."""
    monkeypatch.chdir(tmp_path)
    for lines in (printed(capsys, "coldstart"), printed(capsys, "variants")):
        assert len(lines) == len(set(lines)) and not list(tmp_path.iterdir())
    trained = [line.split(" && ")[0] for line in lines if "--lr " in line]
    assert len(trained) == len(set(trained))
    assert all("--steps 60 --batch 48" in command for command in trained)
    for name, command in study.VARIANTS.items():
        if command:
            found = re.findall(rf"/runs/{name}-(\d+)-\d-lr", "\n".join(trained))
            sizes = study.TINY["rows"]
            wanted = sizes if name in study.ALL_SIZES else sizes[:1]
            assert sorted(set(map(int, found))) == sorted(wanted)


def test_the_best_of_mgsd_is_measured_in_its_line(capsys):
    """Its adapter-best has no line of its own: mgsd's must have been trained before."""
    lines = printed(capsys, "variants", "--rows", "40", "--seeds", "0", "--variants", "mgsd",
                    "mgsd_best")
    line = next(line for line in lines if "mgsd_best" in line)
    assert sum("mgsd_best" in line for line in lines) == 1 and len(lines) == 3
    assert line.startswith("python distill.py ") and "--lr 0.0005 " in line
    assert "--adapter out/study/runs/mgsd-40-0-lr0.0005/adapter-best --name model " in line


@pytest.mark.parametrize("preset", ["2b", "4b", "8b"])
def test_the_commands_of_a_real_backbone(preset, tmp_path, monkeypatch, capsys):
    """Every script reads its line; what the presets say is what is run; nothing unseen is trained.
    """
    monkeypatch.chdir(tmp_path)
    found = []
    for what in ("coldstart", "variants"):
        for line in printed(capsys, what, "--preset", preset):
            for script, words in commands_of(line):
                for flag, run in zip(words, words[1:], strict=False):
                    if flag in ("--init", "--adapter") and run not in ("none", "base"):
                        pretend_run(Path(run), preset)
                found.append((script, SCRIPTS[script].parse_args(words)))
    data = {args.out: args for script, args in found if script == "gen_data.py"}
    unseen = data[f"out/study-{preset}/data/unseen"].tasks
    for script, args in found:
        assert args.preset == preset
        if script in ("coldstart.py", "distill.py"):
            trained = data[args.data].tasks
            assert not any(set(trained[task]) & set(unseen[task]) for task in trained)
            like = distill if "-lr" in args.out else coldstart
            settings = like.SETTINGS[preset]
            assert all(getattr(args, name) == settings[name] for name in ("steps", "batch", "lr"))
    written = [args.out for script, args in found if script != "gen_data.py"]
    assert len(written) == len(set(written))
    assert "tools.retention" not in "".join(printed(capsys, "variants", "--preset", preset))


def pretend_run(folder, preset):
    """A folder that says it is a run of this preset."""
    folder.mkdir(parents=True, exist_ok=True)
    args = {"preset": preset, **common.BACKBONES[preset]}
    (folder / "args.json").write_text(json.dumps({"kind": "run", "args": args}))


def commands_of(line):
    """[(script, its words)] of a printed line, with what makes data where there are none."""
    commands = []
    for command in line.split(" && "):
        words = shlex.split(re.sub(r"^\(test -d \S+ \|\| (.*)\)$", r"\1", command))
        assert words[0] == "python"
        commands.append((words[1], words[2:]))
    return commands


@pytest.mark.slow
def test_the_study_of_a_real_backbone_runs(tmp_path, monkeypatch, capsys):
    """With a small network of random weights in its place: every line, then the tables."""
    folder = random_checkpoint(tmp_path / "checkpoint", "qwen3_vl")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(common.BACKBONES, "4b", {
        **common.BACKBONES["4b"], "model": folder, "bits": 32})
    for stage in (coldstart, distill, evaluate):
        monkeypatch.setitem(stage.SETTINGS, "4b", {**stage.SETTINGS["4b"], "max_new_tokens": 6})
    small = ["--preset", "4b", "--seeds", "0", "--steps", "2", "--coldstart_steps", "2",
             "--batch", "2", "--coldstart_batch", "2", "--test", "2", "--rows", "3",
             "--tasks", "frozenlake:3", "maze:3", "minibehaviour:5", "--unseen", "frozenlake:4"]
    for what in ("coldstart", "variants"):
        for line in printed(capsys, what, *small):
            for script, words in commands_of(line):
                SCRIPTS[script].main(SCRIPTS[script].parse_args(words))
    study.main(study.parse_args(["tables", *small]))
    results = Path("out/study-4b/results.md").read_text(encoding="utf-8")
    assert f"|  | {' | '.join(study.PAPER)} |" in results
    for measure in ("success", "symbols", "questions", "swapped", "new sizes", "pass@8"):
        cells = re.search(rf"^\| {re.escape(measure)} \|(.*)\|$", results, re.MULTILINE)[1]
        assert all(cell.strip() for cell in cells.split("|")), measure
    assert "not run" in results and "undecided" in results
    assert not list(Path("out/study-4b").glob("*.png"))  # one size, one rate


def test_foreign_references(tiny):
    """The same map and plan in another order, in words that the backbone knows."""
    _, processor = tiny
    for row in make_rows(9)[0]:
        text = foreign.foreign_response(row)
        assert row.judge(text)["optimal"] and row.judge(text)["map"] is None
        ours, theirs = (re.findall(r"row \d: .*", words) for words in (row.response(), text))
        assert theirs == ours[::-1]
        for pattern in (r"\(\d,\d\)", r"\b(?:[UDLR]|PICK|DROP)\b"):  # places, actions, in order
            found = [re.findall(pattern, words.partition("Route: ")[2])
                     for words in (row.response(), text)]
            assert len(found[1]) >= 2 and set(found[0]) == set(found[1])
        lengths = [len(processor.tokenizer(words)["input_ids"]) for words in (row.response(), text)]
        assert lengths[1] <= 1.2 * lengths[0]


def test_numbers_as_they_are_shown():
    assert study_results.show("success", 0.814, (0.77, 0.8551)) == "81 [77, 86]"
    assert study_results.show("", -0.001, (-0.004, 0.004)) == "-0.1 [-0.4, 0]"
    assert study_results.show("", 0.0, (-0.0, 0.0)) == "0 [0, 0]"
    assert study_results.show("tokens", 45.2, (44, 46)) == "45 [44, 46]"


@pytest.mark.slow
def test_killed_and_run_again(tmp_path, capsys):
    """Every printed line is killed once and run again: the same tables as without."""
    toy = ["--variants", "mgsd", "sft_response", "--seeds", "0", "--rows", "4", "--lrs", "0.001",
           "--lr", "0.001", "--steps", "3", "--coldstart_steps", "2", "--batch", "6",
           "--coldstart_batch", "6", "--test", "3"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
                   "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    for out in ("whole", "killed"):
        for what in ("coldstart", "variants"):
            for line in printed(capsys, what, *toy, "--out", out):
                line = line.replace("python gen_data", f"python {ROOT}/gen_data")
                for script in ("coldstart", "distill", "evaluate"):
                    line = line.replace(f"python {script}.py", f"python {ROOT}/{script}.py")
                options = {"shell": True, "cwd": tmp_path, "env": environment,
                           "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
                if out == "killed":
                    process = subprocess.Popen(line, start_new_session=True, **options)
                    time.sleep(20)
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGKILL)
                    process.communicate()
                done = subprocess.run(line, **options)
                assert done.returncode == 0, done.stdout
        os.chdir(tmp_path)
        study.main(study.parse_args(["tables", *toy, "--out", out]))
    values = [json.loads((tmp_path / out / "values.json").read_text())
              for out in ("whole", "killed")]
    for runs in values:
        for measured in runs.values():
            measured.pop("seconds", None)
    assert values[0] == values[1] and len(values[0]) == 2


# ---------------------------------------------------------------- docs/study.md

STUDY = ROOT / "docs/study"


def without_intervals(text):
    return re.sub(r" \[[^\]]*\]", "", text)


def test_the_committed_tables_come_again(tmp_path):
    """docs/study/results.md is made of values.json beside it, but for the ends of intervals."""
    shutil.copy(STUDY / "values.json", tmp_path)
    study.main(study.parse_args(["tables", "--out", str(tmp_path)]))
    assert {file.name for file in tmp_path.iterdir()} == {file.name for file in STUDY.iterdir()}
    made, kept = (without_intervals((folder / "results.md").read_text(encoding="utf-8"))
                  for folder in (tmp_path, STUDY))
    assert made == kept


def test_the_page_quotes_the_tables():
    """Success of docs/study.md is that of results.md, by variant and data size."""
    tables = (STUDY / "results.md").read_text(encoding="utf-8")
    page = (ROOT / "docs/study.md").read_text(encoding="utf-8")
    quoted = re.findall(r"^\| (\w+) \| (\d+) \| (\d+) \| (\d+) \|$", page, re.MULTILINE)
    assert len(quoted) == 6
    for variant, *rates in quoted:
        summaries = re.findall(rf"^\| {variant} \| 3 \| (\d+) \[", tables, re.MULTILINE)
        assert rates == summaries[:3]
