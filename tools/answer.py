"""Ask a trained student: one picture, one answer.

    python -m tools.answer --adapter out/tiny/distill --task maze --picture maze.png
    python -m tools.answer --adapter out/charts/distill --picture chart.png --prompt "Where is A …?"
    python -m tools.answer --adapter base --task maze --symbols maze.txt  # no picture
    python -m tools.answer --adapter out/tiny/distill --task maze --picture folder --out read.jsonl

Model, bits and picture limit are those of the run. Answers are greedy. Without --prompt the task's
own student prompt is asked, and the plan is read from the response; a map in symbols is known, so
that the plan is executed there too.
"""
import json
import os
from dataclasses import asdict
from pathlib import Path

from PIL import Image
from tqdm import tqdm

import common
import evaluate
import gen_data
from gen_data import Parser, digest, fail, whole_number, write_text


def parse_args(argv=None):
    parser = Parser(prog="-m tools.answer", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--adapter", required=True, metavar="RUN", help="a run, any LoRA adapter in PEFT's format, "
        "or base for the model without one")
    asked = parser.add_mutually_exclusive_group(required=True)
    asked.add_argument("--picture", nargs="+", metavar="FILE", help="pictures, or folders of them")
    asked.add_argument("--symbols", metavar="FILE", help="a file, or the text itself")
    add("--task", choices=gen_data.TASKS, help="asks the task's own prompt, and reads the plan")
    add("--prompt", help="the question, as it stands (default: the task's)")
    add("--out", metavar="FILE", help="the answers too, one JSON object a line")
    add("--max_new_tokens", type=whole_number(1), help="length limit of an answer, tokens")
    add("--preset", choices=common.BACKBONES, help="backbone (default: the run's, else tiny)")
    add("--model", help="checkpoint folder or hub name (default: the run's, else the preset's)")
    add("--bits", type=int, choices=(4, 16, 32), help="frozen weights (default: likewise)")
    add("--max_pixels", type=whole_number(1), help="a larger picture is shrunk (default: likewise)")
    args = parser.parse_args(argv)
    if not args.prompt and not args.task:
        fail("neither --prompt nor --task: give a question, or one of the tasks "
             f"{', '.join(gen_data.TASKS)}, which have their own")
    if args.out and Path(args.out).exists():
        fail(f"--out {args.out} exists: choose another")
    return args


def fill_in(args):
    """Model, bits and limits that were not given: the run's, else the preset's.

    Returns how many answers are drawn at a time.
    """
    run = None if args.adapter == "base" else common.read_run(args.adapter)
    old = run["args"] if run and args.preset in (None, run["args"]["preset"]) else {}
    args.preset = args.preset or old.get("preset", "tiny")
    if args.preset not in common.BACKBONES:
        fail(f"{args.adapter} was trained with --preset {args.preset}, which common.py does not "
             f"know: give one of {', '.join(common.BACKBONES)}")
    values = {**common.BACKBONES[args.preset], **evaluate.SETTINGS[args.preset]}
    if args.model and (stored := common.quantised_bits(args.model)):
        old = old | {"bits": stored}
    for name in ("model", "bits", "max_pixels"):
        if getattr(args, name) is None:
            setattr(args, name, old.get(name, values[name]))
    args.max_new_tokens = args.max_new_tokens or values["max_new_tokens"]
    return values["rollout_batch"]


def check_files(args):
    """Says so where the model's files are not those that the run was trained on."""
    run = None if args.adapter == "base" else common.read_run(args.adapter)
    files = common.digest_folder(args.model)
    if run and run.get("inputs", {}).get("model") not in (None, digest(files)):
        common.warn(f"{args.adapter} was trained on {run['args']['model']} with other files than "
                    f"{args.model} has: its answers are another model's")


def find_pictures(paths):
    """The files that are meant, those of a folder in the order of their names; all can be read."""
    kinds, files = Image.registered_extensions(), []
    for path in map(Path, paths):
        found = [path]
        if path.is_dir():
            found = sorted(file for file in path.iterdir() if file.suffix.lower() in kinds)
            if not found:
                fail(f"--picture {path}: no picture in this folder")
        elif not path.is_file():
            fail(f"--picture {path}: no such file")
        files += found
    gen_data.decode_all(files)
    return files


def puzzle_row(task, puzzle, plan=None):
    """A row of a puzzle that is in no data, for its prompts."""
    return gen_data.PuzzleRow({"id": task, "task": task, "level": len(puzzle.cells()),
                               "state": asdict(puzzle), "plan": plan or gen_data.solve(puzzle)})


def read_symbols(args):
    """(the row that --symbols describe, the text of the prompt to it)."""
    text = args.symbols
    if os.path.isfile(text):
        try:
            text = Path(text).read_text(encoding="utf-8-sig").strip()
        except UnicodeDecodeError as error:
            fail(f"--symbols {args.symbols}: wanted UTF-8 text ({error})")
    elif Path(text).suffix in (".txt", ".csv", ".json", ".md"):
        fail(f"--symbols {text}: no such file")
    if not text.strip():
        fail("--symbols: there is no text")
    if args.prompt:
        own = gen_data.OwnRow({"id": "symbols", "symbols": text, "prompt": args.prompt})
        return own, own.teacher_prompt("symbols")
    puzzle = gen_data.read_map(args.task, text)
    if puzzle is None:
        shown = gen_data.listing(gen_data.example(args.task)[0].cells()).replace("\n", " / ")
        fail(f"--symbols: cannot be read as a map of {args.task}; wanted lines such as {shown}")
    if gen_data.solve(puzzle) is None:
        fail(f"--symbols: this {args.task} has no solution")
    row = puzzle_row(args.task, puzzle)
    return row, row.teacher_prompt("symbols")


def student_prompt(task):
    """A task's prompt beside a picture, which holds no fact of a puzzle: any has the same."""
    return puzzle_row(task, *gen_data.example(task)).student_prompt()


def read_answer(args, line, row):
    """(the plan or the answer that a response gives, how it ends where the puzzle is known)."""
    if args.task:
        plan = gen_data.parse(args.task, line["response"], line["cut"])
        known = isinstance(row, gen_data.PuzzleRow)
        return plan, row.judge(line["response"], cut=line["cut"])["outcome"] if known else None
    own = gen_data.OwnRow({"id": line["id"], "prompt": args.prompt})
    return own.judge(line["response"], cut=line["cut"])["plan"], None


def print_answer(args, line, alone):
    """A single response in full, of several a line each."""
    said = line["answer"]
    if args.task:
        said = ",".join(said) if said else "none that could be read"
    if not alone:
        print(f"{line['id']}: {said}")
        return
    print(line["response"])
    if args.task:
        print(f"plan: {said}")
    if "outcome" in line:
        print(f"executed: {line['outcome']}")
    if line["cut"]:
        print(f"cut at --max_new_tokens {args.max_new_tokens}")


def main(args):
    size, row, adapter = fill_in(args), None, None
    if args.adapter != "base":
        adapter = common.adapter_folder(args.adapter, "--adapter")
    if args.symbols:
        row, prompt = read_symbols(args)
        asked = [({"id": "symbols"}, prompt, None)]
    else:
        prompt = args.prompt or student_prompt(args.task)
        asked = [({"id": str(file)}, prompt, file) for file in find_pictures(args.picture)]
    model, processor = common.load(args.model, args.bits, args.max_pixels)
    check_files(args)
    common.check_lengths(model, processor, {"--prompt": prompt}, args.max_new_tokens)
    if adapter:
        model = common.add_lora(model, path=adapter).eval()
    settings, lines = {"max_new_tokens": args.max_new_tokens, "temperature": 0}, []
    with tqdm(total=len(asked), desc="answers", unit="picture", disable=len(asked) == 1) as bar:
        for begin in range(0, len(asked), size):
            batch = asked[begin:begin + size]
            lines += evaluate.answer_batch(model, processor, batch, settings, "answer")
            bar.update(len(batch))
    for line in lines:
        line["answer"], outcome = read_answer(args, line, row)
        line |= {"outcome": outcome} if outcome else {}
        print_answer(args, line, len(asked) == 1)
    if args.out:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        write_text(args.out, "".join(json.dumps(line) + "\n" for line in lines))


if __name__ == "__main__":
    common.run_script(parse_args, main)
