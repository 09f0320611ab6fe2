"""LoRA or QLoRA with Unsloth: python training/train_unsloth.py --profile gpu. The twin of train_trl_peft.py."""

import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def load_model(settings):
    """The base in 16 bit, or in 4 (nf4) for qlora, with LoRA adapters on it unless the method is full."""
    from unsloth import FastLanguageModel  # isort: skip  (it patches what comes after)
    import torch

    from slm.models import base_folder
    from slm.train import in_force, lora_arguments

    force, full = in_force(settings), settings.train.method == "full"
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}["fp32" if full else force["precision"]]
    options = {"dtype": dtype, "load_in_4bit": force["load_in_4bit"], "full_finetuning": full}
    if force["device"].startswith("cpu"):
        options["attn_implementation"] = force["attention"]  # on a GPU it takes its own, and would swallow the word
    checkpointing = "unsloth" if settings.train.gradient_checkpointing else False
    model, _ = FastLanguageModel.from_pretrained(
        model_name=str(base_folder(settings)), max_seq_length=settings.train.max_seq_length,
        use_gradient_checkpointing=checkpointing, **options,
    )  # fmt: skip
    return model if full else FastLanguageModel.get_peft_model(
        model, random_state=settings.train.seed, use_gradient_checkpointing=checkpointing, **lora_arguments(settings)
    )


def make_trainer(model, arguments, tokenizer, train, dev, callbacks):
    """TRL's trainer over rows that are tokens already, with labels on the answer alone."""
    from transformers import DataCollatorForSeq2Seq
    from trl import SFTTrainer

    # The collator pads to the longest row of a batch; packed rows need TRL's own.
    collator = None if arguments.packing else DataCollatorForSeq2Seq(tokenizer)
    return SFTTrainer(
        model=model, args=arguments, train_dataset=train, eval_dataset=dev, processing_class=tokenizer,
        data_collator=collator, callbacks=callbacks,
    )  # fmt: skip


def main(
    config: str = typer.Option("training/configs/train_config.yaml", help="The recipe."),
    profile: str = typer.Option("default", help="A profile of project.yaml: default, smoke, cpu, gpu."),
    run_id: str = typer.Option("dev", help="Names outputs/adapters/<run_id>."),
    s: Annotated[list[str] | None, typer.Option("-s", help="A setting for this run, key=value; repeatable.")] = None,
    resume: bool = typer.Option(True, help="Go on from the newest checkpoint of the same recipe and rows."),
):
    """Train on data/accepted/train.jsonl and leave the adapter with its record."""
    from slm import train
    from slm.errors import SlmError
    from slm.settings import load_settings, parse_override
    from task.contract import contract

    signal.signal(signal.SIGTERM, lambda *_: sys.exit("error: stopped from outside (SIGTERM)."))  # the record is closed
    try:
        overrides = dict(parse_override(item) for item in s or []) | {"train.trainer": "unsloth"}
        settings = load_settings(profile=profile, overrides=overrides, run_id=run_id, start=Path(__file__).parent, recipe=config)
        record = train.train(settings, contract, resume)  # rows, checks, the two functions above, adapter, record
    except SlmError as error:
        sys.exit(f"error: {error}")
    if "metrics" not in record:
        return  # under accelerate launch the first process speaks
    metrics = record["metrics"]
    print(f"outputs/adapters/{run_id}: {metrics['steps']} steps, {metrics['tokens_per_s']} tokens/s, {record['seconds']} s")
    print(f"loss on dev_internal {metrics['dev_loss_first']:.3f} -> {metrics['dev_loss_best']:.3f}; next: 06_evaluate")


if __name__ == "__main__":
    typer.run(main)
