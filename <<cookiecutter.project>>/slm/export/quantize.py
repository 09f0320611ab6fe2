"""f16 GGUF to the smaller files, in process, with the runtime's own quantizer."""

import ctypes
import logging
import os
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from slm.errors import SlmError
from slm.export.convert import convert
from slm.export.files import require_space, weight_bytes, whole
from slm.export.imatrix import importance
from slm.export.merge import adapter_folder
from slm.models import base_folder

SHARE = {"f16": 1.0, "q8_0": 0.54, "q5_k_m": 0.45, "q4_k_m": 0.42}  # of the f16 file, at most


class _HeadOnly(ctypes.Structure):
    """llama.cpp's `struct gguf_init_params` (gguf.h)."""

    _fields_ = [("no_alloc", ctypes.c_bool), ("context", ctypes.c_void_p)]


@dataclass(frozen=True)
class GgufFile:
    """One exported file: its quant, how long it took to make (seconds), and its tensors by type."""

    quant: str
    path: Path
    seconds: float
    tensors: dict[str, int]

    @property
    def size_mb(self) -> float:
        """Megabytes (10^6 bytes)."""
        return self.path.stat().st_size / 1e6


def gguf_folder(settings) -> Path:
    """outputs/gguf/<run_id>."""
    return settings.path(f"outputs/gguf/{settings.run_id}")


def make_files(settings, merged: Path, contract=None) -> list[GgufFile]:
    """Convert the merged model and quantize it to `export.quants`; files of an earlier export of this run are replaced.
    `contract` is needed for `export.imatrix` alone: it renders the training rows."""
    folder, quants = gguf_folder(settings), settings.export.quants
    share = sum(SHARE[quant] for quant in {"f16", *quants})
    require_space(folder, int(share * weight_bytes(merged) * 1.1), "the GGUF files")
    for old in [*folder.glob("model-*.gguf"), folder / "Modelfile", folder / "export.json", folder / "checksums.txt"]:
        old.unlink(missing_ok=True)
    begin = time.perf_counter()
    own = settings.export.converter == "unsloth" and {"adapter": adapter_folder(settings), "base": base_folder(settings)}
    f16 = convert(merged, folder / "model-f16.gguf", name=settings.project.name, **(own or {}))
    files = [GgufFile("f16", f16, time.perf_counter() - begin, tensor_types(f16))]
    weights = importance(settings, contract, f16, merged) if settings.export.imatrix else None
    for quant in [q for q in quants if q != "f16"]:
        begin = time.perf_counter()
        path = quantize(f16, folder / f"model-{quant}.gguf", quant, weights)
        files.append(GgufFile(quant, path, time.perf_counter() - begin, tensor_types(path)))
    return files


def quantize(source: Path, target: Path, quant: str, importance: dict[str, list[float]] | None = None) -> Path:
    """Quantize an f16 GGUF, all or nothing, by `importance` where given. Raises SlmError when llama.cpp refuses."""
    import llama_cpp

    # One line per tensor that falls back; `tensor_types` says the same in one record.
    logging.getLogger("llama-cpp-python").setLevel(logging.CRITICAL)
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{quant.upper()}")
    options.nthread = os.cpu_count() or 1
    if importance:
        entry = llama_cpp.llama_model_imatrix_data
        entries = [entry(n.encode(), (ctypes.c_float * len(v))(*v), len(v)) for n, v in importance.items()]
        options.imatrix = (entry * (len(entries) + 1))(*entries)  # a nameless one ends the list
    with whole(target) as work:
        code = llama_cpp.llama_model_quantize(str(source).encode(), str(work).encode(), ctypes.byref(options))
        if code or not work.is_file():
            raise SlmError(f"{source}: llama.cpp could not quantize it to {quant} (code {code}); make the f16 file again.")
    return target


def tensor_types(file: Path) -> dict[str, int]:
    """How many tensors of a GGUF have which type: tells how many fell back where a width is no multiple of 256."""
    from llama_cpp._ggml import libggml as ggml

    ggml.gguf_init_from_file.restype, ggml.ggml_type_name.restype = ctypes.c_void_p, ctypes.c_char_p
    head = ctypes.c_void_p(ggml.gguf_init_from_file(str(file).encode(), _HeadOnly(True, None)))
    if not head:
        raise SlmError(f"{file}: llama.cpp cannot read it; make it again.")
    number = range(ggml.gguf_get_n_tensors(head))
    names = [ggml.ggml_type_name(ggml.gguf_get_tensor_type(head, ctypes.c_int64(n))).decode().upper() for n in number]
    ggml.gguf_free(head)
    return dict(Counter(names).most_common())
