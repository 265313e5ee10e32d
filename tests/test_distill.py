"""The distillation step: the divergences, the sliced loss, its alignment and the options, against independent references."""
from functools import partial

import numpy as np
import pytest
import torch
from torch.nn.functional import kl_div

import common
import distill
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


# ---------------------------------------------------------------- the sliced loss and alignment, on two backbones

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
    """(student's prompt, teacher's prompt, ids, mask) of ragged responses: row 1 of one token, row 2 cut off."""
    rows, images = make_rows(count)
    ids, mask = common.encode_responses(processor, [response(row) for row in rows])
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
