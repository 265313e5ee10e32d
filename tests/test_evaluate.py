"""Rates, intervals, comparisons and files against hand-made answers and hand-computed numbers."""
import json
import shutil
import signal
from dataclasses import asdict
from pathlib import Path

import numpy as np
import processes
import pytest
import torch
from conftest import adapted, row_of, stops

import common
import evaluate
import gen_data
from gen_data import FrozenLake, Maze
from tools import lenient, report

LAKE = row_of(FrozenLake(["SFF", "FHF", "FFG"]), ["D", "D", "R", "R"], id="lake", bucket="easy")
MAZE = row_of(Maze([[1 + 4 + 8, 1 + 4 + 8], [2 + 4, 2 + 8]], [0, 0], [0, 1]), ["D", "R", "U"],
              level=2, id="maze", bucket="hard")
MAP = "Map: 3x3\nrow 0: S F F\nrow 1: F H F\nrow 2: F F G"
GOOD, LONGER, EDGE, HOLE, NONE = ("<answer>D,D,R,R</answer>", "<answer>R,L,D,D,R,R</answer>",
                                  "<answer>U</answer>", "<answer>D,R</answer>", "nothing")


def judged(row, answer, text=MAP, trained=None, **line):
    line = {"id": row.id, "response": f"{text}\nRoute: so.\n{answer}", **line}
    return evaluate.verdict_of(row, line, trained=trained)


def named(row, name):
    """The same row under another id."""
    return gen_data.PuzzleRow({**row.data, "id": name})


def test_perception_or_planning_by_hand():
    """One response for each cell of the table and each kind of failure."""
    iced, moved = MAP.replace("H", "F"), MAP.replace("F F G", "F G F")
    verdicts = [judged(LAKE, answer, text) for text, answer in [
        (MAP, GOOD), (MAP, LONGER), (MAP, HOLE),        # map right: shortest, longer, failed
        (iced, GOOD), (iced, LONGER),                   # map wrong, plan good all the same
        (iced, "<answer>D,R,D,R</answer>"),             # works on the ice it saw: perception
        (iced, EDGE), (moved, "<answer>D,D</answer>"),  # fails there too: planning
        ("no map", EDGE), (MAP, NONE)]]                 # unclear; no plan at all: planning
    assert [v["failure"] for v in verdicts] == [
        None, None, "planning", None, None, "perception", "planning", "planning", "unclear",
        "planning"]
    assert evaluate.diagnose(verdicts) == {
        "right_shortest": 1, "right_longer": 1, "right_failed": 2, "wrong_shortest": 1,
        "wrong_longer": 1, "wrong_failed": 4, "perception": 1, "planning": 4, "unclear": 1}


# ---------------------------------------------------------------- numbers

def lines_by_key(verdicts):
    """The table by (task, level, bucket)."""
    return {(c["task"], c["level"], c["bucket"]): c for c in evaluate.summarise(verdicts)}


def test_rates_by_hand():
    """Lake: 2 of 3 rows succeed, 1 of them shortest; maze: 1 row, no answer, cut; then an error.

    The macro average weighs tasks, not rows; an error is a failure and stays in the denominator.
    """
    verdicts = [judged(named(LAKE, str(i)), answer, tokens=10 * i, cut=False)
                for i, answer in enumerate((GOOD, LONGER, NONE))]
    verdicts.append(judged(MAZE, "", "no map", tokens=40, cut=True))
    table = lines_by_key(verdicts)
    assert list(table) == [
        ("frozenlake", 3, None), ("frozenlake", None, None), ("maze", 2, None),
        ("maze", None, None), ("macro", None, None), ("macro", None, "easy"),
        ("macro", None, "hard")]
    lake, macro = table["frozenlake", None, None], table["macro", None, None]
    assert lake | {"n": 3, "success": 2 / 3, "optimal": 1 / 3, "parsed": 2 / 3, "map_right": 1,
                   "cut": 0, "tokens": 10, "failures": {"no answer": 1}} == lake
    assert macro | {"n": 4, "success": 1 / 3, "optimal": 1 / 6, "parsed": 1 / 3,
                    "map_right": 1 / 2, "cut": 1 / 2, "tokens": 17.5,
                    "failures": {"no answer": 2}, "trained_on": None} == macro
    assert table["macro", None, "easy"]["success"] == 2 / 3 and "pass_at_k" not in lake
    line = {"id": "e", "response": "", "error": "HTTP 500", "tokens": None}
    error = evaluate.verdict_of(MAZE, line)
    assert (error["outcome"], error["plan"], error["optimal"]) == ("error", None, False)
    assert lines_by_key([*verdicts, error])["maze", None, None] | {
        "n": 2, "success": 0, "failures": {"no answer": 1, "error": 1}, "tokens": 40,
        "cut": 1, "cut_n": 1} \
        == lines_by_key([*verdicts, error])["maze", None, None]


def test_several_samples_by_hand():
    """Two rows of two samples: one succeeds once, one never. Mean 1/4, pass@2 1/2, two rows."""
    verdicts = [judged(named(LAKE, name), answer, sample=sample) for name, sample, answer in
                (("a", 0, GOOD), ("b", 0, EDGE), ("a", 1, EDGE), ("b", 1, EDGE))]
    numbers = lines_by_key(verdicts)["macro", None, None]
    assert (numbers["n"], numbers["success"], numbers["pass_at_k"]) == (2, 0.25, 0.5)
    assert numbers["failures"] == {"edge": 3}


def test_rows_that_were_trained_on_are_told_apart():
    """Of three lakes, the run knew one, which it solves; the maze it knew too."""
    other = row_of(FrozenLake(["SFF", "FFF", "FFG"]), ["D", "D", "R", "R"], bucket="easy")
    trained = {"lake", "maze"}
    verdicts = [judged(LAKE, GOOD, trained=trained), judged(MAZE, NONE, "no map", trained=trained)]
    verdicts += [judged(named(other, name), answer, trained=trained)
                 for name, answer in (("a", GOOD), ("b", EDGE))]
    table = lines_by_key(verdicts)
    assert {key: (c["trained_on"], c["success_unseen"]) for key, c in table.items()} == {
        ("frozenlake", 3, None): (1, 0.5), ("frozenlake", None, None): (1, 0.5),
        ("maze", 2, None): (1, None), ("maze", None, None): (1, None),
        ("macro", None, None): (2, 0.5), ("macro", None, "easy"): (1, 0.5),
        ("macro", None, "hard"): (1, None)}
    unknown = lines_by_key([judged(LAKE, GOOD)])["macro", None, None]
    assert (unknown["trained_on"], unknown["success_unseen"]) == (None, None)
    none = lines_by_key([judged(LAKE, GOOD, trained=set())])["macro", None, None]
    assert (none["trained_on"], none["success_unseen"]) == (0, 1)


def answers(wins, ids=(0, 1, 2, 3)):
    """The frame of answers to these rows, a success where the id is below `wins`."""
    return evaluate.answer_frame([
        {"id": i, "task": "maze", "outcome": "success" if i < wins else "wall", "optimal": False,
         "map_right": False} for i in ids])


def test_intervals_against_theory():
    """Agresti and Coull's for a rate; the normal approximation where there are many rows."""
    low, high = evaluate.rate("x", [np.array([1.0] * 7 + [0.0] * 13)])["x_ci"]
    p, n = (7 + 2) / (20 + 4), 20 + 4             # two successes and two failures are added
    half = 1.96 * np.sqrt(p * (1 - p) / n)
    assert (low, high) == pytest.approx((p - half, p + half))
    rng = np.random.default_rng(0)
    wins = (rng.random((2, 400)) < [[0.8], [0.6]]).astype(float)
    values = wins[0] - wins[1]
    half = 1.96 * values.std() / 20               # of 400 paired differences
    assert evaluate.interval([values], -1, share=1) == pytest.approx(
        [values.mean() - half, values.mean() + half], abs=0.01)
    # Bonett and Price (2012): 1 is added to either discordant count, 2 to the rows.
    more, fewer = (values == 1).sum() + 1, (values == -1).sum() + 1
    middle = (more - fewer) / 402
    half = 1.96 * np.sqrt(((more + fewer) / 402 - middle**2) / 402)
    assert evaluate.interval([values], -1, share=1) == pytest.approx([middle - half, middle + half])
    groups = [rng.random(300), rng.random(50)]                 # the mean of two tasks' means
    half = 1.96 * np.sqrt(sum(g.var() / len(g) for g in groups)) / 2
    middle = np.mean([g.mean() for g in groups])
    assert evaluate.interval(groups) == pytest.approx([middle - half, middle + half], abs=0.02)


def test_an_interval_everywhere():
    """Where all values are equal too, with the mean inside and never of no width."""
    for value in (0.0, 0.5, 1.0):
        for sizes in ([1], [1, 1, 1], [6], [100, 3], [1000]):
            groups = [np.full(size, value) for size in sizes]
            for low, share, shift in ((0.0, 2.0, 0.0), (-1.0, 1.0, 0.5)):
                ends = evaluate.interval([2 * shift * (g - 0.5) + (1 - 2 * shift) * g
                                          for g in groups] if shift else groups, low, share=share)
                mean = (value - 0.5) * 2 * shift if shift else value
                assert low <= ends[0] <= mean <= ends[1] <= 1 and ends[1] - ends[0] > 0.001


# (what a row's value is: mean of `samples` answers, or the difference of two) for coverage
@pytest.mark.parametrize("tasks", [1, 3])
@pytest.mark.parametrize("rows", [6, 20, 100])
@pytest.mark.parametrize("p", [0.5, 0.9, 0.95, 0.999])
def test_intervals_hold_the_truth(tasks, rows, p):
    """Simulated: rates, means of 8 samples, paired differences. 95% intervals, at least 92%."""
    rng, rounds = np.random.default_rng(0), 1500
    other = max(0.0, p - 0.3)
    kinds = {"rate": (1, p, None), "samples": (8, p, None), "paired": (1, p - other, other)}
    for kind, (samples, truth, minus) in kinds.items():
        held = 0
        for _ in range(rounds):
            values = (rng.random((tasks, rows, samples)) < p).mean(2)
            if minus is None:
                low, high = evaluate.interval(list(values))
            else:
                values = values - (rng.random((tasks, rows)) < minus)
                low, high = evaluate.interval(list(values), -1.0, share=1.0)
            held += low <= truth <= high
        assert held / rounds > 0.92, kind


def test_differences_are_joined_by_id():
    """In whatever order the rows stand, over those that both answered."""
    found = evaluate.difference(answers(3), answers(1, ids=[3, 1, 0, 2]))
    assert found["maze"]["mean"] == found["macro"]["mean"] == 0.5
    both = evaluate.difference(answers(3), answers(1, ids=[2, 1]))["maze"]
    assert (both["mean"], both["n"], both["ci"][1]) == (1.0, 2, 1.0) and both["ci"][0] < 0.5


def condition_of(name):
    """A condition of a run without a dash; "mine" has no input."""
    run, _, source = name.partition("-")
    return evaluate.Condition(run, source or None, "", {}, None, {"adapter": None}, {})


def compared(verdicts, reference=None):
    return evaluate.compare({name: condition_of(name) for name in verdicts}, verdicts, reference)


def test_comparisons_by_hand():
    """base: 0 of 4 from pictures, 2 of 4 from symbols; coldstart 1 of 4: closes a half."""
    wins = {"base-image": 0, "base-text": 2, "coldstart-image": 1, "distill-image": 3, "mine": 4}
    verdicts = {name: answers(count).to_dict("records") for name, count in wins.items()}
    found = compared(verdicts)
    assert found["reference"] == "base-image"
    assert {name: gap["macro"]["mean"] for name, gap in found["gaps"].items()} == {
        "base-image": 0.5}
    assert {name: d["maze"]["mean"] for name, d in found["differences"].items()} == {
        "base-text": 0.5, "coldstart-image": 0.25, "distill-image": 0.75, "mine": 1}
    assert {name: share["macro"] for name, share in found["closed"].items()} == {
        "coldstart-image": 0.5, "distill-image": 1.5, "mine": 2}
    other = compared(verdicts, "distill-image")
    assert other["differences"]["mine"]["macro"]["mean"] == 0.25 and other["closed"] == {}
    assert compared({"mine": verdicts["mine"]})["reference"] == "mine"
    for text in (0, 1):                               # no gap, or one the other way: none is closed
        some = {"base-image": verdicts["coldstart-image"], "mine": verdicts["mine"],
                "base-text": answers(text).to_dict("records")}
        assert compared(some)["closed"]["mine"]["macro"] is None
    table = report.difference_table({name: {"run": condition_of(name).run} for name in wins}, found)
    assert table["head"] == ["difference", "maze", "macro"]
    assert table["lines"][0][0] == "base-text minus base-image"      # the gap, and said only once
    assert [line[0] for line in table["lines"]].count(table["lines"][0][0]) == 1
    assert table["lines"][3] == ["mine minus base-image", "+100 [+7, +100]", "+100 [+7, +100]"]
    assert table["lines"][-1] == ["share of the gap closed by mine", "200%", "200%"]


def test_a_gap_belongs_to_a_run_and_not_to_its_name():
    """my-image-lora and image have theirs; answers whose input is not said have none."""
    lines = {"image": answers(1).to_dict("records"), "text": answers(3).to_dict("records")}
    conditions, verdicts = {}, {}
    for run in ("my-image-lora", "image", "x-text"):
        for source in lines:
            condition = evaluate.Condition(run, source, "", {}, None, {}, {})
            conditions[condition.name], verdicts[condition.name] = condition, lines[source]
    silent = evaluate.Condition("gpt-image", None, "", {}, None, {}, {})
    conditions[silent.name], verdicts[silent.name] = silent, lines["image"]
    found = evaluate.compare(conditions, verdicts)
    assert list(found["gaps"]) == ["my-image-lora-image", "image-image", "x-text-image"]
    assert all(gap["macro"]["mean"] == 0.5 for gap in found["gaps"].values())


def test_is_there_a_gap(capsys):
    """Go, none, or how many rows would tell: with so many, at the same mean, it can be told."""
    def gap(n, mean):
        wins = round(n * abs(mean))
        values = np.array([np.sign(mean)] * wins + [0.0] * (n - wins))
        return {"mean": values.mean(), "ci": evaluate.interval([values], -1.0, share=1.0), "n": n}

    rows = [LAKE, MAZE]
    assert "+50 [+21, +70] points over 20 rows: go" in evaluate.decide(gap(20, 0.5), rows)
    assert "no gap of 10 points" in evaluate.decide(gap(200, 0.0), rows)
    assert "no gap of 10 points" in evaluate.decide(gap(100, -0.2), rows)
    for n, mean in ((5, 0.4), (10, 0.1), (20, 0.0), (6, -0.5)):
        words = evaluate.decide(gap(n, mean), rows)
        assert f"cannot be told with {n} rows" in words
        wanted = int(words.split("about ")[1].split()[0])
        assert wanted > n and f"(--limit {(wanted + 1) // 2})" in words
        assert "cannot be told" not in evaluate.decide(gap(2 * wanted, mean), rows)


def test_perception_by_hand():
    rights = {"a": (True, True), "b": (True, False), "c": (False, True)}
    answers = [{"id": name, "task": "maze", "level": level, "question": question, "right": right,
                "in_form": right or name == "b"}
               for level, (name, pair) in zip((3, 3, 4), rights.items(), strict=True)
             for question, right in zip(("size", "goal"), pair, strict=True)]
    table = evaluate.summarise_perception(answers)
    found = {(line["level"], line["question"]): (line["exact"], line["n"]) for line in table}
    assert found == {
        (None, "size"): (pytest.approx(2 / 3), 3), (None, "goal"): (pytest.approx(2 / 3), 3),
        (None, "all"): (pytest.approx(1 / 3), 3), (3, "size"): (1, 2), (3, "goal"): (0.5, 2),
        (3, "all"): (0.5, 2), (4, "size"): (0, 1), (4, "goal"): (1, 1), (4, "all"): (0, 1)}
    shown = report.perception_table({"mine": {"perception": table}})
    assert [line[:2] for line in shown["lines"]] == [
        ["maze: size", 3], ["maze: goal", 3], ["maze: all", 3], ["maze 3: all", 2],
        ["maze 4: all", 1]]
    assert [line["not_in_form"] for line in table if line["level"] is None] == [1, 0, 1]
    assert shown["lines"][0][2].endswith(", 1 not in form") and "form" not in shown["lines"][1][2]


# ---------------------------------------------------------------- files and runs

@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Four lakes and four mazes in the split test."""
    folder = tmp_path_factory.mktemp("eval") / "data"
    gen_data.main(gen_data.parse_args([
        "--preset", "tiny", "--tasks", "frozenlake:3", "maze:3", "--train", "1", "--val", "1",
        "--test", "4", "--out", str(folder)]))
    return folder


def run(*words):
    evaluate.main(evaluate.parse_args(["--preset", "tiny", *map(str, words)]))


def lines_of(file):
    return report.read_lines(file)


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes()
            for path in sorted(folder.rglob("*")) if path.is_file()}


def test_responses_from_elsewhere(data, tmp_path, capsys):
    """Two wrong, one error, and the rest is bookkeeping; no model is loaded (there is none)."""
    rows = gen_data.load_rows(data, "test")
    lines = [{"id": row.id, "response": row.response()} for row in rows]
    lines[1]["response"], lines[2]["response"] = "<answer>U,U,U,U,U,U</answer>", ""
    lines[3] |= {"response": "", "error": "HTTP 500", "tokens": {"not": "a number"}}
    lines[4]["error"] = None  # some tools say so: no error
    file, out = tmp_path / "gpt.jsonl", tmp_path / "eval"

    def write(lines):
        file.write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    write(lines[::-1])                                               # in any order
    words = ["--responses", file, "--data", data, "--out", out, "--model", "nowhere"]
    run(*words)
    found = lines_of(out / "gpt/predictions.jsonl")
    assert [v["id"] for v in found] == [row.id for row in rows]
    assert [v["outcome"] for v in found] == ["success", "edge", "no answer", "error",
                                             *["success"] * 4]
    assert found[0] | {"map": rows[0].data["state"], "plan": rows[0].plan, "optimal": True,
                       "trained_on": None, "level": 3, "bucket": rows[0].bucket} == found[0]
    summary = json.loads((out / "gpt/summary.json").read_text())
    macro = next(cell for cell in summary["table"] if cell["task"] == "macro")
    assert (summary["run"], summary["input"], macro["n"], macro["success"]) == (
        "gpt", None, 8, 0.625)
    assert "| gpt | 8 | 63 [" in capsys.readouterr().out
    run(*words, "--limit", 1, "--name", "short")      # answers to more rows than are judged
    assert len(lines_of(out / "short/predictions.jsonl")) == 2
    for broken, message in (
            (lines[:-1], "1 of 8 responses are missing; a line such as " + json.dumps(
                {"id": rows[-1].id, "response": ""}) + " makes one a failure"),
            ([{"id": rows[0].id, "answer": "U"}], "line 1: wanted an object"),
            ([*lines, lines[0]], f"'{rows[0].id}' is a duplicate"),
            ([*lines, {"id": "x", "response": ""}], "'x' is not among"),
            ([{**lines[0], "plan": "UUR"}], "\"plan\" is 'UUR'"),
            ([{**lines[0], "id": 7}], '"id" is \'7\''),
            ([{**lines[0], "picture": ["a.png"]}], "\"picture\" is"),
            ([[1]], "line 1: wanted an object")):
        write(broken)
        with pytest.raises(SystemExit) as stop:
            run(*words)
        assert stop.value.code == 2 and message in capsys.readouterr().err
    write([*lines[:-1], {"id": rows[-1].id, "response": None}])
    run(*words, "--name", "few", "--reference", "gpt")
    few = lines_of(out / "few/predictions.jsonl")
    assert len(few) == len(rows) and few[-1]["outcome"] == "no answer"
    text = (out / "results.md").read_text()
    assert "few minus gpt" in text and "| frozenlake | 4 |" in text
    assert json.loads((out / "results.json").read_text())["reference"] == "gpt"


def test_answers_of_a_model_and_of_a_file_never_share_a_name(data, tmp_path, capsys):
    """Whichever came first keeps it; so does its folder."""
    rows, file = gen_data.load_rows(data, "test"), tmp_path / "mine.jsonl"
    file.write_text("".join(json.dumps({"id": row.id, "response": ""}) + "\n" for row in rows))
    words = ["--data", data, "--out", tmp_path / "eval"]
    asked = ["--adapter", "base", "--input", "text", "--max_new_tokens", 2]
    run(*words, "--responses", file, "--input", "text")
    assert "mine-text holds answers of the file mine.jsonl" in stops(
        capsys, run, *words, *asked, "--name", "mine")
    run(*words, *asked)
    before = files(tmp_path / "eval/base-text")
    assert "base-text holds answers asked for here" in stops(
        capsys, run, *words, "--responses", file, "--name", "base", "--input", "text")
    assert files(tmp_path / "eval/base-text") == before


def test_samples_of_other_models(data, tmp_path, capsys):
    """Mean and pass@k; a row that has fewer answers than another is told."""
    rows, file = gen_data.load_rows(data, "test"), tmp_path / "many.jsonl"
    lines = [{"id": row.id, "sample": sample, "response": row.response() if i <= sample else ""}
             for i, row in enumerate(rows) for sample in range(4)]
    words = ["--responses", file, "--data", data, "--out", tmp_path / "eval"]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run(*words)                                  # rows succeed in 4, 3, 2, 1, 0, 0, 0, 0 of 4
    assert "pass@k" in capsys.readouterr().out
    summary = json.loads((tmp_path / "eval/many/summary.json").read_text())
    macro = next(cell for cell in summary["table"] if cell["task"] == "macro")
    assert (macro["n"], macro["success"], macro["pass_at_k"]) == (8, 10 / 32, 0.5)
    shuffled = [lines[i] for i in np.random.default_rng(0).permutation(len(lines))]
    file.write_text("".join(json.dumps(line) + "\n" for line in shuffled))
    before = files(tmp_path / "eval/many")["predictions.jsonl"]
    run(*words)
    assert files(tmp_path / "eval/many")["predictions.jsonl"] == before
    file.write_text("".join(json.dumps(line) + "\n" for line in lines[:-1]))
    last = json.dumps({"id": rows[-1].id, "response": "", "sample": 3})
    assert f"1 of 32 responses are missing; a line such as {last}" in stops(capsys, run, *words)


def test_one_judge_for_all(data, tmp_path, monkeypatch):
    """What judges was changed between two evaluations: the first is judged anew, from its answers.

    Perception answers too; the file that the responses came in is not needed again.
    """
    rows, out = gen_data.load_rows(data, "test"), tmp_path / "eval"
    words = ["--data", data, "--out", out]
    for name in "AB":
        (tmp_path / f"{name}.jsonl").write_text("".join(
            json.dumps({"id": row.id, "response": f"plan: {','.join(row.plan)}"}) + "\n"
            for row in rows))
    run(*words, "--adapter", "base", "--input", "image", "--perception", "--max_new_tokens", 2)
    run(*words, "--responses", tmp_path / "A.jsonl")
    assert {v["outcome"] for v in lines_of(out / "A/predictions.jsonl")} == {"no answer"}
    assert not all(v["right"] for v in lines_of(out / "base-image/perception.jsonl"))
    (tmp_path / "A.jsonl").unlink()

    def parse(task, text, cut=False):
        return text.removeprefix("plan: ").split(",")
    monkeypatch.setattr(gen_data, "parse", parse)
    monkeypatch.setattr(gen_data.Row, "score", lambda row, names, text: dict.fromkeys(names, True))
    monkeypatch.setattr(common, "load", None)
    run(*words, "--responses", tmp_path / "B.jsonl")
    for name in "AB":
        assert {v["outcome"] for v in lines_of(out / name / "predictions.jsonl")} == {"success"}
    assert all(v["right"] for v in lines_of(out / "base-image/perception.jsonl"))
    results = json.loads((out / "results.json").read_text())
    assert results["conditions"]["base-image"]["perception"][0]["exact"] == 1
    same = evaluate.compare(
        {name: condition_of(name) for name in "AB"},
        {name: lines_of(out / name / "predictions.jsonl") for name in "AB"})
    assert same["differences"]["B"]["macro"]["mean"] == 0


def test_a_share_is_over_the_rows_it_is_judged_on(tmp_path, capsys):
    """Own rows, of which some have no answer: n, how many are not judged, how many unreadable."""
    (tmp_path / "data/test").mkdir(parents=True)
    lines, said = [], []
    for i, answer in enumerate(("7", "8", "9", None, None)):
        gen_data.Image.new("RGB", (32, 32)).save(tmp_path / f"data/test/{i}.png")
        lines.append({"file_name": f"{i}.png", "id": f"r{i}", "prompt": "Number?",
                      "symbols": f"s{i}", "answer": answer})
        said.append({"id": f"r{i}", "response": "" if i == 2 else "<answer>7</answer>",
                     "cut": False})
    for file, content in (("data/test/metadata.jsonl", lines), ("mine.jsonl", said)):
        (tmp_path / file).write_text("".join(json.dumps(line) + "\n" for line in content))
    run("--data", tmp_path / "data", "--responses", tmp_path / "mine.jsonl", "--out",
        tmp_path / "eval")
    cell = json.loads((tmp_path / "eval/mine/summary.json").read_text())["table"][-1]
    assert (cell["rows"], cell["n"], cell["not_judged"], cell["success_n"], cell["cut_n"]) == (
        5, 3, 2, 3, 5)
    assert cell["success"] == 1 / 3 and cell["failures"] == {"wrong": 1, "no answer": 1}
    assert ("| condition | n | not judged | success | answer | cut | failures |\n"
            in capsys.readouterr().out)


def test_an_evaluation_lies_beside_what_it_evaluates(tmp_path, monkeypatch):
    """Of a given run; everything else in the preset's own folder."""
    monkeypatch.chdir(tmp_path)
    for words, out in (
            ([], "out/tiny/eval"), (["--adapter", "base"], "out/tiny/eval"),
            (["--adapter", "base", "out/mine/cold", "out/mine/distill"], "out/mine/eval"),
            (["--adapter", "out/mine/distill/adapter-best"], "out/mine/eval"),
            (["--adapter", "out/mine/distill/"], "out/mine/eval"),
            (["--adapter", "out/mine/distill", "--out", "here"], "here"),
            (["--responses", "x.jsonl"], "out/tiny/eval"), (["--preset", "4b"], "out/4b/eval")):
        assert Path(evaluate.parse_args(words).out) == Path(out)
    Path("docs/run/eval").mkdir(parents=True)                  # something else is there
    Path("docs/run/eval/report.html").write_text("")
    assert evaluate.parse_args(["--adapter", "docs/run/distill"]).out == "out/tiny/eval"
    Path("out/mine/distill").mkdir(parents=True)
    monkeypatch.chdir("out/mine/distill")
    assert Path(evaluate.parse_args(["--adapter", "."]).out) == tmp_path / "out/mine/eval"


def test_the_last_line_of_a_base_alone(data, tmp_path, capsys):
    """It decides and gives hours; with the bundled backbone and other data it says what it is."""
    words = ["--data", data, "--out", tmp_path / "a blank/eval", "--adapter", "base",
             "--max_new_tokens", 2]
    run(*words)
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("base, symbols minus pictures: +0 [-28, +28] points over 8 rows: cannot")
    assert "s an answer, 8 at a time" in line and "evaluation of 48 answers 0.0 h" in line
    run(*words)                                          # nothing was asked, so nothing measured
    assert "s an answer" not in capsys.readouterr().out.splitlines()[-1]
    (tmp_path / "own/test").mkdir(parents=True)
    gen_data.Image.new("RGB", (32, 32)).save(tmp_path / "own/test/a.png")
    (tmp_path / "own/test/metadata.jsonl").write_text(json.dumps(
        {"file_name": "a.png", "id": "a", "prompt": "Number?", "symbols": "s", "answer": 7}))
    run("--data", tmp_path / "own", "--out", tmp_path / "eval", "--adapter", "base",
        "--max_new_tokens", 2)
    said = capsys.readouterr().out
    assert said.splitlines()[-1].startswith("the bundled backbone knows only its own words")
    head = next(line for line in said.splitlines() if line.startswith("| condition"))
    assert not {"map", "overrun", "shortest plan"} & set(head.split(" | "))


def test_a_plan_that_another_reader_read(data, tmp_path, capsys):
    """The lenient filter adds a plan to each line; the evaluation takes it as it is."""
    rows = gen_data.load_rows(data, "test")
    words = {"U": "up", "D": "down", "L": "left", "R": "right"}
    file, read = tmp_path / "prose.jsonl", tmp_path / "read.jsonl"
    with open(file, "w") as lines:
        for row in rows:
            plan = ", ".join(words[action] for action in row.plan)
            lines.write(json.dumps({"id": row.id, "response": f"<answer>{plan}</answer>"}) + "\n")
    lenient.main(lenient.parse_args([str(file), "--data", str(data), "--out", str(read)]))
    assert "a plan was read in 8 of 8 answers" in capsys.readouterr().out
    for name, wanted in ((file, {"no answer"}), (read, {"success"})):
        run("--responses", name, "--data", data, "--out", tmp_path / "eval")
        verdicts = lines_of(tmp_path / f"eval/{name.stem}/predictions.jsonl")
        assert {v["outcome"] for v in verdicts} == wanted
    lines = [{"id": row.id, "response": row.response(), "plan": None} for row in rows]
    lines[0]["plan"] = ["U"] * 9
    read.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run("--responses", read, "--data", data, "--out", tmp_path / "eval")
    verdicts = lines_of(tmp_path / "eval/read/predictions.jsonl")
    assert [v["outcome"] for v in verdicts] == ["edge"] + ["no answer"] * 7


def test_lines_are_read_by_what_they_mean(data, tmp_path):
    """No error is null, "" or false; a response may be null, or hold half a surrogate pair."""
    rows = gen_data.load_rows(data, "test")
    lines = [{"id": row.id, "response": row.response()} for row in rows]
    for line, error in zip(lines, (None, "", False, "HTTP 500"), strict=False):
        line["error"] = error
    lines[4]["response"] = None
    lines[5] |= {"response": "\ud800" + lines[5]["response"], "model": "\udfff"}
    lines[6] |= {"plan": ["\ud83d"], "error": None}
    lines[7] |= {"cut": None, "tokens": None}
    file = tmp_path / "lines.jsonl"
    text = "".join(json.dumps(line) + "\r\n" for line in lines)
    file.write_bytes(b"\xef\xbb\xbf" + text.encode())
    run("--responses", file, "--data", data, "--out", tmp_path / "eval")
    verdicts = lines_of(tmp_path / "eval/lines/predictions.jsonl")
    assert [v["outcome"] for v in verdicts] == [
        "success", "success", "success", "error", "no answer", "success", "no such action",
        "success"]
    assert "lines" in (tmp_path / "eval/results.md").read_text()


def test_overruns_and_cut_plans():
    """What comes after the goal counts for nothing but the column; a plan that was cut is none."""
    over = GOOD.replace("</", ",U,U</")
    verdicts = [judged(named(LAKE, str(i)), answer, **more) for i, (answer, more) in enumerate([
        (GOOD, {}), (over, {}), (over, {"cut": True}), (EDGE.replace("</", ",D</"), {}),
        (over + "\nMap: 3x3", {"cut": True}), (over.replace("</answer>", ""), {"cut": True}),
        ("", {"plan": ["D", "D", "R", "R", "R"]}), (over, {"error": "HTTP 500"})])]
    assert [v["outcome"] for v in verdicts] == [
        "success", "success", "success", "edge", "no answer", "no answer", "success", "error"]
    assert [v["overrun"] for v in verdicts] == [
        False, True, True, False, False, False, True, False]
    assert all(v["optimal"] for v in verdicts if v["outcome"] == "success")
    table = evaluate.summarise(verdicts)
    assert {cell["overrun"] for cell in table} == {3}
    shown = report.macro_table({"mine": {"run": "mine", "input": None, "table": table,
                                         "asked": {}}})
    assert dict(zip(shown["head"], shown["lines"][0], strict=True))["overrun"] == 3


def test_what_is_asked(data):
    """Each row's own picture, its symbols without the plan, or another puzzle's picture."""
    rows = gen_data.load_rows(data, "test")
    for source in ("image", "text"):
        asked = evaluate.planning_questions(rows, source, rows)
        for row, question in zip(rows, asked, strict=True):
            assert question.key == {"id": row.id} and "reference plan" not in question.prompt
            assert question.picture == (row.path if source == "image" else None)
            assert (row.symbols() in question.prompt) == (source == "text")
    pictures = evaluate.other_pictures(rows, rows)
    assert sorted(pictures.values()) == sorted(row.path for row in rows)
    assert all(pictures[row.id] != row.path for row in rows)
    assert all(Path(pictures[row.id]).name.startswith(row.task) for row in rows)
    swapped = evaluate.planning_questions(rows[:2], "swapped", rows, samples=2)
    assert [question.picture for question in swapped] == [rows[1].path, rows[2].path] * 2
    again = gen_data.PuzzleRow({**rows[0].data, "id": "again"}, "copy.png")  # the same puzzle
    assert evaluate.other_pictures([again], [*rows, again]) == {"again": rows[1].path}
    with pytest.raises(SystemExit):
        evaluate.other_pictures(rows[:1], [rows[0], again, *rows[4:]])
    about = evaluate.perception_questions(rows[:1])
    assert [question.key["question"] for question in about] == list(rows[0].questions())
    assert {question.picture for question in about} == {rows[0].path}
    texts = {name: question for name, (question, _) in rows[0].questions().items()}
    for question in about:                                           # one at a time
        assert [name for name in texts if texts[name] in question.prompt] == [
            question.key["question"]]


def test_rows_are_chosen(data):
    rows = gen_data.load_rows(data, "test")

    def chosen(*words):
        return [(row.task, row.level) for row in gen_data.choose_rows(rows, *words)]
    assert chosen(None, None) == [("frozenlake", 3)] * 4 + [("maze", 3)] * 4
    assert chosen(["maze"], 2) == [("maze", 3)] * 2
    assert chosen(["frozenlake:3-4", "maze"], 1) == [("frozenlake", 3), ("maze", 3)]
    with pytest.raises(SystemExit):
        chosen(["frozenlake:4"], None)
    larger = gen_data.PuzzleRow({**rows[0].data, "level": 4})
    some = gen_data.choose_rows([*rows, larger], None, 1)            # of a size, not of a task
    assert [(row.task, row.level) for row in some] == [
        ("frozenlake", 3), ("maze", 3), ("frozenlake", 4)]


def test_conditions_stand_in_the_order_of_the_stages(tmp_path, capsys):
    """Base first, the picture before the symbols; what has another name comes after them."""
    order = ["base-image", "base-text", "base-swapped", "coldstart-image", "distill-image",
             "a-image", "a-text", "other"]
    for name in order:
        (tmp_path / name).mkdir()
        condition = condition_of(name)
        condition.rows = "others" if name == "other" else "these"
        (tmp_path / name / "summary.json").write_text(json.dumps(asdict(condition)))
    (tmp_path / "old").mkdir()
    (tmp_path / "old/summary.json").write_text(json.dumps({"rows": "these", "table": []}))
    now = condition_of("now")
    now.rows = "these"
    assert list(evaluate.find_conditions(tmp_path, [now])) == [*order[:-1], "now"]
    said = capsys.readouterr().out
    assert "other answered other rows" in said and "old is of an earlier form" in said


def test_batches_are_asked_whole(tmp_path):
    """What is left of one would be another batch, and round in another way."""
    questions = [evaluate.Question({"id": str(i)}, "", None) for i in range(5)]
    job = evaluate.Job(None, "mine", questions, {}, tmp_path / "answers.jsonl")
    job.file.write_text("".join(json.dumps({"id": str(i)}) + "\n" for i in range(3)))
    assert job.missing(2) == [questions[2:4], questions[4:]]


def test_a_question_is_its_prompt_and_its_picture(tmp_path):
    """By their contents: another prompt or another byte of the picture is another question."""
    def digest(prompt, content, name="a.png"):
        (tmp_path / name).write_bytes(content)
        return evaluate.digest_questions([
            evaluate.Question({"id": "a"}, prompt, str(tmp_path / name))])
    assert digest("x", b"1") == digest("x", b"1", "b.png")
    assert len({digest("x", b"1"), digest("y", b"1"), digest("x", b"2")}) == 3


@pytest.mark.parametrize("words, message", [
    (["--samples", "2"], "need a --temperature above 0"),
    (["--limit", "0"], "--limit: got '0', must be a whole number, at least 1"),
    (["--temperature", "nan"], "--temperature: got 'nan', must be a number, at least 0"),
    (["--name", "../up", "--responses", "x"], "it names a folder"),
    (["--responses", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
    (["--responses", "deep.jsonl"], "deep.jsonl, line 1: not JSON"),
    (["--adapter", "nowhere"], "--adapter nowhere: no adapter there"),
    (["--model", "mine", "--adapter", "base"], "--model mine: "),
    (["--tasks", "chess"], "unknown task 'chess'"),
    (["--out", "mine"], "mine holds notes.txt and is not the folder of an evaluation"),
])
def test_bad_flags(data, tmp_path, monkeypatch, words, message, capsys):
    monkeypatch.chdir(tmp_path)
    Path("mine").mkdir()
    Path("mine/notes.txt").write_text("mine")
    Path("deep.jsonl").write_text("[" * 100_000)
    before = files(tmp_path)
    assert message in stops(capsys, run, *words, "--data", data)
    lock = Path("out/tiny/eval/.lock")                    # all that a refused command may leave
    assert files(tmp_path) == before | ({str(lock): b""} if lock.is_file() else {})


def answer_file(folder, kind="predictions"):
    """The one file of answers of a condition."""
    file, = folder.glob(f"answers/{kind}-*.jsonl")
    return file


def test_a_killed_run_resumes_to_the_same_bytes(data, tmp_path, monkeypatch):
    """Sampled answers, two per row, batches of 3; killed in the middle, half a line left behind."""
    words = ["--data", data, "--temperature", 1, "--samples", 2, "--rollout_batch", 3,
             "--max_new_tokens", 8, "--input", "image", "--tasks", "frozenlake", "--out", "eval"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    monkeypatch.chdir(whole)
    run(*words)
    dying = """
real, calls = common.sample, []
def sample(*words):
    calls.append(1)
    return real(*words) if len(calls) < 3 else os.kill(os.getpid(), 9)
common.sample = sample"""
    killed = processes.run(broken, "evaluate", *words, patch=dying)
    assert killed.code == -signal.SIGKILL, killed.err
    file = answer_file(broken / "eval/base-image")
    assert file.read_bytes().count(b"\n") == 6 and not (broken / "eval/results.md").exists()
    with open(file, "a") as out:
        out.write('{"id": "test_fro')
    for left in broken.glob(".*-0"):
        left.unlink()
    monkeypatch.chdir(broken)
    run(*words)
    assert files(whole) == files(broken)
    predictions = lines_of(broken / "eval/base-image/predictions.jsonl")
    lakes = [row.id for row in gen_data.load_rows(data, "test")][:4]
    assert [(v["sample"], v["id"]) for v in predictions] == [(k, i) for k in (0, 1) for i in lakes]
    assert len({v["response"] for v in predictions}) > 2
    assert "pass@k" in (broken / "eval/results.md").read_text()
    with monkeypatch.context() as patch:                 # finished: nothing is asked or changed
        patch.setattr("common.load", None)
        run(*words)
    assert files(whole) == files(broken)
    run(*words, "--rollout_batch", 8)                    # another batch: the same answers
    again = lines_of(broken / "eval/base-image/predictions.jsonl")
    assert [v["response"] for v in again] == [v["response"] for v in predictions]


def test_no_answer_is_ever_lost(data, tmp_path, monkeypatch, capsys):
    """Greedy, T=1, a failure, greedy again: every way of asking keeps its answers."""
    out = tmp_path / "eval"
    words = ["--data", data, "--out", out, "--input", "text", "--tasks", "maze", "--max_new_tokens",
             3]
    run(*words)
    greedy = files(out)
    with pytest.raises(SystemExit):                       # a wrong model changes nothing
        run(*words, "--model", data)
    assert files(out) == greedy
    run(*words, "--temperature", 1)
    with monkeypatch.context() as patch:                  # a library was upgraded
        patch.setattr(common, "versions", lambda: {"torch": "next"})
        run(*words)
    assert len(list(out.glob("base-text/answers/*.jsonl"))) == 3
    for name, content in greedy.items():
        if "answers/" in name:
            assert files(out)[name] == content
    with monkeypatch.context() as patch:                  # another prompt
        patch.setattr(gen_data, "SYMBOLS", "In symbols:")
        run(*words)
    assert len(list(out.glob("base-text/answers/*.jsonl"))) == 4
    with monkeypatch.context() as patch:
        patch.setattr("common.load", None)                # back to greedy: nothing is asked again
        run(*words, "--seed", 5)                          # which draws nothing here
    assert files(out)["base-text/predictions.jsonl"] == greedy["base-text/predictions.jsonl"]
    capsys.readouterr()
    run(*words, "--temperature", 1, "--name", "warm")
    said = capsys.readouterr().out
    assert "The conditions differ in temperature: base-text: 0.0; warm-text: 1.0" in said
    assert "differ in seed" not in said and "differ in model" not in said
    assert "differ in temperature" in (out / "results.md").read_text()


def test_what_an_adapter_or_model_is_made_of_counts(data, tmp_path):
    """lora_alpha or the chat template changed: the old answers are not shown as new."""
    model = shutil.copytree(common.TINY, tmp_path / "model",
                            ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    adapted(common.load(common.TINY, 32)[0]).save_pretrained(tmp_path / "mine")
    words = ["--data", data, "--out", tmp_path / "eval", "--input", "text", "--tasks", "maze",
             "--max_new_tokens", 3, "--model", model, "--adapter", tmp_path / "mine"]
    run(*words)
    for file, old, new in ((tmp_path / "mine/adapter_config.json", '"lora_alpha": 8',
                            '"lora_alpha": 9'),
                           (model / "chat_template.jinja", "user", "user ")):
        text = file.read_text()
        assert old in text or file.suffix == ".jinja"
        file.write_text(text.replace(old, new) + ("" if old in text else "\n"))
        run(*words)
    assert len(list((tmp_path / "eval/mine-text/answers").glob("*.jsonl"))) == 3


def test_a_second_evaluation_in_the_folder_is_refused(data, tmp_path, capsys):
    run("--data", data, "--out", tmp_path, "--input", "text", "--limit", 1, "--max_new_tokens", 2)
    lock = gen_data.lock_folder(tmp_path)
    with pytest.raises(SystemExit):
        run("--data", data, "--out", tmp_path, "--limit", 1)
    assert "another process is writing" in capsys.readouterr().err
    lock.release()


def test_draws_depend_on_the_row_and_not_on_its_batch(data, tiny):
    """The same rows in batches of 8, of 3, and in another order: the same sampled answers."""
    rows = gen_data.load_rows(data, "test")[:4]
    asked = evaluate.planning_questions(rows, "image", rows, samples=2)

    def answers(asked, size, condition="a", temperature=1.0, seed=0):
        settings = {"max_new_tokens": 6, "temperature": temperature, "seed": seed}
        lines = []
        for i in range(0, len(asked), size):
            lines += evaluate.answer_batch(*tiny, asked[i:i + size], settings, condition)
        return {evaluate.label(line): line for line in lines}
    whole = answers(asked, 8)
    assert whole == answers(asked, 3) == answers(asked[::-1], 8)
    assert whole != answers(asked, 8, "b")                           # another condition
    texts = [[whole[row.id, sample, None]["response"] for row in rows] for sample in (0, 1)]
    assert texts[0] != texts[1]                                      # every sample its own numbers
    assert answers(asked, 8, temperature=1e-4) == answers(asked, 8, temperature=0) != whole
    assert whole != answers(asked, 8, seed=1)


def test_cut_and_length_are_those_of_the_tokens(data, tmp_path, monkeypatch):
    """The EOS counts as a token, and only what has none was cut."""
    def sample(model, processor, prompt, max_new_tokens, *_):
        word, = processor.tokenizer("U", add_special_tokens=False)["input_ids"]
        end = processor.tokenizer.eos_token_id
        ids = torch.tensor([[word, word, end], [word, end, 0], [word] * 3, [end, 0, 0]])   # [4, 3]
        return ids, torch.tensor([[1, 1, 1], [1, 1, 0], [1, 1, 1], [1, 0, 0]]), None
    monkeypatch.setattr(common, "sample", sample)
    run("--data", data, "--out", tmp_path, "--input", "text", "--tasks", "maze")
    found = [(v["response"], v["tokens"], v["cut"])
             for v in lines_of(tmp_path / "base-text/predictions.jsonl")]
    assert found == [("UU", 3, False), ("U", 2, False), ("UUU", 3, True), ("", 1, False)]


def test_a_run_with_an_adapter(data, tmp_path, monkeypatch, capsys):
    """What the model is given for each condition, and the rows that its run was trained on."""
    rows = gen_data.load_rows(data, "test")
    adapted(common.load(common.TINY, 32)[0], std=1).save_pretrained(tmp_path / "mine/adapter")
    (tmp_path / "mine/trained_rows.json").write_text("[")
    assert "cannot read" in stops(capsys, run, "--data", data, "--out", tmp_path / "eval",
                                  "--adapter", tmp_path / "mine")
    assert not files(tmp_path / "eval").keys() - {".lock"}             # before the first answer
    (tmp_path / "mine/trained_rows.json").write_text(json.dumps({"rows": [rows[0].key()]}))
    given, encode = [], common.encode

    def spy(processor, prompts, images, device):
        if len(prompts) > 1:  # not what `load` knows a network by
            given.append((prompts, [image and image.tobytes() for image in images]))
        return encode(processor, prompts, images, device)
    monkeypatch.setattr(common, "encode", spy)
    out = tmp_path / "eval"
    words = ["--data", data, "--limit", 2, "--max_new_tokens", 3, "--temperature", 0.01]
    run(*words, "--out", tmp_path / "alone", "--adapter", "base", "--input", "text")
    given.clear()
    words += ["--out", out, "--adapter", tmp_path / "mine", "base"]
    run(*words, "--perception")
    own = [gen_data.open_picture(row.path).tobytes() for row in rows]
    some = [rows[i] for i in (0, 1, 4, 5)]
    for prompts, images in (given[0], given[-1 - 2]):                # mine-image, base-image
        assert prompts == [row.student_prompt() for row in some]
        assert images == [own[i] for i in (0, 1, 4, 5)]
    assert given[-1][0] == [row.teacher_prompt("symbols") for row in some]
    assert given[-1][1] == [None] * 4
    said = capsys.readouterr().out
    assert "mine: 1 of 4 rows were seen in training\n" in said
    verdicts, texts = lines_of(out / "mine-image/predictions.jsonl"), {}
    assert [v["trained_on"] for v in verdicts] == [True, False, False, False]
    text = (out / "results.md").read_text()
    seen = "| macro | 0 of 4 | 0 of 4 | 1 of 4; 0% without | 1 of 4; 0% without |"
    assert "## Rows seen in training" in text and seen in text
    perception = lines_of(out / "mine-image/perception.jsonl")
    record = Path(f"{answer_file(out / 'mine-image', 'perception')}.settings.json")
    settings = json.loads(record.read_text())
    assert settings | {"temperature": 0, "seed": None} == settings   # perception is asked greedily
    assert len(perception) == sum(len(row.questions()) for row in some)
    assert "| maze: all | 2 | 0 [" in text.split("## Perception questions")[1]
    for folder in ("eval/base", "eval/mine", "alone/base"):
        lines = lines_of(tmp_path / f"{folder}-text/predictions.jsonl")
        texts[folder] = [v["response"] for v in lines]
    assert texts["eval/mine"] != texts["eval/base"] == texts["alone/base"]   # it is off again
    given.clear()
    run(*words, "--input", "swapped")
    assert given[0][1] == [own[i] for i in (1, 2, 5, 6)]             # the next of the same size
    assert (out / "mine-swapped").is_dir() and "base-image" in (out / "results.md").read_text()


def test_a_run_brings_its_model_and_every_condition_has_a_name(data, tmp_path, monkeypatch, capsys):
    """Model and bits are those of the run; two runs of one name, or --name for base."""
    monkeypatch.chdir(tmp_path)
    model = gen_data.digest(common.digest_folder(common.TINY))
    record = {"kind": "run", "inputs": {"model": model},
              "args": {"preset": "tiny", "model": "tiny", "bits": 16, "lora_rank": 4,
                       "lora_vision": 1}}
    for name in ("a/run", "b/run", "c/other"):
        adapted(common.load(common.TINY, 32)[0]).save_pretrained(f"{name}/adapter")
        Path(name, "args.json").write_text(json.dumps(record))
    record["args"]["bits"] = 32
    Path("c/other/args.json").write_text(json.dumps(record))
    assert evaluate.parse_args(["--adapter", "a/run/"]).bits == 16
    for words, message in ((["--adapter", "a/run", "b/run"], "two runs are called 'run'"),
                           (["--adapter", "a/run", "c/other"], "--bits 16: "),
                           (["--adapter", "a/run", "--bits", 32], "--bits 32: "),
                           (["--adapter", "a/run", "--preset", "4b"], "has --preset tiny")):
        with pytest.raises(SystemExit):
            evaluate.main(evaluate.parse_args([*map(str, words), "--data", str(data)]))
        assert message in capsys.readouterr().err
    monkeypatch.chdir("a/run")
    found = evaluate.find_adapters(evaluate.parse_args(["--adapter", "."]))
    assert list(found) == ["run"]
    found = evaluate.find_adapters(evaluate.parse_args(["--adapter", "base", "--name", "merged"]))
    assert found == {"merged": None}


def test_out_of_memory_is_one_line(data, tmp_path, monkeypatch, capsys):
    """What was answered before it is kept; a lower --rollout_batch goes on."""
    real, calls = common.sample, []

    def sample(*words):
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(*words)
    monkeypatch.setattr(common, "sample", sample)
    words = ["--data", data, "--out", tmp_path, "--tasks", "maze", "--input", "text",
             "--max_new_tokens", 3]
    with pytest.raises(SystemExit) as stop:
        common.run_script(lambda: None, lambda _: run(*words, "--rollout_batch", 3))
    assert stop.value.code == 2 and "--rollout_batch" in capsys.readouterr().err
    run(*words, "--rollout_batch", 1)
    assert len(calls) == 3 and len(lines_of(tmp_path / "base-text/predictions.jsonl")) == 4


def test_answers_that_are_there_are_never_written_again(tmp_path):
    """Half a line is cut off where it begins; no moment at which the others are not on the disk."""
    file = tmp_path / "answers.jsonl"
    whole = b'{"id": "a", "response": ""}\n{"id": "b", "response": "", "error": "x"}\n'
    file.write_bytes(whole + b'{"id": "c", "resp')
    before = file.stat().st_ino, file.read_bytes()
    assert list(evaluate.read_answers(file)) == [("a", None, None)]
    assert (file.stat().st_ino, file.read_bytes()) == before         # reading changes nothing
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "write_bytes", None)
        evaluate.append_answers(file).close()
    assert file.read_bytes() == whole


def test_perception_answers_are_those_of_the_summary(data, tmp_path):
    """Without --perception none of an earlier command's stay beside the new summary."""
    words = ["--data", data, "--out", tmp_path, "--input", "image", "--limit", 1,
             "--max_new_tokens", 2]
    folder = tmp_path / "base-image"
    run(*words, "--perception")
    first = files(folder)
    assert lines_of(folder / "perception.jsonl")
    assert json.loads(first["summary.json"])["perception"]
    run(*words)
    assert json.loads((folder / "summary.json").read_text())["perception"] == []
    assert lines_of(folder / "perception.jsonl") == []
    with pytest.MonkeyPatch.context() as patch:                      # nothing is asked again
        patch.setattr("common.load", None)
        run(*words, "--perception")
    assert files(folder)["perception.jsonl"] == first["perception.jsonl"]


def test_a_models_files_count_and_not_its_name(data, tmp_path, monkeypatch):
    """A copy of the model under another name asks nothing again."""
    words = ["--data", data, "--out", tmp_path / "eval", "--adapter", "base", "--input", "text",
             "--limit", 1, "--max_new_tokens", 2]
    run(*words)
    shutil.copytree(common.TINY, tmp_path / "moved")
    monkeypatch.setattr("common.load", None)
    run(*words, "--model", tmp_path / "moved", "--bits", 32)


def test_a_hubs_model(data, tmp_path, monkeypatch, capsys):
    """It is downloaded first: only then can its files be compared with those of a run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: common.TINY)
    adapted(common.load(common.TINY, 32)[0]).save_pretrained("mine/adapter")
    record = {"kind": "run", "args": {"preset": "tiny", "model": "org/model", "bits": 32,
                                      "lora_rank": 4, "lora_vision": 1}}
    words = ["--data", data, "--adapter", "mine", "--input", "text", "--limit", 1,
             "--max_new_tokens", 2, "--out", "eval"]
    other, own = "0" * 16, gen_data.digest(common.digest_folder(common.TINY))
    Path("mine/args.json").write_text(json.dumps(record | {"inputs": {"model": other}}))
    assert "--model org/model: " in stops(capsys, run, *words)
    assert not Path("eval/mine-text").exists()
    Path("mine/args.json").write_text(json.dumps(record | {"inputs": {"model": own}}))
    run(*words)
    monkeypatch.setattr(common, "load", None)                        # as the second command does
    run(*words)


def test_adapters_are_told_by_their_place(data, tmp_path, monkeypatch, capsys):
    """A folder called as the bundled backbone is; a run that is called base."""
    monkeypatch.chdir(tmp_path)
    adapted(common.load(common.TINY, 32)[0]).save_pretrained("tiny")
    shutil.copytree("tiny", "base/adapter")
    found = evaluate.find_adapters(evaluate.parse_args(["--adapter", "tiny"]))
    assert common.digest_folder(found["tiny"]).keys() == {
        "adapter_config.json", "adapter_model.safetensors"}
    args = evaluate.parse_args(["--adapter", "base", "./base"])
    assert "base is the model without adapters" in stops(capsys, evaluate.find_adapters, args)
