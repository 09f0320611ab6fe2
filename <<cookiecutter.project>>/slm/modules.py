"""A Python file of the project that belongs to no package (training/, client/), as a module."""

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType


def load_module(path: Path) -> ModuleType:
    """The file, run as a module of its own."""
    spec = spec_from_file_location(path.stem, path)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
