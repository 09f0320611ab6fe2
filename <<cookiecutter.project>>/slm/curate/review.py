"""Rows that a person must look at: the gates that wait for one, the queue with its reasons, and the widget of 04."""

import json
import re
import time
from bisect import insort
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from slm import cost, registry
from slm.curate import privacy
from slm.curate.decisions import Decision, decide, read_decisions
from slm.curate.judge import Judge, find_rows
from slm.curate.read import Verdict
from slm.curate.rubric import refusal
from slm.errors import SlmError
from slm.generate.plan import judged
from slm.rows import Row, digest

PROVEN = ("json_validity", "schema_validity", "contract_validity", "length", "personal_data", "evaluation_leakage", "removed",
          "restricted_source")  # fmt: skip
WHY = ("sign-off", "judge refuses", "contradiction", "borderline", "high risk", "random sample")  # most pressing first
PAUSE_S = 300.0  # a longer wait between two clicks is no work at this row
BORDER = 0.05  # a similarity this close above its threshold is worth a look


def extra_gates(settings, contract, judge_prompt: Callable | None = None) -> list[tuple[str, Callable]]:
    """The optional gates that the settings turn on, as (name, function of rows and values -> verdicts)."""
    cfg, gates, decisions = settings.curate, [], read_decisions(settings)
    if cfg.patterns:
        gates.append(("regex", _each("regex", partial(exact, contract=contract, patterns=cfg.patterns))))
    if cfg.privacy == "presidio":
        gates.append(("personal_data_model", partial(privacy.guessed, models=cfg.spacy_models)))
    if cfg.judge.url and judge_prompt:
        gates.append(("judge", Judge(settings, contract, judge_prompt)))
    if cfg.expert_fields:
        look = partial(unsigned, contract=contract, experts=cfg.expert_fields, decisions=decisions)
        gates.append(("expert_signoff", _each("expert_signoff", look)))
    return gates


def _each(name: str, look: Callable) -> Callable:
    return lambda rows, values: [Verdict(name, *hit) if (hit := look(*pair)) else None for pair in zip(rows, values, strict=True)]


def exact(row: Row, value: dict, contract, patterns: dict[str, str]) -> tuple[str, dict] | None:
    """The regex gate: each named field that is filled (or "answer", the whole text) matches its pattern in full."""
    flat = {**contract.flatten(value), "answer": row.answer}
    wrong = [n for n, p in patterns.items() if flat.get(n) is not None and not re.fullmatch(p, str(flat[n]))]
    return (f"{wrong[0]} does not match its pattern", {name: str(flat[name])[:200] for name in wrong}) if wrong else None


def unsigned(row: Row, value: dict, contract, experts: dict[str, list[str]], decisions: dict) -> tuple[str, dict] | None:
    """The sign-off gate: a row that carries a name of `experts` stays out until one of the people named took it."""
    lacking = [n for n in named(experts, value, contract) if not _signed(decisions.get(row.id), experts[n])]
    who = " or ".join(experts[lacking[0]]) if lacking else ""
    proof = {"field": ", ".join(lacking), "experts": [experts[name] for name in lacking]}
    return (f"{lacking[0]} waits for the sign-off of {who}", proof) if lacking else None


def named(names, value: dict, contract) -> list[str]:
    """Those of `names` that a value carries: its label, "field" (filled and not false) or "field=value"."""
    flat = {name: item for name, item in contract.flatten(value).items() if item not in (None, "", False)}
    carried = {contract.label(value), *flat, *(f"{name}={item}" for name, item in flat.items())}
    return [name for name in names if name in carried]


def _signed(decision: Decision | None, allowed: list[str]) -> bool:
    """Whether one of `allowed` took the row; "Ada Byron (counsel)" is both Ada Byron and counsel."""
    if decision is None or decision.decision == "reject":
        return False
    names = {part.strip().lower() for part in (decision.reviewer, *re.split(r"[()]", decision.reviewer))}
    return bool(names & {person.strip().lower() for person in allowed if person.strip()})


def by_hand(settings, row_id: str, decision: str, reviewer: str, reason: str = "") -> Decision:
    """Record "accept" or "reject" of a row. Raises SlmError when no seed row or batch has that id."""
    if not find_rows(settings, {row_id}):
        raise SlmError(f"{row_id}: no row in data/raw/seed.jsonl or data/generated has this id.")
    return decide(settings, Decision(id=row_id, decision=decision, reviewer=reviewer, reason=reason))


def restore(settings, row_id: str, reviewer: str, reason: str = "") -> Decision:
    """A person takes a refused row back; 04 lets it through on its next run. Raises SlmError for a row that is not in
    data/rejected, or whose gate is no matter of opinion."""
    record = next((r for r in judged(settings) if r["gate"] and r["row"]["id"] == row_id), None)
    if record is None:
        raise SlmError(f"{row_id}: no such row in data/rejected; the ids stand in its files.")
    decision, why = Decision(id=row_id, decision="accept", reviewer=reviewer, reason=reason), record["reason"]
    if record["gate"] in PROVEN:
        raise SlmError(f"{row_id}: {why} ({record['gate']}); no decision overrules that, mend the row at its source.")
    if record["gate"] == "expert_signoff" and not all(_signed(decision, who) for who in record["evidence"]["experts"]):
        raise SlmError(f"{row_id}: {why}; {reviewer} is none of them.")
    return decide(settings, decision)


def review(settings, contract) -> "Review":
    """The rows of the last run of 04 that wait for a person, those with the most pressing reason first. Of the critical
    fields, those count that may be null: the others every row fills."""
    cfg, decided, fields = settings.curate, read_decisions(settings), contract.schema.get("properties", {})
    refused = {line["id"]: refusal(line["text"])[0] for line in registry.read(settings, "judge")}
    border = {"jaccard": BORDER + cfg.near_duplicate, "cosine": BORDER + (cfg.embedding_duplicate if cfg.embedder else cfg.semantic_duplicate)}
    critical = [name for name in contract.critical if {"type": "null"} in fields.get(name, {}).get("anyOf", ())]
    risky = (*contract.unsafe_labels, *critical, *cfg.review_fields)
    queue: dict[str, tuple[Row, list[str]]] = {}
    found, sample = Counter(), []
    for record in judged(settings):
        if (gate := record["gate"]) in PROVEN:
            continue
        row, proof, why = Row.model_validate(record["row"]), record["evidence"], []
        if gate in ("", "judge", "human_review"):
            insort(sample, (digest(f"{cfg.seed}:{row.id}", 16), row), key=lambda pair: pair[0])
            del sample[cfg.review_sample :]
        if gate == "expert_signoff":
            why.append(f"sign-off: {proof['field']}")
        elif gate in ("", "judge"):
            why += [f"judge refuses: {refused[row.id]}"] if refused.get(row.id) else []
            why += [f"high risk: {name}" for name in named(risky, contract.parse(row.answer).value, contract)]
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
    clock: float = field(default_factory=time.monotonic)  # when the card now shown came up
    spent: float = 0.0  # seconds of looking that are not in the ledger yet

    def table(self):
        """Why rows wait: found in all, and queued (at most `curate.review_most` for each reason)."""
        import pandas as pd

        queued = Counter(why[0].split(":")[0] for _, why in self.items)
        lines = [(why, n, queued[why]) for why, n in self.found.items()]
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
        self.error, row, now = "", self.items[self.at][0], time.monotonic()
        self.spent, self.clock = self.spent + min(now - self.clock, PAUSE_S), now
        if message["do"] in ("next", "back"):
            self.at = max(0, min(len(self.items) - 1, self.at + (1 if message["do"] == "next" else -1)))
        elif message["id"] == row.id:  # a key pressed twice must not decide a row that nobody saw
            try:
                self._decide(row, message["do"], message.get("reviewer", "").strip(), message)
            except (SlmError, OSError) as problem:
                self.error = str(problem)

    def _decide(self, row: Row, word: str, reviewer: str, message: dict) -> None:
        if not reviewer:
            raise SlmError("Who decides? Write your name above first.")
        answer, reason = None, message.get("reason", "").strip()
        if word == "edit":
            parsed = self.contract.parse(message["answer"])
            if parsed.error:
                raise SlmError(f"Not taken, it breaks the contract: {parsed.error}")
            answer = self.contract.dump(parsed.value)
        decide(self.settings, Decision(id=row.id, decision=word, reviewer=reviewer, answer=answer, reason=reason))
        self.done[row.id] = word
        cost.add_hours(self.settings, "data_review_cost", self.spent / 3600, reviewer=reviewer)
        self.spent = 0.0
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

        def on_message(shown: Widget, message: dict, _) -> None:
            self.act(message)
            shown.card = self.card() | {"turn": shown.card.get("turn", 0) + 1}

        shown = Widget(card=self.card())
        shown.on_msg(on_message)
        return shown
