"""One picture, one answer; the README's lines of Python say the same."""
import json
import re
import shutil
from pathlib import Path

import pytest
from conftest import stops

import common
import gen_data
from tools import answer

ROOT = Path(__file__).parents[1]
RUN = str(ROOT / "docs/run/distill")


def ask(*words):
    answer.main(answer.parse_args([str(word) for word in words]))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """(folder with two mazes, their rows: the README's first)"""
    folder = tmp_path_factory.mktemp("pictures")
    rows = [next(gen_data.sample_rows("maze", 4, "test", 1, seed)) for seed in (2, 3)]
    for i, row in enumerate(rows):
        row.puzzle.render(32).save(folder / f"{i}.png")
    (folder / "notes.txt").write_text("no picture")
    return folder, rows


def test_the_readmes_lines_and_the_command_say_the_same(pictures, monkeypatch, capsys):
    """As they stand, from the repository's root: the answer solves the maze."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    code, = (text for text in re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
             if "common.sample" in text)
    assert 5 <= len(code.splitlines()) <= 7
    monkeypatch.chdir(ROOT)
    exec(code, {})
    printed = capsys.readouterr().out.strip()
    folder, (row, _) = pictures
    assert row.judge(printed)["outcome"] == "success"
    ask("--adapter", RUN, "--task", "maze", "--picture", folder / "0.png")
    plan = ",".join(gen_data.parse("maze", printed))
    assert capsys.readouterr().out == f"{printed}\nplan: {plan}\n"


def test_a_folder(pictures, tmp_path, capsys):
    """A line for each picture; the file holds the whole answers, and is not written twice."""
    folder, rows = pictures
    words = ["--adapter", RUN, "--task", "maze", "--picture", folder, "--out", tmp_path / "a.jsonl"]
    ask(*words)
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == [str(folder / "0.png"), str(folder / "1.png")]
    assert all(line["answer"] == gen_data.parse("maze", line["response"]) for line in lines)
    assert rows[0].judge(lines[0]["response"])["outcome"] == "success"
    assert capsys.readouterr().out.splitlines() == [
        f"{line['id']}: {','.join(line['answer'] or ['none that could be read'])}"
        for line in lines]
    assert "a.jsonl exists: choose another" in stops(capsys, ask, *words)


def test_symbols_are_asked_as_the_teacher_is(pictures, tmp_path, capsys):
    """A map as a text or a file; its plan is executed."""
    _, (row, _) = pictures
    text = gen_data.listing(row.puzzle.cells())
    (tmp_path / "map.txt").write_text(text + "\n")
    for symbols in (text, tmp_path / "map.txt"):
        ask("--adapter", "base", "--task", "maze", "--symbols", symbols)
        response, _, rest = capsys.readouterr().out.rpartition("\nplan: ")
        verdict = row.judge(response)
        plan = ",".join(verdict["plan"])
        assert rest == f"{plan}\nexecuted: {verdict['outcome']}\n" and plan


@pytest.mark.parametrize("source, wanted", [
    ("text", "A,3\nB,5\n\nWhich?"), ("file", "A,3\nB,5\n\nWhich?")])
def test_what_is_read_of_own_symbols(tmp_path, source, wanted):
    (tmp_path / "table.csv").write_text("\ufeffA,3\nB,5\n")
    symbols = {"text": "A,3\nB,5", "file": str(tmp_path / "table.csv")}[source]
    args = answer.parse_args(["--adapter", "base", "--prompt", "Which?", "--symbols", symbols])
    assert answer.read_symbols(args)[1] == wanted


def test_prompts_are_those_of_the_data(pictures):
    for task in gen_data.TASKS:
        level = gen_data.TASKS[task].levels[0]
        row, = gen_data.sample_rows(task, level, "train", 1, seed=3)
        assert answer.student_prompt(task) == row.student_prompt()
    row = pictures[1][0]
    args = answer.parse_args(["--adapter", "base", "--task", "maze", "--symbols", row.symbols()])
    assert answer.read_symbols(args)[1] == row.teacher_prompt("symbols")


@pytest.mark.parametrize("response, task, wanted", [
    ("<answer>U,R</answer>", "maze", ["U", "R"]), ("I go up.", "maze", None),
    ("It is <answer> 4 </answer>", None, "4"), ("So\n4", None, "4"), ("", None, None)])
def test_what_an_answer_says(response, task, wanted):
    words = ["--adapter", "base", "--picture", "x.png", "--prompt", "?"]
    args = answer.parse_args(words + (["--task", task] if task else []))
    line = {"id": "x.png", "response": response, "cut": False}
    assert answer.read_answer(args, line, None) == (wanted, None)


@pytest.mark.parametrize("flags, wanted", [
    ([], ("own", 16, 99)), (["--bits", "32"], ("own", 32, 99)),
    (["--model", "other"], ("other", 16, 99)), (["--max_pixels", "5"], ("own", 16, 5)),
    (["--preset", "2b"], ("Qwen/Qwen3-VL-2B-Instruct", 4, 512 * 512))])
def test_model_and_bits_are_the_runs(tmp_path, flags, wanted):
    """args.json beside the adapter; flags win; without a run the preset's."""
    record = {"kind": "run", "args": {"preset": "tiny", "model": "own", "bits": 16,
                                      "max_pixels": 99}}
    (tmp_path / "adapter").mkdir()
    (tmp_path / "args.json").write_text(json.dumps(record))
    for run in (tmp_path, tmp_path / "adapter"):
        args = answer.parse_args(
            ["--adapter", str(run), "--task", "maze", "--symbols", "x", *flags])
        answer.fill_in(args)
        assert (args.model, args.bits, args.max_pixels) == wanted
    args = answer.parse_args(["--adapter", "base", "--task", "maze", "--symbols", "x"])
    answer.fill_in(args)
    assert (args.model, args.bits, args.max_pixels) == ("tiny", 32, common.MAX_PIXELS)


def test_other_files_than_the_runs_are_told(tmp_path, capsys):
    record = json.loads(Path(RUN, "args.json").read_text())
    words = ["--adapter", str(tmp_path), "--task", "maze", "--symbols", "x"]
    for changed in (False, True):
        record["inputs"]["model"] = "0" * 16 if changed else record["inputs"]["model"]
        (tmp_path / "args.json").write_text(json.dumps(record))
        args = answer.parse_args(words)
        answer.fill_in(args)
        answer.check_files(args)
        assert ("other files than tiny has" in capsys.readouterr().err) == changed


@pytest.mark.parametrize("words, message", [
    ("--adapter base --picture {}/0.png", "neither --prompt nor --task"),
    ("--adapter base --picture {}/0.png --task chess", "invalid choice: 'chess'"),
    ("--adapter base --task maze", "one of the arguments --picture --symbols is required"),
    ("--adapter base --task maze --picture {}/0.png --symbols x", "not allowed with"),
    ("--task maze --picture {}/0.png", "the following arguments are required: --adapter"),
    ("--adapter {} --task maze --picture {}/0.png", "no adapter there"),
    ("--adapter base --task maze --picture {}/9.png", "9.png: no such file"),
    ("--adapter base --task maze --picture {}/empty", "no picture in this folder"),
    ("--adapter base --task maze --picture {}/notes.txt", "cannot be read as a picture"),
    ("--adapter base --task maze --symbols {}/9.txt", "9.txt: no such file"),
    ("--adapter base --task maze --symbols {}/notes.txt", "cannot be read as a map of maze"),
    ("--adapter base --task maze --symbols {}/0.png", "wanted UTF-8 text"),
    ("--adapter base --prompt Which? --symbols {}/blank", "there is no text")])
def test_bad_input(pictures, tmp_path, capsys, words, message):
    """One line, before any weights are read."""
    folder = shutil.copytree(pictures[0], tmp_path / "pictures")
    (folder / "empty").mkdir()
    (folder / "blank").write_text(" \n")
    assert message in stops(capsys, ask, *words.replace("{}", str(folder)).split())
