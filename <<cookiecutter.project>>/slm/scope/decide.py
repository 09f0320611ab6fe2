"""The decision tree as data: prompting, RAG, fine-tuning, distillation or preference optimisation, with reasons."""

from dataclasses import dataclass

from slm.errors import SlmError
from slm.evaluate.baselines import load_baselines
from slm.report.tables import frame, markdown
from slm.rows import iter_lines, write_json, write_text

FEW_EXAMPLES = 50  # fewer good examples than this: prompt first
MANY_REQUESTS = 1_000  # per month; "thousands or millions of times"


@dataclass(frozen=True)
class Sign:
    """One line of the tree: it speaks for its branch when `fact` is `wanted`; a deciding one is enough by itself."""

    text: str
    fact: str
    wanted: bool = True
    decides: bool = False


TREE: dict[str, tuple[Sign, ...]] = {
    "rag": (
        Sign("what is missing is knowledge", "needs_knowledge", decides=True),
        Sign("answers must cite or look up documents that change", "must_cite", decides=True),
        Sign("the task rests on a large private corpus", "private_corpus", decides=True),
        Sign("a strong model answers well once it is given the right passage", "teacher_is_good"),
    ),
    "prompting": (
        Sign("the task changes often", "changes_often", decides=True),
        Sign("the style of the output is free", "flexible_style", decides=True),
        Sign(f"there are fewer than {FEW_EXAMPLES} good examples", "enough_examples", False, decides=True),
        Sign(f"speed and cost hardly matter (under {MANY_REQUESTS} requests a month)", "high_volume", False, decides=True),
        Sign("a good prompt alone reaches the target", "prompt_reaches_target", decides=True),
    ),
    "distillation": (
        Sign("a strong teacher already does the task well", "teacher_is_good"),
        Sign("a cheaper student is wanted", "high_volume"),
        Sign("the output space is narrow enough to imitate", "strict_format"),
        Sign("many rows can be labelled by the teacher and verified", "teacher_available"),
    ),
    "fine_tuning": (
        Sign("input and output follow a stable pattern", "changes_often", False),
        Sign("the format is strict", "strict_format"),
        Sign("the same behaviour is needed thousands of times", "high_volume"),
        Sign("prompting is too dear, too slow or too unsteady", "prompt_reaches_target", False),
        Sign("there are examples, or realistic ones can be made", "examples_possible"),
        Sign("answers can be judged automatically", "measurable"),
        Sign("the behaviour belongs into the weights, not into every prompt", "flexible_style", False),
    ),
    "preference": (
        Sign("pairs, rejected answers or a verifiable reward exist", "preference_data"),
        Sign("better and worse can be measured", "measurable"),
        Sign("SFT is right in the main, yet weak in quality, tone or safety", "sft_is_weak"),
    ),
}
TITLES = {
    "rag": "RAG first", "prompting": "prompting first", "distillation": "distillation (SFT on a teacher's answers)",
    "fine_tuning": "fine-tuning (SFT)", "preference": "preference optimisation",
}  # fmt: skip
NEXT = {
    "rag": "Build retrieval and measure it as a baseline; fine-tune only what is still wrong in form.",
    "prompting": "Take the prompted base model of 02 as your product for now; come back when these reasons are gone.",
    "distillation": "Let the teacher write rows (03), verify them by the gates (04), train the student on them (05).",
    "fine_tuning": "Evaluation sets and baselines first (02), then rows (03, 04), then the smallest adapter (05).",
}


@dataclass(frozen=True)
class Decision:
    """The chosen branch, every sign with its answer ("yes", "no" or "open"), and what comes after it."""

    choice: str
    signs: list[dict]
    advice: list[str]

    @property
    def title(self) -> str:
        """The choice in words."""
        return TITLES[self.choice]

    def table(self):
        """All signs as a DataFrame: approach, sign, answer, known from."""
        return frame(self.signs)

    def save(self, settings) -> None:
        """Write decision.json and decision.md into the run's folder."""
        advice = "".join(f"* {line}\n" for line in self.advice)
        write_json(settings.run_dir / "decision.json", {"choice": self.choice, "advice": self.advice, "signs": self.signs})
        write_text(settings.run_dir / "decision.md", f"# Decision: {self.title}\n\n{advice}\n{markdown(self.signs)}")


def facts(settings, contract) -> dict[str, tuple[bool | None, str]]:
    """What is known: {fact: (yes, no or None for not yet known; where it is known from)}."""
    task, seed, score = settings.task, settings.path("data/raw/seed.jsonl"), _prompted(settings, contract)
    rows = sum(1 for _ in iter_lines(seed)) if seed.is_file() else 0
    answers = ("changes_often", "flexible_style", "needs_knowledge", "must_cite", "private_corpus", "preference_data")
    found = {name: (getattr(task, name), f"task.{name}") for name in (*answers, "teacher_is_good")}
    endpoint = settings.generate.teacher == "openai"
    target = f"{contract.primary_metric} target {contract.target:g}"
    measured = f"prompted base {score:.3f} on dev, {target}" if score is not None else "not measured yet: 02 does it"
    return found | {
        "enough_examples": (rows >= FEW_EXAMPLES, f"{rows} rows in data/raw/seed.jsonl"),
        "examples_possible": (rows >= FEW_EXAMPLES or endpoint, f"{rows} rows in data/raw/seed.jsonl"),
        "high_volume": (task.requests_per_month >= MANY_REQUESTS, f"task.requests_per_month {task.requests_per_month}"),
        "strict_format": (True, "the output has a schema"), "measurable": (bool(contract.primary_metric), target),
        "teacher_available": (True, f"generate.teacher {settings.generate.teacher}"),
        "prompt_reaches_target": (None if score is None else score >= contract.target, measured),
        "sft_is_weak": (None, "not measured yet: 06 does it"),
    }  # fmt: skip


def decide(settings, contract) -> Decision:
    """Walk the tree: RAG and prompting win by one deciding sign, distillation needs all of its signs, else
    fine-tuning. Preference optimisation is never first: it is advised after SFT when there are pairs."""
    known = facts(settings, contract)
    words = {True: "yes", False: "no", None: "open"}
    facing = [(TITLES[branch], sign, *known[sign.fact]) for branch, lines in TREE.items() for sign in lines]
    holds = {sign: None if value is None else value is sign.wanted for _, sign, value, _ in facing}
    signs = [
        {"approach": title, "sign": sign.text, "answer": words[holds[sign]], "known from": source}
        for title, sign, _, source in facing
    ]
    deciding = {branch: [s for s in lines if s.decides and holds[s]] for branch, lines in TREE.items()}
    tuned = "distillation" if all(holds[s] for s in TREE["distillation"]) else "fine_tuning"
    choice = next((branch for branch in ("rag", "prompting") if deciding[branch]), tuned)
    because = deciding[choice] or [s for s in TREE[choice] if holds[s]]
    advice = ["Because " + "; ".join(s.text for s in because) + ".", NEXT[choice]]
    against = [s.text for s in TREE["fine_tuning"] if holds[s] is False]
    if choice == tuned and against:
        advice.append("Speaks against it: not true that " + "; ".join(against) + ".")
    if known["preference_data"][0]:
        advice.append("Later, when SFT is right in the main: preference optimisation (DPO) on your pairs.")
    return Decision(choice, signs, advice)


def _prompted(settings, contract) -> float | None:
    """The prompted base model's score on dev, where 02 has measured it for this contract and base."""
    try:
        results = load_baselines(settings, contract)
    except SlmError:
        return None
    scores = [r.metrics[contract.primary_metric].value for r in results if (r.name, r.set) == ("prompted_base", "dev") and r.ran]
    return scores[0] if scores else None
