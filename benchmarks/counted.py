"""What a Dask process sends and receives, counted where Tornado hands bytes to the socket: ``--preload benchmarks.counted``.

Nothing is estimated: heartbeats, headers, and connections of every kind are in it.
"""

from __future__ import annotations

import resource
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any


@dataclass
class Counts:
    """Of one process, since it began to count.

    Attributes:
        received: Bytes.
        sent: Bytes.
        messages: Sent and received; Dask puts what is to be said within milliseconds into one.
    """

    received: int = 0
    sent: int = 0
    messages: int = 0


COUNTS = Counts()  # of this process: whoever asks reaches it only by way of the process


def dask_setup(_server: Any) -> None:
    """Begins to count; Dask calls it before a scheduler or worker opens a connection."""
    from distributed.comm.tcp import TCP
    from tornado.iostream import IOStream

    receive, send = IOStream.read_from_fd, IOStream.write_to_fd

    def received(stream: Any, buffer: Any) -> int | None:
        count = receive(stream, buffer)
        COUNTS.received += count or 0
        return count

    def sent(stream: Any, data: memoryview) -> int:
        count = send(stream, data)
        COUNTS.sent += count
        return count

    stream: Any = IOStream
    stream.read_from_fd, stream.write_to_fd = received, sent
    for name in ("read", "write"):
        setattr(TCP, name, _noted(getattr(TCP, name)))


def _noted(call: Any) -> Any:
    @wraps(call)
    async def noted(*arguments: Any, **options: Any) -> Any:
        answer = await call(*arguments, **options)
        COUNTS.messages += 1
        return answer

    return noted


def counts() -> dict[str, float]:
    """Bytes and messages of this process until now, and its processor seconds."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return {**vars(COUNTS), "cpu": used.ru_utime + used.ru_stime}


def memory() -> dict[str, float]:
    """Resident memory of this process in MB (10 ** 6 bytes), now and at most so far; Linux."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(lines[field].split()[0]) * 1024 / 1e6 for name, field in (("now", "VmRSS"), ("peak", "VmHWM"))}


def forget_peak() -> None:
    """Lets the peak of this process's memory begin anew; Linux."""
    Path("/proc/self/clear_refs").write_text("5")
