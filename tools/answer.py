r"""Ask a trained student: one picture, one answer.

    python gen_data.py                                # pictures to ask about, in data/tiny
    python -m tools.answer --adapter docs/run/distill --task maze \
        --picture data/tiny/test/maze_4_00000.png
    python -m tools.answer --adapter out/charts/distill --picture chart.png --prompt "Where is A …?"
    python -m tools.answer --adapter base --preset 4b --picture photos --prompt "What …?" \
        --out out/answers.jsonl                       # a folder of them
    python -m tools.answer --adapter base --task maze --symbols maze.txt  # no picture

Model, bits and picture limit are those of the run. Answers are greedy. With --task the task's own
student prompt is asked, and the plan is read from the response; a map in symbols is known, so that
the plan is executed there too.
"""
import json
from dataclasses import asdict
from pathlib import Path

from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

import common
import evaluate
import gen_data
from gen_data import Parser, fail, in_one_line, whole_number, write_text


def parse_args(argv=None):
    parser = Parser(prog="-m tools.answer", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--adapter", required=True, metavar="RUN", help="a run, any LoRA adapter in PEFT's format, "
        "or base for the model without one")
    shown = parser.add_mutually_exclusive_group(required=True)
    shown.add_argument("--picture", nargs="+", metavar="FILE", help="pictures, or folders of them")
    shown.add_argument("--symbols", metavar="FILE", help="a text in the picture's place")
    asked = parser.add_mutually_exclusive_group(required=True)
    asked.add_argument("--task", choices=gen_data.TASKS, help="asks for a plan, and reads it")
    asked.add_argument("--prompt", help="your own question, as it stands")
    add("--out", metavar="FILE", help="the answers too, one JSON object a line")
    add("--max_new_tokens", type=whole_number(1), help="length limit of an answer, tokens")
    add("--rollout_batch", type=whole_number(1), help="pictures answered at a time")
    add("--preset", choices=common.BACKBONES, help="backbone (default: the run's, else tiny)")
    add("--model", help="checkpoint folder or hub name (default: the run's, else the preset's)")
    add("--bits", type=int, choices=(4, 16, 32), help="frozen weights (default: likewise)")
    add("--max_pixels", type=whole_number(1), help="a larger picture is shrunk (default: likewise)")
    args = parser.parse_args(argv)
    if args.out and Path(args.out).exists():
        fail(f"--out {args.out} exists: choose another")
    return common.resolve(args, evaluate.SETTINGS, None if args.adapter == "base" else args.adapter)


def is_picture(file):
    """Does Pillow know the format of a folder's file? Hidden ones (of macOS) are no pictures."""
    if file.name.startswith(".") or not file.is_file():
        return False
    with in_one_line(file):
        try:
            Image.open(file).close()
        except UnidentifiedImageError:
            return False
    return True


def find_pictures(paths):
    """The files that are meant, those of a folder in the order of their names; all can be read."""
    files = []
    for path in map(Path, paths):
        files += filter(is_picture, sorted(path.iterdir())) if path.is_dir() else [path]
    if not files:
        fail(f"--picture {' '.join(paths)}: no picture there")
    gen_data.decode_all(files)
    return files


def row_of(task, puzzle, plan):
    """A row of a puzzle that is in no data."""
    return gen_data.PuzzleRow({"id": task, "task": task, "level": len(puzzle.cells()),
                               "state": asdict(puzzle), "plan": plan})


def row_of_symbols(args):
    """The row that a text describes: a map of the task, or whatever --prompt asks about."""
    with in_one_line(f"--symbols {args.symbols}"):
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


def row_of_pictures(args):
    """The row whose prompt stands beside the pictures."""
    if args.prompt:
        return gen_data.OwnRow({"id": "picture", "prompt": args.prompt})
    return row_of(args.task, *gen_data.example(args.task))  # its prompt holds no fact of a puzzle


def read_answer(args, row, file, text, cut):
    """The line of a response: what it answers, and how that ends where the puzzle is known."""
    verdict = row.judge(text, cut=cut)
    line = {"id": str(file or args.symbols), "response": text, "cut": cut,
            "answer": verdict["plan"]}
    if args.symbols and args.task:
        line["outcome"] = verdict["outcome"]
    return line


def print_answer(args, line, alone):
    """A single response in full, of several a line each."""
    said = line["answer"]
    if args.task:
        said = ",".join(said or ["none that could be read"])
    cut = f"cut at --max_new_tokens {args.max_new_tokens}" if line["cut"] else ""
    if not alone:
        tqdm.write(f"{line['id']}: {said or 'no answer'}{cut and f' ({cut})'}")
        return
    print(line["response"])
    if args.task:
        print(f"plan: {said}")
    if "outcome" in line:
        print(f"executed: {line['outcome']}")
    if cut:
        print(cut)


def main(args):
    adapter = None
    if args.adapter != "base":
        adapter = common.adapter_folder(args.adapter, "--adapter")
        common.check_backbone(adapter, args)
    if args.symbols:
        row, files = row_of_symbols(args), [None]
        prompt = row.teacher_prompt("symbols")
    else:
        row, files = row_of_pictures(args), find_pictures(args.picture)
        prompt = row.student_prompt()
    if args.prompt and args.model == common.BACKBONES["tiny"]["model"]:
        common.warn("the bundled backbone knows only the words of its puzzles, and answers nothing "
                    "else: take --preset 2b, 4b or 8b")
    model, processor = common.load(args.model, args.bits, args.max_pixels)
    common.check_lengths(model, processor, {"the prompt": prompt}, args.max_new_tokens)
    if adapter:
        model = common.add_lora(model, path=adapter).eval()
    lines, size = [], args.rollout_batch
    for begin in tqdm(range(0, len(files), size), desc="answers", disable=len(files) <= size):
        some = files[begin:begin + size]
        images = [file and gen_data.open_picture(file) for file in some]
        batch = common.encode(processor, [prompt] * len(some), images, model.device)
        ids, mask, _ = common.sample(model, processor, batch, args.max_new_tokens)      # [B, T]
        texts = common.decode(processor, ids, mask)
        cut = common.was_cut(model, processor, ids, mask)
        for file, text, is_cut in zip(some, texts, cut, strict=True):
            lines.append(read_answer(args, row, file, text, is_cut))
            print_answer(args, lines[-1], len(files) == 1)
    if args.out:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        write_text(args.out, "".join(json.dumps(line) + "\n" for line in lines))


if __name__ == "__main__":
    common.run_script(parse_args, main)
