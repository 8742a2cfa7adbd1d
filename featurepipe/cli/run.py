"""``featurepipe run`` and ``featurepipe runs``: a night of a job, and what earlier nights did."""

from __future__ import annotations

from argparse import Action, ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from featurepipe.cli.options import (
    add_cluster,
    add_json,
    add_quiet,
    add_store,
    cluster,
    counted,
    define,
    existing_store,
)
from featurepipe.cli.output import show
from featurepipe.display import displayed, displayed_values
from featurepipe.errors import UsageError, unknown

if TYPE_CHECKING:
    from featurepipe.store import FeatureStore

Record = Mapping[str, Any]


class PrintKeys(Action):
    """Prints what a job file may hold, and ends."""

    def __call__(self, parser: ArgumentParser, _namespace: Namespace, _values: Any, _flag: str | None = None) -> None:
        """Prints it on standard output."""
        from featurepipe.jobs.text import keys_text

        print(keys_text())
        parser.exit()


def add_run(command: ArgumentParser) -> None:
    """Declares the command."""
    define(
        command, run,
        epilog="Schedule it, for every night say: it goes on where the last run stopped, and a second run of the same job "
        "ends at once with exit code 75. pipelines/ has jobs to copy. See exit codes in featurepipe --help.",
    )  # fmt: skip
    option = command.add_argument
    option("job", metavar="JOB.toml", help="the job file; relative paths in it are seen from its folder")
    option(
        "--keys",
        action=PrintKeys,
        nargs=0,
        help="print all keys of job files with their defaults and meanings, and end",
    )
    option("--dry-run", action="store_true", help="say what would be done; change nothing")
    option("--retry-rejects", action="store_true", help="try images again whose bytes were rejected before")
    option("--log-format", choices=["text", "json"], default="text",
           help="of the messages on standard error; json: one object a line, and no summary (default: %(default)s)")  # fmt: skip
    add_cluster(command)
    add_quiet(command)
    add_json(command)


def add_runs(command: ArgumentParser) -> None:
    """Declares the command."""
    define(
        command, runs,
        epilog="A run whose process is gone without a word shows as killed. With --json each run has standing_warnings: the "
        "drift warnings of the store (with --job, of that job) that nobody has accepted and whose images are not gone, the same "
        "in each.",
    )  # fmt: skip
    add_store(command)
    command.add_argument("run_id", nargs="?", metavar="RUN-ID", help="all of one run: an id, its beginning, or `last`")
    command.add_argument(
        "--last", type=counted, default=30, metavar="N", help="how many runs, the newest (default: %(default)s)"
    )
    command.add_argument("--job", metavar="NAME", help="only runs of this job")
    command.add_argument(
        "--rejects",
        action="store_true",
        help="the images that cannot be used now, why, and since which run; those of a last run that failed, too",
    )
    command.add_argument("--dataset", metavar="NAME", help="of --rejects (default: all)")
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
    from featurepipe.functions import check_job
    from featurepipe.jobs.lock import runs_with_ends
    from featurepipe.jobs.text import runs_text
    from featurepipe.summary import whole_runs

    store = existing_store(args)
    if args.rejects:
        return _rejects(args, store)
    if args.dataset is not None:
        raise UsageError("--dataset belongs to --rejects; runs are chosen with --job")
    records = runs_with_ends(store)
    if args.job is not None:
        check_job(args.job, records, store.path)
    chosen = [record for record in whole_runs(records) if args.job in (None, record.get("job"))]
    if args.run_id is not None:
        return _one_run(args, chosen, records, store)
    from featurepipe.monitoring.standing_warnings import told

    stands = _standing(args, records)
    warnings = [f"warning: {told(warning, args.store)}" for warning in stands]
    show(
        args,
        _with_standing(chosen[-args.last :], stands),
        lambda shown: "\n".join([runs_text(shown), *map(displayed, warnings)]),
    )
    return 0


def _standing(args: Namespace, records: Sequence[Record]) -> list[dict[str, Any]]:
    """The drift warnings that stand, whatever run gave them."""
    from featurepipe.monitoring.standing_warnings import standing

    return standing(records, **({} if args.job is None else {"job": args.job}))


def _with_standing(records: Sequence[Record], stands: Sequence[Record]) -> list[Record]:
    """Records with the warnings that stand, the same in each, as the run that warned may not be among them."""
    shown = [{name: value for name, value in warning.items() if name != "held_by"} for warning in stands]
    return [{**record, "standing_warnings": shown} for record in records]


def _one_run(args: Namespace, chosen: Sequence[Record], records: Sequence[Record], store: FeatureStore) -> int:
    from featurepipe.jobs.text import details_text

    if not chosen:
        raise UsageError(f"nothing has run in {store.path} yet; run: featurepipe run JOB.toml")
    record = chosen[-1] if args.run_id == "last" else _named(args.run_id, chosen, records, store)
    (shown,) = _with_standing([record], _standing(args, records))
    own = [part for part in records if part["run_id"] in record.get("extractions", ())]
    show(args, shown, lambda record: details_text(record, displayed_values(own)))
    return 0


def _named(run_id: str, chosen: Sequence[Record], records: Sequence[Record], store: FeatureStore) -> Record:
    """The run of that id, or the only one whose id begins so: of those that are listed, else of all."""
    exact = [record for record in records if record["run_id"] == run_id]
    for some in (chosen, records):
        exact = exact or [record for record in some if record["run_id"].startswith(run_id)]
    if len(exact) == 1:
        return exact[0]
    if exact:
        raise UsageError(
            f"{len(exact)} runs begin with {run_id!r}: {', '.join(record['run_id'] for record in exact[:6])}"
        )
    of = [name for name in store.datasets() if run_id in store.snapshot_ids(name)]
    if of:
        raise UsageError(
            f"{run_id} is a snapshot of dataset {of[0]}, and the record of its run was removed; "
            f"what the store holds: featurepipe info {store.path}"
        )
    newest = [record["run_id"] for record in reversed(records)]
    raise unknown("run", run_id, ["last", *newest], where=str(store.path), see=f"featurepipe runs {store.path}")


def _rejects(args: Namespace, store: FeatureStore) -> int:
    from featurepipe.functions import runs as found
    from featurepipe.jobs.text import rejects_text

    show(args, list(found(store, rejects=True, dataset=args.dataset)), rejects_text)
    return 0
