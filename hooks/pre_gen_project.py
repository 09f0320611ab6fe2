"""Refuses a name that cannot be a folder and a package, or an address that Colab cannot clone."""

import re
import sys
from urllib.parse import unquote

# Percent-encoded by the template, so that no answer can break this file.
project = unquote("<<cookiecutter.project | urlencode>>")
repository = unquote("<<cookiecutter.repository | urlencode>>")

if not re.fullmatch(r"[a-z]([a-z0-9_-]{0,62}[a-z0-9])?", project):
    sys.exit(
        f"project {project!r}: use lower-case letters a-z, digits, '-' and '_' only, 64 at most, "
        "starting with a letter and ending with a letter or a digit."
    )
if repository and not re.fullmatch(r"https://[A-Za-z0-9][\w.~/+-]*", repository, re.ASCII):
    sys.exit(f"repository {repository!r}: give an address that starts with https://, or leave it empty.")
