"""`Learner`: a model's first run makes the profile of those that follow, `profile="auto"`."""

from __future__ import annotations

from ..config import DiCacheConfig
from ..profile import Identity
from .calibration import Calibration
from .context import Context
from .ranks import Ranks
from .recorder import Recorder
from .run import Run, Timeline

_TRIES = 3  # runs in a row that were recorded for nothing


class Learner:
    """What the runs of one model taught so far.

    A run of a length that nothing is known of is computed and recorded. When it is over and no step
    of it is missing, runs like it have a calibration; others have one where it can be interpolated.

    Args:
        config: Whose targets are met.
        threshold: What the rules without a profile decide by: its cost is the default.
        timeline: Knows which runs are over.
        ranks: Those that learn together.
    """

    def __init__(
        self,
        config: DiCacheConfig,
        threshold: float,
        timeline: Timeline[Context],
        ranks: Ranks,
    ) -> None:
        self._config, self._threshold, self._timeline = config, threshold, timeline
        self._ranks = ranks
        self._known: list[Calibration] = []
        self._recording: tuple[Run[Context], Recorder, Identity] | None = None
        self._failures = 0

    def prepare(
        self, run: Run[Context], identity: Identity | None
    ) -> tuple[Calibration | None, Recorder | None]:
        """What a context of this run decides by, or what records it; the rules alone if neither."""
        self.settle()
        for each in self._known:
            if (fitting := each.for_run(run.num_steps, run.timesteps)) is not None:
                return fitting, None
        if self._recording is None and self._can_learn(run, identity):
            assert identity is not None  # looked at
            self._recording = run, Recorder(), identity
            run.stats.notes.append(_RECORDED)
        if self._recording is not None and self._recording[0] is run:
            return None, self._recording[1]
        return None, None

    def settle(self) -> None:
        """Learn from the run that was recorded, if it is over."""
        if self._recording is None or self._timeline.holds(self._recording[0]):
            return
        (run, recorder, identity), self._recording = self._recording, None
        steps = run.num_steps
        assert steps is not None  # of every run that is recorded
        try:
            self._known.append(self._calibrated(recorder, identity, steps))
            self._failures = 0
        except ValueError as error:  # it says why nothing can be learned
            self._failures += 1
            if self._failures == _TRIES:
                self._timeline.run.warn("profile", _NOTHING_LEARNED.format(error))
        recorder.clear()  # whoever still holds it

    def forget(self) -> None:
        """What is known was of other guidance: the next run is recorded."""
        self._known.clear()

    def _can_learn(self, run: Run[Context], identity: Identity | None) -> bool:
        if identity is None:
            run.warn("profile", _NO_MODEL)
        is_long = run.num_steps is not None and run.num_steps >= 3
        return identity is not None and is_long and self._failures < _TRIES

    def _calibrated(self, recorder: Recorder, identity: Identity, steps: int) -> Calibration:
        config = self._config
        profile = recorder.profile(identity, config.probe_depth, steps, self._ranks)
        (name,) = profile.models
        return Calibration(profile, name, config, self._threshold)


_RECORDED = "this run was computed, to calibrate the following ones (profile='auto')."
_NOTHING_LEARNED = (
    f"profile='auto' learned nothing from {_TRIES} runs in a row, so the rules without a profile "
    f"decide from now on; dicache.calibrate makes a profile, too. Of the last run: {{}}"
)
_NO_MODEL = (
    "profile='auto' has to know how many blocks the model has, and nobody said it to this session: "
    "session.identity = Identity(name, None, num_blocks). The rules without a profile decide."
)
