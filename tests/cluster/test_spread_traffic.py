"""What a pass over spread features sends: little more than coefficients out and sums of gradients back."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from featurepipe.execution import DaskExecutor, spread
from featurepipe.heads import BlockLogisticRegression
from featurepipe.heads.linear import passes

CLASSES, WIDTH = 32, 600


def count_bytes() -> None:
    from distributed.comm.tcp import TCP

    write = TCP.write

    async def counted(self: Any, *arguments: Any, **options: Any) -> int:
        size = await write(self, *arguments, **options)
        TCP.counted += size  # type: ignore[attr-defined]
        return size

    TCP.write, TCP.uncounted, TCP.counted = counted, write, 0  # type: ignore[assignment, attr-defined]


def counted() -> int:
    from distributed.comm.tcp import TCP

    return TCP.counted  # type: ignore[attr-defined]


def count_no_more() -> None:
    from distributed.comm.tcp import TCP

    TCP.write = TCP.uncounted  # type: ignore[attr-defined]


@pytest.fixture
def sent(dask_executor: DaskExecutor) -> Iterator[Any]:
    """Tells how many bytes client, scheduler (which is in this process, too) and workers have sent."""
    count_bytes(), dask_executor.client.run(count_bytes)
    yield lambda: counted() + sum(dask_executor.client.run(counted).values())
    count_no_more(), dask_executor.client.run(count_no_more)


@pytest.mark.filterwarnings("ignore:1 of 1 fits")
def test_a_pass_sends_coefficients_out_and_gradients_back(
    dask_executor: DaskExecutor, sent: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    codes = rng.integers(0, CLASSES, 2000)
    features = rng.standard_normal((2000, WIDTH)) + np.eye(CLASSES, WIDTH)[codes]
    monkeypatch.setattr(passes, "_SMALL_BYTES", 0)  # as large features are computed: in float32
    found: dict[str, list[int]] = {}
    call = passes.Passes.__call__

    def watched(self: Any, numbers: Any, questions: Any) -> Any:
        before = sent()
        answers = call(self, numbers, questions)
        found.setdefault(questions[0].curvature, []).append(sent() - before)
        return answers

    monkeypatch.setattr(passes.Passes, "__call__", watched)
    BlockLogisticRegression(C=1e-3, max_iter=4).fit(spread(features.astype(np.float16), dask_executor), codes)
    out, back = CLASSES * (WIDTH + 1) * 4, CLASSES * (WIDTH + 1) * 8
    least = 2 * out + 2 * back  # to each of two workers; from one to the other, and of both to the client
    by_way_of_the_scheduler = least + out + back
    assert len(found[""]) > 2
    assert least < np.median(found[""]) < 1.1 * by_way_of_the_scheduler
    matrix = (WIDTH + 1) ** 2 // 2 * 4  # half of the one for all classes: once between workers, twice on the way here
    assert found["shared"][0] < 1.1 * (3 * matrix + by_way_of_the_scheduler)
