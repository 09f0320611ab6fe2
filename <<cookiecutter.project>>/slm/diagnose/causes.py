"""The five failure tables: how each likely cause is tested; names and fixes are in report/templates/diagnosis.yaml."""

import re
from collections import Counter
from pathlib import Path
from statistics import mean, median
from types import SimpleNamespace

from slm.curate.leakage import evaluation_rows, leaks
from slm.curate.text import tfidf
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
from slm.train.callbacks import FORGOTTEN
from slm.train.encode import load_tokenizer, render, stop_ids
from slm.train.sft import adapter_folder

PROOF = 10.0  # the level of a contradiction in the artefacts themselves; rules of thumb stay below it
# Rules of thumb: dev loss above its best; training loss as a share of it; fall of the loss in the last fifth; a metric's
# drop on long rows, and how many times the median is long.
RISE, GAP, FALLING, DROP, LONG = 1.05, 0.5, 0.98, 0.15, 1.5
# What a test saw: its level (how many times the cause's limit; found from 1 on), the evidence, settings that answer it.
Seen = tuple[float, str] | tuple[float, str, dict]


def diagnose(settings, contract, run_id: str) -> str:
    """The five symptoms, each that is found with its causes, as Markdown; also written to diagnosis.md beside the run's
    report. Raises SlmError for a run that the registry does not know."""
    run = Run(settings, contract, run_id)
    text = fill("diagnosis.md", run=run_id, failed=run.failed, tables=verdicts(run))
    write_text(settings.path(f"outputs/eval_reports/{run_id}/diagnosis.md"), text)
    return text


def verdicts(run: Run) -> list[SimpleNamespace]:
    """The five symptoms in order; each that is found with its `causes`, most likely first: proofs, then by how far a
    limit is passed."""
    import yaml

    found, file = [], Path(tables.__file__).with_name("templates") / "diagnosis.yaml"
    for (symptom, fixes), (present, *tests) in zip(yaml.safe_load(file.read_text("utf-8")).items(), TESTS, strict=True):
        found.append(judge(run, symptom, "", present))
        causes = zip(fixes.items(), tests, strict=True) if found[-1].verdict == "found" else ()
        found[-1].causes = sorted((judge(run, *one, test) for one, test in causes), key=lambda v: -v.level)
    return found


def judge(run: Run, name: str, fix: str, test) -> SimpleNamespace:
    """`verdict` on a symptom or cause: "found", "ruled out" or, where the test lacks something, "not testable"; with
    its `evidence`, and the `fix` and `flags` (settings) that mend it."""
    try:
        level, evidence, *flags = test(run)
        verdict = "found" if level >= 1 else "ruled out"
    except SlmError as error:
        verdict, level, evidence, flags = "not testable", -9.0, str(error).replace(f"{run.settings.root}/", ""), ()
    return SimpleNamespace(name=name, fix=fix, verdict=verdict, level=level, evidence=evidence, flags=dict(*flags))


def some(what: str, found: list[str], level: float = PROOF) -> Seen:
    """Found where there is anything in the list; the first three are named."""
    return level * bool(found), f"{what}: {len(found) or 'none'}{': ' * bool(found)}{'; '.join(found[:3])}"


def scaled(run: Run, factor: float) -> dict:
    """The settings of an adapter of another rank, alpha with it; none for a full fine-tune or at the ends."""
    recipe = run.record["recipe"]
    rank, new = recipe["lora_rank"], min(64, max(4, int(recipe["lora_rank"] * factor)))
    flags = {"train.lora_rank": new, "train.lora_alpha": recipe["lora_alpha"] * new // rank}
    return {} if recipe["method"] == "full" or new == rank else flags


# The training loss falls, the evaluation does not follow.


def stalls(run: Run) -> Seen:
    first, last, (name, pair) = run.record["metrics"]["loss_first"], run.record["metrics"]["loss_final"], run.against
    seen = f"training loss {first:.3f} to {last:.3f}; {run.contract.primary_metric} {run.score():.3f} on dev, "
    seen += f"{tables.title(name)} {pair.baseline:.3f}, target {run.contract.target:g}"
    return last < 0.8 * first and (pair.outcome != "better" or run.score() < run.contract.target), seen


def mismatch(run: Run) -> Seen:
    """Half the sum of the differences between shares: the total variation distance."""
    both, seen = (run.train, [row for row, _ in run.pairs]), []
    for key in ("category", "kind", "language"):
        a, b = ({n: c / len(rows) for n, c in Counter(getattr(r.meta, key) for r in rows).items()} for rows in both)
        gaps = {name: b.get(name, 0) - a.get(name, 0) for name in a | b}
        most, level = max(gaps, key=gaps.get), sum(map(abs, gaps.values())) / 2 / 0.4
        seen.append((level, f"{key} {most}: {a.get(most, 0):.0%} of training, {b.get(most, 0):.0%} of dev"))
    return max(seen)


def easy(run: Run) -> Seen:
    a, b = (mean(row.meta.difficulty == "easy" for row in rows) for rows in (run.train, [row for row, _ in run.pairs]))
    wrong = ([not s.exact for r, s in run.pairs if (r.meta.difficulty == "easy") is e] or [0] for e in (True, False))
    fail, others = map(mean, wrong)
    seen = f"easy: {a:.0%} of training, {b:.0%} of dev, where {fail:.0%} of them and {others:.0%} of others fail"
    return (a - b) / 0.3 * (others >= fail), seen


def noisy(run: Run) -> Seen:
    """Alike rows answered differently; else a naive Bayes model that finds the label of unseen training rows (five
    folds) much less often than dev's: both ask the same, so the labels of training are worse."""
    from sklearn.model_selection import cross_val_score
    from sklearn.naive_bayes import ComplementNB

    if len(pairs := run.conflicts(run.train)) >= max(2, 0.01 * (n := len(run.train))):
        return some("alike training rows, answered differently", pairs)
    rows = [*run.train, *(row for row, _ in run.pairs)]
    table, labels, model = tfidf([row.user for row in rows]), [row.meta.category for row in rows], ComplementNB()
    inside = cross_val_score(model, table[:n], labels[:n], cv=5).mean()
    outside = model.fit(table[:n], labels[:n]).score(table[n:], labels[n:])
    seen = f"a naive Bayes model finds {inside:.0%} of the labels in training, {outside:.0%} on dev"
    return 0.7 * outside / max(inside, 0.01), seen


def ambiguous(run: Run) -> Seen:
    sets = evaluation_rows(run.settings)
    if pairs := run.conflicts([*sets["dev"], *sets["golden"], *sets["adversarial"], *seed_rows(run.settings)]):
        return some("alike evaluation or seed rows, answered differently", pairs)
    mixed = Counter(s.labels for s in run.failures if s.labels and s.labels[0] != s.labels[1])
    both, (a, b) = max(((min(n, mixed[b, a]), (a, b)) for (a, b), n in mixed.items()), default=(0, ("any", "another")))
    level = both / len(run.failures) / 0.2 * (both > 2)
    return level, f"labels {a} and {b} are taken for each other, at least {both} times each way"


def strict(run: Run) -> Seen:
    def bare(value: dict) -> dict:
        return {n: re.sub(r"\W+", "", str(v)).lower() for n, v in run.contract.flatten(value).items()}

    near = [s.row_id for s in run.failures if s.parsed and bare(s.parsed) == bare(s.expected)]
    return some("wrong in case, space or punctuation alone", near, len(near) / len(run.failures) / 0.3)


def filled(run: Run) -> Seen:
    return run.filled / 0.2, f"{run.filled:.0%} of the training messages share half their word triples with others"


def epochs(run: Run) -> Seen:
    (losses, dev), recipe = run.losses, run.record["recipe"]
    (best, at), (final, end), tail = min(dev), dev[-1], mean(losses[-max(1, len(losses) // 5) :])
    over = end > 0 and rate(run)[0] < 1 and (final > RISE * best or tail < GAP * best)
    fewer = max(0.25, round(4 * recipe["epochs"] * (at / end if at < end else 0.75)) / 4)
    dropout = {"train.lora_dropout": min(0.3, recipe["lora_dropout"] + 0.05)}
    seen = f"dev loss best {best:.3f} at step {at}, {final:.3f} at the end (step {end}); training loss {tail:.3f}"
    return 1.5 * over, seen, {"train.epochs": fewer, **scaled(run, 0.5), **dropout}


def short(run: Run) -> Seen:
    (losses, dev), now, fifth = run.losses, run.record["recipe"]["epochs"], max(1, len(run.losses[0]) // 5)
    tail, earlier = mean(losses[-fifth:]), mean(losses[-2 * fifth : -fifth] or losses[:1])
    seen = f"training loss {earlier:.3f} to {tail:.3f} in the last fifth, dev best at step {min(dev)[1]}"
    longer = {"train.epochs": min(3, 1.5 * now)} if now < 3 else {}
    larger = {} if judge(run, "", "", forgets).verdict == "found" else scaled(run, 2)
    return min(dev) == dev[-1] and tail < FALLING * earlier, seen, longer | larger


def lengthy(run: Run) -> Seen:
    sizes = {s.row_id: s.prompt_tokens + s.completion_tokens for _, s in run.pairs}
    limit = min(run.record["metrics"].get("longest_row", 1e9), LONG * median(sizes.values()))
    far, near = ([s.value for _, s in run.pairs if (sizes[s.row_id] > limit) is far] or [1.0] for far in (True, False))
    length = max(run.record["recipe"]["max_seq_length"], -(-max(sizes.values()) // 256) * 256)
    flags = {"train.max_seq_length": length, "evaluate.context": max(run.settings.evaluate.context, length)}
    seen = f"rows of more than {limit:.0f} tokens score {mean(far):.3f} (n={len(far)}), the others {mean(near):.3f}"
    return (mean(near) - mean(far)) / DROP * (len(far) > 2), seen, flags


# Answers are often invalid.


def validity(run: Run) -> dict[str, float]:
    run.score()
    return {n: r.metrics["schema_validity"].value for n, r in run.results.items() if n in (NAME, *tables.FILES)}


def invalid(run: Run) -> Seen:
    least, found = run.settings.gates.schema_validity, validity(run)
    seen = ", ".join(f"{tables.title(name)} {value:.1%}" for name, value in found.items())
    return min(found.values()) < least, f"valid answers on dev: {seen}; {least:.1%} are asked for"


def broken(run: Run) -> list[str]:
    return [f"{row.id} ({error})" for row in run.train if (error := run.contract.parse(row.answer).error)]


def prose(run: Run) -> Seen:
    return some("training answers that break the contract", broken(run))


def complex_schema(run: Run) -> Seen:
    names = max((run.contract.flatten(s.expected) for _, s in run.pairs), key=len)
    deep, held = 1 + max(name.count(".") for name in names), run.results.get(CONSTRAINED)
    bad = Counter(s.stage for s in run.failures)
    seen = f"{len(names)} fields, {deep} deep; {bad['schema']} answers break the schema, {bad['json']} are no JSON"
    seen += f"; held to the schema {held.metrics['schema_validity'].value:.1%} are valid" if held else ""
    return max(len(names) / 15, deep / 4) * (bad["schema"] > bad["json"]), seen


def formats(run: Run) -> Seen:
    (row, score), tokenizer = run.pairs[0], load_tokenizer(run.settings)
    trained, asked = run.record["parents"]["contract"], run.results[NAME].contract_hash
    seen = [f"trained under contract {trained}, asked under {asked}"] * (trained != asked)
    text = render(tokenizer, prompt_messages(run.contract, row), add_generation_prompt=True)
    now, was = len(tokenizer(text, add_special_tokens=False)["input_ids"]), score.prompt_tokens
    return some("differences", seen + [f"row {row.id} makes {now} tokens, asked were {was}"] * (was not in (0, now)))


def hot(run: Run) -> Seen:
    warm = run.settings.export.temperature
    return warm / 0.05, f"export.temperature is {warm:g}; 06 and 08 measured at 0", {"export.temperature": 0}


def exported(run: Run) -> Seen:
    found, said = validity(run), run.served["chat template"]
    lost = {name: found[NAME] - value for name, value in found.items() if name != NAME}
    worst = max(lost, key=lost.get, default="")
    fewer = f"{worst or 'no file'} has {lost.get(worst, 0):.1%} fewer valid answers than the adapter"
    return some(f"{fewer}; its chat template", said)


def faults(run: Run, *names: str) -> list[str]:
    return [f"{s.row_id}: {why}" for s in run.failures for fault, why in [serving_fault(s)] if fault in names]


def cut(run: Run) -> Seen:
    found = faults(run, "stop", "length", "empty")
    return some("answers", found, len(found) / len(run.pairs) / 0.05)


# The fine-tuned model is worse than the base.


def worse(run: Run) -> Seen:
    (name, pair), d = run.against, run.against[1].difference
    seen = f"{run.contract.primary_metric} {d.value:+.3f} [{d.low:+.3f}, {d.high:+.3f}] on dev, n={d.n}"
    return d.value < 0, f"{seen}, against {tables.title(name)}: {pair.outcome}"


def bad_data(run: Run) -> Seen:
    seen = [*broken(run), *run.conflicts(run.train)]
    return some("training rows that break the contract or one another", seen, PROOF if len(seen) > 1 else 0.5)


def rate(run: Run, share: float = 1 / 3, limits: bool = False) -> Seen:
    (losses, dev), recipe = run.losses, run.record["recipe"]
    now, most = recipe["learning_rate"], 1e-4 if recipe["method"] == "full" else 1e-3
    rise = max(loss - min(losses[: n + 1]) for n, loss in enumerate(losses))
    level = max(rise / losses[0] / 0.25, 2.0 * (dev[-1][0] > dev[0][0]), now / most * limits)
    seen = f"learning rate {now:g}{f', {most:g} is much' * limits}; "
    seen += f"the training loss begins at {losses[0]:.3f} and rises by {rise:.3f} over its lowest"
    return level, seen, {"train.learning_rate": now * share}


def template(run: Run) -> Seen:
    from transformers import AutoTokenizer

    tokenizer, own = load_tokenizer(run.settings), AutoTokenizer.from_pretrained(adapter_folder(run.settings))
    was, end = run.record["parents"]["chat_template"], own.eos_token_id not in stop_ids(run.settings, tokenizer)
    other = [name for name, t in (("base", tokenizer), ("adapter", own)) if digest(t.chat_template) != was]
    seen = [f"the {name} has another chat template than was trained with" for name in other]
    seen += [f"the adapter ends answers with {own.eos_token}, no end of the base"] * end
    return some("differences", seen + faults(run, "template"))


def modules(run: Run) -> Seen:
    from safetensors import safe_open

    def read(folder: Path) -> list[tuple]:
        parts = [safe_open(file, "pt") for file in folder.glob("*.safetensors")]
        return [(name, part) for part in parts for name in part.keys()]

    adapter, base = read(adapter_folder(run.settings)), read(base_folder(run.settings))
    moved = {name.split(".")[-3] for name, part in adapter if "lora_B" in name and part.get_tensor(name).any()}
    own = re.compile(r"(?!.*(norm|vision)).*\.layers\..*\.weight")
    layers = {name.split(".")[-2] for name, _ in base if own.fullmatch(name)}
    bare = sorted(layers - moved) if run.record["recipe"]["method"] != "full" else []
    return some("linear layers on which nothing was trained", bare, len(bare) / 3)


def leakage(run: Run) -> Seen:
    own, sets = run.settings.curate, evaluation_rows(run.settings)
    answers = {row.id: row.answer for rows in sets.values() for row in rows}
    hits = zip(run.train, leaks(run.train, sets, own.leakage, own.semantic_duplicate), strict=True)
    found = [(row, hit.evidence["set"], hit.evidence["twin"]) for row, hit in hits if hit]
    said = [f"{row.id} is like {set} {twin}{', answered otherwise' * (answers[twin] != row.answer)}"
            for row, set, twin in found]  # fmt: skip
    return some("training rows like evaluation rows", said)


def unsuitable(run: Run) -> Seen:
    best, usual = run.against[1].baseline, run.score("majority")
    seen = f"the base at its best {best:.3f}, fine-tuned {run.score():.3f}, always the same answer {usual:.3f}"
    return 1.2 * (max(best, run.score()) <= usual + 0.02), seen


# General skills are forgotten.


def forgets(run: Run) -> Seen:
    before, after = (run.record["metrics"].get(f"general_loss_{when}") for when in ("first", "final"))
    if after is None:
        raise SlmError("the loss on everyday questions was not measured in this run.")
    return (after - before) / FORGOTTEN, f"loss on everyday questions {before:.2f} to {after:.2f} nats per token"


def rank(run: Run) -> Seen:
    full, size = run.record["recipe"]["method"] == "full", run.record["recipe"]["lora_rank"]
    seen = "a full fine-tune moves every weight" if full else f"lora_rank {size}; 64 is much"
    return 1.0 if full else size / 64, seen, scaled(run, 0.5)


def narrow(run: Run) -> Seen:
    return max(run.filled / 0.2, 100 / len(run.train)), f"{len(run.train)} training rows; {filled(run)[1]}"


def long(run: Run) -> Seen:
    numbers = run.record["metrics"]
    seen = f"{numbers['epochs']:g} epochs; dev loss best at step {numbers['best_step']} of {numbers['steps']}"
    level = max(numbers["epochs"] / 3.01, numbers["steps"] / max(1, numbers["best_step"]) / 2)
    return level, seen, {"train.epochs": round(numbers["epochs"] / max(level, 1), 2)}


# It works in the notebook and fails in llama.cpp or Ollama.


def served(run: Run, *causes: str) -> Seen:
    lost = [f"{f['file']} loses rows" for f in run.export.get("files", ()) if f["holds"] == "no: rows lost"]
    said = [text for cause in causes or run.served for text in run.served[cause]]
    return some("differences from the trained model", said if causes else said + lost)


def quantized(run: Run) -> Seen:
    if not run.export:
        raise SlmError("08_export did not come to its report; run it to the end.")
    far = [p for p in run.export["logits"] if not p["holds"]]
    far = [f"{p['file']}: divergence {p['kl']:.2g}, at most {p['most']:g}" for p in far]
    far += [f"{f['file']} loses rows" for f in run.export["files"] if f["holds"] == "no: rows lost"]
    return some("files that lose what f16 keeps", far if run.export["attribution"] == "equal" else [])


TESTS = (
    (stalls, mismatch, easy, noisy, ambiguous, strict, filled, epochs, short, lengthy),
    (invalid, prose, complex_schema, formats, hot, exported, cut),
    (worse, bad_data, rate, epochs, template, modules, leakage, unsuitable),
    (forgets, rank, narrow, long, lambda run: rate(run, 0.5, limits=True)),
    (served, lambda run: served(run, "chat template"), lambda run: served(run, "conversion"),
     lambda run: served(run, "end token"), lambda run: served(run, "stop tokens"), quantized,
     lambda run: served(run, "sampling")),
)  # fmt: skip
