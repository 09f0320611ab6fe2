"""Hugging Face folder to f16 GGUF with llama.cpp's own converter, of the very release that the runtime was built from."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from filelock import FileLock

from slm.errors import SlmError
from slm.export.files import require_space, weight_bytes, whole
from slm.models.embedded import cache_home
from slm.rows import write_json

SCRIPT = "convert_hf_to_gguf.py"
PARTS = (SCRIPT, "conversion/", "gguf-py/gguf/", "LICENSE")

# In a process of its own: importing Unsloth changes transformers, which the proofs need as it is.
UNSLOTH = """
import sys, unsloth, transformers
adapter, merged, out = sys.argv[1:]
model, _ = unsloth.FastLanguageModel.from_pretrained(adapter, load_in_4bit=False)
model.save_pretrained_gguf(out, transformers.AutoTokenizer.from_pretrained(merged), quantization_method="f16")
"""


def fetch_converter() -> Path:
    """Take the converter out of llama-cpp-python's source archive (the wheel lacks it), once; returns its folder.
    Needs the package index the first time (`make setup` does it), nothing afterwards. Raises SlmError without either.
    """
    try:
        package = f"llama-cpp-python=={version('llama-cpp-python')}"
    except PackageNotFoundError:
        raise SlmError("llama-cpp-python is not installed; run `make setup`.") from None
    home = cache_home() / f"llama.cpp-{package.partition('==')[2]}"
    if (home / SCRIPT).is_file():
        return home
    home.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{home}.lock", timeout=600):
        if not (home / SCRIPT).is_file():
            with tempfile.TemporaryDirectory(dir=home.parent) as work:
                os.replace(extract(_download(package, Path(work) / "sdist"), Path(work) / "out"), home)
    return home


def extract(archive: Path, target: Path) -> Path:
    """Copy the converter's files out of the source archive. Raises SlmError when it holds none."""
    with tarfile.open(archive) as tar:
        for member in tar:
            _, _, name = member.name.partition("/vendor/llama.cpp/")
            if member.isfile() and name.startswith(PARTS):
                member.name = name
                tar.extract(member, target, filter="data")
    if not (target / SCRIPT).is_file():
        raise SlmError(f"{archive.name}: no {SCRIPT} in it; this release of llama-cpp-python ships no converter.")
    return target


def convert(
    folder: Path, target: Path, name: str = "model", adapter: Path | None = None, base: Path | None = None
) -> Path:  # fmt: skip
    """Convert a merged checkpoint to an f16 GGUF, all or nothing. With an `adapter`, Unsloth merges that into the 16-bit
    `base` by itself and converts, with the tokenizer of `folder`; nothing is fetched. Raises SlmError with the last
    words of either."""
    if adapter and not (adapter / "adapter_config.json").is_file():
        raise SlmError("export.converter unsloth takes a LoRA adapter; for a full fine-tune set llama_cpp.")
    home, who = fetch_converter(), "Unsloth's export" if adapter else "the GGUF converter"
    share = 4 if adapter else 1.1  # Unsloth merges in 32 bits
    require_space(target.parent, int(weight_bytes(folder) * share), "the f16 GGUF")
    env = {k: v for k, v in os.environ.items() if k not in ("NO_LOCAL_GGUF", "PYTHONPATH")}
    env |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with whole(target) as work:
        if adapter:
            tools = shutil.copytree(home, work.parent / "llama.cpp")  # a copy: it edits the converter
            for part in ("src", "ggml", "common"):  # what it knows a llama.cpp by, with a quantizer, which f16 needs not
                (tools / part).mkdir()
            (tools / "llama-quantize").write_text("#!/bin/sh\necho usage: none\n", encoding="utf-8")
            (tools / "llama-quantize").chmod(0o755)
            env |= {"UNSLOTH_LLAMA_CPP_PATH": str(tools), "UNSLOTH_AUTO_INSTALL": "0"}
            own = shutil.copytree(adapter, work.parent / "adapter", ignore=shutil.ignore_patterns("checkpoints"))
            config = json.loads((own / "adapter_config.json").read_text(encoding="utf-8"))  # may name another machine's base
            write_json(own / "adapter_config.json", config | {"base_model_name_or_path": str(base)})
            command = ["-c", UNSLOTH, str(own), str(folder), str(work.parent / "out")]
        else:
            name += " (phi-3 tokens)" if _swallows_space(folder) else ""
            command = [str(home / SCRIPT), str(folder), "--outfile", str(work), "--outtype", "f16", "--model-name", name]
        command.insert(0, sys.executable)
        done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=work.parent, check=False)
        made = [*work.parent.rglob("*.gguf")]
        if done.returncode or len(made) != 1:
            raise SlmError(f"{folder}: {who} stopped (exit code {done.returncode}): {_last_words(done.stderr)}")
        os.replace(made[0], work)
    return target


def _swallows_space(folder: Path) -> bool:
    """Whether special tokens drop the white space after them, which llama.cpp knows by the name "phi-3" alone."""
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return any(token["special"] and token["rstrip"] for token in config.get("added_tokens_decoder", {}).values())


def _download(package: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--no-binary", "llama-cpp-python", "--dest", str(folder), package]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = sorted(folder.glob("llama_cpp_python-*.tar.gz")) if folder.is_dir() else []
    if done.returncode or not found:
        raise SlmError(
            f"the GGUF converter is not on this disk and {package} cannot be downloaded ({_last_words(done.stderr)}); "
            "run `make setup` once with a network."
        )
    return found[0]


def _last_words(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " | ".join(lines[-3:]) or "no message"


if __name__ == "__main__":  # `python -m slm.export.convert --fetch`, so that no later run needs a network
    try:
        print(f"GGUF converter: {fetch_converter()}")
    except SlmError as error:
        raise SystemExit(f"error: {error}") from None
