"""The one exception that a user is meant to read."""


class SlmError(Exception):
    """Something the user can mend: one sentence that names the file, the line, row or key, and what to do."""
