"""The servers of client/README.md, those that are found here: each started by that table's command, golden rows through client.py."""

import argparse
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

from evaluation import build_server

ROOT = Path(__file__).resolve().parents[2]
PROJECT = ROOT / "<<cookiecutter.project>>"
# A program that is not on PATH is named by its variable; the desktop programs are not started here.
PROGRAMS = {"llama-server": "LLAMA_SERVER", "vllm": "VLLM", "open-webui": "OPEN_WEBUI", "sglang": "SGLANG_PYTHON"}
FRONT = "Open WebUI"  # no runtime of its own: it stands before llama.cpp
ACCOUNT = {"name": "bench", "email": "bench@localhost.localdomain", "password": "only-on-this-machine-1"}
QUIET = {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1",
         "WEBUI_SECRET_KEY": ACCOUNT["password"]}  # else it writes one into the model's folder  # fmt: skip


def recipes(values: dict[str, str]) -> dict[str, tuple[dict[str, str], list[str]]]:
    """Environment and command of each row of the table that is one command, its capitals replaced by `values`."""
    text, found = (PROJECT / "client/README.md").read_text(encoding="utf-8"), {}
    for name, command in re.findall(r"^\| ([^|]+?) \| `([^`]+)`[^`|]*\| http", text, re.MULTILINE):
        words = shlex.split(re.sub(rf"\b({'|'.join(values)})\b", lambda m: values[m[0]], command))
        env = dict(word.split("=", 1) for word in words if re.match("[A-Z_]+=", word))
        found[name] = env, words[len(env) :]
    return found


def program(words: list[str]) -> str:
    """The program that a command starts; empty where it is not installed."""
    name = words[2].split(".")[0] if words[0] == "python" else words[0]
    if name == "llama_cpp":
        return sys.executable if importlib.util.find_spec("fastapi") else ""
    found = os.environ.get(PROGRAMS.get(name, ""), "") or (name in PROGRAMS and shutil.which(name)) or ""
    return found or (str(build_server() or "") if name == "llama-server" else "")


@contextmanager
def started(command: list[str], folder: Path, env: dict[str, str], path: str):
    """The address of a server, once it answers there; `command` gets a free port of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url, log = f"http://127.0.0.1:{port}{path}", tempfile.TemporaryFile()
    given = {"cwd": folder, "env": os.environ | env, "stdout": log, "stderr": subprocess.STDOUT, "start_new_session": True}
    server, begin = subprocess.Popen([*command, "--port", str(port)], **given), time.monotonic()
    try:
        while not _alive(f"{url}/models"):
            if server.poll() is not None or time.monotonic() - begin > 900:
                log.seek(0)
                raise RuntimeError(f"did not start: {log.read().decode(errors='replace')[-1500:]}")
            time.sleep(0.5)
        yield url
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def _alive(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=5).close()
    except urllib.error.HTTPError as error:
        return error.code in (401, 403)  # it answers, and wants a key
    except OSError:
        return False
    return True


def sign_up(url: str) -> str:
    """Open WebUI's first account; returns its key."""
    request = urllib.request.Request(f"{url}/v1/auths/signup", json.dumps(ACCOUNT).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as reply:
        return json.load(reply)["token"]


def ask(client, terms: dict, rows, contract, reference, limit: int) -> dict:
    """What one server does: the check of its prompt, golden rows exactly right and right as `reference`, a caller's wait."""
    from slm.evaluate.scorers import answer_rows
    from slm.models.program import ProgramModel

    problems = []

    def answer(text: str) -> str:
        try:
            return json.dumps(client.ask(terms, text), ensure_ascii=False)
        except client.ClientError as error:
            problems.append(str(error))
            return ""

    try:
        checked = client.check(terms)
    except client.ClientError as error:
        checked = str(error)
    load = round(os.getloadavg()[0], 1)
    scores = answer_rows(ProgramModel("client", answer), rows, contract, limit)
    return {
        "prompt_tokens": checked, "exact": sum(s.exact for s in scores), "rows": len(rows), "errors": len(problems),
        "as_reference": sum(a.parsed == b.parsed for a, b in zip(scores, reference, strict=True)),
        "p50_ms": round(statistics.median(s.latency_s for s in scores) * 1000), "load": load, **({"first_error": problems[0]} if problems else {}),
    }  # fmt: skip


def main() -> None:
    """Ask every server that is found and print the figures as one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, epilog=f"programs by {', '.join(PROGRAMS.values())}, or on PATH")
    parser.add_argument("--project", type=Path, default=ROOT / "build" / "demo", help="made by `make demo`; only read")
    parser.add_argument("--run", default="demo")
    parser.add_argument("--profile", default="cpu")
    parser.add_argument("--only", default="", help="the rows of the table whose name holds this")
    options = parser.parse_args()
    sys.path[:0] = [str(PROJECT), str(options.project)]
    from slm.evaluate.scorers import answer_rows
    from slm.export.merge import adapter_folder
    from slm.models import base_folder, student
    from slm.models.llama_cpp import LlamaCppModel
    from slm.modules import load_module
    from slm.rows import read_rows
    from slm.settings import load_settings
    from task.contract import contract

    settings = load_settings(start=options.project, profile=options.profile, run_id=options.run)
    folder, limit = settings.path(f"outputs/gguf/{options.run}"), settings.evaluate.max_new_tokens
    file = re.search(r"^FROM (\S+)$", (folder / "Modelfile").read_text(encoding="utf-8"), re.MULTILINE)[1]
    client = load_module(folder / "client/client.py")
    terms, rows, found, references = client.load(), read_rows(settings.path("data/eval/golden.jsonl")), {}, {}
    values = {"FILE": file, "NAME": terms["model"], "RUN": options.run, "BASE": str(base_folder(settings))}

    def reference(name: str):
        if (kind := "adapter" if name.startswith(("vLLM", "SGLang")) else file) not in references:
            model = student(settings, adapter_folder(settings)) if kind == "adapter" else LlamaCppModel(
                folder / file, settings.export.context, repeat_penalty=settings.export.repeat_penalty)  # fmt: skip
            references[kind] = answer_rows(model, rows, contract, limit, schema=contract.schema)
            found[f"in process, {kind}"] = {"exact": sum(s.exact for s in references[kind])}
        return references[kind]

    def run(name: str, behind: str = "") -> dict:
        env, words = table[name]
        words, wanted = [program(words), *words[1:]], reference(name)
        env = QUIET | env | ({"OPENAI_API_BASE_URL": behind, "DATA_DIR": tempfile.mkdtemp()} if behind else {})
        with started(words, folder, env, "/api" if behind else "/v1") as url:
            os.environ["API_KEY"] = sign_up(url) if behind else "none"
            return ask(client, terms | {"url": url}, rows, contract, wanted, limit)

    table = recipes(values)
    for name, (_, words) in table.items():
        try:
            if options.only not in name or not program(words):
                found[name] = "not run" if options.only not in name else "not run: not found"
            elif name == FRONT:
                env, first = table["llama.cpp"]
                with started([program(first), *first[1:]], folder, env, "/v1") as behind:
                    found[name] = run(name, behind)
            else:
                found[name] = run(name)
        except (RuntimeError, OSError) as error:
            found[name] = f"failed: {error}"
        print(name, found[name], file=sys.stderr, flush=True)
    print(json.dumps({"benchmark": "serving", "file": file, **found}, ensure_ascii=False))


if __name__ == "__main__":
    main()
