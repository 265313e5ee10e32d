"""Interruptions: a run that was stopped, killed or starved of disk ends as if nothing had happened."""
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
FLAGS = {"coldstart": ["--eval_every", 3], "distill": ["--init", "none", "--max_new_tokens", 30, "--show_every", 2]}
QUIET = {**os.environ, "OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    subprocess.run([sys.executable, ROOT / "gen_data.py", "--preset", "tiny", "--train", "12", "--val", "8", "--test", "4", "--out", "data"],
                   cwd=folder, check=True, capture_output=True)
    return folder


def command(stage, out, *words, steps=6):
    return [sys.executable, str(ROOT / f"{stage}.py"), *map(str, ("--preset", "tiny", "--steps", steps, "--batch", 4, "--micro_batch", 2,
                                                                  "--save_every", 2, "--out", out, *FLAGS[stage], *words))]


def start(folder, stage, out, *words, **more):
    return subprocess.Popen(command(stage, out, *words, **more), cwd=folder, env=QUIET, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finish(folder, stage, out, *words, code=0, **more):
    result = subprocess.run(command(stage, out, *words, **more), cwd=folder, env=QUIET, capture_output=True, text=True)
    assert result.returncode == code, result.stderr
    return result


def contents(out):
    """What a run leaves, without times and memory: the adapter's bytes, the other lines."""
    lines = {file.name: [json.loads(line) for line in open(file)] for file in sorted(out.glob("*.jsonl"))}
    for line in lines["metrics.jsonl"]:
        line = [line.pop(key, None) for key in ("seconds", "step_seconds", "peak_gb")]
    return (out / "adapter/adapter_model.safetensors").read_bytes(), lines


@pytest.fixture(scope="module")
def whole(folder):
    """The uninterrupted run of each stage."""
    for stage in FLAGS:
        finish(folder, stage, f"whole-{stage}")
    return {stage: contents(folder / f"whole-{stage}") for stage in FLAGS}


def wait_for(process, out, steps):
    """Until the log has so many steps."""
    while process.poll() is None and not ((out / "metrics.jsonl").exists() and len(open(out / "metrics.jsonl").readlines()) >= steps):
        time.sleep(0.02)
    assert process.poll() is None, process.communicate()


@pytest.mark.parametrize("stage", FLAGS)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_run_ends_like_an_uninterrupted_one(folder, whole, stage, number):
    out = folder / f"{stage}-{number.name}"
    process = start(folder, stage, out)
    wait_for(process, out, 3)
    process.send_signal(number)
    stdout, _ = process.communicate()
    if number == signal.SIGTERM:  # the step is finished and saved
        assert process.returncode == 128 + number and "the same command goes on" in stdout
    assert not (out / "adapter").exists() and len(list(out.glob("checkpoint-*"))) == 1
    assert "steps are done, going on" in finish(folder, stage, out).stdout
    assert contents(out) == whole[stage]
    # Once more: nothing is left to do. With more steps it goes on, and the schedule is that of the new number.
    again = finish(folder, stage, out)
    assert "6 of 6 steps are done" in again.stdout and contents(out) == whole[stage]


def test_arguments_that_differ_are_refused(folder, whole):
    message = finish(folder, "coldstart", "whole-coldstart", "--lr", 3, "--seed", 2, code=2).stderr
    assert "--lr was 0.002 and is 3.0" in message and "--seed was 0 and is 2" in message and "Traceback" not in message
    assert "--steps 4, but 6 are done" in finish(folder, "coldstart", "whole-coldstart", steps=4, code=2).stderr
    assert contents(folder / "whole-coldstart") == whole["coldstart"]
    out = folder / "grows"
    finish(folder, "coldstart", out, steps=2)
    finish(folder, "coldstart", out, "--micro_batch", 4, steps=3)  # what changes no result may differ
    assert [line["step"] for line in contents(out)[1]["metrics.jsonl"]] == [1, 2, 3]
    finish(folder, "coldstart", out, "--lr", 3, "--restart", steps=2)
    assert [line["step"] for line in contents(out)[1]["metrics.jsonl"]] == [1, 2]


def test_a_change_of_the_rows_is_noticed(folder):
    finish(folder, "coldstart", "rows", steps=2)
    file = folder / "data/train/metadata.jsonl"
    text = file.read_text()
    try:
        file.write_text("".join(text.splitlines(keepends=True)[:-1]))
        assert "data/train/metadata.jsonl has changed" in finish(folder, "coldstart", "rows", code=2).stderr
    finally:
        file.write_text(text)


def test_the_second_of_two_runs_is_refused(folder):
    first = start(folder, "coldstart", "shared", steps=500)
    wait_for(first, folder / "shared", 1)
    assert "another run is writing to shared" in finish(folder, "coldstart", "shared", code=2).stderr
    first.kill()
    first.communicate()
    finish(folder, "coldstart", "shared", "--restart", steps=2)  # the lock went with its process


def broken(folder, stage, out, patch, *words):
    """Run a stage with `patch` (Python lines) executed before its main; returns the finished process."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import os, torch, common, {stage}\n{patch}\n{stage}.main({stage}.parse_args(sys.argv[1:]))"
    return subprocess.run([sys.executable, "-c", code, *command(stage, out, *words)[2:]], cwd=folder, env=QUIET, capture_output=True, text=True)


@pytest.mark.parametrize("moment", ["os.fsync", "torch.save"])
def test_killed_while_a_checkpoint_is_written(folder, whole, moment):
    """The second checkpoint is cut off in the middle; the first one is still there, and the run goes on from it."""
    out = folder / f"killed-{moment}"
    module, name = moment.split(".")
    dead = broken(folder, "coldstart", out, f"""
real = {moment}
def die(*words):
    if list(__import__('pathlib').Path({str(out)!r}).glob('checkpoint-*2')):
        {"open(words[1], 'wb').write(b'half')" if name == "save" else "pass"}
        os.kill(os.getpid(), 9)
    return real(*words)
{module}.{name} = die""")
    assert dead.returncode == -9, dead.stderr
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-0000002"] and (out / "checkpoint.partial").exists()
    finish(folder, "coldstart", out)
    assert contents(out) == whole["coldstart"] and not (out / "checkpoint.partial").exists()


def test_a_full_disk_ends_with_one_line_and_the_old_checkpoint(folder, whole):
    """On a file system of 5 MB."""
    out = folder / "disk"
    out.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=5M", "tmpfs", out], capture_output=True).returncode:
        pytest.skip("no right to mount a small tmpfs")
    try:
        patch = f"real = torch.save\ndef fill(*w):\n    os.path.exists({str(out / 'checkpoint-0000002')!r}) and open({str(out / 'ballast')!r}, 'wb').write(bytes(10**6))\n    real(*w)\ntorch.save = fill"
        full = broken(folder, "coldstart", out, patch)
        assert full.returncode == 2 and "Traceback" not in full.stderr, full.stderr
        assert "error: cannot write" in full.stderr and "checkpoint-0000002 is what there is" in full.stderr
        assert [path.name for path in out.glob("checkpoint*")] == ["checkpoint-0000002"]
        (out / "ballast").unlink()
        finish(folder, "coldstart", out)
        assert contents(out) == whole["coldstart"]
    finally:
        subprocess.run(["umount", out])


def test_numbers_that_are_not_finite(folder):
    patch = """
real = torch.nn.utils.clip_grad_norm_
def poison(weights, *words, seen=[]):
    seen.append(1)
    if len(seen) in BAD:
        weights[0].grad[0] = float('nan')
    return real(weights, *words)
torch.nn.utils.clip_grad_norm_ = poison"""
    once = broken(folder, "coldstart", "nan", "BAD = (2,)" + patch)
    assert once.returncode == 0 and "warning: step 2 skipped" in once.stderr
    lines = [json.loads(line) for line in open(folder / "nan/metrics.jsonl")]
    assert len(lines) == 6 and lines[1]["grad_norm"] is None and lines[2]["grad_norm"] > 0
    evidence = [json.loads(line) for line in open(folder / "nan/not_finite.jsonl")]
    assert len(evidence) == 4 and all(line["step"] == 2 and line["id"].startswith("train_") for line in evidence)
    always = broken(folder, "coldstart", "nans", "BAD = range(2, 99)" + patch)
    assert always.returncode == 2 and "5 steps in a row were not finite: try a lower --lr" in always.stderr
    zero = broken(folder, "coldstart", "zero", "torch.nn.utils.clip_grad_norm_ = lambda weights, norm: torch.zeros(())")
    assert zero.returncode == 2 and "gradient of the first step is zero" in zero.stderr


def test_out_of_memory_saves_first(folder, whole):
    patch = """
real = coldstart.answer_loss
def starve(*words, seen=[]):
    seen.append(1)
    if len(seen) > 6:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\\nMore")
    return real(*words)
coldstart.answer_loss = starve"""
    result = broken(folder, "coldstart", "oom", patch)
    assert result.returncode == 2 and "Saved after 3 steps" in result.stderr and "--micro_batch" in result.stderr
    finish(folder, "coldstart", "oom")
    assert contents(folder / "oom") == whole["coldstart"]


def test_a_malicious_optimizer_file_is_not_executed(folder):
    finish(folder, "coldstart", "evil", steps=2)
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {folder}/executed",)
    torch.save({"state": Evil()}, folder / "evil/checkpoint-0000002/optimizer.pt")
    result = finish(folder, "coldstart", "evil", code=2)
    assert "optimizer.pt" in result.stderr and "Traceback" not in result.stderr and not (folder / "executed").exists()
    torch.load(folder / "evil/checkpoint-0000002/optimizer.pt", weights_only=False)  # it would have been
    assert (folder / "executed").exists()


@pytest.mark.slow
@pytest.mark.parametrize("stage", FLAGS)
def test_killed_at_twenty_random_moments(folder, stage):
    """`kill -9` at random moments of a longer run, again and again; then the end equals that of the run left alone."""
    finish(folder, stage, f"alone-{stage}", steps=60)
    wanted, out, rng, tally = contents(folder / f"alone-{stage}"), folder / f"killed-{stage}", random.Random(0), []
    while len(tally) < 20:
        process = start(folder, stage, out, steps=60)
        time.sleep(rng.uniform(2, 16))
        if process.poll() is not None:
            tally.append("finished before the kill")
            break
        process.kill()
        process.communicate()
        tally.append(max((path.name for path in out.glob("checkpoint-*")), default="no checkpoint"))
    finish(folder, stage, out, steps=60)
    print(f"\n{stage}: newest checkpoint after each kill: {', '.join(tally)}")
    assert contents(out) == wanted
