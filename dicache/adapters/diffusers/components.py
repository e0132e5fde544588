"""The transformers of a pipeline, whatever kind of pipeline it is."""

from __future__ import annotations

from typing import Any

from diffusers import DiffusionPipeline
from diffusers.modular_pipelines.modular_pipeline import ModularPipeline
from diffusers.utils.torch_utils import unwrap_module

from ...driver.families import unwrapped


def is_pipeline(model: Any) -> bool:
    """Whether `model` is a pipeline, that is, has components."""
    return isinstance(model, (DiffusionPipeline, ModularPipeline))


def components_of(model: Any) -> dict[str, Any]:
    """A pipeline's components by name, or the given model as "transformer"."""
    parts = model.components if is_pipeline(model) else {"transformer": model}
    found: dict[str, Any] = {}
    for name, part in parts.items():
        part = unwrapped(unwrap_module(part))
        if part is not None and all(part is not other for other in found.values()):
            found[name] = part
    return found


def class_names(model: Any) -> str:
    """The classes that somebody probably meant who gave this model, for an error."""
    parts = components_of(model)
    given = {n: p for n, p in parts.items() if n.startswith("transformer")} or parts
    return ", ".join(sorted({type(part).__name__ for part in given.values()}))
