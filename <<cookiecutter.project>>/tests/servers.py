"""Servers for tests: HTTP doubles on this machine, and real ones in a process of their own."""

import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest


@contextmanager
def double(reply):
    """A server whose answer to a request is `reply(body)`: a status, what is sent (JSON, or bytes as they are) and
    headers; `body` is the request's JSON, None without one. Gives its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            length = int(self.headers.get("Content-Length") or 0)
            status, sent, headers = reply(json.loads(self.rfile.read(length)) if length else None)
            data = sent if isinstance(sent, bytes) else json.dumps(sent).encode()
            self.send_response(status)
            for name, value in ({"Content-Type": "application/json", "Content-Length": str(len(data))} | headers).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(b"" if self.command == "HEAD" else data)

        do_GET = do_HEAD = do_POST

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def completion(content, finish="stop", prompt_tokens=100, completion_tokens=50):
    """The body of an OpenAI-compatible chat completion."""
    total = prompt_tokens + completion_tokens
    usage = {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": total}
    choice = {"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": content}}
    return {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice], "usage": usage}


def last(body):
    """The text of a request's last message."""
    return body["messages"][-1]["content"]


LLAMA_CPP = [sys.executable, "-m", "llama_cpp.server"]


@contextmanager
def real_server(*command):
    """A real server, given `--port`, once it answers: its address and its process. Skips without the packages of
    llama-cpp-python's."""
    if list(command[:3]) == LLAMA_CPP:
        for name in ("fastapi", "sse_starlette", "starlette_context", "pydantic_settings", "uvicorn"):
            pytest.importorskip(name, reason="llama-cpp-python's server is not installed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}/v1"
    with tempfile.TemporaryFile() as said, subprocess.Popen([*command, "--port", str(port)], stdout=said, stderr=said) as server:
        try:
            for _ in range(600):
                assert server.poll() is None, os.pread(said.fileno(), 10**6, 0).decode()[-2000:]
                try:
                    urllib.request.urlopen(f"{address}/models", timeout=5).close()
                    break
                except OSError:
                    time.sleep(0.2)
            yield address, server
        finally:
            server.terminate()
