"""Deletion: the rows of one person, or one row, out of every file of the project; a tombstone without content stays.

What a model has learnt cannot be cut out of it: every model trained on such a row is named and refused for release."""

import json
import re
import shutil
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import ExitStack, suppress

from filelock import FileLock, Timeout

from slm import registry
from slm.errors import SlmError
from slm.production.erase import YOURS, Content, clean, content, dicts, files, ids, records, texts, unescaped
from slm.production.scrub import spans
from slm.rows import digest, plain, write_json, write_text

PENDING = ".cache/forget.json"  # the plan while it is carried out: a deletion that was cut off goes on from it
TOMBSTONES = "forgotten"
WAIT = 5  # seconds for a reviewer's decision or a line of 04; a run takes longer
# Kept under hashes of whole prompts and versions, so nothing tells whom they concern: they go whole, and fill again.
CACHES = (".cache/answers.sqlite*", ".cache/datasets")
_TOKEN = re.compile(r"\w+(?:[-/]\w+)*")
# A date or time, a count, a placeholder of the scrub.
_COMMON = re.compile(r"\d{1,4}(?:[-/.:]\d{1,4}){1,2}(?:T.*)?|\d{1,6}|\d+000|[A-Z_]+_\d+")


class Plan(Content):
    """What goes, and what was made of it: the dataset versions, the runs trained on them, their model files. `derived`
    are rows that a teacher wrote from one that goes, with their versions and runs: told, kept, and no ground to refuse
    a release, since they hold nothing of it that can be found."""

    locks: dict[str, str] = {}
    files: dict[str, int] = {}
    datasets: list[str] = []
    runs: list[str] = []
    models: list[str] = []
    derived: list[str] = []
    derived_datasets: list[str] = []
    derived_runs: list[str] = []


def plan(settings, subject: str = "", row_id: str = "") -> Plan:
    """What belongs to a subject (the `group` of a log, or what names a person: an address, a whole name) or to a row
    id; of a deletion that was cut off, its own plan. Nothing is changed. Raises SlmError, which never repeats the
    subject, when there is nothing."""
    subject, row_id = subject.strip(), row_id.strip()
    if (file := settings.path(PENDING)).is_file():
        found = Plan.model_validate_json(file.read_bytes())
        if subject and subject != found.subject or row_id and row_id not in found.ids:
            mend = "wait, or finish it with `python -m slm forget` alone (give it up: delete .cache/forget.json)"
            raise SlmError(f"forget: another deletion is at work or was cut off; {mend}, then run this again.")
        return found
    if bool(subject) == bool(row_id) or subject and len(subject) < 3:
        raise SlmError("forget: give --row, or --subject with at least three characters.")
    groups = [subject, "production-" + digest(plain(subject))] if subject else []
    found = Plan(ids=[row_id] if row_id else [], groups=groups, subject=subject)
    own = (part for _, record in _rows(settings) if found.about(record) for part in dicts(record))
    said = sorted({text for part in own for text in texts(part)})
    if not said and not any(found.holds(content(path)) for _, path in files(settings, PENDING)):
        raise SlmError("forget: no row, log line or file holds that; nothing was changed. Ids stand in data/ and logs.")
    locks = registry.check_locked(settings) if settings.path("data/eval/lock.json").is_file() else {}
    found = Plan(ids=found.ids, groups=groups, subject=subject, texts=said, locks=locks)
    known, values = {*found.ids}, set()
    for name, record in _rows(settings):  # now the same message under another id, too
        if found.about(record):
            known |= ids(record)
            values = values.union(*map(telling, dicts(record)))
            found.files[name] = found.files.get(name, 0) + 1
    found.ids, found.values = sorted(known), sorted(values)
    return _related(settings, found)


def telling(record: dict) -> set[str]:
    """What can identify in a row or log line: of the message, what the scrub's patterns find and tokens with a digit; of
    the answers, values in quotes that stand in the message, if they have a digit or two words. They have five letters
    and digits at least and are no date, time, round number or number under seven digits, for counts look like that; nor
    one word without a digit: a label, a city, a surname alone mean other things elsewhere. `plan` leaves out
    what other rows, or the user's own files, hold as well."""
    said, answers = "\n".join(texts(record)), texts(record, "assistant", ("output", "correction"))
    found = {value for text in answers for value in re.findall(r'"([^"\\]+)"', unescaped(text)) if _bare(value) in _bare(said)}
    found = {value for value in {*found, *_TOKEN.findall(said)} if re.search(r"\d", value) or not _TOKEN.fullmatch(value)}
    found |= {said[begin:end] for begin, end, _ in spans(said)}
    return {value for value in found if len(_bare(value)) > 4 and not _COMMON.fullmatch(value)}


def _related(settings, found: Plan) -> Plan:
    """The plan with what was made of its rows. Rows that a teacher wrote from them and that quote them go too; values
    that another row, or a file of the user's own, holds as well tell nobody apart and stay."""
    found.requests = [*_asked(settings, found.ids)]
    mine = Content(**found.model_dump(include={"ids", "groups", "subject", "texts"}))
    quoting, derived, places, common = Counter(), set(), set(), set()
    for name, record in _rows(settings):
        if mine.about(record):
            continue
        text, written = json.dumps(record, ensure_ascii=False), found.written_from(record)
        if written and found.holds(text, runs=True):
            quoting[name] += 1
            mine.ids += ids(record)
        elif written:
            derived |= ids(record)
            places.add(name)
        else:
            common |= found.held(text)
    for name, path in files(settings, PENDING):
        if name.startswith(YOURS) and not name.startswith("specs/"):
            common |= found.held(mine.redact(content(path)))
    new = {"ids": sorted({*mine.ids}), "values": sorted({*found.values} - common), "derived": sorted(derived - {*mine.ids})}
    found = Plan(**found.model_dump() | new | {"files": Counter(found.files) + quoting})
    found.datasets, found.runs = _trained(settings, found.files)
    found.derived_datasets, also = _trained(settings, places)
    found.derived_runs = sorted({*also} - {*found.runs})
    models = [settings.path(f"outputs/{kind}/{run}") for run in found.runs for kind in ("adapters", "merged", "gguf")]
    every = (file for place in models if place.exists() for file in sorted(place.glob("*.gguf")) or [place])
    found.models = [file.relative_to(settings.root).as_posix() for file in every]
    return found


def forget(settings, found: Plan) -> dict:
    """Carry a plan out: rows leave every file and cache, reports lose what they quote, changed evaluation sets are
    locked anew, every file is searched, and the tombstone is written; returns it. Raises SlmError while a run or another
    deletion is at work, and one that names the files in which something is left: the plan is kept until nothing is."""
    locks = [registry.locked(settings, name, WAIT) for name in ("forget", "teacher", "decisions", "accepted")]
    locks += [FileLock(file, timeout=0) for file in settings.path("outputs/runs").glob("*/.lock")]
    with ExitStack() as stack:
        try:
            for lock in locks:
                stack.enter_context(lock)
        except Timeout:
            busy = "a run, 03, 04 or another deletion is at work here; wait for it, or stop it, then run this again"
            raise SlmError(f"forget: {busy}. Nothing was changed.") from None
        write_text(settings.path(PENDING), found.model_dump_json())
        for cache in (path for pattern in CACHES for path in settings.root.glob(pattern)):
            shutil.rmtree(cache) if cache.is_dir() else cache.unlink()
        changed = [name for name, path in files(settings, PENDING) if clean(path, name, found)]
        now = {name: registry.file_hash(settings.path(f"data/eval/{name}.jsonl")) for name in found.locks}
        if now != found.locks:
            write_json(settings.path("data/eval/lock.json"), now)
        if left := [name for name, path in files(settings, PENDING) if found.holds(content(path))]:
            raise SlmError(f"forget: still in {', '.join(left)}; remove it there by hand, then run forget again.")
        made = {"datasets", "runs", "models", "derived", "derived_datasets", "derived_runs"}
        record = {
            "rows": found.ids, "groups": [digest(group) for group in found.groups],
            "files": sorted({*changed, *found.files}), **found.model_dump(include=made),
            "relocked": {name: [old, now[name]] for name, old in found.locks.items() if now[name] != old},
        }  # fmt: skip
        record = registry.append(settings, TOMBSTONES, record)
        settings.path(PENDING).unlink()
    return record


def told(found: Plan) -> str:
    """A plan in words for the terminal, without any of the content."""
    where = ", ".join(f"{n} in {name}" for name, n in found.files.items()) or "quoted only"
    lines = [f"{sum(found.files.values())} rows and lines: {where}"]
    lines += [f"{len(found.values)} numbers, addresses and names that stand in these alone: out of every file"] if found.values else []
    lines += [f"dataset version {version} holds some" for version in found.datasets]
    lines += [f"run {run} was trained on them: train it again, it is not released any more" for run in found.runs]
    lines += [f"{model}: delete it, and every copy that was handed out" for model in found.models]
    if found.derived:
        some = ", ".join(found.derived[:5]) + (", …" if len(found.derived) > 5 else "")
        lines.append(f"{len(found.derived)} rows written from them ({some}): they quote nothing and stay; read them")
    lines += [f"dataset version {version} holds rows written from them" for version in found.derived_datasets]
    lines += [f"run {run} was trained on rows written from them: still released" for run in found.derived_runs]
    lines.append("Not reached from here: git's history, hubs, trackers, backups, zip and Parquet files, other logs.")
    return "\n".join(lines)


def refuse(settings, run_id: str) -> None:
    """Raises SlmError for a run that was trained on a row before it was forgotten, and while a deletion is cut off."""
    if settings.path(PENDING).is_file():
        raise SlmError("a deletion was cut off half way; run `python -m slm forget` once more, it goes on by itself.")
    trained = registry.latest(settings, "runs", stage="train", status="completed", run_id=run_id) or {"at": ""}
    for tomb in registry.read(settings, TOMBSTONES):
        if run_id in tomb["runs"] and trained["at"] <= tomb["at"]:
            what = f"it was trained on rows that were forgotten on {tomb['at'][:10]}"
            raise SlmError(f"run {run_id}: {what}; delete its model, then run 04, 05, 06 and 08 again.")


def _rows(settings) -> Iterator[tuple[str, dict]]:
    """File names and the records in which a person wrote something."""
    found = ((name, record) for name, path in files(settings, PENDING) for record in records(path))
    return ((name, record) for name, record in found if any(map(texts, dicts(record))))


def _asked(settings, failed: Collection[str]) -> Iterator[str]:
    """The ids of what repair plans asked a teacher for because of these rows."""
    from slm.repair.plan import Plan, request

    for path in settings.path("outputs/runs").glob("*/*_plan.json"):
        with suppress(ValueError):  # a plan of another version
            for item in Plan.model_validate_json(path.read_bytes()).items:
                if any(finding.row_id in failed for finding in item.findings):
                    yield from (request(item, cell).id for cell in item.cells)


def _trained(settings, names: Collection[str]) -> tuple[list[str], list[str]]:
    """The dataset versions with rows of these files, and the runs trained on them."""
    versions = []
    for record in registry.read(settings, "datasets"):
        archive = f"registry/datasets/{record['version']}.jsonl.gz"
        if archive in names or not settings.path(archive).is_file() and {*record["parents"]} & {*names}:
            versions.append(record["version"])
    fed = {None} if any(not name.startswith("data/eval/") for name in names) else set()  # a run without a version
    done = {"stage": "train", "status": "completed"}.items()
    runs = (r for r in registry.read(settings, "runs") if done <= r.items())
    return versions, sorted({r["run_id"] for r in runs if r["parents"]["dataset"] in {*versions, *fed}})


def _bare(text: str) -> str:
    return "".join(re.findall(r"[^\W_]+", text.lower()))
