"""Tiny twins of the model families go the whole way: merge, f16, quant, proofs; and what is broken on the way is named."""

import json
import shutil
from pathlib import Path

import pytest
from families import FAMILIES, make_model, name_pre_tokenizer, set_keys
from test_export import CONTRACT, ROWS

from slm.errors import SlmError
from slm.export import convert, modelfile
from slm.export.merge import merge_folders, read_ends
from slm.export.quantize import quantize, tensor_types
from slm.export.tokens import conversations, prove_tokens
from slm.settings import Settings

pytestmark = pytest.mark.slow
QUANTS = {"q8_0": 0.02, "q5_k_m": 0.05, "q4_k_m": 0.1}  # how far next tokens may lie from the merged model's, in nats


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A function from a family's name to its base, merged folder and files (f16, then QUANTS), each made once."""
    pytest.importorskip("llama_cpp")
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    made, home = {}, convert.fetch_converter()

    def export(name: str):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            base = make_model(FAMILIES[name], folder / "base")
            torch.manual_seed(0)
            config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
            get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(folder / "adapter")
            merge_folders(base, folder / "adapter", folder / "merged")
            f16 = to_gguf(name, folder / "merged", folder / "model-f16.gguf")
            made[name] = base, folder / "merged", f16, *(quantize(f16, folder / f"model-{q}.gguf", q) for q in QUANTS)
        return made[name]

    def to_gguf(name: str, merged: Path, target: Path) -> Path:
        pre = FAMILIES[name].pre
        with pytest.MonkeyPatch.context() as patch:
            if pre:
                patch.setattr(convert, "fetch_converter", lambda: name_pre_tokenizer(home, pre, target.parent / "converter"))
            return convert.convert(merged, target, name="my-small-model")

    export.to_gguf = to_gguf
    return export


def chats():
    return conversations(CONTRACT, ROWS)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_passes_every_proof(exported, name):
    """Guards against a chain that holds for one architecture only: tokens, ends, BOS, Modelfile and next tokens of each."""
    import llama_cpp
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    family, (base, merged, *files) = FAMILIES[name], exported(name)
    assert read_ends(base) == read_ends(merged)
    for file in (files[0], files[-1]):  # a quantizer copies the vocabulary
        proof = prove_tokens(merged, file, chats())
        assert proof.prompts == 200 and proof.bos == ("exactly one" if family.bos else "none")
        assert set(proof.stops.split()) == set(family.ends) and proof.text == ("NFC" if family.pre == "qwen2" else "any")
    settings = Settings()
    folder = files[0].parent
    (folder / "Modelfile").write_text(modelfile.render_modelfile(settings, CONTRACT, merged, "./model-q8_0.gguf"))
    assert modelfile.check_modelfile(settings, CONTRACT, merged, folder / "Modelfile", chats()) > 100
    tokenizer, model = AutoTokenizer.from_pretrained(merged), AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    ids = tokenizer(tokenizer.apply_chat_template(chats()[0], tokenize=False, add_generation_prompt=True), add_special_tokens=False)
    with torch.inference_mode():
        wanted = model(torch.tensor([ids["input_ids"]])).logits[0, -1].log_softmax(-1).numpy()
    sizes, types = [file.stat().st_size for file in files], [{*tensor_types(file)} for file in files]
    assert sizes == sorted(sizes, reverse=True) and "Q5_K" in types[2] and "Q4_K" in types[3]  # what the width allows
    for file, most in zip(files, (1e-3, *QUANTS.values()), strict=True):
        llama = llama_cpp.Llama(str(file), n_ctx=512, verbose=False, n_threads=1)
        llama.eval(ids["input_ids"])
        got = torch.tensor(np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(llama.ctx, -1), (llama.n_vocab(),)).copy()).log_softmax(-1).numpy()
        kl = float((np.exp(wanted) * (wanted - got[: len(wanted)])).sum())
        assert abs(kl) < most, (file.name, kl)
        llama.close()


@pytest.mark.parametrize("name, fault, problem", [
    ("gemma3", "types", r"special tokens lost their type|have other token ids"),
    ("mistral", "space", r"have other token ids"),
    ("phi3", "name", r"prompts have other token ids"),
    ("llama3", "bos", r"leave out the BOS, unlike the tokenizer; .* by the Modelfile have other"),
])  # fmt: skip
def test_a_fault_in_the_conversion_is_named(exported, tmp_path, monkeypatch, name, fault, problem):
    """Guards against the conversion's own traps: what it reads from tokenizer_config.json, left out or wrong there."""
    merged = Path(shutil.copytree(exported(name)[1], tmp_path / "merged"))
    if fault == "types":
        set_keys(merged, added_tokens_decoder={})
        tokenizer = json.loads((merged / "tokenizer.json").read_text())
        assert tokenizer["added_tokens"]
    elif fault == "space":
        set_keys(merged, add_prefix_space=True)
    elif fault == "name":
        monkeypatch.setattr(convert, "_swallows_space", lambda folder: False)
    file = exported.to_gguf(name, merged, tmp_path / "model-f16.gguf")
    if fault == "bos":
        from gguf import GGUFReader

        reader = GGUFReader(file, "r+")
        reader.get_field("tokenizer.ggml.add_bos_token").parts[-1][0] = 0
        reader.data.flush()
    with pytest.raises(SlmError, match=problem):
        prove_tokens(exported(name)[1], file, chats())


def test_another_familys_file_is_named(exported):
    """Guards against a file of another base under this run's name."""
    with pytest.raises(SlmError, match="its end token is .*the tokenizer's is .*have other token ids.*its chat template renders"):
        prove_tokens(exported("phi3")[1], exported("mistral")[2], chats())


def test_merged_end_of_another_kind_is_named(exported, tmp_path):
    """Guards against a merge that keeps <|end_of_text|> alone, so that Llama 3 never stops at its turn's end."""
    merged = Path(shutil.copytree(exported("llama3")[1], tmp_path / "merged"))
    set_keys(merged, eos_token="<|end_of_text|>")
    (merged / "generation_config.json").write_text('{"eos_token_id": 1}')
    with pytest.raises(SlmError, match="its end token is .*neither tokenizer nor generation config ends at the chat's turn end"):
        prove_tokens(merged, exported("llama3")[2], chats())
