"""Ask any OpenAI-compatible server for plans: {"id", "response"} lines that evaluate.py scores.

    pip install openai                                 # the key, if one is needed: $OPENAI_API_KEY
    python -m tools.ask --api_base http://localhost:8000/v1 --api_model NAME --out answers.jsonl
    python evaluate.py --responses answers.jsonl --lenient

Answers are written as they come: the same command goes on where it was stopped, and asks again for
the rows that failed; answers that were given under other settings are put aside (*.old). A row
that got no answer has an "error" and is a failure of the evaluation, never a row less.
"""
import argparse
import base64
import json
import mimetypes
import os
from multiprocessing.pool import ThreadPool
from pathlib import Path

from tqdm import tqdm

import gen_data
from gen_data import fail
from tools import responses, run_files

RETRIES = 5     # of 408, 409, 429, 5xx, a time-out or a broken connection; 0.5 to 8 s apart
TIMEOUT = 300   # seconds


def parse_args(argv=None):
    parser = argparse.ArgumentParser(prog="python -m tools.ask", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--api_base", required=True, metavar="URL", help="for example http://localhost:8000/v1")
    add("--api_model", required=True, metavar="NAME", help="the server's name for the model")
    add("--out", required=True, metavar="FILE", help="answers, one JSON object a line")
    add("--data", default="data", help="folder made by gen_data.py")
    add("--input", default="image", choices=responses.INPUTS, help="the picture, the symbols, or, "
        "as a control, the picture of another puzzle")
    add("--tasks", nargs="+", help="task, or task:level, or task:low-high (default: all)")
    add("--limit", type=int, help="rows per task and level (default: all)")
    add("--max_new_tokens", type=int, default=1024, help="length limit of an answer, tokens")
    add("--temperature", type=float, default=0.0, help="0: greedy")
    add("--seed", type=int, default=0, help="with a temperature: draws the answers")
    add("--concurrency", type=int, default=8, help="requests at a time")
    args = parser.parse_args(argv)
    for name in ("limit", "max_new_tokens", "concurrency"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            fail(f"--{name} {getattr(args, name)}: wanted at least 1")
    if not args.api_base.startswith("http"):
        fail(f"--api_base {args.api_base}: wanted a URL such as http://localhost:8000/v1")
    return args


def asker(args):
    """answer([(key, prompt, picture or None)]) -> [line], one row at a time.

    A row that failed for good has an "error". ConnectionError where no row would get an answer: a
    server that is not there, a refused key, an unknown model.
    """
    try:
        import openai
    except ImportError:
        fail("the client for the server is missing: pip install openai")
    secret = os.environ.get("OPENAI_API_KEY") or "no key"
    client = openai.OpenAI(base_url=args.api_base, api_key=secret, max_retries=RETRIES,
                           timeout=TIMEOUT)
    useless = (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError,
               openai.APIConnectionError)

    def answer(batch):
        (key, prompt, picture), = batch
        content = [{"type": "text", "text": prompt}]
        if picture:
            kind = mimetypes.guess_type(picture)[0] or "image/png"
            url = f"data:{kind};base64,{base64.b64encode(Path(picture).read_bytes()).decode()}"
            content.insert(0, {"type": "image_url", "image_url": {"url": url}})
        seed = int(responses.digest(args.seed, key), 16) % 2**31
        sampling = {"temperature": args.temperature, **({"seed": seed} if args.temperature else {})}
        try:
            reply = client.chat.completions.create(
                model=args.api_model, messages=[{"role": "user", "content": content}],
                max_tokens=args.max_new_tokens, **sampling)
            choice = reply.choices[0]
            return [{**key, "response": choice.message.content or "",
                     "tokens": reply.usage and reply.usage.completion_tokens,
                     "cut": choice.finish_reason == "length"}]
        except (openai.OpenAIError, TypeError, IndexError, AttributeError, ValueError) as problem:
            error = f"{type(problem).__name__}: {problem} {problem.__cause__ or ''}"
            error = error.replace(secret, "***")[:300].strip()
            if isinstance(problem, useless) and not isinstance(problem, openai.APITimeoutError):
                raise ConnectionError(error) from None
            return [{**key, "response": "", "error": error}]
    return answer


def main(args):
    test, out = gen_data.load_rows(args.data, "test"), Path(args.out)
    rows = gen_data.choose_rows(test, args.tasks, args.limit)
    asked, answer = responses.planning_prompts(rows, args.input, test), asker(args)
    settings = {name: getattr(args, name) for name in
                ("api_base", "api_model", "max_new_tokens", "temperature", "seed")}
    with ThreadPool(args.concurrency) as pool, tqdm(total=len(asked), unit="row") as bar:
        try:
            lines = responses.collect(out, settings, asked, 1, answer, pool.imap_unordered, bar)
        except ConnectionError as problem:
            fail(f"{args.api_base} does not answer for {args.api_model}: {problem}")
    run_files.write_aside(out, "".join(json.dumps(line) + "\n" for line in lines))
    failed = sum("error" in line for line in lines)
    print(f"{out}: {len(lines) - failed} of {len(lines)} rows answered" + (
        "; the same command asks again for the others" if failed else "")
        + f"; next: python evaluate.py --data {args.data} --responses {out}")


if __name__ == "__main__":
    main(parse_args())
