"""Score one baseline: run_baseline.py --model base --eval data/eval/dev.jsonl --out outputs/eval_reports/base_dev.json"""

import sys
from pathlib import Path

import typer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def main(model: str = "base", eval: str = "data/eval/dev.jsonl", out: str = "", profile: str = "default"):
    """Score majority, rules, classical, base, prompted, prompted_constrained, rag or larger, and write its report."""
    from slm.errors import SlmError
    from slm.evaluate import candidate, run_baseline
    from slm.settings import load_settings
    from task import baseline, contract, prompts

    try:
        settings, stem = load_settings(profile=profile, start=Path(__file__).parent), Path(eval).stem
        name, rows = {"prompted": "prompted_base"}.get(model, model), candidate.open_file(settings, eval)
        result = run_baseline(
            settings, contract.contract, name, rows, stem, predict=baseline.predict, fewshot=prompts.fewshot
        )
        print(candidate.save_file(settings, result, eval, out or f"outputs/eval_reports/{model}_{stem}.json"))
    except SlmError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    typer.run(main)
