"""Bad input: whatever stands in a file, no reader crashes, no row is lost, and what is written is JSON again."""

import json
import os
import shutil
import tempfile
from pathlib import Path

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from slm.curate import curate
from slm.curate.read import read_candidates
from slm.errors import SlmError
from slm.generate.salvage import rows_from
from slm.rows import make_row, read_rows, write_rows
from slm.settings import load_settings
from test_curate import CONTRACT, WORDS

ROOT = Path(__file__).resolve().parents[1]
ANSWER = '{"label":"bug","order":null}'
GOOD = [make_row(" ".join(w + end for w in WORDS), ANSWER, category="bug", source="teacher") for end in "abcdefghijkl"]

# Right-to-left marks, letters that only look Latin, lone surrogates, NUL, line separators, marks without a base.
odd = st.text(
    st.sampled_from(
        'ab {}[]",:\\\n\r\t\x00\x1f\u0430\u0435\u05d0\u0639\u200b\u202e\u2028\u0085\u0301\ud800\udfff\U0001f600'
    ),
    max_size=30,
)
texts = odd | st.text(max_size=60)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.just(10**4000) | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3), max_leaves=6,
)  # fmt: skip
answers = (
    st.just(ANSWER)
    | st.sampled_from(['{"label":"bug","label":"bug","order":null}', '{"label":NaN,"order":null}', "[" * 3000])
    | texts
)


@st.composite
def records(draw) -> dict:
    """A record in one of the formats, or in none, with odd things in it."""
    user, answer = draw(texts), draw(answers)
    chat = [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
    meta = {"category": draw(st.just("bug") | texts), "provenance": draw(st.dictionaries(texts, values, max_size=2))}
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": user, "arguments": answer}}]}
    record = draw(st.sampled_from([
        {"id": draw(st.just("same") | texts), "messages": chat, "meta": meta}, {"messages": chat}, {"messages": [chat[0], call]},
        {"instruction": user, "input": "", "output": answer}, {"prompt": user, "chosen": answer, "rejected": "no"}, {},
    ]))  # fmt: skip
    return {
        **record,
        **draw(
            st.dictionaries(st.sampled_from(["id", "messages", "meta", "rejected", "output", "x"]), values, max_size=1)
        ),
    }


@st.composite
def lines(draw) -> bytes:
    """One line: a record, a record damaged, or bytes that are no JSON at all."""
    good = json.dumps(draw(records()), ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass")
    at, junk = draw(st.integers(0, len(good))), draw(st.binary(max_size=6))
    kinds = [good, good[:at], good[:at] + junk + good[at:], junk, b"[" * 10_000 + b"]" * 10_000, b'{"a":' * 10_000, b'{"messages":[],"messages":[]}',
             json.dumps(good.decode("utf-8", "replace")).encode(), b"null", b"9" * 5000, b"NaN"]  # fmt: skip
    return draw(st.sampled_from([good, *kinds]))


@st.composite
def files(draw) -> bytes:
    """Lines with any line ends, with or without a byte order mark."""
    body = b"".join(
        line + draw(st.sampled_from([b"\n", b"\r\n", b"\n\n"])) for line in draw(st.lists(lines(), max_size=9))
    )
    return draw(st.sampled_from([b"", b"\xef\xbb\xbf", b"\xff\xfe"])) + body


fuzz = {"deadline": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}
ROW = '{"id":"%s","messages":[{"role":"user","content":"%s"},{"role":"assistant","content":"{\\"label\\":\\"bug\\",\\"order\\":null}"}],"meta":{"category":"bug","provenance":{%s}}}'


def project(folder: Path, body: bytes):
    """Settings of a project whose one batch is `body` after twelve good rows."""
    (folder / "training/configs").mkdir(parents=True)
    (folder / "data/generated").mkdir(parents=True)
    (folder / "project.yaml").write_text("project: {name: t}\n")
    shutil.copy(ROOT / "training/configs/train_config.yaml", folder / "training/configs")
    for n, name in enumerate(("dev", "test", "adversarial", "golden")):
        write_rows(
            folder / f"data/eval/{name}.jsonl",
            [make_row(f"evaluation row number {n} of {name}", ANSWER, category="bug")],
        )
    write_rows(folder / "data/generated/batch_000.jsonl", GOOD)
    (folder / "data/generated/batch_001.jsonl").write_bytes(body)
    return load_settings(start=folder)


def count(conversations):
    return [sum(len(m["content"].split()) for m in messages) for messages in conversations]


def seconds() -> float:
    """CPU time, workers included: a busy machine is no failure."""
    return sum(os.times()[:4])


def outputs(folder: Path) -> dict[str, bytes]:
    return {
        f"{f.parent.name}/{f.name}": f.read_bytes()
        for f in sorted(folder.glob("data/*/*.jsonl"))
        if f.parent.name in ("accepted", "rejected")
    }


def strict(line: bytes) -> dict:
    """A line as other readers see it: UTF-8, and no NaN or Infinity."""

    def refuse(name):
        raise ValueError(f"{name} is not JSON")

    return json.loads(line.decode("utf-8"), parse_constant=refuse)


def held(body: bytes) -> int:
    return sum(1 for line in body.split(b"\n") if line.strip())


def curated(body: bytes) -> tuple[list[dict], list[dict]]:
    """(accepted, rejected) records after two runs that wrote the same bytes; every line is in one of the two."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        chosen = project(folder, body)
        curate(chosen, CONTRACT, [], count)
        first = outputs(folder)
        curate(chosen, CONTRACT, [], count)
        assert outputs(folder) == first
        accepted = [strict(line) for line in first["accepted/all.jsonl"].splitlines()]
        rejected = [
            strict(line) for file, text in first.items() if file.startswith("rejected") for line in text.splitlines()
        ]
    assert len(accepted) + len(rejected) == len(GOOD) + held(body)
    assert all(record["gate"] and record["reason"].strip() for record in rejected)
    return accepted, rejected


@settings(max_examples=200, **fuzz)
@given(files())
@example(b"")
@example(b"\xef\xbb\xbf")
@example(b"\x00\x00\n")
@example(b"\xef\xbb\xbf" + ROW.encode() % (b"a", b"b c d", b"") + b"\r\n")
def test_every_line_becomes_a_candidate(body):
    """A crash at one bad line of a million, or a line that silently disappears."""
    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / "b.jsonl"
        file.write_bytes(body)
        found = list(read_candidates(file))
    assert len(found) == held(body)
    assert all((c.row is None) == (c.verdict is not None) and (c.verdict is None or c.verdict.reason) for c in found)


@settings(max_examples=100, **fuzz)
@given(files())
@example(b"[" * 10_000)
@example(b"9" * 5000)
def test_strict_reading_gives_rows_or_one_clear_error(body):
    """A traceback instead of file:line where a seed or evaluation file is damaged."""
    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / "b.jsonl"
        file.write_bytes(body)
        try:
            assert len(read_rows(file, category="all")) == held(body.removeprefix(b"\xef\xbb\xbf"))
        except SlmError as error:
            assert "b.jsonl" in str(error)


@settings(max_examples=30, **fuzz)
@given(files())
@example((ROW % ("s", "a b c d", '"x":"\\ud800"')).encode())
@example((ROW % ("s", "a b c d", '"x":NaN')).encode())
@example((ROW % ("s", "a b c d", '"x":' + "9" * 4000)).encode())
@example((ROW % ("s", "a b c d", '"x":' + "[" * 500 + "]" * 500)).encode())
@example((ROW % ("\\ud800", "a b c d", "")).encode())
@example((ROW % ("", "\\u0000 \\u2028 \\u0085 \\u202e x", "")).encode())
def test_no_row_is_lost_and_a_second_run_writes_the_same(body):
    """in = accepted + rejected, each refusal with gate and reason, outputs that are UTF-8 and JSON, twice the same."""
    curated(body)


def test_homoglyphs_and_direction_marks_do_not_merge_rows():
    """Rows in other scripts taken for empty ones or for each other, because only Latin letters counted as words."""
    users = ["\u05e9\u05dc\u05d5\u05dd \u05db\u05d9\u05ea\u05d4 \u05d0\u05e8\u05d1\u05e2 \u05d1\u05d9\u05ea", "\u0634\u0643\u0631\u0627 \u062c\u0632\u064a\u0644\u0627 \u0644\u0643\u0645 \u0643\u062b\u064a\u0631\u0627",
             "\u8bf7 \u5e2e\u6211 \u53d6\u6d88 \u8ba2\u5355", "\u0440\u0430\u0443\u0440\u0430l \u0430\u0441\u0441\u043eunt l\u043e\u0441k\u0435d \u0442\u043ed\u0430\u0443"]  # fmt: skip
    body = "".join(
        make_row(u, ANSWER, category="bug", source="teacher").model_dump_json(exclude_none=True) + "\n" for u in users
    )
    accepted, rejected = curated(body.encode())
    assert len(accepted) == len(GOOD) + len(users), rejected


def test_a_line_of_ten_megabytes_is_one_refused_row():
    """Memory that runs out, or minutes for one absurd row: too long must be said in seconds."""
    begin = seconds()
    body = (ROW % ("big", "word and " * 1_100_000, "")).encode()
    _, rejected = curated(body + b"\n" + b"x" * 10_000_000)
    assert sorted(r["gate"] for r in rejected) == ["json_validity", "length"]
    assert seconds() - begin < 30


def test_one_endless_word_takes_no_quadratic_time():
    """A pasted base64 file of 200 kB on which a pattern tries every start: 04 would stand still."""
    begin = seconds()
    curated((ROW % ("b64", "file " + "aGVsbG8gd29y" * 17_000, "")).encode())
    assert seconds() - begin < 10


@settings(max_examples=300, **fuzz)
@given(
    st.lists(
        st.binary(max_size=40).map(lambda b: b.decode("utf-8", "replace"))
        | odd
        | st.text(max_size=40)
        | records().map(json.dumps),
        max_size=6,
    )
)
@example(['{"rows": [1, 2]}'])
@example(['{"rows": [{"input": "a b", "output": "c"}, "left over"]}'])
@example(["```json", "[", "]", "```"])
@example(['{"a":' * 10_000])
@example(["[" * 10_000])
@example(['{"input": "a \\ud800 b", "output": "c"}'])
def test_a_teachers_answer_is_read_or_reported(parts):
    """Truncated, fenced or absurd output that crashes the batch or takes good rows with it unseen."""
    good = [json.dumps({"input": f"good message {n}", "output": {"label": "bug", "order": None}}) for n in range(2)]
    rows, unread = rows_from("\n".join([good[0], *parts, good[1]]), {"category": "bug"})
    seen = " ".join([*(row.user for row in rows), *(text for _, text in unread)])
    assert "good message 0" in seen and "good message 1" in seen
    assert all(reason for reason, _ in unread)
    for row in rows:
        row.model_dump_json()
    lost = [part for part in parts if len(part) == 1 and part.isalnum() and part not in seen]
    assert not lost


def test_values_that_are_no_rows_are_reported():
    """{"rows": [...]} whose members are texts or numbers: they vanished without a word."""
    rows, unread = rows_from('{"rows": [{"input": "a b", "output": "c"}, "left over", 7]}', {"category": "bug"})
    assert [row.user for row in rows] == ["a b"] and len(unread) == 2
