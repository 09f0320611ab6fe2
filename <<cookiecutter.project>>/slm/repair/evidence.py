"""What training already holds of a failure: rows like it, rows that teach the opposite, and so the root cause."""

from collections.abc import Callable, Sequence
from itertools import islice

from slm.contract import Contract
from slm.curate.text import text_of
from slm.repair.causes import CAUSES, Finding
from slm.repair.clusters import Cluster, Pattern, clusters, vectors
from slm.repair.judge import judged
from slm.rows import iter_rows

MOST = 50_000  # training rows that are compared
NEAREST = 3
ALIKE = {False: 0.35, True: 0.7}  # cosine from which two messages count as alike: TF-IDF, embedder
TAUGHT = 20  # training rows of what failed, below which the data is to blame and from which the model is


def examine(
    settings, contract: Contract, findings: Sequence[Finding], pairs: Sequence[tuple], patterns: Sequence[Pattern] = (),
    prompt: Callable | None = None,
) -> list[Cluster]:  # fmt: skip
    """The clusters of a run's failures with what training holds of them; as `repair.judge` sees them where one is set,
    which is asked with `prompt(contract, failures)`. A judge that fails changes nothing and is said."""
    found = against_training(settings, contract, clusters(findings, pairs, patterns, settings.curate.embedder), pairs)
    return judged(settings, contract, found, pairs, prompt) if settings.repair.judge.url and prompt else found


def against_training(settings, contract: Contract, found: Sequence[Cluster], pairs: Sequence[tuple]) -> list[Cluster]:
    """The clusters with their likest training rows and their root cause: rows that teach otherwise (alike, with the
    model's wrong value, which it did not copy from the message); else too few rows of the same value and kind; else
    enough of them, and the model has not learnt it."""
    path, embedder = settings.path("data/accepted/train.jsonl"), settings.curate.embedder
    train = list(islice(iter_rows(path), MOST)) if path.is_file() else []
    if not train:
        return list(found)
    by_id, result = {row.id: (row, score) for row, score in pairs}, []
    values = [contract.flatten(contract.parse(row.answer).value) for row in train]
    for cluster in found:
        made = vectors([text_of(r) for r in [*(by_id[f.row_id][0] for f in cluster.findings), *train]], embedder)
        n, twins, against, taught = len(cluster.findings), {}, [], []
        cosines = made[:n] @ made[n:].T
        for f, near in zip(cluster.findings, cosines if embedder else cosines.toarray(), strict=True):
            row, score = by_id[f.row_id]
            want, given = (contract.flatten(v).get(f.field) for v in (score.expected, score.parsed))
            free = isinstance(want, str) and want.lower() in row.user.lower()  # copied: any value teaches it
            taught.append(sum(r.meta.kind == f.kind and (v.get(f.field) == want or free and v.get(f.field) is not None)
                              for r, v in zip(train, values, strict=True)))  # fmt: skip
            for k in near.argsort(kind="stable")[::-1][:NEAREST].tolist():
                other, cosine, same = train[k], round(float(near[k]), 2), values[k].get(f.field) == given != want
                twins[other.id] = max(cosine, twins.get(other.id, 0.0))
                same &= bool(f.field and score.parsed) and str(given).lower() not in row.user.lower()
                if same and cosine >= ALIKE[bool(embedder)]:
                    about = {"row": f.row_id, "train": other.id, "cosine": cosine}
                    against.append(about | {"field": f.field, "taught": str(given)})
        blame, why, least = cluster.blame, cluster.root_cause, sorted(taught)[n // 2]
        if 3 * len({a["row"] for a in against}) >= n:
            named = ", ".join(sorted({a["train"] for a in against})[:3])
            blame, why = "data", f"like rows of training teach the opposite ({named}); look at them first"
        elif blame == "data" and (field := cluster.findings[0].field) and not why:
            blame, told = ("data", f"too few, {TAUGHT} are wanted") if least < TAUGHT else ("model", "enough, so it is not learnt")
            why = f"training rows of this kind that teach the right {field}: {least}, {told}"
        likest = sorted(twins, key=lambda i: -twins[i])[:NEAREST]
        about = {"twins": [f"{i} ({twins[i]})" for i in likest], "contradictions": against, "blame": blame}
        result.append(cluster.model_copy(update=about | {"root_cause": why or CAUSES[cluster.cause]["mend"]}))
    return result
