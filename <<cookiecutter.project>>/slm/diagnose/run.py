"""What a run left behind, read when a test asks for it; what is missing raises the sentence that says how to get it."""

import csv
import json
import re
from collections import Counter
from functools import cached_property
from statistics import mean

import numpy as np

from slm import registry
from slm.contract import Contract
from slm.curate.duplicates import cosine_edges, differing
from slm.curate.text import sketch, text_of, words
from slm.errors import SlmError
from slm.evaluate.baselines import training_rows
from slm.evaluate.candidate import NAME, load_candidate, scores_file
from slm.evaluate.compare import Comparison, compare_results
from slm.evaluate.metrics import Result, read_results
from slm.evaluate.scorers import Score
from slm.export.merge import check_ends
from slm.export.modelfile import check_modelfile
from slm.export.tokens import conversations, prove_tokens
from slm.models import base_folder
from slm.repair.load import with_rows
from slm.rows import Row, iter_lines, read_rows

MOST = 5000  # training rows that are looked at
SIGNS = {  # what 08 or its proofs say -> the cause that it shows, the first that matches
    "chat template": "^chat template:|TEMPLATE|SYSTEM|chat template (renders|is)", "stop tokens": "no stop at",
    "sampling": "^sampling:|evaluated was", "end token": "end token|turn end|plain text in it|ends an answer",
    "conversion": "",
}  # fmt: skip


class Run:
    """One run's artefacts and what is measured on them, each once. Raises SlmError for what is not there."""

    def __init__(self, settings, contract: Contract, run_id: str):
        self.settings, self.contract, self.id = settings.model_copy(update={"run_id": run_id}), contract, run_id
        own = (run_id, f"{run_id}-sanity")
        last = {r["stage"]: r for r in registry.read(settings, "runs") if r.get("run_id") in own}
        if not last:
            raise SlmError(f"registry/runs.jsonl: no run {run_id}; there is nothing to diagnose.")
        self.failed = {stage: r.get("error", "") for stage, r in last.items() if r.get("status") == "failed"}

    @cached_property
    def record(self) -> dict:
        """The newest completed training."""
        if found := registry.latest(self.settings, "runs", stage="train", status="completed", run_id=self.id):
            return found
        raise SlmError("it was not trained to the end; run 05_train.")

    @cached_property
    def losses(self) -> tuple[list[float], list[tuple[float, int]]]:
        """By training_log.csv: the loss of training batches, and (loss, step) on dev_internal."""
        lines = iter_lines(self.settings.path(f"outputs/adapters/{self.id}/training_log.csv"))
        log = list(csv.DictReader(line for _, line in lines))
        dev = [(float(line["eval_loss"]), int(line["step"])) for line in log if line["eval_loss"]]
        return [float(line["loss"]) for line in log if line["loss"]], dev

    @cached_property
    def results(self) -> dict[str, Result]:
        """What ran on dev: the baselines, the fine-tuned model and its files."""
        file = scores_file(self.settings, self.id).with_name("baselines.json")
        before = read_results(file, "02_baseline") if file.is_file() else []
        return {r.name: r for r in [*before, *load_candidate(self.settings, self.id)] if r.ran and r.set == "dev"}

    def score(self, name: str = NAME) -> float:
        """The primary metric on dev."""
        if name not in self.results:
            raise SlmError(f"{name} has no scores on dev in this run; run 02_baseline and 06_evaluate.")
        return self.results[name].metrics[self.contract.primary_metric].value

    @cached_property
    def against(self) -> tuple[str, Comparison]:
        """The better of the base's two prompts, and the fine-tuned model against it on dev."""
        best = max([n for n in ("base", "prompted_base") if n in self.results] or ["base"], key=self.score)
        return best, compare_results(self.results[NAME], self.results[best], self.contract, self.settings)

    @cached_property
    def pairs(self) -> list[tuple[Row, Score]]:
        """dev's rows with the fine-tuned model's scores."""
        return with_rows(self.settings, self.results[NAME])

    @cached_property
    def failures(self) -> list[Score]:
        """The scores on dev that are not exactly right."""
        return [score for _, score in self.pairs if not score.exact]

    @cached_property
    def train(self) -> list[Row]:
        """The rows that the run was trained on."""
        return training_rows(self.settings)[:MOST]

    @cached_property
    def filled(self) -> float:
        """Share of the training messages of which half the word triples stand in another one too."""
        made = sketch([words(text_of(row)) for row in self.train])
        held, ends = Counter(made.shingles.tolist()), made.starts.tolist()
        pieces = (made.shingles[a:b].tolist() for a, b in zip(ends, ends[1:], strict=False))
        return mean(mean(held[shingle] > 1 for shingle in piece) >= 0.5 for piece in pieces)

    def conflicts(self, rows: list[Row]) -> list[str]:
        """Pairs of rows that gate 9 would call alike, and whose answers differ, other than on purpose."""
        texts, alike, found = dict(enumerate(map(text_of, rows))), self.settings.curate.contradiction, []
        for n, m in zip(*(side.tolist() for side in cosine_edges(texts, np.arange(len(rows)), alike)[:2]), strict=True):
            a, b = rows[n], rows[m]
            meant = {row.meta.provenance.get("contrast_of") for row in (a, b)} & {a.id, b.id}
            left, right = (self.contract.parse(row.answer).value or {} for row in (a, b))
            if not meant and (name := differing(a, left, b, right)):
                found.append(f"{a.id} and {b.id} ({name})")
        return found

    @cached_property
    def export(self) -> dict:
        """export.json, where 08 came to it."""
        file = self.settings.path(f"outputs/gguf/{self.id}/export.json")
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}

    @cached_property
    def served(self) -> dict[str, list[str]]:
        """Cause (of SIGNS) -> what is wrong with model, files and Modelfile: 08's verdict, its proofs made again."""
        merged, folder = (self.settings.path(f"outputs/{name}/{self.id}") for name in ("merged", "gguf"))
        files, modelfile = sorted(folder.glob("model-*.gguf")), folder / "Modelfile"
        if not files or not merged.is_dir():
            raise SlmError("no exported file, or no merged model to compare it with; run 08_export.")
        said = [text for text in [self.export.get("attribution", "equal")] if text != "equal"]
        chats = conversations(self.contract, read_rows(self.settings.path("data/eval/golden.jsonl")), least=0)
        proofs = [(check_ends, base_folder(self.settings), merged)]
        proofs += [(prove_tokens, merged, file, chats) for file in files]
        proofs += [(check_modelfile, self.settings, self.contract, merged, modelfile, chats)] * modelfile.is_file()
        for proof, *given in proofs:
            try:
                proof(*given)
            except SlmError as error:
                said += str(error).replace(f"{self.settings.root}/", "").split("; ")
        causes = [next(cause for cause, signs in SIGNS.items() if re.search(signs, text)) for text in said]
        return {name: [text for text, cause in zip(said, causes, strict=True) if cause == name] for name in SIGNS}
