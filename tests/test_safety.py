"""Bad input and folders that hold something else: one line, exit code 2, and nothing changes.

Every case is the real script as a process (tests/processes.py). A new one is a row of a table: what
lies there, the command, what the line says. Afterwards every file is as it was, to the byte.
"""
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import processes
import pytest
import torch

import common

ROOT = Path(__file__).parents[1]
TOY = ["--steps", 2, "--batch", 2, "--micro_batch", 2, "--lora_rank", 2, "--max_new_tokens", 5,
       "--eval_every", 9]
DISTILL = [*TOY, "--eval_every", 0]
FEW = """
import coldstart
draw = coldstart.draw_examples
coldstart.draw_examples = lambda rows, count, *more: draw(rows, min(count, 2), *more)"""


def contents(folder):
    """{path: digest} of everything in a folder, but locks and what a process printed."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.name not in (".lock", ".out-0", ".err-0"):
            whole = path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest()
            found[str(path.relative_to(folder))] = whole
    return found


@pytest.fixture(scope="module")
def template(tmp_path_factory, toy_data):
    """A folder with data/tiny, a finished cold start (run) and a distillation of it (distilled)."""
    folder = tmp_path_factory.mktemp("safety")
    shutil.copytree(toy_data, folder / "data/tiny")
    done = processes.run(folder, "coldstart", *TOY, "--out", "run", patch=FEW)
    assert done.code == 0, done.err
    done = processes.run(folder, "distill", *DISTILL, "--init", "run", "--out", "distilled")
    assert done.code == 0, done.err
    return folder


@pytest.fixture
def here(template, tmp_path):
    """A copy of the template, to be changed."""
    return Path(shutil.copytree(template, tmp_path / "here"))


# ---------------------------------------------------------------- what lies there

def nothing(here):
    """Only what the template holds."""


def foreign_folder(here):
    """Another trainer's output, and its log."""
    (here / "other/checkpoint-500").mkdir(parents=True)
    (here / "other/checkpoint-500/model.bin").write_text("weights")
    (here / "other/train.jsonl").write_text("line\n")


def only_an_adapter(here):
    """An adapter of somebody else's, under the name that a run would use."""
    (here / "other/adapter").mkdir(parents=True)
    (here / "other/adapter/adapter_model.safetensors").write_text("weights")


def no_checkpoint(here):
    (here / "run/checkpoint.pt").unlink()


def cut_checkpoint(here):
    file = here / "run/checkpoint.pt"
    file.write_bytes(file.read_bytes()[:1000])


def foreign_checkpoint(here):
    torch.save({"step": 2, "weights": torch.zeros(3)}, here / "run/checkpoint.pt")


def other_optimizer(here):
    state = torch.load(here / "run/checkpoint.pt", weights_only=True)
    state["things"]["optimizer"] = {"state": {}, "param_groups": []}
    torch.save(state, here / "run/checkpoint.pt")


def cut_adapter(here):
    file = here / "run/adapter/adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])


def changed_picture(here):
    file = next((here / "data/tiny/train").glob("*.png"))
    file.write_bytes(file.read_bytes() + b"\0")


def broken_test_picture(here):
    next((here / "data/tiny/test").glob("*.png")).write_bytes(b"no picture")


def no_test_split(here):
    shutil.rmtree(here / "data/tiny/test")


def changed_rows(here):
    file = here / "data/tiny/train/metadata.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:-1]))


def other_init(here):
    file = here / "run/adapter/adapter_config.json"
    file.write_text(file.read_text().replace('"lora_alpha": 4', '"lora_alpha": 5'))


def empty_split(here):
    (here / "data/tiny/val/metadata.jsonl").write_text("")


def no_split(here):
    shutil.rmtree(here / "data/tiny/train")


def a_file(here):
    (here / "file").write_text("mine")


def half_a_run(here):
    """A run of which adapter/ is not whole."""
    (here / "run/adapter/adapter_model.safetensors").unlink()


REFUSED = [
    # folders that are not the script's own
    ("coldstart", nothing, ["--out", "."], "and no run: choose another --out"),
    ("coldstart", nothing, ["--out", "data/tiny/train"], "and no run: choose another --out"),
    ("coldstart", nothing, ["--out", "data/tiny"], "and no run: choose another --out"),
    ("coldstart", foreign_folder, ["--out", "other"], "other holds checkpoint-500 and no run"),
    ("coldstart", only_an_adapter, ["--out", "other"], "other holds adapter and no run"),
    ("gen_data", foreign_folder, ["--out", "other"], "other exists: remove it"),
    ("gen_data", a_file, ["--out", "file"], "file exists: remove it"),
    ("gen_data", nothing, ["--out", "data/tiny"], "exists: remove it"),
    ("evaluate", nothing, ["--out", "run"], "not the folder of an evaluation"),
    ("evaluate", foreign_folder, ["--out", "other"], "other holds checkpoint-500"),
    # a run that is no longer whole
    ("coldstart", no_checkpoint, ["--out", "run", *TOY, "--seed", 1], "without its checkpoint.pt"),
    ("coldstart", cut_checkpoint, ["--out", "run", *TOY], "cannot resume from run/checkpoint.pt"),
    ("coldstart", foreign_checkpoint, ["--out", "run", *TOY], "cannot resume from"),
    ("coldstart", other_optimizer, ["--out", "run", *TOY, "--steps", 3], "'optimizer' in run/"),
    ("distill", cut_adapter, ["--init", "run", *DISTILL], "run/adapter"),
    ("distill", half_a_run, ["--init", "run"], "adapter_model.safetensors is missing"),
    # what a run depends on has changed
    ("coldstart", nothing, ["--out", "run", *TOY, "--lr", 3, "--seed", 1],
     "differs in --seed (0 in run/args.json); --lr (0.002 in run/args.json)"),
    ("coldstart", nothing, ["--out", "run", *TOY, "--steps", 1], "2 steps are done, more than"),
    ("coldstart", changed_picture, ["--out", "run", *TOY], "the contents of train"),
    ("coldstart", changed_rows, ["--out", "run", *TOY], "the contents of train"),
    ("distill", other_init, ["--out", "distilled", "--init", "run", *DISTILL],
     "the contents of init"),
    # data
    ("coldstart", nothing, ["--data", "typo/deep"], "--data typo/deep: no such folder"),
    ("distill", nothing, ["--data", "typo", "--init", "none"], "--data typo: no such folder"),
    ("evaluate", nothing, ["--data", "typo"], "--data typo: no such folder"),
    ("coldstart", empty_split, ["--out", "new"], "data/tiny/val/metadata.jsonl is empty"),
    ("coldstart", no_split, ["--out", "new"], "no data/tiny/train/metadata.jsonl"),
    ("distill", nothing, ["--tasks", "chess", "--init", "none"], "chess"),
    ("distill", nothing, ["--preset", "4b"], "--init out/4b/coldstart: no adapter there"),
    *[(script, nothing, ["--model", "typo/"], "--model typo/")
      for script in ("coldstart", "evaluate")],
    ("evaluate", nothing, ["--preset", "4b", "--adapter", "nowhere"], "--adapter nowhere"),
    # the run that is continued brings its backbone
    ("distill", nothing, ["--init", "run", "--lora_rank", 4], "--lora_rank 4"),
    ("distill", nothing, ["--init", "run", "--lora_vision", 0], "--lora_vision 0"),
    ("distill", nothing, ["--init", "run", "--bits", 4], "--bits 4"),
    ("distill", nothing, ["--init", "run", "--preset", "4b"], "run has --preset tiny"),
    ("distill", nothing, ["--init", "run", "--model", "data"], "--model data"),
    ("evaluate", nothing, ["--adapter", "run", "--bits", 16], "--bits 16"),
    # an evaluation checks all that it will need before the first answer
    ("evaluate", cut_adapter, ["--adapter", "base", "run", "--limit", 1], "run/adapter"),
    ("evaluate", broken_test_picture, ["--adapter", "run"], "cannot be read as a picture"),
    ("evaluate", no_test_split, ["--adapter", "run"], "no data/tiny/test/metadata.jsonl"),
    ("evaluate", nothing, ["--model", "data", "--adapter", "base"], "--model data"),
    # flags
    *[("coldstart", nothing, words, f"{words[0]}: got {words[1]!r}") for words in (
        ["--lr", "-1"], ["--lr", "0"], ["--lr", "inf"], ["--lr", "nan"], ["--seed", "-1"],
        ["--eval_every", "0"], ["--map_share", "7"], ["--max_grad_norm", "0"],
        ["--max_grad_norm", "-1"], ["--max_grad_norm", "nan"], ["--steps", "0"],
        ["--batch", "1.5"], ["--save_every", "0"])],
    ("distill", nothing, ["--on_policy", "nan"], "--on_policy: got 'nan'"),
    ("evaluate", nothing, ["--temperature", "nan"], "--temperature: got 'nan'"),
    ("evaluate", nothing, ["--samples", "3"], "need a --temperature above 0"),
    ("coldstart", nothing, ["--step", "3"], "unrecognized arguments: --step 3"),
    ("coldstart", nothing, ["--preset", "9b"], "invalid choice: '9b'"),
]


def name_of(case):
    script, setup, words, _ = case
    return f"{script}-{setup.__name__}-{' '.join(map(str, words))}"[:80]


@pytest.mark.parametrize("script, setup, words, message", REFUSED, ids=map(name_of, REFUSED))
def test_refused(here, script, setup, words, message):
    setup(here)
    before = contents(here)
    done = processes.run(here, script, *words, patch=FEW)
    assert done.code == 2 and message in done.error()
    after = contents(here)
    new = set(after) - set(before)  # a folder that was asked for may be there, empty
    assert all(after[name] is False for name in new)
    assert {name: after[name] for name in before} == before


@pytest.mark.parametrize("environment", [
    {"WORLD_SIZE": "2"}, {"WORLD_SIZE": "x"}, {"RANK": "3", "WORLD_SIZE": "2"}])
def test_a_broken_environment(here, environment):
    done = processes.run(here, "coldstart", *TOY, environment=environment)
    assert done.code == 2 and "WORLD_SIZE" in done.error()


def test_an_empty_rank_counts_as_unset(here):
    environment = {"RANK": "", "WORLD_SIZE": ""}
    done = processes.run(here, "coldstart", "--out", "run", *TOY, environment=environment)
    assert done.code == 0 and "nothing is trained" in done.out


# ---------------------------------------------------------------- what goes on, and touches nothing

def test_what_is_not_the_runs_stays(here):
    """A run that goes on, and saves, leaves alone what its user has put into its folder."""
    (here / "run/adapters_backup").mkdir()
    names = ("adapters_backup/weights", "notes.txt", "mine.jsonl", "adapter/notes.md")
    for name in names:
        (here / "run" / name).write_text("mine")
    done = processes.run(here, "coldstart", "--out", "run", *TOY, "--steps", 3, patch=FEW)
    assert done.code == 0, done.err
    assert [(here / "run" / name).read_text() for name in names] == ["mine"] * 4


def test_contents_count_and_not_paths(here):
    """A moved run, a trailing slash, a moved model: the same run. An exchanged model is not."""
    model = shutil.copytree(common.TINY, here / "model",
                            ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    words = [*TOY, "--model", "model"]
    assert processes.run(here, "coldstart", "--out", "mine", *words, patch=FEW).code == 0
    (here / "mine").rename(here / "moved")
    model.rename(here / "elsewhere")
    (here / "data/tiny").rename(here / "rows")
    done = processes.run(here, "distill", "--init", "moved/", *DISTILL, "--data", "rows", "--model",
                         "elsewhere", "--out", "second")
    assert done.code == 0, done.err
    words = ["--out", "moved/", *TOY, "--data", "rows/"]
    done = processes.run(here, "coldstart", *words, "--model", "elsewhere/", patch=FEW)
    assert done.code == 0 and "nothing is trained" in done.out, done.err
    file = here / "elsewhere/generation_config.json"
    file.write_text(file.read_text() + "\n")
    done = processes.run(here, "coldstart", *words, "--model", "elsewhere", patch=FEW)
    assert done.code == 2 and "the contents of model" in done.error()
    done = processes.run(here, "distill", "--init", "moved", *DISTILL, "--data", "rows", "--model",
                         "elsewhere", "--out", "third")
    assert done.code == 2 and "--model elsewhere" in done.error()


def test_a_half_done_run_can_be_evaluated(here):
    """adapter/ is renewed at every save, so that an evaluation need not wait for the end."""
    patch = FEW + """
schedule = common.schedule
def stop(optimizer, step, steps):
    if step == 1:
        os.kill(os.getpid(), 15)
    return schedule(optimizer, step, steps)
common.schedule = stop"""
    words = [*TOY, "--steps", 9, "--save_every", 1]
    assert processes.run(here, "coldstart", "--out", "half", *words, patch=patch).code == -15
    done = processes.run(here, "evaluate", "--adapter", "half", "--limit", 1, "--input", "image",
                         "--out", "eval", "--max_new_tokens", 3)
    assert done.code == 0 and "half-image" in (here / "eval/results.md").read_text()


def test_ctrl_c_before_the_first_step(here):
    done = processes.run(here, "coldstart", "--out", "new", *TOY,
                         patch="common.load = lambda *words: os.kill(os.getpid(), 2)")
    assert done.code == 130 and "interrupted" in done.err and "Traceback" not in done.err


def test_a_fault_in_the_code_keeps_its_traceback(here):
    done = processes.run(here, "coldstart", "--out", "new", *TOY,
                         patch="common.load = lambda *words: 1 / 0")
    assert done.code == 1 and "ZeroDivisionError" in done.err


# ---------------------------------------------------------------- scripts that were edited

EDITS = [
    ("distill.py", "log_p - log_q)", "log_p - 1.01 * log_q)", True),
    ("gen_data.py", "The picture shows the map.", "The picture shows a map.", True),
    ("common.py", "0.5 * (1 + math.cos", "0.6 * (1 + math.cos", True),
    ("distill.py", "# 5. One optimizer step on the adapters.", "# A comment.", False),
    ("coldstart.py", "cross_entropy(logits,", "0 * cross_entropy(logits,", False),
]


@pytest.mark.parametrize("script, old, new, counts", EDITS)
def test_an_edited_script(here, tmp_path, script, old, new, counts):
    """What a stage runs is compared with what ran, without comments.

    The commands of the message show the difference, and go on all the same.
    """
    scripts = processes.fork(tmp_path / "scripts", (script, old, new))
    words = ["--init", "run", "--out", "distilled", *DISTILL, "--steps", 3]
    before = contents(here)
    done = processes.run(here, "distill", *words, root=scripts)
    if not counts:
        assert done.code == 0, done.err
        return
    assert done.code == 2
    show, go_on = re.findall("`([^`]+)`", done.error())
    shown = subprocess.run(show, shell=True, cwd=here, capture_output=True, text=True).stdout
    assert old in shown and new in shown
    assert contents(here) == before
    subprocess.run(go_on, shell=True, cwd=here, check=True)
    done = processes.run(here, "distill", *words, root=scripts)
    assert done.code == 0, done.err
    assert (here / "distilled/code" / script).read_text() == (scripts / script).read_text()


def test_a_module_that_a_fork_adds(here, tmp_path):
    """It is kept and compared as the scripts are; a flag of its own is named."""
    scripts = processes.fork(
        tmp_path / "scripts", ("distill.py", "import gen_data\n", "import gen_data\nimport mine\n"))
    words = ["--init", "run", "--out", "new", *DISTILL, "--steps", 1]
    (scripts / "mine.py").write_text("weight = 1\n")
    done = processes.run(here, "distill", *words, root=scripts)
    assert done.code == 0, done.err
    assert (here / "new/code/mine.py").read_text() == "weight = 1\n"
    (scripts / "mine.py").write_text("weight = -1\n")
    done = processes.run(here, "distill", *words, root=scripts)
    assert done.code == 2 and "mine.py" in done.error()
    (scripts / "mine.py").write_text("weight = 1\n")
    processes.edit(scripts / "distill.py", "    args = parser",
                   '    add("--mine", type=int, default=3)\n    args = parser')
    done = processes.run(here, "distill", *words, root=scripts)
    assert done.code == 2 and "--mine (None in new/args.json)" in done.error()


def test_versions_that_differ_are_one_warning(here):
    """Bit for bit is not promised then; the record keeps those that the run began with."""
    record = json.loads((here / "run/args.json").read_text())
    record["versions"]["torch"] = "0.1"
    (here / "run/args.json").write_text(json.dumps(record))
    done = processes.run(here, "coldstart", "--out", "run", *TOY, patch=FEW)
    assert done.code == 0 and done.err.count("warning: ") == done.err.count("torch 0.1") == 1
    assert json.loads((here / "run/args.json").read_text())["versions"] == record["versions"]


def test_the_scripts_are_started_as_a_shell_does(here):
    """One of them without the helper of these tests: exit code and line are the same."""
    done = subprocess.run([sys.executable, ROOT / "coldstart.py", "--lr", "-1"], cwd=here,
                          capture_output=True, text=True, env={**os.environ})
    assert done.returncode == 2 and done.stderr.startswith("error: ") and not done.stdout
