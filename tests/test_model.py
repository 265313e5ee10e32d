"""The model's side, on the bundled backbone: encoding, alignment, sampling, adapters, NF4."""
import copy
import json
import shutil
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import make_rows, stops
from PIL import Image
from safetensors.torch import load_file

import coldstart
import common
import distill
import evaluate
import gen_data


def logits(model, prompt, ids, mask):
    return common.network(model).lm_head(common.response_hidden(model, prompt, ids, mask))


def pictures_and_answers(processor, count=4):
    """(rows, the student's prompts, reference responses' ids and mask)."""
    rows, images = make_rows(count)
    return (rows, common.encode(processor, [row.student_prompt() for row in rows], images),
            *common.encode_responses(processor, [row.response() for row in rows]))


def flat_gradient(model):
    """The gradient of everything that has one, removed from the model."""
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    return gradient


# ---------------------------------------------------------------- text

def test_every_prompt_and_response_survives_the_tokenizer(tiny):
    for row in make_rows(10)[0]:
        for text in (row.student_prompt(), row.teacher_prompt("symbols+plan"), row.response(),
                     row.ask(), row.answers(), "else: 你好 \t{}"):
            ids = tiny[1].tokenizer(text, add_special_tokens=False)["input_ids"]
            assert tiny[1].tokenizer.decode(ids) == text


def test_chat_template(tiny):
    rows, images = make_rows(1)
    batch = common.encode(tiny[1], [rows[0].student_prompt()], images)
    cells = rows[0].level ** 2  # one image token per cell
    assert tiny[1].tokenizer.decode(batch["input_ids"][0]) == (
        "<|im_start|>user\n<|vision_start|>" + "<|image_pad|>" * cells + "<|vision_end|>"
        + rows[0].student_prompt() + "<|im_end|>\n<|im_start|>assistant\n")
    assert batch["mm_token_type_ids"].sum() == cells


def test_a_large_picture_has_at_most_256_tokens(tmp_path):
    """Whatever the checkpoint allows: as many as one of 512x512."""
    folder = shutil.copytree(common.TINY, tmp_path / "model")
    file = folder / "processor_config.json"
    assert '"longest_edge": 262144' in file.read_text()
    file.write_text(file.read_text().replace('"longest_edge": 262144', '"longest_edge": 9999999'))
    processor = common.load(str(folder), 32)[1]
    for size, tokens in ((512, 256), (1024, 256), (256, 64)):
        batch = common.encode(processor, ["What?"], [Image.new("RGB", (size, size))])
        assert int(batch["mm_token_type_ids"].sum()) == tokens


def test_the_picture_limit_belongs_to_a_run(toy_data, tmp_path, capsys, monkeypatch):
    """--max_pixels shrinks pictures; stages and evaluation take it over, and cannot change it."""
    picture, sizes, encode = Image.new("RGB", (512, 512)), [], common.encode
    for most, tokens in ((65_536, 64), (10**6, 256)):           # the checkpoint's own limit stays
        processor = common.load(common.TINY, 32, most)[1]
        batch = common.encode(processor, ["What?"], [picture])
        assert int(batch["mm_token_type_ids"].sum()) == tokens

    def look(*words):
        sizes.append(encode(*words))
        return sizes[-1]
    monkeypatch.setattr(common, "encode", look)
    monkeypatch.setattr(coldstart, "validate", lambda *words: {})
    out = str(tmp_path / "run")
    words = ["--data", str(toy_data), "--out", out, "--batch", "2"]
    coldstart.main(coldstart.parse_args([*words, "--steps", "1", "--max_pixels", "4096"]))
    assert sizes and all((one["image_grid_thw"].prod(1) <= 16).all() for one in sizes)
    assert evaluate.parse_args(["--adapter", out]).max_pixels == 4096
    assert distill.parse_args(["--init", out]).max_pixels == 4096
    other = distill.parse_args(["--init", out, "--max_pixels", "8192", "--data", str(toy_data),
                                "--out", str(tmp_path / "new")])
    assert "--max_pixels" in stops(capsys, distill.main, other)
    again = coldstart.parse_args([*words, "--steps", "2"])
    assert again.max_pixels == 262_144
    assert "--max_pixels" in stops(capsys, coldstart.main, again)
    other = shutil.copytree(out, tmp_path / "other")
    record = json.loads((other / "args.json").read_text())
    record["args"]["max_pixels"] = 8192
    (other / "args.json").write_text(json.dumps(record))
    args = evaluate.parse_args(["--adapter", out, str(other)])
    assert "--max_pixels" in stops(capsys, evaluate.find_adapters, args)


def test_room_for_the_picture_and_the_response(tiny, capsys):
    """To the token: the context less 300 for the picture and what is to be written."""
    tokenizer = SimpleNamespace(tokenize=lambda text, verbose: list(text))
    processor = SimpleNamespace(tokenizer=tokenizer, image_processor=tiny[1].image_processor)
    room = tiny[0].config.text_config.max_position_embeddings - 300 - 50
    common.check_lengths(tiny[0], processor, {"a": "x" * room}, 50)
    words = tiny[0], processor, {"a": "x", "b": "x" * (room + 1)}, 50
    assert f"b: what the model reads and writes has {room + 1} tokens" in stops(
        capsys, common.check_lengths, *words)


def test_prompts_are_left_padded_and_responses_end_with_the_eos(tiny):
    rows, batch, ids, mask = pictures_and_answers(tiny[1], 3)
    assert (batch["attention_mask"][:, -1] == 1).all()
    assert (batch["attention_mask"].diff(dim=1) >= 0).all() and (mask.diff(dim=1) <= 0).all()
    for row, row_ids, row_mask in zip(rows, ids, mask, strict=True):
        kept = row_ids[row_mask.bool()]
        assert kept[-1] == tiny[1].tokenizer.eos_token_id
        assert tiny[1].tokenizer.decode(kept[:-1]) == row.response()


def test_rows_of_a_batch_are_as_if_encoded_alone(tiny):
    rows, images = make_rows(5)
    texts = [row.student_prompt() for row in rows]
    whole = common.encode(tiny[1], texts, images)
    ids, mask = common.encode_responses(tiny[1], [row.response() for row in rows])
    for i, (own_ids, own_mask, own) in enumerate(common.micro_batches(2, (ids, mask), (whole,))):
        some = slice(2 * i, 2 * i + 2)
        alone = common.encode(tiny[1], texts[some], images[some])
        assert alone.keys() == own.keys()
        assert all(torch.equal(alone[name], own[name]) for name in alone)
        answers = [row.response() for row in rows[some]]
        alone_ids, alone_mask = common.encode_responses(tiny[1], answers)
        assert torch.equal(alone_ids, own_ids) and torch.equal(alone_mask, own_mask)
    assert i == 2


# ---------------------------------------------------------------- sampling

def test_greedy_sampling_equals_generate_given_two_eos(tiny, student, monkeypatch):
    processor, net = copy.deepcopy(tiny[1]), common.network(student)
    rows, images = make_rows(5)
    prompt = common.encode(processor, [row.student_prompt() for row in rows], images)
    free, *_ = common.sample(student, processor, prompt, 12)
    second = int(free[0, 2])  # a token that does come; and it is the padding too, as Qwen's second
    ends = [processor.tokenizer.eos_token_id, second]
    monkeypatch.setattr(net.generation_config, "eos_token_id", ends)
    processor.tokenizer.pad_token = processor.tokenizer.convert_ids_to_tokens(second)
    assert processor.tokenizer.pad_token_id == second
    ids, mask, _ = common.sample(student, processor, prompt, 20)
    cut = common.was_cut(student, processor, ids, mask)
    theirs = net.generate(**prompt, max_new_tokens=20, do_sample=False, eos_token_id=ends,
                          pad_token_id=second)[:, prompt["input_ids"].shape[1]:]
    assert mask[0].sum() <= 3
    for row, own, keep, was_cut in zip(theirs, ids, mask, cut, strict=True):
        kept = own[keep.bool()].tolist()
        assert row[:len(kept)].tolist() == kept
        assert not set(ends) & set(kept[:-1])                    # through the first one inclusive
        assert was_cut == (kept[-1] not in ends) and (len(kept) == 20 or not was_cut)


@pytest.fixture(params=["Decoder", "GraphDecoder"])
def decoder(request, monkeypatch):
    """Each of the two, the second as on CUDA, but that a step is done anew and not replayed."""
    way = (getattr(common, request.param), {"Decoder": 1, "GraphDecoder": 8}[request.param])
    monkeypatch.setattr(common, "decoder_of", lambda device: way)
    monkeypatch.setattr(common, "captured", lambda work: work)
    return request.param


def test_mask_goes_through_the_first_eos(tiny, monkeypatch, decoder):
    """Tokens follow a script; asked at every token, a row leaves the batch where it ends."""
    model, processor = tiny
    end, pad = processor.tokenizer.eos_token_id, processor.tokenizer.pad_token_id
    script = [[7, 7], [end, 8], [9, end], [end, 9]] + [[7, 7]] * 4
    if decoder == "Decoder":
        script = [[7, 7], [end, 8], [end]]
    script = iter(torch.tensor(tokens) for tokens in script)
    monkeypatch.setattr(common, "draw_token", lambda *words: (next(script), 0.0))
    rows, images = make_rows(2)
    prompt = common.encode(processor, [row.student_prompt() for row in rows], images)
    ids, mask, _ = common.sample(model, processor, prompt, 9, np.zeros((2, 9)))
    assert ids.tolist() == [[7, end, pad], [7, 8, end]]
    assert mask.tolist() == [[1, 1, 0], [1, 1, 1]] and next(script, None) is None
    assert common.decode(processor, ids, mask) == [
        processor.tokenizer.decode([7]), processor.tokenizer.decode([7, 8])]


def test_a_token_depends_on_its_own_number_only(tiny, decoder):
    """Not on the rows beside it: exactly so in float64, whatever the rollout batch."""
    model, processor = copy.deepcopy(tiny[0]).double(), tiny[1]
    rows, images = make_rows(5)
    prompt = common.encode(processor, [row.student_prompt() for row in rows], images)
    uniforms = np.random.default_rng(0).random((5, 30))
    whole = common.sample(model, processor, prompt, 30, uniforms)
    for size in (1, 2, 4):
        ids, mask, drawn = common.sample(model, processor, prompt, 30, uniforms, rollout_batch=size)
        assert torch.equal(ids, whole[0]) and torch.equal(mask, whole[1])
        torch.testing.assert_close(drawn * mask, whole[2] * mask)
    uniforms[1] = 1 - uniforms[1]
    other, *_ = common.sample(model, processor, prompt, 30, uniforms)
    width = min(other.shape[1], whole[0].shape[1])
    same = (other[:, :width] == whole[0][:, :width]).all(1)
    assert same.tolist() == [True, False, True, True, True]


def test_one_cache_at_a_time(tiny, monkeypatch):
    """Rows in parts: keys and values of one are gone before those of the next are made."""
    alive = []

    def make(*args):
        assert not any(reference() for reference in alive)
        made = common.Decoder(*args)
        alive.append(weakref.ref(made))
        return made
    monkeypatch.setattr(common, "decoder_of", lambda device: (make, 1))
    rows, images = make_rows(5)
    prompt = common.encode(tiny[1], [row.student_prompt() for row in rows], images)
    common.sample(*tiny, prompt, 8, rollout_batch=2)
    assert len(alive) == 3


@pytest.mark.parametrize("with_pictures", [True, False])
def test_fixed_memory_draws_the_same_tokens(tiny, monkeypatch, with_pictures):
    """As CUDA samples, with rows that leave the batch at different times, in float64."""
    model, processor = copy.deepcopy(tiny[0]).double(), tiny[1]
    rows, images = make_rows(9)
    prompt = common.encode(processor, [row.student_prompt() for row in rows],
                           images if with_pictures else None)
    uniforms, found, kept = np.random.default_rng(3).random((9, 60)), [], []
    keep = common.GraphDecoder.keep
    monkeypatch.setattr(common, "captured", lambda work: work)

    def keep_and_look(self, going):
        keep(self, going)
        kept.append(len(going))
        assert not self.warm and self.replay is None     # the old graph reads the old memory
    monkeypatch.setattr(common.GraphDecoder, "keep", keep_and_look)
    for way in ((common.Decoder, 1), (common.GraphDecoder, 2)):
        monkeypatch.setattr(common, "decoder_of", lambda device, way=way: way)
        ids, mask, drawn = common.sample(model, processor, prompt, 60, uniforms, rollout_batch=6)
        found.append((ids, mask, drawn * mask))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
    lengths = found[0][1].sum(1)
    assert kept and len(set(lengths.tolist())) > 3


def test_picture_placeholders_are_never_sampled(tiny):
    """Not even where the network wants nothing else."""
    model, processor = copy.deepcopy(tiny[0]), tiny[1]
    placeholders = [processor.image_token_id, processor.video_token_id,
                    processor.vision_start_token_id]
    rows, images = make_rows(2)
    prompt = common.encode(processor, [row.student_prompt() for row in rows], images)
    with torch.no_grad():
        position_ids, _ = common.positions(model, prompt)
        hidden = model.model(**prompt, position_ids=position_ids).last_hidden_state[:, -1].mean(0)
        model.lm_head.weight[placeholders] = 100 * hidden
    for uniforms in (None, np.random.default_rng(0).random((2, 8))):
        ids, mask, _ = common.sample(model, processor, prompt, 8, uniforms)
        assert not torch.isin(ids[mask.bool()], torch.tensor(placeholders)).any()


# ---------------------------------------------------------------- scoring and the cold start's loss

def test_scoring_equals_the_plain_model(tiny):
    """Against transformers' own forward pass: one row, no padding, its own positions and loss."""
    model, processor = tiny
    rows, images = make_rows(3)
    texts = [row.ask(("map",)) for row in rows]
    targets = [row.answers(("map",)) for row in rows]
    ids, mask = common.encode_responses(processor, targets)
    prompt = common.encode(processor, texts, images)
    alone, loss = [], 0.0
    for i in range(3):
        one = common.encode(processor, texts[i:i + 1], images[i:i + 1])
        own = ids[i][mask[i].bool()][None]
        assert own[0, -1] == processor.tokenizer.eos_token_id
        labels = torch.cat([torch.full_like(one["input_ids"], -100), own], 1)
        model.model.rope_deltas = None
        out = model(input_ids=torch.cat([one["input_ids"], own], 1), labels=labels,
                    pixel_values=one["pixel_values"], image_grid_thw=one["image_grid_thw"],
                    mm_token_type_ids=torch.cat([one["mm_token_type_ids"], own * 0], 1))
        alone.append(out.logits[0, one["input_ids"].shape[1] - 1:-1])
        loss += out.loss * own.shape[1]
    torch.testing.assert_close(logits(model, prompt, ids, mask), torch.cat(alone),
                               atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(coldstart.answer_loss(model, prompt, ids, mask), loss,
                               atol=1e-3, rtol=1e-4)


def test_gradient_checkpointing_changes_no_gradient(tiny, student):
    """As `load` switches it on for CUDA: in train mode, adapters on in the recomputation."""
    _, prompt, ids, mask = pictures_and_answers(tiny[1], 3)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            common.network(student).gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False})
        coldstart.answer_loss(student.train(), prompt, ids, mask).backward()
        gradients.append(flat_gradient(student))
    common.network(student).gradient_checkpointing_disable()
    student.eval()
    torch.testing.assert_close(gradients[0], gradients[1])


def test_what_the_cold_start_draws():
    """Every row and question, maps in their share, else one to three others, none twice."""
    rows = make_rows(5)[0]

    def drawn(share):
        examples = coldstart.draw_examples(rows, 3000, np.random.default_rng(0), share)
        assert len(examples) == 3000
        return examples
    examples = drawn(0.6)
    for row in rows:
        own = [names for one, names in examples if one is row]
        asked = [names for names in own if names != ("map",)]
        assert 500 < len(own) < 700 and 0.53 < 1 - len(asked) / len(own) < 0.67
        assert all(len(set(names)) == len(names) for names in asked)
        lengths = [len(names) for names in asked]
        assert all(0.25 < lengths.count(n) / len(asked) < 0.42 for n in (1, 2, 3))
        assert set(sum(asked, ())) == set(row.questions()) - {"map"}
    assert all(names == ("map",) for _, names in drawn(1))
    assert not any("map" in names for _, names in drawn(0))


def test_validation_by_hand(tiny, tmp_path, monkeypatch):
    """Loss per token whatever the micro-batch; a row is right with all of its answers."""
    model, processor = tiny
    rows, pictures = make_rows(3)
    for i, (row, picture) in enumerate(zip(rows, pictures, strict=True)):
        row.path = str(tmp_path / f"{i}.png")
        picture.save(row.path)
    names = [("map",), ("size", "player"), ("size",)]
    texts = [rows[0].answers(names[0]), "1. 9x9\n2. " + rows[1].answers(("player",)),
             rows[2].answers(names[2])]
    args = SimpleNamespace(micro_batch=2, rollout_batch=2, max_new_tokens=2, target="perception")
    monkeypatch.setattr(common, "decode", lambda *words: texts)
    found = coldstart.validate(model, processor, list(zip(rows, names, strict=True)), args)
    loss, tokens = 0.0, 0
    for example in zip(rows, names, strict=True):
        prompt, ids, mask = coldstart.encode(processor, [example], "cpu")
        loss += float(coldstart.answer_loss(model, prompt, ids, mask))
        tokens += int(mask.sum())
    assert found == {"val_loss": pytest.approx(loss / tokens, rel=1e-4), "val_map": 1,
                     "val_questions": 0.5, "val_length": 2}
    args.target, texts = "answer", [rows[0].response(), "<answer>U,U,U,U,U,U</answer>", ""]
    found = coldstart.validate(model, processor, [(row, ("answer",)) for row in rows], args)
    assert found["val_success"] == 1 / 3 and found.keys() == {
        "val_loss", "val_success", "val_optimal", "val_length"}


def test_the_cold_starts_steps_and_validations(toy_data, tmp_path, monkeypatch):
    """Gradients in train mode, from the split train; held-out answers in eval mode, from val.

    Only so are activations checkpointed, and keys and values kept.
    """
    seen, encode, loss, sample = set(), coldstart.encode, coldstart.answer_loss, common.sample

    def state(model=None):
        return torch.is_grad_enabled(), model and model.training

    def encode_spy(processor, examples, device):
        seen.update((row.id.partition("_")[0], *state()) for row, _ in examples)
        return encode(processor, examples, device)

    def loss_spy(model, *words):
        seen.add(("loss", *state(model)))
        return loss(model, *words)

    def sample_spy(model, processor, prompts, limit, **more):
        seen.add(("sample", *state(model), limit))
        return sample(model, processor, prompts, limit, **more)
    monkeypatch.setattr(coldstart, "encode", encode_spy)
    monkeypatch.setattr(coldstart, "answer_loss", loss_spy)
    monkeypatch.setattr(common, "sample", sample_spy)
    coldstart.main(coldstart.parse_args([
        "--preset", "tiny", "--data", str(toy_data), "--out", str(tmp_path), "--steps", "2",
        "--batch", "2", "--max_new_tokens", "2", "--eval_every", "1"]))
    assert seen == {("train", True, None), ("val", False, None), ("loss", True, True),
                    ("loss", False, False), ("sample", False, False, 2)}


# ---------------------------------------------------------------- adapters and NF4

def test_lora_pattern_is_anchored(tiny):
    for vision in (False, True):
        model = common.add_lora(copy.deepcopy(tiny[0]), 4, vision=vision)
        names = [name for name, _ in model.named_parameters() if "lora_A" in name]
        assert sum("language_model" in name for name in names) == 7 * 5
        assert sum("visual" in name for name in names) == (4 * 3 + 2 * 3 if vision else 0)
        assert not any("lm_head" in name or "embed" in name for name in names)
        scales = {module.scaling["default"] for module in model.modules()
                  if hasattr(module, "lora_A")}
        assert scales == {2}                                         # alpha is twice the rank


def test_nf4_gradients_are_the_same_after_sampling():
    """On the CPU, bitsandbytes would repack the weights in eval mode; that has no backward."""
    model, processor = common.load(common.TINY, 4)
    torch.manual_seed(0)
    model = common.add_lora(model, 4)
    _, prompt, ids, mask = pictures_and_answers(processor, 2)
    gradients = []
    for _ in range(2):
        coldstart.answer_loss(model.train(), prompt, ids, mask).backward()
        gradients.append(flat_gradient(model))
        common.sample(model.eval(), processor, prompt, 3)
    assert gradients[0].abs().max() > 0 and torch.equal(*gradients)


@pytest.mark.parametrize("bits", [32, 4])
def test_both_stages_change_only_the_adapter(toy_data, tmp_path, bits, monkeypatch):
    """Both scripts' main, plain and in NF4; the base model's logits stay bit-identical."""
    monkeypatch.setattr(coldstart, "validate", lambda *words: {})
    model, processor = common.load(common.TINY, bits)
    if bits == 4:
        from bitsandbytes.nn import Linear4bit
        linears = {name: type(module) for name, module in model.named_modules()
                   if isinstance(module, torch.nn.Linear)}
        four = {name for name, kind in linears.items() if kind is Linear4bit}
        assert four == {name for name in linears if ".language_model." in name}
        assert len(four) == 7 * 5
    _, prompt, ids, mask = pictures_and_answers(processor, 3)
    before = logits(model, prompt, ids, mask)
    frozen = {name: weight.clone() for name, weight in model.state_dict().items()}

    flags = ["--preset", "tiny", "--bits", str(bits), "--data", str(toy_data), "--steps", "2",
             "--batch", "4", "--micro_batch", "3"]
    first, second = tmp_path / "coldstart", tmp_path / "distill"
    coldstart.main(coldstart.parse_args([*flags, "--out", str(first)]))
    keys = json.loads((first / "trained_rows.json").read_text())["rows"]
    keys.append("f" * 16)                                                    # of a run before it
    (first / "trained_rows.json").write_text(json.dumps({"rows": keys}))
    distill.main(distill.parse_args([*flags, "--out", str(second), "--init", str(first),
                                     "--max_new_tokens", "10", "--eval_every", "0"]))
    trained = set(json.loads((second / "trained_rows.json").read_text())["rows"])
    assert trained == {row.key() for row in gen_data.load_rows(toy_data, "train")} | {"f" * 16}
    weights = [load_file(out / "adapter/adapter_model.safetensors") for out in (first, second)]
    assert weights[0].keys() == weights[1].keys() and all("lora_" in name for name in weights[0])
    assert any(not torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    targets = [json.loads((out / "adapter/adapter_config.json").read_text())["target_modules"]
               for out in (first, second)]
    assert targets[0] == targets[1] == sorted(common.linears(model, True))  # names, in one order

    model = common.add_lora(model, path=str(second / "adapter"))
    assert not torch.equal(logits(model, prompt, ids, mask), before)
    with model.disable_adapter():
        assert torch.equal(logits(model, prompt, ids, mask), before)
    plain = model.unload()
    assert all(torch.equal(weight, frozen[name]) for name, weight in plain.state_dict().items())


def test_an_adapter_merges_with_plain_peft(student, tiny, tmp_path, monkeypatch):
    """The lines in the docs, in 32 bits: a checkpoint that needs neither PEFT nor this project."""
    student.save_pretrained(tmp_path / "out/tiny/distill/adapter")
    (tmp_path / "tiny").symlink_to(common.TINY)
    monkeypatch.chdir(tmp_path)
    page = Path(common.__file__).parent / "docs/your_own_task.md"
    blocks = page.read_text(encoding="utf-8").split("```python\n")[1:]
    lines, = [block.split("```")[0] for block in blocks if "merge_and_unload" in block]
    exec(lines.replace("bfloat16", "float32"), {})

    _, prompt, ids, mask = pictures_and_answers(tiny[1], 2)
    merged, _ = common.load(str(tmp_path / "merged"), 32)
    torch.testing.assert_close(logits(merged, prompt, ids, mask),
                               logits(student, prompt, ids, mask), atol=1e-3, rtol=1e-3)


def test_the_backbone_plans_from_symbols_and_not_from_pictures(tiny):
    model, processor = tiny
    wins = {"symbols": [], "pictures": []}
    for task, levels in gen_data.PRESETS["tiny"]["tasks"].items():
        for level in levels:
            rows = list(gen_data.sample_rows(task, level, "test", 20, seed=11))
            images = [row.puzzle.render(32) for row in rows]
            texts = {"symbols": [row.teacher_prompt("symbols") for row in rows],
                     "pictures": [row.student_prompt() for row in rows]}
            prompts = {"symbols": common.encode(processor, texts["symbols"]),
                       "pictures": common.encode(processor, texts["pictures"], images)}
            for source, prompt in prompts.items():
                texts = common.decode(processor, *common.sample(model, processor, prompt, 120)[:2])
                outcomes = [row.judge(text)["outcome"]
                            for row, text in zip(rows, texts, strict=True)]
                wins[source].append(outcomes.count("success") / len(rows))
    assert min(wins["symbols"]) >= 0.85 and np.mean(wins["pictures"]) <= 0.3, wins


def test_adapters_do_not_decay():
    weight = torch.nn.Parameter(torch.ones(3))
    weight.grad = torch.zeros(3)
    common.adamw([weight], 0.1).step()
    assert weight.tolist() == [1, 1, 1]


def test_the_schedule():
    """A tenth of warm-up, then half a cosine; neither the first nor the last step is wasted.

    A second group has the same of its own peak.
    """
    groups = [{"params": torch.nn.Parameter(torch.zeros(1)), "lr": lr, "initial_lr": lr}
              for lr in (2.0, 32.0)]
    optimizer = torch.optim.SGD(groups)
    rates = [common.schedule(optimizer, step, 100) for step in range(100)]
    assert rates[:10] == pytest.approx([0.2 * (step + 1) for step in range(10)])
    assert rates[9] == max(rates) == 2.0 and rates[9:] == sorted(rates[9:], reverse=True)
    assert 0 < rates[99] < 0.001 and common.schedule(optimizer, 0, 1) == 2.0
    assert rates[9 + 91 // 7] == pytest.approx(1 + np.cos(np.pi / 7))
    for step in (0, 40, 99):
        first = common.schedule(optimizer, step, 100)
        assert [group["lr"] for group in optimizer.param_groups] == [first, 16 * first]
