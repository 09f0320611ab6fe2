"""The contract: what goes in, what must come out, and how it is judged. The user fills one in `task/contract.py`."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

from pydantic import BaseModel, ValidationError

from slm.errors import SlmError
from slm.rows import Row, digest, explain
from slm.settings import flatten

TASK_TYPES = (
    "classification", "extraction", "json_generation", "tool_calling", "rewriting", "qa", "review", "planning", "safety",
)  # fmt: skip
LABELLED = ("classification", "safety", "tool_calling")
FIELDS = {
    "tool_calling": ("arguments",), "rewriting": ("text",), "qa": ("answer", "citations"), "planning": ("steps.tool",),
}  # fmt: skip


@dataclass(frozen=True)
class Parsed:
    """What was read from an answer. `stage` is where it failed: "json", "schema" or None."""

    value: dict | None
    error: str | None = None
    stage: str | None = None


@dataclass(frozen=True)
class Contract:
    """The written agreement of one narrow task.

    `output` is a pydantic model; from it come the JSON schema, the parser and the canonical text.
    `label_field` is the field that names the category, `null_label` its value for "nothing to do here".
    `target` is the least value of `primary_metric` (0 to 1) that would be released. `issue_key` names the keys that
    identify an issue (review). `execute(value)` raises when a call or plan does not run (tool_calling, planning);
    `constraints(input text, value)` says which constraints the output keeps (rewriting). Every task type has its
    fields, see FIELDS; safety also needs `null_label`, the label of what is allowed.
    """

    name: str
    task_type: str
    output: type[BaseModel]
    system_prompt: str
    primary_metric: str
    target: float
    critical: tuple[str, ...] = ()
    label_field: str | None = None
    null_label: str | None = None
    unsafe_labels: tuple[str, ...] = ()
    brief: dict[str, str] = field(default_factory=dict)
    issue_key: tuple[str, ...] = ("rule",)
    execute: Callable[[dict], object] | None = None
    constraints: Callable[[str, dict], dict[str, bool]] | None = None

    def __post_init__(self):
        if self.task_type not in TASK_TYPES:
            raise SlmError(f"task/contract.py: task_type {self.task_type!r} is not one of {', '.join(TASK_TYPES)}.")
        if not self.system_prompt.strip():
            raise SlmError("task/contract.py: system_prompt is empty; write the one sentence that states the task.")
        here, own = f"task/contract.py: a {self.task_type} contract", self.properties()
        if self.task_type in LABELLED and not self.label_field:
            raise SlmError(f"{here} needs label_field, the name of the field that holds the label.")
        if self.task_type == "safety" and self.null_label is None:
            raise SlmError(f"{here} needs null_label, the label of what is allowed; every other one is a violation.")
        needed = [*FIELDS.get(self.task_type, ()), *([self.label_field] if self.label_field else [])]
        needed += [f"issues.{key}" for key in self.issue_key] if self.task_type == "review" else []
        for name in needed:
            there = own
            for key in name.split("."):
                if key not in there:
                    raise SlmError(f"{here} needs the output field `{name}`; there are: {', '.join(there) or 'none'}.")
                there = self.properties(there[key])

    @cached_property
    def schema(self) -> dict:
        """The JSON schema of the output."""
        return self.output.model_json_schema()

    @property
    def schema_hash(self) -> str:
        """12 hex digits that change when the schema or the system prompt does."""
        text = json.dumps(self.schema, sort_keys=True) + self.system_prompt
        return digest(text)

    def parse(self, text: str, lenient: bool = False) -> Parsed:
        """Read an answer. Strict: the whole text is the JSON value. Lenient: the first object found in it."""
        if lenient:
            text = first_object(text)
        try:
            data = json.loads(text, object_pairs_hook=_no_twice, parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            return Parsed(None, f"not JSON: {error}", "json")
        try:
            return Parsed(self.output.model_validate_json(json.dumps(data), strict=True).model_dump(exclude_unset=True))
        except ValidationError as error:
            return Parsed(data if isinstance(data, dict) else None, explain(error), "schema")

    def dump(self, value: dict) -> str:
        """The canonical text of an output: compact JSON, fields in the order of the schema. Raises SlmError if invalid."""
        try:
            model = self.output.model_validate(value)
        except ValidationError as error:
            raise SlmError(f"the value breaks the contract {self.name}: {explain(error)}.") from None
        return json.dumps(model.model_dump(exclude_unset=True), ensure_ascii=False, separators=(",", ":"))

    def nodes(self, node: dict) -> list[dict]:
        """A node of the schema with all that it may stand for: references, alternatives, a list's items."""
        found = [node]
        for part in found:  # grows while it is read
            found += [self.schema["$defs"][part["$ref"].rsplit("/", 1)[1]]] if "$ref" in part else []
            found += [*part.get("anyOf", []), *part.get("oneOf", []), *([part["items"]] if part.get("items") else [])]
        return found

    def properties(self, node: dict | None = None) -> dict[str, dict]:
        """Name -> schema of the fields of a node (none: of the output), or of a list's objects."""
        return {k: v for part in self.nodes(node or self.schema) for k, v in part.get("properties", {}).items()}

    @property
    def outline(self) -> str:
        """The output in words, a line a field (a block an alternative): shorter in a prompt than the JSON schema."""
        definitions = self.schema.get("$defs", {})

        def resolve(node: dict) -> dict:
            return definitions[node["$ref"].rsplit("/", 1)[1]] if "$ref" in node else node

        def values(node: dict) -> str:
            node = resolve(node)
            if "enum" in node or "const" in node:
                return " | ".join(json.dumps(v) for v in node.get("enum", [node.get("const")]))
            if options := node.get("anyOf"):
                return " | ".join(values(option) for option in options)
            if node.get("type") == "object":
                return "{" + ", ".join(f"{k}{'' if k in node.get('required', []) else '?'}: {values(v)}"
                                       for k, v in node.get("properties", {}).items()) + "}"  # fmt: skip
            return node.get("type", "any") + (f" like {node['pattern']}" if "pattern" in node else "")

        if "properties" not in self.schema:  # a union: one alternative a line
            return "\n".join(values(option) for option in self.schema.get("oneOf", self.schema.get("anyOf", [])))
        return "\n".join(
            f"{name}: {values(node)}. {node.get('description', '')}".rstrip()
            for name, node in self.schema["properties"].items()
        )

    def prompt(self, text: str) -> list[dict]:
        """The messages that the trained model sees for one input."""
        return [{"role": "system", "content": self.system_prompt}, {"role": "user", "content": text}]

    def messages(self, row: Row) -> list[dict]:
        """A row's messages with the contract's system prompt in front, whatever the row carried."""
        turns = [m.model_dump() for m in row.messages if m.role != "system"]
        return [{"role": "system", "content": self.system_prompt}, *turns]

    def label(self, value: dict | None) -> str | None:
        """The category of an output, or None."""
        return None if value is None or self.label_field is None else value.get(self.label_field)

    flatten = staticmethod(flatten)


def first_object(text: str) -> str:
    """The first balanced {...} of a text, or the text itself. Prose and code fences around it are left out."""
    decoder = json.JSONDecoder()
    for match in re.finditer(r"\{", text):
        try:
            _, end = decoder.raw_decode(text, match.start())
            return text[match.start() : end]
        except (ValueError, RecursionError):
            continue
    return text


def _no_twice(pairs: list[tuple]) -> dict:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a key occurs twice")
    return value


def _no_constant(name: str):
    raise ValueError(f"{name} is not JSON")
