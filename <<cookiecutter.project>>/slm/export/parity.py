"""Third proof: golden and dev rows through llama.cpp for every file, against the adapter; a drop is attributed, a file chosen."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace

from slm.contract import Contract
from slm.errors import SlmError
from slm.evaluate import Comparison, Metric, Result, Score, evaluate, measure, paired, take
from slm.evaluate.scorers import answer_rows, prompt_messages
from slm.export.logits import MERGED, LogitProof
from slm.export.merge import adapter_folder
from slm.export.quantize import GgufFile
from slm.models import Prompt, cached, student
from slm.models.llama_cpp import LlamaCppModel
from slm.registry import check_locked
from slm.rows import Row, read_rows
from slm.train.encode import render

ADAPTER, MESSAGES, TEXT, IDS = "adapter", "messages", "rendered text", "token ids"
LOOP = re.compile(r"(.{4,200}?)\1{3,}", re.DOTALL)


@dataclass(frozen=True)
class Scored:
    """One way through one file (or the adapter itself). `results` are a shipped file's, golden first, the last one timed;
    its scores are those of all of them."""

    name: str
    way: str
    repeat_penalty: float
    scores: list[Score]
    metrics: dict[str, Metric]
    file: GgufFile | None = None
    results: tuple[Result, ...] = ()

    @property
    def exact(self) -> int:
        """Rows that are exactly right."""
        return sum(s.exact for s in self.scores)

    @property
    def endless(self) -> int:
        """Answers that did not stop by themselves."""
        return sum(s.finish_reason == "length" for s in self.scores)

    @property
    def repeated(self) -> int:
        """Answers in which a piece of four characters or more stands at least four times in a row."""
        return sum(bool(LOOP.search(s.text)) for s in self.scores)

    def on(self, other: "Scored") -> "Scored":
        """The same, on the rows of `other` alone; the metrics stay those of all rows."""
        ids = {s.row_id for s in other.scores}
        return replace(self, scores=[s for s in self.scores if s.row_id in ids])


class RenderedPrompts:
    """llama.cpp fed with what the trained tokenizer makes of a chat: its token ids (path A) or its text (path B), or with
    the messages (path C). `known` is shared by all ways: where the file reads the same ids, it is not asked twice."""

    def __init__(self, model, tokenizer, way: str, known: dict):
        self._model, self._tokenizer, self._way, self._known = model, tokenizer, way, known
        self.name = f"{model.name} {way}"
        self.fingerprint = f"{model.fingerprint} {way}"

    def answer(self, prompts):
        """One answer per prompt, in order; all prompts have the same `max_tokens`."""
        asked = [prompt.messages for prompt in prompts]
        if self._way != MESSAGES:
            asked = [render(self._tokenizer, messages, add_generation_prompt=True) for messages in asked]
        trained = self._tokenizer(asked, add_special_tokens=False)["input_ids"] if self._way == IDS else ()
        keys = list(map(tuple, trained or map(self._model.tokenize, asked)))
        new = [key for key in dict.fromkeys(keys) if key not in self._known]
        self._known.update(zip(new, self._model.answer_ids(list(map(list, new)), prompts[0].max_tokens), strict=True))
        return [self._known[key] for key in keys]


def golden_rows(settings) -> list[Row]:
    """The locked golden rows, or `evaluate.limit` of them. Raises SlmError when the set has changed since 02."""
    check_locked(settings)
    return take(settings, read_rows(settings.path("data/eval/golden.jsonl")))


def score_adapter(settings, contract: Contract, rows: Sequence[Row]) -> Scored:
    """The reference: the adapter over the base in transformers, as 06 scored it (its answers are reused)."""
    return _score(settings, contract, rows, student(settings, adapter_folder(settings)), ADAPTER, "transformers", 1.0)


def ask(
    settings, contract: Contract, file: GgufFile, sets: dict[str, Sequence[Row]], timed: str = "", guess: Sequence[Score] = ()
) -> list[Result]:  # fmt: skip
    """One file as it is shipped on some sets: messages through the runtime's own template, with the shipped
    repeat_penalty; lone requests of the set `timed` are timed. `guess`: another's answers to these rows, see `LlamaCppModel.guess`."""
    penalty, slots = settings.export.repeat_penalty, settings.evaluate.slots
    model = LlamaCppModel(file.path, context=settings.export.context, repeat_penalty=penalty, slots=slots)
    try:
        _guess(model, contract, [row for rows in sets.values() for row in rows], guess)
        return [
            evaluate(settings, contract, model, rows, set=name, name=file.quant, latency=name == timed)
            for name, rows in sets.items()
        ]
    finally:
        model.close()


def score_files(
    settings, contract: Contract, rows: Sequence[Row], files: Sequence[GgufFile], dev: Sequence[Row] = (),
    guess: Sequence[Score] = (),
) -> list[Scored]:  # fmt: skip
    """Every file as it is shipped: messages through the runtime's own template, with the shipped repeat_penalty. Golden
    and dev rows decide together, and stand in the evaluation report; lone requests of the last set are timed."""
    found, penalty = [], settings.export.repeat_penalty
    sets = {name: part for name, part in (("golden", rows), ("dev", dev)) if part}
    for file in files:
        results = ask(settings, contract, file, sets, list(sets)[-1], guess)
        scores = [score for result in results for score in result.scores]
        metrics = measure(scores, contract, settings)
        found.append(Scored(file.quant, MESSAGES, penalty, scores, metrics, file, tuple(results)))
    return found


def score_paths(
    settings, contract: Contract, rows: Sequence[Row], f16: GgufFile, merged, guess: Sequence[Score] = ()
) -> list[Scored]:  # fmt: skip
    """The f16 file without a repeat penalty in three ways: token ids (A), rendered text (B), messages (C). Answers that
    the shipped penalty leaves as they are need no second asking: they are kept for `score_files`."""
    from transformers import AutoTokenizer

    tokenizer, known = AutoTokenizer.from_pretrained(merged), {}
    model = LlamaCppModel(f16.path, context=settings.export.context, other_penalty=settings.export.repeat_penalty)
    try:
        _guess(model, contract, rows, guess)
        ways = [(RenderedPrompts(model, tokenizer, way, known), way) for way in (IDS, TEXT, MESSAGES)]
        found = [_score(settings, contract, rows, asked, f16.quant, way, 1.0, f16) for asked, way in ways]
        same = model.others([Prompt(prompt_messages(contract, row), settings.evaluate.max_new_tokens) for row in rows])
        answers = {id(prompt): answer for prompt, answer in same}
        shipped = SimpleNamespace(
            name=model.name, fingerprint=model.other_fingerprint, answer=lambda prompts: [answers[id(p)] for p in prompts]
        )  # fmt: skip
        cached(shipped, settings).answer([prompt for prompt, _ in same])
        return found
    finally:
        model.close()


def room(settings, n: int) -> int:
    """How many of `n` rows a file may lose: `export.tolerance` of them, one at least."""
    return max(1, round(settings.export.tolerance * n))


def compare(settings, contract: Contract, reference: Scored, found: Scored) -> Comparison:
    """A way through a file against the adapter, on the rows that it answered."""
    return paired(found.scores, reference.on(found).scores, contract, settings)


def holds(settings, contract: Contract, reference: Scored, found: Scored) -> bool:
    """Whether a file is as good as the adapter, give or take `room` rows, and stops as reliably. Rows are counted as
    exact ones and as points of the primary metric; the worse count decides."""
    pair, n = compare(settings, contract, reference, found), len(found.scores)
    lost = max(len(pair.broken) - len(pair.fixed), -pair.difference.value * n)
    return max(lost, found.endless - reference.on(found).endless) <= room(settings, n) + 1e-9


def attribute(
    settings, contract: Contract, reference: Scored, paths: Sequence[Scored], shipped: Scored, logits: Sequence[LogitProof]
) -> str:  # fmt: skip
    """Which stage broke the f16 file, or "equal". First the next tokens, which a handful of rows may not show: of the
    merged model, of the f16 file. Then the rows. A low: weights. A high, B low: tokenizer. B high, C low: chat
    template. C high, but low as shipped: the repeat penalty."""
    causes = {
        MERGED: "merge: the merged model's next tokens are not the adapter's; merge again, into the 16-bit base it was trained on",
        "f16": "weights: the f16 file's next tokens are not the merged model's; it was made of other or changed weights",
        IDS: "weights: token ids straight into the f16 file already score lower; the merge or the conversion changed them",
        TEXT: "tokenizer: the same prompts as text score lower than as token ids; the conversion changed the tokenizer",
        MESSAGES: "chat template: messages score lower than the rendered text; the file's template is another one",
    }
    for proof in logits:
        if proof.file in causes and not proof.holds:
            return f"{causes[proof.file]} (divergence {proof.kl:.2g} nats, at most {proof.most:g})"
    if broken := [path for path in paths if not holds(settings, contract, reference, path)]:
        return causes[broken[0].way]
    if not holds(settings, contract, reference, shipped):
        return f"sampling: repeat_penalty {shipped.repeat_penalty:g} costs the rows; set export.repeat_penalty: 1.0"
    return "equal"


def fit(settings, contract: Contract, reference: Scored, found: Scored, logits: Sequence[LogitProof]) -> str:
    """"yes", or what a file fails by: next tokens, rows lost, or an interval of the paired difference that reaches below
    -`export.margin`, which may mean a loss or too few rows."""
    if found.name in {proof.file for proof in logits if not proof.holds}:
        return "no: next tokens"
    if not holds(settings, contract, reference, found):
        return "no: rows lost"
    low = compare(settings, contract, reference, found).difference.low
    return "yes" if low >= -settings.export.margin else "no: interval too wide"


def choose(
    settings, contract: Contract, reference: Scored, shipped: Sequence[Scored], logits: Sequence[LogitProof]
) -> Scored | None:  # fmt: skip
    """The smallest file that fits, or None."""
    good = [found for found in shipped if fit(settings, contract, reference, found, logits) == "yes"]
    return min(good, key=lambda found: found.file.size_mb, default=None)


def table(
    settings, contract: Contract, reference: Scored, found: Sequence[Scored], logits: Sequence[LogitProof] = ()
) -> list[dict]:  # fmt: skip
    """One record per way through a file: score with interval, next tokens, parse rate, size, speed, and whether it holds.
    The adapter's line is on the rows that the others answered."""
    lines, near = [], {proof.file: proof for proof in logits}
    if found and len(found[0].scores) < len(reference.scores):
        reference = reference.on(found[0])
        reference = replace(reference, metrics=measure(reference.scores, contract, settings))
    for one in [reference, *found]:
        file, n, pair = one.file, len(one.scores), compare(settings, contract, reference, one)
        timed = one.results[-1] if one.results else None
        difference = "{value:+.3f} [{low:+.3f}, {high:+.3f}]".format(**pair.difference.model_dump())
        lines.append({
            "file": one.name, "path": one.way, "repeat_penalty": one.repeat_penalty,
            contract.primary_metric: str(one.metrics[contract.primary_metric]),
            "against adapter": "-" if one is reference else difference, "exact": f"{one.exact}/{n}",
            "fixed": len(pair.fixed), "broken": len(pair.broken), "parse rate": f"{one.metrics['schema_validity'].value:.3f}",
            "endless": f"{one.endless}/{n}", "repeated": f"{one.repeated}/{n}",
            "divergence": f"{near[one.name].kl:.2g}" if one.name in near else "-",
            "size MB": round(file.size_mb, 1) if file else "-",
            "p50 s": round(timed.latency_p50_s, 3) if timed else "-",
            "p95 s": round(timed.latency_p95_s, 3) if timed else "-",
            "tokens/s": round(timed.tokens_per_second or 0, 1) if timed else "-",
            "memory MB": round(timed.memory_mb) if timed and timed.memory_mb is not None else "-",
            "holds": "-" if one is reference else fit(settings, contract, reference, one, logits),
        })  # fmt: skip
    return lines


def _guess(model: LlamaCppModel, contract: Contract, rows: Sequence[Row], guess: Sequence[Score]) -> None:
    texts = {score.row_id: score.text for score in guess}
    rows = [row for row in rows if row.id in texts]
    model.guess([prompt_messages(contract, row) for row in rows], [texts[row.id] for row in rows])


def _score(settings, contract, rows, model, name, way, penalty, file=None) -> Scored:
    if not rows:
        raise SlmError("data/eval/golden.jsonl: no rows; an export cannot be proven without them.")
    scores = answer_rows(cached(model, settings), rows, contract, settings.evaluate.max_new_tokens)
    return Scored(name, way, penalty, scores, measure(scores, contract, settings), file)
