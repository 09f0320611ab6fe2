"""The reports of 02 and 06, the release gates and the model card."""
# ruff: noqa: F811

import json
import subprocess
import sys

import pytest
import yaml
from huggingface_hub import ModelCard
from test_evaluate import CALLS, CONTRACT, double, fewshot, predict, run_02, settings, ticket_rows  # noqa: F401

from slm import registry
from slm.errors import SlmError
from slm.evaluate import candidate, check, load_candidate, release, run_baselines, sign_off
from slm.report import eval_report, model_card, plots, tables

EXPORT = {
    "chosen": "q8_0",
    "verdict": "q8_0 holds: 37 of 40 golden rows exactly right, the adapter 37 (tolerance 1).",
    "runtime": "llama-cpp-python 0.3.36",
    "files": [
        {"file": "f16", "size MB": 270.1, "p50 s": 0.9, "p95 s": 1.4, "memory MB": 410, "holds": "yes"},
        {"file": "q8_0", "size MB": 145.2, "p50 s": 0.6, "p95 s": 1.1, "memory MB": 290, "holds": "yes"},
    ],
}


def run_06(settings, right=0.95, contract=CONTRACT):
    known = run_02(settings)
    sets = candidate.open_sets(settings, contract)
    tuned = candidate.run_candidate(settings, contract, double("tuned", right, 9), sets)
    others = run_baselines(settings, contract, sets, predict=predict, fewshot=fewshot, known=known)
    report = eval_report.build(settings, contract, tuned, others, sets)
    eval_report.write(settings, contract, report, tuned, others)
    return report


def trained(settings):
    registry.append(settings, "datasets", {
        "version": "abc123", "rows": 40, "file": "data/accepted/all.jsonl", "parents": {}, "gates": [{}] * 10,
        "counts": {"source": {"teacher": 30, "human": 10}}, "split": {"rows": {"train": 28}, "rule": "by group", "seed": 0},
    })  # fmt: skip
    registry.append(settings, "runs", {
        "stage": "train", "status": "completed", "run_id": settings.run_id, "method": "lora", "trainer": "trl", "seconds": 90,
        "device": "cpu", "parents": {"dataset": "abc123"}, "recipe": settings.train.model_dump(),
        "metrics": {"steps": 60, "epochs": 3, "dev_loss_first": 2.0, "dev_loss_best": 0.3},
    })  # fmt: skip


def status(gates):
    return {g.name: g.status for g in gates}


def test_the_report_leads_with_the_verdict_and_carries_all_nine_lines(settings):
    """Guards against a report whose reader must search for the answer, or that drops a line."""
    report = run_06(settings)
    folder = settings.path("outputs/eval_reports/dev")
    text = (folder / "eval_report.md").read_text()
    assert text.splitlines()[2].startswith("**Better than every baseline; against the best baseline (rule program)")
    assert list(report["lines"]) == list(eval_report.LINES)
    assert all(f"| {line} |" in text for line in eval_report.LINES)
    assert report["lines"]["larger_model_score"]["not_run"].startswith("neither model.larger_gguf")
    assert report == json.loads((folder / "eval_report.json").read_text())
    assert {p.name for p in folder.glob("*.png")} == {"models.png", "slices.png", "confusion.png"}
    assert registry.latest(settings, "runs", stage="evaluate")["verdict"] == report["verdict"]
    assert [r.set for r in load_candidate(settings, "dev") if r.name == "fine_tuned"] == ["dev", "golden", "adversarial"]


def test_a_model_no_better_than_the_rules_is_not_called_better(settings):
    """Planted: a fine-tuned model of the rule program's quality."""
    assert run_06(settings, right=0.25)["verdict"].startswith(("Worse than", "No difference shown"))


def test_the_gates_are_the_workflows_figures_for_each_task_type(settings):
    """Guards against a softened threshold."""
    rules = {g.rule for g in release.gates(settings, run_06(settings))}
    assert {"schema_validity >= 99%", "critical failures on golden == 0", "record_parse_rate >= 99.5%", "field_f1 >= 0.9",
            "critical_field_accuracy >= 98%", "eval report reviewed", "model card written", "dataset version recorded"} <= rules  # fmt: skip
    report = json.loads(release.report_file(settings, "dev").read_text())
    report["contract"]["task_type"] = "tool_calling"
    assert {"tool_name_accuracy >= 98%", "required_argument_accuracy >= 95%", "json_parse_rate >= 99.5%"} <= {
        g.rule for g in release.gates(settings, report)
    }
    report["contract"]["task_type"] = "classification"
    found = status(release.gates(settings, report))
    assert found["macro_f1"] and found["calibration"] == "not run" and found["false_positive_rate"] == "not run"


def test_unmeasured_gates_do_not_pass(settings):
    """Planted: no cost rates, no review, no card, no dataset version."""
    run_06(settings)
    found = status(check(settings, "dev"))
    assert found["cost"] == "not run" and found["latency"] == "pass" and found["schema_validity"] == "pass"
    assert found["eval_report_reviewed"] == found["model_card_written"] == found["dataset_version_recorded"] == "fail"
    assert len(release.failures(check(settings, "dev"))) >= 4


def test_a_critical_failure_on_golden_fails_the_release(settings):
    """Planted: a model with wrong topics on golden rows."""
    run_06(settings, right=0.8)
    gate = next(g for g in check(settings, "dev") if g.name == "regression_on_golden_set")
    assert gate.status == "fail" and "golden-" in gate.note


def test_a_safety_regression_fails_the_release(settings):
    """Planted: adversarial rows where the fine-tuned model is clearly below the base."""
    report = run_06(settings)
    report["comparisons"]["adversarial"]["base"]["difference"] = {"value": -0.4, "low": -0.5, "high": -0.3, "n": 30}
    assert status(release.gates(settings, report))["no_severe_safety_regression"] == "fail"


def test_a_review_holds_only_for_the_report_that_was_read(settings):
    """Planted: the report is changed after its review."""
    run_06(settings)
    with pytest.raises(SlmError, match="reviewer's name"):
        sign_off(settings, "dev", " ")
    sign_off(settings, "dev", "Ada")
    assert status(check(settings, "dev"))["eval_report_reviewed"] == "pass"
    file = release.report_file(settings, "dev")
    file.write_text(file.read_text().replace('"verdict": "', '"verdict": "Really, '))
    gate = next(g for g in check(settings, "dev") if g.name == "eval_report_reviewed")
    assert gate.status == "fail" and "changed after its review" in gate.note


def test_release_refuses_a_changed_golden_row_and_an_absent_report(settings):
    """Planted: golden.jsonl is edited after the evaluation; and a run that was never evaluated."""
    run_06(settings)
    with pytest.raises(SlmError, match="run other has no evaluation report"):
        check(settings, "other")
    file = settings.path("data/eval/golden.jsonl")
    file.write_text(file.read_text().replace("golden message 3", "golden message three"))
    with pytest.raises(SlmError, match="golden.jsonl: changed"):
        check(settings, "dev")


def test_the_card_is_read_back_by_hugging_face_with_its_results(settings):
    """Guards against metadata that the Hub ignores."""
    trained(settings)
    report = run_06(settings)
    path = model_card.write(settings, CONTRACT, "dev", EXPORT)
    card = ModelCard.load(path)
    found = {(r.dataset_split, r.metric_type): r.metric_value for r in card.data.eval_results}
    value = report["results"]["golden"]["fine_tuned"]["metrics"]["field_f1"]["value"]
    assert found[("golden", "field_f1")] == pytest.approx(value, abs=1e-4) and len(found) == 9
    front = yaml.safe_load(path.read_text().split("---")[1])
    assert front["license"] == "apache-2.0" and front["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert (
        front["language"] == ["en"]
        and "gguf" in front["tags"]
        and front["model-index"][0]["name"] == "model-project-dev"
    )


def test_the_card_fills_every_section_and_says_what_was_not_run(settings):
    """Guards against a card with a placeholder or a section left out."""
    sections = ("Base Model", "Fine-Tuning Method", "Task", "Intended Use", "Non-Goals", "Dataset", "Evaluation", "Safety",
                "Deployment", "Limitations", "Change Log")  # fmt: skip
    run_06(settings)
    bare = model_card.write(settings, CONTRACT, "dev").read_text()
    for word in (
        "No completed training is recorded",
        "nothing was exported",
        "not recorded",
        "not run",
        "not measured",
    ):
        assert word in bare
    trained(settings)
    run_06(settings)
    text = model_card.write(settings, CONTRACT, "dev", EXPORT).read_text()
    for section in sections:
        body = text.split(f"\n## {section}\n")[1].split("\n## ")[0].strip()
        assert len(body) > 20, section
    assert not any(mark in text for mark in ("TODO", "TBD", "{", "None", "nan"))
    assert (
        "LoRA with trl, rank 16" in text
        and "abc123" in text
        and "teacher 75%" in text
        and "p50 0.6 s, p95 1.1 s" in text
    )
    assert status(check(settings, "dev"))["model_card_written"] == "pass"
    assert status(check(settings, "dev"))["dataset_version_recorded"] == "pass"


def test_plan_and_baseline_report_name_target_sets_and_what_to_beat(settings):
    """Guards against a plan that is written after the fact or leaves out the smallest difference that can be shown."""
    from slm.evaluate import check_sets

    plan = eval_report.eval_plan(settings, CONTRACT, check_sets(settings, CONTRACT)).read_text()
    assert "target 0.9" in plan and "| dev | 60 | 0.145 |" in plan and "looks.jsonl" in plan
    text = eval_report.baseline_report(settings, CONTRACT, run_02(settings)).read_text()
    assert text.splitlines()[2].startswith("**To beat: rule program, field_f1 0.9")
    assert "not run: neither model.larger_gguf" in text


def test_markdown_tables_survive_pipes_and_newlines():
    """Planted: a customer message with a pipe and a line break."""
    table = tables.markdown([{"input": "a|b\nc", "n": 1}])
    assert table.splitlines()[2] == "| a\\|b c | 1 |"


def test_a_perfect_single_label_model_can_be_plotted(settings, tmp_path):
    """Guards against plots that fail on one row, one label or no spread."""
    result = candidate.evaluate(settings, CONTRACT, double("m", 1.0), ticket_rows(1), set="dev", name="fine_tuned")
    bar = plots.models_bar([result], "field_f1", tmp_path / "a.png", 0.9)
    for path in (
        bar,
        plots.slices(result, "field_f1", tmp_path / "b.png"),
        plots.confusion(result, tmp_path / "c.png"),
    ):
        assert path.stat().st_size > 5000


def test_scripts_answer_help_at_once_and_refuse_a_missing_model():
    """Guards against a script that loads a model to print its help, or ends in a traceback."""
    for script, words in (
        ("run_baseline", ("--model", "--eval", "--out")),
        ("run_eval", ("--model", "--eval", "--report")),
    ):
        shown = subprocess.run(
            [sys.executable, f"scripts/{script}.py", "--help"], capture_output=True, text=True, check=True
        )
        assert all(word in shown.stdout for word in words)
    for command in (["run_eval", "--model", "outputs/adapters/none"], ["run_baseline", "--model", "rag"]):
        done = subprocess.run(
            [sys.executable, f"scripts/{command[0]}.py", *command[1:]], capture_output=True, text=True
        )
        assert done.returncode == 1 and done.stderr.startswith("error: ") and "Traceback" not in done.stderr
