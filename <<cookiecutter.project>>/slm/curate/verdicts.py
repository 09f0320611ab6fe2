"""The chunks of a run in all processes of a machine, and then together: ids, further gates, neighbours; a verdict a line."""

import gc
import multiprocessing
import os
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache, partial

import numpy as np

from slm.curate import duplicates, leakage
from slm.curate.engine import Job, Part, judge_chunk
from slm.curate.read import Chunk, Verdict
from slm.curate.text import text_of
from slm.rows import Row

SMALL = 20_000  # up to so many rows TF-IDF compares all with all
READING = ("json_validity", "schema_validity", "contract_validity")
NOT_RUN = "semantic: not run, set curate.embedder"


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


_JOB: Job | None = None


def _alone() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    gc.set_threshold(100_000)  # rows by the thousand hold no cycles: looking for them costs more than reading


def _forked(work: Callable, *arguments):
    return work(_JOB, *arguments)
