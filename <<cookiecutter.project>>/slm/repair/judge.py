"""A model's view of the failures (`repair.judge`): clusters with a root cause and situations, over the rules' own."""

from collections.abc import Callable, Sequence
from typing import Literal

from pydantic import BaseModel, Field, ValidationError

from slm.curate.gates import runs
from slm.curate.text import words
from slm.errors import SlmError
from slm.generate.salvage import objects
from slm.models import Prompt, cached
from slm.repair.causes import Finding
from slm.repair.clusters import Cell, Cluster
from slm.rows import explain

SHOWN = 30  # failures of one cause per call
TOKENS = 3000  # room for one reply


class Opinion(BaseModel):
    """One cluster of the judge's reply."""

    cluster_name: str = Field(min_length=1, max_length=80)
    likely_root_cause: str = Field(max_length=400)
    examples: list[str]
    layer: Literal["data", "model", "prompt", "schema", "deployment"]
    new_data: list[Cell] = []


def judged(settings, contract, found: list[Cluster], pairs: Sequence[tuple], prompt: Callable) -> list[Cluster]:
    """The clusters as the judge sees them, one call per cause. Rows that it does not name stay where the rules put
    them, and so do all when it times out or answers nonsense: a line says so. Serving faults are not put to it."""
    from slm.models.openai_api import OpenAIModel

    judge, by_id, result = OpenAIModel(settings.repair.judge), {row.id: (row, s) for row, s in pairs}, []
    fit = [c for c in found if not c.check_first]
    causes = {c.cause: [f for o in fit if o.cause == c.cause for f in o.findings][:SHOWN] for c in fit}
    rows = [
        [{"id": row.id, "input": row.user, "expected": s.expected, "answer": s.text, "causes": [f.cause, *f.others]}
         for f in shown for row, s in [by_id[f.row_id]]] for shown in causes.values()
    ]  # fmt: skip
    asked = [Prompt([{"role": "user", "content": prompt(contract, own)}], TOKENS) for own in rows]
    try:
        answers = cached(judge, settings).answer(asked)
    except SlmError as error:
        print(f"repair.judge: {error} The clusters by rule stand.")
        return found
    for (cause, shown), answer in zip(causes.items(), answers, strict=True):
        own = [c for c in fit if c.cause == cause]
        made, problem = _read(answer.text, own, shown, [by_id[f.row_id][0].user for f in shown])
        if problem:
            print(f"repair.judge on {cause!r}: {problem}; its rows stay in the clusters by rule.")
        taken = {f.row_id for c in made for f in c.findings}
        left = [c.model_copy(update={"findings": [f for f in c.findings if f.row_id not in taken]}) for c in own]
        result += [c.model_copy(update={"by": judge.name}) for c in made] + [c for c in left if c.findings]
    return sorted(result + [c for c in found if c.check_first], key=lambda c: (-len(c.findings), c.name))


def _read(reply: str, own: list[Cluster], shown: list[Finding], said: list[str]) -> tuple[list[Cluster], str]:
    """The clusters of a reply, each with a row that was shown at least, and what is wrong with the reply. A situation
    that quotes a row is left out: no evaluation text may reach the teacher."""
    quotes = {quote for text in said for quote in runs(words(text)) or [" ".join(words(text))]}
    home, left, made, problem = {f.row_id: c for c in own for f in c.findings}, {f.row_id: f for f in shown}, [], ""
    for record in objects(reply)[0]:
        try:
            told = Opinion.model_validate(record)
        except ValidationError as error:
            problem = f"a cluster of its reply cannot be read ({explain(error)})"
            continue
        if rows := [left.pop(i) for i in dict.fromkeys(told.examples) if i in left]:
            whole, ids = home[rows[0].row_id], {f.row_id for f in rows}
            fresh = [s for s in told.new_data if not any(quote in " ".join(words(s.situation)) for quote in quotes)]
            made.append(whole.model_copy(update={
                "name": f"{whole.cause} / {told.cluster_name}", "blame": told.layer, "findings": rows,
                "root_cause": told.likely_root_cause, "situations": fresh or whole.situations,
                "contradictions": [a for c in own for a in c.contradictions if a["row"] in ids],
            }))  # fmt: skip
    return made, problem or ("" if made else "its reply names none of the rows that it was shown")
