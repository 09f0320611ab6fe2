"""The scrub's precision and recall on labelled texts, its speed, and what the log costs a caller.

`make bench NAME=privacy`; with presidio when `pip install -e '.[privacy]'` and a spaCy model are there: SPACY=name."""

import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2] / "<<cookiecutter.project>>"
sys.path[:0] = [str(PROJECT), str(PROJECT / "tests")]

from personal import labelled, measure, table  # noqa: E402

from slm.modules import load_module  # noqa: E402
from slm.production.scrub import guesser, scrub, spans  # noqa: E402
from slm.settings import Settings  # noqa: E402

log = load_module(PROJECT / "client/log.py")


def main() -> None:
    found, texts = {"load": round(os.getloadavg()[0], 1), "texts": len(labelled())}, [text for text, _ in labelled()]
    ways = {"patterns": None}
    if model := os.environ.get("SPACY"):
        own = {"curate": {"spacy_models": {"en": model}}, "production": {"scrub": "presidio"}}
        ways[f"patterns, presidio with {model}"] = guesser(Settings.model_validate(own))
    for name, guess in ways.items():
        for half, said in ((0, "first half, mended on"), (1, "second half, only measured"), (None, "all")):
            result = measure(lambda text, guess=guess: spans(text, guess), half)
            print(f"\n## {name}: {said}, {len(labelled(half))} texts\n\n{table(result)}")
        begin = time.perf_counter()
        for text in texts:
            scrub(text, guess=guess)
        found[f"{name}: texts per second"] = round(len(texts) / (time.perf_counter() - begin))
    with tempfile.TemporaryDirectory() as folder, log.Log(Path(folder, "x.jsonl"), "m", waiting=20_000) as own:
        waits = []
        for _ in range(10_000):
            begin = time.perf_counter()
            own.write(texts[0], "{}", 0.1, True, consent=True)
            waits.append(time.perf_counter() - begin)
        own.close(60)
        found |= {"log: median wait of the caller, µs": round(statistics.median(waits) * 1e6, 1),
                  "log: 99.9th percentile, µs": round(sorted(waits)[9990] * 1e6, 1), "log: lines lost of 10,000": own.dropped}  # fmt: skip
    print("\n" + json.dumps(found, ensure_ascii=False))


if __name__ == "__main__":
    main()
