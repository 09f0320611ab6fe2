"""Split accepted rows into train, dev and test by group: python scripts/split_data.py data/accepted/all.jsonl"""

import sys
from pathlib import Path

import typer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def main(file: Path, profile: str = "default", run_id: str = "dev"):
    """Write train.jsonl, dev_internal.jsonl and test_internal.jsonl beside the file, and record the dataset."""
    from slm.curate.versions import split_and_record
    from slm.errors import SlmError
    from slm.settings import load_settings

    try:
        record = split_and_record(load_settings(profile=profile, run_id=run_id), file)
    except SlmError as error:
        sys.exit(str(error))
    for name, rows in record["split"]["rows"].items():
        print(f"{file.parent / name}.jsonl: {rows} rows")
    print(f"dataset version {record['version']}")


if __name__ == "__main__":
    typer.run(main)
