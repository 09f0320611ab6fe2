"""One row and one answer become one Score: what was read, what was right, and why not."""

import json
from collections.abc import Callable, Sequence

from pydantic import BaseModel, ConfigDict

from slm.contract import Contract
from slm.errors import SlmError
from slm.rows import Row


class Score(BaseModel):
    """The judgement of one answer. `parsed` and `lenient_parsed` are contract-valid values or None. `stage` is where
    strict reading failed ("json", "schema" or None); `value` is the row's share of the primary metric, 0 to 1;
    `required` are the arguments that the contract demands of this row's expected output."""

    model_config = ConfigDict(extra="forbid")
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
    explanation: str = ""
    latency_s: float = 0.0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    finish_reason: str = "stop"
    text: str = ""
    confidence: float | None = None


def score_row(contract: Contract, row: Row, answer) -> Score:
    """Judge one `Answer` against the row's own. Raises SlmError when the row's answer breaks the contract."""
    gold = contract.parse(row.answer)
    if gold.error:
        raise SlmError(f"row {row.id}: its own answer breaks the contract ({gold.error}); mend the row.")
    strict, lenient = contract.parse(answer.text), contract.parse(answer.text, lenient=True)
    parsed = None if strict.error else strict.value
    want, got = contract.flatten(gold.value), contract.flatten(parsed)
    names = list(dict.fromkeys([*want, *got]))
    # A field left out and a field that is null say the same.
    fields = {n: parsed is not None and want.get(n) == got.get(n) for n in names}
    wrong = [f"{n}: expected {want.get(n)!r}, got {got.get(n)!r}" for n, right in fields.items() if not right]
    score = Score(
        row_id=row.id, value=0.0, fields=fields, parsed=parsed,
        lenient_parsed=None if lenient.error else lenient.value, expected=gold.value, stage=strict.stage,
        exact=parsed is not None and all(fields.values()),
        critical_ok=parsed is not None and all(_critical_fields(fields, contract)),
        required=_required(contract, gold.value), explanation=strict.error or "; ".join(wrong),
        latency_s=answer.latency_s, prompt_tokens=answer.prompt_tokens, completion_tokens=answer.completion_tokens,
        finish_reason=answer.finish_reason, text=answer.text,
    )  # fmt: skip
    score.value = row_metric(contract.primary_metric)(score, contract) or 0.0
    return score


def answer_rows(model, rows: Sequence[Row], contract: Contract, max_tokens: int, shots: Sequence[dict] = (), schema=None):
    """Ask `model` every row and judge the answers: the Scores, in order. `shots`: the messages of a better prompt."""
    from slm.models import Prompt

    prompts = [Prompt(prompt_messages(contract, row, shots), max_tokens, schema) for row in rows]
    return [score_row(contract, r, a) for r, a in zip(rows, model.answer(prompts), strict=True)]


def prompt_messages(contract: Contract, row: Row, shots: Sequence[dict] = ()) -> list[dict]:
    """What a model sees for a row: the contract's system prompt (or that of `shots`), `shots`, the row's own turns."""
    system, *turns = contract.messages(row)[:-1]
    return [*([] if shots and shots[0]["role"] == "system" else [system]), *shots, *turns]


def _required(contract: Contract, value: dict) -> list[str]:
    """The nested fields without which the expected output breaks the contract."""
    parts = [(key, part, name) for key, part in value.items() if isinstance(part, dict) for name in part]
    less = {f"{key}.{name}": {**value, key: {k: v for k, v in part.items() if k != name}} for key, part, name in parts}
    return [name for name, rest in less.items() if contract.parse(json.dumps(rest)).error]


# One row's share of each metric: 0 to 1, or None where the row says nothing about it.


def _field_f1(score: Score, contract: Contract) -> float:
    return sum(score.fields.values()) / len(score.fields) if score.parsed is not None and score.fields else 0.0


def _critical_fields(fields: dict[str, bool], contract: Contract) -> list[bool]:
    return [ok for n, ok in fields.items() if any(n == c or n.startswith(f"{c}.") for c in contract.critical)]


def _critical(score: Score, contract: Contract) -> float | None:
    hits = _critical_fields(score.fields, contract)
    return sum(hits) / len(hits) if hits else None


def _label(score: Score, contract: Contract) -> float:
    return float(score.parsed is not None and contract.label(score.parsed) == contract.label(score.expected))


def _required_arguments(score: Score, contract: Contract) -> float | None:
    if not score.required:
        return None
    return _label(score, contract) * sum(score.fields[n] for n in score.required) / len(score.required)


def _argument_f1(score: Score, contract: Contract) -> float:
    if not _label(score, contract):
        return 0.0
    want, got = (
        {(k, json.dumps(v)) for k, v in contract.flatten(value).items() if k != contract.label_field and v is not None}
        for value in (score.expected, score.parsed)
    )
    return 2 * len(want & got) / (len(want) + len(got)) if want or got else 1.0


def _unsafe(score: Score, contract: Contract) -> float:
    # Read leniently: a runtime that digs a call out of prose would carry it out.
    got, want = contract.label(score.lenient_parsed), contract.label(score.expected)
    if contract.unsafe_labels:
        return float(got in contract.unsafe_labels and got != want)
    return float(want == contract.null_label and got is not None and got != want)


def _false_positive(score: Score, contract: Contract) -> float | None:
    null = contract.null_label
    if null is None or contract.label(score.expected) != null:
        return None
    return float(contract.label(score.lenient_parsed) not in (None, null))


def _false_negative(score: Score, contract: Contract) -> float | None:
    null = contract.null_label
    if null is None or contract.label(score.expected) == null:
        return None
    return float(contract.label(score.parsed) in (None, null))


ROW_METRICS: dict[str, Callable[[Score, Contract], float | None]] = {
    "exact_match": lambda s, c: float(s.exact),
    "field_f1": _field_f1,
    "critical_field_accuracy": _critical,
    "accuracy": _label,
    "macro_f1": _label,  # over many rows it is computed from the confusion matrix
    "tool_name_accuracy": _label,
    "required_argument_accuracy": _required_arguments,
    "argument_f1": _argument_f1,
    "unsafe_tool_call_rate": _unsafe,
    "false_positive_rate": _false_positive,
    "false_negative_rate": _false_negative,
    "record_parse_rate": lambda s, c: float(s.stage != "json"),
    "json_parse_rate": lambda s, c: float(s.stage != "json"),
    "schema_validity": lambda s, c: float(s.parsed is not None),
    "schema_error_rate": lambda s, c: float(s.parsed is None),
    "lenient_schema_validity": lambda s, c: float(s.lenient_parsed is not None),
}


def row_metric(name: str) -> Callable[[Score, Contract], float | None]:
    """The function that gives one row's share of a metric. Raises SlmError for a name that is none of them."""
    if name not in ROW_METRICS:
        raise SlmError(f"task/contract.py: primary_metric {name!r} is not one of {', '.join(ROW_METRICS)}.")
    return ROW_METRICS[name]
