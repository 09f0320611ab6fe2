"""Diagnosis: every cause of the five failure tables is planted in an otherwise sound run, and must be named first."""

# ruff: noqa: F811

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import test_export
import yaml
from pydantic import ConfigDict, create_model
from test_tokens import damaged
from tickets import CONTRACT
from typer.testing import CliRunner

from slm import registry
from slm.contract import Contract
from slm.diagnose.causes import diagnose, verdicts
from slm.diagnose.run import Run
from slm.errors import SlmError
from slm.evaluate.metrics import evaluate
from slm.models import Answer, base_folder
from slm.rows import digest, make_row, write_json, write_rows
from slm.settings import load_settings

exported = test_export.project
TOPICS, LETTERS = ("bill", "bug", "none"), "abcdefghiklmnoprstuw"
WORDS = {topic: ["".join(random.Random(f"{topic}{n}").sample(LETTERS, 6)) for n in range(40)] for topic in (*TOPICS, "all")}
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
MANY = create_model("Many", __config__=ConfigDict(extra="forbid"), **{f"field_{n}": (int, ...) for n in range(20)})
WIDE = Contract(name="wide", task_type="extraction", output=MANY, system_prompt="Fill it in.", primary_metric="field_f1", target=0.9)
LOSSES, DEV = (3.0, 1.5, 0.8, 0.5, 0.4, 0.33, 0.31, 0.31, 0.31, 0.31), ((0, 3.0), (50, 0.5), (100, 0.4))


def gold(i: int) -> dict:
    return {"topic": TOPICS[i % 3], "order": f"A-{i}x", "urgent": i % 4 == 0}


def message(i: int, seed) -> str:
    pick = random.Random(f"{seed}{i}")
    said = [*pick.sample(WORDS[TOPICS[i % 3]], 5), *pick.sample(WORDS["all"], 6)]
    pick.shuffle(said)
    return " ".join(said)


def rows(n: int, name: str, answer=gold, text=message, **meta):
    """`n` messages of random words, five of them the topic's, and what is expected."""
    return [make_row(text(i, name), answer(i) if isinstance(answer(i), str) else json.dumps(answer(i)), id=f"{name}-{i}",
                     category=TOPICS[i % 3], group=f"{name}-{i}", **{"difficulty": ("easy", "hard")[i % 2], **meta})
            for i in range(n)]  # fmt: skip


class Says:
    """A model that gives a text for each row of dev, by its number."""

    memory_mb = None

    def __init__(self, name: str, asked, answer, finish: str = "stop", tokens=lambda n: 0):
        self.name = self.fingerprint = name
        self.told = {row.user: (answer(n), 0.1, tokens(n), 9, finish) for n, row in enumerate(asked)}

    def answer(self, prompts):
        return [Answer(*self.told[p.messages[-1]["content"]]) for p in prompts]


def right(share: float, answer=gold):
    """The right text for a share of the rows, one field wrong in the others."""
    return lambda i: json.dumps(answer(i) if i % 10 < 10 * share else {**answer(i), "urgent": not answer(i)["urgent"]})


def unread(i: int) -> str:
    """Half an object in every fifth row."""
    return json.dumps(gold(i))[: 20 if i % 5 == 0 else None]


@pytest.fixture
def plant(tmp_path):
    """A sound run with what is asked for in its place; returns it for diagnosis."""

    def make(
        train=None, dev=None, golden=None, answers=right(1.0), base=right(0.1), majority=right(0.0), finish="stop", contract=CONTRACT,
        recipe=(), numbers=(), parents=(), losses=LOSSES, dev_losses=DEV, modules=LINEAR, files=(), settings=(), probe=(2.0, 2.1),
        tokens=lambda n: 0,
    ) -> Run:  # fmt: skip
        body = {"model": {"base": "tiny"}, "evaluate": {"resamples": 100}, **dict(settings)}
        (tmp_path / "project.yaml").write_text(yaml.safe_dump(body))
        (tmp_path / "training/configs").mkdir(parents=True)
        (tmp_path / "training/configs/train_config.yaml").write_text("{}\n")
        mine = load_settings(start=tmp_path, run_id="r1")
        sets = {"dev": dev or rows(60, "dev"), "golden": golden or rows(30, "golden"), "test": rows(30, "test")}
        for name, own in {**sets, "adversarial": rows(30, "adversarial")}.items():
            write_rows(tmp_path / f"data/eval/{name}.jsonl", own)
        write_rows(tmp_path / "data/raw/seed.jsonl", rows(20, "seed") if contract is CONTRACT else sets["dev"][:1])
        file = tmp_path / "data/accepted/train.jsonl"
        write_rows(file, train or rows(300, "train"))
        registry.append(mine, "datasets", {"version": "v1", "split": {"files": {"train": registry.file_hash(file)[:16]}}})
        adapter, tiny = tmp_path / "outputs/adapters/r1", base_folder(mine)
        adapter.mkdir(parents=True)
        lines = ["step,loss,eval_loss", *(f"{10 * n + 10},{x}," for n, x in enumerate(losses)), *(f"{s},,{x}" for s, x in dev_losses)]
        (adapter / "training_log.csv").write_text("\n".join(lines) + "\n")
        for one in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copy(tiny / one, adapter)
        from safetensors.numpy import save_file

        save_file({f"base_model.model.model.layers.0.x.{name}.lora_B.weight": np.ones((2, 2), np.float32) for name in modules},
                  adapter / "adapter_model.safetensors")  # fmt: skip
        registry.append(mine, "runs", {
            "stage": "train", "run_id": "r1", "status": "completed", "recipe": {**mine.train.model_dump(), **dict(recipe)},
            "metrics": {"loss_first": losses[0], "loss_final": losses[-1], "general_loss_first": probe[0], "general_loss_final": probe[1],
                        "epochs": 2.0, "steps": 100, "best_step": 100, "longest_row": 300, **dict(numbers)},
            "parents": {"dataset": "v1", "base": "tiny", "contract": contract.schema_hash,
                        "chat_template": digest((tiny / "chat_template.jinja").read_text()), **dict(parents)}})  # fmt: skip
        told = {"majority": (majority,), "base": (base,), "fine_tuned": (answers, finish, tokens), **{n: (a,) for n, a in dict(files).items()}}
        found = [evaluate(mine, contract, Says(n, sets["dev"], *how), sets["dev"], set="dev", name=n) for n, how in told.items()]
        out = tmp_path / "outputs/eval_reports/r1"
        write_json(out / "scores.json", [r.model_dump() for r in found[2:]])
        write_json(out / "baselines.json", {"key": {}, "results": [r.model_dump() for r in found[:2]]})
        write_json(out / "eval_report.json", {"contract": {"primary_metric": contract.primary_metric, "target": contract.target}})
        return Run(mine, contract, "r1")

    return make


def shown(run: Run) -> dict[str, list]:
    """{symptom that is found: its causes}."""
    return {seen.name: seen.causes for seen in verdicts(run) if seen.verdict == "found"}


def first(run: Run, symptom: str):
    """The first cause of the one symptom that is found."""
    ((name, causes),) = shown(run).items()
    assert name.startswith(symptom) and [c.level for c in causes] == sorted((c.level for c in causes), reverse=True)
    return causes[0]


def test_a_sound_run_has_none_of_the_symptoms(plant):
    """Guards against a diagnosis that always finds an illness; without an export, its table is not testable."""
    found = verdicts(plant())
    assert [seen.verdict for seen in found] == ["ruled out"] * 4 + ["not testable"] and not any(seen.causes for seen in found)
    assert "run 08_export" in found[4].evidence


def test_a_bad_score_alone_accuses_no_cause(plant):
    """Guards against blaming whatever is tested first: failures without any of the causes have none found."""
    (causes,) = shown(plant(answers=right(0.6))).values()
    assert len(causes) == 9 and {c.verdict for c in causes} == {"ruled out"} and all(c.evidence for c in causes)


def lost(i: int) -> str:
    """All fields wrong in every fifth row."""
    wrong = {"topic": TOPICS[(i + 1) % 3], "order": "B-1", "urgent": i % 4 != 0}
    return json.dumps(gold(i) if i % 5 else wrong)


def noise(i: int) -> dict:
    return gold(i) if i % 5 < 3 else {**gold(i), "topic": TOPICS[(i + 1) % 3]}


def noisy():
    """Two in five labels are the next one."""
    return [row.noted(category=noise(n)["topic"]) for n, row in enumerate(rows(300, "train", noise))]


def alike():
    """Ten rows said again with one word more, and answered otherwise."""
    own = rows(300, "train")
    more = [make_row(f"{r.user} thanks", json.dumps({**gold(n), "order": None, "urgent": not gold(n)["urgent"]}), id=f"again-{n}",
                     category=r.meta.category) for n, r in enumerate(own[:10])]  # fmt: skip
    return [*own, *more]


def template(i: int, seed) -> str:
    pick = random.Random(f"{seed}{i}")
    one, two, three, four = *pick.sample(WORDS[TOPICS[i % 3]], 2), *pick.sample(WORDS["all"], 2)
    return f"please look at the {one} {two} that i have bought from you on {three} {four} and tell me what to do about it now"


GOLDEN = [r.answered(json.dumps({**gold(n), "topic": "none"})).model_copy(update={"id": f"golden-{n}"})
          for n, r in enumerate(rows(60, "dev")) if gold(n)["topic"] != "none"]  # fmt: skip


@pytest.mark.parametrize(
    ("what", "cause", "evidence"),
    [
        ({"dev": rows(30, "dev") + rows(30, "dev2", language="de")}, "training and evaluation differ", "language de: 0% of training, 50% of dev"),
        ({"train": rows(300, "train", difficulty="easy"), "dev": rows(60, "dev", difficulty="hard")}, "rows are too easy", "easy: 100% of"),
        ({"train": noisy()}, "labels are noisy", "of the labels in training"),
        ({"train": alike()}, "labels are noisy", "10: train-0 and again-0 "),
        ({"golden": GOLDEN}, "the contract is ambiguous", "dev-0 and golden-0 (topic)"),
        ({"answers": lambda i: json.dumps({**gold(i), "order": f"a {i}X" if i % 2 else gold(i)["order"]})}, "the metric is wrong", "dev-1; dev-3"),
        ({"answers": lambda i: json.dumps({**gold(i), "topic": {"bill": "bug", "bug": "bill", "none": "none"}[gold(i)["topic"]]} if i % 2
                                          else gold(i))}, "the contract is ambiguous", "taken for each other"),
        ({"train": rows(300, "train", text=template)}, "templates are memorized", "100% of the training messages"),
        ({"dev_losses": ((0, 3.0), (50, 0.3), (100, 0.6))}, "too many epochs", "best 0.300 at step 50, 0.600 at the end"),
        ({"losses": (3.0, *[0.05] * 9)}, "too many epochs", "training loss 0.05"),
        ({"losses": (3.0, 2.5, 2.0, 1.7, 1.4, 1.2, 1.0, 0.8, 0.6, 0.5)}, "training was too short", "0.900 to 0.550 in the last fifth"),
        ({"answers": lost, "tokens": lambda n: 900 if n % 5 == 0 else 100}, "long inputs fail", "score 0.000 (n=12)"),
    ],
)  # fmt: skip
def test_a_loss_that_falls_without_the_evaluation_is_explained(plant, what, cause, evidence):
    """Planted: each cause of the first table. Guards against tuning settings where the data are at fault."""
    found = first(plant(**{"answers": right(0.6), **what}), "the training loss falls")
    assert (found.name, found.verdict) == (cause, "found") and evidence in found.evidence and found.fix


@pytest.mark.parametrize(
    ("what", "flags"),
    [
        ({"dev_losses": ((0, 3.0), (50, 0.3), (100, 0.6))},
         {"train.epochs": 1.0, "train.lora_rank": 8, "train.lora_alpha": 16, "train.lora_dropout": 0.1}),
        ({"losses": (3.0, 2.5, 2.0, 1.7, 1.4, 1.2, 1.0, 0.8, 0.6, 0.5)},
         {"train.epochs": 3, "train.lora_rank": 32, "train.lora_alpha": 64}),
        ({"losses": (3.0, 2.5, 2.0, 1.7, 1.4, 1.2, 1.0, 0.8, 0.6, 0.5), "probe": (2.0, 3.0)}, {"train.epochs": 3}),
        ({"answers": lost, "tokens": lambda n: 900 if n % 5 == 0 else 100},
         {"train.max_seq_length": 2048, "evaluate.context": 2048}),
    ],
)  # fmt: skip
def test_what_settings_can_mend_is_said_as_settings(plant, what, flags):
    """Guards against advice that nobody can type; the rank is not raised in a model that forgets."""
    causes = next(iter(shown(plant(**{"answers": right(0.6), **what})).values()))
    assert causes[0].flags == flags


@pytest.mark.parametrize(
    ("what", "cause", "evidence"),
    [
        ({"train": rows(300, "train", lambda i: f"Sure! {json.dumps(gold(i))}" if i % 9 == 0 else gold(i))}, "training answers hold prose", "34: "),
        ({"contract": WIDE, "train": rows(300, "train", lambda i: {f"field_{n}": n + i for n in range(20)}),
          "dev": rows(60, "dev", lambda i: {f"field_{n}": n + i for n in range(20)}), **dict.fromkeys(("base", "majority"), lambda i: "{}"),
          "golden": rows(30, "golden", lambda i: {f"field_{n}": n + i for n in range(20)}),
          "answers": lambda i: json.dumps({f"field_{n}": n + i for n in range(20 - (i % 5 == 0))})},
         "the schema is too complex", "20 fields, 1 deep; 12 answers break the schema, 0 are no JSON"),
        ({"parents": {"contract": "before"}}, "prompt and training format disagree", "trained under contract before"),
        ({"settings": {"export": {"temperature": 0.8}}}, "the temperature is too high", "export.temperature is 0.8"),
        ({"answers": lambda i: f"{json.dumps(gold(i))} and on and on" if i % 5 == 0 else json.dumps(gold(i)), "finish": "length"},
         "answers are cut off or do not end", "dev-0: the object was complete and the model went on"),
    ],
)  # fmt: skip
def test_invalid_json_is_explained(plant, what, cause, evidence):
    """Planted: each cause of the second table but the file's. Guards against more rows where the prompt is at fault."""
    causes = shown(plant(**{"answers": unread, **what}))["answers are often invalid"]
    assert (causes[0].name, causes[0].verdict) == (cause, "found") and evidence in causes[0].evidence and causes[0].fix


def test_a_file_with_another_chat_template_explains_its_invalid_json(plant, monkeypatch):
    """Planted: the adapter answers well, its file does not and renders prompts otherwise."""
    problem = {"chat template": ["model-f16.gguf: its chat template renders 30 of 30 prompts otherwise"]}
    monkeypatch.setattr(Run, "served", dict.fromkeys(("conversion", "end token", "stop tokens", "sampling"), []) | problem)
    causes = shown(plant(files={"f16": unread}))["answers are often invalid"]
    assert causes[0].name == "the exported file's chat template differs" and "f16 has 20.0% fewer valid answers" in causes[0].evidence


HEATED = (3.0, 1.0, 0.6, 2.0, 3.5, 4.0, 4.5, 4.4, 4.6, 4.5)


@pytest.mark.parametrize(
    ("what", "cause", "evidence"),
    [
        ({"train": rows(300, "train", lambda i: {**gold(i), "topic": "bills"} if i % 9 == 0 else gold(i))}, "bad data", "34: train-0 (topic"),
        ({"losses": HEATED, "dev_losses": ((0, 3.0), (50, 1.1), (100, 4.4))}, "the learning rate is too high", "rises by 4.000 over its lowest"),
        ({"losses": (3.0, *[0.02] * 9), "dev_losses": ((0, 3.0), (50, 0.3), (100, 0.6))}, "too many epochs", "best 0.300 at step 50"),
        ({"parents": {"chat_template": "before"}}, "wrong chat template", "the adapter has another chat template than was trained with"),
        ({"modules": ("q_proj",)}, "wrong target modules", "nothing was trained: 6: down_proj; gate_proj; k_proj"),
        ({"train": rows(280, "train") + [r.answered(json.dumps({**gold(n), "topic": TOPICS[(n + 1) % 3]})).model_copy(update={"id": f"leak-{n}"})
                                         for n, r in enumerate(rows(9, "dev"))]},
         "leakage or conflicting labels", "leak-0 is like dev dev-0, answered otherwise"),
        ({"base": right(0.5), "majority": right(0.9)}, "the base model is unsuitable", "always the same answer"),
    ],
)  # fmt: skip
def test_a_model_worse_than_its_base_is_explained(plant, what, cause, evidence):
    """Planted: each cause of the third table. Guards against a fine-tune that costs more than it brings."""
    causes = shown(plant(**{"answers": right(0.3), "base": right(0.9), **what}))["the fine-tuned model is worse than the base"]
    assert (causes[0].name, causes[0].verdict) == (cause, "found") and evidence in causes[0].evidence and causes[0].fix


def test_an_adapter_of_zeros_is_named(plant, monkeypatch):
    """Planted: an adapter that was saved before anything was trained."""
    run = plant(answers=right(0.3), base=right(0.9))
    from safetensors.numpy import save_file

    file = run.settings.path("outputs/adapters/r1/adapter_model.safetensors")
    save_file({f"x.{name}.lora_B.weight": np.zeros((2, 2), np.float32) for name in LINEAR}, file)
    assert shown(run)["the fine-tuned model is worse than the base"][0].name == "wrong target modules"


@pytest.mark.parametrize(
    ("what", "cause", "evidence"),
    [
        ({"recipe": {"lora_rank": 128}}, "the adapter's rank is too high", "lora_rank 128"),
        ({"recipe": {"method": "full", "learning_rate": 5e-5}}, "the adapter's rank is too high", "every weight"),
        ({"train": rows(40, "train")}, "the data are too narrow", "40 training rows"),
        ({"numbers": {"epochs": 6.0, "best_step": 40}}, "training took too long", "6 epochs; dev loss best at step 40 of 100"),
        ({"recipe": {"learning_rate": 5e-3}}, "the learning rate is too high", "learning rate 0.005, 0.001 is much"),
    ],
)
def test_forgotten_skills_are_explained(plant, what, cause, evidence):
    """Planted: each cause of the fourth table. Guards against a model that can do its task and nothing else."""
    found = first(plant(probe=(2.0, 3.0), **what), "general skills")
    assert (found.name, found.verdict) == (cause, "found") and evidence in found.evidence and found.fix


# The fifth table, on a real export of the tiny model.


@pytest.fixture
def export(exported, tmp_path):
    """A copy of the exported project with its Modelfile, and a run record, that a test damages."""
    from slm.export.modelfile import render_modelfile

    mine, merged, files = exported
    root = tmp_path / "project"
    shutil.copytree(mine.root, root, ignore=shutil.ignore_patterns("client", ".cache"))
    for name in ("dev", "test", "adversarial"):
        write_rows(root / f"data/eval/{name}.jsonl", test_export.ROWS)
    settings = load_settings(start=root, run_id="t")
    registry.append(settings, "runs", {"stage": "export", "run_id": "t", "status": "failed", "error": "tokens differ"})
    folder = root / "outputs/gguf/t"
    (folder / "model-q8_0.gguf").unlink()
    (folder / "Modelfile").write_text(render_modelfile(settings, test_export.CONTRACT, merged, "./model-f16.gguf"))
    return settings, folder


def header(exported, folder: Path, name: str, change) -> None:
    """Change a field of the f16 file's header in place."""
    shutil.move(damaged(exported, folder.parent, lambda reader: change(reader.get_field(name))), folder / "model-f16.gguf")


def lose_types(field):
    for index in field.data[:17]:
        field.parts[index][0] = 1


def other_template(field):
    field.parts[-1][:] = list(bytes(field.parts[-1]).replace(b"<|im_end|>' + '", b"<|im_END|>' + '"))


def other_end(field):
    field.parts[-1][0] = 7


@pytest.mark.parametrize(
    ("name", "change", "cause"),
    [
        ("tokenizer.chat_template", other_template, "chat template mismatch"),
        ("tokenizer.ggml.eos_token_id", other_end, "end token mismatch"),
        ("tokenizer.ggml.token_type", lose_types, "bad conversion"),
        ("Modelfile", ('PARAMETER stop "<|im_end|>"\n', ""), "wrong stop tokens"),
        ("Modelfile", ("PARAMETER temperature 0\n", "PARAMETER temperature 0.9\n"), "other sampling than evaluated"),
        ("Modelfile", ("<|im_start|>user", "<|im_start|>USER"), "chat template mismatch"),
    ],
)  # fmt: skip
def test_a_file_that_is_not_the_trained_model_is_explained(exported, export, name, change, cause):
    """Planted in a real file: each serving cause of the fifth table. Guards against garbage in a runtime after a good notebook."""
    settings, folder = export
    if name == "Modelfile":
        text = (folder / name).read_text()
        assert change[0] in text
        (folder / name).write_text(text.replace(*change))
    else:
        header(exported, folder, name, change)
    found = first(Run(settings, test_export.CONTRACT, "t"), "it works in the notebook")
    assert (found.name, found.verdict) == (cause, "found") and found.fix


def test_quantization_that_loses_rows_is_named_only_where_f16_holds(export):
    """Planted: a small file far from f16. Guards against a smaller quant blamed for what the conversion broke."""
    settings, folder = export
    report = {
        "chosen": None, "attribution": "equal", "files": [{"file": "f16", "holds": "yes"}, {"file": "q4_k_m", "holds": "no: rows lost"}],
        "logits": [{"file": "q4_k_m", "kl": 0.4, "most": 0.1, "holds": False}],
    }  # fmt: skip
    write_json(folder / "export.json", report)
    found = first(Run(settings, test_export.CONTRACT, "t"), "it works in the notebook")
    assert found.name == "quantization is too aggressive" and "q4_k_m: divergence 0.4, at most 0.1" in found.evidence
    write_json(folder / "export.json", report | {"attribution": "weights: token ids straight into the f16 file already score lower"})
    found = first(Run(settings, test_export.CONTRACT, "t"), "it works in the notebook")
    assert found.name == "bad conversion" and "weights: token ids" in found.evidence


def test_a_sound_export_has_nothing_found(export):
    """Guards against proofs that differ from what 08 ran; a stage that failed last is named all the same."""
    settings, folder = export
    text = diagnose(settings, test_export.CONTRACT, "t")
    assert "fails in llama.cpp or Ollama: no" in text and "**export failed last:** tokens differ" in text
    assert (settings.root / "outputs/eval_reports/t/diagnosis.md").read_text() == text and str(settings.root) not in text


def test_the_command_writes_the_page_and_says_what_it_cannot_test(plant, monkeypatch):
    """Guards against a traceback where a stage was not run, and against causes without evidence or fix."""
    import slm.cli

    run = plant(answers=right(0.6), train=noisy())
    monkeypatch.chdir(run.settings.root)
    monkeypatch.setattr(slm.cli, "project_contract", lambda settings: CONTRACT)
    done = CliRunner().invoke(slm.cli.app, ["diagnose", "r1"])
    page = (run.settings.root / "outputs/eval_reports/r1/diagnosis.md").read_text()
    assert done.exit_code == 0 and page in done.output and "- **found: labels are noisy.**" in page and "  - mend it: correct the rows" in page
    (run.settings.root / "outputs/eval_reports/r1/scores.json").unlink()
    page = CliRunner().invoke(slm.cli.app, ["diagnose", "r1"]).output
    assert page.count(": not testable") == 4 and "run 06_evaluate first" in page and str(run.settings.root) not in page
    missing = CliRunner().invoke(slm.cli.app, ["diagnose", "nobody"])
    assert missing.exit_code == 1 and isinstance(missing.exception, SlmError) and "no run nobody" in str(missing.exception)
