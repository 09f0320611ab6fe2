"""What is watched while training: the task metric, numbers gone wrong, the trackers' local homes, log and loss curve."""

import importlib
import math
import os
import time
from contextlib import contextmanager
from pathlib import Path

from slm.errors import SlmError
from slm.evaluate.scorers import prompt_messages, score_row
from slm.models import Answer
from slm.rows import write_text
from slm.settings import flatten
from slm.train.encode import render

COLUMNS = ("step", "epoch", "loss", "eval_loss", "eval_task", "eval_task_rows", "learning_rate", "grad_norm",
           "mean_token_accuracy", "num_tokens")  # fmt: skip
SHARE = 0.095  # of the training time, that looks at the task metric may take: a tenth, and a look ends a little late
PROBE = {  # everyday questions: their loss before and after shows what a narrow training has overwritten
    "What is the capital of France?": "The capital of France is Paris.",
    "How many days are in a week?": "There are seven days in a week.",
    "What color is the sky on a clear day?": "On a clear day the sky is blue.",
    "Write a sentence about a dog.": "The dog ran across the field to catch the ball.",
    "What is two plus three?": "Two plus three is five.",
    "Why do people sleep?": "People sleep so that their body and mind can rest and recover.",
}
FORGOTTEN = 0.4  # rise of that loss (nats per token) from which a model counts as having forgotten; a rule of thumb


def set_tracker(settings) -> None:
    """Environment of the chosen tracker: files inside the project, W&B offline unless logged in and without console,
    command line or the repository's address, no telemetry. Variables that the user has set stay as they are."""
    home, netrc = settings.path(f"outputs/tracking/{settings.tracker}"), Path(os.environ.get("NETRC", Path.home() / ".netrc"))
    known = "WANDB_API_KEY" in os.environ or netrc.is_file() and "api.wandb.ai" in netrc.read_text(errors="ignore")
    own = {
        "wandb": {"WANDB_MODE": "online" if known else "offline", "WANDB_DIR": str(home), "WANDB_ERROR_REPORTING": "false",
                  "WANDB_SILENT": "true", "WANDB_CONSOLE": "off", "WANDB_DISABLE_GIT": "true", "WANDB__DISABLE_META": "true"},
        "mlflow": {"MLFLOW_TRACKING_URI": home.as_uri(), "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_ALLOW_FILE_STORE": "true"},
        "trackio": {"TRACKIO_DIR": str(home)},
    }.get(settings.tracker, {})  # fmt: skip
    if own:
        home.mkdir(parents=True, exist_ok=True)
    for key, value in {"DO_NOT_TRACK": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "UNSLOTH_DISABLE_STATISTICS": "1", **own}.items():
        os.environ.setdefault(key, value)


@contextmanager
def track(settings, record: dict, name: str):
    """Callbacks (none for csv, or beside the first process) that give the tracker each logged number under the name that
    training_log.csv has. Its run `name` holds the whole run record so far, the folders of config and report, and ends
    as this one does. Raises SlmError when it does not start; one that fails later is left behind with a warning."""
    if settings.tracker == "csv" or os.environ.get("RANK", "0") != "0":
        yield []
        return
    set_tracker(settings)
    from transformers import TrainerCallback

    project, dead, code = settings.project.name, [], 1
    paths = {"config": "outputs/adapters/{}/settings.yaml", "report": "outputs/eval_reports/{}/eval_report.md"}
    known = record | {name: path.format(settings.run_id) for name, path in paths.items()}
    config = {name: str(value) for name, value in flatten(known).items()}
    try:
        api = importlib.import_module(settings.tracker)
        if settings.tracker == "mlflow":
            api.set_experiment(project)
            api.start_run(run_name=name)
            api.log_params(config)
            log, end = api.log_metrics, lambda code: api.end_run("FAILED" if code else "FINISHED")
        else:
            more = {} if settings.tracker == "wandb" else {"embed": False}  # no dashboard in the notebook
            run = api.init(project=project, name=name, config=config, **more)
            log, end = run.log, lambda code: run.finish(*[] if more else [code])
    except Exception as error:  # a dozen types: no package, no account, no server
        said = f"it does not start ({type(error).__name__}); install the extra `track`, log in, or set tracker csv."
        raise SlmError(f"tracker {settings.tracker}: {said}") from error

    def send(call, *given) -> None:
        try:
            None if dead else call(*given)
        except Exception as error:
            dead.append(error)
            print(f"WARNING: tracker {settings.tracker} failed ({type(error).__name__}); training goes on without it.")

    class Log(TrainerCallback):
        def on_log(self, args, state, control, logs, **_):
            send(log, {key: value for key, value in logs.items() if isinstance(value, (int, float))}, state.global_step)

    try:
        yield [Log()]
        code = 0
    finally:
        send(end, code)


def watch(enough: float = 0.0):
    """A callback that ends a run whose loss is not a number, and one whose training loss is below `enough`."""
    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        def on_log(self, args, state, control, logs, **_):
            for name in ("loss", "eval_loss"):
                if not math.isfinite(logs.get(name, 0)):
                    mend = "lower train.learning_rate, or set train.precision fp32"
                    raise SlmError(f"the {name} is {logs[name]} at step {state.global_step}; {mend}.")
            control.should_training_stop |= logs.get("loss", enough) < enough

    return Watch()


def task_metric(settings, contract, tokenizer, stops: set[int], rows):
    """A callback that sets `eval_task` at each evaluation after step 0: the primary metric's mean over answers that
    the model in training really generates for `rows`, always the same first ones. It asks as many as fit into SHARE of
    the training time so far; checkpoints are compared on the rows that both have answered, ties go to the lower loss,
    and the loss alone decides while no row could be afforded. `.trainer` must be set; `.summary()` is for the record."""
    import torch
    from transformers import TrainerCallback

    class TaskMetric(TrainerCallback):
        trainer, begin, end, spent, each, best, loss, step, looks = None, 0.0, 0.0, 0.0, 0.0, [], 0.0, 0, 0

        def on_train_begin(self, args, state, control, **_):
            self.begin = time.perf_counter()

        def on_evaluate(self, args, state, control, metrics, model, **_):
            start, values, loss = time.perf_counter(), [], metrics["eval_loss"]
            stop = start + SHARE * (start - self.begin - self.spent) - self.spent
            while state.global_step and len(values) < len(rows) and (more := self.ask(model, rows[len(values) :], stop)):
                values += more
            self.end = time.perf_counter()
            self.spent += self.end - start
            metrics["eval_task"] = -1.0 - loss
            if values:
                common = min(len(values), len(self.best) or len(values))
                metrics["eval_task"] = sum(values[:common]) / common - 1e-6 * loss
                if self.best:
                    state.best_metric = sum(self.best[:common]) / common - 1e-6 * self.loss
                if state.best_metric is None or metrics["eval_task"] > state.best_metric:
                    self.best, self.loss, self.step = values, loss, state.global_step
                self.looks += 1
                self.trainer.log({"eval_task": sum(values) / len(values), "eval_task_rows": len(values)})

        def ask(self, model, left, stop) -> list[float]:
            """Values of the first few rows; none where time is too short for them, or ran out over them."""
            start, training = time.perf_counter(), model.training
            part = left[: min(settings.evaluate.batch_size, int((stop - start) / self.each)) if self.each else 4]
            if not part or start >= stop:
                return []
            texts = [render(tokenizer, prompt_messages(contract, row), add_generation_prompt=True) for row in part]
            how = {"add_special_tokens": False, "padding": True, "padding_side": "left", "return_tensors": "pt"}
            batch = tokenizer(texts, **how).to(model.device)
            model.eval()
            with torch.no_grad():
                given = model.generate(
                    **batch, max_new_tokens=settings.evaluate.max_new_tokens, do_sample=False, use_cache=True,
                    eos_token_id=sorted(stops), pad_token_id=tokenizer.pad_token_id, max_time=stop - start,
                )  # fmt: skip
            model.train(training)
            now, each = time.perf_counter(), (time.perf_counter() - start) / len(part)
            self.each = each if now < stop else 2 * max(self.each, each)  # cut off: they would have taken longer
            answers = tokenizer.batch_decode(given[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
            judged = [score_row(contract, row, Answer(text, 0.0)).value for row, text in zip(part, answers, strict=True)]
            return judged if now < stop else []

        def summary(self) -> dict:
            """Best value, its step and rows, and the share of the training time that all looks took."""
            best = {"task_best": sum(self.best) / len(self.best), "best_step": self.step} if self.best else {}
            share = self.spent / max(1e-9, self.end - self.begin - self.spent)
            return {**best, "task_rows": len(self.best), "task_looks": self.looks, "task_share": round(share, 4)}

    return TaskMetric()


def general_loss(model, tokenizer) -> float:
    """The loss (nats per answer token) on PROBE, everyday questions that have nothing to do with the task."""
    import torch

    training, found = model.training, []
    model.eval()
    for question, answer in PROBE.items():
        asked = render(tokenizer, [{"role": "user", "content": question}], add_generation_prompt=True)
        ids, rest = (tokenizer(t, add_special_tokens=False)["input_ids"] for t in (asked, answer))
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids + rest], device=model.device)).logits[0, len(ids) - 1 : -1].float()
        found.append(torch.nn.functional.cross_entropy(logits, torch.tensor(rest, device=logits.device)).item())
    model.train(training)
    return sum(found) / len(found)


def write_log(history: list[dict], path: Path) -> Path:
    """The trainer's log history as CSV, one line per logged step; empty where a step has no such value."""
    import pandas as pd

    logged = (entry for entry in history if {"loss", "eval_loss", "eval_task"} & entry.keys())
    lines = [{"mean_token_accuracy": entry.get("eval_mean_token_accuracy"), **entry} for entry in logged]
    return write_text(path, pd.DataFrame(lines, columns=COLUMNS, dtype=object).to_csv(index=False, lineterminator="\n"))


def plot_loss(history: list[dict], path: Path) -> Path:
    """The loss on training batches and on dev_internal over the steps, and the task metric where it was asked for, as
    a PNG file."""
    from slm.curate.plots import figure, save

    drawn, axes = figure(7, 3.5)
    for key, label, style in (("loss", "train, per batch", "-"), ("eval_loss", "dev_internal", "o-")):
        points = [(e["step"], e[key]) for e in history if key in e]
        axes.plot([step for step, _ in points], [loss for _, loss in points], style, label=label, markersize=4)
    axes.set(xlabel="optimizer step", ylabel="loss (nats per answer token)", yscale="log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.3, which="both")
    if task := [(e["step"], e["eval_task"]) for e in history if "eval_task" in e]:
        right = axes.twinx()
        right.plot(*zip(*task, strict=True), "s--", color="C2", label="dev_internal, task metric (right)", markersize=4)
        right.set(ylabel="task metric, real answers", ylim=(0, 1.03))
    drawn.legend(loc="outside upper center", ncols=3, fontsize=8, frameon=False)
    return save(drawn, path)
