"""Interruptions: a run that was stopped, killed or starved of disk ends as if nothing had happened.

Every run is a process of its own, forked from one that has imported torch (so that a run takes seconds).
"""
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
FLAGS = {"coldstart": ["--eval_every", 3, "--max_new_tokens", 3], "distill": ["--init", "none", "--max_new_tokens", 30, "--show_every", 2]}
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["coldstart", "distill", "peft", "transformers.models.qwen3_vl.modeling_qwen3_vl",
                                  "transformers.models.qwen3_vl.processing_qwen3_vl", "transformers.models.auto.processing_auto"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    subprocess.run([sys.executable, ROOT / "gen_data.py", "--preset", "tiny", "--train", "12", "--val", "8", "--test", "4", "--out", "data"],
                   cwd=folder, check=True, capture_output=True)
    return folder


def script(folder, stage, words, output, patch):
    """What the forked process does: the stage's main, with `patch` (Python lines) executed before it."""
    os.chdir(folder)
    handle = os.open(output, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    torch.set_num_threads(1)
    module = import_module(stage)
    exec(patch, {"os": os, "torch": torch, "Path": Path, stage: module})
    module.main(module.parse_args(words))


def start(folder, stage, out, *words, steps=6, patch=""):
    words = [*map(str, ("--preset", "tiny", "--steps", steps, "--batch", 4, "--micro_batch", 2, "--save_every", 2, "--out", out, *FLAGS[stage], *words))]
    process = processes.Process(target=script, args=(folder, stage, words, folder / "output.txt", patch))
    process.start()
    return process


def finish(folder, stage, out, *words, code=0, **more):
    """Run to the end, which must be with exit code `code`; returns what was printed."""
    process = start(folder, stage, out, *words, **more)
    process.join()
    printed = (folder / "output.txt").read_text()
    assert process.exitcode == code and (code != 2 or "Traceback" not in printed), printed
    return printed


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
    while process.exitcode is None and not ((out / "metrics.jsonl").exists() and len(open(out / "metrics.jsonl").readlines()) >= steps):
        time.sleep(0.02)
    assert process.exitcode is None


@pytest.mark.parametrize("stage", FLAGS)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_run_ends_like_an_uninterrupted_one(folder, whole, stage, number):
    out = folder / f"{stage}-{number.name}"
    process = start(folder, stage, out)
    wait_for(process, out, 3)
    os.kill(process.pid, number)
    process.join()
    if number == signal.SIGTERM:  # the step is finished and saved
        assert process.exitcode == 128 + number and "the same command goes on" in (folder / "output.txt").read_text()
    assert not (out / "adapter").exists() and len(list(out.glob("checkpoint-*"))) == 1
    assert "steps are done, going on" in finish(folder, stage, out)
    assert contents(out) == whole[stage]
    # Once more: nothing is left to do. With more steps it goes on, and the schedule is that of the new number.
    again = finish(folder, stage, out)
    assert "6 of 6 steps are done" in again and contents(out) == whole[stage]


def test_arguments_that_differ_are_refused(folder, whole):
    printed = finish(folder, "coldstart", "whole-coldstart", "--lr", 3, "--seed", 2, code=2)
    assert "--lr was 0.002 and is 3.0" in printed and "--seed was 0 and is 2" in printed
    assert "--steps 4, but 6 are done" in finish(folder, "coldstart", "whole-coldstart", steps=4, code=2)
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
        assert "data/train/metadata.jsonl has changed" in finish(folder, "coldstart", "rows", code=2)
    finally:
        file.write_text(text)


def test_the_second_of_two_runs_is_refused(folder):
    first = start(folder, "coldstart", "shared", steps=500)
    wait_for(first, folder / "shared", 1)
    assert "another run is writing to shared" in finish(folder, "coldstart", "shared", code=2)
    first.kill()
    first.join()
    finish(folder, "coldstart", "shared", "--restart", steps=2)  # the lock went with its process


@pytest.mark.parametrize("moment", ["os.fsync", "torch.save"])
def test_killed_while_a_checkpoint_is_written(folder, whole, moment):
    """The second checkpoint is cut off in the middle; the first one is still there, and the run goes on from it."""
    out = folder / f"killed-{moment}"
    module, name = moment.split(".")
    finish(folder, "coldstart", out, code=-9, patch=f"""
real = {moment}
def die(*words):
    if Path({str(out)!r}, 'checkpoint-0000002').exists() and Path({str(out)!r}, 'checkpoint.partial').exists():
        {"open(words[1], 'wb').write(b'half')" if name == "save" else "pass"}
        os.kill(os.getpid(), 9)
    return real(*words)
{module}.{name} = die""")
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-0000002"] and (out / "checkpoint.partial").exists()
    finish(folder, "coldstart", out)
    assert contents(out) == whole["coldstart"] and not (out / "checkpoint.partial").exists()


def test_a_full_disk_ends_with_one_line_and_the_old_checkpoint(folder, whole):
    """On a file system of 12 MB, where two checkpoints just fit."""
    out = folder / "disk"
    out.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12M", "tmpfs", out], capture_output=True).returncode:
        pytest.skip("no right to mount a small tmpfs")
    try:
        printed = finish(folder, "coldstart", out, code=2, patch=f"""
real = torch.save
def fill(*words):
    if Path({str(out)!r}, 'checkpoint-0000002').exists():
        try:
            Path({str(out)!r}, 'ballast').write_bytes(bytes(10**8))
        except OSError:
            pass
    real(*words)
torch.save = fill""")
        assert "error: cannot write" in printed and "checkpoint-0000002 is what there is" in printed
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
    assert "warning: step 2 skipped" in finish(folder, "coldstart", "nan", patch="BAD = (2,)" + patch)
    lines = [json.loads(line) for line in open(folder / "nan/metrics.jsonl")]
    assert len(lines) == 6 and lines[1]["grad_norm"] is None and lines[2]["grad_norm"] > 0
    evidence = [json.loads(line) for line in open(folder / "nan/not_finite.jsonl")]
    assert len(evidence) == 4 and all(line["step"] == 2 and line["id"].startswith("train_") for line in evidence)
    assert "5 steps in a row were not finite: try a lower --lr" in finish(folder, "coldstart", "nans", code=2, patch="BAD = range(2, 99)" + patch)
    zero = "torch.nn.utils.clip_grad_norm_ = lambda weights, norm: torch.zeros(())"
    assert "gradient of the first step is zero" in finish(folder, "coldstart", "zero", code=2, patch=zero)


def test_warnings(folder):
    """Rollouts that all hit the limit; a first KL as large as only misalignment gives."""
    printed = finish(folder, "distill", "warned", "--max_new_tokens", 2, steps=1, patch="""
real = distill.sliced_divergence
distill.sliced_divergence = lambda *words: (lambda gradient, value, kl: (gradient, value, kl + 20))(*real(*words))""")
    assert "warning: step 1: every response hit the limit of 2 tokens" in printed
    assert "warning: the KL of the first step is 2" in printed and "not aligned" in printed


def test_out_of_memory_saves_first(folder, whole):
    patch = """
real = coldstart.answer_loss
def starve(*words, seen=[]):
    seen.append(1)
    if len(seen) > SEEN:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\\nMore")
    return real(*words)
coldstart.answer_loss = starve"""
    for name, seen, steps in (("oom", 55, 3), ("later", 10, 2)):  # in the fourth step; in the look at held-out pictures of the third
        printed = finish(folder, "coldstart", name, code=2, patch=f"SEEN = {seen}" + patch)
        assert f"{name}/checkpoint-000000{steps} is what there is" in printed and "--micro_batch" in printed
        finish(folder, "coldstart", name)
        assert contents(folder / name) == whole["coldstart"]


def test_a_malicious_optimizer_file_is_not_executed(folder):
    finish(folder, "coldstart", "evil", steps=2)
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {folder}/executed",)
    torch.save({"state": Evil()}, folder / "evil/checkpoint-0000002/optimizer.pt")
    assert "optimizer.pt" in finish(folder, "coldstart", "evil", steps=3, code=2) and not (folder / "executed").exists()
    torch.load(folder / "evil/checkpoint-0000002/optimizer.pt", weights_only=False)  # it would have been
    assert (folder / "executed").exists()


@pytest.mark.slow
@pytest.mark.parametrize("stage", FLAGS)
def test_killed_at_twenty_random_moments(folder, stage):
    """`kill -9` at random moments of a longer run, again and again; then the end equals that of the run left alone."""
    finish(folder, stage, f"alone-{stage}", steps=150)
    wanted, out, rng, tally = contents(folder / f"alone-{stage}"), folder / f"killed-{stage}", random.Random(0), []
    while len(tally) < 20:
        process = start(folder, stage, out, steps=150)
        time.sleep(rng.uniform(0.5, 4))
        if process.exitcode is not None:
            tally.append("finished before the kill")
            break
        process.kill()
        process.join()
        tally.append(max((path.name for path in out.glob("checkpoint-*")), default="no checkpoint"))
    finish(folder, stage, out, steps=150)
    print(f"\n{stage}: newest checkpoint after each kill: {', '.join(tally)}")
    assert contents(out) == wanted
