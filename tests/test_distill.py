"""The distillation step: the divergences, the sliced loss, its alignment and the options, against independent references."""
import json
from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
import torch
from torch.nn.functional import kl_div

import common
import distill
import gen_data
from bench_distill import qwen_checkpoint
from distill import DIVERGENCES, forward_kl, jsd, reverse_kl, sampled
from gen_data import response, student_prompt, teacher_prompt
from test_model import make_rows


# ---------------------------------------------------------------- divergences

def log_probs(*shape, scale=1.0, dtype=torch.float32):
    return (scale * torch.randn(*shape, dtype=dtype)).log_softmax(-1)


def by_torch(log_a, log_b):
    """KL(a || b) by torch: kl_div takes its arguments the other way round."""
    return kl_div(log_b, log_a, log_target=True, reduction="none").sum(-1)


def dense(name, z, log_q, token, beta):
    """The loss as a textbook writes it, on probabilities, for autograd to differentiate in float64."""
    p, q = z.softmax(-1), log_q.exp()
    m = beta * q + (1 - beta) * p
    if name == "sampled":
        log_p = z.log_softmax(-1).gather(1, token[:, None])[:, 0]
        return -(log_q.gather(1, token[:, None])[:, 0] - log_p).detach() * log_p
    return {"reverse_kl": lambda: by_torch(p.log(), log_q), "forward_kl": lambda: by_torch(log_q, p.log()),
            "jsd": lambda: beta * by_torch(log_q, m.log()) + (1 - beta) * by_torch(p.log(), m.log())}[name]()


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("beta", [0.1, 0.5, 0.8])
def test_values_and_gradients_against_autograd(name, beta):
    torch.manual_seed(0)
    z, log_q = torch.randn(7, 50, dtype=torch.float64, requires_grad=True), log_probs(7, 50, dtype=torch.float64)
    token = torch.randint(50, (7,))
    log_p = z.detach().log_softmax(-1)
    kept = log_p.clone(), log_q.clone()
    value, gradient = DIVERGENCES[name](log_p, log_q, token, **({"beta": beta} if name == "jsd" else {}))
    assert torch.equal(log_p, kept[0]) and torch.equal(log_q, kept[1])  # pure: nothing was written into the arguments
    loss = dense(name, z, log_q, token, beta)
    loss.sum().backward()
    torch.testing.assert_close(gradient, z.grad, atol=1e-12, rtol=1e-9)
    if name == "sampled":  # its value is the estimate of the reverse KL, not the surrogate that is differentiated
        loss = (log_p - log_q)[range(7), token]
    torch.testing.assert_close(value, loss.detach(), atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl", "jsd"])
def test_float32_at_the_real_vocabulary(name):
    """Near the float64 value, zero for equal inputs, never below -1e-6: also where p and q are almost the same."""
    for seed, (scale, noise) in enumerate([(0.01, 1e-4), (0.3, 1e-4), (1.0, 1e-3), (5.0, 0.1), (5.0, 3.0)]):
        torch.manual_seed(seed)
        z = scale * torch.randn(4, 151_936)
        other = z + noise * torch.randn_like(z)
        value, _ = DIVERGENCES[name](z.log_softmax(-1), other.log_softmax(-1))
        exact, _ = DIVERGENCES[name](z.double().log_softmax(-1), other.double().log_softmax(-1))
        torch.testing.assert_close(value, exact.float(), atol=1e-6, rtol=1e-4)
        assert value.min() >= -1e-6
        value, gradient = DIVERGENCES[name](z.log_softmax(-1), z.log_softmax(-1))
        assert value.abs().max() < 1e-6 and gradient.abs().max() < 1e-6


@pytest.mark.parametrize("name", DIVERGENCES)
def test_extreme_logits_are_finite(name):
    one = torch.full((2, 4), -1e4)
    one[0, 0] = one[1, 3] = 1e4
    log_p, log_q = one.log_softmax(-1), one.flip(0).log_softmax(-1)     # p and q are certain, of different tokens
    assert log_p.exp().min() == 0
    value, gradient = DIVERGENCES[name](log_p, log_q, torch.tensor([0, 1]))
    assert value.isfinite().all() and gradient.isfinite().all()
    if name == "jsd":
        torch.testing.assert_close(value, torch.full((2,), np.log(2.0), dtype=torch.float32))  # its maximum at beta 0.5


def test_jsd_symmetric_and_its_limits():
    torch.manual_seed(0)
    log_p, log_q = log_probs(5, 40, dtype=torch.float64), log_probs(5, 40, dtype=torch.float64)
    torch.testing.assert_close(jsd(log_p, log_q, beta=0.5)[0], jsd(log_q, log_p, beta=0.5)[0])
    torch.testing.assert_close(jsd(log_p, log_q, beta=1e-6)[0] / 1e-6, by_torch(log_q, log_p), atol=0, rtol=1e-4)
    torch.testing.assert_close(jsd(log_p, log_q, beta=1 - 1e-6)[0] / 1e-6, by_torch(log_p, log_q), atol=0, rtol=1e-4)
    assert torch.equal(jsd(log_p, log_q, beta=0)[0], forward_kl(log_p, log_q)[0])
    assert torch.equal(jsd(log_p, log_q, beta=1)[0], reverse_kl(log_p, log_q)[0])


def test_sampled_has_the_gradient_of_reverse_kl_in_expectation():
    """Exactly: the average over every token of a small vocabulary, weighted with the student's probabilities."""
    torch.manual_seed(0)
    log_p, log_q = log_probs(3, 11, dtype=torch.float64), log_probs(3, 11, dtype=torch.float64)
    value, gradient = torch.zeros(3, dtype=torch.float64), torch.zeros(3, 11, dtype=torch.float64)
    for token in range(11):
        one, at_logits = sampled(log_p, log_q, torch.full((3,), token))
        value += log_p[:, token].exp() * one
        gradient += log_p[:, token, None].exp() * at_logits
    torch.testing.assert_close(value, by_torch(log_p, log_q))
    torch.testing.assert_close(gradient, reverse_kl(log_p, log_q)[1])


# ---------------------------------------------------------------- the sliced loss, on two backbones

def perturbed(model, vision):
    """A fresh adapter whose B matrices are not zero: it does something."""
    torch.manual_seed(0)
    model = common.add_lora(model, 4, vision=vision)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)
    return model


@pytest.fixture(scope="module", params=["tiny", "qwen"])
def backbone(request, tmp_path_factory):
    """(model, processor): the bundled backbone, then random weights with Qwen's real tokenizer and 151,936 words."""
    if request.param == "tiny":
        return common.load(common.TINY, 32)
    return common.load(str(qwen_checkpoint(tmp_path_factory.mktemp("qwen"), layers=2)), 32)


@pytest.fixture
def student(backbone):
    model = perturbed(backbone[0], vision=True)
    yield model
    model.unload()


def a_batch(processor, count=3):
    """(student's prompt, teacher's prompt, ids, mask): row 0 ends after 12 tokens, row 1 after one, row 2 was cut."""
    rows, images = make_rows(count)
    ids, mask = common.encode_responses(processor, [response(row) for row in rows])
    ids[0, 12] = processor.tokenizer.eos_token_id
    mask[0, 13:] = 0
    mask[1, 1:] = 0
    mask[2, 10:] = 0
    return (common.encode(processor, [student_prompt(row) for row in rows], images),
            common.encode(processor, [teacher_prompt(row) for row in rows]), ids, mask)


def teacher_states(model, context, ids, mask):
    with torch.no_grad(), model.disable_adapter():
        return common.response_hidden(model, context, ids, mask)


def grads(model):
    """{name: gradient} of everything that has one, removed from the model."""
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("name", DIVERGENCES)
def test_the_sliced_loss_equals_the_dense_one(backbone, student, name):
    """Loss and LoRA gradients against transformers' own [batch, time, vocabulary] logits and autograd, in float64."""
    processor, lm_head = backbone[1], common.network(student).lm_head
    prompt, context, ids, mask = a_batch(processor)
    tokens, teacher = int(mask.sum()), teacher_states(student, context, ids, mask)
    divergence = partial(jsd, beta=0.3) if name == "jsd" else DIVERGENCES[name]
    sliced = []
    for width in (1, 7, 1000) if lm_head.weight.shape[0] < 1000 else (7,):
        hidden = common.response_hidden(student, prompt, ids, mask)
        gradient, value, kl = distill.sliced_divergence(hidden.detach(), teacher, ids[mask.bool()], lm_head, divergence, width)
        hidden.backward(gradient / tokens)
        sliced.append((value, kl, grads(student)))

    start = prompt["input_ids"].shape[1]
    full = {**prompt, "input_ids": torch.cat([prompt["input_ids"], ids], 1),
            "attention_mask": torch.cat([prompt["attention_mask"], mask], 1),
            "mm_token_type_ids": torch.cat([prompt["mm_token_type_ids"], torch.zeros_like(ids)], 1)}
    logits = common.network(student)(**full, position_ids=common.positions(student, full)[0]).logits
    z = logits[:, start - 1:-1][mask.bool()].double()                              # [N, vocabulary]
    log_q = lm_head(teacher).double().log_softmax(-1).detach()
    loss = dense(name, z, log_q, ids[mask.bool()], 0.3)
    (loss.sum() / tokens).backward()
    expected = grads(student)
    assert expected and all("lora_" in key for key in expected)
    log_p = z.detach().log_softmax(-1)
    if name == "sampled":
        loss = (log_p - log_q).gather(1, ids[mask.bool()][:, None])[:, 0]
    for value, kl, found in sliced:
        torch.testing.assert_close(value, loss.detach().float(), atol=2e-5, rtol=2e-4)
        torch.testing.assert_close(kl, by_torch(log_p, log_q).float(), atol=2e-5, rtol=2e-4)
        assert found.keys() == expected.keys()
        for key in expected:
            torch.testing.assert_close(found[key], expected[key], atol=2e-6, rtol=2e-3)


# ---------------------------------------------------------------- alignment

def scores(model, prompt, ids, mask):
    """Logits [N, vocabulary] that predict the response tokens."""
    return common.network(model).lm_head(common.response_hidden(model, prompt, ids, mask))


def test_sampling_and_scoring_see_the_same_probabilities(backbone, student, monkeypatch):
    """The logits each token was drawn from, step by step with the cache, against those of the scoring pass."""
    processor, net, drawn = backbone[1], common.network(student), []
    end = processor.tokenizer.eos_token_id

    def spy(logits, temperature):
        token = draw(logits, temperature)
        token[0] = end if len(drawn) in (3, 7) else token[0]              # rows end, and leave the batch, at different times
        drawn.append(logits.log_softmax(-1).gather(1, token[:, None])[:, 0])
        return token
    draw = common.draw
    monkeypatch.setattr(common, "draw", spy)
    prompt = a_batch(processor)[0]
    torch.manual_seed(3)
    with torch.no_grad():
        ids, mask = common.sample(student.eval(), processor, prompt, 12)
        logits = scores(student.train(), prompt, ids, mask).float()
    assert ids[0, :4].tolist()[-1] == end and mask[0].sum() <= 4 and mask.sum() < mask.numel()
    logits[:, [net.config.image_token_id, net.config.video_token_id, net.config.vision_start_token_id]] = -torch.inf
    scored = torch.zeros(mask.shape)
    scored[mask.bool()] = logits.log_softmax(-1).gather(1, ids[mask.bool()][:, None])[:, 0]
    by_step = [scored[mask[:, t].bool(), t] for t in range(mask.shape[1])]
    torch.testing.assert_close(torch.cat(by_step), torch.cat(drawn), atol=2e-4, rtol=1e-3)


def test_both_roles_read_the_same_response_after_their_own_prompt(backbone, student):
    processor, seen = backbone[1], []
    prompt, context, ids, mask = a_batch(processor)
    hook = common.network(student).model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True)
    hidden, teacher = common.response_hidden(student, prompt, ids, mask), teacher_states(student, context, ids, mask)
    hook.remove()
    for batch, own in zip(seen, (prompt, context), strict=True):
        start = own["input_ids"].shape[1]
        assert torch.equal(batch[:, start:], ids)
        assert all(processor.tokenizer.decode(row[:start]).endswith("<|im_start|>assistant\n") for row in batch)
    assert len(hidden) == len(teacher) == mask.sum() == 13 + 1 + 10
    assert hidden.requires_grad and not teacher.requires_grad


def test_the_end_token_is_supervised_and_padding_is_not(backbone, student):
    processor = backbone[1]
    prompt, _, ids, mask = a_batch(processor)
    assert ids[mask.bool()][12] == processor.tokenizer.eos_token_id      # row 0's last supervised position
    other = torch.where(mask.bool(), ids, 7)                             # any other padding
    for a, b in zip(common.response_hidden(student, prompt, ids, mask), common.response_hidden(student, prompt, other, mask)):
        torch.testing.assert_close(a, b)
    # The state that predicts the end token depends on what is before it, and not on the end token itself.
    changed = ids.clone()
    changed[0, 12] = 7
    before, after = (common.response_hidden(student, prompt, x, mask)[:13] for x in (ids, changed))
    torch.testing.assert_close(before, after)
    changed[0, 11] = 8
    assert not torch.allclose(before[12], common.response_hidden(student, prompt, changed, mask)[12])


def test_a_batch_scores_as_its_rows_alone(backbone, student):
    """Left padding changes nothing; neither do micro-batches: the gradients of rows alone add up to the batch's."""
    processor = backbone[1]
    rows, images = make_rows(3)
    prompt, context, ids, mask = a_batch(processor)
    assert (prompt["attention_mask"].sum(1) < prompt["input_ids"].shape[1]).any()
    tokens, lm_head = int(mask.sum()), common.network(student).lm_head

    def backward(prompt, context, ids, mask):
        hidden, teacher = common.response_hidden(student, prompt, ids, mask), teacher_states(student, context, ids, mask)
        gradient, _, kl = distill.sliced_divergence(hidden.detach(), teacher, ids[mask.bool()], lm_head, reverse_kl, 64)
        hidden.backward(gradient / tokens)
        return hidden.detach(), kl
    together, whole = backward(prompt, context, ids, mask), grads(student)
    alone = [backward(common.encode(processor, [student_prompt(row)], [image]), common.encode(processor, [teacher_prompt(row)]),
                      ids[i:i + 1, :int(mask[i].sum())], mask[i:i + 1, :int(mask[i].sum())])
             for i, (row, image) in enumerate(zip(rows, images))]
    for a, b in zip(together, (torch.cat(parts) for parts in zip(*alone))):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-3)
    accumulated = grads(student)
    assert whole.keys() == accumulated.keys() and all("lora_" in name for name in whole)
    for name in whole:
        torch.testing.assert_close(whole[name], accumulated[name], atol=2e-5, rtol=2e-3)


def test_fresh_adapter_and_same_prompt_give_zero_kl(backbone):
    processor = backbone[1]
    for which in (0, 1):  # from the picture, from the symbols
        fresh = common.add_lora(backbone[0], 4, vision=True)
        batch = a_batch(processor)
        prompt, (ids, mask) = batch[which], batch[2:]
        with torch.no_grad():
            hidden = common.response_hidden(fresh.train(), prompt, ids, mask)
            _, value, _ = distill.sliced_divergence(hidden, teacher_states(fresh, prompt, ids, mask), ids[mask.bool()],
                                                    common.network(fresh).lm_head, reverse_kl, 64)
        fresh.unload()
        assert value.abs().max() < 1e-6


def test_teacher_scores_do_not_depend_on_what_ran_before(backbone, student):
    processor = backbone[1]
    _, context, ids, mask = a_batch(processor, count=4)
    before = teacher_states(student, context, ids, mask)
    for count in (1, 2, 3):  # batch sizes that do and do not divide four
        rows, images = make_rows(count)
        prompt = common.encode(processor, [student_prompt(row) for row in rows], images)
        common.network(student).generate(**prompt, max_new_tokens=3)
        common.sample(student.eval(), processor, prompt, 3)
        assert torch.equal(teacher_states(student, context, ids, mask), before)


# ---------------------------------------------------------------- the rollout

def test_draws_have_the_models_distribution():
    """Chi-square over 2,000 draws: some thirty words by name and the rest of 151,936 together; banned ones never."""
    from scipy.stats import chisquare
    torch.manual_seed(0)
    logits = 2 * torch.randn(151_936)
    logits[:32] = torch.linspace(11, 12.5, 32)         # words that are drawn often, and a long tail
    logits[[3, 151_935]] = -torch.inf
    for temperature in (1.0, 1.5):
        p = (logits.double() / temperature).softmax(-1)
        tokens = torch.cat([common.draw(logits.expand(20, -1), temperature) for _ in range(100)])
        named = [i for i in range(32) if i != 3]
        counts = [int((tokens == i).sum()) for i in named]
        expected = [float(p[i]) * len(tokens) for i in named]
        assert not (tokens == 3).any() and not (tokens == 151_935).any() and min(expected) > 5
        _, surprise = chisquare(counts + [len(tokens) - sum(counts)], expected + [len(tokens) - sum(expected)])
        assert surprise > 1e-4
        # The tail is not flattened: its words' mean log-probability is the expected one, within 5 standard errors.
        tail = tokens[tokens >= 32]
        log_tail = p[32:].log()
        share = p[32:] / p[32:].sum()
        mean = (share * log_tail.nan_to_num(neginf=0)).sum()
        spread = ((share * (log_tail.nan_to_num(neginf=0) - mean) ** 2).sum() / len(tail)) ** 0.5
        assert (p[tail].log().mean() - mean).abs() < 5 * spread


def test_rollouts_follow_the_seed(backbone, student):
    prompt = a_batch(backbone[1])[0]
    runs = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        runs.append(common.sample(student.eval(), backbone[1], prompt, 12))
    assert torch.equal(runs[0][0], runs[1][0]) and torch.equal(runs[0][1], runs[1][1])
    assert runs[0][0].tolist() != runs[2][0].tolist()


# ---------------------------------------------------------------- the options

@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "data"
    gen_data.main(gen_data.parse_args(["--preset", "tiny", "--train", "8", "--val", "2", "--test", "2", "--out", str(folder)]))
    return folder


def train(data, out, *words, steps=1):
    """Run distill.py's main from a fresh adapter -> its metrics and its rollouts."""
    distill.main(distill.parse_args(["--preset", "tiny", "--data", str(data), "--out", str(out), "--init", "none", "--batch", "12",
                                     "--micro_batch", "5", "--steps", str(steps), *words]))
    return ([json.loads(line) for line in open(out / name)] for name in ("metrics.jsonl", "rollouts.jsonl"))


def test_the_teacher_samples_off_policy(data, tmp_path):
    """From symbols and plan the base model succeeds, from pictures it does not: it is seen who sampled."""
    [by_teacher], rollouts = train(data, tmp_path / "a", "--on_policy", "0", "--divergence", "forward_kl")
    [by_student], _ = train(data, tmp_path / "b")
    assert (by_teacher["sampler"], by_student["sampler"]) == ("teacher", "student")
    assert by_teacher["success"] > 0.7 > 0.3 > by_student["success"]
    assert by_student["loss"] == pytest.approx(by_student["kl"], rel=1e-5) != by_teacher["loss"]
    assert by_teacher["loss"] != pytest.approx(by_teacher["kl"], rel=1e-2)
    assert {"encode", "sample", "teacher", "student", "loss", "backward", "optimizer", "rest"} == by_teacher["seconds"].keys()
    assert 1 < len(rollouts) <= 8 and {row["task"] for row in rollouts} == set(gen_data.TASKS)
    for row in rollouts:
        assert row.keys() == {"step", "id", "task", "tokens", "kl", "part", "outcome"}
        assert len(row["tokens"]) == len(row["kl"]) == len(row["part"]) and row["part"] == sorted(row["part"])


def test_who_the_teacher_is_and_what_it_reads(data, tmp_path, monkeypatch):
    """Every scoring pass: are the adapters on, is there a picture, which text?"""
    seen, original = [], common.response_hidden

    def spy(model, prompt, ids, mask):
        on = not model.base_model.model.model.language_model.layers[0].mlp.up_proj.disable_adapters
        seen.append((torch.is_grad_enabled(), on, "pixel_values" in prompt, prompt["input_ids"].shape[1]))
        return original(model, prompt, ids, mask)
    monkeypatch.setattr(common, "response_hidden", spy)
    lengths = {}
    for context in ("state+plan", "state", "none"):
        for weights in ("base", "live"):
            seen.clear()
            # With the same prompt, a fresh adapter makes both roles equal: there is no gradient, and main says so.
            with pytest.raises(SystemExit) if context == "none" else nullcontext():
                train(data, tmp_path / f"{context}-{weights}", "--teacher_context", context, "--teacher_weights", weights,
                      "--tasks", "maze:3", "--max_new_tokens", "8")
            assert len(seen) == 2 * 3 and {(grad, on) for grad, on, *_ in seen} == {(True, True), (False, weights == "live")}
            assert all(picture == (grad or context == "none") for grad, _, picture, _ in seen)
            lengths[context] = max(length for grad, *_, length in seen if not grad)
    assert lengths["state+plan"] > lengths["state"]


def test_tasks_filter_the_rows_and_bad_options_are_refused(data, tmp_path, capsys):
    _, rollouts = train(data, tmp_path / "a", "--tasks", "maze:4", "minibehaviour", "--max_new_tokens", "4")
    assert {row["id"].rsplit("_", 1)[0] for row in rollouts} == {"train_maze_4", "train_minibehaviour_5"}
    for words, message in ((["--tasks", "maze:6"], "maze:6"), (["--beta", "2"], "--beta 2.0"), (["--on_policy", "-1"], "--on_policy"),
                           (["--slice", "0"], "--slice 0")):
        with pytest.raises(SystemExit) as stop:
            train(data, tmp_path / "b", *words)
        assert stop.value.code == 2 and message in capsys.readouterr().err
