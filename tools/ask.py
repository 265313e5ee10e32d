"""Ask any OpenAI-compatible server for plans: {"id", "response"} lines that evaluate.py scores.

    pip install openai                                 # the key, if one is needed: $OPENAI_API_KEY
    python -m tools.ask --api_base http://localhost:8000/v1 --api_model NAME --out out/answers.jsonl
    python -m tools.lenient out/answers.jsonl --out out/read.jsonl
    python evaluate.py --responses out/read.jsonl

Answers are written as they come: the same command resumes where it was stopped, and asks again for
the rows that failed. How was asked stands in FILE.settings.json; other settings want another FILE.
A row that got no answer has an "error", in the server's words, and is a failure of the evaluation,
never a row less. An answer that reached the length limit is one, if only of thoughts: it is "cut".
The first error is said at once. The run ends where the first rows meet nothing but no server, no
such model or a refused key.
"""
import base64
import io
import json
import os
import re
import shlex
from multiprocessing.pool import ThreadPool
from pathlib import Path
from threading import Lock

from PIL import Image
from tqdm import tqdm

import common
import evaluate
import gen_data
from gen_data import (
    Parser,
    digest,
    fail,
    in_one_line,
    lock_file,
    real_number,
    whole_number,
    write_text,
)

RETRIES = 5  # of 408, 409, 429, 5xx, a time-out or a broken connection; 0.5 to 8 s apart
FEW = 8      # rows that show whether there is a server
SENT = {"PNG": "png", "JPEG": "jpeg", "MPO": "jpeg", "WEBP": "webp"}  # formats that servers read
# How an answer ends, by the servers' names: was it cut by the length limit?
ENDS = {"stop": False, "eos": False, "eos_token": False, "stop_sequence": False, "end_turn": False,
        "length": True, "max_tokens": True, "model_length": True}


def json_object(text):
    """The `type=` of --extra."""
    return dict(json.loads(text))


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
    add("--extra", type=json_object, metavar="JSON", help="more fields of each request, for "
        """example '{"top_p": 0.9}' (for cmd.exe and PowerShell 5: "{\\"top_p\\": 0.9}")""")
    return parser.parse_args(argv)


def data_url(path):
    """A picture for a server: the file's own bytes if they show what the stages see, else a PNG."""
    seen, content = gen_data.open_picture(path), Path(path).read_bytes()
    with Image.open(path) as image:
        kind, plain = image.format, image.convert("RGB")
    if kind not in SENT or (plain.size, plain.tobytes()) != (seen.size, seen.tobytes()):
        kind, file = "PNG", io.BytesIO()
        seen.save(file, kind)
        content = file.getvalue()
    return f"data:image/{SENT[kind]};base64,{base64.b64encode(content).decode()}"


def text_of(content):
    """The text of a message's content: it is one, or a list of parts of which some are texts.

    None without one.
    """
    if isinstance(content, list):
        texts = [part["text"] for part in content if part.get("type") == "text"]
        return "".join(texts) if texts else None
    return content


def read_reply(reply):
    """What a row's line holds of the server's reply. ValueError: it is no answer."""
    if isinstance(reply, str):
        raise ValueError(f"wanted JSON, got {reply}")  # a web page: --api_base is another's
    choice = reply.choices[0] if reply.choices else None
    cut = ENDS.get(str(choice.finish_reason).lower()) if choice else None
    text = text_of(choice.message.content) if choice else None
    if cut and text is None:
        text = ""  # all of it was thought, which stands elsewhere
    if cut is None or not isinstance(text, str):
        raise ValueError(reply.to_json(indent=None, warnings=False))
    return {"response": text, "cut": cut, "tokens": reply.usage and reply.usage.completion_tokens}


class Asker:
    """A client of the server: `asker(question)` is the row's line, with an "error" if it failed.

    useful: has the server ever said more than that it is not there, or not for this model and key?
    """

    def __init__(self, args):
        self.args, self.useful, self.warned, self.lock = args, False, False, Lock()
        self.folder = Path(args.data, args.split)
        self.fields = {"max_tokens": args.max_new_tokens, "temperature": args.temperature}
        self.key = os.environ.get("OPENAI_API_KEY", "").strip()  # a .env's line end
        here = re.match(r"https?://(localhost|127\.|\[::1\])", args.api_base)  # needs no proxy
        with in_one_line("the client of the server (pip install openai)"):
            import openai
            self.openai = openai
            self.client = openai.OpenAI(
                base_url=args.api_base, api_key=self.key or "none", max_retries=RETRIES,
                timeout=args.timeout, http_client=openai.DefaultHttpxClient(trust_env=not here))

    def masked(self, error):
        """The words of the server or the client, cut off, without the key."""
        text = f"{type(error).__name__}: {error} {error.__cause__ or ''}"
        for form in {self.key, repr(self.key)[1:-1]} - {""}:
            text = text.replace(form, "***")
        return " ".join(text.split())[:300]

    def warn(self, text):
        """The first trouble is said at once; the run's last line counts the rows that failed."""
        with self.lock:
            if not self.warned:
                common.warn(f"{self.args.api_base}: {text}")
            self.warned = True

    def request(self, content, sampling):
        """The server's reply; asked again in the form that it names where it refuses ours."""
        while True:
            fields = self.fields
            # Retries may take minutes: the first error comes without them, and is followed by them.
            client = self.client if self.warned else self.client.with_options(max_retries=0)
            try:
                return client.chat.completions.create(
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
            except self.openai.OpenAIError as error:
                if client is self.client:
                    raise
                self.warn(self.masked(error))

    def __call__(self, question):
        content, sampling, name = [{"type": "text", "text": question.prompt}], {}, None
        if question.picture:
            url = data_url(question.picture)
            content.insert(0, {"type": "image_url", "image_url": {"url": url}})
            name = Path(question.picture).relative_to(self.folder).as_posix()
        if self.args.temperature:
            sampling["seed"] = int(digest(self.args.seed, question.key), 16) % 2**31
        line = {**question.key, "model": self.args.api_model, "picture": name}
        try:
            line |= read_reply(self.request(content, sampling))
            self.useful = True
        except (self.openai.OpenAIError, ValueError, LookupError, TypeError,
                AttributeError) as error:
            line |= {"response": "", "error": self.masked(error)}
            self.warn(line["error"])
            self.useful |= not isinstance(error, (
                self.openai.AuthenticationError, self.openai.NotFoundError,
                self.openai.APIConnectionError))
        return line


def check_settings(out, settings):
    """Fails if FILE holds answers that were asked for otherwise; else remembers how."""
    record = Path(f"{out}.settings.json")
    if out.is_file() and out.stat().st_size:
        with in_one_line(f"{out} is there, and {record} does not say how it was asked for: choose "
                         "another --out"):
            old = dict(json.loads(record.read_text(encoding="utf-8")))
        other = [f"{name} was {old.get(name)!r} and is {value!r}"
                 for name, value in settings.items() if old.get(name) != value]
        if other:
            fail(f"{out} was asked for with other settings ({'; '.join(other)}): choose another "
                 "--out")
    write_text(record, json.dumps(settings, indent=1) + "\n")


def ask_all(args, asked, asker, lines):
    """Asks what has no answer in `lines` yet; each line is added, each answer in args.out too."""
    todo = [question for question in asked if evaluate.label(question.key) not in lines]
    asker.useful, failed = bool(lines), 0
    with ThreadPool(args.concurrency) as pool, evaluate.append_answers(Path(args.out)) as file:
        for line in tqdm(pool.imap_unordered(asker, todo), total=len(todo), unit="row"):
            lines[evaluate.label(line)] = line
            if "error" not in line:
                file.write(json.dumps(line) + "\n")
                file.flush()
                continue
            failed += 1
            if not asker.useful and failed == min(FEW, len(todo)):
                fail(f"{args.api_base} does not answer for {args.api_model}: {line['error']}")


def main(args):
    pool, out = gen_data.load_rows(args.data, args.split), Path(args.out)
    rows = gen_data.choose_rows(pool, args.tasks, args.limit)
    asked, asker = evaluate.planning_questions(rows, args.input, pool), Asker(args)
    gen_data.decode_all(question.picture for question in asked if question.picture)
    settings = {name: getattr(args, name) for name in
                ("api_base", "api_model", "max_new_tokens", "temperature", "seed", "extra")}
    settings["questions"] = evaluate.digest_questions(asked)  # rows, prompts and pictures
    out.parent.mkdir(parents=True, exist_ok=True)
    lock = lock_file(f"{out}.lock", out)
    try:
        check_settings(out, settings)
        with in_one_line(f"{out} cannot be read"):
            lines = evaluate.read_answers(out)
        ask_all(args, asked, asker, lines)
        lines = [lines[evaluate.label(question.key)] for question in asked]
        write_text(out, "".join(json.dumps(line) + "\n" for line in lines))  # in their order
    finally:
        lock.release()
    failed = sum("error" in line for line in lines)
    if failed == len(lines):
        fail(f"{out}: none of {failed} rows was answered; the first error: {lines[0]['error']}")
    again = "; the same command asks again for the others" if failed else ""
    following = shlex.join(["python", "evaluate.py", "--responses", args.out, "--input", args.input,
                            "--split", args.split, "--data", args.data])
    print(f"{out}: {len(lines) - failed} of {len(lines)} rows answered{again}; next: {following}")


if __name__ == "__main__":
    common.run_script(parse_args, main)
