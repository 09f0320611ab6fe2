"""The two trainers: one recipe, read alike; every keyword known to the installed packages; Qwen3's two kinds of template;
several processes, kills, 4 bits and checkpointed gradients, for real on the tiny model."""
# ruff: noqa: F811  (fixtures are imported)

import ast
import csv
import importlib.util
import inspect
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import yaml
from families import FAMILIES, make_tokenizer
from test_train import project, row, settings_of, start  # noqa: F401

from slm import registry
from slm.errors import SlmError
from slm.evaluate import baselines
from slm.export.merge import pin_template
from slm.rows import digest, write_json, write_rows
from slm.train import encode, in_force, load_tokenizer, lora_arguments, preview, sft_arguments, train
from slm.train.encode import render
from slm.train.load import SCRIPTS, load, script
from slm.train.recipe import memory, total_steps
from slm.train.sft import prepare, training_rows
from task.contract import contract

ROOT = Path(__file__).resolve().parents[1]


def functions(name: str) -> dict[str, ast.FunctionDef]:
    """The functions of a training script, in their order."""
    tree = ast.parse((ROOT / "training" / name).read_text(encoding="utf-8"))
    return {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_the_training_scripts_are_twins():
    """Guards against two trainers that drift apart: another option, another default, a step that only one of them takes."""
    plain, unsloth = (functions(name) for name in SCRIPTS.values())
    assert list(plain) == list(unsloth) == ["load_model", "make_trainer", "main"]
    for name in plain:
        assert ast.dump(plain[name].args) == ast.dump(unsloth[name].args), name
        assert ast.get_docstring(plain[name]) == ast.get_docstring(unsloth[name]), name
    assert ast.dump(plain["make_trainer"]) == ast.dump(unsloth["make_trainer"])
    main = ast.unparse(plain["main"])
    assert main.count("'trl'") == 1 and main.replace("'trl'", "'unsloth'") == ast.unparse(unsloth["main"])
    steps = [[n for n in ast.walk(f["load_model"]) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)] for f in (plain, unsloth)]
    named = [list(dict.fromkeys(n.id for n in sorted(found, key=lambda n: (n.lineno, n.col_offset)))) for found in steps]
    assert [[name for name in names if name in named[1 - k]] for k, names in enumerate(named)] == [["force", "full", "dtype", "options", "model"]] * 2


def parameters(package: str, file: str, cls: str, function: str) -> set[str]:
    """The named parameters of a method, read in the installed source without importing it; never *args or **kwargs, which
    swallow what nobody knows."""
    found = importlib.util.find_spec(package)
    if found is None:
        pytest.skip(f"the extra `{package}` is not installed")
    tree = ast.parse((Path(found.submodule_search_locations[0]) / file).read_text(encoding="utf-8"))
    body = next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == cls)
    args = next(node.args for node in body if isinstance(node, ast.FunctionDef) and node.name == function)
    return {arg.arg for arg in args.args + args.kwonlyargs}


@pytest.mark.parametrize(("device", "loader", "lora", "swallowed"), [
    ("cpu, 2 threads", ("unsloth_zoo", "cpu/loader.py", "FastCPUModel"), ("unsloth_zoo", "cpu/loader.py", "FastCPUModel"), "random_state"),
    ("NVIDIA L4", ("unsloth", "models/loader.py", "FastLanguageModel"), ("unsloth", "models/llama.py", "FastLlamaModel"), "attn_implementation"),
])  # fmt: skip
def test_every_keyword_for_unsloth_has_a_name_there(project, monkeypatch, device, loader, lora, swallowed):
    """Guards against an argument that Unsloth's **kwargs swallow without a word, as on a GPU attn_implementation."""
    given = {}

    class Recorder:
        @staticmethod
        def from_pretrained(**options):
            given["from_pretrained"] = options
            return "model", None

        @staticmethod
        def get_peft_model(model, **options):
            given["get_peft_model"] = options

    settings = settings_of(project, trainer="unsloth", lora_layers=1)
    force = in_force(settings) | {"device": device}
    monkeypatch.setattr("slm.train.in_force", lambda settings: force)
    monkeypatch.setitem(sys.modules, "unsloth", SimpleNamespace(FastLanguageModel=Recorder))
    load(settings)
    monkeypatch.undo()
    for name, place in (("from_pretrained", loader), ("get_peft_model", lora)):
        known = parameters(*place, name)
        assert given[name] and given[name].keys() <= known, sorted(given[name].keys() - known)
        assert name == "get_peft_model" or swallowed not in known  # planted: a swallowed name does not count as known


def test_every_keyword_for_trl_and_peft_has_a_name_there(project, monkeypatch):
    """Guards against a renamed argument; transformers and bitsandbytes take any name, so there the effect is looked at."""
    from peft import LoraConfig, get_peft_model
    from transformers import BitsAndBytesConfig
    from trl import SFTConfig, SFTTrainer

    settings = settings_of(project, method="qlora", load_in_4bit=True, precision="bf16")
    known = inspect.signature(SFTConfig).parameters
    assert sft_arguments(settings, project / "out", 16).keys() <= known.keys() and "max_seq_length" not in known
    assert lora_arguments(settings).keys() <= inspect.signature(LoraConfig).parameters.keys()
    for called, taker in (("SFTTrainer", SFTTrainer), ("BitsAndBytesConfig", BitsAndBytesConfig), ("get_peft_model", get_peft_model)):
        nodes = [n for f in functions("train_trl_peft.py").values() for n in ast.walk(f) if isinstance(n, ast.Call) and getattr(n.func, "id", "") == called]
        names = {k.arg for n in nodes for k in n.keywords}
        assert len(nodes) == 1 and names <= inspect.signature(taker).parameters.keys(), called
    model = load(settings)
    assert model.config._attn_implementation == "eager" and model.config.dtype == model.dtype
    how = model.config.quantization_config
    assert (how.bnb_4bit_quant_type, how.bnb_4bit_use_double_quant) == ("nf4", True)


PLAIN, BLOCK = "'<|im_start|>assistant\n' ", "'<|im_start|>assistant\n<think>\n' "
QWEN3_THINKING = FAMILIES["qwen3_2507"].template.replace(PLAIN + "+", BLOCK + "+ '\n</think>\n\n' +").replace(PLAIN, BLOCK)


@pytest.mark.parametrize(("name", "block"), [("qwen3", "<think>\n\n</think>\n\n"), ("qwen3_2507", "")])
def test_the_thinking_block_is_in_the_prompt_or_nowhere(tmp_path, name, block):
    """Guards against an empty thinking block that Qwen3-4B-Instruct-2507 is taught and never had, one that a hybrid is taught
    to write, and a prompt in the runtime that is not the trained one."""
    tokenizer = make_tokenizer(FAMILIES[name], tmp_path)
    rows, stops = [row(n) for n in range(3)], {tokenizer.eos_token_id}
    examples = encode(rows, contract, tokenizer, stops, 1024)
    preview(rows, examples, contract, tokenizer, stops)
    for one, example in zip(rows, examples, strict=True):
        prompt = tokenizer.decode([t for t, label in zip(example.input_ids, example.labels, strict=True) if label == -100])
        assert prompt.endswith(f"<|im_end|>\n<|im_start|>assistant\n{block}") and prompt.count("<think>") == bool(block)
        assert tokenizer.decode([label for label in example.labels if label != -100]) == one.answer + "<|im_end|>"
        messages = contract.messages(one)[:-1]
        assert prompt == render(tokenizer, messages, add_generation_prompt=True)  # what 06 asks
        pinned = make_tokenizer(FAMILIES[name], tmp_path)
        pin_template(pinned)  # what 08 writes; a runtime renders it without any switch
        assert prompt == pinned.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def test_a_checkpoint_that_always_thinks_is_refused(tmp_path):
    """Guards against Qwen3-4B-Thinking-2507, or a training template that always writes the block: the answer would be taught
    with an empty one in front."""
    tokenizer = make_tokenizer(FAMILIES["qwen3_2507"], tmp_path)
    tokenizer.chat_template = QWEN3_THINKING
    assert QWEN3_THINKING.count("<think>") == 2
    stops = {tokenizer.eos_token_id}
    with pytest.raises(SlmError, match="not on its answer"):
        preview([row(0)], encode([row(0)], contract, tokenizer, stops, 1024), contract, tokenizer, stops)


def losses(project, run_id: str) -> tuple[list[float], list[float]]:
    """The training and the dev losses of a run's log."""
    lines = list(csv.DictReader((project / f"outputs/adapters/{run_id}/training_log.csv").open()))
    return [float(x["loss"]) for x in lines if x["loss"]], [float(x["eval_loss"]) for x in lines if x["eval_loss"]]


def weights(project, run_id: str) -> dict:
    """The adapter's tensors."""
    from safetensors.torch import load_file

    return load_file(project / f"outputs/adapters/{run_id}/adapter_model.safetensors")


def kill(process: subprocess.Popen, project, run_id: str, rank: str = "") -> str:
    """Kill a training process, or one of those that it launched, without warning at its first whole checkpoint; the output."""
    folder, deadline = project / f"outputs/adapters/{run_id}/checkpoints", time.time() + 1500
    while not list(folder.glob("checkpoint-*/trainer_state.json")) and process.poll() is None and time.time() < deadline:
        time.sleep(0.02)
    victim = psutil.Process(process.pid)
    if rank:
        victim = next(p for p in victim.children(recursive=True) if p.environ().get("RANK") == rank)
    victim.kill()
    text = process.communicate(timeout=1500)[0]
    assert process.returncode != 0, text[-3000:]
    return text


@pytest.mark.slow
def test_a_killed_run_ends_as_if_it_had_not_been_killed(project):
    """Guards against hours that are lost to a kill, and against a "resume" with other rows, another schedule, fresh optimizer
    moments or another dropout than the run would have had."""
    long = {"max_steps": 40, "lora_dropout": 0.1}
    kill(start(project, **long), project, "r1")
    assert not (project / "registry/runs.jsonl").exists()
    text = (process := start(project, **long)).communicate(timeout=1500)[0]
    assert process.returncode == 0 and "resuming from outputs/adapters/r1/checkpoints/checkpoint-" in text, text[-3000:]
    train(settings_of(project, "whole", **long), contract)
    for resumed, whole in zip(losses(project, "r1"), losses(project, "whole"), strict=True):
        assert resumed == pytest.approx(whole, rel=1e-4)
    resumed, whole = weights(project, "r1"), weights(project, "whole")
    assert all(resumed[name].allclose(whole[name], atol=1e-4) for name in whole)


def prepared(project):
    """The project as a command line finds it: locked sets, baselines, the scripts."""
    for name in registry.SETS:
        write_rows(project / f"data/eval/{name}.jsonl", [row(100 + registry.SETS.index(name))])
    settings = settings_of(project)
    registry.lock_sets(settings)
    write_json(project / "outputs/eval_reports/r1/baselines.json", {"key": baselines._key(settings), "results": []})
    for name in SCRIPTS.values():
        (project / "training" / name).symlink_to(ROOT / "training" / name)
    return project


def launch(project, run_id: str, **train) -> subprocess.Popen:
    """`accelerate launch` with cpu.yaml, as its first line says it."""
    config = ROOT / "training/configs/accelerate/cpu.yaml"
    command = ["-m", "accelerate.commands.launch", "--config_file", str(config), "--main_process_port", "0",
               "training/train_trl_peft.py", "--run-id", run_id]  # fmt: skip
    overrides = [part for key, value in train.items() for part in ("-s", f"train.{key}={value}")]
    return subprocess.Popen([sys.executable, *command, *overrides], cwd=project, env={**os.environ, "OMP_NUM_THREADS": "1"},
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)  # fmt: skip


@pytest.mark.slow
def test_two_processes_train_what_one_would(project):
    """Guards against a launcher that starts one process only, against ranks that go apart, against a record, an adapter or a
    line written twice, and against a run that vanishes from the registry, or cannot go on, when one of the two is killed."""
    recipe = {"max_steps": -1, "epochs": 6, "group_by_length": False}
    kill(launch(prepared(project), "two", batch_size_per_device=2, **recipe), project, "two", rank="1")
    assert [r["status"] for r in registry.read(settings_of(project), "runs")] == ["failed"]
    text = (process := launch(project, "two", batch_size_per_device=2, **recipe)).communicate(timeout=1500)[0]
    assert process.returncode == 0, text[-3000:]
    assert text.count("resuming from outputs/adapters/two/checkpoints/checkpoint-") == text.count("24 steps, about") == 1
    assert text.count("outputs/adapters/two: 24 steps") == text.count("next: 06_evaluate") == 1
    _, record = registry.read(settings_of(project), "runs")
    assert record["status"] == "completed" and record["metrics"]["steps"] == 24 and record["device"].endswith(", 2 processes")
    train(settings_of(project, "one", batch_size_per_device=4, **recipe), contract)
    for of_two, of_one in zip(losses(project, "two"), losses(project, "one"), strict=True):
        assert of_two == pytest.approx(of_one, rel=1e-3)
    of_two, of_one = weights(project, "two"), weights(project, "one")
    assert of_two.keys() == of_one.keys() and all(of_two[name].allclose(of_one[name], atol=1e-3) for name in of_one)
    out = project / "outputs/adapters"
    assert sorted(f.name for f in out.iterdir()) == ["one", "two"] and not (out / "two/checkpoints").exists()
    template = (out / "two/chat_template.jinja").read_text(encoding="utf-8")
    assert record["parents"]["chat_template"] == digest(template)  # the base's own, and saved with what it taught


def test_steps_and_memory_count_the_processes(project, monkeypatch):
    """Guards against twice the steps in the estimate, and against FSDP refused for a base that only fits when shared out."""
    settings, rows = settings_of(project, max_steps=-1, epochs=2, batch_size_per_device=2), [row(n) for n in range(16)]
    examples = prepare(settings, contract, load_tokenizer(settings), training_rows(settings))["train"]
    alone = memory(settings, examples)
    assert total_steps(settings, len(rows)) == 16
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert total_steps(settings, len(rows)) == 6 and memory(settings, examples) == alone
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    shared = memory(settings, examples)
    assert shared["weights"] == pytest.approx(alone["weights"] / 3) and shared["activations"] == alone["activations"]


def test_the_accelerate_configs_hold_what_accelerate_knows(monkeypatch):
    """Guards against a key that accelerate has dropped, and a launcher for another kind of machine than the file says."""
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    kinds = {"single_gpu": (1, "no"), "ddp": (2, "multi_gpu"), "cpu": (2, "multi_gpu"), "fsdp": (2, "use_fsdp")}
    files = sorted((ROOT / "training/configs/accelerate").glob("*.yaml"))
    assert [f.stem for f in files] == sorted(kinds)
    for file in files:
        load_config_from_file(str(file))  # raises for an unknown key
        count, kind = kinds[file.stem]
        args = launch_command_parser().parse_args(["--config_file", str(file), "x.py"])
        known = set(vars(args))
        assert {f"fsdp_{k.removeprefix('fsdp_')}" for k in yaml.safe_load(file.read_text()).get("fsdp_config", {})} <= known
        args, *_ = _validate_launch_command(args)
        assert args.num_processes == count and (kind == "no" or getattr(args, kind)), file.stem


@pytest.mark.slow
@pytest.mark.parametrize("bits", [16, 4])
def test_checkpointed_gradients_are_the_same(project, bits):
    """Guards against checkpointing under frozen embeddings, which trains nothing and says so in a warning at most, in 16 bit
    and in 4."""
    how = {"method": "qlora", "load_in_4bit": True} if bits == 4 else {}
    plain, again = (
        train(settings_of(project, f"r{on}", precision="bf16", gradient_checkpointing=on, max_steps=2, **how), contract)["metrics"]
        for on in (False, True)
    )
    assert again["dev_loss_final"] < again["dev_loss_first"] == plain["dev_loss_first"]
    assert again["dev_loss_final"] == pytest.approx(plain["dev_loss_final"], abs=2e-3)


@pytest.mark.parametrize(("fsdp", "storage"), [("false", "uint8"), ("true", "bfloat16")])
def test_a_4_bit_base_is_packed_as_fsdp_needs_it(project, monkeypatch, fsdp, storage):
    """Guards against FSDP that leaves a whole 4-bit base on each card, since it shares out floating-point tensors alone."""
    import torch

    monkeypatch.setenv("ACCELERATE_USE_FSDP", fsdp)
    monkeypatch.setattr("slm.train.recipe.compute_dtype", lambda: torch.bfloat16)
    model = script(settings_of(project)).load_model(settings_of(project, method="qlora", load_in_4bit=True, precision="bf16"))
    packed = next(p for name, p in model.named_parameters() if "down_proj" in name and "lora" not in name)
    assert type(packed).__name__ == "Params4bit" and packed.dtype == getattr(torch, storage)
    with torch.no_grad():
        assert torch.isfinite(model(input_ids=torch.tensor([[1, 2, 3]])).logits).all()
