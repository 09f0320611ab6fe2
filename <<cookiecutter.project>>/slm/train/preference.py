"""After SFT: DPO (Rafailov et al. 2023), ORPO (Hong et al. 2024) or GRPO (Shao et al. 2024) on what the adapter gets
wrong, kept only where a paired test on dev shows that it is better."""

import os
import shutil
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from slm import cost, registry
from slm.contract import Contract
from slm.errors import SlmError
from slm.evaluate import Comparison, compare_results, evaluate, take
from slm.evaluate.candidate import NAME
from slm.evaluate.scorers import answer_rows
from slm.models import base_folder, cached, student
from slm.repair.plan import same_failures
from slm.rows import Row, read_rows
from slm.train.callbacks import general_loss, track
from slm.train.cpu import patch_trl
from slm.train.encode import load_tokenizer
from slm.train.recipe import in_force, shared_arguments
from slm.train.reward import rewards
from slm.train.sft import adapter_folder, training_rows

FREE = ("rewriting", "qa")  # their answers may be worded otherwise and be right


def failures(settings, contract: Contract, model) -> list[Row]:
    """The rows of dev_internal and train that `model` answers wrongly, its answer as `rejected`; with `repair.plan`
    those that fail as its clusters do. Raises SlmError when one of them is, or repeats, a row of an evaluation set."""
    parts = training_rows(settings)
    rows = [*parts["dev_internal"], *parts["train"]][: settings.preference.limit or None]
    refuse_locked(settings, rows)
    scores = answer_rows(cached(model, settings), rows, contract, settings.evaluate.max_new_tokens)
    right = {s.row_id for s in scores if (s.value == 1 if contract.task_type in FREE else s.exact) or s.finish_reason == "error"}
    wrong = [(row, s) for row, s in zip(rows, scores, strict=True) if row.id not in right]
    wrong = [(row.model_copy(update={"rejected": s.text}), s) for row, s in wrong]
    return same_failures(settings, contract, wrong) if settings.repair.plan else [row for row, _ in wrong]


def refuse_locked(settings, rows: Sequence[Row]) -> None:
    """Raise SlmError, naming both rows, when one repeats the text of an evaluation row as 04 judges it; the same id or
    the very text `training_rows` has refused."""
    from slm.curate.leakage import evaluation_rows, index_of, overlaps
    from slm.curate.text import sketch, text_of, words

    known = index_of(evaluation_rows(settings))
    hits = overlaps(sketch([words(text_of(row)) for row in rows]), known, settings.curate.leakage)
    for row, hit in zip(rows, hits, strict=True):
        if hit:
            said = known.verdict(hit).reason
            raise SlmError(f"row {row.id} is {said}; nothing is trained on evaluation rows. Run 04_curate again.")


def pairs(rows: Sequence[Row], contract: Contract) -> list[dict]:
    """{"prompt": messages, "chosen": [answer], "rejected": [answer], "row": its number} of each row that has a rejected
    answer. Raises SlmError when there is none, or when a pair's two answers are equal."""
    found = []
    for n, row in enumerate(rows):
        if row.rejected is None:
            continue
        if row.rejected.strip() == row.answer.strip():
            raise SlmError(f"row {row.id}: chosen and rejected are the same answer; a pair must differ.")
        chosen, rejected = ([{"role": "assistant", "content": text}] for text in (row.answer, row.rejected))
        found.append({"prompt": contract.messages(row)[:-1], "chosen": chosen, "rejected": rejected, "row": n})
    if not found:
        raise SlmError('no row has a rejected answer: the model fails on none. Set preference.method "".')
    return found


def arguments(settings, out: Path) -> dict:
    """Keyword arguments of TRL's `DPOConfig`, `ORPOConfig` or `GRPOConfig`; by default a twentieth of the SFT learning
    rate, as preference tuning asks for."""
    own, recipe = settings.preference, settings.train
    found = shared_arguments(settings, out) | {
        "beta": own.beta, "num_train_epochs": own.epochs, "max_steps": own.max_steps,
        "learning_rate": own.learning_rate or recipe.learning_rate / 20,
        "dataloader_pin_memory": False, "logging_steps": 1, "save_strategy": "no",
    }  # fmt: skip
    if own.method == "grpo":
        del found["max_length"]  # what it trains on it writes itself
        found |= {
            "num_generations": own.generations, "max_completion_length": settings.evaluate.max_new_tokens,
            "temperature": own.temperature,  # whole groups of answers in a batch:
            "per_device_train_batch_size": -(-recipe.batch_size_per_device // own.generations) * own.generations,
        }  # fmt: skip
    return found


def fit(settings, contract: Contract, rows: Sequence[Row], adapter: Path, out: Path, also=()) -> dict:
    """Go on training a LoRA adapter on rows with a rejected answer and save it to `out`; returns the last logged
    metrics; `also` are callbacks. DPO and GRPO hold to the adapter as it was, of which TRL keeps a frozen copy. Raises SlmError without pairs
    or adapter."""
    found, method = pairs(rows, contract), settings.preference.method
    if not (Path(adapter) / "adapter_config.json").is_file():
        raise SlmError(f"{adapter}: no LoRA adapter there; run 05_train first (method lora or qlora).")
    import torch
    from datasets import Dataset
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    patch_trl()
    tokenizer, force = load_tokenizer(settings), in_force(settings)
    dtype = torch.float32 if force["precision"] == "fp32" else torch.bfloat16
    torch.manual_seed(settings.train.seed)
    base = AutoModelForCausalLM.from_pretrained(base_folder(settings), dtype=dtype, attn_implementation=force["attention"])
    how, more = arguments(settings, out), {}
    if method == "grpo":
        from trl import GRPOConfig as Config
        from trl import GRPOTrainer as Trainer

        worth = rewards(contract, rows, settings.preference.rewards)
        how["reward_weights"], more["reward_funcs"] = list(worth.values()), list(worth)
        found = [{"prompt": pair["prompt"], "row": pair["row"]} for pair in found]
    elif method == "orpo":
        os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
        from trl.experimental.orpo import ORPOConfig as Config
        from trl.experimental.orpo import ORPOTrainer as Trainer
    else:
        from trl import DPOConfig as Config
        from trl import DPOTrainer as Trainer
    trainer = Trainer(
        model=PeftModel.from_pretrained(base, adapter, is_trainable=True), args=Config(**how),
        train_dataset=Dataset.from_list(found), processing_class=tokenizer, callbacks=[*also], **more,
    )  # fmt: skip
    trainer.train()
    trainer.model.save_pretrained(out, selected_adapters=["default"])
    tokenizer.save_pretrained(out)
    last = [e for e in trainer.state.log_history if "loss" in e][-1]
    shown = {k: last[k] for k in sorted(last) if k in ("loss", "reward") or k.startswith("rewards/") and not k.endswith("/std")}
    general = general_loss(trainer.model, tokenizer)
    return {"pairs": len(found), "steps": trainer.state.global_step, "general_loss_final": general, **shown}


def tune(settings, contract: Contract) -> dict:
    """Preference tuning of the run's adapter by `preference.method`; returns the run's new line of registry/runs.jsonl.
    Its field `preference` says "kept" (outputs/adapters/<run_id> is the tuned one, <run_id>-sft the one before) or
    "discarded", with the figures of both on dev. One that fails is closed as failed and leaves the adapter as it was.
    Where Unsloth has patched TRL and transformers, a process of its own does all this without it."""
    if "unsloth" in sys.modules:
        with ProcessPoolExecutor(1, get_context("spawn")) as fresh:
            return fresh.submit(tune, settings, contract).result()
    own, adapter, begin = settings.preference, adapter_folder(settings), time.perf_counter()
    trained = registry.latest(settings, "runs", stage="train", status="completed", run_id=settings.run_id)
    if not own.method or trained is None:
        raise SlmError("preference.method: choose dpo, orpo or grpo, and train first (05_train).")
    out, before = (adapter.with_name(f"{adapter.name}-{name}") for name in (own.method, "sft"))
    found = {"stage": "preference", "run_id": settings.run_id, "method": own.method, "settings": settings.hash,
             "parents": {"train": trained["hash"], **trained["parents"]}, "recipe": own.model_dump()}  # fmt: skip
    try:
        rows = failures(settings, contract, student(settings, adapter))
        with track(settings, found, out.name) as tracking:
            metrics = fit(settings, contract, rows, adapter, out, tracking)
        compared = on_dev(settings, contract, adapter, out)
    except BaseException as error:
        shutil.rmtree(out, ignore_errors=True)
        registry.append(settings, "runs", {**found, "status": "failed", "error": f"{type(error).__name__}: {error}"[:500]})
        raise
    kept, seconds = compared.outcome == "better", round(time.perf_counter() - begin, 1)
    money = cost.add_hours(settings, "gpu_training_cost", seconds / 3600, device=trained.get("device", ""))["money"]
    facts = {
        "method": own.method, "status": "kept" if kept else "discarded", "seconds": seconds, "metrics": metrics,
        "before": compared.baseline, "after": compared.candidate, "difference": compared.difference.model_dump(),
        "outcome": compared.outcome, "mcnemar_p": compared.mcnemar_p, "settings": own.model_dump(),
    }  # fmt: skip
    gain = compared.difference
    facts["verdict"] = (
        f"{own.method.upper()} {facts['status']}, against SFT alone {compared.outcome}: {compared.baseline:.3f} -> "
        f"{compared.candidate:.3f} on dev, {gain.value:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}] over {gain.n} rows; "
        f"trained on {metrics['pairs']} failures of train and dev_internal."
    )
    record = {**trained, "preference": facts, "seconds": trained["seconds"] + seconds, "cost": round(trained["cost"] + money, 6)}
    if kept:
        for file in [f for f in adapter.iterdir() if f.is_file() and not (out / f.name).exists()]:
            shutil.copyfile(file, out / file.name)  # the log and the curve of SFT
        shutil.rmtree(before, ignore_errors=True)
        adapter.rename(before)
        out.rename(adapter)
        files = [f for f in sorted(adapter.iterdir()) if f.is_file()]
        record["artefacts"] = {str(f.relative_to(settings.root)): registry.file_hash(f)[:16] for f in files}
        record["recipe"] = {**trained["recipe"], "preference": own.model_dump()}
        record["metrics"] = trained["metrics"] | {k: v for k, v in metrics.items() if k == "general_loss_final"}
    else:
        shutil.rmtree(out, ignore_errors=True)
    return registry.append(settings, "runs", record)


def on_dev(settings, contract: Contract, adapter: Path, tuned: Path) -> Comparison:
    """The tuned adapter against the one it came from, paired on the locked dev set."""
    registry.check_locked(settings)
    dev = take(settings, read_rows(settings.path("data/eval/dev.jsonl")))
    old, new = (evaluate(settings, contract, student(settings, f), dev, set="dev", name=NAME) for f in (adapter, tuned))
    return compare_results(new, old, contract, settings)
