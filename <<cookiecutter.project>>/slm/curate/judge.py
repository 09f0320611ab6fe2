"""The optional judge: a model scores rows by the rubric; its word counts only once it agrees with people."""

import hashlib
import json
import re
from collections.abc import Callable
from contextlib import suppress

from slm import cost, registry
from slm.curate.decisions import read_decisions
from slm.curate.read import Verdict
from slm.curate.rubric import refusal
from slm.generate.plan import batches
from slm.models.base import Prompt
from slm.rows import Row, from_any

TOKENS = 600  # room for one reply


class Judge:
    """A gate over `settings.curate.judge`. Replies are kept in registry/judge.jsonl, so nothing is asked twice."""

    def __init__(self, settings, contract, judge_prompt: Callable):
        from slm.models.openai_api import OpenAIModel

        self.settings, self.contract, self.judge_prompt = settings, contract, judge_prompt
        self.model = OpenAIModel(settings.curate.judge)
        self.replies = {(line["id"], line["prompt"]): line["text"] for line in registry.read(settings, "judge")}
        self.counts: bool | None = None  # whether its verdicts are applied; None until compared with people
        self.spent = sum(line["money"] for line in cost.entries(settings, "data_review_cost") if "judge" in line)
        self.sentence, self.stopped = "", ""

    def __call__(self, rows: list[Row], values: list[dict] = ()) -> list[Verdict | None]:
        """The verdicts; all None while the judge does not agree with people. A row the budget left out has none."""
        if self.counts is None:
            self.compare()
        verdicts = []
        for reply in self.ask(rows):
            why, scores = refusal(reply) if reply is not None else ("", {})
            evidence = {"scores": scores, "judge": self.model.name}
            verdicts.append(Verdict("judge", why, evidence) if why and self.counts else None)
        return verdicts

    def compare(self) -> str:
        """Judge the rows that people decided, and say in one sentence whether the judge's verdicts are applied."""
        cfg, decisions = self.settings.curate, read_decisions(self.settings)
        rows = find_rows(self.settings, set(decisions))
        for row_id, row in rows.items():
            if decisions[row_id].decision == "edit":
                last = row.messages[-1].model_copy(update={"content": decisions[row_id].answer})
                rows[row_id] = row.model_copy(update={"messages": [*row.messages[:-1], last]})
        replies = zip(rows, self.ask(list(rows.values())), strict=True)
        pairs = [(decisions[i].decision != "reject", not refusal(text)[0]) for i, text in replies if text is not None]
        kappa, low, high = agreement(pairs)
        self.counts = len(pairs) >= cfg.judge_min_rows and kappa >= cfg.judge_min_kappa
        found = f"kappa {kappa:.2f} (95 % interval {low:.2f} to {high:.2f})"
        found = found if kappa == kappa else "no kappa, for people or judge said the same of every row"
        needs = f"at least {cfg.judge_min_rows} rows and kappa {cfg.judge_min_kappa:g} are needed"
        verb = "its verdicts are applied" if self.counts else f"its verdicts are shown, not applied: {needs}"
        self.sentence = f"judge {self.model.name} against people on {len(pairs)} rows: {found}; {verb}."
        print(self.sentence)
        return self.sentence

    def ask(self, rows: list[Row]) -> list[str | None]:
        """The judge's reply to each row; None for rows that the budget did not reach. Each handful is kept at once."""
        end, known = self.settings.curate.judge, self.replies
        prompts = [self.judge_prompt(self.contract, row) for row in rows]
        keys = [(row.id, self._hash(prompt)) for row, prompt in zip(rows, prompts, strict=True)]
        todo = [(key, prompt) for key, prompt in zip(keys, prompts, strict=True) if key not in known]
        for start in range(0, len(todo), end.concurrency):
            part = todo[start : start + end.concurrency]
            worst = sum(self._money(len(prompt.encode()) + 64, TOKENS) for _, prompt in part)
            limit, left = self.settings.curate.judge_budget_usd, len(todo) - start
            if self.spent + worst > limit + 1e-12:
                self.stopped = f"judge budget: {self.spent:.4f} of {limit:.2f} spent; {left} rows not judged."
                print(self.stopped)
                break
            answers = self.model.answer([Prompt([{"role": "user", "content": prompt}], TOKENS) for _, prompt in part])
            used = (sum(a.prompt_tokens for a in answers), sum(a.completion_tokens for a in answers))
            facts = {"judge": self.model.name, "rows": len(part), "tokens_in": used[0], "tokens_out": used[1]}
            self.spent += cost.add(self.settings, "data_review_cost", self._money(*used), **facts)["money"]
            for (key, _), answer in zip(part, answers, strict=True):
                if answer.finish_reason != "error":
                    known[key] = answer.text
                    line = {"id": key[0], "prompt": key[1], "judge": self.model.name, "text": answer.text}
                    registry.append(self.settings, "judge", line)
        return [known.get(key) for key in keys]

    def _hash(self, prompt: str) -> str:
        return hashlib.sha256(f"{self.model.fingerprint} {prompt}".encode()).hexdigest()[:16]

    def _money(self, tokens_in: int, tokens_out: int) -> float:
        end = self.settings.curate.judge
        return cost.token_money(tokens_in, tokens_out, end.usd_per_1m_input, end.usd_per_1m_output)


def agreement(pairs: list[tuple[bool, bool]]) -> tuple[float, float, float]:
    """Cohen's kappa (1960) of (person, judge) verdicts, with its 95 % interval; NaN where one side never differs."""
    from statsmodels.stats.inter_rater import cohens_kappa

    table = [[sum(pair == (a, b) for pair in pairs) for b in (True, False)] for a in (True, False)]
    if min(sum(table[0]), sum(table[1]), table[0][0] + table[1][0], table[0][1] + table[1][1]) == 0:
        return float("nan"), float("nan"), float("nan")
    result = cohens_kappa(table)
    return float(result.kappa), float(result.kappa_low), float(result.kappa_upp)


def find_rows(settings, ids: set[str]) -> dict[str, Row]:
    """The rows with these ids in the seed file and the batches; the first line of an id holds."""
    found: dict[str, Row] = {}
    seed = settings.path("data/raw/seed.jsonl")
    for path in ([seed] if seed.is_file() else []) + batches(settings) if ids else ():
        with path.open("rb") as lines:
            for line in lines:
                named = re.search(rb'"id": ?"([^"]*)"', line)
                if named and (key := named[1].decode(errors="replace")) in ids and key not in found:
                    with suppress(ValueError):  # a broken line is the gates' to report
                        found[key] = from_any(json.loads(line))
    return found
