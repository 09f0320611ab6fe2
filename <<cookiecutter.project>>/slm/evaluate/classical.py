"""A classical model: word and character n-grams into one logistic regression per closed field."""

import json
from collections.abc import Callable, Sequence

from slm.contract import Contract
from slm.errors import SlmError
from slm.models.program import ProgramModel
from slm.rows import Row, digest
from slm.settings import nest

ABSENT = "(absent)"  # no JSON text


def closed_fields(schema: dict) -> list[str]:
    """Dotted names of the fields whose values can be counted: enumerations, constants, yes or no, null."""
    definitions, closed, free = schema.get("$defs", {}), set(), set()

    def walk(node: dict, name: str) -> None:
        node = definitions[node["$ref"].rsplit("/", 1)[1]] if "$ref" in node else node
        options = node.get("anyOf", node.get("oneOf", ()))
        for option in options:
            walk(option, name)
        for key, part in node.get("properties", {}).items():
            walk(part, f"{name}.{key}" if name else key)
        if not options and "properties" not in node:
            counted = "enum" in node or "const" in node or node.get("type") in ("boolean", "null")
            (closed if counted else free).add(name)

    walk(schema, "")
    return sorted(closed - free)


def fit(rows: Sequence[Row], contract: Contract, usual: Callable[[Sequence[Row], Contract], dict]) -> ProgramModel:
    """The model fitted on `rows`. What is not closed takes its usual value under the label that was found:
    `usual(rows, contract)` gives the commonest valid output, which is also the answer where the parts do not go
    together. Raises SlmError when the output has no closed field."""
    from sklearn.dummy import DummyClassifier
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_union

    names = closed_fields(contract.schema)
    if not names:
        raise SlmError("the output has no label, choice or yes/no field to classify")
    values = [contract.flatten(contract.parse(row.answer).value) for row in rows]
    features = make_union(
        TfidfVectorizer(ngram_range=(1, 2), max_features=50_000, sublinear_tf=True),
        TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), max_features=100_000, sublinear_tf=True),
    )
    table, models = features.fit_transform([row.user for row in rows]), {}
    for name in names:
        seen = [json.dumps(value[name]) if name in value else ABSENT for value in values]
        varies = len(set(seen)) > 1
        models[name] = (LogisticRegression(C=10, max_iter=1000) if varies else DummyClassifier()).fit(table, seen)
    labels, whole = [value.get(contract.label_field) for value in values], usual(rows, contract)
    under = {
        label: usual([row for row, other in zip(rows, labels, strict=True) if other == label], contract)
        for label in set(labels)
    }

    def predict(text: str) -> str:
        line = features.transform([text])
        found = {name: str(model.predict(line)[0]) for name, model in models.items()}
        given = {name: json.loads(value) for name, value in found.items() if value != ABSENT}
        start = under.get(given.get(contract.label_field), whole)
        filled = {n: v for n, v in {**contract.flatten(start), **given}.items() if found.get(n) != ABSENT}
        answer = json.dumps(nest(filled), ensure_ascii=False)
        return answer if contract.parse(answer).error is None else json.dumps(start, ensure_ascii=False)

    mark = digest(json.dumps([[r.user, r.answer] for r in rows]), 16)
    return ProgramModel(f"TF-IDF and logistic regression on {len(rows)} rows", predict, f"classical 1 {mark}")
