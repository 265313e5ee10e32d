"""Two whole steps of each stage's main against a plain re-implementation of them.

The reference takes every row alone, with transformers' own forward pass, dense logits, autograd in
float64, torch's own AdamW and clipping and the schedule's formula; of the run it takes only the
sampled tokens.
"""
import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy, kl_div

import coldstart
import common
import distill
import gen_data

STEPS, LR, CLIP = 2, 1e-3, 0.02
SHARED = ["--preset", "tiny", "--steps", STEPS, "--lr", LR, "--max_grad_norm", CLIP, "--batch", 5,
          "--micro_batch", 2, "--lora_rank", 4, "--save_every", 1, "--seed", 3]


@pytest.fixture
def watched(monkeypatch):
    """Of each step: the sampled (ids, mask), the numbers they were drawn by, the new adapters."""
    seen = {"tokens": [], "uniforms": [], "adapters": []}
    sample, save = common.sample, common.Run.save

    def sample_and_keep(model, processor, *words, **more):
        ids, mask, drawn = sample(model, processor, *words, **more)
        seen["uniforms"].append(words[2])
        for i in range(0, len(ids), 2):  # every other row ends: ragged, whatever the backbone says
            ids[i, 3 + 5 * i] = processor.tokenizer.eos_token_id
            ids[i, 4 + 5 * i:] = processor.tokenizer.pad_token_id
            mask[i] = (torch.arange(ids.shape[1]) < 4 + 5 * i).long()
        seen["tokens"].append((ids, mask, drawn))
        return ids, mask, drawn

    def save_and_keep(run):
        assert all(weight.grad is None for weight in run.model.parameters())  # none is left over
        seen["adapters"].append({name: weight.detach().clone() for name, weight
                                 in run.model.named_parameters() if weight.requires_grad})
        return save(run)
    monkeypatch.setattr(common, "sample", sample_and_keep)
    monkeypatch.setattr(distill, "MAX_GAP", math.inf)             # some are not as sampled
    monkeypatch.setattr(common.Run, "save", save_and_keep)
    return seen


def run(stage, data, out, *words):
    """The stage's main -> its lines in metrics.jsonl."""
    words = [*SHARED, "--data", data, "--out", out, *words]
    stage.main(stage.parse_args([str(word) for word in words]))
    return [json.loads(line) for line in open(out / "metrics.jsonl")]


def reference_model():
    """(model in float64 with the adapter that a run with --seed 3 begins with, processor)."""
    model, processor = common.load(common.TINY, 32)
    torch.manual_seed(3)
    return common.add_lora(model, 4, vision=True).double(), processor


def logits_alone(model, processor, text, picture, answer):
    """transformers' logits [T, vocabulary] that predict the tokens `answer` [T] after a prompt."""
    content = [{"type": "text", "text": text}]
    if picture is not None:
        content.insert(0, {"type": "image", "image": picture})
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=True, add_generation_prompt=True,
        return_dict=True, return_tensors="pt")
    more = answer[None]
    prompt["input_ids"] = torch.cat([prompt["input_ids"], more], 1)
    prompt["attention_mask"] = torch.ones_like(prompt["input_ids"])
    prompt["mm_token_type_ids"] = torch.cat([prompt["mm_token_type_ids"], 0 * more], 1)
    network = model.get_base_model()
    network.model.rope_deltas = None
    return network(**prompt).logits[0, -len(answer) - 1:-1]


def schedule(step):
    """Warm-up over the first step, then half a cosine that would end after the last one."""
    return LR if step == 0 else LR * (1 + math.cos(math.pi * step / STEPS)) / 2


def take_steps(model, losses_of_step, lines, adapters):
    """Take the reference's steps; compare loss, gradient norm, rate and adapters after each."""
    named = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    optimizer = torch.optim.AdamW(named.values(), lr=1.0, weight_decay=0)
    assert len(lines) == len(adapters) == STEPS
    for step in range(STEPS):
        before = {name: weight.detach().clone() for name, weight in named.items()}
        differentiated, logged = losses_of_step(step)
        differentiated.backward()
        norm = torch.nn.utils.clip_grad_norm_(named.values(), CLIP)
        optimizer.param_groups[0]["lr"] = schedule(step)
        optimizer.step()
        optimizer.zero_grad()
        line = lines[step]
        assert norm > CLIP  # the clipping has something to do
        assert line["loss"] == pytest.approx(differentiated.item(), rel=1e-4)
        for name, value in logged.items():
            assert line[name] == pytest.approx(value.item(), rel=1e-4), name
        assert line["grad_norm"] == pytest.approx(norm.item(), rel=1e-3)
        assert line["lr"] == pytest.approx(schedule(step), rel=1e-12)
        # AdamW's first steps are about as long for a gradient of 1e-7 as for one of 1: single
        # numbers may differ, the whole may not.
        moved = torch.cat([(named[name] - before[name]).flatten() for name in named])
        gone = torch.cat([(adapters[step][name] - before[name]).flatten() for name in named])
        assert (moved - gone).norm() < 0.01 * moved.norm()
        assert ((moved - gone).abs() < 0.01 * schedule(step)).double().mean() > 0.99


def rows_of_step(rows, step):
    """What (seed, step) gives: rows, none twice, sorted, and a number for every token."""
    rng = np.random.default_rng([3, step])
    batch = [rows[i] for i in rng.choice(len(rows), 5, replace=False)]
    rng.random()  # on policy?
    return sorted(batch, key=lambda row: (row.task, row.level)), rng.random((5, 24))


def textbook(name, log_p, log_q, token, drawn):
    """(what is differentiated, the reverse KL), each [T], on float64 log-probabilities.

    A divergence without a form of its own here is taken as distill.py has it: the rest is checked.
    """
    def kl(log_a, log_b):
        return kl_div(log_b, log_a, log_target=True, reduction="none").sum(-1)
    log_m = (0.5 * log_q.exp() + 0.5 * log_p.exp()).log()
    advantage = (log_q - log_p).gather(1, token[:, None])[:, 0].detach()
    forms = {"reverse_kl": lambda: kl(log_p, log_q), "forward_kl": lambda: kl(log_q, log_p),
             "jsd": lambda: 0.5 * kl(log_q, log_m) + 0.5 * kl(log_p, log_m),
             "sampled": lambda: -advantage * log_p.gather(1, token[:, None])[:, 0]}
    other = distill.DIVERGENCES[name]
    return forms.get(name, lambda: other(log_p, log_q, token, drawn))(), kl(log_p, log_q)


@pytest.mark.parametrize("name", distill.DIVERGENCES)
def test_two_steps_of_distillation(toy_data, tmp_path, watched, monkeypatch, name):
    monkeypatch.setattr(distill, "SHOW_EVERY", 1)
    lines = run(distill, toy_data, tmp_path, "--init", "none", "--divergence", name,
                "--max_new_tokens", 24, "--rollout_batch", 3, "--chunk", 7, "--eval_every", 0)
    logged_ids = [[], []]
    for line in open(tmp_path / "rollouts.jsonl"):
        line = json.loads(line)
        logged_ids[line["step"] - 1].append(line["id"])
    rows = gen_data.load_rows(toy_data, "train")
    model, processor = reference_model()

    def losses_of_step(step):
        losses, kls, entropies = [], [], []
        batch, uniforms = rows_of_step(rows, step)
        assert np.array_equal(watched["uniforms"][step], uniforms)
        assert [row.id for row in batch] == logged_ids[step]
        ids, mask, drawn = watched["tokens"][step]
        assert len(set(mask.sum(1).tolist())) > 2
        for i, row in enumerate(batch):
            answer = ids[i][mask[i].bool()]
            picture = gen_data.open_picture(row.path)
            log_p = logits_alone(model, processor, row.student_prompt(), picture,
                                 answer).log_softmax(-1)
            with torch.no_grad(), model.disable_adapter():
                log_q = logits_alone(model, processor, row.teacher_prompt("symbols+plan"),
                                     None, answer).log_softmax(-1)
            loss, kl = textbook(name, log_p, log_q, answer, drawn[i][mask[i].bool()])
            losses.append(loss)
            kls.append(kl)
            entropies.append(-(log_p.exp() * log_p).sum(-1))
        return torch.cat(losses).mean(), {
            "kl": torch.cat(kls).mean(), "entropy": torch.cat(entropies).mean(),
            "length": mask.sum() / 5.0}
    take_steps(model, losses_of_step, lines, watched["adapters"])
    assert set(logged_ids[0]) != set(logged_ids[1])


@pytest.mark.usefixtures("no_validation")
def test_two_steps_of_the_cold_start(toy_data, tmp_path, watched, monkeypatch):
    asked, encode = [], coldstart.encode

    def encode_and_keep(processor, examples, device):
        asked.append([(row.id, names) for row, names in examples])
        return encode(processor, examples, device)
    monkeypatch.setattr(coldstart, "encode", encode_and_keep)
    lines = run(coldstart, toy_data, tmp_path, "--max_new_tokens", 24)
    rows = gen_data.load_rows(toy_data, "train")
    model, processor = reference_model()
    end = processor.tokenizer.eos_token_id

    def losses_of_step(step):
        examples = coldstart.draw_examples(rows, 5, np.random.default_rng([3, step]), 0.6)
        assert [(row.id, names) for row, names in examples] == asked[step]
        losses = []
        for row, names in examples:
            text = row.answers(names)
            answer = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
            answer = torch.tensor([*answer, end])
            logits = logits_alone(model, processor, row.ask(names),
                                  gen_data.open_picture(row.path), answer)
            losses.append(cross_entropy(logits, answer, reduction="none"))
        assert len({len(loss) for loss in losses}) > 2
        return torch.cat(losses).mean(), {}
    take_steps(model, losses_of_step, lines, watched["adapters"])
    assert asked[0] != asked[1]


# ---------------------------------------------------------------- the flags

def adapter(stage, data, out, *words):
    """The adapter after two short steps, as one vector."""
    words = ["--preset", "tiny", "--data", data, "--out", out, "--steps", 2, "--batch", 2,
             "--micro_batch", 2, "--max_new_tokens", 5, "--lora_rank", 2, *words]
    stage.main(stage.parse_args([str(word) for word in words]))
    weights = load_file(out / "adapter/adapter_model.safetensors")
    return torch.cat([weights[name].flatten() for name in sorted(weights)])


@pytest.fixture(scope="module")
def no_validation():
    """The cold start without validation."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(coldstart, "validate", lambda *words: {})
        yield


@pytest.fixture(scope="module")
def plain(toy_data, tmp_path_factory, no_validation):
    """{stage: adapter} without further flags, distill from a fresh one; and their folder."""
    folder = tmp_path_factory.mktemp("plain")
    return {"coldstart": adapter(coldstart, toy_data, folder / "coldstart"),
            "distill": adapter(distill, toy_data, folder / "distill", "--init", "none")}, folder


def differs(one, other):
    return one.shape != other.shape or not torch.equal(one, other)


EVERY_STAGE = ["--seed 1", "--lr 1e-4", "--max_grad_norm 0.01", "--batch 3", "--lora_rank 3",
               "--lora_vision 0", "--steps 3"]


@pytest.mark.parametrize("words", [*EVERY_STAGE, "--map_share 0"])
def test_a_flag_of_the_cold_start_changes_the_result(toy_data, tmp_path, plain, words):
    assert differs(adapter(coldstart, toy_data, tmp_path, *words.split()), plain[0]["coldstart"])


@pytest.mark.parametrize("words", [
    *EVERY_STAGE, "--max_new_tokens 4", "--teacher_reads symbols", "--teacher_weights live",
    "--teacher_weights ema",
    "--divergence forward_kl", "--divergence sampled", "--divergence jsd",
    "--on_policy 0 --max_new_tokens 20", "--tasks maze", "--init coldstart"])
def test_a_flag_of_distillation_changes_the_result(toy_data, tmp_path, plain, words):
    if "--init" in words:
        words = f"--init {plain[1]}/coldstart"
    other = adapter(distill, toy_data, tmp_path, "--init", "none", *words.split())
    assert differs(other, plain[0]["distill"])
    if "--on_policy" in words:  # the flag alone changes it
        words = ["--init", "none", *words.replace("--on_policy 0 ", "").split()]
        assert differs(other, adapter(distill, toy_data, tmp_path / "without", *words))


def test_other_flags_do_not(toy_data, tmp_path, monkeypatch):
    """With plain gradient steps: Adam divides a gradient that is rounding by itself."""
    monkeypatch.setattr(common, "adamw", torch.optim.SGD)
    words = ["--init", "none", "--lr", 0.1]
    alone = adapter(distill, toy_data, tmp_path / "alone", *words)
    other = adapter(distill, toy_data, tmp_path / "other", *words, "--save_every", 1,
                    "--eval_every", 1, "--chunk", 500, "--micro_batch", 1, "--rollout_batch", 1)
    torch.testing.assert_close(other, alone, atol=1e-6, rtol=0)
    jsd = adapter(distill, toy_data, tmp_path / "jsd", *words, "--divergence", "jsd")
    assert (jsd - alone).abs().max() > 1e-3  # a step is that long
