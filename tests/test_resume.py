"""Interruptions: a run that was stopped, killed or starved ends as if nothing had happened.

Every run is a process of its own, forked from one that has imported torch, so that it takes
seconds.
"""
import json
import multiprocessing
import os
import random
import signal
import subprocess
import time
from importlib import import_module
from pathlib import Path

import pytest
import torch

FLAGS = {"coldstart": ["--eval_every", 3, "--max_new_tokens", 3],
         "distill": ["--init", "none", "--max_new_tokens", 20, "--show_every", 2]}
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload([
    "coldstart", "distill", "peft", "transformers.models.qwen3_vl.modeling_qwen3_vl",
    "transformers.models.qwen3_vl.processing_qwen3_vl",
    "transformers.models.auto.processing_auto"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory, toy_data):
    folder = tmp_path_factory.mktemp("runs")
    (folder / "data").symlink_to(toy_data)
    return folder


def script(folder, stage, words, output, patch):
    """What the forked process does: the lines `patch`, then the stage's main."""
    os.chdir(folder)
    handle = os.open(output, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    torch.set_num_threads(1)
    module = import_module(stage)
    exec(patch, {"os": os, "torch": torch, "Path": Path, stage: module})
    module.main(module.parse_args(words))


def start(folder, stage, out, *words, steps=6, patch=""):
    words = ["--preset", "tiny", "--steps", steps, "--batch", 4, "--micro_batch", 2,
             "--save_every", 2, "--out", out, *FLAGS[stage], *words]
    process = processes.Process(target=script, args=(
        folder, stage, [str(word) for word in words], folder / "output.txt", patch))
    process.start()
    return process


def finish(folder, stage, out, *words, code=0, **more):
    """Run to the end, which must be with exit code `code`; returns what was printed."""
    process = start(folder, stage, out, *words, **more)
    process.join()
    printed = (folder / "output.txt").read_text()
    assert process.exitcode == code and (code != 2 or "Traceback" not in printed), printed
    return printed


def read_lines(file):
    return [json.loads(line) for line in open(file)]


def contents(out):
    """What a run leaves, without times and memory: the adapter's bytes, the lines of its logs."""
    lines = {file.name: read_lines(file) for file in sorted(out.glob("*.jsonl"))}
    for line in lines["metrics.jsonl"]:
        for name in ("seconds", "step_seconds", "peak_gb"):
            del line[name]
    return (out / "adapter/adapter_model.safetensors").read_bytes(), lines


@pytest.fixture(scope="module")
def whole(folder):
    """The uninterrupted run of each stage."""
    for stage in FLAGS:
        finish(folder, stage, f"whole-{stage}")
    return {stage: contents(folder / f"whole-{stage}") for stage in FLAGS}


def wait_for(process, out, steps):
    """Until the log has so many steps."""
    log = out / "metrics.jsonl"
    while process.exitcode is None and not (log.exists() and len(read_lines(log)) >= steps):
        time.sleep(0.02)
    assert process.exitcode is None


@pytest.mark.parametrize("stage, number", [
    ("coldstart", signal.SIGTERM),
    ("distill", signal.SIGKILL),
    pytest.param("coldstart", signal.SIGKILL, marks=pytest.mark.slow),
    pytest.param("distill", signal.SIGINT, marks=pytest.mark.slow),
])
def test_an_interrupted_run_ends_like_an_uninterrupted_one(folder, whole, stage, number):
    out = folder / f"{stage}-{number.name}"
    process = start(folder, stage, out)
    wait_for(process, out, 3)
    os.kill(process.pid, number)
    process.join()
    if number != signal.SIGKILL:  # the step is finished and saved
        assert process.exitcode == 128 + number
        assert "the same command goes on" in (folder / "output.txt").read_text()
    assert not (out / "adapter").exists() and len(list(out.glob("checkpoint-*"))) == 1
    assert "of 6 steps are done" in finish(folder, stage, out)
    assert contents(out) == whole[stage]
    # Once more: nothing is left to do.
    assert "6 of 6 steps are done" in finish(folder, stage, out)
    assert contents(out) == whole[stage]


def test_arguments_that_differ_are_refused(folder, whole):
    out = "whole-coldstart"
    printed = finish(folder, "coldstart", out, "--lr", 3, "--seed", 2, code=2)
    assert "--lr was 0.002 and is 3.0" in printed and "--seed was 0 and is 2" in printed
    assert "--steps 4, but 6 are done" in finish(folder, "coldstart", out, steps=4, code=2)
    assert contents(folder / out) == whole["coldstart"]
    out = folder / "grows"
    finish(folder, "coldstart", out, steps=2)
    finish(folder, "coldstart", out, "--micro_batch", 4, steps=3)  # it changes no result
    assert [line["step"] for line in read_lines(out / "metrics.jsonl")] == [1, 2, 3]
    finish(folder, "coldstart", out, "--lr", 3, "--restart", steps=2)
    assert [line["step"] for line in read_lines(out / "metrics.jsonl")] == [1, 2]


def test_a_change_of_the_rows_is_noticed(folder):
    finish(folder, "coldstart", "rows", steps=1)
    file = folder / "data/train/metadata.jsonl"
    text = file.read_text()
    try:
        file.write_text("".join(text.splitlines(keepends=True)[:-1]))
        printed = finish(folder, "coldstart", "rows", code=2)
        assert "data/train/metadata.jsonl has changed" in printed
    finally:
        file.write_text(text)


def test_the_second_of_two_runs_is_refused(folder):
    first = start(folder, "coldstart", "shared", steps=500)
    wait_for(first, folder / "shared", 1)
    printed = finish(folder, "coldstart", "shared", code=2)
    assert "another run is writing to shared" in printed
    first.kill()
    first.join()
    finish(folder, "coldstart", "shared", "--restart", steps=1)  # the lock went with its process


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["os.fsync", "torch.save"])
def test_killed_while_a_checkpoint_is_written(folder, whole, moment):
    """In the middle of the second one; the first is still there, and the run goes on from it."""
    out = folder / f"killed-{moment}"
    half = "open(words[1], 'wb').write(b'half')" if moment == "torch.save" else "pass"
    finish(folder, "coldstart", out, code=-9, patch=f"""
real = {moment}
def die(*words):
    out = Path({str(out)!r})
    if (out / 'checkpoint-0000002').exists() and (out / 'checkpoint.partial').exists():
        {half}
        os.kill(os.getpid(), 9)
    return real(*words)
{moment} = die""")
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-0000002"]
    assert (out / "checkpoint.partial").exists()
    finish(folder, "coldstart", out)
    assert contents(out) == whole["coldstart"] and not (out / "checkpoint.partial").exists()


def test_a_full_disk_ends_with_one_line_and_the_old_checkpoint(folder, whole):
    """On a file system of 12 MB, where two checkpoints just fit."""
    out = folder / "disk"
    out.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=12M", "tmpfs", out]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no right to mount a small tmpfs")
    try:
        printed = finish(folder, "coldstart", out, code=2, patch=f"""
real = torch.save
def fill(*words):
    out = Path({str(out)!r})
    if (out / 'checkpoint-0000002').exists():
        try:
            (out / 'ballast').write_bytes(bytes(10**8))
        except OSError:
            pass
    real(*words)
torch.save = fill""")
        assert "error: cannot write" in printed
        assert "checkpoint-0000002 is what there is" in printed
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
    printed = finish(folder, "coldstart", "nan", steps=3, patch="BAD = (2,)" + patch)
    assert "warning: step 2 skipped" in printed
    lines = read_lines(folder / "nan/metrics.jsonl")
    assert len(lines) == 3 and lines[1]["grad_norm"] is None and lines[2]["grad_norm"] > 0
    evidence = read_lines(folder / "nan/not_finite.jsonl")
    assert len(evidence) == 4
    for line in evidence:
        assert line["step"] == 2 and line["id"].startswith("train_") and line["questions"]
    printed = finish(folder, "coldstart", "nans", code=2, patch="BAD = range(2, 99)" + patch)
    assert "5 steps in a row were not finite: try a lower --lr" in printed
    zero = "torch.nn.utils.clip_grad_norm_ = lambda weights, norm: torch.zeros(())"
    printed = finish(folder, "coldstart", "zero", code=2, patch=zero)
    assert "the first gradient is zero" in printed


def test_a_skipped_step_of_distillation_changes_no_weight(folder):
    """Its rollouts are the evidence, and the adapter is still the fresh one."""
    patch = """
torch.nn.utils.clip_grad_norm_ = lambda weights, norm: torch.tensor(float('nan'))"""
    finish(folder, "distill", "skipped", "--save_every", 1, steps=2, patch=patch)
    evidence = read_lines(folder / "skipped/not_finite.jsonl")
    assert [line["step"] for line in evidence] == [1] * 4 + [2] * 4
    assert all(line["response"] is not None and line["kl"] for line in evidence)
    from safetensors.torch import load_file
    weights = load_file(folder / "skipped/adapter/adapter_model.safetensors")
    assert all(weight.abs().max() == 0 for name, weight in weights.items() if "lora_B" in name)


def test_warnings(folder):
    """Rollouts that all hit the limit; a first KL as large as only misalignment gives."""
    printed = finish(folder, "distill", "warned", "--max_new_tokens", 2, steps=1, patch="""
real = distill.sliced_divergence
def far_away(*words):
    gradient, scores = real(*words)
    return gradient, scores + 20
distill.sliced_divergence = far_away""")
    assert "warning: step 1: every response hit the limit of 2 tokens" in printed
    assert "warning: the KL of the first step is 2" in printed and "not aligned" in printed


# With rows of 4 in micro-batches of 2, a step asks twice for the loss.
@pytest.mark.parametrize("loss, done", [
    pytest.param(5, 2, id="in the third step"),
    pytest.param(7, 2, id="in the look after the third step", marks=pytest.mark.slow)])
def test_out_of_memory_saves_first(folder, whole, loss, done):
    out = f"memory-{loss}"
    printed = finish(folder, "coldstart", out, "--save_every", 10, code=2, patch=f"""
real = coldstart.answer_loss
def starve(*words, seen=[]):
    seen.append(1)
    if len(seen) == {loss}:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\\nMore")
    return real(*words)
coldstart.answer_loss = starve""")
    if loss == 5:
        assert f"{out}/checkpoint-000000{done} is what there is" in printed
    else:  # the weights are ahead of the log: nothing is saved of that step
        assert "No checkpoint is what there is" in printed
    assert "--micro_batch" in printed and "CUDA out of memory" in printed
    finish(folder, "coldstart", out)
    assert contents(folder / out) == whole["coldstart"]


def test_a_malicious_optimizer_file_is_not_executed(folder):
    finish(folder, "coldstart", "evil", steps=1)

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {folder}/executed",)
    file = folder / "evil/checkpoint-0000001/optimizer.pt"
    torch.save({"state": Evil()}, file)
    assert "optimizer.pt" in finish(folder, "coldstart", "evil", steps=2, code=2)
    assert not (folder / "executed").exists()
    torch.load(file, weights_only=False)  # it would have been
    assert (folder / "executed").exists()


@pytest.mark.slow
@pytest.mark.parametrize("stage", FLAGS)
def test_killed_at_twenty_random_moments(folder, stage):
    """`kill -9` again and again; then the end equals that of the run left alone."""
    finish(folder, stage, f"alone-{stage}", steps=150)
    wanted, out = contents(folder / f"alone-{stage}"), folder / f"killed-{stage}"
    rng, newest = random.Random(0), []
    while len(newest) < 20:
        process = start(folder, stage, out, steps=150)
        time.sleep(rng.uniform(0.5, 4))
        if process.exitcode is not None:
            newest.append("finished before the kill")
            break
        process.kill()
        process.join()
        checkpoints = [path.name for path in out.glob("checkpoint-*")]
        newest.append(max(checkpoints, default="no checkpoint"))
    finish(folder, stage, out, steps=150)
    print(f"\n{stage}: newest checkpoint after each kill: {', '.join(newest)}")
    assert contents(out) == wanted
