"""Rows, contract, settings, registry: what every stage stands on."""

import json
import multiprocessing

import pytest
import yaml

from slm import registry
from slm.errors import SlmError
from slm.rows import from_any, make_row, read_rows, write_rows, write_text
from slm.settings import load_settings, parse_override
from task.contract import contract


@pytest.fixture
def project(tmp_path):
    """A folder with the two settings files and nothing else."""
    (tmp_path / "training/configs").mkdir(parents=True)
    (tmp_path / "training/configs/train_config.yaml").write_text("learning_rate: 2.0e-4\nepochs: 2\n")
    body = {"model": {"base": "tiny"}, "train": {"epochs": 3}, "profiles": {"fast": {"train": {"epochs": 1}}}}
    (tmp_path / "project.yaml").write_text(yaml.safe_dump(body))
    return tmp_path


def test_rows_survive_a_round_trip(tmp_path):
    """Guards against a field or a character that is lost between writing and reading."""
    row = make_row("Où est TL-40213 ? 🧾", '{"a":1}', category="billing", kind="near_miss", group="g", rejected="x")
    write_rows(tmp_path / "a.jsonl", [row])
    assert read_rows(tmp_path / "a.jsonl") == [row]


@pytest.mark.parametrize(
    "record",
    [
        {"instruction": "Classify.", "input": "charged twice", "output": "billing"},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        {"prompt": "Rewrite: app broke", "chosen": "The app fails.", "rejected": "It broke."},
    ],
)
def test_each_format_becomes_a_row(record):
    """Guards against an import format that is promised and not read."""
    row = from_any(record, category="x")
    assert row.answer in ("billing", "b", "The app fails.") and row.messages[-1].role == "assistant"


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("{not json", "Expecting"),
        ('{"messages": []}', "too_short|at least 2|none"),
        ('{"id":"1","messages":[{"role":"user","content":"a"},{"role":"assistant","content":"b"}],"meta":{"category":"x"},"extra":1}', "extra"),
        ('["a"]', "object"),
    ],
)  # fmt: skip
def test_a_bad_line_is_named(tmp_path, line, word):
    """Guards against an error that does not say which file and line to mend."""
    good = make_row("a", "b", category="x").model_dump_json()
    (tmp_path / "a.jsonl").write_text(f"{good}\n{line}\n")
    with pytest.raises(SlmError, match=r"a\.jsonl:2: ") as caught:
        read_rows(tmp_path / "a.jsonl", category="x")
    assert any(part in str(caught.value) for part in word.split("|"))


def test_bytes_that_are_not_utf8_are_named(tmp_path):
    """Guards against a UnicodeDecodeError without a place."""
    (tmp_path / "a.jsonl").write_bytes(b'{"a": "\xff"}\n')
    with pytest.raises(SlmError, match=r"a\.jsonl:1: not UTF-8"):
        read_rows(tmp_path / "a.jsonl")


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    """Guards against half a file under the final name when the disk is full."""
    write_text(tmp_path / "a.txt", "old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(SlmError, match="No space left"):
        write_text(tmp_path / "a.txt", "new")
    assert (tmp_path / "a.txt").read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_strict_and_lenient_parsing_differ_only_by_the_prose():
    """Guards against a strict parser that forgives prose, or a lenient one that forgives the schema."""
    row = next(r for r in read_rows("data/raw/seed.jsonl"))
    assert contract.parse(row.answer).error is None
    wrapped = f"Sure! Here it is:\n```json\n{row.answer}\n```"
    assert contract.parse(wrapped).stage == "json" and contract.parse(wrapped, lenient=True).error is None
    broken = json.dumps({**json.loads(row.answer), contract.label_field: "no such label"})
    assert contract.parse(broken).stage == "schema" and contract.parse(broken, lenient=True).stage == "schema"


@pytest.mark.parametrize("text", ['{"a": NaN}', '{"a": 1, "a": 2}', "[" * 100_000, "", "null"])
def test_odd_json_is_an_error_and_not_a_crash(text):
    """Guards against JSON that Python reads and the contract must not."""
    assert contract.parse(text).error


def test_every_shipped_answer_is_canonical():
    """Guards against gold answers that differ from what the contract would write."""
    files = ["data/raw/seed.jsonl", *(f"data/eval/{name}.jsonl" for name in registry.SETS)]
    rows = [row for file in files for row in read_rows(file)]
    assert len(rows) >= 380
    assert [r.id for r in rows if contract.dump(json.loads(r.answer)) != r.answer] == []


def test_later_layers_win(project):
    """Guards against a profile or an override that is read and not applied."""
    epochs = [
        load_settings(start=project).train.epochs,
        load_settings(start=project, profile="fast").train.epochs,
        load_settings(start=project, profile="fast", overrides={"train.epochs": 5}).train.epochs,
    ]
    assert epochs == [3, 1, 5] and load_settings(start=project).train.learning_rate == 2e-4


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"overrides": {"train.epoch": 1}}, r"train\.epoch: unknown setting.*train\.epochs"),
        ({"overrides": {"train.epochs": "many"}}, r"train\.epochs"),
        ({"profile": "gpus"}, "no profile 'gpus'; there are: default, fast"),
        ({"run_id": "../x"}, "run_id"),
        ({"config": "../project.yaml"}, "outside the project"),
        ({"config": "absent.yaml"}, "no such file"),
    ],
)
def test_a_wrong_setting_is_named(project, options, word):
    """Guards against a typo that trains for a night with the default."""
    with pytest.raises(SlmError, match=word):
        load_settings(start=project, **options)


def test_a_path_cannot_leave_the_project(project):
    """Guards against ../ in a file name."""
    with pytest.raises(SlmError, match="outside the project"):
        load_settings(start=project).path("../secret")


def test_an_override_is_read_as_yaml():
    """Guards against "false" that stays a true string."""
    assert parse_override("train.packing=false") == ("train.packing", False)
    with pytest.raises(SlmError, match="key=value"):
        parse_override("train.packing")


def _append(arguments):
    root, number = arguments
    registry.append(load_settings(start=root), "runs", {"n": number, "text": "x" * 5000})


def test_two_writers_do_not_tear_the_registry(project):
    """Guards against two runs at once that write into each other's line."""
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        pool.map(_append, [(project, n) for n in range(24)])
    assert sorted(r["n"] for r in registry.read(load_settings(start=project), "runs")) == list(range(24))


def test_a_changed_locked_set_stops_the_run(project):
    """Guards against an evaluation set that is edited after the baselines were scored."""
    settings = load_settings(start=project)
    with pytest.raises(SlmError, match="not locked"):
        registry.check_locked(settings)
    for name in registry.SETS:
        write_text(settings.path(f"data/eval/{name}.jsonl"), f"{name}\n")
    registry.lock_sets(settings)
    registry.check_locked(settings)
    write_text(settings.path("data/eval/golden.jsonl"), "edited\n")
    with pytest.raises(SlmError, match=r"golden\.jsonl: changed"):
        registry.lock_sets(settings)


def test_the_outline_names_every_field_and_value():
    """Guards against a better prompt that leaves out what an answer may be."""
    values = [v for row in read_rows("data/raw/seed.jsonl") for v in contract.flatten(json.loads(row.answer)).items()]
    assert all(name.split(".")[-1] in contract.outline for name, _ in values)
    assert all(row_label in contract.outline for row_label in {v for k, v in values if k == contract.label_field})
    assert len(contract.outline) < len(json.dumps(contract.schema))
