"""How much training rows use each input of each weight matrix: a quantizer that knows that keeps those inputs exact."""

import ctypes
from collections import defaultdict
from pathlib import Path

from slm.errors import SlmError
from slm.models.llama_cpp import LlamaCppModel
from slm.rows import read_rows
from slm.train.encode import render

ROWS = 96  # training rows, spread evenly


class _Tensor(ctypes.Structure):
    """The head of llama.cpp's `struct ggml_tensor` (ggml.h), as far as its sources."""

    _fields_ = [
        ("type", ctypes.c_int), ("buffer", ctypes.c_void_p), ("ne", ctypes.c_int64 * 4), ("nb", ctypes.c_size_t * 4),
        ("op", ctypes.c_int), ("params", ctypes.c_int32 * 16), ("flags", ctypes.c_int32), ("src", ctypes.c_void_p * 10),
    ]  # fmt: skip


def importance(settings, contract, f16: Path, merged: Path) -> dict[str, list[float]]:
    """{tensor: sum of squares of each of its inputs} of the f16 file over prompts and answers of the training rows. What
    the rows share, the system prompt, counts once. Raises SlmError where llama.cpp shows no matrix."""
    import numpy as np
    from llama_cpp import ggml_backend_sched_eval_callback
    from llama_cpp._ggml import libggml as ggml
    from transformers import AutoTokenizer

    ggml.ggml_op_desc.restype = ggml.ggml_get_name.restype = ctypes.c_char_p
    ggml.ggml_op_desc.argtypes = ggml.ggml_get_name.argtypes = [ctypes.c_void_p]
    ggml.ggml_backend_tensor_get.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]
    sums, rows = defaultdict(float), read_rows(settings.path("data/accepted/train.jsonl"))

    @ggml_backend_sched_eval_callback
    def see(address, ask, _):  # asked before a node is computed: is its result wanted? then once more with it
        weight, inputs, *_ = _Tensor.from_address(address).src
        if ggml.ggml_op_desc(address) != b"MUL_MAT" or not (name := ggml.ggml_get_name(weight)).endswith(b".weight"):
            return not ask
        if not ask:
            found = np.empty(_Tensor.from_address(inputs).ne[::-1], dtype=np.float32)
            ggml.ggml_backend_tensor_get(inputs, found.ctypes.data, 0, found.nbytes)
            sums[name.decode()] += np.square(found, dtype=np.float64).sum(axis=(0, 1, 2))
        return True

    tokenizer, model = AutoTokenizer.from_pretrained(merged), LlamaCppModel(f16)
    model.llama.context_params.cb_eval = see
    for row in rows[:: max(1, len(rows) // ROWS)][:ROWS]:
        ids = tokenizer(render(tokenizer, contract.messages(row)), add_special_tokens=False)["input_ids"]
        model.logits(ids, [len(ids) - 1])
    model.close()
    if not sums:
        raise SlmError(f"{f16}: llama.cpp showed none of its matrices; set export.imatrix: false.")
    return {name: total.tolist() for name, total in sums.items()}
