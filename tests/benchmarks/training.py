"""Training of a finished project: speed against plain scripts, what each setting gives, memory, sanity, preference."""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROJECT = ROOT / "<<cookiecutter.project>>"
WORK = ROOT / "build" / "training"
ROUNDS, WARM_UP = 4, 1  # a worker's timed steps are cut into rounds; ratios are medians over them
COMMON = {  # no looks and no checkpoints while the steps are timed
    "train.max_steps": -1, "train.epochs": 1, "train.eval_steps": 100_000, "train.save_steps": 100_000,
    "train.early_stopping": False, "train.method": "lora", "train.load_in_4bit": False, "tracker": "csv",
}  # fmt: skip
SPEED = {  # name -> (script, settings); one group, its steps interleaved
    "ours_trl": ("ours", {"train.trainer": "trl"}),
    "plain_trl": ("plain_trl", {}),
    "plain_trl_full_loss": ("plain_trl_full_loss", {}),
    "ours_unsloth": ("ours", {"train.trainer": "unsloth"}),
    "plain_unsloth": ("plain_unsloth", {"train.trainer": "unsloth"}),
}
VARIANTS = {  # one setting changed; each group is interleaved with the profile as it is
    "a": {
        "float32": {"train.precision": "fp32"},
        "dropout_0.05": {"train.lora_dropout": 0.05},
        "all_layers": {"train.lora_layers": 0},
    },
    "b": {
        "4_bit": {"train.method": "qlora", "train.load_in_4bit": True},
        "gradient_checkpointing": {"train.gradient_checkpointing": True},
        "random_order": {"train.group_by_length": False},
    },
    "c": {
        "sdpa_attention": {"attention": "sdpa"},
        "16_rows": {"train.batch_size_per_device": 16},
        "full": {"train.method": "full", "train.learning_rate": 1e-4},
    },
}
PARTS = ("speed", "variants", "task", "sanity", "preference")


# The plain scripts: what the libraries' own pages show, told the same recipe.


def plain_trl(settings, rows, contract, out: Path, full_loss: bool = False) -> None:
    """TRL with a prompt-completion data set; tokens, mask and batches are its own. TRL 1.15 has no kernel for its loss
    on a CPU: there it is given ours, or with `full_loss` the model's own over all positions, as TRL advises."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from slm.models import base_folder
    from slm.train.cpu import patch_trl
    from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer
    from trl import SFTConfig, SFTTrainer

    class OwnLoss(SFTTrainer):
        compute_loss = Trainer.compute_loss

    patch_trl()
    force = in_force(settings)
    dtype = torch.float32 if force["precision"] == "fp32" else torch.bfloat16
    chats = [contract.messages(row) for row in rows]
    load = {"dtype": dtype, "attn_implementation": force["attention"]}
    (OwnLoss if full_loss else SFTTrainer)(
        model=AutoModelForCausalLM.from_pretrained(base_folder(settings), **load),
        args=SFTConfig(**plain_arguments(settings, out), completion_only_loss=True),
        train_dataset=Dataset.from_list([{"prompt": chat[:-1], "completion": chat[-1:]} for chat in chats]),
        processing_class=AutoTokenizer.from_pretrained(base_folder(settings)),
        peft_config=LoraConfig(task_type="CAUSAL_LM", **lora_arguments(settings)),
    ).train()


def plain_unsloth(settings, rows, contract, out: Path) -> None:
    """Unsloth as its notebooks have it: rendered text, then `train_on_responses_only`."""
    import torch
    from datasets import Dataset
    from slm.models import base_folder
    from trl import SFTConfig, SFTTrainer
    from unsloth import FastLanguageModel
    from unsloth.chat_templates import train_on_responses_only

    recipe, force = settings.train, in_force(settings)
    checkpointing = {"use_gradient_checkpointing": recipe.gradient_checkpointing}
    attention = {"attn_implementation": force["attention"]} if force["device"].startswith("cpu") else {}
    model, tokenizer = FastLanguageModel.from_pretrained(
        model_name=str(base_folder(settings)), max_seq_length=recipe.max_seq_length, load_in_4bit=False,
        dtype=torch.float32 if force["precision"] == "fp32" else torch.bfloat16, **checkpointing, **attention,
    )  # fmt: skip
    lora = lora_arguments(settings)
    model = FastLanguageModel.get_peft_model(model, random_state=recipe.seed, **checkpointing, **lora)
    texts = [tokenizer.apply_chat_template(contract.messages(row), tokenize=False) for row in rows]
    trainer = SFTTrainer(
        model=model, args=SFTConfig(**plain_arguments(settings, out), dataset_text_field="text"),
        train_dataset=Dataset.from_dict({"text": texts}), processing_class=tokenizer,
    )  # fmt: skip
    parts = {"instruction_part": "<|im_start|>user\n", "response_part": "<|im_start|>assistant\n"}
    train_on_responses_only(trainer, **parts).train()


def plain_arguments(settings, out: Path) -> dict:
    """The recipe under SFTConfig's names, written out once more."""
    recipe, force = settings.train, in_force(settings)
    return {
        "output_dir": str(out), "max_length": recipe.max_seq_length, "num_train_epochs": recipe.epochs,
        "per_device_train_batch_size": recipe.batch_size_per_device, "learning_rate": recipe.learning_rate,
        "gradient_accumulation_steps": recipe.gradient_accumulation_steps, "lr_scheduler_type": recipe.lr_scheduler,
        "warmup_steps": recipe.warmup_ratio, "weight_decay": recipe.weight_decay, "optim": force["optimizer"],
        "bf16": force["precision"] == "bf16", "gradient_checkpointing": recipe.gradient_checkpointing,
        "train_sampling_strategy": "group_by_length" if recipe.group_by_length else "random", "packing": False,
        "use_cpu": force["device"].startswith("cpu"), "seed": recipe.seed, "data_seed": recipe.seed,
        "logging_steps": 1, "save_strategy": "no", "report_to": [],
    }  # fmt: skip


# A worker: one trainer in a process of its own. Before each step it says so and waits for its turn.


def in_force(settings) -> dict:
    """The product's own reading of the recipe."""
    from slm.train.recipe import in_force as force

    return force(settings)


def lora_arguments(settings) -> dict:
    """The product's own LoRA arguments."""
    from slm.train.recipe import lora_arguments as arguments

    return arguments(settings)


def status(name: str) -> float:
    """A line of /proc/self/status in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def worker(spec: dict) -> None:
    """Train as `spec` says; one JSON line per step reached and one at the end, on what was stdout."""
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # the trainers print; that goes to the log
    sys.path[:0] = [str(WORK), str(PROJECT)]
    os.chdir(WORK)
    from slm.settings import load_settings
    from slm.train.recipe import import_trainer

    attention = spec["settings"].pop("attention", None)
    settings = load_settings(profile=spec["profile"], run_id=spec["name"], overrides=spec["settings"], start=WORK)
    import_trainer(settings)
    import peft  # noqa: F401
    import torch
    from slm.rows import read_rows
    from slm.train import load, recipe, sft
    from slm.train.encode import load_tokenizer
    from task.contract import contract
    from transformers import TrainerCallback, trainer
    from trl import SFTTrainer  # noqa: F401

    if attention:
        load.in_force = lambda s: in_force(s) | {"attention": attention}
    gpu = torch.cuda.is_available()
    marks, peaks = [], []

    class Turn(TrainerCallback):
        """Marks the moment at which a step is reached, waits, and marks the moment at which it starts."""

        def on_step_begin(self, args, state, control, **_):
            if gpu:
                torch.cuda.synchronize()
            end = time.perf_counter()
            peaks.append(torch.cuda.max_memory_allocated() if gpu else status("VmHWM"))
            if spec["turns"]:
                print(json.dumps({"step": state.global_step}), file=channel)
                sys.stdin.readline()
            marks.append((end, time.perf_counter()))

        def on_train_begin(self, args, state, control, **_):
            torch.manual_seed(0)  # it orders the rows: every worker has the same batches

        def on_train_end(self, args, state, control, **_):
            tokens = [entry["num_tokens"] for entry in state.log_history if "num_tokens" in entry and "loss" in entry]
            found["tokens"] = [after - before for before, after in zip([0, *tokens], tokens, strict=False)]
            found["losses"] = [round(entry["loss"], 4) for entry in state.log_history if "loss" in entry]

    trainer.DEFAULT_CALLBACKS.append(Turn)
    batch = settings.train.batch_size_per_device * settings.train.gradient_accumulation_steps
    rows = read_rows(WORK / "data/accepted/train.jsonl")[: spec["steps"] * batch]
    dev = read_rows(WORK / "data/accepted/dev_internal.jsonl")[: spec["dev"]]
    found, both = {}, {"train": rows, "dev_internal": dev}
    tokenizer = load_tokenizer(settings)
    examples = sft.prepare(settings, contract, tokenizer, both)
    expected = recipe.memory(settings, examples["train"])
    held = 0 if gpu else status("VmRSS")
    if not gpu:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew: the libraries are in
    if spec["script"] == "ours":
        _, metrics = sft.fit(settings, contract, tokenizer, both, examples, "bench", False)
        found |= {k: metrics[k] for k in ("train_seconds", "task_share", "task_looks", "task_rows") if k in metrics}
    else:
        trl = partial(plain_trl, full_loss=spec["script"] == "plain_trl_full_loss")
        (plain_unsloth if spec["script"] == "plain_unsloth" else trl)(settings, rows, contract, WORK / "plain")
    shutil.rmtree(sft.adapter_folder(settings), ignore_errors=True)
    found["seconds"] = [after[0] - before[1] for before, after in zip(marks, marks[1:], strict=False)]
    found["peak_gb"] = round((max(peaks) - held) / 1e9, 2)
    found["libraries_gb"] = round(held / 1e9, 2)
    found["estimate_gb"] = round(sum(expected.values()) / 1e9, 2)
    found["estimate"] = {k: round(v / 1e9, 2) for k, v in expected.items()}
    found["force"] = in_force(settings) | ({"attention": attention} if attention else {})
    print(json.dumps({"done": found}), file=channel)


def tune(spec: dict) -> None:
    """Preference tuning of the project's adapter by one method; its facts as the last line."""
    sys.path[:0] = [str(WORK), str(PROJECT)]
    os.chdir(WORK)
    from slm.settings import load_settings
    from slm.train import preference
    from task.contract import contract

    settings = load_settings(profile=spec["profile"], run_id=spec["name"], overrides=spec["settings"], start=WORK)
    print(json.dumps(preference.tune(settings, contract)["preference"]))


# The parent: starts workers, gives turns, keeps figures.


def start(spec: dict) -> subprocess.Popen:
    """A worker in a process of its own; what it prints lies in build/training/logs."""
    log = WORK / "logs" / f"{spec['name']}.txt"
    log.parent.mkdir(exist_ok=True)
    command = [sys.executable, __file__, "--worker", json.dumps(spec)]
    with log.open("w") as stream:
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stream, text=True)


def hear(name: str, process: subprocess.Popen) -> dict:
    """The worker's next line. Ends the benchmark when there is none."""
    line = process.stdout.readline()
    if not line:
        raise SystemExit(f"{name} failed (exit code {process.wait()}); see {WORK / 'logs' / name}.txt")
    return json.loads(line)


def interleave(group: dict[str, tuple[str, dict]], profile: str, steps: int) -> dict[str, dict]:
    """Train every member of the group at the same time, one step in turn: while one computes, the others wait."""
    processes, found = {}, {}
    for name, (script, changed) in group.items():
        spec = {"name": name, "script": script, "profile": profile, "steps": steps, "dev": 8, "turns": True}
        processes[name] = start(spec | {"settings": COMMON | changed})
    waiting = dict(processes)
    for name, process in processes.items():
        hear(name, process)  # all have reached their first step before one starts it
    while waiting:
        for name, process in list(waiting.items()):
            process.stdin.write("go\n")
            process.stdin.flush()
            if "done" in (said := hear(name, process)):
                found[name] = said["done"]
                process.wait()
                del waiting[name]
    return found


def rates(one: dict) -> list[float]:
    """Tokens per second of each round."""
    cycles = list(zip(one["tokens"], one["seconds"], strict=False))[WARM_UP:]
    cut = [round(n * len(cycles) / ROUNDS) for n in range(ROUNDS + 1)]
    rounds = [cycles[a:b] for a, b in zip(cut, cut[1:], strict=False)]
    return [sum(t for t, _ in part) / sum(s for _, s in part) for part in rounds]


def ratio(one: dict, other: dict) -> dict:
    """How many times the tokens per second of `other`: median, lowest and highest of the rounds."""
    each = sorted(a / b for a, b in zip(rates(one), rates(other), strict=True))
    return {"median": round(statistics.median(each), 3), "low": round(each[0], 3), "high": round(each[-1], 3)}


def figures(one: dict) -> dict:
    """What is kept of a worker."""
    kept = {k: one[k] for k in ("peak_gb", "estimate_gb", "estimate", "libraries_gb", "losses", "force")}
    return {"tokens_per_s": round(statistics.median(rates(one)), 1), "tokens": sum(one["tokens"])} | kept


def speed(profile: str, steps: int, pair: str = "") -> dict:
    """Our two trainers and the two plain scripts; with `pair` only that library's two."""
    found = interleave({name: what for name, what in SPEED.items() if pair in name}, profile, steps)
    if full := found.get("plain_trl_full_loss"):
        full["tokens"] = found["plain_trl"]["tokens"]  # it logs none; the batches are the same
    against = {"plain_trl": "ours_trl", "plain_trl_full_loss": "ours_trl", "plain_unsloth": "ours_unsloth"}
    against["ours_trl"] = "ours_unsloth"
    ratios = {f"{a} to {b}": ratio(found[a], found[b]) for b, a in against.items() if {a, b} <= found.keys()}
    return {"ratios": ratios} | {name: figures(one) for name, one in found.items()}


def variants(profile: str, steps: int, only: str = "") -> dict:
    """Each changed setting against the profile as it is, in groups."""
    kept = {}
    for group, members in VARIANTS.items():
        if group in (only or "abc"):
            runs = {name: ("ours", changed) for name, changed in ({f"as_it_is_{group}": {}} | members).items()}
            found = interleave(runs, profile, steps)
            base = found[f"as_it_is_{group}"]
            kept |= {name: figures(one) | {"ratio": ratio(one, base)} for name, one in found.items()}
    return kept | {"padding": padding(profile)}


def padding(profile: str) -> dict:
    """Tokens computed per token of a row, over a whole epoch of the project's rows, sorted and in random order."""
    sys.path[:0] = [str(WORK), str(PROJECT)]
    import torch
    from slm.rows import read_rows
    from slm.settings import load_settings
    from slm.train.encode import encode, load_tokenizer, stop_ids
    from task.contract import contract
    from transformers.trainer_pt_utils import LengthGroupedSampler

    settings = load_settings(profile=profile, start=WORK)
    tokenizer, size = load_tokenizer(settings), settings.train.batch_size_per_device
    rows = read_rows(WORK / "data/accepted/train.jsonl")
    examples = encode(rows, contract, tokenizer, stop_ids(settings, tokenizer), settings.train.max_seq_length)
    lengths, draw = [len(e.input_ids) for e in examples], torch.Generator().manual_seed(0)
    orders = {"sorted": list(LengthGroupedSampler(size, lengths=lengths, generator=draw)),
              "random": torch.randperm(len(lengths), generator=draw).tolist()}  # fmt: skip
    found = {}
    for name, order in orders.items():
        batches = [[lengths[n] for n in order[at : at + size]] for at in range(0, len(order), size)]
        found[name] = round(sum(max(b) * len(b) for b in batches) / sum(lengths), 3)
    return found


def task(profile: str, steps: int) -> dict:
    """The same run with the best checkpoint by the task metric and by the loss: the share that the answers take."""
    found = {}
    for metric in ("loss", "task", "loss_again"):
        looks = {"train.eval_steps": steps, "train.save_steps": steps, "train.early_stopping": True}
        changed = COMMON | looks | {"train.early_stopping_metric": metric.split("_")[0]}
        spec = {"name": metric, "script": "ours", "profile": profile, "steps": 3 * steps, "dev": 32, "turns": False}
        process = start(spec | {"settings": changed})
        found[metric] = hear(metric, process)["done"]
        process.wait()
    seconds = {name: one["train_seconds"] for name, one in found.items()}
    without = (seconds["loss"] + seconds["loss_again"]) / 2
    own = {k: found["task"].get(k) for k in ("task_share", "task_looks", "task_rows")}
    return {"seconds": seconds, "share": round(seconds["task"] / without - 1, 3), "said_by_the_run": own}


def sanity(profile: str) -> dict:
    """`python -m slm sanity` on the project."""
    begin = time.perf_counter()
    command = [sys.executable, "-m", "slm", "sanity", "--profile", profile, "--run-id", "bench"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join((str(WORK), str(PROJECT)))}
    done = subprocess.run(command, cwd=WORK, env=env, capture_output=True, text=True, check=False)
    said = (done.stderr if done.returncode else done.stdout).strip().splitlines()[-1]
    record = json.loads((WORK / "registry/runs.jsonl").read_text().splitlines()[-1])
    metrics = {k: record.get("metrics", {}).get(k) for k in ("exact", "rows", "steps", "loss_final", "tokens_per_s")}
    minutes = round((time.perf_counter() - begin) / 60, 1)
    return {"exit_code": done.returncode, "said": said, "minutes": minutes, **metrics}


def preference(source: Path, run: str, profile: str, limit: int, methods: list[str]) -> dict:
    """DPO, ORPO and GRPO, each from the project's own SFT adapter."""
    found = {}
    for method in methods:
        copy(source, run)  # the adapter and the records as SFT left them; answers stay cached
        changed = {"preference.method": method, "preference.limit": limit, "train.trainer": "trl"}
        if method == "grpo":
            changed["preference.max_steps"] = 16
        process = start({"name": run, "profile": profile, "settings": changed, "tune": True})
        said, _ = process.communicate()
        if process.returncode:
            raise SystemExit(f"{method} failed; see {WORK / 'logs' / run}.txt")
        found[method] = json.loads(said.splitlines()[-1])
        print(method, found[method]["verdict"], f"{found[method]['seconds']} s", file=sys.stderr, flush=True)
    return found


def copy(source: Path, run: str) -> None:
    """What training reads of a project, to build/training; the project itself is only read."""
    data = ("data/eval", "data/raw", "data/accepted", "registry", "outputs/eval_reports", f"outputs/adapters/{run}")
    for part in ("project.yaml", "task", "training", *data):
        if (source / part).is_dir():
            shutil.rmtree(WORK / part, ignore_errors=True)
            shutil.copytree(source / part, WORK / part)
        elif (source / part).is_file():
            shutil.copy(source / part, WORK / part)


def main() -> None:
    """Measure the parts asked for and print all figures measured so far as one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--project", type=Path, default=ROOT / "build" / "demo", help="made by `make demo`; only read")
    parser.add_argument("--run", default="demo", help="its run, for preference tuning")
    parser.add_argument("--profile", default="cpu", help="gpu runs the same measurements on a GPU")
    parser.add_argument("--part", choices=PARTS, action="append", help="by default all; other figures are kept")
    parser.add_argument("--group", default="", help="variants: a, b, c; speed: trl, unsloth; preference: a method")
    parser.add_argument("--steps", type=int, default=22, choices=range(6, 40), metavar="N", help="first one untimed")
    parser.add_argument("--looks", type=int, default=20, help="steps between two looks at the task metric")
    parser.add_argument("--limit", type=int, default=400, help="rows asked for failures before preference tuning")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        spec = json.loads(options.worker)
        return tune(spec) if spec.get("tune") else worker(spec)
    WORK.mkdir(parents=True, exist_ok=True)
    source = options.project.resolve()
    copy(source, options.run)
    kept = WORK / "figures.json"
    found = json.loads(kept.read_text()) if kept.is_file() else {}
    methods = [m for m in ("dpo", "orpo", "grpo") if options.group in ("", m)]
    measures = {
        "speed": lambda: speed(options.profile, options.steps, options.group),
        "variants": lambda: variants(options.profile, options.steps, options.group),
        "task": lambda: task(options.profile, options.looks),
        "sanity": lambda: sanity(options.profile),
        "preference": lambda: preference(source, options.run, options.profile, options.limit, methods),
    }
    for part in options.part or PARTS:
        load, begin = os.getloadavg()[0], time.perf_counter()
        new = measures[part]()
        found[part] = (found.get(part, {}) if options.group else {}) | new
        seconds = round(time.perf_counter() - begin)
        found[part]["conditions"] = {"load_before": round(load, 1), "seconds": seconds, "cores": os.cpu_count()}
        kept.write_text(json.dumps(found, indent=1))
        print(part, json.dumps(found[part]), file=sys.stderr, flush=True)
    print(json.dumps({"benchmark": "training", **found}))


if __name__ == "__main__":
    main()
