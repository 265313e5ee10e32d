"""The study: what the method is worth on the bundled backbone. Arms x seeds x data sizes.

    python -m tools.study --dry_run                      # the commands and the expected time
    python -m tools.study                                # all of it; the same command goes on
    python -m tools.study --arms mgsd sft_response --seeds 0 --rows 40
    python -m tools.study --tables                       # the tables of what is there

An arm is one command beside the cold start that the arms of a seed and a data size share. Equal
rows, equal optimizer steps. A seed draws its own training rows; all answer the same test rows.
    1. the data, and the cold starts
    2. --lrs on the val split, first seed and fewest rows; "own" arms keep their best
    3. every run of every arm, and what is measured of it
    4. tables and plots (tools/study_results.py): results.md, results.json, *.png
The scripts run as processes of one thread, as many at a time as there are cores. What is finished
stands in done/ and is not run again.
"""
import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections import namedtuple
from itertools import product
from pathlib import Path

import psutil
from filelock import FileLock

from common import PRESETS
from gen_data import fail
from tools import study_results
from tools.run_files import take_folder, write_aside
from tools.study_results import name_of

ROOT = Path(__file__).parents[1]
SIZES = (40, 200, 2000)                                   # training rows per task and level
# command: of stage 2, "" for none; lr: its own choice of --lrs or that of another arm;
# sizes: all data sizes, or the smallest only
Arm = namedtuple("Arm", "command lr sizes")
ARMS = {
    "base": Arm("", None, "smallest"),
    "coldstart": Arm("", None, "all"),
    "mgsd": Arm("distill.py", "mgsd", "all"),
    "no_coldstart": Arm("distill.py --init none", "mgsd", "smallest"),
    "sft_response": Arm("coldstart.py --target response", "sft_response", "all"),
    "off_policy": Arm("distill.py --on_policy 0", "off_policy", "all"),
    "sft_answer": Arm("coldstart.py --target answer", "sft_answer", "smallest"),
    "no_plan": Arm("distill.py --teacher_context state", "mgsd", "smallest"),
    "live_teacher": Arm("distill.py --teacher_weights live", "mgsd", "smallest"),
    "forward_kl": Arm("distill.py --divergence forward_kl", "mgsd", "smallest"),
    "jsd": Arm("distill.py --divergence jsd", "mgsd", "smallest"),
    "sampled": Arm("distill.py --divergence sampled", "mgsd", "smallest"),
}
# What can be measured of a run: evaluate.py's flags, the data, the split.
EVALUATIONS = {
    "val": ("--input image", "test", "val"),
    "test": ("--input both", "test", "test"),
    "seen": ("--input image --perception --limit 10", "test", "test"),
    "swapped": ("--input swapped --limit 20", "test", "test"),
    "unseen": ("--input image", "unseen", "test"),        # levels never trained on
    "sampled": ("--input image --temperature 1 --samples 8 --limit 10", "test", "test"),
}
OF_A_RATE = ("val", "test", "seen")                       # which is chosen, and what it costs
OF_A_RUN = ("test",)
OF_THE_SMALLEST = ("test", "seen", "swapped", "unseen", "sampled")
UNSEEN = ("frozenlake:5", "minibehaviour:6")
# Seconds on one core of an AMD EPYC, for --dry_run: a step of a script, a whole other command.
SECONDS = {"coldstart.py": 1.4, "distill.py": 3.4, "gen_data.py": 3, "val": 15, "test": 20,
           "seen": 13, "swapped": 11, "unseen": 13, "sampled": 18, "tools.retention": 13}
Job = namedtuple("Job", "name command seconds")


def parse_args(argv=None):
    small = PRESETS["tiny-small"]
    parser = argparse.ArgumentParser(prog="python -m tools.study",
                                     description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--out", default="out/study", help="output folder")
    add("--arms", nargs="+", default=list(ARMS), choices=ARMS, help="default: all")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2])
    add("--rows", nargs="+", type=int, default=SIZES, help="training rows per task and level")
    add("--lrs", nargs="+", type=float, default=[5e-4, 1.5e-3, 4.5e-3], help="of stage 2")
    add("--steps", type=int, default=small["distill_steps"], help="of stage 2, in every arm")
    add("--coldstart_steps", type=int, default=small["coldstart_steps"])
    add("--batch", type=int, default=small["distill_batch"], help="rows per step")
    add("--test", type=int, default=60, help="test rows per task and level")
    add("--cores", type=int, default=os.cpu_count(), help="processes at a time")
    add("--dry_run", action="store_true", help="only print the commands and the expected time")
    add("--tables", action="store_true", help="only write the tables, of what is there")
    args = parser.parse_args(argv)
    args.rows = sorted(args.rows)
    return args


# ---------------------------------------------------------------- commands

def data_jobs(args):
    """One chain of jobs: the folders of test rows and those of training rows."""
    shared = "gen_data.py --preset tiny --workers 1"
    wanted = {"test": f"{shared} --seed 0 --train 0 --test {args.test}",
              "unseen": f"{shared} --seed 0 --train 0 --val 0 --test {args.test} "
                        f"--tasks {' '.join(UNSEEN)}"}
    for rows, seed in product(args.rows, args.seeds):
        wanted[f"{rows}-{seed}"] = f"{shared} --seed {seed} --train {rows} --test 0"
    return [Job(f"data-{name}", f"{command} --out {args.out}/data/{name}", SECONDS["gen_data.py"])
            for name, command in wanted.items()]


def train_job(args, arm, rows, seed, lr=None):
    """The training of a run; of "coldstart" without lr."""
    command = ARMS[arm].command or "coldstart.py"
    steps = args.steps if lr else args.coldstart_steps
    script = command.split()[0]
    words = [command, f"--preset tiny --data {args.out}/data/{rows}-{seed} --seed {seed} "
             f"--steps {steps} --batch {args.batch}"]
    if lr:
        words.append(f"--lr {lr}")
        if "--init" not in command:
            words.append(f"--init {args.out}/runs/{name_of('coldstart', rows, seed)}")
    name = name_of(arm, rows, seed, lr)
    words.append(f"--out {args.out}/runs/{name}")
    return Job(f"train-{name}", " ".join(words), steps * SECONDS[script])


def evaluate_job(args, run, kind):
    flags, data, split = EVALUATIONS[kind]
    model = "--adapter base" if run == "base" else f"--adapter {args.out}/runs/{run} --name model"
    command = (f"evaluate.py --preset tiny {flags} {model} --data {args.out}/data/{data} "
               f"--split {split} --out {args.out}/eval/{run}/{kind}")
    return Job(f"{kind}-{run}", command, SECONDS[kind])


def measure_jobs(args, run, smallest):
    """What is measured of a run; most of it only where an arm has its smallest data size."""
    jobs = [evaluate_job(args, run, kind) for kind in (OF_THE_SMALLEST if smallest else OF_A_RUN)]
    if smallest:
        model = "base" if run == "base" else f"{args.out}/runs/{run} --name model"
        jobs.append(Job(
            f"retention-{run}", f"-m tools.retention --preset tiny --adapter {model} --count 140 "
            f"--out {args.out}/eval/{run}/retention", SECONDS["tools.retention"]))
    return jobs


def choose_lrs(args):
    """{arm: (its lr, {lr: success on val})}; the middle one where nothing was measured."""
    chosen = {}
    for arm in {ARMS[arm].lr for arm in args.arms} - {None}:
        found = {}
        for lr in args.lrs:
            run = name_of(arm, args.rows[0], args.seeds[0], lr)
            value = study_results.success_on_val(args.out, run)
            if value is not None:
                found[lr] = value
        best = max(found, key=found.get) if found else args.lrs[len(args.lrs) // 2]
        chosen[arm] = best, found
    return chosen


def all_runs(args, lrs):
    """[(arm, rows, seed, lr)] of the arms asked for, the smallest data size first."""
    runs = []
    for rows, arm in product(args.rows, args.arms):
        if rows == args.rows[0] or ARMS[arm].sizes == "all":
            lr = lrs[ARMS[arm].lr][0] if ARMS[arm].lr else None
            seeds = args.seeds[:1] if arm == "base" else args.seeds
            runs += [(arm, rows, seed, lr) for seed in seeds]
    return runs


# ---------------------------------------------------------------- running

def is_done(args, job):
    """Was this very command finished? Fails if another one was, under the same name."""
    record = Path(args.out, "done", f"{job.name}.json")
    if not record.is_file():
        return False
    if json.loads(record.read_text())["command"] != job.command:
        fail(f"{record} is of another command than `python {job.command}`: give the study's "
             "arguments again, or another --out")
    return True


def stop_leftovers(file):
    """Stop the commands of a study that was killed: they go on alone, and hold their folders."""
    for pid, created in json.loads(file.read_text()) if file.is_file() else ():
        try:
            process = psutil.Process(pid)
            if process.create_time() == created:          # not another with the same number
                process.terminate()                       # a training saves a checkpoint first
                psutil.wait_procs([process], timeout=120)
        except psutil.NoSuchProcess:
            pass


def start(args, job):
    """The job as a process of one thread; what it prints goes to log/."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive",
                   "PYTHONPATH": str(ROOT)}
    words = shlex.split(job.command)
    if words[0] != "-m":
        words[0] = str(ROOT / words[0])
    with open(Path(args.out, "log", f"{job.name}.txt"), "a") as log:
        return subprocess.Popen([sys.executable, *words], stdout=log, stderr=log, env=environment)


def work_off(args, chains):
    """Run chains of jobs, the jobs of a chain in turn, `--cores` chains at a time -> the failed."""
    for folder in ("log", "done"):
        Path(args.out, folder).mkdir(parents=True, exist_ok=True)
    waiting, running, failed = [list(chain) for chain in chains], [], []
    try:
        while waiting or running:
            while waiting and len(running) < args.cores:
                chain = [job for job in waiting.pop(0) if not is_done(args, job)]
                if chain:
                    running.append((chain, start(args, chain[0]), time.time()))
                    pids = [process.pid for _, process, _ in running]
                    write_aside(Path(args.out, "running.json"), json.dumps(
                        [(pid, psutil.Process(pid).create_time()) for pid in pids]))
            time.sleep(0.2)
            for entry in [entry for entry in running if entry[1].poll() is not None]:
                running.remove(entry)
                (job, *rest), process, begin = entry
                seconds = time.time() - begin
                print(f"{job.name}: {'done' if process.returncode == 0 else 'FAILED'} after "
                      f"{seconds:.0f} s", flush=True)
                if process.returncode:
                    failed.append(job)                    # and what would have followed is not run
                    continue
                write_aside(Path(args.out, "done", f"{job.name}.json"), json.dumps(
                    {"command": job.command, "seconds": seconds}))
                waiting.insert(0, rest)
    finally:                                              # a signal, or another study's settings
        for _, process, _ in running:
            process.terminate()                           # a training saves a checkpoint first
        for _, process, _ in running:
            process.wait()
    for job in failed:
        print(f"`python {job.command}` failed: see {args.out}/log/{job.name}.txt", file=sys.stderr)
    return failed


def main(args):
    if args.tables:
        lrs = choose_lrs(args)
        study_results.write(args, all_runs(args, lrs), lrs)
        return
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    lock = FileLock(Path(args.out, "lock"))
    if not args.dry_run:
        take_folder(Path(args.out), lock, restart=False)
        stop_leftovers(Path(args.out, "running.json"))
    todo, failed = {}, []

    def phase(chains):
        todo.update((job.name, job) for chain in chains for job in chain if not is_done(args, job))
        if not args.dry_run:
            failed.extend(work_off(args, chains))

    phase([data_jobs(args)])
    runs = all_runs(args, choose_lrs(args))
    # Of every seed and size that an arm other than the base needs.
    phase([[train_job(args, "coldstart", rows, seed)] for rows, seed in sorted(
        {run[1:3] for run in runs if run[0] != "base"})])
    if len(args.lrs) > 1:
        trials = product(sorted({ARMS[arm].lr for arm in args.arms} - {None}), args.lrs)
        chains = []
        for arm, lr in trials:
            run = name_of(arm, args.rows[0], args.seeds[0], lr)
            chains.append([train_job(args, arm, args.rows[0], args.seeds[0], lr)])
            chains[-1] += [evaluate_job(args, run, kind) for kind in OF_A_RATE]
        phase(chains)
    lrs = choose_lrs(args)
    runs, chains = all_runs(args, lrs), []
    for run in runs:
        training = [train_job(args, *run)] if run[3] else []
        chains.append(training + measure_jobs(args, name_of(*run), run[1] == args.rows[0]))
    phase(chains)
    if args.dry_run:
        for job in todo.values():
            print(f"{job.seconds:5.0f} s  python {job.command}")
        hours = sum(job.seconds for job in todo.values()) / 3600
        print(f"{len(todo)} commands, {hours:.1f} hours of one core, {hours / args.cores:.1f} with "
              f"--cores {args.cores}")
        return
    study_results.write(args, runs, lrs)
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main(parse_args())
