"""LoRA or QLoRA with TRL and PEFT: python training/train_trl_peft.py --config training/configs/train_config.yaml --profile cpu"""

import sys
from pathlib import Path
from typing import Annotated

import typer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def main(
    config: str = typer.Option("training/configs/train_config.yaml", help="The recipe."),
    profile: str = typer.Option("default", help="A profile of project.yaml: default, smoke, cpu, gpu."),
    run_id: str = typer.Option("dev", help="Names outputs/adapters/<run_id>."),
    s: Annotated[list[str] | None, typer.Option("-s", help="A setting for this run, key=value; repeatable.")] = None,
    resume: bool = typer.Option(True, help="Go on from the newest checkpoint of the same recipe and rows."),
):
    """Train on data/accepted/train.jsonl and leave the adapter with its record."""
    from slm import train
    from slm.errors import SlmError
    from slm.settings import load_settings, parse_override
    from task.contract import contract

    try:
        overrides = dict(parse_override(item) for item in s or []) | {"train.trainer": "trl"}
        settings = load_settings(profile=profile, overrides=overrides, run_id=run_id, start=Path(__file__).parent, recipe=config)
        record = train.train(settings, contract, resume)
    except SlmError as error:
        sys.exit(f"error: {error}")
    metrics = record["metrics"]
    print(f"outputs/adapters/{run_id}: {metrics['steps']} steps, {metrics['tokens_per_s']} tokens/s, {record['seconds']} s")
    print(f"loss on dev_internal {metrics['dev_loss_first']:.3f} -> {metrics['dev_loss_best']:.3f}; next: 06_evaluate")


if __name__ == "__main__":
    typer.run(main)
