"""Failures of an evaluation report by cause and cluster: analyze_errors.py outputs/eval_reports/run_001_dev.json"""

import sys
from pathlib import Path

import typer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def main(report: Path, profile: str = "default"):
    """Print one line per cause, most frequent first, with its rows and what mends it, then the clusters."""
    from slm import repair
    from slm.errors import SlmError
    from slm.report.tables import markdown
    from slm.settings import load_settings
    from task.clusters import CLUSTERS
    from task.contract import contract

    try:
        settings = load_settings(profile=profile, start=Path(__file__).parent)
        result = repair.read_report(report)
        pairs = repair.with_rows(settings, result)
        found = repair.diagnose(pairs, contract, repair.trained_labels(settings))
        clusters = repair.cluster_table(repair.examine(settings, contract, found, pairs, CLUSTERS))
    except SlmError as error:
        sys.exit(f"error: {error}")
    print(f"{result.name} on {result.set}: {len(found)} of {len(pairs)} rows failed\n\n{markdown(repair.table(found))}\n{markdown(clusters)}")


if __name__ == "__main__":
    typer.run(main)
