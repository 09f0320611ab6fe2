"""After SFT: pairs from the run's own failures, rewards read off the contract, DPO, ORPO and GRPO for real on the tiny model."""

import importlib.util
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from slm import registry
from slm.errors import SlmError
from slm.evaluate import Metric, baselines
from slm.evaluate.compare import Comparison
from slm.models import Answer
from slm.models.program import ProgramModel
from slm.rows import make_row, write_json, write_rows
from slm.settings import load_settings
from slm.train import preference, train
from slm.train.reward import rewards
from task.contract import contract

pytestmark = pytest.mark.skipif(contract.name != "support_triage", reason="the rows are the support starter's")
SMOKE = {
    "model": {"base": "tiny"},
    "train": {
        "trainer": "trl", "method": "lora", "load_in_4bit": False, "precision": "fp32", "optimizer": "adamw_torch",
        "packing": False, "gradient_checkpointing": False, "max_steps": 2, "batch_size_per_device": 4, "learning_rate": 5e-3,
        "gradient_accumulation_steps": 1, "eval_steps": 2, "save_steps": 2, "max_seq_length": 256, "lora_dropout": 0.0,
    },
    "evaluate": {"max_new_tokens": 12, "resamples": 200},
    "preference": {"max_steps": 2, "learning_rate": 1e-2, "limit": 8, "generations": 2},
}  # fmt: skip
GOLD = {"category": "bug", "priority": "low", "product": None, "order_id": None, "refund_requested": False, "language": "en"}


def row(n: int, text: str = "My teapot leaks since yesterday, number", **more):
    """A row with a real answer of the contract."""
    return make_row(f"{text} {n}", contract.dump(GOLD), category="bug", **more)


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project with accepted rows, locked evaluation sets, and baselines that count as measured."""
    (tmp_path / "training/configs").mkdir(parents=True)
    (tmp_path / "training/configs/train_config.yaml").write_text("epochs: 1\n")
    (tmp_path / "project.yaml").write_text(yaml.safe_dump(SMOKE))
    write_rows(tmp_path / "data/accepted/train.jsonl", [row(n) for n in range(8)])
    write_rows(tmp_path / "data/accepted/dev_internal.jsonl", [row(n) for n in range(8, 12)])
    for k, name in enumerate(registry.SETS):
        texts = [f"Invoice {k}{n} of the {name} harbour marble violin arrived twice" for n in range(4)]
        write_rows(tmp_path / f"data/eval/{name}.jsonl", [row(n, text) for n, text in enumerate(texts)])
    registry.lock_sets(load_settings(start=tmp_path))
    monkeypatch.setattr("slm.evaluate.baselines.require_baselines", lambda settings: None)
    return tmp_path


def settings_of(project, **own):
    """The project's settings with preference overrides."""
    return load_settings(start=project, run_id="r1", overrides={f"preference.{k}": v for k, v in own.items()})


def says(text):
    """A model that always says this."""
    return ProgramModel("fixed", lambda _: text, fingerprint=text)


def verdict(low, high, n=60):
    """A comparison whose difference has this interval."""
    difference = Metric(value=(low + high) / 2, low=low, high=high, n=n)
    return Comparison(candidate=0.6, baseline=0.5, difference=difference, mcnemar_p=0.03, fixed=[], broken=[])


def test_pairs_are_the_gold_answer_against_what_the_model_said(project):
    """Guards against pairs of right answers, and against a rejected answer that nobody gave."""
    settings = settings_of(project, limit=0)
    assert preference.failures(settings, contract, says(contract.dump(GOLD))) == []
    found = preference.failures(settings, contract, says(contract.dump({**GOLD, "priority": "high"})))
    assert len(found) == 12 and found[0].id == row(8).id  # dev_internal comes first: it was not trained on
    [pair, *_] = preference.pairs(found, contract)
    assert json.loads(pair["rejected"][0]["content"])["priority"] == "high"
    assert pair["chosen"][0]["content"] == row(8).answer and pair["prompt"][-1] == {"role": "user", "content": row(8).user}


@pytest.mark.parametrize("what", ["id", "text", "paraphrase"])
def test_a_row_of_an_evaluation_set_is_refused(project, what):
    """Guards against preference pairs that leak test or golden into training, by id or by text."""
    taken = row(0, "Invoice 30 of the golden harbour marble violin arrived twice", id="locked")
    write_rows(project / "data/eval/golden.jsonl", [taken])
    text = {"id": "Something else entirely about printers", "text": taken.user.upper() + "!", "paraphrase": f"Hello, {taken.user} again"}[what]
    planted = make_row(text, row(0).answer, category="bug", id="locked" if what == "id" else "p1")
    write_rows(project / "data/accepted/train.jsonl", [row(1), planted])
    with pytest.raises(SlmError, match=rf"row {planted.id} (stands in data/eval|has the id of a row .*golden|is too like row .*golden)"):
        preference.failures(settings_of(project), contract, says("no"))


def test_equal_answers_and_no_failures_are_refused():
    """Guards against a loss that pulls both ways on one answer, and against a run over nothing."""
    with pytest.raises(SlmError, match="the same answer"):
        preference.pairs([row(0, rejected=row(0).answer + "\n")], contract)
    with pytest.raises(SlmError, match="fails on none"):
        preference.pairs([row(0)], contract)


@pytest.mark.parametrize("method", ["dpo", "orpo", "grpo"])
def test_every_argument_exists_in_the_installed_trainer(project, method):
    """Guards against a library that renames an argument, and against a rate or a group size that never arrives."""
    from trl import DPOConfig, GRPOConfig
    from trl.experimental.orpo import ORPOConfig

    config = {"dpo": DPOConfig, "orpo": ORPOConfig, "grpo": GRPOConfig}[method]
    made = config(**preference.arguments(settings_of(project, method=method, learning_rate=None, generations=3), project))
    assert made.learning_rate == pytest.approx(5e-3 / 20) and made.beta == 0.1 and made.max_steps == 2
    if method == "grpo":
        assert (made.num_generations, made.per_device_train_batch_size, made.max_completion_length) == (3, 6, 12)


def total(text, weights=None):
    """The weighted sum of all rewards for one answer to row 0, and each of them by name."""
    worth = rewards(contract, [row(0)], weights or settings_defaults())
    parts = {f.__name__: (f(completions=[[{"role": "assistant", "content": text}]], row=[0], prompts=[""])[0], w) for f, w in worth.items()}
    return sum(value * weight for value, weight in parts.values() if value is not None), {k: v for k, (v, _) in parts.items()}


def settings_defaults():
    """The weights that project.yaml does not change."""
    from slm.sections import Preference

    return Preference().rewards


def test_the_rewards_follow_the_contract():
    """Guards against a reward that is blind to a field, to the schema or to length."""
    best, parts = total(contract.dump(GOLD))
    assert set(parts.values()) == {1.0} and {f"field_{name}" for name in contract.properties()} < set(parts)
    assert best == pytest.approx(sum(settings_defaults().values()))
    _, wrong = total(contract.dump({**GOLD, "priority": "high"}))
    assert (wrong["field_priority"], wrong["field_category"], wrong["schema"]) == (0.0, 1.0, 1.0)
    _, broken = total('{"category": "nonsense"}')
    assert (broken["parses"], broken["schema"], broken["field_priority"]) == (1.0, 0.0, 0.0)
    only, parts = total("no", {"length": 1.0})
    assert list(parts) == ["length"] and only == pytest.approx(2 / len(row(0).answer))


@pytest.mark.parametrize(
    "cheat",
    ["", "{}", "null", "Sure! Here you go.", contract.dump(GOLD) * 2, f"```json\n{contract.dump(GOLD)}\n```", contract.dump(GOLD) + " " * 200,
     contract.dump(GOLD)[:-1] + ',"category":"bug"}', '{"category":' * 40],
)  # fmt: skip
def test_no_cheat_earns_as_much_as_the_right_answer(cheat):
    """Guards against reward hacking: the empty object, a fence, padding, the answer twice, a key twice."""
    assert total(cheat)[0] < total(contract.dump(GOLD))[0] - 0.05


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dpo", "orpo", "grpo"])
def test_each_method_trains_and_is_discarded_where_dev_shows_nothing(project, method, monkeypatch):
    """Guards against a method that is only a name, that trains the reference, or that is kept without proof."""
    from safetensors.torch import load_file

    adapter = project / "outputs/adapters/r1"
    train(settings_of(project), contract)
    tuned, fit = {}, preference.fit

    def watched(settings, contract, rows, adapter, out, also):
        metrics = fit(settings, contract, rows, adapter, out, also)
        tuned.update(load_file(out / "adapter_model.safetensors"))
        return metrics

    monkeypatch.setattr(preference, "fit", watched)
    before = load_file(adapter / "adapter_model.safetensors")
    facts = preference.tune(settings_of(project, method=method), contract)["preference"]
    assert facts["status"] == "discarded" and facts["metrics"]["pairs"] == 8 and facts["metrics"]["steps"] == 2
    assert before.keys() == tuned.keys() and any((before[k] != tuned[k]).any() for k in before)
    after = load_file(adapter / "adapter_model.safetensors")
    assert all((before[k] == after[k]).all() for k in before) and not adapter.with_name(f"r1-{method}").exists()
    record = registry.latest(settings_of(project), "runs", stage="train", status="completed", run_id="r1")
    assert record["preference"]["outcome"] == "no difference shown" and "preference" not in record["recipe"]
    assert facts["verdict"].startswith(f"{method.upper()} discarded, against SFT alone no difference shown: ")
    if method == "grpo":
        assert {"reward", "rewards/parses/mean", "rewards/field_category/mean"} <= facts["metrics"].keys()


@pytest.fixture
def tuned(project, monkeypatch):
    """A trained run whose tuning is a stub that leaves a recognisable adapter."""
    train(settings_of(project), contract)

    def fit(settings, contract, rows, adapter, out, also):
        out.mkdir(parents=True)
        (out / "adapter_config.json").write_text((adapter / "adapter_config.json").read_text())
        (out / "adapter_model.safetensors").write_bytes(b"tuned")
        return {"pairs": len(rows), "steps": 1, "general_loss_final": 9.5}

    monkeypatch.setattr(preference, "fit", fit)
    return project / "outputs/adapters/r1"


def test_a_better_adapter_takes_the_place_of_the_old_one_which_is_kept_aside(project, tuned, monkeypatch):
    """Guards against a gain that 06 never sees, and against an SFT adapter that is lost."""
    monkeypatch.setattr(preference, "on_dev", lambda *_: verdict(0.02, 0.2))
    facts = preference.tune(settings_of(project, method="dpo"), contract)["preference"]
    assert facts["status"] == "kept" and (tuned / "adapter_model.safetensors").read_bytes() == b"tuned"
    assert (tuned / "training_log.csv").is_file() and (tuned.with_name("r1-sft") / "adapter_model.safetensors").stat().st_size > 1000
    record = registry.latest(settings_of(project), "runs", stage="train", status="completed", run_id="r1")
    weights = "outputs/adapters/r1/adapter_model.safetensors"
    assert record["artefacts"][weights] == registry.file_hash(project / weights)[:16]
    assert record["recipe"]["preference"]["method"] == "dpo" and record["recipe"]["lora_rank"] == 16
    assert record["metrics"]["general_loss_final"] == 9.5 and record["metrics"]["general_loss_first"] > 9.5  # of the tuned model


@pytest.mark.parametrize("compared", [verdict(-0.01, 0.2), verdict(-0.3, -0.1), verdict(0.1, 0.3, n=20)])
def test_noise_a_loss_or_too_few_rows_keep_the_old_one(project, tuned, compared, monkeypatch):
    """Guards against an adapter that is kept because its mean looks better."""
    monkeypatch.setattr(preference, "on_dev", lambda *_: compared)
    before = (tuned / "adapter_model.safetensors").read_bytes()
    assert preference.tune(settings_of(project, method="dpo"), contract)["preference"]["status"] == "discarded"
    assert (tuned / "adapter_model.safetensors").read_bytes() == before


def test_a_failing_tuning_is_closed_as_failed_and_changes_nothing(project, tuned, monkeypatch):
    """Guards against a run that vanishes from the registry, and against half an adapter in place of a whole one."""
    monkeypatch.setattr(preference, "on_dev", lambda *_: (_ for _ in ()).throw(MemoryError("no room")))
    before = (tuned / "adapter_model.safetensors").read_bytes()
    with pytest.raises(MemoryError):
        preference.tune(settings_of(project, method="dpo"), contract)
    record = registry.read(settings_of(project), "runs")[-1]
    assert (record["stage"], record["status"], record["error"]) == ("preference", "failed", "MemoryError: no room")
    assert (tuned / "adapter_model.safetensors").read_bytes() == before and not tuned.with_name("r1-dpo").exists()


def test_tuning_needs_a_method_and_a_trained_run(project):
    """Guards against a tuning that has nothing to start from."""
    for own in ({"method": ""}, {"method": "dpo"}):
        with pytest.raises(SlmError, match="train first"):
            preference.tune(settings_of(project, **own), contract)


SCRIPT = """
import sys
sys.path.insert(0, {root!r})
from slm.settings import load_settings
from slm.train import preference, train
from task.contract import contract
settings = load_settings(start={project!r}, run_id="r1", overrides={{"train.trainer": "unsloth", "preference.method": "dpo"}})
train(settings, contract)
assert "unsloth" in sys.modules
preference.fit = None  # of this process, whose TRL is patched; a fresh one has its own
record = preference.tune(settings, contract)
print(record["trainer"], record["preference"]["metrics"]["steps"], record["preference"]["verdict"])
"""


@pytest.mark.slow
def test_an_adapter_of_unsloth_is_tuned_in_a_process_of_its_own(project):
    """Guards against preference trainers that another package has patched, and against an adapter that only Unsloth reads."""
    if importlib.util.find_spec("unsloth") is None:
        pytest.skip("the extra `unsloth` is not installed")
    settings, root = settings_of(project), str(Path(__file__).resolve().parents[1])
    write_json(project / "outputs/eval_reports/r1/baselines.json", {"key": baselines._key(settings), "results": []})
    code = SCRIPT.format(root=root, project=str(project))
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert "unsloth 2 DPO discarded, against SFT alone no difference shown: " in done.stdout


def test_what_a_fresh_process_is_given_survives_the_way(project):
    """Guards against a project's folder, or a contract, that is lost between two processes."""
    settings, again = pickle.loads(pickle.dumps((settings_of(project, method="dpo"), contract)))
    assert settings.root == project and settings.hash == settings_of(project, method="dpo").hash
    assert again.schema_hash == contract.schema_hash and again.output is contract.output


def test_the_answer_of_a_failed_request_is_no_failure_of_the_model(project):
    """Guards against pairs whose rejected answer is an error message."""

    class Broken:
        name = fingerprint = "broken"

        def answer(self, prompts):
            """Nothing but errors."""
            return [Answer("", 0.0, finish_reason="error") for _ in prompts]

    assert preference.failures(settings_of(project), contract, Broken()) == []
