"""A model's view of the failures (`repair.judge`): clusters with a root cause and new situations, over the rules' own."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from slm import cost
from slm.contract import Contract
from slm.curate.text import words
from slm.errors import SlmError
from slm.generate.salvage import objects
from slm.models import Prompt, cached
from slm.repair.causes import Finding
from slm.repair.clusters import Cluster, Situation
from slm.rows import Row, explain

SHOWN = 30  # failures of one cause per call
TOKENS = 3000  # room for one reply
QUOTE = 4  # words in a row that count as quoted from an evaluation row


class Opinion(BaseModel):
    """One cluster of the judge's reply."""

    model_config = ConfigDict(extra="ignore")
    cluster_name: str = Field(min_length=1, max_length=80)
    likely_root_cause: str = Field(max_length=400)
    examples: list[str]
    layer: Literal["data", "model", "prompt", "schema", "deployment"]
    recommended_repair: str = Field("", max_length=400)
    new_data: list[Situation] = []


def renamed(settings, contract: Contract, found: Sequence[Cluster], pairs: Sequence[tuple], prompt: Callable) -> list[Cluster]:
    """The clusters as the judge sees them, one call per cause. Rows that it does not name stay where the rules put them,
    and so do all when it times out or answers nonsense: a line says so. Serving faults are not put to it."""
    from slm.models.openai_api import OpenAIModel

    judge, by_id, result = OpenAIModel(settings.repair.judge), {row.id: (row, score) for row, score in pairs}, []
    causes = {c.cause: [f for o in found if o.cause == c.cause for f in o.findings][:SHOWN] for c in found if not c.check_first}
    texts = [prompt(contract, [_shown(f, *by_id[f.row_id]) for f in shown]) for shown in causes.values()]
    try:
        answers = cached(judge, settings).answer([Prompt([{"role": "user", "content": text}], TOKENS) for text in texts])
    except SlmError as error:
        print(f"repair.judge: {error} The clusters by rule stand.")
        return list(found)
    if judge.calls:  # else all came from the cache
        used = (sum(a.prompt_tokens for a in answers), sum(a.completion_tokens for a in answers))
        cost.add(settings, "eval_inference_cost", cost.token_money(settings.repair.judge, *used), judge=judge.name)
    for (cause, shown), answer in zip(causes.items(), answers, strict=True):
        own = [c for c in found if c.cause == cause]
        made, problem = _read(answer.text, own, shown, [by_id[f.row_id][0].user for f in shown], judge.name)
        if problem:
            print(f"repair.judge on {cause!r}: {problem}; the clusters by rule stand.")
        taken = {f.row_id for c in made for f in c.findings}
        left = [replace(c, findings=tuple(f for f in c.findings if f.row_id not in taken)) for c in own]
        result += made + [c for c in left if c.findings]
    result += [c for c in found if c.cause not in causes]
    return sorted(result, key=lambda c: (-len(c.findings), c.name))


def _shown(f: Finding, row: Row, score) -> dict:
    return {"id": f.row_id, "input": row.user, "expected": score.expected, "answer": score.text, "causes": [f.cause, *f.others]}


def _read(reply: str, own: list[Cluster], shown: list[Finding], said: list[str], by: str) -> tuple[list[Cluster], str]:
    """The clusters of a reply, each with at least one row that was shown, and what is wrong with the reply. A situation
    that quotes a row is left out: no evaluation text may reach the teacher."""
    quotes, home = {run for text in said for run in _runs(text)}, {f.row_id: c for c in own for f in c.findings}
    left, made, problem = {f.row_id: f for f in shown}, [], ""
    for record in objects(reply)[0]:
        try:
            told = Opinion.model_validate(record)
        except ValidationError as error:
            problem = f"a cluster of its reply cannot be read ({explain(error)})"
            continue
        if rows := [left.pop(i) for i in dict.fromkeys(told.examples) if i in left]:
            whole = home[rows[0].row_id]
            fresh = tuple(s for s in told.new_data if not quotes.intersection(_runs(s.situation)))
            about = {"name": f"{whole.cause} / {told.cluster_name}", "root_cause": told.likely_root_cause, "by": by}
            about |= {"blame": told.layer, "repair": told.recommended_repair or whole.repair}
            against = tuple(a for a in whole.contradictions if a.row_id in {f.row_id for f in rows})
            made.append(replace(
                whole, **about, situations=fresh or whole.situations, findings=tuple(rows), contradictions=against,
            ))  # fmt: skip
    return made, problem if problem or made else "its reply names none of the rows that it was shown"


def _runs(text: str) -> set[tuple]:
    """What would give an evaluation row away: its runs of four words, and its longer numbers."""
    found = words(text)
    return {tuple(found[i : i + QUOTE]) for i in range(len(found) - QUOTE + 1)} | {
        (w,) for w in found if len(w) > 3 and any(c.isdigit() for c in w)
    }
