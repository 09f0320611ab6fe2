"""Advice on the recipe from a run's training log and evaluation report: the workflow's adjustments, as settings."""

import csv
import json
from dataclasses import dataclass, field
from statistics import mean, median

from slm import registry
from slm.errors import SlmError
from slm.evaluate.candidate import NAME, load_candidate, scores_file
from slm.train.sft import adapter_folder

# Rules of thumb: dev loss above its best; training loss as a share of it; fall of the loss in the last fifth; rise of
# the loss on everyday questions (nats per token); a metric's drop on long rows, and how many times the median is long.
RISE, GAP, FALLING, FORGOTTEN, DROP, LONG = 1.05, 0.5, 0.98, 0.4, 0.15, 1.5


@dataclass(frozen=True)
class Advice:
    """One finding, what shows it, the settings that answer it, and what settings cannot do."""

    finding: str
    evidence: str
    besides: str
    settings: dict = field(default_factory=dict)

    def __str__(self) -> str:
        flags = " ".join(f"-s {key}={value:g}" for key, value in self.settings.items())
        return "\n".join(line for line in (f"{self.finding}: {self.evidence}", f"  {flags}", f"  {self.besides}") if line.strip())


def curve(settings) -> tuple[list[float], list[tuple[float, int]]]:
    """The losses that training_log.csv holds: of the training batches, and (loss, step) on dev_internal."""
    file = adapter_folder(settings) / "training_log.csv"
    if not file.is_file():
        raise SlmError(f"run {settings.run_id}: no training_log.csv; run 05_train for it first.")
    log = list(csv.DictReader(file.open(encoding="utf-8")))
    dev = [(float(line["eval_loss"]), int(line["step"])) for line in log if line["eval_loss"]]
    return [float(line["loss"]) for line in log if line["loss"]], dev


def advise(settings, run_id: str) -> list[Advice]:
    """What to change for the next run, most urgent first; empty when nothing stands out. Raises SlmError when the run
    was not trained or not evaluated."""
    record = registry.latest(settings, "runs", stage="train", run_id=run_id, status="completed")
    settings = settings.model_copy(update={"run_id": run_id})
    report_file, (losses, dev) = scores_file(settings, run_id).with_name("eval_report.json"), curve(settings)
    for there, what, stage in ((record, "completed training", "05_train"), (report_file.is_file(), report_file.name, "06_evaluate")):
        if not there:
            raise SlmError(f"run {run_id}: no {what}; run {stage} for it first.")
    contract = json.loads(report_file.read_text(encoding="utf-8"))["contract"]
    mine = next(r for r in load_candidate(settings, run_id) if (r.set, r.name) == ("dev", NAME))
    fifth = max(1, len(losses) // 5)
    tail, earlier = mean(losses[-fifth:]), mean(losses[-2 * fifth : -fifth] or losses[:1])
    found, recipe, numbers = [], record["recipe"], record["metrics"]
    score, valid = mine.metrics[contract["primary_metric"]], mine.metrics["schema_validity"]
    (best, at), (final, end) = min(dev), dev[-1]
    forgot = numbers.get("general_loss_final", 0) - numbers.get("general_loss_first", 0)

    def rank(factor: float) -> dict:
        new = min(64, max(4, int(recipe["lora_rank"] * factor)))
        scaled = {"train.lora_rank": new, "train.lora_alpha": recipe["lora_alpha"] * new // recipe["lora_rank"]}
        return {} if recipe["method"] == "full" or new == recipe["lora_rank"] else scaled

    if valid.value < settings.gates.schema_validity:
        bad = [s.row_id for s in mine.scores if s.parsed is None]
        found.append(Advice(
            "unstable format", f"{len(bad)} of {len(mine.scores)} answers on dev break the schema ({', '.join(bad[:5])})",
            "first add schema_repair rows in 03 and 04, before any setting below; evaluate.constrained shows what decoding can hold",
        ))  # fmt: skip
    if end > 0 and (final > RISE * best or tail < GAP * best):
        epochs = max(0.25, round(4 * recipe["epochs"] * (at / end if at < end else 0.75)) / 4)
        found.append(Advice(
            "overfit", f"dev loss best {best:.3f} at step {at}, {final:.3f} at the end (step {end}); training loss {tail:.3f}",
            "more varied rows (04 shows the coverage)",
            {"train.epochs": epochs, **rank(0.5), "train.lora_dropout": min(0.3, recipe["lora_dropout"] + 0.05)},
        ))  # fmt: skip
    elif score.value < contract["target"] and at == end and tail < FALLING * earlier:
        longer = {"train.epochs": min(3, 1.5 * recipe["epochs"])} if recipe["epochs"] < 3 else {}
        found.append(Advice(
            "underfit", f"{contract['primary_metric']} {score.value:.3f} on dev, target {contract['target']:g}, while the loss "
            f"still falls: training {earlier:.3f} to {tail:.3f} in the last fifth, dev best at the end ({best:.3f})",
            "or better examples (07), or a stronger model.base", longer | ({} if forgot > FORGOTTEN else rank(2)),
        ))  # fmt: skip
    if forgot > FORGOTTEN:
        found.append(Advice(
            "forgetting", f"the loss on everyday questions rose from {numbers['general_loss_first']:.2f} to "
            f"{numbers['general_loss_final']:.2f} nats per token; it matters where the model does more than this task",
            "mix general instruction rows into the training rows", {**rank(0.5), "train.learning_rate": recipe["learning_rate"] / 2},
        ))  # fmt: skip
    sizes = {s.row_id: s.prompt_tokens + s.completion_tokens for s in mine.scores}
    limit = min(numbers.get("longest_row", 1e9), LONG * median(sizes.values()))
    long, rest = ([s.value for s in mine.scores if (sizes[s.row_id] > limit) is side] for side in (True, False))
    if len(long) >= 3 and rest and mean(long) < mean(rest) - DROP:
        length = max(recipe["max_seq_length"], -(-max(sizes.values()) // 256) * 256)
        found.append(Advice(
            "long context", f"rows of more than {limit:.0f} tokens score {mean(long):.3f} (n={len(long)}), the others {mean(rest):.3f}",
            f"train and evaluate at that length: add rows of up to {max(sizes.values())} tokens",
            {"train.max_seq_length": length, "evaluate.context": max(settings.evaluate.context, length)},
        ))  # fmt: skip
    return found
