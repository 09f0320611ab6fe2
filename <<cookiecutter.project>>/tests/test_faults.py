"""Ten planted faults: each must be named by the report, or stop the run with a sentence that names it."""
# ruff: noqa: F811

import json

import pytest
from pydantic import BaseModel, ConfigDict
from test_release import CONTRACT, double, gold, made_at, releasable, run_06, settings, ticket_rows  # noqa: F401
from typer.testing import CliRunner

from slm import registry
from slm.cli import app
from slm.contract import Contract
from slm.curate.leakage import evaluation_rows, leaks
from slm.errors import SlmError
from slm.evaluate import candidate, check, load_candidate, paired, release
from slm.models import Answer
from slm.models.program import ProgramModel
from slm.report import compare
from slm.rows import make_row, write_rows

pytestmark = pytest.mark.usefixtures("settings")


class Text(BaseModel):
    model_config = ConfigDict(extra="forbid")
    text: str


class Endless:
    """A model that is right, and does not stop on every third row."""

    name = fingerprint = "endless"
    memory_mb = None

    def answer(self, prompts):
        texts = [prompt.messages[-1]["content"] for prompt in prompts]
        return [
            Answer(json.dumps(gold(n)), 0.1, 10, 48, "length" if n % 3 == 0 else "stop")
            for n in (int(text.split()[-1]) for text in texts)
        ]


def markdown(settings) -> str:
    return release.report_file(settings, settings.run_id).with_suffix(".md").read_text()


def relock(settings, name: str, rows) -> None:
    """Change a set and lock all sets anew, as a user would who means it."""
    write_rows(settings.path(f"data/eval/{name}.jsonl"), rows)
    settings.path("data/eval/lock.json").unlink(missing_ok=True)
    registry.lock_sets(settings)


def test_a_model_that_always_answers_the_majority_class_is_named(settings):
    """Planted: one constant answer, the commonest. Its accuracy is that of the majority baseline, and no more."""
    constant = json.dumps({"topic": "bill", "order": None, "urgent": False})
    report = run_06(settings, ProgramModel("constant", lambda text: constant, "constant"))
    (warning,) = [w for w in report["warnings"] if " on dev: " in w]
    assert "collapse: one and the same output for all 60 rows" in warning and warning in markdown(settings)
    assert not report["verdict"].startswith("Better")
    assert report["comparisons"]["dev"]["majority"]["verdict"] == "no difference shown"


def test_a_model_that_echoes_the_prompt_is_named(settings):
    """Planted: every answer is the customer's message."""
    for name, n in (("dev", 60), ("test", 30), ("adversarial", 30), ("golden", 30)):
        rows = [make_row(f"{name}, please sort this message: {i}", r.answer, id=r.id, category=r.meta.category)
                for i, r in enumerate(ticket_rows(n, name))]  # fmt: skip
        write_rows(settings.path(f"data/eval/{name}.jsonl"), rows)
    report = run_06(settings, ProgramModel("echo", lambda text: text, "echo"))
    assert any("echo: 60 of 60 answers repeat the prompt" in w for w in report["warnings"])
    assert "echo: 60 of 60" in markdown(settings) and report["verdict"].startswith("Worse than")


def test_endless_generation_is_named(settings):
    """Planted: right answers, a third of which are cut off at max_new_tokens: no metric of content would notice."""
    report = run_06(settings, Endless())
    assert report["results"]["dev"]["fine_tuned"]["metrics"]["exact_match"]["value"] == 1.0
    assert any("endless: 20 of 60 answers did not stop" in w for w in report["warnings"])
    assert "endless: 20 of 60" in markdown(settings)


def test_a_leaked_test_row_is_named(settings):
    """Planted: a test row in another spelling among the training rows, put there after curation."""
    mine = releasable(settings.root)
    twin = make_row("TEST  message 7", json.dumps(gold(7)), id="leaked", category="x")
    rows = [*ticket_rows(20, "train"), twin]
    verdict = leaks(rows, evaluation_rows(mine), 0.6, 0.99)[-1]
    assert verdict.gate == "evaluation_leakage" and "row test-7 of data/eval/test.jsonl" in verdict.reason
    check(mine, "r1")
    write_rows(mine.path("data/accepted/train.jsonl"), rows)
    with pytest.raises(SlmError, match="train.jsonl: row leaked is row test-7 of data/eval/test.jsonl; its score is"):
        check(mine, "r1")


def test_a_shuffled_label_is_named(settings):
    """Planted: two dev rows swap their answers between the baselines and the fine-tuned model; first unlocked, then
    locked anew; last, a model whose answers stand one row off."""
    run_06(settings)
    rows = ticket_rows(60)
    before = {r.name: r for r in load_candidate(settings, "dev") if r.set == "dev"}["fine_tuned"].scores
    rows[4], rows[7] = (
        r.model_copy(update={"messages": [r.messages[0], other.messages[1]]})
        for r, other in ((rows[4], rows[7]), (rows[7], rows[4]))
    )
    write_rows(settings.path("data/eval/dev.jsonl"), rows)
    with pytest.raises(SlmError, match="data/eval/dev.jsonl: changed since it was locked"):
        candidate.open_sets(settings, CONTRACT)
    relock(settings, "dev", rows)
    after = candidate.evaluate(settings, CONTRACT, double(1.0), rows, set="dev", name="fine_tuned").scores
    with pytest.raises(SlmError, match="row dev-4: its expected answer changed"):
        paired(after, before, CONTRACT, settings)
    relock(settings, "dev", ticket_rows(60))
    off = ProgramModel("off", lambda text: json.dumps(gold(int(text.split()[-1]) + 1)), "off")
    assert run_06(settings, off)["verdict"].startswith("Worse than")


def test_an_improvement_within_noise_is_named(settings, monkeypatch):
    """Planted: the fine-tuned model is right on one row more than the best baseline."""
    base = double(1.0, wrong=("dev message 3", "dev message 5"))
    monkeypatch.setattr("slm.models.student", lambda settings, adapter=None: base)
    report = run_06(settings, double(1.0, wrong=("dev message 3",)))
    gain = report["comparisons"]["dev"]["prompted_base"]["difference"]
    assert gain["value"] > 0 and gain["low"] <= 0
    assert report["verdict"].startswith("No difference shown against the best baseline")
    assert f"**{report['verdict']}**" in markdown(settings)


def test_a_changed_golden_row_stops_evaluation_review_of_gates_and_release(settings):
    """Planted: one word of one golden row, after 06."""
    mine = releasable(settings.root)
    file = mine.path("data/eval/golden.jsonl")
    file.write_text(file.read_text().replace("golden message 3", "golden message three"))
    for stopped in (lambda: candidate.open_sets(mine, CONTRACT), lambda: check(mine, "r1"), lambda: run_06(mine)):
        with pytest.raises(SlmError, match="data/eval/golden.jsonl: changed since it was locked"):
            stopped()


def test_predictions_from_another_dataset_version_are_refused(settings):
    """Planted: dev has two rows more in the second run; and scores of the first run beside the second run's report."""
    first, second = made_at(settings.root, "r1"), made_at(settings.root, "r2")
    run_06(first)
    was = registry.check_locked(first)["dev"]
    relock(first, "dev", ticket_rows(62))
    run_06(second)
    now = registry.check_locked(second)["dev"]
    with pytest.raises(SlmError, match=f"dev.jsonl was {was[:12]} in r1 and is {now[:12]} in r2"):
        compare.render(second, "r1", "r2")
    with pytest.raises(SlmError, match="r1 was evaluated on another data/eval/dev.jsonl"):
        check(first, "r1")
    candidate.scores_file(second, "r2").write_bytes(candidate.scores_file(first, "r1").read_bytes())
    with pytest.raises(SlmError, match=f"{was[:12]}.*{now[:12]}|{now[:12]}.*{was[:12]}"):
        build_again(second)


def build_again(settings):
    """A report from the scores that lie there, as 08 builds it."""
    from slm.evaluate import load_baselines, scored_sets
    from slm.report import eval_report

    results, known = load_candidate(settings, settings.run_id), load_baselines(settings, CONTRACT)
    return eval_report.build(settings, CONTRACT, results, known, scored_sets(settings, results))


def test_a_constrained_model_beside_an_unconstrained_one_is_named(settings):
    """Planted: a fine-tuned model held to the schema against baselines that are not, and the other way round."""
    held = made_at(settings.root, evaluate={"constrained": True})
    report = run_06(held)
    mixed = "(constrained against unconstrained)"
    pairs = report["comparisons"]["dev"]
    assert pairs["prompted_constrained"]["verdict"].endswith(mixed) and mixed not in pairs["prompted_base"]["verdict"]
    assert report["constrained"]["dev"]["fine_tuned"]["verdict"].endswith(mixed)
    assert mixed not in report["constrained"]["dev"]["prompted_constrained"]["verdict"] and mixed in markdown(held)


def test_a_judge_that_prefers_the_first_answer_is_named(settings, monkeypatch):
    """Planted: a judge that takes answer 1 in both orders. Every row is then a tie, and the report says why."""
    contract = Contract(
        name="polish", task_type="rewriting", output=Text, system_prompt="Make it polite.", target=0.5,
        primary_metric="rubric_score",
    )  # fmt: skip
    notes = {"better": 1, "fidelity": 4, "task": 4, "clarity": 4}
    judge = ProgramModel("first", lambda text: json.dumps(notes), "first")
    monkeypatch.setattr("slm.evaluate.preference.judge_model", lambda settings: judge)
    monkeypatch.setattr("test_release.CONTRACT", contract)
    monkeypatch.setattr("test_release.predict", lambda text: {"text": f"please, {text}"})
    judged = made_at(settings.root, evaluate={"judge": {"url": "http://localhost:1/v1", "model": "judge"}})
    for name, n in (("dev", 40), ("test", 30), ("adversarial", 30), ("golden", 30), ("seed", 20)):
        texts = [json.dumps({"text": f"Dear all, {name} {i}"}) for i in range(n)]
        rows = [make_row(f"{name} text {i}", text, id=f"{name}-{i}", category="x") for i, text in enumerate(texts)]
        write_rows(settings.path("data/raw/seed.jsonl" if name == "seed" else f"data/eval/{name}.jsonl"), rows)
    model = ProgramModel("polite", lambda text: json.dumps({"text": f"Kindly: {text}"}), "polite")
    report = run_06(judged, model)
    assert any("position bias" in w and "first" in w and "40 of 40 rows" in w for w in report["warnings"])
    found = report["comparisons"]["dev"][report["strongest"]]["preference"]
    assert found["win_rate"]["value"] == 0.5 and found["first_rate"]["value"] == 1.0 and len(found["ties"]) == 40
    assert "position bias" in markdown(judged)


# The commands


@pytest.fixture
def command(settings, monkeypatch):
    """`python -m slm …` in a project of the fixture's rows; returns the result."""
    settings.path("training/configs").mkdir(parents=True)
    settings.path("training/configs/train_config.yaml").write_text("{}\n")
    settings.path("project.yaml").write_text("cost: {serving_hourly_rate: 0.1}\n")
    monkeypatch.chdir(settings.root)
    return lambda *words: CliRunner().invoke(app, words)


def test_release_prints_every_gate_and_the_golden_rows_that_changed(settings, command):
    """Guards against a release that fails without the rows, or passes without a record."""
    releasable(settings.root, "r1")
    done = command("release", "r1")
    assert done.exit_code == 0 and "run r1 is released: record " in done.stdout and done.stdout.count("\npass ") == 11
    releasable(settings.root, "r2", double(1.0, wrong=("golden message 3",)))
    done = command("release", "r2")
    assert isinstance(done.exception, SlmError) and "not passed: regression_on_golden_set" in str(done.exception)
    line = next(line for line in done.stdout.splitlines() if line.startswith("fail"))
    assert "against released run r1: 0 fixed (none), 1 broken (golden-3); rows golden-3" in line


def test_compare_prints_and_keeps_the_paired_difference_of_two_runs(settings, command):
    """Guards against two reports that a person must compare by eye."""
    run_06(made_at(settings.root, "a"), double(0.5))
    run_06(made_at(settings.root, "b"))
    done = command("compare", "a", "b")
    assert done.exit_code == 0, done.exception
    kept = settings.path("outputs/eval_reports/b/compare_a.md").read_text()
    assert kept in done.stdout and "compare_a.md" in done.stdout
    assert "| better" in kept and "golden-" in kept
    assert isinstance(command("compare", "a", "none").exception, SlmError)
