"""tools.check: every finding has a folder that shows it; where a stage refuses, so does it."""
import html
import json
import re
import shutil

import numpy as np
import pytest
from conftest import row_of, stops
from PIL import Image
from test_report import CHROMIUM, EVIL, browser  # noqa: F401

import common
import gen_data
from gen_data import OwnRow
from tools import check

ROW = {"prompt": "Which is larger? <answer></answer>", "symbols": "A,3\nB,5", "answer": "B",
       "group": "bars"}


def noise(seed, size=(64, 64)):
    """A picture like no other."""
    return Image.fromarray(np.random.default_rng(seed).integers(
        0, 255, (size[1], size[0], 3), dtype=np.uint8))


def write(folder, **splits):
    """Own rows {split: [change]}: each has its own picture and symbols where it does not say so."""
    number = 0
    for split, changes in splits.items():
        (folder / split).mkdir(parents=True, exist_ok=True)
        lines = []
        for i, change in enumerate(changes):
            number += 1
            picture = change.pop("picture", None)
            line = {"file_name": f"{i}.png", "id": f"{split}_{i}", **ROW,
                    "symbols": f"A,{number}", **change}
            if callable(picture):
                picture(folder / split / f"{i}.png")
            else:
                (picture or noise(number)).save(folder / split / f"{i}.png")
            lines.append(json.dumps(line) + "\n")
        (folder / split / "metadata.jsonl").write_text("".join(lines))
    return folder


def sound(*changes):
    """Three splits of two rows of one group, the rows of the first changed."""
    return {"train": list(changes) or [{}, {}], "val": [{}, {}], "test": [{}, {}]}


def said(capsys, folder, *words):
    """(exit code, what it printed) of the tool on a folder."""
    capsys.readouterr()
    try:
        check.main(check.parse_args([str(folder), *map(str, words)]))
        code = 0
    except SystemExit as stop:
        code = stop.code
    out = capsys.readouterr()
    assert (code == 2) == ("error: " in out.err)
    return code, out.out + out.err


def warnings(text):
    """Those about rows."""
    found = re.findall(r"^warning: (.*)$", text, re.MULTILINE)
    return [line for line in found if not line.startswith("the bundled backbone")]


def test_a_sound_folder_has_no_findings(tmp_path, capsys):
    code, text = said(capsys, write(tmp_path, **sound()))
    assert code == 0 and "6 rows that the stages take; warnings: 0" in text
    line = next(line for line in text.splitlines() if line.startswith("| train "))
    assert line.startswith("| train | bars | 2 | 2 | 64 | 64 | 4 |")


def test_generated_puzzles(toy_data, capsys):
    code, text = said(capsys, toy_data)
    assert code == 0 and "warning: " not in text
    splits = re.findall(r"^\| (\w+) \| (\w+ \d) \| (\d+) \|", text, re.MULTILINE)
    assert len(splits) == 15 and ("test", "maze 4", "4") in splits


@pytest.mark.parametrize("change, warning", [
    ({"picture": Image.new("RGB", (64, 64), "red")}, "picture of one colour"),
    ({"picture": noise(1, (1024, 1024))}, "picture of 1024x1024 px is seen as 512x512: 25% of its "
     "pixels remain under --max_pixels 262144"),
    ({"picture": noise(1, (400, 10))}, "picture of 400x10 px is seen as 224x32: stretched"),
    ({"answer": "a </think> b", "compare": "exact"}, "the answer is never right, as exact are"),
    ({"answer": ["B", "a </think> b"]}, "the answer is never right, as words are compared"),
    ({"questions": [{"question": "?", "answer": "a </think> b </think>"}]},
     "the answer to question 1 is never right"),
    ({"answer": "B " * 200}, "the right response has more tokens than --max_new_tokens 120"),
    ({"prompt": "Which? <answer></answer> A,9", "symbols": "A,9"}, "the prompt holds the symbols"),
    ({"answer": None}, "no answer: the evaluation judges nothing"),
    ({"prompt": "Which is larger?"}, "the prompt does not ask for <answer></answer>"),
    ({"answer": "\\frac{1}{2}"}, "the answer looks like LaTeX, SMILES or code, compared by words"),
    ({"answer": "c1ccccc1"}, "the answer looks like LaTeX, SMILES or code, compared by words"),
    ({"answer": "print(a)"}, "the answer looks like LaTeX, SMILES or code, compared by words"),
    ({"answer": "4"}, "the answer is a number, compared by words"),
    ({"symbols": "A,2", "answer": "C"},
     "the same symbols and prompt more than once, with other answers or symbols: "),
    ({"picture": noise(2), "symbols": "A,2"}, "the same picture and prompt more than once: "),
    ({"picture": noise(2)},
     "the same picture and prompt more than once, with other answers or symbols: "),
    ({"symbols": "A,3"}, "the same symbols and prompt in train and val: "),
    ({"symbols": "A,3", "prompt": "Why? <answer></answer>"}, "the same symbols in train and val: "),
    ({"picture": noise(5)}, "the same picture and prompt in test and train: ")])
def test_a_warning(tmp_path, capsys, change, warning):
    """Told with the row that it is about, and no reason to stop."""
    code, text = said(capsys, write(tmp_path, **sound(change, {})))
    found = [line for line in warnings(text) if line.startswith(warning)]
    assert code == 0 and len(found) == 1, text
    assert "train/metadata.jsonl, line 1" in found[0]


def test_the_pictures_of_the_teacher(tmp_path, capsys):
    """They are opened like the student's, and stand beside them on the page."""
    folder = write(tmp_path, **sound({"symbols": None, "teacher_file_name": "clean.png"}, {}))
    (folder / "train/clean.png").write_bytes(b"no picture")
    code, text = said(capsys, folder)
    assert code == 2 and "clean.png" in text
    noise(99).save(folder / "train/clean.png")
    code, text = said(capsys, folder, "--html", tmp_path / "page.html")
    assert code == 0
    [line] = [line for line in warnings(text) if line.startswith("no symbols: ")]
    assert "--teacher_reads picture" in line and "no cold start: train/metadata.jsonl" in (
        line.replace(f"{folder}/", ""))
    assert (tmp_path / "page.html").read_text().count("<img") == 7


@pytest.mark.parametrize("answer", ["Ada", "New York", "(C)", "NO", "BOSS", "3 apples", "5-7",
                                    "north-west", "A,B", "don't know", "C2", "12:30",
                                    "{A, B}", "return ticket", "A -> B", "Paris (France)"])
def test_plain_answers_are_no_code(tmp_path, answer):
    assert not list(check.check_own(OwnRow({**ROW, "id": "a", "answer": answer})))


@pytest.mark.parametrize("answer", ["x^{2}", "$x$", "\\alpha", "C(=O)O", "CC(=O)Oc1ccccc1C(=O)O",
                                    "def f(x):", "f(x)", "a == b", "for (;;) {\n}", "CC#N.[Na+]"])
def test_what_letters_matter_in(answer):
    row = {**ROW, "id": "a", "answer": answer}
    assert len(list(check.check_own(OwnRow(row)))) == 1
    assert not list(check.check_own(OwnRow({**row, "compare": "exact"})))


def test_groups(tmp_path, capsys):
    splits = sound()
    splits["test"] += [{"group": "lines"}]
    text = said(capsys, write(tmp_path, **splits))[1]
    assert "warning: in test and not in train: lines" in text
    assert "warning: a single row in test, so that evaluate.py --input swapped is refused: " \
        "lines" in text


def test_a_puzzle_that_stands_twice(toy_data, tmp_path, capsys):
    data = shutil.copytree(toy_data, tmp_path / "data")
    files = {split: data / split / "metadata.jsonl" for split in gen_data.SPLITS}
    line = files["train"].read_text().splitlines(True)[0]
    shutil.copy(data / "train" / json.loads(line)["file_name"], data / "val/copy.png")
    moved = {**json.loads(line), "file_name": "copy.png"}
    files["val"].write_text(files["val"].read_text() + json.dumps(moved) + "\n")
    code, text = said(capsys, data)
    kinds = "\n".join(warnings(text))
    assert code == 0 and kinds.count("the same ") == 1
    assert "the same picture and prompt in train and val: " in kinds


def test_other_questions_about_one_thing_are_fine(tmp_path, capsys):
    """So are several pictures of it, such as those of a class."""
    alike = {"picture": noise(1), "symbols": "A,9"}
    splits = sound(alike, {**alike, "prompt": "Why? <answer></answer>"}, {"symbols": "A,9"})
    assert not warnings(said(capsys, write(tmp_path, **splits))[1])


def test_own_rows_with_the_tiny_preset_are_told_so_at_once(tmp_path, toy_data, capsys):
    """It knows no other words. Puzzles are what it was made for."""
    sentence = "with rows of your own it tests the plumbing and no more"
    data = write(tmp_path, **sound())
    check.main(check.parse_args([str(data)]))
    assert capsys.readouterr().err.lstrip().startswith("warning: ")
    assert sentence in said(capsys, data)[1] and sentence not in said(capsys, toy_data)[1]


# ---------------------------------------------------------------- what the stages refuse

def test_all_errors_are_told(tmp_path, capsys):
    """Pictures, lengths and a missing split, each in the stages' own words; none hides another."""
    long = "word " * 5000
    splits = sound({"picture": lambda path: path.write_bytes(b"no picture")},
                   {"picture": noise(1, (2000, 4))}, {"symbols": long}, {})
    data = write(tmp_path, **splits)
    shutil.rmtree(data / "test")
    code, text = said(capsys, data)
    errors = re.findall(r"^error: (.*)$", text, re.MULTILINE)
    assert code == 2 and len(errors) == 4
    for where, words in ((f"{data}/train/0.png: ", "cannot be read as a picture"),
                         (f"{data}/train/1.png: ", "wanted at most 1:200"),
                         (f"{data}/train/metadata.jsonl, line 3: ", "exceeds the context"),
                         (f"no {data}/test/metadata.jsonl", "your_own_task.md")):
        assert any(error.startswith(where) and words in error for error in errors), where
    assert f"{data}: a stage would refuse it; errors above: 4" in text


def test_without_a_validation_split(tmp_path, capsys):
    """The stages train without one."""
    data = write(tmp_path, **sound())
    shutil.rmtree(data / "val")
    code, text = said(capsys, data)
    assert code == 0 and "warning: no validation split" in text
    assert "no validation split" not in said(capsys, data, "--splits", "test")[1]


def test_a_folder_without_a_row_that_can_be_read(tmp_path, capsys):
    code, text = said(capsys, tmp_path, "--html", tmp_path / "page.html")
    assert code == 2 and "error: no " in text and "| split" not in text


def test_the_words_are_the_stages_own(tmp_path, capsys):
    data = write(tmp_path, **sound({"answer": True}, {}))
    told = stops(capsys, gen_data.load_rows, data, "train")
    assert told in said(capsys, data)[1].splitlines()
    assert said(capsys, data, "--splits", "val", "test")[0] == 0


def test_both_rows_of_a_duplicate_are_marked():
    found = check.Findings()
    found.warn("the same symbols", "a", "b")
    assert found.of_row == {"a": ["the same symbols"], "b": ["the same symbols"]}


def test_places_are_cut_short_unless_asked_for(tmp_path, capsys):
    data = write(tmp_path, **sound(*[{"answer": str(i)} for i in range(9)]))
    line = next(line for line in warnings(said(capsys, data)[1]) if "is a number" in line)
    assert line.endswith("line 5 and 4 more")
    line = next(line for line in warnings(said(capsys, data, "--all")[1]) if "is a number" in line)
    assert line.endswith("line 9")


def test_bad_commands(tmp_path, capsys):
    for words, message in (
            ([tmp_path / "nothing"], "no such folder"),
            ([write(tmp_path, **sound()), "--model", tmp_path / "train"], "cannot be used"),
            ([tmp_path, "--splits", "all"], "invalid choice: 'all'")):
        assert message in stops(capsys, lambda words: check.main(
            check.parse_args(list(map(str, words)))), words)


def test_the_processor_needs_no_weights(tmp_path):
    """What the tool loads is what a stage loads."""
    folder = shutil.copytree(common.TINY, tmp_path / "model", ignore=lambda *_: [
        "model.safetensors", "build.py", "__pycache__"])
    images = common.load_processor(str(folder), 1024).image_processor
    assert images.size["longest_edge"] == 1024 >= images.size["shortest_edge"]


# ---------------------------------------------------------------- the page

@pytest.fixture(scope="module")
def page_file(toy_data, tmp_path_factory):
    """Puzzles and own rows in one folder, a hostile and a very high one, a broken picture."""
    folder = tmp_path_factory.mktemp("page")
    data = shutil.copytree(toy_data, folder / "data")
    splits = sound({"prompt": EVIL, "symbols": EVIL, "answer": EVIL},
                   {"picture": noise(1, (40, 3000)), "symbols": "x" * 900})
    own = write(folder / "own", **splits)
    for split in gen_data.SPLITS:
        shutil.copytree(own / split, data / split, dirs_exist_ok=True,
                        ignore=lambda *_: ["metadata.jsonl"])
        with open(data / split / "metadata.jsonl", "a") as file:
            file.write((own / split / "metadata.jsonl").read_text())
    (data / "val/0.png").write_bytes(b"no picture")
    with pytest.raises(SystemExit):
        check.main(check.parse_args([str(data), "--html", str(folder / "out/page.html"),
                                     "--limit", "2"]))
    return folder / "out/page.html"


def test_the_page_shows_every_kind_of_row(page_file):
    source = page_file.read_text(encoding="utf-8")
    page = html.unescape(source)
    assert "<script" not in source and "<img src=x" not in source and "://" not in source
    assert page.count("<article") == 3 * 6 * 2              # splits, kinds of rows, --limit
    assert source.count("<img") == 3 * 6 * 2 - 1 and page.count("cannot be read<") == 1
    assert page.count(">what the teacher reads") == 3 * 6 * 2
    data = page_file.parents[1] / "data"
    row = next(row for row in gen_data.load_rows(data, "test") if row.task == "maze")
    assert row.student_prompt() in page and row.teacher_prompt("symbols+plan") in page
    assert row.response() in page


def test_the_plan_is_drawn_on_the_picture_of_a_puzzle():
    """In units of cells, from the centre of the start to that of the goal; rings at PICK, DROP."""
    puzzle = gen_data.MiniBehaviour([".P...", "A....", ".....", "TTT..", "TTT.."])
    drawn = check.drawn_plan(row_of(puzzle, level=5))
    assert 'viewBox="0 0 5 5"' in drawn
    path, _ = gen_data.execute(puzzle, gen_data.solve(puzzle))
    points = re.search(r'points="(.*?)"', drawn)[1].split()
    assert points == [f"{pos[1] + 0.5},{pos[0] + 0.5}" for pos in path]
    assert len(re.findall(r'<circle cx="[^"]+" cy="[^"]+"', drawn)) == 2


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM, reason="no Chromium here: apt-get install chromium")
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_in_chromium(browser, page_file, width):  # noqa: F811
    page = browser.new_page(viewport={"width": width, "height": 900})
    told = []
    page.on("console", lambda message: told.append(message.text))
    page.goto(page_file.as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("[...document.images].every(image => image.naturalWidth > 0)")
    assert page.evaluate("Math.max(...[...document.querySelectorAll('article')].map("
                         "card => card.offsetHeight))") < 2500
    assert EVIL in page.locator("pre").all_inner_texts()
    assert not told
    page.close()
