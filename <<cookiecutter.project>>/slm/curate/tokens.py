"""Length in the student's own tokens, rendered with its chat template."""

from collections.abc import Callable


def token_counter(settings) -> Callable[[list[list[dict]]], list[int]]:
    """A function from conversations (lists of messages) to token counts, with the base model's tokenizer."""
    from transformers import AutoTokenizer

    from slm.models import base_folder

    tokenizer = AutoTokenizer.from_pretrained(base_folder(settings))

    def count(conversations: list[list[dict]]) -> list[int]:
        texts = tokenizer.apply_chat_template(conversations, tokenize=False)
        encoded = tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [len(each) for each in encoded]

    return count
