"""What an export will take in memory and on disk, before it starts: arithmetic from the sizes of a model."""

import json
from pathlib import Path

from slm.export.files import require_space
from slm.export.quantize import SHARE
from slm.models import base_folder

PEAK = 2.5  # times the f16 file; measured: 2.1 (merge, next tokens)
# What decides the size of the two that most people ask about: Qwen3's own config.json.
_QWEN3 = {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "num_hidden_layers": 36, "vocab_size": 151936}
OTHERS = {
    "a 4B model (Qwen3)": {**_QWEN3, "hidden_size": 2560, "intermediate_size": 9728, "tie_word_embeddings": True},
    "an 8B model (Qwen3)": {**_QWEN3, "hidden_size": 4096, "intermediate_size": 12288, "tie_word_embeddings": False},
}


def estimate(settings) -> list[dict]:
    """Megabytes that the export of this run's base takes, and of a 4B and an 8B model. Raises SlmError when this disk has
    no room for this run's."""
    import psutil

    files, folder, lines = {"f16", *settings.export.quants}, base_folder(settings), []
    config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    free = psutil.virtual_memory().available / 1e6
    for name, facts in {settings.model.base: config, **OTHERS}.items():
        f16 = 2 * count_parameters(facts) / 1e6
        disk, memory = f16 * (1 + sum(SHARE[quant] for quant in files)), PEAK * f16
        lines.append({
            "model": name, "f16 MB": round(f16), "disk MB": round(disk), "memory MB, at most": round(memory),
            "fits in memory": "yes" if memory < free else f"no: {free:,.0f} MB are free",
        })  # fmt: skip
    require_space(settings.path("outputs"), int(lines[0]["disk MB"] * 1.05e6), "the export (merged model and files)")
    return lines


def count_parameters(config: dict) -> int:
    """Parameters of a decoder with grouped attention and a gated feed-forward part, by its config.json; norms left out."""
    c = config.get("text_config", config)
    width, heads = c["hidden_size"], c["num_attention_heads"]
    head = c.get("head_dim") or width // heads
    attention = 2 * head * (heads + (c.get("num_key_value_heads") or heads))
    tables = 1 if c.get("tie_word_embeddings", True) else 2
    return width * (c["num_hidden_layers"] * (attention + 3 * c["intermediate_size"]) + tables * c["vocab_size"])
