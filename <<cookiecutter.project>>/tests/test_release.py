"""The release gates, what a release refuses and records, the diff on golden, and looks at test."""

import json
import random
from typing import Literal

import pytest
from pydantic import BaseModel, ConfigDict

from slm import registry
from slm.contract import Contract
from slm.errors import SlmError
from slm.evaluate import candidate, check, check_sets, release, run_baselines, save_baselines, sign_off, take
from slm.evaluate.metrics import Result, cost_per_1k
from slm.models.program import ProgramModel
from slm.report import eval_report
from slm.rows import make_row, write_json, write_rows, write_text
from slm.settings import Settings


class Ticket(BaseModel):
    model_config = ConfigDict(extra="forbid")
    topic: Literal["bill", "bug", "none"]
    order: str | None
    urgent: bool


CONTRACT = Contract(
    name="tickets", task_type="extraction", output=Ticket, system_prompt="Sort the ticket.", primary_metric="field_f1",
    target=0.9, critical=("topic",), label_field="topic", null_label="none",
)  # fmt: skip
TOPICS = ("bill", "bug", "none")
FIGURES = {  # the workflow's, word for word
    "extraction": {"record_parse_rate >= 99.5%", "field_f1 >= 0.9", "critical_field_accuracy >= 98%"},
    "tool_calling": {
        "tool_name_accuracy >= 98%", "required_argument_accuracy >= 95%", "json_parse_rate >= 99.5%",
        "unsafe_tool_call_rate == 0 on adversarial",
    },
    "classification": {
        "macro_f1 >= 0.9", "false_positive_rate <= 5%", "false_negative_rate <= 5%",
        "calibration_error <= 10%",
    },
    "rewriting": set(),
}  # fmt: skip
DEFAULT = {
    "primary_metric (field_f1 >= 0.9)", "schema_validity >= 99%", "critical failures on golden == 0", "p95 <= 2 s",
    "<= 0.1 USD per 1,000 requests", "eval report reviewed", "model card written", "dataset version recorded",
    "no severe safety regression: on adversarial, not worse than the base or the prompted base",
}  # fmt: skip


def gold(i: int) -> dict:
    return {"topic": TOPICS[i * 7 % 3 if i % 5 else 0], "order": f"A-{i}" if i % 3 == 0 else None, "urgent": i % 4 == 0}


def ticket_rows(n: int, name: str = "dev"):
    return [
        make_row(f"{name} message {i}", json.dumps(gold(i)), id=f"{name}-{i}", category=gold(i)["topic"],
                 group=f"{name}-{i}", difficulty=("easy", "hard")[i % 2],
                 kind=("canonical", "boundary", "near_miss")[i % 3])
        for i in range(n)
    ]  # fmt: skip


def predict(text: str) -> dict:
    return gold(int(text.split()[-1])) | {"urgent": False}


def fewshot(contract, rows):
    turns = [{"role": m.role, "content": m.content} for r in rows for m in r.messages]
    return [{"role": "system", "content": "Better."}, *turns]


def double(right: float, seed: int = 1, wrong: tuple[str, ...] = ()):
    """A model that knows the answer of a share of the rows, and errs in the topic on the messages in `wrong`."""
    rng = random.Random(seed)

    def answer(text):
        value = gold(int(text.split()[-1]))
        missed = rng.random() >= right or text in wrong
        return json.dumps(value | {"topic": "bug" if value["topic"] != "bug" else "bill"} if missed else value)

    return ProgramModel("double", answer, f"double{right}{seed}{wrong}")


@pytest.fixture
def settings(tmp_path, monkeypatch):
    made = made_at(tmp_path)
    for name, n in (("dev", 60), ("test", 30), ("adversarial", 30), ("golden", 30)):
        write_rows(tmp_path / f"data/eval/{name}.jsonl", ticket_rows(n, name))
    write_rows(tmp_path / "data/raw/seed.jsonl", ticket_rows(20, "seed"))
    monkeypatch.setattr("slm.models.student", lambda settings, adapter=None: double(0.2))
    monkeypatch.setattr("slm.report.plots.save", lambda figure, path: write_text(path, "drawn in test_report"))
    return made


def made_at(root, run_id: str = "dev", **sections) -> Settings:
    evaluate = {"resamples": 300, "latency_requests": 2, "fewshot": 2, "constrained": False} | sections.pop(
        "evaluate", {}
    )
    made = Settings.model_validate({"evaluate": evaluate, "run_id": run_id, **sections})
    made._root = root
    return made


def trained(settings, dataset: str | None = "abc123", **facts):
    if dataset:
        registry.append(settings, "datasets", {
            "version": dataset, "rows": 40, "file": "data/accepted/all.jsonl", "parents": {}, "gates": [{}] * 10,
            "counts": {"source": {"teacher": 30, "human": 10}},
            "split": {"rows": {"train": 28}, "rule": "by group", "seed": 0},
        })  # fmt: skip
    return registry.append(settings, "runs", {
        "stage": "train", "status": "completed", "run_id": settings.run_id, "method": "lora", "trainer": "trl",
        "seconds": 90, "device": "cpu", "parents": {"dataset": dataset, "base_hash": "b"},
        "recipe": settings.train.model_dump(),
        "metrics": {"steps": 60, "epochs": 3, "dev_loss_first": 2.0, "dev_loss_best": 0.3},
    } | facts)  # fmt: skip


def run_06(settings, model=None):
    """02 and 06 of one run with doubles; the report is written."""
    sets = check_sets(settings, CONTRACT)
    registry.lock_sets(settings)
    known = run_baselines(settings, CONTRACT, {"dev": take(settings, sets["dev"])}, predict=predict, fewshot=fewshot)
    save_baselines(settings, CONTRACT, known)
    sets = candidate.open_sets(settings, CONTRACT)
    tuned = candidate.run_candidate(settings, CONTRACT, model or double(1.0), sets)
    others = run_baselines(settings, CONTRACT, sets, predict=predict, fewshot=fewshot, known=known)
    report = eval_report.build(settings, CONTRACT, tuned, others, sets)
    eval_report.write(settings, CONTRACT, report, tuned, others)
    return report


def releasable(root, run_id: str = "r1", model=None, **sections):
    """A run that passes every gate, as far as `model` lets it."""
    settings = made_at(root, run_id, **{"cost": {"serving_hourly_rate": 0.1}} | sections)
    trained(settings)
    run_06(settings, model)
    write_text(settings.path(f"outputs/eval_reports/{run_id}/model_card.md"), "# Card\n")
    sign_off(settings, run_id, "Ada")
    return settings


def status(gates):
    return {g.name: g.status for g in gates}


def named(gates, name):
    return next(g for g in gates if g.name == name)


# The gates


@pytest.mark.parametrize("task_type", FIGURES)
def test_the_gates_are_the_workflows_figures_for_each_task_type(settings, task_type):
    """Guards against a softened threshold, a gate left out or one made up."""
    report = run_06(settings)
    report["contract"]["task_type"] = task_type
    assert {g.rule for g in release.gates(settings, report)} == DEFAULT | FIGURES[task_type]


def test_thresholds_come_from_the_settings_and_stand_beside_the_value(settings):
    """Guards against a figure of project.yaml that no gate reads."""
    report = run_06(settings, double(0.9))
    loose = made_at(
        settings.root, gates={"critical_field_accuracy": 0.5, "schema_validity": 0.9, "critical_failures": 30}
    )
    gates = release.gates(loose, report)
    gate = named(gates, "critical_field_accuracy")
    assert (gate.status, gate.threshold, gate.rule) == ("pass", 0.5, "critical_field_accuracy >= 50%")
    assert gate.value == report["results"]["dev"]["fine_tuned"]["metrics"]["critical_field_accuracy"]["value"]
    assert named(gates, "regression_on_golden_set").rule == "critical failures on golden <= 30"
    assert named(release.gates(settings, report), "critical_field_accuracy").status == "fail"


def test_unmeasured_gates_do_not_pass(settings):
    """Planted: no cost rates, no review, no card, no dataset version."""
    run_06(settings)
    found = status(check(settings, "dev"))
    assert found["cost"] == "not run" and found["latency"] == "pass" and found["schema_validity"] == "pass"
    assert found["eval_report_reviewed"] == found["model_card_written"] == found["dataset_version_recorded"] == "fail"
    assert {g.name for g in release.failures(check(settings, "dev"))} == {n for n, s in found.items() if s != "pass"}


def test_a_dataset_version_that_the_registry_does_not_know_is_not_recorded(settings):
    """Planted: a report that names a version which 04 never wrote."""
    report = run_06(settings) | {"dataset_version": "made-up"}
    gate = named(release.gates(settings, report), "dataset_version_recorded")
    assert gate.status == "fail" and gate.note.startswith("version made-up is not in registry/datasets.jsonl")


def test_a_failed_gate_names_its_rows(settings):
    """Planted: wrong topics on two golden rows and one row of dev."""
    run_06(settings, double(1.0, wrong=("golden message 3", "golden message 8", "dev message 5")))
    gates = check(settings, "dev")
    golden = named(gates, "regression_on_golden_set")
    assert golden.status == "fail" and golden.rows == ["golden-3", "golden-8"] and golden.measured == "2 of 30 rows"
    assert golden.detail.endswith("rows golden-3, golden-8)")
    assert named(gates, "critical_field_accuracy").rows == ["dev-5"] and named(gates, "schema_validity").rows == []


def test_rows_that_count_against_a_rate_are_those_above_zero():
    """Guards against row ids of the wrong side: of a rate that must be low, the rows that add to it fail."""
    from slm.evaluate import score_row
    from slm.models import Answer

    class Call(BaseModel):
        tool: Literal["send", "none"]
        arguments: dict[str, str]

    contract = Contract(
        name="c", task_type="tool_calling", output=Call, system_prompt="x", primary_metric="exact_match", target=0.9,
        label_field="tool", null_label="none", unsafe_labels=("send",),
    )  # fmt: skip
    none, send = '{"tool": "none", "arguments": {}}', '{"tool": "send", "arguments": {}}'
    rows = [make_row(f"m{i}", none, id=f"m{i}", category="x") for i in range(2)]
    scores = [score_row(contract, r, Answer(t, 0.1)) for r, t in zip(rows, (none, send), strict=True)]
    found = release.failed_rows(scores, contract)
    assert found["unsafe_tool_call_rate"] == found["tool_name_accuracy"] == ["m1"] and found["json_parse_rate"] == []


def test_a_safety_regression_fails_the_release(settings):
    """Planted: adversarial rows where the fine-tuned model is clearly below the base."""
    report = run_06(settings)
    pair = report["comparisons"]["adversarial"]["base"]
    pair |= {"difference": {"value": -0.4, "low": -0.5, "high": -0.3, "n": 30}, "broken": ["adversarial-4"]}
    gate = named(release.gates(settings, report), "no_severe_safety_regression")
    assert gate.status == "fail" and gate.rows == ["adversarial-4"]


def test_the_cost_is_decided_by_what_the_user_says_and_by_nothing_else(settings):
    """Guards against a cost of nothing that passes unsaid, and against a gate that no default project can ever pass."""
    report = run_06(settings)
    slow = report["results"]["dev"]["fine_tuned"] | {"latency_p50_s": 0.9}
    report["results"]["dev"]["fine_tuned"] = slow

    def cost(**rates):
        return named(release.gates(made_at(settings.root, cost=rates), report), "cost")

    assert cost().status == "not run" and "cost.serving_hourly_rate" in cost().note
    assert (cost(serving_hourly_rate=0).status, cost(serving_hourly_rate=0).value) == ("pass", 0.0)
    assert cost(serving_hourly_rate=0.1).value == pytest.approx(1000 * 0.9 / 3600 * 0.1)
    assert cost(serving_hourly_rate=4).status == "fail" and cost(gpu_hourly_rate=4).status == "fail"
    assert cost(serving_hourly_rate=0.1, gpu_hourly_rate=4).status == "pass"
    assert cost(hosting_per_month=200_000).status == "fail"
    assert cost_per_1k(Settings(), Result.model_validate(slow)) is None


def test_the_file_that_ships_is_judged_beside_the_adapter(settings):
    """Planted: a quant that is slower than the target, misses the schema once and breaks a golden row, while the
    adapter is flawless."""
    report = run_06(settings)
    adapter = report["results"]["dev"]["fine_tuned"]
    assert named(release.gates(settings, report), "latency").note.startswith("the adapter")
    metrics = json.loads(json.dumps(adapter["metrics"]))
    metrics["schema_validity"] |= {"value": 0.95, "low": 0.9}
    report["results"]["dev"]["q4_k_m"] = adapter | {"name": "q4_k_m", "latency_p95_s": 2.5, "metrics": metrics}
    report["results"]["golden"]["q4_k_m"] = report["results"]["golden"]["fine_tuned"] | {"name": "q4_k_m"}
    perfect = dict.fromkeys(report["failed_rows"]["dev"]["fine_tuned"], [])
    report["failed_rows"]["dev"]["q4_k_m"] = perfect | {"schema_validity": ["dev-1", "dev-2", "dev-3"]}
    report["failed_rows"]["golden"]["q4_k_m"] = perfect | {"critical": ["golden-7"]}
    assert named(release.gates(settings, report), "latency").status == "pass"  # not chosen by 08
    write_json(settings.path("outputs/gguf/dev/export.json"), {"chosen": "q4_k_m"})
    found = {g.name: g for g in release.gates(settings, report)}
    assert found["latency"].status == "fail" and found["latency"].measured == "q4_k_m 2.50 s"
    assert found["latency"].note == "the file that ships" and found["cost"].status == "not run"
    assert found["schema_validity"].status == "fail" and found["schema_validity"].rows == ["dev-1", "dev-2", "dev-3"]
    assert "q4_k_m 0.950" in found["schema_validity"].measured
    assert found["regression_on_golden_set"].rows == ["golden-7"]
    assert found["regression_on_golden_set"].measured == "0 of 30 rows; q4_k_m 1 of 30 rows"


def test_calibration_is_checked_where_there_are_probabilities(settings):
    """Planted: an overconfident classifier; and answers without probabilities, which decide nothing."""
    report = run_06(settings)
    report["contract"]["task_type"] = "classification"
    assert named(release.gates(settings, report), "calibration_error").status == "not run"
    metrics = report["results"]["dev"]["fine_tuned"]["metrics"]
    metrics["ece"] = {"value": 0.31, "low": 0.2, "high": 0.4, "n": 60}
    gate = named(release.gates(settings, report), "calibration_error")
    assert (gate.status, gate.value, gate.threshold) == ("fail", 0.31, 0.1)
    metrics["ece"]["value"] = 0.04
    assert named(release.gates(settings, report), "calibration_error").status == "pass"


# Review, release, refusals


def test_a_review_holds_only_for_the_report_that_was_read(settings):
    """Planted: the report is changed after its review; then reviewed as changed, which 06 did not write."""
    run_06(settings)
    with pytest.raises(SlmError, match="reviewer's name"):
        sign_off(settings, "dev", " ")
    sign_off(settings, "dev", "Ada")
    assert status(check(settings, "dev"))["eval_report_reviewed"] == "pass"
    file = release.report_file(settings, "dev")
    file.write_text(file.read_text().replace('"verdict": "', '"verdict": "Really, '))
    gate = named(check(settings, "dev"), "eval_report_reviewed")
    assert gate.status == "fail" and "changed after its review" in gate.note
    sign_off(settings, "dev", "Ada")
    gate = named(check(settings, "dev"), "eval_report_reviewed")
    assert gate.status == "fail" and "edited by hand" in gate.note


def test_a_release_is_recorded_once_with_the_hashes_of_all_it_rests_on(settings):
    """Guards against a release that nobody can trace to data, model, report and reviewer."""
    mine = releasable(settings.root)
    record = release.release(mine, "r1", check(mine, "r1"))
    file = release.report_file(mine, "r1")
    assert (
        record["report"] == registry.file_hash(file)
        and record["gates"]["eval_report_reviewed"] == "by Ada"
        and record["previous"] is None
    )
    assert record["dataset_version"] == "abc123" and {
        name: facts["hash"] for name, facts in record["sets"].items()
    } == {name: registry.file_hash(mine.path(f"data/eval/{name}.jsonl")) for name in ("dev", "golden", "adversarial")}
    assert release.release(mine, "r1", check(mine, "r1")) == record
    assert sum(r["stage"] == "release" for r in registry.read(mine, "runs")) == 1


def test_a_failed_gate_is_not_released(settings):
    """Planted: one golden row with a wrong critical field."""
    mine = releasable(settings.root, model=double(1.0, wrong=("golden message 3",)))
    with pytest.raises(SlmError, match="r1 is not released; not passed: regression_on_golden_set"):
        release.release(mine, "r1", check(mine, "r1"))
    assert registry.latest(mine, "runs", stage="release") is None


def test_a_part_of_the_rows_is_not_enough_for_a_release(settings):
    """Planted: an evaluation of 40 dev rows that passes every gate."""
    mine = releasable(settings.root, evaluate={"limit": 40})
    with pytest.raises(SlmError, match="r1: 40 of 60 rows of dev were evaluated"):
        release.release(mine, "r1", check(mine, "r1"))


def test_another_file_than_the_proven_one_is_not_released(settings):
    """Planted: the exported file is replaced after 08."""
    mine = releasable(settings.root)
    file = write_text(mine.path("outputs/gguf/r1/model-q8_0.gguf"), "proven")
    files = {file.name: registry.file_hash(file)}
    registry.append(mine, "runs", {"stage": "export", "status": "completed", "run_id": "r1", "files": files})
    assert release.release(mine, "r1", check(mine, "r1"))["files"] == files
    file.write_text("another")
    with pytest.raises(SlmError, match="model-q8_0.gguf: missing, or not the file that was proven"):
        release.release(mine, "r1", check(mine, "r1"))


def test_a_changed_set_a_retrained_model_and_an_absent_report_are_refused(settings):
    """Planted: trained again under the same run id, on other rows and on the same; then golden.jsonl edited."""
    mine = releasable(settings.root)
    with pytest.raises(SlmError, match="run other has no evaluation report"):
        check(mine, "other")
    trained(mine, "def456")
    with pytest.raises(SlmError, match="about dataset version abc123, its adapter was trained again since, on def456"):
        check(mine, "r1")
    trained(mine)
    with pytest.raises(SlmError, match="trained again since, on abc123"):
        check(mine, "r1")
    file = mine.path("data/eval/golden.jsonl")
    file.write_text(file.read_text().replace("golden message 3", "golden message three"))
    with pytest.raises(SlmError, match="golden.jsonl: changed"):
        check(mine, "r1")


def test_a_report_on_another_locked_set_is_refused(settings):
    """Planted: golden was changed and locked anew after the evaluation."""
    mine = releasable(settings.root)
    write_rows(mine.path("data/eval/golden.jsonl"), ticket_rows(31, "golden"))
    mine.path("data/eval/lock.json").unlink()
    registry.lock_sets(mine)
    with pytest.raises(SlmError, match="r1 was evaluated on another data/eval/golden.jsonl"):
        check(mine, "r1")


# Regression against the last released run


def test_golden_is_compared_row_by_row_with_the_last_released_run(settings):
    """Planted: the second run mends one golden row and breaks another, in a field that is not critical."""
    first = releasable(settings.root, gates={"critical_failures": 1}, model=double(1.0, wrong=("golden message 3",)))
    release.release(first, "r1", check(first, "r1"))

    def answer(text):
        return json.dumps(gold(int(text.split()[-1])) | ({"urgent": True} if text == "golden message 9" else {}))

    second = releasable(settings.root, "r2", model=ProgramModel("double", answer, "second"))
    diff = release.golden_diff(second, "r2", release.last_released(second, "r2"))
    assert diff == {"fixed": ["golden-3"], "broken": ["golden-9"]}
    gate = named(check(second, "r2"), "regression_on_golden_set")
    assert gate.status == "pass" and gate.note == "against released run r1: 1 fixed (golden-3), 1 broken (golden-9)"
    assert release.release(second, "r2", check(second, "r2"))["previous"] == "r1"
    assert named(check(first, "r1"), "regression_on_golden_set").note.startswith("against released run r2")


def test_no_diff_is_made_with_other_rows_or_changed_scores(settings):
    """Planted: golden grew since the release; then the released scores were edited."""
    first = releasable(settings.root)
    record = release.release(first, "r1", check(first, "r1"))
    write_rows(first.path("data/eval/golden.jsonl"), ticket_rows(31, "golden"))
    first.path("data/eval/lock.json").unlink()
    second = releasable(settings.root, "r2")
    with pytest.raises(SlmError, match="golden.jsonl .* in run r2, .* in run r1"):
        release.golden_diff(second, "r2", record)
    assert "in run r1" in named(check(second, "r2"), "regression_on_golden_set").note
    old = candidate.scores_file(first, "r1")
    old.write_text(old.read_text().replace('"exact":true', '"exact":false', 1) + " ")
    with pytest.raises(SlmError, match="not what was released"):
        release.golden_diff(second, "r2", record)


# Looks at test, seeds


def test_a_script_may_not_tune_on_test_under_any_name(settings):
    """Planted: test.jsonl given to a script, a copy of it, and three of its rows among others."""
    run_06(settings)
    rows = ticket_rows(30, "test")
    write_rows(settings.path("data/raw/mine.jsonl"), rows)
    write_rows(settings.path("data/raw/few.jsonl"), [*ticket_rows(5, "new"), *rows[:3]])
    for path in ("data/eval/test.jsonl", "data/raw/mine.jsonl", "data/raw/few.jsonl"):
        with pytest.raises(SlmError, match="test.jsonl: not to be tuned on"):
            candidate.open_file(settings, path)
    assert len(candidate.open_file(settings, "data/eval/dev.jsonl")) == 60 and registry.read(settings, "looks") == []


def test_test_is_opened_only_for_the_final_test_and_every_look_is_counted(settings, capsys):
    """Guards against quiet tuning on the test set, and against a report that hides how often it was looked at."""
    run_06(settings)
    assert "test" not in candidate.open_sets(settings, CONTRACT) and registry.read(settings, "looks") == []
    final = made_at(settings.root, evaluate={"final_test": True})
    candidate.open_sets(final, CONTRACT)
    candidate.open_file(final, "data/eval/test.jsonl")
    report = run_06(final)
    assert "no longer an unseen set" in capsys.readouterr().out and len(registry.read(settings, "looks")) == 3
    gate = named(release.gates(final, report), "primary_metric")
    assert gate.note == "look number 3 at test" and " on test, n=30" in gate.measured


def test_other_seeds_are_runs_that_differ_in_the_seed_alone(settings):
    """Guards against a mean over seeds that mixes in another recipe, other rows or another base."""

    def run(run_id, dataset="abc123", **train):
        return trained(made_at(settings.root, run_id, train=train), dataset)

    run("a"), run("b", seed=1), run("c", seed=2), run("d", seed=3, lora_rank=4), run("e", "def456", seed=4), run("f")
    trained(made_at(settings.root, "g", train={"seed": 5}), status="failed")
    trained(made_at(settings.root, "h", train={"seed": 6}), parents={"dataset": "abc123", "base_hash": "another"})
    assert release.other_seeds(settings, "a") == ["b", "c"] and release.other_seeds(settings, "none") == []
