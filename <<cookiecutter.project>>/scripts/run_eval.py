"""Score a trained model: run_eval.py --model outputs/adapters/run_001 --eval data/eval/dev.jsonl --report R.json"""

import sys
from pathlib import Path

import typer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def main(model: str = "", eval: str = "data/eval/dev.jsonl", report: str = "", profile: str = "default",
         constrained: bool = False):  # fmt: skip
    """Score an adapter folder or a .gguf file on an evaluation file (--constrained: held to the output schema)."""
    from slm.errors import SlmError
    from slm.evaluate import candidate, evaluate
    from slm.settings import load_settings
    from task.contract import contract

    name, stem = Path(model).stem, Path(eval).stem
    try:
        settings = load_settings(profile=profile, start=Path(__file__).parent)
        opened, rows = candidate.open_model(settings, model), candidate.open_file(settings, eval)
        result = evaluate(settings, contract, opened, rows, set=stem, name=name, latency=True, constrained=constrained)
        print(candidate.save_file(settings, result, eval, report or f"outputs/eval_reports/{name}_{stem}.json"))
    except SlmError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    typer.run(main)
