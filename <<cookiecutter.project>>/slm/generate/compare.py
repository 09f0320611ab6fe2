"""Teachers compared: on dev before they write a row, then by the rows of theirs that 04 kept and by what they cost."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

from slm import cost
from slm.generate.plan import judged, records, seed_rows
from slm.generate.teacher import Purse, teachers
from slm.rows import read_rows


@dataclass
class Feasibility:
    """Whether the teachers can do the task that they are to teach; `lines` is the table's."""

    ok: bool
    sentence: str
    lines: list[dict]

    def table(self):
        """A line per teacher (per category of the recorded rows)."""
        import pandas as pd

        return pd.DataFrame(self.lines)


class _Bare:
    """A teacher without the fences and prose around its JSON: what it knows counts here, not its wrapping."""

    def __init__(self, model):
        self.name, self.fingerprint, self._model = model.name, f"{model.fingerprint} bare", model
        self.purse = getattr(model, "purse", None)  # it has paid: the ledger holds these calls already

    def answer(self, prompts):
        from slm.contract import first_object

        return [replace(a, text=first_object(a.text)) for a in self._model.answer(prompts)]


def feasibility(settings, contract, fewshot: Callable) -> Feasibility:
    """Every teacher on the dev rows, with the few-shot prompt: one whose interval lies below the contract's target (or
    `generate.feasible_at`) is not ok. Paid from the same budget. The test set is never looked at; recorded rows answer
    no new prompt, so that the share of them that keep the contract is shown instead."""
    from slm.evaluate import choose_shots, evaluate, take
    from slm.evaluate.metrics import interval

    own, metric = settings.generate, contract.primary_metric
    if own.teacher == "recorded":
        rows = read_rows(settings.path("data/raw/recorded_teacher.jsonl"))
        good = [(r.meta.category, contract.parse(r.answer).error is None) for r in rows]
        share = interval([float(g) for _, g in good], settings.evaluate.resamples, settings.evaluate.confidence)
        lines = [
            {"category": c, "rows": n, "keep_the_contract": round(sum(g for x, g in good if x == c) / n, 3)}
            for c, n in Counter(c for c, _ in good).items()
        ]
        why = "the teacher was not run: recorded rows answer no new prompt"
        return Feasibility(True, f"{why}; {share} of its {len(rows)} rows keep the contract", lines)
    least = contract.target if own.feasible_at is None else own.feasible_at
    rows = take(settings, read_rows(settings.path("data/eval/dev.jsonl")))
    shots = fewshot(contract, choose_shots(seed_rows(settings), contract, settings.evaluate.fewshot))
    room = max(settings.evaluate.max_new_tokens, own.tokens_per_row)
    roomy = settings.model_copy(update={"evaluate": settings.evaluate.model_copy(update={"max_new_tokens": room})})
    ok, lines, said = True, [], []
    with Purse(settings) as purse:
        purse.batch = "feasibility"
        for model in teachers(settings, purse):
            found = evaluate(roomy, contract, _Bare(model), rows, set="dev", name=model.name, shots=shots).metrics
            lines.append({"teacher": model.name, metric: str(found[metric]), "schema_validity": str(found["schema_validity"])})
            score = f"{model.name} reaches {metric} {found[metric]} on {len(rows)} dev rows"
            if found[metric].high < least:
                ok = False
                score += f", below {least}: it cannot teach the task (take a better one, or see generate.feasible_at)"
            elif found[metric].value < least:
                score += f"; WARNING: that may be below {least}"
            said.append(score)
    return Feasibility(ok, "; ".join(said), lines)


def acceptance(settings, *by: str):
    """A table of how many of the rows that a teacher wrote 04 kept, by "teacher", "prompt_version", "category", "kind",
    "difficulty" or "language" (default: the first three). What could not be read counts as written. Empty before 04."""
    import pandas as pd

    by, lines, seen = list(by) or ["teacher", "prompt_version", "category"], [], set()
    if settings.path("data/accepted/all.jsonl").is_file():
        for record in judged(settings):
            row, state = record["row"], "refused" if record["gate"] else "accepted"
            made = row["meta"].get("provenance", {})
            if made.get("teacher") and row["id"] not in seen:
                seen.add(row["id"])
                lines.append({**row["meta"], **made, "state": state})
        for file in sorted(settings.path("data/generated").glob("*.unread.txt")):
            lines += [{**r, "state": "unread"} for r in records(file) if not r["reason"].startswith("prose")]
    states = ["accepted", "refused", "unread"]
    cells = [{name: str(line.get(name) or "-") for name in by} | {"written": 1, line["state"]: 1} for line in lines]
    table = pd.DataFrame(cells, columns=[*by, "written", *states]).fillna(0).groupby(by).sum().astype(int).reset_index()
    return table.assign(rate=(table.accepted / table.written).astype(float).round(3))


def spending(settings):
    """The ledger by batch and teacher: calls, tokens and money. Calls of the feasibility check stand apart."""
    import pandas as pd

    keys, sums = ["batch", "model"], ["calls", "tokens_in", "tokens_out", "money"]
    lines = [{"batch": "-", "calls": 1, **line} for line in cost.entries(settings, "teacher_generation_cost")]
    return pd.DataFrame(lines, columns=[*keys, *sums]).groupby(keys, sort=False)[sums].sum().reset_index()
