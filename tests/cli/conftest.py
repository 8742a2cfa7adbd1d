"""Commands run in this process, with the command behind them replaced by one that notes how it was called."""

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from featurepipe.cli import main
from featurepipe.store import FeatureStore


@dataclass
class StandIn:
    """Stands for a command: takes what the command takes, and returns ``result``."""

    signature: inspect.Signature
    result: Any
    given: dict[str, Any] = field(default_factory=dict)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.given = dict(self.signature.bind(*args, **kwargs).arguments)  # a TypeError if it does not take them
        if isinstance(self.result, Exception):
            raise self.result
        return self.result


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[..., StandIn]:
    """Replaces a command, named as ``module:function``."""

    def replace(place: str, result: Any = None) -> StandIn:
        module, _, name = place.partition(":")
        found = importlib.import_module(module)
        stand_in = StandIn(inspect.signature(getattr(found, name)), result)
        monkeypatch.setattr(found, name, stand_in)
        return stand_in

    return replace


@pytest.fixture
def texts(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Replaces the function that makes text of a result, named as ``module:function``: it says which one was asked."""

    def replace(place: str) -> None:
        module, _, name = place.partition(":")
        monkeypatch.setattr(importlib.import_module(module), name, lambda value: f"{name} of {value}")

    return replace


@pytest.fixture
def store(tmp_path):
    store = FeatureStore(tmp_path / "store")
    with store.lock(shared=True):  # which makes it
        return store


@dataclass(frozen=True)
class Answer:
    code: int
    out: str
    err: str


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Callable[..., Answer]:
    """Runs a command in this process."""

    def run(*arguments: object) -> Answer:
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as end:
            code = end.code
        return Answer(code, *capsys.readouterr())

    return run
