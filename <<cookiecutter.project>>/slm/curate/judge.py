"""The optional judge: a model scores rows by the rubric; its word counts only once it agrees with people."""

from collections.abc import Callable
from contextlib import suppress

from slm import cost, registry
from slm.curate.decisions import read_decisions
from slm.curate.read import Verdict
from slm.curate.rubric import refusal
from slm.errors import SlmError
from slm.generate.plan import batches, records
from slm.models.base import Answer, Prompt
from slm.models.openai_api import OpenAIModel, run
from slm.rows import Row, digest, from_any

TOKENS = 600  # room for one reply


class Judge:
    """A gate over `settings.curate.judge`. Replies are kept in registry/judge.jsonl, so nothing is asked twice."""

    def __init__(self, settings, contract, judge_prompt: Callable):
        self.settings, self.cfg, self.model = settings, settings.curate, OpenAIModel(settings.curate.judge)
        self.prompt = lambda row: judge_prompt(contract, row)
        self.known = {(line["id"], line["prompt"]): line["text"] for line in registry.read(settings, "judge")}
        self.counts: bool | None = None  # whether its verdicts are applied; None until compared with people

    def __call__(self, rows: list[Row], values: list[dict] = ()) -> list[Verdict | None]:
        """The verdicts; all None while the judge does not agree with people. A row that the budget left out has none."""
        self.counts = self.compare() if self.counts is None else self.counts
        found = [refusal(reply) if reply is not None else ("", {}) for reply in self.ask(rows)]
        return [Verdict("judge", why, {"scores": scores}) if why and self.counts else None for why, scores in found]

    def compare(self) -> bool:
        """Judge the rows that people decided (edited rows as edited), say how far they agree, and whether it is enough."""
        decisions, cfg, rows = read_decisions(self.settings), self.cfg, []
        for row in find_rows(self.settings, set(decisions)):
            rows.append(row.answered(decisions[row.id].answer or row.answer))
        replies = [(row.id, reply) for row, reply in zip(rows, self.ask(rows), strict=True) if reply is not None]
        pairs = [(decisions[row_id].decision != "reject", not refusal(reply)[0]) for row_id, reply in replies]
        kappa, low, high = agreement(pairs)
        enough = len(pairs) >= cfg.judge_min_rows and kappa >= cfg.judge_min_kappa
        found = f"kappa {kappa:.2f} (95 % interval {low:.2f} to {high:.2f})"
        found = found if kappa == kappa else "no kappa, for people or judge said the same of every row"
        needs = f"at least {cfg.judge_min_rows} rows and kappa {cfg.judge_min_kappa:g} are needed"
        verb = "its verdicts are applied" if enough else f"its verdicts are shown, not applied: {needs}"
        print(f"judge {self.model.name} against people on {len(pairs)} rows: {found}; {verb}.")
        return enough

    def ask(self, rows: list[Row]) -> list[str | None]:
        """The judge's reply to each row, None where the budget ended. Raises SlmError when the endpoint fails for good."""
        prompts = [self.prompt(row) for row in rows]
        keys = [(row.id, digest(self.model.fingerprint + text, 16)) for row, text in zip(rows, prompts, strict=True)]
        todo = [(key, text) for key, text in zip(keys, prompts, strict=True) if key not in self.known]
        while todo:
            spent = [line["money"] for line in cost.entries(self.settings, "data_review_cost") if "judge" in line]
            left = self.cfg.judge_budget_usd - sum(spent)
            worst = cost.token_money(self.cfg.judge, max(len(text.encode()) for _, text in todo) + 64, TOKENS)
            part = todo[: int((left + 1e-9) / worst) if worst else len(todo)]
            if left < 0 or not part:
                print(f"judge: {len(todo)} rows not judged; {left:.4f} is left of curate.judge_budget_usd.")
                break
            asked = [Prompt([{"role": "user", "content": text}], TOKENS) for _, text in part]
            run(self.model.each(asked, lambda n, answer, part=part: self._keep(*part[n][0], answer)))
            if self.model.stopped:
                raise SlmError(f"judge: {self.model.stopped}; run 04 again, what was answered is kept.")
            todo = todo[len(part) :]
        return [self.known.get(key) for key in keys]

    def _keep(self, row_id: str, prompt: str, answer: Answer) -> None:
        if answer.finish_reason != "error":
            used = (answer.prompt_tokens, answer.completion_tokens)
            facts = {"judge": self.model.name, "tokens_in": used[0], "tokens_out": used[1]}
            cost.add(self.settings, "data_review_cost", cost.token_money(self.cfg.judge, *used), **facts)
            line = {"id": row_id, "prompt": prompt, "judge": self.model.name, "text": answer.text}
            self.known[row_id, prompt] = registry.append(self.settings, "judge", line)["text"]


def agreement(pairs: list[tuple[bool, bool]]) -> tuple[float, float, float]:
    """Cohen's kappa (1960) of (person, judge) verdicts, with its 95 % interval; NaN where one side never differs."""
    from statsmodels.stats.inter_rater import cohens_kappa

    if len({a for a, _ in pairs}) < 2 or len({b for _, b in pairs}) < 2:
        return (float("nan"),) * 3
    found = cohens_kappa([[pairs.count((a, b)) for b in (True, False)] for a in (True, False)])
    return float(found.kappa), float(found.kappa_low), float(found.kappa_upp)


def find_rows(settings, ids: set[str]) -> list[Row]:
    """The rows with these ids in the seed file and the batches; the first line of an id holds."""
    found, seed = {}, settings.path("data/raw/seed.jsonl")
    for path in [seed] * seed.is_file() + batches(settings) if ids else ():
        for record in records(path):
            if (key := str(record.get("id"))) in ids and key not in found:
                with suppress(ValueError):  # a broken line is the gates' to report
                    found[key] = from_any(record)
    return list(found.values())
