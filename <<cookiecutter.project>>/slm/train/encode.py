"""Rows become token ids and labels by the tokenizer's own chat template; only the answer and its stop token are trained."""

from dataclasses import dataclass

from slm.errors import SlmError, listed
from slm.models import base_folder

DATE = "26 Jul 2024"  # what Llama 3's own template falls back to


@dataclass(frozen=True)
class Example:
    """One encoded row: `labels` equals `input_ids` on the answer with its stop token, -100 before it."""

    id: str
    input_ids: list[int]
    labels: list[int]


def load_tokenizer(settings):
    """The base model's tokenizer, padding on the right. Raises SlmError when it has no chat template."""
    from transformers import AutoTokenizer

    folder = base_folder(settings)
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="right")
    if not tokenizer.chat_template:
        raise SlmError(f"{folder}: the tokenizer has no chat template; choose an instruct model.")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def stop_ids(settings, tokenizer) -> set[int]:
    """The token ids that end an answer: the tokenizer's, and those of the model's generation config."""
    return {tokenizer.eos_token_id, *generation_ends(base_folder(settings))} - {None}


def generation_ends(folder) -> list[int]:
    """The end tokens of a checkpoint's generation config; none where it has no such file."""
    from transformers import GenerationConfig

    try:
        ends = GenerationConfig.from_pretrained(folder).eos_token_id
    except OSError:
        return []
    return ends if isinstance(ends, list) else [] if ends is None else [ends]


def render(tokenizer, messages: list[dict], **options) -> str:
    """A conversation as text. Thinking templates are asked for the plain answer, which is what the rows hold; templates
    that write today's date (Llama 3) for one date, lest every day has a prompt of its own."""
    return tokenizer.apply_chat_template(messages, tokenize=False, enable_thinking=False, date_string=DATE, **options)


def encode(rows, contract, tokenizer, stops: set[int], max_length: int) -> list[Example]:
    """Token ids and labels of rows, cut after the stop token that ends the answer. Raises SlmError, naming rows and
    counts, when the rendered prompt is no prefix of the rendered conversation, when nothing ends the answer, or when
    a row is longer than `max_length` tokens."""
    conversations = [contract.messages(row) for row in rows]
    prompts = [render(tokenizer, messages[:-1], add_generation_prompt=True) for messages in conversations]
    whole = [render(tokenizer, messages) for messages in conversations]
    prompts = tokenizer(prompts, add_special_tokens=False)["input_ids"]
    whole = tokenizer(whole, add_special_tokens=False)["input_ids"]
    examples, unstable, endless, long = [], [], [], []
    for row, prompt, ids in zip(rows, prompts, whole, strict=True):
        if ids[: len(prompt)] != prompt:
            unstable.append(row.id)
            continue
        ends = [n for n in range(len(prompt), len(ids)) if ids[n] in stops]
        if not ends:
            endless.append(row.id)
            continue
        ids = ids[: ends[-1] + 1]
        if len(ids) > max_length:
            long.append(f"{row.id} ({len(ids)})")
        examples.append(Example(row.id, ids, [-100] * len(prompt) + ids[len(prompt) :]))
    _refuse(unstable, "the chat template renders the prompt otherwise once an answer follows; choose another base model or template")
    _refuse(endless, "the chat template puts no stop token after the answer, so the model would never learn to stop")
    _refuse(long, f"longer than max_seq_length {max_length}; raise train.max_seq_length, or shorten the rows in 04_curate")
    return examples


def preview(rows, examples: list[Example], contract, tokenizer, stops: set[int], n: int = 3) -> list[dict]:
    """The first `n` rows: raw message, rendered text, and the trained tokens decoded. Raises SlmError when a row
    trains nothing or everything, when its last trained token is not a stop token, or when the trained text is not the
    row's answer."""
    shown = []
    for row, example in list(zip(rows, examples, strict=True))[:n]:
        trained = [token for token in example.labels if token != -100]
        share = len(trained) / len(example.input_ids)
        if share in (0, 1):
            raise SlmError(f"row {row.id}: {share:.0%} of its tokens are trained; the loss mask is wrong.")
        if trained[-1] not in stops:
            raise SlmError(f"row {row.id}: its stop token is not trained; the model would never stop.")
        text = tokenizer.decode(trained)
        if tokenizer.decode(trained[:-1]).strip() != row.answer.strip():
            raise SlmError(f"row {row.id}: trained on {text!r}, not on its answer; the chat template adds to it or changes it.")
        shown.append({
            "id": row.id, "raw": f"{row.user} -> {row.answer}", "rendered": tokenizer.decode(example.input_ids),
            "trained": text, "trained tokens": f"{len(trained)} of {len(example.input_ids)} ({share:.0%})",
        })  # fmt: skip
    return shown


def _refuse(ids: list[str], problem: str) -> None:
    if ids:
        raise SlmError(f"{len(ids)} rows ({listed(ids)}): {problem}.")
