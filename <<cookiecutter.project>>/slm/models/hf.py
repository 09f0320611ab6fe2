"""A Hugging Face checkpoint, with or without an adapter, decoding greedily in batches of like length."""

import time
from pathlib import Path

from tqdm.auto import tqdm

from slm.errors import SlmError
from slm.models.base import Answer, Prompt


class HFModel:
    """`folder` with `adapter` merged over it, in bfloat16, on the GPU when there is one. `weights` is the folder's hash."""

    def __init__(self, folder: Path, weights: str, adapter: Path | None = None, batch_size: int = 16):
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from slm.registry import file_hash

        self.tokenizer = AutoTokenizer.from_pretrained(adapter or folder, padding_side="left")
        if not self.tokenizer.chat_template:
            raise SlmError(f"{folder}: the tokenizer has no chat template; choose an instruct model.")
        device = "cuda" if torch.cuda.is_available() else "cpu"
        full = adapter is not None and not (Path(adapter) / "adapter_config.json").is_file()
        source = adapter if full else folder
        if not (Path(source) / "config.json").is_file():
            raise SlmError(f"{source}: neither adapter_config.json nor config.json in it; train first (05_train).")
        merge = adapter is not None and not full
        # The adapter is added in float32 and the sum rounded once, as 08 merges it.
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32 if merge else torch.bfloat16)
        if merge:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
        self.model = model.to(device, torch.bfloat16).eval()
        trained = "".join(file_hash(f)[:8] for f in sorted(Path(adapter).glob("*.safetensors"))) if adapter else ""
        self.name = Path(adapter or folder).name
        self.fingerprint = f"hf2 {weights} {trained} {hash_text(self.tokenizer.chat_template)}"
        self._batch = batch_size

    def render(self, messages: list[dict]) -> str:
        """The chat as the model sees it, ready for its answer; without thinking, as it was trained."""
        from slm.train.encode import render

        return render(self.tokenizer, messages, add_generation_prompt=True)

    def answer(self, prompts: list[Prompt]) -> list[Answer]:
        """One answer per prompt, in order; `schema` is not enforced here."""
        ids = [self.tokenizer(self.render(p.messages), add_special_tokens=False)["input_ids"] for p in prompts]
        order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
        shared = common_prefix(ids)
        answers: dict[int, Answer] = {}
        with tqdm(total=len(ids), desc=self.name, leave=False, mininterval=1) as bar:
            for start in range(0, len(order), self._batch):
                picked = order[start : start + self._batch]
                limit = max(prompts[i].max_tokens for i in picked)
                for i, answer in zip(picked, self._batch_answers([ids[i] for i in picked], shared, limit), strict=True):
                    answers[i] = answer
                bar.update(len(picked))
        return [answers[i] for i in range(len(ids))]

    def _batch_answers(self, batch: list[list[int]], shared: int, limit: int) -> list[Answer]:
        """Prefix of `shared` tokens computed once, then the rest padded on its left: prefix | padding | rest."""
        import torch

        begin = time.perf_counter()
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.tokenizer.eos_token_id
        width = max(len(row) for row in batch)
        rows, mask = [], []
        for row in batch:
            gap = width - len(row)
            rows.append(row[:shared] + [pad] * gap + row[shared:])
            mask.append([1] * shared + [0] * gap + [1] * (len(row) - shared))
        device = self.model.device
        inputs = {"input_ids": torch.tensor(rows, device=device), "attention_mask": torch.tensor(mask, device=device)}
        with torch.inference_mode():
            if shared:
                inputs["past_key_values"] = self._prefix(batch[0][:shared], len(batch))
            out = self.model.generate(
                **inputs, max_new_tokens=limit, do_sample=False, temperature=None, top_p=None, top_k=None, pad_token_id=pad
            )
        seconds = time.perf_counter() - begin
        return [self._answer(out[n, width:].tolist(), len(row), seconds) for n, row in enumerate(batch)]

    def _prefix(self, tokens: list[int], copies: int):
        import torch
        from transformers import DynamicCache

        cache = DynamicCache(config=self.model.config)
        self.model(input_ids=torch.tensor([tokens], device=self.model.device), past_key_values=cache, logits_to_keep=1)
        cache.batch_repeat_interleave(copies)
        return cache

    def _answer(self, tokens: list[int], prompt_tokens: int, seconds: float) -> Answer:
        ends = self.model.generation_config.eos_token_id
        ends = set(ends if isinstance(ends, list) else [ends]) | {self.tokenizer.eos_token_id}
        stop = next((n for n, token in enumerate(tokens) if token in ends), None)
        kept = tokens if stop is None else tokens[:stop]
        text = self.tokenizer.decode(kept, skip_special_tokens=True)
        return Answer(text, seconds, prompt_tokens, len(kept), "length" if stop is None else "stop")


def common_prefix(ids: list[list[int]]) -> int:
    """How many leading tokens all prompts share, leaving each at least one of its own; 0 for a lone prompt."""
    if len(ids) < 2:
        return 0
    low, high = min(ids), max(ids)
    shared = next((n for n, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), min(len(low), len(high)))
    return min(shared, min(len(row) for row in ids) - 1)


def hash_text(text: str) -> str:
    """12 hex digits of a text."""
    import hashlib

    return hashlib.sha256(text.encode()).hexdigest()[:12]
