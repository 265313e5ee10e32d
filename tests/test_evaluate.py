"""Verdicts, rates, intervals and files against hand-made responses and hand-computed numbers."""
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import evaluate
import gen_data

ROOT = Path(__file__).parents[1]

# One small world per task, drawn so that every fault is one or two steps away.
#   lake: S F F   maze: S G, the way goes down and around, a wall between   office: A . T T T
#         F H F         . .                                                         P . T T T
#         F F G
LAKE = {"id": "lake", "task": "frozenlake", "level": 3, "state": {"grid": ["SFF", "FHF", "FFG"]}, "plan": ["D", "D", "R", "R"]}
MAZE = {"id": "maze", "task": "maze", "level": 2, "plan": ["D", "R", "U"],
        "state": {"walls": [[1 + 4 + 8, 1 + 4 + 8], [2 + 4, 2 + 8]], "start": [0, 0], "goal": [0, 1]}}
OFFICE = {"id": "office", "task": "minibehaviour", "level": 5, "plan": ["PICK", "R", "DROP"],
          "state": {"grid": ["A.TTT", "P.TTT", ".....", ".....", "....."]}}
MAP = {"lake": "Map: 3x3\nrow 0: S F F\nrow 1: F H F\nrow 2: F F G", "maze": "Map: 2x2\nrow 0: SD GD\nrow 1: .UR .UL",
       "office": "Map: 5x5\nrow 0: A . T T T\nrow 1: P . T T T\nrow 2: . . . . .\nrow 3: . . . . .\nrow 4: . . . . ."}


def judge(row, answer, text=None):
    return evaluate.judge(row, {"id": row["id"], "response": f"{MAP[row['id']] if text is None else text}\nRoute: so.\n{answer}"})


@pytest.mark.parametrize("row, plan, outcome, optimal", [
    (LAKE, "D,D,R,R", "success", True), (LAKE, "R,R,D,D", "success", True), (LAKE, "R,L,D,D,R,R", "success", False),
    (LAKE, "D,D,R,R,R", "success", False),         # the episode is over at the goal, but five actions are not the shortest plan
    (LAKE, "D,R", "hole", False), (LAKE, "U", "edge", False), (LAKE, "D,D", "unfinished", False), (LAKE, "PICK", "pick", False),
    (MAZE, "D,R,U", "success", True), (MAZE, "D,R,L,R,U", "success", False), (MAZE, "R", "wall", False), (MAZE, "D,D", "edge", False),
    (MAZE, "D,R", "unfinished", False), (MAZE, "DROP", "drop", False),
    (OFFICE, "PICK,R,DROP", "success", True), (OFFICE, "R,D,PICK,DROP", "success", False), (OFFICE, "R,R", "table", False),
    (OFFICE, "D", "printer", False), (OFFICE, "PICK,D,R,DROP", "success", False), (OFFICE, "R,PICK", "pick", False),
    (OFFICE, "DROP", "drop", False), (OFFICE, "PICK,DROP", "drop", False), (OFFICE, "PICK,PICK", "pick", False),
    (OFFICE, "L", "edge", False), (OFFICE, "PICK,R", "unfinished", False),
])
def test_every_outcome(row, plan, outcome, optimal):
    verdict = judge(row, f"<answer>{plan}</answer>")
    assert (verdict["outcome"], verdict["optimal"], verdict["state_right"]) == (outcome, optimal, True)
    assert verdict["state"] == row["state"]


@pytest.mark.parametrize("answer, outcome", [
    ("<answer>U</answer> no: <answer>D,D,R,R</answer>", "success"),               # the last complete answer counts
    ("<answer>D,D,R,R</answer> <answer>U</answer>", "edge"),
    ("<answer>d,d,r,r</answer>", "success"), ("<answer> D D  R\nR </answer>", "success"), ("<answer>DDRR</answer>", "success"),
    ("<ANSWER>D,D,R,R</ANSWER>", "no answer"), ("<answer>↓,↓,→,→</answer>", "no answer"), ("<answer>PICK UP</answer>", "no answer"),
    ("<answer>down, down, right, right</answer>", "no answer"), ("The plan D,D,R,R reaches the goal.", "no answer"),
    ("<answer>go D,D,R,R</answer>", "no answer"), ("<answer>D,D,R,R", "no answer"), ("D,D,R,R</answer>", "no answer"),
    ("<answer>D,D,R,R</answer> and <answer>U", "success"),                        # an unclosed tag is no answer
    ("<answer></answer>", "no answer"), ("", "no answer"), ("<answer>D,D,R,R</answer>" + "x" * 100_000, "success"),
    ("<answer>" + "D,U," * 25_000 + "D,D,R,R</answer>", "success"), ("<answer>" * 12_500, "no answer"),
])
def test_almost_right_text(answer, outcome):
    assert judge(LAKE, answer)["outcome"] == outcome


def test_states_read_back():
    assert judge(LAKE, "", MAP["lake"].replace("H", "F"))["state"] == {"grid": ["SFF", "FFF", "FFG"]}
    for unreadable in ("", "Map: 3x3\nrow 0: S F F", MAP["lake"].replace("G", "S"), MAP["maze"]):
        assert not judge(LAKE, "", unreadable)["state_right"]
    assert judge(LAKE, "", "no map")["state"] is None


def test_perception_or_planning_by_hand():
    """One response for each cell of the table and each kind of failure."""
    iced, moved = MAP["lake"].replace("H", "F"), MAP["lake"].replace("F F G", "F G F")
    verdicts = [judge(LAKE, f"<answer>{plan}</answer>", text) for text, plan in [
        (None, "D,D,R,R"), (None, "R,L,D,D,R,R"), (None, "D,R"),    # map right: shortest, longer, failed (planning)
        (iced, "D,D,R,R"), (iced, "R,L,D,D,R,R"),                   # map wrong, plan good all the same
        (iced, "D,R,D,R"),                                          # works on the ice it saw: perception
        (iced, "U"), (moved, "D,D"),                                # fails there too: planning
        ("no map", "U"), (None, "none")]]                           # unclear; no plan at all: planning
    assert evaluate.diagnose(verdicts) == {
        "right_optimal": 1, "right_valid": 1, "right_failed": 2, "wrong_optimal": 1, "wrong_valid": 1, "wrong_failed": 4,
        "perception": 1, "planning": 4, "unclear": 1}


# ---------------------------------------------------------------- numbers

def test_rates_by_hand():
    """Lake: 3 rows with 2 successes (1 shortest); maze: 1 row, no answer, cut. The macro average weighs tasks, not rows."""
    verdicts = [{**judge(LAKE, answer), "id": str(i), "tokens": 10 * i, "cut": False} for i, answer in enumerate(
        ("<answer>D,D,R,R</answer>", "<answer>R,L,D,D,R,R</answer>", "nothing"))]
    verdicts.append({**judge(MAZE, "", "no map"), "tokens": 40, "cut": True})
    table = {(c["task"], c["level"]): c for c in evaluate.summarise(verdicts)}
    assert list(table) == [("frozenlake", 3), ("frozenlake", None), ("maze", 2), ("maze", None), ("macro", None)]
    lake, macro = table["frozenlake", None], table["macro", None]
    assert lake | {"n": 3, "success": 2 / 3, "optimal": 1 / 3, "parsed": 2 / 3, "state": 1, "cut": 0, "tokens": 10, "faults": {"no answer": 1}} == lake
    assert macro | {"n": 4, "success": 1 / 3, "optimal": 1 / 6, "parsed": 1 / 3, "state": 1 / 2, "cut": 1 / 2, "tokens": 17.5,
                    "faults": {"no answer": 2}} == macro
    assert "pass_at_k" not in lake


def test_several_samples_by_hand():
    """Two rows of two samples: one succeeds once, one never. Mean 1/4, pass@2 1/2, over two rows."""
    good, bad = judge(LAKE, "<answer>D,D,R,R</answer>"), judge(LAKE, "<answer>U</answer>")
    verdicts = [{**v, "id": i, "sample": k} for k, pair in enumerate([(good, bad), (bad, bad)]) for i, v in zip("ab", pair)]
    numbers = evaluate.cell([verdicts])
    assert (numbers["n"], numbers["success"], numbers["pass_at_k"]) == (2, 0.25, 0.5)
    assert numbers["faults"] == {"edge": 3}


def test_buckets_and_errors():
    error = evaluate.judge({**LAKE, "bucket": "hard"}, {"id": "e", "response": "", "error": "HTTP 500"})
    assert (error["outcome"], error["plan"]) == ("error", None)
    easy = evaluate.judge({**LAKE, "bucket": "easy"}, {"id": "f", "response": "<answer>D,D,R,R</answer>"})
    table = {(c["task"], c["level"]): c["success"] for c in evaluate.summarise([error, easy])}
    assert table == {("frozenlake", 3): 0.5, ("frozenlake", None): 0.5, ("macro", None): 0.5, ("macro", "easy"): 1, ("macro", "hard"): 0}


def test_intervals_against_scipy_and_theory():
    from scipy.stats import norm
    low, high = evaluate.rate("x", np.array([1.0] * 7 + [0.0] * 13))["x_ci"]
    n, p, z = 20, 7 / 20, norm.ppf(0.975)                            # Wilson's, from its definition: |p - q| = z sqrt(q (1 - q) / n)
    for q in (low, high):
        assert abs(p - q) == pytest.approx(z * np.sqrt(q * (1 - q) / n), rel=1e-6)
    rng = np.random.default_rng(0)
    wins = rng.random((2, 400)) < [[0.8], [0.6]]
    rows = [[{"id": i, "task": "maze", "level": 3, "outcome": "success" if win else "wall"} for i, win in enumerate(row)] for row in wins]
    values = wins[0].astype(float) - wins[1]
    found = evaluate.difference(*rows)["maze"]
    half = 1.96 * values.std() / 20                                  # the normal approximation of 400 paired differences
    assert found["mean"] == pytest.approx(values.mean())
    assert found["ci"] == pytest.approx([values.mean() - half, values.mean() + half], abs=0.01)
    assert evaluate.difference(rows[0], rows[0])["maze"] == {"mean": 0, "ci": None}
    groups = [rng.random(300), rng.random(50)]                       # macro: the mean of two means, tasks drawn apart
    half = 1.96 * np.sqrt(sum(g.var() / len(g) for g in groups)) / 2
    middle = np.mean([g.mean() for g in groups])
    assert evaluate.interval(*groups) == pytest.approx([middle - half, middle + half], abs=0.01)


def test_gaps_by_hand():
    """base: 0 of 4 from pictures, 4 of 4 from symbols; coldstart 1 of 4 from pictures: a quarter of the gap is closed."""
    def verdicts(wins):
        return [{"id": i, "task": "maze", "level": 3, "outcome": "success" if i < wins else "wall"} for i in range(4)]
    found = evaluate.compare({"base-image": verdicts(0), "base-text": verdicts(4), "coldstart-image": verdicts(1), "mine": verdicts(2)})
    assert {name: gap["macro"]["mean"] for name, gap in found["gaps"].items()} == {"base-image": 1.0}
    assert found["closed"]["coldstart-image"] == {"maze": 0.25, "macro": 0.25} and found["closed"]["mine"]["macro"] == 0.5
    assert {name: step["maze"]["mean"] for name, step in found["differences"].items()} == {
        "coldstart-image minus base-image": 0.25, "mine minus coldstart-image": 0.25}


def test_perception_by_hand():
    asked = [{"id": i, "task": "maze", "level": 3, "question": q, "right": right} for i, answers in (
        ("a", (True, True)), ("b", (True, False)), ("c", (False, True))) for q, right in zip(("size", "goal"), answers)]
    found = {(p["level"], p["question"]): p["exact"] for p in evaluate.summarise_perception(asked)}
    assert found == {(level, q): pytest.approx(e) for level in (3, None) for q, e in (("size", 2 / 3), ("goal", 2 / 3), ("all", 1 / 3))}


# ---------------------------------------------------------------- files and runs

@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Four rows of lakes and mazes; `python gen_data.py` made them."""
    folder = tmp_path_factory.mktemp("eval") / "data"
    gen_data.main(gen_data.parse_args(["--preset", "tiny", "--tasks", "frozenlake:3", "maze:3", "--train", "1", "--val", "1",
                                       "--test", "4", "--workers", "1", "--out", str(folder)]))
    return folder


def run(*words):
    evaluate.main(evaluate.parse_args(["--preset", "tiny", *map(str, words)]))


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_responses_from_elsewhere(data, tmp_path, capsys):
    """Two right, one wrong, one empty, and the rest is bookkeeping; no model is loaded (there is none)."""
    rows = gen_data.load_rows(data, "test")
    lines = [{"id": row["id"], "response": gen_data.response(row)} for row in rows]
    lines[1]["response"], lines[2]["response"] = "<answer>U,U,U,U,U,U</answer>", ""
    file = tmp_path / "gpt.jsonl"

    def write(lines):
        file.write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    write(lines[::-1])                                               # in any order
    words = ["--responses", str(file), "--data", str(data), "--out", str(tmp_path / "eval"), "--model", "nowhere"]
    evaluate.main(evaluate.parse_args(words))
    found = [json.loads(line) for line in open(tmp_path / "eval/gpt/predictions.jsonl")]
    assert [v["id"] for v in found] == [row["id"] for row in rows]
    assert [v["outcome"] == "success" for v in found] == [True, False, False, True] + [True] * 4
    assert {"id", "response", "plan", "outcome", "optimal", "state"} <= found[0].keys() and found[0]["state"] == rows[0]["state"]
    summary = json.loads((tmp_path / "eval/gpt/summary.json").read_text())
    assert {"table", "diagnosis", "args", "versions"} <= summary.keys() and summary["table"][4] | {"task": "macro", "n": 8, "success": 0.75} == summary["table"][4]
    for broken, message in ((lines[:-1], f"no response for 1 rows, the first '{rows[-1]['id']}'"), ([*lines, lines[0]], f"'{rows[0]['id']}' is doubled"),
                            ([*lines, {"id": "x", "response": ""}], "'x' is not in"), ([{"id": "x"}], "line 1: wanted an object")):
        write(broken)
        with pytest.raises(SystemExit) as stop:
            evaluate.main(evaluate.parse_args(words))
        assert stop.value.code == 2 and message in capsys.readouterr().err
    write(lines[:-1])
    evaluate.main(evaluate.parse_args([*words, "--allow_missing", "--name", "few"]))
    few = [json.loads(line) for line in open(tmp_path / "eval/few/predictions.jsonl")]
    assert len(few) == len(rows) and few[-1]["outcome"] == "no answer"
    assert "| all | 8 |" in (tmp_path / "eval/results.md").read_text() and {"gpt", "few"} <= set(os.listdir(tmp_path / "eval"))


def test_rows_are_chosen(data):
    def chosen(*words):
        return [(row["task"], row["level"]) for row in evaluate.choose_rows(evaluate.parse_args(["--preset", "tiny", "--data", str(data), *words]))]
    assert chosen() == [("frozenlake", 3)] * 4 + [("maze", 3)] * 4
    assert chosen("--tasks", "maze", "--limit", "2") == [("maze", 3)] * 2 and chosen("--levels", "3", "--limit", "1") == [("frozenlake", 3), ("maze", 3)]
    for words in (["--levels", "4"], ["--tasks", "frozenlake:4"]):
        with pytest.raises(SystemExit):
            chosen(*words)


@pytest.mark.parametrize("words, message", [
    (["--samples", "2"], "need a --temperature above 0"), (["--limit", "0"], "--limit 0: wanted at least 1"),
    (["--api_base", "http://localhost:1/v1"], "wanted both"), (["--name", "../up", "--responses", "x"], "it names a folder"),
    (["--responses", "nowhere.jsonl"], "cannot read --responses"), (["--merge_to", "m", "--adapter", "base"], "wants one run"),
    (["--adapter", "a/run", "b/run"], "two runs are called 'run'"),
])
def test_bad_flags(data, words, message, capsys):
    with pytest.raises(SystemExit) as stop:
        run(*words, "--data", data)
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_a_killed_run_goes_on_to_the_same_bytes(data, tmp_path, monkeypatch, capsys):
    """Sampled answers, two per row, batches of 3; killed in the middle, with half a line left behind."""
    words = ["--data", data, "--temperature", 1, "--samples", 2, "--micro_batch", 3, "--max_new_tokens", 12, "--input", "image", "--out", "eval"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    monkeypatch.chdir(whole)
    run(*words)
    file = broken / "eval/base-image/predictions.jsonl"
    dying = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import common, evaluate
real, calls = common.sample, []
def sample(*words):
    calls.append(1)
    return real(*words) if len(calls) < 4 else os.kill(os.getpid(), 9)
common.sample = sample
evaluate.main(evaluate.parse_args(sys.argv[1:]))"""
    killed = subprocess.run([sys.executable, "-c", dying, "--preset", "tiny", *map(str, words)], cwd=broken, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert file.read_bytes().count(b"\n") == 9 and not (broken / "eval/results.md").exists()
    with open(file, "a") as out:
        out.write('{"id": "test_maz')
    monkeypatch.chdir(broken)
    run(*words)
    assert files(whole) == files(broken)
    predictions = [json.loads(line) for line in open(file)]
    assert [(v["sample"], v["id"]) for v in predictions] == [(k, row["id"]) for k in range(2) for row in gen_data.load_rows(data, "test")]
    assert len({v["response"] for v in predictions}) > 8 and "pass@k" in (broken / "eval/results.md").read_text()

    with monkeypatch.context() as patch:                             # finished: nothing is asked, nothing changes
        patch.setattr("common.load", None)
        run(*words)
    assert files(whole) == files(broken)
    run(*words, "--max_new_tokens", 5)                               # other settings: nothing is mixed
    assert "answered under other settings" in capsys.readouterr().out
    assert file.with_name("predictions.jsonl.old").read_bytes() == files(whole)["eval/base-image/predictions.jsonl"]
    assert max(json.loads(line)["tokens"] for line in open(file)) == 5


def test_cut_and_length_are_those_of_the_tokens(data, tmp_path):
    """Greedy answers from symbols: all end; with a limit one token short of the longest, that one is cut and no other."""
    out = tmp_path / "eval"

    def answers(*more):
        run("--data", data, "--out", out, "--input", "text", "--tasks", "frozenlake", *more)
        return [json.loads(line) for line in open(out / "base-text/predictions.jsonl")]
    free = answers()
    assert not any(v["cut"] for v in free) and all(v["outcome"] == "success" for v in free)
    longest = max(v["tokens"] for v in free)
    assert [v["cut"] for v in answers("--max_new_tokens", longest - 1)] == [v["tokens"] == longest for v in free]


def test_a_response_goes_on_where_it_was_begun(data):
    """Greedy answers cut after the map and begun again with their route end as they ended; those without an answer get one."""
    local = evaluate.Local(evaluate.parse_args(["--preset", "tiny"]))
    local.wear(None)
    batch = [({"id": row["id"]}, gen_data.teacher_prompt(row, "state"), None) for row in gen_data.load_rows(data, "test")]
    whole = [line["response"] for line in local.say(batch, [""] * len(batch), 0)]
    begun = [text.split(" (", 1)[0] for text in whole]
    assert all(text.endswith("\nRoute: from") for text in begun) and len({len(text) for text in begun}) > 1
    assert [line["response"] for line in local.say(batch, begun, 0)] == whole
    asked = [(key, gen_data.perception_prompt(row, ("map",), gen_data.symbols(row)), None)
             for (key, _, _), row in zip(batch, gen_data.load_rows(data, "test"))]
    plain, forced = (local.answer(None, "x", 0, route, (0, asked)) for route in (False, True))
    for before, after in zip(plain, forced):
        if "</answer>" in before["response"]:
            assert after == before
        else:
            assert "\nRoute: from" in after["response"] and after["tokens"] > before["tokens"]
    assert any("</answer>" not in line["response"] for line in plain)


def test_merged_checkpoint_needs_nothing_of_ours(data, tmp_path):
    """An adapter that learns four answers by heart, merged: plain transformers gives them too, plain peft loads it as well."""
    import torch
    from peft import PeftModel
    from torch.nn.functional import cross_entropy
    from transformers import AutoModelForImageTextToText, AutoProcessor

    import common
    torch.manual_seed(0)
    asked, learned = ["goal", "hole", "table", "printer"], ["R,R,D", "L,U", "U,U,L,D", "PICK,R"]
    pictures = [Image.open(row["path"]) for row in gen_data.load_rows(data, "test")[::2]]
    model, processor = common.load(common.TINY, 32)
    model = common.add_lora(model, 8, vision=True).train()
    prompt, (ids, mask) = common.encode(processor, asked, pictures), common.encode_responses(processor, learned)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
    for _ in range(25):
        cross_entropy(common.network(model).lm_head(common.response_hidden(model, prompt, ids, mask)), ids[mask.bool()]).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(tmp_path / "run/adapter")
    model = common.add_lora(common.load(common.TINY, 16)[0], path=str(tmp_path / "run/adapter")).eval()
    assert common.decode(processor, *common.sample(model, processor, prompt, 20, 0)) == learned
    with model.disable_adapter():
        assert common.decode(processor, *common.sample(model, processor, prompt, 20, 0)) != learned

    run("--adapter", tmp_path / "run", "--merge_to", tmp_path / "merged")
    plain, reader = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged"), AutoProcessor.from_pretrained(tmp_path / "merged")
    assert plain.dtype == torch.bfloat16 and not any("lora" in name for name in plain.state_dict())

    def answers(model):
        texts = []
        for text, picture in zip(asked, pictures):
            chat = [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": text}]}]
            batch = reader.apply_chat_template(chat, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt")
            ids = model.generate(**batch, do_sample=False, max_new_tokens=20)
            texts.append(reader.decode(ids[0, batch["input_ids"].shape[1]:], skip_special_tokens=True))
        return texts
    assert answers(plain) == learned
    base = AutoModelForImageTextToText.from_pretrained(common.TINY, dtype=torch.bfloat16)
    assert answers(PeftModel.from_pretrained(base, tmp_path / "run/adapter")) == learned
    with pytest.raises(SystemExit):                                  # never over something that is there
        run("--adapter", tmp_path / "run", "--merge_to", tmp_path / "merged")
