"""One run of the teacher becomes one append-only batch file; a killed run goes on where it stopped."""

import asyncio
import json
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from slm import cost
from slm.generate.plan import Request, batches, label_values, plan, records, seed_rows
from slm.generate.salvage import rows_from
from slm.generate.teacher import LOCAL_ROWS, Job, Purse, Store, endpoints, teachers
from slm.models.base import Prompt
from slm.models.openai_api import run
from slm.rows import Row, append_jsonl, digest, read_rows, write_text

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

    def __str__(self) -> str:
        where = self.batch.name if self.batch else "nothing was missing"
        text = f"{len(self.rows)} new rows ({where}), {self.calls} calls, {self.reused} replies from the cache, "
        text += f"{len(self.unread)} lines unread, {self.failed} calls failed, {self.money:.4f} spent"
        return text + (f"; STOPPED: {self.stopped}" if self.stopped else "")


def generate(
    settings, contract, generation_prompt: Callable, requests: list[Request] | None = None, limit: int = 0
) -> Generated:
    """Ask the teachers for what is missing and append it to the next data/generated/batch_NNN.jsonl.
    `generation_prompt(contract, request, seed_rows)` gives the text of one call. `requests` replace the grid (repair
    work). `limit`: rows of this run at most, 0 for no limit. Raises SlmError when a teacher cannot be used, or when
    another run is at work."""
    with Purse(settings) as purse:
        batch = _Batch(settings)
        purse.batch = batch.path.stem
        if settings.generate.teacher == "recorded":
            return _recorded(settings, batch, limit or settings.generate.limit)
        return _asked(settings, contract, generation_prompt, requests, limit, purse, batch)


def _asked(settings, contract, generation_prompt, requests, limit, purse, batch) -> Generated:
    from tqdm.auto import tqdm

    result, store, models, before = batch.result, Store(settings), teachers(settings, purse), purse.spent
    labels, sampling = set(label_values(contract)), {"temperature": settings.generate.temperature}
    sampling["schema"] = _rows_schema(contract) if settings.generate.teacher == "gguf" else None

    def label(answer: str) -> str | None:
        value = contract.label(contract.parse(answer, lenient=True).value)
        return value if value in labels else None

    def take(job: Job, text: str) -> None:
        batch.add(*rows_from(text, job.facts["meta"], label), job.facts["meta"])
        store.use(job.key)

    async def put(model, jobs: list[Job], bar) -> None:
        def on_answer(n: int, answer) -> None:
            if answer.finish_reason != "error":
                store.put(jobs[n], answer.text)
                take(jobs[n], answer.text)
            bar.update(jobs[n].facts["rows"])

        # The seed: a local model that is asked the same again must not answer the same again.
        def prompt(job: Job) -> Prompt:
            messages = [{"role": "user", "content": job.prompt}]
            return Prompt(messages, job.max_tokens, seed=len(store.get(job.key)), **sampling)

        await model.each([*map(prompt, jobs)], on_answer)

    async def put_all(live: list, ask: list[Job], bar) -> None:
        work = (put(m, [j for j in ask if j.teacher == m.name], bar) for m in live)
        for fault in filter(None, await asyncio.gather(*work, return_exceptions=True)):
            raise fault  # after the other teachers have finished: their calls are paid for

    for job, text in store.unused():
        take(job, text)
        result.reused += 1
    for turn in range(ROUNDS):
        live = [model for model in models if not model.stopped]
        left = limit and limit - len(result.rows)
        if not live or (limit and left <= 0):
            break
        missing, names = plan(settings, contract, requests), [model.name for model in live]
        ask, known = [], set(batch.known)
        for job in _jobs(settings, contract, names, generation_prompt, missing, left):
            kept = (text for text in store.get(job.key) if {r.id for r in rows_from(text, job.facts["meta"])[0]} - known)
            if text := next(kept, None):
                take(job, text)
                result.reused += 1
            else:
                ask.append(job)
        if not ask:
            break
        with tqdm(total=sum(j.facts["rows"] for j in ask), desc=f"teacher, round {turn + 1}", unit="row") as bar:
            run(put_all(live, ask, bar))
    result.calls, result.failed = sum(m.calls for m in models), sum(m.failed for m in models)
    result.money, result.stopped = purse.spent - before, "; ".join(dict.fromkeys(m.stopped for m in models if m.stopped))
    return result


def estimate(settings, contract, generation_prompt: Callable, requests: list[Request] | None = None, limit: int = 0):
    """A dry run, a table with a line per teacher: calls, rows, about how many tokens and how much money, and the most
    that these calls can cost (repetitions not counted: `budget_left` ends them). Nothing is asked."""
    import pandas as pd

    ends = endpoints(settings)
    missing = [] if "recorded" in ends else plan(settings, contract, requests)
    jobs = _jobs(settings, contract, list(ends), generation_prompt, missing, limit)
    seeds = seed_rows(settings)
    per_row = sum(len(r.user) + len(r.answer) + 60 for r in seeds) / max(1, len(seeds)) / 3
    left, lines = settings.generate.budget_usd - cost.spent(settings, "teacher_generation_cost"), {}
    for name, end in ends.items():
        own = [j for j in jobs if j.teacher == name]
        rows = sum(j.facts["rows"] for j in own)
        tokens = sum(len(j.prompt) for j in own) // 4, int(rows * per_row)
        most = sum(len(j.prompt.encode()) + 64 for j in own), sum(j.max_tokens for j in own)
        lines[name] = [len(own), rows, *tokens, cost.token_money(end, *tokens), cost.token_money(end, *most)]
    columns = ["calls", "rows", "prompt_tokens", "completion_tokens", "money", "at_most"]
    table = pd.DataFrame.from_dict(lines, orient="index", columns=columns)
    if len(ends) > 1:
        table.loc["all"] = table.sum()
    whole = dict.fromkeys(columns[:4], int)
    return table.astype(whole).assign(budget_left=left).rename_axis("teacher").round(4)


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
        self.known = {r.get("id") for f in files for r in records(f)}
        numbers = [int(m[1]) for f in files if (m := re.fullmatch(r"batch_(\d+)", f.stem))]
        self.path = settings.path(f"data/generated/batch_{max(numbers, default=0) + 1:03d}.jsonl")
        self.result = Generated()

    def add(self, rows: list[Row], unread: list[tuple[str, str]], meta: dict) -> None:
        """Append rows that are not held yet, and note the unread text with who wrote it (`meta` of the call)."""
        made = meta["provenance"]
        fresh = {r.id: r.noted(provenance={**made, "batch": self.path.stem}) for r in rows if r.id not in self.known}
        self.known |= fresh.keys()
        self.result.rows += fresh.values()
        self.result.unread += unread
        self.result.batch = self.path if self.result.rows or self.result.unread else None
        facts = {"category": meta.get("category"), "teacher": made["teacher"], "prompt_version": made.get("prompt_version")}
        if fresh:
            append_jsonl(self.path, (r.model_dump(exclude_none=True) for r in fresh.values()))
        if unread:
            lines = ({"reason": why, "text": text, **facts} for why, text in unread)
            append_jsonl(self.path.with_suffix(".unread.txt"), lines)


def _recorded(settings, batch: _Batch, limit: int) -> Generated:
    """What the recorded teacher holds and data/generated does not, in file order; a limit is spread over the cells."""
    rows = read_rows(settings.path("data/raw/recorded_teacher.jsonl"))
    held = len(batch.known & {r.id for r in rows})
    if limit and len(rows) > limit:
        rows = _spread(rows, limit)
    new = [row for row in rows if row.id not in batch.known][: max(0, limit - held) if limit else None]
    batch.add(new, [], {"provenance": {"teacher": "recorded", "prompt": "recorded", "prompt_version": "recorded"}})
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


def _jobs(settings, contract, names: list[str], generation_prompt, missing, limit: int) -> list[Job]:
    """The calls for what is missing, dealt out among the teachers."""
    jobs, left, own, seeds = [], limit or sum(request.rows for request in missing), settings.generate, seed_rows(settings)
    size = min(own.batch_rows, LOCAL_ROWS) if own.teacher == "gguf" else own.batch_rows
    blank = Request(label_values(contract)[0], "canonical", "medium", 1)
    version = digest(generation_prompt(contract, blank, seeds[:1]))
    for request in missing:
        rows = min(request.rows, left)
        left -= rows
        for part, begin in enumerate(range(0, rows, size)):
            n, chosen = min(rows - begin, size), _choose(seeds, request, part)
            prompt = generation_prompt(contract, replace(request, rows=n), chosen)
            teacher = names[int(digest(f"{request.id}:{part}"), 16) % len(names)]
            provenance = {
                "teacher": teacher, "prompt": digest(prompt), "prompt_version": version, "request": request.id,
                "parents": [row.id for row in chosen], **({"cluster": request.cluster} if request.cluster else {}),
            }  # fmt: skip
            asked = ("category", "kind", "difficulty", *(["language"] if request.language else []))
            meta = {name: getattr(request, name) for name in asked} | {"source": "teacher", "provenance": provenance}
            key = digest(json.dumps([teacher, own.temperature, prompt, part]))
            jobs.append(Job(key, prompt, 200 + n * own.tokens_per_row, {"meta": meta, "rows": n}))
    return jobs


def _rows_schema(contract) -> dict:
    """What a local teacher is held to by its runtime: rows whose output is the contract's."""
    text, output = {"type": "string"}, {k: v for k, v in contract.schema.items() if k != "$defs"}

    def whole(**properties) -> dict:
        return {"type": "object", "properties": properties, "required": [*properties]}

    row = whole(input=text, output=output, group=text)
    return whole(rows={"type": "array", "items": row, "minItems": 1}) | {"$defs": contract.schema.get("$defs", {})}


def _choose(seeds: list[Row], request: Request, part: int) -> list[Row]:
    """Seed rows for one call: the category's own first, in its language first, a different handful for each part."""
    rng = random.Random(f"{request.id}:{part}")
    own = [row for row in seeds if row.meta.category == request.category]
    other = [row for row in seeds if row.meta.category != request.category]
    for rows in (own, other):
        rng.shuffle(rows)
        rows.sort(key=lambda row: row.meta.language != request.language)
    return (own[: SEEDS - 1] + other)[:SEEDS]
