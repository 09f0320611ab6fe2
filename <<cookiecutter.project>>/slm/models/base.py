"""Prompt, Answer, and the base checkpoint as a local folder, whatever `model.base` names."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from slm.errors import SlmError


@dataclass(frozen=True)
class Prompt:
    """Messages of a chat; `schema` asks for constrained JSON where the model can do that. Decoding is greedy unless
    `temperature` says otherwise (a teacher's prompts, which no answer cache keeps)."""

    messages: list[dict]
    max_tokens: int = 128
    schema: dict | None = None
    temperature: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class Answer:
    """What came back. `latency_s` is the time its caller waited; among others its time in the batch or slot, which
    is no lone caller's (see `alone`). The log probabilities are the model's own, before penalty and schema."""

    text: str
    latency_s: float
    prompt_tokens: int = 0
    completion_tokens: int = 0
    finish_reason: str = "stop"  # "stop", "length" or "error"
    first_token_s: float | None = None  # time to the first token; None where nobody measured it
    pieces: tuple[tuple[str, float], ...] = ()  # each generated token: its text and its log probability, where known


class Model(Protocol):
    """Anything that answers prompts; `fingerprint` changes whenever an answer might."""

    name: str
    fingerprint: str

    def answer(self, prompts: list[Prompt]) -> list[Answer]:
        """One answer per prompt, in order."""
        ...


def base_folder(settings) -> Path:
    """The local Hugging Face folder of `settings.model.base`; made, found or downloaded on first use.

    Raises SlmError for a model that is neither on this disk nor to be had from the Hub.
    """
    base = settings.model.base
    if base in ("embedded", "tiny"):
        from slm.models import embedded

        return embedded.folder() if base == "embedded" else embedded.tiny_folder()
    if folder := local_folder(settings):
        return folder
    if base.startswith((".", "/", "~")):
        raise SlmError(f"model.base {base}: no config.json in that folder; give a Hugging Face folder or a Hub id.")
    return _download(base, settings.model.revision or None)


def local_folder(settings) -> Path | None:
    """The folder that `model.base` names, or None where it is no model on this disk."""
    folder = settings.root / Path(settings.model.base).expanduser()  # an absolute path stays as it is
    return folder if (folder / "config.json").is_file() else None


def _download(repo: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    wanted = ["*.safetensors", "*.json", "tokenizer*", "*.jinja", "*.model", "*.txt"]
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=wanted))
    except GatedRepoError:
        raise SlmError(f"model.base {repo}: gated; accept its licence on the Hub, then set HF_TOKEN.") from None
    except (RepositoryNotFoundError, HFValidationError):
        raise SlmError(f"model.base {repo}: the Hub has no such model; check the id in project.yaml.") from None
    except Exception as error:  # no network, no disk: the library raises a dozen types
        raise SlmError(f"model.base {repo}: not on this disk and not to be had ({type(error).__name__}).") from None


def base_hash(settings) -> str:
    """16 hex digits over the base's weight files, remembered beside the cache by size and time."""
    import json

    from slm.registry import file_hash
    from slm.rows import digest, write_json

    files = sorted(base_folder(settings).glob("*.safetensors"))
    key = digest(repr([(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files]), 64)
    memo = settings.path(".cache/base_hash.json")
    known = json.loads(memo.read_text()) if memo.is_file() else {}
    if key not in known:
        write_json(memo, known := {**known, key: digest("".join(map(file_hash, files)), 16)})
    return known[key]


def student(settings, adapter: Path | None = None) -> Model:
    """The base model, or the base with a trained adapter over it, in `transformers`."""
    from slm.models.hf import HFModel

    return HFModel(base_folder(settings), base_hash(settings), adapter, batch_size=settings.evaluate.batch_size)


def larger(settings) -> Model | None:
    """The larger model of the comparison, from `model.larger_gguf` or `model.larger`; None when neither is set."""
    if settings.model.larger_gguf:
        from slm.models.llama_cpp import LlamaCppModel

        file = settings.root / Path(settings.model.larger_gguf).expanduser()
        return LlamaCppModel(file, context=settings.evaluate.context, slots=settings.evaluate.slots)
    if settings.model.larger.url:
        from slm.models.openai_api import OpenAIModel

        return OpenAIModel(settings.model.larger)
    return None


def alone(model: Model, prompts: Iterable[Prompt], n: int = 8) -> list[Answer]:
    """The answers to one request at a time after one warm-up, uncached: what a lone caller waits and gets."""
    picked = list(prompts)[:n]
    model.answer(picked[:1])
    return [model.answer([prompt])[0] for prompt in picked]


def common_prefix(ids: list[list[int]]) -> int:
    """How many leading tokens all prompts share, leaving each at least one of its own; 0 for a lone prompt."""
    if len(ids) < 2:
        return 0
    low, high = min(ids), max(ids)
    shared = next((n for n, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), min(len(low), len(high)))
    return min(shared, min(len(row) for row in ids) - 1)


def resident_mb() -> float:
    """Megabytes of memory that this process holds."""
    import psutil

    return psutil.Process().memory_info().rss / 1e6
