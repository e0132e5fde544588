"""`Recorder`: second moments of what an un-cached run's steps leave, for a profile."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..profile import Identity, ModelProfile, Moments, Profile
from .ranks import Ranks

_CHUNK = 8192  # elements whose products are taken at once in fp64


class Recorder:
    """Keeps a fixed choice of elements of r and q of every step, and takes their moments.

    Between begin and end of a run it holds 8 bytes an element, step and context in host memory:
    65,536 elements of one sample, 50 steps and two contexts are 52 MB.

    Args:
        elements: How many of a sample's elements to take, at most; the same in every step.
        seed: Chooses them.

    Attributes:
        timesteps: Of the steps, by index, where they are known.
        taken: Number of elements that were taken of a sample.
        device: Where the tokens are.
    """

    def __init__(self, elements: int = 65536, seed: int = 0) -> None:
        self._elements, self._seed = elements, seed
        self._steps: dict[str, dict[int, tuple[Tensor, Tensor, float]]] = {}
        self._choice: dict[tuple[int, ...], tuple[Tensor, ...] | None] = {}
        self._size = 0  # elements of a batch's hidden states in this process
        self.device = torch.device("cpu")
        self.timesteps: dict[int, float | None] = {}
        self.taken = 0

    def note(
        self, context: str, step: int, timestep: float | None, x: Tensor, p: Tensor, y: Tensor
    ) -> None:
        """A computed step's tokens [B, ...] before block 0, after the probe and at the end."""
        self._size, self.device = x.numel(), x.device
        x, p, y = (self._sample(each) for each in (x, p, y))
        known = self._steps.setdefault(context, {})
        # A step that comes again is that of a new run, whose beginning nobody had seen.
        known[step] = (y - x, p - x, float(p.square().mean(dtype=torch.float64)))
        self.timesteps[step] = timestep

    def clear(self) -> None:
        """Forget the run."""
        self._steps.clear()
        self.timesteps.clear()

    def is_whole(self, num_steps: int) -> bool:
        """Whether every context has all steps of a run of that length."""
        wanted = {*range(num_steps)}
        return bool(self._steps) and all(steps.keys() == wanted for steps in self._steps.values())

    def profile(
        self, identity: Identity, probe_depth: int, num_steps: int, ranks: Ranks | None = None
    ) -> Profile:
        """Of the one run of so many steps that was recorded, with that one model in it.

        Args:
            ranks: As for `moments`. All of them get the first one's.

        Raises:
            ValueError: It teaches nothing: steps are missing, or not finite.
        """
        ranks = Ranks() if ranks is None else ranks
        is_missing = torch.tensor(float(not self.is_whole(num_steps)), device=self.device)
        if ranks.add_up(is_missing):  # to any of them
            raise ValueError(_NOT_WHOLE)
        times = [self.timesteps[step] for step in range(num_steps)]
        known = tuple(float(each) for each in times if each is not None)
        profile = Profile(
            {"model": ModelProfile(identity, probe_depth, self.moments(ranks))},
            num_steps=num_steps,
            timesteps=known if len(known) == num_steps else None,
            elements=self.taken,
            about={"torch": torch.__version__},
        )
        return ranks.take_first(profile, self.device)

    def moments(self, ranks: Ranks | None = None) -> dict[str, Moments]:
        """Moments of every context, averaged over the batch and over the tokens of all ranks.

        Args:
            ranks: Those that have the other tokens; all of them ask for the moments.

        Raises:
            ValueError: Steps are missing, or not finite.
        """
        found = {}
        for name, steps in self._steps.items():
            means = _means_of(name, steps)
            if ranks is not None and ranks.are_several:
                means = self._means_of_all(means, ranks)
            # Behind the exchange: what is not finite in one rank is so in all of them by now.
            if not all(each.isfinite().all() for each in means):
                raise ValueError(
                    f"The hidden states of the context {name!r} are not finite. Expected runs of a "
                    f"model that works; NaN in float16 is the usual cause."
                )
            found[name] = Moments(min(steps), *means)
        return found

    def _means_of_all(self, means: tuple[Tensor, ...], ranks: Ranks) -> tuple[Tensor, ...]:
        """A rank's means are of a sample of its tokens, and count by how many it has of them."""
        flat = torch.cat([each.flatten() for each in means])
        sums = torch.cat([flat, flat.new_ones(1)]) * self._size
        *totals, size = (
            ranks.add_up(sums.to(self.device)).cpu().split([*map(Tensor.numel, means), 1])
        )
        return tuple(t.view_as(each) / size for t, each in zip(totals, means, strict=True))

    def _sample(self, tokens: Tensor) -> Tensor:
        """[B, m] elements, fp32 in host memory."""
        shape = tuple(tokens.shape[1:])
        if shape not in self._choice:
            self._choice[shape] = self._choose(shape)
        chosen = self._choice[shape]
        if chosen is None:
            picked = tokens.flatten(1)
        else:
            index: Any = (slice(None), *(each.to(tokens.device) for each in chosen))
            picked = tokens[index]
        self.taken = picked.shape[1]
        return picked.detach().to("cpu", torch.float32)

    def _choose(self, shape: tuple[int, ...]) -> tuple[Tensor, ...] | None:
        size = torch.Size(shape).numel()
        if size <= self._elements:
            return None
        generator = torch.Generator("cpu").manual_seed(self._seed)
        flat = torch.randint(size, (self._elements,), generator=generator, device="cpu")
        return torch.unravel_index(flat.sort().values, shape)


_NOT_WHOLE = (
    "Steps of it are missing: it was given up, or a branch of guidance pauses, or another model "
    "takes some of its steps."
)


def _means_of(name: str, steps: dict[int, tuple[Tensor, Tensor, float]]) -> tuple[Tensor, ...]:
    """rr, qq, rq and pp of `Moments`, over the elements that were taken."""
    first, count = min(steps), len(steps)
    expected = range(first, first + count)
    if sorted(steps) != [*expected]:
        raise ValueError(
            f"The context {name!r} was called in the steps {sorted(steps)}. Expected steps without "
            f"a gap: guidance that pauses cannot be calibrated."
        )
    r = torch.stack([steps[i][0].flatten() for i in expected])
    q = torch.stack([steps[i][1].flatten() for i in expected])
    rr, qq, rq = _products(r, r), _products(q, q), _products(r, q)
    pp = torch.tensor([steps[i][2] for i in expected], dtype=torch.float64, device="cpu")
    return rr, qq, rq, pp


def _products(left: Tensor, right: Tensor) -> Tensor:
    """Mean over elements of all pairs of rows, in fp64: neighbouring rows are nearly equal."""
    total = torch.zeros((left.shape[0], right.shape[0]), dtype=torch.float64, device="cpu")
    for begin in range(0, left.shape[1], _CHUNK):
        part = slice(begin, begin + _CHUNK)
        total += left[:, part].double() @ right[:, part].double().T
    return total / left.shape[1]
