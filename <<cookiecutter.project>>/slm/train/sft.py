"""Supervised fine-tuning: checks first, then train, resume, save, record. A run that fails is closed as failed."""

import json
import math
import os
import shutil
import subprocess
import tempfile
import time
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from slm import cost, registry
from slm.curate.versions import split_of
from slm.errors import SlmError
from slm.evaluate import baselines
from slm.models import base_hash
from slm.models.hf import hash_text
from slm.rows import Row, read_rows, write_json, write_text
from slm.train.callbacks import plot_loss, set_tracker, write_log
from slm.train.cpu import patch_trl
from slm.train.encode import Example, encode, load_tokenizer, preview, stop_ids
from slm.train.recipe import PATIENCE, import_trainer, in_force, recipe_hash, sft_arguments

PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "bitsandbytes", "unsloth", "unsloth_zoo")


def training_rows(settings) -> dict[str, list[Row]]:
    """The accepted rows to train on and to watch the loss on: {"train": …, "dev_internal": …}. Raises SlmError when
    02 left no baselines or 04 no rows: without them nothing could be claimed about the result."""
    baselines.require_baselines(settings)
    found = {}
    for name in ("train", "dev_internal"):
        path = split_of(settings, name)
        rows = read_rows(path) if path.is_file() else []
        if not rows:
            raise SlmError(f"{path}: no accepted rows; run 04_curate before training.")
        found[name] = rows
    return found


def adapter_folder(settings) -> Path:
    """outputs/adapters/<run_id>."""
    return settings.path(f"outputs/adapters/{settings.run_id}")


def train(settings, contract, resume: bool = True) -> dict:
    """Train, save to outputs/adapters/<run_id> and record the run; returns its line of registry/runs.jsonl. A killed
    run goes on from its newest checkpoint when recipe, rows, contract and template are the same."""
    import_trainer(settings)
    rows = training_rows(settings)
    tokenizer = load_tokenizer(settings)
    stops = stop_ids(settings, tokenizer)
    examples = {name: encode(part, contract, tokenizer, stops, settings.train.max_seq_length) for name, part in rows.items()}
    preview(rows["train"], examples["train"], contract, tokenizer, stops)
    record = _facts(settings, contract, tokenizer)
    begin = time.perf_counter()
    try:
        metrics = _fit(settings, tokenizer, examples, record["recipe_hash"], resume)
    except BaseException as error:
        failed = {"status": "failed", "error": f"{type(error).__name__}: {error}"[:500]}
        if _first_process():
            registry.append(settings, "runs", {**record, **failed, "seconds": round(time.perf_counter() - begin, 1)})
        raise
    if not _first_process():
        return record
    seconds = round(time.perf_counter() - begin, 1)
    money = seconds / 3600 * settings.cost.gpu_hourly_rate
    cost.add(settings, "gpu_training_cost", money, hours=round(seconds / 3600, 5))
    files = [f for f in sorted(adapter_folder(settings).iterdir()) if f.is_file()]
    record |= {
        "status": "completed", "metrics": metrics, "seconds": seconds, "cost": round(money, 6),
        "artefacts": {str(f.relative_to(settings.root)): registry.file_hash(f)[:16] for f in files},
    }  # fmt: skip
    return registry.append(settings, "runs", record)


def _fit(settings, tokenizer, examples: dict[str, list[Example]], mark: str, resume: bool) -> dict:
    from datasets import Dataset
    from transformers import DataCollatorForSeq2Seq, EarlyStoppingCallback
    from trl import SFTConfig, SFTTrainer

    from slm.train.load import load

    set_tracker(settings)
    if settings.train.trainer == "trl":  # Unsloth brings its own
        patch_trl()
    out = adapter_folder(settings)
    checkpoints = out / "checkpoints"
    start = newest_checkpoint(checkpoints, mark) if resume else None
    if start is None and _first_process():
        shutil.rmtree(checkpoints, ignore_errors=True)
        write_json(checkpoints / "recipe.json", {"hash": mark})
    elif start is not None:
        print(f"resuming from {start.relative_to(settings.root)}")
    arguments = SFTConfig(**sft_arguments(settings, checkpoints, len(examples["train"])))
    rows, dev = (
        Dataset.from_dict({"input_ids": [e.input_ids for e in part], "labels": [e.labels for e in part]})
        for part in (examples["train"], sorted(examples["dev_internal"], key=lambda e: len(e.input_ids)))
    )
    stopping = [EarlyStoppingCallback(early_stopping_patience=PATIENCE)] if settings.train.early_stopping else []
    trainer = SFTTrainer(
        model=load(settings), args=arguments, train_dataset=rows, eval_dataset=dev, processing_class=tokenizer,
        # Pads to the longest row of the batch; packed rows need TRL's own collator.
        callbacks=stopping, data_collator=None if arguments.packing else DataCollatorForSeq2Seq(tokenizer),
    )
    begin = time.perf_counter()
    try:
        trainer.train(resume_from_checkpoint=str(start) if start else None)
        metrics = _metrics(trainer.state, time.perf_counter() - begin)
        save(settings, trainer, tokenizer)
    finally:
        if trainer.is_world_process_zero():
            write_log(trainer.state.log_history, out / "training_log.csv")
            plot_loss(trainer.state.log_history, out / "training_loss.png")
    if trainer.is_world_process_zero():
        shutil.rmtree(checkpoints, ignore_errors=True)
    return metrics


def newest_checkpoint(folder: Path, mark: str) -> Path | None:
    """The newest complete checkpoint of the same recipe, or None. `trainer_state.json` is what a checkpoint ends with."""
    marker = folder / "recipe.json"
    if not marker.is_file() or json.loads(marker.read_text(encoding="utf-8")).get("hash") != mark:
        if any(folder.glob("checkpoint-*")):
            print(f"{folder}: checkpoints of another recipe or other rows; starting afresh.")
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
    """First and last losses, and speed, from the trainer's log. Raises SlmError when a loss is not a finite number."""
    losses = [(e["step"], e["loss"]) for e in state.log_history if "loss" in e]
    dev = [(e["step"], e["eval_loss"]) for e in state.log_history if "eval_loss" in e]
    for step, value in (*losses, *dev):
        if not math.isfinite(value):
            raise SlmError(f"the loss is {value} at step {step}; lower train.learning_rate, or set train.precision fp32.")
    tokens = max((e["num_tokens"] for e in state.log_history if "num_tokens" in e), default=0)
    best = min(dev, key=lambda point: point[1])
    return {
        "steps": state.global_step, "epochs": round(state.epoch, 3), "loss_first": losses[0][1], "loss_final": losses[-1][1],
        "dev_loss_first": dev[0][1], "dev_loss_best": best[1], "dev_loss_final": dev[-1][1], "best_step": best[0],
        "tokens": int(tokens), "train_seconds": round(seconds, 1), "tokens_per_s": round(tokens / seconds, 1),
    }  # fmt: skip


def _facts(settings, contract, tokenizer) -> dict:
    """What a run record says before anything has run: parents, versions, seeds, device."""
    files = {name: registry.file_hash(split_of(settings, name))[:16] for name in ("train", "dev_internal")}
    known = [d for d in registry.read(settings, "datasets") if files.items() <= d.get("split", {}).get("files", {}).items()]
    if not known:
        print("WARNING: these rows are not a recorded dataset version; run 04_curate, or the release gate will not pass.")
    facts = {"rows": files, "contract": contract.schema_hash, "chat_template": hash_text(tokenizer.chat_template)}
    facts["base_hash"] = base_hash(settings)
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=settings.root, capture_output=True, text=True, check=False)
    return {
        "stage": "train", "run_id": settings.run_id, "profile": settings.profile, "settings": settings.hash,
        "method": settings.train.method, "trainer": settings.train.trainer, "recipe_hash": recipe_hash(settings, **facts),
        "parents": {"dataset": known[-1]["version"] if known else None, "base": settings.model.base, **facts},
        "commit": head.stdout.strip() or None, "packages": {name: _version(name) for name in PACKAGES},
        "seeds": {"train": settings.train.seed, "split": settings.curate.seed}, "device": in_force(settings)["device"],
        "recipe": settings.train.model_dump(),
    }  # fmt: skip


def _first_process() -> bool:
    """Whether this is the process that writes, under `accelerate launch` too."""
    return os.environ.get("RANK", "0") == "0"


def _version(package: str) -> str | None:
    with suppress(PackageNotFoundError):
        return version(package)
