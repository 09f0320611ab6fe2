"""Find duplicates in a batch: python scripts/dedupe.py data/generated/batch_001.jsonl --against data/accepted/"""

import sys
from pathlib import Path

import typer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def main(file: Path, against: Path | None = None, out: Path | None = None):
    """One line per duplicate, with its twin. AGAINST: a JSONL file or a folder of them. OUT: where to write the rest."""
    from slm.curate.validate import dedupe
    from slm.errors import SlmError
    from slm.rows import write_rows
    from slm.settings import load_settings

    try:
        kept, found = dedupe(load_settings(), file, against)
        for row, verdict in found:
            print(f"{row.id}: {verdict.reason} ({verdict.evidence['measure']} {verdict.evidence['similarity']})")
        print(f"{len(kept)} rows kept, {len(found)} duplicates" + (f", written to {write_rows(out, kept)}" if out else ""))
    except SlmError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    typer.run(main)
