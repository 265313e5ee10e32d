"""The README's pictures from a made-up evaluation and log."""
import json

import pytest
from PIL import Image

import gen_data
from tools import figures


def test_pictures_from_files(tmp_path, capsys):
    """A success, a violation, no answer; of each task the first puzzle of its largest size."""
    gen_data.main(gen_data.parse_args([
        "--preset", "tiny", "--tasks", "frozenlake:3", "maze:3-4", "--train", "1", "--val", "1",
        "--test", "3", "--out", str(tmp_path / "data")]))
    rows = gen_data.load_rows(tmp_path / "data", "test")
    texts = {"right": lambda row: row.response(), "wrong": lambda row: "<answer>U,U,U,U</answer>",
             "silent": lambda row: "the map is white"}
    for name, text in texts.items():
        lines = [{"id": row.id, "response": text(row), **row.judge(text(row))}
                 for row in rows]
        (tmp_path / "eval" / name).mkdir(parents=True)
        file = tmp_path / "eval" / name / "predictions.jsonl"
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    line = {"level": None, "bucket": None, "success": 0.5, "success_ci": None}
    table = [{**line, "task": task, "level": level}
             for task, level in (("maze", None), ("macro", None), ("maze", 3))]
    (tmp_path / "eval/results.json").write_text(json.dumps(
        {"conditions": {name: {"table": table} for name in ("base-image", "base-text")}}))
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.jsonl").write_text("".join(json.dumps({
        "step": i + 1, "success": i / 20, "optimal": i / 30, "kl_map": 1 / (i + 1),
        "kl_route": None, "kl_answer": 2 / (i + 1)}) + "\n" for i in range(20)))
    words = ["--eval", str(tmp_path / "eval"), "--distill", str(tmp_path / "run"), "--data",
             str(tmp_path / "data"), "--out", str(tmp_path / "docs"), "--conditions", *texts]
    figures.main(figures.parse_args(words))
    for name in ("method", "success", "answers", "training"):
        width, height = Image.open(tmp_path / f"docs/{name}.png").size
        assert width > height / 2 > 80
    chosen = figures.choose_puzzles(rows, {row.id for row in rows})
    assert [(row.task, row.level) for row in chosen] == [("frozenlake", 3), ("maze", 4)]
    assert chosen[1] is next(row for row in rows if row.level == 4)
    for more, message in ((["--conditions", "y"], "y/predictions"),
                          (["--distill", "z"], "z/metrics.jsonl")):
        with pytest.raises(SystemExit) as stop:
            figures.main(figures.parse_args([*words, *more]))
        assert stop.value.code == 2 and message in capsys.readouterr().err
