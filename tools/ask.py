"""Ask any OpenAI-compatible server for plans: {"id", "response"} lines that evaluate.py scores.

    pip install openai                                 # the key, if one is needed: $OPENAI_API_KEY
    python -m tools.ask --api_base http://localhost:8000/v1 --api_model NAME --out answers.jsonl
    python -m tools.lenient answers.jsonl --out read.jsonl
    python evaluate.py --responses read.jsonl

Answers are written as they come: the same command resumes where it was stopped, and asks again for
the rows that failed. How was asked stands in FILE.settings.json; other settings want another FILE.
A row that got no answer has an "error", in the server's words, and is a failure of the evaluation,
never a row less. Only a text that ends with "stop" or "length" is an answer. The first row is asked
alone: if it meets no server, no such model or a refused key, the run ends.
"""
import base64
import io
import json
import os
import re
from itertools import chain
from multiprocessing.pool import ThreadPool
from pathlib import Path

from tqdm import tqdm

import common
import evaluate
import gen_data
from gen_data import Parser, digest, fail, lock_file, real_number, whole_number, write_text

RETRIES = 5     # of 408, 409, 429, 5xx, a time-out or a broken connection; 0.5 to 8 s apart
FATAL = ("AuthenticationError", "NotFoundError", "APIConnectionError", "APITimeoutError")


def parse_args(argv=None):
    parser = Parser(prog="-m tools.ask", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--api_base", required=True, metavar="URL", help="for example http://localhost:8000/v1")
    add("--api_model", required=True, metavar="NAME", help="the server's name for the model")
    add("--out", required=True, metavar="FILE", help="answers, one JSON object a line")
    add("--data", default=gen_data.PRESETS["tiny"]["out"], help="data folder")
    add("--input", default="image", choices=evaluate.INPUTS, help="the picture, the symbols, or, "
        "as a control, the picture of another puzzle")
    add("--split", default="test", choices=("test", "val"), help="rows that are asked about")
    add("--tasks", nargs="+", help="task, task:size, task:low-high or group (default: all)")
    add("--limit", type=whole_number(1), help="rows per task and board size (default: all)")
    add("--max_new_tokens", type=whole_number(1), default=1024,
        help="length limit of an answer, tokens")
    add("--temperature", type=real_number(), default=0.0, help="0: greedy")
    add("--seed", type=whole_number(0), default=0, help="with a temperature: draws the answers")
    add("--concurrency", type=whole_number(1), default=8, help="requests at a time")
    add("--timeout", type=real_number(above=True), default=60.0,
        help="seconds that a request may take; it is made again a few times")
    add("--extra", type=json.loads, metavar="JSON",
        help="""more fields of each request, for example '{"top_p": 0.9}'""")
    return parser.parse_args(argv)


def data_url(path):
    """The picture as the stages see it."""
    file = io.BytesIO()
    gen_data.open_picture(path).save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def read_reply(reply):
    """What a row's line holds of the server's reply. ValueError: it is no answer."""
    choice = reply.choices[0] if reply.choices else None
    if not choice or choice.finish_reason not in ("stop", "length") \
            or not isinstance(choice.message.content, str):
        raise ValueError(reply.to_json(indent=None, warnings=False))
    return {"response": choice.message.content, "cut": choice.finish_reason == "length",
            "tokens": reply.usage and reply.usage.completion_tokens}


class Asker:
    """A client of the server: `asker(question)` is the row's line, with an "error" if it failed."""

    def __init__(self, args):
        try:
            import openai
        except ImportError:
            fail("the client for the server is missing: pip install openai")
        self.args, self.openai = args, openai
        self.fields = {"max_tokens": args.max_new_tokens, "temperature": args.temperature}
        self.secret = os.environ.get("OPENAI_API_KEY", "").strip() or "no-key"  # a .env's line end
        here = re.match(r"https?://(localhost|127\.|\[::1\])", args.api_base)  # needs no proxy
        self.client = openai.OpenAI(
            base_url=args.api_base, api_key=self.secret, max_retries=RETRIES, timeout=args.timeout,
            http_client=openai.DefaultHttpxClient(trust_env=not here))

    def masked(self, text):
        """A text of the server or the client, cut off, without the key."""
        for form in (self.secret, repr(self.secret)[1:-1]):
            text = text.replace(form, "***")
        return " ".join(text.split())[:300]

    def request(self, content, sampling):
        """The server's reply; asked again in the form that it names where it refuses ours."""
        while True:
            fields = self.fields
            try:
                return self.client.chat.completions.create(
                    model=self.args.api_model, messages=[{"role": "user", "content": content}],
                    extra_body=self.args.extra, **fields, **sampling)
            except (self.openai.BadRequestError, self.openai.UnprocessableEntityError) as error:
                if "max_tokens" in fields and "max_completion_tokens" in str(error):
                    name, other = "max_tokens", {"max_completion_tokens": fields["max_tokens"]}
                elif "temperature" in fields and re.search(
                        "temperature.*(support|default|deprecated|allowed|permitted|unknown)",
                        str(error), re.IGNORECASE):
                    name, other = "temperature", {}
                else:
                    raise
                if fields is self.fields:  # the first of several requests at a time
                    self.fields = {k: fields[k] for k in fields if k != name} | other
                    common.warn(f"{self.args.api_base} takes no {name}: asked "
                                f"{'with ' if other else 'without'}{', '.join(other)}")

    def __call__(self, question):
        key, prompt, picture = question
        content, sampling = [{"type": "text", "text": prompt}], {}
        if picture:
            content.insert(0, {"type": "image_url", "image_url": {"url": data_url(picture)}})
        if self.args.temperature:
            sampling["seed"] = int(digest(self.args.seed, key), 16) % 2**31
        line = {**key, "model": self.args.api_model}
        try:
            return line | read_reply(self.request(content, sampling))
        except (self.openai.OpenAIError, ValueError, TypeError, AttributeError) as problem:
            error = f"{type(problem).__name__}: {problem} {problem.__cause__ or ''}"
            return line | {"response": "", "error": self.masked(error)}


def check_settings(out, settings):
    """Fails if FILE holds answers that were asked for otherwise; else remembers how."""
    record = Path(f"{out}.settings.json")
    if out.is_file() and out.stat().st_size:
        try:
            old = dict(json.loads(record.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            fail(f"{out} is there, and {record} does not say how it was made ({error}): choose "
                 "another --out")
        other = [f"{name} was {old.get(name)!r} and is {value!r}"
                 for name, value in settings.items() if old.get(name) != value]
        if other:
            fail(f"{out} was asked for with other settings ({'; '.join(other)}): choose another "
                 "--out")
    write_text(record, json.dumps(settings, indent=1) + "\n")


def ask_all(args, asked, asker, lines):
    """Asks what has no answer in `lines` yet, and appends each answer to args.out."""
    todo = [question for question in asked if evaluate.label(question[0]) not in lines]
    first = [asker(question) for question in todo[:1]]
    if first and not lines and first[0].get("error", "").startswith(FATAL):
        fail(f"{args.api_base} does not answer for {args.api_model}: {first[0]['error']}")
    with ThreadPool(args.concurrency) as pool, evaluate.append_answers(Path(args.out)) as file:
        answers = chain(first, pool.imap_unordered(asker, todo[1:]))
        for line in tqdm(answers, total=len(todo), unit="row"):
            lines[evaluate.label(line)] = line
            file.write(json.dumps(line) + "\n")
            file.flush()


def main(args):
    pool, out = gen_data.load_rows(args.data, args.split), Path(args.out)
    rows = gen_data.choose_rows(pool, args.tasks, args.limit)
    asked, asker = evaluate.planning_questions(rows, args.input, pool), Asker(args)
    gen_data.decode_all(path for _, _, path in asked if path)
    settings = {name: getattr(args, name) for name in
                ("api_base", "api_model", "max_new_tokens", "temperature", "seed", "extra")}
    settings["questions"] = evaluate.digest_questions(asked)  # rows, prompts and pictures
    out.parent.mkdir(parents=True, exist_ok=True)
    lock = lock_file(f"{out}.lock", out)
    try:
        check_settings(out, settings)
        lines = evaluate.read_answers(out)
        ask_all(args, asked, asker, lines)
        lines = evaluate.with_pictures([lines[evaluate.label(key)] for key, _, _ in asked], asked,
                                       pool)
        write_text(out, "".join(json.dumps(line) + "\n" for line in lines))  # in their order
    finally:
        lock.release()
    failed = sum("error" in line for line in lines)
    if failed == len(lines):
        fail(f"{out}: none of {failed} rows was answered; the first error: {lines[0]['error']}")
    print(f"{out}: {len(lines) - failed} of {len(lines)} rows answered" + (
        "; the same command asks again for the others" if failed else "")
        + f"; next: python evaluate.py --responses {out} --split {args.split} --data {args.data}")


if __name__ == "__main__":
    common.run_script(parse_args, main)
