"""client/: what calls the released model from anywhere: client.py, contract.json, request.json for curl, a README."""

import shutil
from pathlib import Path

from slm.errors import SlmError
from slm.export.modelfile import read_turn, stop_texts
from slm.export.tokens import composes
from slm.models.llama_cpp import _inlined
from slm.rows import write_json, write_text
from slm.train.encode import render

URL = "http://localhost:8000/v1"
PROBE = "Zwölf Boxkämpfer: 3 × “quick” brown foxes 🦊, no. 40213?"
README = """# Client of {name}

`python client.py "text"` prints the answer as JSON that obeys the contract, or says why not and exits with 1.
`python client.py --check` sees whether the server builds the prompt that was trained. Needs `pip install jsonschema`.

    curl -s {url}/chat/completions -H 'Content-Type: application/json' -d @request.json

llama-cpp-python's server knows only the older form: `python client.py --body json_object "text" | curl ... -d @-`.

| server | start it in `outputs/gguf/{run}` | `--url http://localhost:` | tried |
| --- | --- | --- | --- |
| llama-cpp-python | `python -m llama_cpp.server --model {file} --n_ctx {context}` | 8000/v1 | by this project's tests |
| llama.cpp | `llama-server -m {file} -c {context} --jinja --port 8000` | 8000/v1 | no |
| Ollama | `ollama create {name} -f Modelfile` | 11434/v1 | no |
| vLLM | `vllm serve ../../merged/{run} --served-model-name {name} --max-model-len {context}` | 8000/v1 | no |
| SGLang | `python -m sglang.launch_server --model-path ../../merged/{run} --port 8000` | 8000/v1 | no |
| LM Studio | `lms import {file}`, then load it and start the server | 1234/v1 | no |
"""


def write_client(settings, contract, merged: Path, file: Path) -> list[Path]:
    """Complete client/ for the released GGUF `file`, and copy it beside that; returns the copies."""
    from transformers import AutoTokenizer

    tokenizer, folder, export = AutoTokenizer.from_pretrained(merged), settings.path("client"), settings.export
    if not (folder / "client.py").is_file():
        raise SlmError(f"{folder}/client.py: not there; take it back from your project's history or template.")
    prompt = render(tokenizer, contract.prompt(PROBE), add_generation_prompt=True)
    schema = _inlined(contract.schema)
    terms = {
        "url": URL, "model": settings.project.name, "system": contract.system_prompt, "schema": schema,
        "nfc": composes(tokenizer), "strip": read_turn(tokenizer).trims, "sampling": {
            **export.model_dump(include={"temperature", "top_p", "repeat_penalty"}), "seed": 0,
            "max_tokens": settings.evaluate.max_new_tokens, "stop": stop_texts(tokenizer, merged)[:4],
        }, "probe": {"text": PROBE, "prompt_tokens": len(tokenizer(prompt, add_special_tokens=False)["input_ids"])},
    }  # fmt: skip
    held = {"type": "json_schema", "json_schema": {"name": "output", "schema": schema, "strict": True}}
    request = {"model": terms["model"], "messages": contract.prompt(PROBE), **terms["sampling"]}
    write_json(folder / "contract.json", terms)
    write_json(folder / "request.json", request | {"response_format": held})
    named = {"name": terms["model"], "url": URL, "file": file.name, "context": export.context}
    write_text(folder / "README.md", README.format(**named, run=settings.run_id))
    return sorted(Path(shutil.copytree(folder, file.parent / "client", dirs_exist_ok=True)).glob("*.*"))
