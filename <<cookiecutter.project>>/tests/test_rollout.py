"""Shadow and canary: against HTTP doubles, by simulation, and for real with two llama.cpp servers."""

# ruff: noqa: F401, F811

import json
import random
import shutil
import threading
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta

import pytest
from servers import LLAMA_CPP, completion, double, last, real_server
from test_export import project
from test_production import CONTRACT, line

from slm import registry
from slm.errors import SlmError
from slm.models.base import Answer
from slm.modules import load_module
from slm.production import canary, monitor, shadow
from slm.production.logs import LogLine
from slm.rows import write_json, write_jsonl
from slm.sections import Canary
from slm.settings import load_settings

NOW = datetime(2026, 11, 28, 12, tzinfo=UTC)
TERMS = {
    "url": "", "model": "toy", "system": CONTRACT.system_prompt, "schema": CONTRACT.schema, "nfc": False, "strip": False,
    "sampling": {"max_tokens": 8}, "probe": {"text": "probe", "prompt_tokens": 7},
}  # fmt: skip


@pytest.fixture
def settings(tmp_path):
    """A project with two exported runs, `old` released before `new`, and a log of 40 requests."""
    (tmp_path / "project.yaml").write_text("production: {logs: log.jsonl, canary: {share: 0.5, days: 0, settle_hours: 0}}\n")
    (tmp_path / "training/configs").mkdir(parents=True)
    (tmp_path / "training/configs/train_config.yaml").write_text("{}\n")
    shutil.copytree("client", tmp_path / "client", ignore=shutil.ignore_patterns("router.json", "*.jsonl*"))
    made = load_settings(start=tmp_path, overrides={"evaluate.resamples": 200})
    for run in ("old", "new"):
        write_json(tmp_path / f"outputs/gguf/{run}/client/contract.json", TERMS | {"version": f"{run} q8_0"})
        registry.append(made, "runs", {"stage": "release", "run_id": run})
    write_jsonl(tmp_path / "log.jsonl", [line(n, correction=None, model_version="old q8_0") for n in range(40)])
    return made


@pytest.fixture
def endpoint():
    """A function: start a server that answers a text so; returns its address and the texts that it got. None: HTTP 500."""
    with ExitStack() as servers:

        def start(answer, tokens: int = 7):
            got = []

            def reply(body):
                got.append(text := last(body))
                content = '{"label":"a"}' if text == "probe" else answer(text)
                return 500 if content is None else 200, completion(content, prompt_tokens=tokens), {}

            return servers.enter_context(double(reply)) + "/v1", got

        yield start


def label_a(text):
    return '{"label":"a"}'


def records(settings, stage):
    return [r for r in registry.read(settings, "runs") if r["stage"] == stage]


# Shadow.


def test_both_endpoints_get_the_same_scrubbed_requests_and_a_like_candidate_passes(settings, endpoint):
    """Guards against a comparison on different requests, and against personal data that leaves the log or is kept."""
    planted = [line(100, input="call ada@corp.com or +49 171 5550 1234", correction=None), line(101, consent=False, input="no consent")]
    with settings.path("log.jsonl").open("a") as stream:
        stream.writelines(json.dumps(one) + "\n" for one in planted)
    (old, got_old), (new, got_new) = endpoint(label_a), endpoint(label_a)
    report = shadow.shadow(settings, CONTRACT, "new", old, new)
    assert sorted(got_old) == sorted(got_new) and len(got_old) == 1 + 41 and "call [EMAIL_1] or [PHONE_1]" in got_old
    assert "no consent" not in got_new and report["passed"] and report["against"] == "old" and report["requests"] == 41
    assert report["agreement"].startswith("1.000") and "**Passed.**" in report["text"]
    kept = [f for f in settings.root.rglob("*") if f.is_file() and f.name != "log.jsonl" and "ada@corp" in f.read_text(errors="replace")]
    assert kept == [] and records(settings, "shadow")[0]["passed"]


@pytest.mark.parametrize("answer, why", [
    (lambda text: '{"label":"c"}' if text[-1] in "02468" else '{"label":"a"}', "breaks the contract"),
    (lambda text: None if text[-1] in "02468" else '{"label":"a"}', "breaks the contract"),
])  # fmt: skip
def test_a_candidate_that_breaks_the_contract_more_often_does_not_pass(settings, endpoint, answer, why):
    """Guards against a shadow that lets a worse model through: odd labels, and requests that the server refuses."""
    report = shadow.shadow(settings, CONTRACT, "new", endpoint(label_a)[0], endpoint(answer)[0])
    assert not report["passed"] and why in report["why"][0] and report["broken"]["only_candidate"] == 20
    assert len(report["differ"]) == 20 and report["broken"]["mcnemar_p"] < 0.001
    with pytest.raises(SlmError, match="has not passed a shadow"):
        canary.start(settings, "new")


def test_the_exit_code_says_whether_the_candidate_passed(settings, endpoint, monkeypatch, capsys):
    """Guards against a script that goes on to the canary after a failed shadow."""
    from slm import cli

    monkeypatch.setattr(cli, "project_contract", lambda settings: CONTRACT)
    monkeypatch.chdir(settings.root)
    for answer, code in ((label_a, 0), (lambda text: "no JSON", 1)):
        with pytest.raises(SystemExit) as left:
            cli.app(["shadow", "new", "--current", endpoint(label_a)[0], "--candidate", endpoint(answer)[0]])
        assert left.value.code == code
    assert "Not passed: it breaks the contract" in capsys.readouterr().out


def answered(*labels, latency=0.1):
    return [Answer(json.dumps({"label": one}), latency) for one in labels]


def test_each_rule_of_the_shadow_fails_alone(settings):
    """Guards against a rule that is named in the report and never applied."""
    lines = [LogLine(**line(n, correction='{"label":"b"}')) for n in range(40)]
    right, wrong, few = answered(*"b" * 40), answered(*"a" * 40), answered(*"b" * 20)

    def why(current, candidate, lines=lines):
        return shadow.judge(settings, CONTRACT, lines, {"current": current, "candidate": candidate})["why"]

    assert why(right, right) == why(wrong, right) == []
    assert why(right, wrong) == ["it is worse on the corrected requests"]
    assert why(few, few, lines[:20]) == ["20 requests are too few, 30 are needed"] and why([], [], [])
    assert why(right, answered(*"b" * 40, latency=9.0))[0].startswith("its p95 of 9.00 s is above")
    assert why(answered(*"b" * 40, latency=9.5), answered(*"b" * 40, latency=9.0)) == []
    cut = [Answer('{"label":"b"}', 0.1, finish_reason="length")] * 40
    assert "40 times" in why(right, cut)[0] and why(cut, right) == []


def test_without_a_release_there_is_no_shadow(settings):
    """Guards against production traffic for a model that never stood the locked benchmark, or is another one now."""
    with pytest.raises(SlmError, match="other is not released: the locked benchmark comes first"):
        shadow.shadow(settings, CONTRACT, "other", "http://x/v1", "http://y/v1")
    later = (datetime.now(UTC) + timedelta(hours=1)).isoformat()
    with settings.path("registry/runs.jsonl").open("a") as stream:
        stream.write(json.dumps({"stage": "train", "status": "completed", "run_id": "new", "at": later}) + "\n")
    with pytest.raises(SlmError, match="was trained again since its release"):
        shadow.shadow(settings, CONTRACT, "new", "http://x/v1", "http://y/v1")


def test_what_cannot_be_compared_is_refused_in_one_sentence(settings, endpoint):
    """Guards against figures from a dead endpoint, another template, one endpoint twice, or two schemas."""
    good, dead, other = endpoint(label_a)[0], "http://127.0.0.1:9/v1", endpoint(label_a, tokens=9)[0]
    dies = endpoint(lambda text: None)[0]
    for pair, problem in (
        ((good, dead), "is the server running"), ((other, good), "another chat template"), ((good, good), "one and the same"),
        ((good, dies), "nothing is recorded: .*HTTP 500"),
    ):  # fmt: skip
        with pytest.raises(SlmError, match=problem):
            shadow.shadow(settings, CONTRACT, "new", *pair)
    write_json(settings.path("outputs/gguf/old/client/contract.json"), TERMS | {"version": "old", "schema": {}})
    with pytest.raises(SlmError, match="different schemas"):
        shadow.shadow(settings, CONTRACT, "new", good, other)
    settings.path("outputs/gguf/old/client/contract.json").write_text('{"url": ')
    with pytest.raises(SlmError, match="missing or torn; run 08_export for run old"):
        shadow.shadow(settings, CONTRACT, "new", good, other)
    assert records(settings, "shadow") == [] and not settings.path("outputs/eval_reports/new").exists()


# Canary: the statistics.


def router(**plan):
    own = {"share": 0.5, "days": 0, "settle_hours": 0, "most": 2000} | plan
    return canary.Router(
        run_id="new", share=own["share"], salt="s", since=NOW - timedelta(days=2), current="old q8_0", alpha=0.05, slow_s=2.0,
        candidate=TERMS | {"version": "new q8_0"}, plan=Canary(**own),
    )  # fmt: skip


def traffic(n, current=0.0, candidate=0.0, share=0.5, seed=0, **changes):
    """Log lines, one customer each; the rates are of requests that cannot be read."""
    rng, lines = random.Random(seed), []
    for i in range(n):
        new = rng.random() < share
        ok = rng.random() >= (candidate if new else current)
        at = (NOW - timedelta(days=1, seconds=n - i)).isoformat()
        version = "new q8_0" if new else "old q8_0"
        lines.append(LogLine(**line(i, correction=None, parse_ok=ok, time=at, model_version=version) | changes))
    return lines


def test_the_interval_holds_however_often_one_looks():
    """Guards against an error rate that is only right for one look; the usual interval, looked at each time, is shown
    to fail where this one holds."""
    import numpy as np
    from statsmodels.stats.proportion import proportion_confint

    alpha, n = 0.2, np.arange(1, 601)
    for p in (0.03, 0.3):
        k = np.random.default_rng(1).binomial(1, p, (200, len(n))).cumsum(axis=1)
        low, high = canary.bounds(k, np.broadcast_to(n, k.shape), alpha)
        missed = ((low > p) | (high < p)).any(axis=1).mean()
        usual = proportion_confint(k, n, alpha=alpha, method="wilson")
        peeked = ((usual[0] > p) | (usual[1] < p)).any(axis=1).mean()
        assert 0 < missed < alpha < 0.5 < peeked
        assert ((low <= k / n) & (k / n <= high)).all() and (high - low)[:, -1].max() < 0.15


def test_bounds_at_the_edges():
    """Guards against a crash or a false certainty before the first request, and when all or none fail."""
    low, high = canary.bounds([0, 0, 10, 0], [0, 10, 10, 10_000], 0.05)
    assert (low[0], high[0]) == (0, 1) and low[1] == 0 and 0.3 < high[1] < 0.6
    assert high[2] == 1 and 0.4 < low[2] < 0.7 and high[3] < 0.002


def test_equal_models_are_not_rolled_back_by_peeking_and_a_bad_one_is():
    """Guards against both errors of the rule itself, looked at after every 20 customers."""
    plan, ends = router(), {0.05: [], 0.5: []}
    for seed in range(5):
        for candidate, found in ends.items():
            lines = traffic(600, 0.05, candidate, seed=seed)
            looks = (canary.judge(plan, CONTRACT, lines[:seen], NOW)[0] for seen in range(40, 601, 40))
            found.append(next((decision for decision in looks if decision != "running"), "running"))
    assert "rolled back" not in ends[0.05] and ends[0.5] == ["rolled back"] * 5
    assert canary.judge(plan, CONTRACT, traffic(1500, 0.01, 0.01), NOW)[0] == "promoted"


def test_each_outcome_rolls_back_alone():
    """Guards against a model that answers at once and in good form, and wrong; or right, and too late."""
    lines = traffic(200)
    assert canary.judge(router(), CONTRACT, lines, NOW)[0] == "running"
    for worse, name in (({"parse_ok": False}, "unreadable"), ({"latency_s": 2.5}, "slow"), ({"correction": '{"label":"b"}'}, "wrong")):
        bad = [one.model_copy(update=worse if one.model_version == "new q8_0" else {}) for one in lines]
        decision, notes, table, _ = canary.judge(router(), CONTRACT, bad, NOW)
        assert decision == "rolled back" and notes[0].startswith(name) and [row["outcome"] for row in table] == ["unreadable", "slow", "wrong"]
        current = [one.model_copy(update=worse if one.model_version == "old q8_0" else {}) for one in lines]
        assert canary.judge(router(), CONTRACT, current, NOW)[0] != "rolled back"
    confirmed = [one.model_copy(update={"correction": '{"label": "a"}'} if "new" in one.model_version else {}) for one in lines]
    assert canary.judge(router(), CONTRACT, confirmed, NOW)[0] == "running"


def test_corrections_are_waited_for():
    """Guards against young requests that count as right because nobody had the time to correct them."""
    lines = traffic(1500)
    decision, _, table, _ = canary.judge(router(settle_hours=48), CONTRACT, lines, NOW)
    assert decision == "running" and table[2]["current"].startswith("0 of 0:")
    assert canary.judge(router(days=3), CONTRACT, lines, NOW)[0] == "running"
    assert canary.judge(router(settle_hours=20), CONTRACT, lines, NOW)[0] == "promoted"


def test_a_customer_counts_once():
    """Guards against one customer with a loop, whose requests resemble one another, who decides for all."""
    loop = [one.model_copy(update={"group": "c0", "model_version": "new q8_0"}) for one in traffic(300, 1.0, 1.0)]
    decision, _, table, _ = canary.judge(router(), CONTRACT, loop + traffic(60, seed=3), NOW)
    assert decision == "running" and table[0]["candidate"].startswith("1 of ")


def test_what_the_log_lacks_is_said():
    """Guards against a canary that runs for weeks on one arm, on other versions, or on a share that nobody planned."""
    lines = traffic(40)
    only = [one for one in lines if one.model_version == "old q8_0"]
    older = [one.model_copy(update={"time": NOW - timedelta(days=9)}) for one in lines]
    other = [one.model_copy(update={"model_version": "older f16"}) for one in lines]
    assert "no request of 'new q8_0' yet" in canary.judge(router(), CONTRACT, only, NOW)[1]
    assert len(canary.judge(router(), CONTRACT, older, NOW)[1]) == 2
    assert "not counted: requests of other versions, older f16" in canary.judge(router(), CONTRACT, other, NOW)[1]
    decision, notes, *_ = canary.judge(router(share=0.1), CONTRACT, traffic(1500), NOW)
    assert decision == "running" and "planned are 10%: is every request routed" in notes[0]


def test_it_ends_undecided_at_the_plan_s_most():
    """Guards against a canary that never ends because the truth lies at the margin."""
    lines = traffic(240, 0.3, 0.35)
    assert canary.judge(router(most=100), CONTRACT, lines, NOW)[0] == "not decided"
    assert canary.judge(router(most=200), CONTRACT, lines, NOW)[0] == "running"
    for wait in ({"settle_hours": 48}, {"days": 3}):  # heavy traffic must not end it before a correction can come
        assert canary.judge(router(most=100, **wait), CONTRACT, lines, NOW)[0] == "running"


def test_the_plan_says_what_a_decision_takes():
    """Guards against a plan whose numbers are not those of the rule: a rise that it promises to find in n customers."""
    table = canary.needed(router(share=0.1, most=5000), 0.05)
    assert [row["is"] for row in table] == ["promoted", *["rolled back"] * 3] and table == canary.needed(router(share=0.1, most=5000), 0.05)
    median, most = (int(table[3][key].replace(",", "")) for key in ("after customers of its own (median)", "9 of 10 by"))
    assert 40 < median < most < 300 and int(table[2]["9 of 10 by"].replace(",", "")) > most
    lines = traffic(12 * most, 0.05, 0.25, share=0.1, seed=5)
    assert canary.judge(router(share=0.1, most=5000), CONTRACT, lines, NOW)[0] == "rolled back"


# Canary: the files.


@pytest.fixture
def started(settings):
    """The project with a canary of run `new`."""
    release = registry.latest(settings, "runs", stage="release", run_id="new")
    passed = {"stage": "shadow", "run_id": "new", "passed": True, "release": release["hash"]}
    sides = {"current": {"version": "old q8_0"}, "candidate": {"url": "http://new/v1", "model": "toy"}}
    registry.append(settings, "runs", passed | sides)
    canary.start(settings, "new")
    return settings


def bad_log(settings):
    since = canary.load(settings).since
    lines = [one.model_copy(update={"time": since + timedelta(seconds=1)}) for one in traffic(100, 0.0, 1.0)]
    write_jsonl(settings.path("log.jsonl"), [one.model_dump(mode="json") for one in lines])


def test_start_needs_a_shadow_of_this_very_release_and_no_other_canary(started):
    """Guards against the order benchmark, shadow, canary being skipped after the model changed."""
    with pytest.raises(SlmError, match="a canary of run new is running; delete the file"):
        canary.start(started, "new")
    started.path("client/router.json").unlink()
    assert canary.start(started, "new").candidate["url"] == "http://new/v1"
    registry.append(started, "runs", {"stage": "release", "run_id": "new", "files": "others"})
    with pytest.raises(SlmError, match="has not passed a shadow since its release"):
        canary.start(started, "new")


def test_a_customer_keeps_a_model_and_the_share_is_kept(started):
    """Guards against customers who get another model at each request, and against half the traffic for a tenth."""
    client = load_module(started.path("client/client.py"))
    current = TERMS | {"version": "old q8_0"}
    got = [client.route(current, f"c{n}")["version"] for n in range(2000)]
    assert got == [client.route(current, f"c{n}")["version"] for n in range(2000)]
    assert 900 < got.count("new q8_0") < 1100
    assert {client.route(current)["version"] for _ in range(50)} == {"old q8_0", "new q8_0"}  # without a group: by chance


@pytest.mark.parametrize("content", ['{"share": 1, "salt"', "", "[]", "\x00\xff", '{"share": "1", "salt": "", "candidate": {}}'])
def test_a_torn_router_file_sends_everybody_to_the_current_model(started, content):
    """Guards against a client that stops answering, or gives all to the candidate, because of half a file."""
    started.path("client/router.json").write_bytes(content.encode("latin-1"))
    client, current = load_module(started.path("client/client.py")), TERMS | {"version": "old q8_0"}
    assert all(client.route(current, f"c{n}") is current for n in range(20))
    with pytest.raises(SlmError, match="router.json: torn, or changed by hand .*start the canary again"):
        canary.check(started, CONTRACT)
    started.path("client/router.json").unlink()
    assert all(client.route(current, f"c{n}") is current for n in range(20))
    with pytest.raises(SlmError, match="there is no canary"):
        canary.check(started, CONTRACT)


def test_a_roll_back_takes_the_candidate_out_at_once_and_for_good(started, monkeypatch, capsys):
    """Guards against a roll-back that is printed and not done, or undone by the next look."""
    from slm import cli

    monkeypatch.setattr(cli, "project_contract", lambda settings: CONTRACT)
    monkeypatch.chdir(started.root)
    bad_log(started)
    for _ in range(2):
        with pytest.raises(SystemExit) as left:
            cli.app(["canary", "check"])
        assert left.value.code == 1
    client, current = load_module(started.path("client/client.py")), TERMS | {"version": "old q8_0"}
    assert all(client.route(current, f"c{n}") is current for n in range(50))
    assert [r["decision"] for r in records(started, "canary")] == ["started", "rolled back"]
    out = capsys.readouterr().out
    assert "unreadable: certainly more often" in out and "run new: rolled back, 0% of the customers get it." in out
    assert started.path("outputs/eval_reports/new/canary.png").stat().st_size > 5000


def test_lines_that_do_not_count_are_told(started):
    """Guards against half a log that is left out without a word."""
    with started.path("log.jsonl").open("a") as stream:
        stream.write(json.dumps(line(200, consent=False)) + '\n{"request_id": "r2')
    notes = canary.check(started, CONTRACT)[1]
    assert {"not counted: 1 torn or invalid lines", "not counted: 1 requests without consent"} <= {*notes}


def test_two_looks_at_once_decide_once(started):
    """Guards against a decision that is recorded twice, or a router file that two write."""
    bad_log(started)
    found = []
    threads = [threading.Thread(target=lambda: found.append(canary.check(started, CONTRACT)[0].status)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == ["rolled back"] * 4
    assert [r["decision"] for r in records(started, "canary")] == ["started", "rolled back"]


# For real.


def test_two_real_servers_from_shadow_to_promotion_and_roll_back(tmp_path, request):
    """Guards against parts that only fit each other's doubles: two llama.cpp servers with two files, asked and logged
    through client.py; a like candidate is promoted, and rolled back when its server dies, which the monitor sees in the same log."""
    from test_client import SHORT

    from slm.export.client import write_client

    made, merged, files = request.getfixturevalue("project")

    settings = load_settings(start=made.root, run_id="old", overrides={
        "evaluate.max_new_tokens": 48, "production.logs": "requests.jsonl", "task.target_latency_ms": 60_000,
        "production.canary": {"share": 0.5, "margin": 0.5, "days": 0, "settle_hours": 0},
    })  # fmt: skip
    for run, file in zip(("new", "old"), files[::-1], strict=True):
        folder = settings.path(f"outputs/gguf/{run}")
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(file.path, folder)
        write_client(load_settings(start=made.root, run_id=run, overrides={"evaluate.max_new_tokens": 48}), SHORT, merged, folder / file.path.name)
        registry.append(settings, "runs", {"stage": "release", "run_id": run})
    options = ["--n_ctx", "1024", "--n_threads", "1"]
    servers = [real_server(*LLAMA_CPP, "--model", str(file.path), *options) for file in files]
    with servers[0] as (old, _), servers[1] as (new, process):
        client, log = load_module(settings.path("client/client.py")), settings.path("requests.jsonl")
        logger = load_module(settings.path("client/log.py"))
        current = client.load(settings.path("outputs/gguf/old/client")) | {"url": old}

        def serve_customers(begin, end):
            with logger.Log(log, current["version"]) as writer:
                for n in range(begin, end):
                    try:
                        client.ask(client.route(current, f"c{n}"), f"Colour number {n}?", writer, consent=True, group=f"c{n}")
                    except client.ClientError:
                        pass

        with logger.Log(log, current["version"]) as writer:
            for n in range(30):
                writer.write(f"Colour number {n}?", '{"colour": "red", "sure": true}', 0.1, True, consent=True, group=f"c{n}")
        report = shadow.shadow(settings, SHORT, "new", old, new, against="old")
        assert report["passed"] and report["requests"] == 30 and report["candidate"]["version"] == "new q8_0", report["why"]
        canary.start(settings, "new")
        serve_customers(30, 70)
        found, notes, table, _ = canary.check(settings, SHORT)
        assert (found.status, found.share) == ("promoted", 1.0), (notes, table)
        assert client.route(current, "anybody")["version"] == "new q8_0"
        canary.start(settings, "new")
        process.terminate()
        process.wait()
        serve_customers(70, 110)
        found, notes, *_ = canary.check(settings, SHORT)
        assert found.status == "rolled back" and notes[0].startswith("unreadable")
        seen = {(line["model"], line["measure"]): line for line in monitor.watch(settings, SHORT)["lines"]}
        worst = seen["new q8_0", monitor.ERRORS]
        assert worst["verdict"] == monitor.BAD and worst["value"] > 0.3 and seen["old f16", monitor.ERRORS]["verdict"] == "ok"
        assert settings.path("outputs/monitor/monitor.png").stat().st_size > 5000
        assert client.ask(client.route(current, "c71"), "Colour?")["colour"] in ("red", "blue")
    lines = [json.loads(one) for one in log.read_text().splitlines()]
    assert len(lines) == 110 and {one["model_version"] for one in lines} == {"old f16", "new q8_0"}
