"""The gates that look at one row, over a chunk of lines: rows are judged where they are read, and only their sketches
come together, to be compared (slm.curate.verdicts)."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache

import numpy as np

from slm.curate import duplicates, gates, leakage, privacy
from slm.curate.decisions import Decision
from slm.curate.read import Candidate, Chunk, Verdict, read_chunk
from slm.curate.text import Sketch, band_keys, hash64, sketch, text_of, words
from slm.rows import Row


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
    return verdict or privacy.personal(c.row)


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
