"""The bundle goes to the Hub only as it was proven and released, and only after a yes; the Hub is a double here."""

from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from slm import registry
from slm.cli import app
from slm.errors import SlmError
from slm.export.upload import collect
from slm.rows import write_json, write_text
from slm.settings import load_settings

TOKEN = "hf_" + "planted" * 4


@pytest.fixture
def settings(tmp_path, monkeypatch):
    """A project whose run r1 has a bundle of two quants, q8_0 chosen, and is released."""
    write_text(tmp_path / "project.yaml", "model: {license: apache-2.0}\n")
    write_text(tmp_path / "training/configs/train_config.yaml", "{}\n")
    mine = load_settings(start=tmp_path, run_id="r1")
    folder = mine.path("outputs/gguf/r1")
    for name in ("model-f16.gguf", "model-q8_0.gguf", "Modelfile", "model_card.md", "client/client.py"):
        write_text(folder / name, name * 1000)
    write_json(folder / "export.json", {"chosen": "q8_0"})
    files = {str(f.relative_to(folder)): registry.file_hash(f) for f in sorted(folder.rglob("*")) if f.is_file()}
    write_text(folder / "checksums.txt", "".join(f"{digest}  {name}\n" for name, digest in files.items()))
    registry.append(mine, "runs", {"stage": "release", "run_id": "r1", "files": files})
    monkeypatch.chdir(tmp_path)
    return mine


@pytest.fixture
def hub(monkeypatch):
    """HfApi as a double: keeps what it was asked; `hub.private` is what the repository turns out to be."""
    import huggingface_hub

    found = SimpleNamespace(private=True, sent={}, asked=[], fail=None)

    class Api:
        def __init__(self, token):
            found.token = token

        def create_repo(self, repo, private, exist_ok):
            found.asked.append((repo, private, exist_ok))
            return f"https://huggingface.co/{repo}"

        def repo_info(self, repo):
            return SimpleNamespace(private=found.private)

        def create_commit(self, repo, parts, commit_message):
            if found.fail:
                raise found.fail
            found.sent = {part.path_in_repo: part.path_or_fileobj for part in parts}

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return found


def upload(*words, input="me/model\n"):
    return CliRunner().invoke(app, ["upload", "r1", "me/model", *words], input=input)


def test_what_is_sent_is_shown_first_and_goes_in_one_private_commit(settings, hub):
    """Guards against a public upload by default, the wrong quant, a card that the Hub does not show, and a shown token."""
    done = upload()
    assert done.exit_code == 0, done.exception
    assert hub.asked == [("me/model", True, True)] and hub.token == TOKEN
    assert sorted(hub.sent) == ["Modelfile", "README.md", "checksums.txt", "client/client.py", "export.json", "model-q8_0.gguf"]
    sums = dict(line.split("  ")[::-1] for line in hub.sent["checksums.txt"].decode().splitlines())
    assert all(registry.file_hash(hub.sent[name]) == digest for name, digest in sums.items()) and len(sums) == 5
    shown = done.stdout
    assert "0.01 MB  model-q8_0.gguf" in shown and "MB  in all" in shown and "me/model, private; licence of the base: apache-2.0" in shown
    assert shown.index("in all") < shown.index("Type the repository's name") < shown.index("Sent: https://huggingface.co/me/model")
    kept = [f for f in settings.root.rglob("*") if f.is_file() and TOKEN.encode() in f.read_bytes()]
    assert TOKEN not in shown and kept == []


@pytest.mark.parametrize("typed", ["", "y\n", "me/other\n", None])
def test_without_the_typed_name_nothing_is_sent(settings, hub, typed):
    """Guards against a return key, or a script without a terminal, that publishes a model."""
    assert upload(input=typed).exit_code == 1 and hub.asked == [] and hub.sent == {}
    assert upload("--yes", input=None).exit_code == 0 and hub.sent


def test_an_unreleased_run_is_refused_unless_asked_for(settings, hub):
    """Guards against a model on the Hub whose gates never passed, and against one exported again after its release."""
    settings.path("registry/runs.jsonl").unlink()
    assert "it was never released" in str(upload("--yes").exception) and not hub.sent
    registry.append(settings, "runs", {"stage": "release", "run_id": "r1", "files": {"model-q8_0.gguf": "other"}})
    with pytest.raises(SlmError, match="not the one that was released.*--unreleased"):
        collect(settings, "r1")
    assert upload("--yes", "--unreleased").exit_code == 0 and hub.sent


def test_a_changed_file_is_never_sent(settings, hub):
    """Guards against a file swapped after its proof: --unreleased does not cover that."""
    for name in ("model-f16.gguf", "model_card.md"):
        file = settings.path(f"outputs/gguf/r1/{name}")
        was = file.read_text()
        file.write_text("other")
        with pytest.raises(SlmError, match=f"r1/{name}: missing, or not what was proven"):
            collect(settings, "r1", unreleased=True)
        file.write_text(was)
    settings.path("outputs/gguf/r1/checksums.txt").unlink()
    with pytest.raises(SlmError, match="no proven bundle"):
        collect(settings, "r1")


def test_a_public_repository_of_that_name_is_no_private_one(settings, hub):
    """Guards against `exist_ok`, which keeps a repository public when a private one was asked for."""
    hub.private = False
    done = upload("--yes")
    assert "is public already; add --public" in str(done.exception) and not hub.sent
    assert upload("--yes", "--public").exit_code == 0 and hub.sent


def test_no_token_and_the_hubs_refusal_are_one_sentence(settings, hub, monkeypatch):
    """Guards against a traceback, and against a token that is taken from a login nobody thought of."""
    hub.fail = OSError("403 Forbidden: you have no write access\nmore")
    assert str(upload("--yes").exception) == "me/model: the Hub refuses: 403 Forbidden: you have no write access"
    monkeypatch.delenv("HF_TOKEN")
    assert "HF_TOKEN is not set" in str(upload("--yes").exception)


def test_the_real_client_refuses_a_bad_name_and_no_network_in_one_sentence(settings, monkeypatch):
    """Guards against a double that hides what huggingface_hub really raises."""
    import huggingface_hub

    from slm.export.upload import send

    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", huggingface_hub.HfApi.repo_info)  # checks the name, asks nobody
    with pytest.raises(SlmError, match="the Hub refuses: "):
        send({"a": b"x"}, "no good name!")
    monkeypatch.undo()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(SlmError, match="me/model: the Hub refuses: ") as caught:
        send({"a": b"x"}, "me/model")
    assert TOKEN not in str(caught.value)
