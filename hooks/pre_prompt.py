"""Refuses a cookiecutter that cannot read this template's delimiters."""

import re
import sys
from importlib.metadata import version

found = version("cookiecutter")
if tuple(int(part) for part in re.findall(r"\d+", found)[:2]) < (2, 6):
    sys.exit(f"This template needs cookiecutter 2.6 or newer; this is {found}. Run: pip install -U cookiecutter")
