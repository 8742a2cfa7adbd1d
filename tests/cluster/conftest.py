"""What tests of commands on a cluster need, beside the workers of `tests.conftest`."""

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from featurepipe.images import open_source
from tests.conftest import travelling


@pytest.fixture(scope="module", autouse=True)
def functions_travel(request: pytest.FixtureRequest) -> Iterator[None]:
    """Functions of the test module are sent to workers by value: they cannot import it."""
    with travelling(request.module, sys.modules[__name__]):
        yield


class SlowFolder:
    """A folder whose images take a while: all of them, or those with some text in their path."""

    def __init__(self, path: Path, seconds: float | dict[str, float]) -> None:
        self._source = open_source(path)
        self._seconds = seconds if isinstance(seconds, dict) else {"": seconds}
        self.name, self.location = self._source.name, self._source.location

    def scan(self) -> Any:
        return self._source.scan()

    def read(self, locator: bytes) -> Any:
        time.sleep(next((wait for text, wait in self._seconds.items() if text.encode() in locator), 0))
        return self._source.read(locator)

    def close(self) -> None:
        self._source.close()


@pytest.fixture
def slow_folder() -> type[SlowFolder]:
    """A source that takes its time, wherever it is read."""
    return SlowFolder
