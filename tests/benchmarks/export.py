"""Export of a trained project: seconds and peak memory of each stage, from the adapter to the proven files."""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROJECT = ROOT / "<<cookiecutter.project>>"
WORK = ROOT / "build" / "export"
STAGES = ("merge", "files", "tokens", "logits", "score")
MORE = ("imatrix", "unsloth")  # by option of 08; not in the sum
QUANTS = ["f16", "q8_0", "q5_k_m", "q4_k_m"]


def peak_mb() -> float:
    """The most memory that this process held since `forget`, mapped files with it, in megabytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 / 1e6


def forget() -> float:
    """Start the peak anew; returns what is held now: the libraries."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak_mb()


def stage(name: str, project: Path, run: str, profile: str) -> dict:
    """Run one stage in this process and measure it; what it found rides along."""
    sys.path[:0] = [str(PROJECT), str(project)]
    import llama_cpp  # noqa: F401
    import peft  # noqa: F401
    import torch
    from slm.evaluate import load_candidate, take
    from slm.export import logits, merge, parity, quantize, tokens
    from slm.rows import read_rows
    from slm.settings import load_settings
    from task.contract import contract
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401

    torch.set_num_threads(2)
    settings = load_settings(start=project, profile=profile, run_id=run, overrides={"export.quants": QUANTS})
    merged = settings.path(f"outputs/merged/{run}")
    golden, dev = (take(settings, read_rows(settings.path(f"data/eval/{n}.jsonl"))) for n in ("golden", "dev"))
    paths = [quantize.gguf_folder(settings) / f"model-{quant}.gguf" for quant in QUANTS]
    files = [quantize.GgufFile(q, p, 0.0, {}) for q, p in zip(QUANTS, paths, strict=True)]
    held, begin = forget(), time.perf_counter()
    if name == "merge":
        found = str(merge.merge(settings).name)
    elif name == "files":
        found = {f.quant: [round(f.seconds, 1), round(f.size_mb, 1)] for f in quantize.make_files(settings, merged)}
    elif name == "tokens":
        chats = tokens.conversations(contract, [*golden, *dev])[-200:]
        found = [vars(tokens.prove_tokens(merged, f.path, chats))["prompts"] for f in files]
    elif name == "logits":
        found = [vars(p) | {"holds": p.holds} for p in logits.prove_logits(settings, contract, golden, merged, files)]
    elif name == "imatrix":
        from slm.export.imatrix import importance

        weights = importance(settings, contract, paths[0], merged)
        took = round(time.perf_counter() - begin, 1)
        aware = [quantize.quantize(paths[0], project / f"aware-{quant}.gguf", quant, weights) for quant in QUANTS[2:]]
        made = [quantize.GgufFile(quant, path, 0.0, {}) for quant, path in zip(QUANTS[2:], aware, strict=True)]
        exact = {one.name: f"{one.exact}/{len(one.scores)}" for one in parity.score_files(settings, contract, golden, made, dev)}
        found = {"seconds": took, "tensors": len(weights), "exact": exact,
                 **near(logits, contract, [*golden, *dev], merged, paths, aware)}  # fmt: skip
    elif name == "unsloth":
        own = {"adapter": merge.adapter_folder(settings), "base": merge.base_folder(settings)}
        made = quantize.convert(merged, project / "unsloth-f16.gguf", **own)
        took = round(time.perf_counter() - begin, 1)
        chats = tokens.conversations(contract, [*golden, *dev])[-200:]
        found = {"seconds": took, "prompts": tokens.prove_tokens(merged, made, chats).prompts,
                 **near(logits, contract, golden[:8], merged, paths[:1], [made])}  # fmt: skip
    else:
        known = [score for result in load_candidate(settings, run) for score in result.scores]
        ways = parity.score_paths(settings, contract, [*golden, *dev], files[0], merged, known)
        shipped = parity.score_files(settings, contract, golden, files, dev, ways[0].scores)
        found = {f"{one.name}, {one.way}": f"{one.exact}/{len(one.scores)}" for one in [*ways, *shipped]}
    seconds, f16 = time.perf_counter() - begin, 2 * sum(p.numel() for p in _weights(merged)) / 1e6
    child = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e6
    own = peak_mb() - held
    return {
        "seconds": round(seconds, 1), "libraries_mb": round(held), "peak_mb": round(own), "child_mb": round(child),
        "peak_ratio": round(own / f16, 2), "found": found,
    }  # fmt: skip


def near(logits, contract, rows, merged: Path, paths, others) -> dict:
    """Divergence from the f16 file of the files made plainly and of `others`, over 48 rows at most: mean, 99th percentile."""
    from slm.models.llama_cpp import LlamaCppModel
    from transformers import AutoTokenizer

    tokenizer, found, wanted = AutoTokenizer.from_pretrained(merged), {}, None
    asked = [logits._ask(tokenizer, contract.messages(row)) for row in rows[:: max(1, len(rows) // 48)][:48]]
    for path in [*paths, *others]:
        model = LlamaCppModel(path)
        got = [model.logits(*one) for one in asked]
        model.close()
        wanted = wanted or got
        proof = logits.compare_logits(path.stem, wanted, got, 1.0)
        found[path.stem] = [round(proof.kl, 6), round(proof.kl_p99, 4), round(proof.top1, 4), round(path.stat().st_size / 1e6, 1)]
    return found


def _weights(merged: Path):
    from safetensors.torch import load_file

    return [w for file in merged.glob("*.safetensors") for w in load_file(file).values()]


def main() -> None:
    """Measure every stage in a process of its own and print the figures as one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--project", type=Path, default=ROOT / "build" / "demo", help="made by `make demo`; only read")
    parser.add_argument("--run", default="demo")
    parser.add_argument("--profile", default="cpu")
    parser.add_argument("--stage", choices=(*STAGES, *MORE))
    options = parser.parse_args()
    if options.stage:
        print(json.dumps(stage(options.stage, options.project, options.run, options.profile)))
        return
    shutil.rmtree(WORK, ignore_errors=True)
    made = (f"outputs/adapters/{options.run}", f"outputs/eval_reports/{options.run}/scores.json")
    for part in ("project.yaml", "task", "training", "data/eval", "data/accepted", *made):
        source, target = options.project / part, WORK / part
        target.parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if source.is_dir() else shutil.copy)(source, target)
    found = {"load": round(os.getloadavg()[0], 1), "cores": os.cpu_count()}
    for name in (*STAGES, *MORE):
        command = [sys.executable, __file__, "--stage", name, "--project", str(WORK), "--run", options.run, "--profile", options.profile]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, env={**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "1"})
        if done.returncode and name in MORE:
            found[name] = f"not run: exit code {done.returncode}"
            continue
        if done.returncode:
            raise SystemExit(f"{name} failed (exit code {done.returncode})")
        found[name] = json.loads(done.stdout.splitlines()[-1])
        print(name, found[name], file=sys.stderr, flush=True)
    found["seconds"] = round(sum(found[name]["seconds"] for name in STAGES), 1)
    found["peak_ratio"] = max(found[name]["peak_ratio"] for name in STAGES)
    (WORK / "figures.json").write_text(json.dumps(found, indent=1))
    print(json.dumps({"benchmark": "export", **found}))


if __name__ == "__main__":
    main()
