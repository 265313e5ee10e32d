"""Interruptions: a run that was stopped, killed or starved of disk ends as if nothing had happened.

Every run is a process of its own, or several of them as torchrun starts them (tests/processes.py).
"""
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import processes
import pytest
import torch
from safetensors.torch import load_file, save_file

import common

ROOT = Path(__file__).parents[1]
STEPS = 4
FLAGS = {"coldstart": ["--eval_every", 3, "--max_new_tokens", 3],
         "distill": ["--init", "none", "--max_new_tokens", 20, "--eval_every", 3],
         "ema": ["--init", "none", "--max_new_tokens", 20, "--eval_every", 0, "--teacher_weights",
                 "ema"]}
# In a child, before the stage's main: fewer held-out pictures, rollouts of every step, a moving
# average that moves.
FEW = """
import coldstart, distill
distill.HELD_OUT, distill.SHOW_EVERY, distill.EMA = 4, 1, 0.5
draw = coldstart.draw_examples
coldstart.draw_examples = lambda rows, count, *more: draw(rows, min(count, 8), *more)
from pathlib import Path
"""
# In its third step, before the weights change, a process sends itself a signal.
SIGNAL = """
schedule = common.schedule
def interrupt(optimizer, step, steps):
    if step == 2 and int(os.environ.get("RANK", 0)) in {ranks}:
        os.kill(os.getpid(), {number:d})
    return schedule(optimizer, step, steps)
common.schedule = interrupt
"""
KILLED = {"code": -9, "patch": SIGNAL.format(ranks=[0], number=signal.SIGKILL)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, toy_data):
    folder = tmp_path_factory.mktemp("runs")
    (folder / "data").mkdir()
    (folder / "data/tiny").symlink_to(toy_data)
    return folder


def start(folder, kind, out, *words, steps=STEPS, patch="", **more):
    """The processes of a run. kind: one of FLAGS; more: options of `processes.start`."""
    stage = "coldstart" if kind == "coldstart" else "distill"
    words = ["--steps", steps, "--batch", 4, "--micro_batch", 2, "--save_every", 2, "--out", out,
             "--lora_rank", 2, *FLAGS[kind], *words]
    return processes.start(folder, stage, words, patch=FEW + patch, **more)


def finish(folder, kind, out, *words, code=0, **more):
    """Run to the end, which must be with exit code `code` -> what the processes said, together."""
    done = processes.collect(folder, start(folder, kind, out, *words, **more))
    text = "".join(one.out + one.err for one in done)
    assert [one.code for one in done] == [code] * len(done), text
    assert code != 2 or "Traceback" not in text, text
    return text


def saved_step(out):
    """The step of checkpoint.pt; 0 without one."""
    file = out / "checkpoint.pt"
    return torch.load(file, weights_only=True)["step"] if file.is_file() else 0


@pytest.fixture(scope="module")
def whole(folder):
    """The uninterrupted run of each kind."""
    for kind in FLAGS:
        finish(folder, kind, f"whole-{kind}")
    return {kind: processes.contents(folder / f"whole-{kind}") for kind in FLAGS}


def wait_for(process, path):
    """Until the file or folder is there."""
    while process.exitcode is None and not path.exists():
        time.sleep(0.02)
    assert process.exitcode is None


# ---------------------------------------------------------------- interruptions

@pytest.mark.parametrize("kind, number", [
    ("coldstart", signal.SIGINT), ("distill", signal.SIGKILL), ("ema", signal.SIGKILL),
    pytest.param("coldstart", signal.SIGKILL, marks=pytest.mark.slow)])
def test_an_interrupted_run_ends_like_an_uninterrupted_one(folder, whole, kind, number):
    """Bit for bit, with the moving average too; it costs the steps since the last checkpoint."""
    out = folder / f"{kind}-{number.name}"
    text = finish(folder, kind, out, patch=SIGNAL.format(ranks=[0], number=number),
                  code=-9 if number == signal.SIGKILL else 130)
    assert saved_step(out) == 2 and "Traceback" not in text
    assert "resuming after step 2 of 4" in finish(folder, kind, out)
    assert processes.contents(out) == whole[kind]
    # Once more: nothing is left to do, and nothing changes. Nor does it where the last save was
    # interrupted between the two: an earlier adapter is brought up to date.
    for file in out.glob("adapter/adapter_model.safetensors"):
        save_file({name: 0 * weight for name, weight in load_file(file).items()}, file)
    assert "all 4 steps were done before; nothing is trained" in finish(folder, kind, out)
    assert processes.contents(out) == whole[kind]


@pytest.mark.parametrize("moment", ["checkpoint", "adapter"])
def test_killed_while_it_saves(folder, whole, moment):
    """The second time: in the middle of checkpoint.pt, or between it and adapter/."""
    out = folder / f"killed-{moment}"
    finish(folder, "coldstart", out, code=-9, patch=f"""
out = Path({str(out)!r})
write, export = common.write_bytes, common.Run.export
def write_and_die(path, content):
    if {moment!r} == "checkpoint" and path == out / "checkpoint.pt" and path.exists():
        (out / "checkpoint.pt.partial").write_bytes(content[:1000])
        os.kill(os.getpid(), 9)
    write(path, content)
def export_and_die(run, name):
    if {moment!r} == "adapter" and run.step == 4:
        (out / "adapter.partial").mkdir()
        (out / "adapter.partial/adapter_model.safetensors").write_bytes(b"half")
        os.kill(os.getpid(), 9)
    export(run, name)
common.write_bytes, common.Run.export = write_and_die, export_and_die""")
    assert saved_step(out) == (2 if moment == "checkpoint" else 4)
    load_file(out / "adapter/adapter_model.safetensors")                  # the old one, whole
    finish(folder, "coldstart", out)
    assert processes.contents(out) == whole["coldstart"] and not list(out.glob("*.partial"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", FLAGS)
def test_killed_at_twenty_random_moments(folder, kind):
    """`kill -9` at random moments of a longer run; then its end equals that of one left alone."""
    finish(folder, kind, f"alone-{kind}", steps=150)
    out, rng, tally = folder / f"killed-{kind}", random.Random(0), []
    while len(tally) < 20:
        [process] = start(folder, kind, out, steps=150)
        time.sleep(rng.uniform(0.5, 4))
        if process.exitcode is not None:
            tally.append("finished before the kill")
            break
        process.kill()
        process.join()
        tally.append(saved_step(out))
    finish(folder, kind, out, steps=150)
    print(f"\n{kind}: step of the latest checkpoint after each kill: {tally}")
    assert processes.contents(out) == processes.contents(folder / f"alone-{kind}")


# ---------------------------------------------------------------- several processes

def same_but_for_sums(out, other):
    """The same rollouts and rows; losses and adapters up to the order of float sums."""
    (_, one), (_, two) = processes.contents(out), processes.contents(other)
    assert one.keys() == two.keys()
    for a, b in zip(one["metrics.jsonl"], two["metrics.jsonl"], strict=True):
        assert a.keys() == b.keys()
        for name in a:
            if a[name] is not None or b[name] is not None:
                assert a[name] == pytest.approx(b[name], rel=2e-5, abs=1e-6), name
    for a, b in zip(one.get("rollouts.jsonl", []), two.get("rollouts.jsonl", []), strict=True):
        assert a["tokens"] == b["tokens"] and a["id"] == b["id"] and a["outcome"] == b["outcome"]
        assert a["kl"] == pytest.approx(b["kl"], rel=1e-3, abs=1e-4)
    weights = []
    for folder in (out, other):
        saved = load_file(folder / "adapter/adapter_model.safetensors")
        weights.append(torch.cat([saved[name].flatten() for name in sorted(saved)]))
    assert (weights[0] - weights[1]).norm() < 1e-3 * weights[0].norm()


@pytest.mark.parametrize("kind", FLAGS)
def test_two_processes_end_where_one_ends(folder, whole, kind):
    out = folder / f"two-{kind}"
    finish(folder, kind, out, count=2)
    same_but_for_sums(out, folder / f"whole-{kind}")


def test_two_processes_share_the_work(folder):
    """Half of each step's four rows, half of the eight held-out examples after the third."""
    finish(folder, "coldstart", "halves", steps=3, count=2, patch="""
real, seen = module.encode, []
def encode(processor, examples, device):
    seen.append(len(examples))
    Path("halves-" + os.environ["RANK"]).write_text(str(seen))
    return real(processor, examples, device)
module.encode = encode""")
    assert [(folder / f"halves-{rank}").read_text() for rank in (0, 1)] == ["[2, 2, 2, 4]"] * 2


@pytest.mark.parametrize("first, then", [
    (2, 1), pytest.param(1, 2, marks=pytest.mark.slow)])
def test_the_number_of_processes_may_change(folder, whole, first, then):
    out = folder / f"from-{first}-to-{then}"
    finish(folder, "distill", out, count=first, code=-9,
           patch=SIGNAL.format(ranks=[0, 1], number=signal.SIGKILL))
    assert saved_step(out) == 2
    assert "resuming after step 2 of 4" in finish(folder, "distill", out, count=then)
    same_but_for_sums(out, folder / "whole-distill")


def test_a_process_that_is_killed_ends_the_other(folder):
    started = start(folder, "coldstart", "orphan", count=2,
                    patch=SIGNAL.format(ranks=[1], number=signal.SIGKILL))
    done = processes.collect(folder, started)
    assert done[0].code not in (0, -9) and done[1].code == -9


def test_processes_that_drift_apart_are_noticed(folder):
    finish(folder, "coldstart", "drift", code=2, count=2, patch="""
real = common.average_gradients
def drift(weights, *sums):
    found = real(weights, *sums)
    weights[0].grad.mul_(1 + int(os.environ["RANK"]))
    return found
common.average_gradients = drift""")
    assert not (folder / "drift/checkpoint.pt").exists()
    assert "--batch 3" in finish(folder, "coldstart", "uneven", "--batch", 3, code=2, count=2)


@pytest.mark.slow
def test_torchrun_itself(folder, whole):
    words = ["--steps", STEPS, "--batch", 4, "--micro_batch", 2, "--lora_rank", 2, "--save_every",
             2, "--out", "torchrun", *FLAGS["distill"]]
    script = folder / "few.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{FEW}\nimport common\n"
                      "common.run_script(distill.parse_args, distill.main)\n")
    done = subprocess.run(
        [str(Path(sys.executable).with_name("torchrun")), "--standalone", "--nproc_per_node", "2",
         script, *map(str, words)], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("step 4 ") == 1
    same_but_for_sums(folder / "torchrun", folder / "whole-distill")


# ---------------------------------------------------------------- what goes wrong

def test_the_second_of_two_runs_is_refused(folder):
    [first] = start(folder, "coldstart", "shared", steps=100_000)
    wait_for(first, folder / "shared/metrics.jsonl")
    assert "shared" in finish(folder, "coldstart", "shared", code=2)
    first.kill()
    first.join()
    [second] = start(folder, "coldstart", "shared", steps=100_000)  # the lock went with its process
    wait_for(second, folder / "shared/checkpoint.pt")
    second.kill()
    second.join()


def test_a_malicious_checkpoint_is_not_executed(folder):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {folder}/executed",)
    finish(folder, "coldstart", "evil", steps=2)
    file = folder / "evil/checkpoint.pt"
    torch.save({"state": Evil()}, file)
    text = finish(folder, "coldstart", "evil", steps=3, code=2)
    assert "cannot resume from evil/checkpoint.pt" in text
    assert not (folder / "executed").exists()
    torch.load(file, weights_only=False)  # it would have been
    assert (folder / "executed").exists()


def test_a_full_disk_leaves_the_old_checkpoint(folder, whole):
    """On a file system of 3 MB, where one checkpoint fits beside the one that is written."""
    out = folder / "disk"
    out.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3M", "tmpfs", out]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no right to mount a small tmpfs")
    try:
        text = finish(folder, "coldstart", out, code=2, patch=f"""
real = common.write_bytes
def fill(path, content):
    if path.name == 'checkpoint.pt' and path.exists():
        try:
            Path({str(out)!r}, 'ballast').write_bytes(bytes(10**8))
        except OSError:
            pass
    real(path, content)
common.write_bytes = fill""")
        assert "No space left on device" in text and saved_step(out) == 2
        (out / "ballast").unlink()
        finish(folder, "coldstart", out)
        assert processes.contents(out) == whole["coldstart"]
    finally:
        subprocess.run(["umount", out])


POISON = """
real = torch.nn.utils.clip_grad_norm_
def poison(weights, *words, seen=[]):
    seen.append(1)
    if len(seen) in BAD:
        weights[0].grad[0] = float('nan')
    return real(weights, *words)
torch.nn.utils.clip_grad_norm_ = poison"""


def test_numbers_that_are_not_finite(folder):
    text = finish(folder, "coldstart", "nan", patch="BAD = (2,)" + POISON)
    assert "warning: step 2 skipped" in text
    lines = [json.loads(line) for line in open(folder / "nan/metrics.jsonl")]
    assert len(lines) == STEPS and lines[1]["grad_norm"] is None and lines[2]["grad_norm"] > 0
    evidence = [json.loads(line) for line in open(folder / "nan/not_finite.jsonl")]
    assert len(evidence) == 4 and {line["step"] for line in evidence} == {2}
    assert all(line["id"].startswith("train_") and line["questions"] for line in evidence)
    text = finish(folder, "distill", "nans", code=2, steps=9,
                  patch="BAD = (2, 4, 5, 6, 7, 8)" + POISON)
    assert "5 steps in a row were not finite" in text and "step 8 skipped" in text
    assert "--bits" not in text                                             # 32 is the most
    evidence = [json.loads(line) for line in open(folder / "nans/not_finite.jsonl")]
    assert len(evidence) == 6 * 4 and all("response" in line for line in evidence)
    finish(folder, "distill", "both", patch="BAD = (2, 3, 4)" + POISON)
    text = finish(folder, "distill", "both", code=2, steps=6, patch="BAD = (1, 2)" + POISON)
    assert "5 steps in a row were not finite" in text           # those before the resume count too


@pytest.mark.parametrize("stage", ["coldstart", "distill"])
def test_an_infinite_loss_and_a_gradient_of_zero(folder, stage):
    infinite = """
real, seen = common.average_gradients, []
def poison(weights, *sums):
    seen.append(1)
    loss, tokens = real(weights, *sums)
    return loss + (float('inf') if len(seen) == 2 else 0), tokens
common.average_gradients = poison"""
    text = finish(folder, stage, f"infinite-{stage}", steps=2, patch=infinite)
    assert "warning: step 2 skipped: loss inf" in text
    zero = "torch.nn.utils.clip_grad_norm_ = lambda weights, norm: torch.zeros(())"
    text = finish(folder, stage, f"zero-{stage}", code=2, patch=zero)
    assert "the first gradient is zero" in text


def test_warnings(folder):
    """Rollouts that all hit the limit; a first KL as large as only misalignment gives."""
    text = finish(folder, "distill", "warned", "--max_new_tokens", 2, steps=1, patch="""
real = module.chunked_divergence
def far(*words):
    gradient, scores = real(*words)
    scores[1] += 20
    return gradient, scores
module.chunked_divergence = far""")
    assert "warning: step 1: every response hit --max_new_tokens 2" in text
    assert "warning: the KL of the first step is 2" in text


@pytest.mark.parametrize("stage, function, calls", [
    ("coldstart", "answer_loss", 6), ("distill", "chunked_divergence", 10)])
def test_out_of_memory_is_one_line_and_the_run_resumes(folder, whole, stage, function, calls):
    """In the fourth step: the latest checkpoint, of the second, is where it goes on."""
    out = f"starved-{stage}"
    text = finish(folder, stage, out, code=2, patch=f"""
real, seen = module.{function}, []
def starve(*words):
    seen.append(torch.is_grad_enabled())
    if sum(seen) > {calls}:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\\nMore")
    return real(*words)
module.{function} = starve""")
    assert "memory does not suffice" in text and "--micro_batch" in text
    assert saved_step(folder / out) == 2
    finish(folder, stage, out)
    assert processes.contents(folder / out) == whole[stage]


# ---------------------------------------------------------------- what a fork may do

SAMPLED = '            run.clock("sample")\n'
LOGGED = "on_policy=on_policy, grad_norm=grad_norm, lr=lr)\n"


def test_a_loop_that_skips_and_stops(folder, tmp_path):
    """By `continue` and `break`; the same command goes on where it stopped."""
    root = processes.fork(
        tmp_path / "fork",
        ("distill.py", SAMPLED, SAMPLED + "            if step == 1:\n                continue\n"),
        ("distill.py", LOGGED, LOGGED + "            if step == 3:\n                break\n"))
    words = ["distill", "stopped", "--save_every", 20]
    assert "stopped after step 4 of 6" in finish(folder, *words, steps=6, root=root)
    out = folder / "stopped"
    assert saved_step(out) == 4 and (out / "adapter/adapter_model.safetensors").is_file()
    finish(folder, *words, steps=6, root=root)
    lines = [json.loads(line) for line in open(out / "metrics.jsonl")]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in lines if line.get("left_out")] == [2]


def test_what_cannot_be_in_a_checkpoint_is_named_at_the_first_save(folder, tmp_path):
    """A number of numpy's, which only an unsafe way of loading would give back."""
    given = "run.restore(model, "
    more = given + "baseline={'mean': np.ones(1)[0]}, "
    root = processes.fork(tmp_path / "fork", ("distill.py", given, more))
    text = finish(folder, "distill", "numpy", steps=9, code=2, root=root)
    assert "'baseline'" in text and not (folder / "numpy/checkpoint.pt").exists()
    assert len((folder / "numpy/metrics.jsonl").read_text().splitlines()) == 2


DROPOUT = """        for module in model.modules():
            if hasattr(module, "lora_dropout"):
                module.lora_dropout["default"] = torch.nn.Dropout(0.3)
        groups = [{"params": weights[::2]}, {"params": weights[1::2], "lr": 16 * args.lr}]
        optimizer = torch.optim.AdamW(groups, lr=args.lr, weight_decay=0.0)
"""


def test_a_fork_with_dropout_and_a_second_group(folder, tmp_path):
    """What torch and numpy draw depends on (seed, step); each group follows its own peak.

    A weight decay that is changed later has its effect, and the moments stay.
    """
    root = processes.fork(
        tmp_path / "fork",
        ("distill.py", "        optimizer = common.adamw(weights, args.lr)\n", DROPOUT),
        ("distill.py", "masks.float()  ", "masks.float() * (0.5 + np.random.rand())  "),
        ("distill.py", LOGGED, "lr_b=optimizer.param_groups[1]['lr'], " + LOGGED))
    whole, cut, decayed = (folder / f"fork-{name}" for name in ("whole", "cut", "decayed"))
    finish(folder, "distill", whole, root=root)
    finish(folder, "distill", cut, root=root, **KILLED)
    shutil.copytree(cut, decayed)
    finish(folder, "distill", cut, root=root)
    assert processes.contents(cut) == processes.contents(whole)
    lines = processes.contents(whole)[1]["metrics.jsonl"]
    assert all(line["lr_b"] == 16 * line["lr"] for line in lines)

    processes.edit(root / "distill.py", "weight_decay=0.0", "weight_decay=30.0")
    shutil.copy(root / "distill.py", decayed / "code")
    finish(folder, "distill", decayed, root=root)
    assert processes.contents(decayed)[0] != processes.contents(whole)[0]
    for out, decay in ((whole, 0), (decayed, 30)):
        state = torch.load(out / "checkpoint.pt", weights_only=True)["things"]["optimizer"]
        assert [group["weight_decay"] for group in state["param_groups"]] == [decay] * 2
        assert state["state"][0]["step"] == STEPS


def test_a_step_in_which_no_token_counts_moves_nothing(folder, tmp_path):
    """Not even by the momentum of those before it."""
    parts = "            parts = list(common.micro_batches(\n"
    none = "            if step >= 2:\n                factors, tokens = 0 * factors, 0\n"
    root = processes.fork(tmp_path / "fork", ("distill.py", parts, none + parts))
    out = folder / "no-token"
    finish(folder, "distill", out, root=root, **KILLED)
    after_two, _ = processes.contents(out)
    finish(folder, "distill", out, root=root)
    after_four, lines = processes.contents(out)
    assert after_four == after_two and saved_step(out) == STEPS
    assert [line["loss"] == 0 for line in lines["metrics.jsonl"]] == [False, False, True, True]


def test_the_dropout_of_a_checkpoint_is_set_to_0(folder, whole, tmp_path):
    """With a line; a run ends as without it, interrupted too."""
    model = shutil.copytree(common.TINY, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    config["text_config"]["attention_dropout"] = 0.02
    (model / "config.json").write_text(json.dumps(config))
    words = ["distill", folder / "dropout", "--model", model]
    text = finish(folder, *words, **KILLED)
    assert text.count("warning: a dropout of 0.02 is set to 0") == 1
    finish(folder, *words)
    assert processes.contents(folder / "dropout") == whole["distill"]
