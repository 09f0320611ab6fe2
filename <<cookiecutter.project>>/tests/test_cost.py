"""The ledger that fills itself, the workflow's formulas, and the sentence that says whether the fine-tune pays."""
# ruff: noqa: F811

import json
import math
import time

import pytest
from pydantic import ValidationError
from test_report import run_06
from tickets import CONTRACT, settings  # noqa: F401
from typer.testing import CliRunner

from slm import cost, registry
from slm.cli import app
from slm.curate.review import PAUSE_S, Review
from slm.errors import SlmError
from slm.evaluate import Result
from slm.generate.compare import _Bare
from slm.models import Answer, Prompt, cached
from slm.models.program import ProgramModel
from slm.report import economy, model_card, plots
from slm.rows import make_row
from slm.sections import Cost, Endpoint
from slm.settings import Settings

RATES = {"serving_hourly_rate": 0.5, "maintenance_per_month": 100, "larger_price_per_1m_tokens": 5}
PROMPTED = Result(name="prompted_base", set="dev", prompt_tokens=380, completion_tokens=20)
TUNED = Result(name="fine_tuned", set="dev", prompt_tokens=80, completion_tokens=20, latency_p50_s=0.36)


def made(root, requests=1_000_000, **rates):
    found = Settings.model_validate({"cost": rates, "task": {"requests_per_month": requests}})
    found._root = root
    return found


def case(settings, pairs={}):  # noqa: B006
    return economy.economy(settings, {"prompted_base": PROMPTED, "fine_tuned": TUNED}, pairs)


class Talker:
    """A model that answers in tokens, with or without an endpoint behind it."""

    def __init__(self, endpoint=None, purse=None):
        self.name = self.fingerprint = "talker"
        self.purse = purse
        if endpoint:
            self.endpoint = endpoint

    def answer(self, prompts):
        time.sleep(0.02)
        return [Answer("{}", 0.02, 1000, 500) for _ in prompts]


def ask(settings, model, *texts):
    cached(model, settings).answer([Prompt([{"role": "user", "content": text}]) for text in texts])
    return cost.entries(settings, "eval_inference_cost")


def test_the_formulas_are_the_workflows():
    """A model of one's own that decides against the one that was agreed on. Worked by hand."""
    assert cost.total_experiment_cost(10, 2, 3, 2.5, 1) == 20.5
    assert cost.monthly_cost(1_000_000, 400, 5e-6, 30) == pytest.approx(2030)
    assert not cost.pays_off(100, 100) and cost.pays_off(100.01, 100)
    assert cost.break_even_month(500, 200, 100) == 5 and cost.break_even_month(501, 200, 100) == 6
    assert cost.break_even_month(500, 100, 100) is None and cost.break_even_month(0, 200, 100) == 0


def test_new_answers_are_booked_once_and_cached_ones_never(tmp_path):
    """An evaluation that is free on paper; one that is paid again each time its answers come out of the cache."""
    settings = made(tmp_path, gpu_hourly_rate=3600)
    lines = ask(settings, Talker(), "a", "b")
    assert len(lines) == 1 and lines[0]["requests"] == 2 and (lines[0]["tokens_in"], lines[0]["tokens_out"]) == (2000, 1000)
    assert 0.02 <= lines[0]["money"] < 2 and lines[0]["hours"] == pytest.approx(lines[0]["money"] / 3600, abs=1e-5)
    assert len(ask(settings, Talker(), "a", "b")) == 1
    assert ask(settings, Talker(), "b", "c")[1]["requests"] == 1
    assert len(ask(settings, ProgramModel("rules", lambda text: "{}", "rules"), "a")) == 2


def test_an_endpoint_is_paid_by_the_token_and_a_teacher_only_once(tmp_path):
    """The waiting for a hosted model booked as time of this machine; a teacher's call that two lines pay for."""
    settings = made(tmp_path, gpu_hourly_rate=9, larger_price_per_1m_tokens=7)
    priced = Endpoint(url="http://x/v1", model="m", usd_per_1m_input=1, usd_per_1m_output=4)
    assert ask(settings, Talker(priced), "a")[-1]["money"] == pytest.approx(0.003)
    bare = Endpoint(url="http://x/v1", model="judge")  # not the larger model: its flat price is not the judge's
    assert ask(settings, Talker(bare), "b")[-1]["money"] == 0
    larger = settings.model_copy(update={"model": settings.model.model_copy(update={"larger": bare})})
    assert ask(larger, Talker(bare), "c")[-1]["money"] == pytest.approx(0.0105)
    assert len(ask(settings, _Bare(Talker(priced, purse=object())), "d")) == 3


def test_the_time_at_a_card_is_booked_but_not_the_lunch_break(tmp_path, monkeypatch):
    """Planted: two decisions after 30 and 60 seconds, the second with an edit that was refused, and then two hours away."""
    now = [1000.0]
    monkeypatch.setattr("slm.curate.review.time.monotonic", lambda: now[0])
    settings = made(tmp_path, review_hourly_rate=60)
    rows = [make_row(f"m {n}", json.dumps({"topic": "bug", "order": None, "urgent": False}), id=f"r{n}", category="bug") for n in range(3)]
    desk = Review(settings, CONTRACT, [(row, ["random sample"]) for row in rows], {}, clock=now[0])
    for wait, do, row in ((30, "accept", "r0"), (20, "edit", "r1"), (40, "accept", "r1"), (7200, "reject", "r2")):
        now[0] += wait
        desk.act({"do": do, "id": row, "reviewer": "Ada", "answer": "{}"})
    lines = cost.entries(settings, "data_review_cost")
    assert [round(line["hours"] * 3600) for line in lines] == [30, 60, PAUSE_S]
    assert cost.spent(settings) == pytest.approx((90 + PAUSE_S) / 60)


def test_hours_are_entered_by_hand_and_a_wrong_entry_is_taken_back(tmp_path, monkeypatch):
    """A ledger without the dearest item; an append-only file in which a typo stays for good; hours that vanish because
    nobody had set a rate."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "project.yaml").write_text("cost: {engineering_hourly_rate: 80, currency: EUR}\n")
    (tmp_path / "training/configs").mkdir(parents=True)
    (tmp_path / "training/configs/train_config.yaml").write_text("{}\n")

    def say(*words):
        return CliRunner().invoke(app, ["cost", *words])

    assert "| engineering_time | 3.0 | 0 | 240.0 |" in say("add", "engineering_time", "--hours", "3", "--note", "prompts").output
    assert say("add", "engineering_time", "--hours", "-1").exit_code == 0
    shown = say("add", "data_review_cost", "--hours", "2.5").output
    assert "cost.review_hourly_rate is 0" in shown and "| data_review_cost | 2.5 |" in shown
    assert "| engineering_time | 2.0 | 0 | 160.0 |" in shown and "| all | 4.5 | 0 | 160.0 |" in shown


@pytest.mark.parametrize(
    ("item", "hours", "money", "word"),
    [
        ("engineering_time", None, None, "one of them"), ("engineering_time", 1, 1, "one of them"),
        ("engineering_time", math.nan, None, "other than 0"), ("engineering_time", 0, None, "other than 0"),
        ("coffee", 1, None, "must be one of"), ("teacher_generation_cost", 1, None, "by the token"),
    ],
)  # fmt: skip
def test_a_bad_entry_is_refused_and_leaves_no_line(tmp_path, item, hours, money, word):
    """NaN in the ledger makes every sum NaN."""
    with pytest.raises(SlmError, match=word):
        cost.by_hand(made(tmp_path), item, hours, money, "")
    assert cost.entries(made(tmp_path)) == []


def test_a_negative_rate_is_refused():
    """A rate of -1 makes spending a saving."""
    with pytest.raises(ValidationError):
        Cost(gpu_hourly_rate=-1)


def test_the_experiment_is_summed_from_the_ledger_without_peoples_time(tmp_path):
    """Planted: a line of every kind, and a second run's."""
    settings = made(tmp_path, gpu_hourly_rate=2, engineering_hourly_rate=100)
    cost.add(settings, "teacher_generation_cost", 10, tokens_in=5, tokens_out=6)
    cost.add(settings, "data_review_cost", 3, judge="j")
    cost.add(settings, "data_review_cost", 50)
    cost.add_hours(settings, "gpu_training_cost", 1.5)
    cost.add_hours(settings.model_copy(update={"run_id": "two"}), "gpu_training_cost", 0.5)
    cost.add(settings, "eval_inference_cost", 1)
    cost.add_hours(settings, "engineering_time", 4)
    assert cost.experiment(settings) == pytest.approx(10 + 3 + 2 * 2 + 1)
    lines = {line["item"]: line for line in cost.ledger(settings)}
    assert lines["gpu_training_cost"]["this run"] == 3 and lines["gpu_training_cost"]["project"] == 4
    assert cost.ledger(settings)[-1]["project"] == 468


def test_money_of_two_currencies_is_not_added_up(tmp_path):
    """Planted: dollars, after which the project went over to euros."""
    cost.add(made(tmp_path), "engineering_time", 1000)
    settings = made(tmp_path, currency="EUR", **RATES)
    cost.add(settings, "engineering_time", 50)
    found = case(settings)
    assert found["spent"] == 50 and found["uncounted"] == 1


def test_it_pays_in_the_month_that_the_formula_gives(tmp_path):
    """Worked by hand: 1,000,000 requests x 400 tokens x 5 per million = 2,000 against 0.36 s at 0.50 an hour = 50."""
    settings = made(tmp_path, **RATES)
    cost.add(settings, "engineering_time", 4000)
    found = case(settings)
    assert found["verdict"] == ("It pays: it saves 1,950.00 USD a month, maintenance takes 100.00; "
                                "the 4,000.00 spent are back in month 3.")  # fmt: skip
    assert [line["per month"] for line in economy.months(found)] == [50, 2000]
    hosted = case(made(tmp_path, **RATES, hosting_per_month=200))
    assert hosted["savings"] == pytest.approx(1750)  # counted once, not per request and again per month


def test_savings_that_maintenance_eats_say_do_not_ship(tmp_path):
    """Planted: savings of 1,950 against as much maintenance; then the same with a reason on record."""
    rates = RATES | {"maintenance_per_month": 1950}
    assert case(made(tmp_path, **rates))["verdict"].startswith("Do not ship: it saves 1,950.00 USD a month")
    assert case(made(tmp_path, requests=1000, **RATES))["verdict"].startswith("Do not ship")
    reason = case(made(tmp_path, **rates, unlocks="It runs where there is no network."))["verdict"]
    assert reason.startswith("Ships for what prompting cannot give: It runs where there is no network (not compared")
    assert "maintenance takes 1,950.00" in reason
    assert case(made(tmp_path, **rates, unlocks="  "))["verdict"].startswith("Do not ship")


def test_what_nobody_said_is_asked_for_and_never_taken_as_nothing(tmp_path):
    """A verdict that rests on a maintenance of 0 or a price of 0 that is merely a default."""
    said = case(made(tmp_path))["verdict"]
    assert said.startswith("Not known whether it pays") and "cost.maintenance_per_month" in said
    assert "cost.serving_hourly_rate" in said and "cost.larger_price_per_1m_tokens" in said
    only = case(made(tmp_path, **{k: v for k, v in RATES.items() if k != "maintenance_per_month"}))
    assert only["missing"] == ["cost.maintenance_per_month"] and only["savings"] == pytest.approx(1950)
    assert "savings are not known" in case(made(tmp_path, unlocks="speed"))["verdict"]


def test_report_and_card_say_whether_it_pays(settings):
    """A figure that is worked out and shown to nobody; a plot of nothing."""
    settings = settings.model_copy(update={"cost": Cost(**RATES, unlocks="calm")})
    cost.add(settings, "engineering_time", 12)
    report = run_06(settings)
    folder = settings.path("outputs/eval_reports/dev")
    text = (folder / "eval_report.md").read_text()
    part = text.split("## What it costs\n")[1].split("\n## ")[0]
    assert report["cost"]["verdict"] in part and "| engineering_time |" in part and "12.00 USD" in part
    assert "(on dev better against base, better prompt)" in report["cost"]["verdict"]
    card = model_card.render(settings, CONTRACT, report)
    assert f"- Cost: {report['cost']['verdict']} Spent on the project so far: 12.00 USD" in card
    del report["cost"]  # a report of before
    assert "- Cost: not worked out; run 06 again" in model_card.render(settings, CONTRACT, report)


def test_the_plot_says_never_where_it_never_pays(tmp_path, monkeypatch):
    """A picture that disagrees with the sentence: the colour at each place is the formula's month."""
    drawn = {}
    monkeypatch.setattr(plots, "save", lambda figure, path: drawn.update(figure=figure))
    settings = made(tmp_path, **RATES)
    cost.add(settings, "engineering_time", 4000)
    found = case(settings)
    plots.break_even(found, tmp_path / "x.png")
    axes = drawn["figure"].axes[0]
    area = axes.collections[0].get_array().reshape(161, 161)
    assert area[80, 80] == 1 and area[0, 0] == 5 and area[160, 160] == 0  # 3 months; never; at once
    assert axes.lines[-1].get_xydata().tolist() == [[1_000_000, pytest.approx(5)]]


def test_before_training_the_target_stands_for_what_is_not_measured(settings):
    """A project that is begun although no price in sight could ever repay it."""
    poor = settings.model_copy(update={"cost": Cost(**RATES | {"serving_hourly_rate": 50})})
    found = economy.before_training(poor, CONTRACT)
    assert found["verdict"].startswith("Do not ship") and not registry.read(poor, "costs")
    assert found["own"]["tokens per request"] == found["other"]["tokens per request"] > 10
    assert found["own"]["per month"] == pytest.approx(1e6 * 2.0 / 3600 * 50)


def test_what_serving_has_cost_is_no_investment_to_win_back(tmp_path):
    """A break-even month that moves away with every month in service: the month's cost has serving in it already."""
    settings = made(tmp_path, **RATES)
    cost.add(settings, "engineering_time", 4000)
    cost.add(settings, "deployment_inference_cost", 700)
    found = case(settings)
    assert found["spent"] == 4000 and "back in month 3" in found["verdict"] and found["ledger"][-1]["project"] == 4700
