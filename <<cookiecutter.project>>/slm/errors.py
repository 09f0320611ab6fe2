"""The one exception that a user is meant to read, and how it names many things."""


class SlmError(Exception):
    """Something the user can mend: one sentence that names the file, the line, row or key, and what to do."""


def listed(names: list[str], most: int = 5, between: str = ", ") -> str:
    """The first of some names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return between.join(names[:most]) + more
