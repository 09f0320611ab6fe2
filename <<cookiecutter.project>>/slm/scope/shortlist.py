"""Which base models to try: licence, size rule of the task type, context, and whether the longest row fits."""

import json
from dataclasses import dataclass

from slm.curate.tokens import token_counter
from slm.models.base import local_folder
from slm.registry import SETS
from slm.report.tables import frame
from slm.rows import read_rows

# Starting sizes in billions of parameters, and what to keep in mind.
SIZES: dict[str, tuple[float, float, str]] = {
    "classification": (0.5, 3, "often needs no generative training; try an encoder too"),
    "extraction": (1, 4, "a good fit for SFT while the schema is stable"),
    "json_generation": (1, 4, "fine-tuning steadies a strict format"),
    "tool_calling": (1, 4, "one call from a fixed catalogue is formatting; planning over several tools needs 3B-9B"),
    "rewriting": (1, 7, "needs strong style examples and negative tests"),
    "qa": (3, 9, "use RAG where the knowledge changes often"),
    "planning": (3, 9, "works best with a fixed catalogue and structured traces; multi-step reasoning needs 8B-32B"),
    "review": (4, 14, "needs long context, strong evaluation and realistic diffs"),
    "safety": (4, 14, "policy checking needs long context and strong evaluation"),
}


@dataclass(frozen=True)
class Base:
    """A base model: Hub id, licence, parameters in billions, context in tokens, and what to know before using it."""

    id: str
    license: str
    billions: float
    context: int
    note: str = ""


_GATED = "gated: accept the terms on the Hub, set HF_TOKEN"
BASES = (
    Base("embedded", "apache-2.0", 0.135, 8192, "SmolLM2-135M-Instruct, de-quantized from Q4_1; not the published checkpoint"),
    Base("Qwen/Qwen3-0.6B", "apache-2.0", 0.6, 32768, "thinks unless its template is told not to"),
    Base("Qwen/Qwen3-1.7B", "apache-2.0", 1.7, 32768, "thinks unless its template is told not to"),
    Base("Qwen/Qwen3-4B-Instruct-2507", "apache-2.0", 4.0, 262144, "no thinking block"),
    Base("Qwen/Qwen3-8B", "apache-2.0", 8.2, 32768, "thinks unless its template is told not to"),
    Base("meta-llama/Llama-3.2-1B-Instruct", "llama3.2", 1.2, 131072, _GATED),
    Base("meta-llama/Llama-3.2-3B-Instruct", "llama3.2", 3.2, 131072, _GATED),
    Base("google/gemma-3-270m-it", "gemma", 0.27, 32768, _GATED),
    Base("google/gemma-3-1b-it", "gemma", 1.0, 32768, _GATED),
    Base("google/gemma-3-4b-it", "gemma", 3.9, 131072, _GATED + "; its image part is not used"),
    Base("microsoft/Phi-4-mini-instruct", "mit", 3.8, 131072),
    Base("mistralai/Mistral-7B-Instruct-v0.3", "apache-2.0", 7.2, 32768),
)
PERMISSIVE = ("apache-2.0", "mit")


def size_verdict(task_type: str, billions: float | None) -> str:
    """ "fits", "below", "above" or "unknown" against the starting sizes of the task type, with the range."""
    low, high, _ = SIZES[task_type]
    place = "unknown" if billions is None else "below" if billions < low else "above" if billions > high else "fits"
    return f"{place} {low:g}B-{high:g}B"


def longest_row(settings, contract) -> dict:
    """The longest rendered row of the seed and evaluation files: {"tokens": int or None, "most": int, "file", "row"}.
    Tokens are counted with the base's own tokenizer and chat template where these are on this disk. `most` is an
    upper bound for any tokenizer: no byte-level tokenizer makes more tokens than the text has bytes (64 for the
    template)."""
    files = ["data/raw/seed.jsonl", *(f"data/eval/{name}.jsonl" for name in SETS)]
    rows = [(file, row) for file in files if settings.path(file).is_file() for row in read_rows(settings.path(file))]
    if not rows:
        return {"tokens": None, "most": 0, "file": "", "row": ""}
    texts = [contract.messages(row) for _, row in rows]
    sizes = [sum(len(m["content"].encode()) for m in messages) + 64 for messages in texts]
    # A Hub model's tokenizer is downloaded by 02, not here.
    counted = settings.model.base in ("embedded", "tiny") or local_folder(settings)
    lengths = token_counter(settings)(texts) if counted else None
    chosen = max(range(len(rows)), key=lambda n: (lengths or sizes)[n])
    file, row = rows[chosen]
    return {"tokens": lengths[chosen] if lengths else None, "most": max(sizes), "file": file, "row": row.id}


def shortlist(settings, contract, longest: dict | None = None):
    """A DataFrame of base models, the chosen one first, then by size; `try` numbers the two or three to start with."""
    longest = longest or longest_row(settings, contract)
    own = base_facts(settings)
    others = sorted((b for b in BASES if b.id != own.id), key=lambda b: b.billions)
    lines, turn = [], 1
    for base in (own, *others):
        verdict = size_verdict(contract.task_type, base.billions or None)
        chosen = base is own or (turn <= 3 and verdict.startswith("fits") and base.license in PERMISSIVE)
        lines.append({
            "try": str(turn) if chosen else "", "model": base.id, "licence": base.license,
            "terms": "permissive" if base.license in PERMISSIVE else "own terms: read them first",
            "parameters": f"{base.billions:g}B" if base.billions else "unknown", "size rule": verdict,
            "context": base.context or "unknown", "longest row": _fits(settings, base, longest, base is own), "note": base.note,
        })  # fmt: skip
        turn += chosen
    return frame(lines)


def base_facts(settings) -> Base:
    """What is known about `model.base`: from the list above, or from the config.json of a folder."""
    name = settings.model.base
    if listed := next((base for base in BASES if base.id == name), None):
        return listed
    if name == "tiny":
        return Base("tiny", "apache-2.0", 0.0, 8192, "random weights: it proves that the parts work and learns nothing")
    folder = local_folder(settings)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8")) if folder else {}
    note = "not in the template's list: check licence, size and template"
    return Base(name, settings.model.license, 0.0, config.get("max_position_embeddings", 0), note)


def _fits(settings, base: Base, longest: dict, own: bool) -> str:
    room = min(base.context or settings.train.max_seq_length, settings.train.max_seq_length)
    if own and longest["tokens"] is not None:
        return f"{'fits' if longest['tokens'] <= room else 'TOO LONG'}: {longest['tokens']} of {room} tokens"
    if longest["most"] <= room:
        return f"fits: at most {longest['most']} of {room} tokens"
    return "not measured: its tokenizer is not on this disk"
