"""The reports of 02 and 06, the page, the plots, the comparison of two runs and the model card."""
# ruff: noqa: F811

import json
import subprocess
import sys
from typing import Literal

import pytest
import yaml
from huggingface_hub import ModelCard
from pydantic import BaseModel
from tickets import CONTRACT, double, fewshot, gold, predict, run_02, settings, ticket_rows  # noqa: F401

from slm import registry
from slm.contract import TASK_TYPES, Contract
from slm.errors import SlmError
from slm.evaluate import Result, candidate, evaluate, load_candidate, run_baselines
from slm.models.program import ProgramModel
from slm.report import compare, eval_report, html, model_card, plots, tables
from slm.report.render import fill
from slm.rows import make_row, write_json, write_rows

EXPORT = {
    "chosen": "q8_0",
    "verdict": "q8_0 holds: 37 of 40 golden rows exactly right, the adapter 37 (tolerance 1).",
    "runtime": "llama-cpp-python 0.3.36",
    "files": [
        {"file": "f16", "size MB": 270.1, "p50 s": 0.9, "p95 s": 1.4, "memory MB": 410, "holds": "yes"},
        {"file": "q8_0", "size MB": 145.2, "p50 s": 0.6, "p95 s": 1.1, "memory MB": 290, "holds": "yes"},
    ],
}


SECTIONS = (
    "Base Model", "Fine-Tuning Method", "Task", "Intended Use", "Non-Goals", "Dataset", "Evaluation", "Safety",
    "Deployment", "Limitations", "Change Log",
)  # fmt: skip


def run_06(settings, right=0.95, model=None, more=()):
    """02 and 06 with doubles; `more`: names of further models of this run, scored on dev."""
    known = run_02(settings)
    sets = candidate.open_sets(settings, CONTRACT)
    tuned = candidate.run_candidate(settings, CONTRACT, model or double("tuned", right, 9), sets)
    for name in more:
        files = evaluate(settings, CONTRACT, double(name, right, 4), sets["dev"], set="dev", name=name, latency=True)
        tuned.append(files)
    write_json(candidate.scores_file(settings, settings.run_id), [r.model_dump() for r in tuned])
    others = run_baselines(settings, CONTRACT, sets, predict=predict, fewshot=fewshot, known=known)
    report = eval_report.build(settings, CONTRACT, tuned, others, sets)
    eval_report.write(settings, CONTRACT, report, tuned, others)
    return report


def other_run(settings, run_id):
    """The same project under another run id."""
    return settings.model_copy(update={"run_id": run_id})


def report_text(settings, suffix="md"):
    return settings.path(f"outputs/eval_reports/{settings.run_id}/eval_report.{suffix}").read_text()


def trained(settings):
    registry.append(settings, "datasets", {
        "version": "abc123", "rows": 40, "file": "data/accepted/all.jsonl", "parents": {}, "gates": [{}] * 10,
        "counts": {"source": {"teacher": 30, "human": 10}},
        "split": {"rows": {"train": 28}, "rule": "by group", "seed": 0},
    })  # fmt: skip
    registry.append(settings, "runs", {
        "stage": "train", "status": "completed", "run_id": settings.run_id, "method": "lora", "trainer": "trl",
        "seconds": 90, "device": "cpu", "parents": {"dataset": "abc123"}, "recipe": settings.train.model_dump(),
        "metrics": {"steps": 60, "epochs": 3, "dev_loss_first": 2.0, "dev_loss_best": 0.3},
    })  # fmt: skip


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
    assert (folder / "eval_report.html").read_text().count("data:image/png;base64,") == 3
    assert registry.latest(settings, "runs", stage="evaluate")["verdict"] == report["verdict"]
    kept = [r.set for r in load_candidate(settings, "dev") if r.name == "fine_tuned"]
    assert kept == ["dev", "golden", "adversarial"]


def test_a_model_no_better_than_the_rules_is_not_called_better(settings):
    """Planted: a fine-tuned model of the rule program's quality."""
    assert run_06(settings, right=0.25)["verdict"].startswith(("Worse than", "No difference shown"))


def test_one_table_holds_every_model_with_what_a_request_takes(settings):
    """Guards against figures of one model that stand in another place than those it must be compared with."""
    report = run_06(settings, more=("q8_0", "f16"))
    text = report_text(settings).split("## All models on dev\n\n")[1].split("\n\n")[0].splitlines()
    head, names = text[0].split(" | "), [line.split(" | ")[0].strip("| ") for line in text[2:]]
    assert names == [tables.title(n) for n in tables.TITLES if n in report["results"]["dev"]]
    assert names[-2:] == ["file f16", "file q8_0"] and "fine-tuned, constrained" in names
    assert {"constrained", "latency p50 / p95 / p99 (ms)", "error rate", "lenient_schema_validity"} <= set(head)
    assert {"f16", "q8_0", "rules"} <= report["comparisons"]["dev"].keys()
    assert report["verdict"].startswith("Better than every baseline")  # a file that is as good is no baseline


def test_a_constrained_side_is_named_in_the_comparison(settings):
    """Planted: a constrained model beside the unconstrained one."""
    report = run_06(settings, more=("q8_0",))
    mixed = {k: c["verdict"] for k, c in report["comparisons"]["dev"].items() if c["mixed"]}
    assert mixed and all(v.endswith("(constrained against unconstrained)") for v in mixed.values())
    assert set(mixed) <= {"fine_tuned_constrained", "prompted_constrained"}
    assert "q8_0" not in report["constrained"]["dev"] and "fine_tuned" in report["constrained"]["dev"]


def test_warnings_stand_right_below_the_verdict(settings):
    """Planted: a model that gives every message the same answer."""
    run_06(settings, model=ProgramModel("stuck", lambda text: json.dumps(gold(0)), "stuck"))
    top = report_text(settings).split("## Always reported")[0]
    assert "**Warnings**" in top and "fine-tuned on dev: " in top


def test_the_strongest_cheap_baseline_and_the_detectable_difference_are_named(settings):
    """Guards against a gain over a weak baseline, and against a yardstick that is chosen after the result."""
    sets = {"dev": ticket_rows(60)}
    report = run_06(settings)
    assert report["strongest_cheap"] == "rules" and report["detectable"]["stated"] == "only now"
    assert "Strongest cheap baseline: **rule program**" in report_text(settings)
    eval_report.eval_plan(settings, CONTRACT, sets)
    trained(settings)
    assert run_06(settings)["detectable"]["stated"] == "before training"
    plan = registry.latest(settings, "runs", stage="plan")
    assert plan["spread"] == 0.4 and plan["contract"] == CONTRACT.schema_hash
    assert f"{plan['detectable']['dev']}, stated before training (per-row spread 0.40" in report_text(settings)


def test_gap_and_seeds_are_measured_or_say_why_not(settings, monkeypatch):
    """Guards against a mean over seeds, or a gap closed, that silently rests on one run."""
    trained(settings)
    report = run_06(settings)
    assert "larger model not run" in report["gap_closed"]["not_run"] and "train.seed" in report["seeds"]["not_run"]
    again = other_run(settings, "again")
    trained(again)
    run_06(again, right=0.85)
    monkeypatch.setattr("slm.report.eval_report.other_seeds", lambda settings, run_id: ["again"])
    monkeypatch.setattr("slm.models.larger", lambda settings: double("large", 0.9))
    report = run_06(settings)
    assert report["seeds"]["n"] == 2 and report["seeds"]["runs"] == ["dev", "again"]
    assert report["gap_closed"]["low"] <= report["gap_closed"]["value"] <= report["gap_closed"]["high"]


def test_the_report_and_the_card_say_what_preference_tuning_did(settings):
    """Guards against a discarded DPO that nobody hears of, and against a card that denies one that was kept."""
    trained(settings)
    run_06(settings)
    assert "Preference tuning" not in report_text(settings)
    verdict = "DPO discarded, against SFT alone no difference shown: 0.700 -> 0.710 on dev."
    record = registry.latest(settings, "runs", stage="train", run_id=settings.run_id)
    registry.append(settings, "runs", {**record, "preference": {"verdict": verdict}})
    run_06(settings)
    assert f"* Preference tuning: {verdict}" in report_text(settings)
    card = model_card.write(settings, CONTRACT, settings.run_id).read_text()
    assert f"Preference optimization: {verdict}" in card and "No preference optimization" not in card


def test_the_report_says_what_training_did_to_general_skills(settings):
    """Guards against a model that has forgotten everything else, and a report that measures its own task alone."""
    trained(settings)
    run_06(settings)
    assert "General skills" not in report_text(settings)  # a run on several processes has no such figure
    record = registry.latest(settings, "runs", stage="train", run_id=settings.run_id)
    for last, said in ((2.35, "Nothing is shown to be forgotten: a rise above 0.4 counts."), (3.0, "It has forgotten: ")):
        numbers = {"general_loss_first": 2.0, "general_loss_final": last}
        registry.append(settings, "runs", {**record, "metrics": record["metrics"] | numbers})
        run_06(settings)
        text = report_text(settings)
        assert f"everyday questions went from 2.00 before training to {last:.2f} after" in text and said in text


def test_what_was_not_run_is_listed_with_its_reason(settings):
    """Guards against a baseline that is missing from the report without a word."""
    lines = {part: line["why"] for line in run_06(settings)["not_run"] for part in line["not run"].split("; ")}
    assert "larger_gguf" in lines["larger model on dev"] and "final_test" in lines["test set"]
    assert {"exported files", "calibration", "test set"} <= lines.keys()
    assert "| test set |" in report_text(settings)


def test_of_test_rows_the_ids_alone_are_shown(settings):
    """Planted: the test set is opened; none of its messages may stand in a report that prompts are tuned from."""
    settings = settings.model_copy(update={"evaluate": settings.evaluate.model_copy(update={"final_test": True})})
    report = run_06(settings, right=0.7)
    hidden = [f for f in report["failures"] if f["set"] == "test"]
    assert report["headline_set"] == "test" and hidden and report["looks_at_test"] == 1
    for suffix in ("md", "html", "json"):
        text = report_text(settings, suffix)
        assert "test message" not in text and hidden[0]["row_id"] in text
    assert "Looks at the test set, over all runs: 1." in report_text(settings)
    waits = report_text(settings).split("## All models on test")[1].split("![")[0]
    assert "latency p50" in waits  # nothing is timed on test, but the table is whole


def test_the_worst_failures_come_first_and_stand_side_by_side(settings):
    """Guards against a list of failures in file order, in which the critical ones are lost."""
    report = run_06(settings, right=0.7)
    order = [(not f["critical"], f["value"]) for f in report["failures"] if f["set"] == "dev"]
    assert order == sorted(order) and len(report["lines"]["failure_examples"]) == 10
    worst = report["lines"]["failure_examples"][0]
    lines = tables.side_by_side(worst)
    assert [line["field"] for line in lines if line[""]] == worst["wrong"] == ["topic"]
    assert '<tr class="wrong">\n<td>✗</td>\n<td>topic</td>' in report_text(settings, "html")
    nothing = tables.side_by_side(worst | {"given": None, "wrong": list(worst["expected"])})
    assert all(line["given"] == "(unreadable)" and line[""] for line in nothing)


def test_the_page_loads_nothing_and_runs_nothing(tmp_path):
    """Planted: a customer's message with a script, a remote picture, a link and a fence of its own."""
    (tmp_path / "own.png").write_bytes(b"png")
    hostile = "<script>alert(1)</script> ![x](http://evil.example/x.png) [y](javascript:alert(2)) ````"
    failure = {"row_id": "r1", "set": "dev", "kind": "canonical", "critical": True, "user": hostile, "given": None,
               "text": hostile, "expected": {"a": hostile}, "wrong": ["a"]}  # fmt: skip
    text = "# Title\n\n## One & two\n\n![own](own.png) ![other](../own.png)\n\n" + tables.markdown([{"cell": hostile}])
    page = html.page(text + "\n" + hostile + "\n\n" + tables.markdown(tables.side_by_side(failure)), tmp_path)
    assert page.count("<img") == 1 and 'src="data:image/png;base64,' in page
    for live in ("<script", 'href="http', 'href="javascript', 'src="http'):
        assert live not in page
    assert '<h2 id="part0">One &amp; two</h2>' in page and '<a href="#part0">One &amp; two</a>' in page
    assert "prefers-color-scheme: dark" in page


def test_a_template_with_an_unfilled_place_is_an_error():
    """Guards against a report in which a missing value is an empty spot."""
    with pytest.raises(Exception, match="is undefined"):
        fill("compare.md", a="one")


def test_two_runs_are_compared_row_by_row_without_the_projects_own_code(settings):
    """Guards against "it got better" without the rows that broke."""
    run_06(settings, right=0.6)
    later = other_run(settings, "later")
    run_06(later, right=0.95)
    text = compare.render(settings, "dev", "later")
    assert text.startswith("# later against dev: tickets") and "better" in text.splitlines()[2]
    a, b = ({s.row_id: s.exact for s in load_candidate(settings, r)[0].scores} for r in ("dev", "later"))
    fixed = next(line for line in text.splitlines() if line.startswith("| dev | fine-tuned | fixed |"))
    assert [i for i in a if b[i] and not a[i]] == fixed.strip("| ").split(" | ")[-1].split(", ")
    with pytest.raises(SlmError, match="run nobody has no evaluation report"):
        compare.render(settings, "dev", "nobody")


@pytest.mark.parametrize("fault", ["set", "contract", "rows"])
def test_runs_on_another_set_contract_or_rows_are_not_compared(settings, fault):
    """Planted: one run's results come from another version of dev, another contract, or other rows."""
    run_06(settings)
    later = other_run(settings, "later")
    run_06(later)
    file = candidate.scores_file(settings, "later")
    results = json.loads(file.read_text())
    if fault == "set":
        results[0]["set_hash"] = "f" * 64
    elif fault == "rows":
        results[0]["scores"].pop()
    else:
        report = settings.path("outputs/eval_reports/later/eval_report.json")
        other = {"contract": {"hash": "0" * 12, "primary_metric": "field_f1"}}
        write_json(report, json.loads(report.read_text()) | other)
    write_json(file, results)
    named = {"set": "eval/dev.jsonl was .* in dev and is ffff", "contract": "against 000000000000", "rows": "dev-59"}
    with pytest.raises(SlmError, match=named[fault]):
        compare.render(settings, "dev", "later")


def test_the_card_is_read_back_by_hugging_face_with_its_results(settings):
    """Guards against metadata that the Hub ignores."""
    trained(settings)
    report = run_06(settings)
    path = model_card.write(settings, CONTRACT, "dev", EXPORT)
    card = ModelCard.load(path)
    found = {(r.dataset_split, r.metric_type): r.metric_value for r in card.data.eval_results}
    value = report["results"]["golden"]["fine_tuned"]["metrics"]["field_f1"]["value"]
    assert found[("golden", "field_f1")] == pytest.approx(value, abs=1e-4) and len(found) == 12
    front = yaml.safe_load(path.read_text().split("---")[1])
    assert front["license"] == "apache-2.0" and front["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert (
        front["language"] == ["en"]
        and "gguf" in front["tags"]
        and front["model-index"][0]["name"] == "model-project-dev"
    )


def test_the_card_fills_every_section_and_says_what_was_not_run(settings):
    """Guards against a card with a placeholder or a section left out."""
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
    for section in SECTIONS:
        body = text.split(f"\n\n## {section}\n")[1].split("\n## ")[0].strip()
        assert len(body) > 20, section
    assert not any(mark in text for mark in ("TODO", "TBD", "{", "None", " nan"))
    waits = "p50 600.0 ms, p95 1.10 s in the runtime"
    for words in ("LoRA with trl, rank 16", "abc123", "teacher 75%", waits, "290 MB"):
        assert words in text


class Topic(BaseModel):
    topic: Literal["one", "two", "none"]


class Free(BaseModel):
    text: str


class Answered(BaseModel):
    answer: str | None
    citations: list[str]


class Issue(BaseModel):
    rule: str
    severity: Literal["low", "high"]


class Review(BaseModel):
    issues: list[Issue]


class Step(BaseModel):
    tool: str


class Plan(BaseModel):
    steps: list[Step]


class ToolCall(BaseModel):
    tool: Literal["one", "two", "none"]
    arguments: dict[str, str]


NO_CALL = {"tool": "none", "arguments": {}}
TYPES = {
    "classification": (Topic, "macro_f1", {"topic": "one"}, {"topic": "two"}),
    "extraction": (Topic, "field_f1", {"topic": "one"}, {"topic": "two"}),
    "json_generation": (Topic, "exact_match", {"topic": "one"}, {"topic": "two"}),
    "tool_calling": (ToolCall, "exact_match", {"tool": "one", "arguments": {"a": "b"}}, NO_CALL),
    "rewriting": (Free, "constraint_pass_rate", {"text": "Dear all"}, {"text": "hey you"}),
    "qa": (Answered, "answer_correctness", {"answer": "message", "citations": ["message"]},
           {"answer": None, "citations": []}),
    "review": (Review, "issue_f1", {"issues": [{"rule": "r1", "severity": "low"}]}, {"issues": []}),
    "planning": (Plan, "tool_sequence_accuracy", {"steps": [{"tool": "a"}, {"tool": "b"}]}, {"steps": [{"tool": "b"}]}),
    "safety": (Topic, "violation_recall", {"topic": "one"}, {"topic": "none"}),
}  # fmt: skip


@pytest.mark.parametrize("task_type", TASK_TYPES)
def test_report_page_and_card_are_whole_for_every_task_type(settings, task_type):
    """Guards against a report that only works for the starter's task, and a card with an empty bullet or a brace."""
    output, primary, right, wrong = TYPES[task_type]
    label = {"Topic": "topic", "ToolCall": "tool"}.get(output.__name__)
    contract = Contract(
        name="any", task_type=task_type, output=output, system_prompt="Do it.", primary_metric=primary, target=0.5,
        label_field=label, null_label="none" if label else None,
        constraints=(lambda text, value: {"polite": "hey" not in value["text"]}) if task_type == "rewriting" else None,
    )  # fmt: skip
    null = {"topic": "none"} if label == "topic" else NO_CALL if label else right
    sets = {
        name: [make_row(f"{name} message {i}", json.dumps(null if i % 5 == 4 else right), id=f"{name}-{i}",
                        category="c", kind="adversarial" if name == "adversarial" else "canonical") for i in range(n)]
        for name, n in (("dev", 40), ("golden", 10), ("adversarial", 10), ("test", 5))
    }  # fmt: skip
    for name, rows in sets.items():
        write_rows(settings.path(f"data/eval/{name}.jsonl"), rows)
    registry.lock_sets(settings)
    trained(settings)

    def scored(name, share, set):
        def answer(text):
            i = int(text.split()[-1])
            return json.dumps(wrong if i >= share * len(sets[set]) else null if i % 5 == 4 else right)

        model = ProgramModel(name, answer, f"{task_type}{name}{set}")
        return evaluate(settings, contract, model, sets[set], set=set, name=name, latency=set == "dev")

    where = ("dev", "golden", "adversarial")
    mine, base = [scored("fine_tuned", 0.9, s) for s in where], [scored("base", 0.2, s) for s in where]
    report = eval_report.build(settings, contract, mine, base, sets)
    text = eval_report.write(settings, contract, report, mine, base).read_text()
    assert report["verdict"].startswith("Better than every baseline") and primary in text
    card = model_card.write(settings, contract, "dev")
    found = {(r.dataset_split, r.metric_type) for r in ModelCard.load(card).data.eval_results}
    assert {("dev", primary), ("golden", primary)} <= found
    body = card.read_text().split("---\n", 2)[2]
    for section in SECTIONS:
        assert len(body.split(f"\n## {section}\n")[1].split("\n## ")[0].strip()) > 20, section
    assert not any(mark in body for mark in ("TODO", "TBD", "{", "}", "None", "nan ", "()"))
    bullets = [line for line in body.splitlines() if line.startswith("- ")]
    assert len(bullets) >= 20 and not [b for b in bullets if ":" in b and b.partition(":")[2].strip() in ("", "-")]


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


def uncut(path):
    """Whether nothing touches the edge of a picture: what is cut or runs out of it would."""
    from matplotlib.image import imread

    picture = imread(path)[:, :, :3]
    return bool((picture[[0, -1]] == 1).all() and (picture[:, [0, -1]] == 1).all()) and picture.std() > 0


@pytest.mark.parametrize("count", [2, 12])
def test_plots_with_long_labels_and_many_models_are_not_cut(settings, tmp_path, count):
    """Planted: labels of sixty characters, two and twelve classes, fourteen models, bins with no rows."""
    names = [f"a_rather_long_label_of_the_task_that_nobody_would_abbreviate_{i}" for i in range(count)]
    metric = {"value": 0.4, "low": 0.3, "high": 1.0, "n": 7}
    found = {n: metric | {"value": i / 14} for i, n in enumerate(tables.TITLES)}
    results = [
        Result(name=n, set="dev", metrics={"required_argument_accuracy": m}, constrained="constrained" in n)
        for n, m in found.items()
    ]
    tenths = [i / 10 for i in range(10)]
    bins = [{"low": t, "high": t + 0.1, "confidence": t + 0.05, "accuracy": t, "n": int(100 * t * t)} for t in tenths]
    mine = Result(
        name="fine_tuned_constrained", set="adversarial",
        slices={key: dict.fromkeys(names, metric) for key in ("category", "kind")},
        confusion={"labels": names, "counts": [[1000 * (i == j) for j in range(count)] for i in range(count)]},
        calibration={"ece": 0.1, "brier": 0.2, "n": 285, "bins": bins},
    )  # fmt: skip
    files = [
        plots.models_bar(results, "required_argument_accuracy", tmp_path / "models.png", 0.95),
        plots.slices(mine, "required_argument_accuracy", tmp_path / "slices.png"),
        plots.confusion(mine, tmp_path / "confusion.png"), plots.reliability(mine, tmp_path / "reliability.png"),
    ]  # fmt: skip
    assert [f.name for f in files if not uncut(f)] == []


def test_a_column_without_a_figure_is_left_out_and_pictures_in_cells_are_text():
    """Guards against six empty columns, and against a picture that a customer's message loads."""
    half = {"exact_match": {"value": 0.5, "low": 0.4, "high": 0.6, "n": 9}}
    absent = Result(name="larger", set="dev", reason="not set")
    two = [Result(name="base", set="dev", metrics=half, latency_p50_s=0.5), absent]
    line = tables.results(two, ["exact_match", "field_f1"])
    assert list(line[0]) == ["model", "constrained", "exact_match", "n", "latency p50 / p95 / p99 (ms)", "note"]
    assert line[0]["latency p50 / p95 / p99 (ms)"] == "500 / - / -" and line[1]["note"] == "not run: not set"
    assert tables.markdown([{"n": 1, "x": "![a](b)"}]).splitlines()[1:] == ["|---:|---|", "| 1 | !\\[a](b) |"]


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
    for command in (["run_eval", "--model", "outputs/adapters/none"], ["run_baseline", "--model", "gpt"]):
        done = subprocess.run(
            [sys.executable, f"scripts/{command[0]}.py", *command[1:]], capture_output=True, text=True
        )
        assert done.returncode == 1 and done.stderr.startswith("error: ") and "Traceback" not in done.stderr
