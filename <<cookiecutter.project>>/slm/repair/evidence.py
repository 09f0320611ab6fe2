"""What training already holds of a failure: the rows like it, rows that teach the opposite, and the root cause that follows."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice

from slm.contract import Contract
from slm.curate.text import text_of
from slm.repair.causes import CAUSES, Finding
from slm.repair.clusters import Cluster, Contradiction, Pattern, clusters, vectors
from slm.rows import Row, iter_rows

MOST = 50_000  # training rows that are compared
NEAREST = 3
ALIKE = {False: 0.35, True: 0.7}  # cosine from which two messages count as alike: TF-IDF, embedder
TAUGHT = 20  # training rows of what failed, below which the data is to blame and from which the model is


def examine(
    settings, contract: Contract, findings: Sequence[Finding], pairs: Sequence[tuple], patterns: Sequence[Pattern] = (),
    prompt: Callable | None = None,
) -> list[Cluster]:  # fmt: skip
    """The clusters of a run's failures with what training holds of them; named anew by `repair.judge` where one is set,
    which is asked with `prompt(contract, failures)`. A judge that fails changes nothing and is said."""
    found = against_training(settings, contract, clusters(findings, pairs, patterns, settings.curate.embedder), pairs)
    if settings.repair.judge.url and prompt:
        from slm.repair.judge import renamed

        found = renamed(settings, contract, found, pairs, prompt)
    return found


def against_training(settings, contract: Contract, found: Sequence[Cluster], pairs: Sequence[tuple]) -> list[Cluster]:
    """The clusters with their likest training rows, contradictions and, where the data is suspected, the root cause: rows
    that teach otherwise, too few rows that teach it, or enough of them, and then the model has not learnt it."""
    path, embedder = settings.path("data/accepted/train.jsonl"), settings.curate.embedder
    train = list(islice(iter_rows(path), MOST)) if path.is_file() else []
    by_id, result = {row.id: (row, score) for row, score in pairs}, []
    if not train or not found:
        return list(found)
    order = [f.row_id for c in found for f in c.findings]
    made = vectors([text_of(r) for r in [*(by_id[i][0] for i in order), *train]], embedder)
    cosines = made[: len(order)] @ made[len(order) :].T
    cosines = cosines if embedder else cosines.toarray()
    near = {i: [(float(c[n]), train[n]) for n in c.argsort(kind="stable")[::-1][:NEAREST]] for i, c in zip(order, cosines, strict=True)}
    values = [contract.flatten(contract.parse(row.answer).value) for row in train]
    for cluster in found:
        against, taught = [], []
        for f in cluster.findings:
            _, score = by_id[f.row_id]
            want, given = contract.flatten(score.expected), contract.flatten(score.parsed)
            open_ = _open(contract, f.field) and want.get(f.field) is not None
            taught.append(sum(f.field in v and (v[f.field] is not None if open_ else v[f.field] == want.get(f.field)) for v in values))
            against += [hit for c, row in near[f.row_id] if (hit := _against(contract, f, row, c, given, want, bool(embedder)))]
        twins = sorted({(round(c, 2), row.id) for f in cluster.findings for c, row in near[f.row_id]}, reverse=True)
        cause, blame, n = cluster.root_cause, cluster.blame, len(cluster.findings)
        if against:
            cause, blame = f"{len(against)} training rows like these teach what the model said; settle them in 04 first", "data"
        elif blame == "data" and any(f.field for f in cluster.findings):
            few, least = sum(t < TAUGHT for t in taught), sorted(taught)[n // 2]
            blame = "data" if few * 2 >= n else "model"
            cause = f"in the median {least} training rows teach it" + (": too few" if blame == "data" else ", and it is not learnt")
        cause = cause or CAUSES[cluster.cause][1]
        told = tuple(f"{row_id} ({c})" for c, row_id in twins[:NEAREST])
        result.append(replace(cluster, twins=told, contradictions=tuple(against), root_cause=cause, blame=blame))
    return result


def _against(contract, f: Finding, row: Row, cosine: float, given: dict, want: dict, embedded: bool) -> Contradiction | None:
    """The training row as a contradiction of a failed one: alike, and with the wrong value in the field that failed. What
    it copied from its own message contradicts nothing."""
    taught, wrong = contract.flatten(contract.parse(row.answer).value).get(f.field), given.get(f.field)
    copied = isinstance(taught, str) and _open(contract, f.field) and taught.lower() in row.user.lower()
    if not f.field or cosine < ALIKE[embedded] or copied or not given or taught != wrong or taught == want.get(f.field):
        return None
    return Contradiction(row_id=f.row_id, train_id=row.id, cosine=round(cosine, 2), field=f.field, taught=str(taught))


def _open(contract: Contract, field: str) -> bool:
    """Whether a field takes any text or number, so that rows need not share its value."""
    nodes = contract.nodes(contract.properties().get(field, {}))
    return not any("enum" in n or "const" in n or n.get("type") == "boolean" for n in nodes) and field != contract.label_field
