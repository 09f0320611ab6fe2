"""The five failure tables: the likely causes of each symptom, tested; names and fixes: slm/report/templates/diagnosis.yaml."""

import re
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median

from slm.curate.leakage import leaks
from slm.diagnose.run import Run
from slm.errors import SlmError
from slm.evaluate.candidate import CONSTRAINED, NAME
from slm.evaluate.scorers import prompt_messages
from slm.generate.plan import seed_rows
from slm.models import base_folder
from slm.repair.causes import serving_fault
from slm.report import tables
from slm.report.render import fill
from slm.rows import digest, write_text
from slm.train.adviser import FORGOTTEN, advise, curve
from slm.train.encode import load_tokenizer, render, stop_ids
from slm.train.sft import adapter_folder

PROOF = 10.0  # the level of a contradiction in the artefacts themselves; rules of thumb stay below it
Seen = tuple[float, str]  # level: how many times the limit of a cause was measured, found from 1 on; and the evidence


@dataclass(frozen=True)
class Verdict:
    """On a symptom or a cause: "found", "ruled out" or "not testable", what shows it, and what mends it. `causes` of a
    symptom are in the order of likelihood: proofs, then by how far a limit is passed."""

    name: str
    verdict: str
    evidence: str
    level: float
    fix: str = ""
    causes: list = field(default_factory=list)


def diagnose(settings, contract, run_id: str) -> str:
    """The five symptoms, each that is found with its causes, as Markdown; also written to diagnosis.md beside the run's
    report. Raises SlmError for a run that the registry does not know."""
    run = Run(settings, contract, run_id)
    text = fill("diagnosis.md", run=run_id, failed=run.failed, tables=verdicts(run))
    write_text(settings.path(f"outputs/eval_reports/{run_id}/diagnosis.md"), text)
    return text


def verdicts(run: Run) -> list[Verdict]:
    """The five symptoms in order, each that is found with its causes, the likeliest first."""
    import yaml

    found, file = [], Path(tables.__file__).with_name("templates") / "diagnosis.yaml"
    for (symptom, fixes), (present, *tests) in zip(yaml.safe_load(file.read_text("utf-8")).items(), TESTS, strict=True):
        seen, causes = judge(run, symptom, present), zip(fixes.items(), tests, strict=True)
        if seen.verdict == "found":
            seen.causes.extend(sorted((judge(run, *one, test) for one, test in causes), key=lambda one: -one.level))
        found.append(seen)
    return found


def judge(run: Run, name: str, *fix_test) -> Verdict:
    *fix, test = fix_test
    try:
        level, evidence = test(run)
    except SlmError as error:
        return Verdict(name, "not testable", str(error).replace(f"{run.settings.root}/", ""), -1.0, *fix)
    return Verdict(name, "found" if level >= 1 else "ruled out", evidence, level, *fix)


def some(what: str, found: list[str], level: float = PROOF) -> Seen:
    """Found where there is anything in the list; the first three are named."""
    return level * bool(found), f"{what}: {len(found) or 'none'}{': ' * bool(found)}{'; '.join(found[:3])}"


# The training loss falls, the evaluation does not follow.


def stalls(run: Run) -> Seen:
    first, last, (name, pair) = run.record["metrics"]["loss_first"], run.record["metrics"]["loss_final"], run.against
    seen = f"training loss {first:.3f} to {last:.3f}; {run.contract.primary_metric} {run.score():.3f} on dev, "
    seen += f"{tables.title(name)} {pair.baseline:.3f}, target {run.contract.target:g}"
    return float(last < 0.8 * first and (pair.outcome != "better" or run.score() < run.contract.target)), seen


def mismatch(run: Run) -> Seen:
    """Half the sum of the differences between shares: the total variation distance."""
    both, seen = (run.train, [row for row, _ in run.pairs]), []
    for key in ("category", "kind", "language"):
        a, b = ({n: c / len(rows) for n, c in Counter(getattr(r.meta, key) for r in rows).items()} for rows in both)
        gaps = {name: b.get(name, 0) - a.get(name, 0) for name in a | b}
        most = max(gaps, key=gaps.get)
        seen.append((sum(map(abs, gaps.values())) / 2 / 0.4, f"{key} {most}: {a.get(most, 0):.0%} of training, {b.get(most, 0):.0%} of dev"))
    a, b = (median(len(row.user.split()) for row in rows) for rows in both)
    return max([*seen, (max(a / b, b / a) / 2, f"length: median {a:g} words in training, {b:g} on dev")])


def easy(run: Run) -> Seen:
    a, b = (mean(row.meta.difficulty == "easy" for row in rows) for rows in (run.train, [row for row, _ in run.pairs]))
    fail, others = (mean([not s.exact for row, s in run.pairs if (row.meta.difficulty == "easy") is e] or [0]) for e in (True, False))
    return (a - b) / 0.3 * (others >= fail), f"easy: {a:.0%} of training, {b:.0%} of dev, where {fail:.0%} of them and {others:.0%} of others fail"


def noisy(run: Run) -> Seen:
    """Alike rows answered differently; else a naive Bayes model that finds the label of unseen training rows (five folds)
    much less often than dev's: both ask the same, so the labels of training are worse."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.model_selection import cross_val_score
    from sklearn.naive_bayes import ComplementNB
    from sklearn.pipeline import make_pipeline

    if len(pairs := run.conflicts(run.train)) >= max(2, 0.01 * len(run.train)):
        return some("alike training rows, answered differently", pairs)
    model = make_pipeline(TfidfVectorizer(sublinear_tf=True), ComplementNB())
    train, dev = (tuple(zip(*((r.user, r.meta.category) for r in rows), strict=True)) for rows in (run.train, [r for r, _ in run.pairs]))
    inside, outside = cross_val_score(model, *train, cv=5).mean(), model.fit(*train).score(*dev)
    return 0.7 * outside / max(inside, 0.01), f"a naive Bayes model finds {inside:.0%} of the labels in training, {outside:.0%} on dev"


def ambiguous(run: Run) -> Seen:
    rows = [row for name in ("dev", "golden", "adversarial") for row in run.sets[name]]
    if pairs := run.conflicts([*rows, *seed_rows(run.settings)]):
        return some("alike evaluation or seed rows, answered differently", pairs)
    mixed = Counter(s.labels for s in run.failures if s.labels and s.labels[0] != s.labels[1])
    both, (a, b) = max(((min(n, mixed[b, a]), (a, b)) for (a, b), n in mixed.items()), default=(0, ("any", "any other")))
    return both / len(run.failures) / 0.2 * (both > 2), f"labels {a} and {b} are taken for each other, at least {both} times each way"


def strict(run: Run) -> Seen:
    def bare(value: dict) -> dict:
        return {n: re.sub(r"\W+", "", str(v)).lower() for n, v in run.contract.flatten(value).items()}

    near = [s.row_id for s in run.failures if s.parsed and bare(s.parsed) == bare(s.expected)]
    return some("wrong in case, space or punctuation alone", near, len(near) / len(run.failures) / 0.3)


def filled(run: Run) -> Seen:
    return run.filled / 0.2, f"{run.filled:.0%} of the training messages share half of their word triples with others"


# Answers are often invalid.


def validity(run: Run) -> dict[str, float]:
    run.score()
    return {n: r.metrics["schema_validity"].value for n, r in run.results.items() if n in (NAME, *tables.FILES)}


def invalid(run: Run) -> Seen:
    least, found = run.settings.gates.schema_validity, validity(run)
    seen = ", ".join(f"{tables.title(name)} {value:.1%}" for name, value in found.items())
    return float(min(found.values()) < least), f"valid answers on dev: {seen}; {least:.1%} are asked for"


def complex_schema(run: Run) -> Seen:
    names, bad = max((run.contract.flatten(s.expected) for _, s in run.pairs), key=len), Counter(s.stage for s in run.failures)
    deep, held = 1 + max(name.count(".") for name in names), run.results.get(CONSTRAINED)
    seen = f"{len(names)} fields, {deep} deep; {bad['schema']} answers are JSON that breaks the schema, {bad['json']} no JSON"
    seen += f"; held to the schema {held.metrics['schema_validity'].value:.1%} are valid" if held else ""
    return max(len(names) / 15, deep / 4) * (bad["schema"] > bad["json"]), seen


def formats(run: Run) -> Seen:
    (row, score), tokenizer, seen = run.pairs[0], load_tokenizer(run.settings), []
    text = render(tokenizer, prompt_messages(run.contract, row), add_generation_prompt=True)
    trained, asked = run.record["parents"]["contract"], run.results[NAME].contract_hash
    seen += [f"trained under contract {trained}, asked under {asked}"] * (trained != asked)
    now = len(tokenizer(text, add_special_tokens=False)["input_ids"])
    return some("differences", seen + [f"row {row.id} makes {now} tokens, asked were {score.prompt_tokens}"] * (now != score.prompt_tokens))


def hot(run: Run) -> Seen:
    warm = run.settings.export.temperature
    return warm / 0.05, f"export.temperature is {warm:g}; 06 and 08 measured at 0"


def exported(run: Run) -> Seen:
    found = validity(run)
    lost = {name: found[NAME] - value for name, value in found.items() if name != NAME}
    worst, said = max(lost, key=lost.get, default=""), run.served["chat template"]
    return some(f"{worst or 'no file'} has {lost.get(worst, 0):.1%} fewer valid answers than the adapter; its chat template", said)


def cut(run: Run) -> Seen:
    faults = [f"{s.row_id}: {why}" for s in run.failures for fault, why in [serving_fault(s)] if fault in ("stop", "length", "empty")]
    return some("answers", faults, len(faults) / len(run.pairs) / 0.05)


# The fine-tuned model is worse than the base.


def worse(run: Run) -> Seen:
    (name, pair), metric = run.against, run.contract.primary_metric
    d = pair.difference
    seen = f"{metric} {d.value:+.3f} [{d.low:+.3f}, {d.high:+.3f}] on dev against {tables.title(name)}, n={d.n}: {pair.outcome}"
    return float(d.value < 0), seen


def bad_data(run: Run) -> Seen:
    seen = [*run.broken, *run.conflicts(run.train)]
    return some("training rows that break the contract or contradict each other", seen, PROOF if len(seen) > 1 else 0.5)


def rate(run: Run, limits: bool = False) -> Seen:
    (losses, dev), recipe = curve(run.settings), run.record["recipe"]
    rise, most = max(x - min(losses[: n + 1]) for n, x in enumerate(losses)), 1e-4 if recipe["method"] == "full" else 1e-3
    seen = f"the training loss begins at {losses[0]:.3f} and rises by {rise:.3f} over its lowest; learning rate {recipe['learning_rate']:g}"
    level = max(rise / losses[0] / 0.25, 2.0 * (dev[-1][0] > dev[0][0]), recipe["learning_rate"] / most * limits)
    return level, seen + f", {most:g} is much" * limits


def epochs(run: Run) -> Seen:
    over = [advice for advice in advise(run.settings, run.id) if advice.finding == "overfit" and rate(run)[0] < 1]
    return 1.5 * bool(over), over[0].evidence if over else "the loss on dev_internal does not part from the training loss"


def template(run: Run) -> Seen:
    from transformers import AutoTokenizer

    tokenizer, own = load_tokenizer(run.settings), AutoTokenizer.from_pretrained(adapter_folder(run.settings))
    seen = [f"the {where} has another chat template than was trained with" for where, one in (("base", tokenizer), ("adapter", own))
            if digest(one.chat_template) != run.record["parents"]["chat_template"]]  # fmt: skip
    seen += [f"the adapter ends answers with {own.eos_token}, no end of the base"] * (own.eos_token_id not in stop_ids(run.settings, tokenizer))
    return some("differences", seen + [f"{s.row_id}: {why}" for s in run.failures for fault, why in [serving_fault(s)] if fault == "template"])


def modules(run: Run) -> Seen:
    from safetensors.torch import load_file

    file = adapter_folder(run.settings) / "adapter_model.safetensors"
    moved = {n.split(".lora_B")[0].split(".")[-1]: bool(w.any()) for n, w in load_file(file).items() if "lora_B" in n} if file.is_file() else {}
    layers = [n for shard in base_folder(run.settings).glob("*.safetensors") for n in load_file(shard) if ".layers." in n and "norm" not in n]
    bare = {n.split(".")[-2] for n in layers if n.endswith(".weight")} - {n for n, any_ in moved.items() if any_}
    return len(bare) * bool(moved) / 3, f"linear layers that nothing was trained on: {', '.join(sorted(bare)) if moved else 'none'}"


def leakage(run: Run) -> Seen:
    own, answers = run.settings.curate, {row.id: row.answer for rows in run.sets.values() for row in rows}
    hits = zip(run.train, leaks(run.train, run.sets, own.leakage, own.semantic_duplicate), strict=True)
    said = [f"{row.id} is like {hit.evidence['set']} {twin}{', answered otherwise' * (answers[twin] != row.answer)}"
            for row, hit in hits if hit for twin in [hit.evidence["twin"]]]  # fmt: skip
    return some("training rows like evaluation rows", said)


def unsuitable(run: Run) -> Seen:
    best, usual = run.against[1].baseline, run.score("majority")
    seen = f"the base at its best {best:.3f}, fine-tuned {run.score():.3f}, always the same answer {usual:.3f}"
    return 1.2 * (max(best, run.score()) <= usual + 0.02), seen


# General skills are forgotten.


def forgets(run: Run) -> Seen:
    before, after = (run.record["metrics"].get(f"general_loss_{when}") for when in ("first", "final"))
    if after is None:
        raise SlmError("the loss on everyday questions was not measured; train again on one process.")
    return (after - before) / FORGOTTEN, f"loss on everyday questions {before:.2f} to {after:.2f} nats per token"


def rank(run: Run) -> Seen:
    full, size = run.record["recipe"]["method"] == "full", run.record["recipe"]["lora_rank"]
    return 1.0 if full else size / 64, "a full fine-tune moves every weight" if full else f"lora_rank {size}; from 64 on models forget"


def narrow(run: Run) -> Seen:
    return max(run.filled / 0.2, 100 / len(run.train)), f"{len(run.train)} training rows; {filled(run)[1]}"


def long(run: Run) -> Seen:
    numbers = run.record["metrics"]
    seen = f"{numbers['epochs']:g} epochs; dev loss best at step {numbers['best_step']} of {numbers['steps']}"
    return max(numbers["epochs"] / 3.01, numbers["steps"] / max(1, numbers["best_step"]) / 2), seen


# It works in the notebook and fails in llama.cpp or Ollama.


def fails(run: Run) -> Seen:
    seen = [text for problems in run.served.values() for text in problems]
    with suppress(SlmError):
        seen += [f"{f['file']}: {f['holds']}" for f in run.export["files"] if f["holds"].startswith("no")]
        seen += [run.export["attribution"]] * (run.export["attribution"] != "equal")
    return some("files and Modelfile against the trained model", seen)


def served(cause: str, stage: str) -> Callable[[Run], Seen]:
    """The test of what the proofs of 08 say when made again, and of the stage that 08 blamed."""

    def test(run: Run) -> Seen:
        blamed = ""
        with suppress(SlmError):
            blamed = run.export["attribution"]
        return some("by the proofs of 08", run.served[cause] + [blamed] * bool(re.match(stage, blamed)))

    return test


def quantized(run: Run) -> Seen:
    far = [f"{p['file']}: divergence {p['kl']:.2g} nats, at most {p['most']:g}" for p in run.export["logits"] if not p["holds"]]
    far += [f"{f['file']}: {f['holds']}" for f in run.export["files"] if f["holds"] == "no: rows lost"]
    return some("files that lose what f16 keeps", far if run.export["attribution"] == "equal" else [])


TESTS = (
    (stalls, mismatch, easy, noisy, ambiguous, strict, filled),
    (invalid, lambda run: some("training answers that break the contract", run.broken), complex_schema, formats, hot, exported, cut),
    (worse, bad_data, rate, epochs, template, modules, leakage, unsuitable),
    (forgets, rank, narrow, long, lambda run: rate(run, limits=True)),
    (fails, served("chat template", "chat template"), served("conversion", "merge|weights|tokenizer"), served("end token", "$^"),
     served("stop tokens", "$^"), quantized, served("sampling", "sampling")),
)  # fmt: skip
