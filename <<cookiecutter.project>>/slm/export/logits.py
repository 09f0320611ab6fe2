"""Second proof: next-token distributions, hop by hop: adapter against merged model, merged model against every file."""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

from slm.contract import Contract
from slm.export.merge import adapter_folder
from slm.export.quantize import GgufFile
from slm.models import base_folder
from slm.models.base import common_prefix
from slm.models.hf import compute_dtype
from slm.models.llama_cpp import LlamaCppModel
from slm.rows import Row
from slm.train.encode import render

PLACES = 8  # per row, from the token that begins the answer to the one that ends it
MERGED = "merged"
Asked = Sequence[tuple[list[int], list[int]]]  # token ids of a conversation, and the places after which it is asked


@dataclass(frozen=True)
class LogitProof:
    """One hop. `kl`: mean divergence from the merged model's next-token distribution in nats, `most` its bound;
    `top1`: share of the places where the likeliest token is the same."""

    file: str
    places: int
    top1: float
    kl: float
    kl_p99: float
    most: float

    @property
    def holds(self) -> bool:
        """Whether the mean divergence is within its bound (not-a-number is not)."""
        return self.kl <= self.most


def prove_logits(
    settings, contract: Contract, rows: Sequence[Row], merged: Path, files: Sequence[GgufFile]
) -> list[LogitProof]:
    """Compare next tokens inside the expected answers of `export.logit_prompts` rows, spread evenly: the adapter over
    its base, not merged, with the merged model ("merged"), then each file with the merged model. Computed as evaluated,
    on the CPU, where a model fits that was merged there."""
    from transformers import AutoTokenizer

    tokenizer, n = AutoTokenizer.from_pretrained(merged), min(len(rows), settings.export.logit_prompts)
    asked = [_ask(tokenizer, contract.messages(rows[i * len(rows) // n])) for i in range(n)]
    wanted, bounds = checkpoint_logits(merged, asked), settings.export.kl.model_dump()
    adapter, base = adapter_folder(settings), base_folder(settings)
    ways = (base, asked, adapter) if (adapter / "adapter_config.json").is_file() else (adapter, asked)
    proofs = [compare_logits(MERGED, wanted, checkpoint_logits(*ways), bounds[MERGED])]
    for file in files:
        model = LlamaCppModel(file.path)
        try:
            proofs.append(compare_logits(file.quant, wanted, [model.logits(*one) for one in asked], bounds[file.quant]))
        finally:
            model.close()
    return proofs


def checkpoint_logits(folder: Path, asked: Asked, adapter: Path | None = None) -> list:
    """Of a checkpoint in transformers, with the adapter beside its weights where one is given: a (places, vocabulary)
    array per conversation."""
    import torch
    from transformers import AutoModelForCausalLM, DynamicCache

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(compute_dtype()).eval()
    if adapter:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(adapter)).eval()
    shared = min(common_prefix([ids for ids, _ in asked]), *(places[0] for _, places in asked))
    prefix, found = DynamicCache(config=model.config), []
    with torch.inference_mode():
        if shared:  # all begin with the same system prompt: it is read once
            model(torch.tensor([asked[0][0][:shared]]), past_key_values=prefix, logits_to_keep=1)
        for ids, places in asked:
            own, places = torch.tensor([ids[shared:]]), torch.tensor(places) - shared
            found.append(model(own, past_key_values=deepcopy(prefix), logits_to_keep=places).logits[0].float().numpy())
    return found


def compare_logits(name: str, wanted: Sequence, found: Sequence, most: float) -> LogitProof:
    """Kullback-Leibler divergence of `found` from `wanted`, both lists of (places, vocabulary) logits. A file may pad
    its vocabulary: what both have is compared."""
    import numpy as np
    from scipy.special import log_softmax

    divergences, same = [], []
    for a, b in zip(wanted, found, strict=True):
        width = min(a.shape[1], b.shape[1])
        p, q = (log_softmax(x[:, :width].astype(np.float64), axis=1) for x in (a, b))
        divergences.extend((np.exp(p) * (p - q)).sum(axis=1))
        same.extend(p.argmax(axis=1) == q.argmax(axis=1))
    kl, p99 = float(np.mean(divergences)), float(np.quantile(divergences, 0.99))
    return LogitProof(name, len(same), float(np.mean(same)), max(kl, 0.0), max(p99, 0.0), most)


def _ask(tokenizer, chat: list[dict]) -> tuple[list[int], list[int]]:
    import numpy as np

    texts = render(tokenizer, chat[:-1], add_generation_prompt=True), render(tokenizer, chat)
    prompt, ids = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    return ids[:-1], sorted({*np.linspace(len(prompt) - 1, len(ids) - 2, PLACES).astype(int).tolist()})
