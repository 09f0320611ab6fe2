"""Repair rounds for real: two categories are kept out of the first data set, 07 must name the gap, rounds must fill it.

`make bench NAME=repair`, 47 minutes on two AVX2 cores; the project stays in build/repair."""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / "build" / "repair"
GAP = ("cancellation", "data_privacy")  # 27 of the 120 dev rows
FIRST = 500  # rows of the other seven categories, spread evenly over the recorded ones
RUN = "gap"
RECIPE = {  # short. Two epochs since a trial with one had 2 of 40 rows right; with two, 15 of 120
    "train.epochs": 2, "train.lora_layers": 10, "train.precision": "fp32", "train.eval_steps": 25, "train.save_steps": 25,
    "evaluate.constrained": False, "evaluate.fewshot": 0, "evaluate.latency_requests": 1,
}  # fmt: skip
CLUSTERS = 2  # a round mends the two largest, so that what it did can be told
ASKED = re.compile(r"WRITE (\d+) JSONL.*?^CATEGORY (\S+)$.*?^KIND (\S+)$.*?^DIFFICULTY (\S+)", re.M | re.S)


def read(path: Path) -> list[dict]:
    """The records of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


def text(row: dict) -> str:
    """The customer's message of a row."""
    return next(m["content"] for m in row["messages"] if m["role"] == "user")


def bake() -> Path:
    """The default project in build/repair with the gap: `held.jsonl` beside it has the recorded rows taken away."""
    sys.path.insert(0, str(ROOT / "tests"))
    from conftest import copy_template
    from cookiecutter.main import cookiecutter

    shutil.rmtree(WORK, ignore_errors=True)
    template = copy_template(WORK / "template")
    cookiecutter(str(template), no_input=True, default_config=True, output_dir=str(WORK), extra_context={"project": "bench"})
    file = WORK / "bench/data/raw/recorded_teacher.jsonl"
    rows = read(file)
    other = [r for r in rows if r["meta"]["category"] not in GAP]
    first = [other[n * len(other) // FIRST] for n in range(FIRST)]
    ids = {r["id"] for r in first}
    for path, kept in ((file, first), (WORK / "held.jsonl", [r for r in rows if r["id"] not in ids])):
        path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in kept), encoding="utf-8")
    return WORK / "bench"


class Teacher(ThreadingHTTPServer):
    """An OpenAI-compatible endpoint that answers with recorded rows of the asked category and kind, each row once, the
    asked difficulty first. It writes nothing of its own and cannot answer dev: it says {} there."""

    daemon_threads = True

    def __init__(self, project: Path):
        super().__init__(("127.0.0.1", 0), Reply)
        given = [*project.glob("data/generated/*.jsonl"), *project.glob("outputs/runs/*/batch_*.jsonl")]
        known = {text(r) for path in given for r in read(path)}
        self.rows = [r for r in read(WORK / "held.jsonl") if text(r) not in known]
        self.asked, self.lock = Counter(), threading.Lock()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def endpoint(self) -> dict:
        """`generate.endpoint`; one call at a time, so that every run of this script gets the same rows."""
        return {"url": f"http://127.0.0.1:{self.server_port}/v1", "model": "recorded-rows", "concurrency": 1}

    def write(self, prompt: str) -> str:
        """The lines for one prompt of 03."""
        if not (hit := ASKED.search(prompt)):
            return "{}"
        n, category, kind, difficulty = int(hit[1]), *hit.groups()[1:]
        with self.lock:
            fit = [r for r in self.rows if (r["meta"]["category"], r["meta"]["kind"]) == (category, kind)]
            chosen = sorted(fit, key=lambda r: r["meta"]["difficulty"] != difficulty)[:n]
            self.rows = [r for r in self.rows if r not in chosen]
            self.asked += Counter(asked=n, given=len(chosen))
        return "\n".join(map(line, chosen))


def line(row: dict) -> str:
    """A row as the prompt wants it."""
    answer, meta = row["messages"][-1]["content"], row["meta"]
    try:
        answer = json.loads(answer)
    except ValueError:
        pass  # a planted fault: the gates' to find
    shown = {"input": text(row), "output": answer, "language": meta["language"], "group": meta.get("group", "")}
    return json.dumps(shown, ensure_ascii=False)


class Reply(BaseHTTPRequestHandler):
    """POST /v1/chat/completions."""

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        message = {"role": "assistant", "content": self.server.write(asked["messages"][-1]["content"])}
        body = json.dumps({
            "id": "x", "object": "chat.completion", "created": 0, "model": asked["model"],
            "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0},
        }).encode()  # fmt: skip
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_) -> None:
        """Quiet."""


def slm(project: Path, *words: str, **settings) -> float:
    """`python -m slm …` in the project, its output in build/repair/log.txt too; returns the minutes."""
    begin = time.perf_counter()
    options = [part for key, value in settings.items() for part in ("-s", f"{key}={json.dumps(value)}")]
    with (WORK / "log.txt").open("a") as log:
        log.write(f"\n$ slm {' '.join(words)} {' '.join(options)}\n")
        process = subprocess.Popen(
            [sys.executable, "-m", "slm", *words, *options], cwd=project, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, env={**os.environ, "PYTHONPATH": str(project)},
        )  # fmt: skip
        for said in process.stdout:
            print(said, end="", flush=True)
            log.write(said)
    if process.wait():
        raise SystemExit(f"slm {words[0]} failed; see {WORK / 'log.txt'}")
    return round((time.perf_counter() - begin) / 60, 1)


def scores(project: Path, run: str) -> dict[str, dict[str, dict]]:
    """{set: {row id: score}} of a run's fine-tuned model."""
    found = json.loads((project / f"outputs/eval_reports/{run}/scores.json").read_text(encoding="utf-8"))
    return {r["set"]: {s["row_id"]: s for s in r["scores"]} for r in found if r["name"] == "fine_tuned"}


def right(project: Path, run: str) -> dict[str, str]:
    """Whole records right on dev, golden, and dev's rows of the gap and of the other categories."""
    found = scores(project, run)
    ways = {name: [s["exact"] for s in found[name].values()] for name in ("dev", "golden")}
    for name, inside in (("dev, the gap", True), ("dev, the rest", False)):
        ways[name] = [s["exact"] for s in found["dev"].values() if (s["expected"]["category"] in GAP) == inside]
    return {name: f"{sum(own)}/{len(own)}" for name, own in ways.items()}


def named(project: Path, run: str) -> list[str]:
    """What 07 makes of the run's failures now; a cluster whose round was discarded is not planned again."""
    plan = json.loads((project / f"outputs/runs/{run}/repair_plan.json").read_text(encoding="utf-8"))
    return [
        f"{i['name']}: {len(i['findings'])} failures, blame {i['blame']}, {i['root_cause']}; {i['rows']} rows" for i in plan["items"]
    ]


def main() -> None:
    """Run the parts asked for; the last line has the figures of all that lies in build/repair as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", default="bake,first,rounds,dpo")
    parser.add_argument("--profile", default="cpu", help="smoke: a trial of this script, nothing is learnt")
    own = parser.parse_args()
    file = WORK / "figures.json"
    project, changed = WORK / "bench", RECIPE if own.profile != "smoke" else {}
    if "bake" in own.parts:
        bake()
    if "first" in own.parts:
        file.write_text(json.dumps({"load": round(os.getloadavg()[0], 1)}))
        slm(project, "run", "02-06", "--profile", own.profile, "--run-id", RUN, **changed)
    found = json.loads(file.read_text()) if file.is_file() else {}
    for part in ("rounds", "dpo"):
        if part not in own.parts:
            continue
        records = [r for r in read(project / "registry/runs.jsonl") if r["stage"] == "repair"]
        best = next((r["run_id"] for r in reversed(records) if r["status"] == "kept"), RUN)
        teacher = Teacher(project)
        given = {"generate.teacher": "openai", "generate.endpoint": teacher.endpoint, "generate.feasible_at": 0}
        given |= {"repair.clusters_max": CLUSTERS}
        given |= {"preference.method": "dpo", "preference.limit": 250} if part == "dpo" else {}
        found[f"{part}: minutes"] = slm(project, "repair", best, "--apply", "--rounds", "1", **given)
        found[f"{part}: rows of the teacher"] = dict(teacher.asked)
        file.write_text(json.dumps(found))
    records = read(project / "registry/runs.jsonl")
    found["runs"] = {RUN: right(project, RUN) | {"07 now": named(project, RUN)}}
    for r in (r for r in records if r["stage"] == "repair"):
        told = {"from": r["parents"]["run"], "status": r["status"], "verdict": r["verdict"], "clusters": r["rows"]}
        told |= {f"{name} difference": [r[name]["difference"][k] for k in ("value", "low", "high")] for name in ("dev", "golden")}
        tuned = next((x.get("preference") for x in reversed(records) if x["stage"] == "train" and x["run_id"] == r["run_id"]), None)
        told |= {"preference": tuned["verdict"]} if tuned else {}
        found["runs"][r["run_id"]] = right(project, r["run_id"]) | told
    print("\n" + json.dumps(found, ensure_ascii=False))


if __name__ == "__main__":
    main()
