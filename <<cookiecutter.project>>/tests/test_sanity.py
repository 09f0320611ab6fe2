"""The sanity check, the task metric while training, memory and disk before it, bad input; planted faults."""

import csv
import json
import shutil
from contextlib import ExitStack
from types import SimpleNamespace

import pytest
import test_train
import yaml
from servers import double
from test_train import SMOKE, WORDS, contract, settings_of
from typer.testing import CliRunner

from slm import registry
from slm.errors import SlmError
from slm.models import base_folder
from slm.rows import make_row, read_rows, write_rows
from slm.train import callbacks, encode, load_tokenizer, recipe, sft_arguments, train
from slm.train.callbacks import SHARE, general_loss, task_metric
from slm.train.encode import Example, stop_ids
from slm.train.load import load
from slm.train.sanity import sanity

project = test_train.project
VALUES = [("bug", "low"), ("bug", "high"), ("billing", "low"), ("billing", "high")]


def row(n: int, **more):
    """A row whose answer differs from its neighbours'."""
    if contract.name != "support_triage":
        return make_row(f"the {WORDS[n % 12]} {n}", '{"tool":"none","arguments":{}}', category="none", **more)
    label, priority = VALUES[n % 4]
    answer = {"category": label, "priority": priority, "product": None, "order_id": None, "refund_requested": False, "language": "en"}
    return make_row(f"{WORDS[n % 12]} {WORDS[(5 * n + 1) % 12]}", contract.dump(answer), category=label, **more)


def fill(folder, rows):
    """Training rows of a project."""
    write_rows(folder / "data/accepted/train.jsonl", rows)


def runs(folder):
    """The project's run records."""
    return registry.read(settings_of(folder), "runs")


# The sanity check. The tiny model's random embeddings are so small that every probability stays near 1 / vocabulary;
# fifteen times as large they tell tokens apart, and four rows can be learnt, which is what two layers hold in a minute.
LEARNS = {"method": "full", "learning_rate": 5e-3, "batch_size_per_device": 2, "eval_steps": 50, "save_steps": 50}


def loud(project):
    """The tiny model with larger embeddings as the project's base."""
    import torch
    from transformers import AutoModelForCausalLM

    source, target = base_folder(settings_of(project)), project / "base"
    shutil.copytree(source, target)
    model = AutoModelForCausalLM.from_pretrained(source)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(15)
    model.save_pretrained(target)
    (project / "project.yaml").write_text(yaml.safe_dump({**SMOKE, "model": {"base": str(target)}}))


def test_rows_that_can_be_learnt_pass_the_sanity_check(project, monkeypatch):
    """Guards against a check that nothing passes, and against an adapter or a run that it leaves behind."""
    loud(project)
    fill(project, [row(n) for n in range(4)])
    monkeypatch.setattr("slm.train.sanity.EPOCHS", 80)  # rounds, where a trained base needs a quarter
    record = sanity(settings_of(project, **LEARNS), contract, 4)
    assert record["metrics"]["exact"] == record["metrics"]["rows"] == 4
    assert (runs(project)[-1]["stage"], runs(project)[-1]["status"]) == ("sanity", "completed")
    assert not (project / "outputs/adapters/r1-sanity").exists()


def test_a_learning_rate_of_nothing_is_named(project):
    """Guards against weeks of data work on a recipe that does not learn."""
    fill(project, [row(n) for n in range(4)])
    with pytest.raises(SlmError, match=r"0 of 4 rows learnt, 95% .* learning rate, too low.* went from \d"):
        sanity(settings_of(project, **{**LEARNS, "learning_rate": 1e-12}), contract, 4)
    assert runs(project)[-1]["status"] == "failed" and "too low" in runs(project)[-1]["error"]


@pytest.mark.parametrize(
    ("keep", "cause"), [(lambda ids, n: [-100] * len(ids), "mask. row .*0%"), (lambda ids, n: [-100] * (n + 5) + ids[n + 5 :], "mask")]
)
def test_a_masked_answer_is_named(project, monkeypatch, keep, cause):
    """Guards against answers that are not, or only half, trained."""

    def masked(*given):
        plain = encode(*given)
        return [Example(e.id, e.input_ids, keep(e.input_ids, e.labels.count(-100))) for e in plain]

    monkeypatch.setattr("slm.train.sft.encode", masked)
    with pytest.raises(SlmError, match=f"likely cause: {cause}"):
        sanity(settings_of(project), contract, 4)


def test_a_wrong_stop_token_is_named(project, tmp_path):
    """Guards against a base whose end token is not the one that its template writes: it would never stop."""
    folder = tmp_path / "base"
    shutil.copytree(base_folder(settings_of(project)), folder)
    for file in ("tokenizer_config.json", "generation_config.json", "config.json"):
        if (folder / file).is_file():
            text = (folder / file).read_text().replace('"eos_token": "<|im_end|>"', '"eos_token": "<|im_start|>"')
            (folder / file).write_text(text.replace('"eos_token_id": 2', '"eos_token_id": 1'))
    (project / "project.yaml").write_text(yaml.safe_dump({**SMOKE, "model": {"base": str(folder)}}))
    with pytest.raises(SlmError, match="likely cause: template, its stop token"):
        sanity(settings_of(project), contract, 4)


def test_rows_that_nothing_could_learn_are_named(project):
    """Guards against blaming the recipe for two answers to one message."""
    fill(project, [row(0), row(0).model_copy(update={"id": "again"}).answered(row(1).answer)])
    if row(0).answer != row(1).answer:
        with pytest.raises(SlmError, match="data format.*one message, two answers"):
            sanity(settings_of(project), contract)
    fill(project, [make_row("hello", "Sure!", category="bug")])
    with pytest.raises(SlmError, match="data format.*breaks the contract"):
        sanity(settings_of(project), contract)


def test_the_commands_print_one_sentence_and_fail(project, monkeypatch):
    """Guards against a pipeline that goes on after a failed check."""
    from slm.cli import app

    monkeypatch.chdir(project)
    fill(project, [make_row("hello", "Sure!", category="bug")])
    for command in (["sanity", "--rows", "4"], ["diagnose", "nothing"]):
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 1 and isinstance(done.exception, SlmError), done.output


# The task metric.


class Clock:
    """A clock that only moves when it is told to."""

    now = 0.0

    def perf_counter(self):
        return self.now


def looks(project, monkeypatch, right, seconds_per_row, step_seconds, steps=6, rows=12):
    """Evaluate every `step_seconds` with a model that takes `seconds_per_row`, and answers row n rightly at step s where
    right(s, n); returns the callback, what it gave the trainer, and rows asked per look."""
    import torch

    clock, settings = Clock(), settings_of(project)
    monkeypatch.setattr("slm.train.callbacks.time", clock)
    tokenizer, own = load_tokenizer(settings), [row(n, id=f"d{n}") for n in range(rows)]
    watching = task_metric(settings, contract, tokenizer, stop_ids(settings, tokenizer), own)
    watching.trainer = SimpleNamespace(log=lambda logs: logged.append(logs))
    state, given, logged, texts = SimpleNamespace(global_step=0, best_metric=None), [], [], {}
    for r in own:
        texts[tokenizer.apply_chat_template(contract.messages(r)[:-1], tokenize=False, add_generation_prompt=True)] = r

    class Student(torch.nn.Module):
        device = "cpu"

        def generate(self, input_ids, attention_mask, max_time, **_):
            clock.now += min(max_time, len(input_ids) * seconds_per_row)
            asked = [texts[tokenizer.decode(i[m.bool()])] for i, m in zip(input_ids, attention_mask, strict=True)]
            said = [r.answer if right(state.global_step, int(r.id[1:])) else "no" for r in asked]
            return torch.cat([input_ids, tokenizer(said, padding=True, return_tensors="pt")["input_ids"]], 1)

    student = Student()
    watching.on_train_begin(None, state, None)
    for step in range(steps + 1):
        state.global_step = step
        metrics = {"eval_loss": 1.0}
        watching.on_evaluate(None, state, None, metrics, student)
        if step and metrics["eval_task"] > (-1e9 if state.best_metric is None else state.best_metric):
            state.best_metric = metrics["eval_task"]
        given.append(metrics["eval_task"])
        clock.now += step_seconds
    return watching, given, [entry["eval_task_rows"] for entry in logged]


def test_looks_thin_themselves_to_a_tenth_of_the_training_time(project, monkeypatch):
    """Guards against an evaluation that doubles the time of a training run."""
    quick, _, all_rows = looks(project, monkeypatch, lambda s, n: True, seconds_per_row=0.1, step_seconds=100)
    assert all_rows == [12] * 6 and quick.summary()["task_share"] < 0.02
    slow, _, few = looks(project, monkeypatch, lambda s, n: True, seconds_per_row=2, step_seconds=100)
    assert few[0] == 4 and max(few) < 12 and 0 < slow.summary()["task_share"] <= SHARE
    never, given, none = looks(project, monkeypatch, lambda s, n: True, seconds_per_row=1000, step_seconds=100)
    assert none == [] and never.summary()["task_share"] <= SHARE * 1.01 and given[1:] == [-2.0] * 6


def test_checkpoints_are_compared_on_the_rows_that_both_answered(project, monkeypatch):
    """Guards against a checkpoint that wins because its look took easier rows; ties go to the lower loss, so the first."""
    watching, given, rows = looks(project, monkeypatch, lambda s, n: n in (0, 4), seconds_per_row=1.3, step_seconds=60)
    assert rows[0] == 4 and max(rows) == 5  # the fifth row is right, and no reason to take a later checkpoint
    assert watching.summary()["best_step"] == 1 and given[1] == pytest.approx(0.25, abs=1e-5)
    better, _, _ = looks(project, monkeypatch, lambda s, n: s == 3, seconds_per_row=0.1, step_seconds=60)
    assert better.summary()["best_step"] == 3 and better.summary()["task_best"] == 1


def test_the_task_metric_of_a_real_run_is_in_its_log_and_record(project, monkeypatch):
    """Guards against a choice by numbers that no answer stands behind, and against looks at an evaluation set."""
    asked = []
    monkeypatch.setattr(callbacks, "score_row", lambda c, r, a: (asked.append(r.id), SimpleNamespace(value=0.5))[1])
    monkeypatch.setattr(callbacks, "SHARE", 1e6)  # four steps leave no time, on a busy machine least
    metrics = train(settings_of(project, early_stopping_metric="task"), contract)["metrics"]
    assert asked and {*asked} <= {r.id for r in read_rows(project / "data/accepted/dev_internal.jsonl")}
    assert metrics["task_best"] == 0.5 and metrics["task_looks"] == 2 and metrics["best_step"] in (2, 4) and metrics["task_share"] > 0
    log = list(csv.DictReader((project / "outputs/adapters/r1/training_log.csv").open()))
    assert [line["step"] for line in log if line["eval_task"]] == ["2", "4"]
    assert {"general_loss_first", "general_loss_final", "longest_row"} <= metrics.keys()


def test_every_generation_argument_exists_in_the_installed_transformers(project):
    """Guards against an argument that generation drops, such as the time that a look may take."""
    from transformers import GenerationConfig

    known = GenerationConfig()
    assert all(hasattr(known, n) for n in ("max_new_tokens", "do_sample", "use_cache", "eos_token_id", "pad_token_id", "max_time"))
    made = sft_arguments(settings_of(project, early_stopping_metric="task"), project, 16)
    assert (made["metric_for_best_model"], made["greater_is_better"]) == ("eval_task", True)


def test_the_general_probe_moves_when_the_weights_do(project):
    """Guards against a probe that reads nothing."""
    import torch

    model, tokenizer = load(settings_of(project, method="full")), load_tokenizer(settings_of(project))
    before = general_loss(model, tokenizer)
    torch.nn.init.normal_(model.lm_head.weight)
    assert 10 < before < 12 and general_loss(model, tokenizer) > before + 1


def test_a_row_of_an_evaluation_set_is_never_trained_on_or_chosen_by(project):
    """Guards against a checkpoint that was chosen on dev, test or golden."""
    own = row(3)
    write_rows(project / "data/accepted/dev_internal.jsonl", [own])
    write_rows(project / "data/eval/golden.jsonl", [own.model_copy(update={"id": "golden-1"})])
    with pytest.raises(SlmError, match=f"row {own.id} stands in data/eval"):
        train(settings_of(project), contract)


# Memory, disk and bad input: one clear error each, the record closed as failed.


@pytest.fixture
def with_bf16(monkeypatch):
    """A machine that computes in bfloat16, whatever this one does."""
    import torch

    monkeypatch.setattr(recipe, "compute_dtype", lambda: torch.bfloat16)


def test_a_machine_that_only_emulates_bf16_trains_in_fp32(project, monkeypatch):
    """Guards against minutes that become an hour on a CPU without AVX-512."""
    import torch

    monkeypatch.setattr(recipe, "compute_dtype", lambda: torch.float32)
    assert recipe.in_force(settings_of(project, precision="bf16"))["precision"] == "fp32"
    monkeypatch.setattr(recipe, "compute_dtype", lambda: torch.bfloat16)
    assert recipe.in_force(settings_of(project, precision="bf16"))["precision"] == "bf16"


def test_the_memory_estimate_counts_what_is_really_there(project, with_bf16):
    """Guards against an estimate that has nothing to do with the model."""
    examples = [Example("a", [1] * 100, [-100] * 50 + [1] * 50)]
    model = load(settings_of(project))
    base = sum(p.numel() for n, p in model.named_parameters() if "lora" not in n)
    adapters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    need = recipe.memory(settings_of(project), examples)
    assert need["weights"] == 4 * base and need["adapters"] == 4 * adapters and need["optimizer"] == 8 * adapters
    whole = recipe.memory(settings_of(project, method="full"), examples)
    assert whole["optimizer"] == 8 * base and whole["adapters"] == 0
    assert recipe.memory(settings_of(project, batch_size_per_device=8), examples)["logits"] == 2 * need["logits"]
    small = recipe.memory(settings_of(project, gradient_checkpointing=True), examples * 2)
    assert small["activations"] < need["activations"]
    packed = recipe.memory(settings_of(project, method="qlora", load_in_4bit=True, precision="bf16"), examples)
    assert packed["weights"] < 2 * base


@pytest.mark.parametrize("changed", [{}, {"precision": "bf16"}, {"precision": "bf16", "lora_dropout": 0.05}])
def test_the_estimated_activations_are_those_that_torch_keeps(project, changed, with_bf16):
    """Guards against a formula of another architecture: it said two thirds of what a run really took."""
    import torch

    settings, kept = settings_of(project, lora_rank=1, **changed), {}
    model = load(settings).train()
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(tensor):
        if (storage := tensor.untyped_storage()).data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, or its address would be used again
        return tensor

    ids, half = torch.ones(4, 200, dtype=torch.long), recipe.in_force(settings)["precision"] == "bf16"
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), torch.autocast("cpu", torch.bfloat16, enabled=half):
        model.base_model.model.model(input_ids=ids, attention_mask=ids)
    need = recipe.memory(settings, [Example("a", [1] * 200, [-100] * 199 + [1])], batch=4)["activations"]
    assert sum(size for size, _ in kept.values()) == pytest.approx(need, rel=0.25)


def no_memory(patch, folder):
    patch.setattr(recipe, "free_memory", lambda: 1e6)


def no_disk(patch, folder):
    patch.setattr(recipe.shutil, "disk_usage", lambda path: SimpleNamespace(free=10))


def full_disk(patch, folder):
    patch.setattr("slm.train.sft.save", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))


def full_checkpoint(patch, folder):
    """What torch.save says on a full disk (seen on one of three megabytes)."""
    said = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534")
    patch.setattr("transformers.Trainer._save_optimizer_and_scheduler", lambda *_: (_ for _ in ()).throw(said))


def no_dev_rows(patch, folder):
    write_rows(folder / "data/accepted/dev_internal.jsonl", [])


def long_row(patch, folder):
    fill(folder, [row(0), make_row("wire " * 300, row(0).answer, category="bug", id="far-too-long")])


def no_template(patch, folder):
    target = folder / "base"
    shutil.copytree(base_folder(settings_of(folder)), target, ignore=shutil.ignore_patterns("chat_template*"))
    own = json.loads((target / "tokenizer_config.json").read_text())
    (target / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in own.items() if k != "chat_template"}))
    (folder / "project.yaml").write_text(yaml.safe_dump({**SMOKE, "model": {"base": str(target)}}))


def short_context(patch, folder):
    target = folder / "base"
    shutil.copytree(base_folder(settings_of(folder)), target)
    own = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**own, "max_position_embeddings": 32}))
    (folder / "project.yaml").write_text(yaml.safe_dump({**SMOKE, "model": {"base": str(target)}}))


SERVERS = ExitStack()


def hub(status, code):
    """A Hub on this machine that answers every request with this status and error code, as the real one does."""

    def plant(patch, folder):
        address = SERVERS.enter_context(double(lambda _: (status, b"", {"X-Error-Code": code})))
        patch.setattr("huggingface_hub.constants.ENDPOINT", address)
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        (folder / "project.yaml").write_text(yaml.safe_dump({**SMOKE, "model": {"base": "nobody/nothing"}}))

    return plant


@pytest.mark.parametrize(
    ("plant", "error"),
    [
        (lambda patch, folder: fill(folder, []), "no accepted rows; run 04_curate"),
        (no_memory, "training needs about .* GB .*: a smaller model.base"),
        (no_disk, "checkpoints need .* make room"),
        (full_disk, "no room on this disk"),
        (full_checkpoint, "no room on this disk"),
        (no_dev_rows, "dev_internal.jsonl: no accepted rows; run 04_curate"),
        (long_row, r"1 rows \(far-too-long \(\d+\)\): longer than max_seq_length 256"),
        (no_template, "no chat template"),
        (short_context, "tokens, .*base reads 32; shorten"),
        (hub(404, "RepoNotFound"), "the Hub has no such model"),
        (hub(401, "GatedRepo"), "gated; accept its licence on the Hub, then set HF_TOKEN"),
    ],
)
def test_bad_input_gives_one_clear_error_and_a_failed_record(project, monkeypatch, plant, error):
    """Guards against a traceback at midnight, a run that vanishes from the registry, and an earlier adapter, its log
    included, that a failed second run has taken with it."""
    out = project / "outputs/adapters/r1"
    for name in ("adapter_model.safetensors", "settings.yaml", "training_log.csv", "training_loss.png"):
        out.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(f"the {name} of an earlier run")
    with SERVERS:
        plant(monkeypatch, project)
        with pytest.raises(SlmError, match=error):
            train(settings_of(project), contract)
    assert [r["status"] for r in runs(project)] == ["failed"] and runs(project)[0]["run_id"] == "r1"
    kept = {f.name: f.read_text() for f in out.iterdir() if f.is_file()}
    assert len(kept) == 4 and all(text == f"the {name} of an earlier run" for name, text in kept.items())


def test_a_loss_that_is_no_number_stops_the_run_at_once(project, monkeypatch):
    """Guards against hours of NaN, which the trainer hides behind an average unless it is told not to."""
    import trl

    plain, steps = trl.SFTTrainer.training_step, []

    def step(self, *given):
        steps.append(self.state.global_step)
        return plain(self, *given) * (float("nan") if len(steps) == 2 else 1)

    monkeypatch.setattr(trl.SFTTrainer, "training_step", step)
    with pytest.raises(SlmError, match=r"the loss is nan at step 2; lower train.learning_rate"):
        train(settings_of(project, max_steps=20), contract)
    assert len(steps) == 2 and runs(project)[-1]["status"] == "failed"


def test_out_of_memory_halves_the_batch_and_keeps_the_rows_per_step(project, monkeypatch, capsys):
    """Guards against a run that dies, or that goes on with another effective batch without a word."""
    import torch
    import trl

    plain, seen = trl.SFTTrainer.training_step, []

    def step(self, model, inputs, *rest):
        seen.append(len(inputs["input_ids"]))
        if seen[-1] > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return plain(self, model, inputs, *rest)

    monkeypatch.setattr(trl.SFTTrainer, "training_step", step)
    record = train(settings_of(project, max_steps=2), contract)
    assert seen[:2] == [4, 2] and {*seen[2:]} == {1}
    assert (record["recipe"]["batch_size_per_device"], record["recipe"]["gradient_accumulation_steps"]) == (1, 4)
    assert record["metrics"]["steps"] == 2 and "batch_size_per_device 2 and gradient_accumulation_steps 2" in capsys.readouterr().out
    odd = recipe.halved(settings_of(project, batch_size_per_device=9)).train
    assert (odd.batch_size_per_device, odd.gradient_accumulation_steps) == (3, 3)


def test_memory_that_never_suffices_is_one_sentence(project, monkeypatch):
    """Guards against halving for ever."""
    monkeypatch.setattr("slm.train.load.load", lambda settings: (_ for _ in ()).throw(MemoryError("no room")))
    with pytest.raises(SlmError, match="out of memory with one row at a time"):
        train(settings_of(project), contract)
    assert runs(project)[-1]["status"] == "failed"
