"""One run of the teacher becomes one append-only batch file; a killed run goes on where it stopped."""

import hashlib
import json
import os
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from slm.errors import SlmError
from slm.generate.plan import Request, _records, batches, label_values, plan, seed_rows
from slm.generate.salvage import rows_from
from slm.generate.teacher import Job, Reply, Store, Teacher
from slm.rows import Row, read_rows, write_text

ROUNDS = 3  # cells that came back short are asked again, this often at most
SEEDS = 4  # seed rows shown to the teacher per call


@dataclass
class Generated:
    """What a run of 03 brought: the batch file (None when nothing was missing), its rows and its bookkeeping."""

    batch: Path | None = None
    rows: list[Row] = field(default_factory=list)
    calls: int = 0
    reused: int = 0
    unread: list[tuple[str, str]] = field(default_factory=list)
    failed: int = 0
    money: float = 0.0
    stopped: str = ""

    def table(self, by: str = "kind"):
        """Rows per category and `by` ("kind", "difficulty", "language")."""
        import pandas as pd

        lines = [{"category": r.meta.category, by: getattr(r.meta, by)} for r in self.rows]
        frame = pd.DataFrame(lines, columns=["category", by])
        return pd.crosstab(frame["category"], frame[by], margins=True, margins_name="all")

    def __str__(self) -> str:
        where = self.batch.name if self.batch else "nothing was missing"
        text = f"{len(self.rows)} new rows ({where}), {self.calls} calls, {self.reused} replies from the cache, "
        text += f"{len(self.unread)} lines unread, {self.failed} calls failed, {self.money:.4f} spent"
        return text + (f"; STOPPED: {self.stopped}" if self.stopped else "")


def generate(
    settings, contract, generation_prompt: Callable, requests: list[Request] | None = None, limit: int = 0
) -> Generated:
    """Ask the teacher for what is missing and append it to the next data/generated/batch_NNN.jsonl.
    `generation_prompt(contract, request, seed_rows)` gives the text of one call. `requests` replace the grid (repair
    work). `limit`: rows of this run at most, 0 for no limit. Raises SlmError when the teacher cannot be used."""
    if settings.generate.teacher == "recorded":
        return _recorded(settings, limit or settings.generate.limit)
    from tqdm.auto import tqdm

    from slm.models.openai_api import run

    batch = _Batch(settings)
    result, store = batch.result, Store(settings.path(".cache/teacher.sqlite"))
    teacher = Teacher(settings, store)
    before = teacher.spent
    seeds, labels = seed_rows(settings), set(label_values(contract))

    def label(answer: str) -> str | None:
        value = contract.label(contract.parse(answer, lenient=True).value)
        return value if value in labels else None

    def take(reply: Reply) -> None:
        batch.add(*rows_from(reply.text, reply.job.facts["meta"], label))
        store.use(reply.job.key)
        result.reused += reply.cached

    for reply in store.unused():
        take(reply)
    for turn in range(ROUNDS):
        missing = plan(settings, contract, requests)
        jobs = _jobs(settings, contract, teacher, generation_prompt, seeds, missing, limit and limit - len(result.rows))
        if not jobs or (limit and len(result.rows) >= limit) or teacher.stopped:
            break
        known, ask = set(batch.known), []
        for job in jobs:
            kept = [Reply(job, *r, cached=True) for r in store.get(job.key)]
            new = [r for r in kept if any(x.id not in known for x in rows_from(r.text, job.facts["meta"])[0])]
            if new:
                take(new[0])
            else:
                ask.append(job)
        with tqdm(total=sum(j.facts["rows"] for j in ask), desc=f"teacher, round {turn + 1}", unit="row") as bar:

            def on_reply(reply: Reply, bar=bar) -> None:
                take(reply)
                bar.update(reply.job.facts["rows"])

            run(teacher.ask_all(ask, on_reply))
    result.calls, result.failed = teacher.calls, sum(map(bool, teacher.failures))
    result.money, result.stopped = teacher.spent - before, teacher.stopped
    return result


def save_prompts(settings, prompts: dict[str, str]) -> list[str]:
    """Write the prompts as specs/generation_prompts/<name>.md, so that they can be read and reviewed as text."""
    for name, text in prompts.items():
        title = name.replace("_", " ").capitalize()
        write_text(settings.path(f"specs/generation_prompts/{name}.md"), f"# {title}\n\n```text\n{text.strip()}\n```\n")
    return [f"specs/generation_prompts/{name}.md" for name in prompts]


class _Batch:
    """The batch file of this run, made at its first row, and the sidecar of what could not be read."""

    def __init__(self, settings):
        files = batches(settings)
        self.known = {r.get("id") for f in files for r in _records(f)}
        numbers = [int(m[1]) for f in files if (m := re.fullmatch(r"batch_(\d+)", f.stem))]
        self.path = settings.path(f"data/generated/batch_{max(numbers, default=0) + 1:03d}.jsonl")
        self.result = Generated()

    def add(self, rows: list[Row], unread: list[tuple[str, str]] = (), **facts) -> None:
        """Append rows that are not held yet, with `facts` in their provenance, and note the unread text."""
        fresh = {}
        for row in (r for r in rows if r.id not in self.known):
            provenance = {**row.meta.provenance, **facts, "batch": self.path.stem}
            fresh[row.id] = row.model_copy(update={"meta": row.meta.model_copy(update={"provenance": provenance})})
        self.known |= fresh.keys()
        self.result.rows += fresh.values()
        self.result.unread += unread
        self.result.batch = self.path if self.result.rows or self.result.unread else None
        _append(self.path, [r.model_dump(exclude_none=True) for r in fresh.values()])
        _append(self.path.with_suffix(".unread.txt"), [{"reason": why, "text": text} for why, text in unread])


def _append(path: Path, records: list[dict]) -> None:
    if not records:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    try:
        with path.open("ab") as stream:
            stream.write(text.encode())
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        problem = f"cannot write ({error.strerror}). Free some space and run 03 again; nothing is lost."
        raise SlmError(f"{path}: {problem}") from None


def _recorded(settings, limit: int) -> Generated:
    """What the recorded teacher holds and data/generated does not, in file order; a limit is spread over the cells."""
    source = settings.path("data/raw/recorded_teacher.jsonl")
    batch = _Batch(settings)
    rows = read_rows(source)
    held = len(batch.known & {r.id for r in rows})
    if limit and len(rows) > limit:
        rows = _spread(rows, limit)
    new = [row for row in rows if row.id not in batch.known][: max(0, limit - held) if limit else None]
    batch.add(new, teacher="recorded", prompt="recorded")
    return batch.result


def _spread(rows: list[Row], limit: int) -> list[Row]:
    """`limit` rows in file order, taken in turn from every category, and within it from every kind."""
    cells: dict[str, list] = defaultdict(list)
    seen: Counter = Counter()
    for position, row in enumerate(rows):
        seen[row.meta.category, row.meta.kind] += 1
        cells[row.meta.category].append((seen[row.meta.category, row.meta.kind], position))
    turns = sorted((n, position) for ranks in cells.values() for n, (_, position) in enumerate(sorted(ranks)))
    return [rows[position] for position in sorted(position for _, position in turns[:limit])]


def _jobs(settings, contract, teacher, generation_prompt, seeds, missing, limit) -> list[Job]:
    jobs, left = [], limit or sum(request.rows for request in missing)
    for request in missing:
        part, rows = 0, min(request.rows, left)
        left -= rows
        while rows > 0:
            n = min(rows, settings.generate.batch_rows)
            chosen = _choose(seeds, request, part)
            prompt = generation_prompt(contract, replace(request, rows=n), chosen)
            provenance = {
                "teacher": settings.generate.endpoint.model, "prompt": hashlib.sha256(prompt.encode()).hexdigest()[:12],
                "request": request.id, "parents": [row.id for row in chosen],
            }  # fmt: skip
            if request.cluster:
                provenance["cluster"] = request.cluster
            meta = {"category": request.category, "kind": request.kind, "difficulty": request.difficulty,
                    "source": "teacher", "provenance": provenance}  # fmt: skip
            limit_tokens = 200 + n * settings.generate.tokens_per_row
            jobs.append(Job(teacher.key(prompt, part), prompt, limit_tokens, {"meta": meta, "rows": n}))
            part, rows = part + 1, rows - n
    return jobs


def _choose(seeds: list[Row], request: Request, part: int) -> list[Row]:
    """Seed rows for one call: the category's own first, then others, a different handful for each part."""
    rng = random.Random(f"{request.id}:{part}")
    own = [row for row in seeds if row.meta.category == request.category]
    other = [row for row in seeds if row.meta.category != request.category]
    rng.shuffle(own)
    rng.shuffle(other)
    return (own[: SEEDS - 1] + other)[:SEEDS]
