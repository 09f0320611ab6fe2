"""The chosen trainer's own script, training/train_*.py: how it loads the model and makes the trainer, read there, used here."""

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

SCRIPTS = {"trl": "train_trl_peft.py", "unsloth": "train_unsloth.py"}


def script(settings) -> ModuleType:
    """The script of `train.trainer` as a module, with `load_model` and `make_trainer`."""
    path = Path(__file__).resolve().parents[2] / "training" / SCRIPTS[settings.train.trainer]
    spec = spec_from_file_location(path.stem, path)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load(settings):
    """The trainable model of the chosen trainer."""
    return script(settings).load_model(settings)
