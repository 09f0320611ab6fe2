"""Length in the student's own tokens, rendered with its chat template."""

import re
from collections import Counter
from collections.abc import Callable

PROBED = 20  # conversations of each shape that are counted both ways before the short way is believed


def token_counter(settings) -> Callable[[list[list[dict]]], list[int]]:
    """A function from conversations (lists of messages) to token counts, with the base model's tokenizer. The short
    way: what the template puts around the contents of one sequence of roles is rendered once, and special tokens part
    the text into pieces that are tokenized alone, each once. Where that differs from counting the whole, the whole is
    counted."""
    from transformers import AutoTokenizer

    from slm.models import base_folder

    tokenizer = AutoTokenizer.from_pretrained(base_folder(settings))
    names = sorted((t.content for t in tokenizer.added_tokens_decoder.values() if t.special), key=len, reverse=True)
    special = re.compile("|".join(map(re.escape, names)) or r"(?!)")
    shapes: dict[tuple[str, ...], list[str] | None] = {}  # what stands around the contents; None: not the short way
    probed: Counter = Counter()
    known: dict[str, int] = {"": 0}

    def encode(texts: list[str]) -> list[int]:
        encoded = tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False) if texts else []
        return [len(e) for e in encoded]

    def whole(conversations: list[list[dict]]) -> list[int]:
        return encode([tokenizer.apply_chat_template(messages, tokenize=False) for messages in conversations])

    def shape_of(roles: tuple[str, ...]) -> list[str] | None:
        marks = [f"qz{n}zq" for n in range(len(roles))]
        messages = [{"role": role, "content": mark} for role, mark in zip(roles, marks, strict=True)]
        around = re.split("|".join(marks), tokenizer.apply_chat_template(messages, tokenize=False))
        return around if len(around) == len(roles) + 1 else None

    def pieces(messages: list[dict], around: list[str] | None) -> list[str] | None:
        contents = [m["content"] for m in messages]
        if around is None or any(text != text.strip() or "think>" in text for text in contents):
            return None
        return special.split(around[0] + "".join(a + b for a, b in zip(contents, around[1:], strict=True)))

    def count(conversations: list[list[dict]]) -> list[int]:
        if len(known) > 50_000:
            known.clear()
        roles = [tuple(m["role"] for m in messages) for messages in conversations]
        shapes.update({each: shape_of(each) for each in set(roles) - shapes.keys()})
        parts = [pieces(messages, shapes[each]) for messages, each in zip(conversations, roles, strict=True)]
        new = list({text for part in parts if part for text in part} - known.keys())
        known.update(zip(new, encode(new), strict=True))
        totals = [part and sum(map(known.__getitem__, part)) + len(part) - 1 for part in parts]
        for n, each in enumerate(roles):
            if parts[n] and (n == 0 or probed[each] < PROBED):
                probed[each] += 1
                shapes[each] = shapes[each] if whole([conversations[n]]) == [totals[n]] else None
        late = [n for n, each in enumerate(roles) if parts[n] is None or shapes[each] is None]
        for n, total in zip(late, whole([conversations[n] for n in late]), strict=True):
            totals[n] = total
        return totals

    return count
