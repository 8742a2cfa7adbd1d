"""``featurepipe run`` and ``featurepipe runs``: a night of a job, and what earlier nights did."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Collection
from pathlib import Path

from featurepipe.cli.options import (
    Commands,
    add_cluster,
    add_command,
    add_json,
    add_last,
    add_quiet,
    add_store,
    cluster,
    existing_store,
)
from featurepipe.cli.output import show
from featurepipe.errors import UsageError, unknown
from featurepipe.summary import whole_runs


def add(commands: Commands) -> None:
    """Declares both commands."""
    command = add_command(
        commands, "run", run, "one night of a job: what is new, then heads, predictions, drift, upkeep, report",
        epilog="Schedule it, for every night say: it goes on where the last run stopped, and a second run of the same job "
        "ends at once with exit code 75. pipelines/ has jobs to copy. See exit codes in featurepipe --help.",
    )  # fmt: skip
    option = command.add_argument
    option("job", metavar="JOB.toml", help="the job file; relative paths in it are seen from its folder")
    option("--dry-run", action="store_true", help="say what would be done; change nothing")
    option("--retry-rejects", action="store_true", help="try images again whose bytes were rejected before")
    option("--log-format", choices=["text", "json"], default="text",
           help="of the messages on standard error; json: one object a line, and no summary (default: %(default)s)")  # fmt: skip
    add_cluster(command)
    add_quiet(command)
    add_json(command)
    command = add_command(commands, "runs", runs, "the last runs of a store: when, of which job, how they ended")
    add_store(command)
    add_last(command, "runs", 30)
    command.add_argument("--job", metavar="NAME", help="only runs of this job")
    add_json(command)


def run(args: Namespace) -> int:
    """Runs ``featurepipe run``; the run record holds the exit code."""
    from featurepipe.jobs.run import run_job
    from featurepipe.jobs.text import plan_text, summary_text

    record = run_job(
        args.job,
        dry_run=args.dry_run,
        retry_rejects=args.retry_rejects,
        log_format=args.log_format,
        silent=args.quiet,
        **cluster(args),
    )
    if args.json or args.dry_run or args.log_format == "text":
        show(args, record, plan_text if args.dry_run else summary_text)
    return int(record.get("exit_code", 0))


def runs(args: Namespace) -> int:
    """Runs ``featurepipe runs``."""
    from featurepipe.jobs.text import runs_text

    store = existing_store(args)
    records = store.runs()
    if args.job is not None:
        _check_job(args.job, {record["job"] for record in records if "job" in record}, store.path)
    chosen = [record for record in whole_runs(records) if args.job in (None, record.get("job"))]
    show(args, chosen[-args.last :], runs_text)
    return 0


def _check_job(job: str, jobs: Collection[str], store: Path) -> None:
    if not jobs:
        raise UsageError(f"unknown job {job!r}: no job has run with {store} yet; see featurepipe run --help")
    if job not in jobs:
        raise unknown("job", job, sorted(jobs), where=str(store), see=f"featurepipe runs {store}")
