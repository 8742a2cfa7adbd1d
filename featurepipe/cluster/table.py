"""A cluster as the user names it, and the `[cluster]` table: what it may say, checked before anything is started."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from featurepipe.errors import UsageError

KINDS = ("local", "ssh", "slurm", "pbs", "kubernetes")
SCHEMES = ("tcp", "tls", "ucx", "ws", "wss")
PATIENCE = {"local": 60.0, "ssh": 120.0, "slurm": 3600.0, "pbs": 3600.0, "kubernetes": 1800.0}
"""Seconds to wait for a first worker: queues take their time."""

FORMS = "give tcp://HOST:PORT, a scheduler file (.json), local:N, or a TOML file with a [cluster] table"


def _listed(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


class ClusterTable(BaseModel):
    """``[cluster]``: where the work is done; without it, here."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)

    scheduler: str | None = None
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
    options: dict[str, Any] = Field(default_factory=dict)
    """Handed to LocalCluster, SSHCluster, SLURMCluster, PBSCluster or KubeCluster."""
    wait: float | None = Field(default=None, gt=0)
    """Seconds to wait for a first worker."""

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if self.scheduler and self.kind:
            raise ValueError("has both scheduler and kind; name the one to use")
        if self.is_adaptive and self.workers:
            raise ValueError("has both workers and minimum or maximum; give workers, or minimum and maximum")
        return self

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
        return _table(spec, "cluster")
    text = str(spec)
    if match := re.fullmatch(r"local(?::(\d+))?", text):
        return _table({"kind": "local"} | ({"workers": int(match[1])} if match[1] else {}), text)
    if text.partition("://")[0] in SCHEMES or text.endswith(".json"):
        return ClusterTable(scheduler=text)
    if text.endswith(".toml"):
        return _from_file(Path(text))
    raise UsageError(f"cluster {text!r} names no cluster; {FORMS}")


def _from_file(path: Path) -> ClusterTable:
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{path} is not TOML: {error}") from error
    if not isinstance(content.get("cluster"), dict):
        raise UsageError(f"{path} has no [cluster] table; it has: {', '.join(content) or 'nothing'}")
    return _table(content["cluster"], f"{path}: cluster")


def _table(values: Mapping[str, Any], where: str) -> ClusterTable:
    try:
        return ClusterTable.model_validate(dict(values))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise UsageError(f"{where}{'.' if key else ''}{key}: {first['msg']}") from error
