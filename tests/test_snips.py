"""Bring your own data: the SNIPS contract, rules and conversion, on lines written in the form of the published files."""

import importlib.util
import json
import sys

import pytest
from conftest import PROJECT, ROOT

SNIPS = ROOT / "tests" / "snips"
VERBS = {
    "AddToPlaylist": ("add {} to my evening list", "playlist"), "BookRestaurant": ("book a table in {}", "city"),
    "GetWeather": ("weather in {}", "city"), "PlayMusic": ("play {}", "artist"), "RateBook": ("rate {} four stars", "object_name"),
    "SearchCreativeWork": ("find {}", "object_name"), "SearchScreeningEvent": ("when is {} on", "movie_name"),
}  # fmt: skip


def load(name, folder=SNIPS):
    spec = importlib.util.spec_from_file_location(f"snips_{name}", folder / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def parts():
    sys.path.insert(0, str(PROJECT))
    yield load("contract").contract, load("baseline").predict, load("convert")
    sys.path.remove(str(PROJECT))


@pytest.fixture
def source(tmp_path):
    """Three small files; the first test text stands in train too, in other case and with a full stop."""
    for name, start, count in (("train", 0, 40), ("valid", 100, 30), ("test", 200, 10)):
        lines = [
            {"text": text.format(f"thing{n}"), "tool": tool, "arguments": {slot: f"thing{n}"}}
            for n in range(start, start + count)
            for tool, (text, slot) in VERBS.items()
        ]
        if name == "train":
            lines.append({"text": "Add thing200 to my evening list.", "tool": "AddToPlaylist", "arguments": {"playlist": "evening"}})
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return tmp_path


def test_the_sets_are_disjoint_and_leaks_are_left_to_the_gate(parts, source):
    """Guards against a figure that is measured on training rows, and against leaks that vanish before they are named."""
    _, _, convert = parts
    found = convert.splits(source, 1000)
    texts = {name: {convert.key(r) for r in rows} for name, rows in found.items()}
    names = list(texts)
    shared = {(a, b): texts[a] & texts[b] for i, a in enumerate(names) for b in names[i + 1 :] if texts[a] & texts[b]}
    assert shared == {("test", "train"): {"add thing200 to my evening list"}}
    assert {r["tool"] for r in found["golden"]} == set(VERBS) and len(found["test"]) == 70


def test_every_row_keeps_the_contract(parts, source, tmp_path):
    """Guards against slots that the contract does not know, which 02 would refuse only after a bake."""
    contract, _, convert = parts
    counts = convert.write(tmp_path / "project", convert.splits(source, 50), contract)
    assert counts["data/generated/batch_001.jsonl"] == 50
    line = json.loads((tmp_path / "project/data/eval/test.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert contract.parse(line["messages"][1]["content"]).error is None


def test_a_slot_that_occurs_twice_is_a_list_and_an_unknown_slot_is_refused(parts):
    """Guards against a contract that would let the model invent slots."""
    contract, _, _ = parts
    twice = '{"tool":"AddToPlaylist","arguments":{"music_item":["album","album"]}}'
    assert contract.dump(contract.parse(twice).value) == twice
    assert contract.parse('{"tool":"PlayMusic","arguments":{"city":"Oslo"}}').stage == "schema"


def test_arguments_go_into_the_order_of_the_sentence_and_mean_the_same(parts):
    """Guards against training rows that differ from the published ones in more than the order of their arguments."""
    contract, _, convert = parts
    said = {"text": "book for two in oslo", "tool": "BookRestaurant", "arguments": {"party_size_number": "two", "city": "oslo"}, "place": "train:1"}
    turned = {**said, "text": "in oslo for two", "arguments": {"city": "oslo", "party_size_number": "two"}, "place": "train:2"}
    rows = convert.to_rows([said, turned], contract)
    assert rows[0].answer == rows[1].answer
    bench = load("snips", ROOT / "tests" / "benchmarks")
    rows = bench.in_sentence_order(rows, {"train-1": said, "train-2": turned})
    assert rows[0].answer.index("two") < rows[0].answer.index("oslo") and rows[1].answer.index("oslo") < rows[1].answer.index("two")
    assert contract.parse(rows[0].answer).value == contract.parse(rows[1].answer).value == {k: said[k] for k in ("tool", "arguments")}


@pytest.mark.parametrize("text", ["", "?", "rate", "play", "add this to", "{}", "weather in", "book a table for", "x" * 3000])
def test_the_rules_always_give_a_valid_call(parts, text):
    """Guards against a rule program that crashes or breaks the contract, and so loses to the model unfairly."""
    contract, predict, _ = parts
    assert contract.parse(json.dumps(predict(text))).error is None
