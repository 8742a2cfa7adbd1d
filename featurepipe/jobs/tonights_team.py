"""The workers of a night: connected to when a step first needs them, and let go at the night's end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from featurepipe.execution import DaskExecutor

TeamOf: TypeAlias = "Callable[[], DaskExecutor | None]"
"""The night's workers; None if all is done here."""


@contextmanager
def tonights_team(cluster: Any, say: Callable[[str], None]) -> Iterator[TeamOf]:
    """One team for all steps of a night. If its scheduler goes away, the next step that asks is given another.

    Args:
        cluster: what `featurepipe.execution.connect` takes; None for here.
        say: where messages go.

    Yields:
        A function that connects when it is first called; it raises `ClusterError` if that cannot be done.
    """
    with ExitStack() as stack:
        known: list[DaskExecutor] = []

        def team() -> DaskExecutor | None:
            if cluster is None:
                return None
            if not known or known[-1].scheduler.is_lost:
                from featurepipe.execution import connect

                known.append(stack.enter_context(connect(cluster, say=say)))
            return known[-1]

        yield team


def nobody() -> None:
    """No team: all is done here."""
