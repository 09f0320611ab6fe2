"""What client/client.py needs to call the released model from anywhere: contract.json, and request.json for curl."""

import shutil
from pathlib import Path

from slm.errors import SlmError
from slm.export.modelfile import read_turn, stop_texts
from slm.export.tokens import composes
from slm.models.llama_cpp import _inlined
from slm.rows import write_json
from slm.train.encode import render

URL = "http://localhost:8000/v1"
PROBE = "Zwölf Boxkämpfer: 3 × “quick” brown foxes 🦊, no. 40213?"


def write_client(settings, contract, merged: Path, file: Path) -> list[Path]:
    """Complete client/ for the released GGUF `file`, and copy it beside that; returns the copies."""
    from transformers import AutoTokenizer

    tokenizer, folder, export = AutoTokenizer.from_pretrained(merged), settings.path("client"), settings.export
    if not (folder / "client.py").is_file():
        raise SlmError(f"{folder}/client.py: not there; take it back from your project's history or template.")
    prompt = render(tokenizer, contract.prompt(PROBE), add_generation_prompt=True)
    schema = _inlined(contract.schema)
    terms = {
        "url": URL, "model": settings.project.name, "version": f"{settings.run_id} {file.stem.removeprefix('model-')}",
        "system": contract.system_prompt, "schema": schema,
        "nfc": composes(tokenizer), "strip": read_turn(tokenizer).trims, "sampling": {
            **export.model_dump(include={"temperature", "top_p", "repeat_penalty"}), "seed": 0,
            "max_tokens": settings.evaluate.max_new_tokens, "stop": stop_texts(tokenizer, merged)[:4],
        }, "probe": {"text": PROBE, "prompt_tokens": len(tokenizer(prompt, add_special_tokens=False)["input_ids"])},
    }  # fmt: skip
    held = {"type": "json_schema", "json_schema": {"name": "output", "schema": schema, "strict": True}}
    request = {"model": terms["model"], "messages": contract.prompt(PROBE), **terms["sampling"]}
    write_json(folder / "contract.json", terms)
    write_json(folder / "request.json", request | {"response_format": held})
    logs = shutil.ignore_patterns("*.jsonl*", "router.json", "__pycache__")  # no customers' texts in a release
    return sorted(Path(shutil.copytree(folder, file.parent / "client", dirs_exist_ok=True, ignore=logs)).glob("*.*"))
