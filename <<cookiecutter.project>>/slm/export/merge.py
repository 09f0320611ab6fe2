"""The adapter merged into the 16-bit base with PEFT, and the check that what ends an answer is still the same."""

import json
import shutil
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

from slm.errors import SlmError
from slm.export.files import require_space, weight_bytes, whole
from slm.models import base_folder
from slm.train.encode import DATE, generation_ends, render

SENTINEL = "Zq7xAnswerZq7x"


@dataclass(frozen=True)
class Ends:
    """What ends an answer, as token ids: the tokenizer's, the generation config's, and the template's after an answer."""

    eos: int | None
    generation: tuple[int, ...]
    turn: int | None


def adapter_folder(settings) -> Path:
    """outputs/adapters/<run_id>. Raises SlmError when nothing was trained under this run id."""
    folder = settings.path(f"outputs/adapters/{settings.run_id}")
    if not any((folder / name).is_file() for name in ("adapter_config.json", "config.json")):
        raise SlmError(f"{folder}: neither adapter_config.json nor config.json in it; run 05_train first.")
    return folder


def merge(settings) -> Path:
    """Merge the run's adapter into the base in bfloat16; returns outputs/merged/<run_id> (safetensors and tokenizer).
    Raises SlmError for a 4-bit base, an adapter of another model, an end token that changed, or too little disk
    space."""
    target = settings.path(f"outputs/merged/{settings.run_id}")
    merge_folders(base_folder(settings), adapter_folder(settings), target)
    return target


def merge_folders(base: Path, adapter: Path, target: Path) -> Path:
    """Merge `adapter` into `base` and write the result to `target`, all or nothing."""
    import torch
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = json.loads((Path(base) / "config.json").read_text(encoding="utf-8"))
    if "quantization_config" in config:
        raise SlmError(f"{base}: a quantized base; a merge into it differs from what was trained. Set model.base to 16-bit weights.")
    require_space(target.parent, int(weight_bytes(base) * 1.05), "the merged model")
    is_adapter = (adapter / "adapter_config.json").is_file()
    tokenizer = AutoTokenizer.from_pretrained(adapter if (adapter / "tokenizer_config.json").is_file() else base)
    model = AutoModelForCausalLM.from_pretrained(base if is_adapter else adapter, dtype=torch.bfloat16)
    if is_adapter:
        try:
            model = PeftModel.from_pretrained(model, str(adapter))
            # Added up in float32 layer by layer, rounded once, as the evaluated model was: its weights are these to the bit.
            for layer in model.modules():
                if isinstance(layer, BaseTunerLayer):
                    layer.float().merge(safe_merge=True)
                    layer.bfloat16()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that they are merged already
                model = model.merge_and_unload()
        except (RuntimeError, ValueError) as error:
            why = str(error).strip().splitlines()[0]
            raise SlmError(f"{adapter}: does not fit the base model ({why}); merge into the base it was trained on.") from None
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        raise SlmError(f"{adapter}: its tokenizer has {len(tokenizer)} tokens, the model fewer; it belongs to another base.")
    pin_template(tokenizer)
    with whole(target) as work:
        model.save_pretrained(work, max_shard_size="4GB")
        tokenizer.save_pretrained(work)
        complete_tokenizer(tokenizer, Path(base), work)
        check_ends(Path(base), work)
    return target


def pin_template(tokenizer) -> None:
    """Fix what a template asks of its caller as in training, thinking off and the date: a runtime that renders it has
    no such switch, and would write today's."""
    for name, value in (("enable_thinking", "false"), ("date_string", f'"{DATE}"')):
        if name in tokenizer.chat_template:
            tokenizer.chat_template = f"{{%- set {name} = {value} -%}}\n" + tokenizer.chat_template


def complete_tokenizer(tokenizer, base: Path, folder: Path) -> None:
    """Write what the GGUF converter reads and transformers 5 no longer saves: special-token types, tokenizer.model."""
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    names = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    added = sorted(tokenizer.added_tokens_decoder.items())
    config["added_tokens_decoder"] = {str(n): {name: getattr(token, name) for name in names} for n, token in added}
    # Left open, llama.cpp decides by the kind of vocabulary.
    config["add_bos_token"] = adds_bos(tokenizer)
    config["add_prefix_space"] = tokenizer.tokenize(f"{tokenizer.eos_token}x")[1].startswith("▁")
    file.write_text(json.dumps(config, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    if (base / "tokenizer.model").is_file() and not (folder / "tokenizer.model").exists():
        shutil.copy(base / "tokenizer.model", folder)


def adds_bos(tokenizer) -> bool:
    """Whether the tokenizer puts a BOS in front of plain text by itself, as every runtime then does."""
    return tokenizer.bos_token_id is not None and tokenizer("x")["input_ids"][:1] == [tokenizer.bos_token_id]


def read_ends(folder: Path) -> Ends:
    """The end tokens of a checkpoint folder."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    return Ends(tokenizer.eos_token_id, tuple(sorted(generation_ends(folder))), turn_end(tokenizer))


def turn_end(tokenizer) -> int | None:
    """The first special token that the chat template puts after an answer; None when there is none."""
    text = render(tokenizer, [{"role": "user", "content": "x"}, {"role": "assistant", "content": SENTINEL}])
    tail = tokenizer(text.rpartition(SENTINEL)[2], add_special_tokens=False)["input_ids"]
    special = {n for n, token in tokenizer.added_tokens_decoder.items() if token.special} | set(tokenizer.all_special_ids)
    return next((token for token in tail if token in special), None)


def check_ends(base: Path, merged: Path) -> None:
    """Raises SlmError when the merged model's end tokens differ from the base's or leave the chat's turns open."""
    before, after = read_ends(base), read_ends(merged)
    if before != after:
        raise SlmError(
            f"{merged}: the end tokens changed in the merge, from {_show(before)} to {_show(after)}; "
            "answers would not stop. Train again with the base's own tokenizer."
        )
    if after.turn is None or after.turn not in {after.eos, *after.generation}:
        raise SlmError(
            f"{merged}: the chat template ends an answer with token {after.turn}, which neither the tokenizer nor the "
            f"generation config takes for an end ({_show(after)}); generation would never stop."
        )


def _show(ends: Ends) -> str:
    return ", ".join(f"{name} {value}" for name, value in asdict(ends).items())
