"""The report in headless Chromium: what it shows, how it reacts, and that nothing in it runs."""
import json
import shutil
from dataclasses import asdict

import pytest
from conftest import row_of
from PIL import Image

import evaluate
import gen_data
from gen_data import FrozenLake, Maze
from tools import report

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next((path for path in map(shutil.which, NAMES) if path), None)
EVIL = ("</script><script>document.title = 'ran'</script>"
        "<img src=x onerror=\"document.title='ran'\">")


@pytest.fixture(scope="module")
def page_file(tmp_path_factory):
    """24 rows, two conditions of hand-made responses, a made-up run; one condition is hostile."""
    folder = tmp_path_factory.mktemp("report")
    gen_data.main(gen_data.parse_args([
        "--preset", "tiny", "--tasks", "frozenlake:3", "maze:3", "minibehaviour:5", "--train", "1",
        "--val", "1", "--test", "8", "--out", str(folder / "data")]))
    rows, run = gen_data.load_rows(folder / "data", "test"), folder / "run"
    run.mkdir()
    steps = [{"step": i + 1, "kl": 3 / (i + 1), "kl_map": 2 / (i + 1), "kl_route": None,
              "kl_answer": float("nan"), "success": i / 20, "optimal": i / 30, "length": 40 + i}
             for i in range(20)]
    rollouts = [{"step": step, "id": f"train_{step}", "task": "maze", "part": [0, 0, 1, 2],
                 "tokens": ["Map", ":", "\n", EVIL], "kl": [0.0, 0.5, 0.1, 3.0],
                 "outcome": "wall"} for step in (1, 26)]
    for name, lines in (("metrics", steps), ("rollouts", rollouts)):
        (run / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    for name in ("good", "bad-image"):
        responses = [row.response() if name == "good" else
                     f"{EVIL}\n<answer>U,U,U,U,U,U,U</answer>" for row in rows]
        file = folder / f"{name}.jsonl"
        file.write_text("\n".join(json.dumps({"id": row.id, "response": response})
                                  for row, response in zip(rows, responses, strict=True)))
        evaluate.main(evaluate.parse_args([
            "--preset", "tiny", "--data", str(folder / "data"), "--out", str(folder / "eval"),
            "--responses", str(file), "--adapter", str(run)]))
    return folder / "eval/report.html"


OWN = [  # (prompt, answer or none, size of the picture, response)
    ("Which is larger?", ["B", "b 5"], (60, 40), "B has 5.\n<answer>b</answer>"),
    ("How many?", 7, (40, 3000), "<answer>6</answer>"),
    ("Describe it.", None, (3000, 40), "A long line."),
    ("Say " + "more " * 300, "yes", (64, 64), EVIL)]


@pytest.fixture(scope="module")
def own_page(tmp_path_factory):
    """Own rows of every kind: read from the picture, the symbols, another row's picture; a run."""
    folder = tmp_path_factory.mktemp("own")
    for split in ("train", "test"):
        (folder / "data" / split).mkdir(parents=True)
        lines = []
        for i, (prompt, answer, size, _) in enumerate(OWN):
            Image.new("RGB", size, (60 * i, 90, 30)).save(folder / f"data/{split}/{i}.png")
            lines.append({"file_name": f"{i}.png", "id": f"{split}{i}", "prompt": prompt,
                          "symbols": f"A,{i}\nB,5", "answer": answer})
        (folder / "data" / split / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    run = folder / "run"
    run.mkdir()
    rows = gen_data.load_rows(folder / "data", "train")
    rollouts = [{"step": 1, "id": name, "task": "own", "part": [0, 2, 2],
                 "tokens": ["B", "<answer>", "b"], "kl": [0.0, 0.5, 3.0], "outcome": outcome}
                for name, outcome in (("train0", "success"), ("train2", "not judged"),
                                      ("gone", "wrong"), ("train3", "wrong"))]
    (run / "rollouts.jsonl").write_text("\n".join(map(json.dumps, rollouts)))
    (run / "metrics.jsonl").write_text(json.dumps({"step": 1, "kl_map": 0.1, "kl_route": None}))
    (run / "args.json").write_text(json.dumps({"args": {"data": str(folder / "data")}}))
    (run / "trained_rows.json").write_text(json.dumps([row.key() for row in rows[:3]]))
    file = folder / "mine.jsonl"
    file.write_text("\n".join(json.dumps(
        {"id": f"test{i}", "response": response, "cut": False, "tokens": 9})
        for i, (*_, response) in enumerate(OWN)))
    for source in ([], ["--input", "text"], ["--input", "swapped"]):
        evaluate.main(evaluate.parse_args([
            "--preset", "tiny", "--data", str(folder / "data"), "--out", str(folder / "eval"),
            "--responses", str(file), "--adapter", str(run), *source]))
    return folder / "eval/report.html"


@pytest.fixture(scope="module")
def browser():
    if not CHROMIUM:
        pytest.skip("no Chromium here: apt-get install chromium")
    playwright = pytest.importorskip("playwright.sync_api",
                                     reason="playwright is missing (requirements-dev.txt)")
    with playwright.sync_playwright() as p:
        chromium = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


def open_page(browser, file, width):
    """The page, with what it said or asked a network for in page.said."""
    page = browser.new_page(viewport={"width": width, "height": 900})
    page.said = []
    page.on("console", lambda message: page.said.append(message.text))
    page.on("pageerror", lambda error: page.said.append(str(error)))

    def seen(request):
        if not request.url.startswith(("file:", "data:")):
            page.said.append(request.url)
    page.on("request", seen)
    page.goto(file.as_uri())
    page.wait_for_selector("#gallery .card")
    return page


def test_the_page_is_whole_and_nothing_in_it_runs(browser, page_file):
    """On a phone: no wider than the screen, every table, plot and picture, responses as text."""
    assert page_file.read_text().count("<script") == 2               # the data and the page's own
    page = open_page(browser, page_file, 390)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    lines = page.locator("#tables tr").all_inner_texts()
    assert any(line.startswith("macro\t24\t") and "100 (100)" in line for line in lines)
    titles = page.locator("#tables h2").all_inner_texts()
    assert titles == ["All tasks", "By task and board size", "Perception or planning?",
                      "Differences of success"]
    assert page.locator("#training img").count() == 3                # KL, rollouts, length
    assert page.evaluate("[...document.images].every(image => image.naturalWidth > 0)")
    page.get_by_label("condition").select_option("bad-image")
    assert EVIL in page.locator("#gallery .card pre").last.inner_text()
    assert EVIL in page.locator("#rollouts").inner_text()
    assert page.title() == "MGSD: evaluation" and page.said == []
    page.close()


@pytest.mark.slow
def test_filters_and_pages(browser, page_file):
    page = open_page(browser, page_file, 1280)
    assert page.evaluate("document.documentElement.scrollWidth") <= 1280
    cards, status = page.locator("#gallery .card"), page.locator("#gallerybar output")
    assert (cards.count(), status.inner_text()) == (12, "48 responses, page 1 of 4")
    page.get_by_label("next page").last.click()
    assert status.inner_text() == "48 responses, page 2 of 4"
    page.get_by_label("condition").select_option("good")
    assert status.inner_text() == "24 responses, page 1 of 2"
    assert page.locator("#gallery .badge.good").count() == 12
    page.get_by_label("task").last.select_option("maze")
    assert cards.count() == 8 and page.locator("#gallery .wrong").count() == 0
    page.get_by_label("outcome").select_option("edge")
    assert cards.count() == 0 and status.inner_text() == "0 responses, page 1 of 1"
    page.get_by_label("condition").select_option("bad-image")
    assert set(page.locator("#gallery .badge").all_inner_texts()) == {"edge"}
    page.close()


@pytest.mark.slow
def test_the_path_is_the_plan(browser, page_file):
    """The line drawn over a board goes through the cells of the plan, in units of cells."""
    page = open_page(browser, page_file, 1280)
    page.get_by_label("condition").select_option("good")
    rows = gen_data.load_rows(page_file.parents[1] / "data", "test")
    for card, row in zip(page.locator("#gallery .card").all(), rows, strict=False):
        assert row.id in card.inner_text()
        drawn = card.locator("svg path").last.get_attribute("d")[1:].split("L")
        cells = gen_data.execute(row.puzzle, row.plan)[0]
        assert drawn == [f"{pos[1] + 0.5:g} {pos[0] + 0.5:g}" for pos in cells]
    page.close()


@pytest.mark.slow
def test_tokens_are_tinted_by_their_kl(browser, page_file):
    page = open_page(browser, page_file, 1280)
    tokens, shades = page.locator("#rollouts .card").first.locator(".tokens span"), []
    for i in range(4):
        shade = tokens.nth(i).evaluate("e => e.style.background.match(/rgba[^)]*, ([0-9.]+)/)?.[1]")
        shades.append(1.0 if shade is None else float(shade))
    assert shades[0] == 0 < shades[2] < shades[1] < shades[3] == 1
    tokens.nth(1).click()
    assert "0.500 nats, map" in page.locator("#rollouts .card").first.inner_text()
    page.get_by_label("step").select_option("26")
    assert page.locator("#rollouts .card").all_inner_texts()[0].startswith("train_26")
    page.close()


@pytest.mark.slow
def test_rows_by_the_thousand(page_file, browser, tmp_path):
    """500 rows times 6 conditions: a page of cards at a time, and the next when it is asked for."""
    html = page_file.read_text()
    begin = html.index('id="data">') + len('id="data">')
    end = html.index("</script>", begin)
    data = json.loads(html[begin:end])
    data["rows"], data["total"] = [data["rows"][i % 24] for i in range(500)], 500
    data["conditions"] = [f"c{i}" for i in range(6)]
    answers = [data["answers"]["good"][k % 24] for k in range(500)]
    data["answers"] = dict.fromkeys(data["conditions"], answers)
    file = tmp_path / "big.html"
    file.write_text(html[:begin] + json.dumps(data).replace("<", "\\u003c") + html[end:])
    page = open_page(browser, file, 390)
    status = page.locator("#gallerybar output")
    assert page.locator("#gallery .card").count() == 12
    assert status.inner_text() == "3000 responses, page 1 of 250"
    page.get_by_label("next page").last.click()
    assert status.inner_text() == "3000 responses, page 2 of 250"
    assert page.evaluate("document.querySelectorAll('*').length") < 8000
    page.close()


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1280])
def test_a_page_of_own_rows(browser, own_page, width):
    """What was read, said and right; nothing of puzzles; long pictures and texts stay in bounds."""
    page = open_page(browser, own_page, width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    text = page.locator("body").inner_text()
    assert not any(word in text.lower() for word in
                   ("puzzle", "shortest", "overrun", "board", "difficulty", "route", "map"))
    assert page.locator("#tables h2").all_inner_texts() == ["All rows", "Differences of success"]
    assert page.locator("h2:visible").all_inner_texts()[2:] == [
        "Training", "Where the teacher corrects the student", "Gallery"]
    for image in page.locator("img").all():
        assert image.evaluate("image => image.naturalWidth > 0")
        assert image.bounding_box()["height"] <= 400 and image.bounding_box()["width"] <= width
    names = "all => all.map(select => select.getAttribute('aria-label'))"
    assert page.locator("select").evaluate_all(names) == ["condition", "outcome"]
    rollouts = page.locator("#rollouts .card")
    assert [card.locator("img").count() for card in rollouts.all()] == [1, 1, 0, 0]  # not its rows
    assert "Which is larger?" in rollouts.first.inner_text()
    for name, sources in [
            ("mine", [0, 1, 2, 3]), ("mine-text", []), ("mine-swapped", [1, 2, 3, 0])]:
        page.get_by_label("condition").select_option(name)
        cards, pictures = page.locator("#gallery .card"), page.locator("#gallery img")
        assert pictures.evaluate_all("all => all.map(image => image.src)") == page.evaluate(
            "numbers => numbers.map(i => data.pictures[`${i}.png`])", sources)
        first = cards.first.inner_text()
        assert "answer read\nb\n" in first and "right answer\nB or b 5\n" in first
        assert ("A,0" in first) == (name == "mine-text")           # else folded
        assert [cards.nth(i).bounding_box()["height"] < 900 for i in range(4)] == [True] * 4
    badges = page.locator("#gallery .badge").evaluate_all("all => all.map(x => x.className)")
    assert badges == ["badge good", "badge", "badge open", "badge"]
    assert page.title() == "MGSD: evaluation" and page.said == []
    page.close()


# ---------------------------------------------------------------- without a browser

def test_tables_of_own_rows(own_page):
    """Only columns that are filled; what is not judged is no failure."""
    text = (own_page.parent / "results.md").read_text()
    assert "| condition | n | not judged | success | answer | cut | tokens | failures |" in text
    assert "| mine | 3 | 1 | 33 [6, 80] | 100 | 0 of 4 | 9 | wrong 2 |" in text
    assert not any(word in text for word in ("puzzle", "shortest", "By task", "map", "tasks"))
    assert ("text: what the teacher reads, without the hint; swapped: the picture of another row."
            in text)


def test_tables_of_rows_without_answers():
    """Nothing was judged, so there is neither success nor a failure; sizes only where there are."""
    verdicts = [{"id": "a", "task": "own", "level": None, "bucket": None, "outcome": "not judged",
                 "plan": None, "optimal": None, "map_right": None, "cut": True, "tokens": 5,
                 "trained_on": True, "overrun": False, "failure": None}]
    condition = evaluate.Condition("mine", None, "", {}, None, {}, {})
    summary = {"table": evaluate.summarise(verdicts), "diagnosis": evaluate.diagnose(verdicts),
               "perception": [], **asdict(condition)}
    comparison = evaluate.compare({"mine": condition}, {"mine": verdicts})
    tables = report.make_tables({"mine": summary}, comparison)
    assert [(table["title"], table["head"], table["lines"][0]) for table in tables] == [
        ("All rows", ["condition", "not judged", "cut", "tokens"], ["mine", 1, "100 of 1", 5]),
        ("Rows seen in training", ["group", "mine"], ["own", "1 of 1"])]


def test_plans_as_they_are_drawn():
    """To the goal; half a step towards a hole, a wall, the edge; an action that is not one."""
    lake = row_of(FrozenLake(["SFF", "FHF", "FFG"]))
    maze = row_of(Maze([[1 + 4 + 8, 1 + 4 + 8], [2 + 4, 2 + 8]], [0, 0], [0, 1]))
    for row, plan, path, violation_at in [
            (lake, ["D", "D", "R", "R", "R"], [(0, 0), (1, 0), (2, 0), (2, 1), (2, 2)], None),
            (lake, ["D", "R"], [(0, 0), (1, 0)], (1, 0.5)), (lake, ["U"], [(0, 0)], (-0.5, 0)),
            (maze, ["R", "D"], [(0, 0)], (0, 0.5)), (lake, ["PICK"], [(0, 0)], (0, 0)),
            (lake, ["R"], [(0, 0), (0, 1)], None), (lake, None, [(0, 0)], None)]:
        assert report.walk(row, plan) == (path, violation_at)


def test_numbers_as_they_are_written():
    """Halves go up; a sign where it is asked for; nothing for a number that is not there."""
    assert [report.percent(x) for x in (0.005, 0.925, 0, 1, None)] == [1, 93, 0, 100, ""]
    assert report.with_interval(0.5, [0.4, 0.6]) == "50 [40, 60]"
    assert report.with_interval(-0.5, [-0.6, 0.004], "{:+}") == "-50 [-60, +0]"
    assert (report.with_interval(0.5, None), report.with_interval(None, None)) == ("50", "")
