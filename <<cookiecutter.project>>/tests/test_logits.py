"""Second proof: the next tokens of every file are the merged model's; other weights are caught and the hop is named."""

# ruff: noqa: F401, F811

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from test_export import CONTRACT, ROWS, adapt, project


def changed(merged: Path, folder: Path, change) -> Path:
    """A copy of the merged model with `change(weights)` applied to its 2-D tensors."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(merged, folder)
    weights = {k: change(w) if w.ndim == 2 else w for k, w in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def four_bits(weight):
    """A weight after a round trip through 4-bit blocks of 32, as a merge onto a quantized base leaves it."""
    blocks = weight.float().reshape(-1, 32)
    scale = blocks.abs().amax(1, keepdim=True).clamp(min=1e-9) / 7
    return ((blocks / scale).round() * scale).reshape(weight.shape).to(weight.dtype)


def proofs(project, merged=None, files=None):
    from slm.export.logits import prove_logits

    settings, own, made = project
    near = settings.export.kl.model_copy(update={"merged": 3e-4, "f16": 3e-4})  # random weights: nearly even distributions
    settings = settings.model_copy(update={"export": settings.export.model_copy(update={"kl": near})})
    settings._root = project[0].root
    return {p.file: p for p in prove_logits(settings, CONTRACT, ROWS, merged or own, made if files is None else files)}


def test_next_tokens_are_the_same_at_every_hop(project):
    """Guards against a proof that compares nothing, and shows what equal means: f16 far nearer than its bound."""
    found = proofs(project)
    assert list(found) == ["merged", "f16", "q8_0"] and all(p.holds and p.places == 8 * len(ROWS) for p in found.values())
    assert found["merged"].kl < 1e-5 and found["f16"].kl < 1e-5 and found["f16"].top1 == found["merged"].top1 == 1
    assert found["f16"].kl < found["q8_0"].kl <= found["q8_0"].kl_p99


def test_a_merge_onto_a_4_bit_base_is_named(project, tmp_path):
    """Guards against a merge into quantized weights, which scores a little lower everywhere and says nothing."""
    from slm.export.parity import attribute
    from test_export import SETTINGS, fake
    from slm.settings import Settings

    found = proofs(project, merged=changed(project[1], tmp_path / "merged", four_bits), files=[])
    assert not found["merged"].holds
    cause = attribute(Settings(**SETTINGS), CONTRACT, fake(), [], fake(), list(found.values()))
    assert cause.startswith("merge: ") and "16-bit base" in cause


def test_files_of_other_weights_are_named(project, tmp_path):
    """Guards against a file of another run under this run's name, and against one whose weights were damaged."""
    from slm.export.convert import convert
    from slm.export.merge import merge_folders
    from slm.export.parity import attribute
    from slm.models.embedded import tiny_folder
    from slm.settings import Settings
    from test_export import SETTINGS, fake

    settings, merged, files = project
    other = merge_folders(tiny_folder(), adapt(tmp_path / "adapter", tiny_folder(), seed=1), tmp_path / "other")
    damaged = changed(merged, tmp_path / "damaged", four_bits)
    for folder in (other, damaged):
        made = replace(files[0], path=convert(folder, tmp_path / f"{folder.name}.gguf"))
        found = proofs(project, files=[made])
        assert found["merged"].holds and not found["f16"].holds, folder
        cause = attribute(Settings(**SETTINGS), CONTRACT, fake(), [], fake(), list(found.values()))
        assert cause.startswith("weights: ") and "other or changed weights" in cause


def test_a_quant_that_is_too_coarse_is_named_and_not_chosen(project, tmp_path):
    """Guards against two bits under the name of eight: same tokens, valid file, other model."""
    from slm.export.parity import choose, fit
    from slm.export.quantize import quantize
    from slm.settings import Settings
    from test_export import SETTINGS, fake

    f16, q8 = project[2]
    coarse = replace(q8, path=quantize(f16.path, tmp_path / "model-q8_0.gguf", "q2_k"))
    good, bad = (proofs(project, files=[f16, one])["q8_0"] for one in (q8, coarse))
    assert bad.kl > 20 * good.kl
    logits = [replace(proof, most=3 * good.kl) for proof in (good, bad)]  # random weights: nearly even distributions
    assert [proof.holds for proof in logits] == [True, False]
    settings, small = Settings(**SETTINGS, export={"margin": 0.5}), fake(name="q8_0", size=10)
    assert fit(settings, CONTRACT, fake(), small, logits[1:]) == "no: next tokens"
    assert choose(settings, CONTRACT, fake(), [fake(), small], logits[1:]).name == "f16"


def test_divergence_is_that_of_scipy():
    """Guards against a divergence turned round or not normalised; a file's padded vocabulary is left out."""
    import numpy as np
    from scipy.special import rel_entr, softmax

    from slm.export.logits import compare_logits

    p, q = np.random.default_rng(0).normal(size=(2, 5, 7))
    wide = np.concatenate([q, np.full((5, 3), 99.0)], axis=1)
    found = compare_logits("f16", [p], [wide], 1e-4)
    each = rel_entr(softmax(p, axis=1), softmax(q, axis=1)).sum(1)
    assert found.kl == pytest.approx(each.mean()) and found.kl_p99 == pytest.approx(np.quantile(each, 0.99))
    assert found.top1 == np.mean(p.argmax(1) == q.argmax(1)) and not found.holds
