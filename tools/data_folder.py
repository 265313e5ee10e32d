"""How a data folder is written: pictures by several processes; whole, or not there."""
import json
import multiprocessing
import shutil
from contextlib import nullcontext
from functools import partial
from itertools import islice
from pathlib import Path

from PIL import Image
from tqdm import tqdm

import gen_data


def draw(row, folder, cell_size, image_size):
    """Write one row's PNG. image_size: px of the square it is resized to, 0 keeps it as it is.

    A row's own "picture", a file, is taken before one that is drawn (at `cell_size` px a cell).
    """
    target = Path(folder) / row["file_name"]
    if row.get("picture") and not image_size:
        shutil.copyfile(row["picture"], target)
        return
    if row.get("picture"):
        image = gen_data.open_picture(row["picture"])
    else:
        image = gen_data.TASKS[row["task"]].render(row["state"], cell_size)
    if image_size:
        image = image.resize((image_size, image_size), Image.LANCZOS)
    image.save(target, compress_level=1)


def write_dataset(out, splits, settings, cell_size, image_size, workers=1, total=None):
    """Write a data folder: pictures and metadata.jsonl per split, `settings` as args.json.

    splits: {split: iterator of rows}. One worker draws in this process, more in others; the bytes
    do not depend on it. total: the number of rows, for the progress bar.
    Everything is written aside and renamed at the end: the folder is complete or not there.
    """
    aside = Path(f"{out}.partial")
    text = {"encoding": "utf-8", "newline": "\n"}  # the same bytes on every system
    shutil.rmtree(aside, ignore_errors=True)
    pool = multiprocessing.get_context("spawn").Pool(workers) if workers > 1 else nullcontext()
    try:
        with pool, tqdm(total=total, desc="puzzles", unit="row") as bar:
            draw_all = partial(pool.imap_unordered, chunksize=16) if workers > 1 else map
            for split, rows in splits.items():
                (aside / split).mkdir(parents=True)
                job = partial(draw, folder=aside / split, cell_size=cell_size,
                              image_size=image_size)
                drawing = ()
                with open(aside / split / "metadata.jsonl", "w", **text) as file:
                    while block := list(islice(rows, 256)):
                        for row in block:
                            facts = {key: row[key] for key in row if key != "picture"}
                            file.write(json.dumps(facts) + "\n")
                        # Processes begin at once; the next block is found while they draw.
                        drawn, drawing = drawing, draw_all(job, block)
                        bar.update(sum(1 for _ in drawn))
                bar.update(sum(1 for _ in drawing))
        (aside / "args.json").write_text(json.dumps(settings, indent=1), **text)
        if Path(out).exists():
            shutil.rmtree(out)
        aside.rename(out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    print(f"{bar.n} puzzles in {out}")
