"""Seed rows and batches go through the gates; accepted, rejected, split and recorded. in == accepted + rejected."""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from slm.curate import gates, leakage
from slm.curate.coverage import coverage, tally
from slm.curate.decisions import read_decisions
from slm.curate.engine import Job, embed
from slm.curate.plots import plot_funnel
from slm.curate.read import Chunk, Verdict, chunks, read_candidates
from slm.curate.split import split_file
from slm.curate.text import skeleton, text_of, words
from slm.curate.verdicts import Judged, Local, judge
from slm.curate.versions import record_dataset, writing
from slm.errors import SlmError
from slm.generate.plan import batches, languages
from slm.rows import Row, iter_rows, replacing

SEED, ALL = "data/raw/seed.jsonl", "data/accepted/all.jsonl"


@dataclass
class Curated:
    """What 04 decided: how many rows were read, kept and refused, where they lie, the funnel, and the dataset's record.
    `lengths` are the tokens of the accepted rows, `similarities` (by `measures`) those of the pairs found alike."""

    read: int
    kept: int
    refused: int
    accepted_file: Path
    rejected_files: list[Path]
    steps: list[dict]
    record: dict
    planted: list[tuple]
    table: object
    lengths: np.ndarray
    similarities: np.ndarray
    measures: np.ndarray

    def accepted_rows(self) -> Iterator[Row]:
        """The accepted rows, one by one from their file."""
        return iter_rows(self.accepted_file)

    def rejected_records(self) -> Iterator[dict]:
        """The records of data/rejected, one by one: gate, reason, evidence, file, line, and row or raw."""
        for path in self.rejected_files:
            with path.open(encoding="utf-8", newline="\n") as stream:
                yield from map(json.loads, stream)

    def funnel(self):
        """A table, one line per gate: rows in, rejected, out, and a note where part of a gate could not run."""
        import pandas as pd

        columns = ["gate", "in", "rejected", "out", *(["note"] if any("note" in s for s in self.steps) else [])]
        return pd.DataFrame(self.steps, columns=columns).fillna("")

    def plot(self, path: Path) -> Path:
        """The funnel as a PNG at `path`."""
        return plot_funnel(self.steps, path)

    def reasons(self, n: int = 3):
        """A table of up to `n` rejected rows per gate, with reason, evidence and place."""
        import pandas as pd

        left, lines = {step["gate"]: min(n, step["rejected"]) for step in self.steps}, []
        order, records = [*left], self.rejected_records()
        while any(left.values()) and (r := next(records, None)):
            if left[r["gate"]]:
                left[r["gate"]] -= 1
                text = text_of(Row.model_validate(r["row"])) if "row" in r else r["raw"]
                evidence, place = json.dumps(r["evidence"], ensure_ascii=False), f"{r['file']}:{r['line']}"
                lines.append((r["gate"], r["reason"], place, text[:80], evidence[:120]))
        lines.sort(key=lambda line: order.index(line[0]))
        return pd.DataFrame(lines, columns=["gate", "reason", "place", "message", "evidence"])

    def planted_faults(self):
        """A table of the planted faults and whether the gates caught them; empty when none were planted."""
        import pandas as pd

        return pd.DataFrame(self.planted, columns=["id", "fault", "expected", "gate", "result"])

    def coverage(self):
        """The shares of the accepted rows against the plan (gate 7)."""
        return self.table


def curate(
    settings, contract, checks: list[Callable], count_tokens: Callable, hidden: list[str] = (),
    extra: list[tuple[str, Callable]] = (),
) -> Curated:  # fmt: skip
    """Judge data/raw/seed.jsonl and every file of data/generated, then write data/accepted and data/rejected. `hidden`
    are the prompt texts that no row may repeat; `extra` are further gates: (name, function(rows, values) -> verdicts).
    Everything is rebuilt from the inputs, so a second run gives the same bytes. Raises SlmError when there is nothing to
    read, or nothing left to split."""
    cfg, seed = settings.curate, settings.path(SEED)
    files = ([seed] if cfg.include_seed_rows and seed.is_file() else []) + batches(settings)
    if not files:
        raise SlmError("data/generated: no batch to curate; run 03_generate first.")
    known = leakage.index_of(leakage.evaluation_rows(settings), (lambda texts: embed(cfg.embedder, texts)) if cfg.embedder else None)
    secret = frozenset(run for text in hidden for run in gates.runs(words(text)))
    job = Job(settings, contract, checks, count_tokens, known, secret, read_decisions(settings), frozenset([SEED]))
    parts = [chunk for f in files for chunk in chunks(f, str(f.relative_to(settings.root)))]
    machine = local = Local(job, parts)
    if cfg.ray:
        from slm.curate.ray import Cluster

        machine = Cluster(job, parts)
    judged = judge(machine, extra)
    with writing(settings), ExitStack() as rejected, ExitStack() as accepted:
        streams: dict[Path, object] = {}

        def refuse(name: str, lines: bytes) -> int:
            target = settings.path(f"data/rejected/{Path(name).stem}.jsonl")
            if lines and target not in streams:
                streams[target] = rejected.enter_context(replacing(target))
            return streams[target].write(lines) and lines.count(b"\n") if lines else 0

        removed = sum(refuse("removed", line) for line in _removed(settings.path(ALL), set(judged.ids)))
        all_rows, kept, refused = accepted.enter_context(replacing(settings.path(ALL))), 0, 0
        for chunk, (good, bad) in zip(parts, _written(local, judged), strict=True):
            all_rows.write(good)
            kept, refused = kept + good.count(b"\n"), refused + refuse(chunk.name, bad)
        if len(judged.ids) != kept + refused:
            raise SlmError(f"{len(judged.ids)} rows in, {kept} accepted, {refused} rejected: rows were lost.")
        rejected.close()
        for target in {settings.path(f"data/rejected/{f.stem}.jsonl") for f in files} - {*streams}:
            target.unlink(missing_ok=True)
        if not kept:
            raise SlmError(f"all {refused} rows were refused; read data/rejected, then mend the prompt or the gates.")
        accepted.close()
        steps, total, path = judged.steps, len(judged.ids) + removed, settings.path(ALL)
        if removed:
            steps.insert(0, {"gate": "removed", "in": total, "rejected": removed, "out": len(judged.ids)})
        found = tally(iter_rows(path))
        table = coverage(found, contract, languages(settings))
        uneven = table[~table["verdict"].isin(["", "ok"])]
        short = [f"{line.dimension}={line.value}: {line.verdict}" for line in uneven.itertuples()]
        steps.append({"gate": "coverage", "in": kept, "rejected": 0, "out": kept, "warnings": short})
        parents = [str(f.relative_to(settings.root)) for f in files]
        record = record_dataset(settings, path, split_file(settings, path), parents, steps, found)
    return Curated(
        total, kept, refused + removed, path, sorted(streams), steps, record, _planted(settings, judged), table,
        judged.tokens, judged.similarities, np.array(judged.measures),
    )  # fmt: skip


def _written(machine: Local, judged: Judged) -> Iterator[tuple[bytes, bytes]]:
    """What each chunk gives to the accepted and to the rejected file."""
    own = ({p - a: v for p in range(a, b) if (v := judged.verdicts.get(p))} for a, b in zip(judged.starts, judged.starts[1:], strict=False))
    return machine.map(write_chunk, machine.chunks, own)


def write_chunk(job: Job, chunk: Chunk, verdicts: dict[int, Verdict]) -> tuple[bytes, bytes]:
    """The accepted lines of a chunk (answers in canonical form), and its rejected records."""
    good, bad = [], []
    for n, candidate in enumerate(job.read(chunk)):
        if verdict := verdicts.get(n):
            if "skeleton" in verdict.evidence:
                verdict.evidence["skeleton"] = skeleton(words(text_of(candidate.row)), job.names)
            bad.append(candidate.refuse(verdict).record())
            continue
        value = job.answer(candidate.row.answer)[1]
        record = candidate.row.model_dump(exclude_none=True)
        record["messages"][-1]["content"] = job.contract.dump(value)
        record["meta"]["category"] = job.contract.label(value) or record["meta"]["category"]
        good.append(record)
    return tuple("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows).encode() for rows in (good, bad))


def _removed(path: Path, present: set) -> Iterator[bytes]:
    """Records of accepted rows whose source is gone: they are refused under the gate "removed", not forgotten."""
    verdict = Verdict("removed", "no file in data/raw or data/generated holds this row any more", {})
    for c in read_candidates(path, ALL) if path.is_file() else ():
        if c.row and c.row.id not in present:
            yield json.dumps(c.refuse(verdict).record(), ensure_ascii=False).encode() + b"\n"


def _planted(settings, judged: Judged) -> list[tuple]:
    """For each planted fault {"id", "fault", "gate", "twin"?} the gate that caught it."""
    path = settings.path("data/raw/planted_faults.json")
    faults = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    wanted = {f["id"] for f in faults} | {f.get("twin") for f in faults}
    found = {i: judged.verdicts.get(n) for n, i in enumerate(judged.ids) if i in wanted} if faults else {}
    # Of two alike rows either may be the one that goes.
    twins = {v.evidence.get("twin"): v.gate for v in judged.verdicts.values()} if faults else {}
    lines = []
    for fault in faults:
        own = found[fault["id"]].gate if found.get(fault["id"]) else ""
        gate = own or twins.get(fault["id"], "")
        if fault["id"] not in found:
            state = "not in this run"
        elif gate:
            state = "caught" if own else "caught: twin refused"
        else:
            state = "NOT CAUGHT" if fault.get("twin", fault["id"]) in found else "twin not in this run"
        lines.append((fault["id"], fault["fault"], fault["gate"], gate, state))
    return lines
