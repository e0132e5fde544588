"""`Context`: what the cache keeps for one branch of a run."""

from __future__ import annotations

from collections.abc import Hashable

from torch import Tensor

from .behind import Added, Prompt
from .calibration import Plan
from .extrapolation import Extrapolation
from .gate import Gate, PlannedGate
from .moves import FirstMoves
from .ranks import Ranks
from .readback import Readback, one_number
from .recorder import Recorder
from .rules import Rules
from .trajectory import Trajectory
from .where import Check


class Context:
    """Gates and trajectory of one branch, and what its trajectory's entries are of.

    Attributes:
        rules: What it decides by.
        extrapolation: Calibrated weights, where there are some.
        plan: What is computed, where that is planned.
        gates: One for the whole batch, or one a sample.
        trajectory: `None` until the first step is recorded.
        computes_in: State of what lies behind the probe, in which the trajectory's entries are.
        has_history: Whether the last step was ended by reuse or record.
        to_compute: Steps that are computed before one is judged again.
        on_its_own: Steps that have to be recorded before another branch decides for this one: the
            other one knows nothing of a trajectory that spans a pause.
        has_gradients: Whether the last step that was recorded had gradients.
        added, prompt: Watch what tokens meet behind the probe.
        recorder: Notes computed steps for a profile.
        moves: Watches where the tokens go in the run's first steps.
        ranks: Those that decide together.
    """

    def __init__(
        self,
        rules: Rules,
        ranks: Ranks,
        extrapolation: Extrapolation | None = None,
        plan: Plan | None = None,
    ) -> None:
        self.rules, self.ranks = rules, ranks
        self.extrapolation, self.plan = extrapolation, plan
        self.gates = [self._make_gate()]
        self.trajectory: Trajectory | None = None
        self.has_history = False
        self.to_compute = 0
        self.on_its_own = 0
        self.has_gradients = False
        self.computes_in: Hashable = None
        self.added, self.prompt, self.moves = Added(), Prompt(), FirstMoves()
        self.recorder: Recorder | None = None
        self._promised: tuple[Readback, Check] | None = None
        self._tokens: list[tuple[Hashable, Tensor]] = []  # moments and samples of the last steps' x

    def change_state(self, computes_in: Hashable) -> None:
        """What lies behind the probe is in another state from here on."""
        self.computes_in = computes_in
        self.begin_anew()

    def begin_anew(self) -> None:
        """The trajectory was of another state: two steps are computed before one is reused."""
        if self.trajectory is not None:
            self.drop_entries()
            self.to_compute = 2

    def drop_entries(self, sample: int | None = None) -> None:
        """Forget the trajectory's entries, of a sample or of all."""
        for gate in self.gates if sample is None else [self.gates[sample]]:
            gate.forget_entries()
        if self.trajectory is not None:
            self.trajectory.drop_entries(sample)
        if sample is None:
            self.added.drop_entries()
            self.prompt.drop_entries()

    def release(self) -> None:
        """Free every tensor."""
        self.drop_entries()
        self.trajectory, self.has_history = None, False

    def make_trajectory(self, x: Tensor, p: Tensor) -> Trajectory:
        """Begin with a trajectory for tensors like these.

        Raises:
            ValueError: The rules' backend does not work where the tensors are.
        """
        has_third = self.extrapolation is not None
        trajectory = Trajectory(self.rules, x, p, has_third, self.ranks)
        if self.rules.by_sample:
            self.gates = [self._make_gate() for _ in range(x.shape[0])]
        self.trajectory = trajectory  # now that it is whole
        return trajectory

    def weights(self, step: int) -> list[tuple[float, ...]] | None:
        """Calibrated weights of every gate's samples at a step; `None` without them."""
        known = self.extrapolation
        if known is None:
            return None
        rows = [
            known.weights(step, gate.entries) if known.knows(step, gate.entries) else None
            for gate in self.gates
        ]
        if all(row is None for row in rows):
            return None
        return [(0.0, 0.0, 0.0) if row is None else row for row in rows]  # others are computed

    def leave_profile(self) -> bool:
        """From here on the rules without a profile decide; whether they did not do so already."""
        has_left = self.extrapolation is not None
        if has_left:
            self.extrapolation = self.plan = None
            self.gates = [self._make_gate() for _ in self.gates]
        return has_left

    @property
    def is_blind(self) -> bool:
        """Whether the plan is followed whatever the probe shows."""
        return self.plan is not None and self.rules.veto is None

    def promise(self, check: Check) -> None:
        """A step is reused on this condition, which the next one looks at: nothing waits for it."""
        self._promised = Readback(one_number(check.value)), check

    def owes_a_promise(self) -> bool:
        """Whether the condition of the step before did not hold: it was another run's."""
        if self._promised is None:
            return False
        (readback, check), self._promised = self._promised, None
        return not check.holds(readback.wait()[0])

    def _make_gate(self) -> Gate:
        return Gate(self.rules) if self.plan is None else PlannedGate(self.rules, self.plan)

    def note_tokens(self, moment: Hashable, tokens: Tensor) -> None:
        """A step of this moment began with tokens x, of which this is a sample."""
        self._tokens = [(moment, tokens), *self._tokens[:1]]

    def tokens_before(self, moment: Hashable) -> tuple[Hashable, Tensor] | None:
        """The last step before this moment's: its own moment and its sample, if it is known."""
        return next((known for known in self._tokens if known[0] != moment), None)

    def record(self, y: Tensor) -> None:
        """A step was recorded, with these tokens at the end."""
        self.has_gradients = y.requires_grad
        self.to_compute = max(self.to_compute - 1, 0)
        self.on_its_own = max(self.on_its_own - 1, 0)
        self.added.note_entry()
        self.prompt.note_entry()
