"""07: causes, clusters, the repair plan."""

import json
import threading
from pathlib import Path
from typing import Literal

import pytest
import yaml
from pydantic import BaseModel, ConfigDict
from servers import double

from slm import registry, repair
from slm.contract import Contract
from slm.errors import SlmError
from slm.evaluate.candidate import scores_file
from slm.evaluate.metrics import Result
from slm.evaluate.scorers import score_row
from slm.models import Answer
from slm.repair import rounds
from slm.repair.causes import CAUSES, RULES
from slm.rows import make_row, read_rows, write_json, write_rows, write_text
from slm.settings import Settings, load_settings


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


def test_a_request_that_failed_is_the_servings_fault():
    """Guards against rows for an answer that never came, be it one of many."""
    found = only("HTTP 500", finish="error")
    assert (found.fault, found.blame) == ("error", "deployment")


def test_an_answer_that_repeats_the_prompt_blames_the_prompt():
    """Guards against new labels for a model that does not know where its answer begins."""
    found = only("charged twice for the same blue bicycle", user="charged twice for the same blue bicycle")
    assert (found.fault, found.blame) == ("echo", "prompt")


def test_a_label_that_the_schema_lacks_is_blamed_on_the_schema():
    """Guards against blaming the model when five answers ask for the same value that the contract has not."""
    pairs = [pair('{"label":"refund","number":null}', user=f"money back {n}") for n in range(5)]
    assert {f.blame for f in repair.diagnose(pairs, TICKET)} == {"schema"}
    assert {f.blame for f in repair.diagnose(pairs[:4], TICKET)} == {"model"}


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
    assert found[1].situations[0].situation == "show this"


def test_a_wrong_field_is_one_cluster_whatever_the_label():
    """Guards against six clusters of one row each for one fault."""
    pairs = [pair(f'{{"label":"{n}","number":"7"}}', f'{{"label":"{n}","number":null}}', user=n) for n in ("billing", "bug")]
    [found] = repair.clusters(repair.diagnose(pairs, TICKET), pairs)
    assert (found.name, found.label) == ("hallucinated field / number", "")


def test_a_category_that_training_hardly_has_is_one_cluster():
    """Guards against a gap in the data that is told as many small faults of the model, so that no round fills it."""
    trained = {"bug": 90, "none": 70, "billing": 12}
    pairs = failures(12) + [pair('{"label":"billing","number":"7"}', user="one more"), pair('{"label":"none","number":null}')]
    [found] = repair.clusters(repair.diagnose(pairs, TICKET, trained), pairs)
    assert (found.name, len(found.findings), found.label) == ("missing category / billing", 14, "billing")
    assert "training rows of billing: only 12, the median label has 70" == found.root_cause
    enough = repair.diagnose(pairs, TICKET, trained | {"billing": 18})
    assert "missing category" not in {f.cause for f in enough}


def test_a_large_cluster_falls_into_its_topics_and_always_the_same():
    """Guards against one plan for two kinds of message, and against a split that changes from run to run."""
    topics = {"printer": "the printer jams paper on floor", "coffee": "my coffee order arrived cold and bitter"}
    pairs = [pair('{"label":"bug","number":null}', user=f"{text} {n}") for n in range(6) for text in topics.values()]
    first, second = (repair.clusters(repair.diagnose(pairs, TICKET), pairs) for _ in range(2))
    assert first == second and [len(c.findings) for c in first] == [6, 6]
    assert len({c.name for c in first}) == 2 and {c.about.split(", ")[0] for c in first} <= {*" ".join(topics.values()).split()}
    same = [pair('{"label":"bug","number":null}', user=f"the printer jams paper on floor {n}") for n in range(12)]
    assert len(repair.clusters(repair.diagnose(same, TICKET), same)) == 1


def examined(settings, pairs, train, **sections):
    """The clusters of the failures among `pairs`, with these training rows."""
    write_rows(settings.path("data/accepted/train.jsonl"), train)
    made = Settings.model_validate(settings.model_dump() | sections)
    made._root = settings.root
    return repair.examine(made, TICKET, repair.diagnose(pairs, TICKET), pairs, prompt=lambda contract, rows: f"causes {json.dumps(rows)}")


def test_a_training_row_that_teaches_the_opposite_is_named(settings):
    """Guards against more rows on top of a wrong one; a value copied from its own message is no contradiction."""
    wrong = pair('{"label":"bug","number":null}', user="the tablet shows invoice twice in the list")
    twin = make_row("the tablet shows invoice twice in the table", '{"label":"bug","number":null}', category="bug", id="bad")
    other = [make_row(f"where do I find lamp {n}", GOOD, category="billing") for n in range(30)]
    [found] = examined(settings, [wrong], [*other, twin])
    assert [(c["train"], c["field"], c["taught"]) for c in found.contradictions] == [("bad", "label", "bug")]
    assert found.blame == "data" and "bad" in found.root_cause and found.twins[0].startswith("bad")
    plan = repair.make_plan(settings, TICKET, [found])
    assert "may teach the opposite: 1" in repair.next_step(settings, plan)
    number = pair('{"label":"bug","number":"55"}', '{"label":"bug","number":"54"}', user="ticket 54 shows invoice twice, not 55")
    copied = make_row("ticket 55 shows invoice twice, not 56", '{"label":"bug","number":"55"}', category="bug")
    assert examined(settings, [number], [*other, copied])[0].contradictions == []


@pytest.mark.parametrize(("rows", "blame"), [(3, "data"), (40, "model")])
def test_too_few_rows_are_the_datas_fault_and_enough_the_models(settings, rows, blame):
    """Guards against asking for data that is there, and against tuning a recipe where there is none."""
    train = [make_row(f"paid for lamp {n} at noon", GOOD, category="billing") for n in range(rows)]
    [found] = examined(settings, failures(4), train)
    assert found.blame == blame and str(rows) in found.root_cause


def test_one_odd_twin_does_not_speak_for_a_whole_cluster(settings):
    """Guards against sending a user to the training rows for what one chance likeness in five suggests."""
    pairs = [pair('{"label":"bug","number":null}', user=f"{word} is {word}, says {word}") for word in ("ash", "elm", "fir", "oak", "yew")]
    twin = make_row("ash is ash, says ash tree", '{"label":"bug","number":null}', category="bug", id="odd")
    [found] = examined(settings, pairs, [make_row(f"lamp {n}", GOOD, category="billing") for n in range(30)] + [twin])
    assert [c["train"] for c in found.contradictions] == ["odd"] and found.blame == "model" and "not learnt" in found.root_cause


def opinion(**more):
    """One cluster of a judge's reply."""
    told = {"cluster_name": "charged more than once", "likely_root_cause": "none is seen in training", "layer": "model", "examples": []}
    return told | {"new_data": [{"situation": "two instalments fall into one month", "kind": "boundary", "n": 1}]} | more


@pytest.fixture
def judge(monkeypatch):
    """Puts replies into the mouth of `repair.judge`; returns what it was asked, and the settings that name it."""
    from slm.models import openai_api

    asked, script = [], []

    def answer(self, prompts):
        asked.extend(p.messages[0]["content"] for p in prompts)
        self.calls += 1
        if isinstance(script[0], Exception):
            raise script[0]
        return [Answer(text, 0.1, 1000, 100) for text in script]

    monkeypatch.setattr(openai_api.OpenAIModel, "answer", answer)
    return asked, script, {"repair": {"judge": {"url": "http://localhost:1/v1", "model": "m", "usd_per_1m_input": 10}}}


def test_a_judge_names_clusters_and_their_rows_are_shown(settings, judge):
    """Guards against a judge's word without the rows behind it, rows that vanish, and money that nobody booked."""
    asked, script, sections = judge
    pairs = failures(5)
    script.append("Here:\n" + json.dumps([opinion(examples=[pairs[0][0].id, pairs[3][0].id, "made-up"])]))
    named, left = sorted(examined(settings, pairs, [], **sections), key=lambda c: len(c.findings))
    assert [f.row_id for f in named.findings] == [pairs[0][0].id, pairs[3][0].id] and len(left.findings) == 3
    assert (named.by, named.blame, left.by) == ("m", "model", "rules") and named.name == "wrong label / charged more than once"
    assert "charged 4 times" in asked[0] and len(repair.rows_table([named, left], pairs)) == 5
    item = repair.make_plan(settings, TICKET, [named]).items[0]
    assert {(c.kind, c.category) for c in item.cells[:-1]} == {("boundary", "billing")} and item.rows == 20
    assert [line["money"] for line in registry.read(settings, "costs")] == [0.01]


@pytest.mark.parametrize(
    ("reply", "line"),
    [
        (SlmError("endpoint m: timed out after 60 s."), "timed out"),
        ("I think the model is confused.", "names none of the rows"),
        (json.dumps([opinion(layer="karma")]), "layer"),
        ("", "names none of the rows"),
    ],
)
def test_a_judge_that_fails_changes_nothing_and_is_said(settings, judge, capsys, reply, line):
    """Guards against a repair that dies, or goes astray, with its judge."""
    pairs = failures(5)
    judge[1].append(reply)
    assert examined(settings, pairs, [], **judge[2]) == examined(settings, pairs, [])
    said = capsys.readouterr().out
    assert line in said and "by rule" in said and "secret-word" not in said


@pytest.mark.parametrize(("stalls", "line"), [(True, "timed out after 0.2 s"), (False, "without choices")])
def test_a_real_endpoint_that_stalls_or_talks_html_costs_the_judge_and_nothing_else(settings, capsys, stalls, line):
    """Guards against a repair that hangs, or breaks off, with a server that a faked model would never be."""
    over = threading.Event()

    def reply(_):
        over.wait(20 if stalls else 0)
        return 200, b"<html>gateway</html>", {"Content-Type": "text/html"}

    pairs = failures(5)
    with double(reply) as address:
        own = {"url": f"{address}/v1", "model": "m", "timeout_s": 0.2 if stalls else 20, "retries": 0}
        found = examined(settings, pairs, [], repair={"judge": own})
        over.set()
    said = capsys.readouterr().out
    assert found == examined(settings, pairs, []) and line in said and "by rule" in said and "secret-word" not in said


def test_a_situation_that_quotes_an_evaluation_row_never_reaches_the_teacher(settings, judge):
    """Guards against a judge that leaks dev into training."""
    pairs = failures(5)
    quoting = [{"situation": f"like this: {pairs[0][0].user.upper()}!"}, {"situation": "two instalments in one month"}]
    judge[1].append(json.dumps([opinion(examples=[pairs[0][0].id], new_data=quoting)]))
    found = examined(settings, pairs, [], **judge[2])
    assert [s.situation for c in found if c.by == "m" for s in c.situations] == ["two instalments in one month"]


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
    assert sum(c.rows for c in cells if c.category == "billing") == 30 and cells[-1].kind == "near_miss"
    assert (cells[-1].category, cells[-1].rows) == ("bug", 10) and len({c.situation for c in cells}) == 4


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


def test_rows_go_first_to_what_the_data_is_to_blame_for(settings):
    """Guards against a budget of rows spent on what training holds already, while a gap waits."""
    pairs = failures(5) + [pair('{"label":"bug","number":null}', '{"label":"none","number":null}', user=f"n {n}") for n in range(2)]
    large, small = repair.clusters(repair.diagnose(pairs, TICKET), pairs)
    one = settings.model_copy(update={"repair": settings.repair.model_copy(update={"clusters_max": 1})})
    plan = repair.make_plan(one, TICKET, [large.model_copy(update={"blame": "model"}), small])
    assert [i.name for i in plan.items] == [small.name] and plan.later == [large.name]


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


def test_preference_pairs_are_the_failures_of_the_plan(settings, tmp_path, capsys):
    """Guards against pairs that have nothing to do with what is being repaired."""
    _, again = saved(settings, tmp_path)
    pairs = [*failures(2, start=50), pair('{"label":"none","number":null}', user="other")]
    picked = repair.same_failures(again, TICKET, pairs)
    assert [row.id for row in picked] == [row.id for row, _ in pairs[:2]] and "2 of 3 failures" in capsys.readouterr().out
    assert len(repair.same_failures(again, TICKET, pairs[2:])) == 1


class Rounds:
    """A project in which `run` leaves what the notebooks would: `script` says how many of 40 dev rows each new run gets
    right, and how many of 5 golden rows."""

    def __init__(self, root, monkeypatch):
        self.root, self.ran, self.script = root, [], []
        (root / "training/configs").mkdir(parents=True)
        (root / "training/configs/train_config.yaml").write_text("epochs: 1\n")
        (root / "project.yaml").write_text("generate: {teacher: openai}\nprofiles: {smoke: {train: {lora_rank: 4}}}\n")
        for k, (name, n) in enumerate({"dev": 40, "test": 5, "adversarial": 5, "golden": 5}.items()):
            write_rows(root / f"data/eval/{name}.jsonl", [make_row(f"charged {k}{i} times", GOOD, category="billing") for i in range(n)])
        monkeypatch.chdir(root)
        monkeypatch.setattr(rounds.runner, "run", self.run)
        monkeypatch.setattr(rounds.compare, "render", lambda settings, a, b: f"{b} against {a}")
        settings = load_settings(profile="smoke", run_id="r1")
        registry.lock_sets(settings)
        self.write(settings, "data/generated/batch_001.jsonl", 1)
        self.script = [(20, 5)]
        self.run(settings, ["04-06"], "project.yaml", {})

    def write(self, settings, name, n):
        write_rows(settings.path(name), [make_row(f"message {n} {i}", GOOD, category="billing", provenance={"cluster": "c"}) for i in range(4)])

    def score(self, settings, name, right):
        rows = read_rows(settings.path(f"data/eval/{name}.jsonl"))
        texts = [GOOD if n < right else '{"label":"bug","number":null}' for n in range(len(rows))]
        scores = [score_row(TICKET, row, Answer(text, 0.1)) for row, text in zip(rows, texts, strict=True)]
        locked = registry.check_locked(settings)[name]
        return Result(name="fine_tuned", set=name, scores=scores, set_hash=locked, contract_hash=TICKET.schema_hash).model_dump()

    def run(self, settings, stages, config, overrides, resume=False):
        self.ran.append((settings.run_id, *stages))
        if stages == ["07"]:
            found = repair.diagnose(pairs := repair.load_failures(settings, TICKET), TICKET)
            repair.save_plan(settings, repair.make_plan(settings, TICKET, repair.clusters(found, pairs)), [])
        if stages == ["03-06"]:
            self.write(settings, f"data/generated/batch_{len(self.ran):03d}.jsonl", len(self.ran))
            write_text(settings.path(f"data/generated/batch_{len(self.ran):03d}.unread.txt"), "{}")
        if stages != ["07"]:
            files = sorted(settings.path("data/generated").glob("*.jsonl"))
            write_rows(settings.path("data/accepted/all.jsonl"), rows := [row for f in files for row in read_rows(f)])
            version = f"v{len(rows)}"
            registry.append(settings, "datasets", {"version": version, "parents": {f"data/generated/{f.name}": "" for f in files}})
        if stages in (["03-06"], ["04-06"]):
            facts = {"stage": "train", "status": "completed", "run_id": settings.run_id, "parents": {"dataset": version}}
            registry.append(settings, "runs", facts)
            body = yaml.safe_dump(settings.model_dump(mode="json"))
            write_text(settings.path(f"outputs/adapters/{settings.run_id}/settings.yaml"), body)
            step = self.script.pop(0)
            if isinstance(step, Exception):
                raise step
            dev, golden = step
            write_json(scores_file(settings, settings.run_id), [self.score(settings, "dev", dev), self.score(settings, "golden", golden)])

    def repair(self, most=1, run_id="r1", **given):
        return rounds.rounds(run_id, TICKET, "project.yaml", given, most)

    @property
    def held(self):
        return sorted(p.name for p in (self.root / "data/generated").glob("*.jsonl")), len(read_rows(self.root / "data/accepted/all.jsonl"))


@pytest.fixture
def project(tmp_path, monkeypatch):
    return Rounds(tmp_path, monkeypatch)


def test_a_round_that_helps_is_kept_and_the_next_begins_from_it(project):
    """Guards against rounds that all begin from the first run, and against a recipe that changed with the rows."""
    project.script = [(34, 5), (40, 5)]
    first, second = project.repair(most=2)
    assert (first["status"], second["status"], second["parents"]["run"]) == ("kept", "kept", "r1-repair-1")
    assert first["dev"]["outcome"] == "better" and len(first["dev"]["fixed"]) == 14 and first["rows"][0]["fixed"] == 14
    settings = yaml.safe_load((project.root / "outputs/adapters/r1-repair-2/settings.yaml").read_text())
    assert settings["profile"] == "smoke" and settings["train"]["lora_rank"] == 4
    assert settings["repair"]["plan"] == "outputs/runs/r1-repair-2/applied_plan.json"
    text = (project.root / "outputs/eval_reports/r1-repair-1/repair.md").read_text()
    assert "kept" in text and "14 rows fixed, 0 broken, 26 unchanged" in text and "r1-repair-1 against r1" in text
    assert [r["status"] for r in registry.read(load_settings(), "runs") if r["stage"] == "repair"] == ["kept", "kept"]


@pytest.mark.parametrize(("dev", "golden"), [(20, 5), (23, 5), (12, 5), (40, 4)])
def test_a_round_that_does_not_help_is_recorded_and_undone(project, dev, golden):
    """Guards against rows that stay though they brought nothing, or cost golden; 3 of 40 rows more are noise."""
    before, project.script = project.held, [(dev, golden)]
    [record] = project.repair()
    assert record["status"] == "discarded" and project.held == before
    [gone] = record["files"]
    assert all((project.root / "outputs/runs/r1-repair-1" / gone).with_suffix(end).is_file() for end in (".jsonl", ".unread.txt"))
    assert not [*project.root.glob("data/generated/*.unread.txt")]
    assert project.repair() == []  # its only cluster was tried: no round begins


def test_any_gain_is_enough_where_the_settings_say_so(project):
    """Guards against a setting that changes nothing."""
    project.script = [(23, 5)]
    assert project.repair(**{"repair.proven": False})[0]["status"] == "kept"


def test_an_interrupted_round_goes_on_with_its_plan(project):
    """Guards against a second plan, a second round and a second bill after a stop."""
    project.script = [SlmError("no disk"), (40, 5)]
    with pytest.raises(SlmError, match="no disk"):
        project.repair()
    [record] = project.repair()
    assert record["run_id"] == "r1-repair-1" and record["status"] == "kept"
    assert [one for one in project.ran if one[0] == "r1"] == [("r1", "04-06"), ("r1", "07")]  # planned once


def test_without_a_teacher_rows_by_hand_make_the_round(project):
    """Guards against a round over nothing, and against a project that needs an endpoint to repair."""
    with pytest.raises(SlmError, match="recorded teacher .* by hand"):
        project.repair(**{"generate.teacher": "recorded"})
    project.write(load_settings(), "data/generated/by_hand.jsonl", 9)
    project.script = [(40, 5)]
    [record] = project.repair(**{"generate.teacher": "recorded"})
    assert record["files"] == ["by_hand.jsonl"] and ("r1-repair-1", "04-06") in project.ran


def test_a_run_that_was_never_trained_is_named(project):
    """Guards against a traceback for a mistyped run id."""
    with pytest.raises(SlmError, match="train and evaluate run r9 first"):
        project.repair(run_id="r9")


def test_a_changed_dev_set_stops_the_round_before_it_costs_anything(project):
    """Guards against an hour of training before two runs turn out not to compare."""
    write_rows(project.root / "data/eval/dev.jsonl", read_rows(project.root / "data/eval/dev.jsonl")[1:])
    (project.root / "data/eval/lock.json").unlink()
    registry.lock_sets(load_settings())
    with pytest.raises(SlmError, match="dev"):
        project.repair()
    assert ("r1-repair-1", "03-06") not in project.ran


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
