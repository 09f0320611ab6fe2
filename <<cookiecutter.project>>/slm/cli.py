"""The command line: every refusal is one sentence and exit code 1."""

import importlib
import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from slm.errors import SlmError
from slm.settings import RECIPE, load_settings, parse_override

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help="From a written contract to a proven small model."
)
rows = typer.Typer(no_args_is_help=True, help="A person's word on one row; 04 applies it on its next run.")
app.add_typer(rows, name="curate")
RowId = Annotated[str, typer.Argument(metavar="ID", help="The row's id, as data/rejected and data/accepted show it.")]
Reviewer = Annotated[str, typer.Option(help="Who decides; kept with the decision.")]
Reason = Annotated[str, typer.Option(help="Why; kept with the decision.")]
money = typer.Typer(no_args_is_help=True, help="What was spent: registry/costs.jsonl. Most of it fills itself.")
app.add_typer(money, name="cost")
dataset = typer.Typer(no_args_is_help=True, help="Dataset versions: which there are, how two differ, one made again.")
app.add_typer(dataset, name="dataset")
canary = typer.Typer(no_args_is_help=True, help="A released run for a share of the customers, until it is decided.")
app.add_typer(canary, name="canary")
Profile = Annotated[str, typer.Option(help="A profile of project.yaml: default, smoke, cpu, gpu.")]
RunId = Annotated[str, typer.Option(help="Names the run's folders; letters, digits, '.', '_', '-'.")]
Config = Annotated[str, typer.Option(help="The settings file.")]


@app.command()
def run(
    stages: Annotated[list[str], typer.Argument(help="all, 04, 04_curate, or a span 03-06")],
    profile: Profile = "default",
    run_id: RunId = "dev",
    s: Annotated[list[str] | None, typer.Option("-s", help="A setting for this run, key=value; repeatable.")] = None,
    config: Config = "project.yaml",
    resume: Annotated[bool, typer.Option("--resume", help="Skip the stages that are done and unchanged.")] = False,
) -> None:
    """Run the numbered notebooks headlessly, in order."""
    from slm import runner

    overrides = dict(parse_override(item) for item in s or [])
    settings = load_settings(config, profile, overrides, run_id)
    records = runner.run(settings, stages, config, overrides, resume)
    total = sum(record["seconds"] for record in records)
    print(f"run {run_id}: {len(records)} stages, {total / 60:.1f} minutes; see outputs/runs/{run_id}/")


@app.command()
def sanity(
    profile: Profile = "default", run_id: RunId = "dev",
    s: Annotated[list[str] | None, typer.Option("-s", help="A setting for this run, key=value; repeatable.")] = None,
    rows: Annotated[int, typer.Option(help="How many accepted rows.", min=1)] = 100,
    config: Config = "project.yaml",
) -> None:  # fmt: skip
    """Train 100 accepted rows and ask them again: 95 % must come back, or exit 1 with the likely cause."""
    from slm.train.sanity import sanity as check

    settings = load_settings(config, profile, dict(parse_override(item) for item in s or []), run_id)
    metrics = check(settings, project_contract(settings), rows)["metrics"]
    print(f"sanity: {metrics['exact']} of {metrics['rows']} rows learnt in {metrics['steps']} steps; format, mask, template and "
          "learning rate are sound.")  # fmt: skip


@app.command()
def diagnose(run_id: str, config: Config = "project.yaml") -> None:
    """Why a run disappoints: five symptoms, their likely causes tested on what it left behind, and what mends them."""
    from slm import registry
    from slm.diagnose.causes import diagnose as find

    trained = registry.latest(load_settings(config), "runs", stage="train", run_id=run_id) or {}
    own = {"model.base": trained["parents"]["base"]} if trained else {}
    settings = load_settings(config, trained.get("profile", "default"), own, run_id)
    print(find(settings, project_contract(settings), run_id))
    print(f"Wrote outputs/eval_reports/{run_id}/diagnosis.md")


def project_contract(settings):
    """The contract in the project's task/contract.py."""
    sys.path.insert(0, str(settings.root))
    return importlib.import_module("task.contract").contract


@app.command()
def sweep(
    grid: Annotated[Path, typer.Argument(help="YAML: name, profile, stages, and under `grid` a list of values per setting.")],
    ray: Annotated[str, typer.Option(help='"auto" or the address of a Ray cluster; by default this machine.')] = "",
    config: Config = "project.yaml",
) -> None:
    """Rerun the notebooks for every cell of a grid, then score against cost over seeds; run again, it goes on."""
    from slm.train import sweep as sweeps

    print(sweeps.markdown(sweeps.sweep(grid, config, ray)))


@app.command()
def repair(
    run_id: str,
    apply: Annotated[bool, typer.Option("--apply", help="Carry it out, 03 to 06, as <run>-repair-N.")] = False,
    rounds: Annotated[int, typer.Option(help="With --apply: so many, each from the best run so far.", min=1)] = 1,
    s: Annotated[list[str] | None, typer.Option("-s", help="A setting for this run, key=value; repeatable.")] = None,
    config: Config = "project.yaml",
) -> None:
    """Why a run fails on dev and which rows would mend it (07); with --apply they are made, and kept if they help."""
    from slm.repair.rounds import rounds as repair_rounds

    given = dict(parse_override(item) for item in s or [])
    repair_rounds(run_id, project_contract(load_settings(config)), config, given, rounds if apply else 0)


@app.command()
def release(run_id: str, profile: Profile = "default", config: Config = "project.yaml") -> None:
    """Release a run: every gate must pass, then it is recorded with its hashes; exit 1 when one does not."""
    from slm.evaluate import release as releases

    settings = load_settings(config, profile, {}, run_id)
    gates = releases.check(settings, run_id)
    for gate in gates:
        print(f"{gate.status:<8} {gate.name}: {gate.detail}")
    print(releases.load_report(settings, run_id).get("cost", {}).get("verdict", ""))
    record = releases.release(settings, run_id, gates)
    print(f"run {run_id} is released: record {record['hash']} in registry/runs.jsonl.")


@app.command()
def shadow(
    run_id: str,
    current: Annotated[str, typer.Option(help="Where the model in production answers: URL up to /v1, or URL#MODEL.")],
    candidate: Annotated[str, typer.Option(help="Where this run's model answers.")],
    against: Annotated[str, typer.Option(help="The run in production; by default the last one released before.")] = "",
    limit: Annotated[int, typer.Option(help="How many requests, the newest.", min=1)] = 200,
    config: Config = "project.yaml",
) -> None:
    """Ask a released run and the model in production the same logged requests; exit 1 when the run is worse."""
    from slm.production import shadow as shadows

    settings = load_settings(config, "default", {}, run_id)
    report = shadows.shadow(settings, project_contract(settings), run_id, current, candidate, against, limit)
    print(f"{report['text']}\nWrote outputs/eval_reports/{run_id}/shadow.md and shadow.json")
    sys.exit(not report["passed"])


@canary.command("start")
def start_canary(run_id: str, config: Config = "project.yaml") -> None:
    """Give the run to a share of the customers, as production.canary plans it; its shadow must have passed."""
    from slm.production import canary as canaries
    from slm.report.tables import markdown

    settings = load_settings(config, "default", {}, run_id)
    router = canaries.start(settings, run_id)
    rate = canaries.failing(settings, project_contract(settings), router)
    print(f"{router.plan.share:.0%} of the customers get {router.candidate['version']}, the others {router.current}.")
    print(f"Where {rate:.1%} of the current model's answers fail, a decision takes (simulated):\n")
    print(f"{markdown(canaries.needed(router, rate))}\nWrote {settings.production.router}; from now on: python -m slm canary check")


@canary.command("check")
def check_canary(config: Config = "project.yaml") -> None:
    """Look at the log and decide, as often as you like. Exit 0: it goes on, or is promoted; 1: rolled back; 3: not decided."""
    from slm.production import canary as canaries
    from slm.report.tables import markdown

    settings = load_settings(config)
    router, notes, table, paths = canaries.check(settings, project_contract(settings))
    if table:
        picture = canaries.plot(paths, router.alpha / 6, settings.path(f"outputs/eval_reports/{router.run_id}/canary.png"))
        print(f"{markdown(table)}\nWrote {picture.relative_to(settings.root)}")
    print(*notes, f"run {router.run_id}: {router.status}, {router.share:.0%} of the customers get it.", sep="\n")
    sys.exit({"rolled back": 1, "not decided": 3}.get(router.status, 0))


@app.command()
def upload(
    run_id: str, repo: Annotated[str, typer.Argument(help="owner/name on the Hugging Face Hub.")],
    public: Annotated[bool, typer.Option("--public", help="For everybody; else private.")] = False,
    unreleased: Annotated[bool, typer.Option("--unreleased", help="Also a run that was not released.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False, config: Config = "project.yaml",
) -> None:  # fmt: skip
    """Send a released run's bundle to the Hugging Face Hub, after showing what; the token comes from HF_TOKEN."""
    from slm.export import upload as uploads

    settings = load_settings(config, "default", {}, run_id)
    files = uploads.collect(settings, run_id, unreleased)
    sizes = {name: (len(f) if isinstance(f, bytes) else f.stat().st_size) / 1e6 for name, f in files.items()}
    print(*[f"{size:10,.2f} MB  {name}" for name, size in {**sizes, "in all": sum(sizes.values())}.items()], sep="\n")
    print(f"run {run_id} to {repo}, {'PUBLIC' if public else 'private'}; licence of the base: {settings.model.license}")
    if not yes and typer.prompt("Type the repository's name to send it", default="", show_default=False) != repo:
        raise SlmError("not confirmed; nothing was sent.")
    print(f"Sent: {uploads.send(files, repo, public)}")


@app.command()
def forget(
    subject: Annotated[
        str, typer.Option(help='Whom: the `group` of a log, an address, a whole name; "-": read from standard input.')
    ] = "",
    row: Annotated[str, typer.Option(help="Or one row, log line or review by its id.")] = "",
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    config: Config = "project.yaml",
) -> None:  # fmt: skip
    """Delete a person's rows, or one, from every file and cache, and name what was trained on them."""
    from slm.production import forget as deletion

    settings = load_settings(config)
    plan = deletion.plan(settings, sys.stdin.readline() if subject == "-" else subject, row)
    print(deletion.told(plan))
    if not yes and not typer.confirm("Delete this for good?"):
        raise SlmError("nothing was changed.")
    record = deletion.forget(settings, plan)
    print(f"Deleted, and found nowhere any more: tombstone {record['hash']} in registry/forgotten.jsonl.")
    for name in record["relocked"]:
        print(f"data/eval/{name}.jsonl is locked anew: run 02 and 06 again; older scores do not compare.")


@app.command()
def monitor(
    since: Annotated[str, typer.Option(help="From this date on, as 2026-11-20; by default the log's last days.")] = "",
    days: Annotated[int, typer.Option(help="Length of a window; by default production.window_days.", min=0)] = 0,
    s: Annotated[list[str] | None, typer.Option("-s", help="A setting, key=value; repeatable.")] = None,
    config: Config = "project.yaml",
) -> None:
    """Judge the newest requests of the log: errors, latency, cost, drift; exit 1 on a regression."""
    from slm.production.monitor import BAD, table, watch
    from slm.report.tables import markdown

    settings = load_settings(config, "default", dict(parse_override(item) for item in s or []))
    found = watch(settings, project_contract(settings), since, days)
    print(*found["notes"], "", markdown(table(found)), "Wrote outputs/monitor/monitor.md, .json and .png", sep="\n")
    if bad := [f"{line['measure']} ({line['model']})" for line in found["lines"] if line["verdict"] == BAD]:
        raise SlmError(f"{len(bad)} regression{'s'[: len(bad) - 1]}: {', '.join(bad)}.")


@app.command()
def compare(run_a: str, run_b: str, config: Config = "project.yaml") -> None:
    """Run B against run A, paired on every set that both answered; refused where rows, sets or contract differ."""
    from slm.report import compare as comparison
    from slm.rows import write_text

    settings, _ = (load_settings(config, "default", {}, run) for run in (run_b, run_a))
    text = comparison.render(settings, run_a, run_b)
    file = write_text(settings.path(f"outputs/eval_reports/{run_b}/compare_{run_a}.md"), text)
    print(f"{text}\nWrote {file.relative_to(settings.root)}")


@app.command()
def review(
    run_id: str, by: Annotated[str, typer.Option(help="Who has read the report.")], config: Config = "project.yaml"
) -> None:
    """Sign the evaluation report of a run; a later change of the report asks for it again."""
    from slm.evaluate.release import sign_off

    record = sign_off(load_settings(config, "default", {}, run_id), run_id, by)
    print(f"run {run_id}: report {record['report'][:12]} reviewed by {record['reviewer']}.")


@app.command("import")
def import_(
    file: Annotated[str, typer.Argument(help=".jsonl, .csv, .tsv, .parquet, a folder saved by `datasets`, or a Hub id.")],
    columns: Annotated[str, typer.Option(help="target=column,…: user, answer or answer.<field>, category, language, group, …")] = "",
    source: Annotated[str, typer.Option(help="human, production, teacher or program.")] = "human",
    out: Annotated[str, typer.Option(help="By default data/generated/<name>.jsonl.")] = "",
    split: Annotated[str, typer.Option(help="Of a `datasets` set.")] = "train",
    config: Config = "project.yaml",
) -> None:
    """Bring your own rows: a whole file becomes rows, or the bad lines are named and nothing is written."""
    from slm.generate.importer import import_rows

    path, count = import_rows(load_settings(config), file, columns, source, out, split)
    print(f"{count} rows in {path}; 04_curate judges them.")


@money.command("add")
def add_cost(
    item: Annotated[str, typer.Argument(help="engineering_time, data_review_cost, deployment_inference_cost, …")],
    hours: Annotated[float | None, typer.Option(help="At the hourly rate in the section `cost` of project.yaml.")] = None,
    amount: Annotated[float | None, typer.Option("--money", help="Negative: takes a wrong entry back.")] = None,
    note: Annotated[str, typer.Option(help="What for; kept with the entry.")] = "",
    run_id: RunId = "dev", config: Config = "project.yaml",
) -> None:  # fmt: skip
    """Enter what no stage can know, your hours or a bill; prints the ledger."""
    from slm import cost
    from slm.report.tables import markdown

    settings = load_settings(config, "default", {}, run_id)
    if not cost.by_hand(settings, item, hours, amount, note)["money"]:
        print(f"cost.{cost.RATES[item]} is 0 in project.yaml: these hours count no money.")
    print(markdown(cost.ledger(settings)))


@rows.command()
def decide(
    row_id: RowId, decision: Annotated[Literal["accept", "reject"], typer.Argument(help="Edits are made in 04.")],
    reviewer: Reviewer, reason: Reason = "", config: Config = "project.yaml",
) -> None:  # fmt: skip
    """Accept or reject a row of data/raw/seed.jsonl or data/generated."""
    from slm.curate.review import by_hand

    done = by_hand(load_settings(config), row_id, decision, reviewer, reason)
    print(f"{done.id}: {done.decision} by {done.reviewer}, recorded; run 04 again.")


@rows.command()
def restore(row_id: RowId, reviewer: Reviewer, reason: Reason = "", config: Config = "project.yaml") -> None:
    """Bring a refused row back, where its gate is a matter of opinion."""
    from slm.curate import review

    done = review.restore(load_settings(config), row_id, reviewer, reason)
    print(f"{done.id}: restored by {done.reviewer}, recorded; run 04 again.")


@dataset.command("list")
def list_versions(config: Config = "project.yaml") -> None:
    """One line per version, oldest first: when, rows (train/dev/test), run, teachers."""
    from slm import registry

    for r in registry.read(load_settings(config), "datasets"):
        split, teachers = "/".join(map(str, r["split"]["rows"].values())), ", ".join(r.get("teachers", {}))
        print(f"{r['version']}  {r['at'][:16]}  {r['rows']} rows ({split})  run {r['run_id']}  {teachers}".rstrip())


@dataset.command("diff")
def diff_versions(old: str, new: str, config: Config = "project.yaml", n: int = 5) -> None:
    """Rows added, removed and answered differently, and the shift per category and kind; N examples of each."""
    from slm.curate.versions import diff

    found = diff(load_settings(config), old, new)
    print(f"{found.summary}\n\n{found.table.to_string()}")
    for sign, rows in (("+", found.added), ("-", found.removed), ("~", found.changed.agg(" ".join, axis=1).tolist())):
        print(*(f"{sign} {row}" for row in rows[:n]), *[f"{sign} … {len(rows) - n} more"][: len(rows) > n], sep="\n")


@dataset.command()
def reproduce(version: str, config: Config = "project.yaml") -> None:
    """Run 04 again, aside, on the recorded inputs and settings; exit 1 when the rows come out otherwise."""
    import shutil

    from slm import runner
    from slm.curate import versions

    settings = load_settings(config)

    def run_04(folder: Path, recorded: dict) -> None:
        for part in ("slm", "specs", "task", "notebooks/04_curate.ipynb", "pyproject.toml"):
            for source in [p for p in (settings.path(part), *settings.path(part).rglob("*")) if p.is_file()]:
                target = folder / source.relative_to(settings.root)
                target.parent.mkdir(parents=True, exist_ok=True)
                if not target.exists():  # an input of the record lies there already
                    shutil.copyfile(source, target)
        for empty in ("project.yaml", RECIPE):  # the record holds every setting
            (folder / empty).parent.mkdir(parents=True, exist_ok=True)
            (folder / empty).write_text("{}\n")
        base = settings.root / recorded["model"]["base"]
        recorded["model"]["base"] = str(base) if base.is_dir() else recorded["model"]["base"]
        os.environ.pop("SLM_PROFILE", None)
        again = load_settings(overrides=recorded, run_id="reproduce", start=folder)
        runner.run(again, ["04"], "project.yaml", recorded)

    record = versions.reproduce(settings, version, run_04)
    print(f"version {record['version']} made again: {record['rows']} rows, the same hash.")


def main() -> None:
    """Run the command line; a user's error prints one line, exit code 1."""
    try:
        app()
    except SlmError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
