"""Ask any OpenAI-compatible server for plans: {"id", "response"} lines that evaluate.py scores.

    pip install openai                                 # the key, if one is needed: $OPENAI_API_KEY
    python -m tools.ask --api_base http://localhost:8000/v1 --api_model NAME --out answers.jsonl
    python -m tools.lenient answers.jsonl --out read.jsonl
    python evaluate.py --responses read.jsonl

Answers are written as they come: the same command resumes where it was stopped, and asks again for
the rows that failed. How was asked stands in FILE.settings.json; other settings want another FILE.
A row that got no answer has an "error", in the server's words, and is a failure of the evaluation,
never a row less. Only what ends with "stop" or "length" is an answer. Where none of the first rows
gets one, from a server that is not there or knows no such model, the run ends. Pictures are sent as
the stages see them (`gen_data.open_picture`). Local addresses are asked without a proxy.
"""
import argparse
import base64
import io
import ipaddress
import json
import multiprocessing
import os
import re
from multiprocessing.pool import ThreadPool
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import proxy_bypass_environment

from PIL import Image
from tqdm import tqdm

import common
import evaluate
import gen_data
from gen_data import Parser, digest, fail, lock_file, real_number, whole_number, write_text

RETRIES = 5     # of 408, 409, 429, 5xx, a time-out or a broken connection; 0.5 to 8 s apart
FEW = 8         # rows without an answer of which none says that there is a server
SENT = ("PNG", "JPEG", "WEBP")  # formats that servers read
ORIENTATION = 0x0112  # the EXIF tag


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
    add("--extra", type=read_extra, metavar="JSON",
        help="""more fields of each request, for example '{"top_p": 0.9}'""")
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


def data_url(path):
    """The picture as the stages see it: the file's own bytes where every reader of them sees the
    same, else a PNG.
    """
    seen, content = gen_data.open_picture(path), Path(path).read_bytes()
    with Image.open(io.BytesIO(content)) as image:
        kind = image.format
        plain = kind in SENT and image.mode == "RGB" and getattr(image, "n_frames", 1) == 1 \
            and image.getexif().get(ORIENTATION, 1) == 1 and "transparency" not in image.info \
            and (kind != "PNG" or content[24] == 8)  # bits a value
    if not plain:
        file, kind = io.BytesIO(), "PNG"
        seen.save(file, kind)
        content = file.getvalue()
    return f"data:image/{kind.lower()};base64,{base64.b64encode(content).decode()}"


def is_local(host):
    """Is it an address of this machine or its network, for which no proxy is asked?"""
    try:
        return ipaddress.ip_address(host).is_private
    except ValueError:
        return host == "localhost" or host.endswith((".localhost", ".local"))


def variables(*names):
    """The variables of these names, in small letters or large, that are set."""
    return [name for low in names for name in (low, low.upper()) if os.environ.get(name)]


def read_extra(text):
    """The `type=` of --extra: a JSON object of request fields."""
    try:
        extra = dict(json.loads(text))
    except (ValueError, TypeError, RecursionError):
        raise argparse.ArgumentTypeError(f"got {text!r}, must be a JSON object") from None
    for name in ("model", "messages", "stream", "n"):
        if name in extra:
            raise argparse.ArgumentTypeError(f"{name} is not for it")
    return extra


def read_reply(reply):
    """What a row's line holds of the server's reply. ValueError: it is no answer, and why."""
    refused = getattr(reply, "error", None)
    if refused or not getattr(reply, "choices", None):
        raise ValueError(f"no answer: {refused or reply}")
    choice = reply.choices[0]
    message = choice.message.to_dict(warnings=False) if choice.message else {}
    text = message.get("content")
    if choice.finish_reason not in ("stop", "length"):
        why = getattr(choice, "error", None) or message.get("refusal") or text or "no reason given"
        raise ValueError(f"finish reason {choice.finish_reason}: {why}")
    beside = [name for name in ("refusal", "reasoning", "reasoning_content") if message.get(name)]
    if text is None and beside:
        raise ValueError(f"no content, but {beside[0]}: {message[beside[0]]}")
    if text is not None and not isinstance(text, str):
        raise ValueError(f"its content is no text: {text}")
    return {"response": text or "", "tokens": reply.usage and reply.usage.completion_tokens,
            "cut": choice.finish_reason == "length"}


class Asker:
    """A client of the server: `asker(question)` -> (the answer line, may the server be of no use?).

    A row that failed for good has an "error". ConnectionError where no row would get an answer: a
    refused key, a server that is not there and never was.
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
        self.refused = set()  # parameters that the server does not take
        url = urlsplit(args.api_base)
        direct = is_local(url.hostname) or proxy_bypass_environment(url.hostname)
        names = [] if direct else variables(f"{url.scheme}_proxy", "all_proxy")
        self.through = f" (through ${names[0]})" if names else ""
        self.passwords = re.findall(r"//[^/@\s]*:([^/@\s]+)@", " ".join(
            os.environ[name] for name in variables("http_proxy", "https_proxy", "all_proxy")))
        try:
            self.client = openai.OpenAI(
                base_url=args.api_base, api_key=self.secret, max_retries=RETRIES,
                timeout=args.timeout,
                http_client=openai.DefaultHttpxClient(trust_env=not is_local(url.hostname)))
        except Exception as error:  # of the proxy's address
            names = variables("http_proxy", "https_proxy", "all_proxy", "no_proxy", "ssl_cert_file")
            if not names:
                raise
            fail(f"${' or $'.join(names)} cannot be used: {type(error).__name__}: "
                 f"{self.masked(error)}")

    def masked(self, text):
        """A text of the server or the client, cut off, without the key and passwords."""
        for secret in (self.secret, *self.passwords):
            text = hide(str(text), secret)
        return " ".join(text.split())[:300]

    def request(self, content, sampling):
        """The server's reply; asked again in the form that it names where it refuses ours."""
        for _ in range(3):
            fields = {"max_tokens": self.args.max_new_tokens, **sampling}
            if "max_tokens" in self.refused:
                fields["max_completion_tokens"] = fields.pop("max_tokens")
            if "temperature" in self.refused:
                del fields["temperature"]
            try:
                return self.client.chat.completions.create(
                    model=self.args.api_model, messages=[{"role": "user", "content": content}],
                    extra_body=self.args.extra, **fields)
            except (self.openai.BadRequestError, self.openai.UnprocessableEntityError) as error:
                if "max_tokens" in fields and "max_completion_tokens" in str(error):
                    self.refuse("max_tokens", "asked with max_completion_tokens")
                elif "temperature" in fields and re.search(
                        "temperature.*(support|default|deprecated|allowed|permitted|unknown)",
                        str(error), re.IGNORECASE):
                    self.refuse("temperature", "asked without")
                else:
                    raise

    def refuse(self, name, what):
        """Remember that the server does not take a parameter; said once."""
        if name not in self.refused:
            common.warn(f"{self.args.api_base} takes no {name}: {what}")
        self.refused.add(name)

    def __call__(self, question):
        key, prompt, picture = question
        content = [{"type": "text", "text": prompt}]
        if picture:
            content.insert(0, {"type": "image_url", "image_url": {"url": data_url(picture)}})
        sampling = {"temperature": self.args.temperature}
        if self.args.temperature:
            sampling["seed"] = int(digest(self.args.seed, key), 16) % 2**31
        line = {**key, "model": self.args.api_model}
        try:
            return {**line, **read_reply(self.request(content, sampling))}, False
        except (self.openai.OpenAIError, TypeError, IndexError, AttributeError,
                ValueError) as problem:
            error = f"{type(problem).__name__}: {problem} {problem.__cause__ or ''}"
            if type(problem) is ValueError:  # the server's words
                error = str(problem)
            error = "a header was refused" if "header" in error.lower() else error
            if isinstance(problem, self.openai.APITimeoutError):
                error = f"no answer within {self.args.timeout:g} s, {RETRIES + 1} times (--timeout)"
            elif isinstance(problem, self.openai.APIConnectionError):
                error += self.through
            error = self.masked(error)
            if isinstance(problem, self.openai.AuthenticationError):
                raise ConnectionError(error) from None
            return {**line, "response": "", "error": error}, isinstance(problem, (
                self.openai.PermissionDeniedError, self.openai.NotFoundError,
                self.openai.APIConnectionError))


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
    pool, out = gen_data.load_rows(args.data, args.split), Path(args.out)
    rows = gen_data.choose_rows(pool, args.tasks, args.limit)
    asked, asker = evaluate.planning_questions(rows, args.input, pool), Asker(args)
    gen_data.decode_all(path for _, _, path in asked if path)
    settings = {name: getattr(args, name) for name in
                ("api_base", "api_model", "max_new_tokens", "temperature", "seed", "extra")}
    settings["questions"] = evaluate.digest_questions(asked)
    out.parent.mkdir(parents=True, exist_ok=True)
    lock = lock_file(f"{out}.lock", out)
    try:
        lines = ask_all(args, asked, asker, open_answers(out, settings), pool)
    finally:
        lock.release()
    failed = sum(bool(line.get("error")) for line in lines)
    if failed == len(lines):
        fail(f"{out}: none of {failed} rows was answered; the first error: {lines[0]['error']}")
    print(f"{out}: {len(lines) - failed} of {len(lines)} rows answered" + (
        "; the same command asks again for the others" if failed else "") + "; next: "
        + common.command("evaluate.py", responses=(out, None), split=(args.split, "test"),
                         data=(args.data, gen_data.PRESETS["tiny"]["out"])))


def ask_all(args, asked, asker, lines, rows):
    """The answers to all of `asked` in their order, in args.out too; lines: what is there.

    rows: those whose pictures are shown.

    Where the server may be of no use (nobody there, no such model), lines wait until it is known:
    the run ends if nothing was ever answered, else they are those rows' errors.
    """
    todo = [question for question in asked if evaluate.label(question[0]) not in lines]
    useful, waiting = bool(lines), []
    with ThreadPool(args.concurrency) as pool, tqdm(total=len(todo), unit="row") as bar, \
            evaluate.append_answers(Path(args.out)) as file:
        try:
            for line, useless in answers_of(pool.imap_unordered(asker, todo), args):
                waiting.append(line)
                useful = useful or not useless
                if not useful and len(waiting) == min(FEW, len(todo)):
                    raise ConnectionError(waiting[0]["error"])
                while useful and waiting:
                    line = waiting.pop(0)
                    lines[evaluate.label(line)] = line
                    file.write(json.dumps(line) + "\n")
                    file.flush()
                bar.update()
        except ConnectionError as problem:
            fail(f"{args.api_base} does not answer for {args.api_model}: {problem}")
    lines = evaluate.with_pictures([lines[evaluate.label(key)] for key, _, _ in asked], asked, rows)
    write_text(args.out, "".join(json.dumps(line) + "\n" for line in lines))
    return lines


def answers_of(answers, args):
    """Yields what an iterator of a pool gives; a line where it gives nothing for long."""
    while True:
        try:
            yield answers.next(args.timeout)
        except multiprocessing.TimeoutError:
            common.warn(f"no answer of {args.api_base} for {args.timeout:g} s: is it busy, or does "
                        "it hang? (--timeout, --concurrency)")
        except StopIteration:
            return


if __name__ == "__main__":
    common.run_script(parse_args, main)
