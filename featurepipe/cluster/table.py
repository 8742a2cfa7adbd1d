"""A cluster as the user names it, and the `[cluster]` table: what it may say, checked before anything is started."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    model_validator,
)
from pydantic_core import ErrorDetails

from featurepipe.errors import UsageError, unknown
from featurepipe.sizes import seconds_of

KINDS = ("local", "ssh", "slurm", "pbs", "kubernetes")
SCHEMES = ("tcp", "tls", "ucx", "ws", "wss")
PATIENCE = {"local": 60.0, "ssh": 120.0, "slurm": 3600.0, "pbs": 3600.0, "kubernetes": 1800.0}
"""Seconds to wait for a first worker: queues take their time."""

FORMS = "give tcp://HOST:PORT, a scheduler file (.json), local:N, or a TOML file with a [cluster] table"


def _listed(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _seen_from_file(scheduler: str | None, info: ValidationInfo) -> str | None:
    """A scheduler file's path is relative to the file that names it."""
    if scheduler is None:
        return None
    if scheduler.partition("://")[0] in SCHEMES:
        if not scheduler.startswith("ws") and not re.search(r":\d+/?$", scheduler):  # of ws the port is implied
            raise UsageError(
                f"has no port; write {scheduler.rstrip('/')}:8786, or what the scheduler says when it starts"
            )
        return scheduler
    if not scheduler.endswith(".json"):
        raise UsageError("is no address; write tcp://HOST:PORT, or name a scheduler file, .json")
    return str(Path((info.context or {}).get("folder", ".")) / scheduler)


class ClusterTable(BaseModel):
    """``[cluster]``: where the work is done; without it, here."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)

    scheduler: Annotated[str | None, AfterValidator(_seen_from_file)] = None
    """The address of a scheduler that runs, such as `tcp://10.0.0.5:8786`, or its scheduler file, `.json`."""
    kind: Literal["local", "ssh", "slurm", "pbs", "kubernetes"] | None = None
    """What to start instead, for as long as the work takes."""
    workers: int | None = Field(default=None, ge=1)
    """How many processes; one per GPU, where there are GPUs."""
    minimum: int | None = Field(default=None, ge=0)
    """Of a cluster that grows and shrinks with its work."""
    maximum: int | None = Field(default=None, ge=1)
    """Of a cluster that grows and shrinks with its work."""
    hosts: Annotated[tuple[str, ...], BeforeValidator(_listed)] = ()
    """With `ssh`: the scheduler's machine, then those of the workers; a machine named twice has two processes."""
    gpus: bool = False
    """One GPU for each worker. On this machine that needs no asking; with `ssh` the k-th process of a host gets its GPU k."""
    volumes: dict[str, str] = Field(default_factory=dict)
    """With `kubernetes`: where each claim of a persistent volume is mounted, such as `"/data" = "images"`."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Handed to LocalCluster, SSHCluster, SLURMCluster, PBSCluster or KubeCluster."""
    wait: Annotated[float, BeforeValidator(seconds_of)] | None = None
    """How long to wait while there is no worker, such as `10min`; by default 1 min, for queues up to 1 h."""

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        started = self.model_fields_set - {"scheduler", "wait"}
        if self.scheduler and started:
            raise UsageError(f"names a scheduler that runs, and says how to start one: {', '.join(sorted(started))}")
        if not self.scheduler and not self.kind:
            raise UsageError(
                f"needs scheduler, the address of one that runs, or kind, what to start: {', '.join(KINDS)}"
            )
        self._check_number()
        return self

    def _check_number(self) -> None:
        if self.is_adaptive and self.workers:
            raise UsageError("give workers, or minimum and maximum for a cluster that grows with its work, not both")
        if self.is_adaptive and (self.maximum is None or self.maximum < (self.minimum or 0)):
            raise UsageError("a cluster that grows with its work needs a maximum, no less than minimum")
        if self.is_adaptive and self.kind == "ssh":
            raise UsageError("machines reached by ssh are as many as hosts names; leave minimum and maximum out")
        if self.volumes and self.kind != "kubernetes":
            raise UsageError('volumes are mounted in pods, so only with kind = "kubernetes"')
        if (self.kind == "ssh") != bool(self.hosts):
            raise UsageError(
                "ssh needs hosts, the scheduler's machine first, then those of the workers; no other kind has hosts"
            )

    @property
    def is_adaptive(self) -> bool:
        """Whether the cluster grows and shrinks."""
        return self.minimum is not None or self.maximum is not None

    @property
    def most(self) -> int:
        """How many workers there may be, where the cluster grows; else 0."""
        return self.maximum or 0

    @property
    def patience(self) -> float:
        """Seconds to wait for a worker while there is none."""
        return self.wait or PATIENCE.get(self.kind or "", 60.0)

    def __str__(self) -> str:
        number = f"{self.minimum or 0} to {self.maximum}" if self.is_adaptive else self.workers or "its"
        return re.sub("//[^/@]*@", "//", self.scheduler or "") or f"{self.kind}, {number} workers"  # no password


def checked_spec(spec: Any) -> Any:
    """What names a cluster, read if it is text, a path or a mapping; a client or a cluster stays as it is.

    Raises:
        UsageError: it names no cluster.
    """
    return read_spec(spec) if isinstance(spec, str | PathLike | Mapping) else spec


def read_spec(spec: Any) -> ClusterTable:
    """Reads what names a cluster; connects to nothing.

    Args:
        spec: text as on the command line, a path, or a mapping: the table.

    Raises:
        UsageError: it names no cluster; says what may be given.

    Example:
        >>> read_spec("local:2").workers, read_spec("tcp://10.0.0.5:8786").scheduler
        (2, 'tcp://10.0.0.5:8786')
    """
    if isinstance(spec, ClusterTable):
        return spec
    if isinstance(spec, Mapping):
        return _table(spec, "cluster", Path())
    text = str(spec)
    if match := re.fullmatch(r"local(?::(\d+))?", text):
        return _table({"kind": "local"} | ({"workers": int(match[1])} if match[1] else {}), text, Path())
    if text.partition("://")[0] in SCHEMES or text.endswith(".json"):
        return _table({"scheduler": text}, "cluster", Path())
    if text.endswith(".toml"):
        return _from_file(Path(text))
    raise UsageError(f"cluster {text!r} names no cluster; {FORMS}")


def _from_file(path: Path) -> ClusterTable:
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}; {FORMS}") from error
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{path} is not TOML: {error}") from error
    if not isinstance(content.get("cluster"), dict):
        raise UsageError(f"{path} has no [cluster] table; it has: {', '.join(content) or 'nothing'}")
    return _table(content["cluster"], f"{path}: cluster", path.parent)


def _table(values: Mapping[str, Any], where: str, folder: Path) -> ClusterTable:
    try:
        return ClusterTable.model_validate(dict(values), context={"folder": folder})
    except ValidationError as error:
        raise UsageError("\n".join(_line(details, where) for details in error.errors())) from error


def _line(details: ErrorDetails, where: str) -> str:
    key = ".".join([where, *map(str, details["loc"])])
    if details["type"] == "extra_forbidden":
        return str(unknown("key", key, ClusterTable.model_fields))
    if details["type"] == "literal_error":
        return f"{key}: {unknown('kind', details['input'], KINDS)}"
    if details["type"] == "greater_than_equal" and details["loc"]:
        return f"{key} = {details['input']!r} is too few; give a number from {details['ctx']['ge']}"
    given = "" if isinstance(details["input"], dict) else f" = {details['input']!r}"
    return f"{key}{given}: {details.get('ctx', {}).get('error') or details['msg']}"
