"""The Modelfile says what was trained: its Go template, run by Go, is the tokenizer's chat template in five families."""

import json
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
from families import FAMILIES, make_tokenizer
from test_export import CONTRACT, ROWS

from slm.errors import SlmError
from slm.export import modelfile
from slm.export.tokens import conversations
from slm.rows import write_json
from slm.settings import Settings

EXPECTED = {  # written from the documented formats
    "qwen3": (
        '{{ range $n, $m := .Messages }}{{ if eq $m.Role "user" }}{{ if and $.System (eq $n 1) }}<|im_start|>system\n'
        "{{ $.System }}<|im_end|>\n<|im_start|>user\n{{ else }}<|im_start|>user\n{{ end }}{{ $m.Content }}"
        '{{ else if eq $m.Role "assistant" }}<|im_end|>\n<|im_start|>assistant\n{{ $m.Content }}<|im_end|>\n{{ end }}{{ end }}'
        "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    ),
    "qwen3_2507": (
        "{{ if .System }}<|im_start|>system\n{{ .System }}<|im_end|>\n{{ end }}<|im_start|>user\n{{ .Prompt }}<|im_end|>\n"
        "<|im_start|>assistant\n{{ .Response }}<|im_end|>\n"
    ),
    "llama3": (
        "{{ if .System }}<|start_header_id|>system<|end_header_id|>\n\nToday Date: 26 Jul 2024\n\n{{ .System }}<|eot_id|>{{ end }}"
        "<|start_header_id|>user<|end_header_id|>\n\n{{ .Prompt }}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
        "{{ .Response }}<|eot_id|>"
    ),
    "gemma3": (
        "{{ if .System }}<start_of_turn>user\n{{ .System }}\n\n{{ else }}<start_of_turn>user\n{{ end }}{{ .Prompt }}<end_of_turn>\n"
        "<start_of_turn>model\n{{ .Response }}<end_of_turn>\n"
    ),
    "phi3": (
        "{{ if .System }}<|system|>\n{{ .System }}<|end|>\n{{ end }}<|user|>\n{{ .Prompt }}<|end|>\n"
        "<|assistant|>\n{{ .Response }}<|end|>\n"
    ),
    "mistral": (
        '{{ range $n, $m := .Messages }}{{ if eq $m.Role "user" }}{{ if and $.System (eq (len (slice $.Messages $n)) 1) }}[INST] '
        '{{ $.System }}\n\n{{ else }}[INST] {{ end }}{{ $m.Content }}{{ else if eq $m.Role "assistant" }}[/INST] {{ $m.Content }}</s>'
        "{{ end }}{{ end }}[/INST]"
    ),
}
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SEED = "<|im_start|>system\n{{ .System }}<|im_end|>\n"
LONGER = [
    [{"role": role, "content": text} for role, text in zip(["system", *["user", "assistant"] * 3], ["Be brief.", *texts], strict=False)]
    for texts in (["1?", "one", "2?"], ["a b", "{}", "c\nd", '{"x": "{{ .Prompt }}"}', "e"])
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One folder per family, and the plain ChatML of SmolLM2, with tokenizer, generation config and pinned template."""
    from slm.export.merge import pin_template

    found = {}
    for family in [*FAMILIES.values(), FAMILIES["qwen3"]]:
        name = family.name if family.name not in found else "chatml"
        folder = tmp_path_factory.mktemp(name)
        tokenizer = make_tokenizer(family, folder)
        tokenizer.chat_template = CHATML if name == "chatml" else tokenizer.chat_template
        pin_template(tokenizer)
        tokenizer.save_pretrained(folder)
        write_json(folder / "generation_config.json", {"eos_token_id": [tokenizer.convert_tokens_to_ids(t) for t in family.ends]})
        found[name] = folder
    return found


@pytest.fixture
def written(folders, tmp_path):
    """A Modelfile for a family, its GGUF beside it; returns what `check_modelfile` takes."""

    def write(name: str, change=lambda text: text):
        (tmp_path / "model.gguf").touch()
        file = tmp_path / "Modelfile"
        file.write_text(change(modelfile.render_modelfile(Settings(), CONTRACT, folders[name], "./model.gguf", "run t")))
        return Settings(), CONTRACT, folders[name], file, conversations(CONTRACT, ROWS)

    return write


def load(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("name", FAMILIES)
def test_template_of_each_family(folders, name):
    """Guards against a Go template that is right by luck: each is compared with the family's documented format."""
    assert modelfile.read_turn(load(folders[name])).go == EXPECTED[name]
    assert modelfile.family(load(folders[name]).chat_template) == FAMILIES[name].marker


def test_plain_chatml_is_the_form_with_system_and_prompt(folders):
    """Guards against a needless list of messages where Ollama's older variables say the same."""
    go = modelfile.read_turn(load(folders["chatml"])).go
    assert go.startswith("{{ if .System }}" + SEED + "{{ end }}<|im_start|>user\n{{ .Prompt }}<|im_end|>\n<|im_start|>assistant\n{{ .Response }}")


def test_go_renders_what_the_tokenizer_renders(folders):
    """Guards against a template that Go reads otherwise than we do: 200 prompts and longer chats of every family."""
    if not shutil.which("go"):
        pytest.skip("no Go on this machine to run text/template")
    asked, expected = [], []
    for folder in folders.values():
        tokenizer = load(folder)
        turn = modelfile.read_turn(tokenizer)
        chats = [chat for chat in conversations(CONTRACT, ROWS) + LONGER if turn.fits(chat)]
        assert len(chats) > 100 and [turn.render(chat) for chat in chats] == [modelfile.show_prompt(tokenizer, chat) for chat in chats]
        asked.append({"Template": turn.go, "Chats": chats})
        expected.append([turn.render(chat) for chat in chats])
    command = ["go", "run", str(Path(__file__).with_name("ollama.go"))]
    done = subprocess.run(command, input=json.dumps(asked), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == expected and len(expected) == 7


@pytest.mark.parametrize("name", FAMILIES)
def test_written_modelfile_passes_and_stops_at_every_end(written, name):
    """Guards against a check that no Modelfile passes, and against a family's second or third end token left out."""
    settings, contract, folder, file, chats = written(name)
    trimmed = name in ("llama3", "gemma3")
    assert modelfile.check_modelfile(settings, contract, folder, file, chats) == (len(chats) if not trimmed else len(
        [c for c in chats if c[1]["content"] == c[1]["content"].strip()]
    ))  # fmt: skip
    text = file.read_text()
    assert all(f'PARAMETER stop "{end}"\n' in text for end in FAMILIES[name].ends)
    assert ("without it" in text) is trimmed
    assert "PARAMETER temperature 0\nPARAMETER top_p 1\nPARAMETER repeat_penalty 1.05\n" in text


@pytest.mark.parametrize("name, old, new, problem", [
    ("gemma3", "{{ if .System }}<start", "<bos>{{ if .System }}<start", "TEMPLATE writes <bos>, .* the BOS is doubled"),
    ("phi3", "<|user|>\n", "<|user|>", r"TEMPLATE is not the model's chat template \(from"),
    ("llama3", "Name the colour.", "You are a helpful assistant.", "SYSTEM is not the contract's system prompt"),
    ("llama3", 'PARAMETER stop "<|eot_id|>"\n', "", r"no stop at <\|eot_id\|>"),
    ("mistral", "temperature 0", "temperature 0.8", "temperature is 0.8, evaluated was 0"),
    ("qwen3", "PARAMETER repeat_penalty 1.05\n", "", "repeat_penalty is not set, evaluated was 1.05"),
    ("qwen3", "FROM ./model.gguf", "FROM ./other.gguf", "FROM names no file here"),
])  # fmt: skip
def test_a_fault_in_the_modelfile_is_named(written, name, old, new, problem):
    """Guards against a Modelfile edited by hand, or of another run, that renders, says or stops otherwise than trained."""

    def change(text: str) -> str:
        assert old in text
        return text.replace(old, new, 1)

    with pytest.raises(SlmError, match=problem):
        modelfile.check_modelfile(*written(name, change))


def test_modelfile_of_another_model_is_named(written, folders):
    """Guards against a Modelfile written for one base and shipped with another."""
    settings, contract, _, file, chats = written("qwen3")
    with pytest.raises(SlmError, match="TEMPLATE is not the model's chat template.*no stop at <end_of_turn>"):
        modelfile.check_modelfile(settings, contract, folders["gemma3"], file, chats)


@pytest.mark.parametrize("template, problem", [
    ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", "changes, moves or repeats"),
    ("{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}", "refuses system.user messages: no system role"),
    (CHATML.replace("{{ m.role }}", "{{ m.role }}{{ loop.index if loop.index > 3 else '' }}"), "by other rules"),
    (CHATML.replace("<|im_end|>\n", '"""<|im_end|>\n'), 'holds .*""" as text'),
])  # fmt: skip
def test_template_that_fits_no_modelfile_is_refused(folders, template, problem):
    """Guards against a Modelfile that silently drops the system prompt or changes the text."""
    tokenizer = load(folders["chatml"])
    tokenizer.chat_template = template
    with pytest.raises(SlmError, match=problem):
        modelfile.read_turn(tokenizer)


def test_system_prompt_that_ends_with_a_quote_is_read_back_whole(written, monkeypatch):
    """Guards against a system prompt cut at its own quotation mark."""
    import test_modelfile

    quoted = SimpleNamespace(system_prompt='Answer "yes" or "no"', prompt=CONTRACT.prompt, messages=CONTRACT.messages)
    monkeypatch.setattr(test_modelfile, "CONTRACT", quoted)
    assert modelfile.check_modelfile(*written("phi3")) == 200


@pytest.mark.parametrize("template, off", [
    ("{% if enable_thinking is defined and enable_thinking is false %}off{% else %}on{% endif %}", "off"),
    ("{% if not date_string is defined %}{% set date_string = strftime_now('%Y') %}{% endif %}{{ date_string }}", "26 Jul 2024"),
])  # fmt: skip
def test_switches_of_the_caller_are_fixed_in_what_is_shipped(folders, template, off):
    """Guards against a runtime that asks a plain-answer model to think, or writes today's date into every prompt."""
    from slm.export.merge import pin_template

    tokenizer = load(folders["chatml"])
    tokenizer.chat_template = template
    assert tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) != off
    pin_template(tokenizer)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == off


def test_committed_modelfile_belongs_to_the_default_base():
    """Guards against a root Modelfile that Ollama cannot read before the first export has replaced it."""
    text = Path("Modelfile").read_text(encoding="utf-8")
    assert text.count('"""') == 4 and "\nFROM ./outputs/gguf/" in text and "PARAMETER temperature 0\n" in text
