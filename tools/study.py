"""The study: what the method is worth, and its parts. Prints commands, makes tables.

    python -m tools.study coldstart | xargs -d '\\n' -P 2 -I{} sh -c {}
    python -m tools.study variants | xargs -d '\\n' -P 2 -I{} sh -c {}
    python -m tools.study tables                    # of what is there
    python -m tools.study variants --preset 4b      # for a cluster; never run (docs/study.md)

A variant is one command beside the cold start that the variants of a seed and a data size share.
Equal rows, equal optimizer steps. A seed draws its own training rows; all answer the same test
rows. One command a line: data and cold start of a seed and size; then, for every run, training and
all measurements joined by &&. The scripts resume by themselves, refuse a second writer and do
nothing where nothing is left, so the same lines can be run again, by xargs, GNU parallel or an
array of batch jobs. With one thread each: OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive.
"""
from itertools import product
from pathlib import Path

import coldstart
import distill
from gen_data import PRESETS, Parser, real_number, run_script, whole_number
from tools import study_results
from tools.study_results import name_of

VARIANTS = {  # name: command of stage 2, "" for none
    "base": "",
    "coldstart": "",
    "mgsd": "distill.py",
    "no_coldstart": "distill.py --init none",
    "sft_response": "coldstart.py --target response",
    "sft_foreign": "-m tools.foreign",
    "off_policy": "distill.py --on_policy 0",
    "sft_answer": "coldstart.py --target answer",
    "no_plan": "distill.py --teacher_reads symbols",
    "live_teacher": "distill.py --teacher_weights live",
    "ema_teacher": "distill.py --teacher_weights ema",
    "forward_kl": "distill.py --divergence forward_kl",
    "jsd": "distill.py --divergence jsd",
    "sampled": "distill.py --divergence sampled",
    "topk_kl": "distill.py --divergence topk_kl",
    "clipped_kl": "distill.py --divergence clipped_kl",
    "mgsd_best": "",                        # of mgsd, the adapter with the best validation
}
# Those of the paper's table, for the real backbones.
PAPER = ("base", "coldstart", "mgsd", "no_coldstart", "sft_response", "sft_answer", "no_plan")
ALL_SIZES = ("coldstart", "mgsd", "sft_response", "sft_foreign", "off_policy", "no_plan")
ALL_RATES = ("mgsd", "sft_response", "sft_foreign", "off_policy")
# What is measured of a run: evaluate.py's flags and the data folder. "test" of every run, "seen"
# (and, of the bundled backbone, tools.retention) of every rate on the fewest rows, the others there
# of the rate --lr.
MEASURED = {
    "test": ("--input both", "test"),
    "seen": ("--input image --perception --limit 10", "test"),
    "swapped": ("--input swapped", "test"),
    "unseen": ("--input image", "unseen"),                     # board sizes never trained on
    "sampled": ("--input image --temperature 1 --samples 8 --limit 10", "test"),
}

# Defaults of the flags. Those of the real backbones are the stages' own, so that the run `mgsd` is
# theirs; but the largest board of each task is kept for the test.
TINY = {
    "variants": list(VARIANTS),
    "tasks": None,                                        # those of the preset
    "unseen": ["frozenlake:5", "minibehaviour:6"],
    "rows": [40, 200, 2000],
    "test": 60,
    "coldstart_steps": 200,
    "coldstart_batch": 48,
    "steps": 60,
    "batch": 48,
    "lr": 5e-4,
    "lrs": [5e-4, 1.5e-3, 4.5e-3],
}


def settings_of(preset):
    """{flag: default} of the study of a preset."""
    if preset == "tiny":
        return TINY
    first, second = coldstart.SETTINGS[preset], distill.SETTINGS[preset]
    return {
        "variants": list(PAPER),
        "tasks": ["frozenlake:3-7", "maze:3-5", "minibehaviour:5"],
        "unseen": ["frozenlake:8", "maze:6", "minibehaviour:6"],
        "rows": [PRESETS[preset]["train"]],
        "test": PRESETS[preset]["test"],
        "coldstart_steps": first["steps"],
        "coldstart_batch": first["batch"],
        "steps": second["steps"],
        "batch": second["batch"],
        "lr": second["lr"],
        "lrs": [],
    }


def parse_args(argv=None):
    parser = Parser(prog="-m tools.study", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("what", choices=("coldstart", "variants", "tables"), help="the list of commands, or tables")
    add("--preset", default="tiny", choices=distill.SETTINGS, help="backbone; sets the defaults "
        "of the flags without one")
    add("--out", help="folder of everything (default: out/study, with its preset where not tiny)")
    add("--variants", nargs="+", choices=VARIANTS, help="some of them")
    add("--seeds", nargs="+", type=whole_number(0), default=[0, 1, 2])
    add("--tasks", nargs="+", help="what is trained on and tested: task:size or task:low-high")
    add("--unseen", nargs="+", help="board sizes that are only tested")
    add("--rows", nargs="+", type=whole_number(1), help="training rows per task and board size")
    add("--lrs", nargs="+", type=real_number(above=True),
        help=f"of stage 2, of {', '.join(ALL_RATES)} on the fewest rows")
    add("--lr", type=real_number(above=True), help="of stage 2, on all others")
    add("--steps", type=whole_number(1), help="of stage 2, in every variant")
    add("--batch", type=whole_number(1), help="rows per step of stage 2")
    add("--coldstart_steps", type=whole_number(1), help="of the cold start")
    add("--coldstart_batch", type=whole_number(1), help="rows per step of the cold start")
    add("--test", type=whole_number(1), help="test rows per task and board size")
    args = parser.parse_args(argv)
    for name, value in settings_of(args.preset).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.out = args.out or ("out/study" if args.preset == "tiny" else f"out/study-{args.preset}")
    args.rows = sorted(args.rows)
    return args


# ---------------------------------------------------------------- commands

def preset_of(args):
    """The flag that a command needs where it is not about the default."""
    return "" if args.preset == "tiny" else f"--preset {args.preset} "


def make_data(args, name, flags, tasks=None):
    """Makes a data folder where it is not there."""
    folder, words = f"{args.out}/data/{name}", f"{preset_of(args)}{flags}"
    if tasks:
        words += f" --tasks {' '.join(tasks)}"
    return f"(test -d {folder} || python gen_data.py {words} --out {folder})"


def train(args, variant, rows, seed, lr=None):
    """The training of a run; without lr of a cold start."""
    command = VARIANTS[variant] or "coldstart.py"
    steps, batch = args.coldstart_steps, args.coldstart_batch
    if lr:
        steps, batch = args.steps, args.batch
    words = ["python", command, f"{preset_of(args)}--data {args.out}/data/{rows}-{seed} "
             f"--seed {seed} --steps {steps} --batch {batch}"]
    if lr:
        words.append(f"--lr {lr:g}")
    if lr and "--init" not in command:
        words.append(f"--init {args.out}/runs/{name_of('coldstart', rows, seed)}")
    return " ".join([*words, f"--out {args.out}/runs/{name_of(variant, rows, seed, lr)}"])


def measure(args, run, adapter, kinds):
    """The measurements of a run's adapter, of some kinds of MEASURED."""
    commands = []
    for kind in kinds:
        flags, data = MEASURED[kind]
        commands.append(f"python evaluate.py {preset_of(args)}{flags} --adapter {adapter} "
                        f"--name model --data {args.out}/data/{data} --split test "
                        f"--out {args.out}/eval/{run}/{kind}")
    if "seen" in kinds and args.preset == "tiny":  # what the others were pretrained on is unknown
        commands.append(f"python -m tools.retention --adapter {adapter} --name model --count 140 "
                        f"--out {args.out}/eval/{run}/retention")
    return commands


def all_runs(args):
    """[(variant, rows, seed, lr)], the smallest data size first; lr None without a stage 2."""
    runs = []
    for rows, variant in product(args.rows, args.variants):
        if rows > args.rows[0] and variant not in ALL_SIZES:
            continue
        rates = [args.lr] if VARIANTS[variant] else [None]
        if variant in ALL_RATES and rows == args.rows[0]:
            rates = sorted({args.lr, *args.lrs})
        seeds = args.seeds[:1] if variant == "base" else args.seeds
        runs += [(variant, rows, seed, lr) for seed, lr in product(seeds, rates)]
    return runs


def coldstart_commands(args):
    """Data and cold start, a line for every seed and size; before them the data of the tests."""
    lines = [" && ".join([
        make_data(args, "test", f"--train 0 --test {args.test}", args.tasks),
        make_data(args, "unseen", f"--train 0 --val 0 --test {args.test}", args.unseen)])]
    for rows, seed in product(args.rows, args.seeds):
        data = make_data(args, f"{rows}-{seed}", f"--seed {seed} --train {rows} --test 0",
                         args.tasks)
        lines.append(f"{data} && {train(args, 'coldstart', rows, seed)}")
    return lines


def variant_commands(args):
    """Training and measurements, a line for every run."""
    lines, kinds = [], list(MEASURED)
    for variant, rows, seed, lr in all_runs(args):
        if variant == "mgsd_best":  # in the line of mgsd
            continue
        name, some = name_of(variant, rows, seed, lr), kinds[:1]
        adapter = variant if variant == "base" else f"{args.out}/runs/{name}"
        if rows == args.rows[0]:
            some = kinds if lr in (None, args.lr) else kinds[:2]
        commands = [train(args, variant, rows, seed, lr)] if lr else []
        commands += measure(args, name, adapter, some)
        if variant == "mgsd" and some == kinds and "mgsd_best" in args.variants:
            commands += measure(args, name_of("mgsd_best", rows, seed), f"{adapter}/adapter-best",
                                kinds[:2])
        lines.append(" && ".join(commands))
    return lines


def main(args):
    if args.what == "tables":
        Path(args.out).mkdir(parents=True, exist_ok=True)
        study_results.write(args, all_runs(args))
    else:
        print("\n".join({"coldstart": coldstart_commands,
                         "variants": variant_commands}[args.what](args)))


if __name__ == "__main__":
    run_script(parse_args, main)
