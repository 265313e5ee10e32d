"""Every change in docs/recipes.md, made in a copy of the scripts, trained, killed and resumed.

In a fork some of them no longer fit, so that `python -m pytest` leaves them out: -m recipes.
"""
import importlib.util
import inspect
import json
import re
import shutil
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import numpy as np
import processes
import pytest
import torch
from conftest import adapted
from PIL import ImageFilter
from safetensors.torch import load_file, save_file
from test_tasks import Lamps
from torch.nn.functional import cross_entropy, kl_div

import common
import gen_data
from gen_data import open_picture

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/recipes.md").read_text(encoding="utf-8")
RECIPES = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL))
BLOCK = r"^```diff\n(.*?)^```$"
CLASS = "# The class `Lamps` of tests/test_tasks.py stands here.\n"
STEPS = 4
NO_SIGNAL = "Batches without a signal left out"
ON_TOP = {NO_SIGNAL: "Advantages"}  # a recipe that changes another one's copy
# What a recipe's run is given beside the flags of `train`: what it adds, and what it needs.
WORDS = {
    "A divergence": ["--divergence", "softened_kl"],
    "A teacher that is renewed": ["--init", "out/first", "--teacher_weights", "ema"],
    "An augmented view": ["--teacher_reads", "picture"],
    "Advantages": ["--divergence", "policy"],
    NO_SIGNAL: ["--divergence", "policy", "--tasks", "frozenlake:3"],
    "Two updates per batch": ["--divergence", "importance"],
    "On and off policy by row": ["--on_policy", 0.5],
    "A curriculum by board size": ["--tasks", "maze:3-4"],
    "Early stopping": ["--eval_every", 1, "--lr", 1e-12],
    "LoRA+": ["--init", "out/first"],
    "Another dropout": ["--init", "out/first"],
    "Another share of holes": ["--data", "data/holes", "--tasks", "frozenlake:4"],
    "A task": ["--data", "data/lamps", "--tasks", "lamps"],
    "A backbone": ["--preset", "mine", "--data", "data/tiny", "--chunk", 16],
}
READ = {  # what a recipe reads beside rows and checkpoint
    "Another adapter as the teacher": "out/other/adapter/adapter_model.safetensors",
    "A second model as the teacher": "models/teacher/model.safetensors",
}
# In a child: keeps what the loss of a step is given, its rollouts, and a prompt of the student's.
SPY = """
import json
from pathlib import Path
clock, loss, average = common.Run.clock, module.chunked_divergence, common.average_gradients
describe, encode, factors, kept = module.rollout_lines, common.encode, [], {{}}
def spy_clock(run, phase):
    if phase == "sample":  # what follows is the loss, not a validation
        factors.clear()
    clock(run, phase)
def spy_loss(hidden, teacher, token, drawn, factor, *more):
    gradient, scores = loss(hidden, teacher, token, drawn, factor, *more)
    assert gradient.isfinite().all() and not gradient[factor == 0].any()
    factors.extend(factor.tolist())
    return gradient, scores
def spy_average(weights, total, tokens):
    kept["tokens"] = tokens
    return average(weights, total, tokens)
def spy_lines(model, processor, step, rows, ids, mask, scores):
    lines = describe(model, processor, step, rows, ids, mask, scores)
    tokens = [row[keep.bool()].tolist() for row, keep in zip(ids, mask)]
    with open({file!r}, "a") as file:
        print(json.dumps(dict(rollouts=lines, ids=tokens, factors=factors, **kept)), file=file)
    return lines
def spy_encode(processor, prompts, pictures, *more):
    if pictures and pictures[0]:
        Path({file!r}).with_suffix(".txt").write_text(prompts[0])
    return encode(processor, prompts, pictures, *more)
common.Run.clock, module.chunked_divergence = spy_clock, spy_loss
module.rollout_lines, common.average_gradients, common.encode = spy_lines, spy_average, spy_encode
"""
# A process kills itself at the beginning of its third step.
KILL = """
import os
clock = common.Run.clock
def die(run, phase):
    if run.step == 2 and phase == "encode":
        os.kill(os.getpid(), 9)
    clock(run, phase)
common.Run.clock = die
"""
# A stand-in for a module that is not installed: what it is called with, line by line.
WANDB = """
import json
from pathlib import Path
kept = {}
def write(**call):
    with open(kept["dir"] / "wandb.jsonl", "a") as file:
        print(json.dumps(dict(id=kept["id"], **call)), file=file)
def init(dir, id, resume, config, mode):
    kept.update(dir=Path(dir), id=id)
    write(init=resume)
def log(values, step):
    write(step=step, loss=values["loss"])
"""


# ---------------------------------------------------------------- the page

def changes(text):
    """Yields (file, the lines that are there, the lines in their place) of a recipe's block."""
    [block] = re.findall(BLOCK, text, re.MULTILINE | re.DOTALL)
    for name, hunks in re.findall(r"^--- (\S+)\n(.*?)(?=^--- |\Z)", block, re.M | re.S):
        for hunk in hunks.split("@@\n"):
            lines = hunk.splitlines(keepends=True)
            yield (name, "".join(line[1:] or line for line in lines if line[0] != "+"),
                   "".join(line[1:] or line for line in lines if line[0] != "-"))


def fork(folder, *names):
    """A copy of the scripts with the changes of these recipes."""
    folder.mkdir()
    for script in processes.SCRIPTS:
        shutil.copy(ROOT / f"{script}.py", folder)
    shutil.copy(ROOT / "pyproject.toml", folder)
    for name in ("tiny", "tools"):
        (folder / name).symlink_to(ROOT / name)
    for recipe in [*filter(None, map(ON_TOP.get, names)), *names]:
        for file, old, new in changes(RECIPES[recipe]):
            text = (folder / file).read_text(encoding="utf-8")
            assert text.count(old) == 1, f"docs/recipes.md, {recipe}: not once in {file}:\n{old}"
            text = text.replace(old, new).replace(CLASS, source_of(Lamps))
            (folder / file).write_text(text, encoding="utf-8")
    return folder


def source_of(task):
    """The source of a task's class, as it would stand in gen_data.py."""
    return inspect.getsource(task).replace("gen_data.", "")


@pytest.mark.recipes
def test_the_table_names_every_recipe_and_its_lines():
    """In the page's order, with the lines that its block takes away and puts in."""
    rows = re.findall(r"^\| .*?\]\(#([\w-]+)\).* \| -(\d+) \+(\d+) \|$", PAGE, re.MULTILINE)
    wanted = []
    for name, text in RECIPES.items():
        anchor = re.sub(r"[^\w -]", "", name).lower().replace(" ", "-")  # as GitHub makes it
        [block] = re.findall(BLOCK, text, re.MULTILINE | re.DOTALL)
        minus = re.findall(r"^-(?!-- )", block, re.MULTILINE)
        plus = re.findall(r"^\+", block, re.MULTILINE)
        wanted.append((anchor, str(len(minus)), str(len(plus))))
    assert rows == wanted


@pytest.mark.recipes
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_short_and_clean(tmp_path, name):
    new = [line for line in RECIPES[name].splitlines() if line.startswith("+")]
    assert 1 <= len(new) <= 15
    folder = fork(tmp_path / "fork", name)
    subprocess.run([sys.executable, "-m", "ruff", "check", "--no-cache", "-q", "."], cwd=folder,
                   check=True)


# ---------------------------------------------------------------- every recipe, killed and resumed

@pytest.fixture(scope="session")
def place(tmp_path_factory, toy_data, tiny):
    """A folder in which runs are started: toy data, and twice an adapter that does something."""
    place = tmp_path_factory.mktemp("recipes")
    (place / "data").mkdir()
    (place / "data/tiny").symlink_to(toy_data)
    model = adapted(tiny[0], vision=False)
    for name in ("first", "other"):
        model.save_pretrained(place / f"out/{name}/adapter")
    model.unload()
    return place


def train(place, out, *words, root=None, patch="", code=0):
    """A run of distill.py -> (what it said, the lines of its log)."""
    flags = ["--steps", STEPS, "--save_every", 2, "--batch", 8, "--micro_batch", 4,
             "--max_new_tokens", 34, "--lr", 0.003, "--tasks", "maze:3", "--out", f"out/{out}"]
    if "--init" not in words:
        flags += ["--init", "none"]
        if "--preset" not in words:
            flags += ["--lora_rank", 4, "--lora_vision", 0]
    done = processes.run(place, "distill", *flags, *words, root=root, patch=patch)
    assert done.code == code, done.err
    lines = [json.loads(line) for line in open(place / "out" / out / "metrics.jsonl")]
    return done.out + done.err, lines


def prepare(place, root, name):
    """What a recipe needs beside the change."""
    if name == "Another share of holes":
        make_data(place, root, "holes", "frozenlake:4", "--train", 40)
    if name == "A task":
        make_data(place, root, "lamps", "lamps:7")
    if name == "A backbone":
        other_backbone(place / "models/mine")
    if name == "A second model as the teacher":
        other_backbone(place / "models/teacher")
    if name == "wandb":
        (root / "wandb").mkdir()
        (root / "wandb/__init__.py").write_text(WANDB)


def make_data(place, root, name, *words):
    done = processes.run(place, "gen_data", "--train", 12, "--val", 3, "--test", 3,
                         "--out", f"data/{name}", "--tasks", *words, root=root)
    assert done.code == 0, done.err


def other_backbone(folder):
    """A checkpoint like tiny's, with random weights of other sizes."""
    from transformers import AutoProcessor, Qwen3VLConfig, Qwen3VLForConditionalGeneration
    config = json.loads((ROOT / "tiny/config.json").read_text())
    config["text_config"] |= dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2)
    config["vision_config"] |= dict(out_hidden_size=64)
    torch.manual_seed(1)
    Qwen3VLForConditionalGeneration(Qwen3VLConfig(**config)).save_pretrained(folder)
    AutoProcessor.from_pretrained(ROOT / "tiny").save_pretrained(folder)


@pytest.fixture(scope="session")
def whole(place):
    """A function of a recipe: the run that is left alone, once.

    It returns (its copy of the scripts, the lines of its log, what SPY kept of each step).
    """
    @lru_cache
    def train_once(name):
        root = fork(place / name.replace(" ", "-"), name)
        prepare(place, root, name)
        kept = place / f"{root.name}.jsonl"
        _, lines = train(place, f"whole-{root.name}", *WORDS.get(name, []), root=root,
                         patch=SPY.format(file=str(kept)))
        return root, lines, [json.loads(line) for line in open(kept)]
    return train_once


@pytest.mark.recipes
@pytest.mark.parametrize("name", RECIPES)
def test_killed_and_resumed_it_ends_like_one_left_alone(place, whole, name):
    root, lines, steps = whole(name)
    last = 3 if name == "Early stopping" else STEPS
    assert [line["step"] for line in lines] == list(range(1, last + 1))
    done = [line for line in lines if "left_out" not in line]
    assert [len(step["rollouts"]) for step in steps] == [8] * len(done)
    assert (len(done) < len(lines)) == (name == NO_SIGNAL) and done
    words = [f"killed-{root.name}", *WORDS.get(name, [])]
    train(place, *words, root=root, patch=KILL, code=-9)
    out = [place / f"out/{kind}-{root.name}" for kind in ("whole", "killed")]
    assert torch.load(out[1] / "checkpoint.pt", weights_only=True)["step"] == 2
    if name in READ:
        file, kept = place / READ[name], (place / READ[name]).read_bytes()
        save_file({key: 0 * weight for key, weight in load_file(file).items()}, file,
                  metadata={"format": "pt"})
        assert "differs in the contents of teacher." in train(place, *words, root=root, code=2)[0]
        file.write_bytes(kept)
    assert "resuming after step 2 of 4" in train(place, *words, root=root)[0]
    assert processes.contents(out[1]) == processes.contents(out[0])
    records = [json.loads((folder / "args.json").read_text()) for folder in out]
    for record in records:
        del record["args"]["out"]
    assert records[0] == records[1]


# ---------------------------------------------------------------- what a recipe does

def load_fork(root):
    """distill.py of a copy as a module, on top of this project's others."""
    spec = importlib.util.spec_from_file_location("distill_of_a_fork", root / "distill.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.recipes
def test_formulas(tmp_path):
    """The softened KL by torch's own at that temperature; the policy's by torch's NLL."""
    table = load_fork(fork(tmp_path / "fork", "A divergence")).DIVERGENCES
    torch.manual_seed(0)
    z, w = torch.randn(2, 5, 30, dtype=torch.float64)
    value = table["softened_kl"](z.log_softmax(-1), w.log_softmax(-1))
    log_p, log_q = ((x / 2).log_softmax(-1) for x in (z, w))
    wanted = 4 * kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(value, wanted)
    table = load_fork(fork(tmp_path / "other", "Advantages")).DIVERGENCES
    token = torch.tensor([3, 0, 29, 7, 7])
    value = table["policy"](z.log_softmax(-1), w.log_softmax(-1), token)
    torch.testing.assert_close(value, cross_entropy(z, token, reduction="none"))


def weights_of(name, rollouts):
    """By hand, from the rollouts of a step: the factor of every token."""
    factors = []
    for i, line in enumerate(rollouts):
        text, place = "", []
        for token in line["tokens"]:
            text += token
            place.append(2 if "<answer" in text else 1 if "Route" in text else 0)
        if name == "A weight for each part of the response":
            factors += [(0.5, 1, 1)[k] for k in place]
        elif name == "The loss on one part":
            factors += [float(k > 0) for k in place]
        elif name == "Without the responses that were cut":
            factors += [0.0 if line["cut"] else 1.0] * len(place)
        elif name == "Rewards times KL":
            factors += [1.0 if line["outcome"] == "success" else 2.0] * len(place)
        elif name in ("Advantages", NO_SIGNAL):
            group = rollouts[i // 4 * 4:][:4]
            success = np.mean([other["outcome"] == "success" for other in group])
            factors += [float((line["outcome"] == "success") - success)] * len(place)
        else:
            factors += [1.0] * len(place)
    return factors


@pytest.mark.recipes
@pytest.mark.parametrize("name", [
    "A weight for each part of the response", "The loss on one part",
    "Without the responses that were cut", "Rewards times KL", "Several rollouts per prompt",
    "Advantages", NO_SIGNAL])
def test_factors_tokens_and_the_loss(whole, name):
    """SPY has seen that no gradient reaches a token whose factor is 0. The logged KL is of all."""
    seen = set()
    _, lines, steps = whole(name)
    lines = [line for line in lines if "left_out" not in line]
    for line, step in zip(lines, steps, strict=True):
        rollouts = step["rollouts"]
        factors = weights_of(name, rollouts)
        masked = name in ("The loss on one part", "Without the responses that were cut")
        tokens = np.count_nonzero(factors) if masked else len(factors)
        assert step["factors"] == pytest.approx(factors, abs=1e-6) and step["tokens"] == tokens
        kl = np.concatenate([rollout["kl"] for rollout in rollouts])
        assert line["kl"] == pytest.approx(kl.mean(), rel=1e-5)
        if name not in ("Advantages", NO_SIGNAL):
            assert line["loss"] == pytest.approx(kl @ factors / tokens, rel=1e-4)
        seen |= set(factors)
    assert (len(seen) > 1) == (name != "Several rollouts per prompt")


@pytest.mark.recipes
@pytest.mark.parametrize("name", ["Several rollouts per prompt", "Advantages"])
def test_the_rollouts_of_a_prompt_have_their_own_random_numbers(whole, name):
    kinds = []
    for step in whole(name)[2]:
        groups = step["rollouts"][:4], step["rollouts"][4:]
        assert [len({line["id"] for line in group}) for group in groups] == [1, 1]
        kinds += [len({line["response"] for line in group}) for group in groups]
    assert max(kinds) > 2


@pytest.mark.recipes
@pytest.mark.parametrize("name", [
    "Without the responses that were cut", "Advantages", NO_SIGNAL])
def test_steps_in_which_nothing_counts(place, whole, name):
    """Every response is cut after four tokens: no mask, no reward, and no division by zero.

    The adapter stays as it began.
    """
    root = whole(name)[0]
    _, lines = train(place, f"nothing-{root.name}", *WORDS.get(name, []), "--max_new_tokens", 4,
                     root=root)
    if name == NO_SIGNAL:
        assert lines == [{"step": step, "left_out": True} for step in range(1, STEPS + 1)]
    else:
        assert all(line["loss"] == 0 == line["grad_norm"] and line["kl"] > 0 for line in lines)
    saved = load_file(place / f"out/nothing-{root.name}/adapter/adapter_model.safetensors")
    assert not any(weight.any() for key, weight in saved.items() if "lora_B" in key)


@pytest.mark.recipes
def test_the_teachers(place, whole):
    """A snapshot is the first adapter until it is renewed; another adapter is what was saved."""
    name = "A teacher that is renewed"
    root, lines, *_ = whole(name)
    fixed = train(place, "fixed", *WORDS[name], patch="module.EMA = 1.0")[1]
    kl, wanted = ([line["kl"] for line in some] for some in (lines, fixed))
    assert kl[:2] == wanted[:2] and kl[2] != wanted[2]
    things = torch.load(place / f"out/whole-{root.name}/checkpoint.pt", weights_only=True)["things"]
    assert not torch.equal(things["ema"][0], things["adapter"][0])
    # To a student that begins with the very adapter, it is the same teacher as that student.
    name = "Another adapter as the teacher"
    words = ["--init", "out/other", "--steps", 1]
    live = train(place, "live", *words, "--teacher_weights", "live")[1]
    other = train(place, "other-live", *words, root=whole(name)[0])[1]
    assert live[0]["kl"] == other[0]["kl"] != whole(name)[1][0]["kl"]


def log_probs(model, processor, prompt, picture, ids):
    """[T, vocabulary] of a response's tokens after one prompt, by transformers' own forward."""
    prompt = common.encode(processor, [prompt], [picture])
    more = torch.tensor([ids])
    batch = {**prompt, "input_ids": torch.cat([prompt["input_ids"], more], 1),
             "attention_mask": torch.ones(1, prompt["input_ids"].shape[1] + len(ids)).long(),
             "mm_token_type_ids": torch.cat([prompt["mm_token_type_ids"], 0 * more], 1)}
    net = common.network(model)
    net.model.rope_deltas = None
    logits = model(**batch).logits[0, -len(ids) - 1:-1]
    net.model.rope_deltas = None
    return logits.log_softmax(-1)


def rows_of(place, step):
    """Yields (row, the token ids of its response) of a step that SPY kept."""
    rows = {row.id: row for row in gen_data.load_rows(place / "data/tiny", "train")}
    for line, ids in zip(step["rollouts"], step["ids"], strict=True):
        yield rows[line["id"]], ids


def first_kl(place, step, student, teacher):
    """The mean KL per token of a step, each role's log-probabilities from a function of a row."""
    values = []
    for row, ids in rows_of(place, step):
        with torch.no_grad():
            log_p, log_q = student(row, ids), teacher(row, ids)
        values.append(kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1))
    return float(torch.cat(values).mean())


@pytest.mark.recipes
def test_a_second_model_is_scored_by_its_own_body_and_head(place, whole, tiny):
    _, lines, steps = whole("A second model as the teacher")
    second = common.load(str(place / "models/teacher"), 32)[0]
    wanted = first_kl(
        place, steps[0],
        lambda row, ids: log_probs(*tiny, row.student_prompt(), open_picture(row.path), ids),
        lambda row, ids: log_probs(second, tiny[1], row.teacher_prompt("symbols+plan"), None, ids))
    assert lines[0]["kl"] == pytest.approx(wanted, rel=1e-4)


@pytest.mark.recipes
def test_only_the_student_sees_the_augmented_view(place, whole, tiny):
    _, lines, steps = whole("An augmented view")

    def seen(row, ids, blur=0):
        picture = open_picture(row.path).filter(ImageFilter.GaussianBlur(blur))
        return log_probs(*tiny, row.student_prompt(), picture, ids)
    wanted = first_kl(place, steps[0], lambda row, ids: seen(row, ids, 3), seen)
    assert lines[0]["kl"] == pytest.approx(wanted, rel=1e-4) and wanted > 0.001


@pytest.mark.recipes
def test_two_updates_per_batch(place, whole, tiny):
    """One step, against two of torch's AdamW, with the loss of all tokens at once."""
    root, lines, steps = whole("Two updates per batch")
    train(place, "two", *WORDS["Two updates per batch"], "--steps", 1, root=root)
    saved = load_file(place / "out/two/adapter/adapter_model.safetensors")
    torch.manual_seed(0)
    model = common.add_lora(tiny[0], 4)
    weights = {name.replace(".default", ""): weight for name, weight in model.named_parameters()
               if weight.requires_grad}
    begun = {name: weight.detach().clone() for name, weight in weights.items()}
    optimizer = torch.optim.AdamW(weights.values(), lr=0.003, weight_decay=0)
    rows, old, ratios = list(rows_of(place, steps[0])), None, []
    for _ in range(2):
        log_p, log_q = [], []
        for row, ids in rows:
            picture, token = open_picture(row.path), torch.tensor(ids)[:, None]
            log_p.append(log_probs(
                model, tiny[1], row.student_prompt(), picture, ids).gather(1, token))
            with torch.no_grad(), model.disable_adapter():
                log_q.append(log_probs(
                    model, tiny[1], row.teacher_prompt("symbols+plan"), None, ids).gather(1, token))
        log_p, log_q = torch.cat(log_p), torch.cat(log_q)
        old = log_p.detach() if old is None else old
        ratios.append((log_p.detach() - old).exp())
        loss = -(ratios[-1].clamp(max=2) * (log_q - log_p).detach() * log_p).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if len(ratios) == 1:
            assert lines[0]["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert ratios[1].max() > 1.1 and ratios[1].min() < 0.9
    moved = apart = 0.0
    for name, weight in weights.items():
        moved += (weight - begun[name]).square().sum().item()
        apart += (weight - saved[name]).square().sum().item()
    assert apart < 1e-4 * moved
    model.unload()


@pytest.mark.recipes
def test_rows_on_and_off_policy(place, whole, tiny):
    """Every row is what its role samples; the gap is that of the student's rows."""
    _, lines, steps = whole("On and off policy by row")
    model, processor = tiny
    rows = [row for row, _ in rows_of(place, steps[0])]
    rng = np.random.default_rng([0, 0])
    rng.choice(12, 8, replace=False)                       # the rows of the step
    on, uniforms = rng.random(8) < 0.5, rng.random((8, 34))
    pictures = [open_picture(row.path) for row in rows]
    roles = [common.encode(processor, [row.student_prompt() for row in rows], pictures),
             common.encode(processor, [row.teacher_prompt("symbols+plan") for row in rows])]
    texts = []
    for prompt in roles:
        ids, mask, _ = common.sample(model, processor, prompt, 34, uniforms)
        texts.append(common.decode(processor, ids, mask))
    wanted = [texts[0 if mine else 1][i] for i, mine in enumerate(on)]
    assert [line["response"] for line in steps[0]["rollouts"]] == wanted
    assert 0 < sum(on) < 8 and texts[0] != texts[1]
    for line, step in zip(lines, steps, strict=True):
        gaps = [np.mean(rollout["gap"]) for rollout in step["rollouts"]]
        assert line["sampling_gap"] < 1e-3 < max(gaps) and 0 < line["on_policy"] < 1


@pytest.mark.recipes
def test_a_curriculum(whole):
    """24 rows, half of them of size 3: at first 8 of these, then 12, then 18 rows, then all."""
    sizes = [[line["id"].split("_")[2] for line in step["rollouts"]]
             for step in whole("A curriculum by board size")[2]]
    assert set(sizes[0] + sizes[1]) == {"3"} and "4" in sizes[2] + sizes[3]
    assert len({line["id"] for line in whole("A curriculum by board size")[2][0]["rollouts"]}) == 8


@pytest.mark.recipes
def test_early_stopping(place, whole):
    """What does not learn stops after two validations more; the same command does one step."""
    root, lines, _ = whole("Early stopping")
    assert len({line["val_success"] for line in lines}) == 1
    train(place, "stopped", *WORDS["Early stopping"], root=root)
    text, lines = train(place, "stopped", *WORDS["Early stopping"], root=root)
    assert "resuming after step 3 of 4" in text and len(lines) == 4


@pytest.mark.recipes
def test_adapters(place, whole):
    """What is trained, and with which rate; what PEFT reads back."""
    root = whole("LoRA+")[0]
    train(place, "plus", *WORDS["LoRA+"], "--steps", 1, root=root)
    before, after = (load_file(place / "out" / name / "adapter/adapter_model.safetensors")
                     for name in ("first", "plus"))
    for kind, rate in (("lora_A", 0.003), ("lora_B", 16 * 0.003)):
        most = max(float((after[name] - before[name]).abs().max()) for name in before
                   if kind in name)
        assert most == pytest.approx(rate, rel=0.01)              # Adam's first step is the rate
    for name, key in (("DoRA", "use_dora"), ("rsLoRA", "use_rslora")):
        root, lines, _ = whole(name)
        folder = place / f"out/whole-{root.name}/adapter"
        assert json.loads((folder / "adapter_config.json").read_text())[key]
        assert all(line["sampling_gap"] < 1e-3 for line in lines)
        again = train(place, f"again-{name}", "--init", folder, "--steps", 1, root=root)[1]
        assert again[0]["sampling_gap"] < 1e-3
    scales = {module.scaling["default"]
              for module in common.add_lora(common.load(common.TINY, 32)[0], path=folder).modules()
              if hasattr(module, "lora_A")}
    assert scales == {8 / 4**0.5}
    folder = place / f"out/whole-{whole('The last layers only')[0].name}/adapter"
    names = load_file(folder / "adapter_model.safetensors")
    assert {re.search(r"layers\.(\d)\.", name)[1] for name in names} == {"2", "3"}


@pytest.mark.recipes
def test_another_dropout(place, whole):
    """The gap is dropout's: it is there from the first step on, and not without it."""
    plain = train(place, "plain", *WORDS["Another dropout"], "--steps", 1)[1]
    lines = whole("Another dropout")[1]
    assert plain[0]["sampling_gap"] < 1e-3 < min(line["sampling_gap"] for line in lines)


@pytest.mark.recipes
def test_wandb(place, whole):
    """It begins after the run is agreed to; steps that were undone come again, with the same loss.

    There is no checkpoint yet when this run is killed.
    """
    root, lines, _ = whole("wandb")
    losses = [(line["step"], line["loss"]) for line in lines]
    train(place, "undone", "--save_every", 5, root=root, patch=KILL, code=-9)
    train(place, "undone", "--save_every", 5, root=root)
    (place / "out/foreign").mkdir()
    (place / "out/foreign/notes.txt").touch()
    (place / "out/foreign/metrics.jsonl").touch()
    assert "holds" in train(place, "foreign", root=root, code=2)[0]
    calls = {}
    for line in open(place / "out/wandb.jsonl"):
        call = json.loads(line)
        calls.setdefault(call["id"], []).append(call.get("init") or (call["step"], call["loss"]))
    assert calls["out-whole-wandb"] == ["allow", *losses]
    assert calls["out-undone"] == ["allow", *losses[:2], "allow", *losses]
    assert "out-foreign" not in calls


@pytest.mark.recipes
def test_two_objectives(place, whole, tiny):
    """The first step's loss: the KL, and the cross-entropy of the references by transformers."""
    _, lines, steps = whole("Two objectives")
    nll = []
    for row, _ in rows_of(place, steps[0]):
        ids = common.encode_responses(tiny[1], [row.response()])[0][0]
        picture = open_picture(row.path)
        with torch.no_grad():
            log_p = log_probs(*tiny, row.student_prompt(), picture, ids.tolist())
        nll.append(cross_entropy(log_p, ids, reduction="none"))
    wanted = lines[0]["kl"] + 0.1 * float(torch.cat(nll).mean())
    assert lines[0]["loss"] == pytest.approx(wanted, rel=1e-4)


@pytest.mark.recipes
def test_a_model_without_a_preset(place):
    """The page's two commands as they stand, with a few flags that make them short."""
    other_backbone(place / "models/mine")
    short = ["--data", "data/tiny", "--steps", 1, "--batch", 4, "--micro_batch", 2,
             "--max_new_tokens", 12, "--eval_every", 1]
    for line in re.findall(r"^    python (.*)$", RECIPES["A backbone"], re.MULTILINE):
        script, *words = line.split()
        done = processes.run(place, script.removesuffix(".py"), *words, *short)
        assert done.code == 0, done.err
    record = json.loads((place / "out/mine/distill/args.json").read_text())["args"]
    assert (record["model"], record["preset"], record["bits"]) == ("models/mine", "2b", 4)


@pytest.mark.recipes
def test_data_prompts_and_backbones(place, whole):
    def share(data):
        grids = ["".join(row.puzzle.grid) for row in gen_data.load_rows(place / data, "train")
                 if row.task == "frozenlake" and row.level == 4]
        return np.mean([cell == "H" for grid in grids for cell in grid])
    whole("Another share of holes")
    assert share("data/holes") > 1.3 * share("data/tiny")
    assert {line["id"][:14] for line in whole("A task")[2][0]["rollouts"]} == {"train_lamps_7_"}
    [[_, old, new]] = changes(RECIPES["Another prompt"])
    for name, there, gone in (("Another prompt", new, old), ("A divergence", old, new)):
        prompt = (place / f"{whole(name)[0].name}.txt").read_text()
        assert there[11:-2] in prompt and gone[11:-2] not in prompt
    folder = place / f"out/whole-{whole('A backbone')[0].name}"
    assert json.loads((folder / "args.json").read_text())["args"]["model"] == "models/mine"
    saved = load_file(folder / "adapter/adapter_model.safetensors")
    shapes = {tuple(weight.shape) for key, weight in saved.items() if "q_proj.lora_A" in key}
    assert shapes == {(8, 64)}
