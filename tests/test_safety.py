"""Bad input and folders that hold something else: one line, exit code 2, and nothing changes.

Every case is the real script as a process (tests/processes.py). A new one is a row of a table: what
lies there, the command, what the line says. Afterwards every file is as it was, to the byte.
"""
import hashlib
import json
import os
import shutil
import signal
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
    shutil.rmtree(here / "data/tiny/val")


def no_data(here):
    shutil.rmtree(here / "data")


def a_file(here):
    (here / "file").write_text("mine")


def half_a_run(here):
    """A run of which adapter/ is not whole."""
    (here / "run/adapter/adapter_model.safetensors").unlink()


REFUSED = [
    # folders that are not the script's own
    ("coldstart", nothing, ["--out", "."], "and no run: choose another --out"),
    ("coldstart", nothing, ["--out", "data/tiny/train"], "and no run: choose another --out"),
    ("coldstart", nothing, ["--out", "data/tiny"], "a folder of kind data"),
    ("coldstart", foreign_folder, ["--out", "other"], "other holds checkpoint-500 and no run"),
    ("coldstart", foreign_folder, ["--out", "other", "--restart"], "holds checkpoint-500"),
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
     "2 steps of a run that differs in --seed, --lr"),
    ("coldstart", nothing, ["--out", "run", *TOY, "--steps", 1], "2 steps are done, more than"),
    ("coldstart", changed_picture, ["--out", "run", *TOY], "differs in train"),
    ("coldstart", changed_rows, ["--out", "run", *TOY], "differs in train"),
    ("distill", other_init, ["--out", "distilled", "--init", "run", *DISTILL], "differs in init"),
    # data
    ("coldstart", nothing, ["--data", "typo/deep"], "--data typo/deep: no such folder"),
    ("distill", nothing, ["--data", "typo", "--init", "none"], "--data typo: no such folder"),
    ("evaluate", nothing, ["--data", "typo"], "--data typo: no such folder"),
    ("coldstart", empty_split, ["--out", "new"], "data/tiny/val/metadata.jsonl is empty"),
    ("coldstart", no_split, ["--out", "new"], "no data/tiny/val/metadata.jsonl"),
    ("distill", nothing, ["--preset", "4b", "--tasks", "chess", "--init", "none"], "unknown task"),
    ("distill", nothing, ["--preset", "4b"], "--init out/4b/coldstart: no adapter there"),
    *[(script, no_data, ["--model", "typo/"], "--model typo/: no such folder")
      for script in ("coldstart", "evaluate")],
    ("evaluate", nothing, ["--preset", "4b", "--adapter", "nowhere"], "--adapter nowhere"),
    # the run that is continued brings its backbone
    ("distill", nothing, ["--init", "run", "--lora_rank", 4], "run has --lora_rank 2"),
    ("distill", nothing, ["--init", "run", "--lora_vision", 0], "run has --lora_vision 1"),
    ("distill", nothing, ["--init", "run", "--bits", 4], "run has --bits 32"),
    ("distill", nothing, ["--init", "run", "--preset", "4b"], "run has --preset tiny"),
    ("distill", nothing, ["--init", "run", "--model", "data"], "--model data"),
    ("evaluate", nothing, ["--adapter", "run", "--bits", 16], "run has --bits 32"),
    # an evaluation checks all that it will need before the first answer
    ("evaluate", cut_adapter, ["--adapter", "base", "run", "--limit", 1], "run/adapter"),
    ("evaluate", broken_test_picture, ["--adapter", "run"], "cannot be read as a picture"),
    ("evaluate", no_test_split, ["--adapter", "run"], "no data/tiny/test/metadata.jsonl"),
    ("evaluate", nothing, ["--model", "data", "--adapter", "base"], "data is no checkpoint folder"),
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


@pytest.mark.parametrize("environment, message", [
    ({"WORLD_SIZE": "2"}, "no RANK"), ({"WORLD_SIZE": "x"}, "WORLD_SIZE=x"),
    ({"RANK": "3", "WORLD_SIZE": "2"}, "RANK=3")])
def test_a_broken_environment(here, environment, message):
    done = processes.run(here, "coldstart", *TOY, environment=environment)
    assert done.code == 2 and message in done.error()


@pytest.mark.parametrize("batch, count", [(3, 2), (2, 3)])
def test_a_batch_that_cannot_be_shared_equally(here, batch, count):
    done = processes.run(here, "coldstart", *TOY, "--batch", batch,
                         environment={"WORLD_SIZE": str(count)})
    assert f"--batch {batch} cannot be shared equally by {count} processes" in done.error()


def test_an_empty_rank_counts_as_unset(here):
    environment = {"RANK": "", "WORLD_SIZE": ""}
    done = processes.run(here, "coldstart", "--out", "run", *TOY, environment=environment)
    assert done.code == 0 and "nothing is trained" in done.out


# ---------------------------------------------------------------- what goes on, and touches nothing

def test_what_is_not_the_runs_stays(here):
    """--restart removes what a run writes, by name; what lies beside it is its user's."""
    (here / "run/adapters_backup").mkdir()
    for name in ("adapters_backup/weights", "notes.txt", "checkpoint-best", "mine.jsonl"):
        (here / "run" / name).write_text("mine")
    done = processes.run(here, "coldstart", "--out", "run", *TOY, "--seed", 1, "--restart",
                         patch=FEW)
    assert done.code == 0, done.err
    for name in ("adapters_backup/weights", "notes.txt", "checkpoint-best", "mine.jsonl"):
        assert (here / "run" / name).read_text() == "mine"
    assert json.loads((here / "run/args.json").read_text())["args"]["seed"] == 1


def test_contents_count_and_not_paths(here, tmp_path):
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
    assert done.code == 2 and "differs in model" in done.error()


def test_a_half_done_run_can_be_evaluated(here):
    """adapter/ is renewed at every save, so that an evaluation need not wait for the end."""
    patch = FEW + """
learning_rate = common.learning_rate
def stop(step, *more):
    if step == 1:
        os.kill(os.getpid(), 15)
    return learning_rate(step, *more)
common.learning_rate = stop"""
    done = processes.run(here, "coldstart", "--out", "half", *TOY, "--steps", 9, patch=patch)
    assert done.code == 128 + signal.SIGTERM
    done = processes.run(here, "evaluate", "--adapter", "half", "--limit", 1, "--input", "image",
                         "--out", "eval", "--max_new_tokens", 3)
    assert done.code == 0 and "half-image: success" in done.out + done.err


def test_ctrl_c_before_the_first_step(here):
    done = processes.run(here, "coldstart", "--out", "new", *TOY,
                         patch="common.load = lambda *words: os.kill(os.getpid(), 2)")
    assert done.code == 130 and "interrupted" in done.err and "Traceback" not in done.err


def test_a_fault_in_the_code_keeps_its_traceback(here):
    done = processes.run(here, "coldstart", "--out", "new", *TOY,
                         patch="common.load = lambda *words: 1 / 0")
    assert done.code == 1 and "ZeroDivisionError" in done.err


# ---------------------------------------------------------------- scripts that were edited

@pytest.fixture
def scripts(tmp_path):
    """A copy of the scripts, to be edited."""
    folder = tmp_path / "scripts"
    folder.mkdir()
    for file in ROOT.glob("*.py"):
        shutil.copy(file, folder)
    for name in ("tools", "tiny"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


EDITS = [
    ("distill.py", "log_p - log_q)", "log_p - 1.01 * log_q)", True),
    ("gen_data.py", "The picture shows the map.", "The picture shows a map.", True),
    ("common.py", "0.5 * (1 + math.cos", "0.6 * (1 + math.cos", True),
    ("distill.py", "# 5. One optimizer step on the adapters.", "# A comment.", False),
    ("distill.py", "the student drops what the teacher would not say", "words", False),
    ("coldstart.py", "cross_entropy(logits,", "0 * cross_entropy(logits,", False),
]


@pytest.mark.parametrize("script, old, new, counts", EDITS)
def test_an_edited_script(here, scripts, script, old, new, counts):
    """What a stage runs is compared with what ran, without comments and docstrings."""
    file = scripts / script
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))
    words = ["--init", "run", "--out", "distilled", *DISTILL, "--steps", 3]
    before = contents(here)
    done = processes.run(here, "distill", *words, root=scripts)
    if not counts:
        assert done.code == 0, done.err
        return
    assert done.code == 2 and f"differs in {script}" in done.error()
    assert f"+{new}" in done.err.replace("  ", "") or new in done.err       # the diff
    assert contents(here) == before
    done = processes.run(here, "distill", *words, "--accept_changes", root=scripts)
    assert done.code == 0 and "resuming with changes" in done.err
    changed = json.loads((here / "distilled/changes.jsonl").read_text())
    assert changed["step"] == 2 and script in changed["changed"]
    assert (here / "distilled/code" / script).read_text() == file.read_text()


def test_a_flag_that_a_fork_adds_is_at_its_default(here, scripts):
    file = scripts / "distill.py"
    flag = '    add("--mine", type=int, default=3, help="a fork\'s own")\n    args = parser'
    file.write_text(file.read_text().replace("    args = parser", flag))
    words = ["--init", "run", "--out", "distilled", *DISTILL, "--steps", 3, "--accept_changes"]
    done = processes.run(here, "distill", *words, root=scripts)
    assert done.code == 0, done.err
    changed = json.loads((here / "distilled/changes.jsonl").read_text())["changed"]
    assert list(changed) == ["distill.py"]
    done = processes.run(here, "distill", *words[:-1], "--mine", 4, root=scripts)
    assert done.code == 2 and "differs in --mine" in done.error()


def test_the_scripts_are_started_as_a_shell_does(here):
    """One of them without the helper of these tests: exit code and line are the same."""
    done = subprocess.run([sys.executable, ROOT / "coldstart.py", "--lr", "-1"], cwd=here,
                          capture_output=True, text=True, env={**os.environ})
    assert done.returncode == 2 and done.stderr.startswith("error: ") and not done.stdout
