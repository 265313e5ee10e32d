"""The files of a run's folder: taken by one writer, gone on from, flushed, never half-written."""
import hashlib
import json
import os
import pickle
import shutil
from pathlib import Path

import torch
from filelock import Timeout

from gen_data import fail

# What may differ when a run goes on: it changes no step that is done.
MAY_DIFFER = ("steps", "rollout_batch", "micro_batch", "slice", "save_every", "show_every",
              "eval_every", "restart", "wandb")


def take_folder(folder, lock, restart):
    """Become the only run that writes to the folder; restart: remove what a run left in it."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        fail(f"another run is writing to {folder}: wait for its end or choose another --out")
    for path in folder.iterdir() if restart else ():
        if path.is_dir() and path.name.startswith(("adapter", "checkpoint")):
            shutil.rmtree(path)
        elif path.name == "args.json" or path.suffix == ".jsonl":
            path.unlink()


def go_on(out, args, inputs, versions):
    """(steps done, steps skipped, checkpoint or None) of the run in `out`; its logs are cut back.

    Fails if its arguments or inputs were others than now.
    """
    hashes = {str(path): hashlib.sha256(Path(path).read_bytes()).hexdigest()
              for path in inputs if Path(path).is_file()}
    record = {"args": vars(args), "inputs": hashes, "versions": versions}
    checkpoint = max(out.glob("checkpoint-*"), default=None)
    state = {"step": 0, "skipped": [], "sizes": {}}
    if checkpoint:
        try:
            old = json.loads((out / "args.json").read_text())
            state = json.loads((checkpoint / "state.json").read_text())
        except (OSError, ValueError) as error:
            fail(f"cannot go on from {checkpoint}: {error}; begin anew with --restart")
        other = [f"--{name} was {old['args'].get(name)!r} and is {value!r}"
                 for name, value in vars(args).items()
                 if name not in MAY_DIFFER and old["args"].get(name) != value]
        other += [f"{path} has changed" for path, digest in hashes.items()
                  if old["inputs"].get(path, digest) != digest]
        if state["step"] > args.steps:
            other.append(f"--steps {args.steps}, but {state['step']} are done")
        if other:
            fail(f"{out} holds a run that cannot go on like this: {'; '.join(other)}. Give its "
                 "arguments again, --restart to begin anew, or another --out")
        print(f"{out}: {state['step']} of {args.steps} steps are done")
    for file in out.glob("*.jsonl"):  # lines of steps that will be done again
        os.truncate(file, state["sizes"].get(file.name, 0))
    write_aside(out / "args.json", json.dumps(record, indent=1))
    return state["step"], state["skipped"], checkpoint


def write_checkpoint(out, step, skipped, model, optimizer):
    """Write it aside, flush it, rename it; only then remove the one before -> its folder."""
    aside, folder = out / "checkpoint.partial", out / f"checkpoint-{step:07d}"
    shutil.rmtree(aside, ignore_errors=True)
    try:
        model.save_pretrained(aside / "adapter")
        torch.save(optimizer.state_dict(), aside / "optimizer.pt")
        sizes = {file.name: file.stat().st_size for file in out.glob("*.jsonl")}
        (aside / "state.json").write_text(json.dumps(
            {"step": step, "skipped": skipped, "sizes": sizes}))
        for path in (*out.glob("*.jsonl"), *aside.rglob("*"), aside):
            flush(path)
        shutil.rmtree(folder, ignore_errors=True)
        aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    flush(out)
    for other in set(out.glob("checkpoint-*")) - {folder}:
        shutil.rmtree(other)
    return folder


def replace_folder(folder, new):
    """`folder` becomes a copy of the folder `new`; a kill leaves the old one, none or the new."""
    aside = folder.with_suffix(".partial")
    shutil.rmtree(aside, ignore_errors=True)
    shutil.copytree(new, aside)
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)


def load_optimizer(path):
    """An optimizer's state dict; only tensors and plain values are read, no code in it is run."""
    try:
        return torch.load(path, weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        fail(f"cannot read {path}: {str(error).split('. ')[0]}; begin anew with --restart")


def read_trained_rows(folder):
    """Keys of the rows that the run in `folder` was trained on, its predecessors' included."""
    try:
        return set(json.loads((Path(folder) / "trained_rows.json").read_text()))
    except (OSError, ValueError) as error:
        fail(f"no run in {folder}: cannot read its trained_rows.json ({error}); "
             "python coldstart.py makes one")


def start_wandb(args):
    """A run of Weights & Biases; its package is needed only here."""
    try:
        import wandb
    except ImportError:
        fail("--wandb needs its package: pip install wandb")
    return wandb.init(project=args.wandb, name=args.out, config=vars(args))


def flush(path):
    """Make sure that a file or folder is on the disk; Windows cannot flush a folder."""
    if os.name != "nt" or path.is_file():
        handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
        os.fsync(handle)
        os.close(handle)


def write_aside(path, text):
    """Write a small file so that it is the old or the new one, whatever happens."""
    aside = path.with_suffix(".partial")
    aside.write_text(text)
    flush(aside)
    aside.replace(path)
