"""Verdicts and rates against hand-made responses."""
import numpy as np
import pytest

import evaluate
from gen_data import response

ROW = {"id": "a", "task": "frozenlake", "level": 3, "state": {"grid": ["SFF", "FHF", "FFG"]}, "plan": ["D", "D", "R", "R"]}
MAP = "Map: 3x3\nrow 0: S F F\nrow 1: F H F\nrow 2: F F G"


@pytest.mark.parametrize("text, outcome, optimal, state_right", [
    (response(ROW), "success", True, True),
    (MAP + "\nRoute: R.\n<answer>R,R,D,D</answer>", "success", True, True),               # another shortest plan
    (MAP + "\nRoute: R.\n<answer>R,L,D,D,R,R</answer>", "success", False, True),          # a detour
    (MAP.replace("H", "F") + "\nRoute: D.\n<answer>D,R</answer>", "hole", False, False),
    (MAP, "no answer", False, True),
    ("", "no answer", False, False),
])
def test_judge(text, outcome, optimal, state_right):
    verdict = evaluate.judge(ROW, text)
    assert (verdict["outcome"], verdict["optimal"], verdict["state_right"]) == (outcome, optimal, state_right)


def test_rates_by_hand():
    """Two tasks: 3 rows with 2 successes (1 optimal), 1 row with none; the macro average weighs tasks, not rows."""
    good, long, none = (evaluate.judge(ROW, text) for text in (
        "<answer>D,D,R,R</answer>", "<answer>R,L,D,D,R,R</answer>", "nothing"))
    verdicts = [good, long, none, none | {"task": "maze", "level": 4}]
    rows = {(r["task"], r["level"]): r for r in evaluate.summarise("base", "image", verdicts)}
    assert rows["frozenlake", 3]["success"] == pytest.approx(2 / 3) and rows["frozenlake", None]["optimal"] == pytest.approx(1 / 3)
    assert rows["maze", 4] | {"success": 0, "parsed": 0, "n": 1} == rows["maze", 4]
    assert rows["macro", None]["success"] == pytest.approx(1 / 3) and rows["macro", None]["n"] == 4


def test_paired_interval_covers_the_difference():
    """Against the normal approximation of the mean of 400 paired differences."""
    rng = np.random.default_rng(0)
    wins = rng.random((2, 400)) < [[0.8], [0.6]]
    a, b = ([{"outcome": "success" if win else "hole"} for win in row] for row in wins)
    difference = wins[0].astype(float) - wins[1]
    half = 1.96 * difference.std() / 20
    low, high = evaluate.paired_interval(a, b)
    assert low == pytest.approx(100 * (difference.mean() - half), abs=1) and high == pytest.approx(100 * (difference.mean() + half), abs=1)
