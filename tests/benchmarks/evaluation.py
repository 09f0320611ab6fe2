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
HEAD = "| | seconds | tokens/s | rows/s | same text as {} |\n|---|---|---|---|---|"
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
        async with httpx.AsyncClient(timeout=600, transport=httpx.AsyncHTTPTransport(retries=2)) as client:

            async def worker():
                while queue:
                    n, prompt = queue.pop()
                    form = {"model": "m", "messages": prompt.messages, "max_tokens": prompt.max_tokens, "temperature": 0.0}
                    out = (await client.post(f"{url}/chat/completions", json=form)).json()
                    found[n] = out["choices"][0]["message"]["content"], out["usage"]["completion_tokens"]

            await asyncio.gather(*(worker() for _ in range(concurrency)))
        return [found[n] for n in range(len(prompts))]

    return asyncio.run(main())


def runtime(gguf: Path, prompts, rounds: int) -> dict:
    """One by one through create_chat_completion, ours, and llama.cpp's server at the same parallelism, taken in turns; the
    best of each counts. The endpoint client against a plain load generator, on a server that has seen all prompts."""
    import llama_cpp
    from slm.models.llama_cpp import LlamaCppModel
    from slm.models.openai_api import OpenAIModel
    from slm.sections import Endpoint

    binary, found = build_server(), {"file": gguf.name, "rows": len(prompts), "slots": SLOTS, "threads": THREADS, "rounds": []}
    llama = llama_cpp.Llama(str(gguf), n_ctx=CONTEXT, n_threads=THREADS, n_threads_batch=THREADS, verbose=False, seed=0)
    model = LlamaCppModel(gguf, context=CONTEXT, threads=THREADS, slots=SLOTS)

    def one_by_one() -> list[tuple[str, int]]:
        options = {"max_tokens": TOKENS, "temperature": 0.0, "top_p": 1.0, "repeat_penalty": 1.0}
        outs = [llama.create_chat_completion(p.messages, **options) for p in prompts]
        return [(out["choices"][0]["message"]["content"], out["usage"]["completion_tokens"]) for out in outs]

    def served(*options: str) -> tuple[float, list[tuple[str, int]]]:
        with serving(binary, gguf, *options) as url:
            load(url, prompts[:SLOTS], SLOTS)
            return timed(lambda: load(url, prompts, SLOTS))

    ways = {"loop": lambda: timed(one_by_one), "ours": lambda: timed(lambda: plain(model.answer(prompts)))}
    if binary:
        ways |= {"server": served, "server, no flash attention": lambda: served("-fa", "off")}
    plain(model.answer(prompts[:1]))
    runs = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            runs[name].append(way())
            print(name, round(runs[name][-1][0], 1), file=sys.stderr, flush=True)
        found["rounds"].append({name: round(done[-1][0], 2) for name, done in runs.items()})
    best = {name: min(done, key=lambda run: run[0]) for name, done in runs.items()}
    loop = [text for text, _ in best["loop"][1]]
    for name, (seconds, outs) in best.items():
        found[name] = figures(seconds, [text for text, _ in outs], sum(n for _, n in outs), loop)
    pairs = zip(loop, best["ours"][1], strict=True)
    found["differing"] = [{"row": n, "loop": a, "ours": b} for n, (a, (b, _)) in enumerate(pairs) if a != b]
    found["ratio_to_loop"] = round(best["loop"][0] / best["ours"][0], 3)
    llama.close()
    model.close()
    if binary:
        found["ratio_to_server"] = round(best["server"][0] / best["ours"][0], 3)
        with serving(binary, gguf) as url:
            load(url, prompts, SLOTS)
            client = OpenAIModel(Endpoint(url=url, model="m", concurrency=SLOTS, timeout_s=600))
            turns = [(timed(lambda: load(url, prompts, SLOTS))[0], timed(lambda: client.answer(prompts))[0]) for _ in range(2)]
        direct, ours = (min(seconds) for seconds in zip(*turns, strict=True))
        found["endpoint"] = {"plain_s": round(direct, 2), "ours_s": round(ours, 2), "ratio": round(direct / ours, 3)}
    return found


def plain(answers) -> list[tuple[str, int]]:
    """Texts and generated tokens."""
    return [(a.text, a.completion_tokens) for a in answers]


def answering(port) -> None:
    """A server that answers anything after 200 ms; puts its port into `port`."""
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "{}"}}
    usage = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    reply = {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice], "usage": usage}
    body = json.dumps(reply).encode()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            time.sleep(0.2)
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    ThreadingHTTPServer.request_queue_size = 64
    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    port.value = http.server_port
    http.serve_forever()


def client(prompts) -> dict:
    """The endpoint client against a server that answers after 200 ms, 16 at a time: what the client itself costs."""
    import multiprocessing

    from slm.models.openai_api import OpenAIModel
    from slm.sections import Endpoint

    fork = multiprocessing.get_context("fork")
    port = fork.Value("i", 0)
    server = fork.Process(target=answering, args=(port,), daemon=True)
    server.start()
    while not port.value:
        time.sleep(0.05)
    url, many = f"http://127.0.0.1:{port.value}/v1", (prompts * (800 // len(prompts) + 1))[:800]
    endpoint = OpenAIModel(Endpoint(url=url, model="m", concurrency=16))
    endpoint.answer(many[:32])
    turns = [(timed(lambda: load(url, many, 16))[0], timed(lambda: endpoint.answer(many))[0]) for _ in range(2)]
    server.terminate()
    direct, ours = (min(seconds) for seconds in zip(*turns, strict=True))
    return {"requests": len(many), "plain_per_s": round(800 / direct, 1), "ours_per_s": round(800 / ours, 1), "ratio": round(direct / ours, 3)}


def transformers(folder: Path, prompts, sizes: list[int]) -> dict:
    """Ours against `generate` over batches sorted by length and padded on the left, the best of several batch sizes."""
    import torch
    from slm.models.hf import HFModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    texts = [tokenizer.apply_chat_template(p.messages, tokenize=False, add_generation_prompt=True, enable_thinking=False) for p in prompts]
    lengths = [len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    order = sorted(range(len(texts)), key=lambda n: -lengths[n])

    def generate(size: int) -> tuple[list[str], int]:
        found, tokens = {}, 0
        for start in range(0, len(order), size):
            picked = order[start : start + size]
            inputs = tokenizer([texts[n] for n in picked], add_special_tokens=False, padding=True, return_tensors="pt")
            with torch.inference_mode():
                out = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False, pad_token_id=tokenizer.pad_token_id)
            answers = out[:, inputs["input_ids"].shape[1] :]
            tokens += int((answers != tokenizer.pad_token_id).sum()) - int((answers == tokenizer.eos_token_id).sum())
            found |= zip(picked, tokenizer.batch_decode(answers, skip_special_tokens=True), strict=True)
        return [found[n] for n in range(len(texts))], tokens

    found = {"rows": len(prompts), "prompt_tokens": round(sum(lengths) / len(lengths)), "by_hand": {}}
    for size in sizes:
        seconds, (answers, tokens) = timed(lambda size=size: generate(size))
        found["by_hand"][size] = figures(seconds, answers, tokens)
    del model
    model = HFModel(folder, "bench", batch_size=sizes[0])
    model.answer(prompts[:1])
    seconds, ours = min((timed(lambda: model.answer(prompts)) for _ in range(2)), key=lambda run: run[0])
    found["ours"] = figures(seconds, [a.text for a in ours], sum(a.completion_tokens for a in ours), answers)
    best = max(way["rows_per_s"] for way in found["by_hand"].values())
    return found | {"batch": sizes[0], "ratio": round(found["ours"]["rows_per_s"] / best, 3)}


def markdown(found: dict) -> str:
    """The report."""
    run, calls = found["runtime"], found["client"]

    def line(name: str, way: dict, rows: int) -> str:
        same = f"{way['same']} of {rows}" if "same" in way else "-"
        return f"| {name} | {way['seconds']} | {way['tokens_per_s']} | {way['rows_per_s']:.2f} | {same} |"

    names = {"loop": "one by one, `create_chat_completion`", "ours": "**`LlamaCppModel`**", "server": "llama.cpp's server"}
    names["server, no flash attention"] = "llama.cpp's server, `-fa off`"
    table = [line(title, run[name], run["rows"]) for name, title in names.items() if name in run]
    tables = []
    for part, title in (("transformers", "the contract's prompt"), ("fewshot", "eight solved examples before it")):
        one = found[part]
        ways = [line(f"`generate`, batches of {size}", way, one["rows"]) for size, way in one["by_hand"].items()]
        ours = line(f"**`HFModel`**, batches of {one['batch']}", one["ours"], one["rows"])
        words = f"{one['rows']} rows, {title}: {one['prompt_tokens']} tokens a prompt. Ratio to the best: **{one['ratio']:.2f}**."
        tables.append("\n".join([words, "", HEAD.format("the last `generate`"), *ways, ours]))
    differing = [f"* row {d['row']}: loop `{d['loop']}`, ours `{d['ours']}`" for d in run["differing"]] or ["None."]
    server, endpoint = run.get("ratio_to_server", "not run"), run.get("endpoint", {"ratio": "not run"})["ratio"]
    lines = "\n".join(differing)
    return f"""# How quickly an evaluation is answered

{time.strftime("%Y-%m-%d")}, {THREADS} cores, llama-cpp-python {version("llama-cpp-python")}, torch {version("torch")}, transformers
{version("transformers")}. Written by `make bench NAME=evaluation` after `make demo`, whose fine-tuned model it asks: dev rows of the
default starter, greedy, at most {TOKENS} tokens. Ratios compare ways that took turns in one run; of {len(run["rounds"])} rounds the best counts.
With other work on the machine the seconds change by half and the ratios by a tenth.

| goal | measured | wanted |
|---|---|---|
| in process against one by one, rows a second | {run["ratio_to_loop"]} | 1.7 |
| in process against llama.cpp's server at the same parallelism | {server} | 0.9 |
| same answers as one by one | {run["ours"]["same"] / run["rows"]:.1%} | 99 % |
| transformers against `generate` by hand, short / few-shot prompts | {found["transformers"]["ratio"]} / {found["fewshot"]["ratio"]} | 0.9 |
| endpoint client against a plain load generator: that server / a server that waits 200 ms | {endpoint} / {calls["ratio"]} | 0.95 |

## In process: `{run["file"]}`, {run["rows"]} rows, {run["slots"]} slots, {run["threads"]} threads

{HEAD.format("one by one")}
{chr(10).join(table)}

Seconds of each round: {"; ".join(", ".join(f"{name} {s}" for name, s in turn.items()) for turn in run["rounds"])}.
The server reads each slot's system prompt before the clock starts. Its flash attention is quicker and rounds
differently; it stays off here, so that a row is answered as it is when it is asked alone.

Rows that differ from one by one:

{lines}

## transformers, bfloat16

{(chr(10) * 2).join(tables)}

Batches of another size round differently in bfloat16, by hand too: the last column is no error count.
`generate` as one writes it by hand reads the shared examples anew for each row: most of the second difference.

## Endpoint

{calls["requests"]} requests, 16 at a time, to a server that waits 200 ms: plain {calls["plain_per_s"]} a second, `OpenAIModel` {calls["ours_per_s"]}.
"""


def main() -> None:
    """Measure, keep the figures, write the report, and print the figures as one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gguf", type=Path, default=DEMO / "gguf" / "demo" / "model-q8_0.gguf", help="made by `make demo`")
    parser.add_argument("--folder", type=Path, default=DEMO / "merged" / "demo", help="the merged model of `make demo`")
    parser.add_argument("--rows", type=int, default=120, help="of dev and golden")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--parts", default="runtime,client,transformers,fewshot")
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
    shown = [Prompt([*fewshot(contract, seed), {"role": "user", "content": row.user}], TOKENS) for row in rows[:32]]
    parts = {
        "runtime": lambda: runtime(gguf, prompts, options.rounds),
        "client": lambda: client(prompts),
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
