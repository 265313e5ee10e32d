"""tools/ask.py against a scripted server, and against `transformers serve` with the backbone."""
import base64
import io
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from conftest import stops
from PIL import Image

import common
import evaluate
import gen_data
from tools import ask
from tools.report import read_lines

pytest.importorskip("openai", reason="the client is not installed (requirements-dev.txt)")
KEY = "sk-very-secret"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Four lakes and four offices in the split test."""
    folder = tmp_path_factory.mktemp("ask") / "data"
    gen_data.main(gen_data.parse_args([
        "--preset", "tiny", "--tasks", "frozenlake:3", "minibehaviour:5", "--train", "1",
        "--val", "1", "--test", "4", "--out", str(folder)]))
    return folder


class Server(ThreadingHTTPServer):
    """Answers each request with what `script(body, attempt)` returns.

    That is (status, text, or a whole reply, or None); status 0 drops the connection.
    """

    def __init__(self, script):
        self.script, self.bodies, self.attempts, self.lock = script, [], {}, threading.Lock()
        self.busy = self.most_at_once = 0
        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        server, body = self.server, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.busy += 1
            server.most_at_once = max(server.most_at_once, server.busy)
            content = json.dumps(body["messages"])
            server.attempts[content] = server.attempts.get(content, 0) + 1
            attempt = server.attempts[content]
            server.bodies.append((self.path, self.headers["Authorization"], body))
        time.sleep(0.02)
        status, text = server.script(body, attempt)
        reply = {"error": {"message": f"bad key {KEY}"}}
        if isinstance(text, dict):
            reply = text
        elif status == 200:
            message = {"role": "assistant", "content": text}
            reply = {"choices": [{"index": 0, "finish_reason": "stop", "message": message}],
                     "usage": {"prompt_tokens": 1, "completion_tokens": 7, "total_tokens": 8},
                     "id": "x", "object": "chat.completion", "created": 0, "model": body["model"]}
        with server.lock:
            server.busy -= 1
        if status == 0:
            self.close_connection = True
            return
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("retry-after-ms", "5")          # so that the test need not wait
        self.end_headers()
        self.wfile.write(json.dumps(reply).encode())

    def log_message(self, *_):
        pass


def ask_for(url, data, out, *more):
    ask.main(ask.parse_args(["--data", str(data), "--out", str(out), "--api_base", url,
                             "--api_model", "org/m", "--concurrency", "3", *more]))


def score(data, file, out):
    """The verdicts of evaluate.py --responses, and its macro average."""
    evaluate.main(evaluate.parse_args(["--preset", "tiny", "--data", str(data), "--out", str(out),
                                       "--responses", str(file)]))
    table = json.loads((out / file.stem / "summary.json").read_text())["table"]
    macro = next(line for line in table if line["task"] == "macro")
    return read_lines(out / file.stem / "predictions.jsonl"), macro


def test_a_busy_server_and_a_row_that_fails(data, tmp_path, monkeypatch, capsys):
    """Requests meet a 429 and a 500 first; one row is never answered, and asked again alone."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    rows, broken, out = gen_data.load_rows(data, "test"), {"yes": True}, tmp_path / "answers.jsonl"
    answers = {ask.data_url(row.path): row.response() for row in rows}

    def script(body, attempt):
        picture = body["messages"][0]["content"][0]["image_url"]["url"]
        if broken["yes"] and list(answers).index(picture) == 2:
            return 503, None
        return {1: (429, None), 2: (500, None)}.get(attempt, (200, answers[picture]))
    server = Server(script)
    (tmp_path / "summary.json").write_text("somebody else's")
    ask_for(server.url, data, out)
    lines = read_lines(out)
    assert [line["id"] for line in lines] == [row.id for row in rows]
    assert "503" in lines[2]["error"] and (lines[0]["tokens"], lines[0]["cut"]) == (7, False)
    said = capsys.readouterr()
    assert "7 of 8 rows answered; the same command" in said.out
    assert said.err.count("warning: ") == 1                # the first error
    verdicts, macro = score(data, out, tmp_path / "eval")
    assert [v["outcome"] for v in verdicts] == ["success", "success", "error", *["success"] * 5]
    assert macro | {"n": 8, "success": 0.875, "failures": {"error": 1}, "tokens": 7} == macro
    path, key, body = server.bodies[0]
    assert (path, key) == ("/v1/chat/completions", f"Bearer {KEY}")
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("org/m", 0, 1024)
    assert body["messages"][0]["content"][1]["text"] == rows[0].student_prompt()
    assert server.most_at_once <= 3
    assert max(server.attempts.values()) <= 2 + ask.RETRIES
    broken["yes"] = False
    before = len(server.bodies)
    ask_for(server.url, data, out)
    assert len(server.bodies) - before == 1              # the row that failed, and no other
    assert score(data, out, tmp_path / "eval")[1]["success"] == 1
    assert (tmp_path / "summary.json").read_text() == "somebody else's"
    said = capsys.readouterr()
    assert KEY not in said.out + said.err
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in written if KEY in path.read_text(errors="replace")]


def test_a_stopped_run_resumes_and_other_settings_want_another_file(data, tmp_path, capsys):
    """Symbols only; three rows of the first run and half a line are there already."""
    server = Server(lambda body, attempt: (200, "<answer>U</answer>"))
    out = tmp_path / "answers.jsonl"
    ask_for(server.url, data, out, "--input", "text")
    prompts = [body["messages"][0]["content"] for _, _, body in server.bodies]
    rows = gen_data.load_rows(data, "test")
    assert sorted(content[0]["text"] for content in prompts) == sorted(
        row.teacher_prompt("symbols") for row in rows)
    assert all(len(content) == 1 for content in prompts)             # no picture
    whole = out.read_bytes()
    out.write_bytes(b"".join(whole.splitlines(keepends=True)[:3]) + b'{"id": "test_')
    ask_for(server.url, data, out, "--input", "text")
    assert len(server.bodies) == 8 + 5 and out.read_bytes() == whole
    assert {line["model"] for line in read_lines(out)} == {"org/m"}
    with pytest.raises(SystemExit):
        ask_for(server.url, data, out, "--input", "text", "--api_model", "other")
    assert "api_model was 'org/m' and is 'other'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        ask_for(server.url, data, out, "--input", "text", "--limit", "1")
    assert "with other settings (questions was " in capsys.readouterr().err
    assert out.read_bytes() == whole and len(server.bodies) == 13
    ask_for(server.url, data, tmp_path / "warm", "--input", "text", "--temperature", "1",
            "--limit", "1")
    assert len(read_lines(tmp_path / "warm")) == 2
    seeds = [body["seed"] for _, _, body in server.bodies[13:]]
    assert len(set(seeds)) == 2                                      # one for each row


def test_the_first_error_is_said_at_once(data, tmp_path, capsys):
    """Before the retries, which take a quarter of a minute and more for every row."""
    told = []

    def script(body, attempt):
        if attempt > 1:
            told.append(capsys.readouterr().err)
        return 500, {"error": {"message": "image input is not supported"}}
    line = stops(capsys, ask_for, Server(script).url, data, tmp_path / "a", "--concurrency", "1",
                 "--limit", "1")
    assert "warning: " in told[0] and "image input is not supported" in told[0]
    assert "none of 2 rows was answered" in line and "image input is not supported" in line


def test_the_first_rows_alone_do_not_say_that_there_is_no_server(data, tmp_path, capsys):
    """No model for one row of them, the others are answered: the run goes on."""
    first = gen_data.load_rows(data, "test")[0].teacher_prompt("symbols")
    server = Server(lambda body, attempt: (404, None) if body["messages"][0]["content"][0][
        "text"] == first else (200, "<answer>U</answer>"))
    ask_for(server.url, data, tmp_path / "a", "--input", "text", "--concurrency", "1")
    assert "7 of 8 rows answered" in capsys.readouterr().out
    assert "404" in read_lines(tmp_path / "a")[0]["error"]


@pytest.mark.parametrize("status", [401, 404, None])
def test_a_server_of_no_use_stops_the_run(data, tmp_path, monkeypatch, capsys, status):
    """A refused key, an unknown model, nobody there: one line, exit code 2, no row is spent."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    if status:
        url = Server(lambda body, attempt: (status, None)).url
    else:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
        monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.001)
    with pytest.raises(SystemExit) as stop:
        ask_for(url, data, tmp_path / "answers.jsonl", "--input", "text")
    said = capsys.readouterr()
    assert stop.value.code == 2 and "does not answer for org/m" in said.err
    assert KEY not in said.out + said.err and read_lines(tmp_path / "answers.jsonl") == []


def reply_of(finish, **message):
    """A whole reply with this finish reason."""
    choice = {"index": 0, "finish_reason": finish, "message": {"role": "assistant", **message}}
    return {"choices": [choice], "id": "x", "object": "chat.completion", "created": 0, "model": "m"}


PARTS = [{"type": "thinking", "thinking": [{"type": "text", "text": "<answer>D</answer>"}]},
         {"type": "text", "text": "<answer>"}, {"type": "text", "text": "U</answer>"}]
ANSWERS = [  # (finish reason, message, response, cut)
    ("stop", {"content": "<answer>U</answer>"}, "<answer>U</answer>", False),
    ("stop", {"content": ""}, "", False), ("STOP", {"content": "x"}, "x", False),
    ("eos_token", {"content": "x"}, "x", False), ("end_turn", {"content": "x"}, "x", False),
    ("stop", {"content": PARTS}, "<answer>U</answer>", False),
    ("length", {"content": "half"}, "half", True),
    ("MAX_TOKENS", {"content": "half"}, "half", True),
    ("length", {"content": None, "reasoning_content": "Let me see"}, "", True),
    ("length", {"content": None, "reasoning": "Hm"}, "", True),
    ("length", {"content": PARTS[:1]}, "", True), ("length", {}, "", True)]
REPLIES = [  # ((status, reply), what the error says)
    ((200, reply_of("content_filter", content="half")), "content_filter"),
    ((200, reply_of("tool_calls", content=None)), "tool_calls"),
    ((200, reply_of(None, content="x")), '"finish_reason":null'),
    ((200, reply_of("stop", content=None)), '"content":null'),
    ((200, reply_of("stop", content=None, reasoning_content="Let me see")), "Let me see"),
    ((200, reply_of("stop", content=PARTS[:1])), '"content":[{'),
    ((200, {"error": {"message": f"overloaded, {KEY}", "code": 529}}), "overloaded, ***"),
    ((200, {"choices": []}), '"choices":[]'),
    ((400, {"error": {"message": "too long"}}), "too long"),
    ((403, {"error": {"message": "moderated"}}), "moderated"), ((404, None), "404"),
    ((0, None), "Connection error")]


@pytest.fixture
def quick(monkeypatch):
    """Retries without a delay."""
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.001)
    monkeypatch.setattr("openai._base_client.MAX_RETRY_DELAY", 0.001)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


@pytest.mark.parametrize("finish, message, response, cut", ANSWERS)
def test_what_is_an_answer(data, tmp_path, finish, message, response, cut):
    """It is asked for, and paid for, once."""
    server = Server(lambda body, attempt: (200, reply_of(finish, **message)))
    for _ in range(2):
        ask_for(server.url, data, tmp_path / "a", "--input", "text", "--limit", "1")
        for line in read_lines(tmp_path / "a"):
            assert (line["response"], line["cut"]) == (response, cut) and "error" not in line
    assert len(server.bodies) == 2


@pytest.mark.parametrize("reply, error", REPLIES)
def test_what_is_no_answer(data, tmp_path, capsys, quick, reply, error):
    """The last row gets this reply, the others an answer; then all of them get it."""
    last = gen_data.load_rows(data, "test")[-1].teacher_prompt("symbols")
    server = Server(lambda body, attempt: reply if body["messages"][0]["content"][0][
        "text"] == last else (200, "<answer>U</answer>"))
    words = ["--input", "text", "--concurrency", "1"]
    ask_for(server.url, data, tmp_path / "a", *words)
    lines = read_lines(tmp_path / "a")
    assert len(lines) == 8 and not any("error" in line for line in lines[:-1])
    assert error in lines[-1]["error"] and lines[-1]["response"] == ""
    assert "7 of 8 rows answered" in capsys.readouterr().out
    everywhere = Server(lambda body, attempt: reply)
    line = stops(capsys, ask_for, everywhere.url, data, tmp_path / "b", *words)
    assert error in line and KEY not in line
    assert "of 8 rows was answered; the first error" in line or "does not answer for org/m" in line


def test_a_server_that_hangs(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ask, "RETRIES", 0)
    server = Server(lambda body, attempt: (time.sleep(2), (200, "late"))[1])
    with pytest.raises(SystemExit):
        ask_for(server.url, data, tmp_path / "a", "--input", "text", "--timeout", "0.3")
    assert "does not answer for org/m: APITimeoutError" in capsys.readouterr().err


@pytest.mark.parametrize("refused", ["max_tokens", "temperature", "both"])
def test_a_server_that_names_another_form(data, tmp_path, capsys, refused):
    """OpenAI's own words for its reasoning models."""
    def script(body, attempt):
        if refused != "temperature" and "max_tokens" in body:
            return 400, {"error": {
                "message": "Unsupported parameter: 'max_tokens' is not supported with this model. "
                           "Use 'max_completion_tokens' instead."}}
        if refused != "max_tokens" and "temperature" in body:
            return 400, {"error": {
                "message": "Unsupported value: 'temperature' does not support 0 with this model. "
                           "Only the default (1) value is supported."}}
        return 200, "<answer>U</answer>"
    server = Server(script)
    ask_for(server.url, data, tmp_path / "a", "--input", "text", "--max_new_tokens", "9",
            "--extra", '{"top_p": 0.9, "chat_template_kwargs": {"enable_thinking": false}}')
    said = capsys.readouterr()
    assert "8 of 8 rows answered" in said.out
    assert said.err.count("warning: ") == (2 if refused == "both" else 1)
    body = server.bodies[-1][2]
    assert body["top_p"] == 0.9 and body["chat_template_kwargs"] == {"enable_thinking": False}
    assert ("temperature" in body) == (refused == "max_tokens")
    name, other = "max_tokens", "max_completion_tokens"
    name, other = (name, other) if refused == "temperature" else (other, name)
    assert body[name] == 9 and other not in body
    line = stops(capsys, ask_for, server.url, data, tmp_path / "a", "--input", "text",
                 "--max_new_tokens", "9")
    assert "extra was {'top_p'" in line


def test_another_split(data, tmp_path, capsys):
    server = Server(lambda body, attempt: (200, "<answer>U</answer>"))
    ask_for(server.url, data, tmp_path / "a", "--split", "val", "--tasks", "frozenlake")
    rows = gen_data.load_rows(data, "val")
    assert [line["id"] for line in read_lines(tmp_path / "a")] == [rows[0].id]
    assert "--split val" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["{", "[1]", "{top_p: 0.9}", "7"])
def test_extra_fields_that_are_no_json_object(capsys, text):
    words = ["--api_base", "http://x/v1", "--api_model", "m", "--out", "x", "--extra", text]
    line = stops(capsys, ask.parse_args, words)
    assert f"argument --extra: invalid json_object value: {text!r}" in line


def test_the_printed_command_runs_as_it_is_printed(data, tmp_path, capsys):
    """With blanks in the paths, and the split that was asked about."""
    folder = tmp_path / "Colab Notebooks"
    shutil.copytree(data, folder / "my data")
    server = Server(lambda body, attempt: (200, "<answer>U</answer>"))
    ask_for(server.url, folder / "my data", folder / "my answers.jsonl", "--split", "val")
    printed = shlex.split(capsys.readouterr().out.rpartition("; next: ")[2])
    assert printed[:2] == ["python", "evaluate.py"]
    evaluate.main(evaluate.parse_args([*printed[2:], "--out", str(tmp_path / "eval")]))
    files = list(tmp_path.glob("eval/*/predictions.jsonl"))
    assert len(files) == 1 and len(read_lines(files[0])) == 2


def test_a_message_is_masked_only_where_there_is_a_key(data, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    server = Server(lambda body, attempt: (401, {"error": {"message": "no key, none was given"}}))
    line = stops(capsys, ask_for, server.url, data, tmp_path / "a", "--input", "text")
    assert "no key, none was given" in line


# ---------------------------------------------------------------- pictures

def test_pictures_are_sent_as_they_are(tmp_path):
    """The file's own bytes where they show what the stages see; else a PNG of that."""
    pixels = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    image, turned = Image.fromarray(pixels), Image.Exif()
    turned[0x0112] = 6                                     # lies on its side
    clear = image.convert("RGBA")
    clear.putalpha(100)
    kinds = {"a.jpg": (image, {}), "b.png": (image, {}), "c.webp": (image, {}),
             "d.jpg": (image.convert("L"), {}), "turned.jpg": (image, {"exif": turned}),
             "clear.png": (clear, {}), "e.bmp": (image, {}), "f.gif": (image, {})}
    for name, (picture, options) in kinds.items():
        file = tmp_path / name
        picture.save(file, **options)
        head, _, content = ask.data_url(file).partition(";base64,")
        content = base64.b64decode(content)
        seen, sent = gen_data.open_picture(file), Image.open(io.BytesIO(content))
        assert head == f"data:image/{sent.format.lower()}"
        assert np.array_equal(np.asarray(seen), np.asarray(sent.convert("RGB"))), name
        assert (content == file.read_bytes()) == (len(name.partition(".")[0]) == 1
                                                  and name[0] in "abcd"), name


@pytest.mark.parametrize("form", ["{}", "../../{name}", "sub/../../../{name}"])
def test_a_foreign_folder_sends_no_other_pictures(tmp_path, capsys, form):
    """Names of pictures are relative and below their folder, else nothing is asked."""
    secret = tmp_path / "secret.png"
    Image.new("RGB", (64, 64), "red").save(secret)
    (tmp_path / "data/test/sub").mkdir(parents=True)
    name = form.format(secret, name=secret.name)
    row = {"file_name": name, "id": "a", "prompt": "What?", "symbols": "x"}
    (tmp_path / "data/test/metadata.jsonl").write_text(json.dumps(row) + "\n")
    server = Server(lambda body, attempt: (200, "x"))
    assert "line 1" in stops(capsys, ask_for, server.url, tmp_path / "data", tmp_path / "a")
    assert not server.bodies


def test_a_broken_picture_is_told_before_the_first_request(data, tmp_path, capsys):
    broken = shutil.copytree(data, tmp_path / "data")
    next((broken / "test").glob("*.png")).write_bytes(b"no picture")
    server = Server(lambda body, attempt: (200, "x"))
    line = stops(capsys, ask_for, server.url, broken, tmp_path / "a")
    assert "cannot be read as a picture" in line and not server.bodies


@pytest.mark.parametrize("name, value", [
    ("HTTP_PROXY", "foo://me:hidden@h:1"), ("ALL_PROXY", "http://me:hidden@127.0.0.1:1")])
def test_a_server_on_this_machine_needs_no_proxy(data, tmp_path, monkeypatch, capsys, quick, name,
                                                 value):
    """Another one is asked through it; its password is told nowhere."""
    for known in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(known, raising=False)
        monkeypatch.delenv(known.lower(), raising=False)
    monkeypatch.setenv(name, value)
    words = ["--input", "text", "--limit", "1"]
    assert "hidden" not in stops(
        capsys, ask_for, "http://example.invalid/v1", data, tmp_path / "a", *words)
    server = Server(lambda body, attempt: (200, "<answer>U</answer>"))
    ask_for(server.url, data, tmp_path / "b", *words)
    ask_for(server.url.replace("127.0.0.1", "localhost"), data, tmp_path / "c", *words)
    assert len(server.bodies) == 4


def test_files_whose_names_differ_behind_a_dot(data, tmp_path, capsys):
    """gpt-4.1 and gpt-4.5 are two files with two records; two processes never share one."""
    server = Server(lambda body, attempt: (200, "<answer>U</answer>"))
    for name in ("gpt-4.1", "gpt-4.5"):
        ask_for(server.url, data, tmp_path / name, "--input", "text", "--api_model", name)
    asked = len(server.bodies)
    for name in ("gpt-4.1", "gpt-4.5"):
        ask_for(server.url, data, tmp_path / name, "--input", "text", "--api_model", name)
        record = json.loads((tmp_path / f"{name}.settings.json").read_text())
        assert record["api_model"] == name
    assert len(server.bodies) == asked == 16
    lock = gen_data.lock_file(tmp_path / "gpt-4.1.lock", "gpt-4.1")
    with pytest.raises(SystemExit):
        ask_for(server.url, data, tmp_path / "gpt-4.1", "--input", "text")
    assert "another process is writing to" in capsys.readouterr().err
    lock.release()


@pytest.mark.parametrize("key", [KEY + "\r\n", f"{KEY}\n", f" {KEY} ", KEY[:5] + "\n" + KEY[5:]])
def test_a_key_is_stripped_and_never_shown(data, tmp_path, monkeypatch, capsys, quick, key):
    """A .env of Windows leaves a line end; a broken key is refused without being told."""
    monkeypatch.setenv("OPENAI_API_KEY", key)
    server = Server(lambda body, attempt: (401, None))
    with pytest.raises(SystemExit) as stop:
        ask_for(server.url, data, tmp_path / "answers.jsonl", "--input", "text", "--limit", "1")
    said = capsys.readouterr()
    assert stop.value.code == 2
    for part in (KEY, KEY[:8], KEY[5:]):
        assert part not in said.out + said.err
    assert all(sent == f"Bearer {KEY}" for _, sent, _ in server.bodies)


def test_answers_of_a_torn_file_are_not_asked_for_again(data, tmp_path, capsys):
    """A broken line or record is told in one line; what is there, and was paid for, stays."""
    server, out = Server(lambda body, attempt: (200, "x")), tmp_path / "answers.jsonl"
    ask_for(server.url, data, out, "--input", "text")
    asked, record = len(server.bodies), tmp_path / "answers.jsonl.settings.json"
    for file, content in ((out, b"\0\n" + out.read_bytes()), (record, b"[")):
        before = file.read_bytes()
        file.write_bytes(content)
        stops(capsys, ask_for, server.url, data, out, "--input", "text")
        assert file.read_bytes() == content
        file.write_bytes(before)
    ask_for(server.url, data, out, "--input", "text")
    assert len(server.bodies) == asked


@pytest.mark.slow
def test_transformers_serve_gives_the_local_answers(data, tmp_path):
    """The same greedy answers over HTTP and here, from pictures and from symbols."""
    pytest.importorskip("fastapi", reason="`transformers serve` needs fastapi and uvicorn")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = open(tmp_path / "serve.log", "w")
    server = subprocess.Popen(
        [str(Path(sys.executable).with_name("transformers")), "serve", common.TINY, "--host",
         "127.0.0.1", "--port", str(port), "--device", "cpu"], stdout=log, stderr=log,
        env={**os.environ, "HF_HUB_OFFLINE": "1"})
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).read()
                break
            except OSError:
                assert server.poll() is None, (tmp_path / "serve.log").read_text()
                time.sleep(0.5)
        evaluate.main(evaluate.parse_args([
            "--preset", "tiny", "--data", str(data), "--out", str(tmp_path / "eval"),
            "--max_new_tokens", "120"]))
        for source in ("image", "text"):
            ask.main(ask.parse_args([
                "--data", str(data), "--out", str(tmp_path / f"{source}.jsonl"), "--input", source,
                "--api_base", f"http://127.0.0.1:{port}/v1", "--api_model", common.TINY,
                "--max_new_tokens", "120", "--concurrency", "2"]))
    finally:
        server.terminate()
        server.wait()
        log.close()
    for source in ("image", "text"):
        here = read_lines(tmp_path / f"eval/base-{source}/predictions.jsonl")
        there = read_lines(tmp_path / f"{source}.jsonl")
        assert [v["response"] for v in here] == [v["response"] for v in there]
        assert [v["cut"] for v in here] == [v["cut"] for v in there]
