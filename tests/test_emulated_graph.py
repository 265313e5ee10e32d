"""GraphDecoder with a graph that is captured: the tokens of steps that are not, and planted faults
are found by the sampling gap.
"""
from pathlib import Path

import numpy as np
import pytest
import torch
from emulated_graph import emulated

import common
import gen_data
from distill import MAX_GAP

ROWS, TOKENS = 9, 60


@pytest.fixture(scope="module", params=[32, 4])
def loaded(request):
    model, processor = common.load("tiny", request.param)
    model = common.add_lora(model, path=Path(common.TINY).parent / "docs/run/distill/adapter")
    return model.eval(), processor


@pytest.fixture(scope="module")
def prompt(loaded):
    rows = []
    for task, level in (("frozenlake", 3), ("maze", 3), ("minibehaviour", 5)):
        rows += gen_data.sample_rows(task, level, "test", ROWS // 3, seed=5)
    pictures = [row.puzzle.render(32) for row in rows]
    return common.encode(loaded[1], [row.student_prompt() for row in rows], pictures)


def draw(loaded, prompt, monkeypatch, captured, tokens=TOKENS, decoder=common.GraphDecoder):
    monkeypatch.setattr(common, "captured", captured)
    monkeypatch.setattr(common, "decoder_of", lambda net: (decoder, 2))
    uniforms = np.random.default_rng(7).random((ROWS, tokens))
    return common.sample(*loaded, prompt, tokens, uniforms)


def gap_of_rows(loaded, prompt, sampled):
    """The mean distance of each row's tokens from their scores [rows], as distill.py's log has."""
    ids, mask, drawn = sampled
    hidden = common.response_hidden(loaded[0], prompt, ids, mask)
    log_p = common.head(loaded[0])(hidden).float().log_softmax(-1)
    scored = log_p.gather(1, ids[mask.bool()][:, None])[:, 0]
    gaps = (scored - drawn[mask.bool()]).abs().split(mask.sum(1).tolist())
    return torch.stack([gap.mean() for gap in gaps]).detach()


def test_a_captured_step_draws_what_a_step_draws(loaded, prompt, monkeypatch):
    captures = []

    def counted(work):
        captures.append(work)
        return emulated(work)
    plain = draw(loaded, prompt, monkeypatch, lambda work: work)
    graph = draw(loaded, prompt, monkeypatch, counted)
    assert all(torch.equal(one, other) for one, other in zip(plain, graph, strict=True))
    assert len(captures) > 2                  # rows left the batch, and a new graph was captured
    assert len(set(graph[1].sum(1).tolist())) > 3
    limit = 1e-4 if loaded[0].dtype == torch.float32 else 0.1
    assert gap_of_rows(loaded, prompt, graph).max() < limit


class ColumnOffByOne(common.GraphDecoder):
    def __init__(self, *words):
        super().__init__(*words)
        self.column -= 1


class PositionNotAdvanced(common.GraphDecoder):
    def read_token(self):
        super().read_token()
        self.position.sub_(1)


class KeysRolledAfterDrop(common.GraphDecoder):
    def keep(self, going):
        super().keep(going)
        for layer in self.cache.layers:
            layer.keys, layer.values = layer.keys.roll(1, 0), layer.values.roll(1, 0)


class TokenNotReadAfterDrop(common.GraphDecoder):
    dropped = False

    def keep(self, going):
        super().keep(going)
        self.dropped = True

    def step(self, token):
        super().step(torch.zeros_like(token) if self.dropped else token)


@pytest.mark.parametrize("fault", [
    ColumnOffByOne, PositionNotAdvanced, KeysRolledAfterDrop, TokenNotReadAfterDrop])
def test_a_planted_fault_is_found(loaded, prompt, monkeypatch, fault):
    """The worst row's mean is above what a run accepts in its first step.

    A constant shift of all positions by one is not in the list: this backbone hardly minds it.
    """
    sampled = draw(loaded, prompt, monkeypatch, emulated, decoder=fault)
    assert gap_of_rows(loaded, prompt, sampled).max() > MAX_GAP


def test_the_emulation_sees_what_only_a_capture_changes():
    memory = torch.zeros(3)
    replay = emulated(lambda: memory.add_(1))
    assert memory.tolist() == [0, 0, 0]                    # recording did nothing
    replay()
    replay()
    assert memory.tolist() == [2, 2, 2]
    state = {"count": 0, "result": None}

    def keeps_a_result():
        state["count"] += 1
        state["result"] = memory * 2
    replay = emulated(keeps_a_result)
    assert state["result"].isnan().all() and state["count"] == 1
    replay()
    assert state["result"].tolist() == [4, 4, 4] and state["count"] == 1   # no Python again
    with pytest.raises(RuntimeError, match="waits"):
        emulated(lambda: float(memory.sum()))
