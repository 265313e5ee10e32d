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
from tools.report import read_lines

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
    (folder / "table.png").write_text("no picture either")
    (folder / "._0.png").write_bytes(b"of macOS, beside a picture")
    (folder / "sub.png").mkdir()
    return folder, rows


def test_the_readmes_lines_and_the_command_say_the_same(pictures, monkeypatch, capsys):
    """As they stand, from the repository's root: the answer solves the maze."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    code, = (text for text in re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
             if "common.load(" in text)
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
    lines = read_lines(tmp_path / "a.jsonl")
    assert [line["id"] for line in lines] == [str(folder / "0.png"), str(folder / "1.png")]
    assert all(line["answer"] == gen_data.parse("maze", line["response"]) for line in lines)
    assert rows[0].judge(lines[0]["response"])["outcome"] == "success"
    assert capsys.readouterr().out.splitlines() == [
        f"{line['id']}: {','.join(line['answer'] or ['none that could be read'])}"
        for line in lines]
    assert "a.jsonl exists: choose another" in stops(capsys, ask, *words)


def test_an_answer_that_is_cut_says_so(pictures, capsys):
    """Alone and among others; a plan that was begun is none."""
    words = ["--adapter", RUN, "--task", "maze", "--max_new_tokens", "9", "--picture"]
    ask(*words, pictures[0] / "0.png")
    assert capsys.readouterr().out.endswith(
        "\nplan: none that could be read\ncut at --max_new_tokens 9\n")
    ask(*words, pictures[0])
    said = capsys.readouterr().out.splitlines()
    assert [line.partition(": ")[2] for line in said] == 2 * [
        "none that could be read (cut at --max_new_tokens 9)"]


def test_a_question_of_ones_own(pictures, tmp_path, capsys):
    """It is asked as it stands. The bundled backbone does not know its words, and that is said."""
    row = pictures[1][0]
    question = row.ask(("size",))
    ask("--adapter", RUN, "--prompt", question, "--picture", pictures[0], "--out",
        tmp_path / "a.jsonl")
    assert {line["answer"] for line in read_lines(tmp_path / "a.jsonl")} == {"4x4"}
    assert "knows only the words of its puzzles" in capsys.readouterr().err


def test_symbols_are_asked_as_the_teacher_is(pictures, tmp_path, capsys):
    """A map in a file; its plan is executed."""
    _, (row, _) = pictures
    text = gen_data.listing(row.puzzle.cells())
    (tmp_path / "map.txt").write_text(text + "\n")
    ask("--adapter", "base", "--task", "maze", "--symbols", tmp_path / "map.txt")
    response, _, rest = capsys.readouterr().out.rpartition("\nplan: ")
    verdict = row.judge(response)
    plan = ",".join(verdict["plan"])
    assert rest == f"{plan}\nexecuted: {verdict['outcome']}\n" and plan
    args = answer.parse_args(["--adapter", "base", "--task", "maze", "--symbols",
                              str(tmp_path / "map.txt")])
    read = answer.row_of_symbols(args)
    assert read.teacher_prompt("symbols") == row.teacher_prompt("symbols")


def test_what_is_read_of_own_symbols(tmp_path):
    (tmp_path / "table.csv").write_text("\ufeffA,3\nB,5\n")
    args = answer.parse_args(["--adapter", "base", "--prompt", "Which?", "--symbols",
                              str(tmp_path / "table.csv")])
    assert answer.row_of_symbols(args).teacher_prompt("symbols") == "A,3\nB,5\n\nWhich?"


def test_prompts_are_those_of_the_data():
    for task in gen_data.TASKS:
        level = gen_data.TASKS[task].levels[0]
        row, = gen_data.sample_rows(task, level, "train", 1, seed=3)
        asked = answer.row_of(task, *gen_data.example(task))
        assert asked.student_prompt() == row.student_prompt()


def test_model_and_bits_are_the_runs(tmp_path):
    """args.json beside the adapter."""
    record = {"kind": "run", "args": {"preset": "tiny", "model": "own", "bits": 16,
                                      "lora_rank": 4, "lora_vision": 0, "max_pixels": 99}}
    (tmp_path / "adapter").mkdir()
    (tmp_path / "args.json").write_text(json.dumps(record))
    for run in (tmp_path, tmp_path / "adapter"):
        args = answer.parse_args(["--adapter", str(run), "--task", "maze", "--symbols", "x"])
        assert (args.model, args.bits, args.max_pixels) == ("own", 16, 99)
    args = answer.parse_args(["--adapter", "base", "--task", "maze", "--symbols", "x"])
    assert (args.model, args.bits, args.max_pixels) == ("tiny", 32, common.MAX_PIXELS)


def test_another_backbone_than_the_runs_is_refused(pictures, tmp_path, capsys):
    words = ["--task", "maze", "--picture", pictures[0] / "0.png", "--adapter"]
    assert "--bits 16" in stops(capsys, ask, *words, RUN, "--bits", "16")
    shutil.copytree(RUN, tmp_path / "run")
    record = json.loads(Path(RUN, "args.json").read_text())
    record["inputs"]["model"] = "0" * 16
    (tmp_path / "run/args.json").write_text(json.dumps(record))
    line = stops(capsys, ask, *words, tmp_path / "run")
    assert "--model tiny" in line


@pytest.mark.parametrize("words, message", [
    ("--adapter base --picture {}/0.png", "one of the arguments --task --prompt is required"),
    ("--adapter base --picture {}/0.png --task maze --prompt x", "not allowed with"),
    ("--adapter base --picture {}/0.png --task chess", "invalid choice: 'chess'"),
    ("--adapter base --task maze", "one of the arguments --picture --symbols is required"),
    ("--adapter base --task maze --picture {}/0.png --symbols x", "not allowed with"),
    ("--task maze --picture {}/0.png", "the following arguments are required: --adapter"),
    ("--adapter {} --task maze --picture {}/0.png", "no adapter there"),
    ("--adapter base --task maze --picture {}/9.png", "9.png: cannot be read as a picture"),
    ("--adapter base --task maze --picture {}/empty", "no picture there"),
    ("--adapter base --task maze --picture {}/notes.txt", "cannot be read as a picture"),
    ("--adapter base --task maze --symbols {}/notes.txt", "no maze that has a solution"),
    ("--adapter base --task maze --symbols {}/0.png", "0.png: UnicodeDecodeError"),
    ("--adapter base --task maze --symbols {}/9.txt", "9.txt: FileNotFoundError")])
def test_bad_input(pictures, tmp_path, capsys, words, message):
    """One line, before any weights are read."""
    folder = shutil.copytree(pictures[0], tmp_path / "pictures")
    (folder / "empty").mkdir()
    assert message in stops(capsys, ask, *words.replace("{}", str(folder)).split())
