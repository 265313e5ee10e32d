"""The model's side, on the bundled backbone: encoding, alignment, adapters, both losses, NF4."""
import copy

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import coldstart
import common
import distill
import gen_data
from gen_data import TASKS, response, solve, student_prompt, teacher_prompt


def make_rows(count=4, seed=0):
    """Rows of mixed tasks and levels, with their pictures."""
    rng, rows = np.random.default_rng(seed), []
    boards = [("frozenlake", 3), ("maze", 4), ("minibehaviour", 5), ("maze", 3), ("frozenlake", 4)]
    while len(rows) < count:
        task, level = boards[len(rows) % len(boards)]
        state = TASKS[task].sample(rng, level)
        if solve(task, state):
            rows.append(dict(task=task, level=level, state=state, plan=solve(task, state)))
    return rows, [TASKS[row["task"]].render(row["state"], 32) for row in rows]


@pytest.fixture(scope="module")
def tiny():
    return common.load(common.TINY, 32)


@pytest.fixture
def student(tiny):
    """The tiny backbone with a fresh adapter whose B matrices are not zero: it does something."""
    torch.manual_seed(0)
    model = common.add_lora(tiny[0], 4, vision=True)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)
    yield model
    model.unload()


def logits(model, prompt, ids, mask):
    return common.network(model).lm_head(common.response_hidden(model, prompt, ids, mask))


# ---------------------------------------------------------------- text

def test_every_prompt_and_response_survives_the_tokenizer(tiny):
    rows, _ = make_rows(10)
    for row in rows:
        for text in (student_prompt(row), teacher_prompt(row), response(row), gen_data.perception_prompt(row),
                     gen_data.perception_target(row), "anything else: 你好 \t{}"):
            ids = tiny[1].tokenizer(text, add_special_tokens=False)["input_ids"]
            assert tiny[1].tokenizer.decode(ids) == text


def test_chat_template(tiny):
    rows, images = make_rows(1)
    batch = common.encode(tiny[1], [student_prompt(rows[0])], images)
    cells = rows[0]["level"] ** 2  # one image token per cell
    assert tiny[1].tokenizer.decode(batch["input_ids"][0]) == (
        "<|im_start|>user\n<|vision_start|>" + "<|image_pad|>" * cells + "<|vision_end|>" + student_prompt(rows[0])
        + "<|im_end|>\n<|im_start|>assistant\n")
    assert batch["mm_token_type_ids"].sum() == cells


def test_prompts_are_left_padded_and_responses_end_with_the_end_token(tiny):
    rows, images = make_rows(3)
    batch = common.encode(tiny[1], [student_prompt(row) for row in rows], images)
    assert (batch["attention_mask"][:, -1] == 1).all() and (batch["attention_mask"].diff(dim=1) >= 0).all()
    ids, mask = common.encode_responses(tiny[1], [response(row) for row in rows])
    for row, row_ids, row_mask in zip(rows, ids, mask):
        kept = row_ids[row_mask.bool()]
        assert kept[-1] == tiny[1].tokenizer.eos_token_id
        assert tiny[1].tokenizer.decode(kept[:-1]) == response(row)
        assert (row_mask.diff() <= 0).all()


# ---------------------------------------------------------------- alignment

def test_scoring_equals_the_plain_model(tiny):
    """Against transformers' own forward pass: one row, no padding, positions left to the model."""
    model, processor = tiny
    rows, images = make_rows(3)
    ids, mask = common.encode_responses(processor, [response(row) for row in rows])
    together = logits(model, common.encode(processor, [student_prompt(row) for row in rows], images), ids, mask)
    alone = []
    for row, image, row_ids, row_mask in zip(rows, images, ids, mask):
        prompt = common.encode(processor, [student_prompt(row)], [image])
        own = row_ids[row_mask.bool()][None]
        out = model(input_ids=torch.cat([prompt["input_ids"], own], 1), pixel_values=prompt["pixel_values"],
                    image_grid_thw=prompt["image_grid_thw"],
                    mm_token_type_ids=torch.cat([prompt["mm_token_type_ids"], torch.zeros_like(own)], 1))
        alone.append(out.logits[0, prompt["input_ids"].shape[1] - 1:-1])
    torch.testing.assert_close(together, torch.cat(alone), atol=2e-4, rtol=1e-4)


def test_greedy_sampling_equals_generate(tiny, student):
    processor = tiny[1]
    rows, images = make_rows(5)
    prompt = common.encode(processor, [student_prompt(row) for row in rows], images)
    ids, mask = common.sample(student, processor, prompt, 20, temperature=0)
    theirs = common.network(student).generate(**prompt, max_new_tokens=20, do_sample=False)[:, prompt["input_ids"].shape[1]:]
    for row, own, keep in zip(theirs, ids, mask):
        assert row[:keep.sum()].tolist() == own[keep.bool()].tolist()


def test_mask_goes_through_the_first_end_token(tiny, monkeypatch):
    """Drawn tokens are replaced by a script: where a row ends it leaves the batch, and padding follows."""
    model, processor = tiny
    end = processor.tokenizer.eos_token_id
    script = iter(torch.tensor(tokens) for tokens in ([7, 7], [end, 8], [end]))  # row 0 is dropped where it ends
    monkeypatch.setattr(common, "draw", lambda logits, temperature: next(script))
    rows, images = make_rows(2)
    ids, mask = common.sample(model, processor, common.encode(processor, [student_prompt(row) for row in rows], images), 9)
    pad = processor.tokenizer.pad_token_id
    assert ids.tolist() == [[7, end, pad], [7, 8, end]] and mask.tolist() == [[1, 1, 0], [1, 1, 1]]


# ---------------------------------------------------------------- the losses

def test_cold_start_supervises_the_answer_and_its_end_only(tiny):
    """Changing a prompt token's target cannot change the loss; leaving out the end token does."""
    model, processor = tiny
    rows, images = make_rows(2)
    prompt = common.encode(processor, [gen_data.perception_prompt(row, ("map",)) for row in rows], images)
    targets = [gen_data.perception_target(row, ("map",)) for row in rows]
    ids, mask = common.encode_responses(processor, targets)
    loss = coldstart.answer_loss(model, prompt, ids, mask)
    by_hand = 0.0
    for i, (row, image) in enumerate(zip(rows, images)):
        one = common.encode(processor, [gen_data.perception_prompt(row, ("map",))], [image])
        own = torch.tensor(processor.tokenizer(targets[i], add_special_tokens=False)["input_ids"] + [processor.tokenizer.eos_token_id])
        labels = torch.cat([torch.full_like(one["input_ids"][0], -100), own])[None]
        out = model(input_ids=torch.cat([one["input_ids"], own[None]], 1), labels=labels, pixel_values=one["pixel_values"],
                    image_grid_thw=one["image_grid_thw"], mm_token_type_ids=torch.cat([one["mm_token_type_ids"], own[None] * 0], 1))
        by_hand += out.loss * len(own)
    torch.testing.assert_close(loss, by_hand, atol=1e-3, rtol=1e-4)


def test_gradient_checkpointing_changes_no_gradient(tiny, student):
    """As `load` switches it on for CUDA: same gradients in train mode, adapters on in the recomputation."""
    processor = tiny[1]
    rows, images = make_rows(3)
    prompt = common.encode(processor, [student_prompt(row) for row in rows], images)
    answers = common.encode_responses(processor, [response(row) for row in rows])
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            common.network(student).gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        coldstart.answer_loss(student.train(), prompt, *answers).backward()
        grads.append(torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None]))
        student.zero_grad()
    common.network(student).gradient_checkpointing_disable()
    student.eval()
    torch.testing.assert_close(grads[0], grads[1])


# ---------------------------------------------------------------- whole steps

@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "data"
    gen_data.main(gen_data.parse_args(["--preset", "tiny", "--train", "8", "--val", "4", "--test", "4", "--out", str(folder)]))
    return folder


@pytest.mark.parametrize("bits", [32, 4])
def test_one_step_of_each_stage_changes_only_the_adapter(data, tmp_path, bits):
    """Both scripts' main, one step each, plain and in NF4; the base model's logits stay bit-identical."""
    rows, images = make_rows(3)
    model, processor = common.load(common.TINY, bits)
    if bits == 4:
        from bitsandbytes.nn import Linear4bit
        four = {name for name, module in model.named_modules() if isinstance(module, Linear4bit)}
        linears = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
        assert four == {name for name in linears if ".language_model." in name} and len(four) == 7 * 5
    prompt = common.encode(processor, [student_prompt(row) for row in rows], images)
    ids, mask = common.encode_responses(processor, [response(row) for row in rows])
    before = logits(model, prompt, ids, mask)
    frozen = {name: weight.clone() for name, weight in model.state_dict().items()}

    common_flags = ["--preset", "tiny", "--bits", str(bits), "--data", str(data), "--steps", "2", "--batch", "6", "--micro_batch", "3"]
    coldstart.main(coldstart.parse_args([*common_flags, "--out", str(tmp_path / "coldstart"), "--eval_every", "9"]))
    distill.main(distill.parse_args([*common_flags, "--out", str(tmp_path / "distill"), "--init", str(tmp_path / "coldstart"),
                                     "--max_new_tokens", "40"]))
    first = load_file(tmp_path / "coldstart/adapter/adapter_model.safetensors")
    second = load_file(tmp_path / "distill/adapter/adapter_model.safetensors")
    assert first.keys() == second.keys() and all("lora_" in name for name in first)
    assert any(not torch.equal(first[name], second[name]) for name in first)

    model = common.add_lora(model, path=str(tmp_path / "distill/adapter"))
    assert not torch.equal(logits(model, prompt, ids, mask), before)
    with model.disable_adapter():
        assert torch.equal(logits(model, prompt, ids, mask), before)
    plain = model.unload()
    assert all(torch.equal(weight, frozen[name]) for name, weight in plain.state_dict().items())


def test_nf4_gradients_are_the_same_after_sampling():
    """On the CPU, bitsandbytes would repack the weights in eval mode for a kernel that has no backward."""
    model, processor = common.load(common.TINY, 4)
    torch.manual_seed(0)
    model = common.add_lora(model, 4)
    rows, images = make_rows(2)
    prompt = common.encode(processor, [student_prompt(row) for row in rows], images)
    answers = common.encode_responses(processor, [response(row) for row in rows])

    def gradient():
        coldstart.answer_loss(model.train(), prompt, *answers).backward()
        grads = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        model.zero_grad()
        return grads
    before = gradient()
    common.sample(model.eval(), processor, prompt, 3)
    assert before.abs().max() > 0 and torch.equal(gradient(), before)


def test_lora_pattern_is_anchored(tiny):
    model, _ = tiny
    for vision in (False, True):
        adapted = common.add_lora(copy.deepcopy(model), 4, vision=vision)
        names = {name.split(".lora_A")[0] for name, _ in adapted.named_parameters() if "lora_A" in name}
        assert sum("language_model" in name for name in names) == 7 * 5
        assert sum("visual" in name for name in names) == (4 * 3 + 2 * 3 if vision else 0)
        assert not any("lm_head" in name or "embed" in name for name in names)


def test_a_step_does_not_depend_on_the_micro_batch(tiny, student):
    processor = tiny[1]
    rows, images = make_rows(5)
    grads = []
    for width in (5, 2):
        parts = []
        for i in range(0, 5, width):
            prompt = common.encode(processor, [gen_data.perception_prompt(row, ("map",)) for row in rows[i:i + width]], images[i:i + width])
            parts.append((prompt, *common.encode_responses(processor, [gen_data.perception_target(row, ("map",)) for row in rows[i:i + width]])))
        tokens = sum(int(mask.sum()) for _, _, mask in parts)
        for part in parts:
            (coldstart.answer_loss(student, *part) / tokens).backward()
        grads.append(torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None]))
        student.zero_grad()
    torch.testing.assert_close(grads[0], grads[1], atol=1e-6, rtol=1e-3)


def test_the_backbone_plans_from_symbols_and_not_from_pictures(tiny):
    model, processor = tiny
    wins = {"symbols": [], "pictures": []}
    for task, levels in gen_data.PRESETS["tiny"]["tasks"].items():
        for level in levels:
            rows = list(gen_data.sample_rows(task, level, "test", 30, seed=11))
            images = [TASKS[task].render(row["state"], 32) for row in rows]
            for source, prompt in (("symbols", common.encode(processor, [teacher_prompt(row, "state") for row in rows])),
                                   ("pictures", common.encode(processor, [student_prompt(row) for row in rows], images))):
                texts = common.decode(processor, *common.sample(model, processor, prompt, 120, temperature=0))
                wins[source].append(np.mean([gen_data.check(task, row["state"], gen_data.parse(text)) == "success"
                                             for row, text in zip(rows, texts)]))
    assert min(wins["symbols"]) >= 0.85 and np.mean(wins["pictures"]) <= 0.3, wins
