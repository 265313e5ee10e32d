"""Ask any OpenAI-compatible server for plans: {"id", "response"} lines that evaluate.py scores.

    pip install openai                                 # the key, if one is needed: $OPENAI_API_KEY
    python -m tools.ask --api_base http://localhost:8000/v1 --api_model NAME --out answers.jsonl
    python -m tools.lenient answers.jsonl --out read.jsonl
    python evaluate.py --responses read.jsonl

Answers are written as they come: the same command resumes where it was stopped, and asks again for
the rows that failed. How was asked stands in FILE.settings.json; other settings want another FILE.
A row that got no answer has an "error" and is a failure of the evaluation, never a row less.
"""
import base64
import json
import mimetypes
import os
from multiprocessing.pool import ThreadPool
from pathlib import Path
from urllib.parse import urlsplit

from tqdm import tqdm

import common
import evaluate
import gen_data
from gen_data import Parser, digest, fail, lock_file, real_number, whole_number, write_text

RETRIES = 5     # of 408, 409, 429, 5xx, a time-out or a broken connection; 0.5 to 8 s apart
TIMEOUT = 300   # seconds


def parse_args(argv=None):
    parser = Parser(prog="-m tools.ask", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--api_base", required=True, metavar="URL", help="for example http://localhost:8000/v1")
    add("--api_model", required=True, metavar="NAME", help="the server's name for the model")
    add("--out", required=True, metavar="FILE", help="answers, one JSON object a line")
    add("--data", default=gen_data.PRESETS["tiny"]["out"], help="data folder")
    add("--input", default="image", choices=evaluate.INPUTS, help="the picture, the symbols, or, "
        "as a control, the picture of another puzzle")
    add("--tasks", nargs="+", help="task, or task:size, or task:low-high (default: all)")
    add("--limit", type=whole_number(1), help="rows per task and board size (default: all)")
    add("--max_new_tokens", type=whole_number(1), default=1024,
        help="length limit of an answer, tokens")
    add("--temperature", type=real_number(), default=0.0, help="0: greedy")
    add("--seed", type=whole_number(0), default=0, help="with a temperature: draws the answers")
    add("--concurrency", type=whole_number(1), default=8, help="requests at a time")
    args = parser.parse_args(argv)
    try:
        url = urlsplit(args.api_base)
        is_url = url.scheme in ("http", "https") and url.hostname and url.port != 0
    except ValueError:  # of a port or an address
        is_url = False
    if not is_url:
        fail(f"--api_base {args.api_base}: wanted a URL such as http://localhost:8000/v1")
    return args


def hide(text, secret):
    """The text without the key, in whatever way it is written."""
    for form in {secret, repr(secret)[1:-1], json.dumps(secret)[1:-1]}:
        text = text.replace(form, "***")
    return text


class Asker:
    """A client of the server: `asker(question)` -> the answer line.

    A row that failed for good has an "error". ConnectionError where no row would get an answer: a
    server that is not there, a refused key, an unknown model.
    """

    def __init__(self, args):
        try:
            import openai
        except ImportError:
            fail("the client for the server is missing: pip install openai")
        self.args, self.openai = args, openai
        self.secret = os.environ.get("OPENAI_API_KEY", "").strip() or "no key"  # a .env's line end
        if not self.secret.isascii() or not self.secret.isprintable():
            fail("$OPENAI_API_KEY holds a character that no key has (a line end within it?)")
        self.client = openai.OpenAI(base_url=args.api_base, api_key=self.secret,
                                    max_retries=RETRIES, timeout=TIMEOUT)

    def __call__(self, question):
        key, prompt, picture = question
        content = [{"type": "text", "text": prompt}]
        if picture:
            kind = mimetypes.guess_type(picture)[0] or "image/png"
            url = f"data:{kind};base64,{base64.b64encode(Path(picture).read_bytes()).decode()}"
            content.insert(0, {"type": "image_url", "image_url": {"url": url}})
        sampling = {"temperature": self.args.temperature}
        if self.args.temperature:
            sampling["seed"] = int(digest(self.args.seed, key), 16) % 2**31
        line = {**key, "model": self.args.api_model}
        try:
            reply = self.client.chat.completions.create(
                model=self.args.api_model, messages=[{"role": "user", "content": content}],
                max_tokens=self.args.max_new_tokens, **sampling)
            choice = reply.choices[0]
            return {**line, "response": choice.message.content or "",
                    "tokens": reply.usage and reply.usage.completion_tokens,
                    "cut": choice.finish_reason == "length"}
        except (self.openai.OpenAIError, TypeError, IndexError, AttributeError,
                ValueError) as problem:
            error = f"{type(problem).__name__}: {problem} {problem.__cause__ or ''}"
            error = "a header was refused" if "header" in error.lower() else error
            error = hide(error, self.secret)[:300].strip()
            useless = (self.openai.AuthenticationError, self.openai.PermissionDeniedError,
                       self.openai.NotFoundError, self.openai.APIConnectionError)
            slow = isinstance(problem, self.openai.APITimeoutError)
            if isinstance(problem, useless) and not slow:
                raise ConnectionError(error) from None
            return {**line, "response": "", "error": error}


def open_answers(out, settings):
    """{label: line} of the answers that FILE holds; fails if they were asked for otherwise."""
    record = Path(f"{out}.settings.json")
    if out.is_file() and out.stat().st_size:
        if not record.is_file():
            fail(f"{out} is there, and no {record} says how it was made: choose another --out")
        try:
            old = dict(json.loads(record.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            fail(f"cannot read {record} ({error}): choose another --out")
        other = []
        for name, value in settings.items():
            if name == "questions" and old.get(name) != value:
                other.append("other rows, prompts or pictures")
            elif old.get(name) != value:
                other.append(f"{name} was {old.get(name)!r} and is {value!r}")
        if other:
            fail(f"{out} was asked for with other settings ({'; '.join(other)}): choose another "
                 "--out")
    write_text(record, json.dumps(settings, indent=1) + "\n")
    return evaluate.read_answers(out)


def main(args):
    test, out = gen_data.load_rows(args.data, "test"), Path(args.out)
    rows = gen_data.choose_rows(test, args.tasks, args.limit)
    asked, asker = evaluate.planning_questions(rows, args.input, test), Asker(args)
    settings = {name: getattr(args, name) for name in
                ("api_base", "api_model", "max_new_tokens", "temperature", "seed")}
    settings["questions"] = evaluate.digest_questions(asked)
    out.parent.mkdir(parents=True, exist_ok=True)
    lock = lock_file(f"{out}.lock", out)
    try:
        lines = ask_all(args, asked, asker, open_answers(out, settings))
    finally:
        lock.release()
    failed = sum(bool(line.get("error")) for line in lines)
    print(f"{out}: {len(lines) - failed} of {len(lines)} rows answered" + (
        "; the same command asks again for the others" if failed else "") + "; next: "
        + common.command("evaluate.py", responses=(out, None),
                         data=(args.data, gen_data.PRESETS["tiny"]["out"])))


def ask_all(args, asked, asker, lines):
    """The answers to all of `asked` in their order, in args.out too; lines: what is there."""
    todo = [question for question in asked if evaluate.label(question[0]) not in lines]
    with ThreadPool(args.concurrency) as pool, tqdm(total=len(todo), unit="row") as bar, \
            evaluate.append_answers(Path(args.out)) as file:
        try:
            for line in pool.imap_unordered(asker, todo):
                lines[evaluate.label(line)] = line
                file.write(json.dumps(line) + "\n")
                file.flush()
                bar.update()
        except ConnectionError as problem:
            fail(f"{args.api_base} does not answer for {args.api_model}: {problem}")
    lines = [lines[evaluate.label(key)] for key, _, _ in asked]
    write_text(args.out, "".join(json.dumps(line) + "\n" for line in lines))
    return lines


if __name__ == "__main__":
    common.run_script(parse_args, main)
