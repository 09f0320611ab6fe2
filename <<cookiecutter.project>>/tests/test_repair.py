"""07: causes, clusters, the repair plan."""

import json
from pathlib import Path
from typing import Literal

import pytest
from pydantic import BaseModel, ConfigDict

from slm import repair
from slm.contract import Contract
from slm.errors import SlmError
from slm.evaluate.candidate import scores_file
from slm.evaluate.metrics import Result
from slm.evaluate.scorers import score_row
from slm.models import Answer
from slm.repair.causes import CAUSES, RULES
from slm.rows import make_row, write_json, write_rows
from slm.settings import Settings


class Ticket(BaseModel):
    model_config = ConfigDict(extra="forbid")
    label: Literal["billing", "bug", "none"]
    number: str | None


class Call(BaseModel):
    model_config = ConfigDict(extra="forbid")
    tool: Literal["timer", "mail", "none"]
    arguments: dict


TICKET = Contract(
    name="toy", task_type="extraction", output=Ticket, system_prompt="Sort.", primary_metric="field_f1", target=0.9,
    critical=("label",), label_field="label", null_label="none",
)  # fmt: skip
CALL = Contract(
    name="calls", task_type="tool_calling", output=Call, system_prompt="Call.", primary_metric="exact_match", target=0.9,
    label_field="tool", null_label="none",
)  # fmt: skip
GOOD = '{"label":"billing","number":null}'


def pair(text, expected=GOOD, user="charged twice", contract=TICKET, finish="stop", **meta):
    row = make_row(user, expected, **{"category": contract.label(contract.parse(expected).value), **meta})
    return row, score_row(contract, row, Answer(text, 0.1, finish_reason=finish))


def only(*args, trained=None, filler=20, **kwargs):
    """The finding of one failed row among `filler` right ones."""
    contract = kwargs.get("contract", TICKET)
    right = [pair(GOOD, user=f"fine {n}") for n in range(filler)] if contract is TICKET else []
    found = repair.diagnose([pair(*args, **kwargs), *right], contract, trained)
    assert len(found) == 1
    return found[0]


@pytest.fixture
def settings(tmp_path):
    made = Settings(model={"base": "tiny"})
    made._root = tmp_path
    return made


def test_there_are_the_eleven_causes_and_each_has_a_rule():
    """Guards against a cause that can never be found, or a rule that names none."""
    assert len(CAUSES) == 11 and {cause for cause, _ in RULES} == set(CAUSES)


@pytest.mark.parametrize(
    ("cause", "finding"),
    [
        ("wrong label", lambda: only('{"label":"bug","number":null}')),
        ("wrong label", lambda: only('{"label":"billing","number":"7"}', '{"label":"billing","number":"8"}')),
        ("hallucinated field", lambda: only('{"label":"billing","number":"7"}')),
        ("hallucinated field", lambda: only('{"label":"billing","number":null,"mood":"sad"}')),
        ("wrong schema", lambda: only('{"label":"invoice","number":null}')),
        ("wrong schema", lambda: only('{"label":"billing"')),
        ("too verbose", lambda: only('Here you are: {"label":"bug","number":null}')),
        ("refusal when it should answer", lambda: only('{"label":"none","number":null}')),
        ("refusal when it should answer", lambda: only("I'm sorry, I can't help with that.")),
        ("answer when it should refuse", lambda: only(GOOD, '{"label":"none","number":null}')),
        ("fails adversarial input", lambda: only('{"label":"bug","number":null}', kind="adversarial")),
        ("fails long input", lambda: only('{"label":"bug","number":null}', user="word " * 90)),
        ("missing category", lambda: only('{"label":"bug","number":null}', trained={"bug": 90, "billing": 2})),
        ("tool name wrong", lambda: only('{"tool":"mail","arguments":{}}', '{"tool":"timer","arguments":{}}', contract=CALL)),
        ("tool argument wrong", lambda: only('{"tool":"timer","arguments":{"m":5}}', '{"tool":"timer","arguments":{"m":6}}', contract=CALL)),
        ("hallucinated field", lambda: only('{"tool":"timer","arguments":{"m":5}}', '{"tool":"timer","arguments":{}}', contract=CALL)),
    ],
)  # fmt: skip
def test_a_planted_failure_gets_its_cause(cause, finding):
    """Guards against a rule that never fires, or fires for its neighbour; each fault is planted here."""
    found = finding()
    assert found.cause == cause and found.evidence


@pytest.mark.parametrize(
    ("fault", "text", "finish"),
    [
        ("empty", "", "stop"),
        ("template", GOOD + "<|im_end|>", "stop"),
        ("stop", GOOD + " and so on and so on", "length"),
        ("length", '{"label":"bil', "length"),
        ("stop", "blah " * 40, "length"),
        ("parser", f"```json\n{GOOD}\n```", "stop"),
    ],
)
def test_the_serving_is_suspected_before_the_model(fault, text, finish):
    """Guards against new data for what a stop token, template or parser broke."""
    pairs = [pair(text, user=f"charged {n}", finish=finish) for n in range(5)]
    found = repair.diagnose(pairs, TICKET)
    assert {f.fault for f in found} == {fault} and {f.blame for f in found} == {"deployment"}


def test_one_slip_among_many_is_not_blamed_on_the_serving():
    """Guards against calling a template broken because one answer of twenty ran on."""
    found = only("blah " * 40, finish="length")
    assert found.fault == "stop" and found.blame == "model"


def test_other_causes_are_kept_beside_the_primary_one():
    """Guards against hiding that an adversarial row also got its label wrong."""
    found = only('{"label":"bug","number":null}', kind="adversarial")
    assert found.others == ["wrong label"]


def test_right_answers_are_no_failures():
    """Guards against a table that counts successes."""
    assert repair.diagnose([pair(GOOD)], TICKET) == []


def failures(count, text='{"label":"bug","number":null}', start=0):
    return [pair(text, user=f"charged {n} times for a secret-word") for n in range(start, start + count)]


def test_a_users_pattern_comes_first():
    """Guards against clusters of the user's own that change nothing."""
    pairs = failures(3) + failures(2, '{"label":"none","number":null}', start=3)
    pattern = repair.Pattern("mine", lambda row, score: (score.parsed or {}).get("label") == "none", "show this")
    found = repair.clusters(repair.diagnose(pairs, TICKET), pairs, [pattern])
    assert [(c.name, len(c.findings)) for c in found] == [("wrong label / billing / label", 3), ("mine", 2)]
    assert found[1].situation == "show this"


def plan_for(settings, pairs, **kwargs):
    found = repair.clusters(repair.diagnose(pairs, TICKET), pairs)
    return repair.make_plan(settings, TICKET, found, **kwargs)


@pytest.mark.parametrize(("count", "rows"), [(1, 20), (4, 40), (30, 100)])
def test_a_cluster_gets_twenty_to_a_hundred_rows(settings, count, rows):
    """Guards against a plan outside the least and the most, or cells that do not add up to it."""
    item = plan_for(settings, failures(count)).items[0]
    assert item.rows == rows == sum(cell.rows for cell in item.cells)


def test_the_label_it_was_mistaken_for_is_shown_too(settings):
    """Guards against mending billing by breaking bug."""
    cells = plan_for(settings, failures(4)).items[0].cells
    assert {c.category: c.rows for c in cells} == {"billing": 30, "bug": 10} and cells[-1].kind == "near_miss"


def test_a_serving_fault_gets_no_rows(settings):
    """Guards against asking a teacher for data when the stop token is wrong."""
    plan = plan_for(settings, [pair("", user=f"u {n}") for n in range(6)])
    assert plan.requests == [] and "stop token" in plan.items[0].check_first
    assert "mend the serving" in repair.next_step(settings, plan)


def test_no_text_of_an_evaluation_row_reaches_the_teacher(settings):
    """Guards against leakage: the plan must describe a failed dev row, never quote it."""
    def prompt(contract, request, seeds):
        return f"{request.note} {[s.user for s in seeds]}"

    plan = plan_for(settings, failures(5), generation_prompt=prompt, seeds=[make_row("a seed", GOOD, category="billing")])
    asked = json.dumps([[c.situation, c.prompt] for item in plan.items for c in item.cells])
    assert "a seed" in asked and "secret-word" not in asked


def test_the_rest_waits_for_the_next_run(settings):
    """Guards against a plan for everything at once, which is more random data by another name."""
    pairs = [pair('{"label":"bug","number":null}', user=f"{k} {n}", expected=e) for n in range(2) for k, e in enumerate([
        GOOD, '{"label":"none","number":null}', '{"label":"billing","number":"1"}'])]  # fmt: skip
    small = settings.model_copy(update={"repair": settings.repair.model_copy(update={"clusters_max": 1})})
    plan = repair.make_plan(small, TICKET, repair.clusters(repair.diagnose(pairs, TICKET), pairs))
    assert len(plan.items) == 1 and len(plan.later) == 1


def saved(settings, tmp_path, **sections):
    plan = plan_for(settings, failures(4))
    found = repair.diagnose(failures(4), TICKET)
    path = repair.save_plan(settings, plan, repair.table(found), repair.plot_causes(found, settings.run_dir / "plots/causes.png"))
    again = Settings.model_validate({"repair": {"plan": str(path.relative_to(tmp_path))}, **sections})
    again._root = tmp_path
    return plan, again


def test_03_gets_the_plans_requests(settings, tmp_path):
    """Guards against a plan that is written and never asked for."""
    plan, again = saved(settings, tmp_path, generate={"teacher": "openai"})
    requests = repair.from_repair(again, TICKET)
    assert requests == plan.requests and requests[0].cluster == "wrong label / billing / label"
    assert repair.from_repair(settings) is None
    assert (settings.run_dir / "plots/causes.png").stat().st_size > 5000
    assert "![causes](plots/causes.png)" in (settings.run_dir / "repair_plan.md").read_text()


def test_a_recorded_teacher_says_that_it_cannot(settings, tmp_path):
    """Guards against a repair run that quietly brings nothing."""
    plan, again = saved(settings, tmp_path)
    with pytest.raises(SlmError, match="recorded teacher"):
        repair.from_repair(again, TICKET)
    assert "cannot write new rows" in repair.next_step(settings, plan)


def test_a_plan_of_another_contract_is_refused(settings, tmp_path):
    """Guards against rows for labels that no longer exist."""
    _, again = saved(settings, tmp_path, generate={"teacher": "openai"})
    with pytest.raises(SlmError, match="another contract"):
        repair.from_repair(again, CALL)


def test_only_dev_is_repaired_on(settings):
    """Guards against tuning on golden or test rows."""
    dev, golden = pair("{}", user="dev row"), pair("{}", user="golden row")
    for name, (row, _) in (("dev", dev), ("golden", golden)):
        write_rows(settings.path(f"data/eval/{name}.jsonl"), [row])
    results = [Result(name="fine_tuned", set=n, scores=[s]) for n, (_, s) in (("golden", golden), ("dev", dev))]
    write_json(scores_file(settings, "dev"), [r.model_dump() for r in results])
    assert [row.user for row, _ in repair.load_failures(settings, TICKET)] == ["dev row"]


def test_an_unfit_report_is_named(tmp_path):
    """Guards against a traceback when the script gets the wrong file."""
    with pytest.raises(SlmError, match="no such file"):
        repair.read_report(tmp_path / "x.json")
    (tmp_path / "x.json").write_text('{"a": 1}')
    with pytest.raises(SlmError, match="not an evaluation report"):
        repair.read_report(tmp_path / "x.json")
    write_json(tmp_path / "y.json", Result(name="base", set="dev", reason="not set").model_dump())
    with pytest.raises(SlmError, match="no scores"):
        repair.read_report(tmp_path / "y.json")


def test_the_projects_patterns_survive_an_unreadable_answer():
    """Guards against a pattern of task/clusters.py that dies on an answer that does not parse."""
    from slm.rows import read_rows
    from task.clusters import CLUSTERS
    from task.contract import contract

    rows = read_rows(Path(__file__).resolve().parents[1] / "data/eval/dev.jsonl")
    pairs = [(row, score_row(contract, row, Answer(text, 0.1))) for row in rows[:40] for text in ("", row.answer[:-1])]
    assert CLUSTERS and all(pattern.situation and pattern.name for pattern in CLUSTERS)
    assert all(isinstance(bool(pattern.match(*one)), bool) for pattern in CLUSTERS for one in pairs)
