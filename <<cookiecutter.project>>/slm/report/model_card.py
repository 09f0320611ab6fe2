"""The model card: valid Hugging Face metadata with results, and every section filled from what a run left behind."""

from pathlib import Path

from slm import registry
from slm.contract import Contract
from slm.errors import SlmError
from slm.evaluate.candidate import NAME
from slm.evaluate.release import check, failures, load_report
from slm.report import tables
from slm.report.baselines import columns
from slm.report.render import fill
from slm.rows import write_text

ORDER = {"base": "Base", "prompted_base": "Prompted Base", "fine_tuned": "Fine-Tuned", "larger": "Larger Model"}


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
    languages = report["results"][report["headline_set"]][NAME]["slices"].get("language", {})
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
                metric_name=name, metric_value=round(found[NAME]["metrics"][name]["value"], 4),
            )
            for set, found in report["results"].items() for name in _shown(contract, found[NAME])
        ],
    )  # fmt: skip
    text = f"---\n{data.to_yaml()}\n---\n\n{_body(settings, contract, report, train, export)}"
    try:
        ModelCard(text)
    except Exception as error:  # the library raises KeyError, ValueError and YAML errors alike
        hint = "check model.license and base"
        raise SlmError(f"model_card.md: its metadata cannot be read back ({error}); {hint}.") from None
    return text


def _shown(contract: Contract, mine: dict) -> list[str]:
    names = dict.fromkeys((*columns(contract), "schema_validity"))
    return [n for n in names if n in mine["metrics"] and n != "lenient_schema_validity"]


def _body(settings, contract: Contract, report: dict, train: dict | None, export: dict | None) -> str:
    run_id, version, head = report["run_id"], report["dataset_version"], report["headline_set"]
    name, results = contract.primary_metric, report["results"]
    brief = {key: contract.brief.get(key, "").strip() for key in ("goal", "inputs", "non_goals", "deployment_target")}
    dataset, mine = registry.latest(settings, "datasets", version=version) if version else None, results[head][NAME]
    runs = [
        {"when": r["at"][:16], "run": r["run_id"], "stage": r["stage"],
         "result": r.get("verdict") or r.get("status", "")}
        for r in registry.read(settings, "runs") if r.get("stage") in ("train", "evaluate")
    ][-12:]  # fmt: skip
    open_gates = [g for g in failures(check(settings, run_id)) if g.name != "model_card_written"]
    others = [
        f"{tables.title(k)} {tables.metric(results[head][k]['metrics'][name])}" for k in tables.TITLES
        if k in results[head] and k not in ORDER and not results[head][k]["reason"]
    ]  # fmt: skip
    weak = [
        (m["value"], f"{key} {n} {m['value']:.2f} (n={m['n']})")
        for key, found in mine["slices"].items() for n, m in found.items() if m["n"] >= 5
    ]  # fmt: skip
    mistakes = [line.strip().removeprefix("* ") for line in contract.brief.get("failure_modes", "").splitlines()]
    counts = dataset["counts"].get("source", {}) if dataset else {}
    waits, memory = _measured(report, export)
    return fill(
        "model_card.md", name=f"{settings.project.name}-{run_id}", settings=settings, contract=contract, report=report,
        train=train, export=export, dataset=dataset, brief=brief, head=head, runs=runs, waits=waits, memory=memory,
        state="; ".join(f"{g.name} ({g.status})" for g in open_gates) or "all gates passed", others="; ".join(others),
        mix=", ".join(f"{n} {100 * c / max(1, dataset['rows']):.0f}%" for n, c in counts.items()),
        scores=_scores(contract, results), calibration=mine["calibration"],
        confidence=f"{settings.evaluate.confidence:.0%}", weakest=", ".join(text for _, text in sorted(weak)[:4]),
        hostile=results.get("adversarial", {}).get(NAME, {}).get("metrics", {}),
        critical=sum(f["set"] == "golden" and f["critical"] for f in report["failures"]),
        sizes={set: facts["n"] for set, facts in report["sets"].items()},
        faults="; ".join(line for line in mistakes if line and not line.endswith(":")),
    )  # fmt: skip


def _scores(contract: Contract, results: dict) -> list[dict]:
    """The four columns of the card on each set."""
    lines = []
    for set, found in results.items():
        for name in _shown(contract, found[NAME]):
            cells = {}
            for key, title in ORDER.items():
                ran = key in found and not found[key]["reason"]
                cells[title] = tables.metric(found[key]["metrics"].get(name)) if ran else "not run"
            lines.append({"Benchmark": f"{set}, {name}", **cells})
    return lines


def _measured(report: dict, export: dict | None) -> tuple[str, str]:
    """What a lone request takes, in the runtime and through the adapter; the memory of the file that ships."""

    def told(waits: dict[str, float | None]) -> str:
        return ", ".join(f"{p} {tables.seconds(w)}" for p, w in waits.items() if isinstance(w, float)) or "not measured"

    adapter = told({p: report["lines"]["latency"].get(f"{p}_s") for p in ("p50", "p95", "p99")}) + " for the adapter"
    if not export:
        return adapter, "not measured"
    listed = next((f for f in export["files"] if f["file"] == export["chosen"]), {})
    timed = report["results"]["dev"].get(export["chosen"]) or {}
    memory = timed.get("memory_mb") or listed.get("memory MB")
    waits = {p: timed.get(f"latency_{p}_s") or listed.get(f"{p} s") for p in ("p50", "p95", "p99")}
    return (
        f"{told(waits)} in the runtime; {adapter}",
        f"{memory:.0f} MB measured while loaded" if isinstance(memory, (int, float)) else "not measured",
    )
