"""The gates over chunks of lines in all processes of a machine: rows are judged where they are read, and only their
sketches come together, to be compared."""

import gc
import json
import multiprocessing
import os
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache, partial

import numpy as np

from slm.curate import duplicates, gates, leakage, privacy
from slm.curate.decisions import Decision
from slm.curate.read import Candidate, Chunk, Verdict, read_chunk
from slm.curate.text import Sketch, band_keys, hash64, sketch, text_of, words
from slm.rows import Row

SMALL = 20_000  # up to so many rows TF-IDF compares all with all
READING = ("json_validity", "schema_validity", "contract_validity")
NOT_RUN = "semantic: not run, set curate.embedder"


@dataclass
class Job:
    """What a worker needs to judge a chunk; the evaluation rows in `known`, None leaves the leakage gate out."""

    settings: object
    contract: object
    checks: list[Callable] = ()
    count_tokens: Callable | None = None
    known: leakage.Known | None = None
    secret: frozenset[str] = frozenset()
    decisions: dict[str, Decision] = field(default_factory=dict)
    trusted: frozenset[str] = frozenset()  # names of files whose rows are
    answers: dict = field(default_factory=dict)  # per process: what each distinct answer came to

    @cached_property
    def names(self) -> frozenset[str]:
        """The words that a template would swap: the values of the contract."""
        return frozenset(str(value).lower() for value in _enums(self.contract.schema))

    def read(self, chunk: Chunk) -> list[Candidate]:
        """The candidates of a chunk, with the answers that people mended."""
        found = read_chunk(chunk)
        for n, c in enumerate(found) if self.decisions else ():
            if c.row and (mend := self.decisions.get(c.row.id)) and mend.decision == "edit" and mend.answer is not None:
                last = c.row.messages[-1].model_copy(update={"content": mend.answer})
                meta = c.row.meta.model_copy(update={"provenance": c.row.meta.provenance | {"edited_by": mend.reviewer}})
                row = c.row.model_copy(update={"messages": [*c.row.messages[:-1], last], "meta": meta})
                found[n] = replace(c, row=row)
        return found

    def said(self, row: Row, decision: str) -> bool:
        """Whether a person's decision on this row is in force."""
        return bool(self.decisions) and row.id in self.decisions and self.decisions[row.id].decision == decision

    def answer(self, text: str) -> tuple[Verdict | None, dict | None, int]:
        """The verdict on an answer, its value, and the value's hash."""
        if text not in self.answers:
            if len(self.answers) > 200_000:
                self.answers.clear()
            verdict, value = gates.read_answer(text, self.contract)
            self.answers[text] = verdict, value, hash64(json.dumps(value, sort_keys=True, default=str)) if verdict is None else 0
        return self.answers[text]


@dataclass
class Part:
    """A chunk, judged: of every line its id and where it stands, the verdicts so far, and of the lines that `passed`
    what later gates need (see duplicates.Table)."""

    ids: list[str | None]
    lines: np.ndarray  # (number, offset)
    verdicts: dict[int, Verdict]
    late: dict[int, Verdict]
    contrast: dict[int, str]
    passed: np.ndarray
    rows: np.ndarray  # dtype ROW
    sketch: Sketch
    bands: np.ndarray | None
    vectors: np.ndarray | None


def judge_chunk(job: Job, chunk: Chunk) -> Part:
    """Every gate that looks at one row, over the lines of a chunk; each gate sees what those before it let through."""
    found, cfg = job.read(chunk), job.settings.curate
    verdicts = {n: c.verdict for n, c in enumerate(found) if c.verdict}
    values: dict[int, dict] = {}
    hashes: dict[int, int] = {}
    for n, c in enumerate(found):
        if c.row and job.said(c.row, "reject"):
            said = job.decisions[c.row.id]
            evidence = {"reviewer": said.reviewer, "time": said.time}
            verdicts[n] = Verdict("human_review", said.reason or f"refused by {said.reviewer}", evidence)
        elif c.row:
            verdict, values[n], hashes[n] = job.answer(c.row.answer)
            if verdict:
                verdicts[n] = verdict
    exempt = {n for n, c in enumerate(found) if c.row and job.said(c.row, "accept")}
    said = {n: words(text_of(c.row)) for n, c in enumerate(found) if n not in verdicts}
    tokens: dict[int, int] = {}

    def gate(judge: Callable, spared: Iterable[int] = ()) -> None:
        order = [n for n in said if n not in verdicts and n not in spared]
        for n, verdict in zip(order, judge(order), strict=True) if order else ():
            if verdict:
                verdicts[n] = verdict

    def rows(order: list[int]) -> list[Row]:
        return [found[n].row for n in order]

    def length(order: list[int]) -> list[Verdict | None]:
        limit = min(cfg.max_tokens, job.settings.train.max_seq_length)
        tokens.update(zip(order, job.count_tokens([job.contract.messages(row) for row in rows(order)]), strict=True))
        return [gates.too_long(tokens[n], limit) for n in order]

    if job.checks:
        gate(lambda order: gates.checked(rows(order), [dict(values[n]) for n in order], job.checks), exempt)
    gate(lambda order: gates.leaked(rows(order), [said[n] for n in order], job.secret), exempt)
    gate(lambda order: privacy.personal(rows(order)))
    if job.count_tokens is not None:
        gate(length)
    passed = [n for n in said if n not in verdicts]
    made, vectors = sketch([said[n] for n in passed], job.names), None
    if passed and cfg.embedder:
        vectors = embed(cfg.embedder, [text_of(row) for row in rows(passed)])
    if job.known:
        hits = leakage.overlaps(made, job.known, cfg.leakage)
        if vectors is not None and job.known.vectors is not None:
            close = leakage.nearest(vectors, job.known.vectors)
            semantic = ((n, "cosine", c) if c >= cfg.embedding_duplicate else None for n, c in close)
            hits = [hit or other for hit, other in zip(hits, semantic, strict=True)]
        verdicts |= {n: job.known.verdict(hit) for n, hit in zip(passed, hits, strict=True) if hit}
    trivial = gates.trivial(rows(passed), [said[n] for n in passed], cfg.min_words)
    late = {n: v for n, v in zip(passed, trivial, strict=True) if v and n not in exempt}
    known = [(
        made.text[i], 0 if n in late or len(said[n]) < 6 else made.shape[i], hashes[n], tokens.get(n, 0), (meta := found[n].row.meta).kind
        == "near_miss", meta.source == "human" or chunk.name in job.trusted, n in exempt) for i, n in enumerate(passed)]  # fmt: skip
    return Part(
        [c.row and c.row.id for c in found], np.array([(c.line, c.offset) for c in found], np.int64).reshape(-1, 2), verdicts, late,
        {n: other for n in passed if (other := found[n].row.meta.provenance.get("contrast_of"))}, np.array(passed, np.int64),
        np.array(known, duplicates.ROW), made, band_keys(made, min(cfg.near_duplicate, cfg.contradiction)),
        None if vectors is None else vectors.astype(np.float16),
    )  # fmt: skip


class Local:
    """This machine: chunks go to a pool of processes that are forked, so that contract and checks may stand in a
    notebook; little work, one core or no fork is done in this process."""

    def __init__(self, job: Job, chunks: list[Chunk]):
        self.job, self.chunks, self.parts = job, chunks, []
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
        little = sum(chunk.size for chunk in chunks) < 4_000_000 or "fork" not in multiprocessing.get_all_start_methods()
        self.workers = job.settings.curate.workers or (1 if little else min(cores, len(chunks)))

    def map(self, work: Callable, *arguments: Iterable) -> Iterator:
        """work(job, *one of each argument), in order."""
        global _JOB
        if self.workers < 2:
            yield from map(partial(work, self.job), *arguments)
            return
        _JOB = self.job  # inherited, not pickled
        fork = multiprocessing.get_context("fork")
        with ProcessPoolExecutor(self.workers, mp_context=fork, initializer=_alone) as pool:
            yield from pool.map(partial(_forked, work), *arguments)

    def judge(self) -> list[Part]:
        """The chunks, judged."""
        self.parts = list(self.map(judge_chunk, self.chunks))
        return self.parts

    def near(self, kept: list[np.ndarray], threshold: float) -> duplicates.Edges:
        """Near duplicates among the lines kept[i] of part i; rows are numbered through in this order."""
        from scipy.sparse import vstack

        parts = [(p, k) for p, k in zip(self.parts, kept, strict=True) if len(k)]
        rows = np.arange(sum(len(k) for _, k in parts))
        if not len(rows):
            return np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0)
        shingles = vstack([p.sketch.matrix()[k] for p, k in parts], format="csr")
        bands = np.concatenate([p.bands[k] for p, k in parts])
        return duplicates.near_edges(((rows, keys) for keys in bands.T), rows, shingles, threshold)


@dataclass
class Judged:
    """Every line's verdict by its place in the run (None: accepted), and what was measured on the way."""

    ids: list[str | None]
    starts: list[int]  # of the chunks
    verdicts: dict[int, Verdict]
    steps: list[dict]
    tokens: np.ndarray
    similarities: np.ndarray
    measures: list[str]


def judge(machine, extra: list[tuple[str, Callable]] = ()) -> Judged:
    """Run every gate over the chunks of a machine (Local, or a cluster). `extra` are gates (name, function(rows,
    values) -> verdicts) that run in this process on what the gates for single rows let through."""
    job, cfg, chunks = machine.job, machine.job.settings.curate, machine.chunks
    parts = machine.judge()
    starts = [0, *np.cumsum([len(p.ids) for p in parts]).tolist()]
    ids = [i for p in parts for i in p.ids]

    def at(place: int) -> Chunk:
        c = bisect_right(starts, place) - 1
        chunk, (number, offset) = chunks[c], parts[c].lines[place - starts[c]].tolist()
        after = parts[c].lines[place - starts[c] + 1 :][:1, 1].tolist() or [chunk.offset + chunk.size]
        return replace(chunk, offset=offset, size=after[0] - offset, line=number)

    @lru_cache(10_000)
    def fetch(place: int) -> tuple[Row, dict]:
        row = job.read(at(place))[0].row
        return row, job.answer(row.answer)[1]

    def gather(get: Callable) -> dict:
        return {s + n: v for s, part in zip(starts, parts, strict=False) for n, v in get(part).items()}

    verdicts, first = gather(lambda part: part.verdicts), {}
    for place, known in enumerate(ids):
        if known is None or (other := first.setdefault(known, place)) == place:
            continue
        early = place in verdicts and verdicts[place].gate in (*READING, "human_review")
        if not early and fetch(other)[0].messages != fetch(place)[0].messages:
            where = f"{at(other).name}:{at(other).line}"
            verdicts[place] = Verdict("schema_validity", f"its id is already that of {where}", {"id": known})

    places = np.concatenate([s + p.passed for s, p in zip(starts, parts, strict=False)] or [np.zeros(0, np.int64)])
    facts = np.concatenate([p.rows for p in parts] or [np.zeros(0, duplicates.ROW)])
    vectors = [p.vectors for p in parts if p.vectors is not None]
    alive = ~np.isin(places, np.fromiter(verdicts, np.int64, len(verdicts)))
    small = not cfg.embedder and alive.sum() <= SMALL
    texts = {n: text_of(fetch(int(places[n]))[0]) for n in np.flatnonzero(alive).tolist()} if small else {}
    close = leakage.paraphrases(list(texts.values()), job.known) if texts and job.known else ()
    for n, (hit, cosine) in zip(texts, close, strict=False):
        if cosine >= cfg.semantic_duplicate:
            verdicts[int(places[n])], alive[n] = job.known.verdict((hit, "cosine", cosine)), False
    for begin in range(0, len(places) if extra else 0, 2000):
        for name, function in extra:
            order = [n for n in range(begin, min(begin + 2000, len(places))) if alive[n] and (name == "expert_signoff" or not facts["spared"][n])]
            found = [fetch(int(places[n])) for n in order]
            for n, verdict in zip(order, function([row for row, _ in found], [value for _, value in found]), strict=True):
                if verdict:
                    verdicts[int(places[n])], alive[n] = replace(verdict, gate=name), False

    rows = np.flatnonzero(alive)
    place_of = places[rows].tolist()
    number = {place: n for n, place in enumerate(place_of)}
    contrast, late = ({number[p]: v for p, v in gather(get).items() if p in number} for get in (lambda p: p.contrast, lambda p: p.late))
    table = duplicates.Table(facts[rows], [ids[place] for place in place_of], contrast, late)
    own = table.distinct
    bounds = np.cumsum([0, *(len(p.passed) for p in parts)])
    cuts = np.searchsorted(rows[own], bounds)
    near = machine.near([rows[own[a:b]] - s for a, b, s in zip(cuts, cuts[1:], bounds, strict=False)], min(cfg.near_duplicate, cfg.contradiction))
    told = own[~np.isin(own, np.fromiter(late, np.int64, len(late)))]  # what is refused as trivial has no meaning to share
    if vectors:
        semantic = duplicates.vector_edges(np.concatenate(vectors)[rows], told, cfg.embedding_duplicate)
    else:
        semantic = duplicates.cosine_edges([texts[n] for n in rows.tolist()] if small else [], told if small else told[:0], cfg.semantic_duplicate)
    edges = duplicates.join(table, (own[near[0]], own[near[1]], near[2]), semantic)
    decided = duplicates.decide(table, edges, cfg.contradiction, cfg.near_duplicate, lambda n: fetch(place_of[n]))
    verdicts |= {place_of[n]: verdict for n, verdict in decided.items()}

    lost = Counter(v.gate for v in verdicts.values())
    order = [*(("human_review",) if lost["human_review"] else ()), *READING, "check", "leaked_instructions", "personal_data"]
    order += ["length"] * (job.count_tokens is not None) + ["evaluation_leakage"] * (job.known is not None)
    steps, left = [], len(ids)
    for name in dict.fromkeys([*order, *(name for name, _ in extra), "label_consistency", "duplicates", "trivial"]):
        steps.append({"gate": name, "in": left, "rejected": lost[name], "out": left - lost[name]})
        if not (small or vectors) and len(rows) and name in ("duplicates", "evaluation_leakage"):
            steps[-1]["note"] = NOT_RUN
        left -= lost[name]
    kept = ~np.isin(places, np.fromiter(verdicts, np.int64, len(verdicts)))
    return Judged(ids, starts, verdicts, steps, facts["tokens"][kept], np.array([e[3] for e in edges]), [e[2] for e in edges])


def _enums(node) -> list:
    if isinstance(node, dict):
        return [*node.get("enum", []), *(v for part in node.values() for v in _enums(part))]
    return [v for part in node for v in _enums(part)] if isinstance(node, list) else []


@lru_cache(1)
def _embedder(name: str):
    from model2vec import StaticModel

    return StaticModel.from_pretrained(name)


def embed(name: str, texts: list[str]) -> np.ndarray:
    """Unit vectors of texts by a static embedding model: a folder, or a Hub id."""
    vectors = _embedder(name).encode(texts)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)


_JOB: Job | None = None


def _alone() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    gc.set_threshold(100_000)  # rows by the thousand hold no cycles: looking for them costs more than reading


def _forked(work: Callable, *arguments):
    return work(_JOB, *arguments)
