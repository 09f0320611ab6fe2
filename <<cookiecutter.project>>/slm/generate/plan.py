"""The grid category x kind x difficulty x language: how many rows each cell should have, has, and still needs."""

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from slm.errors import SlmError
from slm.rows import DIFFICULTIES, KINDS, Row, digest, iter_lines, read_rows

# Shares of the kinds in a dataset: the common case first, every other kind often enough to be learnt.
KIND_SHARES = {
    "canonical": 0.25, "production_like": 0.20, "boundary": 0.10, "negative": 0.10, "adversarial": 0.10,
    "near_miss": 0.10, "style": 0.075, "schema_repair": 0.075,
}  # fmt: skip
KIND_NOTES = {
    "canonical": "the everyday case, stated plainly, no two situations alike",
    "boundary": "very long or very short input, an empty part, odd formatting, an optional fact left out",
    "negative": "the right answer is to decline, to say that nothing applies, or to leave fields null",
    "adversarial": "the input gives orders to the model, misleads, contradicts itself or tries to break the format",
    "near_miss": "looks like one label at first sight and is another; the detail that decides is in the text",
    "production_like": "messy real text: signature, quoted reply, typos, dictation, forwarded thread",
    "style": "extremes of tone (curt, ornate, sarcastic, emoji) that must not change the answer",
    "schema_repair": "pasted JSON, braces, quotes or unusual label words that tempt one into invalid output",
}


@dataclass(frozen=True)
class Request:
    """`rows` rows wanted for one cell; `edge_case` says what they must show; `cluster` names a failure to repair. An
    empty `language` leaves it to the style examples."""

    category: str
    kind: str
    difficulty: str
    rows: int
    edge_case: str = ""
    cluster: str = ""
    language: str = ""

    @property
    def id(self) -> str:
        """8 hex digits of what is asked for, whatever the number of rows."""
        left_out = ("rows",) if self.language else ("rows", "language")
        return digest(json.dumps({k: v for k, v in asdict(self).items() if k not in left_out}, sort_keys=True), 8)

    @property
    def note(self) -> str:
        """The edge case in words, by default that of the kind."""
        return self.edge_case or KIND_NOTES[self.kind]


def label_values(contract) -> list[str]:
    """The values of the contract's label field in schema order; ["all"] where the contract has no label field."""
    if contract.label_field is None:
        return ["all"]
    definitions = contract.schema.get("$defs", {})

    def choices(node: dict) -> list:
        node = {**definitions.get(node.get("$ref", "").rsplit("/", 1)[-1], {}), **node}
        parts = (*node.get("anyOf", ()), *node.get("oneOf", ()), *node.get("allOf", ()))
        return [*node.get("enum", [node.get("const")]), *(value for part in parts for value in choices(part))]

    found = [choices(shape["properties"].get(contract.label_field, {})) for shape in shapes(contract.schema)]
    values = list(dict.fromkeys(value for some in found for value in some if isinstance(value, str)))
    if not values:
        raise SlmError(f"task/contract.py: label_field {contract.label_field!r} has no fixed values in the schema.")
    return values


def shapes(schema: dict) -> list[dict]:
    """The object schemas that an output may follow: one, or those of a union, with `$ref` resolved at the top."""
    definitions = schema.get("$defs", {})
    if "$ref" in schema:
        return shapes({**definitions[schema["$ref"].rsplit("/", 1)[-1]], "$defs": definitions})
    if options := schema.get("oneOf") or schema.get("anyOf"):
        return [shape for option in options for shape in shapes({**option, "$defs": definitions})]
    return [schema] if schema.get("properties") else []


def languages(settings) -> dict[str, float]:
    """Language code -> share of the rows: `generate.languages`, or what the seed rows are written in."""
    seeds = records(settings.path("data/raw/seed.jsonl"))
    found = settings.generate.languages or Counter((r.get("meta") or {}).get("language", "en") for r in seeds) or {"en": 1}
    if min(found.values()) < 0 or not sum(found.values()):
        raise SlmError("project.yaml: generate.languages: shares are 0 or more, and one of them above 0.")
    return {name: share / sum(found.values()) for name, share in found.items()}


def quotas(settings, contract) -> dict[tuple[str, str, str, str], int]:
    """Rows wanted per cell (category, kind, difficulty, language), only cells that want some; they add up to
    `generate.rows_target` (or `generate.limit`, when that is less)."""
    target = settings.generate.rows_target
    target = min(target, settings.generate.limit or target)
    labels, shares = label_values(contract), languages(settings)
    cells = [(c, k, d) for c in labels for k in KINDS for d in DIFFICULTIES]
    exact = {cell: target * KIND_SHARES[cell[1]] / len(labels) / len(DIFFICULTIES) for cell in cells}
    whole = {cell: int(share) for cell, share in exact.items()}
    mixed = {cell: digest("|".join(cell), 64) for cell in cells}
    # Largest remainder; equal remainders fall by hash, so that a small target still touches every category.
    for cell in sorted(cells, key=lambda c: (whole[c] - exact[c], mixed[c]))[: target - sum(whole.values())]:
        whole[cell] += 1
    # Row by row to the language that lags most, a category after the other: each gets its share in each of them.
    wanted, given = Counter(), Counter()
    for cell in sorted(cells, key=lambda c: (c[0], mixed[c])):
        for _ in range(whole[cell]):
            language = max(shares, key=lambda name: shares[name] * (given.total() + 1) - given[name])
            given[language] += 1
            wanted[*cell, language] += 1
    order = {name: n for n, name in enumerate([*labels, *KINDS, *DIFFICULTIES])}
    return {cell: wanted[cell] for cell in sorted(wanted, key=lambda cell: [order.get(part, 0) for part in cell])}


def held(settings) -> list[dict]:
    """The rows (as dictionaries) of data/accepted and data/generated, each id once. Rejected rows do not count, for
    they must be asked for again; seed rows do not either."""
    out = {r["row"]["id"] for r in judged(settings) if r["gate"]}
    out |= {r.get("id") for r in records(settings.path("data/raw/seed.jsonl"))}
    rows: dict[str, dict] = {}
    for file in (settings.path("data/accepted/all.jsonl"), *batches(settings)):
        for record in records(file):
            if "meta" in record and record.get("id") not in out:
                rows.setdefault(record.get("id"), record)
    return list(rows.values())


def plan(settings, contract, requests: list[Request] | None = None) -> list[Request]:
    """What is still missing, cell by cell. `requests` (repair work) replace the grid, each less what it has."""
    rows = held(settings)
    if requests is not None:
        have = Counter(r["meta"].get("provenance", {}).get("request") for r in rows)
        wanted = [(request, request.rows - have[request.id]) for request in requests]
    else:
        have = Counter(map(_cell, rows))
        wanted = [(Request(*cell[:3], n, language=cell[3]), n - have[cell]) for cell, n in quotas(settings, contract).items()]
    return [replace(request, rows=n) for request, n in wanted if n > 0]


def grid(settings, contract, by: str = "category"):
    """A table of rows wanted, held and missing by "category", "kind", "difficulty" or "language"; a cell with more than
    it wants makes up for no other. Seed rows are not counted."""
    import pandas as pd

    have, want = Counter(map(_cell, held(settings))), quotas(settings, contract)
    lines = [(*cell, want.get(cell, 0), have[cell], max(0, want.get(cell, 0) - have[cell])) for cell in {**want, **have}]
    columns = ["category", "kind", "difficulty", "language", "wanted", "held", "missing"]
    table = pd.DataFrame(lines, columns=columns).groupby(by, sort=False)[["wanted", "held", "missing"]].sum()
    table.loc["all"] = table.sum()
    return table


def seed_rows(settings) -> list[Row]:
    """The human-written rows that set the style. Raises SlmError when data/raw/seed.jsonl is missing."""
    return read_rows(settings.path("data/raw/seed.jsonl"))


def batches(settings) -> list[Path]:
    """The batch files of data/generated, in order."""
    return sorted(settings.path("data/generated").glob("*.jsonl"))


def _cell(row: dict) -> tuple:
    meta = row["meta"]
    place = meta.get("category"), meta.get("kind", "canonical"), meta.get("difficulty", "medium")
    return *place, meta.get("language", "en")


def records(path: Path) -> Iterator[dict]:
    """The lines that are JSON objects; the others are 04's to report."""
    for _, line in iter_lines(path) if path.is_file() else ():
        with suppress(ValueError):
            record = json.loads(line)
            if isinstance(record, dict):
                yield record


def judged(settings) -> Iterator[dict]:
    """What 04 decided last, one record a row as data/rejected keeps it; accepted rows have the gate ""."""
    for row in records(settings.path("data/accepted/all.jsonl")):
        yield {"gate": "", "evidence": {}, "row": row}
    for path in sorted(settings.path("data/rejected").glob("*.jsonl")):
        yield from (record for record in records(path) if "row" in record)
