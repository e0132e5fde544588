"""The verbs of adapters whose models are found by their rows in what users have at hand.

That is a model, or an object that holds some among its attributes: `WanT2V` has a `model`, Wan 2.2
two experts, Tencent's sampler a `pipeline` with a `transformer`, an engine's stage a `transformer`
and a `transformer_2`. Any of them may be wrapped by FSDP.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from ..core.session import DiCacheSession
from ..core.warning import warn_user
from ..driver.families import ModelFamily, find_family, unwrapped
from ..driver.model import CachedModel

_CACHE = "_dicache"  # where a cached model has its cache


class Holders:
    """Finds an adapter's models, and the caches on them.

    Args:
        packages: That its models' rows name as their `module`, or one inside of it.
    """

    def __init__(self, *packages: str) -> None:
        self._packages = packages

    def family_of(self, model: Any) -> ModelFamily | None:
        """The row of one of its models; `None` for everything else."""
        family = find_family(model)
        if family is None or family.module is None:
            return None
        return family if family.module.partition(".")[0] in self._packages else None

    def models_of(self, thing: Any) -> dict[str, nn.Module]:
        """The models in a thing by the names of its attributes; "model" if it is one itself.

        One that is held under several names is there once.
        """
        found: dict[str, nn.Module] = {}
        parts = dict(_parts_of(thing)) if self.is_holder(thing) else {"model": thing}
        for name, part in parts.items():
            model = unwrapped(part)
            if self.family_of(model) is None:
                continue
            if all(model is not each for each in found.values()):
                found[name] = model
        return found

    def is_holder(self, thing: Any) -> bool:
        """Whether a thing is no such model itself."""
        return self.family_of(unwrapped(thing)) is None

    def cached(self, thing: Any) -> dict[str, CachedModel]:
        """The caches on a thing's models, by name."""
        found = {name: vars(model).get(_CACHE) for name, model in self.models_of(thing).items()}
        return {name: each for name, each in found.items() if each is not None}

    def attach(self, made: Iterable[CachedModel]) -> None:
        """Put caches on their models, which were made for all of them before."""
        for each in made:
            each.attach()
            vars(each.model)[_CACHE] = each

    def remove(self, thing: Any) -> None:
        """See `dicache.remove_dicache`."""
        found = self.cached(thing)
        if not found:
            kind = type(thing).__name__
            warn_user(f"There is no DiCache on this {kind}, so nothing was removed.")
        for each in found.values():
            del vars(each.model)[_CACHE]
            each.detach()

    def sessions(self, thing: Any) -> dict[str, DiCacheSession]:
        """The sessions of a thing's models, by name."""
        found = self.cached(thing)
        if not found:
            raise ValueError(
                f"There is no DiCache on this {type(thing).__name__}. Call apply_dicache first."
            )
        return {name: each.session for name, each in found.items()}


def refuse_cached(model: nn.Module) -> None:
    """See that there is no cache on a model yet.

    Raises:
        ValueError: There is one.
    """
    if _CACHE in vars(model):
        raise ValueError(
            f"Caching has already been enabled on this {type(model).__name__}, with DiCache. Call "
            f"remove_dicache(...) first."
        )


def _parts_of(thing: Any) -> Iterator[tuple[str, Any]]:
    """Attributes that are modules, of a thing and of its pipeline."""
    for owner in (thing, getattr(thing, "pipeline", None)):
        attributes = getattr(owner, "__dict__", {})
        if isinstance(owner, nn.Module):
            attributes = owner._modules
        yield from ((k, v) for k, v in attributes.items() if isinstance(v, nn.Module))
