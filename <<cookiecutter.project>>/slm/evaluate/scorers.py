"""One row and one answer become one Score: what was read, what was right, and why not."""

import json
from collections.abc import Callable, Sequence
from itertools import product

from slm.contract import Contract
from slm.errors import SlmError
from slm.evaluate.by_task import BY_TYPE, comparable, row_metrics
from slm.evaluate.calibration import label_confidence
from slm.rows import Record, Row, plain

NO_ANSWER = "(unreadable)"
COMMON = ("exact_match", "lenient_exact_match", "schema_validity", "schema_error_rate", "lenient_schema_validity",
          "error_rate", "endless_rate", "echo_rate")  # fmt: skip
LOWER_IS_BETTER = ("schema_error_rate", "error_rate", "endless_rate", "echo_rate", "unsafe_tool_call_rate",
                   "false_positive_rate", "false_negative_rate", "false_refusal_rate", "hallucination_rate",
                   "severity_error", "severity_bias", "ece", "brier")  # fmt: skip
ECHO_CHARS = 20  # a shorter text stands in many answers by chance
EMPTY = ((0, 0), None)  # shares of rows that say nothing about a metric
Share = float | tuple[float, float]


class Score(Record):
    """The judgement of one answer. `parsed` and `lenient_parsed` are contract-valid values or None. `stage` is where
    strict reading failed ("json", "schema" or None); `value` is the row's share of the primary metric, 0 to 1;
    `required` are the arguments that the contract demands of this row's expected output; `labels` are the expected and
    the given label. `shares` is the row's part of every metric: 0 to 1, or (hits, of how many) where a metric counts
    over all rows together; a metric that the row says nothing about is not there. `confidence`: how probable the model
    held its label."""

    row_id: str
    value: float
    fields: dict[str, bool]
    parsed: dict | None
    lenient_parsed: dict | None
    expected: dict
    stage: str | None
    exact: bool
    critical_ok: bool
    required: list[str] = []
    labels: tuple[str, str] | None = None
    shares: dict[str, Share] = {}
    explanation: str = ""
    latency_s: float = 0.0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    finish_reason: str = "stop"
    text: str = ""
    confidence: float | None = None


def metric_names(contract: Contract) -> list[str]:
    """The metrics that are reported for a contract, the primary one first. Raises SlmError when that is none of them,
    or one of which less is better."""
    own = [*COMMON, *BY_TYPE[contract.task_type], *(("accuracy", "macro_f1") if contract.label_field else ())]
    known = [name for name in own if name not in LOWER_IS_BETTER]
    if contract.primary_metric not in known:
        problem = f"primary_metric {contract.primary_metric!r} is not one of {', '.join(known)}"
        raise SlmError(f"task/contract.py: {problem}.")
    return list(dict.fromkeys([contract.primary_metric, *own]))


def score_row(contract: Contract, row: Row, answer) -> Score:
    """Judge one `Answer` against the row's own. Raises SlmError when the row's own answer breaks the contract or its
    constraints, or does not run."""
    gold = contract.parse(row.answer)
    if gold.error:
        raise SlmError(f"row {row.id}: its own answer breaks the contract ({gold.error}); mend the row.")
    strict, lenient = contract.parse(answer.text), contract.parse(answer.text, lenient=True)
    parsed, said = (None if p.error else p.value for p in (strict, lenient))
    want, got = comparable(contract, gold.value), comparable(contract, parsed)
    fields = _agree(want, got) if parsed is not None else dict.fromkeys(want, False)
    wrong = [f"{n}: expected {want.get(n)}, got {got.get(n)}" for n, right in fields.items() if not right]
    critical = [ok for n, ok in fields.items() if any(n == c or n.startswith(f"{c}.") for c in contract.critical)]
    labels = str(contract.label(gold.value)), NO_ANSWER if parsed is None else str(contract.label(parsed))
    score = Score(
        row_id=row.id, value=0.0, fields=fields, parsed=parsed, lenient_parsed=said, expected=gold.value,
        stage=strict.stage, exact=parsed is not None and all(fields.values()),
        critical_ok=parsed is not None and all(critical), required=_required(contract, gold.value),
        labels=labels if contract.label_field else None, latency_s=answer.latency_s,
        prompt_tokens=answer.prompt_tokens, completion_tokens=answer.completion_tokens,
        finish_reason=answer.finish_reason, text=answer.text, confidence=label_confidence(contract, answer, said),
    )  # fmt: skip
    (own, problems), asked = _own(contract, row, score), (row.user, contract.system_prompt)
    shares = {
        "exact_match": score.exact, "schema_validity": parsed is not None, "schema_error_rate": parsed is None,
        "lenient_exact_match": said is not None and all(_agree(want, comparable(contract, said)).values()),
        "lenient_schema_validity": said is not None, "json_parse_rate": strict.stage != "json",
        "record_parse_rate": strict.stage != "json", "error_rate": answer.finish_reason == "error",
        "endless_rate": answer.finish_reason == "length",
        "echo_rate": _echo(asked, answer.text, said) and not _echo(asked, row.answer, gold.value),
        "field_f1": parsed is not None and bool(fields) and sum(fields.values()) / len(fields),
        "critical_field_accuracy": sum(critical) / len(critical) if critical else None,
        "exact_key_match": contract.flatten(strict.value).keys() == contract.flatten(gold.value).keys(),
        **row_metrics(contract, row, score), **own,
    }  # fmt: skip
    names = metric_names(contract)
    score.shares = {
        name: share if isinstance(share, tuple) else float(share) for name, share in shares.items()
        if (name in names or name.startswith("constraint.")) and share not in EMPTY
    }  # fmt: skip
    score.value = row_metric(score, contract.primary_metric) or 0.0
    score.explanation = strict.error or "; ".join([*wrong, *problems])
    return score


def row_metric(score: Score, name: str) -> float | None:
    """One row's share of a metric as one number, 0 to 1; None where the row says nothing about it."""
    share = score.shares.get(name)
    return share[0] / share[1] if isinstance(share, tuple) else share


def answer_rows(
    model, rows: Sequence[Row], contract: Contract, max_tokens: int, shots: Sequence[dict] = (), schema=None
) -> list[Score]:  # fmt: skip
    """Ask `model` every row and judge the answers: the Scores, in order. `shots`: the messages of a better prompt;
    `schema`: the JSON schema that decoding is held to."""
    from slm.models import Prompt

    prompts = [Prompt(prompt_messages(contract, row, shots), max_tokens, schema) for row in rows]
    return [score_row(contract, r, a) for r, a in zip(rows, model.answer(prompts), strict=True)]


def prompt_messages(contract: Contract, row: Row, shots: Sequence[dict] = ()) -> list[dict]:
    """What a model sees for a row: the contract's system prompt (or that of `shots`), `shots`, the row's own turns."""
    system, *turns = contract.messages(row)[:-1]
    return [*([] if shots and shots[0]["role"] == "system" else [system]), *shots, *turns]


def _agree(want: dict[str, str], got: dict[str, str]) -> dict[str, bool]:
    # A field left out and a field that is null say the same.
    return {name: want.get(name, "null") == got.get(name, "null") for name in {**want, **got}}


def _required(contract: Contract, value: dict) -> list[str]:
    """The nested fields without which the expected output breaks the contract."""
    parts = [(key, part, name) for key, part in value.items() if isinstance(part, dict) for name in part]
    less = {f"{key}.{name}": {**value, key: {k: v for k, v in part.items() if k != name}} for key, part, name in parts}
    return [name for name, rest in less.items() if contract.parse(json.dumps(rest)).error]


def _own(contract: Contract, row: Row, score: Score) -> tuple[dict, list[str]]:
    """What the user's own `constraints` and `execute` say, and sentences on what they found wrong."""
    found, problems, parsed, label = {}, [], score.parsed, contract.label(score.expected)
    if contract.constraints:
        own, error = _try(contract.constraints, row.user, score.expected)
        if error or not all(own.values()):
            why = error or f"breaks the constraint {next(name for name, kept in own.items() if not kept)}"
            raise SlmError(f"row {row.id}: its own answer {why}; mend the row or `constraints` in task/contract.py.")
        kept, error = dict.fromkeys(own, False), ""
        if parsed is not None:
            kept, error = _try(contract.constraints, row.user, parsed)
        if error:
            raise SlmError(f"row {row.id}: `constraints` in task/contract.py {error} on {score.text[:60]!r}; mend it.")
        found = {"constraint_pass_rate": all(kept.values())} | {f"constraint.{name}": ok for name, ok in kept.items()}
        problems = [f"breaks the constraint {name}" for name, ok in kept.items() if not ok]
    if contract.execute and (label is None or label != contract.null_label):
        if error := _try(contract.execute, score.expected)[1]:
            raise SlmError(f"row {row.id}: its own answer {error}; mend the row or `execute` in task/contract.py.")
        none = parsed is None or (label is not None and contract.label(parsed) == contract.null_label)
        error = "is no call" if none else _try(contract.execute, parsed)[1]
        found["execution_success"] = found["executable_success"] = not error
        problems += [error] if error else []
    return found, problems


def _try(function: Callable, *given) -> tuple[object, str]:
    try:
        return function(*given), ""
    except Exception as error:  # the user's function may raise anything
        return None, f"does not run: {type(error).__name__}: {error}"


def _echo(asked: tuple[str, ...], text: str, value: dict | None) -> bool:
    """Whether an answer repeats what was asked: it stands in a part of the prompt, or the part in the answer."""
    told = (text, *map(str, Contract.flatten(value).values()))
    pairs = (map(plain, pair) for pair in product(asked, told))
    return any(min(len(a), len(t)) >= ECHO_CHARS and (a in t or t in a) for a, t in pairs)
