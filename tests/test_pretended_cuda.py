"""On a pretended CUDA device: every tensor where it belongs, and what a decoded token launches."""
import numpy as np
import pytest
import torch
from conftest import adapted, make_rows
from pretend_cuda import pretended

import coldstart
import common
import distill
import evaluate


def test_it_refuses_what_cuda_refuses():
    with pretended() as counts:
        x = torch.ones(3, device="cuda")
        assert x.device == torch.device("cuda", 0) and (x + 1).is_cuda
        with pytest.raises(RuntimeError, match="same device"):
            x + torch.ones(3)
        with pytest.raises(TypeError, match="numpy"):
            x.numpy()
        with pytest.raises(RuntimeError, match="indices"):
            torch.ones(3)[torch.zeros(1, dtype=torch.long, device="cuda")]
        counts.clear()
        assert (x + 1).cpu().tolist() == [2, 2, 2] and (x * 2).sum().item() == 6
        assert counts["wait: copy between host and device"] == 1
        assert counts["aten.add.Tensor"] == 1 and counts["aten.mul.Tensor"] == 1
        assert counts["wait: aten._local_scalar_dense.default"] == 1
    assert not torch.cuda.is_available() or torch.version.cuda


def kernels(counts):
    return sum(count for name, count in counts.items() if not name.startswith("wait"))


def test_a_decoded_token_waits_for_nothing_and_launches_little():
    """Of the decoder that CUDA takes: light adapters, two kernels more per adapted linear."""
    found = {}
    with pretended() as counts, torch.no_grad():
        model, processor = common.load(common.TINY, 32)
        model = adapted(model, vision=False)
        rows, images = make_rows(3)
        prompt = common.encode(processor, [row.student_prompt() for row in rows], images, "cuda")
        for name, context in (("light", common.light_adapters(model)),
                              ("off", model.disable_adapter())):
            with context:
                decoder = common.GraphDecoder(common.network(model), prompt, 8)
                token = decoder.logits.argmax(-1)
                decoder.step(token)
                counts.clear()
                decoder.step(token)
                found[name] = kernels(counts)
                assert not [kind for kind in counts if kind.startswith("wait")]
    layers = common.network(model).config.text_config.num_hidden_layers
    assert 0 < found["light"] - found["off"] <= 2 * 7 * layers


def test_sampled_tokens_are_those_of_the_cpu():
    """Several EOS tokens, one of which is the padding; rows end and leave the batch."""
    uniforms, found = np.random.default_rng(0).random((5, 24)), []
    rows, images = make_rows(5)
    texts = [row.student_prompt() for row in rows]

    def roll(device):
        model, processor = common.load(common.TINY, 32)
        ends = [processor.tokenizer.eos_token_id, processor.tokenizer.pad_token_id]
        model.generation_config.eos_token_id = ends
        model = adapted(model)
        prompt = common.encode(processor, texts, images, device)
        ids, mask, drawn = common.sample(model, processor, prompt, 24, uniforms, rollout_batch=3)
        found.append([ids.cpu(), mask.cpu(), (drawn * mask).cpu()])
    roll("cpu")
    with pretended():
        roll("cuda")
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("bits", ["32", "16", "4"])
def test_both_stages_a_resume_and_an_evaluation(toy_data, tmp_path, bits):
    words = ["--preset", "tiny", "--bits", bits, "--data", str(toy_data), "--batch", "2",
             "--micro_batch", "2", "--max_new_tokens", "8"]
    cold, out = str(tmp_path / "cold"), str(tmp_path / "out")
    with pretended():
        coldstart.main(coldstart.parse_args([*words, "--steps", "1", "--out", cold]))
        for steps in ("1", "2"):
            distill.main(distill.parse_args([
                *words, "--steps", steps, "--init", cold, "--out", out, "--teacher_weights",
                "ema"]))
        evaluate.main(evaluate.parse_args([
            "--preset", "tiny", "--bits", bits, "--data", str(toy_data), "--limit", "1",
            "--max_new_tokens", "8", "--adapter", "base", out, "--out", str(tmp_path / "eval")]))
    assert (tmp_path / "eval/results.md").is_file()
    assert len((tmp_path / "out/metrics.jsonl").read_text().splitlines()) == 2
