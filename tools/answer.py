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
from dataclasses import asdict
from pathlib import Path

from PIL import Image
from tqdm import tqdm

import common
import evaluate
import gen_data
from gen_data import Parser, fail, whole_number, write_text


def parse_args(argv=None):
    parser = Parser(prog="-m tools.answer", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--adapter", required=True, metavar="RUN", help="a run, any LoRA adapter in PEFT's format, "
        "or base for the model without one")
    asked = parser.add_mutually_exclusive_group(required=True)
    asked.add_argument("--picture", nargs="+", metavar="FILE", help="pictures, or folders of them")
    asked.add_argument("--symbols", metavar="FILE", help="a text in the picture's place")
    add("--task", choices=gen_data.TASKS, help="asks the task's own prompt, and reads the plan")
    add("--prompt", help="the question, as it stands (default: the task's)")
    add("--out", metavar="FILE", help="the answers too, one JSON object a line")
    add("--max_new_tokens", type=whole_number(1), help="length limit of an answer, tokens")
    add("--rollout_batch", type=whole_number(1), help="pictures answered at a time")
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
    run = None if args.adapter == "base" else args.adapter
    return common.resolve(args, evaluate.SETTINGS, run)


def find_pictures(args):
    """The files that are meant, those of a folder in the order of their names; all can be read."""
    kinds, files = Image.registered_extensions(), []
    for path in map(Path, args.picture):
        found = [path]
        if path.is_dir():
            found = sorted(file for file in path.iterdir() if file.suffix.lower() in kinds)
        files += found
    if not files:
        fail(f"--picture {' '.join(args.picture)}: no picture there")
    gen_data.decode_all(files)
    return files


def row_of(task, puzzle, plan):
    """A row of a puzzle that is in no data."""
    return gen_data.PuzzleRow({"id": task, "task": task, "level": len(puzzle.cells()),
                               "state": asdict(puzzle), "plan": plan})


def row_of_symbols(args):
    """The row that a text describes: of a task's map, or of one's own with --prompt."""
    if not Path(args.symbols).is_file():
        fail(f"--symbols {args.symbols}: no such file")
    text = Path(args.symbols).read_text(encoding="utf-8-sig").strip()
    if args.prompt:
        return gen_data.OwnRow({"id": "symbols", "symbols": text, "prompt": args.prompt})
    puzzle = gen_data.read_map(args.task, text)
    plan = puzzle and gen_data.solve(puzzle)
    if not plan:
        shown = gen_data.listing(gen_data.example(args.task)[0].cells()).replace("\n", " / ")
        fail(f"--symbols {args.symbols}: no {args.task} that has a solution; wanted lines such as "
             f"{shown}")
    return row_of(args.task, puzzle, plan)


def main(args):
    if args.symbols:
        row, files = row_of_symbols(args), [None]
        prompt = row.teacher_prompt("symbols")
    else:
        row, files = gen_data.OwnRow({"id": "picture", "prompt": args.prompt}), find_pictures(args)
        if args.task:  # the prompt beside a picture holds no fact of a puzzle: any has the same
            row = row_of(args.task, *gen_data.example(args.task))
        prompt = args.prompt or row.student_prompt()
    args.adapter, args.name = [args.adapter], None
    (adapter,) = evaluate.find_adapters(args).values()
    model, processor = common.load(args.model, args.bits, args.max_pixels)
    common.check_lengths(model, processor, {"--prompt": prompt}, args.max_new_tokens)
    if adapter:
        model = common.add_lora(model, path=adapter).eval()
    asked = [({"id": str(file or args.symbols)}, prompt, file) for file in files]
    settings, size = {"max_new_tokens": args.max_new_tokens, "temperature": 0}, args.rollout_batch
    lines = []
    for begin in tqdm(range(0, len(asked), size), desc="answers", disable=len(asked) <= size):
        lines += evaluate.answer_batch(model, processor, asked[begin:begin + size], settings, "")
    for line in lines:
        verdict = row.judge(line["response"], cut=line["cut"])
        line["answer"] = said = verdict["plan"]
        if row.level:
            said = ",".join(said or ["none that could be read"])
        if args.symbols and row.level:  # else the puzzle is not known
            line["outcome"] = verdict["outcome"]
            said += f"\nexecuted: {verdict['outcome']}"
        if len(lines) > 1:
            print(f"{line['id']}: {said}")
        else:
            print(f"{line['response']}\nplan: {said}" if row.level else line["response"])
    if args.out:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        write_text(args.out, "".join(json.dumps(line) + "\n" for line in lines))


if __name__ == "__main__":
    common.run_script(parse_args, main)
