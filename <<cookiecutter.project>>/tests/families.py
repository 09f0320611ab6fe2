"""Tiny twins of model families, made on the spot: random weights, a small vocabulary of the family's kind, and its
documented special tokens, BOS habit, end tokens and chat-template features. Nothing is downloaded."""

import io
import json
from dataclasses import dataclass
from pathlib import Path

LINES = [
    "The customer cannot log in to the ledger since 12 March 2025, order TL-40213, please help.",
    "Wo finde ich die Rechnung? Der Versand von 1200 E-Mails ist gescheitert!  (zweimal)",
    "def total(rows):\n    return sum(row['price'] * 1.19 for row in rows)  # VAT",
    "Je veux annuler l'abonnement; señor, mañana mismo. {\"category\": \"billing\", \"refund\": null}",
] * 4
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = """{{- bos_token }}
{%- if not date_string is defined %}{%- set date_string = strftime_now("%d %b %Y") %}{%- endif %}
{%- if messages[0].role == 'system' %}{%- set system = messages[0].content | trim %}{%- set messages = messages[1:] %}
{%- else %}{%- set system = '' %}{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\n\nToday Date: ' + date_string + '\n\n' + system + '<|eot_id|>' }}
{%- for m in messages %}{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"""
QWEN3 = """{%- if tools %}{{- '<|im_start|>system\n# Tools\n' + tools | tojson + '<|im_end|>\n' }}
{%- elif messages[0].role == 'system' %}{{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}{%- endif %}
{%- set ns = namespace(last=0) %}
{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}
{%- for m in messages %}
{%- if m.role == 'user' %}{{- '<|im_start|>user\n' + m.content + '<|im_end|>\n' }}
{%- elif m.role == 'assistant' %}
{%- if loop.index0 > ns.last %}{{- '<|im_start|>assistant\n<think>\n\n</think>\n\n' + m.content + '<|im_end|>\n' }}
{%- else %}{{- '<|im_start|>assistant\n' + m.content + '<|im_end|>\n' }}{%- endif %}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}
{%- endif %}"""
QWEN3_2507 = """{%- if messages[0].role == 'system' %}{{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}{%- endif %}
{%- for m in messages %}
{%- if m.role == 'user' or (m.role == 'system' and not loop.first) %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}
{%- elif m.role == 'assistant' %}{{- '<|im_start|>assistant\n' + m.content + '<|im_end|>\n' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""  # the instruct checkpoints of July 2025 never think
GEMMA3 = """{{ bos_token }}
{%- if messages[0].role == 'system' %}{%- set first = messages[0].content + '\n\n' %}{%- set messages = messages[1:] %}
{%- else %}{%- set first = '' %}{%- endif %}
{%- for m in messages %}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate user/assistant') }}{%- endif %}
{{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + (first if loop.first else '') }}
{{- m.content | trim + '<end_of_turn>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\n' }}{%- endif %}"""
PHI3 = """{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"""
MISTRAL = """{{- bos_token }}
{%- if messages[0].role == 'system' %}{%- set system = messages[0].content %}{%- set messages = messages[1:] %}{%- endif %}
{%- for m in messages %}
{%- if m.role == 'user' %}
{%- if loop.last and system is defined %}{{- '[INST] ' + system + '\n\n' + m.content + '[/INST]' }}
{%- else %}{{- '[INST] ' + m.content + '[/INST]' }}{%- endif %}
{%- else %}{{- ' ' + m.content + eos_token }}{%- endif %}
{%- endfor %}"""


@dataclass(frozen=True)
class Family:
    """What is documented of a family: its template, special tokens in order of their ids, BOS or none, what ends an answer."""

    name: str
    config: str  # the class of its configuration in transformers
    template: str
    specials: tuple[str, ...]
    bos: str | None  # None: no BOS before a prompt
    eos: str
    ends: tuple[str, ...]  # of the generation config
    pre: str = ""  # llama.cpp's name of the pre-tokenizer; "" for a SentencePiece vocabulary
    marker: str = ""  # what `family` calls it
    rstrip: bool = False  # special tokens swallow the white space after them
    extra: tuple = ()
    tokenizer: str = "PreTrainedTokenizerFast"  # its class in transformers


FAMILIES = {f.name: f for f in (
    Family(
        "llama3", "LlamaConfig", LLAMA3,
        ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>"),
        "<|begin_of_text|>", "<|eot_id|>", ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"), "llama-bpe", "llama3",
    ),
    Family(
        "qwen3", "Qwen3Config", QWEN3, ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>"),
        None, "<|im_end|>", ("<|im_end|>", "<|endoftext|>"), "qwen2", "chatml", extra=(("head_dim", 16),),
        tokenizer="Qwen2Tokenizer",
    ),
    Family(
        "qwen3_2507", "Qwen3Config", QWEN3_2507, ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        None, "<|im_end|>", ("<|im_end|>", "<|endoftext|>"), "qwen2", "chatml", extra=(("head_dim", 16),),
        tokenizer="Qwen2Tokenizer",
    ),
    Family(
        "gemma3", "Gemma3TextConfig", GEMMA3, ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"),
        "<bos>", "<eos>", ("<eos>", "<end_of_turn>"), marker="gemma",
        extra=(("head_dim", 16), ("sliding_window", 512), ("query_pre_attn_scalar", 16)), tokenizer="GemmaTokenizer",
    ),
    Family(
        "phi3", "Phi3Config", PHI3, ("<unk>", "<s>", "</s>", "<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>"),
        None, "<|endoftext|>", ("<|endoftext|>", "<|assistant|>", "<|end|>"), marker="phi", rstrip=True,
        extra=(("original_max_position_embeddings", 2048), ("pad_token_id", 0)), tokenizer="LlamaTokenizer",
    ),
    Family(
        "mistral", "MistralConfig", MISTRAL, ("<unk>", "<s>", "</s>", "[INST]", "[/INST]"), "<s>", "</s>", ("</s>",), marker="mistral",
        tokenizer="LlamaTokenizer",
    ),
)}  # fmt: skip


def make_tokenizer(family: Family, folder: Path):
    """Write the family's tokenizer (and tokenizer.model, where it is SentencePiece) to `folder`."""
    from tokenizers import AddedToken, processors
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    folder.mkdir(parents=True, exist_ok=True)
    inner = _byte_level(family) if family.pre else _sentencepiece(family, folder)
    plain = {"<unk>", "<s>", "<|endoftext|>", "<tool_call>", "</tool_call>"}
    inner.add_special_tokens([
        AddedToken(t, special=True, normalized=False, rstrip=family.rstrip and t not in plain)
        for t in family.specials if t not in ("<tool_call>", "</tool_call>")
    ])  # fmt: skip
    inner.add_tokens([AddedToken(t, special=False, normalized=False) for t in family.specials if t in ("<tool_call>", "</tool_call>")])
    if family.bos:
        number = inner.token_to_id(family.bos)
        inner.post_processor = processors.TemplateProcessing(
            single=f"{family.bos} $A", pair=f"{family.bos} $A {family.bos} $B", special_tokens=[(family.bos, number)]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token=family.eos, bos_token=family.bos or ("<s>" if "<s>" in family.specials else None),
        unk_token="<unk>" if "<unk>" in family.specials else None, pad_token=family.specials[0], clean_up_tokenization_spaces=False,
    )  # fmt: skip
    tokenizer.chat_template = family.template
    tokenizer.save_pretrained(folder)
    set_keys(folder, tokenizer_class=family.tokenizer)
    return AutoTokenizer.from_pretrained(folder)


def make_model(family: Family, folder: Path) -> Path:
    """Write a two-layer model with random weights and the family's tokenizer to `folder`; wide enough for k-quants."""
    import torch
    import transformers

    tokenizer = make_tokenizer(family, folder)
    config = getattr(transformers, family.config)(
        vocab_size=len(tokenizer), hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, tie_word_embeddings=False, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, **dict(family.extra),
    )  # fmt: skip
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(config)
    ends = [tokenizer.convert_tokens_to_ids(t) for t in family.ends]
    model.generation_config = transformers.GenerationConfig(eos_token_id=ends, bos_token_id=tokenizer.bos_token_id)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def name_pre_tokenizer(home: Path, pre: str, folder: Path) -> Path:
    """A converter that takes `pre` for the pre-tokenizer: it knows a BPE by a hash over its real vocabulary, and a tiny
    one has none."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "convert_hf_to_gguf.py").write_text(
        f"import runpy, sys\nsys.path[:0] = [{str(home)!r}, {str(home / 'gguf-py')!r}]\nfrom conversion.base import TextModel\n"
        f"TextModel.get_vocab_base_pre = lambda self, tokenizer: {pre!r}\n"
        f"runpy.run_path({str(home / 'convert_hf_to_gguf.py')!r}, run_name='__main__')\n"
    )
    return folder


def _byte_level(family: Family):
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    split = LLAMA3_SPLIT if family.pre == "llama-bpe" else LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
    inner = Tokenizer(models.BPE())
    inner.normalizer = normalizers.NFC() if family.pre == "qwen2" else None
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(split), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(LINES, trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False))
    return inner


def _sentencepiece(family: Family, folder: Path):
    from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    ids = {name: family.specials.index(text) if text in family.specials else -1 for name, text in (
        ("unk_id", "<unk>"), ("bos_id", family.bos or "<s>"), ("eos_id", "<eos>" if family.name == "gemma3" else "</s>"), ("pad_id", "<pad>"),
    )}  # fmt: skip
    pieces = {"bos_piece": family.bos or "<s>", "eos_piece": "<eos>" if family.name == "gemma3" else "</s>"}
    inside = [t for t in family.specials if t not in ("<unk>", "<pad>", *pieces.values())] if not family.rstrip else []
    kind = "user_defined_symbols" if family.name == "gemma3" else "control_symbols"
    out = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter("\n".join(LINES).split("\n")), model_writer=out, vocab_size=480, model_type="bpe", byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=family.name != "gemma3",
        hard_vocab_limit=False, minloglevel=2, num_threads=1, **{kind: inside}, **ids, **pieces,
    )  # fmt: skip
    (folder / "tokenizer.model").write_bytes(out.getvalue())
    processor = SentencePieceProcessor(model_proto=out.getvalue())
    vocab = {processor.id_to_piece(n): n for n in range(processor.vocab_size())}
    rank = [p for n, p in sorted((n, p) for p, n in vocab.items()) if not processor.is_control(n) and not processor.is_byte(n)]
    merges = [(p[:k], p[k:]) for p in rank for k in range(1, len(p)) if p[:k] in vocab and p[k:] in vocab]
    inner = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    spaced = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    inner.decoder = spaced
    if family.name == "mistral":  # only the very beginning gets a space in front
        inner.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    else:
        replace = normalizers.Replace(" ", "▁")
        inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace]) if family.name == "phi3" else replace
    return inner


def set_keys(folder: Path, **change) -> None:
    """Change keys of a folder's tokenizer_config.json."""
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
