"""Own rows: a user's pictures and symbols go through the same two stages and the evaluation."""
import importlib.util
import inspect
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from bench_distill import qwen_checkpoint
from conftest import stops
from PIL import Image

import coldstart
import common
import distill
import evaluate
import gen_data
from gen_data import ASK_SYMBOLS, OwnRow
from tools import charts

ROW = {"file_name": "a.png", "id": "a", "prompt": "Which is larger?", "symbols": "A,3\nB,5"}
HINT = "The answer is B; do not mention it."


def make_charts(out):
    words = ["--out", str(out), "--train", "24", "--val", "8", "--test", "8"]
    charts.main(charts.parse_args(words))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """40 charts, and a puzzle in the same files of every split."""
    folder = tmp_path_factory.mktemp("own")
    make_charts(folder / "charts")
    words = "--preset tiny --tasks frozenlake:3 --train 3 --val 3 --test 3".split()
    gen_data.main(gen_data.parse_args([*words, "--out", str(folder / "puzzles")]))
    shutil.copytree(folder / "charts", folder / "mixed")
    for split in gen_data.SPLITS:
        for file in (folder / "puzzles" / split).glob("*.png"):
            shutil.copy(file, folder / "mixed" / split)
        with open(folder / "mixed" / split / "metadata.jsonl", "a") as file:
            file.write((folder / "puzzles" / split / "metadata.jsonl").read_text())
    return folder


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """A folder: Qwen's tokenizer, with its template where the package trl is, and random weights.

    trl's file carries what Qwen3-VL's chat_template.jinja says; it is not ours to copy.
    """
    folder = qwen_checkpoint(tmp_path_factory.mktemp("qwen"), hidden=64, layers=2)
    if trl := importlib.util.find_spec("trl"):
        template = Path(trl.submodule_search_locations[0], "chat_templates/qwen3_vl.jinja")
        shutil.copy(template, folder / "chat_template.jinja")
    return str(folder)


def write(tmp_path, color="white", **splits):
    """A data folder with these rows of each split, and a picture for all of them."""
    for split, rows in splits.items():
        (tmp_path / split).mkdir(exist_ok=True, parents=True)
        Image.new("RGB", (64, 64), color).save(tmp_path / split / "a.png")
        lines = [json.dumps(row) + "\n" for row in rows]
        (tmp_path / split / "metadata.jsonl").write_text("".join(lines))
    return str(tmp_path)


def run_all(data, out, model, steps):
    """Both stages and the evaluation of what comes out -> results.json and the page."""
    shared = ["--preset", "tiny", "--model", model, "--data", str(data)]
    toy = [*shared, "--steps", str(steps), "--batch", "4", "--micro_batch", "2", "--lr", "0.01"]
    coldstart.main(coldstart.parse_args(
        [*toy, "--max_new_tokens", "4", "--out", str(out / "coldstart")]))
    distill.main(distill.parse_args(
        [*toy, "--max_new_tokens", "8", "--init", str(out / "coldstart"),
         "--out", str(out / "distill")]))
    evaluate.main(evaluate.parse_args(
        [*shared, "--max_new_tokens", "8", "--adapter", str(out / "distill"),
         "--out", str(out / "eval")]))
    return (json.loads((out / "eval/results.json").read_text()),
            (out / "eval/report.html").read_text())


def metrics(out, stage):
    return [json.loads(line) for line in (out / stage / "metrics.jsonl").read_text().splitlines()]


def test_forty_charts_on_qwens_tokenizer(folder, qwen, tmp_path):
    results, page = run_all(folder / "charts", tmp_path, qwen, 4)
    lines = metrics(tmp_path, "coldstart")
    assert lines[-1]["loss"] < lines[0]["loss"] and "val_map" not in lines[-1]
    assert lines[-1]["val_questions"] is not None
    lines = metrics(tmp_path, "distill")
    assert len(lines) == 4 and lines[-1]["optimal"] is None and lines[-1]["success"] == 0
    assert list(results["conditions"]) == ["distill-image", "distill-text"]
    table = results["conditions"]["distill-image"]["table"]
    groups = {row.task: None for row in gen_data.load_rows(folder / "charts", "test")}
    assert [line["task"] for line in table] == [*groups, "macro"]
    macro = table[-1]
    assert macro["n"] == 8 and macro["trained_on"] == 0 and macro["success"] is not None
    assert macro["optimal"] is None and macro["map_right"] is None
    assert not any(results["conditions"]["distill-image"]["diagnosis"].values())
    text = (tmp_path / "eval/results.md").read_text()
    assert "| distill-image | " in text and "Perception or planning" not in text
    assert "label,A,B" in page and "gaps" in results


def test_charts_and_puzzles_in_one_folder(folder, tmp_path):
    results, page = run_all(folder / "mixed", tmp_path, common.TINY, 2)
    table = {line["task"]: line for line in results["conditions"]["distill-text"]["table"]
             if line["level"] is None and line["bucket"] is None}
    lake, macro = table["frozenlake"], table["macro"]
    assert lake["n"] == 3 and macro["n"] == 11
    assert macro["optimal"] == lake["optimal"] and macro["map_right"] == lake["map_right"]
    successes = [line["success"] for name, line in table.items() if name != "macro"]
    assert macro["success"] == pytest.approx(sum(successes) / len(successes))
    kinds = results["conditions"]["distill-text"]["diagnosis"]
    assert sum(number for name, number in kinds.items() if "_" in name) == 3
    assert '"cells"' in page and "label,A,B" in page


def test_a_row_is_what_the_student_sees_and_reads(tmp_path):
    """Pictures of one class have the same symbols, and are different rows."""
    def key(color="white", size=(64, 64), name="a.png", **more):
        Image.new("RGB", size, color).save(tmp_path / name)
        return OwnRow({**ROW, **more}, str(tmp_path / name)).key()
    assert key() == key(symbols="A,3", hint=HINT, id="b", answer="B", name="copy.bmp")
    others = [key(), key("red"), key(size=(32, 128)), key(prompt="Which is smaller?")]
    assert len(set(others)) == 4


def test_the_rows_that_the_docs_write_from_a_folder_of_pictures(tmp_path, monkeypatch):
    """The ten lines of docs/your_own_task.md, as they stand."""
    text = Path(gen_data.__file__).with_name("docs").joinpath("your_own_task.md").read_text()
    code = text.split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    Path("pictures").mkdir()
    for i in range(10):
        Image.new("RGB", (9, 9)).save(f"pictures/{i}.png")
        content = {"table": {"A": i}, "question": "What is A?", "answer": i}
        Path(f"pictures/{i}.json").write_text(json.dumps(content))
    exec(code, {})
    rows = {split: gen_data.load_rows("data/mine", split) for split in gen_data.SPLITS}
    assert {split: len(some) for split, some in rows.items()} == {"train": 6, "val": 2, "test": 2}
    assert rows["test"][1].symbols() == '{"A": 5}'
    assert rows["test"][1].judge("The answer is **5**.")["outcome"] == "success"


def test_what_a_teacher_at_the_picture_reads():
    row = OwnRow({**ROW, "hint": HINT})
    assert row.teacher_prompt("picture") == row.student_prompt() == ROW["prompt"]


def test_what_student_and_teacher_read(tmp_path, qwen, monkeypatch):
    """On Qwen's tokenizer: the tokens of both prompts, word for word, whatever the script."""
    hinted = {**ROW, "hint": HINT, "answer": "B",
              "questions": [{"question": "What is A?", "answer": "3"}]}
    data = write(tmp_path, train=[hinted], val=[{**hinted, "id": "b"}],
                 test=[{**hinted, "id": "c"}])
    rows, asked = gen_data.load_rows(data, "train"), []
    _, processor = common.load(qwen, 32)
    encode = common.encode

    def recorded(processor, prompts, images=None, device="cpu"):
        batch = encode(processor, prompts, images, device)
        asked.append((processor.tokenizer.batch_decode(batch["input_ids"]), batch))
        return batch
    monkeypatch.setattr(common, "encode", recorded)
    start, end = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"

    def read(prompt):
        """The user's turn of a recorded prompt, pictures as [picture]."""
        text = prompt.replace("<|image_pad|>", "")
        assert text.count(start) == 1 and text.endswith(end)
        turn = text.split(start)[1].removesuffix(end)
        return turn.replace("<|vision_start|><|vision_end|>", "[picture]")

    distill.encode_roles(processor, rows, "symbols+plan", "cpu")
    distill.encode_roles(processor, rows, "symbols", "cpu")
    turns = [read(texts[0]) for texts, _ in asked]
    bare = f"[picture]{ROW['prompt']}"
    assert turns == [bare, f"{ROW['symbols']}\n\n{HINT}\n\n{ROW['prompt']}",
                     bare, f"{ROW['symbols']}\n\n{ROW['prompt']}"]
    for i, (_, batch) in enumerate(asked):
        assert ("pixel_values" in batch) == (i in (0, 2))
    asked.clear()
    rows[0].teacher_path = rows[0].path  # and now with a picture for the teacher
    for reads, turn in (("symbols", f"[picture]{ROW['symbols']}\n\n{ROW['prompt']}"),
                        ("picture", bare)):
        distill.encode_roles(processor, rows, reads, "cpu")
        assert read(asked[-1][0][0]) == turn
    rows[0].teacher_path = None
    asked.clear()
    coldstart.encode(processor, [(rows[0], ("question 1",))], "cpu")
    assert read(asked[0][0][0]) == "[picture]What is A?"

    for source, picture in (("image", True), ("text", False)):
        question, = evaluate.planning_questions(rows, source, rows)
        assert bool(question.picture) == picture and HINT not in question.prompt
        assert (ROW["symbols"] in question.prompt) != picture and ROW["prompt"] in question.prompt
    assert OwnRow(ROW).ask() == ASK_SYMBOLS and OwnRow(ROW).answers() == ROW["symbols"]


CLEAN = {name: text for name, text in ROW.items() if name != "symbols"} | {
    "teacher_file_name": "deep/clean.png"}


def write_clean(tmp_path, color="white", **splits):
    """As `write`, with a picture of 96x96 px for the teacher."""
    data = write(tmp_path, **splits)
    for split in splits:
        (tmp_path / split / "deep").mkdir(exist_ok=True)
        Image.new("RGB", (96, 96), color).save(tmp_path / split / "deep/clean.png")
    return data


def test_a_picture_for_the_teacher(tmp_path, capsys):
    """Its bytes count as the student's do; broken ones are found at once."""
    both = {**CLEAN, "id": "b", "symbols": "A,3", "hint": HINT}
    data = write_clean(tmp_path, test=[CLEAN, both, {**ROW, "id": "c"}])
    rows = gen_data.load_rows(data, "test")
    alone, beside, without = rows
    clean = f"{data}/test/deep/clean.png"
    assert alone.pictures() == [f"{data}/test/a.png", clean]
    for reads in ("symbols+plan", "symbols", "picture"):
        assert alone.teacher_picture(reads) == beside.teacher_picture(reads) == clean
        assert alone.teacher_prompt(reads) == ROW["prompt"]
        assert (without.teacher_picture(reads) == without.path) == (reads == "picture")
    assert beside.teacher_prompt("symbols+plan") == f"A,3\n\n{HINT}\n\n{ROW['prompt']}"
    assert beside.teacher_prompt("picture") == ROW["prompt"] and alone.questions() == {}
    asked = evaluate.planning_questions(rows, "text", rows)
    assert [(question.picture, question.prompt) for question in asked] == [
        (clean, ROW["prompt"]), (clean, f"A,3\n\n{ROW['prompt']}"),
        (None, without.teacher_prompt("symbols"))]

    digests = [gen_data.digest_rows([row]) for row in rows]
    write_clean(tmp_path, "black", test=[CLEAN, both, {**ROW, "id": "c"}])
    again = gen_data.load_rows(data, "test")
    assert [gen_data.digest_rows([row]) == old for row, old in zip(again, digests, strict=True)] \
        == [False, False, True]
    Path(clean).write_text("no picture")
    assert clean in stops(capsys, gen_data.check_pictures, again)
    assert gen_data.check_pictures(again[2:]) is None


def test_a_clean_picture_teaches_a_degraded_one(tmp_path, capsys):
    """Without symbols: the teacher must be told to look, and there is nothing for a cold start."""
    rows = {split: [{**CLEAN, "id": f"{split}{i}"} for i in range(4)] for split in gen_data.SPLITS}
    data = write_clean(tmp_path / "data", "red", **rows)
    words = ["--preset", "tiny", "--data", data, "--steps", "2", "--batch", "4", "--micro_batch",
             "3", "--lora_rank", "2", "--max_new_tokens", "6"]

    def distilled(*more):
        distill.main(distill.parse_args([*words, "--init", "none", "--out",
                                         str(tmp_path / "distill"), *more]))
    for reads in ("symbols", "symbols+plan"):
        line = stops(capsys, distilled, "--teacher_reads", reads)
        assert f'train/metadata.jsonl, line 1: no "symbols" for --teacher_reads {reads}' in line
        assert "give --teacher_reads picture" in line and not (tmp_path / "distill").exists()
    line = stops(capsys, lambda: coldstart.main(coldstart.parse_args(
        [*words, "--out", str(tmp_path / "coldstart")])))
    assert 'line 1: neither "questions" nor "symbols"' in line and "--init none" in line
    distilled("--teacher_reads", "picture")
    assert metrics(tmp_path, "distill")[0]["kl"] > 1e-3     # a fresh adapter: it sees another one
    evaluate.main(evaluate.parse_args([
        "--preset", "tiny", "--data", data, "--max_new_tokens", "6", "--adapter", "base",
        str(tmp_path / "distill"), "--out", str(tmp_path / "eval")]))
    image, text = ([json.loads(line)["response"] for line in open(
        tmp_path / f"eval/base-{source}/predictions.jsonl")] for source in ("image", "text"))
    assert len(set(image)) == len(set(text)) == 1 and image != text


@pytest.mark.parametrize("response, outcome", [
    ("so <answer> New  York.</answer>", "success"), ("Paris?\nnew york\n\n", "success"),
    ("<answer>Paris</answer> no: <answer>NEW YORK</answer>", "success"),
    ("new york\nI think", "wrong"), ("<answer>york</answer>\nNew York", "wrong"),
    ("<answer>NewYork</answer>", "wrong"), ("**New York** or Paris", "wrong"),
    ("<answer>New York", "wrong"), ("It is not New York", "wrong"),
    (" \n", "no answer"), ("<answer></answer>", "no answer")])
def test_answers_in_words(response, outcome):
    verdict = OwnRow({**ROW, "answer": "New York"}).judge(response)
    assert verdict["outcome"] == outcome
    assert verdict["optimal"] is None and verdict["map_right"] is None


@pytest.mark.parametrize("form", [
    "{}", "{}.", "**{}**", "({})", "“{}”", "«{}»", "`{}`", "${}$", "- {}", "{}。", "{}।", "{}!",
    "\\boxed{{{}}}", "$\\boxed{{{}}}$", "\\boxed{{\\text{{{}}}}}.", "\\({}\\)",
    "The answer is {}.", "So the final answer is: **{}**", "**Answer:** {}", "**Answer**: {}",
    "Answer：{}", "### Answer:\n\n**{}**\n\nIt is the larger one.", '{{"answer": "{}"}}',
    "I compare.\nThe answer is \\boxed{{{}}}, as it is larger.",
    "{}<|im_end|>", "{}<|im_end|>\n<|endoftext|>", "{}</s>", "<think>A?</think>{}"])
@pytest.mark.parametrize("answer, compare", [
    ("B", "words"), ("(0,1]", "words"), ("52", "number"), ("-3", "number"), ("-3", "words"),
    ("c1ccccc1", "exact"), ("[Na+].[Cl-]", "exact")])
def test_a_base_writes_an_answer_as_well_as_who_writes_tags(form, answer, compare):
    """Punctuation and markup around it, a label before it, a box: one rule for all comparisons."""
    row = OwnRow({**ROW, "answer": answer, "compare": compare})
    said = form.format(answer)
    assert row.judge(said)["outcome"] == "success"
    if "<" not in form:
        assert row.judge(f"<answer>{said}</answer>")["outcome"] == "success"
    for other in (f"{answer}1", f"not {answer}", f"{answer} or 7"):
        assert row.judge(form.format(other))["outcome"] == "wrong"


@pytest.mark.parametrize("response, cut, outcome", [
    ("Paris? <answer>Paris</answer></think>\n<answer>New York</answer>", False, "success"),
    ("Paris?</think>\nNew York", False, "success"), ("<think>New York", False, "no answer"),
    ("<answer>New York</answer>", True, "success"), ("<answer>New York", True, "no answer"),
    ("<answer>New York</answer><|im_end|>", True, "success"),
    ("It is\nNew York", True, "no answer"), ("The answer is New York", True, "no answer"),
    ("<answer>New York</answer> or", True, "no answer")])
def test_who_speaks_for_a_response(response, cut, outcome):
    verdict = OwnRow({**ROW, "answer": "New York"}).judge(response, cut=cut)
    assert verdict["outcome"] == outcome and not verdict["overrun"]


@pytest.mark.parametrize("wanted, said, tolerance, outcome", [
    (12, "12.0", 0, "success"), (0.5, " 0.50.", 0, "success"), (-3, "-3", 0, "success"),
    (4, "4 .", 0, "success"), (4, "four", 0, "wrong"), (4, "**4**", 0, "success"),
    (1e-7, "0.0000001", 0, "success"), (2e22, "2e22", 0, "success"), (0.5, ".5", 0, "success"),
    (52, "5²", 0, "wrong"), (12, "①②", 0, "wrong"), (52, "５２", 0, "success"),
    (-3, "−3", 0, "success"), (-3, "–3", 0, "success"), (3, "–3", 0, "wrong"),
    (3, "-3", 0, "wrong"), (3, "**-3**", 0, "wrong"),
    (3, "-$3", 0, "wrong"), (3, "- 3", 0, "success"), (5, ".5", 0, "wrong"), (5, "5%", 0, "wrong"),
    (5, "5 or 6", 0, "wrong"), (5, "5-6", 0, "wrong"), (5, "5/6", 0, "wrong"),
    (1234, "12 34", 0, "wrong"), (100200, "100,200", 0, "success"), (15, "1,5", 0, "wrong"),
    ("12", "12.0", 0, "success"), ("12", "1 2", 0, "wrong"), ("12", "13", 0, "wrong"),
    ("1.0", "1.1", 0.1, "success"), ("1.0", "1.11", 0.1, "wrong"), ("-3", "3", 5.9, "wrong"),
    ("7", "nan", 1e9, "wrong"), ("7", "9" * 5000, 1e9, "wrong"), ("7", "٧", 0, "wrong"),
    ("7", "seven", 0, "wrong"), ("+7.", "7", 0, "success"), ("1200", "1,200.0", 0, "success"),
    ("1,200", "1200", 0, "success"), ("1200", "1,20,0", 0, "wrong"), ("7", "1_0", 9, "wrong"),
    ("7", "1e999999999", 9, "wrong"), ("7", "+", 9, "wrong"), ("7", "", 9, "no answer")])
def test_answers_that_are_numbers(wanted, said, tolerance, outcome):
    """A JSON number, or a text where the row says so."""
    more = {"compare": "number"} if isinstance(wanted, str) else {}
    row = OwnRow({**ROW, "answer": wanted, "tolerance": tolerance, **more})
    assert row.fault() is None
    assert row.judge(f"<answer>{said}</answer>")["outcome"] == outcome


@pytest.mark.parametrize("compare, wanted, said, right", [
    (None, "1234", "12 34", False), (None, "12 34", "1234", False),
    (None, "100200", "100,200", False), (None, "4", "4.0", False), (None, "52", "5²", False),
    (None, "12", "①②", False), (None, "3", "-3", False), (None, "3", ".3", False),
    (None, "caf\u00e9", "cafe\u0301", True), (None, "Stra\u00dfe", "STRASSE", True),
    (None, ".", "", False), (None, ".", " \n", False), (None, ".", ".", True),
    (None, "a", ".", False), (None, "C", "(C)", True), (None, "(0,1)", "[0,1]", False),
    (None, "C", "C#", False), (None, "C#", "**C#**", True), (None, "B", "B, C", False),
    (None, "It is a cat.", "it is a cat", True), (None, "The answer is 42", "42", True),
    (None, "a,b\nx,1", "a,b\nx,1\n", True), (None, "a,b\nx,1", "x,1", False),
    (None, ["NYC", "New York"], "new york", True),
    (None, ["NYC", "New York"], "NYC New York", False),
    ("words", "c1ccccc1", "C1CCCCC1", True), ("exact", "c1ccccc1", "C1CCCCC1", False),
    ("exact", "c1ccccc1", " c1ccccc1\n", True), ("exact", "a  b", "a b", False),
    ("exact", "x.", "x", False), ("exact", ["a", "A"], "A", True),
    ("exact", "\\frac{1}{2}", "\\boxed{\\frac{1}{2}}", True),
    ("number", ["1", "2"], "2.0", True)])
def test_what_counts_as_equal(compare, wanted, said, right):
    row = OwnRow({**ROW, "answer": wanted, "compare": compare})
    assert row.fault() is None
    assert (row.judge(f"<answer>{said}</answer>")["outcome"] == "success") == right
    first = row.response()  # the reference is right
    assert row.judge(first)["outcome"] == "success"
    asked = OwnRow({**ROW, "compare": compare, "questions": [{"question": "?", "answer": "c1C"}]})
    assert asked.score(None, "c1c")["question 1"] == (compare != "exact")
    assert asked.score(None, "**c1C**.")["question 1"]


def same_set(said, wanted, tolerance):
    """The recipe of docs/your_own_task.md."""
    return {item.strip() for item in said.split(",")} == {
        item.strip() for item in wanted.split(",")}


def test_a_scorer_of_ones_own(monkeypatch, tmp_path):
    monkeypatch.setitem(gen_data.COMPARE, "set", same_set)
    rows = [{**ROW, "answer": ["a, b", "c"], "compare": "set"}]
    row, = gen_data.load_rows(write(tmp_path, test=rows), "test")
    for said, right in (("b,a", True), ("c", True), ("a", False), ("a,b,c", False), ("", False)):
        assert (row.judge(f"<answer>{said}</answer>")["outcome"] == "success") == right
    text = Path(gen_data.__file__).with_name("docs").joinpath("your_own_task.md").read_text()
    assert inspect.getsource(same_set).splitlines()[2].strip() in text


@pytest.mark.parametrize("unit", [
    "(", "\\boxed{", "\\boxed{{", "**", "answer: ", "{", "4 ", "$", ". ", "-(", "answer  ",
    "-1,000", "\\boxed{ {} ", "<|im_end|>", "<|", "<|a|> x"])
def test_a_megabyte_of_an_answer(unit):
    """None takes longer than its length: an expression that backtracks would not end."""
    for compare in gen_data.COMPARE:
        row = OwnRow({**ROW, "answer": "4", "compare": compare})
        assert row.judge(unit * (10**6 // len(unit)))["outcome"] != "success"


def test_without_answers_nothing_is_judged(tmp_path):
    """Lengths and responses are there, rates are not; a script in a response stays text."""
    rows = [{**ROW, "id": f"row {i}"} for i in range(3)]
    data, answers = write(tmp_path, test=rows), tmp_path / "answers.jsonl"
    lines = [{"id": row["id"], "response": "</script><b>", "tokens": 7} for row in rows]
    answers.write_text("".join(json.dumps(line) + "\n" for line in lines))
    evaluate.main(evaluate.parse_args(["--preset", "tiny", "--data", data, "--out",
                                       str(tmp_path / "eval"), "--responses", str(answers)]))
    results = json.loads((tmp_path / "eval/results.json").read_text())
    macro = results["conditions"]["answers"]["table"][-1]
    for name in ("success", "optimal", "parsed", "map_right", "success_unseen"):
        assert macro[name] is None
    assert macro["tokens"] == 7 and macro["n"] == 0 and macro["not_judged"] == 3
    assert "</script><b>" not in (tmp_path / "eval/report.html").read_text()


@pytest.mark.parametrize("change, message", [
    ({"prompt": None}, '"prompt": wanted a text, got None'),
    ({"symbols": ""}, '"symbols": wanted a text'),
    ({"prompt": "  "}, '"prompt": wanted a text'), ({"answer": ""}, '"answer": wanted a text'),
    ({"answer": True}, '"answer": wanted a number'), ({"answer": []}, '"answer": wanted at least'),
    ({"answer": ["a", " "]}, '"answer": wanted a text'), ({"answer": {}}, '"answer": wanted'),
    ({"answer": float("nan")}, '"answer": wanted a number'),
    ({"compare": "set"}, '"compare": wanted'),
    ({"answer": "five", "compare": "number"}, '"answer": wanted a number, as "compare" says'),
    *[({"answer": 5, "tolerance": value}, '"tolerance": wanted a number, at least 0, got ')
      for value in ("1", -1, True, float("nan"), float("inf"))],
    ({"answer": "<answer>B</answer>"}, '"answer" holds the tag <answer>: write only what stands'),
    ({"prompt": "<image>\nWhich?"}, '"prompt" holds <image>: leave it out, the picture comes'),
    ({"prompt": "<video>Which?"}, '"prompt" holds <video>: leave it out'),
    ({"questions": [{"question": "<image>?", "answer": "3"}]}, '"question" holds <image>'),
    ({"group": "macro"}, '"group": macro is the name of a task'),
    ({"group": "maze"}, '"group": maze is the name'),
    ({"hint": ["x"]}, '"hint": wanted a text'), ({"id": 3}, '"id": wanted a text'),
    ({"questions": "x"}, '"questions": wanted a list of {"question", "answer"}'),
    ({"questions": ["x"]}, '"questions": wanted a list of {"question", "answer"}'),
    ({"questions": [{"question": "x"}]}, '"answer": wanted a text, got None'),
    ({"task": "maze"}, "not a row: KeyError"),
    ({"task": "vqa"}, '"task" \'vqa\' is none of frozenlake'),
    ({"teacher_file_name": 3}, '"teacher_file_name": wanted one file\'s name, got 3'),
    ({"teacher_file_name": "a.png", "symbols": " "}, '"symbols": wanted a text'),
    ({"teacher_file_name": "b.png", "symbols": None}, "there is no picture"),
    ({"symbols": None}, "--teacher_reads picture"),
    ({"anwser": "B"}, '"anwser": is "answer" meant?'),
    ({"symbols": None, "symbol": "x"}, '"symbol": is "symbols" meant?'),
    ({"symbols": "<|image_pad|>"}, '"symbols" holds <|image_pad|>'),
    ({"prompt": "\ud800"}, "UnicodeEncodeError"), ({"file_name": "b.png"}, "there is no picture"),
    ({"file_name": "."}, "there is no picture"), ({"file_name": "a\0.png"}, "no picture"),
    *[({"file_name": name}, '"file_name": wanted one file\'s name, got ') for name in (
        None, ["a.png", "b.png"], "https://example.org/x.png",
        "data:image/png;base64," + "A" * 9999)],
    *[({"file_name": name}, "does not stay in") for name in ("../test/a.png", "/a.png")],
    ({"file_name": None, "images": ["a.png"]}, "(the row has file_name, id, prompt, symbols, im"),
    ({"id": "first"}, "the id 'first' is")])
def test_bad_rows(tmp_path, capsys, change, message):
    data = write(tmp_path, test=[{**ROW, "id": "first"}, {**ROW, **change}])
    line = stops(capsys, gen_data.load_rows, data, "test")
    assert "metadata.jsonl, line 2: " in line and message in line and len(line) < 600


def test_forms_of_the_metadata(tmp_path, capsys):
    """Blank lines, nulls, ./, subfolders, a byte order mark, \\r\\n are read."""
    data = Path(write(tmp_path / "mine", test=[ROW]))
    file, nulls = data / "test/metadata.jsonl", dict.fromkeys([
        "hint", "answer", "questions", "group", "compare", "task", "level", "state", "plan"])
    (data / "test/deep/er").mkdir(parents=True)
    shutil.copy(data / "test/a.png", data / "test/deep/er/b.png")
    lines = [{**ROW, **nulls}, {**ROW, "id": "b", "file_name": "./a.png"},
             {**ROW, "id": "c", "file_name": "deep/er/b.png", "group": "deep"}]
    lines = "\n \n".join(json.dumps(line) for line in lines) + "\n\n"
    file.write_bytes(b"\xef\xbb\xbf" + lines.replace("\n", "\r\n").encode())
    rows = gen_data.load_rows(data, "test")
    assert [Path(row.path).relative_to(data / "test").as_posix() for row in rows] == [
        "a.png", "a.png", "deep/er/b.png"]
    assert [row.where[-6:] for row in rows] == ["line 1", "line 3", "line 5"]
    assert rows[0].key() == rows[1].key() and rows[0].task == "own"
    assert rows[0].teacher_prompt("symbols+plan") == OwnRow(ROW).teacher_prompt("symbols+plan")
    assert rows[0].judge("x")["outcome"] == "not judged" and list(rows[0].questions()) == ["map"]
    assert "docs/your_own_task.md" in stops(capsys, gen_data.load_rows, data, "val")
    file.write_text(lines, encoding="utf-16")
    assert ": not JSON" in stops(capsys, gen_data.load_rows, data, "test")


def test_groups_are_chosen_by_name(folder, capsys):
    rows = gen_data.load_rows(folder / "mixed", "test")
    groups = {row.task for row in rows if row.own}
    for name in groups:
        assert {row.task for row in gen_data.choose_rows(rows, [name])} == {name}
    name = min(groups)
    both = gen_data.choose_rows(rows, ["frozenlake:3", name], 1)
    assert [row.task for row in both] == sorted(["frozenlake", name], key=[
        row.task for row in rows].index)
    assert f"unknown task 'x', known: {', '.join(gen_data.TASKS)}, " in stops(
        capsys, gen_data.choose_rows, rows, ["x"])
    own = [row for row in rows if row.own]
    line = stops(capsys, gen_data.choose_rows, own, ["maze"])
    assert "--tasks maze: the data has no such row" in line


def test_a_group_called_like_a_task_beside_puzzles(folder, tmp_path, capsys):
    data = shutil.copytree(folder / "mixed", tmp_path / "data")
    for split in gen_data.SPLITS:
        file = data / split / "metadata.jsonl"
        file.write_text(file.read_text().replace('"group": "largest"', '"group": "frozenlake"'))
    words = ["--preset", "tiny", "--data", str(data), "--out", str(tmp_path / "out")]
    line = stops(capsys, lambda: coldstart.main(coldstart.parse_args(words)))
    assert '"group": frozenlake is the name of a task: choose another' in line


def test_a_teacher_that_would_read_nothing(tmp_path, capsys):
    row = {name: ROW[name] for name in ROW if name != "symbols"}
    line = stops(capsys, gen_data.load_rows, write(tmp_path, test=[row]), "test")
    assert 'line 1: neither "symbols" nor "teacher_file_name"' in line


def test_only_what_was_judged_alike_stands_in_one_table(tmp_path):
    """Other answers, or another tolerance, are other rows; a failed request is no verdict."""
    def score(row, name, *words, **line):
        data, answers = write(tmp_path, test=[row]), tmp_path / "answers.jsonl"
        answers.write_text(json.dumps({"id": row["id"], "response": "3", **line}) + "\n")
        evaluate.main(evaluate.parse_args([
            "--preset", "tiny", "--data", data, "--out", str(tmp_path / "eval"), "--name", name,
            "--responses", str(answers), *words]))
        line, = map(json.loads, open(tmp_path / f"eval/{name}/predictions.jsonl"))
        conditions = json.loads((tmp_path / "eval/results.json").read_text())["conditions"]
        return line, list(conditions), (tmp_path / "eval/results.md").read_text()

    assert score({**ROW, "answer": "3"}, "first")[1] == ["first"]
    line, names, text = score({**ROW, "answer": 4}, "second")
    assert names == ["second"] and line["outcome"] == "wrong"
    assert line["level"] is None and "()" not in text
    line, names, text = score({**ROW, "answer": 4, "tolerance": 1}, "third")
    assert names == ["third"] and line["outcome"] == "success"
    assert score(ROW, "fourth", error="time-out")[0]["outcome"] == "not judged"


def test_symbols_that_exceed_the_context(tmp_path, capsys):
    long = {**ROW, "symbols": "A,3\n" * 5000}
    data = write(tmp_path, train=[long], val=[{**ROW, "id": "b"}], test=[{**long, "id": "c"}])
    words = ["--preset", "tiny", "--data", data, "--out", str(tmp_path / "out")]
    line = stops(capsys, lambda: coldstart.main(coldstart.parse_args(words)))
    assert "train/metadata.jsonl, line 1: " in line and "exceeds the context of 4096" in line
    line = stops(capsys, lambda: distill.main(distill.parse_args(
        [*words, "--init", "none", "--out", str(tmp_path / "other")])))
    assert "exceeds the context of 4096" in line
    assert not (tmp_path / "out/metrics.jsonl").exists()
    line = stops(capsys, lambda: evaluate.main(evaluate.parse_args(
        [*words, "--adapter", "base", "--out", str(tmp_path / "eval")])))
    assert "row c: " in line and "exceeds the context of 4096" in line
    assert not (tmp_path / "eval/base-image").exists()


def test_every_question_of_a_row_is_counted(tiny, capsys):
    """The first is too long, the last is not."""
    questions = [evaluate.Question({"id": "a", "question": name}, text, None)
                 for name, text in (("one", "A,3\n" * 5000), ("two", "B"))]
    jobs = [SimpleNamespace(adapter=None, questions=questions)]
    assert "row a one: " in stops(capsys, evaluate.check_jobs, *tiny, jobs, 8)


def test_charts_are_the_same_every_time(tmp_path, folder):
    make_charts(tmp_path / "b")
    for file in (tmp_path / "b").glob("*/*"):
        assert file.read_bytes() == (folder / "charts" / file.parent.name / file.name).read_bytes()


def test_symbols_that_look_like_numbered_answers():
    questions = [{"question": "Table?", "answer": "1.5,2\n2. 5,3"},
                 {"question": "A?", "answer": "3"}]
    row = OwnRow({**ROW, "questions": questions})
    names = tuple(row.questions())
    target = row.answers(names)
    assert row.score(names, target.upper()) == dict.fromkeys(names, True)
    assert not any(row.score(names, "3").values())
    assert row.score(names[1:], " 3.") == {"question 2": True}
