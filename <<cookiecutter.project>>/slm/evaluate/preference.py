"""A judge's word on free text: rubric scores, and which of two answers is better, asked in both orders."""

import json
from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict

from slm.contract import Contract, first_object
from slm.errors import SlmError
from slm.evaluate.metrics import Metric, interval
from slm.evaluate.scorers import Score, primary_value
from slm.rows import Row

RUBRIC = ("fidelity", "task", "clarity")  # each 1 to 5
ASK = """You judge answers to this task: {task}
Goal: {goal}
Not acceptable: {faults}

INPUT
{input}

REFERENCE ANSWER (one good answer among others)
{reference}
"""
SCORE = """
ANSWER
{answer}

Give whole numbers from 1 (useless) to 5 (nothing to mend): fidelity (nothing added, lost or twisted against the input),
task (it does what the task asks), clarity (short, plain, no fault of language). Reply with JSON only:
{{"fidelity": 1, "task": 1, "clarity": 1}}"""
CHOOSE = """
ANSWER 1
{first}

ANSWER 2
{second}

Which answer does the task better? Order and length do not count. Reply with JSON only: {{"better": 1}}, {{"better": 2}},
or {{"better": 0}} when neither is better."""


class Preference(BaseModel):
    """Candidate against baseline by a judge that saw each pair in both orders. A row is won or lost when both orders
    agree, else tied; `win_rate` counts a tie as half. `consistency`: rows in which both orders agree; `first_rate`:
    verdicts for the answer shown first, among those for either; `sign_p`: the exact sign test of wins against losses."""

    model_config = ConfigDict(extra="forbid")
    judge: str
    win_rate: Metric
    wins: list[str]
    losses: list[str]
    ties: list[str]
    unread: list[str]
    consistency: Metric
    first_rate: Metric
    sign_p: float
    warnings: list[str] = []


def judge_model(settings):
    """The judge of `evaluate.judge`, its replies cached. Raises SlmError when none is set."""
    from slm.models import cached
    from slm.models.openai_api import OpenAIModel

    if not settings.evaluate.judge.url:
        raise SlmError("project.yaml: evaluate.judge is not set; give url and model of the judge.")
    return cached(OpenAIModel(settings.evaluate.judge), settings)


def prefer(
    settings, contract: Contract, rows: Sequence[Row], candidate: Sequence[Score], baseline: Sequence[Score], judge=None
) -> Preference:
    """Ask the judge which of two answers is better, row by row and in both orders; a reply that cannot be read leaves the
    row out and is named. A judge that goes by the order is named in `warnings`."""
    from scipy.stats import binomtest

    judge, own = judge or judge_model(settings), settings.evaluate
    by_id = [{s.row_id: s.text for s in scores} for scores in (candidate, baseline)]
    pairs = [(by_id[0][row.id], by_id[1][row.id]) for row in rows]
    texts = [_ask(contract, row) + CHOOSE.format(first=a, second=b) for row, (a, b) in zip(rows, pairs, strict=True)]
    texts += [_ask(contract, row) + CHOOSE.format(first=b, second=a) for row, (a, b) in zip(rows, pairs, strict=True)]
    replies = [_number(reply, "better", 0, 2) for reply in _replies(judge, texts)]
    found: dict[str, list[str]] = {"wins": [], "losses": [], "ties": [], "unread": []}
    same, picks = [], []
    for row, one, two in zip(rows, replies[: len(rows)], replies[len(rows) :], strict=True):
        if one is None or two is None:
            found["unread"].append(row.id)
            continue
        picks += [float(pick == 1) for pick in (one, two) if pick]
        swapped = {0: 0, 1: 2, 2: 1}[two]  # the second order, said as in the first
        same.append(float(one == swapped))
        found["wins" if one == swapped == 1 else "losses" if one == swapped == 2 else "ties"].append(row.id)
    wins, losses, ties = (len(found[key]) for key in ("wins", "losses", "ties"))
    result = Preference(
        judge=judge.name, **found, win_rate=interval([1.0] * wins + [0.5] * ties + [0.0] * losses, own.resamples, own.confidence),
        consistency=interval(same, own.resamples, own.confidence), first_rate=interval(picks, own.resamples, own.confidence),
        sign_p=float(binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0,
    )  # fmt: skip
    # Rows whose verdict turned with the order: an even-handed judge takes the first as often as the second there.
    turned = [(a, b) for a, b in zip(replies[: len(rows)], replies[len(rows) :], strict=True) if a and a == b]
    first = sum(a == 1 for a, _ in turned)
    if turned and binomtest(first, len(turned)).pvalue < 0.05:
        which, count = ("first", first) if 2 * first > len(turned) else ("second", len(turned) - first)
        result.warnings.append(
            f"position bias: the judge {judge.name} prefers the answer shown {which}: in {count} of {len(pairs)} rows it "
            f"took it in both orders. Those rows count as ties."
        )
    if found["unread"]:
        result.warnings.append(
            f"{len(found['unread'])} of {len(rows)} rows: the judge's reply cannot be read; they are left out."
        )
    return result


def add_rubric(settings, contract: Contract, rows: Sequence[Row], scores: Sequence[Score], judge=None) -> None:
    """Give each score its `rubric_score`: the mean of the judge's three notes, 1 to 5 as 0 to 1. A reply that cannot be
    read leaves the row without one; an answer that breaks the contract has 0 and is not shown to the judge."""
    judge, shown = judge or judge_model(settings), [n for n, s in enumerate(scores) if s.parsed is not None]
    for score in scores:
        score.shares["rubric_score"] = 0.0
    texts = [_ask(contract, rows[n]) + SCORE.format(answer=scores[n].text) for n in shown]
    for n, reply in zip(shown, _replies(judge, texts), strict=True):
        notes = [_number(reply, name, 1, 5) for name in RUBRIC]
        if None in notes:
            del scores[n].shares["rubric_score"]
        else:
            scores[n].shares["rubric_score"] = (sum(notes) / len(notes) - 1) / 4
    for score in scores:
        score.value = primary_value(score, contract)


def _ask(contract: Contract, row: Row) -> str:
    told = {"goal": contract.brief.get("goal", "-"), "faults": contract.brief.get("failure_modes", "-")}
    return ASK.format(task=contract.system_prompt, input=row.user, reference=row.answer, **told)


def _replies(judge, texts: list[str]) -> list[str]:
    from slm.models import Prompt

    return [a.text for a in judge.answer([Prompt([{"role": "user", "content": text}], 100) for text in texts])]


def _number(reply: str, name: str, low: int, high: int) -> int | None:
    try:
        found = json.loads(first_object(reply))[name]
    except (ValueError, KeyError, TypeError):
        return None
    return found if type(found) is int and low <= found <= high else None
