"""Split accepted rows into train, dev and test by group: python scripts/split_data.py data/accepted/all.jsonl"""

import sys
from pathlib import Path

import typer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def main(file: Path, profile: str = "default", run_id: str = "dev"):
    """Write train.jsonl, dev_internal.jsonl and test_internal.jsonl beside the file, and record the dataset."""
    from slm import registry
    from slm.curate.split import split_file
    from slm.curate.versions import record_dataset, writing
    from slm.errors import SlmError
    from slm.settings import load_settings

    try:
        settings = load_settings(profile=profile, run_id=run_id)
        path, last = settings.path(file), registry.latest(settings, "datasets") or {"parents": {}, "gates": []}
        with writing(settings):
            record = record_dataset(settings, path, split_file(settings, path), last["parents"], last["gates"])
    except SlmError as error:
        sys.exit(str(error))
    for name, rows in record["split"]["rows"].items():
        print(f"{file.parent / name}.jsonl: {rows} rows")
    print(f"dataset version {record['version']}")


if __name__ == "__main__":
    typer.run(main)
