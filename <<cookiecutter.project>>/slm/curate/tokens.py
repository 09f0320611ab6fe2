"""Length in the student's own tokens, rendered with its chat template."""

import re
from collections.abc import Callable

PROBED = 20  # conversations of each shape that are counted both ways before the short way is believed


def token_counter(settings) -> Callable[[list[list[dict]]], list[int]]:
    """A function from conversations (lists of messages) to token counts, with the base model's tokenizer. What the
    template puts around the contents of one sequence of roles is rendered and counted once, for special tokens part a
    text into pieces that are tokenized alone. Where that differs from counting the whole, the whole is counted."""
    from transformers import AutoTokenizer

    from slm.models import base_folder

    tokenizer = AutoTokenizer.from_pretrained(base_folder(settings))
    names = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]
    special = re.compile("|".join(map(re.escape, names)) or r"(?!)")
    shapes: dict[tuple[str, ...], tuple[int, list[tuple[str, str]]] | None] = {}
    probed: dict[tuple[str, ...], int] = {}
    known: dict[str, int] = {}  # counts of what comes again and again: system prompts and answers

    def encode(texts: list[str]) -> list[int]:
        encoded = tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False) if texts else []
        return [len(e) for e in encoded]

    def whole(conversations: list[list[dict]]) -> list[int]:
        return encode([tokenizer.apply_chat_template(messages, tokenize=False) for messages in conversations])

    def shape_of(roles: tuple[str, ...]) -> tuple[int, list[tuple[str, str]]] | None:
        marks = [f"qz{n}zq" for n in range(len(roles))]
        text = tokenizer.apply_chat_template([{"role": r, "content": m} for r, m in zip(roles, marks, strict=True)], tokenize=False)
        pieces = re.split("|".join(sorted(marks, key=len, reverse=True)), text)
        cuts = [list(special.finditer(piece)) for piece in pieces]
        if len(pieces) != len(roles) + 1 or not all(cuts):
            return None
        heads = [piece[: c[0].start()] for piece, c in zip(pieces, cuts, strict=True)]
        tails = [piece[c[-1].end() :] for piece, c in zip(pieces, cuts, strict=True)]
        heads[0] = tails[-1] = ""
        fixed = encode([p[len(h) : len(p) - len(t)] for p, h, t in zip(pieces, heads, tails, strict=True)])
        return sum(fixed), list(zip(tails[:-1], heads[1:], strict=True))

    def short(messages: list[dict]) -> tuple[int, list[str], tuple] | None:
        roles = tuple(m["role"] for m in messages)
        if roles not in shapes:
            shapes[roles] = shape_of(roles)
        plain = all((t := m["content"]) == t.strip() and "think>" not in t for m in messages)
        if shapes[roles] is None or not plain:
            return None
        fixed, around = shapes[roles]
        return fixed, [f"{a}{m['content']}{b}" for m, (a, b) in zip(messages, around, strict=True)], roles

    def count(conversations: list[list[dict]]) -> list[int]:
        found = [short(messages) for messages in conversations]
        if len(known) > 200_000:
            known.clear()
        once = {t for c, f in zip(conversations, found, strict=True) if f for m, t in zip(c, f[1], strict=True) if m["role"] == "user"}
        rest = {t for f in found if f for t in f[1]} - once - known.keys()
        lengths = dict(zip(once, encode(list(once)), strict=True))
        known.update(zip(rest, encode(list(rest)), strict=True))
        totals = [f and f[0] + sum(lengths[t] if t in lengths else known[t] for t in f[1]) for f in found]
        for n, f in enumerate(found):
            if f and (n == 0 or probed.get(f[2], 0) < PROBED):
                probed[f[2]] = probed.get(f[2], 0) + 1
                if whole([conversations[n]]) != [totals[n]]:
                    shapes[f[2]] = None
        late = [n for n, f in enumerate(found) if f is None or shapes[f[2]] is None]
        for n, total in zip(late, whole([conversations[n] for n in late]), strict=True):
            totals[n] = total
        return totals

    return count
