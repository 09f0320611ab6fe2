"""What every notebook starts with and ends with: settings in force, a look, a gate."""

import json
import os
import sys
from pathlib import Path

from slm.errors import SlmError
from slm.rows import write_text
from slm.settings import Settings, find_root, load_settings


def start(config: str, profile: str, run_id: str, overrides: dict) -> Settings:
    """Load the settings from the project's root, go there, save the resolved settings, and say what is in force.

    $SLM_PROFILE takes the place of the profile "default", so that one setting chooses `gpu` for every notebook.
    """
    profile = os.environ.get("SLM_PROFILE", profile) if profile == "default" else profile
    root = find_root()
    os.chdir(root)
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    settings = load_settings(config, profile, overrides, run_id)
    import yaml

    write_text(settings.run_dir / "settings.yaml", yaml.safe_dump(settings.model_dump(), sort_keys=False))
    print(f"project {settings.project.name} · profile {profile} · run {run_id} · settings {settings.hash}")
    print(f"base {settings.model.base} · trainer {settings.train.trainer} · teacher {settings.generate.teacher}")
    for key, value in overrides.items():
        print(f"override: {key} = {value}")
    for name in stale_exports(root):
        print(f"WARNING: {name} is newer than its exported module; run `nbdev-export`.")
    return settings


def stale_exports(root: Path) -> list[str]:
    """Notebooks whose export cells are not what stands in `task/`: the code of each cell must occur in its module."""
    stale = []
    for path in sorted((root / "notebooks").glob("*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        # The first line of a cell, its directive, and the rest.
        parts = [["".join(c["source"]).lstrip().partition("\n")[n].strip() for n in (0, 2)] for c in cells]
        modules = [first.split()[-1] for first, _ in parts if first.startswith("#| default_exp")]
        file = root / "task" / f"{modules[-1]}.py" if modules else path
        code = file.read_text(encoding="utf-8") if file.is_file() else ""
        if modules and any(first == "#| export" and rest not in code for first, rest in parts):
            stale.append(path.name)
    return stale


def passed(condition: bool, sentence: str) -> None:
    """The gate of a notebook: print the sentence, or stop the run with it."""
    if not condition:
        raise SlmError(f"gate not passed: {sentence}")
    print(f"gate passed: {sentence}")
