"""The f16 GGUF by Unsloth's own `save_pretrained_gguf`: its merge, its way through the converter, the same proofs after."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from slm.errors import SlmError
from slm.export.convert import fetch_converter, last_words
from slm.export.files import require_space, weight_bytes, whole
from slm.export.merge import adapter_folder
from slm.models import base_folder

# In a process of its own: importing Unsloth changes transformers, and the proofs must not be changed with it.
SCRIPT = """
import sys
from unsloth import FastLanguageModel
from transformers import AutoTokenizer

adapter, merged, out = sys.argv[1:]
model, _ = FastLanguageModel.from_pretrained(adapter, load_in_4bit=False)
model.save_pretrained_gguf(out, AutoTokenizer.from_pretrained(merged), quantization_method="f16")
"""


def convert_by_unsloth(settings, merged: Path, target: Path) -> Path:
    """Let Unsloth merge the run's adapter into the 16-bit base and convert it, with the tokenizer of `merged`; all or
    nothing, nothing is fetched. Raises SlmError for a full fine-tune, or with Unsloth's last words."""
    adapter = adapter_folder(settings)
    if not (adapter / "adapter_config.json").is_file():
        raise SlmError("export.converter unsloth takes a LoRA adapter; for a full fine-tune set llama_cpp.")
    require_space(target.parent, 5 * weight_bytes(merged), "the GGUF by Unsloth (it merges in 32 bits)")
    with whole(target) as work:
        tools, own, out = (work.parent / name for name in ("llama.cpp", "adapter", "out"))
        shutil.copytree(fetch_converter(), tools)  # a copy: Unsloth edits the converter
        quantizer = tools / "llama-quantize"  # it looks for one, and for f16 never runs it
        quantizer.write_text("#!/bin/sh\necho usage: none\n", encoding="utf-8")
        quantizer.chmod(0o755)
        shutil.copytree(adapter, own, ignore=shutil.ignore_patterns("checkpoints"))
        config = json.loads((own / "adapter_config.json").read_text(encoding="utf-8"))
        config["base_model_name_or_path"] = str(base_folder(settings))  # 16-bit, whatever it was trained on
        (own / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
        env = os.environ | {"UNSLOTH_LLAMA_CPP_PATH": str(tools), "UNSLOTH_AUTO_INSTALL": "0", "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-c", SCRIPT, str(own), str(merged), str(out)]
        done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=work.parent, check=False)
        made = sorted(work.parent.rglob("*.gguf"))
        if done.returncode or len(made) != 1:
            raise SlmError(f"Unsloth's GGUF export stopped ({last_words(done.stderr)}); set export.converter: llama_cpp.")
        os.replace(made[0], work)
    return target
