"""Distillation's parts by references: divergences, the chunked loss, alignment, the options."""
import json
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from bench_distill import qwen_checkpoint
from conftest import adapted, make_rows, row_of, stops
from torch.nn.functional import kl_div

import common
import distill
import evaluate
import gen_data
from distill import DIVERGENCES, clipped, jsd, reverse_kl, sampled, skew_kl, topk_kl

# ---------------------------------------------------------------- divergences

def log_probs(*shape, scale=1.0, dtype=torch.float64):
    return (scale * torch.randn(*shape, dtype=dtype)).log_softmax(-1)


def by_torch(log_a, log_b):
    """KL(a || b) by torch: kl_div takes its arguments the other way round."""
    return kl_div(log_b, log_a, log_target=True, reduction="none").sum(-1)


def closed_form(name, log_p, log_q, token):
    """(value, gradient with respect to the student's logits), derived by hand; None: no such form.

    For jsd, beta is the table's 0.5.
    """
    p, q, ratio = log_p.exp(), log_q.exp(), log_p - log_q
    if name == "reverse_kl":
        value = by_torch(log_p, log_q)
        return value, p * (ratio - value[:, None])
    if name == "forward_kl":
        return by_torch(log_q, log_p), p - q
    if name == "jsd":  # of m's own dependence on p nothing is left
        log_m = (0.5 * q + 0.5 * p).log()
        kl = by_torch(log_p, log_m)
        return (0.5 * by_torch(log_q, log_m) + 0.5 * kl,
                0.5 * p * (log_p - log_m - kl[:, None]))
    if name == "sampled":
        ratio = ratio.gather(1, token[:, None])
        one_hot = torch.eye(p.shape[1], dtype=p.dtype)[token]
        return ratio[:, 0] * log_p.gather(1, token[:, None])[:, 0], ratio * (one_hot - p)
    return None


def value_and_gradient(name, z, log_q, token):
    """Of an entry of the table, by autograd, with respect to the student's logits z."""
    z = z.clone().requires_grad_()
    log_p = z.log_softmax(-1)
    drawn = None if token is None else log_p.detach().gather(1, token[:, None])[:, 0]
    value = DIVERGENCES[name](log_p, log_q, token, drawn)
    value.sum().backward()
    return value.detach(), z.grad


@pytest.mark.parametrize("name", DIVERGENCES)
def test_values_and_gradients(name):
    """Against the closed form where there is one; of every entry: its inputs stay as they were."""
    torch.manual_seed(0)
    z, log_q = torch.randn(7, 50, dtype=torch.float64), log_probs(7, 50)
    token = torch.randint(50, (7,))
    kept = z.clone(), log_q.clone()
    value, gradient = value_and_gradient(name, z, log_q, token)
    assert torch.equal(z, kept[0]) and torch.equal(log_q, kept[1])
    assert value.shape == (7,) and gradient.abs().max() > 0
    form = closed_form(name, z.log_softmax(-1), log_q, token)
    if form:
        torch.testing.assert_close(value, form[0], atol=1e-12, rtol=1e-9)
        torch.testing.assert_close(gradient, form[1], atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_float32_at_the_real_vocabulary(name):
    """Near the float64 value and gradient; nothing to learn where the teacher says the same."""
    cases = [(0.01, 1e-4), (0.3, 1e-4), (1.0, 1e-3), (5.0, 0.1), (5.0, 3.0)]
    token = torch.tensor([3, 151_935])
    for seed, (scale, noise) in enumerate(cases):
        torch.manual_seed(seed)
        z = scale * torch.randn(2, 151_936)
        other = z + noise * torch.randn_like(z)
        value, gradient = value_and_gradient(name, z, other.log_softmax(-1), token)
        exact, slope = value_and_gradient(name, z.double(), other.double().log_softmax(-1), token)
        torch.testing.assert_close(value, exact.float(), atol=5e-5, rtol=1e-4)
        torch.testing.assert_close(gradient, slope.float(), atol=5e-6, rtol=1e-3)
        value, gradient = value_and_gradient(name, z, z.log_softmax(-1), token)
        assert value.abs().max() < 1e-5 and gradient.abs().max() < 1e-5


@pytest.mark.parametrize("name", DIVERGENCES)
def test_extreme_logits_are_finite(name):
    one = torch.full((2, 4), -1e4)
    one[0, 0] = one[1, 3] = 1e4                          # p and q are certain, of different tokens
    assert one.log_softmax(-1).exp().min() == 0
    value, gradient = value_and_gradient(name, one, one.flip(0).log_softmax(-1),
                                         torch.tensor([0, 1]))
    assert value.isfinite().all() and gradient.isfinite().all()


def test_jsd_symmetric_and_its_limits():
    torch.manual_seed(0)
    log_p, log_q = log_probs(5, 40), log_probs(5, 40)
    torch.testing.assert_close(jsd(log_p, log_q), jsd(log_q, log_p))
    for beta, kl in ((1e-6, by_torch(log_q, log_p)), (1 - 1e-6, by_torch(log_p, log_q))):
        torch.testing.assert_close(jsd(log_p, log_q, beta=beta) / 1e-6, kl, atol=0, rtol=1e-4)
    far = torch.full((1, 4), -1e4)
    far[0, 0] = 1e4
    most = jsd(far.log_softmax(-1), far.flip(1).log_softmax(-1))             # its maximum
    torch.testing.assert_close(most, torch.full((1,), np.log(2.0), dtype=torch.float32))


def test_topk_is_a_divergence_that_tends_to_the_full_one():
    """Never above the full KL, by the data-processing inequality, and equal to it with all."""
    torch.manual_seed(0)
    log_p, log_q = log_probs(6, 50, scale=2), log_probs(6, 50, scale=2)
    values = torch.stack([topk_kl(log_p, log_q, k=k) for k in (1, 5, 20, 49, 50, 80)])
    full = by_torch(log_p, log_q)
    assert (values >= 0).all() and (values <= full + 1e-12).all()
    torch.testing.assert_close(values[-3:], full.expand(3, -1))
    two = torch.tensor([[0.7, 0.2, 0.1]], dtype=torch.float64).log()
    other = torch.tensor([[0.5, 0.1, 0.4]], dtype=torch.float64).log()
    by_hand = 0.7 * np.log(0.7 / 0.5) + 0.3 * np.log(0.3 / 0.5)
    assert float(topk_kl(two, other, k=1)) == pytest.approx(by_hand)
    by_hand = 0.5 * np.log(0.5 / 0.2) + 0.5 * np.log(0.5 / 0.8)   # the top is the student's
    other = torch.tensor([[0.2, 0.7, 0.1]], dtype=torch.float64).log()
    assert float(topk_kl(torch.tensor([[0.5, 0.3, 0.2]]).double().log(), other, k=1)) \
        == pytest.approx(by_hand)


def test_skewed_and_clipped():
    """KL to the mixture, near the reverse KL for a small alpha; shortened in value and slope."""
    torch.manual_seed(0)
    z, log_q = torch.randn(5, 40, dtype=torch.float64), log_probs(5, 40, scale=3)
    log_p = z.log_softmax(-1)
    mixture = (0.3 * log_p.exp() + 0.7 * log_q.exp()).log()
    torch.testing.assert_close(skew_kl(log_p, log_q, alpha=0.3), by_torch(log_p, mixture))
    torch.testing.assert_close(skew_kl(log_p, log_q, alpha=1e-9), by_torch(log_p, log_q),
                               atol=1e-4, rtol=1e-4)
    nats = float(by_torch(log_p, log_q).median())
    value, gradient = value_and_gradient("reverse_kl", z, log_q, None)
    leaf = z.clone().requires_grad_()
    short = clipped(leaf.log_softmax(-1), log_q, divergence=reverse_kl, nats=nats)
    short.sum().backward()
    factor = (nats / value).clamp(max=1)
    assert (factor < 1).any() and (factor == 1).any()
    torch.testing.assert_close(short.detach(), value * factor)
    torch.testing.assert_close(leaf.grad, gradient * factor[:, None])


def test_sampled_has_the_gradient_of_reverse_kl_in_expectation():
    """Exactly: the average over a small vocabulary, weighted with the student's probabilities."""
    torch.manual_seed(0)
    z, log_q = torch.randn(3, 11, dtype=torch.float64), log_probs(3, 11)
    p, mean = z.softmax(-1), torch.zeros(3, 11, dtype=torch.float64)
    for token in range(11):
        _, gradient = value_and_gradient("sampled", z, log_q, torch.full((3,), token))
        mean += p[:, token, None] * gradient
    torch.testing.assert_close(mean, value_and_gradient("reverse_kl", z, log_q, None)[1])
    assert not sampled(z.log_softmax(-1), log_q, torch.zeros(3, dtype=torch.long)).requires_grad


# ---------------------------------------------------------------- the loss, on two backbones

@pytest.fixture(scope="module", params=["tiny", "qwen"])
def backbone(request, tiny, tmp_path_factory):
    """(model, processor): the bundled one, then random weights with Qwen's tokenizer."""
    if request.param == "tiny":
        return tiny
    return common.load(str(qwen_checkpoint(tmp_path_factory.mktemp("qwen"), layers=2)), 32)


@pytest.fixture
def student(backbone):
    model = adapted(backbone[0])
    yield model
    model.unload()


def a_batch(processor, count=3):
    """(student's prompt, teacher's, ids, mask): 13 tokens with the end, one, ten that were cut."""
    rows, images = make_rows(count)
    ids, mask = common.encode_responses(processor, [row.response() for row in rows])
    ids[0, 12] = processor.tokenizer.eos_token_id
    mask[0, 13:] = 0
    mask[1, 1:] = 0
    mask[2, 10:] = 0
    symbols = [row.teacher_prompt("symbols+plan") for row in rows]
    return (common.encode(processor, [row.student_prompt() for row in rows], images),
            common.encode(processor, symbols), ids, mask)


def teacher_states(model, context, ids, mask):
    with torch.no_grad(), model.disable_adapter():
        return common.response_hidden(model, context, ids, mask)


def gradients(model):
    """{name: gradient} of everything that has one, removed from the model."""
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("name", DIVERGENCES)
def test_the_chunked_loss_equals_the_unchunked_one(backbone, student, name):
    """Scores and LoRA gradients against [batch, time, vocabulary] logits in float64."""
    processor, lm_head = backbone[1], common.network(student).lm_head
    prompt, context, ids, mask = a_batch(processor)
    token, teacher = ids[mask.bool()], teacher_states(student, context, ids, mask)
    factor, drawn = torch.linspace(-1, 2, len(token)), torch.linspace(-9, 0, len(token))
    chunked = []
    for chunk in (1, 7, 1000) if lm_head.weight.shape[0] < 1000 else (7,):
        hidden = common.response_hidden(student, prompt, ids, mask)
        gradient, scores = distill.chunked_divergence(
            hidden, teacher, token, drawn, factor, lm_head, lm_head, DIVERGENCES[name], chunk)
        assert not gradients(student)                        # so far nothing went into the network
        hidden.backward(gradient)
        chunked.append((scores, gradients(student)))

    start = prompt["input_ids"].shape[1]
    types = torch.cat([prompt["mm_token_type_ids"], torch.zeros_like(ids)], 1)
    full = {**prompt, "mm_token_type_ids": types,
            "input_ids": torch.cat([prompt["input_ids"], ids], 1),
            "attention_mask": torch.cat([prompt["attention_mask"], mask], 1)}
    position_ids, _ = common.positions(student, full)
    logits = common.network(student)(**full, position_ids=position_ids).logits
    log_p = logits[:, start - 1:-1][mask.bool()].double().log_softmax(-1)          # [N, vocabulary]
    log_q = lm_head(teacher).double().log_softmax(-1).detach()
    loss = DIVERGENCES[name](log_p, log_q, token, drawn) * factor
    loss.sum().backward()
    expected = gradients(student)
    assert expected and all("lora_" in key for key in expected)
    log_p = log_p.detach()
    wanted = torch.stack([loss.detach(), by_torch(log_p, log_q), -(log_p.exp() * log_p).sum(-1),
                          (log_p.gather(1, token[:, None])[:, 0] - drawn).abs()])
    for scores, found in chunked:
        torch.testing.assert_close(scores, wanted.float(), atol=4e-5, rtol=2e-4)
        assert found.keys() == expected.keys()
        for key in expected:
            torch.testing.assert_close(found[key], expected[key], atol=5e-5, rtol=2e-3)


def test_the_softmax_is_taken_in_float32_of_a_16_bit_network():
    """In bfloat16 a divergence would be wrong by more than it often is, and negative."""
    torch.manual_seed(0)
    lm_head = torch.nn.Linear(8, 500, bias=False, dtype=torch.bfloat16)
    hidden = torch.randn(6, 8).bfloat16()
    teacher = hidden + 0.1 * torch.randn(6, 8).bfloat16()
    _, scores = distill.chunked_divergence(
        hidden, teacher, torch.zeros(6, dtype=torch.long), torch.zeros(6), torch.ones(6), lm_head,
        lm_head, reverse_kl, 4)
    log_p, log_q = (lm_head(x).detach().double().log_softmax(-1) for x in (hidden, teacher))
    for found in scores[:2]:
        torch.testing.assert_close(found, by_torch(log_p, log_q).float(), atol=1e-6, rtol=1e-3)
    torch.testing.assert_close(scores[2], -(log_p.exp() * log_p).sum(-1).float())


def test_gradients_are_averaged_after_the_backward_pass(student):
    """One division, in float32: divided before it, float16 gradients are mostly zero."""
    weights, tokens = common.adapter_weights(student), 6400
    torch.manual_seed(0)
    wanted = [1e-4 * torch.randn_like(weight) for weight in weights]
    divided, whole = [
        float((torch.cat([g.flatten() / by for g in wanted]).half() == 0).double().mean())
        for by in (tokens, 1)]
    assert divided > 0.5 and whole < 0.01                    # what the order is worth
    for weight, gradient in zip(weights, wanted, strict=True):
        weight.grad = gradient.half().to(weight.dtype)
    loss, count = common.average_gradients(weights, 3200.0, tokens)
    assert (loss, count) == (0.5, tokens)
    for weight, gradient in zip(weights, wanted, strict=True):
        torch.testing.assert_close(weight.grad, gradient.half().float() / tokens)
        weight.grad.zero_()
    assert common.average_gradients(weights, 0.0, 0) == (0, 0)      # no token counts: no NaN
    assert not any(weight.grad.any() for weight in weights)
    student.zero_grad()


# ---------------------------------------------------------------- alignment

def test_sampling_and_scoring_see_the_same_probabilities(backbone, student, monkeypatch):
    """What each token was drawn from, step by step with the cache, against the scoring pass."""
    processor, net, seen = backbone[1], common.network(student), []
    end, draw_token = processor.tokenizer.eos_token_id, common.draw_token

    def spy(logits, *words):
        token, _ = draw_token(logits, *words)
        token[0] = end if len(seen) in (3, 7) else token[0]          # rows end at different times
        seen.append(logits.log_softmax(-1).gather(1, token[:, None])[:, 0])
        return token, seen[-1]
    monkeypatch.setattr(common, "draw_token", spy)
    prompt, uniforms = a_batch(processor)[0], np.random.default_rng(3).random((3, 12))
    ids, mask, drawn = common.sample(student.eval(), processor, prompt, 12, uniforms)
    assert ids[0, :4].tolist()[-1] == end and mask[0].sum() <= 4 and mask.sum() < mask.numel()
    with torch.no_grad():
        logits = net.lm_head(common.response_hidden(student.train(), prompt, ids, mask)).float()
    logits[:, [net.config.image_token_id, net.config.video_token_id,
               net.config.vision_start_token_id]] = -torch.inf
    scored = torch.zeros(mask.shape)
    token = ids[mask.bool()][:, None]
    scored[mask.bool()] = logits.log_softmax(-1).gather(1, token)[:, 0]
    by_step = [scored[mask[:, t].bool(), t] for t in range(mask.shape[1])]
    torch.testing.assert_close(torch.cat(by_step), torch.cat(seen), atol=2e-4, rtol=1e-3)
    torch.testing.assert_close(drawn * mask, scored, atol=2e-4, rtol=1e-3)   # token by token


def test_both_roles_read_the_same_response_after_their_own_prompt(backbone, student):
    processor, seen = backbone[1], []
    prompt, context, ids, mask = a_batch(processor)
    hook = common.network(student).model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True)
    hidden = common.response_hidden(student, prompt, ids, mask)
    teacher = teacher_states(student, context, ids, mask)
    hook.remove()
    for batch, own in zip(seen, (prompt, context), strict=True):
        start = own["input_ids"].shape[1]
        assert torch.equal(batch[:, start:], ids)
        for row in batch:
            text = processor.tokenizer.decode(row[:start])
            assert text.endswith("<|im_start|>assistant\n")
    assert len(hidden) == len(teacher) == mask.sum() == 13 + 1 + 10
    assert hidden.requires_grad and not teacher.requires_grad


def test_the_eos_is_supervised_and_padding_is_not(backbone, student):
    processor = backbone[1]
    prompt, _, ids, mask = a_batch(processor)
    assert ids[mask.bool()][12] == processor.tokenizer.eos_token_id    # row 0's last position
    before = common.response_hidden(student, prompt, ids, mask)
    other = torch.where(mask.bool(), ids, 7)                           # any other padding
    torch.testing.assert_close(common.response_hidden(student, prompt, other, mask), before)
    # What predicts the EOS depends on the tokens before it, and not on the EOS itself.
    changed = ids.clone()
    changed[0, 12] = 7
    after = common.response_hidden(student, prompt, changed, mask)
    torch.testing.assert_close(before[:13], after[:13])
    changed[0, 11] = 8
    after = common.response_hidden(student, prompt, changed, mask)
    assert not torch.allclose(before[12], after[12])


def test_a_batch_scores_as_its_rows_alone(backbone, student):
    """Left padding changes nothing; the gradients of rows alone add up to the batch's."""
    processor, lm_head = backbone[1], common.network(student).lm_head
    prompt, context, ids, mask = a_batch(processor)
    assert (prompt["attention_mask"].sum(1) < prompt["input_ids"].shape[1]).any()

    def backward(size):
        scores = []
        for some in common.micro_batches(size, (ids, mask), (prompt, context)):
            some_ids, some_mask, some_prompt, some_context = some
            hidden = common.response_hidden(student, some_prompt, some_ids, some_mask)
            teacher = teacher_states(student, some_context, some_ids, some_mask)
            gradient, score = distill.chunked_divergence(
                hidden, teacher, some_ids[some_mask.bool()], torch.zeros(len(hidden)),
                torch.ones(len(hidden)), lm_head, lm_head, reverse_kl, 64)
            hidden.backward(gradient / mask.sum())
            scores.append(score)
        return torch.cat(scores, 1), gradients(student)
    (together, whole), (alone, accumulated) = backward(3), backward(1)
    torch.testing.assert_close(together, alone, atol=2e-4, rtol=1e-3)
    assert whole.keys() == accumulated.keys() and all("lora_" in name for name in whole)
    for name in whole:
        torch.testing.assert_close(whole[name], accumulated[name], atol=2e-5, rtol=2e-3)


def test_rows_with_and_without_a_picture_in_one_batch(backbone, student):
    """As a teacher reads own rows: each is scored as it is alone, whatever part it stands in."""
    processor = backbone[1]
    rows, images = make_rows(5)
    images = [None, images[1], None, None, images[4]]
    prompts = [row.teacher_prompt("symbols") for row in rows]
    ids, mask = common.encode_responses(processor, [row.response() for row in rows])
    batch, wholes = common.encode(processor, prompts, images), []
    for i in range(5):
        part = common.encode(processor, prompts[i:i + 1], images[i:i + 1])
        wholes.append(teacher_states(student, part, ids[i:i + 1], mask[i:i + 1]))
    for size in (1, 2, 3, 5):
        states = [teacher_states(student, prompt, some, keep) for some, keep, prompt in
                  common.micro_batches(size, (ids, mask), (batch,))]
        torch.testing.assert_close(torch.cat(states), torch.cat(wholes), atol=2e-4, rtol=1e-3)


def test_fresh_adapter_and_same_prompt_give_zero_kl(backbone):
    batch = a_batch(backbone[1])
    fresh = common.add_lora(backbone[0], 4, vision=True)
    for prompt in batch[:2]:  # from the picture, from the symbols
        ids, mask = batch[2:]
        with torch.no_grad():
            hidden = common.response_hidden(fresh.train(), prompt, ids, mask)
        ones, lm_head = torch.ones(len(hidden)), common.head(fresh)
        _, scores = distill.chunked_divergence(
            hidden, teacher_states(fresh, prompt, ids, mask), ids[mask.bool()], ones, ones,
            lm_head, lm_head, reverse_kl, 64)
        assert scores[:2].abs().max() < 1e-6
    fresh.unload()


def test_teacher_scores_do_not_depend_on_what_ran_before(backbone, student):
    processor = backbone[1]
    _, context, ids, mask = a_batch(processor, count=4)
    before = teacher_states(student, context, ids, mask)
    for count in (1, 2, 3):  # batch sizes that do and do not divide four
        rows, images = make_rows(count)
        prompt = common.encode(processor, [row.student_prompt() for row in rows], images)
        common.network(student).generate(**prompt, max_new_tokens=3)
        common.sample(student.eval(), processor, prompt, 3)
        assert torch.equal(teacher_states(student, context, ids, mask), before)


# ---------------------------------------------------------------- the rollout

def test_tokens_have_the_models_distribution():
    """Chi-square over 2,000 draws: some thirty tokens by name, the rest of 151,936 together."""
    from scipy.stats import chisquare
    torch.manual_seed(0)
    logits = 2 * torch.randn(151_936)
    logits[:32] = torch.linspace(11, 12.5, 32)        # tokens that are drawn often, and a long tail
    logits[[3, 151_935]] = -torch.inf
    for temperature in (1.0, 1.5):
        p = (logits.double() / temperature).softmax(-1)
        uniforms = torch.tensor(np.random.default_rng(0).random((100, 20)))
        drawn = [common.draw_token(logits.expand(20, -1), uniform, temperature)
                 for uniform in uniforms]
        tokens = torch.cat([token for token, _ in drawn])
        torch.testing.assert_close(torch.cat([log_p for _, log_p in drawn]).double(),
                                   p[tokens].log(), atol=1e-4, rtol=1e-4)
        named = [i for i in range(32) if i != 3]
        counts = [int((tokens == i).sum()) for i in named]
        expected = [float(p[i]) * len(tokens) for i in named]
        assert not torch.isin(tokens, torch.tensor([3, 151_935])).any() and min(expected) > 5
        _, surprise = chisquare(counts + [len(tokens) - sum(counts)],
                                expected + [len(tokens) - sum(expected)])
        assert surprise > 1e-4
        # The tail is not flattened: its mean log-probability is the expected one, within 5 errors.
        tail, share = tokens[tokens >= 32], p[32:] / p[32:].sum()
        log_tail = p[32:].log().nan_to_num(neginf=0)
        mean = (share * log_tail).sum()
        spread = ((share * (log_tail - mean) ** 2).sum() / len(tail)) ** 0.5
        assert (p[tail].log().mean() - mean).abs() < 5 * spread


def test_rare_tokens_keep_their_share():
    """Each is drawn by the numbers that are its own; near 1, float32 would have steps of 6e-8."""
    torch.manual_seed(0)
    logits, rare = torch.randn(151_936), torch.randint(1, 151_936, (50,))
    logits[0] = 22
    p = logits.softmax(-1).double()
    edges = p.cumsum(0)
    assert p[rare].max() < 1e-8 and edges[0] > 0.999
    numbers = (edges[rare] - p[rare] / 2) / edges[-1]
    assert torch.equal(common.draw_token(logits.expand(50, -1), numbers)[0], rare)


def test_no_number_draws_a_token_without_probability():
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]] * 4)
    uniform = torch.tensor([0.0, 0.5 - 1e-12, 0.5, 1 - 2**-53], dtype=torch.float64)
    assert common.draw_token(logits, uniform)[0].tolist() == [1, 1, 3, 3]
    torch.manual_seed(0)                                 # rounded, they rarely sum to one
    logits = torch.randn(100, 50)
    logits[:, -1] = -torch.inf
    assert common.draw_token(logits, uniform[-1:].expand(100))[0].max() < 49
    nowhere = torch.full((4, 5), torch.nan)              # still a token: the step is skipped later
    assert common.draw_token(nowhere, uniform)[0].max() < 5


# ---------------------------------------------------------------- the options

def train(data, out, *words):
    """One step of distill.py's main from a fresh adapter -> its log line and its rollouts."""
    distill.main(distill.parse_args([
        "--preset", "tiny", "--data", str(data), "--out", str(out), "--init", "none",
        "--batch", "12", "--micro_batch", "5", "--steps", "1", "--eval_every", "0", *words]))
    lines = [[json.loads(line) for line in open(out / name)]
             for name in ("metrics.jsonl", "rollouts.jsonl")]
    return lines[0][0], lines[1]


def test_the_teacher_samples_off_policy(toy_data, tmp_path):
    """From symbols and plan the base model succeeds, from pictures not: it is seen who sampled."""
    by_teacher, rollouts = train(toy_data, tmp_path / "a", "--on_policy", "0",
                                 "--divergence", "forward_kl")
    by_student, _ = train(toy_data, tmp_path / "b")
    assert (by_teacher["on_policy"], by_student["on_policy"]) == (False, True)
    assert by_teacher["success"] > 0.7 > 0.3 > by_student["success"]
    assert by_student["loss"] == pytest.approx(by_student["kl"], rel=1e-5) != by_teacher["loss"]
    assert by_teacher["loss"] != pytest.approx(by_teacher["kl"], rel=1e-2)
    assert by_teacher["sampling_gap"] is None and by_student["sampling_gap"] < 1e-3
    assert by_teacher["step_seconds"] == pytest.approx(sum(by_teacher["seconds"].values()))
    assert len(rollouts) == 6 and len({row["task"] for row in rollouts}) > 1
    for row in rollouts:
        assert len({len(row[name]) for name in ("tokens", "kl", "entropy", "gap", "part")}) == 1
        assert row["part"] == sorted(row["part"])
        assert "".join(row["tokens"]).startswith(row["response"])


def test_validation(toy_data, tmp_path, monkeypatch, capsys):
    """Success, length and KL of an adapter as its log says them: transformers' own greedy answers,
    one at a time, dense logits."""
    monkeypatch.setattr(distill, "HELD_OUT", 5)
    train(toy_data, tmp_path / "run", "--steps", "3", "--eval_every", "2", "--lr", "1e-3")
    lines = [json.loads(line) for line in open(tmp_path / "run/metrics.jsonl")]
    assert [line["step"] for line in lines if "val_success" in line] == [1, 2, 3]
    assert [line["step"] for line in lines if "val_teacher" in line] == [1]
    assert lines[0]["val_teacher"] > lines[0]["val_success"]
    scores = [line["val_success"] for line in lines]
    best = scores.index(max(scores))                                          # the first of equals
    out = capsys.readouterr()
    assert f"{scores[-1]:.3g} of {tmp_path}/run/adapter (step 3)" in out.out
    assert f"{scores[best]:.3g} of {tmp_path}/run/adapter-best (step {best + 1})" in out.out
    assert "warning" not in out.err
    rows = distill.draw_rows(gen_data.load_rows(toy_data, "val"), 5, np.random.default_rng(0))
    for name, line in (("adapter", lines[-1]), ("adapter-best", lines[best])):
        model, processor = common.load(common.TINY, 32)
        model = common.add_lora(model, path=tmp_path / "run" / name)
        found, kls, tokens = [], [], 0
        for row in rows:
            prompts = [common.encode(processor, [row.student_prompt()],
                                     [gen_data.open_picture(row.path)]),
                       common.encode(processor, [row.teacher_prompt("symbols+plan")])]
            net = common.network(model)
            whole = net.generate(**prompts[0], max_new_tokens=120, do_sample=False)
            net.model.rope_deltas = None
            ids = whole[:, prompts[0]["input_ids"].shape[1]:]
            text = processor.batch_decode(ids, skip_special_tokens=True)[0]
            cut = ids[0, -1] != processor.tokenizer.eos_token_id
            found.append(row.judge(text, cut=cut)["outcome"] == "success")
            mask = torch.ones_like(ids)
            hidden = (common.response_hidden(model, prompts[0], ids, mask),
                      teacher_states(model, prompts[1], ids, mask))
            kls.append(by_torch(*[net.lm_head(one).log_softmax(-1) for one in hidden]).sum())
            tokens += ids.shape[1]
        assert line["val_success"] == np.mean(found) and line["val_length"] == tokens / 5
        assert line["val_kl"] == pytest.approx(float(sum(kls)) / tokens, rel=1e-3)


def test_a_teacher_that_is_no_better_is_named(toy_data, tmp_path, monkeypatch, capsys):
    """Both fail with four tokens; without validation there is neither line nor adapter-best/."""
    monkeypatch.setattr(distill, "HELD_OUT", 3)
    few = ["--max_new_tokens", "4"]
    train(toy_data, tmp_path / "a", *few, "--eval_every", "5")
    said = capsys.readouterr()
    assert "warning: the teacher succeeds on 0% of the validation rows" in said.err
    assert "adapter-best (step 1)" in said.out and (tmp_path / "a/adapter-best").is_dir()
    train(toy_data, tmp_path / "b", *few)
    said = capsys.readouterr()
    assert "validation" not in said.err + said.out and not (tmp_path / "b/adapter-best").exists()
    name = str(tmp_path / "a/adapter-best")
    args = evaluate.parse_args(["--data", str(toy_data), "--adapter", name])
    assert evaluate.find_adapters(args) == {"a-best": Path(name)}
    assert common.read_trained_rows(Path(name)) == common.read_trained_rows(tmp_path / "a/adapter")


def test_what_is_logged_of_rollouts(tiny):
    """By hand: two right answers, one of them longer than needed, and one without an EOS."""
    model, processor = tiny
    row = row_of(gen_data.FrozenLake(["SF", "FG"]))
    texts = [f"Map: 2x2\nrow 0: S F\nrow 1: F G\nRoute: on.\n<answer>{plan}</answer>"
             for plan in ("D,R,U", "R,L,D,R", "D,R")]
    ids, mask = common.encode_responses(processor, texts)
    mask[2, mask[2].sum() - 1] = 0                              # its EOS
    ids[2, mask[2].sum():] = processor.tokenizer.pad_token_id
    width, tokens = int(mask.sum(1).max()), int(mask.sum())
    kl, entropy = torch.arange(tokens).float(), torch.full((tokens,), 0.25)
    gap = torch.cat([torch.full((length,), value) for length, value in
                     zip(mask.sum(1).tolist(), (0.5, 2.0, 1.0), strict=True)])
    lines = distill.rollout_lines(model, processor, 1, [row] * 3, ids[:, :width], mask[:, :width],
                                  torch.stack([kl, kl, entropy, gap]))
    assert [line["outcome"] for line in lines] == ["success"] * 3
    assert [line["optimal"] for line in lines] == [True, False, True]   # executed steps count
    assert [line["cut"] for line in lines] == [False, False, True]
    assert [line["response"] for line in lines] == texts
    means = distill.rollout_means(lines, True)
    assert means["success"] == 1 and means["optimal"] == 2 / 3 and means["cut"] == 1 / 3
    assert means["sampling_gap"] == 2                                       # of the worst row
    assert means["length"] == tokens / 3 and means["entropy"] == 0.25
    assert means["kl"] == pytest.approx((tokens - 1) / 2)
    part = np.concatenate([line["part"] for line in lines])
    for k, name in enumerate(gen_data.PARTS):
        assert means[f"kl_{name}"] == pytest.approx(np.arange(tokens)[part == k].mean())
    unjudged = {**lines[0], "outcome": "not judged", "optimal": None}       # an own row's
    means = distill.rollout_means([lines[1], unjudged], False)
    assert (means["success"], means["optimal"], means["sampling_gap"]) == (1, 0, None)
    assert means["length"] == (len(lines[0]["kl"]) + len(lines[1]["kl"])) / 2


@pytest.mark.parametrize("share", (0, 1))
def test_who_samples_and_what_it_reads(toy_data, tmp_path, monkeypatch, share):
    """On policy the student, adapters on, from the picture; off policy the teacher."""
    seen, original = [], common.sample

    def spy(model, processor, prompt, *rest, **options):
        layer = model.base_model.model.model.language_model.layers[0]
        seen.append((not layer.mlp.up_proj.disable_adapters, "pixel_values" in prompt,
                     model.training))
        return original(model, processor, prompt, *rest, **options)
    monkeypatch.setattr(common, "sample", spy)
    train(toy_data, tmp_path, "--on_policy", str(share), "--max_new_tokens", "4")
    assert set(seen) == {(bool(share), bool(share), False)}


def test_who_the_teacher_is_and_what_it_reads(toy_data, tmp_path, monkeypatch):
    """Every scoring pass: are the adapters on, is there a picture, which text?"""
    seen, original = [], common.response_hidden

    def spy(model, prompt, ids, mask):
        layer = model.base_model.model.model.language_model.layers[0]
        assert model.training                    # else nothing is checkpointed
        seen.append((torch.is_grad_enabled(), not layer.mlp.up_proj.disable_adapters,
                     "pixel_values" in prompt, prompt["input_ids"].shape[1]))
        return original(model, prompt, ids, mask)
    monkeypatch.setattr(common, "response_hidden", spy)
    lengths = {}
    for reads in ("symbols+plan", "symbols", "picture"):
        for weights in ("base", "live", "ema"):
            seen.clear()
            line, _ = train(
                toy_data, tmp_path / f"{reads}-{weights}", "--teacher_reads", reads,
                "--teacher_weights", weights, "--tasks", "maze:3", "--max_new_tokens", "4")
            assert (line["kl"] < 1e-6) == (reads == "picture")  # one prompt, and a fresh adapter
            assert len(seen) == 2 * 3
            assert {one[:2] for one in seen} == {(True, True), (False, weights != "base")}
            assert all(picture == (grad or reads == "picture") for grad, _, picture, _ in seen)
            lengths[reads] = max(length for grad, *_, length in seen if not grad)
    assert lengths["symbols+plan"] > lengths["symbols"]


def test_the_moving_average_is_exchanged_and_given_back(student):
    weights = common.adapter_weights(student)
    own, average = [weight.data for weight in weights], [weight.data + 1 for weight in weights]
    with pytest.raises(KeyError), common.exchanged(student, weights, average) as net:
        assert net is student
        for weight, value in zip(weights, average, strict=True):
            assert weight.data.data_ptr() == value.data_ptr()
        raise KeyError
    for weight, value in zip(weights, own, strict=True):
        assert weight.data.data_ptr() == value.data_ptr()


def test_tasks_filter_the_rows_and_bad_options_are_refused(toy_data, tmp_path, capsys):
    _, rollouts = train(toy_data, tmp_path / "a", "--tasks", "maze:4", "minibehaviour",
                        "--max_new_tokens", "4")
    kinds = {row["id"].rsplit("_", 1)[0] for row in rollouts}
    assert kinds == {"train_maze_4", "train_minibehaviour_5"}
    rows = gen_data.load_rows(toy_data, "train")
    kept = [row.key() for row in rows if row.task != "frozenlake" and row.level > 3]
    assert json.loads((tmp_path / "a/trained_rows.json").read_text())["rows"] == sorted(kept)
    for words, message in (("--tasks maze:6", "maze:6"), ("--eval_every -1", "--eval_every"),
                           ("--on_policy -1", "--on_policy"), ("--chunk 0", "--chunk"),
                           ("--rollout_batch 0", "--rollout_batch")):
        with pytest.raises(SystemExit) as stop:
            train(toy_data, tmp_path / "b", *words.split())
        assert stop.value.code == 2 and message in capsys.readouterr().err


# ---------------------------------------------------------------- what is sampled is what is scored

class Broken(common.Decoder):
    """It reads wrongly as soon as a row has left the batch."""
    fault, left = None, False

    def keep(self, going):
        super().keep(going)
        self.left, self.logits = True, self.logits[going]
        if self.fault == "a position is left out":
            self.position = self.position + 1
        if self.fault == "keys and values are another row's":
            self.cache.reorder_cache(torch.arange(len(self.position)).roll(1))

    def step(self, token):
        if self.left and self.fault == "a token is not read":
            self.left = False
        else:
            super().step(token)

    def read(self, **inputs):
        if self.left and self.fault == "the mask is a column behind":
            inputs["attention_mask"] = torch.nn.functional.pad(
                inputs["attention_mask"][:, :-1], (0, 1))
        super().read(**inputs)


@pytest.mark.parametrize("fault", [
    "a position is left out", "keys and values are another row's", "a token is not read",
    "the mask is a column behind"])
def test_a_decoder_that_reads_wrongly_ends_the_run(toy_data, tmp_path, monkeypatch, capsys, fault):
    """In the first step, though only some tokens of some rows are wrong."""
    monkeypatch.setattr(Broken, "fault", fault)
    monkeypatch.setattr(common, "decoder_of", lambda net: (Broken, 1))
    stops(capsys, train, toy_data, tmp_path)
    assert not (tmp_path / "checkpoint.pt").exists()


def test_what_a_step_must_show(capsys):
    """A wrong gap ends the run in the first step on policy; later it is one warning.

    A first gradient is zero only where it is, and something counted.
    """
    args = distill.parse_args(["--init", "none"])

    def look(step=0, gap=0.0, right=None, loss=1.0, norm=1.0, kl=1.0, count=1):
        means = {"sampling_gap": gap, "kl": kl, "cut": 0}
        right = distill.check_step(args, step, loss, norm, means, count * torch.ones(3), right)
        return right, "warning: " in capsys.readouterr().err
    assert look() == look(right=True) == look(norm=1e-6) == look(norm=0.0, count=0) == (True, False)
    assert look(gap=None) == (None, False)
    assert look(step=3, gap=0.3, right=True) == (False, True)
    assert look(step=4, gap=0.3, right=False) == (False, False)
    assert look(loss=float("nan")) == look(kl=11.0) == (True, True)
    assert look(loss=float("nan"), kl=float("nan")) == (True, False)   # the step is skipped for it
    for wrong in ({"gap": 0.3}, {"step": 3, "gap": 0.3}, {"norm": 0.0}):
        with pytest.raises(SystemExit):
            look(**wrong)


def test_a_second_network_as_teacher_scores_with_its_own_head(toy_data, tmp_path, monkeypatch):
    """The base with its last norm halved and its head doubled is the same function."""
    other, _ = common.load(common.TINY, 32)
    head = torch.nn.Linear(*reversed(other.lm_head.weight.shape), bias=False)
    head.weight.data = 2 * other.lm_head.weight.data
    other.lm_head = head
    other.model.language_model.norm.weight.data /= 2
    lines = [train(toy_data, tmp_path / "base", "--max_new_tokens", "20")[0]]
    monkeypatch.setattr(common, "without_adapters", lambda model: nullcontext(other))
    lines.append(train(toy_data, tmp_path / "other", "--max_new_tokens", "20")[0])
    for name in ("loss", "kl", "grad_norm"):
        assert lines[1][name] == pytest.approx(lines[0][name], rel=1e-4)
