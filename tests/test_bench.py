"""The benchmarks that are run by hand: what they print of files."""
import json

import bench_gpu
import pytest
import torch
from conftest import stops

import common
from tools import estimate


def test_the_row_of_a_run(tmp_path, capsys):
    """Hours of both trainings, and success over all tasks, rounded as everywhere."""
    for stage in ("coldstart", "distill"):
        (tmp_path / stage).mkdir()
        (tmp_path / stage / "args.json").write_text('{"versions": {"device": "Some card"}}')
        lines = ['{"step": 1, "step_seconds": 1800.0}', '{"step": 2, "left_out": true}']
        (tmp_path / stage / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    conditions = {}
    for stage, success in (("base", 0.125), ("coldstart", 0.5), ("distill", 0.965)):
        table = [{"task": "maze", "bucket": None, "success": 0},
                 {"task": "macro", "bucket": None, "success": success},
                 {"task": "macro", "bucket": "easy", "success": 1}]
        conditions[f"{stage}-image"] = {"table": table}
    words = ["--row", str(tmp_path)]
    assert "--row" in stops(capsys, bench_gpu.main, bench_gpu.parse_args(words))  # not evaluated
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval/results.json").write_text(json.dumps({"conditions": conditions}))
    bench_gpu.main(bench_gpu.parse_args(words))
    assert capsys.readouterr().out == "| Some card | 1.00 | 13% -> 50% -> 97% |\n"


@pytest.mark.parametrize("has_bfloat16", [True, False])
def test_random_weights_have_the_precision_of_the_card(has_bfloat16, monkeypatch):
    dtype = torch.bfloat16 if has_bfloat16 else torch.float16
    monkeypatch.setattr(common, "compute_dtype", lambda bits: dtype)
    config = estimate.configuration(common.TINY)
    for bits in (4, 16):
        model = bench_gpu.random_network(config, bits, "cpu")
        assert model.lm_head.weight.dtype == dtype
        layer = model.model.language_model.layers[0].mlp.up_proj
        assert (layer.compute_dtype if bits == 4 else layer.weight.dtype) == dtype
