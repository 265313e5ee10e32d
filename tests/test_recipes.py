"""Every change in docs/recipes.md, made in a copy of the scripts, trained, killed and resumed.

In a fork some of them no longer fit, so that `python -m pytest` leaves them out: -m recipes.
"""
import ast
import importlib.util
import inspect
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import processes
import pytest
import torch
from conftest import adapted
from safetensors.torch import load_file, save_file
from test_resume import contents
from test_tasks import Lamps
from torch.nn.functional import kl_div

import common
import gen_data

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/recipes.md").read_text(encoding="utf-8")
RECIPES = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL))
CLASS = "# The class `Lamps` of tests/test_tasks.py stands here.\n"
STEPS = 4
# What a recipe's run is given beside the flags of `train`; the divergence in DIVERGENCES and the
# teacher in --teacher_weights are those that it adds.
WORDS = {
    "A divergence": ["--divergence", "softened_kl"],
    "A teacher that is renewed": ["--init", "out/tiny/coldstart", "--teacher_weights", "ema"],
    "Another adapter as the teacher": ["--teacher_weights", "other"],
    "Advantages": ["--divergence", "policy"],
    "Another share of holes": ["--data", "data/holes", "--tasks", "frozenlake:4"],
    "A task": ["--data", "data/lamps", "--tasks", "lamps"],
    "A backbone": ["--preset", "mine", "--data", "data/tiny", "--chunk", 16],
}
# In a child: keeps what the loss is given, step by step, and a prompt of the student's.
SPY = """
import json
from pathlib import Path
loss, average, encode, seen = module.chunked_divergence, common.average_gradients, common.encode, []
def spy_loss(hidden, teacher, token, factor, *more):
    gradient, scores = loss(hidden, teacher, token, factor, *more)
    assert gradient.isfinite().all() and not gradient[factor == 0].any()
    seen.extend(factor.tolist())
    return gradient, scores
def spy_average(weights, total, tokens):
    with open({file!r}, "a") as file:
        print(json.dumps({{"factors": seen, "tokens": tokens}}), file=file)
    seen.clear()
    return average(weights, total, tokens)
def spy_encode(processor, prompts, pictures, *more):
    if pictures:
        Path({file!r}).with_suffix(".txt").write_text(prompts[0])
    return encode(processor, prompts, pictures, *more)
module.chunked_divergence, common.average_gradients = spy_loss, spy_average
common.encode = spy_encode
"""
# A process kills itself at the beginning of its third step.
KILL = """
import os
draw, calls = module.draw_rows, []
def die(*words):
    calls.append(1)
    if len(calls) == 3:
        os.kill(os.getpid(), 9)
    return draw(*words)
module.draw_rows = die
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
    """A folder in which runs are started: toy data, and an adapter that does something."""
    place = tmp_path_factory.mktemp("recipes")
    (place / "data").mkdir()
    (place / "data/tiny").symlink_to(toy_data)
    model = adapted(tiny[0])
    model.save_pretrained(place / "out/tiny/coldstart/adapter")
    model.unload()
    return place


def train(place, out, *words, root=None, patch="", code=0):
    """A run of distill.py -> (what it said, the lines of its log, its rollouts by step)."""
    flags = ["--init", "none", "--lora_rank", 4, "--steps", STEPS, "--save_every", 2, "--batch", 8,
             "--micro_batch", 4, "--max_new_tokens", 34, "--show_every", 1, "--lr", 0.003,
             "--tasks", "maze:3", "--out", f"out/{out}"]
    done = processes.run(place, "distill", *flags, *words, root=root, patch=patch)
    assert done.code == code, done.err
    lines, rollouts = [[json.loads(line) for line in open(place / "out" / out / name)]
                       for name in ("metrics.jsonl", "rollouts.jsonl")]
    steps = [[line for line in rollouts if line["step"] == step] for step in range(1, STEPS + 1)]
    return done.out + done.err, lines, steps


def prepare(place, root, name):
    """What a recipe needs beside the change."""
    if name == "Another share of holes":
        make_data(place, root, "holes", "frozenlake:4", "--train", 40)
    if name == "A task":
        make_data(place, root, "lamps", "lamps:7")
    if name == "A backbone":
        other_backbone(place / "models/mine")


def make_data(place, root, name, *words):
    done = processes.run(place, "gen_data", "--train", 12, "--val", 3, "--test", 3, "--workers", 1,
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
def trained(place):
    """{recipe: (its copy of the scripts, the log's lines, the rollouts by step, what the loss was
    given by step)} of the run that was left alone."""
    return {}


@pytest.mark.recipes
@pytest.mark.parametrize("name", RECIPES)
def test_killed_and_resumed_it_ends_like_one_left_alone(place, trained, name):
    root, words = fork(place / name.replace(" ", "-"), name), WORDS.get(name, [])
    prepare(place, root, name)
    spied = place / f"{root.name}.jsonl"
    text, lines, steps = train(place, f"whole-{root.name}", *words, root=root,
                               patch=SPY.format(file=str(spied)))
    train(place, f"killed-{root.name}", *words, root=root, patch=KILL, code=-9)
    out = [place / "out" / f"{kind}-{root.name}" for kind in ("whole", "killed")]
    assert len(open(out[1] / "metrics.jsonl").readlines()) == 2
    assert "resuming after step 2 of 4" in train(
        place, f"killed-{root.name}", *words, root=root)[0]
    assert contents(out[1]) == contents(out[0])
    records = [json.loads((folder / "args.json").read_text()) for folder in out]
    for record in records:
        del record["args"]["out"]
    assert records[0] == records[1]
    assert [line["step"] for line in lines] == [1, 2, 3, 4] and [len(s) for s in steps] == [8] * 4
    given = [json.loads(line) for line in open(spied)]
    trained[name] = root, lines, steps, given
