"""Length in the student's own tokens, rendered with its chat template."""

from collections.abc import Callable


def token_counter(settings) -> Callable[[list[list[dict]]], list[int]]:
    """A function from conversations (lists of messages) to token counts, with the base model's tokenizer."""
    from transformers import AutoTokenizer

    from slm.models import base_folder

    tokenizer = AutoTokenizer.from_pretrained(base_folder(settings))

    def count(conversations: list[list[dict]]) -> list[int]:
        texts = [tokenizer.apply_chat_template(messages, tokenize=False) for messages in conversations]
        return [len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]] if texts else []

    return count
