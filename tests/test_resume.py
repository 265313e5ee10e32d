"""Interruptions: a run that was stopped, killed or starved of disk ends as if nothing had happened.

Every run is a process of its own, forked from one that has imported torch (so that it takes
seconds), or several of them as torchrun starts them.
"""
import json
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import coldstart
import common

ROOT = Path(__file__).parents[1]
STEPS = 4
FLAGS = {"coldstart": ["--eval_every", 3, "--max_new_tokens", 3],
         "distill": ["--init", "none", "--max_new_tokens", 20, "--show_every", 1]}
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload([
    "coldstart", "distill", "peft", "transformers.models.qwen3_vl.modeling_qwen3_vl",
    "transformers.models.qwen3_vl.processing_qwen3_vl",
    "transformers.models.auto.processing_auto"])
# In a child, before the stage's main: fewer held-out pictures to look at.
FEW = """
draw_questions = coldstart.draw_questions
coldstart.draw_questions = lambda rows, count, *more: draw_questions(rows, min(count, 8), *more)
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
    (folder / "data").symlink_to(toy_data)
    return folder


def child(folder, stage, words, rank, environment, patch):
    """What the forked process does: the stage's main, with `patch` (Python) executed before it."""
    os.chdir(folder)
    handle = os.open(f"output-{rank}.txt", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.environ.update(environment)
    torch.set_num_threads(1)
    module = import_module(stage)
    exec(FEW + patch, {"os": os, "torch": torch, "Path": Path, "common": common,
                       "coldstart": coldstart, stage: module})
    module.main(module.parse_args(words))


def start(folder, stage, out, *words, steps=STEPS, patch="", count=1):
    """The processes of a run; several find each other as torchrun's do."""
    words = ["--preset", "tiny", "--steps", steps, "--batch", 4, "--micro_batch", 2, "--lora_rank",
             2, "--save_every", 2, "--out", out, *FLAGS[stage], *words]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = []
    for rank in range(count):
        environment = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count),
                       "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        process = processes.Process(target=child, args=(
            folder, stage, list(map(str, words)), rank, environment if count > 1 else {}, patch))
        process.start()
        started.append(process)
    return started


def printed(folder, rank=0):
    return (folder / f"output-{rank}.txt").read_text()


def finish(folder, stage, out, *words, code=0, **more):
    """Run to the end, which must be with exit code `code`; returns what the first one printed."""
    started = start(folder, stage, out, *words, **more)
    for process in started:
        process.join()
    text = "".join(printed(folder, rank) for rank in range(len(started)))
    assert [process.exitcode for process in started] == [code] * len(started), text
    assert code != 2 or "Traceback" not in text, text
    return printed(folder)


def contents(out):
    """What a run leaves, without times and memory: the adapter's bytes, the other lines."""
    lines = {}
    for file in sorted(out.glob("*.jsonl")):
        lines[file.name] = [json.loads(line) for line in open(file)]
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


def wait_for(process, path):
    """Until the file or folder is there."""
    while process.exitcode is None and not path.exists():
        time.sleep(0.02)
    assert process.exitcode is None


# ---------------------------------------------------------------- signals and kills

@pytest.mark.parametrize("stage, number", [
    ("coldstart", signal.SIGKILL), ("coldstart", signal.SIGINT), ("distill", signal.SIGTERM),
    pytest.param("distill", signal.SIGKILL, marks=pytest.mark.slow)])
def test_an_interrupted_run_ends_like_an_uninterrupted_one(folder, whole, stage, number):
    out = folder / f"{stage}-{number.name}"
    [process] = start(folder, stage, out, patch=WAIT.format(out=str(out)))
    wait_for(process, out / "checkpoint-0000002")
    os.kill(process.pid, number)
    (out / "go").touch()
    process.join()
    done = 2
    if number != signal.SIGKILL:  # the step is finished and saved
        done = 3
        assert process.exitcode == 128 + number
        assert "stopped: 3 of 4 steps are saved" in printed(folder)
    assert not (out / "adapter").exists()
    assert [path.name for path in out.glob("checkpoint-*")] == [f"checkpoint-000000{done}"]
    assert f"{done} of 4 steps are done" in finish(folder, stage, out)
    assert contents(out) == whole[stage]
    # Once more: nothing is left to do.
    assert "4 of 4 steps are done" in finish(folder, stage, out)
    assert contents(out) == whole[stage]


@pytest.mark.parametrize("moment", ["os.fsync", pytest.param("torch.save", marks=pytest.mark.slow)])
def test_killed_while_a_checkpoint_is_written(folder, whole, moment):
    """The second one is cut off in the middle; the first is still there, and the run goes on."""
    out = folder / f"killed-{moment}"
    module, name = moment.split(".")
    half = "open(words[1], 'wb').write(b'half')" if name == "save" else "pass"
    finish(folder, "coldstart", out, code=-9, patch=f"""
real = {moment}
def die(*words):
    if Path({str(out)!r}, 'checkpoint-0000002').exists():
        if Path({str(out)!r}, 'checkpoint.partial').exists():
            {half}
            os.kill(os.getpid(), 9)
    return real(*words)
{module}.{name} = die""")
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-0000002"]
    assert (out / "checkpoint.partial").exists()
    finish(folder, "coldstart", out)
    assert contents(out) == whole["coldstart"] and not (out / "checkpoint.partial").exists()


@pytest.mark.slow
@pytest.mark.parametrize("stage", FLAGS)
def test_killed_at_twenty_random_moments(folder, stage):
    """`kill -9` at random moments of a longer run; then its end equals that of one left alone."""
    finish(folder, stage, f"alone-{stage}", steps=150)
    out, rng, tally = folder / f"killed-{stage}", random.Random(0), []
    while len(tally) < 20:
        [process] = start(folder, stage, out, steps=150)
        time.sleep(rng.uniform(0.5, 4))
        if process.exitcode is not None:
            tally.append("finished before the kill")
            break
        process.kill()
        process.join()
        tally.append(max((path.name for path in out.glob("checkpoint-*")), default="none"))
    finish(folder, stage, out, steps=150)
    print(f"\n{stage}: newest checkpoint after each kill: {', '.join(tally)}")
    assert contents(out) == contents(folder / f"alone-{stage}")


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


@pytest.mark.parametrize("stage", FLAGS)
def test_two_processes_end_where_one_ends(folder, whole, stage):
    out = folder / f"two-{stage}"
    finish(folder, stage, out, count=2)
    same_but_for_sums(out, folder / f"whole-{stage}")


@pytest.mark.parametrize("first, then", [
    (2, 1), pytest.param(1, 2, marks=pytest.mark.slow)])
def test_the_number_of_processes_may_change(folder, whole, first, then):
    """A signal to the last process alone stops all of them after the same step, saved once."""
    out, last = folder / f"from-{first}-to-{then}", first - 1
    finish(folder, "distill", out, count=first, code=128 + signal.SIGTERM,
           patch=SIGNAL.format(rank=last, number=signal.SIGTERM))
    texts = [printed(folder, rank) for rank in range(first)]
    assert texts[0].count("stopped: 2 of 4 steps are saved") == 1
    assert "stopped" not in "".join(texts[1:])
    assert [path.name for path in out.glob("checkpoint*")] == ["checkpoint-0000002"]
    assert "2 of 4 steps are done" in finish(folder, "distill", out, count=then)
    same_but_for_sums(out, folder / "whole-distill")


def test_a_process_that_is_killed_ends_the_other(folder):
    begin = time.monotonic()
    started = start(folder, "coldstart", "orphan", count=2,
                    patch=SIGNAL.format(rank=1, number=signal.SIGKILL))
    for process in started:
        process.join(60)
    assert time.monotonic() - begin < 60 and [p.exitcode for p in started] == [2, -9]
    assert "error: another process of this run has ended" in printed(folder)
    assert "Traceback" not in printed(folder)


def test_processes_that_drift_apart_are_noticed(folder):
    text = finish(folder, "coldstart", "drift", code=2, count=2, patch="""
real = common.sum_gradients
def drift(weights, loss):
    loss = real(weights, loss)
    weights[0].grad.mul_(1 + int(os.environ["RANK"]))
    return loss
common.sum_gradients = drift""")
    assert "error: the processes' adapters differ after step 2. No checkpoint" in text
    text = finish(folder, "coldstart", "uneven", "--batch", 3, code=2, count=2)
    assert "--batch 3 cannot be shared equally by 2 processes" in text


@pytest.mark.slow
def test_torchrun_itself(folder, whole):
    words = ["--preset", "tiny", "--steps", STEPS, "--batch", 4, "--micro_batch", 2,
             "--lora_rank", 2, "--save_every", 2, "--out", "torchrun", *FLAGS["distill"]]
    done = subprocess.run(
        [str(Path(sys.executable).with_name("torchrun")), "--standalone", "--nproc_per_node", "2",
         ROOT / "distill.py", *map(str, words)], cwd=folder,
        capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("preset tiny (") == 1 and done.stdout.count("step 4 ") == 1
    same_but_for_sums(folder / "torchrun", folder / "whole-distill")


# ---------------------------------------------------------------- what is refused

def test_arguments_that_differ_are_refused(folder, whole):
    out = "whole-coldstart"
    text = finish(folder, "coldstart", out, "--lr", 3, "--seed", 2, code=2)
    assert "--lr was 0.002 and is 3.0" in text and "--seed was 0 and is 2" in text
    assert "--steps 3, but 4 are done" in finish(folder, "coldstart", out, steps=3, code=2)
    assert contents(folder / out) == whole["coldstart"]
    out = folder / "grows"
    finish(folder, "coldstart", out, steps=2)
    finish(folder, "coldstart", out, "--micro_batch", 4, steps=3)  # it changes no result
    assert [line["step"] for line in contents(out)[1]["metrics.jsonl"]] == [1, 2, 3]
    finish(folder, "coldstart", out, "--lr", 3, "--restart", steps=2)
    assert [line["step"] for line in contents(out)[1]["metrics.jsonl"]] == [1, 2]


def test_a_change_of_the_rows_is_noticed(folder):
    finish(folder, "coldstart", "rows", steps=2)
    file = folder / "data/train/metadata.jsonl"
    text = file.read_text()
    try:
        file.write_text("".join(text.splitlines(keepends=True)[:-1]))
        text_of_run = finish(folder, "coldstart", "rows", code=2)
        assert "data/train/metadata.jsonl has changed" in text_of_run
    finally:
        file.write_text(text)


def test_the_second_of_two_runs_is_refused(folder):
    [first] = start(folder, "coldstart", "shared", steps=500)
    wait_for(first, folder / "shared/metrics.jsonl")
    text = finish(folder, "coldstart", "shared", code=2)
    assert "another run is writing to shared" in text
    first.kill()
    first.join()
    finish(folder, "coldstart", "shared", "--restart", steps=2)  # the lock went with its process


def test_a_malicious_optimizer_file_is_not_executed(folder):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {folder}/executed",)
    finish(folder, "coldstart", "evil", steps=2)
    file = folder / "evil/checkpoint-0000002/optimizer.pt"
    torch.save({"state": Evil()}, file)
    assert "optimizer.pt" in finish(folder, "coldstart", "evil", steps=3, code=2)
    assert not (folder / "executed").exists()
    torch.load(file, weights_only=False)  # it would have been
    assert (folder / "executed").exists()


# ---------------------------------------------------------------- what goes wrong

def test_a_full_disk_ends_with_one_line_and_the_old_checkpoint(folder, whole):
    """On a file system of 3 MB, where two checkpoints fit."""
    out = folder / "disk"
    out.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3M", "tmpfs", out]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no right to mount a small tmpfs")
    try:
        text = finish(folder, "coldstart", out, code=2, patch=f"""
real = torch.save
def fill(*words):
    if Path({str(out)!r}, 'checkpoint-0000002').exists():
        try:
            Path({str(out)!r}, 'ballast').write_bytes(bytes(10**8))
        except OSError:
            pass
    real(*words)
torch.save = fill""")
        assert "error: cannot write" in text and "checkpoint-0000002 is what there is" in text
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
    text = finish(folder, "coldstart", "nan", patch="BAD = (2,)" + patch)
    assert "warning: step 2 skipped" in text
    lines = [json.loads(line) for line in open(folder / "nan/metrics.jsonl")]
    assert len(lines) == STEPS and lines[1]["grad_norm"] is None and lines[2]["grad_norm"] > 0
    evidence = [json.loads(line) for line in open(folder / "nan/not_finite.jsonl")]
    assert len(evidence) == 4 and {line["step"] for line in evidence} == {2}
    assert all(line["id"].startswith("train_") and line["questions"] for line in evidence)
    text = finish(folder, "distill", "nans", code=2, steps=9,
                  patch="BAD = (2, 4, 5, 6, 7, 8)" + patch)
    assert "5 steps in a row were not finite: try a lower --lr" in text and "step 8 skipped" in text
    evidence = [json.loads(line) for line in open(folder / "nans/not_finite.jsonl")]
    assert len(evidence) == 6 * 4 and all("response" in line for line in evidence)
    infinite = """
real, seen = common.sum_gradients, []
def poison(weights, loss):
    seen.append(1)
    return real(weights, loss) + (float('inf') if len(seen) == 2 else 0)
common.sum_gradients = poison"""
    for stage in FLAGS:
        text = finish(folder, stage, f"infinite-{stage}", steps=2, patch=infinite)
        assert "warning: step 2 skipped: loss inf" in text
    zero = "torch.nn.utils.clip_grad_norm_ = lambda weights, norm: torch.zeros(())"
    for stage in FLAGS:
        text = finish(folder, stage, f"zero-{stage}", code=2, patch=zero)
        assert "the first gradient is zero" in text


def test_warnings(folder):
    """Rollouts that all hit the limit; a first KL as large as only misalignment gives."""
    text = finish(folder, "distill", "warned", "--max_new_tokens", 2, steps=1, patch="""
real = distill.sliced_divergence
def far(*words):
    gradient, scores = real(*words)
    return gradient, scores + 20
distill.sliced_divergence = far""")
    assert "warning: step 1: every response hit the limit of 2 tokens" in text
    assert "warning: the KL of the first step is 2" in text and "not aligned" in text


@pytest.mark.parametrize("name, grad, calls, steps", [
    ("oom", True, 6, 3),      # in the fourth step, before the weights change
    ("later", False, 0, 2)])  # in the look at held-out pictures after the third, when they have
def test_out_of_memory_saves_where_the_log_agrees(folder, whole, name, grad, calls, steps):
    text = finish(folder, "coldstart", name, code=2, patch=f"""
real, seen = coldstart.answer_loss, []
def starve(*words):
    if torch.is_grad_enabled() == {grad}:
        seen.append(1)
        if len(seen) > {calls}:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\\nMore")
    return real(*words)
coldstart.answer_loss = starve""")
    assert f"{name}/checkpoint-000000{steps} is what there is" in text and "--micro_batch" in text
    finish(folder, "coldstart", name)
    assert contents(folder / name) == whole["coldstart"]


def test_out_of_memory_in_the_loss_is_one_line(folder, whole):
    text = finish(folder, "distill", "starved", code=2, patch="""
real, seen = distill.sliced_divergence, []
def starve(*words):
    seen.append(1)
    if len(seen) > 2:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\\nMore")
    return real(*words)
distill.sliced_divergence = starve""")
    assert "is what there is" in text and "--slice" in text and "Traceback" not in text
    finish(folder, "distill", "starved")
    assert contents(folder / "starved") == whole["distill"]


def test_out_of_memory_in_the_update_saves_nothing(folder, whole):
    """The weights are ahead of the log then: the run goes on from the checkpoint before."""
    text = finish(folder, "distill", "ahead", code=2, patch="""
real, seen = torch.optim.AdamW.step, []
def starve(*words, **options):
    real(*words, **options)
    seen.append(1)
    if len(seen) == 4:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
torch.optim.AdamW.step = starve""")
    assert "ahead/checkpoint-0000002 is what there is" in text
    finish(folder, "distill", "ahead")
    assert contents(folder / "ahead") == whole["distill"]
