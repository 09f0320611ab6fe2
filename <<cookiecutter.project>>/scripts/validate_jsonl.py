"""Check every line of a JSONL file against row format, contract and checks: python scripts/validate_jsonl.py FILE"""

import sys
from pathlib import Path

import typer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def main(file: Path):
    """One line per problem, with file:line; exit code 1 when there is any."""
    from slm.curate.validate import validate
    from slm.errors import SlmError
    from task.checks import CHECKS
    from task.contract import contract

    try:
        candidates = validate(file, contract, CHECKS)
    except SlmError as error:
        sys.exit(str(error))
    bad = [c for c in candidates if c.verdict]
    for c in bad:
        print(f"{c.place}: {c.verdict.gate}: {c.verdict.reason}")
    print(f"{len(candidates)} rows, {len(bad)} with problems")
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    typer.run(main)
