"""What ``featurepipe extract`` prints, as plain text."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from featurepipe.display import counted, dealt_with, first_names, named_columns, size
from featurepipe.progress import spoken, took

_REJECTS_SHOWN = 5
_WORKERS_SHOWN = 8


def text(record: Mapping[str, Any]) -> str:
    """Sums up the run record that `featurepipe.extraction.extract.extract` returns."""
    counts, seconds = record["counts"], record["seconds"]
    lines = [
        f"{record['dataset']}: {counts['listed']:,} images listed, {dealt_with(counts, record.get('copies', 0))}",
    ]
    changes = [f"{count:,} {kind.replace('_', ' ')}" for kind, count in record.get("changes", {}).items() if count]
    if changes and changes != [f"{counts['listed']:,} unchanged"]:
        lines.append("changes: " + ", ".join(changes))
    if record["gone"] and not changes:  # a run without a snapshot
        lines.append(f"{record['gone']:,} of the last snapshot moved or deleted")
    if record.get("forgotten"):
        lines.append(f"left out, as they were forgotten: {counted(record['forgotten'], 'image')}")
    if record["rejects"]:
        lines.append("rejected: " + ", ".join(f"{count} {code}" for code, count in record["reject_reasons"].items()))
        lines += [f"  {reject['id']}: {reject['reason']}" for reject in record["rejects"][:_REJECTS_SHOWN]]
        if counts["rejected"] > _REJECTS_SHOWN:
            lines.append(f"  ... all in {record['rejects_file']}")
    lines += damaged_lines(record)
    lines += remark_lines(record)
    if counts["computed"]:
        bottleneck = record["backbone"].get("bottleneck")
        by_column = [(named_columns(name, bottleneck), n) for name, n in record["computed_by_column"].items()]
        lines.append("; ".join(f"{name} {f'computed for {n:,}' if n else 'was there'}" for name, n in by_column))
        stages = ", ".join(f"{name} {took(seconds[name])}" for name in ("read", "decode", "forward", "write"))
        lines.append(f"{took(seconds['wall'])} at {record['images_per_second']:,.1f} img/s ({stages})")
        lines += _workers(record)
        lines.append(record["verdict"])
    lines.append(f"space {record['space']}")
    lines += [f"warning: {warning}" for warning in record.get("warnings", ())]
    if record.get("status") == "out of time":
        lines.append("out of time: what is computed is kept, there is no snapshot; the same command goes on")
    return "\n".join(lines)


def text_and_next(record: Mapping[str, Any], store: str, backbone: str | None = None) -> str:
    """The same, and as the last line the command that comes next, with the user's own paths.

    Args:
        record: The run record.
        store: The store as the user called it.
        backbone: What tells the features from others in the store; None where there are no others.
    """
    lines = [text(record)]
    if record.get("status") == "done" and record["counts"]["listed"] > record["counts"]["rejected"]:
        mirrored = record.get("options", {}).get("mirrored")
        lines += _next_of_mirrored(record, store) if mirrored else [next_command(record, store, backbone)]
    return "\n".join(lines)


def _next_of_mirrored(record: Mapping[str, Any], store: str) -> list[str]:
    """The line that names what mirrored images are for, a tail tuned from them; none without activations to tune from."""
    cuts = [column.removesuffix(":map") for column in record["columns"] if column.endswith(":map")]
    if not cuts:
        return []
    network = record["backbone"]["name"]
    words = [
        "featurepipe",
        "finetune",
        store,
        "--dataset",
        record["dataset"],
        "--backbone",
        network,
        "--from",
        cuts[-1],
    ]
    trusted = ["--trust-code"] if ":" in network else []
    words += [*trusted, "--augment", "flip", "--out", f"{record['dataset']}-tuned"]
    return [f"next: {shlex.join(words)}"]


def next_command(record: Mapping[str, Any], store: str, backbone: str | None = None) -> str:
    """The line that names the command by which a head is trained."""
    labels, told = _classes_from(record["listing"])
    command = f"featurepipe train {shlex.quote(store)} --dataset {record['dataset']}"
    named = f" --backbone {shlex.quote(backbone)}" if backbone else ""
    return f"next: {command}{named}{labels} --out {record['dataset']}-bundle{told}"


def _classes_from(listing: Mapping[str, Any]) -> tuple[str, str]:
    """The option that says where classes are, and a remark why; both empty where the images have labels."""
    if listing["labelled"]:
        return "", ""
    columns = listing.get("class_columns") or {}
    if not columns:
        return " --labels FILE.csv", "   # the images have no labels: FILE.csv has the columns id and label"
    (first, values), *others = columns.items()
    also = (
        f"; if others are the classes: {first_names([f'--label {shlex.quote(name)}' for name, _ in others])}"
        if others
        else ""
    )
    return (
        f" --label {shlex.quote(first)}",
        f"   # the images have no labels, but {first} has {values:,} values{also}",
    )


def damaged_lines(record: Mapping[str, Any]) -> list[str]:
    """What a record says of images that were kept although they are damaged; no line where there are none."""
    damaged = record.get("damaged") or {}
    if not damaged.get("kept"):
        return []
    shown = [f"  {image['id']}: {image['reason']}" for image in damaged["images"][:_REJECTS_SHOWN]]
    return [f"kept although damaged: {damaged['kept']:,}", *shown, *["  ..."] * (damaged["kept"] > len(shown))]


def remark_lines(record: Mapping[str, Any]) -> list[str]:
    """What a record says, with counts, of how images were decoded; no line where there is nothing to say."""
    clipped = [f"clipped to their images: {counted(count, 'region')}" for count in (record.get("clipped"),) if count]
    return [*clipped, *(f"{remark}: {counted(count, 'image')}" for remark, count in record.get("remarks", {}).items())]


def _workers(record: Mapping[str, Any]) -> list[str]:
    """Who computed how much, where a cluster did."""
    workers = record.get("cluster", {}).get("workers", [])
    shown = "; ".join(
        f"worker {worker['worker']}: {worker['images']:,} images in {took(worker['seconds'])}"
        for worker in workers[:_WORKERS_SHOWN]
    )
    more = "; ..." if len(workers) > _WORKERS_SHOWN else ""
    return [f"{counted(len(workers), 'worker')} ({shown}{more})"] if workers else []


def estimate_text(estimate: Mapping[str, Any]) -> str:
    """Sums up what ``extract(..., dry_run=True)`` returns."""
    lines = [
        f"{estimate['dataset']}: {estimate['listed']:,} images listed, {estimate['known']:,} known, {estimate['rejected']:,} "
        f"rejected before, {estimate['to_read']:,} to read (at most {estimate['new']:,} new ones: copies are known once read), "
        f"{estimate['gone']:,} gone",
        *(f"warning: {warning}" for warning in estimate["warnings"]),
    ]
    if estimate["images_per_second"]:
        lines.append(
            f"about {spoken(estimate['seconds'])} at {estimate['images_per_second']:,.1f} img/s, "
            f"from a timed sample of {estimate['sampled']} images"
        )
    lines += [f"{column}: {size(count)}" for column, count in estimate["bytes_per_column"].items()]
    return "\n".join([*lines, "dry run: nothing was changed"])
