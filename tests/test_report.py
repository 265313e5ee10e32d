"""The report in headless Chromium: what it shows, its filters, at desktop and phone width, and that nothing in the data runs."""
import json
import shutil

import pytest

import evaluate
import gen_data

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
EVIL = "</script><script>document.title = 'ran'</script><img src=x onerror=\"document.title='ran'\">"


@pytest.fixture(scope="module")
def page_file(tmp_path_factory):
    """Six rows, two conditions of hand-made responses, the curves and rollouts of a made-up run; one response is hostile."""
    folder = tmp_path_factory.mktemp("report")
    gen_data.main(gen_data.parse_args(["--preset", "tiny", "--tasks", "frozenlake:3", "maze:3", "minibehaviour:5", "--train", "1", "--val", "1",
                                       "--test", "8", "--workers", "1", "--out", str(folder / "data")]))
    rows = gen_data.load_rows(folder / "data", "test")
    for name, change in (("good", lambda row: gen_data.response(row)),
                         ("bad-image", lambda row: f"{EVIL}\n<answer>U,U,U,U,U,U,U</answer>")):
        file = folder / f"{name}.jsonl"
        file.write_text("\n".join(json.dumps({"id": row["id"], "response": change(row)}) for row in rows))
        run = folder / "run"
        run.mkdir(exist_ok=True)
        (run / "metrics.jsonl").write_text("\n".join(json.dumps({
            "step": i + 1, "kl": 3 / (i + 1), "kl_state": 2 / (i + 1), "kl_route": None, "kl_answer": float("nan"), "success": i / 20, "optimal": i / 30,
            "length": 40 + i}) for i in range(20)))
        (run / "rollouts.jsonl").write_text("\n".join(json.dumps({
            "step": step, "id": f"train_{step}", "task": "maze", "tokens": ["Map", ":", "\n", EVIL], "kl": [0.0, 0.5, 0.1, 3.0], "part": [0, 0, 1, 2],
            "outcome": "wall"}) for step in (1, 26)))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(evaluate, "RUNS", ())                      # not what lies in out/ here
            evaluate.main(evaluate.parse_args(["--preset", "tiny", "--data", str(folder / "data"), "--out", str(folder / "eval"),
                                               "--responses", str(file), "--adapter", str(run)]))
    return folder / "eval/report.html"


@pytest.fixture(scope="module")
def browser():
    if not CHROMIUM:
        pytest.skip("no Chromium here: apt-get install chromium")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (requirements-dev.txt)")
    with playwright.sync_playwright() as p:
        chromium = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


def open_page(browser, file, width):
    page = browser.new_page(viewport={"width": width, "height": 900})
    page.said = []
    page.on("console", lambda message: page.said.append(message.text))
    page.on("pageerror", lambda error: page.said.append(str(error)))
    page.on("request", lambda request: request.url.startswith(("file:", "data:")) or page.said.append(request.url))
    page.goto(file.as_uri())
    page.wait_for_selector("#gallery .card")
    return page


@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_fits_and_is_whole(browser, page_file, width):
    page = open_page(browser, page_file, width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width and page.said == []
    lines = page.locator("#results tr").all_inner_texts()
    assert any(line.startswith("macro\tall\t24\t") and "\t100" in line for line in lines)
    assert page.locator("#levels figure").count() == 3 and page.locator("#training figure").count() == 3
    assert page.locator("#training path").count() == 2 + 2 + 1       # kl, kl_state | success, optimal | length
    assert page.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    page.close()


def test_filters_and_pages(browser, page_file):
    page = open_page(browser, page_file, 1280)
    cards, told = page.locator("#gallery .card"), page.locator("#gallerybar output")
    assert (cards.count(), told.inner_text()) == (12, "48 responses, page 1 of 4")
    page.get_by_label("next page").last.click()
    assert told.inner_text() == "48 responses, page 2 of 4"
    page.get_by_label("condition").select_option("good")
    assert told.inner_text() == "24 responses, page 1 of 2" and page.locator("#gallery .badge.good").count() == 12
    page.get_by_label("task").last.select_option("maze")
    assert cards.count() == 8 and page.locator("#gallery .wrong").count() == 0
    page.get_by_label("outcome").select_option("edge")
    assert cards.count() == 0 and told.inner_text() == "0 responses, page 1 of 1"
    page.get_by_label("condition").select_option("bad-image")
    assert cards.count() > 0 and set(page.locator("#gallery .badge").all_inner_texts()) == {"edge"}
    page.close()


def test_the_path_is_the_plan(browser, page_file):
    """The line drawn over a board goes through the cells of the plan, in units of cells."""
    page = open_page(browser, page_file, 1280)
    page.get_by_label("condition").select_option("good")
    rows = gen_data.load_rows(page_file.parents[1] / "data", "test")
    for card, row in zip(page.locator("#gallery .card").all(), rows):
        assert row["id"] in card.inner_text()
        drawn = card.locator("svg path").last.get_attribute("d")[1:].split("L")
        wanted = [f"{pos[1] + 0.5:g} {pos[0] + 0.5:g}" for pos in gen_data.trace(row["task"], row["state"], row["plan"])]
        assert drawn == wanted
    page.close()


def test_tokens_are_tinted_by_their_kl(browser, page_file):
    page = open_page(browser, page_file, 1280)
    tokens = page.locator("#rollouts .card").first.locator(".tokens span")
    shades = [float(tokens.nth(i).evaluate("e => e.style.background.includes('rgba') ? e.style.background.match(/[\\d.]+/g)[3] : 1")) for i in range(4)]
    assert shades[0] == 0 < shades[2] < shades[1] < shades[3] == 1
    tokens.nth(1).click()
    assert "0.500 nats, state" in page.locator("#rollouts .card").first.inner_text()
    page.get_by_label("step").select_option("26")
    assert page.locator("#rollouts .card").all_inner_texts()[0].startswith("train_26")
    page.close()


def test_nothing_in_the_data_runs(browser, page_file):
    assert page_file.read_text().count("<script") == 2               # the data and the page's own
    page = open_page(browser, page_file, 1280)
    page.get_by_label("condition").select_option("bad-image")
    assert EVIL in page.locator("#gallery .card pre").last.inner_text() and EVIL in page.locator("#rollouts").inner_text()
    assert page.title() == "MGSD: evaluation" and page.said == []
    page.close()


def test_rows_by_the_thousand(page_file, browser, tmp_path):
    """500 rows times 6 conditions: a page of cards at a time, and the next one comes when it is asked for."""
    html = page_file.read_text()
    begin = html.index('id="data">') + len('id="data">')
    end = html.index("</script>", begin)
    data = json.loads(html[begin:end])
    data["rows"], data["total"] = [data["rows"][i % 24] for i in range(500)], 500
    data["summaries"] = {f"c{i}": data["summaries"]["good"] for i in range(6)}
    data["answers"] = {f"c{i}": [data["answers"]["good"][k % 24] for k in range(500)] for i in range(6)}
    file = tmp_path / "big.html"
    file.write_text(html[:begin] + json.dumps(data).replace("<", "\\u003c") + html[end:])
    page = open_page(browser, file, 390)
    assert page.locator("#gallery .card").count() == 12 and page.locator("#gallerybar output").inner_text() == "3000 responses, page 1 of 250"
    page.get_by_label("next page").last.click()
    assert page.locator("#gallerybar output").inner_text() == "3000 responses, page 2 of 250"
    assert page.evaluate("document.querySelectorAll('*').length") < 5000
    page.close()
