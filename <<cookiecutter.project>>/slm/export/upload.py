"""The released bundle to the Hugging Face Hub: collected and checked here, shown and confirmed by the command line."""

import os
from pathlib import Path

from slm import registry
from slm.errors import SlmError
from slm.evaluate.release import chosen
from slm.export.quantize import gguf_folder


def collect(settings, run_id: str, unreleased: bool = False) -> dict[str, Path | bytes]:
    """{path in the repository: file, or text}: the chosen file of a run with all that belongs to it; the card becomes
    README.md. Raises SlmError when there is no bundle, when a file is not what 08 proved, or, unless `unreleased`, when
    it is not the run's recorded release."""
    folder, quant = gguf_folder(settings), chosen(settings, run_id)
    if not quant or not (folder / "checksums.txt").is_file():
        raise SlmError(f"outputs/gguf/{run_id}: no proven bundle there; run 08_export first.")
    lines = (folder / "checksums.txt").read_text(encoding="utf-8").splitlines()
    proven = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    for name, digest in proven.items():
        if not (folder / name).is_file() or registry.file_hash(folder / name) != digest:
            raise SlmError(f"outputs/gguf/{run_id}/{name}: missing, or not what was proven; run 08_export again.")
    release = registry.latest(settings, "runs", stage="release", run_id=run_id)
    if not unreleased and not (release and proven.items() <= release["files"].items()):
        why = "its bundle is not the one that was released" if release else "it was never released"
        raise SlmError(f"run {run_id}: {why}; run `python -m slm release {run_id}` first, or add --unreleased.")
    names = [name for name in proven if not name.endswith(".gguf") or name == f"model-{quant}.gguf"]
    sent = {name.replace("model_card.md", "README.md"): name for name in names}
    sums = "".join(f"{proven[name]}  {target}\n" for target, name in sent.items())
    return {**{target: folder / name for target, name in sent.items()}, "checksums.txt": sums.encode()}


def send(files: dict[str, Path | bytes], repo: str, public: bool = False) -> str:
    """Send it in one commit, all or nothing; a new repository is private unless `public`. Returns its address. Raises
    SlmError without HF_TOKEN, for a repository of another visibility, or with the Hub's own words."""
    import httpx
    from huggingface_hub import CommitOperationAdd, HfApi

    if not (token := os.environ.get("HF_TOKEN")):
        raise SlmError("HF_TOKEN is not set; put a token that may write into the environment, never into a file here.")
    api, parts = HfApi(token=token), [CommitOperationAdd(name, file) for name, file in files.items()]
    try:
        url = api.create_repo(repo, private=not public, exist_ok=True)
        if api.repo_info(repo).private is public:
            found, fix = ("private", "leave out --public") if public else ("public", "add --public")
            raise SlmError(f"{url}: is {found} already; {fix}, or name another. Nothing was sent.")
        api.create_commit(repo, parts, commit_message="Model with its card, proofs and client")
    except (OSError, ValueError, httpx.HTTPError) as error:
        raise SlmError(f"{repo}: the Hub refuses: {str(error).strip().splitlines()[0]}") from None
    return str(url)
