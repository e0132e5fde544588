"""Adapters on a transformer, which blocks behind the probe may have and it may not: their scales.

A callback may change them in the middle of a run: `set_adapters` those of LoRAs,
`set_ip_adapter_scale` those of IP-Adapters. Nobody says so, but the layers know them.
"""

from __future__ import annotations

import inspect
from collections.abc import Hashable, Iterable, Iterator, Mapping
from typing import Any

from torch import nn

_IMAGE_PROMPTS = ("ip_hidden_states", "ip_adapter_image_embeds")


class Adapters:
    """Reads the scales of what hangs on a transformer's blocks.

    Args:
        transformer: diffusers' model.
        blocks: Its blocks.
    """

    def __init__(self, transformer: nn.Module, blocks: Iterable[nn.Module]) -> None:
        self._transformer = transformer
        self._blocks = list(blocks)
        self._layers: list[Any] = []  # of LoRAs
        self._layers_of: Hashable = None
        self._attentions: list[Any] | None = None  # that have a processor
        names = inspect.signature(type(transformer).forward).parameters
        self._options = [name for name in names if name.endswith("attention_kwargs")]

    def read(self, arguments: Mapping[str, Any]) -> Hashable:
        """All scales, and what is merged into weights; `None` where there are no adapters."""
        loras = self._transformer.__dict__.get("peft_config")
        scales: list[Hashable] = []
        if loras:
            scales += map(_state_of, self._lora_layers(loras))
        for name in self._options:
            options = arguments.get(name)
            if options and any(options.get(each) is not None for each in _IMAGE_PROMPTS):
                scales += self._image_prompt_scales()
        return tuple(scales) or None

    def _lora_layers(self, loras: Mapping[str, Any]) -> list[Any]:
        """Of every block as many layers as it takes to see each of its LoRAs."""
        known = (id(loras), *loras)
        if known != self._layers_of:
            self._layers_of = known
            self._layers = [layer for block in self._blocks for layer in _layers_in(block)]
        return self._layers

    def _image_prompt_scales(self) -> Iterator[Hashable]:
        if self._attentions is None:
            modules = [module for block in self._blocks for module in block.modules()]
            self._attentions = [each for each in modules if hasattr(each, "processor")]
        for attention in self._attentions:
            scale = getattr(attention.processor, "scale", None)
            yield tuple(scale) if isinstance(scale, list) else scale


def _layers_in(block: nn.Module) -> Iterator[Any]:
    seen: set[str] = set()
    for module in block.modules():
        scaling = vars(module).get("scaling")
        if isinstance(scaling, dict) and not seen.issuperset(scaling):
            seen.update(scaling)
            yield module


def _state_of(layer: Any) -> Hashable:
    """Rounded: diffusers multiplies a LoRA's scale in every call, and divides it again."""
    scales = tuple((name, round(scale, 6)) for name, scale in layer.scaling.items())
    merged = tuple(getattr(layer, "merged_adapters", ()))
    active = tuple(getattr(layer, "active_adapters", ()))
    return scales, active, bool(getattr(layer, "disable_adapters", False)), merged
