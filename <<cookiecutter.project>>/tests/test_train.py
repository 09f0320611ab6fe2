"""Training: what is trained on, what the trainers are told, resuming, records, and both trainers for real on the tiny model."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from slm import registry
from slm.errors import SlmError
from slm.models import base_folder
from slm.rows import make_row, write_json, write_rows
from slm.settings import load_settings
from slm.train import (
    encode,
    estimate,
    in_force,
    load_tokenizer,
    lora_arguments,
    preview,
    recipe_hash,
    sft_arguments,
    train,
)
from slm.train.encode import Example, stop_ids
from slm.train.load import load
from slm.train.sft import newest_checkpoint
from task.contract import contract

SMOKE = {
    "model": {"base": "tiny"},
    "train": {
        "trainer": "trl", "method": "lora", "load_in_4bit": False, "precision": "fp32", "optimizer": "adamw_torch",
        "packing": False, "gradient_checkpointing": False, "max_steps": 4, "batch_size_per_device": 4, "learning_rate": 5e-3,
        "gradient_accumulation_steps": 1, "eval_steps": 2, "save_steps": 2, "max_seq_length": 256, "lora_dropout": 0.0,
    },
}  # fmt: skip
WORDS = "printer cable invoice window teapot ladder forest garage violin harbour pepper marble".split()


def row(n: int, **more):
    """A row with a real answer of the starter's contract."""
    answer = {"category": "bug", "priority": "low", "product": None, "order_id": None, "refund_requested": False, "language": "en"}
    if contract.name != "support_triage":
        return make_row(f"the {WORDS[n % 12]} {n}", '{"tool":"none","arguments":{}}', category="none", **more)
    return make_row(f"My {WORDS[n % 12]} number {n} broke " * (1 + n % 3), contract.dump(answer), category="bug", **more)


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project with sixteen training rows and baselines that count as measured."""
    (tmp_path / "training/configs").mkdir(parents=True)
    (tmp_path / "training/configs/train_config.yaml").write_text("epochs: 1\n")
    (tmp_path / "project.yaml").write_text(yaml.safe_dump(SMOKE))
    write_rows(tmp_path / "data/accepted/train.jsonl", [row(n) for n in range(16)])
    write_rows(tmp_path / "data/accepted/dev_internal.jsonl", [row(n) for n in range(16, 22)])
    monkeypatch.setattr("slm.evaluate.baselines.require_baselines", lambda settings: None)
    return tmp_path


def settings_of(project, run_id="r1", **overrides):
    """The project's settings with train overrides."""
    return load_settings(start=project, run_id=run_id, overrides={f"train.{k}": v for k, v in overrides.items()})


@pytest.fixture
def tokens(project):
    """Tokenizer and stop tokens of the tiny model."""
    tokenizer = load_tokenizer(settings_of(project))
    return tokenizer, stop_ids(settings_of(project), tokenizer)


def test_only_the_answer_and_its_stop_token_are_trained(tokens):
    """Guards against training on the system prompt or the message, and against a model that never stops."""
    tokenizer, stops = tokens
    [example] = encode([row(0)], contract, tokenizer, stops, 256)
    trained = [t for t in example.labels if t != -100]
    assert tokenizer.decode(trained) == row(0).answer + "<|im_end|>"
    assert trained == example.input_ids[-len(trained) :]
    prompt = tokenizer.apply_chat_template(contract.messages(row(0))[:-1], tokenize=False, add_generation_prompt=True)
    masked = example.input_ids[: -len(trained)]
    assert masked == tokenizer(prompt, add_special_tokens=False)["input_ids"]


def test_a_long_row_is_refused_by_name_and_count(tokens):
    """Guards against TRL's silent cut, which would train half a JSON object."""
    tokenizer, stops = tokens
    with pytest.raises(SlmError, match=rf"^1 rows \({row(2).id} \(\d+\)\): longer than max_seq_length"):
        encode([row(0), row(2)], contract, tokenizer, stops, len(encode([row(0)], contract, tokenizer, stops, 256)[0].input_ids))


@pytest.mark.parametrize(
    ("template", "cause"),
    [
        ("{{ messages|length }}{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}", "renders the prompt otherwise"),
        ("{% for m in messages %}{{ m.content }}<|im_start|>{% endfor %}", "no stop token after the answer"),
    ],
)
def test_a_template_that_breaks_the_mask_is_refused(tokens, template, cause):
    """Guards against masks cut at the wrong place, and against a stop token that is never trained."""
    tokenizer, stops = tokens
    tokenizer.chat_template = template
    with pytest.raises(SlmError, match=cause):
        encode([row(0), row(1)], contract, tokenizer, stops, 256)


def test_a_template_that_adds_to_the_answer_is_refused(tokens):
    """Guards against an empty thinking block that is taught with every answer."""
    tokenizer, stops = tokens
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}\n{% if m.role == 'assistant' %}<think>\n</think>\n{% endif %}{{ m.content }}"
        "<|im_end|>{% endfor %}{% if add_generation_prompt %}assistant\n{% endif %}"
    )
    rows = [row(0)]
    with pytest.raises(SlmError, match="not on its answer"):
        preview(rows, encode(rows, contract, tokenizer, stops, 256), contract, tokenizer, stops)


def test_the_preview_refuses_a_mask_of_nothing_of_everything_and_without_the_stop(tokens):
    """Guards against fully masked rows, which trainers drop without a word, and against unmasked prompts."""
    tokenizer, stops = tokens
    rows = [row(n) for n in range(4)]
    examples = encode(rows, contract, tokenizer, stops, 256)
    shown = preview(rows, examples, contract, tokenizer, stops)
    assert len(shown) == 3 and shown[0]["trained"].endswith("}<|im_end|>") and shown[0]["raw"].endswith(rows[0].answer)
    ids = examples[0].input_ids
    for labels, problem in (([-100] * len(ids), "0%"), (ids, "100%"), (examples[0].labels[:-1] + [-100], "stop token")):
        with pytest.raises(SlmError, match=problem):
            preview(rows[:1], [Example(rows[0].id, ids, labels)], contract, tokenizer, stops)


def test_every_argument_exists_in_the_installed_trainers(project):
    """Guards against a library that renames an argument: TRL dropped max_seq_length and warmup_ratio that way."""
    from peft import LoraConfig
    from trl import SFTConfig

    settings = settings_of(project)
    made = SFTConfig(**sft_arguments(settings, project / "out", 16))
    assert made.max_length == 256 and made.train_sampling_strategy == "group_by_length" and made.warmup_steps == 0.03
    assert made.load_best_model_at_end and made.get_warmup_steps(100) == 3
    assert LoraConfig(**lora_arguments(settings)).r == 16


def test_the_recipe_arrives_under_the_trainers_names(project):
    """Guards against a setting that changes nothing."""
    changed = sft_arguments(settings_of(project, batch_size_per_device=2, weight_decay=0.3, lr_scheduler="linear"), project, 16)
    assert (changed["per_device_train_batch_size"], changed["weight_decay"], changed["lr_scheduler_type"]) == (2, 0.3, "linear")
    assert lora_arguments(settings_of(project, lora_rank=4, lora_alpha=8))["lora_alpha"] == 8


def test_adapters_sit_on_the_upper_layers_only_when_so_asked(project):
    """Guards against adapters on the wrong end of the model, and against a crash on a model with fewer layers."""
    settings = settings_of(project, lora_layers=1)
    names = [name for name, weight in load(settings).named_parameters() if weight.requires_grad]
    depth = json.loads((base_folder(settings) / "config.json").read_text())["num_hidden_layers"]
    assert names and all(f".layers.{depth - 1}." in name for name in names)
    assert lora_arguments(settings_of(project, lora_layers=99))["layers_to_transform"] == list(range(depth))


def test_what_this_machine_cannot_do_is_not_in_force(project):
    """Guards against packed samples that read each other, and against 8-bit optimizers that need a GPU."""
    import torch

    if torch.cuda.is_available():
        pytest.skip("a GPU is here: packing and 8-bit optimizers may be in force")
    force = in_force(settings_of(project, packing=True, optimizer="paged_adamw_8bit"))
    assert (force["packing"], force["optimizer"]) == (False, "adamw_torch")


def test_contradicting_settings_are_refused(project):
    """Guards against a "QLoRA" run that was none, and against checkpoints that miss the best step."""
    with pytest.raises(SlmError, match="load_in_4bit"):
        in_force(settings_of(project, method="qlora"))
    with pytest.raises(SlmError, match="multiple of eval_steps"):
        sft_arguments(settings_of(project, save_steps=3), project, 16)


def test_the_estimate_counts_steps_and_tokens(project, tokens):
    """Guards against an estimate that ignores accumulation or epochs."""
    examples = encode([row(n) for n in range(16)], contract, *tokens, 256)
    plan = estimate(settings_of(project, max_steps=-1, epochs=3, gradient_accumulation_steps=2), examples)
    assert plan["steps"] == 6 and plan["tokens"] == 3 * sum(len(e.input_ids) for e in examples)
    assert 0 < plan["share trained on"] < 1


def test_training_refuses_without_baselines_or_rows(project, monkeypatch):
    """Guards against a result that nothing can be compared with."""
    (project / "data/accepted/dev_internal.jsonl").unlink()
    with pytest.raises(SlmError, match="04_curate"):
        train(settings_of(project), contract)
    monkeypatch.undo()
    with pytest.raises(SlmError, match="02_baseline"):
        train(settings_of(project), contract)
    assert [r["status"] for r in registry.read(settings_of(project), "runs")] == ["failed"] * 2


def test_a_run_leaves_adapter_settings_curve_log_and_record(project):
    """Guards against weights that nobody can trace to data, recipe and base."""
    from safetensors import safe_open

    settings = settings_of(project)
    registry.append(settings, "datasets", {
        "version": "v1", "split": {"files": {n: registry.file_hash(project / f"data/accepted/{n}.jsonl")[:16]
                                             for n in ("train", "dev_internal", )}}})  # fmt: skip
    record = train(settings, contract)
    out = project / "outputs/adapters/r1"
    assert {"adapter_config.json", "adapter_model.safetensors", "settings.yaml", "training_log.csv", "training_loss.png",
            "tokenizer.json"} <= {f.name for f in out.iterdir()}  # fmt: skip
    assert not (out / "checkpoints").exists()
    assert record["status"] == "completed" and record["parents"]["dataset"] == "v1"
    assert record["metrics"]["steps"] == 4 and record["metrics"]["dev_loss_best"] < record["metrics"]["dev_loss_first"]
    assert set(record["artefacts"]) >= {f"outputs/adapters/r1/{n}" for n in ("adapter_model.safetensors", "training_log.csv")}
    assert registry.read(settings, "runs")[-1] == record and yaml.safe_load((out / "settings.yaml").read_text())["run_id"] == "r1"
    with safe_open(out / "adapter_model.safetensors", "pt") as weights:
        assert any(weights.get_tensor(key).abs().sum() > 0 for key in weights.keys() if "lora_B" in key)
    log = list(csv.DictReader((out / "training_log.csv").open()))
    assert [line["step"] for line in log if line["eval_loss"]] == ["0", "2", "4"]


def test_a_failing_run_is_closed_as_failed(project, monkeypatch):
    """Guards against a run that vanishes from the registry when it breaks."""
    monkeypatch.setattr("slm.train.load.load", lambda settings: (_ for _ in ()).throw(ValueError("a bug")))
    with pytest.raises(ValueError):
        train(settings_of(project), contract)
    record = registry.read(settings_of(project), "runs")[-1]
    assert record["status"] == "failed" and record["error"] == "ValueError: a bug" and record["parents"]["base"] == "tiny"


def test_a_checkpoint_of_another_recipe_or_a_torn_one_is_not_resumed(project):
    """Guards against going on with weights of other data, and against a checkpoint that a kill cut off."""
    folder = project / "checkpoints"
    for step, whole in ((2, True), (10, True), (12, False)):
        (folder / f"checkpoint-{step}").mkdir(parents=True)
        if whole:
            (folder / f"checkpoint-{step}/trainer_state.json").write_text("{}")
    assert newest_checkpoint(folder, "aaa") is None
    write_json(folder / "recipe.json", {"hash": "aaa"})
    assert newest_checkpoint(folder, "aaa").name == "checkpoint-10" and newest_checkpoint(folder, "bbb") is None
    assert recipe_hash(settings_of(project)) != recipe_hash(settings_of(project, learning_rate=1e-4))
    assert recipe_hash(settings_of(project), rows="x") != recipe_hash(settings_of(project), rows="y")


SCRIPT = """
import sys
sys.path.insert(0, {root!r})
import slm.evaluate.baselines
slm.evaluate.baselines.require_baselines = lambda settings: None
from slm.settings import load_settings
from slm.train import train
from task.contract import contract
record = train(load_settings(start={project!r}, run_id={run_id!r}, overrides={overrides!r}), contract)
print(record["metrics"]["steps"], record["trainer"])
"""


def start(project, run_id="r1", **overrides):
    """Train in a process of its own."""
    root = str(Path(__file__).resolve().parents[1])
    overrides = {f"train.{k}": v for k, v in overrides.items()}
    code = SCRIPT.format(root=root, project=str(project), run_id=run_id, overrides=overrides)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([sys.executable, "-c", code], cwd=root, env={**os.environ, "OMP_NUM_THREADS": "1"}, **pipes)


@pytest.mark.slow
def test_qlora_takes_real_steps_on_a_4_bit_base(project):
    """Guards against a 4-bit base that is never quantized, or whose weights an evaluation repacks so that nothing is learnt."""
    import torch

    settings = settings_of(project, method="qlora", load_in_4bit=True, precision="bf16")
    model = load(settings)
    weight = next(p for n, p in model.named_parameters() if "down_proj" in n and "lora" not in n)
    assert weight.dtype == torch.uint8
    metrics = train(settings, contract)["metrics"]
    assert metrics["steps"] == 4 and metrics["dev_loss_best"] < metrics["dev_loss_first"]


@pytest.mark.slow
def test_full_fine_tuning_saves_a_whole_model_in_bf16(project):
    """Guards against a full model that evaluation would take for an adapter."""
    train(settings_of(project, method="full"), contract)
    out = project / "outputs/adapters/r1"
    assert (out / "config.json").is_file() and not (out / "adapter_config.json").exists()
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
