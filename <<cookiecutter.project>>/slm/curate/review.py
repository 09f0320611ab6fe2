"""Rows that a person must look at: the gates that wait for one, the queue with its reasons, and the widget of 04."""

import hashlib
import json
import re
from bisect import insort
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from slm import registry
from slm.curate import privacy
from slm.curate.decisions import Decision, decide, read_decisions
from slm.curate.judge import Judge, find_rows
from slm.curate.read import Verdict
from slm.curate.rubric import refusal
from slm.errors import SlmError
from slm.rows import Row, iter_lines

PROVEN = ("json_validity", "schema_validity", "contract_validity", "length", "personal_data", "evaluation_leakage", "removed")
WHY = ("sign-off", "judge refuses", "contradiction", "borderline", "high risk", "critical field", "random sample")
BORDER = 0.05  # a similarity this close above its threshold is worth a look


def extra_gates(settings, contract, judge_prompt: Callable | None = None) -> list[tuple[str, Callable]]:
    """The optional gates that the settings turn on, as (name, function of rows and values -> verdicts)."""
    cfg, gates = settings.curate, []
    if cfg.patterns:
        gates.append(("regex", partial(exact, contract=contract, patterns=cfg.patterns)))
    if cfg.privacy == "presidio":
        gates.append(("personal_data_model", partial(privacy.guessed, models=cfg.spacy_models)))
    if cfg.judge.url and judge_prompt:
        gates.append(("judge", Judge(settings, contract, judge_prompt)))
    if cfg.expert_fields:
        gates.append(("expert_signoff", partial(unsigned, contract=contract, settings=settings)))
    return gates


def exact(rows: list[Row], values: list[dict], contract, patterns: dict[str, str]) -> list[Verdict | None]:
    """The regex gate: each named field that is filled (or "answer", the whole text) matches its pattern in full."""
    verdicts: list[Verdict | None] = []
    for row, value in zip(rows, values, strict=True):
        flat = {**contract.flatten(value), "answer": row.answer}
        wrong = [n for n, p in patterns.items() if flat.get(n) is not None and not re.fullmatch(p, str(flat[n]))]
        proof = {name: str(flat[name])[:200] for name in wrong}
        verdicts.append(Verdict("regex", f"{wrong[0]} does not match its pattern", proof) if wrong else None)
    return verdicts


def named(names, value: dict, contract) -> list[str]:
    """Those of `names` that a value carries: its label, "field" (filled and not false) or "field=value"."""
    flat = {name: item for name, item in contract.flatten(value).items() if item not in (None, "", False)}
    carried = {contract.label(value), *flat, *(f"{name}={item}" for name, item in flat.items())}
    return [name for name in names if name in carried]


def unsigned(rows: list[Row], values: list[dict], contract, settings) -> list[Verdict | None]:
    """The sign-off gate: a row that carries a name of `curate.expert_fields` stays out until one of its people takes it."""
    experts, decisions = settings.curate.expert_fields, read_decisions(settings)
    verdicts: list[Verdict | None] = []
    for row, value in zip(rows, values, strict=True):
        lacking = [n for n in named(experts, value, contract) if not _signed(decisions.get(row.id), experts[n])]
        proof = {"field": lacking[0], "experts": experts[lacking[0]]} if lacking else {}
        reason = f"{lacking[0]} waits for the sign-off of {' or '.join(proof['experts'])}" if lacking else ""
        verdicts.append(Verdict("expert_signoff", reason, proof) if lacking else None)
    return verdicts


def _signed(decision: Decision | None, allowed: list[str]) -> bool:
    """Whether one of `allowed` took the row; "Ada Byron (counsel)" is both Ada Byron and counsel."""
    if decision is None or decision.decision == "reject":
        return False
    names = {part.strip().lower() for part in (decision.reviewer, *re.split(r"[()]", decision.reviewer))} - {""}
    return bool(names & {person.strip().lower() for person in allowed})


def by_hand(settings, row_id: str, decision: str, reviewer: str, reason: str = "") -> Decision:
    """Record "accept" or "reject" of a row. Raises SlmError when no seed row or batch has that id."""
    if not find_rows(settings, {row_id}):
        raise SlmError(f"{row_id}: no row in data/raw/seed.jsonl or data/generated has this id.")
    return decide(settings, Decision(id=row_id, decision=decision, reviewer=reviewer, reason=reason))


def restore(settings, row_id: str, reviewer: str, reason: str = "") -> Decision:
    """A person takes a refused row back; 04 lets it through on its next run. Raises SlmError for a row that is not in
    data/rejected, or whose gate is no matter of opinion."""
    record = next((r for r in judged_rows(settings) if r["gate"] and r["row"]["id"] == row_id), None)
    if record is None:
        raise SlmError(f"{row_id}: no such row in data/rejected; the ids stand in its files.")
    gate, decision = record["gate"], Decision(id=row_id, decision="accept", reviewer=reviewer, reason=reason)
    if gate in PROVEN:
        raise SlmError(f"{row_id}: {record['reason']} ({gate}); no decision overrules that, mend the row at its source.")
    if gate == "expert_signoff" and not _signed(decision, record["evidence"]["experts"]):
        raise SlmError(f"{row_id}: {record['reason']}; {reviewer} is none of them.")
    return decide(settings, decision)


def judged_rows(settings):
    """What 04 decided last, one record a row as data/rejected keeps it; accepted rows have the gate ""."""
    accepted, rejected = settings.path("data/accepted/all.jsonl"), sorted(settings.path("data/rejected").glob("*.jsonl"))
    for path in ([accepted] if accepted.is_file() else []) + rejected:
        for _, line in iter_lines(path):
            record = json.loads(line)
            record = {"gate": "", "reason": "", "evidence": {}, "row": record} if path == accepted else record
            if "row" in record:
                yield record


def review(settings, contract) -> "Review":
    """The rows of the last run of 04 that wait for a person, those with the most pressing reason first."""
    cfg, decided = settings.curate, read_decisions(settings)
    words = {line["id"]: refusal(line["text"])[0] for line in registry.read(settings, "judge")}
    border = {"jaccard": BORDER + cfg.near_duplicate, "cosine": BORDER + cfg.semantic_duplicate}
    fields = contract.schema.get("properties", {})
    critical = [n for n in contract.critical if {"type": "null"} in fields.get(n, {}).get("anyOf", ())]
    queue: dict[str, tuple[Row, list[str]]] = {}
    found, sample = Counter(), []
    for record in judged_rows(settings):
        if (gate := record["gate"]) in PROVEN:
            continue
        row, proof, why = Row.model_validate(record["row"]), record["evidence"], []
        if gate in ("", "judge", "human_review") and cfg.review_sample:
            insort(sample, (hashlib.sha256(f"{cfg.seed}:{row.id}".encode()).digest(), row), key=lambda pair: pair[0])
            del sample[cfg.review_sample :]
        if gate == "expert_signoff":
            why.append(f"sign-off: {proof['field']}")
        elif gate in ("", "judge"):
            value = contract.parse(row.answer).value
            why += [f"judge refuses: {words[row.id]}"] if words.get(row.id) else []
            why += [f"high risk: {name}" for name in named((*contract.unsafe_labels, *cfg.review_fields), value, contract)]
            why += [f"critical field: {name}" for name in named(critical, value, contract)]
        elif gate == "label_consistency":
            why.append(f"contradiction: {proof['field']} is answered differently in {proof['twin']}")
        elif gate == "duplicates" and proof["similarity"] < border.get(proof["measure"], 0):
            why.append(f"borderline: {proof['measure']} {proof['similarity']} to {proof['twin']}")
        if why and (row.id not in decided or gate == "expert_signoff"):
            kind = why[0].split(":")[0]
            found[kind] += 1
            if found[kind] <= cfg.review_most:
                queue[row.id] = (row, why)
    for _, row in sample:
        if row.id not in decided:
            found["random sample"] += row.id not in queue
            queue.setdefault(row.id, (row, []))[1].append("random sample")
    items = sorted(queue.values(), key=lambda item: WHY.index(item[1][0].split(":")[0]))
    return Review(settings, contract, items, {kind: found[kind] for kind in WHY if found[kind]})


@dataclass
class Review:
    """The queue at work: `card` is what is shown, `act` what the reviewer does; a decision is on disk at once."""

    settings: object
    contract: object
    items: list[tuple[Row, list[str]]]
    found: dict[str, int]
    at: int = 0
    done: dict[str, str] = field(default_factory=dict)
    error: str = ""

    def table(self):
        """Why rows wait: found in all, and queued (at most `curate.review_most` for each reason)."""
        import pandas as pd

        queued = Counter(why[0].split(":")[0] for _, why in self.items)
        lines = [{"why": why, "found": n, "queued": queued[why]} for why, n in self.found.items()]
        return pd.DataFrame(lines, columns=["why", "found", "queued"])

    def card(self) -> dict:
        """The row shown, as plain data: the browser sets it as text, never as markup."""
        shown = {"total": len(self.items), "done": len(self.done), "at": self.at, "error": self.error}
        if not self.items:
            return shown
        row, why = self.items[self.at]
        answer = json.dumps(json.loads(row.answer), ensure_ascii=False, indent=2)
        facts = " · ".join([row.id, row.meta.category, row.meta.kind, row.meta.difficulty, row.meta.language, row.meta.source])
        shown |= {"id": row.id, "why": why, "turns": self.contract.messages(row)[:-1], "answer": answer, "facts": facts}
        return shown | {"decided": self.done.get(row.id, "")}

    def act(self, message: dict) -> None:
        """`message` holds do (accept, reject, edit, next, back), the id of the row that was seen, reviewer, reason, answer."""
        self.error, step = "", {"next": 1, "back": -1}.get(message["do"], 0)
        if step:
            self.at = max(0, min(len(self.items) - 1, self.at + step))
        elif message["id"] == self.items[self.at][0].id:  # a key pressed twice must not decide a row that nobody saw
            try:
                self._decide(self.items[self.at][0], message)
            except (SlmError, OSError) as problem:
                self.error = str(problem)

    def _decide(self, row: Row, message: dict) -> None:
        word, reviewer, answer = message["do"], message.get("reviewer", "").strip(), None
        if not reviewer:
            raise SlmError("Who decides? Write your name above first.")
        if word == "edit":
            parsed = self.contract.parse(message["answer"])
            if parsed.error:
                raise SlmError(f"Not taken, it breaks the contract: {parsed.error}")
            answer = self.contract.dump(parsed.value)
        reason = message.get("reason", "").strip()
        decide(self.settings, Decision(id=row.id, decision=word, reviewer=reviewer, answer=answer, reason=reason))
        self.done[row.id] = word
        order = [*range(self.at + 1, len(self.items)), *range(self.at)]
        self.at = next((n for n in order if self.items[n][0].id not in self.done), self.at)

    def widget(self):
        """The queue for JupyterLab, Notebook 7, VS Code and Colab; a sentence where anywidget is not installed."""
        try:
            import anywidget
            import traitlets
        except ImportError:
            return "To review rows here: pip install -e '.[review]', restart the kernel, run 04 again."

        class Widget(anywidget.AnyWidget):
            _esm = Path(__file__).with_name("review.js").read_text(encoding="utf-8")
            card = traitlets.Dict().tag(sync=True)

        shown = Widget(card=self.card())

        def on_message(_, message: dict, __) -> None:
            self.act(message)
            shown.card = self.card() | {"turn": shown.card.get("turn", 0) + 1}

        shown.on_msg(on_message)
        return shown
