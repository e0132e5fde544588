"""A target of speed: the first run of a kind is recorded, and the following ones have its plan.

Of one kind are runs that share what a profile belongs to: the model with its patches, the sigmas,
the sampler, the size of the latent, and whether conditions come one by one or in a batch. What they
taught is kept as long as ComfyUI keeps the model, so a node whose widgets change need not learn it
again.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable, Iterable
from dataclasses import replace
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

from ...config import DiCacheConfig
from ...core.recorder import Recorder
from ...core.rules import Rules, resolve
from ...profile import Identity, Profile, block_speedup
from ...stats import RunStats

LOG = logging.getLogger(__name__)
MOST_KINDS = 8  # whose profiles are kept of a model; that of which no run came for longest goes

_FEWEST = 3  # steps of a run in which one may be reused

# By kind, the one of the last run at the end. `None`: nothing could be learned.
Profiles: TypeAlias = dict[Hashable, Profile | None]
_KNOWN: WeakKeyDictionary[Any, Profiles] = WeakKeyDictionary()  # by ComfyUI's models


class Target:
    """A node's target, and the runs of its model.

    Args:
        config: The target, and `profile="auto"`.
        threshold: What decides where there is no plan.
        patcher: The model that came into the node, a `ModelPatcher`.
        num_blocks: Number of its blocks.
    """

    def __init__(
        self, config: DiCacheConfig, threshold: float, patcher: Any, num_blocks: int
    ) -> None:
        assert config.target_speedup is not None  # or there is no target
        self.speedup = config.target_speedup
        self._config, self._threshold = config, threshold
        self.plain = resolve(replace(config, profile=None, target_speedup=None), threshold)
        self.identity = Identity.of(patcher.model.diffusion_model, num_blocks)
        self.known = _KNOWN.setdefault(patcher.model, {})
        # Those of the model that comes into a run are new in every one, where LoRAs are hooked on
        # conditions.
        self.patches = patcher.patches_uuid
        self._told: set[str] = set()

    @property
    def probe_depth(self) -> int:
        """Number of blocks that form the probe."""
        return self._config.probe_depth

    def fastest(self, steps: int) -> float:
        """The largest target of runs of so many steps, >= 2: a plan computes two of them."""
        share = self.probe_depth / self.identity.num_blocks
        return block_speedup(steps, 2, share)

    def planned(self, profile: Profile) -> Rules:
        """The rules with a profile's plan."""
        return resolve(replace(self._config, profile=profile), self._threshold)

    def warn(self, message: str) -> None:
        """Say it once."""
        if message not in self._told:
            self._told.add(message)
            LOG.warning(message)


class Lesson:
    """What one run has of the others of its kind, and what it teaches them.

    Args:
        target: Of the node.
        steps: Number of steps of the run.
        kind: What its first call does not tell of its kind.
    """

    def __init__(self, target: Target, steps: int, kind: tuple[Hashable, ...]) -> None:
        self._target, self._steps = target, steps
        self._kind: tuple[Hashable, ...] = (target.patches, target.probe_depth, *kind)
        self._profile: Profile | None = None
        self.recorder: Recorder | None = None

    def begin(self, branch: str) -> Rules:
        """The rules of a run whose first call is of this branch, or its recorder beside them."""
        target, known = self._target, self._target.known
        self._kind = (*self._kind, branch)
        if self._steps < _FEWEST:
            return target.plain
        if target.speedup > (most := target.fastest(self._steps)):
            target.warn(_TOO_FAST.format(target.speedup, self._steps, most, target.plain.threshold))
        elif self._kind in known:
            self._profile = known[self._kind] = known.pop(self._kind)
        else:
            self.recorder = Recorder()
        return target.plain if self._profile is None else target.planned(self._profile)

    def end(self, stats: Iterable[RunStats]) -> None:
        """The run came to its end, and this is what it did."""
        if self.recorder is not None:
            self._learn(self.recorder)
        elif self._profile is not None:
            (model,) = self._profile.models.values()
            whole = {
                name
                for each in stats
                for name, records in each.contexts.items()
                if len(records) == self._steps
            }
            if not whole <= model.contexts.keys() and self._target.known.pop(self._kind, None):
                LOG.info(_ANOTHER_BRANCH)

    def _learn(self, recorder: Recorder) -> None:
        target, profile = self._target, None
        try:
            profile = recorder.profile(target.identity, target.probe_depth, self._steps)
            LOG.info(_LEARNED.format(target.speedup))
        except ValueError as error:
            target.warn(_NOTHING_LEARNED.format(target.plain.threshold, error))
        target.known[self._kind] = profile
        while len(target.known) > MOST_KINDS:
            del target.known[next(iter(target.known))]


_LEARNED = (
    "DiCache has calibrated: from now on, runs with this model, steps, sampler, size and guidance "
    "have {:g}x less work in the model's blocks."
)
_NOTHING_LEARNED = (
    "DiCache learned nothing from this run, so the threshold {:g} decides in runs like it. {}"
)
_TOO_FAST = (
    "DiCache: target_speedup is {:g}, and runs of {} steps can have {:.2f} at most, so the "
    "threshold {:g} decides in them."
)
_ANOTHER_BRANCH = (
    "DiCache met conditions that the run it learned from did not have. The next run like this one "
    "calibrates."
)
