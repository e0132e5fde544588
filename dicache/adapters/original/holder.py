"""Finds the models in what users of the original code have at hand.

That is a model, or an object that holds some: `WanT2V` has a `model`, Wan 2.2 two experts,
Tencent's sampler a `pipeline` with a `transformer`. Any of them may be wrapped by FSDP.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from ...driver.families import ModelFamily, find_family, unwrapped
from .table import FAMILIES


def family_of(model: Any) -> ModelFamily | None:
    """The row of an original model; `None` for everything else."""
    family = find_family(model)
    return family if family in FAMILIES else None


def models_of(thing: Any) -> dict[str, nn.Module]:
    """The original models in a thing by the names of its attributes; "model" if it is one itself.

    One that is held under several names is there once.
    """
    found: dict[str, nn.Module] = {}
    parts = dict(_parts_of(thing)) if is_holder(thing) else {"model": thing}
    for name, part in parts.items():
        model = unwrapped(part)
        if family_of(model) is not None and all(model is not each for each in found.values()):
            found[name] = model
    return found


def is_holder(thing: Any) -> bool:
    """Whether a thing is no original model itself."""
    return family_of(unwrapped(thing)) is None


def pipeline_of(thing: Any) -> Any:
    """What has the scheduler that drives a thing's models, if anybody has; Wan's is hidden."""
    for each in (thing, getattr(thing, "pipeline", None)):
        if getattr(each, "scheduler", None) is not None:
            return each
    return None


def _parts_of(thing: Any) -> Iterator[tuple[str, Any]]:
    """Attributes that are modules, of a thing and of its pipeline."""
    for owner in (thing, getattr(thing, "pipeline", None)):
        attributes = getattr(owner, "__dict__", {})
        if isinstance(owner, nn.Module):
            attributes = owner._modules
        yield from ((k, v) for k, v in attributes.items() if isinstance(v, nn.Module))
