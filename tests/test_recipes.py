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
from safetensors.torch import load_file, save_file
from test_resume import contents
from test_tasks import Lamps
from torch.nn.functional import cross_entropy, kl_div

import common
import gen_data
from gen_data import open_picture

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/recipes.md").read_text(encoding="utf-8")
RECIPES = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL))
CLASS = "# The class `Lamps` of tests/test_tasks.py stands here.\n"
STEPS = 4
# What a recipe's run is given beside the flags of `train`; the divergence in DIVERGENCES and the
# teacher in --teacher_weights are those that it adds.
WORDS = {
    "A divergence": ["--divergence", "softened_kl"],
    "A teacher that is renewed": ["--init", "out/first", "--teacher_weights", "ema"],
    "Another adapter as the teacher": ["--teacher_weights", "other"],
    "Advantages": ["--divergence", "policy"],
    "Another share of holes": ["--data", "data/holes", "--tasks", "frozenlake:4"],
    "A task": ["--data", "data/lamps", "--tasks", "lamps"],
    "A backbone": ["--preset", "mine", "--data", "data/tiny", "--chunk", 16],
}
# In a child: keeps what the loss of a step is given, its rollouts, and a prompt of the student's.
SPY = """
import json
from pathlib import Path
clock, loss, average = common.Run.clock, module.chunked_divergence, common.average_gradients
describe, encode, seen, kept = module.rollout_lines, common.encode, [], {{}}
def spy_clock(run, phase):
    if phase == "sample":  # what follows is the loss, not a validation
        seen.clear()
    clock(run, phase)
def spy_loss(hidden, teacher, token, factor, *more):
    gradient, scores = loss(hidden, teacher, token, factor, *more)
    assert gradient.isfinite().all() and not gradient[factor == 0].any()
    seen.extend(factor.tolist())
    return gradient, scores
def spy_lines(*words):
    kept["rollouts"] = describe(*words)
    return kept["rollouts"]
def spy_average(weights, total, tokens):
    with open({file!r}, "a") as file:
        print(json.dumps(dict(factors=seen, tokens=tokens, **kept)), file=file)
    return average(weights, total, tokens)
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


# ---------------------------------------------------------------- the page

def changes(text):
    """Yields (file, the lines that are there, the lines in their place) of a recipe's block."""
    [block] = re.findall(r"^```diff\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
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
    for recipe in names:
        for file, old, new in changes(RECIPES[recipe]):
            text = (folder / file).read_text(encoding="utf-8")
            assert text.count(old) == 1, f"docs/recipes.md, {recipe}: not once in {file}:\n{old}"
            text = text.replace(old, new).replace(CLASS, source_of(Lamps))
            (folder / file).write_text(text, encoding="utf-8")
    return folder


def source_of(task):
    """The source of a task's class, as it would stand in gen_data.py."""
    return inspect.getsource(task).replace("gen_data.", "")


def anchors():
    """How GitHub names the headings of the page."""
    return {re.sub(r"[^\w -]", "", name).lower().replace(" ", "-") for name in RECIPES}


def test_the_readme_names_every_recipe():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    linked = re.findall(r"docs/recipes\.md#([\w-]+)", readme)
    assert sorted(linked) == sorted(anchors())


@pytest.mark.recipes
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_short_and_clean(tmp_path, name):
    new = [line for line in RECIPES[name].splitlines() if line.startswith("+")]
    assert 1 <= len(new) <= 12
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
    flags = ["--init", "none", "--steps", STEPS, "--save_every", 2, "--batch", 8, "--micro_batch",
             4, "--max_new_tokens", 34, "--lr", 0.003, "--tasks", "maze:3", "--out", f"out/{out}"]
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
    torch.manual_seed(0)
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
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert [len(step["rollouts"]) for step in steps] == [8] * STEPS
    words = [f"killed-{root.name}", *WORDS.get(name, [])]
    train(place, *words, root=root, patch=KILL, code=-9)
    out = [place / f"out/{kind}-{root.name}" for kind in ("whole", "killed")]
    assert torch.load(out[1] / "checkpoint.pt", weights_only=True)["step"] == 2
    if name == "Another adapter as the teacher":
        other = place / "out/other/adapter/adapter_model.safetensors"
        kept = other.read_bytes()
        save_file({key: 0 * weight for key, weight in load_file(other).items()}, other)
        assert "a run that differs in other:" in train(place, *words, root=root, code=2)[0]
        other.write_bytes(kept)
    assert "resuming after step 2 of 4" in train(place, *words, root=root)[0]
    assert contents(out[1]) == contents(out[0])
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
        elif name == "Advantages":
            group = rollouts[i // 4 * 4:][:4]
            success = np.mean([other["outcome"] == "success" for other in group])
            factors += [float((line["outcome"] == "success") - success)] * len(place)
        else:
            factors += [1.0] * len(place)
    return factors


@pytest.mark.recipes
@pytest.mark.parametrize("name", [
    "A weight for each part of the response", "The loss on one part",
    "Without the responses that were cut", "Several rollouts per prompt", "Advantages"])
def test_factors_tokens_and_the_loss(whole, name):
    """SPY has seen that no gradient reaches a token whose factor is 0. The logged KL is of all."""
    seen = set()
    for line, step in zip(*whole(name)[1:], strict=True):
        rollouts = step["rollouts"]
        factors = weights_of(name, rollouts)
        masked = name in ("The loss on one part", "Without the responses that were cut")
        tokens = np.count_nonzero(factors) if masked else len(factors)
        assert step["factors"] == pytest.approx(factors, abs=1e-6) and step["tokens"] == tokens
        kl = np.concatenate([rollout["kl"] for rollout in rollouts])
        assert line["kl"] == pytest.approx(kl.mean(), rel=1e-5)
        if name != "Advantages":
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
@pytest.mark.parametrize("name", ["Without the responses that were cut", "Advantages"])
def test_steps_in_which_nothing_counts(place, whole, name):
    """Every response is cut after four tokens: no mask, no reward, and no division by zero."""
    root = whole(name)[0]
    text, lines = train(place, f"nothing-{root.name}", *WORDS.get(name, []),
                        "--max_new_tokens", 4, root=root)
    assert text.count("no token counts, or student and teacher agree") == STEPS
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
    words = ["--init", "out/other", "--steps", 1, "--teacher_weights"]
    live = train(place, "live", *words, "live")[1]
    other = train(place, "other-live", *words, "other", root=whole(name)[0])[1]
    assert live[0]["kl"] == other[0]["kl"] != whole(name)[1][0]["kl"]


@pytest.mark.recipes
def test_two_objectives(whole, tiny):
    """The first step's loss: the KL, and transformers' own cross-entropy of the references."""
    (model, processor), (root, lines, steps) = tiny, whole("Two objectives")
    rows = {row.id: row for row in gen_data.load_rows(root.parent / "data/tiny", "train")}
    total = tokens = 0
    for line in steps[0]["rollouts"]:
        row = rows[line["id"]]
        prompt = common.encode(processor, [row.student_prompt()], [open_picture(row.path)])
        ids, mask = common.encode_responses(processor, [row.response()])
        batch = {**prompt, "input_ids": torch.cat([prompt["input_ids"], ids], 1),
                 "attention_mask": torch.cat([prompt["attention_mask"], mask], 1),
                 "mm_token_type_ids": torch.cat([prompt["mm_token_type_ids"], 0 * ids], 1)}
        labels = torch.cat([torch.full_like(prompt["input_ids"], -100), ids], 1)
        with torch.no_grad():
            total += model(**batch, labels=labels).loss.item() * ids.shape[1]
        model.model.rope_deltas = None
        tokens += ids.shape[1]
    assert lines[0]["loss"] == pytest.approx(lines[0]["kl"] + 0.1 * total / tokens, rel=1e-4)


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
