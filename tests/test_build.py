"""tiny/build.py: what of the bundled backbone can be made again."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoProcessor

import common
from tiny import build

ROOT = Path(__file__).parents[1]


def test_every_process_makes_the_same_tokenizer():
    """Python iterates a set of texts in another order in every process."""
    program = "from tiny import build; print(build.build_tokenizer().backend_tokenizer.to_str())"
    processes = []
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        processes.append(subprocess.Popen([sys.executable, "-c", program], cwd=ROOT,
                                          env=environment, stdout=subprocess.PIPE))
    one, other = (process.communicate()[0] for process in processes)
    assert one == other and len(one) > 10_000


def test_a_new_checkpoint_has_the_bundled_ones_form(tiny, tmp_path, monkeypatch):
    """Its shapes, settings and template; with its tokenizer in place of a new one, all the same."""
    model, processor = tiny
    monkeypatch.setattr(build, "build_tokenizer", lambda: processor.tokenizer)
    made, _ = build.build_checkpoint(tmp_path)
    shapes = [{name: weight.shape for name, weight in net.state_dict().items()}
              for net in (model, made)]
    assert shapes[0] == shapes[1]
    configs = []
    for folder in (common.TINY, tmp_path):
        config = AutoConfig.from_pretrained(folder).to_dict()
        configs.append({name: value for name, value in config.items() if "name" not in name})
    assert configs[0] == configs[1]
    again = AutoProcessor.from_pretrained(tmp_path)
    assert again.chat_template == processor.chat_template
    common.load(str(tmp_path), 32)


@pytest.mark.parametrize("split", ["val", "test"])
def test_pretraining_sees_no_held_out_board(split):
    rows = [row for board in build.BOARDS for row in build.board_pool(*board, 20, seed=0)]
    assert len(rows) == 20 * len(build.BOARDS)
    assert not [row for row in rows if build.gen_data.split_of(row.task, row.puzzle) == split]
