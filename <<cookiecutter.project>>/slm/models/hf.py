"""A Hugging Face checkpoint, with or without an adapter, decoding greedily in batches of like length."""

import time
from pathlib import Path

from tqdm.auto import tqdm

from slm.errors import SlmError
from slm.models.base import Answer, Prompt, common_prefix, resident_mb
from slm.rows import digest

FOLDS = {"llama", "mistral", "phi3", "qwen2", "qwen3"}  # families with plain attention; others go the usual way


def compute_dtype():
    """bfloat16 on a GPU and on a CPU that has instructions for it (AVX-512, AMX), as oneDNN tells; else float32: there
    bfloat16 is emulated and 4 to 20 times slower (measured with AVX2)."""
    import torch

    quick = torch.cuda.is_available() or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if quick else torch.float32


class HFModel:
    """`folder` with `adapter` merged over it, weights in bfloat16, computed in `compute_dtype`, on the GPU if there is
    one. `weights`: the folder's hash."""

    def __init__(self, folder: Path, weights: str, adapter: Path | None = None, batch_size: int = 16):
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from slm.registry import file_hash

        self._before = resident_mb()
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
        self.model = model.to(device, torch.bfloat16).to(compute_dtype()).eval()
        ends = self.model.generation_config.eos_token_id
        self._ends = {*(ends if isinstance(ends, list) else [ends]), self.tokenizer.eos_token_id} - {None}
        self._guide = self.memory_mb = None
        self._fold()
        trained = "".join(file_hash(f)[:8] for f in sorted(Path(adapter).glob("*.safetensors"))) if adapter else ""
        self.name = Path(adapter or folder).name
        exact = "" if self.model.dtype == torch.bfloat16 else " fp32"
        self.fingerprint = f"hf3 {weights} {trained} {digest(self.tokenizer.chat_template)}{exact}"
        self._batch = batch_size

    def _fold(self) -> None:
        """Switch to the attention below where it is the family's own."""
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import sdpa_mask

        config = self.model.config
        window = getattr(config, "sliding_window", None) or config.max_position_embeddings
        self._folds = config.model_type in FOLDS and window >= config.max_position_embeddings
        if self._folds:
            AttentionInterface.register("slm_folded", _folded)
            AttentionMaskInterface.register("slm_folded", sdpa_mask)
            self.model.set_attn_implementation("slm_folded")

    def render(self, messages: list[dict]) -> str:
        """The chat as the model sees it, ready for its answer; without thinking, as it was trained."""
        from slm.train.encode import render

        return render(self.tokenizer, messages, add_generation_prompt=True)

    def answer(self, prompts: list[Prompt]) -> list[Answer]:
        """One answer per prompt, in order; constrained to `schema` where a prompt has one."""
        import torch

        ids = [self.tokenizer(self.render(p.messages), add_special_tokens=False)["input_ids"] for p in prompts]
        order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
        # Padding between prefix and rest would shift a sliding window: other families read each prompt whole.
        shared, answers = common_prefix(ids) if self._folds else 0, {}
        with torch.inference_mode(), tqdm(total=len(ids), desc=self.name, leave=False, mininterval=1) as bar:
            prefix = self._cache()
            if shared:
                start = torch.tensor([ids[0][:shared]], device=self.model.device)
                self.model(start, past_key_values=prefix, logits_to_keep=1)
            for start in range(0, len(order), self._batch):
                picked = order[start : start + self._batch]
                batch = [prompts[i] for i in picked], [ids[i] for i in picked]
                answers |= zip(picked, self._decode(*batch, prefix, shared, len(ids) == 1), strict=True)
                bar.update(len(picked))
        if prompts and self.memory_mb is None:
            gpu = self.model.device.type == "cuda"
            self.memory_mb = torch.cuda.max_memory_allocated() / 1e6 if gpu else max(0.0, resident_mb() - self._before)
        return [answers[i] for i in range(len(ids))]

    def _decode(self, prompts: list[Prompt], ids: list[list[int]], prefix, shared: int, lone: bool) -> list[Answer]:
        """Greedy answers to prompts whose first `shared` tokens lie in `prefix`, the rest padded on its left. Rows
        that are done leave the batch once they are a quarter of it."""
        import torch

        begin, first, device = time.perf_counter(), None, self.model.device
        width, own = max(map(len, ids)) - shared, [row[shared:] for row in ids]
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in own], device=device)
        tokens = torch.tensor([[0] * (width - len(row)) + row for row in own], device=device)
        places = (shared + mask.cumsum(-1) - 1).clamp(min=0)
        cache, common = self._cache(), {}
        if self._folds:
            common["shared"] = [(layer.keys, layer.values) for layer in prefix.layers] if shared else None
        given, logs = [[] for _ in ids], [[] for _ in ids]
        matchers = [self._matcher(p.schema) if p.schema else None for p in prompts]
        rows, alive = list(range(len(ids))), set(range(len(ids)))  # the prompt of each row of the batch; those at work
        while True:
            common["attention_mask"] = _causal(mask, tokens.shape[1]) if self._folds else mask
            out = self.model(tokens, position_ids=places, past_key_values=cache, logits_to_keep=1, **common)
            logits = out.logits[:, -1].float()
            total = logits.logsumexp(-1)
            allowed = self._bound(logits, [matchers[i] if i in alive else None for i in rows])
            best = allowed.argmax(-1, keepdim=True)
            logged = (logits.gather(-1, best)[:, 0] - total).tolist()
            first = first or time.perf_counter() - begin
            for i, token, log in zip(rows, best[:, 0].tolist(), logged, strict=True):
                if i not in alive:
                    continue
                given[i].append(token)
                logs[i].append(log)
                if matchers[i]:
                    matchers[i].consume_token(token)
                if token in self._ends or len(given[i]) >= prompts[i].max_tokens:
                    alive.remove(i)
            if not alive:
                break
            if 4 * len(alive) <= 3 * len(rows):
                kept = [n for n, i in enumerate(rows) if i in alive]
                rows, at = [rows[n] for n in kept], torch.tensor(kept, device=device)
                cache.batch_select_indices(at)
                best, mask, places = best[at], mask[at], places[at]
            tokens, places = best, places[:, -1:] + 1
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        times = time.perf_counter() - begin, first if lone else None
        return [self._answer(len(row), *rest, *times) for row, *rest in zip(ids, given, logs, strict=True)]

    def _cache(self):
        from transformers import DynamicCache

        return DynamicCache(config=self.model.config)

    def _answer(self, prompt_tokens: int, tokens: list[int], logs: list[float], seconds, first) -> Answer:
        stopped = tokens[-1] in self._ends
        tokens = tokens[:-1] if stopped else tokens
        pieces, text = [], ""
        for n, log in enumerate(logs[: len(tokens)], 1):
            now = self.tokenizer.decode(tokens[:n], skip_special_tokens=True, clean_up_tokenization_spaces=False)
            # Half a character waits for its rest.
            now = text if now.endswith("\ufffd") and n < len(tokens) else now
            pieces.append((now[len(text) :], log))
            text = now
        return Answer(text, seconds, prompt_tokens, len(tokens), "stop" if stopped else "length", first, tuple(pieces))

    def _matcher(self, schema: dict):
        """What holds one answer to the schema, in the compact form that rows are trained in."""
        import llguidance.hf
        from llguidance import LLMatcher

        if self._guide is None:
            size = self.model.get_output_embeddings().out_features
            self._guide = llguidance.hf.from_tokenizer(self.tokenizer, n_vocab=size, eos_token=sorted(self._ends))
        form = {"whitespace_flexible": False, "item_separator": ",", "key_separator": ":"}
        matcher = LLMatcher(self._guide, LLMatcher.grammar_from_json_schema(schema, defaults=form))
        if matcher.is_error():
            said = matcher.get_error()[:200]
            raise SlmError(f"the output schema cannot hold an answer ({said}); simplify it in task/contract.py.")
        return matcher

    def _bound(self, logits, matchers: list):
        """The logits with what a matcher forbids at minus infinity; the very same where nothing is bound."""
        import numpy as np
        import torch

        if not any(matchers):
            return logits
        bits = np.full((len(matchers), -(-logits.shape[-1] // 32)), -1, dtype=np.int32)
        for row, matcher in zip(bits, matchers, strict=True):
            if matcher:
                matcher.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)
        allowed = np.unpackbits(bits.view(np.uint8), axis=-1, bitorder="little")[:, : logits.shape[-1]]
        return logits.masked_fill(~torch.from_numpy(allowed).bool().to(logits.device), -torch.inf)


def _causal(mask, width: int):
    """What the last `width` tokens may look at, (rows, 1, width, length), from a (rows, length) mask of real tokens."""
    import torch

    length = mask.shape[1]
    at = torch.arange(length, device=mask.device)
    # A padding token looks at itself, so that nothing is divided by zero.
    return (at <= at[-width:, None]) & mask.bool()[:, None, None] | (at == at[-width:, None])


def _folded(module, query, key, value, attention_mask, scaling, shared=None, **_):
    """Attention in which neither the key heads of a group nor the `shared` prefix (per layer: keys and values of one
    row) are copied for each query head and each row. One new token a row; more of them go the usual way."""
    import torch
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    rows, heads, width, size = query.shape
    before, before_value = shared[module.layer_idx] if shared else (key[:1, :, :0], value[:1, :, :0])
    length = before.shape[2]
    if width > 1:
        keys = torch.cat([before.expand(rows, -1, -1, -1), key], 2)
        values = torch.cat([before_value.expand(rows, -1, -1, -1), value], 2)
        mask = attention_mask
        mask = mask if mask is None else torch.nn.functional.pad(mask, (length, 0), value=True)
        return sdpa_attention_forward(module, query, keys, values, mask, scaling=scaling)
    groups, each = key.shape[1], heads // key.shape[1]
    own = query.view(rows, groups, each, size) * scaling
    every = own.transpose(0, 1).reshape(groups, rows * each, size)
    scores = own @ key.transpose(-1, -2)
    scores = scores if attention_mask is None else scores.masked_fill(~attention_mask, -torch.inf)
    first = (every @ before[0].transpose(-1, -2)).view(groups, rows, each, length).transpose(0, 1)
    weights = torch.cat([first, scores], -1).softmax(-1, dtype=torch.float32).to(query.dtype)
    out = weights[..., length:] @ value
    first = weights[..., :length].transpose(0, 1).reshape(groups, rows * each, length) @ before_value[0]
    out = out + first.view(groups, rows, each, size).transpose(0, 1)
    return out.reshape(rows, 1, heads, size), None
