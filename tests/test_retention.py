"""tools.retention: what the bundled backbone could do before training, asked again."""
import json
from pathlib import Path

import pytest
from conftest import stops

from tools import retention

RUN = str(Path(__file__).parents[1] / "docs/run/distill")


def test_the_base_and_a_run(tmp_path, capsys):
    """A line each; all answers, question by question, in the file."""
    words = ["--adapter", "base", RUN, "--count", "7", "--out", str(tmp_path / "out")]
    retention.main(retention.parse_args(words))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines[-2:]] == ["base", "distill"]
    results = json.loads((tmp_path / "out/retention.json").read_text())
    for name, kinds in results.items():
        for numbers in kinds.values():
            assert len(numbers["right"]) == 7 and name in ("base", "distill")
            low, high = numbers["exact_ci"]
            assert 0 <= low <= numbers["exact"] == sum(numbers["right"]) / 7 <= high <= 1
    assert sum(results["base"]["symbols"]["right"]) >= 5     # it was made to read symbols


@pytest.mark.parametrize("flag", ["--data", "--seed"])
def test_there_is_no_flag_that_is_not_read(capsys, flag):
    assert "unrecognized arguments" in stops(capsys, retention.parse_args, [flag, "1"])
