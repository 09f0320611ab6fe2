"""Ask the served model: the prompt as trained, constrained JSON, an answer that obeys the contract or an error.
Works anywhere beside contract.json, which 08_export writes; needs Python and `pip install jsonschema`, no more."""

import argparse
import hashlib
import json
import math
import os
import sys
import time
import unicodedata
import urllib.error
import urllib.request
import uuid
from pathlib import Path

FORMS = ("json_schema", "json_object")  # the second for servers that know only the older form (llama-cpp-python's)


class ClientError(Exception):
    """The server did not answer, or its answer breaks the contract."""


def load(folder: Path | None = None) -> dict:
    """contract.json, from beside this file unless a folder is given."""
    file = (folder or Path(__file__).parent) / "contract.json"
    if not file.is_file():
        raise ClientError(f"{file}: not there; 08_export writes it.")
    return json.loads(file.read_text(encoding="utf-8"))


def route(contract: dict, group: str = "", file: Path | None = None) -> dict:
    """The contract of the model that this customer gets: `contract`, or for a canary's share of the customers the
    candidate's, as router.json beside this file says (or `file`). No such file, or a torn one: no canary."""
    try:
        router = json.loads((file or Path(__file__).with_name("router.json")).read_text(encoding="utf-8"))
        salted = f"{router['salt']}:{group or uuid.uuid4()}".encode()
        drawn = int(hashlib.sha256(salted).hexdigest()[:8], 16) / 2**32
        return router["candidate"] if drawn < router["share"] else contract
    except (OSError, ValueError, KeyError, TypeError):
        return contract


def body(contract: dict, text: str, form: str = FORMS[0]) -> dict:
    """The request for one input: system prompt and text as trained, greedy decoding, the schema to be held to."""
    text = unicodedata.normalize("NFC", text) if contract["nfc"] else text
    text = text.strip() if contract["strip"] else text
    schema = {"name": "output", "schema": contract["schema"], "strict": True}
    held = {"json_schema": schema} if form == FORMS[0] else {"schema": contract["schema"]}
    messages = [{"role": "system", "content": contract["system"]}, {"role": "user", "content": text}]
    request = {"model": contract["model"], "messages": messages, **contract["sampling"]}
    return request | {"response_format": {"type": form, **held}}


def post(contract: dict, text: str, timeout: float = 60.0) -> dict:
    """The server's reply. Raises ClientError when it refuses or cannot be reached."""
    url, key = f"{contract['url'].rstrip('/')}/chat/completions", os.environ.get("API_KEY", "none")
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    for form in FORMS:
        request = urllib.request.Request(url, json.dumps(body(contract, text, form)).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=timeout) as reply:
                return json.load(reply)
        except urllib.error.HTTPError as error:
            said = error.read().decode(errors="replace")
            if form == FORMS[-1] or "response_format" not in said:
                raise ClientError(f"{url}: HTTP {error.code}: {said[:200]}") from None
        except (OSError, ValueError) as error:
            raise ClientError(f"{url}: no answer ({error}); is the server running?") from None


def ask(contract: dict, text: str, log=None, **facts) -> dict:
    """The value for one input. Raises ClientError for an answer that did not end, is no JSON or breaks the schema.
    A `log` (log.py) gets a line of it, whatever comes; `facts` are what Log.write takes: consent, group, request_id."""
    begin, answer, value = time.perf_counter(), [], None
    try:
        reply = post(contract, text)
        facts = told(reply) | facts
        value = _read(contract, reply, answer)
        return value
    finally:
        if log:
            waited = time.perf_counter() - begin
            log.write(text, "".join(answer), waited, value is not None, model_version=contract["version"], **facts)


def told(reply: dict) -> dict:
    """What the log keeps of a reply beside the answer: the tokens of prompt and answer, and as confidence the least
    probability that the model gave to a token of its answer; nothing of what the server does not say."""
    found = {}
    try:
        usage = reply.get("usage") or {}
        counts = {"tokens_in": usage.get("prompt_tokens"), "tokens_out": usage.get("completion_tokens")}
        found = {name: count for name, count in counts.items() if type(count) is int and count >= 0}
        least = math.exp(min(piece["logprob"] for piece in reply["choices"][0]["logprobs"]["content"]))
        return found | ({"confidence": float(f"{least:.4g}")} if least <= 1 else {})
    except (AttributeError, LookupError, TypeError, ValueError, OverflowError):
        return found


def _read(contract: dict, reply: dict, seen: list[str]) -> dict:
    import jsonschema

    try:
        answer, finish = reply["choices"][0]["message"]["content"], reply["choices"][0]["finish_reason"]
        seen.append(answer)
        value = json.loads(answer)
    except (KeyError, IndexError, TypeError):
        raise ClientError(f"no answer in the reply: {str(reply)[:200]}") from None
    except ValueError as error:
        raise ClientError(f"the answer is not JSON ({error}; finish_reason {finish}): {answer[:200]!r}") from None
    if finish != "stop":
        raise ClientError(f"the answer did not end by itself (finish_reason {finish}): {answer[:200]!r}")
    problems = jsonschema.Draft202012Validator(contract["schema"]).iter_errors(value)
    if problem := jsonschema.exceptions.best_match(problems):
        raise ClientError(f"the answer breaks the contract at {problem.json_path}: {problem.message}")
    return value


def check(contract: dict) -> int:
    """Whether the server builds the prompt that was trained: counted in its own tokens, returned. Raises ClientError
    when the count is another: another chat template, a doubled BOS, another system prompt or tokenizer."""
    wanted, reply = contract["probe"]["prompt_tokens"], post(contract, contract["probe"]["text"])
    found = reply.get("usage", {}).get("prompt_tokens")
    if found != wanted:
        raise ClientError(
            f"{contract['url']}: the prompt has {found} tokens there and had {wanted} in training; "
            "the server uses another chat template, system prompt, tokenizer or BOS."
        )
    return found


def main() -> None:
    """The command line: the value as JSON on standard output, or one line on standard error and exit code 1."""
    try:
        contract = load()
    except ClientError as error:
        raise SystemExit(f"error: {error}") from None
    parser = argparse.ArgumentParser(description=f"Ask {contract['model']}.")
    parser.add_argument("text", nargs="?", help="the input; standard input when left out")
    parser.add_argument("--url", default=contract["url"], help="the server, up to /v1")
    parser.add_argument("--model", default=contract["model"], help="its name there")
    parser.add_argument("--check", action="store_true", help="only see whether the server builds the trained prompt")
    parser.add_argument("--body", choices=FORMS, help="only print the request, for curl")
    options = parser.parse_args()
    contract |= {"url": options.url, "model": options.model}
    text = "" if options.check else sys.stdin.read() if options.text is None else options.text
    try:
        if options.check:
            print(f"{check(contract)} prompt tokens, as trained")
        else:
            shown = body(contract, text, options.body) if options.body else ask(contract, text)
            print(json.dumps(shown, ensure_ascii=False))
    except ClientError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
