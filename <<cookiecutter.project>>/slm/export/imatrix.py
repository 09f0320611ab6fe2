"""How much training conversations use each input of each weight matrix: a quantizer that knows keeps those inputs exact."""

import ctypes
from pathlib import Path

from slm.errors import SlmError
from slm.models.llama_cpp import LlamaCppModel
from slm.rows import read_rows
from slm.train.encode import render

ROWS = 96  # training rows, spread evenly; of the embedded model's 1,300 more gain nothing


class _Tensor(ctypes.Structure):
    """The head of llama.cpp's `struct ggml_tensor` (ggml.h), as far as its sources."""

    _fields_ = [
        ("type", ctypes.c_int), ("buffer", ctypes.c_void_p), ("ne", ctypes.c_int64 * 4), ("nb", ctypes.c_size_t * 4),
        ("op", ctypes.c_int), ("params", ctypes.c_int32 * 16), ("flags", ctypes.c_int32), ("src", ctypes.c_void_p * 10),
    ]  # fmt: skip


def importance(settings, contract, f16: Path, merged: Path) -> dict[str, list[float]]:
    """{tensor: mean square of each of its inputs} of the f16 file over prompts and answers of data/accepted/train.jsonl.
    What the rows share, the system prompt, counts once. Raises SlmError where llama.cpp shows no matrix."""
    import numpy as np
    from llama_cpp import ggml_backend_sched_eval_callback
    from llama_cpp._ggml import libggml
    from transformers import AutoTokenizer

    libggml.ggml_op_desc.restype = libggml.ggml_get_name.restype = ctypes.c_char_p
    sums, counts, rows = {}, {}, read_rows(settings.path("data/accepted/train.jsonl"))

    @ggml_backend_sched_eval_callback
    def see(address, ask, _):
        if libggml.ggml_op_desc(ctypes.c_void_p(address)) != b"MUL_MAT":
            return not ask
        tensor = _Tensor.from_address(address)
        name, inputs = libggml.ggml_get_name(ctypes.c_void_p(tensor.src[0])), _Tensor.from_address(tensor.src[1])
        if not name.endswith(b".weight") or ask:
            return True
        found = np.empty(list(inputs.ne)[::-1], dtype=np.float32)
        libggml.ggml_backend_tensor_get(
            ctypes.c_void_p(tensor.src[1]), found.ctypes.data_as(ctypes.c_void_p), ctypes.c_size_t(0), ctypes.c_size_t(found.nbytes)
        )
        found = found.reshape(-1, found.shape[-1])
        sums[name.decode()] = sums.get(name.decode(), 0) + np.square(found, dtype=np.float64).sum(axis=0)
        counts[name.decode()] = counts.get(name.decode(), 0) + len(found)
        return True

    tokenizer, model = AutoTokenizer.from_pretrained(merged), LlamaCppModel(f16)
    model.llama.context_params.cb_eval = see
    try:
        for row in rows[:: max(1, len(rows) // ROWS)][:ROWS]:
            ids = tokenizer(render(tokenizer, contract.messages(row)), add_special_tokens=False)["input_ids"]
            model.logits(ids, [len(ids) - 1])
    finally:
        model.close()
    if not sums:
        raise SlmError(f"{f16}: llama.cpp showed none of its matrices; set export.imatrix: false.")
    return {name: (total / counts[name]).tolist() for name, total in sums.items()}
