"""--api_base against a scripted server, and against `transformers serve` with the bundled backbone."""
import base64
import io
import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from PIL import Image

import common
import evaluate
import gen_data

pytest.importorskip("openai", reason="the client for --api_base is not installed (requirements-dev.txt)")
KEY = "sk-very-secret"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("api") / "data"
    gen_data.main(gen_data.parse_args(["--preset", "tiny", "--tasks", "frozenlake:3", "minibehaviour:5", "--train", "1", "--val", "1",
                                       "--test", "4", "--workers", "1", "--out", str(folder)]))
    return folder


class Server(ThreadingHTTPServer):
    """Answers each request with what `script(body, attempt)` returns: (status, response text or None)."""

    def __init__(self, script):
        self.script, self.bodies, self.seen, self.busy, self.most, self.lock = script, [], {}, 0, 0, threading.Lock()
        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        server, body = self.server, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.busy += 1
            server.most = max(server.most, server.busy)
            content = json.dumps(body["messages"])
            server.seen[content] = server.seen.get(content, 0) + 1
            attempt = server.seen[content]
            server.bodies.append((self.path, self.headers["Authorization"], body))
        time.sleep(0.02)
        status, text = server.script(body, attempt)
        reply = {"choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}],
                 "usage": {"prompt_tokens": 1, "completion_tokens": 7, "total_tokens": 8}, "id": "x", "object": "chat.completion",
                 "created": 0, "model": body["model"]} if status == 200 else {"error": {"message": f"bad key {KEY}"}}
        with server.lock:
            server.busy -= 1
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("retry-after-ms", "5")                      # so that the test does not wait for the back-off
        self.end_headers()
        self.wfile.write(json.dumps(reply).encode())

    def log_message(self, *_):
        pass


def ask(url, data, out, *more):
    evaluate.main(evaluate.parse_args(["--preset", "tiny", "--data", str(data), "--out", str(out), "--api_base", url, "--api_model", "org/m",
                                       "--concurrency", "3", *more]))


def test_a_busy_server_and_a_row_that_fails(data, tmp_path, monkeypatch, capsys):
    """Every request meets a 429 and a 500 first; one row never gets an answer. Then that row alone is asked again."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    rows, broken = gen_data.load_rows(data, "test"), {"yes": True}
    answers = {base64.b64encode(Path(row["path"]).read_bytes()).decode(): gen_data.response(row) for row in rows}

    def script(body, attempt):
        picture = body["messages"][0]["content"][0]["image_url"]["url"].removeprefix("data:image/png;base64,")
        assert Image.open(io.BytesIO(base64.b64decode(picture))).format == "PNG"
        if broken["yes"] and list(answers).index(picture) == 2:
            return 503, None
        return {1: (429, None), 2: (500, None)}.get(attempt, (200, answers[picture]))
    server = Server(script)
    ask(server.url, data, tmp_path, "--input", "image")
    found = [json.loads(line) for line in open(tmp_path / "org_m-image/predictions.jsonl")]
    assert [(v["id"], v["outcome"]) for v in found] == [(row["id"], "error" if i == 2 else "success") for i, row in enumerate(rows)]
    assert "503" in found[2]["error"] and found[0]["tokens"] == 7 and found[0]["cut"] is False
    table = json.loads((tmp_path / "org_m-image/summary.json").read_text())["table"]
    assert next(c for c in table if (c["task"], c["level"]) == ("macro", None)) | {"n": 8, "success": 0.875, "faults": {"error": 1}} in table
    path, key, body = server.bodies[0]
    assert (path, key, body["model"], body["temperature"], body["max_tokens"]) == ("/v1/chat/completions", f"Bearer {KEY}", "org/m", 0, 1024)
    assert body["messages"][0]["content"][1]["text"] == gen_data.student_prompt(rows[0]) and server.most <= 3
    count = max(server.seen.values())
    assert count == 6                                                # once and five times more
    broken["yes"] = False
    before = len(server.bodies)
    ask(server.url, data, tmp_path, "--input", "image")
    assert len(server.bodies) - before == 1                          # the row that failed, and no other
    assert all(json.loads(line)["outcome"] == "success" for line in open(tmp_path / "org_m-image/predictions.jsonl"))
    said = capsys.readouterr()
    assert KEY not in said.out + said.err
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and KEY in path.read_text(errors="replace")]


@pytest.mark.parametrize("status", [401, 404, None])
def test_a_server_of_no_use_stops_the_run(data, tmp_path, monkeypatch, capsys, status):
    """A refused key, an unknown model, nobody there: one line, exit code 2, no row is spent on it."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    if status:
        url = Server(lambda body, attempt: (status, None)).url
    else:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
        monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.001)
    with pytest.raises(SystemExit) as stop:
        ask(url, data, tmp_path, "--input", "text")
    said = capsys.readouterr()
    assert stop.value.code == 2 and "does not answer for org/m" in said.err and KEY not in said.out + said.err
    assert not (tmp_path / "org_m-text/summary.json").exists()


@pytest.mark.slow
def test_transformers_serve_gives_the_local_answers(data, tmp_path):
    """The same greedy answers over HTTP and here, from pictures and from symbols."""
    pytest.importorskip("fastapi", reason="`transformers serve` needs fastapi and uvicorn (requirements-dev.txt)")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = open(tmp_path / "serve.log", "w")
    server = subprocess.Popen([str(Path(sys.executable).with_name("transformers")), "serve", common.TINY, "--host", "127.0.0.1",
                               "--port", str(port), "--device", "cpu"], stdout=log, stderr=log, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).read()
                break
            except OSError:
                assert server.poll() is None, (tmp_path / "serve.log").read_text()
                time.sleep(0.5)
        words = ["--preset", "tiny", "--data", str(data), "--out", str(tmp_path / "eval"), "--max_new_tokens", "120"]
        evaluate.main(evaluate.parse_args(words))
        evaluate.main(evaluate.parse_args([*words, "--api_base", f"http://127.0.0.1:{port}/v1", "--api_model", common.TINY,
                                           "--name", "served", "--concurrency", "2"]))
    finally:
        server.terminate()
        server.wait()
        log.close()
    for source in ("image", "text"):
        here, there = ([json.loads(line) for line in open(tmp_path / "eval" / f"{name}-{source}/predictions.jsonl")] for name in ("base", "served"))
        assert [v["response"] for v in here] == [v["response"] for v in there]
        assert [v["cut"] for v in here] == [v["cut"] for v in there]
