"""One line on stderr and exit code 2: how every script refuses bad input."""
import sys

from tqdm import tqdm


def fail(message):
    """Bad input: one line on stderr, exit code 2."""
    tqdm.write(f"error: {message}", file=sys.stderr)  # on a line of its own, below a progress bar
    raise SystemExit(2)
