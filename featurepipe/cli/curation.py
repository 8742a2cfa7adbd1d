"""``featurepipe similar``, ``labels``, ``outliers``, ``select``: questions asked of stored features."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from featurepipe.cli.options import (
    add_cluster,
    add_json,
    add_options,
    add_quiet,
    add_store,
    cluster,
    define,
    existing_source,
    existing_store,
    options,
)
from featurepipe.cli.output import show
from featurepipe.curation.options import CheckLabelsOptions, OutliersOptions, SelectOptions, SimilarOptions


def add_similar(command: ArgumentParser) -> None:
    """Declares the command."""
    define(command, similar)
    add_store(command)
    command.add_argument(
        "query", nargs="*", metavar="IMAGE", help="new images: files, or a source as for featurepipe extract"
    )
    add_options(command, SimilarOptions)
    add_cluster(command)
    add_quiet(command)
    add_json(command)


def add_labels(command: ArgumentParser) -> None:
    """Declares the command."""
    define(command, labels)
    add_store(command)
    add_options(command, CheckLabelsOptions)
    add_cluster(command)
    command.add_argument(
        "--dry-run", action="store_true", help="say what would be fitted and how long it takes; write nothing"
    )
    add_quiet(command)
    add_json(command)


def add_outliers(command: ArgumentParser) -> None:
    """Declares the command."""
    define(command, outliers)
    add_store(command)
    add_options(command, OutliersOptions)
    add_cluster(command)
    add_quiet(command)
    add_json(command)


def add_select(command: ArgumentParser) -> None:
    """Declares the command."""
    define(command, select)
    add_store(command)
    add_options(command, SelectOptions)
    add_cluster(command)
    add_quiet(command)
    add_json(command)


def similar(args: Namespace) -> int:
    """Runs ``featurepipe similar``."""
    for given in (*args.query, args.source):
        existing_source(given)
    from featurepipe.curation.similar import similar as find
    from featurepipe.curation.similar import similar_text

    one = len(args.query) == 1 and _is_source(args.query[0])
    found = find(
        existing_store(args), args.query[0] if one else args.query, **options(args, SimilarOptions), **cluster(args),
        silent=args.quiet,
    )  # fmt: skip
    show(args, found, similar_text)
    return 0


def _is_source(name: str) -> bool:
    """Whether this is no image, but a folder, an archive or a manifest of images."""
    from featurepipe.images.listing import is_image_name  # which loads what reads images, and queries by id need none

    return not is_image_name(name)


def labels(args: Namespace) -> int:
    """Runs ``featurepipe labels``."""
    existing_source(args.source)
    from featurepipe.curation.suspects import labels as check
    from featurepipe.curation.suspects import labels_text, plan_text

    found = check(
        existing_store(args),
        **options(args, CheckLabelsOptions),
        **cluster(args),
        dry_run=args.dry_run,
        silent=args.quiet,
    )
    show(args, found, plan_text if args.dry_run else labels_text)
    return 0


def outliers(args: Namespace) -> int:
    """Runs ``featurepipe outliers``."""
    existing_source(args.source)
    from featurepipe.curation.outliers import outliers as find
    from featurepipe.curation.outliers import outliers_text

    found = find(existing_store(args), **options(args, OutliersOptions), **cluster(args), silent=args.quiet)
    show(args, found, outliers_text)
    return 0


def select(args: Namespace) -> int:
    """Runs ``featurepipe select``."""
    existing_source(args.source)
    from featurepipe.curation.next_to_label import select as choose
    from featurepipe.curation.next_to_label import select_text

    found = choose(existing_store(args), **options(args, SelectOptions), **cluster(args), silent=args.quiet)
    show(args, found, select_text)
    return 0
