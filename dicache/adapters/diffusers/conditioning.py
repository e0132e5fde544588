"""Adapters on a transformer, which blocks behind the probe may have and it may not.

A callback may change them in the middle of a run: `set_adapters` the scales of LoRAs, loading the
LoRAs themselves, `set_ip_adapter_scale` those of IP-Adapters. Nobody says so, but the layers know.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Hashable, Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

from torch import Tensor, nn

_IMAGE_PROMPTS = ("ip_hidden_states", "ip_adapter_image_embeds")


class Adapters:
    """Reads the state of what hangs on a transformer's blocks.

    Args:
        transformer: diffusers' model.
        blocks: Its blocks.
    """

    def __init__(self, transformer: nn.Module, blocks: Iterable[nn.Module]) -> None:
        self._transformer = transformer
        self._blocks = list(blocks)
        self._loras = _Loras([], [])
        self._num_exchanges = 0  # of LoRAs for others
        self._attentions: list[Any] | None = None  # that have a processor
        names = inspect.signature(type(transformer).forward).parameters
        self._options = [name for name in names if name.endswith("attention_kwargs")]

    def read(self, arguments: Mapping[str, Any]) -> Hashable:
        """All scales, and what is merged into weights; `None` where there are no adapters."""
        configs = [*(self._transformer.__dict__.get("peft_config") or {}).values()]
        state: list[Hashable] = []
        if configs:
            if not self._loras.are_of(configs):
                self._loras = _Loras(configs, self._blocks)
                self._num_exchanges += 1
            state += (self._num_exchanges, self._loras.read())
        for name in self._options:
            options = arguments.get(name)
            if options and any(options.get(each) is not None for each in _IMAGE_PROMPTS):
                state += self._image_prompt_scales()
        return tuple(state) or None

    def _image_prompt_scales(self) -> Iterator[Hashable]:
        if self._attentions is None:
            modules = [module for block in self._blocks for module in block.modules()]
            self._attentions = [each for each in modules if hasattr(each, "processor")]
        for attention in self._attentions:
            scale = getattr(attention.processor, "scale", None)
            yield tuple(scale) if isinstance(scale, list) else scale


class _Loras:
    """The layers of the LoRAs that are loaded now, none of which it keeps alive.

    Scales may differ from layer to layer. What else there is changes in all of them at once, so
    that it takes no more than one layer a block and LoRA to see it.

    Args:
        configs: Of the LoRAs; others that come later are other objects.
        blocks: Of the transformer.
    """

    def __init__(self, configs: list[Any], blocks: Iterable[nn.Module]) -> None:
        self._configs = configs
        layers: list[list[Any]] = [[m for m in b.modules() if _is_lora(m)] for b in blocks]
        self._scales: list[dict[str, Any]] = [
            layer.scaling for layer in chain.from_iterable(layers)
        ]
        self._layers = [weakref.ref(one) for each in layers for one in _one_a_lora(each)]

    def are_of(self, configs: list[Any]) -> bool:
        """Whether these LoRAs are loaded, and where they were."""
        known = self._configs
        if len(known) != len(configs) or any(
            a is not b for a, b in zip(known, configs, strict=True)
        ):
            return False
        return all(ref() is not None for ref in self._layers)

    def read(self) -> Hashable:
        """Scales of all layers, and the state of one a block and LoRA.

        diffusers multiplies scales before every call, and divides them again: (s w) / w may be
        another number than s, but times w it is s w again.
        """
        scales = [scale for layer in self._scales for scale in layer.values()]
        return tuple(map(_number, scales)), tuple(map(_state_of, self._layers))


def _is_lora(module: nn.Module) -> bool:
    return isinstance(vars(module).get("scaling"), dict)


def _one_a_lora(layers: Iterable[Any]) -> Iterator[Any]:
    """As many of a block's layers as it takes to see each of its LoRAs."""
    seen: set[str] = set()
    for layer in layers:
        if not seen.issuperset(layer.scaling):
            seen.update(layer.scaling)
            yield layer


def _number(scale: Any) -> Hashable:
    """A layer that is prepared for hot swaps has its scale in a tensor, which nobody waits for."""
    if not isinstance(scale, Tensor):
        return float(scale)
    return id(scale), 0 if scale.is_inference() else scale._version


def _state_of(ref: weakref.ref[Any]) -> Hashable:
    layer = ref()
    merged = tuple(getattr(layer, "merged_adapters", ()))
    active = tuple(getattr(layer, "active_adapters", ()))
    return active, bool(getattr(layer, "disable_adapters", False)), merged, _writes_into(layer)


def _writes_into(layer: Any) -> tuple[int, ...]:
    """How often its LoRAs' weights were written, as far as torch counts: not in a hot swap."""
    found = []
    for part in ("lora_A", "lora_B"):
        for module in getattr(layer, part, {}).values():
            weight = getattr(module, "weight", None)
            if isinstance(weight, Tensor) and not weight.is_inference():
                found.append(weight._version)
    return tuple(found)
