"""The study: what each --target learns, the numbers of its tables, and a run that is killed."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pytest
from conftest import make_rows

import coldstart
from tools import retention, study, study_results

ROOT = Path(__file__).parents[1]
TOY = ["--arms", "mgsd", "sft_response", "--seeds", "0", "--rows", "4", "--lrs", "0.001",
       "--steps", "3", "--coldstart_steps", "2", "--batch", "6", "--test", "2", "--cores", "2"]


@pytest.mark.parametrize("target", coldstart.TARGETS)
def test_supervised_tokens_of_a_target(tiny, tmp_path, target):
    """They are those of the reference text and one end token, after the prompt that is asked."""
    model, processor = tiny
    rows, pictures = make_rows(3)
    for row, picture in zip(rows, pictures, strict=True):
        row.path = str(tmp_path / f"{row.key()}.png")
        picture.save(row.path)
    pairs = coldstart.draw_questions(rows, 6, np.random.default_rng(0), 1.0, target)
    prompt, ids, mask = coldstart.encode(processor, pairs, "cpu")
    for i, (row, names) in enumerate(pairs):
        whole = row.response()
        wanted = {"perception": whole[:whole.index("\nRoute")], "response": whole,
                  "answer": f"<answer>{','.join(row['plan'])}</answer>"}[target]
        learned = ids[i][mask[i].bool()].tolist()
        assert processor.tokenizer.decode(learned[:-1]) == wanted
        assert learned[-1] == processor.tokenizer.eos_token_id
        shown = processor.tokenizer.decode(prompt["input_ids"][i])
        question = (row.ask(names) if target == "perception"
                    else row.student_prompt())
        assert question in shown and names == (("map",) if target == "perception" else (target,))


def test_a_run_is_continued(toy_data, tmp_path):
    """--init: the adapter it begins with, and both runs' rows are remembered."""
    shared = ["--preset", "tiny", "--data", str(toy_data), "--steps", "1", "--batch", "4",
              "--max_new_tokens", "2"]
    coldstart.main(coldstart.parse_args([*shared, "--out", str(tmp_path / "a")]))
    keys = json.loads((tmp_path / "a/trained_rows.json").read_text())
    (tmp_path / "a/trained_rows.json").write_text(json.dumps([*keys, "f" * 16]))
    more = ["--init", str(tmp_path / "a"), "--target", "answer", "--out", str(tmp_path / "b")]
    coldstart.main(coldstart.parse_args([*shared, *more, "--lr", "1e-12"]))
    assert set(json.loads((tmp_path / "b/trained_rows.json").read_text())) == {*keys, "f" * 16}
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

def write_answers(out, run, outcomes, name="model"):
    """An evaluation from pictures, by hand. outcomes: {(task, id): (outcome, map right)}."""
    folder = out / "eval" / run / "test" / f"{name}-image"
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text("{}")
    lines = []
    for (task, row), (outcome, right) in outcomes.items():
        lines.append({"id": row, "task": task, "level": 3, "bucket": "easy", "outcome": outcome,
                      "plan": ["U"], "optimal": outcome == "success", "state_right": right,
                      "cut": False, "tokens": 10, "trained_on": False,
                      "failure": None if outcome == "success" else
                      "planning" if right else "perception"})
    (folder / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_numbers_of_the_tables(tmp_path):
    """Tasks weigh alike, then seeds; differences are paired by row and seed; the base has none."""
    ok, hole = ("success", True), ("hole", False)
    rows = [("maze", "m0"), ("maze", "m1"), ("maze", "m2"), ("maze", "m3"), ("frozenlake", "f0")]
    write_answers(tmp_path, "base", dict.fromkeys(rows, hole), "base")
    for seed, results in enumerate(([ok, ok, ok, hole, ok], [ok, hole, hole, hole, ok])):
        write_answers(tmp_path, f"mgsd-40-{seed}-lr0.001",
                      dict(zip(rows, results, strict=True)))
    for seed, results in enumerate(([ok, ok, hole, hole, ok], [ok, hole, hole, hole, hole])):
        write_answers(tmp_path, f"sft_response-40-{seed}-lr0.001",
                      dict(zip(rows, results, strict=True)))
    runs = [("base", 40, 0, None)]
    runs += [(arm, 40, seed, 1e-3) for arm in ("mgsd", "sft_response") for seed in (0, 1)]
    lines = study_results.collect(tmp_path, runs)
    found = {(line["arm"], line["measure"]): line for line in lines}
    assert found["mgsd", "success"]["mean"] == pytest.approx((7 / 8 + 5 / 8) / 2)
    assert found["mgsd", "maze"]["mean"] == pytest.approx(1 / 2)
    assert found["mgsd", "failed: perception"]["mean"] == pytest.approx(1 / 4)
    sft = found["sft_response", "success"]
    assert sft["difference"] == pytest.approx(-((1 / 4 + 0) / 2 + (0 + 1) / 2) / 2)
    low, high = sft["difference_ci"]
    assert low <= sft["difference"] <= high and sft["seeds"] == [0, 1] and sft["n"] == 5
    assert found["base", "success"]["difference"] == pytest.approx(-0.75)
    assert "difference" not in found["mgsd", "success"]
    assert "| success | 0 [0, 0] | 75" in study_results.make_table(lines)
    study.main(study.parse_args(["--out", str(tmp_path), "--tables", "--lrs", "0.001",
                                 "--seeds", "0", "1", "--rows", "40"]))
    assert "| seeds | 1 | 2 | 2 |\n| success | 0 [0, 0] | 75" in (
        tmp_path / "results.md").read_text()


def test_retention_is_read_back(tmp_path):
    """One value a question, so that an interval has rows to draw from."""
    folder = tmp_path / "eval/mgsd-40-0-lr0.001/retention"
    folder.mkdir(parents=True)
    right = [True, False, False, True, True]
    (folder / "retention.json").write_text(json.dumps({"model": {"symbols": {"right": right}}}))
    values = study_results.values_of(tmp_path, "mgsd-40-0-lr0.001", "other symbols")
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

def test_dry_run(tmp_path, capsys):
    """Equal steps and rows for all arms; only mgsd's kin share its rate; nothing is written."""
    study.main(study.parse_args(["--out", str(tmp_path / "study"), "--dry_run"]))
    printed = capsys.readouterr().out
    lines = [line for line in printed.splitlines() if "--lr " in line]
    assert all("--steps 60 --batch 96" in line for line in lines)
    assert len(lines) == len(set(lines)) == 4 * 3 + 10 * 3 + 3 * 2 * 3 - 4
    assert not (tmp_path / "study").exists() and "hours of one core" in printed


def test_other_settings_are_refused(tmp_path, capsys):
    args = study.parse_args(["--out", str(tmp_path)])
    job = study.Job("x", "y.py --steps 1", 1)
    assert not study.is_done(args, job)
    (tmp_path / "done").mkdir()
    (tmp_path / "done/x.json").write_text(json.dumps({"command": job.command}))
    assert study.is_done(args, job)
    with pytest.raises(SystemExit):
        study.is_done(args, job._replace(command="y.py --steps 2"))
    assert "another --out" in capsys.readouterr().err


def test_what_a_killed_study_leaves_is_stopped(tmp_path):
    """Killed at once, its command goes on alone; the next study stops it before it begins."""
    (tmp_path / "sleep.py").write_text("import time; time.sleep(100)")
    code = ("import sys; from tools import study; args = study.parse_args(['--out', sys.argv[1]])\n"
            "study.work_off(args, [[study.Job('x', f'{sys.argv[1]}/sleep.py', 1)]])")
    killed = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT)
    while not (tmp_path / "running.json").is_file():
        assert killed.poll() is None
        time.sleep(0.05)
    killed.kill()
    killed.wait()
    [[pid, created]] = json.loads((tmp_path / "running.json").read_text())
    other = tmp_path / "other.json"                       # a process that only has its number
    other.write_text(json.dumps([[pid, created - 1000]]))
    study.stop_leftovers(other)
    assert psutil.Process(pid).create_time() == created
    study.stop_leftovers(tmp_path / "running.json")
    assert not psutil.pid_exists(pid)
    study.stop_leftovers(tmp_path / "running.json")       # nothing is left: no error
    assert not list((tmp_path / "done").iterdir())


@pytest.mark.slow
def test_killed_and_run_again(tmp_path):
    """Killed in a training: what was done is not done again, and the table is the same."""
    def begin(out):
        return subprocess.Popen([sys.executable, "-m", "tools.study", *TOY, "--out", out],
                                cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    whole = begin("whole")
    printed = whole.communicate()[0]
    assert whole.returncode == 0, printed
    killed = begin("killed")
    while not list(tmp_path.glob("killed/runs/mgsd*/metrics.jsonl")):
        assert killed.poll() is None
        time.sleep(0.05)
    killed.send_signal(signal.SIGTERM)
    first = killed.communicate()[0]
    assert killed.returncode == 143, first
    done = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("killed/done/*.json")}
    assert "train-coldstart-4-0.json" in done
    again = begin("killed")
    second = again.communicate()[0]
    assert again.returncode == 0, second
    for name, written in done.items():
        assert (tmp_path / "killed/done" / name).stat().st_mtime_ns == written
        assert f"{Path(name).stem}: done" not in second
    tables = [json.loads((tmp_path / out / "results.json").read_text())["lines"]
              for out in ("whole", "killed")]
    for table in tables:
        assert {line["arm"] for line in table} == {"mgsd", "sft_response"}
        table[:] = [line for line in table if line["measure"] != "seconds"]
    assert tables[0] == tables[1]
    for plot in ("success_by_rows", "retention", "kl"):
        assert (tmp_path / f"killed/{plot}.png").is_file()
    third = begin("killed")
    assert ": done after" not in third.communicate()[0] and third.returncode == 0
