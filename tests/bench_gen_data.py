"""How fast the puzzles are made: `python tests/bench_gen_data.py`.

Prints, per task at level 5, puzzles per second of the whole script with one and with two worker processes (from a
long and a short run, so that starting the processes does not count), and where the time of one puzzle goes in one process: search (random states,
shortest plans, splits and difficulty) or drawing (picture, resize, PNG).
"""
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import gen_data

# Puzzles a second of the paper's generator at level 5, one core; measured by others on a machine of this kind.
PAPER = {"frozenlake": 38, "maze": 410, "minibehaviour": 242}


ROWS = {"frozenlake": 3000, "maze": 3000, "minibehaviour": 1200}  # of MiniBehaviour 5 there are 4,104 states in all


def whole_run(task, count, workers, folder):
    """Puzzles per second of `python gen_data.py`, beyond its first 100."""
    seconds = []
    for rows in (100, count):
        begin = time.perf_counter()
        subprocess.run([sys.executable, gen_data.__file__, "--tasks", f"{task}:5", "--train", str(rows), "--val", "0", "--test", "0",
                        "--workers", str(workers), "--overwrite", "--out", f"{folder}/{task}{workers}"], check=True, capture_output=True)
        seconds.append(time.perf_counter() - begin)
    return (count - 100) / (seconds[1] - seconds[0])


def split_of_time(task, count, folder):
    """Milliseconds per puzzle for search and for drawing, one process."""
    gen_data.thirds(task, 5)
    begin = time.perf_counter()
    rows = list(gen_data.sample_rows(task, 5, "train", count, seed=0))
    between = time.perf_counter()
    for row in rows:
        gen_data.draw(row, folder, 64, 256)
    return 1e3 * (between - begin) / count, 1e3 * (time.perf_counter() - between) / count


if __name__ == "__main__":
    print("| task | 1 worker, puzzles/s | 2 workers, puzzles/s | times the paper's generator | search, ms | drawing, ms |")
    print("|---|---|---|---|---|---|")
    for name, paper in PAPER.items():
        with tempfile.TemporaryDirectory() as folder:
            one, two = (whole_run(name, ROWS[name], workers, folder) for workers in (1, 2))
            search, drawing = split_of_time(name, 400, folder)
        print(f"| {name} | {one:.0f} | {two:.0f} | {two / paper:.1f} | {search:.2f} | {drawing:.2f} |", flush=True)
