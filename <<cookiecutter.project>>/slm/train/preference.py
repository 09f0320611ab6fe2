"""Direct preference optimization (Rafailov et al. 2023) from rows with a rejected answer, on top of a trained adapter."""

from pathlib import Path

from slm.errors import SlmError
from slm.models import base_folder
from slm.train.cpu import patch_trl
from slm.train.encode import load_tokenizer
from slm.train.recipe import in_force, shared_arguments


def pairs(rows, contract) -> list[dict]:
    """{"prompt": messages, "chosen": [answer], "rejected": [answer]} of each row that has a rejected answer. Raises
    SlmError when there is none, or when a pair's two answers are equal."""
    found = []
    for row in rows:
        if row.rejected is None:
            continue
        if row.rejected.strip() == row.answer.strip():
            raise SlmError(f"row {row.id}: chosen and rejected are the same answer; a pair must differ.")
        chosen, rejected = ([{"role": "assistant", "content": text}] for text in (row.answer, row.rejected))
        found.append({"prompt": contract.messages(row)[:-1], "chosen": chosen, "rejected": rejected})
    if not found:
        raise SlmError("no row has a rejected answer; make pairs from the failures of 06_evaluate first.")
    return found


def dpo_arguments(settings, out: Path) -> dict:
    """Keyword arguments of `trl.DPOConfig`; a twentieth of the SFT learning rate, as preference tuning asks for."""
    return shared_arguments(settings, out) | {
        "report_to": [], "beta": 0.1, "num_train_epochs": 1, "learning_rate": settings.train.learning_rate / 20,
        "dataloader_pin_memory": False, "logging_steps": 1, "save_strategy": "no",
    }  # fmt: skip


def train_dpo(settings, contract, rows, adapter: Path, out: Path) -> dict:
    """Go on training a LoRA adapter on preference pairs and save it to `out`; returns the last logged metrics. The
    reference is the adapter as it was: TRL keeps a frozen copy of it. Raises SlmError without pairs or adapter."""
    found = pairs(rows, contract)
    if not (Path(adapter) / "adapter_config.json").is_file():
        raise SlmError(f"{adapter}: no LoRA adapter there; run 05_train first (method lora or qlora).")
    import torch
    from datasets import Dataset
    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    from trl import DPOConfig, DPOTrainer

    patch_trl()
    tokenizer, force = load_tokenizer(settings), in_force(settings)
    dtype = torch.float32 if force["precision"] == "fp32" else torch.bfloat16
    base = AutoModelForCausalLM.from_pretrained(base_folder(settings), dtype=dtype, attn_implementation=force["attention"])
    trainer = DPOTrainer(
        model=PeftModel.from_pretrained(base, adapter, is_trainable=True), args=DPOConfig(**dpo_arguments(settings, out)),
        train_dataset=Dataset.from_list(found), processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
    trainer.model.save_pretrained(out, selected_adapters=["default"])
    tokenizer.save_pretrained(out)
    last = [e for e in trainer.state.log_history if "loss" in e][-1]
    return {"pairs": len(found), **{k: last[k] for k in ("loss", "rewards/margins", "rewards/accuracies") if k in last}}
