"""What users of an engine write, as a configuration: plain keys and values, from JSON say."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

import torch

from ...config import DiCacheConfig


def config_of(given: Mapping[str, Any], where: str) -> DiCacheConfig:
    """A configuration from keys.

    Args:
        given: `"preset"`, the name of published rules, and fields of `DiCacheConfig`. A dtype is
            given by its name, `"bfloat16"`.
        where: What these keys were written in, for the error.

    Raises:
        ValueError: There is no such key, or its value is none for it.
    """
    names = ["preset", *(field.name for field in dataclasses.fields(DiCacheConfig))]
    for key in given:
        if key not in names:
            close = difflib.get_close_matches(str(key), names, 1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ValueError(
                f"{where} has an unknown key {key!r}.{hint} Expected some of {', '.join(names)}."
            )
    values = dict(given)
    preset, dtype = values.pop("preset", None), values.get("cache_dtype")
    if isinstance(dtype, str) and isinstance(getattr(torch, dtype, None), torch.dtype):
        values["cache_dtype"] = getattr(torch, dtype)
    return DiCacheConfig(**values) if preset is None else DiCacheConfig.preset(preset, **values)


def keys_of(given: Any) -> dict[str, Any]:
    """The keys that were set in a mapping, or in an object of vLLM-Omni's `DiffusionCacheConfig`.

    That class has fields for all caches, and keeps what it does not know apart. A field whose value
    is not its default was set by somebody.
    """
    if given is None or isinstance(given, Mapping):
        return dict(given or {})
    found: dict[str, Any] = {}
    for field in dataclasses.fields(given):
        if field.name.startswith("_"):
            continue
        make = field.default_factory
        default = field.default if make is dataclasses.MISSING else make()
        if getattr(given, field.name) != default:
            found[field.name] = getattr(given, field.name)
    return {**found, **getattr(given, "_extra_params", {})}
