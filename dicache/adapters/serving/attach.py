"""The verbs for engines' pipelines and stages: put the cache on their models, begin a request."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ...config import DiCacheConfig
from ...driver.families import supported_families, unwrapped
from ...driver.model import CachedModel, rules_for
from ..holders import Holders, refuse_cached
from .locate import RequestLocator
from .table import SGLANG, VLLM_OMNI

__all__ = ["apply", "begin", "ensure", "is_holder", "models_of", "remove", "sessions"]

HOLDERS = Holders(VLLM_OMNI, SGLANG)
models_of, is_holder = HOLDERS.models_of, HOLDERS.is_holder
remove, sessions = HOLDERS.remove, HOLDERS.sessions

# How the engines call the numbers of GPUs that share a model, or that they do; above 1 is several.
_SIZES = (
    "tensor_parallel_size",
    "sequence_parallel_size",
    "pipeline_parallel_size",
    "cfg_parallel_size",
    "use_hsdp",
    "tp_size",
    "sp_degree",
    "ulysses_degree",
    "ring_degree",
    "allgather_degree",
    "enable_cfg_parallel",
    "use_fsdp_inference",
)


def apply(thing: Any, config: DiCacheConfig) -> None:
    """See `dicache.apply_dicache`.

    Raises:
        ValueError: No model of it has a row, one is cached already, or several GPUs share it.
    """
    models = models_of(thing)
    if not models:
        raise ValueError(unsupported(thing))
    refuse_several_gpus(thing)
    for model in models.values():
        refuse_cached(model)
    _attach(models, thing, config)


def ensure(thing: Any, config: DiCacheConfig) -> None:
    """Put the cache on those models of a thing that lack it: an engine may load some anew.

    Raises:
        ValueError: Several GPUs share one.
    """
    cached = HOLDERS.cached(thing)
    lacking = {name: model for name, model in models_of(thing).items() if name not in cached}
    if lacking:
        refuse_several_gpus(thing)
        _attach(lacking, thing, config)


def begin(thing: Any, pipeline: Any, num_steps: int | None) -> None:
    """A new request: what the last one left is freed, and the next calls begin a run.

    Args:
        thing: What holds the models.
        pipeline: What has the request's scheduler.
        num_steps: Number of its steps, if anybody said it.
    """
    for each in HOLDERS.cached(thing).values():
        each.session.reset()
        assert isinstance(each.locator, RequestLocator)  # of what is put on here
        each.locator.begin(pipeline, num_steps)


def unsupported(thing: Any) -> str:
    """Why nothing of a thing can be cached."""
    parts = thing._modules if isinstance(thing, nn.Module) else getattr(thing, "__dict__", {})
    modules = {unwrapped(part) for part in parts.values() if isinstance(part, nn.Module)}
    found = ", ".join(sorted(type(each).__name__ for each in modules)) or "no modules"
    packages = (VLLM_OMNI, SGLANG)
    rows = [each for each in supported_families() if str(each.module).startswith(packages)]
    known = ", ".join(f"{each.model_class} ({each.module})" for each in rows)
    return (
        f"DiCache has no row for a transformer of this {type(thing).__name__}, which holds "
        f"{found}. Supported are {known}. dicache.register_family(ModelFamily(module=...)) adds "
        f"others."
    )


def refuse_several_gpus(thing: Any) -> None:
    """See that every model is on one GPU, whole, with whole sequences and all branches.

    Raises:
        ValueError: It is not.
    """
    settings = [getattr(thing, "server_args", None)]
    for owner in (getattr(thing, "od_config", None), *models_of(thing).values()):
        settings.append(getattr(owner, "parallel_config", None))
    given = {
        name: value
        for each in settings
        for name in _SIZES
        if isinstance(value := getattr(each, name, None), int) and (value is True or value > 1)
    }
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        if torch.distributed.get_world_size() > 1:
            given["world size"] = torch.distributed.get_world_size()
    if given:
        told = ", ".join(f"{name}={value}" for name, value in given.items())
        raise ValueError(
            f"Several GPUs work on this {type(thing).__name__} ({told}). Expected one GPU a model: "
            f"DiCache would decide on every GPU for itself, and GPUs that disagree wait for ever. "
            f"Start a server for each GPU, with these at 1 or off, or do without DiCache."
        )


def _attach(models: dict[str, nn.Module], thing: Any, config: DiCacheConfig) -> None:
    """Put caches on these models of a thing, on all or, with an error, on none."""
    HOLDERS.attach([_make(*each, config, thing) for each in models.items()])


def _make(name: str, model: nn.Module, config: DiCacheConfig, thing: Any) -> CachedModel:
    family = HOLDERS.family_of(model)
    assert family is not None  # models_of finds no other
    rules = rules_for(config, family, model, name)
    locator = RequestLocator(family)
    locator.follow(thing if hasattr(thing, "scheduler") else None)
    package = str(family.module).partition(".")[0]
    return CachedModel(model, family, rules, locator, package, frees_last_steps=True)
