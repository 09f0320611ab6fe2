"""Export: a real merge, conversion, quantization and llama.cpp answers with the tiny model; planted faults are caught."""

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Literal

import pytest
from pydantic import BaseModel, ConfigDict

from slm.contract import Contract
from slm.errors import SlmError
from slm.rows import make_row, write_json, write_rows


class Output(BaseModel):
    model_config = ConfigDict(extra="forbid")
    colour: Literal["red", "blue"]
    code: str | None


CONTRACT = Contract(
    name="colours", task_type="extraction", output=Output, system_prompt="Name the colour. JSON only.",
    primary_metric="field_f1", target=0.5, critical=("colour",), label_field="colour",
)  # fmt: skip
TEXTS = ["The sky, order TL-40213.", "Blood  12 345!", "Пожарная машина 🚒", "ocean\nwater"]
ROWS = [
    make_row(t, CONTRACT.dump({"colour": c, "code": k}), id=f"r{n}", category=c)
    for n, (t, c, k) in enumerate(zip(TEXTS, ["blue", "red"] * 2, ["TL-40213", None] * 2, strict=True))
]


def adapt(folder: Path, base: Path, seed: int = 0) -> Path:
    """A LoRA adapter with random weights, and the base's tokenizer beside it."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(seed)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A project with an adapter of the tiny model, merged and exported as f16 and q8_0; returns settings, merged, files."""
    pytest.importorskip("llama_cpp")
    from slm.export.merge import merge
    from slm.export.quantize import make_files
    from slm.models.embedded import tiny_folder
    from slm.registry import file_hash
    from slm.settings import load_settings

    root = tmp_path_factory.mktemp("project")
    (root / "project.yaml").write_text("model: {base: tiny}\nevaluate: {max_new_tokens: 12, resamples: 100}\n")
    shutil.copytree("client", root / "client")
    (root / "training/configs").mkdir(parents=True)
    (root / "training/configs/train_config.yaml").write_text("{}\n")
    write_rows(root / "data/eval/golden.jsonl", ROWS)
    write_json(root / "data/eval/lock.json", {"golden": file_hash(root / "data/eval/golden.jsonl")})
    settings = load_settings(start=root, run_id="t", overrides={"export.quants": ["f16", "q8_0"]})
    adapt(settings.path("outputs/adapters/t"), tiny_folder())
    merged = merge(settings)
    return settings, merged, make_files(settings, merged)


@pytest.fixture(scope="module")
def scored(project):
    """The golden rows through the adapter, the f16 file's three paths, and both files as shipped."""
    from slm.export import parity

    settings, merged, files = project
    rows = parity.golden_rows(settings)
    reference = parity.score_adapter(settings, CONTRACT, rows)
    paths = parity.score_paths(settings, CONTRACT, rows, files[0], merged)
    return reference, paths, parity.score_files(settings, CONTRACT, rows, files)


def chats():
    from slm.export.tokens import conversations

    return conversations(CONTRACT, ROWS)


def test_merged_weights_are_base_plus_adapter(project):
    """Guards against an export of the base: a merge that loses the adapter, or runs on other weights."""
    import torch
    from safetensors.torch import load_file

    from slm.models.embedded import tiny_folder

    settings, merged, _ = project
    base, out = load_file(tiny_folder() / "model.safetensors"), load_file(merged / "model.safetensors")
    lora = load_file(settings.path("outputs/adapters/t/adapter_model.safetensors"))
    key = "model.layers.0.self_attn.q_proj"
    delta = 2 * lora[f"base_model.model.{key}.lora_B.weight"] @ lora[f"base_model.model.{key}.lora_A.weight"]
    want = base[f"{key}.weight"].float() + delta.float()
    assert out[f"{key}.weight"].dtype == torch.bfloat16
    assert torch.allclose(out[f"{key}.weight"].float(), want, atol=0.02) and delta.abs().max() > 0.02
    assert torch.equal(out["model.layers.0.mlp.up_proj.weight"], base["model.layers.0.mlp.up_proj.weight"])


def test_every_file_is_there_and_nothing_half_written(project):
    """Guards against temporary files left beside the outputs, and against a q8_0 that is no smaller."""
    settings, merged, files = project
    assert [f.path.name for f in files] == ["model-f16.gguf", "model-q8_0.gguf"]
    assert files[1].size_mb < 0.8 * files[0].size_mb and files[1].tensors["Q8_0"] > 0
    folders = (merged, merged.parent, files[0].path.parent)
    assert not [p for folder in folders for p in folder.iterdir() if p.name.startswith(".")]


def test_the_merge_adds_layer_by_layer_and_to_the_bit_what_a_whole_float32_merge_does(project):
    """Guards against memory for the whole model in float32, and against other weights than those evaluated."""
    import torch
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    from slm.export.merge import merge_folders
    from slm.models.embedded import tiny_folder

    settings, merged, _ = project
    adapter, wide = settings.path("outputs/adapters/t"), []
    whole = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_folder(), dtype=torch.float32), adapter)
    wanted, found = whole.merge_and_unload().bfloat16().state_dict(), load_file(merged / "model.safetensors")
    assert all(torch.equal(wanted[name], weight) for name, weight in found.items()) and len(found) > 10
    original = AutoModelForCausalLM.from_pretrained
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *a, **k: wide.append(k["dtype"]) or original(*a, **k))
        merge_folders(tiny_folder(), adapter, settings.path("outputs/again"))
    assert wide == [torch.bfloat16]


def test_wrong_end_token_after_the_merge_is_named(project, tmp_path):
    """Guards against a merge that rewrites eos_token (unsloth#5386)."""
    from slm.export.merge import merge_folders
    from slm.models.embedded import tiny_folder

    adapter = adapt(tmp_path / "adapter", tiny_folder())
    config = adapter / "tokenizer_config.json"
    config.write_text(config.read_text().replace('"eos_token": "<|im_end|>"', '"eos_token": "<|endoftext|>"'))
    with pytest.raises(SlmError, match="end tokens changed in the merge"):
        merge_folders(tiny_folder(), adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists() and [p.name for p in tmp_path.iterdir()] == ["adapter"]


def test_quantized_base_is_refused(tmp_path):
    """Guards against a merge into 4-bit weights, which differs from what was trained."""
    from slm.export.merge import merge_folders

    write_json(tmp_path / "base/config.json", {"quantization_config": {"load_in_4bit": True}})
    with pytest.raises(SlmError, match="quantized base"):
        merge_folders(tmp_path / "base", tmp_path, tmp_path / "merged")


def test_adapter_of_another_model_is_refused(project, tmp_path):
    """Guards against a traceback, or a silent partial merge, when model.base changed after training."""
    from safetensors.torch import load_file, save_file

    from slm.export.merge import merge_folders
    from slm.models.embedded import tiny_folder

    adapter = Path(shutil.copytree(project[0].path("outputs/adapters/t"), tmp_path / "adapter"))
    weights = load_file(adapter / "adapter_model.safetensors")
    save_file({k: v[:, :-1].contiguous() if "lora_A" in k else v for k, v in weights.items()}, adapter / "adapter_model.safetensors")
    with pytest.raises(SlmError, match="does not fit the base model"):
        merge_folders(tiny_folder(), adapter, tmp_path / "merged")


def test_full_disk_is_refused_before_work_starts(project, monkeypatch, tmp_path):
    """Guards against a disk that fills in the middle of a conversion."""
    from collections import namedtuple

    from slm.export import files
    from slm.export.convert import convert

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: usage(10, 9, 1))
    with pytest.raises(SlmError, match="make room"):
        convert(project[1], tmp_path / "out.gguf")


def test_converter_failure_says_why_and_leaves_nothing(tmp_path):
    """Guards against a silent converter: its last words are in the error, no part file stays."""
    from slm.export.convert import convert

    (tmp_path / "in").mkdir()
    (tmp_path / "in/config.json").write_text('{"architectures": ["NoSuchModel"], "model_type": "none"}')
    with pytest.raises(SlmError, match="GGUF converter stopped .*NoSuchModel"):
        convert(tmp_path / "in", tmp_path / "out.gguf")
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def sdist(folder: Path, *names: str) -> Path:
    """A source archive that holds empty files of these names."""
    import io
    import tarfile

    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(folder / "llama_cpp_python-0.tar.gz", "w:gz") as tar:
        for name in names:
            tar.addfile(tarfile.TarInfo(f"llama_cpp_python-0/{name}"), io.BytesIO())
    return folder / "llama_cpp_python-0.tar.gz"


def test_only_the_converter_is_taken_from_the_source_archive(tmp_path):
    """Guards against 400 MB of sources in the cache, and against an archive without a converter taken for one."""
    from slm.export.convert import extract

    there = sdist(tmp_path, *(f"vendor/llama.cpp/{n}" for n in ("convert_hf_to_gguf.py", "conversion/base.py", "src/llama.cpp")))
    out = extract(there, tmp_path / "out")
    assert sorted(str(p.relative_to(out)) for p in out.rglob("*.py")) == ["conversion/base.py", "convert_hf_to_gguf.py"]
    assert not (out / "src").exists()
    with pytest.raises(SlmError, match="ships no converter"):
        extract(sdist(tmp_path, "README.md"), tmp_path / "none")


def test_no_converter_and_no_network_says_what_to_do(tmp_path, monkeypatch):
    """Guards against pip's traceback in a notebook, and a half-made cache folder that later passes for a whole one."""
    import subprocess

    from slm.export import convert

    monkeypatch.setenv("SLM_CACHE", str(tmp_path))
    failed = subprocess.CompletedProcess([], 1, "", "ERROR: no network")
    monkeypatch.setattr(convert.subprocess, "run", lambda *a, **k: failed)
    with pytest.raises(SlmError, match="no network.*make setup"):
        convert.fetch_converter()
    assert not [p for p in tmp_path.iterdir() if p.is_dir()]


KILLED = """
import os, signal, sys
from pathlib import Path
from slm.export.files import whole

with whole(Path(sys.argv[1])) as work:
    (work if sys.argv[2] == "file" else work.mkdir() or work / "part").write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_killed_export_leaves_no_half_file_and_its_rest_goes_with_the_next(tmp_path, kind):
    """Guards against a truncated file under the final name, and against gigabytes that no later run clears."""
    import subprocess
    import sys

    from slm.export.files import whole

    target = tmp_path / "out"
    done = subprocess.run([sys.executable, "-c", KILLED, str(target), kind], check=False)
    assert done.returncode == -9 and not target.exists() and len(list(tmp_path.iterdir())) == 1
    for text in ("one", "two"):
        with whole(target) as work:
            (work if kind == "file" else work.mkdir() or work / "part").write_text(text)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert (target if kind == "file" else target / "part").read_text() == "two"


STOPPED = """
import os, signal, sys
from pathlib import Path
import llama_cpp
from slm.export.quantize import make_files
from slm.settings import load_settings

def half(source, target, options):
    Path(target.decode()).write_bytes(Path(source.decode()).read_bytes()[:1000])
    os.kill(os.getpid(), signal.SIGKILL)

llama_cpp.llama_model_quantize = half
settings = load_settings(start=Path(sys.argv[1]), run_id="k", overrides={"export.quants": ["f16", "q8_0"]})
make_files(settings, Path(sys.argv[2]))
"""


def test_an_export_killed_while_it_quantizes_starts_again_cleanly(project):
    """Guards against a truncated quant, or an earlier export's proof and checksums, beside files that they do not describe."""
    import subprocess
    import sys

    from slm.export.quantize import gguf_folder, make_files
    from slm.rows import write_text
    from slm.settings import load_settings

    settings = load_settings(start=project[0].root, run_id="k", overrides={"export.quants": ["f16", "q8_0"]})
    folder, old = gguf_folder(settings), ("model-q8_0.gguf", "export.json", "checksums.txt", "Modelfile")
    for name in old:
        write_text(folder / name, "of an earlier export")
    done = subprocess.run([sys.executable, "-c", STOPPED, str(settings.root), str(project[1])], capture_output=True, check=False)
    assert done.returncode == -9, done.stderr.decode()[-1000:]
    assert not [name for name in old if (folder / name).exists()]
    assert (folder / "model-f16.gguf").read_bytes() == project[2][0].path.read_bytes()
    files = make_files(settings, project[1])
    assert sorted(p.name for p in folder.iterdir()) == ["model-f16.gguf", "model-q8_0.gguf"]
    assert files[1].path.read_bytes() == project[2][1].path.read_bytes()


def test_an_importance_matrix_keeps_what_is_used_at_the_same_size(project):
    """Guards against a matrix that llama.cpp ignores, or one of other tensors: each matrix of the model must be in it."""
    import numpy as np
    from gguf import GGUFReader, dequantize

    from slm.export.imatrix import importance
    from slm.export.quantize import make_files, quantize
    from slm.settings import load_settings

    settings, merged, (f16, _) = project
    write_rows(settings.path("data/accepted/train.jsonl"), ROWS)
    weights = importance(settings, CONTRACT, f16.path, merged)
    kinds = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    assert {f"blk.{n}.{kind}.weight" for n in range(2) for kind in kinds} <= {*weights}
    assert all(min(values) >= 0 < max(values) for values in weights.values())
    folder = f16.path.parent / "imatrix"
    plain, aware = (quantize(f16.path, folder / f"{n}.gguf", "q4_k_m", w) for n, w in (("plain", None), ("aware", weights)))
    assert plain.stat().st_size == aware.stat().st_size

    def tensors(path):
        found = {t.name: dequantize(t.data, t.tensor_type).astype(np.float64) for t in GGUFReader(path).tensors}
        return {name: found[name] for name in weights}

    exact = tensors(f16.path)
    lost = [sum((weights[n] * (t - exact[n]) ** 2).sum() for n, t in tensors(p).items()) for p in (aware, plain)]
    assert 0 < lost[0] < 0.95 * lost[1], lost
    made = load_settings(start=settings.root, run_id="i", overrides={"export.quants": ["q4_k_m"], "export.imatrix": True})
    assert make_files(made, merged, CONTRACT)[1].path.read_bytes() == aware.read_bytes()


def test_unsloths_export_passes_the_same_proofs(project):
    """Guards against a second way to a file that fetches a compiler at run time, or ships what is not proven."""
    from slm.export.logits import prove_logits
    from slm.export.quantize import make_files
    from slm.export.tokens import prove_tokens
    from slm.settings import load_settings

    if not importlib.util.find_spec("unsloth"):
        pytest.skip("Unsloth is not installed")
    chosen = {"export.quants": ["f16", "q8_0"], "export.converter": "unsloth"}
    settings = load_settings(start=project[0].root, run_id="u", overrides=chosen)
    own = Path(shutil.copytree(project[0].path("outputs/adapters/t"), settings.path("outputs/adapters/u")))
    config = json.loads((own / "adapter_config.json").read_text())
    write_json(own / "adapter_config.json", config | {"base_model_name_or_path": "/of/another/machine"})
    files = make_files(settings, project[1])
    assert sorted(p.name for p in files[0].path.parent.iterdir()) == ["model-f16.gguf", "model-q8_0.gguf"]
    assert [prove_tokens(project[1], file.path, chats()).prompts for file in files] == [200, 200]
    proofs = {proof.file: proof for proof in prove_logits(settings, CONTRACT, ROWS, project[1], files)}
    assert proofs["f16"].kl < 1e-4 and all(proof.holds for proof in proofs.values())


def test_unsloths_refusal_is_one_sentence(project, monkeypatch, tmp_path):
    """Guards against a traceback where Unsloth cannot export: no adapter, no Unsloth, a base that went away."""
    from slm.export import convert

    merged, adapter = project[1], project[0].path("outputs/adapters/t")
    monkeypatch.setattr(convert, "UNSLOTH", "import sys; sys.exit('ImportError: no unsloth here')")
    with pytest.raises(SlmError, match="Unsloth's export stopped .exit code 1.: ImportError: no unsloth here"):
        convert.convert(merged, tmp_path / "out.gguf", adapter=adapter)
    with pytest.raises(SlmError, match="takes a LoRA adapter; for a full fine-tune"):
        convert.convert(merged, tmp_path / "out.gguf", adapter=merged)
    assert not list(tmp_path.iterdir())


def test_an_export_that_does_not_fit_is_refused_before_it_starts(project, monkeypatch):
    """Guards against an hour of merging before the disk is full; the arithmetic must meet the real checkpoint's size."""
    from slm.export import files
    from slm.export.estimate import estimate
    from slm.export.files import weight_bytes

    own, four, eight = estimate(project[0])
    assert own["f16 MB"] == pytest.approx(weight_bytes(project[1]) / 1e6, rel=0.05, abs=1)
    assert (four["f16 MB"], eight["f16 MB"]) == (pytest.approx(8044, rel=0.002), pytest.approx(16381, rel=0.002))
    assert eight["disk MB"] > 2 * eight["f16 MB"] and eight["memory MB, at most"] > 2 * eight["f16 MB"]
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: type("usage", (), {"free": 1}))
    with pytest.raises(SlmError, match="the export .* make room"):
        estimate(project[0])


def test_the_same_ids_are_not_asked_twice():
    """Guards against paying for paths B and C where they are path A, and against skipping one that reads other ids."""
    from slm.export.parity import IDS, MESSAGES, TEXT, RenderedPrompts
    from slm.models import Answer, Prompt

    class Runtime:
        name, fingerprint, asked = "f16", "x", 0

        def tokenize(self, text):
            if isinstance(text, list):  # messages
                return [7] if text[0]["content"] == "same" else [9]
            return [1, 2] if text == "same" else [9]

        def answer_ids(self, prompts, max_tokens):
            self.asked += len(prompts)
            return [Answer(str(ids), 0.0) for ids in prompts]

    class Tokenizer:
        def apply_chat_template(self, messages, **_):
            return messages[0]["content"]

        def __call__(self, texts, **_):
            return {"input_ids": [[1, 2] for _ in texts]}

    runtime, known = Runtime(), {}
    prompts = [Prompt([{"role": "user", "content": text}]) for text in ("same", "other")]
    ways = [RenderedPrompts(runtime, Tokenizer(), way, known) for way in (IDS, TEXT, MESSAGES)]
    found = [[answer.text for answer in way.answer(prompts)] for way in ways]
    assert found == [["[1, 2]", "[1, 2]"], ["[1, 2]", "[9]"], ["[7]", "[9]"]]
    assert runtime.asked == 3


def test_three_paths_through_the_f16_file_agree(scored):
    """Guards against an attribution that compares different prompts: equal tokens must give equal answers."""
    _, (ids, text, messages), _ = scored
    assert [s.text for s in ids.scores] == [s.text for s in text.scores] == [s.text for s in messages.scores]
    assert (ids.way, text.way, messages.way) == ("token ids", "rendered text", "messages")
    assert all(s.completion_tokens for s in ids.scores)


def test_only_what_the_shipped_penalty_changes_is_asked_again(project, tmp_path, monkeypatch):
    """Guards against an answer without the penalty that is taken for one with it, and against asking all rows twice."""
    from slm.export import parity
    from slm.models.sequences import Sequences

    asked, run = [], Sequences.run
    monkeypatch.setattr(Sequences, "run", lambda self, jobs, *rest: asked.append(len(jobs)) or run(self, jobs, *rest))
    settings, merged, files = project
    for penalty in (1.0001, 3.0):
        export = settings.export.model_copy(update={"repeat_penalty": penalty})
        settings = settings.model_copy(update={"export": export})
        settings._root = tmp_path / str(penalty)  # an empty answer cache
        free = parity.score_paths(settings, CONTRACT, ROWS, files[0], merged)[2].scores
        asked.clear()
        shipped = parity.score_files(settings, CONTRACT, ROWS, files[:1])[0].scores
        changed = sum(a.text != b.text for a, b in zip(free, shipped, strict=True))
        assert sum(asked[: -len(ROWS) - 1]) == changed  # the last ones are timed
        assert changed == 0 if penalty < 2 else changed > 0
        settings._root = tmp_path / f"{penalty} alone"
        alone = parity.score_files(settings, CONTRACT, ROWS, files[:1])[0].scores
        assert [s.text for s in alone] == [s.text for s in shipped]


def fake(way="messages", exact=10, endless=0, name="f16", size=100.0, n=10):
    """`n` scored rows of which `exact` are right; just what the rules look at."""
    from slm.evaluate import Score
    from slm.export.parity import Scored

    class File:
        size_mb = size

    scores = [
        Score(
            row_id=str(i), value=float(i < exact), fields={}, parsed={}, lenient_parsed={}, expected={}, stage=None,
            exact=i < exact, critical_ok=True, finish_reason="length" if i < endless else "stop",
        )
        for i in range(n)
    ]  # fmt: skip
    return Scored(name, way, 1.05, scores, {}, File())


SETTINGS = {"evaluate": {"resamples": 200}}


def proof(file, kl):
    from slm.export.logits import LogitProof
    from slm.sections import Divergence

    return LogitProof(file, 256, 1.0, kl, kl, getattr(Divergence(), file))


def test_a_drop_is_attributed_to_the_stage_that_caused_it():
    """Guards against blaming quantization for a tokenizer, or a template for weights."""
    from slm.export.parity import IDS, MESSAGES, TEXT, attribute
    from slm.settings import Settings

    def verdict(a, b, c, shipped, merged=0.0, f16=1e-6):
        paths = [fake(IDS, a), fake(TEXT, b), fake(MESSAGES, c)]
        logits = [proof("merged", merged), proof("f16", f16), proof("q8_0", 9.0)]
        return attribute(Settings(**SETTINGS), CONTRACT, fake(), paths, fake(exact=shipped), logits).split(":")[0]

    assert verdict(5, 5, 5, 5) == "weights"
    assert verdict(10, 5, 5, 5) == "tokenizer"
    assert verdict(9, 10, 5, 5) == "chat template"
    assert verdict(10, 9, 10, 8) == "sampling"
    assert verdict(9, 9, 9, 9) == "equal"
    assert verdict(5, 5, 5, 5, merged=0.01, f16=0.01) == "merge"
    assert verdict(10, 10, 10, 10, f16=0.01) == "weights"
    assert verdict(10, 10, 10, 10, merged=float("nan")) == "merge"


def test_the_smallest_file_that_holds_is_chosen():
    """Guards against shipping the smallest file whatever it scores, one that never stops, or one of other next tokens."""
    from slm.export.parity import choose, fit
    from slm.settings import Settings

    settings = Settings(**SETTINGS, export={"margin": 0.5})
    f16, q8, q4 = fake(), fake(exact=9, name="q8_0", size=50), fake(exact=8, name="q4_k_m", size=25)
    endless = fake(endless=3, name="q5_k_m", size=10)
    assert choose(settings, CONTRACT, fake(), [f16, q8, q4, endless], []).name == "q8_0"
    assert choose(settings, CONTRACT, fake(), [f16, q8, q4, endless], [proof("q8_0", 0.5)]).name == "f16"
    assert choose(settings, CONTRACT, fake(), [q4, endless], []) is None
    reasons = [fit(settings, CONTRACT, fake(), one, [proof("q8_0", 0.5)]) for one in (f16, q8, q4, endless)]
    assert reasons == ["yes", "no: next tokens", "no: rows lost", "no: rows lost"]


def test_a_file_that_few_rows_speak_for_does_not_fit():
    """Guards against a count alone: one row lost of ten says as little as none; of 160 rows it says enough."""
    from slm.export.parity import fit
    from slm.settings import Settings

    assert fit(Settings(**SETTINGS), CONTRACT, fake(), fake(exact=9), []) == "no: interval too wide"
    many = fake(n=160, exact=120), fake(n=160, exact=117), fake(n=160, exact=115)
    assert [fit(Settings(**SETTINGS), CONTRACT, many[0], one, []) for one in many] == ["yes", "yes", "no: rows lost"]


def test_repetition_is_counted():
    """Guards against loops that stop at the token limit and look like long answers."""
    from slm.export.parity import LOOP

    assert LOOP.search('{"a": ' + "very " * 6) and not LOOP.search('{"a":"red","b":"red","c":null,"d":null}')


def test_release_writes_the_bundle_and_the_root_files(project, scored, monkeypatch):
    """Guards against a root Modelfile without its run or file, and checksums that do not match."""
    from slm import registry
    from slm.export import bundle, tokens
    from slm.export.logits import prove_logits
    from slm.report import model_card

    def card(settings, contract, run_id, export):
        settings.path("model_card.md").write_text(f"card of {run_id}: {export['chosen']}\n")
        return settings.path("model_card.md")

    monkeypatch.setattr(model_card, "write", card)
    settings, merged, files = project
    proofs = [tokens.prove_tokens(merged, f.path, chats()) for f in files]
    logits = prove_logits(settings, CONTRACT, ROWS, merged, files)
    report = bundle.write_report(settings, CONTRACT, proofs, logits, *scored)
    assert [line["file"] for line in report["logits"]] == ["merged", "f16", "q8_0"] and report["attribution"] == "equal"
    assert report["chosen"] in ("f16", "q8_0"), report["verdict"]
    bundle.release(settings, CONTRACT, merged, report)
    folder, chosen = settings.path("outputs/gguf/t"), report["chosen"]
    for line in (folder / "checksums.txt").read_text().splitlines():
        digest, name = line.split("  ")
        assert registry.file_hash(folder / name) == digest
    assert f"FROM ./model-{chosen}.gguf\n" in (folder / "Modelfile").read_text()
    root = settings.path("Modelfile").read_text()
    assert root.startswith("# run t:") and f"FROM ./outputs/gguf/t/model-{chosen}.gguf\n" in root
    assert (folder / "model_card.md").read_text() == f"card of t: {chosen}\n" and (folder / "export.png").stat().st_size > 5000
    assert (folder / "client/client.py").read_bytes() == Path("client/client.py").read_bytes()
    record = registry.latest(settings, "runs", stage="export")
    assert record["chosen"] == chosen and set(record["files"]) >= {"model-f16.gguf", "Modelfile", "export.json", "client/contract.json"}


def test_nothing_is_released_when_no_file_holds(project, tmp_path):
    """Guards against a Modelfile for a file that lost its score."""
    from slm.export.bundle import release

    with pytest.raises(SlmError, match="Nothing is released"):
        release(project[0], CONTRACT, project[1], {"chosen": None, "verdict": "no file holds."})
