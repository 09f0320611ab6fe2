"""Evaluation speed: answers per second of the product's models against the loop, the server and the generate that one could use instead."""

import argparse
import asyncio
import json
import os
import socket
import subprocess
import sys
import tarfile
import time
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROJECT = ROOT / "<<cookiecutter.project>>"
WORK = ROOT / "build" / "evaluation"
DEMO = ROOT / "build" / "demo" / "outputs"
REPORT = Path(__file__).with_suffix(".md")
CONTEXT, TOKENS, SLOTS, THREADS = 2048, 96, 16, os.cpu_count() or 2


def timed(ask) -> tuple[float, object]:
    """Seconds of a call, and its result."""
    begin = time.perf_counter()
    found = ask()
    return time.perf_counter() - begin, found


def figures(seconds: float, texts: list[str], tokens: int, like: list[str] | None = None) -> dict:
    """Speed of one way, and on how many rows its texts are those of `like`."""
    found = {"seconds": round(seconds, 2), "tokens": tokens, "tokens_per_s": round(tokens / seconds, 1), "rows_per_s": round(len(texts) / seconds, 3)}
    return found | ({"same": sum(a == b for a, b in zip(texts, like, strict=True))} if like else {})


def build_server() -> Path | None:
    """llama.cpp's server, compiled once from the sources that the installed llama-cpp-python was built from."""
    home = WORK / f"llama.cpp-{version('llama-cpp-python')}"
    binary = home / "build" / "bin" / "llama-server"
    if binary.is_file():
        return binary
    try:
        home.mkdir(parents=True, exist_ok=True)
        package = f"llama-cpp-python=={version('llama-cpp-python')}"
        get = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", "llama-cpp-python", "-d", str(home), package]
        subprocess.run(get, check=True)
        with tarfile.open(next(home.glob("*.tar.gz"))) as tar:
            tar.extractall(home, filter="data")
        source = next(home.glob("*/vendor/llama.cpp"))
        off = [f"-D{name}=OFF" for name in ("LLAMA_BUILD_TESTS", "LLAMA_BUILD_EXAMPLES", "LLAMA_OPENSSL", "LLAMA_USE_PREBUILT_UI")]
        subprocess.run(["cmake", "-S", str(source), "-B", str(home / "build"), "-DCMAKE_BUILD_TYPE=Release", *off], check=True)
        subprocess.run(["cmake", "--build", str(home / "build"), "--target", "llama-server", "-j", str(THREADS)], check=True)
    except (subprocess.CalledProcessError, FileNotFoundError, StopIteration) as error:
        print(f"no server: {error}", file=sys.stderr)
        return None
    return binary


@contextmanager
def serving(binary: Path, gguf: Path, *options: str):
    """The address of a server with SLOTS slots over the file."""
    import httpx

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(binary), "-m", str(gguf), "-np", str(SLOTS), "-c", str(SLOTS * CONTEXT), "-t", str(THREADS), "-tb", str(THREADS)]
    command += ["--port", str(port), "--jinja", *options]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(300):
            try:
                if httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                    break
            except httpx.TransportError:
                pass
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait()


def load(url: str, prompts, concurrency: int) -> list[tuple[str, int]]:
    """A plain load generator: bare HTTP posts, `concurrency` at a time. Text and generated tokens of each answer."""
    import httpx

    async def main():
        found, queue = {}, list(enumerate(prompts))[::-1]
        async with httpx.AsyncClient(timeout=600) as client:

            async def worker():
                while queue:
                    n, prompt = queue.pop()
                    form = {"model": "m", "messages": prompt.messages, "max_tokens": prompt.max_tokens, "temperature": 0.0}
                    out = (await client.post(f"{url}/chat/completions", json=form)).json()
                    found[n] = out["choices"][0]["message"]["content"], out["usage"]["completion_tokens"]

            await asyncio.gather(*(worker() for _ in range(concurrency)))
        return [found[n] for n in range(len(prompts))]

    return asyncio.run(main())


def runtime(gguf: Path, prompts, repeat: int) -> dict:
    """One by one through create_chat_completion; ours; the server at the same parallelism; ours against that server."""
    import llama_cpp
    from slm.models.llama_cpp import LlamaCppModel
    from slm.models.openai_api import OpenAIModel
    from slm.settings import Endpoint

    found = {"file": gguf.name, "rows": len(prompts), "slots": SLOTS}
    greedy = {"max_tokens": TOKENS, "temperature": 0.0, "top_p": 1.0, "repeat_penalty": 1.0}
    llama = llama_cpp.Llama(str(gguf), n_ctx=CONTEXT, n_threads=THREADS, n_threads_batch=THREADS, verbose=False, seed=0)
    llama.create_chat_completion(prompts[0].messages, **greedy)
    seconds, outs = timed(lambda: [llama.create_chat_completion(p.messages, **greedy) for p in prompts])
    loop = [out["choices"][0]["message"]["content"] for out in outs]
    found["loop"] = figures(seconds, loop, sum(out["usage"]["completion_tokens"] for out in outs))
    llama.close()
    model = LlamaCppModel(gguf, context=CONTEXT, threads=THREADS, slots=SLOTS)
    model.answer(prompts[:1])
    runs = [timed(lambda: model.answer(prompts)) for _ in range(repeat)]
    seconds, answers = min(runs, key=lambda run: run[0])
    found["ours"] = figures(seconds, [a.text for a in answers], sum(a.completion_tokens for a in answers), loop)
    found["differing"] = [
        {"row": n, "loop": a, "ours": b.text, "log_probability": round(min((log for _, log in b.pieces), default=0.0), 2)}
        for n, (a, b) in enumerate(zip(loop, answers, strict=True)) if a != b.text
    ]  # fmt: skip
    model.close()
    found["ratio_to_loop"] = round(found["ours"]["rows_per_s"] / found["loop"]["rows_per_s"], 3)
    if binary := build_server():
        for name, options in (("server", ()), ("server_without_flash_attention", ("-fa", "off"))):
            with serving(binary, gguf, *options) as url:
                load(url, prompts[:SLOTS], SLOTS)
                seconds, outs = timed(lambda: load(url, prompts, SLOTS))
                found[name] = figures(seconds, [text for text, _ in outs], sum(n for _, n in outs), loop)
                if name == "server":
                    endpoint = OpenAIModel(Endpoint(url=url, model="m", concurrency=SLOTS, timeout_s=600))
                    seconds, answers = timed(lambda: endpoint.answer(prompts))
                    found["endpoint"] = figures(seconds, [a.text for a in answers], sum(a.completion_tokens for a in answers), loop)
        found["ratio_to_server"] = round(found["ours"]["rows_per_s"] / found["server"]["rows_per_s"], 3)
        found["ratio_to_load_generator"] = round(found["endpoint"]["rows_per_s"] / found["server"]["rows_per_s"], 3)
    return found


def stub(prompts) -> dict:
    """The endpoint client against a server that answers after 20 ms: what the client itself costs."""
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
    from threading import Thread

    from slm.models.openai_api import OpenAIModel
    from slm.settings import Endpoint

    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "{}"}}
    usage = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    body = json.dumps({"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice], "usage": usage}).encode()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            time.sleep(0.02)
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=http.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{http.server_port}/v1"
    many = (prompts * (2000 // len(prompts) + 1))[:2000]
    endpoint = OpenAIModel(Endpoint(url=url, model="m", concurrency=8))
    endpoint.answer(many[:100])
    load(url, many[:100], 8)
    ours, plain = timed(lambda: endpoint.answer(many))[0], timed(lambda: load(url, many, 8))[0]
    http.shutdown()
    return {"requests": len(many), "concurrency": 8, "ours_per_s": round(len(many) / ours, 1), "plain_per_s": round(len(many) / plain, 1), "ratio": round(plain / ours, 3)}


def transformers(folder: Path, prompts, sizes: list[int]) -> dict:
    """Ours against `generate` over batches sorted by length and padded on the left, the best of several batch sizes."""
    import torch
    from slm.models.hf import HFModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    texts = [tokenizer.apply_chat_template(p.messages, tokenize=False, add_generation_prompt=True, enable_thinking=False) for p in prompts]
    lengths = [len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    order = sorted(range(len(texts)), key=lambda n: -lengths[n])

    def generate(size: int) -> tuple[list[str], int]:
        found, tokens = {}, 0
        for start in range(0, len(order), size):
            picked = order[start : start + size]
            inputs = tokenizer([texts[n] for n in picked], add_special_tokens=False, padding=True, return_tensors="pt")
            with torch.inference_mode():
                out = plain.generate(**inputs, max_new_tokens=TOKENS, do_sample=False, pad_token_id=tokenizer.pad_token_id)
            answers = out[:, inputs["input_ids"].shape[1] :]
            tokens += int((answers != tokenizer.pad_token_id).sum()) - int((answers == tokenizer.eos_token_id).sum())
            found |= zip(picked, tokenizer.batch_decode(answers, skip_special_tokens=True), strict=True)
        return [found[n] for n in range(len(texts))], tokens

    found = {"rows": len(prompts), "prompt_tokens": round(sum(lengths) / len(lengths)), "by_hand": {}}
    for size in sizes:
        seconds, (answers, tokens) = timed(lambda size=size: generate(size))
        found["by_hand"][size] = figures(seconds, answers, tokens)
    del plain
    model = HFModel(folder, "bench", batch_size=sizes[0])
    model.answer(prompts[:1])
    seconds, ours = timed(lambda: model.answer(prompts))
    found["ours"] = figures(seconds, [a.text for a in ours], sum(a.completion_tokens for a in ours), answers)
    best = max(way["rows_per_s"] for way in found["by_hand"].values())
    return found | {"batch": sizes[0], "ratio": round(found["ours"]["rows_per_s"] / best, 3)}


def main() -> None:
    """Measure, keep the figures, write the report, and print the figures as one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gguf", type=Path, default=DEMO / "gguf" / "demo" / "model-q8_0.gguf", help="made by `make demo`")
    parser.add_argument("--folder", type=Path, default=DEMO / "merged" / "demo", help="the merged model of `make demo`")
    parser.add_argument("--rows", type=int, default=160, help="of dev and golden")
    parser.add_argument("--parts", default="runtime,endpoint,transformers,fewshot")
    options = parser.parse_args()
    sys.path.insert(0, str(PROJECT))
    from slm.models import Prompt
    from slm.models.embedded import folder, gguf_file
    from slm.rows import read_rows
    from task.contract import contract
    from task.prompts import fewshot

    gguf = options.gguf if options.gguf.is_file() else gguf_file()
    merged = options.folder if (options.folder / "config.json").is_file() else folder()
    rows = [row for name in ("dev", "golden") for row in read_rows(PROJECT / f"data/eval/{name}.jsonl")][: options.rows]
    seed = read_rows(PROJECT / "data/raw/seed.jsonl")[:8]
    prompts = [Prompt(contract.prompt(row.user), TOKENS) for row in rows]
    shown = [Prompt([*fewshot(contract, seed), {"role": "user", "content": row.user}], TOKENS) for row in rows[:48]]
    parts = {
        "runtime": lambda: runtime(gguf, prompts, 1),
        "endpoint": lambda: stub(prompts),
        "transformers": lambda: transformers(merged, prompts, [16, 32]),
        "fewshot": lambda: transformers(folder(), shown, [16, 8]),
    }
    WORK.mkdir(parents=True, exist_ok=True)
    kept = WORK / "figures.json"
    found = json.loads(kept.read_text()) if kept.is_file() else {}
    for name in options.parts.split(","):
        found[name] = parts[name]() | {"load": round(os.getloadavg()[0], 1)}
        print(name, found[name], file=sys.stderr, flush=True)
        kept.write_text(json.dumps(found, indent=1, ensure_ascii=False))
    if set(parts) <= set(found):
        REPORT.write_text(markdown(found), encoding="utf-8")
    print(json.dumps({"benchmark": "evaluation", **found}, ensure_ascii=False))


if __name__ == "__main__":
    main()
