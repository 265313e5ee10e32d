"""The real scripts as processes, forked from one that has imported torch: each takes little.

`run(folder, script, *words)` is what a shell would do; patches (Python, executed before the main)
and edited copies of the scripts can be run the same way.
"""
import json
import multiprocessing
import os
import shutil
import signal
import socket
import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload([
    "coldstart", "distill", "evaluate", "peft",
    "transformers.models.qwen3_vl.modeling_qwen3_vl",
    "transformers.models.qwen3_vl.processing_qwen3_vl",
    "transformers.models.auto.processing_auto"])
ROOT = Path(__file__).parents[1]
SCRIPTS = ("gen_data", "common", "coldstart", "distill", "evaluate")


def child(folder, script, words, rank, environment, patch, root):
    """In the forked process: the script's main, with `patch` executed before it."""
    os.chdir(folder)
    for number, name in ((1, "out"), (2, "err")):
        handle = os.open(f".{name}-{rank}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(handle, number)
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs begin without it
    import torch
    torch.set_num_threads(1)
    if root:  # an edited copy of the scripts
        for name in SCRIPTS:
            sys.modules.pop(name, None)
        sys.path.insert(0, str(root))
    module, common = import_module(script), import_module("common")
    names = {"os": os, "torch": torch, "common": common, "module": module}
    exec(patch, names)
    common.run_script(lambda: module.parse_args(words), module.main)


def start(folder, script, words, patch="", count=1, environment=None, root=None):
    """The processes of a run; several find each other as torchrun's do."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = []
    for rank in range(count):
        several = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count),
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)} if count > 1 else {}
        process = processes.Process(target=child, args=(
            str(folder), script, list(map(str, words)), rank, {**several, **(environment or {})},
            patch, root and str(root)))
        process.start()
        started.append(process)
    return started


@dataclass
class Done:
    """What a script left: its exit code and what it wrote."""
    code: int
    out: str
    err: str

    def error(self):
        """The one line on stderr that begins with error:."""
        lines = [line for line in self.err.splitlines() if line.startswith("error:")]
        assert len(lines) == 1 and "Traceback" not in self.err, self.err
        return lines[0]


def collect(folder, started):
    """[Done] of started processes, after their end."""
    done = []
    for rank, process in enumerate(started):
        process.join()
        texts = [(folder / f".{name}-{rank}").read_text(errors="replace")
                 for name in ("out", "err")]
        done.append(Done(process.exitcode, *texts))
    return done


def edit(file, old, new):
    """Put `new` in the place of `old`, which stands in the file once."""
    text = file.read_text(encoding="utf-8")
    assert text.count(old) == 1, f"{file.name}: {text.count(old)} times: {old}"
    file.write_text(text.replace(old, new), encoding="utf-8")


def fork(folder, *edits):
    """A copy of the scripts with edits (script, old, new): a `root` of `start`."""
    folder.mkdir()
    for script in SCRIPTS:
        shutil.copy(ROOT / f"{script}.py", folder)
    for name in ("tools", "tiny"):
        (folder / name).symlink_to(ROOT / name)
    for script, old, new in edits:
        edit(folder / script, old, new)
    return folder


def run(folder, script, *words, **options):
    """A script from its start to its end."""
    return collect(folder, start(folder, script, words, **options))[0]


def contents(out):
    """What a run leaves, without times and memory: the adapter's bytes, the lines of the logs."""
    lines = {}
    for file in sorted(out.glob("*.jsonl")):
        lines[file.name] = [json.loads(line) for line in open(file)]
    for line in lines["metrics.jsonl"]:
        for name in ("seconds", "step_seconds", "peak_gb"):
            line.pop(name, None)  # a step that was left out has none
    if (out / "adapter-best").is_dir():
        lines["adapter-best"] = (out / "adapter-best/adapter_model.safetensors").read_bytes()
    return (out / "adapter/adapter_model.safetensors").read_bytes(), lines
