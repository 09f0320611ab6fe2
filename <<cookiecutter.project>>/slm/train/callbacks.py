"""What is watched while training: the trackers' local homes, the log as CSV and the loss curve."""

import csv
import io
import os
from pathlib import Path

from slm.rows import write_text

COLUMNS = ("step", "epoch", "loss", "eval_loss", "learning_rate", "grad_norm", "mean_token_accuracy", "num_tokens")


def set_tracker(settings) -> None:
    """Environment of the chosen tracker: files inside the project, W&B offline unless logged in, no telemetry.
    Variables that the user has set stay as they are."""
    home = settings.path(f"outputs/tracking/{settings.tracker}")
    env = {"DO_NOT_TRACK": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "UNSLOTH_DISABLE_STATISTICS": "1"}
    if settings.tracker == "wandb":
        netrc = Path(os.environ.get("NETRC", Path.home() / ".netrc"))
        known = netrc.is_file() and "api.wandb.ai" in netrc.read_text(errors="ignore")
        env |= {"WANDB_MODE": "online" if known or os.environ.get("WANDB_API_KEY") else "offline", "WANDB_DIR": str(home),
                "WANDB_PROJECT": settings.project.name, "WANDB_ERROR_REPORTING": "false", "WANDB_LOG_MODEL": "false",
                "WANDB_SILENT": "true"}  # fmt: skip
    elif settings.tracker == "mlflow":
        env |= {"MLFLOW_TRACKING_URI": home.as_uri(), "MLFLOW_EXPERIMENT_NAME": settings.project.name,
                "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_ALLOW_FILE_STORE": "true"}  # fmt: skip
    elif settings.tracker == "trackio":
        env |= {"TRACKIO_DIR": str(home), "TRACKIO_PROJECT": settings.project.name}
    if settings.tracker != "csv":
        home.mkdir(parents=True, exist_ok=True)
    for key, value in env.items():
        os.environ.setdefault(key, value)


def write_log(history: list[dict], path: Path) -> Path:
    """The trainer's log history as CSV, one line per logged step; empty where a step has no such value."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    logged = (entry for entry in history if "loss" in entry or "eval_loss" in entry)
    writer.writerows({"mean_token_accuracy": entry.get("eval_mean_token_accuracy"), **entry} for entry in logged)
    return write_text(path, text.getvalue())


def plot_loss(history: list[dict], path: Path) -> Path:
    """The loss on training batches and on dev_internal over the steps, as a PNG file."""
    from slm.curate.plots import figure, save

    drawn, axes = figure(7, 3.5)
    for key, label, style in (("loss", "train, per batch", "-"), ("eval_loss", "dev_internal", "o-")):
        points = [(e["step"], e[key]) for e in history if key in e]
        axes.plot([step for step, _ in points], [loss for _, loss in points], style, label=label, markersize=4)
    axes.set(xlabel="optimizer step", ylabel="loss (nats per answer token)")
    axes.set_ylim(bottom=0)
    axes.legend()
    axes.grid(alpha=0.3)
    return save(drawn, path)
