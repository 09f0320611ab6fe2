"""Seed rows and batches go through the gates; accepted, rejected, split and recorded. in == accepted + rejected."""

import json
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from slm import registry
from slm.curate import duplicates, gates, leakage, privacy
from slm.curate.coverage import coverage
from slm.curate.funnel import planted_table
from slm.curate.plots import plot_funnel
from slm.curate.read import Candidate, Verdict, read_candidates
from slm.curate.split import split_file
from slm.curate.text import pairs_of
from slm.curate.versions import record_dataset, writing
from slm.errors import SlmError
from slm.generate.plan import batches
from slm.rows import Row, write_jsonl, write_rows

SEED = "data/raw/seed.jsonl"


@dataclass
class Curated:
    """What 04 decided: every candidate with its verdict, the accepted rows, the funnel and the dataset's record."""

    candidates: list[Candidate]
    accepted: list[Row]
    steps: list[dict]
    record: dict
    planted: list[dict]
    contract: object
    lengths: object = None  # numpy: tokens of the accepted rows
    similarities: object = None  # numpy: similarity of each pair found
    measures: object = None  # numpy: and by which measure

    @property
    def read(self) -> int:
        """Rows read."""
        return len(self.candidates)

    @property
    def kept(self) -> int:
        """Rows accepted."""
        return len(self.accepted)

    @property
    def refused(self) -> int:
        """Rows rejected."""
        return len(self.rejected)

    def accepted_rows(self):
        """The accepted rows, one by one."""
        return iter(self.accepted)

    def rejected_records(self):
        """The lines of data/rejected, one by one."""
        return (candidate.record() for candidate in self.rejected)

    @property
    def rejected(self) -> list[Candidate]:
        """The refused candidates, in reading order."""
        return [c for c in self.candidates if c.verdict is not None]

    def funnel(self):
        """A table, one line per gate: rows in, rejected, out."""
        import pandas as pd

        return pd.DataFrame(self.steps, columns=["gate", "in", "rejected", "out"])

    def plot(self, path: Path) -> Path:
        """The funnel as a PNG at `path`."""
        return plot_funnel(self.steps, path)

    def reasons(self, n: int = 3):
        """A table of up to `n` rejected rows per gate, with reason, evidence and place."""
        import pandas as pd

        shown: dict[str, list] = defaultdict(list)
        for c in self.rejected:
            evidence, text = json.dumps(c.verdict.evidence, ensure_ascii=False), c.row.user if c.row else c.raw
            shown[c.verdict.gate].append((c.verdict.gate, c.verdict.reason, c.place, text[:80], evidence[:120]))
        columns = ["gate", "reason", "place", "message", "evidence"]
        return pd.DataFrame([line for lines in shown.values() for line in lines[:n]], columns=columns)

    def planted_faults(self):
        """A table of the planted faults and whether the gates caught them; empty when none were planted."""
        return planted_table(self.planted, self.candidates)

    def coverage(self):
        """The shares of the accepted rows against the plan (gate 7)."""
        return coverage(self.accepted, self.contract)


def judge(
    candidates: list[Candidate], settings, contract, checks: list[Callable] = (), count_tokens: Callable | None = None,
    sets: dict[str, list[Row]] | None = None, hidden: list[str] = (),
) -> tuple[list[Candidate], list[dict], dict[str, dict]]:  # fmt: skip
    """Run every gate over the candidates, each gate on what the ones before it let through. Returns the candidates with
    their verdicts (same order), the funnel's steps, and the accepted values by position. `sets` None leaves the leakage
    gate out, `count_tokens` None the length gate."""
    cfg, result, steps = settings.curate, list(candidates), []

    def alive() -> list[int]:
        return [n for n, c in enumerate(result) if c.verdict is None]

    def count(name: str, before: int, lost: int) -> None:
        steps.append({"gate": name, "in": before, "rejected": lost, "out": before - lost})

    def refuse(name: str, order: list[int], verdicts: list[Verdict | None]) -> None:
        before = len(alive())
        for n, verdict in zip(order, verdicts, strict=True):
            if verdict:
                result[n] = result[n].refuse(verdict)
        if name:
            count(name, before, before - len(alive()))

    def gate(name: str, verdict_of: Callable) -> None:
        order = alive()
        refuse(name, order, verdict_of([result[n].row for n in order], [values[n] for n in order]))

    order = alive()
    verdicts, found = gates.read_answers([result[n].row for n in order], contract)
    seen: dict[str, int] = {}
    for place, n in enumerate(order):
        other = seen.setdefault(result[n].row.id, n)
        if other != n and result[other].row.messages != result[n].row.messages and verdicts[place] is None:
            reason = f"its id is already that of {result[other].place}"
            verdicts[place] = Verdict("schema_validity", reason, {"id": result[n].row.id})
    values = dict(zip(order, found, strict=True))
    refuse("", order, verdicts)
    lost, left = Counter(c.verdict.gate for c in result if c.verdict), len(result)
    first = ("removed",) if lost["removed"] else ()
    for name in (*first, "json_validity", "schema_validity", "contract_validity"):
        count(name, left, lost[name])
        left -= lost[name]

    gate("check", lambda rows, vals: gates.checked(rows, vals, checks))
    gate("leaked_instructions", lambda rows, vals: gates.leaked(rows, hidden))
    gate("personal_data", lambda rows, vals: privacy.personal(rows))
    if count_tokens is not None:
        limit = min(cfg.max_tokens, settings.train.max_seq_length)
        gate("length", lambda rows, vals: gates.too_long(rows, contract, count_tokens, limit))
    if sets is not None:
        gate("evaluation_leakage", lambda rows, vals: leakage.leaks(rows, sets, cfg.leakage, cfg.semantic_duplicate))

    order = alive()
    rows, vals = [result[n].row for n in order], [values[n] for n in order]
    pairs = pairs_of(rows, min(cfg.near_duplicate, cfg.contradiction), cfg.semantic_duplicate)
    trusted = frozenset(c.row.id for c in result if c.row and (c.row.meta.source == "human" or c.file == SEED))
    against = duplicates.contradictions(rows, vals, pairs, cfg.contradiction, trusted)
    refuse("label_consistency", order, against)
    pairs = [
        p for p in pairs if not against[p.first] and not against[p.second]
        and (p.measure != "jaccard" or p.similarity >= cfg.near_duplicate)
    ]  # fmt: skip
    refuse("duplicates", order, duplicates.duplicates(rows, vals, pairs))
    names = frozenset(str(v).lower() for v in _enum_values(contract.schema))
    gate("trivial", lambda rows, vals: gates.trivial(rows, cfg.min_words, names))
    return result, steps, {n: values[n] for n in alive()}


def curate(settings, contract, checks: list[Callable], count_tokens: Callable, hidden: list[str] = ()) -> Curated:
    """Judge data/raw/seed.jsonl and every file of data/generated, then write data/accepted and data/rejected. `hidden`
    are the prompt texts that no row may repeat. Everything is rebuilt from the inputs, so a second run gives the same
    bytes. Raises SlmError when there is nothing to read, or nothing left to split."""
    seed = settings.path(SEED)
    files = ([seed] if settings.curate.include_seed_rows and seed.is_file() else []) + batches(settings)
    if not files:
        raise SlmError("data/generated: no batch to curate; run 03_generate first.")
    candidates = [c for f in files for c in read_candidates(f, str(f.relative_to(settings.root)))]
    path = settings.path("data/accepted/all.jsonl")
    # Accepted rows whose source is gone stay visible: they are refused under the gate "removed", not forgotten.
    present = {c.row.id for c in candidates if c.row}
    old = read_candidates(path, "data/accepted/all.jsonl") if path.is_file() else ()
    gone = Verdict("removed", "no file in data/raw or data/generated holds this row any more", {})
    candidates += [c.refuse(gone) for c in old if c.row and c.row.id not in present]
    sets = leakage.evaluation_rows(settings)
    result, steps, values = judge(candidates, settings, contract, checks, count_tokens, sets, hidden)
    accepted = [_canonical(result[n].row, contract.dump(value), contract.label(value)) for n, value in values.items()]
    rejected = [c for c in result if c.verdict is not None]
    a, r, total = len(accepted), len(rejected), len(candidates)
    if total != a + r:
        raise SlmError(f"{total} rows in, {a} accepted, {r} rejected: rows were lost.")
    _write_rejected(settings, files, rejected)
    if not accepted:
        raise SlmError(f"all {len(rejected)} rows were refused; read data/rejected, then mend the prompt or the gates.")
    table = coverage(accepted, contract)
    uneven = table[~table["verdict"].isin(["", "ok"])]
    short = [f"{line.dimension}={line.value}: {line.verdict}" for line in uneven.itertuples()]
    steps.append({"gate": "coverage", "in": len(accepted), "rejected": 0, "out": len(accepted), "warnings": short})
    parents = {str(f.relative_to(settings.root)): registry.file_hash(f)[:16] for f in files}
    with writing(settings):
        write_rows(path, accepted)
        record = record_dataset(settings, path, split_file(settings, path), parents, steps)
    planted = settings.path("data/raw/planted_faults.json")
    faults = json.loads(planted.read_text(encoding="utf-8")) if planted.is_file() else []
    import numpy as np

    cfg, rows = settings.curate, [c.row for c in result if c.row]
    pairs = pairs_of(rows, min(cfg.near_duplicate, cfg.contradiction), cfg.semantic_duplicate)
    lengths = np.array(count_tokens([contract.messages(row) for row in accepted]))
    found = np.array([p.similarity for p in pairs]), np.array([p.measure for p in pairs])
    return Curated(result, accepted, steps, record, faults, contract, lengths, *found)


def _write_rejected(settings, files: list[Path], rejected: list[Candidate]) -> None:
    by_file: dict[str, list[dict]] = defaultdict(list)
    for candidate in rejected:
        by_file[candidate.file].append(candidate.record())
    for name in dict.fromkeys([*(str(f.relative_to(settings.root)) for f in files), *by_file]):
        stem = "removed" if name.startswith("data/accepted") else Path(name).stem
        target = settings.path(f"data/rejected/{stem}.jsonl")
        if by_file[name]:
            write_jsonl(target, by_file[name])
        else:
            target.unlink(missing_ok=True)


def _canonical(row: Row, answer: str, label: str | None) -> Row:
    last = row.messages[-1].model_copy(update={"content": answer})
    meta = row.meta.model_copy(update={"category": label}) if label else row.meta
    return row.model_copy(update={"messages": [*row.messages[:-1], last], "meta": meta})


def _enum_values(node) -> list:
    if isinstance(node, dict):
        return [*node.get("enum", []), *(v for part in node.values() for v in _enum_values(part))]
    return [v for part in node for v in _enum_values(part)] if isinstance(node, list) else []
