"""A judge's word on free text: rubric scores, and which of two answers is better, asked in both orders."""

import json
from collections.abc import Sequence

from slm.contract import Contract, first_object
from slm.errors import SlmError
from slm.evaluate.intervals import Metric, interval
from slm.evaluate.scorers import Score, row_metric
from slm.rows import Record, Row

RUBRIC = ("fidelity", "task", "clarity")
TASK = """You judge answers to this task: {task}
Goal: {goal}
Not acceptable: {faults}
INPUT: {input}
REFERENCE (one good answer among others): {reference}
"""
RATE = """ANSWER: {answer}
Give whole numbers from 1 (useless) to 5 (nothing to mend): fidelity (nothing added, lost or twisted), task (it does
what is asked), clarity (short, plain, good language). Reply with JSON only: {{"fidelity": 1, "task": 1, "clarity": 1}}"""
CHOOSE = """ANSWER 1: {first}
ANSWER 2: {second}
Which answer does the task better? Order and length do not count. Reply with JSON only: {{"better": 1}}, {{"better": 2}}
or, when neither is better, {{"better": 0}}."""
OUTCOMES = {(1, 2): "wins", (2, 1): "losses"}  # the judge's picks: the candidate stands first, then second


class Preference(Record):
    """Candidate against baseline by a judge that saw each pair in both orders. A row is won or lost when both orders
    agree, else tied; `win_rate` counts a tie as half. `consistency`: rows in which both orders agree; `first_rate`: the
    verdicts for the answer shown first, of those for either; `sign_p`: the exact sign test of wins against losses."""

    judge: str
    wins: list[str] = []
    losses: list[str] = []
    ties: list[str] = []
    unread: list[str] = []
    win_rate: Metric
    consistency: Metric
    first_rate: Metric
    sign_p: float
    warnings: list[str] = []


def judge_model(settings):
    """The judge of `evaluate.judge`, its replies cached. Raises SlmError when none is set."""
    from slm.models import cached
    from slm.models.openai_api import OpenAIModel

    return cached(OpenAIModel(settings.evaluate.judge), settings)


def prefer(
    settings, contract: Contract, rows: Sequence[Row], candidate: Sequence[Score], baseline: Sequence[Score], judge=None
) -> Preference:  # fmt: skip
    """Ask the judge which of two answers is better, row by row and in both orders. Rows with a reply that cannot be
    read are left out and named; a judge that goes by the order is named in `warnings`."""
    from scipy.stats import binomtest

    judge, own = judge or judge_model(settings), settings.evaluate
    mine, other = ({s.row_id: s.text for s in scores} for scores in (candidate, baseline))
    orders = [(row, *pair) for pair in ((mine, other), (other, mine)) for row in rows]
    texts = [_task(contract, row) + CHOOSE.format(first=a[row.id], second=b[row.id]) for row, a, b in orders]
    picks = [_number(reply, "better", 0, 2) for reply in _replies(judge, texts)]
    both = {row.id: pair for row, *pair in zip(rows, picks, picks[len(rows) :], strict=False)}
    read = {row_id: (a, b) for row_id, (a, b) in both.items() if None not in (a, b)}
    kinds = {row_id: OUTCOMES.get(pair, "ties") for row_id, pair in read.items()}
    found = {kind: [i for i, own in kinds.items() if own == kind] for kind in ("wins", "losses", "ties")}
    found["unread"] = [row_id for row_id in both if row_id not in read]
    won, lost = len(found["wins"]), len(found["losses"])
    values = {
        "win_rate": [{"wins": 1.0, "ties": 0.5, "losses": 0.0}[kind] for kind in kinds.values()],
        "consistency": [float(pair == (0, 0) or pair in OUTCOMES) for pair in read.values()],
        "first_rate": [float(pick == 1) for pair in read.values() for pick in pair if pick],
    }
    # Rows in which the same place won in both orders: an even-handed judge has as many of the first as of the second.
    turned = [a for a, b in read.values() if a == b != 0]
    first, warnings = turned.count(1), []
    if turned and binomtest(first, len(turned)).pvalue < 0.05:
        which, count = ("first", first) if 2 * first > len(turned) else ("second", len(turned) - first)
        warnings.append(f"position bias: {judge.name} prefers the answer shown {which}, whichever it is, in {count} of "
                        f"{len(read)} rows; these count as ties.")  # fmt: skip
    if found["unread"]:
        warnings.append(f"{len(found['unread'])} of {len(rows)} rows left out: the judge's reply cannot be read.")
    return Preference(
        judge=judge.name, **found, **{k: interval(v, own.resamples, own.confidence) for k, v in values.items()},
        sign_p=float(binomtest(won, won + lost).pvalue) if won + lost else 1.0, warnings=warnings,
    )  # fmt: skip


def add_rubric(settings, contract: Contract, rows: Sequence[Row], scores: Sequence[Score], judge=None) -> None:
    """Give each score its `rubric_score`, the mean of the judge's notes, 1 to 5 as 0 to 1. An answer that breaks the
    contract has 0 unseen; a reply that cannot be read leaves the row without one. Raises SlmError when none can be."""
    shown = [(row, s) for row, s in zip(rows, scores, strict=True) if s.parsed is not None]
    texts = [_task(contract, row) + RATE.format(answer=score.text) for row, score in shown]
    replies = _replies(judge or judge_model(settings), texts)
    notes = [[_number(reply, name, 1, 5) for name in RUBRIC] for reply in replies]
    if notes and all(None in own for own in notes):
        raise SlmError(f"evaluate.judge: no reply can be read; the first is {replies[0][:80]!r}. Set another judge.")
    given = {s.row_id: own for (_, s), own in zip(shown, notes, strict=True)}
    for score in scores:
        own = given.get(score.row_id, [1])
        score.shares |= {} if None in own else {"rubric_score": (sum(own) / len(own) - 1) / 4}
        score.value = row_metric(score, contract.primary_metric) or 0.0


def _task(contract: Contract, row: Row) -> str:
    told = {"goal": contract.brief.get("goal", "-"), "faults": contract.brief.get("failure_modes", "-")}
    return TASK.format(task=contract.system_prompt, input=row.user, reference=row.answer, **told)


def _replies(judge, texts: list[str]) -> list[str]:
    from slm.models import Prompt

    return [a.text for a in judge.answer([Prompt([{"role": "user", "content": text}], 100) for text in texts])]


def _number(reply: str, name: str, low: int, high: int) -> int | None:
    try:
        found = json.loads(first_object(reply))[name]
    except (ValueError, KeyError, TypeError):
        return None
    return found if type(found) is int and low <= found <= high else None
