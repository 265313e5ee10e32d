"""Interruptions: a run that was stopped, killed or starved of disk ends as if nothing had happened.

Every run is a process of its own, or several of them as torchrun starts them (tests/processes.py).
"""
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import processes
import pytest
import torch
from safetensors.torch import load_file, save_file

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
# In its second step, before the weights change, a process sends itself a signal.
SIGNAL = """
learning_rate = common.learning_rate
def interrupt(step, *more):
    if step == 1 and int(os.environ.get("RANK", 0)) == {rank}:
        os.kill(os.getpid(), {number:d})
    return learning_rate(step, *more)
common.learning_rate = interrupt
"""
# In its third step, a process waits until the file `go` is there.
WAIT = """
import time
learning_rate = common.learning_rate
def wait(step, *more):
    while step == 2 and not Path({out!r}, "go").exists():
        time.sleep(0.01)
    return learning_rate(step, *more)
common.learning_rate = wait
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory, toy_data):
    folder = tmp_path_factory.mktemp("runs")
    (folder / "data").mkdir()
    (folder / "data/tiny").symlink_to(toy_data)
    return folder


def start(folder, kind, out, *words, steps=STEPS, patch="", count=1):
    """The processes of a run. kind: one of FLAGS."""
    stage = "coldstart" if kind == "coldstart" else "distill"
    words = ["--steps", steps, "--batch", 4, "--micro_batch", 2, "--save_every", 2, "--out", out,
             "--lora_rank", 2, *FLAGS[kind], *words]
    return processes.start(folder, stage, words, patch=FEW + patch, count=count)


def finish(folder, kind, out, *words, code=0, **more):
    """Run to the end, which must be with exit code `code` -> what the processes said, together."""
    done = processes.collect(folder, start(folder, kind, out, *words, **more))
    text = "".join(one.out + one.err for one in done)
    assert [one.code for one in done] == [code] * len(done), text
    assert code != 2 or "Traceback" not in text, text
    return text


def contents(out):
    """What a run leaves, without times and memory: the adapter's bytes, the lines of the logs."""
    lines = {}
    for file in sorted(out.glob("*.jsonl")):
        lines[file.name] = [json.loads(line) for line in open(file)]
    for line in lines["metrics.jsonl"]:
        for name in ("seconds", "step_seconds", "peak_gb"):
            del line[name]
    if (out / "adapter-best").is_dir():
        lines["adapter-best"] = (out / "adapter-best/adapter_model.safetensors").read_bytes()
    return (out / "adapter/adapter_model.safetensors").read_bytes(), lines


def saved_step(out):
    """The step of checkpoint.pt; 0 without one."""
    file = out / "checkpoint.pt"
    return torch.load(file, weights_only=True)["step"] if file.is_file() else 0


@pytest.fixture(scope="module")
def whole(folder):
    """The uninterrupted run of each kind."""
    for kind in FLAGS:
        finish(folder, kind, f"whole-{kind}")
    return {kind: contents(folder / f"whole-{kind}") for kind in FLAGS}


def wait_for(process, path):
    """Until the file or folder is there."""
    while process.exitcode is None and not path.exists():
        time.sleep(0.02)
    assert process.exitcode is None


# ---------------------------------------------------------------- signals and kills

@pytest.mark.parametrize("kind, number", [
    ("coldstart", signal.SIGKILL), ("coldstart", signal.SIGINT), ("distill", signal.SIGTERM),
    ("ema", signal.SIGKILL), pytest.param("distill", signal.SIGKILL, marks=pytest.mark.slow)])
def test_an_interrupted_run_ends_like_an_uninterrupted_one(folder, whole, kind, number):
    """With the moving average too: whatever is handed to `restore` is exact at a resume."""
    out = folder / f"{kind}-{number.name}"
    [process] = start(folder, kind, out, patch=WAIT.format(out=str(out)))
    wait_for(process, out / "adapter")
    os.kill(process.pid, number)
    (out / "go").touch()
    [done] = processes.collect(folder, [process])
    (out / "go").unlink()
    if number == signal.SIGKILL:
        assert saved_step(out) == 2
    else:  # the step is finished and saved
        assert done.code == 128 + number and saved_step(out) == 3
        assert "Stopped after step 3 of 4" in done.out and "run the same command" in done.out
    assert f"resuming after step {saved_step(out)} of 4" in finish(folder, kind, out)
    assert contents(out) == whole[kind]
    # Once more: nothing is left to do, and nothing changes.
    before = {path: path.stat().st_mtime_ns for path in (out / "adapter").iterdir()}
    assert "all 4 steps were done before; nothing is trained" in finish(folder, kind, out)
    assert contents(out) == whole[kind]
    assert before == {path: path.stat().st_mtime_ns for path in (out / "adapter").iterdir()}
    # Killed at its last save, between the two: an earlier adapter is brought up to date.
    for file in out.glob("adapter*/adapter_model.safetensors"):
        save_file({name: 0 * weight for name, weight in load_file(file).items()}, file)
        os.utime(file, (0, 0))
    finish(folder, kind, out)
    assert contents(out) == whole[kind]


@pytest.mark.parametrize("moment", ["checkpoint", "adapter"])
def test_killed_while_it_saves(folder, whole, moment):
    """The second time: in the middle of checkpoint.pt, or between it and adapter/."""
    out = folder / f"killed-{moment}"
    name = {"checkpoint": "write_bytes", "adapter": "shutil.rmtree"}[moment]
    finish(folder, "coldstart", out, code=-9, patch=f"""
out = Path({str(out)!r})
real = common.{name}
def die(*words, **options):
    if {moment!r} == "checkpoint" and words[0] == out / "checkpoint.pt" and words[0].exists():
        (out / "checkpoint.pt.partial").write_bytes(words[1][:1000])
        os.kill(os.getpid(), 9)
    real(*words, **options)
    if {moment!r} == "adapter" and words[0] == out / "adapter" and torch.load(
            out / "checkpoint.pt", weights_only=True)["step"] == 4:
        os.kill(os.getpid(), 9)
common.{name} = die""")
    assert saved_step(out) == (2 if moment == "checkpoint" else 4)
    assert (out / "adapter").exists() == (moment == "checkpoint")
    finish(folder, "coldstart", out)
    assert contents(out) == whole["coldstart"] and not list(out.glob("*.partial"))


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
    assert contents(out) == contents(folder / f"alone-{kind}")


# ---------------------------------------------------------------- several processes

def same_but_for_sums(out, other):
    """The same rollouts and rows; losses and adapters up to the order of float sums."""
    (_, one), (_, two) = contents(out), contents(other)
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
    """A signal to the last process alone stops all of them after the same step, saved once."""
    out, last = folder / f"from-{first}-to-{then}", first - 1
    text = finish(folder, "distill", out, count=first, code=128 + signal.SIGTERM,
                  patch=SIGNAL.format(rank=last, number=signal.SIGTERM))
    assert text.count("Stopped after step 2 of 4") == 1 and saved_step(out) == 2
    assert "resuming after step 2 of 4" in finish(folder, "distill", out, count=then)
    same_but_for_sums(out, folder / "whole-distill")


def test_a_process_that_is_killed_ends_the_other(folder):
    started = start(folder, "coldstart", "orphan", count=2,
                    patch=SIGNAL.format(rank=1, number=signal.SIGKILL))
    done = processes.collect(folder, started)
    assert [one.code for one in done] == [2, -9]
    assert "another process of this run has ended" in done[0].error()


def test_processes_that_drift_apart_are_noticed(folder):
    text = finish(folder, "coldstart", "drift", code=2, count=2, patch="""
real = common.average_gradients
def drift(weights, *sums):
    found = real(weights, *sums)
    weights[0].grad.mul_(1 + int(os.environ["RANK"]))
    return found
common.average_gradients = drift""")
    assert "error: the processes' adapters differ after step 2" in text
    text = finish(folder, "coldstart", "uneven", "--batch", 3, code=2, count=2)
    assert "--batch 3 cannot be shared equally by 2 processes" in text


@pytest.mark.slow
def test_torchrun_itself(folder, whole):
    words = ["--steps", STEPS, "--batch", 4, "--micro_batch", 2, "--lora_rank", 2, "--save_every",
             2, "--out", "torchrun", *FLAGS["distill"]]
    done = subprocess.run(
        [str(Path(sys.executable).with_name("torchrun")), "--standalone", "--nproc_per_node", "2",
         ROOT / "distill.py", *map(str, words)], cwd=folder,
        capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("preset tiny on") == 1 and done.stdout.count("step 4 ") == 1
    same_but_for_sums(folder / "torchrun", folder / "whole-distill")


# ---------------------------------------------------------------- what goes wrong

def test_the_second_of_two_runs_is_refused(folder):
    [first] = start(folder, "coldstart", "shared", steps=100_000)
    wait_for(first, folder / "shared/metrics.jsonl")
    assert "another process is writing to shared" in finish(folder, "distill", "shared", code=2)
    first.kill()
    first.join()
    finish(folder, "coldstart", "shared", "--restart", steps=2)  # the lock went with its process


def test_a_malicious_checkpoint_is_not_executed(folder):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {folder}/executed",)
    finish(folder, "coldstart", "evil", steps=2)
    file = folder / "evil/checkpoint.pt"
    torch.save({"state": Evil()}, file)
    assert "cannot resume from evil/checkpoint.pt" in finish(folder, "coldstart", "evil", steps=3,
                                                             code=2)
    assert not (folder / "executed").exists()
    torch.load(file, weights_only=False)  # it would have been
    assert (folder / "executed").exists()


def test_a_full_disk_ends_with_one_line_and_the_old_checkpoint(folder, whole):
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
        assert "checkpoint.pt: the disk is full" in text and saved_step(out) == 2
        (out / "ballast").unlink()
        finish(folder, "coldstart", out)
        assert contents(out) == whole["coldstart"]
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
    assert "5 steps in a row were not finite: try a lower --lr" in text and "step 8 skipped" in text
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
    return gradient, scores + 20
module.chunked_divergence = far""")
    assert "warning: step 1: every response hit --max_new_tokens 2" in text
    assert "warning: the KL of the first step is 2" in text and "aligned?" in text
    text = finish(folder, "distill", "empty", steps=1, patch="""
real = common.average_gradients
common.average_gradients = lambda weights, loss, tokens: real(weights, loss, 0)""")
    assert "warning: step 1: no token counts" in text


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
    assert contents(folder / out) == whole[stage]
