"""From what a probe showed to what is done: numbers in, decisions out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from .gate import Gate


class Decision(NamedTuple):
    """What the gate decided on one probed step, for the whole batch or for one sample.

    Attributes:
        action: `"reuse"` or `"resume"` (`"compute"` if the probe showed that a new run began). With
            a decision a sample, `"reuse"` if all samples reuse.
        error: The step's error; `None` for `"compute"`, and where every sample has its own.
        accumulated_error: What was compared with the threshold; `None` likewise.
        gamma: The weight that `reuse` will use; `None` likewise.
        samples: With `granularity="sample"`, the decision for every sample.
    """

    action: str
    error: float | None = None
    accumulated_error: float | None = None
    gamma: float | None = None
    samples: tuple[Decision, ...] = ()

    @property
    def reuses_any(self) -> bool:
        """Whether some sample reuses."""
        return self.action == "reuse" or any(each.action == "reuse" for each in self.samples)

    def resumed(self) -> Decision:
        """The same step, computed although it might have been reused."""
        samples = tuple(each.resumed() for each in self.samples)
        action = "compute" if self.action == "compute" else "resume"
        return Decision(action, self.error, self.accumulated_error, samples=samples)


COMPUTE = Decision("compute")


def judge(
    gate: Gate,
    step: int,
    error: float,
    gamma: float,
    size: float = 1.0,
    follows: bool | None = None,
) -> Decision:
    """The decision of one gate.

    Args:
        gate: Of the branch, or of the sample.
        step: Its index in the run.
        error, gamma: What the probe showed.
        size: The step's size relative to the run's mean, for errors that count it.
        follows: Whether the gate that decides for this one reuses; `None`: it decides for itself.
    """
    if gate.counts_size:
        error *= size
    action = gate.decide(step, error, gamma, follows)
    return Decision(action, error, gate.accumulated_error, gamma)


def judge_samples(
    gates: Sequence[Gate],
    step: int,
    numbers: Sequence[Sequence[float]],
    size: float = 1.0,
    leaders: Sequence[int] | None = None,
    follows: Sequence[bool] | None = None,
) -> Decision:
    """A decision for every sample.

    Args:
        gates: Of the samples.
        step: Its index in the run.
        numbers: (error, gamma) of every sample.
        size: As for `judge`.
        leaders: The sample that decides for each one, itself or an earlier one; by the mean of what
            is finite of the errors of those that it decides for.
        follows: Whether each sample reuses in the branch that decides for this one.

    Raises:
        ValueError: `leaders` are not as above.
    """
    leaders = range(len(gates)) if leaders is None else leaders
    _check_leaders(leaders, len(gates))
    judged: list[Decision] = []
    for sample, (gate, (error, gamma)) in enumerate(zip(gates, numbers, strict=True)):
        leader = leaders[sample]
        if leader < sample:
            does_reuse = judged[leader].action == "reuse"
            judged.append(judge(gate, step, error, gamma, size, does_reuse))
            continue
        if math.isfinite(error):
            error = _mean_error(numbers, leaders, sample)
        follow = None if follows is None else follows[sample]
        judged.append(judge(gate, step, error, gamma, size, follow))
    return _of_samples(judged)


def follow_plan(gates: Sequence[Gate], step: int, by_sample: bool) -> Decision:
    """What a plan says, whatever the probe would show."""
    judged = [
        Decision("reuse" if gate.wants_probe(step, None, False) else "resume") for gate in gates
    ]
    return _of_samples(judged) if by_sample else judged[0]


def _of_samples(judged: Sequence[Decision]) -> Decision:
    """The step's decision, of which each sample has its own."""
    reuses_all = all(decision.action == "reuse" for decision in judged)
    return Decision("reuse" if reuses_all else "resume", samples=tuple(judged))


def _mean_error(numbers: Sequence[Sequence[float]], leaders: Sequence[int], sample: int) -> float:
    led = [error for (error, _), leader in zip(numbers, leaders, strict=True) if leader == sample]
    finite = [error for error in led if math.isfinite(error)]
    return sum(finite) / len(finite)


def _check_leaders(leaders: Sequence[int], batch: int) -> None:
    valid = len(leaders) == batch and all(
        0 <= leader <= sample and leaders[leader] == leader for sample, leader in enumerate(leaders)
    )
    if not valid:
        raise ValueError(
            f"leaders is {tuple(leaders)} in a batch of {batch}. Expected one index a sample, of "
            f"the sample itself or of an earlier one that leads itself."
        )
