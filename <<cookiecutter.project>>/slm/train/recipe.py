"""The recipe: the names of train_config.yaml translated into the trainers' own, and what the machine allows of it."""

import importlib.util
import json
import math
import os
import re
import shutil
from pathlib import Path

from slm import registry
from slm.errors import SlmError
from slm.models import base_folder
from slm.models.hf import compute_dtype
from slm.rows import digest
from slm.train.callbacks import set_tracker

PATIENCE = 3  # evaluations without a better dev loss before early stopping
CPU_FLOPS, GPU_FLOPS = 1.2e11, 1.0e14  # rough, per core and per card, for an estimate before the first measured run


def processes() -> int:
    """How many processes train together; one, unless `accelerate launch` started more."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def import_trainer(settings) -> None:
    """Import Unsloth where it is chosen: it patches transformers, TRL and PEFT, so it must come before them. Even before
    that, the tracker's environment: Trackio reads it when TRL imports it."""
    set_tracker(settings)
    if settings.train.trainer == "unsloth":
        try:
            import unsloth  # noqa: F401
        except (ImportError, NotImplementedError) as error:
            raise SlmError(f"train.trainer unsloth: it does not start ({error}); install the extra `unsloth`, or set trl.") from None


def in_force(settings) -> dict:
    """What of the recipe holds on this machine: device, precision, attention, packing, optimizer, 4-bit base. Packing
    needs flash attention, or samples would read each other; paged and 8-bit optimizers need a GPU. Raises SlmError
    when method and load_in_4bit contradict each other."""
    import torch

    recipe, gpu = settings.train, torch.cuda.is_available()
    if recipe.method == "qlora" and not recipe.load_in_4bit:
        raise SlmError("train.method qlora with load_in_4bit false: set load_in_4bit true, or method lora.")
    flash = gpu and recipe.trainer == "trl" and importlib.util.find_spec("flash_attn") is not None
    precision = recipe.precision
    if precision == "bf16" and gpu and recipe.trainer == "unsloth" and not torch.cuda.is_bf16_supported(False):
        precision = "fp16"  # older cards; Unsloth handles it, TRL runs bf16 emulated
    if precision == "bf16" and compute_dtype() == torch.float32:
        precision = "fp32"  # this CPU only emulates bf16
    gpu_only = any(word in recipe.optimizer for word in ("8bit", "paged"))
    device = torch.cuda.get_device_name() if gpu else f"cpu, {torch.get_num_threads()} threads"
    return {
        "device": device if processes() == 1 else f"{device}, {processes()} processes",
        "precision": precision,
        "load_in_4bit": recipe.method == "qlora",
        "packing": recipe.packing and flash,
        # Rows of a few hundred tokens: plain attention beats the CPU's flash kernel, whose backward is slow.
        "attention": "flash_attention_2" if recipe.packing and flash else "sdpa" if gpu else "eager",
        "optimizer": "adamw_torch" if gpu_only and not gpu else recipe.optimizer,
    }


def sft_arguments(settings, out: Path, rows: int) -> dict:
    """Keyword arguments of `trl.SFTConfig` for `rows` training rows, writing to `out`. Both trainers take them.
    Raises SlmError when checkpoints would not fall on evaluations, which the best checkpoint needs."""
    recipe, force = settings.train, in_force(settings)
    if recipe.early_stopping and recipe.save_steps % recipe.eval_steps:
        raise SlmError(f"train.save_steps {recipe.save_steps}: make it a multiple of eval_steps {recipe.eval_steps}.")
    steps = total_steps(settings, rows)
    return shared_arguments(settings, out) | {
        # rows
        "packing": force["packing"],
        "dataset_kwargs": {"skip_prepare_dataset": not force["packing"]},  # our tokens, as they are
        "train_sampling_strategy": "group_by_length" if recipe.group_by_length and not force["packing"] else "random",
        "per_device_eval_batch_size": recipe.batch_size_per_device, "data_seed": recipe.seed,
        # steps
        "num_train_epochs": recipe.epochs, "learning_rate": recipe.learning_rate, "weight_decay": recipe.weight_decay,
        "dataloader_pin_memory": not force["device"].startswith("cpu"),
        # looks and checkpoints
        "logging_steps": max(1, min(10, steps // 20)), "logging_first_step": True,
        "eval_strategy": "steps", "eval_on_start": True, "eval_steps": recipe.eval_steps,
        "save_strategy": "steps", "save_steps": recipe.save_steps, "save_total_limit": 2,
        "load_best_model_at_end": recipe.early_stopping, "metric_for_best_model": f"eval_{recipe.early_stopping_metric}",
        "greater_is_better": recipe.early_stopping_metric == "task", "logging_nan_inf_filter": False,
    }  # fmt: skip


def shared_arguments(settings, out: Path) -> dict:
    """The keyword arguments that `SFTConfig` and `DPOConfig` have in common."""
    recipe, force = settings.train, in_force(settings)
    return {
        "output_dir": str(out), "report_to": [], "max_length": recipe.max_seq_length, "max_steps": recipe.max_steps,
        "per_device_train_batch_size": recipe.batch_size_per_device,
        "gradient_accumulation_steps": recipe.gradient_accumulation_steps,
        "lr_scheduler_type": recipe.lr_scheduler, "warmup_steps": recipe.warmup_ratio,  # below 1: a share of all steps
        "optim": force["optimizer"], "seed": recipe.seed, "use_cpu": force["device"].startswith("cpu"),
        "bf16": force["precision"] == "bf16", "fp16": force["precision"] == "fp16",
        "gradient_checkpointing": recipe.gradient_checkpointing,
    }  # fmt: skip


def lora_arguments(settings) -> dict:
    """Keyword arguments of `peft.LoraConfig` and of Unsloth's `get_peft_model`. Layers below the lowest adapter need no
    backward pass."""
    from transformers import AutoConfig

    recipe, layers = settings.train, None
    if recipe.lora_layers:
        depth = AutoConfig.from_pretrained(base_folder(settings)).get_text_config().num_hidden_layers
        layers = list(range(max(0, depth - recipe.lora_layers), depth))
    return {
        "r": recipe.lora_rank, "lora_alpha": recipe.lora_alpha, "lora_dropout": recipe.lora_dropout,
        "target_modules": recipe.target_modules, "layers_to_transform": layers, "bias": "none",
    }  # fmt: skip


def total_steps(settings, rows: int) -> int:
    """Optimizer steps for `rows` rows, the way the trainer counts them: each process takes its share of the batches."""
    recipe = settings.train
    if recipe.max_steps > 0:
        return recipe.max_steps
    batches = math.ceil(math.ceil(rows / recipe.batch_size_per_device) / processes())
    return math.ceil(recipe.epochs * max(1, math.ceil(batches / recipe.gradient_accumulation_steps)))


def estimate(settings, examples: list) -> dict:
    """Steps, tokens and rough minutes of a run over encoded rows. The speed is that of the last completed run on this
    base and device, else 6 x parameters x tokens floating point operations (Kaplan et al. 2020) at a rough rate for
    the device."""
    recipe, force = settings.train, in_force(settings)
    steps = total_steps(settings, len(examples))
    per_step = recipe.batch_size_per_device * recipe.gradient_accumulation_steps * processes()
    seen = steps * per_step if recipe.max_steps > 0 else min(steps * per_step, math.ceil(recipe.epochs * len(examples)))
    length = sum(len(e.input_ids) for e in examples)
    tokens = round(seen * length / len(examples))
    last = registry.latest(settings, "runs", stage="train", status="completed", device=force["device"], trainer=recipe.trainer)
    if last and last["parents"]["base"] == settings.model.base:
        speed, source = last["metrics"]["tokens_per_s"], f"as in run {last['run_id']}"
    else:
        source, cpu = "rough, no earlier run here", re.match(r"cpu, (\d+)", force["device"])
        parameters = sum(f.stat().st_size for f in base_folder(settings).glob("*.safetensors")) / 2
        speed = (CPU_FLOPS * int(cpu[1]) if cpu else GPU_FLOPS) * processes() / (6 * parameters)
    trained = sum(sum(label != -100 for label in e.labels) for e in examples)
    return {
        "rows": len(examples), "steps": steps, "rows per step": per_step, "tokens": tokens,
        "share trained on": round(trained / length, 3), "longest row": max(len(e.input_ids) for e in examples),
        "minutes": round(tokens / speed / 60, 1), "speed": f"{speed:.0f} tokens/s ({source})",
        "memory": f"about {sum(memory(settings, examples).values()) / 1e9:.1f} GB of {free_memory() / 1e9:.1f} GB free",
    }  # fmt: skip


def memory(settings, examples: list, batch: int = 0) -> dict[str, float]:
    """Rough bytes of a run whose batches hold the longest row: weights, adapters, gradients, optimizer, activations,
    logits, and on a CPU a third more, which allocator and kernels were measured to hold. What a layer keeps for the
    backward pass is counted in the way of Korthikanti et al. (2022) on the Llama family as torch keeps it: in 16 bit
    s x (26 h + 8 f) bytes a row (f: width of the feed-forward), 6 a s^2 more where attention is not fused, 4 bytes per
    input of an adapted matrix where these are dropped out, and its input alone under gradient checkpointing; a 4-bit
    weight is 4.13 bits (Dettmers et al. 2023). Raises SlmError for a row longer than the base model's context."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    recipe, force, full = settings.train, in_force(settings), settings.train.method == "full"
    config = AutoConfig.from_pretrained(base_folder(settings)).get_text_config()
    s, h, depth = max(len(e.input_ids) for e in examples), config.hidden_size, config.num_hidden_layers
    if s > config.max_position_embeddings:
        mend = "shorten it in 04_curate, or choose another model.base"
        raise SlmError(f"a row has {s} tokens, {settings.model.base} reads {config.max_position_embeddings}; {mend}.")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        total = trained = sum(p.numel() for p in model.parameters())
        if not full:
            trained, _ = get_peft_model(model, LoraConfig(**lora_arguments(settings))).get_nb_trainable_parameters()
    wide, batch = 4 if full or force["precision"] == "fp32" else 2, batch or recipe.batch_size_per_device
    packed = (total - config.vocab_size * h) * (wide - 4.13 / 8) if force["load_in_4bit"] else 0
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":  # each process holds a share
        total, trained, packed = (size / processes() for size in (total, trained, packed))
    f, half = config.intermediate_size, force["precision"] != "fp32"
    layer = s * (26 * h + 8 * f) * (1 if half else 1.6)
    layer += s * s * config.num_attention_heads * (6 if half else 4) * (force["attention"] == "eager")
    layer += s * 4 * (6 * h + f) * (not full and recipe.lora_dropout > 0)
    upper = min(recipe.lora_layers or depth, depth)
    kept = layer + upper * 2 * s * h if recipe.gradient_checkpointing else upper * layer
    answer = max(sum(label != -100 for label in e.labels) for e in examples)
    need = {
        "weights": total * wide - packed, "adapters": 0 if full else 4 * trained, "gradients": 4 * trained,
        "optimizer": trained * (2 if "8bit" in force["optimizer"] else 8),
        "activations": batch * kept + 2 * total * (full and half), "logits": batch * answer * config.vocab_size * 16,
    }  # fmt: skip
    return need | {"overhead": sum(need.values()) / 3 * force["device"].startswith("cpu")}


def free_memory() -> float:
    """Bytes that are free to this process: on its GPU, or without one its share of this machine's, and no more than the
    container may take."""
    import psutil
    import torch

    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    limit = Path("/sys/fs/cgroup/memory.max")
    most = limit.read_text().strip() if limit.is_file() else "max"
    return min(psutil.virtual_memory().available, float("inf" if most == "max" else most)) / processes()


def check_room(settings, examples: list, out: Path) -> None:
    """Raises SlmError when not even one row at a time fits into memory, or no checkpoint onto the disk of `out`."""
    need, free = memory(settings, examples, batch=1), free_memory()
    if sum(need.values()) > free:
        parts = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in need.items())
        mend = "a smaller model.base, train.method qlora, gradient_checkpointing true, a lower lora_rank or shorter rows"
        raise SlmError(f"training needs about {sum(need.values()) / 1e9:.1f} GB ({parts}), {free / 1e9:.1f} GB are free: {mend}.")
    out.mkdir(parents=True, exist_ok=True)
    need = 3 * (need["adapters"] or need["weights"]) + 3 * need["optimizer"]  # two are kept while one is written
    if need > (free := shutil.disk_usage(out).free):
        raise SlmError(f"{out}: checkpoints need {need / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; make room on this disk.")


def halved(settings):
    """The same recipe with half the rows at once, or the next fewer that divide them, and as many rows per step."""
    recipe, rows = settings.train, settings.train.batch_size_per_device
    batch = next(n for n in range(rows // 2, 0, -1) if rows % n == 0)
    smaller = {"batch_size_per_device": batch, "gradient_accumulation_steps": recipe.gradient_accumulation_steps * rows // batch}
    return settings.model_copy(update={"train": recipe.model_copy(update=smaller)})


def recipe_hash(settings, **facts) -> str:
    """12 hex digits of everything that shapes the weights: the recipe, the base, and `facts` (data, contract, template)."""
    body = {"train": settings.train.model_dump(), "base": settings.model.base, "revision": settings.model.revision, **facts}
    return digest(json.dumps(body, sort_keys=True))
