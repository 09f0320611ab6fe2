"""First proof: tokenizer and file read every prompt alike and end alike; each planted fault is caught and named."""

# ruff: noqa: F401, F811

import json
import shutil
from pathlib import Path

import pytest
from test_export import CONTRACT, ROWS, chats, project

from slm.errors import SlmError


def damaged(project, tmp_path, change) -> Path:
    """A copy of the f16 file with `change(reader)` applied to its header in place."""
    from gguf import GGUFReader

    copy = shutil.copy(project[2][0].path, tmp_path / "model-f16.gguf")
    reader = GGUFReader(copy, "r+")
    change(reader)
    reader.data.flush()
    return Path(copy)


def test_tokens_are_the_same_in_every_file(project):
    """Guards against the conversion that renders equal text and reads other tokens; hostile prompts are among them."""
    from slm.export.tokens import prove_tokens

    _, merged, files = project
    for file in files:
        proof = prove_tokens(merged, file.path, chats())
        assert proof.prompts == len(chats()) >= 200 and proof.eos == proof.turn_end == 2
        assert proof.bos == "exactly one" and proof.stops == "<|im_end|>"


def test_lost_special_token_types_are_named(project, tmp_path):
    """Guards against <|im_start|> read as plain text, which drops the score at f16 and q8_0 alike."""
    from slm.export.tokens import prove_tokens

    def lose(reader):
        field = reader.get_field("tokenizer.ggml.token_type")
        for index in field.data[:17]:
            field.parts[index][0] = 1

    with pytest.raises(SlmError, match=r"special tokens lost their type \(<\|im_start\|>.*200 of 200 prompts have other token ids"):
        prove_tokens(project[1], damaged(project, tmp_path, lose), chats())


def test_wrong_end_token_in_the_file_is_named(project, tmp_path):
    """Guards against generation that never stops because the file ends with another token."""
    from slm.export.tokens import prove_tokens

    def other(reader):
        reader.get_field("tokenizer.ggml.eos_token_id").parts[-1][0] = 7

    with pytest.raises(SlmError, match=r"its end token is 7, the tokenizer's is 2 \(<\|im_end\|>\)"):
        prove_tokens(project[1], damaged(project, tmp_path, other), chats())


def test_truncated_file_is_refused(project, tmp_path):
    """Guards against half a download or a full disk: the file must not be loaded, scored or shipped."""
    from slm.export.tokens import prove_tokens
    from slm.models.llama_cpp import LlamaCppModel

    half = tmp_path / "model-f16.gguf"
    half.write_bytes(project[2][0].path.read_bytes()[:-500_000])
    with pytest.raises(SlmError, match="cannot read it"):
        prove_tokens(project[1], half, chats())
    with pytest.raises(SlmError, match="cannot load it"):
        LlamaCppModel(half)


def test_another_tokenizer_is_named(project, tmp_path):
    """Guards against a file made from another checkpoint, or a tokenizer changed after training."""
    from slm.export.tokens import prove_tokens

    folder = shutil.copytree(project[1], tmp_path / "merged")
    data = json.loads((folder / "tokenizer.json").read_text())
    data["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    (folder / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(SlmError, match="other token ids"):
        prove_tokens(folder, project[2][0].path, chats())


def test_a_vocabulary_that_aborts_the_runtime_is_an_error_not_a_crash(project, tmp_path):
    """Guards against a dead kernel: llama.cpp ends the process when a vocabulary lacks its byte tokens."""
    from slm.export.tokens import prove_tokens

    def spoil(reader):
        field = reader.get_field("tokenizer.ggml.model")
        field.parts[-1][:] = list(b"bert")

    with pytest.raises(SlmError, match="cannot read it|not the model that was trained"):
        prove_tokens(project[1], damaged(project, tmp_path, spoil), chats())


def test_another_chat_template_is_named(project, tmp_path):
    """Guards against messages rendered otherwise than in training, the commonest cause of garbage in a runtime."""
    from slm.export.tokens import prove_tokens

    def other(reader):
        part = reader.get_field("tokenizer.chat_template").parts[-1]
        part[:] = list(bytes(part).replace(b"<|im_end|>' + '", b"<|im_END|>' + '"))

    with pytest.raises(SlmError, match="chat template renders"):
        prove_tokens(project[1], damaged(project, tmp_path, other), chats())


def test_doubled_bos_is_named(project, tmp_path):
    """Guards against a runtime that puts a BOS before a prompt that begins with one (llama-cpp-python#1501)."""
    from slm.export.tokens import prove_tokens

    def add(reader):
        reader.get_field("tokenizer.ggml.add_bos_token").parts[-1][0] = 1

    with pytest.raises(SlmError, match="200 prompts by the Modelfile begin with two BOS tokens"):
        prove_tokens(project[1], damaged(project, tmp_path, add), chats())


def test_end_that_neither_tokenizer_nor_generation_config_knows_is_named(project, tmp_path):
    """Guards against a merged model that runs on past its turn in transformers, while the file would stop."""
    from slm.export.tokens import prove_tokens

    folder = Path(shutil.copytree(project[1], tmp_path / "merged"))
    for name, old, new in (
        ("tokenizer_config.json", '"eos_token": "<|im_end|>"', '"eos_token": "<|endoftext|>"'),
        ("generation_config.json", '"eos_token_id": 2', '"eos_token_id": 0'),
    ):
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new))
    with pytest.raises(SlmError, match="neither tokenizer nor generation config ends at the chat's turn end 2"):
        prove_tokens(folder, project[2][0].path, chats())


def test_every_row_and_every_hostile_text_is_compared():
    """Guards against a proof on a handful of polite prompts, and against the same prompt counted twice."""
    from slm.export.tokens import HOSTILE, conversations

    found = [chat[-1]["content"] for chat in conversations(CONTRACT, ROWS)]
    assert len(found) == len(set(found)) == 200 and {*HOSTILE, *(row.user for row in ROWS)} <= {*found}
    assert len(conversations(CONTRACT, ROWS * 60)) == 240 + len(HOSTILE)
