"""The sanity check: a hundred rows, trained and asked again, must come back as they are, or the fault is not the data's."""

import random
import shutil
from collections.abc import Sequence

from slm import registry
from slm.errors import SlmError
from slm.evaluate.scorers import Score, answer_rows, prompt_messages
from slm.models import student
from slm.rows import Row, read_rows
from slm.train.encode import Example, load_tokenizer, preview, stop_ids
from slm.train.recipe import import_trainer
from slm.train.sft import adapter_folder, fit, head, prepare

LEARNT, EPOCHS, ENOUGH = 0.95, 20, 0.002  # share of the rows; rounds at most; training loss at which a row is known by heart
CAUSES = {  # words of a refusal before training -> the likely cause
    "loss mask": "mask", "not on its answer": "mask or template", "stop token": "template, its stop token",
    "chat template": "template", "learning_rate": "learning rate",
}  # fmt: skip


def sanity(settings, contract, rows: int = 100) -> dict:
    """Train on accepted rows by the recipe as it is, but EPOCHS times and without dropout, and ask them again; returns
    the record. Raises SlmError when fewer than LEARNT are answered exactly, with the likely cause and its evidence."""
    recipe = {"epochs": EPOCHS, "max_steps": -1, "lora_dropout": 0.0, "early_stopping": False, "early_stopping_metric": "loss"}
    train = settings.train.model_copy(update=recipe)
    settings = settings.model_copy(update={"run_id": f"{settings.run_id}-sanity", "train": train})
    record, out = head(settings) | {"stage": "sanity", "status": "failed"}, adapter_folder(settings)
    import_trainer(settings)
    try:
        picked = pick(settings, contract, rows)
        tokenizer, both = load_tokenizer(settings), {"train": picked, "dev_internal": picked}
        try:
            examples = prepare(settings, contract, tokenizer, both)
            preview(picked, examples["train"], contract, tokenizer, stop_ids(settings, tokenizer), len(picked))
            _, metrics = fit(settings, contract, tokenizer, both, examples, "sanity", False, ENOUGH)
        except SlmError as error:
            cause = next((cause for words, cause in CAUSES.items() if words in str(error)), None)
            raise SlmError(f"sanity: likely cause: {cause}. {error}") from None if cause else error
        model, longest = student(settings, out), max(sum(x != -100 for x in e.labels) for e in examples["train"])
        scores = answer_rows(model, picked, contract, longest + 8)
        right = sum(s.exact for s in scores)
        record |= {"metrics": metrics | {"rows": len(picked), "exact": right}}
        if right < LEARNT * len(picked):
            cause = likely_cause(contract, model, picked, examples["train"], metrics, scores)
            raise SlmError(f"sanity: {right} of {len(picked)} rows learnt, {LEARNT:.0%} are needed. Likely cause: {cause}.")
        record["status"] = "completed"
        return record
    except Exception as error:
        record["error"] = str(error)[:500]
        raise
    finally:
        shutil.rmtree(out, ignore_errors=True)
        registry.append(settings, "runs", record)


def pick(settings, contract, n: int) -> list[Row]:
    """`n` accepted training rows, drawn by the seed. Raises SlmError for rows that nothing could learn: answers that break
    the contract, one message with two answers, or no rows at all."""
    path, answers = settings.path("data/accepted/train.jsonl"), {}
    rows = read_rows(path) if path.is_file() else []
    if not rows:
        raise SlmError(f"{path}: no accepted rows; run 04_curate first.")
    picked = random.Random(settings.train.seed).sample(rows, min(n, len(rows)))
    for row in picked:
        if error := contract.parse(row.answer).error:
            raise SlmError(f"sanity: likely cause: data format. Row {row.id}: its answer breaks the contract ({error}).")
        if answers.setdefault(row.user, row).answer != row.answer:
            raise SlmError(f"sanity: likely cause: data format. Rows {answers[row.user].id} and {row.id}: one message, two answers.")
    return picked


def likely_cause(contract, model, rows: Sequence[Row], examples: list[Example], metrics: dict, scores: Sequence[Score]) -> str:
    """The cause and what was seen, by looking at: the prompt asked and trained, the loss curve, how answers end."""
    decode, first, last = model.tokenizer.decode, metrics["loss_first"], metrics["loss_final"]
    asked = model.tokenizer(model.render(prompt_messages(contract, rows[0])), add_special_tokens=False)["input_ids"]
    trained = [token for token, label in zip(examples[0].input_ids, examples[0].labels, strict=True) if label == -100]
    wrong = next(s for s in scores if not s.exact)
    row = next(row for row in rows if row.id == wrong.row_id)
    seen = f"row {row.id} should be {row.answer!r}, came {wrong.text[:200]!r}"
    curve = f"the training loss went from {first:.3f} to {last:.3f} in {metrics['steps']} steps"
    endless = sum(s.finish_reason == "length" for s in scores)
    if asked != trained:
        return f"template. Trained after {decode(trained[-30:])!r}, asked after {decode(asked[-30:])!r}"
    if last > first:
        return f"learning rate, too high. {curve}; lower train.learning_rate; {seen}"
    if last > 0.8 * first:
        return f"learning rate, too low. {curve}; raise train.learning_rate; {seen}"
    if last > 0.1:
        return f"learning rate or rank, too low to learn {len(rows)} rows by heart. {curve}; {seen}"
    if endless > len(scores) / 2:
        end = decode(next(t for t in reversed(examples[0].labels) if t != -100))
        return f"template, its stop token. {endless} answers did not end; trained to end with {end!r}; {seen}"
    return f"template or data format. {curve}, so the rows were learnt, yet {seen}"
