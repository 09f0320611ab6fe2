"""What one would pick instead to find near duplicates, each run as its own documentation shows; by the peers' python.

    python curate_peers.py NAME texts.jsonl work_folder [embedder]

texts.jsonl holds {"id": "n", "text": ...}; the ids kept go to work_folder/kept.json, the seconds to the last line.
Their python, in an environment of its own (they do not agree with each other's newest dependencies):

    pip install datatrove spacy semhash distilabel nltk requests "datasketch<1.7" "xxhash<4"
    pip install --no-deps text-dedup && pip install click-option-group ftfy regex bitarray scipy zstandard"""

import json
import os
import sys
import time
from importlib.metadata import version
from pathlib import Path

# The setting nearest to the gate's: word 3-shingles, Jaccard 0.6; where a tool has no such thing, its default.
SETTING = {
    "datatrove": "MinHash, 3 words, 20 buckets of 6 hashes (threshold 0.61), 2 workers",
    "text-dedup": "minhash.py, --ngram 3 --threshold 0.6, 2 processes",
    "distilabel": "MinHashDedup, 5 characters, threshold 0.6 (its word mode compares single words)",
    "distilabel, default threshold": "MinHashDedup, 5 characters, threshold 0.9",
    "semhash": "self_deduplicate, potion-base-8M, threshold 0.9 (its default)",
    "semhash, 0.8": "self_deduplicate, potion-base-8M, threshold 0.8",
}


def datatrove(file: Path, work: Path, embedder: str) -> list[int]:
    """The four steps of datatrove's examples/minhash_deduplication.py, on local disk."""
    from datatrove.executor import LocalPipelineExecutor as Executor
    from datatrove.pipeline import dedup
    from datatrove.pipeline.dedup.minhash import MinhashConfig
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.writers import JsonlWriter

    config = MinhashConfig(n_grams=3, num_buckets=20, hashes_per_bucket=6)
    folder, w = work / "texts", str(work)
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    folder.mkdir()
    half = -(-len(lines) // 2)
    for part in (0, 1):  # two files, for two workers
        (folder / f"{part}.jsonl").write_text("".join(lines[part * half : (part + 1) * half]), encoding="utf-8")
    reader = JsonlReader(str(folder))
    steps = [
        (2, [reader, dedup.MinhashDedupSignature(f"{w}/signatures", config=config, language="eng")]),
        (20, [dedup.MinhashDedupBuckets(f"{w}/signatures", f"{w}/buckets", config=config)]),
        (1, [dedup.MinhashDedupCluster(f"{w}/buckets", f"{w}/remove", config=config)]),
        (2, [reader, dedup.MinhashDedupFilter(f"{w}/remove"), JsonlWriter(f"{w}/out", compression=None)]),
    ]
    for tasks, pipeline in steps:
        Executor(
            pipeline=pipeline, tasks=tasks, workers=min(2, tasks), logging_dir=f"{w}/logs/{len(os.listdir(w))}"
        ).run()
    return [
        int(json.loads(line)["id"]) for out in sorted((work / "out").glob("*")) for line in out.open(encoding="utf-8")
    ]


def text_dedup(file: Path, work: Path, embedder: str) -> list[int]:
    """`python -m text_dedup.minhash`, in this process."""
    from datasets import load_from_disk
    from text_dedup.minhash import main

    options = {
        "path": "json", "data_files": str(file), "split": "train", "cache_dir": str(work / "cache"), "output": str(work / "out"),
        "column": "text", "ngram": 3, "threshold": 0.6, "num_proc": 2, "batch_size": 10000,
    }  # fmt: skip
    main([part for key, value in options.items() for part in (f"--{key}", str(value))], standalone_mode=False)
    return [int(n) for n in load_from_disk(str(work / "out"))["id"]]


def distilabel(file: Path, work: Path, embedder: str, threshold: float = 0.6) -> list[int]:
    """The step alone, without distilabel's pipeline around it."""
    from distilabel.steps import MinHashDedup

    step = MinHashDedup(tokenizer="ngrams", n=5, threshold=threshold)
    step.load()
    rows = [json.loads(line) for line in file.open(encoding="utf-8")]
    kept = []
    for begin in range(0, len(rows), 500):
        for batch in step.process(rows[begin : begin + 500]):
            kept += [int(row["id"]) for row in batch if row["keep_row_after_minhash_filtering"]]
    return kept


def semhash(file: Path, work: Path, embedder: str, threshold: float = 0.9) -> list[int]:
    """self_deduplicate over records with the model that is its default."""
    from model2vec import StaticModel
    from semhash import SemHash

    rows = [json.loads(line) for line in file.open(encoding="utf-8")]
    index = SemHash.from_records(
        [{"id": r["id"], "text": r["text"]} for r in rows],
        columns=["text"],
        model=StaticModel.from_pretrained(embedder),
    )
    return [int(r["id"]) for r in index.self_deduplicate(threshold=threshold).selected]


RUN = {
    "datatrove": datatrove, "text-dedup": text_dedup, "distilabel": distilabel, "semhash": semhash,
    "distilabel, default threshold": lambda *a: distilabel(*a, threshold=0.9), "semhash, 0.8": lambda *a: semhash(*a, threshold=0.8),
}  # fmt: skip


def main() -> None:
    """Run one peer."""
    name, file, work, embedder = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]
    os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    begin, used = time.perf_counter(), sum(os.times()[:4])
    kept = RUN[name](file, work, embedder)
    seconds, used = time.perf_counter() - begin, sum(os.times()[:4]) - used
    (work / "kept.json").write_text(json.dumps(kept))
    print(json.dumps({"seconds": round(seconds, 2), "cpu_s": round(used, 2), "version": version(name.split(",")[0])}))


if __name__ == "__main__":
    main()
