"""The monitor on planted logs: each regression is found by its own measure and by no other; and what it cannot say."""

import json
import random
from datetime import UTC, datetime, timedelta

import pytest
from test_production import CONTRACT, line
from typer.testing import CliRunner

from slm import cost, registry
from slm.cli import app
from slm.errors import SlmError
from slm.production import drift, drift_table, read_logs, sample, table, watch
from slm.production.monitor import BAD, quantile
from slm.production.scrub import COMMON
from slm.rows import make_row, write_rows
from slm.settings import Settings

START = datetime(2025, 3, 3, tzinfo=UTC)
PARCELS = "parcel courier depot label barcode customs pallet driver route van doorstep receipt box tape warehouse sender".split()
GARDENS = "tulip spade compost hedge lawn pruning seedling orchid trellis mulch fern rose shovel bulb rake turf".split()
CLEAN = {"errors": 0.002, "slow": 0.02, "dear": 0.2, "words": (8, 24), "language": "en", "topic": PARCELS, "a": 0.5}
PLANTED = {
    "schema error rate": {"errors": 0.08}, "latency p95 (s)": {"slow": 0.15}, "cost per 1,000": {"dear": 1.0},
    "length": {"words": (20, 50)}, "language": {"language": "de"}, "topic": {"topic": GARDENS}, "categories": {"a": 0.9},
}  # fmt: skip


def requests(week: int, count: int = 400, model: str = "m1", share: float = 1.0, **planted) -> list[dict]:
    """A week of requests; `share` of them as planted."""
    rng, found = random.Random(week), []
    for n in range(count):
        own = CLEAN | (planted if rng.random() < share else {})
        words = rng.choices([*own["topic"], *COMMON[own["language"]]], k=rng.randint(*own["words"]))
        wait = 9.0 if rng.random() < own["slow"] else rng.uniform(0.9, 1.0) if rng.random() < own["dear"] else rng.uniform(0.4, 0.6)
        broken, label = rng.random() < own["errors"], "a" if rng.random() < own["a"] else "b"
        time = START + timedelta(weeks=week, minutes=15 * n)
        facts = {"input": " ".join(words), "output": "so so" if broken else f'{{"label":"{label}"}}', "parse_ok": not broken}
        more = {"latency_s": wait, "time": time.isoformat(), "model_version": model, "correction": None}
        found.append(line(f"{week}-{model}-{n}", **facts, **more))
    return found


@pytest.fixture
def settings(tmp_path):
    return made(tmp_path)


def made(root, **own):
    found = Settings.model_validate({"production": {"logs": "log.jsonl", "window_days": 6, **own}, "cost": {"serving_hourly_rate": 0.1},
                                     "task": {"target_latency_ms": 2000}})  # fmt: skip
    found._root = root
    rows = [make_row(r["input"], r["output"], category="x", id=str(n)) for n, r in enumerate(requests(99, 400, errors=0))]
    write_rows(root / "data/accepted/train.jsonl", rows)
    return found


def watched(settings, *records, **how):
    write(settings, *records)
    return watch(settings, CONTRACT, **how)


def write(settings, *records):
    settings.path("log.jsonl").write_text("".join(r if isinstance(r, str) else json.dumps(r) + "\n" for r in records))


def verdicts(found) -> dict[str, str]:
    return {line["measure"]: line["verdict"] for line in found["lines"]}


def test_a_log_like_the_one_before_passes(settings):
    """Guards against an alarm that nobody believes after the third time."""
    found = watched(settings, *requests(0), *requests(1))
    assert set(verdicts(found).values()) == {"ok"} and len(found["lines"]) == 7, table(found)
    assert len(found["windows"]) == 2 and "400 requests" in found["notes"][0]


@pytest.mark.parametrize("measure", PLANTED)
def test_each_regression_is_found_by_its_own_measure_alone(settings, measure):
    """Guards against a measure that sleeps, and against one cause that sets off everything."""
    found = watched(settings, *requests(0), *requests(1, **PLANTED[measure], share=0.7 if measure in drift.KINDS else 1.0))
    assert [name for name, verdict in verdicts(found).items() if verdict != "ok"] == [measure], table(found)
    assert verdicts(found)[measure] == BAD


def test_every_figure_is_written_and_no_text_of_a_request(settings):
    """Guards against personal data in a report that is mailed around, and against a table without its picture."""
    private = {"topic": ["ada@corp.com", "Thornbury", "tulip"]}
    found = watched(settings, *requests(0), *requests(1, **private), '{"request_id": "Thornbury", "inp\n')
    folder = settings.path("outputs/monitor")
    told = (folder / "monitor.md").read_text() + (folder / "monitor.json").read_text()
    assert verdicts(found)["topic"] == BAD and json.loads((folder / "monitor.json").read_text())["lines"]
    assert not any(word in told for word in ("ada", "corp", "Thornbury", "tulip", "parcel")) and "torn or invalid: 1" in told
    assert (folder / "monitor.png").stat().st_size > 20_000


def test_a_label_or_language_from_the_log_alone_is_not_named(settings):
    """Guards against a free-text label, which may be anybody's name, in the report."""
    assert drift._shares(["bug"] * 60, ["Ada Lovelace"] * 60)["moved"] in ("(new) 0% to 100%", "bug 100% to 0%")
    assert drift._shares(["bug"] * 60, ["bug"] * 60) == {"value": 0.0, "p": 1.0, "n": 60, "moved": "bug 100% to 100%"}


def test_few_requests_are_too_few_and_many_failures_are_enough(settings):
    """Guards against "ok" said of ten requests, and against a dead server that goes unnoticed because little is asked."""
    found = watched(settings, *requests(0, count=10, errors=0))
    assert set(verdicts(found).values()) == {"too few"}
    dead = [line(n, output="", parse_ok=False, correction=None) for n in range(10)]
    found = watched(settings, *dead)
    assert verdicts(found)["schema error rate"] == BAD and verdicts(found)["latency p95 (s)"] == "not measured"
    assert verdicts(watched(settings, dead[0]))["schema error rate"] == "too few"  # one failure of one says nothing
    perhaps = [line(n, parse_ok=n > 2, correction=None) for n in range(150)]  # 2 % of 150, 1 % is allowed
    assert verdicts(watched(settings, *perhaps))["schema error rate"] == "too few"


def test_an_empty_window_and_a_log_without_lines_are_said(settings):
    """Guards against a monitor that passes because nothing reaches it any more."""
    found = watched(settings, *requests(0), since="2025-06-01")
    assert "No request in this window" in str(found["notes"]) and {line["verdict"] for line in found["lines"]} == {"too few"}
    assert "No request in this window" in str(watched(settings, "\n")["notes"])
    with pytest.raises(SlmError, match="not a date"):
        watch(settings, CONTRACT, since="yesterday")


def test_clocks_torn_lines_and_one_version_have_a_line_each(settings):
    """Guards against one clock set to 2031 that makes every other request old, and against lines lost in silence."""
    future, past = line("f", time="2999-01-01T00:00:00Z"), line("p", time="1970-01-01T00:00:00Z")
    found = watched(settings, *requests(0), '{"torn\n', future, past, *requests(1), {"dropped": 7, "time": "2025-03-03"})
    said = " ".join(found["notes"])
    for words in ("torn or invalid: 1, the first at log.jsonl:401", "dated in the future: 1.", "the logger says: 7.",
                  "One model version: m1", "Time runs backwards: 1, first at", "The newest request is"):  # fmt: skip
        assert words in said, said
    assert "400 requests from 2025-03-08" in said and set(verdicts(found).values()) == {"ok"}


def test_each_model_version_is_judged_alone(settings):
    """Guards against a bad candidate that hides behind the many requests of the good model."""
    found = watched(settings, *requests(0), *requests(1), *requests(1, count=80, model="m2", errors=0.2))
    bad = [(line["model"], line["measure"]) for line in found["lines"] if line["verdict"] == BAD]
    assert bad == [("m2", "schema error rate")] and "One model version" not in str(found["notes"])


def test_without_an_earlier_window_the_target_alone_bounds_and_the_report_is_shown(settings, monkeypatch):
    """Guards against an alarm because a network is slower than the bench, and against a target that nobody keeps."""
    result = {"name": "q8_0", "set": "dev", "latency_p50_s": 0.2, "latency_p95_s": 0.25,
              "metrics": {"schema_validity": {"value": 0.992, "low": 0.9, "high": 1, "n": 120}}}  # fmt: skip
    monkeypatch.setattr("slm.production.monitor.load_report", lambda settings, run: {"results": {"dev": {"q8_0": result}}})
    lines = {line["measure"]: line for line in watched(settings, *requests(0, model="run_1 q8_0"))["lines"]}
    wait, errors = lines["latency p95 (s)"], lines["schema error rate"]
    assert (wait["before"], wait["limit"], wait["verdict"]) == (0.25, 2.0, "ok") and errors["before"] == pytest.approx(0.008)
    slow = watched(settings, *requests(0, model="run_1 q8_0", slow=0.2))
    assert verdicts(slow)["latency p95 (s)"] == BAD


def test_drift_may_be_measured_against_the_logs_own_beginning(settings):
    """Guards against a standing alarm where production never looked like the training rows."""
    planted = {"topic": GARDENS, "words": (20, 50)}
    assert verdicts(watched(settings, *requests(0, **planted), *requests(1, **planted)))["topic"] == BAD
    own = made(settings.root, reference="first window")
    found = watched(own, *requests(0, **planted), *requests(1, **planted))
    assert set(verdicts(found).values()) == {"ok"} and "the log's first window" in found["notes"][1]
    assert verdicts(watched(own, *requests(0, **planted), *requests(1)))["topic"] == BAD
    assert verdicts(watched(own, *requests(0)))["topic"] == "too few"


def test_the_reference_is_what_the_released_model_was_trained_on(settings, tmp_path):
    """Guards against drift against rows that the model in service has never seen."""
    assert drift.reference(settings, CONTRACT).name == "training rows in data/accepted"
    settings.path("data/accepted/train.jsonl").unlink()
    assert drift.reference(settings, CONTRACT) is None and "nothing to compare with" in str(drift_table(settings, CONTRACT, []))
    write_rows(settings.path("data/eval/dev.jsonl"), [make_row("m", '{"label":"a"}', category="a")])
    assert drift.reference(settings, CONTRACT).name == "rows of dev"
    registry.append(settings, "runs", {"stage": "release", "run_id": "r", "dataset_version": "0123"})
    assert drift.reference(settings, CONTRACT).name == "rows of dev"  # its rows are not kept here


def test_the_command_exits_1_on_a_regression_and_names_it(settings, monkeypatch):
    """Guards against a cron job that finds a regression and exits 0, or one that exits 1 on a good week."""
    monkeypatch.chdir(settings.root)
    monkeypatch.setattr("slm.cli.project_contract", lambda settings: CONTRACT)
    settings.path("project.yaml").write_text("production: {logs: log.jsonl, window_days: 6}\ncost: {serving_hourly_rate: 0.1}\n")
    settings.path("training/configs").mkdir(parents=True)
    settings.path("training/configs/train_config.yaml").write_text("{}\n")
    write(settings, *requests(0), *requests(1))
    done = CliRunner().invoke(app, ["monitor"])
    assert done.exit_code == 0 and "| m1 | schema error rate | 400 |" in done.output, done.output
    write(settings, *requests(0), *requests(1, errors=0.1))
    done = CliRunner().invoke(app, ["monitor"])
    assert done.exit_code == 1 and "1 regression: schema error rate (m1)" in str(done.exception)
    assert CliRunner().invoke(app, ["monitor", "--since", "2025-03-03", "-s", "production.drift=2"]).exit_code == 1


def test_a_quantiles_interval_holds_it_as_often_as_it_says():
    """Guards against false alarms by an interval that is too narrow; 300 samples of 60 from a skewed distribution."""
    rng, held = random.Random(0), 0
    for _ in range(300):
        found = quantile([rng.expovariate(1) for _ in range(60)], 0.5)
        held += found["low"] <= 0.6931 <= found["high"]
    assert held >= 292


def test_the_unsure_and_the_strange_go_before_a_person_a_bounded_number(settings):
    """Guards against a flywheel that looks only at failures that somebody noticed, and against a queue of thousands."""
    own = made(settings.root, random_share=0, review_most=3)
    plain = requests(1, count=60, errors=0)
    unsure = [one | {"request_id": f"u{n}", "confidence": 0.1 + n / 50} for n, one in enumerate(requests(2, count=10, errors=0))]
    odd = [requests(3 + n, count=5, errors=0, **planted) for n, planted in
           enumerate(({"words": (200, 300)}, {"language": "pl"}, {"topic": GARDENS, "words": (24, 24)}))]  # fmt: skip
    sure = [one | {"request_id": f"s{n}", "confidence": 0.9} for n, one in enumerate(requests(4, count=5, errors=0))]
    write(own, *plain, *unsure, *sum(odd, []), *sure)
    lines = read_logs(own.path("log.jsonl")).lines
    queue = sample(own, CONTRACT, lines).review
    why = [record["why"] for record in queue]
    assert why[:3] == ["low confidence"] * 3 and [record["request_id"] for record in queue[:3]] == ["u0", "u1", "u2"]
    for what, records in zip(("length", "language", "topic"), odd, strict=True):
        chosen = [r["request_id"] for r in queue if r["why"] == f"unlike the training rows in data/accepted: {what}"]
        assert len(chosen) <= 3 and len({r["request_id"] for r in records} & set(chosen)) >= 2, (what, why)
    settings.path("data/accepted/train.jsonl").unlink()
    assert {r["why"] for r in sample(own, CONTRACT, lines).review} == {"low confidence"}


def booked(settings, *records):
    write(settings, *records)
    return cost.serve(settings, read_logs(settings.path("log.jsonl")).every)


def test_serving_is_booked_once_per_request_without_consent_too(settings):
    """Guards against a bill that grows by rerunning the notebook, and against customers whose requests cost nothing."""
    day = [line(n, latency_s=3.6, consent=n > 4, tokens_in=10, tokens_out=5) for n in range(10)]
    found = booked(settings, *day, line(99, output="", parse_ok=False, latency_s=60))
    assert [(one["requests"], one["day"], one["model"]) for one in found] == [(10, "2026-11-02", "m1")]
    assert found[0]["money"] == pytest.approx(10 * 3.6 / 3600 * 0.1) and found[0]["tokens_in"] == 100
    assert booked(settings, *day) == [] and booked(settings, *day[5:]) == []  # a part of it, as the review queue is
    later = [line(n, latency_s=7.2, time="2026-11-03T08:00:00Z") for n in (50, 51)]
    assert [one["requests"] for one in booked(settings, *day, line(20, latency_s=3.6), *later)] == [1, 2]
    assert cost.spent(settings, "deployment_inference_cost") == pytest.approx((11 * 3.6 + 2 * 7.2) / 3600 * 0.1, abs=1e-6)


def test_a_hosted_model_is_booked_by_its_tokens_in_the_currency_of_its_prices(settings):
    """Guards against dollars added to euros, and against waiting for a hosted model booked as time of a machine."""
    own = Settings.model_validate({"cost": {"currency": "EUR", "serving_hourly_rate": 9},
                                   "production": {"logs": "log.jsonl", "endpoint": {"usd_per_1m_input": 1, "usd_per_1m_output": 4}}})  # fmt: skip
    own._root = settings.root
    found = booked(own, line(1, tokens_in=1000, tokens_out=500), line(2))
    assert found[0]["money"] == pytest.approx(0.003) and found[0]["currency"] == "USD" and found[0]["requests"] == 2
    assert cost.ledger(own)[-1]["project"] == 0  # counted by the report as an entry in another currency
    priced = watched(own, *[line(n, tokens_in=1000, tokens_out=500) for n in range(40)])
    price = next(one for one in priced["lines"] if one["measure"] == "cost per 1,000")
    assert price["value"] == pytest.approx(3.0) and price["verdict"] == BAD and priced["currency"] == "USD"


def test_nothing_is_booked_for_the_invented_log_or_without_a_rate(settings):
    """Guards against money in the ledger that nobody spent, and hours booked at nothing that no rate can mend later."""
    bare = Settings.model_validate({"production": {"logs": "log.jsonl"}})
    bare._root = settings.root
    assert booked(bare, line(1)) == []
    served = read_logs(settings.path("log.jsonl")).every
    assert cost.serve(made(settings.root, logs="data/raw/production_logs.sample.jsonl"), served) == []
