"""project.yaml, a profile and overrides become one frozen Settings; a typo is an error that names the key."""

import copy
import difflib
import json
import re
from pathlib import Path
from typing import Literal

import yaml
from pydantic import PrivateAttr, ValidationError

from slm.errors import SlmError
from slm.rows import digest
from slm.sections import (
    Cost, Curate, Evaluate, Export, Gates, Generate, Model, Preference, Production, Project, Repair, Section,
    Task, Train,
)  # fmt: skip

RECIPE = "training/configs/train_config.yaml"


class Settings(Section):
    """Everything that is in force. `profile` and `run_id` say which run this is."""

    project: Project = Project()
    task: Task = Task()
    model: Model = Model()
    generate: Generate = Generate()
    curate: Curate = Curate()
    train: Train = Train()
    preference: Preference = Preference()
    evaluate: Evaluate = Evaluate()
    gates: Gates = Gates()
    export: Export = Export()
    repair: Repair = Repair()
    production: Production = Production()
    cost: Cost = Cost()
    tracker: Literal["csv", "wandb", "mlflow", "trackio"] = "csv"
    profile: str = "default"
    run_id: str = "dev"
    _root: Path = PrivateAttr(default=Path("."))

    @property
    def root(self) -> Path:
        """The project's folder, absolute."""
        return self._root

    def path(self, relative: str | Path) -> Path:
        """A path inside the project. Raises SlmError when it would leave the project's folder."""
        return _inside(self._root, relative)

    @property
    def run_dir(self) -> Path:
        """outputs/runs/<run_id>."""
        return self.path(f"outputs/runs/{self.run_id}")

    @property
    def hash(self) -> str:
        """12 hex digits of the resolved settings, without the run id."""
        body = json.dumps(self.model_dump(exclude={"run_id"}), sort_keys=True)
        return digest(body)


def find_root(start: Path | None = None) -> Path:
    """The nearest folder upwards that holds project.yaml. Raises SlmError when there is none."""
    here = Path(start or Path.cwd()).resolve()
    for folder in (here, *here.parents):
        if (folder / "project.yaml").is_file():
            return folder
    raise SlmError(f"{here}: no project.yaml here or above; change to the project's folder.")


def load_settings(
    config: str = "project.yaml", profile: str = "default", overrides: dict | None = None, run_id: str = "dev",
    start: Path | None = None, recipe: str = RECIPE,
) -> Settings:  # fmt: skip
    """Defaults < `recipe` < `config` < its profile < `overrides` (dotted keys or nested).

    Raises SlmError for an unknown key, a wrong value, an unknown profile, a bad run id or a file that is not YAML.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", run_id) or ".." in run_id:
        raise SlmError(f"run_id {run_id!r}: use letters, digits, '.', '_' and '-' only, 64 at most.")
    root = find_root(start)
    data = _yaml(_inside(root, config))
    profiles = data.pop("profiles", None) or {}
    if profile != "default" and profile not in profiles:
        raise SlmError(f"{config}: no profile {profile!r}; there are: {', '.join(['default', *profiles])}.")
    merged: dict = {"train": _yaml(root / recipe)}
    for layer in (data, profiles.get(profile) or {}, nest(overrides or {})):
        merged = merge(merged, layer)
    try:
        settings = Settings.model_validate({**merged, "profile": profile, "run_id": run_id})
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        problem = f"unknown setting.{_nearest(key)}" if first["type"] == "extra_forbidden" else f"{first['msg']}."
        raise SlmError(f"{config} (profile {profile}): {key}: {problem}") from None
    settings._root = root
    return settings


def nest(flat: dict) -> dict:
    """{"train.epochs": 1} -> {"train": {"epochs": 1}}; nested dictionaries pass through."""
    nested: dict = {}
    for key, value in flat.items():
        branch = value
        for part in reversed(str(key).split(".")):
            branch = {part: branch}
        nested = merge(nested, branch)
    return nested


def flatten(nested: dict | None, prefix: str = "") -> dict:
    """Nested fields by dotted names: {"tool": "x", "arguments": {"a": 1}} -> {"tool": "x", "arguments.a": 1}."""
    flat = {}
    for key, value in (nested or {}).items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def merge(low: dict, high: dict) -> dict:
    """`high` over `low`, dictionary by dictionary; lists and values are replaced whole."""
    result = copy.deepcopy(low)
    for key, value in high.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merge(result[key], value) if both else copy.deepcopy(value)
    return result


def parse_override(text: str) -> tuple[str, object]:
    """"train.epochs=1" -> ("train.epochs", 1); the value is read as YAML. Raises SlmError without a "="."""
    key, sign, value = text.partition("=")
    if not sign or not key.strip():
        raise SlmError(f"-s {text}: write it as key=value, for example -s train.epochs=1.")
    try:
        return key.strip(), yaml.safe_load(value)
    except yaml.YAMLError:
        return key.strip(), value


def _inside(root: Path, relative: str | Path) -> Path:
    full = (root / relative).resolve()
    if not full.is_relative_to(root):
        raise SlmError(f"{relative}: outside the project's folder {root}; use a path inside it.")
    return full


def _yaml(file: Path) -> dict:
    if not file.is_file():
        raise SlmError(f"{file}: there is no such file.")
    try:
        data = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise SlmError(f"{file}{line}: not valid YAML ({getattr(error, 'problem', error)}).") from None
    if not isinstance(data, dict):
        raise SlmError(f"{file}: the top of the file must be keys and values.")
    return data


def _nearest(key: str) -> str:
    known = [*Settings.model_fields, *flatten(Settings().model_dump())]
    names = difflib.get_close_matches(key, known, n=1)
    return f" Did you mean {names[0]}?" if names else ""
