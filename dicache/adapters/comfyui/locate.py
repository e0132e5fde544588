"""Where a call of a model stands in a sampling run, from the options that ComfyUI gives with it.

ComfyUI names the conditions of a call by unique ids, and tells its sigma and the run's. What it
does not tell, or tells in another way than before, is left open; such calls are computed.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from ...core.readback import as_number
from ...core.where import Where
from ...driver.conditions import Conditions

_SAME_SIGMA = 1e-4  # of the larger one; samplers compute in their own ways what they were given
_CONTROL = ("input", "middle", "output")  # where a ControlNet's residuals go
# Parts of the names of samplers that add noise in every step, if their eta is not 0.
_NOISY = ("ancestral", "sde", "ddpm", "lcm", "seeds_", "sa_solver")


class Same:
    """An object of which only its identity counts; held, so that nothing else takes its place."""

    __slots__ = ("_what",)

    def __init__(self, what: object) -> None:
        self._what = what

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and other._what is self._what

    def __hash__(self) -> int:
        return id(self._what)


class Sigmas:
    """The sigmas of a run: one a step, and the one where it ends."""

    def __init__(self, values: Sequence[float]) -> None:
        self._values = [float(each) for each in values]
        self.num_steps = len(self._values) - 1

    def position(self, sigma: float) -> int | None:
        """The step that begins with a sigma; `None` if none does: an evaluation between steps."""
        if self.num_steps < 1:
            return None
        steps = range(self.num_steps)
        nearest = min(steps, key=lambda step: abs(self._values[step] - sigma))
        is_it = math.isclose(self._values[nearest], sigma, rel_tol=_SAME_SIGMA)
        return nearest if is_it else None

    def timestep(self, sigma: float) -> float:
        """From 1 where the run begins to 0 where it ends: of a part of a run, that of the part.

        A step's size is relative to the run's mean step, and only this run's steps are known.
        """
        first, last = self._values[0], self._values[-1]
        return 1.0 if first == last else (sigma - last) / (first - last)


class Locator:
    """Says where the calls of one run stand.

    Args:
        sigmas: Of the run.
        sampler: Its sampler, which may be one that adds noise in every step.
    """

    def __init__(self, sigmas: Sequence[float], sampler: Any = None) -> None:
        self.sigmas = Sigmas(sigmas)
        self._is_noisy = True if adds_noise(sampler) else None  # if not, the tokens tell
        self._names: dict[Hashable, str] = {}
        self._control = Conditions(_CONTROL)

    @staticmethod
    def sigma(options: Mapping[str, Any]) -> float | None:
        """That of a call; waits for the device. The sampler alone has it, and only there."""
        return as_number(options.get("sigmas"))

    def where(
        self, options: Mapping[str, Any], x: Tensor, sigma: float | None, control: Any, hooks: Any
    ) -> Where | None:
        """Where a call with these tokens x [B, S, D] stands; `None` if it cannot be told.

        Args:
            options: The call's `transformer_options`.
            x: Tokens before block 0.
            sigma: The call's.
            control: Residuals of ControlNets, by the place where they are added.
            hooks: What is hooked on the weights now (LoRAs whose strength moves in a run).
        """
        uuids = options.get("uuids")
        position = None if sigma is None else self.sigmas.position(sigma)
        if not uuids or sigma is None or position is None:
            return None
        patches = list(_patches(options))
        key = (tuple(uuids), _window(options), x.shape, tuple(place for place, _ in patches))
        added: Mapping[str, Any] = control if isinstance(control, Mapping) else {}
        residuals, behind = self._control.read(added, x.shape[0])
        return Where(
            context=self._name(key, options.get("cond_or_uncond") or ()),
            moment=position,
            position=position,
            num_steps=self.sigmas.num_steps,
            is_last=position == self.sigmas.num_steps - 1,
            timestep=self.sigmas.timestep(sigma),
            first_timestep=1.0,
            computes_in=(tuple(patches), residuals, _strengths(hooks)),
            behind=behind,
            is_noisy=self._is_noisy,
        )

    def _name(self, key: Hashable, conditions: Sequence[int]) -> str:
        """A branch's name: its conditions', and a number where several are called so."""
        if key not in self._names:
            name = "+".join(_condition(each) for each in conditions) or "call"
            like = sum(each.partition("#")[0] == name for each in self._names.values())
            self._names[key] = f"{name}#{like + 1}" if like else name
        return self._names[key]


def adds_noise(sampler: Any) -> bool:
    """Whether a sampler is known to add noise in every step."""
    name = getattr(getattr(sampler, "sampler_function", None), "__name__", "")
    options = getattr(sampler, "extra_options", None) or {}
    return options.get("eta") != 0 and any(part in name for part in _NOISY)


def _condition(index: int) -> str:
    return {0: "cond", 1: "uncond"}.get(index, f"cond{index}")


def _window(options: Mapping[str, Any]) -> Hashable:
    """Which part of a video a call is for, where it is sampled in windows."""
    window = options.get("context_window")
    indices = getattr(window, "index_list", None)
    return tuple(indices) if indices is not None else None


def _patches(options: Mapping[str, Any]) -> Iterator[tuple[Hashable, Hashable]]:
    """Other nodes' patches of this call: their places, and who they are."""
    for name, by_block in (options.get("patches_replace") or {}).items():
        for block, patch in by_block.items():
            yield (name, block), Same(patch)
    for name, several in (options.get("patches") or {}).items():
        for index, patch in enumerate(several if isinstance(several, list) else [several]):
            yield (name, index), Same(patch)


def _strengths(hooks: Any) -> Hashable:
    """Who is hooked on the weights, and how strongly in this step."""
    each = getattr(hooks, "hooks", None) or ()
    return tuple((Same(getattr(h, "hook_ref", h)), getattr(h, "strength", None)) for h in each)
