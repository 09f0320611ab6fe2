"""Moves the chosen starter in place, its code into the notebooks too, and says what comes next."""

import json
import re
import shutil
import sys
from pathlib import Path
from urllib.parse import unquote

starter = Path("starters", "<<cookiecutter.task>>")
repository = unquote("<<cookiecutter.repository | urlencode>>")

if starter.is_dir():
    for old in [*Path("data").rglob("*.json*"), Path("task/_modidx.py")]:
        old.unlink(missing_ok=True)
    shutil.copytree(starter, ".", dirs_exist_ok=True)

for path in sorted(Path("notebooks").glob("*.ipynb")):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    cells = {cell.get("id", n): "".join(cell["source"]) for n, cell in enumerate(notebook["cells"])}
    module = re.search(r"^#\| default_exp (\w+)$", "\n".join(cells.values()), re.M)
    if module and (starter / "task" / f"{module[1]}.py").is_file():
        code = (starter / "task" / f"{module[1]}.py").read_text(encoding="utf-8")
        code = re.sub(r"^(\s*from) \.(\w*) import", lambda m: f"{m[1]} {'.'.join(filter(None, ('task', m[2])))} import", code, flags=re.M)
        parts = [part.strip() for part in re.split(r"^# %% \.\..*\n", code, flags=re.M)[1:]]
        exported = [name for name, source in cells.items() if re.match(r"#\| export\s*\n", source)]
        if len(parts) != len(exported):
            sys.exit(f"{path}: {len(exported)} export cells, but {starter.name}/task/{module[1]}.py has {len(parts)}.")
        cells |= {name: f"#| export\n{part}" for name, part in zip(exported, parts, strict=True)}
    if repository and "colab" in cells:
        cells["colab"] = re.sub(r'(?i)(\brepository = )""', rf'\1"{repository}"', cells["colab"])
    for cell, source in zip(notebook["cells"], cells.values(), strict=True):
        cell["source"] = source.splitlines(keepends=True)
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")

for junk in [Path("starters"), *Path().rglob("__pycache__"), *Path().rglob(".ipynb_checkpoints"), *Path().rglob(".*cache")]:
    shutil.rmtree(junk, ignore_errors=True)
print("\nNext:  cd <<cookiecutter.project>>\n       make setup            once\n       make run PROFILE=cpu  the eight notebooks, start to end")
