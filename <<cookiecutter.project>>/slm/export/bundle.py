"""What a user takes away: export.json and its plot, then Modelfile, checksums, model card, and the record of the run."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from slm import registry
from slm.contract import Contract
from slm.errors import SlmError
from slm.export import parity
from slm.export.client import write_client
from slm.export.logits import LogitProof
from slm.export.modelfile import check_modelfile, family, render_modelfile
from slm.export.parity import Scored
from slm.export.quantize import gguf_folder
from slm.export.tokens import TokenProof
from slm.rows import write_json, write_text


def write_report(
    settings, contract: Contract, proofs: Sequence[TokenProof], logits: Sequence[LogitProof], reference: Scored,
    paths: Sequence[Scored], shipped: Sequence[Scored],
) -> dict:  # fmt: skip
    """Choose a file and write export.json and export.png to outputs/gguf/<run_id>; returns the report. `chosen` is
    the quant of the smallest file that holds, or None; `verdict` says it in one sentence."""
    import llama_cpp

    folder, best = gguf_folder(settings), parity.choose(settings, contract, reference, shipped, logits)
    f16 = next((one for one in shipped if one.name == "f16"), paths[-1])
    cause = parity.attribute(settings, contract, reference, paths, f16, logits)
    best = None if cause.startswith("merge") else best  # its files are all of another model
    report = {
        "run_id": settings.run_id, "base": settings.model.base, "settings": settings.hash, "contract": contract.schema_hash,
        "runtime": f"llama-cpp-python {llama_cpp.__version__}",
        **settings.export.model_dump(include={"converter", "imatrix"}), "chosen": best.name if best else None,
        "verdict": _verdict(settings, contract, best, reference, cause), "attribution": cause,
        "tolerance": settings.export.model_dump(include={"tolerance", "margin", "kl"}),
        "rows": len(reference.scores),
        "sampling": settings.export.model_dump(include={"temperature", "top_p", "repeat_penalty"}),
        "files": parity.table(settings, contract, reference, shipped, logits),
        "paths": parity.table(settings, contract, reference, paths)[1:],
        "tokens": [asdict(proof) for proof in proofs],
        "logits": [asdict(proof) | {"holds": proof.holds} for proof in logits], "made": {
            one.name: {
                "file": one.file.path.name, "bytes": one.file.path.stat().st_size, "sha256": registry.file_hash(one.file.path),
                "seconds": round(one.file.seconds, 1), "tensors": one.file.tensors,
                "primary": one.metrics[contract.primary_metric].model_dump(), "exact": one.exact,
            }
            for one in shipped
        },
    }  # fmt: skip
    write_json(folder / "export.json", report)
    plot(contract, reference, shipped, logits, folder / "export.png")
    return report


def release(settings, contract: Contract, merged: Path, report: dict) -> list[Path]:
    """Write Modelfile, model card, client and checksums for a proven export, here and in the project's root; record the run.
    Raises SlmError when no file held, or when the Modelfile's template is not the tokenizer's on every golden prompt.
    """
    from slm.report import model_card

    folder, run = gguf_folder(settings), settings.run_id
    if not report["chosen"]:
        raise SlmError(f"outputs/gguf/{run}: {report['verdict']} Nothing is released.")
    chats = [contract.messages(row)[:-1] for row in parity.golden_rows(settings)]
    file = report["made"][report["chosen"]]["file"]
    note = f"run {run}: {report['chosen']}, {report['rows']} golden and dev rows"
    for target, model in ((folder / "Modelfile", file), (settings.path("Modelfile"), f"outputs/gguf/{run}/{file}")):
        write_text(target, render_modelfile(settings, contract, merged, f"./{model}", note))
        checked = check_modelfile(settings, contract, merged, target, chats)
    card = model_card.write(settings, contract, run, report)
    write_text(folder / "model_card.md", card.read_text(encoding="utf-8"))
    names = ("Modelfile", "export.json", "export.png", "model_card.md")
    files = [*sorted(folder.glob("model-*.gguf")), *(folder / name for name in names)]
    files += write_client(settings, contract, merged, folder / file)
    sums = "".join(f"{registry.file_hash(f)}  {f.relative_to(folder)}\n" for f in files)
    files.append(write_text(folder / "checksums.txt", sums))
    template = family((merged / "chat_template.jinja").read_text(encoding="utf-8"))
    train = registry.latest(settings, "runs", stage="train", status="completed", run_id=run)
    registry.append(settings, "runs", {
        "stage": "export", "run_id": run, "status": "completed", "profile": settings.profile, "settings": settings.hash,
        "parents": {"train": train["hash"] if train else None, "base": settings.model.base, "contract": contract.schema_hash},
        "runtime": report["runtime"], "chat_template": template, "prompts_checked": checked, "chosen": report["chosen"],
        "verdict": report["verdict"], "metrics": {name: made["primary"] for name, made in report["made"].items()},
        "files": {str(f.relative_to(folder)): registry.file_hash(f) for f in files},
    })  # fmt: skip
    return files


def plot(
    contract: Contract, reference: Scored, shipped: Sequence[Scored], logits: Sequence[LogitProof], path: Path
) -> Path:  # fmt: skip
    """Score with interval against size, next tokens, and speed, per file; the adapter's score as a line."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 3.6), dpi=120, layout="constrained")
    score, near, speed = figure.subplots(1, 3, gridspec_kw={"width_ratios": [3, 2, 2]})
    name, best = contract.primary_metric, reference.metrics[contract.primary_metric]
    found = [one.metrics[name] for one in shipped]
    sizes = [one.file.size_mb for one in shipped]
    for one, size, m in zip(shipped, sizes, found, strict=True):
        reach = [[m.value - m.low], [m.high - m.value]]
        score.errorbar(size, m.value, yerr=reach, fmt="o", capsize=3, lw=1, label=f"{one.name}, {size:.0f} MB: {m.value:.3f}")
    score.axhline(best.value, color="#c53030", ls="--", lw=1, label=f"adapter {best.value:.3f}")
    score.set_xlim(0, max(sizes) * 1.15)
    score.set_ylim(max(0, min([m.low for m in found] + [best.low]) - 0.05), 1.02)
    score.set(xlabel="size (MB)", ylabel=f"{name} (bar: interval)", title=f"score on golden and dev, n = {len(reference.scores)}")
    score.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    speed.barh([one.name for one in shipped], [one.results[-1].tokens_per_second or 0 for one in shipped], color="#a0aec0")
    speed.invert_yaxis()
    speed.set(xlabel="generated tokens per second", title="speed of a lone request")
    near.barh([proof.file for proof in logits], [max(proof.kl, 1e-9) for proof in logits], color="#a0aec0")
    near.plot([proof.most for proof in logits], range(len(logits)), "|", color="#c53030", ms=14, label="at most")
    near.set(xscale="log", xlabel="mean divergence (nats)", title="next tokens against the merged model")
    near.invert_yaxis()
    near.legend(fontsize=8, frameon=False, loc="upper right")
    for axes in (score, near, speed):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
    return path


def _verdict(settings, contract: Contract, best: Scored | None, reference: Scored, cause: str) -> str:
    n, most = len(reference.scores), settings.export
    if best is None:
        lost = "the smaller files lose too much, or too few rows show that they do not; add a larger quant to export.quants"
        rule = f"{parity.room(settings, n)} of {n} golden and dev rows, above -{most.margin:g} and near in next tokens"
        return f"no file holds within {rule}: {lost if cause == 'equal' else cause}."
    d = parity.compare(settings, contract, reference, best).difference
    return (
        f"{best.name} holds: {best.exact} of {n} golden and dev rows exactly right, the adapter {reference.exact}; "
        f"{contract.primary_metric} {d.value:+.3f} [{d.low:+.3f}, {d.high:+.3f}] against it "
        f"(may lose {parity.room(settings, n)} rows, interval above -{most.margin:g})."
    )
