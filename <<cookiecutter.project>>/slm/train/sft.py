"""Supervised fine-tuning: checks first, then train, resume, save, record. A run that fails is closed as failed."""

import gc
import json
import os
import re
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from slm import cost, registry
from slm.curate.versions import split_of
from slm.errors import SlmError
from slm.evaluate import baselines
from slm.models import base_hash
from slm.rows import Row, digest, read_rows, write_json, write_text
from slm.train.callbacks import general_loss, plot_loss, task_metric, track, watch, write_log
from slm.train.cpu import patch_trl
from slm.train.encode import Example, encode, load_tokenizer, preview, stop_ids
from slm.train.recipe import PATIENCE, check_room, estimate, halved, import_trainer, in_force, processes
from slm.train.recipe import recipe_hash, sft_arguments

PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "bitsandbytes", "unsloth", "unsloth_zoo")


def training_rows(settings) -> dict[str, list[Row]]:
    """The accepted rows to train on and to watch the loss on: {"train": …, "dev_internal": …}. Raises SlmError when
    02 left no baselines or 04 no rows: without them nothing could be claimed about the result; and when a row of an
    evaluation set is among them."""
    baselines.require_baselines(settings)
    found, locked = {}, [settings.path(f"data/eval/{name}.jsonl") for name in registry.SETS]
    kept = {key for file in locked if file.is_file() for row in read_rows(file) for key in (row.id, row.user)}
    for name in ("train", "dev_internal"):
        path = split_of(settings, name)
        rows = read_rows(path) if path.is_file() else []
        if not rows:
            raise SlmError(f"{path}: no accepted rows; run 04_curate before training.")
        if known := [row.id for row in rows if {row.id, row.user} & kept]:
            raise SlmError(f"{path}: row {known[0]} stands in data/eval; nothing is trained or chosen on it, run 04_curate again.")
        found[name] = rows
    return found


def adapter_folder(settings) -> Path:
    """outputs/adapters/<run_id>."""
    return settings.path(f"outputs/adapters/{settings.run_id}")


def train(settings, contract, resume: bool = True) -> dict:
    """Train, save to outputs/adapters/<run_id> and record the run; returns its line of registry/runs.jsonl. A killed
    run goes on from its newest checkpoint when recipe, rows, contract, template and the number of processes are the
    same. Out of memory, it goes on with half the rows at once and as many per step. Whatever ends it, the record is
    closed."""
    record, begin = head(settings), time.perf_counter()
    try:
        import_trainer(settings)
        rows = training_rows(settings)
        tokenizer = load_tokenizer(settings)
        examples = prepare(settings, contract, tokenizer, rows)
        record = _facts(settings, contract, tokenizer)
        with track(settings, record, settings.run_id) as tracking:
            settings, metrics = fit(settings, contract, tokenizer, rows, examples, record["recipe_hash"], resume, also=tracking)
        metrics["longest_row"] = max(len(e.input_ids) for e in examples["train"])
    except BaseException as error:
        failed = {"status": "failed", "error": f"{type(error).__name__}: {error}"[:500]}
        if _first_process():
            registry.append(settings, "runs", {**record, **failed, "seconds": round(time.perf_counter() - begin, 1)})
            _book(settings, time.perf_counter() - begin, record)
        raise
    if not _first_process():
        return record
    seconds = round(time.perf_counter() - begin, 1)
    money = _book(settings, seconds, record)
    files = [f for f in sorted(adapter_folder(settings).iterdir()) if f.is_file()]
    record |= {
        "status": "completed", "metrics": metrics, "recipe": settings.train.model_dump(), "seconds": seconds, "cost": round(money, 6),
        "artefacts": {str(f.relative_to(settings.root)): registry.file_hash(f)[:16] for f in files},
    }  # fmt: skip
    return registry.append(settings, "runs", record)


def prepare(settings, contract, tokenizer, rows: dict[str, list[Row]]) -> dict[str, list[Example]]:
    """The rows as tokens, after every check that can be made before training. Raises SlmError."""
    stops = stop_ids(settings, tokenizer)
    examples = {name: encode(part, contract, tokenizer, stops, settings.train.max_seq_length) for name, part in rows.items()}
    preview(rows["train"], examples["train"], contract, tokenizer, stops)
    check_room(settings, [*examples["train"], *examples["dev_internal"]], adapter_folder(settings))
    if settings.train.early_stopping_metric == "task" and processes() > 1:
        raise SlmError("train.early_stopping_metric task: on one process only; set loss under accelerate launch.")
    return examples


def fit(settings, contract, tokenizer, rows, examples, mark: str, resume: bool, enough: float = 0.0, also=()) -> tuple:
    """Train and save; the settings that went through, and the metrics. `mark` names what a checkpoint must be of; below
    a training loss of `enough` it ends early; `also` are more callbacks. Raises SlmError when memory or disk run out."""
    plan = estimate(settings, examples["train"])
    _say(f"{plan['steps']} steps, about {plan['minutes']} minutes ({plan['speed']}), memory {plan['memory']}")
    while True:
        try:
            return settings, _fit(settings, contract, tokenizer, rows, examples, mark, resume, enough, also)
        except Exception as error:
            if re.search("No space left|inline_container|iostream", str(error)):  # the last two: what torch.save says
                raise SlmError(f"{adapter_folder(settings)}: no room on this disk; make some and run again.") from error
            if not out_of_memory(error) or processes() > 1:
                raise
            if settings.train.batch_size_per_device == 1:
                mend = "set gradient_checkpointing true, method qlora, or a smaller model.base"
                raise SlmError(f"out of memory with one row at a time ({error}); {mend}.") from None
        settings = halved(settings)
        gc.collect()  # what the failed attempt held
        train = settings.train
        _say(f"out of memory: going on with batch_size_per_device {train.batch_size_per_device} and "
              f"gradient_accumulation_steps {train.gradient_accumulation_steps}.")  # fmt: skip


def out_of_memory(error: Exception) -> bool:
    """Whether it was memory that ran out, of the GPU or of the machine."""
    said = str(error).lower()
    return isinstance(error, MemoryError) or "out of memory" in said or "can't allocate memory" in said


def _fit(settings, contract, tokenizer, rows, examples, mark: str, resume: bool, enough: float, also) -> dict:
    from datasets import Dataset
    from transformers import EarlyStoppingCallback
    from trl import SFTConfig

    from slm.train.load import load, script

    if settings.train.trainer == "trl":  # Unsloth brings its own
        patch_trl()
    out = adapter_folder(settings)
    checkpoints = out / "checkpoints"
    start = newest_checkpoint(checkpoints, mark) if resume else None
    if start is None and _first_process():
        shutil.rmtree(checkpoints, ignore_errors=True)
        write_json(checkpoints / "recipe.json", {"hash": mark})
    elif start is not None:
        _say(f"resuming from {start.relative_to(settings.root)}")
    arguments = SFTConfig(**sft_arguments(settings, checkpoints, len(examples["train"])))  # gives each process its device
    arguments.eval_on_start = start is None  # a resumed run has looked already: twice would count against its patience
    train, dev = (
        Dataset.from_dict({"input_ids": [e.input_ids for e in part], "labels": [e.labels for e in part]})
        for part in (examples["train"], sorted(examples["dev_internal"], key=lambda e: len(e.input_ids)))
    )
    recipe, watching, looks = settings.train, [watch(enough), _same_order(settings.train.seed), *also], None
    if recipe.early_stopping_metric == "task":
        watching.append(looks := task_metric(settings, contract, tokenizer, stop_ids(settings, tokenizer), rows["dev_internal"]))
    if recipe.early_stopping:
        watching.append(EarlyStoppingCallback(early_stopping_patience=PATIENCE))
    trainer = script(settings).make_trainer(load(settings), arguments, tokenizer, train, dev, watching)
    if looks:
        looks.trainer = trainer
    before, begin, saved = general_loss(trainer.model, tokenizer) if processes() == 1 else None, time.perf_counter(), False
    try:
        trainer.train(resume_from_checkpoint=str(start) if start else None)
        metrics = _metrics(trainer.state, time.perf_counter() - begin) | (looks.summary() if looks else {})
        if processes() == 1:
            metrics |= {"general_loss_first": before, "general_loss_final": general_loss(trainer.model, tokenizer)}
        save(settings, trainer, tokenizer)
        saved = True
    finally:
        if trainer.is_world_process_zero():  # an earlier run's adapter keeps its log when this one fails
            beside = out if saved or not (out / "settings.yaml").is_file() else checkpoints
            write_log(trainer.state.log_history, beside / "training_log.csv")
            plot_loss(trainer.state.log_history, beside / "training_loss.png")
    trainer.accelerator.wait_for_everyone()  # the others may still read the best checkpoint
    if trainer.is_world_process_zero():
        shutil.rmtree(checkpoints, ignore_errors=True)
    return metrics


def _same_order(seed: int):
    """A callback that gives each epoch an order of rows of its own seed: the same on every process, and after a kill."""
    import torch
    from transformers import TrainerCallback

    class SameOrder(TrainerCallback):
        def on_epoch_begin(self, args, state, control, train_dataloader, **_):
            batches = train_dataloader.batch_sampler
            while hasattr(batches, "batch_sampler"):  # accelerate's, around the trainer's
                batches = batches.batch_sampler
            if args.train_sampling_strategy == "group_by_length":
                batches.sampler.generator = torch.Generator().manual_seed(seed + int(state.epoch))

    return SameOrder()


def newest_checkpoint(folder: Path, mark: str) -> Path | None:
    """The newest complete checkpoint of the same recipe, or None. `trainer_state.json` is what a checkpoint ends with."""
    marker = folder / "recipe.json"
    if not marker.is_file() or json.loads(marker.read_text(encoding="utf-8")).get("hash") != mark:
        if any(folder.glob("checkpoint-*")):
            _say(f"{folder}: checkpoints of another recipe, other rows or more or fewer processes; starting afresh.")
        return None
    complete = [c for c in folder.glob("checkpoint-*") if (c / "trainer_state.json").is_file()]
    return max(complete, key=lambda c: int(c.name.rsplit("-", 1)[1]), default=None)


def save(settings, trainer, tokenizer) -> None:
    """Adapter (or the full model in bf16), tokenizer and resolved settings to outputs/adapters/<run_id>, as one step."""
    import torch
    import yaml

    out = adapter_folder(settings)
    work = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    try:
        model = trainer.accelerator.unwrap_model(trainer.model)
        if settings.train.method == "full":
            model.to(torch.bfloat16)
            model.config.use_cache = True
        trainer.save_model(str(work))
        if not trainer.is_world_process_zero():
            return
        tokenizer.save_pretrained(work)
        write_text(work / "settings.yaml", yaml.safe_dump(settings.model_dump(), sort_keys=False))
        for stale in [f for f in out.iterdir() if f.is_file()]:
            stale.unlink()
        for file in [f for f in work.iterdir() if f.is_file() and f.name not in ("training_args.bin", "README.md")]:
            os.replace(file, out / file.name)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _metrics(state, seconds: float) -> dict:
    """First and last losses, and speed, from the trainer's log."""
    losses = [(e["step"], e["loss"]) for e in state.log_history if "loss" in e]
    dev = [(e["step"], e["eval_loss"]) for e in state.log_history if "eval_loss" in e]
    tokens = max((e["num_tokens"] for e in state.log_history if "num_tokens" in e), default=0)
    best = min(dev, key=lambda point: point[1])
    return {
        "steps": state.global_step, "epochs": round(state.epoch, 3), "loss_first": losses[0][1], "loss_final": losses[-1][1],
        "dev_loss_first": dev[0][1], "dev_loss_best": best[1], "dev_loss_final": dev[-1][1], "best_step": best[0],
        "tokens": int(tokens), "train_seconds": round(seconds, 1), "tokens_per_s": round(tokens / seconds, 1),
    }  # fmt: skip


def _book(settings, seconds: float, record: dict) -> float:
    """The hours of every process that trained, a failed run's too, in the ledger; returns the money."""
    hours, device = seconds / 3600 * processes(), record.get("device", "")
    return cost.add_hours(settings, "gpu_training_cost", hours, device=device)["money"]


def head(settings) -> dict:
    """What a run record says of a run that never started."""
    return {
        "stage": "train", "run_id": settings.run_id, "profile": settings.profile, "settings": settings.hash,
        "method": settings.train.method, "trainer": settings.train.trainer, "parents": {"base": settings.model.base},
    }  # fmt: skip


def _facts(settings, contract, tokenizer) -> dict:
    """What a run record says before anything has run: parents, versions, seeds, device."""
    files = {name: registry.file_hash(split_of(settings, name))[:16] for name in ("train", "dev_internal")}
    known = [d for d in registry.read(settings, "datasets") if files.items() <= d.get("split", {}).get("files", {}).items()]
    if not known:
        _say("WARNING: these rows are not a recorded dataset version; run 04_curate, or the release gate will not pass.")
    facts = {"rows": files, "contract": contract.schema_hash, "chat_template": digest(tokenizer.chat_template)}
    facts["base_hash"], force = base_hash(settings), in_force(settings)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=settings.root, capture_output=True, text=True, check=False)
    return head(settings) | {
        "recipe_hash": recipe_hash(settings, processes=processes(), **facts),
        "parents": {"dataset": known[-1]["version"] if known else None, "base": settings.model.base, **facts},
        "commit": commit.stdout.strip() or None, "packages": registry.versions(PACKAGES),
        "seeds": {"train": settings.train.seed, "split": settings.curate.seed}, "device": force["device"], "in_force": force,
        "recipe": settings.train.model_dump(),
    }  # fmt: skip


def _first_process() -> bool:
    """Whether this is the process that writes, under `accelerate launch` too."""
    return os.environ.get("RANK", "0") == "0"


def _say(text: str) -> None:
    """Print, once for all processes."""
    if _first_process():
        print(text, flush=True)
