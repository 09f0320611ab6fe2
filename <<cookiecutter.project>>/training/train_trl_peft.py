"""LoRA or QLoRA with TRL and PEFT: python training/train_trl_peft.py --profile cpu. The twin of train_unsloth.py."""

import os
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def load_model(settings):
    """The base in 16 bit, or in 4 (nf4) for qlora, with LoRA adapters on it unless the method is full."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from slm.models import base_folder
    from slm.train import in_force, lora_arguments

    force, full = in_force(settings), settings.train.method == "full"
    dtype = torch.float32 if full or force["precision"] == "fp32" else torch.bfloat16
    options = {"dtype": dtype, "attn_implementation": force["attention"]}
    if force["load_in_4bit"]:
        # FSDP shares out tensors of floating point only, so there the packed weights must look like one.
        storage = dtype if os.environ.get("ACCELERATE_USE_FSDP") == "true" else torch.uint8
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype, bnb_4bit_quant_storage=storage,
        )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(base_folder(settings), **options)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # bitsandbytes on a CPU: the first look without gradients would
            module.support_avx512bf16_for_cpu = False  # repack the 4-bit weights, and no backward pass be right again
    model.config.use_cache = False
    torch.manual_seed(settings.train.seed)
    return model if full else get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **lora_arguments(settings)))


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
        overrides = dict(parse_override(item) for item in s or []) | {"train.trainer": "trl"}
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
