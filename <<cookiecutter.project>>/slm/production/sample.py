"""Which requests are worth keeping, and where they go: the evaluation holdout first, training second."""

import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from slm.contract import Contract
from slm.production import drift
from slm.production.logs import LogLine
from slm.registry import SETS
from slm.rows import Row, digest, iter_lines, make_row, plain, read_rows, write_jsonl, write_rows

HOLDOUT = "data/eval/production_holdout.jsonl"
REVIEW = "data/raw/production_review.jsonl"
_GENERATED = "data/generated/production.jsonl"


@dataclass
class Sample:
    """The sorted requests. `review` are those that a person must label first: failures without correction, corrections
    that break the contract, answers of low confidence, requests unlike the reference of `slm.production.drift`, and the
    random share, the only look at failures that nobody noticed."""

    holdout: list[Row] = field(default_factory=list)
    training: list[Row] = field(default_factory=list)
    review: list[dict] = field(default_factory=list)
    known: int = 0
    in_eval: int = 0

    def table(self) -> list[dict]:
        """Where the requests went."""
        why = Counter(record["why"] for record in self.review)
        lines = [("evaluation holdout", "corrected failure", len(self.holdout)), ("training candidate", "corrected failure", len(self.training))]
        lines += [("review queue", reason, count) for reason, count in why.items()]
        lines += [("left out", "taken before", self.known), ("left out", "its text stands in an evaluation set", self.in_eval)]
        return [{"to": to, "why": reason, "requests": count} for to, reason, count in lines]


def sample(settings, contract: Contract, lines: Sequence[LogLine]) -> Sample:
    """Sort scrubbed log lines. A corrected failure is a row; its group decides where, and once decided for good. The
    first `production.holdout_first` go to the holdout, then a hash of the group (with the seed) sends
    `production.eval_share` of the groups there. A text that stands in an evaluation set goes nowhere else. Of what seems
    right `production.random_share` is reviewed, and of the rest the least sure and the farthest from the reference, at
    most `production.review_most` for each reason."""
    own, found = settings.production, Sample()
    held, trained = rows_of(settings)
    taken = {row.meta.provenance.get("request_id") for row in (*held, *trained)}
    sides = {row.meta.group: "training" for row in trained} | {row.meta.group: "holdout" for row in held}
    texts = {plain(row.user) for name in SETS for row in _rows(settings, f"data/eval/{name}.jsonl")}
    sides |= {_group(row.user): "holdout" for row in held} | {_group(row.user): "training" for row in trained}
    rng, unremarkable = random.Random(own.seed), []
    for line in sorted(lines, key=lambda one: one.request_id):
        lucky = rng.random() < own.random_share  # drawn for every line, so that one line more moves no other
        if line.request_id in taken:
            found.known += 1
            continue
        if plain(line.input) in texts:
            found.in_eval += 1
            continue
        row, why = _row(contract, line)
        if row is None:
            if why or lucky:
                found.review.append(_review(line, why or "random share"))
            else:
                unremarkable.append(line)
            continue
        # One text under two customers must not part either: the text's own side wins.
        side = sides.get(_group(line.input)) or sides.get(row.meta.group)
        if side is None:  # by the group's hash alone, so that later logs fall on the same side
            first = len(held) + len(found.holdout) < own.holdout_first
            chosen = int(digest(f"{own.seed}:{row.meta.group}", 8), 16) < own.eval_share * 2**32
            side = "holdout" if first or chosen else "training"
        if {sides.get(_group(line.input), side), sides.get(row.meta.group, side)} != {side}:
            found.review.append(_review(line, "its group is on the other side"))
            continue
        sides[row.meta.group] = sides[_group(line.input)] = side
        (found.holdout if side == "holdout" else found.training).append(row)
    found.review += [_review(line, why) for line, why in _doubtful(settings, contract, unremarkable)]
    return found


def save_sample(settings, found: Sample) -> dict[str, int]:
    """Append to the holdout, to data/generated/production.jsonl (for the gates of 04) and to the review queue.
    Evaluation is written first. Returns the rows that each file holds now."""
    counts = {}
    for path, rows in ((HOLDOUT, found.holdout), (_GENERATED, found.training)):
        if rows or settings.path(path).is_file():
            every = list({row.id: row for row in (*_rows(settings, path), *rows)}.values())
            counts[path] = len(every)
            write_rows(settings.path(path), every)
    if found.review:
        path = settings.path(REVIEW)
        waiting = [json.loads(line) for _, line in iter_lines(path)] if path.is_file() else []
        every = {record["request_id"]: record for record in (*found.review, *waiting)}  # what a person filled in stays
        counts[REVIEW] = len(every)
        write_jsonl(path, every.values())
    return counts


def rows_of(settings) -> tuple[list[Row], list[Row]]:
    """All production rows so far: (evaluation holdout, training)."""
    accepted = [r for r in _rows(settings, "data/accepted/all.jsonl") if r.meta.source == "production"]
    training = {row.id: row for row in _rows(settings, _GENERATED) + accepted}
    return _rows(settings, HOLDOUT), list(training.values())


def _doubtful(settings, contract: Contract, lines: Sequence[LogLine]) -> list[tuple[LogLine, str]]:
    """What a person should see of the requests that nothing speaks against: the least sure, then the farthest out."""
    own = settings.production
    sure, known = [line.confidence or float(line.confidence is None) for line in lines], drift.reference(settings, contract)
    unsure = sorted((one, n) for n, one in enumerate(sure) if one < own.low_confidence)[: own.review_most]
    found = [(lines[n], "low confidence") for _, n in unsure]
    left = [line for line, one in zip(lines, sure, strict=True) if one >= own.low_confidence]
    far = zip(left, drift.unlike(settings, known, left) if known else (), strict=False)
    far = sorted((p, line.request_id, what, line) for line, (p, what) in far if p <= drift.FAR)
    for what in dict.fromkeys(what for _, _, what, _ in far):
        most = [line for _, _, other, line in far if other == what][: own.review_most]
        found += [(line, f"unlike the {known.name}: {what}") for line in most]
    return found


def _row(contract: Contract, line: LogLine) -> tuple[Row | None, str]:
    """A row with its human answer, or None and why a person must look (nothing when the request is unremarkable)."""
    output = contract.parse(line.output)
    failed = not line.parse_ok or output.error is not None
    if line.correction is None:
        return None, "failure without a correction" if failed else ""
    right = contract.parse(line.correction)
    if right.error:
        return None, f"correction breaks the contract: {right.error}"
    if not failed and output.value == right.value:
        return None, ""
    provenance = {"request_id": line.request_id, "model_version": line.model_version, "time": line.time.isoformat()}
    provenance |= {"consent": line.consent, "license": line.license}
    meta = {"kind": "production_like", "source": "production", "group": _pseudonym(line), "provenance": provenance}
    label = contract.label(right.value) or "all"
    return make_row(line.input, contract.dump(right.value), category=label, **meta), ""


def _review(line: LogLine, why: str) -> dict:
    # Still a log line: with `correction` filled in, the queue is read as a log (production.logs) and sorted again.
    return {"why": why, **line.model_dump(mode="json"), "group": _pseudonym(line)}


def _pseudonym(line: LogLine) -> str:
    """The group without the customer's name: a hash of the log's group, else of the text."""
    if line.group.startswith("production-"):
        return line.group
    return _group(line.group) if line.group else _group(line.input)


def _group(text: str) -> str:
    return "production-" + digest(plain(text))


def _rows(settings, path: str) -> list[Row]:
    return read_rows(settings.path(path)) if settings.path(path).is_file() else []
