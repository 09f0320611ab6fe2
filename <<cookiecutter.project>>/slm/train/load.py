"""The chosen trainer's own script, training/train_*.py: how it loads the model and makes the trainer, read there, used here."""

from pathlib import Path
from types import ModuleType

from slm.modules import load_module

SCRIPTS = {"trl": "train_trl_peft.py", "unsloth": "train_unsloth.py"}


def script(settings) -> ModuleType:
    """The script of `train.trainer` as a module, with `load_model` and `make_trainer`."""
    return load_module(Path(__file__).resolve().parents[2] / "training" / SCRIPTS[settings.train.trainer])


def load(settings):
    """The trainable model of the chosen trainer."""
    return script(settings).load_model(settings)
