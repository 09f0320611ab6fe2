"""Ask the teacher for missing rows: python scripts/generate_batch.py --profile default --limit 100"""
import sys
from pathlib import Path

import typer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def main(profile: str = "default", limit: int = 0, run_id: str = "dev", dry_run: bool = False):
    """Append the next batch in data/generated. LIMIT: rows at most, 0 for all. DRY_RUN: only calls, tokens and money."""
    from slm.errors import SlmError
    from slm.generate import estimate, generate
    from slm.repair import from_repair
    from slm.settings import load_settings
    from task.contract import contract
    from task.prompts import generation_prompt

    try:
        settings = load_settings(profile=profile, run_id=run_id)
        ask = estimate if dry_run else generate
        result = ask(settings, contract, generation_prompt, from_repair(settings, contract), limit)
    except SlmError as error:
        sys.exit(str(error))
    print(result)
    sys.exit(not dry_run and bool(result.stopped))


if __name__ == "__main__":
    typer.run(main)
