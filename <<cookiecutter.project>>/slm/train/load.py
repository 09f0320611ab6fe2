"""The student, ready to train: transformers with PEFT, or Unsloth. The two functions do the same in the same order."""

from slm.errors import SlmError
from slm.models import base_folder
from slm.train.recipe import in_force, lora_arguments


def load(settings):
    """The trainable model of the chosen trainer."""
    return (load_unsloth if settings.train.trainer == "unsloth" else load_trl)(settings)


def load_trl(settings):
    """The base through transformers, 4-bit (nf4) for qlora, with LoRA from PEFT unless the method is full."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    force, full = in_force(settings), settings.train.method == "full"
    dtype = torch.float32 if full or force["precision"] == "fp32" else torch.bfloat16
    options = {"dtype": dtype, "attn_implementation": force["attention"]}
    if force["load_in_4bit"]:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
    torch.manual_seed(settings.train.seed)
    model = AutoModelForCausalLM.from_pretrained(base_folder(settings), **options)
    keep_trainable(model)
    model.config.use_cache = False
    return model if full else get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **lora_arguments(settings)))


def load_unsloth(settings):
    """The base through Unsloth, 4-bit for qlora, with its LoRA unless the method is full."""
    try:
        from unsloth import FastLanguageModel
    except (ImportError, NotImplementedError) as error:
        raise SlmError(f"train.trainer unsloth: it does not start ({error}); install the extra `unsloth`, or set trl.") from None
    import torch

    force, full = in_force(settings), settings.train.method == "full"
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[force["precision"]]
    checkpointing = "unsloth" if settings.train.gradient_checkpointing else False
    options = {"attn_implementation": force["attention"]} if force["device"].startswith("cpu") else {}
    torch.manual_seed(settings.train.seed)
    model, _ = FastLanguageModel.from_pretrained(
        model_name=str(base_folder(settings)), max_seq_length=settings.train.max_seq_length, load_in_4bit=force["load_in_4bit"],
        dtype=torch.float32 if full else dtype, full_finetuning=full, use_gradient_checkpointing=checkpointing, **options,
    )  # fmt: skip
    if full:
        return model
    return FastLanguageModel.get_peft_model(
        model, random_state=settings.train.seed, use_gradient_checkpointing=checkpointing, **lora_arguments(settings)
    )


def keep_trainable(model) -> None:
    """bitsandbytes repacks 4-bit weights on a CPU's first look without gradients; the backward pass is then wrong."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
