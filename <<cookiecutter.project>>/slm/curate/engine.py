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
                mended = c.row.answered(mend.answer).noted(provenance={"edited_by": mend.reviewer})
                found[n] = replace(c, row=mended)
        return found

    def spared(self, row: Row) -> bool:
        """Whether a person accepted this row."""
        said = self.decisions.get(row.id)
        return said is not None and said.decision == "accept"

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
    """A chunk, judged: of every line its id, where it stands, and what later gates need (see duplicates.Table); the
    verdicts so far."""

    ids: list[str | None]
    lines: np.ndarray  # (number, offset)
    verdicts: dict[int, Verdict]
    late: dict[int, Verdict]
    contrast: dict[int, str]
    rows: np.ndarray  # dtype ROW
    sketch: Sketch
    bands: np.ndarray | None
    vectors: np.ndarray | None


def judge_row(job: Job, c: Candidate, said: list[str]) -> Verdict | None:
    """The gates that need nothing but the row and the words of its messages, in their order."""
    if c.row is None:
        return c.verdict
    word = job.decisions.get(c.row.id)
    if word and word.decision == "reject":
        evidence = {"reviewer": word.reviewer, "time": word.time}
        return Verdict("human_review", word.reason or f"refused by {word.reviewer}", evidence)
    if verdict := gates.restricted(c.row, job.settings.curate.restricted_sources):
        return verdict
    verdict, value, _ = job.answer(c.row.answer)
    if verdict is None and not job.spared(c.row):
        verdict = gates.checked(c.row, dict(value), job.checks) or gates.leaked(c.row, said, job.secret)
    return verdict or privacy.personal([c.row])[0]


def judge_chunk(job: Job, chunk: Chunk) -> Part:
    """Every gate that looks at one row, over the lines of a chunk; each gate sees what those before it let through."""
    found, cfg = job.read(chunk), job.settings.curate
    texts = [text_of(c.row) if c.row else "" for c in found]
    said = [words(text) for text in texts]
    verdicts = {n: verdict for n, c in enumerate(found) if (verdict := judge_row(job, c, said[n]))}
    passed, tokens = {n: c.row for n, c in enumerate(found) if n not in verdicts}, {}
    if job.count_tokens is not None and passed:
        limit = min(cfg.max_tokens, job.settings.train.max_seq_length)
        counts = job.count_tokens([job.contract.messages(row) for row in passed.values()])
        tokens = dict(zip(passed, counts, strict=True))
        verdicts |= {n: verdict for n in passed if (verdict := gates.too_long(tokens[n], limit))}
        passed = {n: row for n, row in passed.items() if n not in verdicts}

    made, vectors = sketch(said, job.names), None
    if cfg.embedder and found:
        vectors = embed(cfg.embedder, [text if n in passed else "" for n, text in enumerate(texts)])
    if job.known:
        hits = leakage.overlaps(made, job.known, cfg.leakage)
        if vectors is not None and job.known.vectors is not None:
            close = leakage.nearest(vectors, job.known.vectors)
            semantic = ((n, "cosine", c) if c >= cfg.embedding_duplicate else None for n, c in close)
            hits = [hit or other for hit, other in zip(hits, semantic, strict=True)]
        verdicts |= {n: job.known.verdict(hits[n]) for n in passed if hits[n]}

    late = {
        n: verdict for n, row in passed.items()
        if not job.spared(row) and (verdict := gates.trivial(row, said[n], cfg.min_words))
    }  # fmt: skip
    rows = np.zeros(len(found), duplicates.ROW)
    for n, row in passed.items():
        shape = 0 if n in late or len(said[n]) < 6 else made.shape[n]
        trusted = row.meta.source == "human" or chunk.name in job.trusted
        value, near_miss = job.answer(row.answer)[2], row.meta.kind == "near_miss"
        rows[n] = made.text[n], shape, value, tokens.get(n, 0), near_miss, trusted, job.spared(row)
    contrast = {n: twin for n, row in passed.items() if (twin := row.meta.provenance.get("contrast_of"))}
    lines = np.array([(c.line, c.offset) for c in found], np.int64).reshape(-1, 2)
    bands = band_keys(made, min(cfg.near_duplicate, cfg.contradiction))
    vectors = None if vectors is None else vectors.astype(np.float16)
    return Part([c.row and c.row.id for c in found], lines, verdicts, late, contrast, rows, made, bands, vectors)


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
            return duplicates.NONE
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

    def gather(get: Callable) -> dict:
        return {s + n: v for s, part in zip(starts, parts, strict=False) for n, v in get(part).items()}

    def at(place: int) -> Chunk:
        c = bisect_right(starts, place) - 1
        chunk, (number, offset) = chunks[c], parts[c].lines[place - starts[c]].tolist()
        after = parts[c].lines[place - starts[c] + 1 :][:1, 1].tolist() or [chunk.offset + chunk.size]
        return replace(chunk, offset=offset, size=after[0] - offset, line=number)

    @lru_cache(10_000)
    def fetch(place: int) -> tuple[Row, dict]:
        row = job.read(at(place))[0].row
        return row, job.answer(row.answer)[1]

    verdicts, alive = gather(lambda part: part.verdicts), np.ones(len(ids), bool)
    alive[[*verdicts]] = False

    def refuse(place: int, verdict: Verdict) -> None:
        verdicts[place], alive[place] = verdict, False

    first: dict[str, int] = {}
    for place, known in enumerate(ids):
        if known is None or (other := first.setdefault(known, place)) == place:
            continue
        early = place in verdicts and verdicts[place].gate in (*READING, "human_review", "restricted_source")
        if not early and fetch(other)[0].messages != fetch(place)[0].messages:
            where = f"{at(other).name}:{at(other).line}"
            refuse(place, Verdict("schema_validity", f"its id is already that of {where}", {"id": known}))

    facts = np.concatenate([np.zeros(0, duplicates.ROW), *(p.rows for p in parts)])
    vectors = [p.vectors for p in parts if p.vectors is not None]
    small = not cfg.embedder and alive.sum() <= SMALL
    texts = {n: text_of(fetch(n)[0]) for n in np.flatnonzero(alive).tolist()} if small else {}
    close = leakage.paraphrases(list(texts.values()), job.known) if texts and job.known else ()
    for place, (hit, cosine) in zip(texts, close, strict=False):
        if cosine >= cfg.semantic_duplicate:
            refuse(place, job.known.verdict((hit, "cosine", cosine)))
    waiting = np.flatnonzero(alive).tolist() if extra else []
    for begin in range(0, len(waiting), 2000):
        for name, function in extra:
            order = [n for n in waiting[begin : begin + 2000] if alive[n]]
            order = [n for n in order if name == "expert_signoff" or not facts["spared"][n]]
            found = [fetch(n) for n in order]
            for n, verdict in zip(order, function([row for row, _ in found], [value for _, value in found]), strict=True):
                if verdict:
                    refuse(n, replace(verdict, gate=name))

    table = duplicates.Table(facts, ids, alive, gather(lambda part: part.contrast), gather(lambda part: part.late))
    own = table.distinct
    cuts = np.searchsorted(own, starts)
    kept = [own[a:b] - s for a, b, s in zip(cuts, cuts[1:], starts, strict=False)]
    a, b, similarity = machine.near(kept, min(cfg.near_duplicate, cfg.contradiction))
    told = own[~np.isin(own, list(table.late))]  # what is refused as trivial has no meaning to share
    if vectors:
        semantic = duplicates.vector_edges(np.concatenate(vectors), told, cfg.embedding_duplicate)
    else:
        texts = {n: text for n, text in texts.items() if alive[n]}
        semantic = duplicates.cosine_edges(texts, told if small else told[:0], cfg.semantic_duplicate)
    edges = duplicates.join(table, (own[a], own[b], similarity), semantic)
    verdicts |= duplicates.decide(table, edges, cfg.contradiction, cfg.near_duplicate, fetch)

    steps = funnel(job, [name for name, _ in extra], len(ids), Counter(v.gate for v in verdicts.values()))
    for step in steps if not (small or vectors) and alive.any() else ():
        step |= {"note": NOT_RUN} if step["gate"] in ("duplicates", "evaluation_leakage") else {}
    alive[[*verdicts]] = False
    similarities, measures = np.array([e[3] for e in edges]), [e[2] for e in edges]
    return Judged(ids, starts, verdicts, steps, facts["tokens"][alive], similarities, measures)


def funnel(job: Job, extra: list[str], left: int, lost: Counter) -> list[dict]:
    """A record per gate, in their order: rows in, rejected and out."""
    order = [name for name in ("human_review", "restricted_source") if lost[name]]
    order += [*READING, "check", "leaked_instructions", "personal_data"]
    order += ["length"] * (job.count_tokens is not None) + ["evaluation_leakage"] * (job.known is not None)
    steps = []
    for name in dict.fromkeys([*order, *extra, "label_consistency", "duplicates", "trivial"]):
        steps.append({"gate": name, "in": left, "rejected": lost[name], "out": left - lost[name]})
        left -= lost[name]
    return steps


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
