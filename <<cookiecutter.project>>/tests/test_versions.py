"""04, the second half: the split, dataset versions, coverage, the plots, and what the specs say about all of it."""

import multiprocessing
import random
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import pytest
from pydantic import BaseModel, ConfigDict

from slm import registry
from slm.contract import Contract
from slm.curate import (
    cells,
    contradictions,
    coverage,
    curate,
    diff,
    heat_map,
    histogram,
    plot_funnel,
    split_file,
    split_table,
)
from slm.curate.coverage import tally
from slm.curate.split import NAMES, deal, join
from slm.curate.versions import find, reproduce, volume_stage, volume_warning
from slm.errors import SlmError
from slm.rows import KINDS, make_row, read_rows, write_rows
from slm.settings import load_settings

ROOT = Path(__file__).resolve().parents[1]
WORDS = "river stone window paper garden candle bridge forest pencil mirror bottle carpet engine ladder needle orange".split()


class Ticket(BaseModel):
    model_config = ConfigDict(extra="forbid")
    label: Literal["bug", "billing", "other"]


CONTRACT = Contract(
    name="t", task_type="classification", output=Ticket, system_prompt="Label it.", primary_metric="accuracy", target=0.9,
    label_field="label",
)  # fmt: skip


def row(seed: int, label="bug", **meta):
    text = " ".join(random.Random(seed).choices([f"{w}{c}" for w in WORDS for c in "abcdefgh"], k=14))
    return make_row(text, f'{{"label":"{label}"}}', **{"category": label, "source": "teacher", **meta})


def count(conversations):
    return [1] * len(conversations)


def settings_in(folder, **curate_settings):
    (folder / "project.yaml").write_text("project: {name: t}\n")
    (folder / "training/configs").mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT / "training/configs/train_config.yaml", folder / "training/configs")
    return load_settings(overrides={"curate": curate_settings}, start=folder)


@pytest.fixture
def project(tmp_path):
    """Sixty rows of a teacher, ten of a person, four evaluation sets."""
    write_rows(tmp_path / "data/raw/seed.jsonl", [row(1000 + n, source="human") for n in range(10)])
    for place, name in enumerate(registry.SETS):
        write_rows(tmp_path / f"data/eval/{name}.jsonl", [row(2000 + 100 * place + n) for n in range(4)])
    made = {"teacher": "big-model", "prompt": "0a1b", "prompt_version": "v1"}
    labels = ("bug", "billing", "other")
    rows = [row(n, labels[n % 3], group=f"g{n // 2}", provenance=made) for n in range(60)]
    write_rows(tmp_path / "data/generated/batch_001.jsonl", rows)
    return settings_in(tmp_path)


def run_04(settings):
    return curate(settings, CONTRACT, [], count)


# The split


@pytest.mark.parametrize(("n", "shares"), [(200, (0.7, 0.15, 0.15)), (1200, (0.8, 0.1, 0.1)), (4, None)])
def test_split_shares_follow_the_size(n, shares):
    """70/15/15 for small sets, 80/10/10 for larger ones, and never an empty side."""
    keys, labels = [f"g{i // 2 if n > 9 else i}" for i in range(n)], ["x"] * n
    sides = deal(keys, labels, 0, 1000)
    assert all(sides) and sorted(sum(sides, [])) == list(range(n)) and sides == deal(keys, labels, 0, 1000)
    assert n < 9 or deal(keys, labels, 1, 1000) != sides
    for side, share in zip(sides, shares or (), strict=False):
        assert abs(len(side) / n - share) < 0.02
    with pytest.raises(SlmError, match="three groups"):
        deal(["a", "a", "b"], ["x"] * 3, 0, 1000)


@pytest.mark.parametrize("seed", range(5))
def test_every_side_has_the_labels_of_the_whole(seed):
    """A rare label of which all rows fell to train: the internal test never sees it. Groups of one to nine rows."""
    rng = random.Random(seed)
    keys, labels = [], []
    for group in range(600):
        label = rng.choices(["common", "usual", "rare"], [0.7, 0.26, 0.04])[0]
        for _ in range(rng.choice([1, 1, 1, 2, 3, 9])):
            keys.append(f"g{group}")
            labels.append(label if rng.random() < 0.9 else "common")
    whole, sides = Counter(labels), deal(keys, labels, seed, 0)
    for side, share in zip(sides, (0.8, 0.1, 0.1), strict=True):
        assert abs(len(side) / len(keys) - share) < 0.01
        for label, n in Counter(labels[i] for i in side).items():
            assert abs(n / len(side) - whole[label] / len(keys)) < 0.02, (label, n)
        assert set(labels[i] for i in side) == set(whole)
    places = [{keys[i] for i in side} for side in sides]
    assert not (places[0] & places[1] or places[0] & places[2] or places[1] & places[2])


def test_rows_of_a_side_are_not_in_the_order_of_the_file():
    """Training that sees all rows of one batch, then all of the next."""
    first = deal([str(n) for n in range(500)], ["x"] * 500, 0, 1000)[0]
    assert first != sorted(first) and sum(a < b for a, b in zip(first, first[1:], strict=False)) < 250


def test_linked_rows_are_one_group_through_others():
    """A is alike to B and B to C: all three on one side, whatever their groups are called."""
    ids, keys = list("abcdef"), ["a", "b", "c", "g", "g", "f"]
    assert join(ids, keys, [("b", "a"), ("b", "c"), ("e", "f"), ("a", "nobody")]) == ["a", "a", "a", "f", "f", "f"]
    assert join(ids, keys, []) == keys


def test_no_group_and_no_contrast_stands_on_two_sides(tmp_path):
    """Two rows of one customer, or a row and its marked contrast, one in train and one in test."""
    rows = [row(n, group=f"g{n // 3}" if n < 60 else "") for n in range(120)]
    rows += [
        row(200 + n, "billing", kind="near_miss", provenance={"contrast_of": rows[n].id}) for n in range(0, 120, 2)
    ]
    path, settings = tmp_path / "data/accepted/all.jsonl", settings_in(tmp_path)
    write_rows(path, rows)
    found = split_file(settings, path)
    sides = {r.id: name for name in NAMES for r in read_rows(path.with_name(f"{name}.jsonl"))}
    assert len(sides) == len(rows) == sum(found["rows"].values()) and min(found["rows"].values()) > 10
    for one in rows:
        twins = [r.id for r in rows if one.meta.group and r.meta.group == one.meta.group]
        twins += [one.meta.provenance.get("contrast_of", one.id)]
        assert {sides[twin] for twin in twins} == {sides[one.id]}
    lines = sorted(line for name in NAMES for line in path.with_name(f"{name}.jsonl").read_text().splitlines())
    assert lines == sorted(path.read_text().splitlines()), "lines stand as they stood"


def test_clusters_stay_whole_when_asked_for(tmp_path, monkeypatch):
    """Paraphrases of one situation in train and in test. A group goes with its first row, so that clusters do not chain."""
    path, settings = tmp_path / "all.jsonl", settings_in(tmp_path, split_by="cluster")
    rows = [row(n, group=f"g{n // 2}") for n in range(80)]
    write_rows(path, rows)
    fake = SimpleNamespace(cluster_ids=lambda texts, settings: [(n + 1) // 8 for n in range(len(texts))])
    monkeypatch.setitem(sys.modules, "slm.curate.clusters", fake)
    found = split_file(settings, path)
    sides = {r.id: name for name in NAMES for r in read_rows(path.with_name(f"{name}.jsonl"))}
    assert found["rule"].startswith("whole clusters") and len(set(sides.values())) == 3
    for n in range(80):
        assert sides[rows[n].id] == sides[rows[n - n % 2].id]
        assert sides[rows[n].id] == sides[rows[8 * ((n - n % 2 + 1) // 8)].id]


def test_split_refuses_two_rows_of_one_id_and_a_broken_line(tmp_path):
    """A row that stands on two sides because its id is taken twice; a traceback for a bad line."""
    path, settings = tmp_path / "all.jsonl", settings_in(tmp_path)
    write_rows(path, [row(n) for n in range(9)] + [row(0)])
    with pytest.raises(SlmError, match="ids must be unique"):
        split_file(settings, path)
    path.write_text(path.read_text() + '{"id": 3}\n')
    with pytest.raises(SlmError, match=r"all.jsonl:11: "):
        split_file(settings, path)


def test_the_table_of_the_split_shows_a_label_that_strays(project):
    """A label that is missing on one side, behind totals that look right."""
    table = split_table(run_04(project).record)
    assert table[list(NAMES)].to_numpy().sum() == 70 and list(table.index) == ["billing", "bug", "other"]
    record = {
        "split": {"labels": {"train": {"a": 80, "b": 20}, "dev_internal": {"a": 10}, "test_internal": {"a": 8, "b": 2}}}
    }
    assert split_table(record)["strays by (points)"].tolist() == [18.3, 18.3]


# Versions


def test_a_version_names_all_it_was_made_from(project):
    """A number in a report whose data nobody can make again."""
    record = run_04(project).record
    path = project.path("data/accepted/all.jsonl")
    assert record["version"] == registry.file_hash(path)[:12] and record["previous"] is None
    assert record["teachers"] == {"big-model": 60} and record["prompts"] == {"v1": 60}
    assert record["config"]["curate"] == project.curate.model_dump() and record["split"]["seed"] == 0
    assert set(record["inputs"]) == {"data/raw/seed.jsonl", "data/generated/batch_001.jsonl"} | {
        f"data/eval/{name}.jsonl" for name in registry.SETS}  # fmt: skip
    assert list(record["parents"]) == ["data/raw/seed.jsonl", "data/generated/batch_001.jsonl"]
    assert [g["gate"] for g in record["gates"]] and len(registry.read(project, "datasets")) == 1


def test_rows_of_a_version_are_kept_once_and_stay(project):
    """A version whose rows are gone with the next run, or that is stored again by each run."""
    first = run_04(project).record["version"]
    kept = project.path(f"registry/datasets/{first}.jsonl.gz")
    before = kept.stat().st_mtime_ns
    run_04(project)
    assert kept.stat().st_mtime_ns == before
    write_rows(project.path("data/generated/batch_002.jsonl"), [row(n) for n in range(300, 310)])
    second = run_04(project).record
    assert second["previous"] == first and kept.is_file() and len(list(kept.parent.iterdir())) == 2


def test_diff_tells_added_removed_and_changed_rows(project):
    """A relabelled row that shows as one added and one removed, or not at all; a shift in the labels that nobody sees."""
    first = run_04(project).record["version"]
    path = project.path("data/generated/batch_001.jsonl")
    rows = read_rows(path)
    changed = row(4, "other", id="relabelled", group="g2")
    write_rows(path, [*rows[:4], changed, *rows[5:-3], *[row(400 + n, "other") for n in range(5)]])
    second = run_04(project).record["version"]
    found = diff(project, first, second[:5])
    assert sorted(found.removed) == sorted(r.id for r in rows[-3:]) and len(found.added) == 5
    assert found.changed.to_numpy().tolist() == [["relabelled", '{"label":"billing"}', '{"label":"other"}']]
    assert found.summary == "5 rows added, 3 removed, 1 answered differently"
    table = found.table
    assert table.loc[("category", "other"), "change"] == 5 and table.loc[("kind", "canonical"), "shift (points)"] == 0
    assert table.loc["category"]["change"].sum() == 2 and abs(table.loc["category"]["shift (points)"].sum()) < 0.2
    nothing = diff(project, None, second)
    assert len(nothing.added) == 72 and not nothing.removed and nothing.changed.empty


def test_unknown_and_ambiguous_versions_are_named(project):
    """A diff against the wrong version because its name was short."""
    with pytest.raises(SlmError, match="none yet; run 04_curate"):
        find(project, "abc")
    for version in ("ab12", "ab34"):
        registry.append(project, "datasets", {"version": version})
    for wrong in ("ab", "x", ""):
        with pytest.raises(SlmError, match="ab12, ab34"):
            find(project, wrong)
    with pytest.raises(SlmError, match=r"ab12.jsonl.gz: not in registry/datasets.*reproduce"):
        diff(project, None, "ab1")


def again(folder, config):
    """What notebook 04 does, with the record's settings, in the folder of the inputs."""
    run_04(load_settings(overrides=config, start=Path(settings_in(folder).root)))


def test_a_version_is_made_again_after_settings_and_batches_moved_on(project):
    """A version that only the settings of today can make, or that a later batch changes."""
    first = run_04(load_settings(overrides={"curate": {"min_words": 3, "seed": 5}}, start=project.root)).record
    kept = project.path(f"registry/datasets/{first['version']}.jsonl.gz")
    text = kept.read_bytes()
    kept.unlink()
    write_rows(project.path("data/generated/batch_002.jsonl"), [row(n) for n in range(300, 310)])
    with project.path("data/generated/batch_001.jsonl").open("a") as stream:
        stream.write(row(500).model_dump_json(exclude_none=True) + "\n")
    other = run_04(project).record
    shutil.rmtree(project.path(".cache"))  # a fresh clone has none
    accepted = project.path("data/accepted/all.jsonl").read_bytes()
    assert other["version"] != first["version"]
    assert reproduce(project, first["version"], again)["config"]["curate"]["seed"] == 5
    assert kept.read_bytes()[10:] == text[10:], "the rows are back"  # the header of gzip names the temporary file
    assert project.path("data/accepted/all.jsonl").read_bytes() == accepted, "the project's own rows are not touched"
    assert not list(project.path(".cache").glob("reproduce-*"))


@pytest.mark.parametrize("name", ["data/generated/batch_001.jsonl", "data/eval/golden.jsonl", "task/checks.py"])
def test_a_changed_input_is_named(project, name):
    """The hash differs, and a search through forty files."""
    file = project.path(name)
    if not file.exists():
        file.parent.mkdir()
        file.write_text("CHECKS = []\n")
    version = run_04(project).record["version"]
    file.write_text(file.read_text().replace("[", "[ ", 1))
    with pytest.raises(SlmError, match=rf"^{re.escape(name)}: not what version"):
        reproduce(project, version, again)
    file.unlink()
    with pytest.raises(SlmError, match=rf"^{re.escape(name)}: not what version"):
        reproduce(project, version, again)


def test_rows_that_come_out_otherwise_are_no_reproduction(project):
    """A reproduction that compares nothing."""
    version = run_04(project).record["version"]

    def other(folder, config):
        run_04(
            load_settings(overrides={**config, "curate": {"include_seed_rows": False}}, start=settings_in(folder).root)
        )

    with pytest.raises(SlmError, match="the same inputs and settings now give"):
        reproduce(project, version, other)


def _curate_in(folder: str, seed: int) -> None:
    settings = load_settings(overrides={"curate": {"seed": seed, "min_words": seed}}, start=Path(folder))
    for _ in range(2):
        run_04(settings)


def test_two_runs_at_once_leave_whole_records(project):
    """Two runs that write data/accepted at once: a record that names the rows of one and the split of the other."""
    workers = [
        multiprocessing.get_context("fork").Process(target=_curate_in, args=(str(project.root), s)) for s in (1, 2)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(300)
    assert [worker.exitcode for worker in workers] == [0, 0]
    records = registry.read(project, "datasets")
    assert {r["split"]["seed"] for r in records} == {1, 2}
    for record in records:
        assert sum(record["split"]["rows"].values()) == record["rows"] == 70
    last = records[-1]
    for name, digest in last["split"]["files"].items():
        assert registry.file_hash(project.path(f"data/accepted/{name}.jsonl"))[:16] == digest
    assert not [f for f in project.path("data/accepted").iterdir() if f.name.startswith(".")]


def test_split_script_records_a_split_of_the_users_rows(project):
    """The script's split that no record knows: training then says that its rows are no dataset version."""
    run_04(project)
    path = project.path("data/accepted/all.jsonl")
    write_rows(path, read_rows(path)[:-5])
    script = [sys.executable, ROOT / "scripts/split_data.py", "data/accepted/all.jsonl"]
    done = subprocess.run(script, cwd=project.root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    record = registry.latest(project, "datasets")
    assert f"dataset version {record['version']}" in done.stdout
    assert record["rows"] == 65 and record["parents"] and len(registry.read(project, "datasets")) == 2


@pytest.mark.parametrize(("n", "words"), [
    (10, "less than a seed set. Next: 40 more for the seed set"), (120, "seed set (50-200).*380 more for the first training run"),
    (500, "first training run (500-2,000).*once these rows move"), (2000, "serious v1"), (250_000, "production v1.*balance.$"),
])  # fmt: skip
def test_volume_stage_says_what_comes_next(n, words):
    """A hundred thousand rows bought before five hundred have shown anything."""
    pattern = re.escape(words).replace(r"\.\*", ".*").replace(r"\$", "$")
    assert re.search(pattern, volume_stage(n)), volume_stage(n)


def test_thousands_of_planned_rows_warn_until_a_run_exists(project):
    """The warning that comes too late, or that stays for ever."""
    assert volume_warning(project, 1999) == "" and "10,000 rows are planned" in volume_warning(project, 10_000)
    registry.append(project, "runs", {"run_id": "first"})
    assert volume_warning(project, 10_000) == ""


# Coverage and plots


def test_coverage_names_what_is_short():
    """A set of one category and easy rows only that looks fine in total."""
    rows = [row(n, difficulty="easy", language="en") for n in range(10)]
    table = coverage(tally(iter(rows)), CONTRACT, {"en": 0.6, "de": 0.4}).set_index(["dimension", "value"])
    assert (
        table.loc[("category", "billing"), "verdict"] == "short" and table.loc[("category", "bug"), "verdict"] == "ok"
    )
    assert table.loc[("difficulty", "easy"), "verdict"] == "too many easy"
    assert table.loc[("language", "de"), "verdict"] == "short" and table.loc[("language", "en"), "verdict"] == "ok"
    assert table.loc[("edge case", "yes"), "verdict"] == "short" and table.loc[("source", "teacher"), "verdict"] == ""
    assert list(table.loc["domain"].index) == ["not recorded"], "a domain is read, never guessed"
    named = coverage(tally([row(1, provenance={"domain": "retail"})]), CONTRACT).set_index(["dimension", "value"])
    assert named.loc[("domain", "retail"), "rows"] == 1 and named.loc[("language", "en"), "verdict"] == ""


def test_cells_count_category_by_kind_against_the_plan():
    """An empty cell that is hidden by full margins."""
    rows = [
        row(n, label, kind=kind) for n, (label, kind) in enumerate((c, k) for c in ("bug", "other") for k in KINDS * 3)
    ]
    have, wanted = cells(iter(rows), CONTRACT)
    assert have.loc["billing"].sum() == 0 and have.loc["bug", "style"] == 3 and have.to_numpy().sum() == 48
    assert wanted.to_numpy().sum() == pytest.approx(48) and wanted.loc["bug", "canonical"] == pytest.approx(4)


def test_contradictions_are_shown_side_by_side_and_once():
    """A reason that names an id, and nobody looks the other row up."""
    a, b, c, kept = row(1), row(2, "other"), row(3, "billing"), row(4)

    def refused(one, twin):
        evidence = {"twin": twin.id, "measure": "jaccard", "similarity": 0.9, "field": "label"}
        return {
            "gate": "label_consistency",
            "reason": "",
            "evidence": evidence,
            "row": one.model_dump(exclude_none=True),
        }

    other = {"gate": "trivial", "reason": "", "evidence": {}, "raw": "{"}
    table = contradictions([refused(a, b), refused(b, a), refused(c, kept), other], [kept])
    assert len(table) == 2 and table["field"].tolist() == ["label"] * 2
    assert {table.loc[0, "message"], table.loc[0, "like message"]} == {a.user, b.user}
    assert table.loc[1, ["message", "its answer"]].tolist() == [c.user, kept.answer]
    assert contradictions([other], []).empty


def test_plots_are_written_also_for_empty_and_wide_sets(tmp_path):
    """A plot that fails on the first small run, or on a contract with 150 labels."""
    import numpy as np
    import pandas as pd

    steps = [{"gate": "length", "in": 1_000_000, "rejected": 250_000, "out": 750_000}]
    wide = pd.DataFrame(np.arange(1200).reshape(150, 8), [f"label_{n}" for n in range(150)], KINDS)
    done = [
        plot_funnel(steps, tmp_path / "plots/funnel.png"), plot_funnel([], tmp_path / "plots/none.png"),
        heat_map(wide, wide * 0 + 600, tmp_path / "plots/wide.png"), heat_map(*cells([], CONTRACT), tmp_path / "plots/bare.png"),
        histogram({"rows": np.array([3, 4, 5])}, {"limit": 512}, "tokens", tmp_path / "plots/lengths.png"),
        histogram({"exact": [], "cosine": []}, {"semantic": 0.85}, "similarity", tmp_path / "plots/bare_lengths.png"),
    ]  # fmt: skip
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in done)


# What the specs say


def test_quality_gates_document_names_every_gate_of_the_code(project):
    """A gate that refuses rows and that no document explains, or a document for a gate that is gone."""
    sources = "\n".join(path.read_text() for path in (ROOT / "slm/curate").glob("*.py"))
    code = {step["gate"] for step in run_04(project).record["gates"]}
    code |= set(re.findall(r"Verdict\(\s*\"(\w+)\"", sources))
    told = re.findall(r"^\| (?:\d+ \| )?`(\w+)` \|", (ROOT / "specs/quality_gates.md").read_text(), re.M)
    assert len(told) == len(set(told)) and len(set(told) & code) >= 13
    optional = {"regex", "personal_data_model", "expert_signoff", "judge", "human_review"}
    assert code <= set(told) and set(told) - code <= optional


def test_quality_gates_document_names_settings_that_exist():
    """A threshold under a name that project.yaml refuses."""
    from slm.settings import Settings

    text = (ROOT / "specs/quality_gates.md").read_text() + (ROOT / "specs/data_spec.md").read_text()
    named = set(re.findall(r"`((?:curate|train|generate)\.\w+)`", text))
    assert len(named) >= 8
    for name in named:
        section, field = name.split(".")
        assert field in Settings.model_fields[section].annotation.model_fields, name


def test_data_spec_names_every_field_and_format():
    """A field of the row that its specification does not know."""
    from slm.rows import Meta, Row

    text = (ROOT / "specs/data_spec.md").read_text()
    fields = {name for name in Row.model_fields if name != "meta"} | {f"meta.{name}" for name in Meta.model_fields}
    assert {name for name in fields if f"`{name}`" not in text} == set()
    assert all(f"`{name}`" in text for name in ("instruction", "messages", "prompt", "chosen", "rejected"))
    assert all(re.search(rf"^\| {kind} ", text, re.M) for kind in KINDS)
